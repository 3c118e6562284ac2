"""What llama.cpp calls the parts of a model, as data: ``ARCHITECTURES``, one entry each.

Names and keys are those of the package ``gguf`` (constants.py, tensor_mapping.py), which the tests compare; what stands
in another order there (rows of rotary heads, norms that are kept plus one) follows llama.cpp's own conversion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

GENERIC = "askew"  # general.architecture of any other model: its modules' names, as they are
Config = Mapping[str, Any]


class Key(NamedTuple):
    """A number of the model: its key after the architecture's name, its name in config.json, its type."""

    key: str
    config: str
    type: type = int


@dataclass(frozen=True)
class Architecture:
    name: str  # general.architecture
    model_types: tuple[str, ...]  # of config.json
    names: dict[str, str]  # {module, without what stands before the embedding's name: what it is called there}
    heads: dict[str, str]  # the same of modules beside the model, by their whole names
    embedding: str  # the module of the tokens
    keys: tuple[Key, ...]
    prefix: str = ""  # what stands before the names where a file does not say
    vocabulary: str = "text"
    values: dict[str, Any] = field(default_factory=dict)  # keys that are always so
    requires: dict[str, tuple[Any, ...]] = field(
        default_factory=dict
    )  # what llama.cpp computes, whatever a config says
    rotary: dict[str, str] = field(default_factory=dict)  # {what it is called there: the config's number of its heads}
    plus_one: bool = False  # norms are kept as 1 + weight, which is what multiplies
    transposed: tuple[str, ...] = ()  # modules whose float weight is (inputs, outputs)
    floats: tuple[str, ...] = ()  # modules that llama.cpp reads as float32
    one: bool = False  # the head is the embedding, it has no place of its own
    split: dict[str, tuple[str, ...]] = field(default_factory=dict)  # {a weight: what each part of its rows is there}
    parameters: tuple[str, ...] = ()  # names of weights that are no modules
    mark: str = ""  # the key that tells it from another of the same name
    same: tuple[tuple[str, str], ...] = ()  # numbers of a config that llama.cpp takes to be one
    unused: tuple[str, ...] = ()  # patterns of modules for which llama.cpp has no place and no use
    full: int = 0  # of so many layers the last attends to everything, the others within the window
    window: bool = False  # whether a sliding window has a key; without, the context ends where it would begin


def _blocks(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{{}}.{a}": f"{theirs}.{{}}.{b}" for a, b in names.items()}


_ATTENTION = {f"self_attn.{x}_proj": f"attn_{y}" for x, y in {"q": "q", "k": "k", "v": "v", "o": "output"}.items()}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GATED = {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
               "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
_ENDS = {"embed_tokens": "token_embd", "norm": "output_norm"}
_SIZES = (
    Key("context_length", "max_position_embeddings"), Key("embedding_length", "hidden_size"),
    Key("block_count", "num_hidden_layers"), Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
)  # fmt: skip
_LLAMA = (*_SIZES, Key("attention.head_count_kv", "num_key_value_heads"), Key("attention.key_length", "head_dim"),
          Key("attention.value_length", "head_dim"), Key("rope.dimension_count", "head_dim"),
          Key("vocab_size", "vocab_size"), Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
          Key("rope.freq_base", "rope_theta", float))  # fmt: skip
_SILU, _GELU = {"hidden_act": ("silu", "swish")}, {"hidden_act": ("gelu_pytorch_tanh", "gelu_new")}


def _decoder(name: str, model_types: tuple[str, ...], layer: dict[str, str], **options: Any) -> Architecture:
    """A family with Llama's plan: rotary positions, gated layers, RMS norms."""
    options = {"requires": _SILU, "keys": _LLAMA, "prefix": "model."} | options
    names = _ENDS | _blocks("layers", "blk", layer)
    return Architecture(name, model_types, names, {"lm_head": "output"}, "embed_tokens", **options)


_EXPERTS = {"mlp.gate": "ffn_gate_inp", "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
            "mlp.experts.down_proj": "ffn_down_exps"}  # fmt: skip
_MIXTURE: dict[str, Any] = {
    "split": {"ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}, "mark": "expert_count",
    "parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), "floats": ("ffn_gate_inp",),
}  # fmt: skip
_EXPERT_KEYS = (Key("expert_count", "num_local_experts"), Key("expert_used_count", "num_experts_per_tok"))
_ROTARY = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_GEMMA_2 = (*_LLAMA, Key("attn_logit_softcapping", "attn_logit_softcapping", float),
            Key("final_logit_softcapping", "final_logit_softcapping", float),
            Key("attention.sliding_window", "sliding_window"))  # fmt: skip
ARCHITECTURES = {a.model_types[0]: a for a in (
    _decoder("llama", ("mixtral",), _NORMS | _ATTENTION | _EXPERTS, keys=(*_LLAMA, *_EXPERT_KEYS), rotary=_ROTARY,
             **_MIXTURE),
    _decoder("llama", ("llama", "mistral"), _NORMS | _ATTENTION | _GATED, rotary=_ROTARY),
    _decoder("qwen2", ("qwen2",), _NORMS | _ATTENTION | _GATED),
    _decoder("qwen3", ("qwen3",), _NORMS | _ATTENTION | _QK_NORMS | _GATED),
    _decoder("qwen3moe", ("qwen3_moe",), _NORMS | _ATTENTION | _QK_NORMS | _EXPERTS,
             keys=(*_LLAMA, *_EXPERT_KEYS, Key("expert_feed_forward_length", "moe_intermediate_size")),
             requires={**_SILU, "norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
             **_MIXTURE),
    _decoder("gemma", ("gemma",), _NORMS | _ATTENTION | _GATED, requires=_GELU, plus_one=True,
             one=True),
    _decoder("gemma2", ("gemma2",), _FOUR_NORMS | _ATTENTION | _GATED, keys=_GEMMA_2, plus_one=True, one=True,
             window=True, full=2, same=(("query_pre_attn_scalar", "head_dim"),),
             requires={"hidden_activation": _GELU["hidden_act"]}),
    _decoder("gemma3", ("gemma3_text",), _FOUR_NORMS | _ATTENTION | _QK_NORMS | _GATED, plus_one=True, one=True,
             keys=(*_LLAMA, Key("attention.sliding_window", "sliding_window"),
                   Key("rope.freq_base_swa", "rope_local_base_freq", float)),
             window=True, full=6, same=(("query_pre_attn_scalar", "head_dim"),),
             requires={"hidden_activation": _GELU["hidden_act"], "attn_logit_softcapping": (None,),
                       "final_logit_softcapping": (None,), "use_bidirectional_attention": (False,)}),
    _decoder("phi3", ("phi3",), _NORMS | {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
                                          "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}),
    Architecture(
        "gpt2", ("gpt2",),
        {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm",
         **_blocks("h", "blk", {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
                                "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"})},
        {"lm_head": "output"}, "wte",
        (Key("context_length", "n_positions"), Key("embedding_length", "n_embd"), Key("block_count", "n_layer"),
         Key("feed_forward_length", "n_inner"), Key("attention.head_count", "n_head"),
         Key("attention.layer_norm_epsilon", "layer_norm_epsilon", float)),
        prefix="transformer.", transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        requires={"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
                  "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    ),
    Architecture(
        "bert", ("bert",),
        {"embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
         "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
         **_blocks("encoder.layer", "blk", {
             "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
             "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
             "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm"})},
        {}, "embeddings.word_embeddings",
        (*_SIZES, Key("attention.layer_norm_epsilon", "layer_norm_eps", float)),
        vocabulary="words", values={"attention.causal": False},
        floats=("token_types",), unused=("pooler.*", "cls.*"),
        requires={"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)},
    ),
)}  # fmt: skip


def by_name(name: str) -> Architecture | None:
    """By its entry's name, or by llama.cpp's."""
    return ARCHITECTURES.get(name) or next((a for a in ARCHITECTURES.values() if a.name == name), None)


def by_model_type(model_type: str) -> Architecture | None:
    return next((a for a in ARCHITECTURES.values() if model_type in a.model_types), None)


def of_fields(fields: Mapping[str, Any]) -> Architecture | None:
    """Of a file's values; None where it is none of these."""
    named = [a for a in ARCHITECTURES.values() if a.name == fields.get("general.architecture")]
    return next((a for a in named if not a.mark or f"{a.name}.{a.mark}" in fields), None)


@dataclass(frozen=True)
class Names:
    """Names of modules here and there; ``prefix`` stands before the names of the model's own modules."""

    architecture: Architecture | None = None
    prefix: str = ""

    def theirs(self, module: str) -> str | None:
        """What the file calls a module; None where it has no name for it."""
        a = self.architecture
        if a is None:
            return module
        if module in a.heads:
            return a.heads[module]
        if not module.startswith(self.prefix):
            return None
        return _renamed(module[len(self.prefix) :], a.names)

    def ours(self, module: str) -> str:
        """The inverse; what is unknown keeps its name."""
        a = self.architecture
        if a is None:
            return module
        for ours, theirs in a.heads.items():
            if theirs == module:
                return ours
        found = _renamed(module, {theirs: ours for ours, theirs in a.names.items()})
        return module if found is None else self.prefix + found


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    if name in table:
        return table[name]
    if (number := re.search(r"\.(\d+)\.", name)) is None:
        return None
    found = table.get(f"{name[: number.start(1)]}{{}}{name[number.end(1) :]}")
    return None if found is None else found.replace("{}", number[1])


def last(module: str) -> str:
    """attn_q of blk.3.attn_q."""
    return module.rpartition(".")[2]


def rotary_rows(a: Architecture | None, config: Config, module: str, rows: int) -> Tensor | None:
    """The rows, as transformers has them, in the order of the file, where llama.cpp turns neighbours of a head instead
    of its halves; None where the order is the same. Raises ValueError."""
    if a is None or last(module) not in a.rotary:
        return None
    key = a.rotary[last(module)]
    heads = config.get(key)
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise ValueError(f"{key}: expected a number of heads of {rows} rows, each of an even number, got {heads!r:.80}")
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


# ---- numbers of the model --------------------------------------------------------------------------------------------


def completed(a: Architecture, config: Config) -> dict[str, Any]:
    """A config with what it leaves to be understood. Raises ValueError for what llama.cpp does not compute."""
    c = dict(config)
    for key, known in a.requires.items():
        if c.get(key) is not None and c[key] not in known:
            raise ValueError(f"{key}: {a.name} of llama.cpp computes with {known[0]!r}, got {c[key]!r:.80}")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if "full_attention" in rope:  # positions of the layers within the window are their own
        local = rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters: sliding_attention: expected the type default, got {local!r:.80}")
        c["rope_local_base_freq"], rope = local["rope_theta"], rope["full_attention"]
    c["rope_parameters"] = rope
    c.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    if (part := rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor: expected 1, got {part!r:.80}")
    if "num_attention_heads" in c and "hidden_size" in c:
        if not c.get("num_key_value_heads"):
            c["num_key_value_heads"] = c["num_attention_heads"]
        if not c.get("head_dim"):
            c["head_dim"] = c["hidden_size"] // c["num_attention_heads"]
    if "n_embd" in c and not c.get("n_inner"):
        c["n_inner"] = 4 * c["n_embd"]
    for one, other in a.same:
        if c.get(one, c.get(other)) != c.get(other):
            raise ValueError(f"{one}: {a.name} of llama.cpp computes with {other}, {c[other]}, got {c[one]!r:.80}")
    layers = c.get("layer_types")
    if a.full and layers is not None:
        wanted = ["sliding_attention" if (i + 1) % a.full else "full_attention" for i in range(len(layers))]
        if layers != wanted:
            raise ValueError(
                f"layer_types: {a.name} of llama.cpp attends to everything in each layer {a.full}, got {layers!r:.80}"
            )
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    if window and not a.window and "max_position_embeddings" in c:  # up to there it makes no difference
        c["max_position_embeddings"] = min(c["max_position_embeddings"], window)
    return c


def to_fields(a: Architecture, config: Config) -> dict[str, Any]:
    """The file's values of a completed config. Raises ValueError for a number that is missing or none."""
    fields: dict[str, Any] = {}
    for key, name, kind in a.keys:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not 0 <= value < 2**32):
            raise ValueError(f"config.json: {name}: expected a number, got {value!r:.80}")
        fields[f"{a.name}.{key}"] = kind(value)
    rope = config["rope_parameters"]
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind == "linear":
        fields |= {f"{a.name}.rope.scaling.type": "linear", f"{a.name}.rope.scaling.factor": float(factor)}
    elif kind not in ("default", "llama3"):
        raise ValueError(f"config.json: rope_type: expected default, linear or llama3, got {kind!r:.80}")
    return fields | {f"{a.name}.{key}": value for key, value in a.values.items()}


def rope_factors(config: Config) -> Tensor | None:
    """What llama.cpp divides each frequency of the rotary positions by, where Llama 3.1 stretches them (rope_type
    llama3): 1 for short waves, ``factor`` for long ones, between them as their length lies."""
    rope = config.get("rope_parameters", {})
    if rope.get("rope_type", rope.get("type")) != "llama3" or "head_dim" not in config:
        return None
    dim, factor, old = config["head_dim"], rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    waves = 2 * torch.pi * config["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    smooth = ((old / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def from_fields(a: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that the values of a file tell."""
    config: dict[str, Any] = {"model_type": a.model_types[0]}
    for key, name, kind in a.keys:
        value = fields.get(f"{a.name}.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            config[name] = kind(value)
    config |= {key: known[0] for key, known in a.requires.items()}
    return completed(a, config)
