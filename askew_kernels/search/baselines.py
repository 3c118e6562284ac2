"""Policies without a differentiable search, under the same costs and budgets: what a search has to beat.

Each takes the model, an example batch and the ``options`` of ``Space``, which ``search_policy`` has, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..analysis.batches import batches_of
from ..analysis.generators import check_seed, seeded
from ..analysis.hessian import hessian_trace
from ..nn.kinds import kind_of
from ..quant import compute_scale
from .cost import BudgetError, told
from .policy import Policy, weight_grid
from .space import Space, knapsack


def _report(method: str, started: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "seconds": time.perf_counter() - started, **more}


def uniform_policy(model: nn.Module, example: Any, **options: Any) -> Policy:
    """The same bits everywhere: the most that meet the budget (weights first, then inputs)."""
    started = time.perf_counter()
    space = Space(model, example, **options)
    limit, least = float("inf") if space.budget is None else space.budget.limit, float("inf")
    for pair in reversed([*np.ndindex(len(space.weight_bits), len(space.act_bits))]):
        choice = dict.fromkeys(space.names, pair)
        least = min(least, cost := space.cost.of(choice))
        if cost <= limit:
            return space.policy(choice, _report("uniform", started))
    raise BudgetError(f"budget: {told(limit)} is below every uniform policy's cost, from {told(least)} on")


def random_policy(model: nn.Module, example: Any, *, seed: int = 0, **options: Any) -> Policy:
    """The knapsack's choice for random values: uses up the budget as the others do, and knows nothing."""
    started, seed = time.perf_counter(), check_seed(seed)
    space = Space(model, example, **options)
    draws = torch.Generator("cpu").manual_seed(seed)
    values = {name: torch.rand(table.shape, generator=draws, dtype=torch.float64, device="cpu")
              for name, table in space.cost.tables.items()}  # fmt: skip
    return space.policy(space.choose(values), _report("random", started, seed=seed))


@torch.no_grad()
def _by_errors(space: Space, weigh: Callable[[str], float]) -> dict[str, Tensor]:
    """Minus the error that each pair of candidates brings in, ‖w − ŵ‖², and the input's share of the same size."""
    values = {}
    for name in space.names:
        layer: Any = space.model.get_submodule(name)
        kind: Any = kind_of(layer)
        w = kind.form_with(kind.geometry_of(layer)).matrix(layer.weight.detach()).float().contiguous()  # a scale a row
        grids = [weight_grid(bits) for bits in space.weight_bits]
        errors = [float((w - ops.fake_quantize(w, compute_scale(w, g), g)).double().square().sum()) for g in grids]
        inputs = [p.act_errors for p in space.profile.weights[name]]
        shares = [0.0 if a is None else sum(of_input.get(a, 0.0) for of_input in inputs) for a in space.act_bits]
        weights, acts = (torch.tensor(t, dtype=torch.float64, device="cpu") for t in (errors, shares))
        values[name] = -weigh(name) * (weights[:, None] + float(w.double().square().sum()) * acts[None])
    return values


def sensitivity_policy(model: nn.Module, example: Any, **options: Any) -> Policy:
    """Least sum of ‖w − ŵ‖² under the budget. ``model``: a trained one."""
    started = time.perf_counter()
    space = Space(model, example, **options)
    return space.policy(_spend(space, _by_errors(space, lambda name: 1.0)), _report("sensitivity", started))


def hessian_policy(
    model: nn.Module, data: Any, loss_fn: Callable[..., Tensor], *, samples: int = 32, seed: int = 0, **options: Any
) -> Policy:
    """Least sum of (trace of the layer's Hessian / weights) ‖w − ŵ‖² under the budget (HAWQ-V2, Dong et al., 2020).

    data: (x, y) or batches of them; traces by Hutchinson (``analysis.hessian_trace``); a negative trace counts as 0.
    The trace of a weight that others share, an embedding too, is of all that they do with it.
    """
    started = time.perf_counter()
    with torch.inference_mode(False), seeded(seed, data):
        batches = batches_of(data)
    space = Space(model, batches[0][0], **options)
    traces = hessian_trace(space.model, loss_fn, batches, samples=samples, seed=seed)
    firsts = {id(p): name for name, p in space.model.named_parameters()}  # a shared weight's trace has its first name
    found = {name: traces[firsts[id(space.model.get_parameter(f"{name}.weight"))]] for name in space.names}
    weights = {name: max(0.0, found[name]) / space.profile.layers[name].weights for name in space.names}
    choice = _spend(space, _by_errors(space, weights.__getitem__))
    return space.policy(choice, _report("hessian", started, traces=weights, seed=seed))


def _spend(space: Space, values: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Errors fall with every bit: the budget is what ends them, so without one all bits are taken, also by layers that
    bring no error in, as those without a trace."""
    if space.budget is None:
        return dict.fromkeys(space.names, (len(space.weight_bits) - 1, len(space.act_bits) - 1))
    return space.spend(knapsack(values, space.cost, space.budget.limit), values)  # no trace, no error: bits left
