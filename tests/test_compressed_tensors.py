"""Contract: what is packed here decompresses there, and back.

1. Every grid of integers from -128 to 127, any granularity, type and number of columns, linear layers and embeddings:
   the package's compressor gives the very weights, and ``read`` the very codes. Where codes fill words they are a view.
2. A whole folder loads by transformers and gives the hard-quantized model's logits, bit for bit; mixed bits, tied
   heads, layers left dense; its config says what vLLM's loader reads.
3. What does not fit is an error that names the layer; damaged and foreign folders are errors, and run nothing.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.deploy import compressed_tensors as ct
from askew_kernels.deploy.contents import contents_of, write_contents
from askew_kernels.deploy.export import compare, export_packed
from askew_kernels.deploy.files import PackedFileError

package = pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
safetensors = pytest.importorskip("safetensors.torch")

Uniform = ak.quant.Uniform
GRIDS = {
    **{f"uniform{k}": Uniform(k) for k in range(2, 9)},
    "narrow": Uniform(4, narrow=True),
    "unsigned": Uniform(4, signed=False),
    "ternary": ak.quant.Ternary(),
    "binary": ak.quant.Binary(),
    "fp4": ak.quant.FP4(),
    "powers": ak.quant.PowersOfTwo(4),
    "codebook": ak.quant.Codebook((-3, -1, 0, 2)),
}
BITS = {"narrow": 4, "unsigned": 5, "ternary": 2, "binary": 2, "fp4": 5, "powers": 8, "codebook": 3}  # the narrowest


def packed(grid, cols=40, rows=6, dtype=torch.float32, kinds=("linear", "embedding"), **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(rows, cols), nn.Linear(cols, rows)).to(dtype)
    scale_dtype = "float32" if dtype in (torch.float32, torch.float64) else str(dtype).removeprefix("torch.")
    ak.quantize_(model, ak.QuantConfig(grid, scale_dtype=scale_dtype, **options), kinds=kinds)
    return ak.pack_(ak.hard_quantize_(model))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("cols", [7, 32, 40, 129])
@pytest.mark.parametrize("options", [{}, {"granularity": "per_tensor"}, {"granularity": "per_group", "group_size": 8}],
                         ids=["channel", "tensor", "group"])  # fmt: skip
def test_the_package_decompresses_to_our_weights(name, cols, options, tmp_path):
    if options.get("group_size") and cols % 8:
        pytest.skip("groups must divide the columns")
    model = packed(GRIDS[name], cols, **options)
    contents = export_packed(model, tmp_path / "out", "compressed-tensors")
    rows, reader = compare(contents, tmp_path / "out", "compressed-tensors")
    assert [row.difference for row in rows] == [0.0, 0.0] and reader.startswith("compressed-tensors ")
    assert {ct.scheme_of(layer).bits for layer in contents.layers.values()} == {BITS.get(name) or GRIDS[name].bits}
    for key, layer in ct.read(tmp_path / "out").layers.items():
        ours = contents.layers[key]
        assert layer.kind is ours.kind and torch.equal(layer.dequantize(), ours.dequantize())
        if name.startswith("uniform"):
            assert torch.equal(layer.weight_codes, ours.weight_codes) and layer.config.weight == ours.config.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_type(dtype, tmp_path):
    contents = export_packed(packed(Uniform(4), dtype=dtype), tmp_path / "out", "compressed-tensors")
    rows, _ = compare(contents, tmp_path / "out", "compressed-tensors")
    assert {row.difference for row in rows} == {0.0}
    written = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert written["1.weight_scale"].dtype == dtype and written["1.weight_packed"].dtype == torch.int32


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_the_packages_and_views_where_rows_are_whole_words(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for cols in (32, 40, 33):
        layer = packed(Uniform(bits), cols)[1]
        words = ct.words(layer, bits)
        levels = torch.round(layer.dequantize() / layer.weight_scale[:, None]).to(torch.int8)
        assert torch.equal(words, pack_to_int32(levels, bits))
        whole = bits * cols % 32 == 0
        assert (words.data_ptr() == layer.weight_codes.data_ptr()) == whole


# ---- whole models ----------------------------------------------------------------------------------------------------

TEXT = dict(vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
TOKENS = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(3))


def llama(config, dtype=torch.float32, tied=False, kinds=("linear",)):
    """(packed model, logits of the hard-quantized one)"""
    torch.manual_seed(1)
    shape = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()
    ak.hard_quantize_(ak.quantize_(model, config, kinds=kinds))
    with torch.no_grad():
        y = model(TOKENS).logits
    return ak.pack_(model), y


def logits(folder, **options):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_gives_the_logits_of_the_model(bits, dtype, tmp_path):
    config = ak.QuantConfig.for_export(f"compressed-tensors:{bits}", group_size=32)
    model, y = llama(config, dtype)
    export_packed(model, tmp_path / "out", "compressed-tensors")
    assert torch.equal(logits(tmp_path / "out"), y)


# ---- MXFP4 and NVFP4 -------------------------------------------------------------------------------------------------

FP4S = {"nvfp4": (16, torch.float8_e4m3fn), "mxfp4": (32, torch.uint8)}


def float4(name, cols=64, rows=6, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(rows, cols), nn.Linear(cols, rows)).to(dtype)
    with torch.no_grad():
        model[1].weight[2] *= 1e-3  # rows of other sizes, and one of zeros
        model[1].weight[4] = 0
    config = ak.QuantConfig.for_export(name, **options)
    return ak.pack_(ak.hard_quantize_(ak.quantize_(model, config, kinds=("linear", "embedding"))))


@pytest.mark.parametrize("options", [{}, {"group_size": 64}, {"granularity": "per_channel"},
                                     {"granularity": "per_tensor"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FP4S)
def test_the_package_decompresses_floats_of_four_bits_to_our_weights(name, dtype, options, tmp_path):
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    model, (block, stored) = float4(name, dtype=dtype, **options), FP4S[name]
    contents = export_packed(model, tmp_path / "out", "compressed-tensors")
    rows, _ = compare(contents, tmp_path / "out", "compressed-tensors")
    assert [row.difference for row in rows] == [0.0, 0.0]
    written = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    scale = written["1.weight_scale"]
    assert scale.dtype == stored and scale.shape == (6, 64 // block)
    if name == "nvfp4":
        unit = 1 / written["1.weight_global_scale"]
        ours = (scale.float() * unit).reshape(-1)
    else:
        ours = torch.exp2(scale.float() - 127).reshape(-1)
    ours = ours.repeat_interleave(block).reshape(6, 64)
    levels = unpack_fp4_from_uint8(written["1.weight_packed"], 6, 64).float()
    assert torch.equal(levels * ours, model[1].dequantize().float())
    for key, layer in ct.read(tmp_path / "out").layers.items():
        assert (
            layer.config.weight == ak.quant.FP4()
            and layer.config.scale_dtype == contents.layers[key].config.scale_dtype
        )
        assert torch.equal(layer.dequantize().float(), contents.layers[key].dequantize().float())
        assert torch.equal(layer.weight_codes, contents.layers[key].weight_codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FP4S)
def test_transformers_gives_the_logits_of_floats_of_four_bits(name, dtype, tmp_path):
    model, y = llama(ak.QuantConfig.for_export(name), dtype)
    export_packed(model, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == f"{name}-pack-quantized"
    got = logits(tmp_path / "out")  # a model of another type is loaded in bfloat16, in which its weights are the same
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), y.float(), rtol=0, atol=0 if dtype == torch.bfloat16 else 0.05)


def test_projections_that_readers_fuse_share_a_global_scale(tmp_path, caplog):
    transformers.set_seed(1)
    shape = transformers.LlamaConfig(**TEXT, num_key_value_heads=1)
    model = transformers.AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 9
        model.model.layers[0].mlp.up_proj.weight *= 40
        model.model.layers[1].mlp.up_proj.weight *= 2.0**20
    ak.pack_(ak.hard_quantize_(ak.quantize_(model, ak.QuantConfig.for_export("nvfp4"))))
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        contents = export_packed(model, tmp_path / "out", "compressed-tensors")
    rows, _ = compare(contents, tmp_path / "out", "compressed-tensors")
    assert {row.difference for row in rows} == {0.0}
    written = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    found = {key: float(t) for key, t in written.items() if key.endswith("weight_global_scale")}

    def scales(layer, *names):
        return {v for key, v in found.items() for name in names if f"layers.{layer}." in key and f".{name}." in key}

    assert len(scales(0, "q_proj", "k_proj", "v_proj")) == len(scales(0, "gate_proj", "up_proj")) == 1
    assert len(scales(1, "gate_proj", "up_proj")) == 2  # too far from each other
    assert "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj" in caplog.text and "layers.0" not in caplog.text


def test_a_global_scale_of_others_is_read(tmp_path):
    """Theirs is no power of two, and groups of zeros have the scale 0; -0 is 0."""
    export_packed(float4("nvfp4"), tmp_path / "out", "compressed-tensors")
    file = tmp_path / "out" / "model.safetensors"
    written = safetensors.load_file(file)
    written["1.weight_global_scale"] = torch.tensor([448 * 6 / 1.7])
    written["1.weight_scale"][1, 2] = 0
    written["1.weight_packed"][0, 0] = 0x8F
    safetensors.save_file(written, file)
    theirs, _ = ct.dequantized(tmp_path / "out")
    layer = ct.read(tmp_path / "out").layers["1"]
    assert layer.config.scale_dtype == "float32"
    assert torch.equal(layer.dequantize(torch.bfloat16), theirs["1"]) and not layer.dequantize()[1, 32:48].any()


def test_what_floats_of_four_bits_do_not_hold(tmp_path):
    model = float4("nvfp4")
    model[1].weight_scale[0] *= 1.07
    with pytest.raises(PackedFileError, match="1: weight_scale: nvfp4.* keeps scales as float8_e4m3fn"):
        export_packed(model, tmp_path / "out", "compressed-tensors")
    model = float4("mxfp4", dtype=torch.float16)
    model[1].weight_scale[-1] = 2.0**-30
    with pytest.raises(PackedFileError, match="1: weight: readers make it in bfloat16"):
        export_packed(model, tmp_path / "out", "compressed-tensors")
    export_packed(float4("nvfp4"), tmp_path / "out", "compressed-tensors")
    file = tmp_path / "out" / "model.safetensors"
    good = safetensors.load_file(file)
    for key, bad, words in (
        ("1.weight_global_scale", None, "weight_global_scale: NVFP4 has one"),
        ("1.weight_global_scale", torch.tensor([0.0]), "weight_scale: expected finite"),
        ("1.weight_global_scale", torch.ones(2), "weight_global_scale: expected"),
        ("1.weight_scale", good["1.weight_scale"].float(), "weight_scale: expected torch.float8_e4m3fn"),
        ("1.weight_packed", good["1.weight_packed"][:, :7], "weight_packed: expected uint8 of whole blocks"),
    ):
        damaged = {k: v.contiguous() for k, v in (good | {key: bad}).items() if v is not None}
        safetensors.save_file(damaged, file)
        with pytest.raises(PackedFileError, match=f"1: {words}"):
            ct.read(tmp_path / "out")


@pytest.mark.parametrize("kinds", [("linear",), ("linear", "embedding")], ids=len)
def test_tied_heads_are_written_apart_where_one_is_compressed(kinds, tmp_path, caplog):
    model, y = llama(ak.QuantConfig(Uniform(4)), tied=True, kinds=kinds)
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        export_packed(model, tmp_path / "out", "compressed-tensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    options = {}
    if len(kinds) > 1:  # transformers looks for the weight of an embedding before it decompresses it
        assert "dequantize=True" in caplog.text
        options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    assert torch.equal(logits(tmp_path / "out", **options), y)


def test_mixed_bits_and_dense_layers(tmp_path):
    config = {
        "*q_proj": ak.QuantConfig(Uniform(8)),
        "*lm_head": ak.QuantConfig(Uniform(3)),
        "*": ak.QuantConfig(Uniform(4)),
    }
    model, y = llama(config)
    export_packed(model, tmp_path / "out", "compressed-tensors", dense=["lm_head", "*.down_proj"])
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sorted(g["weights"]["num_bits"] for g in told["config_groups"].values()) == [4, 8]
    assert {"lm_head", "model.layers.1.mlp.down_proj", "model.embed_tokens"} <= set(told["ignore"])
    rows, _ = compare(contents_of(model), tmp_path / "out", "compressed-tensors")
    assert {row.difference for row in rows} == {0.0}
    assert torch.equal(logits(tmp_path / "out"), y)


def test_names_of_many_layers_are_looked_up_once():
    """By counting: names were compared with all others for each layer, so that thousands took hours."""
    compared = 0

    class Name(str):
        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    file = ct._File.__new__(ct._File)
    file.path, file.format, count = Path("folder"), "pack-quantized", 200
    file.names = [Name(f"layers.{i}") for i in range(count)]
    file.tensors = {}
    for i in range(count):
        words = torch.zeros(2, 1 + i % 2, dtype=torch.int32)
        parts = {"weight_packed": words, "weight_scale": torch.ones(2, 1), "weight_shape": torch.tensor([2, 8])}
        file.tensors |= {f"layers.{i}.{part}": t for part, t in parts.items()}
    file.groups = {}
    for first, bits in enumerate((4, 8)):
        weights = {"type": "int", "symmetric": True, "strategy": "channel", "num_bits": bits}
        file.groups[bits] = {"targets": [str(name) for name in file.names[first::2]], "weights": weights}
    found = [file.group(name)["weights"]["num_bits"] for name in file.names]
    assert found == [4, 8] * (count // 2) and compared < 20 * count


def test_the_config_is_what_vllm_reads(tmp_path):
    """Its loader asks for these keys, validates weights and input_activations by the package's QuantizationArgs, and
    matches targets by equal names or the name of a class."""
    model, _ = llama(ak.QuantConfig.for_export("compressed-tensors:4", group_size=32))
    export_packed(model, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = config["quantization_config"]
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    assert told["quant_method"] == "compressed-tensors" and told["format"] == "pack-quantized"
    assert told["quantization_status"] == "compressed" and told["ignore"] == ["model.embed_tokens"]
    (group,) = told["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["input_activations"] is None and group["format"] == told["format"]
    args = package.quantization.QuantizationArgs.model_validate(group["weights"])
    assert (args.num_bits, args.strategy, args.group_size, args.symmetric, args.type, args.dynamic, args.actorder) == (
        4, "group", 32, True, "int", False, None)  # fmt: skip
    names = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert {k.rpartition(".")[2] for k in names if ".q_proj." in k} == {"weight_packed", "weight_scale", "weight_shape"}


def test_quantized_inputs_are_kept_and_their_scales_told(tmp_path, caplog):
    """The package makes the scale max|x| / 127.5, we max|x| / 127: one rounding of an input apart, 1/254 of the largest
    of a row, so |y - y'| is at most 1/127 max|x| sum|w| for each layer."""
    model, y = llama(ak.QuantConfig(Uniform(8), activation=Uniform(8)))
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        contents = export_packed(model, tmp_path / "out", "compressed-tensors")
    assert "127.5" in caplog.text
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = told["config_groups"].values()
    assert group["format"] == told["format"] == "int-quantized"
    inputs = package.quantization.QuantizationArgs.model_validate(group["input_activations"])
    assert (inputs.num_bits, inputs.dynamic, inputs.strategy, inputs.symmetric) == (8, True, "token", True)
    rows, _ = compare(contents, tmp_path / "out", "compressed-tensors")
    assert {row.difference for row in rows} == {0.0}
    read = ct.read(tmp_path / "out").layers
    assert {layer.config.activation for layer in read.values()} == {Uniform(8)}
    assert all(torch.equal(read[n].weight_codes, layer.weight_codes) for n, layer in contents.layers.items())
    assert float((logits(tmp_path / "out") - y).norm() / y.norm()) < 0.02


def test_companions_go_along_and_no_path_of_this_machine(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "notes.txt", "weights.bin"):
        (home / name).write_text("{}")
    model, _ = llama(ak.QuantConfig(Uniform(4)))
    model.config._name_or_path = str(home)
    export_packed(model, tmp_path / "out", "compressed-tensors", folder=home)
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def made_by_the_package(folder, weights, targets=("Linear",), ignore=("lm_head",)):
    """A folder as the package itself compresses and saves it; and the weights that it decompresses."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    torch.manual_seed(2)
    shape = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(shape)
    told = {"targets": list(targets), "weights": weights}
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": told}, ignore=list(ignore)))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            top = module.weight.detach().reshape(*module.weight_scale.shape, -1).abs().amax(-1)
            module.weight_scale.data.copy_(top / (2 ** (weights["num_bits"] - 1) - 1))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return {name: m.weight.detach() for name, m in model.named_modules() if hasattr(m, "weight_scale")}


@pytest.mark.parametrize("weights", [
    {"num_bits": 4, "strategy": "group", "group_size": 16}, {"num_bits": 3, "strategy": "channel"},
    {"num_bits": 8, "strategy": "channel"},
], ids=["4", "3", "8"])  # fmt: skip
@pytest.mark.parametrize("targets", [("Linear",), ("re:.*proj",)], ids=["class", "pattern"])
def test_folders_of_the_package_are_read(weights, targets, tmp_path):
    made = made_by_the_package(tmp_path / "theirs", weights, targets)
    read = ct.read(tmp_path / "theirs")
    assert read.layers.keys() == made.keys() and "lm_head.weight" in read.tensors
    for name, layer in read.layers.items():
        assert torch.equal(layer.dequantize(), made[name])
    export_packed(tmp_path / "theirs", tmp_path / "ours", "compressed-tensors")  # and written again
    rows, _ = compare(read, tmp_path / "ours", "compressed-tensors")
    assert {row.difference for row in rows} == {0.0}


def test_asymmetric_folders_of_the_package_are_errors(tmp_path):
    made_by_the_package(tmp_path / "theirs", {"num_bits": 4, "strategy": "channel", "symmetric": False})
    with pytest.raises(PackedFileError, match="weight_zero_point"):
        ct.read(tmp_path / "theirs")


def test_there_and_back_by_the_packed_file(tmp_path):
    model, _ = llama(ak.QuantConfig(Uniform(4)))
    export_packed(model, tmp_path / "out", "compressed-tensors")
    write_contents(ct.read(tmp_path / "out"), tmp_path / "back.safetensors")
    other = transformers.LlamaForCausalLM(model.config).eval()
    ak.load_packed(tmp_path / "back.safetensors", other)
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


EXPERTS = {
    "mixtral": (lambda: transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=3),
                "MixtralForCausalLM", "model.layers.1.block_sparse_moe.experts.2.w2.weight_packed"),
    "qwen": (lambda: transformers.Qwen3MoeConfig(**TEXT, num_key_value_heads=1, num_experts=3, num_experts_per_tok=2,
                                                 moe_intermediate_size=32, head_dim=16), "Qwen3MoeForCausalLM",
             "model.layers.1.mlp.experts.2.down_proj.weight_packed"),
}  # fmt: skip


def mixture(family, config):
    torch.manual_seed(0)
    make, name, key = EXPERTS[family]
    model = getattr(transformers, name)(make()).eval()
    ak.hard_quantize_(ak.quantize_(model, config))
    with torch.no_grad():
        y = model(TOKENS).logits
    return ak.pack_(model), y, key


@pytest.mark.parametrize("mixed", [False, True], ids=["one scheme", "mixed bits"])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_stand_as_checkpoints_have_them(family, mixed, tmp_path):
    config = ak.QuantConfig(Uniform(4), granularity="per_group", group_size=16)
    model, y, key = mixture(family, {"*experts*": config, "*": ak.QuantConfig(Uniform(8))} if mixed else config)
    contents = export_packed(model, tmp_path / "out", "compressed-tensors")
    written = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert key in written and not any("gate_up" in name for name in written)
    rows, _ = compare(contents, tmp_path / "out", "compressed-tensors")
    assert {row.difference for row in rows} == {0.0}
    read = ct.read(tmp_path / "out")
    assert read.layers.keys() == contents.layers.keys() and read.tensors.keys() == contents.tensors.keys()
    assert all(torch.equal(read.layers[n].weight_codes, layer.weight_codes) for n, layer in contents.layers.items())
    assert torch.equal(logits(tmp_path / "out"), y)


def test_experts_of_several_schemes_are_an_error_or_floats(tmp_path):
    config = {"*down_proj": ak.QuantConfig(Uniform(8)), "*": ak.QuantConfig(Uniform(4))}
    model, y, _ = mixture("mixtral", config)
    with pytest.raises(PackedFileError, match="one scheme for all experts"):
        export_packed(model, tmp_path / "out", "compressed-tensors")
    contents = export_packed(model, tmp_path / "out", "compressed-tensors", dense=["*.experts.*"])
    rows, _ = compare(contents, tmp_path / "out", "compressed-tensors")
    assert {row.difference for row in rows} == {0.0} and torch.equal(logits(tmp_path / "out"), y)


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, text", [
    (lambda: packed(Uniform(8, signed=False)), "-128 to 127"),
    (lambda: packed(ak.quant.NF4()), "integer levels"),
    (lambda: packed(Uniform(4), activation=Uniform(4)), "Uniform(8)"),
    (lambda: ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Conv2d(2, 3, 3))))), "conv2d"),
    (lambda: ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Linear(9, 5).bfloat16())))), "bfloat16"),
], ids=["unsigned", "nf4", "inputs", "conv", "scales"])  # fmt: skip
def test_what_does_not_fit_names_the_layer(make, text, tmp_path):
    torch.manual_seed(0)
    model = make()
    with pytest.raises(PackedFileError, match="Sequential: [01]: ") as error:
        export_packed(model, tmp_path / "out", "compressed-tensors")
    assert text in str(error.value) and not list(tmp_path.iterdir())
    export_packed(model, tmp_path / "out", "compressed-tensors", dense=["*"])  # as floats it does


def damaged(folder, change):
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, folder / "model.safetensors")


def group(told):
    return told["config_groups"]["linear_0"]


@pytest.mark.parametrize("change, text", [
    (lambda told, t: group(told)["weights"].update(num_bits=3), "weight_packed: expected int32"),
    (lambda told, t: group(told)["weights"].update(symmetric=False), "symmetric"),
    (lambda told, t: group(told).update(targets=["re:(a+)+$"], weights=None), "weights"),
    (lambda told, t: told.update(config_groups=[1]), "config_groups"),
    (lambda told, t: t.update({"1.weight_shape": torch.tensor([6, 2**40])}), "weight_packed: expected int32"),
    (lambda told, t: t.update({"1.weight_shape": torch.tensor([-6, -40])}), "weight_packed: expected int32"),
    (lambda told, t: t.update({"1.weight_scale": t["1.weight_scale"] * 0}), "positive finite"),
    (lambda told, t: t.update({"1.weight_scale": t["1.weight_scale"].double() * (1 + 2**-40)}), "weight_scale"),
    (lambda told, t: t.update({"1.weight_zero_point": torch.zeros(6, 1)}), "weight_zero_point"),
    (lambda told, t: t.pop("1.weight_packed"), "missing"),
    (lambda told, t: group(told).update(input_activations={"num_bits": 8, "dynamic": False}), "input_activations"),
], ids=str)  # fmt: skip
def test_damaged_folders_are_errors(change, text, tmp_path):
    export_packed(packed(Uniform(4), kinds=("linear",)), tmp_path / "out", "compressed-tensors")
    damaged(tmp_path / "out", change)
    with pytest.raises(PackedFileError) as error:
        ct.read(tmp_path / "out")
    assert text in str(error.value) and str(tmp_path / "out") in str(error.value)


def test_random_bytes_are_errors_or_the_same(tmp_path):
    """Any byte of config or header changed: PackedFileError, or a folder that still says something valid."""
    export_packed(packed(Uniform(4)), tmp_path / "out", "compressed-tensors")
    numbers = random.Random(0)
    for _ in range(150):
        shutil.copytree(tmp_path / "out", tmp_path / "bad", dirs_exist_ok=True)
        file = tmp_path / "bad" / numbers.choice(["config.json", "model.safetensors"])
        data = bytearray(file.read_bytes())
        data[numbers.randrange(min(len(data), 900))] = numbers.randrange(256)
        file.write_bytes(bytes(data))
        try:
            ct.read(tmp_path / "bad")
        except PackedFileError:
            pass


def test_shards_are_read_and_stay_inside_the_folder(tmp_path):
    export_packed(packed(Uniform(4)), tmp_path / "out", "compressed-tensors")
    whole = ct.read(tmp_path / "out")
    tensors = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    names = sorted(tensors)
    places = {k: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, k in enumerate(names)}
    for file in set(places.values()):
        safetensors.save_file({k: tensors[k] for k in names if places[k] == file}, tmp_path / "out" / file)
    (tmp_path / "out" / "model.safetensors").unlink()
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for name, layer in ct.read(tmp_path / "out").layers.items():
        assert torch.equal(layer.dequantize(), whole.layers[name].dequantize())
    for wrong in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "missing.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {**places, names[0]: wrong}}))
        with pytest.raises((PackedFileError, FileNotFoundError)):
            ct.read(tmp_path / "out")
