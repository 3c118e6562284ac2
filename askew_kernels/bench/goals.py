"""What a goal and a line of the README's table are, and how they are read from rows. They themselves are data and stand
beside the cases that they are about (``suites``)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..command import Refused
from .rows import Row, by_suite, read_text

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


def first_case(rows: Iterable[Row], op: str, allocator: str = "default") -> dict[str, Row]:
    """What was measured in the first case of that name, by implementation."""
    mine = [r for r in rows if r.op == op and r.allocator == allocator]
    return {r.impl: r for r in mine if r.case == mine[0].case and r.p50 is not None}


def ratio(op: str, impl: str, to: str = "", allocator: str = "default") -> Measure:
    """p50 of ``impl`` over that of ``to`` (the case's baseline where not given), same case."""

    def measure(rows: list[Row]) -> float:
        here = first_case(rows, op, allocator)
        return here[impl].p50 / here[to or here[impl].baseline].p50  # type: ignore[operator]

    return measure


def ratio_to_best(op: str, impl: str, peers: Sequence[str], allocator: str = "default") -> Measure:
    """p50 of ours over that of the fastest of the peers."""

    def measure(rows: list[Row]) -> float:
        here = first_case(rows, op, allocator)
        return here[impl].p50 / min(here[peer].p50 for peer in peers if peer in here)  # type: ignore[operator, type-var]

    return measure


def extreme(accept: Callable[[Row], bool], value: Callable[[Row], float | None], worst: Callable = max) -> Measure:
    """The worst ``value`` among the rows of ours that ``accept`` takes."""
    return lambda rows: worst(v for r in rows if r.kind == "ours" and accept(r) and (v := value(r)) is not None)


def rate(op: str, impl: str) -> Measure:
    return lambda rows: first_case(rows, op)[impl].rate or 0.0


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
    results, suites = [], by_suite(rows)
    for suite, goal in ((suite, goal) for suite, members in goals.items() for goal in members):
        mine = [r for r in suites.get(suite, []) if r.device_type == goal.device]
        measured = reached = None
        with contextlib.suppress(LookupError, TypeError, ValueError, ZeroDivisionError):
            measured = goal.measure(mine)
            reached = measured <= goal.wanted if goal.sense == "<=" else measured >= goal.wanted
        if mine and (measured is not None or not any(r.quick for r in mine)):  # --quick leaves some out
            results.append(GoalResult(goal.text, measured, goal.wanted, goal.sense, reached))
    return results


class Reason(NamedTuple):
    """Why goals are missed on one kind of processor: the limit, or what was tried."""

    goals: tuple[str, ...]  # regular expressions, each of a goal's whole text
    why: str

    def explains(self, goal: str) -> bool:
        return any(re.fullmatch(pattern, goal) for pattern in self.goals)


def read_reasons(path: Path) -> list[Reason]:
    """A JSON list of objects with ``goals`` and ``why``. Raises Refused for anything else."""
    try:
        found = json.loads(read_text(path))
        if not isinstance(found, list):
            raise TypeError(f"got {type(found).__name__}")
        reasons = [Reason((*entry["goals"],), entry["why"]) for entry in found]
        for reason in reasons:
            "".join((*reason.goals, reason.why))
            [*map(re.compile, reason.goals)]
    except (ValueError, LookupError, TypeError, re.error) as problem:
        expected = "a JSON list of objects with goals, regular expressions, and why, a text"
        raise Refused(f"{path}: expected {expected}: {problem}") from None
    return reasons


def missed(results: Iterable[GoalResult], reasons: Iterable[Reason]) -> tuple[dict[str, str], list[str]]:
    """(the missed goals, each with the numbers of its reasons; the reasons, those that miss alone)."""
    goals = [g.goal for g in results if g.reached is False]
    given = [r for r in reasons if any(map(r.explains, goals))]
    numbers = {goal: ", ".join(str(i) for i, r in enumerate(given, 1) if r.explains(goal)) for goal in goals}
    return numbers, [r.why for r in given]


class HeadlineFigures(NamedTuple):
    title: str
    ours: Row
    peers: list[tuple[str, Row]]


def headline_figures(headlines: Mapping[str, Sequence[Headline]], rows: Iterable[Row]) -> list[HeadlineFigures]:
    """The headlines (by suite) that these rows hold, default allocator."""
    figures, suites = [], by_suite(rows)
    for suite, h in ((suite, h) for suite, members in headlines.items() for h in members):
        here = first_case(suites.get(suite, []), h.op)
        if ours := here.get(h.ours):
            peers = [(name, here[impl]) for impl, name in h.peers if impl in here]
            figures.append(HeadlineFigures(f"{h.text}, {ours.shape}", ours, peers))
    return figures
