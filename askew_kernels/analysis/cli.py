"""``python -m askew_kernels analyze RUN.jsonl --plot DIR``: the report of a training run from its log."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..command import Refused, check_folder, console, need, progress
from .report import read_log, write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path, help="what ASkewSGD(telemetry_log=…) wrote")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write PNGs and a self-contained index.html there")


def _summary(log: dict[str, Any]) -> list[str]:
    lines = [f"{log['run'].get('optimizer')}: {len(log['steps'])} recorded steps, {len(log['notes'])} notes"]
    if log["steps"]:
        first, last = log["steps"][0], log["steps"][-1]
        lines.append(f"steps {first['step']} to {last['step']}")
        lines.append(f"{'tensor':<32} {'weights':>10} {'ε':>9} {'infeasible':>10} {'flips':>8}")
        for row in last["tensors"]:
            lines.append(
                f"{row['name']!s:<32} {row['numel']:>10,} {row['eps']:>9.3g} {row['fraction_infeasible']:>10.2%} "
                f"{row['flips']:>8.0f}"
            )
    for note in log["notes"][-1:]:
        numbers = [f"{k} {v:.4g}" for k, v in note.items() if isinstance(v, float)]
        lines.append(f"last note, step {note['step']}: " + ", ".join(numbers))
    return lines + [f"left out: {what}" for what in log["left_out"]]


def _shown(notes: list[Any]) -> Iterator[Any]:
    """Each in turn, with a bar on stderr where rich is installed."""
    print(f"drawing the weights of {len(notes)} epochs …", file=sys.stderr, flush=True)
    if importlib.util.find_spec("rich") is None:
        yield from notes
        return
    with progress(console(stderr=True)) as bar:
        yield from bar.track(notes, description="epochs")


def run(args: argparse.Namespace) -> int:
    """Prints a summary, writes the report; returns the exit code."""
    if args.log.is_dir():
        raise Refused(f"{args.log}: is a folder, expected the log of a run")
    if args.plot is not None:
        check_folder(args.plot, "--plot")
        need("analyze", "matplotlib", extra="analysis")
    try:
        log = read_log(args.log)  # once: it may be a pipe
        summary = "\n".join(_summary(log))
    except (OSError, ValueError) as problem:
        raise Refused(problem) from None
    print(summary)
    if args.plot is not None:
        written = write_report(log, f"{args.log.name}: the run", args.plot, _shown)
        print(f"wrote {len(written)} files: {args.plot / 'index.html'}")
    return 0
