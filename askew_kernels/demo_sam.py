"""`python -m askew_kernels demo --sam`: do flat minima survive quantization better?

SGD, SAM, ASAM and AlignedSAM, each at its published radius (``OPTIMIZERS``; nothing was tuned), on the demo's data and
networks. Every optimizer trains a float model, which is then quantized without further training (``after``), and
trains quantization-aware from scratch with the demo's recipe, the same ASkewSGD underneath (``aware``). Test accuracy
is that of the hard-quantized weights. Sharpness is taken on the training set at the weights as they end up (for
``aware`` the quantized ones), batch normalization in eval mode: the largest eigenvalue of the Hessian (Lanczos), and
how far the loss can be raised by a perturbation of norm ``REACH`` (projected gradient ascent). Trainings are shorter
than the demo's (``EPOCHS``), because a sharpness-aware step costs two.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import EpsilonAnnealing, QuantConfig, dequantize_, hard_quantize_, optim, param_groups, quantize_
from .analysis import hessian_eigenvalues
from .command import keeping, read_rows, write_rows
from .demo import BATCH, LABEL_SMOOTHING, LR, MOMENTUM, RECIPE, TASKS, WIDTHS, _is_inner, _run_all, cached

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda base, model: base,
    "SAM": lambda base, model: optim.SAM(base, rho=0.05, model=model),
    "ASAM": lambda base, model: optim.ASAM(base, rho=0.5, eta=0.01, model=model),
    "AlignedSAM": lambda base, model: optim.AlignedSAM(base, rho=0.05, align=0.001, model=model),
}
EPOCHS = {"digits / MLP": 20, "mnist1d / MLP": 10}
QUANTIZED = ("4 bits", "2 bits", "ternary")
REACH = 0.5  # norm of the perturbation that the loss is raised by
ASCENT_STEPS = 5


@dataclass(frozen=True)
class Job:
    task: str
    optimizer: str
    width: str  # "float", or what is trained quantization-aware
    seed: int


@dataclass(frozen=True)
class Result:
    task: str
    optimizer: str
    width: str
    seed: int
    accuracy: float  # test, per cent, of the hard-quantized model
    after: dict[str, float]  # float only: test accuracy when quantized afterwards, by width
    eigenvalue: float
    rise: float  # of the training loss within REACH
    seconds: float


# ---- sharpness ------------------------------------------------------------------------------------------------------


def rise_within(loss: Callable[[], Tensor], params: Sequence[Tensor], reach: float, steps: int = ASCENT_STEPS) -> float:
    """How far gradient ascent on the sphere of radius ``reach`` raises the loss; ``params`` are put back."""
    before = [p.detach().clone() for p in params]
    here = highest = float(loss().detach())
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(), params)
        with torch.no_grad():
            size = torch.cat([g.reshape(-1) for g in gradients]).norm() + 1e-30
            moved = [p - w + reach * g / size for p, w, g in zip(params, before, gradients, strict=True)]
            scale = reach / (torch.cat([m.reshape(-1) for m in moved]).norm() + 1e-30)
            for p, w, m in zip(params, before, moved, strict=True):
                p.copy_(w + scale * m)
        highest = max(highest, float(loss().detach()))
    with torch.no_grad():
        for p, w in zip(params, before, strict=True):
            p.copy_(w)
    return highest - here


# ---- one training ---------------------------------------------------------------------------------------------------


def train(job: Job) -> Result:
    """Trains one model; seed, data order and schedule are the same for every optimizer."""
    started = time.perf_counter()
    load, build, epochs = TASKS[job.task]
    epochs = EPOCHS.get(job.task, epochs)
    x, x_test, y, y_test = cached(load, job.seed)
    torch.manual_seed(job.seed)
    model = build().train()
    batches = len(x) // BATCH
    total = epochs * batches
    annealing = None
    base: torch.optim.Optimizer
    if job.width == "float":
        base = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    else:
        _quantize(model, job.width)
        base = optim.ASkewSGD(param_groups(model), lr=LR, momentum=MOMENTUM)
    optimizer = OPTIMIZERS[job.optimizer](base, model)
    if job.width != "float":
        recipe: dict[str, Any] = dict(RECIPE["hard"])
        hold, end = round(recipe.pop("hold") * total), round(recipe.pop("end") * total)
        annealing = EpsilonAnnealing(optimizer, hold=hold, total=end, **recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * min(k / total, 1))))
    order = torch.Generator().manual_seed(job.seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order)[: batches * BATCH].split(BATCH):

            def closure(rows: Tensor = rows) -> Tensor:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(x[rows]), y[rows], label_smoothing=LABEL_SMOOTHING)
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
            schedule.step()
            if annealing:
                annealing.step()
    model.eval()

    def accuracy(of: nn.Module) -> float:
        with torch.no_grad():
            return 100 * (of(x_test).argmax(1) == y_test).float().mean().item()

    after = {}
    if job.width == "float":
        for width in QUANTIZED:
            rounded = copy.deepcopy(model)
            _quantize(rounded, width)
            after[width] = accuracy(hard_quantize_(rounded))
    test = accuracy(hard_quantize_(model))
    dequantize_(model)  # the quantized weights in float layers: their Hessian is not the straight-through one
    params = list(model.parameters())

    def loss() -> Tensor:
        return functional.cross_entropy(model(x), y)

    return Result(**asdict(job), accuracy=test, after=after, eigenvalue=hessian_eigenvalues(loss, params)[0],
                  rise=rise_within(loss, params, REACH), seconds=time.perf_counter() - started)  # fmt: skip


def _quantize(model: nn.Module, width: str) -> None:
    grid, rule = WIDTHS[width]
    quantize_(model, QuantConfig(weight=grid, scale=rule, forward="hard"), _is_inner(model))  # type: ignore[arg-type]


# ---- the table ------------------------------------------------------------------------------------------------------


def summarise(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row for each task, way (float, quantized after, quantization-aware) and width: (mean, std) by optimizer."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    sharp: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    for r in sorted(results, key=lambda r: r.seed):
        way = "float" if r.width == "float" else "aware"
        found.setdefault((r.task, way, r.width), {}).setdefault(r.optimizer, []).append(r.accuracy)
        sharp.setdefault((r.task, way, r.width), {}).setdefault(r.optimizer, []).append((r.eigenvalue, r.rise))
        for width, accuracy in r.after.items():
            found.setdefault((r.task, "after", width), {}).setdefault(r.optimizer, []).append(accuracy)
    rows = []
    ways = ("float", "after", "aware")
    tasks = list(dict.fromkeys(task for task, _, _ in found))
    for task, way, width in sorted(found, key=lambda k: (tasks.index(k[0]), ways.index(k[1]))):
        row: dict[str, Any] = {"task": task, "way": way, "width": width, "seeds": 0}
        for name, values in found[task, way, width].items():
            row["seeds"] = len(values)
            row[name] = _mean_std(values)
            if pairs := sharp.get((task, way, width), {}).get(name):
                row[f"{name}, eigenvalue"] = _mean_std([p[0] for p in pairs])
                row[f"{name}, rise"] = _mean_std([p[1] for p in pairs])
        rows.append(row)
    return rows


def _mean_std(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


WAYS = {"float": "float", "after": "quantized after", "aware": "quantization-aware"}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Accuracy of every row, then sharpness of those that were trained."""

    def table(kind: str | None, digits: int) -> list[str]:
        lines = ["| data / network | trained | weights | " + " | ".join(OPTIMIZERS) + " |",
                 "|---|---|---|" + "---|" * len(OPTIMIZERS)]  # fmt: skip
        for row in rows:
            cells = []
            for name in OPTIMIZERS:
                value = row.get(name if kind is None else f"{name}, {kind}")
                cells.append("" if value is None else f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}")
            if any(cells):
                lines.append(f"| {row['task']} | {WAYS[row['way']]} | {row['width']} | " + " | ".join(cells) + " |")
        return lines

    return "\n".join([
        "Test accuracy, %:", "", *table(None, 2), "", "Largest eigenvalue of the Hessian, training set:", "",
        *table("eigenvalue", 2), "", f"Rise of the training loss within a distance of {REACH}:", "", *table("rise", 3),
    ])  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy, eigenvalue and rise against the width, one row of panels for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = pyplot.subplots(len(tasks), 4, figsize=(14, 3.3 * len(tasks)), squeeze=False)
    colours = dict(zip(OPTIMIZERS, ("#8a8a8a", "#d08a2e", "#1f6fb4", "#3a9a5b"), strict=True))
    for line, task in zip(axes, tasks, strict=True):
        for axis, (title, kind, ways) in zip(line, (
            ("accuracy, quantized after, %", None, ("float", "after")),
            ("accuracy, quantization-aware, %", None, ("float", "aware")),
            ("largest Hessian eigenvalue", "eigenvalue", ("float", "aware")),
            (f"rise of the loss within {REACH}", "rise", ("float", "aware")),
        ), strict=True):  # fmt: skip
            part = [row for row in rows if row["task"] == task and row["way"] in ways]
            for shift, (name, colour) in enumerate(colours.items()):
                known = [(i, row.get(name if kind is None else f"{name}, {kind}")) for i, row in enumerate(part)]
                axis.errorbar(
                    [i + 0.14 * (shift - 1.5) for i, v in known if v], [v[0] for _, v in known if v],
                    [v[1] for _, v in known if v], fmt="o", color=colour, capsize=2, markersize=4, label=name,
                )  # fmt: skip
            if kind is not None:
                axis.set_ylim(bottom=0)
            axis.set_xticks(range(len(part)), [row["width"] for row in part], fontsize=8)
            axis.set_title(f"{task}: {title}", fontsize=9)
            axis.grid(axis="y", alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---- the command ----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Trains, prints the tables, writes rows, tables and plot; returns the exit code. Known rows are not redone."""
    tasks = args.tasks or list(EPOCHS)
    widths = args.widths or list(QUANTIZED)
    seeds = args.seeds or (5 if args.full else 2)
    path = args.out / "sam.jsonl"
    jobs = [Job(task, name, width, seed) for seed in range(seeds) for task in tasks
            for width in ("float", *widths) for name in OPTIMIZERS]  # fmt: skip
    known = read_rows(path, Result)
    results = {Job(r.task, r.optimizer, r.width, r.seed): r for r in known}
    missing = [job for job in jobs if job not in results]
    print(f"{len(jobs)} models, {len(missing)} of them to train: {', '.join(tasks)}; {seeds} seeds.", file=sys.stderr)
    with keeping(path, results.values()), contextlib.closing(_run_all(missing, args.workers, train)) as finished:
        for done, result in enumerate(finished, 1):
            results[Job(result.task, result.optimizer, result.width, result.seed)] = result
            write_rows(path, results.values())
            if done % 16 == 0 or done == len(missing):
                print(f"{done} of {len(missing)}", file=sys.stderr, flush=True)
    kept = [results[job] for job in jobs]
    write_rows(path, [*kept, *(r for job, r in results.items() if job not in jobs)])
    rows = summarise(kept)
    (args.out / "sam.md").write_text(markdown(rows) + "\n")
    print(markdown(rows))
    plot(rows, args.out / "sam.png")
    print(f"wrote {path}, {args.out / 'sam.md'}, {args.out / 'sam.png'}", file=sys.stderr)
    return 0
