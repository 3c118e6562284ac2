"""Contract: ``Skewed(base)`` puts what any torch.optim.Optimizer does to the weights under the interval constraint.

1. With torch.optim.SGD it is ``ASkewSGD(skew="direction")`` to the rounding of one extra pass; at constraint_eps = 1 it
   is the base; groups without a grid are the base's, bit for bit.
2. Optimizers that the package knows nothing of (Muon, RAdam, Adafactor, one written here) train and end on levels.
3. Checkpoints, copies, schedulers, GradScaler, closures, sharpness-aware steps; scales freeze, copies are fresh.
4. What cannot be constrained is refused by name; an error leaves weights as they were.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels.optim import SAM, AlignedSAM, ASkewAdamW, ASkewSGD, Skewed, skewed
from askew_kernels.quant import Binary, QuantConfig, Ternary, Uniform, WeightQuantizer

GRID = Uniform(4)
X = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(3))


class SignMomentum(torch.optim.Optimizer):
    """A user's own: no eps, state made at its first step, and a count that is no tensor."""

    def __init__(self, params, lr=0.01, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["count"], state["average"] = 0, torch.zeros_like(p)
                state["count"] += 1
                state["average"].lerp_(p.grad, 1 - group["beta"])
                p.sub_(state["average"].sign(), alpha=group["lr"])


BASES = {
    "SGD": lambda g: torch.optim.SGD(g, lr=0.1),
    "momentum": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, weight_decay=0.01),
    "RAdam": lambda g: torch.optim.RAdam(g, lr=0.02),
    "Adafactor": lambda g: torch.optim.Adafactor(g, lr=0.05),
    "own": lambda g: SignMomentum(g, lr=0.01),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network(config=None, norm=True):
    torch.manual_seed(11)
    layers = [nn.Linear(16, 24), *([nn.BatchNorm1d(24)] if norm else []), nn.ReLU(), nn.Linear(24, 5)]
    return ak.quantize_(nn.Sequential(*layers), config or QuantConfig(GRID, "sawb"))


def loss_of(model, i):
    return (model(X[i % 64].to(model[0].weight.dtype)) - 1).pow(2).mean()


def train(model, optimizer, start, stop, annealing=None):
    for i in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()
        if annealing is not None:
            annealing.step()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# ---- 1. what it equals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("grid", [Uniform(4), Ternary(), Binary()], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"maximize": True},
], ids=str)  # fmt: skip
def test_of_sgd_is_askew_sgd(options, grid, frozen, generator):
    """Step by step from the same state, to the rounding of the pass that makes d.

    Both find the same constraint at w0, and v is a contraction of d. The base rounds w1 (u |w1|) and its step b (as
    the kernel does: 4u of m + g + decay w, twice with Nesterov); w1 - w0 and the division by lr add u |lr d| each, and
    w0 + lr v is rounded on both sides (2u |w|). All terms are below u (|w0| + lr (|m| + |g|)), times 16. (Weights
    outside the hull are another matter: the base decays them as they are, ASkewSGD once they are clamped.)
    """
    lr, theirs = 0.05, nn.Parameter(torch.rand(12, 32, generator=generator) - 0.5)
    ours = nn.Parameter(theirs.detach().clone())
    scale = torch.tensor(0.5 / grid.levels[-1]) if frozen else None
    keys = dict(grid=grid, scale=scale, freeze_scale="anneal" if frozen else "never", constraint_eps=0.3, alpha=0.7)
    optimizer = Skewed(torch.optim.SGD([ours], lr=lr, **options), **keys)
    twin = ASkewSGD([theirs], lr=lr, skew="direction", **options, **keys)
    for _ in range(12):
        theirs.grad = torch.randn(12, 32, generator=generator)
        ours.grad = theirs.grad.clone()
        before = theirs.detach().clone()
        size = before.abs() + lr * theirs.grad.abs()
        if (average := twin.state[theirs].get("momentum_buffer")) is not None:
            optimizer.state[ours]["momentum_buffer"].copy_(average)
            size += lr * average.abs()
        optimizer.step(), twin.step()
        assert ((ours - theirs).abs() <= 16 * 2**-24 * size).all()
        assert (theirs - before).abs().max() > 0.01
        assert torch.equal(ours._askew_quantizer.scale, theirs._askew_quantizer.scale)
        with torch.no_grad():
            ours.copy_(theirs)


@pytest.mark.parametrize("base", BASES)
def test_at_eps_1_it_is_the_base(base, generator):
    """20 steps in float64, in each a few roundings of numbers below 10: within 20 * 8 * 10 * 2^-53 < 1e-12, over lr."""
    ours = nn.Parameter(torch.randn(12, 8, generator=generator).double())
    theirs = nn.Parameter(ours.detach().clone())
    optimizer, twin = Skewed(BASES[base]([ours]), grid=GRID, freeze_scale="never"), BASES[base]([theirs])
    for _ in range(20):
        ours.grad = torch.randn(12, 8, generator=generator).double()
        theirs.grad = ours.grad.clone()
        optimizer.step(), twin.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("base", BASES)
def test_groups_without_a_grid_are_the_bases_alone(base, generator):
    weight, bias = (nn.Parameter(torch.randn(s, generator=generator)) for s in ((6, 8), (6,)))
    twin = nn.Parameter(bias.detach().clone())
    optimizer = Skewed(BASES[base]([{"params": [weight], "grid": GRID}, {"params": [bias]}]), constraint_eps=0.5)
    other = BASES[base]([twin])
    for _ in range(5):
        weight.grad, bias.grad = (torch.randn(p.shape, generator=generator) for p in (weight, bias))
        twin.grad = bias.grad.clone()
        optimizer.step(), other.step()
    assert torch.equal(bias, twin) and WeightQuantizer.of(weight).frozen


def test_pieces_and_plans_change_nothing(monkeypatch):
    results = []
    for piece, forget in ((2**24, False), (100, False), (2**24, True)):
        monkeypatch.setattr(skewed, "PIECE", piece)
        model = network()
        optimizer = Skewed(BASES["momentum"](ak.param_groups(model)))
        annealing = ak.EpsilonAnnealing(optimizer, hold=3, total=10)
        for i in range(8):
            if forget:
                optimizer._plans.clear()
            train(model, optimizer, i, i + 1, annealing)
        results.append([*model.parameters(), *model.buffers()])
    assert same(results[0], results[1]) and same(results[0], results[2])


# ---- 2. what it trains ----------------------------------------------------------------------------------------------


def on_levels(model):
    """Of each quantized weight: how far it is from its level, in scales; the largest."""
    return max(
        float(((m.weight - m.quantized_weight()).abs() / m.weight_scale.reshape(len(m.weight), -1)[:, :1]).max())
        for m in model.modules() if hasattr(m, "quantized_weight")
    )  # fmt: skip


def test_muon_trains_digits_at_ternary():
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.from_numpy(a) for a in datasets.load_digits(return_X_y=True))
    pixels = pixels.float() / 8 - 1
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 10, bias=False))
    ak.quantize_(model, QuantConfig(Ternary(), "mean"))
    optimizer = Skewed(torch.optim.Muon(ak.param_groups(model), lr=0.02, weight_decay=0.0), alpha=10.0)
    steps = 300
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 2e-5)
    annealing = ak.EpsilonAnnealing(optimizer, total=steps)
    for step in range(steps + 60):
        batch = torch.randint(1500, (128,))
        optimizer.zero_grad()
        functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()
        optimizer.step()
        if step < steps:
            schedule.step(), annealing.step()
    assert on_levels(model) < 0.01
    assert (model(pixels[1500:]).argmax(1) == labels[1500:]).float().mean() > 0.85


@pytest.mark.parametrize("base", BASES)
def test_bases_train_and_end_on_levels(base):
    model = network(QuantConfig(Ternary(), "mean"))
    optimizer = Skewed(BASES[base](ak.param_groups(model)))
    for group in optimizer.param_groups:
        group["alpha"] = 0.3 / group["lr"]  # the pull in one step, whatever the base calls its rate
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, 1e-4)
    annealing = ak.EpsilonAnnealing(optimizer, hold=20, total=100)
    before = sum(float(loss_of(model, i)) for i in range(8))
    for i in range(150):
        train(model, optimizer, i, i + 1)
        if i < 100:
            schedule.step(), annealing.step()
    assert sum(float(loss_of(model, i)) for i in range(8)) < 0.4 * before
    assert on_levels(model) < 0.02
    rows = optimizer.telemetry()
    assert [row["numel"] for row in rows] == [384, 120] and rows[0]["eps"] == pytest.approx(1.6e-5)


# ---- 3. surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_at", [0, 3, 8])  # before the first step, in the hold, after freezing
@pytest.mark.parametrize("base", BASES)
def test_resume(base, saved_at):
    def make():
        model = network()
        optimizer = Skewed(BASES[base](ak.param_groups(model)))
        return model, optimizer, ak.EpsilonAnnealing(optimizer, hold=5, total=12)

    whole, part = make(), make()
    train(*whole[:2], 0, saved_at, whole[2])
    buffer = io.BytesIO()
    torch.save([x.state_dict() for x in whole], buffer)
    buffer.seek(0)
    train(*whole[:2], saved_at, 12, whole[2])
    train(*part[:2], 30, 33, part[2])  # it was used for something else before
    for x, state in zip(part, torch.load(buffer, weights_only=True), strict=True):
        x.load_state_dict(state)
    train(*part[:2], saved_at, 12, part[2])
    assert same([*whole[0].parameters(), *whole[0].buffers()], [*part[0].parameters(), *part[0].buffers()])
    a, b = (x[1].state_dict() for x in (whole, part))
    assert a["askew_steps"] == b["askew_steps"] == 12
    assert all(a["state"][i].keys() == b["state"][i].keys() for i in a["state"])


def test_a_state_of_the_base_alone_is_taken():
    models = [network() for _ in range(2)]
    base = BASES["momentum"](ak.param_groups(models[0]))
    train(models[0], base, 0, 3)
    optimizer = Skewed(BASES["momentum"](ak.param_groups(models[1])), constraint_eps=0.4)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    assert optimizer.param_groups[0]["constraint_eps"] == 0.4
    buffers = [o.state[m[0].weight]["momentum_buffer"] for m, o in zip(models, (base, optimizer), strict=True)]
    assert torch.equal(*buffers)


class Counting(torch.optim.SGD):
    """Keeps a number beside what it keeps of parameters, as pytorch_optimizer's MADGRAD does."""

    @torch.no_grad()
    def step(self, closure=None):
        self.state["k"] = self.state.get("k", torch.tensor(0)) + 1
        return super().step(closure)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_that_is_no_parameters_comes_back(steps):
    model = network()
    optimizer = Skewed(Counting(ak.param_groups(model), lr=0.1, momentum=0.9))
    train(model, optimizer, 0, 1)
    optimizer.state["k"].fill_(steps)
    other = Skewed(Counting(ak.param_groups(network()), lr=0.1, momentum=0.9))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert int(other.state["k"]) == steps and len(other.state) == len(optimizer.state)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("base", BASES)
def test_copies(base, how):
    model = network()
    optimizer = Skewed(BASES[base](ak.param_groups(model)), constraint_eps=0.5, telemetry_every=3)
    train(model, optimizer, 0, 3)
    other, other_optimizer = how((model, optimizer))
    train(model, optimizer, 3, 6), train(other, other_optimizer, 3, 6)
    assert same(model.parameters(), other.parameters()) and other_optimizer.telemetry_every == 3


class Named(SignMomentum):
    """Its alpha, clamp, rho, eta and adaptive mean something else than the wrappers' do."""

    OWN: ClassVar = {"alpha": 0.9, "clamp": 7, "rho": 0.8, "eta": 0.6, "adaptive": "yes"}

    def __init__(self, params, lr=0.01):
        torch.optim.Optimizer.__init__(self, params, {"lr": lr, "beta": 0.9, **self.OWN})


@pytest.mark.parametrize("wrap, key", [
    (lambda base, number: Skewed(base, alpha=number), "alpha"), (lambda base, number: SAM(base, rho=number), "rho"),
], ids=["Skewed", "SAM"])  # fmt: skip
def test_a_base_that_is_wrapped_again_has_one_key(wrap, key):
    """As where a cell of a notebook runs twice: what the user sets or loads is what counts."""
    base = torch.optim.SGD(ak.param_groups(network()), lr=0.1)
    first = wrap(base, 0.5)
    second = wrap(base, 0.25)
    keys = [name for name in base.param_groups[0] if name.endswith(key)]
    assert keys == [key] and first.param_groups is second.param_groups
    saved = second.state_dict()
    for group in saved["param_groups"]:
        group[key] = 0.125
    second.load_state_dict(saved)
    assert second.param_groups[0][key] == 0.125


def test_keys_that_the_base_has_itself_stay_its_own():
    """What is asked of Skewed and SAM counts, in groups, schedules, telemetry, checkpoints and copies; the base's keys
    of the same names are untouched."""
    model, twin, plain = network(), network(), network()
    base = Named(ak.param_groups(model))
    base.param_groups[1]["constraint_alpha"] = 5.0  # a group's own goes first
    for group in base.param_groups:
        group["sam_rho"] = 0.0
    optimizer = SAM(Skewed(base, alpha=4.0, clamp=False), rho=0.5)
    other = Skewed(BASES["own"](ak.param_groups(twin)), alpha=4.0, clamp=False)
    other.param_groups[1]["alpha"] = 5.0
    pulls = [ak.EpsilonAnnealing(o, hold=1, total=6, clamp=False, keep_pull=True) for o in (optimizer, other)]
    for i in range(6):
        for o, net, pull in ((optimizer, model, pulls[0]), (other, twin, pulls[1])):
            o.zero_grad()
            loss_of(net, i).backward()
            if o is optimizer:
                o.first_step(zero_grad=True)
                loss_of(net, i).backward()
            o.step()
            for group in o.param_groups:
                group["lr"] *= 0.8
            pull.step()
    assert same(model.parameters(), twin.parameters())
    rows = [o.telemetry() for o in (optimizer.base_optimizer, other)]
    assert [r["alpha"] for r in rows[0]] == [r["alpha"] for r in rows[1]]
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 8))]})
    state = optimizer.state_dict()
    for o in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        groups = o.param_groups
        assert all({key: group[key] for key in Named.OWN} == Named.OWN for group in groups)
        assert [group["sam_rho"] for group in groups] == [*[0.0] * (len(groups) - 1), 0.5]
        assert groups[0]["constraint_alpha"] > 5 and groups[-1]["constraint_alpha"] == 4.0
        for group in groups:
            group["constraint_alpha"] = group["sam_rho"] = 9.0
        o.load_state_dict(copy.deepcopy(state))
        assert o.param_groups[0]["constraint_alpha"] == state["param_groups"][0]["constraint_alpha"]
        assert o.param_groups[1]["sam_rho"] == 0.0
    alone = Named(ak.param_groups(plain))
    for group in alone.param_groups:
        group["alpha"] = 0.7
    again = SAM(Skewed(Named(ak.param_groups(network())), alpha=4.0), rho=0.2)
    again.load_state_dict(alone.state_dict())  # of the base alone
    assert {(g["alpha"], g["constraint_alpha"], g["sam_rho"]) for g in again.param_groups} == {(0.7, 4.0, 0.2)}


def test_a_key_of_the_base_that_only_layers_can_say_is_refused():
    base = SignMomentum([nn.Parameter(torch.ones(4, 8))])
    base.defaults["scale"] = 0.5
    with pytest.raises(TypeError, match="^scale: SignMomentum has a group key of that name itself"):
        Skewed(base, grid=GRID)


def test_weights_without_a_layer_keep_their_scale_in_a_pickle():
    w = nn.Parameter(torch.randn(6, 8))
    optimizer = Skewed(torch.optim.SGD([{"params": [w], "grid": GRID}], lr=0.1), constraint_eps=0.5)
    w.grad = torch.randn(6, 8)
    optimizer.step()
    again = pickle.loads(pickle.dumps(optimizer)).param_groups[0]["params"][0]
    assert WeightQuantizer.of(again).frozen
    assert torch.equal(WeightQuantizer.of(again).scale, WeightQuantizer.of(w).scale)


def test_it_and_the_base_are_one():
    model = network()
    base = BASES["RAdam"](ak.param_groups(model))
    optimizer = Skewed(base, constraint_eps=0.5)
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    group = optimizer.param_groups[0]
    assert group["eps"] == 1e-8 and group["constraint_eps"] == 0.5  # RAdam's own, and the constraint's
    ak.EpsilonAnnealing(optimizer, total=10)
    assert group["eps"] == 1e-8 and group["constraint_eps"] == 1.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 8))], "grid": GRID})
    assert base.param_groups[-1]["constraint_eps"] == 0.5
    with pytest.raises(ValueError, match="^constraint_eps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 8))], "grid": GRID, "constraint_eps": 2.0})
    assert len(base.param_groups) == 3


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=str)
@pytest.mark.parametrize("base", ["momentum", "RAdam", "own"])
def test_at_lr_0_nothing_moves(base, lr):
    model = network()
    optimizer = Skewed(BASES[base](ak.param_groups(model)), constraint_eps=0.5)
    train(model, optimizer, 0, 2)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = lr if base == "RAdam" else float(lr)
    train(model, optimizer, 2, 4)
    assert same(model.parameters(), before)


def test_lr_as_a_tensor():
    models = [network() for _ in range(2)]
    for model, lr in zip(models, (0.125, torch.tensor(0.125)), strict=True):
        train(model, Skewed(torch.optim.Adam(ak.param_groups(model), lr=lr), constraint_eps=0.5), 0, 4)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forward", ["relaxed", "hard"])
@pytest.mark.parametrize("config", [("sawb",), ("mse",), ("absmax", "per_group", 8)], ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.4])
def test_forwards_see_the_new_weights(eps, config, forward):
    """Whatever the rule of the scale: the copy, scale and sums are those that are found by looking at the weights."""
    model = network(QuantConfig(GRID, *config, forward=forward))
    optimizer = Skewed(BASES["momentum"](ak.param_groups(model)), constraint_eps=eps)
    for i in range(4):
        train(model, optimizer, i, i + 1)
        model.eval()
        found = model(X[0])
        for layer in (model[0], model[3]):
            layer.quantizer.invalidate()
        assert torch.equal(model(X[0]), found)
        model.train()
    assert model[0].quantizer.frozen == (eps < 1)


def test_weights_in_another_order(generator):
    """Not contiguous: put back for the pass, which takes any dense layout."""
    runs = []
    for transposed in (False, True):
        values = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
        w = nn.Parameter(values.t().contiguous().t() if transposed else values)
        optimizer = Skewed(torch.optim.SGD([w], lr=0.1), grid=GRID, constraint_eps=0.4)
        for i in range(4):
            w.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
            optimizer.step()
        runs.append(w.detach())
    assert torch.equal(*runs)


def test_closure_and_parameters_without_gradients():
    model, other = network(), network()
    optimizer, twin = (Skewed(BASES["momentum"](ak.param_groups(m)), constraint_eps=0.5) for m in (model, other))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0 and calls == [True]
    train(other, twin, 0, 1)
    assert same(model.parameters(), other.parameters())
    before = model[0].weight.detach().clone()
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    for left in ([model[0].bias], []):  # without a weight that has a grid; without any
        for p in model.parameters():
            p.grad = torch.ones_like(p) if any(p is one for one in left) else None
        before = [p.detach().clone() for p in left]
        optimizer.step()
        assert not any(map(torch.equal, left, before))
    model[0].bias.grad = torch.ones_like(model[0].bias)
    optimizer.base_optimizer.register_step_post_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()


def test_grad_scaler():
    scaled, plain = network(), network()
    optimizers = [Skewed(BASES["momentum"](ak.param_groups(m)), constraint_eps=0.5) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(5):
        optimizers[0].zero_grad()
        scaler.scale(loss_of(scaled, i)).backward()
        if i == 2:
            scaled[0].weight.grad[0, 0] = math.inf
        before = [p.detach().clone() for p in scaled.parameters()]
        scaler.step(optimizers[0])
        scaler.update()
        if i == 2:
            assert same(before, scaled.parameters())
            plain(X[i])  # its batch statistics
        else:
            train(plain, optimizers[1], i, i + 1)
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_lr_schedulers_and_hooks():
    model = network()
    optimizer = Skewed(BASES["momentum"](ak.param_groups(model)))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 0, 1, schedule)
    assert calls == ["before", "after"] and optimizer.base_optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("base", ["momentum", "RAdam", "own"])
@pytest.mark.parametrize("kind", [SAM, AlignedSAM])
def test_sharpness_aware_steps_of_it(kind, base):
    """With rho = 0 (and align = 0) it is the optimizer itself, bit for bit; with a radius it trains and resumes."""
    models = [network(norm=False) for _ in range(3)]
    nothing = {"rho": 0.0, **({"align": 0.0} if kind is AlignedSAM else {})}
    plain, zero, some = (Skewed(BASES[base](ak.param_groups(m)), constraint_eps=0.5) for m in models)
    zero, some = kind(zero, model=models[1], **nothing), kind(some, model=models[2], rho=0.05)
    for i in range(5):
        train(models[0], plain, i, i + 1)
        for model, optimizer in zip(models[1:], (zero, some), strict=True):

            def closure(model=model, optimizer=optimizer, i=i):
                optimizer.zero_grad()
                loss = loss_of(model, i)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert same(models[0].parameters(), models[1].parameters())
    assert not same(models[0].parameters(), models[2].parameters())
    assert all(p.isfinite().all() for p in models[2].parameters())
    again = copy.deepcopy(some.state_dict())
    some.load_state_dict(again)
    assert some.base_optimizer.steps == 5 and some.telemetry() == {}


def test_compiled_steps():
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        optimizer = Skewed(BASES["momentum"](ak.param_groups(model)), constraint_eps=0.5)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            step()
        runs.append(list(model.parameters()))
    assert same(*runs)


# ---- 4. what is refused ---------------------------------------------------------------------------------------------


def test_what_cannot_be_constrained():
    w = [nn.Parameter(torch.ones(4, 8))]
    for make, words in (
        (lambda: Skewed(torch.optim.SGD), "base_optimizer: expected a torch.optim.Optimizer"),
        (lambda: Skewed(ASkewSGD(w, lr=0.1)), "base_optimizer: .*ASkewSGD, which has its own"),
        (lambda: Skewed(Skewed(torch.optim.SGD(w, lr=0.1))), "base_optimizer: .*Skewed, which has its own"),
        (lambda: Skewed(ASkewAdamW(w, lr=0.1)), "base_optimizer: .*ASkewAdamW"),
        (lambda: Skewed(SAM(torch.optim.SGD(w, lr=0.1))), r"base_optimizer: .*put it around: SAM\(Skewed"),
        (lambda: Skewed(torch.optim.LBFGS(w)), "base_optimizer: .*LBFGS, which evaluates a closure"),
        (lambda: Skewed(torch.optim.SGD(w, lr=0.1), eps=0.3), "eps: unknown argument"),
    ):
        with pytest.raises(TypeError, match=f"^{words}"):
            make()
    for options, words in (
        (dict(constraint_eps=0.0), "constraint_eps"), (dict(alpha=-1.0), "alpha"), (dict(scale="none"), "scale"),
        (dict(freeze_scale="later"), "freeze_scale"), (dict(telemetry_every=-1), "telemetry_every"),
    ):  # fmt: skip
        base = torch.optim.SGD(w, lr=0.1)
        with pytest.raises(ValueError, match=f"^{words}"):
            Skewed(base, grid=GRID, **options)
        assert "constraint_eps" not in base.param_groups[0] and "constraint_eps" not in base.defaults

    class NoRate(SignMomentum):
        def __init__(self, params):
            torch.optim.Optimizer.__init__(self, params, {"rate": 0.1})

    with pytest.raises(ValueError, match="^lr: expected in every group"):
        Skewed(NoRate(w), grid=GRID)
    with pytest.warns(UserWarning, match=r"ak\.param_groups"):
        Skewed(torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="^optimizer: SGD has no constraint; see ak.optim.Skewed"):
        ak.EpsilonAnnealing(torch.optim.SGD(ak.param_groups(network()), lr=0.1), total=10)


@pytest.mark.parametrize("where", ["base", "pass", "rate"])
def test_errors_leave_the_weights(where, monkeypatch):
    model = network(QuantConfig(GRID, "sawb", forward="hard"))
    optimizer = Skewed(BASES["momentum"](ak.param_groups(model)), constraint_eps=0.5)
    train(model, optimizer, 0, 2)
    weights = [model[0].weight, model[3].weight]
    before, out = [w.detach().clone() for w in weights], model.eval()(X[0])
    if where == "base":
        step = optimizer.base_optimizer.step

        def broken():
            step()
            raise RuntimeError("broken")

        monkeypatch.setattr(optimizer.base_optimizer, "step", broken)
    elif where == "pass":
        monkeypatch.setattr(skewed.ops, "run_skew_direction", lambda *_, **__: (_ for _ in ()).throw(RuntimeError()))
    else:
        optimizer.param_groups[0]["constraint_eps"] = 7.0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert same(weights, before)
    with torch.no_grad():
        for old, new in zip((model[0], model[3]), weights, strict=True):
            assert torch.equal(old.quantized_weight(), ak.ops.fake_quantize(new, old.weight_scale, GRID))
    monkeypatch.undo()
    assert out.shape == (6, 5) and not optimizer.saved_weights


class Nested(torch.optim.SGD):
    """Saves itself another way, as pytorch_optimizer's Lookahead does."""

    def state_dict(self):
        return {"slow": {}, "base_optimizer": super().state_dict()}


def test_a_state_that_has_no_place_for_scales_is_told():
    model = network(QuantConfig(GRID, "sawb", forward="hard"))
    optimizer = Skewed(Nested(ak.param_groups(model), lr=0.1))
    train(model, optimizer, 0, 1)
    with pytest.raises(
        NotImplementedError, match="state_dict: Nested's holds slow, base_optimizer; expected param_gro"
    ):
        optimizer.state_dict()
