"""Contract: SAM, ASAM and AlignedSAM are torch.optim optimizers over any base, and hurt nobody where others do.

1. A step is the formula of docs/mathematics.md, section 4, in float64; at rho = 0 it is the base optimizer.
2. Every perturbed weight comes back bit for bit: without a second gradient, after an exception, in bf16 and fp16.
3. Zero, inf or NaN norms perturb nothing, and telemetry says so.
4. The pains of PEERS.md: GradScaler, resume, accumulation, BatchNorm, LR schedulers; a test named after each.
5. ASAM is invariant to rescaling of consecutive ReLU layers; SAM is not.
6. Quantized layers: the forward at w + delta quantizes w + delta, the one after a step quantizes the new weights.
7. Bad input: an error that names the argument, weights restored.
8. What surrounds an optimizer: hooks, ``maximize``, torch's checkpoints, copies, compiled loops, gradients that live in
   somebody else's memory, weights that freeze, groups that come later.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

import askew_kernels as ak
from askew_kernels import ops
from askew_kernels.optim import ASAM, ESAM, SAM, AlignedSAM, ASkewAdamW, ASkewSGD, LookSAM, frozen_batchnorm_stats
from askew_kernels.quant import QuantConfig, Uniform, WeightQuantizer

X = torch.randn(40, 12, 8, generator=torch.Generator().manual_seed(5))
Y = torch.randint(0, 4, (40, 12), generator=torch.Generator().manual_seed(6))
KINDS = {
    "SAM": (SAM, {}),
    "ASAM": (ASAM, {}),
    "AlignedSAM": (AlignedSAM, {"align": 0.02, "rho_max": 0.3, "rho_min": 0.01}),
    "LookSAM": (LookSAM, {"k": 2}),
    "ESAM": (ESAM, {"fraction": 0.6}),
}
WHOLE = [name for name in KINDS if name not in ("LookSAM", "ESAM")]  # every tensor, twice, in every step
BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "ASkewSGD": lambda p: ASkewSGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "ASkewAdamW": lambda p: ASkewAdamW(p, lr=0.01),
}
CONFIG = QuantConfig(Uniform(4), "sawb")


@pytest.fixture(autouse=True)
def small():
    """A seed, and one thread: these networks are too small for more."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def network(quantized=False, dtype=torch.float32, norm=True):
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(16)] if norm else []
    model = nn.Sequential(nn.Linear(8, 16), *middle, nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    return ak.quantize_(model, CONFIG) if quantized else model


def groups(model):
    return ak.param_groups(model) if any(WeightQuantizer.of(p) for p in model.parameters()) else model.parameters()


def loss_of(model, i):
    output = model(X[i].to(next(model.parameters()).dtype))
    return functional.cross_entropy(output if output.dtype == torch.float64 else output.float(), Y[i])


def closure_of(model, i):
    def closure():
        loss = loss_of(model, i)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, start, stop, scheduler=None):
    for i in range(start, stop):
        optimizer.step(closure_of(model, i))
        if scheduler is not None:
            scheduler.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def first_half(model, optimizer, i=0, **options):
    loss = loss_of(model, i)
    loss.backward()
    optimizer.first_step(zero_grad=True, loss=loss, **options)


# ---- the formulas ---------------------------------------------------------------------------------------------------


def written_out(model, cls, rho, eta, align, adaptive, i):
    """(w + delta, gradient that the base sees) of every parameter, from torch.autograd and the formulas."""
    params = list(model.parameters())
    before = weights(model)
    firsts = torch.autograd.grad(loss_of(model, i), params)
    ts = [w.abs() + eta if a else torch.ones_like(w) for w, a in zip(before, adaptive, strict=True)]
    norm = sum(((t * g) ** 2).sum() for t, g in zip(ts, firsts, strict=True)).sqrt()
    moved = [w + (rho / norm * t * t - align) * g for w, t, g in zip(before, ts, firsts, strict=True)]
    with torch.no_grad():
        for p, m in zip(params, moved, strict=True):
            p.copy_(m)
    seconds = torch.autograd.grad(loss_of(model, i), params)
    with torch.no_grad():
        for p, w in zip(params, before, strict=True):
            p.copy_(w)
    merged = [(f + s) / 2 for f, s in zip(firsts, seconds, strict=True)] if cls is AlignedSAM else seconds
    return moved, merged


@pytest.mark.parametrize("adaptive", [True, False, None])
@pytest.mark.parametrize("cls", [SAM, ASAM, AlignedSAM])
def test_a_step_is_the_formula_in_float64(cls, adaptive):
    """Every operation in float64: a few roundings of 2^-53 of numbers below 10."""
    model = network(dtype=torch.float64, norm=False)
    options = {"align": 0.03} if cls is AlignedSAM else {}
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = cls(base, rho=0.2, eta=0.05, adaptive=adaptive, **options)
    adapted = [p.dim() >= 2 if adaptive is None else adaptive for p in model.parameters()]
    for i in range(3):
        before = weights(model)
        moved, gradients = written_out(model, cls, 0.2, 0.05, options.get("align", 0.0), adapted, i)
        optimizer.zero_grad()
        first_half(model, optimizer, i)
        for p, m in zip(model.parameters(), moved, strict=True):
            torch.testing.assert_close(p.detach(), m, rtol=1e-13, atol=1e-13)
        loss_of(model, i).backward()
        optimizer.second_step(zero_grad=True)
        for p, w, g in zip(model.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(p.detach(), w - 0.1 * g, rtol=1e-12, atol=1e-12)


def test_names_decide_what_is_adapted():
    """As published where names are known: "weight" in it, which takes in BatchNorm's; else 2 or more dimensions."""
    model = network()
    named = ASAM(torch.optim.SGD(model.named_parameters(), lr=0.1))
    given = ASAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    unknown = ASAM(torch.optim.SGD(model.parameters(), lr=0.1))
    forced = SAM(torch.optim.SGD(model.parameters(), lr=0.1), adaptive=True)
    loss_of(model, 0).backward()
    by_name = [int("weight" in name) for name, _ in model.named_parameters()]
    for optimizer, expected in ((named, by_name), (given, by_name), (unknown, [1, 0, 0, 0, 1, 0]), (forced, [1] * 6)):
        assert optimizer._buckets()[0].adaptive == expected


def test_the_norm_is_over_all_groups_and_rho_is_each_group_s_own():
    model = network(norm=False)
    first, second = list(model[0].parameters()), list(model[2].parameters())
    base = torch.optim.SGD([{"params": first, "rho": 0.3}, {"params": second}], lr=0.1)
    optimizer = SAM(base, rho=0.1)
    before = weights(model)
    loss_of(model, 0).backward()
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
    optimizer.first_step()
    for p, w, rho in zip(model.parameters(), before, (0.3, 0.3, 0.1, 0.1), strict=True):
        torch.testing.assert_close(p.detach() - w, rho / norm * p.grad, rtol=1e-4, atol=1e-7)
    optimizer.restore()
    assert same(weights(model), before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [SAM, ASAM])
def test_rho_0_is_the_base_optimizer(kind, base):
    """Bit for bit after 20 steps."""
    ours, theirs = network("ASkew" in base), network("ASkew" in base)
    optimizer, twin = kind(BASES[base](groups(ours)), rho=0.0, model=ours), BASES[base](groups(theirs))
    for i in range(20):
        optimizer.step(closure_of(ours, i))
        twin.zero_grad()
        loss_of(theirs, i).backward()
        twin.step()
    assert same(weights(ours), weights(theirs))
    assert same(ours.buffers(), theirs.buffers())


def test_aligned_with_rho_0_and_align_0_is_the_base_optimizer():
    ours, theirs = network(), network()
    optimizer, twin = (
        AlignedSAM(BASES["SGD"](ours.parameters()), rho=0.0, align=0.0, model=ours),
        BASES["SGD"](theirs.parameters()),
    )
    for i in range(20):
        optimizer.step(closure_of(ours, i))
        twin.zero_grad()
        loss_of(theirs, i).backward()
        twin.step()
    assert same(weights(ours), weights(theirs))


def test_adaptive_radius_follows_the_surrogate_gap():
    model = network()
    optimizer = AlignedSAM(BASES["SGD"](model.parameters()), rho=0.07, rho_max=0.05, rho_min=0.001, model=model)
    optimizer.step(closure_of(model, 0))
    report = optimizer.telemetry()
    assert report["rho"] == 0.07
    for i in range(1, 6):
        wanted = min(max(math.log1p(max(report["surrogate_gap"], 0)), 0.001), 0.05)
        optimizer.step(closure_of(model, i))
        report = optimizer.telemetry()
        assert report["rho"] == pytest.approx(wanted, rel=1e-5)
    model = network()
    optimizer = AlignedSAM(BASES["SGD"](model.parameters()), rho_max=0.05)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"first_step\(loss"):
        optimizer.first_step()
    before = weights(model)
    optimizer.first_step(loss=1.0)
    with pytest.raises(ValueError, match=r"second_step\(loss"):
        optimizer.second_step()
    assert same(weights(model), before)


def test_asam_is_invariant_to_rescaling_of_relu_layers_and_sam_is_not():
    """w1 -> c w1, w2 -> w2 / c leaves the network as it is, and with eta = 0 the loss that ASAM perturbs to."""
    torch.manual_seed(4)
    losses = {}
    for c in (1.0, 8.0):
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)).double()
        g = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for p, factor in zip(model.parameters(), (c, 1 / c), strict=True):
                p.copy_(torch.randn(p.shape, generator=g).double() * 0.4 * factor)
        for kind, rho in ((SAM, 0.2), (ASAM, 0.2)):
            optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1), rho=rho, eta=0.0)
            optimizer.zero_grad()
            first_half(model, optimizer)
            losses[kind, c] = loss_of(model, 0).item()
            optimizer.restore()
    assert losses[ASAM, 8.0] == pytest.approx(losses[ASAM, 1.0], rel=1e-12)
    assert abs(losses[SAM, 8.0] - losses[SAM, 1.0]) > 0.05


# ---- weights come back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pain_a_parameter_unused_in_the_second_pass_stays_perturbed(kind, dtype):
    """Here every perturbed tensor is restored from its copy, whether it received a second gradient or not."""
    cls, options = KINDS[kind]
    model = network(dtype=dtype, norm=False)
    optimizer = cls(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, **options)
    before = weights(model)
    first_half(model, optimizer)
    assert not same(weights(model), before)
    model[2](torch.relu(torch.ones(3, 16, dtype=dtype))).sum().backward()  # the first layer takes no part
    assert model[0].weight.grad is None
    optimizer.second_step(loss=1.0)
    assert same(weights(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_half_raises(kind):
    cls, options = KINDS[kind]
    model = network()
    optimizer = cls(BASES["SGD"](model.parameters()), rho=0.5, model=model, **options)
    train(model, optimizer, 0, 2)
    before, calls = weights(model), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("a worker died")
        return closure_of(model, 3)()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert same(weights(model), before)
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    train(model, optimizer, 3, 4)


def test_the_base_step_raises(generator):
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise OSError("disk full")

    model = network()
    optimizer = SAM(Broken(model.parameters(), lr=0.1), rho=0.5)
    before = weights(model)
    with pytest.raises(OSError):
        optimizer.step(closure_of(model, 0))
    assert same(weights(model), before)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_without_direction_perturbs_nothing_and_says_so(kind, bad):
    cls, options = KINDS[kind]
    model = network()
    optimizer = cls(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, **options)
    loss_of(model, 0).backward()
    for p in model.parameters():
        p.grad.mul_(0)
    model[0].weight.grad[0, 0] = bad
    before = weights(model)
    optimizer.first_step(zero_grad=True, loss=1.0)
    assert same(weights(model), before)
    loss_of(model, 0).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.second_step(loss=1.0)
    report = optimizer.telemetry()
    assert report["perturbed"] is False
    assert {0.0: "zero", math.inf: "inf"}.get(bad, "NaN") in report["reason"]
    for p, w, g in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * g, rtol=0, atol=1e-7)  # the second gradient as it is


# ---- pains of others ------------------------------------------------------------------------------------------------


def scaled_half(scaler, model, i):
    loss = loss_of(model, i)
    scaler.scale(loss).backward()
    return loss.detach()


@pytest.mark.parametrize("by", ["scaler.step", "second_step"])
@pytest.mark.parametrize("kind", KINDS)
def test_pain_grad_scaler(kind, by):
    """Both halves are unscaled once: powers of two, so the run equals the one without a scaler bit for bit."""
    cls, options = KINDS[kind]
    ours, theirs = network(), network()
    optimizer = cls(BASES["SGD"](ours.parameters()), **options)
    twin = cls(BASES["SGD"](theirs.parameters()), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i in range(8):
        loss = scaled_half(scaler, ours, i)
        if i % 2:  # unscaled by hand, for clipping
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(ours.parameters(), 1e9)
        optimizer.first_step(zero_grad=True, loss=loss, scaler=scaler)
        loss2 = scaled_half(scaler, ours, i)
        if i % 3 == 1:
            scaler.unscale_(optimizer)
        if by == "second_step":
            optimizer.second_step(zero_grad=True, loss=loss2, scaler=scaler)
        elif kind == "AlignedSAM":  # needs the loss
            optimizer.second_step(zero_grad=True, loss=loss2, scaler=scaler)
        else:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        first_half(theirs, twin, i)
        loss2 = loss_of(theirs, i)
        loss2.backward()
        twin.second_step(zero_grad=True, loss=loss2)
    assert scaler.get_scale() == 2.0**12
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("by", ["scaler.step", "second_step", "step"])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("base", ["SGD", "ASkewSGD"])
@pytest.mark.parametrize("kind", KINDS)
def test_pain_grad_scaler_inf_in_either_half_skips_both_and_restores(kind, base, half, by):
    model = network(quantized=base == "ASkewSGD")
    cls, options = KINDS[kind]
    if by == "scaler.step":
        options = {**options, "rho_max": None} if "rho_max" in options else options  # it has no word for the loss
    optimizer = cls(BASES[base](groups(model)), rho=0.5, **options)
    train(model, optimizer, 0, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    calls = []

    def closure():
        loss = scaled_half(scaler, model, 3)
        if len(calls) == half:
            model[0].weight.grad[0, 0] = math.inf
        calls.append(1)
        return loss

    if by == "step":
        optimizer.step(closure, scaler=scaler)
    else:
        optimizer.zero_grad()
        optimizer.first_step(loss=closure(), zero_grad=True, scaler=scaler)
        loss = closure()
        scaler.step(optimizer) if by == "scaler.step" else optimizer.second_step(loss=loss, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert same(weights(model), before)
    assert optimizer.telemetry()["skipped"] is True
    after = optimizer.state_dict()  # the gap with it: a skipped step tells nothing of the surface
    assert {group.pop("sam_steps") for group in state["param_groups"]} == {2}
    assert {group.pop("sam_steps") for group in after["param_groups"]} == {3}
    for counted in (after, state):  # by ASkew's base, whose step was not called
        assert counted.get("askew_steps", 2) == 2
    assert same_state(after, state)
    calls += [1, 1]
    train(model, optimizer, 3, 4)  # and goes on


def same_state(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_pain_resume_loses_base_state(kind, base):
    """10 + 10 steps through a checkpoint are 20 steps, bit for bit."""
    cls, options = KINDS[kind]
    quantized = "ASkew" in base

    def fresh():
        model = network(quantized)
        optimizer = cls(BASES[base](groups(model)), model=model, **options)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    whole, optimizer, scheduler = fresh()
    train(whole, optimizer, 0, 20, scheduler)
    half, optimizer, scheduler = fresh()
    train(half, optimizer, 0, 10, scheduler)
    optimizer.param_groups[0]["rho"] = optimizer.param_groups[0]["rho"]
    file = io.BytesIO()
    torch.save([half.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    resumed, optimizer, scheduler = fresh()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    train(resumed, optimizer, 10, 20, scheduler)
    assert same(weights(resumed), weights(whole))
    assert same(resumed.buffers(), whole.buffers())


def test_checkpoints_of_the_base_alone_and_of_a_scheduled_rho():
    model = network()
    base = BASES["SGD"](model.parameters())
    for i in range(3):
        base.zero_grad()
        loss_of(model, i).backward()
        base.step()
    saved = copy.deepcopy(base.state_dict())
    optimizer = ASAM(BASES["SGD"](model.parameters()), rho=0.7)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rho"] == 0.7 and len(optimizer.state) == 6
    optimizer.param_groups[0]["rho"] = 0.3
    other = ASAM(BASES["SGD"](model.parameters()), rho=0.7)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["rho"] == 0.3 and other.base_optimizer.param_groups is other.param_groups


def test_pain_gradient_accumulation():
    """Several micro-batches in each half are one large batch, to the rounding of sums (batch statistics aside)."""
    ours, theirs = network(norm=False, dtype=torch.float64), network(norm=False, dtype=torch.float64)
    optimizer = ASAM(torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9))
    twin = ASAM(torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9))

    def micro(i):
        for part in range(3):
            rows = slice(4 * part, 4 * part + 4)
            (functional.cross_entropy(ours(X[i][rows].double()), Y[i][rows]) / 3).backward()

    for i in range(5):
        micro(i)
        optimizer.first_step(zero_grad=True)
        micro(i)
        optimizer.second_step(zero_grad=True)
        twin.step(lambda i=i: closure_of(theirs, i)())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_clipping_between_the_halves():
    """The ascent's direction does not feel it, the descent does."""
    model = network(norm=False)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=1.0), rho=0.1)
    before = weights(model)
    loss_of(model, 0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.first_step(zero_grad=True)
    moved = math.sqrt(
        sum(float(((p.detach() - w) ** 2).sum()) for p, w in zip(model.parameters(), before, strict=True))
    )
    assert moved == pytest.approx(0.1, rel=1e-3)
    loss_of(model, 0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.second_step(zero_grad=True)
    stepped = math.sqrt(
        sum(float(((p.detach() - w) ** 2).sum()) for p, w in zip(model.parameters(), before, strict=True))
    )
    assert stepped == pytest.approx(1e-3, rel=1e-2)


def test_pain_batchnorm_statistics_updated_twice():
    """step(closure) with the model updates them once, by the first pass: as training without SAM does."""
    ours, theirs = network(), network()
    optimizer = SAM(torch.optim.SGD(ours.parameters(), lr=0.0), rho=0.5, model=ours)
    train(ours, optimizer, 0, 3)
    for i in range(3):
        loss_of(theirs, i)
    assert same(ours.buffers(), theirs.buffers())
    assert int(ours[1].num_batches_tracked) == 3


def test_frozen_batchnorm_stats():
    model = nn.Sequential(
        nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True),
        nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3),
    )  # fmt: skip
    model[3].eval()
    x = torch.randn(4, 1, 9)
    model(x)
    before, expected = [b.clone() for b in model.buffers()], copy.deepcopy(model)(x)
    with frozen_batchnorm_stats(model):
        y = model(x)
    y.sum().backward()  # after the block
    assert same(model.buffers(), before) and torch.equal(y, expected)
    with pytest.raises(ZeroDivisionError), frozen_batchnorm_stats(model):
        raise ZeroDivisionError
    assert model[1].track_running_stats and model[3].track_running_stats and model[2].momentum == 0.1
    assert not model[4].track_running_stats
    model(x)
    assert not same(model.buffers(), before)
    with pytest.raises(TypeError, match="model"), frozen_batchnorm_stats(None):
        pass


@pytest.mark.parametrize("by_hand", [False, True])
def test_pain_lr_schedulers_warn_or_refuse(by_hand):
    model = network()
    optimizer = ASAM(ASkewSGD(model.parameters(), lr=0.1, momentum=0.9))
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3):
            if by_hand:
                optimizer.zero_grad()
                first_half(model, optimizer, i)
                loss_of(model, i).backward()
                optimizer.second_step()
            else:
                optimizer.step(closure_of(model, i))
            for scheduler in schedulers:
                scheduler.step()
    assert (
        optimizer.param_groups[0]["lr"]
        == optimizer.base_optimizer.param_groups[0]["lr"]
        == schedulers[-1].get_last_lr()[0]
    )


def test_one_optimizer_not_two():
    """param_groups, defaults and state are the base's own objects, also after loading and in copies."""
    model = network()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = ASAM(base, model=model)
    train(model, optimizer, 0, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    base.load_state_dict(base.state_dict())
    twin = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    for one in (optimizer, twin, pickled):
        assert one.param_groups is one.base_optimizer.param_groups
        assert one.state is one.base_optimizer.state and one.defaults is one.base_optimizer.defaults
        assert one.defaults["rho"] == 0.5
    assert twin.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    train(twin.model, twin, 2, 5)
    train(model, optimizer, 2, 5)
    assert same(weights(model), weights(twin.model))
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "rho": 0.1})
    assert base.param_groups[1]["rho"] == 0.1 and base.param_groups[1]["eta"] == 0.01
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "rho": -1.0})
    assert len(base.param_groups) == 2
    assert "rho: 0.1" in repr(optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_with_a_rho_of_its_own_keeps_it(kind):
    """Adadelta's rho is its decay; the radius stands beside it."""
    cls, options = KINDS[kind]
    model = network(norm=False)
    base = torch.optim.Adadelta(model.parameters(), rho=0.8)
    optimizer = cls(base, **{**options, "rho_max": None} if "rho_max" in options else options, rho=0.05)
    before = weights(model)
    loss_of(model, 0).backward()
    optimizer.first_step()
    moved = torch.cat([(p.detach() - w).flatten() for p, w in zip(model.parameters(), before, strict=True)]).norm()
    assert 0.01 < float(moved) < 0.15 and base.param_groups[0]["rho"] == 0.8
    optimizer.restore()
    assert optimizer.state_dict()["param_groups"][0]["sam_rho"] == 0.05


def test_davda54_constructor():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, adaptive=True, lr=0.2, momentum=0.9)
    assert type(optimizer.base_optimizer) is torch.optim.SGD
    group = optimizer.param_groups[0]
    assert (group["rho"], group["adaptive"], group["lr"], group["momentum"]) == (0.1, True, 0.2, 0.9)
    optimizer = ASAM(model.parameters(), base_optimizer=torch.optim.AdamW, lr=0.2)
    assert optimizer.param_groups[0]["rho"] == 0.5 and optimizer.param_groups[0]["eta"] == 0.01
    assert optimizer.ascent_step.__func__ is SAM.first_step and optimizer.descent_step.__func__ is SAM.second_step


def test_annealing_and_hooks():
    model = network(True)
    optimizer = SAM(ASkewSGD(ak.param_groups(model), lr=0.1), model=model)
    annealing = ak.EpsilonAnnealing(optimizer, hold=1, total=4)
    seen = []
    optimizer.register_step_post_hook(lambda *a: seen.append("step"))
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append("state"))
    for i in range(4):
        optimizer.step(closure_of(model, i))
        annealing.step()
    optimizer.state_dict()
    assert seen == ["step"] * 4 + ["state"]
    assert optimizer.base_optimizer.param_groups[0]["eps"] < 1


def test_compiled_model():
    """torch.compile's model sees the perturbed weights and the restored ones."""
    ours, theirs = network(), network()
    optimizer = ASAM(BASES["SGD"](ours.parameters()), model=ours)
    twin = ASAM(BASES["SGD"](theirs.parameters()), model=theirs)
    compiled = torch.compile(ours, backend="aot_eager")

    def closure(i):
        loss = functional.cross_entropy(compiled(X[i]), Y[i])
        loss.backward()
        return loss

    for i in range(4):
        optimizer.step(lambda i=i: closure(i))
        twin.step(closure_of(theirs, i))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- quantized layers -----------------------------------------------------------------------------------------------


def assert_multiplies_by(layer, expected):
    """The layer's forward, seen from outside; levels are 0.02 and more apart."""
    with torch.no_grad():
        got = (layer(torch.eye(layer.weight.shape[1])) - layer.bias).T
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("base", ["ASkewSGD", "ASkewAdamW", "SGD"])
def test_hard_forward_never_uses_a_stale_copy(base, frozen):
    """At w + delta it quantizes w + delta, with the scale that w has; after a step it quantizes the new weights."""
    model = network(True)
    optimizer = SAM(BASES[base](groups(model)), rho=2.0, model=model)
    layer = model[0]

    def now(scale=None):
        scale = layer.quantizer.current_scale(layer.weight) if scale is None else scale
        return ops.fake_quantize(layer.weight.detach(), scale.clone(), layer.config.weight)

    if frozen and base != "SGD":
        ak.EpsilonAnnealing(optimizer, hold=0, total=4).step()
    for i in range(6):
        optimizer.zero_grad()
        before, scale = now(), layer.quantizer.current_scale(layer.weight).clone()
        assert_multiplies_by(layer, before)
        first_half(model, optimizer, i)
        assert not torch.equal(now(scale), before)
        assert_multiplies_by(layer, now(scale))
        if i == 3:  # given up half-way
            optimizer.restore()
            assert_multiplies_by(layer, before)
            first_half(model, optimizer, i)
        loss_of(model, i).backward()
        optimizer.second_step(zero_grad=True)
        assert_multiplies_by(layer, now())


def test_the_base_starts_from_the_kept_weights(monkeypatch):
    """The scale of an ASkewSGD step is that of the kept weights, not of the perturbed ones, and costs no extra pass."""
    ours, theirs = network(True), network(True)
    optimizer = SAM(ASkewSGD(ak.param_groups(ours), lr=0.1, momentum=0.9), rho=1.0, model=ours)
    twin = ASkewSGD(ak.param_groups(theirs), lr=0.1, momentum=0.9)
    passes, rule_scale = [], WeightQuantizer._rule_scale
    monkeypatch.setattr(WeightQuantizer, "_rule_scale", lambda q, w: (passes.append(w), rule_scale(q, w))[1])
    for i in range(6):
        optimizer.zero_grad()
        first_half(ours, optimizer, i)
        with frozen_batchnorm_stats(ours):
            loss_of(ours, i).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()
        passes.clear()
        optimizer.second_step()
        assert not passes or i == 0
        twin.step()
        assert same(weights(ours), weights(theirs))


# ---- telemetry ------------------------------------------------------------------------------------------------------


def test_telemetry():
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, telemetry_every=4)
    assert optimizer.telemetry() == {}
    seen = []
    for i in range(6):
        losses, gradients = [], []

        def closure(i=i, losses=losses, gradients=gradients):
            loss = closure_of(model, i)()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
            return loss

        optimizer.step(closure)
        if i in (0, 3, 4):  # asking counts for the step after
            report = optimizer.telemetry()
            assert report["step"] == i + 1 and report["rho"] == 0.3 and report["perturbed"] and not report["skipped"]
            assert report["loss"] == losses[0] and report["perturbed_loss"] == losses[1]
            assert report["surrogate_gap"] == pytest.approx(losses[1] - losses[0], abs=1e-6)
            assert report["gradient_norm"] == pytest.approx(float(gradients[0].norm()), rel=1e-5)
            seen.append("cosine" in report)
            if seen[-1]:
                cosine = float(gradients[0] @ gradients[1] / gradients[0].norm() / gradients[1].norm())
                assert report["cosine"] == pytest.approx(cosine, abs=1e-4)
    assert seen == [True, False, True]


def test_nothing_waits_for_the_device(monkeypatch):
    """Neither half looks at a value on the host: no item(), no float(), no bool() of a tensor."""
    model = network()
    optimizer = AlignedSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho_max=0.1, telemetry_every=1)
    loss = loss_of(model, 0)
    loss.backward()

    def refuse(*_):
        raise AssertionError("a value was waited for")

    for name in ("item", "__float__", "__bool__", "tolist", "cpu", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for _ in range(2):
        optimizer.first_step(loss=loss)
        optimizer.second_step(loss=loss)


def test_the_gap_stays_in_one_tensor():
    """A captured graph reads the radius where the capture found it; a loaded checkpoint is not written to."""
    model = network()
    optimizer = AlignedSAM(BASES["SGD"](model.parameters()), rho_max=0.3)
    train(model, optimizer, 0, 1)
    gap, saved = optimizer.gap, optimizer.state_dict()
    before = saved["param_groups"][0]["sam_gap"].clone()
    train(model, optimizer, 1, 3)
    assert optimizer.gap is gap and not torch.equal(gap, before)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1, 3)
    assert torch.equal(saved["param_groups"][0]["sam_gap"], before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("base", ["SGD", "ASkewSGD"])
@pytest.mark.parametrize("kind", WHOLE)
def test_cuda_graph_of_both_halves(kind, base):
    """Forward, backward and both halves in one graph; replays train as eager steps do."""
    cls, options = KINDS[kind]
    made = []
    for _ in range(2):
        model = network(norm=False).cuda()
        made.append((model, cls(BASES[base](model.parameters()), telemetry_every=0, **options)))
    x, y = X[0].cuda(), Y[0].cuda()

    def step(model, optimizer):
        for half in (optimizer.first_step, optimizer.second_step):
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            half(loss=loss.detach())

    (model, optimizer), (eager, eager_optimizer) = made
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, uploads and allocates
            step(model, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # raises where either half waits for the device
        step(model, optimizer)
    for i in range(1, 4):
        x.copy_(X[i])
        y.copy_(Y[i])
        graph.replay()
    for i in (0, 0, 0, 1, 2, 3):
        x.copy_(X[i])
        y.copy_(Y[i])
        step(eager, eager_optimizer)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_constructor_arguments():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for call, error, match in (
        (lambda: SAM(sgd, rho=-0.1), ValueError, "rho"),
        (lambda: SAM(sgd, rho="a"), TypeError, "rho"),
        (lambda: SAM(sgd, rho=math.nan), ValueError, "rho"),
        (lambda: ASAM(sgd, eta=-1e-3), ValueError, "eta"),
        (lambda: SAM(sgd, adaptive="yes"), TypeError, "adaptive"),
        (lambda: SAM(model.parameters()), TypeError, "base_optimizer"),
        (lambda: SAM(model, rho=0.1), TypeError, "base_optimizer"),
        (lambda: SAM(model.parameters(), nn.Linear), TypeError, "base_optimizer"),
        (lambda: SAM(sgd, torch.optim.SGD), TypeError, "base_optimizer"),
        (lambda: SAM(sgd, lr=0.1), TypeError, "lr"),
        (lambda: SAM(SAM(sgd)), TypeError, "base_optimizer"),
        (lambda: SAM(torch.optim.LBFGS(model.parameters())), TypeError, "base_optimizer.*LBFGS"),
        (lambda: SAM(sgd, model=3), TypeError, "model"),
        (lambda: SAM(sgd, perturbation="mine"), ValueError, "perturbation"),
        (lambda: SAM(sgd, telemetry_every=-1), ValueError, "telemetry_every"),
        (lambda: AlignedSAM(sgd, align=-1.0), ValueError, "align"),
        (lambda: AlignedSAM(sgd, rho_max=0.1, rho_min=0.2), ValueError, "rho_max"),
        (lambda: AlignedSAM(sgd, perturbation="local"), ValueError, "perturbation"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_bad_steps():
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    before = weights(model)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure"):
        optimizer.step(3)
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.second_step()
    with pytest.raises(TypeError, match="closure.*None"):
        optimizer.step(lambda: None)
    returned = iter([loss_of(model, 0), None])
    with pytest.raises(TypeError, match="closure.*None"):
        optimizer.step(lambda: closure_of(model, 0)() and next(returned))
    assert same(weights(model), before)
    first_half(model, optimizer)
    for name, argument in (("state_dict", ()), ("load_state_dict", ({},)), ("add_param_group", ({"params": []},))):
        with pytest.raises(RuntimeError, match=name):
            getattr(optimizer, name)(*argument)
    with pytest.raises(RuntimeError, match="called twice"):
        optimizer.first_step()
    assert same(weights(model), before)
    first_half(model, optimizer)
    with pytest.raises(RuntimeError, match="closure between"):
        optimizer.step(closure_of(model, 0))
    assert same(weights(model), before)


def test_groups_changed_between_the_halves():
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    before = weights(model)
    first_half(model, optimizer)
    removed = optimizer.param_groups[0]["params"].pop()
    with pytest.raises(RuntimeError, match="groups have changed"):
        optimizer.second_step()
    assert same(weights(model), before)
    optimizer.param_groups[0]["params"].append(removed)
    first_half(model, optimizer)
    optimizer.base_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="groups have changed"):
        optimizer.second_step()
    assert same(weights(model), before)


def test_gradients_that_cannot_be_used():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = SAM(torch.optim.SGD(table.parameters(), lr=0.1), model=table)
    with pytest.raises(TypeError, match="weight.*sparse"):
        optimizer.step(lambda: (loss := table(torch.tensor([1])).sum(), loss.backward())[0])
    phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = SAM(torch.optim.SGD([phase], lr=0.1))
    phase.grad = torch.ones_like(phase)
    with pytest.raises(TypeError, match="complex"):
        optimizer.first_step()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    before = weights(model)
    optimizer = SAM(torch.optim.SGD(model.named_parameters(), lr=0.1), rho=0.5)
    with pytest.raises(ValueError, match="1.weight: expected memory of its own"):
        optimizer.step(lambda: (loss := model(torch.ones(2, 3)).square().sum(), loss.backward())[0])
    assert same(weights(model), before)
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    optimizer.param_groups[0]["rho"] = -1.0
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="rho"):
        optimizer.first_step()
    optimizer.param_groups[0]["rho"] = 0.1
    optimizer.zero_grad()
    optimizer.first_step()  # no gradient at all: nothing is perturbed
    optimizer.second_step()
    assert optimizer.telemetry()["perturbed"] is False


def test_kept_gradients_are_not_the_user_s():
    """AlignedSAM's first gradients survive whatever happens to p.grad between the halves."""
    results = []
    for zero in (True, None, False):
        model = network(norm=False)
        optimizer = AlignedSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.2, align=0.01)
        for i in range(3):
            loss_of(model, i).backward()
            optimizer.first_step(zero_grad=bool(zero))
            if not zero:
                optimizer.zero_grad(set_to_none=zero is None)
            loss_of(model, i).backward()
            optimizer.second_step(zero_grad=True)
        results.append(weights(model))
    assert same(results[0], results[1]) and same(results[0], results[2])


# ---- what surrounds an optimizer ------------------------------------------------------------------------------------


def by_hand(model, optimizer, i):
    """A step by hand, with its losses."""
    for half in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        half(loss=closure_of(model, i)(), zero_grad=True)


@pytest.mark.parametrize("by", ["closure", "hand", "second step()", "scaler"])
def test_hooks_are_called_once_for_a_whole_step(by):
    """Before it with the weights as they were, after it with the new ones; the base's own and global ones as ever."""
    model = network(norm=False)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=by == "scaler")
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", o, weights(model))))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", o, weights(model))))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: seen.append(("base",)))
    for i in range(2):
        old = weights(model)
        if by == "closure":
            optimizer.step(closure_of(model, i))
        elif by == "hand":
            by_hand(model, optimizer, i)
        else:
            for half in (0, 1):
                optimizer.zero_grad()
                scaled_half(scaler, model, i)
                if half == 0:
                    optimizer.first_step(zero_grad=True, scaler=scaler)
            scaler.step(optimizer) if by == "scaler" else optimizer.step()
            scaler.update()
        assert [event[0] for event in seen] == ["before", "base", "after"]
        assert seen[0][1] is optimizer and seen[2][1] is optimizer
        assert same(seen[0][2], old) and same(seen[2][2], weights(model)) and not same(old, weights(model))
        seen.clear()
    kinds = []
    handle = register_optimizer_step_pre_hook(lambda o, *_: kinds.append(type(o)))
    by_hand(model, optimizer, 2)
    handle.remove()
    assert kinds == [SAM, torch.optim.SGD]


@pytest.mark.parametrize("base", ["SGD", "ASkewSGD"])
@pytest.mark.parametrize("kind", WHOLE)
def test_maximizing_minus_the_loss_is_minimizing_it(kind, base):
    cls, options = KINDS[kind]
    runs = []
    for sign in (1, -1):
        model = network(quantized=base == "ASkewSGD", norm=False)
        made = {"SGD": torch.optim.SGD, "ASkewSGD": ASkewSGD}[base](groups(model), lr=0.1, maximize=sign < 0)
        optimizer = cls(made, **options)
        for i in range(4):

            def closure(model=model, i=i, sign=sign):
                loss = sign * loss_of(model, i)
                loss.backward()
                return loss

            optimizer.step(closure)
        runs.append((weights(model), optimizer.telemetry()["surrogate_gap"]))
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


@pytest.mark.parametrize("kind", WHOLE)
def test_each_player_is_perturbed_to_its_own_worse_side(kind):
    """Groups of which one maximizes: up the gradient where it is descended, down where it is climbed."""
    cls, options = KINDS[kind]
    model = network(norm=False)
    sgd = torch.optim.SGD([{"params": model[0].parameters(), "maximize": True}, {"params": model[2].parameters()}], 0.1)
    if "rho_max" in options:
        before = weights(model)
        with pytest.raises(ValueError, match="maximize"):
            cls(sgd, **options).step(closure_of(model, 0))
        assert same(weights(model), before)
        options = {"align": 0.02}
    optimizer = cls(sgd, rho=0.3, **options)
    before = weights(model)
    loss_of(model, 0).backward()
    optimizer.first_step()
    moved = [((p - w) * p.grad).sum().item() for p, w in zip(model.parameters(), before, strict=True)]
    assert all(m < 0 for m in moved[:2]) and all(m > 0 for m in moved[2:])
    optimizer.restore()
    assert same(weights(model), before)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("base", ["SGD without momentum", "AdamW", "two groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_distributed_checkpoints(kind, base, flat):
    """get_state_dict and set_state_dict of torch.distributed.checkpoint: the run goes on bit for bit."""
    cls, options = KINDS[kind]
    chosen = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)

    def fresh(seed):
        model = network(norm=False)
        torch.manual_seed(seed)
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        if base == "two groups":
            made = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9)
        else:
            made = BASES["AdamW"](model.parameters()) if base == "AdamW" else torch.optim.SGD(model.parameters(), 0.1)
        return model, cls(made, **options)

    model, optimizer = fresh(0)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(dcp.get_state_dict(model, optimizer, options=chosen))
    train(model, optimizer, 3, 6)
    again, other = fresh(1)
    before = weights(again)
    dcp.get_state_dict(again, other, options=chosen)  # makes the base's state; changes nothing
    assert same(weights(again), before) and other.telemetry() == {}
    dcp.set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1], options=chosen)
    assert other.state_dict()["param_groups"][-1]["sam_steps"] == 3
    train(again, other, 3, 6)
    assert same(weights(again), weights(model))
    assert same_state(other.state_dict()["param_groups"], optimizer.state_dict()["param_groups"])


def test_a_step_without_closure_needs_zero_gradients():
    model = network(norm=False)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5), rho=0.5)
    before = weights(model)
    for value in (1.0, math.nan):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        with pytest.raises(ValueError, match="closure"):
            optimizer.step()
    assert same(weights(model), before)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.allclose(p, 0.95 * w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("gap", [None, 0.25, torch.tensor(0.25)])
def test_checkpoints_of_the_first_versions(gap):
    """They kept steps and gap under a key of their own."""
    model = network()
    optimizer = AlignedSAM(BASES["SGD"](model.parameters()), rho=0.05, rho_max=0.5)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["sam_steps"], group["sam_gap"]
    saved["sam"] = {"steps": 7, "gap": gap}
    optimizer.load_state_dict(saved)
    assert saved["sam"] == {"steps": 7, "gap": gap}
    train(model, optimizer, 3, 4)
    report = optimizer.telemetry()
    assert report["step"] == 8
    assert report["rho"] == pytest.approx(0.05 if gap is None else math.log1p(0.25), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_come_later_and_bases_that_load_by_themselves(kind):
    cls, options = KINDS[kind]
    model, extra = network(norm=False), nn.Linear(4, 4)
    both = nn.Sequential(model, extra)
    plain = copy.deepcopy(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    optimizer = cls(torch.optim.SGD(model.parameters(), lr=0.1), model=both, **options)
    train(both, optimizer, 0, 2)
    optimizer.base_optimizer.load_state_dict(plain)
    train(both, optimizer, 2, 3)
    assert optimizer.param_groups[0]["rho"] == optimizer.defaults["rho"] and optimizer.telemetry()["step"] == 1
    optimizer.add_param_group({"params": extra.parameters(), "lr": 0.01})
    optimizer.base_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    before = weights(both)
    train(both, optimizer, 3, 4)
    assert not any(map(torch.equal, before, weights(both)))
    first, *rest = optimizer.state_dict()["param_groups"]
    assert all(group.keys() == first.keys() and group["sam_steps"] == 2 for group in rest)


class FlatGradients(torch.optim.SGD):
    """Gradients are views of one buffer, which zero_grad fills with zeros."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        params = self.param_groups[0]["params"]
        self.buffer = torch.zeros(sum(p.numel() for p in params))
        for p, part in zip(params, self.buffer.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)

    def zero_grad(self, set_to_none=True):
        self.buffer.zero_()


@pytest.mark.parametrize("by", ["closure", "hand", "zero_grad in place", "zero_grad replaced"])
@pytest.mark.parametrize("kind", WHOLE)
def test_gradients_in_memory_that_is_used_again(kind, by):
    """First gradients that a step needs later are copied where they would be overwritten."""
    cls, options = KINDS[kind]
    runs = []
    for flat in (False, True):
        model = network(norm=False)
        base = (FlatGradients if flat else torch.optim.SGD)(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = cls(base, telemetry_every=1, **options)
        if by == "zero_grad replaced":
            optimizer.zero_grad = lambda zero=optimizer.zero_grad: zero(set_to_none=False)
        for i in range(4):
            if by == "closure":
                optimizer.step(closure_of(model, i))
            elif by in ("hand", "zero_grad replaced"):
                by_hand(model, optimizer, i)
            else:
                for half in (optimizer.first_step, optimizer.second_step):
                    optimizer.zero_grad(set_to_none=False)
                    half(loss=closure_of(model, i)())
        assert not flat or all(p.grad._base is base.buffer for p in model.parameters())
        runs.append((weights(model), optimizer.telemetry().get("cosine")))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    lost = by == "zero_grad in place" and cls is not AlignedSAM  # nothing keeps first gradients for telemetry alone
    assert (runs[0][1] is None) == lost


@pytest.mark.parametrize("kind", WHOLE)
def test_a_weight_that_freezes_between_the_halves_stays(kind):
    cls, options = KINDS[kind]
    model = network(norm=False)
    optimizer = cls(BASES["SGD"](model.parameters()), **options)
    train(model, optimizer, 0, 1)
    before, calls = weights(model), []

    def closure():
        calls.append(model[0].weight.requires_grad_(not calls))
        return closure_of(model, 1)()

    optimizer.step(closure)
    train(model, optimizer, 2, 4)
    after = weights(model)
    assert torch.equal(after[0], before[0]) and not any(map(torch.equal, after[1:], before[1:]))


def test_a_gap_that_is_not_known_leaves_the_radius_to_rho():
    model = network(norm=False)
    optimizer = AlignedSAM(BASES["SGD"](model.parameters()), rho=0.05, rho_max=0.5)
    train(model, optimizer, 0, 1)
    loss_of(model, 1).backward()
    optimizer.first_step(zero_grad=True, loss=1.0)
    loss_of(model, 1).backward()
    optimizer.second_step(zero_grad=True, loss=math.nan)
    train(model, optimizer, 2, 3)
    assert optimizer.telemetry()["rho"] == 0.05
    gap = optimizer.gap.clone()
    optimizer.zero_grad()
    optimizer.first_step(loss=1.0)  # no gradient, no perturbation: nothing is learned of the surface
    optimizer.second_step(loss=1.0)
    assert torch.equal(optimizer.gap, gap) and gap > 0


@pytest.mark.parametrize("what", ["step", "halves", "loop", "loop of step"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps(kind, what):
    """The halves run as they are, whatever is compiled around them."""
    cls, options = KINDS[kind]
    runs = []
    for compiled in (False, True):
        model = network(norm=False)
        optimizer = cls(BASES["SGD"](model.parameters()), **options)
        torch._dynamo.reset()
        maybe = (lambda f: torch.compile(f, backend="eager")) if compiled else (lambda f: f)
        first, second = (maybe(f) if what == "halves" else f for f in (optimizer.first_step, optimizer.second_step))
        step = maybe(optimizer.step) if what == "step" else optimizer.step

        def loop(i, model=model, first=first, second=second):
            for half in (first, second):
                loss = loss_of(model, i)
                loss.backward()
                half(zero_grad=True, loss=loss)

        def loop_of_step(i, model=model, step=step):
            step(closure_of(model, i))

        run = loop_of_step if "step" in what else loop
        run = maybe(run) if "loop" in what else run
        for i in range(2):
            run(i)
        runs.append(weights(model))
    for p, q in zip(*runs, strict=True):  # a compiled forward may round otherwise
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["inference", "float64", "meta"])
def test_halves_inside_ambient_modes(mode):
    """What a step keeps serves outside, too: buffers, the gap, the base's state; the run is the same bit for bit."""
    runs = []
    for on in (False, True):
        model = network(norm=False)

        def ambient(on=on):
            if mode == "meta":
                return torch.device("meta") if on else contextlib.nullcontext()
            torch.set_default_dtype(torch.float64 if on and mode == "float64" else torch.float32)
            return torch.inference_mode(on and mode == "inference")

        with ambient():
            optimizer = AlignedSAM(BASES["SGD"](model.parameters()), rho_max=0.5)
        for i in range(2):
            for half in (optimizer.first_step, optimizer.second_step):
                loss = closure_of(model, i)()
                with ambient():
                    half(zero_grad=True, loss=loss.item() if i else loss.detach())
        torch.set_default_dtype(torch.float32)
        train(model, optimizer, 2, 4)
        runs.append(weights(model))
    assert same(*runs)


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
@pytest.mark.parametrize("base", ["AdamW", "fused", "foreach"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_with_the_model_go_on_alike(kind, base, by):
    cls, options = KINDS[kind]
    model = network()
    made = BASES["AdamW"] if base == "AdamW" else lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, **{base: True})
    optimizer = cls(made(model.parameters()), model=model, **options)
    train(model, optimizer, 0, 3)
    pair = (model, optimizer)
    again, other = copy.deepcopy(pair) if by == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.state is other.base_optimizer.state and other.param_groups is other.base_optimizer.param_groups
    assert other.model is again and other.param_groups[0]["params"][0] is again[0].weight
    train(model, optimizer, 3, 6)
    train(again, other, 3, 6)
    assert same(weights(again), weights(model))


def test_copies_share_the_process_group_and_pickles_say_that_it_is_lost():
    class Handle:  # as a process group: neither copied nor pickled
        def __reduce_ex__(self, protocol):
            raise TypeError("cannot pickle")

    model, group = network(), Handle()
    optimizer = AlignedSAM(BASES["SGD"](model.parameters()), process_group=group)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (copy.copy(optimizer), copy.deepcopy(optimizer), copy.deepcopy((model, [optimizer]))[1][0]):
            assert other.process_group is group
        plain = AlignedSAM(BASES["SGD"](network().parameters()))
        assert pickle.loads(pickle.dumps(plain)).process_group is None
    with pytest.warns(UserWarning, match="process_group"):
        other = pickle.loads(pickle.dumps(optimizer))
    assert other.process_group is None
    other.process_group = group
    assert copy.deepcopy(other).process_group is group


# ---- the descent inside the base's update ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["ASkewSGD", "ASkewAdamW"])
@pytest.mark.parametrize("kind", WHOLE)
def test_restore_costs_no_pass_over_an_askew_base(kind, base, monkeypatch):
    """The update reads the kept copy: quantized weights are not restored before; the run is the same bit for bit."""
    cls, options = KINDS[kind]
    runs = []
    for inside in (True, False):
        model = network(True)
        optimizer = cls(BASES[base](groups(model)), model=model, **options)
        annealing = ak.EpsilonAnnealing(optimizer, hold=4, total=12)
        if not inside:
            optimizer._descends_inside = lambda ascent: {}
        for i in range(8):
            restored, real = [], ops.run_sam_restore
            monkeypatch.setattr(ops, "run_sam_restore", lambda p, k, r=restored, f=real: (r.extend(p), f(p, k)))
            optimizer.step(closure_of(model, i))
            monkeypatch.setattr(ops, "run_sam_restore", real)
            quantized = [p for p in restored if WeightQuantizer.of(p) is not None]
            assert len(quantized) == (0 if inside else 2)
            annealing.step()
        runs.append((weights(model), copy.deepcopy(optimizer.state_dict())))
    assert same(runs[0][0], runs[1][0])
    assert same_state(runs[0][1], runs[1][1])


def test_an_askew_base_that_raises_or_skips_a_weight():
    model = network(True)
    optimizer = SAM(ASkewSGD(ak.param_groups(model), lr=0.1), rho=1.0, model=model)
    train(model, optimizer, 0, 2)
    before = weights(model)
    first_half(model, optimizer, 2)
    loss_of(model, 2).backward()
    optimizer.param_groups[1]["lr"] = -1.0  # found by the base's own checks
    with pytest.raises(ValueError, match="lr"):
        optimizer.second_step()
    assert same(weights(model), before)
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.zero_grad()
    first_half(model, optimizer, 2)
    loss_of(model, 2).backward()

    def forget(*_):
        model[0].weight.grad = None

    hook = optimizer.base_optimizer.register_step_pre_hook(forget)
    optimizer.second_step()
    hook.remove()
    assert torch.equal(model[0].weight, before[0]) and not torch.equal(model[3].weight, before[4])
    train(model, optimizer, 3, 5)


TOUCHED = {
    "data": lambda m: [p.data.norm() for p in m.parameters()],
    "written": lambda m: [p.data.mul_(1) for p in m.parameters()],
    "compiled": lambda m: (torch._dynamo.reset(), torch.compile(m, backend="aot_eager")(X[0])),
    "copied": lambda m: copy.deepcopy(m)(X[0]),
}


@pytest.mark.parametrize("touched", TOUCHED)
def test_who_looks_at_the_weights_between_the_halves_changes_nothing(touched):
    """The scale of the weight at home serves the perturbed one, whatever else happens to that."""

    def trained(between):
        model = network(True, norm=False)
        optimizer = SAM(ASkewSGD(groups(model), lr=0.1, momentum=0.9), rho=0.5)
        for i in range(4):
            loss_of(model, i).backward()
            optimizer.first_step(zero_grad=True)
            held = model[0].weight_scale.clone()
            between(model)
            assert torch.equal(model[0].weight_scale, held)
            loss_of(model, i).backward()
            optimizer.second_step(zero_grad=True)
        return model.state_dict()

    expected, found = trained(lambda model: None), trained(TOUCHED[touched])
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_weights_perturbed_out_of_the_hull_get_no_gradient():
    """A layer that knows all weights inside clips no gradients; perturbed ones may stand outside."""
    model = network(True, norm=False)
    optimizer = SAM(ASkewSGD(ak.param_groups(model), lr=0.01), rho=4.0)
    ak.EpsilonAnnealing(optimizer, hold=0, total=20).step()  # frozen scale, clamped to the hull
    layer = model[0]
    train(model, optimizer, 0, 3)
    assert layer.quantizer.all_inside(layer.weight)
    optimizer.zero_grad()
    first_half(model, optimizer, 3)
    assert not layer.quantizer.all_inside(layer.weight)
    low, high = (layer.quantizer.scale[:, None] * c for c in (-8, 7))
    outside = (layer.weight < low) | (layer.weight > high)
    assert outside.any()
    loss_of(model, 3).backward()
    assert not layer.weight.grad[outside].any() and layer.weight.grad[~outside].any()
    optimizer.restore()
    assert layer.quantizer.all_inside(layer.weight)
