"""A packed layer's product on a CPU, for a call that finds everything as the last one left it.

What a call must ask first (device, types, autocast, gradients, transforms, who asked for which backend) took longer
than a small product. ``Call`` holds what those questions led to, and asks only whether an answer can have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import runtime
from .bands import NAME

_transforms, _BelowAutograd = torch._C._are_functorch_transforms_active, torch._C._AutoDispatchBelowAutograd
_autocast, _records = torch._C._is_any_autocast_enabled, torch.is_grad_enabled


class Call:
    """``product(x, codes, scale, *rest, bias)`` of (rows, cols), as a layer's last call made it; never copied.

    ``banded``: codes and scale are the layer's bands. Tensors are taken where they stand, so that writing to them
    needs no notice, and none is kept here."""

    __slots__ = ("activations", "asked", "banded", "cols", "config", "dtype", "outputs", "product", "rest")

    def __init__(self, layer: Any, x: Tensor, product: Callable[..., Tensor], rest: Any, banded: bool) -> None:
        self.product, self.rest, self.banded = product, rest, banded
        self.dtype, self.asked, self.cols, self.outputs = x.dtype, runtime.asked_for(), layer.cols, layer.rows
        self.config, self.activations = layer.config, layer.activations

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    @staticmethod
    def can_be_made(layer: Any, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the questions beyond those of ``product_of`` have the answers that a ``Call`` stands for."""
        return (runtime.compiled_for(x) and x.is_cpu and type(x) is Tensor and layer.cols > 0
                and layer.config.activation is None and layer._parameters.get("bias", layer) is bias)  # fmt: skip

    def product_of(self, layer: Any, x: Any) -> Tensor | None:
        """``layer``'s product with ``x``, or None where an answer may have changed."""
        state, dtype = layer.__dict__, self.dtype
        if type(x) is not Tensor or x.dtype is not dtype or not x.is_cpu or x.is_nested:
            return None
        if state["config"] is not self.config or layer.activations is not self.activations:
            return None
        if runtime.asked_for() is not self.asked or _autocast() or _transforms() or forward_ad._current_level >= 0:
            return None
        scale, bias = state["_buffers"].get("weight_scale"), state["_parameters"].get("bias", self)
        if bias is self or (bias is not None and (bias.dtype is not dtype or not bias.is_cpu)):
            return None
        if _records() and (x.requires_grad or scale.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        if not x.dim() or x.shape[-1] != self.cols:
            return None
        if self.banded:
            kept = layer._bands.kept(layer) if layer.repack else None
            if kept is None:
                return None
            codes, scale = kept
        else:
            codes = state["_buffers"].get(NAME)
            if type(codes) is not Tensor or scale.dtype is not torch.float32:
                return None
        below = _BelowAutograd()  # no `with`, which takes twice as long
        try:
            if x.dim() == 2:
                return self.product(x, codes, scale, *self.rest, bias)
            y = self.product(x.reshape(-1, self.cols), codes, scale, *self.rest, bias)
            return y.view(*x.shape[:-1], self.outputs)
        finally:
            del below
