"""``python -m askew_kernels analyze RUN.jsonl --plot DIR``: the report of a training run from its log."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

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
    try:
        if args.log.is_dir():
            raise ValueError(f"{args.log}: is a folder, expected the log of a run")
        if args.plot is not None:
            there = next(path for path in (args.plot, *args.plot.absolute().parents) if path.exists())
            if not there.is_dir():
                raise ValueError(f"--plot {args.plot}: expected a folder, {there} is a file")
        summary = "\n".join(_summary(read_log(args.log)))
        if args.plot is not None:  # before anything is printed
            if importlib.util.find_spec("matplotlib") is None:
                raise ValueError('--plot needs matplotlib: pip install "askew_kernels[analysis]"')
            args.plot.mkdir(parents=True, exist_ok=True)
            if not os.access(args.plot, os.W_OK):
                raise ValueError(f"--plot {args.plot}: cannot be written to")
        print(summary)
        if args.plot is not None:
            written = report(args.log, args.plot)
            print(f"wrote {len(written)} files: {args.plot / 'index.html'}")
    except (OSError, ValueError) as problem:
        print(f"analyze: {problem}", file=sys.stderr)
        return 2
    return 0
