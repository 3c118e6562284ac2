"""Contract: what `python -m askew_kernels demo --sam` measures is what it says.

The rise of the loss stays within its radius and leaves the weights as they were, and the tables hold every row once
with the right mean. (The largest eigenvalue is ``analysis.hessian_eigenvalues``: test_analysis.py.)
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("sklearn")

from experiments import sam


def problem():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randint(0, 3, (40,))
    return list(model.parameters()), lambda: functional.cross_entropy(model(x), y)


def test_rise_within_a_radius():
    w = nn.Parameter(torch.tensor([3.0, -1.0]))
    before = w.detach().clone()
    assert sam.rise_within(lambda: (w * torch.tensor([0.6, 0.8])).sum(), [w], 0.5) == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(w, before)
    params, loss = problem()
    start = [p.detach().clone() for p in params]
    rises = [sam.rise_within(loss, params, reach) for reach in (0.01, 0.1, 0.5)]
    assert 0 < rises[0] < rises[1] < rises[2]
    assert all(map(torch.equal, params, start))


def test_tables():
    after = {"float": {"4 bits": 80.0}, "4 bits": {}}
    results = [
        sam.Result(
            "t",
            name,
            width,
            seed,
            90.0 + seed,
            {w: a + seed for w, a in later.items()},
            2.0,
            0.5,
            1.0,
            budget="equal epochs",
        )
        for name in sam.OPTIMIZERS
        for width, later in after.items()
        for seed in (1, 0)
    ]
    longer = [dataclasses.replace(r, accuracy=95.0, budget="equal time") for r in results if r.optimizer == "SGD"]
    rows = sam.summarise(results + longer)
    assert [(row["budget"], row["way"], row["width"], row["seeds"]) for row in rows] == [
        (budget, way, width, 2) for budget in ("equal epochs", "equal time")
        for way, width in (("float", "float"), ("after", "4 bits"), ("aware", "4 bits"))
    ]  # fmt: skip
    assert rows[0]["SAM"] == pytest.approx((90.5, 0.5**0.5)) and rows[1]["SAM"][0] == 80.5
    assert rows[2]["ASAM, eigenvalue"] == (2.0, 0.0) and "SAM, rise" not in rows[1]
    assert rows[3]["SGD"] == (95.0, 0.0) and rows[0]["SGD"] == rows[0]["SAM"]
    assert (
        rows[3]["SAM"] == rows[0]["SAM"] and "MSAM" not in rows[3]
    )  # one training for both budgets, or one of its own
    text = sam.markdown(rows)
    assert text.count("90.50 ± 0.71") == 7 * 2 + 4 * 2 and text.count("0.500 ± 0.000") == 7 * 2 + 5 * 2


def test_equal_time_is_equal_gradients(monkeypatch):
    """What a training takes: the number of batches times the gradients of a step, to rounding of the epochs."""
    seen = {}
    monkeypatch.setitem(sam.EPOCHS, "digits / MLP", 3)
    monkeypatch.setattr(sam.demo, "batches", lambda data, epochs, seed: epochs)

    def fit(model, optimizer, epochs, steps, recipe):
        seen["epochs"], seen["steps"] = epochs, steps
        raise KeyboardInterrupt

    monkeypatch.setattr(sam.demo, "fit", fit)
    for name, epochs in (("SGD", 6), ("MSAM", 6), ("LookSAM", 5), ("SAM", 3)):
        with pytest.raises(KeyboardInterrupt):
            sam.train(
                sam.Job("digits / MLP", name, "float", 0, budget="equal time" if name != "SAM" else "equal epochs")
            )
        assert seen["epochs"] == epochs and seen["steps"] == epochs * (1437 // 64)
    optimizer = sam.OPTIMIZERS["LookSAM"](torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), None)
    assert sam.GRADIENTS["LookSAM"] == 1 + 1 / optimizer.k
