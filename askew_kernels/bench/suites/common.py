"""What the suites share: the numbers of the method, model shapes, inputs, and comparison with the reference.

Every implementation of a case does the same mathematics on its own copies of the same tensors. Where a comparison is
not the same mathematics (torch.optim's plain SGD beside ASkewSGD, a peer's own quantizer), it says so in its name or
in the case's text.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import quant, runtime
from ..harness import CheckFailed, Context, Impl, Traffic

BITS = 4
GRID = quant.Uniform(bits=BITS)
LO, HI = GRID.levels[0], GRID.levels[-1]
C1, C2 = quant.scales.SAWB_COEFFICIENTS[BITS]
LR, ALPHA, EPS, MOMENTUM, ADAM_LR = 0.05, 1.0, 0.3, 0.9, 1e-4
WEIGHT_STD, GRAD_STD = 0.02, 1e-3  # a step moves a weight by about a hundredth of a 4-bit level


Shapes = list[tuple[int, ...]]


def _norm(c: int) -> Shapes:
    return [(c,), (c,)]


def _resnet(blocks: Sequence[int], convolutions: Sequence[tuple[int, int]]) -> Shapes:
    """convolutions: (size of the kernel, outputs over the stage's width) of those of a block."""
    shapes: Shapes = [(64, 3, 7, 7), *_norm(64)]
    before = 64
    for stage, count in enumerate(blocks):
        for _ in range(count):
            inputs = before
            for kernel, expansion in convolutions:
                outputs = expansion * 64 * 2**stage
                shapes += [(outputs, inputs, kernel, kernel), *_norm(outputs)]
                inputs = outputs
            if inputs != before:
                shapes += [(inputs, before, 1, 1), *_norm(inputs)]
            before = inputs
    return [*shapes, (1000, before), (1000,)]


def resnet18_shapes() -> Shapes:
    """The 62 parameters of torchvision's resnet18, in order: 11,689,512 weights."""
    return _resnet((2, 2, 2, 2), ((3, 1), (3, 1)))


def resnet50_shapes() -> Shapes:
    """The 161 parameters of torchvision's resnet50: 25,557,032 weights."""
    return _resnet((3, 4, 6, 3), ((1, 1), (3, 1), (1, 4)))


def _transformer_block(d: int) -> Shapes:
    """Layer norm, attention (one matrix for q, k, v), layer norm, a network of four times the width."""
    return [*_norm(d), (3 * d, d), (3 * d,), (d, d), (d,), *_norm(d), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]


def vit_b_shapes() -> Shapes:
    """The 152 parameters of torchvision's vit_b_16: 86,567,656 weights."""
    d = 768
    return [(1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d), *12 * _transformer_block(d), *_norm(d), (1000, d), (1000,)]


def gpt2_small_shapes() -> Shapes:
    """The 148 parameters of GPT-2 small, the output layer tied to the embedding: 124,439,808 weights."""
    d = 768
    return [(50257, d), (1024, d), *12 * _transformer_block(d), *_norm(d)]


def compare(what: str, got: Tensor, expected: Tensor, size: Tensor, relative: float, rare: float = 2e-3) -> None:
    """|got - expected| <= relative * size for all but a share ``rare`` of elements (float rounding may put a weight on
    the other side of a threshold), plus three standard deviations of that share in so small a sample, and on average
    within 1 % of the mean size. Raises CheckFailed."""
    error, size = (got.double() - expected.double()).abs(), size.double().abs()
    outside = float((~(error <= relative * size)).double().mean())  # NaN counts as outside
    off, usual = float(error.mean()), float(size.mean())
    if outside > rare + 3 * math.sqrt(rare / max(error.numel(), 1)) or not off <= 0.01 * usual:
        raise CheckFailed(f"{what}: {outside:.2%} of the elements differ from the reference, on average by {off:.3g} "
                          f"where {usual:.3g} is expected")  # fmt: skip


def sample(t: Tensor, rows: int = 8) -> Tensor:
    """The first and the last ``rows`` of dimension 0, copied: they are independent, so they can be checked alone."""
    if t.shape[0] <= 2 * rows:
        return t.detach().clone()
    return torch.cat([t.detach()[:rows], t.detach()[-rows:]])


def sawb(rows: Tensor) -> Tensor:
    """SAWB's scale of each row in float64, written down a second time: nothing of ``quant.scales`` is used."""
    a = rows.reshape(rows.shape[0], -1).double().abs()
    clip = C1 * (a * a).mean(1).sqrt() - C2 * a.mean(1)
    return (torch.where(clip > 0, clip, a.amax(1)) / HI).float()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For many small operations: on a busy machine they would spend their time waiting for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_backend(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        with runtime.use_backend(backend):
            return run()

    return wrapped if backend else run


def ours(context: Context, name: str, build: Callable[[], Impl]) -> list[Impl]:
    """``build()``'s implementation of ours under this name, made and run by each backend of the device."""
    made = []
    for backend, missing in context.backends():
        title = f"{name} ({backend})" if backend else name
        impl = Impl(title, missing=missing) if missing else in_backend(backend, build)()
        impl.name, impl.kind = title, "ours"
        impl.backend = backend or runtime.choose_backend(context.device.type)[0]
        impl.run, impl.prepare = in_backend(backend, impl.run), impl.prepare and in_backend(backend, impl.prepare)
        made.append(impl)
    return made


class Captured:
    """``run`` as a CUDA graph, captured when it is first called, after three calls of its own that compile, upload and
    allocate. What ``run`` gives is given again, with the numbers of the last replay."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run, self.result = run, None
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = self.run()
        self.graph = graph

    def __call__(self) -> Any:
        if self.graph is None:
            self.capture()
        assert self.graph is not None
        self.graph.replay()
        return self.result


class Inputs:
    """Weights and gradients of a case; every implementation gets its own copies."""

    def __init__(self, context: Context, shapes: Sequence[tuple[int, ...]]) -> None:
        g = torch.Generator(context.device).manual_seed(1)
        self.weights = [torch.randn(s, device=context.device, generator=g) * WEIGHT_STD for s in shapes]
        self.grads = [torch.randn(s, device=context.device, generator=g) * GRAD_STD for s in shapes]
        self.skewed = [len(s) > 1 for s in shapes]
        self.bytes = 4 * sum(w.numel() for w in self.weights)
        self.quantized_bytes = 4 * sum(w.numel() for w, q in zip(self.weights, self.skewed, strict=True) if q)

    def parameters(self) -> list[nn.Parameter]:
        params = [nn.Parameter(w.clone()) for w in self.weights]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g.clone()
        return params

    @staticmethod
    def grads_of(params: Sequence[nn.Parameter]) -> list[Tensor]:
        return [p.grad for p in params if p.grad is not None]

    def traffic(self, buffers: int, copy: torch.dtype | None = None) -> Traffic:
        """Gradients read, weights and ``buffers`` states updated, and perhaps a copy of this type written."""
        written = self.quantized_bytes * copy.itemsize // 4 if copy else 0
        return Traffic(read=self.bytes, updated=self.bytes * (1 + buffers), written=written)


def float_layer(inputs: int, outputs: int, device: Any, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Every call makes the same one."""
    torch.manual_seed(4)
    return nn.Linear(inputs, outputs, device=device).to(dtype)


def eager_sawb(w: Tensor, bits: int = BITS) -> Tensor:
    """SAWB per row (above 4 bits the largest weight), (rows, 1), by reductions without temporaries of weight size."""
    total, root, amax = [torch.linalg.vector_norm(w, p, dim=1, keepdim=True) for p in (1, 2, torch.inf)]
    cols, (c1, c2) = w.shape[1], quant.scales.SAWB_COEFFICIENTS[bits]
    clip = c1 * (root / cols**0.5) - c2 * (total / cols) if bits <= 4 else amax
    return torch.where(clip > 0, clip, amax) / (2 ** (bits - 1) - 1)


def why_no_compile(context: Context, quick: bool = True) -> str:
    """Why torch.compile cannot run here; empty where it can. quick: whether --quick runs it."""
    if context.is_cuda and not importlib.util.find_spec("triton"):
        return "torch.compile needs triton"
    if not context.is_cuda and not os.environ.get("CXX") and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler"
    return "left out of --quick" if context.quick and not quick else ""


def when_compiled(context: Context, name: str, build: Callable[[], Impl], quick: bool = False) -> Impl:
    """``build()``'s implementation, which torch.compile makes, under this name, or one that says why it is not here."""
    missing = why_no_compile(context, quick)
    impl = Impl(name, missing=missing) if missing else build()
    impl.name, impl.first_call = name, "compilation included"
    return impl


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with an empty cache, so that the first call is a true first call."""
    import torch._inductor.config as inductor

    inductor.force_disable_caches = True  # type: ignore[assignment]
    torch._dynamo.config.recompile_limit = 64  # type: ignore[assignment]  # many models of one class; then eager, unsaid
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    return torch.compile(function, dynamic=False)
