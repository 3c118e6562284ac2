"""Contract: with ``QuantConfig(scale="lsq")`` the scale of a weight is a Parameter of its layer and is learned (Esser et
al., LSQ, ICLR 2020).

1. Its gradient is the paper's formula, from the pass that clips the weight's: a float64 oracle by autograd, each grid,
   granularity and backend; the clipped gradient is bit for bit ``ops.ste_clip_``'s.
2. It starts at 2 mean|w| / sqrt(c_max), stands in the state_dict under ``weight_scale``, and in a group of its own.
3. ASkew optimizers move it before the weights, whatever the order of groups; other optimizers do it right, too: every
   forward is s Q(w/s) of the scale and weight as they are.
4. It is learned until the constraint closes, and then stays, whatever momentum remembers; packed scales are it.
5. It is never negative, zero, NaN or inf.
"""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import ops, runtime
from askew_kernels.quant import FP4, NF4, Binary, QuantConfig, Ternary, Uniform

GRIDS = [Uniform(4), Uniform(2), Uniform(8, narrow=True), Ternary(), Binary(), NF4(), FP4()]


def round_straight_through(x, grid):
    """Q(x) for x in the hull, whose derivative is taken to be 1."""
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    if grid.evenly_spaced and len(grid.levels) > 2:
        q = x.round()
    else:
        q = levels[torch.bucketize(x.detach(), (levels[1:] + levels[:-1]) / 2)]
    return x + (q - x).detach()


def oracle(w, s, grid, cols):
    """LSQ as the paper writes it, float64, differentiable by torch alone: grad_scale(s), then round(clip(w / s)) s."""
    g = 1 / math.sqrt(cols * grid.c_max)
    s = (s - s * g).detach() + s * g
    x = (w / s[:, None]).clamp(grid.levels[0], grid.levels[-1])
    return round_straight_through(x, grid) * s[:, None]


def case(grid, rows=5, cols=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator).to(dtype)
    g = torch.randn(rows, cols, generator=generator).to(dtype)
    s = torch.rand(rows, generator=generator) * 2 / grid.c_max + 0.1  # some rows clip a lot, some nothing
    return w, g, s


def check_gradient(grid, w, g, s):
    """The operator against the oracle; float32 sums of at most 48 terms before they are float64."""
    cols = w.numel() // len(s)
    wide, scale = w.double().requires_grad_(), s.double().requires_grad_()
    oracle(wide, scale, grid, cols).backward(g.double())
    grad = g.clone()
    got = ops.ste_clip_scale_grad_(grad, w, s, grid)
    top = max(map(abs, grid.levels))
    bound = 64 * 2.0**-24 * g.double().abs().sum(1) * top / math.sqrt(cols * grid.c_max)
    assert got.shape == s.shape and ((got.double() - scale.grad).abs() <= bound).all(), (w.shape, got, scale.grad)
    assert torch.equal(grad, ops.ste_clip_(g.clone(), w, s, grid))
    untouched = g.clone()
    assert torch.equal(ops.ste_clip_scale_grad_(untouched, w, s, grid, ste_clip=False), got)
    assert torch.equal(untouched, g)
    return got


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradient_is_the_papers(grid, backend):
    with runtime.use_backend(backend):
        for rows, cols in ((1, 1), (3, 7), (5, 129), (2, 40000), (300, 16)):
            check_gradient(grid, *case(grid, rows, cols))


# ---- in layers -------------------------------------------------------------------------------------------------------


def model_with(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    return ak.quantize_(model, QuantConfig(**{"scale": "lsq", **options}))


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 12, generator=generator), torch.randint(0, 5, (32,), generator=generator)


def train(model, optimizer, steps, after=lambda: None, scaled=1.0):
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        (scaled * functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
        after()


def scales_of(model):
    return [layer.weight_scale.detach().clone() for layer in ak.nn.quantized_layers(model).values()]


def consistent(model):
    """Every forward's weight is s Q(w/s) of the scale and the weight as they are."""
    for layer in ak.nn.quantized_layers(model).values():
        s = layer.weight_scale.detach()
        wanted = ops.fake_quantize(layer.weight.detach(), s, layer.config.weight)
        assert torch.equal(layer.quantized_weight(), wanted)
        assert (s > 0).all() and s.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"granularity": "per_tensor"}, {"granularity": "per_group", "group_size": 4}],
                         ids=str)  # fmt: skip
def test_start_and_gradient_in_a_layer(options):
    model = model_with(**options)
    layer = model[0]
    rows = layer.weight_scale.numel()
    matrix = layer.weight.detach().reshape(rows, -1)
    start = 2 * matrix.abs().mean(1) / math.sqrt(7)
    assert torch.allclose(layer.weight_scale, start, rtol=1e-6)
    names = dict(model.named_parameters())
    assert names["0.weight_scale"] is layer.weight_scale and "0.weight_scale" in model.state_dict()
    assert model.get_parameter("0.weight_scale").shape == (rows,)
    x, y = batch()
    functional.cross_entropy(model(x), y).backward()
    w, s = matrix.double().requires_grad_(), layer.weight_scale.detach().double().requires_grad_()
    functional.cross_entropy(
        functional.linear(
            functional.linear(x.double(), oracle(w, s, Uniform(4), matrix.shape[1]).reshape(layer.weight.shape),
                              layer.bias.detach().double()).relu(),
            model[2].quantized_weight().double(), model[2].bias.detach().double()), y).backward()  # fmt: skip
    assert torch.allclose(layer.weight_scale.grad.double(), s.grad, rtol=1e-4, atol=1e-8)
    assert torch.allclose(layer.weight.grad.double().reshape(w.shape), w.grad, rtol=1e-4, atol=1e-8)


def test_scales_have_a_group_of_their_own():
    model = model_with()
    weights, scales, rest = ak.param_groups(model, lr=0.1, weight_decay=0.5, scale_lr=0.1)
    assert scales["role"] == "scale" and scales["weight_decay"] == 0 and scales["lr"] == pytest.approx(0.01)
    assert [id(p) for p in scales["params"]] == [id(model[0].weight_scale), id(model[2].weight_scale)]
    assert len(weights["params"]) == 2 and len(rest["params"]) == 2 and weights["weight_decay"] == 0.5
    with pytest.raises(ValueError, match="scale_lr"):
        ak.param_groups(model, scale_lr=0.1)
    model[0].weight_scale.requires_grad_(False)
    assert [id(p) for p in ak.param_groups(model)[1]["params"]] == [id(model[2].weight_scale)]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
@pytest.mark.parametrize("order", [1, -1])
def test_copies_are_of_the_new_scales_whatever_the_order_of_groups(name, order):
    model = model_with()
    groups = ak.param_groups(model)[::order]
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = ak.optim.OPTIMIZERS[f"ASkew{name}"](groups, lr=0.01, **momentum)
    before = scales_of(model)
    train(model, optimizer, 6, lambda: consistent(model))
    assert all((a != b).any() for a, b in zip(before, scales_of(model), strict=True))
    layer, calls = model[0], []
    original = ops.fake_quantize_out_
    try:  # the copy that the pass left is the one that the forward takes
        ops.fake_quantize_out_ = lambda *args: calls.append(args) or original(*args)
        train(model, optimizer, 2)
    finally:
        ops.fake_quantize_out_ = original
    assert not calls and layer.quantizer.started


def test_the_order_of_groups_does_not_matter():
    results = []
    for order in (1, -1):
        model = model_with()
        optimizer = ak.optim.ASkewSGD(ak.param_groups(model)[::order], lr=0.1, momentum=0.9)
        train(model, optimizer, 5)
        results.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.01),
    lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
], ids=["SGD", "AdamW", "fused AdamW", "loop SGD"])  # fmt: skip
def test_foreign_optimizers(make):
    model = model_with()
    before = scales_of(model)
    train(model, make(model.parameters()), 5, lambda: consistent(model))
    assert all((a != b).any() for a, b in zip(before, scales_of(model), strict=True))


def test_hold_with_a_plain_rule_is_lsq_with_sgd():
    """Until the constraint closes ASkewSGD is SGD with LSQ."""
    ours, theirs = model_with(), model_with()
    train(ours, ak.optim.ASkewSGD(ak.param_groups(ours), lr=0.1, momentum=0.9), 10)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9), 10)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_frozen_when_the_constraint_closes_and_packed(name):
    model = model_with()
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = ak.optim.OPTIMIZERS[f"ASkew{name}"](ak.param_groups(model), lr=0.02, **options)
    annealing = ak.EpsilonAnnealing(optimizer, hold=5, total=12)
    seen = []

    def after():
        annealing.step()
        seen.append(scales_of(model))
        consistent(model)

    train(model, optimizer, 14, after)
    moved = [any((a != b).any() for a, b in zip(*pair, strict=True)) for pair in zip(seen, seen[1:], strict=False)]
    assert moved == [True] * 5 + [False] * 8  # steps 1 … 6 have eps = 1
    assert all(layer.quantizer.frozen for layer in ak.nn.quantized_layers(model).values())
    assert model[0].weight_scale.grad is None
    ak.hard_quantize_(model)
    x, _ = batch()
    wanted, scales = model(x), scales_of(model)
    ak.pack_(model)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    for layer, s in zip(ak.nn.packed_layers(model).values(), scales, strict=True):
        assert torch.equal(layer.weight_scale, s)


def test_hard_quantized_scales_stay_whatever_momentum_remembers():
    model = model_with()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 4)
    ak.hard_quantize_(model)
    before = scales_of(model)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, scales_of(model), strict=True))
    train(model, optimizer, 3, lambda: consistent(model))
    assert all(torch.equal(a, b) for a, b in zip(before, scales_of(model), strict=True))


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30, 1e6])
def test_no_gradient_makes_a_scale_useless(ours, value):
    model = model_with()
    start = scales_of(model)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=1.0) if ours else torch.optim.SGD(model.parameters(), lr=1)
    x, y = batch()
    for _ in range(3):
        functional.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.grad.zero_()
        for layer in ak.nn.quantized_layers(model).values():
            layer.weight_scale.grad.fill_(value)
        optimizer.step()
        consistent(model)
        for now, before in zip(scales_of(model), start, strict=True):
            assert (now >= 0.999e-3 * before).all()
