"""`python -m askew_kernels paper`: the experiments that ASkewSGD was published with, over many seeds, and a harder one.

Claim to show or refute (Leconte, Schechtman, Moulines, AISTATS 2023): the loss of ASkewSGD's binarized weights is at
or below that of every straight-through baseline.

``logistic``  d = 10, 6,000 training and 1,000 test points, x uniform in [-1, 1]^d, y ~ Bernoulli(sigma(x w*)), w* in
              {-1, 1}^d or 0.8 times that; batch 100 for 50 epochs, batch 1000 for 25; SGD, alpha = 0.1
``moons``     two moons, 2,000 / 200 points, noise 0.1; network 2-3-1, ReLU, batch norm without affine; batch 100,
              alpha = 1
``text``      a character GPT on the source of Python's standard library at 4, 3, 2 bits, ternary and binary: float,
              straight-through, ASkewSGD as published (relaxed) and by this package's recipe (hard); AdamW underneath

The small experiments come in two settings:

============  ========================================================  ============================================
              ``published``: as the authors' notebooks have it          ``harder``
============  ========================================================  ============================================
logistic      loss: the batch's sum over the *whole* training set's     the batch's mean
              size; initial weights as nn.Linear's                      uniform in [-1, 1]
              lr 2, halved at epochs 30 and 60                          at epoch 30
moons         points evenly spaced on the half circles, standardised    random angles, as they are
              by the training mean and deviation
              no biases; initial weights as nn.Linear's                 a float bias; uniform in [-1, 1]
              batch norm with momentum 0.15, eps 1e-4, running          statistics of what it is given, eps 1e-5
              statistics at test
              ASkewSGD under Adam, the others under SGD, lr 0.1         all under Adam, lr 0.1
              50 epochs, 100 for the landscape                          300 epochs
eps           1 for 50 (moons: 20) epochs, then 0.96^k (0.99^k): at     a period is an epoch, or a step
              50 epochs of ``logistic`` only the clamp acts
============  ========================================================  ============================================

All seeds of a small experiment are trained at once: a seed is a row of every tensor, and rows do not see each other.
Not in the authors' notebooks: deterministic BinaryConnect and ProxQuant.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import command, demo, figures
from askew_kernels.bench.suites.train import GPT, library_text, windows

from .common import differences

FULL, DETERMINISTIC, STOCHASTIC, PROX, ADASTE = (
    "full precision", "BinaryConnect, deterministic", "BinaryConnect, stochastic", "ProxQuant", "AdaSTE",
)  # fmt: skip
BY_EPOCH, BY_STEP = "ASkewSGD, eps by epoch", "ASkewSGD, eps by step"
METHODS = (FULL, DETERMINISTIC, STOCHASTIC, PROX, ADASTE, BY_EPOCH, BY_STEP)
PUBLISHED, HARDER = "published", "harder"
AS_PUBLISHED = "as published, "  # names of settings begin with it
TEXT_METHODS = tuple(method for method in demo.METHODS if method != demo.LEARNED)


@dataclass
class Result:
    """One trained model. Losses and accuracy are those of the quantized weights (full precision: of the weights).

    accuracy: %, NaN for ``text``; curve: training loss with quantized weights after each epoch; model: of ``moons`` as
    published, the quantized weights, running means and variances, for the landscape.
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
    model: list[float] = field(default_factory=list)


# ---- the two small problems: every tensor begins with a dimension of seeds -------------------------------------------


Made = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]  # training x, y, test x, y, parameters


@dataclass
class BatchNorm:
    """nn.BatchNorm1d(affine=False) for every seed; momentum 0: no running statistics, those of what it is given."""

    momentum: float = 0.0
    eps: float = 1e-5
    mean: Tensor | float = 0.0
    variance: Tensor | float = 1.0
    training: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        if self.momentum and not self.training:
            return (x - self.mean) * (self.variance + self.eps) ** -0.5
        mean = x.mean(-2, keepdim=True)
        centred, n = x - mean, x.shape[-2]
        variance = centred.square().mean(-2, keepdim=True)
        if self.momentum:
            kept, new = 1 - self.momentum, self.momentum
            self.mean = kept * self.mean + new * mean.detach()
            self.variance = kept * self.variance + new * variance.detach() * (n / (n - 1))
        return centred * torch.rsqrt(variance + self.eps)


@dataclass(frozen=True)
class Setting:
    """One experiment. ``make(generator)``: of one seed; ``logits(params, x, norm)``; the first ``quantized`` parameters
    are."""

    experiment: str
    name: str
    make: Callable[[torch.Generator], Made]
    logits: Callable[[Sequence[Tensor], Tensor, BatchNorm], Tensor]
    quantized: int
    lr: float
    halve_at: tuple[int, ...]  # epochs
    batch: int
    epochs: int
    alpha: float
    hold: int
    decay: float
    kind: str = HARDER
    adam: tuple[str, ...] = ()  # methods that are under Adam instead of SGD
    methods: tuple[str, ...] = METHODS
    of_all: bool = False  # the loss: the batch's sum over the size of the training set, instead of the batch's mean
    norm: Callable[[], BatchNorm] = BatchNorm
    straight_through_init: tuple[float, ...] = ()  # factors of BinaryConnect's initial weights


def _uniform(bound: float, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return bound * (2 * torch.rand(shape, generator=g) - 1)


def _logistic_data(factor: float, bound: float, g: torch.Generator) -> Made:
    truth = factor * (2 * torch.randint(0, 2, (10,), generator=g) - 1).float()
    x = 2 * torch.rand(7000, 10, generator=g) - 1
    y = torch.bernoulli(torch.sigmoid(x @ truth), generator=g)
    return x[:6000], y[:6000], x[6000:], y[6000:], [_uniform(bound, (10,), g)]


def _logistic_logits(params: Sequence[Tensor], x: Tensor, norm: BatchNorm | None = None) -> Tensor:
    return (x @ params[0].unsqueeze(-1)).squeeze(-1)


def _half_circles(angle: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """scikit-learn's make_moons at the given angles: two interleaving half circles, noise 0.1."""
    x = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    x[y == 1] = torch.tensor([1.0, 0.5]) - x[y == 1]
    return x + 0.1 * torch.randn(len(y), 2, generator=g), y.float()


def _random_moons(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _half_circles(math.pi * torch.rand(n, generator=g), torch.arange(n) % 2, g)


def _even_moons(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _half_circles(torch.linspace(0, math.pi, n // 2).repeat(2), torch.arange(n) // (n // 2), g)


def _moons_data(g: torch.Generator) -> Made:
    params = [_uniform(1.0, (6,), g), _uniform(1.0, (3,), g), torch.zeros(1)]
    return *_random_moons(2000, g), *_random_moons(200, g), params


def _published_moons_data(g: torch.Generator) -> Made:
    params = [_uniform(2**-0.5, (6,), g), _uniform(3**-0.5, (3,), g)]
    (x, y), (x_test, y_test) = _even_moons(2000, g), _even_moons(200, g)
    mean, deviation = x.mean(0), x.std(0)
    return (x - mean) / deviation, y, (x_test - mean) / deviation, y_test, params


def _moons_logits(params: Sequence[Tensor], x: Tensor, norm: BatchNorm | None = None) -> Tensor:
    """Without biases, or with a float one of the last layer."""
    hidden = functional.relu((norm or BatchNorm())(x @ params[0].unflatten(-1, (2, 3))))
    out = (hidden @ params[1].unsqueeze(-1)).squeeze(-1)
    return out + params[2] if len(params) > 2 else out


def _as_published(experiment: str, name: str, **options: Any) -> Setting:
    """The authors count eps in epochs. The layers of their BinaryConnect begin uniform within sqrt(1.5 / (in + out)),
    the others, as nn.Linear, within 1 / sqrt(in)."""
    layers = {"logistic": [(10, 1)], "moons": [(2, 3), (3, 1)]}[experiment]
    factors = tuple(math.sqrt(1.5 * fan_in / (fan_in + fan_out)) for fan_in, fan_out in layers)
    methods = tuple(m for m in METHODS if m != BY_STEP)
    return Setting(experiment, AS_PUBLISHED + name, quantized=len(layers), batch=options.pop("batch", 100),
                   kind=PUBLISHED, methods=methods, straight_through_init=factors, **options)  # fmt: skip


SETTINGS = [
    *[
        _as_published(
            "logistic", f"w* of size {factor:g}, batch {batch}",
            make=functools.partial(_logistic_data, factor, 10**-0.5),
            logits=_logistic_logits, lr=2.0, halve_at=(30, 60), batch=batch, epochs=epochs, alpha=0.1, hold=50,
            decay=0.96, of_all=True,
        )
        for factor, batch, epochs in ((1.0, 100, 50), (0.8, 100, 50), (1.0, 1000, 25))
    ],
    *[
        Setting("logistic", f"w* of size {factor:g}, batch {batch}", functools.partial(_logistic_data, factor, 1.0),
                _logistic_logits, 1, 2.0, (30,), batch, epochs, 0.1, 50, 0.96)
        for factor in (1.0, 0.8)
        for batch, epochs in ((100, 50), (1000, 25))
    ],
    *[
        _as_published(
            "moons", f"{epochs} epochs", make=_published_moons_data, logits=_moons_logits, lr=0.1, halve_at=(),
            epochs=epochs, alpha=1.0, hold=20, decay=0.99, adam=(BY_EPOCH,),
            norm=functools.partial(BatchNorm, 0.15, 1e-4),
        )
        for epochs in (50, 100)
    ],
    Setting("moons", "two moons", _moons_data, _moons_logits, 2, 0.1, (), 100, 300, 1.0, 20, 0.99, adam=METHODS),
]  # fmt: skip


def binary(w: Tensor) -> Tensor:
    """The nearer of -1 and 1; 0 goes to 1, as BinaryConnect has it."""
    return torch.where(w >= 0, 1.0, -1.0)


def _prox(w: Tensor, strength: float) -> None:
    """ProxQuant's proximal map of strength * sum | |w| - 1 |, in place: pulls every weight towards -1 or 1."""
    side = binary(w)
    beyond = w.abs() - 1
    w.copy_(side * (1 + torch.sign(beyond) * (beyond.abs() - strength).clamp(min=0)))


class AdaSTE(torch.optim.Optimizer):
    """AdaSTE's step, as the authors of both papers ran it (alpha = 0.01, beta = 100, momentum 0.9).

        m <- 0.9 m + 0.1 (n s(theta, g) g + theta);   theta <- theta - lr m / (1 - 0.9^t)
        s = min(1 / |theta|, 1/2) where theta and g have one sign (-g leads to the other level), 0 where they have not,
        and 1 where |theta| or |g| is at most 1e-3

    g: the loss's gradient at sign(theta), which minimises the inner problem once alpha beta >= 1; n: the size of the
    training set. theta begins at -10 or 10. Source: Le, Hoier, Lin, Zach, AdaSTE, CVPR 2022.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, n: int) -> None:
        super().__init__(params, {"lr": lr, "n": n})
        with torch.no_grad():
            for p in params:
                p.copy_(10 * binary(p))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for theta in group["params"]:
                state, g = self.state[theta], theta.grad
                state["step"] = state.get("step", 0) + 1
                m = state.setdefault("momentum", torch.zeros_like(theta))
                size = torch.where(theta * g > 0, (1 / theta.abs()).clamp(max=0.5), 0.0)
                size = torch.where((theta.abs() > 1e-3) & (g.abs() > 1e-3), size, 1.0)
                m.mul_(0.9).add_(group["n"] * size * g + theta, alpha=0.1)
                theta.sub_(m, alpha=group["lr"] / (1 - 0.9 ** state["step"]))


def _optimizers(setting: Setting, method: str, weights: list[Any], others: list[Any], n: int
                ) -> list[torch.optim.Optimizer]:  # fmt: skip
    adam = method in setting.adam
    plain: Any = torch.optim.Adam if adam else torch.optim.SGD
    if method == ADASTE:
        made: list[torch.optim.Optimizer] = [AdaSTE(weights, setting.lr / 100, n)]
        return [*made, plain(others, lr=setting.lr)] if others else made
    if method not in (BY_EPOCH, BY_STEP):
        return [plain([*weights, *others], lr=setting.lr)]
    group = {"params": weights, "grid": ak.quant.Binary(), "scale": torch.ones(len(weights[0]))}  # a seed is a row
    groups = [group, {"params": others}] if others else [group]
    if adam:
        return [ak.optim.ASkewAdamW(groups, lr=setting.lr, weight_decay=0.0, alpha=setting.alpha)]
    return [ak.optim.ASkewSGD(groups, lr=setting.lr, alpha=setting.alpha)]


def train_small(setting: Setting, method: str, seeds: int) -> list[Result]:
    """Trains all seeds of one method at once."""
    started = time.perf_counter()
    made: list[Any] = [setting.make(torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    x, y, x_test, y_test = (torch.stack([m[i] for m in made]) for i in range(4))
    params = [torch.nn.Parameter(torch.stack([m[4][i] for m in made])) for i in range(len(made[0][4]))]
    weights, others = params[: setting.quantized], params[setting.quantized :]
    straight_through, n = method in (DETERMINISTIC, STOCHASTIC), x.shape[1]
    if straight_through and setting.straight_through_init:
        with torch.no_grad():
            for w, factor in zip(weights, setting.straight_through_init, strict=True):
                w.mul_(factor)
    optimizers, norm = _optimizers(setting, method, weights, others, n), setting.norm()
    annealing = None
    if method in (BY_EPOCH, BY_STEP):
        annealing = ak.EpsilonAnnealing(
            optimizers[0], hold=setting.hold, mode="geometric", decay=setting.decay, keep_pull=False
        )

    def losses(used: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """(seeds,): means over the points."""
        logits = setting.logits(used, x, norm)
        return functional.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(-1)

    def quantized() -> list[Tensor]:
        if method == FULL:
            return [p.detach() for p in params]
        return [*(binary(w.detach()) for w in weights), *(p.detach() for p in others)]

    draws, order = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    step, curve, share = 0, [], setting.batch / n if setting.of_all else 1.0
    steps = setting.epochs * (n // setting.batch)
    for epoch in range(setting.epochs):
        if epoch in setting.halve_at:
            for param_group in (group for optimizer in optimizers for group in optimizer.param_groups):
                param_group["lr"] *= 0.5
        norm.training = True
        for rows in torch.randperm(n, generator=order).split(setting.batch):
            used: list[Tensor] = list(params)
            if straight_through or method == ADASTE:  # the gradient at binary weights moves the float ones
                latent = [w.detach() for w in weights]
                signs = [binary(w) for w in latent]
                if method == STOCHASTIC:  # 1 with the probability of the hard sigmoid
                    signs = [2 * torch.bernoulli(((w + 1) / 2).clamp(0, 1), generator=draws) - 1 for w in latent]
                used = [*(s.requires_grad_() for s in signs), *others]
            loss = losses(used, x[:, rows], y[:, rows]).sum() * share
            for p, gradient in zip(params, torch.autograd.grad(loss, used), strict=True):
                p.grad = gradient
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            with torch.no_grad():
                if straight_through:
                    for w in weights:
                        w.clamp_(-1, 1)
                elif method == PROX:  # the strength grows linearly, as published; a step pulls by lr/10 at the end
                    for w in weights:
                        _prox(w, 0.1 * setting.lr * share * step / steps)
            if annealing is not None and method == BY_STEP:
                annealing.step()
        if annealing is not None and method == BY_EPOCH:
            annealing.step()
        norm.training = False
        with torch.no_grad():
            curve.append(losses(quantized(), x, y))
    with torch.no_grad():
        final = quantized()
        test = losses(final, x_test, y_test)
        right = ((setting.logits(final, x_test, norm) > 0).float() == y_test).float().mean(-1) * 100
    seconds = (time.perf_counter() - started) / seeds
    history, model = torch.stack(curve, 1), torch.empty(seeds, 0)
    if isinstance(norm.mean, Tensor) and isinstance(norm.variance, Tensor):
        model = torch.cat([*final, norm.mean.squeeze(-2), norm.variance.squeeze(-2)], 1)
    return [
        Result(setting.experiment, setting.name, method, seed, history[seed, -1].item(), test[seed].item(),
               right[seed].item(), _rounded(history[seed]), seconds, _rounded(model[seed]))
        for seed in range(seeds)
    ]  # fmt: skip


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 6) for v in values.tolist()]


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
    median: float  # of the training losses
    differences: dict[str, tuple[float, float]]


def baselines_of(experiment: str) -> tuple[str, ...]:
    """The straight-through methods, which the claim is about."""
    return ("straight-through",) if experiment == "text" else (DETERMINISTIC, STOCHASTIC, ADASTE)


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
            median = statistics.median(values(method, "loss").values())
            seeds = len(methods[method])
            lines.append(Line(experiment, setting, method, seeds, loss, test_loss, accuracy, median, compared))
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
    headings = [
        "method",
        "training loss",
        *([] if text else ["median"]),
        "test loss",
        *([] if text else ["accuracy, %"]),
    ]
    headings += [f"− {b.replace('BinaryConnect, ', '')} (p)" for b in baselines]
    cells = []
    for line in lines:
        row = [line.method, demo.plus_minus(line.loss, 4), *([] if text else [f"{line.median:.4f}"])]
        row += [demo.plus_minus(line.test_loss, 4), *([] if text else [demo.plus_minus(line.accuracy)])]
        pairs = (line.differences.get(b) for b in baselines)
        cells.append([*row, *("" if pair is None else "{:+.4f} ({:.2g})".format(*pair) for pair in pairs)])
    return headings, cells


def by_setting(lines: list[Line]) -> list[list[Line]]:
    return list(command.grouped(lines, lambda line: (line.experiment, line.setting)).values())


SECTIONS = {  # figure: heading, what is said below it
    "logistic-published": (
        "Logistic regression, as published",
        "As in the authors' notebook: eps is still 1 when training ends, so that only the clamp to the hull acts.",
    ),
    "logistic": (
        "Logistic regression, harder", "The loss is the batch's mean, so a step is n / batch of the published one.",
    ),
    "moons-published": (
        "Two moons, as published",
        "As in the authors' notebook: ASkewSGD under Adam, the others under SGD. Whatever the method, some starts lead "
        "nowhere (losses near 0.5) and decide the means; the medians stand beside them. The landscape shows the "
        "network of median training loss.",
    ),
    "moons": ("Two moons, harder", "All methods under Adam, points at random angles, not standardised."),
    "text": ("Text: a character GPT", ""),
}  # fmt: skip


def by_figure(lines: list[Line]) -> dict[str, list[Line]]:
    """The sections of the page, each with a figure: an experiment in one kind of setting."""

    def name(line: Line) -> str:
        return line.experiment + "-published" * line.setting.startswith(AS_PUBLISHED)

    found = command.grouped(lines, name)
    return {name: found[name] for name in SECTIONS if name in found}


def markdown(results: list[Result]) -> str:
    """The page that stands beside the rows."""
    lines = summarise(results)
    parts = [
        "# The published experiments, repeated",
        "Made by `python -m askew_kernels paper`; what is trained stands in `experiments/paper.py`. Losses are those "
        "of the quantized weights, mean ± standard deviation over seeds; differences are paired over seeds (t-test): "
        "below 0, ASkewSGD's loss is lower.",
    ]
    for name, here in by_figure(lines).items():
        title, text = SECTIONS[name]
        parts += [f"## {title}", *([text] if text else []), f"![{title}: the loss of each method]({name}.png)"]
        if name == "moons-published" and landscape_of(results):
            parts.append("![What each network says of the plane between the two moons](landscape.png)")
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
    for name, lines in by_figure(summarise(results)).items():
        settings = list(dict.fromkeys(line.setting for line in lines))
        draw = plot_widths if name == "text" else plot_curves
        files |= draw(name, settings, lines, groups_of(results))
    return files | plot_landscape(landscape_of(results))


def plot_curves(name: str, settings: list[str], lines: list[Line], found: dict) -> dict[str, bytes]:
    figure, axes = figures.figure(1, len(settings), max(4.0 * len(settings), 7.0), 4.2)
    for axis, setting in zip(axes, settings, strict=True):
        for method, by_seed in found[lines[0].experiment, setting].items():
            i = METHODS.index(method)
            curves = torch.tensor([r.curve for r in by_seed.values()])
            epochs = range(1, curves.shape[1] + 1)
            low, middle, high = curves.quantile(torch.tensor([0.2, 0.5, 0.8]), dim=0)
            color = figures.PALETTE[i % len(figures.PALETTE)]
            axis.plot(epochs, middle, color=color, label=method, linewidth=2.2 if method.startswith("ASkew") else 1.2,
                      linestyle=("-", "--", ":")[i % 3])  # fmt: skip
            axis.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        figures.label(axis, f"{setting.removeprefix(AS_PUBLISHED)} (median, p20–p80)", "epoch")
    axes[0].set_ylabel("training loss of the quantized weights", fontsize=8.5)
    figures.legend_below(figure, axes, 4 if len(settings) > 1 else 3)
    return figures.save(figure, name)


def landscape_of(results: list[Result]) -> dict[str, Result]:
    """method -> the run of median training loss, of the longest training of ``moons`` that kept its models."""
    kept = [r for r in results if r.model]
    longest = [r for r in kept if len(r.curve) == max(len(r.curve) for r in kept)]
    return {
        method: sorted(runs, key=lambda r: r.loss)[len(runs) // 2]
        for method, runs in command.grouped(longest, lambda r: r.method).items()
    }


def plot_landscape(shown: dict[str, Result]) -> dict[str, bytes]:
    """What probability each network gives to one of the moons, over the plane."""
    if not shown:
        return {}
    side = torch.linspace(-2.5, 2.5, 201)
    grid = torch.cartesian_prod(side, side)[None]
    figure, axes = figures.figure(1, len(shown), 2.5 * len(shown), 2.9, sharey=True)
    for axis, (method, r) in zip(axes, shown.items(), strict=True):
        first, last, mean, variance = torch.tensor(r.model)[None].split([6, 3, 3, 3], 1)
        norm = BatchNorm(0.15, 1e-4, mean.unsqueeze(1), variance.unsqueeze(1), training=False)
        heights = torch.sigmoid(_moons_logits([first, last], grid, norm)).reshape(201, 201).T
        axis.contourf(side, side, heights, [i / 10 for i in range(11)], cmap="RdBu")
        axis.contour(side, side, heights, [0.5], colors="black", linewidths=1)
        x, y = _published_moons_data(torch.Generator().manual_seed(r.seed))[:2]
        for label, color in ((0, "#7f0000"), (1, "#00204d")):
            axis.scatter(*x[y == label][::10].T, s=3, color=color)
        axis.set_aspect("equal")
        figures.label(axis, f"{method}\nloss {r.loss:.3f}", grid="both")
    return figures.save(figure, "landscape", ("png",))


def plot_widths(name: str, settings: list[str], lines: list[Line], found: dict) -> dict[str, bytes]:
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
    return figures.save(figure, name)


# ---- the command -----------------------------------------------------------------------------------------------------

EXPERIMENTS = ("logistic", "moons", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME",
        help=f"of: {', '.join(EXPERIMENTS)} (default: all)")  # fmt: skip
    add("--setting", nargs="+", choices=(PUBLISHED, HARDER), default=[PUBLISHED, HARDER], metavar="NAME",
        help=f"of logistic and moons: {PUBLISHED}, {HARDER} (default: both)")  # fmt: skip
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
    for setting in SETTINGS:
        wanted = setting.experiment in arguments.experiments and setting.kind in arguments.setting
        for method in [m for m in METHODS if m in setting.methods] if wanted else ():
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
