"""Typed public functions over the operators ``askew::…``: every argument is checked before anything is written.

Shapes: a tensor is seen as (rows, cols), one scale a row; ``scale`` has shape () or (1,) per tensor, (shape[0],) per
channel, (shape[0] * groups,) per group. Storage is float32, bfloat16 or float16 (float64 runs on the reference);
arithmetic is float32. In-place functions accept any dense layout; where it is not contiguous they work on a copy.
"""

from __future__ import annotations

from . import flops, schema
from .checks import FLOAT_TYPES, check_float_tensor, check_grid, check_scale, concrete, number, rate_tensor
from .mix import MOST_CANDIDATES, candidate_encodings, mix_fake_quantize, run_mix_fake_quantize
from .packed import check_activations, packed_dequantize, packed_linear, run_packed_linear
from .quantize import (
    fake_quantize,
    fake_quantize_out_,
    project_interval_,
    row_sums,
    run_fake_quantize,
    ste_clip_,
)
from .sam import (
    run_sam_norm,
    run_sam_perturb,
    run_sam_restore,
    sam_average_,
    sam_norm,
    sam_perturb_,
    sam_restore_,
)
from .update import SKEWS, SkewStats, run_skew_update, skew_adamw_, skew_sgd_

lowbit_linear, lowbit_dequantize = packed_linear, packed_dequantize  # their names until 0.2
flops.register_when_imported()

__all__ = [
    "FLOAT_TYPES", "MOST_CANDIDATES", "SKEWS", "SkewStats", "candidate_encodings", "check_activations",
    "check_float_tensor", "check_grid", "check_scale", "concrete", "fake_quantize", "fake_quantize_out_", "flops",
    "mix_fake_quantize", "number", "packed_dequantize", "packed_linear", "project_interval_", "rate_tensor",
    "row_sums", "run_fake_quantize", "run_mix_fake_quantize", "run_packed_linear", "run_sam_norm", "run_sam_perturb",
    "run_sam_restore", "run_skew_update", "sam_average_", "sam_norm", "sam_perturb_", "sam_restore_", "schema",
    "skew_adamw_", "skew_sgd_", "ste_clip_",
]  # fmt: skip
