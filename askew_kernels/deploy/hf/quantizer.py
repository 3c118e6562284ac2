"""This library as a quantization method of transformers."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...nn import dequantize_, hard_quantize_, quantize_, unpack_
from ...nn.held import all_held_weights, expose
from ...nn.kinds import DEFAULT, KINDS, replaceable
from ...nn.layers import GRIDS, INPUT, STATE, QuantizedLayer
from ...nn.packed import EXTRA_STATE, PackedLayer
from ...nn.replace import WATCHERS, replace_modules
from ...quant import QuantConfig, check_codes
from . import METHOD, VERSION, describe, descriptions, layers_of, shared_parts

IGNORED = "_keys_to_ignore_on_load_missing"  # of a model: patterns of keys that a checkpoint need not have


@register_quantization_config(METHOD)
class AskewConfig(QuantizationConfigMixin):
    """How ``from_pretrained(folder, quantization_config=…)`` quantizes a float model, for training.

    config: a ``QuantConfig`` for all layers or ``{pattern: config}``, as ``quantize_`` takes them, also as dicts.
    kinds: of layers. modules_to_not_convert: names that stay float; None: the head and what is tied to it, as with
    other methods of transformers. A folder that was saved says itself what its layers are (``groups``, ``aliases``).
    Raises TypeError/ValueError naming the argument.
    """

    def __init__(self, config: Any = None, kinds: str | Iterable[str] = DEFAULT,
                 modules_to_not_convert: Iterable[str] | None = None, *, groups: list[dict[str, Any]] | None = None,
                 aliases: Mapping[str, str] | None = None, version: int = VERSION, quant_method: str = METHOD,
                 **unknown: Any) -> None:  # fmt: skip
        if unknown:
            raise ValueError(f"AskewConfig: unknown argument {next(iter(unknown))}")
        if quant_method != METHOD:
            raise ValueError(f"quant_method: expected {METHOD!r}, got {quant_method!r}")
        self.quant_method: Any = METHOD
        self.version = version
        self.groups, self.aliases = groups, dict(aliases or {})
        if groups is not None:
            descriptions(self.to_dict(), "quantization_config")  # says what is wrong with them
        self.config = _configs(config)
        self.kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"quant_method": METHOD, "version": self.version}
        if self.groups is not None:
            return told | {"groups": self.groups} | ({"aliases": self.aliases} if self.aliases else {})
        configs = {pattern: None if c is None else c.to_dict() for pattern, c in self.config.items()}
        return told | {"config": configs, "kinds": self.kinds, "modules_to_not_convert": self.modules_to_not_convert}


def _configs(config: Any) -> dict[str, QuantConfig | None]:
    """By pattern, from all that ``AskewConfig`` takes."""
    if isinstance(config, Mapping) and "weight" in config:
        config = QuantConfig.from_dict(dict(config))
    if not isinstance(config, Mapping):
        config = {"*": QuantConfig() if config is None else config}
    made = {k: QuantConfig.from_dict(dict(c)) if isinstance(c, Mapping) else c for k, c in config.items()}
    for pattern, c in made.items():
        if c is not None and not isinstance(c, QuantConfig):
            raise TypeError(f"config[{pattern!r}]: expected a QuantConfig, its dict or None, got {c!r:.80}")
    return made


class _Exact:
    """Names of layers, taken as they are, with their configs: what ``quantize_`` takes as a policy."""

    def __init__(self, configs: dict[str, QuantConfig]) -> None:
        self.named = configs

    def configs(self, model: nn.Module) -> dict[str, QuantConfig]:
        return self.named


@register_quantizer(METHOD)
class AskewQuantizer(HfQuantizer):
    """Puts quantized or packed layers into a model before its weights are loaded, and says what they are when it is
    saved: whatever ``quantize_``, ``pack_`` and the rest did in between."""

    requires_calibration = False
    quantization_config: AskewConfig

    def __init__(self, quantization_config: AskewConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._model: Any = lambda: None
        self._before: Any = None  # the model's own list of keys that may be missing
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles, which are another model's
        return {**self.__dict__, "_model": None, "_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _model=lambda: None)

    # ---- loading ----

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        told = self.quantization_config
        if told.groups is None:
            skipped = self.get_modules_to_not_convert(model, told.modules_to_not_convert, model._keep_in_fp32_modules)
            quantize_(model, told.config, lambda _, name: should_convert_module(name, skipped), told.kinds)
            self._may_lack(model, [rf"\.({'|'.join((*STATE, GRIDS))})$", rf"\.{INPUT}\."])
            return model
        described = descriptions(told.to_dict(), "quantization_config")
        owners = {key: key.rpartition(".") for pair in told.aliases.items() for key in pair}
        names = _names_in(model, {*described, *(path for path, _, _ in owners.values())})
        layers = {names[name]: d for name, d in described.items() if name in names}
        keys = {key: f"{names[path]}.{part}" for key, (path, _, part) in owners.items() if path in names}
        told.aliases = {keys[key]: keys[kept] for key, kept in told.aliases.items() if {key, kept} <= keys.keys()}
        held = [name for name, d in layers.items() if getattr(KINDS.get(str(d.get("kind"))), "held", False)]
        expose(model, [name for name in held if name in all_held_weights(model)])
        trained, packed = dict[str, QuantConfig](), dict[str, PackedLayer]()
        for name, d in layers.items():
            try:
                module, config = _found(model, name, d), QuantConfig.from_dict(d["config"])
                if d["packed"]:
                    packed[name] = _packed_twin(module, config, d)
                else:
                    trained[name] = config
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"quantization_config: {name}: {what}") from None
        if trained:
            quantize_(model, _Exact(trained))
        replace_modules(model, packed)
        for layer in packed.values():  # what it means is in the config, and need not be in the file
            hook = layer.register_state_dict_post_hook(_without_extra_state)
            self._hooks.append(hook)
        self._may_lack(model, [f"^{re.escape(key)}$" for key in told.aliases])
        tied = {f"{name}.weight" for name in packed}
        model.all_tied_weights_keys = {
            k: v for k, v in model.all_tied_weights_keys.items() if k not in tied and v not in tied
        }
        return model

    def _may_lack(self, model: Any, patterns: list[str]) -> None:
        self._before = getattr(model, IGNORED, None)
        setattr(model, IGNORED, [*(self._before or []), *patterns])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        setattr(model, IGNORED, self._before)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for key, kept in self.quantization_config.aliases.items():
            owner, name = _owner(model, key)
            setattr(owner, name, getattr(*_owner(model, kept)))
        for name, layer in layers_of(model).items():
            if isinstance(layer, PackedLayer):
                _check_loaded(name, layer, self.quantization_config.aliases)
        self.attached(model)
        model.config.quantization_config = self.quantization_config
        return model

    def attached(self, model: Any) -> None:
        """``model`` is the one that this quantizer speaks of."""
        self._model = weakref.ref(model)
        self.quantization_config = _description_of(model)

    # ---- what transformers asks ----

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether layers are in training, not packed."""
        model = self._model()
        if model is not None:
            return any(isinstance(m, QuantizedLayer) for m in model.modules())
        return not all(group["packed"] for group in self.quantization_config.groups or [{"packed": False}])

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """What ``save_pretrained`` writes; before, the model's config learns what its layers are by now."""
        layers = layers_of(model)
        if not layers:
            self.remove_quantization_config(model)
            return None, {}
        self.attached(model)
        model.config.quantization_config = self.quantization_config
        model._weight_conversions = []  # names as in the model: what else is renamed and cut on saving are weights
        extra = {f"{name}.{EXTRA_STATE}" for name, layer in layers.items() if isinstance(layer, PackedLayer)}
        left_out = extra | shared_parts(layers).keys()
        state = {key: value for key, value in model.state_dict().items() if key not in left_out}
        for name, layer in layers.items():  # layers that share a weight share these, and each needs its own in a file
            if isinstance(layer, QuantizedLayer):
                state |= {f"{name}.{key}": state[f"{name}.{key}"].clone() for key in STATE if f"{name}.{key}" in state}
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Float layers with the quantized weights."""
        model = unpack_(dequantize_(hard_quantize_(model)))
        return model if dtype is None else model.to(dtype)


def attach(model: Any) -> Any:
    """Makes ``save_pretrained`` of ``model``, one of transformers', write what its quantized and packed layers are, and
    ``from_pretrained`` make them again. ``quantize_``, ``pack_`` and ``load_packed`` do so themselves. Returns the
    model. Raises ValueError where it has no such layers or was quantized by another method."""
    if not layers_of(model):
        raise ValueError("model: has no quantized and no packed layers; call quantize_(model) first")
    present = getattr(model, "hf_quantizer", None)
    if present is not None and not isinstance(present, AskewQuantizer):
        raise ValueError(f"model: is quantized by {type(present).__name__} already")
    model.hf_quantizer = present or AskewQuantizer(_description_of(model), pre_quantized=True)
    model.hf_quantizer.attached(model)
    return model


def _base_class() -> Any:
    """Of transformers' models; nothing is one before that module is imported, which imports this one."""
    return getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())


def _follow(model: nn.Module) -> None:
    """Attaches the outermost models of transformers in ``model`` that have layers of this library, and lets go of those
    that have none any more."""
    inner: set[int] = set()
    for module in model.modules():
        if not isinstance(module, _base_class()) or id(module) in inner:
            continue
        inner.update(map(id, module.modules()))
        present = getattr(module, "hf_quantizer", None)
        if layers_of(module) and (present is None or isinstance(present, AskewQuantizer)):
            attach(module)
        elif isinstance(present, AskewQuantizer):
            present.remove_quantization_config(module)


WATCHERS.append(_follow)


def _description_of(model: nn.Module) -> AskewConfig:
    layers = layers_of(model)
    return AskewConfig.from_dict(describe(layers, shared_parts(layers)))


def _names_in(model: Any, names: Iterable[str]) -> dict[str, str]:
    """{name of a module in the folder: its name in the model}, which may be loaded without the head that it was saved
    with, or with one that it had not."""
    prefix, names = f"{model.base_model_prefix}.", sorted(names)
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    ways = [{name: name for name in names},
            {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)},
            {name: prefix + name for name in names}]  # fmt: skip
    return max(ways, key=lambda way: sum(name in modules for name in way.values()))


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), name


def _without_extra_state(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(prefix + EXTRA_STATE, None)


def _found(model: nn.Module, name: str, d: Mapping[str, Any]) -> nn.Module:
    """The layer of ``model`` that is meant. Raises ValueError where it has no such one."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no such layer, the folder's config.json has") from None
    kind, weight = KINDS.get(str(d["kind"])), getattr(module, "weight", None)
    if kind is None:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {d['kind']!r}")
    shape = None if weight is None else list(weight.shape)
    if replaceable(module) is not kind or shape != d["shape"]:
        raise ValueError(f"expected {kind.name} {d['shape']} in the model, got {type(module).__name__} {shape}")
    return module


def _packed_twin(module: Any, config: QuantConfig, d: Mapping[str, Any]) -> PackedLayer:
    """Empty, on the meta device, in the model's type, with the module's own bias."""
    scale_dtype = getattr(torch, str(d["scale_dtype"]), d["scale_dtype"])
    layer: Any = KINDS[d["kind"]].packed.like(module, config=config, trits=d["trits"], scale_dtype=scale_dtype,
                                              dtype=module.weight.dtype)  # fmt: skip
    layer.bias = getattr(module, "bias", None)
    return layer


def _check_loaded(name: str, layer: PackedLayer, aliases: Mapping[str, str]) -> None:
    """ValueError naming the layer where the file lacked a part of it, or holds other codes than its grid has."""
    for part in ("weight_codes", "weight_scale", *(["bias"] if layer.bias is not None else [])):
        t, key = getattr(layer, part), f"{name}.{part}"
        if key not in aliases and not getattr(t, "_is_hf_initialized", False):
            raise ValueError(f"{key}: is missing in the file, or has another shape there")
    if layer.weight_codes.is_meta:  # offloaded
        return
    if not bool((layer.weight_scale.float().isfinite() & (layer.weight_scale > 0)).all()):
        raise ValueError(f"{name}.weight_scale: expected positive finite scales")
    try:
        check_codes(layer.weight_codes, layer.bits, layer.cols, len(layer.config.weight.levels))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
