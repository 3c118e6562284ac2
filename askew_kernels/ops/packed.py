"""Products with packed weights, and their decoding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import contract, runtime
from . import autograd
from .checks import check_float_tensor, check_grid


def _check_codes(codes: Any, scale: Any, grid: Any, bits: int, cols: int) -> Tensor:
    """``scale`` as float32 (rows,), after checking that codes and scale describe a (n, cols) weight."""
    check_grid(grid)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or codes.dim() != 2 or not codes.is_contiguous():
        raise ValueError("codes: expected a contiguous uint8 tensor of shape (n, row_bytes)")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= 8:
        raise ValueError(f"bits: expected 1 to 8, or 0 for five trits a byte, got {bits!r}")
    if codes.shape[1] != contract.row_bytes(cols, bits):
        raise ValueError(
            f"codes: expected {contract.row_bytes(cols, bits)} bytes a row for {cols} weights of "
            f"{bits or 'five to a byte'}{' bits' if bits else ''}, got {codes.shape[1]}"
        )
    if not isinstance(scale, Tensor) or not scale.is_floating_point() or scale.device != codes.device:
        raise ValueError(f"scale: expected a float tensor on {codes.device}")
    rows, n = scale.numel(), codes.shape[0]
    if not (rows == 1 or (rows and n and rows % n == 0 and cols % (rows // n) == 0) or rows == n):
        raise ValueError(f"scale: expected 1, {n} or {n} * groups scales for ({n}, {cols}) weights, got {rows}")
    return scale.float().reshape(-1).contiguous()


def check_activations(activations: Any, grid: Any) -> None:
    """ValueError unless "float" or "int8", which needs integer levels at equal distances."""
    if activations not in ("float", "int8"):
        raise ValueError(f'activations: expected "float" or "int8", got {activations!r}')
    if activations == "int8" and grid.encoding[0] == contract.CODEBOOK:
        raise ValueError(f'activations: "int8" needs a grid of integer levels at equal distances, got {grid}')


def packed_dequantize(
    codes: Tensor, scale: Tensor, grid: Any, bits: int, cols: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The (n, cols) weight s c of packed codes, in ``dtype``: one float32 product, rounded once; differentiable in s.

    codes: (n, row_bytes) uint8, as ``quant.pack_codes`` writes them; scale: 1, n or n * groups. A code above the
    highest level counts as the highest. Raises ValueError naming the argument. Source: docs/packed.md.
    """
    scale = _check_codes(codes, scale, grid, bits, cols)
    return autograd.packed_weight(codes, scale, grid.levels_tensor(codes.device), grid.encoding, bits, cols, dtype)


def packed_linear(
    x: Tensor, codes: Tensor, scale: Tensor, grid: Any, bits: int, bias: Tensor | None = None,
    activations: str = "float",
) -> Tensor:  # fmt: skip
    """y = x W^T + b from packed codes, W = s c not unpacked as a whole but for a gradient of x or scale.

    Sums in float32 of unrounded float32 products, then rounded once to the type of x: |y - exact| is at most
    cols 2^-24 sum |x| |w|, for bfloat16 and float16 plus half a unit in the last place of y.
    ``activations="int8"``: each row of x is rounded to s_x q, s_x = max |x| / 127, q an integer; the sums of q c are
    exact. That moves y by at most s_x / 2 sum |w|, usually by about 1 % of the root mean square of y (docs/packed.md).
    A row of x that holds inf or NaN gives NaN. Its gradient is that of the float product, straight through.
    Differentiable in x, scale and bias, and under torch.func (int8 in reverse mode only).

    x: (…, cols) float32, bfloat16 or float16; codes: (n, row_bytes) uint8; scale: 1, n or n * groups; bias: (n,).
    Returns (…, n) in the type of x. Raises TypeError/ValueError naming the argument, for int8 also where the grid's
    levels are not integers. Source: docs/packed.md.
    """
    check_float_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x: expected shape (…, cols), got a scalar")
    cols = x.shape[-1]
    scale = _check_codes(codes, scale, grid, bits, cols)
    if x.device != codes.device:
        raise ValueError(f"x: expected on the device of codes ({codes.device}), got {x.device}")
    n = codes.shape[0]
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias: expected {x.dtype} of shape ({n},) on {x.device}, got {bias.dtype} "
                         f"{tuple(bias.shape)} on {bias.device}")  # fmt: skip
    check_activations(activations, grid)
    if activations == "int8" and cols * 127 * (len(grid.levels) - 1) >= 2**31:
        raise ValueError(f"activations: sums of {cols} products of int8 and {bits}-bit codes may overflow; use float")
    flat = x.reshape(math.prod(x.shape[:-1]), cols).contiguous()
    name = "packed_linear_int8" if activations == "int8" else "packed_linear"
    y = autograd.packed_product(
        name, runtime.operator(name, flat), flat, codes, scale, grid.levels_tensor(codes.device), grid.encoding, bits,
        None if bias is None else bias.contiguous(),
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], n)
