"""Suite ``fake_quant``: quantize–dequantize of a 4-bit weight, forward and backward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops, quant, reference
from .. import peers
from ..harness import Case, CheckFailed, Context, Entry, Impl, Traffic
from .common import (
    BITS,
    GRAD_STD,
    GRID,
    HI,
    LO,
    WEIGHT_STD,
    compare,
    compiled,
    in_backend,
    our_backend,
    sample,
    square,
    why_no_compile,
)  # fmt: skip


class FakeQuantizeCheck:
    """y and the gradient on sampled rows; ``margin``: how far outside the hull this implementation's gradient reaches
    (torch's masks by the rounded value: half a level)."""

    def __init__(self, x: Tensor, grad: Tensor, scale: Tensor, margin: float = 0.0) -> None:
        if scale.numel() == 1:
            scale = scale.expand(x.shape[0])
        per_row = scale.numel() // x.shape[0]
        rows = sample(x)
        self.scale = sample(scale.reshape(x.shape[0], per_row)).reshape(-1)
        self.y = reference.fake_quantize(rows, self.scale, torch.empty(0), GRID.encoding, True, False, 0)
        ratio = (rows.reshape(self.scale.numel(), -1) / self.scale[:, None]).reshape(rows.shape)
        inside = (ratio >= LO - margin) & (ratio <= HI + margin)
        self.g, self.size = sample(grad) * inside, sample(grad)

    def __call__(self, run: Callable[[], Any]) -> None:
        y, g = run()
        shape = self.g.shape[1:]
        y, g = (sample(t.reshape(-1, *shape)) for t in (y, g))
        compare("output", y, self.y, self.y, 1e-5)
        compare("gradient", g, self.g, self.size, 1e-6)


class OwnScaleCheck:
    """For a peer that chooses its scale itself: in every sampled group of ``cols`` weights the result has at most
    2^bits values, evenly spaced, the nearest one to each weight, and gradients pass."""

    def __init__(self, x: Tensor, grad: Tensor, cols: int) -> None:
        self.x, self.grad, self.cols = sample(x), sample(grad), cols

    def __call__(self, run: Callable[[], Any]) -> None:
        y, g = (sample(t.detach().reshape(-1, self.x.shape[1])) for t in run())
        for weights, levels in zip(self.x.reshape(-1, self.cols), y.reshape(-1, self.cols), strict=True):
            values = levels.unique()
            steps = values.diff()
            if len(values) > 2**BITS or len(values) < 2**BITS // 2:
                raise CheckFailed(f"{len(values)} different values in a group, expected about {2**BITS}")
            step = steps.min()
            inside = (weights >= values[0] - step / 2) & (weights <= values[-1] + step / 2)
            error = ((weights - levels).abs() * inside).max()
            if not bool((steps / step - (steps / step).round()).abs().max() < 0.02) or not error <= 0.51 * step:
                raise CheckFailed("the values are not the nearest ones of an even grid")
        compare("gradient", g, self.grad, self.grad, 1e-6, 0.01)


def fake_quantize_case(context: Context, granularity: str) -> Case:
    """Forward and backward of one fp32 tensor, scale given; the baseline is two plain copies of it.

    granularity: "tensor", "channel" or a group's size in columns.
    """
    n, device = context.side, context.device
    group = int(granularity) if granularity.isdigit() else None
    g = torch.Generator(device).manual_seed(2)
    x = torch.randn(n, n, device=device, generator=g) * WEIGHT_STD
    grad = torch.randn(n, n, device=device, generator=g) * GRAD_STD
    scale = quant.compute_scale(x, GRID, "sawb", "per_group" if group else f"per_{granularity}", group)
    size = 4 * n * n
    traffic = Traffic(read=3 * size, written=2 * size)  # x; then the gradient and x again; y and x's gradient
    check, torch_check = FakeQuantizeCheck(x, grad, scale), FakeQuantizeCheck(x, grad, scale, 0.5)

    def forward_backward(function: Callable[[Tensor], Tensor], rows: tuple[int, int] = (n, n)) -> Callable[[], Any]:
        leaf, incoming = x.clone().reshape(rows).requires_grad_(), grad.clone().reshape(rows)

        def run() -> tuple[Tensor, Tensor]:
            y = function(leaf)
            (gradient,) = torch.autograd.grad(y, leaf, incoming)
            return y.detach(), gradient

        return run

    rows = (scale.numel(), n * n // scale.numel())
    column, zeros = scale[:, None].clone(), torch.zeros(rows[0], dtype=torch.int32, device=device)

    def eager(t: Tensor) -> Tensor:
        c = (t / column).clamp(LO, HI)  # its gradient is the hull's mask
        return (c + (c.round() - c).detach()) * column

    def native(t: Tensor) -> Tensor:
        if granularity == "tensor":
            return torch.fake_quantize_per_tensor_affine(t, scale, zeros, int(LO), int(HI))
        return torch.fake_quantize_per_channel_affine(t, scale, zeros, 0, int(LO), int(HI))

    def torchao() -> Impl:
        quantizer = peers.torchao_fake_quantizer(BITS, group, scale.reshape(n, -1))
        return Impl("", forward_backward(quantizer), traffic=traffic, check=torch_check)

    def brevitas() -> Impl:
        layer: Any = peers.brevitas_layer(nn.Linear(n, n, bias=False, device=device), BITS, granularity == "channel")
        run = forward_backward(lambda t: layer.weight_quant(t).value)
        check = OwnScaleCheck(x, grad, n)
        return Impl("", run, traffic=traffic, check=check, note="absmax computed inside")

    a, b, to_a, to_b = x.clone(), grad.clone(), torch.empty_like(x), torch.empty_like(x)

    def two_copies() -> None:
        to_a.copy_(a)
        to_b.copy_(b)

    impls = [Impl("two copies", two_copies, "baseline", Traffic(read=2 * size, written=2 * size))]
    for backend, missing in context.backends():
        suffix = f" ({backend})" if backend else ""
        run = in_backend(backend, forward_backward(lambda t: ops.fake_quantize(t, scale, GRID)))
        kwargs: dict[str, Any] = {"backend": our_backend(context, backend), "missing": missing}
        impls.append(Impl(f"ops.fake_quantize{suffix}", run, "ours", traffic, check, **kwargs))
    kind = "tensor" if granularity == "tensor" else "channel"
    impls += [
        Impl(f"torch.fake_quantize_per_{kind}_affine", forward_backward(native, rows), "peer", traffic, torch_check),
        Impl("eager straight-through", forward_backward(eager, rows), "peer", traffic, check),
    ]
    if granularity == "tensor":
        impls.append(Impl("torchao QAT", missing="left out: torchao's QAT quantizers have no per-tensor granularity"))
    else:
        impls.append(peers.peer("torchao QAT", "torchao", torchao))
    if group:
        impls.append(Impl("brevitas", missing="left out: no group of columns among its ready-made weight quantizers"))
    else:
        impls.append(peers.peer("brevitas", "brevitas", brevitas))

    def both_passes(t: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        x = t / s
        return x.clamp(LO, HI).round() * s, torch.where((x >= LO) & (x <= HI), g, 0.0)

    why_not = why_no_compile(context) or ("left out of --quick" if context.quick else "")
    if why_not:
        impls += [Impl(name, missing=why_not) for name in (COMPILED, COMPILED_BOTH)]
    else:
        run = forward_backward(compiled(eager), rows)
        impls.append(Impl(COMPILED, run, "peer", traffic, check, first_call="compilation included"))
        t, incoming, function = x.clone().reshape(rows), grad.clone().reshape(rows), compiled(both_passes)
        together = Impl(COMPILED_BOTH, lambda: function(t, incoming, column), "peer", traffic, check)
        impls.append(dataclasses.replace(together, first_call="compilation included"))
    return Case(square(n), "float32", "two copies", impls, n * n)


# The second computes output and gradient together, as no training step can: what the compiler makes of it at best.
COMPILED, COMPILED_BOTH = "torch.compile", "torch.compile, both passes in one graph"

FAKE_QUANT = [
    Entry(f"fake quantize per {text}, forward + backward", functools.partial(fake_quantize_case, granularity=g),
          warm=True)
    for text, g in (("tensor", "tensor"), ("channel", "channel"), ("group of 32", "32"), ("group of 128", "128"))
]  # fmt: skip
