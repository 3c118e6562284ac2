"""Policies without a differentiable search, under the same costs and budgets: what a search has to beat.

Each takes the model, an example batch and what ``search_policy`` takes: ``weight_bits``, ``act_bits``, ``budget``,
``filter_fn``, ``hooks``, ``latency``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..analysis.batches import batches_of
from ..analysis.generators import seeded
from ..analysis.hessian import hessian_trace
from ..quant import compute_scale
from .cost import BudgetError
from .policy import Policy, weight_grid
from .space import Space, knapsack


def _report(method: str, started: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "seconds": time.perf_counter() - started, **more}


def uniform_policy(model: nn.Module, example: Any, **options: Any) -> Policy:
    """The same bits everywhere: the most that meet the budget (weights first, then inputs)."""
    started = time.perf_counter()
    space = Space(model, example, **options)
    limit = float("inf") if space.budget is None else space.budget.limit
    pairs = [(i, j) for i in range(len(space.weight_bits)) for j in range(len(space.act_bits))]
    for i, j in reversed(pairs):
        choice = {name: (i, j) for name in space.names}
        if space.cost.of(choice) <= limit:
            return space.policy(choice, _report("uniform", started))
    raise BudgetError(f"budget: {limit:g} is below every uniform policy's cost")  # the range allowed it: rounding


def random_policy(model: nn.Module, example: Any, *, seed: int = 0, **options: Any) -> Policy:
    """The knapsack's choice for random values: uses up the budget as the others do, and knows nothing."""
    started = time.perf_counter()
    space = Space(model, example, **options)
    draws = torch.Generator("cpu").manual_seed(seed)
    values = {
        name: torch.rand(t.shape, generator=draws, dtype=torch.float64, device="cpu")
        for name, t in space.cost.tables.items()
    }
    return space.policy(space.choose(values), _report("random", started, seed=seed))


@torch.no_grad()
def weight_errors(space: Space) -> dict[str, tuple[Tensor, float]]:
    """{layer: (‖w − ŵ‖² of each weight candidate, ‖w‖²)}, each weight once."""
    found = {}
    for name in space.names:
        w = space.model.get_submodule(name).weight.detach().float()  # type: ignore[union-attr, operator]
        errors = []
        for bits in space.weight_bits:
            grid = weight_grid(bits)
            errors.append(float((w - ops.fake_quantize(w, compute_scale(w, grid), grid)).double().square().sum()))
        found[name] = torch.tensor(errors, dtype=torch.float64, device="cpu"), float(w.double().square().sum())
    return found


def _by_errors(space: Space, weigh: Callable[[str], float]) -> dict[str, Tensor]:
    """Minus the error that each pair of candidates brings in: the weight's, and the input's share of the same size."""
    values = {}
    for name, (errors, size) in weight_errors(space).items():
        inputs = [p.act_errors for p in space.profile.weights[name]]
        shares = [0.0 if a is None else sum(of_input.get(a, 0.0) for of_input in inputs) for a in space.act_bits]
        acts = torch.tensor(shares, dtype=torch.float64, device="cpu")
        values[name] = -weigh(name) * (errors[:, None] + size * acts[None])
    return values


def sensitivity_policy(model: nn.Module, example: Any, **options: Any) -> Policy:
    """Least sum of ‖w − ŵ‖² under the budget. ``model``: a trained one."""
    started = time.perf_counter()
    space = Space(model, example, **options)
    values = _by_errors(space, lambda name: 1.0)
    return space.policy(_spend(space, values), _report("sensitivity", started))


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
    first_names = {id(p): name for name, p in space.model.named_parameters()}  # a shared weight's trace has its first
    found = {name: traces[first_names[id(space.model.get_parameter(f"{name}.weight"))]] for name in space.names}
    weights = {name: max(0.0, found[name]) / space.profile.layers[name].weights for name in space.names}
    values = _by_errors(space, lambda name: weights[name])
    return space.policy(_spend(space, values), _report("hessian", started, traces=weights, seed=seed))


def _spend(space: Space, values: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Errors fall with every bit: the budget is what ends them, so without one all bits are taken."""
    if space.budget is None:
        return space.choose(values)
    return space.spend(knapsack(values, space.cost, space.budget.limit), values)  # no trace, no error: bits left
