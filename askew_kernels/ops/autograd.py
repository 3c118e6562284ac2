"""Gradients of the differentiable operators, one formula for the registered operator and for a forced backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from .schema import library


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, scale, levels, grid, ste_clip, *_ = inputs
    ctx.grid, ctx.ste_clip = grid, ste_clip
    ctx.save_for_backward(*((x, scale, levels) if ste_clip else ()))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through: grad inside the hull, 0 outside; grad everywhere where ``ste_clip`` is off."""
    if ctx.ste_clip:
        x, scale, levels = ctx.saved_tensors
        grad = runtime.operator("fake_quantize_backward", x)(grad.contiguous(), x, scale, levels, ctx.grid)
    return grad, None, None, None, None, None, None


torch.library.register_autograd("askew::fake_quantize", _gradients, setup_context=_setup_context, lib=library)


class _ForcedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(implementation: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return implementation(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _setup_context(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, grad)


def fake_quantize(*inputs: Any) -> Tensor:
    """The operator, differentiable whatever the backend."""
    function = runtime.operator("fake_quantize", inputs[0])
    if isinstance(function, torch._ops.OpOverload):
        return function(*inputs)
    return _ForcedFakeQuantize.apply(function, *inputs)
