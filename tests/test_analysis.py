"""Contract: what ``ak.analysis`` says of a loss and of a training run is true (docs/mathematics.md, section 7).

1. Eigenvalues and traces are the Hessian's: against dense Hessians, closed forms, whole and by layer.
2. On a quadratic every quantity of a certificate equals its closed form; on logistic regression it holds at every step
   for γ <= 1/L; it warns above 1/L̂; the feasibility limit is where the pull begins to carry weights past their level.
3. A telemetry log holds what ``telemetry()`` says, survives what a log may meet, and becomes a page.
"""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import analysis
from askew_kernels.__main__ import main

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
    ],
)
def test_bad_input(what, match):
    with pytest.raises(ValueError, match=match):
        what(*small_problem())


# ---- certificates ---------------------------------------------------------------------------------------------------


def skewed(w, lr, eps=1.0, alpha=1.0, scale=0.5, **options):
    """Float64 weights on the grid -4 … 3 in steps of ``scale``, never clamped."""
    group = {
        "params": [w],
        "grid": ak.quant.Uniform(bits=3),
        "scale": torch.full((1,), scale),
        "granularity": "per_tensor",
    }
    return ak.optim.ASkewSGD([group], lr=lr, eps=eps, alpha=alpha, freeze_scale="never", **options)


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
