"""Suite ``step``: one optimizer step, on single tensors and on the tensors of whole models."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops, optim, quant, runtime
from .. import peers
from ..goals import Goal, Headline, extreme, ratio, ratio_to_best
from ..harness import Case, Context, Entry, Impl, first_line, peer
from ..rows import Row
from . import common
from .common import ADAM_LR, ALPHA, BITS, EPS, GRID, HI, LO, LR, MOMENTUM, Inputs, compare, compiled, eager_sawb, sample

MOST_CHECKED = 64  # tensors of a list


class StepCheck:
    """Follows the first optimizer steps on sampled rows with ``reference.py`` and compares what the step moved.

    skewed: for each tensor whether it is quantized; the others take plain SGD / AdamW steps. frozen: the scale of the
    first step stays and the hull clamp acts. copies: what holds s Q(w/s) after a step. weight_of: what a parameter's
    step moves.
    """

    def __init__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], skewed: Sequence[bool] = (), rule: str = "sgd",
        eps: float = 1.0, momentum: float = 0.0, frozen: bool = False, copies: Sequence[Tensor] | None = None,
        steps: int = 2, weight_of: Callable[[Any], Tensor] = lambda p: p,
    ) -> None:  # fmt: skip
        self.params, self.grads, self.skewed = params, grads, skewed or [False] * len(params)
        self.rule, self.eps, self.momentum, self.frozen, self.copies = rule, eps, momentum, frozen, copies
        self.steps, self.weight_of, self.rows = steps, weight_of, 8 if len(params) <= 8 else 3
        self.scales: list[Tensor] = []
        stride = math.ceil(len(params) / MOST_CHECKED)  # of a long list, tensors from all over it
        self.checked = range(0, len(params), stride)

    def weights(self) -> list[Tensor]:
        return [sample(self.weight_of(self.params[i]), self.rows) for i in self.checked]

    def take_scales(self) -> None:
        """Those of the weights as they stand; of frozen ones, those of the first step, wherever that is made."""
        if not (self.frozen and self.scales):
            self.scales = [common.sawb(w) if self.skewed[i] else torch.ones((), device=w.device)
                           for i, w in zip(self.checked, self.weights(), strict=True)]  # fmt: skip

    def __call__(self, run: Callable[[], Any]) -> None:
        grads = [sample(self.grads[i], self.rows) for i in self.checked]
        first, second = ([torch.zeros_like(g) for g in grads] for _ in range(2))
        for step in range(1, self.steps + 1):
            before = self.weights()
            self.take_scales()
            run()
            with common.one_thread():
                rows = zip(self.scales, before, self.weights(), grads, first, second, strict=True)
                for i, of_tensor in zip(self.checked, rows, strict=True):
                    self.compare(i, step, *of_tensor)

    def compare(
        self, i: int, step: int, scale: Tensor, before: Tensor, after: Tensor, grad: Tensor, first: Tensor,
        second: Tensor,
    ) -> None:  # fmt: skip
        """Takes the reference's step from ``before``; what it and the implementation moved must agree."""
        quantized, expected, where = self.skewed[i], before.clone(), ([scale], [GRID])
        how: dict[str, Any] = {"eps": self.eps if quantized else 1.0, "clamp": self.frozen and quantized}
        with runtime.use_backend("reference"):
            if self.rule == "adamw":
                ops.skew_adamw_([expected], [grad], [first], [second], *where, step=step, lr=ADAM_LR,
                                weight_decay=0.01, alpha=ALPHA, **how)  # fmt: skip
            else:
                buffers = [first] if self.momentum else None
                ops.skew_sgd_([expected], [grad], buffers, *where, lr=LR, momentum=self.momentum, alpha=ALPHA, **how)
            copy = written_copy(after, scale, self.copies[i].dtype) if self.copies and quantized else None
        # 4e-6 |w|: rounding of w, and of the scale where a weight is clamped to the hull
        moved = (expected - before).abs() + before.abs() * 2e-3
        compare(f"tensor {i}, step {step}", after - before, expected - before, moved, 2e-3)
        if self.copies and copy is not None:
            compare(f"copy {i}, step {step}", sample(self.copies[i].float(), self.rows), copy, copy, 1e-5)


def written_copy(w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What a copy of this type holds, as float32."""
    copy = torch.empty_like(w, dtype=dtype)
    ops.fake_quantize_out_(w, scale, GRID, copy)
    return copy.float()


# ---- implementations -------------------------------------------------------------------------------------------------


def torch_step(inputs: Inputs, rule: str, momentum: float = 0.0, how: str = "fused", kind: str = "baseline") -> Impl:
    """how: "fused" or "foreach"."""
    params = inputs.parameters()
    options: dict[str, Any] = {"lr": ADAM_LR} if rule == "adamw" else {"lr": LR, "momentum": momentum}
    base: Any = torch.optim.AdamW if rule == "adamw" else torch.optim.SGD
    optimizer = base(params, **options, **{how: True})
    check = StepCheck(params, inputs.grads_of(params), rule=rule, momentum=momentum)
    name = f"torch {type(optimizer).__name__}{' momentum' if momentum else ''} {how}"
    return Impl(name, optimizer.step, kind, inputs.traffic(state_buffers(rule, momentum)), check)


def state_buffers(rule: str, momentum: float) -> int:
    """Tensors of weight size that an optimizer keeps."""
    return 2 if rule == "adamw" else int(momentum > 0)


def groups_of(params: Sequence[Tensor], skewed: Sequence[bool], of_skewed: dict, of_others: dict) -> list[dict]:
    pairs = list(zip(params, skewed, strict=True))
    groups = [{"params": [p for p, q in pairs if q == wanted], **options}
              for wanted, options in ((True, of_skewed), (False, of_others))]  # fmt: skip
    return [g for g in groups if g["params"]]


def askew_optimizer(params: Sequence[Tensor], skewed: Sequence[bool], rule: str = "sgd", **options: Any) -> Any:
    """Ours; the tensors that are not quantized take torch's own fused steps."""
    groups = groups_of(params, skewed, {"grid": GRID}, {"fused": True})
    if rule == "adamw":
        return optim.ASkewAdamW(groups, lr=ADAM_LR, alpha=ALPHA, **options)
    return optim.ASkewSGD(groups, lr=LR, alpha=ALPHA, **options)


Variant = dict[str, Any]  # of a step of ours: eps, freeze_scale, copy
HOLD: Variant = {}
COPY: Variant = {"copy": torch.float32}
ANNEALED: Variant = {"eps": EPS}
ANNEALED_COPY: Variant = {**ANNEALED, **COPY}
ANNEALED_SAWB: Variant = {"eps": EPS, "freeze_scale": "never"}  # the mathematics of the eager and compiled peers
PHASES = [HOLD, COPY, ANNEALED, ANNEALED_COPY]
COPIES = {torch.float32: ("hard", "hard copy"), torch.bfloat16: ("hard", "bfloat16 copy"),
          torch.int8: ("int8", "int8 levels"), torch.float8_e4m3fn: ("fp8", "fp8 levels")}  # fmt: skip


def ours_name(variant: Variant, rule: str = "sgd") -> str:
    scale = "each step" if "freeze_scale" in variant else "frozen"
    phase = f"eps={variant['eps']:g}, scale {scale}" if "eps" in variant else "hold"
    copy = f" + {COPIES[variant['copy']][1]}" if "copy" in variant else ""
    return f"{'ASkewAdamW' if rule == 'adamw' else 'ASkewSGD'} {phase}{copy}"


def askew_step(
    inputs: Inputs, rule: str = "sgd", momentum: float = 0.0, eps: float = 1.0, freeze_scale: str = "anneal",
    copy: torch.dtype | None = None,
) -> Impl:  # fmt: skip
    """One of our optimizers, SAWB per channel, 4 bits. copy: the type in which it also writes what a layer's forward
    takes, s Q(w/s), or the levels alone where that is a byte."""
    frozen = eps < 1 and freeze_scale == "anneal"
    params = inputs.parameters()
    copies: list[Tensor] = list(params)
    for i, p in enumerate(params):
        if copy and inputs.skewed[i]:  # what a layer with forward="hard" does in its first forward
            quantizer = quant.WeightQuantizer(quant.QuantConfig(weight=GRID, scale="sawb", forward=COPIES[copy][0]))
            quantizer.tie(p)
            copies[i] = quantizer.quantized(p, copy)  # where the step leaves it
    options: dict[str, Any] = {"momentum": momentum} if momentum else {}
    optimizer = askew_optimizer(params, inputs.skewed, rule, constraint_eps=eps, freeze_scale=freeze_scale, **options)
    grads = inputs.grads_of(params)
    check = StepCheck(params, grads, inputs.skewed, rule, eps, momentum, frozen, copies if copy else None)
    first_call = "state and scales made" if eps == 1 and not copy else ""
    traffic = inputs.traffic(state_buffers(rule, momentum), copy)
    return Impl("", optimizer.step, "ours", traffic, check, first_call=first_call)


def ours(
    context: Context, inputs: Inputs, variants: Sequence[Variant], rule: str = "sgd", momentum: float = 0.0
) -> list[Impl]:
    """Each variant by each backend."""
    builds = {ours_name(v, rule): functools.partial(askew_step, inputs, rule, momentum, **v) for v in variants}
    return [impl for name, build in builds.items() for impl in common.ours(context, name, build)]


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


def written_step(inputs: Inputs, name: str, function: Callable[..., Tensor | None]) -> Impl:
    """A step that is a plain function of (w, g, lr, eps), rows by columns, in place or giving the new weight; tensors
    that are not quantized take plain SGD steps."""
    weights, grads = ([t.clone() for t in tensors] for tensors in (inputs.weights, inputs.grads))
    lr, eps = (torch.tensor(v, device=weights[0].device) for v in (LR, EPS))

    @torch.no_grad()
    def run() -> None:
        for i, (g, quantized) in enumerate(zip(grads, inputs.skewed, strict=True)):
            if not quantized:
                weights[i].add_(g, alpha=-LR)
            elif (new := function(weights[i].flatten(1), g.flatten(1), lr, eps)) is not None:
                weights[i] = new.view_as(g)

    return Impl(name, run, "peer", inputs.traffic(0), StepCheck(weights, grads, inputs.skewed, eps=EPS))


def parq_step(inputs: Inputs, momentum: float) -> Impl:
    """The check follows the base optimizer's steps; the proximal map is PARQ's own."""
    params = inputs.parameters()
    groups = groups_of(params, inputs.skewed, {"quant_bits": BITS}, {})
    base = torch.optim.SGD(groups, lr=LR, momentum=momentum, fused=True)
    optimizer = peers.parq_optimizer(base, steps=1000)

    def latent(p: Any) -> Tensor:
        """What its base optimizer moves: the parameter before the first step, then a tensor kept beside it."""
        return optimizer.state[p].get("latent", p) if p in optimizer.state else p

    check = StepCheck(params, inputs.grads_of(params), momentum=momentum, weight_of=latent)
    return Impl("", optimizer.step, traffic=inputs.traffic(1), check=check, note="its own quantizer and annealing")


def adamw8bit_step(inputs: Inputs) -> Impl:
    """Checked for one step: later ones see states that were rounded to 8 bits."""
    params = inputs.parameters()
    optimizer = peers.load("bitsandbytes").optim.AdamW8bit(params, lr=ADAM_LR, weight_decay=0.01)
    check = StepCheck(params, inputs.grads_of(params), rule="adamw", steps=1)
    return Impl("", optimizer.step, check=check, note="no quantized weights")


def replayed(impl: Impl) -> Impl:
    """The same step replayed from a CUDA graph, without launch overhead; missing where it cannot be captured. Only for
    steps without momentum: the warm-up that a capture needs moves the weights, and freezes the scale."""
    name = f"{impl.name}, CUDA graph"
    if impl.missing:
        return dataclasses.replace(impl, name=name)
    if isinstance(impl.check, StepCheck):
        impl.check.take_scales()
    captured = common.Captured(impl.run)
    try:
        captured.capture()
    except Exception as error:
        return Impl(name, kind=impl.kind, backend=impl.backend, missing=f"cannot be captured: {first_line(error)}")
    return dataclasses.replace(impl, name=name, run=captured, first_call="")


# ---- cases -----------------------------------------------------------------------------------------------------------

FOREACH, GRAPHS, EAGER = "foreach", "CUDA graphs", "eager, lean"
IN_PLACE, FRESH = "torch.compile, in place", "torch.compile, one graph, fresh result"
PUBLISHED = "published formulation (all distances, sort)"
PUBLISHED_BYTES = 500  # of temporaries for each weight of the largest tensor, about
PARQ, BNB_ADAMW = "torchao PARQ QuantOptimizer", "bitsandbytes AdamW8bit"
Member = str | Variant


def peers_of(name: str, context: Context, inputs: Inputs, rule: str, momentum: float) -> list[Impl]:
    """What stands in a case under this name beside torch's fused optimizer and ours."""
    if name == FOREACH:
        return [torch_step(inputs, rule, momentum, FOREACH, "peer")]
    if name == GRAPHS:  # on a GPU launches count
        if not context.is_cuda:
            return []
        return [*map(replayed, [torch_step(inputs, rule, kind="peer"), *ours(context, inputs, [HOLD, ANNEALED])])]
    if name == PARQ:
        return [peer(PARQ, "torchao", lambda: parq_step(inputs, momentum))]
    if name == BNB_ADAMW:
        return [peer(BNB_ADAMW, "bitsandbytes", lambda: adamw8bit_step(inputs))]
    functions = {EAGER: lean_eager_step_, PUBLISHED: published_step_, IN_PLACE: in_place_step_, FRESH: functional_step}
    function = functions[name]
    if name in (IN_PLACE, FRESH):
        build = lambda: written_step(inputs, name, compiled(function))  # noqa: E731
        return [common.when_compiled(context, name, build, quick=name == IN_PLACE)]
    gigabytes = PUBLISHED_BYTES * max(w.numel() for w in inputs.weights) / 1e9
    if name == PUBLISHED and context.quick and len(inputs.weights) > 1:
        return [Impl(name, missing="left out of --quick")]
    if name == PUBLISHED and gigabytes > 4:
        return [Impl(name, missing=f"left out: its temporaries would take {gigabytes:.0f} GB")]
    return [written_step(inputs, name, function)]


def step_case(
    context: Context, members: Sequence[Member], rule: str = "sgd", momentum: float = 0.0, model: str = "",
    shapes: Callable[[Context], common.Shapes] = lambda context: [(context.side, context.side)], times: int = 1,
) -> Case:  # fmt: skip
    """One step beside torch's fused one, which is the baseline. model: whose tensors the shapes are, on a GPU ``times``
    as many; matrices and convolutions are quantized."""
    times = times if context.is_cuda and not context.quick else 1
    tensors = shapes(context)
    inputs = Inputs(context, tensors * times)
    impls = [torch_step(inputs, rule, momentum)]
    for member in members:
        if isinstance(member, dict):
            impls += ours(context, inputs, [member], rule, momentum)
        else:
            impls += peers_of(member, context, inputs, rule, momentum)
    shape = "x".join(map(str, tensors[0]))
    if model:
        shape = f"{f'{times} x ' if times > 1 else ''}{model}'s {len(tensors)} tensors"
    weights = inputs.bytes // 4
    return Case(shape, "float32", impls[0].name, impls, weights, work=weights / 1e6, work_unit="million weights")


def entry(
    op: str, *members: Member, warm: bool = False, quick: bool = True, devices: tuple[str, ...] = ("cpu", "cuda"),
    **how: Any,
) -> Entry:  # fmt: skip
    return Entry(op, lambda context: step_case(context, members, **how), devices, warm, quick)


def of(model: str, shapes: str) -> dict[str, Any]:
    """shapes: the name of a function of ``common``."""
    return {"model": model, "shapes": lambda context: getattr(common, shapes)()}


SIZES = ((1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (8192, 16384))  # 1M … 128M weights
SGD, MOMENTUM_STEP, ADAMW_STEP = "SGD step", "SGD momentum step", "AdamW step"
PUBLISHED_STEP = "SGD step, published formulation"
WRITING = "SGD step with a copy for the forward"
LIST, MOMENTUM_LIST, ADAMW_LIST = (f"{op}, tensor list" for op in (SGD, MOMENTUM_STEP, ADAMW_STEP))
RESNET18 = of("ResNet-18", "resnet18_shapes")

ENTRIES = [
    entry(SGD, FOREACH, *PHASES, ANNEALED_SAWB, EAGER, IN_PLACE, FRESH, GRAPHS, warm=True),
    entry(WRITING, *[{**phase, "copy": t} for phase in (HOLD, ANNEALED) for t in COPIES if t != torch.float32],
          devices=("cuda",)),
    entry(MOMENTUM_STEP, FOREACH, *PHASES, PARQ, momentum=MOMENTUM, warm=True),
    entry(MOMENTUM_LIST, FOREACH, *PHASES, PARQ, momentum=MOMENTUM, warm=True, times=8, **RESNET18),
    entry(ADAMW_STEP, FOREACH, *PHASES, BNB_ADAMW, rule="adamw", warm=True),
    # its own case because of its size: the sort's temporaries take hundreds of bytes a weight
    entry(PUBLISHED_STEP, ANNEALED_SAWB, EAGER, PUBLISHED,
          shapes=lambda context: [(512, 512) if context.quick else (2048, 2048)]),
    # what the published formulation's users run, without momentum
    entry(LIST, HOLD, ANNEALED, ANNEALED_SAWB, GRAPHS, EAGER, PUBLISHED, **RESNET18),
    entry(MOMENTUM_LIST, FOREACH, *PHASES, momentum=MOMENTUM, quick=False, **of("ResNet-50", "resnet50_shapes")),
    *[entry(ADAMW_LIST, HOLD, ANNEALED, ANNEALED_COPY, rule="adamw", quick=False, **of(model, shapes))
      for model, shapes in (("ViT-B", "vit_b_shapes"), ("GPT-2 small", "gpt2_small_shapes"))],
    *[entry("SGD step by size", HOLD, ANNEALED, ANNEALED_SAWB, IN_PLACE, quick=False,
            shapes=lambda context, size=size: [size]) for size in SIZES],
]  # fmt: skip


# ---- goals and headlines ---------------------------------------------------------------------------------------------


def memory_share(r: Row) -> float | None:
    """Extra memory of a step over the bytes of its fp32 weights."""
    if r.rate is None or r.p50 is None or r.peak_bytes is None:
        return None
    return r.peak_bytes / (4e3 * r.rate * r.p50)  # the rate is in million weights a second


SAME = ours_name(ANNEALED_SAWB)
STEPS = {  # op: (what goals call it, what they call its baseline, rule)
    SGD: ("ASkewSGD step", "SGD fused", "sgd"), MOMENTUM_STEP: ("ASkewSGD momentum step", "SGD momentum fused", "sgd"),
    MOMENTUM_LIST: ("ResNet-18's 62 tensors", "SGD momentum fused", "sgd"),
    ADAMW_STEP: ("ASkewAdamW", "AdamW fused", "adamw"),
}  # fmt: skip

GOALS = [
    *[Goal(f"{text}{', annealed' if v.get('eps') else ''}{', with the hard copy' if v.get('copy') else ''} ÷ {to}",
           "<=", 1.25, ratio(op, ours_name(v, rule)))
      for op, (text, to, rule) in STEPS.items() for v in PHASES],
    Goal("ASkewSGD step, eps=0.3, SAWB each step ÷ SGD fused", "<=", 1.25, ratio(SGD, SAME)),
    Goal("times faster than the best torch.compile of the same mathematics", ">=", 2.5,
         lambda rows: 1 / ratio_to_best(SGD, SAME, (IN_PLACE, FRESH))(rows)),
    Goal("times faster than eager", ">=", 30, ratio(SGD, EAGER, SAME)),
    Goal("ResNet-18's list: times faster than PARQ, annealed", ">=", 25,
         ratio(MOMENTUM_LIST, PARQ, ours_name(ANNEALED))),
    Goal("ResNet-18's list: times faster than the published formulation", ">=", 300, ratio(LIST, PUBLISHED, SAME)),
    # sums and scales of rows are allowed; the smallest tensor of weight size, a mask, would be 0.25
    Goal("extra memory of a step ÷ bytes of the weights, worst of all", "<=", 0.05,
         extreme(lambda r: "first call" not in r.impl, memory_share)),
]  # fmt: skip
for backend in ("cpp", "triton"):
    GOALS += [
        Goal(f"every step, {backend}: least % of the device's copy bandwidth", ">=", 90,
             extreme(lambda r, b=backend: r.backend == b and "published" not in r.op,  # type: ignore[misc]
                     lambda r: r.percent_of_copy, min), "cuda"),
        Goal(f"step, {backend} ÷ torch.compile", "<=", 1.0,
             ratio_to_best(SGD, f"{SAME} ({backend})", (IN_PLACE, FRESH)), "cuda"),
        Goal(f"step, {backend}: times faster than the published formulation", ">=", 100,
             ratio(PUBLISHED_STEP, PUBLISHED, f"{SAME} ({backend})"), "cuda"),
    ]  # fmt: skip

HEADLINES = [
    Headline("optimizer step, hold, with the hard copy", SGD, ours_name(COPY)),
    Headline("optimizer step, annealed, with the hard copy", SGD, ours_name(ANNEALED_COPY)),
    Headline("optimizer step, hold", SGD, ours_name(HOLD)),
    Headline("optimizer step, annealed, SAWB each step", SGD, SAME, ((IN_PLACE, "torch.compile"), (EAGER, "eager"))),
    Headline("momentum step, annealed, with the hard copy", MOMENTUM_LIST, ours_name(ANNEALED_COPY),
             ((PARQ, "torchao PARQ"),)),
    Headline("optimizer step, annealed, SAWB each step", LIST, SAME,
             ((EAGER, "eager"), (PUBLISHED, "published formulation"))),
    Headline("AdamW step, hold, with the hard copy", ADAMW_STEP, ours_name(COPY, "adamw"),
             ((BNB_ADAMW, "bitsandbytes 8-bit"),)),
    Headline("AdamW step, annealed", ADAMW_STEP, ours_name(ANNEALED, "adamw")),
    Headline("AdamW step, annealed, with the hard copy", ADAMW_LIST, ours_name(ANNEALED_COPY, "adamw")),
]  # fmt: skip
