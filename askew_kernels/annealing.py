"""Schedules for the constraint's eps: from 1 (everything feasible) to almost 0 (only the levels are)."""

from __future__ import annotations

import math
import numbers
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

MODES = ("gap", "geometric", "linear", "cosine")
FLOOR = 1.6e-5
STATE = ("hold", "total", "mode", "power", "decay", "floor", "keep_pull", "last_epoch", "_first")
# What states of the first releases have not, and what it was there.
LATER = {"clamp": None, "freeze": None, "outer_hold": None, "outer_freeze": None, "outer_power": None, "start": None,
         "full": None}  # fmt: skip
#: Group keys that stand under another name where the optimizer that is wrapped has one of that name itself.
ELSEWHERE = {"alpha": "constraint_alpha", "clamp": "constraint_clamp", "rho": "sam_rho", "eta": "sam_eta",
             "adaptive": "sam_adaptive"}  # fmt: skip
MOST_ALPHA = 2.0**100  # that keep_pull makes, so that float32 holds it and what it is multiplied by
POWER = 12.0  # where the hold is given: a gap that opens late, however early the annealing begins


def key_in(group: Mapping[str, Any], name: str) -> str:
    """The key of ``group`` that holds what this package calls ``name``."""
    other = ELSEWHERE.get(name, name)
    return other if other in group else name


@dataclass(frozen=True)
class Settings:
    """A row of the recipe. Shares are of all steps; "outer" are the groups with ``order="outer"``, which
    ``ak.param_groups`` makes of the first and the last layer."""

    start: float = 0.0  # share before which layers compute with the float weights in training
    full: float | None = 0.7  # share from which they do with the quantized ones, going over in between; None: at start
    freeze: float = 0.75  # share after which scales are frozen, and weights clamped to the hull
    hold: float = 0.99  # share in which eps is 1
    power: float = 1.0
    outer_freeze: float | None = None  # None: as the others
    outer_hold: float | None = None
    outer_power: float | None = None
    end: float = 1.0  # share after which eps is at its floor
    mode: str = "gap"
    keep_pull: bool = True
    clamp: bool = True


#: The one home of the recipe's numbers: by the optimizer's family, and of models that are trained already.
RECIPES = {"sgd": Settings(full=0.5), "adam": Settings(), "finetune": Settings(full=0.0, freeze=0.1)}


def family_of(optimizer: torch.optim.Optimizer) -> str:
    """The row of ``RECIPES`` for an optimizer, by what its groups hold: "adam" with betas, otherwise "sgd"."""
    return "adam" if any("betas" in group for group in optimizer.param_groups) else "sgd"


class EpsilonAnnealing(LRScheduler):
    """Sets ``constraint_eps`` of every group with a grid; a ``torch.optim.lr_scheduler`` that leaves ``lr`` alone.

    The k-th period (epoch or batch: whatever the caller counts ``step()`` in) has, with j = k - hold, K = total - hold:

    =============  ==================================================================================================
    ``gap``        gap = (j / K)^power, eps = (1 - gap^2)^2: the infeasible share of a bracket grows from 0 to 1
    ``geometric``  eps = decay^j (published: hold 50, 0.96; hold 20, 0.99; hold 100, 0.95); decay defaults to the one
                   that reaches ``floor`` at ``total``
    ``linear``     eps = 1 - j / K
    ``cosine``     eps = (1 + cos(pi j / K)) / 2
    =============  ==================================================================================================

    ``keep_pull``: also set alpha_k = alpha lr_max / lr_k, lr_max the largest learning rate so far (so a warm-up is not
    taken for it), so that the pull towards feasibility in one step stays the same while the learning rate decays; with
    a constant alpha and lr -> 0 the weights never arrive at their levels. alpha follows lr at every step of the
    optimizer. Call ``step()`` after the LR scheduler's; the other order is noticed.
    ``freeze``: the period from which scales are frozen (and weights clamped to the hull, where ``clamp``), if before
    the hold ends. ``clamp``: what the groups are told; None: as they have it. ``outer_hold``, ``outer_freeze``,
    ``outer_power``: those of groups with ``order="outer"``; None: as the others. ``start``: the period before which
    the groups' layers compute in training with the float weights, as float layers do (in eval always with the quantized
    ones); ``full``: the period from which they do with the quantized ones, on the way in between
    (``ops.soft_quantize``, the slack falling from 1 to 0 as a line; layers that multiply levels change over midway, or,
    where they learn their scale as well, quantize from the first step); None: from ``start`` on. What is learned has a
    gradient always: scales of weights LSQ's, with what is computed with in the place of s Q(w/s); inputs whose scale is
    learned are quantized from the first step.

    Nothing given but ``total`` is the recommended recipe, ``RECIPES[family_of(optimizer)]``; ``ak.Recipe`` takes it
    from a number of steps. With ``hold`` scales freeze when it ends, all groups are alike, and power is 12. Other modes
    than the recipe's default to hold 0, a constant alpha and what the groups have, as published.

    eps is 1 during the hold and never below ``floor``. Where a group's is a tensor it is filled in place, so compiled
    steps and CUDA graphs see the new value without recompiling; so is an ``alpha`` that is a tensor, which
    ``keep_pull`` needs under CUDA graphs, and where a learning rate on a GPU is not to be waited for. A captured graph
    has its layers float, on the way or quantized, its scales frozen or not: capture again at ``start``, one period
    after it, at ``full``, at ``freeze``, and when the hold ends.
    A checkpoint needs ``state_dict()`` beside the model's and the optimizer's: a new annealing on an optimizer that is
    annealed already warns (UserWarning) at the first step. ``state_dict`` is plain numbers and text, for JSON too.
    Raises ValueError/TypeError naming the argument.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, hold: int | None = None, total: int | None = None,
        mode: str | None = None, power: float | None = None, decay: float | None = None, floor: float = FLOOR,
        keep_pull: bool | None = None, clamp: bool | None = None, freeze: int | None = None,
        outer_hold: int | None = None, outer_freeze: int | None = None, outer_power: float | None = None,
        start: int | None = None, full: int | None = None,
    ) -> None:  # fmt: skip
        # Not LRScheduler's: it would write learning rates and what other schedulers keep in the groups.
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        row = RECIPES[family_of(optimizer)]
        mode = row.mode if mode is None else mode
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if total is not None:
            total = _periods("total", total)
        given = {"hold": hold, "freeze": freeze, "outer_hold": outer_hold, "outer_freeze": outer_freeze, "start": start,
                 "full": full}  # fmt: skip
        periods = {name: None if value is None else _periods(name, value) for name, value in given.items()}
        if mode == row.mode and decay is None:
            keep_pull = row.keep_pull if keep_pull is None else keep_pull
            if hold is None and total is not None:
                periods = {
                    n: row_periods(row, n, total / row.end, total) if p is None else p for n, p in periods.items()
                }
                power = row.power if power is None else power
                outer_power = row.outer_power if outer_power is None else outer_power
                clamp = row.clamp if clamp is None else clamp
        hold, power = periods["hold"] or 0, POWER if power is None else power
        first = hold if periods["freeze"] is None else min(hold, periods["freeze"])
        for name, chosen in (("start", start), ("full", full)):
            if chosen is not None and (periods[name] or 0) > first:
                raise ValueError(f"{name}: expected a period up to {first}, where scales are frozen, got {chosen}")
            now = periods[name]
            periods[name] = None if now is None else min(now, first)  # what is frozen is computed with
        if full is not None and periods["full"] < (periods["start"] or 0):  # type: ignore[operator]
            raise ValueError(f"full: expected a period from start={periods['start']} on, got {full}")
        for name, value in (("floor", floor), ("power", power), ("decay", decay),
                            ("outer_power", outer_power)):  # fmt: skip
            if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if not 0 < floor <= 1:
            raise ValueError(f"floor: expected a number in (0, 1], got {floor}")
        for name, value in (("power", power), ("outer_power", outer_power)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number > 0, got {value}")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay: expected a number in (0, 1), got {decay}")
        if decay is not None and mode != "geometric":
            raise ValueError(f"decay: only for mode='geometric', got mode={mode!r}")
        if total is None and decay is None:
            raise ValueError(f"total: mode={mode!r} needs the number of periods" + " or decay" * (mode == "geometric"))
        for name in ("hold", "outer_hold"):
            if total is not None and total <= (periods[name] or 0):
                raise ValueError(f"total: expected more than {name}={periods[name]}, got {total}")
        for name, value in (("keep_pull", keep_pull), ("clamp", clamp)):
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name}: expected True, False or None, got {value!r}")
        if not any(group.get("grid") is not None for group in optimizer.param_groups):
            raise ValueError("optimizer: no parameter group has a grid; see ak.param_groups")
        self.optimizer = optimizer
        if any("constraint_eps" not in group for _, group in self._groups()):
            raise ValueError(f"optimizer: {type(optimizer).__name__} has no constraint; see ak.optim.Skewed")
        self.hold, self.total, self.mode = hold, total, mode
        self.power, self.decay, self.floor = float(power), None if decay is None else float(decay), float(floor)
        self.keep_pull, self.clamp, self.freeze = bool(keep_pull), clamp, periods["freeze"]
        self.outer_hold, self.outer_freeze = periods["outer_hold"], periods["outer_freeze"]
        self.start, self.full = periods["start"], periods["full"]
        self.outer_power = None if outer_power is None else float(outer_power)
        self._first: dict[str, list[Any]] = {}  # by group: [the largest lr so far, alpha as it was given]
        self._seen: dict[str, Any] = {}  # by group: the lr that alpha belongs to
        self.last_epoch, self._step_count = 0, 1
        self.base_lrs = self.get_last_lr()
        self._told_share: float | None = None  # what the quantizers were told last
        self._slack: dict[torch.device, torch.Tensor] = {}  # of theirs, one on each device
        self._late, self._looked, self._calls, self._crowded = 0, False, 0, 0
        self._ahead = self._further_along()  # as the groups were found, before they are set
        self._hook()
        self._apply()

    def eps_at(self, k: int, outer: bool = False) -> float:
        """eps of period k, or that of the outer groups."""
        hold, _, power = self._schedule(outer)
        j = k - hold
        if j <= 0:
            return 1.0
        periods = math.inf if self.total is None else self.total - hold
        share = min(1.0, j / periods)
        if self.mode == "geometric":
            eps = (self.floor ** (1 / periods) if self.decay is None else self.decay) ** j
        elif self.mode == "gap":
            eps = (1 - share ** (2 * power)) ** 2
        else:
            eps = 1 - share if self.mode == "linear" else (1 + math.cos(math.pi * share)) / 2
        return min(1.0, max(self.floor, eps))

    def frozen_at(self, k: int, outer: bool = False) -> bool:
        """Whether scales are frozen in period k, in groups with freeze_scale="anneal"."""
        hold, freeze, _ = self._schedule(outer)
        return k > hold or (freeze is not None and k >= freeze)

    def _schedule(self, outer: bool) -> tuple[int, int | None, float]:
        """hold, freeze, power."""
        if not outer:
            return self.hold, self.freeze, self.power
        hold = self.hold if self.outer_hold is None else self.outer_hold
        freeze = self.freeze if self.outer_freeze is None else self.outer_freeze
        return hold, freeze, self.power if self.outer_power is None else self.outer_power

    def step(self, epoch: int | None = None) -> None:
        """The next period, or period ``epoch``."""
        self._ahead = self._ahead or self._further_along()
        self._warn_if_ahead()
        if not self._stepped and self._step_count == 1 and self._counts and not self._overflowed():
            _warn("step() before the first optimizer.step(): the first period is skipped; call optimizer.step() first")
        self._step_count += 1
        self._calls += 1
        self.last_epoch = self.last_epoch + 1 if epoch is None else _periods("epoch", epoch)
        self._apply()

    def _apply(self) -> None:
        self._separate()
        for _, group in self._groups():
            eps, present = self._eps_of(group), group["constraint_eps"]
            new = present.fill_(eps) if isinstance(present, torch.Tensor) else eps
            if self._by_old_name(group, present):
                group["eps"] = new
            group["constraint_eps"] = new
            # Known on the host even where eps lives on a device, and where eps is still 1 by rounding.
            group["annealing"] = self._freezes(group)
            if self.clamp is not None:
                group[key_in(group, "clamp")] = self.clamp
        self._stepped = self._told = False
        self._follow_lr()
        self._soften(self.slack_at(self.last_epoch))

    def slack_at(self, k: int) -> float:
        """How far layers are in period k, in training, from the quantized weights to the float ones: 1 to 0."""
        start, full = self.start or 0, self.full or 0
        return 1.0 if k < start else (full - k) / (full - start) if k < full else 0.0

    def _soften(self, share: float) -> None:
        """Tells the layers, by their weights' quantizers: on the way each time, since some may have come later."""
        for tensor in self._slack.values():
            tensor.fill_(share)
        for _, group in self._groups() if share or share != self._told_share else ():
            for p in group["params"]:
                if (quantizer := getattr(p, "_askew_quantizer", None)) is not None:
                    if p.device not in self._slack:
                        self._slack[p.device] = torch.tensor(share, dtype=torch.float32, device=p.device)
                    quantizer.soften(share, self._slack[p.device])
        self._told_share = share

    def _separate(self) -> None:
        """Outer groups that share the tensor of eps with others get one of their own."""
        groups = [group for _, group in self._groups()]
        others = [group["constraint_eps"] for group in groups if not _is_outer(group)]
        for group in groups if self._schedule(True) != self._schedule(False) else ():
            eps = group["constraint_eps"]
            if _is_outer(group) and isinstance(eps, torch.Tensor) and any(eps is other for other in others):
                group["constraint_eps"] = eps.clone()
                if self._by_old_name(group, eps):
                    group["eps"] = group["constraint_eps"]

    def _by_old_name(self, group: dict[str, Any], eps: Any) -> bool:
        """Whether ``eps`` in the group is the constraint's, by its old name, and not the base rule's own."""
        optimizer = getattr(self.optimizer, "base_optimizer", self.optimizer)
        return group.get("eps") is eps and getattr(optimizer, "_old_names", {}).get("eps") == "constraint_eps"

    def _eps_of(self, group: dict[str, Any]) -> float:
        return self.eps_at(self.last_epoch, _is_outer(group))

    def _freezes(self, group: dict[str, Any]) -> bool:
        return self.frozen_at(self.last_epoch, _is_outer(group))

    def _overflowed(self) -> bool:
        """Whether a gradient is inf or NaN: a GradScaler has left the optimizer's step out. Waits for the device."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return any(not bool(torch.isfinite(g.coalesce().values() if g.is_sparse else g).all()) for g in grads)

    def _groups(self) -> list[tuple[str, dict[str, Any]]]:
        return [(str(i), g) for i, g in enumerate(self.optimizer.param_groups) if g.get("grid") is not None]

    def _follow_lr(self) -> bool:
        """alpha for the learning rates as they are; whether one is another than before."""
        moved = False
        for index, group in self._groups() if self.keep_pull else ():
            lr = group["lr"]
            seen = (id(lr), lr._version) if isinstance(lr, torch.Tensor) else lr  # a GPU is asked only when it changed
            if self._seen.get(index) == seen:
                continue
            moved, self._seen[index] = True, seen
            key = key_in(group, "alpha")
            present = group[key]  # a tensor is filled, where the replay of a CUDA graph looks for it
            if _elsewhere(lr) and isinstance(present, torch.Tensor):
                self._pull_there(index, lr, present)
            elif (lr := float(lr)) > 0:
                first = self._first.setdefault(index, [lr, float(present)])
                first[0] = max(first[0], lr)
                alpha = min(first[1] * first[0] / lr, max(first[1], MOST_ALPHA))
                group[key] = present.fill_(alpha) if isinstance(present, torch.Tensor) else alpha
        return moved

    def _pull_there(self, index: str, lr: torch.Tensor, alpha: torch.Tensor) -> None:
        """alpha on the device of both, which is not waited for."""
        first = self._first.setdefault(index, [lr.clone(), alpha.clone()])
        peak, given = (torch.as_tensor(x, dtype=lr.dtype, device=lr.device) for x in first)
        first[0] = torch.maximum(peak, lr)
        most = given.clamp(min=MOST_ALPHA)
        alpha.copy_(torch.where(lr > 0, torch.minimum(given * first[0] / lr, most), alpha))

    def _hook(self) -> None:
        """Looks at each step of the optimizer; the newest annealing of an optimizer is the one that does."""
        myself, self._counts = weakref.ref(self), False

        def before_step(*_: Any) -> None:
            if not torch.compiler.is_compiling() and (annealing := myself()) is not None:
                annealing._before_step()

        for optimizer in (self.optimizer, getattr(self.optimizer, "base_optimizer", None)):  # a sharpness-aware one's
            if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks"):
                if (old := getattr(optimizer, "_askew_annealing", None)) is not None:
                    old.remove()
                optimizer._askew_annealing = optimizer.register_step_pre_hook(before_step)  # type: ignore[attr-defined]
                self._counts = True

    def _before_step(self) -> None:
        first, self._stepped = not self._stepped, True
        self._warn_if_ahead()
        self._crowded, self._calls = self._crowded + 1 if self._calls > 1 else 0, 0
        if self._crowded == 3:  # once may be a GradScaler that looks for its scale
            _warn("step() is called several times between two steps of the optimizer, so that the schedule runs ahead "
                  "of it; with micro-batches call it once for all of them, after optimizer.step()")  # fmt: skip
        moved = self._follow_lr()
        if first and self._step_count > 1:  # an LR scheduler that counts epochs moves now and then, not every time
            self._late = self._late + 1 if moved else 0
            if self._late == 2:
                _warn("step() comes before the LR scheduler's step(), so that keep_pull sees the learning rate of the "
                      "period before (alpha has followed it now); call it last")  # fmt: skip

    def _further_along(self) -> str:
        """How the optimizer's state is annealed further than this object; empty where it is not."""
        for _, group in self._groups():
            eps = group["constraint_eps"]
            known = not isinstance(eps, torch.Tensor) or (eps.device.type == "cpu" and type(eps) is torch.Tensor)
            if known and float(eps) < self._eps_of(group) * (1 - 1e-6):
                return f"eps = {float(eps):.3g}"
            if group.get("annealing") and not self._freezes(group):
                return "in the groups"
        return ""

    def _frozen(self) -> bool:
        return any(
            getattr(getattr(p, "_askew_quantizer", None), "frozen", False)
            for _, group in self._groups()
            if group.get("freeze_scale") == "anneal"
            and not isinstance(group.get("scale"), torch.Tensor)
            and not self._freezes(group)
            for p in group["params"]
        )

    def _warn_if_ahead(self) -> None:
        ahead = self._ahead
        if not ahead and not self._looked and self._frozen():
            ahead = "frozen scales"  # looked at once: before the first step of anything
        self._ahead, self._looked = "", True
        if ahead and not self._told:
            self._told = True
            _warn(f"the optimizer or its model is annealed already ({ahead}), but this annealing starts over with "
                  f"eps = {self.eps_at(self.last_epoch):.3g} (period {self.last_epoch}); to go on, save "
                  "annealing.state_dict() and give it to annealing.load_state_dict()")  # fmt: skip

    def get_last_eps(self) -> list[float]:
        """eps of each group with a grid."""
        return [self._eps_of(group) for _, group in self._groups()]

    def get_last_lr(self) -> list[Any]:
        """The learning rate of each group, which others set."""
        return [group["lr"] for group in self.optimizer.param_groups]

    get_lr = get_last_lr

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer: numbers, text, lists."""
        return {key: getattr(self, key) for key in (*STATE, *LATER)} | {
            "_first": {k: [float(x) for x in v] for k, v in self._first.items()}
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of ``state_dict``; sets the groups' eps. Raises ValueError before anything changes."""
        missing, unknown = sorted(set(STATE) - set(state_dict)), sorted(set(state_dict) - {*STATE, *LATER})
        if missing or unknown:
            raise ValueError(f"state_dict: expected EpsilonAnnealing's keys, got {unknown} instead of {missing}")
        self.__dict__.update({**LATER, **state_dict})
        self._first, self._told_share = {str(k): list(v) for k, v in state_dict["_first"].items()}, None
        self._step_count, self._ahead, self._looked, self._seen = self.last_epoch + 1, "", True, {}
        self._calls = self._crowded = 0
        self._apply()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hook()  # a copy looks at the copy of the optimizer


def row_periods(row: Settings, name: str, steps: float, total: int) -> int | None:
    """A share of the row as periods; what holds does so for less than ``total``, and what comes before scales are
    frozen as a share does so in whole periods, too."""
    if (share := getattr(row, name)) is None:
        return None
    periods = round(share * steps)
    if name in ("start", "full"):
        for later in ("hold", "freeze"):
            if (end := getattr(row, later)) is not None and share <= end:
                periods = min(periods, row_periods(row, later, steps, total))  # type: ignore[type-var]
    return min(periods, total - 1) if "hold" in name else periods


def _is_outer(group: dict[str, Any]) -> bool:
    return group.get("order") == "outer"


def _elsewhere(lr: Any) -> bool:
    """Whether reading it would wait for a device."""
    return isinstance(lr, torch.Tensor) and lr.device.type != "cpu"


def _warn(text: str) -> None:
    warnings.warn(f"EpsilonAnnealing: {text}", stacklevel=4)


def _periods(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected a number of periods, got {value!r}")
    if value < 0:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number of periods >= 0, got {value}")
    return int(value)
