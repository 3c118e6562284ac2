"""Optimizers."""

from .skewed import ASkewAdamW, ASkewSGD

__all__ = ["ASkewAdamW", "ASkewSGD"]
