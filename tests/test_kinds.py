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

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.deploy.convert import convert_file
from askew_kernels.nn import KINDS, kinds
from askew_kernels.nn.layers import GRIDS, STATE
from askew_kernels.quant import Binary, Ternary, Uniform
from askew_kernels.search import Budget, search_policy, trace, uniform_policy

pytest.importorskip("safetensors")


def numbers(*shape):
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# {case: (kind, layer, input, MACs of it for one sample)}
CASES = {
    "linear": ("linear", lambda: nn.Linear(12, 8), numbers(5, 12), 12 * 8),
    "linear without bias": ("linear", lambda: nn.Linear(12, 8, bias=False), numbers(2, 3, 12), 3 * 12 * 8),
    "conv2d": ("conv2d", lambda: nn.Conv2d(4, 8, 3, padding=1), numbers(2, 4, 5, 5), 25 * 8 * 36),
    "conv2d grouped": (
        "conv2d", lambda: nn.Conv2d(4, 8, 2, 2, groups=2, bias=False), numbers(2, 4, 5, 5), 4 * 8 * 8,
    ),
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
    assert {kind for kind, *_ in CASES.values()} == set(KINDS)


@by_case
def test_an_entry_is_whole(case):
    """All arguments of torch's class but those that are no attributes; classes that are told apart; keys."""
    kind, layer = KINDS[CASES[case][0]], model_of(case)[0]
    others = {"self", "bias", "device", "dtype", "norm_type", "_weight", "_freeze"}
    assert set(kind.arguments) == set(inspect.signature(kind.plain.__init__).parameters) - others
    assert type(layer) is kind.plain and layer.weight.dim() == kind.dims
    alike, other = kind.plain(**kind.arguments_of(layer)), kind.of_shape(layer.weight.shape, False)
    assert repr(alike) == repr(layer) and other.weight.shape == layer.weight.shape
    assert kind.geometry_of(alike) == kind.geometry_of(layer) and set(kind.geometry) <= set(kind.arguments)
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
        layer.weight.flatten()[:3] *= 50  # outside of the hull, where the scale does not follow the largest
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
    t = w.reshape(len(scale), -1) / scale[:, None]
    inside = ((t >= layer.config.weight.levels[0]) & (t <= layer.config.weight.levels[-1])).reshape(w.shape)
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
        assert torch.equal(ak.dequantize_(copy.deepcopy(model))(x), want)
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
        assert type(unpacked[0]) is kind.plain and torch.equal(unpacked(x), want)


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
    with pytest.raises(ValueError, match="no nn.Linear matches 'conv2d'"):
        ak.quantize_(model(), {"conv2d": ak.QuantConfig()}, kinds="linear")


def default():
    return {kind.name for kind in kinds.chosen(kinds.DEFAULT)}


def test_nothing_of_the_kinds(caplog):
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.quantize_(nn.Sequential(nn.Conv2d(1, 1, 1)), kinds="linear")
    assert "nn.Conv2d (0.weight)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.quantize_(nn.Sequential(nn.ReLU()), kinds="linear")
    assert "the model has no nn.Linear, nothing was quantized" in caplog.text
