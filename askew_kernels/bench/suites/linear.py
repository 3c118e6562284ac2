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

Check = Callable[[Callable[[], Any]], None]


def output_of(got: Any) -> Tensor:
    return (got[0] if isinstance(got, tuple) else got).detach()


def linear_check(layer: nn.Linear, x: Tensor, hard: bool, grad: Tensor | None = None) -> Check:
    """Forward output (and, with ``grad``, the weight's gradient) of the first 32 outputs, in float64."""

    def check(run: Callable[[], Any]) -> None:
        w = layer.weight.detach()[:32].clone()
        inside = torch.ones_like(w)
        got = run()
        quantizer = quant.WeightQuantizer.of(layer.weight)
        if hard:
            scale = sawb(w)
            if quantizer is not None and quantizer.scale is not None:
                compare("scale", quantizer.scale[:32], scale, scale, 1e-3)  # a step uses that of the weights it found
                scale = quantizer.scale[:32]  # a last bit of difference would put a weight on another level
            inside = ((w / scale[:, None] >= LO) & (w / scale[:, None] <= HI)).to(w.dtype)
            levels = torch.empty(0, device=w.device)
            w = reference.fake_quantize(w, scale, levels, GRID.encoding, True, False, 0)
        expected = nn.functional.linear(x.detach().double(), w.double(), layer.bias.detach()[:32].double())
        compare("output", output_of(got)[:, :32], expected, expected, 1e-3, 0.02)
        if grad is not None:
            wanted = grad[:, :32].double().t().matmul(x.detach().double()) * inside
            compare("weight gradient", got[1][:32], wanted, wanted.abs() + wanted.abs().mean(), 1e-3, 0.02)

    return check


@torch.no_grad()
def near_check(layer: nn.Linear, x: Tensor, most: float = 0.3, least: float = 0.01) -> Check:
    """For a peer with a quantizer of its own: the output is within ``most`` (root mean square, relative) of the float
    layer's, and not nearer than quantization to 4 bits can be."""
    expected = layer(x)

    def check(run: Callable[[], Any]) -> None:
        error = float((output_of(run()) - expected).norm() / expected.norm())
        if not least <= error <= most:
            raise CheckFailed(f"output: {error:.3g} away from the float layer's, expected {least} to {most}")

    return check


TORCHAO, BREVITAS = "torchao QAT, 4-bit weights", "brevitas QuantLinear, 4-bit weights"
RELAXED, HARD = "AskewLinear relaxed", "AskewLinear hard, fresh copy"
IN_FORWARD, AFTER_STEP = "AskewLinear hard, quantized in the forward", "AskewLinear hard, copy written by the step"
LEVELS, LEVELS_BOTH = "AskewLinear int8, fresh levels", "AskewLinear int8, int8 input gradient, fresh levels"
LEVELS_AFTER_STEP = "AskewLinear int8, levels written by the step"


def linear_case(context: Context, what: str, tokens: int = 0, outputs: int = 0, inputs: int = 0) -> Case:
    """what: "forward", "forward after a step" (the step itself untimed) or "forward + backward"."""
    sized = tokens > 0
    tokens = tokens or (64 if context.quick else 512)
    outputs, inputs = outputs or context.side, inputs or context.side
    g = torch.Generator(context.device).manual_seed(3)
    x = torch.randn(tokens, inputs, device=context.device, generator=g)
    grad = torch.randn(tokens, outputs, device=context.device, generator=g) * GRAD_STD
    backward, after_step = what == "forward + backward", what == "forward after a step"

    float_layer = functools.partial(common.float_layer, inputs, outputs, context.device)

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
        check = linear_check(layer, x, False, grad if backward else None)
        return Impl("nn.Linear", call(layer, x.clone().requires_grad_()), "baseline", None, check, prepare)

    def own(forward: str, stale: bool = False, gradient: str | None = None) -> Impl:
        config = quant.QuantConfig(weight=GRID, scale="sawb", forward=forward, gradient=gradient)
        layer = ask_nn.AskewLinear.from_float(float_layer(), config)
        leaf = x.clone().requires_grad_()
        prepare: Callable[[], Any] | None = layer.quantizer.invalidate if stale else None
        if after_step:
            layer.weight.grad = torch.full_like(layer.weight, 1e-6)
            layer(leaf)  # the layer now asks for a copy
            prepare = optim.ASkewSGD([{"params": [layer.weight], "grid": GRID}], lr=LR).step
        if forward == "int8":  # whose inputs are rounded
            check = near_check(float_layer(), x)
        else:
            check = linear_check(layer, x, forward == "hard", grad if backward else None)
        return Impl("", call(layer, leaf), "ours", None, check, prepare)

    def library(name: str, module: str, made: Callable[[Any], nn.Module], note: str = "") -> Impl:
        def build() -> Impl:
            run = call(made(float_layer()), x.clone().requires_grad_())
            return Impl("", run, check=near_check(float_layer(), x), note=note)

        return peer(name, module, build)

    names: dict[str, tuple] = {RELAXED: ("relaxed",), HARD: ("hard",), IN_FORWARD: ("hard", True), LEVELS: ("int8",)}
    if after_step:
        names = {AFTER_STEP: ("hard",), LEVELS_AFTER_STEP: ("int8",)}
    elif sized:
        del names[RELAXED]
    if backward:
        names[LEVELS_BOTH] = ("int8", False, "int8")
    impls = [float_impl()]
    for text, how in names.items():
        impls += common.ours(context, text, functools.partial(own, *how))
    if not after_step:
        impls += [library(TORCHAO, "torchao", lambda layer: peers.torchao_linear(layer, BITS)),
                  library(BREVITAS, "brevitas", lambda layer: peers.brevitas_layer(layer, BITS))]  # fmt: skip
    if what == "forward":
        impls.append(library("bitsandbytes Linear4bit", "bitsandbytes", peers.bitsandbytes_linear4bit,
                             "inference: 4-bit NF4 storage"))  # fmt: skip
    if what == "forward" and context.is_cuda:
        half = "inference: 4 bits in groups of 128, {} activations".format
        impls += [library("torchao int4 weight-only", "torchao", peers.torchao_int4, half("bfloat16")),
                  library("gemlite 4-bit", "gemlite", lambda layer: peers.gemlite_linear(layer, BITS),
                          half("float16"))]  # fmt: skip
    work = (6 if backward else 2) * tokens * outputs * inputs / 1e9
    shape = f"{tokens} tokens x {inputs} x {outputs}"
    return Case(shape, "float32", "nn.Linear", impls, 0, product=(tokens, inputs, outputs), work=work,
                work_unit="GFLOP")  # fmt: skip


FP8, INT8, HARD_LOW = "AskewLinear fp8", "AskewLinear int8", "AskewLinear hard"
FORWARDS = {HARD_LOW: "hard", FP8: "fp8", INT8: "int8"}
LOW_TOKENS = 8192  # on a GPU, where a product of bytes pays


def autocast_case(context: Context, what: str) -> Case:
    """Under bfloat16 autocast, copies there already: what products of levels are for. what: "forward", "forward +
    backward"."""
    tokens = 64 if context.quick else LOW_TOKENS if context.is_cuda else 512
    side, backward = context.side, what == "forward + backward"
    g = torch.Generator(context.device).manual_seed(3)
    x = torch.randn(tokens, side, device=context.device, generator=g).bfloat16()
    grad = (torch.randn(tokens, side, device=context.device, generator=g) * GRAD_STD).bfloat16()
    float_layer = functools.partial(common.float_layer, side, side, context.device)

    def impl(layer: Any, check: Check) -> Impl:
        leaf = x.clone().requires_grad_()

        def run() -> Any:
            with torch.autocast(context.device.type, torch.bfloat16):
                y = layer(leaf)
            if not backward:
                return y
            return y.detach(), *torch.autograd.grad(y, [layer.weight, layer.bias, leaf], grad)

        return Impl("", run, "baseline", check=check)

    def own(forward: str) -> Impl:
        layer = ask_nn.AskewLinear.from_float(float_layer(), quant.QuantConfig(weight=GRID, forward=forward))
        return impl(layer, near_check(float_layer(), x.float()))

    base = impl(float_layer(), near_check(float_layer(), x.float(), 0.02, 0.0))
    base.name = "nn.Linear"
    impls = [base]
    for text, forward in FORWARDS.items():
        impls += common.ours(context, text, functools.partial(own, forward))
    work = (6 if backward else 2) * tokens * side * side / 1e9
    return Case(f"{tokens} tokens x {side} x {side}", "bfloat16", "nn.Linear", impls, 0, product=(tokens, side, side),
                work=work, work_unit="GFLOP")  # fmt: skip


WHATS = ("forward", "forward after a step", "forward + backward")
SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096))  # (outputs, inputs)
TOKENS = (1, 16, 512, 4096)

ENTRIES = [
    *[Entry(f"linear {what}", functools.partial(linear_case, what=what), warm=True) for what in WHATS],
    *[Entry(f"linear {what}, by size",
            functools.partial(linear_case, what=what, tokens=tokens, outputs=outputs, inputs=inputs), quick=False)
      for what in ("forward", "forward + backward") for outputs, inputs in SHAPES for tokens in TOKENS
      if (tokens, outputs, inputs) != (512, 4096, 4096)],  # stands above
    *[Entry(f"linear {what}, bf16 autocast", functools.partial(autocast_case, what=what))
      for what in ("forward", "forward + backward")],
]  # fmt: skip

BOTH = "linear forward + backward"

GOALS = [
    Goal("AskewLinear relaxed forward ÷ nn.Linear", "<=", 1.05, ratio("linear forward", RELAXED)),
    Goal("AskewLinear hard forward, fresh copy ÷ nn.Linear", "<=", 1.05, ratio("linear forward", HARD)),
    Goal("AskewLinear hard forward after a step ÷ nn.Linear", "<=", 1.05,
         ratio("linear forward after a step", AFTER_STEP)),
    *[Goal(f"AskewLinear hard forward + backward ÷ nn.Linear, {allocator} allocator", "<=", 1.05,
           ratio(BOTH, HARD, "nn.Linear", allocator)) for allocator in ALLOCATORS],
    Goal("AskewLinear int8 forward ÷ nn.Linear", "<=", 0.35, ratio("linear forward", LEVELS)),
    *[Goal(f"AskewLinear int8 forward + backward{text} ÷ nn.Linear", "<=", wanted, ratio(BOTH, name))
      for text, name, wanted in (("", LEVELS, 1.0), (", int8 input gradient,", LEVELS_BOTH, 0.75))],
    Goal("AskewLinear fp8 forward + backward ÷ nn.Linear, bf16 autocast", "<=", 1.0,
         ratio(f"{BOTH}, bf16 autocast", f"{FP8} (cpp)"), device="cuda"),
    *[Goal(f"linear forward + backward: times faster than {name.split()[0]}, {allocator} allocator", ">=", wanted,
           ratio(BOTH, name, HARD, allocator))
      for name in (TORCHAO, BREVITAS) for allocator, wanted in zip(ALLOCATORS, (2.0, 1.35), strict=True)],
]  # fmt: skip

HEADLINES = [
    Headline("QAT linear layer, forward + backward, copy there already", BOTH, HARD,
             ((TORCHAO, "torchao"), (BREVITAS, "brevitas"))),
    Headline("QAT linear layer, forward + backward, quantized in the forward", BOTH, IN_FORWARD),
    Headline("QAT linear layer, int8 forward, forward + backward", BOTH, LEVELS),
    Headline("QAT linear layer, int8 forward and input gradient, forward + backward", BOTH, LEVELS_BOTH),
]  # fmt: skip
