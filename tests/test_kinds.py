"""Contract: kinds of layers (``nn.kinds.KINDS``), each the whole way by the same test: one row of ``CASES`` a kind.

1. An entry says what makes another layer of the same sizes, and what its classes have in a state_dict.
2. Quantized, trained relaxed or hard, hard-quantized, saved, packed, written, read, unpacked, dequantized, exported:
   the very weights, in every state; the gradient of a weight is that of the quantized one, zero outside the hull.
3. What is not asked for by ``kinds=`` is left, and told; unknown names are errors that list the known ones.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import pickle
import re

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.deploy.contents import read_contents
from askew_kernels.deploy.convert import convert_file
from askew_kernels.deploy.files import PackedFileError
from askew_kernels.deploy.inspect import report_of_contents
from askew_kernels.nn import KINDS, kinds
from askew_kernels.nn.layers import GRIDS, STATE, quantized_input
from askew_kernels.quant import Binary, Ternary, Uniform
from askew_kernels.quant.forms import ROWS, Form
from askew_kernels.quant.sharding import split_roles
from askew_kernels.search import Budget, LayerPolicy, Policy, search_policy, trace, uniform_policy

save_file = pytest.importorskip("safetensors.torch").save_file


def numbers(*shape):
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def indices(*shape):
    return lambda: torch.randint(1, 8, shape, generator=torch.Generator().manual_seed(5))


def filled(layer):
    """Weights as large as those of other layers."""
    nn.init.uniform_(layer.weight, -0.3, 0.3)
    return layer


# {case: (kind, layer, input, MACs of it for one sample)}
CASES = {
    "linear": ("linear", lambda: nn.Linear(12, 8), numbers(5, 12), 12 * 8),
    "linear without bias": ("linear", lambda: nn.Linear(12, 8, bias=False), numbers(2, 3, 12), 3 * 12 * 8),
    "transposed": ("transposed_linear", lambda: filled(kinds.TransposedLinear(8, 12)), numbers(5, 12), 12 * 8),
    "transposed without bias": (
        "transposed_linear", lambda: filled(kinds.TransposedLinear(8, 12, bias=False)), numbers(2, 3, 12), 3 * 12 * 8,
    ),
    "conv1d": ("conv1d", lambda: nn.Conv1d(4, 8, 3, padding=1), numbers(2, 4, 9), 9 * 8 * 12),
    "conv1d depthwise": (
        "conv1d", lambda: nn.Conv1d(8, 8, 4, 2, 3, 2, groups=8, padding_mode="reflect"), numbers(8, 9), 5 * 8 * 4 / 8,
    ),
    "conv2d": ("conv2d", lambda: nn.Conv2d(4, 8, 3, padding=1), numbers(2, 4, 5, 5), 25 * 8 * 36),
    "conv2d grouped": (
        "conv2d", lambda: nn.Conv2d(4, 8, 2, 2, groups=2, bias=False), numbers(2, 4, 5, 5), 4 * 8 * 8,
    ),
    "conv3d": ("conv3d", lambda: nn.Conv3d(4, 8, 3, padding=1), numbers(2, 4, 3, 4, 5), 60 * 8 * 108),
    "conv3d grouped": (
        "conv3d", lambda: nn.Conv3d(4, 8, (1, 2, 2), (1, 2, 1), groups=2, bias=False), numbers(2, 4, 3, 4, 5),
        3 * 2 * 4 * 8 * 8,
    ),
    "transposed conv1d": ("conv_transpose1d", lambda: nn.ConvTranspose1d(4, 8, 3, 2, 1, 1), numbers(2, 4, 9), 36 * 24),
    "transposed conv2d": (
        "conv_transpose2d", lambda: nn.ConvTranspose2d(4, 8, 4, 2, 1), numbers(2, 4, 3, 5), 60 * 8 * 16,
    ),
    "transposed conv2d grouped": (
        "conv_transpose2d", lambda: nn.ConvTranspose2d(8, 6, 2, 2, groups=2, bias=False), numbers(2, 8, 3, 5),
        8 * 15 * 3 * 4,
    ),
    "transposed conv2d depthwise": (
        "conv_transpose2d", lambda: nn.ConvTranspose2d(8, 8, (2, 4), (2, 1), dilation=(1, 2), groups=8),
        numbers(2, 8, 3, 5), 8 * 15 * 8,
    ),
    "transposed conv3d": (
        "conv_transpose3d", lambda: nn.ConvTranspose3d(4, 8, 2, 2, groups=2), numbers(2, 4, 2, 3, 2), 4 * 12 * 4 * 8,
    ),
    "embedding": ("embedding", lambda: nn.Embedding(8, 12, padding_idx=1), indices(2, 3), 0),
    "embedding by frequency": ("embedding", lambda: nn.Embedding(8, 12, scale_grad_by_freq=True), indices(20), 0),
}  # fmt: skip
CONFIGS = {
    "int4 channel": ak.QuantConfig(Uniform(4)),
    "int4 group": ak.QuantConfig(Uniform(4), "absmax", "per_group", 4),
    "int3 tensor": ak.QuantConfig(Uniform(3), granularity="per_tensor"),
    "ternary relaxed": ak.QuantConfig(Ternary(), forward="relaxed"),
    "binary": ak.QuantConfig(Binary()),
}
by_case = pytest.mark.parametrize("case", CASES)
by_config = pytest.mark.parametrize("name", CONFIGS)


def model_of(case, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(CASES[case][1]())


def quantized(case, name, seed=0):
    return ak.quantize_(model_of(case, seed), CONFIGS[name], kinds=CASES[case][0])


def test_every_kind_has_a_case():
    assert {kind for kind, *_ in CASES.values()} == {name for name, kind in KINDS.items() if not kind.held}


@by_case
def test_an_entry_is_whole(case):
    """All arguments of torch's class but those that are no attributes; classes that are told apart; keys."""
    kind, layer = KINDS[CASES[case][0]], model_of(case)[0]
    others = {"self", "bias", "device", "dtype", "norm_type", "_weight", "_freeze"}
    assert set(kind.sizes + kind.options) == set(inspect.signature(kind.plain.__init__).parameters) - others
    assert type(layer) is kind.plain and layer.weight.dim() == kind.dims
    alike, other = kind.plain(**kind.arguments_of(layer)), kind.of_shape(layer.weight.shape, False)
    assert repr(alike) == repr(layer) and other.weight.shape == layer.weight.shape
    assert kind.geometry_of(alike) == kind.geometry_of(layer) and set(kind.geometry) <= set(kind.options)
    packed = kind.packed.like(layer)
    assert kinds.kind_of(layer) is kinds.kind_of(packed) is kind.quantized.kind is packed.kind is kind
    assert kinds.replaceable(layer) is kind and kinds.replaceable(packed) is None
    bias = {"bias"} if kind.output is not None else set()
    assert kinds.own_keys(kind.plain) == {"weight"} | bias
    assert kinds.own_keys(kind.quantized) == {"weight", *STATE, GRIDS} | bias
    assert kinds.own_keys(kind.packed) == {"weight_codes", "weight_scale", "_extra_state"} | bias


@by_case
@by_config
def test_the_gradient_is_that_of_the_quantized_weight(case, name):
    model, x = quantized(case, name), CASES[case][2]()
    layer = model[0]
    with torch.no_grad():
        layer.form.matrix(layer.weight).flatten()[:3] *= (
            50  # outside of the hull, where the scale does not follow the largest
        )
    layer.quantizer.freeze(layer.weight, layer.weight_scale / 4)
    relaxed = layer.config.forward == "relaxed"
    y = model(x)
    weight = (layer.weight if relaxed else layer.quantized_weight()).detach().requires_grad_()
    want = layer.kind.product(layer, x, weight, layer.bias)
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, [layer.weight], grad, create_graph=True)
    (expected,) = torch.autograd.grad(want, [weight], grad)
    w, scale = layer.weight.detach(), layer.weight_scale
    t = layer.form.matrix(w).reshape(len(scale), -1) / scale[:, None]
    inside = (t >= layer.config.weight.levels[0]) & (t <= layer.config.weight.levels[-1])
    inside = layer.form.weight(inside, w.shape)
    assert 0 < int(inside.sum()) < w.numel()
    torch.testing.assert_close(got, expected if relaxed else expected * inside, rtol=1e-5, atol=1e-6)


@by_case
@by_config
def test_the_whole_way(case, name, tmp_path):
    kind, config = KINDS[CASES[case][0]], CONFIGS[name]
    x, path = CASES[case][2](), tmp_path / "packed.safetensors"
    plain = model_of(case)
    parameters = dict(plain.named_parameters())
    keys = set(plain.state_dict())
    model = ak.quantize_(plain, config, kinds=kind.name)
    layer = model[0]
    assert type(layer) is kind.quantized and not ak.nn.left_float(model)
    assert all(p is parameters[n] for n, p in model.named_parameters()) and keys <= set(model.state_dict())
    assert ak.quantize_(model, config, kinds=kind.name)[0] is layer

    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05, momentum=0.9)
    before = layer.weight.detach().clone()
    annealing = ak.EpsilonAnnealing(optimizer, hold=2, total=4)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        annealing.step()
        copies = [copy.deepcopy(model), quantized(case, name, seed=1)]
        copies[1].load_state_dict(model.state_dict(), strict=True)
        assert all(torch.equal(m.eval()(x), model.eval()(x)) for m in copies)
        model.train()
    assert not torch.equal(layer.weight, before)

    model.eval()
    with torch.no_grad():
        want = model(x)
        ak.hard_quantize_(model)
        assert torch.equal(model(x), want)
        equal = torch.equal if kind.form == ROWS else torch.allclose  # in the order of the shape, sums take another
        assert equal(ak.dequantize_(copy.deepcopy(model))(x), want)
    weight = layer.weight.detach().clone()
    [report] = ak.inspect(model, x).layers
    assert report.error == report.output_error == 0 and report.weights == weight.numel()
    bias = layer.bias

    ak.pack_(model)
    packed = model[0]
    assert type(packed) is kind.packed and torch.equal(packed.dequantize(), weight) and packed.bias is bias
    [again] = ak.inspect(model).layers
    assert again.bytes == report.bytes == packed.packed_bytes
    with torch.no_grad():
        got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ak.save_packed(model, path)
    meta = copy.deepcopy(model_of(case)).to("meta").eval()
    for target in (model_of(case, 1).eval(), quantized(case, name, 1).eval(), copy.deepcopy(model), meta):
        with torch.no_grad():
            assert torch.equal(ak.load_packed(path, target)(x), got) and type(target[0]) is kind.packed
    new = kind.packed.like(packed, config=config, device="cpu")
    new.load_state_dict(packed.state_dict(), strict=True)
    assert torch.equal(new.dequantize(), weight)
    unpacked = ak.unpack_(copy.deepcopy(model))
    with torch.no_grad():
        assert type(unpacked[0]) in kind.classes and equal(unpacked(x), want)


@by_case
def test_policies_and_costs(case):
    kind, x, macs = CASES[case][0], CASES[case][2](), CASES[case][3]
    model = model_of(case)
    profile = trace(model, x, kinds=kind)
    assert [p.macs for p in profile.layers.values()] == [macs]
    policy = uniform_policy(model, x, weight_bits=(2, 4), kinds=kind, budget=Budget(average_bits=3.0))
    assert policy.weight_bits == {"0": 2}
    mixed = search_policy(
        model, [(x, torch.zeros(()))], lambda y, _: y.square().mean(), weight_bits=(2, 4), act_bits=(4, 8), steps=2,
        kinds=kind, progress=False,
    )  # fmt: skip
    assert mixed.act_bits["0"] in (4, 8) if KINDS[kind].token_dims else mixed.act_bits == {"0": None}
    ak.quantize_(model, policy)
    assert type(model[0]) is KINDS[kind].quantized and model[0].config.weight == Uniform(2)
    size = ak.inspect(ak.pack_(ak.hard_quantize_(model))).layers[0].bytes
    assert policy.report["chosen"]["bytes"] == size == profile.layers["0"].packed_bytes(2)


@by_case
@pytest.mark.parametrize("name", ["int4 channel", "int4 group", "ternary relaxed"])
def test_onnx(case, name, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from askew_kernels.deploy.to_onnx import export_onnx

    model, x = ak.pack_(ak.hard_quantize_(quantized(case, name))).eval(), CASES[case][2]()
    export_onnx(model, x, tmp_path / "m.onnx", input_names=["x"])
    names = {t.name for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert "0.weight_levels" in names and "0.weight" not in names
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(torch.tensor(session.run(None, {"x": x.numpy()})[0]), want, rtol=1e-4, atol=1e-5)


@by_case
def test_convert(case, tmp_path):
    kind, x = CASES[case][0], CASES[case][2]()
    model = ak.hard_quantize_(quantized(case, "int4 channel")).eval()
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    if model[0].form.groups > 1:  # of which a state_dict says nothing, and the order of the outputs hangs on it
        with pytest.raises(PackedFileError, match="0: weight_scale: expected shape"):
            convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", CONFIGS["int4 channel"],
                         kinds={"*": kind})  # fmt: skip
        return
    convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", CONFIGS["int4 channel"], kinds={"*": kind})
    with torch.no_grad():
        got = ak.load_packed(tmp_path / "out.safetensors", model_of(case, 1).eval())(x)
        assert torch.equal(got, ak.pack_(model)(x))


def told_of(name, text):
    return re.search(rf"[(,] ?{re.escape(name)}\.weight", text) is not None


def test_kinds_are_asked_for_by_name(caplog):
    def model():
        return nn.ModuleDict({case: make() for case, (_, make, *_) in CASES.items()})

    for asked in (*KINDS, ("linear", "conv"), "conv"):
        names = {kind.name for kind in kinds.chosen(asked)}
        caplog.clear()
        with caplog.at_level(logging.WARNING, "askew_kernels"):
            made = ak.quantize_(model(), kinds=asked)
        assert set(ak.nn.quantized_layers(made)) == {case for case, (kind, *_) in CASES.items() if kind in names}
        told = "".join(record.getMessage() for record in caplog.records)
        for case, (kind, *_) in CASES.items():
            assert told_of(case, told) == (kind not in names)
            why = ak.nn.left_float(made).get(f"{case}.weight", "")
            assert (f'kinds= takes it in as "{kind}"' in why) == (kind not in names | default())
    with pytest.raises(ValueError, match=r"kinds: expected names out of attention, conv, conv.*linear.*, got 'dense'"):
        ak.quantize_(model(), kinds=("linear", "dense"))
    with pytest.raises(ValueError, match="no nn.Linear.* matches 'conv2d'"):
        ak.quantize_(model(), {"conv2d": ak.QuantConfig()}, kinds="linear")


def default():
    return {kind.name for kind in kinds.chosen(kinds.DEFAULT)}


def test_a_policy_speaks_of_its_kinds(caplog):
    """One without a kind leaves its layers float, and quantize_ says so; one that names it takes them in."""
    both = nn.Sequential(*(nn.Sequential(make()) for _, make, *_ in CASES.values()))
    ends = [LayerPolicy(f"{i}.0", kind, "", 0.0, 4) for i, (kind, *_) in enumerate(CASES.values())]
    for spoken in (("linear", "transposed_linear", "conv2d"), tuple(kind for kind, *_ in CASES.values())):
        policy = Policy(tuple(p for p in ends if p.kind in spoken))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "askew_kernels"):
            made = ak.quantize_(copy.deepcopy(both), policy)
        assert {layer.kind.name for layer in ak.nn.quantized_layers(made).values()} == set(spoken)
        told = "".join(record.getMessage() for record in caplog.records)
        for i, (kind, *_) in enumerate(CASES.values()):
            assert told_of(f"{i}.0", told) == (kind not in spoken)


def test_nothing_of_the_kinds(caplog):
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.quantize_(nn.Sequential(nn.Conv2d(1, 1, 1)), kinds="linear")
    assert "nn.Conv2d (0.weight)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.quantize_(nn.Sequential(nn.ReLU()), kinds="linear")
    assert re.search("the model has no nn.Linear.*, nothing was quantized", caplog.text)


# ---- transposed convolutions -----------------------------------------------------------------------------------------


def test_outputs_of_a_grouped_transposed_convolution_have_a_scale_each():
    """Row j G + g of the matrix is output g n + j: what that output alone depends on."""
    layer = ak.nn.AskewConvTranspose1d(6, 4, 5, groups=2, config=CONFIGS["int4 channel"])
    n, x = 2, torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(2))
    matrix, w = layer.form.matrix(layer.weight.detach()), layer.weight.detach()
    assert matrix.shape == (4, 3, 5) and layer.weight_scale.shape == (4,)
    for output in range(4):
        g, j = divmod(output, n)
        assert torch.equal(matrix[j * 2 + g], w[3 * g : 3 * g + 3, j])
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight[3:, 0] *= 2  # output 2 = 1 n + 0: row 1
        moved = (other(x) != layer(x)).any(-1)[0].tolist()
    assert moved == [False, False, True, False]
    assert (other.weight_scale != layer.weight_scale).tolist() == [False, True, False, False]


def test_a_file_that_says_nothing_of_groups(tmp_path):
    """Of a state_dict, with one scale for the tensor: codes in the order of no groups, which a model with groups
    refuses."""
    config = CONFIGS["int3 tensor"]
    model = ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.ConvTranspose1d(6, 4, 3, groups=2)), config))
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    kind = {"*": "conv_transpose1d"}
    convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", config, kinds=kind)
    other = nn.Sequential(nn.ConvTranspose1d(6, 4, 3, groups=2))
    with pytest.raises(PackedFileError, match=r"layer 0: weight_codes: expected shape \[4, 4\] with the geometry"):
        ak.load_packed(tmp_path / "out.safetensors", other)
    assert type(other[0]) is nn.ConvTranspose1d


def test_learned_scales_of_grouped_outputs():
    """Row j G + g of the scales has the gradient of output g n + j: LSQ's sum over that output's weights."""
    config = ak.QuantConfig(Uniform(3), "lsq")
    layer = ak.nn.AskewConvTranspose1d(6, 4, 3, groups=2, config=config)
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2))
    y = layer(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(grad)
    scale = layer.weight_scale.detach()
    plain = layer.quantized_weight().requires_grad_()
    (weight_grad,) = torch.autograd.grad(layer.kind.product(layer, x, plain, layer.bias), plain, grad)
    w, g = (layer.form.matrix(t.detach()).flatten(1).double() for t in (layer.weight, weight_grad))
    t, (low, *_, high) = w / scale[:, None].double(), config.weight.levels
    slopes = torch.where(t <= low, low, torch.where(t >= high, high, t.round() - t))
    factor = layer.weight_scale.grad.double() / (g * slopes).sum(1)
    torch.testing.assert_close(factor, factor[:1].expand(4), rtol=1e-4, atol=0)  # LSQ's 1/sqrt(cols c_max), or 1


@pytest.mark.parametrize("packed", [False, True], ids=["quantized", "packed"])
@pytest.mark.parametrize("kwargs", [{}, {"groups": 2}], ids=["", "groups"])
def test_output_size_and_layouts(packed, kwargs):
    torch.manual_seed(0)
    config = ak.QuantConfig(Uniform(4), activation=Uniform(8))
    model = ak.quantize_(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 3, 1, **kwargs)), config).eval()
    layer, x = model[0], torch.randn(2, 4, 5, 5).relu()
    plain = nn.ConvTranspose2d(4, 6, 3, 3, 1, **kwargs)
    with torch.no_grad():
        plain.weight.copy_(layer.quantized_weight())
        plain.bias.copy_(layer.bias)
        model = ak.pack_(ak.hard_quantize_(model)) if packed else model
        x_hat = quantized_input(x, Uniform(8), 3)
        for size in ([13, 14], [15, 15], None):
            given = {} if size is None else {"output_size": size}
            assert torch.equal(model[0](x, **given), plain(x_hat, **given))
            with torch.autocast("cpu", torch.bfloat16):
                low = model[0](x, **given)
                assert low.dtype == torch.bfloat16
                torch.testing.assert_close(low, plain(x_hat, **given), rtol=0.02, atol=0.02)
        with pytest.raises(ValueError, match="output size"):
            model[0](x, output_size=[3, 3])
        want = model(x)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), want, rtol=1e-5, atol=1e-6)


def turned(w):
    """Inputs before outputs in memory."""
    return w.transpose(0, 1).contiguous().transpose(0, 1)


def every_second(w):
    return torch.zeros([2 * n for n in w.shape])[tuple(slice(0, None, 2) for _ in w.shape)].copy_(w)


LAYOUTS = {"turned": turned, "every second": every_second,
           "channels last": lambda w: w.contiguous(memory_format=torch.channels_last)}  # fmt: skip
IN_ANY_LAYOUT = {
    "linear": (lambda: nn.Linear(8, 6), numbers(5, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), numbers(2, 8, 5)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3), numbers(2, 8, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, 2), numbers(2, 8, 5, 5)),
    "embedding": (lambda: nn.Embedding(8, 6), indices(5)),
}


@pytest.mark.parametrize(("kind", "config"), [
    *itertools.product(IN_ANY_LAYOUT, ({}, {"granularity": "per_group"}, {"granularity": "per_tensor"},
                                       {"scale": "lsq"}, {"forward": "relaxed"})),
    ("linear", {"forward": "int8"}),
], ids=str)  # fmt: skip
def test_weights_of_any_layout_train_as_contiguous_ones(kind, config):
    make, inputs = IN_ANY_LAYOUT[kind]
    if config.get("granularity") == "per_group":
        config = config | {"group_size": 3 if kind == "embedding" else 8}

    def trained(layout):
        torch.manual_seed(0)
        model = nn.Sequential(make())
        if layout:
            model[0].weight = nn.Parameter(layout(model[0].weight.detach()))
            assert not model[0].weight.is_contiguous()
        ak.quantize_(model, ak.QuantConfig(Uniform(4), **config), kinds=("linear", "conv", "embedding"))
        optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=1e-2)
        annealing = ak.EpsilonAnnealing(optimizer, hold=2, total=5)
        for _ in range(5):
            optimizer.zero_grad()
            model(inputs()).square().mean().backward()
            optimizer.step()
            annealing.step()
        ak.hard_quantize_(model)
        packed = ak.pack_(copy.deepcopy(model), activations="int8" if config.get("forward") == "int8" else "float")
        torch.testing.assert_close(packed(inputs()), model(inputs()), rtol=1e-4, atol=1e-5)
        return model[0].weight.detach()

    want = trained(None)
    for name, layout in LAYOUTS.items():
        if want.dim() == 4 or name != "channels last":
            torch.testing.assert_close(trained(layout), want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: name + m)


# ---- embeddings ------------------------------------------------------------------------------------------------------

EMBEDDINGS = ("linear", "conv", "embedding")


class Tied(nn.Module):
    """As in GPT-2: the head's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.inner, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.tokens(x))))


X = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("activation", [None, Uniform(8)])
@pytest.mark.parametrize("how", ["tied", "embedding only"])
def test_a_tied_embedding_stays_tied(how, activation, tmp_path):
    config = ak.QuantConfig(Uniform(4), activation=activation)
    model = ak.quantize_(Tied(), config, kinds="embedding" if how == "embedding only" else EMBEDDINGS)
    assert model.head.weight is model.tokens.weight and len(list(model.parameters())) == 3
    if how == "embedding only":
        assert "tied to tokens" in ak.nn.left_float(model)["head.weight"]
        return
    assert not ak.nn.left_float(model) and model.head.quantizer is model.tokens.quantizer
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    ak.hard_quantize_(model.eval())
    with torch.no_grad():
        want = model(X)
    float_bytes = sum(p.numel() * 4 for p in model.parameters())
    ak.pack_(model)
    assert model.head.weight_codes is model.tokens.weight_codes
    assert ak.inspect(model).float_bytes == float_bytes  # a shared weight counts once
    ak.save_packed(model, tmp_path / "m.safetensors")
    loaded = ak.load_packed(tmp_path / "m.safetensors", Tied().eval())
    assert loaded.head.weight_codes is loaded.tokens.weight_codes
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))
        torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    ak.unpack_(loaded, force=True)
    assert loaded.head.weight is loaded.tokens.weight
    if activation is None:
        with torch.no_grad():
            assert torch.equal(loaded(X), want)
        profile = trace(Tied(), X, kinds=EMBEDDINGS)
        assert profile.tied == {"head": "tokens"} and profile.layers["tokens"].macs == 0 < profile.layers["head"].macs


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_what_an_embedding_cannot_do_is_refused_by_name(option):
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "tokens": nn.Embedding(5, 4, **option)})
    with pytest.raises(ValueError, match=f"^tokens: {next(iter(option))}: expected"):
        ak.quantize_(model, kinds=EMBEDDINGS)
    assert type(model["first"]) is nn.Linear and type(model["first"].weight) is nn.Parameter
    assert type(model["tokens"].weight) is nn.Parameter
    for made in (ak.nn.AskewEmbedding, ak.nn.PackedEmbedding):
        with pytest.raises(ValueError, match=next(iter(option))):
            made(5, 4, **option)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_lookup_decodes_its_rows_only(name, monkeypatch):
    layer = ak.pack_(
        ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Embedding(64, 8)), CONFIGS[name], kinds="embedding"))
    )[0]
    decoded = []
    original = ak.ops.packed_dequantize
    monkeypatch.setattr(
        ak.ops, "packed_dequantize", lambda codes, *a: decoded.append(len(codes)) or original(codes, *a)
    )
    weight = layer.dequantize()
    for shape in ((), (3,), (2, 0), (4, 5), (100,)):
        x = torch.randint(0, 64, shape)
        assert torch.equal(layer(x), weight[x]) and torch.equal(layer(x.int()), weight[x])
    assert decoded == [64, 1, 1, 3, 3, 0, 0, 20, 20, 64, 64]
    for wrong in (torch.tensor([64]), torch.tensor([-1])):
        with pytest.raises((IndexError, RuntimeError), match="range"):
            layer(wrong)


@pytest.mark.parametrize("forward", ["hard", "relaxed"])
def test_autocast_leaves_indices_alone(forward):
    layer = ak.nn.AskewEmbedding(20, 8, config=ak.QuantConfig(Uniform(4), forward=forward, activation=Uniform(8)))
    want = layer(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(X), want) and torch.equal(nn.functional.embedding(X, layer.weight), layer.weight[X])


def test_a_padding_row_stays_zero():
    layer = ak.quantize_(nn.Sequential(nn.Embedding(8, 4, padding_idx=2)), kinds="embedding")
    optimizer = ak.optim.ASkewSGD(ak.param_groups(layer), lr=0.1)
    annealing = ak.EpsilonAnnealing(optimizer, hold=1, total=3)
    for _ in range(3):
        layer(torch.arange(8)).sum().backward()
        optimizer.step()
        annealing.step()
    ak.hard_quantize_(layer)
    assert not layer[0].weight[2].any() and layer[0].weight[3].any()
    assert not ak.pack_(layer)[0](torch.tensor([2])).any()


def test_compiled_traced_and_exported_lookups():
    from torch import fx

    model = ak.quantize_(Tied(), kinds=EMBEDDINGS)
    assert torch.equal(torch.compile(model, backend="aot_eager")(X), model(X))
    ak.pack_(ak.hard_quantize_(model)).eval()
    with torch.no_grad():
        want = model(X)
        assert torch.equal(torch.compile(model, backend="aot_eager")(X), want)
        assert torch.equal(fx.symbolic_trace(model)(X), want)
        exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        for batch in (1, 3, 40):
            x = torch.randint(0, 20, (batch, 5))
            torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-6)


def test_int8_inputs_are_for_layers_that_multiply():
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(Tied(), kinds=EMBEDDINGS)), activations="int8")
    assert model.inner.activations == "int8" and model.tokens.activations == "float"
    assert torch.equal(model.tokens(X), model.tokens.dequantize()[X])
    inputs = ak.quantize_(Tied(), ak.QuantConfig(activation=Uniform(8)), kinds="embedding")
    ak.unpack_(ak.pack_(ak.hard_quantize_(inputs)))  # nothing of it is lost: indices are not quantized


# ---- weights of another form -----------------------------------------------------------------------------------------


class FewExperts(nn.Module):
    """Two matrices each, and a bias, which stays float."""

    base = mixin = None  # names that others may use

    def __init__(self, transposed=False, experts=3):
        super().__init__()
        torch.manual_seed(0)
        sizes = [(12, 8), (8, 12)]
        self.up, self.down = (
            nn.Parameter(torch.randn(experts, *(s[::-1] if transposed else s)) / 3) for s in sizes
        )  # (outputs, inputs) where not transposed
        self.up_bias, self.is_transposed = nn.Parameter(torch.zeros(experts, 12)), transposed

    def forward(self, x, chosen):
        def linear(x, w):
            return x @ (w if self.is_transposed else w.mT)

        y = x.new_zeros(x.shape)
        for i in chosen.unique():
            hidden = torch.tanh(linear(x[chosen == i], self.up[i]) + self.up_bias[i])
            y[chosen == i] = linear(hidden, self.down[i])
        return y


class Mixture(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.experts = FewExperts(transposed)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.experts(x, torch.arange(len(x)) % 2))  # the third expert is not asked


TOKENS = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
by_layout = pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])


def trained(model, x=TOKENS, steps=3, **options):
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=1e-2, **options)
    annealing = ak.EpsilonAnnealing(optimizer, hold=1, total=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        annealing.step()
    return model


@by_layout
@by_config
def test_experts_the_whole_way(name, transposed, tmp_path):
    config, path = CONFIGS[name], tmp_path / "packed.safetensors"
    model = Mixture(transposed)
    parameters, shapes = dict(model.named_parameters()), {k: t.shape for k, t in model.state_dict().items()}
    float_state = {k: t.clone() for k, t in model.state_dict().items()}
    ak.quantize_(model, config)
    layers = ak.nn.quantized_layers(model)
    assert set(layers) == {"experts.up", "experts.down", "head"} and ak.nn.left_float(model).keys() == {
        "experts.up_bias"
    }
    assert [*parameters] == [n for n, _ in model.named_parameters()]
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert {k: t.shape for k, t in model.state_dict().items() if k in shapes} == shapes
    assert all(t.is_contiguous() for t in model.state_dict().values())
    assert model.get_submodule("experts.up") is layers["experts.up"]
    assert model.get_parameter("experts.up") is layers["experts.up"].weight is parameters["experts.up"]
    model.load_state_dict(float_state, strict=True)
    assert isinstance(model.experts, FewExperts) and len(list(model.parameters())) == len(parameters)

    trained(model)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ak.quantize_(Mixture(transposed), config)]
    others[2].load_state_dict(model.state_dict(), strict=True)
    others.append(ak.quantize_(Mixture(transposed).to("meta"), config))
    others[3].load_state_dict(model.state_dict(), strict=True, assign=True)
    for other in [*others, model]:
        other.eval()
    with torch.no_grad():
        want = model(TOKENS)
        assert all(torch.equal(other(TOKENS), want) for other in others)
        ak.hard_quantize_(model)
        assert torch.equal(model(TOKENS), want)
        plain = ak.dequantize_(copy.deepcopy(model))
        assert type(plain.experts) is FewExperts and torch.allclose(plain(TOKENS), want, atol=1e-6)
        assert "up" not in plain.experts._modules and plain.state_dict().keys() == float_state.keys()
    weights = {n: layer.weight.detach().clone() for n, layer in layers.items()}
    for report in ak.inspect(model).layers:
        assert report.error == 0
    kind = layers["experts.up"].kind.name
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", config, kinds={"experts.*": kind})
    converted = ak.load_packed(tmp_path / "out.safetensors", Mixture(transposed).eval())
    ak.pack_(model)
    packed = ak.nn.packed_layers(model)
    assert all(torch.equal(m.dequantize(), weights[n]) for n, m in ak.nn.packed_layers(converted).items())
    assert packed.keys() == weights.keys() and all(torch.equal(m.dequantize(), weights[n]) for n, m in packed.items())
    assert "experts.up" not in model.state_dict() and "experts.up.weight_codes" in model.state_dict()
    with torch.no_grad():
        got = model(TOKENS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ak.save_packed(model, path)
    original = {**float_state, **{f"{n}.weight": weights[n] for n in ("head",)}}
    reports = {r.name: r.error for r in report_of_contents(read_contents(path), original | weights).layers}
    assert max(reports.values()) < 1e-6 and reports.keys() == packed.keys()
    again = [Mixture(transposed), ak.quantize_(Mixture(transposed), config), copy.deepcopy(model),
             pickle.loads(pickle.dumps(model)), Mixture(transposed).to("meta")]  # fmt: skip
    for other in again:
        with torch.no_grad():
            assert torch.equal(ak.load_packed(path, other.eval())(TOKENS), got)
    new = Mixture(transposed)
    new.load_state_dict(ak.unpack_(again[0]).state_dict(), strict=True)
    assert type(again[0].experts) is FewExperts and all(
        torch.equal(new.get_parameter(f"{n}" if "experts" in n else f"{n}.weight"), w) for n, w in weights.items()
    )


@by_layout
def test_each_expert_is_quantized_like_a_linear_layer(transposed):
    for name, config in CONFIGS.items():
        if config.granularity == "per_tensor":
            continue  # one scale for the Parameter
        layer = ak.nn.quantized_layers(ak.quantize_(Mixture(transposed), config))["experts.up"]
        scale = layer.weight_scale.reshape(3, -1)
        for i in range(3):
            twin = ak.nn.AskewLinear(8, 12, config=config)
            with torch.no_grad():
                twin.weight.copy_(layer.weight[i].mT if transposed else layer.weight[i])
            mine = layer.quantized_weight()[i]
            assert torch.equal(twin.weight_scale, scale[i]), name
            assert torch.equal(twin.quantized_weight(), mine.mT if transposed else mine), name


@by_layout
def test_only_the_experts_that_are_asked_are_decoded(transposed, monkeypatch):
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(Mixture(transposed)))).eval()
    decoded, original = [], ak.ops.packed_dequantize
    monkeypatch.setattr(
        ak.ops, "packed_dequantize", lambda codes, *a: decoded.append(len(codes)) or original(codes, *a)
    )
    with torch.no_grad():
        model(TOKENS)
    assert decoded == [12, 8, 12, 8]
    weight = model.experts.up
    whole = weight + 0
    for index in (1, -1, torch.tensor(2), torch.tensor([0, 2, 2]), torch.tensor([-1]), torch.tensor([[0, 1]]),
                  torch.tensor([True, False, True]), slice(1, 3), (1, 2), (slice(None), 1)):  # fmt: skip
        assert torch.equal(weight[index], whole[index])
    assert weight[torch.tensor([], dtype=torch.long)].shape == (0, *whole.shape[1:])
    for wrong in (3, torch.tensor([3])):
        with pytest.raises(IndexError):
            weight[wrong]
    with pytest.raises(RuntimeError, match="read-only"):
        model.experts.up += 1


@pytest.mark.parametrize("scale", [None, "lsq"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_experts_that_are_read_are_not_written_to(transposed, scale):
    """Whatever is made of the weight: the gradient may belong to somebody else, too."""
    model = Mixture(transposed)
    ak.quantize_(model, {"experts.*": ak.QuantConfig(Uniform(2), scale=scale)})
    experts, other = model.experts, torch.zeros_like(model.experts.up).requires_grad_()
    given = torch.randn_like(other)
    kept = given.clone()
    torch.autograd.grad(experts.up + other, other, given)
    (mine,) = torch.autograd.grad(experts.up, experts.get_parameter("up"), given)
    assert torch.equal(given, kept) and not torch.equal(mine, given)  # which is clipped
    (sums,) = torch.autograd.grad((experts.up + other).sum(), other)
    assert torch.equal(sums, torch.ones_like(sums))
    sums, theirs = torch.autograd.grad((experts.up + other).square().sum(), [experts.get_parameter("up"), other])
    assert torch.equal(theirs, 2 * experts.up.detach()) and not torch.equal(sums, theirs)


def test_experts_that_do_not_fit_are_named(caplog):
    class Experts(FewExperts): ...

    class Other(FewExperts):
        """No name of experts."""

    for cls, found in ((Experts, True), (Other, False)):
        model = nn.ModuleDict({"body": nn.Sequential(cls(), nn.Linear(8, 8))})
        caplog.clear()
        with caplog.at_level(logging.INFO, "askew_kernels"):
            ak.quantize_(model)
        assert (
            "weights of experts (ak.nn.experts.EXPERTS) are quantized: body.0.up, body.0.down" in caplog.text
        ) == found
        assert ("body.0.up" in ak.nn.quantized_layers(model)) == found
        assert (f"{cls.__name__} (body.0.up, body.0.down, body.0.up_bias)" in caplog.text) != found
        assert (f"{cls.__name__} (body.0.up_bias)" in caplog.text) == found
        assert ("body.0.up" in ak.nn.left_float(model)) != found
    model = Mixture()
    ak.quantize_(model, {"*.up": ak.QuantConfig()})
    assert set(ak.nn.quantized_layers(model)) == {"experts.up"} and "down" not in model.experts._modules
    assert ak.nn.left_float(model)["experts.down"].endswith(", left alone")
    trained(model)
    ak.quantize_(model, kinds="experts")
    assert set(ak.nn.quantized_layers(model)) == {"experts.up", "experts.down"}
    for config, text in ((ak.QuantConfig(granularity="per_group", group_size=5), "group_size: 5 does not divide the 8"),
                         (ak.QuantConfig(activation=Uniform(8)), "activation: the inputs of experts")):  # fmt: skip
        model = Mixture()
        before = model.state_dict()
        with pytest.raises(ValueError, match=f"^experts.up: {text}"):
            ak.quantize_(model, config, kinds="experts")
        assert type(model.experts) is FewExperts and type(model.experts.up) is nn.Parameter
        assert model.state_dict().keys() == before.keys()


def test_a_weight_is_shared_by_layers_of_one_form():
    model = nn.ModuleDict({"tokens": nn.Embedding(8, 12), "head": kinds.TransposedLinear(12, 8, bias=False)})
    model["head"].weight = model["tokens"].weight
    with pytest.raises(ValueError, match="^head: shares its weight with tokens, whose outputs stand along another"):
        ak.quantize_(model, kinds=EMBEDDINGS)
    assert "tied to head" in ak.nn.left_float(ak.quantize_(model))["tokens.weight"]


def test_a_failed_load_leaves_experts_as_they_were(tmp_path):
    ak.save_packed(ak.pack_(ak.hard_quantize_(ak.quantize_(Mixture()))), tmp_path / "m.safetensors")
    model = Mixture()
    model.more = nn.Linear(2, 2)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the file lacks more\.bias, more\.weight"):
        ak.load_packed(tmp_path / "m.safetensors", model)
    after = model.state_dict()
    assert type(model.experts) is FewExperts and all(torch.equal(after[k], t) for k, t in before.items())
    other = Mixture(transposed=True)
    with pytest.raises(ValueError, match="experts.up: expected ExpertWeight in the model, got TransposedExpertWeight"):
        ak.load_packed(tmp_path / "m.safetensors", other)
    assert type(other.experts) is FewExperts


def test_experts_are_moved_cast_and_replaced():
    model = trained(ak.quantize_(Mixture(transposed=True)))
    layer = ak.nn.quantized_layers(model)["experts.up"]
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.to("meta"),
                 lambda m: m.to_empty(device="cpu")):  # fmt: skip
        move(model)
        assert layer.weight is model.get_parameter("experts.up") is dict(model.named_parameters())["experts.up"]
    model.experts.up = new = nn.Parameter(torch.randn(3, 8, 12))
    assert layer.weight is new is dict(model.named_parameters())["experts.up"]
    with torch.no_grad():
        assert torch.equal(model.experts.up, layer.quantized_weight())
    relaxed = ak.quantize_(Mixture(), ak.QuantConfig(forward="relaxed"))
    assert relaxed.experts.up is relaxed.get_parameter("experts.up")
    with torch.no_grad():
        assert torch.equal(relaxed.eval().experts.up, ak.nn.quantized_layers(relaxed)["experts.up"].quantized_weight())


def test_functional_calls_see_experts():
    model = ak.quantize_(Mixture())
    double = {k: v * 2 for k, v in model.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in other.named_parameters():
            p.copy_(double[n])
        assert torch.equal(torch.func.functional_call(model, double, (TOKENS,)), other(TOKENS))


@by_layout
def test_experts_are_compiled(transposed):
    model = ak.quantize_(Mixture(transposed))
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(TOKENS), model(TOKENS))
    compiled(TOKENS).sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in ak.nn.quantized_layers(model).values())
    ak.pack_(ak.hard_quantize_(model.eval()))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, backend="aot_eager")(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-6
        )
    torch._dynamo.reset()


OPTIMIZERS = {
    "sgd": lambda groups: ak.optim.ASkewSGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: ak.optim.ASkewAdamW(groups, lr=0.01),
    "lion": lambda groups: ak.optim.ASkewLion(groups, lr=0.01),
    "sam": lambda groups: ak.optim.SAM(groups, ak.optim.ASkewSGD, lr=0.05),
    "skewed": lambda groups: ak.optim.Skewed(torch.optim.SGD(groups, lr=0.05, momentum=0.9)),
}


@pytest.mark.parametrize("form", ["transposed", "experts", "transposed experts"])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_a_step_is_that_of_the_matrix(form, rule):
    """The same gradients give the same weights, scales and copies, bit for bit, as a linear layer's; so does going on
    from a checkpoint of the optimizer, and from a copy."""
    config = ak.QuantConfig(Uniform(4), "sawb", "per_group", 4)
    torch.manual_seed(0)
    if form == "transposed":
        model = ak.quantize_(nn.Sequential(kinds.TransposedLinear(12, 8)), config)
        layer = model[0]
    else:
        model = ak.quantize_(Mixture("transposed" in form), {"experts.up": config})
        layer = ak.nn.quantized_layers(model)["experts.up"]
    matrix = layer.form.matrix(layer.weight.detach())
    twin = ak.quantize_(nn.Sequential(nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)), config)
    with torch.no_grad():
        twin[0].weight.copy_(matrix)
    [own] = [g for g in ak.param_groups(model) if "grid" in g]
    pairs = [(layer.weight, OPTIMIZERS[rule]([own])), (twin[0].weight, OPTIMIZERS[rule](ak.param_groups(twin)))]
    annealing = [ak.EpsilonAnnealing(o, hold=2, total=6) for _, o in pairs]
    draws = torch.Generator().manual_seed(2)

    def compare():
        assert torch.equal(layer.form.matrix(layer.weight.detach()), twin[0].weight)
        assert torch.equal(layer.weight_scale, twin[0].weight_scale)
        assert torch.equal(layer.form.matrix(layer.quantized_weight()), twin[0].quantized_weight())

    for step in range(5):
        gradients = [torch.randn(matrix.shape, generator=draws) for _ in range(2)]

        def closure(p, o, g):
            shape = layer.weight.shape
            p.grad = g.clone() if p is not layer.weight else layer.form.weight(g, shape).contiguous()
            return torch.zeros(())

        for p, o in pairs:
            if rule == "sam":
                closure(p, o, gradients[0])
                o.first_step(zero_grad=True)
                closure(p, o, gradients[1])
                o.second_step(zero_grad=True)
            else:
                closure(p, o, gradients[0])
                o.step()
        for a in annealing:
            a.step()
        compare()
        if step == 2:  # state in another order of memory, as some writers of files leave it
            state = copy.deepcopy(pairs[0][1].state_dict())
            for of in state["state"].values():
                of.update({k: t.contiguous() for k, t in of.items() if isinstance(t, torch.Tensor)})
            pairs[0][1].load_state_dict(state)
    compare()


def test_transposed_weights_are_written_by_others(tmp_path):
    from safetensors.torch import load_file

    model = ak.quantize_(nn.Sequential(kinds.TransposedLinear(12, 8)))
    weight = model[0].weight
    assert weight.shape == (8, 12) and weight.t().is_contiguous()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    assert torch.equal(load_file(tmp_path / "m.safetensors")["0.weight"], weight)
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert other[0].weight.t().is_contiguous()
    ak.dequantize_(model)
    assert model[0].weight is weight and weight.is_contiguous()


def test_conv1d_of_transformers():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(4, 12))
    parameters, x = dict(model.named_parameters()), TOKENS
    with torch.no_grad():
        before = model(x)
    with pytest.raises(ValueError, match="^0: group_size: 12 does not divide the 8 inputs"):
        ak.quantize_(model, ak.QuantConfig(granularity="per_group", group_size=12))
    assert type(model[0]) is Conv1D and type(model[0].weight) is nn.Parameter and model[0].weight.is_contiguous()
    ak.quantize_(model, ak.QuantConfig(Uniform(8), granularity="per_group", group_size=4))
    assert isinstance(model[0], Conv1D) and isinstance(model[0], ak.nn.AskewTransposedLinear)
    assert all(p is parameters[n] for n, p in model.named_parameters()) and "AskewTransposedLinear" in repr(model)
    assert model[0].weight_scale.shape == (12 * 8 // 4,)
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0]) and torch.equal(other(x), model(x))
    trained(model)
    ak.hard_quantize_(model)
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        want = model(x)
    ak.pack_(model)
    assert isinstance(model[0], Conv1D) and isinstance(model[0], ak.nn.PackedTransposedLinear)
    assert torch.equal(model[0].dequantize(), weight) and model[0].weight_codes.shape == (12, 8)
    assert torch.equal(model[0].matrix(), weight.t())
    linear = ak.nn.as_linear_(copy.deepcopy(model))
    assert type(linear[0]) is ak.nn.PackedLinear and torch.equal(linear[0].dequantize(), weight.t())
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(linear(x), model(x)) and torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    ak.unpack_(model)
    assert type(model[0]) is Conv1D and torch.equal(model[0].weight, weight) and model[0].weight.is_contiguous()


def test_a_weight_of_experts_is_not_computed_otherwise():
    from torch.nn.utils import parametrize

    for model in (ak.quantize_(Mixture()), ak.pack_(ak.hard_quantize_(ak.quantize_(Mixture())))):
        with torch.no_grad():
            want = model(TOKENS)
        with pytest.raises((RuntimeError, ValueError), match="up"):
            parametrize.register_parametrization(model.experts, "up", nn.Identity())
        with torch.no_grad():
            assert torch.equal(model(TOKENS), want) and set(model.experts._modules) == {"up", "down"}


def test_conv1d_is_searched():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(Conv1D(12, 8), nn.Tanh(), nn.Linear(12, 4))
    profile = trace(model, TOKENS)
    assert [(p.kind, p.macs, p.rows) for p in profile.layers.values()] == [
        ("transposed_linear", 96, 12), ("linear", 48, 4)
    ]  # fmt: skip
    policy = search_policy(
        model, [(TOKENS, torch.zeros(()))], lambda y, _: y.square().mean(), weight_bits=(2, 4), act_bits=(8,), steps=2,
        progress=False,
    )  # fmt: skip
    assert type(model[0]) is Conv1D and policy.weight_bits["0"] in (2, 4)
    ak.quantize_(model, policy)
    assert ak.nn.quantized_layers(model)["0"].config.weight == Uniform(policy.weight_bits["0"])


def test_which_dimensions_of_a_weight_may_be_split():
    """Outputs, inputs, and what counts matrices; not a kernel's positions, nor where rows are in another order."""

    def roles(name, dims):
        return split_roles(dims, kinds.KINDS[name].form)

    assert roles("linear", 2) == roles("conv2d", 4) == {0: "outputs", 1: "inputs"}
    assert roles("transposed_linear", 2) == {0: "inputs", 1: "outputs"}
    assert roles("experts", 3) == {0: "stack", 1: "outputs", 2: "inputs"}
    assert roles("transposed_experts", 3) == {0: "stack", 1: "inputs", 2: "outputs"}
    assert split_roles(4, Form(transposed=True, groups=2)) == {}
    assert split_roles(1, ROWS) == {0: "inputs"}
