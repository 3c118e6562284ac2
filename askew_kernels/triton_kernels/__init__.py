"""The operators of ``ops/schema.py`` in Triton: same names, same flat signatures.

Imported by ``runtime`` when Triton is chosen, never by ``import askew_kernels``. Under ``TRITON_INTERPRET=1`` (set
before this import) every kernel runs on CPU tensors.
"""

from .mix import mix_fake_quantize, mix_fake_quantize_backward
from .packed import packed_dequantize_, packed_linear
from .quantize import (
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_out_,
    project_interval_,
    row_sums,
    ste_clip_,
)
from .sam import sam_average_, sam_norm, sam_perturb_, sam_restore_
from .update import OPERATORS

__all__ = [
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_out_",
    "mix_fake_quantize",
    "mix_fake_quantize_backward",
    "packed_dequantize_",
    "packed_linear",
    "project_interval_",
    "row_sums",
    "sam_average_",
    "sam_norm",
    "sam_perturb_",
    "sam_restore_",
    "ste_clip_",
]

globals().update(OPERATORS)  # skew_sgd_, skew_adamw_ and so on
__all__ += list(OPERATORS)
