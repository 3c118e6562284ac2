"""Host time of an optimizer's step over lists of small tensors, beside torch's fused one.

Microseconds of ``step()``, the least of ``--repeats`` calls. "launches left out": the compiled operators are
replaced by a counter once the lists are prepared, so that what remains is the work on the host that every device asks
for; torch's own fused step cannot be taken apart and runs over tensors of 32 weights. "whole": nothing replaced.
``--device cuda``: tensors there; the clock stops without waiting for the device.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import askew_kernels as ak
from askew_kernels.ops import autograd

GOAL = 1.2  # of torch's fused step, launches left out
SHAPE = (4, 8)
MODES = {"hold": 1.0, "annealed": 0.3}  # constraint_eps
RULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (ak.optim.ASkewSGD, torch.optim.SGD, {}),
    "SGD, momentum": (ak.optim.ASkewSGD, torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (ak.optim.ASkewAdamW, torch.optim.AdamW, {}),
}


def parameters(n: int, device: str) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(SHAPE, device=device)) for _ in range(n)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def clock(step: Callable[[], Any], repeats: int) -> float:
    """Microseconds; the first calls prepare."""
    for _ in range(8):
        step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


@contextlib.contextmanager
def launches_left_out() -> Iterator[list[str]]:
    """The operators that would have been launched, by name."""
    names: list[str] = []
    launch = autograd.below_autograd
    autograd.below_autograd = lambda name, like, *args: names.append(name)
    try:
        yield names
    finally:
        autograd.below_autograd = launch


def rows(sizes: list[int], repeats: int, device: str) -> Iterator[dict[str, Any]]:
    """One for each number of tensors, rule, mode and setting of telemetry."""
    for n in sizes:
        for rule, (ours, theirs, options) in RULES.items():
            fused = clock(theirs(parameters(n, device), lr=0.1, fused=True, **options).step, repeats)
            for mode, eps in MODES.items():
                for every in (0, 1):
                    groups = [{"params": parameters(n, device), "grid": ak.quant.Uniform(bits=4)}]
                    optimizer = ours(groups, lr=0.1, constraint_eps=eps, telemetry_every=every, **options)
                    whole = clock(optimizer.step, repeats)
                    with launches_left_out() as names:
                        alone = clock(optimizer.step, repeats)
                    steps = repeats + 8
                    yield {"tensors": n, "rule": rule, "mode": mode, "telemetry": bool(every), "fused": fused,
                           "whole": whole, "alone": alone, "launches": len(names) / steps}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, nargs="+", default=[62, 496])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| tensors | rule | mode | telemetry | launches | torch fused | launches left out | ratio | whole |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows(given.tensors, given.repeats, given.device):
        ratio = row["alone"] / row["fused"]
        print(f"| {row['tensors']} | {row['rule']} | {row['mode']} | {'on' if row['telemetry'] else 'off'} | "
              f"{row['launches']:g} | {row['fused']:.0f} | {row['alone']:.0f} | {ratio:.2f} | {row['whole']:.0f} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
