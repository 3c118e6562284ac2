"""Quantized layers, and the calls that put them into a model."""

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
from .kinds import KINDS, AskewConv2d, AskewLinear, Kind, PackedConv2d, PackedLinear

__all__ = [
    "KINDS", "AskewConv2d", "AskewLinear", "Kind", "PackedConv2d", "PackedLinear", "dequantize_", "hard_quantize_",
    "left_float", "pack_", "packed_layers", "param_groups", "quantize_", "quantized_layers", "unpack_",
]  # fmt: skip
