"""Contract: ASkewSGD and ASkewAdamW are torch.optim optimizers, and EpsilonAnnealing is their schedule.

1. At eps = 1 they equal torch.optim.SGD / AdamW after 20 steps; groups without a grid equal them bit for bit.
2. A step equals the operator on each tensor alone (loop == list), with the scale of the weights as the step found them.
3. state_dict resumes bit for bit at any point; the model may be loaded before or after the optimizer.
4. The scale follows its rule during the hold and stands still after; the hull clamp starts with that.
5. LR schedulers, GradScaler, closures, gradient accumulation, copies; telemetry from the pass's own sums.
6. Bad arguments, sparse or complex gradients: an error that names the argument, before anything is written.
7. What is planned once and kept from step to step changes no bit, whatever is edited in between.
8. ``constraint_eps`` is the constraint's; the names that were before, in arguments, groups and checkpoints.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import math
import pickle
import sys
import threading
import warnings

import numpy as np
import oracles
import pytest
import torch
from oracles import GRIDS, Binary, Ternary, Uniform
from torch import nn

import askew_kernels as ak
from askew_kernels import ops
from askew_kernels.optim import ASkewAdamW, ASkewLion, ASkewSGD
from askew_kernels.quant import QuantConfig, WeightQuantizer, compute_scale

GRID = Uniform(4)
CONFIG = QuantConfig(GRID, "sawb")
SGD_OPTIONS = [
    dict(lr=0.1), dict(lr=0.1, momentum=0.9), dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    dict(lr=0.1, momentum=0.8, dampening=0.3), dict(lr=0.1, momentum=0.9, maximize=True, weight_decay=0.1),
]  # fmt: skip
ADAM_OPTIONS = [dict(lr=0.01), dict(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)), dict(lr=0.01, maximize=True)]
LION_OPTIONS = [dict(lr=0.01), dict(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)), dict(lr=0.01, maximize=True)]
EACH = [(ASkewSGD, dict(lr=0.1, momentum=0.9)), (ASkewAdamW, dict(lr=0.02)), (ASkewLion, dict(lr=0.01))]
X = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(3))


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al., 2023, as torch.optim would write it, which has none."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(m.lerp(g, 1 - group["betas"][0]).sign(), alpha=group["lr"])
                m.lerp_(g, 1 - group["betas"][1])


TWINS = {ASkewSGD: torch.optim.SGD, ASkewAdamW: torch.optim.AdamW, ASkewLion: Lion}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parameters(generator, dtype=torch.float32):
    return [nn.Parameter((torch.randn(s, generator=generator) * 0.5).to(dtype)) for s in ((5, 8), (3, 2, 2, 2), (7, 4))]


def give_gradients(params, generator):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def network(config=CONFIG):
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5))
    return ak.quantize_(model, config) if config is not None else model


def train(model, optimizer, start, stop, annealing=None):
    for i in range(start, stop):
        optimizer.zero_grad()
        (model(X[i]) - 1).pow(2).mean().backward()
        optimizer.step()
        if annealing is not None:
            annealing.step()


def same_state(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(a.buffers(), b.buffers(), strict=True))


# ---- equal to torch.optim --------------------------------------------------------------------------------------------


def against_torch(cls, twin_cls, options, grid, skew, dtype, generator):
    ours = parameters(generator, dtype)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = cls(ours, grid=grid, scale="absmax", skew=skew, freeze_scale="never", **options)
    twin = twin_cls(theirs, **options)
    for _ in range(20):
        give_gradients(ours, generator)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
    return ours, theirs


@pytest.mark.parametrize("skew", ["gradient", "direction"])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["uniform4", "binary", "nf4"])
def test_eps_1_is_sgd(name, options, skew, generator):
    """20 steps, in each a few roundings of numbers below 10: within 20 * 8 * 10 * 2^-24 < 1e-4."""
    for a, b in zip(*against_torch(ASkewSGD, torch.optim.SGD, options, GRIDS[name], skew, torch.float32, generator),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skew", ["gradient", "direction"])
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_eps_1_is_adamw(options, skew, generator):
    for a, b in zip(*against_torch(ASkewAdamW, torch.optim.AdamW, options, GRID, skew, torch.float32, generator),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skew", ["gradient", "direction"])
@pytest.mark.parametrize("options", LION_OPTIONS, ids=str)
def test_eps_1_is_lion(options, skew, generator):
    for a, b in zip(*against_torch(ASkewLion, Lion, options, GRID, skew, torch.float32, generator), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", LION_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_plain_groups_of_lion(dtype, options, generator):
    """Our own operator, unconstrained, over whatever a model holds: scalars, vectors, other strides, nothing."""
    shapes = [(), (7,), (5, 8), (3, 2, 2, 2), (0, 4)]
    ours = [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype) * 3) for s in shapes]
    ours.append(nn.Parameter(torch.randn(6, 4, generator=generator, dtype=dtype).t()))
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer, twin = ASkewLion(ours, **options), Lion(theirs, **options)
    for i in range(20):
        give_gradients(ours, generator)
        if i % 3 == 0:
            ours[1].grad = None
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step(), twin.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(optimizer.state[p].keys() == {"exp_avg"} and WeightQuantizer.of(p) is None for p in ours)
    with pytest.raises(TypeError, match=r"^params\[0\]"):
        ASkewLion([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [ASkewSGD, ASkewAdamW])
def test_other_types(cls, dtype, generator):
    """The fused step rounds once to the storage type where torch rounds after each operation: two roundings a step."""
    twin, options = (torch.optim.SGD, dict(lr=0.02)) if cls is ASkewSGD else (torch.optim.AdamW, dict(lr=0.01))
    ours, theirs = against_torch(cls, twin, options, GRID, "gradient", dtype, generator)
    bound = 20 * 4 * 2 * oracles.EPSILON[dtype] + 1e-6
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b.double()).abs().max() <= bound * (1 + float(b.abs().max()))


@pytest.mark.parametrize(
    ("cls", "twin", "options"),
    [
        *((ASkewSGD, torch.optim.SGD, o) for o in [*SGD_OPTIONS, dict(lr=0.1, foreach=True), dict(lr=0.1, fused=True)]),
        *(
            (ASkewAdamW, torch.optim.AdamW, o)
            for o in [*ADAM_OPTIONS, dict(lr=0.1, foreach=True), dict(lr=0.1, fused=True)]
        ),
    ],
    ids=str,
)
def test_plain_groups_are_exactly_torch(cls, twin, options, generator):
    ours = parameters(generator)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    extra = nn.Parameter(torch.randn(4, 4))
    optimizer, other = cls([{"params": ours}, {"params": [extra], "grid": GRID}], **options), twin(theirs, **options)
    for i in range(20):
        give_gradients([*ours, extra], generator)
        if i % 3 == 0:
            ours[1].grad = None
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("cls", "twin", "options"), [
    (ASkewSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9)), (ASkewSGD, torch.optim.SGD, dict(lr=0.1)),
    (ASkewAdamW, torch.optim.AdamW, dict(lr=0.1)),
])  # fmt: skip
@pytest.mark.parametrize("asked", [{}, {"fused": False}, {"foreach": False}])
def test_large_plain_groups_take_torchs_fused_step_unless_asked(cls, twin, options, asked, generator):
    """One pass in place of ten over a group of 2^16 weights; versions move as those of the other steps do."""
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((1 << 10, 64), (7,))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    extra = nn.Parameter(torch.randn(4, 4))
    optimizer = cls([{"params": ours}, {"params": [extra], "grid": GRID}], **options, **asked)
    other = twin(theirs, **options, **(asked or {"fused": True}))
    for _ in range(4):
        give_gradients([*ours, extra], generator)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        versions = [p._version for p in ours]
        optimizer.step()
        other.step()
        assert all(p._version > v for p, v in zip(ours, versions, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert optimizer.param_groups[0]["fused"] is asked.get("fused")


@pytest.mark.parametrize(("cls", "twin", "options"), [
    (ASkewSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9)), (ASkewSGD, torch.optim.SGD, dict(lr=0.1)),
    (ASkewAdamW, torch.optim.AdamW, dict(lr=0.1)),
])  # fmt: skip
@pytest.mark.parametrize("unlike", ["transposed", "expanded", "sliced", "weight", "state", "cast"])
def test_large_plain_groups_of_other_layouts_are_stepped_by_torchs_loop(cls, twin, options, unlike, generator):
    """Torch's fused step looks at no strides, so it is not taken unasked where those of weight, gradient and state are
    not the same, or leave gaps, nor where a model was cast between its steps."""
    start = torch.randn(64, 32, 8, 8, generator=generator)[:, ::2]
    ours = nn.Parameter(start if unlike == "weight" else start.contiguous())
    theirs = nn.Parameter(start.clone(memory_format=torch.contiguous_format))
    optimizer, other = cls([ours], **options), twin([theirs], **options)
    for i in range(3):
        if i == 1 and unlike == "state":  # as a checkpoint brings it to a model that is in channels last now
            ours.data = ours.data.to(memory_format=torch.channels_last)
        if i == 1 and unlike == "cast":
            ours.data, theirs.data = ours.data.double(), theirs.data.double()
            for p in other.state:
                other.state[p] = {
                    k: t.double() if k in optimizer.RULE.buffers else t for k, t in other.state[p].items()
                }
        g = torch.randn(start.shape, generator=generator, dtype=ours.dtype)
        if unlike == "transposed":
            g = g.transpose(2, 3)
        elif unlike == "expanded":
            g = g[:, :, :1, :1].expand(g.shape)
        elif unlike == "sliced":
            g = torch.stack([g, g], -1)[..., 0]
        theirs.grad = g.clone(memory_format=torch.contiguous_format)
        ours.grad = g.to(memory_format=torch.channels_last) if unlike == "state" and i else g
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [ASkewSGD, ASkewAdamW])
def test_large_plain_groups_whose_gradients_come_late_or_are_sparse(cls, generator):
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((1 << 10, 64), (1 << 10, 64))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=0.1, momentum=0.9) if cls is ASkewSGD else dict(lr=0.1)
    twin = torch.optim.SGD if cls is ASkewSGD else torch.optim.AdamW
    optimizer, other = cls([{"params": ours}], **options), twin(theirs, **options)
    for i in range(4):
        give_gradients(ours, generator)
        if i < 2:
            ours[1].grad = None
        if i == 3 and cls is ASkewSGD:
            ours[0].grad = ours[0].grad.to_sparse()
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# ---- equal to the operators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", ["gradient", "direction"])
@pytest.mark.parametrize(("granularity", "group_size"), [("per_tensor", None), ("per_channel", None), ("per_group", 4)])
def test_list_equals_loop(granularity, group_size, skew, generator):
    """20 SGD steps of the optimizer against one operator call a tensor, with the rule's scale computed from scratch."""
    ours = parameters(generator)
    theirs = [p.detach().clone() for p in ours]
    buffers = [torch.zeros_like(p) for p in theirs]
    options = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
    group = dict(grid=GRID, scale="sawb", granularity=granularity, group_size=group_size, skew=skew, alpha=0.7)
    optimizer = ASkewSGD([{"params": ours, **group}], **options)
    frozen = None
    for i in range(20):
        eps = 1.0 if i < 8 else 0.9 - 0.04 * i
        optimizer.param_groups[0]["constraint_eps"] = eps
        give_gradients(ours, generator)
        scales = [compute_scale(w, GRID, "sawb", granularity, group_size) for w in theirs]
        if i >= 8:
            frozen = scales = frozen or scales
        for w, m, s, p in zip(theirs, buffers, scales, ours, strict=True):
            ops.skew_sgd_(
                [w], [p.grad], [m], [s], [GRID], eps=eps, skew=skew, alpha=0.7, clamp=frozen is not None, **options
            )  # fmt: skip
        optimizer.step()
        for a, b, s in zip(ours, theirs, scales, strict=True):
            assert torch.equal(a, b) and torch.equal(WeightQuantizer.of(a).scale, s)


def test_adamw_list_equals_loop(generator):
    ours = parameters(generator)
    theirs = [p.detach().clone() for p in ours]
    m, v = ([torch.zeros_like(p) for p in theirs] for _ in range(2))
    optimizer = ASkewAdamW(ours, lr=0.05, grid=Binary(), scale="mean", constraint_eps=0.4, weight_decay=0.1,
                           freeze_scale="init")  # fmt: skip
    scales = [compute_scale(w, Binary(), "mean") for w in theirs]
    for i in range(20):
        give_gradients(ours, generator)
        optimizer.step()
        for k, p in enumerate(ours):
            ops.skew_adamw_([theirs[k]], [p.grad], [m[k]], [v[k]], [scales[k]], [Binary()], step=float(i + 1), lr=0.05,
                            eps=0.4, weight_decay=0.1)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("cls", "options"), EACH)
def test_parameters_that_join_late(cls, options, generator):
    """A parameter whose first gradient comes later gets its own first step, as in torch."""
    ours, alone = parameters(generator), None
    alone = nn.Parameter(ours[1].detach().clone())
    group = dict(grid=GRID, constraint_eps=1.0, freeze_scale="never")
    if cls is ASkewSGD:
        options = {**options, "dampening": 0.5}
    optimizer, single = cls(ours, **options, **group), cls([alone], **options, **group)
    for i in range(6):
        give_gradients(ours, generator)
        if i < 3:
            before = ours[1].detach().clone()
            ours[1].grad = None
        else:
            alone.grad = ours[1].grad.clone()
            single.step()
        optimizer.step()
        if i < 3:
            assert torch.equal(before, ours[1])
    assert torch.equal(ours[1], alone)


def test_lr_and_eps_as_tensors(generator):
    results = []
    for make in (float, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64)):
        params = parameters(torch.Generator().manual_seed(1))
        optimizer = ASkewSGD(params, lr=make(0.125), constraint_eps=make(0.25), momentum=0.9, grid=GRID)
        for i in range(5):
            give_gradients(params, torch.Generator().manual_seed(i))
            optimizer.step()
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_skip_nonfinite(generator):
    for cls, options in EACH:
        params = parameters(generator)
        optimizer = cls(params, grid=GRID, constraint_eps=0.5, skip_nonfinite=True, **options)
        before = [p.detach().clone() for p in params]
        give_gradients(params, generator)
        params[0].grad[0, 0], params[0].grad[1, 1] = math.nan, math.inf
        optimizer.step()
        assert all(p.isfinite().all() for p in params)
        assert params[0][0, 0] == before[0][0, 0] and params[0][1, 1] == before[0][1, 1]
        assert params[0][2, 2] != before[0][2, 2]
        assert [t["nonfinite"] for t in optimizer.telemetry()] == [2, 0, 0]


@pytest.mark.parametrize("base", [*EACH, (ak.optim.Skewed, dict(lr=0.1, momentum=0.9))], ids=lambda b: b[0].__name__)
def test_nonfinite_gradients_of_groups_without_a_grid_count_as_zero(base):
    cls, options = base
    make = {ak.optim.Skewed: lambda g, **o: ak.optim.Skewed(torch.optim.SGD(g, **o))}.get(cls, cls)
    models = []
    for broken in (math.inf, math.nan, 0.0):
        torch.manual_seed(0)
        config = QuantConfig(GRID, "lsq")
        model = ak.quantize_(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)), config)
        optimizer = make(ak.param_groups(model, skip_nonfinite=True, **options), **options)
        for i in range(4):
            optimizer.zero_grad()
            model(X[i, :, :8]).square().sum().backward()
            if i == 1:
                for p in (model[0].bias, model[1].weight, model[2].weight_scale):
                    p.grad[1] = broken
            optimizer.step()
        models.append(model)
    for p, *others in zip(models[-1].parameters(), *(model.parameters() for model in models[:-1]), strict=True):
        assert p.isfinite().all() and all(torch.equal(p, other) for other in others)


@pytest.mark.parametrize("made", ["expanded", "inference"])
def test_gradients_that_cannot_be_written_to_count_as_zero_too(made):
    model = network()
    optimizer, bias = ASkewSGD(ak.param_groups(model, skip_nonfinite=True), lr=0.1), model[0].bias
    with torch.inference_mode(made == "inference"):
        bias.grad = (
            torch.full((1,), math.inf).expand(len(bias)) if made == "expanded" else torch.full_like(bias, math.inf)
        )
    before = bias.detach().clone()
    optimizer.step()
    assert torch.equal(bias, before)


# ---- scales: when they move and when they stand still ----------------------------------------------------------------


@pytest.mark.parametrize("rule", ["absmax", "sawb", "mse"])
@pytest.mark.parametrize("freeze", ["anneal", "init", "never"])
def test_freezing(freeze, rule, generator):
    w = nn.Parameter(torch.randn(6, 16, generator=generator))
    optimizer = ASkewSGD([w], lr=0.3, grid=GRID, scale=rule, freeze_scale=freeze)
    quantizer = WeightQuantizer.of(w)
    kept = None
    for i in range(12):
        eps = 1.0 if i < 5 else 0.5
        optimizer.param_groups[0]["constraint_eps"] = eps
        should_freeze = freeze == "init" or (freeze == "anneal" and eps < 1)
        found = compute_scale(w, GRID, rule)
        if should_freeze and kept is None:
            kept = found
        give_gradients([w], generator)
        optimizer.step()
        assert quantizer.frozen == should_freeze
        want = kept if should_freeze else found
        assert torch.equal(quantizer.scale, want)
        low, high = (want * GRID.levels[0])[:, None], (want * GRID.levels[-1])[:, None]
        inside = ((w >= low) & (w <= high)).all()
        assert inside if should_freeze else True
        if i == 4 and freeze != "init":
            assert not inside  # it was the clamp that kept them in
    if freeze == "never":
        assert not torch.equal(found, compute_scale(w, GRID, rule))


@pytest.mark.parametrize(("cls", "options"), EACH)
def test_fixed_scale(cls, options, generator):
    for scale, rows in ((torch.tensor(0.2), 5), (torch.rand(5, generator=generator) + 0.1, 5)):
        w = nn.Parameter(torch.randn(5, 8, generator=generator))
        optimizer = cls([w], grid=GRID, scale=scale, **options)
        for _ in range(3):
            give_gradients([w], generator)
            optimizer.step()
        want = scale.reshape(-1).expand(rows)
        assert torch.equal(WeightQuantizer.of(w).scale, want)
        assert (w <= (want * 7)[:, None]).all() and (w >= (want * -8)[:, None]).all()


def test_a_fixed_scale_survives_a_checkpoint():
    model = network()
    scale = torch.full((24,), 0.3)
    optimizer = ASkewSGD([{"params": [model[0].weight], "grid": GRID, "scale": scale}], lr=0.1)
    model.load_state_dict(network(None).state_dict())
    assert torch.equal(model[0].weight_scale, scale)
    optimizer.step()
    assert torch.equal(model[0].weight_scale, scale)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(Binary(), "mean"),
        QuantConfig(Uniform(4), "sawb"),
        QuantConfig(Ternary(), "mean", "per_tensor", forward="relaxed"),
    ],
    ids=str,
)
def test_training_does_not_collapse(config):
    """The positive feedback of section 2 (scale recomputed from weights that were clamped by it) shrinks |w| to 0.

    4 separable classes, so chance is 25 % and a network whose weights have not collapsed reaches almost 100 %.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator) * 2
    y = torch.randint(4, (256,), generator=generator)
    x = centres[y] + torch.randn(256, 16, generator=generator)
    torch.manual_seed(1)
    model = ak.quantize_(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), config)
    size = model[0].weight.detach().abs().mean()
    optimizer = ASkewSGD(ak.param_groups(model), lr=0.05, momentum=0.9)
    annealing = ak.EpsilonAnnealing(optimizer, hold=60, total=120)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        annealing.step()
    assert model[0].weight.detach().abs().mean() > 0.2 * size
    ak.hard_quantize_(model)
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    last = optimizer.telemetry()
    assert all(t["eps"] <= 1e-3 for t in last if t["step"] > 118)


# ---- annealing -------------------------------------------------------------------------------------------------------


def annealed(**options):
    w = nn.Parameter(torch.randn(4, 8))
    b = nn.Parameter(torch.randn(4))
    optimizer = ASkewSGD([{"params": [w], "grid": GRID}, {"params": [b]}], lr=0.1)
    return optimizer, ak.EpsilonAnnealing(optimizer, **options)


FORMULAS = {
    "gap": (dict(hold=3, total=13, power=2.0), lambda j: (1 - ((j / 10) ** 2.0) ** 2) ** 2),
    "gap power 1": (dict(hold=3, total=13, mode="gap", power=1.0), lambda j: (1 - (j / 10) ** 2) ** 2),
    "geometric": (dict(hold=3, mode="geometric", decay=0.96), lambda j: 0.96**j),
    "geometric to the floor": (dict(hold=3, total=13, mode="geometric"), lambda j: 1.6e-5 ** (j / 10)),
    "linear": (dict(hold=3, total=13, mode="linear"), lambda j: 1 - j / 10),
    "cosine": (dict(hold=3, total=13, mode="cosine"), lambda j: (1 + math.cos(math.pi * j / 10)) / 2),
    "floor": (dict(hold=3, total=13, mode="linear", floor=0.25), lambda j: 1 - j / 10),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_annealing_formulas(name):
    options, formula = FORMULAS[name]
    optimizer, annealing = annealed(**options)
    floor = options.get("floor", 1.6e-5)
    seen = []
    for k in range(20):
        j = k - 3
        want = 1.0 if j <= 0 else max(floor, formula(min(j, 10) if "decay" not in options else j))
        assert optimizer.param_groups[0]["constraint_eps"] == pytest.approx(want, rel=1e-12)
        assert annealing.get_last_eps() == [optimizer.param_groups[0]["constraint_eps"]]
        assert optimizer.param_groups[1]["constraint_eps"] == 1.0
        seen.append(optimizer.param_groups[0]["constraint_eps"])
        annealing.step()
    assert all(a >= b for a, b in itertools.pairwise(seen)) and seen[3] == 1.0 > seen[4]
    if "decay" not in options:
        assert seen[-1] == pytest.approx(floor)


def test_the_gap_is_the_infeasible_share():
    """gap = sqrt(1 - sqrt(eps)) of a bracket is infeasible, and it grows as (k / K)^power."""
    _, annealing = annealed(hold=0, total=10, power=2.0)
    t = np.linspace(0, 1, 200001)
    for k in range(1, 10):
        share = (oracles.constraint(t, annealing.eps_at(k)) < 0).mean()
        assert share == pytest.approx((k / 10) ** 2, abs=1e-4)


@pytest.mark.parametrize("name", FORMULAS)
def test_annealing_state(name):
    options, _ = FORMULAS[name]
    optimizer, annealing = annealed(**options)
    for _ in range(7):
        annealing.step()
    buffer = io.BytesIO()
    torch.save(annealing.state_dict(), buffer)
    buffer.seek(0)
    other_optimizer, other = annealed(total=99)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(8):
        assert other_optimizer.param_groups[0]["constraint_eps"] == optimizer.param_groups[0]["constraint_eps"]
        annealing.step(), other.step()


def test_annealing_fills_tensors():
    w = nn.Parameter(torch.randn(4, 8))
    eps = torch.tensor(1.0)
    optimizer = ASkewSGD([w], lr=0.1, grid=GRID, constraint_eps=eps)
    annealing = ak.EpsilonAnnealing(optimizer, hold=1, total=3, mode="linear")
    annealing.step(), annealing.step()
    assert optimizer.param_groups[0]["constraint_eps"] is eps and eps == 0.5
    w.grad = torch.randn(4, 8)
    optimizer.step()
    assert WeightQuantizer.of(w).frozen


@pytest.mark.parametrize(("options", "words"), [
    (dict(total=10, mode="exponential"), "mode"), (dict(total=10, hold=-1), "hold"), (dict(total=10, hold=10), "total"),
    (dict(), "total"), (dict(mode="geometric"), "total"), (dict(total=10, power=0.0), "power"),
    (dict(total=10, floor=0.0), "floor"), (dict(total=10, floor=1.5), "floor"), (dict(total=10, decay=0.9), "decay"),
    (dict(mode="geometric", decay=1.0), "decay"), (dict(mode="geometric", decay=0.0), "decay"),
    (dict(total=10, power=math.nan), "power"), (dict(total=10, floor=math.nan), "floor"),
], ids=str)  # fmt: skip
def test_annealing_errors(options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        annealed(**options)


def test_more_annealing_errors():
    with pytest.raises(TypeError, match="^optimizer"):
        ak.EpsilonAnnealing(None, total=3)
    with pytest.raises(ValueError, match="^optimizer"):
        ak.EpsilonAnnealing(ASkewSGD([nn.Parameter(torch.ones(2))], lr=0.1), total=3)


# ---- schedulers, scalers, closures -----------------------------------------------------------------------------------

SCHEDULERS = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.StepLR(o, 3)], [4]
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("cls", "options"), EACH)
def test_lr_schedulers(name, cls, options, generator):
    ours = parameters(generator)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer, twin = cls(ours, grid=GRID, freeze_scale="never", **options), TWINS[cls](theirs, **options)
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedules = [SCHEDULERS[name](o) for o in (optimizer, twin)]
    for _ in range(10):
        give_gradients(ours, generator)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        for o, s in zip((optimizer, twin), schedules, strict=True):
            o.step()
            s.step()
        for key in ("lr", *(["momentum"] if cls is ASkewSGD else ["betas"])):
            assert optimizer.param_groups[0][key] == twin.param_groups[0][key]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cls", "options"), EACH)
def test_grad_scaler(cls, options):
    """Scaled by a power of two and unscaled is exact; a step with an inf is skipped whole."""
    scaled, plain = network(), network()
    optimizers = [cls(ak.param_groups(m), constraint_eps=0.5, **options) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(6):
        loss = (scaled(X[i]) - 1).pow(2).mean()
        optimizers[0].zero_grad()
        scaler.scale(loss).backward()
        if i == 3:
            scaled[0].weight.grad[0, 0] = math.inf
            before = [p.detach().clone() for p in scaled.parameters()]
            scaler.step(optimizers[0])
            assert all(torch.equal(a, b) for a, b in zip(before, scaled.parameters(), strict=True))
            scaler.update()
            assert scaler.get_scale() == 2.0**9
            plain(X[i])  # its batch statistics
        else:
            scaler.step(optimizers[0])
            scaler.update()
            train(plain, optimizers[1], i, i + 1)
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_closure(generator):
    for cls, options in EACH:
        models = network(), network()
        optimizers = [cls(ak.param_groups(m), constraint_eps=0.5, **options) for m in models]

        def closure(m=models[0], o=optimizers[0]):
            assert torch.is_grad_enabled()
            o.zero_grad()
            loss = (m(X[0]) - 1).pow(2).mean()
            loss.backward()
            return loss

        with torch.no_grad():
            loss = optimizers[0].step(closure)
        train(models[1], optimizers[1], 0, 1)
        assert loss.item() > 0
        same_state(*models)


def test_gradient_accumulation():
    models = [network(QuantConfig(GRID, "sawb")) for _ in range(2)]
    for m in models:
        m.eval()  # batch statistics would differ
    optimizers = [ASkewSGD(ak.param_groups(m), lr=0.1, momentum=0.9) for m in models]
    for i in range(4):
        for o in optimizers:
            o.zero_grad()
        for part in X[i].split(2):
            (models[0](part).pow(2).sum() / 6).backward()
        (models[1](X[i]).pow(2).sum() / 6).backward()
        for o in optimizers:
            o.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("saved_at", [0, 4, 10, 15])  # before the first step, in the hold, at its end, after freezing
@pytest.mark.parametrize("freeze", ["anneal", "init", "never"])
@pytest.mark.parametrize(("cls", "options"), EACH)
def test_resume(cls, options, freeze, saved_at, order):
    def make():
        model = network()
        optimizer = cls(ak.param_groups(model, freeze_scale=freeze), **options)
        return model, optimizer, ak.EpsilonAnnealing(optimizer, hold=10, total=20)

    whole = make()
    train(*whole[:2], 0, saved_at, whole[2])
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in whole], buffer)
    buffer.seek(0)
    scale = [layer.weight_scale.clone() for layer in (whole[0][0], whole[0][3])]
    train(*whole[:2], saved_at, 20, whole[2])
    part = make()
    train(*part[:2], 30, 33, part[2])  # it was used for something else before
    states = torch.load(buffer, weights_only=True)
    for index in (0, 1, 2) if order == "model first" else (1, 0, 2):
        part[index].load_state_dict(states[index])
    assert all(
        torch.equal(a, b) for a, b in zip((part[0][0].weight_scale, part[0][3].weight_scale), scale, strict=True)
    )
    train(*part[:2], saved_at, 20, part[2])
    same_state(whole[0], part[0])
    a, b = whole[1].state_dict()["state"], part[1].state_dict()["state"]
    assert a.keys() == b.keys()
    for index in a:
        assert a[index].keys() == b[index].keys()
        for key, value in a[index].items():
            assert torch.equal(value, b[index][key]) if isinstance(value, torch.Tensor) else value == b[index][key]
    ours, theirs = whole[1].telemetry(), part[1].telemetry()
    assert ours == theirs or ours[0]["step"] != theirs[0]["step"]  # a loaded optimizer records its first step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_resume_of_other_types(dtype):
    def make():
        model = network().to(dtype)
        return model, ASkewAdamW(ak.param_groups(model), lr=0.01, constraint_eps=0.5)

    def run(model, optimizer, start, stop):
        for i in range(start, stop):
            optimizer.zero_grad()
            model(X[i].to(dtype)).pow(2).mean().backward()
            optimizer.step()

    whole, part = make(), make()
    run(*whole, 0, 4)
    states = copy.deepcopy([p.state_dict() for p in whole])
    run(*whole, 4, 8)
    for p, s in zip(part, states, strict=True):
        p.load_state_dict(s)
    run(*part, 4, 8)
    same_state(whole[0], part[0])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(("cls", "options"), EACH)
@pytest.mark.parametrize("eps", [1.0, 0.5])
def test_copies(cls, options, eps, how):
    model = network()
    optimizer = cls(ak.param_groups(model), constraint_eps=eps, telemetry_every=3, **options)
    train(model, optimizer, 0, 3)
    other, other_optimizer = how((model, optimizer))
    train(model, optimizer, 3, 8)
    train(other, other_optimizer, 3, 8)
    same_state(model, other)
    assert other_optimizer.telemetry_every == 3
    assert other_optimizer.telemetry()


def _matched_by_name(optimizer, state_dict):
    """As torch's documentation of ``register_load_state_dict_pre_hook`` has it."""
    matched = copy.deepcopy(optimizer.state_dict())
    for mine, saved in zip(matched["param_groups"], state_dict["param_groups"], strict=True):
        places = dict(zip(saved["param_names"], saved["params"], strict=True))
        for index, name in zip(mine["params"], mine["param_names"], strict=True):
            matched["state"][index] = state_dict["state"][places[name]]
    return matched | {"askew_steps": state_dict["askew_steps"]}


def test_hooks_serve_threads_that_save_at_once():
    optimizer = ASkewSGD(ak.param_groups(network()), lr=0.1)
    called, saves, threads = [], 40, 3
    optimizer.register_state_dict_post_hook(lambda *_: called.append(1))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        work = [threading.Thread(target=lambda: [optimizer.state_dict() for _ in range(saves)]) for _ in range(threads)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(called) == saves * threads
    optimizer.state_dict()
    assert len(called) == saves * threads + 1


@pytest.mark.parametrize("wrapped", ["", "Skewed", "SAM"])
def test_hooks_see_the_whole_state(wrapped):
    def made(order):
        model = ak.quantize_(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), CONFIG)
        named = dict(model.named_parameters())
        groups = [{"params": [(name, named[name]) for name in order], "grid": GRID}]
        if wrapped == "Skewed":
            return model, ak.optim.Skewed(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
        optimizer = ASkewSGD(groups, lr=0.1, momentum=0.9)
        return model, ak.optim.SAM(optimizer, rho=0.0) if wrapped else optimizer

    model, optimizer = made(["0.weight", "1.weight"])
    optimizer.param_groups[0]["constraint_eps"] = 0.5  # scales freeze

    def closure():
        optimizer.zero_grad()
        loss = model(X[0, :, :8]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(copy.deepcopy(state)))
    saved = optimizer.state_dict()
    assert "scale" in seen[0]["state"][0] and seen[0]["param_groups"][0]["grid"] == GRID.to_dict()
    other, loaded = made(["1.weight", "0.weight"])
    calls = []
    loaded.register_load_state_dict_pre_hook(_matched_by_name)
    loaded.register_load_state_dict_post_hook(lambda o: calls.append(float(o.state[other[0].weight]["scale"][0])))
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(saved)
    assert calls == [float(model[0].weight_scale[0])] and loaded.param_groups[0]["grid"] == GRID
    for one, two in zip(other, model, strict=True):
        assert torch.equal(one.weight_scale, two.weight_scale)
        for key in ("momentum_buffer", "scale"):
            if key in optimizer.state[two.weight]:
                assert torch.equal(loaded.state[one.weight][key], optimizer.state[two.weight][key])


def test_state_dict_is_plain():
    optimizer = ASkewSGD(ak.param_groups(network()), lr=0.1, momentum=0.9)
    assert optimizer.state_dict()["param_groups"][0]["grid"] == GRID.to_dict()
    assert optimizer.param_groups[0]["grid"] == GRID


# ---- telemetry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "options"), EACH)
def test_telemetry(cls, options, generator):
    w = nn.Parameter(torch.randn(6, 16, generator=generator) * 0.5)
    bias = nn.Parameter(torch.zeros(3))
    optimizer = cls([{"params": [bias]}, {"params": [w], "grid": GRID, "constraint_eps": 0.3}], **options)
    assert optimizer.telemetry() == []
    scale = compute_scale(w, GRID)
    before, s64 = oracles.as64(w), oracles.as64(scale)[:, None]
    give_gradients([w, bias], generator)
    g = oracles.as64(w.grad)
    optimizer.step()
    (report,) = optimizer.telemetry()
    levels = np.array(GRID.levels)
    if cls is ASkewSGD:
        _, _, v, h = oracles.sgd_step(before, g, 0 * g, s64, levels, lr=0.1, eps=0.3, momentum=0.9)
    else:
        *_, v, h = oracles.adamw_step(before, g, 0 * g, 0 * g, s64, levels, step=1, lr=0.02, eps=0.3, weight_decay=0.01)
    old, new = (oracles.fake_quantize(t, scale, GRID) for t in (torch.from_numpy(before).float(), w.detach()))
    assert report["name"] == 1 and report["numel"] == 96 and report["step"] == 1 and report["eps"] == 0.3
    assert report["fraction_infeasible"] == pytest.approx((h < 0).mean(), abs=1.01 / 96)  # one may stand on the edge
    assert report["mean_violation"] == pytest.approx(np.maximum(0, -h).mean(), rel=1e-3)
    assert report["velocity_norm"] == pytest.approx(np.sqrt((v * v).sum()), rel=1e-2)
    assert report["grad_velocity"] == pytest.approx((g * v).sum(), abs=1e-2 * np.abs(g * v).sum())
    assert report["flips"] == (old != new).sum() and report["nonfinite"] == 0


def test_telemetry_every():
    for every, want in ((0, [1] * 7), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 1, 1, 4, 4, 4, 7])):
        model = network()
        optimizer = ASkewSGD(ak.param_groups(model), lr=0.1, telemetry_every=every)
        seen = []
        for i in range(7):
            train(model, optimizer, i, i + 1)
            seen.append(optimizer._record.step)
        if every:
            assert seen == want
        else:
            assert optimizer.telemetry() == []
    optimizer = ASkewSGD(ak.param_groups(model), lr=0.1, telemetry_every=100)
    for i in range(4):  # a step is recorded when the last report was read
        train(model, optimizer, i, i + 1)
        assert {t["step"] for t in optimizer.telemetry()} == {i + 1}


def test_names():
    model = network()
    optimizer = ASkewSGD([{"params": [("first", model[0].weight), ("last", model[3].weight)], "grid": GRID}], lr=0.1)
    train(model, optimizer, 0, 1)
    assert [t["name"] for t in optimizer.telemetry()] == ["first", "last"]


# ---- groups and errors -----------------------------------------------------------------------------------------------


def test_no_gradient_and_frozen(generator):
    for cls, options in EACH:
        params = parameters(generator)
        params[1].requires_grad_(False)
        optimizer = cls(params, grid=GRID, constraint_eps=0.3, **options)
        before = [p.detach().clone() for p in params]
        optimizer.step()  # no gradients at all
        params[0].grad = torch.randn_like(params[0])
        optimizer.step()
        assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [False, True, True]


def test_add_param_group(generator):
    params = parameters(generator)
    optimizer = ASkewSGD([params[0]], lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": [params[1]], "grid": GRID, "constraint_eps": 0.5})
    with pytest.raises(ValueError, match="^constraint_eps"):
        optimizer.add_param_group({"params": [params[2]], "grid": GRID, "constraint_eps": 2.0})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": [params[2]], "grid": Ternary(), "scale": "mean"})
    give_gradients(params, generator)
    optimizer.step()
    assert WeightQuantizer.of(params[0]) is None
    assert len(optimizer.telemetry()) == 2


GOOD = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(lr=-1.0), ValueError, "lr"),
        (dict(lr=None), TypeError, "lr"),
        (dict(lr=math.nan), ValueError, "lr"),
        (dict(lr=torch.ones(2)), ValueError, "lr"),
        (dict(constraint_eps=0.0), ValueError, "constraint_eps"),
        (dict(constraint_eps=1.1), ValueError, "constraint_eps"),
        (dict(constraint_eps="1"), TypeError, "constraint_eps"),
        (dict(alpha=-1.0), ValueError, "alpha"),
        (dict(alpha=math.inf), ValueError, "alpha"),
        (dict(alpha="1"), TypeError, "alpha"),
        (dict(maximize=None), TypeError, "maximize"),
        (dict(skip_nonfinite="no"), TypeError, "skip_nonfinite"),
        (dict(clamp="no"), TypeError, "clamp"),
        (dict(weight_decay=-0.1), ValueError, "weight_decay"),
        (dict(skew="both"), ValueError, "skew"),
        (dict(freeze_scale="later"), ValueError, "freeze_scale"),
        (dict(grid="binary"), TypeError, "grid"),
        (dict(grid=4), TypeError, "grid"),
        (dict(scale="nonsense"), ValueError, "scale"),
        (dict(scale=3), TypeError, "scale"),
        (dict(grid=Uniform(6), scale="sawb"), ValueError, "scale"),
        (dict(granularity="per_row"), ValueError, "granularity"),
        (dict(granularity="per_group"), ValueError, "group_size"),
        (dict(granularity="per_group", group_size=3), ValueError, "group_size"),
        (dict(scale=torch.zeros(4)), ValueError, "scale"),
        (dict(scale=torch.ones(3)), ValueError, "scale"),
        (dict(scale=torch.tensor(math.nan)), ValueError, "scale"),
        (dict(scale=torch.tensor(1e-50, dtype=torch.float64)), ValueError, "scale"),
        (dict(telemetry_every=-1), ValueError, "telemetry_every"),
        (dict(telemetry_every=True), ValueError, "telemetry_every"),
        (dict(colour=1), TypeError, "colour"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", TWINS)
def test_bad_arguments(cls, options, error, words):
    with pytest.raises(error, match=f"^{words}"):
        cls([nn.Parameter(GOOD.clone())], **{"lr": 0.1, "grid": GRID, **options})


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (ASkewSGD, dict(momentum=-1.0), "momentum"),
        (ASkewSGD, dict(nesterov=True), "nesterov"),
        (ASkewSGD, dict(nesterov=True, momentum=0.9, dampening=0.1), "nesterov"),
        (ASkewSGD, dict(dampening="a"), "dampening"),
        (ASkewSGD, dict(nesterov="no", momentum=0.9), "nesterov"),
        (ASkewAdamW, dict(betas=(1.0, 0.9)), "betas"),
        (ASkewAdamW, dict(betas=(0.9, -0.1)), "betas"),
        (ASkewAdamW, dict(eps=-1.0), "eps"),
        (ASkewLion, dict(betas=0.9), "betas"),
    ],
)
def test_more_bad_arguments(cls, options, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        cls([nn.Parameter(GOOD.clone())], lr=0.1, grid=GRID, **options)


def test_bad_parameters():
    with pytest.raises(TypeError, match=r"params\[0\]"):
        ASkewSGD([nn.Parameter(torch.ones(4, 8, dtype=torch.complex64))], lr=0.1, grid=GRID)
    layer = ak.nn.AskewLinear(8, 4, config=CONFIG)
    with pytest.raises(ValueError, match="^grid"):
        ASkewSGD([{"params": [layer.weight], "grid": Binary(), "scale": "mean"}], lr=0.1)


@pytest.mark.parametrize(
    "break_it", ["sparse", "sparse plain", "lr", "lr tensor", "eps", "eps tensor", "nan eps", "grid"]
)
@pytest.mark.parametrize(("cls", "options"), EACH)
def test_errors_in_a_step_come_before_any_write(cls, options, break_it):
    model = nn.ParameterList([nn.Parameter(GOOD.clone()) for _ in range(3)])
    groups = [{"params": [model[0]], "grid": GRID, "constraint_eps": 0.5}, {"params": [model[1]], "grid": GRID},
              {"params": [model[2]]}]  # fmt: skip
    optimizer = cls(groups, **options)
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer.step()
    group = optimizer.param_groups[1]
    if break_it == "sparse":
        model[1].grad = torch.ones_like(GOOD).to_sparse()
    elif break_it == "sparse plain":
        if cls is ASkewSGD:
            pytest.skip("torch.optim.SGD takes sparse gradients")
        model[2].grad = torch.ones_like(GOOD).to_sparse()
    elif break_it == "lr":
        group["lr"] = -1.0
    elif break_it == "lr tensor":
        group["lr"] = torch.tensor(-1.0)
    elif break_it == "eps":
        group["constraint_eps"] = 0.0
    elif break_it == "eps tensor":
        group["constraint_eps"] = torch.tensor(2.0)
    elif break_it == "grid":
        group["grid"] = Ternary()
    else:
        group["constraint_eps"] = math.nan
    before = copy.deepcopy([p.detach() for p in model])
    state = copy.deepcopy([dict(optimizer.state[p]) for p in model])
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError)) as caught:
        optimizer.step()
    if break_it != "sparse plain":
        assert caught.type in (TypeError, ValueError) and str(caught.value).startswith(("gr", "lr", "constraint_eps"))
    assert all(torch.equal(p, b) for p, b in zip(model, before, strict=True))
    for p, s in zip(model, state, strict=True):
        for key, value in s.items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value)), key


@pytest.mark.parametrize(("cls", "options"), EACH)
def test_expanded_weights_and_state(cls, options):
    """A weight is refused, before any is written; state of a checkpoint gets memory for each element."""
    params = [nn.Parameter(GOOD * 0.3), nn.Parameter(GOOD * 0.3)]
    expanded = torch.full((1, 8), 0.3).expand(4, 8)
    for grid in (GRID, None):
        with pytest.raises(ValueError, match=r"^params\[1\]: expected memory for each element"):
            cls([{"params": [params[0], nn.Parameter(expanded)], "grid": grid}], **options)
    optimizer = cls([{"params": [p], "grid": GRID} for p in params], **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    state = optimizer.state_dict()
    for key in optimizer.RULE.buffers:
        state["state"][1][key] = torch.zeros(1, 1).expand(4, 8)
    optimizer.load_state_dict(state)
    optimizer.step()
    assert all(t.is_contiguous() and t.any() for t in (optimizer.state[params[1]][k] for k in optimizer.RULE.buffers))
    before = params[0].detach().clone()
    params[1].data = expanded
    with pytest.raises(ValueError, match=r"^params\[0\]: expected memory for each element"):
        optimizer.step()
    assert torch.equal(params[0], before)


BAD_KEYS = [
    ("alpha", math.nan), ("alpha", -1.0), ("alpha", math.inf), ("alpha", "x"), ("alpha", None), ("skew", "x"),
    ("freeze_scale", "x"), ("granularity", "x"), ("group_size", 8), ("scale", "x"), ("scale_dtype", "x"),
    ("skip_nonfinite", "x"), ("clamp", "no"), ("maximize", None), ("weight_decay", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_KEYS)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("cls", [ASkewSGD, ASkewAdamW, ASkewLion, ak.optim.Skewed])
def test_bad_keys_that_were_set_later(cls, steps, key, value):
    """They are told at the next step, with their group, and again at the one after; put right, it goes on."""
    if cls is ak.optim.Skewed and key in ("skew", "maximize", "weight_decay"):
        pytest.skip("no key of ours")
    params = [nn.Parameter(GOOD * 0.3) for _ in range(2)]
    groups = [{"params": [p], "grid": GRID, "constraint_eps": 0.5} for p in params]
    optimizer = cls(torch.optim.SGD(groups, lr=0.1)) if cls is ak.optim.Skewed else cls(groups, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    before, state = copy.deepcopy((params, [dict(optimizer.state[p]) for p in params]))
    good, optimizer.param_groups[1][key] = optimizer.param_groups[1][key], value
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=rf"^{key}: .*param_groups\[1\]"):
            optimizer.step()
    assert all(map(torch.equal, params, before))
    for p, s in zip(params, state, strict=True):
        assert all(torch.equal(torch.as_tensor(optimizer.state[p][k]), torch.as_tensor(v)) for k, v in s.items())
    optimizer.param_groups[1][key] = good
    optimizer.step()
    assert not any(map(torch.equal, params, before)) and optimizer.steps == steps + 1


@pytest.mark.parametrize("cls", [ASkewSGD, ak.optim.Skewed])
def test_a_layer_that_has_another_grid_is_told_before_any_write(cls):
    model = ak.quantize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), CONFIG)
    groups = ak.param_groups(model, outer=False)
    optimizer = ASkewSGD(groups, lr=0.1) if cls is ASkewSGD else cls(torch.optim.SGD(groups, lr=0.1))
    for _ in range(2):
        model(X[0, :, :8]).square().sum().backward()
        optimizer.step()
    ak.quantize_(model, {"1": QuantConfig(Ternary())})
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="^grid: the parameter's layer has Ternary"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before)) and optimizer.steps == 2
    other = ak.quantize_(nn.Sequential(nn.Linear(8, 4)), CONFIG)
    with pytest.raises(ValueError, match="^grid: the parameter's layer has Uniform"):
        optimizer.add_param_group({"params": [other[0].weight], "grid": Ternary()})
    with pytest.raises(ValueError, match="^grid: the parameter's layer has Uniform"):
        ASkewSGD([{"params": [other[0].weight], "grid": Ternary()}], lr=0.1)
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": [other[0].weight], "grid": GRID})


def test_mixed_types_in_one_group(generator):
    for cls, options in EACH:
        types = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        params = [nn.Parameter(torch.ones(4, 8, dtype=t) * 0.5) for t in types]
        optimizer = cls(params, grid=GRID, scale="absmax", **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in params:
            assert p.dtype in types
            torch.testing.assert_close(p.double(), params[1].detach(), rtol=0, atol=2 * oracles.EPSILON[p.dtype])


def test_signatures_follow_torch():
    """What torch.optim's namesakes take first, in their order."""
    for cls, twin, count in ((ASkewSGD, torch.optim.SGD, 6), (ASkewAdamW, torch.optim.AdamW, 5), (ASkewLion, Lion, 4)):
        ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (cls, twin))
        for mine, its in zip(ours[:count], theirs[:count], strict=True):
            assert (mine.name, mine.kind, mine.default) == (its.name, its.kind, its.default)
        assert all(name in inspect.getdoc(cls) for name in (*cls.OWN, "constraint_eps", "freeze_scale"))


def test_learns():
    """The loss of a small regression goes down and all weights end on levels."""
    model = network(QuantConfig(Ternary(), "mean"))
    optimizer = ASkewAdamW(ak.param_groups(model), lr=0.01)
    annealing = ak.EpsilonAnnealing(optimizer, hold=20, total=60)
    losses = []
    for i in range(60):
        optimizer.zero_grad()
        loss = (model(X[i % 8]) - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        annealing.step()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.3 * sum(losses[:8])
    for _ in range(40):  # at the floor, without gradients: alpha's push alone
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    layer = model[0]
    distance = (layer.weight - layer.quantized_weight()).abs() / layer.weight_scale[:, None]
    assert distance.mean() < 0.1


# ---- 7. the plan that is kept from step to step --------------------------------------------------------------------


def _edits():
    """What others may do to weights, scales and state between two steps: name -> edit(model, optimizer)."""
    weight = lambda m: m[0].weight  # noqa: E731
    quantizer = lambda m: WeightQuantizer.of(m[0].weight)  # noqa: E731

    def replace_buffers(model, optimizer):
        for state in optimizer.state.values():
            for key, value in state.items():
                if torch.is_tensor(value) and value.dim():
                    state[key] = value * 0.5

    return {
        "none": lambda m, o: None,
        "in place": lambda m, o: weight(m).detach().mul_(1.5),
        "data": lambda m, o: weight(m).data.mul_(1.5),
        "new data": lambda m, o: setattr(weight(m), "data", weight(m).detach() * 1.5),
        "load": lambda m, o: m.load_state_dict({k: v if "grid" in k else v * 1.5 for k, v in m.state_dict().items()}),
        "freeze": lambda m, o: quantizer(m).freeze(weight(m)),
        "set scale": lambda m, o: quantizer(m).set_scale(weight(m), torch.full((24,), 0.1)),
        "invalidate": lambda m, o: quantizer(m).invalidate(),
        "no gradient": lambda m, o: setattr(weight(m), "grad", None),
        "clear state": lambda m, o: o.state.clear(),
        "replace buffers": replace_buffers,
        "eps": lambda m, o: o.param_groups[0].update(constraint_eps=0.3),
        "lr": lambda m, o: o.param_groups[0].update(lr=0.01),
        "group": lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
        "own state": lambda m, o: o.load_state_dict(o.state_dict()),
        "float64": lambda m, o: (m.double(), o.state.clear()),
    }  # fmt: skip


@pytest.mark.parametrize("kind,options", EACH)
@pytest.mark.parametrize("edit", _edits())
@pytest.mark.parametrize("forward", ["relaxed", "hard"])
def test_a_kept_plan_changes_nothing(kind, options, edit, forward):
    """Whatever is done between two steps: bit for bit what an optimizer computes that plans every step anew."""
    results = []
    for forget in (False, True):
        model = network(QuantConfig(GRID, "sawb", forward=forward))
        optimizer = kind(ak.param_groups(model), constraint_eps=1.0 if edit != "freeze" else 0.5, **options)
        for step in range(6):
            x = X[step].to(model[0].weight.dtype)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if step == 3:
                _edits()[edit](model, optimizer)
            if forget:
                optimizer._plans.clear()
            optimizer.step()
        model.eval()
        results.append([*model.parameters(), model(X[0].to(model[0].weight.dtype))])
    for kept, anew in zip(*results, strict=True):
        assert torch.equal(kept, anew)


def test_a_plan_is_kept():
    model = network()
    optimizer = ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)
    plans = []
    for step in range(5):
        model(X[step]).square().sum().backward()
        optimizer.step()
        plans.append(optimizer._plans[0])
    assert plans[0] is not plans[1]  # the first step makes the momentum buffers
    assert all(p is plans[1] for p in plans[2:])


def test_gradients_are_clipped_again_after_an_edit():
    """While every weight is known to be inside the hull the backward skips the clipping; an edit ends that."""
    layer = ak.nn.AskewLinear(8, 4, config=QuantConfig(GRID, "absmax", forward="hard"))
    optimizer = ASkewSGD(ak.param_groups(layer), lr=0.01, constraint_eps=0.5)

    def gradient():
        layer.weight.grad = None
        layer(torch.ones(2, 8)).sum().backward()
        return layer.weight.grad

    gradient()
    optimizer.step()
    assert layer.quantizer.all_inside(layer.weight) and (gradient() == 2).all()
    with torch.no_grad():
        layer.weight[1, 2] = 100.0
    assert not layer.quantizer.all_inside(layer.weight)
    grad = gradient()
    assert grad[1, 2] == 0 and (grad != 0).sum() == grad.numel() - 1
    optimizer.step()
    layer.quantizer.set_scale(layer.weight, torch.full((4,), 1e-3))
    assert (gradient() == 0).any()


# ---- 8. names: the constraint's eps is constraint_eps ----------------------------------------------------------------


@pytest.mark.parametrize("how", [
    "as it is", "deepcopy", "pickle", "load", "add_param_group", "tensor",
])  # fmt: skip
def test_eps_is_constraint_eps_where_the_base_rule_has_none(how, generator):
    """Users of ASkewSGD read and write it in the groups; whatever is done to the optimizer, both names are one."""
    w = nn.Parameter(torch.randn(4, 8, generator=generator))
    start = torch.tensor(0.9) if how == "tensor" else 0.9
    optimizer = ASkewSGD([{"params": [w], "grid": GRID, "eps": start}], lr=0.1)
    if how == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
    elif how == "pickle":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    elif how == "load":
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    elif how == "add_param_group":
        optimizer = ASkewSGD([nn.Parameter(torch.ones(2))], lr=0.1)
        optimizer.add_param_group({"params": [w], "grid": GRID, "eps": 0.9})
    group = optimizer.param_groups[-1]
    (w,) = group["params"]
    assert group["eps"] == group["constraint_eps"] == start

    def step():
        w.grad = torch.randn(4, 8, generator=generator)
        optimizer.telemetry()
        optimizer.step()
        return float(optimizer.telemetry()[0]["eps"])

    assert step() == pytest.approx(0.9) and WeightQuantizer.of(w).frozen
    if how == "tensor":
        group["eps"].fill_(0.7)
    else:
        group["eps"] = 0.7
    assert step() == pytest.approx(0.7) and float(group["constraint_eps"]) == pytest.approx(0.7)
    group["constraint_eps"] = 0.6
    assert step() == 0.6 and group["eps"] == 0.6
    annealing = ak.EpsilonAnnealing(optimizer, total=4, hold=0, mode="linear")
    assert group["eps"] == group["constraint_eps"] == 1.0
    annealing.step()
    assert group["eps"] == 0.75 and step() == 0.75
    group["eps"] = 0.3  # written, and then annealed before the next step: the annealing's counts
    annealing.step()
    assert step() == group["eps"] == 0.5


def test_eps_of_adamw_is_adamw_s(generator):
    w = nn.Parameter(torch.randn(4, 8, generator=generator))
    twin = nn.Parameter(w.detach().clone())
    optimizer = ASkewAdamW([w], 0.05, (0.9, 0.99), 1e-3, 0.0, grid=GRID, freeze_scale="never")
    other = torch.optim.AdamW([twin], 0.05, (0.9, 0.99), 1e-3, 0.0)
    for _ in range(5):
        w.grad = torch.randn(4, 8, generator=generator) * 1e-3
        twin.grad = w.grad.clone()
        optimizer.step(), other.step()
    torch.testing.assert_close(w, twin, rtol=1e-5, atol=1e-5)
    assert "adam_eps" not in optimizer.param_groups[0]


@pytest.mark.parametrize("where", ["argument", "group", "later"])
def test_adam_eps_is_the_old_name(where):
    w = nn.Parameter(torch.randn(4, 8))
    w.grad = torch.ones(4, 8)
    group, options = {"params": [w], "grid": GRID}, {}
    (options if where == "argument" else group if where == "group" else {})["adam_eps"] = 1e-5
    with pytest.warns(DeprecationWarning, match="^adam_eps: is called eps now"):
        optimizer = ASkewAdamW([group], lr=0.1, **options)
        if where == "later":
            optimizer.param_groups[0]["adam_eps"] = 1e-5
        optimizer.step()
    assert optimizer.param_groups[0]["eps"] == 1e-5 and "adam_eps" not in optimizer.param_groups[0]


@pytest.mark.parametrize("where", ["argument", "later"])
def test_who_means_the_constraint_is_told(where):
    w = nn.Parameter(torch.randn(4, 8))
    w.grad = torch.ones(4, 8)
    with pytest.warns(UserWarning, match="^eps: 0.3 is .*AdamW's denominator; the constraint's is constraint_eps"):
        optimizer = ASkewAdamW([w], lr=0.1, grid=GRID, **({"eps": 0.3} if where == "argument" else {}))
        optimizer.param_groups[0]["eps"] = 0.3
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # once is enough
        ASkewAdamW([w], lr=0.1, grid=GRID, eps=1e-3)


@pytest.mark.parametrize(("cls", "options"), EACH)
def test_checkpoints_with_the_old_names(cls, options):
    """Until 0.2 groups had the constraint's eps as ``eps`` and AdamW's as ``adam_eps``."""
    models = [network() for _ in range(2)]
    optimizers = [cls(ak.param_groups(m), **options) for m in models]
    for group in optimizers[0].param_groups:
        group["constraint_eps"] = 0.4
        if cls is ASkewAdamW:
            group["eps"] = 1e-6
    train(models[0], optimizers[0], 0, 3)
    state = copy.deepcopy(optimizers[0].state_dict())
    for group in state["param_groups"]:
        if cls is ASkewAdamW:
            group["adam_eps"] = group["eps"]
        group["eps"] = group.pop("constraint_eps")
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(state)
    group = optimizers[1].param_groups[0]
    assert group["constraint_eps"] == 0.4 and "adam_eps" not in group
    assert group["eps"] == (1e-6 if cls is ASkewAdamW else 0.4)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3, 6)
    same_state(*models)


# ---- states of others, and surroundings ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,base", [(ASkewSGD, torch.optim.SGD), (ASkewAdamW, torch.optim.AdamW)])
def test_a_float_phases_state_is_taken_and_the_constraint_stays(kind, base, generator):
    """torch's optimizer knows nothing of grid, constraint_eps and alpha (its eps is AdamW's denominator's)."""
    weight, bias = (nn.Parameter(torch.randn(s, generator=generator)) for s in ((6, 8), (6,)))
    options = {"momentum": 0.9} if base is torch.optim.SGD else {"eps": 1e-5}
    floats = base([{"params": [weight]}, {"params": [bias]}], lr=0.05, **options)
    give_gradients([weight, bias], generator)
    floats.step()
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    groups = [{"params": [weight], "grid": GRID}, {"params": [bias]}]
    optimizer = kind(groups, lr=0.1, constraint_eps=0.7, alpha=2.0, **options)
    optimizer.load_state_dict(floats.state_dict())
    group = optimizer.param_groups[0]
    assert group["grid"] == GRID and group["constraint_eps"] == 0.7 and group["alpha"] == 2.0 and group["lr"] == 0.05
    if base is torch.optim.AdamW:
        assert group["eps"] == 1e-5
    key = "momentum_buffer" if base is torch.optim.SGD else "exp_avg"
    assert torch.equal(optimizer.state[weight][key], floats.state[weight][key])
    optimizer.step()
    assert WeightQuantizer.of(weight).frozen


def test_a_state_of_another_grid_is_refused_before_anything_changes(generator):
    weight = nn.Parameter(torch.randn(6, 8, generator=generator))
    other = ASkewSGD([nn.Parameter(torch.randn(6, 8))], lr=0.3, grid=Uniform(2))
    optimizer = ASkewSGD([weight], lr=0.1, grid=GRID)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: grid: expected Uniform\(bits=4.*has Uniform\(bits=2"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"grid: expected Uniform.*has None"):
        optimizer.load_state_dict(ASkewSGD([nn.Parameter(torch.randn(6, 8))], lr=0.3).state_dict())
    state = other.state_dict()
    state["param_groups"][0]["grid"] = {"grid": "uniform"}  # all that DCP loads where Ternary() stands
    with pytest.raises(ValueError, match=r"param_groups\[0\]: grid: expected Uniform\(bits=4.*has {'grid': 'uniform'}"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[0]["grid"] == GRID


def refused_whole(optimizer, state, words):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"] and before["state"][0].keys() == after["state"][0].keys()
    assert all(torch.equal(before["state"][0][k], v) for k, v in after["state"][0].items() if torch.is_tensor(v))


@pytest.mark.parametrize(("other", "own", "key"), [
    (lambda p: ASkewSGD(p, lr=0.1, momentum=0.9), lambda p: ASkewAdamW(p, lr=0.3), "momentum_buffer"),
    (lambda p: ASkewAdamW(p, lr=0.1), lambda p: ASkewSGD(p, lr=0.3, momentum=0.9), "exp_avg, exp_avg_sq"),
    (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), lambda p: ASkewAdamW(p, lr=0.3),
     "exp_avg, exp_avg_sq, max_exp_avg_sq"),
    (lambda p: ASkewLion(p, lr=0.1), lambda p: ASkewAdamW(p, lr=0.3), "exp_avg"),
    (lambda p: ASkewAdamW(p, lr=0.1), lambda p: ASkewLion(p, lr=0.3), "exp_avg, exp_avg_sq"),
])  # fmt: skip
def test_a_state_of_another_kind_is_refused_before_anything_changes(other, own, key, generator):
    """It trained on with moments of zero, without a word."""
    weight = nn.Parameter(torch.randn(6, 8, generator=generator))
    saved, optimizer = other([weight]), own([weight])
    give_gradients([weight], generator)
    for each in (saved, optimizer):
        each.step()
    refused_whole(optimizer, saved.state_dict(), rf"state\[0\] has {key}, and {type(optimizer).__name__}")
    optimizer.load_state_dict({**saved.state_dict(), "state": {}})
    assert not optimizer.state_dict()["state"].get(0) and optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("layer", [False, True])
def test_a_state_of_other_scales_is_refused_before_anything_changes(layer, generator):
    """It had loaded moments and learning rates when it failed."""
    made = []
    for granularity in ({}, {"granularity": "per_group", "group_size": 4}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6, bias=False))
        if layer:
            ak.quantize_(model, ak.QuantConfig(GRID, **granularity))
        groups = (
            ak.param_groups(model) if layer else [{"params": list(model.parameters()), "grid": GRID, **granularity}]
        )
        made.append(ASkewSGD(groups, lr=0.1 + len(made), momentum=0.9))
        give_gradients([model[0].weight], generator)
        made[-1].step()
    optimizer, saved = made
    expected = r"state\[0\]: scale: expected 6 of .*\(6, 8\) quantized per_channel.* has 12"
    refused_whole(optimizer, saved.state_dict(), expected)


@pytest.mark.parametrize("later", [False, True])
def test_weights_of_quantized_layers_in_a_group_without_a_grid_are_told(later):
    model = network()
    with pytest.warns(UserWarning, match=r"ak\.param_groups\(model\)"):
        if later:
            optimizer = ASkewSGD([nn.Parameter(torch.ones(2))], lr=0.1)
            optimizer.add_param_group({"params": list(model.parameters())})
        else:
            ASkewSGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ASkewSGD(ak.param_groups(model), lr=0.1)


@pytest.mark.parametrize(("cls", "options"), EACH)
def test_a_cast_in_the_middle_of_a_training(cls, options):
    model = network()
    optimizer = cls(ak.param_groups(model), **options)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        optimizer.zero_grad()
        model(X[0].to(dtype)).square().sum().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            for p in group["params"] if group["grid"] is not None else []:
                buffers = [v for k, v in optimizer.state[p].items() if k.startswith(("momentum", "exp_avg"))]
                assert all(v.dtype == dtype for v in buffers) and p.isfinite().all()


@pytest.mark.parametrize(("cls", "options"), EACH)
def test_the_keys_of_the_state_are_the_same_in_every_phase(cls, options):
    """Whoever flattens it by key (torch.distributed.checkpoint) finds in a fresh one what was saved of another."""
    model = network()
    optimizer = cls(ak.param_groups(model), **options)
    seen = set()
    for i in range(4):
        optimizer.param_groups[0]["constraint_eps"] = 1.0 if i < 2 else 0.4
        model(X[i]).square().sum().backward()
        optimizer.step()
        seen.add(tuple(sorted(optimizer.state[model[0].weight])))
        seen.add(tuple(sorted(optimizer.state_dict()["state"][0])))
        state = optimizer.state[model[0].weight]
        assert state["scale"] is model[0].quantizer.scale and all(torch.is_tensor(v) for v in state.values())
    assert len(seen) == 1


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("eps", [1.0, 0.4])
def test_checkpoints_by_parameter_name_resume_bit_for_bit(flat, eps):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    def train(model, optimizer, steps):
        for i in steps:
            optimizer.param_groups[0]["constraint_eps"] = eps
            optimizer.zero_grad()
            model(X[i]).square().sum().backward()
            optimizer.step()

    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = network()
    optimizer = ASkewSGD(ak.param_groups(model), lr=0.05, momentum=0.9)
    train(model, optimizer, range(3))
    states = copy.deepcopy(get_state_dict(model, optimizer, options=how))
    train(model, optimizer, range(3, 6))
    other = network()
    resumed = ASkewSGD(ak.param_groups(other), lr=0.05, momentum=0.9)
    set_state_dict(other, resumed, model_state_dict=states[0], optim_state_dict=states[1], options=how)
    train(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(model[0].weight_scale, other[0].weight_scale)


@pytest.mark.parametrize(("cls", "options"), EACH)
@pytest.mark.parametrize("what", ["step", "loop"])
def test_a_compiled_step_is_the_step(cls, options, what):
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        optimizer = cls(ak.param_groups(model), **options)

        def loop(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

        step = optimizer.step
        if compiled and what == "step":
            step = torch.compile(optimizer.step, backend="aot_eager")
        elif compiled:
            loop = torch.compile(loop, backend="eager")
        for i in range(4):
            optimizer.param_groups[0]["constraint_eps"] = 1.0 if i < 2 else 0.4
            if what == "loop":
                loop(X[i])
            else:
                optimizer.zero_grad()
                model(X[i]).square().sum().backward()
                step()
        runs.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if what == "step" else 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_plain_groups_beside_torchs_fused_step_on_a_gpu(fused):
    """torch's fused AdamW wants its counters on the device."""
    weight, bias = (nn.Parameter(torch.randn(s, device="cuda")) for s in ((6, 8), (6,)))
    optimizer = ASkewAdamW([{"params": [weight], "grid": GRID}, {"params": [bias]}], lr=0.01, fused=fused)
    for _ in range(2):
        weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
        optimizer.step()
    assert bias.isfinite().all()
