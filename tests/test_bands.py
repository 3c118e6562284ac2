"""Contract: bands hold the codes of a packed weight in the order that ``contract.band_codes`` says, and give them back;
sums of int8 activations with them are exact on every instruction set; and a layer that keeps bands is, for everybody
who looks at it, the layer of the file's codes, which it holds once."""

from __future__ import annotations

import contextlib
import copy
import gc
import io

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels import contract, reference, runtime
from askew_kernels.nn.bands import BandedCodes, Bands
from askew_kernels.ops import packed
from askew_kernels.quant import Binary, Ternary, Uniform

BITS = (*range(1, 9), contract.TRITS)
compiled = pytest.mark.skipif(runtime._C is None, reason="nothing is compiled")


def drawn(n, cols, bits, seed=0):
    """Codes as bytes, each of the levels that the bits have."""
    g = torch.Generator().manual_seed(seed + 100 * bits)
    return torch.randint(3 if bits == contract.TRITS else 2**bits, (n, cols), dtype=torch.uint8, generator=g)


# ---- the order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_each_code_stands_where_its_lane_looks(bits):
    """Written down a second time: word, byte and bits of every code, from its row and column."""
    n, cols, groups = 19, 3 * 44, 3
    codes = drawn(n, cols, bits)
    bands = contract.band_codes(codes, bits, groups)
    vectors, words = contract.band_vectors(bits), contract.band_words(bits)
    assert bands.shape == contract.band_shape(n, cols, bits, groups) and bands.dtype == torch.uint8
    assert torch.equal(contract.unband_codes(bands, bits, n, cols, groups), codes)
    seen = bands.reshape(2, groups, -1, words, 16, 4)
    for row in range(n):
        for col in range(cols):
            group, (block, rest) = col // 44, divmod(col % 44, 4 * vectors)
            v, byte = divmod(rest, 4)
            held = seen[row // 16, group, block, :, row % 16, byte].tolist()
            if bits == contract.TRITS:
                found = held[0] * 243 // 256 // 3 ** (4 - v) % 3
            else:
                found, word, low = 0, 0, 0
                for width in (8, 4, 2, 1):
                    if bits & width:
                        each = 8 // width
                        found |= (held[word + v // each] >> width * (v % each) & 2**width - 1) << low
                        word, low = word + vectors // each, low + width
            assert found == codes[row, col], (row, col)


@pytest.mark.parametrize("bits", BITS)
def test_compiled_bands_are_the_references(bits):
    """Both ways, of any sizes; codes above the highest level become the highest."""
    for n, cols, groups in ((16, 128, 1), (35, 200, 5), (1, 7, 1), (5, 96, 32), (0, 8, 1), (18, 1000, 1)):
        codes = contract.pack_codes(drawn(n, cols, bits, n), bits)
        for levels in {3 if bits == contract.TRITS else 2**bits, 2 if bits < 2 else 3}:
            bands = torch.ops.askew.packed_bands(codes, bits, cols, groups, levels)
            assert torch.equal(bands, reference.packed_bands(codes, bits, cols, groups, levels))
        bands = reference.packed_bands(codes, bits, cols, groups, 3 if bits == contract.TRITS else 2**bits)
        assert torch.equal(torch.ops.askew.packed_bands_codes(bands, bits, n, cols, groups), codes)


def test_bytes_that_no_trits_have_count_as_the_highest():
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    bands = torch.ops.askew.packed_bands(codes, 0, 5, 1, 3)
    assert torch.equal(torch.ops.askew.packed_bands_codes(bands, 0, 256, 5, 1), codes.clamp(max=242))


def test_bad_arguments_are_named():
    codes = torch.zeros(4, 8, dtype=torch.uint8)
    bands = torch.ops.askew.packed_bands(codes, 4, 16, 1, 16)
    scale, grid = torch.ones(1, 1, 16), [1, -8, 7]
    for name, call in {
        "codes": lambda: torch.ops.askew.packed_bands(codes, 4, 24, 1, 16),
        "levels": lambda: torch.ops.askew.packed_bands(codes, 4, 16, 1, 17),
        "groups": lambda: torch.ops.askew.packed_bands(codes, 4, 16, 3, 16),
        "bits": lambda: torch.ops.askew.packed_bands(codes, 9, 16, 1, 16),
        "bands": lambda: torch.ops.askew.packed_bands_codes(bands, 4, 20, 16, 1),
        "scale": lambda: torch.ops.askew.packed_bands_linear(torch.ones(1, 16), bands, scale[0], grid, 4, 4, None),
        "grid": lambda: torch.ops.askew.packed_bands_linear(torch.ones(1, 16), bands, scale, [2, -1, 1], 4, 4, None),
        "x": lambda: torch.ops.askew.packed_bands_linear(torch.ones(16), bands, scale, grid, 4, 4, None),
    }.items():
        if runtime._C is not None:
            with pytest.raises(RuntimeError, match=f"{name}:"):
                call()


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sets():
    """Switches to each instruction set that runs here, with VNNI and without."""
    before = runtime.cpu_capability()

    def each():
        for name, vnni in (("baseline", True), ("avx2", False), ("avx2", True), ("avx512", False), ("avx512", True)):
            with contextlib.suppress(ValueError):
                runtime._C.force_cpu_capability(name, vnni)
                yield runtime._C.packed_capability()

    yield each
    runtime._C.force_cpu_capability(before)


def grid_of(bits):
    """[kind, lo, hi] of a grid with all codes that these bits have."""
    return Binary().encoding if bits == 1 else Ternary().encoding if bits == 0 else Uniform(bits).encoding


def exact(x, codes, scale, grid, bias):
    """In float64, from integers that no rounding touches, but for the last steps in float32."""
    q, s = reference.int8_tokens(x.float())
    level = contract.level_step(grid[0]) * codes.double() + grid[1]
    groups = scale.shape[1]
    sums = torch.einsum("tgc,ngc->tng", q.double().unflatten(1, (groups, -1)), level.unflatten(1, (groups, -1)))
    y = (sums * scale.double()).sum(-1) * s.double()[:, None]
    return y if bias is None else y + bias.double()


@compiled
@pytest.mark.parametrize("bits", BITS)
def test_products_are_exact_on_every_instruction_set(bits, sets):
    """One scale a row: the same bits everywhere, blocks of tokens of all sizes; groups: within float32's sums."""
    g, grid = torch.Generator().manual_seed(bits), grid_of(bits)
    for n, cols, groups, tokens in ((37, 416, 1, 31), (16, 640, 5, 1), (50, 96, 3, 7), (3, 33, 1, 2), (16, 4096, 1, 4)):
        codes, x = drawn(n, cols, bits, tokens), torch.randn(tokens, cols, generator=g)
        x[-1] = x[-1].abs() + 3  # large sums of one sign
        scale, bias = torch.rand(n, groups, generator=g) + 0.1, torch.randn(n, generator=g)
        bands = contract.band_codes(codes, bits, groups)
        beside = packed.band_scales(scale.flatten(), n, groups)
        expected, found = exact(x, codes, scale, grid, bias), {}
        for name in sets():
            y = found[name] = torch.ops.askew.packed_bands_linear(x, bands, beside, grid, bits, n, bias)
            near = (groups + 4) * 2.0**-24 * exact(x.abs(), codes, scale, grid, None).abs().max() * 300
            assert (y - expected).abs().max() <= near, name
        if groups == 1:
            assert len({tuple(y.flatten().tolist()) for y in found.values()}) == 1
        whole = reference.packed_bands_linear(x, bands, beside, grid, bits, n, bias)
        torch.testing.assert_close(y, whole, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@compiled
@pytest.mark.parametrize("bits", BITS)
def test_the_largest_sums_overflow_nothing(bits, sets):
    """All codes and inputs at their ends, where int16 halves of the sums are fullest; rows as long as trits may be."""
    grid = grid_of(bits)
    for top, cols in (
        (0, 1280),
        (1, 1280),
        *(((0, 87_000), (1, 87_000), (1, 33_020)) if bits == contract.TRITS else ()),
    ):
        codes = torch.full((16, cols), top * (2 if bits == 0 else 2**bits - 1), dtype=torch.uint8)
        bands, beside = contract.band_codes(codes, bits, 1), torch.ones(1, 1, 16)
        x = torch.tensor([[127.0], [-127.0]]).expand(2, cols).repeat(16, 1)[:31]  # blocks of each number of tokens
        level = contract.level_step(grid[0]) * int(codes[0, 0]) + grid[1]
        for name in sets():
            y = torch.ops.askew.packed_bands_linear(x, bands, beside, grid, bits, 16, None)
            assert torch.equal(y, (x[:, :1] * level * cols).expand(31, 16)), name


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_other_types_and_rows_that_are_not_finite(dtype):
    x = torch.randn(5, 64).to(dtype)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 0
    codes, bias = drawn(20, 64, 4), torch.randn(20).to(dtype)
    bands, beside = contract.band_codes(codes, 4, 2), packed.band_scales(torch.rand(40), 20, 2)
    y = torch.ops.askew.packed_bands_linear(x, bands, beside, [1, -8, 7], 4, 20, bias)
    assert y.dtype == dtype and y[1:3].isnan().all() and torch.equal(y[3], bias)
    whole = reference.packed_bands_linear(x, bands, beside, [1, -8, 7], 4, 20, bias)
    torch.testing.assert_close(y, whole, equal_nan=True)


@compiled
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_a_block_are_those_of_each_row_alone(bits, sets):
    """Blocks of 16, 8, 4, 2 and 1 tokens, groups that end within a vector, tokens that are rounded by no number."""
    g, grid = torch.Generator().manual_seed(bits), grid_of(bits)
    for n, cols, groups in ((18, 40, 1), (7, 60, 3), (33, 16, 1), (16, 7, 1), (20, 132, 4)):
        x = torch.randn(31, cols, generator=g) * torch.logspace(-3, 3, 31)[:, None]
        special = x.clone()
        special[3, 1], special[18, cols - 1], special[26, 0] = float("nan"), float("-inf"), float("inf")
        special[9], special[20], special[29] = 0.0, 1e-42, -0.0
        bands = contract.band_codes(drawn(n, cols, bits), bits, groups)
        beside, bias = packed.band_scales(torch.rand(n * groups, generator=g), n, groups), torch.randn(n, generator=g)
        for name in sets():
            for rows in (x, special):
                y = torch.ops.askew.packed_bands_linear(rows, bands, beside, grid, bits, n, bias)
                each = [torch.ops.askew.packed_bands_linear(r[None], bands, beside, grid, bits, n, bias) for r in rows]
                assert torch.equal(y.nan_to_num(7.0), torch.cat(each).nan_to_num(7.0)), name


@pytest.mark.parametrize("tokens", [40, 300, 700])
def test_results_do_not_depend_on_threads(tokens):
    """Threads share bands, or inputs where there are many for each of them."""
    codes, x = drawn(200, 512, 4), torch.randn(tokens, 512)
    bands, beside = contract.band_codes(codes, 4, 4), packed.band_scales(torch.rand(800), 200, 4)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 6):
            torch.set_num_threads(count)
            found.append(torch.ops.askew.packed_bands_linear(x, bands, beside, [1, -8, 7], 4, 200, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], y) for y in found[1:])
    whole = reference.packed_bands_linear(x, bands, beside, [1, -8, 7], 4, 200, None)
    torch.testing.assert_close(found[0], whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


# ---- the layer ------------------------------------------------------------------------------------------------------

CONFIGS = {"4 bits": (ak.QuantConfig(Uniform(4), "absmax", "per_group", 64), False),
           "3 bits": (ak.QuantConfig(Uniform(3), "absmax"), False),
           "8 bits, one scale": (ak.QuantConfig(Uniform(8), "absmax", "per_tensor"), False),
           "binary": (ak.QuantConfig(Binary(), "mean"), False),
           "trits": (ak.QuantConfig(Ternary(), "mean"), True)}  # fmt: skip


def packed_layer(name="4 bits", cols=256, n=48, seed=1, **options):
    torch.manual_seed(seed)
    config, trits = CONFIGS[name]
    model = ak.quantize_(nn.Sequential(nn.Linear(cols, n)), config)
    ak.hard_quantize_(model)
    return ak.pack_(model, activations="int8", trits=trits, **options)[0]


def plain_product(layer, x):
    """From codes in the layout of files, whatever the layer keeps."""
    twin = copy.deepcopy(layer)
    twin.repack = False
    return twin(x)


@compiled
@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_holds_its_codes_once_and_nobody_sees_it(name):
    layer = packed_layer(name)
    twin = copy.deepcopy(layer)
    saved = {k: v.clone() for k, v in twin.state_dict().items()}
    x = torch.randn(2, 3, 256)
    y = layer(x)
    assert type(layer._buffers["weight_codes"]) is BandedCodes and layer.band_bytes
    torch.testing.assert_close(y, plain_product(layer, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), y)
    for seen in (layer.weight_codes, dict(layer.named_buffers())["weight_codes"], next(iter(layer.buffers()))):
        assert seen.shape == saved["weight_codes"].shape and seen.dtype == torch.uint8 and seen.device.type == "cpu"
        assert torch.equal(seen, saved["weight_codes"]) and torch.equal(seen + 0, saved["weight_codes"])
    assert torch.equal(layer.dequantize(), twin.dequantize())
    assert layer.packed_bytes == twin.packed_bytes
    for other in (copy.deepcopy(layer), torch.load(through_a_file(layer), weights_only=False)):
        assert type(other._buffers["weight_codes"]) is torch.Tensor and torch.equal(other(x), y)
        assert all(torch.equal(v, saved[k]) for k, v in other.state_dict().items())
    assert type(layer._buffers["weight_codes"]) is BandedCodes  # none of these brought the codes back
    state = layer.state_dict()
    assert list(state) == list(saved) and all(torch.equal(v, saved[k]) for k, v in state.items())
    assert all(type(v) is torch.Tensor for v in state.values())
    assert torch.equal(layer(x), y)


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def answer(layer, x, sent):
    torch.set_num_threads(1)
    with torch.no_grad():
        sent.put(layer(x).tolist())


@compiled
@torch.no_grad()
def test_another_process_gets_the_codes():
    """In shared memory, which lasts until it has them, and which the layer goes on with."""
    layer, x = packed_layer(), torch.randn(3, 256)
    y = layer(x)
    assert type(layer._buffers["weight_codes"]) is BandedCodes
    spawn = torch.multiprocessing.get_context("spawn")
    sent = spawn.Queue()
    other = spawn.Process(target=answer, args=(layer, x, sent))
    other.start()
    other.join(300)
    assert other.exitcode == 0 and torch.equal(torch.tensor(sent.get(timeout=10)), y)
    assert torch.equal(layer(x), y) and layer.weight_codes.is_shared()


@compiled
@torch.no_grad()
def test_memory_is_that_of_the_codes(monkeypatch):
    """Of all tensors that live, those of a byte and of the size of the codes: one, before and after."""
    layer = packed_layer(cols=2048, n=64)
    held = sum(
        1 for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == 64 * 1024 and t.dtype == torch.uint8
    )
    layer(torch.randn(1, 2048))
    gc.collect()
    after = [
        t for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == 64 * 1024 and t.dtype == torch.uint8
    ]
    assert held <= 1 and len(after) == 1 and layer.band_bytes == 64 * 1024 + 64 * 32 * 4


@compiled
@torch.no_grad()
def test_codes_that_others_hold_stay():
    """Ties, and what a user keeps: those are the layer's own memory still, and writing to them is seen."""
    layer, x = packed_layer(), torch.randn(3, 256)
    held = layer.state_dict()["weight_codes"]
    y = layer(x)
    assert layer.weight_codes.data_ptr() == held.data_ptr() and layer.band_bytes
    held.zero_()
    assert not torch.equal(layer(x), y) and torch.allclose(layer(x), plain_product(layer, x), 1e-5, 1e-5)
    tied, view = packed_layer(), packed_layer()
    other = copy.copy(tied)
    other._buffers = dict(tied._buffers)
    tied(x)
    assert tied.weight_codes is other.weight_codes
    first = view.weight_codes[1:]
    view(x)
    assert first.data_ptr() == view.weight_codes.data_ptr() + view.weight_codes.shape[1]


@compiled
@torch.no_grad()
def test_writing_to_the_codes_and_scales_is_seen():
    x = torch.randn(3, 256)
    for write in (
        lambda m: m.weight_codes.add_(17),
        lambda m: m.weight_codes.copy_(m.weight_codes.flip(0)),
        lambda m: m.weight_codes[1:3].zero_(),
        lambda m: m.weight_codes.data.zero_(),
        lambda m: m.weight_codes.detach().numpy().__setitem__(0, 5),
        lambda m: [b.zero_() for b in m.buffers() if b.dtype == torch.uint8],
        lambda m: m.weight_scale.mul_(2),
        lambda m: m.state_dict()["weight_codes"].zero_(),
        lambda m: m.load_state_dict({k: v.flip(0) if v.dim() == 2 else v for k, v in m.state_dict().items()}),
        lambda m: setattr(m, "weight_codes", m.weight_codes.flip(0)),
    ):
        layer = packed_layer()
        before = layer(x), layer(x)
        write(layer)
        y = layer(x)
        assert not torch.equal(y, before[0])
        torch.testing.assert_close(y, plain_product(layer, x), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x), y)


@compiled
@torch.no_grad()
@compiled
def test_bands_that_another_thread_drops_serve_the_call_that_made_them(monkeypatch):
    layer = ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Linear(64, 32)))), activations="int8")[0]
    x = torch.randn(3, 64)
    with torch.no_grad():
        y, made = layer(x), Bands.made

        def made_and_dropped(bands, of):
            found = made(bands, of)
            bands.drop(of)
            return found

        monkeypatch.setattr(Bands, "made", made_and_dropped)
        layer._call = None
        assert torch.equal(layer(x), y)


def test_moves_and_other_products_find_the_codes():
    layer, x = packed_layer(), torch.randn(3, 256)
    y, codes = layer(x), copy.deepcopy(layer).weight_codes
    assert torch.equal(layer.to(torch.float64).to(torch.float32)(x), y)
    assert torch.equal(layer.to("meta").to_empty(device="cpu").weight_codes, layer.weight_codes)
    layer = packed_layer()
    layer(x)
    layer.set_activations("float")
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))
    assert type(layer._buffers["weight_codes"]) is torch.Tensor  # not made anew in every call
    assert torch.equal(layer.weight_codes, codes)
    layer.set_activations("int8")
    assert torch.equal(layer(x), y)
    with runtime.use_backend("reference"):
        torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    grad = torch.randn(3, 256, requires_grad=True)
    with torch.enable_grad():
        layer(grad).sum().backward()
    assert grad.grad is not None


@compiled
@torch.no_grad()
def test_codes_that_are_no_levels_stay_as_they_are():
    """Bands hold the highest level in their place, so the codes are kept beside them."""
    layer, x = packed_layer("trits"), torch.randn(3, 256)
    layer.weight_codes.fill_(255)
    y = layer(x)
    assert (layer.weight_codes == 255).all() and torch.allclose(y, plain_product(layer, x), 1e-5, 1e-5)


@compiled
@torch.no_grad()
def test_repack_false_reads_the_codes_as_they_lie(tmp_path):
    layer, x = packed_layer(), torch.randn(3, 256)
    path = tmp_path / "m.safetensors"
    ak.save_packed(nn.Sequential(layer), path)

    def loaded(**options):
        target = nn.Sequential(nn.Linear(256, 48, device="meta"))
        return ak.load_packed(path, target, activations="int8", **options)[0]

    y = loaded()(x)
    for options in ({"repack": False}, {"mmap": True}, {"repack": True, "mmap": True}):
        other = loaded(**options)
        torch.testing.assert_close(other(x), y, rtol=1e-5, atol=1e-5)
        assert bool(other.band_bytes) == options.get("repack", False)
        again = tmp_path / "again.safetensors"
        ak.save_packed(nn.Sequential(other), again)
        assert again.read_bytes() == path.read_bytes()


@compiled
def test_inference_mode_leaves_ordinary_codes():
    """What was made there can be written to, and differentiated with, elsewhere."""
    layer, x = packed_layer(), torch.randn(3, 256)
    state = copy.deepcopy(layer).state_dict()
    with torch.inference_mode():
        y = layer(x)
        layer.state_dict()
    assert not layer.weight_codes.is_inference()
    layer.load_state_dict({k: v.flip(0) if v.dim() == 2 else v for k, v in state.items()})
    layer.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None and layer.bias.grad is not None


def test_what_does_not_stand_in_bands():
    """Sums that int32 does not hold, levels between the codes', and rows whose blocks would be mostly empty."""
    assert packed.bands_serve(48, 256, Uniform(4), 4, 4) and packed.bands_serve(4096, 4096, Ternary(), 0, 32)
    assert not packed.bands_serve(4096, 4096, ak.quant.NF4(), 4, 1)
    assert not packed.bands_serve(16, 2**17, Uniform(8), 8, 1) and packed.bands_serve(16, 2**15, Uniform(8), 8, 1)
    assert not packed.bands_serve(16, 2**17, Ternary(), 0, 1) and packed.bands_serve(16, 2**17, Ternary(), 2, 1)
    assert not packed.bands_serve(4096, 4096, Uniform(3), 3, 4096 // 8)
    assert not packed.bands_serve(0, 4096, Uniform(3), 3, 1)


@compiled
@torch.no_grad()
def test_compiled_and_exported_models_compute_the_same():
    x = torch.randn(3, 256)
    model = nn.Sequential(packed_layer())
    y = model(x)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(fast(x), y)
    model[0].load_state_dict({k: v.flip(0) if v.dim() == 2 else v for k, v in model[0].state_dict().items()})
    assert torch.allclose(fast(x), plain_product(model[0], x), 1e-5, 1e-5)
    y = model(x)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), y, rtol=1e-5, atol=1e-5)
    assert any(k.endswith("weight_codes") for k in program.state_dict)


@compiled
@torch.no_grad()
@pytest.mark.parametrize("name", ["4 bits", "8 bits, one scale", "trits"])
def test_a_graph_has_the_operator_and_the_bands_of_eager_calls(name):
    """Also where none was made before; and those of the codes that a checkpoint brings."""
    x, model, seen = torch.randn(2, 3, 256), nn.Sequential(packed_layer(name)), []

    def backend(graph, inputs):
        seen.append(([node.target for node in graph.graph.nodes], inputs))
        return graph

    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend, fullgraph=True)
    for count in (1, 2):
        expected = fast(x)
        bands = model[0]._bands.kept(model[0])[0]
        assert torch.equal(model(x), expected) and model[0]._bands.kept(model[0])[0] is bands  # the same working layout
        assert torch.equal(fast(x), expected) and len(seen) == count
        targets, inputs = seen[-1]
        assert targets.count(torch.ops.askew.packed_bands_linear.default) == 1
        assert any(given is bands for given in inputs)
        model[0].load_state_dict({k: v.flip(0) if v.dim() == 2 else v for k, v in model[0].state_dict().items()})
    assert not torch.equal(model(x), expected) or name == "trits"


@compiled
@torch.no_grad()
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("look", [lambda t: t.view(-1), lambda t: t.data_ptr(), lambda t: t.mul_(1)], ids="vpw")
def test_codes_that_somebody_has_looked_at_are_compiled(look, activations):
    """A view, an address or a write brings them back for good; the graph is made of the codes that are there then."""
    for layer, x in ((packed_layer(), torch.randn(3, 256)), (nn.Conv2d(16, 16, 3), torch.randn(2, 16, 5, 5))):
        model = nn.Sequential(layer)
        if isinstance(layer, nn.Conv2d):
            model = ak.pack_(ak.hard_quantize_(ak.quantize_(model)), activations="int8")
        model(x)
        look(model[0].weight_codes)
        model[0].set_activations(activations)
        expected = copy.deepcopy(model)(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


@compiled
@torch.no_grad()
def test_a_graph_sees_other_tensors_in_the_place_of_codes_and_scales():
    x, model, other = torch.randn(3, 256), nn.Sequential(packed_layer()), nn.Sequential(packed_layer(seed=2))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    for called in (False, True):
        first = fast(x)
        if called:
            model(x)
        model[0].weight_scale = model[0].weight_scale * 2
        got = fast(x)  # before an eager call
        assert torch.equal(got, model(x)) and not torch.equal(got, first)
        model[0].weight_codes = model[0].weight_codes.flip(0)
        got = fast(x)
        assert torch.equal(got, model(x)) and not torch.equal(got, first)
        model.load_state_dict(other.state_dict(), assign=True)
        got = fast(x)
        assert torch.equal(got, model(x)) and torch.equal(got, other(x))
    torch._dynamo.reset()  # or what was traced here counts among the tracings of later tests


# ---- levels that are looked up ---------------------------------------------------------------------------------------

COUNTED = {
    "midrise": ak.quant.Midrise(2), "fp4": ak.quant.FP4(), "powers": ak.quant.PowersOfTwo(4),
    "apart": ak.quant.Codebook([-5.0, -0.5, 0.25, 8.0]), "widest": ak.quant.Codebook([-127.0, 0.0, 128.0]),
}  # fmt: skip


def rounded(x):
    s = x.abs().amax(-1, keepdim=True).double() / 127
    return (x.double() / s).round() * s


@pytest.mark.parametrize("group", [None, 32], ids=["row", "groups"])
@pytest.mark.parametrize("name", COUNTED)
def test_levels_that_are_looked_up_are_counted(name, group, sets):
    """Integers times a power of two have products of bytes, from bands and from the codes, whoever multiplies; the
    layer's codes and what is saved stay the grid's own."""
    grid, how = COUNTED[name], {} if group is None else {"granularity": "per_group", "group_size": group}
    torch.manual_seed(4)
    model = ak.quantize_(nn.Sequential(nn.Linear(96, 40)), ak.QuantConfig(grid, **how))
    layer = ak.pack_(model, force=True, activations="int8")[0]
    codes, scale, state = layer.weight_codes.clone(), layer.weight_scale.clone(), copy.deepcopy(layer.state_dict())
    w, bias = layer.dequantize().double(), layer.bias.detach().double()
    with torch.no_grad():
        for count in (1, 3, 40):
            x = torch.randn(count, 96)
            want = rounded(x) @ w.t() + bias
            bound = 2.0**-20 * (x.double().abs() @ w.abs().t() + 1)
            found = []
            for _ in sets() if runtime._C is not None else (0,):
                for repack in (True, False):
                    layer.repack = repack
                    found += [layer(x), layer(x)]
            found.append(ak.ops.packed_linear(x, codes, scale, grid, layer.bits, layer.bias, activations="int8"))
            with runtime.use_backend("reference"):
                found.append(layer(x))
            for y in found:
                assert ((y.double() - want).abs() <= bound).all(), (count, len(found))
            if group is None:
                assert all(torch.equal(y, found[0]) for y in found[:-1])
    assert torch.equal(layer.weight_codes, codes) and all(
        torch.equal(v, state[k]) for k, v in layer.state_dict().items()
    )
    layer.repack = True
    if runtime._C is not None:
        assert layer.band_bytes > 0 and type(layer._buffers["weight_codes"]) is torch.Tensor
        with torch.no_grad():  # what is written is seen
            before = layer(x)
            layer.weight_scale *= 2
            assert torch.allclose(layer(x) - layer.bias, 2 * (before - layer.bias), rtol=1e-5, atol=1e-5)
            layer.weight_codes.zero_()
            assert torch.allclose(layer(x), rounded(x).float() @ layer.dequantize().t() + layer.bias, atol=1e-3)


@pytest.mark.parametrize("name", ["midrise", "fp4"])
def test_convolutions_and_what_records_count_levels_too(name):
    grid = COUNTED[name]
    torch.manual_seed(5)
    conv = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1))
    layer = ak.pack_(ak.quantize_(conv, ak.QuantConfig(grid)), force=True, activations="int8")[0]
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        y, exact = layer(x), torch.nn.functional.conv2d(x, layer.dequantize(), layer.bias, padding=1)
        assert torch.equal(layer(x), y)  # by the layer's kept call
        last = layer(x.contiguous(memory_format=torch.channels_last))
    assert 1e-4 < float((y - exact).norm() / exact.norm()) < 0.03
    torch.testing.assert_close(last, y, rtol=1e-5, atol=1e-5)
    linear = ak.pack_(ak.quantize_(nn.Sequential(nn.Linear(64, 8)), ak.QuantConfig(grid)), force=True,
                      activations="int8")[0]  # fmt: skip
    linear.weight_scale.requires_grad_()
    x = torch.randn(5, 64)
    linear(x).sum().backward()
    level = linear.dequantize() / linear.weight_scale.detach()[:, None]
    torch.testing.assert_close(linear.weight_scale.grad, x.sum(0) @ level.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.bias.grad, torch.full((8,), 5.0))


@pytest.mark.parametrize("grid", [Uniform(4), ak.quant.FP4()], ids=str)
def test_a_grid_that_an_earlier_release_pickled(grid):
    """It knows of no counting: evenly spaced levels have int8 activations as ever, others are refused as they were."""
    old = copy.copy(grid)
    old.__dict__.pop("counted")
    model = ak.quantize_(nn.Sequential(nn.Linear(32, 8)), ak.QuantConfig(old))
    if grid.counted is not None:
        with pytest.raises(ValueError, match="integer levels"):
            ak.pack_(model, force=True, activations="int8")
        return
    layer, x = ak.pack_(model, force=True, activations="int8")[0], torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), rounded(x).float() @ layer.dequantize().t() + layer.bias)


def test_levels_too_far_apart_are_refused():
    for levels in ([-129.0, 0.0], [0.0, 256.0], [-100.0, 156.5], [0.1, 0.3]):
        grid = ak.quant.Codebook(levels)
        assert grid.counted is None
        with pytest.raises(ValueError, match="integer levels of 8 bits"):
            ak.ops.packed_linear(torch.ones(1, 8), torch.zeros(2, 1, dtype=torch.uint8), torch.ones(1), grid, 1,
                                 activations="int8")  # fmt: skip
