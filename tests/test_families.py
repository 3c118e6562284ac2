"""Contract: model families of transformers, from small random configurations, take the whole way: one line a family.

1. quantize_, a step of training under annealing, hard_quantize_, pack_, save_packed, load_packed into a fresh model:
   every packed weight is the trained one, bit for bit, and the loaded model gives the packed one's outputs, bit for
   bit, and the hard-quantized one's but for the order of sums. What generates generates the same.
2. Parameters stay the same objects under the same keys; a float checkpoint loads strictly, and the unpacked model's
   does in a fresh one.
3. Nothing else stays float than what the family's line names, with embeddings asked for and without; ties stay ties.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import askew_kernels as ak
from askew_kernels.quant import Uniform

transformers = pytest.importorskip("transformers")

HIDDEN, VOCABULARY = 32, 96
TEXT = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": VOCABULARY, "max_position_embeddings": 32}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip
TOKENS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
SOUND = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(3))
TOKEN_INPUT = {"input_ids": TOKENS}


@dataclass
class Family:
    """``config``: the class of the configuration, and its arguments. ``floats``: patterns of the parameters of two and
    more dimensions that stay float where linear layers, convolutions and experts are quantized; with embeddings those
    of them that ``even_so`` has."""

    model: str
    config: str
    arguments: dict[str, Any]
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: TOKEN_INPUT)
    generates: bool = False
    floats: tuple[str, ...] = ()
    even_so: tuple[str, ...] = ()
    left_alone: str = "-"  # a pattern of layers that are not asked for


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
EAGER, BATCHED = {"experts_implementation": "eager"}, {"experts_implementation": "batched_mm"}
ROUTER, BIASES = r"model.layers.\d.mlp.(gate|router).weight", r"model.layers.\d.mlp.experts.\w+_bias"
MIXTURE = {"generates": True, "floats": ("model.embed_tokens.weight", ROUTER), "even_so": (ROUTER,)}
DECODER = {"generates": True, "floats": ("model.embed_tokens.weight",)}
FAMILIES = {
    "BERT": Family("BertForMaskedLM", "BertConfig", TEXT, floats=(r"bert.embeddings.\w+_embeddings.weight",)),
    "GPT-2": Family("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": HIDDEN,
                    "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}, generates=True,
                    floats=("transformer.w[tp]e.weight",)),
    "Llama": Family("LlamaForCausalLM", "LlamaConfig", GROUPED, **DECODER),
    "Llama tied": Family("LlamaForCausalLM", "LlamaConfig", GROUPED | {"tie_word_embeddings": True}, **DECODER),
    "Mistral": Family("MistralForCausalLM", "MistralConfig", GROUPED, **DECODER),
    "Qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", GROUPED, **DECODER),
    "Qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", GROUPED, **DECODER),
    "Gemma": Family("GemmaForCausalLM", "GemmaConfig", GROUPED, **DECODER),
    "T5": Family("T5ForConditionalGeneration", "T5Config", {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 16,
                 "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
                 {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}, generates=True,
                 floats=(r"shared.weight|\w+.embed_tokens.weight", r"\w+.block.0.layer.0.SelfAttention.relative_.*"),
                 even_so=(r"\w+.block.0.layer.0.SelfAttention.relative_.*",),
                 left_alone="*.relative_attention_bias"),  # (buckets, heads)
    "ViT": Family("ViTForImageClassification", "ViTConfig", VISION, {"pixel_values": PICTURES},
                  floats=("vit.embeddings.cls_token", "vit.embeddings.position_embeddings"),
                  even_so=("vit.embeddings.cls_token", "vit.embeddings.position_embeddings")),
    "CLIP": Family("CLIPModel", "CLIPConfig", {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": VISION,
                   "projection_dim": HIDDEN}, {"input_ids": TOKENS, "pixel_values": PICTURES},
                   floats=(r"text_model.embeddings.\w+_embedding.weight",
                           "vision_model.embeddings.position_embedding.weight")),
    "Whisper": Family("WhisperForConditionalGeneration", "WhisperConfig",
                      {"vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2,
                       "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
                       "decoder_ffn_dim": 64, "max_source_positions": 16, "max_target_positions": 16,
                       "decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                      {"input_features": SOUND, "decoder_input_ids": TOKENS[:, :4]}, generates=True,
                      floats=("model.encoder.embed_positions.weight", "model.decoder.embed_\\w+.weight"),
                      even_so=("model.decoder.embed_positions.weight",)),
    "Mixtral": Family("MixtralForCausalLM", "MixtralConfig", GROUPED | EXPERTS, **MIXTURE),
    "Mixtral eager": Family("MixtralForCausalLM", "MixtralConfig", GROUPED | EXPERTS | EAGER, **MIXTURE),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", GROUPED | EXPERTS | BATCHED, **MIXTURE),
    "gpt-oss": Family("GptOssForCausalLM", "GptOssConfig", GROUPED | EXPERTS | {"layer_types": ["full_attention"] * 2},
                      generates=True, floats=("model.embed_tokens.weight", ROUTER, BIASES), even_so=(ROUTER, BIASES)),
}  # fmt: skip


def fresh(family: Family, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**copy.deepcopy(family.arguments))
    return getattr(transformers, family.model)(config).eval()


def outputs(model: Any, family: Family) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(**family.inputs)
        given = [found[k] for k in ("logits", "logits_per_image") if k in found]
        if family.generates:
            inputs = {k: v for k, v in family.inputs.items() if not k.startswith("decoder")}
            given.append(model.generate(**inputs, max_new_tokens=4, do_sample=False))
    return given


def floats_of(model: Any) -> set[str]:
    return set(ak.nn.left_float(model))


@pytest.mark.parametrize("kinds", [ak.nn.kinds.DEFAULT, (*ak.nn.kinds.DEFAULT, "embedding")], ids=["", "embeddings"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_the_whole_way(name, kinds, tmp_path):
    family, path = FAMILIES[name], tmp_path / "packed.safetensors"
    model = fresh(family)
    parameters, floats = dict(model.named_parameters()), model.state_dict()
    checkpoint = {key: t.clone() for key, t in floats.items()}
    shapes = {key: t.shape for key, t in floats.items()}
    config = ak.QuantConfig(Uniform(4), "absmax", "per_group", 16)
    ak.quantize_(model, config, kinds=kinds, filter_fn=lambda _, name: not fnmatch.fnmatch(name, family.left_alone))
    assert [*parameters] == [n for n, _ in model.named_parameters()]
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert {key: t.shape for key, t in model.state_dict().items() if key in shapes} == shapes
    model.load_state_dict(checkpoint, strict=True)
    wanted = family.even_so if "embedding" in kinds else family.floats
    left = floats_of(model)
    assert all(any(re.fullmatch(p, key) for p in wanted) for key in left), left
    assert all(any(re.fullmatch(p, key) for key in left) for p in wanted), left

    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=1e-3)
    annealing = ak.EpsilonAnnealing(optimizer, hold=1, total=2)
    model.train()
    torch.manual_seed(1)
    for _ in range(2):
        optimizer.zero_grad()
        found = model(**family.inputs)
        sum(found[k].square().mean() for k in ("logits", "logits_per_image") if k in found).backward()
        optimizer.step()
        annealing.step()
    layers = ak.nn.quantized_layers(model)
    assert all(m.weight.grad is not None for m in layers.values() if m.weight.requires_grad), "a layer without gradient"
    ak.hard_quantize_(model.eval())
    want, weights = outputs(model, family), {n: layer.weight.detach().clone() for n, layer in layers.items()}

    ak.pack_(model)
    packed = ak.nn.packed_layers(model)
    assert packed.keys() == weights.keys() and all(torch.equal(m.dequantize(), weights[n]) for n, m in packed.items())
    assert floats_of(model) == left
    got = outputs(model, family)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ak.save_packed(model, path)
    loaded = ak.load_packed(path, fresh(family, 1))
    assert all(map(torch.equal, outputs(loaded, family), got))
    again = fresh(family, 2)
    again.load_state_dict(ak.unpack_(loaded).state_dict(), strict=True)
    for ours, theirs in zip(outputs(again, family), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
