"""Contract: every operator computes docs/mathematics.md, sections 1 to 3, on both CPU backends.

1. Quantized values equal the float64 oracle (``oracles.py``) exactly: the quotient w/s is rounded to float32 once and
   everything after it is exact. The C++ loops and the reference agree bit for bit on everything elementwise.
2. Updates equal the oracle, which works in t, a and b where the library works in u, within a derived bound in float32
   and to 1e-9 in float64, away from the points where the update is discontinuous (midpoints, h = 0).
3. The published binary and K-level rules are special cases.
4. Copies equal ``fake_quantize`` of the new weights, and sums ``row_sums`` of them, bit for bit, in the same pass.
5. Bad arguments are TypeError/ValueError that begin with the argument's name, before anything is written.
6. The operators pass ``torch.library.opcheck``; a new lr or eps recompiles nothing.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, EPSILON, GRANULARITIES, GRIDS, Binary, Codebook, Ternary, Uniform, same_bits

import askew_kernels as ak
from askew_kernels import contract, ops, reference, runtime
from askew_kernels.ops import RULES
from askew_kernels.quant import compute_scale

GRID_NAMES = list(GRIDS)
COLS = (0, 1, 7, 129)


def some(shape, dtype, generator, spread=4.0):
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def scales_for(rows, generator):
    return torch.rand(rows, generator=generator) * 0.9 + 0.1


def to_dtype(values, dtype):
    """float32 values in a storage type, as torch rounds them."""
    return values.to(torch.float32).to(dtype)


# ---- fake_quantize --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRID_NAMES)
def test_fake_quantize_equals_the_oracle(name, dtype, backend, generator, poisoned):
    grid = GRIDS[name]
    for rows, cols in itertools.product((1, 3), COLS):
        x = some((rows, cols), dtype, generator)
        s = scales_for(rows, generator)
        want = to_dtype(oracles.fake_quantize(x, s, grid), dtype)
        got = ops.fake_quantize(x, s, grid)
        assert torch.equal(got, want)
        out = poisoned((rows, cols), dtype)
        assert ops.fake_quantize_out_(x, s, grid, out) is out and torch.equal(out, want)
        for other in DTYPES:
            out = poisoned((rows, cols), other)
            ops.fake_quantize_out_(x, s, grid, out)
            assert torch.equal(out, to_dtype(oracles.fake_quantize(x, s, grid), other))


@pytest.mark.parametrize("name", GRID_NAMES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_granularities(name, granularity, backend, generator):
    grid, group = GRIDS[name], GRANULARITIES[granularity]
    w = some((4, 3, 2, 2), torch.float32, generator, 1.0)
    s = compute_scale(w, grid, "absmax", granularity, group)
    rows = s.numel()
    want = oracles.fake_quantize(w.reshape(rows, -1), s, grid).reshape(w.shape)
    assert torch.equal(ops.fake_quantize(w, s, grid), want)
    if rows == 1:
        assert torch.equal(ops.fake_quantize(w, s.reshape(()), grid), want)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_fake_quantize_equals_torch_per_channel(k, backend, generator):
    """torch multiplies by 1/s; with powers of two as scales that is the same division."""
    grid = Uniform(k)
    x = some((4, 33), torch.float32, generator)
    x[0, :8] = torch.tensor([0.5, -0.5, 1.5, -1.5, 2.5, 0.25, 0.75, -0.25])  # ties
    s = torch.tensor([1.0, 0.5, 0.25, 2.0])
    want = torch.fake_quantize_per_channel_affine(
        x, s, torch.zeros(4, dtype=torch.int32), 0, int(grid.levels[0]), int(grid.levels[-1])
    )
    assert torch.equal(ops.fake_quantize(x, s, grid), want)


def test_ties(backend):
    x = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5, -2.5]])
    assert ops.fake_quantize(x, torch.ones(1), Uniform(4)).tolist() == [[-2, 0, 0, 2, 2, -2]]  # to even
    assert ops.fake_quantize(torch.tensor([[0.0, -0.0]]), torch.ones(1), Binary()).tolist() == [[-1, -1]]  # lower
    assert ops.fake_quantize(torch.tensor([[0.5, 1.5]]), torch.ones(1), Codebook([0, 1, 2])).tolist() == [[0, 1]]


@pytest.mark.parametrize("name", GRID_NAMES)
def test_special_values(name, backend):
    grid = GRIDS[name]
    low, high = grid.levels[0], grid.levels[-1]
    x = torch.tensor([[math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, -0.0, 0.0]])
    y = ops.fake_quantize(x, torch.tensor([0.5]), grid)[0]
    half = [float(np.float32(0.5) * np.float32(c)) for c in (high, low)]
    assert y[:2].tolist() == half and y[2].isnan() and y[3:5].tolist() == half
    if 0.0 in grid.levels and not isinstance(grid, Codebook):
        assert y[5:].tolist() == [0, 0, 0] and not torch.signbit(y[5:]).any()  # no level is -0


def test_scale_one_denormal_and_huge(backend):
    for s in (1e-40, 1e-12, 1e30):
        x = torch.tensor([[0.0, s, -s, 3 * s]])
        got = ops.fake_quantize(x, torch.tensor([s]), Uniform(4))
        assert same_bits(got, oracles.fake_quantize(x, torch.tensor([s]), Uniform(4)))


@pytest.mark.parametrize("name", GRID_NAMES)
def test_fake_quantize_is_idempotent(name, backend, generator):
    grid = GRIDS[name]
    x, s = some((5, 129), torch.float32, generator), scales_for(5, generator)
    y = ops.fake_quantize(x, s, grid)
    assert torch.equal(ops.fake_quantize(y, s, grid), y)


@pytest.mark.parametrize("shape", [(5, 0), (0, 4), (0,)])
def test_groups_of_nothing(shape, backend):
    """The scales that compute_scale gives of an empty weight are those that operators take."""
    w, grid = torch.zeros(shape), Uniform(4)
    scale = compute_scale(w, grid, "absmax", "per_group", 4)
    assert ops.fake_quantize(w, scale, grid).shape == shape and ops.soft_quantize(w, scale, grid, 0.5).shape == shape
    out = torch.zeros(shape, dtype=torch.bfloat16)
    assert ops.fake_quantize_out_(w, scale, grid, out) is out and ops.project_interval_(w, scale, grid, 0.1) is w
    assert ops.ste_clip_(w.clone(), w, scale, grid).shape == shape
    ops.skew_sgd_([w], [w.clone()], [w.clone()], [scale], [grid], lr=0.1, eps=0.3, momentum=0.9,
                  dequantized=[out], stats=ops.SkewStats.empty_for([w], [scale]))  # fmt: skip
    if len(shape) > 1:
        codes = ak.quant.pack_weight(w, scale, grid)
        assert ak.quant.unpack_weight(codes, scale, grid, shape).shape == shape
        assert ops.packed_dequantize(codes, scale, grid, 4, shape[1]).shape == shape
        y = ops.packed_linear(torch.ones(3, shape[1]), codes, scale, grid, 4)
        assert y.shape == (3, shape[0]) and not y.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("slack", [1e-38, 1e-39, 1e-45, torch.tensor(1e-40), torch.tensor(1e-50, dtype=torch.float64)])
def test_the_smallest_slacks(slack, dtype, backend):
    """Also those whose inverse is infinite in float32 give the levels."""
    x = torch.tensor([[0.3, 0.6, 0.5, -0.4, 9.0, -9.0]], dtype=dtype)
    want = ops.fake_quantize(x, torch.ones(1), Uniform(4))
    torch.testing.assert_close(ops.soft_quantize(x, torch.ones(1), Uniform(4), slack), want)


@pytest.mark.parametrize("shift", [-1, 0, 1, 700])
def test_out_that_overlaps_x(shift, backend, generator):
    """x is read as it was; the same memory, seen as it is, serves both."""
    s, grid = torch.tensor(0.5), Uniform(4)
    memory = some((4100,), torch.float32, generator)
    x, out = memory[max(-shift, 0) :][:3000], memory[max(shift, 0) :][:3000]
    want = ops.fake_quantize(x.clone(), s, grid)
    assert torch.equal(ops.fake_quantize_out_(x, s, grid, out), want)
    square = some((64, 64), torch.float32, generator)
    want = ops.fake_quantize(square.clone(), s, grid)
    assert torch.equal(ops.fake_quantize_out_(square, s, grid, square.t()), want)
    for clip in (ops.ste_clip_, ops.ste_clip_scale_grad_):
        shifted = memory.clone()
        grad, point = shifted[1:3001], shifted[:3000]
        want = ops.ste_clip_(grad.clone(), point.clone(), s, grid)
        clip(grad, point, s, grid)
        assert torch.equal(grad, want)
    halves = some((2048,), torch.bfloat16, generator)
    x, want = halves[:1024], ops.fake_quantize(halves[:1024].clone(), s, grid)
    out = halves.view(torch.float32)  # twice as wide at the same place
    assert torch.equal(ops.fake_quantize_out_(x, s, grid, out), want.float())


def layouts(x):
    """The same values in other memory: (name, tensor)."""
    yield "transposed", x.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] * 2, dtype=x.dtype)
    wide[..., ::2] = x
    yield "strided", wide[..., ::2]
    offset = torch.zeros(x.numel() + 1, dtype=x.dtype)
    offset[1:] = x.flatten()
    yield "unaligned", offset[1:].view(x.shape)
    if x.dim() == 4:
        yield "channels_last", x.clone(memory_format=torch.channels_last)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(6, 8), (4, 3, 4, 4), (4, 16, 1, 1)])
def test_layouts_do_not_matter(shape, granularity, backend, generator):
    grid = Uniform(4)
    x, g = some(shape, torch.float32, generator, 0.5), some(shape, torch.float32, generator)
    s = compute_scale(x, grid, "absmax", granularity, GRANULARITIES[granularity])
    want_q = ops.fake_quantize(x, s, grid)
    want_p = ops.project_interval_(x.clone(), s, grid, 0.2)
    want_c = ops.ste_clip_(g.clone(), x, s * 0.5, grid)
    w_want, m_want, d_want = x.clone(), torch.zeros_like(x), torch.empty_like(x)
    stats_want = ops.SkewStats.empty_for([x], [s])
    options = dict(lr=0.1, eps=0.2, momentum=0.9)
    ops.skew_sgd_([w_want], [g], [m_want], [s], [grid], dequantized=[d_want], stats=stats_want, **options)
    for name, view in layouts(x):
        assert torch.equal(compute_scale(view, grid, "absmax", granularity, GRANULARITIES[granularity]), s), name
        assert torch.equal(ops.fake_quantize(view, s, grid), want_q), name
        for out in (dict(layouts(torch.zeros_like(x)))[name], torch.zeros_like(x)):
            ops.fake_quantize_out_(view, s, grid, out)
            assert torch.equal(out, want_q), name
            out.zero_()
            ops.fake_quantize_out_(x, s, grid, out)
            assert torch.equal(out, want_q), name
        target = dict(layouts(x))[name]
        assert ops.project_interval_(target, s, grid, 0.2) is target and torch.equal(target, want_p), name
        grad = dict(layouts(g))[name]
        assert torch.equal(ops.ste_clip_(grad, view, s * 0.5, grid), want_c), name
        assert torch.equal(ops.ste_clip_(g.clone(), view, s * 0.5, grid), want_c), name
        w, m, d = dict(layouts(x))[name], dict(layouts(torch.zeros_like(x)))[name], torch.empty_like(x)
        strides = w.stride()
        stats = ops.SkewStats.empty_for([w], [s])
        ops.skew_sgd_([w], [dict(layouts(g))[name]], [m], [s], [grid], dequantized=[d], stats=stats, **options)
        assert w.stride() == strides
        assert torch.equal(w, w_want) and torch.equal(m, m_want) and torch.equal(d, d_want), name
        assert torch.equal(stats.row_sums[0], ops.row_sums(w, s.numel())), name
        # sums in another order: float lanes of 32 terms, then double
        torch.testing.assert_close(stats.totals[0], stats_want.totals[0], rtol=64 * 2**-24, atol=1e-5)


# ---- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRID_NAMES)
def test_straight_through_gradient(name, dtype, backend, generator):
    grid = GRIDS[name]
    for rows, cols in itertools.product((1, 3), COLS):
        x = some((rows, cols), dtype, generator).requires_grad_()
        s = scales_for(rows, generator)
        g = some((rows, cols), dtype, generator)
        ops.fake_quantize(x, s, grid).backward(g)
        low, high = (s[:, None] * torch.tensor(end, dtype=torch.float32) for end in (grid.levels[0], grid.levels[-1]))
        on_an_end = (x == low.to(dtype)) | (x == high.to(dtype))  # rounded: the subject of the tests below
        inside = ((x.detach().float() >= low) & (x.detach().float() <= high)) | on_an_end
        want = torch.where(inside, g, torch.zeros_like(g))
        assert torch.equal(x.grad[~on_an_end], want[~on_an_end])
        clipped = g.clone()
        assert ops.ste_clip_(clipped, x.detach(), s, grid) is clipped and torch.equal(clipped, x.grad)
        x.grad = None
        ops.fake_quantize(x, s, grid, ste_clip=False).backward(g)
        assert torch.equal(x.grad, g)


def test_gradient_at_the_ends_of_the_hull(backend, generator):
    s = scales_for(1000, generator)
    ends = torch.stack([s * -8, s * 7], 1)  # w / s rounds to outside for some of them
    beyond = torch.nextafter(ends, torch.tensor([-9.0, 9.0]))
    x = torch.cat([ends, beyond], 1).requires_grad_()
    ops.fake_quantize(x, s, Uniform(4)).sum().backward()
    assert (x.grad == torch.tensor([1.0, 1, 0, 0])).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamped_weights_keep_their_gradient(dtype, backend, generator):
    """What the update's hull clamp leaves behind counts as inside, also after rounding to its storage type; or such
    weights would stand at the end for ever."""
    for name, grid in GRIDS.items():
        w, s = some((200, 16), dtype, generator, 20.0), scales_for(200, generator)
        ops.skew_sgd_([w], [torch.zeros_like(w)], None, [s], [grid], lr=0.1, eps=0.5)
        dead = int((ops.ste_clip_(torch.ones_like(w), w, s, grid) == 0).sum())
        assert dead == 0, f"{name}: {dead} of {w.numel()}"


def test_gradient_of_special_values(backend):
    x = torch.tensor([[math.inf, -math.inf, math.nan, 0.5]], requires_grad=True)
    ops.fake_quantize(x, torch.ones(1), Binary()).backward(torch.full((1, 4), 2.0))
    assert x.grad.tolist() == [[0, 0, 2, 2]]
    scale = torch.ones(1, requires_grad=True)
    y = ops.fake_quantize(torch.ones(1, 2), scale, Binary())
    assert not y.requires_grad and scale.grad is None


# ---- stochastic rounding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRID_NAMES)
def test_stochastic_rounding_is_unbiased(name, generator):
    grid = GRIDS[name]
    levels = torch.tensor(grid.levels)
    n = 20000
    x = torch.linspace(float(levels[0]), float(levels[-1]), 23)[:, None].expand(23, n).contiguous()
    y = ops.fake_quantize(x, torch.tensor(1.0), grid, stochastic=True, seed=12345)
    assert torch.isin(y, levels).all()
    t, a, b, _ = oracles.bracket(oracles.as64(x), 1.0, grid.levels)
    assert ((oracles.as64(y) == a) | (oracles.as64(y) == b)).all()
    # mean of n Bernoulli: standard deviation Delta sqrt(t(1-t)/n); 5 of them, plus the float32 sum
    bound = ((b - a) * np.sqrt(t * (1 - t) / n))[:, 0] * 5 + 1e-5 * max(abs(c) for c in grid.levels)
    assert (np.abs(oracles.as64(y).mean(1) - oracles.as64(x)[:, 0]) <= bound).all()


def test_stochastic_rounding_is_reproducible(generator):
    x = some((3, 129), torch.float32, generator)
    s = torch.tensor(0.7)
    first = ops.fake_quantize(x, s, Uniform(4), stochastic=True, seed=7)
    assert torch.equal(first, ops.fake_quantize(x, s, Uniform(4), stochastic=True, seed=7))
    assert not torch.equal(first, ops.fake_quantize(x, s, Uniform(4), stochastic=True, seed=8))
    assert not torch.equal(first, ops.fake_quantize(x, s, Uniform(4), stochastic=True, seed=7 + (1 << 32)))
    flat = ops.fake_quantize(x.reshape(-1), s, Uniform(4), stochastic=True, seed=7)
    assert torch.equal(first.reshape(-1), flat)  # the shape does not matter, only the position


def test_stochastic_rounding_at_an_end_of_the_hull_stays_there(backend):
    """With this scale 7 s / s rounds to just above 7, into a bracket whose other end is no level. The three seeds draw
    uniforms below 5 / 2^24, less than that excess."""
    s = torch.tensor(0.10240331292152405)
    assert (7 * s / s).item() > 7
    x = torch.full((4096,), 1e3)
    for seed, at in ((817, 298), (1839, 3430), (2229, 3163)):
        assert reference.philox_uniform(seed, 4096, torch.device("cpu"))[at] <= 5 * 2.0**-24
        for sign, end in ((1, 7), (-1, -8)):
            assert (ops.fake_quantize(sign * x, s, Uniform(4), stochastic=True, seed=seed) == end * s).all()


def test_philox_known_answer():
    """Salmon et al.'s Random123 vectors for philox4x32-10 with a zero counter and key, and another key's first word."""
    words = (reference.philox_uniform(0, 4, torch.device("cpu")).double() * 2**24).long().tolist()
    assert words == [w >> 8 for w in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRID_NAMES)
def test_stochastic_rounding_of_the_backends_is_equal(name, dtype, generator):
    grid = GRIDS[name]
    for cols in COLS:
        x, s = some((3, cols), dtype, generator), scales_for(3, generator)
        got = ops.fake_quantize(x, s, grid, stochastic=True, seed=2**62 + 5)
        with runtime.use_backend("reference"):
            assert torch.equal(got, ops.fake_quantize(x, s, grid, stochastic=True, seed=2**62 + 5))


# ---- the projection -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRID_NAMES)
@pytest.mark.parametrize("eps", [1.0, 0.9, 0.25, 1e-3, 1.6e-5])
def test_projection(name, dtype, eps, backend, generator):
    """Idempotent, feasible and nearest within rounding: w is one rounding (of its storage type) and t's numerator
    |w| 2^-22 from the exact answer, in brackets of length Delta."""
    grid = GRIDS[name]
    levels = np.array(grid.levels)
    for cols in COLS:
        w, s = some((3, cols), dtype, generator), scales_for(3, generator)
        before = oracles.as64(w)
        s64 = oracles.as64(s)[:, None]
        got = ops.project_interval_(w.clone(), s, grid, eps)
        if not cols:
            continue
        rounding = (EPSILON[dtype] + 2**-21) * s64 * np.abs(levels).max() * 1.5
        r = (1 - math.sqrt(1 - math.sqrt(float(np.float32(eps))))) / 2
        t, a, b, _ = oracles.bracket(oracles.clamp(before, s64, levels), s64, levels)
        u = np.minimum(t, 1 - t)
        clamped = oracles.clamp(before, s64, levels)
        target = np.where(u <= r, clamped, np.where(t <= 0.5, a + r * (b - a), b - r * (b - a)))
        near_midpoint = np.abs(t - 0.5) * (b - a) <= rounding  # either side is as near
        error = np.abs(oracles.as64(got) - target)
        error = np.where(near_midpoint, np.minimum(error, np.abs(oracles.as64(got) - (a + b - target))), error)
        assert (error <= rounding).all()
        again = ops.project_interval_(got.clone(), s, grid, eps)
        if dtype == torch.float32:
            assert (np.abs(oracles.as64(again) - oracles.as64(got)) <= rounding).all()
        if eps == 1.0:
            inside = torch.from_numpy((before >= s64 * levels[0]) & (before <= s64 * levels[-1]))
            assert torch.equal(got[inside], w[inside])


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slack", [1.0, 0.7, 0.25, 1e-3])
def test_soft_quantize(name, dtype, slack, backend, generator):
    """The formula in float64 within rounding (of the storage type, and of x/s times the slope); w itself at slack 1."""
    grid = GRIDS[name]
    levels = np.array(grid.levels)
    for cols in COLS:
        w, s = some((3, cols), dtype, generator), scales_for(3, generator)
        got = ops.soft_quantize(w, s, grid, slack)
        assert got.dtype == dtype and got.shape == w.shape
        if not cols:
            continue
        x, s64 = oracles.as64(w), oracles.as64(s)[:, None]
        placed = oracles.clamp(x, s64, levels)
        t, a, b, _ = oracles.bracket(placed, s64, levels)
        middle = np.clip(0.5 + (t - 0.5) / slack, 0, 1)
        target = a + middle * (b - a) + slack * (x - placed)
        room = s64 * np.abs(levels).max()
        rounding = EPSILON[dtype] * (room + np.abs(x)) + 2**-21 * room / slack + 2**-22 * np.abs(x)
        assert (np.abs(oracles.as64(got) - target) <= rounding).all()
        tensor = torch.tensor(slack)
        assert torch.equal(ops.soft_quantize(w, s, grid, tensor), got)


def test_soft_quantize_of_special_values(backend):
    w = torch.tensor([[math.inf, -math.inf, math.nan, -0.0]])
    y = ops.soft_quantize(w, torch.tensor([0.5]), Uniform(4), 0.3)
    assert y[0, 0] == math.inf and y[0, 1] == -math.inf and y[0, 2].isnan() and y[0, 3] == 0
    for bad in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="slack"):
            ops.soft_quantize(w, torch.tensor([0.5]), Uniform(4), bad)
    kept = w.clone().requires_grad_()
    assert not ops.soft_quantize(kept, torch.tensor([0.5]), Uniform(4), 0.5).requires_grad


def test_midpoint_goes_down(backend):
    s = torch.ones(1)
    for grid in (Uniform(4), Codebook([-8.0, *range(-7, 8)])):
        w = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]])
        ops.project_interval_(w, s, grid, 1e-4)
        assert w.round().tolist() == [[-2, -1, 0, 1, 2]]
    w = torch.tensor([[0.0, -0.0]])
    ops.project_interval_(w, s, Binary(), 1e-4)
    assert (w < -0.9).all()


def test_projection_of_special_values(backend):
    w = torch.tensor([[math.inf, -math.inf, math.nan]])
    ops.project_interval_(w, torch.tensor([0.5]), Uniform(4), 0.3)
    assert w[0, :2].tolist() == [3.5, -4.0] and w[0, 2].isnan()


# ---- row_sums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 129), (2, 5000), (1, 70000), (3, 0)])
def test_row_sums(shape, dtype, backend, generator):
    """Per lane at most 32 float additions before a double takes over: relative error below 33 roundings."""
    x = some(shape, dtype, generator)
    got = ops.row_sums(x, shape[0])
    assert got.shape == (shape[0], 3) and got.dtype == torch.float32
    m = np.abs(oracles.as64(x))
    want = np.stack([m.sum(1), (m * m).sum(1), m.max(1, initial=0)], 1)
    assert (np.abs(got.numpy() - want) <= 35 * 2**-24 * want).all()
    assert torch.equal(got[:, 2].double(), torch.from_numpy(want[:, 2]))


def test_row_sums_of_special_values(backend):
    x = torch.tensor([[1.0, math.nan, 2.0], [math.inf, 1.0, 0.0], [1.0, 2.0, -3.0]])
    got = ops.row_sums(x, 3)
    assert got[0].isnan().all() and got[1].tolist() == [math.inf] * 3 and got[2].tolist() == [6, 14, 3]


# ---- the updates against the oracle ----------------------------------------------------------------------------------

SGD_CASES = [
    {},
    dict(momentum=0.9),
    dict(momentum=0.9, nesterov=True),
    dict(momentum=0.8, dampening=0.3),
    dict(weight_decay=0.1),
    dict(momentum=0.9, weight_decay=0.1, nesterov=True, skew="direction"),
    dict(momentum=0.9, skew="direction", maximize=True),
    dict(maximize=True, weight_decay=0.1),
    dict(clamp=False, outside=0.3),
    dict(clamp=False, outside=0.3, momentum=0.9, skew="direction"),
    dict(alpha=0.3),
    dict(alpha=0.0),
    dict(alpha=5.0, lr=1e-4),
    dict(lr=2.0),
    dict(lr=0.0, momentum=0.9),
]
OPERATOR_NAMES = {"skew": "direction", "clamp": "clamped"}


def step_of(rule):
    """The function of a rule, with momentum where there is a choice, at step 3 where steps count."""
    options = {"momentum": 0.9} if RULES[rule].buffers_if else {"step": 3.0} if RULES[rule].counts else {}
    return functools.partial(getattr(ops, RULES[rule].operator), **options)


def update_case(grid, case, generator, dtype, cols=37):
    case = dict(case)
    outside = case.pop("outside", 0.0)
    case.setdefault("lr", 0.1)
    case.setdefault("eps", 0.3)
    x = oracles.weights_in_brackets(grid, 4, cols, generator, case["eps"], outside=outside)
    s = scales_for(4, generator)
    w = (x * s.double()[:, None]).to(dtype)
    g, m, v = (torch.randn(4, cols, generator=generator).to(dtype) for _ in range(3))
    expected = {OPERATOR_NAMES.get(k, k): a for k, a in case.items()}
    if "direction" in expected:
        expected["direction"] = expected["direction"] == "direction"
    return case, expected, w, g, m, v.abs(), s, oracles.as64(s)[:, None]


def bound_of(dtype, grid, lr, v, w, s):
    """|error of the new w|: t is off by (|x| + 1) 2^-23 in float32, so kappa, which is proportional to h / |h'|, by
    3.1 dt / 0.02 + 2 dt / 0.04 relative where |h| > 0.02 and |t - 1/2| > 0.02; lr kappa <= Delta / 4; the other terms
    are a dozen roundings of w and of lr v."""
    if dtype == torch.float64:
        return 1e-9 * (1 + np.abs(w) + lr * np.abs(v))
    levels = np.array(grid.levels)
    dt = (np.abs(levels).max() / np.diff(levels).min() + 1) * 2**-22
    kappa = (155 + 50) * dt * np.diff(levels).max() * s / 4
    return kappa + 12 * 2**-24 * (np.abs(w) + lr * np.abs(v) + 1)


@pytest.mark.parametrize("case", SGD_CASES, ids=str)
@pytest.mark.parametrize("name", ["uniform4", "uniform2", "narrow3", "binary", "ternary", "powers", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_skew_sgd_equals_the_oracle(name, dtype, case, backend, generator):
    grid = GRIDS[name]
    case, expected, w, g, m, _, s, s64 = update_case(grid, case, generator, dtype)
    want, buffer, v, _ = oracles.sgd_step(
        oracles.as64(w), oracles.as64(g), oracles.as64(m), s64, np.array(grid.levels), **expected
    )
    new, new_m = w.clone(), m.clone()
    ops.skew_sgd_([new], [g], [new_m] if case.get("momentum") else None, [s], [grid], **case)
    bound = bound_of(dtype, grid, case["lr"], v, oracles.as64(w), s64)
    assert (np.abs(oracles.as64(new) - want) <= bound).all()
    if case.get("momentum"):
        # the buffer holds v itself: kappa's error without lr
        assert (np.abs(oracles.as64(new_m) - buffer) <= bound / max(case["lr"], 1e-1) + 1e-5 * np.abs(buffer)).all()
    if case["lr"] == 0 and case.get("clamp", True):
        assert torch.equal(new, w)


ADAM_CASES = [
    {},
    dict(step=7, weight_decay=0.1),
    dict(step=3, skew="direction"),
    dict(step=2, skew="direction", weight_decay=0.1, maximize=True),
    dict(step=100, betas=(0.5, 0.7), adam_eps=1e-3, alpha=2.0),
    dict(clamp=False, outside=0.3),
]


@pytest.mark.parametrize("case", ADAM_CASES, ids=str)
@pytest.mark.parametrize("name", ["uniform4", "binary", "ternary", "powers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_skew_adamw_equals_the_oracle(name, dtype, case, backend, generator):
    grid = GRIDS[name]
    case = {"step": 1, "weight_decay": 0.0, **case}
    case, expected, w, g, m, v2, s, s64 = update_case(grid, case, generator, dtype)
    v2 = v2 + 0.1  # away from 0, where the quotient amplifies rounding
    want, first, second, v, _ = oracles.adamw_step(
        oracles.as64(w), oracles.as64(g), oracles.as64(m), oracles.as64(v2), s64, np.array(grid.levels), **expected
    )
    new, new_m, new_v = w.clone(), m.clone(), v2.clone()
    ops.skew_adamw_([new], [g], [new_m], [new_v], [s], [grid], **{**case, "step": float(case["step"])})
    # the base rule's quotient: d step / d g <= (1 - b1) / bias1 / sqrt(v2) + |m| ... <= 10 here; float32 constants
    bound = bound_of(dtype, grid, case["lr"], v, oracles.as64(w), s64)
    assert (np.abs(oracles.as64(new) - want) <= 10 * bound).all()
    for got, exact in ((new_m, first), (new_v, second)):
        relative = 1e-9 if dtype == torch.float64 else 2e-3
        assert (np.abs(oracles.as64(got) - exact) <= relative * (1 + np.abs(exact))).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_is_the_published_one(weight_decay, backend, generator):
    """Chen et al., 2023, algorithm 2, bit for bit where nothing is constrained; signs of 0 and NaN."""
    w, m = (torch.randn(4, 300, generator=generator) for _ in range(2))
    new, new_m, lr, (beta1, beta2) = w.clone(), m.clone(), 0.01, (0.95, 0.98)
    for _ in range(20):
        g = torch.randn(4, 300, generator=generator)
        m[0, :2], g[0, :2] = 0, torch.tensor([0.0, -0.0])
        g[1, 0] = math.nan
        new_m[0, :2] = 0
        options = dict(lr=lr, eps=1.0, clamp=False, betas=(beta1, beta2), weight_decay=weight_decay)
        ops.skew_lion_([new], [g], [new_m], [torch.ones(1)], [Uniform(4)], **options)
        c = beta1 * m + (1 - beta1) * g
        w = w - lr * (torch.where(c.isnan(), c, torch.sign(c)) + weight_decay * w)
        m = beta2 * m + (1 - beta2) * g
        assert oracles.same_values(new, w) and oracles.same_values(new_m, m)
    assert new[1, 0].isnan() and new.isfinite().sum() == w.numel() - 1


def test_published_binary_rule(backend, generator):
    """ASkewSGD's binary constraint eps - (w^2 - 1)^2, its own derivative, and its case distinction, scale 1."""
    eps, alpha, lr = 0.2, 0.7, 0.01
    w = torch.rand(2000, generator=generator, dtype=torch.float64) * 2 - 1
    g = torch.randn(2000, generator=generator, dtype=torch.float64)
    h, slope = eps - (w**2 - 1) ** 2, -4 * w * (w**2 - 1)
    keep = (h.abs() > 1e-3) & (w.abs() > 0.02)
    w, g, h, slope = (t[keep] for t in (w, g, h, slope))
    feasible_direction = (h >= 0) | (slope * -g >= -alpha * h)
    v = torch.where(feasible_direction, -g, -alpha * h / slope)  # else the smallest push that satisfies it
    capped = (h < 0) & ~feasible_direction & (v.abs() > 2 / (4 * lr))
    assert not capped.any() and (~feasible_direction).sum() > 100
    new = w.clone()[None]
    ops.skew_sgd_([new], [g[None]], None, [torch.ones(1)], [Binary()], lr=lr, eps=eps, alpha=alpha, clamp=False)
    torch.testing.assert_close(new[0], w + lr * v, rtol=0, atol=2e-8)  # eps itself is a double here


def test_published_k_level_rule(backend, generator):
    """eps_p - (w - a)^2 (w - b)^2 on the integers, with eps_p = eps / 16 and alpha_p = alpha."""
    eps, alpha, lr = 0.3, 1.0, 0.01
    w = torch.rand(4000, generator=generator, dtype=torch.float64) * 15 - 8
    a, b = w.floor(), w.floor() + 1
    h = eps / 16 - (w - a) ** 2 * (w - b) ** 2
    slope = -2 * (w - a) * (w - b) * (2 * w - a - b)
    keep = (h.abs() > 1e-4) & ((w - a - 0.5).abs() > 0.02)
    g = torch.randn(4000, generator=generator, dtype=torch.float64)
    w, g, h, slope = (t[keep] for t in (w, g, h, slope))
    satisfied = (h >= 0) | (slope * -g >= -alpha * h)
    v = torch.where(satisfied, -g, -alpha * h / slope)
    assert (v[~satisfied].abs() < 1 / (4 * lr)).all() and (~satisfied).sum() > 100
    new = w.clone()[None]
    ops.skew_sgd_([new], [g[None]], None, [torch.ones(1)], [Uniform(4)], lr=lr, eps=eps, alpha=alpha, clamp=False)
    torch.testing.assert_close(new[0], w + lr * v, rtol=0, atol=2e-8)


def test_midpoints_and_levels_are_free(backend):
    w = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0, 1.5]])
    g = torch.full((1, 6), 0.25)
    for grid in (Uniform(4), Codebook(range(-8, 8))):
        new = w.clone()
        ops.skew_sgd_([new], [g], None, [torch.ones(1)], [grid], lr=0.5, eps=0.1)
        assert torch.equal(new, w - 0.125)


def test_the_cap(backend):
    """Next to a midpoint kappa is huge: the displacement stops at a quarter of the bracket, at any lr."""
    for lr in (1e-3, 1.0, 1e4):
        w = torch.tensor([[0.4999, 0.5001, -0.4999, -0.5001]])
        ops.skew_sgd_([w], [torch.zeros(1, 4)], None, [torch.ones(1)], [Uniform(4)], lr=lr, eps=0.01, alpha=1e9)
        torch.testing.assert_close(w, torch.tensor([[0.2499, 0.7501, -0.2499, -0.7501]]), rtol=0, atol=1e-6)


def test_any_direction(backend, generator):
    """A direction is applied as SGD applies its gradient's negative, and ends on levels at small eps."""
    w, d = (torch.randn(4, 300, generator=generator) for _ in range(2))
    new, other, s, grid = w.clone(), w.clone(), torch.full((4,), 0.3), Uniform(3)
    options = dict(lr=0.05, eps=1e-4, alpha=3.0)
    for _ in range(200):
        ops.skew_direction_([new], [d], [s], [grid], **options)
        ops.skew_sgd_([other], [-d], None, [s], [grid], **options)
    assert torch.equal(new, other)
    assert ((new - ops.fake_quantize(new, s, grid)).abs() < 0.01).all()
    stats = ops.SkewStats.empty_for([w], [s])
    ops.skew_direction_([w.clone()], [d], [s], [grid], lr=0.05, eps=1.0, stats=stats)
    torch.testing.assert_close(stats.totals[0][3], (d.double() ** 2).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_zero_lr_moves_nothing(rule, backend, generator):
    for name in GRID_NAMES:
        w = oracles.weights_in_brackets(GRIDS[name], 2, 33, generator).float()
        new, g = w.clone(), torch.randn(2, 33, generator=generator)
        states = [[torch.zeros_like(w)] for _ in RULES[rule].buffers]
        step_of(rule)([new], [g], *states, [torch.ones(1)], [GRIDS[name]], lr=0.0, eps=0.01)
        assert torch.equal(new, w)


# ---- backends, copies and sums ---------------------------------------------------------------------------------------


def run_update(rule, w, g, s, grid, dtype_of_copy, **options):
    """(new w, copy, row sums, totals, state…) on clones; "direction" takes ``g`` as such."""
    new = w.clone()
    states = [w.clone() * 0.5, w.clone().abs() + 0.1][: len(RULES[rule].buffers) if rule in RULES else 0]
    copy = torch.full(w.shape, 77 if dtype_of_copy == torch.int8 else math.nan, dtype=dtype_of_copy)
    stats = ops.SkewStats.empty_for([w], [s])
    for out in (*stats.row_sums, *stats.totals):
        out.fill_(math.nan)
    options = dict(dequantized=[copy], stats=stats, **options)
    if rule == "direction":
        shared = {k: v for k, v in options.items() if k not in ("skew", "weight_decay", "maximize")}
        ops.skew_direction_([new], [g], [s], [grid], **shared)
    else:
        step_of(rule)([new], [g], *([b] for b in states), [s], [grid], **options)
    return new, copy, stats.row_sums[0], stats.totals[0], *states


OPTIONS = [
    dict(eps=1.0, clamp=False), dict(eps=0.3), dict(eps=0.05, skew="direction", weight_decay=0.01),
    dict(eps=0.3, maximize=True, skip_nonfinite=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", GRID_NAMES)
def test_update_everywhere(name, granularity, dtype, generator):
    """Every grid x granularity x dtype: cpp and reference bit for bit; copies and sums as the operators give them."""
    grid, group = GRIDS[name], GRANULARITIES[granularity]
    for cols, rule in itertools.product((4, 8, 132), (*RULES, "direction")):
        w = some((3, cols), dtype, generator, 0.5)
        g = some((3, cols), dtype, generator, 0.3)
        if cols == 132:
            g[0, 3], g[1, 5], g[2, 131], w[2, 7] = math.inf, math.nan, -math.inf, math.nan
        s = compute_scale(w, grid, "absmax", granularity, group)
        s = torch.where(s == 1, torch.full_like(s, 0.25), s)
        for i, options in enumerate(OPTIONS):
            copy_dtype = DTYPES[i % 3]
            results = {}
            for backend in ("cpp", "reference"):
                with runtime.use_backend(backend):
                    results[backend] = run_update(rule, w, g, s, grid, copy_dtype, lr=0.07, **options)
                    new, copy, row_sums, *_ = results[backend]
                    assert same_bits(row_sums, ops.row_sums(new, s.numel()))
                    out = torch.full(w.shape, math.nan, dtype=copy_dtype)
                    assert same_bits(copy, ops.fake_quantize_out_(new, s, grid, out))
                    if copy_dtype == dtype:
                        assert same_bits(copy, ops.fake_quantize(new, s, grid))
            for part, (a, b) in enumerate(zip(*(r[:2] + r[4:] for r in results.values()), strict=True)):
                assert oracles.same_values(a, b), (part, cols, rule, options, (a - b).abs().max())
            sums, want = (r[3] for r in results.values())
            assert torch.equal(sums[[0, 4, 5]], want[[0, 4, 5]])  # counts are exact
            if cols < 132:  # the others: 32 float additions at most per lane, over terms of either sign (g v)
                torch.testing.assert_close(sums, want, rtol=64 * 2**-24, atol=64 * 2**-24 * float(want[2] + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["uniform4", "binary", "nf4"])
def test_straight_through_clip_inside_the_update(name, rule, dtype, generator):
    """The bits of a step after ``ste_clip_``: weights beyond the hull, on its ends (as they are stored) and NaN."""
    grid = GRIDS[name]
    w, g = some((3, 37), dtype, generator, 1.0), some((3, 37), dtype, generator, 0.3)
    s = scales_for(3, generator)
    low, high = ((s * end).to(dtype) for end in (grid.levels[0], grid.levels[-1]))
    w[:, 0], w[:, 1], w[:, 2], w[:, 3] = low, high, torch.nextafter(high, high + 1), math.nan
    g[:, 5] = math.nan
    results = []
    for backend in ("cpp", "reference"):
        for options in (*OPTIONS, dict(eps=1.0, momentum=0.9) if rule == "sgd" else dict(eps=1.0)):
            with runtime.use_backend(backend):
                clipped = ops.ste_clip_(g.clone(), w, s, grid)
                assert not same_bits(clipped, g)
                want = run_update(rule, w, clipped, s, grid, dtype, lr=0.07, **options)
                got = run_update(rule, w, g, s, grid, dtype, lr=0.07, ste_clip=True, **options)
                assert all(map(same_bits, got, want)), (backend, options)
                results.append(got[0])
    assert all(map(oracles.same_values, results[: len(results) // 2], results[len(results) // 2 :]))


@pytest.mark.parametrize("copy", contract.LEVEL_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniform4", "unsigned4", "inclusive4", "binary", "ternary", "powers"])
def test_copies_of_levels(name, dtype, copy, backend, generator):
    """int8 and e4m3 receive Q(w/s) itself; NaN is 0 in int8."""
    grid = GRIDS[name]
    if name == "powers" and copy == torch.int8:
        return  # -0.5 is no integer; the error is tested below
    for cols in (1, 16, 133):
        w, g = some((3, cols), dtype, generator, 1.0), some((3, cols), dtype, generator, 0.3)
        w[0, 0] = math.nan
        s = scales_for(3, generator)
        new, levels, *_ = run_update("sgd", w, g, s, grid, copy, lr=0.07, eps=0.3, momentum=0.9)
        expected = reference.nearest_levels(new, s, grid.levels_tensor("cpu"), grid.encoding)
        assert expected[0, 0].isnan()
        if copy == torch.int8:
            expected[0, 0] = 0
        assert levels.dtype == copy and oracles.same_values(levels.float(), expected)
        out = ops.fake_quantize_out_(new, s, grid, torch.ones(w.shape, dtype=copy))
        assert torch.equal(out.view(torch.uint8), levels.view(torch.uint8))


@pytest.mark.parametrize("copy", [torch.int8, torch.float8_e4m3fn])
def test_copies_of_levels_in_one_graph(copy, generator):
    import torch._dynamo

    torch._dynamo.reset()
    w, s = some((3, 20), torch.float32, generator, 1.0), scales_for(3, generator)

    def written(w, s):
        out, dequantized = torch.zeros_like(w, dtype=copy), torch.zeros_like(w, dtype=copy)
        ops.fake_quantize_out_(w, s, Uniform(4), out)
        ops.skew_sgd_([w], [w.clone()], None, [s], [Uniform(4)], lr=0.1, eps=0.3, dequantized=[dequantized])
        return out.view(torch.uint8), dequantized.view(torch.uint8)

    got = torch.compile(written, fullgraph=True, backend="aot_eager")(w.clone(), s)
    assert all(map(torch.equal, got, written(w.clone(), s)))


def test_levels_that_a_copy_cannot_hold_are_refused():
    w, s = torch.full((4, 8), 0.3), torch.ones(4)
    for grid, copy, level in (
        (Uniform(8, signed=False), torch.int8, "128"), (Uniform(8), torch.float8_e4m3fn, "-127"),
        (GRIDS["powers"], torch.int8, "-0.5"), (GRIDS["nf4"], torch.float8_e4m3fn, "-0.69"),
    ):  # fmt: skip
        out = torch.ones(w.shape, dtype=copy)
        with pytest.raises(ValueError, match=rf"^dequantized\[0\]: expected a dtype that holds every .* for {level}"):
            ops.skew_sgd_([w], [w.clone()], None, [s], [grid], lr=0.1, eps=0.3, dequantized=[out])
        with pytest.raises(ValueError, match=rf"^out: expected a dtype that holds every level .* for {level}"):
            ops.fake_quantize_out_(w, s, grid, out)
        assert (w == 0.3).all() and (out.float() == 1).all()


@pytest.mark.parametrize("which", ["kept", "firsts"])
def test_clip_refuses_the_descent_of_a_sharpness_aware_step(which, backend):
    w, g, other = (torch.full((4, 8), v) for v in (0.3, 1.0, 2.0))
    descent = [[other], None, None] if which == "kept" else [None, [other], torch.tensor([0.1, 0.0])]
    with pytest.raises((ValueError, RuntimeError), match="ste_clip: expected no kept weights"):
        runtime.operator("skew_sgd_", w)(
            [w], [g], [], [torch.ones(4)], [torch.empty(0)], [1, -8, 7], [], [], [], None, torch.tensor(0.1),
            torch.tensor(1.0), 1.0, [0.0] * 4, False, True, False, False, *descent, True,
        )  # fmt: skip
    assert (w == 0.3).all()


@pytest.mark.parametrize("rule", [*RULES, "direction"])
def test_empty_updates(rule, backend):
    for shape, rows in (((3, 0), 3), ((3, 0), 1), ((0, 5), 1), ((0,), 1)):
        w = torch.empty(shape)
        _, _, row_sums, totals, *_ = run_update(
            rule, w, w.clone(), torch.ones(rows), Uniform(4), torch.float32, lr=0.1, eps=0.1
        )
        assert (row_sums == 0).all() and (totals == 0).all()  # both were NaN


@pytest.mark.parametrize("name", ["uniform4", "binary", "powers"])
def test_totals_against_float64(name, backend, generator):
    """Counts exactly, sums within 40 float32 roundings of each term; velocity and h from the oracle."""
    grid = GRIDS[name]
    case, expected, w, g, _, _, s, s64 = update_case(grid, dict(lr=0.2), generator, torch.float32, cols=1000)
    new = w.clone()
    stats = ops.SkewStats.empty_for([w], [s])
    ops.skew_sgd_([new], [g], None, [s], [grid], stats=stats, **case)
    w64, g64 = oracles.as64(w), oracles.as64(g)
    _, _, v, h = oracles.sgd_step(w64, g64, 0, s64, np.array(grid.levels), **expected)
    got = dict(zip(ops.SkewStats.NAMES, stats.totals[0].tolist(), strict=True))
    assert got["infeasible"] == (h < 0).sum() > 0
    assert got["nonfinite"] == 0
    flips = (oracles.as64(oracles.fake_quantize(w, s, grid)) != oracles.as64(oracles.fake_quantize(new, s, grid))).sum()
    assert got["flips"] == flips > 0
    assert got["violation"] == pytest.approx(np.maximum(0, -h).sum(), rel=1e-4)
    assert got["velocity_squared"] == pytest.approx((v * v).sum(), rel=1e-3)
    assert got["grad_velocity"] == pytest.approx((g64 * v).sum(), abs=1e-3 * np.abs(g64 * v).sum())


def test_nonfinite_gradients(backend):
    """Without skip: what torch.optim.SGD does (NaN weights). With it: those elements are left alone, and counted."""
    w = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    g = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    for eps in (1.0, 0.1):
        new, m = w.clone(), torch.zeros(1, 4)
        stats = ops.SkewStats.empty_for([w], [torch.ones(1)])
        options = dict(lr=0.1, eps=eps, momentum=0.9, clamp=False, stats=stats)
        ops.skew_sgd_([new], [g], [m], [torch.ones(1)], [Uniform(4)], **options)
        assert new[0, 0].isnan() and stats.totals[0][5] == 3
        if eps == 1:
            assert new[0, 1] == -math.inf and new[0, 2] == math.inf
        new, m = w.clone(), torch.full((1, 4), 0.5)
        ops.skew_sgd_([new], [g], [m], [torch.ones(1)], [Uniform(4)], skip_nonfinite=True, **options)
        assert torch.equal(new[0, :3], w[0, :3]) and (m[0, :3] == 0.5).all() and new[0, 3] != w[0, 3]
        assert stats.totals[0][5] == 3 and stats.totals[0].isfinite().all()


def test_tensor_lists_equal_single_calls(backend, generator):
    shapes = [(3, 7), (1, 129), (2, 0), (5, 1), (4, 40), (1, 40000)]
    grids = [Uniform(4), Binary(), Ternary(), Codebook(oracles.NF4), Uniform(2), Uniform(8)]
    ws = [some(shape, torch.float32, generator, 0.5) for shape in shapes]
    gs = [some(shape, torch.float32, generator, 0.5) for shape in shapes]
    ss = [scales_for(shape[0], generator) for shape in shapes]
    single, together = ([[w.clone() for w in ws] for _ in range(2)] for _ in range(2))
    stats = [ops.SkewStats.empty_for(ws, ss) for _ in range(2)]
    copies = [[torch.full_like(w, math.nan) for w in ws] for _ in range(2)]
    options = dict(lr=0.1, eps=0.2, momentum=0.9)
    ops.skew_sgd_(together[0], gs, together[1], ss, grids, dequantized=copies[0], stats=stats[0], **options)
    for i in range(len(ws)):
        one = ops.SkewStats([stats[1].row_sums[i]], [stats[1].totals[i]])
        ops.skew_sgd_(
            [single[0][i]],
            [gs[i]],
            [single[1][i]],
            [ss[i]],
            [grids[i]],
            dequantized=[copies[1][i]],
            stats=one,
            **options,
        )
    for a, b in ((together, single), (copies[:1], copies[1:])):
        for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
            assert torch.equal(x, y)
    for kind in ("row_sums", "totals"):
        assert all(torch.equal(x, y) for x, y in zip(getattr(stats[0], kind), getattr(stats[1], kind), strict=True))


def test_versions_are_counted(generator):
    """Autograd and the layers' freshness rely on torch's version counter, which a raw kernel does not move."""
    w, g, m = (torch.randn(2, 8, generator=generator) for _ in range(3))
    out = torch.empty(2, 8)
    before = [t._version for t in (w, m, out, g)]
    ops.skew_sgd_([w], [g], [m], [torch.ones(1)], [Binary()], lr=0.1, eps=0.1, momentum=0.9, dequantized=[out])
    assert all(t._version > b for t, b in zip((w, m, out), before, strict=False)) and g._version == before[3]
    for call in (lambda: ops.project_interval_(w, torch.ones(1), Binary(), 0.1),
                 lambda: ops.ste_clip_(w, g, torch.ones(1), Binary()),
                 lambda: ops.fake_quantize_out_(g, torch.ones(1), Binary(), w)):  # fmt: skip
        version = w._version
        call()
        assert w._version > version


# ---- bad arguments ---------------------------------------------------------------------------------------------------

F = torch.float32
BAD_TENSORS = {
    "type": (None, TypeError), "dtype": (torch.ones(4, 8, dtype=torch.int64), TypeError),
    "complex": (torch.ones(4, 8, dtype=torch.complex64), TypeError),
    "sparse": (torch.ones(4, 8).to_sparse(), TypeError), "shape": (torch.ones(4, 9), ValueError),
    "transposed": (torch.ones(8, 4), ValueError), "device": (torch.ones(4, 8, device="meta"), ValueError),
}  # fmt: skip
BAD_SCALES = {
    "type": (0.5, TypeError), "dtype": (torch.ones(4, dtype=torch.int32), TypeError),
    "rows": (torch.ones(3), ValueError), "matrix": (torch.ones(4, 1), ValueError), "zero": (torch.zeros(4), ValueError),
    "negative": (torch.tensor([1.0, 1, 1, -1]), ValueError), "nan": (torch.tensor([1.0, 1, 1, math.nan]), ValueError),
    "inf": (torch.tensor([1.0, 1, 1, math.inf]), ValueError), "empty": (torch.ones(0), ValueError),
    "device": (torch.ones(4, device="meta"), ValueError), "too many": (torch.ones(64), ValueError),
    # kernels compute in float32
    "0 in float32": (torch.tensor([1e-50] * 4, dtype=torch.float64), ValueError),
    "inf in float32": (torch.tensor([1e39], dtype=torch.float64), ValueError),
}  # fmt: skip
BAD_NUMBERS = {
    "lr": [-0.1, math.nan, math.inf, "0.1", None, True, torch.tensor(-0.1), torch.ones(2), torch.tensor(1)],
    "eps": [0.0, -0.1, 1.5, math.nan, "1", None, torch.tensor(0.0), torch.tensor(2.0), torch.ones(3)],
    "alpha": [-1.0, math.nan, "1", None],
}  # fmt: skip
RULE_NUMBERS = {  # where the rule has such a number
    "weight_decay": [-1.0, math.nan, None], "momentum": [-0.1, math.nan, None], "dampening": [math.nan, None],
    "adam_eps": [-1.0, None], "betas": [(1.0, 0.9), (-0.1, 0.9), (0.9, 1.5), (0.9,), (0.9, 0.9, 0.9), (None, 0.9)],
}  # fmt: skip
BAD_STEPS = {"step": [0.0, -1.0, None, math.nan, torch.tensor(0.0)]}


def update_arguments(rule):
    arguments = {key: [torch.full((4, 8), 0.3)] for key in ("params", "grads", *(b + "s" for b in RULES[rule].buffers))}
    arguments |= {"scales": [torch.ones(4)], "grids": [Uniform(4)]}
    return arguments, dict(lr=0.1, eps=0.3, dequantized=[torch.full((4, 8), 7.0)])


def bad_update_cases():
    for operator, row in RULES.items():
        lists = ["params", "grads", *(b + "s" for b in row.buffers)]
        for key in lists:
            for why, (value, error) in BAD_TENSORS.items():
                if key == "params" and why in ("shape", "transposed", "device"):
                    continue  # then it is the others that do not fit
                yield pytest.param(operator, {key: [value]}, error, rf"{key}\[0\]", id=f"{operator}-{key}-{why}")
            if key != "params":
                yield pytest.param(operator, {key: []}, ValueError, key, id=f"{operator}-{key}-none")
                half = torch.full((4, 8), 0.3, dtype=torch.float16)
                yield pytest.param(operator, {key: [half]}, ValueError, rf"{key}\[0\]", id=f"{operator}-{key}-half")
        for why, (value, error) in BAD_SCALES.items():
            yield pytest.param(operator, {"scales": [value]}, error, r"scales\[0\]", id=f"{operator}-scales-{why}")
        yield pytest.param(operator, {"scales": []}, ValueError, "scales", id=f"{operator}-scales-none")
        yield pytest.param(operator, {"grids": []}, ValueError, "grids", id=f"{operator}-grids-none")
        yield pytest.param(operator, {"grids": [None]}, TypeError, "grid", id=f"{operator}-grids-type")
        yield pytest.param(operator, {"grids": ["binary"]}, TypeError, "grid", id=f"{operator}-grids-name")
        for why, (value, error) in BAD_TENSORS.items():
            case = {"dequantized": [value]}
            yield pytest.param(operator, case, error, r"dequantized\[0\]", id=f"{operator}-copy-{why}")
        yield pytest.param(operator, {"dequantized": []}, ValueError, "dequantized", id=f"{operator}-copy-none")
        yield pytest.param(operator, {"skew": "both"}, ValueError, "skew", id=f"{operator}-skew")
        for why, stats in {
            "rows": ops.SkewStats([torch.zeros(3, 3)]),
            "dtype": ops.SkewStats([torch.zeros(4, 3, dtype=torch.float64)]),
            "many": ops.SkewStats([torch.zeros(4, 3)] * 2),
            "strided": ops.SkewStats([torch.zeros(3, 4).t()]),
            "type": ops.SkewStats([None]),
            "device": ops.SkewStats([torch.zeros(4, 3, device="meta")]),
        }.items():
            error = TypeError if why == "type" else (TypeError, ValueError) if why == "device" else ValueError
            yield pytest.param(operator, {"stats": stats}, error, r"stats\.row_sums", id=f"{operator}-stats-{why}")
        totals = ops.SkewStats([], [torch.zeros(6)])
        yield pytest.param(operator, {"stats": totals}, ValueError, r"stats\.totals", id=f"{operator}-totals")
        numbers = {k: v for k, v in RULE_NUMBERS.items() if k in row.defaults}
        numbers |= BAD_NUMBERS | (BAD_STEPS if row.counts else {})
        for key, values in numbers.items():
            for value in values:
                yield pytest.param(operator, {key: value}, (TypeError, ValueError), key, id=f"{operator}-{key}-{value}")
    yield pytest.param("sgd", {"momentum_buffers": None}, ValueError, "momentum_buffers", id="sgd-no-buffers")
    yield pytest.param("sgd", {"nesterov": True, "dampening": 0.1}, ValueError, "nesterov", id="sgd-nesterov")
    yield pytest.param("sgd", {"nesterov": True, "momentum": 0.0}, ValueError, "nesterov", id="sgd-nesterov-0")


@pytest.mark.parametrize(("operator", "change", "error", "words"), list(bad_update_cases()))
def test_bad_update_arguments(operator, change, error, words):
    arguments, options = update_arguments(operator)
    good = [t for value in (*arguments.values(), options["dequantized"]) for t in value if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in good]
    for key, value in change.items():
        (arguments if key in arguments else options)[key] = value
    with pytest.raises(error, match=f"^{words}"):
        step_of(operator)(*arguments.values(), **options)
    assert all(torch.equal(t, b) for t, b in zip(good, before, strict=True))


def test_bad_directions():
    w = [torch.full((4, 8), 0.3)]
    with pytest.raises(ValueError, match=r"^directions\[0\]: expected torch.float32 of shape \(4, 8\)"):
        ops.skew_direction_(w, [torch.ones(8, 4)], [torch.ones(4)], [Binary()], lr=0.1, eps=0.1)
    assert (w[0] == 0.3).all()


def test_functions_of_rules_read_like_others():
    """They are made from rows: their signatures and texts are what help() and an editor show."""
    for rule in RULES.values():
        function = getattr(ops, rule.operator)
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:2] == ["params", "grads"] and function.__name__ == rule.operator
        assert all(parameters[name].default == value for name, value in rule.defaults.items() if name != "lr")
        assert f"ASkew{rule.title}" in function.__doc__ and ", ".join(b + "s" for b in rule.buffers) in function.__doc__
    with pytest.raises(TypeError, match="momentum_buffers"):
        ops.skew_sgd_([], [])
    with pytest.raises(TypeError, match="betas"):
        ops.skew_sgd_([], [], None, [], [], lr=0.1, eps=0.1, betas=(0.9, 0.99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [1.0, 1e10, 1e38, 1e39])
@pytest.mark.parametrize("lr", [0.0, 1e-45, 1e-40, 1e-38, 2.0**-101])
@pytest.mark.parametrize("place", ["host", "tensor"])
def test_the_smallest_rates_move_nothing_far(lr, alpha, place, dtype, backend):
    """lr kappa <= Delta / 4 for every lr and alpha: 0 where lr is 0, and no NaN however hard it is pushed."""
    before = torch.tensor([[0.3, 0.4999, 0.49999997, 0.7]], dtype=dtype)
    for scale in (1.0, 1e3):
        for rule in RULES:
            w = before * scale
            row, buffers = RULES[rule], [[torch.zeros_like(w)] for _ in RULES[rule].buffers]
            options = {"step": 1} if row.counts else {}
            rate = torch.tensor(lr, dtype=dtype) if place == "tensor" else lr
            for skew in ops.SKEWS if rule == "sgd" else ["direction"]:
                step_of(rule)([w], [torch.zeros_like(w)], *buffers, [torch.tensor([scale])], [Uniform(4)], lr=rate,
                              eps=0.1, alpha=alpha, skew=skew, **options)  # fmt: skip
            assert w.isfinite().all() and float((w - before * scale).abs().max()) <= 0.51 * scale, rule
            if lr == 0:
                assert torch.equal(w, before * scale), rule


def test_a_bad_second_tensor_leaves_the_first_alone():
    w = [torch.full((4, 8), 0.3), torch.full((4, 8), 0.3)]
    with pytest.raises(ValueError, match=r"^scales\[1\]"):
        ops.skew_sgd_(w, w, None, [torch.ones(4), torch.zeros(4)], [Binary()] * 2, lr=0.1, eps=0.1)
    assert all((t == 0.3).all() for t in w)


@pytest.mark.parametrize("rule", RULES)
def test_expanded_tensors_are_not_written(rule):
    """Neither the one before them in the list."""
    row, names = RULES[rule], ["params", *(f"{b}s" for b in RULES[rule].buffers), "dequantized"]
    for name in names:
        lists = {key: [torch.full((4, 8), 0.3) for _ in range(2)] for key in (*names, "grads")}
        lists[name][1] = torch.full((1, 8), 0.3).expand(4, 8)
        arguments = [lists[key] for key in ("params", "grads", *names[1:-1])]
        options = {"momentum": 0.9} if rule == "sgd" else {"step": 1} if row.counts else {}
        with pytest.raises(ValueError, match=rf"^{name}\[1\]: .* expanded tensor of shape \(4, 8\), strides \(0, 1\)"):
            step_of(rule)(*arguments, [torch.ones(4)] * 2, [Uniform(4)] * 2, lr=0.1, eps=0.3,
                          dequantized=lists["dequantized"], **options)  # fmt: skip
        assert all((t == 0.3).all() for tensors in lists.values() for t in tensors), name


def test_lists_that_are_written_have_memory_of_their_own():
    w, m, other, s, grid = *(torch.full((4, 8), 0.3) for _ in range(3)), [torch.ones(4)] * 2, [Uniform(4)] * 2
    for lists, name in ((([w, w], None, None), "params[1]"), (([w, m], [other, m], None), "momentum_buffers[1]"),
                        (([w, m], None, [other, w]), "dequantized[1]")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: expected memory of its own, got that of params"):
            ops.skew_sgd_(lists[0], [torch.ones(4, 8)] * 2, lists[1], s, grid, lr=0.1, eps=0.3,
                          momentum=0.9 * bool(lists[1]), dequantized=lists[2])  # fmt: skip
    with pytest.raises(ValueError, match=r"^kept\[0\]: expected memory of its own"):
        ops.sam_perturb_([w], [torch.ones(4, 8)], [w], torch.tensor([0.1, 0.0]))
    assert all((t == 0.3).all() for t in (w, m, other))


def test_expanded_tensors_are_not_written_elsewhere():
    w, thin, scale, grid = torch.full((4, 8), 0.3), torch.full((1, 8), 0.3).expand(4, 8), torch.ones(4), Uniform(4)
    pair, others = torch.tensor([0.1, 0.0]), [torch.ones(4, 8), torch.ones(4, 8)]
    for name, call in {
        "w": lambda: ops.project_interval_(thin, scale, grid, 0.1),
        "out": lambda: ops.fake_quantize_out_(w, scale, grid, thin),
        "grad": lambda: ops.ste_clip_(thin, w, scale, grid),
        "grad ": lambda: ops.ste_clip_scale_grad_(thin, w, scale, grid),
        "params[1]": lambda: ops.sam_perturb_([w, thin], others, [w.clone(), w.clone()], pair),
        "kept[1]": lambda: ops.sam_perturb_([w, w.clone()], others, [w.clone(), thin], pair),
        "params[1] ": lambda: ops.sam_restore_([w, thin], others),
        "grads[1]": lambda: ops.sam_average_([w, thin], others, pair),
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(name.strip())}: expected memory for each element"):
            call()
    assert (w == 0.3).all() and (thin == 0.3).all()
    one = torch.full((1,), 0.7).expand(1, 1, 1)  # a single element has its own
    assert ops.project_interval_(one, torch.ones(1), grid, 1e-3).item() > 0.9


def test_mixed_storage_types(generator):
    """float64 runs on the reference, the rest on the kernels: a list of both is either done or refused by name."""
    w = [torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator).double()]
    before = [t.clone() for t in w]
    try:
        ops.skew_sgd_(w, before, None, [torch.ones(1)] * 2, [Uniform(4)] * 2, lr=0.1, eps=1.0, clamp=False)
    except (TypeError, ValueError) as error:
        assert "params[1]" in str(error) and all(torch.equal(a, b) for a, b in zip(w, before, strict=True))
    else:
        for a, b in zip(w, before, strict=True):
            torch.testing.assert_close(a, b * 0.9)


@pytest.mark.parametrize("why", BAD_TENSORS)
def test_bad_tensors_elsewhere(why):
    value, error = BAD_TENSORS[why]
    good, scale, grid = torch.full((4, 8), 0.3), torch.ones(4), Uniform(4)
    if why not in ("shape", "transposed", "device"):
        for name, call in {
            "x": lambda: ops.fake_quantize(value, scale, grid),
            "w": lambda: ops.project_interval_(value, scale, grid, 0.1),
        }.items():
            with pytest.raises(error, match=f"^{name}:"):
                call()
        with pytest.raises(error, match="^x:"):
            ops.row_sums(value, 4)
    with pytest.raises(error, match="^out:"):
        ops.fake_quantize_out_(good, scale, grid, value)
    with pytest.raises(error, match="^grad:"):
        ops.ste_clip_(value, good, scale, grid)
    assert (good == 0.3).all()


@pytest.mark.parametrize("why", BAD_SCALES)
def test_bad_scales_elsewhere(why):
    value, error = BAD_SCALES[why]
    good, grid = torch.full((4, 8), 0.3), Uniform(4)
    for call in (
        lambda: ops.fake_quantize(good, value, grid), lambda: ops.project_interval_(good, value, grid, 0.1),
        lambda: ops.ste_clip_(good, good, value, grid), lambda: ops.fake_quantize_out_(good, value, grid, good),
    ):  # fmt: skip
        with pytest.raises(error, match="^scale:"):
            call()
    assert (good == 0.3).all()


def test_other_bad_arguments():
    x, s = torch.full((4, 8), 0.3), torch.ones(4)
    for seed in (-1, 2**63, 1.5, True, None):
        with pytest.raises((TypeError, ValueError), match="^seed:"):
            ops.fake_quantize(x, s, Binary(), stochastic=True, seed=seed)
    for eps in BAD_NUMBERS["eps"]:
        with pytest.raises((TypeError, ValueError), match="^eps:"):
            ops.project_interval_(x, s, Binary(), eps)
    for rows in (0, 3, -4, 2.0, True, None):
        with pytest.raises(ValueError, match="^rows:"):
            ops.row_sums(x, rows)
    with pytest.raises(ValueError, match="^out:"):
        ops.fake_quantize_out_(x, s, Binary(), torch.empty(8, 4))
    assert (x == 0.3).all()


def test_error_says_expected_and_got():
    with pytest.raises(ValueError, match=r"scale: expected shape .*\(64,\).*got \(1, 64\)"):
        ops.fake_quantize(torch.ones(64, 4), torch.ones(1, 64), Binary())


# ---- torch.library and torch.compile --------------------------------------------------------------------------------


def operator_samples():
    g = torch.Generator().manual_seed(1)
    none, table = torch.empty(0), torch.tensor(oracles.NF4)
    for levels, grid in ((none, [1, -8, 7]), (none, [2, -1, 1]), (table, [3, -1, 1])):
        x = torch.randn(3, 20, generator=g)
        s = torch.rand(3, generator=g) + 0.1
        yield "fake_quantize", (x.clone().requires_grad_(), s, levels, grid, True, False, 0)
        yield "fake_quantize", (x.clone().requires_grad_(), s, levels, grid, False, True, 5)
        yield "fake_quantize_out_", (x, s, levels, grid, torch.zeros(3, 20, dtype=torch.bfloat16))
        yield "fake_quantize_backward", (torch.randn(3, 20, generator=g), x, s, levels, grid)
        yield "ste_clip_", (torch.randn(3, 20, generator=g), x, s, levels, grid)
        yield "ste_clip_scale_grad_", (torch.randn(3, 20, generator=g), x, s, levels, grid, True, 0.5)
        yield "project_interval_", (x.clone(), s, levels, grid, torch.tensor(0.3))
        yield "soft_quantize", (x, s, levels, grid, torch.tensor(0.3))
        yield "row_sums", (x, 3)
        sums = reference.row_sums(x, 3)
        yield (
            "scales_from_sums_",
            ([s.clone(), s.clone()], [sums, sums], [0, 0, 20, 3, 2, 20], [7.0, 0, 0, 7.0, 2.5, 0]),
        )
        yield "mse_scales", (x, sums, levels, grid, 1.0, 0)
        codes = torch.randint(0, 256, (3, 10), generator=g, dtype=torch.uint8)
        yield "packed_dequantize_", (codes, s, levels, grid, 4, torch.zeros(3, 20))
        yield "packed_linear", (x[:2], codes, s, levels, grid, 4, torch.randn(3, generator=g))
        yield "packed_linear_bf16", (x[:2], codes, s, levels, grid, 4, torch.randn(3, generator=g))
        form = ops.packed.tile_form(levels.tolist(), grid, torch.bfloat16)
        tiles = ops.packed.packed_tiles(codes, grid, 4, 20, len(levels) or 2 if grid[0] != 1 else 16, form)
        half = x[:2].to(torch.bfloat16), torch.randn(3, generator=g).to(torch.bfloat16)
        yield "packed_tiles_linear", (half[0], tiles, s, levels, grid, form, 3, 1, half[1])
        if grid[0] == 1:  # whole numbers of steps
            bands = reference.packed_bands(codes, 4, 20, 1, 16)
            yield "packed_bands", (codes, 4, 20, 1, 16)
            yield "packed_bands_codes", (bands, 4, 3, 20, 1)
            beside = ops.packed.band_scales(s, 3, 1)
            yield "packed_bands_linear", (x[:2], bands, beside, grid, 4, 3, torch.randn(3, generator=g))
            image = torch.randn(2, 5, 4, 3, generator=g)
            yield "packed_bands_conv", (image, bands, beside, grid, 4, 3, [2, 2, 1, 2, 1, 1, 1, 0, 0, 1], False, None)
            taps = torch.randn(6, 3, generator=g)
            yield "packed_depthwise", (image, taps, [2, 3, 2, 1, 1, 1, 1, 0, 0, 2], torch.randn(3, generator=g))
        if grid[0] != 3:  # int8 activations want integer levels
            yield "packed_linear_int8", (x[:2], codes, s, levels, grid, 4, torch.randn(3, generator=g))
        outs = ([torch.zeros(3, 20)], [torch.zeros(3, 3)], [torch.zeros(6, dtype=torch.float64)])
        for rule in RULES.values():
            yield rule.operator, (
                [x.clone()], [x + 1], [torch.ones(3, 20) for _ in rule.buffers], [s], [levels], grid, *outs,
                torch.tensor(1.0), torch.tensor(0.1), torch.tensor(0.3), 1.0,
                rule.numbers_of({**rule.defaults, "momentum": 0.9, "weight_decay": 0.1}), False, True, False, False,
                *([None, None, None, True] if grid[0] == 2 else []),
            )  # fmt: skip
    x, y, z = (torch.randn(3, 20, generator=g) for _ in range(3))
    yield "token_levels", (x, none, [0, 0, 0], 448.0, torch.float8_e4m3fn)
    yield "token_levels", (x.bfloat16(), none, [1, -127, 127], 127.0, torch.int8)
    yield "scaled_sums", (x.int(), torch.rand(3, generator=g), torch.rand(20, generator=g), y[0], torch.bfloat16)
    levels8 = [torch.randint(-8, 8, shape, generator=g, dtype=torch.int8) for shape in ((3, 20), (5, 20))]
    yield "level_product", (levels8[0], s, levels8[1], torch.ones(1), None, False, torch.float32)
    yield "stochastic_levels", (x, torch.rand(20, generator=g), torch.tensor(3))
    yield "luq", (x, 4, torch.tensor(3))
    scales, strengths = torch.rand(2, 3, generator=g) + 0.5, torch.tensor([0.3, 0.7])
    candidates = [1, -2, 1, 0, 0, 0]
    leaves = [t.clone().requires_grad_() for t in (x, scales, strengths)]
    yield "mix_fake_quantize", (*leaves, candidates, True, True)
    yield "mix_fake_quantize_backward", (y, x, scales, strengths, candidates, True, True)
    yield "sam_norm", ([x, y], [y, z], [1, 0], 0.01)
    yield (
        "sam_perturb_",
        ([x.clone(), y.clone()], [y, z], [z.clone(), z.clone()], torch.tensor([0.1, 0.0]), [1, 0], 0.0),
    )
    yield "sam_restore_", ([x.clone()], [y])
    yield "sam_average_", ([x.clone()], [y], torch.tensor([0.1, 0.01]))


@pytest.mark.parametrize(("name", "arguments"), [
    pytest.param(n, a, id=f"{n}-{i}") for i, (n, a) in enumerate(operator_samples())
])  # fmt: skip
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.askew, name).default, arguments)


def test_every_operator_is_checked():
    from askew_kernels.ops import schema

    assert {name for name, _ in operator_samples()} == set(schema.OPERATORS)


def test_compile_does_not_recompile_with_lr_and_eps(generator):
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    grid = Uniform(4)

    def step(w, g, m, s, copy, lr, eps):
        y = ops.fake_quantize(w, s, grid)
        ops.skew_sgd_([w], [g], [m], [s], [grid], lr=lr, eps=eps, momentum=0.9, dequantized=[copy])
        return y

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    w, g = torch.randn(4, 32, generator=generator), torch.randn(4, 32, generator=generator)
    tensors = [(w.clone(), g, torch.zeros(4, 32), torch.full((4,), 0.2), torch.zeros(4, 32)) for _ in range(2)]
    for lr, eps in ((0.1, 1.0), (0.05, 0.5), (0.01, 1e-4), (0.0, 0.3)):
        rates = torch.tensor(lr), torch.tensor(eps)
        assert torch.equal(compiled(*tensors[0], *rates), step(*tensors[1], *rates))
        assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend_name", ["aot_eager", "inductor"])
def test_compile_forward_backward(backend_name, generator):
    import torch._dynamo

    torch._dynamo.reset()
    s = torch.rand(4, generator=generator) * 0.1 + 0.05

    def f(x, w):
        return (x @ ops.fake_quantize(w, s, Uniform(4)).t()).pow(2).sum()

    try:
        compiled = torch.compile(f, backend=backend_name, fullgraph=True)
        leaves = [[torch.randn(4, 8, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (1, 2)]
                  for _ in range(2)]  # fmt: skip
        compiled(*leaves[0]).backward()
    except Exception as error:
        if "compiler" in str(error).lower() and backend_name == "inductor":
            pytest.skip("no C++ compiler for inductor")
        raise
    f(*leaves[1]).backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_package_is_importable_as_documented():
    assert ak.ops is ops and callable(ak.ops.fake_quantize)


def test_outputs_of_a_mebibyte_and_more_take_memory_that_was_kept():
    """Also those that fill a huge page by less than four fifths."""
    if runtime._C is None:
        pytest.skip("nothing is compiled")
    for rows in (300, 600):  # 1.1 and 2.3 MiB; where this processor's table pools them
        x, s = torch.randn(rows, 1000), torch.full((rows,), 0.1)
        if x.nbytes < runtime.tuning("cpu")["pooled_bytes"]:
            continue
        ops.fake_quantize(x, s, Uniform(4))
        kept, places = runtime._C.output_pool_bytes(), set()
        for _ in range(3):
            y = ops.fake_quantize(x, s, Uniform(4))
            places.add(y.data_ptr())
            del y
            assert runtime._C.output_pool_bytes() == kept
        assert len(places) == 1
