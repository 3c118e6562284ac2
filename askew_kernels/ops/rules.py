"""The base optimizers of the skewed update, one row each: ``csrc/math/update.inl`` and its like hold the mathematics.

A row says everything else that is particular to a rule. The operator ``askew::skew_<name>_``, its schema, the public
functions' arguments, the optimizers' groups, their checks and the keys of their state follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .checks import number

__all__ = ["RULES", "Rule"]


class Rule(NamedTuple):
    name: str  # of its mathematics everywhere
    title: str  # of the optimizer, as torch.optim has it
    buffers: tuple[str, ...]  # state beside each weight, in the order of the kernels; keys of torch.optim's ``state``
    numbers: tuple[str, ...]  # hyper-parameters in the order of the kernels; "betas.0" for a part of one
    defaults: dict[str, Any]  # of the optimizer's constructor, as torch.optim has them
    text: str  # for the public functions: where the rule comes from
    counts: bool = False  # whether the mathematics needs the number of the step, kept as ``state["step"]``
    buffers_if: str = ""  # the hyper-parameter that is 0 where no buffers are kept; "": they always are
    at_first: Mapping[str, float] = {}  # hyper-parameters of a weight's first step, its buffers zero, that differ
    torch_names: Mapping[str, str] = {}  # hyper-parameters that torch.optim calls otherwise

    @property
    def operator(self) -> str:
        return f"skew_{self.name}_"

    def keeps_buffers(self, options: Mapping[str, Any]) -> bool:
        return bool(self.buffers) and (not self.buffers_if or bool(options[self.buffers_if]))

    def numbers_of(self, options: Mapping[str, Any]) -> list[float]:
        """The hyper-parameters in the order of the kernels. Raises TypeError/ValueError that names what is wrong."""
        return [_number_of(name, options) for name in self.numbers]


def _number_of(name: str, options: Mapping[str, Any]) -> float:
    key, _, index = name.partition(".")
    value = options[key]
    if key == "nesterov":
        if not isinstance(value, bool):
            raise TypeError(f"nesterov: expected True or False, got {value!r}")
        if value and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError("nesterov: needs momentum > 0 and dampening = 0")
        return float(bool(value))
    if not index:
        return number(name, value, -math.inf if key == "dampening" else 0.0)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{key}: expected two numbers in [0, 1), got {value!r}")
    found = number(f"{key}[{index}]", value[int(index)], 0.0)
    if found >= 1:
        raise ValueError(f"{key}[{index}]: expected a number in [0, 1), got {found}")
    return found


#: Name -> the rule of an update: its buffers, numbers and source. Operators and optimizers are made from this table.
RULES = {
    rule.name: rule
    for rule in (
        Rule("sgd", "SGD", ("momentum_buffer",), ("momentum", "dampening", "weight_decay", "nesterov"),
             {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False},
             "torch.optim.SGD: weight decay, momentum, Nesterov. A zero buffer with ``dampening=0`` is torch's "
             "first step; without momentum there may be None.",
             buffers_if="momentum", at_first={"dampening": 0.0}),
        Rule("adamw", "AdamW", ("exp_avg", "exp_avg_sq"), ("betas.0", "betas.1", "adam_eps", "weight_decay"),
             {"lr": 1e-3, "betas": (0.9, 0.999), "adam_eps": 1e-8, "weight_decay": 1e-2},
             "torch.optim.AdamW: -(m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + adam_eps) - weight_decay w, "
             "the moments updated first. ``step`` counts from 1.",
             counts=True,
             torch_names={"adam_eps": "eps"}),
        Rule("lion", "Lion", ("exp_avg",), ("betas.0", "betas.1", "weight_decay"),
             {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
             "Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023: the direction is "
             "-sign(beta1 m + (1 - beta1) g) - weight_decay w, with sign(0) = 0 and NaN left NaN, and then "
             "m <- beta2 m + (1 - beta2) g."),
    )
}  # fmt: skip
