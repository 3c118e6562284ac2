"""How a weight of a given shape is a matrix: rows are outputs, and scales and groups run along the inputs of a row.

Most weights have their outputs first, (n, …). A **transposed** one is (inputs, outputs, …); of a **stacked** one the
first dimension counts matrices, each quantized like a weight of its own. The Parameter keeps its shape; memory of a
transposed one is laid out so that the kernels find the matrix contiguous.

In ``groups`` an output has the inputs of its group alone: of a transposed convolution's weight (inputs, n, …) with G
groups row j G + g of the matrix is output g n + j. Without groups, and with one output for each, rows are outputs in
their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.dense import layout


class Form(NamedTuple):
    """``rows`` of (n, …); see the module's text. In shapes: (inputs, outputs, …) and (n, outputs, inputs)."""

    transposed: bool = False
    stacked: bool = False
    groups: int = 1  # of a transposed one

    def view_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Of ``view``."""
        if not self.transposed:
            return tuple(shape)
        *before, inputs, outputs = shape[: self.stacked + 2]
        return (*before, outputs, inputs, *shape[self.stacked + 2 :])

    def shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Of the matrix of a weight of this shape, rows first."""
        shape = self.view_shape(shape)
        if self.groups > 1:
            return (shape[0] * self.groups, shape[1] // self.groups, *shape[2:])
        return (shape[0] * shape[1], *shape[2:]) if self.stacked else shape

    def view(self, weight: Tensor) -> Tensor:
        """The weight, or what has its shape, with the outputs before the inputs: what the operators take. Its own
        inverse."""
        return weight.transpose(int(self.stacked), self.stacked + 1) if self.transposed else weight

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``shape`` says; a copy where memory does not allow a view."""
        split = self.stacked or self.groups > 1
        return self.view(weight).reshape(self.shape(weight.shape)) if split else self.view(weight)

    def weight(self, matrix: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """The inverse of ``matrix`` for a weight of ``shape``."""
        return self.view(matrix.reshape(self.view_shape(shape)))

    def like(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for another of its shape, whose ``view`` is contiguous, or laid out as the weight where its rows are
        one after another (channels last)."""
        if not self.transposed:
            as_it_is = layout(weight, weight.shape[0]) is not None
            order = torch.preserve_format if as_it_is else torch.contiguous_format
            return torch.empty_like(weight, dtype=dtype, memory_format=order)
        return self.view(torch.empty(self.view_shape(weight.shape), dtype=dtype, device=weight.device))

    def laid_out(self, data: Tensor) -> Tensor:
        """The same numbers in the order of the matrix; ``data`` itself where it is in it, and for other forms."""
        return self.view(self.view(data).contiguous()) if self.transposed else data


ROWS = Form()
