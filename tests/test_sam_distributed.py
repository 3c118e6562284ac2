"""Contract: two processes (gloo) train with SAM as one process does on the same data.

1. DDP: the perturbation is that of the averaged gradient, the same on both ranks, without communication of its own.
2. ``perturbation="local"``: each rank's own perturbation, no communication in the first half, equal weights after it.
3. FSDP2 (DTensor shards): norms are added over the ranks; two sharded processes equal one whole one.
4. An adaptive radius is the same on every rank though their losses differ.
5. Gradients in DDP's own buckets, and a ZeroRedundancyOptimizer as base, change nothing; one around SAM is refused.
6. Checkpoints of torch.distributed.checkpoint go on bit for bit; copies average the gap over the same process group.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from askew_kernels.optim import ASAM, ESAM, MSAM, SAM, AlignedSAM, LookSAM

STEPS, RANKS = 4, 2
X = torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (STEPS, 8), generator=torch.Generator().manual_seed(2))
KINDS = {
    "SAM": lambda p, zero=False, **o: SAM(
        base(zero, torch.optim.SGD, p, lr=0.1, momentum=0.9), rho=0.3, telemetry_every=1, **o
    ),
    "ASAM": lambda p, zero=False, **o: ASAM(base(zero, torch.optim.AdamW, p, lr=0.01), rho=0.5, telemetry_every=1, **o),
    "AlignedSAM": lambda p, zero=False, **o: AlignedSAM(
        base(zero, torch.optim.SGD, p, lr=0.1), rho=0.1, align=0.01, rho_max=0.4, rho_min=0.05, telemetry_every=1, **o
    ),
    "LookSAM": lambda p, zero=False, **o: LookSAM(
        base(zero, torch.optim.SGD, p, lr=0.1, momentum=0.9), rho=0.3, k=3, telemetry_every=1, **o
    ),
    "ESAM": lambda p, zero=False, **o: ESAM(
        base(zero, torch.optim.SGD, p, lr=0.1, momentum=0.9), rho=0.3, fraction=0.6, seed=2, telemetry_every=1, **o
    ),
    "MSAM": lambda p, zero=False, **o: MSAM(base(zero, torch.optim.AdamW, p, lr=0.01), rho=0.3, **o),
}
JOBS = ["ddp", "buckets", "zero", "fsdp"]


def base(zero, cls, params, **options):
    if not zero:
        return cls(params, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, cls, **options)


def network():
    """float64: sums in another order then differ by 1e-15, far below any mistake."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).double()


def closure_of(model, x, y):
    def closure():
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def weights(model):
    return [p.full_tensor().detach().clone() if hasattr(p, "full_tensor") else p.detach().clone()
            for p in model.parameters()]  # fmt: skip


def train(model, optimizer, rows):
    cosines = []
    for i in range(STEPS):
        optimizer.step(closure_of(model, X[i][rows], Y[i][rows]))
        cosines.append(optimizer.telemetry().get("cosine", 0.0))
    return weights(model), cosines


def mine():
    return slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)


def ddp(kind):
    model = nn.parallel.DistributedDataParallel(network())
    return train(model, KINDS[kind](model.parameters(), model=model), mine())


def buckets(kind):
    """Every bucket of one gradient, and all gradients in one bucket: both are overwritten by the second backward."""
    answers = []
    for megabytes in (1e-6, 25):
        model = nn.parallel.DistributedDataParallel(network(), gradient_as_bucket_view=True, bucket_cap_mb=megabytes)
        answers.append(train(model, KINDS[kind](model.parameters(), model=model), mine()))
    close(answers[0][0], answers[1][0])
    assert answers[0][1] == pytest.approx(answers[1][1], abs=1e-6)
    return answers[0]


def zero(kind):
    model = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(TypeError, match="optimizer_class.*ZeroRedundancyOptimizer"):
        base(True, type(KINDS[kind](model.parameters())), model.parameters(), base_optimizer=torch.optim.SGD, lr=0.1)
    if kind == "MSAM":
        with pytest.raises(TypeError, match="base_optimizer.*ZeroRedundancyOptimizer"):
            KINDS[kind](model.parameters(), zero=True)
        return None
    return train(model, KINDS[kind](model.parameters(), zero=True, model=model), mine())


def copied():
    """Two trainings apart, one in each process: the copy of each equals its original, though their losses differ."""
    groups = [dist.new_group([rank]) for rank in range(RANKS)]
    model = network()
    optimizer = KINDS["AlignedSAM"](model.parameters(), process_group=groups[dist.get_rank()])
    again, other = copy.deepcopy((model, optimizer))
    for i in range(STEPS):
        for used, made in ((model, optimizer), (again, other)):
            made.step(closure_of(used, (1 + dist.get_rank()) * X[i], Y[i]))
    return weights(model), weights(again)


def resumed(kind):
    """A sharded run, and the one that goes on from its checkpoint halfway."""
    from torch.distributed.checkpoint import state_dict as dcp

    model, optimizer = sharded(kind)
    again, other = sharded(kind)
    for i in range(STEPS):
        optimizer.step(closure_of(model, X[i][mine()], Y[i][mine()]))
        if i == 1:
            saved = copy.deepcopy(dcp.get_state_dict(model, optimizer))
    dcp.set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    for i in range(2, STEPS):
        other.step(closure_of(again, X[i][mine()], Y[i][mine()]))
    return weights(model), weights(again), other.telemetry()["step"]


def sharded(kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, KINDS[kind](model.parameters(), model=model)


def fsdp(kind):
    model, optimizer = sharded(kind)
    before = weights(model)
    model(X[0][mine()]).sum().backward()
    if kind == "MSAM":  # along what there is only after a step
        return train(model, optimizer, mine())
    optimizer.first_step(zero_grad=True, loss=1.0)
    moved = not all(map(torch.equal, before, weights(model)))
    optimizer.restore()
    assert moved and all(map(torch.equal, before, weights(model)))
    return train(model, optimizer, mine())


def local(kind):
    """Also what the first half did: communication, and where the weights went."""
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = KINDS[kind](model.parameters(), model=model, perturbation="local")
    reduced, seen = [], []
    model.register_comm_hook(None, lambda _, bucket: (reduced.append(1), _average(bucket))[1])
    for i in range(STEPS):
        calls = []

        def closure(i=i, calls=calls):
            seen.append((weights(model), len(reduced)))
            calls.append(1)
            return closure_of(model, X[i][mine()], Y[i][mine()])()

        optimizer.step(closure)
        assert len(calls) == 2
    return weights(model), seen


def _average(bucket):
    buffer = bucket.buffer()
    dist.all_reduce(buffer)
    future = torch.futures.Future()
    future.set_result(buffer.div_(RANKS))
    return future


def worker(rank, world):
    answers = {job: {kind: globals()[job](kind) for kind in KINDS} for job in (*JOBS, "resumed")}
    return {**answers, "local": local("SAM"), "copied": copied()}


@pytest.fixture(scope="module")
def answers(ranks):
    return ranks.call(worker)


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(answers, job, kind):
    expected, cosines = train(model := network(), KINDS[kind](model.parameters(), model=model), slice(None))
    for answer in [a for a in answers if a[job][kind] is not None]:
        close(answer[job][kind][0], expected)
        assert answer[job][kind][1] == pytest.approx(cosines, abs=1e-4)
    if job != "fsdp" and answers[0][job][kind] is not None:
        assert all(map(torch.equal, answers[0][job][kind][0], answers[1][job][kind][0]))


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_checkpoints_go_on_alike(answers, kind):
    for whole, again, steps in (answer["resumed"][kind] for answer in answers):
        assert all(map(torch.equal, whole, again)) and steps == STEPS


def test_copies_keep_their_process_group(answers):
    (one, _), (other, _) = (answer["copied"] for answer in answers)
    assert not any(map(torch.equal, one, other))
    for whole, again in (answer["copied"] for answer in answers):
        assert all(map(torch.equal, whole, again))


def test_local_perturbation(answers):
    first, second = (answer["local"] for answer in answers)
    assert all(map(torch.equal, first[0], second[0]))  # the ranks end up with the same weights
    for i in range(STEPS):
        (before, count), (moved, after) = first[1][2 * i : 2 * i + 2]
        assert count == after  # nothing was reduced in the first half
        assert all(map(torch.equal, before, second[1][2 * i][0]))
        assert not any(map(torch.equal, moved, second[1][2 * i + 1][0]))  # each its own
        model = network()
        with torch.no_grad():
            for p, w in zip(model.parameters(), before, strict=True):
                p.copy_(w)
        optimizer = KINDS["SAM"](model.parameters())
        closure_of(model, X[i][:4], Y[i][:4])()
        optimizer.first_step()
        close(moved, weights(model))
    assert first[1][-1][1] == STEPS - 1  # and once in each second half; the last was not seen from inside


def test_local_perturbation_needs_ddp():
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), perturbation="local", model=model)
    before = weights(model)
    with pytest.raises(ValueError, match="model"):
        optimizer.step(closure_of(model, X[0], Y[0]))
    close(before, weights(model))
