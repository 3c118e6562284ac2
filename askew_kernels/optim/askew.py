"""ASkewSGD, ASkewAdamW, ASkewLion: a base rule under the interval constraint, one pass over each weight a step.

What is particular to a rule is its row in ``ops.RULES``: each gets a class here, its arguments, state and checks from
the row.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .. import ops
from ..quant import Binary
from ..quant.state import LearnedScale, QuantizedParameter
from .constrained import CONSTRAINT_KEYS, Constrained
from .hooks import Hooked
from .plan import Held, Launch, Plan, address, capturing, version

_DOC = """{title} under the interval constraint h_eps(w) >= 0 (``ops.skew_{name}_`` has the formulas).

    params: parameters, or groups as ``ak.param_groups(model)`` makes them. Group keys beside {title}'s own
    ({own}):

    ==================  =============================================================================================
    ``grid``            the levels; None (default): the group has no constraint and is stepped by {plain}
    ``scale``           a rule's name, None (default: ``quant.default_rule`` of the grid) or a fixed tensor
    ``granularity``     ``per_tensor``, ``per_channel`` (default), ``per_group`` with ``group_size``
    ``alpha``           strength of the push towards feasibility, >= 0; a float or a 0-dim tensor
    ``constraint_eps``  the constraint's eps, in (0, 1]; 1 is unconstrained; ``EpsilonAnnealing`` sets it
    ``skew``            ``"gradient"`` (published: the skewed velocity replaces the gradient) or ``"direction"`` (the
                        base rule's own step is skewed last, which keeps the guarantee with momentum)
    ``freeze_scale``    ``"anneal"`` (default: at the first step with constraint_eps < 1), ``"init"`` or ``"never"``
    ``clamp``           weights are clamped to the hull once the scale is frozen (default: True)
    ``skip_nonfinite``  leave elements alone whose gradient is inf or NaN, instead of doing what the rule does; in
                        groups without a grid such a gradient counts as 0
    ==================  =============================================================================================

    A step that has been made before with the same tensors can be captured in a CUDA graph; lr, constraint_eps and
    alpha, as tensors on the device, may be filled between replays. The other numbers, whether the scale is frozen and
    what is recorded are part of the graph, and alpha in a sharpness-aware step or by Triton.{capturable}
    ``eps`` is the rule's own where it has one (added to AdamW's denominator; of old ``adam_eps``, when the constraint's
    was ``eps``), otherwise another name of ``constraint_eps``, in groups too. lr and constraint_eps may be floats or
    0-dim tensors. While the scale moves, a step uses the scale of the weights as the step found them, and the layer's
    next forward uses that scale with the new weights.
    ``telemetry_every``: every how many steps the sums for ``telemetry()`` are taken (0: never). ``telemetry_log``: a
    file to which every recorded step and what ``log(…)`` is given are appended, as lines of JSON (``optim.telemetry``);
    not part of copies and checkpoints.
    Raises TypeError/ValueError naming the argument before anything is written.
    """
_COMMON = {**CONSTRAINT_KEYS, "skew": "gradient", "maximize": False, "foreach": None, "fused": None}
_CAPTURABLE = {"capturable": False}  # of rules that count
_CAPTURABLE_DOC = """ With ``capturable`` the count of steps stands beside the parameter, as torch.optim has it, where
    replays move it; without it a capture is refused."""
_TELEMETRY = {"telemetry_every": 10, "telemetry_log": None}
FUSED_FROM = 1 << 16  # weights of a group without a grid, on a CPU
MOMENTS = {"max_exp_avg_sq", *(key for rule in ops.RULES.values() for key in rule.buffers)}  # of states of any kind
LARGEST_EPS = 1e-2  # above it a denominator's eps was probably meant to be the constraint's


class ByRule(Constrained, Hooked):
    """The one body of all rules. A subclass names its row: ``class ASkewSGD(ByRule, rule="sgd")``."""

    RULE: ClassVar[ops.Rule]
    _common: ClassVar[dict[str, Any]]  # the other keys and their defaults
    OWN: ClassVar[dict[str, Any]]  # the rule's group keys and their defaults, in the order of torch's arguments
    _in_torch: ClassVar[bool]  # groups without a grid are stepped by torch.optim's code, otherwise by our operator
    _told = False  # that eps looks like the constraint's

    def __init_subclass__(cls, rule: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if rule is None:
            return
        row = cls.RULE = ops.RULES[rule]
        cls.OWN = {row.torch_names.get(key, key): value for key, value in row.defaults.items()}
        cls._old_names = dict(row.torch_names) if "eps" in cls.OWN else {"eps": "constraint_eps", **row.torch_names}
        cls._ARGUMENTS = (*Constrained._ARGUMENTS, *cls.OWN, "skew", "maximize")
        cls._common = {**_COMMON, **_CAPTURABLE} if row.counts else _COMMON
        cls._SWITCHES = (*Constrained._SWITCHES, "skew", "maximize", *(_CAPTURABLE if row.counts else ()))
        cls._in_torch = hasattr(cls, f"_plain_{rule}")
        plain = f"torch.optim.{row.title}'s own code" if cls._in_torch else f"plain {row.title}"
        cls.__doc__ = _DOC.format(title=row.title, name=rule, own=", ".join(cls.OWN), plain=plain,
                                  capturable=_CAPTURABLE_DOC * row.counts)  # fmt: skip

        def __init__(self: ByRule, params: Any, *arguments: Any, **options: Any) -> None:
            ByRule.__init__(self, params, *arguments, **options)

        kind = inspect.Parameter
        __init__.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
            *(kind(key, kind.POSITIONAL_OR_KEYWORD) for key in ("self", "params")),
            *(kind(key, kind.POSITIONAL_OR_KEYWORD, default=value) for key, value in cls.OWN.items()),
            *(kind(key, kind.KEYWORD_ONLY, default=value) for key, value in {**cls._common, **_TELEMETRY}.items()),
        ])  # fmt: skip
        cls.__init__ = __init__  # type: ignore[method-assign]

    def __init__(self, params: Any, *arguments: Any, **options: Any) -> None:
        if len(arguments) > len(self.OWN):
            raise TypeError(f"expected at most {len(self.OWN)} arguments after params, got {len(arguments)}")
        given = dict(zip(self.OWN, arguments, strict=False))
        known = {*self.OWN, *self._common, *_TELEMETRY, *self._old_names}
        for key in options:
            if key not in known:
                raise TypeError(f"{key}: unknown argument; expected one of {', '.join(sorted(known))}")
            if key in given:
                raise TypeError(f"{key}: given twice")
        self._begin(**{key: options.pop(key, default) for key, default in _TELEMETRY.items()})
        self._seen_eps: dict[int, Any] = {}  # by id of the group: the constraint's, as the last step saw it
        super().__init__(params, {**self.OWN, **self._common, **given, **self._renamed(options)})

    def _renamed(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Old names replaced; it is told where the old name means something else now."""
        for old, new in self._old_names.items():
            if old in keys and new != "constraint_eps":
                warnings.warn(f"{old}: is called {new} now, and the constraint's eps is constraint_eps",
                              DeprecationWarning, stacklevel=4)  # fmt: skip
        return {self._old_names.get(key, key): value for key, value in keys.items()}

    def _agree(self, group: dict[str, Any]) -> None:
        """Old names in a group. ``eps``, where it is the constraint's, stays beside ``constraint_eps`` and is the same:
        whoever writes either, the one that is not what the last step saw counts. (No dict with two names for a thing:
        the compiler takes plain ones only.)"""
        for old, new in self._old_names.items():
            if new != "constraint_eps":
                if old in group:
                    group.update(self._renamed({old: group.pop(old)}))
            elif group.get(old, group[new]) is not group[new] and group[new] is self._seen_eps.get(id(group)):
                group[new] = group[old]
            else:
                group[old] = group[new]
        self._seen_eps[id(group)] = group["constraint_eps"]

    def _add(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and not param_group.keys().isdisjoint(self._old_names):
            param_group = self._renamed(param_group)
        super()._add(param_group)
        self._agree(self.param_groups[-1])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["grid"] is None and not self._in_torch:
            for i, p in enumerate(group["params"]):
                ops.check_float_tensor(f"params[{i}]", p)

    def _check_switches(self, group: dict[str, Any]) -> None:
        super()._check_switches(group)
        if group["skew"] not in ops.SKEWS:
            raise ValueError(f"skew: expected one of {', '.join(ops.SKEWS)}, got {group['skew']!r}")

    def _numbers(self, group: dict[str, Any], first: bool = False) -> list[float]:
        """The rule's hyper-parameters as the operator takes them, checked. ``first``: of a weight's first step."""
        options = {**group, **{own: ops.number(key, group[key], 0.0) for own, key in self.RULE.torch_names.items()}}
        numbers = self.RULE.numbers_of({**options, **self.RULE.at_first} if first else options)
        if "eps" in self.OWN and LARGEST_EPS <= group["eps"] <= 1 and not self._told:
            self._told = True
            warnings.warn(f"eps: {group['eps']} is the number in {self.RULE.title}'s denominator; the constraint's is "
                          "constraint_eps", stacklevel=6)  # fmt: skip
        return numbers

    def _group_to_load(self, index: int, saved: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
        if "grid" in saved and "constraint_eps" not in saved and "eps" in saved:  # a checkpoint of old
            saved = {**saved, "constraint_eps": saved["eps"]}
            del saved["eps"]
            saved.update({new: saved.pop(old) for old, new in self.RULE.torch_names.items() if old in saved})
        return super()._group_to_load(index, saved, present)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen_eps = {}
        for group in self.param_groups:
            group.update({**self.defaults, **group})
            self._agree(group)

    def _pack(self) -> dict[str, Any]:
        return self._packed(super()._pack())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bit for bit what ``state_dict`` gave, in the stored types; load the model's weights first or after.

        The state of torch's optimizer of this kind is taken as well: it says nothing of grid, constraint_eps and alpha,
        which stay as they are. Raises ValueError, before anything changes, where a group has another grid, and for the
        state of an optimizer of another kind.
        """
        super().load_state_dict(state_dict)

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        own = {*self.RULE.buffers}
        for index, state in state_dict["state"].items():
            moments = {key for key in MOMENTS if isinstance(state.get(key), Tensor)}
            if moments and moments != own:
                raise ValueError(
                    f"state_dict: state[{index}] has {', '.join(sorted(moments))}, and {type(self).__name__} keeps "
                    f"{', '.join(own)}: another optimizer's; load {{**state_dict, 'state': {{}}}} to begin anew"
                )
        self._load(state_dict, super()._unpack)

    def _arguments(self, index: int, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
                   ) -> dict[str, Any]:  # fmt: skip
        self._agree(group)
        return super()._arguments(index, group, params, grads)

    def _check_tensors(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        ours = group["grid"] is not None
        for p, grad in zip(params, grads, strict=True) if ours or self.RULE.name != "sgd" else ():
            if grad.layout != torch.strided:
                what = " for a quantized parameter" * ours
                raise TypeError(f"grad: {type(self).__name__} does not take sparse gradients{what}")
            if grad.dtype != p.dtype and (ours or not self._in_torch):
                raise TypeError(f"grad: expected the parameter's {p.dtype}, got {grad.dtype}")
        super()._check_tensors(group, params, grads)

    def _checked(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            **super()._checked(group), "numbers": self._numbers(group), "direction": group["skew"] == "direction",
            "maximize": bool(group["maximize"]),
        }  # fmt: skip

    def _bucket(self, group: dict[str, Any], p: Tensor) -> tuple[Any, ...]:
        """Whether there are buffers, whether this is a first step that has numbers of its own, and which step it is."""
        rule, state, keeps = self.RULE, self.state[p], self.RULE.keeps_buffers(group)
        first = bool(rule.at_first) and keeps and any(key not in state for key in rule.buffers)
        return keeps, first, float(self._counter(p, group["capturable"])) if rule.counts else 0.0

    def _lasts(self, plan: Plan, group: dict[str, Any]) -> bool:
        keeps = self.RULE.keeps_buffers(group)
        for launch in plan.launches:
            if launch.bucket[:2] != [keeps, False] or launch.held is None or not launch.held.stay():
                return False
            if sum(map(version, launch.held.lists.get("step", ()))) != launch.count_versions:
                return False
        return True

    def _hold(self, launch: Launch, group: dict[str, Any]) -> Held:
        """The rule's state of a launch, made where it is missing."""
        if launch.held is None:
            keys = [*self.RULE.buffers] if self.RULE.keeps_buffers(group) else []
            self._buffers(group, launch.members)
            if self.RULE.counts:
                keys.append("step")
                for p in launch.members:
                    self._counter(p, group["capturable"])
            launch.held = Held([self.state[p] for p in launch.members], keys)
        return launch.held

    def _count(self, launch: Launch, group: dict[str, Any], steps: list[Tensor] | None) -> Tensor | None:
        """Counts a step; its number, for a rule that needs it."""
        if not steps:
            return None
        if not group["capturable"] and capturing(launch.members[0].device):
            raise RuntimeError(f"capturable: {type(self).__name__} counts its steps on the host, and every replay of "
                               "the graph would be the same step; expected capturable=True")  # fmt: skip
        torch._foreach_add_(steps, 1)
        launch.count_versions = sum(map(version, steps))
        if group["capturable"]:
            return steps[0]
        return torch.tensor(float(steps[0]), dtype=torch.float64, device="cpu")

    def _update(self, launch: Launch, group: dict[str, Any], weights: list[Tensor], scales: list[Tensor],
                *outputs: Any, **arguments: Any) -> None:  # fmt: skip
        lists = dict(self._hold(launch, group).lists)
        step = self._count(launch, group, lists.pop("step", None))
        grads: list[Any] = [p.grad for p in launch.members]
        if launch.bucket[1]:
            arguments["numbers"] = self._numbers(group, first=True)
        grads, *states = map(launch.viewed, (grads, *lists.values()))
        if not launch.as_they_are:  # state that a checkpoint has brought in the other order
            ordered = all(t.is_contiguous() for tensors in states for t in tensors)
            arguments["contiguous"] = arguments.get("contiguous", False) and ordered
        ops.run_skew_update(self.RULE, weights, grads, states, scales, *outputs, step=step, **arguments)

    def _update_prepared(self, plan: Plan, launch: Launch, group: dict[str, Any], grads: list[Tensor],
                         totals: Tensor | None, arguments: dict[str, Any]) -> bool:  # fmt: skip
        if not (plan.used and plan.direct and ops.prepares(launch.members[0])) or launch.held is None or launch.sharded:
            return False
        lists = dict(launch.held.lists)
        steps = lists.pop("step", None)
        if launch.prepared is None:
            launch.prepared = ops.PreparedUpdate.of(
                self.RULE, launch.viewed(launch.members), [launch.viewed(tensors) for tensors in lists.values()],
                [q.scale for q in launch.quantizers], launch.levels, launch.encodings, launch.copies, launch.sums,
            )  # fmt: skip
            if launch.prepared is None:
                return False
        step = self._count(launch, group, steps)
        launch.prepared.run(list(map(address, grads)), totals, step=step, clamp=launch.clamp, **arguments)
        return True

    def _buffers(self, group: dict[str, Any], members: list[Tensor]) -> list[list[Tensor]]:
        """The rule's state of each, zeros where it is missing, in the type of the weight (a model may be cast) and with
        memory for each element (a checkpoint may hold one number for all)."""
        found: list[list[Tensor]] = []
        for key in self.RULE.buffers if self.RULE.keeps_buffers(group) else ():
            found.append([])
            for p in members:
                buffer = self.state[p].get(key)
                if buffer is None or buffer.dtype != p.dtype:
                    buffer = self.state[p][key] = torch.zeros_like(p) if buffer is None else buffer.to(p.dtype)
                elif ops.expanded(buffer):
                    buffer = self.state[p][key] = buffer.contiguous()
                found[-1].append(buffer)
        return found

    def _counter(self, p: Tensor, beside: bool | None = False) -> Tensor:
        """``beside``: on the parameter's device, where torch's fused step and a captured graph want it."""
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if beside else "cpu")
        elif beside and state["step"].device != p.device:  # ``capturable`` was switched on
            state["step"] = state["step"].to(p.device)
        return state["step"]

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        getattr(self, f"_plain_{self.RULE.name}", self._plain)(group, params)

    def _torch_options(self, group: dict[str, Any], params: list[Tensor], *beside: list[Any]) -> dict[str, Any]:
        """``beside``: gradients and state of the parameters, None where there is none."""
        keys = (*self.OWN, "maximize", "foreach", "fused", *(_CAPTURABLE if self.RULE.counts else ()))
        options = {key: group[key] for key in keys}
        if options["fused"] is None and options["foreach"] is None and _pays_fused(group, params, *beside):
            options["fused"] = True
        return options

    def _plain_sgd(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads: list[Any] = [p.grad for p in params]
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        options = self._torch_options(group, params, grads, *([buffers] if group["momentum"] else ()))
        if len({buffer is None for buffer in buffers}) > 1:  # torch's fused step makes all of them or none
            options["fused"] = group["fused"]
        sgd(params, grads, buffers, has_sparse_grad=any(g.is_sparse for g in grads), **options)
        _count_writes(params, options, group)
        if group["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def _plain_adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads: list[Any] = [p.grad for p in params]
        steps = [self._counter(p, group["fused"] or group["capturable"]) for p in params]
        moments = self._buffers(group, params)
        options = self._torch_options(group, params, grads, *moments)
        options["beta1"], options["beta2"] = options.pop("betas")
        options["capturable"] &= (
            params[0].device.type != "cpu"
        )  # where there is nothing to capture, and torch refuses it
        adamw(params, grads, *moments, [], steps, amsgrad=False, **options)  # type: ignore[misc,arg-type]
        _count_writes(params, options, group)

    def _plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Of a rule that torch.optim does not have: its operator on any grid, where nothing is constrained."""
        arguments = {**self._checked_arguments(group), "eps": torch.ones((), dtype=torch.float64), "alpha": 0.0}
        buckets: dict[Any, list[Tensor]] = {}
        for p in params:
            key = (p.device, torch.float64 if p.dtype == torch.float64 else torch.float32, *self._bucket(group, p))
            buckets.setdefault(key, []).append(p)
        for (device, dtype, *bucket), members in buckets.items():
            launch = Launch(members, False, bucket, _ANY.levels_tensor(device), _ANY.encoding)
            scales = [torch.ones(1, dtype=dtype, device=device)] * len(members)
            self._update(launch, group, launch.viewed(members), scales, launch.levels, launch.encodings, [],
                         ops.SkewStats(), clamp=False, **arguments)  # fmt: skip


_ANY = Binary()
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, QuantizedParameter, LearnedScale)


def _pays_fused(group: dict[str, Any], params: list[Tensor], *beside: list[Any]) -> bool:
    """Whether torch's fused step, one pass, is to take the place of its default on a CPU, a loop of ten (which rounds
    a few weights to the other neighbour): of small groups neither is felt. It takes element i of each memory for one
    weight, whatever strides and types say."""
    if sum(p.numel() for p in group["params"]) < FUSED_FROM:
        return False
    if not all(type(p) in _PLAIN_TYPES and p.is_cpu and p.is_floating_point() and _is_dense(p) for p in params):
        return False
    return all(t is None or (t.layout == torch.strided and t.dtype == p.dtype and t.stride() == p.stride())
               for tensors in beside for p, t in zip(params, tensors, strict=True))  # fmt: skip


def _is_dense(p: Tensor) -> bool:
    return p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)


def _count_writes(params: list[Tensor], options: dict[str, Any], group: dict[str, Any]) -> None:
    """Torch's fused steps do not move versions; where one was taken unasked, these say what they would have said."""
    if options["fused"] and not group["fused"]:
        torch.autograd.graph.increment_version(params)


class ASkewSGD(ByRule, rule="sgd"): ...


class ASkewAdamW(ByRule, rule="adamw"): ...


class ASkewLion(ByRule, rule="lion"): ...


# A row needs no class statement above, which only lets type checkers see it.
OPTIMIZERS: dict[str, type[ByRule]] = {}
for _row in ops.RULES.values():
    _name = f"ASkew{_row.title}"
    OPTIMIZERS[_name] = globals().get(_name) or type(_name, (ByRule,), {"__module__": __name__}, rule=_row.name)  # type: ignore[call-overload]
globals().update(OPTIMIZERS)
