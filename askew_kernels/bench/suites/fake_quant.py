"""Suite ``fake_quant``: quantize–dequantize of a 4-bit weight, forward and backward."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops, quant, reference
from .. import peers
from ..goals import ALLOCATORS, Goal, Headline, extreme, ratio, ratio_to_best
from ..harness import Case, CheckFailed, Context, Entry, Impl, Traffic, peer
from . import common
from .common import BITS, GRAD_STD, GRID, HI, LO, WEIGHT_STD, compare, compiled, sample


class FakeQuantizeCheck:
    """y and the gradient on sampled rows; ``margin``: how far outside the hull this implementation's gradient reaches
    (torch's masks by the rounded value: half a level)."""

    def __init__(self, x: Tensor, grad: Tensor, scale: Tensor, margin: float = 0.0) -> None:
        scale = scale.expand(x.shape[0]) if scale.numel() == 1 else scale
        rows, scale = sample(x), sample(scale.reshape(x.shape[0], -1)).reshape(-1)
        self.y = reference.fake_quantize(rows, scale, torch.empty(0), GRID.encoding, True, False, 0)
        ratio = (rows.reshape(scale.numel(), -1) / scale[:, None]).reshape(rows.shape)
        inside = (ratio >= LO - margin) & (ratio <= HI + margin)
        self.g, self.size = sample(grad) * inside, sample(grad)

    def __call__(self, run: Callable[[], Any]) -> None:
        y, g = (sample(t.reshape(-1, *self.g.shape[1:])) for t in run())
        compare("output", y, self.y, self.y, 1e-5)
        compare("gradient", g, self.g, self.size, 1e-6)


def check_own_scale(x: Tensor, grad: Tensor, run: Callable[[], Any]) -> None:
    """For a peer that chooses its scale itself: in every sampled row the result has at most 2^bits values, evenly
    spaced, the nearest one to each weight, and gradients pass."""
    y, g = (sample(t.detach().reshape(x.shape)) for t in run())
    for weights, levels in zip(sample(x), y, strict=True):
        values = levels.unique()
        if len(values) > 2**BITS or len(values) < 2**BITS // 2:
            raise CheckFailed(f"{len(values)} different values in a group, expected about {2**BITS}")
        steps, step = values.diff(), values.diff().min()
        inside = (weights >= values[0] - step / 2) & (weights <= values[-1] + step / 2)
        error = ((weights - levels).abs() * inside).max()
        if not bool((steps / step - (steps / step).round()).abs().max() < 0.02) or not error <= 0.51 * step:
            raise CheckFailed("the values are not the nearest ones of an even grid")
    compare("gradient", g, sample(grad), sample(grad), 1e-6, 0.01)


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
    copied = Traffic(read=2 * size, written=2 * size)
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
        check = functools.partial(check_own_scale, x, grad)
        return Impl("", run, traffic=traffic, check=check, note="absmax computed inside")

    a, b, to_a, to_b = x.clone(), grad.clone(), torch.empty_like(x), torch.empty_like(x)

    def own() -> Impl:
        return Impl("", forward_backward(lambda t: ops.fake_quantize(t, scale, GRID)), "ours", traffic, check)

    def both_passes(t: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        x = t / s
        return x.clamp(LO, HI).round() * s, torch.where((x >= LO) & (x <= HI), g, 0.0)

    def compiled_eager() -> Impl:
        return Impl("", forward_backward(compiled(eager), rows), "peer", traffic, check)

    def one_graph() -> Impl:
        t, incoming, together = x.clone().reshape(rows), grad.clone().reshape(rows), compiled(both_passes)
        return Impl("", lambda: together(t, incoming, column), "peer", copied, check)  # reads x once

    per_tensor = granularity == "tensor"
    no_torchao = "left out: torchao's QAT quantizers have no per-tensor granularity" if per_tensor else ""
    no_brevitas = "left out: no group of columns among its ready-made weight quantizers" if group else ""
    kind = "tensor" if per_tensor else "channel"
    impls = [
        Impl("two copies", lambda: (to_a.copy_(a), to_b.copy_(b)), "baseline", copied),
        *common.ours(context, "ops.fake_quantize", own),
        Impl(f"torch.fake_quantize_per_{kind}_affine", forward_backward(native, rows), "peer", traffic, torch_check),
        Impl("eager straight-through", forward_backward(eager, rows), "peer", traffic, check),
        peer("torchao QAT", "torchao", torchao, no_torchao),
        peer("brevitas", "brevitas", brevitas, no_brevitas),
        common.when_compiled(context, COMPILED[0], compiled_eager),
        common.when_compiled(context, COMPILED[1], one_graph),
    ]
    return Case(f"{n}x{n}", "float32", "two copies", impls, n * n)


# The second computes output and gradient together, as no training step can: what the compiler makes of it at best.
COMPILED = ("torch.compile", "torch.compile, both passes in one graph")
GRANULARITIES = {"tensor": "tensor", "channel": "channel", "group of 32": "32", "group of 128": "128"}


def op(text: str) -> str:
    return f"fake quantize per {text}, forward + backward"


ENTRIES = [
    Entry(op(text), functools.partial(fake_quantize_case, granularity=g), warm=True)
    for text, g in GRANULARITIES.items()
]

GOALS = []
for text, allocator in itertools.product(GRANULARITIES, ALLOCATORS):
    GOALS += [
        Goal(f"fake_quantize per {text} forward + backward ÷ two copies, {allocator} allocator", "<=", 1.3,
             ratio(op(text), "ops.fake_quantize", "two copies", allocator)),
        Goal(f"fake_quantize per {text} ÷ torch.compile, {allocator} allocator", "<=", 1.0,
             ratio_to_best(op(text), "ops.fake_quantize", COMPILED, allocator)),
    ]  # fmt: skip
for backend in ("cpp", "triton"):
    GOALS += [
        Goal(f"fake_quantize, {backend}: least % of the device's copy bandwidth", ">=", 90,
             extreme(lambda r, b=backend: r.backend == b, lambda r: r.percent_of_copy, min), "cuda"),  # type: ignore[misc]
        Goal(f"fake_quantize, {backend} ÷ torch.compile", "<=", 1.0,
             ratio_to_best(op("channel"), f"ops.fake_quantize ({backend})", COMPILED), "cuda"),
    ]  # fmt: skip

HEADLINES = [
    Headline(f"fake-quantize per {text}, forward + backward", op(text), "ops.fake_quantize", (
        (f"torch.fake_quantize_per_{'tensor' if text == 'tensor' else 'channel'}_affine", "torch"),
        (COMPILED[0], "torch.compile"), (COMPILED[1], "torch.compile, one graph"), ("torchao QAT", "torchao"),
        ("brevitas", "brevitas"),
    ))
    for text in GRANULARITIES
]  # fmt: skip
