"""The mixture of several quantizations in Triton: one read of x for all candidates, one pass for all gradients.

The candidates are compile-time constants, so that each kernel is unrolled over them. The forward takes a tensor as a
flat run (``launch``); the backward takes tiles of R rows × C columns and leaves one sum a row and tile.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import contract
from . import launch
from .launch import block_at, block_scale, load_wide, store_narrow, stored_ends
from .math import EXACT, FLOAT, in_hull, nearest, quantize_dequantize

__all__ = ["mix_fake_quantize", "mix_fake_quantize_backward"]

TILE = 1024  # elements of a program of the backward: it holds x, G and the gate of each in registers


@triton.jit(do_not_specialize=["magic"])
def mix_kernel(
    x_ptr, y_ptr, p_ptr, rows, scale_ptr, levels, lo, hi, cols, magic, n, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    MODE: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
    KINDS: tl.constexpr, LOWS: tl.constexpr, HIGHS: tl.constexpr,
):  # fmt: skip
    """y = sum_k p_k s_k Q_k(x / s_k), in the order of the candidates."""
    start, lane, valid = block_at(n, INDEX, BLOCK)
    x = load_wide(x_ptr + start + lane, valid)
    y = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        p = tl.load(p_ptr + k)
        if KINDS[k] == FLOAT:
            part = p * x
        else:
            scale = block_scale(scale_ptr + k * rows, start, lane, valid, n, cols, magic, MODE, COLS, BLOCK)
            part = p * quantize_dequantize(x, scale, LOWS[k], HIGHS[k], levels, KINDS[k], 0)
        y = part if k == 0 else y + part
    store_narrow(y_ptr + start + lane, y, valid)


@triton.jit
def mix_gradient_kernel(
    g_ptr, x_ptr, out_ptr, p_ptr, scale_ptr, parts_ptr, rows, cols, pieces, K: tl.constexpr, KINDS: tl.constexpr,
    LOWS: tl.constexpr, HIGHS: tl.constexpr, CLIP: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x's gradient, and of each row and piece the sums that strengths and scales take theirs from."""
    piece = tl.program_id(0) % pieces
    row = (tl.program_id(0) // pieces).to(tl.int64) * R + tl.arange(0, R)
    column = piece.to(tl.int64) * C + tl.arange(0, C)
    valid = (row < rows)[:, None] & (column < cols)[None, :]
    at = row[:, None] * cols + column[None, :]
    g = load_wide(g_ptr + at, valid)
    x = load_wide(x_ptr + at, valid)
    gate = tl.zeros([R, C], tl.float32)
    for k in tl.static_range(K):
        p = tl.load(p_ptr + k)
        out = parts_ptr + (2 * k * rows + row) * pieces + piece
        if KINDS[k] == FLOAT:
            gate += p
            tl.store(out, tl.sum(g * x, 1), mask=row < rows)
            tl.store(out + rows * pieces, tl.zeros([R], tl.float32), mask=row < rows)
        else:
            scale = tl.load(scale_ptr + k * rows + row, mask=row < rows, other=1.0)[:, None]
            placed = in_hull(x, scale, LOWS[k], HIGHS[k])
            q = nearest(placed, scale_ptr, KINDS[k], 0)
            low, high = stored_ends(scale, LOWS[k], HIGHS[k], x_ptr.dtype.element_ty)
            outside = (x < low) | (x > high)
            if CLIP:
                gate += tl.where(outside, 0.0, p)
            else:
                gate += p
            tl.store(out, tl.sum(g * q, 1), mask=row < rows)
            tl.store(out + rows * pieces, tl.sum(g * tl.where(outside, q, q - placed), 1), mask=row < rows)
    store_narrow(out_ptr + at, g * gate, valid)


# ---- operators ----------------------------------------------------------------------------------------------------


def _check(x: Tensor, scales: Tensor, strengths: Tensor, grids: list[int]) -> dict:
    """The candidates as compile-time constants, after checking that everything fits."""
    launch.check_float32(scales, x, "scales")
    launch.check_float32(strengths, x, "strengths")
    count, most = strengths.numel(), contract.MOST_CANDIDATES
    if scales.shape[0] != count or len(grids) != 3 * count or not 1 <= count <= most:
        raise ValueError(
            f"strengths: expected one for each of 1 to {most} candidates, got {count} and {len(grids)} integers"
        )
    if not {*grids[::3]} <= {contract.FLOAT, contract.UNIFORM, contract.BINARY}:
        raise ValueError(f"grids: expected uniform, binary or no grid, got {grids}")
    launch.as_matrix(x, scales[0])
    lows, highs = (tuple(float(c) for c in grids[i::3]) for i in (1, 2))
    return {"K": count, "KINDS": tuple(grids[::3]), "LOWS": lows, "HIGHS": highs}


@functools.lru_cache(256)
def _constants(kinds: tuple[int, ...], his: tuple[int, ...], cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(whether a candidate has a scale, LSQ's factor), (candidates, 1) each; kept, because copying them to a GPU waits
    for it."""
    lsq = [
        0.0 if kind == contract.FLOAT else 1 / math.sqrt(cols * max(hi, 1)) for kind, hi in zip(kinds, his, strict=True)
    ]
    has_scale = torch.tensor([kind != contract.FLOAT for kind in kinds], device=device)
    return has_scale[:, None], torch.tensor(lsq, dtype=torch.float64, device=device)[:, None]


def mix_fake_quantize(x, scales, strengths, grids, ste_clip, learned):
    """y = sum_k p_k s_k Q_k(x / s_k); see ``ops.mix_fake_quantize``."""
    candidates = _check(x, scales, strengths, grids)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    # the first candidate's scales stand at the front, the others `rows` further each; the grid is not looked at
    one_of_them = scales[0], scales.new_empty(0), [contract.UNIFORM, 0, 1]
    launch.with_scales(mix_kernel, x, *one_of_them, x, y, strengths, scales.shape[1], **candidates)
    return y


def mix_fake_quantize_backward(grad, x, scales, strengths, grids, ste_clip, learned):
    """Gradients of x, strengths and scales (zeros unless ``learned``)."""
    candidates = _check(x, scales, strengths, grids)
    launch.check_like(grad, x, "grad", same_dtype=True)
    rows, cols = launch.as_matrix(x, scales[0])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out, torch.zeros_like(strengths), torch.zeros_like(scales)
    width = min(triton.next_power_of_2(cols), TILE)
    pieces = triton.cdiv(cols, width)
    parts = x.new_empty((len(strengths), 2, rows, pieces), dtype=torch.float32)
    with launch.on_device(x):
        mix_gradient_kernel[(triton.cdiv(rows, TILE // width) * pieces,)](
            grad, x, out, strengths, scales, parts, rows, cols, pieces, **candidates, CLIP=ste_clip,
            R=TILE // width, C=width, num_warps=4, **EXACT,
        )  # fmt: skip
    sums = parts.sum(3, dtype=torch.float64)
    has_scale, lsq = _constants(tuple(grids[::3]), tuple(grids[2::3]), cols, x.device)
    factor = torch.where(has_scale, scales, torch.ones_like(scales)).double()
    to_strengths = (factor * sums[:, 0]).sum(1).float()
    if not learned:
        return out, to_strengths, torch.zeros_like(scales)
    to_scales = strengths.double()[:, None] * sums[:, 1] * lsq
    return out, to_strengths, torch.where(has_scale, to_scales, torch.zeros_like(to_scales)).float()
