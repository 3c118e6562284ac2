"""Contract of ``forward="fp8"`` and ``"int8"``: y = ((q c^T) s_x) s_w + b with q the levels of each token of the input.

1. Outputs are within the bound of float32 sums of the float64 formula, whatever shape and type; gradients are those of
   the float product with s_w c, straight through, clipped outside the hull.
2. The optimizer's pass writes the levels that the next forward reads, and a layer without one computes the same.
3. What such a forward cannot compute is an error that names field or layer, before anything changes.
4. Under torch.compile, torch.func, autocast, deepcopy and state_dict the layer stays what it is.

On a CPU torch's products of bytes multiply too; what a GPU's ask for (tiles, a scale a row) is tried here with the
CPU's in their place.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels import contract, ops, reference, runtime
from askew_kernels.nn import lowbit
from askew_kernels.quant import FP4, NF4, Binary, PowersOfTwo, QuantConfig, Ternary, Uniform

FORWARDS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = pytest.param("cuda", marks=needs_gpu)
both = pytest.mark.parametrize("device", ["cpu", GPU])
every_forward = pytest.mark.parametrize("forward", FORWARDS)


@pytest.fixture
def gpu_products(monkeypatch):
    """The path of a GPU's products, with those that torch has for the CPU; what a GPU's ask for is asserted."""
    int_mm, scaled_mm = torch._int_mm, torch._scaled_mm

    def tiled_int_mm(q, c):
        assert q.shape[0] > 16 and q.shape[1] % 8 == 0 and c.shape[1] % 8 == 0
        return int_mm(q, c)

    def tiled_scaled_mm(q, c, scale_q, scale_c, *bias, **options):
        assert q.shape[1] % 16 == 0 and c.shape[1] % 16 == 0 and q.is_contiguous() and c.t().is_contiguous()
        rows = scale_q.numel() > 1 or options["out_dtype"] == torch.bfloat16
        assert not rows or (scale_q.shape == (len(q), 1) and scale_c.shape == (1, c.shape[1]))
        assert options["out_dtype"] == (torch.bfloat16 if rows else torch.float32)
        assert all(b is None or (b.dtype == torch.bfloat16 and len(b) == c.shape[1]) for b in bias)
        try:
            return scaled_mm(q, c, scale_q, scale_c, *bias, **options)
        except RuntimeError as error:
            if "per-tensor scaling" not in str(error):  # all that torch 2.11 takes on a CPU
                raise
        sums = (q.float() @ c.float()) * scale_q * scale_c
        return (sums + sum(b for b in bias if b is not None)).to(options["out_dtype"])

    monkeypatch.setattr(torch, "_int_mm", tiled_int_mm)
    monkeypatch.setattr(torch, "_scaled_mm", tiled_scaled_mm)
    monkeypatch.setattr(lowbit, "_on_gpu", lambda t: True)
    monkeypatch.setattr(lowbit, "_multiplies_fp8", lambda device: True)


def layer_of(forward, inputs=20, outputs=33, device="cpu", bias=True, dtype=torch.float32, **options):
    torch.manual_seed(inputs + outputs)
    config = QuantConfig(forward=forward, **options)
    return ak.nn.AskewLinear(inputs, outputs, bias, config, device=device, dtype=dtype)


@torch.no_grad()
def formula(layer, x, low=None):
    """(y, the size of what is summed) in float64, from the float32 levels and scales of input and weight."""
    low = low or x.dtype
    x, w = x.detach().to(low).reshape(-1, x.shape[-1]), layer.form.view(layer.weight.detach())
    s = layer.weight_scale.double().reshape(-1, 1)
    c = (
        reference.nearest_levels(w, layer.weight_scale, *grid_of(layer.config.weight, w.device))
        .double()
        .reshape(w.shape)
    )
    dtype, grid = FORWARDS[layer.config.forward], layer.config.activation
    kind = contract.compute_dtype(low)
    top = contract.LEVEL_TYPES[dtype] if grid is None else grid.c_max
    s_x = x.to(kind).abs().amax(1, keepdim=True)
    s_x = s_x / torch.full_like(s_x, top)  # a GPU would multiply by the inverse of a number
    s_x = torch.where(s_x == 0, torch.ones_like(s_x), s_x)
    q = x.to(kind) / s_x
    if grid is not None:
        q = reference.nearest(q, *grid_of(grid, x.device))
    else:
        q = q.round() if dtype == torch.int8 else q.to(dtype).to(kind)
    q, s_x = q.double(), s_x.double()
    y, size = (q @ c.t()) * s_x * s.t(), (q.abs() @ c.abs().t()) * s_x * s.t()
    if layer.bias is not None:
        b = layer.bias.detach().to(low).double()
        y, size = y + b, size + b.abs()
    return y, size, s * c


def tensor_cores(forward, device):
    """What a GPU's sums of fp8 may be off by, of the sizes: 4.4 times what was measured on an H200 (5.5e-5 with fast
    accumulation, 3.9e-5 without), for how its tensor cores cut summands is not documented."""
    return 2.0**-12 if forward == "fp8" and device == "cuda" else 0.0


def grid_of(grid, device):
    return grid.levels_tensor(device), grid.encoding


def assert_near(y, exact, size, dtype, cols, more=0.0):
    """float32 sums of exact products, three roundings more (two scales, bias), and storage."""
    bound = ((cols + 3) * (2.0**-24 if dtype != torch.float64 else 2.0**-52) + more) * size
    bound = bound + ROUNDING[dtype] * exact.abs() + 1e-38
    assert y.dtype == dtype
    far = ~((y.double().reshape(exact.shape) - exact).abs() <= bound)
    assert not far.any(), (y.double().reshape(exact.shape)[far][:4], exact[far][:4])


# ---- levels of tokens -----------------------------------------------------------------------------------------------


@every_forward
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@both
def test_token_levels(forward, dtype, device, generator):
    held, top = FORWARDS[forward], contract.LEVEL_TYPES[FORWARDS[forward]]
    x = torch.randn(9, 37, generator=generator).to(dtype)
    x[1], x[2, 3], x[3, 4], x[4, 5] = 0, float("nan"), float("inf"), -float("inf")
    x[5], x[5, 0], x[6] = 0, 3.0, x[6] * 2.0**-12
    q, s = ops.token_levels(x.to(device), held)
    q, s = q.cpu(), s.cpu()
    assert q.dtype == held and q.shape == x.shape and s.dtype == torch.float32 and s.shape == (9,)
    amax = x.float().abs().amax(1)
    finite = amax.isfinite()
    assert finite.tolist() == [True, True, False, False, False, True, True, True, True] and s[~finite].isnan().all()
    expected = torch.where(amax == 0, torch.ones_like(amax), amax / top)
    assert ((s - expected).abs() <= 2.0**-23 * expected)[finite].all() and s[1] == 1
    levels = q.float()[finite]
    assert (
        levels.abs().max() == top
        and levels[1].eq(0).all()
        and levels[finite.nonzero().flatten().tolist().index(5), 0] == top
    )
    # half a step, and two roundings
    error = (levels * s[finite, None] - x.float()[finite]).abs()
    step = (
        torch.ones_like(levels) if held == torch.int8 else torch.exp2(torch.frexp(levels.abs().clamp(2.0**-6))[1] - 4.0)
    )
    assert (error <= (0.5 * step + 2 * 2.0**-23 * levels.abs()) * s[finite, None] * (1 + 2.0**-20)).all()
    assert (q[~finite].float().isnan().all()) if held != torch.int8 else (q[~finite] == 0).all()


@pytest.mark.parametrize("rows, cols", [(0, 5), (3, 0), (1, 1)])
@both
def test_token_levels_of_little(rows, cols, device):
    for dtype in contract.LEVEL_TYPES:
        q, s = ops.token_levels(torch.full((rows, cols), -2.0, device=device), dtype)
        assert q.shape == (rows, cols) and s.shape == (rows,)
        assert (q.float() == -contract.LEVEL_TYPES[dtype]).all() and (cols == 0 or s.numel() == 0 or s[0] > 0)


def test_token_levels_errors():
    x = torch.zeros(2, 4)
    for arguments, error, match in (
        ((x[0], torch.int8), ValueError, "x: expected shape"),
        ((x.int(), torch.int8), TypeError, "x: expected float32"),
        ((x, torch.uint8), TypeError, "dtype: expected torch.int8"),
        ((x, torch.int8, NF4()), ValueError, "grid: expected levels that torch.int8 holds"),
        ((x, torch.float8_e4m3fn, Uniform(8)), ValueError, "grid: expected levels that torch.float8_e4m3fn holds"),
    ):
        with pytest.raises(error, match=match):
            ops.token_levels(*arguments)


def test_which_types_hold_which_levels():
    """Against torch's own conversions."""
    grids = [Uniform(b) for b in range(2, 9)] + [PowersOfTwo(b) for b in range(2, 6)] + [
        Uniform(4, signed=False), Uniform(8, signed=False), Uniform(4, inclusive=True),
        Binary(), Ternary(), FP4(), NF4(),
    ]  # fmt: skip
    for dtype in contract.LEVEL_TYPES:
        for grid in grids:
            levels = torch.tensor(grid.levels)
            exact = torch.equal(levels.to(dtype).to(torch.float32), levels)
            assert contract.holds_levels(dtype, grid.levels) == exact, (dtype, grid)


# ---- forward and backward -------------------------------------------------------------------------------------------

SHAPES = [((9, 20), 33), ((1, 16), 16), ((2, 3, 129), 17), ((20,), 8), ((0, 20), 5), ((40, 64), 48)]


@every_forward
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@both
def test_forward_is_the_formula(forward, granularity, dtype, device, generator):
    for number, (shape, outputs) in enumerate(SHAPES):
        layer = layer_of(
            forward, shape[-1], outputs, device, bias=number % 2 == 0, dtype=dtype, granularity=granularity
        )
        x = torch.randn(shape, generator=generator).to(device, dtype)
        y = layer(x)
        assert y.shape == (*shape[:-1], outputs)
        exact, size, _ = formula(layer, x)
        assert_near(y, exact, size, dtype, shape[-1], tensor_cores(forward, device))


@every_forward
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_products_on_the_cpu(gpu_products, forward, dtype, generator):
    """Tiles of zeros around, rows that torch asks for, scales inside the product."""
    for shape, outputs in SHAPES:
        layer = layer_of(forward, shape[-1], outputs, dtype=dtype)
        x = torch.randn(shape, generator=generator).to(dtype)
        exact, size, _ = formula(layer, x)
        assert_near(layer(x), exact, size, dtype, shape[-1])


@every_forward
@pytest.mark.parametrize("grid", [Uniform(2), Uniform(4), Binary(), Ternary(), FP4(), PowersOfTwo(3)], ids=str)
def test_grids(forward, grid, generator):
    if not contract.holds_levels(FORWARDS[forward], grid.levels):
        with pytest.raises(ValueError, match=f"forward: '{forward}' holds levels in .* '(fp8|int8|hard)' does"):
            QuantConfig(weight=grid, forward=forward)
        return
    layer, x = layer_of(forward, weight=grid), torch.randn(7, 20, generator=generator)
    exact, size, _ = formula(layer, x)
    assert_near(layer(x), exact, size, torch.float32, 20)


@every_forward
@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("clip", [True, False])
@both
def test_gradients(forward, low, clip, device, generator):
    layer = layer_of(forward, device=device, ste_clip=clip)
    with torch.no_grad():
        layer.weight[0, :3] = torch.tensor([5.0, -5.0, 0.0])
    layer.quantizer.freeze(layer.weight, torch.full((33,), 0.05, device=device))
    x = torch.randn(4, 9, 20, generator=generator).to(device).requires_grad_()
    g = torch.randn(4, 9, 33, generator=generator).to(device)
    with torch.autocast(device, dtype=low or torch.bfloat16, enabled=low is not None):
        y = layer(x)
    assert y.dtype == (low or torch.float32)
    exact, size, w = formula(layer, x, low)
    assert_near(y.detach(), exact, size, y.dtype, 20, tensor_cores(forward, device))
    y.backward(g.to(y.dtype))
    g64, x64 = (t.detach().to(y.dtype).double().flatten(0, 1) for t in (g, x))
    w64 = w.to(y.dtype).double()
    more = 2.0**-10 if device == "cuda" else 0.0  # TF32 where it is on
    assert_near(x.grad.to(y.dtype), g64 @ w64, g64.abs() @ w64.abs(), y.dtype, 33, more)
    weight, size = g64.t() @ x64, g64.abs().t() @ x64.abs()
    lo, hi = -8 * 0.05, 7 * 0.05
    inside = (layer.weight.detach() >= lo) & (layer.weight.detach() <= hi)
    assert not inside.all() and inside.any()
    weight = torch.where(inside, weight, torch.zeros_like(weight)) if clip else weight
    assert layer.weight.grad.dtype == torch.float32
    assert_near(layer.weight.grad.to(y.dtype), weight, size, y.dtype, 36, more)
    assert_near(layer.bias.grad.to(y.dtype), g64.sum(0), g64.abs().sum(0), y.dtype, 36)


@every_forward
def test_a_row_that_is_not_finite_gives_nan_alone(forward):
    layer, x = layer_of(forward), torch.ones(4, 20)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    y = layer(x)
    assert y[1:3].isnan().all() and y[0].isfinite().all() and y[3].isfinite().all()


def test_a_grid_of_the_input():
    """Uniform(8) is what int8 does without one; a coarser grid gives what forward="hard" gives with it."""
    x = torch.randn(9, 20)
    plain, given = layer_of("int8"), layer_of("int8", activation=Uniform(8))
    assert torch.equal(plain(x), given(x))
    for forward in FORWARDS:
        one, other = layer_of(forward, activation=Uniform(4)), layer_of("hard", activation=Uniform(4))
        exact, size, _ = formula(one, x)
        assert_near(one(x), exact, size, torch.float32, 20)
        assert_near(other(x), exact, size, torch.float32, 20, 2.0**-22)
    with pytest.raises(
        ValueError, match=r"forward: 'fp8' holds levels in torch\.float8_e4m3fn, .* activation=Uniform.*'int8' does"
    ):
        QuantConfig(forward="fp8", activation=Uniform(8))
    with pytest.raises(ValueError, match="activation=NF4.*'hard' does"):
        QuantConfig(forward="int8", activation=NF4())


def test_transposed_layers(generator):
    for forward in FORWARDS:
        torch.manual_seed(3)
        layer = ak.nn.AskewTransposedLinear(33, 20)
        layer._attach(QuantConfig(forward=forward, scale="absmax", ste_clip=False))
        x = torch.randn(5, 20, generator=generator, requires_grad=True)
        exact, size, w = formula(layer, x)
        y = layer(x)
        assert_near(y.detach(), exact, size, torch.float32, 20)
        y.sum().backward()
        assert layer.weight.grad.shape == layer.weight.shape
        assert torch.allclose(layer.weight.grad, x.detach().sum(0)[:, None].expand(20, 33), atol=1e-4)
        assert torch.allclose(x.grad, w.sum(0).float().expand(5, 20), atol=1e-4)


# ---- the optimizer's copy -------------------------------------------------------------------------------------------


def network(forward, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 7))
    return ak.quantize_(model, QuantConfig(forward=forward, **options))


@every_forward
@pytest.mark.parametrize("eps", [1.0, 0.3])
@both
def test_the_update_writes_the_levels(forward, eps, device, monkeypatch):
    model = network(forward).to(device)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05, momentum=0.9, constraint_eps=eps)
    x = torch.randn(9, 20, device=device)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    monkeypatch.setattr(ops, "fake_quantize_out_", None)  # the forward asks for nothing
    y = model(x)
    monkeypatch.undo()
    for layer in ak.nn.quantized_layers(model).values():
        levels = layer.quantizer.quantized(layer.weight, FORWARDS[forward]).cpu()
        assert levels.dtype == FORWARDS[forward] and levels.element_size() == 1
        wanted = reference.nearest_levels(
            layer.weight.cpu(), layer.weight_scale.cpu(), *grid_of(layer.config.weight, "cpu")
        )
        assert torch.equal(levels.float(), wanted)
        layer.quantizer.invalidate()
    assert torch.equal(model(x), y)  # recomputed


@every_forward
def test_without_an_optimizer_of_ours(forward):
    model, x = network(forward), torch.randn(9, 20)
    other = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model(x)
    before.sum().backward()
    other.step()
    after = model(x)
    exact, size, _ = formula(model[0], x)
    assert not torch.equal(before, after) and torch.equal(model.eval()(x), after)
    assert_near(model[0](x).detach(), exact, size, torch.float32, 20)


@every_forward
def test_training_reaches_what_hard_reaches(forward):
    losses = {}
    for mode in ("hard", forward):
        torch.manual_seed(1)
        x = torch.randn(256, 20)
        y = torch.tanh(x @ torch.randn(20, 7) / 4)
        model = network(mode)
        optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)
        annealing = ak.EpsilonAnnealing(optimizer, total=150)
        for _ in range(150):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            annealing.step()
        losses[mode] = float(loss)
    assert losses[forward] < 1.2 * losses["hard"] + 1e-3 and losses["hard"] < 0.1, losses


# ---- what is refused ------------------------------------------------------------------------------------------------


@every_forward
def test_errors_name_field_and_layer(forward):
    with pytest.raises(ValueError, match="granularity: .*per_tensor or per_channel, got 'per_group'"):
        QuantConfig(forward=forward, granularity="per_group", group_size=32)
    for module in (nn.Conv2d(3, 4, 3), nn.Embedding(5, 4)):
        model = nn.Sequential(nn.Linear(3, 3), module)
        with pytest.raises(ValueError, match=rf"1: .*forward: '{forward}' is for linear layers, and this is Askew"):
            ak.quantize_(model, QuantConfig(forward=forward), kinds=("linear", "conv", "embedding"))
        assert type(model[0]) is nn.Linear and model[1] is module
    layer = layer_of(forward)
    for x in (torch.randn(4, 5), torch.randn(()), torch.zeros(2, 20, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"x: expected floats of shape \(…, 20\)"):
            layer(x)


# ---- surroundings ---------------------------------------------------------------------------------------------------


@every_forward
def test_config_and_copies_round_trip(forward):
    config = QuantConfig(forward=forward, activation=Uniform(4))
    assert QuantConfig.from_json(config.to_json()) == config and config.level_dtype == FORWARDS[forward]
    model, x = network(forward), torch.randn(9, 20)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    other = network(forward)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y) and not any("int8" in key for key in model.state_dict())


@every_forward
def test_packed_and_float_again(forward):
    model, x = network(forward), torch.randn(9, 20)
    quantized = [layer.quantized_weight() for layer in ak.nn.quantized_layers(model).values()]
    packed = ak.pack_(copy.deepcopy(model), force=True)
    for layer, w in zip([packed[0], packed[2]], quantized, strict=True):
        assert torch.equal(layer.dequantize(), w)
    ak.dequantize_(model)
    assert type(model[0]) is nn.Linear and model(x).shape == (9, 7)


@every_forward
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(forward, backend):
    model, x = network(forward), torch.randn(9, 20, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    wanted = [p.grad.clone() for p in (x, *model.parameters())]
    model.zero_grad()
    x.grad = None
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    z = compiled(x)
    z.square().sum().backward()
    assert torch.allclose(y, z, atol=1e-5)
    for p, grad in zip((x, *model.parameters()), wanted, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-4)


@every_forward
def test_transforms_and_higher_derivatives(forward):
    """Those of the straight-through network: linear in weight and input around the point."""
    layer, x, v = layer_of(forward, 20, 6, ste_clip=False), torch.randn(3, 20), torch.randn(3, 20)
    w = layer.quantized_weight()
    y = layer(x).detach()
    z, tangent = torch.func.jvp(layer, (x,), (v,))
    assert torch.allclose(z, y, atol=1e-5) and torch.allclose(tangent, v @ w.t(), atol=1e-5)
    assert torch.allclose(torch.func.jacrev(lambda t: layer(t).sum(0))(x)[0, 1], w[0], atol=1e-5)
    assert torch.allclose(torch.func.vmap(layer)(x[None].repeat(2, 1, 1))[1], y, atol=1e-5)
    parameters = dict(layer.named_parameters())
    loss = lambda p, t: torch.func.functional_call(layer, p, (t,)).square().sum()  # noqa: E731
    grads = torch.func.grad(loss)(parameters, x)
    layer(x).square().sum().backward()
    assert torch.allclose(grads["weight"], layer.weight.grad, atol=1e-4)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert torch.allclose(each["weight"].sum(0), layer.weight.grad, atol=1e-4)
    x = x.requires_grad_()
    g = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight), create_graph=True)
    second = torch.autograd.grad((g[0] * v).sum(), (x, layer.weight))
    expected = 2 * (v @ w.t()) @ w
    assert torch.allclose(second[0], expected, atol=1e-3)
    expected = 2 * (y.t() @ v + (v @ w.t()).t() @ x.detach())
    assert torch.allclose(second[1], expected, atol=1e-3)


@every_forward
def test_modes(forward):
    """The meta device, fake tensors, export with a dynamic batch, inference mode before training."""
    model, x = network(forward), torch.randn(9, 20)
    y = model(x).detach()
    with torch.device("meta"):
        skeleton = network(forward)
    assert skeleton(torch.empty(4, 20, device="meta")).shape == (4, 7)
    skeleton.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(skeleton(x), y)
    with torch._subclasses.FakeTensorMode():
        assert network(forward)(torch.empty(64, 20)).shape == (64, 7)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))
    assert torch.allclose(program.module()(x[:5]), y[:5], atol=1e-5)
    other = network(forward)
    with torch.inference_mode():
        assert torch.equal(other(x), y)
    other(x).sum().backward()
    assert other[0].weight.grad is not None and torch.equal(other(x), y)


@every_forward
def test_nested_inputs(forward):
    layer, parts = layer_of(forward, bias=False), [torch.randn(n, 20) for n in (2, 5)]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    y = layer(x)
    assert y.is_nested
    for part, got in zip(parts, y.unbind(), strict=True):
        assert torch.equal(layer(part), got)


@every_forward
def test_every_backend_gives_the_same(forward):
    x = torch.randn(9, 20)
    outputs = []
    for name in ("cpp", "reference"):
        if name == "cpp" and runtime._C is None:
            continue
        with runtime.use_backend(name):
            outputs.append(layer_of(forward, scale="absmax")(x))  # whose sums no order of adding changes
    assert all(torch.equal(y, outputs[0]) for y in outputs)


# ---- what only a GPU can show ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_forward
def test_a_step_in_a_cuda_graph(forward):
    """Nothing of the forward and backward waits for the host or allocates beside torch."""
    model, x = network(forward).cuda(), torch.randn(64, 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()
        return y

    with torch.cuda.stream(stream):
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn(64, 20))
    graph.replay()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(model(x), captured)


def test_packing_tells_that_inputs_are_not_rounded_any_more(caplog, generator):
    """The weights stay, bit for bit; with activations="int8" the outputs of forward="int8" too, but for sums."""
    x = torch.randn(32, 48, generator=generator)
    for forward, activations, told in (("hard", "float", 0), ("fp8", "float", 1), ("int8", "float", 1),
                                       ("int8", "int8", 0)):  # fmt: skip
        model = ak.quantize_(nn.Sequential(nn.Linear(48, 24)), QuantConfig(Uniform(4), forward=forward)).eval()
        ak.hard_quantize_(model)
        with torch.no_grad():
            expected, weight = model(x), model[0].weight.clone()
            caplog.clear()
            packed = ak.pack_(model, activations=activations)
            assert torch.equal(packed[0].dequantize(), weight)
            if not told:
                torch.testing.assert_close(packed(x), expected)
        lines = [r.message for r in caplog.records if "validate the packed model" in r.message]
        assert len(lines) == told and all("of 1 layers (0 …)" in line and forward in line for line in lines)
