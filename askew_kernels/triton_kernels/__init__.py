"""The operators of ``ops/schema.py`` in Triton: same names, same flat signatures.

Imported by ``runtime`` when Triton is chosen, never by ``import askew_kernels``. Under ``TRITON_INTERPRET=1`` (set
before this import) every kernel runs on CPU tensors.
"""

from .elementwise import (
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_out_,
    project_interval_,
    row_sums,
    ste_clip_,
)
from .lowbit import lowbit_dequantize_, lowbit_linear
from .mix import mix_fake_quantize, mix_fake_quantize_backward
from .sam import sam_average_, sam_norm, sam_perturb_, sam_restore_
from .update import skew_adamw_, skew_sgd_

__all__ = [
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_out_",
    "lowbit_dequantize_",
    "lowbit_linear",
    "mix_fake_quantize",
    "mix_fake_quantize_backward",
    "project_interval_",
    "row_sums",
    "sam_average_",
    "sam_norm",
    "sam_perturb_",
    "sam_restore_",
    "skew_adamw_",
    "skew_sgd_",
    "ste_clip_",
]
