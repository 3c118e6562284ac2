"""Contract: EpsilonAnnealing is a scheduler as torch and Lightning understand one, and its defaults are the recipe.

(Its formulas, its checks of arguments and its way through tensors and checkpoints are in test_optimizers.py.)
1. Nothing given but ``total``: gap of power 12, a tenth of hold, a kept pull; other modes keep their published meaning.
2. It is an LRScheduler that leaves learning rates alone; its state is JSON; Lightning steps it and resumes from it.
3. The kept pull belongs to the largest learning rate so far, whatever warms it up, whoever steps first.
4. A wrong order of steps, and an annealing that starts over on a state that is annealed, warn; right use never does.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.annealing import RECIPES, Settings, family_of
from askew_kernels.optim import SAM, ASkewAdamW, ASkewSGD
from askew_kernels.quant import Uniform

EPSILON = 1e-12


def problem(optimizer=ASkewSGD, **options):
    torch.manual_seed(0)
    model = ak.quantize_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    return model, optimizer(ak.param_groups(model), lr=0.1, **options)


def descend(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()


def group(optimizer):
    return next(g for g in optimizer.param_groups if g.get("grid") is not None)


@pytest.fixture
def silent():
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- defaults -------------------------------------------------------------------------------------------------------


def test_defaults_are_the_recipe():
    _, optimizer = problem()
    short = ak.EpsilonAnnealing(optimizer, total=200)
    row, steps = RECIPES["sgd"], 200 / RECIPES["sgd"].end
    shares = ("start", "full", "hold", "freeze")
    periods = {key: round(getattr(row, key) * steps) for key in shares}
    options = {key: getattr(row, key) for key in ("mode", "power", "outer_power", "keep_pull", "clamp")}
    long = ak.EpsilonAnnealing(optimizer, total=200, **periods, **options)
    assert short.state_dict() == long.state_dict()
    assert ak.EpsilonAnnealing(optimizer, total=np.int64(200)).hold == periods["hold"]


def test_with_a_hold_scales_freeze_when_it_ends_and_all_groups_are_alike():
    _, optimizer = problem()
    annealing = ak.EpsilonAnnealing(optimizer, hold=20, total=200)
    assert annealing.power == 12.0 and annealing.keep_pull is True
    for k in (0, 20, 21, 199):
        assert annealing.frozen_at(k) == annealing.frozen_at(k, outer=True) == (k > 20)
        assert annealing.eps_at(k) == annealing.eps_at(k, outer=True)
    assert ak.EpsilonAnnealing(optimizer, total=200, hold=0).hold == 0


def test_each_family_of_optimizers_has_its_row(monkeypatch):
    assert family_of(problem()[1]) == "sgd" and family_of(problem(ASkewAdamW)[1]) == "adam"
    row = Settings(hold=0.4, end=0.8, mode="linear", keep_pull=False, freeze=0.2, outer_hold=None, outer_freeze=0.6)
    monkeypatch.setitem(RECIPES, "adam", row)
    annealing = ak.EpsilonAnnealing(problem(ASkewAdamW)[1], total=40)
    assert (annealing.hold, annealing.mode, annealing.keep_pull, annealing.freeze) == (20, "linear", False, 10)
    assert (annealing.outer_hold, annealing.outer_freeze) == (None, 30)
    row = RECIPES["sgd"]
    assert ak.EpsilonAnnealing(problem()[1], total=round(100 * row.end)).hold == round(row.hold * 100)


@pytest.mark.parametrize("options", [dict(mode="geometric", decay=0.96), dict(mode="linear", total=9),
                                     dict(mode="cosine", total=9)], ids=lambda o: o["mode"])  # fmt: skip
def test_other_modes_are_as_published(options):
    _, optimizer = problem()
    annealing = ak.EpsilonAnnealing(optimizer, **options)
    assert annealing.hold == 0 and annealing.keep_pull is False


@pytest.mark.parametrize(("options", "error"), [
    (dict(total=10.0), TypeError), (dict(total=True), TypeError), (dict(total=-3), ValueError),
    (dict(hold=0.1, total=10), TypeError), (dict(hold="1", total=10), TypeError),
    (dict(power="2", total=10), TypeError), (dict(total=10, power=True), TypeError),
    (dict(keep_pull=1, total=10), TypeError),
], ids=str)  # fmt: skip
def test_arguments_are_checked(options, error):
    with pytest.raises(error, match="^(total|hold|power|keep_pull): "):
        ak.EpsilonAnnealing(problem()[1], **options)


# ---- a scheduler ----------------------------------------------------------------------------------------------------


def test_it_is_a_scheduler_of_torch(silent):
    model, optimizer = problem()
    annealing = ak.EpsilonAnnealing(optimizer, hold=1, total=4)
    assert isinstance(annealing, torch.optim.lr_scheduler.LRScheduler)
    before = copy.deepcopy([set(g) - {"annealing"} for g in optimizer.param_groups])
    for k in range(1, 4):
        descend(model, optimizer)
        annealing.step()
        assert annealing.last_epoch == k and annealing.get_last_lr() == [g["lr"] for g in optimizer.param_groups]
    assert annealing.base_lrs == annealing.get_last_lr() == [0.1] * len(optimizer.param_groups)
    assert [set(g) - {"annealing"} for g in optimizer.param_groups] == before  # no "initial_lr" that another would take
    annealing.step(1)
    assert annealing.last_epoch == 1 and group(optimizer)["eps"] == 1.0
    for epoch, error in ((-1, ValueError), (0.5, TypeError)):
        with pytest.raises(error, match="^epoch"):
            annealing.step(epoch)


def test_chained_with_another(silent):
    model, optimizer = problem()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    both = torch.optim.lr_scheduler.ChainedScheduler([cosine, ak.EpsilonAnnealing(optimizer, hold=1, total=8)])
    for _ in range(5):
        descend(model, optimizer)
        both.step()
    assert group(optimizer)["alpha"] * group(optimizer)["lr"] == pytest.approx(0.1)
    assert both.get_last_lr() == [g["lr"] for g in optimizer.param_groups]


def test_state_is_json():
    model, optimizer = problem()
    annealing = ak.EpsilonAnnealing(optimizer, hold=np.int64(2), total=9, power=np.float64(3))
    for _ in range(5):
        descend(model, optimizer)
        annealing.step()
    state = json.loads(json.dumps(annealing.state_dict()))
    other = ak.EpsilonAnnealing(problem()[1], total=99)
    other.load_state_dict(state)
    assert other.state_dict() == annealing.state_dict() and other.get_last_eps() == annealing.get_last_eps()
    state["_first"]["0"][0] = 7.0
    assert other.state_dict()["_first"]["0"][0] != 7.0  # a copy


def test_another_schedulers_state_is_refused():
    _, optimizer = problem()
    annealing = ak.EpsilonAnnealing(optimizer, total=9)
    before = annealing.state_dict()
    with pytest.raises(ValueError, match="^state_dict: .*T_max"):
        annealing.load_state_dict(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9).state_dict())
    assert annealing.state_dict() == before


def test_copies_look_at_their_own_optimizer(silent):
    model, optimizer = problem()
    annealing = ak.EpsilonAnnealing(optimizer, total=20)
    descend(model, optimizer)
    twin = copy.deepcopy(annealing)
    group(twin.optimizer)["lr"] = 0.05
    for g in twin.optimizer.param_groups:
        for p in g["params"]:
            p.grad = torch.zeros_like(p)
    twin.optimizer.step()
    assert group(twin.optimizer)["alpha"] == 2.0 and group(optimizer)["alpha"] == 1.0
    assert pickle.loads(pickle.dumps(annealing)).state_dict() == annealing.state_dict()


def test_lightning_steps_and_resumes(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer = problem()

        def training_step(self, batch, index):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            self.annealing = ak.EpsilonAnnealing(self.optimizer, hold=2, total=8)
            return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": self.annealing, "interval": "step"}}

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(5, 6)), batch_size=1)

    def trainer(epochs):
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip

    task = Task()
    first = trainer(1)
    first.fit(task, loader)
    assert task.annealing.last_epoch == 5 and group(task.optimizer)["eps"] == task.annealing.eps_at(5) < 1
    first.save_checkpoint(tmp_path / "run.ckpt")
    again = Task()
    trainer(2).fit(again, loader, ckpt_path=tmp_path / "run.ckpt")
    assert again.annealing.last_epoch == 10 and group(again.optimizer)["eps"] == pytest.approx(1.6e-5)


# ---- the kept pull --------------------------------------------------------------------------------------------------

WARM_UPS = {
    "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1e-3, total_iters=6),
    "from zero": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: min(1.0, k / 6)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40, pct_start=0.15),
}


@pytest.mark.parametrize("annealing_first", [False, True])
@pytest.mark.parametrize("name", WARM_UPS)
def test_a_warm_up_is_not_the_reference(name, annealing_first, silent):
    """From the full learning rate on, alpha lr is alpha_0 lr_max, at every step; before, alpha is what was given."""
    model, optimizer = problem(alpha=0.7)
    annealing = ak.EpsilonAnnealing(optimizer, hold=8, total=30) if annealing_first else None
    schedule = WARM_UPS[name](optimizer)
    annealing = annealing or ak.EpsilonAnnealing(optimizer, hold=8, total=30)
    top = 0.1 if annealing_first else 0.0
    for k in range(30):
        g = group(optimizer)
        top = max(top, g["lr"])
        descend(model, optimizer)
        if g["lr"] > 0:
            assert g["alpha"] * g["lr"] == pytest.approx(0.7 * top)
        if k >= 7:
            assert top == pytest.approx(0.1)
        schedule.step()
        annealing.step()


@pytest.mark.parametrize("tensor", [False, True])
def test_alpha_follows_a_rate_that_moves_between_the_periods(tensor, silent):
    """The learning rate counts batches, the annealing epochs: no step takes a pull of another rate, and none warns."""
    model, optimizer = problem(ASkewAdamW)
    if tensor:
        for g in optimizer.param_groups:
            g["lr"] = torch.tensor(0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    annealing = ak.EpsilonAnnealing(optimizer, hold=1, total=9)
    for _ in range(6):
        for _ in range(5):
            descend(model, optimizer)
            assert group(optimizer)["alpha"] * float(group(optimizer)["lr"]) == pytest.approx(0.1)
            schedule.step()
        annealing.step()


def test_the_rate_counts_epochs_and_the_annealing_batches(silent):
    model, optimizer = problem()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    annealing = ak.EpsilonAnnealing(optimizer, total=40)
    for _ in range(4):
        for _ in range(4):
            descend(model, optimizer)
            annealing.step()
            assert group(optimizer)["alpha"] * group(optimizer)["lr"] == pytest.approx(0.1)
        schedule.step()


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_step_before_the_optimizers_warns():
    _, optimizer = problem()
    with pytest.warns(UserWarning, match="before the first optimizer.step"):
        ak.EpsilonAnnealing(optimizer, total=9).step()


def test_step_before_the_lr_schedulers_warns_once():
    model, optimizer = problem()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    annealing = ak.EpsilonAnnealing(optimizer, total=40)
    with pytest.warns(UserWarning, match="before the LR scheduler") as caught:
        for _ in range(6):
            descend(model, optimizer)
            annealing.step()
            schedule.step()
            assert group(optimizer)["alpha"] > 0
    assert len(caught) == 1
    descend(model, optimizer)
    assert group(optimizer)["alpha"] * group(optimizer)["lr"] == pytest.approx(0.1)  # and it is right all the same


def sam(params, lr):
    return SAM(params, ASkewSGD, rho=0.05, lr=lr)


def test_a_sharpness_aware_optimizer_is_seen_to_step(silent):
    model, optimizer = problem(sam)
    annealing = ak.EpsilonAnnealing(optimizer, total=9)

    def closure():
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    annealing.step()
    by_hand = ak.EpsilonAnnealing(optimizer, total=9)
    closure(), optimizer.first_step(zero_grad=True), closure(), optimizer.second_step()
    by_hand.step()


def run(steps, **options):
    model, optimizer = problem()
    annealing = ak.EpsilonAnnealing(optimizer, hold=2, total=20, **options)
    for _ in range(steps):
        descend(model, optimizer)
        annealing.step()
    return model, optimizer, annealing


@pytest.mark.parametrize("steps", [4, 12, 25], ids=["begun", "half way", "finished"])
@pytest.mark.parametrize("what", ["optimizer first", "optimizer later", "the same optimizer", "model alone"])
def test_starting_over_warns(what, steps):
    model, optimizer, _ = run(steps)
    other, fresh = problem()
    other.load_state_dict(model.state_dict())
    if what == "the same optimizer":
        other, fresh = model, optimizer
    elif what == "optimizer first":
        fresh.load_state_dict(optimizer.state_dict())
    annealing = ak.EpsilonAnnealing(fresh, hold=2, total=20)
    if what == "optimizer later":
        fresh.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="annealed already.*load_state_dict") as caught:
        for _ in range(3):
            descend(other, fresh)
            annealing.step()
    assert len(caught) == 1


@pytest.mark.parametrize("steps", [0, 1, 4, 25])
@pytest.mark.parametrize("first", ["optimizer", "annealing", "annealing made last"])
def test_resuming_with_its_state_is_silent(first, steps, silent):
    model, optimizer, annealing = run(steps)
    other, fresh = problem()
    other.load_state_dict(model.state_dict())
    if first == "annealing made last":
        fresh.load_state_dict(optimizer.state_dict())
    again = ak.EpsilonAnnealing(fresh, hold=2, total=20)
    if first == "optimizer":
        fresh.load_state_dict(optimizer.state_dict())
    again.load_state_dict(annealing.state_dict())
    if first == "annealing":
        fresh.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        for m, o, a in ((model, optimizer, annealing), (other, fresh, again)):
            descend(m, o)
            a.step()
        assert group(fresh)["eps"] == group(optimizer)["eps"] and group(fresh)["alpha"] == group(optimizer)["alpha"]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("options", [dict(freeze_scale="init"), dict(freeze_scale="never"), dict(scale=torch.ones(4))],
                         ids=["init", "never", "given"])  # fmt: skip
def test_scales_that_do_not_follow_the_annealing_are_no_sign_of_it(options, silent):
    w = nn.Parameter(torch.randn(4, 8))
    optimizer = ASkewSGD([{"params": [w], "grid": Uniform(4), **options}], lr=0.1)
    w.grad = torch.randn(4, 8)
    optimizer.step()
    annealing = ak.EpsilonAnnealing(optimizer, total=20)
    optimizer.step()
    annealing.step()


def test_a_dropped_annealing_lets_go(silent):
    model, optimizer = problem()
    for _ in range(3):
        ak.EpsilonAnnealing(optimizer, total=20)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    group(optimizer)["alpha"] = 3.0
    group(optimizer)["lr"] = 0.01
    descend(model, optimizer)
    assert group(optimizer)["alpha"] == 3.0  # nobody keeps the pull any more


@pytest.mark.parametrize("lr", ["host", "tensor", "tensor there"])
@pytest.mark.parametrize("optimizer", [ASkewSGD, ASkewAdamW])
def test_alpha_stays_finite(optimizer, lr, monkeypatch):
    """However small the learning rate becomes, and the weights stay where they are between their levels."""
    model, opt = problem(optimizer)
    there = lr == "tensor there"
    if there:  # as on a GPU, which is not waited for
        monkeypatch.setattr("askew_kernels.annealing._elsewhere", lambda value: isinstance(value, torch.Tensor))
    for g in opt.param_groups:
        if lr != "host":
            g["lr"], g["alpha"] = torch.tensor(0.1), torch.tensor(1.0) if there else 1.0
    annealing = ak.EpsilonAnnealing(opt, total=12, mode="linear", keep_pull=True)
    for rate in (0.1, 1e-20, 1e-30, 1e-38, 1e-42, 1e-45, 5e-324, 0.0, 0.05):
        for g in opt.param_groups:
            g["lr"] = g["lr"].fill_(rate) if lr != "host" else rate
        before = [p.detach().clone() for p in model.parameters()]
        descend(model, opt)
        annealing.step()
        assert all(p.isfinite().all() for p in model.parameters())
        if rate < 1e-10:  # no further than a quarter of a bracket, where the hull did not clamp
            for layer, old in ((model[0], before[0]), (model[2], before[2])):
                scale = layer.weight_scale.reshape(-1, 1)
                inside = (layer.weight.abs() < 7 * scale) & (old.abs() < 7 * scale)
                assert inside.any() and (((layer.weight - old).abs() <= 0.26 * scale) | ~inside).all(), rate
        assert 1.0 <= float(group(opt)["alpha"]) < torch.finfo(torch.float32).max
    assert float(group(opt)["alpha"]) == pytest.approx(2.0)
