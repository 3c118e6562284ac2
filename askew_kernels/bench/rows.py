"""Rows: what one measurement says about itself, where it was taken, and the files and the comparison made of rows."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .. import __version__, runtime
from ..command import Refused, grouped
from .peers import versions

SCHEMA_VERSION = 3
PACKAGE = Path(__file__).resolve().parent.parent


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
    unit: str  # "ms"
    repetitions: int
    bytes: int | None  # the least that must move: every input read once, every output written once
    gb_per_s: float | None  # bytes / p50
    percent_of_copy: float | None  # gb_per_s over a copy's in the same turns (read + written bytes); may exceed 100
    rate: float | None  # what one call does / p50, in ``rate_unit``
    rate_unit: str  # "GFLOP/s", "images/s", "tokens/s" or ""
    baseline: str  # the implementation (or the thing) that ``ratio`` is taken to
    ratio: float | None  # p50 / p50 of the baseline: below 1 is faster
    limit: float | None  # the least time that the measured ceilings allow, in ``unit``
    peak_bytes: int | None  # most extra memory held at any moment of one call after the first, results included
    losses: list[float] | None  # training steps: the loss of every step that was run, in order
    device: str
    device_type: str
    instructions: str  # what our CPU kernels were chosen for, e.g. "avx512, packed avx512_vnni"; "" before schema 3
    threads: int
    backend: str
    allocator: str
    tuning: str  # the table of launch parameters, or "built-in values"
    quick: bool
    torch: str
    versions: str  # of what else took part: "triton 3.6.0, torchao 0.18.0"
    askew: str
    python: str
    commit: str
    time: str  # UTC, ISO 8601
    note: str = ""

    @property
    def case(self) -> tuple[str, ...]:
        """What rows that were timed in the same turns have in common."""
        return (self.suite, self.op, self.shape, self.dtype, self.allocator, self.device)

    @property
    def failed(self) -> bool:
        return self.note.startswith("failed")


EMPTY = {f.name: "" if f.type == "str" else None for f in fields(Row)}
ROW_FIELDS = tuple(EMPTY)


def by_case(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    return grouped(rows, lambda r: r.case)


def by_suite(rows: Iterable[Row]) -> dict[str, list[Row]]:
    return grouped(rows, lambda r: r.suite)


def merged(runs: Iterable[Iterable[Row]]) -> list[Row]:
    """The rows of several runs; a case that was measured again replaces the earlier one whole."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for rows in runs:
        cases |= by_case(rows)
    return [r for rows in cases.values() for r in rows]


def _commit() -> str:
    """Short hash of the commit that this package stands in, "+" where the tree was changed; "" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", "__init__.py")  # not so in a virtual environment inside another repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    return ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instructions(device: torch.device) -> str:
    """The CPU's instruction set in use; that of the packed integer products is chosen apart (VNNI)."""
    if device.type != "cpu":
        return ""
    packed = getattr(runtime._C, "packed_capability", lambda: "")()
    return runtime.cpu_capability() + (f", packed {packed}" if packed else "")


def allocator_in_use() -> str:
    """ "warm" where glibc was told to keep freed memory, else "default"."""
    return "warm" if "mmap_max=0" in os.environ.get("GLIBC_TUNABLES", "") else "default"


def environment(device: torch.device, quick: bool = False) -> dict[str, Any]:
    """The fields of a row that are the same for a whole run."""
    table, _ = runtime.tuning_table(device)
    return {
        "device": device_name(device), "device_type": device.type, "instructions": instructions(device),
        "threads": torch.get_num_threads(), "allocator": allocator_in_use(), "quick": quick,
        "tuning": table.name if table else "built-in values", "torch": torch.__version__, "versions": versions(),
        "askew": __version__, "python": platform.python_version(), "commit": _commit(),
    }  # fmt: skip


def rows_to_json(rows: Iterable[Row], results: Iterable[Any] = ()) -> str:
    """A document with one line for each row and each goal's result, so that two of them can be compared as text too."""
    lines, judged = (",\n  ".join(json.dumps(asdict(r)) for r in part) for part in (rows, results))
    return f'{{"schema": {SCHEMA_VERSION},\n "rows": [\n  {lines}\n ],\n "goals": [\n  {judged}\n ]}}\n'


def rows_from_json(text: str, where: str = "") -> list[Row]:
    """The inverse of ``rows_to_json``; fields of a later version are left out, those that an earlier one lacks are
    empty. Raises Refused for anything else than such a document."""
    try:
        found = json.loads(text)["rows"]
        return [Row(**{**EMPTY, **{k: v for k, v in r.items() if k in ROW_FIELDS}}) for r in found]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{where}not a file of bench rows ({type(error).__name__}: {error})") from None


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_rows(path: Path) -> list[Row]:
    return rows_from_json(read_text(path), f"{path}: ")


def rows_to_csv(rows: Iterable[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ROW_FIELDS, lineterminator="\n")
    writer.writeheader()
    for r in rows:
        losses = None if r.losses is None else " ".join(f"{v:.6g}" for v in r.losses)
        writer.writerow({**asdict(r), "losses": losses})
    return out.getvalue()


@dataclass(frozen=True)
class Move:
    """A row that both runs hold: factor = new p50 / old p50; ``beyond``: the two p20–p80 ranges do not overlap."""

    old: Row
    new: Row

    @property
    def factor(self) -> float:
        return self.new.p50 / self.old.p50  # type: ignore[operator]

    @property
    def beyond(self) -> bool:
        old, new = self.old, self.new
        return new.p20 > old.p80 or new.p80 < old.p20  # type: ignore[operator]


def _identity(r: Row) -> tuple[Any, ...]:
    return (r.suite, r.op, r.impl, r.shape, r.dtype, r.unit, r.allocator, r.device_type, r.threads, r.quick)


def compare(old: Iterable[Row], new: Iterable[Row]) -> tuple[list[Move], list[Row], list[Row]]:
    """(the rows that both hold, the largest change first; measured only before; measured only now)."""
    before = {_identity(r): r for r in old if r.p50}
    after = {_identity(r): r for r in new if r.p50}
    moves = [Move(before[key], r) for key, r in after.items() if key in before]
    moves.sort(key=lambda m: max(m.factor, 1 / m.factor), reverse=True)
    gone, added = ([r for key, r in a.items() if key not in b] for a, b in ((before, after), (after, before)))
    return moves, gone, added
