"""LookSAM, MSAM and ESAM: sharpness-aware steps that cost less than two (docs/mathematics.md, section 4)."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import ops
from ..quant.sharding import is_sharded, local_part, sharding_of
from ..quant.state import is_learned
from .ranks import sum_over_ranks
from .sam import SAM, Ascent, checked_loss, products, refuse_local

DIRECTION = "sam_direction"  # LookSAM's, in the base's state, where every writer of checkpoints looks
MOMENTA = ("momentum_buffer", "exp_avg")  # of SGD; of AdamW, Lion and their like


class LookSAM(SAM):
    """SAM that takes the second gradient every k-th step only, and between reuses what that one added to the first.

        every k-th:  SAM's step;   v = g' - (g' g / g g) g,  u = v / ||v||       kept in the base's state
        otherwise:   the base steps with g + alpha ||g|| u                       one gradient, nothing perturbed

    k: >= 1; 1 is SAM, bit for bit. alpha: >= 0. Norms and products are over all parameters and ranks. By hand, the
    first half is for steps that look; where it is called all the same, both passes are expected, as for SAM::

        loss.backward()
        if optimizer.looks:
            optimizer.first_step(zero_grad=True); loss2.backward()
        optimizer.second_step(zero_grad=True)

    A step that looked in vain (a norm of zero, inf or NaN) leaves u at zero, one that GradScaler skipped leaves it as
    it was. ``perturbation="local"`` is refused: the first gradient is part of the step. A CUDA graph repeats the
    kind of step that it captured: capture both.
    Source: Liu, Mai, Chen, Hsieh, You, Towards Efficient and Scalable Sharpness-Aware Minimization, CVPR 2022.
    """

    _OWN = (*SAM._OWN, "k", "alpha")

    def __init__(
        self, params: Any, base_optimizer: type[Optimizer] | None = None, rho: float | Tensor = 0.05,
        adaptive: bool | None = False, eta: float = 0.0, *, k: int = 5, alpha: float = 0.7, **options: Any,
    ) -> None:  # fmt: skip
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k: expected a whole number, got {k!r}")
        if k < 1:
            raise ValueError(f"k: expected a whole number >= 1, got {k}")
        self.k, self.alpha = k, ops.number("alpha", alpha, 0.0)
        refuse_local(options, "the first gradient is part of the step")
        super().__init__(params, base_optimizer, rho, adaptive, eta, **options)

    @property
    def looks(self) -> bool:
        """Whether this step takes both gradients: every k-th, and where no direction is known yet."""
        return self._steps % self.k == 0 or not any(DIRECTION in state for state in self.state.values())

    @property
    def _NEEDS_FIRSTS(self) -> bool:  # type: ignore[override]
        return self.looks and self.k > 1

    def _ascend(self, zero_grad: bool, loss: Tensor | float | None, scaler: Any) -> None:
        if self.looks:
            super()._ascend(zero_grad, loss, scaler)
            self.report["looked"] = True
            return
        found_inf = self._unscale_first(scaler)  # of a gradient that the second pass will take anew
        self._stay(loss)
        if self._ascent is not None:
            self._ascent.scaler, self._ascent.found_inf = scaler, found_inf
        if zero_grad:
            self.zero_grad()

    def _stay(self, loss: Any) -> None:
        """In place of the first half, where this step does not look."""
        self._complete()
        self._buckets()  # checks
        self._ascent = Ascent(self._ids())
        loss = loss.detach().reshape(()) if isinstance(loss, Tensor) else loss
        self.report = {"loss": loss, self._NORM: math.nan, "looked": False}

    def second_step(self, zero_grad: bool = False, *, loss: Tensor | float | None = None, scaler: Any = None) -> None:
        """As ``SAM.second_step``, without a first half where ``looks`` is False. RuntimeError without any gradient."""
        if self._ascent is None and not self.looks:
            _, options = self._call_pre_hooks((self,), {"zero_grad": zero_grad, "loss": loss, "scaler": scaler})
            zero_grad, loss, scaler = options["zero_grad"], options["loss"], options["scaler"]
            self._stay(loss)
            loss = None  # it is the first one's
        super().second_step(zero_grad, loss=loss, scaler=scaler)

    descent_step = second_step

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None, *, scaler: Any = None) -> Any:  # type: ignore[override]
        """As ``SAM.step``; the closure is evaluated once where ``looks`` is False."""
        if closure is None and self._ascent is None and not self.looks:
            return self.second_step(scaler=scaler)
        return super().step(closure, scaler=scaler)

    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None, scaler: Any) -> Any:
        loss = super()._step(closure, scaler)
        if closure is None and self.k > 1:  # the base's state has just been made for a checkpoint to be loaded
            self._keep_directions({})
        return loss

    def _passes(self, closure: Callable[[], Any], scaler: Any) -> Any:
        if self.looks:
            return super()._passes(closure, scaler)
        self.zero_grad()
        with torch.enable_grad():
            loss = checked_loss(closure())
        self._stay(loss)
        self._descend(False, None, scaler)
        return loss

    def _records(self) -> bool:
        return self.looks and super()._records()

    def _note_losses(self, loss: Tensor | float | None, skipped: bool) -> None:
        super()._note_losses(loss if self.looks else None, skipped)

    def _merge_gradients(self, ascent: Ascent, inside: Any) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None and is_sharded(p)):
            if sharding_of(p.grad) != sharding_of(p):
                p.grad = p.grad.redistribute(p.device_mesh, p.placements)
        if self.looks:
            return
        buckets = [b._replace(adaptive=[0] * len(b.adaptive)) for b in self._buckets(lambda p: p.grad)]
        if not buckets:
            raise RuntimeError("second_step: expected a gradient, got none; after first_step(zero_grad=True) a second "
                               "backward is expected, and where `looks` is False no first_step")  # fmt: skip
        norm = self.report[self._NORM] = self._squared_norm(buckets).sqrt()
        pull = torch.where(norm.isfinite(), self.alpha * norm, 0.0)
        for bucket in buckets:
            pairs = [(g, self.state[p][DIRECTION]) for p, g in zip(bucket.params, bucket.grads, strict=True)
                     if DIRECTION in self.state[p]]  # fmt: skip
            if pairs:
                grads, directions = [g for g, _ in pairs], [local_part(u) for _, u in pairs]
                torch._foreach_add_(grads, torch._foreach_mul(directions, pull.to(grads[0].device, grads[0].dtype)))

    def _step_base(self, ascent: Ascent, inside: dict[Tensor, Tensor]) -> None:
        found = self._directions_of(ascent) if self.looks and self.k > 1 else None
        super()._step_base(ascent, inside)
        if found is not None:  # only now: a base makes its state where there is none
            self._keep_directions(found)

    def _directions_of(self, ascent: Ascent) -> dict[Tensor, Tensor]:
        """u of every parameter that received both gradients; this rank's part."""
        pairs = {p: (first, local_part(p.grad)) for p, (first, _) in ascent.firsts.items() if p.grad is not None}
        sums = ((p, products(first, second)) for p, (first, second) in pairs.items())
        dot, square, _ = sum_over_ranks(sums, self.param_groups, (3,))
        share = torch.where(square > 0, dot / square, 0.0)
        across = {}
        for p, (first, second) in pairs.items():
            precise = torch.float64 if second.dtype == torch.float64 else torch.float32
            across[p] = second.to(precise) - share.to(second.device, precise) * first.to(precise)
        norm = sum_over_ranks(((p, products(v, v)) for p, v in across.items()), self.param_groups, (3,))[0].sqrt()
        known = (norm > 0) & norm.isfinite()
        return {p: torch.where(known.to(v.device), v / norm.to(v.device, v.dtype), 0.0) for p, v in across.items()}

    @torch.inference_mode(False)
    def _keep_directions(self, found: dict[Tensor, Tensor]) -> None:
        """Into the base's state; zeros for parameters that have a gradient and no direction."""
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            kept = self.state[p].get(DIRECTION)
            if kept is None or kept.dtype != p.dtype:
                kept = self.state[p][DIRECTION] = torch.zeros_like(p, requires_grad=False)
            local_part(kept).copy_(found[p]) if p in found else local_part(kept).zero_()

    def telemetry(self) -> dict[str, Any]:
        """As ``SAM.telemetry``, with ``looked``; where the step did not, nothing was perturbed."""
        report = super().telemetry()
        if report and not report["looked"]:
            report.update(perturbed=False, reason="the direction of an earlier step was used")
        return report


class MSAM(SAM):
    """Momentum-SAM: perturbed along the momentum that the base keeps anyway; one gradient a step, the cost of the base.

        delta = -rho T^2 m / ||T m||     m: the base's ``momentum_buffer`` or ``exp_avg``, of the step before
        w <- w + delta;   g = gradient there;   w <- the kept w;   the base optimizer's step with g

    The sign is the published one: ahead, where the momentum leads. The perturbation comes *before* the forward and is
    taken back by the step, so that between steps the weights are the unperturbed ones: evaluation, checkpoints and
    schedules need no care. ``step(closure)`` evaluates the closure once and returns the loss at the perturbed weights;
    by hand, with as many micro-batches as you like::

        optimizer.first_step()
        loss.backward()
        optimizer.second_step(zero_grad=True)        # or scaler.step(optimizer)

    The first step has no momentum and perturbs nothing. BatchNorm's running statistics are those of perturbed weights:
    ``torch.optim.swa_utils.update_bn`` makes them anew after training. Raises ValueError for a base without momentum;
    ``perturbation="local"`` is refused, as all ranks have one momentum.
    Source: Becker, Altrock, Risse, Momentum-SAM, 2024 (arXiv 2401.12033).
    """

    _NORM = "momentum_norm"

    def __init__(
        self, params: Any, base_optimizer: type[Optimizer] | None = None, rho: float | Tensor = 0.3,
        adaptive: bool | None = False, eta: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        refuse_local(options, "all ranks have one momentum")
        super().__init__(params, base_optimizer, rho, adaptive, eta, **options)
        if (base := type(self.base_optimizer).__name__) == "ZeroRedundancyOptimizer":
            raise TypeError(f"base_optimizer: expected the momentum of every parameter, of which {base} keeps a "
                            "part on each rank")  # fmt: skip
        for i, group in enumerate(self.param_groups):
            if group.get("momentum", 1.0) == 0:
                raise ValueError(f"base_optimizer: expected momentum, along which the weights are perturbed, got 0 in "
                                 f"group {i}")  # fmt: skip

    def _direction(self, p: Tensor) -> Tensor | None:
        state = self.state.get(p, {})
        momentum = next((state[key] for key in MOMENTA if state.get(key) is not None), None)
        return momentum if momentum is None or momentum.dtype == p.dtype else momentum.to(p.dtype)

    def _descends_along(self, group: dict[str, Any]) -> bool:
        return True  # bases turn the gradients of groups that maximize before they enter the momentum

    def _unscale_first(self, scaler: Any) -> Tensor | None:
        return None  # there is no gradient yet

    def _records(self) -> bool:
        return False  # there is no other gradient to compare with

    def _begin(self) -> None:
        super()._begin()
        self._stepped = False

    def _step_base(self, ascent: Ascent, inside: dict[Tensor, Tensor]) -> None:
        super()._step_base(ascent, inside)
        self._stepped = True

    def _ascend(self, zero_grad: bool, loss: Tensor | float | None, scaler: Any) -> None:
        params = (p for group in self.param_groups for p in group["params"])
        if self._stepped and all(self._direction(p) is None for p in params):
            raise ValueError(f"base_optimizer: expected one of {', '.join(MOMENTA)} in its state, along which the "
                             f"weights go, got neither from {type(self.base_optimizer).__name__}")  # fmt: skip
        super()._ascend(zero_grad, None, scaler)

    def _passes(self, closure: Callable[[], Any], scaler: Any) -> Any:
        self._ascend(True, None, scaler)
        try:
            with torch.enable_grad():
                loss = checked_loss(closure())
            self._descend(False, loss, scaler)
        finally:
            self.restore()
        return loss


class ESAM(SAM):
    """SAM of a random part of the tensors (stochastic weight perturbation); the others skip the first pass's gradient.

        delta = (rho / fraction) T^2 g / ||T g||  over the tensors that are chosen, each with probability ``fraction``

    fraction: in (0, 1]; 1 is SAM, bit for bit. seed: what is chosen follows from it and the number of the step, so that
    runs resume and ranks agree; one tensor at least is chosen (a CUDA graph repeats its choice). ``step(closure)``
    freezes the others during the first pass, by hand ``with optimizer.first_pass():`` around that forward and backward
    does. Where processes train together nothing is frozen unless ``perturbation="local"``: DDP expects all gradients
    that it communicates.
    ESAM's other half, data selection, is ``sharp_samples``, by hand.
    Source: Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, ICLR 2022.
    """

    _OWN = (*SAM._OWN, "fraction", "seed")

    def __init__(
        self, params: Any, base_optimizer: type[Optimizer] | None = None, rho: float | Tensor = 0.05,
        adaptive: bool | None = False, eta: float = 0.0, *, fraction: float = 0.5, seed: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        self.fraction = ops.number("fraction", fraction, 0.0, 1.0, open_low=True)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected a whole number, got {seed!r}")
        self.seed = seed
        super().__init__(params, base_optimizer, rho, adaptive, eta, **options)

    def _begin(self) -> None:
        super()._begin()
        self._drawn: tuple[Any, set[Tensor]] | None = None

    def chosen(self) -> set[Tensor]:
        """The parameters that this step perturbs, of those that train; learned scales never."""
        params = [p for group in self.param_groups for p in group["params"] if not is_learned(p)]
        if self.fraction == 1:
            return set(params)
        key = (self._steps, self.seed, self.fraction, tuple(map(id, params)))
        if self._drawn is None or self._drawn[0] != key:  # of one step: its passes freeze tensors
            draw = random.Random(f"{self.seed} {self._steps}")
            drawn = {p for p in params if draw.random() < self.fraction and p.requires_grad}
            training = [p for p in params if p.requires_grad]
            if not drawn and training:
                drawn = {draw.choice(training)}
            self._drawn = key, drawn
        return self._drawn[1]

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Freezes what this step does not perturb."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        others: list[Tensor] = []
        if self.perturbation == "local" or not distributed:
            chosen = self.chosen()
            others = [p for group in self.param_groups for p in group["params"] if p.requires_grad and p not in chosen]
        try:
            for p in others:
                p.requires_grad_(False)
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    def _first_pass(self) -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        stack.enter_context(super()._first_pass())
        stack.enter_context(self.first_pass())
        return stack

    def _buckets(self, direction: Callable[[Tensor], Tensor | None] | None = None) -> list[Any]:
        if direction is None:
            chosen = self.chosen()
            return super()._buckets(lambda p: p.grad if p in chosen else None)
        return super()._buckets(direction)

    def _radius(self, rho: Tensor | float) -> Tensor | float:
        return rho if self.fraction == 1 else rho / self.fraction


def sharp_samples(before: Tensor, after: Tensor, fraction: float = 0.5) -> Tensor:
    """Which samples' losses rose the most, ceil(fraction n) of them, in ascending order: ESAM's data selection.

    before, after: losses of the n samples at the weights and, after ``first_step``, at the perturbed ones (no gradient
    is needed for them). The second pass then takes these samples alone. Raises ValueError for other shapes.
    Source: Du et al., ICLR 2022 (sharpness-sensitive data selection).
    """
    if before.dim() != 1 or before.shape != after.shape:
        raise ValueError(f"after: expected the losses of the {tuple(before.shape)} samples, got {tuple(after.shape)}")
    count = math.ceil(ops.number("fraction", fraction, 0.0, 1.0, open_low=True) * len(before))
    return (after - before).detach().topk(count).indices.sort().values
