"""What a step promised and what it did, from the sums that the update pass leaves behind (docs/mathematics.md, 7)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..optim import ASkewSGD
from .hessian import Smoothness


class CertificateWarning(UserWarning):
    """The learning rate is above 1/L̂: the loss need not decrease."""


def feasibility_limit(eps: float, alpha: float = 1.0) -> float:
    """The largest learning rate at which the pull alone carries no weight past its level.

    In bracket lengths, a weight at distance u from its level is pulled by min(γα (16 q² − ε) / (32 q (1 − 2u)), 1/4),
    q = u (1 − u). That is at most u for every infeasible u where it is at u = 1/4, beyond which the cap of 1/4 acts:

        γ <= 12 / (α (9 − 16 ε)) for ε < 9/16, any γ above: then nothing infeasible stands within a quarter of a level
    """
    eps, alpha = ops.number("eps", eps, 0.0), ops.number("alpha", alpha, 0.0)
    return 12 / (alpha * (9 - 16 * eps)) if alpha > 0 and eps < 9 / 16 else math.inf


def _with_gradients(optimizer: torch.optim.Optimizer, look: Callable[[], None]) -> RemovableHandle:
    """``look()`` is called in each ``optimizer.step()`` when its gradients are there: those of a closure are made after
    torch has called the hooks that come before a step."""

    def hook(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            look()
            return None

        def watched() -> Any:
            loss = closure()
            look()
            return loss

        return ((args[0], watched, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": watched})

    return optimizer.register_step_pre_hook(hook)


class Secant:
    """L̂_k = ‖g_k − g_{k−1}‖ / ‖w_k − w_{k−1}‖, taken in each ``optimizer.step()``; no forward or backward of its own.

    ``last``: this step's; ``value``: the largest of late, L <- max(L̂_k, decay L). A lower bound of the true L on the
    way that the weights took; where every step sees another batch, the noise of the gradients adds to it. It reads and
    keeps one copy of weights and gradients; nothing waits for the device until a number is asked for.
    Over a sharpness-aware optimizer give ``optimizer.base_optimizer``. ``remove()`` ends it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float = 0.95) -> None:
        self.optimizer, self.decay = optimizer, ops.number("decay", decay, 0.0, 1.0)
        self._kept: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._last: Tensor | float = 0.0
        self._value: Tensor | float = 0.0
        self._handle = _with_gradients(optimizer, self._look)

    @torch.no_grad()
    def _look(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        moved = getattr(self.optimizer, "saved_weights", {})  # a sharpness-aware step's, which left their copies here
        scale = getattr(self.optimizer, "grad_scale", None)  # GradScaler's, where the step itself divides by it
        grads: dict[Tensor, Any] = {p: p.grad if scale is None else p.grad / scale.to(p.device) for p in params}
        now = {p: (moved.get(p, p).detach(), g.detach()) for p, g in grads.items()}
        if known := [p for p in params if p in self._kept]:
            new, old = (list(zip(*(of[p] for p in known), strict=True)) for of in (now, self._kept))
            went, turned = (torch._foreach_norm(torch._foreach_sub(a, b)) for a, b in zip(new, old, strict=True))
            lengths = [torch.stack([t.double().to(part[0].device) for t in part]).norm() for part in (turned, went)]
            last = (lengths[0] / lengths[1]).nan_to_num(0.0, 0.0)  # 0 where the weights stood still
            self._last, self._value = last, last.clamp(min=self.decay * self._value)
        for p, pair in now.items():
            if p in self._kept:
                for kept, t in zip(self._kept[p], pair, strict=True):
                    kept.copy_(t)
            else:
                self._kept[p] = (pair[0].clone(), pair[1].clone())

    @property
    def last(self) -> float:
        """The estimate of the last step; 0 before the second."""
        return float(self._last)

    @property
    def value(self) -> float:
        """The largest of late; 0 before the second step."""
        return float(self._value)

    def remove(self) -> None:
        self._handle.remove()


class Certificate:
    """Predicted against measured decrease, step by step.

        f(w + γ v) − f(w)  <=  γ g·v + (L̂/2) γ² ‖v‖²        for an L-smooth f; a decrease where v = −g and γ < 2/L

    after every ``optimizer.step()``::

        row = certificate.update(loss)                        # loss: where the step started
        row = certificate.update(loss, after=loss_of_the_same_batch_now)

    smoothness: L̂ as a number, a ``Smoothness``, a ``Secant`` or a function that returns one. Sums of quantized tensors
    are the update pass's own (``optimizer.telemetry()``), those of the others come from a copy taken before the step.
    Without ``after`` the measured decrease of a row is filled in by the next call's loss, which is right for full
    batches. Keys of a row (all in ``rows``):

    ====================  ===========================================================================================
    ``predicted``         γ g·v + L̂ γ² ‖v‖² / 2
    ``measured``          the loss afterwards minus the loss (None while unknown); ``holds``: measured <= predicted
    ``stationarity``      ‖v‖: 0 at a stationary point of the constrained problem
    ``infeasibility``     Σ max(0, −h)
    ``complementarity``   Σ μ (−h) = (‖v‖² + g·v) / α, μ the constraint's multiplier; 0 where none acts. Exact for
                          plain SGD with ``skew="gradient"`` where the cap on a displacement does not act
    ``descent_lr``        the γ below which this v is predicted to decrease f: −2 g·v / (L̂ ‖v‖²); 0 where it is not
    ``stable_lr``         min(1/L̂, ``feasibility_limit(ε, α)``), the largest stable γ for this ε
    ====================  ===========================================================================================

    The bound speaks of w + γ v: where the final clamp to the hull cuts steps short it may not hold, nor with
    ``weight_decay``, whose term is not part of g. Warns (``CertificateWarning``) when γ rises above 1/L̂.
    """

    def __init__(
        self, optimizer: ASkewSGD, smoothness: float | Smoothness | Secant | Callable[[], float], *, warn: bool = True
    ) -> None:
        if not isinstance(optimizer, ASkewSGD):
            raise TypeError(f"optimizer: expected an ASkewSGD (a sharpness-aware optimizer's is its base_optimizer), "
                            f"got {type(optimizer).__name__}")  # fmt: skip
        if optimizer.telemetry_every == 0:
            raise ValueError("optimizer: its telemetry_every is 0, so its passes sum up nothing; expected >= 1")
        known = isinstance(smoothness, (int, float, Smoothness, Secant)) or callable(smoothness)
        if isinstance(smoothness, bool) or not known:
            raise TypeError(f"smoothness: expected a number, Smoothness, Secant or function, got {smoothness!r}")
        if isinstance(smoothness, (int, float)) and not 0 <= smoothness < math.inf:
            raise ValueError(f"smoothness: expected a finite number >= 0, got {smoothness}")
        self.optimizer, self.smoothness, self.warn = optimizer, smoothness, warn
        self.rows: list[dict[str, Any]] = []
        self._before: list[tuple[Tensor, Tensor, float]] = []
        self._plain: list[tuple[float, float, float]] = []
        self._above = self._stepped = False
        self._precision = 0.0  # of the last row's loss
        optimizer.telemetry()  # the next step is to be recorded
        self._handles = [_with_gradients(optimizer, self._keep), optimizer.register_step_post_hook(self._sum)]

    def remove(self) -> None:
        """Ends it; rows stay."""
        for handle in self._handles:
            handle.remove()

    def _keep(self) -> None:
        self._before = [
            (p, p.detach().clone(), float(group["lr"]))
            for group in self.optimizer.param_groups if group["grid"] is None
            for p in group["params"] if p.grad is not None
        ]  # fmt: skip

    def _sum(self, *_: Any) -> None:
        """(lr, g·v, ‖v‖²) of every tensor without a grid."""
        self._plain = []
        for p, before, lr in self._before:
            if lr > 0 and p.grad is not None:  # a learned scale that this step froze has lost it, and did not move
                v = (p.detach().double() - before.double()) / lr
                g = p.grad.double()
                self._plain.append((lr, float((g * v).sum()), float((v * v).sum())))
        self._before, self._stepped = [], True

    @property
    def L(self) -> float:
        """L̂ as it stands."""
        s = self.smoothness
        if isinstance(s, (Smoothness, Secant)):
            return s.L if isinstance(s, Smoothness) else s.value
        return _number("smoothness", s() if callable(s) else s)

    def update(self, loss: Tensor | float, after: Tensor | float | None = None) -> dict[str, Any]:
        """The row of the step that was just made. Losses as they come: with or without a graph, on any device.

        RuntimeError where no step was made since the last call; ValueError for a loss that is not one number.
        """
        if not self._stepped:
            raise RuntimeError("update: expected an optimizer.step() since the last update")
        value, precision = _number("loss", loss), self._precision_of(loss)
        value_after = None if after is None else _number("after", after)
        self._stepped = False
        if self.rows and self.rows[-1]["measured"] is None:
            self._measure(self.rows[-1], value, max(precision, self._precision))
        self._precision = precision
        big_l, tensors = self.L, self.optimizer.telemetry()
        sums = [(t["lr"], t["grad_velocity"], t["velocity_norm"] ** 2) for t in tensors] + self._plain
        slope = sum(lr * gv for lr, gv, _ in sums)
        curvature = big_l * sum(lr * lr * vv for lr, _, vv in sums)
        lr = max((lr for lr, _, _ in sums), default=0.0)
        limits = [feasibility_limit(t["eps"], t["alpha"]) for t in tensors]
        row = {
            "step": self.optimizer.steps, "lr": lr, "eps": min((t["eps"] for t in tensors), default=1.0),
            "loss": value, "L": big_l, "predicted": slope + curvature / 2, "measured": None, "holds": None,
            "stationarity": sum(vv for _, _, vv in sums) ** 0.5,
            "infeasibility": sum(t["mean_violation"] * t["numel"] for t in tensors),
            "complementarity": sum((t["velocity_norm"] ** 2 + t["grad_velocity"]) / t["alpha"]
                                   for t in tensors if t["alpha"]),
            "descent_lr": max(0.0, -2 * lr * slope / curvature) if curvature else math.inf,
            "stable_lr": min([1 / big_l if big_l else math.inf, *limits]),
        }  # fmt: skip
        if value_after is not None:
            self._measure(row, value_after, max(precision, self._precision_of(after)))
        self.rows.append(row)
        above = lr * big_l > 1 + 1e-9
        if above and not self._above and self.warn:
            text = f"step {row['step']}: lr = {lr:g} is above 1/L̂ = {1 / big_l:g}; the loss need not decrease"
            warnings.warn(text, CertificateWarning, stacklevel=2)
        self._above = above
        return row

    def _precision_of(self, loss: Any) -> float:
        """Of a number that comes without a type, that of the weights."""
        typed = isinstance(loss, Tensor) and loss.is_floating_point()
        return torch.finfo(loss.dtype if typed else self.optimizer.param_groups[0]["params"][0].dtype).eps

    @staticmethod
    def _measure(row: dict[str, Any], after: float, precision: float) -> None:
        row["measured"] = after - row["loss"]
        slack = 32 * precision * max(abs(after), abs(row["loss"]))  # of two losses, each a rounded mean
        row["holds"] = row["measured"] <= row["predicted"] + slack


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one number, got a tensor of shape {tuple(value.shape)}")
        value = value.detach()
    return float(value)
