"""The optimizer step in Triton: a whole list of tensors in one launch, one read and one write of every tensor.

A row of a tensor is cut into *segments*, and consecutive segments of 1024 columns together make a *tile*, the work of
one program. Where rows are a multiple of 256 long, a segment is 256 columns, all of them there; otherwise it is 32, and
the last one of a row may be partial. So one kernel serves every shape, and each lane asks once for its row's scale.
What does not change from step to step (options, outputs, whether anything is constrained) is known at compile time.
A program reads which tensor and which tile it has from ``tiles`` and the tensor's addresses and shape from ``table``;
both lie on the device and are built once for a list (``_plan``). A sharpness-aware step's kept weights and first
gradients are further inputs, whose addresses stand beside those of the gradients.

Sums are deterministic: every segment or tile writes its partial sums to scratch memory, and a second small kernel adds
them in float64 in an order that depends on the shapes alone.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import LEAST_RATE, LEVEL_TYPES, MAX_ABS, NUM_ROW_SUMS, NUM_TOTALS
from . import launch
from .lowbit import copy_type
from .math import (
    EXACT,
    RULES,
    cap_of,
    hull,
    narrow,
    narrow_level,
    nearest_level,
    pass_inside,
    read_scalar,
    sam_mean,
    step_weight,
    widen,
)

TILE_SIZE = tl.constexpr(1024)
SEGMENT = tl.constexpr(32)  # columns of a segment
WHOLE_SEGMENT = tl.constexpr(256)  # where rows are a multiple of that
VECTOR = tl.constexpr(8)  # elements of a 16-byte vector of a 2-byte type
PEAK = tl.constexpr(MAX_ABS)
REDUCE = 1024  # partial sums that a program of the second kernels holds at a time
ADDRESSES = 32  # addresses that one launch of store_addresses takes
WHOLE_PAYS = 2**22  # weights in whole segments for which a list is worth a second launch

# The table: one row of 16 int64 (128 bytes, a cache line) for each tensor. SLOT and TILE are the tensor's first slot
# of partial row sums and its first tile, counted over the launch; DIVISOR divides by the segments of a row.
# Of STATE there are two.
W, STATE, _, COPY, SCALE, LEVELS, ROW_SUMS, TOTALS = (tl.constexpr(i) for i in range(8))  # addresses, 0 where absent
ROWS, COLS, LO, HI, SLOT, TILE, TILES, DIVISOR = (tl.constexpr(i) for i in range(8, 16))
WIDTH = tl.constexpr(16)


# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def address(entry, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The address at ``entry`` as a pointer, a multiple of ``ALIGNMENT`` bytes."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def max_of(magnitude, total):
    """max over axis 1 of |x|; NaN where the sum of |x| is NaN, which is where an x is."""
    peak = tl.max(tl.where(magnitude == magnitude, magnitude, 0.0), 1)
    return tl.where(total == total, peak, total)


@triton.jit
def store_segment_sums(slots, n_slots, total, squares, peak):
    """The sums of each segment to a slot of its own."""
    tl.store(slots, total)
    tl.store(slots + n_slots, squares)
    tl.store(slots + 2 * n_slots, peak)


@triton.jit
def store_row_sums(out, n_slots, mine, total, squares, peak):
    """The sums over the segments ``mine`` to one slot."""
    total = tl.sum(tl.where(mine, total, 0.0), 0)
    tl.store(out, total)
    tl.store(out + n_slots, tl.sum(tl.where(mine, squares, 0.0), 0))
    peak = tl.max(tl.where(mine & (peak == peak), peak, 0.0), 0)
    tl.store(out + 2 * n_slots, tl.where(total == total, peak, total))


@triton.jit
def tile_sum(x, valid):
    return tl.sum(tl.sum(tl.where(valid, x, 0.0), 1), 0)


@triton.jit
def divided(n, divisor):
    """n // d for n < 2^31; ``divisor`` is ``divisor_of(d)``."""
    return (tl.umulhi(n, (divisor & 0xFFFFFFFF).to(tl.uint32)) + n) >> (divisor >> 32).to(tl.uint32)


@triton.jit(do_not_specialize=["n_slots", "n_tiles", "members"])
def update_kernel(
    tiles, table, inputs, partial_rows, partial_totals, coefficients, n_slots, n_tiles, members, lr, cap, eps, alpha,
    constants, DTYPE: tl.constexpr, COPY_DTYPE: tl.constexpr, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    BUFFERS: tl.constexpr, HAS_ROW_SUMS: tl.constexpr, HAS_TOTALS: tl.constexpr, HAS_KEPT: tl.constexpr,
    HAS_FIRST: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, DESCENT: tl.constexpr, DIRECTION: tl.constexpr,
    CLAMP: tl.constexpr, MAXIMIZE: tl.constexpr, SKIP_NONFINITE: tl.constexpr, STE_CLIP: tl.constexpr,
    CONSTRAINED: tl.constexpr,
):  # fmt: skip
    """One tile through one step: ``StepLoop`` of csrc/cpu/update.inl."""
    COLUMNS: tl.constexpr = WHOLE_SEGMENT if WHOLE else SEGMENT
    SEGMENTS: tl.constexpr = TILE_SIZE // COLUMNS
    job = tl.load(tiles + tl.program_id(0))
    which = job >> 32
    tile = (job & 0x7FFFFFFF).to(tl.uint32)
    entry = table + which * WIDTH
    rows = tl.load(entry + ROWS)
    cols = tl.load(entry + COLS)
    divisor = tl.load(entry + DIVISOR)
    pieces = tl.cdiv(cols, COLUMNS).to(tl.uint32)  # segments of a row

    segment = tile * SEGMENTS + tl.arange(0, SEGMENTS).to(tl.uint32)
    row = divided(segment, divisor)
    inside = row < rows
    if WHOLE:
        offset = segment.to(tl.int64) * COLUMNS
        width = tl.where(inside, COLUMNS, 0)
    else:
        column = (segment - row * pieces).to(tl.int64) * COLUMNS
        offset = row.to(tl.int64) * cols + column
        width = tl.where(inside, tl.minimum(cols - column, COLUMNS), 0).to(tl.int32)
        if ALIGNED:  # rows are a multiple of VECTOR long
            offset = tl.multiple_of(offset, VECTOR)
            width = tl.multiple_of(width, VECTOR)
    lane = tl.arange(0, COLUMNS)[None, :]
    i = offset[:, None] + lane
    valid = lane < width[:, None]

    ALIGNMENT: tl.constexpr = 16 if ALIGNED else 1
    w_ptr = address(entry + W, DTYPE, ALIGNMENT)
    if HAS_KEPT:
        w = widen(tl.load(address(inputs + members + which, DTYPE, ALIGNMENT) + i, mask=valid, other=0.0))
    else:
        w = widen(tl.load(w_ptr + i, mask=valid, other=0.0))
    g = widen(tl.load(address(inputs + which, DTYPE, ALIGNMENT) + i, mask=valid, other=0.0))
    if HAS_FIRST:
        first = widen(tl.load(address(inputs + 2 * members + which, DTYPE, ALIGNMENT) + i, mask=valid, other=0.0))
        moved = tl.abs(tl.load(coefficients)) + tl.abs(tl.load(coefficients + 1)) > 0.0
        g = tl.where(moved, widen(narrow(sam_mean(g, first), DTYPE)), g)
    state = ()
    for k in tl.static_range(BUFFERS):
        pointer = address(entry + STATE + k, DTYPE, ALIGNMENT)
        state = state + (widen(tl.load(pointer + i, mask=valid, other=0.0)),)
    scale = tl.load(address(entry + SCALE, tl.float32, 4) + row, mask=inside, other=1.0)[:, None]
    levels = address(entry + LEVELS, tl.float32, 4)
    lo, hi = hull(tl.load(entry + LO), tl.load(entry + HI), levels, KIND, N_LEVELS)
    if STE_CLIP:
        low, high = launch.stored_ends(scale, lo, hi, DTYPE)
        g = pass_inside(g, w, low, high)

    lr = read_scalar(lr)
    if cap is None:  # lr is on the device
        cap = cap_of(lr)
    new, new_state, descent, excess = step_weight(
        w, g, state, scale, lo, hi, levels, lr, cap, read_scalar(eps), alpha, constants, KIND, N_LEVELS, DESCENT,
        DIRECTION, CLAMP, MAXIMIZE, CONSTRAINED,
    )  # fmt: skip
    if SKIP_NONFINITE or HAS_TOTALS:
        finite = tl.abs(g) < float("inf")
    if SKIP_NONFINITE:
        new = tl.where(finite, new, w)
        descent = tl.where(finite, descent, 0.0)
        g = tl.where(finite, g, 0.0)

    rounded = narrow(new, DTYPE)
    tl.store(w_ptr + i, rounded, mask=valid)
    for k in tl.static_range(BUFFERS):
        after = new_state[k]
        if SKIP_NONFINITE:
            after = tl.where(finite, after, state[k])
        tl.store(address(entry + STATE + k, DTYPE, ALIGNMENT) + i, narrow(after, DTYPE), mask=valid)
    stored = tl.where(valid, widen(rounded), 0.0)

    if HAS_TOTALS or COPY_DTYPE is not None:
        level_after = nearest_level(stored, scale, lo, hi, levels, KIND, N_LEVELS)
        if COPY_DTYPE is not None:
            # Promising no more elements than a vector of w has keeps one layout: no exchange through shared memory.
            SAME: tl.constexpr = ALIGNMENT * COPY_DTYPE.primitive_bitwidth // DTYPE.primitive_bitwidth
            copy_ptr = address(entry + COPY, COPY_DTYPE, min(max(SAME, 1), 16))
            if COPY_DTYPE.primitive_bitwidth == 8:
                tl.store(copy_ptr + i, narrow_level(level_after, COPY_DTYPE), mask=valid)
            else:
                tl.store(copy_ptr + i, narrow(scale * level_after, COPY_DTYPE), mask=valid)
        if HAS_TOTALS:
            level = nearest_level(w, scale, lo, hi, levels, KIND, N_LEVELS)
            out = partial_totals + tl.program_id(0)
            tl.store(out, tile_sum(tl.where(excess > 0.0, 1.0, 0.0), valid))
            tl.store(out + n_tiles, tile_sum(tl.where(excess > 0.0, 16.0 * excess, 0.0), valid))
            tl.store(out + 2 * n_tiles, tile_sum(descent * descent, valid))
            tl.store(out + 3 * n_tiles, tile_sum(0.0 - g * descent, valid))
            tl.store(out + 4 * n_tiles, tile_sum(tl.where(level_after != level, 1.0, 0.0), valid))
            tl.store(out + 5 * n_tiles, tile_sum(tl.where(finite, 0.0, 1.0), valid))

    if HAS_ROW_SUMS:
        magnitude = tl.abs(stored)
        total = tl.sum(magnitude, 1)
        squares = tl.sum(stored * stored, 1)
        peak = max_of(magnitude, total)
        slots = partial_rows + tl.load(entry + SLOT)
        if WHOLE:
            store_segment_sums(slots + segment, n_slots, total, squares, peak)
        elif pieces < SEGMENTS:  # short rows
            store_segment_sums(slots + segment, n_slots, total, squares, peak)
        else:  # a tile sees at most two rows: a slot for each
            front = row == divided(tile * SEGMENTS, divisor)
            slots += 2 * tile.to(tl.int64)
            store_row_sums(slots, n_slots, front, total, squares, peak)
            store_row_sums(slots + 1, n_slots, row != divided(tile * SEGMENTS, divisor), total, squares, peak)


@triton.jit(do_not_specialize=["n_slots"])
def reduce_rows_kernel(blocks, table, partial_rows, n_slots, WHOLE: tl.constexpr, R: tl.constexpr, E: tl.constexpr):
    """Adds (or takes the maximum of) the partial sums of R rows, E at a time; program_id(1) is the sum."""
    job = tl.load(blocks + tl.program_id(0))
    column = tl.program_id(1)
    entry = table + (job >> 32) * WIDTH
    rows = tl.load(entry + ROWS)
    COLUMNS: tl.constexpr = WHOLE_SEGMENT if WHOLE else SEGMENT
    SEGMENTS: tl.constexpr = TILE_SIZE // COLUMNS
    pieces = tl.cdiv(tl.load(entry + COLS), COLUMNS)
    row = (job & 0x7FFFFFFF) * R + tl.arange(0, R)
    first = row * pieces  # its first segment
    short = True if WHOLE else pieces < SEGMENTS
    begin = tl.where(short, first, first // SEGMENTS)
    end = tl.where(short, first + pieces, (first + pieces - 1) // SEGMENTS + 1)
    end = tl.where(row < rows, end, 0)
    longest = tl.where(short, pieces, (pieces - 1) // SEGMENTS + 2)
    slots = partial_rows + column.to(tl.int64) * n_slots + tl.load(entry + SLOT)
    result = tl.zeros([R, E], tl.float64)
    done = 0
    while done < longest:  # not range: the interpreter takes no tensor there (numpy >= 2.4)
        k = begin[:, None] + (done + tl.arange(0, E))[None, :]
        second = (k * SEGMENTS < first[:, None]).to(tl.int64)  # the tile began in the row before
        slot = tl.where(short, k, 2 * k + second)
        part = tl.load(slots + slot, mask=k < end[:, None], other=0.0).to(tl.float64)
        larger = tl.where((part > result) | (part != part), part, result)  # NaN wins
        result = tl.where(column == PEAK, larger, result + part)
        done += E
    total = tl.sum(result, 1)  # NaN where a partial maximum is
    peak = tl.max(tl.where(result == result, result, 0.0), 1)
    peak = tl.where(total == total, peak, total)
    out = tl.load(entry + ROW_SUMS).to(tl.pointer_type(tl.float32)) + row * 3 + column
    tl.store(out, tl.where(column == PEAK, peak, total).to(tl.float32), mask=row < rows)


@triton.jit(do_not_specialize=["n_tiles"])
def reduce_totals_kernel(table, partial_totals, n_tiles, E: tl.constexpr):
    """Adds one tensor's partial sums of all its tiles; program_id(1) is the total."""
    entry = table + tl.program_id(0) * WIDTH
    column = tl.program_id(1)
    parts = partial_totals + column.to(tl.int64) * n_tiles + tl.load(entry + TILE)
    count = tl.load(entry + TILES)
    result = tl.zeros([E], tl.float64)
    done = 0
    while done < count:
        k = done + tl.arange(0, E)
        result += tl.load(parts + k, mask=k < count, other=0.0).to(tl.float64)
        done += E
    tl.store(tl.load(entry + TOTALS).to(tl.pointer_type(tl.float64)) + column, tl.sum(result, 0))


@triton.jit
def store_addresses_kernel(out, addresses):
    """out[k] = addresses[k]: by way of kernel arguments, which needs no host memory and is kept in a CUDA graph."""
    for k in tl.static_range(len(addresses)):
        tl.store(out + k, tl.cast(addresses[k], tl.int64))


@triton.jit
def bias_corrections_kernel(out, step, log_beta1, log_beta2):
    """out = (1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step)); in float64, where 1 - beta^step does not cancel."""
    t = tl.load(step).to(tl.float64)
    tl.store(out, (1.0 / (1.0 - tl.exp(t * log_beta1))).to(tl.float32))
    tl.store(out + 1, (1.0 / tl.sqrt(1.0 - tl.exp(t * log_beta2))).to(tl.float32))


# ---- the plan: what a list of tensors needs on the device ---------------------------------------------------------


# The tensor lists of one call; optional ones are empty. The last three change from step to step.
_Lists = collections.namedtuple("_Lists", "params states scales levels dequantized row_sums totals grads kept firsts")


class _Launch(NamedTuple):
    """Tensors that share storage types, kind of grid and outputs: one launch of ``update_kernel``."""

    members: list[int]
    constants: dict
    tiles: Tensor
    table: Tensor
    row_blocks: Tensor | None
    row_shape: tuple[int, int]  # R, E of reduce_rows_kernel
    n_slots: int


class Recent:
    """The last entries asked for: ``most`` of them, holding ``most_bytes`` together; the newest in any case."""

    def __init__(self, most: int, most_bytes: int = 2**62):
        self.most, self.most_bytes, self.held = most, most_bytes, 0
        self.entries: collections.OrderedDict[Any, tuple[Any, int]] = collections.OrderedDict()

    def lookup(self, key: Any) -> Any:
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def keep(self, key: Any, value: Any, nbytes: int = 0) -> None:
        self.entries[key] = value, nbytes
        self.held += nbytes
        while len(self.entries) > 1 and (len(self.entries) > self.most or self.held > self.most_bytes):
            self.held -= self.entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        self.entries.clear()
        self.held = 0


class _Plan(NamedTuple):
    launches: list[_Launch]
    cleared: list[Tensor]  # sums of tensors without elements
    input_tables: Recent


_plans = Recent(32, 2**26)  # a plan takes 8 bytes for 1024 weights


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _present(tensors: Sequence[Tensor], i: int, n: int, name: str) -> Tensor | None:
    if tensors and len(tensors) != n:
        raise ValueError(f"{name}: expected 0 or {n} tensors, got {len(tensors)}")
    return tensors[i] if tensors and tensors[i].numel() else None


def _check_out(t: Tensor, dtype: torch.dtype, count: int, like: Tensor, name: str) -> None:
    launch.check_dense(t, name)
    if t.dtype != dtype or t.numel() != count or t.device != like.device:
        raise ValueError(f"{name}: expected {count} elements of {dtype} on {like.device}, got {t.numel()} of {t.dtype}")


def _check_copy(copy: Tensor, like: Tensor) -> None:
    launch.check_like(copy, like, "dequantized")
    if copy.dtype not in LEVEL_TYPES:
        launch.check_storage(copy, "dequantized")


def _describe(lists: _Lists, grids: Sequence[int], rule: str) -> tuple:
    """Everything that a plan depends on. Addresses of what changes come and go: only their alignment counts."""
    facts: list[Any] = [rule, tuple(grids)]
    for tensors in lists:
        facts += (len(tensors), *map(Tensor.numel, tensors), *map(Tensor.is_contiguous, tensors))
        facts += [t.dtype for t in tensors]
    for tensors in lists[:_CHANGING]:
        facts += map(Tensor.data_ptr, tensors)
    for tensors in lists[_CHANGING:]:
        facts += [address & 15 for address in map(Tensor.data_ptr, tensors)]
    return tuple(facts)


_CHANGING = _Lists._fields.index("grads")


def _numbered(count: int, number: int) -> Tensor:
    """Jobs 0 ... count - 1 of tensor ``number``, packed as the kernels read them."""
    return torch.arange(count, dtype=torch.int64) + (number << 32)


def divisor_of(d: int) -> int:
    """What ``divided`` divides by d with: n // d = (umulhi(n, m) + n) >> s for n < 2^31, s and m in 32 bits each."""
    shift = (d - 1).bit_length()
    return shift << 32 | (2**32 * (2**shift - d) // d + 1)


class _Key(NamedTuple):
    """What tensors of one launch have in common."""

    device: torch.device
    dtype: torch.dtype
    copy: Any  # what kernels store in the copy; None without one
    kind: int
    n_levels: int
    buffers: int
    row_sums: bool
    totals: bool
    kept: bool
    first: bool
    aligned: bool
    whole: bool  # rows are made of whole segments


class _Member(NamedTuple):
    number: int
    addresses: list[int]  # the table's entry, as far as it is the tensor's own
    shape: tuple[int, int]
    hull: list[int]


def _build(lists: _Lists, grids: Sequence[int], rule: str) -> _Plan:
    """Every check comes before the first write."""
    n = len(lists.params)
    if any(len(t) != n for t in (lists.grads, lists.scales, lists.levels)) or len(grids) != 3 * n:
        raise ValueError(f"grads, scales, levels: expected {n} tensors each, and {3 * n} integers in grids")
    buffers = RULES[rule].buffers
    if len(lists.states) not in (0, buffers * n):
        raise ValueError(f"states: expected 0 or {buffers * n} tensors, got {len(lists.states)}")
    groups: dict[_Key, list[_Member]] = {}
    cleared = []
    for i, w in enumerate(lists.params):
        rows, cols = launch.as_matrix(w, lists.scales[i])
        kind, n_levels = launch.check_grid(list(grids[3 * i : 3 * i + 3]), lists.levels[i], w)
        copy, row_sums, totals, kept, first = (
            _present(getattr(lists, name), i, n, name)
            for name in ("dequantized", "row_sums", "totals", "kept", "firsts")
        )
        state = [t for t in lists.states[i::n] if t.numel()]
        inputs = {"grads": [lists.grads[i]], "states": state, "kept": [kept], "firsts": [first]}
        for name, tensors in inputs.items():
            for t in tensors:
                if t is not None:
                    launch.check_like(t, w, name, same_dtype=True)
        if copy is not None:
            _check_copy(copy, w)
        if row_sums is not None:
            _check_out(row_sums, torch.float32, rows * NUM_ROW_SUMS, w, "row_sums")
        if totals is not None:
            _check_out(totals, torch.float64, NUM_TOTALS, w, "totals")
        if w.numel() == 0:
            cleared += [t for t in (row_sums, totals) if t is not None]
            continue
        if len(state) != buffers and (state or not RULES[rule].optional):
            raise ValueError(f"states: expected {buffers} for every parameter")
        vectors = [t.data_ptr() for t in (w, lists.grads[i], *state, copy, kept, first) if t is not None]
        aligned = cols % VECTOR.value == 0 and all(p % 16 == 0 for p in vectors)
        key = _Key(w.device, w.dtype, None if copy is None else copy_type(copy), kind, n_levels, len(state),
                   row_sums is not None, totals is not None, kept is not None, first is not None, aligned,
                   aligned and cols % WHOLE_SEGMENT.value == 0)  # fmt: skip
        no_state = [None] * (COPY.value - STATE.value - len(state))
        addresses = [0 if t is None else t.data_ptr() for t in (w, *state, *no_state, copy, lists.scales[i])]
        addresses += [lists.levels[i].data_ptr() if n_levels else 0]
        addresses += [0 if t is None else t.data_ptr() for t in (row_sums, totals)]
        groups.setdefault(key, []).append(_Member(i, addresses, (rows, cols), list(grids[3 * i + 1 : 3 * i + 3])))
    launches = [_build_launch(key, members) for key, members in _joined(groups).items()]
    return _Plan(launches, cleared, Recent(8))


def _joined(groups: dict[_Key, list[_Member]]) -> dict[_Key, list[_Member]]:
    """Without launches for a few rows in whole segments, which others can take along."""
    for key in [key for key in groups if key.whole]:
        other = key._replace(whole=False)
        if other in groups and sum(m.shape[0] * m.shape[1] for m in groups[key]) < WHOLE_PAYS:
            groups[other] += groups.pop(key)
    return groups


def _build_launch(key: _Key, members: list[_Member]) -> _Launch:
    if _capturing(key.device):
        raise RuntimeError("skewed step: run one step with these tensors before capturing it in a CUDA graph")
    segment = (WHOLE_SEGMENT if key.whole else SEGMENT).value
    segments = TILE_SIZE.value // segment
    table, tiles, shapes = [], [], []
    slot = tile = longest = 0
    for number, member in enumerate(members):
        rows, cols = member.shape
        pieces = triton.cdiv(cols, segment)
        count = triton.cdiv(rows * pieces, segments)
        short = key.whole or pieces < segments
        if count * segments >= 2**31:
            raise ValueError(f"skewed step: expected a tensor of less than 2^31 segments, got {rows} rows of {cols}")
        table.append([*member.addresses, rows, cols, *member.hull, slot, tile, count, divisor_of(pieces)])
        tiles.append(_numbered(count, number))
        shapes.append((rows, number))
        slot += count * (segments if short else 2)
        tile += count
        longest = max(longest, pieces if short else triton.cdiv(pieces, segments) + 1)
    if tile >= 2**31:
        raise ValueError("skewed step: a list of more than 2^41 elements")
    width = min(triton.next_power_of_2(longest), REDUCE)
    height = REDUCE // width
    blocks = torch.cat([_numbered(triton.cdiv(rows, height), number) for rows, number in shapes])
    constants = dict(
        DTYPE=launch.STORAGE[key.dtype], COPY_DTYPE=key.copy, KIND=key.kind,
        N_LEVELS=key.n_levels, BUFFERS=key.buffers, HAS_ROW_SUMS=key.row_sums, HAS_TOTALS=key.totals,
        HAS_KEPT=key.kept, HAS_FIRST=key.first, ALIGNED=key.aligned, WHOLE=key.whole,
    )  # fmt: skip
    return _Launch(
        [m.number for m in members], constants, torch.cat(tiles).to(key.device), torch.tensor(table).to(key.device),
        blocks.to(key.device) if key.row_sums else None, (height, width), slot,
    )  # fmt: skip


def _plan(lists: _Lists, grids: Sequence[int], rule: str) -> _Plan:
    key = _describe(lists, grids, rule)
    plan = _plans.lookup(key)
    if plan is None:
        plan = _build(lists, grids, rule)
        held = [t for group in plan.launches for t in (group.tiles, group.table, group.row_blocks) if t is not None]
        _plans.keep(key, plan, sum(t.nbytes for t in held))
    return plan


def _store_addresses(out: Tensor, addresses: Sequence[int]) -> None:
    for start in range(0, len(addresses), ADDRESSES):
        some = tuple(addresses[start : start + ADDRESSES])
        store_addresses_kernel[(1,)](out[start:], some, num_warps=1)


def _input_tables(plan: _Plan, lists: _Lists) -> list[Tensor]:
    """For each launch the addresses of its gradients, on the device; then, where it has them, of its kept weights and
    first gradients, as many each."""
    key = tuple([t.data_ptr() for tensors in lists[_CHANGING:] for t in tensors])
    tables = plan.input_tables.lookup(key)
    if tables is None:
        tables, keep = [], True
        for group in plan.launches:
            columns = [lists.grads]
            if group.constants["HAS_KEPT"] or group.constants["HAS_FIRST"]:
                columns += [lists.kept or lists.grads, lists.firsts or lists.grads]
            addresses = [tensors[i].data_ptr() for tensors in columns for i in group.members]
            table = group.table.new_empty(len(addresses))
            with launch.on_device(table):
                keep = keep and not _capturing(table.device)  # a captured table is written by the replay only
                _store_addresses(table, addresses)
            tables.append(table)
        if keep:
            plan.input_tables.keep(key, tables)
    return tables


def _corrections(step: Tensor | None, like: Tensor, beta1: float, beta2: float) -> tuple[Any, Any]:
    """(1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step)): numbers, or tensors where the step is on the device."""
    if step is None:
        raise ValueError("step: expected a 0-dim tensor, got None")
    count = launch.scalar_argument(step, "step")
    if not isinstance(count, Tensor):
        return 1 / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
    out = like.new_empty(2, dtype=torch.float32)
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    with launch.on_device(like):
        bias_corrections_kernel[(1,)](out, count, *logs, num_warps=1, **EXACT)
    return out[:1], out[1:]


def _rates(lr: Tensor, eps: Tensor) -> tuple[dict[str, Any], bool]:
    """(lr, cap_of(lr) where lr is known here, eps; whether anything may be constrained: nothing at eps = 1)."""
    rate, bound = launch.scalar_argument(lr, "lr"), launch.scalar_argument(eps, "eps")
    cap = None
    if not isinstance(rate, Tensor):
        cap = float(np.float32(1) / (np.float32(4) * np.float32(max(rate, LEAST_RATE))))
    return {"lr": rate, "cap": cap, "eps": bound}, isinstance(bound, Tensor) or bound < 1.0


def _warps(dtype: tl.dtype, constrained: bool) -> int:
    """Two 16-byte vectors of float32 a thread, one of a 2-byte type; of float32 one where registers are scarce."""
    return 8 if constrained and dtype == tl.float32 else 4


def _check_descent(lists: _Lists, coefficients: Tensor | None, ste_clip: bool) -> None:
    given = [t for tensors in (lists.kept, lists.firsts) for t in tensors if t.numel()]
    if ste_clip and given:
        raise ValueError("ste_clip: expected no kept weights and no first gradients")
    if any(t.numel() for t in lists.firsts):
        if coefficients is None or coefficients.dtype != torch.float32 or coefficients.numel() != 2:
            raise ValueError("coefficients: expected float32 of shape (2,) beside firsts")
        launch.check_float32(coefficients, lists.params[0], "coefficients")


def _operator(rule: str) -> Callable[..., None]:
    """``skew_<rule>_``: one step over a tensor list; see the function of this name in ``ops``."""

    def update(
        params: list[Tensor], grads: list[Tensor], states: list[Tensor], scales: list[Tensor], levels: list[Tensor],
        grids: list[int], dequantized: list[Tensor], row_sums: list[Tensor], totals: list[Tensor],
        step: Tensor | None, lr: Tensor, eps: Tensor, alpha: float, numbers: list[float], direction: bool, clamp: bool,
        maximize: bool, skip_nonfinite: bool, kept: list[Tensor] | None = None, firsts: list[Tensor] | None = None,
        coefficients: Tensor | None = None, ste_clip: bool = False,
    ) -> None:  # fmt: skip
        lists = _Lists(params, states, scales, levels, dequantized, row_sums, totals, grads, kept or [], firsts or [])
        _check_descent(lists, coefficients, ste_clip)
        plan = _plan(lists, grids, rule)
        rates, constrained = _rates(lr, eps)
        corrections = [functools.partial(_corrections, step, group.tiles) for group in plan.launches]
        constants = [RULES[rule].constants(found, *numbers) for found in corrections]
        for t in plan.cleared:
            t.zero_()
        for group, inputs, numbers_of in zip(plan.launches, _input_tables(plan, lists), constants, strict=True):
            tiles, table, n_tiles = group.tiles, group.table, group.tiles.numel()
            has_row_sums, has_totals = group.constants["HAS_ROW_SUMS"], group.constants["HAS_TOTALS"]
            with launch.on_device(tiles):
                rows = tiles.new_empty(NUM_ROW_SUMS * group.n_slots if has_row_sums else 0, dtype=torch.float32)
                parts = tiles.new_empty(NUM_TOTALS * n_tiles if has_totals else 0, dtype=torch.float32)
                update_kernel[(n_tiles,)](
                    tiles, table, inputs, rows, parts, tiles if coefficients is None else coefficients, group.n_slots,
                    n_tiles, len(group.members), **rates, alpha=alpha, constants=numbers_of, **group.constants,
                    DESCENT=RULES[rule].descent, DIRECTION=direction, CLAMP=clamp, MAXIMIZE=maximize,
                    SKIP_NONFINITE=skip_nonfinite, STE_CLIP=ste_clip, CONSTRAINED=constrained,
                    num_warps=_warps(group.constants["DTYPE"], constrained), **EXACT,
                )  # fmt: skip
                if has_row_sums:
                    height, width = group.row_shape
                    reduce_rows_kernel[(group.row_blocks.numel(), NUM_ROW_SUMS)](
                        group.row_blocks, table, rows, group.n_slots, WHOLE=group.constants["WHOLE"], R=height,
                        E=width, num_warps=4, **EXACT,
                    )  # fmt: skip
                if has_totals:
                    reduce_totals_kernel[(table.shape[0], NUM_TOTALS)](
                        table, parts, n_tiles, E=REDUCE, num_warps=4, **EXACT
                    )

    return update


OPERATORS = {f"skew_{rule}_": _operator(rule) for rule in RULES}
globals().update(OPERATORS)  # skew_sgd_, skew_adamw_ and so on
__all__ = list(OPERATORS)
