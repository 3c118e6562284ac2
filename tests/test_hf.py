"""Contract: transformers loads, trains and saves models of this library's layers by its own calls.

1. ``export`` and ``save_pretrained`` of a packed model, then ``from_pretrained``: the same outputs bit for bit, for
   every family, type, shard and tie; scales keep their type; nothing is missing or unexpected.
2. ``from_pretrained(quantization_config=AskewConfig(…))`` quantizes for training: as ``quantize_`` by hand; ``Trainer``
   trains with our optimizer, resumes bit for bit, and its checkpoints load.
3. Whatever was done to the model in between, ``save_pretrained`` says what it is now.
4. transformers finds this without being imported by it. What does not fit is an error that names the layer.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.__main__ import main
from askew_kernels.deploy import hf
from askew_kernels.deploy.contents import contents_of
from askew_kernels.deploy.export import compare, export_packed
from askew_kernels.deploy.files import PackedFileError
from askew_kernels.deploy.hf import registration
from askew_kernels.nn.layers import QuantizedLayer
from askew_kernels.nn.packed import PackedLayer

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Uniform = ak.quant.Uniform
CONFIG = ak.QuantConfig(Uniform(4))
TEXT = dict(vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
IMAGE = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16,
             patch_size=8)  # fmt: skip
SPEECH = dict(vocab_size=48, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
              decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, pad_token_id=0,
              max_source_positions=10, max_target_positions=20, bos_token_id=1, eos_token_id=2,
              decoder_start_token_id=1)  # fmt: skip
NOISE = torch.Generator().manual_seed(3)
TOKENS = torch.randint(3, 48, (2, 7), generator=NOISE)
PIXELS, SOUND = torch.randn(2, 3, 16, 16, generator=NOISE), torch.randn(2, 8, 20, generator=NOISE)
WORDS = {"input_ids": TOKENS}

t = transformers
GROUPED = dict(TEXT, num_key_value_heads=1)
FAMILIES = {
    "bert": (lambda: t.BertForMaskedLM(t.BertConfig(**TEXT)), WORDS),
    "bert-base": (lambda: t.BertModel(t.BertConfig(**TEXT)), WORDS),
    "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=2)), WORDS),
    "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, tie_word_embeddings=False)), WORDS),
    "llama-tied": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, tie_word_embeddings=True)), WORDS),
    "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED)), WORDS),
    "qwen2": (lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED, tie_word_embeddings=True)), WORDS),
    "gemma": (lambda: t.GemmaForCausalLM(t.GemmaConfig(**GROUPED, head_dim=16)), WORDS),
    "mixtral": (lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=2)), WORDS),
    "t5": (lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=48, d_model=32, d_kv=16, d_ff=48, num_layers=1,
                                                           num_heads=2, decoder_start_token_id=0)),
           {**WORDS, "decoder_input_ids": TOKENS}),
    "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE)), {"pixel_values": PIXELS}),
    "clip": (lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=24)),
             {**WORDS, "pixel_values": PIXELS}),
    "whisper": (lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**SPEECH)),
                {"input_features": SOUND, "decoder_input_ids": TOKENS}),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)
EVERY_KIND = ("linear", "conv", "experts", "embedding")
every_kind = pytest.mark.parametrize("kinds", [("linear", "conv"), EVERY_KIND], ids=["products", "all"])


def outputs(model, inputs=WORDS):
    with torch.no_grad():
        return {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}


def same(a, b):
    return a.keys() == b.keys() and all(map(torch.equal, a.values(), b.values()))


def quantized(family, kinds=("linear", "conv"), config=CONFIG, dtype=None):
    """(model, inputs)"""
    torch.manual_seed(0)
    make, inputs = FAMILIES[family]
    model = make() if dtype is None else t.AutoModelForCausalLM.from_config(make().config, dtype=dtype)
    return ak.quantize_(model.eval(), config, kinds=kinds), inputs


def packed(family, *args, **options):
    model, inputs = quantized(family, *args, **options)
    return ak.pack_(ak.hard_quantize_(model)), inputs


def loaded(kind, folder, **options):
    """The model, after checking that the loader missed nothing."""
    model, info = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


# ---- packed ----------------------------------------------------------------------------------------------------------


@every_kind
@every_family
def test_packed_models_come_back(family, kinds, tmp_path):
    model, inputs = packed(family, kinds)
    y = outputs(model, inputs)
    contents = export_packed(model, tmp_path / "exported", "transformers")
    model.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "exported", tmp_path / "saved"):
        other = loaded(type(model), folder)
        assert same(outputs(other, inputs), y)
        assert other.is_quantized and not other.hf_quantizer.is_qat_trainable and other.hf_quantizer.is_serializable()
        for name, layer in ak.nn.packed_layers(model).items():
            twin = other.get_submodule(name)
            assert type(twin) is type(layer) and torch.equal(twin.weight_codes, layer.weight_codes)
            assert torch.equal(twin.weight_scale, layer.weight_scale) and twin.config == layer.config
        read = hf.read(folder)
        assert read.layers.keys() == contents.layers.keys() and read.tensors.keys() >= contents.tensors.keys() - {
            key for key, first in contents.ties().items()}  # fmt: skip
        rows, reader = compare(contents, folder, "transformers")
        assert {row.difference for row in rows} == {0.0} and reader.startswith("transformers ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_stay_and_dtype_is_the_models(dtype, tmp_path):
    model, _ = packed("llama", dtype=dtype)
    export_packed(model, tmp_path / "out", "transformers")
    same_type = loaded(t.AutoModelForCausalLM, tmp_path / "out")
    assert same_type.dtype == dtype and same(outputs(same_type), outputs(model))
    other = loaded(t.AutoModelForCausalLM, tmp_path / "out", dtype=torch.float32)
    layer = other.model.layers[0].mlp.up_proj
    assert layer.weight_dtype == torch.float32 and layer.weight_scale.dtype == torch.float32
    for name, ours in ak.nn.packed_layers(model).items():
        assert torch.equal(other.get_submodule(name).weight_codes, ours.weight_codes)


@pytest.mark.parametrize("config, options", [
    (ak.QuantConfig(ak.quant.Ternary()), {"trits": True}), (ak.QuantConfig(ak.quant.NF4()), {}),
    (ak.QuantConfig(Uniform(3), granularity="per_group", group_size=16, scale_dtype="float16"), {}),
    (ak.QuantConfig(Uniform(8), activation=Uniform(8)), {}),
], ids=["trits", "nf4", "groups", "inputs"])  # fmt: skip
def test_every_grid_and_scale_type(config, options, tmp_path):
    model, _ = quantized("llama", config=config)
    ak.pack_(ak.hard_quantize_(model), **options)
    export_packed(model, tmp_path / "out", "transformers")
    other = loaded(t.AutoModelForCausalLM, tmp_path / "out")
    assert same(outputs(other), outputs(model))
    assert other.lm_head.weight_scale.dtype == model.lm_head.weight_scale.dtype


def test_shards_device_maps_and_auto_classes(tmp_path):
    pytest.importorskip("accelerate")
    model, _ = packed("llama-tied", ("linear", "embedding"))
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "out", max_shard_size="4KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    other = loaded(t.AutoModelForCausalLM, tmp_path / "out", device_map="cpu")
    assert same(outputs(other), outputs(model)) and other.generation_config.max_new_tokens == 3
    assert other.lm_head.weight_codes is other.model.embed_tokens.weight_codes
    assert torch.equal(other.generate(TOKENS, do_sample=False), model.generate(TOKENS, do_sample=False))
    assert hf.read(tmp_path / "out").ties() == {"lm_head": "model.embed_tokens"}
    base = t.AutoModel.from_pretrained(tmp_path / "out").eval()  # without its head
    assert same(outputs(base), outputs(model.model)) and isinstance(base.layers[0].mlp.up_proj, PackedLayer)
    base.save_pretrained(tmp_path / "base")
    whole = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()  # with a head that is new
    assert same(outputs(whole.model), outputs(model.model))


def test_layers_that_are_left_dense(tmp_path):
    model, _ = packed("mixtral", EVERY_KIND)
    contents = export_packed(model, tmp_path / "out", "transformers", dense=["*experts.*", "lm_head"])
    rows, _ = compare(contents, tmp_path / "out", "transformers")
    assert {row.difference for row in rows} == {0.0}
    other = loaded(t.AutoModelForCausalLM, tmp_path / "out")
    assert type(other.lm_head) is nn.Linear and torch.equal(other.lm_head.weight, model.lm_head.dequantize())
    assert type(other.model.layers[0].mlp.experts) is t.models.mixtral.modeling_mixtral.MixtralExperts


@pytest.mark.parametrize("to", ["compressed-tensors", "onnx", "torchao"])
def test_a_loaded_model_goes_on_to_other_formats(to, tmp_path):
    pytest.importorskip(to.replace("-", "_"))
    model, _ = packed("llama", ("linear",), ak.QuantConfig(Uniform(4), scale_dtype="float16"))
    model.save_pretrained(tmp_path / "in")
    other = loaded(t.AutoModelForCausalLM, tmp_path / "in")
    contents = export_packed(other, tmp_path / "out", to)
    rows, _ = compare(contents, tmp_path / "out", to)
    assert {row.difference for row in rows} == {0.0}


def test_onnx_of_a_loaded_model(tmp_path):
    pytest.importorskip("onnx")
    from askew_kernels.deploy.to_onnx import export_onnx

    model, _ = packed("vit")
    model.save_pretrained(tmp_path / "in")
    other = loaded(t.AutoModelForImageClassification, tmp_path / "in")
    export_onnx(other, (PIXELS,), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size > 1000


def test_an_exported_folder_is_a_packed_file_too(tmp_path):
    model, _ = packed("llama")
    export_packed(model, tmp_path / "out", "transformers")
    other = FAMILIES["llama"][0]().eval()
    ak.load_packed(tmp_path / "out" / "model.safetensors", other)
    assert same(outputs(other), outputs(model))


# ---- in training -----------------------------------------------------------------------------------------------------


@every_kind
@every_family
def test_models_in_training_come_back(family, kinds, tmp_path):
    model, inputs = quantized(family, kinds)
    model.save_pretrained(tmp_path / "out")
    other = loaded(type(model), tmp_path / "out")
    assert same(outputs(other, inputs), outputs(model, inputs)) and other.hf_quantizer.is_qat_trainable
    for name, layer in ak.nn.quantized_layers(model).items():
        assert other.get_submodule(name).config == layer.config
    assert all(p.requires_grad for p in other.parameters())


def float_folder(path, family="llama-tied"):
    torch.manual_seed(0)
    FAMILIES[family][0]().save_pretrained(path)
    return path


def test_on_the_fly_is_quantize_by_hand(tmp_path):
    folder = float_folder(tmp_path / "float")
    model = loaded(t.AutoModelForCausalLM, folder, quantization_config=hf.AskewConfig(CONFIG))
    assert not isinstance(model.lm_head, QuantizedLayer)  # as with other methods: the head stays
    whole = loaded(
        t.AutoModelForCausalLM, folder, quantization_config=hf.AskewConfig(CONFIG, modules_to_not_convert=[])
    )
    by_hand = ak.quantize_(t.AutoModelForCausalLM.from_pretrained(folder).eval(), CONFIG)
    assert same(outputs(whole), outputs(by_hand)) and whole.hf_quantizer.is_trainable
    experts = float_folder(tmp_path / "experts", "mixtral")  # in a file by expert, in the model in one Parameter
    model = loaded(
        t.AutoModelForCausalLM, experts, quantization_config=hf.AskewConfig(CONFIG, modules_to_not_convert=[])
    )
    by_hand = ak.quantize_(t.AutoModelForCausalLM.from_pretrained(experts).eval(), CONFIG)
    assert same(outputs(model), outputs(by_hand)) and len(ak.nn.quantized_layers(model)) == 7
    mixed = hf.AskewConfig(
        {"*q_proj": ak.QuantConfig(Uniform(8)).to_dict(), "*lm_head": None, "*": CONFIG}, ["linear", "embedding"], []
    )
    model = loaded(t.AutoModelForCausalLM, folder, quantization_config=mixed)
    assert model.model.layers[0].self_attn.q_proj.config.weight == Uniform(8)
    assert not isinstance(model.lm_head, QuantizedLayer) and isinstance(model.model.embed_tokens, QuantizedLayer)
    again = hf.AskewConfig.from_dict(json.loads(mixed.to_json_string()))
    assert again.to_dict() == mixed.to_dict()


class Text(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        tokens = torch.randint(3, 48, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def trainer(folder, out):
    """EpsilonAnnealing is a learning rate scheduler, so Trainer steps, saves and restores it."""
    pytest.importorskip("accelerate")
    config = ak.QuantConfig.for_export("compressed-tensors:4", group_size=16)
    model = t.AutoModelForCausalLM.from_pretrained(folder, quantization_config=hf.AskewConfig(config))
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=1e-2)
    annealing = ak.EpsilonAnnealing(optimizer, total=8)
    arguments = t.TrainingArguments(str(out), per_device_train_batch_size=4, max_steps=8, save_steps=4, report_to=[],
                                    use_cpu=True, disable_tqdm=True, logging_strategy="no")  # fmt: skip
    return t.Trainer(model=model, args=arguments, train_dataset=Text(), optimizers=(optimizer, annealing)), annealing


def test_trainer_trains_resumes_and_its_checkpoints_load(tmp_path):
    folder = float_folder(tmp_path / "float", "llama")
    run, annealing = trainer(folder, tmp_path / "run")
    run.train()
    assert annealing.last_epoch == 8 and run.optimizer.param_groups[0]["constraint_eps"] < 1e-3
    resumed, again = trainer(folder, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert again.state_dict() == annealing.state_dict()
    assert same(resumed.model.state_dict(), run.model.state_dict())
    model = run.model.eval()
    checkpoint = loaded(t.AutoModelForCausalLM, tmp_path / "run" / "checkpoint-8")
    assert same(outputs(checkpoint), outputs(model)) and checkpoint.hf_quantizer.is_qat_trainable
    layer = checkpoint.model.layers[0].mlp.up_proj
    assert layer.weight_scale_frozen == model.model.layers[0].mlp.up_proj.weight_scale_frozen == 1
    ak.pack_(ak.hard_quantize_(checkpoint)).save_pretrained(tmp_path / "packed")  # it says itself what it is now
    final = loaded(t.AutoModelForCausalLM, tmp_path / "packed")
    assert same(outputs(final), outputs(checkpoint)) and not final.hf_quantizer.is_qat_trainable
    with pytest.raises(ValueError, match="fine-tun"):
        t.Trainer(model=final, args=t.TrainingArguments(str(tmp_path / "no"), report_to=[], use_cpu=True))


def test_trainer_takes_a_model_that_was_quantized_by_hand(tmp_path):
    pytest.importorskip("accelerate")
    model, _ = quantized("llama-tied", ("linear", "embedding"))
    optimizer = ak.optim.Skewed(torch.optim.AdamW(ak.param_groups(model), lr=1e-2))
    scheduler = torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4), ak.EpsilonAnnealing(optimizer, total=4)]
    )
    arguments = t.TrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=4, save_steps=4,
                                    report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no")  # fmt: skip
    t.Trainer(model=model, args=arguments, train_dataset=Text(), optimizers=(optimizer, scheduler)).train()
    checkpoint = loaded(t.AutoModelForCausalLM, tmp_path / "run" / "checkpoint-4")
    assert same(outputs(checkpoint), outputs(model.eval())) and checkpoint.hf_quantizer.is_qat_trainable
    assert checkpoint.lm_head.weight is checkpoint.model.embed_tokens.weight


def test_saving_says_what_the_model_is_now(tmp_path):
    model, _ = quantized("llama")
    model.save_pretrained(tmp_path / "a")
    other = copy.deepcopy(model)
    ak.pack_(ak.hard_quantize_(other))
    other.save_pretrained(tmp_path / "b")
    assert isinstance(loaded(t.AutoModelForCausalLM, tmp_path / "b").lm_head, PackedLayer)
    assert isinstance(loaded(t.AutoModelForCausalLM, tmp_path / "a").lm_head, QuantizedLayer)
    assert same(outputs(pickle.loads(pickle.dumps(model))), outputs(model))
    ak.dequantize_(model).save_pretrained(tmp_path / "c")
    assert "quantization_config" not in json.loads((tmp_path / "c" / "config.json").read_text())
    assert type(loaded(t.AutoModelForCausalLM, tmp_path / "c").lm_head) is nn.Linear


@pytest.mark.parametrize("make", [quantized, packed], ids=lambda make: make.__name__)
def test_dequantize_gives_a_plain_model(make, tmp_path):
    model, _ = make("llama")
    y = outputs(model)["logits"]
    plain = model.dequantize()
    assert not plain.is_quantized and type(plain.lm_head) is nn.Linear
    assert torch.allclose(outputs(plain)["logits"], y, atol=1e-6)


# ---- registration and errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [
    "import sys, askew_kernels; assert 'transformers' not in sys.modules; import transformers",
    "import transformers; import askew_kernels",
    "import transformers.quantizers.auto; import askew_kernels",
    "import askew_kernels, transformers.quantizers.auto as auto; assert 'askew' in auto.AUTO_QUANTIZER_MAPPING",
], ids=["ours first", "theirs first", "theirs loaded", "the module alone"])  # fmt: skip
def test_transformers_finds_the_method_in_any_order(lines, tmp_path):
    model, _ = packed("llama")
    export_packed(model, tmp_path / "out", "transformers")
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    code = f"{lines}; import transformers; print(type({load}.lm_head))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "PackedLinear" in done.stdout, done.stderr


@pytest.mark.parametrize("before", [False, True])
def test_another_release_of_a_library_can_still_be_imported(before, tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    name, then = f"library_{before}", f"joining_{before}"
    (tmp_path / f"{name}.py").write_text("value = 3")
    (tmp_path / f"{then}.py").write_text("from transformers import what_no_release_has")
    if before:
        importlib.import_module(name)
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        registration.when_imported(name, then)
        registration.when_imported(name, then)  # asked twice, imported once
        assert importlib.import_module(name).value == 3
    assert then in caplog.text and not [f for f in sys.meta_path if type(f).__module__ == registration.__name__]


def edited(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def layers(told):
    return told["groups"][0]["layers"]


@pytest.mark.parametrize("change, text", [
    (lambda told: told.update(version=2), "version"),
    (lambda told: told.update(groups=7), "groups"),
    (lambda told: told["groups"][0].update(kind="lstm"), "kind"),
    (lambda told: told["groups"][0]["config"]["weight"].update(bits=3), "weight_codes"),
    (lambda told: layers(told).update({"lm_head": [47, 32]}), "lm_head"),
    (lambda told: layers(told).update({"lm_tail": [48, 32]}), "lm_tail"),
    (lambda told: told["groups"][0].pop("trits"), "trits"),
    (lambda told: told["groups"][0].pop("packed"), "packed"),
    (lambda told: told.update(aliases={"lm_head.weight_codes": "nothing.weight_codes"}), "nothing"),
], ids=["version", "groups", "kind", "bits", "shape", "name", "trits", "packed", "aliases"])  # fmt: skip
def test_folders_that_do_not_fit_are_errors(change, text, tmp_path):
    model, _ = packed("llama")
    export_packed(model, tmp_path / "out", "transformers")
    edited(tmp_path / "out", change)
    with pytest.raises(PackedFileError, match=text):
        hf.read(tmp_path / "out")
    with pytest.raises((ValueError, AttributeError, RuntimeError), match=f"{text}|mismatched_sizes"):
        t.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("change, text", [
    (lambda tensors: tensors.pop("lm_head.weight_codes"), "lm_head.weight_codes"),
    (lambda tensors: tensors["lm_head.weight_scale"].mul_(0), "lm_head.*weight_scale"),
    (lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_codes"].fill_(255), "up_proj"),
], ids=["missing", "scale", "codes"])  # fmt: skip
def test_damaged_weights_are_errors(change, text, tmp_path):
    model, _ = packed("llama", config=ak.QuantConfig(Uniform(4, narrow=True)))
    export_packed(model, tmp_path / "out", "transformers")
    file = tmp_path / "out" / "model.safetensors"
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PackedFileError, match=text):
        hf.read(tmp_path / "out")
    with pytest.raises(ValueError, match=text):
        t.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_wrong_arguments():
    for given in (3, {"*": 4}, "gguf"):
        with pytest.raises(TypeError, match="config"):
            hf.AskewConfig(given)
    with pytest.raises(ValueError, match="kindes"):
        hf.AskewConfig(CONFIG, kindes=["linear"])
    with pytest.raises(ValueError, match="no quantized"):
        hf.attach(FAMILIES["llama"][0]())
    model, _ = quantized("llama")
    with pytest.raises(PackedFileError, match="not packed"):
        contents_of(model)


def test_random_bytes_are_errors_or_say_something_valid(tmp_path):
    model, _ = packed("llama")
    export_packed(model, tmp_path / "out", "transformers")
    numbers = random.Random(0)
    for _ in range(150):
        shutil.copytree(tmp_path / "out", tmp_path / "bad", dirs_exist_ok=True)
        file = tmp_path / "bad" / numbers.choice(["config.json", "model.safetensors"])
        data = bytearray(file.read_bytes())
        data[numbers.randrange(min(len(data), 3000))] = numbers.randrange(256)
        file.write_bytes(bytes(data))
        with contextlib.suppress(PackedFileError):
            hf.read(tmp_path / "bad")


@pytest.mark.parametrize("family", ["llama", "bert", "bert-base", "t5", "vit", "mixtral"])
def test_the_command_line_verifies_a_file_beside_a_config_without_architectures(family, tmp_path, capsys):
    model, _ = packed(family, EVERY_KIND)
    model.config.architectures = None
    model.config.save_pretrained(tmp_path / "in")
    ak.save_packed(model, tmp_path / "in" / "packed.safetensors")
    given = ["export", str(tmp_path / "in" / "packed.safetensors"), "--out", str(tmp_path / "out"), "--verify"]
    assert main([*given, "--to", "transformers"]) == 0, capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    if family == "llama":
        assert main([*given, "--to", "compressed-tensors", "--overwrite"]) == 0, capsys.readouterr()


def test_what_lay_beside_a_loaded_model_goes_along(tmp_path):
    folder = float_folder(tmp_path / "float", "llama")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    model = ak.quantize_(t.AutoModelForCausalLM.from_pretrained(folder), CONFIG)
    export_packed(ak.pack_(ak.hard_quantize_(model)), tmp_path / "out", "transformers")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "generation_config.json").is_file()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_a_folder_in_training_is_no_packed_model(tmp_path):
    model, _ = quantized("llama")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(PackedFileError, match="in training"):
        hf.read(tmp_path / "out")
