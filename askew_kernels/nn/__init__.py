"""Quantized layers, and the calls that put them into a model."""

from . import kinds
from .convert import (
    dequantize_,
    hard_quantize_,
    left_float,
    pack_,
    packed_layers,
    param_groups,
    quantize_,
    quantized_layers,
    unpack_,
)
from .kinds import *  # noqa: F403  (its __all__: a new kind is an entry there)

__all__ = [
    "dequantize_", "hard_quantize_", "left_float", "pack_", "packed_layers", "param_groups", "quantize_",
    "quantized_layers", "unpack_",
]  # fmt: skip
__all__ += kinds.__all__
