"""Checked, interleaved timings whose rows stand alone, with the least time that measured ceilings allow beside them.

Method (``benchmarks/README.md`` reads the results):

* the implementations of a case run in turns, A B C A B C …, in one process; medians with the 20th and 80th percentile;
* an implementation's result is compared with the reference before it is timed, and a wrong one is not timed;
* ceilings (copy, read, in-place read-modify-write, matrix product) are members of the same turns;
* CPU: wall time; calls too short for a clock in blocks, by ``torch.utils.benchmark``;
* GPU: CUDA events, the L2 cache flushed before each call, the queue filled before the clock starts.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

from .. import runtime
from ..command import Refused
from . import peers
from .rows import EMPTY, Row, environment

# What an implementation may end with without taking the others with it; some libraries call sys.exit.
FAULTS = (Exception, SystemExit)


class CheckFailed(Exception):
    """An implementation's result is not the reference's; it is not timed."""


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that an operation must move: inputs ``read``, tensors ``updated`` in place, outputs ``written``."""

    read: int = 0
    updated: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        return self.read + 2 * self.updated + self.written

    @property
    def lines(self) -> int:
        """Bytes of cache lines that a CPU brings in: one only written is read first, writing back is nearly free."""
        return self.read + self.updated + self.written


@dataclass
class Impl:
    """One implementation of a case's operation.

    ``run()`` is what is timed; ``prepare()`` runs untimed before each call; ``check(run)`` runs it (so that state can
    be followed) and raises ``CheckFailed``. ``missing``, ``failed``: why this one is not here; it is then only named.
    """

    name: str
    run: Callable[[], Any] = lambda: None
    kind: str = "peer"
    traffic: Traffic | None = None
    check: Callable[[Callable[[], Any]], Any] = lambda run: run()
    prepare: Callable[[], Any] | None = None
    first_call: str = ""  # what the first call holds, e.g. "compilation included": a row of its own
    backend: str = "torch"
    missing: str = ""
    failed: str = ""
    note: str = ""
    losses: list[Any] | None = None  # a training step appends its loss here
    own_clock: bool = False  # ``run()`` gives its milliseconds itself
    calls: int = 1  # operations in one ``run()``; what is reported is the time of one
    product: str = ""  # which of ``PRODUCTS`` its arithmetic can be no faster than; empty: the first


@dataclass
class Case:
    """One operation on one shape: ``impls`` are timed side by side, ratios are to the one named ``baseline``."""

    shape: str
    dtype: str
    baseline: str
    impls: list[Impl]
    numel: int  # of the memory ceilings' tensors; 0: no such ceilings
    product: tuple[int, int, int] | None = None  # (m, k, n) of the matrix-product ceilings
    products: tuple[str, ...] = ("matrix product",)  # which of ``PRODUCTS``
    work: float = 0.0  # what one call does, in units of ``work_unit``; floating-point operations / 1e9 for "GFLOP"
    work_unit: str = ""  # "GFLOP", "images", "tokens"
    turns: int = 0  # exactly so many calls of each (training: equal work); 0: as many as the time allows


@dataclass(frozen=True)
class Entry:
    """A benchmark: ``build(context)`` makes its case. ``warm``: run a second time with the warm allocator (CPU);
    ``quick``: part of ``--quick``."""

    op: str
    build: Callable[[Context], Case]
    devices: tuple[str, ...] = ("cpu", "cuda")
    warm: bool = False
    quick: bool = True


@dataclass
class Context:
    """What an entry's builder is told."""

    device: torch.device
    quick: bool = False

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        return environment(self.device, self.quick)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def side(self) -> int:
        """Side of the square weight: 4096 (16M weights), 8192 on a GPU, 1024 with ``quick``."""
        return 1024 if self.quick else 8192 if self.is_cuda else 4096

    def backends(self) -> list[tuple[str, str]]:
        """(backend to force or "", why it is missing or "") of our own implementations on this device."""
        if not self.is_cuda:
            return [("", "")]
        fits = runtime.cuda_archs_fit()
        no_cpp = "" if fits else runtime.why_not_compiled() or runtime.choose_backend("cuda")[1]
        return [("cpp", no_cpp), ("triton", "" if runtime.has_triton() else "triton is not installed")]


def check_device(name: str) -> torch.device:
    """The device, after making sure that it is here and that a backend serves it."""
    if name not in ("cpu", "cuda"):
        raise Refused(f"--device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise Refused(f"--device cuda: {why}")
    return torch.device(name)


# ---- clocks ----------------------------------------------------------------------------------------------------------


class CpuClock:
    """Wall time of one call, milliseconds. A call shorter than 0.2 ms is timed in blocks of about 1 ms by
    torch.utils.benchmark, whose two warm-up calls then cost nothing that matters."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[benchmark.Timer, int]] = {}

    def __call__(self, run: Callable[[], Any]) -> float:
        if block := self.blocks.get(id(run)):
            timer, calls = block
            return timer.timeit(calls).mean * 1e3
        start = time.perf_counter()
        run()
        milliseconds = (time.perf_counter() - start) * 1e3
        if milliseconds < 0.2:
            timer = benchmark.Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            self.blocks[id(run)] = timer, math.ceil(1.0 / max(milliseconds, 1e-3))  # ``run`` lives on in the timer
        return milliseconds


class CudaClock:
    """Device time of one call, milliseconds: L2-cold, and with the launches queued before the clock starts."""

    def __init__(self, device: torch.device) -> None:
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
        self.flush = torch.zeros(l2 * 3 // 4, dtype=torch.float32, device=device)  # three times the cache
        self.device = device

    def __call__(self, run: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        self.flush.sum()  # read, not written: clean lines leave the cache without traffic
        torch.cuda._sleep(1_000_000)  # about half a millisecond in which Python queues the call
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def clock_of(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the closest ranks."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def interleave(
    impls: list[Impl], clock: Callable[[Callable[[], Any]], float], quick: bool = False,
    tick: Callable[[], None] = lambda: None, turns: int = 0,
) -> tuple[dict[str, list[float]], dict[str, str]]:  # fmt: skip
    """(milliseconds of each implementation, called in turns; what raised). A slow one leaves the turns when its share
    of time is used up, one that raises leaves them at once; with ``turns`` all are called exactly so often."""
    budget, fewest, most = (100.0, 5, 11) if quick else (1200.0, 7, 40)  # milliseconds, calls, calls
    times: dict[str, list[float]] = {impl.name: [] for impl in impls}
    failures: dict[str, str] = {}

    def is_due(impl: Impl, turn: int) -> bool:
        spent = impl.calls * sum(times[impl.name])
        within = turns > 0 or turn < 3 or spent < budget * (2 if turn < fewest else 1)
        return within and impl.name not in failures

    gc.collect()
    gc.disable()
    try:
        for turn in range(turns or most):
            for impl in [impl for impl in impls if is_due(impl, turn)]:
                try:
                    if impl.prepare is not None:
                        impl.prepare()
                    times[impl.name].append(impl.run() if impl.own_clock else clock(impl.run) / impl.calls)
                except FAULTS as error:
                    failures[impl.name] = first_line(error)
                tick()
    finally:
        gc.enable()
    return times, failures


# ---- memory ----------------------------------------------------------------------------------------------------------


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """torch's profiler writes to file descriptor 2 itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_extra_bytes(run: Callable[[], Any], device: torch.device, calls: int = 2) -> int:
    """The most memory that one call of ``run`` held beyond what was held before it, its results included.

    CUDA: the allocator's own peak. CPU: the larger of two independent counts, the running sum of torch's allocations
    and frees (profiler), and, from 8 MB up, the growth of the process' peak resident memory (Linux), which also sees
    memory that does not come from torch's allocator. calls=1 for something slow: the second count alone.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    resident = None
    with contextlib.suppress(OSError):  # not Linux, or not allowed: torch's own count remains
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status_bytes("VmRSS:")
        run()
        resident = _status_bytes("VmHWM:") - before
    if resident is not None and calls == 1:
        return resident
    from torch.profiler import ProfilerActivity, profile

    with _quiet_stderr():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    resident = resident or 0
    return max(0, *held, resident if resident >= 8_000_000 else 0)  # below, pages of code and of the profiler show


# ---- ceilings --------------------------------------------------------------------------------------------------------

PRODUCT, BF16_PRODUCT, INT8_PRODUCT = "matrix product", "bfloat16 matrix product", "int8 matrix product"


def _product(name: str, m: int, k: int, n: int, device: torch.device) -> Callable[[], Any]:
    """A product into an existing result, the library's own; of int8, which has no such form, into a new one."""
    if name == INT8_PRODUCT:
        x, y = (torch.ones(*s, device=device, dtype=torch.int8) for s in ((m, k), (k, n)))
        return lambda: torch._int_mm(x, y)
    dtype = torch.bfloat16 if name == BF16_PRODUCT else torch.float32
    x, y, out = (torch.ones(*s, device=device, dtype=dtype) for s in ((m, k), (k, n), (m, n)))
    return lambda: torch.mm(x, y, out=out)


def ceilings_of(case: Case, device: torch.device) -> list[Impl]:
    """What the memory gives, a copy (first), a read and an in-place update of ``case.numel`` fp32 elements, and what
    the arithmetic gives, products of ``case.product`` = (m, k, n) in the types of ``case.products``."""
    made = []
    if size := 4 * case.numel:
        a, b, c = (torch.ones(case.numel, device=device) for _ in range(3))
        made = [
            Impl("copy", lambda: b.copy_(a), "ceiling", Traffic(read=size, written=size)),
            Impl("read", lambda: a.sum(), "ceiling", Traffic(read=size)),
            Impl("read-modify-write", lambda: c.neg_(), "ceiling", Traffic(updated=size)),
        ]
    if case.product:
        m, k, n = case.product
        made += [Impl(name, _product(name, m, k, n, device), "ceiling", note=f"{m} x {k} x {n}")
                 for name in case.products]  # fmt: skip
    for impl in made:
        impl.run()
    return made


# ---- one case --------------------------------------------------------------------------------------------------------


def peer(name: str, library: str, build: Callable[[], Impl], left_out: str = "") -> Impl:
    """``build()``'s implementation under this name, or one that says why it is not here."""
    if missing := left_out or peers.why_missing(library):
        return Impl(name, missing=missing)
    try:
        impl = build()
    except FAULTS as error:
        return Impl(name, failed=first_line(error))
    impl.name = name
    return impl


def prove(impl: Impl, device: torch.device) -> tuple[float, int | None]:
    """Runs and checks an implementation; (milliseconds of its first call, peak extra bytes of a later one)."""
    calls: list[float] = []

    def timed_run() -> Any:
        start = time.perf_counter()
        result = impl.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls.append((time.perf_counter() - start) * 1e3)
        return result

    prepare = impl.prepare or (lambda: None)
    prepare()
    impl.check(timed_run)
    if impl.own_clock:
        return calls[0], None  # another process' memory
    prepare()
    return calls[0], peak_extra_bytes(impl.run, device, calls=1 if calls[-1] > 1000 else 2)


def run_case(
    suite: str, entry: Entry, context: Context, tick: Callable[[str], None] = lambda name: None
) -> Iterator[Row]:
    """Checks and measures one entry; yields its rows. A failing implementation becomes a row with a note."""
    case, device = entry.build(context), context.device
    fixed = {**EMPTY, **context.environment, "suite": suite, "op": entry.op, "shape": case.shape, "dtype": case.dtype,
             "baseline": case.baseline, "unit": "ms", "repetitions": 0}  # fmt: skip

    def row(impl: Impl, /, **values: Any) -> Row:
        own = {"impl": impl.name, "kind": impl.kind, "backend": impl.backend, "note": impl.note, "time": now()}
        return Row(**{**fixed, **own, **values})

    ready: list[Impl] = []
    peaks: dict[str, int | None] = {}
    for impl in case.impls:
        if why := f"failed: {impl.failed}" if impl.failed else impl.missing:
            yield row(impl, note=why if why.startswith(("left out", "failed")) else f"missing: {why}")
            continue
        tick(impl.name)
        try:
            first, peaks[impl.name] = prove(impl, device)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except FAULTS as error:
            what = f"wrong result: {error}" if isinstance(error, CheckFailed) else first_line(error)
            yield row(impl, note=f"failed: {what}")
            continue
        if impl.first_call:
            name = f"{impl.name}: first call, {impl.first_call}"
            yield row(impl, impl=name, p20=first, p50=first, p80=first, repetitions=1, baseline="")
        ready.append(impl)

    ceilings = ceilings_of(case, device)
    shown = [*ceilings, *ready]
    times, failures = interleave(shown, clock_of(device), context.quick, lambda: tick(""), case.turns)
    medians = {name: statistics.median(values) for name, values in times.items() if values and name not in failures}
    copy_rate = line_rate = None  # bytes/ms
    if case.numel:
        copy_rate = ceilings[0].traffic.total / medians["copy"]  # type: ignore[union-attr]
        line_rate = max(i.traffic.lines / medians[i.name] for i in ceilings if i.traffic)
    product = 2e-9 * math.prod(case.product or (0,))  # GFLOP

    def limit_of(impl: Impl) -> float | None:
        if impl.kind == "ceiling":
            return None
        limits = []
        if impl.traffic is not None and copy_rate and line_rate:
            bytes_limit = impl.traffic.total / copy_rate if device.type == "cuda" else impl.traffic.lines / line_rate
            limits.append(bytes_limit)
        if product and case.work_unit == "GFLOP" and (impl.traffic is None or impl.product):
            limits.append(case.work * medians[impl.product or PRODUCT] / product)
        return max(limits, default=None)

    for impl in shown:
        if impl.name in failures:
            yield row(impl, note=f"failed: {failures[impl.name]}")
            continue
        values, p50, traffic = times[impl.name], medians[impl.name], impl.traffic
        work, unit = case.work, case.work_unit
        if impl.kind == "ceiling":
            work, unit = product * (impl.name in case.products), "GFLOP"
        moved: dict[str, Any] = {}
        if traffic:
            percent = 100 * traffic.total / p50 / copy_rate if copy_rate else None
            moved = {"bytes": traffic.total, "gb_per_s": traffic.total / p50 / 1e6, "percent_of_copy": percent}
        yield row(
            impl, p20=percentile(values, 0.2), p50=p50, p80=percentile(values, 0.8), repetitions=len(values), **moved,
            rate=1e3 * work / p50 if work else None, rate_unit=f"{unit}/s" if work else "", limit=limit_of(impl),
            ratio=p50 / medians[case.baseline] if case.baseline in medians else None, peak_bytes=peaks.get(impl.name),
            losses=None if impl.losses is None else [float(v) for v in impl.losses],
        )  # fmt: skip
