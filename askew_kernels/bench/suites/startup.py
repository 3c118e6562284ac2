"""Suite ``startup``: what ``import askew_kernels`` adds to a program that has imported torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from ..goals import Goal, Headline, found
from ..harness import Case, Context, Entry, Impl
from ..rows import PACKAGE


def import_case(context: Context) -> Case:
    """Each call is a new Python; the row holds what the second import alone took in it (p20 … p80 over processes)."""
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))

    def child(code: str) -> Callable[[], float]:
        def run() -> float:
            program = f"import time; a = time.perf_counter(); {code}; print((time.perf_counter() - a) * 1e3)"
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                                  env={**os.environ, "PYTHONPATH": path})  # fmt: skip
            return float(done.stdout.split()[-1])

        return run

    torch_alone = child(f"import {TORCH}")
    beyond = child(f"import {TORCH}; a = time.perf_counter(); import {OURS}")
    impls = [
        Impl(f"import {TORCH}", torch_alone, "baseline", own_clock=True),
        Impl(BEYOND_TORCH, beyond, "ours", own_clock=True, backend="python"),
    ]
    return Case("a new process", "", f"import {TORCH}", impls, 0, turns=1 if context.quick else 9)


TORCH, OURS = "torch", "askew_kernels"
BEYOND_TORCH = "import askew_kernels, beyond torch"

ENTRIES = [Entry("start-up", import_case, devices=("cpu",))]
GOALS = [Goal("import askew_kernels, ms beyond import torch", "<=", 300,
              lambda rows: found(rows, "start-up", BEYOND_TORCH).p50 or 0.0)]  # fmt: skip
HEADLINES = [Headline("import askew_kernels, beyond torch", "start-up", BEYOND_TORCH)]
