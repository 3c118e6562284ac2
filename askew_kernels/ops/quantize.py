"""Fake quantization, its straight-through gradient, the projection onto the intervals, and sums of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd
from .checks import check_float_tensor, check_grid, check_scale, rate_tensor
from .dense import InPlace, in_place, layout


def fake_quantize(
    x: Tensor, scale: Tensor, grid: Any, *, ste_clip: bool = True, stochastic: bool = False, seed: int = 0
) -> Tensor:
    """y = s Q(x / s): quantize and dequantize, straight-through for the gradient.

    Q is the nearest level of ``grid``: ties to even for uniform grids (as torch.round), to the lower level for
    binary and codebooks; values outside the hull go to the nearest end; NaN stays NaN.
    Backward: grad inside the hull [s c_0, s c_(K-1)], 0 outside; ``ste_clip=False``: grad everywhere. ``scale``
    receives no gradient.
    ``stochastic``: one of x's two neighbouring levels, with E[y] = x inside the hull; Philox4x32-10 with key ``seed``
    and the element's index as counter, so the result depends on neither threads, device nor launch shape.

    x: any shape, float; scale: () or (rows,) positive. Returns a contiguous tensor like ``x``.
    Raises TypeError/ValueError naming the argument. Source: docs/mathematics.md, sections 1 and 3.
    """
    check_float_tensor("x", x)
    check_grid(grid)
    scale = check_scale("scale", scale, x, "x")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an int in [0, 2^63), got {seed!r}")
    x = x.contiguous()
    return autograd.fake_quantize(
        x, scale, grid.levels_tensor(x.device), grid.encoding, bool(ste_clip), bool(stochastic), seed
    )


@in_place(3)
def fake_quantize_out_(x: Tensor, scale: Tensor, grid: Any, out: Tensor) -> Tensor:
    """Writes s Q(x / s) into ``out`` (contiguous, x's shape; any of the float storage types) and returns it."""
    check_float_tensor("x", x)
    check_float_tensor("out", out)
    check_grid(grid)
    scale = check_scale("scale", scale, x, "x")
    if out.shape != x.shape or out.device != x.device or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor of shape {tuple(x.shape)} on {x.device}")
    x = x.detach().contiguous()
    autograd.below_autograd("fake_quantize_out_", x, x, scale, grid.levels_tensor(x.device), grid.encoding, out)
    torch.autograd.graph.increment_version(out)
    return out


@in_place()
def ste_clip_(grad: Tensor, x: Tensor, scale: Tensor, grid: Any) -> Tensor:
    """Zeroes ``grad`` in place where x lies outside the hull: ``fake_quantize``'s backward without a new tensor."""
    check_float_tensor("grad", grad)
    check_float_tensor("x", x)
    check_grid(grid)
    scale = check_scale("scale", scale, x, "x")
    if grad.shape != x.shape or grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(
            f"grad: expected {x.dtype} of shape {tuple(x.shape)} on {x.device}, got {grad.dtype} {tuple(grad.shape)} "
            f"on {grad.device}"
        )
    order, written = layout(x, scale.numel()), InPlace()
    work = written.writable(grad, order)
    point = x.detach() if order is None else x.detach().permute(order)
    autograd.below_autograd(
        "ste_clip_", x, work, point.contiguous(), scale, grid.levels_tensor(x.device), grid.encoding
    )
    written.finish()
    torch.autograd.graph.increment_version(grad)
    return grad


@in_place()
def project_interval_(w: Tensor, scale: Tensor, grid: Any, eps: float | Tensor) -> Tensor:
    """Moves every weight, in place, into the hull and then to the nearest point with h >= 0.

    Feasible is what stands within r = Delta (1 - sqrt(1 - sqrt(eps))) / 2 of its nearest level; an exact midpoint
    goes to the lower side. eps = 1 leaves the inside of the hull alone; as eps -> 0 only the levels remain.
    Idempotent. w: any shape, float; scale: () or (rows,); eps in (0, 1], a float or a 0-dim tensor.
    Raises TypeError/ValueError naming the argument. Source: docs/mathematics.md, section 2.
    """
    check_float_tensor("w", w)
    check_grid(grid)
    scale = check_scale("scale", scale, w, "w")
    eps = rate_tensor("eps", eps, 0.0, 1.0, open_low=True)
    written = InPlace()
    work = written.writable(w, layout(w, scale.numel()))
    autograd.below_autograd("project_interval_", w, work, scale, grid.levels_tensor(w.device), grid.encoding, eps)
    written.finish()
    torch.autograd.graph.increment_version(w)
    return w


def row_sums(x: Tensor, rows: int) -> Tensor:
    """(rows, 3) float32: sum |x|, sum x^2, max |x| of each of the ``rows`` equal runs of ``x``; NaN gives NaN.

    What the scale rules need, and bit for bit what the update pass leaves in ``stats`` for the same weights.
    """
    check_float_tensor("x", x)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1 or x.numel() % rows:
        raise ValueError(f"rows: expected a positive divisor of {x.numel()}, got {rows!r}")
    x = x.detach()
    order = layout(x, rows)  # the order in which the update pass sums
    x = (x if order is None else x.permute(order)).contiguous()
    return autograd.below_autograd("row_sums", x, x, rows)
