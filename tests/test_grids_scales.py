"""Contract: grids and scale rules are docs/mathematics.md, section 1.

Levels against formulas written here; scales against NumPy float64 of the same formulas within 4 float32 roundings
(two sums rounded to float32, the result rounded, and cancellation in SAWB's difference, derived where it is used);
floors, zero rows, NaN rows and empty tensors give usable scales; bad arguments are errors that name the argument.
"""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from oracles import DTYPES, GRANULARITIES, GRIDS, Binary, Codebook, Ternary, Uniform

import askew_kernels as ak
from askew_kernels.quant import QuantConfig, compute_scale, grid_from_dict, num_rows

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
    (dict(bits=4, signed=False, narrow=True), ValueError, "signed"),
])  # fmt: skip
def test_uniform_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        Uniform(**arguments)


@pytest.mark.parametrize("levels", [
    [1.0], [], list(range(257)), [1.0, 0.0], [0.0, 0.0, 1.0], [0.0, math.nan], [-math.inf, 0.0], [0.0, 1e39],
    [1.0, 1.0 + 1e-9],
])  # fmt: skip
def test_codebook_errors(levels):
    with pytest.raises(ValueError, match="levels"):
        Codebook(levels)


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
    if isinstance(grid, Codebook):
        assert table.tolist() == list(grid.levels) and table.dtype == torch.float32
    else:
        assert table.numel() == 0 and grid.encoding[1:] == [grid.levels[0], grid.levels[-1]]


# ---- scale rules ----------------------------------------------------------------------------------------------------


def rows_of(w, granularity, group):
    rows = {"per_tensor": 1, "per_channel": w.shape[0], "per_group": w.numel() // (group or 1)}[granularity]
    return oracles.as64(w).reshape(rows, -1)


def expected_scale(m, grid, rule, coefficients=None):
    """float64 transcription of section 1."""
    c_max = max(grid.levels) if max(grid.levels) > 0 else max(abs(c) for c in grid.levels)
    absolute = np.abs(m)
    if rule == "absmax":
        return absolute.max(1) / c_max
    if rule == "mean":
        return (1.0 if len(grid.levels) == 2 else 1.5) * absolute.mean(1)
    c1, c2 = coefficients or SAWB[grid.bits]
    clip = c1 * np.sqrt((m * m).mean(1)) - c2 * absolute.mean(1)
    return np.where(clip > 0, clip, absolute.max(1)) / c_max


def supported(rule, grid):
    if rule == "sawb":
        return grid.bits in SAWB
    return rule != "mean" or isinstance(grid, (Binary, Ternary))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rule", ["absmax", "sawb", "mean"])
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
    assert scale[1:5].tolist() == [1.0] * 4
    assert (scale > 0).all() and scale.isfinite().all()
    assert scale[0] == scale[5] == compute_scale(w[:1], grid, rule)[0]  # rows do not see each other


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
    assert scale.shape == (1 if granularity == "per_tensor" else shape[0],)
    assert (scale == 1).all()


# ---- rows and errors ------------------------------------------------------------------------------------------------


def test_num_rows():
    assert num_rows((6, 4, 3, 3), "per_tensor") == 1
    assert num_rows((6, 4, 3, 3), "per_channel") == 6
    assert num_rows((6, 4, 3, 3), "per_group", 12) == 18
    assert num_rows((8,), "per_group", 4) == 2
    assert num_rows((), "per_channel") == 1


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
    (dict(sawb_coefficients=(1.0,)), "sawb_coefficients"),
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
    (dict(forward="soft"), ValueError, "forward"), (dict(scale="nonsense"), ValueError, "rule"),
    (dict(weight=Uniform(6)), ValueError, "6 bits"), (dict(granularity="x"), ValueError, "granularity"),
    (dict(group_size=4), ValueError, "group_size"), (dict(granularity="per_group"), ValueError, "group_size"),
])  # fmt: skip
def test_config_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        QuantConfig(**arguments)


def test_config_from_dict_errors():
    with pytest.raises(ValueError, match="colour"):
        QuantConfig.from_dict({**QuantConfig().to_dict(), "colour": "red"})
    with pytest.raises(ValueError, match="grid"):
        QuantConfig.from_dict({"scale": "sawb"})
