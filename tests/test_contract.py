"""Contract: what Python, C++ and Triton agree on has one home on each side, and the two sides say the same.

``askew_kernels/contract.py`` and ``csrc/math/types.h`` hold the kinds of grids, the layout of the sums, the format of
packed codes and the limits; nobody else spells these numbers. The formulas among them are checked against what they
mean.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
import torch

import askew_kernels
from askew_kernels import contract, quant

PACKAGE = Path(askew_kernels.__file__).parent
CSRC = PACKAGE.parent / "csrc"
TYPES = CSRC / "math" / "types.h"

SHARED = {  # in C++: in Python
    "kFloat": contract.FLOAT, "kUniform": contract.UNIFORM, "kBinary": contract.BINARY, "kCodebook": contract.CODEBOOK,
    "kSumAbs": contract.SUM_ABS, "kSumSquares": contract.SUM_SQUARES, "kMaxAbs": contract.MAX_ABS,
    "kRowSums": contract.NUM_ROW_SUMS, "kInfeasible": contract.INFEASIBLE, "kViolation": contract.VIOLATION,
    "kVelocity2": contract.VELOCITY2, "kGradVelocity": contract.GRAD_VELOCITY, "kFlips": contract.FLIPS,
    "kNonfinite": contract.NONFINITE, "kTotals": contract.NUM_TOTALS, "kMostCandidates": contract.MOST_CANDIDATES,
    "kAbsmax": contract.ABSMAX, "kSawb": contract.SAWB, "kMean": contract.MEAN, "kRms": contract.RMS,
    "kGiven": contract.GIVEN, "kScaleCandidates": contract.SCALE_CANDIDATES, "kErrorLanes": contract.ERROR_LANES,
    **{f"kScale{name}": i for i, name in enumerate(("Float32", "BFloat16", "Float16", "E8M0", "E4M3"))},
}  # fmt: skip
PACKED = {
    "kTrits": contract.TRITS, "kTritsInByte": len(contract.TRIT_POWERS), "kTopTrits": contract.TRIT_TOP,
    "kInt8Top": contract.INT8_TOP, "kSumPiece": contract.SUM_COLUMNS,
    "kMostLevelColumns": contract.MOST_LEVEL_COLUMNS,
    **dict(zip(("kLuqFewestBits", "kLuqMostBits"), contract.LUQ_BITS, strict=True)),
}  # fmt: skip
# Numbers that are nobody else's: where else one stands it means something else, which is said here.
NUMBERS = {contract.TRIT_TOP, 81, contract.INT8_TOP, contract.SUM_COLUMNS, contract.SCALE_FLOOR, 1.6}
OTHERS = {
    ("deploy/integers.py", 127): "integers of 8 bits", ("deploy/to_torchao.py", 127): "the type int8 of torchao",
    ("deploy/gguf/blocks.py", 127): "integers of 8 bits, and E8M0's bias", ("quant/exports.py", 127): "a level",
    ("deploy/inspect.py", 1.6): "inches of a figure", ("analysis/hessian.py", 1e-12): "a norm that is not divided by",
    ("quant/scales.py", 81): "clipping points", ("tuning/__init__.py", 16384): "elements of a tile, to be tried",
    ("triton_kernels/math.py", 127): "NaN's bits in e4m3", ("triton_kernels/math.py", 16384): "its last bit is 2^-9",
}  # fmt: skip


def cpp_numbers(text):
    """{name: value} of enumerators and constexpr integers."""
    code = re.sub(r"//.*", "", text)
    return {name: int(value) for name, value in re.findall(r"\b(k[A-Z]\w*) = (-?\d+)\b", code)}


@pytest.mark.skipif(not TYPES.is_file(), reason="installed without its sources")
def test_both_sides_say_the_same():
    text = TYPES.read_text()
    assert float.fromhex(re.search(r"kLeastRate = (0x1p-\d+)f;", text).group(1)) == contract.LEAST_RATE
    found = cpp_numbers(text)
    for name, value in {**SHARED, **PACKED}.items():
        assert found.get(name) == value, name


@pytest.mark.skipif(not TYPES.is_file(), reason="installed without its sources")
def test_csrc_spells_them_once():
    for path in sorted(CSRC.rglob("*")):
        if path.is_file() and path != TYPES:
            code = re.sub(r"//.*", "", path.read_text())
            assert not set(cpp_numbers(code)) & {*SHARED, *PACKED}, path
            assert not re.search(rf"\b({contract.TRIT_TOP}|{contract.INT8_TOP})\b", code), path


def numbers(path):
    """Numbers in the code of a file, text and comments left out."""
    with tokenize.open(path) as lines:
        tokens = list(tokenize.generate_tokens(io.StringIO(lines.read()).readline))
    return {ast.literal_eval(t.string) for t in tokens if t.type == tokenize.NUMBER}


def installed():
    """The rooms that compute; what makes evidence has numbers of its own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not re.match(r"bench/|demo|contract\.py", name):
            yield name, path


def test_python_spells_them_once():
    for name, path in installed():
        assert {(name, n) for n in numbers(path) & NUMBERS} <= set(OTHERS), name


def test_exceptions_are_still_needed():
    sources = dict(installed())
    assert all(name not in sources or number in numbers(sources[name]) for name, number in OTHERS)


def test_names_are_assigned_once():
    """Elsewhere a shared name is imported, or made of the shared one (``tl.constexpr(contract.BINARY)``)."""
    shared = {name for name, value in vars(contract).items() if name.isupper() and isinstance(value, int | float)}
    for name, path in installed():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign):
                targets = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
                from_numbers = any(isinstance(n, ast.Constant) for n in ast.walk(node.value))
                assert not (targets & shared and from_numbers), (name, targets & shared)


# ---- what they mean --------------------------------------------------------------------------------------------------


def test_trits():
    digits = len(contract.TRIT_POWERS)
    assert contract.TRIT_POWERS == tuple(3**i for i in range(digits)) and 3**digits <= 256 < 3 ** (digits + 1)
    assert contract.TRIT_TOP == 3**digits - 1 == 2 * sum(contract.TRIT_POWERS)
    assert contract.bits_per_code(contract.TRITS) == 1.6 and contract.bits_per_code(3) == 3


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("cols", [0, 1, 7, 8, 129])
def test_rows_and_codes(bits, cols, generator):
    """``unpack_codes`` is the inverse of ``pack_codes``, and a row has the bytes that ``row_bytes`` says."""
    codes = torch.randint(0, 3 if bits == contract.TRITS else 2**bits, (3, cols), generator=generator).to(torch.uint8)
    packed = quant.pack_codes(codes, bits)
    assert packed.shape == (3, contract.row_bytes(cols, bits))
    assert torch.equal(contract.unpack_codes(packed, bits, cols), codes)


@pytest.mark.parametrize("grid", [quant.Uniform(4), quant.Ternary(), quant.Binary(), quant.Codebook([-1.0, 0.25, 2.0])])
def test_levels(grid):
    table = contract.level_table(grid.levels_tensor(), grid.encoding)
    assert table.tolist() == list(grid.levels)
    kind = grid.encoding[0]
    if kind != contract.CODEBOOK:
        assert set((table[1:] - table[:-1]).tolist()) == {contract.level_step(kind)}


def test_int8_sums():
    """The bound is the last number of columns whose largest sum int32 holds."""
    top = (2**31 - 1) // (contract.INT8_TOP * 15)
    assert contract.int8_sums_fit(top, 16) and not contract.int8_sums_fit(top + 1, 16)
