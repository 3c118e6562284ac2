"""Products of levels: inputs as levels of a byte, token by token, and what becomes of the sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import contract
from .autograd import below_autograd, one_by_one
from .checks import check_float_tensor, check_grid, check_like, check_tensor
from .schema import define

__all__ = ["run_scaled_sums", "run_token_levels", "scaled_sums", "token_levels"]

define("token_levels", "(Tensor x, Tensor levels, int[] grid, float top, ScalarType dtype) -> (Tensor, Tensor)",
       batch=one_by_one, fake=lambda x, levels, grid, top, dtype: (
           x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0],), dtype=contract.compute_dtype(x.dtype))),
       )  # fmt: skip
define("scaled_sums", "(Tensor sums, Tensor token_scale, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
       batch=one_by_one, fake=lambda sums, token_scale, scale, bias, dtype: sums.new_empty(sums.shape, dtype=dtype),
       )  # fmt: skip


def token_levels(x: Tensor, dtype: torch.dtype, grid: Any = None) -> tuple[Tensor, Tensor]:
    """(q, s): each row of ``x`` as s q, q levels of a byte: s = max |x| / top, q = Q(x / s).

    ``dtype``: torch.int8 or torch.float8_e4m3fn. ``grid``: whose levels q are, top its ``c_max``; None: all numbers
    that ``dtype`` holds, top 127 or 448, rounded to even. s = 1 for a row of zeros; s is NaN for a row that holds inf
    or NaN (its q is NaN too, 0 in int8).

    x: (rows, cols), float. Returns q (rows, cols) and s (rows,) float32. No derivative. Raises TypeError/ValueError
    naming the argument, also where ``dtype`` does not hold the levels. Source: docs/mathematics.md, section 8.
    """
    check_float_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (rows, cols), got {tuple(x.shape)}")
    if dtype not in contract.LEVEL_TYPES:
        raise TypeError(f"dtype: expected torch.int8 or torch.float8_e4m3fn, got {dtype}")
    if grid is not None:
        check_grid(grid)
        if not contract.holds_levels(dtype, grid.levels):
            raise ValueError(f"grid: expected levels that {dtype} holds exactly, got {grid}")
    return run_token_levels(x.contiguous(), dtype, grid)


def run_token_levels(x: Tensor, dtype: torch.dtype, grid: Any) -> tuple[Tensor, Tensor]:
    """The operator without the checks; x is contiguous."""
    if grid is not None:
        arguments = grid.levels_tensor(x.device), grid.encoding, grid.c_max
    else:
        top = contract.LEVEL_TYPES[dtype]
        kind = contract.UNIFORM if dtype == torch.int8 else contract.FLOAT
        arguments = x.new_empty(0, dtype=torch.float32), [kind, -int(top), int(top)], top
    return below_autograd("token_levels", x, x, *arguments, dtype)


def scaled_sums(sums: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y = (sums s_x) s_w + b in float32, rounded once to ``dtype``: what sums of products of levels stand for.

    sums: (rows, n) int32 or float32, or levels themselves, int8 or float8_e4m3fn; token_scale: (rows,); scale: (1,) or
    (n,), float32 both; bias: (n,) or None.
    No derivative. Raises TypeError/ValueError naming the argument. Source: docs/mathematics.md, section 8.
    """
    check_tensor("sums", sums)
    if sums.dim() != 2 or sums.dtype not in (torch.int32, torch.float32, torch.float64, *contract.LEVEL_TYPES):
        raise ValueError(f"sums: expected int32, float32, int8 or float8_e4m3fn of shape (rows, n), got {sums.dtype} "
                         f"{tuple(sums.shape)}")  # fmt: skip
    rows, n = sums.shape
    check_like("token_scale", token_scale, None, (rows,), sums.device)
    check_like("scale", scale, None, (n if scale.numel() != 1 else 1,), sums.device)
    if bias is not None:
        check_like("bias", bias, None, (n,), sums.device)
    return run_scaled_sums(sums.contiguous(), token_scale, scale, bias, dtype)


def run_scaled_sums(sums: Tensor, *arguments: Any) -> Tensor:
    """The operator without the checks."""
    return below_autograd("scaled_sums", arguments[0], sums, *arguments)  # float64 shows in the scales
