"""docs/mathematics.md in plain PyTorch: the oracle of every test, and the implementation where nothing is compiled.

Each function has the name and the arguments of the operator that it defines (see ``ops/schema.py``). Arithmetic is
float64 for float64 inputs and float32 for everything else, with the operations in the same order as ``csrc/math``,
so that quantized codes agree exactly with every backend. Nothing here is written for speed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import contract
from .contract import (
    BINARY,
    CODEBOOK,
    FLOAT,
    INT8_TOP,
    LEVEL_TYPES,
    TILE_ROWS,
    TRIT_TOP,
    TRITS,
    UNIFORM,
    band_codes,
    compute_dtype,
    level_step,
    level_table,
    pack_codes,
    unband_codes,
    unpack_codes,
    untile_codes,
)  # fmt: skip


def _rows(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as (rows, cols) and ``scale`` as (rows, 1), both in the compute dtype."""
    dtype = compute_dtype(x.dtype)
    rows = scale.numel()
    matrix = x.detach().reshape(rows, x.numel() // max(rows, 1))
    return matrix.to(dtype), scale.detach().to(dtype).reshape(-1, 1)


# ---- grids, in grid units (x = w / s) ---------------------------------------------------------------------------


def hull(levels: Tensor, grid: list[int]) -> tuple[Any, Any]:
    """Lowest and highest level: numbers, or a codebook's 0-dim tensors."""
    kind, lo, hi = grid
    return (levels[0], levels[-1]) if kind == CODEBOOK else (float(lo), float(hi))


def nearest(x: Tensor, levels: Tensor, grid: list[int]) -> Tensor:
    """Q(x): nearest level; ties to even (uniform) or to the lower level (binary, codebook); NaN stays NaN."""
    kind = grid[0]
    if kind == UNIFORM:
        return torch.round(x.clamp(*hull(levels, grid))) + 0.0  # + 0.0: no level is -0
    if kind == BINARY:
        return torch.where(x > 0, 1.0, torch.where(x == x, -1.0, x))
    table = levels.to(device=x.device, dtype=x.dtype)
    middles = 0.5 * table[:-1] + 0.5 * table[1:]
    return torch.where(x == x, table[torch.bucketize(x.contiguous(), middles)], x)


def nearest_levels(w: Tensor, scale: Tensor, levels: Tensor, grid: list[int]) -> Tensor:
    """(rows, cols) Q(w / s)."""
    matrix, s = _rows(w, scale)
    return nearest(matrix / s, levels, grid)


def place(x: Tensor, levels: Tensor, grid: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where x, moved into the hull, stands in its bracket: (nearest level, u, side, bracket length).

    u in [0, 1/2] is the distance to the nearest level over the bracket length; side is the direction towards that
    level, +1 or -1. An exact midpoint belongs to the lower level.
    """
    kind, c, near = grid[0], x.clamp(*hull(levels, grid)), nearest(x, levels, grid)
    d, delta = c - near, torch.full_like(x, contract.level_step(kind))
    if kind == UNIFORM:
        up = (d == -0.5).to(x.dtype)  # the tie that was rounded up
        near, d = near - up, d + up
    elif kind == CODEBOOK:
        table = levels.to(device=x.device, dtype=x.dtype)
        below = torch.bucketize(c.contiguous(), table, right=True).sub_(1).clamp_(0, len(table) - 2)
        delta = table[below + 1] - table[below]
    return near, (d.abs() / delta).clamp(max=0.5), 1 - 2 * (d > 0).to(x.dtype), delta


def clamp_hull(w: Tensor, scale: Tensor, levels: Tensor, grid: list[int]) -> Tensor:
    lo, hi = hull(levels, grid)
    w = torch.where(w < scale * lo, scale * lo, w)
    return torch.where(w > scale * hi, scale * hi, w)


# ---- fake quantization --------------------------------------------------------------------------------------------


def philox_uniform(seed: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Philox4x32-10: ``count`` uniforms in [0, 1), element i from word i % 4 of block i // 4 with key ``seed``."""
    mask, blocks = 0xFFFFFFFF, (count + 3) // 4
    index = torch.arange(blocks, dtype=torch.int64, device=device)
    c0, c1 = index & mask, index >> 32
    c2, c3 = torch.zeros_like(index), torch.zeros_like(index)
    k0, k1 = seed & mask, (seed >> 32) & mask

    def wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # 32 x 32 -> (high, low), in 16-bit halves
        a0, a1, b0, b1 = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
        low, mid1, mid2, high = b0 * a0, b1 * a0, b0 * a1, b1 * a1
        carry = (low >> 16) + (mid1 & 0xFFFF) + (mid2 & 0xFFFF)
        return high + (mid1 >> 16) + (mid2 >> 16) + (carry >> 16), ((carry & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(10):
        h0, l0 = wide_product(0xD2511F53, c0)
        h1, l1 = wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    words = torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)[:count]
    return (words >> 8).to(torch.float32) * 2.0**-24


def fake_quantize(
    x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], ste_clip: bool, stochastic: bool, seed: int
) -> Tensor:
    """y = s Q(x / s), or with ``stochastic`` a level of x's bracket such that E[y] = x inside the hull."""
    w, s = _rows(x, scale)
    if stochastic:
        near, u, side, delta = place(w / s, levels, grid)
        uniform = philox_uniform(seed, w.numel(), w.device).reshape(w.shape)
        level = torch.where(uniform < u, near - side * delta, near)
    else:
        level = nearest(w / s, levels, grid)
    return (s * level).to(x.dtype).reshape(x.shape)


def write_copy(out: Tensor, scale: Tensor, level: Tensor) -> None:
    """out = s c, or c in a type of levels, int8 having 0 in NaN's place."""
    if out.dtype == torch.int8:
        level = level.nan_to_num(nan=0.0)
    out.copy_((level if out.dtype in LEVEL_TYPES else scale * level).reshape(out.shape))


def fake_quantize_out_(x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], out: Tensor) -> None:
    """out = s Q(x / s), in the storage type of ``out``; Q(x / s) where that is a type of levels."""
    w, s = _rows(x, scale)
    write_copy(out, s, nearest(w / s, levels, grid))


def _inside(x: Tensor, scale: Tensor, levels: Tensor, grid: list[int]) -> Tensor:
    """In weight units, the ends rounded to x's storage type: where clamped weights stand exactly. NaN is inside."""
    w, s = _rows(x, scale)
    lo, hi = (((s * c).to(x.dtype)).to(w.dtype) for c in hull(levels, grid))
    return ~((w < lo) | (w > hi))


def fake_quantize_backward(grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, grid: list[int]) -> Tensor:
    """grad inside the hull (ends included), 0 outside."""
    inside = _inside(x, scale, levels, grid)
    return torch.where(inside.reshape(grad.shape), grad, torch.zeros_like(grad))


def ste_clip_(grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, grid: list[int]) -> None:
    grad.copy_(fake_quantize_backward(grad, x, scale, levels, grid))


def ste_clip_scale_grad_(
    grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], ste_clip: bool, factor: float
) -> Tensor:
    """The scale's gradient, ``factor`` times sums over the rows of grad (Q(x) - x) inside the hull and grad c_end
    outside, with x / s for x; grad then becomes 0 outside where ``ste_clip``."""
    (g, s), (w, _) = _rows(grad, scale), _rows(x, scale)
    placed, inside = clamp_hull(w, s, levels, grid) / s, _inside(x, scale, levels, grid)
    q = nearest(placed, levels, grid)
    sums = (g * torch.where(inside, q - placed, q)).double().sum(1)
    if ste_clip:
        ste_clip_(grad, x, scale, levels, grid)
    return (factor * sums).to(scale.dtype)


def _candidates(x: Tensor, scales: Tensor, grids: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """(scale, x / s in the hull, Q(x / s), inside, top level) of each candidate, (rows, cols)."""
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    for k, scale in enumerate(scales):
        grid = grids[3 * k : 3 * k + 3]
        w, s = _rows(x, scale)
        if grid[0] == FLOAT:
            yield torch.ones_like(s), w, w, torch.ones_like(w, dtype=torch.bool), 1.0
        else:
            placed = clamp_hull(w, s, none, grid) / s
            yield s, placed, nearest(placed, none, grid), _inside(x, scale, none, grid), float(max(grid[2], 1))


def mix_fake_quantize(
    x: Tensor, scales: Tensor, strengths: Tensor, grids: list[int], ste_clip: bool, learned: bool
) -> Tensor:
    """y = sum_k p_k s_k Q_k(x / s_k), added up in the order of the candidates; see ``ops.mix_fake_quantize``."""
    candidates = zip(strengths.to(compute_dtype(x.dtype)), _candidates(x, scales, grids), strict=True)
    y = functools.reduce(torch.add, (p * (s * q) for p, (s, _, q, *_) in candidates))
    return y.to(x.dtype).reshape(x.shape)


def mix_fake_quantize_backward(
    grad: Tensor, x: Tensor, scales: Tensor, strengths: Tensor, grids: list[int], ste_clip: bool, learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, strengths and scales (zeros unless ``learned``)."""
    g, _ = _rows(grad, scales[0])
    gate = torch.zeros_like(g)
    to_strengths, to_scales = torch.zeros_like(strengths), torch.zeros_like(scales)
    for k, (s, placed, q, inside, top) in enumerate(_candidates(x, scales, grids)):
        p = strengths[k].to(g.dtype)
        gate = gate + (torch.where(inside, p, 0.0) if ste_clip else p)
        to_strengths[k] = (s.double() * (g * q).double().sum(1, keepdim=True)).sum()
        if learned and grids[3 * k] != FLOAT and x.numel():
            sums = (g * torch.where(inside, q - placed, q)).double().sum(1)
            to_scales[k] = p.double() * sums / math.sqrt(g.shape[1] * top)
    return (g * gate).to(x.dtype).reshape(x.shape), to_strengths, to_scales


# ---- the interval constraint ----------------------------------------------------------------------------------------


def _sqrt(t: Tensor) -> Tensor:  # torch's own of float32 (MKL's) is not always correctly rounded
    return t.double().sqrt().to(t.dtype)


def feasible_radius(eps: Tensor) -> Tensor:
    """r / Delta = (1 - sqrt(1 - sqrt(eps))) / 2, without its cancellation; every operation rounded to eps's type."""
    q = _sqrt(eps)
    return 0.5 * q / (1 + _sqrt(1 - q))


def constraint(u: Tensor, eps: float) -> Tensor:
    """h = eps - 16 u^2 (1 - u)^2."""
    q = u - u * u
    return -16 * (q * q - eps / 16)


def project_interval_(w: Tensor, scale: Tensor, levels: Tensor, grid: list[int], eps: Tensor) -> None:
    """Clamp to the hull, then to the nearest feasible point; an exact midpoint goes to the lower side."""
    v, s = _rows(w, scale)
    radius = feasible_radius(eps.to(v.dtype)).to(v.device)
    v = clamp_hull(v, s, levels, grid)
    near, u, side, delta = place(v / s, levels, grid)
    w.copy_(torch.where(u > radius, s * (near - side * (radius * delta)), v).reshape(w.shape))


def soft_quantize(x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], slack: Tensor) -> Tensor:
    """Between x (slack 1) and s Q(x/s) (slack 0); see ``ops.soft_quantize``."""
    w, s = _rows(x, scale)
    slack = slack.to(w.device, w.dtype)
    placed = clamp_hull(w, s, levels, grid)
    near, u, side, delta = place(placed / s, levels, grid)
    over = torch.clamp(u - 0.5 * (1 - slack), min=0)
    y = s * (near - side * ((1 / slack) * over * delta)) + slack * (w - placed)
    return y.to(x.dtype).reshape(x.shape)


def skew_velocity(
    d: Tensor, w: Tensor, s: Tensor, levels: Tensor, grid: list[int], lr: float, eps: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """The direction nearest to d with h' v >= -alpha h wherever h < 0, and h.

    Where in its bracket w stands is taken from w (1/s), within two units in the last place of w / s, as in the kernels.
    """
    _, u, side, delta = place(clamp_hull(w, s, levels, grid) * (1 / s), levels, grid)
    h = constraint(u, eps)
    length = s * delta
    alpha4 = torch.tensor(alpha, dtype=w.dtype, device=w.device) / 4
    rate = lr if lr > contract.LEAST_RATE else contract.LEAST_RATE  # with an infinite cap, lr kappa would be 0 inf
    cap = 1 / (4 * torch.tensor(rate, dtype=w.dtype, device=w.device))
    kappa = (-h / 16) * (length * alpha4) / ((u - u * u) * (0.5 - u))
    kappa = torch.minimum(kappa, length * cap)
    towards = side * d
    skewed = side * torch.where(kappa > towards, kappa, towards)
    return torch.where((h < 0) & (u < 0.5), skewed, d), h


def row_sums(x: Tensor, rows: int) -> Tensor:
    """(rows, 3) float32: sum |x|, sum x^2, max |x| of each row."""
    a = x.detach().reshape(rows, x.numel() // max(rows, 1)).double().abs()
    if a.shape[1] == 0:
        return torch.zeros(rows, contract.NUM_ROW_SUMS, dtype=torch.float32, device=x.device)
    return torch.stack([a.sum(1), (a * a).sum(1), a.amax(1)], dim=1).float()


# ---- scales ----------------------------------------------------------------------------------------------------------

_FLOAT32_END = 2.0**128 - 2.0**103  # rounds to inf in float32


def scale_unit(scale: Tensor) -> Tensor:
    """(…, 1): of the scales (…, rows) of a tensor, the least power of two whose 448-fold none of them exceeds."""
    top = scale.amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(torch.where(top > 0, top, torch.ones_like(top)))  # in [1/2, 1)
    exponent = exponent - 9 + (mantissa > 0.875).to(exponent.dtype)
    return torch.ldexp(torch.ones_like(top), exponent.clamp(*contract.UNIT_EXPONENTS))


def round_scale(scale: Tensor, scale_type: int, unit: Tensor | None = None) -> Tensor:
    """The nearest scales of a type, float32: ties to even, powers of two by the smaller ratio; the type's ends beyond
    its range. E4M3 is in units of the tensor's: ``unit``, or what the scales (…, rows) themselves ask for."""
    name = contract.SCALE_TYPES[scale_type]
    if name == "float32" or not scale.numel():
        return scale
    low, high = contract.SCALE_RANGES[name]
    if name == "float8_e4m3fn":
        unit = scale_unit(scale) if unit is None else unit
        return (scale / unit).clamp(low, high).to(torch.float8_e4m3fn).float() * unit
    scale = scale.clamp(low, high)
    if name == "float8_e8m0fnu":
        mantissa, exponent = torch.frexp(scale)  # in [1/2, 1)
        return torch.ldexp(torch.ones_like(scale), exponent - (mantissa < math.sqrt(0.5)).to(exponent.dtype))
    return scale.to(getattr(torch, name)).float().clamp(low, high)


def _guarded(scale: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """(scales not below the floor; whether they serve): not in a row that is zero or not finite, or whose scale no
    float32 holds."""
    scale = torch.maximum(scale, contract.SCALE_FLOOR * peak.clamp(min=1.0))
    usable = (peak > 0) & peak.isfinite() & (scale > 0) & (scale < _FLOAT32_END)
    return torch.where(usable, scale, torch.ones_like(scale)), usable


def rule_scales(
    sums: Tensor, rule: int, scale_type: int, cols: int, c_max: float, first: float, second: float,
    given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The scales (rows,) of a tensor from its row sums, float32; ``given``: those of rule GIVEN.

    Rows without a scale: zeros take the lower median of the others' scales, the rest 1."""
    sums = sums.double()
    total, squares, peak = (sums[..., i] for i in (contract.SUM_ABS, contract.SUM_SQUARES, contract.MAX_ABS))
    count, highest = torch.full_like(peak, cols), torch.full_like(peak, c_max)  # a GPU multiplies by 1 / number
    top = peak / highest
    scale = top
    if rule == contract.SAWB:
        clip = first * _sqrt(squares / count) - second * total / count
        scale = torch.where(clip > 0, clip / highest, top)
    elif rule == contract.MEAN:
        scale = first * total / count
    elif rule == contract.RMS:
        scale = torch.minimum(first * _sqrt(squares / count), top)
    scale = torch.where(scale.isfinite(), scale, top)  # a sum may overflow where max |w| does not
    guarded, usable = _guarded(scale, peak)
    found = guarded.float() if given is None else torch.where(usable, given, torch.ones_like(given))
    if not peak.shape[-1]:
        return found
    median = torch.where(usable, found, torch.full_like(found, math.nan)).nanmedian(-1, keepdim=True).values
    return round_scale(torch.where((peak == 0) & ~median.isnan(), median, found), scale_type)


def scales_from_sums_(scales: list[Tensor], row_sums: list[Tensor], rules: list[int], numbers: list[float]) -> None:
    for i, (scale, sums) in enumerate(zip(scales, row_sums, strict=True)):
        rule, scale_type, cols = rules[3 * i : 3 * i + 3]
        given = scale if rule == contract.GIVEN else None
        c_max, first, second = numbers[3 * i : 3 * i + 3]
        scale.copy_(rule_scales(sums.reshape(-1, 3), rule, scale_type, cols, c_max, first, second, given))


def _added(terms: Tensor) -> Tensor:
    """The sum over the last dimension but one, one term after the other (on a CPU; a GPU's has an order of its own)."""
    return terms.cumsum(-2)[..., -1, :]


def squared_error(difference: Tensor) -> Tensor:
    """(rows,) float64 sums of squares of (rows, cols) float32, in the order of the kernels: pieces of SUM_COLUMNS, in
    ERROR_LANES lanes, which are added by halves."""
    rows, cols = difference.shape
    lanes, piece = contract.ERROR_LANES, min(contract.SUM_COLUMNS, -(-cols // contract.ERROR_LANES) * 8)
    squares = torch.nn.functional.pad(difference.double().square(), (0, -cols % piece))
    sums = _added(squares.reshape(rows, -1, piece // lanes, lanes))
    while (half := sums.shape[-1] // 2) > 0:
        sums = sums[..., :half] + sums[..., half:]
    return _added(sums)[..., 0]


def mse_scales(w: Tensor, row_sums: Tensor, levels: Tensor, grid: list[int], c_max: float, scale_type: int) -> Tensor:
    """Per row the best of s_j = (j / 100) max|w| / c_max, j = 1 … 100, rounded; of equals the smallest. Powers of two
    may be rounded far down, so that they are tried up to twice that."""
    rows = len(row_sums)
    matrix, peak = w.detach().reshape(rows, w.numel() // max(rows, 1)).float(), row_sums[:, contract.MAX_ABS].double()
    guarded, usable = _guarded(peak / torch.full_like(peak, c_max), peak)
    top = guarded.float().double()
    unit = scale_unit(torch.where(usable, top, torch.zeros_like(top)).float()) if rows else None
    most = 2 if contract.SCALE_TYPES[scale_type] == "float8_e8m0fnu" else 1

    def candidate(j: int) -> Tensor:
        scale = _guarded(top * (j / contract.SCALE_CANDIDATES * most), peak)[0]
        return round_scale(scale.float(), scale_type, unit)

    best, chosen = torch.full_like(peak, math.inf), candidate(contract.SCALE_CANDIDATES)
    if not matrix.numel():
        return chosen
    for j in range(1, contract.SCALE_CANDIDATES + 1):
        scale = candidate(j)
        s = scale[:, None]
        error = squared_error(matrix - s * nearest(matrix / s, levels, grid))
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen


# ---- the update -------------------------------------------------------------------------------------------------


def _present(tensors: list[Tensor] | None, i: int) -> Tensor | None:
    return tensors[i] if tensors and tensors[i].numel() else None


def descend(
    params: list[Tensor], grads: list[Tensor], kept: list[Tensor] | None, firsts: list[Tensor] | None,
    coefficients: Tensor | None, restore: Callable[..., None], average: Callable[..., None],
) -> list[Tensor]:  # fmt: skip
    """A sharpness-aware step starts from the kept weights; returns the gradients, or their mean with the first ones.

    restore, average: ``sam_restore_`` and ``sam_average_`` of an implementation that takes passes of their own for it.
    """
    for name, tensors in (("kept", kept), ("firsts", firsts)):
        if tensors and len(tensors) != len(params):
            raise ValueError(f"{name}: expected 0 or {len(params)} tensors, got {len(tensors)}")
    moved = [(p, k) for p, k in zip(params, kept or [], strict=False) if k.numel()]
    if moved:
        restore([p for p, _ in moved], [k for _, k in moved])
    means = [g.clone() if _present(firsts, i) is not None else g for i, g in enumerate(grads)]
    averaged = [(mean, first) for mean, first in zip(means, firsts or [], strict=False) if first.numel()]
    if averaged:
        average([mean for mean, _ in averaged], [first for _, first in averaged], coefficients)
    return means


def _step(param, g, state, s, levels, grid, outs, base, lr, eps, alpha, direction, clamp_, maximize,
          skip_nonfinite, ste_clip):  # fmt: skip
    """One tensor through one step; ``base`` maps (g, w, state) to the rule's (descent, new state)."""
    copy, sums, totals = outs
    old, s = _rows(param, s)
    g = g.reshape(old.shape).to(old.dtype)
    if ste_clip:
        g = torch.where(_inside(param, s, levels, grid), g, 0.0)
    values = [b.reshape(old.shape).to(old.dtype) for b in state]
    lr, eps = (float(t.to(old.dtype)) for t in (lr, eps))
    w = clamp_hull(old, s, levels, grid) if clamp_ else old
    d = g if maximize else -g
    if direction:
        descent, updated = base(-d, w, values)
        v, h = skew_velocity(-descent, w, s, levels, grid, lr, eps, alpha)
    else:
        v, h = skew_velocity(d, w, s, levels, grid, lr, eps, alpha)
        descent, updated = base(-v, w, values)
        v = -descent
    new = w + lr * v
    if clamp_:
        new = clamp_hull(new, s, levels, grid)
    level, finite = nearest(w / s, levels, grid), g.isfinite()
    if skip_nonfinite:
        new, v, g = torch.where(finite, new, old), torch.where(finite, v, 0.0), torch.where(finite, g, 0.0)
        updated = [torch.where(finite, u, o) for u, o in zip(updated, values, strict=True)]
    for target, value in zip([param, *state], [new, *updated], strict=True):
        target.copy_(value.reshape(target.shape))
    stored = param.reshape(old.shape).to(old.dtype)
    now = nearest(stored / s, levels, grid)
    if copy is not None:
        write_copy(copy, s, now)
    if sums is not None:
        sums.copy_(row_sums(stored, stored.shape[0]))
    if totals is not None:
        parts = (h < 0, torch.where(h < 0, -h, 0.0), v * v, g * v, now != level, ~finite)
        totals.copy_(torch.stack([p.double().sum() for p in parts]))


def _skewed(rule: Callable[..., tuple[Tensor, list[Tensor]]]) -> Callable[..., None]:
    """The operator ``skew_<rule>_`` of a rule's mathematics.

    rule: (g, w, state, numbers, step) -> what the base optimizer subtracts from w, over lr, and the new state.
    """

    def update(
        params: list[Tensor], grads: list[Tensor], states: list[Tensor], scales: list[Tensor], levels: list[Tensor],
        grids: list[int], dequantized: list[Tensor], row_sums: list[Tensor], totals: list[Tensor],
        step: Tensor | None, lr: Tensor, eps: Tensor, alpha: float, numbers: list[float], direction: bool, clamp: bool,
        maximize: bool, skip_nonfinite: bool, kept: list[Tensor] | None = None, firsts: list[Tensor] | None = None,
        coefficients: Tensor | None = None, ste_clip: bool = False,
    ) -> None:  # fmt: skip
        if ste_clip and any(t.numel() for t in (*(kept or ()), *(firsts or ()))):
            raise ValueError("ste_clip: expected no kept weights and no first gradients")
        grads = descend(params, grads, kept, firsts, coefficients, sam_restore_, sam_average_)
        t = 0.0 if step is None else float(step)
        for i, param in enumerate(params):
            outs = [_present(tensors, i) for tensors in (dequantized, row_sums, totals)]
            state = [b for b in states[i :: len(params)] if b.numel() == param.numel()]  # others are absent
            _step(
                param, grads[i], state, scales[i], levels[i], grids[3 * i : 3 * i + 3], outs,
                lambda g, w, values: rule(g, w, values, numbers, t), lr, eps, alpha, direction, clamp, maximize,
                skip_nonfinite, ste_clip,
            )  # fmt: skip

    update.__name__, update.__doc__ = rule.__name__, rule.__doc__
    return update


@_skewed
def skew_sgd_(g, w, state, numbers, step):
    """torch.optim.SGD; state: the momentum buffer, or nothing."""
    momentum, dampening, weight_decay, nesterov = numbers
    if weight_decay:
        g = g + weight_decay * w
    if not state:
        return g, []
    buffer = momentum * state[0] + (1 - dampening) * g
    return g + momentum * buffer if nesterov else buffer, [buffer]


@_skewed
def skew_adamw_(g, w, state, numbers, step):
    """torch.optim.AdamW; state: first and second moment."""
    beta1, beta2, adam_eps, weight_decay = numbers
    first = state[0] + (1 - beta1) * (g - state[0])
    second = beta2 * state[1] + (1 - beta2) * (g * g)
    descent = first * (1 / (1 - beta1**step)) / (_sqrt(second) * (1 / math.sqrt(1 - beta2**step)) + adam_eps)
    return descent + weight_decay * w if weight_decay else descent, [first, second]


@_skewed
def skew_lion_(g, w, state, numbers, step):
    """Lion (Chen et al., 2023); state: the moving average of gradients."""
    beta1, beta2, weight_decay = numbers
    c = beta1 * state[0] + (1 - beta1) * g
    sign = torch.where(c == c, torch.sign(c), c)  # torch's own sign of NaN is 0
    descent = sign + weight_decay * w if weight_decay else sign
    return descent, [beta2 * state[0] + (1 - beta2) * g]


# ---- sharpness-aware perturbations ------------------------------------------------------------------------------


def _sam_t(w: Tensor, adaptive: int, eta: float) -> Tensor:
    """T = |w| + eta where adapted, 1 elsewhere, in the compute dtype."""
    return w.abs() + eta if adaptive else torch.ones_like(w)


def sam_norm(params: list[Tensor], grads: list[Tensor], adaptive: list[int], eta: float) -> Tensor:
    """sum (T g)^2 over the whole list, float64, 0-dim."""
    total = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for p, g, adapted in zip(params, grads, adaptive, strict=True):
        dtype = compute_dtype(p.dtype)
        x = _sam_t(p.detach().to(dtype), adapted, eta) * g.reshape(p.shape).to(dtype)
        total += (x * x).double().sum()
    return total


def sam_perturb_(
    params: list[Tensor], grads: list[Tensor], kept: list[Tensor], coefficients: Tensor, adaptive: list[int], eta: float
) -> None:
    """kept = w; w <- w + (c T^2 - a) g with (c, a) = coefficients; c = a = 0 leaves w as it is."""
    for p, g, keep, adapted in zip(params, grads, kept, adaptive, strict=True):
        keep.copy_(p.reshape(keep.shape))
        w = p.detach().to(compute_dtype(p.dtype))
        c, a = coefficients.to(w.dtype)
        t = _sam_t(w, adapted, eta)
        moved = w + (c * (t * t) - a) * g.reshape(w.shape).to(w.dtype)
        p.copy_(torch.where((c == 0) & (a == 0), w, moved))


def sam_restore_(params: list[Tensor], kept: list[Tensor]) -> None:
    """w = kept, bit for bit."""
    for p, keep in zip(params, kept, strict=True):
        p.copy_(keep.reshape(p.shape))


def sam_average_(grads: list[Tensor], firsts: list[Tensor], coefficients: Tensor) -> None:
    """g <- (g + first) / 2; with coefficients c = a = 0 g stays, because nothing was perturbed."""
    for g, first in zip(grads, firsts, strict=True):
        dtype = compute_dtype(g.dtype)
        mean = 0.5 * (g.to(dtype) + first.reshape(g.shape).to(dtype))
        g.copy_(torch.where((coefficients == 0).all(), g.to(dtype), mean))


# ---- packed weights -------------------------------------------------------------------------------------------------


def packed_weight(
    codes: Tensor, scale: Tensor, levels: Tensor, grid: list[int], bits: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """(n, cols) weights s c, rounded once to ``dtype``; a code above the highest level counts as the highest."""
    kind = compute_dtype(dtype)
    table = level_table(levels, grid, codes.device).to(kind)
    index = unpack_codes(codes, bits, cols).clamp_(max=len(table) - 1)
    level, s = _rows(table[index.int()], scale.to(kind))
    return (s * level).to(dtype).reshape(index.shape)


def packed_dequantize_(codes: Tensor, scale: Tensor, levels: Tensor, grid: list[int], bits: int, out: Tensor) -> None:
    """out = s c, in the storage type of ``out`` (n, cols)."""
    out.copy_(packed_weight(codes, scale, levels, grid, bits, out.shape[1], out.dtype))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the type that they have, also under autocast."""
    if not torch._C._is_any_autocast_enabled():
        return x @ weight.t()
    with torch.autocast(x.device.type, enabled=False):
        return x @ weight.t()


def packed_linear(
    x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, grid: list[int], bits: int, bias: Tensor | None
) -> Tensor:
    """y = x W^T + b with W = s c in float32, sums in float32, rounded once to the type of x."""
    kind = compute_dtype(x.dtype)
    y = product(x.to(kind), packed_weight(codes, scale, levels, grid, bits, x.shape[1], kind))
    return (y if bias is None else y + bias.to(kind)).to(x.dtype)


def packed_tiles_linear(
    x: Tensor, tiles: Tensor, scale: Tensor, levels: Tensor, grid: list[int], form: int, n: int, groups: int,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """``packed_linear`` from tiles (``contract.tile_codes``); scales of groups stand groups first, for whole tiles."""
    kind, cols = compute_dtype(x.dtype), x.shape[1]
    codes = untile_codes(tiles, form, n, cols).int()
    if grid[0] == CODEBOOK:
        level = levels.to(kind)[codes.clamp(max=len(levels) - 1)]
    else:
        lowest = grid[1] if form < 8 else -128 if grid[1] < 0 else 0
        level = (level_step(grid[0]) * codes + lowest).to(kind)
    if groups > 1:
        scale = scale.reshape(-1, tiles.shape[0] * TILE_ROWS)[:groups, :n].t().reshape(-1)
    weight = (scale.to(kind)[:, None] * level.reshape(scale.numel(), -1)).reshape(n, cols)
    y = product(x.to(kind), weight)
    return (y if bias is None else y + bias.to(kind)).to(x.dtype)


def int8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s): each row of ``x`` as round(x / s), s = max |x| / 127, in float32; s is NaN where a row is not finite."""
    top = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    # `127 / top` of a number rounds twice
    inverse = torch.where(top > 0, torch.full_like(top, INT8_TOP) / top, torch.zeros_like(top))
    usable = (top.isfinite() & inverse.isfinite())[:, None]
    q = torch.where(usable, (x * inverse[:, None]).round(), torch.zeros_like(x))
    return q, torch.where(top.isfinite(), top / INT8_TOP, torch.full_like(top, float("nan")))


def packed_linear_int8(
    x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, grid: list[int], bits: int, bias: Tensor | None
) -> Tensor:
    """y = s_x (q W^T) + b with x = s_x q rounded to int8 token by token, W = s c in float32."""
    kind = compute_dtype(x.dtype)
    q, s = int8_tokens(x.to(kind))
    y = s[:, None] * packed_linear(q, codes, scale, levels, grid, bits, None)
    return (y if bias is None else y + bias.to(kind)).to(x.dtype)


def packed_bands(codes: Tensor, bits: int, cols: int, groups: int, levels: int) -> Tensor:
    """Packed codes in bands (``contract.band_codes``); a code above the highest level becomes the highest."""
    if bits == TRITS:
        codes = codes.clamp(max=TRIT_TOP)
    return band_codes(unpack_codes(codes, bits, cols).clamp_(max=levels - 1), bits, groups)


def packed_bands_codes(bands: Tensor, bits: int, n: int, cols: int, groups: int) -> Tensor:
    """The packed codes, whose bands these are."""
    return pack_codes(unband_codes(bands, bits, n, cols, groups), bits)


def packed_bands_linear(
    x: Tensor, bands: Tensor, scale: Tensor, grid: list[int], bits: int, n: int, bias: Tensor | None
) -> Tensor:
    """``packed_linear_int8`` from bands; scale: (bands, groups, BAND_ROWS)."""
    groups, none = scale.shape[1], torch.empty(0, device=x.device)
    codes = pack_codes(unband_codes(bands, bits, n, x.shape[1], groups), bits)
    return packed_linear_int8(x, codes, scale.transpose(1, 2).flatten(0, 1)[:n].flatten(), none, grid, bits, bias)


def packed_linear_bf16(
    x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, grid: list[int], bits: int, bias: Tensor | None
) -> Tensor:
    """``packed_linear`` of x rounded to bfloat16, ties to even; y is rounded once, to the type of x."""
    kind = compute_dtype(x.dtype)
    y = packed_linear(x.to(torch.bfloat16).to(kind), codes, scale, levels, grid, bits, None)
    return (y if bias is None else y + bias.to(kind)).to(x.dtype)


def packed_bands_conv(
    x: Tensor, bands: Tensor, scale: Tensor, grid: list[int], bits: int, n: int, geometry: list[int],
    channels_last: bool, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """``packed_bands_linear`` of the patches of x (images, channels, height, width), or with ``channels_last`` (images,
    height, width, channels), which the result is, too. geometry: kernel, stride, dilation, zeros before and after, two
    numbers each."""
    kernel, stride, dilation, before, after = (geometry[i : i + 2] for i in range(0, 10, 2))
    x = x.movedim(-1, 1) if channels_last else x
    x = torch.nn.functional.pad(x, (before[1], after[1], before[0], after[0]))
    each = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    size = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in each]
    patches = torch.nn.functional.unfold(x, tuple(kernel), tuple(dilation), 0, tuple(stride)).transpose(1, 2)
    y = packed_bands_linear(patches.reshape(-1, patches.shape[-1]), bands, scale, grid, bits, n, bias)
    y = y.reshape(x.shape[0], *size, n)
    return y if channels_last else y.movedim(-1, 1).contiguous()


def packed_depthwise(x: Tensor, taps: Tensor, geometry: list[int], bias: Tensor | None) -> Tensor:
    """A filter for each channel: x (images, height, width, channels), taps (kernel, channels), as the result in the
    type of x; geometry as in ``packed_bands_conv``."""
    kernel, stride, dilation, before, after = (geometry[i : i + 2] for i in range(0, 10, 2))
    padded = torch.nn.functional.pad(x.movedim(-1, 1), (before[1], after[1], before[0], after[0]))
    weight = taps.t().reshape(-1, 1, *kernel)
    y = torch.nn.functional.conv2d(padded, weight, bias, stride, 0, dilation, len(weight))
    return y.movedim(1, -1).contiguous()


# ---- products of levels ---------------------------------------------------------------------------------------------


def token_levels(x: Tensor, levels: Tensor, grid: list[int], top: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(q, s): each row of ``x`` as s q with s = max |x| / top, 1 where that is 0, NaN where the row is not finite; q
    are levels of the grid, or any numbers of ``dtype``."""
    x = x.to(compute_dtype(x.dtype))
    tops = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    # by a tensor: a GPU multiplies by the inverse of a number, and another last bit moves levels that were between two
    s = torch.where(tops.isfinite(), tops, torch.full_like(tops, float("nan"))) / torch.full_like(tops, top)
    s = torch.where(s == 0, torch.ones_like(s), s)
    q, placed = torch.empty_like(x, dtype=dtype), x / s[:, None]
    write_copy(q, s[:, None], placed.clamp(-top, top) if grid[0] == FLOAT else nearest(placed, levels, grid))
    return q, s


def stochastic_levels(x: Tensor, factor: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s): each row of ``x * factor`` as s q with s = max |x factor| / 127 as in ``token_levels``; q int8, one of
    the two integers beside x factor / s, such that E[s q] = x factor."""
    kind = compute_dtype(x.dtype)
    x = x.to(kind) * factor.to(kind)
    tops = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    s = torch.where(tops.isfinite(), tops, torch.full_like(tops, math.nan)) / torch.full_like(tops, INT8_TOP)
    s = torch.where(s == 0, torch.ones_like(s), s)
    placed = (x / s[:, None]).clamp(-INT8_TOP, INT8_TOP)
    low = placed.floor()
    uniform = philox_uniform(seed, x.numel(), x.device).reshape(x.shape)
    q = torch.where(uniform < placed - low, low + 1, low)
    return q.nan_to_num(nan=0.0).to(torch.int8), s


def luq(x: Tensor, bits: int, seed: Tensor) -> Tensor:
    """Signed powers of two of alpha = max |x| / 2^top, top = 2^(bits - 1) - 1, and 0, such that E[y] = x; NaN
    everywhere where ``x`` holds inf or NaN."""
    wide, top = x.to(compute_dtype(x.dtype)).reshape(-1), 2 ** (bits - 1) - 1
    most = wide.abs().amax() if wide.numel() else wide.new_zeros(())
    most = torch.where(most.isfinite(), most, torch.full_like(most, math.nan))
    r = wide.abs() / torch.where(most == 0, torch.ones_like(most), most) * 2.0**top
    mantissa, exponent = torch.frexp(r)  # in [1/2, 1)
    large, power = r >= 1, torch.ldexp(torch.ones_like(r), exponent - 1)
    low, high = torch.where(large, power, 0.0), torch.where(large, 2 * power, 1.0)
    far = philox_uniform(seed, wide.numel(), x.device) < torch.where(large, 2 * mantissa - 1, r)
    y = most * (torch.where(far, high, low) * 2.0**-top)
    return torch.where(y > 0, y.copysign(wide), y).to(x.dtype).reshape(x.shape)


def level_product(
    q: Tensor, token_scale: Tensor, c: Tensor, scale: Tensor, bias: Tensor | None, transposed: bool, dtype: torch.dtype
) -> Tensor:
    """``scaled_sums`` of q c^T, or of q c where c is ``transposed``; the sums are exact integers."""
    sums = product(q.double(), (c.t() if transposed else c).double())
    return scaled_sums(sums, token_scale, scale, bias, dtype)


def scaled_sums(sums: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y = (sums s_x) s_w + b, rounded once to ``dtype``."""
    kind = compute_dtype(dtype)
    y = (sums.to(kind) * token_scale.to(kind)[:, None]) * scale.to(kind)
    return (y if bias is None else y + bias.to(kind)).to(dtype)
