"""Contract: what a quantized layer computes follows from its weight and its three buffers, and from nothing else.

1. Whatever copy of a model has its weights and buffers computes the same, bit for bit, in every phase (untrained, hold,
   frozen, hard-quantized), and taking it changes nothing in the model.
2. Where a checkpoint holds no scale, loading says so by the layer's name; a frozen scale stays; a float checkpoint that
   says it is one loads in silence.
3. Nothing made inside a mode (fake tensors, meta, inference, another default type, a transform) is kept for outside.
4. Derivatives of every kind are those of the straight-through network.
5. A layer that takes another's place keeps its hooks; what stays float is told; what cannot be is refused by name.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import re
import threading
import time
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

import askew_kernels as ak
from askew_kernels.nn import AskewConv2d, AskewLinear
from askew_kernels.nn.layers import STATE
from askew_kernels.quant import Binary, QuantConfig, Ternary, Uniform, WeightQuantizer, compute_scale

PHASES = ("untrained", "hold", "frozen", "hard")
CONFIGS = {
    "4 bits": QuantConfig(Uniform(4)), "binary": QuantConfig(Binary()),
    "relaxed": QuantConfig(Uniform(3), "absmax", forward="relaxed"),
    "group mse": QuantConfig(Ternary(), "mse", "per_group", 2),
    "tensor": QuantConfig(Uniform(2), "absmax", "per_tensor"),
}  # fmt: skip
X = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A convolution, two linear layers with one weight, a norm."""

    def __init__(self, config=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.one, self.two, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)
        self.two.weight = self.one.weight
        if config is not None:
            ak.quantize_(self, config)

    def forward(self, x):
        h = functional.relu(self.norm(self.conv(x))).flatten(1)
        return self.out(functional.relu(self.two(functional.relu(self.one(h)))))


def model_in(phase, config=CONFIGS["4 bits"], optimizer=ak.optim.ASkewSGD):
    torch.manual_seed(0)
    model = Net(config)
    if phase == "untrained":
        return model
    step = optimizer(ak.param_groups(model), lr=0.05)
    for i in range(4):
        for group in step.param_groups:
            group["constraint_eps"] = 1.0 if phase == "hold" or i < 2 else 0.4
        step.zero_grad()
        model(X).square().sum().backward()
        step.step()
    if phase == "hard":
        ak.hard_quantize_(model)
    return model


def through_file(what, **options):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, **options)


def loaded(model, state, **options):
    fresh = Net(model.conv.config)
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1)  # and its scales are known by now
    fresh.eval()(X)
    fresh.load_state_dict(state, strict=True, **options)
    return fresh


def on_meta(model):
    with torch.device("meta"):
        fresh = Net(model.conv.config)
    fresh = fresh.to_empty(device="cpu")
    assert not any(t.is_meta for t in [*fresh.parameters(), *fresh.buffers()])
    fresh.state_dict()
    fresh.load_state_dict(model.state_dict())
    return fresh


def assigned_on_meta(model):
    with torch.device("meta"):
        fresh = Net(model.conv.config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    return fresh


def averaged(model):
    average = AveragedModel(Net(model.conv.config))
    average.update_parameters(model)
    return average.module


def averaged_with_buffers(model):
    average = AveragedModel(Net(model.conv.config), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    return average.module


def swapped(model):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return loaded(model, model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def by_safetensors(model, tmp_path):
    from safetensors.torch import load_model, save_model

    save_model(model, str(tmp_path / "model.safetensors"))
    fresh = Net(model.conv.config)
    load_model(fresh, str(tmp_path / "model.safetensors"))
    return fresh


def written_raw(model):
    """As loaders write that do not call ``load_state_dict``."""
    fresh = Net(model.conv.config)
    with torch.no_grad():
        for kind in ("named_parameters", "named_buffers"):
            for (_, to), (_, value) in zip(getattr(fresh, kind)(), getattr(model, kind)(), strict=True):
                to.copy_(value)
    return fresh


COPIES = {
    "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: through_file(m, weights_only=False),
    "state_dict": lambda m: loaded(m, through_file(m.state_dict(), weights_only=True)),
    "assign": lambda m: loaded(m, copy.deepcopy(m.state_dict()), assign=True),
    "meta": on_meta, "meta, assign": assigned_on_meta, "average": averaged, "average, buffers": averaged_with_buffers,
    "swap": swapped, "raw": written_raw,
}  # fmt: skip


def eval_outputs(model):
    was = model.training
    with torch.no_grad():
        found = model.eval()(X)
    model.train(was)
    return found


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, ak.optim.MSAM], ids=["alone", "MSAM"])
def test_a_pickled_optimizer_may_step_before_the_model_is_called(wrap, order):
    """Model and optimizer in one file, in either order: the layers know the scales that the step was made with."""
    model = Net(QuantConfig(Uniform(2), ste_clip="step" if wrap is not ak.optim.MSAM else True))
    optimizer = wrap(ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05, momentum=0.9))

    def gradients(model):
        optimizer.zero_grad()
        model(X).square().mean().backward()

    gradients(model)
    optimizer.first_step() if wrap is ak.optim.MSAM else None
    optimizer.step()
    gradients(model)
    both = (model, optimizer)[::order], pickle.loads(pickle.dumps((model, optimizer)[::order]))
    outputs = []
    for net, stepped in (pair[::order] for pair in both):
        for p, q in zip(net.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        if wrap is ak.optim.MSAM:
            stepped.first_step()
            outputs.append(net(X))
        stepped.step()
        outputs.append(eval_outputs(net))
        outputs += [layer.weight_scale.clone() for layer in ak.nn.quantized_layers(net).values()]
    half = len(outputs) // 2
    assert all(torch.equal(a, b) for a, b in zip(outputs[:half], outputs[half:], strict=True))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("how", COPIES)
def test_every_copy_computes_the_same(how, config, phase):
    model = model_in(phase, CONFIGS[config])
    want = eval_outputs(copy.deepcopy(model)) if how != "deepcopy" else None
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = COPIES[how](model)
    got = eval_outputs(other)
    assert torch.equal(got, eval_outputs(model))
    if want is not None:
        assert torch.equal(got, want)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name in ("conv", "one", "two", "out"):
        layer, twin = getattr(model, name), getattr(other, name)
        assert twin.quantizer.frozen == layer.quantizer.frozen == (phase in ("frozen", "hard"))
        assert torch.equal(layer.weight_scale, twin.weight_scale) and twin.weight is not layer.weight
    if how not in ("assign", "meta", "meta, assign"):  # where torch unties weights
        assert other.one.weight is other.two.weight and other.one.quantizer is other.two.quantizer
    # and trains as it does
    for m in (model, other):
        optimizer = ak.optim.ASkewSGD(ak.param_groups(m), lr=0.05)
        optimizer.zero_grad()
        m.train()(X).square().sum().backward()
        optimizer.step()
    if how in ("assign", "meta", "meta, assign"):
        return
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(eval_outputs(model), eval_outputs(other))


def test_the_rule_that_reads_the_weight_runs_once_for_each_weight(monkeypatch):
    """A step that finds the scale of the forward before it searches for none; nor does freezing."""
    searched, search = [], ak.ops.run_mse_scales
    monkeypatch.setattr(ak.ops, "run_mse_scales", lambda *arguments: searched.append(1) or search(*arguments))
    model = ak.quantize_(nn.Sequential(nn.Linear(6, 4)), QuantConfig(Ternary(), "mse"))
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1)
    counts = []
    for eps in (1.0, 1.0, 1.0, 0.5, 0.5):
        optimizer.param_groups[0]["constraint_eps"] = eps
        model(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
        counts.append(len(searched))
    assert counts == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("phase", PHASES)
def test_safetensors_with_a_shared_weight(phase, tmp_path):
    pytest.importorskip("safetensors")
    model = model_in(phase)
    assert torch.equal(eval_outputs(by_safetensors(model, tmp_path)), eval_outputs(model))


def test_an_average_made_before_freezing_gets_the_scales():
    torch.manual_seed(0)
    model = Net(CONFIGS["4 bits"])
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model, outer=False), lr=0.05)
    for i in range(6):
        optimizer.param_groups[0]["constraint_eps"] = 1.0 if i < 3 else 0.4
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    assert average.module.one.quantizer is not model.one.quantizer
    assert torch.equal(average.module.one.weight_scale, model.one.weight_scale)  # frozen, though the weights differ
    for _ in range(60):
        average.update_parameters(model)
    for p, q in zip(average.module.parameters(), model.parameters(), strict=True):
        p.detach().copy_(q)
    assert torch.equal(eval_outputs(average.module), eval_outputs(model))


FORWARDS = {
    "hard": QuantConfig(Uniform(3)), "int8": QuantConfig(Uniform(3), forward="int8"),
    "lsq": QuantConfig(Uniform(3), "lsq"), "lsq in bfloat16": QuantConfig(Uniform(3), "lsq", scale_dtype="bfloat16"),
    "8-bit inputs": QuantConfig(Uniform(3), activation=Uniform(8)),
}  # fmt: skip
BETWEEN = {
    "data": lambda m: [p.data.norm() for p in m.parameters()],
    "written": lambda m: [p.data.mul_(1) for p in m.parameters()],
    "moved": lambda m: m.to("cpu"), "cast": lambda m: m.float(), "saved": lambda m: m.state_dict(),
    "compiled": lambda m: torch.compile(m, backend="aot_eager")(torch.ones(3, 8)),
}  # fmt: skip


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("forward", FORWARDS)
def test_two_forwards_whose_backward_comes_after_both(forward, between):
    """Whoever looks at the weights between them: what the first has computed with is still there for its backward."""
    torch._dynamo.reset()

    def gradients(look):
        torch.manual_seed(0)
        model = ak.quantize_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), FORWARDS[forward])
        first = model(x[:5])
        look(model)
        (first.square().sum() + model(x[5:]).square().sum()).backward()
        return [p.grad for p in model.parameters()]

    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(2))
    for a, b in zip(gradients(lambda model: None), gradients(BETWEEN[between]), strict=True):
        torch.testing.assert_close(a, b)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kind", ["convolutions", "attention", "one weight"])
def test_two_forwards_of_other_kinds(kind, autocast):
    """The same of every layer that computes with a copy, also of one in bfloat16, or that two layers have."""
    tied = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    tied[2].weight = tied[0].weight
    made = {"convolutions": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 2, 3)),
            "attention": Attention(), "one weight": tied}[kind]  # fmt: skip
    x = torch.randn((2, 2, 3, 6, 6) if kind == "convolutions" else (2, 3, 5, 16))
    model = ak.quantize_(made, QuantConfig(Uniform(4)))

    def gradients(look):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = model(x[0])
            look(model)
            second = model(x[1])
        (first.square().sum() + second.square().sum()).backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(lambda model: None), gradients(BETWEEN["data"]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("base", [torch.optim.SGD, ak.optim.ASkewSGD])
def test_a_copy_is_made_in_the_memory_of_the_one_before(base):
    """Where no graph waits for that: a foreign optimizer, or an average that reads ``.data``, costs no memory anew."""
    model = ak.quantize_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    optimizer, places = base(model.parameters(), lr=0.1), set()
    for _ in range(4):
        sum(p.data.sum() for p in model.parameters())
        optimizer.zero_grad()
        model(torch.ones(3, 8)).square().sum().backward()
        optimizer.step()
        places.add(model[2].quantizer.quantized(model[2].weight).data_ptr())
    assert len(places) == 1


# ---- other processes -------------------------------------------------------------------------------------------------


def train_shared(model, by, sent):
    """In another process, which has this memory."""
    torch.set_num_threads(1)
    made = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05) if by == "ours" else None
    optimizer = made or torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    sent.put(eval_outputs(model).tolist())


@pytest.mark.parametrize("by", ["ours", "torch"])
@pytest.mark.parametrize("scale", ["sawb", "lsq"])
def test_memory_that_another_process_writes(scale, by):
    """Hogwild: nothing is kept of weights in shared memory, whose writes by others cannot be seen."""
    torch.manual_seed(0)
    model = Net(QuantConfig(Uniform(4), scale))
    before = eval_outputs(model)
    model.share_memory()
    assert torch.equal(eval_outputs(model), before)
    spawn = torch.multiprocessing.get_context("spawn")
    sent = spawn.Queue()
    other = spawn.Process(target=train_shared, args=(model, by, sent))
    other.start()
    other.join(300)
    assert other.exitcode == 0
    want = torch.tensor(sent.get(timeout=10))
    got = eval_outputs(model)
    assert not torch.equal(got, before) and torch.equal(got, eval_outputs(copy.deepcopy(model)))
    torch.testing.assert_close(got, want)  # computed by another number of threads
    assert torch.equal(eval_outputs(ak.hard_quantize_(model)), got)
    (model(X) + model(X.flip(0))).square().mean().backward()  # two forwards, whose copies both serve their backward
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


RECIPES = {
    "SGD": lambda groups: ak.optim.ASkewSGD(groups, lr=0.05, momentum=0.9),
    "Skewed": lambda groups: ak.optim.Skewed(torch.optim.AdamW(groups, lr=0.01)),
    "MSAM": lambda groups: ak.optim.MSAM(ak.optim.ASkewSGD(groups, lr=0.05, momentum=0.9), rho=0.3),
}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=str)
@pytest.mark.parametrize(
    "config", [QuantConfig(Uniform(4)), QuantConfig(Uniform(4), forward="int8")], ids=["hard", "int8"]
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pickle_of_model_optimizer_and_schedule_goes_on_alike(recipe, config, order):
    """Whichever is unpickled first, and though the layers have made no forward when schedule and optimizer ask."""

    def made():
        torch.manual_seed(0)
        model = ak.quantize_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), config)
        optimizer = RECIPES[recipe](ak.param_groups(model))
        return [model, optimizer, ak.Recipe(model, optimizer, 8, start=0.25, full=0.4)]

    def train(model, optimizer, schedule, steps):
        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure) if recipe == "MSAM" else (closure(), optimizer.step())
            schedule.step()
        return model.state_dict()

    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(2))
    expected = train(*made(), 8)
    for steps in (1, 3):
        run = made()
        train(*run, steps)
        twins = pickle.loads(pickle.dumps([run[i] for i in order]))
        found = train(*(twins[order.index(i)] for i in range(3)), 8 - steps)
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


# ---- checkpoints that are not whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["frozen", "hard"])
def test_a_frozen_scale_stays_and_loading_says_so(phase):
    model = model_in(phase)
    want = eval_outputs(model)
    best = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    with pytest.warns(UserWarning, match=r"one\.weight: the checkpoint has no weight_scale.*frozen scale stays"):
        model.load_state_dict(best, strict=False)
    assert torch.equal(eval_outputs(model), want)


def test_a_part_of_a_checkpoint_changes_only_that_part():
    model = model_in("frozen")
    before, scales = eval_outputs(model), [m.weight_scale.clone() for m in (model.conv, model.one, model.out)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith("bias")}, strict=False)
    assert torch.equal(eval_outputs(model), before)
    assert all(torch.equal(m.weight_scale, s) for m, s in zip((model.conv, model.one, model.out), scales, strict=True))


def test_parameters_alone_in_a_fresh_model_are_told_and_float_checkpoints_are_silent():
    trained, fresh = model_in("frozen"), Net(CONFIGS["4 bits"])
    with pytest.warns(UserWarning, match=r"conv\.weight: .*no weight_scale.*wrong for a part of a quantized one"):
        fresh.load_state_dict({k: v for k, v in trained.state_dict().items() if "weight_s" not in k}, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(through_file(Net().state_dict()), strict=True)
    assert torch.equal(fresh.out.weight_scale, compute_scale(fresh.out.weight, Uniform(4), "sawb"))


@pytest.mark.parametrize("times", [1.0, 0.5])
@pytest.mark.parametrize("config", ["4 bits", "tensor"])
def test_what_is_left_of_a_trained_checkpoint_is_quantized_by_its_own_scale(config, times):
    """Task arithmetic that takes a task away: start - times (trained - start), of whatever a state_dict holds."""
    start, trained = (model_in(phase, CONFIGS[config]).state_dict() for phase in ("untrained", "hard"))
    model = Net(CONFIGS[config]).eval()
    model.load_state_dict({key: start[key] - times * (trained[key] - start[key]) for key in start})
    layer = model.one
    scale = compute_scale(layer.weight.detach(), layer.config.weight, layer.config.scale, layer.config.granularity)
    assert torch.equal(layer.weight_scale, scale)
    want = eval_outputs(model)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="aot_eager")(X), want)
    assert torch.equal(torch.export.export(model, (X,)).module()(X), want)
    assert torch.equal(eval_outputs(copy.deepcopy(model)), want)
    assert torch.equal(eval_outputs(ak.hard_quantize_(model)), want)


def test_a_missing_layer_is_missing():
    state = {k: v for k, v in model_in("hold").state_dict().items() if not k.startswith("out.")}
    with pytest.raises(RuntimeError, match=r"out\.weight_scale_frozen"):
        Net(CONFIGS["4 bits"]).load_state_dict(state)


def test_checkpoints_of_version_0_1():
    """They held ``weight_scale`` once it was frozen, and nothing else."""
    model = model_in("frozen")
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(STATE[1:])}
    assert torch.equal(eval_outputs(loaded(model, state)), eval_outputs(model))


def test_a_checkpoint_in_hold_after_the_weights_moved_elsewhere():
    """The scale of a hold is one step behind its weights: it comes back with them, and goes when they change."""
    model = model_in("hold")
    state, want = copy.deepcopy(model.state_dict()), eval_outputs(model)
    lagging = model.out.weight_scale.clone()
    assert not torch.equal(lagging, compute_scale(model.out.weight, Uniform(4), "sawb"))
    with torch.no_grad():
        model.out.weight.mul_(2)
    assert torch.equal(model.out.weight_scale, compute_scale(model.out.weight, Uniform(4), "sawb"))
    model.load_state_dict(state)
    assert torch.equal(model.out.weight_scale, lagging) and torch.equal(eval_outputs(model), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("phase", ["hold", "frozen"])
def test_casts_leave_the_scale_a_float32(phase, dtype):
    model = model_in(phase)
    frozen_scale = model.out.weight_scale.clone()
    model.to(dtype)
    assert model.out.weight_scale.dtype == model.out._buffers["weight_sums"].dtype == torch.float32
    if phase == "frozen":
        assert torch.equal(model.out.weight_scale, frozen_scale)
    y = model.eval()(X.to(dtype))
    assert torch.equal(copy.deepcopy(model)(X.to(dtype)), y)


# ---- ambient modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_modes_leave_nothing_behind(kind):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def make():
        torch.manual_seed(0)
        return (AskewConv2d(2, 4, 3) if kind == "conv" else AskewLinear(6, 4)), X

    want = make()[0](X)
    with FakeTensorMode():
        fake = make()[0](torch.empty(6, 2, 6, 6))
        assert fake.shape == want.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, _ = make()
        layer(torch.empty(6, 2, 6, 6))
    with torch.device("meta"):
        layer, _ = make()
        assert layer(torch.empty(6, 2, 6, 6)).is_meta and layer.quantized_weight().is_meta
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(make()[0].state_dict())
    assert torch.equal(layer(X), want)
    with torch.inference_mode():
        layer, _ = make()
        assert torch.equal(layer(X), want.detach())
        layer.hard_quantize_()
    layer, _ = make()
    with torch.inference_mode():
        layer(X)
        layer.hard_quantize_()
    assert not any(t.is_inference() for t in [*layer.parameters(), *layer.buffers()])
    layer(X).sum().backward()
    assert torch.equal(make()[0](X), want)


def test_another_default_type_changes_nothing():
    runs = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            torch.manual_seed(0)
            model = Net().float()
            with torch.no_grad():
                for i, p in enumerate(model.parameters()):
                    p.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float32).roll(7 * i).reshape(p.shape))
            ak.quantize_(model, CONFIGS["4 bits"])
            for kind in (ak.optim.ASkewSGD, ak.optim.ASkewAdamW):
                optimizer = kind([g for g in ak.param_groups(model) if g.get("grid")], lr=0.05)
                for eps in (1.0, 1.0, 0.4):
                    optimizer.param_groups[0]["constraint_eps"] = eps
                    optimizer.zero_grad()
                    model(X).square().sum().backward()
                    optimizer.step()
            runs.append([p.detach().clone() for p in model.parameters()] + [model.one.weight_scale.clone()])
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- derivatives -----------------------------------------------------------------------------------------------------


def straight_through(layer):
    """The same layer as plain operators: w + (Q(w) - w).detach() inside the hull, Q(w) outside."""
    q, s = layer.quantized_weight(), layer.weight_scale
    rows = layer.weight.detach().reshape(len(s), -1) / s[:, None]
    low, high = layer.config.weight.levels[0], layer.config.weight.levels[-1]
    inside = ((rows >= low) & (rows <= high)).reshape(q.shape) | (not layer.config.ste_clip)
    return lambda w: q + torch.where(inside, w - w.detach(), 0.0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped conv"])
def test_derivatives_are_those_of_the_straight_through_network(kind, clip):
    torch.manual_seed(0)
    config = QuantConfig(Uniform(3), "sawb", ste_clip=clip)
    x = torch.randn(3, 4, 6, 6)
    if kind == "linear":
        layer, x = AskewLinear(6, 5, config=config), x[:, 0, :, :]
        plain = lambda w, b, x: functional.linear(x, w, b)  # noqa: E731
    else:
        groups = 2 if kind == "grouped conv" else 1
        layer = AskewConv2d(4, 4, 3, groups=groups, config=config)
        plain = lambda w, b, x: functional.conv2d(x, w, b, groups=groups)  # noqa: E731
    effective = straight_through(layer)
    w, b = layer.weight, layer.bias
    x.requires_grad_()

    def penalty(y, parameters):
        grad = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(grad.square().sum(), parameters)

    got, want = penalty(layer(x), (w, b)), penalty(plain(effective(w), b, x), (w, b))
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-3)

    # torch.func: grad, jvp, vmap, jacfwd against jacrev
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    loss = lambda p: torch.func.functional_call(layer, p, (x.detach(),)).square().sum()  # noqa: E731
    mine = lambda p: plain(effective(p["weight"]), p["bias"], x.detach()).square().sum()  # noqa: E731
    for name, grad in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(grad, torch.func.grad(mine)(parameters)[name], rtol=1e-4, atol=1e-4)
    tangent = torch.randn_like(x)
    y, moved = torch.func.jvp(layer, (x.detach(),), (tangent,))
    torch.testing.assert_close(y, layer(x).detach())
    torch.testing.assert_close(moved, plain(layer.quantized_weight(), None, tangent), rtol=1e-4, atol=1e-5)
    mapped = torch.func.vmap(layer)(x.detach())
    torch.testing.assert_close(mapped, torch.stack([layer(row) for row in x.detach()]))
    along = {"weight": torch.randn_like(w), "bias": torch.zeros_like(b)}
    torch.testing.assert_close(
        torch.func.jvp(loss, (parameters,), (along,))[1], torch.func.jvp(mine, (parameters,), (along,))[1],
        rtol=1e-4, atol=1e-3,
    )  # fmt: skip
    assert torch.equal(layer(x), layer(x)) and layer.quantizer.scale.grad is None


def test_an_ensemble_is_mapped_over_its_weights():
    models = [nn.Sequential(AskewLinear(6, 5, config=CONFIGS["4 bits"])) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x = torch.randn(4, 6)
    got = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([m(x) for m in models]))


@pytest.mark.parametrize("phase", ["hold", "frozen"])
def test_a_compiled_model_trains_as_it_does_uncompiled(phase):
    """Both forwards use the scale that is in use, also where a sharpness-aware step has put the weights."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        ak.quantize_(model, QuantConfig(Uniform(3)))
        optimizer = ak.optim.SAM(ak.optim.ASkewSGD(ak.param_groups(model), lr=0.02, momentum=0.9), rho=0.3)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(9))

        def closure(forward=forward, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            loss = forward(x).square().mean()
            loss.backward()
            return loss

        losses = []
        for i in range(5):
            optimizer.param_groups[0]["constraint_eps"] = 0.4 if phase == "frozen" and i > 2 else 1.0
            losses.append(float(optimizer.step(closure)))
        runs.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_tracing_and_exporting():
    model = model_in("frozen").eval()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(X), model(X))
    assert {n.target for n in traced.graph.nodes if n.op == "call_module"} >= {"conv", "one", "out"}
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X))
    fresh = nn.Sequential(AskewLinear(6, 5, config=QuantConfig(Uniform(4), "absmax")))
    assert (fresh[0].quantized_weight() - fresh[0].weight).abs().max() < fresh[0].weight_scale.max()


# ---- layers among others ---------------------------------------------------------------------------------------------


def test_a_parameter_made_of_a_weight():
    layer = AskewLinear(6, 5)
    for made in (nn.Parameter(layer.weight), nn.Parameter(layer.weight, requires_grad=False)):
        assert isinstance(made, nn.Parameter) and torch.equal(made, layer.weight)
        other = nn.Linear(6, 5)
        other.weight = made
        other(torch.ones(6)).sum().backward()
        assert WeightQuantizer.of(made) is None
    assert type(layer.weight.detach()) is torch.Tensor
    second = AskewLinear(6, 5)
    second.weight = nn.Parameter(layer.weight)
    assert torch.equal(second.quantized_weight(), layer.quantized_weight())


@pytest.mark.parametrize("where", ["eval", "frozen"])
def test_folding_a_batchnorm_is_told(where):
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    conv, linear = AskewConv2d(2, 3, 2), AskewLinear(4, 3)
    if where == "frozen":
        conv.hard_quantize_(), linear.hard_quantize_()
    with pytest.warns(UserWarning, match="AskewConv2d: weight was replaced.*fold before"):
        fuse_conv_bn_eval(conv.eval(), nn.BatchNorm2d(3).eval())
    with pytest.warns(UserWarning, match="AskewLinear: weight was replaced.*fold before"):
        fuse_linear_bn_eval(linear.eval(), nn.BatchNorm1d(3).eval())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masked", [False, True])
def test_fast_paths_of_torch_use_the_quantized_weights(activation, masked):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True), 2)
    flags = [encoder.use_nested_tensor, *(m.activation_relu_or_gelu for m in encoder.layers)]
    ak.quantize_(encoder, QuantConfig(Uniform(2)))
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 4:] = masked
    options = {"src_key_padding_mask": mask} if masked else {}
    plain = copy.deepcopy(encoder)
    for layer, twin in zip(encoder.layers, plain.layers, strict=True):
        for name in ("linear1", "linear2"):
            setattr(twin, name, getattr(layer, name).to_float())
            getattr(twin, name).weight = nn.Parameter(getattr(layer, name).quantized_weight())
    want = plain.eval()(x, **options)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, **options)[:, :4], want[:, :4], rtol=1e-4, atol=1e-5)
    ak.dequantize_(encoder)
    assert [encoder.use_nested_tensor, *(m.activation_relu_or_gelu for m in encoder.layers)] == flags


def test_quantizing_again():
    model = Net(CONFIGS["4 bits"])
    layer = model.out
    ak.quantize_(model, CONFIGS["4 bits"])
    assert model.out is layer
    weight, seen = layer.weight, []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    ak.quantize_(model, {"out": QuantConfig(Uniform(2))})
    assert (
        model.out.weight is weight and model.out.config.weight == Uniform(2) and model.one.config.weight == Uniform(4)
    )
    assert len(model.out.quantized_weight()[0].unique()) <= 4
    model(X)
    assert seen == ["hook"]
    ak.hard_quantize_(model)
    ak.quantize_(model, QuantConfig(Uniform(8), "absmax"))
    assert not model.out.quantizer.frozen
    with pytest.raises(ValueError, match=r"conv: group_size"):
        ak.quantize_(model, QuantConfig(Uniform(4), granularity="per_group", group_size=7))
    assert model.conv.config.weight == Uniform(8)
    model(X)


def test_what_stays_float_is_told(caplog):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.bias = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.zeros(3, 4))

    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({
        "tokens": nn.Embedding(5, 4), "wave": nn.Conv1d(2, 2, 3), "pairs": nn.Bilinear(2, 2, 3), "experts": Blocks(),
        "mine": Mine(4, 4),
        "attention": nn.MultiheadAttention(4, 2), "router": nn.Linear(4, 3), "head": nn.Linear(4, 2),
    })  # fmt: skip
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.quantize_(model, filter_fn=lambda m, name: name != "head")
    [record] = caplog.records
    for part in ("nn.Embedding (tokens.weight)", "nn.Bilinear (pairs.weight)", "experts.up", "mine.weight"):
        assert part in record.getMessage()
    assert not any(name in record.getMessage() for name in ("head.weight", "router", "wave", "attention"))
    left = ak.nn.left_float(model)
    assert "left alone" in left["head.weight"] and "subclass of nn.Linear" in left["mine.weight"]
    assert "router.weight" not in left and len(left) == 6
    caplog.clear()
    ak.hard_quantize_(model)
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.nn.pack_(model)
    [record] = caplog.records
    assert record.getMessage().startswith("pack_: ") and "experts.up" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.quantize_(Net(), filter_fn=lambda m, name: True)
        assert not caplog.records
        ak.quantize_(nn.Sequential(nn.ReLU()))
    assert "nothing was quantized" in caplog.text


def test_computed_weights_are_refused_by_name():
    from torch.nn.utils import parametrizations, prune, weight_norm

    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm,
                 lambda m: prune.l1_unstructured(m, "weight", 0.5)):  # fmt: skip
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrap(model[1])
        with pytest.raises(ValueError, match=r"^1: its weight is not a Parameter"):
            ak.quantize_(model)
        assert type(model[0]) is nn.Linear and type(model[0].weight) is nn.Parameter
        ak.quantize_(model, filter_fn=lambda m, name: name == "0")
        model(torch.ones(4))


def test_weight_norm_and_pruning_after_quantizing():
    from torch.nn.utils import parametrizations, prune

    model = nn.Sequential(AskewLinear(6, 5, config=CONFIGS["4 bits"]))
    parametrizations.weight_norm(model[0])
    model(torch.ones(2, 6)).square().sum().backward()
    originals = model[0].parametrizations.weight
    assert originals.original0.grad.abs().sum() > 0 and originals.original1.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="remove_parametrizations"):
        ak.hard_quantize_(model)
    pruned = AskewLinear(6, 5, config=CONFIGS["4 bits"])
    prune.l1_unstructured(pruned, "weight", 0.5)
    pruned(torch.ones(2, 6)).sum().backward()
    assert pruned.weight_orig.grad is not None
    assert (pruned.quantized_weight()[pruned.weight == 0] == 0).all()


@pytest.mark.parametrize("other", [
    QuantConfig(Uniform(2)), QuantConfig(Uniform(4, narrow=True)), QuantConfig(Ternary()),
    QuantConfig(Uniform(4), activation=Uniform(8)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("phase", ["hold", "frozen"])
def test_another_grids_checkpoint_is_refused(other, phase):
    fresh = Net(other)
    before = {k: v.clone() for k, v in fresh.state_dict().items() if k.startswith("out.")}
    which = "activation" if other.activation else "weight"
    told = rf"out\.weight_grid: .*another {which} grid than {re.escape(str(getattr(other, which)))}"
    with pytest.raises(RuntimeError, match=told):
        fresh.load_state_dict(model_in(phase).state_dict(), strict=False)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items() if k.startswith("out."))


def test_new_parameters_forget_the_frozen_scale():
    layer = AskewLinear(6, 5, config=CONFIGS["4 bits"])
    layer.hard_quantize_()
    torch.manual_seed(5)
    layer.reset_parameters()
    assert not layer.quantizer.frozen
    assert torch.equal(layer.weight_scale, compute_scale(layer.weight, Uniform(4), "sawb"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("phase", ["hold", "frozen"])
def test_a_traced_model_follows_its_weights(phase):
    model = model_in(phase).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (X,), check_trace=False)
        torch.testing.assert_close(traced(X), model(X))
        model.out.weight.mul_(1.5)
        torch.testing.assert_close(traced(X), model(X))


@pytest.mark.parametrize("make", [lambda: AskewLinear(6, 5), lambda: AskewConv2d(2, 3, 3)], ids=["linear", "conv"])
def test_the_input_has_torchs_name(make):
    layer = make()
    assert torch.equal(layer(input=X), layer(X))
    layer.hard_quantize_()
    packed = ak.nn.pack_(nn.Sequential(layer))[0]
    assert torch.equal(packed(input=X), packed(X))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_layers_without_weights(sizes):
    layer = AskewLinear(*sizes)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(layer), lr=0.1)
    for eps in (1.0, 0.4):
        optimizer.param_groups[0]["constraint_eps"] = eps
        layer(torch.zeros(2, sizes[0])).sum().backward()
        optimizer.step()
    assert layer(torch.zeros(2, sizes[0])).shape == (2, sizes[1])
    copy.deepcopy(layer).load_state_dict(layer.state_dict())
    ak.hard_quantize_(layer)


def test_threads_that_make_the_first_forward_together(monkeypatch):
    """As many as serve one model: one makes the copy, the others wait for it."""
    model, x = nn.Sequential(*(AskewLinear(8, 8, config=CONFIGS["4 bits"]) for _ in range(3))), torch.randn(4, 8)
    made, found, together, quantize = [], [], threading.Barrier(4), ak.ops.fake_quantize_out_

    def slowly(*args):
        made.append(args)
        time.sleep(0.05)
        return quantize(*args)

    def forward():
        together.wait()
        with torch.no_grad():
            found.append(model(x))

    monkeypatch.setattr(ak.ops, "fake_quantize_out_", slowly)
    threads = [threading.Thread(target=forward) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and len(found) == 4
    for y in found:
        torch.testing.assert_close(y, model(x).detach())
