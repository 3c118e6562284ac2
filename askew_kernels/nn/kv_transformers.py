"""Quantized keys and values in models of transformers: what attentions see in training, and the cache of generation.

``kv``: a ``kv.QuantizedKV``, which is asked for its cache and called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

HELD = "quantized_kv"  # the module's name in the model
SEEN = "_askew_kv"  # where an attention finds it
PREFIX = "askew_kv_"  # of the names of attention functions


class Layer(DynamicLayer):
    """One attention's cache of codes."""

    def __init__(self, kv: Any) -> None:
        super().__init__()
        self.cache = kv.cache()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.cache.update(key_states, value_states)

    def get_seq_length(self, *args: Any) -> int:
        return len(self.cache)

    def reset(self) -> None:
        self.cache.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """A negative number: so many fewer tokens; a positive one, of earlier releases: so many are left."""
        left = tokens_to_remove if tokens_to_remove > 0 else len(self.cache) + tokens_to_remove
        self.cache.cut(max(left, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.map(lambda t: t[indices])


def cache(kv: Any) -> Cache:
    return Cache(layer_class_to_replicate=partial(Layer, kv))  # type: ignore[arg-type]


def insert(model: Any, kv: Any) -> None:
    """See ``quantize_kv_``, which has checked ``kv``."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected one of transformers, got {type(model).__name__}; in others call the "
                        "module in their attention: k, v = kv(k, v)")  # fmt: skip
    remove(model)
    bases = _bases(model)
    for base in bases.values():
        register(base)
    model.set_attn_implementation({key: PREFIX + base for key, base in bases.items()})
    if not model.config._attn_implementation.startswith(PREFIX):
        raise ValueError(f"model: {type(model).__name__} takes no other attention functions; in others call it in the "
                         "attention instead: k, v = kv(k, v)")  # fmt: skip
    model.add_module(HELD, kv)
    for module in model.modules():
        if hasattr(module, "config"):  # an attention asks its own for the function
            module.__dict__[SEEN] = kv  # in a copy or a file it is that one's
    kv.replaced = tuple(bases.values())


def remove(model: Any) -> None:
    """Undoes ``insert``, of parts of the model, too."""
    for part in [m for m in model.modules() if isinstance(getattr(m, HELD, None), nn.Module)]:
        part.set_attn_implementation(_bases(part))
        delattr(part, HELD)
        for module in part.modules():
            module.__dict__.pop(SEEN, None)


def register(base: str) -> None:
    """Makes what stands in for the attention function ``base`` known to transformers, in every process."""
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + base, partial(_attention, base))  # type: ignore[arg-type]
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _bases(model: Any) -> dict[str, str]:
    """The attention functions of the model ("") and of the parts of its config, as ``set_attn_implementation`` takes
    them."""
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    configs = {"": model.config} | {key: part for key, part in parts.items() if part is not None}
    return {key: str(config._attn_implementation).removeprefix(PREFIX) for key, config in configs.items()}


def _attention(base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any,
               **kwargs: Any) -> Any:  # fmt: skip
    kv: Any = getattr(module, SEEN, None)  # None: of another model with the same config, whose keys stay as they are
    if kv is not None and not kv.gave(key, value):
        key, value = kv(key, value)
    return _function(module, base)(module, query, key, value, *args, **kwargs)


def _function(module: nn.Module, base: str) -> Callable[..., Any]:
    """The eager one is each architecture's own."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, own)  # type: ignore[arg-type]
