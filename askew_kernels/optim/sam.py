"""SAM, ASAM and AlignedSAM: sharpness-aware steps over any base optimizer (docs/mathematics.md, section 4).

A step has two halves, *ascent* (``first_step``) and *descent* (``second_step``). Norm, coefficients and the decision
that there is nothing to perturb stay on the device: neither half waits for it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import ops
from ..annealing import key_in
from ..contract import compute_dtype
from ..quant import WeightQuantizer
from ..quant.sharding import is_sharded, local_part, made_for_a_part, sharding_of
from ..quant.state import is_learned
from .amp import unscale_first, unscale_second
from .askew import ByRule
from .batchnorm import frozen_batchnorm_stats
from .constrained import refuse_clip_in_step
from .ranks import ProcessGroup, sum_over_ranks
from .telemetry import checked_every
from .wrapper import Wrapper, beside, checked_base, room_for


class _Bucket(NamedTuple):
    """Parameters that share a launch: one device, sharding, rho, eta, side; float64 apart."""

    group: dict[str, Any]
    eta: float
    params: list[Tensor]
    weights: list[Tensor]  # this rank's parts
    grads: list[Tensor]
    adaptive: list[int]


@dataclass
class Ascent:
    """Between the halves."""

    groups: list[list[int]]  # ids of the parameters, to notice other groups
    kept: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # parameter, this rank's part, its copy
    firsts: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)  # first gradients, versions; where needed
    coefficients: list[Tensor] = field(default_factory=list)  # of each launch
    scaler: Any = None
    found_inf: Tensor | None = None  # in the first half


class SAM(Wrapper):
    """Sharpness-aware minimization over any ``torch.optim.Optimizer``.

        delta = rho T^2 g / ||T g||        T = |w| + eta where adapted, else 1; the norm over all parameters and ranks
        w <- w + delta;   g' = gradient there;   w <- the kept w;   the base optimizer's step with g'

    ``SAM(torch.optim.SGD(params, lr=0.1), rho=0.05)``, or as davda54/sam has it
    ``SAM(params, torch.optim.SGD, rho=0.05, lr=0.1)``. ``param_groups``, ``defaults`` and ``state`` are the base's own
    objects, so LR schedulers, ``EpsilonAnnealing`` and checkpoints see one optimizer. Group keys:

    =============  ===================================================================================================
    ``rho``        radius, >= 0; a float or a 0-dim tensor, may be scheduled
    ``eta``        added to |w| in T, >= 0
    ``adaptive``   True, False, or None: as published by name, "weight" in it (names are known from ``named_parameters``
                   or ``model``), otherwise tensors of 2 or more dimensions
    ``sam_steps``  steps made and the last surrogate gap, the same in every group: they stand here because this is where
    ``sam_gap``    every writer of checkpoints looks. Not to be set
    =============  ===================================================================================================

    A base with a key of such a name itself (Adadelta's ``rho``) keeps it: beside it stands ``sam_rho``, ``sam_eta`` or
    ``sam_adaptive``.

    Groups with ``maximize=True`` are perturbed to where the objective is lower, which is the worse side there.

    Either ``step(closure)``, or by hand, with as many micro-batches in each half as you like and clipping where you
    like::

        loss.backward();  optimizer.first_step(zero_grad=True)
        loss2.backward(); optimizer.second_step(zero_grad=True)

    model: lets ``step(closure)`` leave BatchNorm statistics alone in the second pass, and gives names.
    perturbation: ``"global"``: one for all ranks (under DDP the averaged gradient's; sharded norms are added over the
    ranks), or ``"local"``: under DDP each rank's own, without communication in the first half (``step(closure)`` runs
    it in ``model.no_sync()``; by hand, that is yours to do).
    telemetry_every: every how many steps the cosine between both gradients is taken (0: only when asked for).

    Step hooks are called once for a whole step: before the first half and after the second, also by hand.
    A zero, inf or NaN norm leaves the weights where they are and ``telemetry()`` says so. ``first_step`` and
    ``second_step`` are also called ``ascent_step`` and ``descent_step``.
    Sources: Foret et al., SAM, ICLR 2021; Kwon et al., ASAM, ICML 2021.
    """

    _step_supports_amp_scaling = True  # GradScaler.step calls step() also when it found inf: weights must come back
    _KEYS = ("rho", "eta", "adaptive")
    _OWN: ClassVar[tuple[str, ...]] = ("model", "perturbation", "telemetry_every")  # what copies take along
    _NORM = "gradient_norm"  # in ``report``: of what the weights are perturbed along
    _NEEDS_FIRSTS = False  # whether the first gradients are part of the step
    _align = 0.0

    def __init__(
        self, params: Any, base_optimizer: type[Optimizer] | None = None, rho: float | Tensor = 0.05,
        adaptive: bool | None = False, eta: float = 0.0, *, model: nn.Module | None = None,
        perturbation: str = "global", telemetry_every: int = 10, **base_options: Any,
    ) -> None:  # fmt: skip
        given = {"rho": rho, "eta": eta, "adaptive": adaptive}
        _check_keys(given)
        if perturbation not in ("global", "local"):
            raise ValueError(f"perturbation: expected one of global, local, got {perturbation!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self.telemetry_every = checked_every(telemetry_every)
        if made_for_a_part():  # norm and perturbation would be those of one rank's part
            name = type(self).__name__
            raise TypeError(f"optimizer_class: {name} needs the parameters of all ranks, got one rank's from "
                            f"ZeroRedundancyOptimizer; put it around: {name}(ZeroRedundancyOptimizer(params, ...), "
                            "rho=...)")  # fmt: skip
        base = _make_base(params, base_optimizer, base_options)
        own = beside(base, given)
        for group in base.param_groups:
            _check_keys({**own, **group})
            for i, p in enumerate(group["params"]):
                refuse_clip_in_step(type(self).__name__, f"params[{i}]", p)
        self.model, self.perturbation = model, perturbation
        self._begin()
        self._wrap(base, own)

    def _begin(self) -> None:
        """What copies and checkpoints do not hold."""
        self._ascent: Ascent | None = None
        self._copies: dict[Tensor, Tensor] = {}  # of the weights, kept from step to step
        self.report: dict[str, Any] = {}  # of the last step, tensors where they stand; ``telemetry`` gives numbers
        self._telemetry_wanted = True
        self._note_names()

    # ---- one optimizer, not two ---------------------------------------------------------------------------------

    # quant.state's hook asks: true where the base optimizer writes the quantized copies itself
    KEEPS_QUANTIZERS_FRESH = property(lambda self: getattr(self.base_optimizer, "KEEPS_QUANTIZERS_FRESH", False))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not self._shares:  # called by Optimizer.__init__ for a group that the base already has
            return
        self._refuse_between_halves("add_param_group")
        _check_keys({**self.defaults, **param_group})
        params = [given] if isinstance(given := param_group["params"], Tensor) else list(given)
        for i, p in enumerate(params):
            refuse_clip_in_step(type(self).__name__, f"params[{i}]", p[1] if isinstance(p, tuple) else p)
        param_group = {**param_group, "params": params}
        self.base_optimizer.add_param_group(param_group)
        self._complete()
        self._note_names()

    def _complete(self) -> None:
        super()._complete()
        if any("sam_gap" not in group for group in self.param_groups):
            first = self.param_groups[0]
            self._keep(first.get("sam_steps", 0), first.get("sam_gap"))

    def _note_names(self) -> None:
        self._names = {p: name for name, p in self.model.named_parameters()} if self.model is not None else {}

    @property
    def _steps(self) -> int:
        return self.param_groups[0].get("sam_steps", 0)

    @property
    def gap(self) -> Tensor:
        """The last surrogate gap: float64 (), NaN where it is not known."""
        return self.param_groups[0]["sam_gap"]

    @torch.inference_mode(False)
    def _keep(self, steps: int, gap: Tensor | float | None) -> None:
        """Writes both to every group, where copies and checkpoints take them from."""
        if not isinstance(gap, Tensor):
            device = next((local_part(p).device for group in self.param_groups for p in group["params"]), None)
            device = torch.device("cpu") if device is None or device.type == "meta" else device
            gap = torch.full((), math.nan if gap is None else gap, dtype=torch.float64, device=device)
        for group in self.param_groups:
            group["sam_steps"], group["sam_gap"] = steps, gap

    def _ids(self) -> list[list[int]]:
        """By which a change of the groups is noticed."""
        return [[id(p) for p in group["params"]] for group in self.param_groups]

    def _refuse_between_halves(self, what: str) -> None:
        if self._ascent is not None:
            raise RuntimeError(f"{what}: the weights are perturbed; call second_step() or restore() first")

    # ---- the first half -----------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def first_step(self, zero_grad: bool = False, *, loss: Tensor | float | None = None, scaler: Any = None) -> None:
        """Ascent: keeps a copy of every weight that has a gradient and moves it by delta.

        loss: the loss at the weights, for telemetry and an adaptive radius. scaler: the GradScaler that scaled the
        loss; the gradients are unscaled here unless ``scaler.unscale_(optimizer)`` was called before. Raises
        RuntimeError when called twice (the weights are restored), TypeError for gradients that it cannot use.
        """
        if self._ascent is not None:
            self.restore()
            raise RuntimeError("first_step: called twice without second_step between; the weights were restored")
        _, options = self._call_pre_hooks((self,), {"zero_grad": zero_grad, "loss": loss, "scaler": scaler})
        self._ascend(**options)

    def _call_pre_hooks(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As torch does around ``step``; what the hooks make of the arguments."""
        for hook in itertools.chain(_global_optimizer_pre_hooks.values(), self._optimizer_step_pre_hooks.values()):
            args, options = hook(self, args, options) or (args, options)  # type: ignore[arg-type]
        return args, options

    def _call_post_hooks(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        for hook in itertools.chain(self._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values()):
            hook(self, args, options)  # type: ignore[arg-type]

    @torch.inference_mode(False)  # what is kept from step to step must serve outside, too
    @torch.no_grad()
    def _ascend(self, zero_grad: bool, loss: Tensor | float | None, scaler: Any) -> None:
        self._complete()
        ascent = Ascent(self._ids(), scaler=scaler)
        buckets = self._buckets()
        self._check_loss("first_step", loss)
        ascent.found_inf = self._unscale_first(scaler)
        norm = self._squared_norm(buckets).sqrt()
        record = self._records()
        self.report = {"loss": _detached(loss), self._NORM: norm}
        try:
            self._ascent = ascent
            for bucket in buckets:
                radius = self._radius(bucket.group[key_in(bucket.group, "rho")])
                coefficients = self._coefficients(radius, norm, bucket.weights[0])
                if self._descends_along(bucket.group):
                    coefficients = -coefficients
                self.report.setdefault("rho", radius)
                kept = [room_for(self._copies, p, w) for p, w in zip(bucket.params, bucket.weights, strict=True)]
                quantized = [(q, p) for p in bucket.params if (q := WeightQuantizer.of(p)) is not None]
                for q, p in quantized:
                    q.leaving(p)
                ops.run_sam_perturb(bucket.weights, bucket.grads, kept, coefficients, bucket.adaptive, bucket.eta)
                ascent.kept += zip(bucket.params, bucket.weights, kept, strict=True)
                for q, p in quantized:
                    q.away(p)
                ascent.coefficients.append(coefficients)
        except BaseException:
            self.restore()
            raise
        if record or self._NEEDS_FIRSTS:
            for p, g in self._first_gradients(buckets):
                if zero_grad and not _is_lent(g):
                    p.grad = None  # the tensor is ours from here on, whatever zero_grad does to those it finds
                elif zero_grad or self._NEEDS_FIRSTS:  # for telemetry alone _cosine sees whether they are the same
                    g = g.clone()
                ascent.firsts[p] = g, g._version
        if zero_grad:
            self.zero_grad()

    ascent_step = first_step

    def _first_gradients(self, buckets: list[_Bucket]) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters whose first gradient the second half looks at, with this rank's part of it."""
        return ((p, g) for bucket in buckets for p, g in zip(bucket.params, bucket.grads, strict=True))

    def _check_loss(self, where: str, loss: Any) -> None:
        """Raises where the radius needs a loss that was not given, or has no direction to follow."""

    def _unscale_first(self, scaler: Any) -> Tensor | None:
        return unscale_first(scaler, self)

    def _direction(self, p: Tensor) -> Tensor | None:
        """What ``p`` is perturbed along; None: it stays."""
        return p.grad

    def _descends_along(self, group: dict[str, Any]) -> bool:
        """Whether the worse side is against that direction."""
        return bool(group.get("maximize"))

    def _buckets(self, direction: Callable[[Tensor], Tensor | None] | None = None) -> list[_Bucket]:
        """Every parameter that has a direction; raises before anything is written."""
        direction = direction or self._direction
        buckets: dict[Any, Any] = {}  # key -> group, eta, [(parameter, its part, gradient, adaptive)]
        places: set[int] = set()
        for group in self.param_groups:
            _check_keys(group)
            rho, eta, adapts = (group[key_in(group, key)] for key in self._KEYS)
            names, maximize = group.get("param_names"), bool(group.get("maximize"))
            rho_key = id(rho) if isinstance(rho, Tensor) else float(rho)
            eta = float(eta)
            for i, p in enumerate(group["params"]):
                if (g := direction(p)) is None or is_learned(p):  # a learned scale stays where it is
                    continue
                name = names[i] if names else self._names.get(p)
                what = name or f"params[{i}]"
                if g.layout != torch.strided:
                    raise TypeError(f"{what}: {type(self).__name__} does not take sparse gradients")
                if p.is_complex():
                    raise TypeError(f"{what}: {type(self).__name__} does not take complex parameters")
                ops.check_float_tensor(what, p)
                ops.check_written(what, p)
                refuse_clip_in_step(type(self).__name__, what, p)
                if g.dtype != p.dtype:
                    raise TypeError(f"{what}: expected a gradient of {p.dtype} as the parameter, got {g.dtype}")
                w = p
                if is_sharded(p):
                    if self.perturbation == "local":
                        raise ValueError('perturbation: "local" is for whole parameters (DDP), got a sharded one')
                    if sharding_of(g) != sharding_of(p):
                        g = g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
                    w, g = local_part(p), local_part(g)
                place = w.data_ptr()
                if place in places:  # moved twice, and the second copy would be of a moved weight
                    raise ValueError(f"{what}: expected memory of its own, got another parameter's; tie modules by one "
                                     "Parameter instead of two with the same data")  # fmt: skip
                if w.numel():
                    places.add(place)
                if (adaptive := adapts) is None:
                    adaptive = "weight" in name if name else p.dim() >= 2
                key = (*launch_of(w), sharding_of(p), rho_key, eta, maximize)
                buckets.setdefault(key, (group, eta, []))[2].append((p, w, g, int(adaptive)))
        return [_Bucket(*shared, *map(list, zip(*rows, strict=True))) for *shared, rows in buckets.values()]

    def _squared_norm(self, buckets: list[_Bucket]) -> Tensor:
        """sum (T g)^2 over all parameters and ranks: float64, on the device."""
        parts = ((b.params[0], ops.run_sam_norm(b.weights, b.grads, b.adaptive, b.eta)) for b in buckets)
        return sum_over_ranks(parts, self.param_groups)

    def _radius(self, rho: Tensor | float) -> Tensor | float:
        """The radius of this step, for a group of radius ``rho``."""
        return rho

    def _coefficients(self, rho: Any, norm: Tensor, like: Tensor) -> Tensor:
        """(c, a) = (rho / norm, align) on the device of ``like``, float32 (float64 for float64 weights); (0, 0) where
        there is no direction, because the norm is zero, inf or NaN."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if isinstance(rho, Tensor):
            rho = rho.detach().to(norm.device)
        c = (rho / norm).to(dtype)
        usable = (norm > 0) & norm.isfinite() & c.isfinite()
        return torch.where(usable, torch.stack([c, torch.full_like(c, self._align)]), 0.0).to(like.device)

    # ---- the second half ----------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def second_step(self, zero_grad: bool = False, *, loss: Tensor | float | None = None, scaler: Any = None) -> None:
        """Descent: every kept weight put back bit for bit, then the base optimizer's step with the second gradient.

        loss: the loss at the perturbed weights, for telemetry and an adaptive radius. With the GradScaler, either
        ``scaler.step(optimizer)`` or ``second_step(scaler=scaler)``: inf or NaN in either half skips the base's step.
        Raises RuntimeError without a ``first_step``, or when groups or parameters have changed since.
        """
        self._descend(zero_grad, loss, scaler)
        self._call_post_hooks((self,), {"zero_grad": zero_grad, "loss": loss, "scaler": scaler})

    @torch.inference_mode(False)
    @torch.no_grad()
    def _descend(self, zero_grad: bool, loss: Tensor | float | None, scaler: Any) -> None:
        ascent = self._ascent
        if ascent is None:
            raise RuntimeError("second_step: expected first_step() before it")
        try:
            if ascent.groups != self._ids():
                raise RuntimeError("second_step: the parameter groups have changed since first_step; weights restored")
            self._check_loss("second_step", loss)
            skipped = unscale_second(scaler or ascent.scaler, self, ascent.found_inf)
            self._note_losses(loss, skipped)
            if ascent.firsts and self._records():
                self.report["cosine"] = self._cosine(ascent)
            if skipped:
                self.restore()
            else:
                inside = self._descends_inside(ascent)
                self.restore(but=inside)
                self._merge_gradients(ascent, inside)
                self._step_base(ascent, inside)
        finally:
            self.restore()
        steps = self._steps + 1
        self.report.update(step=steps, skipped=skipped)
        for group in self.param_groups:
            group["sam_steps"] = steps
        self._telemetry_wanted = False
        self._opt_called = True  # what an LR scheduler looks at before it warns
        if zero_grad:
            self.zero_grad()

    descent_step = second_step

    def _descends_inside(self, ascent: Ascent) -> dict[Tensor, Tensor]:
        """The copies that the base's own update reads in place of the weights, so that restoring them costs no pass.
        ASkew's optimizers do, for contiguous weights whose next scale is known without looking at them."""
        base = self.base_optimizer
        if not isinstance(base, ByRule):
            return {}
        constrained = {p for group in base.param_groups if group["grid"] is not None for p in group["params"]}
        return {
            p: copy for p, _, copy in ascent.kept
            if p in constrained and p.grad is not None and p.is_contiguous()
            and (q := WeightQuantizer.of(p)) is not None and q.home_has_scale(p)
        }  # fmt: skip

    def _step_base(self, ascent: Ascent, inside: dict[Tensor, Tensor]) -> None:
        """The base optimizer's step; what it has not taken from ``inside`` is restored, before or by an error."""
        base = self.base_optimizer
        if not inside:
            base.step()
            return
        assert isinstance(base, ByRule)
        for p in inside:
            WeightQuantizer.of(p).returned(p)  # type: ignore[union-attr]
        base.saved_weights, unused = dict(inside), inside
        try:
            base.step()
            unused = base.saved_weights
        finally:
            base.saved_weights, base.first_gradients, base.coefficients = {}, {}, None
            ascent.kept = [item for item in ascent.kept if item[0] in unused]

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def restore(self, *, but: Container[Tensor] = ()) -> None:
        """Puts every perturbed weight back, bit for bit, and forgets the first half. Does nothing between steps.

        Call it when you give a second half up (``step(closure)`` does so by itself). ``but``: weights that stay
        perturbed for now, and with them the first half.
        """
        ascent, self._ascent = self._ascent, None
        if ascent is None:
            return
        going = [item for item in ascent.kept if item[0] not in but]
        if staying := [item for item in ascent.kept if item[0] in but]:
            ascent.kept, self._ascent = staying, ascent
        together: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for _, w, copy in going:
            together.setdefault(launch_of(w), []).append((w, copy))
        for pairs in together.values():
            ops.run_sam_restore(*map(list, zip(*pairs, strict=True)))
        for p, _, _ in going:
            if (q := WeightQuantizer.of(p)) is not None:
                q.returned(p)

    def _merge_gradients(self, ascent: Ascent, inside: Container[Tensor]) -> None:
        """What the base optimizer steps with: for SAM and ASAM the second gradients as they are."""

    def _note_losses(self, loss: Tensor | float | None, skipped: bool) -> None:
        first = self.report["loss"]
        self.report["perturbed_loss"] = second = _detached(loss)
        if first is not None and second is not None:
            gap = first - second if self._directions() == {True} else second - first  # a loss to maximize is a gain
            gap = gap.double() if isinstance(gap, Tensor) else torch.full_like(self.report[self._NORM], gap)
            self.report["surrogate_gap"] = gap
            self._keep_gap(gap, skipped)

    def _directions(self) -> set[bool]:
        """Whether groups maximize."""
        return {bool(group.get("maximize")) for group in self.param_groups}

    def _keep_gap(self, gap: Tensor, skipped: bool) -> None:
        """For the next step's radius; in the same tensor every time, where the replay of a CUDA graph looks for it.
        A step that was skipped, or had nothing to perturb, tells nothing: the gap before it stays."""
        if skipped:
            return
        norm: Tensor = self.report[self._NORM]
        gap = torch.where(norm.isfinite() & (norm > 0), gap.to(norm.device), self.gap.to(norm.device))
        if self.gap.device == gap.device:
            self.gap.copy_(gap)
        else:
            self._keep(self._steps, gap)

    # ---- both halves --------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None, *, scaler: Any = None) -> Any:  # type: ignore[override]
        """Both halves; ``closure`` computes the loss and its gradients (of all micro-batches) and returns the loss.

        It is evaluated twice, gradients are cleared before each, and the first loss is returned. With a ``scaler``,
        the closure calls ``scaler.scale(loss).backward()``. Whatever goes wrong in the second half, the weights are
        restored. Between ``first_step`` and ``second_step``, ``step()`` is the second one: this is how
        ``GradScaler.step(optimizer)`` and Lightning arrive there. Where every gradient is zero nothing is perturbed, so
        that ``step()`` needs no closure (``torch.distributed.checkpoint`` makes the base's state this way).
        """
        if closure is None and self._ascent is not None:
            return self.second_step(scaler=scaler)
        args, options = self._call_pre_hooks((self, closure), {"scaler": scaler})
        loss = self._step(*args[1:], **options)
        self._call_post_hooks(args, options)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # otherwise torch would call the hooks of a step by hand twice: its halves call them

    def _step(self, closure: Callable[[], Any] | None, scaler: Any) -> Any:
        if closure is None:
            if not self._has_zero_gradients():
                raise ValueError("closure: expected a function that computes the loss and its gradients, got None; by "
                                 "hand use first_step and second_step")  # fmt: skip
            return self.base_optimizer.step()
        if not callable(closure):
            raise TypeError(f"closure: expected a function, got {type(closure).__name__}")
        if self._ascent is not None:
            self.restore()
            raise RuntimeError("step: called with a closure between first_step and second_step; weights restored")
        return self._passes(closure, scaler)

    def _passes(self, closure: Callable[[], Any], scaler: Any) -> Any:
        """The forwards and backwards of a step, and what is done after each; the loss that ``step`` returns."""
        self.zero_grad()
        with torch.enable_grad(), self._first_pass():
            loss = checked_loss(closure())
        self._ascend(True, loss, scaler)
        try:
            frozen = contextlib.nullcontext() if self.model is None else frozen_batchnorm_stats(self.model)
            with torch.enable_grad(), frozen:
                perturbed = checked_loss(closure())
            self._descend(False, perturbed, scaler)
        finally:
            self.restore()
        return loss

    def _first_pass(self) -> contextlib.AbstractContextManager[Any]:
        if self.perturbation != "local":
            return contextlib.nullcontext()
        if not hasattr(self.model, "no_sync"):
            raise ValueError('model: expected the DistributedDataParallel model with perturbation="local"')
        return self.model.no_sync()  # type: ignore[union-attr,operator]

    @torch.no_grad()
    def _has_zero_gradients(self) -> bool:
        """Gradients, and each of them zero on every rank; waits for the device."""
        return bool(buckets := self._buckets(lambda p: p.grad)) and not self._squared_norm(buckets).item()

    # ---- telemetry ----------------------------------------------------------------------------------------------

    def _records(self) -> bool:
        """Whether this step takes the cosine; all ranks that share parameters must agree, so asking does not count."""
        if self.telemetry_every and self._steps % self.telemetry_every == 0:
            return True
        return self._telemetry_wanted and not any(is_sharded(p) for group in self.param_groups for p in group["params"])

    def _cosine(self, ascent: Ascent) -> Tensor | None:
        """Between both gradients, over all parameters and ranks: float64, on the device. None where the first gradients
        were overwritten in place (``zero_grad(set_to_none=False)``)."""
        parts = []
        for p, (first, version) in ascent.firsts.items():
            if p.grad is not None:
                second = local_part(p.grad)
                if first._version != version or second is first:
                    return None
                parts.append((p, products(first, second)))
        dot, one, other = sum_over_ranks(parts, self.param_groups, (3,))
        return dot / (one * other).sqrt()

    def telemetry(self) -> dict[str, Any]:
        """Numbers of the last step; waits for the device. Empty before the first.

        ``step``, ``rho`` (the first group's, or the adaptive one), ``gradient_norm`` (||T g||), ``perturbed`` (False
        where that was zero, inf or NaN, which ``reason`` tells), ``skipped`` (GradScaler found inf: no base step);
        ``loss``, ``perturbed_loss`` and ``surrogate_gap`` (their difference) where the losses were given; ``cosine``
        between both gradients at every ``telemetry_every``-th step and at the step after a call of ``telemetry``.
        """
        self._telemetry_wanted = True
        if "step" not in self.report:
            return {}
        known = {key: value for key, value in self.report.items() if value is not None}
        report = {key: value.item() if isinstance(value, Tensor) else value for key, value in known.items()}
        norm = report[self._NORM]
        report["perturbed"] = 0 < norm < math.inf
        if not report["perturbed"]:
            kind = "zero" if norm == 0 else "NaN" if math.isnan(norm) else "inf"
            what = self._NORM.removesuffix("_norm")
            report["reason"] = f"the {what}'s norm was {kind}: weights not perturbed"
        return report

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _pack(self) -> dict[str, Any]:
        """The groups hold SAM's own keys, the surrogate gap and the step count among them."""
        self._refuse_between_halves("state_dict")
        self._complete()
        packed = self.base_optimizer.state_dict()
        own = {"sam_steps": self._steps, "sam_gap": self.gap.clone()}
        packed["param_groups"] = [{**group, **own} for group in packed["param_groups"]]
        return packed

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        self._refuse_between_halves("load_state_dict")
        own = state_dict.pop("sam", {})  # where the first versions kept what the groups hold now
        self._complete()
        before = [{(k := key_in(group, key)): group[k] for key in self._KEYS} for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, before, strict=True):
            group.update({**kept, **group})
        first = {"sam_steps": own.get("steps", 0), "sam_gap": own.get("gap"), **self.param_groups[0]}
        self._keep(first["sam_steps"], None if first["sam_gap"] is None else float(first["sam_gap"]))
        self.report = {}

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_between_halves("copy")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()
        self._complete()


class ASAM(SAM):
    """SAM with the scale-invariant radius of ASAM: T = |w| + eta for weights (by name, or 2 and more dimensions).

    Source: Kwon, Kim, Park, Choi, ASAM, ICML 2021.
    """

    def __init__(
        self, params: Any, base_optimizer: type[Optimizer] | None = None, rho: float | Tensor = 0.5,
        adaptive: bool | None = None, eta: float = 0.01, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, base_optimizer, rho, adaptive, eta, **options)


class AlignedSAM(SAM):
    """Aligned gradients (SAGM; ASGA's inner step): minimises L(w) + L_p(w - a grad L(w)) with L_p(w) = L(w + delta).

        delta = (rho_t T^2 / ||T g|| - a) g;   the base steps with (g + g') / 2
        rho_t = clip(ln(1 + max(h, 0)), rho_min, rho_max),   h the surrogate gap L_p - L of the step before

    align: a >= 0. rho_max: switches the adaptive radius on (``rho`` is then the first step's, and the losses must be
    given to ``first_step`` and ``second_step``; ``step(closure)`` does). Under ``torch.distributed`` the gap is
    averaged over ``process_group`` (copies share it), so that every rank has the same radius. A step after a gap that
    is NaN has the radius ``rho``. A parameter that received one of the two gradients counts the other as zero; one that
    was frozen in between (``requires_grad_(False)``) is left alone. ``perturbation="local"`` is refused: the first
    gradient is part of the step. ``rho_max`` refuses groups of which only some maximize: nothing tells what is worse.
    Sources: Wang et al., SAGM, CVPR 2023; Ma et al., ASGA, ICML 2025.
    """

    _OWN = (*SAM._OWN, "_group", "_align", "_rho_min", "_rho_max")
    _NEEDS_FIRSTS = True

    def __init__(
        self, params: Any, base_optimizer: type[Optimizer] | None = None, rho: float | Tensor = 0.05,
        adaptive: bool | None = False, eta: float = 0.01, *, align: float = 0.001, rho_max: float | None = None,
        rho_min: float = 0.0, process_group: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        self._align, self._rho_min = ops.number("align", align, 0.0), ops.number("rho_min", rho_min, 0.0)
        self._rho_max = None if rho_max is None else ops.number("rho_max", rho_max, self._rho_min)
        refuse_local(options, "the first gradient is part of the step")
        self._group = ProcessGroup(process_group)
        super().__init__(params, base_optimizer, rho, adaptive, eta, **options)

    @property
    def process_group(self) -> Any:
        return self._group.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._group = ProcessGroup(group)

    def _radius(self, rho: Tensor | float) -> Tensor | float:
        if self._rho_max is None:
            return rho
        gap = self.gap
        rho = rho.detach().to(gap.device) if isinstance(rho, Tensor) else torch.full_like(gap, rho)
        return torch.where(gap.isnan(), rho, gap.clamp(min=0).log1p().clamp(self._rho_min, self._rho_max))

    def _check_loss(self, where: str, loss: Any) -> None:
        if self._rho_max is None:
            return
        if loss is None:
            raise ValueError(f"loss: expected {where}(loss=...), which the radius follows with rho_max, got None")
        if len(self._directions()) > 1:
            raise ValueError("maximize: expected all groups to maximize or none with rho_max, because the radius "
                             "follows how much worse the loss gets, got some of each")  # fmt: skip

    def _keep_gap(self, gap: Tensor, skipped: bool) -> None:
        super()._keep_gap(gap if self._rho_max is None else self._group.mean(gap), skipped)

    def _first_gradients(self, buckets: list[_Bucket]) -> Iterator[tuple[Tensor, Tensor]]:
        yield from super()._first_gradients(buckets)
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and is_learned(p):  # not perturbed, but stepped as all others
                yield p, local_part(p.grad)

    def _merge_gradients(self, ascent: Ascent, inside: Container[Tensor]) -> None:
        # one pair of coefficients for each launch: they are all zero or none of them is
        coefficients = {launch_of(c): c for c in ascent.coefficients}
        together: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for p in (p for group in self.param_groups for p in group["params"]):
            first = ascent.firsts.get(p, (None, 0))[0]
            if p.grad is None:
                if first is None or not p.requires_grad:
                    continue
                p.grad = torch.zeros_like(p)
            second = local_part(p.grad)
            first = torch.zeros_like(second) if first is None else first
            if p in inside:
                self.base_optimizer.first_gradients[p] = first  # type: ignore[attr-defined]
                self.base_optimizer.coefficients = coefficients[launch_of(second)]  # type: ignore[attr-defined]
            else:
                together.setdefault(launch_of(second), []).append((second, first))
        for key, pairs in together.items() if coefficients else ():
            if key not in coefficients:  # nothing of this launch was perturbed, as of scales
                any_other = next(iter(coefficients.values()))
                coefficients[key] = any_other.to(key[0], torch.float64 if key[1] else torch.float32)
            ops.sam_average_(*map(list, zip(*pairs, strict=True)), coefficients[key])


def _make_base(params: Any, base_optimizer: Any, options: dict[str, Any]) -> Optimizer:
    """The base optimizer: the one that was given, or one made of parameters and a class."""
    if isinstance(params, Optimizer):
        if base_optimizer is not None or options:
            given = "base_optimizer" if base_optimizer is not None else next(iter(options))
            raise TypeError(f"{given}: not expected beside a base optimizer that is already made")
        base = params
    else:
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            got = type(params).__name__ if base_optimizer is None else repr(base_optimizer)
            raise TypeError("base_optimizer: expected a torch.optim.Optimizer as first argument, or parameters and an "
                            f"Optimizer class, got {got}")  # fmt: skip
        base = base_optimizer(params, **options)
    if isinstance(base, SAM):
        raise TypeError("base_optimizer: expected an optimizer that is not itself sharpness-aware, got a SAM")
    return checked_base(base)


def refuse_local(options: dict[str, Any], why: str) -> None:
    if options.get("perturbation", "global") == "local":
        raise ValueError(f'perturbation: expected "global": {why}, got "local"')


def products(a: Tensor, b: Tensor) -> Tensor:
    """(a b, a a, b b), summed over the elements: float64 (3,)."""
    a, b = (t.flatten().to(compute_dtype(t.dtype)) for t in (a, b))
    return torch.stack([a @ b, a @ a, b @ b]).double()


def launch_of(t: Tensor) -> tuple[torch.device, bool]:
    """What tensors of one launch share."""
    return t.device, t.dtype == torch.float64


def _is_lent(g: Tensor) -> bool:
    """Part of somebody's memory (DDP's buckets, a flat buffer), who may write there after zero_grad."""
    return g._is_view() or g.untyped_storage().nbytes() != g.numel() * g.element_size()


def _check_keys(keys: dict[str, Any]) -> None:
    rho, eta, adaptive = (key_in(keys, key) for key in SAM._KEYS)
    ops.rate_tensor(rho, keys[rho], 0.0)
    ops.number(eta, keys[eta], 0.0)
    if keys[adaptive] not in (True, False, None):
        raise TypeError(f"{adaptive}: expected True, False or None, got {keys[adaptive]!r}")


def checked_loss(loss: Any) -> Any:
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise TypeError(f"closure: expected it to return a scalar loss, got a tensor of shape {tuple(loss.shape)}")
    elif isinstance(loss, bool) or not isinstance(loss, (int, float)):
        raise TypeError(f"closure: expected it to return the loss, got {loss!r}")
    return loss


def _detached(loss: Any) -> Any:
    return loss.detach().reshape(()) if isinstance(loss, Tensor) else loss
