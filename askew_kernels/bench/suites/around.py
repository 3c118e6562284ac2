"""Suite ``around``: what trainers put around a training step. Micro-batches, whose gradients are summed for one step,
while fine-tuning MiniLM; and torch.compile of a GPT, where ours reads the copy that the optimizer wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ... import optim
from .. import peers
from ..goals import Goal, Headline, ratio
from ..harness import Case, Context, Entry, Impl
from . import common, train
from .train import ANNEALED, OURS, WIDE, Training

PARTS = 4
PHASES = (("", 1.0), (ANNEALED, WIDE["annealed"]))  # (name, constraint_eps)
MICRO_BATCHES = f"fine-tuning step of {PARTS} micro-batches, MiniLM"
COMPILED_STEP = "training step, GPT, torch.compile"
COMPILED = ", compiled"


class InParts(Training):
    """A step on the mean gradient of so many parts of the batch."""

    def step(self) -> None:
        x, y = self.ready or self.task.batch(len(self.losses))
        self.ready = None
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for part, wanted in zip(x.chunk(PARTS), y.chunk(PARTS), strict=True):
            loss = self.loss(self.model(part), wanted) / PARTS
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.losses.append(total)


def impl_of(training: Training, expected: float, name: str = "", kind: str = "peer") -> Impl:
    check = functools.partial(train.check_losses, training, expected)
    return Impl(name, training.step, kind, None, check, training.prepare, losses=training.losses)


def micro_batches_case(context: Context) -> Case:
    names = [OURS + phase for phase, _ in PHASES]
    if missing := peers.why_no_minilm():
        return Case("MiniLM", "float32", "float", [Impl(name, missing=missing) for name in ("float", *names)], 0)
    name, task, fresh = train.minilm(context, parts=PARTS)
    ids, directions = task.batch(0)
    with torch.no_grad():
        expected = float(train.away(fresh()(ids), directions))

    def plain() -> Training:
        model = fresh()
        optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, fused=True)
        return InParts(task, context, model, optimizer, loss=train.away)

    def own(eps: float) -> Impl:
        return impl_of(train.own_fine_tuning(task, context, fresh(), eps, training=InParts), expected)

    impls = [impl_of(plain(), expected, "float", "baseline")]
    for phase, eps in PHASES:
        impls += common.ours(context, OURS + phase, functools.partial(own, eps))
    return Case(name, "float32", "float", impls, 0, work=ids.numel(), work_unit="tokens", turns=task.turns)


def compiled_case(context: Context) -> Case:
    name, task = train.gpt_task(context)
    fresh, expected = train.starting_point(context, task)

    def made(how: Callable[[nn.Module], Training], compiled: bool) -> Impl:
        training = how(fresh())
        if compiled:
            training.model = torch.compile(training.model)  # type: ignore[assignment]
        return impl_of(training, expected)

    def plain(model: nn.Module) -> Training:
        return Training(task, context, model, torch.optim.AdamW(model.parameters(), lr=task.lr, fused=True))

    def own(eps: float, model: nn.Module) -> Training:
        groups = train.quantized_groups(model, task.ends)
        return Training(task, context, model, optim.ASkewAdamW(groups, lr=task.lr, constraint_eps=eps))

    baseline = made(plain, False)
    baseline.name, baseline.kind = "float", "baseline"
    impls = [baseline, common.when_compiled(context, f"float{COMPILED}", functools.partial(made, plain, True))]
    for phase, eps in PHASES:
        how: Any = functools.partial(own, eps)
        impls += common.ours(context, OURS + phase, functools.partial(made, how, False))
        for impl in common.ours(context, OURS + phase + COMPILED, functools.partial(made, how, True)):
            impl.missing = impl.missing or common.why_no_compile(context, quick=False)
            impl.first_call = "compilation included"
            impls.append(impl)
    work = task.batch(0)[0].numel()
    return Case(name, "float32", "float", impls, 0, work=work, work_unit="tokens", turns=task.turns)


ENTRIES = [Entry(MICRO_BATCHES, micro_batches_case), Entry(COMPILED_STEP, compiled_case)]

GOALS = [
    *[Goal(f"hard QAT {MICRO_BATCHES}{phase} ÷ float", "<=", 1.03, ratio(MICRO_BATCHES, OURS + phase))
      for phase, _ in PHASES],
    *[Goal(f"hard QAT {COMPILED_STEP}{phase} ÷ eager", "<=", 1.0,
           ratio(COMPILED_STEP, OURS + phase + COMPILED, OURS + phase)) for phase, _ in PHASES],
]  # fmt: skip

HEADLINES: list[Headline] = []
