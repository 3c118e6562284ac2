"""Contract: products of several inputs with packed weights, in float32 and with inputs in bfloat16.

1. bfloat16 inputs, and others that activations="bf16" rounds, are within the bound of ``ops.packed_linear`` of the
   float64 product of the rounded inputs, for every width, granularity, odd size and number of inputs, on each
   instruction set.
2. The same bits for any number of threads, and for an input alone and in a larger batch of the same kernel.
3. What the bfloat16 products cannot hold, inputs near the ends of the range and levels of more digits, is computed
   otherwise, within the same bound.
4. Models in bfloat16, under autocast, and of float32 with activations="bf16".
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from oracles import DTYPES, EPSILON, NF4, TINY, same_bits
from torch import nn

import askew_kernels as ak
from askew_kernels import ops, runtime
from askew_kernels.quant import FP4, Binary, Codebook, Ternary, Uniform, code_bits, pack_codes

FORMATS = [(Uniform(k), False) for k in range(2, 9)] + [
    (Uniform(5, narrow=True), False), (Uniform(8, signed=False), False), (Binary(), False), (Ternary(), False),
    (Ternary(), True), (FP4(), False), (Codebook(NF4), False),
]  # fmt: skip
# (rows, columns, groups; 0: one scale): tails of vectors, words, tiles; groups of 32, 64, 128 and odd ones; of 96 and
# 100, whose words end neither with sixteen nor with a tile
SHAPES = ((9, 129, 3), (33, 640, 20), (40, 512, 4), (66, 256, 4), (35, 2304, 0), (17, 5, 5), (3, 1, 1), (20, 2880, 30),
          (18, 2500, 25))  # fmt: skip


@pytest.fixture(params=["bf16", "avx512", "avx2"])
def instructions(request):
    """Products of pairs of bfloat16, panels of float32, and neither."""
    if runtime._C is None:
        pytest.skip("nothing is compiled")
    before = runtime.cpu_capability()
    try:
        name = "avx2" if request.param == "avx2" else "avx512"
        runtime._C.force_cpu_capability(name, bf16=request.param == "bf16")
        if (request.param == "bf16") != runtime._C.bfloat16_products():
            pytest.skip("needs AVX512_BF16")
    except ValueError:
        pytest.skip(f"needs {request.param}")
    try:
        yield request.param
    finally:
        runtime.force_cpu_capability(before)


def weights(grid, trits, n, cols, groups, generator):
    """Codes, scales and the weight in float64."""
    s = torch.rand(max(1, n * groups), generator=generator) + 0.1
    index = torch.randint(0, len(grid.levels), (n, cols), generator=generator, dtype=torch.uint8)
    level = torch.tensor(grid.levels)[index.long()].reshape(s.numel(), -1)
    return pack_codes(index, code_bits(grid, trits)), s, (s.reshape(-1, 1) * level).reshape(n, cols).double()


def off(y, x, weight, bias, dtype):
    """|y - exact| over the bound of ``ops.packed_linear``, at most: products with level and scale and cols sums, each
    rounded to float32, then once to the type of y."""
    exact, size = x.double() @ weight.t(), x.double().abs() @ weight.t().abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = (weight.shape[1] + 4) * 2.0**-24 * size + EPSILON[dtype] * exact.abs() + TINY[dtype]
    assert y.dtype == dtype and y.shape == exact.shape
    return float(((y.double() - exact).abs() / bound).amax()) if y.numel() else 0.0


@pytest.mark.parametrize(("grid", "trits"), FORMATS)
def test_near_the_float64_product(grid, trits, instructions, generator):
    for n, cols, groups in SHAPES:
        codes, s, weight = weights(grid, trits, n, cols, groups, generator)
        for batch in (1, 3, 4, 6, 8, 11, 13, 29):
            given = torch.randn(batch, cols, generator=generator)
            bias = torch.randn(n, generator=generator)
            x, b = given.bfloat16(), bias.bfloat16()
            y = ops.packed_linear(x, codes, s, grid, code_bits(grid, trits), b)
            assert off(y, x, weight, b, torch.bfloat16) <= 1.01, (n, cols, groups, batch)
            y = ops.packed_linear(given, codes, s, grid, code_bits(grid, trits), bias, "bf16")
            assert off(y, x, weight, bias, torch.float32) <= 1.01, (n, cols, groups, batch)
            if groups not in (0, 20, 25, 30) or batch not in (1, 6, 13, 29):
                continue
            y = ops.packed_linear(given, codes, s, grid, code_bits(grid, trits), None)
            assert off(y, given, weight, None, torch.float32) <= 1.01, (n, cols, groups, batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_inputs_than_a_pass_takes(dtype, instructions, generator):
    """Above 480 inputs, a remainder of fewer than 12; empty ones and inputs of other strides."""
    grid = Uniform(4)
    codes, s, weight = weights(grid, False, 50, 96, 3, generator)
    for batch in (480, 489, 492, 970):
        x = torch.randn(batch, 96, generator=generator).to(dtype)
        for kind, inputs in (("float", x), ("bf16", x.bfloat16())):
            y = ops.packed_linear(x, codes, s, grid, 4, None, kind)
            assert off(y, inputs, weight, None, dtype) <= 1.01
            assert same_bits(ops.packed_linear(x.t().contiguous().t(), codes, s, grid, 4, None, kind), y)
            wide = torch.cat([x, x], 1)[:, :96]
            assert same_bits(ops.packed_linear(wide, codes, s, grid, 4, None, kind), y)
    for kind in ("float", "bf16"):
        assert ops.packed_linear(x[:0], codes, s, grid, 4, None, kind).shape == (0, 50)
        assert ops.packed_linear(x[:20].reshape(4, 5, 96), codes, s, grid, 4, None, kind).shape == (4, 5, 50)


@pytest.mark.parametrize("kind", ["float", "bf16"])
def test_threads_change_no_bits(kind, instructions, generator):
    """Threads share rows of the weight."""
    if instructions == "avx2":
        pytest.skip("from 96 inputs on torch's own product")
    threads = torch.get_num_threads()
    try:
        for grid, trits in ((Uniform(4), False), (Uniform(7), False), (Ternary(), True)):
            codes, s, _ = weights(grid, trits, 200, 640, 20, generator)
            for batch in (1, 4, 16, 40, 130, 400):
                x, found = torch.randn(batch, 640, generator=generator), []
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    found.append(ops.packed_linear(x, codes, s, grid, code_bits(grid, trits), None, kind))
                assert same_bits(found[0], found[1]) and same_bits(found[0], found[2]), (grid, batch)
                if batch in (16, 40):  # an input's sums do not depend on those beside it
                    rows = torch.randperm(batch, generator=generator)
                    turned = ops.packed_linear(x[rows], codes, s, grid, code_bits(grid, trits), None, kind)
                    assert same_bits(turned, found[0][rows])
    finally:
        torch.set_num_threads(threads)


def test_ends_of_the_range(instructions, generator):
    """Sums that overflow before they are scaled, products that are subnormal, inf and NaN."""
    grid = Uniform(4)
    codes, s, weight = weights(grid, False, 40, 256, 2, generator)
    for batch in (4, 20):
        x = torch.randn(batch, 256, generator=generator)
        for factor in (2.0**120, 2.0**-126, 2.0**-140):
            for dtype, given in ((torch.bfloat16, (x * factor).bfloat16()), (torch.float32, x * factor)):
                scale = s * 2.0**-20 if factor > 1 else s * 2.0**20
                y = ops.packed_linear(given, codes, scale, grid, 4, None)
                exact = weight * (2.0**-20 if factor > 1 else 2.0**20)
                assert y.isfinite().all() and off(y, given, exact, None, dtype) <= 1.01, (factor, dtype)
        for column in (0, 1, 16, 33):  # one that is large, in each half of a pair
            for dtype in (torch.bfloat16, torch.float32):
                given = torch.randn(batch, 256, generator=generator).to(dtype)
                given[1, column] = 2.0**126
                y = ops.packed_linear(given, codes, s * 2.0**-20, grid, 4, None)
                assert y.isfinite().all() and off(y, given, weight * 2.0**-20, None, dtype) <= 1.01, (column, dtype)
        x[1, 3], x[2, 5] = math.inf, math.nan
        for kind in ("float", "bf16"):
            y = ops.packed_linear(x, codes, s, grid, 4, None, kind)
            assert y[3:].isfinite().all() and y[0].isfinite().all() and y[2].isnan().all()
            level = weight[:, 3]
            assert (y[1][level > 0] == math.inf).all() and (y[1][level < 0] == -math.inf).all()
            assert y[1][level == 0].isnan().all()


def quantized(dtype=torch.float32):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40, bias=False), nn.Embedding(3, 4))
    model = ak.quantize_(model[:3], ak.QuantConfig(Uniform(4), "absmax", "per_group", 32)).to(dtype).eval()
    return ak.hard_quantize_(model)


def test_models_in_bfloat16_and_under_autocast():
    """Outputs are bfloat16, of products that are rounded once: as near float64 as that allows."""
    packed = ak.pack_(quantized())
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    weight, bias = packed[0].dequantize().double(), packed[0].bias.detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = packed[0](x)
    assert off(y, x.bfloat16(), weight, bias.bfloat16(), torch.bfloat16) <= 1.01
    half = copy.deepcopy(packed).to(torch.bfloat16)
    with torch.no_grad():
        assert same_bits(half[0](x.bfloat16()), y) and half(x.bfloat16()).dtype == torch.bfloat16


def test_rounded_activations_of_a_float_model():
    x = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(2))
    exact, model = ak.pack_(quantized()), ak.pack_(quantized(), activations="bf16")
    assert "activations=bf16" in repr(model[0]) and [m.activations for m in (model[0], model[2])] == ["bf16"] * 2
    with torch.no_grad():
        want, y = exact(x), model(x)
        assert y.dtype == torch.float32
        assert 1e-5 < float((y - want).norm() / want.norm()) < 2.0**-8
        y = model[0](x)
        rounded = exact[0](x.bfloat16().float())
        torch.testing.assert_close(y, rounded, rtol=2e-5, atol=2e-5)
        with runtime.use_backend("reference"):
            torch.testing.assert_close(model[0](x), rounded, rtol=2e-5, atol=2e-5)
    leaf = x.clone().requires_grad_()
    other = x.clone().requires_grad_()
    seen = model[0](leaf)
    assert torch.equal(seen, y)  # rounded as without a gradient, which is that of the unpacked weight
    seen.sum().backward()
    exact[0](other).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, other.grad)
    codes = ak.pack_(quantized(), activations="bf16")  # a lookup of levels is no obstacle
    assert codes[0].activations == "bf16"
    ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Linear(8, 8)), ak.QuantConfig(Codebook(NF4)))),
             activations="bf16")  # fmt: skip
    arguments = exact[0].weight_codes, exact[0].weight_scale, Uniform(4), 4, None, "bf16"
    leaf = x[0].clone().requires_grad_()
    ops.packed_linear(leaf, *arguments).sum().backward()  # straight through the rounding
    torch.testing.assert_close(leaf.grad, exact[0].dequantize().sum(0).expand_as(leaf))
    with pytest.raises(NotImplementedError, match='packed_linear_bf16.*"float"'):
        torch.func.jvp(lambda v: ops.packed_linear(v, *arguments), (x[0],), (x[0],))
