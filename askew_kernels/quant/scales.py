"""Scale rules: from a weight's sums (or the weight itself) to one positive scale per row.

Every rule is floored at 1e-12 max(1, max|w|) and never gives 0, NaN, inf or a negative number; a row of zeros, and a
row that holds inf or NaN, gets scale 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops, reference
from .grids import Binary, Grid, Ternary

GRANULARITIES = ("per_tensor", "per_channel", "per_group")

# clip = c1 rms(w) - c2 mean|w| by bits (SAWB, Choi et al. 2018)
SAWB_COEFFICIENTS = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80), 5: (17.74, 18.64), 8: (31.76, 35.04)}

_FLOAT32_END = 2.0**128 - 2.0**103  # rounds to inf in float32


def num_rows(shape: torch.Size | tuple[int, ...], granularity: str, group_size: int | None = None) -> int:
    """How many scales a tensor of this shape has: 1, ``shape[0]`` or ``numel / group_size``.

    Groups are runs of ``group_size`` weights along the input dimensions of one output channel; ValueError where
    ``group_size`` does not divide them.
    """
    shape = tuple(shape)
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if granularity != "per_group":
        if group_size is not None:
            raise ValueError(f"group_size: only with granularity='per_group', got {group_size} with {granularity!r}")
        return 1 if granularity == "per_tensor" or not shape else shape[0]
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size: expected a positive int with granularity='per_group', got {group_size!r}")
    inputs = 1
    for n in shape[1:] if len(shape) > 1 else shape:
        inputs *= n
    if inputs % group_size:
        raise ValueError(f"group_size: {group_size} does not divide the {inputs} inputs of a weight of shape {shape}")
    return (shape[0] if len(shape) > 1 else 1) * (inputs // group_size)


# The rules below are written over arrays of float64, torch's or (on the CPU, where a dozen small torch operations would
# cost more than the update of a small weight) NumPy's: `xp` is the module. Both are IEEE, so both give the same bits.


def _absmax(xp: Any, sums: Any, cols: Any, grid: Grid, coefficients: tuple[float, float] | None) -> Any:
    return sums[:, reference.MAX_ABS] / grid.c_max


def _sawb(xp: Any, sums: Any, cols: Any, grid: Grid, coefficients: tuple[float, float] | None) -> Any:
    c1, c2 = coefficients if coefficients is not None else SAWB_COEFFICIENTS[grid.bits]
    clip = c1 * xp.sqrt(sums[:, reference.SUM_SQUARES] / cols) - c2 * sums[:, reference.SUM_ABS] / cols
    return xp.where(clip > 0, clip / grid.c_max, _absmax(xp, sums, cols, grid, None))


def _mean(xp: Any, sums: Any, cols: Any, grid: Grid, coefficients: tuple[float, float] | None) -> Any:
    return (1.0 if isinstance(grid, Binary) else 1.5) * sums[:, reference.SUM_ABS] / cols


# Rules that need only the row sums, which the update pass leaves behind.
SUM_RULES: dict[str, Callable[[Any, Any, Any, Grid, tuple[float, float] | None], Any]] = {
    "absmax": _absmax,
    "sawb": _sawb,
    "mean": _mean,
}
RULES = (*SUM_RULES, "mse")


def check_rule(rule: str, grid: Grid, sawb_coefficients: tuple[float, float] | None = None) -> None:
    """Raises ValueError where the rule is unknown or has no meaning for the grid."""
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if rule == "sawb" and sawb_coefficients is None and grid.bits not in SAWB_COEFFICIENTS:
        raise ValueError(
            f"rule: sawb has no coefficients for {grid.bits} bits (known: {', '.join(map(str, SAWB_COEFFICIENTS))}); "
            "give sawb_coefficients=(c1, c2) or another rule"
        )
    if sawb_coefficients is not None and len(sawb_coefficients) != 2:
        raise ValueError(f"sawb_coefficients: expected (c1, c2), got {sawb_coefficients!r}")
    if rule == "mean" and not isinstance(grid, (Binary, Ternary)):
        raise ValueError(f"rule: mean is defined for Binary and Ternary, got {grid}")


def scale_from_sums(
    sums: Tensor, cols: int | Tensor, grid: Grid, rule: str, sawb_coefficients: tuple[float, float] | None = None
) -> Tensor:
    """Scales (rows,) float32 from row sums (rows, 3) as ``ops.row_sums`` and the update pass give them.

    ``cols``: weights in a row; one number, or (rows,) where the rows come from several tensors.
    """
    if type(sums) is Tensor and sums.device.type == "cpu" and not torch.compiler.is_compiling():
        exact, per_row = sums.numpy().astype(np.float64), cols if isinstance(cols, int) else cols.numpy()
        with np.errstate(all="ignore"):
            return torch.from_numpy(_scale(np, exact, per_row, grid, rule, sawb_coefficients).astype(np.float32))
    return _scale(torch, sums.double(), cols, grid, rule, sawb_coefficients).float()


def _scale(xp: Any, sums: Any, cols: Any, grid: Grid, rule: str, coefficients: tuple[float, float] | None) -> Any:
    scale = SUM_RULES[rule](xp, sums, cols, grid, coefficients)
    # a sum may overflow where max|w| does not
    scale = xp.where(xp.isfinite(scale), scale, _absmax(xp, sums, cols, grid, None))
    return _guarded(xp, scale, sums[:, reference.MAX_ABS])


def _guarded(xp: Any, scale: Any, amax: Any) -> Any:
    """Not below 1e-12 max(1, amax); 1 where the row is zero or not finite, or float32 cannot hold the scale."""
    scale = xp.maximum(scale, 1e-12 * xp.clip(amax, 1.0, None))
    usable = (amax > 0) & xp.isfinite(amax) & (scale > 0) & (scale < _FLOAT32_END)
    return xp.where(usable, scale, xp.ones_like(scale))


def _mse(w: Tensor, grid: Grid, rows: int) -> Tensor:
    """Per row the best of s_j = (j / 100) max|w| / c_max, j = 1 … 100; of equals the smallest."""
    matrix = w.reshape(rows, -1)
    amax = ops.row_sums(matrix, rows)[:, reference.MAX_ABS].double()
    top = _guarded(torch, amax / grid.c_max, amax).float()
    best = torch.full((rows,), float("inf"), dtype=torch.float64, device=w.device)
    chosen = top.clone()
    for j in range(1, 101):
        scale = _guarded(torch, top.double() * (j / 100), amax).float()
        error = (matrix.float() - ops.fake_quantize(matrix.float(), scale, grid)).square_().sum(1, dtype=torch.float64)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen


@torch.no_grad()
def activation_scales(x: Tensor, c_maxes: Sequence[float], rows: int) -> Tensor:
    """(len(c_maxes), rows) float32: max|x| / c_max of each row of ``x``; 1 where that is 0, inf or NaN.

    Nothing waits for the device. ``rows``: tokens or images.
    """
    flat = x.detach().reshape(rows, x.numel() // rows if rows else 0)
    if flat.numel() == 0:
        return torch.ones(len(c_maxes), rows, device=x.device)
    tops = flat.abs().amax(1).float()
    scales = torch.stack([tops / c for c in c_maxes])
    return torch.where((scales > 0) & scales.isfinite(), scales, torch.ones_like(scales))


@torch.no_grad()
def compute_scale(
    w: Tensor,
    grid: Grid,
    rule: str = "sawb",
    granularity: str = "per_channel",
    group_size: int | None = None,
    sawb_coefficients: tuple[float, float] | None = None,
) -> Tensor:
    """One positive scale per row of ``w``: float32, shape (rows,), on ``w``'s device.

    ===========  ====================================================================================================
    ``absmax``   max|w| / c_max
    ``sawb``     (c1 rms(w) - c2 mean|w|) / c_max with (c1, c2) by bits or ``sawb_coefficients``; absmax where <= 0
    ``mean``     mean|w| (Binary), 1.5 mean|w| (Ternary)
    ``mse``      of 100 candidates the one that minimises the squared quantization error
    ===========  ====================================================================================================

    ``granularity``: per_tensor, per_channel (dim 0) or per_group (``group_size`` weights along the inputs).
    Raises ValueError/TypeError for an unknown rule, granularity or a width without SAWB coefficients.
    """
    ops.check_float_tensor("w", w)
    ops.check_grid(grid)
    check_rule(rule, grid, sawb_coefficients)
    rows = num_rows(w.shape, granularity, group_size)
    if w.numel() == 0:
        return torch.ones(rows, device=w.device)
    w = w.detach().contiguous()
    if rule == "mse":
        return _mse(w, grid, rows)
    return scale_from_sums(ops.row_sums(w, rows), w.numel() // rows, grid, rule, sawb_coefficients)
