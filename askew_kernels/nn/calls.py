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

_transforms, _BelowAutograd = torch._C._are_functorch_transforms_active, torch._C._AutoDispatchBelowAutograd
_autocast, _records = torch._C._is_any_autocast_enabled, torch.is_grad_enabled


class Call:
    """``product(x, codes, scale, *rest, bias)`` of (rows, cols), as a layer's last call made it; never copied.

    Codes, scale and bias are read where they stand, so that writing into them needs no notice; other tensors in their
    place, another type or another choice make ``serves`` false."""

    __slots__ = (
        "activations",
        "asked",
        "bias",
        "codes",
        "cols",
        "config",
        "dtype",
        "outputs",
        "product",
        "rest",
        "scale",
    )

    def __init__(self, layer: Any, x: Tensor, bias: Tensor | None, product: Callable[..., Tensor], rest: Any) -> None:
        self.product, self.rest = product, rest
        self.codes, self.scale, self.bias = layer.weight_codes, layer.weight_scale, bias
        self.dtype, self.asked, self.cols, self.outputs = x.dtype, runtime.asked_for(), layer.cols, layer.rows
        self.config, self.activations = layer.config, layer.activations

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    @staticmethod
    def can_be_made(layer: Any, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the questions beyond those that ``serves`` asks again have the answers that a ``Call`` stands for."""
        return (runtime.compiled_for(x) and x.is_cpu and type(x) is Tensor and layer.cols > 0
                and layer.config.activation is None and layer._parameters.get("bias", layer) is bias
                and layer.weight_scale.dtype == torch.float32)  # fmt: skip

    def serves(self, layer: Any, x: Any) -> bool:
        """Whether ``layer``'s product with ``x`` is this one's."""
        state, dtype = layer.__dict__, self.dtype
        if type(x) is not Tensor or x.dtype is not dtype or not x.is_cpu or x.is_nested:
            return False
        buffers, bias, scale = state["_buffers"], self.bias, self.scale
        if buffers.get("weight_codes") is not self.codes or buffers.get("weight_scale") is not scale:
            return False
        if state["_parameters"].get("bias", self) is not bias or state["config"] is not self.config:
            return False
        if bias is not None and (bias.dtype is not dtype or not bias.is_cpu):
            return False
        if layer.activations is not self.activations or runtime.asked_for() is not self.asked:
            return False
        if _autocast() or _transforms() or forward_ad._current_level >= 0:
            return False
        if _records() and (x.requires_grad or scale.requires_grad or (bias is not None and bias.requires_grad)):
            return False
        return x.dim() > 0 and x.shape[-1] == self.cols

    def __call__(self, x: Tensor) -> Tensor:
        below = _BelowAutograd()  # no `with`, which takes twice as long
        try:
            if x.dim() == 2:
                return self.product(x, self.codes, self.scale, *self.rest, self.bias)
            y = self.product(x.reshape(-1, self.cols), self.codes, self.scale, *self.rest, self.bias)
            return y.view(*x.shape[:-1], self.outputs)
        finally:
            del below
