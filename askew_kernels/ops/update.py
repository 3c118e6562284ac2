"""The skewed updates: a base optimizer's rule under the interval constraint, over a list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, signature
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from .. import contract
from . import autograd
from .checks import (
    check_copy,
    check_grid,
    check_like,
    check_list,
    check_params,
    check_scale,
    check_writes,
    number,
    rate_tensor,
)  # fmt: skip
from .dense import InPlace, in_place, layout, permuted
from .rules import RULES, Rule
from .schema import define

SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor[] scales, Tensor[] levels, int[] grids,"
    " Tensor(x!)[] dequantized, Tensor(y!)[] row_sums, Tensor(z!)[] totals, Tensor? step, Tensor lr, Tensor eps,"
    " float alpha, float[] numbers, bool direction, bool clamp, bool maximize, bool skip_nonfinite,"
    " Tensor[]? kept=None, Tensor[]? firsts=None, Tensor? coefficients=None, bool ste_clip=False) -> ()"
)
for _rule in RULES.values():
    define(_rule.operator, SCHEMA)

#: What the skewed velocity takes the place of: the gradient (as published), or the base optimizer's direction.
SKEWS = ("gradient", "direction")


class SkewStats:
    """Sums that an update pass leaves behind, for each tensor of its list.

    ``row_sums[i]``: float32 (rows, 3), sum |w|, sum w^2, max |w| of the updated weights: the next scale;
    ``totals[i]``: float64 (6,), in the order of ``NAMES``, at the point where the step started. Either list may be
    empty: then these sums are not taken.
    """

    NAMES = ("infeasible", "violation", "velocity_squared", "grad_velocity", "flips", "nonfinite")

    def __init__(self, row_sums: Sequence[Tensor] = (), totals: Sequence[Tensor] = ()) -> None:
        self.row_sums, self.totals = list(row_sums), list(totals)

    @classmethod
    def empty_for(cls, params: Sequence[Tensor], scales: Sequence[Tensor]) -> SkewStats:
        """Room for both kinds of sums."""
        rows = [(s.numel(), p.device) for p, s in zip(params, scales, strict=True)]
        sums = [torch.zeros(n, contract.NUM_ROW_SUMS, dtype=torch.float32, device=device) for n, device in rows]
        return cls(sums, [torch.zeros(contract.NUM_TOTALS, dtype=torch.float64, device=p.device) for p in params])


def _checked_update(
    rule: Rule, states: Sequence[Sequence[Tensor] | None], grads_name: str, /, params: Sequence[Tensor],
    grads: Sequence[Tensor], scales: Sequence[Tensor], grids: Sequence[Any], *, step: float | Tensor | None = None,
    lr: float | Tensor, eps: float | Tensor, alpha: float = 1.0, skew: str = "gradient", clamp: bool = True,
    dequantized: Sequence[Tensor] | None = None, stats: SkewStats | None = None, maximize: bool = False,
    skip_nonfinite: bool = False, ste_clip: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Checks everything, then runs the rule's operator; ``options``: the rule's hyper-parameters."""
    numbers = rule.numbers_of(options)
    keeps = rule.keeps_buffers(options)
    count = rate_tensor("step", step, 1.0) if rule.counts else None
    lr, eps = rate_tensor("lr", lr, 0.0), rate_tensor("eps", eps, 0.0, 1.0, open_low=True)
    alpha = number("alpha", alpha, 0.0)
    check_params(params)
    check_list(grads_name, grads, params)
    for key, buffers in zip(rule.buffers if keeps else (), states, strict=False):
        if buffers is None:
            raise ValueError(f"{key}s: expected one for each parameter with {rule.buffers_if} > 0, got None")
        check_list(f"{key}s", buffers, params)
    for key, items in (("scales", scales), ("grids", grids)):
        if len(items) != len(params):
            raise ValueError(f"{key}: expected {len(params)}, one for each parameter, got {len(items)}")
    flat_scales = [
        check_scale(f"scales[{i}]", s, p, f"params[{i}]") for i, (s, p) in enumerate(zip(scales, params, strict=True))
    ]
    for grid in grids:
        check_grid(grid)
    if dequantized is not None:
        check_list("dequantized", dequantized, params, check=lambda name, t, i: check_copy(name, t, grids[i]))
    kept = {f"{key}s": buffers for key, buffers in zip(rule.buffers if keeps else (), states, strict=False)}
    check_writes(params=params, **kept, dequantized=dequantized or ())  # type: ignore[arg-type]
    stats = stats or SkewStats()
    for key, outs, shapes, dtype in (
        ("stats.row_sums", stats.row_sums, [(s.numel(), contract.NUM_ROW_SUMS) for s in flat_scales], torch.float32),
        ("stats.totals", stats.totals, [(contract.NUM_TOTALS,)] * len(params), torch.float64),
    ):
        if outs and len(outs) != len(params):
            raise ValueError(f"{key}: expected {len(params)} tensors, got {len(outs)}")
        for i, out in enumerate(outs):
            check_like(f"{key}[{i}]", out, dtype, shapes[i], params[i].device, contiguous=True)
    if skew not in SKEWS:
        raise ValueError(f"skew: expected one of {', '.join(SKEWS)}, got {skew!r}")
    if params:
        levels = [grid.levels_tensor(p.device) for grid, p in zip(grids, params, strict=True)]
        encodings = [n for grid in grids for n in grid.encoding]
        run_skew_update(
            rule, params, grads, states if keeps else [], flat_scales, levels, encodings, dequantized or [], stats,  # type: ignore[arg-type]
            step=count, lr=lr, eps=eps, alpha=alpha, numbers=numbers, direction=skew == "direction", clamp=bool(clamp),
            maximize=bool(maximize), skip_nonfinite=bool(skip_nonfinite), ste_clip=bool(ste_clip),
        )  # fmt: skip


def run_skew_update(
    rule: Rule, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[Tensor]],
    scales: list[Tensor], levels: list[Tensor], encodings: list[int], dequantized: Sequence[Tensor], stats: SkewStats,
    *, step: Tensor | None, lr: Tensor, eps: Tensor, alpha: float | Tensor, numbers: list[float], direction: bool,
    clamp: bool, maximize: bool, skip_nonfinite: bool, ste_clip: bool = False, contiguous: bool = False,
    descent: Sequence[Any] = (),
) -> None:  # fmt: skip
    """The update without its checks, for callers that made sure of every argument (the optimizers).

    states: a list for each of ``rule.buffers``, [] where none are kept; numbers: ``rule.numbers_of``. ``contiguous``:
    every tensor but the gradients is known to be. ``descent``: kept, firsts and coefficients of a sharpness-aware step
    (see ``schema``); needs ``contiguous`` and no ``ste_clip``.
    """
    last = (*(descent or (None, None, None)), True) if ste_clip else descent  # the rest as the schema has it
    stand_ins = InPlace()
    if contiguous:
        writable: Any = lambda tensors: tensors or []  # noqa: E731
        grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
    else:
        orders = [layout(p, s.numel()) for p, s in zip(params, scales, strict=True)]
        grads = [permuted(g, order).detach().contiguous() for g, order in zip(grads, orders, strict=True)]

        def writable(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [stand_ins.writable(t, order) for t, order in zip(tensors, orders, strict=False)]

    autograd.below_autograd(
        rule.operator, params[0],
        writable(params), grads, [b for buffers in states for b in writable(buffers)], scales, levels, encodings,
        writable(dequantized), stats.row_sums, stats.totals, step if rule.counts else None, lr, eps, float(alpha),
        numbers, direction, clamp, maximize, skip_nonfinite, *last,
    )  # fmt: skip
    stand_ins.finish([*params, *(b for buffers in states for b in buffers), *dequantized])


def run_skew_direction(
    params: Sequence[Tensor], directions: Sequence[Tensor], scales: list[Tensor], levels: list[Tensor],
    encodings: list[int], dequantized: Sequence[Tensor], stats: SkewStats, **options: Any,
) -> None:  # fmt: skip
    """``skew_direction_`` without its checks; ``options``: lr, eps, alpha, clamp, … of ``run_skew_update``."""
    # What plain SGD adds to w when it ascends a "gradient" is that gradient.
    run_skew_update(
        RULES["sgd"], params, directions, [], scales, levels, encodings, dequantized, stats, step=None,
        numbers=[0.0] * len(RULES["sgd"].numbers), direction=True, maximize=True, **options,
    )  # fmt: skip


_TEXT = """One ASkew{0} step, in place, over a tensor list in one launch: each tensor is read once and written once.

    With d = -grad (``skew="gradient"``, as published) or {0}'s own direction (``skew="direction"``), u the distance
    to the nearest level over the bracket length Delta, h = eps - 16 u^2 (1-u)^2 and |h'| = (32/Delta) u (1-u)(1-2u):

        kappa = min(alpha (-h) / |h'|, Delta / (4 max(lr, 2^-100)))
        v     = d                                             where h >= 0, on a midpoint, or outside the hull
              = side * max(kappa, side * d)                   elsewhere; side = +1/-1 towards the nearest level
        w     <- clamp(w);  w <- w + lr v;  clamp to the hull (both clamps only with ``clamp``)

    ``skew="gradient"``: -v then replaces the gradient in {0}'s rule:

{1}

    params, grads, {2}: lists of equal shapes and dtypes; scales: () or (rows,); grids: one for
    each parameter; lr >= 0 and eps in (0, 1], the constraint's: floats or 0-dim tensors. ``dequantized``: tensors that
    receive s Q(w/s) of the new weights, in their own dtype, or in int8 and float8_e4m3fn the levels Q(w/s), which these
    must hold exactly; ``stats``: a ``SkewStats`` that receives the pass's sums. ``ste_clip``: the gradients are
    0 where w is outside the hull, as ``ste_clip_`` before the step would make them.
    NaN and inf gradients do what {0} does with them; with ``skip_nonfinite`` their elements are left alone.
    Raises TypeError/ValueError naming the argument before anything is written.
    Source: Leconte, Schechtman, Moulines, ASkewSGD, AISTATS 2023; docs/mathematics.md, section 2.
    """


def _public(rule: Rule) -> Callable[..., None]:
    """The checked function of a rule: its buffers stand after the gradients, its hyper-parameters after ``alpha``."""
    _, _, _, params, grads, scales, grids, step, lr, eps, alpha, *rest, _ = signature(
        _checked_update
    ).parameters.values()
    buffers = [grads.replace(name=key + "s") for key in rule.buffers]
    if rule.buffers_if:
        buffers = [b.replace(annotation=f"{b.annotation} | None") for b in buffers]
    count = [step.replace(default=Parameter.empty, annotation=lr.annotation)] if rule.counts else []
    numbers = [
        Parameter(key, Parameter.KEYWORD_ONLY, default=value, annotation=type(value).__name__)
        for key, value in rule.defaults.items() if key != "lr"
    ]  # fmt: skip
    arguments = [params, grads, *buffers, scales, grids, *count, lr, eps, alpha, *numbers, *rest]
    own = Signature(arguments, return_annotation="None")

    def update(params: Sequence[Tensor], *args: Any, **options: Any) -> None:
        given = own.bind(params, *args, **options)
        given.apply_defaults()
        states = [given.arguments.pop(b.name) for b in buffers]
        _checked_update(rule, states, "grads", **given.arguments)

    text = fill(rule.text, 116, initial_indent="    ", subsequent_indent="    ")
    update.__name__ = update.__qualname__ = rule.operator
    update.__doc__ = _TEXT.format(rule.title, text, ", ".join(b.name for b in buffers))
    update.__signature__ = own  # type: ignore[attr-defined]
    return in_place(update)


FUNCTIONS = {rule.operator: _public(rule) for rule in RULES.values()}
skew_sgd_, skew_adamw_ = (FUNCTIONS[name] for name in ("skew_sgd_", "skew_adamw_"))  # what type checkers see


@in_place
def skew_direction_(
    params: Sequence[Tensor], directions: Sequence[Tensor], scales: Sequence[Tensor], grids: Sequence[Any], *,
    lr: float | Tensor, eps: float | Tensor, alpha: float = 1.0, clamp: bool = True,
    dequantized: Sequence[Tensor] | None = None, stats: SkewStats | None = None, skip_nonfinite: bool = False,
) -> None:  # fmt: skip
    """The constraint for any base optimizer: ``skew_sgd_`` with a given d in place of -grad.

    directions: what the base optimizer would add to each weight, over lr: d = (w1 - w0) / lr. Other arguments and
    errors as there; ``stats.totals`` hold d·v in place of g·v, and d that are inf or NaN as ``nonfinite``.
    """
    _checked_update(
        RULES["sgd"], [], "directions", params, directions, scales, grids, eps=eps, alpha=alpha, skew="direction",
        clamp=clamp, dequantized=dequantized, stats=stats, maximize=True, skip_nonfinite=skip_nonfinite,
        **{**RULES["sgd"].defaults, "lr": lr},
    )  # fmt: skip


globals().update(FUNCTIONS)  # skew_sgd_, skew_adamw_ and so on, one for each rule
__all__ = [  # by name: what type checkers see
    "SKEWS", "SkewStats", "run_skew_direction", "run_skew_update", "skew_adamw_", "skew_direction_", "skew_sgd_",
]  # fmt: skip
__all__ += [name for name in FUNCTIONS if name not in __all__]
