"""The recommended training, whole: when scales freeze, when eps falls, of which layers, for a number of steps."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from typing import Any

import torch
from torch import nn

from .annealing import RECIPES, EpsilonAnnealing, Settings, family_of, row_periods
from .nn import hard_quantize_, quantized_layers
from .nn.convert import tell_passed

__all__ = ["Recipe"]

SHARES = ("hold", "freeze", "outer_hold", "outer_freeze", "start", "full")


class Recipe(EpsilonAnnealing):
    """Sets up and follows a training of ``steps`` steps of an optimizer that was made with ``ak.param_groups(model)``.

        recipe = ak.Recipe(model, optimizer, steps)
        …;  optimizer.step();  schedule.step();  recipe.step()      # the learning rate's schedule stays yours
        ak.hard_quantize_(model)                                    # or recipe.finish()

    It is an ``EpsilonAnnealing`` that counts steps and takes its numbers from a row of ``ak.RECIPES``: the one of the
    optimizer's family ("adam" where its groups have betas, otherwise "sgd"), or ``settings``: another row's name, or
    ``annealing.Settings``. Single numbers are changed by name: ``hold=0.3``, ``clamp=False``. Shares are of ``steps``;
    with another ``end`` the others keep their proportion to it.

    step(): once after each ``optimizer.step()`` and the learning rate's schedule, so once for all micro-batches; a step
    that a GradScaler leaves out counts, as it does for the learning rate. Optimizers around others (SAM, ``Skewed``)
    are taken as they are.

    The first and the last layer, where they are quantized, have groups of their own (``ak.param_groups``,
    ``order="outer"``), which ``outer_hold`` and its like are for.

    ``state_dict`` (numbers and text) beside the model's and the optimizer's resumes bit for bit, from anywhere. Raises
    TypeError/ValueError naming the argument or the layer that is not as it should be, before anything is written.
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
        _check_groups(model, optimizer, steps)
        self.model: nn.Module = model
        self.steps: int = steps
        total = max(1, round(row.end * steps))
        super().__init__(
            optimizer, total=total, mode=row.mode, power=row.power, outer_power=row.outer_power,
            keep_pull=row.keep_pull, clamp=row.clamp, **{name: row_periods(row, name, steps, total) for name in SHARES},
        )  # fmt: skip

    def step(self, epoch: int | None = None) -> None:
        """The next step, or step ``epoch``; the first warns of layers that their model does not call."""
        super().step(epoch)
        if self.last_epoch == 1:
            tell_passed(self.model, "Recipe")

    @property
    def finished(self) -> bool:
        """Whether eps is at its floor: what is left of the steps moves weights to their levels and keeps them there."""
        return self.last_epoch >= (self.total or 0)

    def finish(self) -> nn.Module:
        """``ak.hard_quantize_(model)``: every weight on its level. Gives the model; warns where eps is still above its
        floor, so that weights are moved by more than the constraint leaves to them."""
        if not self.finished:
            eps = max(self.get_last_eps())
            warnings.warn(f"Recipe: finish() after {self.last_epoch} of {self.steps} steps, with eps = {eps:.3g}: "
                          "weights away from their levels are rounded", stacklevel=2)  # fmt: skip
        return hard_quantize_(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything but model and optimizer: numbers, text, lists."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of ``state_dict``; sets the groups. Raises ValueError before anything changes."""
        if "steps" not in state_dict:
            raise ValueError("state_dict: expected a Recipe's, with its steps, got another's")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "steps"})
        self.steps = state_dict["steps"]


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
    for name in ("end", *SHARES):
        share = getattr(row, name)
        if share is None and name not in ("hold", "end"):
            continue
        if isinstance(share, bool) or not isinstance(share, numbers.Real):
            raise TypeError(f"{name}: expected a share of the steps, got {share!r}")
        if not 0 <= float(share) <= 1 or (name == "end" and not share):
            raise ValueError(f"{name}: expected a share of the steps from 0 to 1, got {share}")
    kept = {name: getattr(row, name) for name in SHARES if name not in changes}
    proportion = row.end / settings.end
    row = dataclasses.replace(row, **{name: share and share * proportion for name, share in kept.items()})
    first = min(row.hold, row.hold if row.freeze is None else row.freeze)
    for name in ("start", "full"):  # what is frozen is computed with
        share = getattr(row, name)
        if name not in changes:
            row = dataclasses.replace(row, **{name: share and min(share, first)})
        elif share is not None and share > first:
            raise ValueError(f"{name}: expected a share up to {first}, where scales are frozen, got {share}")
    if row.full is not None and row.full < row.start:
        if "full" in changes:
            raise ValueError(f"full: expected a share from start={row.start} on, got {row.full}")
        row = dataclasses.replace(row, full=None)
    for name in ("hold", "outer_hold"):
        if (getattr(row, name) or 0) >= row.end:
            raise ValueError(f"{name}: expected a share below end={row.end}, got {getattr(row, name)}")
    return row


def _check_groups(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
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
                             "ak.param_groups(model), or, where several optimizers share the quantized weights, give "
                             f"each an ak.EpsilonAnnealing(optimizer, total={steps})")  # fmt: skip
