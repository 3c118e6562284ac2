"""What every format of integers takes from a packed layer: its levels as integers, its scales, or why it cannot."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import level_table, unpack_codes


class Integers(NamedTuple):
    """weight[i, j] = levels[i, j] * scale[i or 0, j // group size]; the integers of the grid are within [low, high].

    ``levels``: (n, cols) int16; ``scale``: (n, groups), (n, 1) or, where there is one, (1, 1), in the layer's type.
    """

    levels: Tensor
    scale: Tensor
    low: int
    high: int


def bounds(layer: Any, holder: str) -> tuple[int, int]:
    """(lowest, highest) level of a packed layer. Raises ValueError, in which ``holder`` is what the integers are for,
    where they are not integers of 8 bits, or where the layer quantizes its inputs (``QuantConfig(activation=…)``)."""
    grid = layer.config.weight
    low, high = grid.levels[0], grid.levels[-1]
    if layer.config.activation is not None:
        raise ValueError(f"{holder} keep no quantized inputs, got activation={layer.config.activation}")
    if any(c != int(c) for c in grid.levels):
        raise ValueError(f"{holder} hold integer levels, got {grid}")
    if not (-128 <= low and high <= 127) and not (0 <= low and high <= 255):
        raise ValueError(f"{holder} hold levels of 8 bits, got {grid}")
    return int(low), int(high)


def integers(layer: Any, holder: str) -> Integers:
    """Of a packed layer, on its device; raises as ``bounds``."""
    low, high = bounds(layer, holder)
    grid, codes, scale = layer.config.weight, layer.weight_codes, layer.weight_scale.detach()
    table = level_table(grid.levels_tensor(codes.device), grid.encoding, codes.device).to(torch.int16)
    levels = table[unpack_codes(codes, layer.bits, layer.cols).int()]
    return Integers(levels, scale.reshape(1 if scale.numel() == 1 else len(codes), -1), low, high)
