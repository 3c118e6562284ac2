"""Contract: packed models in other hands.

1. ``torch.compile(fullgraph=True)`` and ``torch.export`` give what the model gives.
2. ONNX files hold integers of 4 or 8 bits, and onnxruntime computes the model's outputs from them, whatever layers
   share.
3. torchao's tensors hold the same weights. What neither holds (codebooks, wide levels, quantized inputs) is refused by
   the layer's name.
4. Linear layers of a ``transformers`` model are quantized by pattern, packed, saved and loaded.
"""

from __future__ import annotations

import pytest
import torch
from oracles import NF4
from torch import nn

import askew_kernels as ak
from askew_kernels.quant import Binary, Codebook, Ternary, Uniform

CONFIGS = {
    "int4 tensor": ak.QuantConfig(Uniform(4), granularity="per_tensor"),
    "int4 channel": ak.QuantConfig(Uniform(4), scale="absmax"),
    "int4 group": ak.QuantConfig(Uniform(4), granularity="per_group", group_size=16, scale="absmax"),
    "int8": ak.QuantConfig(Uniform(8), scale="absmax"),
    "binary": ak.QuantConfig(Binary(), scale="mean"),
    "ternary": ak.QuantConfig(Ternary(), scale="mean"),
}


def build():
    return nn.Sequential(nn.Conv2d(16, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 32, bias=False),
                         nn.ReLU(), nn.Linear(32, 5))  # fmt: skip


def packed(config, **options):
    torch.manual_seed(2)
    return ak.pack_(ak.quantize_(build(), config), force=True, **options).eval()


X = torch.randn(3, 16, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_compiled_without_graph_breaks(activations):
    model = packed(CONFIGS["int4 group"], activations=activations)
    with torch.no_grad():
        want = model(X)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(got, want)


def test_exported():
    model = packed(CONFIGS["ternary"])
    with torch.no_grad():
        program = torch.export.export(model, (X,))
        torch.testing.assert_close(program.module()(X), model(X))
        assert any("packed_linear" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", CONFIGS)
def test_onnx(name, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from askew_kernels.deploy.to_onnx import export_onnx

    model, path = packed(CONFIGS[name]), tmp_path / "model.onnx"
    export_onnx(model, X, path, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    kinds = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
    integers = onnx.TensorProto.INT8 if name == "int8" else onnx.TensorProto.INT4
    assert [kinds[f"{i}.weight_levels"] for i in (0, 3, 5)] == [integers] * 3
    assert not any(k.endswith(".weight") for k in kinds)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(session.run(None, {"x": X.numpy()})[0]), model(X), rtol=1e-4, atol=1e-4)


def run_onnx(model, x, path):
    """onnxruntime's output for x, and the names of the file's initialisers."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from askew_kernels.deploy.to_onnx import export_onnx

    export_onnx(model, x, path, input_names=["x"])
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {t.name for t in onnx.load(path).graph.initializer}
    return torch.tensor(session.run(None, {"x": x.numpy()})[0]), names


class Sharing(nn.Module):
    """Copies, ties and layers that nobody calls, among layers of one shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.table = nn.Embedding(16, 16)
        self.first, self.copied, self.tied, self.again = (nn.Linear(16, 16) for _ in range(4))
        self.unused, self.head = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.copied.load_state_dict(self.first.state_dict())
        self.tied.weight = self.first.weight
        self.again = self.first

    def forward(self, i):
        x = self.again(self.tied(self.copied(self.first(self.table(i)).relu())).relu())
        return self.head(x)


@pytest.mark.parametrize("name", ["int4 tensor", "int4 channel", "int4 group", "ternary"])
def test_onnx_of_layers_that_share(name, tmp_path):
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(Sharing(), CONFIGS[name]))).eval()
    model.table.weight = nn.Parameter(model.head.dequantize())  # equal to a packed weight, and not packed itself
    i = torch.arange(12)
    got, names = run_onnx(model, i, tmp_path / "m.onnx")
    with torch.no_grad():
        torch.testing.assert_close(got, model(i), rtol=1e-4, atol=1e-4)
    assert sum(n.endswith(".weight_levels") for n in names) == 2 and not any(n.endswith(".weight") for n in names)


def test_onnx_of_levels_at_the_ends_of_8_bits(tmp_path):
    for levels in ([-128, -3, 0, 127], [0, 1, 100, 255], [0, 2, 7, 15]):
        model = packed(ak.QuantConfig(Codebook([float(c) for c in levels]), scale="absmax"))
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(model, X, tmp_path / "m.onnx")[0], model(X), rtol=1e-4, atol=1e-4)


def test_onnx_names_what_it_cannot_hold(tmp_path):
    pytest.importorskip("onnx")
    from askew_kernels.deploy.to_onnx import export_onnx

    for config, message in {
        ak.QuantConfig(Codebook(NF4), scale="absmax"): "^0: ONNX files hold integer levels",
        ak.QuantConfig(Codebook([-300.0, 0.0, 300.0]), scale="absmax"): "^0: ONNX files hold levels of 8 bits",
        ak.QuantConfig(Codebook([-1.0, 0.0, 255.0]), scale="absmax"): "^0: ONNX files hold levels of 8 bits",
        ak.QuantConfig(Uniform(4), activation=Uniform(3)): "^0: ONNX files keep no quantized inputs",
    }.items():
        with pytest.raises(ValueError, match=message):
            export_onnx(packed(config), X, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_files_are_written_whole(tmp_path):
    path = tmp_path / ("m" * 250 + ".onnx")
    link = tmp_path / "latest"
    link.symlink_to(path)
    run_onnx(packed(CONFIGS["int4 channel"]), X, link)
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["latest", path.name]


def test_a_llama_by_pattern(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")

    def small():
        torch.manual_seed(3)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32)).eval()  # fmt: skip

    config = ak.QuantConfig(Uniform(4), scale="absmax", granularity="per_group", group_size=32)
    model = ak.quantize_(small(), {"model.layers.*": config})
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        want = ak.hard_quantize_(model)(tokens).logits
        got = ak.pack_(model)(tokens).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        ak.save_packed(model, tmp_path / "llama.safetensors")
        loaded = ak.load_packed(tmp_path / "llama.safetensors", small())
        assert torch.equal(loaded(tokens).logits, got)
    assert len(ak.nn.packed_layers(loaded)) == 14 and type(loaded.lm_head) is nn.Linear


# ---- torchao --------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="format: expected one of intx, int4, got 'int3'"):
        to_torchao(nf4[0], "int3")
    with pytest.raises(TypeError, match="layer: expected a PackedLinear, got Linear"):
        to_torchao(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: has no PackedLinear"):
        to_torchao_(nn.Sequential(nn.Linear(2, 2)))
