"""Contract: what ``ak.analysis`` says of a loss and of a training run is true (docs/mathematics.md, section 7).

1. Eigenvalues and traces are the Hessian's: against dense Hessians, closed forms, whole and by layer.
2. On a quadratic every quantity of a certificate equals its closed form; on logistic regression it holds at every step
   for γ <= 1/L; it warns above 1/L̂; the feasibility limit is where the pull begins to carry weights past their level.
3. The Hessian is that of the function that the model computes, whatever it is made of (attention, dropout, shared and
   quantized weights, quantized inputs, nested batches); model, generators and data are as before; what has no Hessian
   is named.
4. A telemetry log holds what ``telemetry()`` says, survives what a log may meet, and becomes a page.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import math
import os
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from networks import Language
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import analysis
from askew_kernels.__main__ import main
from askew_kernels.analysis.batches import map_tensors, samples

pytest.importorskip("scipy")

DIAGONAL = torch.tensor([4.0, -1.0, 0.5, 3.0, 2.5, 0.0], dtype=torch.float64)


def quadratic(w):
    return 0.5 * (DIAGONAL * w * w).sum()


def small_problem():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 3, (40,))
    return model, x, y


def dense_hessian(loss, params):
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
    rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


# ---- curvature ------------------------------------------------------------------------------------------------------


def test_eigenvalues_of_a_quadratic():
    w = nn.Parameter(torch.randn(6, dtype=torch.float64))
    assert analysis.hessian_eigenvalues(lambda: quadratic(w), [w], 3) == pytest.approx([4, 3, 2.5], rel=1e-6)
    assert analysis.hessian_eigenvalues(lambda: quadratic(w), [w], 6) == pytest.approx(
        sorted(DIAGONAL.tolist(), reverse=True), abs=1e-12
    )  # dense, where Lanczos cannot be asked
    assert analysis.hessian_eigenvalues(lambda: quadratic(w), (p for p in [w]), 1) == pytest.approx([4], rel=1e-6)
    assert analysis.hessian_eigenvalues(lambda: (w * 2).sum(), [w]) == [0.0]
    one = nn.Parameter(torch.tensor(2.0))
    assert analysis.hessian_eigenvalues(lambda: -3 * one**2, [one]) == pytest.approx([-6.0])


def test_smoothness_is_the_dense_hessian_s_largest_eigenvalue():
    model, x, y = small_problem()
    hessian = dense_hessian(functional.cross_entropy(model(x), y), list(model.parameters()))
    exact = torch.linalg.eigvalsh(hessian)
    found = analysis.smoothness(model, functional.cross_entropy, (x, y), k=3)
    assert found.eigenvalues[""] == pytest.approx(exact.flip(0)[:3].tolist(), rel=1e-4)
    assert pytest.approx(float(exact[-1]), rel=1e-4) == found.L
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]  # weighted by size: the mean over all rows
    uneven = analysis.smoothness(model, functional.cross_entropy, batches)
    assert pytest.approx(float(exact[-1]), rel=1e-4) == uneven.L
    layers = analysis.smoothness(model, functional.cross_entropy, (x, y), per_layer=True).eigenvalues
    sizes = [48, 27]
    for name, block in zip(("0", "2"), (hessian[:48, :48], hessian[48:, 48:]), strict=True):
        assert layers[name][0] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-4)
        assert layers[name][0] <= found.L * (1 + 1e-4)
    assert sum(sizes) == len(hessian)


def test_smoothness_of_a_quantized_model_is_that_of_its_quantized_weights():
    model, x, y = small_problem()
    ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=3)))
    before = copy.deepcopy(model.state_dict())
    found = analysis.smoothness(model, functional.cross_entropy, (x, y)).L
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    hard = ak.dequantize_(ak.hard_quantize_(copy.deepcopy(model)))
    exact = dense_hessian(functional.cross_entropy(hard(x), y), list(hard.parameters()))
    assert found == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-4)


def test_batchnorm_and_frozen_parameters_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    data = (torch.randn(16, 4), torch.randint(0, 2, (16,)))
    first = analysis.smoothness(model, functional.cross_entropy, data)
    assert first == analysis.smoothness(model, functional.cross_entropy, data)  # the seed decides
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[0].weight.requires_grad and model[0].weight.grad is None


def test_trace_is_hutchinson_s():
    w = nn.Linear(6, 1, bias=False).double()
    data = (torch.ones(1, 6, dtype=torch.float64), torch.zeros(1))
    diagonal = analysis.hessian_trace(w, lambda *_: quadratic(w.weight), data, samples=1)
    assert diagonal == {"weight": pytest.approx(float(DIAGONAL.sum()), rel=1e-12)}  # z·Dz is exact for any signs
    model, x, y = small_problem()
    hessian = dense_hessian(functional.cross_entropy(model(x), y), list(model.parameters()))
    samples = 400
    found = analysis.hessian_trace(model, functional.cross_entropy, (x, y), samples=samples)
    exact = float(hessian[:40, :40].trace())
    # of z_l·(H z)_l: 2 sum of squares off the diagonal of its own block, plus those of its rows outside it
    own, rows = hessian[:40, :40] - hessian[:40, :40].diag().diag(), hessian[:40, 40:]
    deviation = math.sqrt((2 * float((own**2).sum()) + float((rows**2).sum())) / samples)
    assert abs(found["0.weight"] - exact) < 5 * deviation


def test_slice_goes_through_the_loss_and_back():
    model, x, y = small_problem()
    before = [p.detach().clone() for p in model.parameters()]
    found = analysis.loss_slice(model, functional.cross_entropy, (x, y), points=5)
    assert found["t"] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert found["loss"][2] == pytest.approx(functional.cross_entropy(model(x), y).item(), rel=1e-12)
    assert len(set(found["loss"])) == 5
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("what", "match"),
    [
        (lambda m, x, y: analysis.smoothness(m, functional.cross_entropy, []), "yielded no batch"),
        (lambda m, x, y: analysis.smoothness(m, functional.cross_entropy, [x]), "expected .x, y. or batches"),
        (lambda m, x, y: analysis.smoothness(m, lambda a, b: a.sum() * math.nan, (x, y)), "loss: expected a finite"),
        (lambda m, x, y: analysis.smoothness(m, lambda a, b: a, (x, y)), "loss: expected a scalar"),
        (lambda m, x, y: analysis.smoothness(m, functional.cross_entropy, (x, y), k=0), "k: expected"),
        (lambda m, x, y: analysis.smoothness(nn.ReLU(), functional.cross_entropy, (x, y)), "no parameters"),
        (lambda m, x, y: analysis.hessian_trace(m, functional.cross_entropy, (x, y), samples=0), "samples: expected"),
        (lambda m, x, y: analysis.smoothness(m, functional.cross_entropy, None), "data: expected .x, y. or batches"),
        (lambda m, x, y: analysis.smoothness(m, functional.cross_entropy, (x, y), tol="x"), "tol: expected a number"),
        (lambda m, x, y: analysis.smoothness(m, functional.cross_entropy, (x, y), seed=1.5), "seed: expected an int"),
        (lambda m, x, y: analysis.loss_slice(m, functional.cross_entropy, (x, y), points=0), "points: expected"),
        (lambda m, x, y: analysis.loss_slice(m, functional.cross_entropy, (x, y), reach=math.nan), "reach: expected"),
        (lambda m, x, y: analysis.feasibility_limit(math.nan), "eps: expected a finite number"),
        (lambda m, x, y: analysis.hessian_eigenvalues(lambda: m(x).sum(), []), "params: expected at least one tensor"),
        (lambda m, x, y: analysis.hessian_eigenvalues(lambda: m(x).sum(), m[0].weight), "params: expected tensors"),
        (lambda m, x, y: analysis.hessian_eigenvalues(lambda: m(x).sum(), ["w"]), "params.0.: expected a tensor"),
    ],
)
def test_bad_input(what, match):
    with pytest.raises((ValueError, TypeError), match=match):
        what(*small_problem())


# ---- models as they are ---------------------------------------------------------------------------------------------


class Head(nn.Module):
    """``body``, the mean over tokens, and a linear layer."""

    def __init__(self, body, width=8, classes=3):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


class Attention(nn.Module):
    """One head, written out or fused."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.qkv = fused, nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return functional.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.mT / math.sqrt(8), -1) @ v


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def tokens():
    g = torch.Generator().manual_seed(4)
    return torch.randn(6, 5, 8, generator=g, dtype=torch.float64), torch.randint(0, 3, (6,), generator=g)


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    written = Head(Attention(fused=False)).double()
    fused = Head(Attention(fused=True)).double()
    fused.load_state_dict(written.state_dict())
    x, y = tokens()
    exact = torch.linalg.eigvalsh(dense_hessian(functional.cross_entropy(written(x), y), list(written.parameters())))
    assert analysis.smoothness(fused, functional.cross_entropy, (x, y)).L == pytest.approx(float(exact[-1]), rel=1e-4)
    found = analysis.hessian_eigenvalues(lambda: functional.cross_entropy(fused(x), y), list(fused.parameters()))
    assert found == pytest.approx([float(exact[-1])], rel=1e-4)


@pytest.mark.parametrize("body", [
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1),
    lambda: SelfAttention(8, 2, batch_first=True),
])  # fmt: skip
def test_torch_s_own_attention_in_both_modes(body):
    torch.manual_seed(0)
    model = Head(body()).double()
    data = tokens()
    training, evaluating = (
        analysis.smoothness(model.train(mode), functional.cross_entropy, data).L for mode in (True, False)
    )
    assert training == pytest.approx(evaluating, rel=1e-6) and training > 0


def test_dropout_has_one_set_of_masks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    _, x, y = small_problem()
    torch.manual_seed(3)
    exact = torch.linalg.eigvalsh(dense_hessian(functional.cross_entropy(model(x), y), list(model.parameters())))
    loss = functional.cross_entropy
    found = analysis.smoothness(model, loss, (x, y), k=2, seed=3)
    assert found.eigenvalues[""] == pytest.approx(exact.flip(0)[:2].tolist(), rel=1e-4)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]  # run anew for every product
    first, again, other = (analysis.smoothness(model, loss, batches, seed=s) for s in (3, 3, 4))
    assert first == again and first != other and model.training
    assert analysis.hessian_trace(model, loss, batches, samples=2) == analysis.hessian_trace(
        model, loss, batches, samples=2
    )
    flat = analysis.loss_slice(model, loss, batches, reach=0.0, points=3)["loss"]
    assert flat[0] == flat[1] == flat[2]  # the same function at every t


class Drawing(nn.Module):
    """Draws from every global generator, and may fail on the way."""

    def __init__(self, fail=False):
        super().__init__()
        self.linear, self.fail = nn.Linear(5, 3), fail

    def forward(self, x):
        y = self.linear(x) * (1 + torch.rand(()) + random.random() + np.random.rand())
        if self.fail:
            raise KeyError("the model's own")
        return y


def generator_states():
    name, *numbers = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, *(np.asarray(n).tolist() for n in numbers)]


@pytest.mark.parametrize("what", ["smoothness", "hessian_trace", "loss_slice"])
def test_generators_are_seeded_and_put_back(what):
    x, y = torch.randn(12, 5), torch.randint(0, 3, (12,))
    torch.manual_seed(0)
    model, function = Drawing(), getattr(analysis, what)
    own = torch.Generator().manual_seed(5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 5, shuffle=True, generator=own)
    before, own_before = generator_states(), own.get_state()
    first = function(model, functional.cross_entropy, loader)
    assert generator_states() == before and torch.equal(own.get_state(), own_before)
    torch.manual_seed(9), random.seed(9), np.random.seed(9), own.manual_seed(9)
    assert function(model, functional.cross_entropy, loader) == first  # the seed alone decides
    failing, before = Drawing(fail=True), generator_states()
    with pytest.raises(KeyError, match="the model's own"):
        function(failing, functional.cross_entropy, loader)
    assert generator_states() == before


class Counting(nn.Module):
    """Writes one buffer in place and replaces another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean()
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_models_are_left_as_they_were(fail):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(5, 6)), nn.BatchNorm1d(6), Counting(), nn.ReLU(), nn.Linear(6, 3)
    )
    model[4].bias.requires_grad_(False)
    model[1].eval()
    model[0].bias.grad = kept = torch.ones(6)
    state = {name: (t, t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    _, x, y = small_problem()
    data = [(x[:9].float(), y[:9]), (x[9:].float(), y[9:])]

    def loss(output, target):
        return functional.cross_entropy(output, target) * (math.nan if fail else 1.0)

    for function in (analysis.smoothness, analysis.hessian_trace):
        for given in (data, data[0]):
            if fail:
                with pytest.raises(ValueError, match="finite"):
                    function(model, loss, given)
            else:
                assert function(model, loss, given) == function(model, loss, given)
    analysis.loss_slice(model, loss, data, points=3)
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(now[name] is t and torch.equal(t, value) for name, (t, value) in state.items())
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert model[0].bias.grad is kept and all(p.grad is None for p in model.parameters() if p is not model[0].bias)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_layers_that_share_a_quantized_weight():
    torch.manual_seed(0)
    model, plain = Tied().double(), Tied().double()
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 6, (30,))
    ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=2)))
    with torch.no_grad():
        plain.one.weight.copy_(model.one.quantized_weight())
    assert torch.equal(plain(x), model(x))
    for k in (1, 3):
        found, known = (
            analysis.smoothness(m, functional.cross_entropy, (x, y), k=k).eigenvalues[""] for m in (model, plain)
        )
        assert found == pytest.approx(known, rel=1e-6)
    found, known = (analysis.hessian_trace(m, functional.cross_entropy, (x, y), samples=3) for m in (model, plain))
    assert found.keys() == known.keys() == {"one.weight", "one.bias", "two.bias"}
    assert found == pytest.approx(known, rel=1e-9)


def test_a_quantized_weight_that_an_embedding_reads_as_it_is():
    torch.manual_seed(0)
    model = Language().double()
    x, y = torch.randint(0, 9, (20,)), torch.randint(0, 9, (20,))
    ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=2)))
    weight, inner = model.embedding.weight.detach().clone(), model.inner.quantized_weight()
    shift = model.last.quantized_weight() - weight
    leaf, own, bias = (t.clone().requires_grad_() for t in (weight, inner, model.inner.bias.detach()))
    hidden = torch.tanh(functional.linear(functional.embedding(x, leaf), own, bias))
    loss = functional.cross_entropy(functional.linear(hidden, leaf + shift), y)
    assert loss.item() == pytest.approx(functional.cross_entropy(model(x), y).item(), rel=1e-12)
    exact = torch.linalg.eigvalsh(dense_hessian(loss, [leaf, own, bias]))
    found = analysis.smoothness(model, functional.cross_entropy, (x, y))
    assert pytest.approx(float(exact[-1]), rel=1e-4) == found.L
    layers = analysis.smoothness(model, functional.cross_entropy, (x, y), per_layer=True).eigenvalues
    assert set(layers) == {"embedding", "inner"} and max(v[0] for v in layers.values()) <= found.L * (1 + 1e-4)
    assert torch.equal(model.embedding.weight, weight) and model.last.weight is model.embedding.weight


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("forward", ["hard", "relaxed"])
def test_quantized_inputs_and_both_forwards_are_in_the_loss(forward, training):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    ).double()  # fmt: skip
    x, y = torch.randn(7, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (7,))
    config = ak.QuantConfig(weight=ak.quant.Uniform(bits=3), forward=forward, activation=ak.quant.Uniform(bits=3))
    ak.quantize_(model, config).train(training)
    found = analysis.loss_slice(model, functional.cross_entropy, (x, y), points=3)["loss"][1]
    assert found == functional.cross_entropy(model(x), y).item()
    assert analysis.smoothness(model, functional.cross_entropy, (x, y)).L > 0


class TinyExperts(nn.Module):
    """Two linear layers in one Parameter, which is read."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(2, 8, 8) / 3)

    def forward(self, x):
        return sum(functional.linear(x, w) for w in self.both)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def plain_body():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


FOUR = ak.quant.Uniform(bits=4)
AS_THEY_ARE = {
    "a learned scale": (plain_body, {"scale": "lsq"}),
    "inputs of learned scale": (plain_body, {"activation": FOUR, "activation_scale": "lsq"}),
    "inputs of learned offset": (plain_body, {"activation": FOUR, "activation_scale": "lsq+"}),
    "levels": (plain_body, {"forward": "int8"}),
    "levels of a grid": (plain_body, {"forward": "fp8", "activation": FOUR}),
    "a gradient that is rounded": (plain_body, {"gradient": ak.quant.LUQ(4)}),
    "attention": (Around, {"activation": FOUR}),
    "experts": (TinyExperts, {}),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_the_function_is_the_model_s_own(kind, training):
    torch.manual_seed(0)
    make, options = AS_THEY_ARE[kind]
    model, (x, y) = Head(make()).double(), tokens()
    names = [name for name, _ in model.named_parameters()]
    ak.quantize_(model, {"body*": ak.QuantConfig(weight=ak.quant.Uniform(bits=3), **options)}).train(training)
    ak.nn.calibrate_(model, x)
    before = copy.deepcopy(model.state_dict())
    found = analysis.loss_slice(model, functional.cross_entropy, (x, y), points=3)["loss"][1]
    assert found == pytest.approx(functional.cross_entropy(model(x), y).item(), rel=1e-6)
    traces = analysis.hessian_trace(model, functional.cross_entropy, (x, y), samples=2)
    assert list(traces) == names and all(traces.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_learned_scale_starts_from_an_analysis():
    model, x, y = small_problem()
    ak.quantize_(model, ak.QuantConfig(activation=FOUR, activation_scale="lsq"))
    found = analysis.loss_slice(model, functional.cross_entropy, (x, y), points=3)["loss"][1]
    assert not any(layer.input_quantizer.started for layer in ak.nn.quantized_layers(model).values())
    assert found == functional.cross_entropy(model.eval()(x), y).item()  # until then by the inputs themselves


def test_a_model_that_keeps_an_activation_is_copied():
    class Keeping(nn.Sequential):
        def forward(self, x):
            self.kept = {"last": [super().forward(x)]}
            return self.kept["last"][0]

    model, x, y = small_problem()
    plain = ak.quantize_(model)
    keeping = Keeping(*plain)
    keeping(x)
    found = analysis.smoothness(keeping, functional.cross_entropy, (x, y))
    assert found == analysis.smoothness(plain, functional.cross_entropy, (x, y))
    assert keeping.kept["last"][0].requires_grad


def test_what_stands_around_a_quantized_layer_is_in_the_function():
    torch.manual_seed(0)
    model, (x, y) = Head(plain_body()).double(), tokens()
    ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=3), activation=FOUR))
    model.body[0].register_forward_pre_hook(lambda layer, args: (args[0] ** 3,))  # before its input is rounded
    nn.utils.parametrizations.weight_norm(model.body[2])
    inner = model.head.forward
    model.head.forward = lambda x: 2 * inner(x)
    found = analysis.loss_slice(model, functional.cross_entropy, (x, y), points=3)["loss"][1]
    assert found == pytest.approx(functional.cross_entropy(model(x), y).item(), rel=1e-12)


class Mapping(collections.UserDict):
    """As tokenizers give them: a mapping that is no dict."""


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    note: str = "kept"


Pair = collections.namedtuple("Pair", "x extra")


class Reader(nn.Module):
    """Takes its input out of whatever it comes in."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, batch):
        if not isinstance(batch, torch.Tensor):
            batch = batch.x if hasattr(batch, "x") else batch["x" if hasattr(batch, "keys") else 0]
        return self.linear(batch[0] if isinstance(batch, list) else batch)


CONTAINERS = {
    "tensor": lambda x: x, "dict": lambda x: {"note": "a", "x": x}, "mapping": lambda x: Mapping(x=x, n=1),
    "dataclass": Record, "list": lambda x: [x], "nested": lambda x: {"x": [x, x.sum(1)]}, "tuple": lambda x: (x, None),
    "named tuple": lambda x: Pair(x, torch.tensor(1.0)),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
def test_batches_in_containers(kind):
    torch.manual_seed(0)
    model, wrap = Reader(), CONTAINERS[kind]
    x, y = torch.randn(20, 5), torch.randint(0, 3, (20,))
    known = analysis.smoothness(model, functional.cross_entropy, (x, y)).L
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = analysis.smoothness(model, functional.cross_entropy, (wrap(x), y)).L
        listed = analysis.smoothness(model, functional.cross_entropy, [wrap(x), y]).L
        uneven = [(wrap(x[:3]), y[:3]), (wrap(x[3:]), y[3:])]  # weighted by their samples
        parts = analysis.smoothness(model, functional.cross_entropy, uneven).L
    assert whole == listed == known and parts == pytest.approx(known, rel=1e-3)
    with torch.inference_mode():  # tensors made here cannot be in a graph
        inside = wrap(x.clone()), y.clone()
        assert analysis.smoothness(model, functional.cross_entropy, inside).L == known


def test_how_many_samples_a_batch_has():
    x = torch.zeros(4, 3)
    assert samples([torch.tensor(2.0), {"a": x}]) == samples({"mask": x, "positions": torch.zeros(1, 3)}) == 4
    assert samples(torch.tensor(1.0)) == 1
    with pytest.warns(UserWarning, match="first tensor speaks of 4 samples, another of 3"):
        assert samples((x, x.T)) == 4
    with pytest.warns(UserWarning, match="no tensor with a first dimension in a list"):
        assert samples(["text"]) == 1
    same = {"x": x, "record": Record(x)}
    assert map_tensors(lambda t: t, same) is same
    made = map_tensors(lambda t: t + 1, (Mapping(x=x), Pair(x, 3), Record(x)))
    assert type(made[0]) is Mapping and type(made[1]) is Pair and made[2].note == "kept" and not x.any()
    assert made[0]["x"].all() and made[1].x.all() and made[1].extra == 3 and made[2].x.all()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Never(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return NeverBackward.apply(grad)


class NeverBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad):
        return grad.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("never: has no second derivative")


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


@pytest.mark.parametrize("function", [Once, Never])
def test_what_cannot_be_differentiated_twice_is_named(function):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Sequential(nn.Tanh(), Applied(function)), nn.Tanh(), nn.Linear(8, 3))
    _, x, y = small_problem()
    x = x.float()
    before = generator_states()
    for data in ((x, y), [(x[:5], y[:5]), (x[5:], y[5:])]):
        for what in (analysis.smoothness, analysis.hessian_trace):
            with pytest.raises(NotImplementedError, match=r"^1\.1 \(Applied\): cannot be differentiated twice"):
                what(model, functional.cross_entropy, data)
    assert generator_states() == before and not any(len(m._forward_hooks) for m in model.modules())
    plain = nn.Linear(5, 3)
    with pytest.raises(NotImplementedError, match="^loss_fn: cannot be differentiated twice"):
        analysis.smoothness(plain, lambda a, b: function.apply(a).square().mean(), (x, y))
    with pytest.raises(NotImplementedError, match="^loss: cannot be differentiated twice"):
        analysis.hessian_eigenvalues(lambda: function.apply(plain(x)).square().mean(), list(plain.parameters()))
    assert math.isfinite(analysis.loss_slice(model, functional.cross_entropy, (x, y), points=2)["loss"][0])


def test_compiled_models_run_as_they_are_written():
    model, x, y = small_problem()
    known = analysis.smoothness(model, functional.cross_entropy, (x, y))
    assert analysis.smoothness(torch.compile(model), functional.cross_entropy, (x, y)) == known


def packed():
    return ak.pack_(ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)))))


def of_inference():
    with torch.inference_mode():
        return nn.Linear(5, 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (packed, r"model: 0, 1: packed, .* call unpack_\(model\) first"),
        (lambda: nn.Linear(5, 3, device="meta"), "model: weight has no values .meta."),
        (of_inference, "model: weight was made under torch.inference_mode"),
        (lambda: nn.BatchNorm1d(5, affine=False), "model: it has no parameters"),
        (lambda: Reader().requires_grad_(False), None),
    ],
)
def test_models_that_have_no_hessian(make, match):
    _, x, y = small_problem()
    for function in (analysis.smoothness, analysis.hessian_trace, analysis.loss_slice):
        if match is None:  # frozen parameters have one
            assert function(make(), functional.cross_entropy, (x.float(), y))
            continue
        with pytest.raises(ValueError, match=match):
            function(make(), functional.cross_entropy, (x.float(), y))


def test_losses_without_a_gradient_say_so():
    model, x, y = small_problem()
    for loss in (lambda a, b: a.detach().mean(), lambda a, b: b.double().mean()):
        with pytest.raises(ValueError, match="loss: does not depend on the parameters"):
            analysis.smoothness(model, loss, (x, y))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    with pytest.raises(ValueError, match=r"params.1.: expected a tensor that requires a gradient"):
        analysis.hessian_eigenvalues(lambda: frozen.sum(), [nn.Parameter(torch.ones(2)), frozen])
    for data, match in (
        ([{"x": x, "y": y}], "got a dict; make pairs of mappings"), ({"x": x}, "got a dict"),
        ([(x,)], "got a tuple of 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"data: expected \(x, y\) or batches of them, {match}"):
            analysis.smoothness(model, functional.cross_entropy, data)


def test_ambient_modes_change_nothing():
    model, x, y = small_problem()
    model, x = model.float(), x.float()
    loss = functional.cross_entropy

    def everything():
        return (analysis.smoothness(model, loss, (x, y), k=2), analysis.hessian_trace(model, loss, (x, y), samples=2),
                analysis.loss_slice(model, loss, (x, y), points=3))  # fmt: skip

    known = everything()
    with torch.inference_mode():
        assert everything() == known
    with torch.no_grad(), torch.device("meta"):
        assert everything() == known
    torch.set_default_dtype(torch.float64)
    try:
        assert everything() == known
    finally:
        torch.set_default_dtype(torch.float32)
    with FakeTensorMode(), pytest.raises(ValueError, match="under FakeTensorMode"):
        everything()
    with FakeTensorMode():
        model = nn.Linear(5, 3)
    with pytest.raises(ValueError, match="weight has no values .a FakeTensor."):
        everything()


# ---- certificates ---------------------------------------------------------------------------------------------------


def skewed(w, lr, eps=1.0, alpha=1.0, scale=0.5, **options):
    """Float64 weights on the grid -4 … 3 in steps of ``scale``, never clamped."""
    group = {
        "params": [w],
        "grid": ak.quant.Uniform(bits=3),
        "scale": torch.full((1,), scale),
        "granularity": "per_tensor",
    }
    return ak.optim.ASkewSGD([group], lr=lr, constraint_eps=eps, alpha=alpha, freeze_scale="never", **options)


def test_certificate_of_a_quadratic_is_its_closed_form():
    torch.manual_seed(2)
    diagonal = DIAGONAL.clamp(min=0)
    w = nn.Parameter(torch.tensor([0.61, -0.83, 0.31, 0.7, -1.35, 0.12], dtype=torch.float64))
    lr, eps, alpha, big_l = 0.05, 0.1, 0.5, 4.0
    optimizer = skewed(w, lr, eps, alpha)
    certificate = analysis.Certificate(optimizer, big_l)
    for _ in range(6):
        before = w.detach().clone()
        loss = 0.5 * (diagonal * w * w).sum()
        optimizer.zero_grad()
        loss.backward()
        g = w.grad.clone()
        optimizer.step()
        v = (w.detach() - before) / lr
        row = certificate.update(loss, after=0.5 * (diagonal * w * w).sum())
        t = (before / 0.5) - torch.floor(before / 0.5)
        h = eps - 16 * t**2 * (1 - t) ** 2
        slope, squares = float((g * v).sum()), float((v * v).sum())
        assert row["predicted"] == pytest.approx(lr * slope + big_l * lr**2 * squares / 2, rel=1e-9)
        exact = lr * slope + 0.5 * lr**2 * float((diagonal * v * v).sum())  # of a quadratic, no inequality
        assert row["measured"] == pytest.approx(exact, abs=1e-12) and row["holds"]
        assert row["stationarity"] == pytest.approx(squares**0.5, rel=1e-9)
        assert row["infeasibility"] == pytest.approx(float((-h).clamp(min=0).sum()), rel=1e-6)
        slopes = -(32 / 0.5) * t * (1 - t) * (1 - 2 * t)
        mu = torch.where(h < 0, (v + g) / slopes, torch.zeros_like(v))  # v = −g + μ h'
        assert (mu >= -1e-9).all()
        capped = (h < 0) & ((v * lr).abs() > 0.5 / 4 - 1e-9)
        assert not capped.any()
        assert row["complementarity"] == pytest.approx(float((mu * -h)[h < 0].sum()), rel=1e-6, abs=1e-12)
        assert row["descent_lr"] == pytest.approx(max(0.0, -2 * slope / (big_l * squares)), rel=1e-9)
        assert row["stable_lr"] == pytest.approx(min(1 / big_l, 12 / (alpha * (9 - 16 * eps))))
        assert (row["lr"], row["eps"], row["L"]) == (lr, eps, big_l)


def test_certificate_holds_at_every_step_of_logistic_regression():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(12, generator=generator, dtype=torch.float64) > 0).double()
    big_l = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1]) / 4  # of the mean logistic loss
    for share in (0.2, 1.0):
        w = nn.Parameter(0.5 * torch.randn(12, generator=generator, dtype=torch.float64))
        optimizer = skewed(w, share / big_l)
        annealing = ak.EpsilonAnnealing(optimizer, hold=10, total=60, power=2.0)
        certificate = analysis.Certificate(optimizer, big_l)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(60):
                loss = functional.binary_cross_entropy_with_logits(x @ w, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                annealing.step()
                certificate.update(loss)
        rows = certificate.rows[:-1]  # the last one waits for the next loss
        assert all(row["holds"] for row in rows) and certificate.rows[-1]["measured"] is None
        assert all(row["measured"] < 0 for row in rows[:10])  # ε = 1: plain descent
        assert rows[40]["infeasibility"] > 0 and rows[40]["complementarity"] > 0
        # it can fail: with a tenth of L the promise is too much somewhere
        small = [row["predicted"] - 0.9 * row["L"] * (row["lr"] * row["stationarity"]) ** 2 / 2 for row in rows]
        assert any(row["measured"] > bound for row, bound in zip(rows, small, strict=True)) or share < 1


def test_certificate_counts_parameters_without_a_grid():
    torch.manual_seed(0)
    model, x, y = small_problem()
    ak.quantize_(model, {"0": ak.QuantConfig(weight=ak.quant.Uniform(bits=4), forward="relaxed")})
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.01, momentum=0.9)
    certificate = analysis.Certificate(optimizer, lambda: 3.0)
    before = [p.detach().clone() for p in model.parameters()]
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    row = certificate.update(loss)
    moves = [(p.detach() - b, p.grad) for p, b in zip(model.parameters(), before, strict=True)]
    slope = sum(float((d * g).sum()) for d, g in moves)
    squares = sum(float((d * d).sum()) for d, _ in moves)
    assert row["predicted"] == pytest.approx(slope + 1.5 * squares, rel=1e-9)
    with pytest.raises(RuntimeError, match=r"expected an optimizer.step"):
        certificate.update(loss)
    certificate.remove()
    optimizer.step()
    with pytest.raises(RuntimeError):
        certificate.update(loss)


def test_certificate_goes_on_where_learned_scales_freeze():
    torch.manual_seed(0)
    model, x, y = small_problem()
    ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=4), scale="lsq"))
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.01)
    annealing = ak.EpsilonAnnealing(optimizer, hold=2, total=6)
    certificate = analysis.Certificate(optimizer, 3.0)
    for _ in range(6):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        annealing.step()
        row = certificate.update(loss)
        squares = sum(float(((p.detach() - b) ** 2).sum()) for p, b in zip(model.parameters(), before, strict=True))
        assert row["stationarity"] == pytest.approx(squares**0.5 / 0.01, rel=1e-6)
    assert model[0].weight_scale_frozen.item() and len(certificate.rows) == 6


CLOSED_OVER = {
    "a quantized model's": lambda params, model: ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05),
    "Skewed": lambda params, model: ak.optim.Skewed(torch.optim.SGD(ak.param_groups(model), lr=0.05)),
    "torch's": lambda params, model: torch.optim.SGD(params, lr=0.05),
    "by keyword": lambda params, model: torch.optim.SGD(params, lr=0.05),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLOSED_OVER)
def test_gradients_that_a_closure_makes_are_those_that_are_seen(kind):
    def run(closed):
        model, x, y = small_problem()
        ak.quantize_(model, {"0": ak.QuantConfig(weight=ak.quant.Uniform(bits=4))})
        optimizer = CLOSED_OVER[kind](list(model.parameters()), model)
        secant = analysis.Secant(optimizer)
        certificate = analysis.Certificate(optimizer, secant) if isinstance(optimizer, ak.optim.ASkewSGD) else None
        seen = []

        def closure():
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(4):
            if closed:
                loss = optimizer.step(closure=closure) if kind == "by keyword" else optimizer.step(closure)
                assert loss.requires_grad
            else:
                loss = closure()
                optimizer.step()
            row = {} if certificate is None else certificate.update(loss)
            seen.append((secant.last, row.get("predicted"), row.get("stationarity")))
            optimizer.zero_grad()
        return seen

    assert run(closed=True) == run(closed=False) and run(closed=True)[-1][0] > 0


def test_secant_sees_gradients_as_a_step_that_unscales_them_itself_has_them():
    def run(scaler):
        model, x, y = small_problem()
        model, x = model.float(), x.float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
        secant = analysis.Secant(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return secant.last

    scaled, plain = (run(torch.amp.GradScaler("cpu", enabled=enabled)) for enabled in (True, False))
    assert scaled == pytest.approx(plain, rel=1e-3) and plain > 0


def test_secant_sees_where_a_sharpness_aware_step_starts():
    """Its base may find the weights as they were moved, with the copies of where they stood beside."""

    def run(base):
        model, x, y = small_problem()
        ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=4), forward="relaxed"))
        optimizer = ak.optim.SAM(base(ak.param_groups(model), lr=0.05), rho=0.2)
        secant = analysis.Secant(optimizer.base_optimizer)

        def closure():
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return [(optimizer.step(closure), secant.last)[1] for _ in range(4)]

    assert run(ak.optim.ASkewSGD) == pytest.approx(run(torch.optim.SGD), rel=1e-6)


FORMS = {
    "with a graph": lambda t: t, "detached": lambda t: t.detach(), "one element": lambda t: t.reshape(1),
    "float64": lambda t: t.double(), "bfloat16": lambda t: t.bfloat16(), "a number": lambda t: t.item(),
    "numpy": lambda t: t.detach().numpy(),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_certificate_takes_losses_as_they_come(form):
    torch.manual_seed(0)
    model, x, y = small_problem()
    config = ak.QuantConfig(weight=ak.quant.Uniform(bits=4), forward="relaxed")
    model, x = ak.quantize_(model.float(), {"0": config}), x.float()
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.01)
    certificate = analysis.Certificate(optimizer, lambda: torch.tensor(3.0, requires_grad=True))
    make = FORMS[form]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            after = functional.cross_entropy(model(x), y)
            if step == 0:
                for bad in ({"loss": after.expand(2)}, {"loss": loss, "after": after.expand(2)}):
                    with pytest.raises(ValueError, match=rf"{list(bad)[-1]}: expected one number, got .* shape \(2,\)"):
                        certificate.update(**bad)
            row = certificate.update(make(loss), after=make(after) if step else None)
    one, two = (float(make(t.detach())) for t in (loss, after))
    assert row["measured"] == pytest.approx(two - one, abs=1e-9)
    assert all(r["measured"] is not None for r in certificate.rows) and row["holds"]


def test_warns_above_the_smoothness_and_checks_its_arguments():
    w = nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = skewed(w, 0.3)
    certificate = analysis.Certificate(optimizer, analysis.Smoothness({"": [4.0, 1.0]}))
    quadratic(w).backward()
    optimizer.step()
    with pytest.warns(analysis.CertificateWarning, match=r"lr = 0.3 is above 1/L̂ = 0.25"):
        certificate.update(quadratic(w))
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for each time it rises above
        certificate.update(quadratic(w))
    with pytest.raises(TypeError, match="optimizer: expected an ASkewSGD"):
        analysis.Certificate(torch.optim.SGD([w], lr=0.1), 1.0)
    with pytest.raises(ValueError, match="telemetry_every is 0"):
        analysis.Certificate(skewed(w, 0.1, telemetry_every=0), 1.0)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="smoothness: expected a finite number"):
            analysis.Certificate(optimizer, bad)
    with pytest.raises(TypeError, match="smoothness"):
        analysis.Certificate(optimizer, "four")


@pytest.mark.parametrize("eps", [1e-4, 0.05, 0.2, 0.5, 0.56])
@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_feasibility_limit_is_where_weights_pass_their_level(eps, alpha):
    limit = analysis.feasibility_limit(eps, alpha)

    def passes(lr):
        places = [torch.linspace(a, b, 2001, dtype=torch.float64) for a, b in ((0.001, 0.499), (0.24999, 0.25))]
        w = nn.Parameter(torch.cat(places))
        optimizer = skewed(w, lr, eps, alpha, scale=1.0)
        w.grad = torch.zeros_like(w)
        optimizer.step()
        return bool((w < -1e-12).any())

    assert not passes(0.999 * limit) and passes(1.002 * limit)
    assert analysis.feasibility_limit(9 / 16, alpha) == analysis.feasibility_limit(eps, 0.0) == math.inf


def test_secant_finds_the_curvature_along_the_way():
    w = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.01)
    secant = analysis.Secant(optimizer)
    kept = []
    for _ in range(5):
        optimizer.zero_grad()
        quadratic(w).backward()
        kept.append((w.detach().clone(), w.grad.clone()))
        optimizer.step()
    d = kept[-1][0] - kept[-2][0]
    assert secant.last == pytest.approx(float((DIAGONAL * d).norm() / d.norm()), rel=1e-9)
    assert 0 < secant.last <= secant.value <= 4.0 * (1 + 1e-12)
    secant.remove()
    optimizer.step()
    one = nn.Parameter(torch.tensor([2.0]))
    still = torch.optim.SGD([one], lr=0.0)
    other = analysis.Secant(still, decay=0.5)
    for _ in range(3):
        one.grad = torch.ones(1)
        still.step()
    assert other.last == other.value == 0.0  # stood still: no curvature known
    with pytest.raises(ValueError, match="decay"):
        analysis.Secant(still, decay=2.0)


# ---- logs and pages -------------------------------------------------------------------------------------------------


def logged_run(path, steps=12, epochs=2, every=4):
    torch.manual_seed(0)
    model, x, y = small_problem()
    model, x = model.float(), x.float()
    ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=2)))
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05, telemetry_every=every, telemetry_log=path)
    annealing = ak.EpsilonAnnealing(optimizer, hold=2, total=steps)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for step in range(steps):
        loss = optimizer.step(closure)
        annealing.step()
        if (step + 1) % (steps // epochs) == 0:
            optimizer.log(epoch=(step + 1) // (steps // epochs), loss=loss, accuracy=0.5, sharpness=math.nan,
                          landscape=analysis.loss_slice(model, functional.cross_entropy, (x, y), points=3))  # fmt: skip
    return model, optimizer


def test_log_holds_what_telemetry_says(tmp_path):
    path = tmp_path / "run.jsonl"
    model, optimizer = logged_run(path)
    log = analysis.read_log(path)
    assert [line["step"] for line in log["steps"]] == [1, 5, 9]
    assert log["steps"][-1]["tensors"] == optimizer.telemetry()
    assert all(isinstance(line["loss"], float) for line in log["steps"])
    assert [n["epoch"] for n in log["notes"]] == [1, 2] and log["notes"][0]["sharpness"] is None
    histograms = log["notes"][-1]["histograms"]
    assert [sum(h["counts"]) for h in histograms.values()] == [40, 24]
    assert log["run"]["tensors"][0]["grid"] == ak.quant.Uniform(bits=2).to_dict()
    twin = copy.deepcopy(optimizer)
    lines = len(path.read_text().splitlines())
    twin.step()
    twin.log(epoch=9)
    assert len(path.read_text().splitlines()) == lines  # a copy does not write
    assert model is not None


def test_log_of_a_resumed_run_and_of_a_killed_one(tmp_path):
    path = tmp_path / "run.jsonl"
    logged_run(path)
    logged_run(path, steps=8, epochs=1)
    log = analysis.read_log(path)
    assert [line["step"] for line in log["steps"]] == [1, 5] and len(log["notes"]) == 1
    with path.open("a") as stream:
        stream.write('{"kind": "step", "ste')
    assert analysis.read_log(path) == log
    broken = path.read_text().replace('"tensors": [{"step"', '"tensors": [{"stop"', 1)
    path.write_text(broken.replace('"fraction_infeasible"', '"fraction"', 1))
    with pytest.raises(ValueError, match="line 2: not a line of a telemetry log"):
        analysis.read_log(path)


def test_page_and_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.jsonl"
    logged_run(path)
    assert main(["analyze", str(path), "--plot", str(tmp_path / "out")]) == 0
    assert "2 notes" in capsys.readouterr().out
    page = (tmp_path / "out" / "index.html").read_text()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"loss.png", "eps.png", "feasible.png", "flips.png", "accuracy.png", "landscape.png", "index.html",
            "weights-000.png", "weights-001.png"} == names  # fmt: skip
    assert page.count("data:image/png;base64,") == len(names) - 1
    assert "http" not in page and "src='data" in page  # self-contained
    assert all((tmp_path / "out" / n).read_bytes()[:4] == b"\x89PNG" for n in names if n.endswith("png"))


def written_log(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"kind": "run", "optimizer": "ASkewSGD"}, *lines)))
    return path


def note(step, **more):
    histogram = {"levels": [-1.0, 1.0], "low": -3.0, "high": 3.0, "counts": [1, 2, 3]}
    return {"kind": "note", "step": step, "epoch": step, "histograms": {"a$b$": histogram}, **more}


def test_a_report_draws_what_it_can_in_time_and_says_what_it_left_out(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(analysis.report.__globals__, "MOST_PANELS", 5)
    notes = [note(i + 1, landscape={"t": [0.0, 1.0], "loss": [None, 1.0] if i else 5}) for i in range(7)]
    path = written_log(tmp_path / "run.jsonl", *notes)
    assert main(["analyze", str(path), "--plot", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "line 2: landscape" in said.out and "line 3" not in said.out and "5 epochs" in said.err
    assert "left out: weights: 5 of 7 epochs are drawn, evenly spread" in said.out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "5 of 7 epochs" in page and "line 2: landscape" in page
    assert "epoch 1'" in page and "epoch 7'" in page and page.count("class=frame") == 5


def test_a_log_comes_through_a_pipe(tmp_path, capsys):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    text = written_log(tmp_path / "run.jsonl", note(1)).read_text()
    writer = threading.Thread(target=path.write_text, args=(text,), daemon=True)
    writer.start()
    assert main(["analyze", str(path)]) == 0 and "1 notes" in capsys.readouterr().out


ODD_LINES = {
    "bins without a width": note(1, histograms={"w": {"levels": [], "low": 1.0, "high": 1.0, "counts": [1]}}),
    "no epoch": {k: v for k, v in note(1).items() if k != "epoch"},
    "text for counts": note(1, histograms={"w": {"levels": [0.0], "low": 0.0, "high": 1.0, "counts": "12"}}),
    "a list of histograms": note(1, histograms=[1]),
    "a step that is text": note("1"),
    "text for a number": {"kind": "step", "step": 1, "tensors": [
        {"name": "w", "numel": "4", "eps": 1.0, "lr": 0.1, "fraction_infeasible": 0.5, "flips": 1}]},
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD_LINES)
def test_a_line_of_another_shape_is_named_before_any_work(odd, tmp_path, capsys):
    path = written_log(tmp_path / "run.jsonl", ODD_LINES[odd], note(9))
    assert main(["analyze", str(path), "--plot", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "line 2: not a line of a telemetry log" in said.err and not said.out and not (tmp_path / "out").exists()


def test_command_with_bad_input(tmp_path, capsys):
    assert main(["analyze", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["analyze", str(tmp_path / "empty.jsonl")]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text(json.dumps({"op": "x"}) + "\n{}\n")
    assert main(["analyze", str(tmp_path / "other.jsonl"), "--plot", str(tmp_path / "out")]) == 2
    assert "line 1" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(OSError):
        ak.optim.ASkewSGD([nn.Parameter(torch.ones(2))], lr=0.1, telemetry_log=tmp_path / "no" / "run.jsonl")
