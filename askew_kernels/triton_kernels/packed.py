"""Packed weights in Triton: decoding, and products from the codes (docs/packed.md has the bytes).

Up to ``contract.FEW_ROWS`` inputs a program takes some rows of the weight and reads their codes once, in words where
groups end with words, for all inputs. More inputs go through the matrix units in tiles whose levels are made on the
way: integer levels are exact in every storage type, so the products are, and a group's scale multiplies its sum. Where
tiles do not fill the GPU they share the columns, and the parts are added in a fixed order. Sums are float32 and not
rounded in between.
How many steps a program takes is a compile-time constant (a model has few widths), so that loops can be pipelined.
Rows, words, columns and warps of a program are launch parameters (``tuning``), in whose order sums are taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import contract, tuning
from ..contract import FEW_ROWS, TRIT_POWERS
from . import launch
from .launch import load_wide, store_narrow
from .math import BINARY, CODEBOOK, INTERPRETED, widen

__all__ = ["packed_dequantize_", "packed_linear"]

TRITS = tl.constexpr(contract.TRITS)
POWERS = tl.constexpr(TRIT_POWERS)
TRITS_A_BYTE = tl.constexpr(len(TRIT_POWERS))
LOWEST = tl.constexpr(8388608.0)  # 2^23: from here on the bits of a float's mantissa count ones
LOWEST_BITS = tl.constexpr(0x4B000000)


# ---- codes and levels -----------------------------------------------------------------------------------------------


@triton.jit
def code_at(row_ptr, k, valid, row_bytes, BITS: tl.constexpr):
    """Code k of the row at ``row_ptr``; 0 where not ``valid``."""
    if BITS == TRITS:
        byte = tl.load(row_ptr + k // TRITS_A_BYTE, mask=valid, other=0).to(tl.int32)
        digit = k % TRITS_A_BYTE
        power = tl.full(digit.shape, 1, tl.int32)
        for d in tl.static_range(1, TRITS_A_BYTE):
            power = tl.where(digit == d, POWERS[d], power)
        return byte // power % 3
    elif 8 % BITS == 0:
        byte = tl.load(row_ptr + k // (8 // BITS), mask=valid, other=0).to(tl.int32)
        return (byte >> (k % (8 // BITS) * BITS)) & ((1 << BITS) - 1)
    else:  # a code may cross into the next byte
        at = k * BITS // 8
        low = tl.load(row_ptr + at, mask=valid, other=0).to(tl.int32)
        high = tl.load(row_ptr + at + 1, mask=valid & (at + 1 < row_bytes), other=0).to(tl.int32)
        return ((low | (high << 8)) >> (k * BITS % 8)) & ((1 << BITS) - 1)


@triton.jit
def level_of(code, lo, top, levels, KIND: tl.constexpr):
    """The level of each code, float32; a code above the highest counts as the highest."""
    code = tl.minimum(code, top)
    if KIND == CODEBOOK:
        return tl.load(levels + code)
    elif KIND == BINARY:
        return code.to(tl.float32) * 2.0 + lo
    else:
        return code.to(tl.float32) + lo


@triton.jit
def word_levels(
    word, lo, top, levels, J: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """2^((BITS J) mod 16) times the level of code J of each word.

    For integers: mask, put the bits into the mantissa of 2^23, subtract; exact, and without a conversion, of which a
    multiprocessor makes only 16 a cycle.
    """
    if KIND == CODEBOOK:
        return tl.load(levels + tl.minimum((word >> (BITS * J)) & ((1 << BITS) - 1), top))
    else:
        AT: tl.constexpr = (BITS * J) % 16
        half = word if BITS * J < 16 else word >> 16
        if KIND == BINARY:  # 2 c - 1
            half = half << 1 if BITS * J < 16 else word >> 15
            bits = half & (2 << AT)
        else:
            bits = half & (((1 << BITS) - 1) << AT)
        level = (bits | LOWEST_BITS).to(tl.float32, bitcast=True) - (LOWEST - lo * (1 << AT))
        if CLAMP:
            level = tl.minimum(level, (top + lo) * (1 << AT))
        return level


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, out_ptr, levels, lo, top, cols, row_bytes, groups, length, KIND: tl.constexpr,
    BITS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out = s c, one piece of a row a program."""
    pieces = tl.cdiv(cols, C)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    k = tl.program_id(0) % pieces * C + tl.arange(0, C)
    valid = k < cols
    level = level_of(code_at(codes_ptr + row * row_bytes, k, valid, row_bytes, BITS), lo, top, levels, KIND)
    scale = tl.load(scale_ptr + row * groups + k // length, mask=valid, other=1.0)
    store_narrow(out_ptr + row * cols + k, scale * level, valid)


@triton.jit
def few_kernel(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, levels, lo, top, tokens, n, cols, row_bytes, groups, length,
    KIND: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr, CLAMP: tl.constexpr, GROUPED: tl.constexpr,
    BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """y = x W^T + b for M inputs and N rows. WORD: bits of the words that are read, 0 for one code at a time."""
    row = tl.program_id(0) * N + tl.arange(0, N)
    there = tl.minimum(row, n - 1).to(tl.int64)  # rows past the end: the last one again
    token = tl.program_id(1) * M + tl.arange(0, M)
    of_token = (token.to(tl.int64) * cols)[:, None]
    live = (token < tokens)[:, None]
    total = tl.zeros([M, N, W], tl.float32)
    if WORD > 0:
        PER: tl.constexpr = WORD // BITS
        words = tl.cdiv(row_bytes * 8, WORD)
        for step in range(STEPS):
            at = step * W + tl.arange(0, W)
            word = tl.load(codes_ptr + there[:, None] * words + at[None, :], mask=(at < words)[None, :], other=0)
            word = word.to(tl.int32)
            part = tl.zeros([M, N, W], tl.float32)
            for j in tl.static_range(PER):
                k = at * PER + j
                x = load_wide(x_ptr + of_token + k[None, :], live & (k < cols)[None, :])
                if KIND != CODEBOOK:
                    x = x * (1.0 / (1 << ((BITS * j) % 16)))
                part += x[:, None, :] * word_levels(word, lo, top, levels, j, BITS, KIND, CLAMP)[None, :, :]
            if GROUPED:
                k = at * PER
                scale = tl.load(scale_ptr + there[:, None] * groups + (k // length)[None, :],
                                mask=(k < cols)[None, :], other=0.0)  # fmt: skip
                total += part * scale[None, :, :]
            else:
                total += part
    else:
        for step in range(STEPS):
            k = step * W + tl.arange(0, W)
            valid = (k < cols)[None, :]
            x = load_wide(x_ptr + of_token + k[None, :], live & valid)
            code = code_at(codes_ptr + there[:, None] * row_bytes, k[None, :], valid, row_bytes, BITS)
            level = level_of(code, lo, top, levels, KIND)
            if GROUPED:
                level *= tl.load(scale_ptr + there[:, None] * groups + (k // length)[None, :], mask=valid, other=0.0)
            total += x[:, None, :] * level[None, :, :]
    y = tl.sum(total, 2)
    if not GROUPED:
        y = y * tl.load(scale_ptr + there * groups)[None, :]
    if BIAS:
        y = y + widen(tl.load(bias_ptr + there))[None, :]
    store_narrow(y_ptr + (token.to(tl.int64) * n)[:, None] + row[None, :], y, live & (row < n)[None, :])


@triton.jit
def many_kernel(
    x_ptr, codes_ptr, scale_ptr, bias_ptr, y_ptr, levels, lo, top, tokens, n, cols, row_bytes, groups, length,
    KIND: tl.constexpr, BITS: tl.constexpr, EXACT_LEVELS: tl.constexpr, GROUPED: tl.constexpr, BIAS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A tile of y = x W^T + b over one share of the columns; y is (shares, tokens, n)."""
    row = tl.program_id(0) * N + tl.arange(0, N)
    there = tl.minimum(row, n - 1).to(tl.int64)
    token = tl.program_id(1) * M + tl.arange(0, M)
    live = (token < tokens)[:, None]
    of_token = (token.to(tl.int64) * cols)[:, None]
    start = tl.program_id(2) * (STEPS * K)
    total = tl.zeros([M, N], tl.float32)
    for step in range(STEPS):
        first = start + step * K
        k = first + tl.arange(0, K)
        x = tl.load(x_ptr + of_token + k[None, :], mask=live & (k < cols)[None, :], other=0.0)
        valid = (k < cols)[:, None]
        code = code_at(codes_ptr + there[None, :] * row_bytes, k[:, None], valid, row_bytes, BITS)
        level = level_of(code, lo, top, levels, KIND)
        if EXACT_LEVELS:
            if INTERPRETED:  # which multiplies the bits of bfloat16
                part = tl.dot(widen(x), level, input_precision="ieee")
            else:
                part = tl.dot(x, level.to(x.dtype), input_precision="ieee")
            if GROUPED:  # K divides the group
                part = part * tl.load(scale_ptr + there * groups + first // length)[None, :]
            total += part
        else:
            if GROUPED:
                level *= tl.load(scale_ptr + there[None, :] * groups + (k // length)[:, None], mask=valid, other=0.0)
            total += tl.dot(widen(x), level, input_precision="ieee")
    if not GROUPED:
        total = total * tl.load(scale_ptr + there * groups)[None, :]
    if BIAS:
        total = total + widen(tl.load(bias_ptr + there))[None, :]
    to = y_ptr + ((tl.program_id(2).to(tl.int64) * tokens + token) * n)[:, None] + row[None, :]
    store_narrow(to, total, live & (row < n)[None, :])


# ---- operators ------------------------------------------------------------------------------------------------------


def _weight(codes, scale, levels, grid, bits, cols) -> tuple[int, int, int, dict]:
    """(n, groups, length of a group, arguments that all kernels share) after checking that everything fits."""
    launch.check_dense(codes, "codes")
    if codes.dtype != torch.uint8 or codes.dim() != 2 or not 0 <= bits <= 8:
        raise TypeError(f"codes: expected uint8 of shape (n, row_bytes) and 0 to 8 bits, got {codes.dtype}, {bits}")
    launch.check_float32(scale, codes, "scale")
    n, rows, expected = codes.shape[0], scale.numel(), contract.row_bytes(cols, bits)
    if codes.shape[1] != expected:
        raise ValueError(f"codes: expected {expected} bytes a row, got {codes.shape[1]}")
    groups = 0 if rows == 1 else rows // max(n, 1)
    if rows != max(groups * n, rows == 1) or (groups > 1 and cols % groups):
        raise ValueError(f"scale: {rows} scales do not fit {n} rows of {cols}")
    kind, n_levels = launch.check_grid(grid, levels, codes)
    top = n_levels - 1 if n_levels else (grid[2] - grid[1]) // contract.level_step(kind)
    arguments = {"levels": levels if n_levels else scale, "lo": float(grid[1]), "top": top, "cols": cols,
                 "row_bytes": codes.shape[1], "KIND": kind, "BITS": bits}  # fmt: skip
    return n, groups, cols // max(groups, 1), arguments


def packed_dequantize_(codes, scale, levels, grid, bits, out):
    """out = s c, in the storage type of ``out`` (n, cols)."""
    launch.check_storage(out, "out")
    n, groups, length, arguments = _weight(codes, scale, levels, grid, bits, out.shape[1])
    if out.numel() == 0:
        return
    width = min(triton.next_power_of_2(out.shape[1]), 1024)
    with launch.on_device(out):
        dequantize_kernel[(n * triton.cdiv(out.shape[1], width),)](
            codes, scale, out, groups=groups, length=length, C=width, num_warps=4, **arguments
        )


def _word_bits(codes: Tensor, bits: int, cols: int, groups: int, length: int) -> int:
    """Bits of the largest words that rows and groups consist of; 0 where a code has no place of its own in a byte."""
    if bits == contract.TRITS or 8 % bits:
        return 0
    for word in (32, 8):
        fits = groups <= 1 or length % (word // bits) == 0
        if fits and codes.shape[1] % (word // 8) == 0 and codes.data_ptr() % (word // 8) == 0:
            return word
    return 0


def packed_linear(x, codes, scale, levels, grid, bits, bias):
    """y = x W^T + b with W = s c, sums in float32, rounded once to the type of x; see ``ops.packed_linear``."""
    launch.check_storage(x, "x")
    tokens, cols = x.shape
    n, groups, length, arguments = _weight(codes, scale, levels, grid, bits, cols)
    if bias is not None and (bias.numel() != n or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise ValueError(f"bias: expected {n} elements of {x.dtype}")
    if cols == 0 and bias is not None:
        return bias.expand(tokens, n).contiguous()
    y = x.new_zeros(tokens, n) if cols == 0 else x.new_empty(tokens, n)
    if y.numel() == 0 or cols == 0:
        return y
    arguments |= {"tokens": tokens, "n": n, "groups": groups, "length": length, "bias_ptr": x if bias is None else bias,
                  "BIAS": bias is not None, "GROUPED": groups > 1}  # fmt: skip
    tuned = tuning.on_gpu("triton_packed", x.device.index)
    if tokens <= FEW_ROWS:
        rows, words = tuned["few_rows"], tuned["few_words"]
        word = _word_bits(codes, bits, cols, groups, length)
        with launch.on_device(x):
            few_kernel[(triton.cdiv(n, rows), 1)](
                x, codes.view(torch.int32) if word == 32 else codes, scale, y_ptr=y, WORD=word,
                CLAMP=arguments["top"] < 2**bits - 1, M=triton.next_power_of_2(tokens), N=rows, W=words,
                STEPS=triton.cdiv(codes.shape[1] * 8 // word if word else cols, words), num_warps=tuned["few_warps"],
                **arguments,
            )  # fmt: skip
        return y
    exact = arguments["KIND"] != contract.CODEBOOK and (groups <= 1 or length % 16 == 0)
    rows, step = tuned["tile_rows"], tuned["tile_columns"]
    while exact and groups > 1 and length % step:
        step //= 2
    tile = min(max(triton.next_power_of_2(tokens), 16), 64)
    tiles = triton.cdiv(n, rows) * triton.cdiv(tokens, tile)
    shares = max(1, min(2 * launch.multiprocessors(x.device.index) // tiles, cols // (4 * step)))
    steps = triton.cdiv(triton.cdiv(cols, shares), step)
    shares = triton.cdiv(cols, steps * step)
    parts = y[None] if shares == 1 else x.new_empty((shares, tokens, n), dtype=torch.float32)
    if shares > 1:  # the bias belongs to the sum of all
        arguments |= {"BIAS": False}
    with launch.on_device(x):
        many_kernel[(triton.cdiv(n, rows), triton.cdiv(tokens, tile), shares)](
            x, codes, scale, y_ptr=parts, EXACT_LEVELS=exact, M=tile, N=rows, K=step, STEPS=steps,
            num_warps=tuned["tile_warps"], **arguments,
        )  # fmt: skip
    if shares == 1:
        return y
    total = parts.sum(0)
    return (total if bias is None else total + bias.float()).to(x.dtype)
