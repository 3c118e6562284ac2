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
import copy
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
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
    "SAM": lambda base, model: ak.optim.SAM(base, rho=0.05, model=model),
    "ASAM": lambda base, model: ak.optim.ASAM(base, rho=0.5, eta=0.01, model=model),
    "AlignedSAM": lambda base, model: ak.optim.AlignedSAM(base, rho=0.05, align=0.001, model=model),
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
class Result(Job):
    accuracy: float  # test, per cent, of the hard-quantized model
    after: dict[str, float]  # float only: test accuracy when quantized afterwards, by width
    eigenvalue: float
    rise: float  # of the training loss within REACH
    seconds: float


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
    started = time.perf_counter()
    load, build, epochs = demo.TASKS[job.task]
    epochs = EPOCHS.get(job.task, epochs)
    data = x, x_test, y, y_test = demo.cached(load, job.seed)
    torch.manual_seed(job.seed)
    model = build().train()
    base, recipe = demo.prepare(model, "float" if job.width == "float" else "hard", job.width)
    optimizer = OPTIMIZERS[job.optimizer](base, model)
    demo.fit(model, optimizer, demo.batches(data, epochs, job.seed), epochs * (len(x) // demo.BATCH), recipe)
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
                   rise=rise_within(loss, params, REACH), seconds=time.perf_counter() - started)]  # fmt: skip


def summarise(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row for each task, way (float, quantized after, quantization-aware) and width: (mean, std) by optimizer."""
    found: list[tuple[str, str, str, str, float]] = []
    for r in sorted(results, key=lambda r: r.seed):
        way = "float" if r.width == "float" else "aware"
        values = {r.optimizer: r.accuracy, f"{r.optimizer}, eigenvalue": r.eigenvalue, f"{r.optimizer}, rise": r.rise}
        found += [(r.task, way, r.width, name, value) for name, value in values.items()]
        found += [(r.task, "after", width, r.optimizer, value) for width, value in r.after.items()]
    tasks = list(dict.fromkeys(task for task, *_ in found))
    rows = []
    places = command.grouped(found, lambda f: f[:3])
    for task, way, width in sorted(places, key=lambda k: (tasks.index(k[0]), list(WAYS).index(k[1]))):
        columns = command.grouped(places[task, way, width], lambda f: f[3])
        row: dict[str, Any] = {"task": task, "way": way, "width": width}
        row |= {name: demo.mean_std([value for *_, value in members]) for name, members in columns.items()}
        rows.append({**row, "seeds": max(map(len, columns.values()))})
    return rows


WAYS = {"float": "float", "after": "quantized after", "aware": "quantization-aware"}
MEASURES = {  # heading: (ending of the row's key, digits)
    "Test accuracy, %": ("", 2),
    "Largest eigenvalue of the Hessian, training set": (", eigenvalue", 2),
    f"Rise of the training loss within a distance of {REACH}": (", rise", 3),
}
PANELS = (
    ("accuracy, quantized after, %", "", ("float", "after")),
    ("accuracy, quantization-aware, %", "", ("float", "aware")),
    ("largest Hessian eigenvalue", ", eigenvalue", ("float", "aware")),
    (f"rise of the loss within {REACH}", ", rise", ("float", "aware")),
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Accuracy of every row, then sharpness of those that were trained."""
    parts = []
    headings = ("data / network", "trained", "weights", *OPTIMIZERS)
    for heading, (ending, digits) in MEASURES.items():
        cells = []
        for row in rows:
            values = [demo.plus_minus(row.get(o + ending), digits) for o in OPTIMIZERS]
            cells += [[row["task"], WAYS[row["way"]], row["width"], *values]] if any(values) else []
        parts.append(f"{heading}:\n\n{command.markdown_table(headings, cells)}")
    return "\n\n".join(parts)


def plot(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Accuracy, eigenvalue and rise against the width, one row of panels for each task."""
    tasks = command.grouped(rows, lambda row: row["task"])
    figure, axes = figures.figure(len(tasks), len(PANELS), 14, 2.9 * len(tasks) + 0.5)
    for axis, (task, (title, ending, ways)) in zip(axes, itertools.product(tasks, PANELS), strict=True):
        part = [row for row in tasks[task] if row["way"] in ways]
        figures.means(axis, [row["width"] for row in part], {o: [r.get(o + ending) for r in part] for o in OPTIMIZERS})
        figures.label(axis, f"{task}\n{title}")
        if ending:
            axis.set_ylim(bottom=0)
    figures.legend_below(figure, axes)
    return figures.save(figure, "sam", ("png",))


def run(args: argparse.Namespace) -> int:
    """Trains, prints the tables, writes rows, tables and plot; returns the exit code. Known rows are not redone."""
    command.need("demo", "matplotlib", "mnist1d", "sklearn", "scipy")
    command.check_folder(args.out)
    tasks = args.tasks or list(EPOCHS)
    widths = args.widths or list(QUANTIZED)
    seeds = args.seeds or (5 if args.full else 2)
    path = args.out / "sam.jsonl"
    jobs = [Job(task, name, width, seed) for seed in range(seeds) for task in tasks
            for width in ("float", *widths) for name in OPTIMIZERS]  # fmt: skip

    def job_of(r: Result) -> Job:
        return Job(r.task, r.optimizer, r.width, r.seed)

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
