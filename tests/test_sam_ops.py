"""Contract: the passes of a sharpness-aware step (sam_norm, sam_perturb_, sam_restore_, sam_average_).

1. They are the formulas of docs/mathematics.md, section 4, in float64, to the roundings beside the comparison.
2. The compiled passes, the reference and every instruction set and thread count agree: bit for bit where one element
   becomes one element, and for the norm bit for bit between instruction sets and thread counts.
3. The copy is the weight bit for bit, NaN payloads included; coefficients (0, 0) leave every weight as it is.
4. Any dense layout, any length, shifted views, lists of mixed types; nothing outside of a tensor is written.
5. Bad arguments: an error that names them, before anything is written.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import DTYPES, EPSILON, TINY, Uniform, same_bits

from askew_kernels import ops, reference, runtime, tuning

SHAPES = [(0,), (1,), (7,), (129,), (5, 3), (4, 40), (2, 3, 5, 7), (70_001,), (512, 512)]
compiled = pytest.mark.skipif(runtime._C is None, reason="nothing is compiled")
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def some(shape, dtype, generator, spread=1.0):
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def problem(dtype, generator, shapes=SHAPES):
    weights = [some(s, dtype, generator, 0.5) for s in shapes]
    grads = [some(s, dtype, generator, 0.1) for s in shapes]
    return weights, grads, [i % 2 == 0 for i in range(len(shapes))]


def perturbed64(w, g, adaptive, eta, c, a):
    w, g = (t.double().numpy() for t in (w, g))
    t = np.abs(w) + eta if adaptive else np.ones_like(w)
    return w + (c * t * t - a) * g


def norm64(weights, grads, adaptive, eta):
    return sum(
        float((((np.abs(w.double().numpy()) + eta if adapted else 1.0) * g.double().numpy()) ** 2).sum())
        for w, g, adapted in zip(weights, grads, adaptive, strict=True)
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_formulas(backend, dtype, generator):
    weights, grads, adaptive = problem(dtype, generator)
    total = ops.sam_norm(weights, grads, adaptive=adaptive, eta=0.01)
    # T, T g and its square are rounded once each (3 roundings of a term), then at most 32 float additions of terms >= 0
    unit = EPSILON[torch.float64 if dtype == torch.float64 else torch.float32]
    assert total.dtype == torch.float64 and total.shape == ()
    assert float(total) == pytest.approx(norm64(weights, grads, adaptive, 0.01), rel=(2 * 3 + 32) * unit)
    c, a = 0.7, 0.05
    kept = [torch.full_like(w, math.nan) for w in weights]
    moved = [w.clone() for w in weights]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    coefficients = torch.tensor([c, a], dtype=kind)
    ops.sam_perturb_(moved, grads, kept, coefficients, adaptive=adaptive, eta=0.01)
    for w, g, adapted, new, copy in zip(weights, grads, adaptive, moved, kept, strict=True):
        assert same_bits(copy, w)
        exact = perturbed64(w, g, adapted, 0.01, float(coefficients[0]), float(coefficients[1]))
        terms = np.abs(exact) + (c * (np.abs(w.double().numpy()) + 1) ** 2 + a) * np.abs(g.double().numpy())
        bound = 8 * unit * terms + EPSILON[dtype] * np.abs(exact)  # 6 operations, then the storage type
        assert (np.abs(new.double().numpy() - exact) <= bound + TINY[dtype]).all()
    seconds = [some(w.shape, dtype, generator) for w in weights]
    means = [g.clone() for g in seconds]
    ops.sam_average_(means, grads, coefficients)
    for mean, g, first in zip(means, seconds, grads, strict=True):
        exact = 0.5 * (g.double() + first.double())
        assert ((mean.double() - exact).abs() <= (EPSILON[dtype] + unit) * exact.abs() + TINY[dtype]).all()
    ops.sam_restore_(moved, kept)
    assert all(same_bits(w, new) for w, new in zip(weights, moved, strict=True))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_equals_reference(dtype, generator):
    weights, grads, adaptive = problem(dtype, generator)
    flags = [int(flag) for flag in adaptive]
    for c, a in ((0.3, 0.0), (0.0, 0.02), (2.0, 0.5), (0.0, 0.0)):
        coefficients = torch.tensor([c, a])
        results = []
        for backend in ("cpp", "reference"):
            moved, kept = [w.clone() for w in weights], [torch.full_like(w, 5.0) for w in weights]
            means = [w.clone() for w in weights]
            with runtime.use_backend(backend):
                ops.sam_perturb_(moved, grads, kept, coefficients, adaptive=adaptive, eta=0.01)
                ops.sam_average_(means, grads, coefficients)
                total = ops.sam_norm(weights, grads, adaptive=adaptive, eta=0.01)
            results.append(([*moved, *kept, *means], total))
        assert all(same_bits(x, y) for x, y in zip(results[0][0], results[1][0], strict=True)), (c, a)
        # the same float32 squares; at most 32 of them are added in float32
        assert float(results[0][1]) == pytest.approx(float(results[1][1]), rel=33 * 2.0**-24)
    assert reference.sam_norm(weights, grads, flags, 0.01).dtype == torch.float64


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_machine(dtype, generator):
    before, threads = runtime.cpu_capability(), torch.get_num_threads()
    found = [n for n in ("baseline", "avx2", "avx512") if _has(n)]
    weights, grads, adaptive = problem(dtype, generator)
    results = []
    try:
        for capability, count in [*itertools.product(found, (1, 2)), (found[-1], 3)]:
            runtime.force_cpu_capability(capability)
            torch.set_num_threads(count)
            moved, kept = [w.clone() for w in weights], [torch.full_like(w, 5.0) for w in weights]
            total = ops.sam_norm(weights, grads, adaptive=adaptive, eta=0.01)
            ops.sam_perturb_(moved, grads, kept, torch.tensor([0.4, 0.01]), adaptive=adaptive, eta=0.01)
            back = [m.clone() for m in moved]
            ops.sam_restore_(back, kept)
            results.append([total, *moved, *kept, *back])
    finally:
        runtime.force_cpu_capability(before)
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(same_bits(w, b) for w, b in zip(weights, results[0][-len(weights) :], strict=True))


def _has(capability):
    before = runtime.cpu_capability()
    try:
        runtime.force_cpu_capability(capability)
    except ValueError:
        return False
    runtime.force_cpu_capability(before)
    return True


@compiled
def test_non_temporal_stores_write_the_same(generator):
    """Past 16 MiB the copy and the restore go around the caches; also where the buffer is not aligned to 64 bytes."""
    n = (17 << 20) // 4 + 5
    w, g = some((n,), torch.float32, generator), some((n,), torch.float32, generator)
    before = runtime.cpu_capability()
    for capability, shift in [*((name, 0) for name in ("baseline", "avx2", "avx512") if _has(name)), (before, 1)]:
        runtime.force_cpu_capability(capability)
        room, copy = torch.full((n + 64,), 7.0), torch.full((n + 64,), 7.0)
        start = (-(room.data_ptr() // 4)) % 16 + shift
        other = (-(copy.data_ptr() // 4)) % 16 + shift
        moved, kept = room[start : start + n], copy[other : other + n]
        moved.copy_(w)
        ops.sam_perturb_([moved], [g], [kept], torch.tensor([0.5, 0.0]), adaptive=True, eta=0.01)
        assert torch.equal(kept, w)
        assert torch.equal(moved, w + (0.5 * ((w.abs() + 0.01) * (w.abs() + 0.01)) - 0.0) * g)
        ops.sam_restore_([moved], [kept])
        assert torch.equal(moved, w)
        for buffer, first in ((room, start), (copy, other)):
            assert (buffer[:first] == 7).all() and (buffer[first + n :] == 7).all()
    runtime.force_cpu_capability(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_a_weight_comes_back(backend, dtype):
    """All 65536 patterns of a half, and as many of a float: signalling NaN, -0, denormals."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int64)
    bits = patterns.to(torch.int16) if dtype != torch.float32 else (patterns * 65521).to(torch.int32)
    w = bits.view(dtype).clone()
    kept = torch.zeros_like(w)
    ops.sam_perturb_([w], [torch.ones_like(w)], [kept], torch.tensor([0.5, 0.0]), adaptive=False)
    if backend == "cpp":
        assert torch.equal(kept.view(INTEGER[dtype]), bits)
    ops.sam_restore_([w], [kept])
    if backend == "cpp":
        assert torch.equal(w.view(INTEGER[dtype]), bits)
    assert same_bits(w, bits.view(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_direction_no_move(backend, dtype, generator):
    w = some((333,), dtype, generator)
    w[3], w[4] = -0.0, math.inf
    g = some((333,), dtype, generator)
    g[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    moved, kept = w.clone(), torch.zeros_like(w)
    ops.sam_perturb_([moved], [g], [kept], torch.zeros(2), adaptive=True, eta=0.01)
    assert same_bits(moved, w) and same_bits(kept, w)
    assert torch.equal(moved.signbit(), w.signbit())
    mean = w.clone()
    ops.sam_average_([mean], [g], torch.zeros(2))
    assert same_bits(mean, w)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_norm_of_non_finite_gradients(backend, bad, generator):
    w, g = some((40_000,), torch.float32, generator), some((40_000,), torch.float32, generator)
    g[39_999] = bad
    assert not math.isfinite(float(ops.sam_norm([w], [g])))
    assert float(ops.sam_norm([w], [torch.zeros_like(g)])) == 0


def test_layouts(backend, generator):
    """Channels-last, transposed and expanded gradients; a strided weight is written through."""
    for make in (
        lambda: some((4, 3, 5, 6), torch.float32, generator).to(memory_format=torch.channels_last),
        lambda: some((6, 9), torch.float32, generator).t(),
        lambda: some((6, 9), torch.float32, generator)[:, ::2],
    ):
        w = make()
        before = w.clone()
        g = some(w.shape, torch.float32, generator)
        expected = before + (0.5 * (before.abs() + 0.1) ** 2) * g
        kept = torch.empty_like(w)
        norm = ops.sam_norm([w], [g], adaptive=True, eta=0.1)
        assert float(norm) == pytest.approx(norm64([before], [g], [True], 0.1), rel=40 * 2.0**-24)
        ops.sam_perturb_([w], [g], [kept], torch.tensor([0.5, 0.0]), adaptive=True, eta=0.1)
        torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(kept, before)
        ops.sam_restore_([w], [kept])
        assert torch.equal(w, before)


def test_version_counters_move(generator):
    w, g, kept = (some((5,), torch.float32, generator) for _ in range(3))
    versions = [t._version for t in (w, kept)]
    ops.sam_perturb_([w], [g], [kept], torch.tensor([0.5, 0.0]))
    assert [t._version for t in (w, kept)] > versions
    version = w._version
    ops.sam_restore_([w], [kept])
    assert w._version > version


def test_bad_arguments(generator):
    w, g, c = some((4,), torch.float32, generator), some((4,), torch.float32, generator), torch.tensor([0.1, 0.0])
    before = w.clone()
    for call, error, match in (
        (lambda: ops.sam_norm([], []), ValueError, "params"),
        (lambda: ops.sam_norm([w], []), ValueError, "grads"),
        (lambda: ops.sam_norm([w], [g.double()]), ValueError, r"grads\[0\]"),
        (lambda: ops.sam_norm([w], [g], eta=-1.0), ValueError, "eta"),
        (lambda: ops.sam_norm([w], [g], adaptive=[True, False]), ValueError, "adaptive"),
        (lambda: ops.sam_norm([w, w.double()], [g, g.double()]), TypeError, r"params\[1\]"),
        (lambda: ops.sam_perturb_([w], [g], [g[:3]], c), ValueError, r"kept\[0\]"),
        (lambda: ops.sam_perturb_([w], [g], [g.clone()], c.double()), ValueError, "coefficients"),
        (lambda: ops.sam_perturb_([w], [g], [g.clone()], 0.1), TypeError, "coefficients"),
        (lambda: ops.sam_perturb_([w], [g], [g.clone()], torch.tensor([0.1])), ValueError, "coefficients"),
        (lambda: ops.sam_restore_([w], []), ValueError, "kept"),
        (lambda: ops.sam_average_([w], [g.half()], c), ValueError, r"firsts\[0\]"),
        (lambda: ops.sam_norm([w.to(torch.complex64)], [g]), TypeError, r"params\[0\]"),
    ):
        with pytest.raises(error, match=match):
            call()
    assert torch.equal(w, before)


@compiled
def test_operators_check_before_they_touch_memory(generator):
    """A direct torch.ops.askew call with wrong sizes."""
    w, g = some((4,), torch.float32, generator), some((3,), torch.float32, generator)
    for call in (
        lambda: torch.ops.askew.sam_norm([w], [g], [0], 0.0),
        lambda: torch.ops.askew.sam_norm([w], [w], [], 0.0),
        lambda: torch.ops.askew.sam_perturb_([w], [w], [g], torch.zeros(2), [0], 0.0),
        lambda: torch.ops.askew.sam_perturb_([w], [w], [w.half()], torch.zeros(2), [0], 0.0),
        lambda: torch.ops.askew.sam_perturb_([w], [w], [w.clone()], torch.zeros(3), [0], 0.0),
        lambda: torch.ops.askew.sam_restore_([w], [g]),
        lambda: torch.ops.askew.sam_restore_([w[::2]], [g[:2]]),
        lambda: torch.ops.askew.sam_average_([w], [g], torch.zeros(2)),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "usual"])
@pytest.mark.parametrize("streaming_bytes", [1, tuning.NEVER], ids=["past caches", "through caches"])
@pytest.mark.parametrize("coefficients", [(0.3, 0.01), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ops.RULES)
def test_descent_inside_the_base_update(backend, rule, dtype, coefficients, streaming_bytes, traced, generator):
    """Kept weights read in place of w, the mean of two gradients in place of g: the bits of the separate passes."""
    if streaming_bytes == 1 and backend != "cpp":
        pytest.skip("a choice of the compiled CPU passes")
    row, grid, shapes = ops.RULES[rule], Uniform(4), [(3, 129), (40, 32), (1, 40_000), (2, 7)]
    ws, gs, firsts = ([some(s, dtype, generator, 0.5) for s in shapes] for _ in range(3))
    gs[0][0, 0], firsts[1][0, 0] = math.inf, math.nan
    scales = [torch.full((s[0],), 0.1) for s in shapes]
    pair = torch.tensor(coefficients)

    def run(params, grads, *descent):
        states = [[torch.full_like(w, 0.1) for w in ws] for _ in row.buffers]
        copies = [torch.zeros_like(w) for w in ws]
        stats = ops.SkewStats.empty_for(ws, scales)
        if not traced:
            stats.totals.clear()
        numbers = row.numbers_of({**row.defaults, "momentum": 0.9, "weight_decay": 0.01})
        ops.run_skew_update(
            row, params, grads, states, scales, [grid.levels_tensor(torch.device("cpu"))] * len(ws),
            grid.encoding * len(ws), copies, stats, step=torch.tensor(2.0), lr=torch.tensor(0.1), eps=torch.tensor(0.3),
            alpha=0.7, numbers=numbers, direction=False, clamp=True, maximize=False, skip_nonfinite=False,
            contiguous=True, descent=descent,
        )  # fmt: skip
        return [*params, *itertools.chain(*states), *copies, *stats.row_sums, *stats.totals]

    means = [g.clone() for g in gs]
    ops.sam_average_(means, firsts, pair)
    partly = [w.clone() if i % 2 else torch.empty(0, dtype=dtype) for i, w in enumerate(ws)]
    expected = run([w.clone() for w in ws], means)
    with runtime.kept_tuning():
        runtime.use_tuning({"cpu": {"streaming_bytes": streaming_bytes}})
        away = [torch.full_like(w, 55.0) for w in ws]
        got = run(away, [g.clone() for g in gs], [w.clone() for w in ws], firsts, pair)
        assert all(map(same_bits, got, expected))
        got = run([torch.full_like(w, 55.0) if i % 2 else w.clone() for i, w in enumerate(ws)], means, partly)
        assert all(map(same_bits, got, expected))
