"""Contract: what a training step holds and rewrites beside a plain one.

1. Under autocast the copy has its type and stands in the place of the cast that plain autocast makes of each weight:
   nothing more is kept for the backward, and the only thing that stays between steps is the copy.
2. Micro-batches read one copy, which nothing rewrites, and one look tells a layer that it is fresh.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import askew_kernels as ak

X = torch.randn(32, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()


def network(quantized, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 8))
    return ak.nn.quantize_(model, ak.QuantConfig(ak.quant.Uniform(4), **options)) if quantized else model


def kept_for_backward(model, autocast):
    """{address: bytes} of what the graph holds beside the parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(X).float().square().mean()
    loss.backward()
    return kept


@pytest.mark.parametrize("eps", [1.0, 0.3])
@pytest.mark.parametrize("options", [{}, dict(granularity="per_group", group_size=8)])
def test_memory_under_autocast_is_that_of_plain_autocast(eps, options):
    plain, ours = network(False), network(True, **options)
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(ours), lr=0.01, constraint_eps=eps)
    for _ in range(3):
        kept = kept_for_backward(ours, True)
        optimizer.step()
    copies = {layer.quantizer.quantized(layer.weight, torch.bfloat16).untyped_storage() for layer in ours[::2]}
    assert sum(s.nbytes() for s in copies) == 2 * sum(layer.weight.numel() for layer in ours[::2])
    assert {s.data_ptr() for s in copies} <= kept.keys()  # in the place of plain autocast's casts
    assert sum(kept.values()) <= sum(kept_for_backward(plain, True).values())
    for layer in ours[::2]:
        assert list(layer.quantizer._copies) == [torch.bfloat16]


@pytest.mark.parametrize("autocast", [False, True])
def test_micro_batches_read_one_copy_that_nothing_rewrites(autocast, monkeypatch):
    model = network(True)
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=0.01)
    kept_for_backward(model, autocast)
    optimizer.step()
    dtype = torch.bfloat16 if autocast else torch.float32
    copies = [layer.quantizer.quantized(layer.weight, dtype) for layer in model[::2]]
    versions = [c._version for c in copies]
    settled = []
    original = ak.quant.WeightQuantizer.settle
    monkeypatch.setattr(ak.quant.WeightQuantizer, "settle", lambda *args: settled.append(1) or original(*args))
    for _ in range(4):
        kept_for_backward(model, autocast)
    assert not settled and [c._version for c in copies] == versions
