"""Contract: the mixed-precision search chooses what it says, within its budget, and its policies carry over.

1. Mixed layers compute the mixture of their candidates; one call makes them, another removes them without a trace.
2. Costs are exact: MACs against counting, bytes against what ``pack_`` makes, expectations against enumeration.
3. The knapsack is the optimum (against enumeration) and never exceeds its limit; budgets out of reach name the reach.
4. A search moves its bits to where they matter, meets every kind of budget, is reproducible, resumes to the same end,
   leaves model and generators alone, and is the same in two processes (test_search_distributed.py).
5. Policies survive JSON, apply by name, pattern and role, and what does not fit is rejected by name.
"""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import ops, search
from askew_kernels.__main__ import main
from askew_kernels.nn.layers import quantized_input
from askew_kernels.nn.policy import kind_of, scale_rule, weight_grid
from askew_kernels.quant import Binary, Uniform
from askew_kernels.search import Budget, BudgetError, LayerPolicy, Policy, PolicyError

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
        p[k] * ops.fake_quantize(layer.weight, ak.quant.compute_scale(layer.weight, g, scale_rule(g)), g)
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


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight_bits": ()}, "weight_bits: expected at least one candidate"),
        ({"weight_bits": (2, 9)}, "weight_bits: expected 1 to 8, got 9"),
        ({"weight_bits": (2, None)}, "weight_bits: expected 1 to 8, got None"),
        ({"act_bits": (1,)}, "act_bits: expected 2 to 8 or None, got 1"),
        ({"act_bits": ()}, "act_bits: expected at least one"),
        ({"filter_fn": lambda m, n: False}, "no nn.Linear or nn.Conv2d to quantize passes filter_fn"),
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
    ak.quantize_(model, ak.QuantConfig(weight=grid, scale=scale_rule(grid)))
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
        ({"model": nn.Sequential(nn.ReLU())}, "no nn.Linear or nn.Conv2d to quantize"),
        ({"model": nn.Linear(6, 3)}, "is itself a layer"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        quick(**options)


def test_without_a_budget_the_weight_of_the_cost_decides():
    cheap, dear = (
        quick(budget=None, cost_weight=w, steps=30, strength_lr=0.3, weight_bits=(2, 8)) for w in (50.0, 0.0)
    )
    assert set(cheap.weight_bits.values()) == {2}
    assert cheap.report["chosen"]["bitops"] < dear.report["chosen"]["bitops"]


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
    with pytest.raises(PolicyError, match=r"has no nn.Linear"):
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
    from askew_kernels import demo_search

    monkeypatch.setattr(demo_search, "FLOAT_EPOCHS", 0)
    assert main(["search", "--demo", "--bits", "9.5", "--out", str(tmp_path)]) == 2
    assert "from 1 to 8" in capsys.readouterr().err


def test_summaries():
    pytest.importorskip("sklearn")
    from askew_kernels import demo_search as d

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
