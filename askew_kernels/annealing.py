"""Schedules for the constraint's eps: from 1 (everything feasible) to almost 0 (only the levels are)."""

from __future__ import annotations

import math
from typing import Any

import torch

MODES = ("gap", "geometric", "linear", "cosine")
FLOOR = 1.6e-5


class EpsilonAnnealing:
    """Sets ``group["eps"]`` of every group with a grid; used like a ``torch.optim.lr_scheduler``.

    The k-th period (epoch or batch: whatever the caller counts ``step()`` in) has, with j = k - hold, K = total - hold:

    =============  ==================================================================================================
    ``gap``        gap = (j / K)^power, eps = (1 - gap^2)^2: the infeasible share of a bracket grows from 0 to 1
    ``geometric``  eps = decay^j (published: hold 50, 0.96; hold 20, 0.99; hold 100, 0.95); decay defaults to the one
                   that reaches ``floor`` at ``total``
    ``linear``     eps = 1 - j / K
    ``cosine``     eps = (1 + cos(pi j / K)) / 2
    =============  ==================================================================================================

    ``keep_pull``: also set alpha_k = alpha lr_0 / lr_k, so that the pull towards feasibility in one step stays the same
    while the learning rate decays; with a constant alpha and lr -> 0 the weights never arrive at their levels. Call
    ``step()`` after the LR scheduler's.

    eps is 1 during the hold and never below ``floor``. Groups whose ``eps`` is a tensor get it filled in place, so
    compiled steps and CUDA graphs see the new value without recompiling.
    Raises ValueError/TypeError naming the argument.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        hold: int = 0,
        total: int | None = None,
        mode: str = "gap",
        power: float = 2.0,
        decay: float | None = None,
        floor: float = FLOOR,
        keep_pull: bool = False,
    ) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if hold < 0:
            raise ValueError(f"hold: expected a number of periods >= 0, got {hold}")
        if not 0 < floor <= 1:
            raise ValueError(f"floor: expected a number in (0, 1], got {floor}")
        if not 0 < power < math.inf:
            raise ValueError(f"power: expected a number > 0, got {power}")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay: expected a number in (0, 1), got {decay}")
        if decay is not None and mode != "geometric":
            raise ValueError(f"decay: only for mode='geometric', got mode={mode!r}")
        if total is None and (mode != "geometric" or decay is None):
            raise ValueError(
                f"total: mode={mode!r} needs the number of periods" + (" or decay" if mode == "geometric" else "")
            )
        if total is not None and total <= hold:
            raise ValueError(f"total: expected more than hold={hold}, got {total}")
        if not any(group.get("grid") is not None for group in optimizer.param_groups):
            raise ValueError("optimizer: no parameter group has a grid; see ak.param_groups")
        self.optimizer = optimizer
        self.hold, self.total, self.mode, self.power, self.decay, self.floor = hold, total, mode, power, decay, floor
        self.keep_pull = keep_pull
        self._first: dict[str, list[float]] = {}  # by group: [lr, alpha] when it was first seen
        self.last_epoch = 0
        self._apply()

    def eps_at(self, k: int) -> float:
        """eps of period k."""
        j = k - self.hold
        if j <= 0:
            return 1.0
        if self.mode == "geometric":
            decay = self.decay if self.decay is not None else self.floor ** (1 / (self.total - self.hold))  # type: ignore[operator]
            eps = decay**j
        else:
            share = min(1.0, j / (self.total - self.hold))  # type: ignore[operator]
            if self.mode == "gap":
                eps = (1 - share ** (2 * self.power)) ** 2
            elif self.mode == "linear":
                eps = 1 - share
            else:
                eps = (1 + math.cos(math.pi * share)) / 2
        return min(1.0, max(self.floor, eps))

    def _apply(self) -> None:
        eps = self.eps_at(self.last_epoch)
        for index, group in enumerate(self.optimizer.param_groups):
            if group.get("grid") is None:
                continue
            if isinstance(group["eps"], torch.Tensor):
                group["eps"].fill_(eps)
            else:
                group["eps"] = eps
            # Known on the host even where eps lives on a device, and where eps is still 1 by rounding.
            group["annealing"] = self.last_epoch > self.hold
            lr = float(group["lr"]) if self.keep_pull else 0.0
            if lr > 0:
                first = self._first.setdefault(str(index), [lr, float(group["alpha"])])
                group["alpha"] = first[1] * first[0] / lr

    def step(self) -> None:
        """The next period."""
        self.last_epoch += 1
        self._apply()

    def get_last_eps(self) -> list[float]:
        """eps of each group with a grid."""
        eps = self.eps_at(self.last_epoch)
        return [eps for group in self.optimizer.param_groups if group.get("grid") is not None]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of ``state_dict``; sets the groups' eps."""
        self.__dict__.update(state_dict)
        self._apply()
