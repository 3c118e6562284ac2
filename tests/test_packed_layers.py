"""Contract: packed layers and packed files.

1. ``pack_`` keeps every weight, bit for bit, in every storage type; it changes the model wholly or not at all, and its
   errors name the layer.
2. ``load_packed(save_packed(m))`` is m: codes, scales, float tensors, shared tensors, also into a meta-device model. A
   damaged file, or one that does not fit, is a ValueError that names it, and the model stays as it was.
3. Digits at 4 bits and ternary: trained, packed, saved, loaded in a fresh process, the same predictions.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import NF4, same_bits
from torch import nn

import askew_kernels as ak
from askew_kernels.files import KEY, PackedFile, PackedFileError
from askew_kernels.nn import PackedConv2d, PackedLinear
from askew_kernels.quant import Binary, Codebook, Ternary, Uniform

pytest.importorskip("safetensors")
CONFIGS = {
    "int4 channel": ak.QuantConfig(Uniform(4)),
    "int4 group": ak.QuantConfig(Uniform(4), granularity="per_group", group_size=4, scale="absmax"),
    "int3 tensor": ak.QuantConfig(Uniform(3), granularity="per_tensor"),
    "int8": ak.QuantConfig(Uniform(8)),
    "binary": ak.QuantConfig(Binary(), scale="mean"),
    "ternary": ak.QuantConfig(Ternary(), scale="mean"),
    "nf4": ak.QuantConfig(Codebook(NF4), scale="absmax"),
}


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, padding="same", bias=False), nn.Flatten(), nn.Linear(8 * 16, 12),
        nn.ReLU(), nn.Linear(12, 5, bias=False),
    )  # fmt: skip


def quantized(config, dtype=torch.float32, seed=0):
    model = ak.quantize_(small(seed), config).to(dtype).eval()
    return ak.hard_quantize_(model)


def picture(dtype=torch.float32, batch=3):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


# ---- pack_ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_weights_are_the_trained_ones(name, dtype):
    model = quantized(CONFIGS[name], dtype)
    weights = {n: m.weight.detach().clone() for n, m in ak.nn.quantized_layers(model).items()}
    biases = {n: m.bias for n, m in ak.nn.quantized_layers(model).items()}
    assert ak.pack_(model, trits=True) is model
    packed = ak.nn.packed_layers(model)
    assert packed.keys() == weights.keys()
    assert [type(m) for m in packed.values()] == [PackedConv2d, PackedConv2d, PackedLinear, PackedLinear]
    for n, m in packed.items():
        assert same_bits(m.dequantize(), weights[n]) and m.bias is biases[n]
    unpacked = ak.unpack_(copy.deepcopy(model))
    assert type(unpacked[0]) is nn.Conv2d and same_bits(unpacked[5].weight.detach(), weights["5"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_is_that_of_the_trained_model(name):
    """Float32 sums in another order."""
    for batch in (1, 5, 40, 130):
        model, x = quantized(CONFIGS[name]), picture(batch=batch)
        with torch.no_grad():
            want = model(x)
            got = ak.pack_(model)(x)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_int8_activations():
    model, x = quantized(CONFIGS["int4 group"]), picture(batch=20)
    with torch.no_grad():
        want = model(x)
        got = ak.pack_(model, activations="int8")(x)
    assert model[5].activations == "int8" and "activations=int8" in repr(model[5])
    error = float((got - want).norm() / want.norm())
    assert 1e-4 < error < 0.03  # not the float product, and near it
    with pytest.raises(ValueError, match=r'^0: activations: "int8" needs a grid of integer levels'):
        ak.pack_(quantized(CONFIGS["nf4"]), activations="int8")
    with pytest.raises(ValueError, match="^0: activations: expected .float. or .int8., got 'int4'"):
        ak.pack_(quantized(CONFIGS["int8"]), activations="int4")


def test_autocast_and_gradients_of_the_input():
    model, x = quantized(CONFIGS["int4 channel"]), picture(batch=40)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = model(x)
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    ak.pack_(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=0.02, atol=0.02)  # bfloat16 weights were rounded, s c is not
    other = x.clone().requires_grad_()
    model(other).square().sum().backward()
    assert torch.equal(other.grad, leaf.grad)


def test_a_cast_keeps_codes_and_scales():
    model = ak.pack_(quantized(CONFIGS["int4 channel"]))
    before = state_of(model)
    model.to(torch.bfloat16)
    assert all(same_bits(before[k], v) for k, v in model.state_dict().items() if "weight_" in k)
    assert model(picture(torch.bfloat16)).dtype == torch.bfloat16 and model[5].dequantize().dtype == torch.bfloat16


def test_errors_name_the_layer_and_change_nothing():
    model = ak.quantize_(small(), CONFIGS["int4 channel"])
    before = list(model)
    with pytest.raises(ValueError, match=r"^0: weight: \d+ of 288 weights are not on their levels; .*force=True"):
        ak.pack_(model)
    assert list(model) == before
    ak.hard_quantize_(model)
    with torch.no_grad():
        model[5].weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"^5: w: 1 of 1536 weights are NaN"):
        ak.pack_(model, force=True)
    assert list(model) == before
    inclusive = ak.hard_quantize_(ak.quantize_(small(), {"7": ak.QuantConfig(Uniform(4, inclusive=True))}))
    with pytest.raises(ValueError, match=r"^7: grid: .*17 levels and cannot be packed"):
        ak.pack_(inclusive)
    with pytest.raises(ValueError, match="^model: has no"):
        ak.pack_(small())
    with pytest.raises(ValueError, match=r"^0: scale_dtype: torch.float16 would change"):
        ak.pack_(quantized(CONFIGS["int4 channel"]), scale_dtype=torch.float16)


def test_force_rounds():
    model = ak.quantize_(small(), CONFIGS["int4 channel"])
    want = {n: m.quantized_weight() for n, m in ak.nn.quantized_layers(model).items()}
    ak.pack_(model, force=True)
    assert all(same_bits(m.dequantize(), want[n]) for n, m in ak.nn.packed_layers(model).items())
    half = ak.pack_(ak.quantize_(small(), CONFIGS["int4 channel"]), force=True, scale_dtype=torch.float16)
    assert half[0].weight_scale.dtype == torch.float16


def test_shared_layers_and_weights_stay_shared(tmp_path):
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    two.weight = one.weight

    def build(first=one, second=two):
        return nn.ModuleDict({"a": first, "again": first, "b": second})

    model = ak.pack_(ak.hard_quantize_(ak.quantize_(build(), CONFIGS["int4 channel"])))
    assert model["a"] is model["again"] and model["a"].weight_codes is model["b"].weight_codes
    path = tmp_path / "m.safetensors"
    ak.save_packed(model, path)
    assert len(PackedFile(path).stored) == 4  # codes, scales and two biases, once
    loaded = ak.load_packed(path, build(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert loaded["a"] is loaded["again"] and same_state(state_of(loaded), state_of(model))


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = ak.pack_(quantized(CONFIGS["int4 group"]))
    path = tmp_path / "model.safetensors"
    ak.save_packed(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]  # no temporary left
    return model, path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_is_the_saved_one(name, tmp_path):
    model = ak.pack_(quantized(CONFIGS[name]), trits=True)
    path = tmp_path / "model.safetensors"
    ak.save_packed(model, path)
    with torch.device("meta"):
        empty = small()
    for build in (small(7), empty, ak.quantize_(small(7), CONFIGS[name]), ak.pack_(quantized(CONFIGS[name], seed=7))):
        loaded = ak.load_packed(path, build.eval())
        assert loaded is build and same_state(state_of(loaded), state_of(model))
        with torch.no_grad():
            assert same_bits(loaded(picture()), model(picture()))
    assert all(p.requires_grad for p in loaded.parameters())


def test_plain_state_dicts_load_too(saved):
    model, _ = saved
    other = ak.pack_(quantized(CONFIGS["int4 group"], seed=5))
    other.load_state_dict(model.state_dict())
    assert same_state(state_of(other), state_of(model))


BAD_TARGETS = {
    "no such layer": (lambda m: nn.Sequential(*list(m)[:5]), "layer 5: the model has no such layer"),
    "shape": (lambda m: m.__setitem__(5, nn.Linear(64, 12)) or m, r"layer 5: expected a weight of shape \(12, 64\)"),
    "kind": (lambda m: m.__setitem__(5, nn.ReLU()) or m, "layer 5: expected Linear in the model, got ReLU"),
    "bias": (lambda m: m.__setitem__(7, nn.Linear(12, 5)) or m, "layer 7: only the model has a bias"),
    "geometry": (lambda m: setattr(m[0], "stride", (1, 1)) or m, "layer 0: geometry"),
    "grid": (lambda m: ak.quantize_(m, {"5": CONFIGS["int8"]}), "layer 5: grid: expected Uniform.bits=8"),
    "missing": (lambda m: m.append(nn.Linear(5, 5)), "the file lacks 8.bias, 8.weight"),
    "surplus": (lambda m: m.__setitem__(1, nn.Identity()) or m, "the model lacks 1.bias"),
}


@pytest.mark.parametrize("why", BAD_TARGETS)
def test_a_file_that_does_not_fit_changes_nothing(why, saved):
    change, message = BAD_TARGETS[why]
    target = change(small(9))
    children, before = list(target), state_of(target)
    with pytest.raises(PackedFileError, match=message):
        ak.load_packed(saved[1], target)
    assert list(target) == children and same_state(state_of(target), before)


def rewritten(path, change):
    """The file with its metadata changed and the header's length corrected."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    document = json.loads(header["__metadata__"][KEY])
    change(document, header)
    header["__metadata__"][KEY] = json.dumps(document)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


BAD_DOCUMENTS = {
    "version": (lambda d, h: d.update(version=2), "format version 2; this release reads version 1"),
    "checksum": (lambda d, h: d.update(checksum=1), "checksum does not fit"),
    "layers": (lambda d, h: d.update(layers=[]), "damaged metadata"),
    "no layers": (lambda d, h: d.pop("layers"), "damaged metadata"),
    "alias": (lambda d, h: d["aliases"].update(x="nowhere"), "damaged metadata"),
    "no metadata": (lambda d, h: h["__metadata__"].update(format="x"), "checksum|metadata"),
    "grid": (lambda d, h: d["layers"]["5"]["config"]["weight"].update(bits=9), "layer 5: bits"),
    "inclusive": (lambda d, h: d["layers"]["5"]["config"]["weight"].update(inclusive=True), "layer 5: grid"),
    "shape": (lambda d, h: d["layers"]["5"].update(shape=[12, 2**41]), "layer 5: shape"),
    "huge": (lambda d, h: d["layers"]["5"].update(shape=[2**39, 2**39]), "layer 5: "),
    "kind": (lambda d, h: d["layers"]["5"].update(kind="pickle"), "layer 5: kind"),
    "dtype": (lambda d, h: d["layers"]["5"].update(dtype="load"), "layer 5: dtype"),
    "gone": (lambda d, h: d["layers"].update(x=d["layers"]["5"]), "layer x: 'x.weight_codes' is missing"),
    "group": (lambda d, h: d["layers"]["5"]["config"].update(group_size=5), "layer 5: group_size"),
}


@pytest.mark.parametrize("why", BAD_DOCUMENTS)
def test_an_edited_header(why, saved):
    change, message = BAD_DOCUMENTS[why]
    target = small(9)
    before = state_of(target)
    rewritten(saved[1], change)
    verify = why in ("checksum", "version")  # without it the other checks must find it
    if why == "no metadata":
        ak.load_packed(saved[1], target, verify=False)  # an unknown entry is no harm
        return
    with pytest.raises(PackedFileError, match=message):
        ak.load_packed(saved[1], target, verify=verify)
    assert same_state(state_of(target), before)


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_never_crash(data, saved, tmp_path):
    original = saved[1].read_bytes()
    damaged = bytearray(original)
    header = 8 + int.from_bytes(original[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.one_of(st.integers(0, len(damaged) - 1), st.integers(0, header)))
        damaged[place] ^= data.draw(st.integers(1, 255))
    damaged = damaged[: data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))]
    path = tmp_path / "damaged.safetensors"
    path.unlink(missing_ok=True)  # never written through a mapping
    path.write_bytes(damaged)
    verify = data.draw(st.booleans())
    target = small(9)
    before = state_of(target)
    try:
        ak.load_packed(path, target, verify=verify)
    except PackedFileError as error:
        assert str(error).startswith(str(path))
        assert same_state(state_of(target), before)
    else:
        assert not verify or bytes(damaged) == original or same_state(state_of(target), state_of(saved[0]))


def test_saving_what_cannot_be_saved(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("old")
    with pytest.raises(PackedFileError, match="0 is not packed; call hard_quantize_"):
        ak.save_packed(quantized(CONFIGS["int8"]), path)
    with pytest.raises(PackedFileError, match="has no packed layers"):
        ak.save_packed(small(), path)
    with pytest.raises(PackedFileError, match="cannot be written"):
        ak.save_packed(ak.pack_(quantized(CONFIGS["int8"])), tmp_path / "nowhere" / "m.safetensors")
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError):
        ak.load_packed(tmp_path / "absent", small())
    with pytest.raises(PackedFileError, match="not a whole safetensors file"):
        ak.load_packed(path, small())


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        ak.save_packed(model, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"askew_kernels\[deploy\]"):
        ak.save_packed(ak.pack_(quantized(CONFIGS["int8"])), tmp_path / "m")


@pytest.mark.parametrize(("config", "factor"), [
    (ak.QuantConfig(Uniform(4), scale="absmax", granularity="per_group", group_size=128), 7.5),
    (ak.QuantConfig(Ternary(), scale="mean"), 15), (ak.QuantConfig(Binary(), scale="mean"), 28),
])  # fmt: skip
def test_the_file_is_small(config, factor, tmp_path):
    model = ak.quantize_(nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False)), config)
    path = tmp_path / "m.safetensors"
    ak.save_packed(ak.pack_(model, force=True), path)
    assert path.stat().st_size * factor <= 2 * 4 * 1024**2


# ---- digits ---------------------------------------------------------------------------------------------------------

FRESH = """
import sys, torch
import askew_kernels as ak
from torch import nn
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
model = ak.load_packed(sys.argv[1], model)
x = torch.load(sys.argv[2])
torch.save([model(x), torch.stack([model(row) for row in x[:40]])], sys.argv[3])
"""


@pytest.mark.parametrize("name", ["int4 channel", "ternary"])
def test_digits_trained_packed_saved_and_loaded_elsewhere(name, tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    ak.quantize_(model, CONFIGS[name])
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.2, momentum=0.9)
    annealing = ak.EpsilonAnnealing(optimizer, hold=20, total=190)
    for _ in range(200):
        rows = torch.randint(0, 1400, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        annealing.step()
    ak.hard_quantize_(model)
    test = x[1400:]
    with torch.no_grad():
        want = model(test).argmax(1)
    assert (want == y[1400:]).float().mean() > 0.8
    path = tmp_path / "digits.safetensors"
    ak.save_packed(ak.pack_(model), path)
    torch.save(test, tmp_path / "x")
    command = [sys.executable, "-c", FRESH, str(path), str(tmp_path / "x"), str(tmp_path / "y")]
    subprocess.run(command, check=True, cwd=Path(ak.__file__).parents[1])
    for outputs in torch.load(tmp_path / "y"):
        assert torch.equal(outputs.argmax(1), want[: len(outputs)])
