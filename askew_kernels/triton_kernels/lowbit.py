"""Products of levels in Triton: a token's levels in one pass over it, and what becomes of the sums in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .. import reference
from ..contract import LEVEL_TYPES
from . import launch
from .launch import load_wide
from .math import (
    EXACT,
    FLOAT,
    INTERPRETED,
    clamp_between,
    divide,
    element_uniforms,
    hull,
    luq_level,
    narrow,
    narrow_level,
    nearest,
    philox,
    round_even,
    uniform01,
    widen_e4m3,
)  # fmt: skip

__all__ = ["luq", "scaled_sums", "stochastic_levels", "token_levels"]

TILE = 4096  # elements of a program at a time
NATIVE_FP8 = 89  # compute capability from which float8 is converted by an instruction


def converts_fp8(like: Tensor) -> bool:
    """Whether the device of ``like`` has an instruction that gives e4m3fn."""
    if INTERPRETED:
        return False
    with launch.on_device(like):
        target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= NATIVE_FP8


def copy_type(copy: Tensor) -> tl.dtype:
    """What a kernel stores there: the tensor's type, or, of float8 where the device does not convert it, its bits."""
    if copy.dtype == torch.float8_e4m3fn:
        return tl.float8e4nv if converts_fp8(copy) else tl.uint8
    return tl.int8 if copy.dtype == torch.int8 else launch.STORAGE[copy.dtype]


def as_stored(copy: Tensor) -> Tensor:
    """A tensor as kernels take its address: of the type that they store."""
    return copy.view(torch.uint8) if copy_type(copy) == tl.uint8 else copy


# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def token_levels_kernel(
    x_ptr, q_ptr, scale_ptr, levels, lo, hi, top, rows, cols, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """q = Q(x / s), s = max |x| / top, of each of R rows, C columns at a time; the second look finds them in cache."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = row < rows
    at = x_ptr + row[:, None] * cols + column[None, :]
    peak = tl.zeros([R, C], tl.float32)
    done = 0
    while done < cols:
        a = tl.abs(load_wide(at + done, inside[:, None] & (column < cols - done)[None, :]))
        a = tl.where(a < float("inf"), a, float("inf"))  # NaN, too
        peak = tl.where(a > peak, a, peak)
        done += C
    tops = tl.max(peak, 1)
    scale = divide(tl.where(tops < float("inf"), tops, float("nan")), tl.zeros([R], tl.float32) + top)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scale_ptr + row, scale, mask=inside)
    out = q_ptr + row[:, None] * cols + column[None, :]
    done = 0
    while done < cols:
        valid = inside[:, None] & (column < cols - done)[None, :]
        placed = divide(load_wide(at + done, valid), scale[:, None])
        if KIND == FLOAT:
            q = clamp_between(placed, 0.0 - top, top)
        else:
            low, high = hull(lo, hi, levels, KIND, N_LEVELS)
            q = nearest(clamp_between(placed, low, high), levels, KIND, N_LEVELS)
        tl.store(out + done, narrow_level(q, q_ptr.dtype.element_ty), mask=valid)
        done += C


@triton.jit(do_not_specialize=["rows"])
def scaled_sums_kernel(
    sums_ptr, token_ptr, scale_ptr, bias_ptr, y_ptr, rows, cols, PER_COLUMN: tl.constexpr, HAS_BIAS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y = (sums s_x) s_w + b of a tile of R rows and C columns; sums may be levels, of float8 the bits."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    there = column < cols
    valid = (row < rows)[:, None] & there[None, :]
    at = row[:, None] * cols + column[None, :]
    y = tl.load(sums_ptr + at, mask=valid, other=0)
    if y.dtype == tl.uint8:
        y = widen_e4m3(y)
    else:
        y = y.to(tl.float32)
    y = y * tl.load(token_ptr + row, mask=row < rows, other=1.0)[:, None]
    if PER_COLUMN:
        y = y * tl.load(scale_ptr + column, mask=there, other=1.0)[None, :]
    else:
        y = y * tl.load(scale_ptr)
    if HAS_BIAS:
        y = y + load_wide(bias_ptr + column, there)[None, :]
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def keys_of(seed_ptr):
    """The two halves of a seed that stands on the device."""
    seed = tl.load(seed_ptr)
    return seed.to(tl.int32), (seed >> 32).to(tl.int32)


@triton.jit
def uniforms_at(key0, key1, element):
    """The uniforms of these elements, of which neighbours need not share a Philox block."""
    c0, c1, c2, c3 = philox(key0, key1, element >> 2)
    word = element & 3
    return uniform01(tl.where(word == 0, c0, tl.where(word == 1, c1, tl.where(word == 2, c2, c3))))


@triton.jit(do_not_specialize=["rows"])
def stochastic_levels_kernel(
    x_ptr, factor_ptr, seed_ptr, q_ptr, scale_ptr, rows, cols, top, PER_COLUMN: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """q: one of the two integers beside x factor / s, s = max |x factor| / top, of each of R rows, C columns at a time;
    the second look finds them in cache."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = row < rows
    at = row[:, None] * cols + column[None, :]
    key0, key1 = keys_of(seed_ptr)
    peak = tl.zeros([R, C], tl.float32)
    done = 0
    while done < cols:
        there = column < cols - done
        factor = tl.load(factor_ptr + done + column, mask=there, other=0.0) if PER_COLUMN else tl.load(factor_ptr)
        a = tl.abs(load_wide(x_ptr + at + done, inside[:, None] & there[None, :]) * factor)
        a = tl.where(a < float("inf"), a, float("inf"))  # NaN, too
        peak = tl.where(a > peak, a, peak)
        done += C
    tops = tl.max(peak, 1)
    scale = divide(tl.where(tops < float("inf"), tops, float("nan")), tl.zeros([R], tl.float32) + top)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scale_ptr + row, scale, mask=inside)
    done = 0
    while done < cols:
        there = column < cols - done
        valid = inside[:, None] & there[None, :]
        factor = tl.load(factor_ptr + done + column, mask=there, other=0.0) if PER_COLUMN else tl.load(factor_ptr)
        placed = divide(load_wide(x_ptr + at + done, valid) * factor, scale[:, None])
        placed = clamp_between(placed, 0.0 - top, top)
        near = round_even(placed)
        low = tl.where(near > placed, near - 1.0, near)  # the floor, without a flush of what is almost 0
        q = tl.where(uniforms_at(key0, key1, at + done) < placed - low, low + 1.0, low)
        tl.store(q_ptr + at + done, narrow_level(q, tl.int8), mask=valid)
        done += C


@triton.jit
def luq_kernel(x_ptr, most_ptr, seed_ptr, y_ptr, up, down, n, BLOCK: tl.constexpr):
    """Signed powers of two of most / 2^top, and 0; most is the largest magnitude of all, up = 2^top = 1 / down."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    valid = start + lane < n
    key0, key1 = keys_of(seed_ptr)
    most = tl.load(most_ptr)
    most = tl.where(most < float("inf"), most, float("nan"))
    x = load_wide(x_ptr + start + lane, valid)
    r = divide(tl.abs(x), tl.zeros([BLOCK], tl.float32) + tl.where(most == 0.0, 1.0, most)) * up
    level = luq_level(r, element_uniforms(key0, key1, start, BLOCK))
    y = most * (level * down)
    y = tl.where(x < 0.0, 0.0 - y, y)
    tl.store(y_ptr + start + lane, narrow(y, y_ptr.dtype.element_ty), mask=valid)


# ---- operators ----------------------------------------------------------------------------------------------------


def token_levels(x, levels, grid, top, dtype):
    """(q, s): each row of x as s q with s = max |x| / top; see ``ops.token_levels``."""
    launch.check_storage(x, "x")
    if dtype not in LEVEL_TYPES:
        raise TypeError(f"dtype: expected int8 or float8_e4m3fn, got {dtype}")
    kind, n_levels = (FLOAT.value, 0) if grid[0] == FLOAT else launch.check_grid(grid, levels, x)
    rows, cols = x.shape
    if x.numel() == 0:
        return reference.token_levels(x, levels, grid, top, dtype)
    q, scale = x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    width = min(triton.next_power_of_2(cols), TILE)
    height = max(1, TILE // 4 // width)
    with launch.on_device(x):
        token_levels_kernel[(triton.cdiv(rows, height),)](
            x, as_stored(q), scale, levels if n_levels else scale, float(grid[1]), float(grid[2]), float(top), rows,
            cols, KIND=kind, N_LEVELS=n_levels, R=height, C=width, num_warps=4, **EXACT,
        )  # fmt: skip
    return q, scale


def scaled_sums(sums, token_scale, scale, bias, dtype):
    """y = (sums s_x) s_w + b, rounded once to ``dtype``; see ``ops.scaled_sums``."""
    if dtype not in launch.STORAGE or sums.dtype not in (torch.int32, torch.float32, *LEVEL_TYPES):
        return reference.scaled_sums(sums, token_scale, scale, bias, dtype)
    rows, cols = sums.shape
    launch.check_dense(sums, "sums")
    for name, t, count in (("token_scale", token_scale, rows), ("scale", scale, cols)):
        launch.check_float32(t, sums, name)
        if t.numel() not in (count, 1 if t is scale else count):
            raise ValueError(f"{name}: expected {count} scales, got {t.numel()}")
    if bias is not None:
        launch.check_storage(bias, "bias")
        if bias.numel() != cols or bias.device != sums.device:
            raise ValueError(f"bias: expected {cols} elements on {sums.device}, got {bias.numel()} on {bias.device}")
    y = sums.new_empty(sums.shape, dtype=dtype)
    if sums.numel() == 0:
        return y
    bits = sums.view(torch.uint8) if sums.dtype == torch.float8_e4m3fn else sums
    width = min(triton.next_power_of_2(cols), TILE // 4)
    height = TILE // 4 // width
    with launch.on_device(sums):
        scaled_sums_kernel[(triton.cdiv(rows, height), triton.cdiv(cols, width))](
            bits, token_scale, scale, scale if bias is None else bias, y, rows, cols, PER_COLUMN=scale.numel() > 1,
            HAS_BIAS=bias is not None, R=height, C=width, num_warps=4, **EXACT,
        )  # fmt: skip
    return y


def stochastic_levels(x, factor, seed):
    """(q, s): each row of x factor as s q, rounded stochastically; see ``ops.stochastic_levels``."""
    launch.check_storage(x, "x")
    rows, cols = x.shape
    launch.check_float32(factor, x, "factor")
    if factor.numel() not in (1, cols):
        raise ValueError(f"factor: expected 1 or {cols} numbers, got {factor.numel()}")
    if x.numel() == 0:
        return reference.stochastic_levels(x, factor, seed)
    q, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    width = min(triton.next_power_of_2(cols), TILE // 4)  # a random number of each stands in registers
    height = TILE // 4 // width
    with launch.on_device(x):
        stochastic_levels_kernel[(triton.cdiv(rows, height),)](
            x, factor, seed, q, scale, rows, cols, LEVEL_TYPES[torch.int8], PER_COLUMN=factor.numel() > 1, R=height,
            C=width, num_warps=4, **EXACT,
        )  # fmt: skip
    return q, scale


def luq(x, bits, seed):
    """Signed powers of two and 0 with E[y] = x; see ``ops.luq``."""
    launch.check_storage(x, "x")
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    top, block = 2 ** (bits - 1) - 1, TILE // 4
    with launch.on_device(x):
        luq_kernel[(triton.cdiv(x.numel(), block),)](
            x, x.abs().amax().float(), seed, y, 2.0**top, 2.0**-top, x.numel(), BLOCK=block, num_warps=4, **EXACT
        )
    return y
