"""What happens to a trained model: files of packed weights, their inspection, conversions and exports."""

from . import formats, hf, lora

__all__ = ["formats", "hf", "lora"]
