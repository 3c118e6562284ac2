"""Fake quantization in Triton, its straight-through backward, the projection, and sums of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contract import LEVEL_TYPES, NUM_ROW_SUMS, SUM_COLUMNS
from . import launch, math
from .launch import load_wide, store_narrow, stored_ends, weight_block
from .lowbit import as_stored

__all__ = ["fake_quantize", "fake_quantize_backward", "fake_quantize_out_", "project_interval_", "row_sums",
           "soft_quantize", "ste_clip_", "ste_clip_scale_grad_"]  # fmt: skip
TILE = 1024  # elements of a program of a learned scale's gradient: x and G of each stand in registers

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["magic", "key0", "key1"])
def quantize_kernel(
    x_ptr, y_ptr, key0, key1, scale_ptr, levels, lo, hi, cols, magic, n, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    MODE: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """y = s Q(x / s), or a level drawn between the two around x; in a type of levels Q(x / s)."""
    start, lane, valid, scale, lo, hi = weight_block(
        scale_ptr, levels, lo, hi, cols, magic, n, KIND, N_LEVELS, MODE, COLS, INDEX, BLOCK
    )
    x = load_wide(x_ptr + start + lane, valid)
    if y_ptr.dtype.element_ty.primitive_bitwidth == 8:
        y = math.nearest_level(x, scale, lo, hi, levels, KIND, N_LEVELS)
        tl.store(y_ptr + start + lane, math.narrow_level(y, y_ptr.dtype.element_ty), mask=valid)
    elif STOCHASTIC:
        uniform = math.element_uniforms(key0, key1, start, BLOCK)
        y = scale * math.stochastic_level(x, uniform, scale, lo, hi, levels, KIND, N_LEVELS)
        store_narrow(y_ptr + start + lane, y, valid)
    else:
        y = math.quantize_dequantize(x, scale, lo, hi, levels, KIND, N_LEVELS)
        store_narrow(y_ptr + start + lane, y, valid)


@triton.jit(do_not_specialize=["magic"])
def ste_clip_kernel(
    g_ptr, x_ptr, out_ptr, scale_ptr, levels, lo, hi, cols, magic, n, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    MODE: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = g inside the hull, 0 outside; out may be g."""
    start, lane, valid, scale, lo, hi = weight_block(
        scale_ptr, levels, lo, hi, cols, magic, n, KIND, N_LEVELS, MODE, COLS, INDEX, BLOCK
    )
    x = load_wide(x_ptr + start + lane, valid)
    g = tl.load(g_ptr + start + lane, mask=valid, other=0.0)  # never computed with: stays in its storage type
    low, high = stored_ends(scale, lo, hi, x_ptr.dtype.element_ty)
    tl.store(out_ptr + start + lane, math.pass_inside(g, x, low, high), mask=valid)


@triton.jit(do_not_specialize=["magic"])
def project_kernel(
    w_ptr, eps, scale_ptr, levels, lo, hi, cols, magic, n, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    MODE: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w moved to the nearest point with h_eps >= 0."""
    start, lane, valid, scale, lo, hi = weight_block(
        scale_ptr, levels, lo, hi, cols, magic, n, KIND, N_LEVELS, MODE, COLS, INDEX, BLOCK
    )
    radius = math.feasible_radius(math.read_scalar(eps))
    w = load_wide(w_ptr + start + lane, valid)
    store_narrow(w_ptr + start + lane, math.project_interval(w, scale, radius, lo, hi, levels, KIND, N_LEVELS), valid)


@triton.jit(do_not_specialize=["magic"])
def soften_kernel(
    x_ptr, y_ptr, slack, scale_ptr, levels, lo, hi, cols, magic, n, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    MODE: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y between x and its level."""
    start, lane, valid, scale, lo, hi = weight_block(
        scale_ptr, levels, lo, hi, cols, magic, n, KIND, N_LEVELS, MODE, COLS, INDEX, BLOCK
    )
    x = load_wide(x_ptr + start + lane, valid)
    y = math.soften(x, scale, math.read_scalar(slack), lo, hi, levels, KIND, N_LEVELS)
    store_narrow(y_ptr + start + lane, y, valid)


@triton.jit
def row_sums_kernel(
    x_ptr, out_ptr, rows, cols, pieces, row_stride, sum_stride, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr
):
    """sum |x|, sum x^2, max |x| of R rows, or of one piece of C * STEPS columns of each."""
    block = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    row = block.to(tl.int64) * R + tl.arange(0, R)
    column = piece.to(tl.int64) * (C * STEPS) + tl.arange(0, C)
    total = tl.zeros([R, C], tl.float32)
    squares = tl.zeros([R, C], tl.float32)
    peak = tl.zeros([R, C], tl.float32)
    for step in range(STEPS):
        c = column + step * C
        x = load_wide(x_ptr + row[:, None] * cols + c[None, :], (row < rows)[:, None] & (c < cols)[None, :])
        a = tl.abs(x)
        total += a
        squares += x * x
        peak = tl.where(a > peak, a, peak)  # drops NaN
    total = tl.sum(total, 1)
    peak = tl.where(total == total, tl.max(peak, 1), total)  # a NaN wins: the sum has it
    out = out_ptr + row * row_stride + piece
    tl.store(out, total, mask=row < rows)
    tl.store(out + sum_stride, tl.sum(squares, 1), mask=row < rows)
    tl.store(out + 2 * sum_stride, peak, mask=row < rows)


@triton.jit
def scale_grad_kernel(
    g_ptr, x_ptr, parts_ptr, scale_ptr, levels, lo, hi, rows, cols, pieces, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    CLIP: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """g becomes 0 outside the hull where CLIP; of R rows, or a piece of C columns of them, the sums of g (Q - x/s)
    inside and g c_end outside."""
    piece = tl.program_id(0) % pieces
    row = (tl.program_id(0) // pieces).to(tl.int64) * R + tl.arange(0, R)
    column = piece.to(tl.int64) * C + tl.arange(0, C)
    valid = (row < rows)[:, None] & (column < cols)[None, :]
    at = row[:, None] * cols + column[None, :]
    stored = tl.load(g_ptr + at, mask=valid, other=0.0)
    x = load_wide(x_ptr + at, valid)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=1.0)[:, None]
    lo, hi = math.hull(lo, hi, levels, KIND, N_LEVELS)
    placed = math.in_hull(x, scale, lo, hi)
    q = math.nearest(placed, levels, KIND, N_LEVELS)
    low, high = stored_ends(scale, lo, hi, x_ptr.dtype.element_ty)
    term = math.widen(stored) * tl.where((x < low) | (x > high), q, q - placed)
    tl.store(parts_ptr + row * pieces + piece, tl.sum(term, 1), mask=row < rows)
    if CLIP:
        tl.store(g_ptr + at, math.pass_inside(stored, x, low, high), mask=valid)


# ---- operators ----------------------------------------------------------------------------------------------------


def signed32(bits: int) -> int:
    """The low 32 bits as a signed integer: always the same argument type, whatever the value."""
    return ((bits & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def fake_quantize(x, scale, levels, grid, ste_clip, stochastic, seed):
    """y = s Q(x / s); see ``ops.fake_quantize``. ``ste_clip`` is the backward's."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    keys = signed32(seed), signed32(seed >> 32)
    launch.with_scales(quantize_kernel, x, scale, levels, grid, x, y, *keys, STOCHASTIC=stochastic)
    return y


def fake_quantize_out_(x, scale, levels, grid, out):
    """out = s Q(x / s), in the storage type of ``out``; Q(x / s) where that is a type of levels."""
    launch.check_like(out, x, "out")
    if out.dtype not in LEVEL_TYPES:
        launch.check_storage(out, "out")
    launch.with_scales(quantize_kernel, x, scale, levels, grid, x, as_stored(out), 0, 0, STOCHASTIC=False)


def fake_quantize_backward(grad, x, scale, levels, grid):
    """grad inside the hull (ends included), 0 outside."""
    launch.check_like(grad, x, "grad", same_dtype=True)
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    launch.with_scales(ste_clip_kernel, x, scale, levels, grid, grad, x, out)
    return out


def ste_clip_(grad, x, scale, levels, grid):
    """grad becomes 0 outside the hull."""
    launch.check_like(grad, x, "grad", same_dtype=True)
    launch.with_scales(ste_clip_kernel, x, scale, levels, grid, grad, x, grad)


def ste_clip_scale_grad_(grad, x, scale, levels, grid, ste_clip, factor):
    """The gradient of a learned scale; grad becomes 0 outside the hull where ``ste_clip``."""
    launch.check_like(grad, x, "grad", same_dtype=True)
    rows, cols = launch.as_matrix(x, scale)
    kind, n_levels = launch.check_grid(grid, levels, x)
    if x.numel() == 0:
        return torch.zeros_like(scale)
    width = min(triton.next_power_of_2(cols), TILE)
    pieces = triton.cdiv(cols, width)
    parts = x.new_empty((rows, pieces), dtype=torch.float32)
    with launch.on_device(x):
        scale_grad_kernel[(triton.cdiv(rows, TILE // width) * pieces,)](
            grad, x, parts, scale, levels if n_levels else scale, float(grid[1]), float(grid[2]), rows, cols, pieces,
            KIND=kind, N_LEVELS=n_levels, CLIP=ste_clip, R=TILE // width, C=width, num_warps=4, **math.EXACT,
        )  # fmt: skip
    return (factor * parts.sum(1, dtype=torch.float64)).float().reshape(scale.shape)


def project_interval_(w, scale, levels, grid, eps):
    """w moved to the nearest point with h_eps >= 0; an exact midpoint goes to the lower side."""
    launch.with_scales(project_kernel, w, scale, levels, grid, w, launch.scalar_argument(eps, "eps"))


def soft_quantize(x, scale, levels, grid, slack):
    """Between x and s Q(x/s); see ``ops.soft_quantize``."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    slack = launch.scalar_argument(slack, "slack")
    launch.with_scales(soften_kernel, x, scale, levels, grid, x, y, slack)
    return y


def row_sums(x, rows):
    """(rows, 3) float32: sum |x|, sum x^2, max |x| of each row; one pass over x, the same bits every time.

    A longer row is summed in pieces of ``SUM_COLUMNS`` (float32 inside a piece, float64 over the pieces).
    """
    launch.check_storage(x, "x")
    n = x.numel()
    if rows <= 0 or n % rows:
        raise ValueError(f"rows: {rows} rows do not divide {n} elements")
    cols = n // rows
    if n == 0:
        return x.new_zeros((rows, NUM_ROW_SUMS), dtype=torch.float32)
    width = min(triton.next_power_of_2(cols), launch.SUM_BLOCK)
    steps = min(triton.cdiv(cols, width), SUM_COLUMNS // launch.SUM_BLOCK)
    pieces = triton.cdiv(cols, width * steps)
    out = x.new_empty((rows, NUM_ROW_SUMS), dtype=torch.float32)
    parts = out if pieces == 1 else x.new_empty((NUM_ROW_SUMS, rows, pieces), dtype=torch.float32)
    row_stride, sum_stride = (NUM_ROW_SUMS, 1) if pieces == 1 else (pieces, rows * pieces)
    with launch.on_device(x):
        row_sums_kernel[(triton.cdiv(rows, launch.SUM_BLOCK // width) * pieces,)](
            x, parts, rows, cols, pieces, row_stride, sum_stride, R=launch.SUM_BLOCK // width, C=width, STEPS=steps,
            num_warps=launch.SUM_WARPS, **math.EXACT,
        )  # fmt: skip
    if pieces > 1:
        out[:, :2] = parts[:2].sum(2, dtype=torch.float64).T
        out[:, 2] = parts[2].amax(1)
    return out
