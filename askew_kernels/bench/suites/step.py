"""Suite ``step``: one optimizer step, on single tensors and on the tensors of whole models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import optim, quant, reference
from .. import peers
from ..harness import Case, Context, Entry, Impl, first_line
from .common import (
    ADAM_LR,
    ALPHA,
    BITS,
    EPS,
    GRID,
    HI,
    LO,
    LR,
    MOMENTUM,
    Inputs,
    Shapes,
    compare,
    compiled,
    eager_sawb,
    forced,
    gpt2_small_shapes,
    in_backend,
    one_thread,
    our_backend,
    resnet18_shapes,
    resnet50_shapes,
    sample,
    sawb,
    square,
    vit_b_shapes,
    why_no_compile,
)  # fmt: skip


class StepCheck:
    """Follows the first optimizer steps on sampled rows with ``reference.py`` and compares what the step moved.

    skewed: for each tensor whether it is quantized; the others take plain SGD / AdamW steps. frozen: the scale of the
    first step stays and the hull clamp acts. copies: what holds s Q(w/s) after a step.
    """

    def __init__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], skewed: Sequence[bool], rule: str = "sgd",
        eps: float = 1.0, momentum: float = 0.0, frozen: bool = False,
        copies: Callable[[], Sequence[Tensor]] | None = None, steps: int = 2,
    ) -> None:  # fmt: skip
        self.params, self.grads, self.skewed, self.rule, self.steps = params, grads, skewed, rule, steps
        self.eps, self.momentum, self.frozen, self.copies = eps, momentum, frozen, copies
        self.rows = 8 if len(params) <= 8 else 3
        self.scales: list[Tensor] = []

    def take_scales(self) -> None:
        """Those of the weights as they stand; of frozen ones, those of the first step, wherever that is made."""
        if self.frozen and self.scales:
            return
        self.scales = [
            sawb(sample(p, self.rows)) if q else torch.ones(1, device=p.device)
            for p, q in zip(self.params, self.skewed, strict=True)
        ]

    def __call__(self, run: Callable[[], Any]) -> None:
        rate = torch.tensor(ADAM_LR if self.rule == "adamw" else LR, dtype=torch.float64)
        grads = [sample(g, self.rows) for g in self.grads]
        first, second = ([torch.zeros_like(g) for g in grads] for _ in range(2))
        for step in range(1, self.steps + 1):
            before = [sample(p, self.rows) for p in self.params]
            self.take_scales()
            run()
            self._compare(step, before, grads, first, second, rate)

    def _compare(
        self, step: int, before: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor],
        rate: Tensor,
    ) -> None:  # fmt: skip
        with one_thread():
            for i, quantized in enumerate(self.skewed):
                expected = before[i].clone()
                eps = torch.tensor(self.eps if quantized else 1.0, dtype=torch.float64)
                clamp = self.frozen and quantized
                nothing = torch.empty(0, device=expected.device)
                tensors = [[self.scales[i]], [nothing], GRID.encoding, [], [], []]
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
                    hard = reference.fake_quantize(after, self.scales[i], nothing, GRID.encoding, True, False, 0)
                    compare(f"copy {i}, step {step}", sample(self.copies()[i], self.rows), hard, hard, 1e-5)


# ---- implementations -------------------------------------------------------------------------------------------------


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
    return Impl(name, optimizer.step, kind, inputs.traffic(state_buffers(rule, momentum)), check)


def state_buffers(rule: str, momentum: float) -> int:
    """Tensors of weight size that an optimizer keeps."""
    return 2 if rule == "adamw" else int(momentum > 0)


def askew_step(
    context: Context, inputs: Inputs, backend: str, missing: str, rule: str = "sgd", momentum: float = 0.0,
    eps: float = 1.0, freeze_scale: str = "anneal", copy: bool = False,
) -> Impl:  # fmt: skip
    """One of our optimizers, SAWB per channel, 4 bits. copy: also writes s Q(w/s) for a layer with forward="hard"."""
    frozen = eps < 1 and freeze_scale == "anneal"
    phase = "hold" if eps == 1 else f"eps={eps:g}, scale {'frozen' if frozen else 'each step'}"
    name = f"{'ASkewAdamW' if rule == 'adamw' else 'ASkewSGD'} {phase}{' + hard copy' if copy else ''}"
    name += f" ({backend})" if backend else ""
    traffic = inputs.traffic(state_buffers(rule, momentum), copy)
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
        common = dict(alpha=ALPHA, constraint_eps=eps, freeze_scale=freeze_scale)
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
        name, in_backend(backend, optimizer.step), "ours", traffic, check, backend=our_backend(context, backend),
        first_call="state and scales made" if eps == 1 and not copy else "",
    )  # fmt: skip


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


def written_step(
    inputs: Inputs, name: str, function: Callable[..., Tensor | None], missing: str = "", first_call: str = ""
) -> Impl:
    """A step that is a plain function of (w, g, lr, eps), rows by columns, in place or giving the new weight; tensors
    that are not quantized take plain SGD steps."""
    if missing:
        return Impl(name, missing=missing)
    weights, grads = ([t.clone() for t in tensors] for tensors in (inputs.weights, inputs.grads))
    lr, eps = (torch.tensor(v, device=weights[0].device) for v in (LR, EPS))

    @torch.no_grad()
    def run() -> None:
        for i, (g, quantized) in enumerate(zip(grads, inputs.skewed, strict=True)):
            if not quantized:
                weights[i].add_(g, alpha=-LR)
                continue
            new = function(weights[i].flatten(1), g.flatten(1), lr, eps)
            if new is not None:
                weights[i] = new.view_as(g)

    check = StepCheck(weights, grads, inputs.skewed, eps=EPS)
    return Impl(name, run, "peer", inputs.traffic(0), check, first_call=first_call)


COMPILED = "compilation included"
PUBLISHED = "published formulation (all distances, sort)"
PUBLISHED_BYTES = 500  # of temporaries for each weight of the largest tensor, about


def published(inputs: Inputs, left_out: str = "") -> Impl:
    largest = max(w.numel() for w in inputs.weights)
    if not left_out and PUBLISHED_BYTES * largest > 4e9:
        left_out = f"left out: its temporaries would take {PUBLISHED_BYTES * largest / 1e9:.0f} GB"
    return written_step(inputs, PUBLISHED, published_step_, left_out)


class Latents(Sequence[Tensor]):
    """The weights that PARQ's base optimizer moves: the parameters before the first step, then kept beside them."""

    def __init__(self, params: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.params, self.optimizer = params, optimizer

    def __len__(self) -> int:
        return len(self.params)

    def __getitem__(self, i: Any) -> Any:
        p = self.params[i]
        return self.optimizer.state[p].get("latent", p) if p in self.optimizer.state else p


def parq_step(inputs: Inputs, momentum: float) -> Impl:
    """The check follows the base optimizer's steps; the proximal map is PARQ's own."""
    params = inputs.parameters()
    pairs = list(zip(params, inputs.skewed, strict=True))
    groups: list[dict[str, Any]] = [
        {"params": [p for p, q in pairs if q], "quant_bits": BITS}, {"params": [p for p, q in pairs if not q]},
    ]  # fmt: skip
    base = torch.optim.SGD([g for g in groups if g["params"]], lr=LR, momentum=momentum, fused=True)
    optimizer = peers.parq_optimizer(base, steps=1000)
    plain = [False] * len(params)
    check = StepCheck(Latents(params, optimizer), inputs.grads_of(params), plain, momentum=momentum)
    return Impl("", optimizer.step, traffic=inputs.traffic(1), check=check, note="its own quantizer and annealing")


def bitsandbytes_step(inputs: Inputs, kind: str, rule: str, momentum: float = 0.0) -> Impl:
    """Checked for one step: later ones see states that were rounded to 8 bits."""
    params = inputs.parameters()
    options = {"lr": ADAM_LR, "weight_decay": 0.01} if rule == "adamw" else {"lr": LR, "momentum": momentum}
    optimizer = peers.bitsandbytes_optimizer(kind, params, **options)
    check = StepCheck(params, inputs.grads_of(params), [False] * len(params), rule, momentum=momentum, steps=1)
    return Impl("", optimizer.step, check=check, note="no quantized weights")


PARQ, BNB_ADAMW = "torchao PARQ QuantOptimizer", "bitsandbytes AdamW8bit"


# ---- cases -----------------------------------------------------------------------------------------------------------


IN_PLACE, FRESH = "torch.compile, in place", "torch.compile, one graph, fresh result"


def step_case(context: Context, shape: str, inputs: Inputs, impls: list[Impl]) -> Case:
    """The first implementation is the baseline."""
    weights = inputs.bytes // 4
    return Case(shape, "float32", impls[0].name, impls, weights, work=weights / 1e6, work_unit="million weights")


def compiled_step(context: Context, inputs: Inputs, name: str, left_out: str = "") -> Impl:
    """name: IN_PLACE or FRESH."""
    missing = why_no_compile(context) or left_out
    function = in_place_step_ if name == IN_PLACE else functional_step
    return written_step(inputs, name, function if missing else compiled(function), missing, COMPILED)


def sgd_case(context: Context) -> Case:
    inputs = Inputs(context, [(context.side, context.side)])
    impls = [
        torch_step(inputs, "torch SGD fused", "sgd", fused=True),
        torch_step(inputs, "torch SGD foreach", "sgd", kind="peer", foreach=True),
        *ours(context, inputs, [HOLD, HOLD_COPY, ANNEALED, ANNEALED_COPY, ANNEALED_SAWB]),
        written_step(inputs, "eager, lean", lean_eager_step_),
        compiled_step(context, inputs, IN_PLACE),
        compiled_step(context, inputs, FRESH, "left out of --quick" if context.quick else ""),
    ]
    return step_case(context, square(context.side), inputs, impls)


def sized_sgd_case(context: Context, rows: int, cols: int) -> Case:
    inputs = Inputs(context, [(rows, cols)])
    impls = [
        torch_step(inputs, "torch SGD fused", "sgd", fused=True),
        *ours(context, inputs, [HOLD, ANNEALED, ANNEALED_SAWB]),
        compiled_step(context, inputs, IN_PLACE),
    ]
    return step_case(context, f"{rows}x{cols}", inputs, impls)


def momentum_case(context: Context) -> Case:
    inputs = Inputs(context, [(context.side, context.side)])
    impls = [
        torch_step(inputs, "torch SGD momentum fused", "sgd", MOMENTUM, fused=True),
        torch_step(inputs, "torch SGD momentum foreach", "sgd", MOMENTUM, "peer", foreach=True),
        *ours(context, inputs, [HOLD, HOLD_COPY, ANNEALED, ANNEALED_COPY], momentum=MOMENTUM),
        peers.peer(PARQ, "torchao", lambda: parq_step(inputs, MOMENTUM)),
    ]
    return step_case(context, square(context.side), inputs, impls)


def adamw_case(context: Context) -> Case:
    inputs = Inputs(context, [(context.side, context.side)])
    impls = [
        torch_step(inputs, "torch AdamW fused", "adamw", fused=True),
        torch_step(inputs, "torch AdamW foreach", "adamw", kind="peer", foreach=True),
        *ours(context, inputs, [HOLD, HOLD_COPY, ANNEALED], rule="adamw"),
        peers.peer(BNB_ADAMW, "bitsandbytes", lambda: bitsandbytes_step(inputs, "AdamW8bit", "adamw")),
    ]
    return step_case(context, square(context.side), inputs, impls)


def published_case(context: Context) -> Case:
    """Its own case because of its size: the sort's temporaries take hundreds of bytes a weight."""
    n = 512 if context.quick else 2048
    inputs = Inputs(context, [(n, n)])
    impls = [
        torch_step(inputs, "torch SGD fused", "sgd", fused=True),
        *ours(context, inputs, [ANNEALED_SAWB]),
        written_step(inputs, "eager, lean", lean_eager_step_),
        published(inputs),
    ]
    return step_case(context, square(n), inputs, impls)


def replayed(impl: Impl) -> Impl:
    """The same step replayed from a CUDA graph, without launch overhead; missing where it cannot be captured. Only for
    steps without momentum: the warm-up that a capture needs moves the weights, and freezes the scale."""
    name = f"{impl.name}, CUDA graph"
    if impl.missing:
        return dataclasses.replace(impl, name=name)
    if isinstance(impl.check, StepCheck):
        impl.check.take_scales()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                impl.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            impl.run()
    except Exception as error:
        return Impl(name, kind=impl.kind, backend=impl.backend, missing=f"cannot be captured: {first_line(error)}")
    return dataclasses.replace(impl, name=name, run=graph.replay, first_call="")


def sgd_list_case(context: Context, name: str, shapes: Shapes) -> Case:
    """A model without momentum: what the published formulation's users run, beside ours. Many small tensors: on a GPU
    launches count, so that there each step is also replayed from a CUDA graph."""
    inputs = Inputs(context, shapes)
    fused = torch_step(inputs, "torch SGD fused", "sgd", fused=True)
    graphs = []
    if context.is_cuda:
        again = [torch_step(inputs, fused.name, "sgd", kind="peer", fused=True), *ours(context, inputs, [ANNEALED])]
        graphs = [replayed(impl) for impl in again]
    impls = [
        fused,
        *ours(context, inputs, [HOLD, ANNEALED, ANNEALED_SAWB]),
        *graphs,
        written_step(inputs, "eager, lean", lean_eager_step_),
        published(inputs, "left out of --quick" if context.quick else ""),
    ]
    return step_case(context, f"{name}'s {len(shapes)} tensors", inputs, impls)


def momentum_list_case(context: Context, name: str, shapes: Shapes, times: int = 1, parq: bool = False) -> Case:
    """Matrices and convolutions quantized, the other tensors plain with fused=True."""
    times = times if context.is_cuda and not context.quick else 1
    inputs = Inputs(context, shapes * times)
    impls = [
        torch_step(inputs, "torch SGD momentum fused", "sgd", MOMENTUM, fused=True),
        torch_step(inputs, "torch SGD momentum foreach", "sgd", MOMENTUM, "peer", foreach=True),
        *ours(context, inputs, [HOLD, HOLD_COPY, ANNEALED, ANNEALED_COPY], momentum=MOMENTUM),
    ]
    if parq:
        impls.append(peers.peer(PARQ, "torchao", lambda: parq_step(inputs, MOMENTUM)))
    return step_case(context, f"{f'{times} x ' if times > 1 else ''}{name}'s {len(shapes)} tensors", inputs, impls)


def adamw_list_case(context: Context, name: str, shapes: Shapes) -> Case:
    inputs = Inputs(context, shapes)
    impls = [
        torch_step(inputs, "torch AdamW fused", "adamw", fused=True),
        *ours(context, inputs, [HOLD, ANNEALED, ANNEALED_COPY], rule="adamw"),
    ]
    return step_case(context, f"{name}'s {len(shapes)} tensors", inputs, impls)


def resnet18_case(context: Context) -> Case:
    return momentum_list_case(context, "ResNet-18", resnet18_shapes(), times=8, parq=True)  # 94M weights on a GPU


SIZES = ((1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (8192, 16384))  # 1M … 128M weights

STEP = [
    Entry("SGD step", sgd_case, warm=True),
    Entry("SGD momentum step", momentum_case, warm=True),
    Entry("SGD momentum step, tensor list", resnet18_case, warm=True),
    Entry("AdamW step", adamw_case, warm=True),
    Entry("SGD step, published formulation", published_case),
    Entry("SGD step, tensor list", lambda context: sgd_list_case(context, "ResNet-18", resnet18_shapes())),
    Entry("SGD momentum step, tensor list",
          lambda context: momentum_list_case(context, "ResNet-50", resnet50_shapes()), quick=False),
    Entry("AdamW step, tensor list", lambda context: adamw_list_case(context, "ViT-B", vit_b_shapes()), quick=False),
    Entry("AdamW step, tensor list", lambda context: adamw_list_case(context, "GPT-2 small", gpt2_small_shapes()),
          quick=False),
    *[
        Entry("SGD step by size", functools.partial(sized_sgd_case, rows=rows, cols=cols), quick=False)
        for rows, cols in SIZES
    ],
]  # fmt: skip
