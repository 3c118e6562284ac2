"""Contract: a grid that is one entry of ``quant/grids.py`` goes the whole way, with every scale rule and granularity.

Levels against their sources: E2M1's bits, the normal quantiles of QLoRA, powers of two, PARQ's uniform quantizer.
``quantize_``, three steps, ``hard_quantize_``, ``pack_``, a file and ``unpack_`` give back the weights that were
trained, bit for bit; products
from the codes are within the bound of docs/packed.md of the exact ones; ONNX and torchao hold the same weights, or
refuse them by name, as what works with evenly spaced levels only does (mixtures, trits, ``sawb``); int8 activations
take those that are integers times a power of two.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from statistics import NormalDist

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.demo import load_digits
from askew_kernels.deploy.contents import contents_of, write_contents
from askew_kernels.deploy.files import write_packed
from askew_kernels.deploy.tensorfile import read as read_safetensors
from askew_kernels.quant import RULES, QuantConfig, compute_scale, default_rule, grid_from_dict, grids, scale_unit
from askew_kernels.quant.scales import check_rule, holds_scales, round_scale

NAMED = {name: kind() for name, kind in grids.GRIDS.items() if not dataclasses.fields(kind)}
NAMED = {name: grid for name, grid in NAMED.items() if not grid.evenly_spaced}
NAMED |= {f"powersoftwo {bits}": grids.PowersOfTwo(bits) for bits in (3, 4)}
NAMED |= {f"midrise {bits}": grids.Midrise(bits) for bits in (2, 3, 4)}
GRANULARITIES = {"per_tensor": None, "per_channel": None, "per_group": 4}


def quantiles(first, last, n):
    """The normal distribution's, of n equally likely parts."""
    return [NormalDist().inv_cdf(first + (last - first) * i / (n - 1)) for i in range(n)]


def e2m1(code):
    exponent, mantissa = code >> 1 & 3, code & 1
    value = (2.0 ** (exponent - 1) * (1 + mantissa / 2)) if exponent else mantissa / 2
    return -value if code >> 3 else value


SOURCE = {
    "fp4": sorted({e2m1(code) for code in range(16)}),  # -0.0 == 0.0
    # both sides end at the quantile of 1 - (1/30 + 1/32) / 2; below 0 there are 8 levels, 0 with them, above 8
    "nf4": [q / NormalDist().inv_cdf(0.9677083) for q in
            sorted([-q for q in quantiles(0.9677083, 0.5, 8)] + quantiles(0.9677083, 0.5, 9)[:-1])],
    "powersoftwo 3": [-1, -1 / 2, -1 / 4, 0, 1 / 4, 1 / 2, 1],
    "midrise 2": [-3, -1, 1, 3],  # twice (2 k + 1 - 2^b) / 2
    "midrise 3": [2 * k - 7 for k in range(8)],
    "midrise 4": [2 * k - 15 for k in range(16)],
    "powersoftwo 4": [*(-(2.0**-k) for k in range(7)), 0, *(2.0 ** (k - 6) for k in range(7))],
}  # fmt: skip


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6))


def packed(grid, **options):
    return ak.pack_(ak.hard_quantize_(ak.quantize_(model(), QuantConfig(grid))), **options)


@pytest.mark.parametrize("name", NAMED)
def test_levels_are_those_of_the_source(name):
    levels = NAMED[name].levels
    assert len(levels) == len(SOURCE[name]) and list(levels) == sorted(levels)
    assert all(abs(c - want) <= 1e-6 for c, want in zip(levels, SOURCE[name], strict=True))
    assert list(levels) == torch.tensor(levels).tolist()  # float32 numbers
    if "midrise" in name:
        assert [-c for c in reversed(levels)] == list(levels) and 0 not in levels
    else:
        assert sum(c == 0 for c in levels) == 1 and math.copysign(1, levels[levels.index(0.0)]) == 1


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_all_that_is_saved(name):
    grid = NAMED[name]
    for again in (grid_from_dict(json.loads(json.dumps(grid.to_dict()))), pickle.loads(pickle.dumps(grid)),
                  copy.deepcopy(grid), eval(repr(grid), vars(ak.quant))):  # fmt: skip
        assert again == grid and hash(again) == hash(grid) and again.levels == grid.levels
    assert "levels" not in grid.to_dict() and len(repr(grid)) < 30
    assert grid != grids.Codebook(grid.levels) and type(grid).__name__ in ak.quant.__all__


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMED)
def test_the_whole_way(name, rule, granularity, tmp_path):
    grid = NAMED[name]
    try:
        check_rule(rule, grid)
    except ValueError:
        assert rule in ("sawb", "mean")
        with pytest.raises(ValueError, match=f"^scale: {rule} .*{type(grid).__name__}"):
            QuantConfig(grid, rule)
        return
    config = QuantConfig(grid, rule, granularity, GRANULARITIES[granularity])
    net = ak.quantize_(model(), config)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(net), lr=0.05)
    x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    again = ak.quantize_(model(), config)  # a checkpoint: the scale travels with the fingerprint of its grid
    again.load_state_dict(net.state_dict())
    net.eval(), again.eval()
    assert torch.equal(again(x), net(x))
    ak.hard_quantize_(net)
    trained = {n: m.weight.detach().clone() for n, m in net.named_modules() if hasattr(m, "quantizer")}
    with torch.no_grad():
        want = net(x)
        ak.pack_(net)
        ak.save_packed(net, tmp_path / "m.safetensors")
        loaded = ak.load_packed(tmp_path / "m.safetensors", model()).eval()
        assert torch.equal(loaded(x), net(x))
        torch.testing.assert_close(loaded(x), want, rtol=1e-5, atol=1e-5)  # sums in another order
        assert loaded[3].config.weight == grid and str(ak.inspect(loaded)).count(name) == 2
        ak.unpack_(loaded)
    for n, w in trained.items():
        assert torch.equal(loaded.get_submodule(n).weight, w)
        scale = net.get_submodule(n).weight_scale.reshape(-1, 1)
        used = set((w.reshape(len(scale), -1) / scale).flatten().tolist())
        assert all(min(abs(u - c) for c in grid.levels) < 1e-6 for u in used)


# ---- powers of two ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [grids.FP4(), grids.Uniform(4), grids.Uniform(8), grids.Ternary()], ids=str)
def test_the_shared_exponent_of_the_mx_specification(grid, backend, generator):
    """floor(log2 max|w|) - floor(log2 c_max), on both sides of every power of two."""
    w = torch.randn(6, 64, generator=generator) * torch.exp2(torch.arange(6.0)[:, None] * 3)
    below = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    tops = torch.tensor([[p * f for f in (1.0, below, 1.5)] for p in (2.0**-20, 1.0, 2.0**9)]).flatten()
    w = torch.cat([w, (torch.rand(9, 64, generator=generator) * 0.9 + 0.01) * tops[:, None]])
    w[torch.arange(6, 15), 7] = tops
    got = compute_scale(w, grid, "ocp", "per_group", 64, scale_dtype="float8_e8m0fnu")
    exponent = torch.floor(torch.log2(w.double().abs().amax(1))) - math.floor(math.log2(grid.c_max))
    assert torch.equal(got.double(), torch.exp2(exponent))


@pytest.mark.parametrize("name", ["mxfp4", "gguf:mxfp4", "compressed-tensors:mxfp4"])
def test_mxfp4_takes_that_rule_unless_told_otherwise(name):
    assert QuantConfig.for_export(name).scale == "ocp" and QuantConfig.for_export(name, scale="mse").scale == "mse"
    config = QuantConfig.for_export(name)
    assert QuantConfig.from_json(config.to_json()) == config
    for call in (lambda: QuantConfig(grids.FP4(), "ocp"), lambda: compute_scale(torch.ones(2, 2), grids.FP4(), "ocp")):
        with pytest.raises(
            ValueError, match=r"ocp gives scales of float8_e8m0fnu, expected scale_dtype='float8_e8m0fnu', "
        ):
            call()


@pytest.mark.parametrize("grid", [grids.FP4(), grids.Uniform(4), grids.Uniform(8), grids.Ternary()], ids=str)
def test_the_least_error_among_powers_of_two_is_the_least(grid, generator):
    """Of all of them, below and above what absmax is rounded to."""
    w = torch.randn(40, 32, generator=generator)

    def error(s):
        return (w - ak.ops.fake_quantize(w, s, grid)).double().square().sum(1)

    found = error(compute_scale(w, grid, "mse", "per_group", 32, scale_dtype="float8_e8m0fnu"))
    nearest = compute_scale(w, grid, "absmax", "per_group", 32, scale_dtype="float8_e8m0fnu")
    every = torch.stack([error(nearest * 2.0**k) for k in range(-4, 3)])
    torch.testing.assert_close(found, every.amin(0), rtol=1e-9, atol=0)


# ---- scales in units of their tensor (NVFP4) -------------------------------------------------------------------------


def test_the_unit_is_the_least_power_of_two(generator):
    """Against torch's own float8_e4m3fn: s = t e4m3(s / t), and half of t would not do."""
    for size in (1e-3, 1.0, 1.76, 448.0, 449.0, 3e5):
        s = torch.rand(50, generator=generator) * size + 1e-9
        s[7] = size
        rounded, t = round_scale(s, "float8_e4m3fn"), scale_unit(s)
        assert t.shape == (1,) and math.frexp(float(t))[0] == 0.5
        assert float(s.max()) <= 448 * float(t) and float(s.max()) > 224 * float(t)
        x = (s / t).clamp(2.0**-9, 448)
        assert torch.equal(rounded, x.to(torch.float8_e4m3fn).float() * t)
        assert torch.equal(round_scale(rounded, "float8_e4m3fn"), rounded)  # whatever part of them is looked at
        assert all(holds_scales(part, "float8_e4m3fn") for part in rounded.split(7))
        assert torch.equal(rounded.bfloat16().float(), rounded)
    assert float(round_scale(torch.tensor([1.0, 1e-9]), "float8_e4m3fn")[1]) == 2.0**-17  # the least, never 0


@pytest.mark.parametrize("name, group", [("nvfp4", 16), ("mxfp4", 32)])
def test_training_with_scales_in_the_type_of_the_format(name, group, tmp_path):
    """Scales are the type's at every step, frozen with the weights' grid, packed and kept bit for bit; weights are
    bfloat16's numbers."""
    config = QuantConfig.for_export(name, scale="absmax")
    assert (config.weight, config.group_size) == (grids.FP4(), group) and config.granularity == "per_group"
    net = ak.quantize_(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), config)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(net), lr=0.05)
    annealing = ak.EpsilonAnnealing(optimizer, hold=2, total=6)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(6):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        annealing.step()
        assert all(holds_scales(net[i].weight_scale, config.scale_dtype) for i in (0, 2))
    frozen = net[0].weight_scale.clone()
    again = ak.quantize_(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), config)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again[0].weight_scale, frozen) and torch.equal(again(x), net(x))
    ak.hard_quantize_(net)
    weight = net[0].weight.detach().clone()
    assert torch.equal(weight.bfloat16().float(), weight)
    ak.save_packed(ak.pack_(net), tmp_path / "m.safetensors")
    kept = read_safetensors(tmp_path / "m.safetensors").tensors["0.weight_scale"].dtype
    assert kept == (torch.float8_e4m3fn if name == "nvfp4" else torch.bfloat16)
    float_net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    loaded = ak.load_packed(tmp_path / "m.safetensors", float_net)
    assert torch.equal(loaded[0].weight_scale.float(), frozen) and torch.equal(loaded[0].dequantize(), weight)


def test_files_of_such_scales_are_shared_checked_and_converted(tmp_path):
    net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    net[1].weight = net[0].weight
    ak.pack_(ak.hard_quantize_(ak.quantize_(net, QuantConfig.for_export("nvfp4"))))
    path = tmp_path / "m.safetensors"
    for save in (lambda: ak.save_packed(net, path), lambda: write_contents(contents_of(net), path)):
        save()
        read = read_safetensors(path)
        assert sorted(t.dtype for t in read.tensors.values() if t.numel() == 64) == [torch.float8_e4m3fn]
        loaded = ak.load_packed(path, nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)))
        assert all(torch.equal(loaded[i].weight_scale, net[i].weight_scale) for i in (0, 1))
        assert torch.equal(loaded[1].dequantize(), net[0].dequantize())
    document = json.loads(read.metadata["askew_kernels"])
    for wrong in (None, 500, "8"):
        changed = copy.deepcopy(document["layers"])
        for layer in changed.values():
            layer["scale_unit"] = wrong
        write_packed(path, read.tensors, changed)
        with pytest.raises(ValueError, match="layer 0: scale_dtype: .* got torch.float8_e4m3fn"):
            ak.load_packed(path, net)


def digits_right(config, epochs=12):
    """Of 360 digits, by a small network all of whose layers have this configuration."""
    pytest.importorskip("sklearn")
    x, x_test, y, y_test = load_digits()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = ak.optim.ASkewSGD(ak.param_groups(ak.quantize_(net, config)), lr=0.05, momentum=0.9)
    annealing = ak.EpsilonAnnealing(optimizer, hold=epochs // 2, total=epochs)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
        schedule.step()
        annealing.step()
    with torch.no_grad():
        return int((ak.hard_quantize_(net)(x_test).argmax(1) == y_test).sum())


def test_they_learn_as_much_as_four_bits_with_float_scales():
    """Within 7 digits, 2 points, about two standard errors of such a test."""
    four = digits_right(QuantConfig(grids.Uniform(4), granularity="per_group", group_size=32))
    found = {name: digits_right(QuantConfig.for_export(name)) for name in ("mxfp4", "nvfp4")}
    assert four > 330 and min(found.values()) >= four - 7, (four, found)


@pytest.mark.parametrize("group", [None, 4, 32])
@pytest.mark.parametrize("name", NAMED)
def test_products_of_all_sizes(name, group, backend, generator):
    """|y - exact| <= cols 2^-24 sum |x| |w|, and half a unit in the last place of a narrow y (docs/packed.md)."""
    grid = NAMED[name]
    for cols in (32, 96, 224):
        w = torch.randn(9, cols, generator=generator)
        scale = compute_scale(w, grid, "absmax", "per_group" if group else "per_channel", group)
        codes = ak.quant.pack_weight(w, scale, grid)
        exact = ak.quant.unpack_weight(codes, scale, grid, (9, cols), torch.float32)
        assert torch.equal(exact, ak.ops.fake_quantize(w, scale, grid))
        for dtype, half in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)):
            for rows in (0, 1, 2, 7, 8, 65, 97):
                x = torch.randn(rows, cols, generator=generator).to(dtype)
                y = ak.ops.packed_linear(x, codes, scale, grid, grid.bits)
                want = x.double() @ exact.double().T
                bound = cols * 2.0**-24 * (x.double().abs() @ exact.double().abs().T) + half * want.abs()
                assert bool(((y.double() - want).abs() <= bound).all()), (cols, dtype, rows)


@pytest.mark.parametrize("name", NAMED)
def test_the_default_rule_comes_near_the_least_error(name, generator):
    """Within a third of ``mse`` on normal, uniform and heavy-tailed weights, as for the other grids."""
    grid, normal = NAMED[name], torch.randn(16, 512, generator=generator)
    for w in (normal, torch.rand(16, 512, generator=generator) - 0.5, normal * normal.abs().sqrt()):
        error, least = (
            (ak.ops.fake_quantize(w, compute_scale(w, grid, rule), grid) - w).norm()
            for rule in (default_rule(grid), "mse")
        )
        assert error <= 1.34 * least, (error / least,)


def test_midrise_levels_are_those_of_parq():
    quantizer = pytest.importorskip("torchao.prototype.parq.quant").UnifQuantizer()
    w = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        _, levels = quantizer.quantize(w, bits, dim=1)
        step = (levels[:, 1:] - levels[:, :-1]).mean(1, keepdim=True)
        torch.testing.assert_close(levels, step / 2 * torch.tensor(grids.Midrise(bits).levels), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"bits: expected 2\.\.4, got 1; one bit is Binary"):
        grids.Midrise(1)
    assert default_rule(grids.Midrise(4)) == "rms"


@pytest.mark.parametrize("name", NAMED)
def test_what_needs_even_spacing_refuses_by_name(name):
    grid, w = NAMED[name], torch.ones(4, 8)
    named = type(grid).__name__ + r"\("
    if grid.counted is None:
        with pytest.raises(ValueError, match=f'^0: activations: "int8" needs a grid of integer levels.*{named}'):
            packed(grid, activations="int8")
    with pytest.raises(ValueError, match=f"^grids: expected Uniform, Ternary, Binary or None, got {named}"):
        ak.ops.mix_fake_quantize(w, torch.ones(1, 4), torch.ones(1), [grid])
    with pytest.raises(ValueError, match=f"trits: five codes a byte are for Ternary.., got {named}"):
        ak.quant.code_bits(grid, trits=True)
    with pytest.raises(ValueError, match=f"^weight_bits: expected 1 to 8, got {named}"):
        ak.search.uniform_policy(model(), torch.randn(2, 4, 4, 4), weight_bits=(grid,))


@pytest.mark.parametrize("name", NAMED)
def test_a_checkpoint_of_another_grid_is_refused(name):
    other = ak.quantize_(model(), QuantConfig(ak.quant.Uniform(4)))
    with pytest.raises(RuntimeError, match="grid"):
        other.load_state_dict(ak.quantize_(model(), QuantConfig(NAMED[name])).state_dict())


@pytest.mark.parametrize("name", NAMED)
def test_onnx_and_torchao_hold_the_weights_or_refuse_them(name, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_onnx import export_onnx
    from askew_kernels.deploy.to_torchao import to_torchao

    grid, x = NAMED[name], torch.randn(2, 4, 4, 4)
    net = packed(grid).eval()
    if grid.integers() is None:
        with pytest.raises(ValueError, match=f"integer levels, got {type(grid).__name__}"):
            export_onnx(net, x, tmp_path / "m.onnx")
        with pytest.raises(ValueError, match=f"integer levels, got {type(grid).__name__}"):
            to_torchao(net[3])
        return
    n, f = grid.integers()
    assert tuple(f * i for i in n) == grid.levels and all(type(i) is int for i in n) and math.frexp(f)[0] == 0.5
    export_onnx(net, x, tmp_path / "m.onnx", input_names=["x"])
    got = runtime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), net(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(to_torchao(net[3]).dequantize(), net[3].dequantize())


@pytest.mark.parametrize("name", [name for name, grid in NAMED.items() if not dataclasses.fields(grid)])
def test_convert_takes_the_name(name, tmp_path):
    from safetensors.torch import save_file

    from askew_kernels.__main__ import main

    net = ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Linear(32, 6)), QuantConfig(NAMED[name])))
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(tmp_path / "in.safetensors"))
    assert main(["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--grid", name]) == 0
    loaded = ak.load_packed(tmp_path / "out.safetensors", nn.Sequential(nn.Linear(32, 6)))
    assert loaded[0].config.weight == NAMED[name] and torch.equal(loaded[0].dequantize(), net[0].weight)
