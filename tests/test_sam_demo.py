"""Contract: what `python -m askew_kernels demo --sam` measures is what it says.

The rise of the loss stays within its radius and leaves the weights as they were, and the tables hold every row once
with the right mean. (The largest eigenvalue is ``analysis.hessian_eigenvalues``: test_analysis.py.)
"""

from __future__ import annotations

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
        sam.Result("t", name, width, seed, 90.0 + seed, {w: a + seed for w, a in later.items()}, 2.0, 0.5, 1.0)
        for name in sam.OPTIMIZERS
        for width, later in after.items()
        for seed in (1, 0)
    ]
    rows = sam.summarise(results)
    assert [(row["way"], row["width"], row["seeds"]) for row in rows] == [
        ("float", "float", 2), ("after", "4 bits", 2), ("aware", "4 bits", 2),
    ]  # fmt: skip
    assert rows[0]["SAM"] == pytest.approx((90.5, 0.5**0.5)) and rows[1]["SAM"][0] == 80.5
    assert rows[2]["ASAM, eigenvalue"] == (2.0, 0.0) and "SAM, rise" not in rows[1]
    text = sam.markdown(rows)
    assert text.count("90.50 ± 0.71") == 8 and text.count("0.500 ± 0.000") == 8
