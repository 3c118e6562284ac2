"""What Python, C++ and Triton agree on: kinds of grids, order of sums, codes of packed weights, limits.

The one home of these constants in Python; the C++ one is ``csrc/math/types.h``, and a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT, UNIFORM, BINARY, CODEBOOK = range(4)  # kinds of grids; FLOAT (mixtures, inputs): every number is a level
SUM_ABS, SUM_SQUARES, MAX_ABS = range(3)  # columns of row_sums
INFEASIBLE, VIOLATION, VELOCITY2, GRAD_VELOCITY, FLIPS, NONFINITE = range(6)  # entries of totals
NUM_ROW_SUMS, NUM_TOTALS = 3, 6
SUM_COLUMNS = 16384  # of a row whose sums are taken together, in float32; the sums of such pieces are added in float64
#: How many candidates a mixture may have.
MOST_CANDIDATES = 8
LEAST_RATE = 2.0**-100  # what the cap Delta / (4 lr) on a velocity counts a smaller lr as, so that it is finite
SCALE_FLOOR = 1e-12  # no scale is smaller than this times max(1, max |w|)
ABSMAX, SAWB, MEAN, RMS, GIVEN = range(5)  # rules of scales; GIVEN: they are there already, but for rows of zeros
# What scales may be rounded to, with the smallest and the largest that they then can be: powers of two are E8M0 of the
# OCP Microscaling Formats (MX) specification 1.0, 2023, but for 2^-127, which is no normal float32.
SCALE_RANGES = {
    "float32": (0.0, 2.0**128 - 2.0**104),
    "bfloat16": (2.0**-126, 2.0**128 - 2.0**120),
    "float16": (2.0**-24, 65504.0),
    "float8_e8m0fnu": (2.0**-126, 2.0**127),
    "float8_e4m3fn": (2.0**-9, 448.0),  # in units of the tensor's
}
SCALE_TYPES = tuple(SCALE_RANGES)  # in the order of the kernels
UNIT_EXPONENTS = (-117, 119)  # of a tensor's unit, so that float32 holds all that e4m3 then gives
SCALE_CANDIDATES, ERROR_LANES = 100, 8  # of the rule that tries them; lanes that their squared errors are added in
FEW_ROWS = 8  # of x, which products from packed codes take without matrix units, in CUDA and in Triton
INT8_TOP = 127  # what the largest magnitude of a row of int8 activations is mapped to
# of copies that hold levels in grid units, one byte each, and what the largest number of a row is mapped to in each
LEVEL_TYPES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

LUQ_BITS = (2, 6)  # fewest and most of gradients' powers of two: one of the sign, the others of the exponent
MOST_LEVEL_COLUMNS = 131071  # whose products of bytes int32 holds the sum of, whatever they are

TRITS = 0  # the ``bits`` of the format that holds five ternary codes in a byte
TRIT_POWERS = (1, 3, 9, 27, 81)  # what each of the five counts
TRIT_TOP = 242  # the byte of five highest codes: 3^5 - 1

BAND_ROWS = 16  # of the bands in which a CPU's products with int8 activations read codes
TILE_ROWS, TILE_COLUMNS = 16, 256  # of the tiles in which a GPU's products with few inputs read codes
TILE_TABLE, TILE_TABLE2 = 14, 24  # ``form`` of tiles whose codes are looked up: levels of one part, of two parts


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic on tensors of ``dtype``, and of the scales beside them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of a row of ``cols`` codes: ceil(bits cols / 8), five codes a byte for TRITS."""
    return -(-cols // len(TRIT_POWERS)) if bits == TRITS else -(-cols * bits // 8)


def bits_per_code(bits: int) -> float:
    """Bits that a code takes: 1.6 for TRITS."""
    return 8 / len(TRIT_POWERS) if bits == TRITS else bits


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """(n, cols) uint8 level indices from (n, row_bytes) uint8: the inverse of ``pack_codes``."""
    n = packed.shape[0]
    if bits == TRITS:
        powers = torch.tensor(TRIT_POWERS, dtype=torch.uint8, device=packed.device)
        digits = packed[..., None] // powers % 3
        return digits.flatten(1)[:, :cols].contiguous()
    words = -(-cols // 8)  # eight codes are `bits` whole bytes
    padded = torch.nn.functional.pad(packed, (0, words * bits - packed.shape[1])).reshape(n, words, bits)
    word = torch.zeros(n, words, dtype=torch.int64, device=packed.device)
    for j in range(bits):
        word |= padded[..., j].to(torch.int64) << (8 * j)
    codes = torch.stack([((word >> (bits * i)) & (2**bits - 1)).to(torch.uint8) for i in range(8)], dim=-1)
    return codes.flatten(1)[:, :cols].contiguous()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(n, row_bytes) uint8 from (n, cols) uint8 level indices: the inverse of ``unpack_codes``; ``bits`` of each are
    taken as they are."""
    n, cols = codes.shape
    if bits == TRITS:
        digits = torch.nn.functional.pad(codes, (0, -cols % 5)).reshape(n, -(-cols // 5), 5)
        powers = torch.tensor(TRIT_POWERS, dtype=torch.uint8, device=codes.device)
        return (digits * powers).sum(-1, dtype=torch.uint8)
    # eight codes are `bits` whole bytes
    groups = torch.nn.functional.pad(codes, (0, -cols % 8)).reshape(n, -(-cols // 8), 8)
    word = torch.zeros(groups.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= groups[..., i].to(torch.int64) << (bits * i)
    packed = torch.stack([((word >> (8 * j)) & 255).to(torch.uint8) for j in range(bits)], dim=-1)
    return packed.flatten(1)[:, : row_bytes(cols, bits)].clone(memory_format=torch.contiguous_format)  # no view


def tile_bits(form: int) -> int:
    """Bits of a code in tiles of this form."""
    return 4 if form in (TILE_TABLE, TILE_TABLE2) else form


def tile_shape(n: int, cols: int, form: int) -> tuple[int, ...]:
    """The shape of the tiles of a (n, cols) weight, int32."""
    return -(-n // TILE_ROWS), -(-cols // TILE_COLUMNS), tile_bits(form), 32, 4


def tile_codes(codes: Tensor, form: int) -> Tensor:
    """Tiles of (n, cols) uint8 codes: what a lane of a warp reads of a tile, 16 bytes at a time (docs/packed.md).

    Lane 4 g + t has rows g and g + 8 of columns 16 j + 4 t … 16 j + 4 t + 3, j = 0 … 15: pairs (low half, high half)
    of neighbours, number 4 j + (row >= 8) + 2 (column is one of the last two). Pair q of a word takes bits
    ``form q …`` of both halves; with 3 bits three words hold 16 pairs, the last one in their bits 15 and 31.
    """
    n, cols = codes.shape
    bits = tile_bits(form)
    tiles, chunks = -(-n // TILE_ROWS), -(-cols // TILE_COLUMNS)
    padded = torch.nn.functional.pad(codes, (0, -cols % TILE_COLUMNS, 0, -n % TILE_ROWS))
    seen = padded.reshape(tiles, 2, 8, chunks, 16, 4, 2, 2)  # tile, row >= 8, g, chunk, j, t, last two, half
    pairs = seen.permute(0, 3, 2, 5, 4, 6, 1, 7).reshape(tiles, chunks, 32, 64, 2).to(torch.int64)
    pairs = pairs[..., 0] | pairs[..., 1] << 16  # of each lane
    if bits == 3:
        pairs = pairs.unflatten(-1, (4, 16))
        five = pairs[..., :15].unflatten(-1, (3, 5))
        words = sum(five[..., i] << 3 * i for i in range(5))
        last = torch.stack([(pairs[..., 15] >> i & 0x00010001) << 15 for i in range(3)], -1)
        words = (words | last).flatten(-2)
    else:
        each = pairs.unflatten(-1, (-1, 16 // bits))
        words = sum(each[..., i] << bits * i for i in range(16 // bits))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.unflatten(-1, (bits, 4)).transpose(2, 3).contiguous()


def untile_codes(tiles: Tensor, form: int, n: int, cols: int) -> Tensor:
    """(n, cols) uint8 codes: the inverse of ``tile_codes``."""
    bits = tile_bits(form)
    words = tiles.transpose(2, 3).flatten(3).to(torch.int64) & 0xFFFFFFFF  # tile, chunk, lane, word
    if bits == 3:
        three = words.unflatten(-1, (4, 3))
        five = torch.stack([three >> 3 * i & 0x00070007 for i in range(5)], -1).flatten(-2)
        last = sum((three[..., i : i + 1] >> 15 & 0x00010001) << i for i in range(3))
        pairs = torch.cat([five, last], -1).flatten(-2)
    else:
        mask = (2**bits - 1) * 0x00010001
        pairs = torch.stack([words >> bits * i & mask for i in range(16 // bits)], -1).flatten(-2)
    seen = torch.stack([pairs & 0xFFFF, pairs >> 16], -1).to(torch.uint8)
    seen = seen.reshape(*tiles.shape[:2], 8, 4, 16, 2, 2, 2).permute(0, 6, 2, 1, 4, 3, 5, 7)
    return seen.reshape(TILE_ROWS * tiles.shape[0], -1)[:n, :cols].contiguous()


def band_vectors(bits: int) -> int:
    """Vectors of four columns in a block of a band: 32 columns at most, trits 20."""
    return len(TRIT_POWERS) if bits == TRITS else 8 // (bits & -bits)


def band_words(bits: int) -> int:
    """Words of 32 bits that a row's block takes."""
    return 1 if bits == TRITS else band_vectors(bits) * bits // 8


def band_shape(n: int, cols: int, bits: int, groups: int) -> tuple[int, int]:
    """The shape of the bands of a (n, cols) weight whose rows have ``groups`` scales, uint8."""
    blocks = -(-(cols // groups) // (4 * band_vectors(bits)))
    return -(-n // BAND_ROWS), groups * blocks * band_words(bits) * 4 * BAND_ROWS


def _planes(bits: int) -> list[tuple[int, int]]:
    """(width, lowest bit in a code) of the planes of bits that codes are cut into, the low bits in the widest."""
    found, low = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, low))
            low += width
    return found


def band_codes(codes: Tensor, bits: int, groups: int) -> Tensor:
    """Bands of (n, cols) uint8 codes: (bands, groups, blocks, words, BAND_ROWS, 4) bytes as (bands, …).

    Byte i of the words of a row holds columns i, 4 + i, … of the block, one code after the other from the lowest bit
    on, plane by plane; of trits the digits of a number v, the first the highest, as 256 v / 243 rounded up. Groups
    are filled up to whole blocks, rows to whole bands.
    """
    (n, cols), vectors = codes.shape, band_vectors(bits)
    length = cols // groups
    padded = torch.nn.functional.pad(codes.reshape(n, groups, length), (0, -length % (4 * vectors)))
    padded = torch.nn.functional.pad(padded, (0, 0, 0, 0, 0, -n % BAND_ROWS))
    blocks = padded.reshape(
        padded.shape[0] // BAND_ROWS, BAND_ROWS, groups, padded.shape[-1] // (4 * vectors), vectors, 4
    )
    if bits == TRITS:
        powers = torch.tensor(TRIT_POWERS, dtype=torch.uint8, device=codes.device)
        number = (blocks.flip(-2) * powers[:, None]).sum(-2, keepdim=True, dtype=torch.int32)
        words = ((256 * number + TRIT_TOP) // (TRIT_TOP + 1)).to(torch.uint8)
    else:
        planes = []
        for width, low in _planes(bits):
            each = (blocks >> low & (1 << width) - 1).unflatten(-2, (-1, 8 // width))
            planes.append(sum(each[..., k, :] << width * k for k in range(8 // width)))
        words = torch.cat(planes, -2)
    return words.permute(0, 2, 3, 4, 1, 5).reshape(band_shape(n, cols, bits, groups)).contiguous()


def unband_codes(bands: Tensor, bits: int, n: int, cols: int, groups: int) -> Tensor:
    """(n, cols) uint8 codes: the inverse of ``band_codes``."""
    blocks = -(-(cols // groups) // (4 * band_vectors(bits)))
    words = bands.reshape(len(bands), groups, blocks, band_words(bits), BAND_ROWS, 4).permute(0, 4, 1, 2, 3, 5)
    if bits == TRITS:
        powers = torch.tensor(TRIT_POWERS, dtype=torch.uint8, device=bands.device)
        number = (words.int() * (TRIT_TOP + 1) >> 8).to(torch.uint8)
        codes = (number // powers[:, None] % 3).flip(-2)
    else:
        codes, first = torch.zeros((), dtype=torch.uint8, device=bands.device), 0
        for width, low in _planes(bits):
            plane = words[..., first : first + band_vectors(bits) * width // 8, :]
            each = torch.stack([plane >> width * k & (1 << width) - 1 for k in range(8 // width)], -2)
            codes = codes | each.flatten(-3, -2) << low
            first += plane.shape[-2]
    rows = codes.reshape(len(bands) * BAND_ROWS, groups, 4 * blocks * band_vectors(bits))[:n, :, : cols // groups]
    return rows.reshape(n, cols).contiguous()


def level_step(kind: int) -> int:
    """The distance between neighbouring levels of a grid of integers."""
    return 2 if kind == BINARY else 1


def level_table(levels: Tensor, grid: list[int], device: torch.device | str = "cpu") -> Tensor:
    """All levels of a grid, ascending, float32: what a code indexes."""
    kind, lo, hi = grid
    if kind == CODEBOOK:
        return levels.to(device)
    return torch.arange(lo, hi + 1, level_step(kind), dtype=torch.float32, device=device)


def holds_levels(dtype: torch.dtype, levels: Iterable[float]) -> bool:
    """Whether a type of ``LEVEL_TYPES`` holds every level exactly: integers of a byte, or e4m3's numbers, of four
    significant bits, multiples of 2^-9, up to 448."""
    if dtype == torch.int8:
        return all(float(c).is_integer() and -128 <= c <= 127 for c in levels)
    top = LEVEL_TYPES[dtype]
    return all(abs(c) <= top and (c * 2**9).is_integer() and (math.frexp(c)[0] * 2**4).is_integer() for c in levels)


def int8_sums_fit(cols: int, n_levels: int) -> bool:
    """Whether int32 holds any sum of ``cols`` products of an int8 activation and a code."""
    return cols * INT8_TOP * (n_levels - 1) < 2**31
