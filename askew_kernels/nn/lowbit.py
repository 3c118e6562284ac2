"""The product of a layer with ``forward="fp8"`` or ``"int8"``: levels of a byte on both sides.

    y = ((sum_k q_ik c_jk) s_x,i) s_w,j + b_j        x ~ s_x q, token by token;  w ~ s_w c

Backward in the type that x has: grad_x = G (s_w c), grad_w = G^T x with x as it was before it was quantized, straight
through.

On a GPU torch's own products multiply: ``torch._scaled_mm``, from compute capability 8.9 on, and ``torch._int_mm``,
with zeros around what is no multiple of their tiles. bfloat16 results of fp8 leave the first one finished, summed in
the tensor cores alone (``use_fast_accum``); others come as sums in float32. Elsewhere the same levels are multiplied as
floats that hold them exactly, and summed in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..ops.autograd import transformed
from ..reference import product

TILE = 16  # torch's products of bytes take multiples of this many columns, in 16-byte vectors
FEWEST_ROWS = 17  # of the first factor that torch._int_mm takes on a GPU
MOST_COLUMNS = 2**31 // 2**14 - 1  # whose products of bytes int32 holds the sum of, whatever they are


@functools.cache
def _multiplies_fp8(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


_multiplies_fp8._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _on_gpu(t: Tensor) -> bool:
    """Whether torch's products on a GPU multiply, which ask for tiles."""
    return t.is_cuda


def _tiled(t: Tensor, rows: int, multiple: int = TILE) -> Tensor:
    """With zeros below up to ``rows``, and to the right up to a multiple of ``multiple`` columns."""
    below, right = rows - t.shape[0], -t.shape[1] % multiple
    if below <= 0 and right == 0:
        return t
    return functional.pad(t.view(torch.uint8), (0, right, 0, max(0, below))).view(t.dtype)  # 0 has the bits 0


def _exact_sums(q: Tensor, c: Tensor, kind: torch.dtype) -> Tensor:
    """q c^T where torch has no product of bytes; ``kind``: float32, or float64 beside such inputs."""
    if _on_gpu(q) and kind == torch.float32:  # bfloat16 holds levels of a byte
        return torch.mm(q.to(torch.bfloat16), c.to(torch.bfloat16).t(), out_dtype=kind)
    return product(q.to(kind), c.to(kind))


def level_product(
    q: Tensor, token_scale: Tensor, c: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = ((q c^T) s_x) s_w + b in ``dtype``. q: (rows, cols), c: (n, cols), of one type of a byte; token_scale:
    (rows,); scale: (1,) or (n,); bias: (n,) or None."""
    (rows, cols), n, kind = q.shape, c.shape[0], torch.float64 if dtype == torch.float64 else torch.float32
    if 0 in (rows, cols, n):
        sums = torch.zeros(rows, n, dtype=kind, device=q.device)
    elif q.dtype == torch.int8 and cols <= MOST_COLUMNS:
        if _on_gpu(q):
            q, c = _tiled(q, max(rows, FEWEST_ROWS)), _tiled(c, n + -n % TILE)
        sums = torch._int_mm(q, c.t())
    elif q.dtype != torch.int8 and _on_gpu(q) and kind == torch.float32 and _multiplies_fp8(q.device):
        q, c = _tiled(q, rows), _tiled(c, n + -n % TILE)
        if dtype == torch.bfloat16:
            return _finished(q, token_scale, c, scale, bias, n)
        one = torch.ones((), dtype=torch.float32, device=q.device)
        sums = torch._scaled_mm(q, c.t(), one, one, out_dtype=torch.float32)
    else:
        sums = _exact_sums(q, c, kind)
    if sums.shape != (rows, n):
        sums = sums[:rows, :n].contiguous()
    return ops.run_scaled_sums(sums, token_scale, scale, bias, dtype)


def _finished(q: Tensor, token_scale: Tensor, c: Tensor, scale: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """torch's product with a scale a row and a scale a column, of which those beyond n are zeros that are cut off."""
    more = len(c) - n
    columns = (
        functional.pad(scale.expand(n), (0, more), value=1.0)[None] if more else scale.expand(n)[None].contiguous()
    )
    bias = bias if bias is None or not more else functional.pad(bias, (0, more))
    y = torch._scaled_mm(q, c.t(), token_scale[:, None], columns, bias, out_dtype=torch.bfloat16, use_fast_accum=True)
    return y[:, :n].contiguous() if more else y


class LevelProduct(torch.autograd.Function):
    """The product, and the gradients of the float product with s_w c in its place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, c: Tensor, scale: Tensor, bias: Tensor | None, grid: Any) -> Tensor:
        """x: (rows, cols), contiguous; weight: (n, cols), whose numbers are not looked at: what c stands for, to
        receive the gradient; c, scale: its levels and scale; bias in the type of x; grid: of x, or None."""
        # torch.export looks into this function, and the operators within have no derivative
        q, token_scale = ops.run_token_levels(x.detach(), c.dtype, grid)
        return level_product(q, token_scale, c, scale, None if bias is None else bias.detach(), x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, c, scale, *_ = inputs
        ctx.save_for_backward(x, weight, c, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, c, scale = ctx.saved_tensors
        to_x, to_weight, *_, to_bias = ctx.needs_input_grad[:5]
        return (
            product(grad, _dequantized(weight, c, scale, grad.dtype).t()) if to_x else None,
            product(grad.t(), x.t()).to(weight.dtype) if to_weight else None,
            None, None, grad.sum(0) if to_bias else None, None,
        )  # fmt: skip


class _WithTangents(LevelProduct):
    """The same in forward mode too, which torch.compile does not take."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        LevelProduct.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, c_t: Any, scale_t: Any, bias_t: Tensor | None,
            grid_t: Any) -> Tensor:  # fmt: skip
        x, weight, c, scale = ctx.saved_tensors
        parts = []
        if x_t is not None:
            parts.append(product(x_t, _dequantized(weight, c, scale, x.dtype)))
        if weight_t is not None:
            parts.append(product(x, weight_t.to(x.dtype)))
        if bias_t is not None:
            parts.append(bias_t.expand(len(x), len(c)))
        return sum(parts[1:], parts[0])


def _dequantized(weight: Tensor, c: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s c, rounded once to ``dtype``; the weight's, straight-through, where the derivative is to be differentiated."""
    each, one = scale.float().expand(len(c)).contiguous(), torch.ones(1, device=c.device)
    found = ops.run_scaled_sums(c, each, one, None, dtype)
    if torch.is_grad_enabled() and weight.requires_grad:
        found = found + (weight - weight.detach()).to(dtype)
    return found


def level_linear(*inputs: Any) -> Tensor:
    """``LevelProduct`` of its inputs."""
    if torch.compiler.is_compiling():
        return LevelProduct.apply(*inputs)
    if not torch.is_grad_enabled() and not transformed():
        return LevelProduct.forward(*inputs)
    return _WithTangents.apply(*inputs)
