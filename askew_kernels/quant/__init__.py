"""Grids, scale rules, layer configuration, packed codes, and the state that ties a weight to its scale."""

from . import grids
from .config import QuantConfig
from .gradients import LUQ
from .grids import *  # noqa: F403  (its __all__: a new grid is an entry there)
from .packing import check_codes, code_bits, pack_codes, pack_weight, unpack_codes, unpack_weight
from .scales import RULES, activation_scales, compute_scale, default_rule, num_rows, scale_unit
from .state import WeightQuantizer

__all__ = [
    "LUQ", "RULES", "QuantConfig", "WeightQuantizer", "activation_scales", "check_codes", "code_bits", "compute_scale",
    "default_rule", "num_rows", "pack_codes", "pack_weight", "scale_unit", "unpack_codes", "unpack_weight",
]  # fmt: skip
__all__ += grids.__all__
