"""Contract: LookSAM, MSAM and ESAM are the published steps, cost what they say, and live as SAM does (test_sam.py).

1. In float64 each is its formula, written out with torch.autograd; LookSAM(k=1) and ESAM(fraction=1) are SAM, bit for
   bit; MSAM leaves the unperturbed weights between steps.
2. LookSAM evaluates the closure twice every k-th step and once otherwise, MSAM once; ESAM takes no gradient in the
   first pass of what it does not perturb, and leaves ``requires_grad`` as it was.
3. By hand, with a GradScaler, micro-batches, exceptions, checkpoints in the middle of a cycle, copies: the same run.
4. Bad input: an error that names the argument.
"""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import ops
from askew_kernels.optim import ESAM, MSAM, SAM, ASkewAdamW, ASkewLion, ASkewSGD, LookSAM, sharp_samples
from askew_kernels.quant import QuantConfig, Uniform

X = torch.randn(24, 12, 8, generator=torch.Generator().manual_seed(5))
Y = torch.randint(0, 4, (24, 12), generator=torch.Generator().manual_seed(6))
BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "ASkewSGD": lambda p: ASkewSGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "ASkewAdamW": lambda p: ASkewAdamW(p, lr=0.01),
    "ASkewLion": lambda p: ASkewLion(p, lr=0.003),
}
MAKE = {
    "LookSAM": lambda base, **o: LookSAM(base, rho=0.3, k=3, alpha=0.6, **o),
    "MSAM": lambda base, **o: MSAM(base, rho=0.3, **o),
    "ESAM": lambda base, **o: ESAM(base, rho=0.3, fraction=0.5, **o),
}


@pytest.fixture(autouse=True)
def small():
    """A seed, and one thread: these networks are too small for more."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(quantized=False, dtype=torch.float32, norm=False):
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(16)] if norm else []
    model = nn.Sequential(nn.Linear(8, 16), *middle, nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    return ak.quantize_(model, QuantConfig(Uniform(4), "sawb")) if quantized else model


def groups(model, base):
    return ak.param_groups(model) if "ASkew" in base else model.parameters()


def loss_of(model, i, rows=slice(None)):
    output = model(X[i][rows].to(next(model.parameters()).dtype))
    return functional.cross_entropy(output, Y[i][rows])


def closure_of(model, i, calls=None):
    def closure():
        loss = loss_of(model, i)
        loss.backward()
        if calls is not None:
            calls.append(i)
        return loss

    return closure


def train(model, optimizer, start, stop):
    for i in range(start, stop):
        optimizer.step(closure_of(model, i))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def gradient_at(model, w, i):
    """At the weights ``w``, flat; the model keeps its own."""
    before = weights(model)
    nn.utils.vector_to_parameters(w, model.parameters())
    found = flat(torch.autograd.grad(loss_of(model, i), list(model.parameters())))
    nn.utils.vector_to_parameters(flat(before), model.parameters())
    return found


# ---- the formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [False, True])
def test_looksam_is_the_formula_in_float64(by_hand):
    """Every operation in float64: a few roundings of 2^-53 of numbers below 10, over seven steps."""
    model, rho, k, alpha, lr, u = network(dtype=torch.float64), 0.2, 3, 0.6, 0.1, None
    optimizer = LookSAM(torch.optim.SGD(model.parameters(), lr=lr), rho=rho, k=k, alpha=alpha)
    w = flat(weights(model))
    for i in range(7):
        g = gradient_at(model, w, i)
        if i % k == 0:
            used = gradient_at(model, w + rho * g / g.norm(), i)
            across = used - (used @ g) / (g @ g) * g
            u = across / across.norm()
        else:
            used = g + alpha * g.norm() * u
        w = w - lr * used
        assert optimizer.looks == (i % k == 0)
        if by_hand:
            loss_of(model, i).backward()
            if optimizer.looks:
                optimizer.first_step(zero_grad=True)
                loss_of(model, i).backward()
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.step(closure_of(model, i))
        torch.testing.assert_close(flat(weights(model)), w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", ["SGD", "nesterov", "AdamW", "ASkewSGD", "ASkewAdamW", "ASkewLion"])
def test_msam_is_the_formula_in_float64(base, adaptive):
    """delta = -rho T^2 m / |T m| of the base's momentum; the base's own step with the gradient there."""
    model, twin, rho, eta = network(dtype=torch.float64), network(dtype=torch.float64), 0.3, 0.01
    optimizer = MSAM(BASES[base](model.parameters()), rho=rho, adaptive=adaptive, eta=eta)
    plain = BASES[base](twin.parameters())
    key = "momentum_buffer" if "SGD" in base or base == "nesterov" else "exp_avg"
    for i in range(6):
        w = flat(weights(twin))
        delta = torch.zeros_like(w)
        if i:
            m = flat(plain.state[p][key] for p in twin.parameters())
            t = w.abs() + eta if adaptive else torch.ones_like(w)
            delta = -rho * t * t * m / (t * m).norm()
        moved = []
        gradient = gradient_at(twin, w + delta, i)
        nn.utils.vector_to_parameters(gradient, grads := [torch.empty_like(p) for p in twin.parameters()])
        for p, g in zip(twin.parameters(), grads, strict=True):
            p.grad = g.clone()
        plain.step()

        def closure(i=i, moved=moved):
            moved.append(flat(weights(model)))
            return closure_of(model, i)()

        optimizer.step(closure)
        assert len(moved) == 1
        torch.testing.assert_close(moved[0], w + delta, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(flat(weights(model)), flat(weights(twin)), rtol=1e-10, atol=1e-12)
    report = optimizer.telemetry()
    assert report["perturbed"] and report["momentum_norm"] > 0 and "surrogate_gap" not in report


def test_esam_is_the_formula_in_float64():
    """delta = (rho / fraction) g / |g| over the chosen tensors, which follow from seed and step."""
    model, rho, fraction = network(dtype=torch.float64), 0.2, 0.5
    optimizer = ESAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=rho, fraction=fraction, seed=3)
    seen = set()
    for i in range(8):
        w, chosen = flat(weights(model)), optimizer.chosen()
        mask = flat(torch.full_like(p, float(p in chosen)) for p in model.parameters())
        seen.add(tuple(p in chosen for p in model.parameters()))
        g = gradient_at(model, w, i) * mask
        expected = w - 0.1 * gradient_at(model, w + rho / fraction * g / g.norm(), i)
        optimizer.step(closure_of(model, i))
        torch.testing.assert_close(flat(weights(model)), expected, rtol=1e-12, atol=1e-12)
    assert len(seen) > 2 and all(any(row) for row in seen)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "ASkewSGD"])
@pytest.mark.parametrize("one", [
    lambda b, **o: LookSAM(b, rho=0.3, k=1, **o), lambda b, **o: ESAM(b, rho=0.3, fraction=1.0, **o),
], ids=["LookSAM", "ESAM"])  # fmt: skip
def test_they_end_in_sam(one, base):
    """Bit for bit after 12 steps, statistics of batch normalization included; no state of their own."""
    runs = []
    for make in (one, lambda b, **o: SAM(b, rho=0.3, **o)):
        model = network("ASkew" in base, norm=True)
        optimizer = make(BASES[base](groups(model, base)), model=model)
        train(model, optimizer, 0, 12)
        runs.append((weights(model), list(model.buffers()), optimizer))
    assert same(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1])
    state, expected = (next(iter(o.state.values())).keys() for _, _, o in runs)
    assert state == expected


def test_looksam_between_looks_with_alpha_0_is_the_base():
    model, twin = network(), network()
    optimizer = LookSAM(BASES["SGD"](model.parameters()), rho=0.3, k=50, alpha=0.0)
    plain = BASES["SGD"](twin.parameters())
    optimizer.step(closure_of(model, 0))
    twin.load_state_dict(model.state_dict())
    loaded = copy.deepcopy(optimizer.base_optimizer.state_dict())
    plain.load_state_dict(loaded)
    for i in range(1, 6):
        optimizer.step(closure_of(model, i))
        plain.zero_grad()
        loss_of(twin, i).backward()
        plain.step()
    assert same(weights(model), weights(twin))


# ---- what a step costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, expected", [("LookSAM", [2, 1, 1] * 3), ("MSAM", [1] * 9), ("ESAM", [2] * 9)])
def test_passes(kind, expected):
    model = network(norm=True)
    optimizer = MAKE[kind](BASES["SGD"](model.parameters()), model=model)
    counts = []
    for i in range(9):
        calls = []
        optimizer.step(closure_of(model, i, calls))
        counts.append(len(calls))
    assert counts == expected
    assert int(model[1].num_batches_tracked) == 9  # one pass of each step is seen by batch normalization


def test_esam_takes_no_gradient_of_what_it_does_not_perturb():
    model = network()
    model[2].bias.requires_grad_(False)
    optimizer = ESAM(BASES["SGD"](model.parameters()), rho=0.3, fraction=0.4, seed=1)
    for i in range(6):
        chosen, grads = optimizer.chosen(), []

        def closure(i=i, grads=grads):
            loss = closure_of(model, i)()
            grads.append([p.grad is not None for p in model.parameters()])
            return loss

        optimizer.step(closure)
        assert grads == [[p in chosen for p in model.parameters()], [True, True, True, False]]
        assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
        assert model[2].bias not in chosen
    with pytest.raises(KeyError), optimizer.first_pass():
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert len(optimizer.chosen()) >= 1


def test_esam_chooses_the_given_share():
    """100 tensors, 60 steps: the mean share of the chosen is 0.3 within 4 deviations of sqrt(0.3 0.7 / 6000)."""
    params = [nn.Parameter(torch.zeros(1)) for _ in range(100)]
    optimizer = ESAM(torch.optim.SGD(params, lr=0.1), fraction=0.3, seed=5)
    share = []
    for i in range(60):
        for group in optimizer.param_groups:
            group["sam_steps"] = i
        share.append(len(optimizer.chosen()) / 100)
    assert sum(share) / 60 == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 6000))


def test_sharp_samples():
    before, after = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]), torch.tensor([1.1, 3.0, 0.5, 2.0, 1.2])
    assert sharp_samples(before, after, 0.4).tolist() == [1, 3]
    assert sharp_samples(before, after, 0.41).tolist() == [1, 3, 4]
    assert sharp_samples(before, after, 1.0).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="after"):
        sharp_samples(before, after[:4])
    with pytest.raises(ValueError, match="fraction"):
        sharp_samples(before, after, 0.0)


# ---- a life like SAM's ----------------------------------------------------------------------------------------------


def by_hand(kind, model, optimizer, i, backward, scaler=None, final="second_step"):
    """A step by hand; ``backward`` makes the gradients."""
    if kind == "MSAM":
        optimizer.first_step()
        backward(i)
    elif kind == "LookSAM":
        backward(i)
        if optimizer.looks:
            optimizer.first_step(zero_grad=True, scaler=scaler)
            backward(i)
    else:
        with optimizer.first_pass():
            backward(i)
        optimizer.first_step(zero_grad=True, scaler=scaler)
        backward(i)
    if final == "scaler.step":
        scaler.step(optimizer)
        optimizer.zero_grad()
    else:
        optimizer.second_step(zero_grad=True, scaler=scaler)
    if scaler is not None:
        scaler.update()


@pytest.mark.parametrize("by", ["hand", "micro-batches", "second_step", "scaler.step"])
@pytest.mark.parametrize("base", ["SGD", "ASkewSGD"])
@pytest.mark.parametrize("kind", MAKE)
def test_by_hand_is_the_closure(kind, base, by):
    """With a scaler bit for bit, as its scale is a power of two; micro-batches to the rounding of sums."""
    runs = []
    for hand in (False, True):
        model = network("ASkew" in base)
        optimizer = MAKE[kind](BASES[base](groups(model, base)))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4) if "step" in by and hand else None

        def backward(i, model=model, scaler=scaler):
            if by == "micro-batches":
                for part in range(3):
                    (loss_of(model, i, slice(4 * part, 4 * part + 4)) / 3).backward()
                return
            loss = loss_of(model, i)
            (loss if scaler is None else scaler.scale(loss)).backward()

        for i in range(8):
            if hand:
                by_hand(kind, model, optimizer, i, backward, scaler, by)
            else:
                optimizer.step(closure_of(model, i))
        runs.append(weights(model))
    if by == "micro-batches":
        tolerance = {"rtol": 1e-3, "atol": 2e-4} if base == "SGD" else {"rtol": 0.1, "atol": 0.1}
        for p, q in zip(*runs, strict=True):
            torch.testing.assert_close(p, q, **tolerance)
    else:
        assert same(*runs)


def test_looksam_where_both_passes_are_always_made():
    """The loop that was written for SAM, clipping included: the second pass is for nothing, and changes nothing."""
    runs = []
    for always in (False, True):
        model = network()
        optimizer = LookSAM(BASES["SGD"](model.parameters()), rho=0.3, k=3)
        for i in range(7):
            loss_of(model, i).backward()
            if optimizer.looks or always:
                optimizer.first_step(zero_grad=True)
                loss_of(model, i).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.second_step(zero_grad=True, loss=1.0)
        runs.append(weights(model))
    assert same(*runs)


@pytest.mark.parametrize("final", ["second_step", "scaler.step", "step"])
@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("base", ["SGD", "ASkewSGD"])
@pytest.mark.parametrize("kind", MAKE)
def test_inf_skips_the_step_and_restores(kind, base, at, final):
    """At 3 LookSAM looks, at 4 it does not; the direction stays as it was."""
    model = network("ASkew" in base)
    optimizer = MAKE[kind](BASES[base](groups(model, base)))
    train(model, optimizer, 0, at)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before, state = weights(model), copy.deepcopy(list(optimizer.state.values()))

    def backward(i):
        loss = loss_of(model, i)
        scaler.scale(loss).backward()
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
        return loss

    if final == "step":
        optimizer.step(lambda: backward(at), scaler=scaler)
        scaler.update()
    else:
        by_hand(kind, model, optimizer, at, backward, scaler, final)
    assert same(weights(model), before) and scaler.get_scale() == 2.0**7
    assert optimizer.telemetry()["skipped"] is True
    for old, new in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old if isinstance(old[key], torch.Tensor))
    optimizer.zero_grad()
    train(model, optimizer, at + 1, at + 4)
    assert not same(weights(model), before) and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("by", ["state_dict", "dcp", "dcp flat", "deepcopy", "pickle"])
@pytest.mark.parametrize("base", ["SGD", "AdamW", "ASkewSGD", "ASkewAdamW"])
@pytest.mark.parametrize("kind", MAKE)
def test_runs_resume_bit_for_bit(kind, base, by):
    """After four steps, where LookSAM is in the middle of a cycle."""

    def fresh():
        model = network("ASkew" in base, norm=True)
        return model, MAKE[kind](BASES[base](groups(model, base)), model=model)

    whole, optimizer = fresh()
    train(whole, optimizer, 0, 4)
    if by in ("deepcopy", "pickle"):
        copied = copy.deepcopy if by == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
        model, other = copied((whole, optimizer))
        model.eval()(X[0])  # layers find the weights that a pickle brought at their first forward
        model.train()
    else:
        model, other = fresh()
        if by == "state_dict":
            file = io.BytesIO()
            torch.save([whole.state_dict(), optimizer.state_dict()], file)
            file.seek(0)
            saved = torch.load(file)
            model.load_state_dict(saved[0])
            other.load_state_dict(saved[1])
        else:
            chosen = dcp.StateDictOptions(flatten_optimizer_state_dict=by == "dcp flat")
            saved = copy.deepcopy(dcp.get_state_dict(whole, optimizer, options=chosen))
            before = weights(model)
            dcp.get_state_dict(model, other, options=chosen)
            assert same(weights(model), before)
            dcp.set_state_dict(model, other, model_state_dict=saved[0], optim_state_dict=saved[1], options=chosen)
    assert getattr(other, "looks", None) == getattr(optimizer, "looks", None)
    train(whole, optimizer, 4, 9)
    train(model, other, 4, 9)
    assert same(weights(model), weights(whole)) and same(model.buffers(), whole.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MAKE)
def test_an_error_in_any_pass_restores(kind, dtype):
    model = network(dtype=dtype)
    optimizer = MAKE[kind](torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    train(model, optimizer, 0, 3)
    for failing in (0, 1):
        before, calls = weights(model), []

        def closure(failing=failing, calls=calls):
            if len(calls) == failing:
                raise KeyError("a worker died")
            calls.append(1)
            return closure_of(model, 3)()

        if kind == "MSAM" and failing == 1:
            continue
        with pytest.raises(KeyError):
            optimizer.step(closure)
        assert same(weights(model), before) and all(p.requires_grad for p in model.parameters())
    train(model, optimizer, 3, 4)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "ASkewSGD", "ASkewLion"])
@pytest.mark.parametrize("kind", MAKE)
def test_maximizing_minus_the_loss_is_minimizing_it(kind, base):
    runs = []
    for sign in (1, -1):
        model = network("ASkew" in base)
        cls = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "ASkewSGD": ASkewSGD, "ASkewLion": ASkewLion}[base]
        options = {"momentum": 0.9} if "SGD" in base else {}
        optimizer = MAKE[kind](cls(groups(model, base), lr=0.01, maximize=sign < 0, **options))
        for i in range(6):

            def closure(model=model, i=i, sign=sign):
                loss = sign * loss_of(model, i)
                loss.backward()
                return loss

            optimizer.step(closure)
        runs.append(weights(model))
    assert same(*runs)


@pytest.mark.parametrize("kind", MAKE)
def test_hooks_are_called_once_for_a_step(kind):
    model, seen = network(), []
    optimizer = MAKE[kind](BASES["SGD"](model.parameters()))
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for i in range(4):
        optimizer.step(closure_of(model, i))
        assert seen == ["before", "after"]
        seen.clear()
    optimizer.zero_grad()
    for i in range(4, 8):
        by_hand(kind, model, optimizer, i, lambda i: loss_of(model, i).backward())
        assert seen == ["before", "after"]
        seen.clear()


@pytest.mark.parametrize("base", ["ASkewSGD", "ASkewAdamW"])
def test_msam_restores_within_an_askew_step(base, monkeypatch):
    """No pass of its own over quantized weights, and the same bits as with one; the forward quantizes w + delta."""
    runs = []
    for inside in (True, False):
        model = network(True)
        optimizer = MSAM(BASES[base](ak.param_groups(model)), rho=1.0)
        if not inside:
            optimizer._descends_inside = lambda ascent: {}
        annealing = ak.EpsilonAnnealing(optimizer, hold=3, total=12)
        for i in range(7):
            before = model[0].weight.detach().clone()
            scale = model[0].quantizer.current_scale(model[0].weight).clone()
            optimizer.first_step()
            assert torch.equal(model[0].weight, before) == (i == 0)
            with torch.no_grad():
                seen = (model[0](torch.eye(8)) - model[0].bias).T
            expected = ops.fake_quantize(model[0].weight.detach(), scale, model[0].config.weight)
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
            loss_of(model, i).backward()
            restored, real = [], ops.run_sam_restore
            monkeypatch.setattr(ops, "run_sam_restore", lambda p, k, r=restored, f=real: (r.extend(p), f(p, k)))
            optimizer.second_step(zero_grad=True)
            monkeypatch.setattr(ops, "run_sam_restore", real)
            assert sum(p.dim() == 2 for p in restored) == (0 if inside or i == 0 else 2)
            annealing.step()
        runs.append(weights(model))
    assert same(*runs)


@pytest.mark.parametrize("inputs", [{}, {"activation": Uniform(4), "activation_scale": "lsq+"}], ids=["", "inputs"])
@pytest.mark.parametrize("base", ["ASkewSGD", "ASkewAdamW", "SGD", "AdamW"])
@pytest.mark.parametrize("kind", MAKE)
def test_learned_scales_learn_and_are_not_perturbed(kind, base, inputs):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    ak.quantize_(model, QuantConfig(Uniform(4), "lsq", **inputs))
    optimizer = MAKE[kind](BASES[base](ak.param_groups(model)))
    scales = [p for group in optimizer.param_groups if group.get("role") == "scale" for p in group["params"]]
    assert len(scales) == (6 if inputs else 2)
    model(X[0])  # where they begin
    start = [s.detach().clone() for s in scales]
    for i in range(7):
        before = [s.detach().clone() for s in scales]

        def closure(i=i, before=before):
            assert same(scales, before)
            return closure_of(model, i)()

        optimizer.step(closure)
    assert not any(map(torch.equal, scales, start))
    assert all((p > 0).all() for name, p in model.named_parameters() if name.endswith("scale"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("base", ["SGD", "ASkewSGD"])
def test_cuda_graph_of_msam(base):
    """Perturbation, forward, backward and step in one graph; replays train as eager steps do."""
    made = []
    for _ in range(2):
        model = network("ASkew" in base).cuda()
        made.append((model, MSAM(BASES[base](groups(model, base)), rho=0.3)))
    x, y = X[0].cuda(), Y[0].cuda()

    def step(model, optimizer):
        optimizer.first_step(zero_grad=True)
        functional.cross_entropy(model(x), y).backward()
        optimizer.second_step()

    (model, optimizer), (eager, eager_optimizer) = made
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer)
    for i in range(1, 4):
        x.copy_(X[i])
        graph.replay()
    for i in (0, 0, 0, 1, 2, 3):
        x.copy_(X[i])
        step(eager, eager_optimizer)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_nothing_waits_for_the_device(monkeypatch):
    """No item(), no float(), no bool() of a tensor, in steps that look and in others."""
    for kind in MAKE:
        model = network()
        optimizer = MAKE[kind](BASES["SGD"](model.parameters()), telemetry_every=0)
        train(model, optimizer, 0, 3)
        with monkeypatch.context() as patch:
            for name in ("item", "__float__", "__bool__", "tolist", "cpu", "__int__"):

                def refuse(*_):
                    raise AssertionError("a value was waited for")

                patch.setattr(torch.Tensor, name, refuse)
            for i in range(3, 6):
                by_hand(kind, model, optimizer, i, lambda i, model=model: loss_of(model, i).backward())


def test_a_look_without_direction_leaves_none():
    model = network()
    optimizer = LookSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, k=3)
    train(model, optimizer, 0, 3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.first_step()
    optimizer.second_step()
    assert all(not state["sam_direction"].any() for state in optimizer.state.values())
    before = weights(model)
    optimizer.step(closure_of(model, 4))
    assert optimizer.telemetry()["looked"] is False and optimizer.telemetry()["perturbed"] is False
    for p, w in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * p.grad, rtol=1e-6, atol=1e-7)


def test_looksam_takes_the_base_s_checkpoint_and_looks_first():
    model = network()
    base = BASES["SGD"](model.parameters())
    loss_of(model, 0).backward()
    base.step()
    optimizer = LookSAM(BASES["SGD"](model.parameters()), k=4)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    for group in optimizer.param_groups:
        group["sam_steps"] = 3
    assert optimizer.looks
    optimizer.zero_grad()
    train(model, optimizer, 1, 2)
    assert optimizer.looks  # the fourth
    train(model, optimizer, 2, 3)
    assert not optimizer.looks


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_arguments():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for call, error, match in (
        (lambda: LookSAM(sgd, k=0), ValueError, "k: "),
        (lambda: LookSAM(sgd, k=2.0), TypeError, "k: "),
        (lambda: LookSAM(sgd, k=True), TypeError, "k: "),
        (lambda: LookSAM(sgd, alpha=-1.0), ValueError, "alpha"),
        (lambda: LookSAM(sgd, perturbation="local"), ValueError, "perturbation"),
        (lambda: ESAM(sgd, fraction=0.0), ValueError, "fraction"),
        (lambda: ESAM(sgd, fraction=1.5), ValueError, "fraction"),
        (lambda: ESAM(sgd, seed="a"), TypeError, "seed"),
        (lambda: MSAM(sgd, rho=-1.0), ValueError, "rho"),
        (lambda: MSAM(sgd, perturbation="local"), ValueError, "perturbation"),
        (lambda: MSAM(torch.optim.SGD(model.parameters(), lr=0.1)), ValueError, "base_optimizer.*momentum"),
        (lambda: MSAM(SAM(sgd)), TypeError, "base_optimizer"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_bad_steps():
    model = network()
    optimizer = MSAM(torch.optim.Adagrad(model.parameters(), lr=0.1))
    train(model, optimizer, 0, 1)
    before = weights(model)
    with pytest.raises(ValueError, match="momentum_buffer, exp_avg.*Adagrad"):
        optimizer.step(closure_of(model, 1))
    assert same(weights(model), before)
    optimizer = MSAM(BASES["SGD"](model.parameters()))
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="closure.*first_step"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="first_step"):
        optimizer.second_step()
    assert same(weights(model), before)
    optimizer = LookSAM(BASES["SGD"](model.parameters()), k=3)
    optimizer.zero_grad()
    train(model, optimizer, 0, 1)
    before = weights(model)
    loss_of(model, 1).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="expected a gradient"):
        optimizer.second_step()
    assert same(weights(model), before)
    train(model, optimizer, 1, 5)
