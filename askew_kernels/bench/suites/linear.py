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
from ..harness import Case, CheckFailed, Context, Entry, Impl
from .common import BITS, GRAD_STD, GRID, HI, LO, LR, compare, forced, in_backend, our_backend, sawb


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

    def layer_impl(name: str, forward: str | None, backend: str = "", missing: str = "", stale: bool = False) -> Impl:
        kind = "baseline" if forward is None else "ours"
        if missing:
            return Impl(name, kind=kind, backend=backend, missing=missing)
        layer = float_layer()
        if forward is not None:
            config = quant.QuantConfig(weight=GRID, scale="sawb", forward=forward)
            layer = ask_nn.AskewLinear.from_float(layer, config)
        leaf = x.clone().requires_grad_()
        prepare: Callable[[], Any] | None = None
        if stale:
            quantizer = quant.WeightQuantizer.of(layer.weight)
            assert quantizer is not None
            prepare = quantizer.invalidate
        if after_step:
            layer.weight.grad = torch.full_like(layer.weight, 1e-6)
            if forward is None:
                prepare = torch.optim.SGD([layer.weight], lr=LR, fused=True).step
            else:
                with forced(backend):
                    layer(leaf)  # the layer now asks for a copy
                    prepare = in_backend(
                        backend, optim.ASkewSGD([{"params": [layer.weight], "grid": GRID}], lr=LR).step
                    )
        check = LinearCheck(layer, x, forward == "hard", grad if backward else None)
        ours_backend = our_backend(context, backend) if forward is not None else "torch"
        return Impl(name, in_backend(backend, call(layer, leaf)), kind, None, check, prepare, backend=ours_backend)

    def peer_impl(made: nn.Module, note: str = "", **limits: float) -> Impl:
        return Impl("", call(made, x.clone().requires_grad_()), check=NearCheck(float_layer(), x, **limits), note=note)

    names = [("AskewLinear relaxed", "relaxed", False), (HARD, "hard", False), (IN_FORWARD, "hard", True)]
    if after_step:
        names = [(AFTER_STEP, "hard", False)]
    elif sized:
        names = names[1:]
    impls = [layer_impl("nn.Linear", None)]
    for backend, missing in context.backends():
        suffix = f" ({backend})" if backend else ""
        impls += [layer_impl(f"{text}{suffix}", forward, backend, missing, stale) for text, forward, stale in names]
    if not after_step:
        impls += [
            peers.peer(TORCHAO, "torchao",
                       lambda: peer_impl(peers.torchao_linear(float_layer(), BITS))),
            peers.peer(BREVITAS, "brevitas",
                       lambda: peer_impl(peers.brevitas_layer(float_layer(), BITS))),
        ]  # fmt: skip
    if what == "forward":
        build = lambda: peer_impl(peers.bitsandbytes_linear4bit(float_layer()), "inference: 4-bit NF4 storage")  # noqa: E731
        impls.append(peers.peer("bitsandbytes Linear4bit", "bitsandbytes", build))
        if context.is_cuda:
            half = "inference: 4 bits in groups of 128, {} activations"
            impls += [
                peers.peer("torchao int4 weight-only", "torchao",
                           lambda: peer_impl(peers.torchao_int4(float_layer()), half.format("bfloat16"))),
                peers.peer("gemlite 4-bit", "gemlite",
                           lambda: peer_impl(peers.gemlite_linear(float_layer(), BITS), half.format("float16"))),
            ]  # fmt: skip
    work = (6 if backward else 2) * tokens * outputs * inputs / 1e9
    shape = f"{tokens} tokens x {inputs} x {outputs}"
    return Case(shape, "float32", "nn.Linear", impls, 0, product=(tokens, inputs, outputs), work=work,
                work_unit="GFLOP")  # fmt: skip


WHATS = ("forward", "forward after a step", "forward + backward")
SHAPES = ((1024, 1024), (4096, 4096), (11008, 4096))  # (outputs, inputs)
TOKENS = (1, 16, 512, 4096)

LINEAR = [
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
