"""Suite ``startup``: what ``import askew_kernels`` adds to a program that has imported torch."""

from __future__ import annotations

import os
import subprocess
import sys

from ..goals import Goal, Headline, first_case
from ..harness import Case, Context, Entry, Impl
from ..rows import PACKAGE


def import_case(context: Context) -> Case:
    """Each call is a new Python; the row holds what the second import alone took in it (p20 … p80 over processes)."""
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))

    def child(code: str) -> float:
        program = f"import time; a = time.perf_counter(); {code}; print((time.perf_counter() - a) * 1e3)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONPATH": path})  # fmt: skip
        return float(done.stdout.split()[-1])

    alone, beyond = f"import {TORCH}", f"import {TORCH}; a = time.perf_counter(); import {OURS}"
    impls = [
        Impl(alone, lambda: child(alone), "baseline", own_clock=True),
        Impl(BEYOND_TORCH, lambda: child(beyond), "ours", own_clock=True, backend="python"),
    ]
    return Case("a new process", "", alone, impls, 0, turns=1 if context.quick else 9)


TORCH, OURS = "torch", "askew_kernels"
BEYOND_TORCH = "import askew_kernels, beyond torch"

ENTRIES = [Entry("start-up", import_case, devices=("cpu",))]
GOALS = [Goal("import askew_kernels, ms beyond import torch", "<=", 300,
              lambda rows: first_case(rows, "start-up")[BEYOND_TORCH].p50 or 0.0)]  # fmt: skip
HEADLINES = [Headline("import askew_kernels, beyond torch", "start-up", BEYOND_TORCH)]
