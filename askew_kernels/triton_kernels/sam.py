"""The sharpness-aware operators in Triton: norm, perturbation with a copy kept, restore, mean of two gradients.

One launch for each tensor, a flat run of elements cut into blocks. Coefficients are read on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import block_at, load_wide, store_narrow
from .math import sam_mean, sam_perturbed, sam_scaled, widen

__all__ = ["sam_average_", "sam_norm", "sam_perturb_", "sam_restore_"]

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def sam_norm_kernel(w_ptr, g_ptr, out_ptr, eta, n, ADAPTIVE: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """The block's sum of (T g)^2."""
    start, lane, valid = block_at(n, INDEX, BLOCK)
    w = load_wide(w_ptr + start + lane, valid)
    x = sam_scaled(w, load_wide(g_ptr + start + lane, valid), eta, ADAPTIVE)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit
def not_both_zero(coefficients, BLOCK: tl.constexpr):
    """Whether the tensors were perturbed: for every lane of the block."""
    size = tl.abs(tl.load(coefficients)) + tl.abs(tl.load(coefficients + 1))
    return size + tl.zeros([BLOCK], tl.float32) > 0.0


@triton.jit
def sam_perturb_kernel(
    w_ptr, g_ptr, kept_ptr, coefficients, eta, n, ADAPTIVE: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr
):
    """kept = w; w += delta, where the coefficients are not both 0."""
    start, lane, valid = block_at(n, INDEX, BLOCK)
    c = tl.load(coefficients)
    a = tl.load(coefficients + 1)
    w = tl.load(w_ptr + start + lane, mask=valid, other=0.0)
    tl.store(kept_ptr + start + lane, w, mask=valid)
    moved = sam_perturbed(widen(w), load_wide(g_ptr + start + lane, valid), eta, c, a, ADAPTIVE)
    store_narrow(w_ptr + start + lane, moved, valid & not_both_zero(coefficients, BLOCK))


@triton.jit
def copy_kernel(to_ptr, from_ptr, n, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    start, lane, valid = block_at(n, INDEX, BLOCK)
    tl.store(to_ptr + start + lane, tl.load(from_ptr + start + lane, mask=valid), mask=valid)


@triton.jit
def sam_average_kernel(g_ptr, first_ptr, coefficients, n, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """g = (g + first) / 2, where the coefficients are not both 0."""
    start, lane, valid = block_at(n, INDEX, BLOCK)
    valid = valid & not_both_zero(coefficients, BLOCK)
    mean = sam_mean(load_wide(g_ptr + start + lane, valid), load_wide(first_ptr + start + lane, valid))
    store_narrow(g_ptr + start + lane, mean, valid)


# ---- operators ----------------------------------------------------------------------------------------------------


def _check(
    tensors: Sequence[Tensor], coefficients: Tensor | None = None, adaptive: Sequence[int] | None = None, **beside
) -> None:
    """Everything, before the first write; ``beside``: lists of tensors like ``tensors``."""
    if adaptive is not None and len(adaptive) != len(tensors):
        raise ValueError(f"adaptive: expected {len(tensors)} integers, got {len(adaptive)}")
    for name, others in beside.items():
        if len(others) != len(tensors):
            raise ValueError(f"{name}: expected {len(tensors)}, got {len(others)}")
        for t, other in zip(tensors, others, strict=True):
            launch.check_storage(t, "params")
            launch.check_like(other, t, name, same_dtype=True)
    if coefficients is not None:
        launch.check_dense(coefficients, "coefficients")
        if coefficients.dtype != torch.float32 or coefficients.numel() != 2:
            raise ValueError(f"coefficients: expected float32 of shape (2,), got {coefficients.dtype}")


def sam_norm(params, grads, adaptive, eta):
    """sum (T g)^2 over the list: float32 in a block, float64 over the blocks, the same bits every time."""
    _check(params, adaptive=adaptive, grads=grads)
    blocks = [triton.cdiv(p.numel(), launch.SUM_BLOCK) for p in params]
    parts = params[0].new_empty(sum(blocks), dtype=torch.float32)
    for w, g, adapted, part in zip(params, grads, adaptive, parts.split(blocks), strict=True):
        launch.elementwise(sam_norm_kernel, w, w, g, part, float(eta), sums=True, ADAPTIVE=bool(adapted))
    return parts.sum(dtype=torch.float64)


def sam_perturb_(params, grads, kept, coefficients, adaptive, eta):
    """kept = w, w <- w + (c T^2 - a) g; see ``ops.sam_perturb_``."""
    _check(params, coefficients, adaptive, grads=grads, kept=kept)
    for w, g, keep, adapted in zip(params, grads, kept, adaptive, strict=True):
        launch.elementwise(sam_perturb_kernel, w, w, g, keep, coefficients, float(eta), ADAPTIVE=bool(adapted))


def sam_restore_(params, kept):
    """w = kept, bit for bit."""
    _check(params, kept=kept)
    for w, keep in zip(params, kept, strict=True):
        launch.elementwise(copy_kernel, w, w, keep)


def sam_average_(grads, firsts, coefficients):
    """g <- (g + first) / 2; see ``ops.sam_average_``."""
    _check(grads, coefficients, firsts=firsts)
    for g, first in zip(grads, firsts, strict=True):
        launch.elementwise(sam_average_kernel, g, g, first, coefficients)
