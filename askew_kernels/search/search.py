"""The differentiable search, with aligned sharpness-aware steps (ASGA) or without."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import atomic
from ..analysis.batches import check_count, check_iterable, moved, pair_of
from ..analysis.differentiable import as_written, copied
from ..analysis.generators import Generators, check_seed, seeded
from ..nn.kinds import SEARCHED
from ..optim import AlignedSAM
from ..optim.ranks import ProcessGroup
from .cost import Budget, Latency, MacsHook
from .mixed import FilterFn, mix_, mixed_layers
from .policy import Kinds, Policy
from .space import Space, check_solver

METHODS = ("asga", "plain")
SCHEDULES = ("joint", "alternating")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Settings:
    """What decides the outcome, besides model, data and loss; a checkpoint is only taken up by equal ones."""

    method: str
    schedule: str
    steps: int
    lr: float
    strength_lr: float
    weight_decay: float
    cost_weight: float
    temperature: tuple[float, ...]
    rho: float
    rho_min: float
    rho_max: float
    align: float
    learned_scales: bool
    seed: int

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_count("steps", self.steps)
        for name in "lr strength_lr weight_decay cost_weight rho rho_min rho_max align".split():
            value = getattr(self, name)
            if not _finite(value) or value < 0:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        pair = self.temperature
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(_finite(t) and t > 0 for t in pair)):
            raise ValueError(f"temperature: expected (first, last), both > 0, got {self.temperature!r}")
        if self.rho_max < self.rho_min:
            raise ValueError(f"rho_max: expected at least rho_min = {self.rho_min}, got {self.rho_max}")


class Feed:
    """Batches without end from anything that can be iterated again; knows its place, to resume: the state of the
    generators at the start of a pass, from which a shuffling loader has its order, is part of it."""

    def __init__(self, loader: Any, generators: Generators) -> None:
        check_iterable("loader", loader, "batches (x, y)")
        self.loader, self.generators, self.index, self.drawn = loader, generators, 0, 0
        self.start: dict[str, Any] = {}
        self.ahead: tuple[Any, Any] | None = None
        self.batches = self._passes()

    def _passes(self) -> Iterator[tuple[Any, Any]]:
        while True:
            self.start, self.index = self.generators.state(), 0
            for batch in self.loader:
                self.index += 1
                self.drawn += 1
                yield pair_of(batch, "loader: expected batches (x, y)")
            if self.index == 0:
                again = f"exhausted after {self.drawn} batches; expected one to iterate again (a DataLoader, a list)"
                raise ValueError(f"loader: {again if self.drawn else 'yielded no batch'}")

    def peek(self) -> tuple[Any, Any]:
        """The next batch, which stays the next."""
        self.ahead = self.ahead or next(self.batches)
        return self.ahead

    def next(self) -> tuple[Any, Any]:
        batch, self.ahead = self.peek(), None
        return batch

    def state(self) -> dict[str, Any]:
        return {"start": self.start, "index": self.index, "drawn": self.drawn, "now": self.generators.state()}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.generators.set_state(state["start"])
        self.ahead, self.batches = None, self._passes()
        for _ in range(state["index"]):
            next(self.batches)
        self.index, self.drawn = state["index"], state["drawn"]
        self.generators.set_state(state["now"])


class Search:
    """One search: the mixed copy of the model, its optimizers, and where it stands."""

    def __init__(self, model: nn.Module, feed: Feed, loss_fn: Callable[..., Tensor], space: Space, s: Settings) -> None:
        self.feed, self.loss_fn, self.space, self.settings = feed, loss_fn, space, s
        self.model = copied(model)
        searched = set(space.profile.layers)
        mix_(self.model, space.weight_bits, space.act_bits, lambda _m, name: name in searched, signed=space.signed,
             learned=s.learned_scales, kinds=space.kinds)  # fmt: skip
        self.layers = mixed_layers(self.model)
        self.model.train()
        self.processes, distributed = ProcessGroup(None), torch.distributed
        self.alone = not (distributed.is_available() and distributed.is_initialized())
        self.first = self.alone or distributed.get_rank() == 0
        for t in () if self.alone else (*self.model.parameters(), *self.model.buffers()):
            distributed.broadcast(t.detach(), 0)
        own = {id(p): p for m in self.layers.values() for p in (m.weight_strengths, m.act_strengths)}  # shared: once
        strengths = [p for p in own.values() if p.requires_grad]
        weights = [p for p in self.model.parameters() if id(p) not in own and p.requires_grad]
        given = ((weights, s.lr, s.weight_decay), (strengths, s.strength_lr, 0.0))
        groups = [{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in given if params]
        if not groups:
            raise ValueError("model: has no parameter that requires a gradient")
        if half := [n for n, p in self.model.named_parameters() if p.requires_grad and p.dtype == torch.float16]:
            raise ValueError(f"model: {half[0]} is float16, in which AdamW's steps are not finite; search with "
                             "copy.deepcopy(model).float(), its policy fits this one")  # fmt: skip
        parts = [groups] if s.schedule == "joint" else [[g] for g in groups]
        self.optimizers = [self._optimizer(part) for part in parts]
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        s = self.settings
        base = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        if s.method == "plain":
            return base
        return AlignedSAM(base, rho=s.rho, align=s.align, rho_min=s.rho_min, rho_max=s.rho_max, model=self.model,
                          telemetry_every=0)  # fmt: skip

    # ---- the loss -----------------------------------------------------------------------------------------------

    def probabilities(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (m.weight_probabilities(), m.act_probabilities()) for name, m in self.layers.items()}

    def expected_cost(self) -> Tensor:
        return self.space.cost.expected(self.probabilities())

    def penalty(self, expected: Tensor) -> Tensor:
        """λ |E[cost] / budget − 1|: the budget is there to be used up; without one, λ E[cost] / cost at 8 bits."""
        if self.space.budget is None:
            return self.settings.cost_weight * expected / self.space.cost_8bit
        return self.settings.cost_weight * (expected / self.space.budget.limit - 1).abs()

    def _anneal(self, step: int) -> None:
        """Temperature and learning rates of a step, counted from 0."""
        s, k = self.settings, step / max(1, self.settings.steps - 1)
        first, last = s.temperature
        for layer in self.layers.values():
            layer.temperature = first * (last / first) ** k
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group["lr"] = group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * min(1.0, k)))

    def advance(self) -> dict[str, float]:
        """One step; what it was like."""
        self._anneal(self.step)
        x, y = self.feed.next()
        device = next(self.model.parameters()).device
        x, y = moved(x, device), moved(y, device)
        optimizer = self.optimizers[self.step % len(self.optimizers)]
        every = list(self.model.parameters())
        task: list[Tensor] = []

        def closure() -> Tensor:
            for p in every:  # also of what the other optimizer steps
                p.grad = None
            loss = self.loss_fn(self.model(x), y)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(f"loss_fn: expected a scalar tensor, got {loss!r:.80}")
            if not loss.requires_grad:
                raise ValueError("loss_fn: does not depend on the model (is its output detached, or an argmax?)")
            if not bool(loss.detach().isfinite()):
                raise ValueError(f"loss: expected a finite number, got {float(loss.detach())} at step {self.step + 1}")
            task.append(loss.detach())
            total = loss + self.penalty(self.expected_cost())
            total.backward()
            for p in () if self.alone else every:
                p.grad = None if p.grad is None else self.processes.mean(p.grad)
            return total.detach()

        optimizer.step(closure)  # type: ignore[arg-type]
        self.step += 1
        with torch.no_grad():
            loss = float(self.processes.mean(task[0]))
            row = {"step": self.step, "loss": loss, "expected": float(self.expected_cost())}
        if isinstance(optimizer, AlignedSAM):
            row |= {"surrogate_gap": float(optimizer.gap), "rho": float(optimizer.report["rho"])}  # type: ignore[arg-type]
        self.history.append(row)
        return row

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a search that goes on must have in common with the one that stopped."""
        space, budget, cost = self.space, self.space.budget, self.space.cost
        costs = {"fixed": cost.fixed, "tables": {name: t.tolist() for name, t in cost.tables.items()}}
        shapes = {k: [str(t.dtype), *t.shape] for k, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        return {"settings": dataclasses.asdict(self.settings), "weight_bits": list(space.weight_bits),
                "act_bits": list(space.act_bits), "budget": None if budget is None else [budget.kind, budget.limit],
                "layers": list(space.profile.layers), "costs": costs, "model": shapes}  # fmt: skip

    def save(self, path: Path) -> None:
        """Everything that the next step depends on; the file is replaced only by a whole one."""
        state = {"askew_search": 1, "identity": self._identity(), "step": self.step, "model": self.model.state_dict(),
                 "optimizers": [o.state_dict() for o in self.optimizers], "feed": self.feed.state(),
                 "history": self.history, "seconds": self.seconds}  # fmt: skip
        with atomic.replacing(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        """Takes up where ``save`` stopped. ValueError for what is not a checkpoint of this very search."""
        try:
            state = torch.load(path, weights_only=True, map_location=next(self.model.parameters()).device)
            if state["askew_search"] != 1:
                raise ValueError(state["askew_search"])
        except Exception as problem:
            raise ValueError(f"{path}: not a checkpoint of a search ({type(problem).__name__})") from None
        mine, theirs = _flat(self._identity()), _flat(state["identity"])
        different = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if different:
            differ = f"{', '.join(different)} differ"
            raise ValueError(f"{path}: of another search ({differ}); give another file or remove it")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self._anneal(max(0, self.step - 1))
        self.feed.resume(state["feed"])

    # ---- the end ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """log p of every pair of candidates, (Kw, Ka) a layer."""
        found = {}
        for name in self.space.names:
            m = self.layers[name]
            weights, acts = (torch.log_softmax(b.double() / m.temperature, 0).cpu()
                             for b in (m.weight_strengths, m.act_strengths))  # fmt: skip
            found[name] = weights[:, None] + acts[None]
        return found

    @torch.no_grad()
    def policy(self) -> Policy:
        values = self.values()
        choice, best = self.space.choose(values), self.space.best(values)
        budget = self.space.budget
        last = self.history[-max(1, len(self.history) // 10) :]
        report: dict[str, Any] = {
            "method": self.settings.method, "settings": dataclasses.asdict(self.settings), "seconds": self.seconds,
            "expected": {self.space.cost.kind: float(self.expected_cost())},
            "by_knapsack": budget is not None and self.space.cost.of(best) > budget.limit,
            "raised": [n for n in self.space.names if choice[n] != best[n] and
                       all(c >= b for c, b in zip(choice[n], best[n], strict=True))],
            "probabilities": {n: {"weights": w.tolist(), "inputs": a.tolist()}
                              for n, (w, a) in self.probabilities().items()},
            "history": self.history[:: max(1, len(self.history) // 200)],
            **{key: sum(r[key] for r in last) / len(last) for key in ("loss", "surrogate_gap") if key in last[-1]},
        }  # fmt: skip
        return self.space.policy(choice, report)


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """One level, sequences as lists."""
    given = {**identity, **identity["settings"]}
    return {key: [*value] if type(value) is tuple else value for key, value in given.items() if key != "settings"}


Progress = Callable[[dict[str, float]], None]


@contextlib.contextmanager
def _shown(progress: bool | Progress | None, search: Search) -> Iterator[Progress]:
    """What is called with each step's row: the caller's function, rich's progress bar, or nothing."""
    if callable(progress):
        yield progress
        return
    wanted = sys.stderr.isatty() if progress is None else progress
    if not wanted or not search.first or importlib.util.find_spec("rich") is None:
        yield lambda row: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("search"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=search.settings.steps, completed=search.step)  # type: ignore[arg-type]

        def show(row: dict[str, float]) -> None:
            text = f"loss {row['loss']:.3f}, expected {search.space.cost.kind} {row['expected']:.4g}"
            bar.update(task, completed=row["step"], description=text)  # type: ignore[arg-type]

        yield show


def search_policy(model: nn.Module, loader: Any, loss_fn: Callable[..., Tensor], *,
                  weight_bits: Sequence[int] = (2, 3, 4, 8), act_bits: Sequence[int | None] = (None,),
                  budget: Budget | None = None, cost_weight: float = 1.0, steps: int = 500, method: str = "asga",
                  schedule: str = "joint", lr: float = 1e-3, strength_lr: float = 0.02, weight_decay: float = 0.0,
                  temperature: tuple[float, float] = (1.0, 0.2), rho: float = 0.05, rho_min: float = 0.01,
                  rho_max: float = 0.2, align: float = 1e-3, learned_scales: bool = False, seed: int = 0,
                  filter_fn: FilterFn | None = None, hooks: Mapping[type[nn.Module], MacsHook] | None = None,
                  latency: Latency | None = None, kinds: Kinds = SEARCHED, checkpoint: str | os.PathLike | None = None,
                  checkpoint_every: int = 50, progress: bool | Progress | None = None) -> Policy:  # fmt: skip
    """The bits of every layer of these ``kinds`` of ``model``, searched on a small proxy data set.

    Every layer becomes a mixture of its candidate quantizations (``mix_``), in a copy of the model; weights and
    strengths β are trained together, and the strongest candidates are the policy::

        min over w, β of  loss_fn(model(x), y) + λ |E[cost] / budget − 1|
        without a budget: loss_fn(model(x), y) + λ E[cost] / cost at 8 bits

    ===================  =============================================================================================
    ``loader``           yields (x, y) and can be iterated again: a DataLoader, a list; x and y may be tensors, or
                         mappings, tuples, dataclasses of them
    ``weight_bits``      of 1 … 8; ``act_bits`` of 2 … 8 and None (float)
    ``budget``           the chosen policy never exceeds it: the strongest candidates where they meet it, else the exact
                         knapsack on the learned log-probabilities; what is left of it is spent (``Space.choose``)
    ``cost_weight``      λ
    ``method``           ``"asga"``: ``AlignedSAM`` over weights and strengths, radius from the surrogate gap within
                         [rho_min, rho_max], ``rho`` at first; ``"plain"``: the same base optimizer (AdamW) alone
    ``schedule``         ``"joint"``: one step for both; ``"alternating"``: weights and strengths in turn, each on its
                         own batches
    ``temperature``      T of softmax(β / T), from first to last, geometrically; learning rates fall along a cosine
    ``learned_scales``   scales are learned (LSQ) instead of following their rule
    ``filter_fn``        (module, name) -> whether to search this layer; the others stay float; ``kinds``: as in
                         ``quantize_``
    ``hooks``            MACs of other modules (``trace``); ``latency``: the table of ``Budget(latency=…)``
    ``checkpoint``       a file written every ``checkpoint_every`` steps, whole or not at all; where it is there, the
                         search goes on from it and ends as if it had never stopped
    ``progress``         True: a progress bar; a function: called with each step's row; None: a bar on a terminal
    ===================  =============================================================================================

    The seed decides everything that torch's, NumPy's and Python's generators do, and those of a DataLoader and its
    sampler; all are left as they were. Layers that share a weight get the same bits. Under torch.distributed give each
    process its part of every batch: gradients are averaged, every process returns the same policy.
    ``policy.report``: costs expected and chosen, loss, surrogate gap, probabilities, time, history; ``by_knapsack``:
    whether the strongest candidates exceeded the budget; ``raised``: layers with more bits than their strongest.
    Raises BudgetError (with the reachable range), ValueError naming the argument: no layer to quantize, no candidates,
    a loader that yields nothing or is exhausted, a loss that is not finite. Source: Ma et al., ICML 2025; Cai,
    Vasconcelos, EdMIPS, CVPR 2020.
    """
    given: Any = tuple(temperature) if isinstance(temperature, Sequence) else temperature
    settings = Settings(method, schedule, steps, lr, strength_lr, weight_decay, cost_weight, given, rho, rho_min,
                        rho_max, align, learned_scales, check_seed(seed))  # fmt: skip
    check_count("checkpoint_every", checkpoint_every)
    if budget is not None:
        check_solver()  # before the work, not after it
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        try:
            atomic.check(path)
        except OSError as problem:
            raise OSError(problem.errno, f"checkpoint: cannot be written ({problem.strerror})", str(path)) from None
    with torch.inference_mode(False), torch.enable_grad(), as_written(), seeded(seed, loader) as generators:
        feed = Feed(loader, generators)
        x, _ = feed.peek()  # for the traced forward
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        space = Space(model, moved(x, device), weight_bits, act_bits, budget, filter_fn=filter_fn, hooks=hooks,
                      latency=latency, kinds=kinds)  # fmt: skip
        search = Search(space.model, feed, loss_fn, space, settings)
        if path is not None and path.is_file():
            search.load(path)
        started = time.perf_counter() - search.seconds
        with _shown(progress, search) as show:
            while search.step < steps:
                row = search.advance()
                search.seconds = time.perf_counter() - started
                show(row)
                due = search.step % checkpoint_every == 0 or search.step == steps
                if path is not None and search.first and due:
                    search.save(path)
        return search.policy()
