"""Benchmarks: ``python -m askew_kernels bench`` (benchmarks/README.md explains the method and reads the results).

    rows      one measurement, where it was taken, files, comparison with an earlier run
    harness   checks, clocks, ceilings, turns: a Case becomes rows
    peers     the libraries that rows are compared with
    suites    the registry: what is measured
    goals     what the rows are held against, and the headlines that the README shows
    report    tables, plots, pages
    cli       arguments, progress, exit codes

Left never imports right. rich and matplotlib are imported where a table or a plot is made.
"""

from __future__ import annotations

from pathlib import Path


def demo_table(folder: Path) -> int:
    """What ``demo`` shows last: every suite at its quick sizes; rows and plots go to ``folder``. An exit code."""
    from ..__main__ import main

    files = ["--json", str(folder / "bench.json"), "--csv", str(folder / "bench.csv"), "--plot", str(folder)]
    return main(["bench", "--quick", *files])
