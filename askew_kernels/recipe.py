"""The recommended training, whole: when eps falls, when scales freeze, in which order, for a number of steps."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .annealing import RECIPES, EpsilonAnnealing, Settings, family_of
from .nn import hard_quantize_, quantized_layers

__all__ = ["Recipe"]

OWN = ("steps", "average")  # of the state, beside EpsilonAnnealing's


class Recipe(EpsilonAnnealing):
    """Sets up and follows a training of ``steps`` steps of an optimizer that was made with ``ak.param_groups(model)``.

        recipe = ak.Recipe(model, optimizer, steps)
        …;  optimizer.step();  schedule.step();  recipe.step()      # the learning rate's schedule stays yours
        ak.hard_quantize_(model)                                    # or recipe.finish()

    It is an ``EpsilonAnnealing`` that counts steps and takes its numbers from a row of ``ak.RECIPES``: the one of the
    optimizer's family ("adam" where its groups have betas, otherwise "sgd"), or ``settings``: another row's name, or
    ``annealing.Settings``. Single numbers are changed by name: ``hold=0.3``, ``clamp=False``. Shares are of ``steps``.

    step(): once after each ``optimizer.step()`` and the learning rate's schedule, so once for all micro-batches; a step
    that a GradScaler leaves out counts, as it does for the learning rate. Optimizers around others (SAM, ``Skewed``)
    are taken as they are.

    ``average``: over the last steps of the hold, this share, the mean of the weights (and learned scales) under the
    constraint is kept; the annealing starts from it. Costs a copy of them and one pass a step meanwhile.

    ``state_dict`` beside the model's and the optimizer's resumes bit for bit, from anywhere; without averages it is
    plain numbers and text. Raises TypeError/ValueError naming the argument or the layer that is not as it should be,
    before anything is written.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *,
        settings: str | Settings | None = None, **changes: Any,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
            raise TypeError(f"steps: expected the number of the optimizer's steps, got {steps!r}")
        steps = int(steps)
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        row = _settings(optimizer, settings, changes)
        _check_groups(model, optimizer, row)
        self.model: nn.Module = model
        self.steps: int = steps
        self.average: float = float(row.average)
        self._mean: list[Tensor] = []
        hold = min(round(row.hold * steps), steps - 1)
        super().__init__(
            optimizer, hold=hold, total=max(hold + 1, round(row.end * steps)), mode=row.mode, power=row.power,
            keep_pull=row.keep_pull, pull=row.pull, skew=row.skew, clamp=row.clamp, spread=row.spread,
            freeze=None if row.freeze is None else round(row.freeze * steps),
        )  # fmt: skip

    @property
    def finished(self) -> bool:
        """Whether eps is at its floor: what is left of the steps moves weights to their levels and keeps them there."""
        return self.last_epoch >= (self.total or 0)

    def step(self, epoch: int | None = None) -> None:
        """After one step of the optimizer and of the learning rate's schedule. ``epoch``: the step to be at instead."""
        super().step(epoch)
        if self.average:
            self._average()

    def finish(self) -> nn.Module:
        """``ak.hard_quantize_(model)``: every weight on its level. Gives the model; warns where eps is still above its
        floor, so that weights are moved by more than the constraint leaves to them."""
        if not self.finished:
            eps = max(self.get_last_eps())
            warnings.warn(f"Recipe: finish() after {self.last_epoch} of {self.steps} steps, with eps = {eps:.3g}: "
                          "weights away from their levels are rounded", stacklevel=2)  # fmt: skip
        return hard_quantize_(self.model)

    def _averaged(self) -> list[Tensor]:
        """What has a mean: weights under the constraint, and scales that learn."""
        return [p for group in self.optimizer.param_groups if group.get("grid") is not None for p in group["params"]]

    @torch.no_grad()
    def _average(self) -> None:
        """The mean of the last ``average * steps`` steps of the hold; put in place when the hold ends."""
        first = self.hold - max(1, round(self.average * self.steps))
        k = self.last_epoch - first
        if not 0 < k <= self.hold - first:
            return
        params = self._averaged()
        if k == 1 or not self._mean:
            self._mean = [p.detach().clone() for p in params]
        else:
            torch._foreach_lerp_(self._mean, params, 1 / k)
        if self.last_epoch == self.hold:
            for p, mean in zip(params, self._mean, strict=True):
                p.copy_(mean)
            self._mean = []

    def state_dict(self) -> dict[str, Any]:
        """Everything but model and optimizer: numbers, text, lists; tensors of means while there are some."""
        own = {key: getattr(self, key) for key in OWN}
        return {**super().state_dict(), **own, "mean": [t.clone() for t in self._mean]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of ``state_dict``; sets the groups. Raises ValueError before anything changes."""
        missing = {*OWN, "mean"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict: expected a Recipe's keys, got none of {sorted(missing)}")
        mean, params = state_dict["mean"], self._averaged()
        shapes = [tuple(t.shape) for t in mean], [tuple(p.shape) for p in params]
        if mean and shapes[0] != shapes[1]:
            raise ValueError(f"state_dict: mean: expected tensors of shapes {shapes[1]}, got {shapes[0]}")
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in (*OWN, "mean")})
        self.steps, self.average = state_dict["steps"], state_dict["average"]
        self._mean = [t.detach().to(p.device, p.dtype, copy=True) for t, p in zip(mean, params, strict=False)]


def _settings(optimizer: torch.optim.Optimizer, settings: str | Settings | None, changes: dict[str, Any]) -> Settings:
    """The row with its changes, checked as far as EpsilonAnnealing does not."""
    if settings is None:
        settings = family_of(optimizer)
    if isinstance(settings, str):
        if settings not in RECIPES:
            raise ValueError(f"settings: expected one of {', '.join(RECIPES)}, got {settings!r}")
        settings = RECIPES[settings]
    elif not isinstance(settings, Settings):
        raise TypeError(f"settings: expected a name or annealing.Settings, got {settings!r}")
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in changes:
        if name not in known:
            raise TypeError(f"{name}: unknown argument; expected one of {', '.join(known)}")
    row = dataclasses.replace(settings, **changes)
    for name in ("hold", "end", "freeze", "average"):
        share = getattr(row, name)
        if share is None and name == "freeze":
            continue
        if isinstance(share, bool) or not isinstance(share, numbers.Real):
            raise TypeError(f"{name}: expected a share of the steps, got {share!r}")
        if not 0 <= float(share) <= 1:
            raise ValueError(f"{name}: expected a share of the steps in [0, 1], got {share}")
    if row.hold >= row.end:
        raise ValueError(f"hold: expected a share below end={row.end}, got {row.hold}")
    if row.average > row.hold:
        raise ValueError(f"average: expected at most hold={row.hold}, got {row.average}")
    return row


def _check_groups(model: nn.Module, optimizer: torch.optim.Optimizer, row: Settings) -> None:
    """ValueError where a layer's weight trains without the constraint."""
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("model: has no quantized layers; call ak.quantize_(model) and make the optimizer after it")
    groups = [group for group in optimizer.param_groups if group.get("grid") is not None]
    held = {id(p) for group in groups for p in group["params"]}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")  # None where it is computed from others
        if weight is not None and weight.requires_grad and id(weight) not in held:
            raise ValueError(f"optimizer: {name}.weight is in no parameter group with a grid; make it with "
                             "ak.param_groups(model)")  # fmt: skip
    if row.spread and not any(group.get("stage") for group in groups):
        raise ValueError("spread: no parameter group has a stage; make the optimizer with "
                         "ak.param_groups(model, stages=2)")  # fmt: skip
