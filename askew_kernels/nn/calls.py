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
_autocast, _records, _traces = torch._C._is_any_autocast_enabled, torch.is_grad_enabled, torch._C._is_tracing


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
        return (runtime.compiled_for(x) and x.is_cpu and type(x) is Tensor and layer.cols > 0 and not _traces()
                and layer.config.activation is None and layer._parameters.get("bias", layer) is bias)  # fmt: skip

    def product_of(self, layer: Any, x: Any) -> Tensor | None:
        """``layer``'s product with ``x``, or None where an answer may have changed."""
        if (held := self._asked(layer, x)) is None or not x.dim() or x.shape[-1] != self.cols:
            return None
        scale, bias = held
        if self.banded:
            kept = layer._bands.kept(layer) if layer.repack else None
            if kept is None:
                return None
            codes, scale = kept
        else:
            codes = layer._buffers.get(NAME)
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

    def _asked(self, layer: Any, x: Any) -> tuple[Any, Any] | None:
        """(scale, bias) as they stand, None where an answer may have changed."""
        state, dtype = layer.__dict__, self.dtype
        if type(x) is not Tensor or x.dtype is not dtype or not x.is_cpu or x.is_nested:
            return None
        if state["config"] is not self.config or layer.activations is not self.activations:
            return None
        if runtime.asked_for() is not self.asked or _autocast() or _transforms() or forward_ad._current_level >= 0:
            return None
        if _traces():
            return None
        scale, bias = state["_buffers"].get("weight_scale"), state["_parameters"].get("bias", self)
        if scale is None or not scale.is_cpu or bias is self:
            return None
        if bias is not None and (bias.dtype is not dtype or not bias.is_cpu):
            return None
        if _records() and (x.requires_grad or scale.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        return scale, bias


POINTS = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]  # the geometry whose patches are pixels


def channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def convolved(x: Tensor, weight: tuple[Any, ...], geometry: list[int], last: bool, bias: Tensor | None) -> Tensor:
    """The convolution of images with (bands, scale, grid, bits, rows), in their memory format; below autograd."""
    operators = torch.ops.askew
    if not last:
        return operators.packed_bands_conv.default(x, *weight, geometry, False, bias)
    x = x.permute(0, 2, 3, 1)
    if geometry == POINTS:  # pixels are rows as they stand
        y = operators.packed_bands_linear.default(x.reshape(-1, x.shape[3]), *weight, bias)
        y = y.view(*x.shape[:3], y.shape[1])
    else:
        y = operators.packed_bands_conv.default(x, *weight, geometry, True, bias)
    return y.permute(0, 3, 1, 2)


def convolved_by_channel(x: Tensor, taps: Tensor, geometry: list[int], bias: Tensor | None) -> Tensor:
    """The same of images that are channels last with a filter for each channel, (kernel, channels)."""
    y = torch.ops.askew.packed_depthwise.default(x.permute(0, 2, 3, 1), taps, geometry, bias)
    return y.permute(0, 3, 1, 2)


class ConvolutionCall(Call):
    """The same of a convolution: images of the sizes and in the memory format of the last call, whose weight is in
    bands, or taps where each channel has a filter."""

    __slots__ = ("attributes", "geometry", "last", "size")

    def __init__(self, layer: Any, x: Tensor, rest: Any, geometry: list[int]) -> None:
        super().__init__(layer, x, convolved, rest, True)
        self.geometry, self.last, self.size = geometry, channels_last(x), x.shape
        self.attributes = self._attributes(layer)

    @staticmethod
    def _attributes(layer: Any) -> tuple[Any, ...]:
        return layer.stride, layer.dilation, layer.padding, layer.padding_mode

    def _as_before(self, layer: Any, x: Any) -> tuple[Any, Any] | None:
        """``_asked``, and whether images and geometry are what they were."""
        if (held := self._asked(layer, x)) is None or x.shape != self.size or channels_last(x) is not self.last:
            return None
        return held if self._attributes(layer) == self.attributes else None

    def product_of(self, layer: Any, x: Any) -> Tensor | None:
        if (held := self._as_before(layer, x)) is None:
            return None
        bias = held[1]
        by_channel = self.rest is None
        kept = layer._unpacked.taps(layer) if by_channel else layer._bands.kept(layer) if layer.repack else None
        if kept is None:
            return None
        below = _BelowAutograd()
        try:
            if by_channel:
                return convolved_by_channel(x, kept, self.geometry, bias)
            return convolved(x, (*kept, *self.rest), self.geometry, self.last, bias)
        finally:
            del below


class UnpackedCall(ConvolutionCall):
    """The same where the weight is unpacked for the call and torch makes the product: those questions and checks took
    as long as a small convolution."""

    __slots__ = ("stored",)

    def __init__(self, layer: Any, x: Tensor) -> None:
        codes, grid = layer._buffers[NAME], layer.config.weight
        super().__init__(layer, x, (grid.levels_tensor(codes.device), grid.encoding, layer.bits), [])
        self.stored = codes.shape

    def product_of(self, layer: Any, x: Any) -> Tensor | None:
        if (held := self._as_before(layer, x)) is None:
            return None
        (scale, bias), codes = held, layer._buffers.get(NAME)
        if type(codes) is not Tensor or codes.shape != self.stored or not codes.is_contiguous():
            return None
        if type(scale) is not Tensor or scale.dtype is not torch.float32 or not scale.is_contiguous():
            return None
        weight = torch.empty(self.outputs, self.cols, dtype=self.dtype, device=x.device)  # another may be the default
        below = _BelowAutograd()
        try:
            torch.ops.askew.packed_dequantize_.default(codes, scale.view(-1), *self.rest, weight)
        finally:
            del below
        return layer._conv_forward(x, layer.form.weight(weight, layer.shape), bias)
