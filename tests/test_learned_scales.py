"""Contract: with ``QuantConfig(scale="lsq")`` the scale of a weight is a Parameter of its layer and is learned (LSQ,
Esser et al., ICLR 2020).

1. Its gradient is the paper's formula, from the pass that clips the weight's: a float64 oracle by autograd, each grid,
   granularity and backend; the clipped gradient is bit for bit ``ops.ste_clip_``'s.
2. It starts at 2 mean|w| / sqrt(c_max), stands in the state_dict under ``weight_scale``, and in a group of its own.
3. ASkew optimizers move it before the weights, whatever the order of groups; other optimizers do it right, too: every
   forward is s Q(w/s) of the scale and weight as they are.
4. It is learned until the constraint closes, and then stays, whatever momentum remembers; packed scales are it.
5. It is never negative, zero, NaN or inf.
6. Copies, checkpoints, casts, averages, tied weights, traced and transformed calls, second derivatives, low precision
   and products of levels compute with it; what cannot says so.
"""

import copy
import io
import itertools
import math

import pytest
import torch
import torch._dynamo
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


def test_a_model_and_its_optimizer_that_are_saved_as_wholes_learn_on():
    model = model_with()
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for net, stepped in ((model, optimizer), again):
        train(net, stepped, 4)
    assert all(torch.equal(a, b) for a, b in zip(scales_of(model), scales_of(again[0]), strict=True))


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
    moved = [any((a != b).any() for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(seen)]
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


# ---- what surrounds a layer ------------------------------------------------------------------------------------------


def trained(steps=4, **options):
    model = model_with(**options)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), steps)
    return model


def pickled(model):
    torch.save(model, buffer := io.BytesIO())
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def reloaded(model, **how):
    new = model_with(seed=5)
    new.load_state_dict(copy.deepcopy(model.state_dict()), **how)
    return new


@pytest.mark.parametrize("copied", [
    copy.deepcopy, pickled, reloaded, lambda m: reloaded(m, assign=True),
    lambda m: m.to(torch.float64).to(torch.float32), lambda m: torch.optim.swa_utils.AveragedModel(m).module,
], ids=["deepcopy", "pickle", "state_dict", "assign", "cast", "average"])  # fmt: skip
def test_copies(copied):
    model = trained()
    x, _ = batch()
    expected, scales = model(x).detach(), scales_of(model)
    other = copied(model)
    assert torch.equal(other(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(scales, scales_of(other), strict=True))
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), 3, lambda: consistent(other))
    assert all((a != b).any() for a, b in zip(scales, scales_of(other), strict=True))
    if other is not model:
        assert torch.equal(model(x), expected)
    names = [name for name, _ in other.named_parameters()]
    assert names == ["0.weight", "0.bias", "0.weight_scale", "2.weight", "2.bias", "2.weight_scale"]


def test_a_copy_of_a_copy_is_its_own():
    model = trained()
    twins = copy.deepcopy([model, model[0]])
    assert twins[0][0] is twins[1] and twins[1].weight_scale is twins[1].quantizer.learned
    assert twins[1].weight_scale is not model[0].weight_scale


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_resumed_training_is_the_same(name):
    def start(seed=0):
        model = model_with(seed)
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = ak.optim.OPTIMIZERS[f"ASkew{name}"](ak.param_groups(model), lr=0.05, **options)
        return model, optimizer, ak.EpsilonAnnealing(optimizer, hold=4, total=10)

    for stop in (2, 6):
        whole, optimizer, annealing = start()
        train(whole, optimizer, stop, annealing.step)
        saved = [copy.deepcopy(part.state_dict()) for part in (whole, optimizer, annealing)]
        train(whole, optimizer, 4, annealing.step)
        resumed = start(seed=3)
        for part, state in zip(resumed, saved, strict=True):
            part.load_state_dict(state)
        model, optimizer, annealing = resumed
        train(model, optimizer, 4, annealing.step)
        for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("moved", [
    lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())), lambda m: m.double().float(), lambda m: m.to("cpu"),
], ids=["loaded", "cast", "moved"])  # fmt: skip
def test_tensors_that_torch_swaps_are_learned_on(moved):
    """``torch.__future__.set_swap_module_params_on_conversion``: another tensor and class in the same object."""

    def trained(between):
        model = model_with()
        optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05, momentum=0.9)
        annealing = ak.EpsilonAnnealing(optimizer, hold=3, total=6)
        for _ in range(7):
            train(model, optimizer, 1)
            annealing.step()
            between(model)
        return model.state_dict()

    expected, before = trained(lambda m: None), torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        found = trained(moved)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_a_float_checkpoint_starts_the_scale_anew():
    model, other = trained(), nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    model.load_state_dict(other.state_dict())
    start = 2 * other[0].weight.abs().mean(1) / math.sqrt(7)
    assert torch.allclose(model[0].weight_scale, start, rtol=1e-6)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, lambda: consistent(model))


def test_it_starts_from_the_weights_that_are_trained():
    """Those of an initialisation after quantize_, too, and once there is one that is not zero; not any later."""
    model = model_with()
    before = scales_of(model)[0]
    with torch.no_grad():
        model[0].weight.mul_(4)
    assert torch.allclose(scales_of(model)[0], 4 * before)
    with torch.no_grad():
        model[0].weight.zero_()
        assert torch.equal(model(batch()[0]), model(batch()[0]))
        assert (scales_of(model)[0] == 1).all()
        model[0].weight.normal_()
    model(batch()[0]).sum().backward()
    start = scales_of(model)[0]
    assert torch.allclose(start, 2 * model[0].weight.abs().mean(1) / math.sqrt(7), rtol=1e-6)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(scales_of(model)[0], start)
    model[0].reset_parameters()
    assert not torch.equal(scales_of(model)[0], start)


def test_a_scale_that_was_set_stays():
    model = model_with()
    with torch.no_grad():
        model[0].weight_scale.fill_(0.25)
    assert (scales_of(model)[0] == 0.25).all()
    consistent(model)
    model[0].weight_scale.data.fill_(0.5)
    assert (scales_of(model)[0] == 0.5).all()
    consistent(model)
    model[0].weight_scale.data = torch.full((24,), 0.75)
    assert (scales_of(model)[0] == 0.75).all()
    consistent(model)


def test_rows_of_zeros_and_layers_without_weights():
    model = model_with()
    with torch.no_grad():
        model[0].weight[3] = 0
    scale = scales_of(model)[0]
    assert scale[3] == scale[[i for i in range(24) if i != 3]].sort().values[11]  # the lower median of the others
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, lambda: consistent(model))
    empty = ak.nn.AskewLinear(0, 3, config=QuantConfig(scale="lsq"))
    empty(torch.zeros(2, 0)).sum().backward()
    assert empty.weight_scale.shape == (3,)


def test_tied_weights_share_a_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    ak.quantize_(model, QuantConfig(scale="lsq"))
    assert model[0].weight_scale is model[1].weight_scale
    assert len([*model.parameters()]) == 4 and len(ak.param_groups(model)[1]["params"]) == 1
    alone = copy.deepcopy(model)
    x = torch.randn(4, 6)
    model(x).square().sum().backward()
    alone[1].weight = nn.Parameter(alone[0].weight.detach().clone())
    assert alone[1].weight_scale is not alone[0].weight_scale
    alone(x).square().sum().backward()
    both = alone[0].weight_scale.grad + alone[1].weight_scale.grad
    assert torch.allclose(model[0].weight_scale.grad, both, rtol=1e-5, atol=1e-7)
    train_tied = torch.optim.SGD(model.parameters(), lr=0.1)
    train_tied.step()
    consistent(model)


def gradients(model, call=None):
    x, y = batch()
    model.zero_grad()
    functional.cross_entropy((call or model)(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


def close(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, rtol=tolerance, atol=tolerance * 0.1), (x - y).abs().max()


@pytest.mark.parametrize("options", [{}, {"ste_clip": False}, {"scale_dtype": "float16"},
                                     {"scale_dtype": "float8_e8m0fnu"}, {"weight": NF4()}], ids=str)  # fmt: skip
def test_traced_and_transformed_calls(options):
    model = trained(**options)
    expected = gradients(model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = batch()

    def loss(params):
        return functional.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    close(torch.func.grad(loss)(params).values(), expected)
    assert torch.equal(torch.func.functional_call(model, params, (x,)), model(x))
    torch._dynamo.reset()  # of other models
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(gradients(model, compiled), expected)
    tangents = {name: torch.ones_like(p) if "scale" in name else torch.zeros_like(p) for name, p in params.items()}
    _, directional = torch.func.jvp(loss, (params,), (tangents,))
    along = sum(g.sum() for g, (n, _) in zip(expected, model.named_parameters(), strict=True) if "scale" in n)
    assert torch.allclose(directional, along, rtol=1e-4)
    models = [trained(**options), model]
    stacked = torch.func.stack_module_state(models)
    many = torch.func.vmap(lambda p, b: torch.func.functional_call(model, (p, b), (x,)))(*stacked)
    for one, y_one in zip(models, many, strict=True):
        assert torch.allclose(y_one, one(x), atol=1e-6)


def test_compiled_before_and_after_the_freeze():
    """At every step the gradients are those of the eager layers."""
    model = model_with()
    torch._dynamo.reset()  # of other models
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)
    annealing = ak.EpsilonAnnealing(optimizer, hold=2, total=6)
    x, y = batch()
    for k in range(6):
        eager = copy.deepcopy(model)
        for call, m in ((compiled, model), (eager, eager)):
            m.zero_grad()
            functional.cross_entropy(call(x), y).backward()
        frozen = k > 3  # from the step after the first annealed one on, which froze
        assert (model[0].weight_scale.grad is None) == frozen
        both = [(p.grad, q.grad) for p, q in zip(model.parameters(), eager.parameters(), strict=True)]
        close(*zip(*((g, e) for g, e in both if e is not None), strict=True))
        optimizer.step()
        annealing.step()
        consistent(model)
        assert model[0].quantizer.frozen == (k >= 3)


def test_second_derivatives():
    model = trained()
    x, y = batch()
    scale = model[0].weight_scale
    loss = functional.cross_entropy(model(x), y)
    (first,) = torch.autograd.grad(loss, scale, create_graph=True)
    close([first.detach()], [gradients(model)[2]])
    (second,) = torch.autograd.grad(first.square().sum(), model[2].bias)
    assert second.isfinite().all() and (second != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_weights(dtype):
    model = model_with().to(dtype)
    layer = model[0]
    assert layer.weight_scale.dtype == torch.float32 and layer.weight.dtype == dtype
    x, y = batch()
    functional.cross_entropy(model(x.to(dtype)).float(), y).backward()
    assert layer.weight_scale.grad.dtype == torch.float32 and layer.weight.grad.dtype == dtype
    expected = gradients(model_with())[2]
    tolerance = {torch.bfloat16: 0.2, torch.float16: 0.02, torch.float64: 1e-4}[dtype]
    assert (layer.weight_scale.grad - expected).norm() <= tolerance * expected.norm()


def test_autocast():
    model = trained()
    expected = gradients(model)[2]
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    x, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            functional.cross_entropy(model(x), y).backward()
        if expected is not None:
            assert (model[0].weight_scale.grad - expected).norm() <= 0.1 * expected.norm()
            expected = None
        optimizer.step()
    quantizer = model[0].quantizer
    assert quantizer.copy_dtype == torch.bfloat16 and torch.bfloat16 in quantizer._known.fresh
    consistent(model)


@pytest.mark.parametrize("forward", ["int8", "fp8"])
def test_products_of_levels(forward):
    """The gradient is that of s Q(w/s), which is what the levels stand for."""
    model, plain = model_with(forward=forward), model_with()
    layer, same = model[0], plain[0]
    x, g = torch.randn(8, 12), torch.randn(8, 24)
    layer(x).backward(g)
    same(x).backward(g)
    close([layer.weight_scale.grad, layer.weight.grad], [same.weight_scale.grad, same.weight.grad], 1e-4)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    found = torch.func.grad(lambda p: (torch.func.functional_call(layer, p, (x,)) * g).sum())(params)
    close([found["weight_scale"]], [layer.weight_scale.grad], 1e-4)
    train(model, ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05), 3, lambda: consistent(model))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float8_e8m0fnu"])
def test_rounded_scales(scale_dtype):
    """The forward takes the rounded scale, the Parameter goes on in small steps, and packed scales are the rounded."""
    model = model_with(scale_dtype=scale_dtype)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)
    annealing = ak.EpsilonAnnealing(optimizer, hold=4, total=9)
    train(model, optimizer, 4, annealing.step)
    consistent(model)
    layer = model[0]
    latent, used = layer._parameters["weight_scale"].detach(), layer.weight_scale
    assert ak.quant.scales.holds_scales(used, scale_dtype) and not torch.equal(latent, used)
    assert torch.equal(ak.quant.scales.round_scale(latent, scale_dtype), used)
    twin = copy.deepcopy(model)
    assert torch.equal(twin[0]._parameters["weight_scale"], latent) and torch.equal(twin[0].weight_scale, used)
    train(model, optimizer, 6, annealing.step)
    assert torch.equal(layer._parameters["weight_scale"], layer.weight_scale)
    ak.hard_quantize_(model)
    scales = scales_of(model)
    ak.pack_(model)
    for packed, scale in zip(ak.nn.packed_layers(model).values(), scales, strict=True):
        assert torch.equal(packed.weight_scale.float(), scale)


@pytest.mark.parametrize("freeze", ["init", "never"])
def test_when_scales_freeze(freeze):
    model = model_with()
    start = scales_of(model)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model, freeze_scale=freeze), lr=0.1, momentum=0.9)
    annealing = ak.EpsilonAnnealing(optimizer, hold=2, total=6)
    train(model, optimizer, 3, annealing.step)
    middle = scales_of(model)
    train(model, optimizer, 3, lambda: (annealing.step(), consistent(model)))
    for a, b, c in zip(start, middle, scales_of(model), strict=True):
        assert torch.equal(a, b) == torch.equal(b, c) == (freeze == "init")


def test_quantized_anew_and_float_again():
    model = trained()
    ak.quantize_(model, QuantConfig())
    assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    ak.quantize_(model, QuantConfig(scale="lsq", weight=Ternary()))
    assert isinstance(model[0].weight_scale, nn.Parameter)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, lambda: consistent(model))
    ak.dequantize_(model)
    assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [*model.state_dict()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_meta_and_materialised():
    with torch.device("meta"):
        model = ak.quantize_(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)), QuantConfig(scale="lsq"))
    assert model[0].weight_scale.is_meta and model(torch.zeros(3, 12, device="meta")).is_meta
    source = trained()
    assert copy.deepcopy(source).to("meta")(torch.zeros(3, 12, device="meta")).is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    x, _ = batch()
    assert torch.equal(model(x), source(x))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, lambda: consistent(model))


@pytest.mark.parametrize("wrapper", ["SAM", "Skewed"])
def test_wrapped_optimizers(wrapper):
    model = model_with()
    groups = ak.param_groups(model, lr=0.05)
    if wrapper == "Skewed":
        optimizer = ak.optim.Skewed(torch.optim.SGD(groups, lr=0.05, momentum=0.9))
        annealing = ak.EpsilonAnnealing(optimizer, hold=3, total=8)
        train(model, optimizer, 9, lambda: (annealing.step(), consistent(model)))
        assert model[0].quantizer.frozen
        return
    optimizer = ak.optim.SAM(ak.optim.ASkewSGD(groups, lr=0.05, momentum=0.9), rho=0.05)
    x, y = batch()

    seen = []

    def closure():
        seen.append((scales_of(model)[0], model[0].weight.detach().clone()))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    start = scales_of(model)
    for _ in range(4):
        optimizer.step(closure)
        consistent(model)
    for (s_here, w_here), (s_there, w_there) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(s_here, s_there) and not torch.equal(w_here, w_there)  # weights alone are perturbed
    assert all((a != b).any() for a, b in zip(start, scales_of(model), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", [{}, {"activation": Uniform(8), "activation_scale": "lsq+"}], ids=["", "inputs"])
@pytest.mark.parametrize("base", ["SGD", "ASkewSGD"])
def test_aligned_steps_take_both_gradients_of_scales_too(base, config, dtype):
    torch.manual_seed(0)
    model = ak.quantize_(
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), QuantConfig(scale="lsq", **config)
    )
    model.to(dtype)
    x, y = torch.randn(32, 16, dtype=dtype), torch.arange(32) % 3
    ak.nn.calibrate_(model, x)
    kind = torch.optim.SGD if base == "SGD" else ak.optim.ASkewSGD
    optimizer = ak.optim.AlignedSAM(kind(ak.param_groups(model), lr=0.01), rho=0.05)
    names = [name for name, _ in model.named_parameters() if "scale" in name or "offset" in name]
    seen = []
    for half in (optimizer.first_step, optimizer.second_step):
        functional.cross_entropy(model(x), y).backward()
        seen.append({name: model.get_parameter(name).grad.clone() for name in names})
        half(zero_grad=half == optimizer.first_step)
    for name in names:
        merged = (seen[0][name] + seen[1][name]) / 2
        torch.testing.assert_close(model.get_parameter(name).grad, merged)


def test_skipped_gradients_leave_scales_alone():
    """Momentum would remember a NaN for ever."""
    model = model_with()
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model, skip_nonfinite=True), lr=0.05, momentum=0.9)
    x, y = batch()
    for k in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        before = scales_of(model)[0]
        if k == 0:
            model[0].weight.grad[2, 3] = math.nan
            model[0].weight_scale.grad[2] = math.nan
        optimizer.step()
        consistent(model)
        moved = scales_of(model)[0] != before
        assert moved[3] and moved[2] == (k > 0)
    assert model[0].weight.isfinite().all()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="scale: 'lsq'.*forward='relaxed'"):
        QuantConfig(scale="lsq", forward="relaxed")
    with pytest.raises(ValueError, match="ste_clip: 'step'.*scale='lsq'"):
        QuantConfig(scale="lsq", ste_clip="step")
    with pytest.raises(ValueError, match=r"scale: 'lsq'.*params\[0\]"):
        ak.optim.ASkewSGD([nn.Parameter(torch.ones(2, 3))], lr=0.1, grid=Uniform(4), scale="lsq")
    model = model_with()
    with pytest.raises(TypeError, match=r"params\[2\]: is the learned scale"):
        ak.optim.ASkewSGD(model[0].parameters(), lr=0.1, grid=Uniform(4))
    assert QuantConfig.from_json(QuantConfig(scale="lsq").to_json()) == QuantConfig(scale="lsq")


def test_accumulated_gradients_and_no_update_between():
    model, whole = model_with(), model_with()
    x, y = batch()
    for part in (slice(0, 16), slice(16, 32)):
        (0.5 * functional.cross_entropy(model(x[part]), y[part])).backward()
    close([p.grad for p in model.parameters()], gradients(whole), 1e-4)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 6, 3), lambda: nn.Conv1d(3, 6, 3), lambda: nn.Embedding(7, 6)])
def test_other_layers(make):
    torch.manual_seed(0)
    model = ak.quantize_(nn.Sequential(make()), QuantConfig(scale="lsq"), kinds=["conv", "embedding"])
    layer = model[0]
    x = torch.randint(0, 7, (5,)) if isinstance(layer, nn.Embedding) else torch.randn(2, 3, 8, 8)[..., :8]
    x = x[:, :, 0] if isinstance(layer, nn.Conv1d) else x
    if isinstance(layer, nn.Conv2d):
        model = model.to(memory_format=torch.channels_last)
    y = model(x)
    g = torch.randn(y.shape)
    y.backward(g)
    w = layer.weight.detach().contiguous().flatten(1).double().requires_grad_()
    s = layer.weight_scale.detach().double().requires_grad_()
    quantized = oracle(w, s, Uniform(4), w.shape[1]).reshape(layer.weight.shape)
    layer.kind.product(layer, x.double() if x.is_floating_point() else x, quantized, None).backward(g.double())
    assert torch.allclose(layer.weight_scale.grad.double(), s.grad, rtol=1e-4, atol=1e-6)


# ---- two processes ---------------------------------------------------------------------------------------------------


def work(rank, world):
    model, alone = model_with(seed=rank), model_with()
    together = nn.parallel.DistributedDataParallel(model)
    x, y = batch()
    mine, runs = slice(16 * rank, 16 * rank + 16), []
    for m in (model, alone):
        optimizer = ak.optim.ASkewSGD(ak.param_groups(m), lr=0.1, momentum=0.9)
        runs.append((optimizer, ak.EpsilonAnnealing(optimizer, hold=3, total=8)))
    for _ in range(8):
        for call, part, (optimizer, annealing) in zip((together, alone), (mine, slice(0, 32)), runs, strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(call(x[part]), y[part]).backward()
            optimizer.step()
            annealing.step()
        close([p.detach() for p in model.parameters()], [p.detach() for p in alone.parameters()], 1e-3)
        consistent(model)
    assert model[0].quantizer.frozen


def test_two_processes(ranks):
    """DistributedDataParallel trains as one process does, also after the freeze, when scales have no gradient; of
    shards see test_distributed.py."""
    ranks.call(work)
