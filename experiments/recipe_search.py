"""`python -m experiments.recipe_search`: which schedule is recommended, searched on data that no table is judged by.

Many small networks are trained side by side as one network with a leading dimension of *replicas*: each has its own
grid, learning rate, seed and ``Way``, and all share every launch. The mathematics is ``reference.py``'s, batched
(tests/test_recipe_search.py holds it against the optimizers). What is tuned on: mnist1d with other seeds than the
demo's, and the last 10,000 of Fashion-MNIST's *training* pictures; the test sets, the text and the other tasks of
docs/accuracy.md are not looked at.

A way's score in a cell (task, optimizer, layers, width, setting) is its validation accuracy minus straight-through's,
paired over seeds.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from askew_kernels.quant.scales import SAWB_COEFFICIENTS, normal_scale

FASHION = Path("/usr/share/datasets/fashion-mnist")
EPS_FLOOR = 1.6e-5
SCALE_FLOOR = 1e-3  # of a learned scale, of its first value
NEVER = 2.0  # a share of the training that does not come

# (lowest level, highest, step, c_max, the scale's coefficients of rms and mean|w|)
WIDTHS: dict[str, tuple[float, float, float, float, float, float]] = {
    **{f"{b} bits": (-(2.0 ** (b - 1)), 2.0 ** (b - 1) - 1, 1.0, 2.0 ** (b - 1) - 1,
                     SAWB_COEFFICIENTS[b][0] / (2 ** (b - 1) - 1), -SAWB_COEFFICIENTS[b][1] / (2 ** (b - 1) - 1))
       for b in (4, 3, 2)},
    "2 bits, mid-rise": (-3.0, 3.0, 2.0, 3.0, normal_scale((-3.0, -1.0, 1.0, 3.0)), 0.0),
    "ternary": (-1.0, 1.0, 1.0, 1.0, 0.0, 1.5),
    "binary": (-1.0, 1.0, 2.0, 1.0, 0.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How eps, scale and weights go. Shares are of all steps.

    hold, end, power: ``EpsilonAnnealing``'s gap schedule; hold 2 is straight-through for ever. freeze: when the scale
    is frozen (the hold's end where not given). clamp: weights to the hull once the scale is frozen; clamp_always: from
    the start. clip: the gradient is zero outside the hull. learned: the scale by LSQ's gradient, from the rule's value
    or (``paper``) from 2 mean|w| / sqrt(c_max), at ``rate`` learning rates. outer: hold, end, power, freeze and clamp
    of the first and last layer, where they are others. start: before it the float weights are computed with. full:
    from ``start`` to there they go over to the quantized ones, slack falling from 1 to 0 as (a line)^bend, or as a
    sigmoid of that steepness (PARQ's is 10, to 0.95): w_q + slack (w - w_q), or (``steep``) by PARQ's map, whose slope
    between two levels is 1 / slack. average: decay
    of the mean of the latent weights that they become at the end of the hold. settle: the frequency of flips to and
    fro from which on, after ``settle_from``, a weight is kept at its level (Nagel et al., 2022).
    """

    name: str
    hold: float = NEVER
    end: float = 0.95
    power: float = 12.0
    keep_pull: bool = True
    clamp: bool = True
    clamp_always: bool = False
    clip: bool = True
    freeze: float | None = None
    learned: bool = False
    paper: bool = False
    rate: float = 1.0
    direction: bool = False
    outer: Way | None = None
    start: float = 0.0
    full: float = 0.0
    steep: bool = False
    bend: float = 1.0
    sigmoid: float = 0.0
    average: float = 0.0
    settle: float = 0.0
    settle_from: float = 0.7

    @property
    def extra(self) -> bool:
        return self.average > 0 or self.settle > 0


@dataclass(frozen=True)
class Replica:
    way: Way
    width: str
    everything: bool  # all layers; otherwise first and last stay float
    lr: float
    smoothing: float
    seed: int


@dataclass(frozen=True)
class Task:
    name: str
    data: str
    layers: tuple[tuple[Any, ...], ...]  # ("fc", in, out) or ("conv" or "image", in, out, kernel, stride)
    epochs: int
    batch: int
    settings: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)  # optimizer: (lr, smoothing)
    warm: float = 0.0  # the share in which the learning rate rises linearly


TASKS = {task.name: task for task in (
    Task("mnist1d MLP", "mnist1d", (("fc", 40, 256), ("fc", 256, 256), ("fc", 256, 10)), 40, 64,
         {"sgd": ((0.05, 0.0), (0.2, 0.1)), "adamw": ((0.002, 0.0), (0.005, 0.1))}),
    Task("mnist1d narrow MLP", "mnist1d", (("fc", 40, 64), ("fc", 64, 64), ("fc", 64, 64), ("fc", 64, 10)), 40, 64,
         {"sgd": ((0.05, 0.0), (0.2, 0.1)), "adamw": ((0.002, 0.0), (0.005, 0.1))}),
    Task("mnist1d CNN", "mnist1d",
         (("conv", 1, 32, 5, 2), ("conv", 32, 32, 3, 2), ("conv", 32, 64, 3, 2), ("fc", 320, 10)), 30, 64,
         {"sgd": ((0.05, 0.0), (0.2, 0.1)), "adamw": ((0.002, 0.0), (0.005, 0.1))}),
    Task("Fashion-MNIST MLP", "fashion", (("fc", 784, 128), ("fc", 128, 128), ("fc", 128, 128), ("fc", 128, 10)), 10,
         128, {"sgd": ((0.05, 0.0),), "adamw": ((0.002, 0.0),)}),
    Task("Fashion-MNIST CNN", "fashion",
         (("image", 1, 16, 3, 2), ("image", 16, 32, 3, 2), ("image", 32, 64, 3, 2), ("fc", 1024, 10)), 6, 64,
         {"sgd": ((0.05, 0.0),), "adamw": ((0.002, 0.0),)}),
)}  # fmt: skip

STE, LSQ = Way("straight-through"), Way("LSQ", learned=True, paper=True)


# ---- data ------------------------------------------------------------------------------------------------------------


def make_mnist1d() -> dict[str, np.ndarray]:
    """4,000 signals to train on and 10,000 to validate on, of seeds that nothing else uses."""
    from mnist1d.data import get_dataset_args, make_dataset

    parts: dict[str, np.ndarray] = {}
    state = np.random.get_state()
    try:
        for part, seed, count in (("", 77, 4_000), ("_val", 78, 10_000)):
            options = get_dataset_args()
            options.seed, options.num_samples = seed, count
            made = make_dataset(options)
            for key in "xy":
                parts[key + part] = np.concatenate([made[key], made[f"{key}_test"]])
    finally:
        np.random.set_state(state)
    return {key: value.astype(np.float32 if key[0] == "x" else np.int64) for key, value in parts.items()}


def make_fashion(folder: Path = FASHION) -> dict[str, np.ndarray]:
    """20,000 pictures to train on and 10,000 to validate on, all of the training file."""
    images = np.frombuffer(gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    images = images.reshape(-1, 784)
    return {"x": images[:20_000], "y": labels[:20_000], "x_val": images[50_000:], "y_val": labels[50_000:]}


def load(name: str, cache: Path, fashion: Path, device: torch.device) -> list[Tensor]:
    """x, y, x_val, y_val, normalised, on the device; made once in the folder ``cache``."""
    file = cache / f"recipe-{name}.npz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        made: Any = make_mnist1d() if name == "mnist1d" else make_fashion(fashion)
        np.savez_compressed(file, **made)
    held = np.load(file)
    x, y, x_val, y_val = (torch.as_tensor(held[key]) for key in ("x", "y", "x_val", "y_val"))
    x, x_val = x.float(), x_val.float()
    mean, std = x.mean(), x.std()
    return [t.to(device) for t in ((x - mean) / std, y.long(), (x_val - mean) / std, y_val.long())]


# ---- the step of one layer: tensors are (R, outputs, inputs), a replica's numbers (R, 1, 1) ----------------------


@dataclass
class Grids:
    lo: Tensor
    hi: Tensor
    step: Tensor
    c_max: Tensor
    rms: Tensor
    mean: Tensor


def nearest(x: Tensor, g: Grids) -> Tensor:
    return (g.lo + g.step * torch.round((x - g.lo) / g.step)).clamp(g.lo, g.hi)


def between(x: Tensor, g: Grids, slack: Tensor, steep: Tensor) -> Tensor:
    """Between x (slack 1) and its level (slack 0)."""
    level = nearest(x, g)
    off = x - level
    far = g.step / 2 - off.abs()  # from the midpoint, in the hull
    moved = torch.sign(off) * (g.step / 2 - far / slack.clamp(min=1e-6)).clamp(min=0)
    return level + torch.where(steep & (far >= 0), moved, slack * off)


def bent(left: np.ndarray, steepness: np.ndarray) -> np.ndarray:
    """What is left of a way, 1 to 0, as a sigmoid from 1 to 0 of that steepness; 0: as it is."""
    k = np.where(steepness > 0, steepness, 1.0)
    low, high = 1 / (1 + np.exp(k / 2)), 1 / (1 + np.exp(-k / 2))
    return np.where(steepness > 0, (1 / (1 + np.exp(k * (0.5 - left))) - low) / (high - low), left)


def rule_scale(w: Tensor, g: Grids) -> Tensor:
    a = w.abs()
    scale = g.rms * (w * w).mean(2, keepdim=True).sqrt() + g.mean * a.mean(2, keepdim=True)
    scale = torch.where(scale > 0, scale, a.amax(2, keepdim=True) / g.c_max)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def velocity(d: Tensor, w: Tensor, s: Tensor, g: Grids, lr: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
    """``reference.skew_velocity``."""
    x = (w / s).clamp(g.lo, g.hi)
    off = x - nearest(x, g)
    u = (off.abs() / g.step).clamp(max=0.5)
    side = 1 - 2 * (off > 0).to(x.dtype)
    q = u - u * u
    h = eps - 16 * q * q
    length = s * g.step
    kappa = (-h / 16) * (length * alpha / 4) / (q * (0.5 - u))
    kappa = torch.minimum(kappa, length / (4 * lr))
    skewed = side * torch.maximum(kappa, side * d)
    return torch.where((h < 0) & (u < 0.5), skewed, d)


def step_layer(w: Tensor, grad: Tensor, m: Tensor, v: Tensor, s: Tensor, s_m: Tensor, s_v: Tensor, s_floor: Tensor,
               g: Grids, quantized: Tensor, eps: Tensor, alpha: Tensor, lr: Tensor, s_lr: Tensor, clamped: Tensor,
               frozen: Tensor, learned: Tensor, clip: Tensor, direction: Tensor, slack: Tensor, steep: Tensor,
               bias1: Tensor, bias2: Tensor, adam: bool, decay: float) -> tuple[Tensor, ...]:  # fmt: skip
    """(w, m, v, s, s_m, s_v, what the next forward computes with) after one step."""
    x = w / s
    inside = (x >= g.lo) & (x <= g.hi)
    level = nearest(x, g)
    error = torch.where(inside, level - x, level)
    s_grad = (grad * error).sum(2, keepdim=True) / (w.shape[2] * g.c_max).sqrt()
    d = -torch.where(inside | ~quantized | ~clip | (slack > 0), grad, torch.zeros_like(grad))
    w = torch.where(clamped & quantized, torch.minimum(torch.maximum(w, s * g.lo), s * g.hi), w)
    skew = torch.where(quantized, velocity(d, w, s, g, lr, eps, alpha), d)
    base = -torch.where(direction, d, skew)
    if adam:
        m, v = m + 0.1 * (base - m), 0.999 * v + 0.001 * base * base
        descent = m / bias1 / ((v / bias2).sqrt() + 1e-8) + decay * w
        s_m, s_v = s_m + 0.1 * (s_grad - s_m), 0.999 * s_v + 0.001 * s_grad * s_grad
        s_descent = s_m / bias1 / ((s_v / bias2).sqrt() + 1e-8)
    else:
        m = 0.9 * m + base
        descent = m
        s_m = 0.9 * s_m + s_grad
        s_descent = s_m
    late = torch.where(direction & quantized, velocity(-descent, w, s, g, lr, eps, alpha), -descent)
    s_new = torch.maximum(s - s_lr * s_descent, s_floor)
    w = w + lr * late
    w = torch.where(clamped & quantized, torch.minimum(torch.maximum(w, s * g.lo), s * g.hi), w)
    s = torch.where(frozen, s, torch.where(learned, s_new, rule_scale(w, g)))
    copy = torch.where(quantized, s * between(w / s, g, slack, steep), w)
    return w, m, v, s, s_m, s_v, copy


# ---- many networks ---------------------------------------------------------------------------------------------------


def patches(x: Tensor, of: tuple[Any, ...]) -> tuple[Tensor, list[int]]:
    """Of signals (R, B, C, L) or square images (R, B, C, H, W), the first of which may be flat: what each output
    position sees, and the sizes of the output."""
    kernel, stride = of[3], of[4]
    dims = 1 if of[0] == "conv" else 2
    if x.dim() == 3:
        x = x[:, :, None] if dims == 1 else x.view(*x.shape[:2], 1, 28, 28)
    x = functional.pad(x, (kernel // 2,) * 2 * dims)
    for dim in range(3, 3 + dims):
        x = x.unfold(dim, kernel, stride)
    size = list(x.shape[3 : 3 + dims])
    x = x.permute(0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    return x.reshape(x.shape[0], x.shape[1] * math.prod(size), -1), size


class Networks:
    """All replicas of a task under one optimizer."""

    def __init__(
        self, task: Task, optimizer: str, replicas: Sequence[Replica], data: list[Tensor], epochs: int
    ) -> None:
        self.task, self.adam, self.replicas, self.data = task, optimizer == "adamw", list(replicas), data
        self.device = device = data[0].device
        self.decay = 0.01 if self.adam else 0.0
        self.steps = self._steps(epochs)
        self.extra = any(r.way.extra for r in self.replicas)
        seeds = sorted({r.seed for r in self.replicas})
        self.of_seed = torch.tensor([seeds.index(r.seed) for r in self.replicas], device=device)
        orders, starts = [], []
        for seed in seeds:
            rng = torch.Generator().manual_seed(seed)
            starts.append(self._start(rng))
            orders.append(self._order(rng, epochs))
        self.order = torch.stack(orders, 1).to(device)  # (steps, seeds, batch)
        pick = self.of_seed.cpu()
        self.weights = [torch.stack([s[i] for s in starts])[pick].to(device) for i in range(len(task.layers))]
        self.others = self._others(len(pick))
        self._numbers()
        self._state()

    def _steps(self, epochs: int) -> int:
        return epochs * (len(self.data[0]) // self.task.batch)

    def _order(self, rng: torch.Generator, epochs: int) -> Tensor:
        """(steps, batch) rows of the data"""
        count = self.steps // epochs * self.task.batch
        rows = [torch.randperm(len(self.data[0]), generator=rng)[:count] for _ in range(epochs)]
        return torch.cat(rows).view(self.steps, self.task.batch)

    def _others(self, count: int) -> list[Tensor]:
        """The last layer's bias; each other layer's gain and shift of its batch norm. All stay float."""
        widths = [of[2] for of in self.task.layers]
        norms = [make(count, n, device=self.device) for n in widths[:-1] for make in (torch.ones, torch.zeros)]
        self.running = [(torch.zeros_like(a), torch.ones_like(a)) for a in norms[::2]]
        return [torch.zeros(count, 1, widths[-1], device=self.device), *norms]

    def _start(self, rng: torch.Generator) -> list[Tensor]:
        """nn.Linear's and nn.Conv1d's initialisation."""
        weights = []
        for of in self.task.layers:
            inputs = of[1] * {"fc": 1, "conv": of[-2], "image": of[-2] ** 2}[of[0]]
            weights.append((torch.rand(of[2], inputs, generator=rng) * 2 - 1) / math.sqrt(inputs))
        return weights

    def _column(self, values: Iterable[float | bool]) -> Tensor:
        values = list(values)
        kind = torch.bool if isinstance(values[0], bool) else torch.float32
        return torch.tensor(values, dtype=kind, device=self.device).view(-1, 1, 1)

    def _numbers(self) -> None:
        """Schedules as tables of (steps, R), and what stays."""
        ways, n = [r.way for r in self.replicas], self.steps
        self.grids = Grids(*(self._column(WIDTHS[r.width][i] for r in self.replicas) for i in range(6)))
        shares = np.arange(n)[:, None]
        warm = round(self.task.warm * n)
        cosine = 0.5 * (1 + np.cos(np.pi * np.clip((np.arange(n) - warm) / (n - warm), 0, 1)))
        rising = np.minimum(np.arange(1, n + 1) / max(warm, 1), 1)

        def table(values: np.ndarray) -> Tensor:
            return torch.tensor(values, device=self.device, dtype=torch.bool if values.dtype == bool else torch.float32)

        def schedule(ways: list[Way]) -> tuple[Tensor, Tensor, Tensor]:
            """eps, scale frozen, weights clamped"""
            hold, end = (
                np.array([round(s * n) for s in shares])
                for shares in zip(*((w.hold, w.end) for w in ways), strict=True)
            )
            j = np.clip((shares - hold) / np.maximum(end - hold, 1), 0, 1)
            gap = j ** np.array([w.power for w in ways])
            eps = np.where(shares <= hold, 1.0, np.clip((1 - gap**2) ** 2, EPS_FLOOR, 1.0))
            frozen = shares > np.array([round(min(w.hold, NEVER if w.freeze is None else w.freeze) * n) for w in ways])
            clamped = frozen & np.array([w.clamp for w in ways]) | np.array([w.clamp_always for w in ways])
            return table(eps), table(frozen), table(clamped)

        self.schedules = [schedule(ways), schedule([w.outer or w for w in ways])]
        self.lr = table((rising * cosine)[:, None] * np.array([r.lr for r in self.replicas]))
        self.s_rate = self._column(w.rate for w in ways)
        self.alpha = table(np.where([w.keep_pull for w in ways], 1 / np.maximum(cosine, 1e-9)[:, None], 1.0))
        self.learned = self._column(w.learned for w in ways)
        self.clip = self._column(w.clip for w in ways)
        self.direction = self._column(w.direction for w in ways)
        start, full = (
            np.array([round(share * n) for share in of]) for of in zip(*((w.start, w.full) for w in ways), strict=True)
        )
        self.begun = table(shares >= start)
        left = np.clip((full - shares) / np.maximum(full - start, 1), 0, 1) ** np.array([w.bend for w in ways])
        left = bent(left, np.array([w.sigmoid for w in ways]))
        self.slack = table(np.where(full > start, left, 0.0))
        self.steep = self._column(w.steep for w in ways)
        k = np.arange(1, n + 1)
        self.bias1, self.bias2 = table(1 - 0.9**k), table(1 - 0.999**k)
        everything = self._column(r.everything for r in self.replicas)
        inner = torch.ones_like(everything)
        count = len(self.task.layers)
        self.quantized = [everything if i in (0, count - 1) else inner for i in range(count)]
        self.smoothing = self._column(r.smoothing for r in self.replicas)
        self.average = self._column(float(w.average) for w in ways)
        self.settle = self._column(float(w.settle) for w in ways)
        self.settle_at = torch.tensor([round(w.settle_from * n) for w in ways], device=self.device).view(-1, 1, 1)
        self.hold_at = torch.tensor([round(w.hold * n) for w in ways], device=self.device).view(-1, 1, 1)

    def _state(self) -> None:
        zeros = torch.zeros_like
        self.m, self.v = (
            [zeros(w) for w in self.weights],
            [zeros(w) if self.adam else w[:1, :1, :1] for w in self.weights],
        )
        paper = self._column(r.way.paper for r in self.replicas)
        self.s = [torch.where(paper, 2 * w.abs().mean(2, keepdim=True) / self.grids.c_max.sqrt(),
                              rule_scale(w, self.grids)) for w in self.weights]  # fmt: skip
        self.s_floor = [s * SCALE_FLOOR for s in self.s]
        self.s_m, self.s_v = [zeros(s) for s in self.s], [zeros(s) for s in self.s]
        self.copies = [torch.where(q, s * nearest(w / s, self.grids), w)
                       for w, s, q in zip(self.weights, self.s, self.quantized, strict=True)]  # fmt: skip
        self.others_m, self.others_v = [zeros(t) for t in self.others], [zeros(t) for t in self.others]
        self.k = torch.zeros((), dtype=torch.long, device=self.device)
        if self.extra:
            self.mean = [w.clone() for w in self.weights]
            self.before = [nearest(w / s, self.grids) for w, s in zip(self.weights, self.s, strict=True)]
            self.turned = [zeros(w) for w in self.weights]
            self.often = [zeros(w) for w in self.weights]
            self.place = [b.clone() for b in self.before]
            self.kept = [zeros(w, dtype=torch.bool) for w in self.weights]

    def forward(self, x: Tensor, weights: list[Tensor], others: list[Tensor], training: bool) -> Tensor:
        """x (R, B, inputs) -> logits (R, B, classes)."""
        bias, norms = others[0], list(zip(others[1::2], others[2::2], strict=True))
        for i, (of, w) in enumerate(zip(self.task.layers, weights, strict=True)):
            if of[0] != "fc":
                x, size = patches(x, of)  # (R, B positions, C k)
                x = self._norm(i, torch.bmm(x, w.transpose(1, 2)), norms[i], training)
                x = x.view(len(x), -1, *size, of[2]).movedim(-1, 2)  # (R, B, outputs, *size)
            else:
                x = x.flatten(2)
                x = torch.bmm(x, w.transpose(1, 2))
                if i + 1 == len(weights):
                    return x + bias
                x = self._norm(i, x, norms[i], training)
            x = torch.relu(x)
        return x

    def _norm(self, i: int, x: Tensor, of: tuple[Tensor, Tensor], training: bool) -> Tensor:
        mean, var = self.running[i]
        if training:
            now_var, now = torch.var_mean(x, 1, correction=0)
            with torch.no_grad():
                mean.lerp_(now.detach(), 0.1)
                var.lerp_(now_var.detach() * (x.shape[1] / (x.shape[1] - 1)), 0.1)
        else:
            now, now_var = mean, var
        gain = of[0] * torch.rsqrt(now_var + 1e-5)
        return x * gain[:, None] + (of[1] - now * gain)[:, None]

    def row(self, table: Tensor) -> Tensor:
        return table.index_select(0, self.k[None])[0].view(-1, 1, 1)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.data[0][rows], self.data[1][rows]

    def step(self) -> None:
        rows = self.order.index_select(0, self.k[None])[0][self.of_seed]  # (R, B)
        x, y = self.batch(rows)
        leaves = [c.detach().requires_grad_() for c in (*self.copies, *self.others)]
        n = len(self.copies)
        logits = self.forward(x, leaves[:n], leaves[n:], True)
        logp = torch.log_softmax(logits, 2)
        target = -logp.gather(2, y[..., None])
        loss = ((1 - self.smoothing) * target - self.smoothing * logp.mean(2, keepdim=True)).mean(1).sum()
        grads = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            self._update(grads[:n], grads[n:])
            self.k += 1

    def _update(self, grads: Sequence[Tensor], other_grads: Sequence[Tensor]) -> None:
        lr, alpha = map(self.row, (self.lr, self.alpha))
        bias1, bias2 = (t.index_select(0, self.k[None]).view(1, 1, 1) for t in (self.bias1, self.bias2))
        schedules = [[self.row(t) for t in of] for of in self.schedules]
        begun, slack = self.row(self.begun), self.row(self.slack)
        last = len(self.weights) - 1
        for i, w in enumerate(self.weights):
            eps, frozen, clamped = schedules[i in (0, last)]
            new = compiled(w.device)(
                w, grads[i], self.m[i], self.v[i], self.s[i], self.s_m[i], self.s_v[i], self.s_floor[i], self.grids,
                self.quantized[i] & begun, eps, alpha, lr, lr * self.s_rate, clamped, frozen, self.learned,
                self.clip, self.direction, slack, self.steep, bias1, bias2, self.adam, self.decay,
            )  # fmt: skip
            held = (w, self.m[i], self.v[i] if self.adam else None, self.s[i], self.s_m[i], self.s_v[i], self.copies[i])
            for old, value in zip(held, new, strict=True):
                if old is not None:
                    old.copy_(value)
            if self.extra:
                self._settle(i)
        for t, g, m, v in zip(self.others, other_grads, self.others_m, self.others_v, strict=True):
            rate = lr.view(-1, *[1] * (t.dim() - 1))
            if self.adam:
                m.lerp_(g, 0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                t.sub_(rate * (m / bias1.view(()) / ((v / bias2.view(())).sqrt() + 1e-8)))
            else:
                m.mul_(0.9).add_(g)
                t.sub_(rate * m)

    def _settle(self, i: int) -> None:
        """The mean of the latent weights, and weights that go to and fro."""
        w, s, q = self.weights[i], self.s[i], self.quantized[i]
        mean = self.mean[i]
        mean.lerp_(w, 0.01)
        w.copy_(torch.where((self.average > 0) & (self.k == self.hold_at), mean, w))
        level = nearest(w / s, self.grids)
        self.place[i].lerp_(level, 0.02)
        moved = torch.sign(level - self.before[i])
        back = (moved != 0) & (moved == -self.turned[i])
        self.often[i].lerp_(back.to(w.dtype), 0.02)
        self.turned[i].copy_(torch.where(moved != 0, moved, self.turned[i]))
        self.before[i].copy_(level)
        fresh = (self.settle > 0) & (self.k > self.settle_at) & (self.often[i] > self.settle) & q
        self.kept[i].logical_or_(fresh)
        w.copy_(torch.where(self.kept[i], s * nearest(self.place[i], self.grids), w))
        self.copies[i].copy_(torch.where(q, s * nearest(w / s, self.grids), w))

    def train(self, deadline: float) -> bool:
        """All steps; False where the time did not suffice."""
        if self.device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            run = graph.replay
            done = 3
        else:
            run, done = self.step, 0
        for i in range(done, self.steps):
            run()
            if i % 100 == 0:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if time.monotonic() > deadline:
                    return False
        return True

    @torch.no_grad()
    def accuracy(self) -> list[float]:
        x, y = self.data[2], self.data[3]
        right = torch.zeros(len(self.replicas), device=self.device)
        for xs, ys in zip(x.split(250), y.split(250), strict=True):
            logits = self.forward(xs.expand(len(self.replicas), *xs.shape), self.copies, self.others, False)
            right += (logits.argmax(2) == ys).sum(1)
        return (100 * right / len(x)).tolist()


_compiled: dict[str, Any] = {}


def compiled(device: torch.device) -> Any:
    if device.type != "cuda":
        return step_layer
    if "cuda" not in _compiled:
        _compiled["cuda"] = torch.compile(step_layer, dynamic=True)  # one for all layers and tasks
    return _compiled["cuda"]


# ---- the ways ------------------------------------------------------------------------------------------------------


def first_ways() -> list[Way]:
    """Broad: what the library did, and one change at a time of it and of late ways."""
    ways = [STE, LSQ]
    for hold, power in ((0.1, 12), (0.3, 12), (0.5, 12), (0.5, 4), (0.5, 2), (0.7, 12), (0.7, 2), (0.8, 2), (0.8, 1),
                        (0.9, 2), (0.9, 1)):  # fmt: skip
        ways.append(Way(f"rule {hold} {power}", hold, power=power))
    for hold, power in ((0.1, 12), (0.5, 12), (0.8, 2)):
        ways.append(Way(f"rule {hold} {power} no clamp", hold, power=power, clamp=False))
    for hold, power in ((0.1, 12), (0.3, 12), (0.5, 12), (0.5, 4), (0.8, 2), (0.9, 1)):
        ways.append(Way(f"learned {hold} {power}", hold, power=power, learned=True))
    for hold, power in ((0.5, 12), (0.8, 2)):
        late = Way("", (hold + 0.95) / 2, power=power)
        ways.append(Way(f"learned {hold} {power} no clamp", hold, power=power, learned=True, clamp=False))
        ways.append(Way(f"learned {hold} {power} clamp always", hold, power=power, learned=True, clamp_always=True))
        ways.append(Way(f"learned {hold} {power} paper", hold, power=power, learned=True, paper=True))
        ways.append(Way(f"rule {hold} {power} direction", hold, power=power, direction=True))
        ways.append(Way(f"rule {hold} {power} late", hold, power=power, outer=late))
        ways.append(Way(f"rule {hold} {power} no pull", hold, power=power, keep_pull=False))
    ways.append(Way("rule 0.8 2 end 1", 0.8, 1.0, 2.0))
    ways.append(Way("learned only", learned=True))
    ways.append(Way("learned only clamp always", learned=True, clamp_always=True))
    return ways


def second_ways() -> list[Way]:
    """When the scale is frozen and when the constraint closes are two things; so are inner and outer layers."""
    ways = [STE, LSQ, *(Way(f"rule {hold} 12", hold) for hold in (0.1, 0.2, 0.3))]
    ways += [Way("rule 0.1 12 end 1", 0.1, 1.0), Way("rule 0.1 24", 0.1, power=24)]
    ways += [Way(f"frozen {at}, never closed", freeze=at) for at in (0.1, 0.3)]
    ways += [Way(f"frozen {at}, closed .9-1", 0.9, 1.0, 2.0, freeze=at) for at in (0.1, 0.3, 0.5)]
    last, half = Way("", 0.97, 1.0, 1.0), Way("", 0.9, 1.0, 2.0, freeze=0.5)
    for name, outer in (("last", last), ("half", half), ("last no clamp", replace(last, clamp=False))):
        ways += [Way(f"rule {hold} 12, outer {name}", hold, outer=outer) for hold in (0.1, 0.3)]
    for name, outer in (("last", last), ("half", half)):
        ways.append(Way(f"frozen 0.1, closed .9-1, outer {name}", 0.9, 1.0, 2.0, freeze=0.1, outer=outer))
    ways += [Way(f"learned only, {rate}{' paper' * paper}", learned=True, rate=rate, paper=paper)
             for rate, paper in ((0.1, False), (0.1, True), (0.01, False))]  # fmt: skip
    ways += [
        Way(f"learned {hold} 12, {rate}", hold, learned=True, rate=rate) for hold, rate in ((0.5, 0.1), (0.3, 0.1))
    ]
    ways += [Way("learned paper, closed .9-1", 0.9, 1.0, 2.0, learned=True, paper=True),
             Way("learned 0.1, closed .9-1", 0.9, 1.0, 2.0, learned=True, rate=0.1),
             Way("straight-through without clip", clip=False)]  # fmt: skip
    return ways


def extra_ways() -> list[Way]:
    """Those that keep more beside each weight."""
    return [
        STE, Way("rule 0.1 12", 0.1), Way("settled", settle=0.02), Way("rule 0.1 12 settled", 0.1, settle=0.02),
        Way("rule 0.3 12 averaged", 0.3, average=0.99),
    ]  # fmt: skip


def third_ways() -> list[Way]:
    """Around the best of the second."""
    ways = [STE, LSQ, Way("rule 0.1 12", 0.1)]
    last = Way("", 0.97, 1.0, 1.0)
    late = {"last": last, "0.3, last": replace(last, freeze=0.3), "0.3, .9-1": Way("", 0.9, 1.0, 2.0, freeze=0.3)}
    for at, hold, end, power in ((0.1, 0.9, 1.0, 2.0), (0.2, 0.9, 1.0, 2.0), (0.1, 0.8, 0.95, 2.0)):
        way = Way(f"frozen {at}, closed {hold}-{end}", hold, end, power, freeze=at)
        ways += [way, *(replace(way, name=f"{way.name}, outer {name}", outer=outer) for name, outer in late.items())]
    return ways


def fourth_ways() -> list[Way]:
    """The float weights first."""
    last = Way("", 0.97, 1.0, 1.0)
    ways = [STE, replace(STE, name="float .5, straight-through", start=0.5)]
    for start, freeze in ((0.0, 0.1), (0.2, 0.3), (0.5, 0.6), (0.5, 0.55), (0.8, 0.82)):
        ways.append(Way(f"float {start}, frozen {freeze}", 0.9, 1.0, 2.0, freeze=freeze, start=start, outer=last))
    return ways


def fifth_ways() -> list[Way]:
    """How long, and how soon afterwards scales are frozen."""
    last = Way("", 0.97, 1.0, 1.0)
    ways = [STE, *(replace(STE, name=f"float {start}, straight-through", start=start) for start in (0.3, 0.5))]
    for start, freeze in ((0.5, 0.6), (0.5, 0.75), (0.5, 0.9), (0.3, 0.4), (0.3, 0.7)):
        way = Way(f"float {start}, frozen {freeze}", 0.9, 1.0, 2.0, freeze=freeze, start=start)
        ways += [way, replace(way, name=f"{way.name}, outer last", outer=last)]
    return ways


def sixth_ways() -> list[Way]:
    """How the float weights go over to the quantized ones, and when scales freeze."""
    last = Way("", 0.97, 1.0, 1.0)
    none = replace(STE, name="straight-through without clip", clip=False)
    found = [STE, none, *(replace(STE, name=f"float {s}, straight-through", start=s) for s in (0.5, 0.8))]
    for steep in (False, True):
        kind = "steep" if steep else "mixed"
        for start, full in ((0.0, 0.5), (0.0, 0.7), (0.0, 0.9), (0.3, 0.7), (0.5, 0.8)):
            way = replace(STE, name=f"{kind} {start}-{full}", start=start, full=full, steep=steep)
            found += [way, replace(way, name=f"{way.name} without clip", clip=False)]
    for start, freeze in ((0.5, 0.6), (0.5, 0.9), (0.8, 0.9)):
        found.append(Way(f"float {start}, frozen {freeze}", 0.9, 1.0, 2.0, freeze=freeze, start=start, outer=last))
    for steep, (start, full, freeze) in ((k, s) for k in (False, True) for s in ((0.0, 0.7, 0.75), (0.0, 0.9, 0.9))):
        found.append(Way(f"{'steep' if steep else 'mixed'} {start}-{full}, frozen {freeze}", 0.9, 1.0, 2.0,
                         freeze=freeze, start=start, full=full, steep=steep, outer=last))  # fmt: skip
    return found


def seventh_ways() -> list[Way]:
    """How the slack falls, and what the end costs."""
    mixed = replace(STE, name="mixed .3-.7", start=0.3, full=0.7)
    steep = replace(STE, name="steep 0-.7", full=0.7, steep=True)
    found = [STE, replace(STE, name="float .5, straight-through", start=0.5)]
    for start, full, bend in ((0.0, 0.7, 1.0), (0.0, 0.7, 0.5), (0.0, 0.9, 0.5), (0.0, 0.5, 1.0), (0.0, 0.5, 0.5)):
        found.append(replace(mixed, name=f"mixed {start}-{full} bend {bend}", start=start, full=full, bend=bend))
    for way in (mixed, steep):
        found.append(way)
        changes: dict[str, dict[str, Any]] = {
            "closed .97-1": dict(hold=0.97, end=1.0, power=1.0),
            "closed .97-1 no clamp": dict(hold=0.97, end=1.0, power=1.0, clamp=False),
            "closed .97-1 no pull": dict(hold=0.97, end=1.0, power=1.0, keep_pull=False),
            "closed .9-1 no clamp": dict(hold=0.9, end=1.0, power=2.0, clamp=False),
            "closed .9-1 direction": dict(hold=0.9, end=1.0, power=2.0, direction=True),
            "frozen .75, clamped, never closed": dict(freeze=0.75),
            "frozen .75, never closed": dict(freeze=0.75, clamp=False),
            "clamped, never closed": dict(clamp_always=True),
        }
        for name, more in changes.items():
            found.append(replace(way, name=f"{way.name}, {name}", **more))
    return found


def eighth_ways() -> list[Way]:
    """The recipe of now, over by the middle as it has it for SGD, and by 0.7 as for AdamW."""
    made = Way("", hold=0.99, end=1.0, power=1.0, freeze=0.75, steep=True)
    return [STE, *(replace(made, name=f"steep 0-{full}, frozen .75, closed .99-1", full=full) for full in (0.5, 0.7))]


def ninth_ways() -> list[Way]:
    """How long the way over is, and in PARQ's shape."""
    made = Way("", hold=0.99, end=1.0, power=1.0, freeze=0.75, full=0.7, steep=True)
    late = replace(made, full=0.95, freeze=0.96, sigmoid=10.0)
    free = Way("steep 0-.7", full=0.7, steep=True)
    return [
        STE, free, replace(free, name="sigmoid 0-.95 without clip", full=0.95, sigmoid=10.0, clip=False),
        replace(made, name="steep 0-.7, frozen .75, closed .99-1"),
        replace(made, name="steep 0-.9, frozen .95, closed .99-1", full=0.9, freeze=0.95),
        replace(late, name="sigmoid 0-.95, frozen .96, closed .99-1"),
        replace(late, name="sigmoid 0-.8, frozen .82, closed .99-1", full=0.8, freeze=0.82),
    ]  # fmt: skip


def lsq_ways() -> list[Way]:
    """Scales that are learned, on the way over and without one."""
    found = [STE, LSQ]
    for full in (0.5, 0.7):
        made = Way(f"rule, steep 0-{full}", hold=0.99, end=1.0, power=1.0, freeze=0.75, full=full, steep=True)
        found += [made, replace(made, name=f"learned, steep 0-{full}", learned=True)]
    return [*found, replace(made, name="learned, no way", learned=True, full=0.0)]


WAYS = {
    "first": first_ways,
    "second": second_ways,
    "third": third_ways,
    "fourth": fourth_ways,
    "fifth": fifth_ways,
    "sixth": sixth_ways,
    "seventh": seventh_ways,
    "eighth": eighth_ways,
    "ninth": ninth_ways,
    "lsq": lsq_ways,
    "extra": extra_ways,
}


BOTH = (False, True)  # inner layers, and all


def replicas_of(task: Task, optimizer: str, ways: Sequence[Way], widths: Sequence[str], seeds: Sequence[int],
                sets: Sequence[bool] = BOTH) -> list[Replica]:  # fmt: skip
    cells = itertools.product(ways, widths, sets, task.settings[optimizer], seeds)
    return [Replica(way, width, everything, lr, smoothing, seed)
            for way, width, everything, (lr, smoothing), seed in cells if everything or way.outer is None]  # fmt: skip


def run(task: Task, optimizer: str, ways: Sequence[Way], widths: Sequence[str], seeds: Sequence[int],
        data: list[Tensor], epochs: int | None, most: int, deadline: float, out: Path,
        made: type[Networks] = Networks, sets: Sequence[bool] = BOTH) -> None:  # fmt: skip
    """Trains and appends a line a replica to ``out``; ``most`` replicas at a time."""
    replicas = replicas_of(task, optimizer, ways, widths, seeds, sets)
    for first in range(0, len(replicas), most):
        part = replicas[first : first + most]
        began = time.monotonic()
        networks = made(task, optimizer, part, data, epochs or task.epochs)
        if not networks.train(deadline):
            print(f"{task.name}, {optimizer}: out of time", file=sys.stderr, flush=True)
            return
        found = networks.accuracy()
        seconds = time.monotonic() - began
        with open(out, "a") as file:
            for replica, accuracy in zip(part, found, strict=True):
                row = {**asdict(replica), "way": replica.way.name, "task": task.name, "optimizer": optimizer,
                       "accuracy": round(accuracy, 3)}  # fmt: skip
                print(json.dumps(row), file=file)
        said = f"{task.name}, {optimizer}: {len(part)} networks, {networks.steps} steps, {seconds:.1f} s"
        print(said, file=sys.stderr, flush=True)
        del networks
        if data[0].is_cuda:
            torch.cuda.empty_cache()


def scores(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each way and cell the difference to straight-through, paired over seeds: mean, standard error (NaN with one
    seed), count."""
    cells: dict[Any, dict[str, dict[int, float]]] = {}
    for r in rows:
        cell = r["task"], r["optimizer"], r["everything"], r["width"], r["lr"]
        cells.setdefault(cell, {}).setdefault(r["way"], {})[r["seed"]] = r["accuracy"]
    found = []
    for cell, ways in cells.items():
        base = ways.get(STE.name, {})
        for way, values in ways.items():
            gaps = [values[s] - base[s] for s in values if s in base]
            if way == STE.name or not gaps:
                continue
            error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            found.append({"cell": cell, "way": way, "gain": statistics.fmean(gaps), "error": error, "seeds": len(gaps)})
    return found


def report(rows: Sequence[dict[str, Any]], by: Sequence[int] = (1, 2, 3)) -> str:
    """A line a way: the mean gain over the cells that agree in ``by`` (indices of the cell's parts), and the worst, in
    standard errors (NaN where every cell has one seed)."""
    found = scores(rows)
    groups = sorted({tuple(s["cell"][i] for i in by) for s in found}, key=str)
    names = sorted({s["way"] for s in found})
    lines = ["way | mean | worst cell | " + " | ".join(" ".join(map(str, g)) for g in groups)]
    for name in names:
        mine = [s for s in found if s["way"] == name]
        columns = []
        for group in groups:
            gains = [s["gain"] for s in mine if tuple(s["cell"][i] for i in by) == group]
            columns.append(f"{statistics.fmean(gains):+.2f}" if gains else "")
        worst = min((s["gain"] / max(s["error"], 0.05) for s in mine if s["seeds"] > 1), default=math.nan)
        lines.append(
            f"{name} | {statistics.fmean(s['gain'] for s in mine):+.2f} | {worst:+.1f} | " + " | ".join(columns)
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.recipe_search", description=__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    add("--optimizers", nargs="+", choices=("sgd", "adamw"), default=["sgd", "adamw"])
    add("--ways", choices=list(WAYS), default="second", help="which list of them (default %(default)s)")
    add("--only", nargs="+", metavar="NAME", help="of that list, beside straight-through")
    add("--widths", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    add("--settings", type=int, help="only the first so many pairs of learning rate and label smoothing")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, help="default: the task's")
    add("--most", type=int, default=2000, help="networks at a time (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--budget", type=float, default=math.inf, help="seconds")
    add("--cache", type=Path, default=Path("build/recipe-search"), help="folder for the data")
    add("--fashion", type=Path, default=FASHION, help="folder of dataset-fashion-mnist's files")
    add("--out", type=Path, default=Path("build/recipe-search/rows.jsonl"), help="rows are added to it")
    add("--data-only", action="store_true", help="makes the data and ends")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + args.budget
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    data = {name: load(name, args.cache, args.fashion, device) for name in {TASKS[t].data for t in args.tasks}}
    if args.data_only:
        return 0
    ways = [way for way in WAYS[args.ways]() if not args.only or way is STE or way.name in args.only]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, optimizer in itertools.product(args.tasks, args.optimizers):
        task = TASKS[name]
        task = replace(task, settings={key: pairs[: args.settings] for key, pairs in task.settings.items()})
        run(task, optimizer, ways, args.widths, args.seeds, data[task.data], args.epochs, args.most, deadline, args.out)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
