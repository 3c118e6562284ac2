"""The pictures of docs/explanation, drawn from what the package computes: python docs/pictures/make.py [FOLDER]"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels import figures

GREY, ORANGE, BLUE, GREEN, PURPLE, VERMILION, SKY = figures.PALETTE[:7]
GRID = ak.quant.Uniform(bits=2)
LEVELS = np.array(GRID.levels)


def constraint(w: np.ndarray, eps: float) -> np.ndarray:
    """h of docs/mathematics.md, section 2, with s = 1."""
    u = np.abs(w - LEVELS[np.abs(w[:, None] - LEVELS).argmin(1)])
    return eps - 16 * (u * (1 - u)) ** 2


def radius(eps: float) -> float:
    """Of the feasible set around a level, in brackets."""
    return (1 - math.sqrt(1 - math.sqrt(eps))) / 2


def draw_constraint() -> dict[str, bytes]:
    figure, axes = figures.figure(1, 3, 9.5, 2.9, sharey=True)
    w = np.linspace(-2, 1, 1201)
    for axis, eps in zip(axes, (0.95, 0.5, 0.05), strict=True):
        h = constraint(w, eps)
        figures.label(axis, f"ε = {eps:g}", "weight ÷ scale")
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.plot(w, h, color=BLUE, linewidth=1.8)
        for level in LEVELS:
            low, high = max(-2, level - radius(eps)), min(1, level + radius(eps))
            axis.plot([low, high], [-1.06, -1.06], color=GREEN, linewidth=6, solid_capstyle="butt")
        axis.plot(LEVELS, np.full(4, -1.06), "|", color="black", markersize=10)
        axis.set_ylim(-1.18, 1.08)
        axis.set_xticks(LEVELS)
    axes[0].set_ylabel("h(w)", fontsize=9)
    return figures.save(figure, "constraint", ("svg",))


def draw_soften() -> dict[str, bytes]:
    """What layers compute with while the slack falls."""
    figure, axes = figures.figure(1, 4, 9.5, 2.7, sharey=True)
    w = torch.linspace(-2.4, 1.4, 1521)
    for axis, slack in zip(axes, (1.0, 0.6, 0.2, 0.02), strict=True):
        y = ak.ops.soft_quantize(w, torch.ones(()), GRID, slack)
        axis.plot(w, w, color=GREY, linewidth=1, linestyle="--")
        axis.plot(w, y, color=BLUE, linewidth=1.8)
        figures.label(axis, f"slack {slack:g}", "weight ÷ scale", grid="both")
        axis.set_xticks(LEVELS)
        axis.set_yticks(LEVELS)
    axes[0].set_ylabel("computed with ÷ scale", fontsize=8.5)
    return figures.save(figure, "soften", ("svg",))


def draw_annealing() -> dict[str, bytes]:
    """The recipe's own numbers for a thousand steps."""
    model = ak.quantize_(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    recipe = ak.Recipe(model, ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1), 1000)
    figure, axes = figures.figure(1, 2, 9.5, 3.2, width_ratios=(3, 1.4), sharey=True)
    steps = np.arange(1001)
    full, frozen = recipe.full or 0, next(int(k) for k in steps if recipe.frozen_at(int(k)))
    ends = (0, full, frozen, recipe.hold, 1000)
    texts = (
        "on the way from float\nto quantized weights",
        "quantized,\nscales follow",
        "scales frozen,\nweights inside\nthe hull",
        "",
    )
    for i, (first, last, text) in enumerate(zip(ends, ends[1:], texts, strict=False)):
        for axis in axes:
            axis.axvspan(first, last, color=(GREY, SKY)[i % 2], alpha=0.13, linewidth=0)
        axes[0].text((first + last) / 2, 0.3 if i else 0.15, text, ha="center", va="center", fontsize=8)
    for axis in axes:
        axis.plot(steps, [recipe.slack_at(int(k)) for k in steps], "--", color=ORANGE, linewidth=1.8, label="slack")
        axis.plot(steps, [2 * radius(recipe.eps_at(int(k))) for k in steps], color=BLUE, linewidth=1.8,
                  label="feasible share of a bracket")  # fmt: skip
        axis.plot(steps, [recipe.eps_at(int(k)) for k in steps], ":", color=GREEN, linewidth=2, label="ε")
    figures.label(axes[0], "the whole training", "step of 1,000", grid="x")
    figures.label(axes[1], "the end of it: closing", "step of 1,000", grid="x")
    axes[1].set_xlim(recipe.hold - 5, 1001)
    figures.legend_below(figure, axes, 3)
    return figures.save(figure, "annealing", ("svg",))


def skewed(w: np.ndarray, direction: np.ndarray, eps: float, lr: float = 0.05, alpha: float = 1.0) -> np.ndarray:
    """Where the operator moves each weight, over the learning rate."""
    moved = torch.from_numpy(w.reshape(1, -1)).float()
    before, d = moved.clone(), torch.from_numpy(direction.reshape(1, -1)).float()
    ak.ops.skew_direction_([moved], [d], [torch.ones(1)], [GRID], lr=lr, eps=eps, alpha=alpha)
    return ((moved - before) / lr).numpy().reshape(w.shape)


def draw_velocity() -> dict[str, bytes]:
    figure, axes = figures.figure(1, 2, 9.5, 3.2, sharey=True)
    w, eps = np.linspace(-0.999, 0.999, 1200), 0.2
    for axis, push in zip(axes, (0.0, 1.0), strict=True):
        for level in (-1, 0, 1):
            low, high = max(-1, level - radius(eps)), min(1, level + radius(eps))
            axis.axvspan(low, high, color=GREEN, alpha=0.15, linewidth=0)
        axis.axhline(push, color=GREY, linewidth=1.2, linestyle="--", label="base optimizer's direction")
        v = skewed(w, np.full_like(w, push), eps)
        v[np.abs(np.diff(v, prepend=v[0])) > 1] = np.nan  # a jump is no line
        axis.plot(w, v, color=BLUE, linewidth=1.8, label="skewed velocity")
        what = "no gradient" if push == 0 else "a gradient that asks for larger weights"
        figures.label(axis, what, "weight ÷ scale (green: feasible)")
        axis.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes[0].set_ylabel("velocity v", fontsize=9)
    figures.legend_below(figure, axes, 2)
    return figures.save(figure, "velocity", ("svg",))


def draw_field() -> dict[str, bytes]:
    """Two weights, a quadratic loss, and where the skewed step takes them as eps falls."""
    target, stiff = np.array([0.42, -0.38]), np.array([1.0, 0.6])
    figure, axes = figures.figure(1, 3, 9.5, 3.6, sharex=True, sharey=True)
    line = np.linspace(-1.0, 1.0, 13)
    a, b = np.meshgrid(line, line)
    starts = np.array([[-0.9, 0.85], [0.9, 0.7], [-0.6, -0.95], [0.75, -0.9], [-0.2, 0.3]])
    for axis, eps in zip(axes, (1.0, 0.3, 0.02), strict=True):
        r = radius(eps) if eps < 1 else 0.5
        for x in (-1, 0, 1):
            for y in (-1, 0, 1):
                left, low = max(-1, x - r), max(-1, y - r)
                axis.fill([left, min(1, x + r), min(1, x + r), left], [low, low, min(1, y + r), min(1, y + r)],
                          color=GREEN, alpha=0.18, linewidth=0)  # fmt: skip
        va, vb = skewed(a, stiff[0] * (target[0] - a), eps), skewed(b, stiff[1] * (target[1] - b), eps)
        length = np.hypot(va, vb) + 1e-9
        axis.quiver(a, b, va / length**0.5, vb / length**0.5, color=GREY, width=0.005, scale=22)
        path = starts.copy()
        seen = [path.copy()]
        for step in range(400):
            path = path + 0.05 * skewed(path, stiff * (target - path), eps)
            seen += [path.copy()] * (step % 10 == 9)
        for i in range(len(starts)):
            axis.plot([p[i, 0] for p in seen], [p[i, 1] for p in seen], color=BLUE, linewidth=1.4)
        axis.plot(path[:, 0], path[:, 1], "o", color=BLUE, markersize=5)
        axis.plot(*target, "*", color=VERMILION, markersize=10)
        figures.label(axis, f"ε = {eps:g}", "first weight ÷ scale", grid="both")
        axis.set_aspect("equal")
        axis.set_xlim(-1.06, 1.06)
        axis.set_ylim(-1.06, 1.06)
        axis.set_xticks([-1, 0, 1])
        axis.set_yticks([-1, 0, 1])
    axes[0].set_ylabel("second weight ÷ scale", fontsize=8.5)
    return figures.save(figure, "field", ("svg",))


def wandering(grid: Any, rule: str, freeze: bool) -> list[float]:
    """The mean scale of weights that wander at random and are clamped to the hull from step 100 on."""
    w, moves = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    seen: list[float] = []
    for step in range(600):
        if step <= 100 or not freeze:
            scale = ak.quant.compute_scale(w, grid, rule)[:, None]
        w = w + 0.01 * torch.randn(w.shape, generator=moves)
        if step >= 100:
            w = torch.minimum(torch.maximum(w, grid.levels[0] * scale), grid.levels[-1] * scale)
        seen.append(scale.mean().item())
    return seen


def draw_scales() -> dict[str, bytes]:
    """What freezing the scale is for."""
    figure, axes = figures.figure(1, 2, 9.5, 3.1)
    cases = ((ak.quant.Binary(), "mean", "binary, scale mean |w|"), (GRID, "sawb", "2 bits, scale SAWB"))
    for axis, (grid, rule, title) in zip(axes, cases, strict=True):
        for freeze, color, style in ((True, BLUE, "-"), (False, VERMILION, "--")):
            text = "frozen at step 100" if freeze else "follows the clamped weights"
            axis.plot(wandering(grid, rule, freeze), style, color=color, label=text, linewidth=1.8)
        figures.label(axis, title, "step (weights are clamped from step 100 on)")
        axis.set_ylim(0, None)
    axes[0].set_ylabel("mean scale", fontsize=8.5)
    figures.legend_below(figure, axes, 2)
    return figures.save(figure, "scales", ("svg",))


DRAWN = (draw_constraint, draw_soften, draw_annealing, draw_velocity, draw_field, draw_scales)


def main(folder: Path) -> None:
    for draw in DRAWN:
        for name, data in draw().items():
            (folder / name).write_bytes(data)
            print(f"wrote {folder / name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
