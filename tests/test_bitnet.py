"""Contract: transformers' method "bitnet" unpacks our ternary weights, and what it holds comes back.

1. transformers' own unpacking gives the weights bit for bit; ``read`` gives the codes back.
2. A whole folder loads by transformers, with the weights of the model; its outputs differ by the roundings of inputs,
   whose scales transformers makes itself.
3. What does not fit is an error that names the layer.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.deploy import bitnet
from askew_kernels.deploy.export import compare, export_packed
from askew_kernels.deploy.files import PackedFileError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Ternary, Uniform = ak.quant.Ternary, ak.quant.Uniform
TRAINED = {"granularity": "per_tensor", "activation": Uniform(8)}


def packed(rows=8, dtype=torch.float32, grid=None, bias=False, trits=False, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, rows, bias=bias)).to(dtype)
    ak.quantize_(model, ak.QuantConfig(grid or Ternary(), **{**TRAINED, **options}))
    return ak.pack_(ak.hard_quantize_(model), trits=trits)


@pytest.mark.parametrize("trits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_unpacks_our_weights(dtype, trits, tmp_path):
    scale_dtype = "float32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    contents = export_packed(packed(dtype=dtype, trits=trits, scale_dtype=scale_dtype), tmp_path / "out", "bitnet")
    rows, reader = compare(contents, tmp_path / "out", "bitnet")
    assert [row.difference for row in rows] == [0.0] and reader.startswith("transformers ")
    layer, ours = bitnet.read(tmp_path / "out").layers["0"], contents.layers["0"]
    assert torch.equal(layer.dequantize(), ours.dequantize()) and layer.config.activation == Uniform(8)
    assert trits or torch.equal(layer.weight_codes, ours.weight_codes)


def test_a_whole_model(tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(1)
    shape = transformers.LlamaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, num_key_value_heads=1)  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).eval()
    tokens = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(3))
    ak.hard_quantize_(ak.quantize_(model, ak.QuantConfig(Ternary(), **TRAINED)))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        y = model(tokens).logits
        contents = export_packed(ak.pack_(model), tmp_path / "out", "bitnet", dense=["lm_head"])
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        for name, layer in contents.layers.items():
            theirs = other.get_submodule(name)
            assert torch.equal(theirs.weight * getattr(theirs, "weight_scale", 1), layer.dequantize())
        got = other(tokens).logits
    assert float((got - y).norm() / y.norm()) < 0.05  # two roundings of 8 bits, and a head with float inputs


@pytest.mark.parametrize("make, text", [
    (lambda: packed(grid=Uniform(4)), "Ternary"), (lambda: packed(granularity="per_channel"), "per_tensor"),
    (lambda: packed(activation=None), "activation"), (lambda: packed(rows=6), "out_features"),
    (lambda: packed(bias=True), "bias"), (lambda: packed(dtype=torch.float16), "weight_scale"),
], ids=["grid", "scales", "inputs", "rows", "bias", "type"])  # fmt: skip
def test_what_does_not_fit_names_the_layer(make, text, tmp_path):
    with pytest.raises(PackedFileError, match=f"Sequential: 0: .*{text}"):
        export_packed(make(), tmp_path / "out", "bitnet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, text", [
    (lambda told, t: told.update(quantization_mode="online"), "quantization_mode"),
    (lambda told, t: t["0.weight"].fill_(255), "0: weight"), (lambda told, t: t["0.weight_scale"].mul_(-1), "positive"),
    (lambda told, t: t.update({"0.weight_scale": torch.ones(8)}), "weight_scale"),
    (lambda told, t: t.update({"0.weight": torch.zeros(2, 13)}), "uint8"),
], ids=["mode", "levels", "sign", "scales", "floats"])  # fmt: skip
def test_damaged_folders_are_errors(change, text, tmp_path):
    export_packed(packed(), tmp_path / "out", "bitnet")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    change(config["quantization_config"], tensors)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(PackedFileError, match=text):
        bitnet.read(tmp_path / "out")
