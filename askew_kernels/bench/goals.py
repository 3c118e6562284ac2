"""The figures that this project sets itself (``GOALS``), each read from rows, and the summary that the README shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .rows import Row
from .suites.fake_quant import COMPILED, COMPILED_BOTH
from .suites.linear import AFTER_STEP, BREVITAS, HARD, TORCHAO
from .suites.packed import BITSANDBYTES, DYNAMIC, FILES, INT8, LOAD, SAVE, TORCH_INT4, TORCH_INT8, ours
from .suites.sam import FOREIGN, INSIDE
from .suites.search import EDMIPS, MIXED
from .suites.startup import BEYOND_TORCH
from .suites.step import BNB_ADAMW, FRESH, IN_PLACE, PARQ, PUBLISHED
from .suites.train import AUTOCAST, LOG, OURS, OURS_AUTOCAST


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
    """The row of an implementation in the first case of that name; LookupError where it is missing or failed."""
    first = next((r.case for r in rows if r.op == op and r.allocator == allocator), None)
    for r in rows:
        if r.case == first and r.impl == impl and r.p50 is not None:
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


def ratio_to_best(
    op: str, impl: str, peers: tuple[str, ...], allocator: str = "default"
) -> Callable[[list[Row]], float]:
    """p50 of ours over that of the fastest of the peers."""

    def measure(rows: list[Row]) -> float:
        ratios = []
        for peer in peers:
            with contextlib.suppress(LookupError):
                ratios.append(ratio(op, impl, peer, allocator)(rows))
        return max(ratios)  # ValueError where there is none

    return measure


def memory_share(r: Row) -> float | None:
    """Extra memory of a step over the bytes of its fp32 weights."""
    if r.rate is None or r.p50 is None or r.peak_bytes is None:
        return None
    return r.peak_bytes / (4 * r.rate * 1e6 * r.p50 / 1e3)  # the rate is in million weights a second


_HOLD, _FROZEN, _SAME = "ASkewSGD hold", "ASkewSGD eps=0.3, scale frozen", "ASkewSGD eps=0.3, scale each step"
_LIST, _BOTH = "SGD momentum step, tensor list", "linear forward + backward"
_CHANNEL, _GROUP = "fake quantize per channel, forward + backward", "fake quantize per group of 128, forward + backward"
_SAM = "ASAM perturb and restore, tensor list"
_ALLOCATORS = ("default", "warm")

GOALS: list[Goal] = [
    Goal("ASkewSGD step, SAWB included, ÷ SGD fused", "step", "<=", 1.25, ratio("SGD step", _HOLD)),
    Goal("ASkewSGD step, eps=0.3, SAWB each step, ÷ SGD fused", "step", "<=", 1.25, ratio("SGD step", _SAME)),
    Goal("with momentum ÷ SGD momentum fused", "step", "<=", 1.25, ratio("SGD momentum step", _HOLD)),
    Goal("with momentum, annealed ÷ SGD momentum fused", "step", "<=", 1.25, ratio("SGD momentum step", _FROZEN)),
    Goal("ResNet-18's 62 tensors ÷ SGD momentum fused", "step", "<=", 1.25, ratio(_LIST, _HOLD)),
    Goal("ResNet-18's 62 tensors, annealed ÷ SGD momentum fused", "step", "<=", 1.25, ratio(_LIST, _FROZEN)),
    Goal("ASkewAdamW ÷ AdamW fused", "step", "<=", 1.25, ratio("AdamW step", "ASkewAdamW hold")),
    Goal("times faster than the best torch.compile of the same mathematics", "step", ">=", 2.5,
         lambda rows: 1 / ratio_to_best("SGD step", _SAME, (IN_PLACE, FRESH))(rows)),
    Goal("times faster than eager", "step", ">=", 30, ratio("SGD step", "eager, lean", _SAME)),
    Goal("ResNet-18's list: times faster than PARQ, annealed", "step", ">=", 25, ratio(_LIST, PARQ, _FROZEN)),
    Goal("ResNet-18's list: times faster than the published formulation", "step", ">=", 300,
         ratio("SGD step, tensor list", PUBLISHED, _SAME)),
    # sums and scales of rows are allowed; the smallest tensor of weight size, a mask, would be 0.25
    Goal("extra memory of a step ÷ bytes of the weights, worst of all", "step", "<=", 0.05,
         worst_of(lambda r: "first call" not in r.impl, memory_share)),
    *[
        goal
        for op, label in ((_CHANNEL, "per channel"), (_GROUP, "per group of 128"))
        for allocator in _ALLOCATORS
        for goal in (
            Goal(f"fake_quantize {label} forward + backward ÷ two copies, {allocator} allocator", "fake_quant",
                 "<=", 1.3, ratio(op, "ops.fake_quantize", "two copies", allocator)),
            Goal(f"fake_quantize {label} ÷ torch.compile, {allocator} allocator", "fake_quant", "<=", 1.0,
                 ratio_to_best(op, "ops.fake_quantize", (COMPILED, COMPILED_BOTH), allocator)),
        )
    ],
    *[
        Goal(f"PackedLinear {name}, batch {batch}: times faster than nn.Linear", "packed", ">=", wanted,
             ratio(f"packed linear, batch {batch}", "nn.Linear", ours(name)))
        for name, batch, wanted in (
            ("4-bit group 128", 1, 7.0), ("binary", 1, 14.0), ("4-bit" + INT8, 16, 10.0), ("4-bit" + INT8, 256, 4.3),
        )
    ],
    *[
        Goal(f"PackedLinear {name}, batch {batch} ÷ the fastest of {len(rivals)} peers", "packed", "<=", 1.0,
             ratio_to_best(f"packed linear, batch {batch}", ours(name), rivals))
        for batch in (1, 16, 256, 4096)
        for name, rivals in (
            ("4-bit group 128", (TORCH_INT4, TORCH_INT8, BITSANDBYTES)), ("4-bit" + INT8, (DYNAMIC,)),
            ("8-bit", (TORCH_INT8,)), ("8-bit" + INT8, (DYNAMIC,)),
        )
    ],
    *[
        Goal(f"{what} of a 4-bit model of 100 million weights, GB/s", "packed", ">=", 1.0,
             lambda rows, what=what: found(rows, f"packed file, {FILES[0]}", what).rate or 0.0)  # type: ignore[misc]
        for what in (SAVE, LOAD)
    ],
    Goal("ASAM perturb + restore over a foreign base ÷ SGD fused", "sam", "<=", 3.6,
         ratio(_SAM, f"{FOREIGN}, restored")),
    Goal("what ASAM adds to an ASkewSGD step ÷ SGD fused", "sam", "<=", 2.4,
         lambda rows: ratio(_SAM, INSIDE)(rows) - ratio(_SAM, _HOLD)(rows)),
    *[
        Goal(f"search step, 4 candidates ÷ 4-bit QAT step, {allocator} allocator", "search", "<=", 1.5,
             ratio("search step, linear layer", MIXED, "", allocator))
        for allocator in _ALLOCATORS
    ],
    Goal("search step: times faster than EdMIPS-style eager", "search", ">=", 1.0,
         ratio("search step, linear layer", EDMIPS, MIXED)),
    Goal("AskewLinear relaxed forward ÷ nn.Linear", "linear", "<=", 1.05,
         ratio("linear forward", "AskewLinear relaxed")),
    Goal("AskewLinear hard forward, fresh copy ÷ nn.Linear", "linear", "<=", 1.05, ratio("linear forward", HARD)),
    Goal("AskewLinear hard forward after a step ÷ nn.Linear", "linear", "<=", 1.05,
         ratio("linear forward after a step", AFTER_STEP)),
    *[
        Goal(f"AskewLinear hard forward + backward ÷ nn.Linear, {allocator} allocator", "linear", "<=", 1.05,
             ratio(_BOTH, HARD, "nn.Linear", allocator))
        for allocator in _ALLOCATORS
    ],
    *[
        Goal(f"linear forward + backward: times faster than {peer.split()[0]}, {allocator} allocator", "linear", ">=",
             wanted, ratio(_BOTH, peer, HARD, allocator))
        for peer in (TORCHAO, BREVITAS)
        for allocator, wanted in zip(_ALLOCATORS, (2.0, 1.35), strict=True)
    ],
    *[
        Goal(f"hard QAT {op} ÷ float", "train", "<=", 1.05, ratio(op, OURS))
        for op in ("training step, MLP", "training step, ResNet-18", "training step, GPT")
    ],
    Goal("training steps with a telemetry log ÷ without", "train", "<=", 1.01, ratio("training steps with a log", LOG)),
    Goal("import askew_kernels, ms beyond import torch", "startup", "<=", 300,
         lambda rows: found(rows, "start-up", BEYOND_TORCH).p50 or 0.0),
    *[
        goal
        for backend in ("cpp", "triton")
        for goal in (
            Goal(f"every step, {backend}: least % of the device's copy bandwidth", "step", ">=", 90,
                 worst_of(lambda r, b=backend: r.backend == b and "published" not in r.op,  # type: ignore[misc]
                          lambda r: r.percent_of_copy, min), "cuda"),
            Goal(f"PackedLinear 4-bit group 128, batch 1, {backend}: times faster than bf16 nn.Linear", "packed",
                 ">=", 3.3, ratio("packed linear on a GPU, batch 1", "nn.Linear",
                                  f"{ours('4-bit group 128')} ({backend})"), "cuda"),
            Goal(f"fake_quantize, {backend}: least % of the device's copy bandwidth", "fake_quant", ">=", 90,
                 worst_of(lambda r, b=backend: r.backend == b, lambda r: r.percent_of_copy, min), "cuda"),  # type: ignore[misc]
            Goal(f"step, {backend} ÷ torch.compile", "step", "<=", 1.0,
                 ratio_to_best("SGD step", f"{_SAME} ({backend})", (IN_PLACE, FRESH)), "cuda"),
            Goal(f"fake_quantize, {backend} ÷ torch.compile", "fake_quant", "<=", 1.0,
                 ratio_to_best(_CHANNEL, f"ops.fake_quantize ({backend})", (COMPILED, COMPILED_BOTH)), "cuda"),
            Goal(f"step, {backend}: times faster than the published formulation", "step", ">=", 100,
                 ratio("SGD step, published formulation", PUBLISHED, f"{_SAME} ({backend})"), "cuda"),
            Goal(f"hard QAT training step, GPT, autocast bf16, {backend} ÷ autocast", "train", "<=", 1.0,
                 ratio("training step, GPT", f"{OURS_AUTOCAST} ({backend})", AUTOCAST), "cuda"),
        )
    ],
]  # fmt: skip


@dataclass
class GoalResult:
    """One line of the goals table; ``measured`` is None where its rows are not there."""

    goal: str
    measured: float | None
    wanted: float
    sense: str  # "<=" or ">="
    reached: bool | None


def goals(rows: Iterable[Row]) -> list[GoalResult]:
    """Every goal that these rows can answer."""
    rows = list(rows)
    results = []
    for goal in GOALS:
        mine = [r for r in rows if r.device_type == goal.device and r.suite == goal.suite]
        if not mine:
            continue
        try:
            measured = goal.measure(mine)
        except (LookupError, TypeError, ValueError, ZeroDivisionError):
            measured = None
        if measured is None and any(r.quick for r in mine):
            continue  # what --quick leaves out
        reached = None
        if measured is not None:
            reached = measured <= goal.wanted if goal.sense == "<=" else measured >= goal.wanted
        results.append(GoalResult(goal.text, measured, goal.wanted, goal.sense, reached))
    return results


# ---- the summary -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """One line of the README's table and one panel of its plot: p50 over ``baseline``'s, of ours and of the peers."""

    text: str
    suite: str
    op: str
    baseline: str
    ours: str
    peers: tuple[tuple[str, str], ...]  # (implementation, its short name)


HEADLINES: list[Headline] = [
    Headline("optimizer step, hold", "step", "SGD step", "torch SGD fused", _HOLD, ()),
    Headline("optimizer step, annealed, SAWB each step", "step", "SGD step", "torch SGD fused", _SAME,
             ((IN_PLACE, "torch.compile"), ("eager, lean", "eager"))),
    Headline("momentum step, annealed", "step", _LIST, "torch SGD momentum fused", _FROZEN,
             ((PARQ, "torchao PARQ"),)),
    Headline("optimizer step, annealed, SAWB each step", "step", "SGD step, tensor list",
             "torch SGD fused", _SAME, (("eager, lean", "eager"), (PUBLISHED, "published formulation"))),
    Headline("AdamW step, hold", "step", "AdamW step", "torch AdamW fused", "ASkewAdamW hold",
             ((BNB_ADAMW, "bitsandbytes 8-bit"),)),
    Headline("fake-quantize per channel, forward + backward", "fake_quant", _CHANNEL, "two copies", "ops.fake_quantize",
             (("torch.fake_quantize_per_channel_affine", "torch"), (COMPILED, "torch.compile"),
              (COMPILED_BOTH, "torch.compile, one graph"),
              ("torchao QAT", "torchao"), ("brevitas", "brevitas"))),
    Headline("QAT linear layer, forward + backward", "linear", _BOTH, "nn.Linear", HARD,
             ((TORCHAO, "torchao"), (BREVITAS, "brevitas"))),
    *[
        Headline("QAT training step", "train", op, "float", OURS,
                 (("torchao QAT", "torchao"), ("brevitas QAT", "brevitas"), (AUTOCAST, "bf16 autocast, no QAT")))
        for op in ("training step, MLP", "training step, ResNet-18", "training step, GPT")
    ],
]  # fmt: skip


@dataclass(frozen=True)
class HeadlineFigures:
    headline: Headline
    ours: Row
    peers: list[tuple[str, Row]]

    @property
    def title(self) -> str:
        return f"{self.headline.text}, {self.ours.shape}"


def headline_figures(rows: Iterable[Row]) -> list[HeadlineFigures]:
    """The headlines that these rows hold, default allocator."""
    rows = list(rows)
    figures = []
    for h in HEADLINES:
        mine = [r for r in rows if r.suite == h.suite]
        with contextlib.suppress(LookupError):
            ours = found(mine, h.op, h.ours)
            others = []
            for impl, name in h.peers:
                with contextlib.suppress(LookupError):
                    others.append((name, found(mine, h.op, impl)))
            figures.append(HeadlineFigures(h, ours, others))
    return figures
