"""What Python, C++ and Triton agree on: kinds of grids, order of sums, bytes of codes, limits (csrc/math/types.h)."""

from __future__ import annotations

FLOAT, UNIFORM, BINARY, CODEBOOK = range(4)  # kinds of grids; FLOAT, only in a mixture: every number is a level
SUM_ABS, SUM_SQUARES, MAX_ABS = range(3)  # columns of row_sums
INFEASIBLE, VIOLATION, VELOCITY2, GRAD_VELOCITY, FLIPS, NONFINITE = range(6)  # entries of totals
NUM_ROW_SUMS, NUM_TOTALS = 3, 6
MOST_CANDIDATES = 8  # of a mixture
SCALE_FLOOR = 1e-12  # no scale is less, times max(1, max|w|)
TRITS = 0  # the ``bits`` of the format that holds five ternary codes in a byte


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of a row of ``cols`` codes: ceil(bits cols / 8), five codes a byte for TRITS."""
    return -(-cols // 5) if bits == TRITS else -(-cols * bits // 8)
