"""Contract: the packed formats of docs/packed.md.

1. ``unpack_weight(pack_weight(w))`` equals s Q(w/s) bit for bit, for every packable grid, storage type and granularity.
2. The bits stand where the documentation says: a second, scalar writer of Python integers produces the same bytes.
3. Codes survive any number of columns; padding is zero; bad input is a ValueError that begins with the argument's name.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, GRIDS, same_bits

from askew_kernels import ops
from askew_kernels.quant import (
    Binary,
    Codebook,
    Ternary,
    Uniform,
    check_codes,
    code_bits,
    compute_scale,
    pack_codes,
    pack_weight,
    unpack_codes,
    unpack_weight,
)  # fmt: skip
from askew_kernels.quant.packing import TRITS, row_bytes

PACKABLE = {name: (grid, False) for name, grid in GRIDS.items() if not name.startswith("inclusive")}
PACKABLE |= {"uniform3": (Uniform(3), False), "uniform5": (Uniform(5), False), "trits": (Ternary(), True)}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", PACKABLE)
def test_unpack_gives_the_training_weights(name, dtype, generator):
    grid, trits = PACKABLE[name]
    for shape in ((5, 24), (3, 7), (1, 129), (4, 3, 2, 2), (6,), (2, 0)):
        w = (torch.randn(shape, generator=generator) * 0.3).to(dtype)
        for granularity, group in (("per_tensor", None), ("per_channel", None), ("per_group", 4)):
            inputs = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
            if granularity == "per_group" and (inputs % 4 or not inputs):
                continue
            s = compute_scale(w, grid, "absmax", granularity, group)
            codes = pack_weight(w, s, grid, trits=trits)
            bits = code_bits(grid, trits)
            assert codes.dtype == torch.uint8 and codes.shape == (shape[0], row_bytes(math.prod(shape[1:]), bits))
            got = unpack_weight(codes, s, grid, shape, dtype, trits=trits)
            assert same_bits(got, ops.fake_quantize(w, s, grid)), (shape, granularity)


@pytest.mark.parametrize("bits", [*range(1, 9), TRITS])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_bits_stand_where_the_documentation_says(bits, data):
    cols = data.draw(st.integers(0, 40))
    top = 2 if bits == TRITS else 2**bits - 1
    rows = [data.draw(st.lists(st.integers(0, top), min_size=cols, max_size=cols)) for _ in range(2)]
    packed = pack_codes(torch.tensor(rows, dtype=torch.uint8).reshape(2, cols), bits)
    for row, got in zip(rows, packed.tolist(), strict=True):
        if bits == TRITS:
            want = [sum(c * 3**d for d, c in enumerate(row[i : i + 5])) for i in range(0, cols, 5)]
        else:
            string = sum(code << (bits * j) for j, code in enumerate(row))
            want = list(string.to_bytes(-(-bits * cols // 8), "little"))
        assert got == want
    assert unpack_codes(packed, bits, cols).tolist() == rows


def test_an_example_by_hand():
    """The table of docs/packed.md."""
    codes = torch.tensor([[1, 2, 3, 0, 2]], dtype=torch.uint8)
    assert pack_codes(codes, 4).tolist() == [[0x21, 0x03, 0x02]]
    assert pack_codes(codes, 3).tolist() == [[0b11_010_001, 0b0_010_000_0]]
    assert pack_codes(codes, 2).tolist() == [[0b00_11_10_01, 0b10]]
    assert pack_codes(torch.tensor([[1, 0, 2, 2, 1, 2]], dtype=torch.uint8), TRITS).tolist() == [[154, 2]]


def test_grids_that_cannot_be_packed():
    with pytest.raises(ValueError, match=r"^grid: Uniform\(bits=4.*17 levels and cannot be packed in 4 bits"):
        code_bits(Uniform(4, inclusive=True))
    with pytest.raises(ValueError, match="^grid: codebooks are packed up to 16 levels, got 17"):
        code_bits(Codebook(range(17)))
    with pytest.raises(ValueError, match="^trits: "):
        code_bits(Binary(), trits=True)


def test_bad_arguments():
    w = torch.ones(2, 4)
    w[1, 2] = math.nan
    with pytest.raises(ValueError, match="^w: 1 of 8 weights are NaN"):
        pack_weight(w, torch.ones(1), Uniform(4))
    with pytest.raises(ValueError, match="^codes: expected at most 3, got 4"):
        pack_codes(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="^codes: expected uint8"):
        pack_codes(torch.tensor([[4]]), 2)
    with pytest.raises(ValueError, match="^bits: expected 1 to 8"):
        pack_codes(torch.zeros(1, 1, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="^codes: expected indices of 3 levels, got 3"):
        check_codes(torch.tensor([[0b1100]], dtype=torch.uint8), 2, 4, 3)
    with pytest.raises(ValueError, match="^codes: .* 242, got 243"):
        check_codes(torch.tensor([[243]], dtype=torch.uint8), TRITS, 5, 3)


def test_infinite_weights_take_the_ends():
    w = torch.tensor([[math.inf, -math.inf]])
    assert unpack_weight(pack_weight(w, torch.ones(1), Uniform(4)), torch.ones(1), Uniform(4), (1, 2)).tolist() == [
        [7, -8]
    ]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_code_without_a_level_is_found_in_every_byte(bits):
    """Grids of 2^k - 1 levels."""
    for byte in range(256):
        codes = torch.full((2, 3), byte, dtype=torch.uint8)
        if int(unpack_codes(codes, bits, 24 // bits).max()) == 2**bits - 1:
            with pytest.raises(
                ValueError, match=f"^codes: expected indices of {2**bits - 1} levels, got {2**bits - 1}"
            ):
                check_codes(codes, bits, 24 // bits, 2**bits - 1)
        else:
            check_codes(codes, bits, 24 // bits, 2**bits - 1)


BAD_ARGUMENTS = {
    "w": (lambda: pack_weight([[1.0]], ONE, GRID), TypeError),
    "w of integers": (lambda: pack_weight(torch.ones(3, 8, dtype=torch.int64), ONE, GRID), TypeError),
    "grid": (lambda: pack_weight(torch.ones(3, 8), ONE, None), TypeError),
    "grid of codes": (lambda: unpack_weight(CODES, ONE, None, (3, 8)), TypeError),
    "scale": (lambda: pack_weight(torch.ones(3, 8), torch.ones(5), GRID), ValueError),
    "scale of 0": (lambda: pack_weight(torch.ones(3, 8), torch.zeros(1), GRID), ValueError),
    "scale below 0": (lambda: pack_weight(torch.ones(3, 8), -ONE, GRID), ValueError),
    "scale of NaN": (lambda: pack_weight(torch.ones(3, 8), ONE * math.nan, GRID), ValueError),
    "scale of a number": (lambda: pack_weight(torch.ones(3, 8), 1.0, GRID), TypeError),
    "scale of none": (lambda: unpack_weight(CODES, None, GRID, (3, 8)), TypeError),
    "scale of integers": (lambda: unpack_weight(CODES, ONE.int(), GRID, (3, 8)), ValueError),
    "scale of other rows": (lambda: unpack_weight(CODES, torch.ones(5), GRID, (3, 8)), ValueError),
    "codes": (lambda: unpack_weight(CODES[:, :1], ONE, GRID, (3, 8)), ValueError),
    "codes of more": (lambda: unpack_weight(CODES.repeat(1, 2), ONE, GRID, (3, 8)), ValueError),
    "codes of integers": (lambda: unpack_weight(CODES.int(), ONE, GRID, (3, 8)), ValueError),
    "codes of other rows": (lambda: unpack_weight(CODES, ONE, GRID, (4, 8)), ValueError),
    "shape": (lambda: unpack_weight(CODES, ONE, GRID, ()), ValueError),
    "dtype": (lambda: unpack_weight(CODES, ONE, GRID, (3, 8), torch.int8), TypeError),
    "packed": (lambda: unpack_codes(CODES, 4, 9), ValueError),
    "packed of integers": (lambda: unpack_codes(CODES.int(), 4, 8), ValueError),
    "bits": (lambda: unpack_codes(CODES, 9, 8), ValueError),
    "cols": (lambda: unpack_codes(CODES, 4, 8.0), ValueError),
    "cols below 0": (lambda: ops.packed_dequantize(CODES[:, :0].contiguous(), ONE, Uniform(8), 1, -3), ValueError),
    "cols of a float": (lambda: ops.packed_dequantize(CODES, ONE, GRID, 4, 8.0), ValueError),
    "dtype of integers": (lambda: ops.packed_dequantize(CODES, ONE, GRID, 4, 8, torch.int8), TypeError),
    "dtype by name": (lambda: ops.packed_dequantize(CODES, ONE, GRID, 4, 8, "float32"), TypeError),
}
GRID, ONE, CODES = Uniform(4), torch.ones(1), torch.zeros(3, 4, dtype=torch.uint8)


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_bad_arguments_are_named(what):
    call, error = BAD_ARGUMENTS[what]
    with pytest.raises(error, match=f"^{what.split()[0]}: "):
        call()
