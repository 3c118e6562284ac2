"""The elementwise operators in Triton: fake quantization, its straight-through backward, projection, row sums.

A tensor is a flat run of elements cut into blocks, so that every load and store is a full vector whatever the row
length; only the scale depends on the row, and ``block_scale`` finds it with at most one integer multiplication an
element. Block and warps are launch parameters (``tuning``), except where sums are taken: their order decides bits.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import CODEBOOK as CODEBOOK_KIND
from ..contract import NUM_ROW_SUMS
from ..runtime import triton_tuning
from .math import (
    EXACT,
    element_uniforms,
    feasible_radius,
    hull,
    narrow,
    pass_inside,
    project_interval,
    quantize_dequantize,
    read_scalar,
    stochastic_level,
    widen,
)

STORAGE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SUM_BLOCK = 2048  # elements that a program of the sums holds at a time: four 16-byte vectors of fp32 a thread

# How the rows of a tensor lie in its blocks.
ONE_ROW = tl.constexpr(0)  # one scale for all
WHOLE = tl.constexpr(1)  # a row is a multiple of BLOCK
POWER = tl.constexpr(2)  # a row is a power of two below BLOCK, known at compile time
SHORT = tl.constexpr(3)  # a row is shorter than BLOCK
LONG = tl.constexpr(4)  # a row is longer than BLOCK: a block sees at most two


# ---- checks and launch arguments ----------------------------------------------------------------------------------


def check_dense(t: Tensor, name: str) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor")


def check_storage(t: Tensor, name: str) -> None:
    if t.dtype not in STORAGE:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {t.dtype}")


def check_like(t: Tensor, like: Tensor, name: str) -> None:
    check_dense(t, name)
    if t.numel() != like.numel() or t.device != like.device:
        raise ValueError(
            f"{name}: expected {like.numel()} elements on {like.device} as the tensor it belongs to, "
            f"got {t.numel()} on {t.device}"
        )


def as_matrix(x: Tensor, scale: Tensor) -> tuple[int, int]:
    """(rows, cols) of ``x`` seen as ``scale.numel()`` rows."""
    check_dense(x, "x")
    check_storage(x, "x")
    check_dense(scale, "scale")
    if scale.dtype != torch.float32 or scale.device != x.device:
        raise TypeError(f"scale: expected float32 on {x.device}, got {scale.dtype} on {scale.device}")
    rows, n = scale.numel(), x.numel()
    if n and (rows == 0 or n % rows):
        raise ValueError(f"scale: {rows} rows do not divide {n} elements")
    return rows, n // rows if rows else 0


def check_grid(grid: list[int], levels: Tensor, like: Tensor) -> tuple[int, int]:
    """(kind, number of levels) for the compile-time arguments ``KIND`` and ``N_LEVELS``."""
    kind = grid[0]
    if len(grid) != 3 or not 1 <= kind <= CODEBOOK_KIND:
        raise ValueError(f"grid: expected [kind, lo, hi] with a known kind, got {grid}")
    if kind != CODEBOOK_KIND:
        return kind, 0
    check_dense(levels, "levels")
    if levels.dtype != torch.float32 or levels.numel() < 2 or levels.device != like.device:
        raise ValueError(f"levels: expected 2 or more float32 levels on {like.device}")
    return kind, levels.numel()


def scalar_argument(t: Tensor, name: str) -> float | Tensor:
    """A 0-dim tensor as an argument: by value from the CPU, else by pointer, read by the kernel."""
    if t.numel() != 1 or not t.is_floating_point():
        raise ValueError(f"{name}: expected a 0-dim floating-point tensor")
    return t.item() if t.is_cpu else t


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it that of ``t``."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def block_and_warps(like: Tensor) -> tuple[int, int]:
    """Elements of a program and its warps, for elementwise kernels on the device of ``like``."""
    values = triton_tuning(like.device.index)
    return values["block"], values["warps"]


def signed32(bits: int) -> int:
    """The low 32 bits as a signed integer: always the same argument type, whatever the value."""
    return ((bits & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _launch(kernel, x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], *arguments, **constants) -> None:
    """Run an elementwise kernel over ``x``: its own ``arguments`` come first, its own ``constants`` last."""
    rows, cols = as_matrix(x, scale)
    kind, n_levels = check_grid(grid, levels, x)
    n = x.numel()
    if n == 0:
        return
    block, warps = block_and_warps(x)
    power = 0
    if rows == 1:
        mode = ONE_ROW
    elif cols % block == 0:
        mode = WHOLE
    elif cols & (cols - 1) == 0:
        mode, power = POWER, cols
    else:
        mode = SHORT if cols < block else LONG
    # local // cols = umulhi(local, magic), exact while local * cols < 2^32; local < 2 block here
    magic = -(-(2**32) // cols) if mode is SHORT else 0
    with on_device(x):
        kernel[(triton.cdiv(n, block),)](
            *arguments, scale, levels if n_levels else scale, float(grid[1]), float(grid[2]), n, cols, magic,
            KIND=kind, N_LEVELS=n_levels, MODE=mode.value, COLS=power,
            INDEX=tl.int32 if n < 2**31 else tl.int64, BLOCK=block, num_warps=warps, **constants,
            **EXACT,
        )  # fmt: skip


# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def block_scale(
    scale_ptr, start, lane, valid, n, cols, magic, MODE: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr
):
    """The scale of each element of the block: a scalar where the block lies in one row."""
    if MODE == ONE_ROW:
        return tl.load(scale_ptr)
    elif MODE == WHOLE:
        return tl.load(scale_ptr + start // cols)
    elif MODE == POWER:
        return tl.load(scale_ptr + start // COLS + lane // COLS, mask=valid, other=1.0)
    elif MODE == SHORT:
        row = start // cols
        local = (start - row * cols).to(tl.uint32) + lane.to(tl.uint32)
        return tl.load(scale_ptr + row + tl.umulhi(local, magic.to(tl.uint32)).to(tl.int32), mask=valid, other=1.0)
    else:
        row = start // cols
        left = cols - (start - row * cols)  # elements of the first row from here on
        scale = tl.load(scale_ptr + row)
        return tl.where(lane < left, scale, tl.load(scale_ptr + row + 1, mask=left < n - start, other=1.0))


@triton.jit(do_not_specialize=["magic", "key0", "key1"])
def quantize_kernel(
    x_ptr, y_ptr, key0, key1, scale_ptr, levels, lo, hi, n, cols, magic, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    MODE: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """y = s Q(x / s), or a level drawn between the two around x."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    lane = tl.arange(0, BLOCK)
    valid = lane < n - start
    scale = block_scale(scale_ptr, start, lane, valid, n, cols, magic, MODE, COLS, BLOCK)
    lo, hi = hull(lo, hi, levels, KIND, N_LEVELS)
    x = widen(tl.load(x_ptr + start + lane, mask=valid, other=0.0))
    if STOCHASTIC:
        uniform = element_uniforms(key0, key1, start, BLOCK)
        y = scale * stochastic_level(x, uniform, scale, lo, hi, levels, KIND, N_LEVELS)
    else:
        y = quantize_dequantize(x, scale, lo, hi, levels, KIND, N_LEVELS)
    tl.store(y_ptr + start + lane, narrow(y, y_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["magic"])
def ste_clip_kernel(
    g_ptr, x_ptr, out_ptr, scale_ptr, levels, lo, hi, n, cols, magic, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    MODE: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = g inside the hull, 0 outside; out may be g."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    lane = tl.arange(0, BLOCK)
    valid = lane < n - start
    scale = block_scale(scale_ptr, start, lane, valid, n, cols, magic, MODE, COLS, BLOCK)
    lo, hi = hull(lo, hi, levels, KIND, N_LEVELS)
    x = widen(tl.load(x_ptr + start + lane, mask=valid, other=0.0))
    g = tl.load(g_ptr + start + lane, mask=valid, other=0.0)  # never computed with: stays in its storage type
    low = widen(narrow(scale * lo, x_ptr.dtype.element_ty))  # the ends as a clamped weight is stored
    high = widen(narrow(scale * hi, x_ptr.dtype.element_ty))
    tl.store(out_ptr + start + lane, pass_inside(g, x, low, high), mask=valid)


@triton.jit(do_not_specialize=["magic"])
def project_kernel(
    w_ptr, eps, scale_ptr, levels, lo, hi, n, cols, magic, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    MODE: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w moved to the nearest point with h_eps >= 0."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    lane = tl.arange(0, BLOCK)
    valid = lane < n - start
    scale = block_scale(scale_ptr, start, lane, valid, n, cols, magic, MODE, COLS, BLOCK)
    lo, hi = hull(lo, hi, levels, KIND, N_LEVELS)
    radius = feasible_radius(read_scalar(eps))
    w = widen(tl.load(w_ptr + start + lane, mask=valid, other=0.0))
    w = project_interval(w, scale, radius, lo, hi, levels, KIND, N_LEVELS)
    tl.store(w_ptr + start + lane, narrow(w, w_ptr.dtype.element_ty), mask=valid)


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
        valid = (row < rows)[:, None] & (c < cols)[None, :]
        x = widen(tl.load(x_ptr + row[:, None] * cols + c[None, :], mask=valid, other=0.0))
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


# ---- operators ----------------------------------------------------------------------------------------------------


def fake_quantize(
    x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], ste_clip: bool, stochastic: bool, seed: int
) -> Tensor:
    """y = s Q(x / s); see ``ops.fake_quantize``. ``ste_clip`` is the backward's."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    keys = signed32(seed), signed32(seed >> 32)
    _launch(quantize_kernel, x, scale, levels, grid, x, y, *keys, STOCHASTIC=stochastic)
    return y


def fake_quantize_out_(x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], out: Tensor) -> None:
    """out = s Q(x / s), in the storage type of ``out``."""
    check_like(out, x, "out")
    check_storage(out, "out")
    _launch(quantize_kernel, x, scale, levels, grid, x, out, 0, 0, STOCHASTIC=False)


def _clip_gradient(grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], out: Tensor) -> None:
    check_like(grad, x, "grad")
    if grad.dtype != x.dtype:
        raise TypeError(f"grad: expected {x.dtype}, the dtype of x, got {grad.dtype}")
    _launch(ste_clip_kernel, x, scale, levels, grid, grad, x, out)


def fake_quantize_backward(grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, grid: list[int]) -> Tensor:
    """grad inside the hull (ends included), 0 outside."""
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    _clip_gradient(grad, x, scale, levels, grid, out)
    return out


def ste_clip_(grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, grid: list[int]) -> None:
    """grad becomes 0 outside the hull."""
    _clip_gradient(grad, x, scale, levels, grid, grad)


def project_interval_(w: Tensor, scale: Tensor, levels: Tensor, grid: list[int], eps: Tensor) -> None:
    """w moved to the nearest point with h_eps >= 0; an exact midpoint goes to the lower side."""
    _launch(project_kernel, w, scale, levels, grid, w, scalar_argument(eps, "eps"))


def row_sums(x: Tensor, rows: int) -> Tensor:
    """(rows, 3) float32: sum |x|, sum x^2, max |x| of each row; one pass over x, the same bits every time.

    A row longer than 16384 columns is summed in pieces (float32 inside a piece, float64 over the pieces).
    """
    check_dense(x, "x")
    check_storage(x, "x")
    n = x.numel()
    if rows <= 0 or n % rows:
        raise ValueError(f"rows: {rows} rows do not divide {n} elements")
    cols = n // rows
    if n == 0:
        return x.new_zeros((rows, NUM_ROW_SUMS), dtype=torch.float32)
    width = min(triton.next_power_of_2(cols), SUM_BLOCK)
    steps = min(triton.cdiv(cols, width), 8)
    pieces = triton.cdiv(cols, width * steps)
    out = x.new_empty((rows, NUM_ROW_SUMS), dtype=torch.float32)
    parts = out if pieces == 1 else x.new_empty((NUM_ROW_SUMS, rows, pieces), dtype=torch.float32)
    row_stride, sum_stride = (NUM_ROW_SUMS, 1) if pieces == 1 else (pieces, rows * pieces)
    with on_device(x):
        row_sums_kernel[(triton.cdiv(rows, SUM_BLOCK // width) * pieces,)](
            x, parts, rows, cols, pieces, row_stride, sum_stride, R=SUM_BLOCK // width, C=width, STEPS=steps,
            num_warps=4, **EXACT,
        )  # fmt: skip
    if pieces > 1:
        out[:, :2] = parts[:2].sum(2, dtype=torch.float64).T
        out[:, 2] = parts[2].amax(1)
    return out
