"""Any optimizer under the interval constraint: what it does to the weights is taken as the direction to be skewed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import ops
from ..quant import WeightQuantizer
from ..quant.sharding import local_part
from .constrained import CONSTRAINT_KEYS, GRID_KEYS, Constrained, viewed
from .plan import Launch
from .wrapper import Wrapper, beside, checked_base, room_for

PIECE = 2**24  # weights whose directions are held at a time


class Skewed(Constrained, Wrapper):
    """Any ``torch.optim.Optimizer`` under the interval constraint h_eps(w) >= 0.

        w1 = the base optimizer's step from w0;   d = (w1 - w0) / lr;   w <- w0 + lr v, v the skewed d

    (``ops.skew_direction_`` has the formulas.) ``Skewed(torch.optim.RAdam(ak.param_groups(model), lr=1e-3))``: the base
    is an instance made of ``ak.param_groups``, whatever its state; ``param_groups``, ``defaults`` and ``state`` are its
    own objects. Weight decay, momentum and schedules of the base are part of d. Groups without a grid are the base's
    alone. Group keys that are added: ``alpha``, ``constraint_eps``, ``freeze_scale``, ``clamp``, ``skip_nonfinite`` and
    the grid's (``ASkewSGD`` explains them); ``eps``, where there is one, is the base's. So are ``alpha`` (RMSprop's,
    ASGD's) and ``clamp`` of a base that has them: ours are then ``constraint_alpha`` and ``constraint_clamp``. ``lr``
    is what the pull is measured against, so the base's groups must have it; at lr = 0 no weight moves.

    Costs one copy of the weights that have a grid, which is kept from step to step, room for the directions of
    2^24 of them at a time, and two passes over the weights beside the base's step and the skewed one. d is rounded to
    the weight's type: with bfloat16 or float16 weights it knows no more than the base's own step left there.
    ``telemetry()``'s ``grad_velocity`` is d·v, ``nonfinite`` counts elements of d, and these are what
    ``skip_nonfinite`` leaves alone: what a base's momentum remembers of an inf or NaN leaves the element where it is.
    ``SAM(Skewed(base))`` is a sharpness-aware step of it. Refused, by TypeError: a base that is under the constraint
    already, one that is sharpness-aware, one whose ``step`` needs a closure (LBFGS), one that has another of the added
    keys itself.
    Other arguments and errors as for ``ASkewSGD``.
    """

    _KEYS = CONSTRAINT_KEYS
    _CLIPS = False  # the base has moved the weights by gradients that it took as they were

    def __init__(
        self, base_optimizer: Optimizer, *, alpha: float = 1.0, constraint_eps: float | Tensor = 1.0,
        freeze_scale: str = "anneal", clamp: bool = True, skip_nonfinite: bool = False, telemetry_every: int = 10,
        telemetry_log: str | os.PathLike | None = None, **grid_options: Any,
    ) -> None:  # fmt: skip
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(f"base_optimizer: expected a torch.optim.Optimizer, got {base_optimizer!r}")
        name = type(base_optimizer).__name__
        if isinstance(base_optimizer, Constrained):
            raise TypeError(f"base_optimizer: expected one without a constraint, got {name}, which has its own")
        if isinstance(base_optimizer, Wrapper):
            raise TypeError(f"base_optimizer: expected an optimizer that steps once, got {name}; put it around: "
                            f"{name}(Skewed(...))")  # fmt: skip
        if unknown := grid_options.keys() - GRID_KEYS.keys():
            raise TypeError(f"{min(unknown)}: unknown argument; the grid's are {', '.join(GRID_KEYS)}")
        own = {
            **CONSTRAINT_KEYS, "alpha": alpha, "constraint_eps": constraint_eps, "freeze_scale": freeze_scale,
            "clamp": clamp, "skip_nonfinite": skip_nonfinite, **grid_options,
        }  # fmt: skip
        own = beside(checked_base(base_optimizer), own)
        for group in base_optimizer.param_groups:
            self._check_group({**own, **group})
        self._begin(telemetry_every, telemetry_log)
        self._wrap(base_optimizer, own)
        for group in self.param_groups:
            self._take(group)

    def _begin(self, telemetry_every: int, telemetry_log: Any = None) -> None:
        super()._begin(telemetry_every, telemetry_log)
        self._copies: dict[Tensor, Tensor] = {}  # of the weights as the step found them
        self._directions: dict[Tensor, Tensor] = {}  # of those that had to be put back first
        self._counted = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._shares:  # otherwise called by Optimizer.__init__ for a group that the base already has
            super().add_param_group(param_group)

    def _add(self, param_group: dict[str, Any]) -> None:
        self.base_optimizer.add_param_group(param_group)
        self._complete()

    def _check_group(self, group: dict[str, Any]) -> None:
        if "lr" not in group:
            raise ValueError("lr: expected in every group of the base optimizer, whose step is taken over it, got none")
        super()._check_group(group)

    def _step_base(self, work: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        """The base's step. It leaves the weights moved, with their copies in ``saved_weights``; a weight that has to be
        looked at for its scale is put back, with its direction in the copy's place."""
        params = [p for group, members, _ in work if group["grid"] is not None for p in members]
        quantizers: list[Any] = [WeightQuantizer.of(p) for p in params]
        weights = [local_part(p) for p in params]
        copies = [room_for(self._copies, p, w) for p, w in zip(params, weights, strict=True)]
        _copy(copies, weights)
        for q, p in zip(quantizers, params, strict=True):
            q.leaving(p)
        try:
            self.base_optimizer.step()
        except BaseException:
            _copy(weights, copies)
            for q, p in zip(quantizers, params, strict=True):
                q.returned(p)
            raise
        divisors = {p: _divisor(group["lr"]) for group, members, _ in work for p in members}
        for q, p, w, copy in zip(quantizers, params, weights, copies, strict=True):
            if w.is_contiguous() and q.home_has_scale(p):
                self.saved_weights[p] = copy
            else:
                moved = w - copy
                w.copy_(copy)
                self._directions[p] = torch.div(moved, divisors[p], out=copy)
            q.returned(p)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        try:
            return super()._step(closure)
        finally:  # weights that no launch has come to, because another one raised, are put back
            for p, copy in self.saved_weights.items():
                local_part(p).copy_(copy)
            self.saved_weights, self._directions = {}, {}

    def _bucket(self, group: dict[str, Any], p: Tensor) -> tuple[Any, ...]:
        self._counted += p.numel()
        return (self._counted // PIECE,)

    def _update(self, launch: Launch, group: dict[str, Any], weights: list[Tensor], scales: list[Tensor],
                *outputs: Any, **arguments: Any) -> None:  # fmt: skip
        moved = [(p, local_part(p)) for p in launch.members if p in self.saved_weights]
        if moved:
            found = torch._foreach_sub([w for _, w in moved], [self.saved_weights[p] for p, _ in moved])
            torch._foreach_div_(found, _divisor(group["lr"]))
            self._directions.update(zip((p for p, _ in moved), found, strict=True))
        directions = [viewed(p, self._directions.pop(p)) for p in launch.members]
        ops.run_skew_direction(weights, directions, scales, *outputs, **arguments)

    def _pack(self) -> dict[str, Any]:
        base = self.base_optimizer.state_dict()
        if missing := {"state", "param_groups"} - base.keys():
            raise NotImplementedError(f"state_dict: {type(self.base_optimizer).__name__}'s holds {', '.join(base)}; "
                                      f"expected {min(missing)}, beside which scales are saved")  # fmt: skip
        return self._packed(base)

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        self._load(state_dict, self.base_optimizer.load_state_dict)
        self._complete()


def _copy(to: list[Tensor], those: list[Tensor]) -> None:
    if to:  # torch refuses lists of none
        torch._foreach_copy_(to, those)


def _divisor(lr: float | Tensor) -> float | Tensor:
    """lr, and inf where it is 0, so that there is no direction."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return torch.where(lr > 0, lr, math.inf)
    return float(lr) or math.inf
