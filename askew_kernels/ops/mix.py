"""A mixture of several quantizations of one tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..contract import MOST_CANDIDATES, compute_dtype
from .autograd import differentiable, one_by_one, tracked, transformed
from .checks import check_float_tensor, check_grid, check_scale
from .quantize import run_fake_quantize, run_fake_quantize_backward
from .schema import define, like_first

__all__ = ["MOST_CANDIDATES", "candidate_encodings", "mix_fake_quantize", "run_mix_fake_quantize"]


class _Mixed(torch.autograd.Function):
    """mix_fake_quantize in reverse mode: gradients of x, the scales (where they are learned) and the strengths."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        x, scales, strengths, *ctx.options = inputs
        ctx.save_for_backward(x, scales, strengths)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (grad.contiguous(), *ctx.saved_tensors, *ctx.options)
        grads = differentiable("mix_fake_quantize_backward", _mix_backward, inputs)
        return None, grads[0], grads[2] if ctx.options[2] else None, grads[1], None, None, None


def _quantized(wide: Tensor, scales: Tensor, strengths: Tensor, grids: list[int], clip: bool) -> Iterator[tuple]:
    """(p, Q(x), the single quantization's arguments or None) of each candidate: a mixture as a graph of quantizations
    that are differentiable themselves, which torch.func and second derivatives go through."""
    no_levels = torch.empty(0, dtype=torch.float32, device=wide.device)
    for k, p in enumerate(strengths.to(wide.dtype)):
        weight = (scales[k], no_levels, grids[3 * k : 3 * k + 3])
        is_float = grids[3 * k] == contract.FLOAT
        yield (p, wide, None) if is_float else (p, run_fake_quantize(wide, *weight, clip, False, 0), weight)


def _mixture(x: Tensor, scales: Tensor, strengths: Tensor, grids: list[int], clip: bool, learned: bool) -> Tensor:
    """``mix_fake_quantize``, the same products and sums in the same order."""
    _once(learned)
    parts = (p * q for p, q, _ in _quantized(x.to(compute_dtype(x.dtype)), scales, strengths, grids, clip))
    return functools.reduce(torch.add, parts).to(x.dtype)


def _mixture_gradients(
    grad: Tensor, x: Tensor, scales: Tensor, strengths: Tensor, grids: list[int], clip: bool, learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``mix_fake_quantize_backward``."""
    _once(learned)
    dtype = compute_dtype(x.dtype)
    wide, g = x.to(dtype), grad.to(dtype)
    to_x, to_strengths = torch.zeros_like(wide), []
    for p, q, weight in _quantized(wide, scales, strengths, grids, clip):
        inside = run_fake_quantize_backward(g, wide, *weight) if clip and weight is not None else g
        to_x = to_x + p * inside
        to_strengths.append((g * q).double().sum())
    return to_x.to(x.dtype), torch.stack(to_strengths).to(strengths.dtype), torch.zeros_like(scales)


def _once(learned: bool) -> None:
    if learned:
        raise NotImplementedError(
            "askew::mix_fake_quantize: learned scales are differentiated once, in reverse mode, outside torch.func; "
            "use learned=False, or backward() without create_graph=True"
        )


def _mix(name: str, run: Callable, args: tuple) -> Any:
    return _mixture(*args) if transformed() else _Mixed.apply(run, *args)


def _mix_backward(name: str, run: Callable, args: tuple) -> Any:
    return _mixture_gradients(*args) if tracked(args) else run(*args)


_MIXTURE = "Tensor x, Tensor scales, Tensor strengths, int[] grids, bool ste_clip, bool learned"

define("mix_fake_quantize", f"({_MIXTURE}) -> Tensor", fake=like_first, derivative=_mix, batch=one_by_one)
define("mix_fake_quantize_backward", f"(Tensor grad, {_MIXTURE}) -> (Tensor, Tensor, Tensor)",
       fake=lambda grad, x, scales, strengths, *_args: tuple(map(like_first, (x, strengths, scales))),
       derivative=_mix_backward, batch=one_by_one)  # fmt: skip


def mix_fake_quantize(
    x: Tensor, scales: Tensor, strengths: Tensor, grids: Sequence[Any], *, ste_clip: bool = True, learned: bool = False
) -> Tensor:
    """y = sum_k p_k s_k Q_k(x / s_k): several quantizations of one tensor, mixed by strengths p, in one read of x.

    Backward, in one pass, for grad_y = G: to x, G sum_k p_k over the candidates in whose hull x is (``ste_clip=False``:
    over all); to p_k, sum G s_k Q_k; to s_k of a row with ``learned``, p_k sum (G (Q_k - x/s_k) inside, G c_end
    outside) / sqrt(cols c_max) (LSQ), otherwise none.

    x: any shape, float; scales: (candidates, rows) positive, as for ``fake_quantize``; strengths: (candidates,);
    grids: up to 8 of Uniform, Ternary, Binary, or None for x itself, whose scale is not looked at. Sums in float64.
    Returns a contiguous tensor like ``x``. Raises TypeError/ValueError naming the argument.
    Source: Cai, Vasconcelos, EdMIPS, CVPR 2020; Esser et al., LSQ, ICLR 2020; docs/mathematics.md, section 6.
    """
    check_float_tensor("x", x)
    encodings = candidate_encodings(grids)
    for name, t, shape in (("scales", scales, "(candidates, rows)"), ("strengths", strengths, "(candidates,)")):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.device != x.device:
            raise TypeError(f"{name}: expected a float tensor of shape {shape} on {x.device}, got {t!r:.60}")
    if strengths.shape != (len(grids),):
        raise ValueError(f"strengths: expected shape ({len(grids)},), got {tuple(strengths.shape)}")
    if scales.dim() != 2 or len(scales) != len(grids):
        raise ValueError(f"scales: expected shape ({len(grids)}, rows), got {tuple(scales.shape)}")
    for k, grid in enumerate(grids):
        if grid is not None or scales.shape[1] == 0:
            check_scale(f"scales[{k}]", scales[k], x, "x")
    return run_mix_fake_quantize(x, scales, strengths, encodings, bool(ste_clip), bool(learned))


def run_mix_fake_quantize(
    x: Tensor, scales: Tensor, strengths: Tensor, encodings: list[int], ste_clip: bool, learned: bool
) -> Tensor:
    """``mix_fake_quantize`` without its checks; ``encodings`` as ``candidate_encodings`` gives them."""
    wanted = compute_dtype(x.dtype)
    inputs = (x.contiguous(), scales.to(wanted).contiguous(), strengths.to(wanted).contiguous(), encodings)
    return differentiable("mix_fake_quantize", _mix, (*inputs, ste_clip, learned))


def candidate_encodings(grids: Sequence[Any]) -> list[int]:
    """Three integers a candidate; None is no quantization."""
    if not 1 <= len(grids) <= MOST_CANDIDATES:
        raise ValueError(f"grids: expected 1 to {MOST_CANDIDATES} candidates, got {len(grids)}")
    for grid in grids:
        if grid is not None:
            check_grid(grid)
            if grid.encoding[0] == contract.CODEBOOK:
                raise ValueError(f"grids: expected Uniform, Ternary, Binary or None, got {grid}")
    return [n for grid in grids for n in ((contract.FLOAT, 0, 0) if grid is None else grid.encoding)]
