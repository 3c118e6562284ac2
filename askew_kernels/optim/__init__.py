"""Optimizers: base rules under the interval constraint, any optimizer under it, and sharpness-aware steps over them."""

from .askew import OPTIMIZERS, ASkewAdamW, ASkewLion, ASkewSGD
from .batchnorm import frozen_batchnorm_stats
from .sam import ASAM, SAM, AlignedSAM
from .skewed import Skewed

globals().update(OPTIMIZERS)  # of rules that have a row and no name above

__all__ = ["ASAM", "SAM", "ASkewAdamW", "ASkewLion", "ASkewSGD", "AlignedSAM", "Skewed", "frozen_batchnorm_stats"]
