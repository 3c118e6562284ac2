"""Contract: ak.Recipe sets up all that a quantization-aware training needs, for a number of steps of any optimizer.

1. Its numbers are a row of RECIPES, by the optimizer's family; they can be changed by name; the same table gives
   EpsilonAnnealing its defaults. What does not fit is refused, by name, before anything is written.
2. After its steps every weight is on a level, under ASkewSGD, ASkewAdamW, sharpness-aware steps, and foreign ones; the
   learning rate stays the caller's.
3. Steps that a GradScaler leaves out, accumulated gradients and tensors in the groups change nothing of that.
4. state_dict resumes bit for bit: in the hold, before and after scales freeze, while it anneals, after the end.
5. Freezing before the annealing, weights without a clamp and outer layers that come last do what they say.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

import askew_kernels as ak
from askew_kernels.annealing import FLOOR, LATER, RECIPES, Settings
from askew_kernels.optim import SAM, ASkewAdamW, ASkewLion, ASkewSGD, Skewed

STEPS, LONG = 60, 200
ARRIVING = {"hold": 0.1, "outer_hold": 0.3, "outer_freeze": 0.2, "power": 12.0, "outer_power": 12.0, "end": 0.9}
OPTIMIZERS = {
    "SGD": lambda groups: ASkewSGD(groups, lr=0.1, momentum=0.9),
    "AdamW": lambda groups: ASkewAdamW(groups, lr=1e-2, alpha=50.0, skew="direction"),
    "Lion": lambda groups: ASkewLion(groups, lr=1e-2, alpha=50.0, skew="direction"),
    "SAM": lambda groups: SAM(ASkewSGD(groups, lr=0.1, momentum=0.9), rho=0.05),
    "Skewed RAdam": lambda groups: Skewed(torch.optim.RAdam(groups, lr=1e-2), alpha=50.0),
    "SAM of Skewed": lambda groups: SAM(Skewed(torch.optim.SGD(groups, lr=0.1), alpha=5.0), rho=0.05),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def problem(optimizer="SGD", bits=4, **options):
    """All layers are quantized: the first and the last are a group of their own."""
    model = ak.quantize_(network(), ak.QuantConfig(ak.quant.Uniform(bits)))
    return model, OPTIMIZERS[optimizer](ak.param_groups(model, **options))


def batch(k, rows=16):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(rows, 6, generator=g)
    return x, (x[:, :3] + 0.5 * x[:, 3:]).argmax(1)


def descend(model, optimizer, k):
    x, y = batch(k)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


def train(model, optimizer, *schedules, steps=range(STEPS)):
    for k in steps:
        descend(model, optimizer, k)
        for schedule in schedules:
            schedule.step()


def cosine(optimizer, steps=STEPS):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def group(optimizer, outer=True):
    """The group of the outer layers, or of the others."""
    groups = [g for g in optimizer.param_groups if g.get("grid") is not None]
    return next(g for g in groups if (g.get("order") == "outer") == outer)


def all_frozen(model):
    return all(layer.weight_scale_frozen for layer in ak.nn.quantized_layers(model).values())


def furthest(model):
    """From its level, in scales."""
    return max(
        ((m.weight - m.quantized_weight()) / m.weight_scale[:, None]).abs().max().item()
        for m in ak.nn.quantized_layers(model).values()
    )


@pytest.fixture
def silent():
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- 1. numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "family"), [("SGD", "sgd"), ("SAM", "sgd"), ("AdamW", "adam"), ("Lion", "adam"),
                                                   ("Skewed RAdam", "adam")])  # fmt: skip
def test_numbers_are_the_familys(optimizer, family, monkeypatch):
    row = Settings(
        hold=0.25, end=0.75, power=3.0, keep_pull=False, freeze=0.2, outer_hold=0.5, outer_freeze=None, outer_power=1.0
    )
    monkeypatch.setitem(RECIPES, family, row)
    model, made = problem(optimizer)
    recipe = ak.Recipe(model, made, 200)
    assert (recipe.hold, recipe.total, recipe.power, recipe.keep_pull, recipe.freeze) == (50, 150, 3.0, False, 40)
    assert (recipe.outer_hold, recipe.outer_freeze, recipe.outer_power) == (100, None, 1.0)
    assert recipe.mode == "gap" and recipe.clamp is True and group(made)["clamp"] is True
    assert ak.EpsilonAnnealing(made, total=150).state_dict() | recipe.state_dict() == recipe.state_dict()


def test_numbers_change_by_name():
    model, optimizer = problem()
    recipe = ak.Recipe(model, optimizer, 100, hold=0.4, end=0.8, mode="cosine", clamp=False)
    assert (recipe.hold, recipe.total, recipe.mode) == (40, 80, "cosine") and group(optimizer)["clamp"] is False
    other = ak.Recipe(model, optimizer, 100, settings="adam")
    assert other.power == RECIPES["adam"].power
    assert ak.Recipe(model, optimizer, 100, settings=Settings(power=5.0)).power == 5.0
    row = RECIPES["sgd"]
    shorter = ak.Recipe(model, optimizer, 1000, end=row.end / 2, freeze=0.05)
    assert (shorter.freeze, shorter.hold, shorter.full) == (50, round(500 * row.hold), 50)  # frozen: in full


@pytest.mark.parametrize("end", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("ours", [ak.optim.ASkewSGD, ak.optim.ASkewAdamW])
def test_every_number_of_steps_serves(ours, end):
    model = two_nets()[0]
    for steps in range(1, 40):
        recipe = ak.Recipe(model, ours(ak.param_groups(model), lr=0.05), steps, end=end)
        assert (recipe.full or 0) <= min(recipe.hold, recipe.freeze)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_few_steps(steps, silent):
    model, optimizer = problem()
    recipe = ak.Recipe(model, optimizer, steps)
    train(model, optimizer, recipe, steps=range(steps))
    assert recipe.finished and recipe.get_last_eps() == [FLOOR] * 2


@pytest.mark.parametrize(("options", "error"), [
    (dict(steps=10.0), TypeError), (dict(steps=True), TypeError), (dict(steps=0), ValueError),
    (dict(hold=20), ValueError), (dict(hold="a"), TypeError), (dict(hold=1.0), ValueError),
    (dict(end=1.2), ValueError), (dict(end=0), ValueError), (dict(outer_hold=1.0), ValueError),
    (dict(freeze=-0.1), ValueError), (dict(outer_freeze="a"), TypeError), (dict(mode="none"), ValueError),
    (dict(power=0), ValueError), (dict(clamp=1), TypeError), (dict(keep_pull="yes"), TypeError),
    (dict(outer_power=-1), ValueError), (dict(hold=None), TypeError), (dict(settings="lbfgs"), ValueError),
    (dict(settings=3), TypeError), (dict(total=9), TypeError), (dict(model=3), TypeError),
    (dict(optimizer=3), TypeError),
], ids=str)  # fmt: skip
def test_arguments_are_checked(options, error):
    model, optimizer = problem()
    before = copy.deepcopy(optimizer.state_dict())
    arguments = {"model": model, "optimizer": optimizer, "steps": 10, **options}
    with pytest.raises(error, match=f"^{next(iter(options))}: "):
        ak.Recipe(**arguments)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_what_is_not_under_the_constraint_is_named():
    with pytest.raises(ValueError, match="^model: has no quantized layers"):
        ak.Recipe(network(), problem()[1], 10)
    model, optimizer = problem()
    groups = ak.param_groups(model)
    plain = {"params": [p for g in groups for p in g["params"]]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foreign = ASkewSGD([plain], lr=0.1)
    with pytest.raises(ValueError, match=r"^optimizer: 0\.weight is in no parameter group with a grid"):
        ak.Recipe(model, foreign, 10)
    with pytest.raises(ValueError, match=r"^optimizer: 0\.weight is in no"):
        ak.Recipe(problem()[0], optimizer, 10)  # of another model
    with pytest.raises(ValueError, match=r"several optimizers .* ak.EpsilonAnnealing\(optimizer, total=10\)"):
        ak.Recipe(model, foreign, 10)
    with pytest.raises(ValueError, match="ak.optim.Skewed"):
        ak.Recipe(model, torch.optim.SGD(groups, lr=0.1), 10)


def test_layers_that_do_not_train_are_left_alone(silent):
    model = ak.quantize_(network())
    model[2].weight.requires_grad_(False)
    optimizer = ASkewSGD(ak.param_groups(model), lr=0.1)
    train(model, optimizer, ak.Recipe(model, optimizer, 10), steps=range(10))


# ---- 2. end to end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_weight_arrives_at_its_level(name, silent):
    model, optimizer = problem(name)
    schedule = cosine(optimizer, LONG)
    recipe = ak.Recipe(model, optimizer, LONG, **ARRIVING)
    rates = []
    for k in range(LONG):
        descend(model, optimizer, k)
        schedule.step(), recipe.step()
        rates.append(schedule.get_last_lr())
        assert rates[-1] == [g["lr"] for g in optimizer.param_groups]
    assert rates[-1][0] == pytest.approx(0, abs=1e-9) and recipe.finished and furthest(model) < 0.05
    assert all_frozen(model)
    expected = model(batch(0)[0])
    assert recipe.finish() is model and furthest(model) == 0 and torch.equal(model(batch(0)[0]), expected)


def test_a_foreign_schedule_of_epochs_is_no_matter(silent):
    model, optimizer = problem()
    schedule, recipe = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), ak.Recipe(model, optimizer, STEPS)
    for epoch in range(4):
        train(model, optimizer, recipe, steps=range(15 * epoch, 15 * epoch + 15))
        schedule.step()
    assert recipe.finished and all_frozen(model)


def test_finishing_early_is_told():
    model, optimizer = problem()
    recipe = ak.Recipe(model, optimizer, STEPS)
    train(model, optimizer, recipe, steps=range(5))
    with pytest.warns(UserWarning, match=r"finish\(\) after 5 of 60 steps"):
        recipe.finish()
    assert furthest(model) == 0


# ---- 3. surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW", "SAM"])
def test_steps_that_a_scaler_leaves_out(name, silent):
    """The first ones, while it looks for its scale, and one in the middle; weights stay where they were, the count
    goes on with the learning rate's."""
    model, optimizer = problem(name)
    schedule, recipe = cosine(optimizer), ak.Recipe(model, optimizer, STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    for k in range(STEPS):
        (x, y), before = batch(k), model[2].weight.detach().clone()
        for half in ["first_step", "second_step"] if name == "SAM" else [None]:
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(x), y)).backward()
            if half == "first_step":
                optimizer.first_step(scaler=scaler)
        skip = k < 2 or k == 40
        if skip:
            model[0].weight.grad[0, 0] = float("inf")
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < scale) == skip and (not skip or torch.equal(model[2].weight, before))
        if k > 1:
            schedule.step()  # torch's own warns where it comes before the first step
        recipe.step()
    assert recipe.last_epoch == STEPS and recipe.finished and all_frozen(model)


def test_micro_batches_are_one_step(silent):
    model, optimizer = problem()
    whole, theirs = problem()
    recipe, other = ak.Recipe(model, optimizer, STEPS), ak.Recipe(whole, theirs, STEPS)
    for k in range(STEPS):
        x, y = batch(k)
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(4), y.chunk(4), strict=True):
            (functional.cross_entropy(model(part), labels) / 4).backward()
        optimizer.step(), recipe.step()
        descend(whole, theirs, k), other.step()
    assert recipe.state_dict() == other.state_dict() and all_frozen(model)


def test_a_step_of_the_recipe_for_every_micro_batch_is_told():
    model, optimizer = problem()
    recipe = ak.Recipe(model, optimizer, STEPS)
    with pytest.warns(UserWarning, match="with micro-batches call it once") as caught:
        for k in range(6):
            descend(model, optimizer, k)
            for _ in range(4):
                recipe.step()
    assert len(caught) == 1


def test_before_the_first_step_of_the_optimizer_it_warns():
    model, optimizer = problem()
    descend(model, optimizer, 0)
    recipe = ak.Recipe(model, optimizer, STEPS)
    with pytest.warns(UserWarning, match="before the first optimizer.step"):
        recipe.step()


def test_tensors_in_the_groups_are_filled(silent):
    model = ak.quantize_(network())
    lr, eps, alpha = (torch.tensor(value, dtype=torch.float64) for value in (0.1, 1.0, 1.0))
    optimizer = ASkewSGD(ak.param_groups(model), lr=lr, constraint_eps=eps, alpha=alpha, momentum=0.9)
    recipe = ak.Recipe(model, optimizer, STEPS, outer_hold=0.5)
    inner, outer = group(optimizer, outer=False)["constraint_eps"], group(optimizer)["constraint_eps"]
    assert inner is eps and outer is not eps  # they are not annealed alike
    for k in range(STEPS):
        assert (float(inner), float(outer)) == (recipe.eps_at(k), recipe.eps_at(k, outer=True))
        descend(model, optimizer, k)
        recipe.step()
    assert group(optimizer)["constraint_eps"] is outer and eps == outer == FLOOR and all_frozen(model)


def test_it_is_a_scheduler(silent):
    model, optimizer = problem()
    both = torch.optim.lr_scheduler.ChainedScheduler([cosine(optimizer), ak.Recipe(model, optimizer, STEPS)])
    train(model, optimizer, both)
    assert group(optimizer)["constraint_eps"] == FLOOR and all_frozen(model)


# ---- 4. resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stop"), [
    *(("SGD", k) for k in (0, 3, 15, 16, 19, 25, 31, 57, 60)), *((name, k) for name in OPTIMIZERS for k in (14, 40)),
])  # fmt: skip
def test_resuming_is_bit_for_bit(name, stop, silent):
    """Of 60 steps layers are float for 6, scales freeze after 15 (of outer layers 24), holds end after 18 (30)."""
    options = {"start": 0.1, "freeze": 0.25, "hold": 0.3, "outer_freeze": 0.4, "outer_hold": 0.5, "end": 0.95}

    def start():
        model, optimizer = problem(name)
        schedule, recipe = cosine(optimizer, 80), ak.Recipe(model, optimizer, STEPS, **options)
        return {"model": model, "optimizer": optimizer, "schedule": schedule, "recipe": recipe}

    def go_on(run, steps):
        train(run["model"], run["optimizer"], run["schedule"], run["recipe"], steps=steps)

    run = start()
    go_on(run, range(stop))
    saved = pickle.loads(pickle.dumps({key: part.state_dict() for key, part in run.items()}))
    go_on(run, range(stop, STEPS + 5))
    again = start()
    for key, part in again.items():
        part.load_state_dict(saved[key])
    go_on(again, range(stop, STEPS + 5))
    for a, b in zip(run["model"].state_dict().values(), again["model"].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert run["recipe"].state_dict() == again["recipe"].state_dict()


def test_state_is_json():
    model, optimizer = problem()
    recipe = ak.Recipe(model, optimizer, STEPS)
    train(model, optimizer, recipe, steps=range(9))
    state = json.loads(json.dumps(recipe.state_dict()))
    other = ak.Recipe(*problem(), 7)
    other.load_state_dict(state)
    assert other.state_dict() == recipe.state_dict() and (other.steps, other.last_epoch) == (STEPS, 9)


def test_other_states_are_refused():
    model, optimizer = problem()
    recipe = ak.Recipe(model, optimizer, STEPS)
    before = recipe.state_dict()
    for state in (ak.EpsilonAnnealing(optimizer, total=9).state_dict(), {**before, "T_max": 3}):
        with pytest.raises(ValueError, match="^state_dict: "):
            recipe.load_state_dict(state)
    assert recipe.state_dict() == before


def test_states_of_before_still_load():
    """Those of an EpsilonAnnealing that knew neither clamp nor freeze, nor outer groups."""
    annealing = ak.EpsilonAnnealing(problem()[1], total=30)
    state = {k: v for k, v in annealing.state_dict().items() if k not in LATER}
    annealing.load_state_dict(state | {"last_epoch": 12})
    assert all(getattr(annealing, key) is None for key in LATER) and annealing.last_epoch == 12


def test_copies(silent):
    model, optimizer = problem()
    recipe = ak.Recipe(model, optimizer, STEPS)
    train(model, optimizer, recipe, steps=range(9))
    twin = copy.deepcopy(recipe)
    train(model, optimizer, recipe, steps=range(9, STEPS))
    train(twin.model, twin.optimizer, twin, steps=range(9, STEPS))
    assert twin.model is not model and twin.state_dict() == recipe.state_dict()
    for p, q in zip(model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- 5. what its numbers do -----------------------------------------------------------------------------------------


def test_scales_freeze_before_the_annealing(silent):
    model, optimizer = problem()
    recipe = ak.Recipe(model, optimizer, STEPS, hold=0.5, freeze=0.2)
    scales = []
    for k in range(STEPS):
        scales.append(model[2].weight_scale.clone())
        descend(model, optimizer, k)
        assert bool(model[2].weight_scale_frozen) == (k >= 12), k
        assert group(optimizer, outer=False)["constraint_eps"] == (1.0 if k <= 30 else recipe.eps_at(k))
        recipe.step()
    assert not torch.equal(scales[5], scales[6]) and torch.equal(scales[13], scales[-1])


def test_layers_are_float_until_the_start(silent):
    model, optimizer = problem(bits=2)
    recipe = ak.Recipe(model, optimizer, STEPS, start=0.1, full=None)
    x, layer = batch(0)[0], model[0]
    for k in range(10):
        plain = functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), plain) == (k < 6) and not torch.equal(layer.eval()(x), plain)
        layer.train()
        descend(model, optimizer, k), recipe.step()


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Skewed RAdam"])
def test_weights_without_a_clamp_leave_the_hull(name, clamp, silent):
    model, optimizer = problem(name, bits=2)
    recipe = ak.Recipe(model, optimizer, STEPS, clamp=clamp, settings="finetune")
    train(model, optimizer, recipe, steps=range(20))
    layer = model[2]
    outside = (layer.weight / layer.weight_scale[:, None]).max() > 1 + 1e-4
    assert bool(layer.weight_scale_frozen) and bool(outside) == (not clamp)


def test_clamp_is_checked():
    model, _ = problem()
    with pytest.raises(TypeError, match="^clamp: expected True or False"):
        ASkewSGD(ak.param_groups(model), lr=0.1, clamp=1)


def order_of(model, **options):
    groups = ak.param_groups(model, **options)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    found = {id(p): g.get("order") for g in groups if "grid" in g for p in g["params"]}
    return {name: found[id(layer.weight)] for name, layer in ak.nn.quantized_layers(model).items()}


def test_outer_layers_are_the_models_first_and_last():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    assert order_of(ak.quantize_(copy.deepcopy(model))) == {"0": "outer", "1": None, "2": None, "3": "outer"}
    inner = ak.quantize_(copy.deepcopy(model), filter_fn=lambda m, name: name not in ("0", "3"))
    assert order_of(inner) == {"1": None, "2": None}  # those are float, and nothing else is outer
    assert order_of(ak.quantize_(copy.deepcopy(model[:1]))) == {"0": "outer"}
    assert set(order_of(ak.quantize_(copy.deepcopy(model)), outer=False).values()) == {None}
    words = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), *copy.deepcopy(model), nn.BatchNorm1d(4))
    assert order_of(ak.quantize_(words)) == {"2": None, "3": None, "4": None, "5": "outer"}
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    tied[2].weight = tied[0].weight
    assert order_of(ak.quantize_(tied, kinds=("linear", "embedding"))) == {"0": "outer", "1": None, "2": "outer"}


def test_outer_layers_are_annealed_last(silent):
    model, optimizer = problem()
    options = {"freeze": 0.1, "hold": 0.25, "outer_freeze": 0.4, "outer_hold": 0.5, "end": 0.75}
    recipe = ak.Recipe(model, optimizer, STEPS, **options)
    inner, outer = group(optimizer, outer=False), group(optimizer)
    for k in range(STEPS):
        assert (inner["constraint_eps"], outer["constraint_eps"]) == (recipe.eps_at(k), recipe.eps_at(k, outer=True)), k
        descend(model, optimizer, k)
        assert bool(model[2].weight_scale_frozen) == (k >= 6) and bool(model[0].weight_scale_frozen) == (k >= 24)
        assert sorted(recipe.get_last_eps()) == sorted([inner["constraint_eps"], outer["constraint_eps"]])
        recipe.step()
    assert recipe.eps_at(25) < 1 == recipe.eps_at(30, outer=True) > recipe.eps_at(35, outer=True)
    assert inner["constraint_eps"] == outer["constraint_eps"] == FLOOR


def test_vectors_without_weight_decay():
    model = ak.quantize_(
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), filter_fn=lambda m, n: n == "0"
    )
    weights, matrices, vectors = ak.param_groups(model, decay_vectors=False, weight_decay=0.1)
    assert weights["params"] == [model[0].weight] and weights["weight_decay"] == matrices["weight_decay"] == 0.1
    assert matrices["params"] == [model[2].weight] and vectors["weight_decay"] == 0
    assert set(vectors["params"]) == {model[0].bias, *model[1].parameters(), model[2].bias}
    assert len(ak.param_groups(model, weight_decay=0.1)) == 2
    optimizer = ASkewAdamW([weights, matrices, vectors], lr=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0]


def test_every_number_of_the_table_is_used():
    """A field of Settings that nothing reads would be a promise."""
    model, optimizer = problem()
    base = ak.Recipe(model, optimizer, 1000).state_dict()
    others = {"hold": 0.4, "end": 0.9, "mode": "linear", "power": 3.3, "keep_pull": False, "clamp": False,
              "freeze": 0.3, "outer_hold": 0.6, "outer_freeze": 0.5, "outer_power": 3.3,
              "start": 0.05, "full": 0.45}  # fmt: skip
    assert {field.name for field in dataclasses.fields(Settings)} == others.keys()
    for name, value in others.items():
        assert ak.Recipe(model, optimizer, 1000, **{name: value}).state_dict() != base, name


# ---- the start with float weights -----------------------------------------------------------------------------------


def two_nets(**config):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    return ak.quantize_(net(), ak.QuantConfig(weight=ak.quant.Ternary(), **config)), net()


@pytest.mark.parametrize("ste_clip", [True, "step", False])
@pytest.mark.parametrize("forward", ["hard", "int8"])
@pytest.mark.parametrize("adam", [False, True])
def test_start_trains_as_the_float_model(ste_clip, forward, adam):
    model, plain = two_nets(ste_clip=ste_clip, forward=forward)
    ours, torchs = (ak.optim.ASkewAdamW, torch.optim.AdamW) if adam else (ak.optim.ASkewSGD, torch.optim.SGD)
    optimizer, other = ours(ak.param_groups(model), lr=0.05), torchs(plain.parameters(), lr=0.05)
    recipe = ak.Recipe(model, optimizer, 10, start=0.4, full=None, freeze=0.5)
    x = torch.randn(16, 6)
    for k in range(10):
        floating = k < 4
        assert not floating or torch.allclose(model(x), plain(x), atol=1e-6)  # AdamW is not torch's bit for bit
        for net, stepped in ((model, optimizer), (plain, other)):
            stepped.zero_grad()
            net(x).square().mean().backward()
            stepped.step()
        recipe.step()
        same = all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
        assert same == floating
        if floating:
            expected = model(x).detach()
            assert not torch.equal(model.eval()(x), expected) or k == 3  # in eval what will be shipped
            model.train()
    assert torch.equal(model(x), model.eval()(x))


def test_start_is_taken_up_again_and_copied():
    model, _ = two_nets()
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    recipe = ak.Recipe(model, optimizer, 10, start=0.4, full=None)
    recipe.step()
    x = torch.randn(4, 6)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    again, _ = two_nets()
    again.load_state_dict(model.state_dict())
    assert not torch.equal(again(x), model(x))
    resumed = ak.Recipe(again, ak.optim.ASkewSGD(ak.param_groups(again), lr=0.05), 10, start=0.0)
    resumed.load_state_dict(recipe.state_dict())
    assert torch.equal(again(x), model(x))
    for _ in range(3):
        resumed.step()
    assert not torch.equal(again(x), model(x))
    old = {key: value for key, value in recipe.state_dict().items() if key not in ("start", "full")}
    resumed.load_state_dict(old)  # of before there was a start
    assert resumed.start is None and resumed.full is None


@pytest.mark.parametrize("config", [
    {"scale": "lsq"}, {"activation": ak.quant.Uniform(8), "activation_scale": "lsq"},
    {"activation": ak.quant.Uniform(8, signed=False), "activation_scale": "lsq+", "scale": "lsq"},
    {"forward": "int8", "scale": "lsq"},
], ids=lambda config: " ".join(map(str, config.values())))  # fmt: skip
def test_what_is_learned_has_a_gradient_from_the_first_step(config):
    """A parameter without one would be missed by DistributedDataParallel; the float weights are computed with."""
    model = two_nets(**config)[0]
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    recipe, x = ak.Recipe(model, optimizer, 10, start=0.3, full=0.6), torch.randn(4, 6).abs()
    for k in range(8):
        y, layer = model(x), model[0]
        if k <= 3 and config.get("forward") != "int8":
            given = layer.forward_input(x)
            assert torch.equal(given, x) == ("activation" not in config)
            torch.testing.assert_close(
                layer(x), functional.linear(given, layer.weight, layer.bias), rtol=1e-5, atol=1e-6
            )
        optimizer.zero_grad()
        y.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), k
        scales = [p for name, p in model.named_parameters() if name.endswith("scale") and p.requires_grad]
        assert scales and all(p.grad.any() for p in scales), k  # an offset's is 0 while no input is outside the hull
        optimizer.step()
        recipe.step()


# ---- on the way from float weights to quantized ones ----------------------------------------------------------------


def soft(layer, slack):
    return ak.ops.soft_quantize(layer.weight, layer.weight_scale, layer.config.weight, slack)


@pytest.mark.parametrize("adam", [False, True])
def test_layers_go_over_from_start_to_full(adam):
    """Slack falls from 1 to 0 as a line; the gradient goes straight through, outside the hull too."""
    model, _ = two_nets()
    ours = ak.optim.ASkewAdamW if adam else ak.optim.ASkewSGD
    optimizer = ours(ak.param_groups(model), lr=0.05)
    recipe = ak.Recipe(model, optimizer, 10, start=0.2, full=0.6)
    x, layer = torch.randn(16, 6), model[0]
    for k, slack in enumerate((1, 1, 1, 0.75, 0.5, 0.25, 0, 0)):
        assert recipe.slack_at(k) == slack
        wanted = soft(layer, slack) if slack else layer.quantized_weight()
        assert torch.equal(layer(x), functional.linear(x, layer.weight if slack == 1 else wanted, layer.bias))
        assert torch.equal(layer.forward_weight(), layer.weight if slack == 1 else wanted)
        hard = layer.eval()(x)
        assert torch.equal(hard, functional.linear(x, layer.quantized_weight(), layer.bias))
        layer.train()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if 0 < slack < 1:
            y = layer.weight.detach().clone().requires_grad_()
            (grad,) = torch.autograd.grad(layer(x).sum(), layer.weight)
            functional.linear(x, y, layer.bias).sum().backward()
            assert torch.equal(grad, y.grad)
        optimizer.step()
        recipe.step()


@pytest.mark.parametrize(
    "options", [{"start": 0.4, "full": None, "freeze": 0.5}, {"start": 0.0, "full": 0.4, "freeze": 0.5}]
)
def test_what_is_frozen_is_computed_with_by_copies_and_averages_too(options, silent):
    """Their flag is written by others while they train, and no recipe tells them that the way is over."""
    model, _ = two_nets()
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    recipe, x = ak.Recipe(model, optimizer, 10, **options), torch.randn(16, 6)
    kept, average = copy.deepcopy(model), AveragedModel(model)
    for _ in range(10):
        model(x).square().mean().backward()
        optimizer.step()
        recipe.step()
        average.update_parameters(model)
    kept.load_state_dict(model.state_dict())
    assert torch.equal(kept(x), model.eval()(x))
    y = average(x)  # in training, as update_bn calls it
    assert torch.equal(y, average.eval()(x))


def test_what_is_frozen_early_is_computed_with_until_an_earlier_state_comes_back():
    model, _ = two_nets()
    recipe = ak.Recipe(model, ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05), 10)
    recipe.step()
    before, x = copy.deepcopy((model.state_dict(), recipe.state_dict())), torch.randn(16, 6)
    y = model(x)
    with pytest.warns(UserWarning, match="finish"):
        recipe.finish()
    with torch.no_grad():
        model[0].weight.mul_(1.1)  # off its levels
    assert torch.equal(model(x), copy.deepcopy(model).eval()(x))
    recipe.load_state_dict(before[1])  # in either order
    model.load_state_dict(before[0])
    assert torch.equal(model(x), y) and not torch.equal(y, model.eval()(x))


def test_layers_that_come_on_the_way_go_along():
    model, added = two_nets()[0], two_nets()[0]
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    recipe = ak.Recipe(model, optimizer, 20, start=0.4, full=0.6)
    for group in ak.param_groups(added):
        optimizer.add_param_group(group)
    for k in range(1, 14):
        recipe.step()
        theirs, mine = added[0].quantizer, model[0].quantizer
        assert (theirs.floating, theirs.slack) == (mine.floating, mine.slack) and theirs.floating == (k <= 8)


def test_levels_are_multiplied_from_midway_on():
    model, _ = two_nets(forward="int8")
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    recipe = ak.Recipe(model, optimizer, 10, start=0.0, full=0.6)
    x, layer = torch.randn(16, 6), model[0]
    for k in range(8):
        floating = recipe.slack_at(k) > 0.5
        assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias)) == floating == (k < 3)
        optimizer.step()
        recipe.step()


def test_copies_and_resumed_trainings_stand_where_these_do(silent):
    model, _ = two_nets()
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    recipe = ak.Recipe(model, optimizer, 10, start=0.0, full=0.6)
    x = torch.randn(4, 6)
    for _ in range(3):
        optimizer.step(), recipe.step()
    copied, (again, held, twin) = copy.deepcopy(model), copy.deepcopy((model, optimizer, recipe))
    assert torch.equal(copied(x), model(x)) and torch.equal(again(x), model(x))
    fresh, _ = two_nets()
    resumed = ak.Recipe(fresh, ak.optim.ASkewSGD(ak.param_groups(fresh), lr=0.05), 10)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(recipe.state_dict())
    assert torch.equal(fresh(x), model(x))
    for o, r in ((optimizer, recipe), (held, twin)):
        o.step(), r.step()
    resumed.step()
    assert torch.equal(again(x), model(x)) and torch.equal(fresh(x), model(x))
    assert not torch.equal(copied(x), model(x))  # it has no recipe


def learned_gradient(w, s, g, grid):
    """LSQ's in float64, one scale a row: g times Q - w/s inside the hull, times the end's level outside."""
    w, s, g = w.detach().double(), s.detach().double()[:, None], g.double()
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    x = w / s
    q = levels[(x[..., None] - levels).abs().argmin(-1)]
    error = torch.where((x >= levels[0]) & (x <= levels[-1]), q - x, q)
    return (g * error).sum(1) / (w.shape[1] * grid.c_max) ** 0.5


@pytest.mark.parametrize(
    "grid", [ak.quant.Ternary(), ak.quant.Uniform(2), ak.quant.Midrise(2), ak.quant.NF4()], ids=str
)
@pytest.mark.parametrize("adam", [False, True])
def test_learned_scales_learn_on_the_way(grid, adam):
    """What is computed with, the weight's gradient straight through, and LSQ's for the scale, from first to last."""
    torch.manual_seed(1)
    model = ak.quantize_(nn.Sequential(nn.Linear(24, 5)), ak.QuantConfig(weight=grid, scale="lsq"))
    layer, x = model[0], torch.randn(16, 24)
    ours = ak.optim.ASkewAdamW if adam else ak.optim.ASkewSGD
    optimizer = ours(ak.param_groups(model), lr=0.02)
    recipe = ak.Recipe(model, optimizer, 10, full=0.6, freeze=0.8)
    before = layer.weight_scale.detach().clone()
    for k in range(8):
        slack, scale = recipe.slack_at(k), layer.weight_scale.detach().clone()
        assert layer.quantizer.softened == (slack > 0) and not layer.quantizer.frozen
        wanted = ak.ops.soft_quantize(layer.weight, scale, grid, slack) if slack else layer.quantized_weight()
        optimizer.zero_grad()
        y = layer(x)
        assert torch.equal(y, functional.linear(x, wanted, layer.bias))
        assert torch.equal(layer.forward_weight(), wanted.detach())
        y.square().sum().backward()
        g = (2 * y.detach()).T @ x
        found = layer.quantizer.learned.grad
        torch.testing.assert_close(found, learned_gradient(layer.weight, scale, g, grid).float(), rtol=1e-4, atol=1e-4)
        if slack:
            torch.testing.assert_close(layer.weight.grad, g, rtol=1e-5, atol=1e-5)
        optimizer.step()
        recipe.step()
    assert not torch.equal(layer.weight_scale, before)
    optimizer.step()
    assert layer.quantizer.frozen and torch.equal(model(x), model.eval()(x))


@pytest.mark.parametrize("config", [{}, {"granularity": "per_tensor"}, {"granularity": "per_group", "group_size": 2},
                                    {"activation": ak.quant.Uniform(8)}, {"scale": "lsq"}])  # fmt: skip
def test_compiled_layers_go_over_too(config):
    model, _ = two_nets(**config)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    recipe = ak.Recipe(model, optimizer, 10, start=0.0, full=0.7)
    torch.compiler.reset()
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 6)
    for _ in range(4):
        optimizer.step(), recipe.step()
        wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(compiles) == 1  # slack is a tensor: its values are no other graphs


def test_functional_calls_and_half_precision_go_over_too():
    model, _ = two_nets()
    ak.Recipe(model, optimizer := ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05), 10, full=0.6).step(3)
    assert optimizer
    x = torch.randn(4, 6)
    found = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    torch.testing.assert_close(found, model(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), found, rtol=0.05, atol=0.05)
    halved = model.bfloat16()
    torch.testing.assert_close(halved(x.bfloat16()).float(), found, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("options", "name"), [
    (dict(full=1.2), "full"), (dict(full=0.9), "full"), (dict(start=0.5, full=0.4), "full"),
    (dict(start=0.8), "start"), (dict(full="1"), "full"),
])  # fmt: skip
def test_full_is_checked(options, name):
    model, _ = two_nets()
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05)
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
        ak.Recipe(model, optimizer, 100, **options)
    with pytest.raises((ValueError, TypeError), match="^full: expected"):
        ak.EpsilonAnnealing(optimizer, total=100, start=50, full=40)


class Reading(nn.Module):
    """Multiplies by the weight of its second layer itself, as attentions with biases of their own for queries do."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv1d(3, 6, 1), nn.Linear(6, 6), nn.Linear(6, 2)
        self.spare = nn.Linear(6, 6)  # neither called nor read

    def forward(self, x):
        return self.last(functional.linear(self.first(x).mT, self.second.weight, self.second.bias))


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_that_are_trained_and_never_called_are_told(compiled):
    model = ak.quantize_(Reading())
    optimizer = ASkewSGD(ak.param_groups(model), lr=0.1)
    recipe, forward = ak.Recipe(model, optimizer, 4), torch.compile(model, backend="aot_eager") if compiled else model
    told = []
    for call in (*[recipe.step] * 4, recipe.finish):
        optimizer.zero_grad()
        forward(torch.ones(2, 3, 4)).square().sum().backward()
        optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        told.append(" ".join(str(w.message) for w in caught))
    assert all("1 quantized layers have a gradient and were never called (second)" in text for text in told[::4])
    assert not any(told[1:4])


def test_gradients_of_before_and_layers_that_serve_are_not_told():
    model = nn.Sequential(nn.Linear(6, 6), nn.MultiheadAttention(6, 2), nn.ConvTranspose1d(6, 3, 2))
    x = torch.randn(4, 2, 6)

    def backward():
        h = model[1](*[model[0](x)] * 3)[0]
        model[2](h.permute(1, 2, 0)).sum().backward()

    backward()
    ak.quantize_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ak.hard_quantize_(model)  # a float model's gradients are still there
        model.zero_grad()
        ak.quantize_(ak.dequantize_(model))
        backward()
        ak.hard_quantize_(model)
