"""Contract: what is trained for a format arrives there, bit for bit.

1. ``scale_dtype``: wherever a scale is computed (torch, NumPy, an optimizer's pass, a frozen one, a given one) it is a
   number of that type, the nearest one; no scale becomes 0 or inf; packed models store it in that type.
2. ``QuantConfig.for_export``: every target trains, packs, and goes through its format: written whole, read by the
   format's own library, converted back, with equal bits each time.
3. What a format cannot hold, a target that is there, an interruption: an error, and everything as it was.
"""

from __future__ import annotations

import json
import os
import resource
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import askew_kernels as ak
from askew_kernels.__main__ import main
from askew_kernels.contract import SCALE_RANGES
from askew_kernels.deploy.contents import contents_of, read_contents, write_contents
from askew_kernels.deploy.export import compare, contents_at, export_packed
from askew_kernels.deploy.files import NotWritten, PackedFileError
from askew_kernels.deploy.formats import FORMATS, format_of
from askew_kernels.quant.exports import TARGETS
from askew_kernels.quant.scales import holds_scales, round_scale

ROUNDED = [name for name in SCALE_RANGES if name != "float32"]
BY_THEMSELVES = [name for name in ROUNDED if name != "float8_e4m3fn"]  # its scales share a unit: test_named_grids.py
NEEDS = {name: name.replace("-", "_") for name in FORMATS} | dict.fromkeys(("metal", "bitnet"), "transformers")


def held(value: float, scale_dtype: str) -> bool:
    """Whether a positive number is one of the type, by its definition: n 2^e, n of so many digits, e so large."""
    digits, least = {"float16": (11, -24), "bfloat16": (8, -133), "float8_e8m0fnu": (1, -126)}[scale_dtype]
    n, d = value.as_integer_ratio()
    e = 1 - d.bit_length()
    while n % 2 == 0:
        n, e = n // 2, e + 1
    low, high = SCALE_RANGES[scale_dtype]
    return low <= value <= high and n.bit_length() <= digits and e >= least


@pytest.mark.parametrize("scale_dtype", BY_THEMSELVES)
@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_rounding_is_to_the_nearest(scale_dtype, value):
    x = torch.tensor([value])
    got = round_scale(x, scale_dtype)
    assert held(float(got), scale_dtype) and holds_scales(got, scale_dtype)
    low, high = SCALE_RANGES[scale_dtype]
    if not low < value < high:
        assert float(got) == min(max(value, low), high)
    elif scale_dtype == "float8_e8m0fnu":  # the smaller ratio, and no power of two is nearer
        ratio = Fraction(float(got)) / Fraction(value)
        assert max(ratio, 1 / ratio) ** 2 <= 2 * (1 + Fraction(1, 2**20))
    else:
        assert torch.equal(got, x.to(getattr(torch, scale_dtype)).float())


@pytest.mark.parametrize("scale_dtype", ROUNDED)
@pytest.mark.parametrize("rule", ["absmax", "sawb", "rms", "mse"])
def test_both_ways_to_compute_a_scale_round_alike(rule, scale_dtype):
    w, grid = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) * 1e-3, ak.quant.Uniform(4)
    w[3], w[4, 0] = 0.0, torch.inf
    found = ak.quant.compute_scale(w, grid, rule, "per_group", 32, scale_dtype=scale_dtype)
    assert holds_scales(found, scale_dtype)
    assert scale_dtype not in BY_THEMSELVES or all(held(s, scale_dtype) for s in found.tolist())
    if rule == "mse":
        return
    exact = ak.quant.compute_scale(w, grid, rule, "per_group", 32)
    assert torch.equal(found, round_scale(exact, scale_dtype))
    sums = ak.ops.row_sums(w, 48)
    traced = torch.compile(ak.quant.scales.scale_from_sums, backend="eager")  # the reference's way
    assert torch.equal(traced(sums, 32, grid, rule, scale_dtype=scale_dtype), found)


@pytest.mark.parametrize("scale_dtype", ROUNDED)
def test_scales_of_a_layer_are_rounded_however_they_come(scale_dtype):
    config = ak.QuantConfig(ak.quant.Uniform(4), "absmax", scale_dtype=scale_dtype)
    layer = ak.quantize_(nn.Sequential(nn.Linear(24, 8)), config)[0]
    assert holds_scales(layer.weight_scale, scale_dtype)
    layer.quantizer.set_scale(layer.weight, torch.full((8,), 0.3))
    assert holds_scales(layer.weight_scale, scale_dtype) and not holds_scales(torch.tensor([0.3]), scale_dtype)
    with torch.no_grad():
        layer.weight.mul_(3.3)
    assert holds_scales(layer.weight_scale, scale_dtype)
    again = torch.func.functional_call(layer, {"weight": layer.weight * 1.7}, (torch.eye(24),))  # recomputed, not kept
    assert torch.isfinite(again).all()


def test_a_scale_dtype_is_checked_and_told():
    for wrong, error in ((torch.float64, ValueError), ("half", ValueError), (3, TypeError), (None, TypeError)):
        with pytest.raises(error, match="scale_dtype: expected one of float32, bfloat16, float16, float8_e8m0fnu"):
            ak.QuantConfig(scale_dtype=wrong)
    config = ak.QuantConfig(scale_dtype=torch.float16)
    assert config.scale_dtype == "float16" and ak.QuantConfig.from_json(config.to_json()) == config
    assert "scale_dtype" not in ak.QuantConfig().to_dict()  # documents of earlier releases stay as they were


def test_layers_that_share_a_weight_round_its_scale_alike():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    other = {"0": ak.QuantConfig(), "1": ak.QuantConfig(scale_dtype="float16")}
    with pytest.raises(ValueError, match="1: shares its weight with 0, which is quantized otherwise"):
        ak.quantize_(model, other)


def test_for_export_names_what_it_does_not_know():
    for target in ("gguf:q4_1", "gguf", "onnx:3", ""):
        with pytest.raises(ValueError, match=r"target: expected one of gguf:q8_0, .*gguf:q4_0, .*torchao:8, got"):
            ak.QuantConfig.for_export(target)
    with pytest.raises(TypeError, match="target: expected a name"):
        ak.QuantConfig.for_export(4)
    for option in ({"weight": ak.quant.Uniform(3)}, {"scale_dtype": "float32"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: gguf:q4_0 sets it"):
            ak.QuantConfig.for_export("gguf:q4_0", **option)
    with pytest.raises(ValueError, match="group_size: gguf:q4_0 keeps a scale for each 32 weights"):
        ak.QuantConfig.for_export("gguf:q4_0", group_size=48)
    assert ak.QuantConfig.for_export("gguf:q4_0", group_size=64, forward="relaxed").group_size == 64
    assert ak.QuantConfig.for_export("GGUF:Q4_0", granularity="per_channel").granularity == "per_channel"


def trained(target, steps=6, **options):
    """A small model trained for a target, hard-quantized and packed; and its weights."""
    torch.manual_seed(3)
    config = ak.QuantConfig.for_export(target, **options)
    model = ak.quantize_(nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 5)), {"0": config})
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)
    annealing = ak.EpsilonAnnealing(optimizer, hold=2, total=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 256)).square().mean().backward()
        optimizer.step()
        annealing.step()
        assert holds_scales(model[0].weight_scale, config.scale_dtype)
    ak.hard_quantize_(model)
    weight = model[0].weight.detach().clone()
    return ak.pack_(model).eval(), weight


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_trained_for_a_target_packs_and_arrives(target, tmp_path):
    model, weight = trained(target)
    assert torch.equal(model[0].dequantize(), weight)
    assert model[0].weight_scale.element_size() == (4 if target.startswith("onnx") else 2)
    to = target.split(":")[0]
    if to == "onnx":
        pytest.skip("an ONNX file is exported with the model: tests/test_packed_interop.py")
    pytest.importorskip("llama_cpp" if target == "gguf:q1_0" else NEEDS[to])  # the package gguf does not decode it
    source, out, back = (tmp_path / name for name in ("packed.safetensors", "exported", "back.safetensors"))
    ak.save_packed(model, source)
    contents = export_packed(source, out, to)
    (row,), reader = compare(contents, out, to)
    assert row == ("0", (32, 256), 0.0) and any(c.isdigit() for c in reader)
    assert format_of(out) == to
    read = contents_at(out)
    assert torch.equal(read.layers["0"].dequantize(), weight)
    write_contents(read, back)
    again = ak.load_packed(back, nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 5)))
    x = torch.randn(3, 256)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(again[0].dequantize(), weight) and torch.equal(again[2].weight, model[2].weight)


ALL = {"gguf": "gguf:q4_0", "compressed-tensors": "compressed-tensors:4", "transformers": "compressed-tensors:4",
       "metal": "metal:4", "torchao": "torchao:4", "bitnet": None, "onnx": "onnx:4"}  # fmt: skip
TERNARY_OF_8_BITS = ak.QuantConfig(ak.quant.Ternary(), granularity="per_tensor", activation=ak.quant.Uniform(8))


class Told(nn.Module):
    """With extra state that is JSON."""

    def __init__(self, dtype=None, threshold=None):
        super().__init__()
        self.fc, self.threshold = nn.Linear(128, 8, bias=False, dtype=dtype), threshold

    def forward(self, x):
        return self.fc(x)

    def get_extra_state(self):
        return {"threshold": self.threshold}

    def set_extra_state(self, state):
        self.threshold = state["threshold"]


def packed_for(to, model):
    config = TERNARY_OF_8_BITS if ALL[to] is None else ak.QuantConfig.for_export(ALL[to])
    return ak.pack_(ak.hard_quantize_(ak.quantize_(model, config))).eval()


def exported(to, model, path, **options):
    """In any format; ONNX files are exported with the model."""
    pytest.importorskip(NEEDS[to])
    if to == "onnx":
        from askew_kernels.deploy.to_onnx import export_onnx

        export_onnx(model, (torch.randn(2, 128),), path, **options)
        return contents_of(model)
    return export_packed(model, path, to, **options)


@pytest.mark.parametrize("to", ALL)
def test_extra_state_goes_through_every_format(to, tmp_path):
    exported(to, packed_for(to, Told(threshold=0.25)), tmp_path / "out")
    write_contents(contents_at(tmp_path / "out"), tmp_path / "back")
    assert ak.load_packed(tmp_path / "back", Told()).threshold == 0.25


@pytest.mark.parametrize("to", ALL)
def test_extra_state_that_is_no_json_is_named(to, tmp_path):
    with pytest.raises((PackedFileError, ValueError), match=r"_extra_state: .*extra state is saved where"):
        exported(to, packed_for(to, Told(threshold={1, 2})), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
@pytest.mark.parametrize("to", ALL)
def test_wrappers_are_looked_through(to, wrap, tmp_path):
    model = packed_for(to, Told(threshold=0.25))
    exported(to, wrap(model), tmp_path / "out")
    found = contents_at(tmp_path / "out")
    assert set(found.layers) == {"fc"} and found.extra == {"_extra_state": {"threshold": 0.25}}
    assert torch.equal(found.layers["fc"].dequantize(), model.fc.dequantize())


@pytest.mark.parametrize("to", [to for to in ALL if to != "transformers"])  # whose models have a class
def test_a_layer_that_is_written_as_floats_is_compared_too(to, tmp_path):
    model = packed_for(to, nn.Sequential(nn.Linear(128, 128, bias=False), nn.ReLU(), nn.Linear(128, 8, bias=False)))
    contents = exported(to, model, tmp_path / "out", dense=["0"])
    rows, _ = compare(contents, tmp_path / "out", to)
    assert [(row.name, row.difference) for row in rows] == [("0", 0.0), ("2", 0.0)]


@pytest.mark.parametrize("to", ALL)
def test_a_float64_model_is_read_back_or_refused_by_its_layer(to, tmp_path):
    model = packed_for(to, Told(torch.float64))
    if to != "torchao":
        exported(to, model, tmp_path / "out")
        layer = contents_at(tmp_path / "out").layers["fc"]
        assert layer.weight_dtype == torch.float64 and torch.equal(layer.dequantize(), model.fc.dequantize())
        return
    with pytest.raises(PackedFileError, match=r"fc: weight_dtype: .*got float64; call model.float\(\) first"):
        exported(to, model, tmp_path / "out")
    exported(to, model, tmp_path / "out", dense=["fc"])
    weight = model.fc.dequantize()
    exported(to, model.float(), tmp_path / "float")
    assert torch.equal(contents_at(tmp_path / "float").layers["fc"].dequantize(), weight.float())


@pytest.mark.parametrize("to", ALL)
def test_the_default_device_does_not_matter(to, tmp_path):
    model = packed_for(to, Told())
    with torch.device("meta"):
        if to != "onnx":
            exported(to, model, tmp_path / "out")
    if to == "onnx":
        exported(to, model, tmp_path / "out")
    with torch.device("meta"):
        read = contents_at(tmp_path / "out")
        if to != "transformers":
            assert compare(contents_of(model), tmp_path / "out", to)[0][0].difference == 0.0
    assert torch.equal(read.layers["fc"].dequantize(), model.fc.dequantize())


@pytest.mark.parametrize("wrapper", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_exported_as_what_it_wraps(wrapper):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=16,
                                      num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(transformers.LlamaForCausalLM(config))))
    plain, wrapped = contents_of(model), contents_of(wrapper(model))
    assert plain.architecture is not None and plain.architecture["architectures"] == ["LlamaForCausalLM"]
    assert (wrapped.architecture, wrapped.source) == (plain.architecture, plain.source)
    assert wrapped.layers.keys() == plain.layers.keys()


def test_contents_of_a_model_and_of_its_file_are_one(tmp_path):
    torch.manual_seed(0)
    strided, same = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), nn.Conv2d(16, 8, 3, padding="same")
    model = nn.Sequential(strided, same, nn.Flatten(), nn.Linear(8 * 16, 10))
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(model, ak.QuantConfig(scale_dtype="float16"))))
    first, second, third = (tmp_path / name for name in "abc")
    ak.save_packed(model, first)
    write_contents(read_contents(first), second)
    write_contents(contents_of(model), third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    assert read_contents(first).layers["0"].stride == (2, 2)


@pytest.mark.parametrize("how", ["one Parameter", "one memory"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("to", ["transformers", "compressed-tensors", "metal"])
def test_floats_that_are_one_in_memory_arrive_under_each_name(to, tied, how, tmp_path):
    """transformers ties what its architecture says, the matrices of word embeddings: all else stands in a folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=40, tie_word_embeddings=tied)
    model, tokens = transformers.LlamaForCausalLM(shape).eval(), torch.arange(12)[None]
    first, second = (layer.input_layernorm for layer in model.model.layers)
    second.weight = first.weight if how == "one Parameter" else nn.Parameter(first.weight.data)
    nn.init.uniform_(first.weight, 0.5, 1.5)
    config = ak.QuantConfig.for_export("metal:4", group_size=32)
    ak.hard_quantize_(ak.quantize_(model, {"lm_head": None, "*": config}))
    with torch.no_grad():
        dense = model(tokens).logits  # of torch's own products
        packed = ak.pack_(model)(tokens).logits
    ak.save_packed(model, tmp_path / "packed")
    model.config.save_pretrained(tmp_path)
    for source in (model, tmp_path / "packed"):
        folder = tmp_path / type(source).__name__
        export_packed(source, folder, to)
        assert torch.equal(contents_at(folder).tensors["model.layers.1.input_layernorm.weight"], second.weight)
        if to != "metal":  # which transformers loads on Apple's machines only
            with torch.no_grad():
                y = transformers.LlamaForCausalLM.from_pretrained(str(folder)).eval()(tokens).logits
            assert torch.equal(y, packed if to == "transformers" else dense)


def test_packed_layers_that_are_one_in_memory_arrive_under_each_name(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=40)
    ).eval()
    ak.pack_(ak.hard_quantize_(ak.quantize_(model, ak.QuantConfig())))
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight_codes, second.weight_scale = first.weight_codes.detach(), first.weight_scale.detach()
    export_packed(model, tmp_path / "exported", "transformers")
    model.save_pretrained(tmp_path / "saved")
    for name in ("exported", "saved"):
        loaded = transformers.LlamaForCausalLM.from_pretrained(str(tmp_path / name)).eval()
        tokens = torch.arange(12)[None]
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_what_was_exported_is_shown_without_its_numbers(tmp_path):
    config = ak.QuantConfig.for_export("compressed-tensors:4", group_size=32)
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Linear(64, 8)), config)))
    shown = repr(export_packed(model, tmp_path / "folder", to="compressed-tensors"))
    assert shown.splitlines()[0] == "Contents of Sequential:"
    assert "0: PackedLinear(" in shown and "0.bias: torch.float32 (8,)" in shown and "tensor(" not in shown


def test_a_failed_export_leaves_the_target_as_it_was(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    model, _ = trained("gguf:q4_0")
    source, out = tmp_path / "packed.safetensors", tmp_path / "out.gguf"
    ak.save_packed(model, source)
    out.write_bytes(b"mine")

    def unchanged():
        return out.read_bytes() == b"mine" and sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", source.name]

    with pytest.raises(FileExistsError, match=r"is there already: .*out\.gguf"):
        export_packed(source, out, "gguf")
    assert unchanged()
    assert main(["export", str(source), "--to", "gguf", "--out", str(out)]) == 2 and unchanged()
    with monkeypatch.context() as patch:  # said before the model is read
        patch.setattr("askew_kernels.deploy.export.contents_at", lambda *_: pytest.fail("read"))
        assert main(["export", str(source), "--to", "gguf", "--out", str(tmp_path / "missing" / "out.gguf")]) == 2
        assert main(["export", str(source), "--to", "gguf", "--out", str(out)]) == 2 and unchanged()
    assert "is there already" in capsys.readouterr().err
    for option, value, said in (("--dense", "head*", "none fits 'head*'"), ("--folder", str(out), "expected a folder")):
        command = ["export", str(source), "--to", "gguf", "--out", str(tmp_path / "new.gguf"), option, value]
        assert main(command) == 2 and unchanged() and said in capsys.readouterr().err
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(*_, failure=failure, **__):
            (tmp_path / "partly").write_bytes(b"")
            os.unlink(tmp_path / "partly")
            raise failure

        monkeypatch.setattr(FORMATS["gguf"].load(), "export", fail)
        with pytest.raises((PackedFileError, KeyboardInterrupt), match=r"out\.gguf: cannot be written \(.*space|^$"):
            export_packed(source, out, "gguf", overwrite=True)
        assert unchanged()
        if isinstance(failure, OSError):
            assert main(["export", str(source), "--to", "gguf", "--out", str(out), "--overwrite"]) == 1 and unchanged()
    monkeypatch.undo()
    export_packed(source, out, "gguf", overwrite=True)
    assert format_of(out) == "gguf"


@pytest.mark.parametrize("to", ["gguf", "compressed-tensors", "transformers", "metal", "torchao"])
def test_a_full_disk_is_told_as_such(to, tmp_path, capsys):
    """The work was done, and failed: exit code 1, not 2, which is said before any work."""
    config = ak.QuantConfig.for_export("metal:4", group_size=32)
    model = ak.quantize_(nn.ModuleDict({"part": nn.Sequential(nn.Linear(256, 512))}), config)
    ak.save_packed(ak.pack_(ak.hard_quantize_(model)), tmp_path / "packed")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(NotWritten, match=r"out.*: cannot be written \("):
            export_packed(model, tmp_path / "out", to)
        code = main(["export", str(tmp_path / "packed"), "--to", to, "--out", str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "cannot be written (" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["packed"]


def test_the_command_line(tmp_path, capsys):
    pytest.importorskip("gguf")
    model, weight = trained("gguf:q4_0")
    source, out, back = (str(tmp_path / name) for name in ("packed.safetensors", "out.gguf", "back.safetensors"))
    ak.save_packed(model, source)
    assert main(["export", source, "--to", "gguf", "--out", out, "--verify"]) == 0
    said = capsys.readouterr().out
    assert "1 of 1 layers equal bit for bit" in said and "gguf" in said
    assert main(["inspect", out, "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["name"] == "0" and layer["weights"] == weight.numel()
    assert main(["convert", out, back]) == 0
    assert torch.equal(read_contents(back).layers["0"].dequantize(), weight)
    capsys.readouterr()
    for arguments, told in (
        (["export", str(tmp_path / "none"), "--to", "gguf", "--out", out], "no such file"),
        (["export", source, "--to", "gguf", "--out", str(tmp_path / "x"), "--architecture", "nonsense"], "nonsense"),
        (["convert", source, back], "packed.safetensors: is packed already; export writes it"),
    ):
        assert main(arguments) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", source, "--to", "pickle", "--out", out])
    assert "invalid choice: 'pickle'" in capsys.readouterr().err


def test_verify_shows_a_difference(tmp_path, capsys, monkeypatch):
    """A file that was made with another weight is found out."""
    pytest.importorskip("gguf")
    model, _ = trained("gguf:q4_0")
    contents = contents_of(model)
    out = tmp_path / "out.gguf"
    export_packed(model, out, "gguf")
    contents.layers["0"].weight_codes = contents.layers["0"].weight_codes.clone()
    contents.layers["0"].weight_codes[0, 0] ^= 1
    (row,), _ = compare(contents, out, "gguf")
    assert row.difference and row.difference > 0


def test_an_optimizer_rounds_the_scales_of_bare_parameters():
    w = nn.Parameter(torch.randn(8, 32))
    group = {"params": [w], "grid": ak.quant.Uniform(4), "scale_dtype": "float16"}
    optimizer = ak.optim.ASkewSGD([group], lr=0.1)
    for _ in range(2):
        w.grad = torch.randn_like(w)
        optimizer.step()
    scale = optimizer.state_dict()["state"][0]["scale"]
    assert holds_scales(scale, "float16") and not holds_scales(scale * 1.01, "float16")
