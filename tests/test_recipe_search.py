"""The recipe search's batched step computes what the library's optimizers compute, replica by replica."""

import pytest
import torch

from askew_kernels import demo, optim, quant
from experiments import finetune_search
from experiments import recipe_search as search

GRIDS = {
    "4 bits": quant.Uniform(4), "2 bits": quant.Uniform(2), "2 bits, mid-rise": quant.Midrise(2),
    "ternary": quant.Ternary(), "binary": quant.Binary(),
}  # fmt: skip


def replicas(way, seed=0):
    return [search.Replica(way, width, True, 0.05, 0.0, seed) for width in GRIDS]


def data():
    rng = torch.Generator().manual_seed(3)
    x, y = torch.randn(64, 40, generator=rng), torch.randint(10, (64,), generator=rng)
    return [x, y, x, y]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("direction", [False, True])
@pytest.mark.parametrize("eps", [1.0, 0.4])
def test_step_is_the_optimizers(optimizer, direction, eps):
    way = search.Way("x", 0.5, direction=direction)
    made = replicas(way)
    task = search.Task("t", "d", (("fc", 40, 6), ("fc", 6, 10)), 1, 16)
    networks = search.Networks(task, optimizer, made, data(), 1)
    n, frozen = len(made), eps < 1
    lr = torch.full((n, 1, 1), 0.05)
    flag = torch.full((n, 1, 1), frozen)
    rng = torch.Generator().manual_seed(0)
    ours = []
    for r, name in enumerate(GRIDS):
        p = torch.nn.Parameter(networks.weights[0][r].clone())
        make = optim.ASkewAdamW if optimizer == "adamw" else optim.ASkewSGD
        rule = quant.default_rule(GRIDS[name])
        more = {} if optimizer == "adamw" else {"momentum": 0.9}
        o = make([{"params": [p], "grid": GRIDS[name], "scale": rule}], lr=0.05, constraint_eps=eps,
                 skew="direction" if direction else "gradient", **more)  # fmt: skip
        ours.append((p, o))
    w, m, v, s = networks.weights[0], networks.m[0], networks.v[0], networks.s[0]
    s_m, s_v = networks.s_m[0], networks.s_v[0]
    for k in range(3):
        grad = torch.randn(w.shape, generator=rng)
        inside = (w / s >= networks.grids.lo) & (w / s <= networks.grids.hi)
        for r, (p, o) in enumerate(ours):
            p.grad = torch.where(inside[r], grad[r], 0.0)
            o.step()
        w, m, v, s, s_m, s_v, _ = search.step_layer(
            w, grad, m, v, s, s_m, s_v, s * 0, networks.grids, torch.ones_like(flag), torch.full_like(lr, eps),
            torch.ones_like(lr), lr, lr, flag, flag, torch.zeros_like(flag), ~torch.zeros_like(flag),
            torch.full_like(flag, direction), torch.zeros_like(lr), torch.zeros_like(flag),
            networks.bias1[k].view(1, 1, 1), networks.bias2[k].view(1, 1, 1), optimizer == "adamw", networks.decay,
        )  # fmt: skip
        for r, (p, _) in enumerate(ours):
            torch.testing.assert_close(w[r], p.detach(), rtol=2e-4, atol=2e-5)  # kappa near a midpoint


def test_learned_scale_has_the_published_gradient():
    g = search.Grids(*(torch.full((1, 1, 1), v) for v in (-8.0, 7.0, 1.0, 7.0, 0.0, 0.0)))
    w = torch.randn(1, 3, 20)
    s = torch.full((1, 3, 1), 0.2)
    grad = torch.randn_like(w)
    x = w.double() / s.double()
    inside = (x >= -8) & (x <= 7)
    wanted = (grad * torch.where(inside, x.round() - x, x.round().clamp(-8, 7))).sum(2, keepdim=True) / (20 * 7) ** 0.5
    one, no = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.bool)
    found = search.step_layer(w, grad, w * 0, w[:1, :1, :1], s, s * 0, s * 0, s * 1e-3, g, ~no, one, one, one * 0, one,
                              no, no, ~no, ~no, no, one * 0, no, one, one, False, 0.0)[3]  # fmt: skip
    torch.testing.assert_close(found, (s - wanted).clamp(min=2e-4).float(), rtol=1e-5, atol=1e-6)


def test_networks_train_and_resume_their_order(tmp_path):
    task = search.Task("t", "d", (("conv", 1, 4, 3, 2), ("fc", 80, 10)), 1, 16, {"sgd": ((0.05, 0.0),)})
    ways = [
        search.STE,
        search.LSQ,
        search.Way("a", 0.5),
        search.Way("b", 0.5, average=0.9, settle=0.01),
        search.Way("c", 0.5, outer=search.Way("", 0.9)),
    ]
    out = tmp_path / "rows.jsonl"
    search.run(task, "sgd", ways, ["2 bits", "binary"], [0, 1], data(), 2, 100, float("inf"), out)
    rows = [search.json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == (4 * 2 + 1) * 2 * 2
    assert all(0 <= r["accuracy"] <= 100 for r in rows)
    found = search.scores(rows)
    assert {s["way"] for s in found} == {"LSQ", "a", "b", "c"} and all(s["seeds"] == 2 for s in found)
    assert "worst cell" in search.report(rows)
    lines = search.report([row for row in rows if row["seed"] == 0]).splitlines()
    assert [line.split(" | ")[0] for line in lines[1:]] == ["LSQ", "a", "b", "c"]  # no error, but a number


def test_the_way_over_falls_as_parqs():
    """torchao's ``normalized_mirror_sigmoid``: (sigma(s (1/2 - t)) - sigma(-s/2)) / (sigma(s/2) - sigma(-s/2))."""
    left = torch.linspace(1, 0, 11, dtype=torch.float64).numpy()
    found = search.bent(left, 10.0)
    sigma = torch.sigmoid(torch.tensor(10 * (left - 0.5)))
    ends = torch.sigmoid(torch.tensor([-5.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(torch.tensor(found), (sigma - ends[0]) / (ends[1] - ends[0]))
    assert (found[0], found[5], found[-1]) == pytest.approx((1, 0.5, 0)) and (search.bent(left, 0.0) == left).all()


def test_patches_are_a_convolutions():
    x, w = torch.randn(2, 3, 1, 28, 28), torch.randn(2, 5, 9)
    seen, size = search.patches(x.flatten(2), ("image", 1, 5, 3, 2))
    found = torch.bmm(seen, w.transpose(1, 2)).view(2, 3, *size, 5).movedim(-1, 2)
    for r in range(2):
        wanted = torch.nn.functional.conv2d(x[r], w[r].view(5, 1, 3, 3), stride=2, padding=1)
        torch.testing.assert_close(found[r], wanted, rtol=1e-4, atol=1e-4)


def test_finetuning_is_compared_with_straight_through(monkeypatch, capsys, tmp_path):
    """Every way is there, straight-through is 0 beside itself, and a way without any way over is not."""
    monkeypatch.setattr(finetune_search, "FLOAT_STEPS", 3)
    monkeypatch.setattr(finetune_search, "NETWORKS", {"MLP": lambda: demo.mlp(40, 8)})
    monkeypatch.setattr(finetune_search, "load", lambda *_: [torch.randn(80, 40), torch.randint(10, (80,))] * 2)
    assert finetune_search.main(["--steps", "8", "--seeds", "2", "--widths", "2 bits"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == len(finetune_search.RATES) * len(finetune_search.WAYS)
    gains = {row[3]: float(row[4].split(" ")[0]) for row in rows}
    assert gains[finetune_search.STE] == 0.0 and gains["full 0.85"] != 0.0
