"""`python -m askew_kernels paper`: the experiments that ASkewSGD was published with, over many seeds, and a harder one.

Claim to show or refute (Leconte, Schechtman, Moulines, AISTATS 2023): the loss of ASkewSGD's binarized weights is at
or below that of every straight-through baseline.

``logistic``  d = 10, 6,000 training and 1,000 test points, x uniform in [-1, 1]^d, y ~ Bernoulli(sigma(x w*)), w* in
              {-1, 1}^d or 0.8 times that; batch 100 for 50 epochs, batch 1000 for 25; SGD, lr 2, halved at epoch 30;
              alpha = 0.1; eps held for 50 periods, then 0.96^k
``moons``     two moons, 2,000 / 200 points, noise 0.1; network 2-3-1, ReLU, batch norm without affine; Adam, lr 0.1,
              batch 100 for 300 epochs; alpha = 1; eps held for 20 periods, then 0.99^k
``text``      a character GPT on the source of Python's standard library at 4, 3, 2 bits, ternary and binary: float,
              straight-through, ASkewSGD as published (relaxed) and by this package's recipe (hard); AdamW underneath

The published periods of eps leave open what is counted. Both readings are run: a period is an epoch (in ``logistic``
eps then never leaves 1 before training ends, and only the clamp to the hull remains) or a step. All seeds of a small
experiment are trained at once: a seed is a row of every tensor, and rows do not see each other.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import command, demo, figures
from askew_kernels.bench.suites.train import GPT, library_text, windows

from .common import differences

FULL, DETERMINISTIC, STOCHASTIC, PROX = (
    "full precision", "BinaryConnect, deterministic", "BinaryConnect, stochastic", "ProxQuant",
)  # fmt: skip
BY_EPOCH, BY_STEP = "ASkewSGD, eps by epoch", "ASkewSGD, eps by step"
METHODS = (FULL, DETERMINISTIC, STOCHASTIC, PROX, BY_EPOCH, BY_STEP)
TEXT_METHODS = tuple(method for method in demo.METHODS if method != demo.LEARNED)


@dataclass
class Result:
    """One trained model. Losses and accuracy are those of the quantized weights (full precision: of the weights).

    accuracy: %, NaN for ``text``; curve: training loss with quantized weights after each epoch.
    """

    experiment: str
    setting: str
    method: str
    seed: int
    loss: float
    test_loss: float
    accuracy: float
    curve: list[float]
    seconds: float


# ---- the two small problems: every tensor begins with a dimension of seeds -------------------------------------------


Made = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]  # training x, y, test x, y, parameters


@dataclass(frozen=True)
class Setting:
    """One experiment. ``make(generator)``: of one seed; ``logits(params, x)``; the first ``quantized`` parameters
    are."""

    experiment: str
    name: str
    make: Callable[[torch.Generator], Made]
    logits: Callable[[Sequence[Tensor], Tensor], Tensor]
    quantized: int
    adam: bool
    lr: float
    halve_at: int | None  # epoch
    batch: int
    epochs: int
    alpha: float
    hold: int
    decay: float


def _logistic_data(factor: float, g: torch.Generator) -> Made:
    truth = factor * (2 * torch.randint(0, 2, (10,), generator=g) - 1).float()
    x = 2 * torch.rand(7000, 10, generator=g) - 1
    y = torch.bernoulli(torch.sigmoid(x @ truth), generator=g)
    return x[:6000], y[:6000], x[6000:], y[6000:], [2 * torch.rand(10, generator=g) - 1]


def _logistic_logits(params: Sequence[Tensor], x: Tensor) -> Tensor:
    return (x @ params[0].unsqueeze(-1)).squeeze(-1)


def _moons(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """As scikit-learn's make_moons: two interleaving half circles, here with random angles."""
    y = torch.arange(n) % 2
    angle = math.pi * torch.rand(n, generator=g)
    x = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    x[y == 1] = torch.tensor([1.0, 0.5]) - x[y == 1]
    return x + 0.1 * torch.randn(n, 2, generator=g), y.float()


def _moons_data(g: torch.Generator) -> Made:
    params = [2 * torch.rand(6, generator=g) - 1, 2 * torch.rand(3, generator=g) - 1, torch.zeros(1)]
    return *_moons(2000, g), *_moons(200, g), params


def _moons_logits(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """Batch statistics; the bias of the last layer is float."""
    hidden = x @ params[0].unflatten(-1, (2, 3))
    centred = hidden - hidden.mean(-2, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-2, keepdim=True) + 1e-5)
    return (functional.relu(normal) @ params[1].unsqueeze(-1)).squeeze(-1) + params[2]


SETTINGS = [
    *[
        Setting("logistic", f"w* of size {factor:g}, batch {batch}", functools.partial(_logistic_data, factor),
                _logistic_logits, 1, False, 2.0, 30, batch, epochs, 0.1, 50, 0.96)
        for factor in (1.0, 0.8)
        for batch, epochs in ((100, 50), (1000, 25))
    ],
    Setting("moons", "two moons", _moons_data, _moons_logits, 2, True, 0.1, None, 100, 300, 1.0, 20, 0.99),
]  # fmt: skip


def binary(w: Tensor) -> Tensor:
    """The nearer of -1 and 1; 0 goes to 1, as BinaryConnect has it."""
    return torch.where(w >= 0, 1.0, -1.0)


def _prox(w: Tensor, strength: float) -> None:
    """ProxQuant's proximal map of strength * sum | |w| - 1 |, in place: pulls every weight towards -1 or 1."""
    side = binary(w)
    beyond = w.abs() - 1
    w.copy_(side * (1 + torch.sign(beyond) * (beyond.abs() - strength).clamp(min=0)))


def train_small(setting: Setting, method: str, seeds: int) -> list[Result]:
    """Trains all seeds of one method at once."""
    started = time.perf_counter()
    made: list[Any] = [setting.make(torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    x, y, x_test, y_test = (torch.stack([m[i] for m in made]) for i in range(4))
    params = [torch.nn.Parameter(torch.stack([m[4][i] for m in made])) for i in range(len(made[0][4]))]
    weights, others = params[: setting.quantized], params[setting.quantized :]
    annealing = None
    optimizer: torch.optim.Optimizer
    if method in (BY_EPOCH, BY_STEP):
        group = {"params": weights, "grid": ak.quant.Binary(), "scale": torch.ones(seeds)}  # a seed is a row
        groups = [group, {"params": others}] if others else [group]
        if setting.adam:
            optimizer = ak.optim.ASkewAdamW(groups, lr=setting.lr, weight_decay=0.0, alpha=setting.alpha)
        else:
            optimizer = ak.optim.ASkewSGD(groups, lr=setting.lr, alpha=setting.alpha)
        annealing = ak.EpsilonAnnealing(optimizer, hold=setting.hold, mode="geometric", decay=setting.decay)
    else:
        optimizer = (torch.optim.Adam if setting.adam else torch.optim.SGD)(params, lr=setting.lr)

    def losses(used: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """(seeds,)"""
        logits = setting.logits(used, x)
        return functional.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(-1)

    def quantized() -> list[Tensor]:
        if method == FULL:
            return [p.detach() for p in params]
        return [*(binary(w.detach()) for w in weights), *(p.detach() for p in others)]

    draws, order = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    n, step, curve = x.shape[1], 0, []
    steps = setting.epochs * (n // setting.batch)
    for epoch in range(setting.epochs):
        if epoch == setting.halve_at:
            for param_group in optimizer.param_groups:
                param_group["lr"] *= 0.5
        for rows in torch.randperm(n, generator=order).split(setting.batch):
            used: list[Tensor] = list(params)
            if method in (DETERMINISTIC, STOCHASTIC):  # the gradient at binary weights moves the float ones
                latent = [w.detach() for w in weights]
                signs = [binary(w) for w in latent]
                if method == STOCHASTIC:  # 1 with the probability of the hard sigmoid
                    signs = [2 * torch.bernoulli(((w + 1) / 2).clamp(0, 1), generator=draws) - 1 for w in latent]
                used = [*(s.requires_grad_() for s in signs), *others]
            gradients = torch.autograd.grad(losses(used, x[:, rows], y[:, rows]).sum(), used)
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            step += 1
            with torch.no_grad():
                if method in (DETERMINISTIC, STOCHASTIC):
                    for w in weights:
                        w.clamp_(-1, 1)
                elif method == PROX:  # the strength grows linearly, as published; a step pulls by lr/10 at the end
                    for w in weights:
                        _prox(w, 0.1 * setting.lr * step / steps)
            if annealing is not None and method == BY_STEP:
                annealing.step()
        if annealing is not None and method == BY_EPOCH:
            annealing.step()
        with torch.no_grad():
            curve.append(losses(quantized(), x, y))
    with torch.no_grad():
        final = quantized()
        test = losses(final, x_test, y_test)
        right = ((setting.logits(final, x_test) > 0).float() == y_test).float().mean(-1) * 100
    seconds = (time.perf_counter() - started) / seeds
    history = torch.stack(curve, 1)
    return [
        Result(setting.experiment, setting.name, method, seed, history[seed, -1].item(), test[seed].item(),
               right[seed].item(), [round(v, 6) for v in history[seed].tolist()], seconds)
        for seed in range(seeds)
    ]  # fmt: skip


# ---- text ------------------------------------------------------------------------------------------------------------

LENGTH, BATCH, TEXT_LR = 64, 32, 3e-3


def train_text(width: str, method: str, seed: int, steps: int) -> Result:
    """A character GPT of two layers, 64 wide; the seed decides initialisation and batches, whatever the method."""
    started = time.perf_counter()
    text = library_text()
    split = len(text) * 9 // 10
    train, test = text[:split], text[split:]
    torch.manual_seed(seed)
    model = GPT(d=64, layers=2, length=LENGTH)
    optimizer, recipe = demo.prepare(model, method, width, TEXT_LR, adamw=True, ends=("head",))
    order = torch.Generator().manual_seed(seed)
    starts = (torch.randint(0, len(train) - LENGTH - 1, (BATCH,), generator=order) for _ in range(steps))
    losses = demo.fit(model, optimizer, (windows(train, s, LENGTH) for s in starts), steps, recipe, smoothing=0.0)
    every = max(steps // 20, 1)
    means = torch.stack(losses)[: steps // every * every].double().unflatten(0, (-1, every)).mean(1)
    curve = [round(v, 5) for v in means.tolist()]
    ak.hard_quantize_(model).eval()
    tested = []
    with torch.no_grad():
        for part in torch.arange(0, len(test) - LENGTH - 1, LENGTH)[:2048].split(256):
            x, y = windows(test, part, LENGTH)
            tested.append(functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).item())
    seconds = time.perf_counter() - started
    return Result("text", width, method, seed, curve[-1], statistics.fmean(tested), math.nan, curve, seconds)


# ---- tables ----------------------------------------------------------------------------------------------------------


def groups_of(results: list[Result]) -> dict[tuple[str, str], dict[str, dict[int, Result]]]:
    """(experiment, setting) -> method -> seed -> result."""
    found: dict[tuple[str, str], dict[str, dict[int, Result]]] = {}
    for r in results:
        found.setdefault((r.experiment, r.setting), {}).setdefault(r.method, {})[r.seed] = r
    return found


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float]:
    """Mean of a - b over common seeds, and the two-sided p of a paired t-test (1 where all differences are equal to
    0, NaN for fewer than two seeds)."""
    from scipy.stats import ttest_1samp

    found = differences(a, b)
    if len(found) < 2:
        return (found or [math.nan])[0], math.nan
    if max(map(abs, found)) < 1e-7:
        return 0.0, 1.0
    return statistics.fmean(found), float(ttest_1samp(found, 0.0).pvalue)


@dataclass(frozen=True)
class Line:
    """A line of the tables: mean and standard deviation over seeds; differences: straight-through baseline -> (loss of
    this method minus the baseline's, paired over seeds; p). Training loss counts, for ``text`` the test loss."""

    experiment: str
    setting: str
    method: str
    seeds: int
    loss: tuple[float, float]
    test_loss: tuple[float, float]
    accuracy: tuple[float, float] | None  # of ``text``: None
    differences: dict[str, tuple[float, float]]


def baselines_of(experiment: str) -> tuple[str, ...]:
    """The straight-through methods, which the claim is about."""
    return ("straight-through",) if experiment == "text" else (DETERMINISTIC, STOCHASTIC)


def summarise(results: list[Result]) -> list[Line]:
    """A line for each method of each setting; the float text model stands beside every width."""
    lines = []
    groups = groups_of(results)
    float_text = groups.pop(("text", "float"), {})
    for (experiment, setting), by_method in groups.items():
        methods = {**(float_text if experiment == "text" else {}), **by_method}
        measure = "test_loss" if experiment == "text" else "loss"

        def values(method: str, name: str, methods: Any = methods) -> dict[int, float]:
            return {s: getattr(r, name) for s, r in methods[method].items()}

        for method in methods:
            ours = method in (BY_EPOCH, BY_STEP, "relaxed", "hard")
            held = [b for b in baselines_of(experiment) if ours and b in methods]
            compared = {b: paired(values(method, measure), values(b, measure)) for b in held}
            measures = ("loss", "test_loss") if experiment == "text" else ("loss", "test_loss", "accuracy")
            means: list[Any] = [demo.mean_std(list(values(method, name).values())) for name in measures]
            loss, test_loss, accuracy = (*means, None)[:3]
            lines.append(Line(experiment, setting, method, len(methods[method]), loss, test_loss, accuracy, compared))
    return lines


def verdict(difference: float, p: float) -> str:
    if difference == 0:
        return "the same"
    if math.isnan(p) or p >= 0.05:
        return "no significant difference"
    return "lower" if difference < 0 else "HIGHER"


def verdicts(lines: list[Line]) -> list[str]:
    """For each comparison one sentence, whichever way it goes."""
    return [
        f"{line.experiment}, {line.setting}: {line.method} against {baseline}: {difference:+.4f} (p = {p:.2g}), "
        + verdict(difference, p)
        for line in lines
        for baseline, (difference, p) in line.differences.items()
    ]


def conclusion(lines: list[Line]) -> str:
    """How the claim, loss at or below every straight-through baseline's, fares in one sentence."""
    said = [verdict(*pair) for line in lines for pair in line.differences.values()]
    counts = ", ".join(f"{said.count(word)} {word}" for word in dict.fromkeys(said))
    failed = "fails where it says HIGHER" if "HIGHER" in said else "is not contradicted"
    return f"Of {len(said)} comparisons: {counts}. The claim (at or below every straight-through baseline) {failed}."


def table(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of one setting."""
    text, baselines = lines[0].experiment == "text", baselines_of(lines[0].experiment)
    headings = ["method", "training loss", "test loss", *([] if text else ["accuracy, %"])]
    headings += [f"− {b.replace('BinaryConnect, ', '')} (p)" for b in baselines]
    cells = []
    for line in lines:
        row = [line.method, demo.plus_minus(line.loss, 4), demo.plus_minus(line.test_loss, 4)]
        row += [] if text else [demo.plus_minus(line.accuracy)]
        pairs = (line.differences.get(b) for b in baselines)
        cells.append([*row, *("" if pair is None else "{:+.4f} ({:.2g})".format(*pair) for pair in pairs)])
    return headings, cells


def by_setting(lines: list[Line]) -> list[list[Line]]:
    return list(command.grouped(lines, lambda line: (line.experiment, line.setting)).values())


def markdown(results: list[Result]) -> str:
    """The page that stands beside the rows."""
    lines = summarise(results)
    parts = [
        "# The published experiments, repeated",
        "Made by `python -m askew_kernels paper`; what is trained stands in `experiments/paper.py`. Losses are those "
        "of the quantized weights, mean ± standard deviation over seeds; differences are paired over seeds (t-test): "
        "below 0, ASkewSGD's loss is lower.",
    ]
    titles = {"logistic": "Logistic regression", "moons": "Two moons", "text": "Text: a character GPT"}
    for experiment, here in command.grouped(lines, lambda line: line.experiment).items():
        parts += [f"## {titles[experiment]}", f"![{experiment}]({experiment}.png)"]
        for members in by_setting(here):
            head = members[-1]
            parts += [f"**{head.setting}**, {head.seeds} seeds", command.markdown_table(*table(members))]
    parts += [
        "## Digits and mnist1d",
        "At 4, 3 and 2 bits, ternary and binary, two networks, five seeds, accuracy against straight-through paired "
        "over seeds: `python -m askew_kernels demo --full`, in this repository benchmarks/results/accuracy.md.",
        "## Does the claim hold?", conclusion(lines), "\n".join(f"* {text}" for text in verdicts(lines)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


# ---- plots -----------------------------------------------------------------------------------------------------------


def plots(results: list[Result]) -> dict[str, bytes]:
    """File name -> PNG or SVG, one figure for each experiment."""
    files: dict[str, bytes] = {}
    for experiment, lines in command.grouped(summarise(results), lambda line: line.experiment).items():
        settings = list(dict.fromkeys(line.setting for line in lines))
        draw = plot_widths if experiment == "text" else plot_curves
        files |= draw(experiment, settings, lines, groups_of(results))
    return files


def plot_curves(experiment: str, settings: list[str], lines: list[Line], found: dict) -> dict[str, bytes]:
    figure, axes = figures.figure(1, len(settings), max(4.0 * len(settings), 7.0), 4.2)
    for axis, setting in zip(axes, settings, strict=True):
        for i, (method, by_seed) in enumerate(found[experiment, setting].items()):
            curves = torch.tensor([r.curve for r in by_seed.values()])
            epochs = range(1, curves.shape[1] + 1)
            low, middle, high = curves.quantile(torch.tensor([0.2, 0.5, 0.8]), dim=0)
            axis.plot(epochs, middle, color=f"C{i}", label=method, linewidth=2.2 if method.startswith("ASkew") else 1.2)
            axis.fill_between(epochs, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        figures.label(axis, f"{setting} (median, p20–p80)", "epoch")
    axes[0].set_ylabel("training loss of the quantized weights", fontsize=8.5)
    figures.legend_below(figure, axes, 3)
    return figures.save(figure, experiment)


def plot_widths(experiment: str, settings: list[str], lines: list[Line], found: dict) -> dict[str, bytes]:
    """The float model, which is the same at every width, as a line."""
    losses = {(line.method, line.setting): line.test_loss for line in lines}
    names = {"straight-through": "straight-through", "relaxed": "ASkewSGD's rule over AdamW, relaxed (published)",
             "hard": "ASkewSGD's rule over AdamW, hard (recipe)"}  # fmt: skip
    figure, (axis,) = figures.figure(1, 1, 7.5, 4.2)
    if reference := [v for (method, _), v in losses.items() if method == "float"]:
        axis.axhline(reference[0][0], color="black", linewidth=1, linestyle="--", label="float")
    figures.means(axis, settings, {t: [losses.get((m, s)) for s in settings] for m, t in names.items()})
    y = "test loss, nats a character, after hard quantization"
    figures.label(axis, "Character GPT on Python's standard library", y=y)
    figures.legend_below(figure, [axis], 2)
    return figures.save(figure, experiment)


# ---- the command -----------------------------------------------------------------------------------------------------

EXPERIMENTS = ("logistic", "moons", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME",
        help=f"of: {', '.join(EXPERIMENTS)} (default: all)")  # fmt: skip
    add("--seeds", type=command.whole(1), default=20, help="of logistic and moons")
    add("--text-seeds", type=command.whole(1), default=3, help="of text")
    add("--text-steps", type=command.whole(1), default=400, help="training steps of text")
    add("--resume", action="store_true", help="keep the rows in --out and train what is missing")
    add("--out", type=Path, default=Path("paper-results"), help="folder for rows, page and plots")


Key = tuple[str, str, str, int]  # experiment, setting, method, seed


@dataclass(frozen=True)
class Job:
    keys: list[Key]
    train: Callable[[], list[Result]]


def jobs_for(arguments: argparse.Namespace) -> list[Job]:
    jobs = []
    for setting in [s for s in SETTINGS if s.experiment in arguments.experiments]:
        for method in METHODS:
            keys = [(setting.experiment, setting.name, method, seed) for seed in range(arguments.seeds)]
            jobs.append(Job(keys, functools.partial(train_small, setting, method, arguments.seeds)))
    if "text" in arguments.experiments:
        runs = [("float", "float"), *((width, method) for width in demo.WIDTHS for method in TEXT_METHODS[1:])]
        for seed in range(arguments.text_seeds):
            for width, method in runs:
                train = functools.partial(train_text, width, method, seed, arguments.text_steps)
                jobs.append(Job([("text", width, method, seed)], lambda train=train: [train()]))  # type: ignore[misc]
    return jobs


def measured(arguments: argparse.Namespace, screen: Any, results: list[Result]) -> Iterator[None]:
    """Runs the jobs below a progress bar; each job's results are in ``results`` when this yields."""

    def key(r: Result) -> Key:
        return (r.experiment, r.setting, r.method, r.seed)

    done = set(map(key, results))
    jobs = [job for job in jobs_for(arguments) if not done.issuperset(job.keys)]
    with command.progress(screen) as bar:
        task = bar.add_task("", total=len(jobs))
        for job in jobs:
            bar.update(task, description=", ".join(map(str, job.keys[0][:3])))
            again = job.train()
            results[:] = [r for r in results if key(r) not in job.keys] + again
            yield
            bar.advance(task)
    order = {k: i for i, job in enumerate(jobs_for(arguments)) for k in job.keys}
    results.sort(key=lambda r: order.get(key(r), -1))


def run(arguments: argparse.Namespace) -> int:
    """The whole command; returns the exit code."""
    command.need("paper", "matplotlib", "rich", "scipy")
    command.check_folder(arguments.out)
    rows = arguments.out / "rows.jsonl"
    results = command.read_rows(rows, Result) if arguments.resume else []
    screen = command.console(130)
    with command.keeping(rows, results):
        for _ in measured(arguments, screen, results):
            command.write_rows(rows, results)
    lines = summarise(results)
    for members in by_setting(lines):
        head, (headings, cells) = members[-1], table(members)
        cells = [[cell.replace(" ± ", "±") for cell in row] for row in cells]
        screen.print(command.table(f"{head.experiment}: {head.setting}, {head.seeds} seeds", headings, cells), "")
    for text in (*verdicts(lines), conclusion(lines)):
        screen.print(text, soft_wrap=True)
    for name, data in {"README.md": markdown(results).encode(), **plots(results)}.items():
        command.write_atomic(arguments.out / name, data)
    screen.print(f"Rows, page and plots: {arguments.out}")
    return 0
