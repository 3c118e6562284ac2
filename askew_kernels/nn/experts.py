"""Weights of experts: the matrices of many in one Parameter of three dimensions, which the module that holds it reads.

transformers' mixtures of experts are such: ``gate_up_proj`` (experts, outputs, inputs) and ``down_proj`` are Parameters
of one module, whose forward indexes them or passes them on whole. Each is a layer here, ``ExpertWeight`` where it is
float, under the Parameter's own name (``held``); whoever reads the attribute gets the quantized weight.
"""

from __future__ import annotations

import fnmatch
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..quant import QuantConfig
from .held import FINDERS, HeldWeight, Holder
from .layers import QuantizedLayer, in_a_mode, plain_parameters
from .packed import PackedLayer
from .replace import base_of

# {pattern of a class's name: whether its matrices are (inputs, outputs) where it does not say so by `is_transposed`};
# the first that matches counts. Of these classes every Parameter of three dimensions is a weight of experts.
EXPERTS = {"Llama4TextExperts": True, "*Expert": False, "*Experts": False, "*NaiveMoe": False}


class ExpertWeight(HeldWeight):
    """A float weight (num_experts, outputs, inputs), which another module multiplies with."""

    def __init__(self, num_experts: int, height: int, width: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_experts, self.height, self.width = num_experts, height, width
        self.weight = nn.Parameter(torch.zeros(num_experts, height, width, device=device, dtype=dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{type(self).__name__}: has no product of its own; call the module that holds the weight")

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, height={self.height}, width={self.width}"


class TransposedExpertWeight(ExpertWeight):
    """A float weight (num_experts, inputs, outputs)."""


class AskewExperts(QuantizedLayer, ExpertWeight):  # type: ignore[misc]
    """Experts with a quantized weight: each one's matrix like a linear layer's. Raises ValueError for ``activation``
    and ``gradient``: inputs and outputs do not come by here."""

    bias = None

    def _attach(self, config: QuantConfig) -> None:
        for name, what in (("activation", "the inputs of experts"), ("gradient", "gradients of experts' outputs")):
            if (given := getattr(config, name, None)) is not None:
                raise ValueError(f"{name}: {what} are not quantized, got {given}; give {{pattern: config}} with "
                                 "another configuration for these")  # fmt: skip
        super()._attach(config)

    def current(self) -> Tensor:
        """s Q(w/s), or the weight itself where it is trained relaxed; differentiable."""
        self._serves()
        if self.computes_float:
            return self._float_weight()
        if self.softens:
            return self._soft_weight()
        if in_a_mode():
            with plain_parameters(self):
                return self._functional_weight()
        if not self._ordinary():
            return self._functional_weight()
        weight: Any = _OwnGradient.apply(self._eager_weight(self.weight.dtype))
        weight._is_hf_initialized = True  # transformers is not to draw random numbers into what is kept
        return weight


class _OwnGradient(torch.autograd.Function):
    """What is handed out may be used in any way: the gradient that comes back may be somebody else's, too, or an
    expanded one, and is not to be clipped in place."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


class AskewTransposedExperts(AskewExperts, TransposedExpertWeight):  # type: ignore[misc]
    """``AskewExperts`` of matrices (inputs, outputs)."""


class PackedExperts(PackedLayer, ExpertWeight):  # type: ignore[misc, override]
    """Experts with a packed weight: the matrices that are indexed are decoded, or all where the whole is read."""


class PackedTransposedExperts(PackedExperts, TransposedExpertWeight):  # type: ignore[misc, override]
    """``PackedExperts`` of matrices (inputs, outputs)."""


class ExpertHolder(Holder):
    """Attributes that have a layer of their name give what it computes with."""

    def read(self, name: str, layer: Any) -> Any:
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


def expert_weights(module: nn.Module) -> dict[str, ExpertWeight]:
    """{name: float layer} of the Parameters of ``module`` that are weights of experts and have no layer yet."""
    cls = base_of(type(module)).__name__
    pattern = next((pattern for pattern in EXPERTS if fnmatch.fnmatchcase(cls, pattern)), None)
    if pattern is None or isinstance(module, (HeldWeight, PackedLayer)):
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


FINDERS[ExpertHolder] = expert_weights
