"""Kernels of single steps, as shares of a copy, and layers of levels beside nn.Linear under bf16 autocast, on a GPU.

PYTHONPATH=. python benchmarks/steps_and_levels.py       # about 30 s; random data
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from gpu_smoke import captured
from torch import Tensor, nn

import askew_kernels as ak
from askew_kernels import triton_kernels
from askew_kernels.quant import QuantConfig, Uniform

N = 8192  # rows and columns of a weight


def milliseconds(run: Callable[[], Any], calls: int = 20) -> float:
    """Of one of ``calls`` calls in a row, by events, after three that compile and allocate."""
    for _ in range(3):
        run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def step(kernels: Any, dtype: torch.dtype = torch.float32, eps: float = 1.0, momentum: bool = False,
         sums: bool = False, copy: torch.dtype | None = None) -> tuple[Callable[[], None], int]:  # fmt: skip
    """One SGD step of an N x N weight as the operator makes it, and the bytes of an element that it moves."""
    w, g = (torch.randn(N, N, device="cuda").mul_(0.3).to(dtype) for _ in range(2))
    states = [torch.zeros_like(w)] if momentum else []
    copies = [torch.empty(N, N, device="cuda", dtype=copy)] if copy else []
    outputs = [copies, [torch.empty(N, 3, device="cuda")] if sums else [], []]
    arguments = [[w], [g], states, [torch.full((N,), 0.1, device="cuda")], [torch.empty(0, device="cuda")], [1, -8, 7],
                 *outputs, None, torch.tensor(1e-3), torch.tensor(eps), 1.0, [0.9 * momentum, 0.0, 0.0, 0.0], False,
                 eps < 1, False, False]  # fmt: skip
    moved = (3 + 2 * momentum) * w.element_size() + sum(c.element_size() for c in copies)
    return (lambda: kernels.skew_sgd_(*arguments)), moved


STEPS: dict[str, dict[str, Any]] = {
    "hold": {},
    "hold, sums": {"sums": True},
    "annealed": {"eps": 0.3},
    "annealed, bfloat16 copy": {"eps": 0.3, "copy": torch.bfloat16},
    "annealed, levels in fp8": {"eps": 0.3, "copy": torch.float8_e4m3fn},
    "annealed, levels in int8": {"eps": 0.3, "copy": torch.int8},
    "momentum, annealed": {"eps": 0.3, "momentum": True},
    "bfloat16 weights, hold, sums": {"dtype": torch.bfloat16, "sums": True},
    "bfloat16 weights, annealed": {"dtype": torch.bfloat16, "eps": 0.3},
}


def layer_times(tokens: int, inputs: int, outputs: int) -> dict[str, list[float]]:
    """Forward, forward with backward, and both as graphs, of a linear layer under bf16 autocast."""
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    found = {}
    for forward in ("nn.Linear", "hard", "fp8", "int8"):
        layer: nn.Module = nn.Linear(inputs, outputs, device="cuda")
        if forward != "nn.Linear":
            layer = ak.nn.AskewLinear.from_float(layer, QuantConfig(Uniform(4), forward=forward, scale="absmax"))

        def product(layer: nn.Module = layer) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return layer(x)

        def both(layer: nn.Module = layer) -> None:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            product(layer).backward(grad)

        with torch.no_grad():
            times = [milliseconds(product), milliseconds(captured(product))]
        found[forward] = [times[0], milliseconds(both), times[1], milliseconds(captured(both))]
    return found


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    source = torch.randn(N, N, device="cuda")
    target = torch.empty_like(source)
    copy = 8 / milliseconds(lambda: target.copy_(source))
    print(torch.cuda.get_device_name(), f"copy {copy * N * N / 1e9:.2f} TB/s")
    for backend, kernels in (("cpp", torch.ops.askew), ("triton", triton_kernels)):
        for name, options in STEPS.items():
            run, moved = step(kernels, **options)
            took = milliseconds(run)
            print(f"{backend:<7}{name:<30}{took:.3f} ms, {moved / took / copy:.0%} of copy", flush=True)
    print("linear layers, ms: forward, forward + backward, the same as graphs")
    for shape in ((8192, 4096, 4096), (16384, 1024, 4096), (2048, 8192, 8192)):
        for name, times in layer_times(*shape).items():
            print(f"{' x '.join(map(str, shape)):<22}{name:<10}", ", ".join(f"{t:.3f}" for t in times), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
