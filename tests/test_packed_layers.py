"""Contract: packed layers, packed files, and what the command line says of them.

1. ``pack_`` keeps every weight, bit for bit, in every storage type; it changes the model wholly or not at all, and its
   errors name the layer.
2. ``packed_linear`` is within a derived bound of the float64 product for every format, storage type, batch and
   tail; ``packed_dequantize`` gives the weight itself.
3. ``load_packed(save_packed(m))`` is m: codes, scales, float tensors, shared tensors, also into a meta-device model. A
   damaged file, or one that does not fit, is a ValueError that names it, and the model stays as it was.
4. Digits at 4 bits and ternary: trained, packed, saved, loaded in a fresh process, the same predictions.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import DTYPES, EPSILON, NF4, TINY, same_bits
from torch import nn

import askew_kernels as ak
from askew_kernels import command, ops, reference, runtime
from askew_kernels.__main__ import main
from askew_kernels.deploy import convert, tensorfile
from askew_kernels.deploy.files import KEY, PENDING, PackedFile, PackedFileError
from askew_kernels.nn import PackedConv2d, PackedLinear
from askew_kernels.quant import Binary, Codebook, Ternary, Uniform, code_bits, pack_codes
from askew_kernels.quant.packing import row_bytes

pytest.importorskip("safetensors")
CONFIGS = {
    "int4 channel": ak.QuantConfig(Uniform(4)),
    "int4 group": ak.QuantConfig(Uniform(4), granularity="per_group", group_size=4, scale="absmax"),
    "int3 tensor": ak.QuantConfig(Uniform(3), granularity="per_tensor"),
    "int8": ak.QuantConfig(Uniform(8)),
    "binary": ak.QuantConfig(Binary(), scale="mean"),
    "ternary": ak.QuantConfig(Ternary(), scale="mean"),
    "nf4": ak.QuantConfig(Codebook(NF4), scale="absmax"),
}


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, padding="same", bias=False), nn.Flatten(), nn.Linear(8 * 16, 12),
        nn.ReLU(), nn.Linear(12, 5, bias=False),
    )  # fmt: skip


def quantized(config, dtype=torch.float32, seed=0):
    model = ak.quantize_(small(seed), config).to(dtype).eval()
    return ak.hard_quantize_(model)


def picture(dtype=torch.float32, batch=3):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


# ---- pack_ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_weights_are_the_trained_ones(name, dtype):
    model = quantized(CONFIGS[name], dtype)
    weights = {n: m.weight.detach().clone() for n, m in ak.nn.quantized_layers(model).items()}
    biases = {n: m.bias for n, m in ak.nn.quantized_layers(model).items()}
    assert ak.pack_(model, trits=True) is model
    packed = ak.nn.packed_layers(model)
    assert packed.keys() == weights.keys()
    assert [type(m) for m in packed.values()] == [PackedConv2d, PackedConv2d, PackedLinear, PackedLinear]
    for n, m in packed.items():
        assert same_bits(m.dequantize(), weights[n]) and m.bias is biases[n]
    unpacked = ak.unpack_(copy.deepcopy(model))
    assert type(unpacked[0]) is nn.Conv2d and same_bits(unpacked[5].weight.detach(), weights["5"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_is_that_of_the_trained_model(name):
    """Float32 sums in another order."""
    for batch in (1, 5, 40, 130):
        model, x = quantized(CONFIGS[name]), picture(batch=batch)
        with torch.no_grad():
            want = model(x)
            got = ak.pack_(model)(x)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_int8_activations():
    model, x = quantized(CONFIGS["int4 group"]), picture(batch=20)
    with torch.no_grad():
        want = model(x)
        got = ak.pack_(model, activations="int8")(x)
    assert model[5].activations == "int8" and "activations=int8" in repr(model[5])
    error = float((got - want).norm() / want.norm())
    assert 1e-4 < error < 0.03  # not the float product, and near it
    with pytest.raises(ValueError, match=r'^0: activations: "int8" needs a grid of integer levels'):
        ak.pack_(quantized(CONFIGS["nf4"]), activations="int8")
    with pytest.raises(ValueError, match="^0: activations: expected .float., .bf16. or .int8., got 'int4'"):
        ak.pack_(quantized(CONFIGS["int8"]), activations="int4")


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)},
    "same": {"kernel_size": 4, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid", "bias": False},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
    "circular": {"kernel_size": 3, "padding": (0, 2), "padding_mode": "circular"},
    "point": {"kernel_size": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_from_the_codes(name, dtype, monkeypatch):
    """Few output positions, all at once and line by line, as exact as a float32 sum; many unpack the weight."""
    torch.manual_seed(5)
    conv = nn.Conv2d(6, 10, **CONVOLUTIONS[name]).to(dtype)
    layer = ak.pack_(ak.quantize_(nn.Sequential(conv), CONFIGS["int4 channel"]), force=True)[0]
    calls = []
    monkeypatch.setitem(ak.runtime._convolution, "positions", 96)
    product = PackedConv2d._product
    monkeypatch.setattr(PackedConv2d, "_product", lambda self, x, b: calls.append(len(x)) or product(self, x, b))
    x = torch.randn(2, 6, 7, 6).to(dtype)
    weight = ops.packed_dequantize(layer.weight_codes, layer.weight_scale, layer.config.weight, 4, layer.cols)
    exact_layer = copy.deepcopy(layer).to_float().double()  # which shares the bias
    exact_layer.weight = nn.Parameter(weight.double().reshape(layer.shape))
    with torch.no_grad():
        exact = exact_layer(x.double())
        sizes = copy.deepcopy(exact_layer)
        sizes.weight.abs_()
        if sizes.bias is not None:
            sizes.bias.abs_()
        bound = (layer.cols + 3) * 2.0**-24 * sizes(x.double().abs()) + EPSILON[dtype] * exact.abs() + TINY[dtype]
        for patches, batch in ((1 << 22, x), (1, x), (1 << 22, x.to(memory_format=torch.channels_last))):
            monkeypatch.setattr(ak.nn.kinds, "PATCHES", patches)
            y = layer(batch)
            assert y.dtype == dtype and y.shape == exact.shape and ((y.double() - exact).abs() <= bound).all()
        positions = exact.numel() // exact.shape[1]
        assert positions < 96 and sum(calls) == 3 * positions and len(calls) == 2 + exact.shape[2]
        assert torch.equal(layer(x[0]), layer(x[:1])[0])
        assert layer(batch).is_contiguous(memory_format=torch.channels_last)
        del calls[:]
        many = x.repeat(96, 1, 1, 1)
        assert torch.equal(layer(many), layer.to_float()(many)) and not calls
        if name == "plain":
            with pytest.raises(RuntimeError, match="Kernel size can.t be greater"):
                layer(torch.zeros(1, 6, 2, 2, dtype=dtype))
            with pytest.raises(RuntimeError, match="channels"):
                layer(torch.zeros(1, 5, 7, 6, dtype=dtype))
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None and not calls


def test_int8_convolutions():
    """Each patch is rounded by its own scale: near the float convolution, at any number of positions; groups unpack."""
    for batch in (1, 40):
        model, x = quantized(CONFIGS["int4 channel"]), picture(batch=batch)
        with torch.no_grad():
            want = model[0](x)
            grouped = model[3](model[:3](x))
            ak.pack_(model, activations="int8")
            got = model[0](x)
            error = float((got - want).norm() / want.norm())
            assert 1e-4 < error < 0.02 and "activations=int8" in repr(model[0])
            assert torch.equal(model[3](model[:3](x)), model[3].to_float()(model[:3](x))) and grouped.shape


def test_autocast_and_gradients_of_the_input():
    model, x = quantized(CONFIGS["int4 channel"]), picture(batch=40)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = model(x)
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    ak.pack_(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=0.02, atol=0.02)  # bfloat16 weights were rounded, s c is not
    other = x.clone().requires_grad_()
    model(other).square().sum().backward()
    assert torch.equal(other.grad, leaf.grad)


def test_a_cast_keeps_codes_and_scales():
    model = ak.pack_(quantized(CONFIGS["int4 channel"]))
    before = state_of(model)
    model.to(torch.bfloat16)
    assert all(same_bits(before[k], v) for k, v in model.state_dict().items() if "weight_" in k)
    assert model(picture(torch.bfloat16)).dtype == torch.bfloat16 and model[5].dequantize().dtype == torch.bfloat16


def test_errors_name_the_layer_and_change_nothing():
    model = ak.quantize_(small(), CONFIGS["int4 channel"])
    before = list(model)
    with pytest.raises(ValueError, match=r"^0: weight: \d+ of 288 weights are not on their levels; .*force=True"):
        ak.pack_(model)
    assert list(model) == before
    ak.hard_quantize_(model)
    with torch.no_grad():
        model[5].weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"^5: w: 1 of 1536 weights are NaN"):
        ak.pack_(model, force=True)
    assert list(model) == before
    inclusive = ak.hard_quantize_(ak.quantize_(small(), {"7": ak.QuantConfig(Uniform(4, inclusive=True))}))
    with pytest.raises(ValueError, match=r"^7: grid: .*17 levels and cannot be packed"):
        ak.pack_(inclusive)
    with pytest.raises(ValueError, match="^model: has no"):
        ak.pack_(small())
    with pytest.raises(ValueError, match=r"^0: scale_dtype: torch.float16 would change"):
        ak.pack_(quantized(CONFIGS["int4 channel"]), scale_dtype=torch.float16)


def test_force_rounds():
    model = ak.quantize_(small(), CONFIGS["int4 channel"])
    want = {n: m.quantized_weight() for n, m in ak.nn.quantized_layers(model).items()}
    ak.pack_(model, force=True)
    assert all(same_bits(m.dequantize(), want[n]) for n, m in ak.nn.packed_layers(model).items())
    half = ak.pack_(ak.quantize_(small(), CONFIGS["int4 channel"]), force=True, scale_dtype=torch.float16)
    assert half[0].weight_scale.dtype == torch.float16


def test_shared_layers_and_weights_stay_shared(tmp_path):
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight

    def build(first=one, second=two):
        return nn.ModuleDict({"a": first, "again": first, "b": second})

    model = ak.pack_(ak.hard_quantize_(ak.quantize_(build(), CONFIGS["int4 channel"])))
    assert model["a"] is model["again"] and model["a"].weight_codes is model["b"].weight_codes
    path = tmp_path / "m.safetensors"
    ak.save_packed(model, path)
    assert len(PackedFile(path).stored) == 4  # codes, scales and two biases, once
    loaded = ak.load_packed(path, build(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert loaded["a"] is loaded["again"] and same_state(state_of(loaded), state_of(model))


# ---- packed_linear --------------------------------------------------------------------------------------------------

FORMATS = [(Uniform(k), False) for k in range(2, 9)] + [
    (Binary(), False), (Ternary(), False), (Ternary(), True), (Codebook(NF4), False), (Codebook([-1.0, 0.2, 2]), False),
]  # fmt: skip


LINEAR_SHAPES = (  # (rows, columns, groups): tails of blocks and bands, groups of 32 to 256 and odd ones
    (3, 1, 1), (5, 7, 1), (9, 129, 3), (4, 128, 4), (2, 64, 0), (1, 0, 1), (0, 8, 1), (37, 512, 4), (66, 640, 20),
    (17, 1056, 33), (7, 512, 2), (5, 120, 6),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "trits"), FORMATS)
def test_packed_linear_is_near_the_float64_product(grid, trits, dtype, backend, generator):
    bits = code_bits(grid, trits)
    for n, cols, groups in LINEAR_SHAPES:
        s = torch.rand(max(1, n * groups), generator=generator) + 0.1 if groups else torch.tensor(0.3)
        s = s if n else torch.ones(1)
        index = torch.randint(0, len(grid.levels), (n, cols), generator=generator, dtype=torch.uint8)
        codes = pack_codes(index, bits)
        level = torch.tensor(grid.levels)[index.long()].reshape(s.numel(), -1)
        weight = (s.reshape(-1, 1) * level).reshape(n, cols)
        assert same_bits(ops.packed_dequantize(codes, s, grid, bits, cols, dtype), weight.to(dtype))
        for shape, bias in (((cols,), None), ((1, cols), True), ((2, 7, cols), None), ((0, cols), True)):
            x = torch.randn(shape, generator=generator).to(dtype)
            b = torch.randn(n, generator=generator).to(dtype) if bias else None
            exact = x.double() @ weight.double().t() + (0 if b is None else b.double())
            size = x.double().abs() @ weight.double().abs().t() + (0 if b is None else b.double().abs())
            # products with level and scale and cols sums, each rounded to float32, then once to the storage type
            bound = (cols + 4) * 2.0**-24 * size + EPSILON[dtype] * exact.abs() + TINY[dtype]
            y = ops.packed_linear(x, codes, s, grid, bits, b)
            assert y.dtype == dtype and y.shape == exact.shape
            assert ((y.double() - exact).abs() <= 1.01 * bound).all(), (n, cols, groups)
            if isinstance(grid, Codebook):
                continue
            q, token = reference.int8_tokens(x.float().reshape(math.prod(shape[:-1]), cols))
            y = ops.packed_linear(x, codes, s, grid, bits, b, "int8")
            exact = token.double()[:, None] * (q.double() @ weight.double().t())
            size = token.double()[:, None] * (q.double().abs() @ weight.double().abs().t())
            if b is not None:
                exact, size = exact + b.double(), size + b.double().abs()
            # integer sums are exact; lo times the sum of q, the groups' sums and three products are rounded
            reach = 2 * max(abs(grid.levels[0]), 1) * token.double()[:, None] * q.double().abs().sum(1, True) * s.max()
            bound = (groups + 6) * 2.0**-23 * (size + reach) + EPSILON[dtype] * exact.abs() + TINY[dtype]
            assert y.dtype == dtype and y.shape == (*shape[:-1], n)
            assert ((y.double().reshape(exact.shape) - exact).abs() <= 1.01 * bound).all(), (n, cols, groups)


@pytest.mark.parametrize(("grid", "trits"), FORMATS)
def test_every_instruction_set_and_number_of_threads(grid, trits, generator):
    """The same bits for any number of threads; int8 with a scale for each row the same bits on every instruction set;
    the rest as near each other as float32 sums in another order are."""
    if runtime._C is None:
        pytest.skip("nothing is compiled")
    bits, before, threads = code_bits(grid, trits), runtime.cpu_capability(), torch.get_num_threads()
    try:
        for cols, groups in ((1056, 1), (1024, 8), (321, 1), (640, 5), (2560, 2)):
            index = torch.randint(0, len(grid.levels), (130, cols), generator=generator, dtype=torch.uint8)
            codes, s = pack_codes(index, bits), torch.rand(130 * groups, generator=generator) + 0.1
            for batch in (1, 2, 13, 100):
                x = torch.randn(batch, cols, generator=generator)
                found = {}
                for name, count in (("baseline", 1), ("avx2", 1), ("avx512", 1), ("avx512", 3)):
                    with contextlib.suppress(ValueError):
                        runtime.force_cpu_capability(name)
                        torch.set_num_threads(count)
                        kinds = ["float"] + ["int8"] * (not isinstance(grid, Codebook))
                        found[name, count] = [ops.packed_linear(x, codes, s, grid, bits, None, k) for k in kinds]
                first = next(iter(found.values()))
                for (name, count), results in found.items():
                    for kind, a, b in zip(("float", "int8"), first, results, strict=False):
                        if kind == "int8" and groups == 1:
                            assert same_bits(a, b), (name, batch)
                        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
                    if count == 3 and batch < 96:  # beyond, torch's product
                        assert all(map(same_bits, results, found[name, 1]))
    finally:
        runtime.force_cpu_capability(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("grid", "trits"), [f for f in FORMATS if not isinstance(f[0], Codebook)])
def test_int8_sums_of_the_largest_products(grid, trits, sign, backend):
    """Codes and inputs at the ends of their ranges, where 16-bit sums overflow first; the integer sums are exact."""
    bits, top = code_bits(grid, trits), len(grid.levels) - 1
    for cols, groups in ((4096, 1), (4096, 32), (1280, 4), (1184, 1)):
        index = torch.full((5, cols), top, dtype=torch.uint8)
        index[1], index[2, ::2] = 0, 0
        codes, s = pack_codes(index, bits), torch.ones(5 * groups)
        level = torch.tensor(grid.levels, dtype=torch.float64)[index.long()].sum(1)
        for batch in (1, 2, 3, 9):
            y = ops.packed_linear(torch.full((batch, cols), sign * 127.0), codes, s, grid, bits, None, "int8")
            expected = (sign * 127 * level).expand(batch, 5)
            # one rounding of each group's sum and of the sums' sums, and of lo times the sum of the inputs
            bound = (groups + 4) * 2.0**-23 * 127 * cols * 2 * max(map(abs, grid.levels))
            assert ((y.double() - expected).abs() <= bound).all(), (cols, groups, batch)


@pytest.mark.parametrize(("grid", "trits"), [*FORMATS, *((Uniform(k, narrow=True), False) for k in (2, 3, 4, 6, 8))])
def test_codes_without_a_level_count_as_the_last(grid, trits, backend, generator):
    """Any bytes: what every product makes of them is what ``packed_dequantize`` does. Files with such are refused.

    The inputs are integers up to 127, their own int8 codes: sums of 640 products with integer levels stay below 2^24,
    so that float32 holds them and equality is asked for.
    """
    bits = code_bits(grid, trits)
    cols = 640
    codes = torch.randint(0, 256, (8, row_bytes(cols, bits)), dtype=torch.uint8, generator=generator)
    weight = ops.packed_dequantize(codes, torch.ones(8), grid, bits, cols, torch.float32).double()
    assert set(weight.unique().tolist()) <= set(torch.tensor(grid.levels).double().tolist())
    for batch in (1, 2, 5):
        x = torch.randint(-127, 128, (batch, cols), generator=generator).float()
        x[:, 3] = 127
        expected = x.double() @ weight.t()
        y = ops.packed_linear(x, codes, torch.ones(8), grid, bits).double()
        if isinstance(grid, Codebook):  # cols rounded products and sums
            bound = (cols + 4) * 2.0**-24 * (x.double().abs() @ weight.abs().t())
            assert ((y - expected).abs() <= bound).all()
        else:
            assert torch.equal(y, expected)
            y = ops.packed_linear(x, codes, torch.ones(8), grid, bits, None, "int8").double()
            assert torch.equal(y, expected)


def test_int8_tokens_that_are_not_finite_or_all_zero():
    codes, s, grid = torch.full((3, 4), 0x2F, dtype=torch.uint8), torch.ones(3), Uniform(4)
    x = torch.ones(5, 8)
    x[0, 2], x[1, 3], x[2], x[3] = math.inf, math.nan, 0, 1e-45
    y = ops.packed_linear(x, codes, s, grid, 4, None, "int8")
    assert y[:2].isnan().all() and (y[2] == 0).all() and y[3:].isfinite().all()
    with pytest.raises(ValueError, match="^activations: sums of"):
        ops.packed_linear(torch.ones(1, 2**18), torch.zeros(1, 2**18, dtype=torch.uint8), s[:1], Uniform(8), 8, None,
                          "int8")  # fmt: skip


def test_packed_linear_names_bad_arguments():
    x, s, grid = torch.ones(2, 8), torch.ones(3), Uniform(4)
    codes = torch.zeros(3, 4, dtype=torch.uint8)
    for message, arguments in {
        "^codes: expected 4 bytes a row": (x, codes[:, :3].contiguous(), s, grid, 4),
        "^codes: expected a uint8 tensor": (x, codes.int(), s, grid, 4),
        "^scale: expected 1, 3 or 3": (x, codes, torch.ones(2), grid, 4),
        "^bits: ": (x, codes, s, grid, 9),
        "^bias: ": (x, codes, s, grid, 4, torch.ones(2)),
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.packed_linear(*arguments)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = ak.pack_(quantized(CONFIGS["int4 group"]))
    path = tmp_path / "model.safetensors"
    ak.save_packed(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]  # no temporary left
    return model, path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_is_the_saved_one(name, tmp_path):
    model = ak.pack_(quantized(CONFIGS[name]), trits=True)
    path = tmp_path / "model.safetensors"
    ak.save_packed(model, path)
    with torch.device("meta"):
        empty = small()
    for build in (small(7), empty, ak.quantize_(small(7), CONFIGS[name]), ak.pack_(quantized(CONFIGS[name], seed=7))):
        loaded = ak.load_packed(path, build.eval())
        assert loaded is build and same_state(state_of(loaded), state_of(model))
        with torch.no_grad():
            assert same_bits(loaded(picture()), model(picture()))
    assert all(p.requires_grad for p in loaded.parameters())


def test_names_like_the_mark_of_a_pending_checksum(tmp_path):
    def build():
        torch.manual_seed(1)
        return nn.ModuleDict({PENDING: nn.Linear(8, 4), "checksum": nn.Linear(8, 4)})

    model = ak.pack_(ak.quantize_(build(), CONFIGS["int8"]), force=True)
    ak.save_packed(model, tmp_path / "m.safetensors")
    assert same_state(ak.load_packed(tmp_path / "m.safetensors", build()).state_dict(), model.state_dict())


def test_plain_state_dicts_load_too(saved):
    model, _ = saved
    other = ak.pack_(quantized(CONFIGS["int4 group"], seed=5))
    other.load_state_dict(model.state_dict())
    assert same_state(state_of(other), state_of(model))


BAD_TARGETS = {
    "no such layer": (lambda m: nn.Sequential(*list(m)[:5]), "layer 5: the model has no such layer"),
    "shape": (lambda m: m.__setitem__(5, nn.Linear(64, 12)) or m, r"layer 5: expected a weight of shape \(12, 64\)"),
    "kind": (lambda m: m.__setitem__(5, nn.ReLU()) or m, "layer 5: expected Linear in the model, got ReLU"),
    "bias": (lambda m: m.__setitem__(7, nn.Linear(12, 5)) or m, "layer 7: only the model has a bias"),
    "geometry": (lambda m: setattr(m[0], "stride", (1, 1)) or m, "layer 0: geometry"),
    "grid": (lambda m: ak.quantize_(m, {"5": CONFIGS["int8"]}), "layer 5: grid: expected Uniform.bits=8"),
    "missing": (lambda m: m.append(nn.Linear(5, 5)), "the file lacks 8.bias, 8.weight"),
    "surplus": (lambda m: m.__setitem__(1, nn.Identity()) or m, "the model lacks 1.bias"),
}


@pytest.mark.parametrize("why", BAD_TARGETS)
def test_a_file_that_does_not_fit_changes_nothing(why, saved):
    change, message = BAD_TARGETS[why]
    target = change(small(9))
    children, before = list(target), state_of(target)
    with pytest.raises(PackedFileError, match=message):
        ak.load_packed(saved[1], target)
    assert list(target) == children and same_state(state_of(target), before)


def rewritten(path, change):
    """The file with its metadata changed and the header's length corrected."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    document = json.loads(header["__metadata__"][KEY])
    change(document, header)
    header["__metadata__"][KEY] = json.dumps(document)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


BAD_DOCUMENTS = {
    "version": (lambda d, h: d.update(version=2), "format version 2; this release reads version 1"),
    "checksum": (lambda d, h: d.update(checksum=1), "checksum does not fit"),
    "layers": (lambda d, h: d.update(layers=[]), "damaged metadata"),
    "no layers": (lambda d, h: d.pop("layers"), "damaged metadata"),
    "alias": (lambda d, h: d["aliases"].update(x="nowhere"), "damaged metadata"),
    "no metadata": (lambda d, h: h["__metadata__"].update(format="x"), "checksum|metadata"),
    "grid": (lambda d, h: d["layers"]["5"]["config"]["weight"].update(bits=9), "layer 5: bits"),
    "inclusive": (lambda d, h: d["layers"]["5"]["config"]["weight"].update(inclusive=True), "layer 5: grid"),
    "shape": (lambda d, h: d["layers"]["5"].update(shape=[12, 2**41]), "layer 5: shape"),
    "huge": (lambda d, h: d["layers"]["5"].update(shape=[2**39, 2**39]), "layer 5: "),
    "kind": (lambda d, h: d["layers"]["5"].update(kind="pickle"), "layer 5: kind"),
    "dtype": (lambda d, h: d["layers"]["5"].update(dtype="load"), "layer 5: dtype"),
    "gone": (lambda d, h: d["layers"].update(x=d["layers"]["5"]), "layer x: 'x.weight_codes' is missing"),
    "group": (lambda d, h: d["layers"]["5"]["config"].update(group_size=5), "layer 5: group_size"),
}


@pytest.mark.parametrize("why", BAD_DOCUMENTS)
def test_an_edited_header(why, saved):
    change, message = BAD_DOCUMENTS[why]
    target = small(9)
    before = state_of(target)
    rewritten(saved[1], change)
    verify = why in ("checksum", "version")  # without it the other checks must find it
    if why == "no metadata":
        ak.load_packed(saved[1], target, verify=False)  # an unknown entry is no harm
        return
    with pytest.raises(PackedFileError, match=message):
        ak.load_packed(saved[1], target, verify=verify)
    assert same_state(state_of(target), before)


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_never_crash(data, saved, tmp_path):
    original = saved[1].read_bytes()
    damaged = bytearray(original)
    header = 8 + int.from_bytes(original[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.one_of(st.integers(0, len(damaged) - 1), st.integers(0, header)))
        damaged[place] ^= data.draw(st.integers(1, 255))
    damaged = damaged[: data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))]
    path = tmp_path / "damaged.safetensors"
    path.unlink(missing_ok=True)  # never written through a mapping
    path.write_bytes(damaged)
    verify = data.draw(st.booleans())
    target = small(9)
    before = state_of(target)
    try:
        ak.load_packed(path, target, verify=verify)
    except PackedFileError as error:
        assert str(error).startswith(str(path))
        assert same_state(state_of(target), before)
    else:
        assert not verify or bytes(damaged) == original or same_state(state_of(target), state_of(saved[0]))


def test_saving_what_cannot_be_saved(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("old")
    with pytest.raises(PackedFileError, match="0 is not packed; call hard_quantize_"):
        ak.save_packed(quantized(CONFIGS["int8"]), path)
    with pytest.raises(PackedFileError, match="has no packed layers"):
        ak.save_packed(small(), path)
    with pytest.raises(PackedFileError, match="cannot be written"):
        ak.save_packed(ak.pack_(quantized(CONFIGS["int8"])), tmp_path / "nowhere" / "m.safetensors")
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError):
        ak.load_packed(tmp_path / "absent", small())
    with pytest.raises(PackedFileError, match="not a whole safetensors file"):
        ak.load_packed(path, small())


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        ak.save_packed(model, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("config", "factor"), [
    (ak.QuantConfig(Uniform(4), scale="absmax", granularity="per_group", group_size=128), 7.5),
    (ak.QuantConfig(Ternary(), scale="mean"), 15), (ak.QuantConfig(Binary(), scale="mean"), 28),
])  # fmt: skip
def test_the_file_is_small(config, factor, tmp_path):
    model = ak.quantize_(nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False)), config)
    path = tmp_path / "m.safetensors"
    ak.save_packed(ak.pack_(model, force=True), path)
    assert path.stat().st_size * factor <= 2 * 4 * 1024**2


# ---- inspect and convert --------------------------------------------------------------------------------------------


def test_inspect_reports_sizes_and_errors(saved, capsys):
    model = ak.quantize_(small(), CONFIGS["int4 group"])
    before = ak.inspect(model, picture())
    weight, w_hat = model[5].weight.detach(), model[5].quantized_weight()
    row = before.layers[2]
    assert row.name == "5" and row.weights == 1536 and row.float_bytes == 4 * 1536
    assert row.bytes == 1536 // 2 + 4 * 1536 // 4
    assert row.error == pytest.approx(float((weight - w_hat).norm() / weight.norm()), rel=1e-6)
    assert all(0 < r.output_error < 0.3 for r in before.layers)
    hard = ak.inspect(ak.hard_quantize_(model), picture())
    assert all(r.error == 0 and r.output_error == 0 for r in hard.layers)
    packed = ak.inspect(saved[0])
    assert [r.bytes for r in packed.layers] == [r.bytes for r in before.layers]
    assert main(["inspect", str(saved[1]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [r["bytes"] for r in document["layers"]] == [r.bytes for r in packed.layers]
    assert document["other_bytes"] == packed.other_bytes
    assert main(["inspect", str(saved[1])]) == 0 and "uniform 4" in capsys.readouterr().out
    from safetensors.torch import save_file

    original = ak.quantize_(small(), CONFIGS["int4 group"])  # what `saved` was made from
    originals = saved[1].with_name("original.safetensors")
    save_file(
        {f"{n}.weight": m.weight.detach().clone() for n, m in ak.nn.quantized_layers(original).items()}, originals
    )
    arguments = ["inspect", str(saved[1]), "--json", "--original", str(originals)]
    plot = saved[1].with_name("plot.png")
    arguments += ["--plot", str(plot)] if importlib.util.find_spec("matplotlib") else []
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    for got, want in zip(rows, before.layers, strict=True):
        assert got["error"] == pytest.approx(want.error, rel=1e-6) and got["outliers"] == want.outliers
    assert not importlib.util.find_spec("matplotlib") or plot.read_bytes().startswith(b"\x89PNG")
    report = dataclasses.replace(packed, layers=(dataclasses.replace(packed.layers[0], name="x$^$", error=math.nan),))
    assert json.loads(command.as_json(report.to_dict()))["layers"][0]["error"] is None
    if importlib.util.find_spec("matplotlib"):  # to that very path, whatever the name of a layer
        report.plot(saved[1].with_name("plain"))
        assert saved[1].with_name("plain").read_bytes().startswith(b"\x89PNG")
        report.plot(saved[1].with_name("plot.svg"))
        assert "x$^$" in saved[1].with_name("plot.svg").read_text()
        with pytest.raises(ValueError, match="xyz"):
            report.plot(saved[1].with_name("plot.xyz"))
        assert not [p for p in saved[1].parent.iterdir() if p.name in ("plain.png", "plot.xyz")]
        assert main(["inspect", str(saved[1]), "--plot", "/dev/null"]) == 0 and not os.path.exists("/dev/null.png")
    os.mkfifo(pipe := saved[1].with_name("pipe"))
    assert main(["inspect", str(pipe)]) == 2 and "not a file" in capsys.readouterr().err
    saved[1].write_bytes(b"x")
    assert main(["inspect", str(saved[1])]) == 2 and str(saved[1]) in capsys.readouterr().err


def test_convert(tmp_path, capsys):
    from safetensors.torch import save_file

    source, target = tmp_path / "float.safetensors", tmp_path / "packed.safetensors"
    model = quantized(CONFIGS["int4 channel"])
    save_file({k: v.clone() for k, v in model.state_dict().items()}, str(source))
    assert main(["convert", str(source), str(target), "--bits", "4"]) == 0
    loaded = ak.load_packed(target, small(3).eval())
    assert same_state(state_of(loaded), state_of(ak.pack_(model)))
    save_file({k: v.clone() for k, v in small().state_dict().items()}, str(source))
    capsys.readouterr()
    assert main(["convert", str(source), str(target), "--grid", "ternary"]) == 2
    assert "0: weight: " in capsys.readouterr().err
    assert main(["convert", str(source), str(target), "--grid", "ternary", "--only", "5", "--force"]) == 0
    assert list(PackedFile(target).layers) == ["5"]


def test_convert_says_what_is_wrong_before_it_writes(tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    source, target = tmp_path / "float.safetensors", tmp_path / "packed.safetensors"
    given = {"a.weight": torch.randn(4, 8), "b.weight": torch.randn(4, 2, 3, 3), "e.weight": torch.ones(6, 8)}
    save_file(given, str(source))

    def said(*arguments, code=2):
        assert main(["convert", str(source), str(target), *arguments]) == code
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and not out and not target.exists()
        return err

    for kind in ("x*=linear", "b=embedding", "e=conv2d"):
        assert f"none fits '{kind}'" in said("--bits", "4", "--force", "--kind", kind)
    for value in (math.inf, -math.inf, math.nan):
        save_file({"a.weight": given["a.weight"].index_fill(1, torch.tensor([3]), value)}, str(source))
        assert "a: w: 4 of 32 weights are NaN or inf" in said("--bits", "4", "--force")
    save_file({"a.weight": given["a.weight"].to(torch.float8_e4m3fn)}, str(source))
    assert "a: weight: expected float32, bfloat16 or float16, got torch.float8_e4m3fn" in said("--bits", "4")
    ak.save_packed(ak.pack_(ak.hard_quantize_(quantized(CONFIGS["int4 channel"]))), source)
    for arguments in ((), ("--bits", "4")):
        assert "is packed already" in said(*arguments)
    monkeypatch.setattr(convert.files, "read_safetensors", lambda *_, **__: pytest.fail("read before OUT was checked"))
    target = tmp_path / "missing" / "packed"
    assert "cannot be written (No such file or directory)" in said("--bits", "4")


def test_a_full_disk_is_a_failure_of_the_work(tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    source = tmp_path / "float.safetensors"
    save_file({"a.weight": torch.randn(4, 8)}, str(source))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile, "write", full)
    assert main(["convert", str(source), str(tmp_path / "out"), "--bits", "4", "--force"]) == 1
    assert "No space left" in capsys.readouterr().err


# ---- digits ---------------------------------------------------------------------------------------------------------

FRESH = """
import sys, torch
import askew_kernels as ak
from torch import nn
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
model = ak.load_packed(sys.argv[1], model)
x = torch.load(sys.argv[2])
torch.save([model(x), torch.stack([model(row) for row in x[:40]])], sys.argv[3])
"""


@pytest.mark.parametrize("name", ["int4 channel", "ternary"])
def test_digits_trained_packed_saved_and_loaded_elsewhere(name, tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    ak.quantize_(model, CONFIGS[name])
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.2, momentum=0.9)
    annealing = ak.EpsilonAnnealing(optimizer, hold=20, total=190)
    for _ in range(200):
        rows = torch.randint(0, 1400, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        annealing.step()
    ak.hard_quantize_(model)
    test = x[1400:]
    with torch.no_grad():
        want = model(test).argmax(1)
    assert (want == y[1400:]).float().mean() > 0.8
    path = tmp_path / "digits.safetensors"
    ak.save_packed(ak.pack_(model), path)
    torch.save(test, tmp_path / "x")
    command = [sys.executable, "-c", FRESH, str(path), str(tmp_path / "x"), str(tmp_path / "y")]
    subprocess.run(command, check=True, cwd=Path(ak.__file__).parents[1])
    for outputs in torch.load(tmp_path / "y"):
        assert torch.equal(outputs.argmax(1), want[: len(outputs)])
