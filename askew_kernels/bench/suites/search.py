"""Suite ``search``: one step of a layer with four candidate widths beside the same layer's quantization-aware step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import nn as ask_nn
from ... import optim, quant
from ...search import MixedLinear
from ..goals import ALLOCATORS, Goal, Headline, ratio
from ..harness import Case, CheckFailed, Context, Entry, Impl
from . import common
from .common import GRAD_STD, GRID, LR, compare, eager_sawb

WEIGHT_BITS = (2, 3, 4, 8)
MIXED, EDMIPS, SINGLE = "MixedLinear, 4 candidates", "EdMIPS-style eager, 4 candidates", "AskewLinear, 4 bits"


class EagerMix(nn.Linear):
    """As EdMIPS writes it: every candidate rounded by eager operations on its own, then weighted and added up."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_strengths = nn.Parameter(torch.zeros(len(WEIGHT_BITS), device=layer.weight.device))

    def mixed_weight(self) -> Tensor:
        p = torch.softmax(self.weight_strengths, 0)
        total: Any = 0
        for k, (bits, scale) in enumerate(zip(WEIGHT_BITS, scales_of(self.weight), strict=True)):
            c = (self.weight / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            total = total + p[k] * ((c + (c.round() - c).detach()) * scale)
        return total

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.mixed_weight(), self.bias)


@torch.no_grad()
def scales_of(w: Tensor) -> list[Tensor]:
    """What MixedLinear takes, a column for each candidate."""
    return [eager_sawb(w, bits) for bits in WEIGHT_BITS]


def check_mix(layer: Any, run: Callable[[], Any]) -> None:
    """The mixed weight of the first 32 outputs against float64, and a gradient that reaches the strengths."""
    w = layer.weight.detach()[:32].double()
    p = torch.softmax(layer.weight_strengths.detach().double(), 0)
    expected: Any = sum(
        share * s * (w / s).clamp(-(2 ** (b - 1)), 2 ** (b - 1) - 1).round()
        for share, b, s in zip(p, WEIGHT_BITS, scales_of(w), strict=True)
    )
    compare("mixed weight", layer.mixed_weight().detach()[:32], expected, w.abs() + w.abs().mean(), 1e-4, 0.02)
    run()
    grad = layer.weight_strengths.grad
    if grad is None or not bool((grad.isfinite() & (grad != 0)).all()):
        raise CheckFailed("the strengths received no gradient")


def search_case(context: Context) -> Case:
    """Forward, backward and the optimizer's step of one layer; nothing is perturbed (a sharpness-aware search takes two
    gradients, as sharpness-aware training does)."""
    tokens, n = (64 if context.quick else 512), context.side
    g = torch.Generator(context.device).manual_seed(3)
    x = torch.randn(tokens, n, device=context.device, generator=g)
    grad = torch.randn(tokens, n, device=context.device, generator=g) * GRAD_STD
    float_layer = functools.partial(common.float_layer, n, n, context.device)

    def step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        leaf = x.clone().requires_grad_()

        def run() -> None:
            optimizer.zero_grad()
            layer(leaf).backward(grad)
            optimizer.step()

        return run

    def single() -> Impl:
        layer = ask_nn.AskewLinear.from_float(float_layer(), quant.QuantConfig(weight=GRID))
        optimizer = optim.ASkewSGD([{"params": [layer.weight], "grid": GRID}, {"params": [layer.bias]}], lr=LR)
        return Impl("", step(layer, optimizer))

    def mixed(layer: Any, name: str = "") -> Impl:
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=LR, fused=True)
        return Impl(name, step(layer, optimizer), check=functools.partial(check_mix, layer))

    def own() -> Impl:
        bits: dict[str, Any] = {"weight_bits": WEIGHT_BITS, "act_bits": (None,), "signed": True, "learned": False}
        return mixed(MixedLinear.from_float(float_layer(), **bits))

    baseline = common.ours(context, SINGLE, single)[0]
    baseline.kind = "baseline"
    impls = [baseline, *common.ours(context, MIXED, own), mixed(EagerMix(float_layer()), EDMIPS)]
    return Case(f"{tokens} tokens x {n} x {n}", "float32", baseline.name, impls, 0)


OP = "search step, linear layer"
ENTRIES = [Entry(OP, search_case, warm=True)]

GOALS = [
    *[Goal(f"search step, 4 candidates ÷ 4-bit QAT step, {allocator} allocator", "<=", 1.5,
           ratio(OP, MIXED, "", allocator)) for allocator in ALLOCATORS],
    Goal("search step: times faster than EdMIPS-style eager", ">=", 1.0, ratio(OP, EDMIPS, MIXED)),
]  # fmt: skip

HEADLINES = [Headline("search step, 4 candidate widths", OP, MIXED, ((EDMIPS, "EdMIPS-style eager"),))]
