"""Contract: the mixed-precision search chooses what it says, within its budget, and its policies carry over.

1. Mixed layers compute the mixture of their candidates; one call makes them, another removes them without a trace.
2. Costs are exact: MACs against counting, bytes against what ``pack_`` makes, expectations against enumeration.
3. The knapsack is the optimum (against enumeration) and never exceeds its limit; budgets out of reach name the reach.
   What the strongest candidates leave of a budget is spent, as well as enumeration can.
4. Layers that share a weight are one weight: in costs, in the choice, in what a policy may say of them. Batches in any
   container count by their samples; every generator is seeded and put back; what is left out is said by name.
5. A search moves its bits to where they matter, meets every kind of budget, is reproducible, resumes to the same end,
   leaves model and generators alone, and is the same in two processes (test_search_distributed.py).
6. Policies survive JSON, apply by name, pattern and role, and what does not fit is rejected by name.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import json
import math
import random
import re
import warnings

import numpy as np
import pytest
import torch
from networks import Language
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import askew_kernels as ak
from askew_kernels import ops, search
from askew_kernels.__main__ import main
from askew_kernels.nn.kinds import TransposedLinear
from askew_kernels.nn.layers import quantized_input
from askew_kernels.quant import Binary, Uniform
from askew_kernels.search import Budget, BudgetError, LayerPolicy, Policy, PolicyError
from askew_kernels.search.baselines import _by_errors
from askew_kernels.search.policy import kind_of, weight_grid

pytest.importorskip("scipy")


def mlp(width=12, depth=2, inputs=6, classes=3):
    layers = [nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6, dilation=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def data(n=64, inputs=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=g)
    return x, (x @ torch.randn(inputs, classes, generator=g)).argmax(1)


def loader(batch=16, **options):
    x, y = data(**options)
    return list(zip(x.split(batch), y.split(batch), strict=True))


def quick(model=None, batches=None, loss=functional.cross_entropy, **options):
    torch.manual_seed(1)
    settings = {"steps": 12, "budget": Budget(average_bits=3.0), "progress": False}
    return search.search_policy(model or mlp(), batches or loader(), loss, **{**settings, **options})


# ---- mixed layers ---------------------------------------------------------------------------------------------------


def test_mixed_layers_compute_their_mixture():
    torch.manual_seed(0)
    model = cnn()
    weights = [p for p in model.parameters()]
    x = torch.randn(4, 2, 9, 9)
    search.mix_(model, (1, 2, 4), (4, None), signed={"2": False})
    layers = search.mixed_layers(model)
    assert list(layers) == ["0", "2", "5"] and all(isinstance(m, (nn.Linear, nn.Conv2d)) for m in layers.values())
    with torch.no_grad():
        for m in layers.values():
            m.weight_strengths.copy_(torch.randn(3))
            m.act_strengths.copy_(torch.randn(2))
            m.temperature = 0.5
    layer = layers["0"]
    p, q = torch.softmax(layer.weight_strengths / 0.5, 0), torch.softmax(layer.act_strengths / 0.5, 0)
    mixed = sum(
        p[k] * ops.fake_quantize(layer.weight, ak.quant.compute_scale(layer.weight, g, ak.quant.default_rule(g)), g)
        for k, g in enumerate((Binary(), Uniform(2), Uniform(4)))
    )
    torch.testing.assert_close(layer.mixed_weight(), mixed)
    inputs = q[0] * quantized_input(x, Uniform(4), 3) + q[1] * x
    torch.testing.assert_close(layer.mixed_input(x), inputs)
    torch.testing.assert_close(layer(x), functional.conv2d(inputs, mixed, layer.bias, 2, 1))
    assert layers["2"].act_grids[0] == Uniform(4, signed=False)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    search.unmix_(model)
    assert [type(m) for m in model] == [type(m) for m in cnn()]
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


def test_mixed_layers_with_learned_scales_and_shared_modules():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    search.mix_(model, (2, 4), learned=True)
    assert model[0] is model[2] and model[0].weight_scales.shape == (2, 4)
    model(torch.randn(5, 4)).square().sum().backward()
    assert model[0].weight_scales.grad.abs().sum() > 0
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    search.unmix_(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear


def test_encoders_do_not_look_past_their_mixtures():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)), torch.randn(2, 5, 8)
    before = vars(model[0]).copy()
    search.mix_(model, (2,))
    with torch.no_grad():  # where torch takes a path of its own in eval mode
        torch.testing.assert_close(model.eval()(x), model.train()(x))
    search.unmix_(model)
    assert vars(model[0]).keys() == before.keys() and model[0].activation_relu_or_gelu == 1


class Gained(nn.Module):
    """Its forward reads what it has put on a layer, which stands under two names."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.layer.gain = 2.0
        self.layer.scale = nn.Parameter(torch.ones(6))
        self.again = self.layer

    def forward(self, x):
        return self.last(self.again(self.layer(x)) * self.layer.scale * self.again.gain)


def test_what_hangs_on_layers_goes_on_in_mixtures_and_back():
    torch.manual_seed(0)
    model, (x, y), seen = Gained().eval(), data(8), []
    handle = model.layer.register_forward_hook(lambda m, args, out: (seen.append(type(m)), out.clamp(-1, 1))[1])
    before, names, known = model(x), list(model.state_dict()), set(vars(model.layer))
    seen.clear()
    search.mix_(model, (2, 8))
    model(x)
    assert seen == [search.MixedLinear] * 2 and model.again is model.layer and not model.layer.training
    search.unmix_(model)
    assert torch.equal(model(x), before) and list(model.state_dict()) == names and set(vars(model.layer)) == known
    seen.clear()
    quick(model, [(x, y)], weight_bits=(2, 4), steps=2)
    assert seen.count(search.MixedLinear) == 2 * 2 * 2  # two calls in each of two forwards of a step
    handle.remove()
    seen.clear()
    model(x)
    assert not seen
    model.last.forward = lambda x: x
    with pytest.raises(ValueError, match="last: its forward was replaced on the instance"):
        search.mix_(model)
    assert not search.mixed_layers(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight_bits": ()}, "weight_bits: expected at least one candidate"),
        ({"weight_bits": (2, 9)}, "weight_bits: expected 1 to 8, got 9"),
        ({"weight_bits": (2, None)}, "weight_bits: expected 1 to 8, got None"),
        ({"act_bits": (1,)}, "act_bits: expected 2 to 8 or None, got 1"),
        ({"act_bits": ()}, "act_bits: expected at least one"),
        ({"weight_bits": 4}, "weight_bits: expected a list of bits, got 4"),
        ({"act_bits": None}, "act_bits: expected a list of bits, got None"),
        ({"weight_bits": (2.0, 3)}, "weight_bits: expected 1 to 8, got 2.0"),
        ({"filter_fn": lambda m, n: False}, "no linear or conv layer to quantize passes filter_fn"),
    ],
)
def test_bad_candidates(options, match):
    model = mlp()
    with pytest.raises(ValueError, match=match):
        search.mix_(model, **options)
    assert not search.mixed_layers(model)
    with pytest.raises(ValueError, match=match):
        quick(**options)


# ---- costs ----------------------------------------------------------------------------------------------------------


def brute_force_macs(layer, x):
    """Products that a convolution or a linear layer makes, counted by convolving ones and looking at nothing else."""
    if isinstance(layer, nn.Linear):
        return math.prod(x.shape[:-1]) * layer.in_features * layer.out_features
    y = layer(x)
    n = 0
    for _ in itertools.product(*map(range, y.shape)):
        n += layer.weight[0].numel()
    return n


def test_macs_and_bits_are_exact():
    model = cnn()
    x = torch.randn(3, 2, 9, 9)
    profile = search.trace(model, x)
    given = x
    for name, layer in model.named_children():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            assert profile.layers[name].macs == brute_force_macs(layer, given) / 3
        given = layer(given)
    assert [p.kind for p in profile.layers.values()] == ["conv2d", "depthwise", "linear"]
    assert [p.signed for p in profile.layers.values()] == [True, False, False]
    tokens = search.trace(nn.Sequential(nn.Linear(4, 5)), torch.randn(2, 7, 4))
    assert tokens.layers["0"].macs == 7 * 4 * 5
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_bytes_are_what_pack_makes(bits):
    torch.manual_seed(0)
    model = cnn()
    profile = search.trace(model, torch.randn(1, 2, 9, 9))
    grid = weight_grid(bits)
    ak.quantize_(model, ak.QuantConfig(weight=grid, scale=ak.quant.default_rule(grid)))
    ak.pack_(ak.hard_quantize_(model))
    for name, layer in ak.nn.packed_layers(model).items():
        assert profile.layers[name].packed_bytes(bits) == layer.packed_bytes


def test_expected_costs_are_the_mean_over_all_policies():
    model = mlp(width=5, depth=1)
    x, _ = data(4)
    for kind, limit in (("average_bits", 4.0), ("bitops", 5e3), ("bytes", 60), ("latency", 3.0)):
        latency = lambda p, w, a: p.macs * w / 100  # noqa: E731
        space = search.Space(model, x, (2, 4, 8), (4, None), Budget(**{kind: limit}), latency=latency)
        g = torch.Generator().manual_seed(3)
        p = {n: (torch.softmax(torch.randn(3, generator=g), 0), torch.softmax(torch.randn(2, generator=g), 0))
             for n in space.names}  # fmt: skip
        mean = 0.0
        options = list(itertools.product(range(3), range(2)))
        for chosen in itertools.product(options, repeat=len(space.names)):
            choice = dict(zip(space.names, chosen, strict=True))
            weight = math.prod(float(p[n][0][i] * p[n][1][j]) for n, (i, j) in choice.items())
            mean += weight * space.cost.of(choice)
        assert float(space.cost.expected(p)) == pytest.approx(mean, rel=1e-5)
    bitops = search.Space(model, x, (2, 4, 8), (4, None), Budget(bitops=5e3)).cost
    assert bitops.of({"0": (0, 0), "2": (2, 1)}) == 6 * 5 * 2 * 4 + 5 * 3 * 8 * 32


def test_layers_left_out_and_hooks_add_to_bit_operations_only():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.Linear(6, 4), Double(), nn.Linear(4, 3))
    x, _ = data(8)
    profile = search.trace(model, x, ["0"], hooks={Double: lambda m, inputs, y: y.numel()})
    assert list(profile.layers) == ["0"] and profile.other_macs == 4 * 3 + 4
    with pytest.raises(ValueError, match="reaches no layer"):
        search.trace(nn.Sequential(nn.ReLU()), x)
    with pytest.raises(ValueError, match="empty batch"):
        search.trace(model, x[:0])


def test_latency_table():
    model = mlp(width=4, depth=1)
    x, _ = data(4)
    table = search.latency_table(model, x, (2, 8), seconds=0.001)
    assert set(table) == {"0", "2"} and all(v > 0 for t in table.values() for v in t.values())
    again = json.loads(json.dumps(table))
    limit = sum(max(t.values()) for t in table.values())
    policy = quick(model, latency=again, weight_bits=(2, 8), budget=Budget(latency=limit), steps=2)
    assert policy.report["chosen"]["latency"] <= limit
    with pytest.raises(ValueError, match="latency: has no entry for 0 at 4 bits"):
        quick(model, latency=again, weight_bits=(2, 4), budget=Budget(latency=limit))
    with pytest.raises(ValueError, match="latency: expected a table"):
        quick(model, budget=Budget(latency=limit))


# ---- the knapsack and budgets ---------------------------------------------------------------------------------------


def test_knapsack_is_the_optimum():
    g = torch.Generator().manual_seed(0)
    for trial in range(8):
        tables = {f"l{i}": torch.randint(1, 50, (3, 2), generator=g).double() for i in range(3)}
        cost = search.cost.Cost("bytes", tables)
        values = {n: torch.randn(3, 2, generator=g, dtype=torch.float64) for n in tables}
        low, high = cost.range
        limit = low + (high - low) * (trial / 7)
        choice = search.knapsack(values, cost, limit)
        best = max(
            (sum(float(values[n][c]) for n, c in zip(tables, chosen, strict=True))
             for chosen in itertools.product(itertools.product(range(3), range(2)), repeat=3)
             if cost.of(dict(zip(tables, chosen, strict=True))) <= limit),
        )  # fmt: skip
        assert cost.of(choice) <= limit
        assert sum(float(values[n][c]) for n, c in choice.items()) == pytest.approx(best, abs=1e-7)
    with pytest.raises(BudgetError, match="below the least"):
        search.knapsack(values, cost, low - 1)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "exactly one of average_bits, bitops, bytes, latency, got none"),
        ({"bitops": 3, "bytes": 4}, "got bitops, bytes"),
        ({"bytes": -1}, "bytes: expected a number > 0, got -1"),
        ({"average_bits": math.nan}, "expected a number > 0"),
        ({"average_bits": True}, "expected a number > 0"),
    ],
)
def test_budgets_are_one_number(given, match):
    with pytest.raises(BudgetError, match=match):
        Budget(**given)


def test_budget_out_of_reach_says_the_reach():
    for limit in (1.9, 8.1):
        with pytest.raises(
            BudgetError, match=rf"average_bits={limit} is outside what the candidates reach, from 2 to 8"
        ):
            quick(budget=Budget(average_bits=limit))
    with pytest.raises(BudgetError, match="bytes=3 is outside"):
        search.uniform_policy(mlp(), data()[0], budget=Budget(bytes=3))


@pytest.mark.parametrize("kind", ["average_bits", "bitops", "bytes"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_every_method_keeps_every_budget(kind, share):
    torch.manual_seed(0)
    model, (x, y) = mlp(), data()
    options = {"weight_bits": (1, 2, 4, 8), "act_bits": (4, 8, None)}
    low, high = search.cost.cost_of(kind, search.trace(model, x), (1, 2, 4, 8), (4, 8, None)).range
    budget = Budget(**{kind: low + share * (high - low)})
    made = [
        quick(model, budget=budget, steps=2, **options),
        search.uniform_policy(model, x, budget=budget, **options),
        search.random_policy(model, x, budget=budget, **options),
        search.sensitivity_policy(model, x, budget=budget, **options),
        search.hessian_policy(model, (x, y), functional.cross_entropy, samples=2, budget=budget, **options),
    ]
    for policy in made:
        assert policy.report["chosen"][kind] <= budget.limit
        assert search.policy_costs(policy, search.trace(model, x))[kind] == pytest.approx(policy.report["chosen"][kind])
        ak.quantize_(copy.deepcopy(model), policy)(x)
    if share == 1.0:
        assert set(made[3].weight_bits.values()) == {8}  # errors fall with every bit
    assert made[2] == search.random_policy(model, x, budget=budget, **options)


# ---- the search -----------------------------------------------------------------------------------------------------


STEPS = {"joint": 60, "alternating": 120}


class Delicate(nn.Module):
    """A class is the sign of x, to which the small first path matters not at all and the second is everything."""

    def __init__(self):
        super().__init__()
        self.idle, self.needed = nn.Linear(8, 24), nn.Linear(8, 24)
        self.last = nn.Linear(48, 1)

    def forward(self, x):
        return self.last(torch.cat([0 * self.idle(x), self.needed(x)], 1))


@pytest.mark.parametrize("method", ["asga", "plain"])
@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_search_moves_bits_to_where_they_matter(method, schedule):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=g)
    y = x @ torch.randn(8, 1, generator=g)
    model = Delicate()
    fit = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        fit.zero_grad()
        functional.mse_loss(model(x), y).backward()
        fit.step()
    policy = search.search_policy(
        model, [(x, y)], functional.mse_loss, weight_bits=(2, 8), budget=Budget(average_bits=4.9),
        steps=STEPS[schedule], lr=1e-4,
        strength_lr=0.1, method=method, schedule=schedule, progress=False,
    )  # fmt: skip
    assert policy.weight_bits["needed"] == 8 and policy.weight_bits["idle"] == 2
    report = policy.report
    assert report["expected"]["average_bits"] == pytest.approx(4.9, abs=0.8)  # drawn to the budget from 5
    assert len(report["history"]) and ("surrogate_gap" in report) == (method == "asga")


def test_search_is_reproducible_and_leaves_everything_alone():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    x, y = data()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16, shuffle=True)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    rows = [[], []]
    policies = [
        search.search_policy(model, batches, functional.cross_entropy, budget=Budget(average_bits=3.0), steps=8,
                             seed=5, progress=into.append)
        for into in rows
    ]  # fmt: skip
    assert policies[0] == policies[1] and rows[0] == rows[1] and len(rows[0]) == 8
    assert policies[0].report["probabilities"] == policies[1].report["probabilities"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    other = search.search_policy(model, batches, functional.cross_entropy, budget=Budget(average_bits=3.0), steps=8,
                                 seed=6, progress=False)  # fmt: skip
    assert other.report["probabilities"] != policies[0].report["probabilities"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_an_interrupted_search_resumes_to_the_same_end(tmp_path, schedule):
    x, y = data()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 12, shuffle=True)
    path = tmp_path / "search.pt"
    options = {"steps": 11, "schedule": schedule, "checkpoint_every": 3, "act_bits": (4, None)}
    whole = quick(model, batches, **options)

    def stop(row):
        if row["step"] == 8:
            raise Stopped

    with pytest.raises(Stopped):
        quick(model, batches, checkpoint=path, **{**options, "progress": stop})
    content = path.read_bytes()
    assert torch.load(path, weights_only=True)["step"] == 6
    assert [p.name for p in tmp_path.iterdir()] == ["search.pt"]
    seen = []
    resumed = quick(model, batches, checkpoint=path, **{**options, "progress": lambda r: seen.append(r["step"])})
    assert seen == [7, 8, 9, 10, 11]
    assert resumed == whole and resumed.report["probabilities"] == whole.report["probabilities"]
    assert quick(model, batches, checkpoint=path, **options) == whole  # finished: nothing is done again
    with pytest.raises(ValueError, match="of another search .steps differ."):
        quick(model, batches, checkpoint=path, **{**options, "steps": 12})
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a checkpoint of a search"):
        quick(model, batches, checkpoint=path, **options)


def test_a_failing_step_leaves_the_last_checkpoint_whole(tmp_path):
    path = tmp_path / "search.pt"
    calls = []

    def loss(output, y):
        calls.append(1)
        return functional.cross_entropy(output, y) * (math.nan if len(calls) > 9 else 1)

    with pytest.raises(ValueError, match="loss: expected a finite number, got nan at step 5"):
        quick(loss=loss, checkpoint=path, checkpoint_every=2)  # two losses a step
    assert torch.load(path, weights_only=True)["step"] == 4


def test_loaders_that_end():
    with pytest.raises(ValueError, match="loader: yielded no batch"):
        quick(batches=iter(()))
    with pytest.raises(ValueError, match="loader: exhausted after 4 batches"):
        quick(batches=iter(loader()))
    with pytest.raises(ValueError, match=r"loader: expected batches .x, y., got a Tensor"):
        quick(batches=[torch.ones(3, 6)])
    assert quick(batches=iter(loader()), steps=4).layers  # enough for what is asked


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "magic"}, "method: expected one of asga, plain"),
        ({"schedule": "never"}, "schedule: expected one of"),
        ({"steps": 0}, "steps: expected an int >= 1"),
        ({"lr": -1.0}, "lr: expected a finite number >= 0"),
        ({"temperature": (1.0, 0.0)}, "temperature"),
        ({"rho_max": 0.0}, "rho_max: expected at least rho_min"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"loss": lambda o, y: o}, "loss_fn: expected a scalar tensor"),
        ({"loss": lambda o, y: functional.cross_entropy(o.detach(), y)}, "loss_fn: does not depend on the model"),
        ({"loss": lambda o, y: (o.argmax(1) - y).float().mean()}, "loss_fn: does not depend on the model"),
        ({"temperature": 1.0}, "temperature: expected .first, last., both > 0, got 1.0"),
        ({"temperature": ("a", "b")}, "temperature: expected .first, last."),
        ({"seed": "x"}, "seed: expected an int"),
        ({"seed": 1.5}, "seed: expected an int"),
        ({"batches": 5}, "loader: expected batches .x, y., got 5"),
        ({"hooks": 5}, "hooks: expected .type: f"),
        ({"kinds": ()}, "kinds: expected names out of .*, got none"),
        ({"kinds": 5}, "kinds: expected names out of .*, got 5"),
        ({"model": mlp().half(), "batches": [(torch.ones(4, 6).half(), torch.ones(4).long())]}, "0.weight is float16"),
        ({"model": nn.Sequential(nn.ReLU())}, "no linear or conv layer to quantize"),
        ({"model": nn.Linear(6, 3)}, "is itself a layer"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        quick(**options)


@pytest.mark.parametrize("where", ["folder", "missing/file", "/dev/null"])
def test_a_checkpoint_that_cannot_be_written_is_said_before_any_step(where, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="checkpoint: cannot be written"):
        quick(loss=None, checkpoint=tmp_path / where)


def test_a_search_goes_on_only_under_the_costs_and_with_the_model_that_it_began_with(tmp_path):
    path = tmp_path / "search.pt"
    options = {"steps": 2, "budget": Budget(latency=20.0), "checkpoint": path}
    quick(latency=lambda p, w, a: float(w), **options)
    with pytest.raises(ValueError, match=r"search.pt: of another search .costs differ."):
        quick(latency=lambda p, w, a: w + 1.0, **options)
    with pytest.raises(ValueError, match=r"search.pt: of another search .model differ."):
        quick(mlp(width=13), latency=lambda p, w, a: float(w), **options)
    other = {"steps": 2, "budget": Budget(bitops=5e4), "checkpoint": tmp_path / "other.pt"}
    quick(**other)
    with pytest.raises(ValueError, match="costs differ"):
        quick(hooks={nn.ReLU: lambda m, x, y: 10.0}, **other)


def test_a_model_that_keeps_an_activation_is_searched():
    torch.manual_seed(0)
    model = mlp()
    model.kept = model(data()[0])
    assert quick(model, steps=1).layers and model.kept.requires_grad


def test_without_a_budget_no_baseline_saves_bits():
    model, (x, y) = mlp(), data()
    no_curvature = search.hessian_policy(model, (x, y), lambda output, y: output.sum(), samples=1)
    for policy in (no_curvature, search.sensitivity_policy(model, x)):
        assert set(policy.weight_bits.values()) == {8}


def test_limits_that_an_error_names_can_be_asked_for():
    x = torch.randn(2, 1237)
    model = nn.Sequential(nn.Linear(1237, 999), nn.ReLU(), nn.Linear(999, 1))
    for kind in ("bytes", "bitops", "latency"):
        given = {"latency": lambda p, w, a: w / 3} if kind == "latency" else {}
        for limit in (1e-3, 1e30):
            with pytest.raises(BudgetError) as problem:
                search.uniform_policy(model, x, budget=Budget(**{kind: limit}), **given)
            low, high = re.search(r"from (\S+) to (\S+)$", str(problem.value)).groups()
            assert search.uniform_policy(model, x, budget=Budget(**{kind: float(low)}), **given).layers
            assert search.uniform_policy(model, x, budget=Budget(**{kind: float(high)}), **given).layers
    falling = {"latency": lambda p, w, a: w if p.name == "0" else 20 - 2 * w}
    with pytest.raises(BudgetError, match="budget: 9 is below every uniform policy's cost, from 12 on"):
        search.uniform_policy(model, x, budget=Budget(latency=9), **falling)
    assert json.dumps(Budget(bytes=np.int64(268)).limit) == "268" and Budget(latency=np.float32(0.5)).limit == 0.5


def test_without_a_budget_the_weight_of_the_cost_decides():
    cheap, dear = (
        quick(budget=None, cost_weight=w, steps=30, strength_lr=0.3, weight_bits=(2, 8)) for w in (50.0, 0.0)
    )
    assert set(cheap.weight_bits.values()) == {2}
    assert cheap.report["chosen"]["bitops"] < dear.report["chosen"]["bitops"]


# ---- what is left of a budget ---------------------------------------------------------------------------------------


def logs_up_to(t, i, j):
    """log of the probability of all pairs up to (i, j)."""
    return float(torch.logsumexp(t[: i + 1, : j + 1].reshape(-1), 0))


def space_of(model, x, kind, share, weight_bits, act_bits):
    low, high = search.cost.cost_of(kind, search.trace(model, x), weight_bits, act_bits, lambda p, w, a: 3 + w).range
    budget = Budget(**{kind: low + share * (high - low)})
    return search.Space(model, x, weight_bits, act_bits, budget, latency=lambda p, w, a: 3 + w)


def upwards(space, name, pair):
    """Pairs with more bits that cost more, or more bits for the weight at any price."""
    t = space.cost.tables[name]
    return [(i, j) for i, j in itertools.product(*map(range, t.shape))
            if i >= pair[0] and (j == pair[1] or (j > pair[1] and t[i, j] > t[i, pair[1]]))]  # fmt: skip


@pytest.mark.parametrize("kind", ["average_bits", "bitops", "bytes", "latency"])
def test_budgets_are_spent_as_well_as_enumeration_can(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    x, g = torch.randn(4, 6), torch.Generator().manual_seed(1)
    for share in (0.0, 0.1, 0.35, 0.6, 0.9, 1.0):
        space = space_of(model, x, kind, share, (2, 3, 8), (4, 8))
        limit = space.budget.limit
        for _ in range(3):
            logits = {n: (3 * torch.randn(3, generator=g), torch.randn(2, generator=g)) for n in space.names}
            values = {n: w.double().log_softmax(0)[:, None] + a.double().log_softmax(0) for n, (w, a) in logits.items()}
            chosen = space.choose(values)
            assert space.cost.of(chosen) <= limit

            def best_of(options, score, space=space, limit=limit):
                every = (dict(zip(options, c, strict=True)) for c in itertools.product(*options.values()))
                return max((c for c in every if space.cost.of(c) <= limit), key=score)

            def likelihood(c, values=values):
                return sum(float(values[n][p]) for n, p in c.items())

            everything = {n: list(itertools.product(range(3), range(2))) for n in space.names}
            first = best_of(everything, likelihood)  # the strongest within the budget
            assert all(p[0] >= q[0] and p[1] >= q[1] for p, q in zip(chosen.values(), first.values(), strict=True))

            def enough(c, values=values):
                return sum(logs_up_to(values[n], *p) for n, p in c.items())

            most = best_of({n: upwards(space, n, p) for n, p in first.items()}, enough)
            assert enough(chosen) == pytest.approx(enough(most), abs=1e-4)
            for name, pair in chosen.items():  # nothing that could still be had
                for more in upwards(space, name, pair):
                    assert more == pair or space.cost.of({**chosen, name: more}) > limit


@pytest.mark.parametrize("kind", ["average_bits", "bitops", "bytes"])
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_no_search_leaves_budget_that_a_layer_could_use(kind, share):
    torch.manual_seed(0)
    candidates, x = (1, 2, 4, 8), data()[0]
    model = mlp(depth=4)
    profile = search.trace(model, x)
    low, high = search.cost.cost_of(kind, profile, candidates, (None,)).range
    budget = Budget(**{kind: low + share * (high - low)})
    options = {"weight_bits": candidates, "budget": budget}
    made = {
        "asga": quick(model, steps=2, **options),
        "plain": quick(model, steps=2, method="plain", **options),
        "random": search.random_policy(model, x, **options),
        "hessian": search.hessian_policy(model, data(), lambda a, b: -a.square().mean(), samples=1, **options),
    }  # a concave loss has traces below 0, and so says nothing of where bits matter
    for name, policy in made.items():
        assert policy.report["chosen"][kind] <= budget.limit
        for i, layer in enumerate(policy.layers):
            for more in [b for b in candidates if b > layer.weight_bits]:
                raised = list(policy.layers)
                raised[i] = dataclasses.replace(layer, weight_bits=more)
                assert search.policy_costs(Policy(tuple(raised)), profile)[kind] > budget.limit, (name, layer.name)
    report = made["asga"].report
    strongest = {n: candidates[int(torch.tensor(p["weights"]).argmax())] for n, p in report["probabilities"].items()}
    assert report["raised"] == [n for n, b in made["asga"].weight_bits.items() if b > strongest[n]]


def test_knapsack_of_many_layers_is_quick_and_not_to_be_improved():
    g = torch.Generator().manual_seed(0)
    tables = {f"l{i}": torch.randint(1, 9999, (4, 2), generator=g).double() for i in range(120)}
    cost = search.cost.Cost("bytes", tables)
    values = {n: torch.randn(4, 2, generator=g, dtype=torch.float64) for n in tables}
    limit = sum(cost.range) / 2
    choice = search.knapsack(values, cost, limit)
    spent = cost.of(choice)
    for n, t in tables.items():
        better = t[values[n] > values[n][choice[n]]]
        assert (spent - t[choice[n]] + better > limit).all()


# ---- layers that share a weight -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """``a`` and ``b`` are two modules with one weight; ``c`` is one module under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight, self.again = self.a.weight, self.c

    def forward(self, x):
        return self.last(self.again(torch.relu(self.c(torch.relu(self.b(torch.tanh(self.a(x))))))))


def test_shared_weights_count_once():
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(5, 8)
    profile = search.trace(model, x, act_bits=(4, None))
    assert list(profile.layers) == ["a", "b", "c", "last"] and profile.tied == {"b": "a"}
    assert profile.layers["c"].macs == 2 * 64 and profile.layers["b"].macs == 64
    tables = {k: search.cost.cost_of(k, profile, (2, 8), (4, None)).tables for k in ("average_bits", "bytes", "bitops")}
    assert all(set(t) == {"a", "c", "last"} for t in tables.values())
    assert tables["average_bits"]["a"].tolist() == [[128.0, 128.0], [512.0, 512.0]]
    assert tables["bitops"]["a"].tolist() == [[2 * 64 * 2 * 4, 2 * 64 * 2 * 32], [2 * 64 * 8 * 4, 2 * 64 * 8 * 32]]
    for bits in (2, 4):
        policy = search.uniform_policy(model, x, weight_bits=(bits,))
        packed = ak.pack_(ak.hard_quantize_(ak.quantize_(copy.deepcopy(model), policy)))
        kept = {t.data_ptr(): t.numel() * t.element_size() for t in packed.buffers()}
        assert policy.report["chosen"]["bytes"] == sum(kept.values())
        assert policy.report["chosen"]["average_bits"] == bits
    mixed = Policy(
        tuple(LayerPolicy(n, "linear", "", 0.0, b) for n, b in zip(profile.layers, (2, 2, 4, 8), strict=True))
    )
    costs = search.policy_costs(mixed, profile)
    assert costs["average_bits"] == (64 * 2 + 64 * 4 + 24 * 8) / 152
    assert costs["bitops"] == (64 * 2 + 64 * 2 + 128 * 4 + 24 * 8) * 32
    apart = Policy(tuple(dataclasses.replace(p, weight_bits=4) if p.name == "b" else p for p in mixed))
    assert search.policy_costs(apart, profile)["average_bits"] == (64 * (2 + 4) + 64 * 4 + 24 * 8) / 152  # two copies
    with pytest.raises(ValueError, match="policy: has no entry for b"):
        search.policy_costs(Policy(tuple(p for p in mixed if p.name != "b")), profile)


@pytest.mark.parametrize("kind", ["average_bits", "bitops", "bytes"])
def test_every_method_gives_a_shared_weight_one_choice(kind):
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(32, 8)
    y = torch.randint(0, 3, (32,))
    options = {"weight_bits": (2, 4, 8), "act_bits": (4, 8, None)}
    low, high = search.cost.cost_of(kind, search.trace(model, x), *options.values()).range
    options["budget"] = Budget(**{kind: low + 0.4 * (high - low)})
    made = [
        quick(model, [(x, y)], steps=3, **options),
        quick(model, [(x, y)], steps=3, learned_scales=True, schedule="alternating", **options),
        search.uniform_policy(model, x, **options),
        search.random_policy(model, x, **options),
        search.sensitivity_policy(model, x, **options),
        search.hessian_policy(model, (x, y), functional.cross_entropy, samples=2, **options),
    ]
    for policy in made:
        a, b = policy.layers[:2]
        assert (a.weight_bits, a.act_bits, a.act_signed) == (b.weight_bits, b.act_bits, b.act_signed)
        assert policy.report["chosen"][kind] <= options["budget"].limit
        found = search.policy_costs(policy, search.trace(model, x))[kind]
        assert found == pytest.approx(policy.report["chosen"][kind])
    assert made[0].report["probabilities"]["a"] == made[0].report["probabilities"]["b"]


def test_mixtures_of_a_shared_weight_are_one():
    torch.manual_seed(0)
    model = search.mix_(Tied(), (2, 4), (4, None), learned=True)
    for name in ("weight", "weight_strengths", "act_strengths", "weight_scales"):
        assert getattr(model.a, name) is getattr(model.b, name) is not getattr(model.c, name)
    assert model.again is model.c
    model(torch.randn(5, 8)).square().sum().backward()
    assert model.a.weight_strengths.grad.abs().sum() > 0
    search.unmix_(model)
    assert model.a.weight is model.b.weight and type(model.b) is nn.Linear


def test_an_output_layer_with_the_embedding_s_weight():
    torch.manual_seed(0)
    model, x, y = Language(), torch.randint(0, 9, (30,)), torch.randint(0, 9, (30,))
    options = {"weight_bits": (2, 8), "budget": Budget(average_bits=6.0)}
    policies = [
        search.hessian_policy(model, (x, y), functional.cross_entropy, samples=2, **options),
        search.sensitivity_policy(model, x, **options), quick(model, [(x, y)], steps=2, **options),
    ]  # fmt: skip
    for policy in policies:
        assert list(policy.weight_bits) == ["inner", "last"] and policy.report["chosen"]["average_bits"] <= 6
        ak.quantize_(copy.deepcopy(model), policy)(x)


def test_policies_know_of_shared_weights_and_of_all_names():
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(5, 8)
    policy = search.uniform_policy(model, x, weight_bits=(4,))
    assert list(policy.configs(model)) == ["a", "b", "c", "last", "again"]
    quantized = ak.quantize_(copy.deepcopy(model), policy)
    assert quantized.again is quantized.c and all(isinstance(m, ak.nn.AskewLinear) for m in quantized.children())
    bits = {"a": 2, "b": 4, "c": 8, "last": 8}
    roles = search.layer_roles(model)
    apart = Policy(tuple(LayerPolicy(n, *roles[n], b) for n, b in bits.items()))
    for by in ("auto", "name", "role"):
        with pytest.raises(PolicyError, match="a and b share one weight, but are to have 2 and 4 bits"):
            apart.configs(model, by=by)
    before = str(model)
    with pytest.raises(PolicyError, match="share one weight"):
        ak.quantize_(model, apart)
    assert str(model) == before


# ---- batches, generators, what is left out --------------------------------------------------------------------------


class Mapping(collections.UserDict):
    """As tokenizers give them: a mapping that is no dict."""


@dataclasses.dataclass
class Record:
    x: torch.Tensor


class Reader(nn.Module):
    """Takes its input out of whatever it comes in, and calls a layer by keyword."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, batch):
        if not isinstance(batch, torch.Tensor):
            batch = batch.x if hasattr(batch, "x") else batch["x" if hasattr(batch, "keys") else 0]
        batch = batch["deep"] if isinstance(batch, dict) else batch
        return self.two(input=torch.relu(self.one(batch)))


CONTAINERS = {
    "dict": lambda x: {"x": x, "n": 3}, "mapping": lambda x: Mapping(x=x), "dataclass": Record, "tuple": lambda x: (x,),
    "list": lambda x: [x, None], "nested": lambda x: {"scalar": torch.tensor(2.0), "x": {"deep": x}},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
def test_batches_in_containers_count_by_their_samples(kind):
    torch.manual_seed(0)
    model, wrap = Reader(), CONTAINERS[kind]
    (x, y), options = data(32), {"weight_bits": (2, 4), "budget": Budget(bitops=(30 + 15) * 3 * 32.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (1, 32):
            assert {p.name: p.macs for p in search.trace(model, wrap(x[:n])).layers.values()} == {"one": 30, "two": 15}
        assert search.uniform_policy(model, wrap(x), **options).report["chosen"]["bitops"] == 45 * 2 * 32
        wrapped, plain = (
            quick(model, [(w(a), b) for a, b in zip(x.split(8), y.split(8), strict=True)], steps=4, **options)
            for w in (wrap, lambda t: t)
        )
        assert wrapped == plain and wrapped.report["probabilities"] == plain.report["probabilities"]
        assert search.hessian_policy(model, (wrap(x), y), functional.cross_entropy, samples=2, **options).layers
        assert set(search.latency_table(model, wrap(x[:2]), (2,), seconds=0.001)) == {"one", "two"}
    with pytest.raises(ValueError, match=r"loader: expected batches \(x, y\), got a dict; make pairs of mappings"):
        quick(model, [{"x": x, "y": y}], steps=2)


def generator_states():
    name, *numbers = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, *(np.asarray(n).tolist() for n in numbers)]


class Shuffled:
    """Draws its order from one of the generators there are, and may end early."""

    def __init__(self, source, passes=99):
        self.source, self.passes = source, passes
        self.generator = torch.Generator().manual_seed(7) if source == "own" else None

    def __iter__(self):
        self.passes -= 1
        order = list(range(4))
        if self.source == "python":
            random.shuffle(order)
        elif self.source == "numpy":
            np.random.shuffle(order)
        else:
            order = torch.randperm(4, generator=self.generator).tolist()
        yield from [] if self.passes < 0 else [loader()[i] for i in order]


def sampled(source):
    dataset = torch.utils.data.TensorDataset(*data())
    own = torch.Generator().manual_seed(7)
    if source == "loader":
        return torch.utils.data.DataLoader(dataset, 16, shuffle=True, generator=own), own
    sampler = torch.utils.data.RandomSampler(dataset, generator=own)
    if source == "sampler":
        return torch.utils.data.DataLoader(dataset, 16, sampler=sampler), own
    batches = torch.utils.data.BatchSampler(sampler, 16, False)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches), own


@pytest.mark.parametrize("source", ["torch", "python", "numpy", "own", "loader", "sampler", "batch sampler"])
def test_the_seed_decides_every_order(source, tmp_path):
    batches, own = sampled(source) if "er" in source else (Shuffled(source), None)
    own = own or getattr(batches, "generator", None)
    model = mlp()
    settings = {"steps": 9, "budget": Budget(average_bits=3.0), "method": "plain"}

    def run(**more):
        options = {**settings, "progress": False, **more}
        return search.search_policy(model, batches, functional.cross_entropy, **options).report["probabilities"]

    before, own_before = generator_states(), None if own is None else own.get_state()
    first = run(seed=3)
    assert generator_states() == before and (own is None or torch.equal(own.get_state(), own_before))
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    if own is not None:
        own.manual_seed(1)
    assert run(seed=3) == first != run(seed=4)

    def stop(row):
        if row["step"] == 6:
            raise Stopped

    before, path = generator_states(), tmp_path / "search.pt"
    with pytest.raises(Stopped):
        run(seed=3, checkpoint=path, checkpoint_every=3, progress=stop)
    assert generator_states() == before
    assert run(seed=3, checkpoint=path, checkpoint_every=3) == first


def test_loaders_that_end_in_a_later_pass_say_so():
    with pytest.raises(ValueError, match="loader: exhausted after 8 batches; expected one to iterate again"):
        quick(batches=Shuffled("torch", passes=2))


class Drawing(nn.Module):
    """Draws in its forward in eval mode as well, and counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (torch.rand(()) + random.random() + np.random.rand())


def test_looking_at_a_model_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model, (x, y) = Drawing().train(), data(8)
    state, before = copy.deepcopy(model.state_dict()), generator_states()
    options = {"weight_bits": (2, 4), "budget": Budget(average_bits=3.0)}
    search.trace(model, x)
    search.latency_table(model, x, (2,), seconds=0.001)
    for policy in (search.uniform_policy, search.random_policy, search.sensitivity_policy):
        policy(model, x, **options)
    search.hessian_policy(model, (x, y), functional.cross_entropy, samples=1, **options)
    assert generator_states() == before and model.training and model.linear.training
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        search.trace(model, x[:, :5])
    assert model.training and torch.backends.mha.get_fastpath_enabled() and not model.linear._forward_hooks


def test_what_a_search_leaves_out_is_named():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3))
    x = torch.randn(2, 5, 8)
    assert list(search.trace(encoder.eval(), x).layers) == ["0.linear1", "0.linear2", "2"]  # the fast path calls none
    limit = Budget(bitops=(2 * 5 * 8 * 16 + 120) * 4 * 32.0)
    with pytest.warns(UserWarning, match=r"bit operations of 0.self_attn .MultiheadAttention. are not known"):
        search.uniform_policy(encoder, x, budget=limit)
    hooks = {nn.MultiheadAttention: lambda m, inputs, y: 7}
    assert search.trace(encoder, x, hooks=hooks).other_macs == 3.5

    class Idle(Reader):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(6, 6)

    with pytest.warns(UserWarning, match="the forward does not call spare; left float"):
        policy = search.uniform_policy(Idle(), x[0, :, :6], weight_bits=(4,))
    assert policy.weight_bits == {"one": 4, "two": 4, "spare": None}
    with pytest.raises(ValueError, match="names: the model has no linear or conv layer three"):
        search.trace(Reader(), x[0, :, :6], ["one", "three"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.uniform_policy(encoder, x, weight_bits=(4,), budget=Budget(average_bits=4))


def test_models_that_cannot_be_searched_say_why():
    x = data()[0]
    quantized = ak.quantize_(mlp(depth=1), {"0": ak.QuantConfig()})
    packed = ak.pack_(ak.hard_quantize_(ak.quantize_(mlp(depth=1))))
    for model, match in (
        (quantized, r"model: 0: quantized already; call dequantize_ first"), (packed, "model: 0, 2: packed already"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            search.uniform_policy(model, x)
        with pytest.raises(ValueError, match=match):
            quick(model, steps=1)
    assert search.uniform_policy(quantized, x, filter_fn=lambda m, name: name != "0").weight_bits["0"] is None
    with pytest.raises(ValueError, match="model: 0.weight has no values .meta."):
        search.uniform_policy(mlp().to("meta"), x)
    computed = mlp(depth=3)
    prune.l1_unstructured(computed[0], "weight", 0.5)
    parametrizations.weight_norm(computed[2])
    for call in (lambda: search.uniform_policy(computed, x), lambda: search.mix_(computed)):
        with pytest.raises(ValueError, match="model: 0, 2: the weight is computed .weight_norm, pruning"):
            call()


def test_ambient_modes_change_nothing_in_a_search():
    torch.manual_seed(0)
    model, (x, y) = mlp(), data()
    options = {"weight_bits": (2, 4, 8), "act_bits": (4, None), "budget": Budget(bitops=20_000)}

    def everything():
        found = [
            quick(model, [(x, y)], steps=4, **options), search.random_policy(model, x, **options),
            search.sensitivity_policy(model, x, **options),
            search.hessian_policy(model, (x, y), functional.cross_entropy, samples=1, **options),
        ]  # fmt: skip
        return found, [p.report["chosen"] for p in found], found[0].report["probabilities"]

    known = everything()
    with torch.inference_mode():
        assert everything() == known
        assert search.latency_table(model, x.clone(), (2,), seconds=0.001)
    if torch.__version__ >= "2.12":  # before, torch's own Adam cannot step there
        with torch.no_grad(), torch.device("meta"):
            assert everything() == known
    torch.set_default_dtype(torch.float64)
    try:
        assert everything() == known
    finally:
        torch.set_default_dtype(torch.float32)
    wide = model.double()
    x = x.double()
    assert quick(wide, [(x, y)], steps=4, **options).layers
    assert set(search.latency_table(wide, x, (2,), seconds=0.001)) == {"0", "2", "4"}


def test_compiled_models_are_searched_as_they_are_written():
    torch.manual_seed(0)
    model, (x, y) = mlp(), data()
    options = {"weight_bits": (2, 4, 8), "budget": Budget(bitops=20_000)}

    def everything(m):
        return [search.uniform_policy(m, x, **options), quick(m, [(x, y)], steps=3, **options),
                search.sensitivity_policy(m, x, **options), search.random_policy(m, x, **options),
                search.hessian_policy(m, (x, y), functional.cross_entropy, samples=1, **options)]  # fmt: skip

    known = everything(model)
    compiled = torch.compile(model, backend="eager")
    compiled(x)  # hooks that come later are not in its graph
    assert everything(compiled) == known
    model[2].compile(backend="eager")
    model(x)
    assert everything(model) == known


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scales_of_a_mixture_are_those_of_its_candidates(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(33, 9).to(dtype)
    with torch.no_grad():
        for row, factor in enumerate((0.0, 1e-30, 1e-13, 1e-6, 1.0, 1e6, 1e12, 1e20, 1e30)):
            layer.weight[row] *= factor
        layer.weight[4, 1:] = 0.0  # where SAWB's clip is negative
    mixed = search.mix_(nn.Sequential(layer), range(1, 9))[0]
    for grid, scale in zip(mixed.weight_grids, mixed._rule_scales(), strict=True):
        assert torch.equal(scale, ak.quant.compute_scale(layer.weight, grid, ak.quant.default_rule(grid))), grid


ROWS_ELSEWHERE = {
    "transposed linear": lambda: TransposedLinear(8, 6),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3),
    "transposed in groups": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
    "in groups": lambda: nn.Conv2d(6, 4, 3, groups=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS_ELSEWHERE)
def test_errors_of_a_baseline_are_those_of_the_quantized_layer(kind):
    torch.manual_seed(0)
    layer = ROWS_ELSEWHERE[kind]()
    with torch.no_grad():  # outputs and inputs of very different size
        layer.weight.mul_(torch.logspace(-2, 0, layer.weight.numel()).reshape(layer.weight.shape))
    x = torch.randn(2, 5, 6) if layer.weight.dim() == 2 else torch.randn(2, 6, 5, 5)
    model = nn.Sequential(layer)
    found = _by_errors(search.Space(model, x, (1, 2, 4, 8)), lambda name: 1.0)["0"][:, 0]
    for bits, error in zip((1, 2, 4, 8), (-found).tolist(), strict=True):
        new = ak.quantize_(copy.deepcopy(model), ak.QuantConfig(weight=weight_grid(bits)))[0]
        exact = (new.quantized_weight() - new.weight.detach()).double().square().sum().item()
        assert error == pytest.approx(exact, rel=1e-5)


# ---- policies -------------------------------------------------------------------------------------------------------


def policy_of(model, bits, **options):
    roles = search.layer_roles(model)
    return Policy(tuple(LayerPolicy(n, *roles[n], b, **options) for n, b in zip(roles, bits, strict=True)))


def test_policies_survive_json_and_quantize(tmp_path):
    torch.manual_seed(0)
    model = mlp(depth=3)
    policy = policy_of(model, (8, 1, 6, None))
    policy.report["note"] = [1, 2.5, "x"]
    policy.save(tmp_path / "p.json")
    again = Policy.load(tmp_path / "p.json")
    assert again == policy and again.report == policy.report
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
    ak.quantize_(model, again)
    assert [type(m).__name__ for m in model[::2]] == ["AskewLinear", "AskewLinear", "AskewLinear", "Linear"]
    assert [m.config.weight for m in model[:5:2]] == [Uniform(8), Binary(), Uniform(6)]
    assert "float" in policy.table() and "6" in policy.table()
    pytest.importorskip("matplotlib")
    policy.plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_input_bits_are_quantized_packed_and_saved(tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    model, x = cnn(), torch.randn(5, 2, 9, 9)
    policy = policy_of(model, (4, 3, 2), act_bits=4)
    ak.quantize_(model, policy)
    layer, given = model[0], []
    layer.register_forward_pre_hook(lambda m, inputs: given.append(inputs[0]))
    y = model(x)
    rounded = quantized_input(x, Uniform(4), 3)
    expected = functional.conv2d(rounded, layer.quantized_weight(), layer.bias, 2, 1)
    torch.testing.assert_close(layer(x), expected)
    scales = x.abs().amax((1, 2, 3), keepdim=True) / 7
    levels = rounded / scales
    torch.testing.assert_close(levels, levels.round(), atol=1e-5, rtol=0)
    assert (rounded - x).abs().max() <= 0.501 * scales.max()
    together = model.eval()(x)
    torch.testing.assert_close(torch.cat([model(t) for t in x.split(1)]), together)  # each image by itself
    y.sum().backward()
    ak.pack_(ak.hard_quantize_(model))
    ak.save_packed(model, tmp_path / "m.safetensors")
    again = ak.load_packed(tmp_path / "m.safetensors", cnn()).eval()
    assert torch.equal(again(x), model(x)) and again[2].config.activation == Uniform(4)
    tokens = torch.randn(2, 7, 6)
    linear = ak.nn.AskewLinear(6, 3, config=ak.QuantConfig(activation=Uniform(8)))
    torch.testing.assert_close(linear(tokens)[1, 3], linear(tokens[1, 3]))  # each token by itself


def test_transfer_by_role_to_wider_and_deeper_models():
    policy = policy_of(mlp(depth=3), (8, 2, 4, 6))
    wider = policy.configs(mlp(width=40, depth=3))
    assert [c.weight.bits for c in wider.values()] == [8, 2, 4, 6]
    deeper = policy.configs(mlp(depth=5))  # inner layers at 0, 1/3, 2/3, 1 of the way, the policy's at 0 and 1
    assert [c.weight.bits for c in deeper.values()] == [8, 2, 2, 4, 4, 6]
    assert [c.weight.bits for c in policy.configs(mlp(depth=2)).values()] == [8, 2, 6]


def test_transfer_by_pattern():
    block = nn.ModuleDict({"q": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)})
    model = nn.ModuleList([copy.deepcopy(block) for _ in range(3)])
    policy = Policy((
        LayerPolicy("0.q", "linear", "", 0.0, 8), LayerPolicy("*.q", "linear", "", 0.0, 4),
        LayerPolicy("*.mlp", "linear", "", 0.0, None),
    ))  # fmt: skip
    found = policy.configs(model)
    assert [None if c is None else c.weight.bits for c in found.values()] == [8, None, 4, None, 4, None]


def test_policies_that_do_not_fit_name_the_layers():
    policy = policy_of(mlp(depth=2), (4, 4, 4))
    with pytest.raises(
        PolicyError, match=r"no entry for 0 \(first conv2d \*\), 2 \(inner depthwise \*\); no layer for 0, 2"
    ):
        policy.configs(cnn(), by="role")
    model = mlp(depth=3)
    before = copy.deepcopy(model)
    with pytest.raises(PolicyError, match="by name: no entry for 6"):
        policy.configs(model, by="name")
    with pytest.raises(PolicyError, match="0 is conv2d, the policy's linear"):
        policy.configs(cnn(), by="name")
    one = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(PolicyError, match=r"no entry for.*no layer for"):
        ak.quantize_(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1)), policy)
    with pytest.raises(PolicyError, match="no layer for 2, 4"):
        ak.quantize_(one, policy)
    with pytest.raises(PolicyError, match="has no linear or conv2d layer"):
        ak.quantize_(nn.Sequential(nn.ReLU()), policy)
    assert type(one[0]) is nn.Linear and str(before) == str(model)


ONE = """{"askew_policy": 1, "layers": [
    {"name": "a", "kind": "linear", "role": "", "position": 0, "weight_bits": BITS}]}"""


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "expected a policy of version 1, got 'list'"),
        ('{"askew_policy": 2}', "got 2"),
        ('{"askew_policy": 1}', "'layers'"),
        ('{"askew_policy": 1, "layers": []}', "has no layers"),
        ('{"askew_policy": 1, "layers": [{"name": "a"}]}', "missing"),
        (ONE.replace("BITS", "9"), "a: weight_bits: expected 1 to 8 or None, got 9"),
        (ONE.replace("BITS", 'null, "act_bits": 4'), "act_bits: expected None"),
        (ONE.replace("BITS", '4, "act_signed": "no"'), "a: act_signed: expected True or False, got 'no'"),
        (ONE.replace('"name": "a"', '"name": 5').replace("BITS", "4"), "5: name: expected text, got 5"),
    ],
)  # fmt: skip
def test_damaged_policies(tmp_path, text, match):
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match=match) as problem:
        Policy.load(path)
    assert str(path) in str(problem.value)


def test_roles():
    model = cnn()
    assert {n: r[1] for n, r in search.layer_roles(model).items()} == {
        "0": "first conv2d *", "2": "inner depthwise *", "5": "last linear *",
    }  # fmt: skip
    assert kind_of(nn.Conv2d(4, 8, 1, groups=2)) == "conv2d"


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command_with_a_budget_out_of_reach(tmp_path, capsys, monkeypatch):
    for name in ("sklearn", "mnist1d", "rich", "matplotlib", "safetensors"):
        pytest.importorskip(name)
    from experiments import search as experiment

    monkeypatch.setattr(experiment, "FLOAT_EPOCHS", 0)
    assert main(["search", "--demo", "--bits", "9.5", "--out", str(tmp_path)]) == 2
    assert "from 1 to 8" in capsys.readouterr().err


def test_summaries():
    pytest.importorskip("sklearn")
    from experiments import search as d

    rows = [
        d.Row("mnist1d / CNN", 1.75, seed, m, found, {}, 1.5, 60.0 + seed + (m == "ASGA"), 90.0, 95.0, 2.0)
        for seed in (0, 1)
        for m, found in (("ASGA", "target"), ("ASGA", "5 % of the data"), ("plain", "target"), ("uniform", ""))
    ]
    lines = d.summarise(rows)
    assert [(x["method"], x["found_on"]) for x in lines][:2] == [("ASGA", "target"), ("ASGA", "5 % of the data")]
    assert d.markdown(lines).count("61.50 ± 0.71") == 2
    assert d.paired(rows, ("ASGA", "target"), ("plain", "target"), "before") == (1.0, 0.0, 2)
    assert "ASGA found on the target − uniform | +1.00 ± 0.00 | +0.00 ± 0.00 | 2 |" in d.claims(rows)
