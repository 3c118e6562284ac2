"""Checked, interleaved timings whose rows stand alone, with the physical limit beside them.

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
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

from .. import runtime
from .rows import PACKAGE, BenchError, Row, environment

# glibc keeps freed memory: fresh outputs cause no page faults (docs/notes.md)
WARM_TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=20000000000"
ALLOCATORS = ("default", "warm")


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
        """Bytes read plus bytes written."""
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
    check: Callable[[Callable[[], Any]], None] | None = None
    prepare: Callable[[], Any] | None = None
    first_call: str = ""  # what the first call holds, e.g. "compilation included": a row of its own
    backend: str = "torch"
    missing: str = ""
    failed: str = ""
    note: str = ""
    losses: list[Any] | None = None  # a training step appends its loss here
    own_clock: bool = False  # ``run()`` gives its milliseconds itself
    calls: int = 1  # operations in one ``run()``; what is reported is the time of one


@dataclass
class Case:
    """One operation on one shape: ``impls`` are timed side by side, ratios are to the one named ``baseline``."""

    shape: str
    dtype: str
    baseline: str
    impls: list[Impl]
    numel: int  # of the memory ceilings' tensors; 0: no such ceilings
    product: tuple[int, int, int] | None = None  # (m, k, n) of the matrix-product ceiling
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
    environment: dict[str, Any] = field(default_factory=dict)

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
        raise BenchError(f"--device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise BenchError(f"--device cuda: {why}")
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


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def interleave(
    impls: list[Impl],
    clock: Callable[[Callable[[], Any]], float],
    quick: bool = False,
    tick: Callable[[], None] = lambda: None,
    turns: int = 0,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(milliseconds of each implementation, called in turns; what raised). A slow one leaves the turns when its share
    of time is used up, one that raises leaves them at once; with ``turns`` all are called exactly so often."""
    budget, fewest, most = (100.0, 5, 11) if quick else (1200.0, 7, 40)  # milliseconds, calls, calls
    times: dict[str, list[float]] = {impl.name: [] for impl in impls}
    failures: dict[str, str] = {}

    def is_due(impl: Impl, turn: int) -> bool:
        if impl.name in failures or turns:
            return impl.name not in failures
        return turn < 3 or impl.calls * sum(times[impl.name]) < budget * (2 if turn < fewest else 1)

    gc.collect()
    gc.disable()
    try:
        for turn in range(turns or most):
            due = [impl for impl in impls if is_due(impl, turn)]
            if not due:
                break
            for impl in due:
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
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


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
    resident = 0
    seen = False
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status_bytes("VmRSS:")
        run()
        resident = _status_bytes("VmHWM:") - before
        seen = True
    except OSError:
        pass  # not Linux, or not allowed: torch's own count remains
    if seen and calls == 1:
        return resident
    from torch.profiler import ProfilerActivity, profile

    with _quiet_stderr():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = most = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return max(most, resident if resident >= 8_000_000 else 0)  # below, pages of code and of the profiler show


# ---- ceilings --------------------------------------------------------------------------------------------------------


def memory_ceilings(numel: int, device: torch.device) -> list[Impl]:
    """What the memory gives: a copy, a read and an in-place update of ``numel`` fp32 elements."""
    a, b = torch.ones(numel, device=device), torch.zeros(numel, device=device)
    c, size = torch.ones(numel, device=device), 4 * numel
    return [
        Impl("copy", lambda: b.copy_(a), "ceiling", Traffic(read=size, written=size)),
        Impl("read", lambda: a.sum(), "ceiling", Traffic(read=size)),
        Impl("read-modify-write", lambda: c.neg_(), "ceiling", Traffic(updated=size)),
    ]


PRODUCT = "matrix product"


def product_ceiling(shape: tuple[int, int, int], device: torch.device) -> Impl:
    """What the arithmetic gives: an fp32 product of (m, k) and (k, n) into an existing result."""
    m, k, n = shape
    a, b, out = (torch.ones(*s, device=device) for s in ((m, k), (k, n), (m, n)))
    return Impl(PRODUCT, lambda: torch.mm(a, b, out=out), "ceiling", note=f"{m} x {k} x {n}")


# ---- one case --------------------------------------------------------------------------------------------------------


def _prove(impl: Impl, device: torch.device) -> tuple[float, int | None]:
    """Runs and checks an implementation; (milliseconds of its first call, peak extra bytes of a later one)."""
    calls: list[float] = []

    def timed_run() -> Any:
        start = time.perf_counter()
        result = impl.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls.append((time.perf_counter() - start) * 1e3)
        return result

    if impl.prepare is not None:
        impl.prepare()
    if impl.check is not None:
        impl.check(timed_run)
    else:
        timed_run()
    if impl.own_clock:
        return calls[0], None  # another process' memory
    if impl.prepare is not None:
        impl.prepare()
    return calls[0], peak_extra_bytes(impl.run, device, calls=1 if calls[-1] > 1000 else 2)


def run_case(
    suite: str, entry: Entry, context: Context, tick: Callable[[str], None] = lambda name: None
) -> Iterator[Row]:
    """Checks and measures one entry; yields its rows. A failing implementation becomes a row with a note."""
    case = entry.build(context)
    device = context.device
    fixed = {**(context.environment or environment(device, context.quick)), "suite": suite, "op": entry.op,
             "shape": case.shape, "dtype": case.dtype}  # fmt: skip
    empty = dict.fromkeys(("p20", "p50", "p80", "bytes", "gb_per_s", "percent_of_copy", "rate", "ratio", "limit",
                           "peak_bytes", "losses"))  # fmt: skip

    def row(impl: Impl, /, **values: Any) -> Row:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        own = {"impl": impl.name, "kind": impl.kind, "backend": impl.backend, "note": impl.note, "time": now,
               "unit": "ms", "repetitions": 0, "baseline": case.baseline, "rate_unit": ""}  # fmt: skip
        return Row(**{**empty, **fixed, **own, **values})

    ready: list[Impl] = []
    peaks: dict[str, int | None] = {}
    for impl in case.impls:
        if impl.missing or impl.failed:
            left_out = impl.missing if impl.missing.startswith("left out") else f"missing: {impl.missing}"
            yield row(impl, note=left_out if impl.missing else f"failed: {impl.failed}")
            continue
        tick(impl.name)
        try:
            first, peaks[impl.name] = _prove(impl, device)
        except CheckFailed as error:
            yield row(impl, note=f"failed: wrong result: {error}")
            continue
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except FAULTS as error:
            yield row(impl, note=f"failed: {first_line(error)}")
            continue
        if impl.first_call:
            name = f"{impl.name}: first call, {impl.first_call}"
            yield row(impl, impl=name, p20=first, p50=first, p80=first, repetitions=1, baseline="")
        ready.append(impl)

    ceilings = memory_ceilings(case.numel, device) if case.numel else []
    if case.product:
        ceilings.append(product_ceiling(case.product, device))
    for impl in ceilings:
        impl.run()
    clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    times, failures = interleave([*ceilings, *ready], clock, context.quick, lambda: tick(""), case.turns)
    medians = {name: statistics.median(values) for name, values in times.items() if values and name not in failures}
    copy_rate = line_rate = flop_rate = None
    if case.numel:
        copy_rate = ceilings[0].traffic.total / medians["copy"]  # type: ignore[union-attr]
        line_rate = max(i.traffic.lines / medians[i.name] for i in ceilings if i.traffic)
    if case.product:
        flop_rate = 2e-9 * math.prod(case.product) / medians[PRODUCT]  # GFLOP/ms

    def limit_of(impl: Impl) -> float | None:
        if impl.kind == "ceiling":
            return None
        if impl.traffic is not None and copy_rate and line_rate:
            return impl.traffic.total / copy_rate if device.type == "cuda" else impl.traffic.lines / line_rate
        return case.work / flop_rate if flop_rate and case.work_unit == "GFLOP" else None

    for impl in [*ceilings, *ready]:
        if impl.name in failures:
            yield row(impl, note=f"failed: {failures[impl.name]}")
            continue
        values, p50, traffic = times[impl.name], medians[impl.name], impl.traffic
        work = case.work if impl.kind != "ceiling" else 2e-9 * math.prod(case.product or ()) * (impl.name == PRODUCT)
        unit = case.work_unit if impl.kind != "ceiling" else "GFLOP"
        yield row(
            impl, p20=percentile(values, 0.2), p50=p50, p80=percentile(values, 0.8), repetitions=len(values),
            bytes=traffic.total if traffic else None, gb_per_s=traffic.total / p50 / 1e6 if traffic else None,
            percent_of_copy=100 * traffic.total / p50 / copy_rate if traffic and copy_rate else None,
            rate=1e3 * work / p50 if work else None, rate_unit=f"{unit}/s" if work else "", limit=limit_of(impl),
            ratio=p50 / medians[case.baseline] if case.baseline in medians else None, peak_bytes=peaks.get(impl.name),
            losses=None if impl.losses is None else [float(v) for v in impl.losses],
        )  # fmt: skip


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which entries of a suite; op: part of their operation's name; part: (i, n), the i-th of n parts of them."""

    suite: str
    quick: bool = False
    only_warm: bool = False
    op: str = ""
    part: tuple[int, int] = (1, 1)

    def entries(self, device: torch.device) -> list[Entry]:
        from .suites import SUITES

        fitting = [e for e in SUITES[self.suite] if device.type in e.devices and (e.quick or not self.quick)]
        fitting = [e for e in fitting if self.op in e.op and (e.warm or not self.only_warm)]
        i, n = self.part
        return fitting[len(fitting) * (i - 1) // n : len(fitting) * i // n]


def run_entries(
    suite: str,
    entries: Sequence[Entry],
    device: torch.device,
    quick: bool = False,
    tick: Callable[[str], None] = lambda name: None,
) -> Iterator[Row]:
    """The rows of these entries, as they come, with this process' allocator."""
    context = Context(device, quick, environment(device, quick))
    for entry in entries:
        tick(entry.op)
        torch.manual_seed(0)
        try:
            yield from run_case(suite, entry, context, lambda name, op=entry.op: tick(f"{op}: {name}" if name else ""))  # type: ignore[misc]
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise BenchError(f"{suite}, {entry.op}: not enough memory ({first_line(error)})") from None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_entries_warm(choice: Choice, device: torch.device, tick: Callable[[str], None]) -> Iterator[Row]:
    """The rows of these entries in a child process whose glibc keeps freed memory."""
    if platform.libc_ver()[0] != "glibc":
        raise BenchError("--allocator warm: needs glibc, which reads GLIBC_TUNABLES")
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), WARM_TUNABLES)))
    command = [sys.executable, "-m", "askew_kernels.bench", device.type, json.dumps(asdict(choice))]
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "GLIBC_TUNABLES": tunables, "PYTHONPATH": path},
    )  # fmt: skip
    assert child.stdout is not None and child.stderr is not None
    with contextlib.closing(child.stdout), contextlib.closing(child.stderr):
        try:
            errors: list[str] = []
            drain = threading.Thread(target=lambda: errors.extend(child.stderr), daemon=True)  # type: ignore[arg-type]
            drain.start()
            for line in child.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # something a library printed
                if "row" in message:
                    yield Row(**message["row"])
                else:
                    tick(message["tick"])
            code = child.wait()
            drain.join(5)
        finally:  # before its pipes are closed, which would wait for the thread that reads them
            if child.poll() is None:
                child.kill()
                child.wait()
    if code:
        last = errors[-1].strip() if errors else f"exit code {code}"
        raise BenchError(f"{choice.suite} with the warm allocator: {last}")


def child_main(arguments: list[str]) -> int:
    """Entry point of the child process: rows and ticks as JSON lines on stdout."""
    device = torch.device(arguments[0])
    choice = Choice(**json.loads(arguments[1]))

    def send(message: dict) -> None:
        print(json.dumps(message), flush=True)

    try:
        rows = run_entries(choice.suite, choice.entries(device), device, choice.quick, lambda t: send({"tick": t}))
        for row in rows:
            send({"row": asdict(row)})
    except KeyboardInterrupt:
        return 130
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
