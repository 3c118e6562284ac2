"""What the commands of ``python -m askew_kernels`` share: arguments checked before any work, and how a run ends."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from . import atomic

T = TypeVar("T")
K = TypeVar("K")


class Failed(Exception):
    """What the user can change: one clear line, no traceback; exit code 1."""


class Refused(Failed):
    """The request cannot be served: one line that names the argument, exit code 2, nothing done."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def error(text: object) -> None:
    print(f"askew_kernels: {text}", file=sys.stderr)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def keeping(path: Path, rows: Collection[Any]) -> Iterator[None]:
    """Where what is inside is interrupted, the file holds ``rows`` as they are then, and the interruption says so."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if rows:
            write_rows(path, rows)
        raise type(stop)(f"{len(rows)} finished rows are in {path}" if rows else "no row was finished") from None


def _option(read: Callable[[str], T], fits: Callable[[T], bool], expected: str) -> Callable[[str], T]:
    """The type of an option: ``read`` of its text, where that is a value which fits."""

    def parse(text: str) -> T:
        with contextlib.suppress(ValueError):
            if fits(value := read(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def whole(least: int) -> Callable[[str], int]:
    return _option(int, lambda value: value >= least, f"a whole number from {least} on")


positive = _option(float, lambda value: 0 < value < math.inf, "a number above 0")


def check_folder(path: Path, option: str = "--out") -> None:
    """Finds out before any work that files can be kept in the folder, which is made with the first. Raises Refused."""
    try:
        atomic.check_folder(path, folders=True)
    except OSError as problem:
        why = "it is a file" if path.is_file() else problem.strerror or problem
        raise Refused(f"{option} {path}: expected a folder that can be written to ({why})") from None


def read_rows(path: Path, kind: Callable[..., T]) -> list[T]:
    """``kind(**line)`` of every line; none where there is no file. A last line that was cut off is passed over. Raises
    Refused naming the line that is none."""
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise Refused(f"{path}: cannot be read ({problem})") from None
    rows: list[T] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(kind(**json.loads(line)))
        except (ValueError, TypeError) as problem:
            if number == len(lines) and isinstance(problem, ValueError):
                break
            raise Refused(f"{path}, line {number}: not a row of this command ({problem})") from None
    return rows


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """All rows, dataclasses, in place of the file. Raises Failed where it cannot be written."""
    write_atomic(path, "".join(json.dumps(asdict(r)) + "\n" for r in rows))


def write_atomic(path: Path, content: str | bytes) -> None:
    """``atomic.write``, the file's folder made. Raises Failed where that cannot be done."""
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise Failed(f"{path}: is a folder, expected a file's name")
        atomic.write(path, data)
    except OSError as problem:
        raise Failed(f"{path}: cannot be written ({problem.strerror or problem})") from None


def check_writable(path: Path) -> None:
    """Finds out before any work that a file could not be kept; makes nothing. Raises Refused."""
    if path.is_dir():
        raise Refused(f"{path}: is a folder, expected a file's name")
    if path.exists() and not path.is_file():
        return  # e.g. /dev/stdout
    try:
        atomic.check(path, folders=True)
    except OSError as problem:
        raise Refused(f"{path}: cannot be written ({problem.strerror or problem})") from None


def as_json(value: Any) -> str:
    """Indented; numbers that JSON does not know are null."""

    def known(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: known(part) for k, part in v.items()}
        if isinstance(v, (list, tuple)):
            return [known(part) for part in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(known(value), indent=1, allow_nan=False)


def grouped(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """In the order in which keys first appear."""
    groups: dict[K, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def markdown_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(headings)
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(r)} |" for r in rows)])


def need(command: str, *modules: str, extra: str = "") -> None:
    """Raises Refused naming the first module that is not installed, and what brings it."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            install = f'pip install "askew_kernels[{extra or command}]"'
            raise Refused(f"{command} needs {module}, which is not installed: {install}")


def console(width: int = 80, stderr: bool = False) -> Any:
    """rich's, as wide as the terminal or $COLUMNS says; ``width`` columns where the output is a file or a CI log."""
    from rich.console import Console

    return Console(width=shutil.get_terminal_size((width, 24)).columns, highlight=False, stderr=stderr)


def table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]] = (), left: int = 1) -> Any:
    """rich's, no wider than its cells; the first ``left`` columns are words, the others numbers."""
    from rich.table import Table

    made = Table(box=None, title=title, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def progress(console: Any) -> Any:
    """rich's bar of a known number of jobs."""
    from rich import progress as rich

    columns = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn(), rich.TimeRemainingColumn(),
               rich.TextColumn("{task.description}"))  # fmt: skip
    return rich.Progress(*columns, console=console, transient=True)
