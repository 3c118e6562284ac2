"""`python -m experiments.finetune_search`: schedules for a model that is trained already, few steps, distilled.

Small float networks are trained on mnist1d of seeds that nothing else uses, quantized, and drawn to their float selves
(``ak.distill``) under the library's own recipe, with other numbers. A way's score is the mean, paired over seeds, of
the logarithm of its KL divergence from the float network over that of straight-through, on signals that were not
trained on: below 0 is nearer. Beside it the same difference of accuracies, in points.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import command, demo
from askew_kernels.annealing import Settings

from .common import standard_error
from .recipe_search import load
from .rivals import lr_share

STE = "straight-through"
WAYS: dict[str, Settings | None] = {
    STE: None,
    "full 0, freeze 0.1": Settings(full=0.0, freeze=0.1),
    "full 0, freeze 0.75": Settings(full=0.0),
    "full 0.3": Settings(full=0.3),
    "full 0.5": Settings(full=0.5),
    "full 0.5, freeze 0.5": Settings(full=0.5, freeze=0.5),
    "full 0.7": Settings(full=0.7),
    "full 0.85": Settings(full=0.85, freeze=0.85),
}
BATCH, FLOAT_STEPS = 64, 1500


def mlp() -> nn.Module:
    return demo.mlp(40, 256)


def convolutions() -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 40))]
    for inputs, outputs in ((1, 24), (24, 48), (48, 48)):
        layers += [nn.Conv1d(inputs, outputs, 5, 2, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(240, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "CNN": convolutions}
RATES = {"adamw": 1e-3, "sgd": 0.05}


def optimizer_of(model: nn.Module, name: str, ours: bool) -> torch.optim.Optimizer:
    if ours:
        groups = ak.param_groups(model, weight_decay=0.0)
        return (ak.optim.ASkewAdamW(groups, lr=RATES[name]) if name == "adamw" else
                ak.optim.ASkewSGD(groups, lr=RATES[name], momentum=0.9))  # fmt: skip
    return (torch.optim.AdamW(model.parameters(), RATES[name], weight_decay=0.0) if name == "adamw" else
            torch.optim.SGD(model.parameters(), RATES[name], momentum=0.9))  # fmt: skip


def fit(model: nn.Module, loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, rows: Iterator[Tensor],
        steps: int, after: Callable[[], None] = lambda: None) -> None:  # fmt: skip
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps + 1):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * lr_share(min(step, steps - 1), steps)
        if step:
            after()
        if step < steps:
            optimizer.zero_grad()
            loss(next(rows)).backward()
            optimizer.step()


def draws(count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(count, (BATCH,), generator=generator)


def score(model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(KL divergence from the teacher, accuracy in %)"""
    with torch.no_grad():
        made, wanted = model.eval()(x), teacher(x)
        kl = functional.kl_div(made.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
        return kl.item(), 100 * (made.argmax(1) == y).double().mean().item()


def finetuned(teacher: nn.Module, width: str, way: Settings | None, optimizer_name: str, x: Tensor, seed: int,
              steps: int) -> nn.Module:  # fmt: skip
    model = copy.deepcopy(teacher).train().requires_grad_(True)
    distiller = ak.distill(model, teacher)
    grid, rule = demo.WIDTHS[width]
    ak.quantize_(model, ak.QuantConfig(weight=grid, scale=rule))
    optimizer = optimizer_of(model, optimizer_name, way is not None)
    followed = ak.Recipe(model, optimizer, steps, settings=way) if way is not None else None
    fit(model, lambda rows: distiller(x[rows]), optimizer, draws(len(x), 100 + seed), steps,
        followed.step if followed else lambda: None)  # fmt: skip
    return ak.hard_quantize_(model)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.finetune_search", description=__doc__)
    add = parser.add_argument
    add("--steps", type=command.whole(1), nargs="+", default=[60, 300])
    add("--seeds", type=command.whole(1), default=4)
    add("--widths", nargs="+", default=list(demo.WIDTHS), choices=list(demo.WIDTHS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    x, y, x_val, y_val = load("mnist1d", Path(tempfile.gettempdir()), Path(), torch.device("cpu"))
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    started = time.monotonic()
    for name, network in NETWORKS.items():
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            teacher = network()
            fit(teacher, lambda rows: functional.cross_entropy(teacher(x[rows]), y[rows]),  # noqa: B023
                optimizer_of(teacher, "adamw", False), draws(len(x), seed), FLOAT_STEPS)  # fmt: skip
            teacher.eval().requires_grad_(False)
            for optimizer, steps, width in ((o, s, w) for o in RATES for s in args.steps for w in args.widths):
                for way, settings in WAYS.items():
                    model = finetuned(teacher, width, settings, optimizer, x, seed, steps)
                    found.setdefault((name, optimizer, str(steps), width, way), []).append(
                        score(model, teacher, x_val, y_val)
                    )
            print(f"{name}, seed {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(table(found, args.widths))
    return 0


def table(found: dict[tuple[str, ...], list[tuple[float, float]]], widths: list[str]) -> str:
    """A row for each network, optimizer, number of steps and way: log ratio of KL ± standard error (points)."""
    rows = []
    for place in dict.fromkeys((*key[:3], key[4]) for key in found):
        cells = []
        for width in widths:
            mine, base = (found[(*place[:3], width, way)] for way in (place[3], STE))
            ratios = [math.log(a[0] / b[0]) for a, b in zip(mine, base, strict=True)]
            points = statistics.fmean(a[1] - b[1] for a, b in zip(mine, base, strict=True))
            cells.append(f"{statistics.fmean(ratios):+.2f} ± {standard_error(ratios):.2f} ({points:+.2f})")
        rows.append((*place, *cells))
    return command.markdown_table(("network", "optimizer", "steps", "way", *widths), rows)


if __name__ == "__main__":
    sys.exit(main())
