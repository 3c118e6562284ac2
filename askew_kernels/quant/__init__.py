"""Grids, scale rules, layer configuration, packed codes, and the state that ties a weight to its scale."""

from .config import QuantConfig
from .grids import Binary, Codebook, Grid, Ternary, Uniform, grid_from_dict
from .packing import check_codes, code_bits, pack_codes, pack_weight, unpack_codes, unpack_weight
from .scales import RULES, activation_scales, compute_scale, default_rule, num_rows
from .state import WeightQuantizer

__all__ = [
    "RULES", "Binary", "Codebook", "Grid", "QuantConfig", "Ternary", "Uniform", "WeightQuantizer", "activation_scales",
    "check_codes", "code_bits", "compute_scale", "default_rule", "grid_from_dict", "num_rows", "pack_codes",
    "pack_weight", "unpack_codes", "unpack_weight",
]  # fmt: skip
