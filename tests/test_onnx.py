"""Contract: packed models as ONNX files.

1. The weights are integers of 2, 4 or 8 bits, and what onnxruntime makes of them is the trained weight, bit for bit,
   for every operator; its outputs are the model's, whatever layers share.
2. Quantized inputs of layers give the same bits.
3. What a file cannot hold is refused, or by request or with a warning written otherwise, by the layer's name; nothing
   is written then.
4. A file gives back the packed model it was made of, a file of others the same weights; damaged files are errors.
5. Packed files with a config.json become the files of whole transformers models of any batch and length.
"""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from oracles import NF4
from packed_models import CONFIGS, X, packed
from torch import nn

import askew_kernels as ak
from askew_kernels.__main__ import main
from askew_kernels.deploy.contents import contents_of, read_contents, write_contents
from askew_kernels.deploy.files import PackedFileError
from askew_kernels.deploy.integers import packed_layer
from askew_kernels.nn.kinds import KINDS
from askew_kernels.nn.layers import quantized_input
from askew_kernels.quant import FP4, Binary, Codebook, PowersOfTwo, Ternary, Uniform

onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

from askew_kernels.deploy import to_onnx  # noqa: E402
from askew_kernels.deploy.to_onnx import export_onnx  # noqa: E402


def session(path):
    """onnxruntime's, that rounds no inputs where it makes MatMulNBits of DequantizeLinear and MatMul by itself."""
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", CONFIGS)
def test_onnx(name, tmp_path):
    model, path = packed(CONFIGS[name]), tmp_path / "model.onnx"
    export_onnx(model, X, path, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    kinds = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
    integers = onnx.TensorProto.INT8 if name == "int8" else onnx.TensorProto.INT4
    assert [kinds[f"{i}.weight_levels"] for i in (0, 3, 5)] == [integers] * 3
    assert not any(k.endswith(".weight") for k in kinds)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(session(path).run(None, {"x": X.numpy()})[0]), model(X), rtol=1e-4, atol=1e-4
        )


def run_onnx(model, x, path):
    """onnxruntime's output for x, and the names of the file's initialisers."""
    export_onnx(model, x, path, input_names=["x"])
    names = {t.name for t in onnx.load(path).graph.initializer}
    return torch.tensor(session(path).run(None, {"x": x.numpy()})[0]), names


class Sharing(nn.Module):
    """Copies, ties and layers that nobody calls, among layers of one shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.table = nn.Embedding(16, 16)
        self.first, self.copied, self.tied, self.again = (nn.Linear(16, 16) for _ in range(4))
        self.unused, self.head = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.copied.load_state_dict(self.first.state_dict())
        self.tied.weight = self.first.weight
        self.again = self.first

    def forward(self, i):
        x = self.again(self.tied(self.copied(self.first(self.table(i)).relu())).relu())
        return self.head(x)


@pytest.mark.parametrize("name", ["int4 tensor", "int4 channel", "int4 group", "ternary"])
def test_onnx_of_layers_that_share(name, tmp_path):
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(Sharing(), CONFIGS[name]))).eval()
    model.table.weight = nn.Parameter(model.head.dequantize())  # equal to a packed weight, and not packed itself
    i = torch.arange(12)
    got, names = run_onnx(model, i, tmp_path / "m.onnx")
    with torch.no_grad():
        torch.testing.assert_close(got, model(i), rtol=1e-4, atol=1e-4)
    assert sum(n.endswith(".weight_levels") for n in names) == 2 and not any(n.endswith(".weight") for n in names)


def test_onnx_of_levels_at_the_ends_of_8_bits(tmp_path):
    for levels in ([-128, -3, 0, 127], [0, 1, 100, 255], [0, 2, 7, 15]):
        model = packed(ak.QuantConfig(Codebook([float(c) for c in levels]), scale="absmax"))
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(model, X, tmp_path / "m.onnx")[0], model(X), rtol=1e-4, atol=1e-4)


def test_onnx_names_what_it_cannot_hold(tmp_path):
    for config, message in {
        ak.QuantConfig(Codebook(NF4), scale="absmax"): "^0: ONNX files hold integer levels",
        ak.QuantConfig(Codebook([-300.0, 0.0, 300.0]), scale="absmax"): "^0: ONNX files hold levels of 8 bits",
        ak.QuantConfig(Codebook([-1.0, 0.0, 255.0]), scale="absmax"): "^0: ONNX files hold levels of 8 bits",
    }.items():
        with pytest.raises(ValueError, match=message):
            export_onnx(packed(config), X, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_files_are_written_whole(tmp_path):
    path = tmp_path / ("m" * 250 + ".onnx")
    link = tmp_path / "latest"
    link.symlink_to(path)
    run_onnx(packed(CONFIGS["int4 channel"]), X, link)
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["latest", path.name]


# ---- operators -------------------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A layer of every kind, the last ones behind the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.table, self.signal = nn.Embedding(20, 64), nn.Conv1d(64, 64, 3, padding=1)
        self.image, self.grouped = nn.Conv2d(1, 16, 3, padding=(1, 0)), nn.Conv2d(16, 8, (3, 1), stride=2, groups=4)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(64, 24)

    def forward(self, i):
        x = self.signal(self.table(i).transpose(1, 2)).transpose(1, 2)
        y = self.grouped(self.norm(self.image(x[:, None])).relu())
        return self.head(x) + y.mean()


GRIDS = {
    "int8": Uniform(8), "uint8": Uniform(8, signed=False), "int5": Uniform(5), "int4": Uniform(4),
    "int3": Uniform(3, narrow=True),
    "uint4": Uniform(4, signed=False), "int2": Uniform(2), "uint2": Uniform(2, signed=False), "ternary": Ternary(),
    "binary": Binary(), "fp4": FP4(), "powers": PowersOfTwo(4), "odd": Codebook([-3.0, 0.0, 1.0, 12.0]),
}  # fmt: skip
GRANULARITIES = {
    "tensor": {"granularity": "per_tensor"}, "channel": {}, "group16": {"granularity": "per_group", "group_size": 16},
    "group32": {"granularity": "per_group", "group_size": 32}, "group8": {"granularity": "per_group", "group_size": 8},
}  # fmt: skip


def of_kinds(grid, granularity="channel", dtype=torch.float32, **options):
    config = ak.QuantConfig(grid, scale="absmax", **GRANULARITIES[granularity], **options)

    def fits(module, name):
        return name in ("table", "signal", "head") or config.group_size is None

    model = ak.quantize_(Kinds().to(dtype), config, filter_fn=fits, kinds=("linear", "conv", "embedding"))
    return ak.pack_(ak.hard_quantize_(model)).eval()


IDS = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(3))


def same_weights(contents, path):
    weights, reader = to_onnx.dequantized(path)
    assert reader == f"onnxruntime {runtime.__version__}" and weights.keys() >= contents.layers.keys()
    for name, layer in contents.layers.items():
        assert torch.equal(weights[name].to(layer.weight_dtype), layer.dequantize()), name


@pytest.mark.parametrize("operator", to_onnx.OPERATORS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", GRIDS)
def test_every_operator_holds_the_weights(name, granularity, operator, tmp_path):
    model, path = of_kinds(GRIDS[name], granularity), tmp_path / "m.onnx"
    export_onnx(model, IDS, path, operator=operator, opset=25 if "2" in name else 21, input_names=["i"])
    contents, again = contents_of(model), to_onnx.read(path)
    same_weights(contents, path)
    for key, layer in contents.layers.items():
        other = again.layers[key]
        assert other.config == layer.config and other.weight_dtype == layer.weight_dtype
        assert torch.equal(other.weight_codes, layer.weight_codes) and torch.equal(
            other.weight_scale, layer.weight_scale
        )
    write_contents(again, tmp_path / "m.safetensors")
    target = Kinds().eval()
    target.norm.num_batches_tracked += 3
    loaded = ak.load_packed(tmp_path / "m.safetensors", target)
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))
        got = session(path).run(None, {"i": IDS.numpy()})[0]
        torch.testing.assert_close(torch.tensor(got), model(IDS), rtol=1e-4, atol=1e-4)


def test_the_types_and_the_operators_of_a_file(tmp_path, caplog):
    path = tmp_path / "m.onnx"
    export_onnx(of_kinds(Uniform(2)), IDS, path, operator="MatMulNBits", accuracy_level=4)
    assert "ONNX: written for DequantizeLinear: signal (MatMulNBits and" in caplog.text
    assert "ONNX: written for DequantizeLinear: image, grouped (" in caplog.text
    made = onnx.load(path)
    nodes = {node.op_type: {a.name: a.i for a in node.attribute} for node in made.graph.node}
    assert nodes["MatMulNBits"] == {"bits": 2, "block_size": 64, "K": 64, "N": 24, "accuracy_level": 4}
    assert nodes["GatherBlockQuantized"] == {"bits": 2, "block_size": 64, "gather_axis": 0, "quantize_axis": 1}
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in made.graph.initializer}
    assert kinds["head.weight_data"] == "UINT8" and kinds["signal.weight_levels"] == "INT4"
    assert "head.weight_zero_points" not in kinds and not any(n.endswith(".weight") and "norm" not in n for n in kinds)
    for grid, opset, want in (
        (Uniform(2), 25, "INT2"),
        (Ternary(), 25, "INT2"),
        (Uniform(2, signed=False), 25, "UINT2"),
        (Uniform(2), 21, "INT4"),
        (Uniform(3), 25, "INT4"),
        (Uniform(5), 25, "INT8"),
    ):
        export_onnx(of_kinds(grid), IDS, path, opset=opset)
        made = onnx.load(path)
        [kind] = {t.data_type for t in made.graph.initializer if t.name.endswith("weight_levels")}
        assert onnx.TensorProto.DataType.Name(kind) == want and made.opset_import[0].version == opset


def test_it_is_as_small_as_its_bits(tmp_path):
    torch.manual_seed(0)
    config = ak.QuantConfig(Uniform(2), granularity="per_group", group_size=128)
    model = ak.pack_(ak.quantize_(nn.Sequential(nn.Linear(1024, 512, bias=False)), config), force=True)
    export_onnx(model, torch.zeros(1, 1024), tmp_path / "m.onnx", operator="MatMulNBits")
    assert 512 * 1024 / 4 + 512 * 8 * 4 < (tmp_path / "m.onnx").stat().st_size < 512 * 1024 / 4 + 512 * 8 * 4 + 2000


# ---- quantized inputs ------------------------------------------------------------------------------------------------


INPUTS = {"int8": Uniform(8), "narrow8": Uniform(8, narrow=True), "uint8": Uniform(8, signed=False), "int4": Uniform(4),
          "ternary": Ternary(), "binary": Binary(), "fp4": FP4(), "nf4": Codebook(NF4)}  # fmt: skip


@pytest.mark.parametrize("operator", to_onnx.OPERATORS)
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_quantized_to_the_same_bits(name, operator, tmp_path):
    """A layer with one weight in a row, a power of two, gives its input back: products and sums are exact."""
    torch.manual_seed(1)
    config = ak.QuantConfig(Uniform(4), scale="absmax", granularity="per_tensor", activation=INPUTS[name])
    layer = nn.Linear(48, 48, bias=False)
    layer.weight = nn.Parameter(torch.eye(48) * 7)
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(layer), config))).eval()
    x = torch.randn(5, 7, 48) * torch.logspace(-4, 4, 35).reshape(5, 7, 1)
    x[1, 1] = 0
    x[2, 2, :8] = torch.tensor([3.5, -2.5, 0.5, -0.5, 1.5, 127.0, -127.0, 63.5])  # ties
    x[2, 2, 8:] = 0
    export_onnx(model, x[:1], tmp_path / "m.onnx", operator=operator, input_names=["x"],
                dynamic_axes={"x": {0: "a", 1: "b"}})  # fmt: skip
    got = torch.tensor(session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})[0])
    assert torch.equal(got, 7 * quantized_input(x, INPUTS[name], 1))
    assert to_onnx.read(tmp_path / "m.onnx").layers["0"].config == config


@pytest.mark.parametrize("operator", to_onnx.OPERATORS)
def test_a_model_with_quantized_inputs(operator, tmp_path):
    model = of_kinds(Uniform(4), activation=Uniform(8))
    export_onnx(model, IDS, tmp_path / "m.onnx", operator=operator, input_names=["i"])
    got = torch.tensor(session(tmp_path / "m.onnx").run(None, {"i": IDS.numpy()})[0])
    with torch.no_grad():
        want = model(IDS)
        floats = ak.unpack_(model, force=True)(IDS)
    # where the order of a sum puts an input on the other side of a threshold, one step of one input in 127 differs
    assert (got - want).abs().max() < 0.1 * (floats - want).abs().max()
    same_weights(to_onnx.read(tmp_path / "m.onnx"), tmp_path / "m.onnx")


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 2, 31, 33, 130, 131])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_embeddings_that_are_no_whole_bytes(bits, cols, tmp_path, caplog):
    """GatherBlockQuantized counts the columns by the bytes of a row."""
    config = ak.QuantConfig(Uniform(bits), scale="absmax")
    model = nn.Sequential(nn.Embedding(5, cols), nn.Linear(cols, 16))
    ak.pack_(ak.hard_quantize_(ak.quantize_(model, config, kinds=("linear", "embedding"))))
    export_onnx(model, torch.arange(5), tmp_path / "m.onnx", operator="MatMulNBits", input_names=["ids"])
    (rows,) = session(tmp_path / "m.onnx").run(None, {"ids": torch.arange(5).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(rows), model(torch.arange(5)))
    same_weights(contents_of(model), tmp_path / "m.onnx")
    whole = cols * bits % 8 == 0
    assert whole == ("rows of whole bytes" not in caplog.text)
    kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert "MatMulNBits" in kinds and whole == ("GatherBlockQuantized" in kinds)


def test_what_does_not_fit_is_told_and_written_otherwise(tmp_path, caplog):
    path = tmp_path / "m.onnx"
    model = of_kinds(Uniform(4), "group8")
    for part, i, message in (
        (model.head, torch.zeros(1, 64), "blocks are powers of two from 16 on, groups of 8 are no multiple"),
        (model.signal, torch.zeros(1, 64, 9), "hold linear layers and embeddings, got conv1d"),
    ):
        with pytest.raises(ValueError, match=f"^0: .*{message}"):
            export_onnx(nn.Sequential(part), i, path, operator="MatMulNBits", strict=True)
        assert not path.exists()
    export_onnx(model, IDS, path, operator="MatMulNBits")
    assert "ONNX: written for DequantizeLinear: table, head (blocks are powers of two" in caplog.text
    same_weights(contents_of(model), path)

    config = ak.QuantConfig(Codebook(NF4), scale="absmax")
    torch.manual_seed(0)
    mixed = ak.quantize_(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), {"0": config, "1": CONFIGS["int8"]})
    mixed = ak.pack_(mixed, force=True).eval()
    with pytest.raises(
        ValueError, match="^0: ONNX files hold integer levels.*; name it in dense= to write it as floats"
    ):
        export_onnx(mixed, torch.zeros(2, 16), tmp_path / "other.onnx")
    export_onnx(mixed, torch.zeros(2, 16), path, dense=["0"], input_names=["x"])
    x = torch.randn(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(session(path).run(None, {"x": x.numpy()})[0]), mixed(x))
    again = to_onnx.read(path)
    assert list(again.layers) == ["1"] and torch.equal(again.tensors["0.weight"], mixed[0].dequantize())


def test_wrong_arguments_are_named(tmp_path):
    model = packed(CONFIGS["int8"])
    for options, message in (
        ({"operator": "MatMul"}, "^operator: expected one of DequantizeLinear, MatMulNBits, got 'MatMul'"),
        ({"opset": 20}, "^opset: expected 21 or 25, got 20"),
        ({"accuracy_level": 5}, "^accuracy_level: expected 0 to 4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(model, X, tmp_path / "m.onnx", **options)
    with pytest.raises(ValueError, match="^model: has no packed layers"):
        export_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


# ---- files of others -------------------------------------------------------------------------------------------------


def float_file(path, dims=2):
    """A float model of two linear layers, of 3-D inputs as transformers have them, or 2-D."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros(*[2] * (dims - 1), 64),), str(path), dynamo=False, opset_version=20,
                          input_names=["x"], do_constant_folding=dims == 3)  # fmt: skip
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_onnxruntimes_own_quantizer_wrote(bits, symmetric, tmp_path):
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    pytest.importorskip("onnx_ir")
    float_file(tmp_path / "f.onnx", 3)
    made = quantizer.MatMulNBitsQuantizer(
        onnx.load(tmp_path / "f.onnx"), block_size=32, is_symmetric=symmetric, bits=bits
    )
    made.process()
    made.model.save_model_to_file(str(tmp_path / "q.onnx"), False)
    weights, _ = to_onnx.dequantized(tmp_path / "q.onnx")
    # it makes scales negative where that rounds less: their levels are the opposite, and -128 of 8 bits has none
    if not symmetric or bits == 8:
        with pytest.raises(PackedFileError, match=r"q.onnx: .*: (its zero points differ|.*got -128 to 128)"):
            to_onnx.read(tmp_path / "q.onnx")
        return
    read = to_onnx.read(tmp_path / "q.onnx")
    assert sorted(read.layers) == sorted(weights) and len(weights) == 2
    for name, layer in read.layers.items():
        assert torch.equal(layer.dequantize(), weights[name])
        assert layer.config.weight == Uniform(5)
        assert layer.config.group_size == 32
    assert {"0.bias", "2.bias"} <= read.tensors.keys()


def qdq_file(path, across, consumer, block=0, zero=0, kind="INT8"):
    """x times the weight of a DequantizeLinear node, in the orientation that others write: (K, N) for MatMul."""
    rng = torch.Generator().manual_seed(0)
    low, high = (-8, 8) if kind == "INT4" else (-128, 128) if kind == "INT8" else (0, 256)
    levels = torch.randint(low, high, (6, 32), generator=rng)
    scale = torch.rand(6, 32 // block if block else 1, generator=rng) + 0.1
    weight = (levels - zero) * scale.repeat_interleave(block or 32, 1)
    q, s = (levels.t(), scale.t()) if across else (levels, scale)
    helper, types = onnx.helper, onnx.TensorProto
    constants = [
        helper.make_tensor("fc.weight_quantized", getattr(types, kind), q.shape, q.flatten().tolist()),
        helper.make_tensor("fc.weight_scale", types.FLOAT, s.shape if block else (6,), s.flatten().tolist()),
    ]
    if zero:
        points = helper.make_tensor(
            "fc.weight_zero", getattr(types, kind), s.shape if block else (6,), [zero] * s.numel()
        )
        constants.append(points)
    names, axis = [t.name for t in constants], 0 if bool(across) == bool(block) else 1
    nodes = [helper.make_node("DequantizeLinear", names, ["w"], axis=axis, block_size=block)]
    nodes += [helper.make_node(consumer, ["x", "w"], ["y"], **({} if across else {"transB": 1}))]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", types.FLOAT, ["n", 32])],
                              [helper.make_tensor_value_info("y", types.FLOAT, ["n", 6])], constants)  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return weight


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize(("across", "consumer"), [(True, "MatMul"), (True, "Gemm"), (False, "Gemm")])
@pytest.mark.parametrize(("kind", "zero"), [("INT8", 0), ("INT4", 0), ("UINT8", 128), ("UINT8", 0)])
def test_dequantize_linear_of_others(across, consumer, block, kind, zero, tmp_path):
    want = qdq_file(tmp_path / "m.onnx", across, consumer, block, zero, kind)
    weights, _ = to_onnx.dequantized(tmp_path / "m.onnx")
    read = to_onnx.read(tmp_path / "m.onnx")
    assert list(read.layers) == list(weights) == ["fc"] and torch.equal(weights["fc"], want)
    layer = read.layers["fc"]
    assert torch.equal(layer.dequantize(), want) and layer.config.group_size == (block or None)
    assert layer.config.weight == Uniform(4 if kind == "INT4" else 8, signed=kind != "UINT8" or zero == 128)


def test_static_quantization_of_others(tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.zeros(1, 3, 4, 4),), str(tmp_path / "f.onnx"), dynamo=False, opset_version=20,
                          input_names=["x"])  # fmt: skip

    class Reader(quantization.CalibrationDataReader):
        left = 3

        def get_next(self):
            self.left -= 1
            return {"x": torch.randn(1, 3, 4, 4).numpy()} if self.left >= 0 else None

    quantization.quantize_static(str(tmp_path / "f.onnx"), str(tmp_path / "q.onnx"), Reader(), per_channel=True,
                                 weight_type=quantization.QuantType.QInt8)  # fmt: skip
    weights, _ = to_onnx.dequantized(tmp_path / "q.onnx")
    read = to_onnx.read(tmp_path / "q.onnx")
    assert sorted(read.layers) == ["0", "3"] and read.layers["0"].kind.name == "conv2d"
    assert read.layers["0"].stride == (2, 2) and read.layers["0"].padding == (1, 1)
    for name, layer in read.layers.items():
        assert torch.equal(layer.dequantize(), weights[name])
        assert (layer.dequantize() - model.get_submodule(name).weight).abs().max() < 0.01
    assert any("bias" in key for key in read.tensors)


# ---- damaged files ---------------------------------------------------------------------------------------------------


def test_damaged_files_are_errors(tmp_path):
    good, path = tmp_path / "good.onnx", tmp_path / "m.onnx"
    export_onnx(of_kinds(Uniform(4)), IDS, good, operator="MatMulNBits")
    data, rng, read = good.read_bytes(), random.Random(0), 0
    assert to_onnx.is_one(good) and not to_onnx.is_one(tmp_path) and not to_onnx.is_one(tmp_path / "none")
    for size in (0, 1, 100, len(data) - 1):
        path.write_bytes(data[:size])
        assert not to_onnx.is_one(path)
        with pytest.raises(PackedFileError, match="m.onnx: not a whole ONNX file"):
            to_onnx.read(path)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            to_onnx.read(path)
            read += 1
        except PackedFileError as error:
            assert str(path) in str(error)
    assert read > 50  # most bytes are weights'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p: t.external_data.add(key="location", value="/etc/passwd"), "lies in another file"),
        (lambda t, p: t.dims.__setitem__(0, 2**40), "larger than its data"),
        (lambda t, p: t.dims.__setitem__(0, -1), "larger than its data"),
        (lambda t, p: t.dims.__setitem__(0, 4), "0.weight_data: cannot be read as UINT8"),
        (lambda t, p: t.ClearField("name"), "damaged metadata|expected an initialiser"),
        (lambda t, p: setattr(p, "value", "[]"), "metadata"),
        (
            lambda t, p: setattr(p, "value", p.value.replace('"version": 1', '"version": 2')),
            "this release reads version 1",
        ),
        (lambda t, p: setattr(p, "value", p.value.replace("[6, 32]", "[6, 33]")), "integers for a weight of shape"),
        (lambda t, p: setattr(p, "value", p.value.replace('"uniform"', '"binary"')), "expected|level"),
        (lambda t, p: setattr(p, "value", p.value.replace('"float32"', '"int8"')), "damaged metadata"),
    ],
)
def test_what_a_file_says_is_checked(change, message, tmp_path):
    path = tmp_path / "m.onnx"
    config = ak.QuantConfig(Uniform(4), scale="absmax")
    model = ak.pack_(ak.quantize_(nn.Sequential(nn.Linear(32, 6)), config), force=True)
    export_onnx(model, torch.zeros(1, 32), path, operator="MatMulNBits")
    made = onnx.load(path)
    change(next(t for t in made.graph.initializer if t.name == "0.weight_data"), made.metadata_props[0])
    path.write_bytes(made.SerializeToString())
    with pytest.raises(PackedFileError, match=message):
        to_onnx.read(path)


@pytest.mark.parametrize("shape", [(2**20, 2**24), (4, 2**40), (2**39, 8)], ids=str)
def test_what_is_said_of_a_layer_takes_no_memory(shape):
    """Files of a few bytes could ask for all that there is: the sizes are compared with those of the integers first."""
    levels, config = torch.zeros(4, 8, dtype=torch.int16), ak.QuantConfig(Uniform(4))
    with pytest.raises(ValueError, match="4 x 8 integers for a weight of shape"):
        packed_layer(KINDS["linear"], shape, levels, torch.ones(4, 1), config, block=8)
    scale = torch.tensor([[1.0], [-1.0], [0.0], [2.0]])  # whose signs go to the levels
    made = packed_layer(KINDS["linear"], (4, 8), levels + 3, scale, (-8, 7), block=2**45)
    assert torch.equal(made.dequantize(), (3 * scale).expand(4, 8))


# ---- transformers ----------------------------------------------------------------------------------------------------


def transformers_models():
    t = pytest.importorskip("transformers")
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 32}  # fmt: skip
    image = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "image_size": 32, "patch_size": 8}  # fmt: skip
    return {
        "bert": lambda: t.BertModel(t.BertConfig(**sizes)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32,
                                                       bos_token_id=1, eos_token_id=2)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_key_value_heads=2)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=16)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)),
        "gpt-oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**sizes, num_key_value_heads=2, num_local_experts=4,
                                                              head_dim=16)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**image)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=sizes, vision_config=image, projection_dim=32)),
        "whisper": lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(
            vocab_size=96, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=30,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)),
    }  # fmt: skip


def packed_folder(family, folder, config=None):
    torch.manual_seed(0)
    model = transformers_models()[family]().eval()
    ak.quantize_(model, config or ak.QuantConfig(Uniform(4), scale="absmax"),
                 kinds=("linear", "conv", "embedding", "experts"))  # fmt: skip
    ak.pack_(ak.hard_quantize_(model))
    ak.save_packed(model, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "family", ["bert", "gpt2", "llama", "gemma3", "mixtral", "gpt-oss", "vit", "t5", "clip", "whisper"]
)
def test_transformers_models_of_any_size(family, tmp_path):
    model = packed_folder(family, tmp_path)
    contents, path = read_contents(tmp_path / "model.safetensors"), tmp_path / "m.onnx"
    to_onnx.export(contents, path)
    same_weights(contents, path)
    again = to_onnx.read(path)
    assert again.layers.keys() == contents.layers.keys() and again.tensors.keys() == contents.tensors.keys()
    assert all(torch.equal(again.tensors[key], t) for key, t in contents.tensors.items())
    assert again.architecture == contents.architecture
    run = session(path)
    torch.manual_seed(1)
    given = {}
    for i in run.get_inputs():
        sizes = [{"batch": 3, "images": 4, "sequence": 11, "decoder_sequence": 6}.get(n, n) for n in i.shape]
        given[i.name] = torch.randint(3, 96, sizes) if "int64" in i.type else torch.randn(sizes)
    for name in given.keys() & {"attention_mask", "token_type_ids", "decoder_attention_mask"}:
        given[name] = torch.full_like(given[name], name != "token_type_ids")
    if family in ("bert", "gpt2", "llama", "gemma3", "mixtral", "t5"):
        given["attention_mask"][0, 8:] = 0
    with torch.no_grad():
        want = {k: v for k, v in model(**given).items() if isinstance(v, torch.Tensor)}
    got = dict(
        zip([o.name for o in run.get_outputs()], run.run(None, {k: v.numpy() for k, v in given.items()}), strict=True)
    )
    assert got.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(
            torch.tensor(got[name]), t, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_what_no_graph_is_known_for(tmp_path):
    model = ak.pack_(ak.quantize_(nn.Sequential(nn.Linear(32, 6)), CONFIGS["int8"]), force=True)
    with pytest.raises(
        PackedFileError, match=r"^Sequential: architecture: .*call .*export_onnx\(model, example, path\)"
    ):
        to_onnx.export(contents_of(model), tmp_path / "m.onnx")
    pytest.importorskip("transformers")
    packed_folder("llama", tmp_path)
    contents = read_contents(tmp_path / "model.safetensors")
    for change, message in (
        ({"model_type": "lama"}, "config.json: .*lama"),
        ({"model_type": "bert"}, "config.json: no model of transformers"),
        ({"hidden_size": 32}, "layer model.embed_tokens: expected a weight of shape"),
        ({"architectures": ["nn"]}, "architecture: .*no model 'nn'"),
        ({"architectures": ["LlamaModel"]}, "layer .*: the model has no such layer"),
    ):
        wrong = copy.copy(contents)
        wrong.architecture = contents.architecture | change
        with pytest.raises(PackedFileError, match=f"^{tmp_path}/model.safetensors: {message}"):
            to_onnx.export(wrong, tmp_path / "m.onnx")
    nf4 = ak.QuantConfig(Codebook(NF4), scale="absmax")
    (tmp_path / "nf4").mkdir()
    packed_folder("llama", tmp_path / "nf4", nf4)
    with pytest.raises(
        PackedFileError, match=r"nf4/model.safetensors: model.embed_tokens: ONNX files hold integer levels"
    ):
        to_onnx.export(read_contents(tmp_path / "nf4" / "model.safetensors"), tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "nf4"]


def test_the_command_line(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    model, ids = packed_folder("llama", tmp_path), torch.arange(12)[None]
    source, path, back = (str(tmp_path / name) for name in ("model.safetensors", "m.onnx", "back.safetensors"))
    assert main(["export", source, "--to", "onnx", "--out", path, "--verify"]) == 0
    out = capsys.readouterr().out
    assert "read by onnxruntime" in out and "16 of 16 layers equal bit for bit" in out
    assert main(["inspect", path]) == 0 and "model.layers.0.mlp.up_proj" in capsys.readouterr().out
    assert (
        main(["export", source, "--to", "onnx", "--out", path]) == 2 and "is there already" in capsys.readouterr().err
    )
    assert main(["convert", path, back]) == 0
    with torch.no_grad():
        loaded = ak.load_packed(back, transformers.LlamaForCausalLM(model.config)).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_layers_that_no_output_needs_are_left_out_and_told(tmp_path, caplog):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pooler = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            hidden = self.first(x)
            self.pooler(hidden)  # as BERT's, for those who read the hidden states alone
            return hidden

    torch.manual_seed(0)
    model, x = ak.pack_(ak.hard_quantize_(ak.quantize_(Pooled(), CONFIGS["int4 channel"]))).eval(), torch.randn(2, 16)
    export_onnx(model, x, tmp_path / "m.onnx", input_names=["x"])
    assert "no output depends on pooler: left out" in caplog.text
    names = {t.name for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert "first.weight_levels" in names and not any(name.startswith("pooler") for name in names)


def test_a_weight_that_is_frozen_into_the_graph_is_an_error(tmp_path):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            self.layer(x)
            return x @ torch.tensor(self.layer.weight.detach().tolist())

    model = ak.pack_(ak.hard_quantize_(ak.quantize_(Frozen(), CONFIGS["int4 channel"]))).eval()
    with pytest.raises(ValueError, match="layer: its weight is a constant of floats in the exported graph"):
        export_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
