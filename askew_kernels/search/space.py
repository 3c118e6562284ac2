"""What a search chooses from, under which budget, and the exact choice: a knapsack with one option a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..nn.kinds import SEARCHED
from .cost import Budget, BudgetError, Cost, Latency, MacsHook, cost_of, policy_costs, told, trace, warn_of
from .mixed import FilterFn, check_candidates, chosen_layers
from .policy import ACT_BITS, WEIGHT_BITS, Kinds, LayerPolicy, Policy, layer_roles

Choice = dict[str, tuple[int, int]]


def check_solver() -> None:
    """ImportError without SciPy."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise ImportError('the knapsack needs SciPy: pip install "askew_kernels[search]"') from None


def knapsack(values: Mapping[str, Tensor], cost: Cost, limit: float,
             options: Mapping[str, Sequence[tuple[int, int]]] | None = None) -> Choice:  # fmt: skip
    """One (weight candidate, input candidate) a layer with the largest sum of ``values`` and cost <= limit: exact.

    options: {layer: the pairs that it may have} (default: all). A mixed-integer program for ``scipy.optimize.milp``
    (HiGHS); what it returns is added up again, exactly, never exceeds the limit, and leaves no layer alone that could
    have a pair of more value within it. Of equal values the cheaper is taken. Raises BudgetError where even the
    cheapest exceeds it.
    """
    check_solver()
    from scipy.optimize import Bounds, LinearConstraint, milp

    names = list(cost.tables)
    pairs = {n: list(options[n] if options else np.ndindex(*cost.tables[n].shape)) for n in names}
    worth = {n: [float(values[n][pair]) for pair in pairs[n]] for n in names}
    price = {n: [float(cost.tables[n][pair]) for pair in pairs[n]] for n in names}
    cheapest = {n: pairs[n][min(range(len(pairs[n])), key=price[n].__getitem__)] for n in names}
    if cost.of(cheapest) > limit:
        least = told(cost.of(cheapest))
        raise BudgetError(f"budget: {told(limit)} is below the least that the candidates can cost, {least}")
    worths, prices = (np.array([v for n in names for v in of[n]]) for of in (worth, price))
    if not np.isfinite(worths).all():
        raise ValueError("values: expected finite numbers")
    room = limit * cost.divisor - cost.fixed
    scale = prices.max() or 1.0
    objective = -worths / (np.ptp(worths) or 1.0) + 1e-9 * prices / scale
    counts = [len(pairs[n]) for n in names]
    one_each = np.repeat(np.eye(len(names)), counts, axis=1)
    choice = cheapest
    # the solver's own tolerance is 1e-6: of what exceeds the limit by less, the next try stays further away
    for margin in (0.0, 1e-6, 1e-4, 1e-2):
        capacity = LinearConstraint((prices / scale)[None], -np.inf, room / scale * (1 - margin))
        found = milp(objective, integrality=np.ones_like(worths), bounds=Bounds(0, 1),
                     constraints=[LinearConstraint(one_each, 1, 1), capacity],
                     options={"mip_rel_gap": 0.0})  # fmt: skip
        if found.x is None:
            continue
        parts = np.split(found.x, np.cumsum(counts[:-1]))
        made = {n: pairs[n][int(part.argmax())] for n, part in zip(names, parts, strict=True)}
        if cost.of(made) <= limit:
            choice = made
            break
    return _improved(choice, pairs, worth, price, cost, limit)


def _improved(choice: Choice, pairs: Mapping[str, list[tuple[int, int]]], worth: Mapping[str, list[float]],
              price: Mapping[str, list[float]], cost: Cost, limit: float) -> Choice:  # fmt: skip
    """Changes one layer at a time, the one that gains most first, while any pair of more value is affordable."""
    while True:
        now = {n: pairs[n].index(choice[n]) for n in pairs}
        room = limit * cost.divisor - cost.fixed - math.fsum(price[n][k] for n, k in now.items())
        room += 1e-9 * abs(limit * cost.divisor)  # roughly first: adding all up exactly takes its time
        gains = [(worth[n][k] - worth[n][i], n, pairs[n][i]) for n, k in now.items() for i in range(len(pairs[n]))
                 if worth[n][i] > worth[n][k] and price[n][i] - price[n][k] <= room]  # fmt: skip
        by_gain = sorted(gains, key=lambda gain: gain[0])
        best = next(({**choice, n: pair} for _, n, pair in by_gain if cost.of({**choice, n: pair}) <= limit), None)
        if best is None:
            return choice
        choice = best


class Space:
    """The searched layers of a model, their candidates, every cost, and the budget; checked when it is made.

    example: a batch for the one traced forward. Raises ValueError for candidates that are empty or unknown and a model
    without a layer to quantize; BudgetError, with what the candidates reach, for a budget outside.
    """

    def __init__(self, model: nn.Module, example: Any, weight_bits: Sequence[int] = (2, 3, 4, 8),
                 act_bits: Sequence[int | None] = (None,), budget: Budget | None = None, *,
                 filter_fn: FilterFn | None = None, hooks: Mapping[type[nn.Module], MacsHook] | None = None,
                 latency: Latency | None = None, kinds: Kinds = SEARCHED) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self.model = model = getattr(model, "_orig_mod", model)  # inside torch.compile's: names that others have too
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"budget: expected a Budget, got {budget!r}")
        self.weight_bits = check_candidates("weight_bits", weight_bits, WEIGHT_BITS, none=False)
        self.act_bits = check_candidates("act_bits", act_bits, ACT_BITS, none=True)
        self.budget, self.kinds, chosen = budget, kinds, list(chosen_layers(model, filter_fn, kinds))
        self.profile = trace(model, example, chosen, act_bits=self.act_bits, hooks=hooks, kinds=kinds)
        self.names = list(self.profile.weights)  # a choice for each weight, under the first layer that has it
        self.roles = layer_roles(model, kinds)
        kind = "bitops" if budget is None else budget.kind
        self.cost = cost_of(kind, self.profile, self.weight_bits, self.act_bits, latency)
        # what λ counts in: every layer at 8 bits, or for a latency the most there is
        at_8 = cost_of(kind, self.profile, [8], [8], latency).range[1] if kind != "latency" else self.cost.range[1]
        self.cost_8bit = at_8 or 1.0
        warn_of(self.profile, "" if budget is None else kind)
        if budget is not None:
            low, high = self.cost.range
            if not low <= budget.limit <= high:
                reach = f"what the candidates reach, from {told(low)} to {told(high)}"
                raise BudgetError(f"budget: {kind}={told(budget.limit)} is outside {reach}")

    @property
    def signed(self) -> dict[str, bool]:
        """Whether a layer's input has negative values; of layers that share a weight, whether any one's has."""
        return {p.name: any(q.signed for q in layers) for layers in self.profile.weights.values() for p in layers}

    def best(self, values: Mapping[str, Tensor]) -> Choice:
        """The pair of most value for every weight, whatever it costs."""
        return {name: divmod(int(values[name].argmax()), len(self.act_bits)) for name in self.names}

    def choose(self, values: Mapping[str, Tensor]) -> Choice:
        """The best of every layer where that meets the budget, else the knapsack's choice; then ``spend``."""
        chosen = self.best(values)
        if self.budget is None:
            return chosen
        if self.cost.of(chosen) > self.budget.limit:
            chosen = knapsack(values, self.cost, self.budget.limit)
        return self.spend(chosen, values)

    def spend(self, chosen: Choice, values: Mapping[str, Tensor]) -> Choice:
        """Puts what a choice leaves of the budget into more bits.

        values: log-probabilities, or other numbers that are better where they are larger. Of the choices from the given
        one up it is, exactly, the one with the largest sum over layers of log Σ exp(values) over all pairs up to the
        chosen one: with log-probabilities that of "no layer has less than it needs". Nothing affordable is left: no
        weight could have a later candidate, and no input one that costs more, within the budget.
        """
        assert self.budget is not None
        above, score = {}, {}
        for name, table in self.cost.tables.items():
            i, j = chosen[name]
            above[name] = [(k, m) for k, m in np.ndindex(*table.shape)
                           if k >= i and (m == j or (m > j and table[k, m] > table[k, j]))]  # fmt: skip
            steps = torch.ones_like(table).cumsum(0).cumsum(1).sqrt()  # grows along both: more is never equal
            up = values[name].detach().double().cpu().logcumsumexp(0).logcumsumexp(1)
            score[name] = up + 1e-6 * steps
        return knapsack(score, self.cost, self.budget.limit, above)

    def policy(self, choice: Choice, report: dict[str, Any] | None = None) -> Policy:
        """The policy of a choice; layers that are not searched stay float. Costs are added to the report."""
        layers, signed = [], self.signed
        for name, (kind, role, position) in self.roles.items():
            w = a = None
            if name in self.profile.layers:
                i, j = choice[self.profile.tied.get(name, name)]
                w, a = self.weight_bits[i], None if self.profile.layers[name].looked_up else self.act_bits[j]
            layers.append(LayerPolicy(name, kind, role, position, w, a, signed.get(name, True)))
        found = Policy(tuple(layers), dict(report or {}))
        found.report["chosen"] = policy_costs(found, self.profile)
        if self.budget is not None:
            found.report["budget"] = {self.budget.kind: self.budget.limit}
            cost = found.report["chosen"][self.budget.kind] = self.cost.of(choice)
            assert cost <= self.budget.limit or math.isclose(cost, self.budget.limit)
        return found
