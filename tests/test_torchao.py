"""Contract: packed layers as torchao's tensors.

1. They hold the same weights, bit for bit; layers with inputs quantized to 8 bits compute with integers, within half a
   step of theirs and half a step of ours from each input.
2. What they do not hold is refused by the layer's name, before anything is replaced.
3. Files are torchao's own, which it reads to the same weights; a file gives the packed model back, one of others the
   weights that torchao reads. Damaged ones are errors.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from oracles import NF4
from packed_models import CONFIGS
from torch import nn

import askew_kernels as ak
from askew_kernels.deploy import files, tensorfile
from askew_kernels.deploy.contents import contents_of, write_contents
from askew_kernels.deploy.files import PackedFileError
from askew_kernels.quant import Codebook, Ternary, Uniform


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CONFIGS, "unsigned8"])
def test_torchao_holds_the_same_weight(name, dtype):
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao, to_torchao_

    config = CONFIGS.get(name, ak.QuantConfig(Uniform(8, signed=False), scale="absmax"))
    model = nn.Sequential(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 6, bias=False)).to(dtype)
    only = {} if name != "int4 group" else {"filter_fn": lambda module, _: module.in_features % 16 == 0}
    model = ak.pack_(ak.quantize_(model, config, **only), force=True).eval()
    layer = model[0]
    tensor = to_torchao(layer)
    assert torch.equal(tensor.dequantize(), layer.dequantize()) and tensor.shape == layer.shape
    x = torch.randn(4, 32).to(dtype)
    with torch.no_grad():
        want = model(x)
        assert to_torchao_(model) is model and type(model[0]) is nn.Linear
        torch.testing.assert_close(model(x), want, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=0.02)


def test_torchao_layers_keep_their_hooks_and_ties():
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao_

    layer, seen = nn.Linear(32, 32), []
    model = ak.pack_(ak.quantize_(nn.Sequential(layer, nn.ReLU(), layer), CONFIGS["int8"]), force=True).eval()
    model[0].register_forward_hook(lambda module, *_: seen.append(type(module)))
    to_torchao_(model)(torch.ones(2, 32))
    assert model[0] is model[2] and seen == [nn.Linear] * 2


def test_torchao_layers_keep_one_weight_of_several_and_one_conv1d_in_two_places():
    pytest.importorskip("torchao")
    from transformers.pytorch_utils import Conv1D

    from askew_kernels.deploy.to_torchao import to_torchao_

    embedding, head, conv = nn.Embedding(32, 32), nn.Linear(32, 32, bias=False), Conv1D(32, 32)
    head.weight = embedding.weight
    model = ak.quantize_(nn.Sequential(embedding, conv, nn.ReLU(), conv, head), kinds=ak.nn.KINDS)
    to_torchao_(ak.pack_(ak.hard_quantize_(model)))
    assert model[0].weight is model[4].weight and model[1] is model[3] and type(model[1]) is nn.Linear


def test_torchao_int4_layout():
    """Two's complement nibbles, even columns low; scales (groups, n) in bfloat16; weight = q s + zero point."""
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao

    for grid in (Uniform(4), Uniform(4, signed=False), Uniform(3)):
        config = ak.QuantConfig(grid, granularity="per_group", group_size=16, scale="absmax")
        model = ak.quantize_(nn.Sequential(nn.Linear(32, 6)), config)
        layer = ak.pack_(model, force=True, scale_dtype=torch.bfloat16)[0]
        made = to_torchao(layer, "int4")
        low = (made.qdata << 4) >> 4  # of int8: with its sign
        q = torch.stack([low, made.qdata >> 4], 2).reshape(6, 2, 16).float()
        scale, zero = (t.t().reshape(6, 2, 1).float() for t in (made.scale, made.zero_point))
        assert torch.equal((q * scale + zero).reshape(6, 32), layer.dequantize())
        assert made.block_size == [1, 16] and made.scale.shape == (2, 6) and made.qdata.dtype == torch.int8


def test_torchao_names_what_it_cannot_hold():
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao, to_torchao_

    def model(config):
        torch.manual_seed(0)
        return ak.pack_(ak.quantize_(nn.Sequential(nn.Linear(32, 6)), config), force=True)

    nf4 = model(ak.QuantConfig(Codebook(NF4), scale="absmax"))
    with pytest.raises(ValueError, match=r"^0: torchao.s tensors hold integer levels, got Codebook"):
        to_torchao_(nf4)
    assert type(nf4[0]).__name__ == "PackedLinear"
    with pytest.raises(ValueError, match=r"^0: torchao.s tensors hold levels of 8 bits"):
        to_torchao_(model(ak.QuantConfig(Codebook([-300.0, 0.0, 300.0]), scale="absmax")))
    for form in ("intx", "int4"):
        with pytest.raises(ValueError, match=r"^0: torchao.s tensors keep no quantized inputs, got activation=Uniform"):
            to_torchao_(model(ak.QuantConfig(Uniform(4), activation=Uniform(3))), form)
    with pytest.raises(ValueError, match=r"model: is itself a layer; use to_torchao\(layer\)"):
        to_torchao_(nf4[0])
    with pytest.raises(ValueError, match="int4: expected at most 16 consecutive integers"):
        to_torchao(model(CONFIGS["int8"])[0], "int4")
    with pytest.raises(ValueError, match="int4: bfloat16 does not hold the scales"):
        to_torchao(model(CONFIGS["int4 channel"])[0], "int4")
    with pytest.raises(ValueError, match="format: expected one of intx, int4, int8, got 'int3'"):
        to_torchao(nf4[0], "int3")
    with pytest.raises(
        TypeError,
        match="layer: expected one of PackedLinear, PackedTransposedLinear, PackedEmbedding, PackedConv2d, got Linear",
    ):
        to_torchao(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: has no PackedLinear"):
        to_torchao_(nn.Sequential(nn.Linear(2, 2)))


# ---- inputs of 8 bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("grid", [Uniform(8), Uniform(4), Ternary()])
def test_inputs_of_8_bits(grid, granularity, bias, dtype):
    """|x' - x| <= s / 2 with steps s of max|x| / 127 (ours) and max|x| / 127.5 (theirs), so outputs are no further
    apart than max|x| / 127 sum|w|, and what float32, or the type of the output, rounds."""
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao, to_torchao_

    torch.manual_seed(0)
    config = ak.QuantConfig(grid, scale="absmax", granularity=granularity, activation=Uniform(8))
    layer = nn.Linear(64, 24, bias=bias).to(dtype)
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(layer), config))).eval()
    weight = model[0].dequantize()
    tensor = to_torchao(model[0])
    assert type(tensor).__name__ == "Int8Tensor" and torch.equal(tensor.dequantize(), weight)
    x = (torch.randn(3, 5, 64) * torch.logspace(-3, 3, 15).reshape(3, 5, 1)).to(dtype)
    with torch.no_grad():
        want = model(x).double()
        got = to_torchao_(model)(x).double()
    bound = x.double().abs().amax(-1, keepdim=True) / 127 * weight.double().abs().sum(1)
    size = x.double().abs() @ weight.double().abs().t() + (layer.bias.double().abs() if bias else 0)
    rounding = size * (64 * 2.0**-24 if dtype == torch.float32 else 4 * 2.0**-9)
    assert bool(((got - want).abs() <= bound + rounding).all())
    assert (got - want).abs().mean() < 0.2 * bound.mean()
    assert (got - want).abs().max() > 0  # it is not the same


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_embeddings_and_convolutions(kind, granularity):
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao, to_torchao_

    torch.manual_seed(0)
    config = ak.QuantConfig(Uniform(4), "absmax", granularity, 8 if granularity == "per_group" else None)
    plain = nn.Embedding(20, 32, padding_idx=3) if kind == "embedding" else nn.Conv2d(16, 12, 2, 2, 1, groups=2)
    model = ak.pack_(ak.quantize_(nn.Sequential(plain), config, kinds=kind), force=True).eval()
    x = torch.randint(0, 20, (2, 5)) if kind == "embedding" else torch.randn(2, 16, 9, 9)
    if kind == "conv2d" and granularity == "per_group":
        with pytest.raises(ValueError, match="^0: intx: expected one scale for the tensor or each channel of conv2d"):
            to_torchao_(model)
        return
    with torch.no_grad():
        want = model(x)
        assert torch.equal(to_torchao(model[0]).dequantize(), model[0].dequantize())
        torch.testing.assert_close(to_torchao_(model)(x), want)


# ---- files -----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.image = nn.Embedding(20, 64), nn.Conv2d(1, 4, 3, padding=1)
        self.norm, self.first, self.last = nn.BatchNorm2d(4), nn.Linear(64, 64), nn.Linear(64, 8, bias=False)

    def forward(self, i):
        x = self.table(i)
        return self.last(self.first(x).relu() + self.norm(self.image(x[:, None])).mean(1))


def mixed(dtype=torch.float32, **options):
    grids = {"table": ak.QuantConfig(Uniform(8), "absmax"), "image": ak.QuantConfig(Uniform(5), "absmax"),
             "first": ak.QuantConfig(Uniform(4), "absmax", "per_group", 16),
             "last": ak.QuantConfig(Uniform(8, narrow=True), "absmax", activation=Uniform(8))}  # fmt: skip
    model = ak.hard_quantize_(ak.quantize_(Mixed().to(dtype), grids | options, kinds=("linear", "conv", "embedding")))
    return ak.pack_(model).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_torchaos_and_gives_the_model_back(dtype, tmp_path):
    pytest.importorskip("torchao")
    from askew_kernels.deploy import to_torchao

    model, path = mixed(dtype), tmp_path / "m.safetensors"
    contents = contents_of(model)
    to_torchao.export(contents, path)
    assert to_torchao.is_one(path)
    weights, reader = to_torchao.dequantized(path)
    assert reader.startswith("torchao ") and weights.keys() == contents.layers.keys()
    for name, layer in contents.layers.items():
        assert torch.equal(weights[name], layer.dequantize())
    again = to_torchao.read(path)
    assert again.tensors.keys() == contents.tensors.keys()
    for name, layer in contents.layers.items():
        other = again.layers[name]
        assert other.config == layer.config and torch.equal(other.weight_codes, layer.weight_codes)
        assert torch.equal(other.weight_scale, layer.weight_scale) and other.weight_dtype == dtype
    write_contents(again, tmp_path / "ours.safetensors")
    assert not to_torchao.is_one(tmp_path / "ours.safetensors")
    i = torch.randint(0, 20, (2, 5))
    with torch.no_grad():
        assert torch.equal(ak.load_packed(tmp_path / "ours.safetensors", Mixed().to(dtype).eval())(i), model(i))


def test_a_file_names_what_it_cannot_hold(tmp_path):
    pytest.importorskip("torchao")
    from askew_kernels.deploy import to_torchao

    path = tmp_path / "m.safetensors"
    contents = contents_of(mixed(first=ak.QuantConfig(Codebook(NF4), "absmax")))
    with pytest.raises(PackedFileError, match=r"^Mixed: first: torchao's tensors hold integer levels"):
        to_torchao.export(contents, path)
    with pytest.raises(PackedFileError, match=r"^Mixed: last: int8: torchao quantizes inputs to 8 signed bits"):
        to_torchao.export(contents_of(mixed(last=ak.QuantConfig(Uniform(4), activation=Uniform(4)))), path)
    assert not path.exists()
    to_torchao.export(contents, path, dense=["fir*"])
    again = to_torchao.read(path)
    assert "first" not in again.layers and torch.equal(again.tensors["first.weight"], contents.weights()["first"])
    with pytest.raises(PackedFileError, match="not a file of torchao's tensors"):
        to_torchao.read(saved(contents, tmp_path / "ours.safetensors"))
    with pytest.raises(FileNotFoundError):
        to_torchao.read(tmp_path / "none.safetensors")


def saved(contents, path):
    write_contents(contents, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4 group", "int8 channel", "int8 inputs"])
def test_files_of_others(name, dtype, tmp_path):
    """What torchao's own quantizers made of a float model."""
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    from askew_kernels.deploy import to_torchao

    config = {
        "int4 group": lambda: torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(32)),
        "int8 channel": lambda: torchao.Int8WeightOnlyConfig(version=2),
        "int8 inputs": lambda: torchao.Int8DynamicActivationInt8WeightConfig(version=2),
    }[name]()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).to(dtype)
    torchao.quantize_(model, config)
    state = {k: v.data if isinstance(v, nn.Parameter) else v for k, v in model.state_dict().items()}
    flat, metadata = flatten_tensor_state_dict(state)
    tensorfile.write(tmp_path / "m.safetensors", flat, metadata, "", lambda sums: "")
    weights, _ = to_torchao.dequantized(tmp_path / "m.safetensors")
    read = to_torchao.read(tmp_path / "m.safetensors")
    assert sorted(read.layers) == sorted(weights) == ["0", "2"] and sorted(read.tensors) == ["0.bias", "2.bias"]
    for key, layer in read.layers.items():
        assert torch.equal(layer.dequantize(), weights[key]) and layer.weight_dtype == dtype
        assert layer.config.weight == Uniform(4 if "int4" in name else 8)
        assert layer.config.activation == (Uniform(8) if "inputs" in name else None)


def test_damaged_files_are_errors(tmp_path):
    pytest.importorskip("torchao")
    from askew_kernels.deploy import to_torchao

    good, path, rng, read = tmp_path / "good.safetensors", tmp_path / "m.safetensors", random.Random(0), 0
    to_torchao.export(contents_of(mixed()), good)
    data = good.read_bytes()
    header = int.from_bytes(data[:8], "little")
    for i in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(8 + header if i % 2 else len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            to_torchao.read(path)
            read += 1
        except PackedFileError as error:
            assert str(path) in str(error)
    assert read > 5  # most of the file is its header
    metadata = files.read_safetensors(good).metadata
    said = json.loads(metadata["last.weight"])
    for change in (
        {"_type": "NVFP4Tensor"},
        {"_type": "os.system"},
        {"_data": None},
        {"_tensor_data_names": ["qdata"]},
        {"_data": said["_data"] | {"block_size": [1, 0]}},
        {"_data": said["_data"] | {"block_size": [1, 3]}},
    ):
        wrong = metadata | {"last.weight": json.dumps(said | change)}
        tensorfile.write(path, files.read_safetensors(good).tensors, wrong, "", lambda sums: "")
        with pytest.raises(PackedFileError, match="m.safetensors: (last: |not a file of torchao)"):
            to_torchao.read(path)


def test_transposed_layers(tmp_path):
    """Conv1D of transformers, whose weight is (inputs, outputs), is a linear layer to torchao; a file, which keeps the
    model's names for a model that is not changed, cannot hold it."""
    pytest.importorskip("torchao")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    from askew_kernels.deploy import to_torchao

    torch.manual_seed(0)
    config = ak.QuantConfig(Uniform(4), "absmax", activation=Uniform(8))
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(conv1d(12, 32)), config))).eval()
    weight, x = model[0].dequantize(), torch.randn(3, 32)
    with pytest.raises(PackedFileError, match="^Sequential: 0: torchao multiplies by weights .*transposed_linear"):
        to_torchao.export(contents_of(model), tmp_path / "m.safetensors")
    with torch.no_grad():
        want = model(x)
        got = to_torchao.to_torchao_(model)(x)
    assert torch.equal(model[0].weight.dequantize().t(), weight)
    bound = x.abs().amax(1, keepdim=True) / 127 * weight.abs().sum(0)
    assert bool(((got - want).abs() <= bound * (1 + 1e-5)).all())
