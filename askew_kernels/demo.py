"""`python -m askew_kernels demo`: real data, real models, and what quantization-aware training costs them.

Every number comes from the drop-in layers and the package's optimizers. Rows: float; straight-through (hard forward,
torch.optim.SGD, the scale recomputed every step); ASkewSGD relaxed (as published: gradient at the float weights,
geometric annealing); ASkewSGD hard (the recommended recipe, ``ak.Recipe``), with the same scale rule and with a learned
scale (LSQ). All share network, initialisation, data order, epochs and learning-rate schedule; differences are paired
over seeds. First and last layer stay float in every row.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import EpsilonAnnealing, QuantConfig, Recipe, command, figures, hard_quantize_, optim, param_groups, quantize_
from .nn import quantized_layers
from .quant import Binary, Grid, Ternary, Uniform

PUBLISHED_HOLD = 0.30  # of all batches, then a constant factor
LEARNED = "learned scale"
LR, MOMENTUM, BATCH, LABEL_SMOOTHING = 0.2, 0.9, 64, 0.1
METHODS = ("float", "straight-through", "relaxed", "hard", LEARNED)
OURS = METHODS[2:]
WIDTHS: dict[str, tuple[Grid, str]] = {
    **{f"{bits} bits": (Uniform(bits), "sawb") for bits in (4, 3, 2)},
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


def mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(*dense(inputs, width), *dense(width, width), nn.Linear(width, 10))


def dense(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]


def convolved(inputs: int, outputs: int, kernel: int | tuple[int, int], stride: Any, padding: Any) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def digits_cnn(channels: Sequence[int] = (16, 32), hidden: int = 64) -> nn.Sequential:
    """Any number of 3 × 3 layers, the second with stride 2."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for i, (inputs, outputs) in enumerate(itertools.pairwise((1, *channels))):
        layers += convolved(inputs, outputs, 3, 2 if i == 1 else 1, 1)
    return nn.Sequential(*layers, nn.Flatten(), *dense(16 * channels[-1], hidden), nn.Linear(hidden, 10))


def mnist1d_cnn() -> nn.Sequential:
    """A 1-D convolutional network, written with kernels of height 1."""
    layers = [layer for inputs, outputs, width in ((1, 32, 5), (32, 32, 3), (32, 64, 3))
              for layer in convolved(inputs, outputs, (1, width), (1, 2), (0, width // 2))]  # fmt: skip
    return nn.Sequential(nn.Unflatten(1, (1, 1, 40)), *layers, nn.Flatten(), nn.Linear(320, 10))


# name: (data, network, epochs)
TASKS: dict[str, tuple[Callable[[int], Data], Callable[[], nn.Sequential], int]] = {
    "digits / MLP": (load_digits, lambda: mlp(64, 128), 30),
    "digits / CNN": (load_digits, digits_cnn, 20),
    "mnist1d / MLP": (load_mnist1d, lambda: mlp(40, 256), 20),
    "mnist1d / CNN": (load_mnist1d, mnist1d_cnn, 15),
}


# ---- one training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    task: str
    method: str
    width: str  # "float" for the float row
    seed: int


@dataclass(frozen=True)
class Result(Job):
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


Batch = tuple[Tensor, Tensor]


def quantize_inner(
    model: nn.Module, width: str, forward: str = "hard", ends: Collection[str] = (), scale: str | None = None
) -> nn.Module:
    """Quantizes all layers with a weight matrix but ``ends``, by default the first and the last. scale: the rule, or
    None for that of the width."""
    grid, rule = WIDTHS[width]
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    ends = ends or (layers[0], layers[-1])
    config = QuantConfig(weight=grid, scale=scale or rule, forward=forward)
    return quantize_(model, config, lambda _, name: name not in ends)


def prepare(
    model: nn.Module, method: str, width: str, lr: float = LR, adamw: bool = False, ends: Collection[str] = ()
) -> tuple[torch.optim.Optimizer, str]:
    """Quantizes the model as a column of the table asks; (its optimizer, the method where eps is annealed, or "")."""
    if method != "float":
        forward, scale = "relaxed" if method == "relaxed" else "hard", "lsq" if method == LEARNED else None
        quantize_inner(model, width, forward, ends, scale)
    return optimizer_of(model, method, lr, adamw)


def optimizer_of(
    model: nn.Module, method: str, lr: float = LR, adamw: bool = False
) -> tuple[torch.optim.Optimizer, str]:
    ours = method in OURS
    groups: Any = param_groups(model) if ours else model.parameters()
    recipe = method if ours else ""
    if adamw:
        return optim.ASkewAdamW(groups, lr=lr) if ours else torch.optim.AdamW(groups, lr=lr, fused=True), recipe
    return (optim.ASkewSGD if ours else torch.optim.SGD)(groups, lr=lr, momentum=MOMENTUM), recipe


def batches(data: Data, epochs: int, seed: int) -> Iterator[Batch]:
    """Whole batches of every epoch in an order of its own, which the seed decides."""
    x, _, y, _ = data
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order)[: len(x) // BATCH * BATCH].split(BATCH):
            yield x[rows], y[rows]


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch], total: int, recipe: str = "",
    smoothing: float = LABEL_SMOOTHING,
) -> list[Tensor]:  # fmt: skip
    """One training: cosine learning rate over ``total`` steps, eps as published where ``recipe`` is "relaxed", by
    ``ak.Recipe`` where it is another method. Gives the loss of every step; ``optimizer`` may be one that asks for it
    twice."""
    schedules: list[Any] = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * min(k / total, 1))))
    ]
    if recipe == "relaxed":
        hold = round(PUBLISHED_HOLD * total)
        schedules.append(EpsilonAnnealing(optimizer, hold=hold, total=total, mode="geometric"))
    elif recipe:
        schedules.append(Recipe(model, optimizer, total))
    losses: list[Tensor] = []
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            logits = model(x).flatten(0, -2)
            loss = functional.cross_entropy(logits, y.flatten(), label_smoothing=smoothing)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())  # type: ignore[arg-type, attr-defined]
        for schedule in schedules:
            schedule.step()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of a model in eval mode, per cent."""
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def train(job: Job) -> Result:
    """Trains one model; the seed decides initialisation, data order and fold, whatever the method and the width."""
    started = time.perf_counter()
    load, build, epochs = TASKS[job.task]
    data = cached(load, job.seed)
    torch.manual_seed(job.seed)
    model = build().train()
    optimizer, recipe = prepare(model, job.method, job.width)
    fit(model, optimizer, batches(data, epochs, job.seed), epochs * (len(data[0]) // BATCH), recipe)
    layers = quantized_layers(model.eval()).values()
    before = [layer.weight.detach().clone() for layer in layers]
    hard_quantize_(model)
    moved = [
        ((layer.weight - old).abs() / layer.weight_scale.reshape(-1, *[1] * (old.dim() - 1))).max().item()
        for layer, old in zip(layers, before, strict=True)
    ]
    x, x_test, y, y_test = data
    return Result(**asdict(job), accuracy=accuracy(model, x_test, y_test), train_accuracy=accuracy(model, x, y),
                  moved=max(moved, default=0.0), seconds=time.perf_counter() - started)  # fmt: skip


# ---- the table ------------------------------------------------------------------------------------------------------


def jobs_for(tasks: list[str], widths: list[str], seeds: int) -> list[Job]:
    """Float once per task and seed, every other method for every width."""
    ways = [("float", "float"), *((method, width) for width in widths for method in METHODS[1:])]
    return [Job(task, method, width, seed) for seed in range(seeds) for task in tasks for method, width in ways]


def summarise(results: list[Result]) -> list[dict[str, Any]]:
    """One row for each task and width: (mean, standard deviation) of every method and of differences over seeds."""
    rows = []
    for task, width in dict.fromkeys((r.task, r.width) for r in results if r.width != "float"):
        found: dict[str, dict[int, float]] = {method: {} for method in METHODS}
        for r in results:
            if r.task == task and r.width in ("float", width):
                found[r.method][r.seed] = r.accuracy
        row: dict[str, Any] = {"task": task, "width": width, "seeds": len(found["hard"])}
        row |= {method: mean_std(list(values.values())) for method, values in found.items()}
        for other in ("straight-through", "float"):
            common = [s for s in sorted(found["hard"]) if s in found[other]]
            row[f"hard - {other}"] = mean_std([found["hard"][s] - found[other][s] for s in common])
        rows.append(row)
    return rows


def mean_std(values: list[float]) -> tuple[float, float] | None:
    """None of nothing; the deviation of one value is 0."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plus_minus(value: tuple[float, float] | None, digits: int = 2, sign: str = "") -> str:
    return "" if value is None else f"{value[0]:{sign}.{digits}f} ± {value[1]:.{digits}f}"


HEADINGS = {
    "task": "data / network", "width": "weights", "float": "float", "straight-through": "straight-through",
    "relaxed": "ASkewSGD relaxed (published)", "hard": "ASkewSGD hard (recipe)",
    LEARNED: "the same, learned scale", "hard - straight-through": "hard − straight-through",
    "hard - float": "hard − float",
}  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """Of a row of ``summarise``: methods ± standard deviation, differences ± standard error."""
    pairs, root = [row[key] for key in list(HEADINGS)[-2:]], math.sqrt(max(1, row["seeds"]))
    differences = [plus_minus(pair and (pair[0], pair[1] / root), sign="+") for pair in pairs]
    return [row["task"], row["width"], *(plus_minus(row[method]) for method in METHODS), *differences]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in the README."""
    return command.markdown_table(HEADINGS.values(), map(cells, rows))


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    """What falls short: below straight-through, or more than 3 points below float from 4 bits to ternary."""
    found = []
    for row in rows:
        name, (ste, plain) = f"{row['task']}, {row['width']}", cells(row)[-2:]
        if row["hard - straight-through"] and round(row["hard - straight-through"][0], 2) < 0:
            found.append(f"{name}: {ste} points against straight-through (± standard error)")
        if row["width"] != "binary" and row["hard - float"] and row["hard - float"][0] < -3:
            found.append(f"{name}: {plain} points against float")
    return found


def plot(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Accuracy against width, a panel for each task, standard deviation as error bars."""
    tasks = command.grouped(rows, lambda row: row["task"])
    names = {method: HEADINGS[method] for method in METHODS[1:]}
    figure, axes = figures.figure(1, len(tasks), max(3.4 * len(tasks), 9.0), 3.6)
    for axis, (task, part) in zip(axes, tasks.items(), strict=True):
        if part[0]["float"]:
            axis.axhline(part[0]["float"][0], color="black", linewidth=1, linestyle="--", label="float")
        figures.means(axis, [r["width"] for r in part], {text: [r[m] for r in part] for m, text in names.items()})
        figures.label(axis, task)
        axis.tick_params(axis="x", rotation=30)
    axes[0].set_ylabel("test accuracy, %, hard-quantized", fontsize=8.5)
    figures.legend_below(figure, axes)
    return figures.save(figure, "accuracy", ("png",), dpi=150)


# ---- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--full", action="store_true", help="every task, five seeds (default: two tasks, two seeds)")
    add("--seeds", type=command.whole(1), help="number of seeds (default: 2, with --full 5)")
    add("--tasks", nargs="+", choices=list(TASKS), metavar="TASK",
        help=f"of: {', '.join(TASKS)} (default: two of them, with --full all)")  # fmt: skip
    add("--widths", nargs="+", choices=list(WIDTHS), metavar="WIDTH", help=f"of: {', '.join(WIDTHS)} (default: all)")
    add("--out", type=Path, default=Path("demo-results"), help="folder for rows, table and plots")
    add("--sam", action="store_true", help="instead: SGD and sharpness-aware steps over it, with sharpness")
    add("--no-bench", action="store_true", help="leave the throughput table out")
    add("--workers", type=command.whole(1), default=os.cpu_count() or 1,
        help="processes (default: one a core, here %(default)s)")  # fmt: skip


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


def run_all(jobs: list[Any], workers: int, train: Callable[[Any], Any]) -> Generator[Any, None, None]:
    """The results in the order in which they are finished. However this ends, its processes end with it at once."""
    if workers <= 1 or not jobs:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # these networks are too small for more
        try:
            yield from map(train, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(jobs)), context, torch.set_num_threads, (1,)) as pool:
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
    """Trains, shows the table, writes rows, table and plot; returns the exit code."""
    command.need("demo", "matplotlib", "mnist1d", "sklearn", "rich")
    command.check_folder(args.out)
    tasks = args.tasks or (list(TASKS) if args.full else ["digits / CNN", "mnist1d / MLP"])
    widths = args.widths or list(WIDTHS)
    seeds = args.seeds or (5 if args.full else 2)
    screen = command.console(120)
    jobs = jobs_for(tasks, widths, seeds)
    learned = sum(job.method == LEARNED for job in jobs)
    what = f"{', '.join(tasks)}; {', '.join(widths)}; {seeds} seeds"
    screen.print(f"Training {len(jobs)} models, {learned} of them with a learned scale: {what}.")
    results: list[Result] = []
    path = args.out / "accuracy.jsonl"
    with (
        command.keeping(path, results),
        command.progress(screen) as bar,
        contextlib.closing(run_all(jobs, args.workers, train)) as finished,
    ):
        task = bar.add_task("training", total=len(jobs))
        for result in finished:
            results.append(result)
            command.write_rows(path, results)
            command.write_atomic(args.out / "accuracy.md", markdown(summarise(results)) + "\n")
            bar.update(task, advance=1, description=f"{result.task}, {result.width}")
    results.sort(key=lambda r: jobs.index(Job(r.task, r.method, r.width, r.seed)))
    command.write_rows(path, results)
    rows = summarise(results)
    headings = ("network", "weights", "float", "STE", "relaxed", "hard", "learned", "−STE", "−float")
    texts = [[cell.replace(" ± ", "±").replace(" / ", "/") for cell in cells(row)] for row in rows]
    short = [[*row[:-2], *(cell.split("±")[0] for cell in row[-2:])] for row in texts]  # fits into 80 columns
    title = f"Test accuracy of the hard-quantized models, %, mean ± std over {seeds} seeds"
    screen.print(command.table(title, headings, short, left=2))
    screen.print("STE: straight-through; relaxed, hard: ASkewSGD as published, and the recipe (and its differences); "
                 "learned: the recipe with a learned scale (LSQ).")  # fmt: skip
    missed = shortfalls(rows)
    reached = "The recipe is at or above straight-through everywhere, within 3 points of float down to ternary."
    screen.print("Falls short: " + "; ".join(missed) if missed else reached)
    furthest = max((r.moved for r in results if r.method == "hard"), default=0.0)
    screen.print(f"The final hard quantization moved no weight of the recipe's by more than {furthest:.4f} scales.")
    for name, data in {"accuracy.md": (markdown(rows) + "\n").encode(), **plot(rows)}.items():
        command.write_atomic(args.out / name, data)
    screen.print(f"Rows, table and plot: {path}, {args.out / 'accuracy.md'}, {args.out / 'accuracy.png'}")
    return 0


def afterwards(args: argparse.Namespace) -> list[str]:
    """The command that follows: the throughput table, its rows and plots in the same folder."""
    files = ["--json", str(args.out / "bench.json"), "--csv", str(args.out / "bench.csv"), "--plot", str(args.out)]
    return [] if args.no_bench or args.sam else ["bench", "--quick", *files]
