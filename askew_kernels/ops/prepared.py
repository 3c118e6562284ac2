"""Lists that a compiled operator runs over again and again: checked once, and kept as bytes that hold addresses.

Converting and checking a list of 500 tensors costs the host more than a step on the device. A prepared list is for
the optimizers, which keep the tensors and see to it that they stay where they are; there is no implementation but the
compiled one, and nothing is traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from . import autograd
from .dense import layout, permuted
from .rules import RULES, Rule
from .schema import library

__all__ = ["PreparedScales", "PreparedUpdate", "prepares"]

library.define(
    "prepare_update(int rule, Tensor[] params, Tensor[] states, Tensor[] scales, Tensor[] levels, int[] grids,"
    " Tensor[] dequantized, Tensor[] row_sums) -> Tensor"
)
library.define(
    "prepared_update_(int rule, Tensor list, int[] grads, Tensor(a!) like, Tensor(b!)? totals, Tensor? step, Tensor lr,"
    " Tensor eps, Tensor alpha, float[] numbers, bool direction, bool clamp, bool maximize, bool skip_nonfinite,"
    " bool ste_clip) -> ()"
)
library.define("prepare_scales(Tensor[] scales, Tensor[] row_sums, int[] rules, float[] numbers) -> Tensor")
library.define("prepared_scales_(Tensor list, Tensor(a!) like) -> ()")


def prepares(like: Tensor) -> bool:
    """Whether lists of tensors such as ``like`` can be prepared: compiled operators serve them."""
    return runtime.compiled_for(like)


def _holding(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Others over the same memory, which stays where it is even if theirs is exchanged (``tensor.data = …``)."""
    return [t.detach() for t in tensors]


class PreparedUpdate:
    """A list for ``run``: what the compiled operator was given, and what it made of it."""

    def __init__(self, rule: Rule, params: list[Tensor], states: list[Tensor], *lists: Any) -> None:
        self.number, self.like, self.kept = [*RULES].index(rule.name), params[0], (params, states, lists)
        self.alpha: tuple[float, Tensor] | None = None
        self.written = [*params, *states, *lists[3]]
        self.list: Tensor = autograd.below_autograd("prepare_update", self.like, self.number, params, states, *lists)

    @classmethod
    def of(
        cls, rule: Rule, params: Sequence[Tensor], states: Sequence[Sequence[Tensor]], scales: Sequence[Tensor],
        levels: Sequence[Tensor], encodings: list[int], dequantized: Sequence[Tensor], row_sums: Sequence[Tensor],
    ) -> PreparedUpdate | None:  # fmt: skip
        """``rule``'s update of a list; arguments as of ``run_skew_update``. None where it would need copies.

        The tensors must stay at their addresses as long as this is used.
        """
        orders = [layout(p, s.numel()) for p, s in zip(params, scales, strict=True)]
        written = [
            [permuted(t.detach(), order) for t, order in zip(tensors, orders, strict=True)]
            for tensors in (params, *states, *([dequantized] if dequantized else []))
        ]
        if not all(t.is_contiguous() for tensors in written for t in tensors):
            return None
        copies = written.pop() if dequantized else []
        return cls(rule, written[0], [t for tensors in written[1:] for t in tensors], _holding(scales), list(levels),
                   encodings, copies, _holding(row_sums))  # fmt: skip

    def run(
        self, grads: list[int], totals: Tensor | None, *, step: Tensor | None, lr: Tensor, eps: Tensor,
        alpha: float | Tensor, numbers: list[float], direction: bool, clamp: bool, maximize: bool, skip_nonfinite: bool,
        ste_clip: bool = False,
    ) -> None:  # fmt: skip
        """One step. grads: addresses of contiguous gradients in the parameters' types; totals: (n, 6) float64."""
        if not isinstance(alpha, Tensor):
            if self.alpha is None or self.alpha[0] != alpha:
                self.alpha = alpha, torch.tensor(alpha, dtype=torch.float64, device="cpu")
            alpha = self.alpha[1]
        autograd.below_autograd(
            "prepared_update_", self.like, self.number, self.list, grads, self.like, totals, step, lr, eps, alpha,
            numbers, direction, clamp, maximize, skip_nonfinite, ste_clip,
        )  # fmt: skip
        torch.autograd.graph.increment_version(self.written)


class PreparedScales:
    """A list for ``run``, which is ``run_scales_from_sums`` of it; the tensors must stay at their addresses."""

    def __init__(
        self, scales: Sequence[Tensor], row_sums: Sequence[Tensor], rules: list[int], numbers: list[float]
    ) -> None:
        self.kept = _holding(scales), _holding(row_sums)
        self.like = self.kept[0][0]
        self.list: Tensor = autograd.below_autograd("prepare_scales", self.like, *self.kept, rules, numbers)

    def run(self) -> None:
        autograd.below_autograd("prepared_scales_", self.like, self.list, self.like)
