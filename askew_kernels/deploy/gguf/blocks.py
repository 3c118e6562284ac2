"""GGUF's block types that hold levels of ours: ``TYPES``, one entry each, from codes and scales to bytes and back.

A row of a matrix is cut into blocks of consecutive weights; weight = d * unit * value[code], d the number of the block,
or of the group within it.
Layouts and values are those that llama.cpp publishes (ggml-common.h, ggml-quants.c; package ``gguf``, quants.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...contract import TRIT_TOP, unpack_codes
from ...quant import FP4, Binary, Grid, Ternary, Uniform, code_bits, pack_codes
from ...quant.exports import IQ4_NL
from ...quant.scales import holds_scales
from ..integers import table

Array = Any  # numpy's
PIECE = 1 << 22  # weights that are worked on at a time
NONE = -1  # no code


# ---- layouts: (blocks, block) codes to (blocks, bytes) and back ------------------------------------------------------


def _nibbles(codes: Array) -> Array:
    """Byte j: code j, and code j + block/2 in the high half."""
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4


def _from_nibbles(data: Array) -> Array:
    return np.concatenate([data & 15, data >> 4], axis=1)


def _five(codes: Array) -> Array:
    """The fifth bits of 32 codes as 4 bytes, then the others as nibbles."""
    return np.concatenate([np.packbits(codes >> 4, axis=1, bitorder="little"), _nibbles(codes & 15)], axis=1)


def _from_five(data: Array) -> Array:
    return _from_nibbles(data[:, 4:]) | np.unpackbits(data[:, :4], axis=1, bitorder="little") << 4


def _bits(codes: Array) -> Array:
    return np.packbits(codes, axis=1, bitorder="little")


def _from_bits(data: Array) -> Array:
    return np.unpackbits(data, axis=1, bitorder="little")


def _pairs(codes: Array) -> Array:
    """Byte j: codes 4j … 4j + 3, two bits each."""
    four = codes.reshape(len(codes), -1, 4)
    return four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6


def _from_pairs(data: Array) -> Array:
    return np.stack([data >> s & 3 for s in (0, 2, 4, 6)], axis=-1).reshape(len(data), -1)


def _planes(codes: Array) -> Array:
    """Byte j of each 32: codes j, j + 32, j + 64, j + 96 of each 128, two bits each."""
    four = codes.reshape(len(codes), -1, 4, 32)
    return (four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6).reshape(len(codes), -1)


def _from_planes(data: Array) -> Array:
    part = data.reshape(len(data), -1, 1, 32)
    return np.concatenate([part >> s & 3 for s in (0, 2, 4, 6)], axis=2).reshape(len(data), -1)


def _six(codes: Array) -> Array:
    """Of each 128 codes the low four bits as nibbles, then, after those of both halves, the high two as planes."""
    low = _nibbles((codes & 15).reshape(-1, 128)).reshape(len(codes), -1)
    return np.concatenate([low, _planes(codes >> 4)], axis=1)


def _from_six(data: Array) -> Array:
    low = _from_nibbles(data[:, :128].reshape(-1, 64)).reshape(len(data), -1)
    return low | _from_planes(data[:, 128:]) << 4


# (codes in a part, digits in a byte): the first code of a byte is its highest digit, of 3^5 in all
TRIT_PARTS = ((160, 5), (80, 5), (16, 4))


def _trits(codes: Array) -> Array:
    """Five codes a byte (four in the last 4 bytes): q = sum 3^(4 - k) code_k as ceil(256 q / 243), so that the digits
    come out of multiplications."""
    bytes_, start = [], 0
    for length, digits in TRIT_PARTS:
        part = codes[:, start : start + length].reshape(len(codes), digits, -1).astype(np.uint16)
        q = sum(part[:, k] * 3 ** (4 - k) for k in range(digits))
        bytes_.append(((q * 256 + TRIT_TOP) // (TRIT_TOP + 1)).astype(np.uint8))
        start += length
    return np.concatenate(bytes_, axis=1)


def _from_trits(data: Array) -> Array:
    codes, start = [], 0
    for length, digits in TRIT_PARTS:
        part = data[:, start : start + length // digits]
        # the product wraps around: what is left of the digits before is what uint8 drops
        planes = [((part * np.uint8(3**k)).astype(np.uint16) * 3 >> 8).astype(np.uint8) for k in range(digits)]
        codes.append(np.concatenate(planes, axis=1))
        start += length // digits
    return np.concatenate(codes, axis=1)


def _same(codes: Array) -> Array:
    return codes


# ---- the numbers d ---------------------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """How the numbers d of a block are kept: their bytes, from (blocks, groups) float32 (ValueError where they do not
    hold them), and back, NaN where one is no number."""

    size: int
    to_bytes: Callable[[Tensor], Array]
    from_bytes: Callable[[Array], Tensor]
    name: str  # of QuantConfig.scale_dtype
    dtype: torch.dtype  # in which a layer keeps them


def _half(d: Tensor) -> Array:
    if not holds_scales(d.abs(), "float16"):
        bad = d[d.half().float() != d]
        raise ValueError(f"float16 does not hold the scale {float((bad if len(bad) else d).abs().max()):.9g}")
    return d.half().numpy().view(np.uint8)


def _from_half(data: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float16)).float()


def _exponent(d: Tensor) -> Array:
    """2^(e - 127) as e."""
    mantissa, exponent = np.frexp(d.double().numpy())
    e = exponent + 126
    if len(bad := d[torch.from_numpy((mantissa != 0.5) | (e < 0) | (e > 254))]):
        raise ValueError(f"its scales are powers of two, got {float(bad[0]):.9g}")
    return e.astype(np.uint8)


def _from_exponent(data: Array) -> Tensor:
    e = torch.from_numpy(data.astype(np.float64))
    return torch.where(e == 255, torch.nan, torch.exp2(e - 127)).float()


def _multiples(d: Tensor) -> Array:
    """16 numbers as int8 multiples of one float16, which stands last."""
    out = np.empty((len(d), 18), np.uint8)
    for first in range(0, len(d), 1024):
        out[first : first + 1024] = _multiples_of(d[first : first + 1024].double())
    return out


def _multiples_of(d: Tensor) -> Array:
    out = np.zeros((len(d), 18), np.uint8)
    left = torch.arange(len(d))
    for k in (sign * k for k in range(1, 129) for sign in (1, -1)):  # how many times the number the largest is
        base = d[left].abs().amax(1, keepdim=True) / k
        times = d[left] / base
        found = ((base.half() == base) & (times == times.round()) & (times >= -128) & (times <= 127)).all(1)
        out[left[found], :16] = times[found].numpy().astype(np.int8).view(np.uint8)
        out[left[found], 16:] = base[found].half().numpy().view(np.uint8)
        if not len(left := left[~found]):
            return out
    raise ValueError("the scales of 256 weights are no int8 multiples of one float16")


def _from_multiples(data: Array) -> Tensor:
    times = np.ascontiguousarray(data[:, :16]).view(np.int8)
    return torch.from_numpy(times.astype(np.float32)) * _from_half(data[:, 16:])


HALF = Scales(2, _half, _from_half, "float16", torch.float16)
EXPONENT = Scales(1, _exponent, _from_exponent, "float8_e8m0fnu", torch.bfloat16)
MULTIPLES = Scales(18, _multiples, _from_multiples, "float32", torch.float32)


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockType:
    name: str  # as gguf.GGMLQuantizationType has it
    number: int
    block: int  # weights that stand together in the file
    values: tuple[int, ...]  # by code; of two that are equal the first is written
    grids: tuple[Grid, ...]  # what a tensor is read as: the first that has all its levels
    pack: Callable[[Array], Array]
    unpack: Callable[[Array], Array]
    data: int  # bytes of a block's codes
    scales: Scales = HALF
    scale_first: bool = True
    trits: bool = False  # for layers packed five to a byte, and read as such
    unit: float = 1.0
    wider: int = 0  # bits of grids beyond the values whose every group may fit with d of one sign or the other
    groups: int = 1  # of a block, each with its d

    @property
    def group(self) -> int:
        """Weights with one d."""
        return self.block // self.groups

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return self.data + self.scales.size

    def split(self, data: Array) -> tuple[Array, Array]:
        """(bytes of codes, bytes of d) of (blocks, size) bytes."""
        at = self.scales.size if self.scale_first else self.data
        first, second = data[:, :at], data[:, at:]
        return (second, first) if self.scale_first else (first, second)

    def codes_of(self, values: tuple[int, ...], sign: int = 1) -> Array:
        """The code of sign * value for each value, ``NONE`` where there is none."""
        found = [sign * v for v in values]
        return np.array([self.values.index(v) if v in self.values else NONE for v in found], np.int16)


_INT8 = (*range(128), *range(-128, 0))  # by byte
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # doubled
TYPES = (  # the first that holds a layer is taken: the fewest bytes, and what its name promises before what also fits
    BlockType("Q1_0", 41, 128, (-1, 1), (Binary(), Ternary()), _bits, _from_bits, 16),
    BlockType("TQ1_0", 34, 256, (-1, 0, 1), (Ternary(),), _trits, _from_trits, 52, scale_first=False, trits=True),
    BlockType("TQ2_0", 35, 256, (-1, 0, 1, 2), (Ternary(), Uniform(3)), _planes, _from_planes, 64, scale_first=False),
    BlockType("Q2_0", 42, 64, (-1, 0, 1, 2), (Ternary(), Uniform(3)), _pairs, _from_pairs, 16),
    BlockType("Q4_0", 2, 32, tuple(range(-8, 8)), (Uniform(4), Uniform(5)), _nibbles, _from_nibbles, 16, wider=5),
    BlockType("IQ4_NL", 20, 32, tuple(map(int, IQ4_NL.levels)), (IQ4_NL, Uniform(8)), _nibbles, _from_nibbles, 16),
    BlockType("MXFP4", 39, 32, (*_E2M1, *(-v for v in _E2M1)), (FP4(),), _nibbles, _from_nibbles, 16, EXPONENT,
              unit=0.5),
    BlockType("Q5_0", 6, 32, tuple(range(-16, 16)), (Uniform(5), Uniform(6)), _five, _from_five, 20, wider=6),
    BlockType("Q6_K", 14, 256, tuple(range(-32, 32)), (Uniform(6), Uniform(7)), _six, _from_six, 192, MULTIPLES,
              scale_first=False, wider=7, groups=16),
    BlockType("Q8_0", 8, 32, _INT8, (Uniform(8),), _same, _same, 32),
)  # fmt: skip
BY_NUMBER = {t.number: t for t in TYPES}


# ---- writing ---------------------------------------------------------------------------------------------------------


def encoded(layer: Any, known: Callable[[BlockType], bool]) -> tuple[BlockType, Array]:
    """(type, (n, row bytes) uint8): the first of ``TYPES``, of those ``known`` to readers, that holds a packed layer
    bit for bit. Raises ValueError with what speaks against each."""
    values, factor = table(layer, "GGUF's types")
    scale = layer.weight_scale.detach().float() * factor
    reasons = []
    for t in TYPES:
        codes = t.codes_of(values)
        fits = NONE not in codes or (layer.bits and layer.bits <= t.wider)
        if fits and known(t) and (layer.trits or not t.trits):
            try:
                return t, _encode(t, layer, values, scale)
            except ValueError as error:
                reasons.append(f"{t.name}: {error}")
    if not reasons:
        raise ValueError(f"no type of GGUF's has the levels of {layer.config.weight}")
    raise ValueError("no type of GGUF's holds it: " + "; ".join(reasons))


def _encode(t: BlockType, layer: Any, values: tuple[int, ...], scale: Tensor) -> Array:
    n, cols = len(layer.weight_codes), layer.cols
    for what, size, whole in (("rows", cols, t.block), ("groups", layer.config.group_size or cols, t.group)):
        if size % whole:
            raise ValueError(f"{what} of {size} weights are no multiple of its {whole}")
    blocks, groups = cols // t.block, cols // t.group  # of a row
    d = (scale / t.unit).repeat_interleave(n * groups // max(len(scale), 1))
    out = np.empty((n * blocks, t.size), np.uint8)
    data, scales = t.split(out)
    plus, minus = t.codes_of(values), t.codes_of(values, -1)
    if exact := NONE not in plus:
        plus = plus.astype(np.uint8)
        scales[:] = t.scales.to_bytes(d.reshape(-1, t.groups))
    step = max(1, PIECE // max(cols, 1))
    for first in range(0, n, step):
        rows = slice(first * blocks, (first + step) * blocks)
        index = unpack_codes(layer.weight_codes[first : first + step], layer.bits, cols).numpy().reshape(-1, t.group)
        codes = plus[index]
        if not exact:
            turned = np.flatnonzero((codes == NONE).any(axis=1))
            codes[turned] = minus[index[turned]]
            if (codes == NONE).any():
                raise ValueError(f"levels beyond its {min(t.values)} to {max(t.values)}, be d positive or negative")
            d[torch.from_numpy(turned) + first * groups] *= -1
        data[rows] = t.pack(codes.astype(np.uint8, copy=False).reshape(-1, t.block))
    if not exact:
        scales[:] = t.scales.to_bytes(d.reshape(-1, t.groups))
    return out.reshape(n, blocks * t.size)


# ---- reading ---------------------------------------------------------------------------------------------------------


class Decoded(NamedTuple):
    grid: Grid
    codes: Tensor  # packed as a layer keeps them
    scale: Tensor  # (groups of all rows,)


def decoded(t: BlockType, data: Array) -> Decoded:
    """Of (n, row bytes) uint8. d < 0 turns the levels around, as scales are positive; groups with d = 0 are level 0, of
    any scale: that of the block.
    Raises ValueError for a d that is no number, and levels that no grid has."""
    blocks = data.reshape(-1, t.size)
    d = t.scales.from_bytes(t.split(blocks)[1])
    if not bool(d.isfinite().all()):
        raise ValueError("a scale that is no finite number")
    scale = torch.where(d == 0, d.abs().amax(1, keepdim=True), d.abs())
    scale = torch.where(scale == 0, 1.0, scale).flatten().to(t.scales.dtype)
    for grid in t.grids:
        if (codes := _decode(t, grid, data, d.flatten().numpy())) is not None:
            return Decoded(grid, codes, scale)
    raise ValueError(f"blocks of d < 0 with the level {min(t.values)}, which no grid of 8 bits has turned around")


def _decode(t: BlockType, grid: Grid, data: Array, d: Array) -> Tensor | None:
    """Packed codes; None where a level is not of the grid."""
    found = grid.integers()
    assert found is not None  # of those in the table
    index = {value: i for i, value in enumerate(found[0])}
    plus, minus = (np.array([index.get(sign * v, NONE) for v in t.values], np.int16) for sign in (1, -1))
    bits = code_bits(grid, t.trits)
    n, cols = len(data), data.shape[1] // t.size * t.block
    step, groups = max(1, PIECE // max(cols, 1)), cols // t.group
    packed = []
    for first in range(0, n, step):
        rows = slice(first * groups, (first + step) * groups)
        codes = t.unpack(t.split(data[first : first + step].reshape(-1, t.size))[0]).reshape(-1, t.group)
        levels = plus[codes]
        if len(turned := np.flatnonzero(d[rows] < 0)):
            levels[turned] = minus[codes[turned]]
        levels[d[rows] == 0] = index.get(0, NONE)
        if (levels == NONE).any():
            return None
        packed.append(pack_codes(torch.from_numpy(levels.astype(np.uint8).reshape(-1, cols)), bits))
    return torch.cat(packed) if packed else torch.zeros(0, 0, dtype=torch.uint8)
