"""Contract: quantized weights that FSDP2 shards over two processes train as the whole model does in one, in hold and
annealed, with ASkew's optimizers, with torch's, and with sharpness-aware ones; what cannot be sharded is refused by
name. Tolerance: the gradients of two half batches are averaged in place of one batch's, which moves their last bits;
with levels some 0.05 apart none of the 12 steps may move a weight by more than 1e-4.
"""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels.quant import QuantConfig, Ternary, Uniform

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch is built without gloo"
)

RUNS = {
    "sgd": (QuantConfig(Uniform(4)), lambda m: ak.optim.ASkewSGD(ak.param_groups(m), lr=0.1, momentum=0.9)),
    "adamw": (QuantConfig(Ternary()), lambda m: ak.optim.ASkewAdamW(ak.param_groups(m), lr=0.01)),
    "groups, mse": (
        QuantConfig(Uniform(3), "mse", "per_group", 4), lambda m: ak.optim.ASkewSGD(ak.param_groups(m), lr=0.1),
    ),
    "relaxed": (QuantConfig(Uniform(4), forward="relaxed"), lambda m: ak.optim.ASkewSGD(ak.param_groups(m), lr=0.1)),
    "torch's sgd": (QuantConfig(Uniform(4)), lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
    "sam": (QuantConfig(Uniform(4)), lambda m: ak.optim.SAM(torch.optim.SGD(m.parameters(), lr=0.1), rho=0.05)),
    "asam": (
        QuantConfig(Uniform(4)),
        lambda m: ak.optim.ASAM(ak.optim.ASkewSGD(ak.param_groups(m), lr=0.1, momentum=0.9), rho=0.5),
    ),
}  # fmt: skip


def network(config):
    torch.manual_seed(0)
    return ak.quantize_(nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 8)), {
        "0": config, "2": QuantConfig(config.weight, config.scale),
    })  # fmt: skip


def run(name, share, shard):
    """Parameters, outputs, and outputs after hard quantization."""
    config, make = RUNS[name]
    model, x = network(config), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    y = torch.arange(64) % 8
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    optimizer = make(model)
    grids = any(g.get("grid") is not None for g in optimizer.param_groups)
    annealing = ak.EpsilonAnnealing(optimizer, hold=4, total=12, power=2.0, keep_pull=False) if grids else None
    for _ in range(12):

        def closure():
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x[share]), y[share])
            loss.backward()
            return loss

        optimizer.step(closure)
        if annealing is not None:
            annealing.step()
    with torch.no_grad():
        out = model.eval()(x)
        ak.hard_quantize_(model)
        hard = model(x)
    if shard:
        model.reshard()
    whole = [(p.full_tensor() if shard else p).detach().clone() for p in model.parameters()]
    return [*whole, out, hard]


def work(rank, meeting, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        found = {name: run(name, slice(32 * rank, 32 * rank + 32), True) for name in RUNS}
        found["per_tensor"] = told(lambda: sharded_step(QuantConfig(Uniform(4), granularity="per_tensor")))
        found["zero"] = told(zero)
        if rank == 0:
            torch.save(found, results)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def told(call):
    try:
        call()
    except (NotImplementedError, TypeError) as error:
        return str(error)
    return "nothing"


def sharded_step(config):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(ak.quantize_(nn.Sequential(nn.Linear(4, 4)), config))
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = ak.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    ZeroRedundancyOptimizer(model.parameters(), ak.optim.ASkewSGD, lr=0.1, grid=Uniform(4))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (folder / "meeting", folder / "results"), nprocs=2)
    return torch.load(folder / "results")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name, sharded):
    for got, want in zip(sharded[name], run(name, slice(None), False), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    *_, out, hard = sharded[name]
    torch.testing.assert_close(out, hard, rtol=0, atol=1e-6)


def test_what_cannot_be_sharded_is_refused(sharded):
    assert "granularity" in sharded["per_tensor"] and "per_channel" in sharded["per_tensor"]
    assert "ZeroRedundancyOptimizer" in sharded["zero"] and "fully_shard" in sharded["zero"]
