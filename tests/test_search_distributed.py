"""Contract: a search in two processes (gloo), each with half of every batch, is the search in one process.

Gradients, losses and surrogate gaps are averaged, so every rank takes the same steps and returns the same policy; one
process alone writes the checkpoint.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.nn import functional

from askew_kernels import search

pytest.importorskip("scipy")


def run(share, seed_of_model, checkpoint=None):
    """float64: sums in another order then differ by 1e-15, far below any mistake."""
    torch.manual_seed(seed_of_model)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, 8, 6, generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (5, 8), generator=g)
    batches = [(a[share], b[share]) for a, b in zip(x, y, strict=True)]
    policy = search.search_policy(
        model, batches, functional.cross_entropy, weight_bits=(2, 4, 8), act_bits=(4, None), steps=7, strength_lr=0.1,
        budget=search.Budget(bitops=10_000), checkpoint=checkpoint, progress=False,
    )  # fmt: skip
    found = [p for layer in policy.report["probabilities"].values() for p in (*layer["weights"], *layer["inputs"])]
    return policy.weight_bits, policy.act_bits, found, [r["surrogate_gap"] for r in policy.report["history"]]


def worker(rank, world, folder):
    """Ranks start from different models: the first one's counts."""
    return run(slice(4 * rank, 4 * rank + 4), 3 + rank, os.path.join(folder, f"{rank}.pt"))


def test_two_processes_are_one(tmp_path, ranks):
    first, second = ranks.call(worker, str(tmp_path))
    alone = run(slice(0, 8), 3)
    assert first == second
    assert first[:2] == alone[:2]
    for a, b in zip(first[2:], alone[2:], strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["0.pt"]
    assert run(slice(0, 4), 3)[2] != pytest.approx(first[2], rel=1e-9)  # half of the data alone is another search
