"""Contract: kinds of layers (``nn.kinds.KINDS``), each the whole way by the same test: one row of ``CASES`` a kind.

1. An entry says what makes another layer of the same sizes, and what its classes have in a state_dict.
2. Quantized, trained relaxed or hard, hard-quantized, saved, packed, written, read, unpacked, dequantized, exported:
   the very weights, in every state; the gradient of a weight is that of the quantized one, zero outside the hull.
3. What is not asked for by ``kinds=`` is left, and told; unknown names are errors that list the known ones.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.deploy.convert import convert_file
from askew_kernels.nn import KINDS, kinds
from askew_kernels.nn.layers import GRIDS, STATE
from askew_kernels.quant import Binary, Ternary, Uniform
from askew_kernels.quant.forms import ROWS
from askew_kernels.search import Budget, LayerPolicy, Policy, search_policy, trace, uniform_policy

pytest.importorskip("safetensors")


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
    import safetensors.torch

    kind, x = CASES[case][0], CASES[case][2]()
    model = ak.hard_quantize_(quantized(case, "int4 channel")).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "in.safetensors")
    convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", CONFIGS["int4 channel"], kinds={"*": kind})
    with torch.no_grad():
        got = ak.load_packed(tmp_path / "out.safetensors", model_of(case, 1).eval())(x)
        assert torch.equal(got, ak.pack_(model)(x))


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
            assert (f"{case}.weight" in told) == (kind not in names)
            why = ak.nn.left_float(made).get(f"{case}.weight", "")
            assert (f'kinds= takes it in as "{kind}"' in why) == (kind not in names | default())
    with pytest.raises(ValueError, match=r"kinds: expected names out of conv, conv.*linear.*, got 'dense'"):
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
            assert (f"{i}.0.weight" in told) == (kind not in spoken)


def test_nothing_of_the_kinds(caplog):
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.quantize_(nn.Sequential(nn.Conv2d(1, 1, 1)), kinds="linear")
    assert "nn.Conv2d (0.weight)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.quantize_(nn.Sequential(nn.ReLU()), kinds="linear")
    assert re.search("the model has no nn.Linear.*, nothing was quantized", caplog.text)


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
