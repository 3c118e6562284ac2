"""The base optimizers of the skewed update, one row each: ``csrc/math/update.inl`` and its like hold the mathematics.

A row says everything else that is particular to a rule. The operator ``askew::skew_<name>_``, its schema, the public
functions' arguments, the optimizers' groups, their checks and the keys of their state follow from it.
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    name: str  # of its mathematics everywhere
    buffers: tuple[
        str, ...
    ]  # state beside each weight, in the order of the kernels; keys as in torch.optim's ``state``
    numbers: tuple[str, ...]  # hyper-parameters in the order of the kernels: group keys, "betas.0" for a part of one
    defaults: dict[str, object]  # of the optimizer's constructor, as torch.optim has them
    counts: bool = False  # whether the mathematics needs the number of the step, kept as ``state["step"]``


RULES = {
    rule.name: rule
    for rule in (
        Rule("sgd", ("momentum_buffer",), ("momentum", "dampening", "weight_decay", "nesterov"),
             {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}),
        Rule("adamw", ("exp_avg", "exp_avg_sq"), ("betas.0", "betas.1", "adam_eps", "weight_decay"),
             {"lr": 1e-3, "betas": (0.9, 0.999), "adam_eps": 1e-8, "weight_decay": 1e-2}, counts=True),
    )
}  # fmt: skip
