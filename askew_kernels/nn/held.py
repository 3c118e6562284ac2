"""Weights that one module holds as its Parameter, and a layer of the same name quantizes.

The module keeps the Parameter under its key, and gets a class (a ``Holder`` before its own) that computes with what the
layer gives. ``FINDERS`` has the kinds of such modules; ``experts`` and ``attention`` are theirs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .layers import QuantizedLayer
from .packed import PackedLayer
from .replace import base_of, derived


class HeldWeight(nn.Module):
    """A float weight, which another module holds."""

    weight: Any

    def current(self) -> Tensor:
        """What is multiplied with."""
        return self.weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)  # the holder's

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list,
                              *rest: Any) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}weight"]  # the holder tells


# functions of torch and accelerate that ask a module for what it holds by an attribute's name, and where that stands;
# or the local variable with the parts of a whole name, whose last is asked of the Parameters and others of the layers
HELD_BY = {
    "get_submodule": "_modules",
    "get_parameter": "_parameters",
    "reset_sharded_param": "_parameters",
    "_get_fqns": "_modules",  # get_state_dict of torch.distributed.checkpoint; leaves what the last part gives
    "set_module_tensor_to_device": "splits",
    "retie_parameters": "splits",
}


def being_exported() -> bool:
    """Whether the caller's caller lists the tensors of a model that torch.export takes: a program cannot have a tensor
    and a module of one name."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("<genexpr>", "named_modules"):
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "_named_members":
        return False
    while frame is not None and frame.f_code.co_name in ("_named_members", "named_parameters", "named_buffers"):
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith(("torch.export.", "torch._export."))


class Holder(nn.Module):
    """Comes before the class of a module that holds weights. The Parameter is the module's as before, and its layer's,
    too."""

    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__["_modules"].get(name)
        if not isinstance(layer, HeldWeight):
            return super().__getattr__(name)
        if torch.compiler.is_dynamo_compiling():  # which does not look at frames
            return self.read(name, layer)
        caller = sys._getframe(1)
        if (kept := HELD_BY.get(caller.f_code.co_name)) is None:
            return self.read(name, layer)
        if not kept.startswith("_"):
            kept = "_parameters" if caller.f_locals.get(kept, [name])[-1] == name else "_modules"
        return self.__dict__[kept][name]

    def read(self, name: str, layer: Any) -> Any:
        """What the attribute of that name is: the Parameter, or a packed layer's weight, decoded where it is used."""
        return layer.weight

    def __setattr__(self, name: str, value: Any) -> None:
        layer = self.__dict__.get("_modules", {}).get(name)
        if isinstance(layer, HeldWeight) and isinstance(value, nn.Parameter):
            layer.__dict__["_loading"] = True  # mostly so; scales come then with the weight
            try:
                layer.weight = value
            finally:
                del layer.__dict__["_loading"]
            self._parameters[name] = value
        elif isinstance(value, HeldWeight):
            self._modules[name] = value
            if (weight := value._parameters.get("weight")) is not None:
                self._parameters[name] = weight
            else:
                self._parameters.pop(name, None)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """RuntimeError for a weight that has a layer: what computes it from another tensor, as parametrizations and
        peft's ``target_parameters`` do, would go past its quantization."""
        if isinstance(self._modules.get(name), HeldWeight):
            raise RuntimeError(f"{name}: is quantized, its module cannot compute it otherwise (a parametrization, an "
                               "adapter of target_parameters or of nn.MultiheadAttention); call dequantize_ or unpack_ "
                               "first")  # fmt: skip
        super().__delattr__(name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; to torch.export the Parameters are those of the layers alone."""
        found = super().named_modules(*args, **kwargs)
        if not being_exported():
            return found
        own = {name: p for name, p in self._parameters.items() if name not in self.held_layers()}
        alone = SimpleNamespace(_parameters=own, _buffers=self._buffers)
        return ((name, alone if module is self else module) for name, module in found)

    @property
    def __jit_ignored_attributes__(self) -> list[str]:  # what torch.jit asks before it lists a module's tensors
        if held := [*self.held_layers()]:
            raise RuntimeError(f"{held[0]}: torch.jit cannot have a Parameter and the layer that quantizes it under "
                               "one name; call pack_ or dequantize_ first, or use torch.export")  # fmt: skip
        return []

    def held_layers(self) -> dict[str, Any]:
        """Those whose Parameter is this module's."""
        return {n: m for n, m in self._modules.items() if isinstance(m, HeldWeight) and n in self._parameters}

    def is_needed(self) -> bool:
        """Whether the module's own class would not do."""
        return any(isinstance(m, HeldWeight) for m in self._modules.values())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        layers = self.held_layers()
        for layer in layers.values():
            layer._parameters["weight"] = None
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, layer in layers.items():
                layer._parameters["weight"] = self._parameters[name]
                if isinstance(layer, QuantizedLayer):
                    layer._tied().moved()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.held_layers() if not keep_vars else ():  # in the order that writers of files take
            destination[f"{prefix}{name}"] = destination[f"{prefix}{name}"].contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name in self.held_layers():
            if f"{prefix}{name}" in state_dict:  # loaded by now; for the layer, which asks whether a weight came
                state_dict[f"{prefix}{name}.weight"] = self._parameters[name]


# {holder: {name: float layer} of the Parameters of a module that it holds and that have no layer yet}
FINDERS: dict[type[Holder], Callable[[nn.Module], dict[str, Any]]] = {}


def held_weights(module: nn.Module) -> dict[str, Any]:
    """{name: float layer} of the Parameters of ``module`` that are held weights and have no layer yet; the layers are
    not part of it."""
    return next((found for find in FINDERS.values() if (found := find(module))), {})


def all_held_weights(model: nn.Module) -> dict[str, Any]:
    """``held_weights`` of all modules of ``model``, by full names, under all names that a module has."""
    found: dict[str, Any] = {}
    of: dict[int, dict[str, Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        layers = of.setdefault(id(module), held_weights(module))
        found.update({f"{path}.{name}" if path else name: layer for name, layer in layers.items()})
    return found


def become(module: nn.Module, holder: type[Holder]) -> None:
    """Puts ``holder`` before the class of ``module``."""
    if not isinstance(module, Holder):
        module.__class__ = derived(holder, type(module))


def expose(model: nn.Module, names: Iterable[str]) -> None:
    """Makes layers of these held weights, float ones, in place."""
    for path, _, name in (full.rpartition(".") for full in names):
        module = model.get_submodule(path)
        if name in module._modules:  # under another name already
            continue
        holder, layer = next((h, found[name]) for h, find in FINDERS.items() if name in (found := find(module)))
        become(module, holder)
        others = {n: m for n, m in module._modules.items() if not isinstance(m, HeldWeight)}
        for other in others:
            del module._modules[other]
        setattr(module, name, layer)
        module._modules.update(others)  # held weights come first, as their Parameters do: the order of layers tells


@contextlib.contextmanager
def exposed(model: nn.Module) -> Iterator[bool]:
    """All held weights have layers meanwhile, and those that are float afterwards none. Gives whether there are any."""
    found = all_held_weights(model)
    expose(model, found)
    try:
        yield bool(found)
    finally:
        conceal(model)


def conceal(model: nn.Module) -> None:
    """The inverse of ``expose``, for all layers that are float."""
    for module in model.modules():
        if isinstance(module, Holder):
            layers = {n: m for n, m in module._modules.items() if isinstance(m, HeldWeight)}
            for name in [n for n, m in layers.items() if not isinstance(m, (QuantizedLayer, PackedLayer))]:
                del module._modules[name]
            if not module.is_needed():
                module.__class__ = base_of(type(module))
