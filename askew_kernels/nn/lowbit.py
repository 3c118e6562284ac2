"""The product of a layer with ``forward="fp8"`` or ``"int8"``: levels of a byte on both sides.

    y = ((sum_k q_ik c_jk) s_x,i) s_w,j + b_j        x ~ s_x q, token by token;  w ~ s_w c

Backward in the type that x has: grad_x = G (s_w c), grad_w = G^T x with x as it was before it was quantized, straight
through. With ``gradient="int8"`` grad_x = s_g (g c), another product of levels: s_g g ~ G s_w, token by token, rounded
stochastically.

On a CPU ``ops.level_product`` multiplies integers, finished in one pass (where the processor has matrix units for them,
``torch._int_mm``). On a GPU torch's own products multiply: ``torch._scaled_mm``, from compute capability 8.9 on, and
``torch._int_mm``, with zeros around what is no multiple of their tiles. bfloat16 results of fp8 leave the first one
finished, summed in the tensor cores alone (``use_fast_accum``); others come as sums in float32. Elsewhere the same
levels are multiplied as floats that hold them exactly, and summed in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from .. import ops, runtime
from ..contract import MOST_LEVEL_COLUMNS
from ..ops.autograd import by_operators, transformed
from ..quant.sharding import is_sharded, split_by
from ..reference import product

TILE = 16  # torch's products of bytes take multiples of this many columns, in 16-byte vectors
PANEL = 1 << 21  # weights that are decoded together
FEWEST_ROWS = 17  # of the first factor that torch._int_mm takes on a GPU


@functools.cache
def _multiplies_fp8(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


_multiplies_fp8._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _torch_multiplies_bytes() -> bool:
    """Whether the CPU's own sums of products of bytes are right: before VNNI x86 adds them up in 16 bits, which end at
    32767, and torch does nothing about it."""
    return not torch.cpu._is_avx2_supported() or torch.cpu._is_vnni_supported()


def _torch_is_faster() -> bool:
    """Than ``ops.level_product``, whose portable loops are slow and which knows no matrix units."""
    return runtime.cpu_capability() == "baseline" or torch.cpu._is_amx_tile_supported()


for _constant in (_torch_multiplies_bytes, _torch_is_faster):  # what torch.compile does not look into
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    q: Tensor, token_scale: Tensor, c: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """y = ((q c^T) s_x) s_w + b in ``dtype``. q: (rows, cols), c: (n, cols), of one type of a byte, or (cols, n) where
    it is ``transposed``; token_scale: (rows,); scale: (1,) or (n,); bias: (n,) or None."""
    bytes_fit = q.dtype == torch.int8 and q.shape[1] <= MOST_LEVEL_COLUMNS
    own = q.is_cpu and runtime.compiled_for(q) and not _on_gpu(q) and not _torch_is_faster()
    if bytes_fit and own and dtype != torch.float64:
        return ops.run_level_product(q, token_scale, c, scale, bias, transposed, dtype)
    if transposed:
        c = c.t().contiguous()
    (rows, cols), n, kind = q.shape, c.shape[0], torch.float64 if dtype == torch.float64 else torch.float32
    if 0 in (rows, cols, n):
        sums = torch.zeros(rows, n, dtype=kind, device=q.device)
    elif bytes_fit and (not q.is_cpu or _torch_multiplies_bytes()):
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


def _levels(x: Tensor, dtype: torch.dtype, grid: Any, tops: Tensor | None) -> tuple[Tensor, Tensor]:
    """``ops.token_levels``, of a part of each token with the scale of the whole: its largest number stands beside."""
    if tops is None:
        return ops.run_token_levels(x, dtype, grid)
    q, token_scale = ops.run_token_levels(torch.cat([x, tops[:, None]], 1), dtype, grid)
    return q[:, :-1].contiguous(), token_scale


class LevelProduct(torch.autograd.Function):
    """The product, and the gradients of the float product with s_w c in its place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, c: Tensor, scale: Tensor, bias: Tensor | None, grid: Any, low_gradient: bool,
        tops: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """x: (rows, cols), contiguous; weight: (n, cols), whose numbers are not looked at: what c stands for, to
        receive the gradient; c, scale: its levels and scale; bias in the type of x; grid: of x, or None; low_gradient:
        that of x is a product of int8 levels; tops: (rows,) the largest magnitudes of tokens of which x is a part."""
        # torch.export looks into this function, and the operators within have no derivative
        q, token_scale = _levels(x.detach(), c.dtype, grid, tops)
        return level_product(q, token_scale, c, scale, None if bias is None else bias.detach(), x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, c, scale, _, _, ctx.low_gradient, _ = inputs
        ctx.save_for_backward(x, weight, c, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, c, scale = ctx.saved_tensors
        to_x, to_weight, *_, to_bias = ctx.needs_input_grad[:5]
        grad_x = None
        if to_x and ctx.low_gradient and not by_operators(grad):  # what is differentiated again stays float
            g, token_scale = ops.run_stochastic_levels(grad.contiguous(), scale, ops.draw_seed(grad.device))
            grad_x = level_product(g, token_scale, c, torch.ones_like(scale[:1]), None, grad.dtype, transposed=True)
        elif to_x:
            grad_x = _product_with_weight(grad, weight, c, scale)
        return (
            grad_x, product(grad.t(), x.t()).to(weight.dtype) if to_weight else None,
            None, None, grad.sum(0) if to_bias else None, None, None, None,
        )  # fmt: skip


class _WithTangents(LevelProduct):
    """The same in forward mode too, which torch.compile does not take."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        LevelProduct.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, c_t: Any, scale_t: Any, bias_t: Tensor | None,
            *_rest: Any) -> Tensor:  # fmt: skip
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
    each, one = scale.float().expand(len(c)).contiguous(), torch.ones(1, dtype=torch.float32, device=c.device)
    found = ops.run_scaled_sums(c, each, one, None, dtype)
    if torch.is_grad_enabled() and weight.requires_grad:
        found = found + (weight - weight.detach()).to(dtype)
    return found


def _product_with_weight(grad: Tensor, weight: Tensor, c: Tensor, scale: Tensor) -> Tensor:
    """G (s_w c). On a CPU a large weight is decoded in panels of columns, which stay in the cache: the whole would come
    as fresh pages of memory, which took a fifth of the product's time."""
    width = max(1, PANEL // max(len(c), 1))
    plain = grad.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed()
    if not plain or c.shape[1] <= width:
        return product(grad, _dequantized(weight, c, scale, grad.dtype).t())
    out, grad = grad.new_empty(len(grad), c.shape[1]), grad.contiguous()
    for first in range(0, c.shape[1], width):
        part = c[:, first : first + width].contiguous()
        torch.mm(grad, _dequantized(weight, part, scale, grad.dtype), out=out[:, first : first + width])
    return out


def _composed(*inputs: Any) -> Tensor:
    """The same by operators, for what has no place for a function's own derivatives: the level product's value, and the
    derivatives of the float product with s_w c."""
    value: Any = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
    (x, weight, *_), (_, fixed, c, scale, *_), bias = inputs, value, inputs[4]
    smooth = product(x, _dequantized(fixed, c, scale, x.dtype) + (weight - fixed).to(x.dtype))
    smooth = smooth if bias is None else smooth + bias
    return LevelProduct.forward(*value) + (smooth - smooth.detach())


def level_linear(*inputs: Any) -> Tensor:
    """``LevelProduct`` of its inputs."""
    if torch.compiler.is_compiling():
        return (_composed if transformed() else LevelProduct.apply)(*inputs)
    if not torch.is_grad_enabled() and not transformed():
        return LevelProduct.forward(*inputs)
    return _WithTangents.apply(*inputs)


def _luq(grad: Tensor, bits: int) -> Tensor:
    return ops.run_luq(grad.contiguous(), bits, ops.draw_seed(grad.device))


def _luq_of_parts(grad: Any, bits: int) -> Tensor:
    """The same of a DTensor, by the largest magnitude of all ranks' parts; copies are rounded alike."""
    from torch.distributed.tensor import Partial, Replicate

    mesh = grad.device_mesh
    grad = grad.redistribute(mesh, [Replicate() if isinstance(p, Partial) else p for p in grad.placements])
    part, seed, split = grad.to_local(), ops.draw_seed(grad.device), split_by(grad.placements)
    most = part.abs().amax() if part.numel() else part.new_zeros(())
    most = torch.where(most.isfinite(), most, torch.full_like(most, math.inf))
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        if dim in split:
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
        else:
            torch.distributed.broadcast(seed, group=group, group_src=0)
    made = ops.run_luq(torch.cat([part.reshape(-1), most[None]]), bits, seed)[:-1].reshape(part.shape)
    return type(grad).from_local(made, mesh, grad.placements, run_check=False, shape=grad.shape, stride=grad.stride())


class _RoundedGradient(torch.autograd.Function):
    """The identity, whose gradient is ``ops.luq`` of what comes; straight through where that is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, bits: int) -> Tensor:
        return y.detach()  # nobody else has y: what is written into the result is written into nothing that counts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.bits = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        again = torch.is_grad_enabled()
        plain = grad.detach() if again else grad
        rounded = (_luq_of_parts if is_sharded(grad) else _luq)(plain, ctx.bits)
        return (grad + (rounded - grad).detach() if again else rounded), None


class _RoundedWithTangents(_RoundedGradient):
    """The same in forward mode too."""

    @staticmethod
    def jvp(ctx: Any, y_t: Tensor, _bits: Any) -> Tensor:
        return y_t.clone()


def rounded_gradient(y: Tensor, bits: int) -> Tensor:
    """``y``, whose gradient is rounded by LUQ to ``bits`` bits, once for all products of the backward; what torch.jit
    traces has no backward, and a compiled forward mode leaves it as it is, which LUQ is on average."""
    if torch.jit.is_tracing() or (not torch.is_grad_enabled() and not transformed()):
        return y
    if torch.compiler.is_compiling():
        return y if forward_ad._current_level >= 0 else _RoundedGradient.apply(y, bits)
    return _RoundedWithTangents.apply(y, bits)
