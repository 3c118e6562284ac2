"""Contract: two processes (gloo) train with SAM as one process does on the same data.

1. DDP: the perturbation is that of the averaged gradient, the same on both ranks, without communication of its own.
2. ``perturbation="local"``: each rank's own perturbation, no communication in the first half, equal weights after it.
3. FSDP2 (DTensor shards): norms are added over the ranks; two sharded processes equal one whole one.
4. An adaptive radius is the same on every rank though their losses differ.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn import functional

from askew_kernels.optim import ASAM, SAM, AlignedSAM

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32", reason="needs gloo"
)
STEPS, RANKS = 4, 2
X = torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (STEPS, 8), generator=torch.Generator().manual_seed(2))
KINDS = {
    "SAM": lambda p, **o: SAM(torch.optim.SGD(p, lr=0.1, momentum=0.9), rho=0.3, telemetry_every=1, **o),
    "ASAM": lambda p, **o: ASAM(torch.optim.AdamW(p, lr=0.01), rho=0.5, telemetry_every=1, **o),
    "AlignedSAM": lambda p, **o: AlignedSAM(
        torch.optim.SGD(p, lr=0.1), rho=0.1, align=0.01, rho_max=0.4, rho_min=0.05, telemetry_every=1, **o
    ),
}


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
        cosines.append(optimizer.telemetry()["cosine"])
    return weights(model), cosines


def mine():
    return slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)


def ddp(kind):
    model = nn.parallel.DistributedDataParallel(network())
    return train(model, KINDS[kind](model.parameters(), model=model), mine())


def fsdp(kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = KINDS[kind](model.parameters(), model=model)
    before = weights(model)
    model(X[0][mine()]).sum().backward()
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


def worker(rank, port, queue):
    """Every job in one pair of processes: starting them takes longest."""
    try:
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=RANKS)
        answers = {"ddp": {k: ddp(k) for k in KINDS}, "fsdp": {k: fsdp(k) for k in KINDS}, "local": local("SAM")}
        file = io.BytesIO()
        torch.save(answers, file)  # as bytes: a tensor's memory would go with this process
        queue.put((rank, file.getvalue(), ""))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, b"", traceback.format_exc()))
        raise


@pytest.fixture(scope="module")
def answers():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=worker, args=(r, port, queue), daemon=True) for r in range(RANKS)]
    for process in processes:
        process.start()
    found = {}
    for _ in range(RANKS):
        rank, answer, error = queue.get()
        assert not error, error
        found[rank] = torch.load(io.BytesIO(answer))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [found[r] for r in range(RANKS)]


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("job", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(answers, job, kind):
    expected, cosines = train(model := network(), KINDS[kind](model.parameters(), model=model), slice(None))
    for answer in answers:
        close(answer[job][kind][0], expected)
        assert answer[job][kind][1] == pytest.approx(cosines, abs=1e-4)
    if job == "ddp":
        assert all(map(torch.equal, answers[0][job][kind][0], answers[1][job][kind][0]))


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
