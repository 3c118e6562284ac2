"""Contract: tiles hold the codes of a packed weight in the order that ``contract.tile_codes`` says, products from them
are those from the codes, and a layer's tiles follow its codes and scales, and nothing else sees them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels import contract, ops, reference, runtime
from askew_kernels.nn.tiles import Tiles
from askew_kernels.ops import packed
from askew_kernels.quant import FP4, NF4, Binary, Codebook, Ternary, Uniform, code_bits, pack_weight

FORMS = (1, 2, 3, 4, 8, contract.TILE_TABLE)
GRIDS = {"int4": Uniform(4), "narrow3": Uniform(3, narrow=True), "int2": Uniform(2), "ternary": Ternary(),
         "binary": Binary(), "int8": Uniform(8), "unsigned8": Uniform(8, signed=False), "six": Uniform(6),
         "fp4": FP4(), "nf4": NF4()}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_code_stands_where_its_lane_looks(form):
    """Written down a second time: word, bits and lane of every code of a tile, from its row and column."""
    bits, (n, cols) = contract.tile_bits(form), (19, 300)
    codes = torch.randint(2**bits, (n, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(form))
    tiles = contract.tile_codes(codes, form)
    assert tiles.shape == contract.tile_shape(n, cols, form) == (2, 2, bits, 32, 4) and tiles.dtype == torch.int32
    assert torch.equal(contract.untile_codes(tiles, form, n, cols), codes)
    for row in range(n):
        for col in range(cols):
            j, t, rest = col % 256 // 16, col % 16 // 4, col % 4
            q, half = 4 * j + row % 16 // 8 + 2 * (rest // 2), rest % 2
            lane = tiles[row // 16, col // 256, :, 4 * (row % 8) + t].flatten().tolist()
            if form == 3:
                words = lane[q // 16 * 3 : q // 16 * 3 + 3]
                found = (words[q % 16 // 5] >> 3 * (q % 16 % 5) + 16 * half & 7 if q % 16 < 15 else
                         sum((word >> 15 + 16 * half & 1) << i for i, word in enumerate(words)))  # fmt: skip
            else:
                each = 16 // bits
                found = lane[q // each] >> bits * (q % each) + 16 * half & 2**bits - 1
            assert found == codes[row, col], (row, col)


def tiled(grid, n, cols, groups, dtype, trits=False):
    """(codes, scale, bits; what packed_tiles_linear takes between x and the bias)."""
    g = torch.Generator().manual_seed(n + cols)
    rows = n * groups if groups else 1
    scale = torch.rand(rows, generator=g) + 0.1
    w = torch.randn(n, cols, generator=g) * scale.reshape(-1, 1).mean() * 3
    bits = code_bits(grid, trits)
    codes = pack_weight(w, scale, grid, trits=trits)
    form = packed.tile_form(grid.levels, grid.encoding, dtype)
    tiles = packed.packed_tiles(codes, grid.encoding, bits, cols, len(grid.levels), form)
    levels = grid.levels_tensor()
    return codes, scale, bits, (tiles, packed.tile_scales(scale, n, cols), levels, grid.encoding, form, n, groups)


@pytest.mark.parametrize("name", [*GRIDS, "trits"])
def test_products_from_tiles_are_those_from_codes(name, monkeypatch):
    """Of every grid, in pieces of rows as well; the reference computes both in float32 from the same weights."""
    monkeypatch.setattr(packed, "PIECE", 5000)
    grid = GRIDS.get(name, Ternary())
    for (n, cols, groups), dtype in zip([(40, 200, 0), (37, 512, 4), (5, 144, 9), (16, 700, 1)],
                                        [torch.bfloat16, torch.float16] * 2, strict=True):  # fmt: skip
        codes, scale, bits, arguments = tiled(grid, n, cols, groups, dtype, name == "trits")
        x, bias = torch.randn(3, cols).to(dtype), torch.randn(n).to(dtype)
        y = torch.ops.askew.packed_tiles_linear(x, *arguments, bias)
        levels = grid.levels_tensor()
        assert torch.equal(y, reference.packed_linear(x, codes, scale, levels, grid.encoding, bits, bias))


def test_forms():
    """Levels that halves hold are one number; NF4's are two; others are not in tiles."""

    def form(grid, dtype=torch.bfloat16):
        return packed.tile_form(grid.levels, grid.encoding, dtype)

    table, both = contract.TILE_TABLE, contract.TILE_TABLE2
    assert [form(grid) for grid in GRIDS.values()] == [4, 3, 2, 2, 1, 8, 8, 8, table, both]
    assert form(NF4(), torch.float16) == contract.TILE_TABLE2
    tiny = Codebook([-1e-6, 0.0, 1.1e-6, 1.0])
    assert form(tiny) and not form(tiny, torch.float16)


@pytest.fixture
def on_gpu(monkeypatch):
    """Tiles are taken as on a GPU; the reference computes the products, and ``calls`` counts them."""
    calls = []
    product = reference.packed_tiles_linear
    monkeypatch.setattr(reference, "packed_tiles_linear", lambda *a: (calls.append(len(a[0])), product(*a))[1])
    usual = (torch.bfloat16, torch.float16)
    monkeypatch.setattr(runtime, "reads_tiles", lambda x: x.dtype in usual and not torch.compiler.is_compiling())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


def packed_layer(config=None, cols=256, **options):
    torch.manual_seed(1)
    layer = ak.quantize_(nn.Sequential(nn.Linear(cols, 48)), config or ak.QuantConfig(Uniform(4)))
    ak.hard_quantize_(layer)
    return ak.pack_(layer, **options)[0].bfloat16()


def exact(layer, x):
    """In float32 from the packed weight, rounded once."""
    return nn.functional.linear(x.float(), layer.dequantize(torch.float32), layer.bias.float()).to(x.dtype)


@torch.no_grad()
def test_a_layer_keeps_its_tiles_and_nobody_sees_them(on_gpu):
    layer, x = packed_layer(), torch.randn(2, 3, 256, dtype=torch.bfloat16)
    names, before = list(layer.state_dict()), layer.packed_bytes
    assert layer.tile_bytes == 0
    y = layer(x)
    made = layer._tiles._kept
    torch.testing.assert_close(y, exact(layer, x))
    assert torch.equal(layer(x), y) and layer._tiles._kept is made and on_gpu == [6, 6]
    assert layer.tile_bytes == 48 * 256 // 2 + 4 * 48  # 4 bits a weight, the scales
    assert list(layer.state_dict()) == names and layer.packed_bytes == before
    for other in (copy.deepcopy(layer), torch.load(saved(layer), weights_only=False)):
        assert other.tile_bytes == 0 and torch.equal(other(x), y)
    assert not torch.equal(layer.float()(x.float()), y.float()) and on_gpu == [6] * 4  # float32: from the codes


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


@torch.no_grad()
def test_tiles_follow_codes_and_scales(on_gpu):
    layer, x = (
        packed_layer(ak.QuantConfig(Uniform(3), granularity="per_group", group_size=64)),
        torch.randn(4, 256).bfloat16(),
    )
    other = copy.deepcopy(layer)

    def right():
        torch.testing.assert_close(layer(x), exact(layer, x))

    right()
    other.weight_codes.bitwise_not_()
    layer.load_state_dict(other.state_dict())
    right()
    layer.weight_scale.mul_(2)
    right()
    layer.weight_codes = layer.weight_codes.flip(0)
    right()
    layer.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict())
    right()
    assert len(on_gpu) == 5


@torch.no_grad()
def test_where_tiles_do_not_serve_the_codes_do(on_gpu, monkeypatch):
    x = torch.randn(2, 96, dtype=torch.bfloat16)
    for layer in (
        packed_layer(cols=96),
        packed_layer(ak.QuantConfig(Uniform(4), granularity="per_group", group_size=8), cols=128),
    ):
        assert layer(torch.randn(2, layer.cols, dtype=torch.bfloat16)).shape == (2, 48)
    assert not on_gpu and x.shape[1] == 96
    layer = packed_layer()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer(torch.randn(2, 256).bfloat16())
    assert not on_gpu and layer.tile_bytes == 0  # they would be made at each replay
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.enable_grad():  # the bias is trained
        layer(torch.randn(2, 256).bfloat16()).sum().backward()
    assert not on_gpu and layer.bias.grad is not None


def test_an_operator_without_derivative_refuses():
    arguments = tiled(Uniform(4), 16, 256, 1, torch.bfloat16)[3]
    with pytest.raises(NotImplementedError, match="packed_tiles_linear has no derivative"):
        torch.ops.askew.packed_tiles_linear(torch.ones(1, 256, requires_grad=True), *arguments, None)


def test_tiles_are_empty_when_copied():
    tiles = Tiles()
    tiles._kept = (1,) * 5
    assert copy.deepcopy(tiles)._kept is None and ops.packed is packed
