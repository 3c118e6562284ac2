"""Mixed-precision search: which layer deserves which bits (docs/search.md; docs/mathematics.md, section 6).

    policy = search_policy(model, loader, loss_fn, weight_bits=(2, 3, 4, 8), budget=Budget(average_bits=3.0))
    policy.save("policy.json");  ak.quantize_(target, policy)

``search_policy`` is ASGA, and the differentiable search without sharpness; ``uniform_policy``, ``random_policy``,
``sensitivity_policy`` and ``hessian_policy`` are the baselines, under the same costs and budgets.
"""

from .baselines import hessian_policy, random_policy, sensitivity_policy, uniform_policy
from .cost import COSTS, Budget, BudgetError, Profile, latency_table, policy_costs, trace
from .mixed import MixedConv2d, MixedLinear, mix_, mixed_layers, unmix_
from .policy import LayerPolicy, Policy, PolicyError, layer_roles
from .search import search_policy
from .space import Space, knapsack

__all__ = [
    "COSTS", "Budget", "BudgetError", "LayerPolicy", "MixedConv2d", "MixedLinear", "Policy", "PolicyError", "Profile",
    "Space", "hessian_policy", "knapsack", "latency_table", "layer_roles", "mix_", "mixed_layers", "policy_costs",
    "random_policy", "search_policy", "sensitivity_policy", "trace", "uniform_policy", "unmix_",
]  # fmt: skip
