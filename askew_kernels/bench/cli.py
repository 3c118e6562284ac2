"""``python -m askew_kernels bench``: its arguments, progress, files and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import command
from ..command import Failed, Refused, Terminated, check_writable, error, write_atomic
from . import harness, report, runs
from .goals import ALLOCATORS, Reason, read_reasons
from .rows import Row, allocator_in_use, by_suite, merged, read_rows, read_text, rows_to_csv, rows_to_json
from .suites import SUITES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", nargs="?", choices=["tune"], metavar="tune",
        help="find this device's launch parameters (--device, --quick, --json); else: measure suites")  # fmt: skip
    add("--suite", default="all", metavar="NAME", help=f"{', '.join(SUITES)} or all (default)")
    add("--op", default="", metavar="TEXT", help="only operations whose name contains this")
    add("--part", default="1/1", metavar="I/N",
        help="only the I-th of N parts of each suite's cases; --from puts the parts together")  # fmt: skip
    add("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    add("--quick", action="store_true", help="small tensors and few repetitions: a minute or two")
    add("--allocator", default="auto", metavar="NAME",
        help="default, warm (glibc keeps freed memory; a child process), both; auto (default): default, and a second "
             "time warm where results are fresh tensors and not --quick")  # fmt: skip
    add("--plain", action="store_true", help="Markdown instead of tables and a bar: needs nothing but torch")
    add("--json", type=Path, metavar="FILE", help="write the rows and goals as JSON")
    add("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    add("--plot", type=Path, metavar="DIR", help="write the plots of each suite as PNG and SVG")
    add("--page", type=Path, metavar="FILE", help="write a Markdown page with goals and tables (plots: beside --plot)")
    add("--compare", type=Path, metavar="OLD.json", help="say which rows moved beyond their own spread since then")
    add("--from", dest="rows", type=Path, nargs="+", metavar="FILE",
        help="show the rows of earlier --json files; measure nothing")  # fmt: skip
    add("--fill", type=Path, nargs="+", default=[], metavar="FILE",
        help="make anew what stands between <!-- bench:summary --> (or bench:goals) and <!-- /bench -->")  # fmt: skip
    add("--reasons", type=Path, metavar="FILE.json",
        help="why goals are missed here, for --page and --fill: a list of {goals: [regular expressions], why: text}"
        )  # fmt: skip


def parse_part(text: str) -> tuple[int, int]:
    """ "2/5" -> (2, 5)."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise Refused(f"--part: expected I/N with 1 <= I <= N, e.g. 2/5, got {text!r}")
    return int(i), int(n)


def plan(arguments: argparse.Namespace) -> list[runs.Choice]:
    """Raises Refused where the request makes no sense."""
    if arguments.suite not in ("all", *SUITES):
        raise Refused(f"--suite: expected {', '.join(SUITES)} or all, got {arguments.suite!r}")
    if arguments.allocator not in ("auto", "both", *ALLOCATORS):
        raise Refused(f"--allocator: expected default, warm, both or auto, got {arguments.allocator!r}")
    part, here = parse_part(arguments.part), allocator_in_use()
    wanted = [(name, False) for name in (ALLOCATORS if arguments.allocator == "both" else [arguments.allocator])]
    if arguments.allocator == "auto":
        again = arguments.device == "cpu" and not arguments.quick and platform.libc_ver()[0] == "glibc"
        wanted = [(here, False), ("warm", True)][: 2 if again and here == "default" else 1]
    if here != "default" and ("default", False) in wanted:
        raise Refused("--allocator default: GLIBC_TUNABLES already asks for the warm one; unset it")
    return [
        runs.Choice(suite, arguments.quick, only_warm, arguments.op, part, allocator)
        for suite in (SUITES if arguments.suite == "all" else [arguments.suite])
        for allocator, only_warm in wanted
    ]


def run(arguments: argparse.Namespace) -> int:
    """Runs the suites; whatever ends it, the rows that were finished are printed and written."""
    if arguments.what == "tune":
        from . import tune

        return tune.run(arguments)
    if not arguments.plain:
        command.need("bench (without --plain)", "rich", extra="bench")
    if arguments.plot:
        command.need("--plot", "matplotlib", extra="bench")
    old = read_rows(arguments.compare) if arguments.compare else []
    rows = in_order(merged(map(read_rows, arguments.rows or [])))
    planned = [] if arguments.rows else plan(arguments)
    if planned:
        device = harness.check_device(arguments.device)
        if not any(choice.entries(device) for choice in planned):
            raise Refused(f"--op {arguments.op!r}, --part {arguments.part}: no case of these suites")
    for path in arguments.fill:
        read_text(path)
    reasons = read_reasons(arguments.reasons) if arguments.reasons else []
    for path in filter(None, (arguments.json, arguments.csv, arguments.page, *arguments.fill)):
        check_writable(path)
    if arguments.plot is not None:
        command.check_folder(arguments.plot, "--plot")

    stopped: list[str] = []
    code = 0
    steps = [lambda: publish(rows, old, reasons, arguments)]
    if planned:
        steps.insert(0, lambda: measure(planned, device, arguments, rows))
    for step in steps:
        try:
            step()
        except KeyboardInterrupt as end:
            terminated = isinstance(end, Terminated)
            stopped, code = ["terminated" if terminated else "interrupted"], 143 if terminated else 130
        except Exception as problem:
            text = str(problem) if isinstance(problem, Failed) else harness.first_line(problem)
            stopped += [text] * (text not in stopped)  # a full disk ends the run and then cannot take the plots either
            code = code or 1
    failed = [r for r in rows if r.failed]
    for r in failed:
        error(f"{r.suite}, {r.op}, {r.impl}: {r.note}")
    if stopped:
        error(f"{'; '.join(stopped)}; {len(rows)} finished rows kept")
    return code or (1 if failed else 0)


def write(rows: list[Row], arguments: argparse.Namespace) -> None:
    if arguments.json:
        write_atomic(arguments.json, rows_to_json(rows, report.goals(rows)))
    if arguments.csv:
        write_atomic(arguments.csv, rows_to_csv(rows))


Show = Callable[[str | None, int | None], None]


@contextlib.contextmanager
def showing(plain: bool, total: int) -> Iterator[Show]:
    """A function show(what runs now, cases done), on stderr: a live bar, or with ``plain`` a line for each case."""
    if plain:
        say = functools.partial(print, file=sys.stderr, flush=True)
        yield lambda text, done: None if done is None else say(f"{done} of {total} cases")
        return
    with command.progress(command.console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done: bar.update(task, description=text, completed=done)


def in_order(rows: list[Row]) -> list[Row]:
    """As one run measures them: by suite, allocator and operation; what no longer exists last."""
    suites = {suite: i for i, suite in enumerate(SUITES)}
    ops = {(suite, e.op): i for suite, entries in SUITES.items() for i, e in reversed([*enumerate(entries)])}
    last = math.inf
    return sorted(rows, key=lambda r: (suites.get(r.suite, last), r.allocator, ops.get((r.suite, r.op), last)))


def measure(planned: list[runs.Choice], device: Any, arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Appends to ``rows`` and rewrites the files after each case, below a progress bar that says what runs now."""
    counts = [len(choice.entries(device)) for choice in planned]
    with showing(arguments.plain, sum(counts)) as show:
        before = 0
        for choice, count in zip(planned, counts, strict=True):

            def tick(name: str, choice: runs.Choice = choice) -> None:
                show(f"{choice.suite} ({choice.allocator}): {name}"[:100].replace("[", r"\["), None)

            cases: set[tuple[str, ...]] = set()
            for row in runs.run(choice, device, tick) if count else ():
                if cases and row.case not in cases:
                    show(None, before + len(cases))
                    write(rows, arguments)
                cases.add(row.case)
                rows.append(row)
            before += count
            show(None, before)
            write(rows, arguments)


def publish(rows: list[Row], old: list[Row], reasons: list[Reason], arguments: argparse.Namespace) -> None:
    """Tables to stdout, then files and plots: where a disk is full the rows have been seen."""
    if not rows:
        return write(rows, arguments)
    if arguments.plain:
        print(report.plain_report(rows))
    else:
        screen = command.console(150)
        for suite, members in by_suite(rows).items():
            screen.print(report.suite_table(suite, members), "")
        if (table := report.goals_table(rows)) is not None:
            screen.print(table)
    if old:
        print("\n".join([f"since {arguments.compare}:", *report.comparison_report(old, rows)]))
    write(rows, arguments)
    plots = report.plots(rows) if arguments.plot else {}
    made: dict[Path, str | bytes] = {arguments.plot / name: data for name, data in plots.items()}
    if arguments.page:
        made[arguments.page] = report.page(rows, list(plots), reasons)
    for path in arguments.fill:
        try:
            made[path] = report.fill(read_text(path), rows, reasons)
        except Failed as problem:
            raise Failed(f"{path}: {problem}") from None
    for path, content in made.items():
        write_atomic(path, content)
    for path in filter(None, (arguments.json, arguments.csv, *made)):
        print(f"wrote {path}")
