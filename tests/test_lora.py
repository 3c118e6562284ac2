"""Contract: LoRA adapters of peft over quantized and packed layers.

1. ``get_peft_model`` takes such models with nothing to call: only adapters get gradients, packed bytes stay, adapters
   are saved and loaded; a quantized layer may train its own weight beside them.
2. peft's invariants of merging: over quantized layers unmerging gives the outputs back; merged outputs are those of
   the merged, quantized weight.
3. ``deploy.lora.merge_and_unload``: every layer ends on its grid, quantized or packed; the errors are those of the
   weights that the model computed with; a failed call changes nothing.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.quant import Uniform

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from askew_kernels.deploy import lora  # noqa: E402

CONFIG = ak.QuantConfig(Uniform(4), "absmax", "per_group", 16)
X = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
SMALL = {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
MODELS = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), ["q_proj", "down_proj"]),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)), ["c_attn", "c_proj"]),
}  # fmt: skip
by_model = pytest.mark.parametrize("name", MODELS)
by_state = pytest.mark.parametrize("packed", [False, True], ids=["quantized", "packed"])
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def untied(module, name):
    return name != "lm_head"  # GPT-2's is its embedding's, which reads it as it is


def base_model(name, packed, hard=False, config=CONFIG):
    torch.manual_seed(0)
    model = ak.quantize_(MODELS[name][0](), config, untied).eval()
    if hard or packed:
        ak.hard_quantize_(model)
    return ak.pack_(model) if packed else model


def adapted(name, packed, hard=False, **options):
    options = {"r": 4, "target_modules": MODELS[name][1], "init_lora_weights": False, **options}
    model = base_model(name, packed, hard)
    torch.manual_seed(1)
    return small_change(peft.get_peft_model(model, peft.LoraConfig(**options)).eval())


def small_change(model):
    with torch.no_grad():
        for key, p in model.named_parameters():
            if re.search("lora_(embedding_)?B", key):
                p.mul_(0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=X).logits


def bytes_of(model):
    return {key: t.clone() for key, t in model.state_dict().items() if "lora" not in key}


def unchanged(model, before):
    after = bytes_of(model)
    return after.keys() == before.keys() and all(torch.equal(after[key], t) for key, t in before.items())


@by_model
@by_state
def test_only_adapters_are_trained(name, packed, tmp_path):
    model = adapted(name, packed)
    before, start = bytes_of(model), logits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(input_ids=X, labels=X).loss.backward()
        optimizer.step()
    for key, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == ("lora_" in key), key
    assert unchanged(model.eval(), before) and not torch.equal(logits(model), start)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base_model(name, packed), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    if packed:
        ak.save_packed(model, tmp_path / "whole.safetensors")
        target = peft.PeftModel.from_pretrained(MODELS[name][0]().eval(), tmp_path / "adapter").eval()
        assert torch.equal(logits(ak.load_packed(tmp_path / "whole.safetensors", target)), logits(model))


@by_model
def test_the_latent_weight_trains_beside_its_adapter(name):
    model = adapted(name, False)
    layers = ak.nn.quantized_layers(model)
    for layer in layers.values():
        layer.weight.requires_grad_()
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=1e-2)
    assert sum(group["grid"] is not None for group in optimizer.param_groups) == 1
    before = {key: layer.weight.detach().clone() for key, layer in layers.items()}
    model.train()(input_ids=X, labels=X).loss.backward()
    optimizer.step()
    assert not any(torch.equal(layer.weight, before[key]) for key, layer in layers.items())
    ak.hard_quantize_(model.eval())
    want = logits(model)
    torch.testing.assert_close(logits(ak.pack_(model)), want, rtol=1e-4, atol=1e-5)


@by_model
def test_pefts_own_merge_over_quantized_layers(name):
    model = adapted(name, False)
    apart = logits(model)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    latent = [m.get_base_layer().weight.detach() + m.get_delta_weight("default").detach() for m in layers]
    model.merge_adapter()
    for layer, weight in zip(layers, latent, strict=True):
        torch.testing.assert_close(layer.get_base_layer().weight.detach(), weight)
    merged = logits(model)
    assert not torch.equal(merged, apart)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), apart, rtol=1e-4, atol=1e-5)
    again = model.merge_and_unload()
    assert not isinstance(again, peft.PeftModel) and set(ak.nn.quantized_layers(again))
    torch.testing.assert_close(logits(again), merged, rtol=1e-4, atol=1e-5)


@by_model
def test_pefts_own_merge_over_packed_layers_says_what_to_do(name):
    model = adapted(name, True)
    before, want = bytes_of(model), logits(model)
    for safe in (False, True):
        with pytest.raises(RuntimeError, match=r"read-only.*deploy\.lora\.merge_and_unload"):
            model.merge_adapter(safe_merge=safe)
    assert unchanged(model, before) and torch.equal(logits(model), want)


@by_model
@pytest.mark.parametrize("state", ["latent", "hard", "packed"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
def test_merging_lands_on_the_grid(name, state, options):
    if "lora_bias" in options and name == "llama":
        pytest.skip("its layers have no bias to merge one into")
    model = adapted(name, state == "packed", state == "hard", **options)
    tuners = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    want, before = logits(model), bytes_of(model)
    told = lora.merge_errors(model)
    assert unchanged(model, before) and torch.equal(logits(model), want) and told.keys() == tuners.keys()
    targets = {}
    for key, tuner in tuners.items():  # W^ x + D x of every unit vector: what the layer computes with, bias left out
        eye = torch.eye(tuner.in_features)
        with torch.no_grad():
            targets[key] = (tuner(eye) - tuner(torch.zeros_like(eye))).t()
    merged, errors = lora.merge_and_unload(model)
    assert errors == told and not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in merged.modules())
    layers = ak.nn.packed_layers(merged) if state == "packed" else ak.nn.quantized_layers(merged)
    for key, target in targets.items():
        layer = layers[key.removeprefix("base_model.model.")]
        got = layer.matrix() if state == "packed" else layer.form.matrix(layer.quantized_weight())
        off = float((got - target).norm() / target.norm())
        near = 0.05 if "use_dora" in options and state == "latent" else 1e-3  # peft takes norms of the latent weight
        assert off == pytest.approx(errors[key].relative, rel=near, abs=1e-5) and off < 0.2
        levels = got.reshape(-1, 16) / layer.weight_scale[:, None]
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert float((logits(merged) - want).norm() / want.norm()) < 0.2
    if state == "packed":
        return
    hard = ak.hard_quantize_(copy.deepcopy(merged))
    assert torch.equal(logits(hard), logits(merged))
    assert state != "hard" or all(layer.quantizer.frozen for layer in layers.values())


def test_a_small_change_leaves_a_packed_layer_on_its_levels():
    """The scale that was stays where the rule's would move every weight; LoRA as it begins changes nothing."""
    model = base_model("llama", True, config=ak.QuantConfig(Uniform(4), "rms"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    want = logits(model)
    before = {key: t for key, t in bytes_of(model).items() if key.endswith("weight_codes")}
    merged, errors = lora.merge_and_unload(model)
    assert all(error == (0.0, 0.0) for error in errors.values()) and torch.equal(logits(merged), want)
    after = [t for key, t in merged.state_dict().items() if key.endswith("weight_codes")]
    assert all(map(torch.equal, after, before.values()))


@by_state
def test_a_failed_merge_changes_nothing(packed):
    model = adapted("llama", packed)
    last = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)][-1]
    with torch.no_grad():
        last.lora_B["default"].weight[0, 0] = float("nan")
    before = bytes_of(model)
    for call in (lora.merge_errors, lora.merge_and_unload):
        with pytest.raises(ValueError, match=r"layers\.1\..*NaNs"):
            call(model)
        assert unchanged(model, before) and last.get_base_layer() is last.base_layer and not last.merged
    with pytest.raises(ValueError, match="has no adapters"):
        lora.merge_and_unload(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="model: expected a peft model"):
        lora.merge_and_unload(None)


@by_state
def test_several_adapters(packed):
    """Those that are named are merged, the active ones by default; without adapters the model is what it was."""
    model = adapted("llama", packed)
    plain = logits(base_model("llama", packed))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    small_change(model)
    first, both = logits(model), lora.merge_errors(model, ["default", "other"])
    assert sum(a != b for a, b in zip(both.values(), lora.merge_errors(model).values(), strict=True)) == 2
    model.set_adapter("other")
    other = logits(model)
    assert not torch.equal(other, first)
    merged, errors = lora.merge_and_unload(model)
    assert {name for name, error in errors.items() if error.of_change} == {n for n in errors if "q_proj" in n}
    assert float((logits(merged) - other).norm() / other.norm()) < 0.2


def test_float_layers_with_adapters_are_merged_as_peft_does():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    ak.quantize_(plain, {"2": CONFIG})
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)).eval()
    reference = copy.deepcopy(model).merge_and_unload()
    merged, errors = lora.merge_and_unload(model)
    assert list(errors) == ["base_model.model.2"] and type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged[0].weight, reference[0].weight)


@pytest.mark.parametrize("dims", [1, 2, 3])
@by_state
def test_adapters_of_other_kinds_of_layers(dims, packed):
    """Embeddings and convolutions: each adapter is trained over its layer, is itself float, and merged."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tokens, self.conv, self.head = nn.Embedding(20, 16), conv(16, 16, 3, padding=1), nn.Linear(16, 20)

        def forward(self, x):
            signal = self.tokens(x).transpose(1, 2)
            return self.head(self.conv(signal[(...,) + (None,) * (dims - 1)]).flatten(2).transpose(1, 2))

    x = torch.randint(0, 20, (2, 5))
    model = ak.quantize_(Model(), CONFIG, kinds=("linear", "conv", "embedding")).eval()
    ak.hard_quantize_(model)
    model = ak.pack_(model) if packed else model
    config = peft.LoraConfig(r=2, target_modules=["tokens", "conv", "head"], init_lora_weights=False)
    model = small_change(peft.get_peft_model(model, config).eval())
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for layer in ("tokens", "conv", "head"):  # each has both factors, which are no quantized layers
        assert sum(f".{layer}." in n for n in adapters) == 2
    assert not any("lora_" in n for n in [*ak.nn.quantized_layers(model), *ak.nn.packed_layers(model)])
    model(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapters.values())
    with torch.no_grad():
        want = model(x)
    merged, errors = lora.merge_and_unload(model)
    layers = ak.nn.packed_layers(merged) if packed else ak.nn.quantized_layers(merged)
    assert len(errors) == 3 and len(layers) == 3 and all(0 < error.relative < 0.2 for error in errors.values())
    with torch.no_grad():
        assert float((merged(x) - want).norm() / want.norm()) < 0.2
        assert packed or torch.equal(ak.hard_quantize_(copy.deepcopy(merged))(x), merged(x))


ADAPTERS = {
    "IA3": lambda of: peft.IA3Config(target_modules=of, feedforward_modules=of[-1:]),
    "LoHa": lambda of: peft.LoHaConfig(r=4, target_modules=of),
    "LoKr": lambda of: peft.LoKrConfig(r=4, target_modules=of),
    "VeRA": lambda of: peft.VeraConfig(r=4, target_modules=of[:1]),
    "OFT": lambda of: peft.OFTConfig(r=0, oft_block_size=8, target_modules=of),
    "BOFT": lambda of: peft.BOFTConfig(boft_block_size=4, target_modules=of),
    "AdaLoRA": lambda of: peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, total_step=10, target_modules=of),
    "FourierFT": lambda of: peft.FourierFTConfig(n_frequency=20, target_modules=of),
}


@by_state
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_adapters_are_taken_off(adapter, packed):
    model = base_model("llama", packed, hard=True)
    before, expected = bytes_of(model), logits(model)
    with_adapter = peft.get_peft_model(model, ADAPTERS[adapter](MODELS["llama"][1]))
    logits(with_adapter)
    alone = with_adapter.unload()
    assert torch.equal(logits(alone), expected) and unchanged(alone, before)


@pytest.mark.parametrize("state", ["in training", "hard", "packed"])
def test_adapters_that_are_layers_themselves_are_merged(state):
    """LNTuning's norm changes places with the one that it tunes: looking changes nothing, merging loses nothing."""
    model = base_model("llama", state == "packed", hard=state == "hard")
    model = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["norm", "input_layernorm"])).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(torch.rand_like(p) + 0.5)
    want = logits(model)
    assert not lora.merge_errors(model) and torch.equal(logits(model), want)
    merged, errors = lora.merge_and_unload(model)
    assert torch.equal(logits(merged), want) and not errors


@pytest.mark.parametrize("hard", [False, True])
def test_a_quantized_weight_that_modules_share_is_not_merged(hard):
    """A second layer's adapters, or none, would find another weight than the one that they were trained with."""
    replicated = adapted("llama", False, hard, layer_replication=[[0, 2], [1, 2]])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    model = ak.hard_quantize_(ak.quantize_(model)) if hard else ak.quantize_(model)
    tied = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    for model, text in ((replicated, r"q_proj: shares its weight with .*layers\.[12]"), (tied, "lm_head: .*embed_tok")):
        before = bytes_of(model)
        for call in (lora.merge_errors, lora.merge_and_unload):
            with pytest.raises(ValueError, match=text):
                call(model)
        assert unchanged(model, before)


def test_a_packed_layer_is_given_no_other_weight():
    layer, other = (ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Linear(16, 8)), CONFIG)))[0]
                    for _ in range(2))  # fmt: skip
    layer.weight = layer.weight
    for value in (other.weight, layer.dequantize(), nn.Parameter(layer.dequantize()), None):
        with pytest.raises(AttributeError, match="^weight: a packed layer keeps codes.*unpack_"):
            layer.weight = value
