"""Benchmark harness: checked, interleaved timings whose rows stand alone, with the physical limit beside them.

Method (``benchmarks/README.md`` reads the results):

* the implementations of a case run in turns, A B C A B C …, in one process; medians with the 20th and 80th percentile;
* an implementation's result is compared with the reference before it is timed, and a wrong one is not timed;
* ceilings (copy, read, in-place read-modify-write) are members of the same turns;
* on a GPU: CUDA events, the L2 cache flushed before each call, the queue filled before the clock starts.

What is measured stands in ``bench_suites.SUITES``; adding a benchmark is one entry there. Nothing here imports rich
or matplotlib before a table or a plot is made.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import gc
import importlib.util
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from . import runtime

SCHEMA_VERSION = 1
# glibc keeps freed memory: fresh outputs cause no page faults (docs/notes.md)
WARM_TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=20000000000"
ALLOCATORS = ("default", "warm")


class CheckFailed(Exception):
    """An implementation's result is not the reference's; it is not timed."""


class BenchError(Exception):
    """What the user can change: one clear line, no traceback."""


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One measurement, readable without its neighbours. Times are milliseconds, sizes are bytes, 1 GB = 1e9 bytes."""

    suite: str
    op: str
    impl: str
    kind: str  # ours | peer | baseline | ceiling
    shape: str
    dtype: str
    p20: float | None
    p50: float | None
    p80: float | None
    unit: str  # "ms", or "B" for memory rows
    repetitions: int
    bytes: int | None  # the least that must move: every input read once, every output written once
    gb_per_s: float | None  # bytes / p50
    percent_of_copy: (
        float | None
    )  # gb_per_s over that of a copy in the same turns (read + written bytes); may exceed 100
    baseline: str  # the implementation (or the thing) that ``ratio`` is taken to
    ratio: float | None  # p50 / p50 of the baseline: below 1 is faster
    limit: float | None  # the least time that the measured bandwidth allows, in ``unit``
    peak_bytes: int | None  # most extra memory held at any moment of one call after the first, results included
    device: str
    device_type: str
    threads: int
    backend: str
    allocator: str
    quick: bool
    torch: str
    askew: str
    python: str
    commit: str
    time: str  # UTC, ISO 8601
    note: str = ""


ROW_FIELDS = tuple(f.name for f in fields(Row))


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
    be followed) and raises ``CheckFailed``. ``missing``: why this implementation is not here; it is then only named.
    """

    name: str
    run: Callable[[], Any] = lambda: None
    kind: str = "peer"
    traffic: Traffic | None = None
    check: Callable[[Callable[[], Any]], None] | None = None
    prepare: Callable[[], Any] | None = None
    report_first_call: bool = False  # compile time, in a row of its own
    backend: str = "torch"
    missing: str = ""
    note: str = ""


@dataclass
class Case:
    """One operation on one shape: ``impls`` are timed side by side, ratios are to the one named ``baseline``."""

    shape: str
    dtype: str
    baseline: str
    impls: list[Impl]
    numel: int  # of the ceilings' tensors; 0: no ceilings
    limit_traffic: Traffic | None = None
    weight_bytes: int = 0  # what memory rows are compared with


@dataclass(frozen=True)
class Entry:
    """A benchmark: ``build(context)`` makes its case. ``measure``: "time" or "memory"."""

    op: str
    build: Callable[[Context], Case]
    measure: str = "time"
    devices: tuple[str, ...] = ("cpu", "cuda")


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
        fits = runtime._cuda_archs_fit()
        no_cpp = "" if fits else runtime.why_not_compiled() or runtime.choose_backend("cuda")[1]
        return [("cpp", no_cpp), ("triton", "" if runtime.has_triton() else "triton is not installed")]


# ---- where and with what ---------------------------------------------------------------------------------------------


def _commit() -> str:
    """Short hash of the commit that this package stands in, "+" where the tree was changed; "" outside a checkout."""
    here = str(Path(__file__).parent)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "--error-unmatch", "__init__.py"):
            return ""  # e.g. installed into a virtual environment inside some other repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", here, f"{here}/../csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def allocator_in_use() -> str:
    """ "warm" where glibc was told to keep freed memory, else "default"."""
    return "warm" if "mmap_max=0" in os.environ.get("GLIBC_TUNABLES", "") else "default"


def environment(device: torch.device, quick: bool = False) -> dict[str, Any]:
    """The fields of a row that are the same for a whole run."""
    from . import __version__

    return {
        "device": device_name(device), "device_type": device.type, "threads": torch.get_num_threads(),
        "allocator": allocator_in_use(), "quick": quick, "torch": torch.__version__, "askew": __version__,
        "python": platform.python_version(), "commit": _commit(),
    }  # fmt: skip


def check_device(name: str) -> torch.device:
    """The device, after making sure that it is here and that a backend serves it."""
    if name not in ("cpu", "cuda"):
        raise BenchError(f"--device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise BenchError(f"--device cuda: {why}")
    return torch.device(name)


def need(module: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise BenchError(f'{purpose} needs {module}, which is not installed: pip install "askew_kernels[bench]"')


# ---- clocks ----------------------------------------------------------------------------------------------------------


class CpuClock:
    """Wall time of one call, milliseconds."""

    def __call__(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3


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


def interleave(
    impls: list[Impl],
    clock: Callable[[Callable[[], Any]], float],
    quick: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of each implementation, called in turns; a slow one leaves the turns when its share is used up."""
    budget, fewest, most = (150.0, 5, 11) if quick else (2500.0, 7, 60)  # milliseconds, calls, calls
    times: dict[str, list[float]] = {impl.name: [] for impl in impls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(most):
            active = [i for i in impls if turn < 3 or (sum(times[i.name]) < budget * (4 if turn < fewest else 1))]
            if not active:
                break
            for impl in active:
                if impl.prepare is not None:
                    impl.prepare()
                times[impl.name].append(clock(impl.run))
                tick()
    finally:
        gc.enable()
    return times


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


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most memory that one call of ``run`` held beyond what was held before it, its results included.

    CUDA: the allocator's own peak. CPU: the larger of two independent counts, the running sum of torch's allocations
    and frees (profiler), and, from 8 MB up, the growth of the process' peak resident memory (Linux), which also sees
    memory that does not come from torch's allocator.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    resident = 0
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status_bytes("VmRSS:")
        run()
        resident = _status_bytes("VmHWM:") - before
    except OSError:
        pass  # not Linux, or not allowed: torch's own count remains
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


def ceiling_impls(numel: int, device: torch.device) -> list[Impl]:
    """What the memory gives: a copy, a read and an in-place update of ``numel`` fp32 elements."""
    a, b = torch.ones(numel, device=device), torch.zeros(numel, device=device)
    c, size = torch.ones(numel, device=device), 4 * numel
    return [
        Impl("copy", lambda: b.copy_(a), "ceiling", Traffic(read=size, written=size)),
        Impl("read", lambda: a.sum(), "ceiling", Traffic(read=size)),
        Impl("read-modify-write", lambda: c.neg_(), "ceiling", Traffic(updated=size)),
    ]


# ---- one case --------------------------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def run_case(
    suite: str, entry: Entry, context: Context, tick: Callable[[str], None] = lambda name: None
) -> Iterator[Row]:
    """Checks and measures one entry; yields its rows. A failing implementation becomes a row with a note."""
    case = entry.build(context)
    device = context.device
    fixed = {**(context.environment or environment(device, context.quick)), "suite": suite, "op": entry.op,
             "shape": case.shape, "dtype": case.dtype}  # fmt: skip

    def row(impl: Impl, /, **values: Any) -> Row:
        empty = dict.fromkeys(
            ("p20", "p50", "p80", "bytes", "gb_per_s", "percent_of_copy", "ratio", "limit", "peak_bytes")
        )
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        given = {"unit": "ms", "repetitions": 0, "note": impl.note, "baseline": case.baseline, **values}
        return Row(
            **{**empty, **fixed, "impl": impl.name, "kind": impl.kind, "backend": impl.backend, "time": now, **given}
        )

    ready: list[Impl] = []
    peaks: dict[str, int] = {}
    for impl in case.impls:
        if impl.missing:
            yield row(impl, note=f"missing: {impl.missing}")
            continue
        tick(impl.name)
        first: list[float] = []

        def checked_run(impl: Impl = impl, first: list[float] = first) -> Any:
            start = time.perf_counter()
            result = impl.run()
            if not first:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                first.append((time.perf_counter() - start) * 1e3)
            return result

        try:
            if impl.prepare is not None:
                impl.prepare()
            if impl.check is not None:
                impl.check(checked_run)
            else:
                checked_run()
            if impl.prepare is not None:
                impl.prepare()
            peaks[impl.name] = peak_extra_bytes(impl.run, device)
        except CheckFailed as error:
            yield row(impl, note=f"failed: wrong result: {error}")
            continue
        except Exception as error:  # a peer's fault must not take the others with it
            yield row(impl, note=f"failed: {_first_line(error)}")
            continue
        if impl.report_first_call and entry.measure == "time":
            name = f"{impl.name}: first call, compilation included"
            yield row(impl, impl=name, p20=first[0], p50=first[0], p80=first[0], repetitions=1, baseline="")
        ready.append(impl)

    if entry.measure == "memory":
        for impl in ready:
            peak = peaks[impl.name]
            ratio = peak / case.weight_bytes if case.weight_bytes else None
            yield row(impl, p20=float(peak), p50=float(peak), p80=float(peak), unit="B", repetitions=1, peak_bytes=peak,
                      baseline="bytes of the weights", ratio=ratio)  # fmt: skip
        return

    ceilings = ceiling_impls(case.numel, device) if case.numel else []
    for impl in ceilings:
        impl.run()
    clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    times = interleave([*ceilings, *ready], clock, context.quick, lambda: tick(""))
    medians = {name: statistics.median(values) for name, values in times.items()}
    copy_rate = line_rate = None
    if ceilings:
        copy_rate = ceilings[0].traffic.total / medians["copy"]  # type: ignore[union-attr]
        line_rate = max(i.traffic.lines / medians[i.name] for i in ceilings)  # type: ignore[union-attr]

    for impl in [*ceilings, *ready]:
        values, p50, traffic = times[impl.name], medians[impl.name], impl.traffic
        limit = None
        if traffic is not None and copy_rate and line_rate and impl.kind != "ceiling":
            limit = traffic.total / copy_rate if device.type == "cuda" else traffic.lines / line_rate
        yield row(
            impl, p20=percentile(values, 0.2), p50=p50, p80=percentile(values, 0.8), repetitions=len(values),
            bytes=traffic.total if traffic else None, gb_per_s=traffic.total / p50 / 1e6 if traffic else None,
            percent_of_copy=100 * traffic.total / p50 / copy_rate if traffic and copy_rate else None, limit=limit,
            ratio=p50 / medians[case.baseline] if case.baseline in medians else None, peak_bytes=peaks.get(impl.name),
        )  # fmt: skip


# ---- a run -----------------------------------------------------------------------------------------------------------


def run_suite(
    suite: str, device: torch.device, quick: bool = False, tick: Callable[[str], None] = lambda name: None
) -> Iterator[Row]:
    """The rows of one suite, as they come, with this process' allocator."""
    from .bench_suites import SUITES

    context = Context(device, quick, environment(device, quick))
    for entry in SUITES[suite]:
        if device.type not in entry.devices:
            continue
        tick(entry.op)
        torch.manual_seed(0)
        try:
            yield from run_case(suite, entry, context, lambda name, op=entry.op: tick(f"{op}: {name}" if name else ""))  # type: ignore[misc]
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise BenchError(f"{suite}, {entry.op}: not enough memory ({_first_line(error)})") from None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_suite_warm(
    suite: str, device: torch.device, quick: bool = False, tick: Callable[[str], None] = lambda name: None
) -> Iterator[Row]:
    """``run_suite`` in a child process whose glibc keeps freed memory."""
    if platform.libc_ver()[0] != "glibc":
        raise BenchError("--allocator warm: needs glibc, which reads GLIBC_TUNABLES")
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), WARM_TUNABLES)))
    command = [sys.executable, "-m", "askew_kernels.bench", suite, device.type, *(["quick"] if quick else [])]
    package_root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "GLIBC_TUNABLES": tunables, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        assert child.stdout is not None and child.stderr is not None
        with contextlib.closing(child.stdout), contextlib.closing(child.stderr):
            import threading

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
        if code:
            last = errors[-1].strip() if errors else f"exit code {code}"
            raise BenchError(f"{suite} with the warm allocator: {last}")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _child(arguments: list[str]) -> int:
    """Entry point of the child process: rows and ticks as JSON lines on stdout."""
    suite, device, *rest = arguments

    def send(message: dict) -> None:
        print(json.dumps(message), flush=True)

    try:
        for row in run_suite(suite, torch.device(device), "quick" in rest, lambda name: send({"tick": name})):
            send({"row": asdict(row)})
    except KeyboardInterrupt:
        return 130
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


# ---- files -----------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: str | bytes) -> None:
    """A reader sees the old file or the new one, never half of it. Raises BenchError where that cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise BenchError(f"{path}: is a folder, expected a file's name")
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise BenchError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(path: Path, folder: bool = False) -> None:
    """Finds out before the first measurement that the results could not be kept."""
    probe = (path if folder else path.parent) / f".askew-{os.getpid()}.tmp"
    if not folder and path.is_dir():
        raise BenchError(f"{path}: is a folder, expected a file's name")
    write_atomic(probe, "")
    probe.unlink()


def rows_to_json(rows: Iterable[Row]) -> str:
    rows = list(rows)
    document = {"schema": SCHEMA_VERSION, "rows": [asdict(r) for r in rows], "goals": [asdict(g) for g in goals(rows)]}
    return json.dumps(document, indent=1) + "\n"


def rows_from_json(text: str) -> list[Row]:
    """The inverse of ``rows_to_json``; fields of a later version are left out."""
    return [Row(**{k: v for k, v in r.items() if k in ROW_FIELDS}) for r in json.loads(text)["rows"]]


def rows_to_csv(rows: Iterable[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ROW_FIELDS, lineterminator="\n")
    writer.writeheader()
    for r in rows:
        writer.writerow({k: "" if v is None else v for k, v in asdict(r).items()})
    return out.getvalue()


# ---- goals -----------------------------------------------------------------------------------------------------------


@dataclass
class GoalResult:
    """One line of the goals table; ``measured`` is None where its rows are not there."""

    goal: str
    measured: float | None
    wanted: float
    sense: str  # "<=" or ">="
    reached: bool | None


def goals(rows: Iterable[Row]) -> list[GoalResult]:
    """Every goal of ``bench_suites.GOALS`` that these rows can answer."""
    from .bench_suites import GOALS

    rows = list(rows)
    results = []
    for goal in GOALS:
        if not any(r.device_type == goal.device and r.suite == goal.suite for r in rows):
            continue
        try:
            measured = goal.measure([r for r in rows if r.device_type == goal.device and r.suite == goal.suite])
        except (LookupError, TypeError, ValueError, ZeroDivisionError):
            measured = None
        if measured is None and any(r.quick for r in rows):
            continue  # what --quick leaves out
        reached = None
        if measured is not None:
            reached = measured <= goal.wanted if goal.sense == "<=" else measured >= goal.wanted
        results.append(GoalResult(goal.text, measured, goal.wanted, goal.sense, reached))
    return results


# ---- tables ----------------------------------------------------------------------------------------------------------


def _case_of(r: Row) -> tuple[str, ...]:
    return (r.suite, r.op, r.shape, r.dtype, r.allocator, r.device)


def by_case(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    cases: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        cases.setdefault(_case_of(r), []).append(r)
    return cases


def _size(n: float | None) -> str:
    if n is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} B"


def _significant(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def suite_table(suite: str, rows: list[Row]) -> Any:
    """A rich table of one suite's rows, one section for each case."""
    from rich.table import Table

    first = rows[0]
    quick = "; quick: small tensors that may fit the caches, not the goals' sizes" if first.quick else ""
    title = f"{suite}: {first.device}, {first.threads} threads, torch {first.torch}{quick}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    table.add_column("implementation", overflow="fold", min_width=30)
    memory = all(r.unit == "B" or r.p50 is None for r in rows)
    columns = ("peak extra memory", "÷ weights") if memory else (
        "median ms", "p20–p80", "× baseline", "limit ms", "GB/s", "% of copy", "peak extra",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    styles = {"ours": "green", "baseline": "cyan", "ceiling": "dim"}
    for case in by_case(rows).values():
        head = case[0]
        allocator = f", {head.allocator} allocator" if head.device_type == "cpu" else ""
        table.add_section()
        table.add_row(f"[bold]{head.op}[/bold] {head.shape} {head.dtype}{allocator}")
        for r in case:
            style = "red" if r.note.startswith("failed") else styles.get(r.kind, "")
            if r.p50 is None:
                table.add_row(f"  {r.impl}: {r.note}", style=style or "dim")
                continue
            name = f"  {r.impl}" + (f" ({r.note})" if r.note else "")
            if memory:
                table.add_row(name, _size(r.peak_bytes), "" if r.ratio is None else f"{r.ratio:.4f}", style=style)
                continue
            table.add_row(
                name, _significant(r.p50), f"{_significant(r.p20)}–{_significant(r.p80)}",
                "" if r.ratio is None else f"{_significant(r.ratio)}", _significant(r.limit), _significant(r.gb_per_s),
                "" if r.percent_of_copy is None else f"{r.percent_of_copy:.0f}", _size(r.peak_bytes), style=style,
            )  # fmt: skip
    return table


def plain_report(rows: list[Row]) -> str:
    """The tables as plain lines, for where rich is not installed."""
    lines = []
    for case in by_case(rows).values():
        head = case[0]
        lines.append(f"{head.suite}: {head.op}, {head.shape} {head.dtype}, {head.device}, {head.allocator} allocator")
        for r in case:
            if r.p50 is None:
                lines.append(f"  {r.impl}: {r.note}")
                continue
            parts = [f"{_significant(r.p50)} {r.unit}"]
            parts += [f"{_significant(r.ratio)} x {r.baseline}"] if r.ratio is not None else []
            parts += [f"{r.percent_of_copy:.0f} % of copy"] if r.percent_of_copy is not None else []
            lines.append(f"  {r.impl}: {', '.join(parts)}")
    for g in goals(rows):
        measured = "not measured" if g.measured is None else f"{g.measured:.3g}, {'reached' if g.reached else 'MISSED'}"
        lines.append(f"goal: {g.goal} {g.sense} {g.wanted:g}: {measured}")
    return "\n".join(lines)


def goals_table(rows: list[Row]) -> Any:
    """A rich table: each goal, what was measured, reached or not; None where no goal applies."""
    from rich.table import Table

    results = goals(rows)
    if not results:
        return None
    title = "goals" + (" (quick sizes: an indication only)" if any(r.quick for r in rows) else "")
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    for name in ("goal", "wanted", "measured", ""):
        table.add_column(name, justify="left" if name == "goal" else "right", overflow="fold")
    for g in results:
        sign = {"<=": "≤", ">=": "≥"}[g.sense]
        if g.measured is None:
            table.add_row(g.goal, f"{sign} {g.wanted:g}", "not measured", "–", style="dim")
        else:
            mark = "[green]✓[/green]" if g.reached else "[red]✗[/red]"
            table.add_row(g.goal, f"{sign} {g.wanted:g}", f"{g.measured:.3g}", mark)
    return table


# ---- plots -----------------------------------------------------------------------------------------------------------


def plot_suite(suite: str, rows: list[Row]) -> bytes:
    """PNG: for each case the ratio of every implementation to the baseline, and ours' physical limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    memory = any(r.unit == "B" for r in rows)
    cases = {
        key: shown
        for key, case in by_case(rows).items()
        if (shown := [r for r in case if r.ratio is not None and r.kind != "ceiling"])
    }
    if not cases:
        raise BenchError(f"{suite}: no finished rows to plot")
    colors = {"ours": "#2a7f62", "baseline": "#5b6c8f", "peer": "#c9a25f"}
    several = len({r.allocator for r in rows}) > 1
    heights = [len(case) + 1.6 for case in cases.values()]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(10.5, 0.34 * sum(heights) + 0.9),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axis, case in zip(axes[:, 0], cases.values(), strict=True):
        head = case[0]
        ratios = [r.ratio or 0.0 for r in case]
        logarithmic = not memory and max(ratios) > 12 * min(ratios)
        positions = list(range(len(case)))[::-1]
        ends = [q if memory or not r.p50 or not r.p80 else q * r.p80 / r.p50 for q, r in zip(ratios, case, strict=True)]
        axis.barh(positions, ratios, color=[colors.get(r.kind, "#999999") for r in case], height=0.72)
        if not memory:
            base = next((r.p50 for r in case if r.impl == head.baseline), None)
            if base:
                low = [max(0.0, ((r.p50 or 0) - (r.p20 or 0)) / base) for r in case]
                high = [max(0.0, ((r.p80 or 0) - (r.p50 or 0)) / base) for r in case]
                axis.errorbar(
                    ratios, positions, xerr=[low, high], fmt="none", ecolor="#333333", elinewidth=1, capsize=2
                )
            axis.axvline(1.0, color="#5b6c8f", linewidth=0.8)
        ours = next((r for r in case if r.kind == "ours" and r.limit and r.p50 and r.ratio), None)
        limit, limit_text = None, ""
        if ours is not None and ours.limit and ours.p50 and ours.ratio and not ours.quick:  # quick ones fit caches
            limit = ours.limit * ours.ratio / ours.p50
            limit_text = f"     red line: the memory's limit for {ours.impl}, {_significant(limit)}"
            axis.axvline(limit, color="#b03a2e", linestyle="--", linewidth=1.4)
        if logarithmic:
            axis.set_xscale("log")
            axis.set_xlim(min(*ratios, 1.0, limit or 1.0) * 0.6, max(*ends, 1.0) * 2.2)
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.set_xlim(0, max(*ends, limit or 1.0, 1.0) * 1.13)
        for position, r, end in zip(positions, case, ends, strict=True):
            text = _size(r.peak_bytes) if memory else f"{_significant(r.ratio)}×"
            axis.annotate(text, (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axis.set_yticks(positions, [r.impl for r in case], fontsize=8.5)
        axis.set_ylim(-0.6, len(case) - 0.4)
        allocator = f", {head.allocator} allocator" if several else ""
        axis.set_title(
            f"{head.op}   {head.shape} {head.dtype}{allocator}", loc="left", fontsize=10, fontweight="bold", pad=14
        )
        what = "extra memory ÷ bytes of the weights" if memory else f"time ÷ {head.baseline}"
        axis.set_xlabel(what + (" (log)" if logarithmic else "") + limit_text, fontsize=8.5)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    quick = ", quick sizes" if first.quick else ""
    subtitle = f"{first.device}, {first.threads} threads, torch {first.torch}, {first.commit or 'no commit'}{quick}"
    figure.suptitle(f"{suite}: {subtitle}", fontsize=9, x=0.01, ha="left", color="#555555")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    plt.close(figure)
    return out.getvalue()


def demo_table(folder: Path) -> int:
    """What ``demo`` shows last: every suite at its quick sizes; rows and plots go to ``folder``. An exit code."""
    from .__main__ import main

    files = ["--json", str(folder / "bench.json"), "--csv", str(folder / "bench.csv"), "--plot", str(folder)]
    return main(["bench", "--quick", *files])


if __name__ == "__main__":  # as a child; the module proper, so that its classes exist once
    from askew_kernels.bench import _child as child_main

    sys.exit(child_main(sys.argv[1:]))
