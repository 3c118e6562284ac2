"""Weights of experts: the matrices of many in one Parameter of three dimensions, which the module that holds it reads.

transformers' mixtures of experts are such: ``gate_up_proj`` (experts, outputs, inputs) and ``down_proj`` are Parameters
of one module, whose forward indexes them or passes them on whole. Each is a layer here, ``ExpertWeight`` where it is
float, under the Parameter's own name. The module keeps the Parameter under its key, and gets a class (``Holder`` before
its own) that gives the quantized weight to whoever reads the attribute.
"""

from __future__ import annotations

import contextlib
import fnmatch
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..quant import QuantConfig
from .layers import QuantizedLayer
from .packed import PackedLayer
from .replace import base_of, derived

# {pattern of a class's name: whether its matrices are (inputs, outputs) where it does not say so by `is_transposed`};
# the first that matches counts. Of these classes every Parameter of three dimensions is a weight of experts.
EXPERTS = {"Llama4TextExperts": True, "*Expert": False, "*Experts": False, "*NaiveMoe": False}


class ExpertWeight(nn.Module):
    """A float weight (num_experts, outputs, inputs), which another module multiplies with."""

    weight: Any

    def __init__(self, num_experts: int, height: int, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_experts, self.height, self.width = num_experts, height, width
        self.weight = nn.Parameter(torch.zeros(num_experts, height, width, device=device, dtype=dtype))

    def current(self) -> Tensor:
        """What is multiplied with."""
        return self.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{type(self).__name__}: has no product of its own; call the module that holds the weight")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}weight", None)  # the holder's

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list,
                              *rest: Any) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}weight"]  # the holder tells

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, height={self.height}, width={self.width}"


class TransposedExpertWeight(ExpertWeight):
    """A float weight (num_experts, inputs, outputs)."""


class AskewExperts(QuantizedLayer, ExpertWeight):  # type: ignore[misc]
    """Experts with a quantized weight: each one's matrix like a linear layer's. Raises ValueError for ``activation``:
    their inputs do not come by here."""

    bias = None

    def _attach(self, config: QuantConfig) -> None:
        if getattr(config, "activation", None) is not None:
            raise ValueError(f"activation: the inputs of experts are not quantized, got {config.activation}; give "
                             "{pattern: config} with another configuration for these")  # fmt: skip
        super()._attach(config)

    def current(self, dtype: torch.dtype | None = None) -> Tensor:
        weight: Any = super().current(dtype)
        if weight is not self.weight and self._ordinary():
            weight._is_hf_initialized = True  # transformers is not to draw random numbers into what is kept
        return weight


class AskewTransposedExperts(AskewExperts, TransposedExpertWeight):  # type: ignore[misc]
    """``AskewExperts`` of matrices (inputs, outputs)."""


class PackedExperts(PackedLayer, ExpertWeight):  # type: ignore[misc, override]
    """Experts with a packed weight: the matrices that are indexed are decoded, or all where the whole is read."""

    def current(self) -> Any:
        return self.weight


class PackedTransposedExperts(PackedExperts, TransposedExpertWeight):  # type: ignore[misc, override]
    """``PackedExperts`` of matrices (inputs, outputs)."""


# torch's functions that ask a module for what it holds by an attribute's name, and where that stands
HELD_BY = {"get_submodule": "_modules", "get_parameter": "_parameters", "reset_sharded_param": "_parameters"}


class Holder(nn.Module):
    """Comes before the class of a module that holds weights of experts: attributes that have a layer of their name give
    what it computes with. The Parameter is the module's as before, and its layer's, too."""

    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__["_modules"].get(name)
        if not isinstance(layer, ExpertWeight):
            return super().__getattr__(name)
        if (kept := HELD_BY.get(sys._getframe(1).f_code.co_name)) is not None:
            return self.__dict__[kept][name]
        known = self.__dict__.get("_current")
        if known is None or isinstance(layer, PackedLayer):
            return layer.current()
        key = name, torch.is_grad_enabled(), threading.get_ident()
        if key not in known:
            known[key] = layer.current()
        return known[key]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own. In one call a weight is the same tensor each time, whose gradient is put together once."""
        if "_current" in self.__dict__ or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        self.__dict__["_current"] = {}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__["_current"]

    def __setattr__(self, name: str, value: Any) -> None:
        layer = self.__dict__.get("_modules", {}).get(name)
        if isinstance(layer, ExpertWeight) and isinstance(value, nn.Parameter):
            layer.__dict__["_loading"] = True  # mostly so; scales come then with the weight
            try:
                layer.weight = value
            finally:
                del layer.__dict__["_loading"]
            self._parameters[name] = value
        elif isinstance(value, ExpertWeight):
            self._modules[name] = value
            if (weight := value._parameters.get("weight")) is not None:
                self._parameters[name] = weight
            else:
                self._parameters.pop(name, None)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """RuntimeError for a weight of experts: what computes it from another tensor, as parametrizations and peft's
        ``target_parameters`` do, would go past its quantization."""
        if isinstance(self._modules.get(name), ExpertWeight):
            raise RuntimeError(f"{name}: is quantized, its module cannot compute it otherwise (a parametrization, an "
                               "adapter of target_parameters); call dequantize_ or unpack_ first")  # fmt: skip
        super().__delattr__(name)

    def _layers(self) -> dict[str, Any]:
        """Those whose Parameter is this module's."""
        return {n: m for n, m in self._modules.items() if isinstance(m, ExpertWeight) and n in self._parameters}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        layers = self._layers()
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
        for name in self._layers() if not keep_vars else ():  # in the order that writers of files take
            destination[f"{prefix}{name}"] = destination[f"{prefix}{name}"].contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name in self._layers():
            if f"{prefix}{name}" in state_dict:  # loaded by now; for the layer, which asks whether a weight came
                state_dict[f"{prefix}{name}.weight"] = self._parameters[name]


def expert_weights(module: nn.Module) -> dict[str, ExpertWeight]:
    """{name: float layer} of the Parameters of ``module`` that are weights of experts and have no layer yet; the layers
    are not part of it."""
    cls = base_of(type(module)).__name__
    pattern = next((pattern for pattern in EXPERTS if fnmatch.fnmatchcase(cls, pattern)), None)
    if pattern is None or isinstance(module, (ExpertWeight, PackedLayer)):
        return {}
    transposed = getattr(module, "is_transposed", EXPERTS[pattern])
    found = {}
    for name, p in module._parameters.items():
        if p is None or p.dim() != 3 or not p.is_floating_point() or "bias" in name or name in module._modules:
            continue
        experts, height, width = p.shape
        layer = (TransposedExpertWeight if transposed else ExpertWeight)(experts, height, width, device="meta")
        layer.weight = p
        found[name] = layer.train(module.training)
    return found


def all_expert_weights(model: nn.Module) -> dict[str, ExpertWeight]:
    """``expert_weights`` of all modules of ``model``, by full names, under all names that a module has."""
    found: dict[str, ExpertWeight] = {}
    of: dict[int, dict[str, ExpertWeight]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        layers = of.setdefault(id(module), expert_weights(module))
        found.update({f"{path}.{name}" if path else name: layer for name, layer in layers.items()})
    return found


def expose(model: nn.Module, names: Iterable[str]) -> None:
    """Makes layers of these weights of experts, float ones, in place."""
    for path, _, name in (full.rpartition(".") for full in names):
        module = model.get_submodule(path)
        if name in module._modules:  # under another name already
            continue
        layer = expert_weights(module)[name]
        if not isinstance(module, Holder):
            module.__class__ = derived(Holder, type(module))
        setattr(module, name, layer)


@contextlib.contextmanager
def exposed(model: nn.Module) -> Iterator[bool]:
    """All weights of experts have layers meanwhile; those that are float afterwards have none. Gives whether there are
    any."""
    found = all_expert_weights(model)
    expose(model, found)
    try:
        yield bool(found)
    finally:
        conceal(model)


def conceal(model: nn.Module) -> None:
    """The inverse of ``expose``, for all layers that are float."""
    for module in model.modules():
        if isinstance(module, Holder):
            layers = {n: m for n, m in module._modules.items() if isinstance(m, ExpertWeight)}
            for name in [n for n, m in layers.items() if not isinstance(m, (QuantizedLayer, PackedLayer))]:
                del module._modules[name], layers[name]
            if not layers:
                module.__class__ = base_of(type(module))
