"""Scale rules: from a weight's sums (or the weight itself) to one positive scale per row.

Every rule is floored at 1e-12 max(1, max|w|) and never gives 0, NaN, inf or a negative number. A row of zeros gets the
median of the scales of its tensor's other rows, so that it starts among them as soon as it is not zero any more; a row
that holds inf or NaN, and a tensor of zeros, get scale 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import contract, ops
from .grids import Grid

GRANULARITIES = ("per_tensor", "per_channel", "per_group")

# clip = c1 rms(w) - c2 mean|w| by bits (SAWB, Choi et al. 2018)
SAWB_COEFFICIENTS = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80), 5: (17.74, 18.64), 8: (31.76, 35.04)}

_FLOAT32_END = 2.0**128 - 2.0**103  # rounds to inf in float32

# What scales may be rounded to, with the smallest and the largest that they then can be: powers of two are E8M0 of the
# OCP Microscaling Formats (MX) specification 1.0, 2023, but for 2^-127, which is no normal float32.
SCALE_RANGES = {"float32": (0.0, 2.0**128 - 2.0**104), "bfloat16": (2.0**-126, 2.0**128 - 2.0**120),
                "float16": (2.0**-24, 65504.0), "float8_e8m0fnu": (2.0**-126, 2.0**127)}  # fmt: skip


def check_scale_dtype(name: str, value: Any) -> str:
    """The name of a type of scales, which may be given as a torch.dtype. Raises TypeError/ValueError."""
    known = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if not isinstance(known, str) or known not in SCALE_RANGES:
        error = ValueError if isinstance(known, str) else TypeError
        raise error(f"{name}: expected one of {', '.join(SCALE_RANGES)}, got {value!r:.80}")
    return known


def round_scale(scale: Tensor, scale_dtype: str) -> Tensor:
    """The nearest scales that ``scale_dtype`` holds, float32: ties to even, powers of two by the smaller ratio; those
    out of its range become its ends (a scale is never 0 or inf)."""
    if scale_dtype == "float32":
        return scale
    low, high = SCALE_RANGES[scale_dtype]
    scale = scale.clamp(low, high)
    if scale_dtype == "float8_e8m0fnu":
        mantissa, exponent = torch.frexp(scale)  # in [1/2, 1)
        return torch.ldexp(torch.ones_like(scale), exponent - (mantissa < math.sqrt(0.5)).to(exponent.dtype))
    return scale.to(getattr(torch, scale_dtype)).float().clamp(low, high)


def holds_scales(scale: Tensor, scale_dtype: str) -> bool:
    """Whether ``scale_dtype`` holds these scales exactly."""
    return torch.equal(round_scale(scale.float(), scale_dtype), scale.float())


def num_rows(shape: torch.Size | tuple[int, ...], granularity: str, group_size: int | None = None) -> int:
    """How many scales a tensor of this shape has: 1, ``shape[0]`` or ``numel / group_size``; a vector is one row.

    Groups are runs of ``group_size`` weights along the input dimensions of one output channel; ValueError where
    ``group_size`` does not divide them.
    """
    shape = tuple(int(n) for n in shape)  # under torch.jit.trace sizes are tensors
    channels, inputs = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if granularity != "per_group":
        if group_size is not None:
            raise ValueError(f"group_size: only with granularity='per_group', got {group_size} with {granularity!r}")
        return 1 if granularity == "per_tensor" else channels
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size: expected a positive int with granularity='per_group', got {group_size!r}")
    if inputs % group_size:
        raise ValueError(f"group_size: {group_size} does not divide the {inputs} inputs of a weight of shape {shape}")
    return channels * (inputs // group_size)


# The rules below are written over arrays of float64, torch's or (on the CPU, where a dozen small torch operations would
# cost more than the update of a small weight) NumPy's: `xp` is the module. Both are IEEE, so both give the same bits.


def _absmax(xp: Any, sums: Any, cols: Any, grid: Grid, coefficients: tuple[float, float] | None) -> Any:
    return sums[:, contract.MAX_ABS] / grid.c_max


def _sawb(xp: Any, sums: Any, cols: Any, grid: Grid, coefficients: tuple[float, float] | None) -> Any:
    c1, c2 = coefficients or SAWB_COEFFICIENTS[grid.bits]
    clip = c1 * xp.sqrt(sums[:, contract.SUM_SQUARES] / cols) - c2 * sums[:, contract.SUM_ABS] / cols
    return xp.where(clip > 0, clip / grid.c_max, _absmax(xp, sums, cols, grid, None))


def _mean(xp: Any, sums: Any, cols: Any, grid: Grid, coefficients: tuple[float, float] | None) -> Any:
    return grid.mean_factor * sums[:, contract.SUM_ABS] / cols


def _rms(xp: Any, sums: Any, cols: Any, grid: Grid, coefficients: tuple[float, float] | None) -> Any:
    scale = normal_scale(grid.levels) * xp.sqrt(sums[:, contract.SUM_SQUARES] / cols)
    return xp.minimum(scale, _absmax(xp, sums, cols, grid, None))


def normal_scale(levels: tuple[float, ...]) -> float:
    """The scale for normally distributed weights of rms 1: of 77 clipping points the one with the least error."""
    return _normal_scale(levels)


normal_scale._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a number; not to be traced


@functools.lru_cache(maxsize=256)
def _normal_scale(levels: tuple[float, ...]) -> float:
    table, z = np.array(levels), np.linspace(-5.0, 5.0, 501)
    density, middles, top = np.exp(-z * z / 2), (table[1:] + table[:-1]) / 2, float(np.abs(table).max())

    def error(scale: float) -> float:
        return float((density * (z - scale * table[np.searchsorted(middles, z / scale)]) ** 2).sum())

    return min((clip / 16 / top for clip in range(4, 81)), key=error)  # 1/4 to 5 standard deviations


# Rules that need only the row sums, which the update pass leaves behind.
SUM_RULES: dict[str, Callable[..., Any]] = {"absmax": _absmax, "sawb": _sawb, "mean": _mean, "rms": _rms}
RULES = (*SUM_RULES, "mse")


def default_rule(grid: Grid, sawb_coefficients: tuple[float, float] | None = None) -> str:
    """The rule for a grid where none was asked for: the least error among those that cost no pass over the weight.

    Binary and Ternary: mean. Uniform: sawb up to 4 bits, absmax above, where SAWB takes two large numbers from each
    other. Other levels: rms up to 12, absmax above (for heavy tails). With coefficients it is sawb.
    """
    if sawb_coefficients is not None:
        return "sawb"
    if grid.mean_factor is not None:
        return "mean"
    if grid.evenly_spaced:
        return "sawb" if grid.bits <= 4 else "absmax"
    return "rms" if len(grid.levels) <= 12 else "absmax"


def check_coefficients(coefficients: Any) -> tuple[float, float] | None:
    """``sawb_coefficients`` as two finite floats, or None. Raises TypeError/ValueError."""
    if coefficients is None:
        return None
    if isinstance(coefficients, str) or not isinstance(coefficients, Sequence | np.ndarray) or len(coefficients) != 2:
        raise ValueError(f"sawb_coefficients: expected (c1, c2), got {coefficients!r}")
    c1, c2 = (ops.number(f"sawb_coefficients[{i}]", c, -math.inf) for i, c in enumerate(coefficients))
    return c1, c2


def check_rule(rule: Any, grid: Grid, sawb_coefficients: tuple[float, float] | None = None, name: str = "rule") -> None:
    """Raises TypeError/ValueError, naming the argument, where the rule is unknown or has no meaning for the grid."""
    if not isinstance(rule, str) or rule not in RULES:
        error = ValueError if isinstance(rule, str) else TypeError
        raise error(f"{name}: expected one of {', '.join(RULES)}, got {rule!r:.80}")
    check_coefficients(sawb_coefficients)
    if rule == "sawb" and sawb_coefficients is None and not (grid.evenly_spaced and grid.bits in SAWB_COEFFICIENTS):
        what = f"{grid.bits} bits" if grid.evenly_spaced else f"levels that are not evenly spaced, got {grid}"
        raise ValueError(
            f"{name}: sawb has no coefficients for {what} (known: {', '.join(map(str, SAWB_COEFFICIENTS))} bits); give "
            f"sawb_coefficients=(c1, c2) or another rule, such as {default_rule(grid)}"
        )
    if rule == "mean" and grid.mean_factor is None:
        raise ValueError(f"{name}: mean is defined for Binary and Ternary, got {grid}")


class RowTable:
    """Rows of several tensors, one after another: ``rows`` of each; ``places`` is where each stands in a table of
    (tensors, most rows), on the device, int64. Made once, because every copy to a GPU waits for it."""

    def __init__(self, rows: Sequence[int], device: torch.device | str) -> None:
        self.rows, self.most = list(rows), max(rows, default=0)
        places = [np.arange(n) + i * self.most for i, n in enumerate(self.rows)]
        self.places = torch.from_numpy(np.concatenate(places) if places else np.empty(0, np.int64)).to(device)


def scale_from_sums(
    sums: Tensor, cols: int | Tensor, grid: Grid, rule: str, sawb_coefficients: tuple[float, float] | None = None,
    table: RowTable | None = None, scale_dtype: str = "float32",
) -> Tensor:  # fmt: skip
    """Scales (rows,) float32 from row sums (rows, 3) as ``ops.row_sums`` and the update pass give them.

    ``cols``: weights in a row; one number, or (rows,) where the rows come from several tensors, which ``table`` tells
    apart: a row of zeros looks at the other rows of its own tensor.
    """
    if table is None and ops.concrete(sums):
        return torch.from_numpy(scale_in_numpy(sums.numpy(), cols, grid, rule, sawb_coefficients, None, scale_dtype))
    scale, usable = _scale(torch, sums.double(), cols, grid, rule, sawb_coefficients)
    return round_scale(_fill(scale.float(), usable, sums[:, contract.MAX_ABS] == 0, table), scale_dtype)


def scale_in_numpy(
    sums: Any, cols: Any, grid: Grid, rule: str, sawb_coefficients: tuple[float, float] | None, rows: list[int] | None,
    scale_dtype: str = "float32",
) -> Any:  # fmt: skip
    """``scale_from_sums`` of arrays; ``rows`` of each tensor where there are several."""
    exact = sums.astype(np.float64)
    with np.errstate(all="ignore"):
        scale, usable = _scale(np, exact, cols, grid, rule, sawb_coefficients)
        found = _fill_numpy(scale.astype(np.float32), usable, exact[:, contract.MAX_ABS] == 0, rows)
    return found if scale_dtype == "float32" else round_scale(torch.from_numpy(found), scale_dtype).numpy()


def _scale(xp: Any, sums: Any, cols: Any, grid: Grid, rule: str, coefficients: tuple[float, float] | None) -> Any:
    scale = SUM_RULES[rule](xp, sums, cols, grid, coefficients)
    # a sum may overflow where max|w| does not
    scale = xp.where(xp.isfinite(scale), scale, _absmax(xp, sums, cols, grid, None))
    return _guarded(xp, scale, sums[:, contract.MAX_ABS])


def _guarded(xp: Any, scale: Any, amax: Any) -> tuple[Any, Any]:
    """Not below the floor; 1, and not usable, where the row is zero or not finite, or no float32 holds it."""
    scale = xp.maximum(scale, contract.SCALE_FLOOR * xp.clip(amax, 1.0, None))
    usable = (amax > 0) & xp.isfinite(amax) & (scale > 0) & (scale < _FLOAT32_END)
    return xp.where(usable, scale, xp.ones_like(scale)), usable


# Rows of zeros take the lower median of their tensor's usable scales: one of them, so the same bits everywhere.


def _fill_numpy(scale: Any, usable: Any, zero: Any, rows: list[int] | None) -> Any:
    if zero.any():
        ends = np.cumsum([len(scale)] if rows is None else rows)[:-1]
        for part, used, empty in zip(*(np.split(a, ends) for a in (scale, usable, zero)), strict=True):
            if used.any():
                part[empty] = np.sort(part[used])[(np.count_nonzero(used) - 1) // 2]
    return scale


def _fill(scale: Tensor, usable: Tensor, zero: Tensor, table: RowTable | None) -> Tensor:
    """Without a table the last dimension of ``scale`` is the rows of one tensor."""
    known = torch.where(usable, scale, torch.full_like(scale, math.nan))
    if table is None:
        median = known.nanmedian(-1, keepdim=True).values.expand_as(known) if known.shape[-1] else known
    else:
        each = known.new_full((len(table.rows), table.most), math.nan)
        each.view(-1)[table.places] = known
        median = each.nanmedian(1, keepdim=True).values.expand_as(each).reshape(-1)[table.places]
    return torch.where(zero & ~median.isnan(), median, scale)


def _mse(w: Tensor, grid: Grid, rows: int, scale_dtype: str) -> Tensor:
    """Per row the best of s_j = (j / 100) max|w| / c_max, j = 1 … 100, rounded; of equals the smallest."""
    matrix = w.reshape(rows, -1).float()
    amax = ops.row_sums(w, rows)[:, contract.MAX_ABS].double()
    guarded, usable = _guarded(torch, amax / grid.c_max, amax)
    top = guarded.float()
    best, chosen = torch.full_like(amax, math.inf), round_scale(top, scale_dtype)
    for j in range(1, 101):
        scale = round_scale(_guarded(torch, top.double() * (j / 100), amax)[0].float(), scale_dtype)
        error = (matrix - ops.fake_quantize(matrix, scale, grid)).square_().sum(1, dtype=torch.float64)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return _fill(chosen, usable, amax == 0, None)


@torch.no_grad()
def activation_scales(x: Tensor, c_maxes: Sequence[float], rows: int) -> Tensor:
    """(len(c_maxes), rows) float32: max|x| / c_max of each row of ``x``; 1 where that is 0.

    NaN for a row that holds inf or NaN: its quantized values, and the loss, are not finite then either. Nothing waits
    for the device. ``rows``: tokens or images.
    """
    flat = x.detach().reshape(rows, x.numel() // rows if rows else 0)
    if flat.numel() == 0:
        return torch.ones(len(c_maxes), rows, dtype=torch.float32, device=x.device)
    tops = flat.abs().amax(1).float()
    tops = torch.where(tops.isfinite(), tops, torch.full_like(tops, math.nan))
    scales = torch.stack([tops / c for c in c_maxes])
    return torch.where(scales == 0, torch.ones_like(scales), scales)


@torch.no_grad()
def compute_scale(
    w: Tensor, grid: Grid, rule: str | None = None, granularity: str = "per_channel", group_size: int | None = None,
    sawb_coefficients: tuple[float, float] | None = None, scale_dtype: str | torch.dtype = "float32",
) -> Tensor:  # fmt: skip
    """One positive scale per row of ``w``: float32, shape (rows,), on ``w``'s device.

    ===========  ====================================================================================================
    ``absmax``   max|w| / c_max
    ``sawb``     (c1 rms(w) - c2 mean|w|) / c_max with (c1, c2) by bits or ``sawb_coefficients``; absmax where <= 0
    ``mean``     mean|w| (Binary), 1.5 mean|w| (Ternary)
    ``rms``      k rms(w), k the best for normally distributed weights on this grid; absmax where that is smaller
    ``mse``      of 100 candidates the one that minimises the squared quantization error
    None         ``default_rule(grid)``
    ===========  ====================================================================================================

    ``granularity``: per_tensor, per_channel (dim 0; a vector is one row) or per_group (``group_size`` weights along the
    inputs). A row of zeros gets the median of the other rows' scales. ``scale_dtype``: they are rounded to what it
    holds (``round_scale``).
    Raises ValueError/TypeError for an unknown rule, granularity or a width without SAWB coefficients.
    """
    scale_dtype = check_scale_dtype("scale_dtype", scale_dtype)
    ops.check_float_tensor("w", w)
    ops.check_grid(grid)
    rule = default_rule(grid, sawb_coefficients) if rule is None else rule
    check_rule(rule, grid, sawb_coefficients)
    rows = num_rows(w.shape, granularity, group_size)
    if w.numel() == 0:
        return torch.ones(rows, dtype=torch.float32, device=w.device)
    w = w.detach().contiguous()
    if rule == "mse":
        return _mse(w, grid, rows, scale_dtype)
    sums, cols = ops.row_sums(w, rows), w.numel() // rows
    return scale_from_sums(sums, cols, grid, rule, sawb_coefficients, scale_dtype=scale_dtype)
