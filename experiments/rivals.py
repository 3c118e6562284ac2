"""The ways to train with quantized weights that `python -m askew_kernels accuracy` compares, one entry each.

float             the layers as they are
straight-through  s Q(w/s) forward, the gradient to w inside the hull, s by the library's rule anew in every step; the
                  optimizer of torch
LSQ               the scale learned: Esser et al., Learned Step Size Quantization, ICLR 2020; in plain PyTorch, here
PARQ              torchao's optimizer: Jin et al., PARQ: Piecewise-Affine Regularized Quantization, ICML 2025
ASkewSGD …        this package's

All see the same initial weights, batches, learning rates and weight decay, and have one scale an output channel. Levels
are ``demo.WIDTHS``' but PARQ's, whose quantizers come with it (2^b levels without 0 for b bits), and ``LEVELS``'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import askew_kernels as ak
from askew_kernels import demo

FINE_TUNING = "finetune"  # of RECIPES
MOMENTUM, WARM_UP, END = 0.9, 0.05, 0.95  # WARM_UP: the share in which the learning rate grows linearly; END: of PARQ
ACTIVATION_LEVELS = (-128, 127)


@dataclass(frozen=True)
class Recipe:
    """What a run is trained with, whatever the method. layers: names of those that are quantized."""

    layers: tuple[str, ...]
    width: str
    activations: bool
    adamw: bool
    lr: float
    weight_decay: float
    steps: int
    scale_lr: float = 1.0  # of learned scales, in learning rates of the weights
    fine_tunes: bool = False  # whether the weights start from a trained model


@dataclass
class Training:
    """after_lr: once the learning rate was set for the next step; finish: weights onto their levels."""

    optimizer: Any
    after_lr: Callable[[], Any] = lambda: None
    finish: Callable[[], Any] = lambda: None
    scheduled: Any = None  # whose learning rates are set, where it is not the optimizer

    def __post_init__(self) -> None:
        base = self.scheduled or self.optimizer
        self.groups: list[dict[str, Any]] = base.param_groups
        self.first = [float(group["lr"]) for group in self.groups]

    def set_lr(self, share: float) -> None:
        """Of each group's own."""
        for group, lr in zip(self.groups, self.first, strict=True):
            group["lr"] = share * lr


def lr_share(step: int, steps: int) -> float:
    """Linear over the first ``WARM_UP``, then half a cosine to 0."""
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))))


def plain_optimizer(params: Iterable[Any], recipe: Recipe) -> torch.optim.Optimizer:
    """params: parameters or groups."""
    if recipe.adamw:
        return torch.optim.AdamW(params, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(params, lr=recipe.lr, momentum=MOMENTUM, weight_decay=recipe.weight_decay)


def quantize(
    model: nn.Module, recipe: Recipe, scale: str | None = None, grid: ak.quant.Grid | None = None
) -> nn.Module:
    """By this package's layers; scale: another rule than the width's; grid: another one, with its own rule."""
    grid, rule = demo.WIDTHS[recipe.width] if grid is None else (grid, ak.quant.default_rule(grid))
    activation = ak.quant.Uniform(8) if recipe.activations else None
    config = ak.QuantConfig(weight=grid, scale=scale or rule)
    inputs = ak.QuantConfig(weight=grid, scale=scale or rule, activation=activation)
    embeddings = {name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    configs = {name: config if name in embeddings else inputs for name in recipe.layers}
    return ak.quantize_(model, configs, kinds=("linear", "conv", "embedding"))


def train_float(model: nn.Module, recipe: Recipe) -> Training:
    return Training(plain_optimizer(model.parameters(), recipe))


def train_straight_through(model: nn.Module, recipe: Recipe) -> Training:
    quantize(model, recipe)
    optimizer = plain_optimizer(model.parameters(), recipe)
    return Training(optimizer, finish=lambda: ak.hard_quantize_(model))


# ---- LSQ -------------------------------------------------------------------------------------------------------------


class LSQ(nn.Module):
    """A parametrization of a weight: s q, q = round(clip(w / s, lowest, highest)), s learned, one a row.

    Section 2 of the paper: the gradient of s is q - w/s inside the hull and the end's level outside, times
    1 / sqrt(N highest) with N weights a scale; w's is 1 inside and 0 outside; s begins at 2 mean|w| / sqrt(highest).
    Of one bit, of which the paper does not speak, q is the sign. A floor, which ``train_lsq`` keeps, is this program's.
    """

    def __init__(self, weight: Tensor, grid: Any) -> None:
        super().__init__()
        self.lowest, self.highest, self.signs = grid.levels[0], grid.levels[-1], len(grid.levels) == 2
        rows = weight.detach().flatten(1)
        self.factor = 1 / math.sqrt(rows.shape[1] * self.highest)
        self.shape = (-1, *[1] * (weight.dim() - 1))
        self.scale = nn.Parameter(2 * rows.abs().mean(1) / math.sqrt(self.highest))
        self.floor: Tensor
        self.register_buffer("floor", self.scale.detach() * 1e-3)

    def forward(self, w: Tensor) -> Tensor:
        s = self.scale.view(self.shape)
        s = (s - s * self.factor).detach() + s * self.factor  # its value, and a gradient that is scaled
        x = (w / s).clamp(self.lowest, self.highest)
        q = torch.where(x >= 0, 1.0, -1.0) if self.signs else x.round()
        return ((q - x).detach() + x) * s


def rounded_input(x: Tensor, dims: int) -> Tensor:
    """As ``QuantConfig(activation=Uniform(8))`` has it: s Q(x/s), s = max|x| / 127 over the last ``dims`` ones."""
    top = x.detach().abs().amax(tuple(range(x.dim() - dims, x.dim())), keepdim=True) / ACTIVATION_LEVELS[1]
    s = torch.where(top == 0, 1.0, top)
    return x + ((x.detach() / s).round().clamp(*ACTIVATION_LEVELS) * s - x.detach())


def round_inputs(model: nn.Module, recipe: Recipe) -> None:
    """Of the quantized layers but embeddings, where the setting asks for it."""
    for name in recipe.layers if recipe.activations else ():
        layer = model.get_submodule(name)
        dims = 3 if isinstance(layer, nn.Conv2d) else 1
        if not isinstance(layer, nn.Embedding):
            layer.register_forward_pre_hook(lambda _, args, dims=dims: (rounded_input(args[0], dims), *args[1:]))


def train_lsq(model: nn.Module, recipe: Recipe) -> Training:
    grid, _ = demo.WIDTHS[recipe.width]
    found = []
    for name in recipe.layers:
        layer: Any = model.get_submodule(name)
        found.append(LSQ(layer.weight, grid))
        parametrize.register_parametrization(layer, "weight", found[-1])
    round_inputs(model, recipe)
    scales = [lsq.scale for lsq in found]
    known = set(map(id, scales))
    others = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": others}, {"params": scales, "weight_decay": 0.0, "lr": recipe.lr * recipe.scale_lr}]

    @torch.no_grad()
    def after() -> None:
        for lsq in found:
            lsq.scale.clamp_(min=lsq.floor)

    def finish() -> None:
        for name in recipe.layers:
            parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=True)

    return Training(plain_optimizer(groups, recipe), after, finish)


# ---- PARQ ------------------------------------------------------------------------------------------------------------


def parq_quantizer(width: str) -> tuple[Any, int]:
    """(torchao's quantizer, its number of bits: 0 is ternary): of those that it has the one with the least error."""
    from torchao.prototype.parq import quant

    if width == "ternary":
        return quant.LSBQuantizer(optimal=True), 0
    if width == "binary":
        return quant.LSBQuantizer(), 1
    return quant.UnifQuantizer(), int(width.split()[0])


def train_parq(model: nn.Module, recipe: Recipe) -> Training:
    """The prox-map anneals from the start to ``END`` of the steps; all else as it comes."""
    from torchao.prototype.parq import optim

    round_inputs(model, recipe)
    quantizer, bits = parq_quantizer(recipe.width)
    weights: list[Any] = [model.get_submodule(name).weight for name in recipe.layers]
    known = set(map(id, weights))
    groups = [
        {"params": weights, "quant_bits": bits},
        {"params": [p for p in model.parameters() if id(p) not in known]},
    ]
    base = plain_optimizer(groups, recipe)
    prox = optim.ProxPARQ(anneal_start=0, anneal_end=max(1, min(round(END * recipe.steps), recipe.steps - 1)))
    return Training(optim.QuantOptimizer(base, quantizer, prox, quant_per_channel=True), scheduled=base)


# ---- this package ----------------------------------------------------------------------------------------------------


def our_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = ak.param_groups(model, lr=recipe.lr, scale_lr=recipe.scale_lr)
    if recipe.adamw:
        return ak.optim.ASkewAdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return ak.optim.ASkewSGD(groups, lr=recipe.lr, momentum=MOMENTUM, weight_decay=recipe.weight_decay)


MIDRISE = {f"{bits} bits": ak.quant.Midrise(bits) for bits in (4, 3, 2)}  # PARQ's levels, with this package's rule


def train_ours(
    model: nn.Module, recipe: Recipe, scale: str | None = None, grids: Mapping[str, ak.quant.Grid] | None = None
) -> Training:
    """By the library's own recipe, whose numbers are nowhere else. grids: other ones than the widths'."""
    quantize(model, recipe, scale, None if grids is None else grids[recipe.width])
    optimizer = our_optimizer(model, recipe)
    followed = ak.Recipe(model, optimizer, recipe.steps, settings=FINE_TUNING if recipe.fine_tunes else None)
    return Training(optimizer, followed.step, lambda: ak.hard_quantize_(model))


FLOAT, STRAIGHT_THROUGH, LSQ_NAME, PARQ = "float", "straight-through", "LSQ", "PARQ (torchao)"
OURS_LEARNED, OURS_MIDRISE = "ASkewSGD, learned scale", "ASkewSGD, Midrise"
LEARNED = (LSQ_NAME, OURS_LEARNED)  # whose scales have a learning rate
METHODS: dict[str, Callable[[nn.Module, Recipe], Training]] = {
    FLOAT: train_float,
    STRAIGHT_THROUGH: train_straight_through,
    LSQ_NAME: train_lsq,
    PARQ: train_parq,
    "ASkewSGD": train_ours,
    OURS_LEARNED: functools.partial(train_ours, scale="lsq"),
    OURS_MIDRISE: functools.partial(train_ours, grids=MIDRISE),
}
LEVELS = {OURS_MIDRISE: tuple(MIDRISE)}  # methods with levels of their own: the widths that they have them for
OURS = tuple(name for name in METHODS if name.startswith("ASkewSGD"))
