"""How onnxruntime's operators hold integers: tensors of 2, 4 and 8 bits, and blocks of a row with a scale each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant import pack_codes
from .integers import integers

HOLDER = "ONNX files"
BLOCKS = (16, 256)  # the smallest and the largest block of MatMulNBits that is written; powers of two
CHANNEL_BLOCK = 128  # of a row with one scale
NBITS = (2, 4, 8)


@dataclass(frozen=True)
class Blocks:
    """weight[i, j] = (q[i, j] - zero) scale[i, j // block]; rows are filled up to whole blocks with q = zero."""

    bits: int
    block: int
    data: Tensor  # uint8 (n, blocks, block bits / 8)
    scale: Tensor  # float32 (n, blocks)
    zero: int

    @property
    def zero_points(self) -> Tensor | None:
        """As bytes, (n, bytes); None where they are the operator's own, 2^(bits - 1)."""
        if self.zero == 2 ** (self.bits - 1):
            return None
        n, blocks = self.scale.shape
        row = pack_codes(torch.full((1, blocks), self.zero, dtype=torch.uint8, device=self.data.device), self.bits)
        return row.repeat(n, 1)


def blocks_of(layer: Any) -> Blocks:
    """Of a packed layer whose weight is a matrix. Raises ValueError saying what does not fit."""
    levels, scale, low, high = integers(layer, HOLDER, inputs=True)
    n, cols = levels.shape
    group = cols // scale.shape[1]
    if scale.shape[1] > 1:
        block = min(group & -group, BLOCKS[1])
        if block < BLOCKS[0]:
            raise ValueError(f"blocks are powers of two from {BLOCKS[0]} on, groups of {group} are no multiple of one")
    else:
        block = min(max(BLOCKS[0], 1 << (cols - 1).bit_length()), CHANNEL_BLOCK)
    fitting = ((bits, zero) for bits in NBITS for zero in (2 ** (bits - 1), max(0, -low))
               if low + zero >= 0 and high + zero < 2**bits and zero < 2**bits)  # fmt: skip
    found = next(fitting, None)
    if found is None:
        raise ValueError(f"blocks hold integers around a zero point of 8 bits, got {low} to {high}")
    bits, zero = found
    blocks = -(-cols // block)
    q = torch.nn.functional.pad(levels + zero, (0, blocks * block - cols), value=zero)
    scale = scale.float().expand(n, -1)
    scale = scale.expand(n, blocks) if scale.shape[1] == 1 else scale.repeat_interleave(group // block, 1)
    return Blocks(bits, block, pack_codes(q.to(torch.uint8), bits).reshape(n, blocks, -1), scale.contiguous(), zero)
