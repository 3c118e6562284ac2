"""Scales in Triton: of a list of tensors from the sums of their rows, and those of the least squared error.

A table on the device says what every tensor is; it is built once for a list. Tensors of up to ``WHOLE`` rows are one
program's, all of them in one launch; where there is a larger one, a second launch fills the rows of zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import contract, reference
from . import launch
from .launch import load_wide
from .math import EXACT, hull, quantize_dequantize
from .update import Recent, _capturing, address

__all__ = ["mse_scales", "scales_from_sums_"]

WHOLE = 4096  # rows of a program that holds all of its tensor
PART = 1024  # rows of a program that holds a part
PIECE = tl.constexpr(contract.SUM_COLUMNS)
LANES = tl.constexpr(contract.ERROR_LANES)
CANDIDATES = tl.constexpr(contract.SCALE_CANDIDATES)
PADDED = tl.constexpr(128)  # candidates, as a power of two
FLOOR = tl.constexpr(contract.SCALE_FLOOR)
FLOAT32_END = tl.constexpr(2.0**128 - 2.0**103)  # rounds to inf in float32
SAWB, MEAN, RMS, GIVEN = (tl.constexpr(rule) for rule in (contract.SAWB, contract.MEAN, contract.RMS, contract.GIVEN))
BFLOAT16, FLOAT16, E8M0, E4M3 = (tl.constexpr(contract.SCALE_TYPES.index(name)) for name in (
    "bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn"))  # fmt: skip
ROUNDING = tl.constexpr(2.0**14)  # float32's numbers above it are multiples of 2^-9
LOW, HIGH = (tl.constexpr(tuple(ends[i] for ends in contract.SCALE_RANGES.values())) for i in (0, 1))

# The table: one row of int64 for each tensor; the last three are float64, by their bits.
SCALE, SUMS, ROWS, COLS, RULE, TYPE, C_MAX, FIRST, SECOND = (tl.constexpr(i) for i in range(9))
WIDTH = tl.constexpr(9)


# ---- scales.inl ---------------------------------------------------------------------------------------------------


@triton.jit
def exact(x):
    """A number as float64: bare ones are float32 first."""
    return tl.full([], x, tl.float64)


@triton.jit
def guarded(s, peak):
    """float32, not below the floor; 0 for a row of zeros, -1 for one that has no scale."""
    floor = exact(FLOOR) * tl.where(peak > 1.0, peak, 1.0)
    s = tl.where(s > floor, s, floor)
    usable = (peak > 0.0) & (peak < float("inf")) & (s < exact(FLOAT32_END))
    return tl.where(usable, s.to(tl.float32), tl.where(peak == 0.0, 0.0, -1.0))


@triton.jit
def round_scale(s, kind):
    """The nearest scale of a type that is known when the kernel runs."""
    low = tl.where(kind == FLOAT16, LOW[2], LOW[1])
    high = tl.where(kind == FLOAT16, HIGH[2], tl.where(kind == BFLOAT16, HIGH[1], HIGH[3]))
    inside = tl.where(s < low, low, tl.where(s > high, high, s))
    bits = inside.to(tl.int32, bitcast=True)
    bfloat16 = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    power = (bits & ~0x7FFFFF) + tl.where((bits & 0x7FFFFF) >= 0x3504F3, 0x800000, 0)  # the square root of 2
    float16 = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    rounded = tl.where(kind == BFLOAT16, bfloat16, tl.where(kind == E8M0, power, float16)).to(tl.float32, bitcast=True)
    small = (kind == FLOAT16) & (inside < 6.103515625e-05)  # 2^-14; below, multiples of 2^-24
    rounded = tl.where(small, (inside + 0.5) - 0.5, rounded)
    return tl.where((kind == 0) | (kind == E4M3), s, rounded)  # E4M3: once all of the tensor's are there


@triton.jit
def scale_unit(top):
    """The least power of two whose 448-fold ``top`` does not exceed; that of 1 where there is none."""
    bits = tl.where(top > 0.0, top, 1.0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return (tl.minimum(tl.maximum(exponent, 10), 246) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_to_units(s, unit):
    """The nearest E4M3 number of units."""
    inverse = ((254 << 23) - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    x = s * inverse
    x = tl.where(x < LOW[4], LOW[4], tl.where(x > HIGH[4], HIGH[4], x))
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    return tl.where(x < 0.015625, (x + ROUNDING) - ROUNDING, normal) * unit  # 2^-6; below, multiples of 2^-9


@triton.jit
def rule_scale(total, squares, peak, entry):
    """The scale of rows by the rule of a tensor's ``entry``, float64."""
    cols = tl.load(entry + COLS).to(tl.float64)
    rule = tl.load(entry + RULE)
    c_max = tl.load(entry + C_MAX).to(tl.float64, bitcast=True)
    first = tl.load(entry + FIRST).to(tl.float64, bitcast=True)
    second = tl.load(entry + SECOND).to(tl.float64, bitcast=True)
    top = peak / c_max
    size = first * tl.sqrt(squares / cols)
    clip = size - second * total / cols
    s = tl.where((rule == SAWB) & (clip > 0.0), clip / c_max, top)
    s = tl.where(rule == MEAN, first * total / cols, s)
    s = tl.where((rule == RMS) & (size < top), size, s)
    return tl.where(s - s == 0.0, s, top)  # a sum may overflow where max |w| does not


# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def positive(bits, valid):
    """Which are scales of rows that have one; bits of positive floats are ordered as they are."""
    return valid & (bits > 0)


@triton.jit
def mark_rows(entry, row, n):
    """The scales of rows, with marks where there is none: (bits, which rows there are)."""
    valid = row < n
    sums = address(entry + SUMS, tl.float32, 4) + 3 * row
    total = tl.load(sums, mask=valid, other=0.0).to(tl.float64)
    squares = tl.load(sums + 1, mask=valid, other=0.0).to(tl.float64)
    peak = tl.load(sums + 2, mask=valid, other=1.0).to(tl.float64)
    given = tl.load(entry + RULE) == GIVEN
    s = guarded(rule_scale(total, squares, peak, entry), peak)
    s = tl.where(s > 0.0, round_scale(s, tl.load(entry + TYPE)), s)
    before = tl.load(address(entry + SCALE, tl.float32, 4) + row, mask=valid & given, other=1.0)
    s = tl.where(given & (s > 0.0), before, s)
    return s.to(tl.int32, bitcast=True), valid


@triton.jit
def whole_kernel(table, BLOCK: tl.constexpr):
    """All rows of a tensor: each its scale, rows of zeros the lower median of the others'."""
    entry = table + tl.program_id(0) * WIDTH
    n = tl.load(entry + ROWS)
    row = tl.arange(0, BLOCK)
    bits, valid = mark_rows(entry, row, n)
    known = positive(bits, valid)
    count = tl.sum(known.to(tl.int32), 0)
    if count < n:
        k = (count - 1) // 2
        median = bits * 0  # of every lane
        for place in tl.static_range(31):
            larger = median + (1 << (30 - place))
            median = tl.where(tl.sum((known & (bits < larger)).to(tl.int32), 0) <= k, larger, median)
        one = tl.full([BLOCK], 0x3F800000, tl.int32)
        bits = tl.where(known, bits, tl.where((bits == 0) & (count > 0), median, one))
    tl.store(address(entry + SCALE, tl.float32, 4) + row, bits.to(tl.float32, bitcast=True), mask=valid)


@triton.jit
def mark_kernel(table, known_rows, BLOCK: tl.constexpr):
    """Rows of one part of a tensor, marked; how many have a scale, to known_rows (tensors, parts)."""
    entry = table + tl.program_id(0) * WIDTH
    row = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits, valid = mark_rows(entry, row, tl.load(entry + ROWS))
    tl.store(address(entry + SCALE, tl.float32, 4) + row, bits.to(tl.float32, bitcast=True), mask=valid)
    count = tl.sum(positive(bits, valid).to(tl.int32), 0)
    tl.store(known_rows + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), count)


@triton.jit
def fill_kernel(table, known_rows, parts, BLOCK: tl.constexpr):
    """The marked rows of one tensor."""
    entry = table + tl.program_id(0) * WIDTH
    n = tl.load(entry + ROWS)
    scale = address(entry + SCALE, tl.int32, 4)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int64)
    done = 0
    while done < parts:
        counts += tl.load(known_rows + tl.program_id(0) * parts + done + lane, mask=done + lane < parts, other=0)
        done += BLOCK
    count = tl.sum(counts, 0)
    if count < n:
        k = (count - 1) // 2
        median = tl.zeros([BLOCK], tl.int32)
        for place in range(31):
            larger = median + (1 << (30 - place))
            smaller = tl.zeros([BLOCK], tl.int64)
            row = lane.to(tl.int64)
            start = n * 0
            while start < n:
                bits = tl.load(scale + row, mask=row < n, other=0)
                smaller += (positive(bits, row < n) & (bits < larger)).to(tl.int64)
                row += BLOCK
                start += BLOCK
            median = tl.where(tl.sum(smaller, 0) <= k, larger, median)
        row = lane.to(tl.int64)
        start = n * 0
        one = tl.full([BLOCK], 0x3F800000, tl.int32)
        while start < n:
            bits = tl.load(scale + row, mask=row < n, other=1)
            filled = tl.where((bits == 0) & (count > 0), median, one)
            tl.store(scale + row, filled, mask=(row < n) & (bits <= 0))
            row += BLOCK
            start += BLOCK


@triton.jit
def units_kernel(table, BLOCK: tl.constexpr):
    """The scales of one tensor in units of its own, where they are E4M3."""
    entry = table + tl.program_id(0) * WIDTH
    n = tl.load(entry + ROWS)
    if tl.load(entry + TYPE) == E4M3:
        scale = address(entry + SCALE, tl.float32, 4)
        row = tl.arange(0, BLOCK).to(tl.int64)
        tops = tl.zeros([BLOCK], tl.float32)
        start = n * 0
        while start < n:
            tops = tl.maximum(tops, tl.load(scale + row, mask=row < n, other=0.0))
            row += BLOCK
            start += BLOCK
        unit = scale_unit(tl.max(tops, 0))
        row -= start
        while start > 0:
            s = tl.load(scale + row, mask=row < n, other=1.0)
            tl.store(scale + row, round_to_units(s, unit), mask=row < n)
            row += BLOCK
            start -= BLOCK


@triton.jit(do_not_specialize=["rows", "c_max_bits"])
def mse_unit_kernel(sums_ptr, unit_ptr, rows, c_max_bits, BLOCK: tl.constexpr):
    """The unit of a tensor from the largest weights of all of its rows."""
    row = tl.arange(0, BLOCK).to(tl.int64)
    tops = tl.zeros([BLOCK], tl.float32)
    done = 0
    while done < rows:
        peak = tl.load(sums_ptr + 3 * row + 2, mask=row < rows, other=0.0).to(tl.float64)
        tops = tl.maximum(tops, guarded(peak / c_max_bits.to(tl.float64, bitcast=True), peak))
        row += BLOCK
        done += BLOCK
    tl.store(unit_ptr, scale_unit(tl.max(tops, 0)))


@triton.jit
def candidate_scales(peak, c_max_bits, kind, unit_ptr):
    """(candidates padded with copies of the last, scales): hundredths of absmax's scale; 1 where there is none."""
    j = tl.minimum(tl.arange(0, PADDED) + 1, CANDIDATES)
    peak = peak + tl.zeros([PADDED], tl.float64)
    top = guarded(peak / c_max_bits.to(tl.float64, bitcast=True), peak)
    part = j.to(tl.float64) / exact(CANDIDATES) * tl.where(kind == E8M0, 2.0, 1.0)
    s = guarded(top.to(tl.float64) * part, peak)
    s = tl.where(top > 0.0, s, 1.0)
    return j, tl.where(kind == E4M3, round_to_units(s, tl.load(unit_ptr)), round_scale(s, kind))


@triton.jit
def choose(error, j, scale):
    """The scale of the first candidate with the least error; the last where none is finite."""
    error = tl.where(error < float("inf"), error, float("inf"))
    least = tl.min(error, 0)
    best = tl.min(tl.where((error == least) & (error < float("inf")), j, CANDIDATES), 0)
    return tl.max(tl.where(j == best, scale, 0.0), 0)


@triton.jit
def add_lanes(sums):
    """(PADDED,) from (PADDED, LANES), the lanes added by halves."""
    width: tl.constexpr = LANES // 2
    sums = tl.sum(tl.reshape(sums, [PADDED, 2, width]), 1)
    if width > 1:
        sums = tl.sum(tl.reshape(sums, [PADDED, 2, width // 2]), 1)
    if width > 2:
        sums = tl.sum(tl.reshape(sums, [PADDED, 2, width // 4]), 1)
    return tl.reshape(sums, [PADDED])


@triton.jit(do_not_specialize=["cols", "pieces", "c_max_bits", "kind"])
def errors_kernel(
    w_ptr, sums_ptr, scale_ptr, partial, levels, lo, hi, cols, pieces, c_max_bits, kind, unit_ptr, KIND: tl.constexpr,
    N_LEVELS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """All candidates' errors over one row, or one piece of it, and without ``LONG`` the best of them."""
    row = (tl.program_id(0) // pieces).to(tl.int64)
    first = (tl.program_id(0) % pieces).to(tl.int64) * PIECE
    j, scale = candidate_scales(tl.load(sums_ptr + 3 * row + 2).to(tl.float64), c_max_bits, kind, unit_ptr)
    lo, hi = hull(lo, hi, levels, KIND, N_LEVELS)
    sums = tl.zeros([PADDED, LANES], tl.float64)
    column = first + tl.arange(0, LANES)
    done = first
    end = tl.minimum(first + PIECE, cols)
    while done < end:
        valid = column < end
        w = load_wide(w_ptr + row * cols + column, valid)[None, :]
        y = quantize_dequantize(
            w + tl.zeros([PADDED, LANES], tl.float32), scale[:, None], lo, hi, levels, KIND, N_LEVELS
        )
        difference = (w - y).to(tl.float64)
        sums += tl.where(valid[None, :], difference * difference, 0.0)
        column += LANES
        done += LANES
    error = add_lanes(sums)
    if LONG:
        tl.store(partial + tl.program_id(0).to(tl.int64) * PADDED + tl.arange(0, PADDED), error)
    else:
        tl.store(scale_ptr + row, choose(error, j, scale))


@triton.jit(do_not_specialize=["pieces", "c_max_bits", "kind"])
def choose_kernel(sums_ptr, scale_ptr, partial, pieces, c_max_bits, kind, unit_ptr):
    """The best candidate of a row, from the errors over its pieces, in their order."""
    row = tl.program_id(0).to(tl.int64)
    j, scale = candidate_scales(tl.load(sums_ptr + 3 * row + 2).to(tl.float64), c_max_bits, kind, unit_ptr)
    error = tl.zeros([PADDED], tl.float64)
    piece = row * pieces
    while piece < (row + 1) * pieces:
        error += tl.load(partial + piece * PADDED + tl.arange(0, PADDED))
        piece += 1
    tl.store(scale_ptr + row, choose(error, j, scale))


# ---- operators ----------------------------------------------------------------------------------------------------


_tables = Recent(32)


def _bits(number: float) -> int:
    return struct.unpack("q", struct.pack("d", number))[0]


def _check(name: str, numbers: Sequence, count: int) -> None:
    if len(numbers) != count:
        raise ValueError(f"{name}: expected {count}, got {len(numbers)}")


def _check_type(place: int) -> None:
    if not 0 <= place < len(contract.SCALE_TYPES):
        raise ValueError(f"unknown type of scales {place}")


def _entries(scales: list[Tensor], row_sums: list[Tensor], rules: list[int], numbers: list[float]) -> list[list[int]]:
    """The table, after checking everything."""
    n = len(scales)
    for name, values, count in (("row_sums", row_sums, n), ("rules", rules, 3 * n), ("numbers", numbers, 3 * n)):
        _check(name, values, count)
    entries = []
    for i, (scale, sums) in enumerate(zip(scales, row_sums, strict=True)):
        (rule, place, cols), rows = rules[3 * i : 3 * i + 3], scale.numel()
        launch.check_float32(scale, scales[0], "scales")
        launch.check_float32(sums, scales[0], "row_sums")
        if sums.numel() != rows * contract.NUM_ROW_SUMS:
            raise ValueError(f"row_sums: expected shape ({rows}, {contract.NUM_ROW_SUMS}), got {tuple(sums.shape)}")
        if not contract.ABSMAX <= rule <= contract.GIVEN or cols < 1 or not numbers[3 * i] > 0:
            raise ValueError(
                f"rules: expected a known rule, columns and c_max > 0, got {rule}, {cols}, {numbers[3 * i]}"
            )
        _check_type(place)
        if rows:
            own = map(_bits, numbers[3 * i : 3 * i + 3])
            entries.append([scale.data_ptr(), sums.data_ptr(), rows, cols, rule, place, *own])
    return entries


def scales_from_sums_(scales: list[Tensor], row_sums: list[Tensor], rules: list[int], numbers: list[float]) -> None:
    """The scales of every tensor from the sums of its rows; see ``ops.run_scales_from_sums``."""
    key = (*((t.data_ptr(), t.numel(), t.dtype, t.device) for t in (*scales, *row_sums)), *rules, *numbers)
    found = _tables.lookup(key)
    if found is None:
        entries = _entries(scales, row_sums, rules, numbers)
        if not entries:
            return
        if _capturing(scales[0].device):  # which takes no table from the host: the same bits, in many operators
            return reference.scales_from_sums_(scales, row_sums, rules, numbers)
        most, units = max(e[ROWS.value] for e in entries), any(e[TYPE.value] == E4M3.value for e in entries)
        found = torch.tensor(entries, device=scales[0].device), most, units
        _tables.keep(key, found)
    table, most, units = found
    with launch.on_device(table):
        if most <= WHOLE:
            block = 512 if most <= 512 else WHOLE
            whole_kernel[(len(table),)](table, BLOCK=block, num_warps=4 if block == 512 else 16, **EXACT)
        else:
            parts = triton.cdiv(most, PART)
            known = torch.empty(len(table) * parts, dtype=torch.int32, device=table.device)
            mark_kernel[(len(table), parts)](table, known, BLOCK=PART, num_warps=4, **EXACT)
            fill_kernel[(len(table),)](table, known, parts, BLOCK=WHOLE, num_warps=8, **EXACT)
        if units:
            units_kernel[(len(table),)](table, BLOCK=WHOLE, num_warps=8, **EXACT)


def mse_scales(w: Tensor, row_sums: Tensor, levels: Tensor, grid: list[int], c_max: float, scale_type: int) -> Tensor:
    """(rows,) scales of the least squared error; see ``ops.run_mse_scales``."""
    launch.check_float32(row_sums, w, "row_sums")
    scale = row_sums.new_empty(row_sums.numel() // contract.NUM_ROW_SUMS)
    rows, cols = launch.as_matrix(w, scale)
    kind, n_levels = launch.check_grid(grid, levels, w)
    _check_type(scale_type)
    if not c_max > 0:
        raise ValueError(f"c_max: expected a positive number, got {c_max}")
    pieces = max(triton.cdiv(cols, PIECE.value), 1)
    partial = torch.empty(rows * pieces * PADDED.value if pieces > 1 else 0, dtype=torch.float64, device=w.device)
    unit = row_sums.new_ones(1)
    last = pieces, _bits(c_max), scale_type, unit
    with launch.on_device(w):
        if rows and scale_type == E4M3.value:
            mse_unit_kernel[(1,)](row_sums, unit, rows, _bits(c_max), BLOCK=1024, num_warps=8, **EXACT)
        if rows:
            errors_kernel[(rows * pieces,)](
                w, row_sums, scale, partial, levels if n_levels else row_sums, float(grid[1]), float(grid[2]), cols,
                *last, KIND=kind, N_LEVELS=n_levels, LONG=pieces > 1, num_warps=4, **EXACT,
            )  # fmt: skip
        if rows and pieces > 1:
            choose_kernel[(rows,)](row_sums, scale, partial, *last, num_warps=4, **EXACT)
    return scale
