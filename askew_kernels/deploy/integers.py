"""What every format of integers takes from a packed layer: its levels as integers, its scales, or why it cannot; and
a packed layer made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import unpack_codes
from ..nn.packed import PackedLayer
from ..quant import Grid, QuantConfig, Uniform, num_rows, pack_codes
from ..quant.packing import SCALE_TYPES
from ..quant.scales import holds_scales


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


def kept_scale(scale: Tensor) -> Tensor:
    """The scales of a file in a type that packed layers keep; those of a float64 model in float32, which held them when
    they were packed. Raises ValueError for other types and numbers."""
    kept = scale.float() if scale.dtype == torch.float64 else scale
    if kept.dtype not in SCALE_TYPES or (kept is not scale and not torch.equal(kept.double(), scale)):
        raise ValueError(f"expected float32, float16, bfloat16 or what these hold, got {scale.dtype}")
    return kept


def integers(layer: Any, holder: str, inputs: bool = False) -> Integers:
    """Of a packed layer, on its device; raises as ``table``."""
    values, factor = table(layer, holder, inputs)
    codes, scale = layer.weight_codes, layer.weight_scale.detach()
    scale = scale if factor == 1 else scale.float() * factor  # float16 may be too narrow for the smaller scale
    levels = torch.tensor(values, dtype=torch.int16, device=codes.device)
    levels = levels[unpack_codes(codes, layer.bits, layer.cols).int()]
    return Integers(levels, scale.reshape(1 if scale.numel() == 1 else len(codes), -1), values[0], values[-1])


def grid_of(low: int, high: int) -> Grid:
    """The narrowest Uniform grid with integers from ``low`` to ``high``. Raises ValueError where there is none."""
    for bits in range(2, 9):
        for signed, least in ((True, -(2 ** (bits - 1))), (False, 0)):
            if least <= low and high < least + 2**bits:
                return Uniform(bits, signed=signed)
    raise ValueError(f"expected integers of 8 bits, got {low} to {high}")


@torch.no_grad()
def packed_layer(
    kind: Any,
    shape: tuple[int, ...],
    levels: Tensor,
    scale: Tensor,
    config: QuantConfig | tuple[int, int],
    *,
    block: int | None = None,
    geometry: dict[str, Any] | None = None,
    trits: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PackedLayer:
    """The packed layer, without a bias, of weights levels * scale; what ``integers`` gave comes back.

    kind, shape, geometry: of the layer (``nn.KINDS``). levels: (n, cols), scale: (n or 1, blocks), each for ``block``
    columns, the last for what is left (None: blocks of equal size). config: or the least and the largest integer that
    can stand in levels, and then the grid is the narrowest and the granularity that of ``scale``. What is the product
    of a negative scale is that of a positive one and the opposite levels, and of a scale of 0 that of 1 and level 0.
    Raises ValueError where there is no such grid, it lacks a level, or the granularity cannot be; for scales that are
    not finite.
    """
    n, cols = levels.shape
    block = min(block or cols // max(1, scale.shape[1]), max(1, cols))  # a file may say any
    if not bool(scale.isfinite().all()):
        raise ValueError("expected scales that are finite")
    if not bool((scale > 0).all()):
        signs = torch.sign(scale).to(levels.dtype).repeat_interleave(block, 1)[:, :cols]
        levels, scale = levels * signs, torch.where(scale == 0, torch.ones_like(scale), scale.abs())
    if not isinstance(config, QuantConfig):
        low, high = min(config[0], int(levels.min())), max(config[1], int(levels.max()))
        config = _with_granularity(grid_of(low, high), scale, block)
    scale = scale.float().expand(n, -1)
    if (found := config.weight.integers()) is None:
        raise ValueError(f"expected a grid of integers, got {config.weight}")
    values, factor = torch.tensor(found[0], dtype=levels.dtype), found[1]
    codes = torch.searchsorted(values, levels.contiguous()).clamp_(max=len(values) - 1)
    if bool((off := values[codes] != levels).any()):
        raise ValueError(f"{config.weight} has no level {int(levels[off][0]) * factor:g}")
    kept = _merged(scale, cols, block, config) / factor
    scale_dtype = None if holds_scales(kept, config.scale_dtype) else torch.float32
    like = kind.of_shape(shape, False, geometry=geometry)
    new = kind.packed.like(like, config=config, trits=trits, dtype=dtype, scale_dtype=scale_dtype)  # takes no memory
    if new.weight_codes.shape[0] != n or new.cols != cols:
        raise ValueError(f"{n} x {cols} integers for a weight of shape {tuple(shape)}")
    new.bias = None
    new.weight_codes = pack_codes(codes.to(torch.uint8), new.bits)
    new.weight_scale = kept.to(new.weight_scale.dtype)
    return new


def _with_granularity(grid: Grid, scale: Tensor, block: int) -> QuantConfig:
    if scale.numel() == 1:
        return QuantConfig(grid, "absmax", "per_tensor")
    if bool((scale == scale[:, :1]).all()):
        return QuantConfig(grid, "absmax")
    return QuantConfig(grid, "absmax", "per_group", block)


def _merged(scale: Tensor, cols: int, block: int, config: QuantConfig) -> Tensor:
    """One of the scales (n, blocks) for each row that the config has; ValueError where those of one row differ."""
    rows = num_rows((len(scale), cols), config.granularity, config.group_size)
    groups = max(1, rows // max(1, len(scale)))
    step = scale.shape[1] if groups == 1 else cols // groups // block
    kept = scale[:, :: max(1, step)]
    if kept.shape[1] != groups or not torch.equal(kept.repeat_interleave(step, 1), scale):
        raise ValueError(f"expected scales {config.granularity} ({config.group_size}), they differ within one")
    if config.granularity == "per_tensor":
        kept = kept[:1] if torch.equal(kept, kept[:1].expand_as(kept)) else kept
    if kept.numel() != rows:
        raise ValueError(f"expected scales {config.granularity}, they differ between rows")
    return kept.reshape(-1)
