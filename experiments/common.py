"""What the experiments share beyond the demo's training loop: runs that are taken up again, and paired comparisons."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from askew_kernels.command import keeping, read_rows, write_rows
from askew_kernels.demo import run_all

Row = TypeVar("Row")


def complete(
    path: Path, kind: Callable[..., Row], job_of: Callable[[Row], Hashable], jobs: Sequence[Any],
    train: Callable[[Any], list[Row]], workers: int, words: str, order: Callable[[Row], Any],
) -> list[Row]:  # fmt: skip
    """All rows of the file after what is missing for ``jobs`` was made, sorted by ``order``; written after every job,
    kept however it ends. words: what is said first, of the number of jobs and of those to make."""
    rows = read_rows(path, kind)
    done = set(map(job_of, rows))
    missing = [job for job in jobs if job not in done]
    print(words.format(len(jobs), len(missing)), file=sys.stderr)
    with keeping(path, rows), contextlib.closing(run_all(missing, workers, train)) as finished:
        for count, made in enumerate(finished, 1):
            rows += made
            write_rows(path, rows)
            print(f"{count} of {len(missing)}", file=sys.stderr, flush=True)
    rows.sort(key=order)
    write_rows(path, rows)
    return rows


def differences(one: Mapping[Any, float], other: Mapping[Any, float]) -> list[float]:
    """one - other where both have a value (the same seed, task, budget …)."""
    return [one[key] - other[key] for key in one if key in other]


def standard_error(values: Sequence[float]) -> float:
    """NaN of fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
