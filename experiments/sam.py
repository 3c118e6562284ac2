"""`python -m askew_kernels demo --sam`: do flat minima survive quantization better, and at what cost?

SGD and the sharpness-aware steps over it, each at its published radius (``OPTIMIZERS``; nothing was tuned), on the
demo's data and networks. Every optimizer trains a float model, which is then quantized without further training
(``after``), and trains quantization-aware from scratch with the demo's recipe, the same ASkewSGD underneath
(``aware``). Test accuracy is that of the hard-quantized weights. Sharpness is taken on the training set at the weights
as they end up (for ``aware`` the quantized ones), batch normalization in eval mode: the largest eigenvalue of the
Hessian (Lanczos), and how far the loss can be raised by a perturbation of norm ``REACH`` (projected gradient ascent).

Two budgets: equal epochs, and equal time, counted in gradients (``GRADIENTS``), where what takes one gradient a step
trains for twice the epochs of what takes two. ``EPOCHS`` are enough for the training loss to flatten.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import command, demo, figures
from askew_kernels.analysis import hessian_eigenvalues

from .common import complete

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda base, model: base,
    "MSAM": lambda base, model: ak.optim.MSAM(base, rho=0.3, model=model),
    "LookSAM": lambda base, model: ak.optim.LookSAM(base, rho=0.05, k=5, alpha=0.7, model=model),
    "ESAM": lambda base, model: ak.optim.ESAM(base, rho=0.05, fraction=0.6, model=model),
    "SAM": lambda base, model: ak.optim.SAM(base, rho=0.05, model=model),
    "ASAM": lambda base, model: ak.optim.ASAM(base, rho=0.5, eta=0.01, model=model),
    "AlignedSAM": lambda base, model: ak.optim.AlignedSAM(base, rho=0.05, align=0.001, model=model),
}
GRADIENTS = {"SGD": 1.0, "MSAM": 1.0, "LookSAM": 1.2}  # a step; the others take 2
BUDGETS = ("equal epochs", "equal time")
EPOCHS = {"digits / MLP": 40, "mnist1d / MLP": 40}
QUANTIZED = ("4 bits", "2 bits", "ternary")
REACH = 0.5  # norm of the perturbation that the loss is raised by
ASCENT_STEPS = 5


@dataclass(frozen=True)
class Job:
    task: str
    optimizer: str
    width: str  # "float", or what is trained quantization-aware
    seed: int
    budget: str = field(kw_only=True)


@dataclass(frozen=True)
class Result(Job):
    accuracy: float  # test, per cent, of the hard-quantized model
    after: dict[str, float]  # float only: test accuracy when quantized afterwards, by width
    eigenvalue: float
    rise: float  # of the training loss within REACH
    seconds: float  # the processor's, of the training


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


def train(job: Job) -> list[Result]:
    """Trains one model; seed, data order and schedule are the same for every optimizer."""
    load, build, epochs = demo.TASKS[job.task]
    epochs = EPOCHS.get(job.task, epochs)
    if job.budget == "equal time":
        epochs = round(epochs * 2 / GRADIENTS[job.optimizer])
    data = x, x_test, y, y_test = demo.cached(load, job.seed)
    torch.manual_seed(job.seed)
    model = build().train()
    base, recipe = demo.prepare(model, "float" if job.width == "float" else "hard", job.width)
    optimizer = OPTIMIZERS[job.optimizer](base, model)
    started = time.process_time()
    demo.fit(model, optimizer, demo.batches(data, epochs, job.seed), epochs * (len(x) // demo.BATCH), recipe)
    seconds = time.process_time() - started
    if job.optimizer == "MSAM":  # as published: its running statistics are those of perturbed weights
        torch.optim.swa_utils.update_bn(x.split(demo.BATCH), model)
    model.eval()
    after = {}
    for width in QUANTIZED if job.width == "float" else ():
        rounded = demo.quantize_inner(copy.deepcopy(model), width)
        after[width] = demo.accuracy(ak.hard_quantize_(rounded), x_test, y_test)
    test = demo.accuracy(ak.hard_quantize_(model), x_test, y_test)
    ak.dequantize_(model)  # the quantized weights in float layers: their Hessian is not the straight-through one
    params = list(model.parameters())

    def loss() -> Tensor:
        return functional.cross_entropy(model(x), y)

    return [Result(**asdict(job), accuracy=test, after=after, eigenvalue=hessian_eigenvalues(loss, params)[0],
                   rise=rise_within(loss, params, REACH), seconds=seconds)]  # fmt: skip


def summarise(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row for each budget, task, way (float, quantized after, quantization-aware) and width: (mean, std) by
    optimizer. What takes two gradients a step has one training for both budgets."""
    found: list[tuple[str, str, str, str, str, float]] = []
    for r in sorted(results, key=lambda r: r.seed):
        way = "float" if r.width == "float" else "aware"
        values = {r.optimizer: r.accuracy, f"{r.optimizer}, eigenvalue": r.eigenvalue, f"{r.optimizer}, rise": r.rise,
                  f"{r.optimizer}, seconds": r.seconds}  # fmt: skip
        for budget in (r.budget,) if r.optimizer in GRADIENTS else BUDGETS:
            found += [(budget, r.task, way, r.width, name, value) for name, value in values.items()]
            found += [(budget, r.task, "after", width, r.optimizer, value) for width, value in r.after.items()]
    tasks = list(dict.fromkeys(task for _, task, *_ in found))
    rows = []
    places = command.grouped(found, lambda f: f[:4])
    order = lambda k: (BUDGETS.index(k[0]), tasks.index(k[1]), list(WAYS).index(k[2]))  # noqa: E731
    for budget, task, way, width in sorted(places, key=order):
        columns = command.grouped(places[budget, task, way, width], lambda f: f[4])
        row: dict[str, Any] = {"budget": budget, "task": task, "way": way, "width": width}
        row |= {name: demo.mean_std([value for *_, value in members]) for name, members in columns.items()}
        rows.append({**row, "seeds": max(map(len, columns.values()))})
    return rows


WAYS = {"float": "float", "after": "quantized after", "aware": "quantization-aware"}
MEASURES = {  # heading: (ending of the row's key, digits)
    "Test accuracy, %": ("", 2),
    "Largest eigenvalue of the Hessian, training set": (", eigenvalue", 2),
    f"Rise of the training loss within a distance of {REACH}": (", rise", 3),
    "Processor seconds of a training": (", seconds", 1),
}
PANELS = (
    ("accuracy, %", "", "equal epochs"),
    ("accuracy, %", "", "equal time"),
    ("largest Hessian eigenvalue", ", eigenvalue", "equal time"),
    (f"rise of the loss within {REACH}", ", rise", "equal time"),
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Accuracy of every row, then sharpness of those that were trained."""
    parts = []
    headings = ("data / network", "trained", "weights", *OPTIMIZERS)
    for heading, (ending, digits) in MEASURES.items():
        for budget in BUDGETS:
            cells = []
            for row in (row for row in rows if row["budget"] == budget):
                values = [demo.plus_minus(row.get(o + ending), digits) for o in OPTIMIZERS]
                cells += [[row["task"], WAYS[row["way"]], row["width"], *values]] if any(values) else []
            if cells:
                parts.append(f"{heading}, {budget}:\n\n{command.markdown_table(headings, cells)}")
    return "\n\n".join(parts)


def plot(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Accuracy, eigenvalue and rise against the width, one row of panels for each task."""
    tasks = command.grouped(rows, lambda row: row["task"])
    figure, axes = figures.figure(len(tasks), len(PANELS), 15, 2.9 * len(tasks) + 0.5)
    for axis, (task, (title, ending, budget)) in zip(axes, itertools.product(tasks, PANELS), strict=True):
        part = [row for row in tasks[task] if row["way"] != "after" and row["budget"] == budget]
        figures.means(axis, [row["width"] for row in part], {o: [r.get(o + ending) for r in part] for o in OPTIMIZERS})
        figures.label(axis, f"{task}, {budget}\n{title}")
        if ending:
            axis.set_ylim(bottom=0)
    figures.legend_below(figure, axes, len(OPTIMIZERS))
    return figures.save(figure, "sam", ("png",))


def run(args: argparse.Namespace) -> int:
    """Trains, prints the tables, writes rows, tables and plot; returns the exit code. Known rows are not redone."""
    command.need("demo", "matplotlib", "mnist1d", "sklearn", "scipy")
    command.check_folder(args.out)
    tasks = args.tasks or list(EPOCHS)
    widths = args.widths or list(QUANTIZED)
    seeds = args.seeds or (5 if args.full else 2)
    path = args.out / "sam.jsonl"
    jobs = [Job(task, name, width, seed, budget=budget) for seed in range(seeds) for task in tasks
            for width in ("float", *widths) for name in OPTIMIZERS
            for budget in BUDGETS[: 1 + (name in GRADIENTS)]]  # fmt: skip

    def job_of(r: Result) -> Job:
        return Job(r.task, r.optimizer, r.width, r.seed, budget=r.budget)

    words = f"{{}} models, {{}} of them to train: {', '.join(tasks)}; {seeds} seeds."
    place = {job: i for i, job in enumerate(jobs)}
    order = lambda r: place.get(job_of(r), len(jobs))  # noqa: E731
    results = complete(path, Result, job_of, jobs, train, args.workers, words, order)
    rows = summarise(r for r in results if job_of(r) in place)
    print(markdown(rows))
    for name, data in {"sam.md": (markdown(rows) + "\n").encode(), **plot(rows)}.items():
        command.write_atomic(args.out / name, data)
    print(f"Written: {path}, {args.out / 'sam.md'}, {args.out / 'sam.png'}")
    return 0
