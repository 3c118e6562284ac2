"""ASkewSGD and ASkewAdamW: torch.optim's rules under the interval constraint, one pass over each weight a step."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .. import contract, ops
from ..quant import QuantConfig, WeightQuantizer, grid_from_dict
from ..quant.sharding import is_sharded, local_part, made_for_a_part, own_rows, sharding_of
from ..quant.state import ScaleBatch, next_scales, share_rows
from .telemetry import Record, TelemetryLog

FREEZE_SCALE = ("anneal", "init", "never")
_QUANTIZER_KEYS = ("scale", "scale_frozen", "row_sums")


def _fixed_scale(group: dict[str, Any], p: Tensor, rows: int) -> Tensor:
    """The group's scale tensor as (rows,); one number serves every row."""
    scale = group["scale"].detach().to(p.device).reshape(-1)
    return ops.check_scale("scale", scale.expand(rows) if scale.numel() == 1 else scale, p, "the parameter")


class _Launch:
    """What one launch takes, kept from step to step while nothing else touches the tensors."""

    def __init__(self, members: list[Tensor], quantizers: list[WeightQuantizer], clamp: bool, key: list[Any],
                 levels: Tensor, encoding: list[int]) -> None:  # fmt: skip
        self.members, self.quantizers, self.clamp, self.key = members, quantizers, clamp, key
        self.levels, self.encodings = [levels] * len(members), encoding * len(members)
        self.sharded = is_sharded(members[0])
        self.steps: list[Tensor] = []  # AdamW's counters, and their versions when it last moved them
        self.step_versions: list[int] = []

    def prepare(self) -> None:
        """The outputs, and how the next scales come from them."""
        copies = [q.copy_to_write(p) for q, p in zip(self.quantizers, self.members, strict=True)]
        sums = [q.sums_to_write() for q in self.quantizers]
        if self.sharded:  # the kernel sees this rank's parts, and the rows of scales and sums that are theirs
            self.own = [own_rows(p, q.rows(p)) for q, p in zip(self.quantizers, self.members, strict=True)]
            sums = [None if s is None else s[own] for s, own in zip(sums, self.own, strict=True)]
        self.copied, self.summed = [c is not None for c in copies], [s is not None for s in sums]
        self.copies, self.sums = self._or_empty(copies), self._or_empty(sums)
        together: dict[Any, list[tuple[WeightQuantizer, Tensor]]] = {}
        for q, p in zip(self.quantizers, self.members, strict=True):
            if q.batches(p):
                together.setdefault(q.rule, []).append((q, p))
        self.batches = [ScaleBatch(*zip(*pairs, strict=True)) for pairs in together.values()]  # type: ignore[arg-type]
        self.contiguous = all(local_part(p).is_contiguous() for p in self.members)

    def _or_empty(self, tensors: list[Tensor | None]) -> list[Tensor]:
        """An operator's list: empty where nothing is present, a tensor without elements for one that is absent."""
        if all(t is None for t in tensors):
            return []
        return [
            t if t is not None else torch.empty(0, device=p.device) for t, p in zip(tensors, self.members, strict=True)
        ]


class _Plan:
    """The launches of one group, and what they were made for."""

    def __init__(self, key: tuple, params: list[Tensor], launches: list[_Launch]) -> None:
        self.key, self.params, self.launches = key, params, launches
        self.quantizers: list[WeightQuantizer] = [p._askew_quantizer for p in params]  # type: ignore[attr-defined]
        self.revisions: list[int] = []
        self.used = False

    def holds(self, params: list[Tensor]) -> bool:
        """Same tensors, and since the last step only the update pass has touched them."""
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and all(
                WeightQuantizer.of(p) is q and q.revision == revision and q.settled(p)
                for p, q, revision in zip(params, self.quantizers, self.revisions, strict=True)
            )
        )


class _Skewed(Optimizer):
    """What both optimizers share: group keys, scales and their freezing, telemetry, checkpoints.

    A subclass gives ``OPERATOR``, ``_plain_step(group, params)``, ``_states(group, params)`` and ``_numbers(group)``.
    """

    KEEPS_QUANTIZERS_FRESH = True  # in groups with a grid; quant.state's hook asks
    OPERATOR: str
    TAKES_SPARSE: bool  # in groups without a grid

    def __init__(self, params: Any, defaults: dict[str, Any], telemetry_every: int, telemetry_log: Any = None) -> None:
        if isinstance(telemetry_every, bool) or not isinstance(telemetry_every, int) or telemetry_every < 0:
            raise ValueError(f"telemetry_every: expected an int >= 0, got {telemetry_every!r}")
        self.telemetry_every = telemetry_every
        self._steps = 0
        self._telemetry_wanted = True
        self._record = Record()
        self._log = None if telemetry_log is None else TelemetryLog(telemetry_log, type(self).__name__)
        self._plans: dict[int, _Plan] = {}
        # Of a sharpness-aware step: kept weights to start from, taken out as they are used; first gradients to
        # average with, and the coefficients that tell whether they count.
        self.kept: dict[Tensor, Tensor] = {}
        self.firsts: dict[Tensor, Tensor] = {}
        self.coefficients: Tensor | None = None
        super().__init__(params, defaults)

    # ---- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if group["grid"] is not None:
            for p in group["params"]:
                self._quantizer(group, p)
        elif any(WeightQuantizer.of(p) is not None for p in group["params"]):
            warnings.warn(
                f"{type(self).__name__}: a group without a grid holds weights of quantized layers, which are then not "
                "under the constraint; give it ak.param_groups(model) in place of model.parameters()",
                stacklevel=3,
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        ops.rate_tensor("lr", group["lr"], 0.0)
        ops.rate_tensor("eps", group["eps"], 0.0, 1.0, open_low=True)
        for name in ("alpha", "weight_decay"):
            ops.number(name, group[name], 0.0)
        if group["skew"] not in ops.SKEWS:
            raise ValueError(f"skew: expected one of {', '.join(ops.SKEWS)}, got {group['skew']!r}")
        if group["freeze_scale"] not in FREEZE_SCALE:
            raise ValueError(f"freeze_scale: expected one of {', '.join(FREEZE_SCALE)}, got {group['freeze_scale']!r}")
        if group["grid"] is None:
            return
        if made_for_a_part():
            raise TypeError(
                f"optimizer_class: {type(self).__name__} cannot be sharded by ZeroRedundancyOptimizer: the scale of a "
                "quantized weight moves with its step, which one rank alone would make; use fully_shard (FSDP2)"
            )
        ops.check_grid(group["grid"])
        for i, p in enumerate(group["params"]):
            ops.check_float_tensor(f"params[{i}]", p)
        config = self._config(group)
        for p in group["params"]:
            rows = WeightQuantizer(config).rows(p)
            if isinstance(group["scale"], Tensor):
                _fixed_scale(group, p, rows)

    @staticmethod
    def _config(group: dict[str, Any]) -> QuantConfig:
        rule = group["scale"]
        if rule is not None and not isinstance(rule, (str, Tensor)):
            raise TypeError(f"scale: expected a rule's name, None or a tensor, got {rule!r}")
        if isinstance(rule, Tensor):
            rule = "absmax"  # never asked: the scale is frozen at once
        return QuantConfig(
            weight=group["grid"], scale=rule, granularity=group["granularity"], group_size=group["group_size"],
            forward="relaxed", sawb_coefficients=group["sawb_coefficients"],
        )  # fmt: skip

    def _quantizer(self, group: dict[str, Any], p: Tensor) -> WeightQuantizer:
        """The weight's quantizer: its layer's, or one made here for a weight without a layer."""
        found = WeightQuantizer.of(p)
        if found is None:
            found = WeightQuantizer(self._config(group))
            found.tie(p)  # type: ignore[arg-type]
        elif found.config.weight != group["grid"]:
            raise ValueError(f"grid: the parameter's layer has {found.config.weight}, its group {group['grid']}")
        if isinstance(group["scale"], Tensor) and not found.frozen:
            found.freeze(p, _fixed_scale(group, p, found.rows(p)))
        return found

    # ---- the step -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step; ``closure`` re-evaluates the model and returns the loss.

        Groups with a grid: every weight is read once and written once, in one launch for each device. Groups without
        one: torch.optim's own step. Everything is checked before anything is written. Inside compiled code it runs as
        it is.
        """
        return self._uncompiled(closure) if torch.compiler.is_compiling() else self._step(closure)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _uncompiled(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        return self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        rates = []
        for group, params in work:
            rates.append(self._rates(group))
            if group["grid"] is None:
                if not self.TAKES_SPARSE and any(p.grad.layout != torch.strided for p in params):
                    raise TypeError(f"grad: {type(self).__name__} does not take sparse gradients")
                continue
            for p in params:
                grad: Tensor = p.grad  # type: ignore[assignment]
                if grad.layout != torch.strided:
                    raise TypeError(
                        f"grad: {type(self).__name__} does not take sparse gradients for a quantized parameter"
                    )
                if grad.dtype != p.dtype:
                    raise TypeError(f"grad: expected the parameter's {p.dtype}, got {grad.dtype}")
        every = self.telemetry_every
        record = bool(every) and (self._telemetry_wanted or self._steps % every == 0)
        if record:
            self._record = Record(self._steps + 1, loss=loss.detach() if isinstance(loss, Tensor) else loss)
            self._telemetry_wanted = False
        for index, (group, params) in enumerate(work):
            if not params:
                continue
            if group["grid"] is None:
                self._plain_step(group, params)
            else:
                if record:
                    self._record.keep_rates(index, group)
                self._skewed_step(index, group, params, rates[index], record)
        self._steps += 1
        if record and self._log is not None:
            self._log.recorded(self._record, self.param_groups)
        return loss

    @staticmethod
    def _rates(group: dict[str, Any]) -> list[Tensor]:
        """lr and eps, which schedules and users change between steps, as checked 0-dim tensors."""
        return [ops.rate_tensor("lr", group["lr"], 0.0), ops.rate_tensor("eps", group["eps"], 0.0, 1.0, True)]

    @staticmethod
    def _freezes(group: dict[str, Any]) -> bool:
        """Whether the scale is to be frozen at this step."""
        if group["freeze_scale"] != "anneal":
            return group["freeze_scale"] == "init"
        eps = group["eps"]
        if "annealing" in group and (group["annealing"] or (isinstance(eps, Tensor) and eps.device.type != "cpu")):
            return group["annealing"]  # EpsilonAnnealing keeps this on the host: no synchronisation
        return float(eps) < 1.0

    def _skewed_step(self, index: int, group: dict[str, Any], params: list[Tensor], rates: list[Tensor],
                     record: bool) -> None:  # fmt: skip
        freeze = self._freezes(group)
        key = (id(group), id(group["grid"]), group["freeze_scale"], freeze, bool(group.get("momentum")),
               id(self.state), len(self.state))  # fmt: skip
        plan = self._plans.get(index)
        if plan is None or plan.key != key or not (plan.holds(params) and all(map(self._lasts, plan.launches))):
            plan = self._plans[index] = _Plan(key, params, self._launches(group, params, freeze))
        for launch in plan.launches:
            self._run(launch, group, rates, record, plan.used)
        plan.used = True
        plan.revisions = [q.revision for q in plan.quantizers]

    def _launches(self, group: dict[str, Any], params: list[Tensor], freeze: bool) -> list[_Launch]:
        buckets: dict[Any, list[Tensor]] = {}
        for p in params:
            quantizer = self._quantizer(group, p)
            if freeze and not quantizer.frozen:
                quantizer.freeze(p)
            self._keep_scale(p, quantizer)
            frozen = quantizer.frozen and group["freeze_scale"] != "never"
            key = (p.device, frozen, p.dtype == torch.float64, sharding_of(p), *self._bucket(group, p))
            buckets.setdefault(key, []).append(p)
        launches = []
        for (device, clamp, _, _, *rest), members in buckets.items():
            quantizers = [self._quantizer(group, p) for p in members]
            levels = group["grid"].levels_tensor(device)
            launches.append(_Launch(members, quantizers, clamp, rest, levels, group["grid"].encoding))
        return launches

    def _run(self, launch: _Launch, group: dict[str, Any], rates: list[Tensor], record: bool, again: bool) -> None:
        """One launch; ``again``: since the launch before nothing else has touched the weights or their quantizers."""
        members, quantizers = launch.members, launch.quantizers
        if again:
            for batch in launch.batches:
                batch.update()
            scales = [q.scale for q in quantizers]
        else:
            scales = next_scales(quantizers, members)
            launch.prepare()
        states = self._states(group, launch)
        totals = []
        if record:
            totals = [torch.zeros(contract.NUM_TOTALS, dtype=torch.float64, device=p.device) for p in members]
            self._record.totals.update(zip(members, totals, strict=True))
        leading, numbers = self._numbers(group, launch)
        weights: list[Tensor] = members
        grads: list[Tensor] = [p.grad for p in members]  # type: ignore[misc]
        if launch.sharded:
            weights, grads = [local_part(p) for p in members], [local_part(g) for g in grads]
            states = {key: t if t is None else [local_part(b) for b in t] for key, t in states.items()}
            scales = [s[own] for s, own in zip(scales, launch.own, strict=True)]
        try:
            ops.run_skew_update(
                self.OPERATOR, weights, grads, states, scales, launch.levels,
                launch.encodings, launch.copies, ops.SkewStats(launch.sums, totals), [*leading, *rates],
                [*numbers, group["skew"] == "direction", launch.clamp, group["maximize"], group["skip_nonfinite"]],
                contiguous=launch.contiguous, descent=self._descent(members, weights),
            )  # fmt: skip
        except BaseException:
            for q in quantizers:  # their scales have moved on
                q.invalidate()
            raise
        if launch.sharded and not quantizers[0].frozen:
            share_rows(quantizers, members)
        clamped = launch.clamp and not group["skip_nonfinite"]  # a skipped element stays where it was
        for q, p, copied, summed in zip(quantizers, members, launch.copied, launch.summed, strict=True):
            q.updated(p, copied, summed, clamped)
            self.kept.pop(p, None)

    def _descent(self, members: list[Tensor], weights: list[Tensor]) -> list[Any]:
        """kept, firsts and coefficients for the operator; nothing in a usual step."""
        if not self.kept:
            return []
        absent = torch.empty(0, device=weights[0].device, dtype=weights[0].dtype)
        kept, firsts = ([some.get(p, absent) for p in members] for some in (self.kept, self.firsts))
        if not self.firsts or self.coefficients is None:
            return [kept]
        return [kept, firsts, self.coefficients]

    def _buffers(self, key: str, members: list[Tensor]) -> list[Tensor]:
        """``state[p][key]`` of each, zeros where it is missing, in the type of the weight (a model may be cast)."""
        found = []
        for p in members:
            state = self.state[p]
            buffer = state.get(key)
            if buffer is None:
                buffer = state[key] = torch.zeros_like(p)
            elif buffer.dtype != p.dtype:
                buffer = state[key] = buffer.to(p.dtype)
            found.append(buffer)
        return found

    def _bucket(self, group: dict[str, Any], p: Tensor) -> tuple[Any, ...]:
        """What must be equal for parameters to share a launch, besides the device."""
        raise NotImplementedError

    def _lasts(self, launch: _Launch) -> bool:
        """Whether the bucket of a launch that has run is still one."""
        raise NotImplementedError

    def _plain_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _states(self, group: dict[str, Any], launch: _Launch) -> dict[str, list[Tensor] | None]:
        """The rule's buffers for a launch, made where they are missing."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any], launch: _Launch) -> tuple[list[Tensor], list[Any]]:
        """The rule's own arguments: 0-dim tensors that come before lr, and numbers."""
        raise NotImplementedError

    # ---- telemetry ----------------------------------------------------------------------------------------------

    def telemetry(self) -> list[dict[str, Any]]:
        """What the passes summed up, for each quantized tensor of the last recorded step.

        A step is recorded when ``telemetry()`` was called since the step before, and every ``telemetry_every``-th.
        Keys: ``step``, ``name`` (or index), ``numel``, ``lr``, ``eps``, ``alpha``, ``fraction_infeasible`` and
        ``mean_violation`` (sum max(0, -h) / numel) at the point where the step started, ``flips`` (weights whose
        nearest level changed), ``velocity_norm`` (‖v‖, w moved by lr v), ``grad_velocity`` (g·v), ``nonfinite``
        (gradient elements). Waits for the device. Empty before the first step.
        """
        self._telemetry_wanted = True
        return self._record.rows(self.param_groups)

    def log(self, **numbers: Any) -> None:
        """A line in ``telemetry_log`` (nothing without one): your numbers (loss=…, accuracy=…, sharpness=…).

        With ``epoch=…`` it also holds a histogram of every quantized weight, one frame of the report. The last
        recorded step is written as well; call it at the end of a run.
        """
        if self._log is not None:
            self._log.note(self._steps, self.param_groups, numbers)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's, plus the scales (with the sums that they belong to); grids as plain dicts."""
        self._keep_scales()
        packed = super().state_dict()
        packed["param_groups"] = [
            {**g, "grid": None if g["grid"] is None else g["grid"].to_dict()} for g in packed["param_groups"]
        ]
        packed["askew_steps"] = self._steps
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bit for bit what ``state_dict`` gave, in the stored types; load the model's weights first or after.

        The state of torch's optimizer of this kind is taken as well: it says nothing of grid, eps and alpha, which
        stay as they are. Raises ValueError, before anything changes, where a group has another grid.
        """
        groups = [
            self._group_to_load(index, saved, present)
            for index, (saved, present) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False))
        ]
        groups += state_dict["param_groups"][len(groups) :]  # too many: torch says so
        rest: dict[str, Any] = {"state": {}, "param_groups": groups}
        kept: dict[Any, dict[str, Any]] = {}
        for index, state in state_dict["state"].items():
            kept[index] = {k: state[k] for k in _QUANTIZER_KEYS if k in state}
            rest["state"][index] = {k: v for k, v in state.items() if k not in _QUANTIZER_KEYS}
        super().load_state_dict(rest)
        self._steps = state_dict.get("askew_steps", 0)
        self._record = Record()
        for saved, group in zip(groups, self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                if group["grid"] is not None and "scale" in kept.get(index, {}):
                    self._restore(group, p, kept[index])

    def _group_to_load(self, index: int, saved: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
        if "grid" not in saved:  # another optimizer's: its `eps` is AdamW's denominator's
            foreign = {k: v for k, v in saved.items() if k not in _OWN_KEYS}
            if "adam_eps" in present and "eps" in saved:
                foreign["adam_eps"] = saved["eps"]
            return {**present, **foreign, "params": saved["params"]}
        grid = saved["grid"]
        grid = grid_from_dict(grid) if isinstance(grid, dict) else grid
        if grid != present["grid"]:
            raise ValueError(f"param_groups[{index}]: grid: expected {present['grid']}, the state has {grid}")
        return {**present, **saved, "grid": present["grid"]}

    def _restore(self, group: dict[str, Any], p: Tensor, kept: dict[str, Any]) -> None:
        quantizer = self._quantizer(group, p)
        quantizer.restore(p, kept["scale"], bool(kept.get("scale_frozen")), kept.get("row_sums"))
        self._keep_scale(p, quantizer)

    def _keep_scale(self, p: Tensor, quantizer: WeightQuantizer) -> None:
        """The quantizer's own tensors in ``state``, where checkpoints and copies of the optimizer find them."""
        self.state[p].update(zip(_QUANTIZER_KEYS, quantizer.tensors, strict=True))

    def _keep_scales(self) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["grid"] is not None else []:
                quantizer = self._quantizer(group, p)
                if not p.is_meta:
                    quantizer.current_scale(p)
                self._keep_scale(p, quantizer)

    def __getstate__(self) -> dict[str, Any]:
        self._keep_scales()
        return {**super().__getstate__(), "telemetry_every": self.telemetry_every, "_steps": self._steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.kept, self.firsts, self.coefficients = {}, {}, None
        self._record, self._log, self._telemetry_wanted, self._plans = Record(), None, True, {}
        super().__setstate__(state)
        for group in self.param_groups:  # an unpickled parameter has lost its quantizer
            for p in group["params"] if group["grid"] is not None else []:
                if "scale" in (kept := self.state.get(p, {})) and WeightQuantizer.of(p) is None:
                    self._restore(group, p, kept)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)


# Group keys that torch's optimizers do not have, or in another sense.
_OWN_KEYS = ("grid", "scale", "granularity", "group_size", "sawb_coefficients", "alpha", "eps", "skew", "freeze_scale",
             "skip_nonfinite", "annealing", "params")  # fmt: skip
_COMMON = {
    "grid": None, "scale": None, "granularity": "per_channel", "group_size": None, "sawb_coefficients": None,
}  # fmt: skip


class ASkewSGD(_Skewed):
    """SGD under the interval constraint h_eps(w) >= 0 (``ops.skew_sgd_`` has the formulas).

    params: parameters, or groups as ``ak.param_groups(model)`` makes them. Group keys beside torch.optim.SGD's:

    ==================  =============================================================================================
    ``grid``            the levels; None (default): the group is stepped by torch.optim.SGD's own code
    ``scale``           a rule's name, None (default: ``quant.default_rule`` of the grid) or a fixed tensor
    ``granularity``     ``per_tensor``, ``per_channel`` (default), ``per_group`` with ``group_size``
    ``alpha``           strength of the push towards feasibility, >= 0
    ``eps``             the constraint's, in (0, 1]; 1 is unconstrained; ``EpsilonAnnealing`` sets it
    ``skew``            ``"gradient"`` (published: the skewed velocity replaces the gradient) or ``"direction"`` (the
                        base optimizer's own step is skewed last, which keeps the guarantee with momentum)
    ``freeze_scale``    ``"anneal"`` (default: at the first step with eps < 1), ``"init"`` or ``"never"``; weights are
                        clamped to the hull once the scale is frozen
    ``skip_nonfinite``  leave elements alone whose gradient is inf or NaN, instead of doing what torch.optim does
    ==================  =============================================================================================

    lr and eps may be floats or 0-dim tensors. While the scale moves, a step uses the scale of the weights as the step
    found them, and the layer's next forward uses that scale with the new weights.
    ``telemetry_every``: every how many steps the sums for ``telemetry()`` are taken (0: never). ``telemetry_log``: a
    file to which every recorded step and what ``log(…)`` is given are appended, as lines of JSON (``optim.telemetry``);
    not part of copies and checkpoints.
    Raises TypeError/ValueError naming the argument before anything is written.
    """

    OPERATOR = "skew_sgd_"
    TAKES_SPARSE = True

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, *, alpha: float = 1.0, eps: float | Tensor = 1.0,
        skew: str = "gradient", freeze_scale: str = "anneal", skip_nonfinite: bool = False, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None, telemetry_every: int = 10,
        telemetry_log: str | os.PathLike | None = None, **grid_options: Any,
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, alpha=alpha,
            eps=eps, skew=skew, freeze_scale=freeze_scale, skip_nonfinite=skip_nonfinite, maximize=maximize,
            foreach=foreach, fused=fused, **_grid_defaults(grid_options),
        )  # fmt: skip
        super().__init__(params, defaults, telemetry_every, telemetry_log)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        ops.number("momentum", group["momentum"], 0.0)
        ops.number("dampening", group["dampening"], -float("inf"))
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov: needs momentum > 0 and dampening = 0")

    def _bucket(self, group: dict[str, Any], p: Tensor) -> tuple[Any, ...]:
        return (bool(group["momentum"]) and "momentum_buffer" not in self.state[p],)

    def _lasts(self, launch: _Launch) -> bool:
        return not launch.key[0]

    def _states(self, group: dict[str, Any], launch: _Launch) -> dict[str, list[Tensor] | None]:
        if not group["momentum"]:
            return {"momentum_buffers": None}
        return {"momentum_buffers": self._buffers("momentum_buffer", launch.members)}

    def _numbers(self, group: dict[str, Any], launch: _Launch) -> tuple[list[Tensor], list[Any]]:
        first = launch.key[0]  # torch's first step takes the gradient whole; with a zero buffer that is dampening 0
        return [], [
            float(group["alpha"]), float(group["momentum"]), 0.0 if first else float(group["dampening"]),
            float(group["weight_decay"]), bool(group["nesterov"]),
        ]  # fmt: skip

    def _plain_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        sgd(
            params, [p.grad for p in params], buffers, has_sparse_grad=any(p.grad.is_sparse for p in params),  # type: ignore[misc,union-attr,arg-type]
            foreach=group["foreach"], fused=group["fused"], weight_decay=group["weight_decay"],
            momentum=group["momentum"], lr=group["lr"], dampening=group["dampening"], nesterov=group["nesterov"],
            maximize=group["maximize"],
        )  # fmt: skip
        if group["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer


class ASkewAdamW(_Skewed):
    """AdamW under the interval constraint; group keys as for ``ASkewSGD``.

    ``eps`` is the constraint's eps; the denominator's is ``adam_eps``. A group without a grid is stepped by
    torch.optim.AdamW's own code.
    """

    OPERATOR = "skew_adamw_"
    TAKES_SPARSE = False

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8,
        weight_decay: float = 1e-2, *, alpha: float = 1.0, eps: float | Tensor = 1.0, skew: str = "gradient",
        freeze_scale: str = "anneal", skip_nonfinite: bool = False, maximize: bool = False, foreach: bool | None = None,
        fused: bool | None = None, telemetry_every: int = 10, telemetry_log: str | os.PathLike | None = None,
        **grid_options: Any,
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, betas=betas, adam_eps=adam_eps, weight_decay=weight_decay, alpha=alpha, eps=eps, skew=skew,
            freeze_scale=freeze_scale, skip_nonfinite=skip_nonfinite, maximize=maximize, foreach=foreach, fused=fused,
            **_grid_defaults(grid_options),
        )  # fmt: skip
        super().__init__(params, defaults, telemetry_every, telemetry_log)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        ops.number("adam_eps", group["adam_eps"], 0.0)
        for i, beta in enumerate(group["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}]: expected a number in [0, 1), got {beta}")

    def _state_of(self, p: Tensor, fused: bool | None = False) -> dict[str, Any]:
        """``fused``: torch's fused step wants its counter beside the parameter."""
        state = self.state[p]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state

    def _bucket(self, group: dict[str, Any], p: Tensor) -> tuple[Any, ...]:
        return (float(self._state_of(p)["step"]),)

    def _lasts(self, launch: _Launch) -> bool:
        steps = [self._state_of(p)["step"] for p in launch.members]
        return all(map(operator.is_, steps, launch.steps)) and [t._version for t in steps] == launch.step_versions

    def _states(self, group: dict[str, Any], launch: _Launch) -> dict[str, list[Tensor] | None]:
        states = [self._state_of(p) for p in launch.members]
        launch.steps = [s["step"] for s in states]
        torch._foreach_add_(launch.steps, 1)
        launch.step_versions = [t._version for t in launch.steps]
        return {key + "s": self._buffers(key, launch.members) for key in ("exp_avg", "exp_avg_sq")}

    def _numbers(self, group: dict[str, Any], launch: _Launch) -> tuple[list[Tensor], list[Any]]:
        return [torch.tensor(float(launch.steps[0]), dtype=torch.float64, device="cpu")], [
            float(group["alpha"]), float(group["betas"][0]), float(group["betas"][1]), float(group["adam_eps"]),
            float(group["weight_decay"]),
        ]  # fmt: skip

    def _plain_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self._state_of(p, group["fused"]) for p in params]
        adamw(
            params, [p.grad for p in params], self._buffers("exp_avg", params), self._buffers("exp_avg_sq", params), [],  # type: ignore[misc]
            [s["step"] for s in states], foreach=group["foreach"], fused=group["fused"], amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["adam_eps"], maximize=group["maximize"],
        )  # fmt: skip


def _grid_defaults(options: dict[str, Any]) -> dict[str, Any]:
    unknown = [key for key in options if key not in _COMMON]
    if unknown:
        raise TypeError(f"{unknown[0]}: unknown argument; the grid's are {', '.join(_COMMON)}")
    return {**_COMMON, **options}
