"""What the Triton kernels share on the way to the device: checks, blocks of elements, launches.

A tensor is a flat run of elements cut into blocks, so that every load and store is a full vector whatever the row
length; only the scale depends on the row, and ``block_scale`` finds it with at most one integer multiplication an
element. Block and warps are launch parameters (``tuning``), except where sums are taken: their order decides bits.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..contract import CODEBOOK, UNIFORM
from .math import EXACT, hull, narrow, widen

STORAGE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SUM_BLOCK = 2048  # elements that a program of the sums holds at a time: four 16-byte vectors of fp32 a thread
SUM_WARPS = 4

# How the rows of a tensor lie in its blocks.
ONE_ROW = tl.constexpr(0)  # one scale for all
WHOLE = tl.constexpr(1)  # a row is a multiple of BLOCK
POWER = tl.constexpr(2)  # a row is a power of two below BLOCK, known at compile time
SHORT = tl.constexpr(3)  # a row is shorter than BLOCK
LONG = tl.constexpr(4)  # a row is longer than BLOCK: a block sees at most two


# ---- checks -------------------------------------------------------------------------------------------------------


def check_dense(t: Tensor, name: str) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor")


def check_storage(t: Tensor, name: str) -> None:
    check_dense(t, name)
    if t.dtype not in STORAGE:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {t.dtype}")


def check_like(t: Tensor, like: Tensor, name: str, same_dtype: bool = False) -> None:
    check_dense(t, name)
    if t.numel() != like.numel() or t.device != like.device:
        raise ValueError(
            f"{name}: expected {like.numel()} elements on {like.device} as the tensor it belongs to, "
            f"got {t.numel()} on {t.device}"
        )
    if same_dtype and t.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, the dtype of the tensor it belongs to, got {t.dtype}")


def check_float32(t: Tensor, like: Tensor, name: str) -> None:
    check_dense(t, name)
    if t.dtype != torch.float32 or t.device != like.device:
        raise TypeError(f"{name}: expected float32 on {like.device}, got {t.dtype} on {t.device}")


def as_matrix(x: Tensor, scale: Tensor) -> tuple[int, int]:
    """(rows, cols) of ``x`` seen as ``scale.numel()`` rows."""
    check_storage(x, "x")
    check_float32(scale, x, "scale")
    rows, n = scale.numel(), x.numel()
    if n and (rows == 0 or n % rows):
        raise ValueError(f"scale: {rows} rows do not divide {n} elements")
    return rows, n // max(rows, 1)


def check_grid(grid: list[int], levels: Tensor, like: Tensor) -> tuple[int, int]:
    """(kind, number of levels) for the compile-time arguments ``KIND`` and ``N_LEVELS``."""
    kind = grid[0]
    if len(grid) != 3 or not UNIFORM <= kind <= CODEBOOK:
        raise ValueError(f"grid: expected [kind, lo, hi] with a known kind, got {grid}")
    if kind != CODEBOOK:
        return kind, 0
    check_dense(levels, "levels")
    if levels.dtype != torch.float32 or levels.numel() < 2 or levels.device != like.device:
        raise ValueError(f"levels: expected 2 or more float32 levels on {like.device}")
    return kind, levels.numel()


# ---- launches -----------------------------------------------------------------------------------------------------


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
    values = tuning.on_gpu("triton", like.device.index)
    return values["block"], values["warps"]


@functools.cache
def multiprocessors(index: int | None) -> int:
    """Of GPU number ``index``; None: Triton's interpreter, which counts as a large one."""
    return 132 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def elementwise(kernel, like: Tensor, *arguments, sums: bool = False, **constants) -> None:
    """Run an elementwise kernel over ``like``: its own ``arguments`` come first, its own ``constants`` last. ``sums``:
    it takes some, so its blocks are always the same."""
    n = like.numel()
    if n == 0:
        return
    block, warps = (SUM_BLOCK, SUM_WARPS) if sums else block_and_warps(like)
    index = tl.int32 if n < 2**31 else tl.int64
    with on_device(like):
        kernel[(triton.cdiv(n, block),)](*arguments, n, INDEX=index, BLOCK=block, num_warps=warps, **constants, **EXACT)


def with_scales(kernel, x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], *arguments, **constants) -> None:
    """``elementwise`` for a kernel that takes each element's scale and grid."""
    rows, cols = as_matrix(x, scale)
    kind, n_levels = check_grid(grid, levels, x)
    block, _ = block_and_warps(x)
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
    elementwise(
        kernel, x, *arguments, scale, levels if n_levels else scale, float(grid[1]), float(grid[2]), cols, magic,
        KIND=kind, N_LEVELS=n_levels, MODE=mode.value, COLS=power, **constants,
    )  # fmt: skip


# ---- in a kernel --------------------------------------------------------------------------------------------------


@triton.jit
def block_at(n, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """(first element, lanes, which of them there are) of the program's block."""
    start = tl.program_id(0).to(INDEX) * BLOCK
    lane = tl.arange(0, BLOCK)
    return start, lane, lane < n - start


@triton.jit
def load_wide(pointers, valid):
    """What is stored, as float32; 0 where not ``valid``."""
    return widen(tl.load(pointers, mask=valid, other=0.0))


@triton.jit
def store_narrow(pointers, x, valid):
    """float32 in the storage type."""
    tl.store(pointers, narrow(x, pointers.dtype.element_ty), mask=valid)


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


@triton.jit
def weight_block(
    scale_ptr, levels, lo, hi, cols, magic, n, KIND: tl.constexpr, N_LEVELS: tl.constexpr, MODE: tl.constexpr,
    COLS: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``block_at``, and the scale of each element and the hull: (start, lane, valid, scale, lo, hi)."""
    start, lane, valid = block_at(n, INDEX, BLOCK)
    scale = block_scale(scale_ptr, start, lane, valid, n, cols, magic, MODE, COLS, BLOCK)
    lo, hi = hull(lo, hi, levels, KIND, N_LEVELS)
    return start, lane, valid, scale, lo, hi


@triton.jit
def stored_ends(scale, lo, hi, DTYPE: tl.constexpr):
    """The hull's ends in weight units, as a clamped weight of this type is stored."""
    return widen(narrow(scale * lo, DTYPE)), widen(narrow(scale * hi, DTYPE))
