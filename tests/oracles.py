"""docs/mathematics.md transcribed a second time, in NumPy and float64, in terms of t, a and b.

Deliberately unlike ``askew_kernels/reference.py`` (which works in u, the distance to the nearest level): a slip in one
of the two is a failing test. Nothing here imports the package's mathematics; grids are lists of levels.
"""

from __future__ import annotations

import numpy as np
import torch

import askew_kernels as ak

NF4 = (-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)  # fmt: skip
Uniform, Binary, Ternary, Codebook = ak.quant.Uniform, ak.quant.Binary, ak.quant.Ternary, ak.quant.Codebook
Midrise = ak.quant.Midrise
GRIDS = {
    "uniform2": Uniform(2),
    "uniform4": Uniform(4),
    "uniform8": Uniform(8),
    "narrow3": Uniform(3, narrow=True),
    "inclusive4": Uniform(4, inclusive=True),
    "unsigned4": Uniform(4, signed=False),
    "binary": Binary(),
    "ternary": Ternary(),
    "midrise3": Midrise(3),
    "nf4": Codebook(NF4),
    "powers": Codebook([-1.0, -0.5, -0.25, 0.0, 0.125, 1.0]),
    "two": Codebook([-0.75, 2.0]),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float64: 0.0}
GRANULARITIES = {"per_tensor": None, "per_channel": None, "per_group": 4}


def as64(t):
    return t.detach().to(torch.float64).numpy() if isinstance(t, torch.Tensor) else np.asarray(t, dtype=np.float64)


def nearest(x, levels, ties_to_even):
    """Q(x), x in float64: nearest of ``levels``; NaN stays NaN."""
    x, levels = np.asarray(x, np.float64), np.asarray(levels, np.float64)
    c = np.clip(x, levels[0], levels[-1])
    distance = np.abs(c[..., None] - levels)
    chosen = levels[np.nanargmin(np.where(np.isnan(distance), np.inf, distance), axis=-1)]  # the first of equals: lower
    if ties_to_even:
        tie = np.abs(c - np.floor(c)) == 0.5
        chosen = np.where(tie, 2 * np.round(c / 2), chosen)
    return np.where(np.isnan(x), np.nan, chosen)


def ties_to_even(grid):
    return isinstance(grid, (Uniform, Ternary))


def fake_quantize(w, scale, grid):
    """s Q(w/s) for w (rows, cols) and scale (rows,) as float32 values: x = w/s is rounded to float32, as specified."""
    w32, s32 = np.asarray(as64(w), np.float32), np.asarray(as64(scale), np.float32).reshape(-1, 1)
    with np.errstate(all="ignore"):
        level = nearest((w32 / s32).astype(np.float64), grid.levels, ties_to_even(grid)).astype(np.float32)
        return torch.from_numpy(s32 * level)


def bracket(w, s, levels):
    """(t, a, b, outside) of each weight; a and b in weight units."""
    levels = np.asarray(levels, np.float64)
    i = np.clip(np.searchsorted(levels, w / s, side="right") - 1, 0, len(levels) - 2)
    a, b = s * levels[i], s * levels[i + 1]
    return (w - a) / (b - a), a, b, (w < s * levels[0]) | (w > s * levels[-1])


def constraint(t, eps):
    return eps - 16 * t**2 * (1 - t) ** 2


def skew(d, w, s, levels, lr, eps, alpha):
    """The velocity nearest to d with h' v >= -alpha h where h < 0, its displacement capped at a quarter bracket."""
    t, a, b, outside = bracket(w, s, levels)
    delta = b - a
    h = constraint(t, eps)
    slope = np.abs(-(32 / delta) * t * (1 - t) * (1 - 2 * t))
    free = (h >= 0) | (t == 0) | (t == 0.5) | (t == 1) | outside
    with np.errstate(all="ignore"):
        kappa = np.minimum(alpha * (-h) / slope, delta / (4 * lr) if lr > 0 else np.inf)
    sigma = np.where(t < 0.5, -1.0, 1.0)
    return np.where(free, d, sigma * np.maximum(kappa, sigma * d)), np.where(outside, np.maximum(h, eps), h)


def clamp(w, s, levels):
    return np.clip(w, s * levels[0], s * levels[-1])


def sgd_step(w, g, buffer, s, levels, *, lr, eps, alpha=1.0, momentum=0.0, dampening=0.0, weight_decay=0.0,
             nesterov=False, direction=False, clamped=True, maximize=False):  # fmt: skip
    """(new w, new buffer, v, h): torch.optim.SGD's rule with the skew before (gradient) or after it (direction)."""
    if clamped:
        w = clamp(w, s, levels)
    if maximize:
        g = -g

    def rule(g):
        new = buffer
        if weight_decay:
            g = g + weight_decay * w
        if momentum:
            new = momentum * buffer + (1 - dampening) * g
            g = g + momentum * new if nesterov else new
        return -g, new

    if direction:
        d, new_buffer = rule(g)
        v, h = skew(d, w, s, levels, lr, eps, alpha)
    else:
        v, h = skew(-g, w, s, levels, lr, eps, alpha)
        v, new_buffer = rule(-v)
    w = w + lr * v
    return clamp(w, s, levels) if clamped else w, new_buffer, v, h


def adamw_step(w, g, m, v2, s, levels, *, step, lr, eps, alpha=1.0, betas=(0.9, 0.999), adam_eps=1e-8,
               weight_decay=0.0, direction=False, clamped=True, maximize=False):  # fmt: skip
    """(new w, first moment, second moment, v, h) with torch.optim.AdamW's rule."""
    if clamped:
        w = clamp(w, s, levels)
    if maximize:
        g = -g

    def rule(g):
        first = betas[0] * m + (1 - betas[0]) * g
        second = betas[1] * v2 + (1 - betas[1]) * g * g
        corrected = second / (1 - betas[1] ** step)
        return -(first / (1 - betas[0] ** step)) / (np.sqrt(corrected) + adam_eps) - weight_decay * w, first, second

    if direction:
        d, first, second = rule(g)
        v, h = skew(d, w, s, levels, lr, eps, alpha)
    else:
        v, h = skew(-g, w, s, levels, lr, eps, alpha)
        v, first, second = rule(-v)
    w = w + lr * v
    return clamp(w, s, levels) if clamped else w, first, second, v, h


def weights_in_brackets(grid, rows, cols, generator, eps=0.3, margin=0.02, outside=0.0):
    """float64 (rows, cols) in grid units: away from the midpoint and from h = 0, where the update is discontinuous.

    The slope of h in t is at most 3.1 and in float32 t is off by (|x| + 1) 2^-23 at most.
    """
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    i = torch.randint(len(levels) - 1, (rows, cols), generator=generator)
    t = torch.rand(rows, cols, generator=generator, dtype=torch.float64)
    for _ in range(200):
        h = constraint(t, eps)
        bad = (h.abs() < margin) | ((t - 0.5).abs() < margin)
        if not bad.any():
            break
        t = torch.where(bad, torch.rand(t.shape, generator=generator, dtype=torch.float64), t)
    x = levels[i] + t * (levels[i + 1] - levels[i])
    if outside:
        far = torch.rand(x.shape, generator=generator) < outside
        x = torch.where(far, levels[-1] + torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.01, x)
    return x


def same_bits(a, b):
    """Equal bit for bit, except that any NaN equals any other."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and bool(((a.nan_to_num(0.0) == b.nan_to_num(0.0)) & (torch.signbit(a) == torch.signbit(b)) | a.isnan()).all())
    )


def same_values(a, b):
    """Equal exactly, where 0 equals -0 and any NaN any other: what the reference owes to the compiled loops."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and bool(((a == b) | a.isnan()).all())


def scales_in_units(tops=(1.0, 1.75, 1.7500001, 1.9, 448.0, 2.0**-8, 2.0**127)):
    """Tensors of scales, each with one of the largest numbers: ties, subnormal numbers, and what is below E4M3."""
    mantissas = [0, 1, 0x7FFFF, 0x80000, 0x80001, 0x17FFFF, 0x180000, 0x180001, 0x680000, 0x7FFFFF]
    bits = torch.tensor([(e + 127 << 23) + m for e in range(-25, 0) for m in mantissas], dtype=torch.int32)
    smaller = torch.cat([bits.view(torch.float32), torch.arange(0.5, 9, 0.25) * 2.0**-17])
    return [torch.cat([smaller * top, torch.tensor([top])]) for top in tops]


def scales_at_roundings():
    """Numbers around the ties of every type, around halves of powers of two by ratio, at the ends of the types."""
    mantissas = [0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x3504F2, 0x3504F3, 0x3504F4,
                 0x7FEFFF, 0x7FFFFF]  # fmt: skip
    exponents = [-39, -25, -24, -20, -15, -14, -13, 0, 14, 15, 16, 100, 126, 127]
    bits = [(e + 127 << 23) + m for e in exponents for m in mantissas]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)
