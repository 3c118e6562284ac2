"""docs/mathematics.md in plain PyTorch: the oracle of every test, and the implementation where nothing is compiled.

Each function has the name and the arguments of the operator that it defines (see ``ops/schema.py``). Arithmetic is
float64 for float64 inputs and float32 for everything else, with the operations in the same order as ``csrc/math``,
so that quantized codes agree exactly with every backend. Nothing here is written for speed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .contract import BINARY, CODEBOOK, FLOAT, INT8_TOP, NUM_ROW_SUMS, UNIFORM, compute_dtype, level_table, unpack_codes


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


def clamp(x: Tensor, levels: Tensor, grid: list[int]) -> Tensor:
    lo, hi = hull(levels, grid)
    return x.clamp(lo, hi)  # keeps NaN


def nearest(x: Tensor, levels: Tensor, grid: list[int]) -> Tensor:
    """Q(x): nearest level; ties to even (uniform) or to the lower level (binary, codebook); NaN stays NaN."""
    kind = grid[0]
    if kind == UNIFORM:
        return torch.round(clamp(x, levels, grid)) + 0.0  # + 0.0: no level is -0
    if kind == BINARY:
        one = torch.ones_like(x)
        return torch.where(x > 0, one, torch.where(x == x, -one, x))
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
    kind = grid[0]
    c = clamp(x, levels, grid)
    near = nearest(x, levels, grid)
    if kind == UNIFORM:
        d = c - near
        up = (d == -0.5).to(x.dtype)  # the tie that was rounded up
        near, d = near - up, d + up
        u, delta = d.abs(), torch.ones_like(x)
    elif kind == BINARY:
        d = c - near
        u, delta = d.abs() * 0.5, torch.full_like(x, 2.0)
    else:
        table = levels.to(device=x.device, dtype=x.dtype)
        below = torch.bucketize(c.contiguous(), table, right=True).sub_(1).clamp_(0, len(table) - 2)
        delta = table[below + 1] - table[below]
        d = c - near
        u = (d.abs() / delta).clamp(max=0.5)
    side = torch.where(d > 0, -torch.ones_like(x), torch.ones_like(x))
    return near, u, side, delta


def clamp_hull(w: Tensor, scale: Tensor, levels: Tensor, grid: list[int]) -> Tensor:
    lo, hi = hull(levels, grid)
    w = torch.where(w < scale * lo, scale * lo, w)
    return torch.where(w > scale * hi, scale * hi, w)


# ---- fake quantization --------------------------------------------------------------------------------------------


def philox_uniform(seed: int, count: int, device: torch.device) -> Tensor:
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


def fake_quantize_out_(x: Tensor, scale: Tensor, levels: Tensor, grid: list[int], out: Tensor) -> None:
    """out = s Q(x / s), in the storage type of ``out``."""
    w, s = _rows(x, scale)
    out.copy_((s * nearest(w / s, levels, grid)).reshape(x.shape))


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


def _candidates(x: Tensor, scales: Tensor, grids: list[int]) -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """(scale, x / s in the hull, Q(x / s), inside, top level) of each candidate, (rows, cols)."""
    found, none = [], torch.empty(0, dtype=torch.float32, device=x.device)
    for k in range(len(scales)):
        grid = grids[3 * k : 3 * k + 3]
        w, s = _rows(x, scales[k])
        if grid[0] == FLOAT:
            found.append((torch.ones_like(s), w, w, torch.ones_like(w, dtype=torch.bool), 1.0))
            continue
        placed = clamp_hull(w, s, none, grid) / s
        found.append(
            (s, placed, nearest(placed, none, grid), _inside(x, scales[k], none, grid), float(max(grid[2], 1)))
        )
    return found


def mix_fake_quantize(
    x: Tensor, scales: Tensor, strengths: Tensor, grids: list[int], ste_clip: bool, learned: bool
) -> Tensor:
    """y = sum_k p_k s_k Q_k(x / s_k), added up in the order of the candidates; see ``ops.mix_fake_quantize``."""
    y = None
    for p, (s, _, q, _, _) in zip(strengths.to(compute_dtype(x.dtype)), _candidates(x, scales, grids), strict=True):
        part = p * (s * q)
        y = part if y is None else y + part
    return y.to(x.dtype).reshape(x.shape)  # type: ignore[union-attr]


def mix_fake_quantize_backward(
    grad: Tensor, x: Tensor, scales: Tensor, strengths: Tensor, grids: list[int], ste_clip: bool, learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, strengths and scales (zeros unless ``learned``)."""
    dtype = compute_dtype(x.dtype)
    g = grad.reshape(scales.shape[1], -1).to(dtype) if x.numel() else grad.reshape(scales.shape[1], 0).to(dtype)
    gate = torch.zeros_like(g)
    to_strengths, to_scales = torch.zeros_like(strengths), torch.zeros_like(scales)
    for k, (s, placed, q, inside, top) in enumerate(_candidates(x, scales, grids)):
        p = strengths[k].to(dtype)
        gate = gate + (torch.where(inside, p, torch.zeros_like(p)) if ste_clip else p)
        to_strengths[k] = (s.double() * (g * q).double().sum(1, keepdim=True)).sum()
        if learned and grids[3 * k] != FLOAT and x.numel():
            sums = (g * torch.where(inside, q - placed, q)).double().sum(1)
            to_scales[k] = p.double() * sums / math.sqrt(g.shape[1] * top)
    return (g * gate).to(x.dtype).reshape(x.shape), to_strengths, to_scales


# ---- the interval constraint ----------------------------------------------------------------------------------------


def feasible_radius(eps: Tensor) -> Tensor:
    """r / Delta = (1 - sqrt(1 - sqrt(eps))) / 2, without its cancellation; every operation rounded to eps's type."""

    def root(t: Tensor) -> Tensor:  # torch's float32 sqrt is not always correctly rounded on the CPU
        return t.double().sqrt().to(t.dtype)

    q = root(eps)
    return 0.5 * q / (1 + root(1 - q))


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
    cap = 1 / (4 * torch.tensor(lr, dtype=w.dtype, device=w.device))  # inf for lr = 0
    kappa = (-h / 16) * (length * alpha4) / ((u - u * u) * (0.5 - u))
    kappa = torch.minimum(kappa, length * cap)
    towards = side * d
    skewed = side * torch.where(kappa > towards, kappa, towards)
    return torch.where((h < 0) & (u < 0.5), skewed, d), h


def row_sums(x: Tensor, rows: int) -> Tensor:
    """(rows, 3) float32: sum |x|, sum x^2, max |x| of each row."""
    a = x.detach().reshape(rows, -1).double().abs()
    if a.shape[1] == 0:
        return torch.zeros(rows, NUM_ROW_SUMS, dtype=torch.float32, device=x.device)
    return torch.stack([a.sum(1), (a * a).sum(1), a.amax(1)], dim=1).float()


# ---- the update -------------------------------------------------------------------------------------------------


def _update(w, g, s, levels, grid, base, lr, eps, alpha, direction, clamp_, maximize):
    """(new weight, velocity, h, old nearest level) of a (rows, cols) matrix; ``base`` maps a gradient to a velocity."""
    if clamp_:
        w = clamp_hull(w, s, levels, grid)
    d = g if maximize else -g
    if direction:
        v, h = skew_velocity(base(-d, w), w, s, levels, grid, lr, eps, alpha)
    else:
        v, h = skew_velocity(d, w, s, levels, grid, lr, eps, alpha)
        v = base(-v, w)
    new = w + lr * v
    if clamp_:
        new = clamp_hull(new, s, levels, grid)
    return new, v, h, nearest(w / s, levels, grid)


def _present(tensors: list[Tensor], i: int) -> Tensor | None:
    return tensors[i] if tensors and tensors[i].numel() else None


def _apply(make_base, params, grads, states, scales, levels, grids, dequantized, row_sums_out, totals, lr, eps,
           alpha, direction, clamp_, maximize, skip_nonfinite):  # fmt: skip
    for i, param in enumerate(params):
        if param.numel() == 0:
            for out in (_present(row_sums_out, i), _present(totals, i)):
                if out is not None:
                    out.zero_()
            continue
        grid = grids[3 * i : 3 * i + 3]
        w, s = _rows(param, scales[i])
        g = grads[i].reshape(w.shape).to(w.dtype)
        state = [_present(buffers, i) for buffers in states]
        values = [None if b is None else b.reshape(w.shape).to(w.dtype) for b in state]
        updated = list(values)
        lr_, eps_ = (float(t.to(w.dtype)) for t in (lr, eps))
        base = make_base(values, updated)
        new, v, h, level = _update(w, g, s, levels[i], grid, base, lr_, eps_, alpha, direction, clamp_, maximize)
        finite = g.isfinite()
        if skip_nonfinite:
            new, v = torch.where(finite, new, w), torch.where(finite, v, torch.zeros_like(v))
            updated = [u if u is None else torch.where(finite, u, o) for u, o in zip(updated, values, strict=True)]
            g = torch.where(finite, g, torch.zeros_like(g))
        param.copy_(new.reshape(param.shape))
        for buffer, value in zip(state, updated, strict=True):
            if buffer is not None:
                buffer.copy_(value.reshape(buffer.shape))
        stored = param.reshape(w.shape).to(w.dtype)
        if (copy := _present(dequantized, i)) is not None:
            copy.copy_((s * nearest(stored / s, levels[i], grid)).reshape(copy.shape))
        if (out := _present(row_sums_out, i)) is not None:
            out.copy_(row_sums(stored, stored.shape[0]))
        if (out := _present(totals, i)) is not None:
            flips = nearest(stored / s, levels[i], grid) != level
            parts = (h < 0, torch.where(h < 0, -h, torch.zeros_like(h)), v * v, g * v, flips, ~finite)
            out.copy_(torch.stack([p.double().sum() for p in parts]))


def descend(
    params: list[Tensor], grads: list[Tensor], kept: list[Tensor] | None, firsts: list[Tensor] | None,
    coefficients: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """A sharpness-aware step starts from the kept weights; returns the gradients, or their mean with the first ones."""
    means = list(grads)
    for i, p in enumerate(params):
        if (keep := _present(kept or [], i)) is not None:
            sam_restore_([p], [keep])
        if (first := _present(firsts or [], i)) is not None:
            means[i] = grads[i].clone()
            sam_average_([means[i]], [first], coefficients)  # type: ignore[arg-type]
    return means


def skew_sgd_(
    params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor], scales: list[Tensor],
    levels: list[Tensor], grids: list[int], dequantized: list[Tensor], row_sums: list[Tensor], totals: list[Tensor],
    lr: Tensor, eps: Tensor, alpha: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
    direction: bool, clamp: bool, maximize: bool, skip_nonfinite: bool,
    kept: list[Tensor] | None = None, firsts: list[Tensor] | None = None, coefficients: Tensor | None = None,
) -> None:  # fmt: skip
    """One ASkewSGD step over a tensor list; see ``ops.skew_sgd_``."""
    grads = descend(params, grads, kept, firsts, coefficients)

    def make_base(values, updated):
        def base(g, w):
            if weight_decay:
                g = g + weight_decay * w
            if values[0] is not None:
                updated[0] = momentum * values[0] + (1 - dampening) * g
                g = g + momentum * updated[0] if nesterov else updated[0]
            return -g

        return base

    _apply(make_base, params, grads, [momentum_buffers], scales, levels, grids, dequantized, row_sums, totals,
           lr, eps, alpha, direction, clamp, maximize, skip_nonfinite)  # fmt: skip


def skew_adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    scales: list[Tensor], levels: list[Tensor], grids: list[int], dequantized: list[Tensor],
    row_sums: list[Tensor], totals: list[Tensor], step: Tensor, lr: Tensor, eps: Tensor, alpha: float, beta1: float,
    beta2: float, adam_eps: float, weight_decay: float, direction: bool, clamp: bool, maximize: bool,
    skip_nonfinite: bool, kept: list[Tensor] | None = None, firsts: list[Tensor] | None = None,
    coefficients: Tensor | None = None,
) -> None:  # fmt: skip
    """One ASkewAdamW step over a tensor list; see ``ops.skew_adamw_``."""
    grads = descend(params, grads, kept, firsts, coefficients)
    first_correction = 1 / (1 - beta1 ** float(step))
    root_second_correction = 1 / math.sqrt(1 - beta2 ** float(step))

    def make_base(values, updated):
        def base(g, w):
            updated[0] = values[0] + (1 - beta1) * (g - values[0])
            updated[1] = beta2 * values[1] + (1 - beta2) * (g * g)
            root = updated[1].double().sqrt().to(g.dtype)  # torch's float32 sqrt (MKL) is not correctly rounded
            v = -(updated[0] * first_correction) / (root * root_second_correction + adam_eps)
            return v - weight_decay * w if weight_decay else v

        return base

    _apply(make_base, params, grads, [exp_avgs, exp_avg_sqs], scales, levels, grids, dequantized, row_sums, totals,
           lr, eps, alpha, direction, clamp, maximize, skip_nonfinite)  # fmt: skip


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
