"""Contract: with ``QuantConfig(activation=grid, activation_scale="lsq")`` the scale of a layer's input is learned (LSQ,
Esser et al., ICLR 2020), with ``"lsq+"`` an offset, too (LSQ+, Bhalgat et al., CVPRW 2020).

1. Values and gradients of input, scale and offset are the papers' formulas: a float64 oracle by autograd.
2. They start from the first batch in training mode or from ``calibrate_``, stand in the state_dict and in the group of
   learned scales, and survive copies, checkpoints and casts.
3. Traced and transformed calls compute the same; no gradient makes a scale useless, nor a write that torch does not
   count.
4. What cannot be says so: packing, forwards that quantize token by token, a start in every rank for itself.
"""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels.quant import QuantConfig, Uniform

KINDS = ["lsq", "lsq+"]
UNSIGNED, SIGNED = Uniform(4, signed=False), Uniform(4)


def layer_of(kind, grid=SIGNED, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7))
    return ak.quantize_(model, QuantConfig(scale="lsq", activation=grid, activation_scale=kind, **options))


def inputs(seed=1, rows=9):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed)) + 0.7


def oracle(x, s, b, grid, features):
    """LSQ+ as the paper writes it; float64, by torch alone."""
    g = 1 / math.sqrt(features * grid.c_max)
    s, b = (p if p is None else (p - p * g).detach() + p * g for p in (s, b))
    z = x if b is None else x - b
    q = (z / s).clamp(grid.levels[0], grid.levels[-1])
    y = (q + (q.round() - q).detach()) * s
    return y if b is None else y + b


@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED, Uniform(8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind, grid):
    model = layer_of(kind, grid)
    layer, x = model[0], inputs().requires_grad_()
    learned = layer.input_quantizer
    with torch.no_grad():
        model(x)  # starts
        if kind == "lsq":
            start = 2 * x.abs().mean() / math.sqrt(grid.c_max)
        else:
            start = (x.max() - x.min()) / (grid.levels[-1] - grid.levels[0])
            torch.testing.assert_close(learned.offset, (x.min() - start * grid.levels[0]).reshape(1))
        torch.testing.assert_close(learned.scale, start.reshape(1))
        learned.scale.mul_(0.6)  # some are outside
    g = torch.randn(9, 7, generator=torch.Generator().manual_seed(2))
    y = model(x)
    y.backward(g)
    wide = x.detach().double().requires_grad_()
    s = learned.scale.detach().double().requires_grad_()
    b = None if learned.offset is None else learned.offset.detach().double().requires_grad_()
    wanted = functional.linear(
        oracle(wide, s, b, grid, 12), layer.quantized_weight().double(), layer.bias.detach().double()
    )
    wanted.backward(g.double())
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learned.scale.grad.double(), s.grad, rtol=1e-4, atol=1e-5)
    if b is not None:
        torch.testing.assert_close(learned.offset.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_start_and_calibration(kind):
    model, x = layer_of(kind).eval(), inputs()
    plain = ak.quantize_(nn.Sequential(copy.deepcopy(model[0].to_float())), QuantConfig(scale="lsq", activation=SIGNED))
    assert not model[0].input_quantizer.started and torch.equal(model(x), plain(x))  # by the input's own magnitude
    model.train()
    model(torch.zeros(3, 12))
    model(torch.full((3, 12), math.nan))
    assert not model[0].input_quantizer.started
    twin = copy.deepcopy(model)
    expected = model(x)
    got = ak.nn.calibrate_(twin, x)
    assert twin.training and twin[0].input_quantizer.started and torch.equal(got, expected)
    scale = twin[0].input_quantizer.scale.clone()
    ak.nn.calibrate_(twin, 3 * x)  # it has started
    assert torch.equal(twin[0].input_quantizer.scale, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_training_copies_and_checkpoints(kind):
    model, x = layer_of(kind, UNSIGNED), inputs()
    ak.nn.calibrate_(model, x)
    groups = ak.param_groups(model, lr=0.05)
    ids = [id(p) for p in groups[1]["params"]]
    assert groups[1]["role"] == "scale" and ids[1:] == [id(p) for p in model[0].input_quantizer.parameters()]
    optimizer = ak.optim.ASkewSGD(groups, lr=0.05, momentum=0.9)
    annealing = ak.EpsilonAnnealing(optimizer, hold=3, total=6)
    y, before = torch.randn(9, 7), model[0].input_quantizer.scale.clone()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        annealing.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(before, model[0].input_quantizer.scale)
    other = layer_of(kind, UNSIGNED)
    other.load_state_dict(model.state_dict())
    expected = model(x)
    for twin in (copy.deepcopy(model), other, copy.deepcopy(model).double().float()):
        assert torch.equal(twin(x), expected) and twin[0].input_quantizer.scale.dtype == torch.float32
    other.load_state_dict(nn.Sequential(nn.Linear(12, 7)).state_dict())  # a float checkpoint says nothing of inputs
    assert torch.equal(other[0].input_quantizer.scale, model[0].input_quantizer.scale)
    ak.hard_quantize_(model)
    with pytest.raises(ValueError, match=r"0: activation_scale: packed layers.*force=True"):
        ak.pack_(model)
    ak.pack_(model, force=True)
    assert model[0].config.activation_scale is None
    other.to("meta").to_empty(device="cpu")
    assert not other[0].input_quantizer.started
    ak.dequantize_(other)
    assert [*other.state_dict()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_traced_and_transformed_calls(kind):
    model, x = layer_of(kind), inputs()
    with pytest.raises(RuntimeError, match="calibrate_"):
        torch.func.jvp(model, (x,), (x,))
    ak.nn.calibrate_(model, x)
    with torch.no_grad():
        model[0].input_quantizer.scale.mul_(0.6)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()  # of other models
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(params)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    scale = model[0].input_quantizer.scale
    (first,) = torch.autograd.grad(model(x).square().sum(), scale, create_graph=True)
    torch.testing.assert_close(first, expected["0.input_quantizer.scale"], rtol=1e-4, atol=1e-5)
    (second,) = torch.autograd.grad(first.sum(), model[0].bias)
    assert second.isfinite().all() and (second != 0).any()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("by", ["load", "move", "in place"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_that_came_before_compiling(kind, by, training):
    """By ``load_state_dict``, a move, or written in place, as averages, broadcasts and DCP do: the first call, in a
    graph, computes with it."""
    model, x = layer_of(kind), inputs()
    ak.nn.calibrate_(model, x)
    other = copy.deepcopy(model).to("cpu") if by == "move" else layer_of(kind)
    if by == "load":
        other.load_state_dict(model.state_dict())
    elif by == "in place":
        with torch.no_grad():
            for name, t in other.state_dict().items():
                t.copy_(model.state_dict()[name])
    expected = model.train(training)(x)
    own = layer_of(kind).eval()(x)  # what has not started takes each token's own magnitude
    torch._dynamo.reset()
    found = torch.compile(other.train(training), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, own, rtol=1e-2) and torch.equal(other(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_without_a_start(kind):
    """Each token's own magnitude, as in eval mode; once a start stands in the program's buffers, the scale."""
    model, x = layer_of(kind).eval(), inputs()
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)
    ak.nn.calibrate_(model, x)
    loaded = program.module()
    loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_alone_are_a_checkpoint(kind, assign):
    """What was learned of weights and inputs comes with them, is told where the rest is missing, and is learned on."""
    model, x = layer_of(kind), inputs()
    for _ in range(3):
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
    expected, parameters = model.eval()(x), {n: p.detach().clone() for n, p in model.named_parameters()}
    other = layer_of(kind)
    with pytest.warns(UserWarning) as told:
        other.load_state_dict(copy.deepcopy(parameters), assign=assign)
    assert [str(w.message).partition(":")[0] for w in told] == ["0.weight_scale", "0.input_quantizer.scale"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(parameters)  # it knows the rest
    for twin in (other, model):
        assert torch.equal(twin.eval()(x), expected) and torch.equal(twin.train()(x), expected)
        twin.zero_grad()
        twin(x).square().sum().backward()
        torch.optim.SGD(twin.parameters(), lr=1e-3).step()
        twin(x)
        for name in ("0.weight_scale", "0.input_quantizer.scale"):
            assert not torch.equal(twin.get_parameter(name), parameters[name])
            torch.testing.assert_close(twin.get_parameter(name), parameters[name], rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors(kind):
    """Shapes alone, forward and back, of a model made there and of one with values, which stays as it was."""
    from torch._subclasses import FakeTensorMode

    real = layer_of(kind)
    with FakeTensorMode(allow_non_fake_inputs=True):
        models = [layer_of(kind), layer_of(kind).eval(), real]
        for model in models[: 3 if torch.__version__ >= "2.13" else 2]:  # before, it takes no subclass with values
            x = torch.empty(9, 12, requires_grad=True)
            y = model(x)
            y.sum().backward()
            assert y.shape == (9, 7) and x.grad.shape == x.shape
            if model is not real:  # whose tensors the mode has in keeping, too
                assert len(ak.param_groups(model)[1]["params"]) == KINDS.index(kind) + 2
                model.load_state_dict(model.state_dict())
    assert not real[0].input_quantizer.started
    real.zero_grad()
    twin = layer_of(kind)
    assert torch.equal(real(inputs()), twin(inputs()))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_others_put_in_their_place_are_learned_too(kind):
    """type(p)(value), as accelerate has it, and the tensors that torch swaps when it loads."""
    model, x = layer_of(kind), inputs()
    model(x)
    learned = model[0].input_quantizer
    learned._parameters["scale"] = type(learned.scale)(learned.scale.detach().clone())
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1)):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    sharp = ak.optim.SAM(ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1), rho=0.5)
    model(x).sum().backward()
    values = [p.detach().clone() for p in learned.parameters()]
    sharp.first_step()
    assert all(map(torch.equal, values, learned.parameters()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_makes_it_useless(kind, value):
    model, x = layer_of(kind), inputs()
    model(x).sum().backward()
    learned = model[0].input_quantizer
    start = learned.scale.clone()
    for p in learned.parameters():
        p.grad.fill_(value)
    torch.optim.SGD(learned.parameters(), lr=1.0).step()
    assert model(x).isfinite().all()
    assert learned.scale.isfinite().all() and (learned.scale >= 0.999e-3 * start).all()


FUSED = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1.0, fused=True),
    "ASkewSGD": lambda groups: ak.optim.ASkewSGD(groups, lr=1.0, fused=True),
    "Skewed": lambda groups: ak.optim.Skewed(torch.optim.SGD(groups, lr=1.0, fused=True)),
    "data": None,
}


@pytest.mark.parametrize("copied", [
    lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)),
    lambda model: model.double().float(),
], ids=["itself", "deepcopy", "pickle", "cast"])  # fmt: skip
@pytest.mark.parametrize("by", FUSED)
def test_writes_that_torch_does_not_count_are_bounded(by, copied):
    model, x = layer_of("lsq+"), inputs()
    ak.nn.calibrate_(model, x)
    model = copied(model)
    learned = model[0].input_quantizer
    start = learned.scale.detach().clone()
    model(x).sum().backward()
    if by == "data":
        learned.scale.data.fill_(-10.0)
        learned.offset.data.fill_(math.nan)
    else:
        optimizer = FUSED[by](ak.param_groups(model, lr=1.0))
        learned.scale.grad.fill_(10.0)
        learned.offset.grad.fill_(math.nan)
        optimizer.step()
    torch._dynamo.reset()
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)(x)  # it looks at them before anyone bounds them
    torch.testing.assert_close(model(x), traced, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learned.scale, 1e-3 * start)
    assert learned.offset == 0


def test_looking_at_data_between_two_forwards_leaves_the_graph_alone():
    model, x = layer_of("lsq+"), inputs()
    ak.nn.calibrate_(model, x)
    y = model(x)
    assert model[0].input_quantizer.scale.data > 0
    (y + model(x)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model, x = layer_of("lsq+").to(dtype), inputs().to(dtype)
    y = model(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model[0].input_quantizer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_of("lsq")(inputs()).dtype == torch.bfloat16


def test_images_have_the_features_of_one():
    torch.manual_seed(0)
    model = ak.quantize_(nn.Sequential(nn.Conv2d(3, 4, 3)), QuantConfig(activation=SIGNED, activation_scale="lsq"))
    x = torch.randn(5, 3, 8, 8)
    model(x)
    y = model(x)
    g = torch.randn(y.shape)
    y.backward(g)
    s = model[0].input_quantizer.scale.detach().double().requires_grad_()
    q = oracle(x.double(), s, None, SIGNED, 3 * 8 * 8)
    functional.conv2d(q, model[0].quantized_weight().double()).backward(g.double())
    torch.testing.assert_close(model[0].input_quantizer.scale.grad.double(), s.grad, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="activation_scale: expected None, 'lsq' or 'lsq\\+', got 'max'"):
        QuantConfig(activation=SIGNED, activation_scale="max")
    with pytest.raises(ValueError, match="activation_scale: 'lsq' needs a grid"):
        QuantConfig(activation_scale="lsq")
    with pytest.raises(ValueError, match="activation_scale: forward='int8'"):
        QuantConfig(activation=Uniform(8), activation_scale="lsq", forward="int8")
    config = QuantConfig(activation=SIGNED, activation_scale="lsq+")
    assert QuantConfig.from_json(config.to_json()) == config and "activation_scale" not in QuantConfig().to_dict()


def test_transformers(tmp_path):
    """A float checkpoint starts weights' scales from its weights, and leaves those of inputs; a trained one resumes."""
    transformers = pytest.importorskip("transformers")
    from askew_kernels.deploy.hf import AskewConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)
    load = transformers.AutoModelForCausalLM.from_pretrained
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    wanted = QuantConfig(scale="lsq", activation=Uniform(8), activation_scale="lsq+")
    model = load(tmp_path / "float", quantization_config=AskewConfig(wanted))
    layer = model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(layer.weight_scale, 2 * layer.weight.abs().mean(1) / math.sqrt(7))
    for one in ak.nn.quantized_layers(model).values():
        learned = one.input_quantizer
        assert (float(learned.scale), float(learned.offset), learned.started) == (1.0, 0.0, False)
    tokens = torch.arange(14).reshape(2, 7)
    ak.nn.calibrate_(model, tokens)
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model, lr=1e-3), lr=1e-3)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    again = load(tmp_path / "trained")
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)
