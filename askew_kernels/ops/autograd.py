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


def _mix_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, scales, strengths, ctx.grids, ctx.ste_clip, ctx.learned = inputs
    ctx.save_for_backward(x, scales, strengths)


def _mix_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, the scales (where they are learned) and the strengths, in one pass."""
    x, scales, strengths = ctx.saved_tensors
    to_x, to_strengths, to_scales = runtime.operator("mix_fake_quantize_backward", x)(
        grad.contiguous(), x, scales, strengths, ctx.grids, ctx.ste_clip, ctx.learned
    )
    return to_x, to_scales if ctx.learned else None, to_strengths, None, None, None


torch.library.register_autograd(
    "askew::mix_fake_quantize", _mix_gradients, setup_context=_mix_setup_context, lib=library
)

_FORMULAS = {"fake_quantize": (_setup_context, _gradients), "mix_fake_quantize": (_mix_setup_context, _mix_gradients)}


class _Forced(torch.autograd.Function):
    @staticmethod
    def forward(name: str, implementation: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return implementation(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.name = inputs[0]
        _FORMULAS[ctx.name][0](ctx, inputs[2:], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_FORMULAS[ctx.name][1](ctx, grad)


def _differentiable(name: str, inputs: tuple) -> Tensor:
    function = runtime.operator(name, inputs[0])
    if isinstance(function, torch._ops.OpOverload):
        return function(*inputs)
    return _Forced.apply(name, function, *inputs)


def fake_quantize(*inputs: Any) -> Tensor:
    """The operator, differentiable whatever the backend."""
    return _differentiable("fake_quantize", inputs)


def mix_fake_quantize(*inputs: Any) -> Tensor:
    """The operator, differentiable whatever the backend."""
    return _differentiable("mix_fake_quantize", inputs)
