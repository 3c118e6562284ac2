"""Optimizers: base rules under the interval constraint, any optimizer under it, and sharpness-aware steps over them."""

from .askew import OPTIMIZERS, ASkewAdamW, ASkewLion, ASkewSGD
from .batchnorm import frozen_batchnorm_stats
from .cheap_sam import ESAM, MSAM, LookSAM, sharp_samples
from .sam import ASAM, SAM, AlignedSAM
from .skewed import Skewed

globals().update(OPTIMIZERS)  # of rules that have a row and no name above

__all__ = [
    "ASAM", "ESAM", "MSAM", "SAM", "ASkewAdamW", "ASkewLion", "ASkewSGD", "AlignedSAM", "LookSAM", "Skewed",
    "frozen_batchnorm_stats", "sharp_samples",
]  # fmt: skip
