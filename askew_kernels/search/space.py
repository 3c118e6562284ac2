"""What a search chooses from, under which budget, and the exact choice: a knapsack with one option a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.policy import ACT_BITS, WEIGHT_BITS, LayerPolicy, Policy, candidate_layers, layer_roles
from .cost import Budget, BudgetError, Cost, Latency, MacsHook, cost_of, policy_costs, trace
from .mixed import FilterFn, check_candidates, chosen_layers

Choice = dict[str, tuple[int, int]]


def knapsack(values: Mapping[str, Tensor], cost: Cost, limit: float) -> Choice:
    """One (weight candidate, input candidate) a layer with the largest sum of ``values`` and cost <= limit: exact.

    A mixed-integer program for ``scipy.optimize.milp`` (HiGHS); what it returns is added up again, exactly, and never
    exceeds the limit. Of equal values the cheaper is taken. Raises BudgetError where even the cheapest exceeds it.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise ImportError('the knapsack needs SciPy: pip install "askew_kernels[search]"') from None
    names = list(cost.tables)
    cheapest = {n: _unravel(int(cost.tables[n].argmin()), cost.tables[n]) for n in names}
    if cost.of(cheapest) > limit:
        raise BudgetError(f"budget: {limit:g} is below the least that the candidates can cost, {cost.of(cheapest):g}")
    sizes = [cost.tables[n].numel() for n in names]
    worth = np.concatenate([values[n].detach().double().cpu().reshape(-1).numpy() for n in names])
    if not np.isfinite(worth).all():
        raise ValueError("values: expected finite numbers")
    price = np.concatenate([cost.tables[n].reshape(-1).numpy() for n in names])
    room = limit * cost.divisor - cost.fixed
    scale = price.max() or 1.0
    span = np.ptp(worth) or 1.0
    objective = -worth / span + 1e-9 * price / scale
    one_each = np.zeros((len(names), len(worth)))
    start = 0
    for row, size in zip(one_each, sizes, strict=True):
        row[start : start + size] = 1
        start += size
    # the solver's own tolerance is 1e-6: of what exceeds the limit by less, the next try stays further away
    for margin in (0.0, 1e-6, 1e-4, 1e-2):
        capacity = LinearConstraint((price / scale)[None], -np.inf, room / scale * (1 - margin))
        found = milp(objective, integrality=np.ones_like(worth), bounds=Bounds(0, 1),
                     constraints=[LinearConstraint(one_each, 1, 1), capacity],
                     options={"mip_rel_gap": 0.0})  # fmt: skip
        if found.x is None:
            continue
        parts = torch.from_numpy(found.x).split(sizes)
        choice = {n: _unravel(int(x.argmax()), cost.tables[n]) for n, x in zip(names, parts, strict=True)}
        if cost.of(choice) <= limit:
            return choice
    return cheapest


def _unravel(index: int, table: Tensor) -> tuple[int, int]:
    return index // table.shape[1], index % table.shape[1]


class Space:
    """The searched layers of a model, their candidates, every cost, and the budget; checked when it is made.

    example: a batch for the one traced forward. Raises ValueError for candidates that are empty or unknown and a model
    without a layer to quantize; BudgetError, with the smallest and the largest that the candidates can reach, for a
    budget outside.
    """

    def __init__(
        self, model: nn.Module, example: Any, weight_bits: Sequence[int] = (2, 3, 4, 8),
        act_bits: Sequence[int | None] = (None,), budget: Budget | None = None, *, filter_fn: FilterFn | None = None,
        hooks: Mapping[type[nn.Module], MacsHook] | None = None, latency: Latency | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"budget: expected a Budget, got {budget!r}")
        found: Any = check_candidates("weight_bits", weight_bits, WEIGHT_BITS, none=False)
        self.weight_bits: tuple[int, ...] = found
        self.act_bits: Any = check_candidates("act_bits", act_bits, ACT_BITS, none=True)
        self.budget = budget
        self.profile = trace(model, example, list(chosen_layers(model, filter_fn)), act_bits=self.act_bits, hooks=hooks)
        self.names = list(self.profile.layers)
        self.roles = layer_roles(model)
        self.all_layers = list(candidate_layers(model))
        kind = "bitops" if budget is None else budget.kind
        self.cost = cost_of(kind, self.profile, self.weight_bits, self.act_bits, latency)
        # what λ counts in: every layer at 8 bits, or for a latency the most there is
        at_8 = cost_of(kind, self.profile, [8], [8], latency).range[1] if kind != "latency" else self.cost.range[1]
        self.cost_8bit = at_8 or 1.0
        if budget is not None:
            low, high = self.cost.range
            if not low <= budget.limit <= high:
                raise BudgetError(
                    f"budget: {kind}={budget.limit:g} is outside what the candidates reach, from {low:g} to {high:g}"
                )

    @property
    def signed(self) -> dict[str, bool]:
        return {name: p.signed for name, p in self.profile.layers.items()}

    def choose(self, values: Mapping[str, Tensor]) -> Choice:
        """The best of every layer where that meets the budget, else the knapsack's choice."""
        best = {name: _unravel(int(values[name].argmax()), self.cost.tables[name]) for name in self.names}
        if self.budget is None or self.cost.of(best) <= self.budget.limit:
            return best
        return knapsack(values, self.cost, self.budget.limit)

    def policy(self, choice: Choice, report: dict[str, Any] | None = None) -> Policy:
        """The policy of a choice; layers that are not searched stay float. Costs are added to the report."""
        layers = []
        for name in self.all_layers:
            kind, role, position = self.roles[name]
            w = a = None
            if name in choice:
                w, a = self.weight_bits[choice[name][0]], self.act_bits[choice[name][1]]
            signed = self.signed.get(name, True)
            layers.append(LayerPolicy(name, kind, role, position, w, a, signed))
        found = Policy(tuple(layers), dict(report or {}))
        found.report["chosen"] = policy_costs(found, self.profile)
        if self.budget is not None:
            found.report["budget"] = {self.budget.kind: self.budget.limit}
            found.report["chosen"][self.budget.kind] = self.cost.of(choice)
            assert self.cost.of(choice) <= self.budget.limit or math.isclose(self.cost.of(choice), self.budget.limit)
        return found
