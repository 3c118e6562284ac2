"""Contract of products of levels on a CPU, and of gradients rounded stochastically (docs/mathematics.md, 3 and 8).

1. Levels of tokens, products and outputs are the reference's, bit for bit, on every instruction set and any number of
   threads, whatever shape, storage type and range of levels.
2. Stochastic rounding is unbiased, gives only its levels, and follows from the seed and the place alone; NaN shows.
3. A layer with ``gradient=LUQ()`` or ``"int8"`` has the gradients of its formula, reproducible by torch's seed.
4. With them a network learns what it learns without.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels import contract, ops, reference, runtime
from askew_kernels.nn import lowbit
from askew_kernels.quant import FP4, LUQ, Binary, QuantConfig, Ternary, Uniform

NONE = torch.empty(0)
SETS = [("baseline", True), ("avx2", False), ("avx2", True), ("avx512", False), ("avx512", True)]  # name, with VNNI
STORAGE = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=SETS, ids=lambda s: f"{s[0]}{'' if s[1] else '-no-vnni'}")
def instructions(request):
    """Every instruction set that this processor has, in turn."""
    if runtime._C is None:
        pytest.skip(runtime.why_not_compiled())
    before = runtime.cpu_capability()
    name, vnni = request.param
    try:
        runtime._C.force_cpu_capability(name, vnni=vnni)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    runtime._C.force_cpu_capability(before)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def odd_rows(shape, generator, dtype=torch.float32):
    """Rows that are zero, hold NaN or inf, are tiny, or have one large number."""
    x = torch.randn(shape, generator=generator).to(dtype)
    if shape[0] >= 7 and shape[1]:
        x[1], x[2, 0], x[3, -1], x[4, 0] = 0, math.nan, math.inf, -math.inf
        x[5], x[6] = x[5] * 2.0**-20, 0
        x[6, -1] = 3.0
    return x


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.double().nan_to_num(nan=12345.0), b.double().nan_to_num(nan=12345.0))


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 37), (7, 1), (8, 128), (1, 4099), (0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_token_levels(instructions, shape, dtype, generator):
    x = odd_rows(shape, generator, dtype)
    fp8 = torch.float8_e4m3fn
    grids = [(torch.int8, [1, -127, 127], 127.0), (torch.int8, [1, -8, 7], 7.0), (fp8, [0, 0, 0], 448.0),
             (torch.int8, [2, -1, 1], 1.0)]  # fmt: skip
    for held, grid, top in grids:
        for got, wanted in zip(torch.ops.askew.token_levels(x, NONE, grid, top, held),
                               reference.token_levels(x, NONE, grid, top, held), strict=True):  # fmt: skip
            assert same(got, wanted)
    grid = FP4()
    arguments = x, grid.levels_tensor(x.device), grid.encoding, grid.c_max, fp8
    for got, wanted in zip(torch.ops.askew.token_levels(*arguments), reference.token_levels(*arguments), strict=True):
        assert same(got, wanted)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("held", [torch.int32, torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_scaled_sums(instructions, dtype, held, generator):
    for rows, n in ((5, 33), (3, 16), (1, 1), (0, 7), (4, 0)):
        sums = torch.randint(-(2**27), 2**27, (rows, n), generator=generator)
        sums = sums.int() if held == torch.int32 else (sums % 255 - 127).to(held)
        token = torch.rand(rows, generator=generator)
        for scale in (torch.rand(n, generator=generator), torch.rand(1, generator=generator)):
            for bias in (None, torch.randn(n, generator=generator).to(dtype)):
                arguments = sums, token, scale, bias, dtype
                assert same(torch.ops.askew.scaled_sums(*arguments), reference.scaled_sums(*arguments))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    arguments = every, torch.ones(1), torch.ones(1), None, torch.float32
    assert same(torch.ops.askew.scaled_sums(*arguments), reference.scaled_sums(*arguments))


RANGES = [(-1, 1), (-8, 7), (-64, 63), (0, 127), (-128, 127), (5, 5)]
SHAPES = [
    (1, 1, 1),
    (7, 20, 33),
    (6, 64, 64),
    (13, 129, 65),
    (200, 256, 130),
    (5, 4099, 3),
    (3, 0, 4),
    (0, 4, 3),
    (4, 3, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(instructions, shape, generator):
    rows, cols, n = shape
    q = torch.randint(-128, 128, (rows, cols), generator=generator, dtype=torch.int8)
    token, scale = torch.rand(rows, generator=generator), torch.rand(n, generator=generator)
    for i, (low, high) in enumerate(RANGES):
        c = torch.randint(low, high + 1, (n, cols), generator=generator).to(torch.int8)
        c.view(-1)[:1] = low
        dtype, bias = STORAGE[i % 3], torch.randn(n, generator=generator)
        for transposed in (False, True):
            weight = c.t().contiguous() if transposed else c
            for s, b in ((scale, bias.to(dtype)), (torch.tensor([0.3]), None)):
                arguments = q, token, weight, s, b, transposed, dtype
                assert same(torch.ops.askew.level_product(*arguments), reference.level_product(*arguments))


def test_the_largest_sums(instructions):
    """Levels at the ends of int8, as many as int32 holds the sum of: no product may end early."""
    cols = contract.MOST_LEVEL_COLUMNS if instructions[0] != "baseline" else 2000
    q, c = torch.full((7, cols), -128, dtype=torch.int8), torch.full((17, cols), -128, dtype=torch.int8)
    c[0], c[1, ::2], q[1] = 127, 127, 127
    one = torch.ones(1)
    arguments = q, torch.ones(7), c, one, None, False, torch.float32
    assert torch.equal(torch.ops.askew.level_product(*arguments), reference.level_product(*arguments))


def test_threads(generator):
    x, c = torch.randn(400, 200, generator=generator), torch.randint(-8, 8, (300, 200), generator=generator).char()
    found = []
    for count in (1, 2):
        with threads(count):
            q, s = ops.token_levels(x, torch.int8)
            found.append((q, s, ops.level_product(q, s, c, torch.rand(300, generator=generator.manual_seed(3))),
                          *ops.stochastic_levels(x, seed=7), ops.luq(x, seed=9)))  # fmt: skip
    assert all(map(torch.equal, *found))


def test_public_functions_check_and_copy(generator):
    """What is not contiguous is copied; errors name the argument."""
    q = torch.randint(-127, 128, (40, 12), generator=generator, dtype=torch.int8)
    c = torch.randint(-8, 8, (40, 9), generator=generator, dtype=torch.int8)
    s, one = torch.rand(12, generator=generator), torch.ones(1)
    wanted = (q.t().double() @ c.double()) * s[:, None]
    assert torch.allclose(ops.level_product(q.t(), s, c.t(), one).double(), wanted)
    assert torch.allclose(ops.level_product(q.t(), s, c, one, transposed=True).double(), wanted)
    for name, call in {
        "q": lambda: ops.level_product(q.float(), s, c, one), "c": lambda: ops.level_product(q, s, c, one),
        "token_scale": lambda: ops.level_product(q.t(), one, c.t(), one),
        "scale": lambda: ops.level_product(q.t(), s, c.t(), torch.ones(2)),
        "bias": lambda: ops.level_product(q.t(), s, c.t(), one, one),
        "x": lambda: ops.stochastic_levels(torch.ones(3)), "factor": lambda: ops.stochastic_levels(q.float(), s[:3]),
        "seed": lambda: ops.luq(s, seed=-1), "bits": lambda: ops.luq(s, bits=7),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()


def test_no_derivative(generator):
    q, c = (torch.ones(n, 4, dtype=torch.int8) for n in (2, 3))
    with pytest.raises(NotImplementedError, match="askew::level_product has no derivative"):
        torch.ops.askew.level_product(
            q, torch.ones(2, requires_grad=True), c, torch.ones(1), None, False, torch.float32
        )


# ---- stochastic rounding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_random_bits(instructions, dtype, generator):
    for shape in ((9, 37), (7, 1), (2, 1030), (3, 0), (0, 4)):
        x, seed = odd_rows(shape, generator, dtype), torch.tensor(2**40 + shape[1])
        for factor in (torch.rand(shape[1], generator=generator), torch.tensor([0.7])):
            for got, wanted in zip(torch.ops.askew.stochastic_levels(x, factor, seed),
                                   reference.stochastic_levels(x, factor, seed), strict=True):  # fmt: skip
                assert same(got, wanted)
        for bits in range(2, 7):
            assert torch.ops.askew.luq(x, bits, seed).isnan().all() == reference.luq(x, bits, seed).isnan().all()
            for part in (x[5:], x[:2], x[:1, :3], x.nan_to_num(0, 2.0, -2.0)):
                part = part.contiguous()
                assert same(torch.ops.askew.luq(part, bits, seed), reference.luq(part, bits, seed))


def assert_unbiased(draws, x, spread):
    """The mean over draws is x: within 5.5 standard errors, ``spread`` bounding one draw's deviation; of 4000 numbers
    one is further than that with probability 2e-4."""
    error = (draws.double().mean(0) - x.double()).abs()
    assert (error <= 5.5 * spread / math.sqrt(len(draws)) + 2.0**-22 * x.abs().max()).all()


def test_levels_are_unbiased(generator):
    x = torch.randn(40, 25, generator=generator)
    factor = torch.rand(25, generator=generator)
    draws = [ops.stochastic_levels(x, factor, seed) for seed in range(400)]
    values = torch.stack([q.double() * s[:, None] for q, s in draws])
    s = draws[0][1][:, None].double()
    assert_unbiased(values, x * factor, 0.5 * s)
    place = (x * factor).double() / s
    for q, _ in draws[:20]:
        assert ((q >= place.floor() - 1e-5) & (q <= place.ceil() + 1e-5)).all() and q.abs().max() == 127


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_luq_is_unbiased_and_gives_only_its_levels(bits, generator):
    x = torch.randn(1000, generator=generator) * torch.logspace(-4, 0, 1000)
    x[0] = 0
    top = 2 ** (bits - 1) - 1
    alpha = float(x.abs().max()) * 2.0**-top  # the published formula, b = bits - 1
    draws = torch.stack([ops.luq(x, bits, seed) for seed in range(400)])
    levels = torch.tensor([0.0, *(alpha * 2.0**k for k in range(top + 1))])
    assert torch.isin(draws.abs(), levels).all()
    size = x.abs()
    below = torch.where(size < alpha, 0.0, alpha * 2.0 ** torch.floor(torch.log2((size / alpha).clamp(min=1.0))))
    above = torch.where(size < alpha, alpha, 2 * below)
    assert ((draws.abs() == below) | (draws.abs() == above)).all()  # one of the two neighbours
    assert ((draws == 0) | (draws.sign() == x.sign())).all() and (draws[:, 0] == 0).all()
    assert_unbiased(draws, x, (0.5 * (above - below)).double())
    top_place = x.abs().argmax()
    assert (draws[:, top_place] == x[top_place]).all()  # the largest stays
    assert not torch.equal(draws[0], draws[1]) and torch.equal(draws[3], ops.luq(x, bits, torch.tensor(3)))


def test_what_is_not_finite_and_what_is_tiny():
    for bad in (math.nan, math.inf, -math.inf):
        assert ops.luq(torch.tensor([1.0, bad, 0.0])).isnan().all()
        q, s = ops.stochastic_levels(torch.tensor([[1.0, bad], [1.0, 2.0]]))
        assert s[0].isnan() and s[1] == torch.tensor(2.0) / 127 and (q[0] == 0).all()
    assert torch.equal(ops.luq(torch.zeros(5)), torch.zeros(5)) and ops.luq(torch.empty(0)).shape == (0,)
    tiny = torch.tensor([2.0**-140, -(2.0**-149), 2.0**-133])  # whose alpha no float32 is
    for seed in range(8):
        y = ops.luq(tiny, 6, seed)
        assert y[2] == tiny[2] and y[1] <= 0 <= y[0] <= 2.0**-139


def test_torchs_generator_seeds():
    x = torch.randn(50, 20)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append((ops.luq(x), ops.stochastic_levels(x)[0], ops.luq(x)))
    assert all(map(torch.equal, found[0], found[1])) and not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][2])


# ---- layers ---------------------------------------------------------------------------------------------------------


def layer_of(inputs=20, outputs=33, **options):
    torch.manual_seed(inputs + outputs)
    return ak.nn.AskewLinear(inputs, outputs, True, QuantConfig(ste_clip=False, **options))


def gradients(layer, x, g, seed=5):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    layer(x).backward(g)
    return x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("grid", [Uniform(4), Uniform(8), Ternary(), Binary()], ids=str)
def test_a_products_gradient_of_levels(low, grid, generator):
    """grad_x = s_g (g c), s_g g the stochastic levels of G s_w; that of weight and bias as without."""
    layer, plain = layer_of(weight=grid, forward="int8", gradient="int8"), layer_of(weight=grid, forward="int8")
    x, g = torch.randn(4, 9, 20, generator=generator), torch.randn(4, 9, 33, generator=generator)
    with torch.autocast("cpu", dtype=low or torch.bfloat16, enabled=low is not None):
        g = g.to(low or torch.float32)
        got, wanted = gradients(layer, x, g), gradients(plain, x, g)
    assert torch.equal(got[1], wanted[1]) and torch.equal(got[2], wanted[2])
    torch.manual_seed(5)
    q, s = ops.stochastic_levels(g.flatten(0, 1), layer.weight_scale.detach(), ops.draw_seed("cpu"))
    c = layer.quantizer.quantized(layer.weight, torch.int8)
    exact = (q.double() @ c.double()) * s.double()[:, None]
    error = (got[0].flatten(0, 1).double() - exact).abs()
    assert (error <= (2.0**-8 if low else 2.0**-22) * exact.abs() + 1e-12).all()
    mean = torch.stack([gradients(layer, x, g, seed)[0] for seed in range(200)]).double().mean(0)
    bound = 5.5 * 0.5 * s.double()[:, None] * c.double().square().sum(0).sqrt() / math.sqrt(200)
    exact = g.flatten(0, 1).double() @ (layer.weight_scale.detach().double()[:, None] * c)
    bound = bound + (2.0**-8 * exact.abs() if low else 1e-5)
    assert ((mean.flatten(0, 1) - exact).abs() <= bound).all()


@pytest.mark.parametrize("gradient", [None, "int8", LUQ(4)], ids=str)
@pytest.mark.parametrize("dtype", [*STORAGE, torch.float64], ids=str)
def test_shapes_and_types(gradient, dtype, generator):
    """Empty batches, one token, views, expanded gradients (of a sum), in the type of the layer."""
    layer = ak.nn.AskewLinear(20, 33, True, QuantConfig(forward="int8", gradient=gradient), dtype=dtype)
    x = torch.randn(4, 40, generator=generator).to(dtype)
    for part in (x[:, ::2], x[:0, :20], x[0, :20], x[:, :20].reshape(2, 2, 20), x[:20, :4].repeat(5, 1).t(),
                 x[:, :1].expand(4, 20)):  # fmt: skip
        leaf = part.detach().requires_grad_()
        y = layer(leaf)
        y.sum().backward()
        assert y.shape == (*part.shape[:-1], 33) and y.dtype == dtype
        assert leaf.grad.shape == part.shape and leaf.grad.dtype == dtype and leaf.grad.isfinite().all()
        again = layer(part.contiguous())
        assert torch.equal(y, again)


@pytest.mark.parametrize("dtype", [*STORAGE, torch.float64], ids=str)
def test_a_large_weight_is_decoded_in_panels(dtype, generator, monkeypatch):
    layer = ak.nn.AskewLinear(20, 33, True, QuantConfig(forward="int8"), dtype=dtype)
    x, g = torch.randn(9, 20, generator=generator).to(dtype), torch.randn(33, 9, generator=generator).to(dtype).t()
    wanted = gradients(layer, x, g)
    monkeypatch.setattr(lowbit, "PANEL", 3 * 33 + 1)  # seven panels of three columns, the last of two
    for got, other in zip(gradients(layer, x, g), wanted, strict=True):
        assert torch.allclose(got, other, rtol=1e-2 if dtype in STORAGE[1:] else 1e-5, atol=1e-6)


@pytest.mark.parametrize("forward", ["hard", "relaxed", "int8", "fp8"])
def test_luq_before_both_products(forward, generator):
    layer, plain = layer_of(forward=forward, gradient=LUQ(4)), layer_of(forward=forward)
    x, g = torch.randn(9, 20, generator=generator), torch.randn(9, 33, generator=generator)
    torch.manual_seed(5)
    rounded = ops.luq(g, 4, ops.draw_seed("cpu"))
    assert torch.equal(layer(x), plain(x)) and len(rounded.abs().unique()) <= 9
    for got, wanted in zip(gradients(layer, x, g), gradients(plain, x, rounded), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)
    assert layer(x).relu_().sum().backward() is None  # in place after the layer
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))


def test_luq_of_every_kind_of_layer(generator):
    for module, x in ((nn.Conv2d(3, 5, 3), torch.randn(2, 3, 8, 8)), (nn.Conv1d(3, 5, 3), torch.randn(2, 3, 8)),
                      (nn.Embedding(7, 5), torch.tensor([[1, 2], [3, 6]]))):  # fmt: skip
        model = ak.quantize_(nn.Sequential(module), QuantConfig(gradient=LUQ(3)), kinds=("conv", "embedding", "conv1d"))
        y = model(x)
        torch.manual_seed(2)
        y.backward(g := torch.randn(y.shape, generator=generator))
        got = model[0].weight.grad.clone()
        model.zero_grad()
        plain = ak.quantize_(nn.Sequential(copy_of(module)), QuantConfig(), kinds=("conv", "embedding", "conv1d"))
        torch.manual_seed(2)
        plain(x).backward(ops.luq(g, 3))
        assert torch.allclose(got, plain[0].weight.grad, atol=1e-6)


def copy_of(module):
    """The float layer with the same weights."""
    made = type(module)
    made = made(7, 5) if made is nn.Embedding else made(3, 5, 3)
    made.load_state_dict(module.state_dict(), strict=False)
    return made


@pytest.mark.parametrize("gradient", [LUQ(4), "int8"], ids=str)
def test_surroundings(gradient, generator):
    """torch.compile, torch.func, higher derivatives, deepcopy: as without, and reproducible."""
    layer, plain = layer_of(6, 6, forward="int8", gradient=gradient), layer_of(6, 6, forward="int8")
    x, v = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    leaf = x.clone().requires_grad_()
    g = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)[0]  # straight through; then rounded
    second = [torch.autograd.grad((g * v).sum(), leaf, retain_graph=True)[0] for _ in range(200)]
    w = layer.quantized_weight()
    wanted = 2 * (v @ w.t()) @ w
    assert (torch.stack(second).mean(0) - wanted).abs().max() < 0.1 * wanted.abs().max()
    _, tangent = torch.func.jvp(layer, (x,), (v,))
    assert torch.allclose(tangent, v @ layer.quantized_weight().t(), atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    g = torch.randn(3, 6, generator=generator)
    spread = plain.weight_scale.max() * 8 * g.abs().max()  # that of LUQ is as large as what it rounds
    got = gradients(compiled, x, g)
    assert (
        torch.allclose(compiled(x), plain(x), atol=1e-5) and (got[0] - gradients(plain, x, g)[0]).abs().max() < spread
    )
    found = [gradients(layer, x, g, seed) for seed in (1, 1, 2)]
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])


def test_configurations(generator):
    for gradient in (LUQ(4), LUQ(bits=2), "int8", None):
        config = QuantConfig(forward="int8", gradient=gradient)
        assert QuantConfig.from_json(config.to_json()) == config
        assert ("gradient" in config.to_dict()) == (gradient is not None)
    for match, call in {
        "gradient: 'int8' multiplies the levels that forward='int8' holds": lambda: QuantConfig(gradient="int8"),
        "gradient: expected None": lambda: QuantConfig(gradient="int4"),
        "bits: LUQ takes 2 to 6, got 7": lambda: LUQ(7),
        "gradient: expected 'luq'": lambda: QuantConfig.from_dict({"weight": Uniform(4).to_dict(), "gradient": {}}),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="gradient: expected None"):
        QuantConfig(gradient=4)


@pytest.mark.parametrize("gradient", [None, "int8", LUQ(5)], ids=str)
def test_learns(gradient):
    """What the fp32 forward learns: the loss of a small regression, within half of it and the noise."""
    losses = {}
    for forward, how in (("hard", None), ("int8", gradient)):
        torch.manual_seed(1)
        x = torch.randn(256, 20)
        y = torch.tanh(x @ torch.randn(20, 7) / 4)
        model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 7))
        ak.quantize_(model, QuantConfig(forward=forward, gradient=how))
        optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)
        annealing = ak.EpsilonAnnealing(optimizer, total=150)
        for _ in range(150):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            annealing.step()
        losses[forward] = float(loss.detach())
    assert losses["int8"] < 1.5 * losses["hard"] + 1e-3 and losses["hard"] < 0.1, losses


def test_what_multiplies(monkeypatch):
    """Without a kernel of ours bytes are multiplied by torch, unless its 16-bit sums would end early."""
    q, c = torch.full((20, 64), -128, dtype=torch.int8), torch.full((24, 64), 127, dtype=torch.int8)
    wanted = torch.full((20, 24), -128.0 * 127 * 64)
    for faster, right in ((False, True), (True, True), (True, False)):
        monkeypatch.setattr(lowbit, "_torch_is_faster", lambda faster=faster: faster)
        monkeypatch.setattr(lowbit, "_torch_multiplies_bytes", lambda right=right: right)
        if not right:
            monkeypatch.setattr(torch, "_int_mm", None)
        for weight, transposed in ((c, False), (c.t().contiguous(), True)):
            y = lowbit.level_product(q, torch.ones(20), weight, torch.ones(1), None, torch.float32, transposed)
            if faster or runtime._C is not None or torch.cpu._is_vnni_supported():
                assert torch.equal(y, wanted)


def test_what_stands_beside_levels_is_taken_in_any_float_type():
    """Strided, too; what is no float, has another shape or is missing is named."""
    q, sums = torch.ones(2, 3, dtype=torch.int8), torch.arange(6.0).reshape(2, 3)
    tokens, each = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    scaled = lambda s, w, b, dtype=torch.float32: ops.scaled_sums(sums, s, w, b, dtype)  # noqa: E731
    product = lambda s, w, b, dtype=torch.float32: ops.level_product(q, s, q[[0, 1, 0]], w, b, dtype)  # noqa: E731
    for call in (scaled, product):
        want = call(tokens, each, each)
        for kind in (torch.float16, torch.bfloat16, torch.float64):
            assert torch.equal(call(tokens.to(kind), each.to(kind), each.to(kind)), want)
        strided = [torch.stack([t, t], 1)[:, 0] for t in (tokens, each, each)]
        assert torch.equal(call(*strided), want)
        third = call(tokens.double() / 3, each, None, torch.float64)  # not rounded to float32
        torch.testing.assert_close(third, call(tokens, each, None, torch.float64) / 3, rtol=1e-15, atol=0)
        for name, arguments, error in (
            ("token_scale", (tokens.long(), each, None), TypeError), ("token_scale", (None, each, None), TypeError),
            ("scale", (tokens, None, None), TypeError), ("scale", (tokens, each.int(), None), TypeError),
            ("scale", (tokens, each[:2], None), ValueError), ("bias", (tokens, each, each.long()), TypeError),
            ("scale", (tokens, torch.tensor(1.0), None), ValueError),
            ("dtype", (tokens, each, None, torch.int32), TypeError),
            ("dtype", (tokens, each, None, "float32"), TypeError),
        ):  # fmt: skip
            with pytest.raises(error, match=f"^{name}: "):
                call(*arguments)
    assert torch.equal(ops.scaled_sums(sums.double(), tokens, each, None, torch.float32), scaled(tokens, each, None))
    x = torch.tensor([[0.3, -1.0, 2.0]])
    want = ops.stochastic_levels(x, each, 1)
    for factor in (each.half(), each.double(), torch.stack([each, each], 1)[:, 0]):
        assert all(map(torch.equal, ops.stochastic_levels(x, factor, 1), want))
    for factor, error in ((each.long(), TypeError), (2.0, TypeError), (each[:2], ValueError)):
        with pytest.raises(error, match="^factor: "):
            ops.stochastic_levels(x, factor, 1)
    with pytest.raises(TypeError, match="^dtype: "):
        ops.token_levels(x, "int8")
