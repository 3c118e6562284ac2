"""Packed weights: level indices, ``bits`` each, in bytes; this code is the format's specification (docs/packed.md).

A weight of shape (n, …) is a matrix of n rows, one for each output channel, of ``cols`` weights. A weight's code is the
index of its level, 0 for the lowest. Each row is packed on its own and padded with zero bits to whole bytes, so a row,
and with it an output channel, can be found without reading the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import contract, ops, reference
from ..contract import TRIT_TOP, TRITS, UNIFORM, level_table
from ..contract import row_bytes as row_bytes
from ..ops.packed import check_bits, check_codes_of, check_packed
from .grids import Grid

# bits -> (shifts that leave a one where all bits of a code are ones, the places of these ones)
ALL_ONES = {2: ((1,), 0x55), 4: ((1, 2), 0x11), 8: ((1, 2, 4), 0x01)}
SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def storage_type(scale_dtype: str) -> torch.dtype:
    """In which scales of a config's ``scale_dtype`` are packed: those of a byte as bfloat16, which holds them with the
    unit of their tensor."""
    return torch.bfloat16 if scale_dtype.startswith("float8") else getattr(torch, scale_dtype)


def code_bits(grid: Grid, trits: bool = False) -> int:
    """Bits of a code of this grid: 1 … 8, or ``TRITS`` for five ternary codes in a byte (1.6 bits each).

    Raises ValueError for inclusive grids (2^k + 1 levels), more than 16 levels that are not evenly spaced, and
    ``trits`` with others than -1, 0, +1.
    """
    if len(grid.levels) > 2**grid.bits:
        raise ValueError(f"grid: {grid} has {len(grid.levels)} levels and cannot be packed in {grid.bits} bits; "
                         f"train with Uniform(bits={grid.bits}) or narrow=True")  # fmt: skip
    if not grid.evenly_spaced and len(grid.levels) > 16:
        raise ValueError(f"grid: codebooks are packed up to 16 levels, got {len(grid.levels)}")
    if trits and grid.encoding != [UNIFORM, -1, 1]:
        raise ValueError(f"trits: five codes a byte are for Ternary(), got {grid}")
    return TRITS if trits else grid.bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(n, cols) codes as (n, row_bytes(cols, bits)) uint8.

    ``bits`` in 1 … 8: a row is one string of bits, bit b being bit b mod 8 (0 the least significant) of byte b div 8;
    bit i of code j is bit ``bits j + i``. ``bits = TRITS``: byte i is sum over d < 5 of 3^d code[5 i + d].
    The rest of the last byte is 0. Raises ValueError where a code does not fit.
    """
    if not isinstance(codes, Tensor) or codes.dim() != 2 or codes.dtype != torch.uint8:
        got = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else f"{codes!r:.80}"
        raise ValueError(f"codes: expected uint8 of shape (n, cols), got {got}")
    check_bits(bits)
    top = 2 if bits == TRITS else 2**bits - 1
    if codes.numel() and int(codes.max()) > top:
        raise ValueError(f"codes: expected at most {top}, got {int(codes.max())}")
    return contract.pack_codes(codes, bits)


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """(n, cols) uint8 level indices from (n, row_bytes(cols, bits)) uint8: the inverse of ``pack_codes``.

    Raises TypeError/ValueError naming the argument.
    """
    check_codes_of("packed", packed, bits, cols)
    return contract.unpack_codes(packed, bits, cols)


@torch.no_grad()
def pack_weight(w: Tensor, scale: Tensor, grid: Grid, *, trits: bool = False) -> Tensor:
    """(n, row_bytes) uint8 codes of Q(w/s), n = w.shape[0]; ``unpack_weight`` gives s Q(w/s) back, bit for bit.

    w: at least one dimension, float; scale: one for the tensor, each channel or each group. Raises TypeError/ValueError
    naming the argument, also for grids that cannot be packed and for NaN in ``w``.
    """
    ops.check_grid(grid)
    bits = code_bits(grid, trits)
    ops.check_float_tensor("w", w)
    if w.dim() < 1:
        raise ValueError("w: expected at least one dimension")
    if bool(w.isnan().any()):
        raise ValueError(f"w: {int(w.isnan().sum())} of {w.numel()} weights are NaN")
    scale = ops.check_scale("scale", scale, w, "w")
    levels = grid.levels_tensor(w.device)
    level = reference.nearest_levels(w, scale, levels, grid.encoding)
    table = level_table(levels, grid.encoding, w.device).to(level.dtype)
    codes = torch.searchsorted(table, level.contiguous()).to(torch.uint8)
    return pack_codes(codes.reshape(w.shape[0], math.prod(w.shape[1:])), bits)


@torch.no_grad()
def unpack_weight(
    codes: Tensor, scale: Tensor, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype = torch.float32,
    *, trits: bool = False,
) -> Tensor:  # fmt: skip
    """s c in ``dtype``: the product in float32 (float64 for float64), rounded once, as ``ops.fake_quantize`` does.

    shape: the weight's; other arguments and errors as for ``ops.packed_dequantize``.
    """
    ops.check_grid(grid)
    if len(shape) < 1:
        raise ValueError("shape: expected at least one dimension")
    cols, bits = math.prod(shape[1:]), code_bits(grid, trits)
    codes = codes.contiguous() if isinstance(codes, Tensor) else codes
    check_packed(codes, scale, grid, bits, cols, dtype)
    if codes.shape[0] != shape[0]:
        raise ValueError(f"codes: expected {shape[0]} rows for a weight of shape {tuple(shape)}, got {codes.shape[0]}")
    levels = grid.levels_tensor(codes.device)
    return reference.packed_weight(codes, scale, levels, grid.encoding, bits, cols, dtype).reshape(shape)


def check_codes(codes: Tensor, bits: int, cols: int, levels: int) -> None:
    """Raises ValueError where a code has no level (possible only where there are fewer levels than codes)."""
    if bits == TRITS:
        if codes.numel() and int(codes.max()) > TRIT_TOP:
            raise ValueError(f"codes: five ternary codes give bytes up to {TRIT_TOP}, got {int(codes.max())}")
    elif levels < 2**bits and codes.numel():
        if levels == 2**bits - 1 and bits in ALL_ONES:  # ternary, narrow: only the code of all ones has no level
            shifts, places = ALL_ONES[bits]
            for piece in codes.reshape(-1).split(1 << 20):  # which stays in the cache
                for shift in shifts:
                    piece = piece & (piece >> shift)
                if bool((piece & places).any()):
                    raise ValueError(f"codes: expected indices of {levels} levels, got {levels}")
            return
        if 8 % bits == 0:  # a byte is bad whatever its place: 256 cases
            seen = torch.bincount(codes.reshape(-1), minlength=256).nonzero()
            codes, cols = seen.to(torch.uint8).cpu(), 8 // bits
        top = int(contract.unpack_codes(codes, bits, cols).max())
        if top >= levels:
            raise ValueError(f"codes: expected indices of {levels} levels, got {top}")
