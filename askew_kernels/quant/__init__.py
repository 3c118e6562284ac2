"""Grids, scale rules, layer configuration, and the state that ties a weight to them."""

from .config import QuantConfig
from .grids import Binary, Codebook, Grid, Ternary, Uniform, grid_from_dict
from .scales import RULES, compute_scale, num_rows
from .state import WeightQuantizer

__all__ = [
    "RULES", "Binary", "Codebook", "Grid", "QuantConfig", "Ternary", "Uniform", "WeightQuantizer", "compute_scale",
    "grid_from_dict", "num_rows",
]  # fmt: skip
