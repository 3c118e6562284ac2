"""Contract: a compiled model computes with the copy that the optimizer wrote, as an eager one does.

1. Losses, gradients and weights of a compiled training are those of the eager one, over the hold and after it, in
   float32 and under autocast, whatever the backend; one graph serves all of it, and no copy is made twice.
2. What happens to a weight otherwise is seen: an edit in place or through ``.data``, a checkpoint, a freeze.
3. Whoever calls the layer without its Parameter (torch.func, export) gets what it computed before.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import askew_kernels as ak
from askew_kernels.quant import FP4, LUQ, QuantConfig, Uniform, WeightQuantizer

X = torch.randn(24, 16, generator=torch.Generator().manual_seed(3))
CONFIGS = {
    "rows": QuantConfig(Uniform(3)),
    "groups": QuantConfig(Uniform(4), granularity="per_group", group_size=8),
    "unclipped": QuantConfig(Uniform(3), ste_clip=False),
    "absmax": QuantConfig(Uniform(8)),
    "inputs": QuantConfig(Uniform(4), activation=Uniform(8)),
}


def network(config=None):
    torch.manual_seed(1)
    return ak.nn.quantize_(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8, bias=False)), config)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def written(monkeypatch):
    """How often a copy was made otherwise than by an update."""
    calls, original = [], ak.quant.state.ops.fake_quantize_out_
    monkeypatch.setattr(ak.quant.state.ops, "fake_quantize_out_", lambda *args: (calls.append(1), original(*args))[1])
    return calls


def backward(model, x=X, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training(config, autocast, backend, written):
    eager, model = network(config), network(config)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizers = [ak.optim.ASkewAdamW(ak.param_groups(m), lr=0.05) for m in (eager, model)]
    for step in range(8):
        for m, o, run in zip((eager, model), optimizers, (eager, compiled), strict=True):
            for group in o.param_groups:
                group["constraint_eps"] = 1.0 if step < 4 else 0.3
            o.zero_grad()
            loss = backward(run, autocast=autocast)
            m.seen = [loss, *(p.grad.clone() for p in m.parameters())]
            o.step()
        for a, b in zip([*eager.seen, *eager.parameters()], [*model.seen, *model.parameters()], strict=True):
            assert torch.equal(a, b)
    assert len(written) == 4  # each layer's first
    assert counters["stats"]["unique_graphs"] == 1


def test_the_gradient_is_clipped_once_a_weight_is_outside():
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    ak.hard_quantize_(model)  # which keeps the scale
    with torch.no_grad():
        model[0].weight[2, 3] = 9.0
    twin = copy.deepcopy(model)
    backward(compiled), backward(twin)
    grad = model[0].weight.grad
    assert grad[2, 3] == 0 and grad[2].count_nonzero() == 15 and torch.equal(grad, twin[0].weight.grad)


@pytest.mark.parametrize("how", ["in place", "data", "state_dict", "freeze", "foreign", "assigned"])
def test_whatever_changes_a_weight_is_seen(how):
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)
    backward(compiled)
    optimizer.step()
    layer = model[0]
    if how == "in place":
        with torch.no_grad():
            layer.weight.mul_(-2)
    elif how == "data":
        layer.weight.data.mul_(-2)
    elif how == "state_dict":
        torch.manual_seed(9)
        other = ak.nn.quantize_(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8, bias=False)))
        model.load_state_dict(other.state_dict())
    elif how == "freeze":
        ak.hard_quantize_(model)
        layer.weight.data.mul_(0.5)
    elif how == "foreign":
        torch.optim.SGD(model.parameters(), lr=0.5, fused=True).step()
    else:
        layer.weight = nn.Parameter(-2 * layer.weight.detach())
    fresh = copy.deepcopy(model)  # which has no copies yet
    model.zero_grad()
    losses = backward(compiled), backward(fresh)
    assert torch.equal(*losses)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_two_forwards_before_one_backward_and_several_backwards():
    eager, model = network(), network()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in (eager, compiled):
        (run(X).square().mean() + run(-X).mean()).backward()
        for part in X.chunk(3):
            run(part).sum().backward()

    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_weight_that_has_moved_before_its_backward_is_an_error():
    model = network()
    loss = torch.compile(model, backend="aot_eager")(X).sum()
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_blocks_that_are_compiled_one_by_one_share_a_graph():
    torch.manual_seed(0)
    model = ak.nn.quantize_(nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))))
    x = X.clone().requires_grad_()
    expected = model(x)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(model(x), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_shapes_of_inputs_may_change_and_gradients_may_be_off():
    model = network()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for x in (X, X[:7], X.reshape(4, 6, 16)):
        torch.testing.assert_close(compiled(x), model(x))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    assert compiled(X.requires_grad_()).requires_grad
    X.requires_grad_(False)


def test_transposed_layers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = ak.nn.quantize_(nn.Sequential(transformers.pytorch_utils.Conv1D(12, 16)), QuantConfig(Uniform(3)))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(backward(compiled), backward(twin))
    assert torch.equal(model[0].weight.grad, twin[0].weight.grad)
    assert model[0].weight.grad.stride() == twin[0].weight.grad.stride()


def test_others_weights_are_quantized_in_the_graph():
    """torch.func's, a parametrization's: not a Parameter whose quantizer anybody knows."""
    model = network()
    others = {name: 2 * p.detach() for name, p in model.named_parameters()}

    def functional(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))

    found = torch.compile(functional, backend="aot_eager")(others, X)
    torch.testing.assert_close(found, functional(others, X))
    program = torch.export.export(model.eval(), (X,))
    torch.testing.assert_close(program.module()(X), model(X))
    assert "kept_linear" not in str(program.graph)


def test_a_tensor_that_stands_for_the_parameter_is_an_error():
    layer = network()[0]
    with pytest.raises(RuntimeError, match="expected the Parameter of a quantized layer"):
        torch.ops.askew.kept_linear(X, layer.weight.detach(), *layer.quantizer.tensors, None, False)


def test_the_copy_is_of_the_type_that_autocast_computes_in():
    model = network()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=0.05)
    for _ in range(2):
        backward(compiled, autocast=True)
        optimizer.step()
    for layer in (model[0], model[2]):
        quantizer = WeightQuantizer.of(layer.weight)
        assert set(quantizer._copies) == {torch.bfloat16}


TRANSFORMED = {
    "grad": lambda f, x: torch.func.grad(lambda z: f(z).square().sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x + 1,))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(x),
}


@pytest.mark.parametrize("way", TRANSFORMED)
@pytest.mark.parametrize("config", [
    QuantConfig(Uniform(3)), QuantConfig(Uniform(4), forward="int8"), QuantConfig(FP4(), forward="fp8"),
    QuantConfig(Uniform(4), gradient=LUQ(4)),
], ids=["hard", "int8", "fp8", "luq"])  # fmt: skip
def test_transforms_in_a_graph(config, way):
    if way in ("grad", "jacrev") and config.gradient is not None:
        pytest.skip("random")
    model, x, transform = network(config), X[:3].clone(), TRANSFORMED[way]
    expected = transform(model, x)
    found = torch.compile(lambda z: transform(model, z), backend="aot_eager", fullgraph=True)(x)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_packed_layer_in_a_transformed_graph():
    model = ak.pack_(ak.hard_quantize_(network()))
    found = torch.compile(lambda z: torch.vmap(model)(z), backend="aot_eager", fullgraph=True)(X)
    torch.testing.assert_close(found, model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.Conv1d(6, 5, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["quantized", "packed"])
def test_float64_in_one_graph(is_packed, make):
    model, x = ak.quantize_(nn.Sequential(make()).double()), torch.randn(2, 6, 6, dtype=torch.float64)
    if is_packed:
        ak.pack_(ak.hard_quantize_(model))
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y = run(x)
        gradients.append([y.detach(), *torch.autograd.grad(y.square().sum(), next(model.parameters()))])
    torch.testing.assert_close(*gradients)
