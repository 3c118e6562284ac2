"""Grids, scale rules, and the state that ties a weight to them."""

from .grids import Binary, Codebook, Grid, Ternary, Uniform, grid_from_dict
from .scales import RULES, compute_scale, num_rows

__all__ = ["RULES", "Binary", "Codebook", "Grid", "Ternary", "Uniform", "compute_scale", "grid_from_dict", "num_rows"]
