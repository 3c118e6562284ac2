"""From a float model to a quantized one and back, in place."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..quant import QuantConfig
from .layers import AskewConv2d, AskewLinear, QuantizedLayer
from .policy import Policy

LAYERS: dict[type[nn.Module], type] = {nn.Linear: AskewLinear, nn.Conv2d: AskewConv2d}


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
    same names. Raises TypeError/ValueError before anything is replaced; a pattern that matches no layer is an error.
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
    found: list[tuple[str, QuantConfig]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in LAYERS or (filter_fn is not None and not filter_fn(module, name)):
            continue
        if by_name is not None:  # exact, whatever characters a name has
            match = name if name in by_name else None
        else:
            match = next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)
        if match is None:
            continue
        used.add(match)
        if (chosen := patterns[match]) is not None:
            found.append((name, chosen))
    if isinstance(config, Mapping) and by_name is None and (unused := [p for p in patterns if p not in used]):
        raise ValueError(f"config: no nn.Linear or nn.Conv2d matches {', '.join(map(repr, unused))}")
    replaced: dict[int, nn.Module] = {}
    swaps = []
    for name, chosen in found:
        module = model.get_submodule(name)
        if id(module) not in replaced:
            replaced[id(module)] = LAYERS[type(module)].from_float(module, chosen)  # type: ignore[attr-defined]
        swaps.append((name, replaced[id(module)]))
    if swaps and swaps[0][0] == "":
        raise ValueError("model: is itself a layer; use AskewLinear.from_float or AskewConv2d.from_float")
    for name, new in swaps:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def dequantize_(model: nn.Module) -> nn.Module:
    """The inverse of ``quantize_``: float layers with the same Parameter objects (the latent weights), in place."""
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, (AskewLinear, AskewConv2d)) and name:
            parent, _, child = name.rpartition(".")
            new = made.setdefault(id(module), module.to_float())
            setattr(model.get_submodule(parent), child, new)
    return model


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the quantized layers in ``model``."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


@torch.no_grad()
def hard_quantize_(model: nn.Module) -> nn.Module:
    """w <- s Q(w/s) in every quantized layer, in place: float and quantized weights become the same numbers."""
    for layer in quantized_layers(model).values():
        layer.hard_quantize_()
    return model


def param_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for ``ASkewSGD`` / ``ASkewAdamW``: one for each quantization config, one for all the rest.

    ``options`` (lr, alpha, skew, …) go to every group; ``weight_decay`` too, so give the plain group its own afterwards
    where biases and norms should have none. Parameters that do not require a gradient are left out.
    """
    groups: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for layer in quantized_layers(model).values():
        layer._tied()
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
