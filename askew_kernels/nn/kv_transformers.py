"""Quantized keys and values in models of transformers: what attentions see in training, and the cache of generation.

``kv``: a ``kv.QuantizedKV``, which is asked for its cache and called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

HELD = "quantized_kv"  # the module's name in the model
SEEN = "_askew_kv"  # where an attention finds it
PREFIX = "askew_kv_"  # of the names of attention functions


AS_CODES = ("DynamicLayer", "DynamicSlidingWindowLayer")  # classes of layers that ``Layer`` stands in for
AS_THEY_ARE = ("LinearAttentionLayer", "DummyLayer")  # those that keep no keys and values


class Layer(DynamicLayer):
    """One attention's cache of codes; of a sliding window all tokens are kept."""

    def __init__(self, kv: Any) -> None:
        self.cache = kv.cache()
        self.updates = 0
        super().__init__()

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Decoded for who reads them: a cross-attention does in its later steps."""
        return self.cache.keys() if len(self.cache) else None

    @keys.setter
    def keys(self, value: Any) -> None:
        self._take(value)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self.cache.values() if len(self.cache) else None

    @values.setter
    def values(self, value: Any) -> None:
        self._take(value)

    def _take(self, value: Any) -> None:
        """None is what a layer starts with."""
        if value is not None:
            raise AttributeError("a cache of codes takes keys and values by update() alone")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.updates += 1
        found = self.cache.update(key_states, value_states)
        self.cache.kv.is_due(found)
        return found

    def get_seq_length(self, *args: Any) -> int:
        return len(self.cache)

    def reset(self) -> None:
        self.cache.reset()
        self.updates, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """A negative number: so many fewer tokens; a positive one, of earlier releases: so many are left."""
        left = tokens_to_remove if tokens_to_remove > 0 else len(self.cache) + tokens_to_remove
        self.cache.cut(max(left, 0))

    def offload(self) -> None:
        self.cache.map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.cache.map(lambda t: t.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.map(lambda t: t[indices])


class _Found(list):
    """Layers that are made as they are met, of a model that is not known: those that have to be there are missed."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise ValueError(f"model: it asks for the state of layer {index}, which is no attention's; give the cache "
                             "the model: kv.transformers_cache(model)")  # fmt: skip
        return super().__getitem__(index)


class CodesCache(DynamicCache):
    """``layers`` of a model, or None: attentions only, as they are met."""

    def __init__(self, kv: Any, layers: list[Any] | None) -> None:
        super().__init__()
        self.layers = _Found() if layers is None else layers
        self.layer_class_to_replicate = partial(Layer, kv) if layers is None else None  # type: ignore[assignment]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any,
               **kwargs: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Raises ValueError for encoder-decoders, whose two attentions of a layer would share one's keys."""
        if self.layer_class_to_replicate is not None and layer_idx == len(self.layers) > 0:
            if self.layers[-1].updates > 1:  # type: ignore[union-attr]
                raise ValueError("model: two attentions of one layer have given their keys, as those of an encoder-"
                                 "decoder do; give the cache the model: kv.transformers_cache(model)")  # fmt: skip
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def cache(kv: Any, model: Any) -> Cache:
    """See ``QuantizedKV.transformers_cache``."""
    if model is None:
        return CodesCache(kv, None)
    config = getattr(model, "config", model)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"model: expected one of transformers, or its config, got {type(model).__name__}")
    decoder = config.get_text_config(decoder=True)
    if not config.is_encoder_decoder:
        return _of_layers(kv, decoder)
    return EncoderDecoderCache(_of_layers(kv, decoder), _of_layers(kv, decoder))


def _of_layers(kv: Any, config: Any) -> Cache:
    """A cache of what transformers would keep for each layer."""
    layers, name = DynamicCache(config=config).layers, config.model_type
    found = [Layer(kv) if type(layer).__name__ in AS_CODES else layer for layer in layers]
    for i, layer in enumerate(found):
        if not isinstance(layer, Layer) and type(layer).__name__ not in AS_THEY_ARE:
            raise ValueError(f"model: layer {i} of {name!r} keeps a {type(layer).__name__}, for which there are no "
                             "codes; generate with a cache of transformers")  # fmt: skip
    if found and not any(isinstance(layer, Layer) for layer in found):
        kept = ", ".join(sorted({type(layer).__name__ for layer in found}))
        raise ValueError(f"model: {name!r} has no attention whose keys and values are kept, only {kept}")
    return CodesCache(kv, found or None)


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
    kv.replaced, kv.model_config = tuple(bases.values()), model.config


def remove(model: Any) -> None:
    """Undoes ``insert``, of parts of the model, too."""
    for part in [m for m in model.modules() if isinstance(getattr(m, HELD, None), nn.Module)]:
        part.set_attn_implementation(_bases(part))
        getattr(part, HELD).model_config = None
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
    if kv is not None:
        due = kv.take_due()
        if not kv.gave(key, value):
            if due:
                raise ValueError(f"model: {type(module).__name__} changes what the cache has given before it attends, "
                                 "as attentions do that keep latents, so that its codes are not what training saw; "
                                 "generate with a cache of transformers")  # fmt: skip
            key, value = kv(key, value)
    return _function(module, base)(module, query, key, value, *args, **kwargs)


def _function(module: nn.Module, base: str) -> Callable[..., Any]:
    """The eager one is each architecture's own."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, own)  # type: ignore[arg-type]
