"""What a goal and a line of the README's table are, and how they are read from rows. They themselves are data and stand
beside the cases that they are about (``suites``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .rows import Row

Measure = Callable[[list[Row]], float]
ALLOCATORS = ("default", "warm")  # warm: glibc keeps freed memory


@dataclass(frozen=True)
class Goal:
    """``measure(rows of that suite and device)`` gives the figure; LookupError where its rows are missing."""

    text: str
    sense: str  # "<=" or ">="
    wanted: float
    measure: Measure
    device: str = "cpu"


@dataclass(frozen=True)
class Headline:
    """One line of the README's table and of its plot: p50 over the baseline's, of ours and of the peers."""

    text: str
    op: str
    ours: str
    peers: tuple[tuple[str, str], ...] = ()  # (implementation, its short name)


# ---- figures from rows -----------------------------------------------------------------------------------------------


def found(rows: list[Row], op: str, impl: str, allocator: str = "default") -> Row:
    """The row of an implementation in the first case of that name; LookupError where it is missing or failed."""
    first = next((r.case for r in rows if r.op == op and r.allocator == allocator), None)
    for r in rows:
        if r.case == first and r.impl == impl and r.p50 is not None:
            return r
    raise LookupError(f"{op}: {impl}")


def ratio(op: str, impl: str, to: str = "", allocator: str = "default") -> Measure:
    """p50 of ``impl`` over that of ``to`` (the case's baseline where not given), same case."""

    def measure(rows: list[Row]) -> float:
        ours = found(rows, op, impl, allocator)
        return ours.p50 / found(rows, op, to or ours.baseline, allocator).p50  # type: ignore[operator]

    return measure


def ratio_to_best(op: str, impl: str, peers: Sequence[str], allocator: str = "default") -> Measure:
    """p50 of ours over that of the fastest of the peers."""

    def measure(rows: list[Row]) -> float:
        ratios = []
        for peer in peers:
            with contextlib.suppress(LookupError):
                ratios.append(ratio(op, impl, peer, allocator)(rows))
        return max(ratios)  # ValueError where there is none

    return measure


def extreme(accept: Callable[[Row], bool], value: Callable[[Row], float | None], worst: Callable = max) -> Measure:
    """The worst ``value`` among the rows of ours that ``accept`` takes."""

    def measure(rows: list[Row]) -> float:
        return worst(v for r in rows if r.kind == "ours" and accept(r) and (v := value(r)) is not None)

    return measure


def rate(op: str, impl: str) -> Measure:
    return lambda rows: found(rows, op, impl).rate or 0.0


# ---- what rows reach -------------------------------------------------------------------------------------------------


@dataclass
class GoalResult:
    """One line of the goals table; ``measured`` is None where its rows are not there."""

    goal: str
    measured: float | None
    wanted: float
    sense: str  # "<=" or ">="
    reached: bool | None


def judge(goals: Mapping[str, Sequence[Goal]], rows: Iterable[Row]) -> list[GoalResult]:
    """Every goal (by suite) that these rows can answer."""
    rows = list(rows)
    results = []
    for suite, goal in ((suite, goal) for suite, members in goals.items() for goal in members):
        mine = [r for r in rows if r.device_type == goal.device and r.suite == suite]
        measured = reached = None
        with contextlib.suppress(LookupError, TypeError, ValueError, ZeroDivisionError):
            measured = goal.measure(mine)
            reached = measured <= goal.wanted if goal.sense == "<=" else measured >= goal.wanted
        if mine and (measured is not None or not any(r.quick for r in mine)):  # --quick leaves some out
            results.append(GoalResult(goal.text, measured, goal.wanted, goal.sense, reached))
    return results


@dataclass(frozen=True)
class HeadlineFigures:
    headline: Headline
    ours: Row
    peers: list[tuple[str, Row]]

    @property
    def title(self) -> str:
        return f"{self.headline.text}, {self.ours.shape}"


def headline_figures(headlines: Mapping[str, Sequence[Headline]], rows: Iterable[Row]) -> list[HeadlineFigures]:
    """The headlines (by suite) that these rows hold, default allocator."""
    rows = list(rows)
    figures = []
    for suite, h in ((suite, h) for suite, members in headlines.items() for h in members):
        mine = [r for r in rows if r.suite == suite]
        with contextlib.suppress(LookupError):
            ours = found(mine, h.op, h.ours)
            others = []
            for impl, name in h.peers:
                with contextlib.suppress(LookupError):
                    others.append((name, found(mine, h.op, impl)))
            figures.append(HeadlineFigures(h, ours, others))
    return figures
