"""Contract: a result is the same bits on every instruction set, for any number of threads, however a list is cut.

Every C++ operator, every grid, every storage type; rows longer than a piece (16 384 columns), more rows than a band,
tails of every length; hypothesis draws shapes, values, scales and options. Counts, sums and copies included.
"""

from __future__ import annotations

import contextlib
import math

import hypothesis
import oracles
import pytest
import torch
from hypothesis import strategies as st
from oracles import DTYPES, GRIDS, same_bits, same_values

import askew_kernels as ak
from askew_kernels import ops, runtime
from askew_kernels.quant.packing import pack_codes
from askew_kernels.quant.scales import scale_from_sums

pytestmark = pytest.mark.skipif(runtime._C is None, reason="nothing is compiled")


def capabilities():
    """What this build and this processor offer."""
    found = []
    if runtime._C is not None:
        before = runtime.cpu_capability()
        for name in ("baseline", "avx2", "avx512"):
            with contextlib.suppress(ValueError):
                runtime.force_cpu_capability(name)
                found.append(name)
        runtime.force_cpu_capability(before)
    return found


CAPABILITIES = capabilities()


@pytest.fixture(autouse=True)
def restore():
    before, threads = runtime.cpu_capability() if runtime._C is not None else "", torch.get_num_threads()
    yield
    runtime.force_cpu_capability(before)
    torch.set_num_threads(threads)


def everything(x, g, s, grid, seed, lr, eps, **options):
    """The results of all operators, as a list of tensors."""
    rows = s.numel()
    results = [ops.fake_quantize(x, s, grid), ops.fake_quantize(x, s, grid, stochastic=True, seed=seed)]
    for dtype in DTYPES:
        results.append(ops.fake_quantize_out_(x, s, grid, torch.full(x.shape, math.nan, dtype=dtype)))
    results.append(ops.ste_clip_(g.clone(), x, s, grid))
    results += [clipped := g.clone(), ops.ste_clip_scale_grad_(clipped, x, s, grid)]
    leaf = x.clone().requires_grad_()
    ops.fake_quantize(leaf, s, grid).backward(g)
    results += [leaf.grad, ops.project_interval_(x.clone(), s, grid, eps), ops.soft_quantize(x, s, grid, eps)]
    results.append(ops.row_sums(x, rows))
    results.append(ops.run_mse_scales(x, results[-1], grid.levels_tensor(), grid.encoding, grid.c_max, 0))
    results.append(scale_from_sums(results[-2], x.numel() // rows, grid, "rms"))
    for rule in ops.RULES.values():
        for copy_dtype, momentum in ((x.dtype, 0.9), (torch.bfloat16, 0.0)):
            w, states = x.clone(), [[(g * 0.5).clone()], [g.abs() + 0.1]][: len(rule.buffers)]
            copy = torch.full(x.shape, math.nan, dtype=copy_dtype)
            stats = ops.SkewStats.empty_for([x], [s])
            own = {"momentum": momentum} if rule.buffers_if else {"step": 2.0} if rule.counts else {}
            getattr(ops, rule.operator)([w], [g], *states, [s], [grid], lr=lr, eps=eps, dequantized=[copy],
                                        stats=stats, **own, **options)  # fmt: skip
            results += [w, *(b for buffers in states for b in buffers), copy, *stats.row_sums, *stats.totals]
    return results


def on_every_machine(call):
    """``call()`` for each instruction set and thread count; the first result and the rest."""
    results = {}
    for capability, threads in [*((name, 1) for name in CAPABILITIES), (CAPABILITIES[-1], 2), (CAPABILITIES[0], 3)]:
        runtime.force_cpu_capability(capability)
        torch.set_num_threads(threads)
        results[capability, threads] = call()
    first = next(iter(results))
    for key, tensors in results.items():
        for i, (a, b) in enumerate(zip(results[first], tensors, strict=True)):
            assert same_bits(a, b), f"result {i} of {key} differs from {first} in {int((a != b).sum())} elements"
    return results[first]


def inputs(shape, dtype, generator, spread=1.0, special=False):
    x = (torch.randn(shape, generator=generator) * spread).to(dtype)
    g = (torch.randn(shape, generator=generator) * 0.3).to(dtype)
    if special and x.numel() > 12:
        flat, gradient = x.view(-1), g.view(-1)
        flat[:6] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 0.5]).to(dtype)
        gradient[6:10] = torch.tensor([math.inf, -math.inf, math.nan, 0.0]).to(dtype)
    return x, g


def test_there_is_more_than_one_instruction_set():
    assert CAPABILITIES[0] == "baseline"
    assert len(CAPABILITIES) > 1 or not torch.backends.cpu.get_cpu_capability().startswith("AVX")


def test_unknown_capability():
    before = runtime.cpu_capability()
    with pytest.raises(ValueError, match="capability"):
        runtime.force_cpu_capability("mmx")
    assert runtime.cpu_capability() == before


@pytest.mark.parametrize("name", CAPABILITIES[1:])
def test_vnni_changes_no_bits(name, generator):
    """Products with int8 activations, with VNNI and without it: codes that fit sums in int16, and codes that do not."""
    found = {}
    for vnni in (True, False):
        runtime._C.force_cpu_capability(name, vnni=vnni)
        found[vnni] = runtime._C.packed_capability()
        assert runtime.cpu_capability() == name
    if found[True] == found[False]:
        pytest.skip("needs VNNI")
    assert found == {True: f"{name}_vnni", False: name}
    for grid in (ak.quant.Uniform(8), ak.quant.Uniform(4), ak.quant.Uniform(2), ak.quant.Binary(), ak.quant.Ternary()):
        for cols, groups in ((1056, 1), (321, 1), (1024, 8), (640, 5)):
            index = torch.randint(0, len(grid.levels), (37, cols), generator=generator, dtype=torch.uint8)
            bits = ak.quant.code_bits(grid, len(grid.levels) == 3)
            codes, s = pack_codes(index, bits), torch.rand(37 * groups, generator=generator) + 0.1
            for batch in (1, 2, 13):
                x = torch.randn(batch, cols, generator=generator)
                results = []
                for vnni in (True, False):
                    runtime._C.force_cpu_capability(name, vnni=vnni)
                    results.append(ops.packed_linear(x, codes, s, grid, bits, None, "int8"))
                assert same_bits(*results), (grid, cols, groups, batch)


def test_forced_sets_say_what_they_are():
    for name in CAPABILITIES:
        runtime.force_cpu_capability(name)
        assert runtime.cpu_capability() == name and runtime._C.packed_capability().removesuffix("_vnni") == name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_every_grid(name, dtype, generator):
    for shape, special in (((3, 129), True), ((7, 7), False), ((1, 1), False), ((2, 33), True), ((40, 16), False)):
        x, g = inputs(shape, dtype, generator, special=special)
        s = torch.rand(shape[0], generator=generator) * 0.5 + 0.1
        for options in (dict(), dict(skew="direction", weight_decay=0.1, skip_nonfinite=True), dict(clamp=False)):
            on_every_machine(lambda x=x, g=g, s=s, o=options: everything(x, g, s, GRIDS[name], 9, 0.1, 0.3, **o))


@pytest.mark.parametrize("shape", [(1, 70001), (300, 129), (2, 16384 * 2 + 1)])
@pytest.mark.parametrize("name", ["uniform4", "binary"])
def test_large(shape, name, generator):
    """Rows longer than a piece, bands of many rows, one row over all of it; also against the reference."""
    x, g = inputs(shape, torch.float32, generator, special=True)
    for rows in {1, shape[0]}:
        s = torch.rand(rows, generator=generator) * 0.5 + 0.1

        def call(s=s, eps=0.2):
            return everything(x, g, s, GRIDS[name], 2**40 + 1, 0.1, eps)

        results = on_every_machine(call)
        if rows == shape[0] and name == "uniform4":
            with runtime.use_backend("reference"):
                expected = call()
            for a, b in zip(results, expected, strict=True):
                if a.shape == x.shape:  # sums are added in another order
                    assert same_values(a, b)


def test_usual_options_equal_the_general_loop(generator):
    """The loop with its options known to the compiler and the general one: weight_decay that cannot change a bit."""
    x, g = inputs((4, 300), torch.float32, generator)
    s = torch.rand(4, generator=generator) * 0.5 + 0.1
    for eps, clamp in ((1.0, False), (0.3, True)):
        new = [x.clone(), x.clone()]
        for w, weight_decay in zip(new, (0.0, 1e-40), strict=True):
            options = dict(lr=0.1, eps=eps, clamp=clamp, weight_decay=weight_decay)
            ops.skew_sgd_([w], [g], None, [s], [GRIDS["uniform4"]], **options)
        assert same_bits(*new)


def test_list_order_and_cuts(generator):
    """37 tensors of all sizes, in one list, reversed, and in pieces."""
    shapes = [(int(r), int(c)) for r, c in zip(
        torch.randint(1, 9, (37,), generator=generator), torch.randint(0, 6000, (37,), generator=generator), strict=True
    )]  # fmt: skip
    names = list(GRIDS)
    grids = [GRIDS[names[i % len(names)]] for i in range(37)]
    ws, gs = zip(*(inputs(shape, torch.float32, generator) for shape in shapes), strict=True)
    ss = [torch.rand(shape[0], generator=generator) + 0.1 for shape in shapes]

    def run(order, cut):
        new, m = [w.clone() for w in ws], [torch.zeros_like(w) for w in ws]
        copies, stats = [torch.zeros_like(w) for w in ws], ops.SkewStats.empty_for(ws, ss)
        for start in range(0, len(order), cut):
            part = order[start : start + cut]
            pick = lambda items: [items[i] for i in part]  # noqa: B023, E731
            ops.skew_sgd_(
                pick(new), pick(gs), pick(m), pick(ss), pick(grids), lr=0.1, eps=0.2, momentum=0.9,
                dequantized=pick(copies), stats=ops.SkewStats(pick(stats.row_sums), pick(stats.totals)),
            )  # fmt: skip
        return [*new, *m, *copies, *stats.row_sums, *stats.totals]

    order = list(range(37))
    want = run(order, 37)
    for other in (run(order[::-1], 37), run(order, 1), run(order, 5)):
        assert all(same_bits(a, b) for a, b in zip(want, other, strict=True))
    on_every_machine(lambda: run(order, 37))


FLOATS = st.one_of(
    st.floats(-8, 8, width=32),
    st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.5, 1e-45, 3e38, -3e38, math.inf, -math.inf, math.nan]),
)


@hypothesis.settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 40),
    values=st.lists(FLOATS, min_size=1, max_size=40),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    name=st.sampled_from(list(GRIDS)),
    dtype=st.sampled_from(DTYPES),
    lr=st.floats(0, 2),
    eps=st.floats(2.0**-16, 1.0),
    direction=st.booleans(),
    clamp=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_shapes_and_values(rows, cols, values, scale, name, dtype, lr, eps, direction, clamp, seed):
    """All machines and the reference: the same bits; the quantized values: the float64 oracle's."""
    count = rows * cols
    x = torch.tensor((values * (count // len(values) + 1))[:count]).reshape(rows, cols).to(dtype)
    g = x.flip(0, 1).contiguous() * 0.5
    s = torch.full((rows,), scale)
    grid = GRIDS[name]
    skew = "direction" if direction else "gradient"

    def call():
        return everything(x, g, s, grid, seed, lr, eps, skew=skew, clamp=clamp)

    results = on_every_machine(call)
    want = oracles.fake_quantize(x, s, grid).to(dtype)
    assert torch.equal(results[0].nan_to_num(7.0), want.nan_to_num(7.0))
    with runtime.use_backend("reference"):
        expected = call()
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        if a.shape == x.shape and a.dtype in DTYPES and a.shape != (rows, 3):
            assert same_values(a, b), f"result {i} is not the reference's"


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (4, 576), (3, 1040), (2, 33), (2, 40_000)], ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_a_usual_step_leaves_behind(momentum, eps, shape):
    """Without totals the sums are added up by the step itself, and large copies go past the caches: the bits of
    ``row_sums`` and ``fake_quantize`` of the new weights, on every instruction set."""
    g = torch.Generator().manual_seed(sum(shape))
    start, grad = (torch.randn(shape, generator=g) for _ in range(2))
    s, grid, seen = torch.rand(shape[0], generator=g) * 0.2 + 0.1, ak.quant.Uniform(4), []
    with runtime.kept_tuning():
        for capability, past in [(c, p) for c in CAPABILITIES for p in (1, 1 << 40)]:
            runtime.force_cpu_capability(capability)
            runtime.use_tuning({"cpu": {"streaming_bytes": past}})
            for dtype in (torch.float32, torch.bfloat16):
                w, m, copy = start.clone(), torch.zeros_like(start), torch.full(shape, 7.0, dtype=dtype)
                stats = ops.SkewStats([torch.full((shape[0], 3), 7.0)])
                ops.skew_sgd_([w], [grad], [m] if momentum else None, [s], [grid], lr=0.1, eps=eps, clamp=eps < 1,
                              momentum=momentum, dequantized=[copy], stats=stats)  # fmt: skip
                assert same_bits(stats.row_sums[0], ops.row_sums(w, shape[0]))
                expected = torch.empty_like(copy)
                ops.fake_quantize_out_(w, s, grid, expected)
                assert same_bits(copy, expected)
                seen.append(w)
    assert all(same_bits(w, seen[0]) for w in seen)
