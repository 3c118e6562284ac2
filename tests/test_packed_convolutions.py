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
from askew_kernels.nn.calls import ConvolutionCall
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


@torch.no_grad()
def test_points_between_zeros_are_no_pixels():
    weight = banded(8, 20, 6)
    for zeros in ([1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 2]):
        check(images((2, 6, 5, 5)), weight, [1, 1, 2, 2, 1, 1, *zeros], None)


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


@pytest.mark.parametrize("name", GEOMETRIES)
@torch.no_grad()
def test_a_filter_for_each_channel(name):
    """Against float64, on every instruction set; results do not depend on threads, nor on where they are stored."""
    kernel, stride, dilation, padding = GEOMETRIES[name]
    geometry = [*kernel, *stride, *dilation, *padding, padding[0] + 1, padding[1]]
    for channels, size in ((5, (9, 7)), (16, (11, 40)), (37, (5, 23)), (96, (19, 30))):
        g = torch.Generator().manual_seed(channels)
        x, bias = torch.randn(3, *size, channels, generator=g), torch.randn(channels, generator=g)
        taps = torch.randn(kernel[0] * kernel[1], channels, generator=g)
        for added in (bias, None):
            wide = [None if t is None else t.double() for t in (x, taps, added)]
            exact = reference.packed_depthwise(*wide[:2], geometry, wide[2])
            most = [None if t is None else t.abs() for t in wide]
            near = (len(taps) + 1) * 2.0**-24 * reference.packed_depthwise(*most[:2], geometry, most[2]).max()
            for capability in ("baseline", "avx2", "avx512"):
                try:
                    runtime.force_cpu_capability(capability)
                except ValueError:
                    continue
                found = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    found.append(torch.ops.askew.packed_depthwise(x, taps, geometry, added))
                assert (found[0] - exact).abs().max() <= near, capability
                assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.no_grad()
def test_results_stored_past_the_caches_are_the_same():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, 16, 20, 21, generator=g).movedim(1, -1).contiguous()
    points, patches, taps = banded(8, 48, 16), banded(8, 48, 144), torch.randn(9, 16, generator=g)
    geometry, strided = [3, 3, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 1, 1, 0, 0, 0, 0]

    def results():
        return [torch.ops.askew.packed_bands_linear(x.reshape(-1, 16), *points, None),
                torch.ops.askew.packed_bands_conv(x, *points, strided, True, None),
                torch.ops.askew.packed_bands_conv(x, *patches, geometry, True, None),
                torch.ops.askew.packed_depthwise(x, taps, geometry, None)]  # fmt: skip

    before = results()
    try:
        runtime.use_tuning({"cpu": {"streaming_bytes": 1}})
        after = results()
    finally:
        runtime.use_tuning()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


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
    patched = layer(x)
    torch.testing.assert_close(patched, y, rtol=1e-4, atol=1e-4)
    assert patched.is_contiguous()


MUTATED = {
    "dilated": {"dilation": (2, 2), "padding": (2, 2)}, "no padding": {"padding": (0, 0)},
    "numbers": {"stride": 2, "padding": 2}, "lists": {"stride": [2, 1], "padding": [1, 0]},
    "valid": {"padding": "valid"}, "same": {"padding": "same", "dilation": 2},
}  # fmt: skip


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("name", MUTATED)
@torch.no_grad()
def test_geometry_that_is_set_after_packing_is_torchs(name, groups, activations):
    """As networks are dilated that were built with strides."""
    conv = nn.Conv2d(8, 16 if groups == 1 else 8, 3, padding=1, groups=groups)
    layer, g = packed(conv, activations=activations, bits=8), torch.Generator().manual_seed(3)
    for size in (3, 12):
        for format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(1, 8, size, size, generator=g).contiguous(memory_format=format)
            layer(x)
            before = {key: getattr(layer, key) for key in MUTATED[name]}
            for key, value in MUTATED[name].items():
                setattr(layer, key, value)
            y, exact = layer(x), layer.to_float()(x)
            weight, rest = layer.dequantize(), (layer.stride, layer.padding, layer.dilation, groups)
            plain = F.conv2d(x, weight, layer.bias, *rest)
            assert torch.equal(exact, plain) and y.shape == exact.shape
            if activations == "int8" and groups == 1:  # 8 bits of an input, as in test_layers
                assert float((y - exact).norm() / exact.norm()) < 0.02
            else:
                torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
            for key, value in before.items():
                setattr(layer, key, value)


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


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 0}, {"bias": False, "dilation": 2}])
@torch.no_grad()
def test_a_filter_for_each_channel_of_a_layer(options, monkeypatch):
    """Channels last: the operator's own product, as near as float32 is; what it has not is torch's."""
    layer = packed(nn.Conv2d(24, 24, 3, groups=24, **{"padding": 1, **options}), bits=8)
    x = torch.randn(2, 24, 9, 10, generator=torch.Generator().manual_seed(3))
    last, calls = x.to(memory_format=torch.channels_last), []
    operator = torch.ops.askew.packed_depthwise.default
    monkeypatch.setattr(torch.ops.askew.packed_depthwise, "default", lambda *a: (calls.append(1), operator(*a))[1])
    y, exact = layer(last), layer.to_float()(last)
    assert len(calls) == 1 and y.shape == exact.shape and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(last), y) and layer.unpacked_bytes == 24 * 9 * 4
    layer.weight_scale.mul_(2)
    torch.testing.assert_close(layer(last), layer.to_float()(last), rtol=1e-5, atol=1e-5)
    calls.clear()
    for given in (x, last.bfloat16()):
        assert torch.equal(layer(given), copy.deepcopy(layer).to_float().to(given.dtype)(given))
    with torch.enable_grad():
        leaf = last.clone().requires_grad_()
        layer(leaf).sum().backward()
    assert leaf.grad is not None
    with runtime.use_backend("reference"):
        assert torch.equal(layer(last), layer.to_float()(last))
    assert not calls
    y = layer(last)
    layer.set_activations("float")
    assert torch.equal(layer(last), y) and len(calls) == 2


CALLED = {"pixels": nn.Conv2d(16, 20, 1), "patches": nn.Conv2d(16, 20, 3, 2, 1, bias=False),
          "reflected": nn.Conv2d(16, 20, 3, padding=1, padding_mode="reflect"),
          "channels": nn.Conv2d(16, 16, 3, padding=1, groups=16)}  # fmt: skip


def changes(layer):
    def exchanged(name, value):
        return lambda: setattr(layer, name, value)

    other = packed(nn.Conv2d(16, layer.out_channels, layer.kernel_size, groups=layer.groups), bits=8)
    yield lambda: layer.weight_scale.mul_(2)
    yield lambda: layer.weight_codes.copy_(other.weight_codes)
    yield exchanged("weight_codes", other.weight_codes)
    yield exchanged("bias", nn.Parameter(torch.ones(layer.out_channels)))
    yield exchanged("stride", (2, 3))
    yield exchanged("dilation", (2, 1))
    yield exchanged("padding", (2, 1))
    yield lambda: layer.set_activations("float" if layer.activations == "int8" else "int8")


@pytest.mark.parametrize("activations", ["int8", "float", "bf16"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", CALLED)
@torch.no_grad()
def test_the_second_call_is_the_first_and_sees_what_changed(name, last, activations):
    format = torch.channels_last if last else torch.contiguous_format
    g = torch.Generator().manual_seed(11)
    layer, x = packed(CALLED[name], bits=8), torch.randn(2, 16, 9, 10, generator=g).contiguous(memory_format=format)
    layer.set_activations(activations)
    first = layer(x)
    if name == "channels":  # taps
        called = last
    elif activations == "int8":  # bands
        called = name != "reflected"
    else:  # unpacked for the call, but of pixels that are rows
        called = name != "pixels" or not last
    assert isinstance(layer._call, ConvolutionCall) == called and (
        not called or torch.equal(layer._call.product_of(layer, x), first)
    )
    assert torch.equal(layer(x.clone()), first) and layer(x).stride() == first.stride()
    with torch.device("meta"):  # as the default device
        assert torch.equal(layer(x), first)

    def same_as_fresh(*inputs):
        for given in inputs:
            y, new = layer(given), copy.deepcopy(layer)
            assert new._call is None
            expected = new(given)
            assert torch.equal(y, expected) and y.dtype == expected.dtype and y.stride() == expected.stride()

    turned = x.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)
    same_as_fresh(turned, x, x[:1], x[:, :, :7], x.bfloat16(), x[0], x, x[:0], x.transpose(2, 3))
    if layer.padding == (1, 1) and layer.padding_mode == "zeros":
        layer(x)
        with pytest.raises(
            RuntimeError, match="[Kk]ernel size can't be greater"
        ):  # torch's own words, as in a first call
            layer(x[:, :, :, :0])
    for change in changes(layer):
        layer(x)
        change()
        same_as_fresh(x)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises((RuntimeError, ValueError)):
        layer(x[:, :5])


@pytest.mark.parametrize("activations", ["float", "int8"])
@torch.no_grad()
def test_a_graph_makes_a_filter_for_each_channel_as_eager_calls_do(activations):
    """It decodes the filters in each call, so that it sees at once what is written into codes or scales."""
    layer = packed(nn.Conv2d(24, 24, 3, padding=1, groups=24), activations=activations, bits=8)
    x = torch.randn(2, 24, 9, 10, generator=torch.Generator().manual_seed(3)).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager", "inductor"):
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        y = compiled(x)
        assert torch.equal(y, layer(x)) and y.is_contiguous(memory_format=torch.channels_last)
        for change in (lambda: layer.weight_scale.mul_(2), lambda: layer.weight_codes.bitwise_xor_(1)):
            change()
            assert not torch.equal(compiled(x), y) and torch.equal(compiled(x), layer(x))
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pixels_in_channels_last_are_rows_with_float_activations_too():
    layer = packed(nn.Conv2d(16, 20, 1), activations="float", bits=8)
    x = torch.randn(2, 16, 9, 10, generator=torch.Generator().manual_seed(3))
    last, plain = x.to(memory_format=torch.channels_last), layer.to_float()
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 32, 4, 4).to(memory_format=torch.channels_last))
    layer._unpacked.of = None  # nothing is unpacked
    for given in (last, last[:1]):
        y = layer(given)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, plain(given), rtol=1e-5, atol=1e-5)
        assert torch.equal(y, layer(given))
    layer = packed(nn.Conv2d(16, 20, 1, 2), activations="float", bits=8)
    assert torch.equal(layer(last), layer.to_float()(last))  # 50 positions: unpacked
    layer = packed(nn.Conv2d(16, 20, 1), activations="float", bits=8)
    many = torch.randn(1, 16, 32, 32).to(memory_format=torch.channels_last)  # torch's own product is faster
    assert torch.equal(layer(many), layer.to_float()(many))


def test_what_stays_unpacked_takes_gradients():
    layer = packed(nn.Conv2d(12, 12, 3, padding=1, groups=12), bits=8)
    x = torch.randn(2, 12, 9, 9)
    with torch.inference_mode():
        layer(x)
        assert layer.unpacked_bytes == 12 * 9 * 4
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    expected = x.clone().requires_grad_()
    layer.to_float()(expected).sum().backward()
    assert torch.equal(leaf.grad, expected.grad)
