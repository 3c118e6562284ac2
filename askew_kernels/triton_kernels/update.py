"""The optimizer step in Triton: a whole list of tensors in one launch, one read and one write of every tensor.

A row of a tensor is cut into *segments* of 32 columns (the last one may be partial) and 32 consecutive segments make a
*tile*, the work of one program; where rows are a multiple of 32 long, a tile is a contiguous run of 1024 elements.
So one kernel serves every shape. A program reads which tensor and which tile it has from ``tiles`` and the tensor's
addresses and shape from ``table``; both lie on the device and are built once for a list (``_plan``).

Sums are deterministic: every tile writes its partial sums to scratch memory, and a second small kernel adds them in
float64 in an order that depends on the shapes alone.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..contract import MAX_ABS, NUM_ROW_SUMS, NUM_TOTALS
from . import launch
from .math import EXACT, RULES, hull, narrow, nearest_level, read_scalar, step_weight, widen
from .sam import sam_average_, sam_restore_

SEGMENT = tl.constexpr(32)  # columns of a segment
SEGMENTS = tl.constexpr(32)  # segments of a tile
VECTOR = tl.constexpr(8)  # elements of a 16-byte vector of a 2-byte type
PEAK = tl.constexpr(MAX_ABS)
REDUCE = 1024  # partial sums that a program of the second kernels holds at a time
ADDRESSES = 32  # addresses that one launch of store_addresses takes

# The table: one row of 16 int64 (128 bytes, a cache line) for each tensor. SLOT and TILE are the tensor's first slot
# of partial row sums and its first tile, counted over the launch.
# Of STATE there are two.
W, STATE, _, COPY, SCALE, LEVELS, ROW_SUMS, TOTALS = (tl.constexpr(i) for i in range(8))  # addresses, 0 where absent
ROWS, COLS, LO, HI, SLOT, TILE, TILES = (tl.constexpr(i) for i in range(8, 15))
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
def update_kernel(
    tiles, table, grads, partial_rows, partial_totals, n_slots, n_tiles, lr, eps, alpha, constants,
    DTYPE: tl.constexpr, COPY_DTYPE: tl.constexpr, KIND: tl.constexpr, N_LEVELS: tl.constexpr, BUFFERS: tl.constexpr,
    HAS_ROW_SUMS: tl.constexpr, HAS_TOTALS: tl.constexpr, ALIGNED: tl.constexpr, DESCENT: tl.constexpr,
    DIRECTION: tl.constexpr, CLAMP: tl.constexpr, MAXIMIZE: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
):  # fmt: skip
    """One tile through one step: ``StepLoop`` of csrc/cpu/update.inl."""
    job = tl.load(tiles + tl.program_id(0))
    which = job >> 32
    tile = (job & 0x7FFFFFFF).to(tl.uint32)
    entry = table + which * WIDTH
    rows = tl.load(entry + ROWS)
    cols = tl.load(entry + COLS)
    pieces = tl.cdiv(cols, SEGMENT).to(tl.uint32)  # segments of a row

    segment = tile * SEGMENTS + tl.arange(0, SEGMENTS).to(tl.uint32)
    row = segment // pieces
    column = (segment - row * pieces).to(tl.int64) * SEGMENT
    inside = row < rows
    offset = row.to(tl.int64) * cols + column
    width = tl.where(inside, tl.minimum(cols - column, SEGMENT), 0).to(tl.int32)
    if ALIGNED:  # rows are a multiple of VECTOR long
        offset = tl.multiple_of(offset, VECTOR)
        width = tl.multiple_of(width, VECTOR)
    lane = tl.arange(0, SEGMENT)[None, :]
    i = offset[:, None] + lane
    valid = lane < width[:, None]

    ALIGNMENT: tl.constexpr = 16 if ALIGNED else 1
    w_ptr = address(entry + W, DTYPE, ALIGNMENT)
    w = widen(tl.load(w_ptr + i, mask=valid, other=0.0))
    g = widen(tl.load(address(grads + which, DTYPE, ALIGNMENT) + i, mask=valid, other=0.0))
    state = ()
    for k in tl.static_range(BUFFERS):
        pointer = address(entry + STATE + k, DTYPE, ALIGNMENT)
        state = state + (widen(tl.load(pointer + i, mask=valid, other=0.0)),)
    scale = tl.load(address(entry + SCALE, tl.float32, 4) + row, mask=inside, other=1.0)[:, None]
    levels = address(entry + LEVELS, tl.float32, 4)
    lo, hi = hull(tl.load(entry + LO), tl.load(entry + HI), levels, KIND, N_LEVELS)

    new, new_state, descent, excess = step_weight(
        w, g, state, scale, lo, hi, levels, read_scalar(lr), read_scalar(eps), alpha, constants, KIND, N_LEVELS,
        DESCENT, DIRECTION, CLAMP, MAXIMIZE,
    )  # fmt: skip
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
        if pieces < SEGMENTS:  # short rows: a slot for every segment
            tl.store(slots + segment, total)
            tl.store(slots + n_slots + segment, squares)
            tl.store(slots + 2 * n_slots + segment, peak)
        else:  # a tile sees at most two rows: a slot for each
            first = row == (tile * SEGMENTS) // pieces
            slots += 2 * tile.to(tl.int64)
            store_row_sums(slots, n_slots, first, total, squares, peak)
            store_row_sums(slots + 1, n_slots, row != (tile * SEGMENTS) // pieces, total, squares, peak)


@triton.jit
def reduce_rows_kernel(blocks, table, partial_rows, n_slots, R: tl.constexpr, E: tl.constexpr):
    """Adds (or takes the maximum of) the partial sums of R rows, E at a time; program_id(1) is the sum."""
    job = tl.load(blocks + tl.program_id(0))
    column = tl.program_id(1)
    entry = table + (job >> 32) * WIDTH
    rows = tl.load(entry + ROWS)
    pieces = tl.cdiv(tl.load(entry + COLS), SEGMENT)
    row = (job & 0x7FFFFFFF) * R + tl.arange(0, R)
    first = row * pieces  # its first segment
    short = pieces < SEGMENTS
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


@triton.jit
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


# The tensor lists of one call; optional ones are empty.
_Lists = collections.namedtuple("_Lists", "params grads states scales levels dequantized row_sums totals")


class _Launch(NamedTuple):
    """Tensors that share storage types, kind of grid and outputs: one launch of ``update_kernel``."""

    members: list[int]
    constants: dict
    tiles: Tensor
    table: Tensor
    row_blocks: Tensor | None
    row_shape: tuple[int, int]  # R, E of reduce_rows_kernel
    n_slots: int
    num_warps: int


class _Plan(NamedTuple):
    launches: list[_Launch]
    cleared: list[Tensor]  # sums of tensors without elements
    grad_tables: collections.OrderedDict


class _Recent(collections.OrderedDict):
    """The last ``size`` entries that were asked for."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def lookup(self, key):
        value = self.get(key)
        if value is not None:
            self.move_to_end(key)
        return value

    def keep(self, key, value):
        self[key] = value
        if len(self) > self.size:
            self.popitem(last=False)


_plans = _Recent(32)


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


def _describe(lists: _Lists, grids: Sequence[int], rule: str) -> tuple:
    """Everything that a plan depends on. Addresses of gradients come and go: only their alignment counts."""
    facts = [rule, *grids]
    for tensors in lists:
        facts.append(len(tensors))
        address_mask = 15 if tensors is lists.grads else -1
        for t in tensors:
            facts += (t.data_ptr() & address_mask, t.numel(), t.dtype, t.is_contiguous())
    return tuple(facts)


def _numbered(count: int, number: int) -> Tensor:
    """Jobs 0 ... count - 1 of tensor ``number``, packed as the kernels read them."""
    return torch.arange(count, dtype=torch.int64) + (number << 32)


def _build(lists: _Lists, grids: Sequence[int], rule: str) -> _Plan:
    n = len(lists.params)
    if any(len(t) != n for t in (lists.grads, lists.scales, lists.levels)) or len(grids) != 3 * n:
        raise ValueError(f"grads, scales, levels: expected {n} tensors each, and {3 * n} integers in grids")
    buffers = RULES[rule].buffers
    if len(lists.states) not in (0, buffers * n):
        raise ValueError(f"states: expected 0 or {buffers * n} tensors, got {len(lists.states)}")
    groups: dict[tuple, list[tuple[int, list[int]]]] = {}
    cleared = []
    for i, w in enumerate(lists.params):  # every check comes before the first write
        rows, cols = launch.as_matrix(w, lists.scales[i])
        launch.check_like(lists.grads[i], w, "grads", same_dtype=True)
        kind, n_levels = launch.check_grid(list(grids[3 * i : 3 * i + 3]), lists.levels[i], w)
        copy, row_sums, totals = (
            _present(getattr(lists, name), i, n, name) for name in ("dequantized", "row_sums", "totals")
        )
        state = [t for t in lists.states[i::n] if t.numel()]
        for t in state:
            launch.check_like(t, w, "states", same_dtype=True)
        if copy is not None:
            launch.check_like(copy, w, "dequantized")
            launch.check_storage(copy, "dequantized")
        if row_sums is not None:
            _check_out(row_sums, torch.float32, rows * NUM_ROW_SUMS, w, "row_sums")
        if totals is not None:
            _check_out(totals, torch.float64, NUM_TOTALS, w, "totals")
        if w.numel() == 0:
            cleared += [t for t in (row_sums, totals) if t is not None]
            continue
        if len(state) != buffers and (state or not RULES[rule].optional):
            raise ValueError(f"states: expected {buffers} for every parameter")
        vectors = [t.data_ptr() for t in (w, lists.grads[i], *state, copy) if t is not None]
        aligned = cols % VECTOR.value == 0 and all(p % 16 == 0 for p in vectors)
        key = (w.device, w.dtype, None if copy is None else copy.dtype, kind, n_levels, len(state),
               row_sums is not None, totals is not None, aligned)  # fmt: skip
        no_state = [None] * (COPY.value - STATE.value - len(state))
        addresses = [0 if t is None else t.data_ptr() for t in (w, *state, *no_state, copy, lists.scales[i])]
        addresses += [lists.levels[i].data_ptr() if n_levels else 0]
        addresses += [0 if t is None else t.data_ptr() for t in (row_sums, totals)]
        groups.setdefault(key, []).append((i, [*addresses, rows, cols, grids[3 * i + 1], grids[3 * i + 2]]))
    return _Plan([_build_launch(key, members) for key, members in groups.items()], cleared, _Recent(8))


def _build_launch(key: tuple, members: list[tuple[int, list[int]]]) -> _Launch:
    device, dtype, copy_dtype, kind, n_levels, buffers, has_row_sums, has_totals, aligned = key
    if _capturing(device):
        raise RuntimeError("skewed step: run one step with these tensors before capturing it in a CUDA graph")
    table, tiles, shapes = [], [], []
    slot = tile = longest = 0
    for number, (_, entry) in enumerate(members):
        rows, cols = entry[ROWS.value], entry[COLS.value]
        pieces = triton.cdiv(cols, SEGMENT.value)
        count = triton.cdiv(rows * pieces, SEGMENTS.value)
        short = pieces < SEGMENTS.value
        table.append([*entry, slot, tile, count, 0])
        tiles.append(_numbered(count, number))
        shapes.append((rows, number))
        slot += count * (SEGMENTS.value if short else 2)
        tile += count
        longest = max(longest, pieces if short else triton.cdiv(pieces, SEGMENTS.value) + 1)
    if tile >= 2**31:
        raise ValueError("skewed step: a list of more than 2^41 elements")
    width = min(triton.next_power_of_2(longest), REDUCE)
    height = REDUCE // width
    blocks = torch.cat([_numbered(triton.cdiv(rows, height), number) for rows, number in shapes])
    constants = dict(
        DTYPE=launch.STORAGE[dtype], COPY_DTYPE=None if copy_dtype is None else launch.STORAGE[copy_dtype], KIND=kind,
        N_LEVELS=n_levels, BUFFERS=buffers, HAS_ROW_SUMS=has_row_sums, HAS_TOTALS=has_totals, ALIGNED=aligned,
    )  # fmt: skip
    return _Launch(
        [i for i, _ in members], constants, torch.cat(tiles).to(device), torch.tensor(table).to(device),
        blocks.to(device) if has_row_sums else None, (height, width), slot,
        num_warps=SEGMENT.value * SEGMENTS.value * dtype.itemsize // 512,  # a 16-byte vector a thread
    )  # fmt: skip


def _plan(lists: _Lists, grids: Sequence[int], rule: str) -> _Plan:
    key = _describe(lists, grids, rule)
    plan = _plans.lookup(key)
    if plan is None:
        plan = _build(lists, grids, rule)
        _plans.keep(key, plan)
    return plan


def _store_addresses(out: Tensor, addresses: Sequence[int]) -> None:
    for start in range(0, len(addresses), ADDRESSES):
        some = tuple(addresses[start : start + ADDRESSES])
        store_addresses_kernel[(1,)](out[start:], some, num_warps=1)


def _grad_tables(plan: _Plan, grads: Sequence[Tensor]) -> list[Tensor]:
    """For each launch the addresses of its gradients, on the device."""
    key = tuple([g.data_ptr() for g in grads])
    tables = plan.grad_tables.lookup(key)
    if tables is None:
        tables, keep = [], True
        for group in plan.launches:
            table = torch.empty_like(group.table[:, 0], memory_format=torch.contiguous_format)
            with launch.on_device(table):
                keep = keep and not _capturing(table.device)  # a captured table is written by the replay only
                _store_addresses(table, [key[i] for i in group.members])
            tables.append(table)
        if keep:
            plan.grad_tables.keep(key, tables)
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
    bias_corrections_kernel[(1,)](out, count, *logs, num_warps=1, **EXACT)
    return out[:1], out[1:]


def _operator(rule: str) -> Callable[..., None]:
    """``skew_<rule>_``: one step over a tensor list; see the function of this name in ``ops``."""

    def update(
        params: list[Tensor], grads: list[Tensor], states: list[Tensor], scales: list[Tensor], levels: list[Tensor],
        grids: list[int], dequantized: list[Tensor], row_sums: list[Tensor], totals: list[Tensor],
        step: Tensor | None, lr: Tensor, eps: Tensor, alpha: float, numbers: list[float], direction: bool, clamp: bool,
        maximize: bool, skip_nonfinite: bool, kept: list[Tensor] | None = None, firsts: list[Tensor] | None = None,
        coefficients: Tensor | None = None,
    ) -> None:  # fmt: skip
        grads = reference.descend(params, grads, kept, firsts, coefficients, sam_restore_, sam_average_)
        plan = _plan(_Lists(params, grads, states, scales, levels, dequantized, row_sums, totals), grids, rule)
        for t in plan.cleared:
            t.zero_()
        rates = launch.scalar_argument(lr, "lr"), launch.scalar_argument(eps, "eps")
        for group, addresses in zip(plan.launches, _grad_tables(plan, grads), strict=True):
            tiles, table, n_tiles = group.tiles, group.table, group.tiles.numel()
            has_row_sums, has_totals = group.constants["HAS_ROW_SUMS"], group.constants["HAS_TOTALS"]
            with launch.on_device(tiles):
                constants = RULES[rule].constants(functools.partial(_corrections, step, tiles), *numbers)
                rows = tiles.new_empty(NUM_ROW_SUMS * group.n_slots if has_row_sums else 0, dtype=torch.float32)
                parts = tiles.new_empty(NUM_TOTALS * n_tiles if has_totals else 0, dtype=torch.float32)
                update_kernel[(n_tiles,)](
                    tiles, table, addresses, rows, parts, group.n_slots, n_tiles, *rates, alpha, constants,
                    **group.constants, DESCENT=RULES[rule].descent, DIRECTION=direction, CLAMP=clamp,
                    MAXIMIZE=maximize, SKIP_NONFINITE=skip_nonfinite, num_warps=group.num_warps, **EXACT,
                )  # fmt: skip
                if has_row_sums:
                    height, width = group.row_shape
                    reduce_rows_kernel[(group.row_blocks.numel(), NUM_ROW_SUMS)](
                        group.row_blocks, table, rows, group.n_slots, R=height, E=width, num_warps=4, **EXACT
                    )
                if has_totals:
                    reduce_totals_kernel[(table.shape[0], NUM_TOTALS)](
                        table, parts, n_tiles, E=REDUCE, num_warps=4, **EXACT
                    )

    return update


OPERATORS = {f"skew_{rule}_": _operator(rule) for rule in RULES}
globals().update(OPERATORS)  # skew_sgd_, skew_adamw_ and so on
__all__ = list(OPERATORS)
