"""Contract: convolutions with int8 activations from bands, and filters that stay unpacked.

1. ``packed_bands_conv`` is ``packed_bands_linear`` of the unfolded patches, bit for bit: every width of codes,
   geometry, memory format, storage type, number of images and positions, instruction set and number of threads.
2. A packed convolution gives that, in the memory format of its input, whatever its padding mode; also compiled.
3. Short filters in groups are unpacked once, and anew where codes or scales change; results are the float layer's.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import askew_kernels as ak
from askew_kernels import ops, reference, runtime
from askew_kernels.quant import pack_codes

pytestmark = pytest.mark.skipif(runtime._C is None, reason="needs the compiled operators")
GEOMETRIES = {  # kernel, stride, dilation, padding
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "valid": ((3, 3), (1, 1), (1, 1), (0, 0)),
    "point": ((1, 1), (1, 1), (1, 1), (0, 0)),
    "point, strided": ((1, 1), (2, 2), (1, 1), (0, 0)),
    "strided": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "odd": ((2, 5), (3, 2), (2, 1), (1, 3)),
    "dilated": ((3, 2), (1, 3), (1, 4), (2, 0)),
    "line": ((1, 7), (1, 1), (1, 1), (0, 3)),
}
GRIDS = {1: ak.quant.Binary(), 0: ak.quant.Ternary(), **{b: ak.quant.Uniform(b) for b in (2, 3, 4, 5, 6, 7, 8)}}


@pytest.fixture(autouse=True)
def restore():
    before, threads = runtime.cpu_capability(), torch.get_num_threads()
    yield
    runtime.force_cpu_capability(before)
    torch.set_num_threads(threads)


def banded(bits, n, cols, groups=1):
    g, grid = torch.Generator().manual_seed(bits), GRIDS[bits]
    levels = len(grid.levels)
    codes = pack_codes(torch.randint(0, levels, (n, cols), generator=g).to(torch.uint8), bits)
    scale = torch.rand(n * groups, generator=g) * 0.1 + 0.05
    bands = torch.ops.askew.packed_bands(codes, bits, cols, groups, levels)
    return bands, ops.packed.band_scales(scale, n, groups), grid.encoding, bits, n


def images(shape, dtype=torch.float32):
    x = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(7))
        * torch.linspace(0.1, 3, shape[0])[:, None, None, None]
    )
    return x.to(dtype)


def unfolded(x, weight, geometry, bias):
    """By the product of rows."""
    kernel, stride, dilation, before, after = (geometry[i : i + 2] for i in range(0, 10, 2))
    padded = F.pad(x.float(), (before[1], after[1], before[0], after[0]))
    patches = F.unfold(padded, kernel, dilation, 0, stride).transpose(1, 2).to(x.dtype)
    size = ops.packed.conv_size(x.shape[2:], geometry)
    y = torch.ops.askew.packed_bands_linear(patches.reshape(-1, patches.shape[-1]).contiguous(), *weight, bias)
    return y.reshape(len(x), *size, -1).movedim(-1, 1)


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0))
    )


def check(x, weight, geometry, bias):
    expected = unfolded(x, weight, geometry, bias)
    plain = torch.ops.askew.packed_bands_conv(x, *weight, geometry, False, bias)
    last = torch.ops.askew.packed_bands_conv(x.movedim(1, -1).contiguous(), *weight, geometry, True, bias)
    assert same(plain, expected) and plain.is_contiguous()
    assert same(last.movedim(-1, 1), expected) and last.is_contiguous()
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GEOMETRIES)
@torch.no_grad()
def test_patches_are_those_of_unfold(name, dtype):
    kernel, stride, dilation, padding = GEOMETRIES[name]
    geometry = [*kernel, *stride, *dilation, *padding, padding[0] + 1, padding[1]]  # one line more below
    for shape, n in (((1, 5, 7, 9), 20), ((3, 4, 9, 40), 7), ((2, 17, 19, 23), 33)):
        weight = banded(4, n, shape[1] * kernel[0] * kernel[1])
        x, bias = images(shape, dtype), images((1, 1, 1, n), dtype).flatten()
        check(x, weight, geometry, bias)
        check(x, weight, geometry, None)


@pytest.mark.parametrize("bits", GRIDS)
@torch.no_grad()
def test_every_width_and_groups(bits):
    for groups in (1, 3, 9):
        weight = banded(bits, 18, 36, groups)
        check(images((2, 4, 6, 7)), weight, [3, 3, 1, 1, 1, 1, 1, 1, 1, 1], None)


@torch.no_grad()
def test_instruction_sets_threads_and_the_reference():
    x, geometry = images((2, 8, 20, 21)), [3, 3, 2, 1, 1, 1, 1, 0, 0, 1]
    weight, seen = banded(4, 40, 72, 9), []
    for capability in ("baseline", "avx2", "avx512"):
        try:
            runtime.force_cpu_capability(capability)
        except ValueError:
            continue
        for vnni in (True, False):
            runtime._C.force_cpu_capability(capability, vnni=vnni)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                seen.append(check(x, weight, geometry, None))
    for other in seen:
        torch.testing.assert_close(other, seen[0], rtol=1e-5, atol=1e-5)
    wanted = reference.packed_bands_conv(x.double(), *weight, geometry, False, None).float()
    torch.testing.assert_close(seen[0], wanted, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_patches_that_are_not_finite_or_all_zero():
    x = images((1, 3, 8, 8))
    x[0, 0, 0, 0], x[0, 1, 4, 4], x[:, :, 6:, 6:], x[0, 2, 2, 6] = torch.nan, torch.inf, 0.0, 1e-42
    y = check(x, banded(8, 16, 27), [3, 3, 1, 1, 1, 1, 0, 0, 0, 0], None)
    assert y[0, :, 0, 0].isnan().all() and y[0, :, 3, 3].isnan().all() and y[0, :, 0, 2].isfinite().all()


def test_bad_arguments():
    weight, x = banded(4, 16, 27), images((1, 3, 8, 8))
    conv = torch.ops.askew.packed_bands_conv
    wrong = {(3, 3, 1, 1, 1, 1): "geometry", (9, 3, 1, 1, 1, 1, 0, 0, 0, 0): "no place",
             (3, 3, 0, 1, 1, 1, 0, 0, 0, 0): "geometry", (2, 2, 1, 1, 1, 1, 0, 0, 0, 0): "bands"}  # fmt: skip
    for geometry, what in wrong.items():
        with pytest.raises(RuntimeError, match=what):
            conv(x, *weight, geometry, False, None)
    with pytest.raises(RuntimeError, match="bias"):
        conv(x, *weight, [3, 3, 1, 1, 1, 1, 0, 0, 0, 0], False, torch.zeros(3))
    with pytest.raises(RuntimeError, match="4 dimensions"):
        conv(x[0], *weight, [3, 3, 1, 1, 1, 1, 0, 0, 0, 0], False, None)


LAYERS = {
    "3x3": nn.Conv2d(16, 24, 3, padding=1),
    "point": nn.Conv2d(16, 24, 1, bias=False),
    "point, strided": nn.Conv2d(16, 24, 1, stride=2),
    "reflect": nn.Conv2d(16, 24, 3, stride=2, padding=2, padding_mode="reflect"),
    "same": nn.Conv2d(16, 24, (2, 3), padding="same", dilation=2),
    "signal": nn.Conv1d(16, 24, 5, stride=2, padding=2),
    "circular signal": nn.Conv1d(16, 24, 4, padding=3, padding_mode="circular"),
}


def packed(layer, activations="int8", bits=4):
    config = ak.QuantConfig(ak.quant.Uniform(bits), scale="absmax")
    model = ak.quantize_(nn.Sequential(copy.deepcopy(layer)), config)
    return ak.pack_(model, force=True, activations=activations).eval()[0]


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers(name, monkeypatch):
    layer = packed(LAYERS[name])
    shape = (2, 16, 30) if isinstance(layer, nn.Conv1d) else (2, 16, 11, 12)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    y, exact = layer(x), layer.to_float()(x)
    assert y.shape == exact.shape and float((y - exact).norm() / exact.norm()) < 0.02
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    assert same(layer(x.bfloat16()).float(), y) or float((layer(x.bfloat16()).float() - y).norm() / y.norm()) < 0.02
    if x.dim() == 4:
        last = layer(x.to(memory_format=torch.channels_last))
        assert torch.equal(last, y) and last.is_contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), y)
    layer.repack = False  # patches of all positions, products from the codes
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_short_filters_stay_unpacked():
    layer = packed(nn.Conv2d(12, 12, 3, padding=1, groups=12), bits=8)
    x = torch.randn(2, 12, 9, 9, generator=torch.Generator().manual_seed(3))
    assert layer.unpacked_bytes == 0
    y = layer(x)
    assert layer.unpacked_bytes == 12 * 9 * 4 and torch.equal(y, layer.to_float()(x)) and torch.equal(layer(x), y)
    assert torch.equal(layer(x.bfloat16()), copy.deepcopy(layer).to_float().bfloat16()(x.bfloat16()))
    assert copy.deepcopy(layer).unpacked_bytes == 0 and torch.equal(copy.deepcopy(layer)(x), y)
    layer.weight_scale.mul_(2)
    assert torch.equal(layer(x), layer.to_float()(x)) and not torch.equal(layer(x), y)
    other = packed(nn.Conv2d(12, 12, 3, padding=1, groups=12), bits=8)
    for change in (lambda: layer.load_state_dict(other.state_dict()), lambda: layer.weight_codes.zero_(),
                   lambda: layer.load_state_dict(other.state_dict(), assign=True)):  # fmt: skip
        layer(x)
        change()
        assert torch.equal(layer(x), layer.to_float()(x))
    with torch.inference_mode():
        assert torch.equal(layer(x), layer.to_float()(x))
    assert not [k for k in layer.state_dict() if "unpacked" in k]
    assert "_unpacked" not in vars(ak.nn.unpack_(nn.Sequential(layer))[0])


def test_what_stays_unpacked_takes_gradients():
    layer = packed(nn.Conv2d(12, 12, 3, padding=1, groups=12), bits=8)
    x = torch.randn(2, 12, 9, 9)
    with torch.inference_mode():
        layer(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    expected = x.clone().requires_grad_()
    layer.to_float()(expected).sum().backward()
    assert torch.equal(leaf.grad, expected.grad)
