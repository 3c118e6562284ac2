"""A mixture of several quantizations of one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import contract
from ..contract import MOST_CANDIDATES
from . import autograd
from .checks import check_float_tensor, check_grid, check_scale


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
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    return autograd.mix_fake_quantize(
        x.contiguous(), scales.to(wanted).contiguous(), strengths.to(wanted).contiguous(), encodings, bool(ste_clip),
        bool(learned),
    )  # fmt: skip


def candidate_encodings(grids: Sequence[Any]) -> list[int]:
    """Three integers a candidate; None is no quantization."""
    if not 1 <= len(grids) <= MOST_CANDIDATES:
        raise ValueError(f"grids: expected 1 to {MOST_CANDIDATES} candidates, got {len(grids)}")
    encodings: list[int] = []
    for grid in grids:
        if grid is None:
            encodings += [contract.FLOAT, 0, 0]
            continue
        check_grid(grid)
        if grid.encoding[0] == contract.CODEBOOK:
            raise ValueError(f"grids: expected Uniform, Ternary, Binary or None, got {grid}")
        encodings += grid.encoding
    return encodings
