"""`python -m askew_kernels demo`: real data, real models, and what quantization-aware training costs them.

Every number comes from the drop-in layers and the package's optimizers. Rows: float; straight-through (hard forward,
torch.optim.SGD, the scale recomputed every step); ASkewSGD relaxed (as published: gradient at the float weights,
geometric annealing); ASkewSGD hard (the recommended recipe, ``RECIPE``). All share network, initialisation, data
order, epochs, learning-rate schedule and scale rule; differences are paired over seeds. First and last layer stay
float in every row.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import EpsilonAnnealing, QuantConfig, hard_quantize_, optim, param_groups, quantize_
from .bench.rows import write_atomic
from .command import check_folder, keeping, whole, write_rows
from .nn import quantized_layers
from .quant import Binary, Grid, Ternary, Uniform

# One recipe for every network, data set and width. Periods are shares of all batches.
RECIPE = {
    "hard": {"hold": 0.10, "end": 0.95, "mode": "gap", "power": 12.0, "keep_pull": True},
    "relaxed": {"hold": 0.30, "end": 1.0, "mode": "geometric"},  # as published: hold, then a constant factor
}
LR, MOMENTUM, BATCH, LABEL_SMOOTHING = 0.2, 0.9, 64, 0.1
METHODS = ("float", "straight-through", "relaxed", "hard")
WIDTHS: dict[str, tuple[Grid, str]] = {
    "4 bits": (Uniform(bits=4), "sawb"),
    "3 bits": (Uniform(bits=3), "sawb"),
    "2 bits": (Uniform(bits=2), "sawb"),
    "ternary": (Ternary(), "mean"),
    "binary": (Binary(), "mean"),
}


# ---- data: shipped with a package or made here, never downloaded ---------------------------------------------------

Data = tuple[Tensor, Tensor, Tensor, Tensor]  # x, x_test, y, y_test


def _normalised(x: Any, x_test: Any, y: Any, y_test: Any) -> Data:
    a, b = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(x_test, dtype=torch.float32)
    mean, std = a.mean(), a.std()
    return (a - mean) / std, (b - mean) / std, torch.as_tensor(y).long(), torch.as_tensor(y_test).long()


def load_digits(fold: int = 0) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 × 8, without one of five stratified folds, which is the test.

    One fold is 360 digits, 0.28 points each; over five seeds every digit is tested once.
    """
    from sklearn.datasets import load_digits as digits
    from sklearn.model_selection import StratifiedKFold

    found = digits()
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(found.data, found.target)
    train_rows, test_rows = list(folds)[fold % 5]
    x, y = found.data, found.target
    return _normalised(x[train_rows], x[test_rows], y[train_rows], y[test_rows])


def load_mnist1d(fold: int = 0) -> Data:
    """mnist1d's 4,000 training signals of length 40 as published, and 10,000 others for the test, made locally.

    The published test set of 1,000 is too small to tell methods apart that differ by a few tenths of a point.
    """
    import numpy as np
    from mnist1d.data import get_dataset_args, make_dataset

    options = get_dataset_args()
    state = np.random.get_state()  # make_dataset seeds NumPy's global generator
    try:
        made = make_dataset(options)
        options.seed, options.num_samples = 2024, 10_000
        other = make_dataset(options)
    finally:
        np.random.set_state(state)
    x_test, y_test = (np.concatenate([other[key], other[f"{key}_test"]]) for key in "xy")
    return _normalised(made["x"], x_test, made["y"], y_test)


# ---- networks -------------------------------------------------------------------------------------------------------


def _digits_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def _digits_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def _mnist1d_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(40, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def _mnist1d_cnn() -> nn.Sequential:
    """A 1-D convolutional network, written with kernels of height 1."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 40)),
        nn.Conv2d(1, 32, (1, 5), stride=(1, 2), padding=(0, 2), bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, (1, 3), stride=(1, 2), padding=(0, 1), bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, (1, 3), stride=(1, 2), padding=(0, 1), bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(320, 10),
    )  # fmt: skip


# name: (data, network, epochs)
TASKS: dict[str, tuple[Callable[[int], Data], Callable[[], nn.Sequential], int]] = {
    "digits / MLP": (load_digits, _digits_mlp, 30),
    "digits / CNN": (load_digits, _digits_cnn, 20),
    "mnist1d / MLP": (load_mnist1d, _mnist1d_mlp, 20),
    "mnist1d / CNN": (load_mnist1d, _mnist1d_cnn, 15),
}


# ---- one training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    task: str
    method: str
    width: str  # "float" for the float row
    seed: int


@dataclass(frozen=True)
class Result:
    task: str
    method: str
    width: str
    seed: int
    accuracy: float  # test, per cent, of the hard-quantized model
    train_accuracy: float
    moved: float  # furthest that the final hard quantization moved a weight, in scales
    seconds: float


_data: dict[tuple[Callable[[int], Data], int], Data] = {}


def cached(load: Callable[[int], Data], seed: int) -> Data:
    """What a seed trains and tests on (of the digits, its fold), made once in a process."""
    fold = seed % 5 if load is load_digits else 0
    if (load, fold) not in _data:
        _data[load, fold] = load(fold)
    return _data[load, fold]


def _is_inner(model: nn.Sequential) -> Callable[[nn.Module, str], bool]:
    """Neither the first nor the last layer with a weight matrix."""
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return lambda _module, name: name not in (layers[0], layers[-1])


def train(job: Job) -> Result:
    """Trains one model; the seed decides initialisation, data order and fold, whatever the method and the width."""
    started = time.perf_counter()
    load, build, epochs = TASKS[job.task]
    x, x_test, y, y_test = cached(load, job.seed)
    torch.manual_seed(job.seed)
    model = build().train()
    batches = len(x) // BATCH
    total = epochs * batches
    if job.method != "float":
        grid, rule = WIDTHS[job.width]
        forward = "relaxed" if job.method == "relaxed" else "hard"
        quantize_(model, QuantConfig(weight=grid, scale=rule, forward=forward), _is_inner(model))
    annealing = None
    optimizer: torch.optim.Optimizer
    if job.method in RECIPE:
        recipe: dict[str, Any] = dict(RECIPE[job.method])
        optimizer = optim.ASkewSGD(param_groups(model), lr=LR, momentum=MOMENTUM)
        hold, end = round(recipe.pop("hold") * total), round(recipe.pop("end") * total)
        annealing = EpsilonAnnealing(optimizer, hold=hold, total=end, **recipe)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * min(k / total, 1))))
    order = torch.Generator().manual_seed(job.seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order)[: batches * BATCH].split(BATCH):
            loss = functional.cross_entropy(model(x[rows]), y[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if annealing:
                annealing.step()
    model.eval()
    before = [p.detach().clone() for p in model.parameters()]
    hard_quantize_(model)
    scales = {id(layer.weight): layer.weight_scale for layer in quantized_layers(model).values()}
    moved = [
        ((p - old).abs() / scales[id(p)].reshape(-1, *[1] * (p.dim() - 1))).max().item()
        for p, old in zip(model.parameters(), before, strict=True)
        if id(p) in scales
    ]
    with torch.no_grad():
        test, seen = (
            100 * (model(a).argmax(1) == b).float().mean().item() for a, b in ((x_test, y_test), (x, y))
        )  # fmt: skip
    return Result(**asdict(job), accuracy=test, train_accuracy=seen, moved=max(moved, default=0.0),
                  seconds=time.perf_counter() - started)  # fmt: skip


# ---- the table ------------------------------------------------------------------------------------------------------


def jobs_for(tasks: list[str], widths: list[str], seeds: int) -> list[Job]:
    """Float once per task and seed, every other method for every width."""
    jobs = []
    for seed in range(seeds):
        for task in tasks:
            jobs.append(Job(task, "float", "float", seed))
            jobs += [Job(task, method, width, seed) for width in widths for method in METHODS[1:]]
    return jobs


def summarise(results: list[Result]) -> list[dict[str, Any]]:
    """One row for each task and width: mean and standard deviation of every method, paired differences."""
    table: dict[tuple[str, str, str], dict[int, float]] = {}
    for r in results:
        table.setdefault((r.task, r.width, r.method), {})[r.seed] = r.accuracy
    rows = []
    for task in dict.fromkeys(r.task for r in results):
        base = table.get((task, "float", "float"), {})
        for width in dict.fromkeys(r.width for r in results if r.task == task and r.width != "float"):
            row: dict[str, Any] = {"task": task, "width": width}
            for method in METHODS:
                values = list((base if method == "float" else table.get((task, width, method), {})).values())
                row[method] = _mean_std(values)
            hard, ste = table.get((task, width, "hard"), {}), table.get((task, width, "straight-through"), {})
            paired = [hard[s] - ste[s] for s in sorted(hard) if s in ste]
            row["hard - straight-through"] = _mean_std(paired)
            row["hard - float"] = _mean_std([hard[s] - base[s] for s in sorted(hard) if s in base])
            row["seeds"] = len(paired)
            rows.append(row)
    return rows


def _mean_std(values: list[float]) -> tuple[float, float] | None:
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


HEADINGS = {
    "task": "data / network", "width": "weights", "float": "float", "straight-through": "straight-through",
    "relaxed": "ASkewSGD relaxed (published)", "hard": "ASkewSGD hard (recipe)",
    "hard - straight-through": "hard − straight-through", "hard - float": "hard − float",
}  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["task"], row["width"]]
    for key in METHODS:
        cells.append("" if row[key] is None else f"{row[key][0]:.2f} ± {row[key][1]:.2f}")
    for key in ("hard - straight-through", "hard - float"):
        cells.append("" if row[key] is None else f"{row[key][0]:+.2f} ± {_standard_error(row, key):.2f}")
    return cells


def _standard_error(row: dict[str, Any], key: str) -> float:
    """Of a mean over paired seeds."""
    return row[key][1] / math.sqrt(max(1, row["seeds"]))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in the README."""
    lines = ["| " + " | ".join(HEADINGS.values()) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    """What falls short: below straight-through, or more than 3 points below float from 4 bits to ternary."""
    found = []
    for row in rows:
        name = f"{row['task']}, {row['width']}"
        if row["hard - straight-through"] and round(row["hard - straight-through"][0], 2) < 0:
            found.append(
                f"{name}: {row['hard - straight-through'][0]:+.2f} points against straight-through "
                f"(standard error {_standard_error(row, 'hard - straight-through'):.2f})"
            )
        if row["width"] != "binary" and row["hard - float"] and row["hard - float"][0] < -3:
            found.append(f"{name}: {row['hard - float'][0]:+.2f} points against float")
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against width, one panel for each task, standard deviation as error bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.4), squeeze=False)
    colours = {"straight-through": "#8a8a8a", "relaxed": "#d08a2e", "hard": "#1f6fb4"}
    for axis, task in zip(axes[0], tasks, strict=True):
        part = [row for row in rows if row["task"] == task]
        places = list(range(len(part)))
        if part[0]["float"]:
            axis.axhline(part[0]["float"][0], color="black", linewidth=1, linestyle="--", label="float")
        for shift, (method, colour) in enumerate(colours.items()):
            known = [(p, row[method]) for p, row in zip(places, part, strict=True) if row[method]]
            axis.errorbar(
                [p + 0.18 * (shift - 1) for p, _ in known], [v[0] for _, v in known], [v[1] for _, v in known],
                fmt="o", color=colour, capsize=3, markersize=5,
                label={"relaxed": "ASkewSGD relaxed", "hard": "ASkewSGD hard"}.get(method, method),
            )  # fmt: skip
        axis.set_xticks(places, [row["width"] for row in part], rotation=30)
        axis.set_title(task, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][-1].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ---- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="every task, five seeds (default: two tasks, two seeds)")
    parser.add_argument("--seeds", type=whole(1), help="number of seeds (default: 2, with --full 5)")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK",
                        help=f"of: {', '.join(TASKS)} (default: two of them, with --full all)")  # fmt: skip
    parser.add_argument("--widths", nargs="+", choices=list(WIDTHS), metavar="WIDTH",
                        help=f"of: {', '.join(WIDTHS)} (default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for rows, table and plots")
    parser.add_argument("--sam", action="store_true", help="instead: SGD, SAM, ASAM and AlignedSAM, with sharpness")
    parser.add_argument("--no-bench", action="store_true", help="leave the throughput table out")
    parser.add_argument("--workers", type=whole(1), default=os.cpu_count() or 1,
                        help="processes (default: one a core, here %(default)s)")  # fmt: skip


def _one_thread() -> None:
    torch.set_num_threads(1)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C counts after this; processes that are started inside never see it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_all(jobs: list[Any], workers: int, train: Callable[[Any], Any] = train) -> Generator[Any, None, None]:
    """The results in the order in which they are finished. However this ends, its processes end with it at once."""
    if workers <= 1 or not jobs:
        threads = torch.get_num_threads()
        _one_thread()  # these networks are too small for more
        try:
            yield from map(train, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_one_thread) as pool:
        try:
            with _interrupts_wait():  # a terminal sends Ctrl-C to every process; this one decides
                futures = [pool.submit(train, job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            # the pool would wait for the trainings that have begun
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run(args: argparse.Namespace) -> int:
    """The whole demo; returns the exit code."""
    try:
        import matplotlib  # noqa: F401
        import mnist1d  # noqa: F401
        import sklearn  # noqa: F401
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Table
    except ImportError as error:
        print(f'demo: {error.name} is not installed; pip install "askew_kernels[demo]"', file=sys.stderr)
        return 2
    check_folder(args.out)
    if args.sam:
        from . import demo_sam

        return demo_sam.run(args)
    tasks = args.tasks or (list(TASKS) if args.full else ["digits / CNN", "mnist1d / MLP"])
    widths = args.widths or list(WIDTHS)
    seeds = args.seeds or (5 if args.full else 2)
    console = Console()
    jobs = jobs_for(tasks, widths, seeds)
    console.print(f"Training {len(jobs)} models: {', '.join(tasks)}; {', '.join(widths)}; {seeds} seeds.")
    results: list[Result] = []
    rows_path = args.out / "accuracy.jsonl"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        keeping(rows_path, results),
        Progress(*columns, console=console) as progress,
        contextlib.closing(_run_all(jobs, args.workers)) as finished,
    ):
        bar = progress.add_task("training", total=len(jobs))
        for result in finished:
            results.append(result)
            write_rows(rows_path, results)
            write_atomic(args.out / "accuracy.md", markdown(summarise(results)) + "\n")
            progress.update(bar, advance=1, description=f"{result.task}, {result.width}")
    results.sort(key=lambda r: jobs.index(Job(r.task, r.method, r.width, r.seed)))
    write_rows(rows_path, results)
    rows = summarise(results)
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"Test accuracy of the hard-quantized models, %, mean ± std over {seeds} seeds",
    )
    for heading in ("network", "weights", "float", "STE", "relaxed", "hard", "−STE", "−float"):
        table.add_column(heading, justify="left" if heading in ("network", "weights") else "right", no_wrap=True)
    for row in rows:
        cells = [cell.replace(" ± ", "±").replace(" / ", "/") for cell in _cells(row)]
        table.add_row(*cells[:-2], *(cell.split("±")[0] for cell in cells[-2:]))  # fits into 80 columns
    console.print(table)
    console.print("STE: straight-through; relaxed, hard: ASkewSGD as published, and the recipe (and its differences).")
    missed = shortfalls(rows)
    if missed:
        console.print("Falls short: " + "; ".join(missed))
    else:
        console.print(
            "The recipe is at or above straight-through everywhere, within 3 points of float down to ternary."
        )
    furthest = max((r.moved for r in results if r.method == "hard"), default=0.0)
    console.print(f"The final hard quantization moved no weight of the recipe's by more than {furthest:.3f} scales.")
    write_atomic(args.out / "accuracy.md", markdown(rows) + "\n")
    plot(rows, args.out / "accuracy.png")
    console.print(f"Rows, table and plot: {rows_path}, {args.out / 'accuracy.md'}, {args.out / 'accuracy.png'}")
    if args.no_bench:
        return 0
    from . import bench

    return bench.demo_table(args.out)
