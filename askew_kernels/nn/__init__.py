"""Quantized layers, and the calls that put them into a model."""

from .convert import dequantize_, hard_quantize_, left_float, param_groups, quantize_, quantized_layers
from .layers import AskewConv2d, AskewLinear
from .packed import PackedConv2d, PackedLinear, pack_, packed_layers, unpack_
from .policy import LayerPolicy, Policy, PolicyError

__all__ = [
    "AskewConv2d", "AskewLinear", "LayerPolicy", "PackedConv2d", "PackedLinear", "Policy", "PolicyError",
    "dequantize_", "hard_quantize_", "left_float", "pack_", "packed_layers", "param_groups", "quantize_",
    "quantized_layers", "unpack_",
]  # fmt: skip
