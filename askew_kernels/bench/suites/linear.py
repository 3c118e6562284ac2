"""Suite ``linear``: ``AskewLinear`` beside ``nn.Linear`` and other libraries' quantized layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as ask_nn
from ... import optim, quant, reference
from .. import peers
from ..goals import ALLOCATORS, Goal, Headline, ratio
from ..harness import Case, CheckFailed, Context, Entry, Impl, peer
from . import common
from .common import BITS, GRAD_STD, GRID, HI, LO, LR, compare, sawb


class LinearCheck:
    """Forward output (and, with ``backward``, the weight's gradient) of the first 32 outputs, in float64."""

    def __init__(self, layer: nn.Linear, x: Tensor, hard: bool, grad: Tensor | None = None) -> None:
        self.layer, self.x, self.hard, self.grad = layer, x, hard, grad

    def __call__(self, run: Callable[[], Any]) -> None:
        w = self.layer.weight.detach()[:32].clone()
        inside = torch.ones_like(w)
        got = run()
        quantizer = quant.WeightQuantizer.of(self.layer.weight)
        if self.hard:
            scale = sawb(w)
            if quantizer is not None and quantizer.scale is not None:
                compare("scale", quantizer.scale[:32], scale, scale, 1e-3)  # a step uses that of the weights it found
                scale = quantizer.scale[:32]  # a last bit of difference would put a weight on another level
            levels = torch.empty(0, device=w.device)
            inside = ((w / scale[:, None] >= LO) & (w / scale[:, None] <= HI)).to(w.dtype)
            w = reference.fake_quantize(w, scale, levels, GRID.encoding, True, False, 0)
        expected = torch.nn.functional.linear(
            self.x.detach().double(), w.double(), self.layer.bias.detach()[:32].double()
        )
        y = got[0] if isinstance(got, tuple) else got
        compare("output", y.detach()[:, :32], expected, expected, 1e-3, 0.02)
        if self.grad is not None:
            wanted = self.grad[:, :32].double().t().matmul(self.x.detach().double()) * inside
            compare("weight gradient", got[1][:32], wanted, wanted.abs() + wanted.abs().mean(), 1e-3, 0.02)


class NearCheck:
    """For a peer with a quantizer of its own: the output is within ``most`` (root mean square, relative) of the float
    layer's, and not nearer than quantization to 4 bits can be."""

    def __init__(self, layer: nn.Linear, x: Tensor, most: float = 0.3, least: float = 0.01) -> None:
        with torch.no_grad():
            self.expected, self.most, self.least = layer(x), most, least

    def __call__(self, run: Callable[[], Any]) -> None:
        got = run()
        y = (got[0] if isinstance(got, tuple) else got).detach()
        error = float((y - self.expected).norm() / self.expected.norm())
        if not self.least <= error <= self.most:
            raise CheckFailed(f"output: {error:.3g} away from the float layer's, expected {self.least} to {self.most}")


TORCHAO, BREVITAS = "torchao QAT, 4-bit weights", "brevitas QuantLinear, 4-bit weights"
HARD, IN_FORWARD, AFTER_STEP = (
    "AskewLinear hard, fresh copy", "AskewLinear hard, quantized in the forward",
    "AskewLinear hard, copy written by the step",
)  # fmt: skip


def linear_case(context: Context, what: str, tokens: int = 0, outputs: int = 0, inputs: int = 0) -> Case:
    """what: "forward", "forward after a step" (the step itself untimed) or "forward + backward"."""
    sized = tokens > 0
    tokens = tokens or (64 if context.quick else 512)
    outputs, inputs = outputs or context.side, inputs or context.side
    g = torch.Generator(context.device).manual_seed(3)
    x = torch.randn(tokens, inputs, device=context.device, generator=g)
    grad = torch.randn(tokens, outputs, device=context.device, generator=g) * GRAD_STD
    backward, after_step = what == "forward + backward", what == "forward after a step"

    def float_layer() -> nn.Linear:
        torch.manual_seed(4)
        return nn.Linear(inputs, outputs, device=context.device)

    def call(layer: Any, leaf: Tensor) -> Callable[[], Any]:
        def run() -> Any:
            y = layer(leaf)
            if not backward:
                return y
            gradients = torch.autograd.grad(y, [layer.weight, layer.bias, leaf], grad)
            return y.detach(), *gradients

        return run

    def float_impl() -> Impl:
        layer = float_layer()
        prepare = None
        if after_step:
            layer.weight.grad = torch.full_like(layer.weight, 1e-6)
            prepare = torch.optim.SGD([layer.weight], lr=LR, fused=True).step
        check = LinearCheck(layer, x, False, grad if backward else None)
        return Impl("nn.Linear", call(layer, x.clone().requires_grad_()), "baseline", None, check, prepare)

    def own(forward: str, stale: bool) -> Impl:
        config = quant.QuantConfig(weight=GRID, scale="sawb", forward=forward)
        layer = ask_nn.AskewLinear.from_float(float_layer(), config)
        leaf = x.clone().requires_grad_()
        prepare: Callable[[], Any] | None = None
        if stale:
            prepare = layer.quantizer.invalidate
        if after_step:
            layer.weight.grad = torch.full_like(layer.weight, 1e-6)
            layer(leaf)  # the layer now asks for a copy
            prepare = optim.ASkewSGD([{"params": [layer.weight], "grid": GRID}], lr=LR).step
        check = LinearCheck(layer, x, forward == "hard", grad if backward else None)
        return Impl("", call(layer, leaf), "ours", None, check, prepare)

    def library(name: str, module: str, made: Callable[[], nn.Module], note: str = "") -> Impl:
        def build() -> Impl:
            return Impl("", call(made(), x.clone().requires_grad_()), check=NearCheck(float_layer(), x), note=note)

        return peer(name, module, build)

    names = {"AskewLinear relaxed": ("relaxed", False), HARD: ("hard", False), IN_FORWARD: ("hard", True)}
    if after_step:
        names = {AFTER_STEP: ("hard", False)}
    elif sized:
        del names["AskewLinear relaxed"]
    impls = [float_impl()]
    for text, how in names.items():
        impls += common.ours(context, text, functools.partial(own, *how))
    if not after_step:
        impls += [library(TORCHAO, "torchao", lambda: peers.torchao_linear(float_layer(), BITS)),
                  library(BREVITAS, "brevitas", lambda: peers.brevitas_layer(float_layer(), BITS))]  # fmt: skip
    if what == "forward":
        nf4 = lambda: peers.bitsandbytes_linear4bit(float_layer())  # noqa: E731
        impls.append(library("bitsandbytes Linear4bit", "bitsandbytes", nf4, "inference: 4-bit NF4 storage"))
    if what == "forward" and context.is_cuda:
        half = "inference: 4 bits in groups of 128, {} activations"
        impls += [library("torchao int4 weight-only", "torchao", lambda: peers.torchao_int4(float_layer()),
                          half.format("bfloat16")),
                  library("gemlite 4-bit", "gemlite", lambda: peers.gemlite_linear(float_layer(), BITS),
                          half.format("float16"))]  # fmt: skip
    work = (6 if backward else 2) * tokens * outputs * inputs / 1e9
    shape = f"{tokens} tokens x {inputs} x {outputs}"
    return Case(shape, "float32", "nn.Linear", impls, 0, product=(tokens, inputs, outputs), work=work,
                work_unit="GFLOP")  # fmt: skip


WHATS = ("forward", "forward after a step", "forward + backward")
SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096))  # (outputs, inputs)
TOKENS = (1, 16, 512, 4096)

ENTRIES = [
    *[Entry(f"linear {what}", functools.partial(linear_case, what=what), warm=True) for what in WHATS],
    *[
        Entry(f"linear {what}, by size",
              functools.partial(linear_case, what=what, tokens=tokens, outputs=outputs, inputs=inputs), quick=False)
        for what in ("forward", "forward + backward")
        for outputs, inputs in SHAPES
        for tokens in TOKENS
        if (tokens, outputs, inputs) != (512, 4096, 4096)  # stands above
    ],
]  # fmt: skip

BOTH = "linear forward + backward"

GOALS = [
    Goal("AskewLinear relaxed forward ÷ nn.Linear", "<=", 1.05, ratio("linear forward", "AskewLinear relaxed")),
    Goal("AskewLinear hard forward, fresh copy ÷ nn.Linear", "<=", 1.05, ratio("linear forward", HARD)),
    Goal("AskewLinear hard forward after a step ÷ nn.Linear", "<=", 1.05,
         ratio("linear forward after a step", AFTER_STEP)),
    *[
        Goal(f"AskewLinear hard forward + backward ÷ nn.Linear, {allocator} allocator", "<=", 1.05,
             ratio(BOTH, HARD, "nn.Linear", allocator))
        for allocator in ALLOCATORS
    ],
    *[
        Goal(f"linear forward + backward: times faster than {name.split()[0]}, {allocator} allocator", ">=", wanted,
             ratio(BOTH, name, HARD, allocator))
        for name in (TORCHAO, BREVITAS)
        for allocator, wanted in zip(ALLOCATORS, (2.0, 1.35), strict=True)
    ],
]  # fmt: skip

HEADLINES = [
    Headline("QAT linear layer, forward + backward, copy there already", BOTH, HARD,
             ((TORCHAO, "torchao"), (BREVITAS, "brevitas"))),
    Headline("QAT linear layer, forward + backward, quantized in the forward", BOTH, IN_FORWARD),
]  # fmt: skip
