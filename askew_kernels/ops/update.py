"""The skewed updates: a base optimizer's rule under the interval constraint, over a list of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import contract
from . import autograd
from .checks import check_grid, check_list, check_params, check_scale, number, rate_tensor
from .dense import InPlace, in_place, layout
from .schema import define

__all__ = ["SKEWS", "SkewStats", "run_skew_update", "skew_adamw_", "skew_sgd_"]

_LISTS = "Tensor[] scales, Tensor[] levels, int[] grids"
_OUTPUTS = "Tensor(x!)[] dequantized, Tensor(y!)[] row_sums, Tensor(z!)[] totals"
_FLAGS = "bool direction, bool clamp, bool maximize, bool skip_nonfinite"
_DESCENT = "Tensor[]? kept=None, Tensor[]? firsts=None, Tensor? coefficients=None"

define("skew_sgd_", "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
       f"{_LISTS}, {_OUTPUTS}, Tensor lr, Tensor eps, float alpha, float momentum, float dampening, "
       f"float weight_decay, bool nesterov, {_FLAGS}, {_DESCENT}) -> ()")  # fmt: skip
define("skew_adamw_", "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
       f"{_LISTS}, {_OUTPUTS}, Tensor step, Tensor lr, Tensor eps, float alpha, float beta1, float beta2, "
       f"float adam_eps, float weight_decay, {_FLAGS}, {_DESCENT}) -> ()")  # fmt: skip

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
        return cls(
            [
                torch.zeros(s.numel(), contract.NUM_ROW_SUMS, dtype=torch.float32, device=p.device)
                for p, s in zip(params, scales, strict=True)
            ],
            [torch.zeros(contract.NUM_TOTALS, dtype=torch.float64, device=p.device) for p in params],
        )


def _skew_update(
    name: str, params: Sequence[Tensor], grads: Sequence[Tensor], states: Mapping[str, Sequence[Tensor] | None],
    scales: Sequence[Tensor], grids: Sequence[Any], dequantized: Sequence[Tensor] | None, stats: SkewStats | None,
    rates: list[Tensor], numbers: list[Any], skew: str,
) -> None:  # fmt: skip
    """Checks everything, then runs operator ``name``; ``states`` None where the rule keeps no such buffer."""
    check_params(params)
    check_list("grads", grads, params)
    for key, buffers in states.items():
        if buffers is not None:
            check_list(key, buffers, params)
    for key, items in (("scales", scales), ("grids", grids)):
        if len(items) != len(params):
            raise ValueError(f"{key}: expected {len(params)}, one for each parameter, got {len(items)}")
    flat_scales = [
        check_scale(f"scales[{i}]", s, p, f"params[{i}]") for i, (s, p) in enumerate(zip(scales, params, strict=True))
    ]
    for grid in grids:
        check_grid(grid)
    if dequantized is not None:
        check_list("dequantized", dequantized, params, same_dtype=False)
    stats = stats or SkewStats()
    for key, outs, shapes, dtype in (
        ("stats.row_sums", stats.row_sums, [(s.numel(), contract.NUM_ROW_SUMS) for s in flat_scales], torch.float32),
        ("stats.totals", stats.totals, [(contract.NUM_TOTALS,)] * len(params), torch.float64),
    ):
        if outs and len(outs) != len(params):
            raise ValueError(f"{key}: expected {len(params)} tensors, got {len(outs)}")
        for i, out in enumerate(outs):
            if not isinstance(out, Tensor) or out.device != params[i].device:
                raise TypeError(f"{key}[{i}]: expected a Tensor on {params[i].device}, got {out!r}")
            if tuple(out.shape) != shapes[i] or out.dtype != dtype or not out.is_contiguous():
                raise ValueError(
                    f"{key}[{i}]: expected contiguous {dtype} {shapes[i]}, got {out.dtype} {tuple(out.shape)}"
                )
    if skew not in SKEWS:
        raise ValueError(f"skew: expected one of {', '.join(SKEWS)}, got {skew!r}")
    if params:
        levels = [grid.levels_tensor(p.device) for grid, p in zip(grids, params, strict=True)]
        encodings = [n for grid in grids for n in grid.encoding]
        run_skew_update(name, params, grads, states, flat_scales, levels, encodings, dequantized or [], stats, rates,
                        numbers)  # fmt: skip


def run_skew_update(
    name: str, params: Sequence[Tensor], grads: Sequence[Tensor], states: Mapping[str, Sequence[Tensor] | None],
    scales: list[Tensor], levels: list[Tensor], encodings: list[int], dequantized: Sequence[Tensor], stats: SkewStats,
    rates: list[Tensor], numbers: list[Any], contiguous: bool = False, descent: Sequence[Any] = (),
) -> None:  # fmt: skip
    """The update without its checks, for callers that made sure of every argument (the optimizers).

    ``contiguous``: every tensor but the gradients is known to be. ``descent``: kept, firsts and coefficients of a
    sharpness-aware step (see ``schema``); needs ``contiguous``.
    """
    stand_ins = InPlace()
    if contiguous:
        writable: Any = lambda tensors: tensors or []  # noqa: E731
        grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
    else:
        orders = [layout(p, s.numel()) for p, s in zip(params, scales, strict=True)]
        grads = [
            (g if order is None else g.permute(order)).detach().contiguous()
            for g, order in zip(grads, orders, strict=True)
        ]

        def writable(tensors: Sequence[Tensor] | None) -> list[Tensor]:
            return [stand_ins.writable(t, order) for t, order in zip(tensors or [], orders, strict=False)]

    autograd.below_autograd(
        name, params[0],
        writable(params), grads, *(writable(buffers) for buffers in states.values()), scales, levels, encodings,
        writable(dequantized), stats.row_sums, stats.totals, *rates, *numbers, *descent,
    )  # fmt: skip
    stand_ins.finish([*params, *(b for buffers in states.values() if buffers for b in buffers), *dequantized])


@in_place()
def skew_sgd_(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor] | None,
    scales: Sequence[Tensor], grids: Sequence[Any], *, lr: float | Tensor, eps: float | Tensor, alpha: float = 1.0,
    momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False,
    skew: str = "gradient", clamp: bool = True, dequantized: Sequence[Tensor] | None = None,
    stats: SkewStats | None = None, maximize: bool = False, skip_nonfinite: bool = False,
) -> None:  # fmt: skip
    """One ASkewSGD step, in place, over a tensor list in one launch: each tensor is read once and written once.

    With d = -grad (``skew="gradient"``, as published) or SGD's own direction (``skew="direction"``), u the distance
    to the nearest level over the bracket length Delta, h = eps - 16 u^2 (1-u)^2 and |h'| = (32/Delta) u (1-u)(1-2u):

        kappa = min(alpha (-h) / |h'|, Delta / (4 lr))
        v     = d                                             where h >= 0, on a midpoint, or outside the hull
              = side * max(kappa, side * d)                   elsewhere; side = +1/-1 towards the nearest level
        w     <- clamp(w);  w <- w + lr v;  clamp to the hull (both clamps only with ``clamp``)

    ``skew="gradient"``: -v then replaces the gradient in torch.optim.SGD's rule (weight decay, momentum, Nesterov).
    A zero momentum buffer with ``dampening=0`` is torch's first step.

    params, grads, momentum_buffers (None without momentum): lists of equal shapes and dtypes; scales: () or (rows,);
    grids: one for each parameter; lr >= 0 and eps in (0, 1]: floats or 0-dim tensors. ``dequantized``: tensors that
    receive s Q(w/s) of the new weights, in their own dtype; ``stats``: a ``SkewStats`` that receives the pass's sums.
    NaN and inf gradients do what torch.optim.SGD does; with ``skip_nonfinite`` their elements are left alone.
    Raises TypeError/ValueError naming the argument before anything is written.
    Source: Leconte, Schechtman, Moulines, ASkewSGD, AISTATS 2023; docs/mathematics.md, section 2.
    """
    momentum = number("momentum", momentum, 0.0)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("nesterov: needs momentum > 0 and dampening = 0")
    if momentum and momentum_buffers is None:
        raise ValueError("momentum_buffers: expected one for each parameter with momentum > 0, got None")
    rates = [rate_tensor("lr", lr, 0.0), rate_tensor("eps", eps, 0.0, 1.0, open_low=True)]
    numbers = [
        number("alpha", alpha, 0.0), momentum, number("dampening", dampening, -math.inf),
        number("weight_decay", weight_decay, 0.0), bool(nesterov), skew == "direction", bool(clamp), bool(maximize),
        bool(skip_nonfinite),
    ]  # fmt: skip
    states = {"momentum_buffers": momentum_buffers if momentum else None}
    _skew_update("skew_sgd_", params, grads, states, scales, grids, dequantized, stats, rates, numbers, skew)


@in_place()
def skew_adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    scales: Sequence[Tensor], grids: Sequence[Any], *, step: float | Tensor, lr: float | Tensor, eps: float | Tensor,
    alpha: float = 1.0, betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, weight_decay: float = 0.01,
    skew: str = "gradient", clamp: bool = True, dequantized: Sequence[Tensor] | None = None,
    stats: SkewStats | None = None, maximize: bool = False, skip_nonfinite: bool = False,
) -> None:  # fmt: skip
    """One ASkewAdamW step: ``skew_sgd_`` with torch.optim.AdamW as the base rule.

    The base direction is -(m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + adam_eps) - weight_decay w, with the
    moments updated first. ``step`` counts from 1; ``eps`` is the constraint's, ``adam_eps`` AdamW's denominator's.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    beta1, beta2 = (number(f"betas[{i}]", b, 0.0) for i, b in enumerate(betas))
    if beta1 >= 1 or beta2 >= 1:
        raise ValueError(f"betas: expected numbers in [0, 1), got {betas}")
    rates = [
        rate_tensor("step", step, 1.0),
        rate_tensor("lr", lr, 0.0),
        rate_tensor("eps", eps, 0.0, 1.0, open_low=True),
    ]
    numbers = [
        number("alpha", alpha, 0.0), beta1, beta2, number("adam_eps", adam_eps, 0.0),
        number("weight_decay", weight_decay, 0.0), skew == "direction", bool(clamp), bool(maximize),
        bool(skip_nonfinite),
    ]  # fmt: skip
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _skew_update("skew_adamw_", params, grads, states, scales, grids, dequantized, stats, rates, numbers, skew)
