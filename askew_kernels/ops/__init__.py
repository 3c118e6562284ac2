"""Typed public functions over the operators ``askew::…``: every argument is checked before anything is written.

Shapes: a tensor is seen as (rows, cols), one scale a row; ``scale`` has shape () or (1,) per tensor, (shape[0],) per
channel, (shape[0] * groups,) per group. Storage is float32, bfloat16 or float16 (float64 runs on the reference);
arithmetic is float32. In-place functions accept any dense layout; where it is not contiguous they work on a copy.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import runtime
from . import flops, schema
from .checks import FLOAT_TYPES, check_float_tensor, check_grid, check_scale, concrete, number, rate_tensor
from .mix import MOST_CANDIDATES, candidate_encodings, mix_fake_quantize
from .packed import check_activations, packed_dequantize, packed_linear
from .quantize import fake_quantize, fake_quantize_out_, project_interval_, row_sums, ste_clip_
from .rules import RULES, Rule
from .sam import (
    run_sam_norm,
    run_sam_perturb,
    run_sam_restore,
    sam_average_,
    sam_norm,
    sam_perturb_,
    sam_restore_,
)
from .update import FUNCTIONS, SKEWS, SkewStats, run_skew_direction, run_skew_update, skew_direction_

lowbit_linear, lowbit_dequantize = packed_linear, packed_dequantize  # their names until 0.2

__all__ = [
    "FLOAT_TYPES", "MOST_CANDIDATES", "RULES", "SKEWS", "Rule", "SkewStats", "candidate_encodings", "check_activations",
    "check_float_tensor", "check_grid", "check_scale", "concrete", "fake_quantize", "fake_quantize_out_", "flops",
    "mix_fake_quantize", "number", "packed_dequantize", "packed_linear", "project_interval_", "rate_tensor",
    "row_sums", "run_sam_norm", "run_sam_perturb", "run_sam_restore", "run_skew_direction", "run_skew_update",
    "sam_average_", "sam_norm", "sam_perturb_", "sam_restore_", "skew_direction_", "ste_clip_",
]  # fmt: skip

globals().update(FUNCTIONS)  # skew_sgd_, skew_adamw_ and so on, one for each rule
skew_sgd_, skew_adamw_ = (FUNCTIONS[name] for name in ("skew_sgd_", "skew_adamw_"))  # what type checkers see
__all__ += list(FUNCTIONS)

# ---- where nothing is compiled for a device, the operator is Triton's or the reference's -------------------------

for _device, _key in (("cpu", "CPU"), ("cuda", "CUDA")):
    for _name in schema.SCHEMAS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"askew::{_name}", _key):
            continue

        def _late(*args: Any, _name: str = _name, _device: str = _device) -> Any:
            return runtime.stand_in(_device, _name)(*args)

        schema.library.impl(_name, _late, _key)
