"""Optimizers."""

from .batchnorm import frozen_batchnorm_stats
from .sam import ASAM, SAM, AlignedSAM
from .skewed import ASkewAdamW, ASkewSGD

__all__ = ["ASAM", "SAM", "ASkewAdamW", "ASkewSGD", "AlignedSAM", "frozen_batchnorm_stats"]
