"""Scale rules: from a weight's sums (or the weight itself) to one positive scale per row.

Every rule is floored at 1e-12 max(1, max|w|) and never gives 0, NaN, inf or a negative number. A row of zeros gets the
median of the scales of its tensor's other rows, so that it starts among them as soon as it is not zero any more; a row
that holds inf or NaN, and a tensor of zeros, get scale 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import contract, ops, reference
from .grids import Grid, Midrise

GRANULARITIES = ("per_tensor", "per_channel", "per_group")

# clip = c1 rms(w) - c2 mean|w| by bits (SAWB, Choi et al. 2018)
SAWB_COEFFICIENTS = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80), 5: (17.74, 18.64), 8: (31.76, 35.04)}


def check_scale_dtype(name: str, value: Any) -> str:
    """The name of a type of scales, which may be given as a torch.dtype. Raises TypeError/ValueError."""
    known = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if not isinstance(known, str) or known not in contract.SCALE_TYPES:
        error = ValueError if isinstance(known, str) else TypeError
        raise error(f"{name}: expected one of {', '.join(contract.SCALE_TYPES)}, got {value!r:.80}")
    return known


def round_scale(scale: Tensor, scale_dtype: str) -> Tensor:
    """The nearest scales that ``scale_dtype`` holds, float32: ties to even, powers of two by the smaller ratio; those
    out of its range become its ends (a scale is never 0 or inf). ``scale``: all of a tensor's (rows,), which share a
    unit where it is float8_e4m3fn (``scale_unit``)."""
    return reference.round_scale(scale, contract.SCALE_TYPES.index(scale_dtype))


def scale_unit(scale: Tensor) -> Tensor:
    """(1,) float32: the unit t = 2^k of a tensor's scales (rows,) of the type float8_e4m3fn, which are t times an E4M3
    number: the least that lets all of them be at most 448 t. It follows from the scales, so nothing else is kept."""
    return reference.scale_unit(scale.detach().float().reshape(-1))


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


LEARNED = "lsq"  # the rule that only says where a scale starts, which is learned from then on
# Rules that need only the row sums, which the update pass leaves behind.
SUM_RULES = {
    "absmax": contract.ABSMAX, "sawb": contract.SAWB, "mean": contract.MEAN, "rms": contract.RMS,
    LEARNED: contract.MEAN, "ocp": contract.ABSMAX,
}  # fmt: skip
TYPED_RULES = {"ocp": "float8_e8m0fnu"}  # those that give scales of one type only
#: Names of the rules that give a scale from a weight.
RULES = (*(rule for rule in SUM_RULES if rule not in TYPED_RULES), "mse")
SMALLEST_SHARE = 1e-3  # of the scale that a learned one started from: below it, it is moved back


def bounded_scale(learned: Tensor, start: Tensor) -> Tensor:
    """Learned scales as they may be used: at least ``SMALLEST_SHARE`` of those that they started from, which take the
    place of what is not finite."""
    finite = torch.where(learned - learned == 0, learned, start)
    return torch.maximum(finite, start * SMALLEST_SHARE)


def default_rule(grid: Grid, sawb_coefficients: tuple[float, float] | None = None) -> str:
    """The rule for a grid where none was asked for: the least error among those that cost no pass over the weight.

    Binary and Ternary: mean. Uniform: sawb up to 4 bits, absmax above, where SAWB takes two large numbers from each
    other. Midrise: rms. Other levels: rms up to 12, absmax above (for heavy tails). With coefficients it is sawb.
    """
    if sawb_coefficients is not None:
        return "sawb"
    if grid.mean_factor is not None:
        return "mean"
    if grid.evenly_spaced:
        return "sawb" if grid.bits <= 4 else "absmax"
    return "rms" if len(grid.levels) <= 12 or isinstance(grid, Midrise) else "absmax"


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
    if not isinstance(rule, str) or rule not in (*RULES, *TYPED_RULES):
        error = ValueError if isinstance(rule, str) else TypeError
        raise error(f"{name}: expected one of {', '.join((*RULES, *TYPED_RULES))}, got {rule!r:.80}")
    check_coefficients(sawb_coefficients)
    if rule == "sawb" and sawb_coefficients is None and not (grid.evenly_spaced and grid.bits in SAWB_COEFFICIENTS):
        what = f"{grid.bits} bits" if grid.evenly_spaced else f"levels that are not evenly spaced, got {grid}"
        raise ValueError(
            f"{name}: sawb has no coefficients for {what} (known: {', '.join(map(str, SAWB_COEFFICIENTS))} bits); give "
            f"sawb_coefficients=(c1, c2) or another rule, such as {default_rule(grid)}"
        )
    if rule == "mean" and grid.mean_factor is None:
        raise ValueError(f"{name}: mean is defined for Binary and Ternary, got {grid}")


def check_rule_type(rule: str, scale_dtype: str, name: str = "rule") -> None:
    """Raises ValueError where the rule gives scales of another type."""
    if (wanted := TYPED_RULES.get(rule, scale_dtype)) != scale_dtype:
        raise ValueError(
            f"{name}: {rule} gives scales of {wanted}, expected scale_dtype={wanted!r}, got {scale_dtype!r}"
        )


class RuleCode(NamedTuple):
    """A rule on a grid as the operators take it: [rule, type of the scales], [c_max, two factors]."""

    rule: list[int]
    numbers: list[float]


def rule_code(
    grid: Grid, rule: str, sawb_coefficients: tuple[float, float] | None = None, scale_dtype: str = "float32"
) -> RuleCode:
    """``rule``: of ``SUM_RULES``; "mse": what is left to do once its scales are found."""
    first, second, c_max = 0.0, 0.0, grid.c_max
    if rule == "sawb":
        first, second = sawb_coefficients or SAWB_COEFFICIENTS[grid.bits]
    elif rule == "mean":
        first = grid.mean_factor or 0.0
    elif rule == "rms":
        first = normal_scale(grid.levels)
    elif rule == LEARNED:
        first = 2 / math.sqrt(grid.c_max)
    elif rule == "ocp":  # absmax whose nearest power of two, by ratio, is the one that the specification says
        c_max = 2.0 ** math.floor(math.log2(c_max)) * math.sqrt(2)
    code = [SUM_RULES.get(rule, contract.GIVEN), contract.SCALE_TYPES.index(scale_dtype)]
    return RuleCode(code, [c_max, first, second])


def scale_from_sums(
    sums: Tensor, cols: int, grid: Grid, rule: str, sawb_coefficients: tuple[float, float] | None = None,
    scale_dtype: str = "float32", given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scales (rows,) float32 of a tensor from its row sums (rows, 3) as ``ops.row_sums`` and the update pass give them.

    ``cols``: weights in a row; ``given``: the scales of the rule "mse", whose rows of zeros are left.
    """
    code = rule_code(grid, rule, sawb_coefficients, scale_dtype)
    if not ops.eager(sums):
        (kind, place), (c_max, first, second) = code
        return reference.rule_scales(sums, kind, place, cols, c_max, first, second, given)
    scale = given if given is not None else sums.new_empty(sums.shape[:1])
    ops.run_scales_from_sums([scale], [sums], [*code.rule, cols], code.numbers)
    return scale


@torch.no_grad()
def activation_scales(x: Tensor, c_maxes: Sequence[float], rows: int) -> Tensor:
    """(len(c_maxes), rows) float32: max|x| / c_max of each row of ``x``; 1 where that is 0.

    NaN for a row that holds inf or NaN: its quantized values, and the loss, are not finite then either. Nothing waits
    for the device. ``rows``: tokens or images.
    """
    return scales_of_tops(row_tops(x, rows), c_maxes)


@torch.no_grad()
def row_tops(x: Tensor, rows: int) -> Tensor:
    """(rows,) float32: max|x| of each row; 0 where there is nothing, inf for a row that holds inf or NaN."""
    flat = x.detach().reshape(rows, x.numel() // rows if rows else 0)
    if flat.numel() == 0:
        return torch.zeros(rows, dtype=torch.float32, device=x.device)
    tops = flat.abs().amax(1).float()
    return torch.where(tops.isfinite(), tops, torch.full_like(tops, math.inf))


def scales_of_tops(tops: Tensor, c_maxes: Sequence[float]) -> Tensor:
    """``activation_scales`` of rows with these largest magnitudes."""
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
    ``lsq``      2 mean|w| / sqrt(c_max): what a learned scale starts from (Esser et al., LSQ, ICLR 2020)
    ``mse``      of 100 candidates the one that minimises the squared quantization error
    ``ocp``      2^(floor(log2 max|w|) - floor(log2 c_max)), for powers of two only: OCP MX specification 1.0, 6.3
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
    check_rule_type(rule, scale_dtype)
    rows = num_rows(w.shape, granularity, group_size)
    if w.numel() == 0:
        return torch.ones(rows, dtype=torch.float32, device=w.device)
    w = w.detach().contiguous()
    sums, cols, given = ops.row_sums(w, rows), w.numel() // rows, None
    if rule == "mse":
        place = contract.SCALE_TYPES.index(scale_dtype)
        given = ops.run_mse_scales(w, sums, grid.levels_tensor(w.device), grid.encoding, grid.c_max, place)
    return scale_from_sums(sums, cols, grid, rule, sawb_coefficients, scale_dtype, given)
