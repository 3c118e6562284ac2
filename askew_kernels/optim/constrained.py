"""What the optimizers under the interval constraint share, whatever their base rule: the step over launches, scales
and their freezing, telemetry, checkpoints."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import ops
from ..annealing import ELSEWHERE, key_in
from ..quant import QuantConfig, WeightQuantizer, grid_from_dict
from ..quant.forms import ROWS, Form
from ..quant.scales import LEARNED
from ..quant.sharding import local_part, made_for_a_part, sharding_of
from ..quant.state import Changes, LearnedScale, is_learned, next_scales, share_sums, spare_frozen_scales
from .plan import Launch, Plan, capturing, plainly, same
from .telemetry import Record, TelemetryLog, checked_every

FREEZE_SCALE = ("anneal", "init", "never")
GRID_KEYS = {"grid": None, "scale": None, "granularity": "per_channel", "group_size": None, "sawb_coefficients": None,
             "scale_dtype": "float32"}  # fmt: skip
CONSTRAINT_KEYS = {"alpha": 1.0, "constraint_eps": 1.0, "freeze_scale": "anneal", "clamp": True,
                   "skip_nonfinite": False, **GRID_KEYS}  # fmt: skip
_QUANTIZER_KEYS = ("scale", "scale_frozen", "row_sums")


class Constrained(Optimizer):
    """A subclass says how a launch is updated (``_update``), and how a group without a grid is (``_step_plain``)."""

    KEEPS_QUANTIZERS_FRESH = True  # in groups with a grid; quant.state's hook asks
    _ARGUMENTS: ClassVar[tuple[str, ...]] = (
        "lr",
        "constraint_eps",
        "alpha",
        ELSEWHERE["alpha"],
        "skip_nonfinite",
    )  # keys they come from
    # Keys that say how, not how much; looked at again where another object stands there.
    _SWITCHES: ClassVar[tuple[str, ...]] = (*GRID_KEYS, "freeze_scale", "clamp", ELSEWHERE["clamp"], "skip_nonfinite")
    _old_names: ClassVar[dict[str, str]] = {}  # group keys as they were called before -> as they are

    def _begin(self, telemetry_every: int, telemetry_log: Any = None) -> None:
        """What is the optimizer's own, beside groups and state."""
        self.telemetry_every = checked_every(telemetry_every)
        self.steps = 0  # made, those before a checkpoint included
        self._telemetry_wanted = True
        self._record = Record()
        self._log = None if telemetry_log is None else TelemetryLog(telemetry_log, type(self).__name__)
        self._plans: dict[int, Plan] = {}
        self._none_learned = -1  # ``Changes.count`` when no weight of the groups had a learned scale
        self._states: list[dict[str, Any]] = []  # ``state``'s values as the last step found them, and their count
        self._state_revision = 0
        self._seen_rates: dict[int, tuple[Tensor, int, bool]] = {}  # by id of the group: eps, and whether it is below 1
        # by id of the group: its keys, what they make, its switches
        self._known: dict[int, tuple[list[Any], dict[str, Any], list[Any]]] = {}
        # Weights that a launch starts from in place of those it finds, taken out as they are used; a sharpness-aware
        # step's first gradients to average with, and the coefficients that tell whether they count.
        self.saved_weights: dict[Tensor, Tensor] = {}
        self.first_gradients: dict[Tensor, Tensor] = {}
        self.coefficients: Tensor | None = None

    # ---- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._add(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._take(group)

    def _add(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)

    def _quantized(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """(group, parameter) of all under the constraint."""
        return ((group, p) for group in self.param_groups if group["grid"] is not None for p in group["params"])

    _CLIPS = True  # whether its pass can zero gradients outside the hull

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises TypeError/ValueError that names the key."""
        self._checked(group)
        self._check_switches(group)
        for i, p in enumerate(group["params"]):
            ops.check_written(f"params[{i}]", p)
        if group["grid"] is None:
            return
        if made_for_a_part():
            raise TypeError(f"optimizer_class: {type(self).__name__} cannot be sharded by ZeroRedundancyOptimizer: the "
                            "scale of a quantized weight moves with its step, which one rank alone would make; use "
                            "fully_shard (FSDP2)")  # fmt: skip
        quantizer = WeightQuantizer(_config_of(group))
        for i, p in enumerate(group["params"]):
            ops.check_float_tensor(f"params[{i}]", p)
            if is_learned(p):
                raise TypeError(f"params[{i}]: is the learned scale of a quantized layer, which has no grid; give it a "
                                "group of its own, as ak.param_groups(model) does")  # fmt: skip
            found = _found_quantizer(group, p)
            if quantizer.config.learns_scale and found is None:
                raise ValueError(f"scale: {quantizer.config.scale!r} is learned in the forward of a quantized layer, "
                                 f"and params[{i}] has none; expected a rule")  # fmt: skip
            rows = (found or quantizer).rows(p)
            if not self._CLIPS:
                refuse_clip_in_step(type(self).__name__, f"params[{i}]", p)
            if isinstance(group["scale"], Tensor):
                _fixed_scale(group, p, rows)

    def _check_switches(self, group: dict[str, Any]) -> None:
        """Raises TypeError/ValueError that names the key."""
        if group["freeze_scale"] not in FREEZE_SCALE:
            raise ValueError(f"freeze_scale: expected one of {', '.join(FREEZE_SCALE)}, got {group['freeze_scale']!r}")
        for key in (key_in(group, "clamp"), "skip_nonfinite", "maximize", "capturable"):
            if key in self._SWITCHES and not isinstance(group.get(key, False), bool):
                raise TypeError(f"{key}: expected True or False, got {group[key]!r}")
        if group["grid"] is not None:
            ops.check_grid(group["grid"])
            _config_of(group)

    def _take(self, group: dict[str, Any]) -> None:
        """Finds or makes the quantizers of a group that is in order."""
        self._none_learned = -1
        if group["grid"] is not None:
            for p in group["params"]:
                self._quantizer(group, p)
        elif any(WeightQuantizer.of(p) is not None for p in group["params"]):
            warnings.warn(f"{type(self).__name__}: a group without a grid holds weights of quantized layers, which are "
                          "then not under the constraint; give it ak.param_groups(model) in place of "
                          "model.parameters()", stacklevel=4)  # fmt: skip

    def _quantizer(self, group: dict[str, Any], p: Tensor, form: Form = ROWS) -> WeightQuantizer:
        """The weight's quantizer: its layer's, or one made here, of this form, for a weight without a layer."""
        found = _found_quantizer(group, p)
        if found is None:
            found = WeightQuantizer(_config_of(group), form)
            found.tie(p)  # type: ignore[arg-type]
        if isinstance(group["scale"], Tensor) and not found.frozen:
            found.freeze(p, _fixed_scale(group, p, found.rows(p)))
        return found

    # ---- the step -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step; ``closure`` re-evaluates the model and returns the loss.

        Groups with a grid: every weight is read once and written once, in one launch for each device. Groups without
        one: the base rule's own step. Everything is checked before anything is written. Inside compiled code it runs
        as it is.
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
        self._look_at_state()
        self._freeze_learned()
        work = [(group, *_with_gradients(group["params"])) for group in self.param_groups]
        arguments = [self._arguments(index, *of) for index, of in enumerate(work)]
        every = self.telemetry_every
        record = every > 0 and (self._telemetry_wanted or self.steps % every == 0)
        if record and self._log is not None and any(capturing(p.device) for group in self.param_groups
                                                    for p in group["params"][:1]):  # fmt: skip
            record = False  # writing the log waits for the device
        if record:
            self._record = Record(self.steps + 1, loss=loss.detach() if isinstance(loss, Tensor) else loss)
            self._telemetry_wanted = False
        for group, params, grads in work:  # without a grid no rule looks at single elements
            if group["grid"] is None and group["skip_nonfinite"]:
                grads[:] = map(_with_finite_gradient, params, grads)
        self._step_base(work)
        self._step_without_grid(work)
        for index, (group, params, grads) in enumerate(work):
            if params and group["grid"] is not None:
                if record:
                    self._record.keep_rates(index, group)
                self._step_constrained(index, group, params, grads, arguments[index], record)
        self.steps += 1
        if record and self._log is not None:
            self._log.recorded(self._record, self.param_groups)
        return loss

    def _step_without_grid(self, work: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        """They come before those with one, whatever the order of groups: learned scales are among them, and the copies
        that a launch writes are of the new ones."""
        for group, params, _ in work:
            if not params or group["grid"] is not None:
                continue
            self._step_plain(group, params)
            scales = [local_part(p) for p in params if is_learned(p)]
            torch.autograd.graph.increment_version(scales)  # fused steps do not count

    def _freeze_learned(self) -> None:
        """Learned scales whose group freezes at this step stay as the forward had them."""
        if (
            LearnedScale.made and self._none_learned != Changes.count
        ):  # weights are not looked at one by one for nothing
            learned = [(group, p, q) for group, p in self._quantized()
                       if (q := WeightQuantizer.of(p)) is not None and q.learned is not None]  # fmt: skip
            for group, p, quantizer in learned:
                if not quantizer.frozen and self._freezes(group):
                    quantizer.freeze(p)
            self._none_learned = -1 if learned else Changes.count
        spare_frozen_scales(self)

    def _look_at_state(self) -> None:
        """Notices when a parameter's state has been replaced by another."""
        states = list(self.state.values())
        if not same(states, self._states):
            self._states, self._state_revision = states, self._state_revision + 1

    def _arguments(self, index: int, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
                   ) -> dict[str, Any]:  # fmt: skip
        """What the operator is given for this group's launches, all of it checked."""
        plan = self._plans.get(index)
        if plan is None or not (plan.takes(params, grads) and id(group["grid"]) in plan.key):
            self._check_tensors(group, params, grads)
        try:
            return self._checked_arguments(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (param_groups[{index}])") from None

    def _check_tensors(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Where they are not known from the step before. Raises TypeError/ValueError."""
        for i, p in enumerate(params if group["grid"] is not None else ()):
            ops.check_written(f"params[{i}]", p)
            self._quantizer(group, p)

    def _checked_arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        """The keys' part of it, kept while they stay."""
        values, switches = list(map(group.get, self._ARGUMENTS)), list(map(group.get, self._SWITCHES))
        known = self._known.get(id(group))
        if known is None or not same(switches, known[2]):
            self._check_switches(group)
            known = None
        if known is None or any(isinstance(value, Tensor) for value in values) or known[0] != values:
            known = self._known[id(group)] = values, self._checked(group), switches
        return known[1]

    def _checked(self, group: dict[str, Any]) -> dict[str, Any]:
        """The operator's arguments. Raises TypeError/ValueError that names the key."""
        alpha = group[key := key_in(group, "alpha")]
        return {
            "lr": ops.rate_tensor("lr", group["lr"], 0.0),
            "eps": ops.rate_tensor("constraint_eps", group["constraint_eps"], 0.0, 1.0, open_low=True),
            "alpha": (ops.rate_tensor if isinstance(alpha, Tensor) else ops.number)(key, alpha, 0.0),
            "skip_nonfinite": bool(group["skip_nonfinite"]),
        }  # fmt: skip

    def _freezes(self, group: dict[str, Any]) -> bool:
        """Whether the scale is to be frozen at this step."""
        if group["freeze_scale"] != "anneal":
            return group["freeze_scale"] == "init"
        eps = group["constraint_eps"]
        if not isinstance(eps, Tensor):
            return group.get("annealing", False) or float(eps) < 1.0
        if "annealing" in group and (group["annealing"] or eps.device.type != "cpu"):
            return group["annealing"]  # EpsilonAnnealing keeps this on the host: no synchronisation
        seen = self._seen_rates.get(id(group))  # a device is waited for only where eps was filled, and was 1 before
        stays = seen is not None and seen[0] is eps and (seen[2] or seen[1] == eps._version)
        if not stays or ops.concrete(eps):
            seen = self._seen_rates[id(group)] = eps, eps._version, float(eps) < 1.0
        return seen[2]  # type: ignore[index]

    def _step_constrained(self, index: int, group: dict[str, Any], params: list[Tensor], grads: list[Tensor],
                          arguments: dict[str, Any], record: bool) -> None:  # fmt: skip
        freeze = self._freezes(group)
        plan = self._plans.get(index)
        if plan is None or not plan.holds(self._plan_key(group, freeze), params) or not self._lasts(plan, group):
            launches = self._launches(group, params, freeze)
            self._look_at_state()
            plan = self._plans[index] = Plan(self._plan_key(group, freeze), params, launches)
        for launch in plan.launches:
            self._run(plan, launch, group, grads, arguments, record)
        plan.note()

    def _plan_key(self, group: dict[str, Any], freeze: bool) -> tuple[Any, ...]:
        """What a plan is made for, beside its parameters."""
        skip = bool(group["skip_nonfinite"])
        return (
            id(group),
            id(group["grid"]),
            group["freeze_scale"],
            freeze,
            group[key_in(group, "clamp")],
            skip,
            self._state_revision,
        )

    def _launches(self, group: dict[str, Any], params: list[Tensor], freeze: bool) -> list[Launch]:
        buckets: dict[Any, list[Tensor]] = {}
        if capturing(params[0].device):
            raise RuntimeError(f"{type(self).__name__}: a step that looks at its tensors for the first time cannot be "
                               "captured in a CUDA graph; make a step or more with the same parameters, gradients "
                               "and options before the capture")  # fmt: skip
        for p in params:
            quantizer = self._quantizer(group, p)
            if freeze and not quantizer.frozen:
                quantizer.freeze(p)
            self._keep_scale(p, quantizer)
            clamp = quantizer.frozen and group["freeze_scale"] != "never" and group[key_in(group, "clamp")]
            key = (
                p.device,
                clamp,
                quantizer.clips_in_step,
                p.dtype == torch.float64,
                sharding_of(p),
                *self._bucket(group, p),
            )
            buckets.setdefault(key, []).append(p)
        return [
            Launch(members, clamp, rest, group["grid"].levels_tensor(device), group["grid"].encoding)
            for (device, clamp, _, _, _, *rest), members in buckets.items()
        ]

    def _run(self, plan: Plan, launch: Launch, group: dict[str, Any], grads: list[Tensor], arguments: dict[str, Any],
             record: bool) -> None:  # fmt: skip
        members, quantizers = launch.members, launch.quantizers
        if plan.used:  # since the launch before nothing else has touched the weights or their quantizers
            if launch.batch is not None:
                launch.batch.update()
            for q, p in launch.learning:
                q.follow_learned(p)
        else:
            next_scales(quantizers, members)
            launch.prepare()
        room, totals = launch.totals() if record else (None, [])
        if room is not None:
            self._record.totals.append((members, room))
        if members is not plan.params:
            grads = [p.grad for p in members]  # type: ignore[misc]
        clamped = launch.clamp and not group["skip_nonfinite"]  # a skipped element stays where it was
        if launch.clips and not (clamped and plan.used):  # clamped before, no weight is outside the hull
            arguments = {**arguments, "ste_clip": True}
        try:
            if self.saved_weights or not self._update_prepared(plan, launch, group, grads, room, arguments):
                weights, scales = launch.viewed(members), [q.scale for q in quantizers]
                if launch.sharded:
                    scales = [part.take(s) for s, part in zip(scales, launch.parts, strict=True)]
                self._update(
                    launch, group, weights, scales, launch.levels, launch.encodings, launch.copies,
                    ops.SkewStats(launch.sums, totals), **arguments, clamp=launch.clamp, contiguous=launch.contiguous,
                    descent=self._descent(members, weights),
                )  # fmt: skip
        except BaseException:
            for q in quantizers:  # their scales have moved on
                q.invalidate()
            raise
        if launch.sharded and any(launch.summed):
            told = [i for i, summed in enumerate(launch.summed) if summed]
            share_sums([quantizers[i] for i in told], [members[i] for i in told], [launch.sums[i] for i in told])
        launch.updated(clamped, plan.linked)
        if self.saved_weights:
            for p in members:
                self.saved_weights.pop(p, None)

    def _descent(self, members: list[Tensor], weights: list[Tensor]) -> list[Any]:
        """Saved weights, first gradients and coefficients for the operator; nothing in a usual step."""
        if not self.saved_weights:
            return []
        absent = torch.empty(0, device=weights[0].device, dtype=weights[0].dtype)
        saved, firsts = ([viewed(p, some[p]) if p in some else absent for p in members]
                         for some in (self.saved_weights, self.first_gradients))  # fmt: skip
        return [saved] if not self.first_gradients or self.coefficients is None else [saved, firsts, self.coefficients]

    def _step_base(self, work: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        """What comes first. work: groups, with those of their parameters that have a gradient."""

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """A group without a grid."""

    def _update(self, launch: Launch, group: dict[str, Any], weights: list[Tensor], scales: list[Tensor],
                *outputs: Any, **arguments: Any) -> None:  # fmt: skip
        """The operator, over this rank's ``weights`` of the launch."""
        raise NotImplementedError

    def _bucket(self, group: dict[str, Any], p: Tensor) -> tuple[Any, ...]:
        """What must be equal for parameters to share a launch, besides the device."""
        return ()

    def _lasts(self, plan: Plan, group: dict[str, Any]) -> bool:
        """Whether the buckets of launches that have run are still those, and the state that they have found."""
        return True

    def _update_prepared(self, plan: Plan, launch: Launch, group: dict[str, Any], grads: list[Tensor],
                         totals: Tensor | None, arguments: dict[str, Any]) -> bool:  # fmt: skip
        """``_update`` by a list that is kept from step to step; False, and nothing done, where there is none."""
        return False

    # ---- telemetry ----------------------------------------------------------------------------------------------

    def telemetry(self) -> list[dict[str, Any]]:
        """What the passes summed up, for each quantized tensor of the last recorded step.

        A step is recorded when ``telemetry()`` was called since the step before, and every ``telemetry_every``-th.
        Keys: ``step``, ``name`` (or index), ``numel``, ``lr``, ``eps`` (the constraint's), ``alpha``,
        ``fraction_infeasible`` and ``mean_violation`` (sum max(0, -h) / numel) at the point where the step started,
        ``flips`` (weights whose nearest level changed), ``velocity_norm`` (‖v‖, w moved by lr v), ``grad_velocity``
        (g·v), ``nonfinite`` (gradient elements). Waits for the device. Empty before the first step.
        """
        self._telemetry_wanted = True
        return self._record.rows(self.param_groups)

    def log(self, **numbers: Any) -> None:
        """A line in ``telemetry_log`` (nothing without one): your numbers (loss=…, accuracy=…, sharpness=…).

        With ``epoch=…`` it also holds a histogram of every quantized weight, one frame of the report. The last
        recorded step is written as well; call it at the end of a run.
        """
        if self._log is not None:
            self._log.note(self.steps, self.param_groups, numbers)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _packed(self, packed: dict[str, Any]) -> dict[str, Any]:
        """The base's ``state_dict`` and the scales (with the sums that they belong to); grids as plain dicts."""
        for saved, group in zip(packed["param_groups"], self.param_groups, strict=True):
            if group["grid"] is not None:
                saved["grid"] = group["grid"].to_dict()
                for index, p in zip(saved["params"], group["params"], strict=True):
                    packed["state"][index] = {**packed["state"].get(index, {}), **self._scale_state(group, p)}
        return {**packed, "askew_steps": self.steps}

    def _load(self, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
        """``load``: what takes the base's state. Raises ValueError, before anything changes, for another grid and for
        another number of scales."""
        groups = [
            self._group_to_load(index, saved, present)
            for index, (saved, present) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False))
        ]
        groups += state_dict["param_groups"][len(groups) :]  # too many: torch says so
        found = state_dict["state"]
        for saved, present in zip(groups, self.param_groups, strict=False):
            for index, p in zip(saved["params"], present["params"], strict=False):
                if present["grid"] is not None and "scale" in found.get(index, {}):
                    self._check_scale(saved, p, index, found[index])
        state = {}
        for index, of in found.items():
            if not isinstance(of, Mapping):  # a number that some keep beside what they keep of parameters
                state[index] = of
            elif kept := {k: v for k, v in of.items() if k not in _QUANTIZER_KEYS}:
                state[index] = kept
        load({"state": state, "param_groups": groups})
        self.steps = state_dict.get("askew_steps", 0)
        self._record, self._telemetry_wanted = Record(), True
        for saved, group in zip(groups, self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                if group["grid"] is not None and "scale" in found.get(index, {}):
                    self._restore(group, p, found[index])

    def _group_to_load(self, index: int, saved: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
        if "grid" not in saved:  # another optimizer's, which knows nothing of the constraint
            ours = {key_in(present, key) for key in CONSTRAINT_KEYS}
            unknown = {*ours, "skew", "annealing", *self._old_names}
            return {**present, **{k: v for k, v in saved.items() if k not in unknown}}
        grid = saved["grid"]
        if isinstance(grid, dict):
            with contextlib.suppress(ValueError):  # DCP loads only the arguments that the present grid has
                grid = grid_from_dict(grid)
        if grid != present["grid"]:
            raise ValueError(f"param_groups[{index}]: grid: expected {present['grid']}, the state has {grid}")
        return {**present, **saved, "grid": present["grid"]}

    def _check_scale(self, group: dict[str, Any], p: Tensor, index: int, kept: dict[str, Any]) -> None:
        form = Form(*kept.get("form", ROWS))
        quantizer = WeightQuantizer.of(p) or WeightQuantizer(_config_of(group), form)  # its layer's, or the group's
        if (has := kept["scale"].numel()) != (wants := quantizer.rows(p)):
            raise ValueError(f"state_dict: state[{index}]: scale: expected {wants} of a weight of shape "
                             f"{tuple(p.shape)} quantized {quantizer.config.granularity}, the state has {has}"
                             )  # fmt: skip

    def _restore(self, group: dict[str, Any], p: Tensor, kept: dict[str, Any]) -> None:
        quantizer = self._quantizer(group, p, Form(*kept.get("form", ROWS)))
        quantizer.restore(p, kept["scale"], bool(kept.get("scale_frozen")), kept.get("row_sums"))
        if self.state.get(p):
            self._keep_scale(p, quantizer)

    def _keep_scale(self, p: Tensor, quantizer: WeightQuantizer) -> None:
        """The quantizer's own tensors in ``state``, where writers of checkpoints look for keys."""
        self.state[p].update(zip(_QUANTIZER_KEYS, quantizer.state, strict=True))

    def _scale_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        quantizer = self._quantizer(group, p)
        if not p.is_meta:
            quantizer.current_scale(p)
        return dict(zip(_QUANTIZER_KEYS, quantizer.state, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        scales = {p: {**self._scale_state(group, p), "form": tuple(self._quantizer(group, p).form)}
                  for group, p in self._quantized()}  # fmt: skip
        own = {"telemetry_every": self.telemetry_every, "steps": self.steps, "_scales": scales}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        scales = state.pop("_scales", {})
        if "telemetry_every" in state:  # of a copy; torch's load_state_dict comes here with groups and state alone
            self._begin(state["telemetry_every"])
        self._plans, self._known, self._seen_rates, self._none_learned = {}, {}, {}, -1
        super().__setstate__(state)
        for group, p in self._quantized():
            # an unpickled parameter has lost its quantizer; one that learns is its layer's, which ties it anew
            if p in scales and WeightQuantizer.of(p) is None and group["scale"] != LEARNED:
                self._restore(group, p, scales[p])


def _with_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that have one, and their gradients."""
    with plainly():
        found = [p.grad for p in params]
    grads = [g for g in found if g is not None]
    if len(grads) < len(found):
        params = [p for p, g in zip(params, found, strict=True) if g is not None]
    return params, grads


def _with_finite_gradient(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``p`` with 0 for what is inf or NaN, in place where it can be written to."""
    values = grad._values() if grad.is_sparse else local_part(grad)
    if values.is_inference() or torch._debug_has_internal_overlap(values):
        p.grad = grad.nan_to_num(0.0, 0.0, 0.0)
        return p.grad
    values.nan_to_num_(0.0, 0.0, 0.0)
    return grad


def _found_quantizer(group: dict[str, Any], p: Tensor) -> WeightQuantizer | None:
    """That of the weight, if there is one. Raises ValueError where it has another grid than the group."""
    found = WeightQuantizer.of(p)
    if found is not None and found.config.weight != group["grid"]:
        raise ValueError(f"grid: the parameter's layer has {found.config.weight}, its group {group['grid']}")
    return found


def viewed(p: Tensor, t: Tensor) -> Tensor:
    """Of a tensor like the parameter ``p``: the outputs before the inputs."""
    return WeightQuantizer.of(p).form.view(t)  # type: ignore[union-attr]


def refuse_clip_in_step(optimizer: str, name: str, p: Tensor) -> None:
    """TypeError where the weight's layer leaves the clip of its gradient to an optimizer's pass."""
    quantizer = WeightQuantizer.of(p)
    if quantizer is not None and quantizer.config.clips_in_step:
        raise TypeError(f"{name}: its layer has ste_clip='step', which leaves its gradient outside the hull to the "
                        f"pass of an ASkew optimizer, and {optimizer} needs the gradient as it will be before that; "
                        "expected ste_clip=True")  # fmt: skip


def _config_of(group: Mapping[str, Any]) -> QuantConfig:
    """The quantization of a weight that no layer says anything of."""
    rule = group["scale"]
    if rule is not None and not isinstance(rule, (str, Tensor)):
        raise TypeError(f"scale: expected a rule's name, None or a tensor, got {rule!r}")
    if isinstance(rule, Tensor):
        rule = "absmax"  # never asked: the scale is frozen at once
    return QuantConfig(
        weight=group["grid"], scale=rule, granularity=group["granularity"], group_size=group["group_size"],
        sawb_coefficients=group["sawb_coefficients"], scale_dtype=group["scale_dtype"],
        forward="hard" if rule == LEARNED else "relaxed",
    )  # fmt: skip


def _fixed_scale(group: Mapping[str, Any], p: Tensor, rows: int) -> Tensor:
    """The group's scale tensor as (rows,); one number serves every row."""
    scale = group["scale"].detach().to(p.device).reshape(-1)
    if scale.is_floating_point():
        scale = scale.float()  # as quantizers keep it
    return ops.check_scale("scale", scale.expand(rows) if scale.numel() == 1 else scale, p, "the parameter")
