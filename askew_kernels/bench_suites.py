"""What ``bench`` measures: ``SUITES`` (suite -> entries; adding a benchmark is one entry) and ``GOALS``.

Every implementation of a case does the same mathematics on its own copies of the same tensors. Where a comparison is
not the same mathematics (torch.optim's plain SGD beside ASkewSGD), it is the case's baseline and named as such.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import nn as ask_nn
from . import ops, optim, quant, reference, runtime
from .bench import Case, CheckFailed, Context, Entry, Impl, Row, Traffic

GRID = quant.Uniform(bits=4)
LO, HI = GRID.levels[0], GRID.levels[-1]
C1, C2 = quant.scales.SAWB_COEFFICIENTS[4]
LR, ALPHA, EPS, MOMENTUM, ADAM_LR = 0.05, 1.0, 0.3, 0.9, 1e-4
WEIGHT_STD, GRAD_STD = 0.02, 1e-3  # a step moves a weight by about a hundredth of a 4-bit level


def resnet18_shapes() -> list[tuple[int, ...]]:
    """The 62 parameters of torchvision's resnet18, in order: 11,689,512 weights."""

    def norm(c: int) -> list[tuple[int, ...]]:
        return [(c,), (c,)]

    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), *norm(64)]
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, channels, 3, 3), *norm(width), (width, width, 3, 3), *norm(width)]
            if channels != width:
                shapes += [(width, channels, 1, 1), *norm(width)]
            channels = width
    return [*shapes, (1000, 512), (1000,)]


# ---- comparison with the reference -----------------------------------------------------------------------------------


def compare(what: str, got: Tensor, expected: Tensor, size: Tensor, relative: float, rare: float = 2e-3) -> None:
    """|got - expected| <= relative * size for all but a share ``rare`` of elements (float rounding may put a weight on
    the other side of a threshold), and on average within 1 % of the mean size. Raises CheckFailed."""
    error = (got.double() - expected.double()).abs()
    size = size.double().abs()
    outside = float((~(error <= relative * size)).double().mean())  # NaN counts as outside
    if outside > rare or not float(error.mean()) <= 0.01 * float(size.mean()):
        raise CheckFailed(
            f"{what}: {outside:.2%} of the elements differ from the reference, on average by "
            f"{float(error.mean()):.3g} where {float(size.mean()):.3g} is expected"
        )


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


class StepCheck:
    """Follows two optimizer steps on sampled rows with ``reference.py`` and compares what the step moved.

    skewed: for each tensor whether it is quantized; the others take plain SGD / AdamW steps. frozen: the scale of the
    first step stays and the hull clamp acts. copies: what holds s Q(w/s) after a step.
    """

    def __init__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], skewed: Sequence[bool], rule: str = "sgd",
        eps: float = 1.0, momentum: float = 0.0, frozen: bool = False,
        copies: Callable[[], Sequence[Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.params, self.grads, self.skewed, self.rule = params, grads, skewed, rule
        self.eps, self.momentum, self.frozen, self.copies = eps, momentum, frozen, copies
        self.rows = 8 if len(params) <= 8 else 3

    def __call__(self, run: Callable[[], Any]) -> None:
        rate = torch.tensor(ADAM_LR if self.rule == "adamw" else LR, dtype=torch.float64)
        grads = [sample(g, self.rows) for g in self.grads]
        first, second = ([torch.zeros_like(g) for g in grads] for _ in range(2))
        scales: list[Tensor] = []
        for step in (1, 2):
            before = [sample(p, self.rows) for p in self.params]
            if step == 1 or not self.frozen:
                scales = [
                    sawb(b) if q else torch.ones(1, device=b.device) for b, q in zip(before, self.skewed, strict=True)
                ]
            run()
            self._compare(step, before, grads, first, second, scales, rate)

    def _compare(
        self, step: int, before: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor],
        scales: list[Tensor], rate: Tensor,
    ) -> None:  # fmt: skip
        with one_thread():
            for i, quantized in enumerate(self.skewed):
                expected = before[i].clone()
                eps = torch.tensor(self.eps if quantized else 1.0, dtype=torch.float64)
                clamp = self.frozen and quantized
                nothing = torch.empty(0, device=expected.device)
                tensors = [[scales[i]], [nothing], GRID.encoding, [], [], []]
                arguments: list[Any] = [[expected], [grads[i]]]
                if self.rule == "adamw":
                    arguments += [[first[i]], [second[i]], *tensors, torch.tensor(float(step)), rate, eps, ALPHA]
                    arguments += [0.9, 0.999, 1e-8, 0.01, False, clamp, False, False]
                    reference.skew_adamw_(*arguments)
                else:
                    arguments += [[first[i]] if self.momentum else [], *tensors, rate, eps, ALPHA, self.momentum]
                    arguments += [0.0, 0.0, False, False, clamp, False, False]
                    reference.skew_sgd_(*arguments)
                after = sample(self.params[i], self.rows)
                # 4e-6 |w|: rounding of w, and of the scale where a weight is clamped to the hull
                moved = (expected - before[i]).abs() + before[i].abs() * 2e-3
                compare(f"tensor {i}, step {step}", after - before[i], expected - before[i], moved, 2e-3)
                if self.copies is not None and quantized:
                    hard = reference.fake_quantize(after, scales[i], nothing, GRID.encoding, True, False, 0)
                    compare(f"copy {i}, step {step}", sample(self.copies()[i], self.rows), hard, hard, 1e-5)


# ---- optimizer steps -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    with runtime.use_backend(backend) if backend else contextlib.nullcontext():
        yield


def in_backend(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
    if not backend:
        return run

    def wrapped() -> Any:
        with runtime.use_backend(backend):
            return run()

    return wrapped


def our_backend(context: Context, backend: str) -> str:
    return backend or runtime.choose_backend(context.device.type)[0]


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

    def traffic(self, buffers: int, copy: bool = False) -> Traffic:
        """Gradients read, weights and ``buffers`` states updated, and perhaps the copy written."""
        return Traffic(read=self.bytes, updated=self.bytes * (1 + buffers), written=self.quantized_bytes * copy)


def torch_step(
    inputs: Inputs, name: str, rule: str, momentum: float = 0.0, kind: str = "baseline", **options: Any
) -> Impl:
    params = inputs.parameters()
    optimizer: torch.optim.Optimizer
    if rule == "adamw":
        optimizer = torch.optim.AdamW(params, lr=ADAM_LR, **options)
    else:
        optimizer = torch.optim.SGD(params, lr=LR, momentum=momentum, **options)
    check = StepCheck(params, inputs.grads_of(params), [False] * len(params), rule, momentum=momentum)
    buffers = 2 if rule == "adamw" else int(momentum > 0)
    return Impl(name, optimizer.step, kind, inputs.traffic(buffers), check)


def askew_step(
    context: Context, inputs: Inputs, backend: str, missing: str, rule: str = "sgd", momentum: float = 0.0,
    eps: float = 1.0, freeze_scale: str = "anneal", copy: bool = False,
) -> Impl:  # fmt: skip
    """One of our optimizers, SAWB per channel, 4 bits. copy: also writes s Q(w/s) for a layer with forward="hard"."""
    frozen = eps < 1 and freeze_scale == "anneal"
    phase = "hold" if eps == 1 else f"eps={eps:g}, scale {'frozen' if frozen else 'each step'}"
    name = f"{'ASkewAdamW' if rule == 'adamw' else 'ASkewSGD'} {phase}{' + hard copy' if copy else ''}"
    name += f" ({backend})" if backend else ""
    buffers = 2 if rule == "adamw" else int(momentum > 0)
    traffic = inputs.traffic(buffers, copy)
    if missing:
        return Impl(name, kind="ours", traffic=traffic, backend=backend, missing=missing)
    params = inputs.parameters()
    quantizers = []
    with forced(backend):
        if copy:
            for p, q in zip(params, inputs.skewed, strict=True):
                if q:  # what a layer with forward="hard" does in its first forward
                    quantizer = quant.WeightQuantizer(quant.QuantConfig(weight=GRID, scale="sawb", forward="hard"))
                    quantizer.tie(p)
                    quantizer.quantized(p)
                    quantizers.append((p, quantizer))
        groups: list[dict[str, Any]] = [
            {"params": [p for p, q in zip(params, inputs.skewed, strict=True) if q], "grid": GRID},
            {"params": [p for p, q in zip(params, inputs.skewed, strict=True) if not q], "fused": True},
        ]
        groups = [g for g in groups if g["params"]]
        common = dict(alpha=ALPHA, eps=eps, freeze_scale=freeze_scale)
        optimizer: torch.optim.Optimizer
        if rule == "adamw":
            optimizer = optim.ASkewAdamW(groups, lr=ADAM_LR, **common)  # type: ignore[arg-type]
        else:
            optimizer = optim.ASkewSGD(groups, lr=LR, momentum=momentum, **common)  # type: ignore[arg-type]

    def copies() -> list[Tensor]:
        fresh = {id(p): q._copies[torch.float32] for p, q in quantizers}
        return [fresh.get(id(p), p) for p in params]

    check = StepCheck(
        params, inputs.grads_of(params), inputs.skewed, rule, eps, momentum, frozen, copies if copy else None
    )
    return Impl(
        name, in_backend(backend, optimizer.step), "ours", traffic, check, backend=our_backend(context, backend)
    )


def ours(context: Context, inputs: Inputs, variants: Sequence[dict[str, Any]], **shared: Any) -> list[Impl]:
    return [
        askew_step(context, inputs, backend, missing, **{**shared, **variant})
        for backend, missing in context.backends()
        for variant in variants
    ]


HOLD: dict[str, Any] = {}
HOLD_COPY = {"copy": True}
ANNEALED = {"eps": EPS}
ANNEALED_COPY = {"eps": EPS, "copy": True}
ANNEALED_SAWB = {"eps": EPS, "freeze_scale": "never"}  # the same mathematics as the eager and compiled peers


def eager_sawb(w: Tensor) -> Tensor:
    """SAWB per row, (rows, 1), by reductions that make no temporaries of weight size."""
    cols = w.shape[1]
    mean = torch.linalg.vector_norm(w, 1, dim=1, keepdim=True) / cols
    rms = torch.linalg.vector_norm(w, 2, dim=1, keepdim=True) / cols**0.5
    amax = torch.linalg.vector_norm(w, torch.inf, dim=1, keepdim=True)
    clip = C1 * rms - C2 * mean
    return torch.where(clip > 0, clip, amax) / HI


def lean_eager_step_(w: Tensor, g: Tensor, lr: Tensor, eps: Tensor) -> None:
    """The whole step in eager PyTorch, written for few temporaries: every operation that can be in place is."""
    s = eager_sawb(w)
    d = (w / s).clamp_(LO, HI)
    d -= d.round()  # signed distance to the nearest level, in levels
    u = d.abs()
    p = (1 - u).mul_(u)  # u (1 - u)
    h = (p * p).mul_(-16).add_(eps)
    kappa = (1 - 2 * u).mul_(p).mul_(32).reciprocal_().mul_(h).mul_(s * -ALPHA)
    kappa = torch.minimum(kappa, s / (4 * lr), out=kappa)
    side = d.sign_().neg_()
    v = torch.maximum(kappa, (side * g).neg_(), out=kappa).mul_(side)
    free = (h >= 0).logical_or_(u >= 0.5)
    w.addcmul_(torch.where(free, -g, v), lr)


def functional_update(w: Tensor, g: Tensor, s: Tensor, lr: Tensor, eps: Tensor) -> Tensor:
    """The update without in-place operations: what a compiler likes best."""
    x = (w / s).clamp(LO, HI)
    d = x - x.round()
    u = d.abs()
    p = u * (1 - u)
    h = eps - 16 * p * p
    kappa = torch.minimum(-ALPHA * h * s / (32 * p * (1 - 2 * u)), s / (4 * lr))
    side = torch.where(d > 0, -1.0, 1.0)
    v = torch.where((h < 0) & (u < 0.5), side * torch.maximum(kappa, -side * g), -g)
    return w + lr * v


def functional_step(w: Tensor, g: Tensor, lr: Tensor, eps: Tensor) -> Tensor:
    return functional_update(w, g, eager_sawb(w), lr, eps)


def in_place_step_(w: Tensor, g: Tensor, lr: Tensor, eps: Tensor) -> None:
    """Two graphs on the CPU: as one, torch's CPU code generator fails with KeyError (pytorch issue 196570)."""
    s = eager_sawb(w)
    if w.device.type == "cpu":
        torch._dynamo.graph_break()
    w.copy_(functional_update(w, g, s, lr, eps))


def published_step_(w: Tensor, g: Tensor, lr: Tensor, eps: Tensor) -> None:
    """As published: the distances to all levels, sorted, give the bracket [a, b]; psi = eps/16 - (x-a)^2 (x-b)^2 in
    grid units. Only the cap on kappa and the hull are ours, so that results can be compared."""
    s = eager_sawb(w)
    levels = torch.tensor(GRID.levels, device=w.device)
    x = (w / s).clamp(LO, HI)
    order = (x.unsqueeze(-1) - levels).abs().sort(dim=-1).indices
    a, b = levels[order[..., 0]], levels[order[..., 1]]
    psi = eps / 16 - (x - a) ** 2 * (x - b) ** 2
    slope = -2 * (x - a) * (x - b) * (2 * x - a - b)  # d psi / dx
    kappa = torch.minimum(ALPHA * -psi * s / slope.abs(), s / (4 * lr))
    side = torch.sign(a - x)
    v = torch.where((psi < 0) & (slope != 0), side * torch.maximum(kappa, -side * g), -g)
    w += lr * v


def why_no_compile(context: Context) -> str:
    """Why torch.compile cannot run here; empty where it can."""
    if context.is_cuda:
        return "" if importlib.util.find_spec("triton") else "torch.compile needs triton"
    if os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++"))):
        return ""
    return "torch.compile needs a C++ compiler"


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with an empty cache, so that the first call is a true first call."""
    import torch._inductor.config as inductor

    inductor.force_disable_caches = True  # type: ignore[assignment]
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    return torch.compile(function, dynamic=False)


def written_step(
    inputs: Inputs, name: str, function: Callable[..., Tensor | None], missing: str = "", first: bool = False
) -> Impl:
    """A step that is a plain function of (w, g, lr, eps), in place or giving the new weight."""
    if missing:
        return Impl(name, missing=missing)
    weights, grads = ([t.clone() for t in tensors] for tensors in (inputs.weights, inputs.grads))
    lr, eps = (torch.tensor(v, device=weights[0].device) for v in (LR, EPS))

    @torch.no_grad()
    def run() -> None:
        for i, g in enumerate(grads):
            new = function(weights[i], g, lr, eps)
            if new is not None:
                weights[i] = new

    check = StepCheck(weights, grads, inputs.skewed, eps=EPS)
    return Impl(name, run, "peer", inputs.traffic(0), check, report_first_call=first)


IN_PLACE, FRESH = "torch.compile, in place", "torch.compile, one graph, fresh result"


def square(n: int) -> str:
    return f"{n}x{n}"


def sgd_case(context: Context) -> Case:
    n = context.side
    inputs = Inputs(context, [(n, n)])
    why_not = why_no_compile(context)
    impls = [
        torch_step(inputs, "torch SGD fused", "sgd", fused=True),
        *ours(context, inputs, [HOLD, HOLD_COPY, ANNEALED, ANNEALED_COPY, ANNEALED_SAWB]),
        written_step(inputs, "eager, lean", lean_eager_step_),
        written_step(inputs, IN_PLACE, in_place_step_ if why_not else compiled(in_place_step_), why_not, True),
    ]
    why_not = why_not or ("left out of --quick" if context.quick else "")
    impls.append(written_step(inputs, FRESH, functional_step if why_not else compiled(functional_step), why_not, True))
    return Case(square(n), "float32", "torch SGD fused", impls, n * n, weight_bytes=inputs.bytes)


def momentum_case(context: Context) -> Case:
    n = context.side
    inputs = Inputs(context, [(n, n)])
    variants = [HOLD, HOLD_COPY, ANNEALED, ANNEALED_COPY]
    impls = [
        torch_step(inputs, "torch SGD momentum fused", "sgd", MOMENTUM, fused=True),
        torch_step(inputs, "torch SGD momentum foreach", "sgd", MOMENTUM, "peer", foreach=True),
        *ours(context, inputs, variants, momentum=MOMENTUM),
    ]
    return Case(square(n), "float32", impls[0].name, impls, n * n, weight_bytes=inputs.bytes)


def adamw_case(context: Context) -> Case:
    n = context.side
    inputs = Inputs(context, [(n, n)])
    impls = [
        torch_step(inputs, "torch AdamW fused", "adamw", fused=True),
        *ours(context, inputs, [HOLD, HOLD_COPY, ANNEALED], rule="adamw"),
    ]
    return Case(square(n), "float32", impls[0].name, impls, n * n, weight_bytes=inputs.bytes)


def resnet18_case(context: Context) -> Case:
    """Convolutions and the classifier quantized, the other 41 tensors plain with fused=True."""
    times = 8 if context.is_cuda and not context.quick else 1  # 94M weights on a GPU
    inputs = Inputs(context, resnet18_shapes() * times)
    impls = [
        torch_step(inputs, "torch SGD momentum fused", "sgd", MOMENTUM, fused=True),
        torch_step(inputs, "torch SGD momentum foreach", "sgd", MOMENTUM, "peer", foreach=True),
        *ours(context, inputs, [HOLD, HOLD_COPY, ANNEALED, ANNEALED_COPY], momentum=MOMENTUM),
    ]
    shape = f"{f'{times} x ' if times > 1 else ''}ResNet-18's 62 tensors"
    return Case(shape, "float32", impls[0].name, impls, inputs.bytes // 4, weight_bytes=inputs.bytes)


def published_case(context: Context) -> Case:
    """Its own case because of its size: the sort's temporaries take hundreds of bytes a weight."""
    n = 512 if context.quick else 2048
    inputs = Inputs(context, [(n, n)])
    impls = [
        torch_step(inputs, "torch SGD fused", "sgd", fused=True),
        *ours(context, inputs, [ANNEALED_SAWB]),
        written_step(inputs, "eager, lean", lean_eager_step_),
        written_step(inputs, "published formulation (all distances, sort)", published_step_),
    ]
    return Case(square(n), "float32", "torch SGD fused", impls, n * n, weight_bytes=inputs.bytes)


# ---- fake quantization -----------------------------------------------------------------------------------------------


class FakeQuantizeCheck:
    """y and the gradient on sampled rows; ``margin``: how far outside the hull this implementation's gradient reaches
    (torch's masks by the rounded value: half a level)."""

    def __init__(self, x: Tensor, grad: Tensor, scale: Tensor, margin: float = 0.0) -> None:
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


def fake_quantize_case(context: Context, group: int | None = None) -> Case:
    """Forward and backward of one fp32 tensor, scale given; the baseline is two plain copies of it."""
    n, device = context.side, context.device
    g = torch.Generator(device).manual_seed(2)
    x = torch.randn(n, n, device=device, generator=g) * WEIGHT_STD
    grad = torch.randn(n, n, device=device, generator=g)
    scale = quant.compute_scale(x, GRID, "sawb", "per_group" if group else "per_channel", group)
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
        return torch.fake_quantize_per_channel_affine(t, scale, zeros, 0, int(LO), int(HI))

    a, b, to_a, to_b = x.clone(), grad.clone(), torch.empty_like(x), torch.empty_like(x)

    def two_copies() -> None:
        to_a.copy_(a)
        to_b.copy_(b)

    why_not = why_no_compile(context)
    name = "torch.compile"
    impls = [Impl("two copies", two_copies, "baseline", Traffic(read=2 * size, written=2 * size))]
    for backend, missing in context.backends():
        suffix = f" ({backend})" if backend else ""
        run = in_backend(backend, forward_backward(lambda t: ops.fake_quantize(t, scale, GRID)))
        kwargs: dict[str, Any] = {"backend": our_backend(context, backend), "missing": missing}
        impls.append(Impl(f"ops.fake_quantize{suffix}", run, "ours", traffic, check, **kwargs))
    impls += [
        Impl("torch.fake_quantize_per_channel_affine", forward_backward(native, rows), "peer", traffic, torch_check),
        Impl("eager straight-through", forward_backward(eager, rows), "peer", traffic, check),
    ]
    if context.quick and group:
        why_not = why_not or "left out of --quick"
    if why_not:
        impls.append(Impl(name, missing=why_not))
    else:
        run = forward_backward(compiled(eager), rows)
        impls.append(Impl(name, run, "peer", traffic, check, report_first_call=True))
    return Case(square(n), "float32", "two copies", impls, n * n)


# ---- linear layers ---------------------------------------------------------------------------------------------------


class LinearCheck:
    """Forward output (and, with ``backward``, the weight's gradient) of the first 32 outputs, in float64."""

    def __init__(self, layer: nn.Linear, x: Tensor, hard: bool, grad: Tensor | None = None) -> None:
        self.layer, self.x, self.hard, self.grad = layer, x, hard, grad

    def __call__(self, run: Callable[[], Any]) -> None:
        w = self.layer.weight.detach()[:32].clone()
        scale, inside = sawb(w), torch.ones_like(w)
        quantizer = quant.WeightQuantizer.of(self.layer.weight)
        if quantizer is not None and quantizer.scale is not None:  # a step uses the scale of the weights it found
            scale = quantizer.scale[:32]
        if self.hard:
            levels = torch.empty(0, device=w.device)
            inside = ((w / scale[:, None] >= LO) & (w / scale[:, None] <= HI)).to(w.dtype)
            w = reference.fake_quantize(w, scale, levels, GRID.encoding, True, False, 0)
        expected = torch.nn.functional.linear(
            self.x.detach().double(), w.double(), self.layer.bias.detach()[:32].double()
        )
        got = run()
        y = got[0] if isinstance(got, tuple) else got
        compare("output", y.detach()[:, :32], expected, expected, 1e-3, 0.02)
        if self.grad is not None:
            wanted = self.grad[:, :32].double().t().matmul(self.x.detach().double()) * inside
            compare("weight gradient", got[1][:32], wanted, wanted.abs() + wanted.abs().mean(), 1e-3, 0.02)


def linear_case(context: Context, what: str) -> Case:
    """what: "forward", "forward after a step" (the step itself untimed) or "forward + backward"."""
    n, tokens = context.side, 64 if context.quick else 512
    g = torch.Generator(context.device).manual_seed(3)
    x = torch.randn(tokens, n, device=context.device, generator=g)
    grad = torch.randn(tokens, n, device=context.device, generator=g) * GRAD_STD
    backward, after_step = what == "forward + backward", what == "forward after a step"

    def layer_impl(name: str, forward: str | None, backend: str = "", missing: str = "") -> Impl:
        kind = "baseline" if forward is None else "ours"
        if missing:
            return Impl(name, kind=kind, backend=backend, missing=missing)
        torch.manual_seed(4)
        layer = nn.Linear(n, n, device=context.device)
        if forward is not None:
            config = quant.QuantConfig(weight=GRID, scale="sawb", forward=forward)
            layer = ask_nn.AskewLinear.from_float(layer, config)
        leaf = x.clone().requires_grad_()
        prepare: Callable[[], Any] | None = None
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

        def run() -> Any:
            y = layer(leaf)
            if not backward:
                return y
            gradients = torch.autograd.grad(y, [layer.weight, layer.bias, leaf], grad)
            return y.detach(), *gradients

        check = LinearCheck(layer, x, forward == "hard", grad if backward else None)
        ours_backend = our_backend(context, backend) if forward is not None else "torch"
        return Impl(name, in_backend(backend, run), kind, None, check, prepare, backend=ours_backend)

    names = {"relaxed": "AskewLinear relaxed", "hard": "AskewLinear hard, fresh copy"}
    if after_step:
        names = {"hard": "AskewLinear hard, copy written by the step"}
    impls = [layer_impl("nn.Linear", None)]
    for backend, missing in context.backends():
        suffix = f" ({backend})" if backend else ""
        impls += [layer_impl(f"{text}{suffix}", forward, backend, missing) for forward, text in names.items()]
    return Case(f"{tokens} tokens x {n} x {n}", "float32", "nn.Linear", impls, 0)


# ---- the registry ----------------------------------------------------------------------------------------------------

SUITES: dict[str, list[Entry]] = {
    "step": [
        Entry("SGD step", sgd_case),
        Entry("SGD momentum step", momentum_case),
        Entry("SGD momentum step, tensor list", resnet18_case),
        Entry("AdamW step", adamw_case),
        Entry("SGD step, published formulation", published_case),
    ],
    "fake_quant": [
        Entry("fake quantize per channel, forward + backward", fake_quantize_case),
        Entry("fake quantize per group of 128, forward + backward", lambda context: fake_quantize_case(context, 128)),
    ],
    "linear": [
        Entry("linear forward", lambda context: linear_case(context, "forward")),
        Entry("linear forward after a step", lambda context: linear_case(context, "forward after a step")),
        Entry("linear forward + backward", lambda context: linear_case(context, "forward + backward")),
    ],
    "memory": [
        Entry("extra memory, SGD step", sgd_case, "memory"),
        Entry("extra memory, SGD momentum step", momentum_case, "memory"),
        Entry("extra memory, SGD momentum step, tensor list", resnet18_case, "memory"),
        Entry("extra memory, AdamW step", adamw_case, "memory"),
        Entry("extra memory, published formulation", published_case, "memory"),
    ],
}

# Which suites are run a second time with the warm allocator (CPU): those whose operations return fresh tensors.
ALSO_WARM = ("fake_quant", "linear")


# ---- goals -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """``measure(rows of that suite and device)`` gives the figure; LookupError where its rows are missing."""

    text: str
    suite: str
    sense: str  # "<=" or ">="
    wanted: float
    measure: Callable[[list[Row]], float]
    device: str = "cpu"


def found(rows: list[Row], op: str, impl: str, allocator: str = "default") -> Row:
    """The row of an implementation; LookupError where it is missing or failed."""
    for r in rows:
        if r.op == op and r.impl == impl and r.allocator == allocator and r.p50 is not None:
            return r
    raise LookupError(f"{op}: {impl}")


def ratio(op: str, impl: str, to: str = "", allocator: str = "default") -> Callable[[list[Row]], float]:
    """p50 of ``impl`` over that of ``to`` (the case's baseline where not given), same case."""

    def measure(rows: list[Row]) -> float:
        ours = found(rows, op, impl, allocator)
        return ours.p50 / found(rows, op, to or ours.baseline, allocator).p50  # type: ignore[operator]

    return measure


def worst_of(
    ops_and_impls: Callable[[Row], bool], value: Callable[[Row], float | None], best: Callable = max
) -> Callable:
    """The worst ``value`` among the rows of ours that ``ops_and_impls`` accepts."""

    def measure(rows: list[Row]) -> float:
        values = [v for r in rows if r.kind == "ours" and ops_and_impls(r) and (v := value(r)) is not None]
        if not values:
            raise LookupError("no rows of ours")
        return best(values)

    return measure


def ratio_to_best_compile(impl: str) -> Callable[[list[Row]], float]:
    """p50 of our SGD step over that of the faster of the two compiled ones."""

    def measure(rows: list[Row]) -> float:
        ratios = []
        for peer in (IN_PLACE, FRESH):
            with contextlib.suppress(LookupError):
                ratios.append(ratio(_ONE, impl, peer)(rows))
        return max(ratios)  # ValueError where there is none

    return measure


_SAME = "ASkewSGD eps=0.3, scale each step"
_CHANNEL = SUITES["fake_quant"][0].op
_GROUP = SUITES["fake_quant"][1].op
_ONE, _MOMENTUM, _LIST, _ADAMW, _PUBLISHED = (e.op for e in SUITES["step"])
_FORWARD, _AFTER, _BOTH = (e.op for e in SUITES["linear"])

GOALS: list[Goal] = [
    Goal("ASkewSGD step, SAWB included, ÷ SGD fused", "step", "<=", 1.25, ratio(_ONE, "ASkewSGD hold")),
    Goal("ASkewSGD step, eps=0.3, SAWB each step, ÷ SGD fused", "step", "<=", 1.25, ratio(_ONE, _SAME)),
    Goal("with momentum ÷ SGD momentum fused", "step", "<=", 1.25, ratio(_MOMENTUM, "ASkewSGD hold")),
    Goal("with momentum, annealed ÷ SGD momentum fused", "step", "<=", 1.25,
         ratio(_MOMENTUM, "ASkewSGD eps=0.3, scale frozen")),
    Goal("ResNet-18's 62 tensors ÷ SGD momentum fused", "step", "<=", 1.25, ratio(_LIST, "ASkewSGD hold")),
    Goal("ResNet-18's 62 tensors, annealed ÷ SGD momentum fused", "step", "<=", 1.25,
         ratio(_LIST, "ASkewSGD eps=0.3, scale frozen")),
    Goal("ASkewAdamW ÷ AdamW fused", "step", "<=", 1.25, ratio(_ADAMW, "ASkewAdamW hold")),
    Goal("times faster than the best torch.compile of the same mathematics", "step", ">=", 2.5,
         lambda rows: 1 / ratio_to_best_compile(_SAME)(rows)),
    Goal("times faster than eager", "step", ">=", 30, ratio(_ONE, "eager, lean", _SAME)),
    *[
        goal
        for op, label in ((_CHANNEL, "per channel"), (_GROUP, "per group"))
        for allocator in ("default", "warm")
        for goal in (
            Goal(f"fake_quantize {label} forward + backward ÷ two copies, {allocator} allocator", "fake_quant",
                 "<=", 1.3, ratio(op, "ops.fake_quantize", "two copies", allocator)),
            Goal(f"fake_quantize {label} ÷ torch.compile, {allocator} allocator", "fake_quant", "<=", 1.0,
                 ratio(op, "ops.fake_quantize", "torch.compile", allocator)),
        )
    ],
    Goal("AskewLinear relaxed forward ÷ nn.Linear", "linear", "<=", 1.05, ratio(_FORWARD, "AskewLinear relaxed")),
    Goal("AskewLinear hard forward, fresh copy ÷ nn.Linear", "linear", "<=", 1.05,
         ratio(_FORWARD, "AskewLinear hard, fresh copy")),
    Goal("AskewLinear hard forward after a step ÷ nn.Linear", "linear", "<=", 1.05,
         ratio(_AFTER, "AskewLinear hard, copy written by the step")),
    *[
        Goal(f"AskewLinear hard forward + backward ÷ nn.Linear, {allocator} allocator", "linear", "<=", 1.05,
             ratio(_BOTH, "AskewLinear hard, fresh copy", "nn.Linear", allocator))
        for allocator in ("default", "warm")
    ],
    # sums and scales of rows are allowed; the smallest tensor of weight size, a mask, would be 0.25
    Goal("extra memory of a step ÷ bytes of the weights, worst of all", "memory", "<=", 0.05,
         worst_of(lambda r: True, lambda r: r.ratio)),
    *[
        goal
        for backend in ("cpp", "triton")
        for goal in (
            Goal(f"every step, {backend}: least % of the device's copy bandwidth", "step", ">=", 90,
                 worst_of(lambda r, b=backend: r.backend == b and r.op != _PUBLISHED, lambda r: r.percent_of_copy, min),  # type: ignore[misc]
                 "cuda"),
            Goal(f"fake_quantize, {backend}: least % of the device's copy bandwidth", "fake_quant", ">=", 90,
                 worst_of(lambda r, b=backend: r.backend == b, lambda r: r.percent_of_copy, min), "cuda"),  # type: ignore[misc]
            Goal(f"step, {backend} ÷ torch.compile", "step", "<=", 1.0,
                 ratio_to_best_compile(f"{_SAME} ({backend})"), "cuda"),
            Goal(f"fake_quantize, {backend} ÷ torch.compile", "fake_quant", "<=", 1.0,
                 ratio(_CHANNEL, f"ops.fake_quantize ({backend})", "torch.compile"), "cuda"),
        )
    ],
]  # fmt: skip
