"""What every format of integers takes from a packed layer: its levels as integers, its scales, or why it cannot."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import unpack_codes


class Integers(NamedTuple):
    """weight[i, j] = levels[i, j] * scale[i or 0, j // group size]; the integers of the grid are within [low, high].

    ``levels``: (n, cols) int16; ``scale``: (n, groups), (n, 1) or, where there is one, (1, 1), in the layer's type, or
    float32 where the levels are fractions.
    """

    levels: Tensor
    scale: Tensor
    low: int
    high: int


def table(layer: Any, holder: str, inputs: bool = False) -> tuple[tuple[int, ...], float]:
    """(n, f): the levels of a packed layer are f n, n integers of 8 bits, f a power of two.

    Raises ValueError, in which ``holder`` is what the integers are for, where there are none such, or where the layer
    quantizes its inputs (``QuantConfig(activation=…)``), unless ``inputs`` says that the caller keeps that.
    """
    grid = layer.config.weight
    if not inputs and (quantized := layer.kind.input_grid(layer)) is not None:
        raise ValueError(f"{holder} keep no quantized inputs, got activation={quantized}")
    if (found := grid.integers()) is None:
        raise ValueError(f"{holder} hold integer levels, got {grid}")
    low, *_, high = found[0]
    if not (-128 <= low and high <= 127) and not (0 <= low and high <= 255):
        raise ValueError(f"{holder} hold levels of 8 bits, got {grid}")
    return found


def integers(layer: Any, holder: str, inputs: bool = False) -> Integers:
    """Of a packed layer, on its device; raises as ``table``."""
    values, factor = table(layer, holder, inputs)
    codes, scale = layer.weight_codes, layer.weight_scale.detach()
    scale = scale if factor == 1 else scale.float() * factor  # float16 may be too narrow for the smaller scale
    levels = torch.tensor(values, dtype=torch.int16, device=codes.device)
    levels = levels[unpack_codes(codes, layer.bits, layer.cols).int()]
    return Integers(levels, scale.reshape(1 if scale.numel() == 1 else len(codes), -1), values[0], values[-1])
