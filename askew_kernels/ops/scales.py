"""Scales of a list of tensors from the sums that an update leaves behind, and those of the least squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .autograd import below_autograd, one_by_one
from .schema import define

__all__ = ["run_mse_scales", "run_scales_from_sums"]

define("scales_from_sums_", "(Tensor(a!)[] scales, Tensor[] row_sums, int[] rules, float[] numbers) -> ()")
define("mse_scales", "(Tensor w, Tensor row_sums, Tensor levels, int[] grid, float c_max, int scale_type) -> Tensor",
       fake=lambda w, row_sums, *_args: row_sums.new_empty(row_sums.shape[:1]), batch=one_by_one)  # fmt: skip


def run_scales_from_sums(
    scales: Sequence[Tensor], row_sums: Sequence[Tensor], rules: Sequence[int], numbers: Sequence[float],
    count: bool = True,
) -> None:  # fmt: skip
    """Writes the scales (rows,) of every tensor from its row sums (rows, 3), float32, in one launch; nothing is checked
    but what memory asks for. ``count``: as a write that autograd counts.

    ``rules``: three integers a tensor, the rule (``contract.ABSMAX`` …), the place of the scales' type among
    ``contract.SCALE_TYPES`` and the columns of a row; ``numbers``: c_max and two factors of the rule
    (``quant.scales.rule_code`` gives all but the columns). A row of zeros takes the lower median of its tensor's other
    scales, a row that is not finite 1; GIVEN looks at the scales that are there, and changes only such rows.
    """
    if scales:
        below_autograd("scales_from_sums_", row_sums[0], scales, row_sums, rules, numbers)
        if count:
            torch.autograd.graph.increment_version(scales)


def run_mse_scales(
    w: Tensor, row_sums: Tensor, levels: Tensor, grid: list[int], c_max: float, scale_type: int
) -> Tensor:
    """(rows,) float32: of 100 parts of max|w| / c_max the one with the least squared error; 1 for a row of zeros.

    Errors are float64 sums of the squares of float32 differences, in one order everywhere (``contract.ERROR_LANES``).
    """
    return below_autograd("mse_scales", w, w, row_sums, levels, grid, c_max, scale_type)
