"""Contract: what a step does on the host.

1. A list that stays is one launch of the update, and one of the scales where they follow the weights: no other operator
   runs, whatever is recorded, and Python makes few calls for a tensor. What the prepared lists give is bit for bit what
   the plain operators give, over schedules, checkpoints and edits from outside.
2. A step can be captured: nothing is read on the host, and replays with other gradients, learning rates, eps and counts
   of steps are bit for bit the steps of an eager twin (``graphs``). What cannot be captured says so.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from graphs import Graph, Refused
from torch import nn

import askew_kernels as ak
from askew_kernels import runtime
from askew_kernels.ops import autograd
from askew_kernels.optim import constrained, plan

GRID = ak.quant.Uniform(bits=4)
OPTIMIZERS = [(ak.optim.ASkewSGD, {}), (ak.optim.ASkewSGD, {"momentum": 0.9}), (ak.optim.ASkewAdamW, {}),
              (ak.optim.ASkewLion, {})]  # fmt: skip
compiled = pytest.mark.skipif(runtime.why_not_compiled() != "", reason="prepared lists need compiled operators")


def weights(n=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 8), (3, 5), (6, 33), (2, 3, 3, 3), (7,)]
    made = [nn.Parameter(torch.randn(shapes[i % 5], generator=generator).to(dtype)) for i in range(n)]
    for p in made:
        p.grad = torch.zeros_like(p)
    return made


def give(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        new = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = torch.empty_like(p) if p.grad is None else p.grad
        p.grad.copy_(new)


def optimizer_of(params, cls=ak.optim.ASkewSGD, **options):
    options = {"lr": 0.05, "constraint_eps": 1.0, "telemetry_every": 0, **options}
    return cls([{"params": params, "grid": GRID}], **options)


class Counter:
    """Launches replaced: ``names`` of those that would have been."""

    def __init__(self, monkeypatch):
        self.names = []
        monkeypatch.setattr(autograd, "below_autograd", self.launch)

    def launch(self, name, like, *args):
        self.names.append(name)


# ---- lists ----------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("eps", [1.0, 0.3])
def test_a_list_is_one_launch(cls, options, every, eps, monkeypatch):
    params, counts = weights(62), cls is ak.optim.ASkewAdamW
    options = {**options, "capturable": True} if counts else options
    optimizer = optimizer_of(params, cls, constraint_eps=eps, telemetry_every=every, **options)
    for i in range(4):
        give(params, i)
        optimizer.step()
    launches = Counter(monkeypatch)
    optimizer.step()
    assert launches.names == [*["prepared_scales_"] * (eps == 1), "prepared_update_"]
    monkeypatch.undo()
    with Graph() as graph:
        optimizer.step()
    assert graph.names == [*["prepared_scales_"] * (eps == 1), *["_foreach_add_"] * counts, "prepared_update_"]


def python_calls(f):
    """Of Python and of C, made by Python."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()  # what other tests left to be collected has callbacks, which count as calls
    gc.disable()
    sys.setprofile(profile)
    try:
        f()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@compiled
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("eps", [1.0, 0.3])
def test_python_calls_do_not_grow_with_the_list(cls, options, every, eps, monkeypatch):
    """Mapping a function of C over a list is no call of Python's: that is what makes 500 tensors cheap."""
    counts = []
    for n in (62, 496):
        params = weights(n)
        optimizer = optimizer_of(params, cls, constraint_eps=eps, telemetry_every=every, **options)
        for i in range(4):
            give(params, i)
            optimizer.step()
        counts.append(python_calls(optimizer.step))
    assert counts[1] == counts[0]
    monkeypatch.setattr(plan.Plan, "_look", lambda self: (object(),))  # otherwise every tensor is looked at by itself
    optimizer.step()
    assert python_calls(optimizer.step) > counts[1] + 496


def trained(cls, options, prepared, monkeypatch, dtype=torch.float32, freeze="anneal", steps=16):
    """Weights, states and sums after every step of a run with all that may happen to a list."""
    with monkeypatch.context() as patch:
        if not prepared:
            patch.setattr(ak.ops, "prepares", lambda like: False)
        params = weights(dtype=dtype)
        optimizer = optimizer_of(params, cls, freeze_scale=freeze, telemetry_every=2, **options)
        seen = []
        for i in range(steps):
            give(params, i)
            group = optimizer.param_groups[0]
            group["constraint_eps"] = 1.0 if i < 6 else 0.5
            group["lr"] = 0.05 / (1 + i)
            if i == 3:
                params[1].grad = None
            if i == 4:
                with torch.no_grad():
                    params[0].mul_(1.5)
            if i == 5:
                params[2].data.add_(0.1)
            if i == 8:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if i == 9:
                group["skip_nonfinite"] = True
                params[0].grad[0, 0] = float("nan")
            if i == 10:
                params[3].grad = params[3].grad.to(memory_format=torch.channels_last)
            if i == 11:
                params[3].grad = params[3].grad.contiguous()
                params[2].data = params[2].data.clone()
            if i == 12 and "momentum" in options:
                optimizer.state[params[0]]["momentum_buffer"] = torch.ones_like(params[0])
            if i == 15 and "momentum" in options:
                optimizer.state[params[0]]["momentum_buffer"].data = torch.full_like(params[0], 2.0)
            optimizer.step()
            seen += [p.detach().clone() for p in params]
            seen += [t.clone() for p in params for t in optimizer.state[p].values()]
            seen.append(torch.tensor([[r["flips"], r["velocity_norm"], r["nonfinite"]] for r in optimizer.telemetry()]))
        return seen


@compiled
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("freeze", ["anneal", "never"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_lists_change_no_bits(cls, options, freeze, dtype, monkeypatch):
    got, want = (trained(cls, options, prepared, monkeypatch, dtype, freeze) for prepared in (True, False))
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()), i


def test_lines_of_the_log_are_of_their_own_steps(tmp_path):
    """A line is written when the next step has been recorded, and the sums of a list are kept in the same memory."""
    params = weights()
    optimizer = optimizer_of(params, telemetry_every=1, telemetry_log=tmp_path / "log")
    rows = []
    for i in range(6):
        give(params, i)
        optimizer.step()
        rows += [{**row, "step": i + 1} for row in optimizer.telemetry()]
    optimizer.log()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [row for line in lines if line["kind"] == "step" for row in line["tensors"]] == rows


def test_an_edit_from_outside_is_seen_by_a_list_that_stays():
    """Versions, ``.data`` and foreign optimizers: the scale of the next step is that of the weights as they are."""
    layer = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    model = ak.nn.quantize_(layer, ak.quant.QuantConfig(weight=GRID))
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, telemetry_every=0)
    w = model[0].weight
    other = torch.optim.SGD([w], lr=0.5)
    edits = [
        lambda: w.data.mul_(3.0), other.step, lambda: model.load_state_dict(model.state_dict()),
        lambda: model[0].quantizer.freeze(w), lambda: setattr(w, "data", w.data * 2),
    ]  # fmt: skip
    for edit in [None, None, *edits]:
        with torch.no_grad():
            if edit is not None:
                edit()
        frozen, want = model[0].quantizer.frozen, ak.quant.compute_scale(w, GRID)
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        assert frozen or torch.equal(model[0].quantizer.scale, want)
        assert torch.equal(model[0].quantized_weight(), ak.ops.fake_quantize(w.detach(), model[0].weight_scale, GRID))


@compiled
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("eps", [1.0, 0.3])
def test_channels_last_weights_are_stepped_where_they_are(granularity, eps):
    """Neither weights, gradients, momentum nor copies are moved; the numbers are those of the other layout."""
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        config = ak.quant.QuantConfig(weight=GRID, granularity=granularity)
        model = ak.nn.quantize_(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), config)
        model.to(memory_format=memory_format)
        optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9, telemetry_every=0)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)
        seen = []
        for i in range(6):
            for group in optimizer.param_groups:
                group["constraint_eps"] = 1.0 if i < 2 else eps
            optimizer.zero_grad()
            model(x).square().mean().backward()
            assert all(p.grad.stride() == p.stride() for p in model.parameters())
            generator = torch.Generator().manual_seed(i)
            for p in model.parameters():  # the same numbers in both, which convolutions would add in another order
                p.grad.copy_(torch.randn(p.shape, generator=generator) / 8)
            if i == 5:
                with Graph() as graph:
                    optimizer.step()
                ours = [name for name in graph.names if "_foreach" not in name and name not in ("mul_", "add_")]
                assert ours == [*["prepared_scales_"] * (eps == 1), "prepared_update_"]
            else:
                optimizer.step()
            for layer in (model[0], model[2]):
                copy = layer.quantizer.quantized(layer.weight)
                assert copy.stride() == layer.weight.stride()
                assert copy.is_contiguous(memory_format=memory_format)
                seen.append(layer.weight.detach().contiguous().clone())
                again = ak.ops.fake_quantize(layer.weight.detach(), layer.weight_scale, GRID)
                assert torch.equal(copy, again)
        runs.append(seen)
    for a, b in zip(*runs, strict=True):  # sums of other orders round another way: scales, and with them the constraint
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_errors_come_before_anything_is_written():
    params = weights(4)
    optimizer = optimizer_of(params[:2])
    optimizer.add_param_group({"params": params[2:], "grid": GRID})
    for i in range(3):
        give(params, i)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    params[3].grad = params[3].grad.to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@compiled
def test_the_measure_of_host_time_runs(capsys):
    """What it reports is read, not asserted: speed is no test's business."""
    path = Path(__file__).parents[1] / "benchmarks" / "host_time.py"
    spec = importlib.util.spec_from_file_location("host_time", path)
    host_time = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host_time)
    before = autograd.below_autograd
    host_time.main(["--tensors", "3", "--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * 2 * 2 and autograd.below_autograd is before
    assert {line.split("|")[3].strip(): line.split("|")[5].strip() for line in lines[2:]} == {
        "hold": "2",
        "annealed": "1",
    }


def test_a_compiled_convolution_recomputes_what_an_eager_one_keeps():
    """Only products of matrices read the optimizer's copy in a graph (test_compiled_copy): none is written that nobody
    reads, and none is ever stale."""
    torch.manual_seed(0)
    model = ak.nn.quantize_(nn.Sequential(nn.Conv1d(6, 5, 2), nn.ReLU(), nn.Conv1d(5, 3, 1)))
    compiled_model = torch.compile(model, backend="aot_eager")
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, telemetry_every=0)
    x = torch.randn(4, 6, 3)
    for i in range(6):
        for group in optimizer.param_groups:
            group["constraint_eps"] = 1.0 if i < 3 else 0.5
        optimizer.zero_grad()
        compiled_model(x).square().sum().backward()
        optimizer.step()
        assert all(layer.quantizer.copy_dtype is None for layer in (model[0], model[2]))
    torch.testing.assert_close(compiled_model(x), model(x))  # which makes the copies
    for edit in (optimizer.step, lambda: model[0].weight.data.mul_(1.5), torch.optim.SGD(model.parameters(), 0.1).step):
        edit()
        torch.testing.assert_close(compiled_model(x), model(x))


# ---- capture --------------------------------------------------------------------------------------------------------


def captured(cls, options, eps, steps=5, wrap=None):
    """(weights after every step, the same of an eager twin)."""
    runs = []
    for replays in (True, False):
        params = weights()
        rates = [torch.tensor(0.05, dtype=torch.float64), torch.tensor(eps, dtype=torch.float64)]
        optimizer = optimizer_of(params, cls, lr=rates[0], constraint_eps=rates[1], **options)
        for i in range(3):
            give(params, i)
            optimizer.step()
        graph, seen = Graph(), []
        for i in range(steps):
            give(params, 10 + i)
            rates[0].fill_(0.05 / (1 + i))
            if eps < 1:
                rates[1].fill_(eps / (1 + i))
            if not replays or i == 0:
                with torch.no_grad() if not replays else graph:
                    optimizer.step()
            else:
                graph.replay()
            seen += [p.detach().clone() for p in params]
        runs.append(seen)
    return runs


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("eps", [1.0, 0.3])
def test_replays_are_steps(cls, options, eps):
    options = {**options, "capturable": True} if cls is ak.optim.ASkewAdamW else options
    got, want = captured(cls, options, eps)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), i


def test_a_count_on_the_host_is_refused():
    with pytest.raises(Refused):
        captured(ak.optim.ASkewAdamW, {}, 0.3)


def test_a_graph_of_a_step_that_reads_is_refused():
    """The recorder sees: a rule that has to look at the weights (its scales are searched) compares on the host."""
    params = weights()
    optimizer = optimizer_of(params)
    give(params, 0)
    with pytest.raises(Refused), Graph():
        optimizer.step()  # the first one looks
    with pytest.raises(Refused), Graph():
        float(params[0].detach()[0, 0])


def test_capture_on_a_gpu_says_what_it_needs(monkeypatch):
    params = weights()
    give(params, 0)
    for module in (constrained, sys.modules["askew_kernels.optim.askew"]):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    optimizer = optimizer_of(params)
    with pytest.raises(RuntimeError, match="make a step or more with the same parameters"):
        optimizer.step()
    monkeypatch.setattr(constrained, "capturing", lambda device: False)
    adamw = optimizer_of(params, ak.optim.ASkewAdamW)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"capturable: ASkewAdamW counts its steps on the host.*capturable=True"):
        adamw.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    optimizer_of(params, ak.optim.ASkewAdamW, capturable=True).step()


def test_capturable_is_torchs():
    """The key, the state and its place in checkpoints are torch.optim.AdamW's; either way the bits are the same."""
    runs = []
    for capturable in (False, True):
        params = weights()
        optimizer = optimizer_of(params, ak.optim.ASkewAdamW, capturable=capturable, constraint_eps=0.3)
        for i in range(4):
            give(params, i)
            optimizer.step()
            if i == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                assert saved["param_groups"][0]["capturable"] is capturable
                optimizer.load_state_dict(saved)
        assert all(float(optimizer.state[p]["step"]) == 4 for p in params)
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with pytest.raises(TypeError, match="capturable: expected True or False, got 1"):
        optimizer_of(weights(), ak.optim.ASkewAdamW, capturable=1)
    with pytest.raises(TypeError, match="capturable: unknown argument"):
        optimizer_of(weights(), capturable=True)
    plain = weights()
    mine = ak.optim.ASkewAdamW(plain, lr=0.1, capturable=False)
    give(plain, 0)
    mine.step()
    ak.optim.ASkewAdamW(plain, lr=0.1, capturable=True).step()
    assert torch.optim.AdamW(plain, lr=0.1).defaults["capturable"] is mine.defaults["capturable"]


@pytest.mark.parametrize("cls", [ak.optim.SAM, ak.optim.ASAM, ak.optim.AlignedSAM])
@pytest.mark.parametrize("eps", [1.0, 0.3])
def test_both_halves_of_a_sharpness_aware_step_replay(cls, eps):
    runs = []
    for replays in (True, False):
        params = weights()
        rate = torch.tensor(0.05, dtype=torch.float64)
        base = optimizer_of(params, lr=rate, constraint_eps=eps, momentum=0.9)
        optimizer = cls(base, rho=0.05, telemetry_every=0)
        give(params, 0)

        def step(optimizer=optimizer, params=params):
            optimizer.first_step()
            for p in params:
                p.grad.mul_(0.5).add_(p.detach(), alpha=0.1)
            optimizer.second_step()

        for i in range(3):
            give(params, i)
            step()
        graph, seen = Graph(), []
        for i in range(4):
            give(params, 10 + i)
            rate.fill_(0.05 / (1 + i))
            if not replays or i == 0:
                with torch.no_grad() if not replays else graph:
                    step()
            else:
                graph.replay()
            seen += [p.detach().clone() for p in params]
        runs.append(seen)
    for i, (a, b) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(a, b), i


def test_annealing_fills_eps_in_place_under_replay():
    """With ``keep_pull``, alpha too follows the learning rate, all three as tensors."""
    runs = []
    for replays in (True, False):
        params = weights()
        lr, eps, alpha = (torch.tensor(x, dtype=torch.float64) for x in (0.05, 1.0, 2.0))
        optimizer = optimizer_of(params, lr=lr, constraint_eps=eps, alpha=alpha)
        annealing = ak.EpsilonAnnealing(optimizer, mode="geometric", hold=1, decay=0.7, keep_pull=True)
        for i in range(4):
            give(params, i)
            optimizer.step()
            annealing.step()
        graph, seen = Graph(), []
        for i in range(4):
            give(params, 10 + i)
            if not replays or i == 0:
                with torch.no_grad() if not replays else graph:
                    optimizer.step()
            else:
                graph.replay()
            lr.mul_(0.8)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                annealing.step()
            seen += [p.detach().clone() for p in params]
        assert optimizer.param_groups[0]["alpha"] is alpha
        assert float(alpha) == pytest.approx(2.0 / 0.8**4, rel=1e-12) and float(eps) < 0.2
        runs.append(seen)
    for i, (a, b) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(a, b), i


def test_alpha_follows_a_learning_rate_on_a_device_without_reading_it(monkeypatch):
    alphas = []
    for there in (True, False):
        if there:  # as if the rates stood on a device
            monkeypatch.setattr(ak.annealing, "_elsewhere", lambda lr: isinstance(lr, torch.Tensor))
        else:
            monkeypatch.undo()
        lr, alpha = torch.tensor(0.01, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
        optimizer = optimizer_of(weights(), lr=lr, alpha=alpha, constraint_eps=torch.tensor(1.0))
        annealing, seen = ak.EpsilonAnnealing(optimizer, total=9, hold=1), []
        for i, rate in enumerate((0.02, 0.1, 0.0, 0.05, 0.2, 0.01)):
            lr.fill_(rate)
            with Graph() if there else torch.no_grad():
                annealing._follow_lr()
            seen.append(float(alpha))
            if i == 3:
                saved = annealing.state_dict()
                assert all(isinstance(x, float) for x in saved["_first"]["0"])
                annealing.load_state_dict(saved)
        alphas.append(seen)
    assert alphas[0] == alphas[1] == [2.0, 2.0, 2.0, 4.0, 2.0, 40.0]


# ---- the same on a GPU ----------------------------------------------------------------------------------------------


def on_gpu(cls, options, eps, sharp=None):
    """(parameters with gradients, rates, optimizer, step) after three steps; rates are tensors there."""
    params = [nn.Parameter(p.detach().cuda()) for p in weights()]
    rates = [torch.tensor(x, dtype=torch.float64, device="cuda") for x in (0.05, eps, 2.0)]
    options = {**options, "capturable": True} if cls is ak.optim.ASkewAdamW else options
    alpha = rates[2] if sharp is None else 2.0
    optimizer = optimizer_of(params, cls, lr=rates[0], constraint_eps=rates[1], alpha=alpha, **options)
    step = optimizer.step
    if sharp is not None:
        wrapped = sharp(optimizer, rho=0.05, telemetry_every=0)

        def step():
            wrapped.first_step()
            for p in params:
                p.grad.mul_(0.5).add_(p.detach(), alpha=0.1)
            wrapped.second_step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            give(params, i)
            step()
    torch.cuda.synchronize()
    return params, rates, optimizer, step


GPU_CASES = [(cls, options, None) for cls, options in OPTIMIZERS]
GPU_CASES += [(ak.optim.ASkewSGD, {"momentum": 0.9}, sharp) for sharp in (ak.optim.SAM, ak.optim.AlignedSAM)]


@pytest.mark.gpu
@pytest.mark.parametrize(("cls", "options", "sharp"), GPU_CASES)
@pytest.mark.parametrize("eps", [1.0, 0.3])
@pytest.mark.parametrize("every", [0, 1])
def test_replays_are_steps_on_a_gpu(cls, options, sharp, eps, every):
    runs = []
    for replays in (True, False):
        params, rates, _, step = on_gpu(cls, {**options, "telemetry_every": every}, eps, sharp)
        graph, seen = torch.cuda.CUDAGraph(), []
        if replays:
            kept = [p.detach().clone() for p in params]
            with torch.cuda.graph(graph):
                step()
            assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))  # only recorded
        for i in range(5):
            give(params, 10 + i)
            rates[0].fill_(0.05 / (1 + i))
            rates[2].fill_(2.0 * (1 + i))
            if eps < 1:
                rates[1].fill_(eps / (1 + i))
            graph.replay() if replays else step()
            seen += [p.detach().clone() for p in params]
        runs.append(seen)
    for i, (a, b) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(a, b), i


@pytest.mark.gpu
@pytest.mark.parametrize(("cls", "options", "sharp"), GPU_CASES)
@pytest.mark.parametrize("eps", [1.0, 0.3])
def test_a_step_waits_for_nothing(cls, options, sharp, eps):
    params, rates, _, step = on_gpu(cls, {**options, "telemetry_every": 1}, eps, sharp)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(3):
            rates[0].fill_(0.05 / (1 + i))
            step()
        with pytest.raises(RuntimeError):  # it is noticed
            float(rates[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)


@pytest.mark.gpu
def test_a_capture_without_a_step_before_it_is_refused():
    params = [nn.Parameter(p.detach().cuda()) for p in weights()]
    give(params, 0)
    optimizer, graph = optimizer_of(params), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="make a step or more"), torch.cuda.graph(graph):
        optimizer.step()
