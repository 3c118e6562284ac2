"""Parameter groups of the optimizers under the constraint: their keys, defaults and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import ops
from ..quant import QuantConfig, WeightQuantizer

FREEZE_SCALE = ("anneal", "init", "never")
GRID_KEYS = {"grid": None, "scale": None, "granularity": "per_channel", "group_size": None, "sawb_coefficients": None}
CONSTRAINT_KEYS = {"alpha": 1.0, "constraint_eps": 1.0, "freeze_scale": "anneal", "skip_nonfinite": False, **GRID_KEYS}


def config_of(group: Mapping[str, Any]) -> QuantConfig:
    """The quantization of a weight that no layer says anything of."""
    rule = group["scale"]
    if rule is not None and not isinstance(rule, (str, Tensor)):
        raise TypeError(f"scale: expected a rule's name, None or a tensor, got {rule!r}")
    if isinstance(rule, Tensor):
        rule = "absmax"  # never asked: the scale is frozen at once
    return QuantConfig(
        weight=group["grid"], scale=rule, granularity=group["granularity"], group_size=group["group_size"],
        forward="relaxed", sawb_coefficients=group["sawb_coefficients"],
    )  # fmt: skip


def fixed_scale(group: Mapping[str, Any], p: Tensor, rows: int) -> Tensor:
    """The group's scale tensor as (rows,); one number serves every row."""
    scale = group["scale"].detach().to(p.device).reshape(-1)
    return ops.check_scale("scale", scale.expand(rows) if scale.numel() == 1 else scale, p, "the parameter")


def rates_of(group: Mapping[str, Any]) -> dict[str, Tensor]:
    """What schedules and users change between steps, as checked 0-dim tensors."""
    return {
        "lr": ops.rate_tensor("lr", group["lr"], 0.0),
        "eps": ops.rate_tensor("constraint_eps", group["constraint_eps"], 0.0, 1.0, open_low=True),
    }


def check_constraint(group: Mapping[str, Any]) -> None:
    """Raises TypeError/ValueError that names the key."""
    rates_of(group)
    ops.number("alpha", group["alpha"], 0.0)
    if group["freeze_scale"] not in FREEZE_SCALE:
        raise ValueError(f"freeze_scale: expected one of {', '.join(FREEZE_SCALE)}, got {group['freeze_scale']!r}")
    if group["grid"] is None:
        return
    ops.check_grid(group["grid"])
    for i, p in enumerate(group["params"]):
        ops.check_float_tensor(f"params[{i}]", p)
    config = config_of(group)
    for p in group["params"]:
        rows = WeightQuantizer(config).rows(p)
        if isinstance(group["scale"], Tensor):
            fixed_scale(group, p, rows)
