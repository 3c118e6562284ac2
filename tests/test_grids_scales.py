"""Contract: grids and scale rules are docs/mathematics.md, section 1.

Levels against formulas written here; scales against NumPy float64 of the same formulas within 4 float32 roundings
(two sums rounded to float32, the result rounded, and cancellation in SAWB's difference, derived where it is used);
floors, zero rows, NaN rows and empty tensors give usable scales; bad arguments are errors that name the argument.
Every grid has a default rule that comes near the least error. Tables of levels and scales are the same whatever mode
they are first asked for in: inference, fake tensors, tracing, another default device or dtype, torch.func.
"""

from __future__ import annotations

import contextlib
import math

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, GRANULARITIES, GRIDS, Binary, Codebook, Ternary, Uniform
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import askew_kernels as ak
from askew_kernels import contract, reference
from askew_kernels.quant import (
    NF4,
    QuantConfig,
    activation_scales,
    compute_scale,
    default_rule,
    grid_from_dict,
    num_rows,
)
from askew_kernels.quant.scales import round_scale, rule_code, scale_from_sums

SAWB = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80), 5: (17.74, 18.64), 8: (31.76, 35.04)}


# ---- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(2, 9))
def test_uniform_levels(k):
    half = 2 ** (k - 1)
    assert Uniform(k).levels == tuple(float(c) for c in range(-half, half))
    assert Uniform(k, narrow=True).levels == tuple(float(c) for c in range(-half + 1, half))
    assert Uniform(k, inclusive=True).levels == tuple(float(c) for c in range(-half, half + 1))
    assert Uniform(k, signed=False).levels == tuple(float(c) for c in range(2**k))
    assert len(Uniform(k, inclusive=True).levels) == 2**k + 1
    assert Uniform(bits=k).bits == k


def test_other_levels():
    assert Binary().levels == (-1.0, 1.0) and Binary().bits == 1
    assert Ternary().levels == (-1.0, 0.0, 1.0) and Ternary().bits == 2
    assert Codebook([-1, 0.5, 2]).levels == (-1.0, 0.5, 2.0) and Codebook([-1, 0.5, 2]).bits == 2
    assert Codebook(torch.linspace(-1, 1, 16)).bits == 4
    assert Codebook([0.1, 0.2]).levels == tuple(np.array([0.1, 0.2], np.float32).astype(float))
    assert not math.copysign(1, Codebook([-1, -0.0, 1]).levels[1]) < 0  # no level is -0
    assert len(Codebook(range(256)).levels) == 256


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (dict(bits=1), ValueError, "Binary"), (dict(bits=0), ValueError, "bits"), (dict(bits=9), ValueError, "bits"),
    (dict(bits=4.0), TypeError, "bits"), (dict(bits=True), TypeError, "bits"),
    (dict(bits=4, narrow=True, inclusive=True), ValueError, "narrow"),
    (dict(bits=4, signed=False, narrow=True), ValueError, "signed"), (dict(bits=np.bool_(True)), TypeError, "bits"),
    *[(dict(bits=4, **{flag: value}), TypeError, f"{flag}: expected True or False, got {value!r}")
      for flag in ("signed", "narrow", "inclusive") for value in (-1, 0, 2, "yes", "no", None, 1.0)],
])  # fmt: skip
def test_uniform_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        Uniform(**arguments)


@pytest.mark.parametrize("levels", [
    [1.0], [], list(range(257)), [1.0, 0.0], [0.0, 0.0, 1.0], [0.0, math.nan], [-math.inf, 0.0], [0.0, 1e39],
    [1.0, 1.0 + 1e-9], [-1e30, 0.0, 1e30], [1e-30, 2e-30], [0.0, 2.0**21],
])  # fmt: skip
def test_codebook_errors(levels):
    with pytest.raises(ValueError, match="levels"):
        Codebook(levels)


@pytest.mark.parametrize("levels", [["a", "b"], [None, 1.0], 3, [1j, 2.0]])
def test_codebook_type_errors(levels):
    with pytest.raises(TypeError, match="^levels"):
        Codebook(levels)


@pytest.mark.parametrize("top", [2.0**-20, 1e-3, 1e4, 2.0**20])
def test_levels_of_any_allowed_size(top, backend, generator):
    """The scale takes the size of the levels up: the quantized weights are those of the same levels up to 1."""
    w = torch.randn(4, 64, generator=generator)
    for rule in ("absmax", "rms", "mse"):
        one, other = (Codebook([-top, -0.25 * top, 0.5 * top, top]) for top in (1.0, top))
        want = ak.ops.fake_quantize(w, compute_scale(w, one, rule), one)
        got = ak.ops.fake_quantize(w, compute_scale(w, other, rule), other)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_grid_round_trip(name):
    import json

    grid = GRIDS[name]
    again = grid_from_dict(json.loads(json.dumps(grid.to_dict())))
    assert again == grid and again.levels == grid.levels and hash(again) == hash(grid)


@pytest.mark.parametrize("d", [{}, {"grid": "nonsense"}, {"grid": "uniform"}, {"grid": "binary", "bits": 3}])
def test_grid_from_dict_errors(d):
    with pytest.raises(ValueError, match="grid"):
        grid_from_dict(d)


@pytest.mark.parametrize("name", GRIDS)
def test_encoding_is_the_hull(name):
    grid = GRIDS[name]
    table = grid.levels_tensor("cpu")
    if not grid.evenly_spaced:
        assert table.tolist() == list(grid.levels) and table.dtype == torch.float32
    else:
        assert table.numel() == 0 and grid.encoding[1:] == [grid.levels[0], grid.levels[-1]]


# ---- scale rules ----------------------------------------------------------------------------------------------------


def rows_of(w, granularity, group):
    rows = {"per_tensor": 1, "per_channel": w.shape[0], "per_group": w.numel() // (group or 1)}[granularity]
    return oracles.as64(w).reshape(rows, -1)


def best_for_normal(grid):
    """Of clipping points 1/4, 5/16, … 5 the one with the least mean squared error of a standard normal variable."""
    z = np.linspace(-5, 5, 501)
    density, top = np.exp(-(z**2) / 2), max(abs(c) for c in grid.levels)

    def error(scale):
        away = np.abs(z[:, None] / scale - np.array(grid.levels)).min(1) * scale
        return (density * away**2).sum()

    return min((clip / 16 / top for clip in range(4, 81)), key=error)


def expected_scale(m, grid, rule, coefficients=None):
    """float64 transcription of section 1."""
    c_max = max(grid.levels) if max(grid.levels) > 0 else max(abs(c) for c in grid.levels)
    absolute = np.abs(m)
    if rule == "absmax":
        return absolute.max(1) / c_max
    if rule == "rms":
        return np.minimum(best_for_normal(grid) * np.sqrt((m * m).mean(1)), absolute.max(1) / c_max)
    if rule == "mean":
        return (1.0 if len(grid.levels) == 2 else 1.5) * absolute.mean(1)
    c1, c2 = coefficients or SAWB[grid.bits]
    clip = c1 * np.sqrt((m * m).mean(1)) - c2 * absolute.mean(1)
    return np.where(clip > 0, clip, absolute.max(1)) / c_max


def supported(rule, grid):
    if rule == "sawb":
        return grid.bits in SAWB and grid.evenly_spaced
    return rule != "mean" or isinstance(grid, (Binary, Ternary))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rule", ["absmax", "sawb", "mean", "rms"])
def test_rules(rule, granularity, dtype, backend, generator):
    group = GRANULARITIES[granularity]
    for shape in ((5, 8), (3, 4, 2, 2), (1, 4), (2, 132)):
        w = (torch.randn(shape, generator=generator) * 0.3).to(dtype)
        m = rows_of(w, granularity, group)
        # sums: 16 float lanes over 512 columns at most, then double: relative error under 40 roundings; SAWB
        # subtracts numbers that are at most c2 amax / clip times larger than the difference.
        for name, grid in GRIDS.items():
            if not supported(rule, grid):
                continue
            got = compute_scale(w, grid, rule, granularity, group)
            want = expected_scale(m, grid, rule)
            assert got.dtype == torch.float32 and got.shape == (m.shape[0],)
            c_max = max(grid.levels)
            size = want if rule != "sawb" else want + 2 * SAWB[grid.bits][0] * np.sqrt((m * m).mean(1)) / c_max
            close = np.abs(got.numpy() - want) <= 40 * 2**-24 * size
            if rule == "sawb":  # where clip is within rounding of 0 either branch may be taken
                c1, c2 = SAWB[grid.bits]
                clip = c1 * np.sqrt((m * m).mean(1)) - c2 * np.abs(m).mean(1)
                close |= np.abs(clip) < 1e-4 * np.abs(m).mean(1)
            assert close.all(), (name, got, want)


def test_sawb_other_coefficients(generator):
    w = torch.randn(6, 50, generator=generator)
    got = compute_scale(w, Uniform(4), "sawb", sawb_coefficients=(12.1, 12.2))
    torch.testing.assert_close(
        got.double(), torch.from_numpy(expected_scale(oracles.as64(w), Uniform(4), "sawb", (12.1, 12.2))),
        rtol=1e-5, atol=0,
    )  # fmt: skip
    assert not torch.equal(got, compute_scale(w, Uniform(4), "sawb"))
    assert compute_scale(w, Uniform(6), "sawb", sawb_coefficients=(20.0, 20.0)).isfinite().all()


def test_sawb_falls_back_to_absmax():
    w = torch.full((2, 16), 0.5)  # rms = mean, so clip = (12.68 - 12.80) * 0.5 < 0
    assert compute_scale(w, Uniform(4), "sawb").tolist() == [np.float32(0.5 / 7)] * 2


def test_c_max_of_asymmetric_grids():
    w = torch.tensor([[-3.0, 1.0]])
    assert compute_scale(w, Uniform(4), "absmax").item() == np.float32(3 / 7)
    assert compute_scale(w, Uniform(4, inclusive=True), "absmax").item() == np.float32(3 / 8)
    assert compute_scale(w, Uniform(4, signed=False), "absmax").item() == np.float32(3 / 15)
    assert compute_scale(w, Codebook([-4.0, -1.0]), "absmax").item() == np.float32(3 / 4)


@pytest.mark.parametrize("name", ["uniform2", "uniform4", "binary", "ternary", "nf4"])
def test_mse_is_the_best_of_its_candidates(name, generator):
    grid = GRIDS[name]
    w = torch.randn(4, 40, generator=generator)
    got = compute_scale(w, grid, "mse")
    m = oracles.as64(w)
    top = np.abs(m).max(1) / max(grid.levels)

    def error(scale):
        x = m / scale[:, None]
        return ((m - scale[:, None] * oracles.nearest(x, grid.levels, oracles.ties_to_even(grid))) ** 2).sum(1)

    best = np.min([error(top * j / 100) for j in range(1, 101)], axis=0)
    assert (error(got.double().numpy()) <= best * (1 + 1e-5)).all()
    ratio = got.double().numpy() / top * 100
    assert np.allclose(ratio, ratio.round(), atol=1e-3) and (ratio.round() >= 1).all() and (ratio.round() <= 100).all()
    assert (error(got.double().numpy()) <= error(top) * (1 + 1e-5)).all()


# ---- floors and special rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["absmax", "sawb", "mean", "mse"])
def test_zero_and_nonfinite_rows(rule, backend):
    w = torch.ones(6, 9) * torch.linspace(0.1, 1, 9)
    w[1] = 0
    w[2, 3] = math.nan
    w[3, 8] = math.inf
    w[4, 0] = -math.inf
    grid = Ternary()
    scale = compute_scale(w, grid, rule)
    assert scale[2:5].tolist() == [1.0] * 3
    assert (scale > 0).all() and scale.isfinite().all()
    assert scale[0] == scale[5] == compute_scale(w[:1], grid, rule)[0]  # rows that are not zero do not see others
    assert scale[1] == scale[0]


@pytest.mark.parametrize("rule", ["absmax", "sawb", "mean", "mse", "rms"])
def test_rows_of_zeros_take_the_median_of_the_others(rule, backend, generator):
    """A pruned row does not jump to 1 when its first weight moves; the lower median is one of the others' scales."""
    w = torch.randn(8, 16, generator=generator) * torch.logspace(-4, -1, 8)[:, None]
    w[2], w[5], w[6, 3] = 0, 0, math.nan
    scale = compute_scale(w, Ternary(), rule)
    others = scale[[0, 1, 3, 4, 7]]
    assert scale[2] == scale[5] == others.median() and scale[6] == 1
    assert torch.equal(others, compute_scale(w[[0, 1, 3, 4, 7]], Ternary(), rule))
    grouped = compute_scale(w, Ternary(), rule, "per_group", 8)
    assert (grouped[[4, 5, 10, 11]] == grouped[[0, 1, 2, 3, 6, 7, 8, 9, 13, 14, 15]].median()).all()
    assert compute_scale(torch.zeros(3, 4), Ternary(), rule).tolist() == [1.0] * 3
    assert compute_scale(torch.zeros(1, 4), Ternary(), rule, "per_tensor").tolist() == [1.0]


def rule_cases():
    """(grid, rule, type of the scales): every rule, every type."""
    grids = {"absmax": Uniform(4), "sawb": Uniform(3), "mean": Ternary(), "rms": NF4(), "mse": Uniform(4)}
    return [(grid, rule, scale_dtype) for rule, grid in grids.items() for scale_dtype in contract.SCALE_TYPES]


def sums_of(rows, generator):
    """Sums of rows, some of zeros, some not finite, some whose sum has overflown, some tiny."""
    sums = torch.rand(rows, 3, generator=generator) * torch.exp2(torch.randn(rows, 1, generator=generator) * 8)
    sums[torch.rand(rows, generator=generator) < 0.2] = 0
    for value in (torch.tensor([math.nan] * 3), torch.tensor([math.inf] * 3), torch.tensor([math.inf, math.inf, 1e30]),
                  torch.tensor([1e-45, 0.0, 1e-45])):  # fmt: skip
        if rows > 4:
            sums[int(torch.randint(rows, (1,), generator=generator))] = value
    return sums


def test_scales_of_a_list_are_those_of_its_tensors(backend, generator):
    """Rules, types and columns may differ; a row of zeros looks at its own tensor. Bits are the reference's."""
    cases = rule_cases()
    scales, sums, rules, numbers, want = [], [], [], [], []
    for i, (grid, rule, scale_dtype) in enumerate(cases):
        rows, cols = (5, 1, 200, 7, 0, 4500)[i % 6], 3 + i
        code = rule_code(grid, rule, None, scale_dtype)
        given = round_scale(torch.rand(rows, generator=generator), scale_dtype)
        sums.append(sums_of(rows, generator))
        want.append(reference.rule_scales(sums[-1], *code.rule, cols, *code.numbers, given if rule == "mse" else None))
        scales.append(given.clone())
        rules += [*code.rule, cols]
        numbers += code.numbers
    before = [s._version for s in scales]
    ak.ops.run_scales_from_sums(scales, sums, rules, numbers)
    for scale, expected, case in zip(scales, want, cases, strict=True):
        assert torch.equal(scale, expected), case
    assert all(s._version > v for s, v in zip(scales, before, strict=True))


@pytest.mark.parametrize(("grid", "rule", "scale_dtype"), rule_cases())
def test_scales_are_the_formula_in_float64(grid, rule, scale_dtype, generator):
    """Against NumPy's arithmetic, which is IEEE, too."""
    sums, cols, code = sums_of(300, generator), 37, rule_code(grid, rule, None, scale_dtype)
    if rule == "mse":
        return
    total, squares, peak = sums.double().numpy().T
    c_max, first, second = code.numbers
    with np.errstate(all="ignore"):
        top = peak / c_max
        clip = first * np.sqrt(squares / cols) - second * total / cols
        scale = {"absmax": top, "sawb": np.where(clip > 0, clip / c_max, top), "mean": first * total / cols,
                 "rms": np.minimum(first * np.sqrt(squares / cols), top)}[rule]  # fmt: skip
        scale = np.maximum(np.where(np.isfinite(scale), scale, top), 1e-12 * np.maximum(peak, 1))
        usable = (peak > 0) & np.isfinite(peak) & (scale < 2.0**128 - 2.0**103)
        found = scale.astype(np.float32)
    known = np.sort(found[usable])
    found[~usable] = 1
    found[peak == 0] = known[(len(known) - 1) // 2]
    got = scale_from_sums(sums, cols, grid, rule, scale_dtype=scale_dtype)
    assert torch.equal(got, round_scale(torch.from_numpy(found), scale_dtype))
    with FlopCounterMode(display=False):  # a mode, as under a tracer: torch's operators
        assert torch.equal(scale_from_sums(sums, cols, grid, rule, scale_dtype=scale_dtype), got)


@pytest.mark.parametrize("grid", [Uniform(4), Binary(), NF4()])
@pytest.mark.parametrize("shape", [(1, 1), (4, 7), (3, 4100), (1, 16385), (2, 33000)])
def test_mse_scales_are_the_reference_s(grid, shape, backend, generator):
    """The same bits: errors are added in one order everywhere."""
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(shape, generator=generator).to(dtype)
        if shape[0] > 2:
            w[1], w[2, 3] = 0, math.inf
        arguments = (ak.ops.row_sums(w, len(w)), grid.levels_tensor(), grid.encoding, grid.c_max)
        for place in range(len(contract.SCALE_TYPES)):
            got = ak.ops.run_mse_scales(w, *arguments, place)
            assert torch.equal(got, reference.mse_scales(w, *arguments, place)), (dtype, place)


@pytest.mark.parametrize("scale_dtype", contract.SCALE_TYPES)
def test_scales_are_rounded_as_the_reference_rounds(scale_dtype, backend):
    for x in (oracles.scales_at_roundings(), *oracles.scales_in_units()):
        got = scale_from_sums(torch.stack([x, x, x], 1), 1, Ternary(), "absmax", scale_dtype=scale_dtype)
        assert torch.equal(got, round_scale(x, scale_dtype))


def test_of_candidates_with_equal_errors_the_smallest_is_chosen(backend):
    w = torch.tensor([[21.0, 100.0], [100.0, 21.0]])  # (60 - 21)^2 + (100 - 60)^2 = (61 - 21)^2 + (100 - 61)^2
    assert compute_scale(w, Binary(), "mse").tolist() == [60.0, 60.0]


@pytest.mark.parametrize(("arguments", "words"), [
    (([torch.ones(2)], [], [0, 0, 4], [1.0, 0, 0]), "row_sums: expected 1"),
    (([torch.ones(2)], [torch.ones(3, 3)], [0, 0, 4], [1.0, 0, 0]), "row_sums: expected shape"),
    (([torch.ones(2)], [torch.ones(2, 3)], [0, 0], [1.0, 0, 0]), "rules: expected 3"),
    (([torch.ones(2)], [torch.ones(2, 3)], [9, 0, 4], [1.0, 0, 0]), "rules: unknown rule 9"),
    (([torch.ones(2)], [torch.ones(2, 3)], [0, 7, 4], [1.0, 0, 0]), "unknown type of scales 7"),
    (([torch.ones(2)], [torch.ones(2, 3)], [0, 0, 0], [1.0, 0, 0]), "rules: expected columns"),
    (([torch.ones(2)], [torch.ones(2, 3)], [0, 0, 4], [1.0, 0]), "numbers: expected 3"),
    (([torch.ones(2)], [torch.ones(2, 3)], [0, 0, 4], [0.0, 0, 0]), "c_max: expected a positive"),
    (([torch.ones(2).half()], [torch.ones(2, 3)], [0, 0, 4], [1.0, 0, 0]), "scales: expected float32"),
    (([torch.ones(2)], [torch.ones(2, 3).double()], [0, 0, 4], [1.0, 0, 0]), "row_sums: expected float32"),
])  # fmt: skip
def test_the_operator_checks_what_memory_asks_for(arguments, words):
    if ak.runtime.choose_backend("cpu")[0] != "cpp":
        pytest.skip("the compiled operator's checks")
    before = arguments[0][0].clone()
    with pytest.raises(RuntimeError, match=words):
        torch.ops.askew.scales_from_sums_(*arguments)
    assert torch.equal(arguments[0][0], before)


@pytest.mark.parametrize("rule", ["absmax", "sawb", "mean", "mse"])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e-13, 1e20, 3e38])
def test_scales_are_positive_and_finite_at_any_size(rule, size, backend):
    w = torch.tensor([[size, -size / 2, size / 4, 0.0]])
    scale = compute_scale(w, Ternary(), rule)
    assert scale.isfinite().all() and (scale > 0).all()
    floor = 1e-12 * max(1.0, float(w.abs().max()))
    assert scale.item() >= np.float32(floor) * (1 - 2**-23)
    if rule == "absmax":
        assert scale.item() == np.float32(max(floor, float(w.abs().max())))


def test_scales_of_large_finite_weights_are_not_1():
    w = torch.tensor([[1e20, -3e20, 2e20, 0.0]])
    for rule in ("sawb", "mean", "absmax"):
        assert compute_scale(w, Ternary(), rule).item() > 1e19


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,)])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("rule", ["absmax", "sawb", "mse"])
def test_empty(shape, granularity, rule):
    scale = compute_scale(torch.empty(shape), Uniform(4), rule, granularity)
    assert scale.shape == (1 if granularity == "per_tensor" or len(shape) < 2 else shape[0],)  # a vector is one row
    assert (scale == 1).all()


# ---- rows and errors ------------------------------------------------------------------------------------------------


def test_num_rows():
    assert num_rows((6, 4, 3, 3), "per_tensor") == 1
    assert num_rows((6, 4, 3, 3), "per_channel") == 6
    assert num_rows((6, 4, 3, 3), "per_group", 12) == 18
    assert num_rows((8,), "per_group", 4) == 2
    assert num_rows((), "per_channel") == num_rows((8,), "per_channel") == 1


def test_groups_run_along_the_inputs():
    w = torch.arange(1.0, 17.0).reshape(2, 8)
    got = compute_scale(w, Binary(), "absmax", "per_group", 4)
    assert got.tolist() == [4.0, 8.0, 12.0, 16.0]


def test_group_scales_of_a_vector_serve_the_operators():
    w = torch.arange(1.0, 9.0)
    scale = compute_scale(w, Uniform(4), "absmax", "per_group", 4)
    assert scale.shape == (2,)
    assert ak.ops.fake_quantize(w, scale, Uniform(4)).shape == w.shape


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(rule="nonsense"), "rule.*nonsense"), (dict(rule="sawb", grid=Uniform(6)), "sawb.*6 bits"),
    (dict(rule="sawb", grid=Binary()), "sawb.*1 bits"), (dict(rule="sawb", grid=Uniform(7)), "sawb.*7 bits"),
    (dict(rule="mean", grid=Uniform(4)), "mean"), (dict(granularity="per_row"), "granularity.*per_row"),
    (dict(granularity="per_group"), "group_size"), (dict(granularity="per_group", group_size=0), "group_size"),
    (dict(granularity="per_group", group_size=5), "group_size: 5 does not divide"),
    (dict(granularity="per_group", group_size=True), "group_size"), (dict(group_size=4), "group_size"),
    (dict(sawb_coefficients=(1.0,)), "sawb_coefficients"), (dict(sawb_coefficients=(1, math.nan)), "sawb_coefficients"),
])  # fmt: skip
def test_errors(arguments, words):
    call = dict(grid=Uniform(4), rule="sawb", granularity="per_channel") | arguments
    with pytest.raises(ValueError, match=words):
        compute_scale(torch.randn(4, 8), **call)


@pytest.mark.parametrize("w", [None, torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2, dtype=torch.complex64)])
def test_type_errors(w):
    with pytest.raises(TypeError, match="^w:"):
        compute_scale(w, Uniform(4))
    with pytest.raises(TypeError, match="^grid:"):
        compute_scale(torch.ones(2, 2), "uniform4")


# ---- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    QuantConfig(), QuantConfig(weight=Binary(), scale="mean", granularity="per_tensor", forward="relaxed"),
    QuantConfig(weight=Uniform(6), sawb_coefficients=(20.0, 21.0), granularity="per_group", group_size=32),
    QuantConfig(weight=Codebook(oracles.NF4), scale="absmax", ste_clip=False),
    QuantConfig(weight=Uniform(3, inclusive=True), scale="mse"),
])  # fmt: skip
def test_config_round_trip(config):
    assert QuantConfig.from_json(config.to_json()) == config
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert hash(QuantConfig.from_json(config.to_json())) == hash(config)


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (dict(weight=4), TypeError, "weight"), (dict(weight=None), TypeError, "weight"),
    (dict(forward="soft"), ValueError, "forward"), (dict(scale="nonsense"), ValueError, "scale"),
    (dict(scale=0.1), TypeError, "scale"), (dict(scale=torch.ones(3)), TypeError, "scale"),
    (dict(weight=Uniform(6), scale="sawb"), ValueError, "scale: .* 6 bits .*absmax"),
    (dict(granularity="x"), ValueError, "granularity"),
    (dict(group_size=4), ValueError, "group_size"), (dict(granularity="per_group"), ValueError, "group_size"),
    (dict(ste_clip="no"), ValueError, "ste_clip"), (dict(ste_clip=1), TypeError, "ste_clip"),
    (dict(sawb_coefficients=(math.nan, 1.0)), ValueError, "sawb_coefficients"),
    (dict(sawb_coefficients=("a", 1.0)), TypeError, "sawb_coefficients"),
    (dict(sawb_coefficients=3.0), ValueError, "sawb_coefficients"),
    (dict(sawb_coefficients="12"), ValueError, "sawb_coefficients"),
    (dict(scale="absmax", sawb_coefficients=(1.0, 2.0)), ValueError, "sawb_coefficients"),
])  # fmt: skip
def test_config_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        QuantConfig(**arguments)


def test_numbers_of_numpy_are_numbers():
    config = QuantConfig(Uniform(np.int64(4), narrow=np.bool_(False)), granularity="per_group", group_size=np.int32(8),
                         sawb_coefficients=np.array([12.5, 12.0]), ste_clip=np.bool_(True))  # fmt: skip
    same = QuantConfig(Uniform(4), granularity="per_group", group_size=8, sawb_coefficients=(12.5, 12.0))
    assert config == same and QuantConfig.from_json(config.to_json()) == same


def test_default_rule_comes_near_the_least_error(generator):
    """Within a third of ``mse``, for every grid that weights are put on, and weights as layers draw and train them."""
    normal = torch.randn(16, 512, generator=generator)
    weights = [normal, torch.rand(16, 512, generator=generator) - 0.5, normal * normal.abs().sqrt()]
    grids = [Binary(), Ternary(), *map(Uniform, range(2, 9)), *[Uniform(k, narrow=True) for k in (2, 3, 4, 6, 8)],
             *[Codebook(np.linspace(-1, 1, n)) for n in (2, 3, 4, 5, 8, 9, 16, 64, 256)], Codebook(oracles.NF4),
             Codebook([-1, -0.2, 0.3, 0.5])]  # fmt: skip
    for grid in grids:
        config = QuantConfig(weight=grid)
        assert config == QuantConfig(weight=grid, scale=default_rule(grid)) == QuantConfig.from_json(config.to_json())
        for i, w in enumerate(weights):
            error, least = (
                (ak.ops.fake_quantize(w, compute_scale(w, grid, rule), grid) - w).norm()
                for rule in (config.scale, "mse")
            )
            assert error <= 1.34 * least, (grid, i, error / least)


def test_the_default_rule_is_todays_for_up_to_four_bits():
    assert [default_rule(Uniform(k)) for k in range(2, 9)] == ["sawb"] * 3 + ["absmax"] * 4
    assert default_rule(Binary()) == default_rule(Ternary()) == "mean"
    assert QuantConfig(weight=Uniform(6), sawb_coefficients=(20, 21)).scale == "sawb"


def test_sawb_of_a_codebook_wants_coefficients_of_its_own(generator):
    grid, w = Codebook(oracles.NF4), torch.randn(4, 64, generator=generator)
    for call, name in (
        (lambda: QuantConfig(weight=grid, scale="sawb"), "scale"),
        (lambda: compute_scale(w, grid, "sawb"), "rule"),
        (lambda: ak.optim.ASkewSGD([{"params": [w], "grid": grid, "scale": "sawb"}], lr=0.1), "scale"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: sawb.*evenly spaced.*Codebook\(.*sawb_coefficients.*absmax"):
            call()
    assert QuantConfig(weight=grid, sawb_coefficients=(12.0, 12.0)).scale == "sawb"
    assert QuantConfig(weight=grid).scale == "absmax"


def test_what_was_saved_with_borrowed_coefficients_is_read_with_these():
    """Earlier releases gave a codebook the coefficients of the evenly spaced levels of its bits."""
    saved = {"weight": Codebook(oracles.NF4).to_dict(), "scale": "sawb", "sawb_coefficients": None}
    assert QuantConfig.from_dict(saved) == QuantConfig(Codebook(oracles.NF4), sawb_coefficients=SAWB[4])


def test_config_from_dict_errors():
    with pytest.raises(ValueError, match="colour"):
        QuantConfig.from_dict({**QuantConfig().to_dict(), "colour": "red"})
    with pytest.raises(ValueError, match="grid"):
        QuantConfig.from_dict({"scale": "sawb"})


# ---- activations ----------------------------------------------------------------------------------------------------


def test_activation_scales(generator):
    x = torch.randn(5, 8, generator=generator)
    x[1], x[2, 3], x[3, 0] = 0, math.inf, math.nan
    scales = activation_scales(x, [7.0, 1.0], 5)
    assert torch.equal(scales[:, [0, 4]], torch.stack([x[[0, 4]].abs().amax(1) / c for c in (7.0, 1.0)]))
    assert (scales[:, 1] == 1).all() and scales[:, 2:4].isnan().all()


@pytest.mark.parametrize("activation", [Uniform(8), Uniform(4, signed=False), Binary(), Codebook(oracles.NF4)])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_goes_through_a_quantized_input(activation, value, dtype, backend, generator):
    """As without quantization: the token's outputs are not finite, the others are as they were."""
    layer = ak.nn.AskewLinear(40, 3, config=QuantConfig(weight=Uniform(8), activation=activation)).to(dtype)
    x = torch.randn(4, 40, generator=generator).to(dtype)
    want = layer(x)
    x[1, 33] = value
    got = layer(x)
    assert not got[1].isfinite().any() and torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


# ---- whatever the mode ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "none": contextlib.nullcontext, "inference": torch.inference_mode, "fake": FakeTensorMode,
    "meta": lambda: torch.device("meta"), "float64": lambda: default_dtype(torch.float64),
    "counting": lambda: FlopCounterMode(display=False),
}  # fmt: skip


def fresh_codebook():
    """Levels that no other test has asked for."""
    fresh_codebook.count += 1
    return Codebook([-1.0, 0.25 + fresh_codebook.count * 2.0**-12, 1.0])


fresh_codebook.count = 0


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_tables_belong_to_no_mode(first, second):
    with MODES[first]():
        grid = fresh_codebook()
        grid.levels_tensor()
    with MODES[second]():
        table, none = grid.levels_tensor(), Ternary().levels_tensor()
    for t in (table, none):
        assert type(t) is (FakeTensor if second == "fake" else torch.Tensor)
        assert t.dtype == torch.float32 and t.device.type == "cpu" and not t.is_inference()
    if second != "fake":
        assert table.tolist() == list(grid.levels)


TRAINED = {
    "weights": {}, "int8": {"forward": "int8"}, "4-bit gradients": {"gradient": ak.quant.LUQ(bits=4)},
    "int8 both ways": {"forward": "int8", "gradient": "int8"}, "learned": {"scale": "lsq"},
    "learned inputs": {"activation": Uniform(4, signed=False), "activation_scale": "lsq+"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TRAINED)
def test_trainings_do_not_ask_for_the_default_type(name, dtype):
    states, k = [], {"dtype": torch.float32}
    for default in (torch.float32, dtype):
        with default_dtype(default):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(16, 16, **k), torch.nn.ReLU(), torch.nn.Linear(16, 4, **k))
            ak.quantize_(model, QuantConfig(Uniform(4), **TRAINED[name]))
            optimizer, x = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05), torch.randn(8, 16, **k)
            recipe = ak.Recipe(model, optimizer, 6, full=0.5)
            for _ in range(6):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                recipe.step()
            levels = ak.ops.stochastic_levels(x, seed=1)
            kept = ak.nn.QuantizedKV(4, 8, symmetric=True)(x[None], x[None])
            states.append([*model.state_dict().values(), *levels, *kept])
    for a, b in zip(*states, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacfwd", "jacrev"])
def test_tables_belong_to_no_transform(transform):
    grid, s = fresh_codebook(), torch.ones(3)
    getattr(torch.func, transform)(lambda x: ak.ops.fake_quantize(x, s, grid).sum())(torch.randn(3, 3))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(grid.levels_tensor())
    assert grid.levels_tensor().tolist() == list(grid.levels)


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("how", ["strict", "not strict", "compile"])
def test_tables_belong_to_no_trace(how, warm, generator):
    """A traced function keeps levels of its own, and what is quantized afterwards is right."""
    grid, x = fresh_codebook(), torch.randn(4, 6, generator=generator)
    s = compute_scale(x, grid)

    class Quantize(torch.nn.Module):
        def forward(self, x):
            return ak.ops.fake_quantize(x, s, grid) + ak.ops.fake_quantize(x, s, Ternary())

    if warm:
        grid.levels_tensor()
    if how == "compile":
        torch._dynamo.reset()
        traced = torch.compile(Quantize(), backend="aot_eager", fullgraph=True)
        got = traced(x)
    else:
        got = torch.export.export(Quantize(), (x,), strict=how == "strict").module()(x)
    assert type(grid.levels_tensor()) is torch.Tensor and grid.levels_tensor().tolist() == list(grid.levels)
    assert torch.equal(got, Quantize()(x))


@pytest.mark.parametrize("mode", ["inference", "meta", "float64", "counting"])
@pytest.mark.parametrize("rule", ["absmax", "sawb", "mean", "rms", "mse"])
def test_scales_do_not_depend_on_the_mode(rule, mode, generator):
    w = torch.randn(5, 12, generator=generator)
    w[3] = 0
    want = compute_scale(w, Ternary(), rule)
    with MODES[mode]():
        got = compute_scale(w, Ternary(), rule)
        empty = compute_scale(w[:0], Ternary(), rule)
        inputs = activation_scales(w[:0], [1.0], 0)
    assert torch.equal(got, want) and empty.dtype == inputs.dtype == torch.float32 and got.device.type == "cpu"


@pytest.mark.parametrize("rule", ["absmax", "sawb", "mean", "rms", "mse"])
def test_scales_of_fake_meta_and_mapped_weights(rule, generator):
    with FakeTensorMode():
        assert type(compute_scale(torch.empty(5, 12), Ternary(), rule)) is FakeTensor
    meta = compute_scale(torch.empty(5, 12, device="meta"), Ternary(), rule)
    assert meta.is_meta and meta.shape == (5,) and meta.dtype == torch.float32
    w = torch.randn(3, 5, 12, generator=generator)
    w[1, 2] = 0
    got = torch.func.vmap(lambda one: compute_scale(one, Ternary(), rule))(w)
    assert torch.equal(got, torch.stack([compute_scale(one, Ternary(), rule) for one in w]))


@pytest.mark.parametrize("rule", ["sawb", "rms"])
def test_scales_are_compiled(rule, generator):
    torch._dynamo.reset()
    w = torch.randn(5, 12, generator=generator)
    compiled = torch.compile(lambda w: compute_scale(w, Ternary(), rule), backend="eager", fullgraph=True)
    assert torch.equal(compiled(w), compute_scale(w, Ternary(), rule))
