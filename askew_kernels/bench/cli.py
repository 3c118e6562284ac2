"""``python -m askew_kernels bench``: its arguments, progress, files and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..command import Terminated, check_folder
from . import harness, report
from .rows import (
    BenchError,
    Row,
    allocator_in_use,
    by_suite,
    check_writable,
    error,
    merged,
    read_rows,
    rows_to_csv,
    rows_to_json,
    write_atomic,
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", nargs="?", choices=["tune"], metavar="tune",
        help="find this device's launch parameters (--device, --quick, --json); else: measure suites")  # fmt: skip
    add("--suite", default="all", metavar="NAME",
        help="step, fake_quant, linear, packed, train, sam, search, startup or all (default)")  # fmt: skip
    add("--op", default="", metavar="TEXT", help="only operations whose name contains this")
    add("--part", default="1/1", metavar="I/N",
        help="only the I-th of N parts of each suite's cases; --from puts the parts together")  # fmt: skip
    add("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    add("--quick", action="store_true", help="small tensors and few repetitions: a minute or two")
    add("--allocator", default="auto", metavar="NAME",
        help="default, warm (glibc keeps freed memory; a child process), both; auto (default): default, and a second "
             "time warm where results are fresh tensors and not --quick")  # fmt: skip
    add("--plain", action="store_true", help="plain lines instead of tables: needs nothing but torch")
    add("--json", type=Path, metavar="FILE", help="write the rows and goals as JSON")
    add("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    add("--plot", type=Path, metavar="DIR", help="write the plots of each suite as PNG and SVG")
    add("--page", type=Path, metavar="FILE", help="write a Markdown page with goals and tables (plots: beside --plot)")
    add("--compare", type=Path, metavar="OLD.json", help="say which rows moved beyond their own spread since then")
    add("--from", dest="rows", type=Path, nargs="+", metavar="FILE",
        help="show the rows of earlier --json files; measure nothing")  # fmt: skip
    add("--fill", type=Path, nargs="+", default=[], metavar="FILE",
        help="make anew what stands between <!-- bench:summary --> (or bench:goals) and <!-- /bench -->")  # fmt: skip


def need(module: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise BenchError(f'{purpose} needs {module}, which is not installed: pip install "askew_kernels[bench]"')


def parse_part(text: str) -> tuple[int, int]:
    """ "2/5" -> (2, 5)."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise BenchError(f"--part: expected I/N with 1 <= I <= N, e.g. 2/5, got {text!r}")
    return int(i), int(n)


def plan(arguments: argparse.Namespace) -> list[tuple[harness.Choice, str]]:
    """(entries, allocator). Raises BenchError where the request makes no sense."""
    from .suites import SUITES

    suites = list(SUITES) if arguments.suite == "all" else [arguments.suite]
    for suite in suites:
        if suite not in SUITES:
            raise BenchError(f"--suite: expected {', '.join(SUITES)} or all, got {suite!r}")
    if arguments.allocator not in ("auto", "both", *harness.ALLOCATORS):
        raise BenchError(f"--allocator: expected default, warm, both or auto, got {arguments.allocator!r}")
    part = parse_part(arguments.part)
    here = allocator_in_use()
    planned = []
    for suite in suites:
        wanted = [(arguments.allocator, False)]
        if arguments.allocator == "both":
            wanted = [(name, False) for name in harness.ALLOCATORS]
        elif arguments.allocator == "auto":
            wanted = [(here, False)]
            also = any(e.warm for e in SUITES[suite]) and arguments.device == "cpu" and not arguments.quick
            if also and here == "default" and platform.libc_ver()[0] == "glibc":
                wanted.append(("warm", True))
        if here != "default" and any(name == "default" for name, _ in wanted):
            raise BenchError("--allocator default: GLIBC_TUNABLES already asks for the warm one; unset it")
        for allocator, only_warm in wanted:
            planned.append((harness.Choice(suite, arguments.quick, only_warm, arguments.op, part), allocator))
    return planned


def run(arguments: argparse.Namespace) -> int:
    """Runs the suites; whatever ends it, the rows that were finished are printed and written."""
    if arguments.what == "tune":
        from . import tune

        return tune.run(arguments)
    rows: list[Row] = []
    old: list[Row] = []
    planned: list[tuple[harness.Choice, str]] = []
    try:
        if not arguments.plain:
            need("rich", "bench (without --plain)")
        if arguments.plot:
            need("matplotlib", "--plot")
        if arguments.compare:
            old = read_rows(arguments.compare)
        if arguments.rows:
            rows = in_order(merged(read_rows(path) for path in arguments.rows))
        else:
            planned = plan(arguments)
            device = harness.check_device(arguments.device)
            if not any(choice.entries(device) for choice, _ in planned):
                raise BenchError(f"--op {arguments.op!r}, --part {arguments.part}: no case of these suites")
        for path in arguments.fill:
            _text(path)
        for path in (arguments.json, arguments.csv, arguments.page, *arguments.fill):
            if path is not None:
                check_writable(path)
        if arguments.plot is not None:
            check_folder(arguments.plot, "--plot")
    except BenchError as problem:
        error(problem)
        return 2

    stopped, code = "", 0
    try:
        if planned:
            _measure(planned, device, arguments, rows)
    except Terminated:
        stopped, code = "terminated", 143
    except KeyboardInterrupt:
        stopped, code = "interrupted", 130
    except BenchError as problem:
        stopped, code = str(problem), 1
    except Exception as problem:
        stopped, code = harness.first_line(problem), 1
    try:
        _report(rows, old, arguments)
    except BenchError as problem:
        if str(problem) != stopped:  # a full disk ends the run and then cannot take the plots either
            error(problem)
        code = code or 1
    except Terminated:
        stopped, code = "terminated", 143
    except KeyboardInterrupt:
        stopped, code = "interrupted", 130
    failed = [r for r in rows if r.failed]
    for r in failed:
        error(f"{r.suite}, {r.op}, {r.impl}: {r.note}")
    if stopped:
        error(f"{stopped}; {len(rows)} finished rows kept")
    return code or (1 if failed else 0)


def _write(rows: list[Row], arguments: argparse.Namespace) -> None:
    if arguments.json:
        write_atomic(arguments.json, rows_to_json(rows))
    if arguments.csv:
        write_atomic(arguments.csv, rows_to_csv(rows))


@contextlib.contextmanager
def _progress(plain: bool, total: int) -> Iterator[Callable[[str | None, int | None], None]]:
    """A function show(what runs now, cases done), on stderr: a live bar, or with ``plain`` a line for each case."""
    if plain:

        def show_line(text: str | None, done: int | None) -> None:
            if done is not None:
                print(f"{done} of {total} cases", file=sys.stderr, flush=True)

        yield show_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)

        def show_bar(text: str | None, done: int | None) -> None:
            progress.update(task, description=text, completed=done)

        yield show_bar


def in_order(rows: list[Row]) -> list[Row]:
    """As one run measures them: by suite, allocator and operation."""
    from .suites import SUITES

    ops = {suite: [e.op for e in entries] for suite, entries in SUITES.items()}

    def place(r: Row) -> tuple[int, str, int]:
        known = ops.get(r.suite, [])
        suite = [*ops].index(r.suite) if r.suite in ops else len(ops)
        return suite, r.allocator, known.index(r.op) if r.op in known else len(known)

    return sorted(rows, key=place)


def _measure(
    planned: list[tuple[harness.Choice, str]], device: Any, arguments: argparse.Namespace, rows: list[Row]
) -> None:
    """Appends to ``rows`` and rewrites the files after each case, below a progress bar that says what runs now."""
    entries = [choice.entries(device) for choice, _ in planned]
    with _progress(arguments.plain, sum(map(len, entries))) as show:
        before = 0
        for (choice, allocator), members in zip(planned, entries, strict=True):

            def tick(name: str, suite: str = choice.suite, allocator: str = allocator) -> None:
                show(f"{suite} ({allocator}): {name}"[:100].replace("[", r"\["), None)

            if allocator == allocator_in_use():
                run = harness.run_entries(choice.suite, members, device, choice.quick, tick)
            elif members:
                run = harness.run_entries_warm(choice, device, tick)
            else:
                continue
            cases: set[tuple[str, ...]] = set()
            for row in run:
                if cases and row.case not in cases:
                    show(None, before + len(cases))
                    _write(rows, arguments)
                cases.add(row.case)
                rows.append(row)
            before += len(members)
            show(None, before)
            _write(rows, arguments)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as problem:
        raise BenchError(f"{path}: cannot be read ({problem.strerror or problem})") from None
    except UnicodeDecodeError as problem:
        raise BenchError(f"{path}: {problem}") from None


def _report(rows: list[Row], old: list[Row], arguments: argparse.Namespace) -> None:
    """Tables to stdout, then files and plots: where a disk is full the rows have been seen."""
    if not rows:
        _write(rows, arguments)
        return
    if arguments.plain:
        print(report.plain_report(rows))
    else:
        from rich.console import Console

        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 150  # a file or a CI log
        console = Console(width=width, highlight=False)
        for suite, members in by_suite(rows).items():
            console.print(report.suite_table(suite, members))
            console.print()
        if (table := report.goals_table(rows)) is not None:
            console.print(table)
    if old:
        print("\n".join([f"since {arguments.compare}:", *report.comparison_report(old, rows)]))
    _write(rows, arguments)
    written = [path for path in (arguments.json, arguments.csv) if path]
    plots: dict[str, bytes] = {}
    if arguments.plot:
        for suite, members in by_suite(rows).items():
            plots |= report.plot_suite(suite, members)
        if figures := report.headline_figures(rows):
            plots |= {f"summary.{suffix}": data for suffix, data in report.plot_summary(figures).items()}
    for name, data in plots.items():
        write_atomic(arguments.plot / name, data)
        written.append(arguments.plot / name)
    if arguments.page:
        write_atomic(arguments.page, report.page(rows, list(plots)))
        written.append(arguments.page)
    for path in arguments.fill:
        text = _text(path)
        try:
            made = report.fill(text, rows)
        except BenchError as problem:
            raise BenchError(f"{path}: {problem}") from None
        write_atomic(path, made)
        written.append(path)
    for path in written:
        print(f"wrote {path}")
