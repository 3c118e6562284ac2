"""Contract: transformers' method "metal" unpacks our weights, and what it holds comes back.

1. Grids of integers from -128 to 127 with scales of bfloat16 or float16: transformers' own unpacking gives the weights
   bit for bit; words are a view of the codes; ``read`` gives the codes back.
2. A whole folder loads by transformers (which unpacks where no Apple GPU is) with the hard-quantized model's logits.
3. What does not fit is an error that names the layer.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.deploy import metal
from askew_kernels.deploy.export import compare, export_packed
from askew_kernels.deploy.files import PackedFileError

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.metal_quantization")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Uniform = ak.quant.Uniform
GRIDS = {"2": Uniform(2), "4": Uniform(4), "8": Uniform(8), "3": Uniform(3), "narrow": Uniform(8, narrow=True),
         "ternary": ak.quant.Ternary(), "fp4": ak.quant.FP4()}  # fmt: skip


def packed(grid=GRIDS["4"], cols=64, dtype=torch.float32, scale_dtype="bfloat16", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(cols, 6), nn.Linear(32, 6)).to(dtype)
    ak.quantize_(model, ak.QuantConfig(grid, scale_dtype=scale_dtype, **options))
    return ak.pack_(ak.hard_quantize_(model))


@pytest.mark.parametrize("dtype, scale_dtype", [(torch.float32, "bfloat16"), (torch.float32, "float16"),
                                                (torch.bfloat16, "bfloat16"), (torch.float16, "float16")])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"granularity": "per_tensor"}, {"granularity": "per_group", "group_size": 32}],
                         ids=["channel", "tensor", "group"])  # fmt: skip
@pytest.mark.parametrize("grid", GRIDS)
def test_transformers_unpacks_our_weights(grid, options, dtype, scale_dtype, tmp_path):
    model = packed(GRIDS[grid], dtype=dtype, scale_dtype=scale_dtype, **options)
    contents = export_packed(model, tmp_path / "out", "metal")
    rows, reader = compare(contents, tmp_path / "out", "metal")
    assert [row.difference for row in rows] == [0.0, 0.0] and reader.startswith("transformers ")
    for name, layer in metal.read(tmp_path / "out").layers.items():
        ours = contents.layers[name]
        assert torch.equal(layer.dequantize(), ours.dequantize())
        if grid in "248":
            assert torch.equal(layer.weight_codes, ours.weight_codes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_transformers_gives_the_logits_of_the_model(bits, tied, tmp_path):
    torch.manual_seed(1)
    shape = transformers.LlamaConfig(vocab_size=48, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=128, num_key_value_heads=1, tie_word_embeddings=tied,
                                     max_position_embeddings=32)  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).eval()
    tokens = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(3))
    ak.hard_quantize_(ak.quantize_(model, ak.QuantConfig.for_export(f"metal:{bits}")))
    with torch.no_grad():
        y = model(tokens).logits
        contents = export_packed(ak.pack_(model), tmp_path / "out", "metal", dense=["*.o_proj"])
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
        assert torch.equal(other(tokens).logits, y)
    rows, _ = compare(contents, tmp_path / "out", "metal")
    assert {row.difference for row in rows} == {0.0}
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["bits"], told["group_size"]) == ("metal", bits, 64)
    assert len(told["modules_to_not_convert"]) == 3  # the embedding and the two dense layers


@pytest.mark.parametrize("make, text", [
    (lambda: packed(Uniform(8, signed=False)), "0: .*-128 to 127"), (lambda: packed(ak.quant.NF4()), "0: .*integer"),
    (lambda: packed(scale_dtype="float32"), "0: weight_scale"), (lambda: packed(cols=48), "0: group_size"),
    (lambda: packed(granularity="per_group", group_size=16), "0: group_size"),
    (lambda: packed(activation=Uniform(8)), "0: .*inputs"),
], ids=["unsigned", "nf4", "scales", "columns", "groups", "inputs"])  # fmt: skip
def test_what_does_not_fit_names_the_layer(make, text, tmp_path):
    with pytest.raises(PackedFileError, match=f"Sequential: {text}"):
        export_packed(make(), tmp_path / "out", "metal")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, text", [
    (lambda told, t: told.update(bits=3), "bits"), (lambda told, t: told.update(group_size=0), "group_size"),
    (lambda told, t: told.update(group_size=24), "0: scales"), (lambda told, t: told.update(bits=2), "0: scales"),
    (lambda told, t: t["0.qbiases"].mul_(2), "0: qbiases"), (lambda told, t: t["0.scales"].mul_(0), "0: scales"),
    (lambda told, t: t.pop("0.qbiases"), "0: "), (lambda told, t: t.update({"0.weight": torch.zeros(6, 8)}), "0: "),
], ids=["bits", "no groups", "groups", "sizes", "biases", "scales", "missing", "floats"])  # fmt: skip
def test_damaged_folders_are_errors(change, text, tmp_path):
    export_packed(packed(), tmp_path / "out", "metal")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    change(config["quantization_config"], tensors)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(PackedFileError, match=text):
        metal.read(tmp_path / "out")
