"""The unpacked weight of a packed convolution with groups and short filters, kept from one call to the next.

A depthwise filter has 9 or 25 weights: to decode them takes as long as to multiply them. They are a few hundredths of
a network's weights, of which this keeps a float copy, made anew where codes or scales change, never saved or copied.
A compiled graph decodes them in each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tiles import state_of

LONGEST = 64  # weights of a filter that is kept


class Unpacked:
    """``of(layer, dtype)``: the weight in ``dtype``; ``taps(layer)``: that of a filter for each channel in float32 as
    (kernel, channels), None where it cannot be kept. ``bytes``: the memory of what is kept."""

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] | None = None

    def __deepcopy__(self, memo: Any) -> Unpacked:
        return Unpacked()

    def __reduce__(self) -> Any:
        return Unpacked, ()

    @property
    def bytes(self) -> int:
        return 0 if (kept := self._kept) is None else kept[-1].nbytes

    def of(self, layer: Any, dtype: torch.dtype) -> Tensor:
        recorded = torch.is_grad_enabled() and layer._buffers["weight_scale"].requires_grad
        kept = None if layer.groups == 1 or layer.cols > LONGEST or recorded else self._held(layer, dtype, False)
        return layer.dequantize(dtype) if kept is None else kept

    def taps(self, layer: Any) -> Tensor | None:
        if layer.cols > LONGEST:
            return None
        if torch.compiler.is_compiling():  # a graph could not tell that codes were written to: it decodes each time
            return _as_taps(layer.dequantize(torch.float32))
        return self._held(layer, torch.float32, True)

    def _held(self, layer: Any, dtype: torch.dtype, taps: bool) -> Tensor | None:
        codes, scale = layer._buffers["weight_codes"], layer._buffers["weight_scale"]
        if not self._can_be_kept(codes):
            return None
        kept, now = self._kept, (dtype, taps, state_of(codes), state_of(scale))
        if kept is None or kept[0] is not codes or kept[1] is not scale or kept[2] != now:
            with torch.inference_mode(False), torch.no_grad():  # for calls of any mode
                weight = layer.dequantize(dtype)
                weight = _as_taps(weight) if taps else weight
                kept = self._kept = codes, scale, now, weight
        return kept[3]

    @staticmethod
    def _can_be_kept(codes: Tensor) -> bool:
        """Not while something is traced or transformed, whose graph would hold it."""
        if torch.compiler.is_compiling() or type(codes) is not Tensor:
            return False
        traced = torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack()  # type: ignore[attr-defined]
        return not (traced or torch._C._are_functorch_transforms_active())


def _as_taps(weight: Tensor) -> Tensor:
    return weight.flatten(1).t().contiguous()
