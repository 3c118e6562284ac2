"""Contract: AskewLinear and AskewConv2d are drop-in layers that never compute with a stale weight.

1. Forward and backward equal the float layer run on s Q(w/s), with the weight's gradient masked outside the hull; the
   relaxed layer is the float layer in training and the quantized one in eval.
2. The weight stays the same Parameter under the same key; float checkpoints load strictly; a frozen scale survives a
   checkpoint bit for bit.
3. After any edit of the weight, by whatever road, the next forward uses the new weight; after an ASkew step it uses the
   copy that the step wrote.
4. deepcopy, pickle, casts, autocast, torch.compile, checkpointing, tied weights and inference mode work.

Tolerance: both sides do the same float32 products in another order at most, so torch's default for float32.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import oracles
import pytest
import torch
from oracles import Binary, Codebook, Ternary, Uniform
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import askew_kernels as ak
from askew_kernels import ops
from askew_kernels.nn import AskewConv2d, AskewLinear, layers
from askew_kernels.quant import QuantConfig, compute_scale

CONFIG = QuantConfig(weight=Uniform(4), scale="absmax")
CLIPPING = QuantConfig(weight=Uniform(3), scale="sawb")  # SAWB leaves weights outside the hull


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def expected_weight(weight, config):
    """Float64 oracle of s Q(w/s) with the rule's scale, and the mask of the straight-through gradient."""
    s = compute_scale(weight, config.weight, config.scale, config.granularity, config.group_size)
    w = weight.detach().reshape(s.numel(), -1)
    low, high = (s[:, None] * torch.tensor(end) for end in (config.weight.levels[0], config.weight.levels[-1]))
    inside = ((w.float() >= low) & (w.float() <= high)).reshape(weight.shape)
    return oracles.fake_quantize(w, s, config.weight).reshape(weight.shape).to(weight.dtype), inside


def compare(layer, x):
    """Forward and backward of ``layer`` against its float twin on the quantized weight."""
    quantized, inside = expected_weight(layer.weight, layer.config)
    twin = copy.deepcopy(layer.to_float())
    twin.weight = nn.Parameter(quantized.contiguous())
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = layer(a), twin(b)
    torch.testing.assert_close(y, want)
    grad = torch.randn_like(want)
    layer.zero_grad()
    y.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(a.grad, b.grad)
    mask = inside if layer.config.ste_clip else torch.ones_like(inside)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad * mask, rtol=1e-5, atol=1e-4)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=1e-5, atol=1e-4)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want.detach())
    layer.train()
    return inside


# ---- forward and backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    CONFIG, CLIPPING, QuantConfig(Binary(), "mean"), QuantConfig(Ternary(), "mean", "per_tensor"),
    QuantConfig(Uniform(4), "sawb", "per_group", 4), QuantConfig(Codebook(oracles.NF4), "absmax"),
    QuantConfig(Uniform(3), "sawb", ste_clip=False), QuantConfig(Uniform(2), "mse"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (12,), (2, 3, 12), (0, 12)])
def test_linear(config, bias, shape):
    layer = AskewLinear(12, 7, bias=bias, config=config)
    with torch.no_grad():
        layer.weight.normal_()
    inside = compare(layer, torch.randn(shape))
    if config == CLIPPING:
        assert not inside.all()  # the mask was put to use


CONVOLUTIONS = [
    {}, dict(stride=2), dict(padding=1), dict(padding=(2, 1), stride=(1, 2)), dict(dilation=2, padding=2),
    dict(groups=2), dict(groups=4), dict(bias=False), dict(padding="same"), dict(padding="valid"),
    dict(kernel_size=2, padding="same"), dict(kernel_size=(2, 3), padding="same", dilation=(1, 2)),
    dict(kernel_size=(1, 4), padding="same"), dict(kernel_size=1),
    dict(padding=1, padding_mode="reflect"), dict(padding=(1, 2), padding_mode="circular"),
    dict(padding="same", padding_mode="replicate"), dict(kernel_size=2, padding="same", padding_mode="circular"),
    dict(padding=1, padding_mode="replicate", groups=2, stride=2, dilation=2, bias=False),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(
    "config", [CLIPPING, QuantConfig(Uniform(4), "sawb", "per_group", 2)], ids=["channel", "group"]
)
@pytest.mark.parametrize("unbatched", [False, True])
def test_conv2d(options, config, unbatched):
    if config.group_size and options.get("kernel_size") == 1 and options.get("groups", 1) > 2:
        pytest.skip("fewer inputs than a group")
    if config.group_size and options.get("groups") == 4:
        config = QuantConfig(Uniform(4), "sawb", "per_group", 3)
    layer = AskewConv2d(4, 8, **{"kernel_size": 3, **options}, config=config)
    with torch.no_grad():
        layer.weight.normal_()
    compare(layer, torch.randn(*(() if unbatched else (2,)), 4, 9, 8))


def test_conv2d_channels_last():
    layer = AskewConv2d(4, 8, 3, config=CLIPPING).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last)
    compare(layer, x)
    optimizer = ak.optim.ASkewSGD([{"params": [layer.weight], "grid": Uniform(3)}], lr=0.1)
    optimizer.step()
    torch.testing.assert_close(
        layer.quantized_weight(), ops.fake_quantize(layer.weight, layer.weight_scale, Uniform(3))
    )


@pytest.mark.parametrize("make", [lambda c: AskewLinear(12, 8, config=c), lambda c: AskewConv2d(4, 8, 3, config=c)])
def test_relaxed_is_float_in_training(make):
    layer = make(QuantConfig(Uniform(3), "sawb", forward="relaxed"))
    x = torch.randn(3, 12) if isinstance(layer, AskewLinear) else torch.randn(2, 4, 6, 6)
    twin = copy.deepcopy(layer.to_float())
    y, want = layer(x), twin(x)
    assert torch.equal(y, want)
    y.sum().backward()
    want.sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    layer.eval()
    with torch.no_grad():
        twin.weight.copy_(expected_weight(layer.weight, layer.config)[0])
        torch.testing.assert_close(layer(x), twin(x))


# ---- parameters, keys, checkpoints -----------------------------------------------------------------------------------


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 16), nn.ReLU(), nn.Linear(16, 5)
    )


IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def train(model, optimizer, steps, start=0):
    for i in range(start, start + steps):
        optimizer.zero_grad()
        (model(IMAGES * (1 + 0.1 * i)) ** 2).mean().backward()
        optimizer.step()


def test_same_parameters_and_keys():
    model = network()
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert ak.quantize_(model, CONFIG) is model
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[k] is before[k] for k in before)
    added = set(model.state_dict()) - set(keys)
    assert set(keys) < set(model.state_dict()) and {k.rpartition(".")[2] for k in added} == {
        *layers.STATE,
        layers.GRIDS,
    }
    assert isinstance(model[0], AskewConv2d) and isinstance(model[3], AskewLinear) and isinstance(model[3], nn.Linear)
    assert isinstance(model[3].weight, nn.Parameter)


def test_float_checkpoint_loads_strictly():
    model, other = ak.quantize_(network(), CONFIG), network()
    assert not (r := model.load_state_dict(other.state_dict(), strict=True)).missing_keys and not r.unexpected_keys
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    back = other.load_state_dict(model.state_dict(), strict=False)  # the other way there is more than a float model has
    assert not back.missing_keys and {key.rpartition(".")[2] for key in back.unexpected_keys} == {
        *layers.STATE,
        layers.GRIDS,
    }


def test_from_float_and_to_float():
    for layer in (nn.Linear(6, 4), nn.Conv2d(4, 6, (2, 3), stride=2, padding=1, dilation=2, groups=2, bias=False)):
        layer.eval()
        cls = AskewLinear if isinstance(layer, nn.Linear) else AskewConv2d
        new = cls.from_float(layer, CONFIG)
        assert new.weight is layer.weight and new.bias is layer.bias and not new.training
        back = new.to_float()
        assert type(back) is type(layer) and back.weight is layer.weight and not back.training
        assert repr(back) == repr(layer)
    model = ak.quantize_(network(), CONFIG)
    parameters = list(model.parameters())
    ak.dequantize_(model)
    assert not ak.nn.convert.quantized_layers(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert repr(model) == repr(network())


def test_frozen_scale_round_trip():
    model = ak.quantize_(network(), CLIPPING)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.2, constraint_eps=0.3)
    train(model, optimizer, 3)
    state = model.state_dict()
    assert "3.weight_scale" in state and state["3.weight_scale"].dtype == torch.float32
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    fresh = ak.quantize_(network(), CLIPPING)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    model.eval(), fresh.eval()
    assert torch.equal(model(IMAGES), fresh(IMAGES))
    assert torch.equal(fresh[3].weight_scale, model[3].weight_scale)
    with torch.no_grad():
        fresh[3].weight.mul_(1.5)
    assert torch.equal(fresh[3].weight_scale, model[3].weight_scale)  # frozen stays frozen
    bad = dict(state)
    bad["3.weight_scale"] = torch.ones(3)
    with pytest.raises(RuntimeError, match="weight_scale"):
        fresh.load_state_dict(bad)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, frozen):
    model = ak.quantize_(network(), CLIPPING)
    if frozen:
        train(model, ak.optim.ASkewSGD(ak.param_groups(model), lr=0.2, constraint_eps=0.3), 3)
    want = model(IMAGES)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(IMAGES), want)
    assert other[3].weight is not model[3].weight and other[3].quantizer is not model[3].quantizer
    optimizer = ak.optim.ASkewSGD(ak.param_groups(other), lr=0.2, constraint_eps=0.3)
    train(other, optimizer, 2)  # the copy's optimizer finds the copy's layers
    assert torch.equal(model(IMAGES), want)
    for layer in ak.nn.convert.quantized_layers(other).values():
        assert layer.quantizer.frozen
        got = layer.quantized_weight()
        assert torch.equal(got, ops.fake_quantize(layer.weight, layer.weight_scale, layer.config.weight))


def test_parameters_are_saved_as_parameters():
    """Whoever saves parameters (EMA, averaging) can load them with weights_only=True."""
    model = ak.quantize_(network(), CONFIG)
    model(IMAGES)
    buffer = io.BytesIO()
    torch.save(dict(model.named_parameters()), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert all(torch.equal(loaded[k], p) for k, p in model.named_parameters())


# ---- freshness -------------------------------------------------------------------------------------------------------


def edit_optimizer(layer):
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.Adam([layer.weight], lr=0.3).step()


def edit_foreach(layer):
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.3, foreach=True).step()


def edit_fused(layer):
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.3, fused=True).step()


def edit_load(layer):
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items() if k in ("weight", "bias")})


def edit_assign(layer):
    state = {k: torch.randn_like(v) for k, v in layer.state_dict().items() if k in ("weight", "bias")}
    layer.load_state_dict(state, assign=True)


def edit_copy(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))


def edit_data_mul(layer):
    layer.weight.data.mul_(-1.7)


def edit_data_assign(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def edit_data_item(layer):
    layer.weight.data[0, 0] += 5


def edit_data_swap(layer):
    a, b = layer.weight.data[0].clone(), layer.weight.data[1].clone()
    layer.weight.data[0], layer.weight.data[1] = b, a


def edit_loop(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))


def edit_detach(layer):
    layer.weight.detach().view(-1)[::2] *= -2


def edit_vector(layer):
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(torch.randn_like(vector), layer.parameters())


def edit_ema(layer):
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    with torch.no_grad():
        for p in average.parameters():
            p.add_(1.0)
        for p, q in zip(layer.parameters(), average.module.parameters(), strict=True):
            p.data.copy_(q.data)


def edit_swap(layer):
    other = torch.randn_like(layer.weight)
    layer.weight.data, other = other, layer.weight.data


def edit_replace(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def edit_init(layer):
    nn.init.kaiming_uniform_(layer.weight)


def edit_inference(layer):
    with torch.inference_mode():
        layer.weight.mul_(-3)


def edit_project(layer):
    ops.project_interval_(layer.weight, torch.tensor(0.37), Binary(), 0.01)


EDITS = {name[5:]: f for name, f in list(globals().items()) if name.startswith("edit_")}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("state", ["fresh", "stepped", "frozen"])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_never_stale(edit, state, conv):
    layer = AskewConv2d(3, 6, 2, config=CLIPPING) if conv else AskewLinear(12, 6, config=CLIPPING)
    x = torch.randn(2, 3, 4, 4) if conv else torch.randn(4, 12)
    layer(x).sum().backward()
    if state != "fresh":
        group = {"params": [layer.weight], "grid": CLIPPING.weight, "constraint_eps": 0.2 if state == "frozen" else 1.0}
        ak.optim.ASkewSGD([group], lr=0.1).step()
        layer(x)
    scale = layer.weight_scale.clone()
    before = layer.weight.detach().clone()
    for _ in range(2):  # an edit after an edit, with a forward between them
        EDITS[edit](layer)
        assert not torch.equal(layer.weight, before) or edit == "data_swap" or edit == "project"
        if state == "frozen":
            assert torch.equal(layer.weight_scale, scale)
        s = layer.weight_scale
        if state != "frozen":
            assert torch.equal(s, compute_scale(layer.weight, CLIPPING.weight, "sawb"))
        rows = layer.weight.detach().reshape(6, -1)
        want = oracles.fake_quantize(rows, s, CLIPPING.weight).reshape(layer.weight.shape)
        twin = copy.deepcopy(layer.to_float())
        twin.weight = nn.Parameter(want)
        torch.testing.assert_close(layer(x), twin(x))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), twin(x))


def test_functional_call_and_parametrization_are_never_stale():
    layer = AskewLinear(64, 64, bias=False, config=CONFIG)
    x = torch.eye(64)
    for _ in range(20):  # temporaries: the next one often has the address of the last
        w = torch.randn(64, 64)
        y = torch.func.functional_call(layer, {"weight": w}, (x,))
        torch.testing.assert_close(y, expected_weight(w, CONFIG)[0].t())
        del w, y

    class Scaled(nn.Module):
        def forward(self, w):
            return w * self.factor

    scaled = Scaled()
    scaled.factor = 1.0
    nn.utils.parametrize.register_parametrization(layer, "weight", scaled)
    for factor in (1.0, -2.0, 0.5, 3.0, -1.0):
        scaled.factor = factor
        with torch.no_grad():
            want = expected_weight(layer.parametrizations.weight.original * factor, CONFIG)[0].t()
            torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("eps", [1.0, 0.2])
def test_the_copy_of_the_optimizer_is_used(eps, monkeypatch):
    """After a step the forward quantizes nothing; after an edit it does."""
    model = ak.quantize_(network(), CONFIG)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9, constraint_eps=eps)
    train(model, optimizer, 2)
    calls = []
    original = ops.fake_quantize_out_
    monkeypatch.setattr(ops, "fake_quantize_out_", lambda *a, **k: calls.append(1) or original(*a, **k))
    train(model, optimizer, 3, start=2)
    model(IMAGES)
    assert not calls
    for layer in ak.nn.convert.quantized_layers(model).values():
        scale = layer.weight_scale
        want = oracles.fake_quantize(layer.weight.detach().reshape(scale.numel(), -1), scale, CONFIG.weight)
        assert torch.equal(layer.quantized_weight().reshape(want.shape), want)
    assert not calls
    with torch.no_grad():
        model[3].weight.add_(0.1)
    model(IMAGES)
    assert len(calls) == 1
    model(IMAGES)
    assert len(calls) == 1


def test_forward_does_not_allocate_weights(monkeypatch):
    """The copy is one buffer, written again and again."""
    layer = AskewLinear(8, 8, config=CONFIG)
    optimizer = ak.optim.ASkewSGD([{"params": [layer.weight], "grid": CONFIG.weight}], lr=0.1)
    pointers = set()
    for _ in range(4):
        layer(torch.randn(2, 8)).sum().backward()
        pointers.add(layer.quantizer.quantized(layer.weight).data_ptr())
        optimizer.step()
    assert len(pointers) == 1


# ---- devices, types, modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast(dtype):
    layer = AskewLinear(12, 8, config=CONFIG)
    layer(torch.randn(2, 12))
    layer.to(dtype)
    x = torch.randn(3, 12, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    s = compute_scale(layer.weight, CONFIG.weight, "absmax")
    want = nn.functional.linear(x, ops.fake_quantize(layer.weight.detach(), s, CONFIG.weight), layer.bias)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert layer.weight.grad.dtype == dtype
    optimizer = ak.optim.ASkewSGD([{"params": [layer.weight], "grid": CONFIG.weight}], lr=0.1)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert layer.weight.dtype == dtype and not torch.equal(before, layer.weight)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("make", [lambda c: AskewLinear(12, 8, config=c), lambda c: AskewConv2d(4, 8, 3, config=c)])
@pytest.mark.parametrize("forward", ["hard", "relaxed"])
def test_autocast(make, forward):
    layer = make(QuantConfig(Uniform(4), "absmax", forward=forward))
    x = torch.randn(3, 12) if isinstance(layer, AskewLinear) else torch.randn(2, 4, 6, 6)
    x.requires_grad_()
    quantized, _ = expected_weight(layer.weight, layer.config)
    twin = copy.deepcopy(layer.to_float())
    if forward == "hard":
        twin.weight = nn.Parameter(quantized)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, want = layer(x), twin(x)
        assert y.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(y, want)
        gx, gw, gb = torch.autograd.grad(y.sum(), (x, layer.weight, layer.bias))
        wx, ww, wb = torch.autograd.grad(want.sum(), (x, twin.weight, twin.bias))
        assert gx.dtype == gw.dtype == gb.dtype == torch.float32
        for a, b in ((gx, wx), (gw, ww), (gb, wb)):  # sums of bfloat16 products in another order
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.abs().max()))
    layer.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_autocast_uses_the_optimizers_copy(monkeypatch):
    layer = AskewLinear(12, 8, config=CONFIG)
    optimizer = ak.optim.ASkewSGD([{"params": [layer.weight], "grid": CONFIG.weight}], lr=0.1)
    x = torch.randn(3, 12)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x).float().sum().backward()
        optimizer.step()
    monkeypatch.setattr(ops, "fake_quantize_out_", lambda *a: pytest.fail("quantized again"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    s = layer.weight_scale
    want = oracles.fake_quantize(layer.weight, s, CONFIG.weight).bfloat16()
    torch.testing.assert_close(y, nn.functional.linear(x.bfloat16(), want, layer.bias.bfloat16()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_eval_modes_then_training(mode):
    model = ak.quantize_(network(), CONFIG)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1)
    reference = copy.deepcopy(model)
    reference_optimizer = ak.optim.ASkewSGD(ak.param_groups(reference), lr=0.1)
    for _ in range(2):
        model.eval()
        with mode():
            want = model(IMAGES)
        model.train()
        train(model, optimizer, 2)
        train(reference, reference_optimizer, 2)
        assert not torch.equal(model(IMAGES), want)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("forward", ["hard", "relaxed"])
@pytest.mark.parametrize("frozen", [False, True])
def test_compile(backend, forward, frozen):
    if backend == "inductor" and frozen:
        pytest.skip("one inductor run is enough")
    torch._dynamo.reset()
    config = QuantConfig(Uniform(3), "sawb", forward=forward)
    model = ak.quantize_(network(), config)
    if frozen:
        train(model, ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, constraint_eps=0.3), 2)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    gradients = []
    for f in (compiled, model):
        for mode in (model.train, model.eval):
            mode()
            model.zero_grad()
            f(IMAGES).pow(2).sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model[3].weight.mul_(-1.3)
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_gradient_accumulation():
    model, whole = ak.quantize_(network(), CLIPPING), None
    whole = copy.deepcopy(model)
    for part in IMAGES.split(2):
        (model(part).pow(2).sum() / 6).backward()
    (whole(IMAGES).pow(2).sum() / 6).backward()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    layer = AskewLinear(12, 8, config=CLIPPING)
    x = torch.randn(3, 12, requires_grad=True)
    layer(x).pow(2).sum().backward()
    want = layer.weight.grad.clone()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).pow(2).sum().backward()
    assert torch.equal(layer.weight.grad, want)


def test_a_module_used_twice():
    layer = AskewLinear(8, 8, config=CONFIG)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert len(list(model.parameters())) == 2 and len(ak.param_groups(model)[0]["params"]) == 1
    x = torch.randn(3, 8)
    quantized, _ = expected_weight(layer.weight, CONFIG)
    w = quantized.clone().requires_grad_()
    want = nn.functional.linear(nn.functional.linear(x, w, layer.bias).relu(), w, layer.bias)
    torch.testing.assert_close(model(x), want)
    model(x).sum().backward()
    want.sum().backward()
    torch.testing.assert_close(layer.weight.grad, w.grad)
    shared = nn.Linear(8, 8)
    swapped = ak.quantize_(nn.Sequential(shared, nn.ReLU(), shared), CONFIG)
    assert swapped[0] is swapped[2]


@pytest.mark.parametrize("before", [False, True])
def test_tied_weights(before):
    """Two layers over one Parameter have one scale, also after it is frozen, in whatever order they run."""
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    if before:
        b.weight = a.weight
    model = ak.quantize_(nn.Sequential(a, nn.ReLU(), b), CONFIG)
    if not before:
        model[2].weight = model[0].weight
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, constraint_eps=0.5)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 3
    x = torch.randn(4, 8)
    scales = []
    for i in range(4):
        optimizer.zero_grad()
        y = model(x) if i % 2 else model[0](model[2](x))
        y.pow(2).sum().backward()
        optimizer.step()
        assert torch.equal(model[0].weight_scale, model[2].weight_scale)
        scales.append(model[0].weight_scale.clone())
        assert torch.equal(model[0].quantized_weight(), model[2].quantized_weight())
    assert all(torch.equal(s, scales[0]) for s in scales)  # frozen at the first step


def test_frozen_weight_and_no_gradient():
    layer = AskewLinear(8, 4, config=CONFIG)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None and x.grad is not None
    model = nn.Sequential(layer)
    assert [len(g["params"]) for g in ak.param_groups(model)] == [1] and "grid" not in ak.param_groups(model)[0]


# ---- conversion ------------------------------------------------------------------------------------------------------


def test_quantize_patterns():
    two = QuantConfig(Uniform(2))
    model = ak.quantize_(network(), {"0": None, "5": two, "*": CONFIG})
    assert type(model[0]) is nn.Conv2d and model[3].config == CONFIG and model[5].config == two
    model = ak.quantize_(nn.ModuleDict({"encoder": network(), "head": nn.Linear(5, 2)}), {"encoder.*": CONFIG})
    assert type(model["head"]) is nn.Linear and isinstance(model["encoder"][5], AskewLinear)
    model = ak.quantize_(network(), CONFIG, filter_fn=lambda module, name: name not in ("0", "5"))
    assert [isinstance(m, ak.nn.layers.QuantizedLayer) for m in (model[0], model[3], model[5])] == [False, True, False]
    again = ak.quantize_(model, CONFIG)
    assert isinstance(again[0], AskewConv2d)
    assert ak.quantize_(network())[0].config == QuantConfig()
    assert not ak.nn.convert.quantized_layers(ak.quantize_(nn.Sequential(nn.ReLU()), CONFIG))


@pytest.mark.parametrize(("config", "error", "words"), [
    ({"nothing": CONFIG}, ValueError, "nothing"), ({"*": 4}, TypeError, "config"), ("4 bits", TypeError, "config"),
    (QuantConfig(Uniform(4), "sawb", "per_group", 7), ValueError, "group_size: 7"),
])  # fmt: skip
def test_quantize_errors_change_nothing(config, error, words):
    model = network()
    with pytest.raises(error, match=words):
        ak.quantize_(model, config)
    assert repr(model) == repr(network())
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize(("layer", "error", "words"), [
    (lambda: nn.LazyLinear(4), ValueError, "1: weight: comes with the first batch of a LazyLinear"),
    (lambda: nn.Linear(4, 4, dtype=torch.complex64), TypeError, "1: weight: expected float32.* got torch.complex64"),
    (lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn), TypeError, "1: weight: expected .* got torch.float8_e4m3fn"),
])  # fmt: skip
def test_weights_that_are_no_floats_yet_or_ever(layer, error, words):
    model = nn.Sequential(nn.Linear(4, 4), layer())
    with pytest.raises(error, match=words):
        ak.quantize_(model, CONFIG)
    assert type(model[0]) is nn.Linear and not isinstance(model[1], ak.nn.AskewLinear)
    ak.quantize_(model, {"1": None, "*": CONFIG})
    assert isinstance(model[0], ak.nn.AskewLinear) and isinstance(ak.nn.left_float(model), dict)


def test_a_lazy_layer_that_has_seen_a_batch_is_quantized():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    model(torch.randn(3, 5))
    assert isinstance(ak.quantize_(model, CONFIG)[0], ak.nn.AskewLinear)


def test_more_errors():
    with pytest.raises(TypeError, match="^model"):
        ak.quantize_("model", CONFIG)
    with pytest.raises(ValueError, match="^model"):
        ak.quantize_(nn.Linear(4, 4), CONFIG)
    with pytest.raises(TypeError, match="^config"):
        AskewLinear(4, 4, config="4 bits")
    with pytest.raises(ValueError, match="group_size"):
        AskewLinear(10, 4, config=QuantConfig(Uniform(4), "sawb", "per_group", 4))


def test_param_groups():
    two = QuantConfig(Uniform(2), "mean" if False else "sawb", "per_tensor")
    model = ak.quantize_(network(), {"5": two, "*": CONFIG})
    groups = ak.param_groups(model, outer=False, lr=0.3, alpha=2.0)
    assert [g.get("grid") for g in groups] == [Uniform(4), Uniform(2), None]
    assert [len(g["params"]) for g in groups] == [2, 1, 3]
    assert groups[1]["granularity"] == "per_tensor" and groups[0]["scale"] == "absmax"
    assert all(g["lr"] == 0.3 and g["alpha"] == 2.0 for g in groups)
    found = set(itertools.chain.from_iterable(map(id, g["params"]) for g in groups))
    assert found == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [
    CLIPPING, QuantConfig(Binary(), "mean"), QuantConfig(Uniform(8)), QuantConfig(Codebook(oracles.NF4), "absmax"),
    QuantConfig(Uniform(4), "sawb", "per_group", 4),
], ids=str)  # fmt: skip
def test_hard_quantize(config, dtype):
    model = ak.quantize_(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), config).to(dtype)
    want = [layer.quantized_weight() for layer in ak.nn.convert.quantized_layers(model).values()]
    y = model(torch.ones(1, 12, dtype=dtype))
    assert ak.hard_quantize_(model) is model
    for w, layer in zip(want, ak.nn.convert.quantized_layers(model).values(), strict=True):
        assert torch.equal(layer.weight, w) and torch.equal(layer.quantized_weight(), w)
    assert torch.equal(model(torch.ones(1, 12, dtype=dtype)), y)
    assert torch.equal(ak.dequantize_(model)(torch.ones(1, 12, dtype=dtype)), y)


def test_repr_names_the_quantization():
    assert "Uniform(bits=4" in repr(AskewLinear(4, 4, config=CONFIG)) and "absmax" in repr(
        AskewLinear(4, 4, config=CONFIG)
    )


@pytest.mark.gpu
def test_to_gpu_and_back():
    model = ak.quantize_(network(), CLIPPING)
    train(model, ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, constraint_eps=0.3), 2)
    want = model(IMAGES)
    model.cuda()
    torch.testing.assert_close(model(IMAGES.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.cpu()(IMAGES), want)


@pytest.mark.parametrize("forward", ["relaxed", "hard"])
def test_an_input_of_another_dtype_is_refused_as_by_linear(forward):
    layer = AskewLinear(4, 3, config=QuantConfig(Uniform(4), forward=forward))
    for call in (nn.Linear(4, 3), layer, layer.eval()):
        with pytest.raises(RuntimeError, match="dtype"):
            call(torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("config", [
    QuantConfig(), QuantConfig(scale="lsq"), QuantConfig(forward="int8", gradient="int8"),
    QuantConfig(scale="lsq", activation=Uniform(4), activation_scale="lsq+"),
], ids=["clipped", "learned", "int8", "learned inputs"])  # fmt: skip
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.ConvTranspose1d(6, 5, 1)], ids=["linear", "conv"])
def test_batches_of_gradients(make, config):
    """A batch at once is one after the other, by torch's two ways."""
    layer, x = make(), torch.randn(1, 6, 6)
    if config.level_dtype is not None and not isinstance(layer, nn.Linear):
        pytest.skip("only linear layers multiply levels")
    model = ak.quantize_(nn.Sequential(layer), config)
    parameters = list(model.parameters())
    y = model(x)
    grads = torch.randn(3, *y.shape)
    each = [torch.autograd.grad(y, parameters, g, retain_graph=True) for g in grads]
    batched = torch.autograd.grad(y, parameters, grads, is_grads_batched=True, retain_graph=True)
    for found, *wanted in zip(batched, *each, strict=True):
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    if config.activation_scale is None:
        mapped = torch.func.vmap(lambda g: torch.autograd.grad(y, parameters, g, retain_graph=True))(grads)
        torch.testing.assert_close(mapped, batched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(forward="relaxed"), QuantConfig(scale="lsq")], ids=str)
def test_make_fx_sees_the_layers_as_it_sees_torchs(config, mode):
    """Parameters have a class of their own, which it would refuse; forwards and graphs of gradients compute the same,
    and the layers are afterwards what they were."""

    class SomeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            return x @ self.down_proj[1].t()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.experts, self.attention = nn.Conv1d(3, 4, 1), SomeExperts(), nn.MultiheadAttention(8, 2)

        def forward(self, x):
            x = self.experts(self.conv(x))
            return self.attention(x, x, x, need_weights=False)[0]

    model, x = ak.quantize_(Model(), config), torch.randn(2, 3, 8)
    parameters = list(model.parameters())
    kinds = [type(p) for p in parameters]

    def gradients(x):
        return torch.autograd.grad(model(x).square().sum(), parameters)

    for run in (model, gradients, model.eval(), gradients):
        wanted = run(x)
        graph = make_fx(run, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(graph(x), wanted)
        assert [type(p) for p in parameters] == kinds
    ak.hard_quantize_(model)
    torch.testing.assert_close(make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(x)(x), model(x))
