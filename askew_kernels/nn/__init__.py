"""Quantized layers, and the calls that put them into a model."""

from .convert import dequantize_, hard_quantize_, param_groups, quantize_, quantized_layers
from .layers import AskewConv2d, AskewLinear

__all__ = [
    "AskewConv2d", "AskewLinear", "dequantize_", "hard_quantize_", "param_groups", "quantize_", "quantized_layers",
]  # fmt: skip
