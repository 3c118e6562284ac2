"""From a float model to a quantized one and back, in place."""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..quant import QuantConfig
from .layers import AskewConv2d, AskewLinear, QuantizedLayer
from .policy import Policy
from .replace import MAKE_PERMANENT, check_replaceable, computed_tensors, replace_modules

LAYERS: dict[type[nn.Module], type] = {nn.Linear: AskewLinear, nn.Conv2d: AskewConv2d}
TWINS: dict[type[nn.Module], type] = LAYERS | {twin: twin for twin in LAYERS.values()}
NAMES_TOLD = 4  # of each type, in the line that says what stays float

logger = logging.getLogger("askew_kernels")


def quantize_(
    model: nn.Module,
    config: QuantConfig | Mapping[str, QuantConfig | None] | Policy | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Replaces every nn.Linear and nn.Conv2d of ``model``, in place, by its quantized twin; returns the model.

    config: one ``QuantConfig`` for all, or ``{pattern: config}`` where a pattern is a module's full name with ``*``
    and ``?`` and the first that matches counts (None, or no match: left alone), or a ``Policy``, which must fit the
    model by name or by role. filter_fn(module, fqn): whether to
    replace this one, e.g. to leave the first and the last layer alone. Parameters stay the same objects under the
    same names; hooks, flags and attributes of a replaced layer go on. A layer that is quantized already is quantized
    anew where its configuration differs.

    What has a weight of two and more dimensions and no quantized form (embeddings, nn.MultiheadAttention, Conv1D of
    transformers, experts in one parameter) stays float: one line of the logger ``askew_kernels`` says so, and
    ``left_float(model)`` lists it. Raises TypeError/ValueError before anything is replaced: for a pattern that matches
    no layer, and, naming the layer, where the weight is computed (weight_norm, a pruning mask, a parametrization).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    by_name = config.configs(model) if isinstance(config, Policy) else None
    patterns: dict[str, QuantConfig | None]
    if isinstance(config, Policy):
        config = by_name
    patterns = dict(config) if isinstance(config, Mapping) else {"*": config if config is not None else QuantConfig()}
    for pattern, value in patterns.items():
        if value is not None and not isinstance(value, QuantConfig):
            raise TypeError(f"config[{pattern!r}]: expected a QuantConfig or None, got {value!r}")
    used: set[str] = set()
    found: list[tuple[str, nn.Module, QuantConfig]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        twin = _twin(module)
        if twin is None:
            continue
        if filter_fn is not None and not filter_fn(module, name):
            continue
        if by_name is not None:  # exact, whatever characters a name has
            match = name if name in by_name else None
        else:
            match = next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)
        if match is not None:
            used.add(match)
        chosen = None if match is None else patterns[match]
        if chosen is not None and not (isinstance(module, QuantizedLayer) and module.config == chosen):
            found.append((name, module, chosen))
    if isinstance(config, Mapping) and by_name is None and (unused := [p for p in patterns if p not in used]):
        raise ValueError(f"config: no nn.Linear or nn.Conv2d matches {', '.join(map(repr, unused))}")
    if found and found[0][0] == "":
        raise ValueError("model: is itself a layer; use AskewLinear.from_float or AskewConv2d.from_float")
    made: dict[int, Any] = {}
    for name, module, _ in found:
        check_replaceable(name, module)
    renewed = {id(module) for _, module, _ in found}
    kept = [(name, m, m.config) for name, m in quantized_layers(model).items() if id(m) not in renewed]
    sharing: dict[int, tuple[str, QuantConfig]] = {}
    for name, module, chosen in kept + found:
        other, theirs = sharing.setdefault(id(module._parameters.get("weight", module)), (name, chosen))
        if theirs != chosen:
            raise ValueError(f"{name}: shares its weight with {other}, which is quantized otherwise: {theirs}")
    for name, module, chosen in found:
        if id(module) not in made:
            try:
                made[id(module)] = _twin(module).from_float(module, chosen)
            except (TypeError, ValueError) as error:
                for done in made.values():
                    done.quantizer.untie(done.weight)
                raise type(error)(f"{name}: {error}") from None
    replace_modules(model, {name: made[id(module)] for name, module, _ in found})
    _decline_fast_paths(model)
    tell_float(model, "quantize_")
    return model


def _twin(module: nn.Module) -> Any:
    """The class that quantizes this module, None where there is none; a parametrized layer counts as what it was."""
    kind: Any = type(module)
    if "parametrizations" in module._modules:
        kind = kind.__bases__[0]
    return TWINS.get(kind)


def left_float(model: nn.Module) -> dict[str, str]:
    """{parameter: why} of the weights of two and more dimensions that modules of ``model`` use unquantized, also those
    that they share with a quantized layer (an embedding tied to the head).

    Biases, norms and other vectors are float by design and not listed.
    """
    layers = quantized_layers(model)
    held = {id(p): name for name, m in layers.items() for p in m._parameters.values()}
    return {
        f"{name}.{key}" if name else key: _why_float(module, held.get(id(p)))
        for name, module in model.named_modules()
        if name not in layers
        for key, p in module.named_parameters(recurse=False)
        if p.dim() >= 2
    }


def _why_float(module: nn.Module, tied_to: str | None) -> str:
    kind = f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}".replace("torch.", "nn.")
    if tied_to is not None:
        return f"{kind} tied to {tied_to}, which reads the latent weight until hard_quantize_ writes the quantized one"
    if type(module) in LAYERS:
        return f"{kind}, left alone"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{kind}, whose weight nn.MultiheadAttention reads past its forward"
    if isinstance(module, tuple(LAYERS)):
        return f"{kind}, a subclass of {'nn.Linear' if isinstance(module, nn.Linear) else 'nn.Conv2d'}"
    return f"{kind}, which has no quantized form"


def tell_float(model: nn.Module, call: str) -> None:
    """One line of the logger for the weights that ``call`` leaves float. A plain nn.Linear or nn.Conv2d is left by the
    caller's choice (``filter_fn``, patterns), and not told."""
    by_kind: dict[str, list[str]] = {}
    for name, why in left_float(model).items():
        if type(model.get_submodule(name.rpartition(".")[0])) not in LAYERS:
            by_kind.setdefault(why.partition(",")[0], []).append(name)
    if by_kind:
        kinds = [
            f"{len(names)} of {kind} ({', '.join(names[:NAMES_TOLD])}{', …' if len(names) > NAMES_TOLD else ''})"
            for kind, names in by_kind.items()
        ]
        logger.warning("%s: these weights stay float: %s; ak.nn.left_float(model) says why", call, "; ".join(kinds))
    elif not any(isinstance(m, (*LAYERS, QuantizedLayer)) for m in model.modules()) and call == "quantize_":
        logger.warning("quantize_: the model has no nn.Linear or nn.Conv2d, nothing was quantized")


# torch's encoder layers look past their linear layers at the weights when they are evaluated, and compute with these.
# What they look at first to find out whether they may:
_FAST_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def _decline_fast_paths(model: nn.Module) -> None:
    """Turns torch's fast paths off where quantized layers are inside, and on again where none is any more."""
    for module in model.modules():
        for kind, (name, off) in _FAST_PATHS.items():
            if not isinstance(module, kind) or not hasattr(module, name):
                continue
            if any(isinstance(m, QuantizedLayer) for m in module.modules()):
                if not hasattr(module, "_askew_fast_path"):
                    module._askew_fast_path = getattr(module, name)  # type: ignore[assignment]
                setattr(module, name, off)
            elif hasattr(module, "_askew_fast_path"):
                setattr(module, name, module._askew_fast_path)
                del module._askew_fast_path


def dequantize_(model: nn.Module) -> nn.Module:
    """The inverse of ``quantize_``: float layers with the same Parameter objects (the latent weights), in place."""
    made: dict[int, nn.Module] = {}
    new = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (AskewLinear, AskewConv2d)) and name:
            new[name] = made.setdefault(id(module), module.to_float())
            module.quantizer.untie(module.weight)
    replace_modules(model, new)
    _decline_fast_paths(model)
    return model


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the quantized layers in ``model``."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


@torch.no_grad()
def hard_quantize_(model: nn.Module) -> nn.Module:
    """w <- s Q(w/s) in every quantized layer, in place: float and quantized weights become the same numbers.

    Raises RuntimeError naming the layer, before anything is written, where the weight is computed from others.
    """
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if maker := computed_tensors(layer).get("weight"):
            raise RuntimeError(f"{name}: its weight is not a Parameter but computed ({maker}); {MAKE_PERMANENT}")
    _decline_fast_paths(model)
    for layer in layers.values():
        layer.hard_quantize_()
    return model


def param_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for ``ASkewSGD`` / ``ASkewAdamW``: one for each quantization config, one for all the rest.

    ``options`` (lr, alpha, skew, …) go to every group; ``weight_decay`` too, so give the plain group its own afterwards
    where biases and norms should have none. Parameters that do not require a gradient are left out. Where a layer's
    weight is computed (weight_norm, a pruning mask) what it is made from goes to the rest, which is told (UserWarning).
    """
    _decline_fast_paths(model)  # of models that were put together by hand
    groups: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for name, layer in quantized_layers(model).items():
        layer._tied()
        if maker := computed_tensors(layer).get("weight"):
            warnings.warn(f"{name}: its weight is not a Parameter but computed ({maker}): the forward quantizes it, "
                          "but it is not under the constraint", stacklevel=2)  # fmt: skip
            for p in layer.parameters():  # a pruning mask leaves the Parameter under another name
                layer.quantizer.untie(p)
            continue
        if not layer.weight.requires_grad or id(layer.weight) in seen:
            continue
        seen.add(id(layer.weight))
        c: QuantConfig = layer.config
        group = groups.setdefault(c.to_json(), {
            "params": [], "grid": c.weight, "scale": c.scale, "granularity": c.granularity, "group_size": c.group_size,
            "sawb_coefficients": c.sawb_coefficients, **options,
        })  # fmt: skip
        group["params"].append(layer.weight)
    plain = [p for p in model.parameters() if p.requires_grad and id(p) not in seen]
    return [*groups.values(), *([{"params": plain, **options}] if plain else [])]
