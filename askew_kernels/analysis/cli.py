"""``python -m askew_kernels analyze RUN.jsonl --plot DIR``: the report of a training run from its log."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..command import Refused, check_folder, need
from .report import read_log, report


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
    return lines


def run(args: argparse.Namespace) -> int:
    """Prints a summary, writes the report; returns the exit code."""
    if args.log.is_dir():
        raise Refused(f"{args.log}: is a folder, expected the log of a run")
    if args.plot is not None:
        there = next(path for path in (args.plot, *args.plot.absolute().parents) if path.exists())
        if not there.is_dir():
            raise Refused(f"--plot {args.plot}: expected a folder, {there} is a file")
        need("analyze", "matplotlib", extra="analysis")
    try:
        summary = "\n".join(_summary(read_log(args.log)))
    except (OSError, ValueError) as problem:
        raise Refused(problem) from None
    if args.plot is not None:  # before anything is printed
        check_folder(args.plot, "--plot")
    print(summary)
    if args.plot is not None:
        print(f"wrote {len(report(args.log, args.plot))} files: {args.plot / 'index.html'}")
    return 0
