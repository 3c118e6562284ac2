"""Optimizers."""

from .sam import ASAM, SAM, AlignedSAM, frozen_batchnorm_stats
from .skewed import ASkewAdamW, ASkewSGD

__all__ = ["ASAM", "SAM", "ASkewAdamW", "ASkewSGD", "AlignedSAM", "frozen_batchnorm_stats"]
