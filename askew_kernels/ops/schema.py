"""The operators ``askew::…``: their schemas and fake kernels, one home for both.

Arguments shared by all of them:

* a tensor is seen as (rows, cols) with ``rows = scale.numel()``; it is contiguous, ``scale`` is float32;
* ``grid`` is ``[kind, lo, hi]`` with kind 1 uniform, 2 binary, 3 codebook (``csrc/math/types.h``); ``levels`` holds a
  codebook's levels (float32, on the tensor's device) and is empty otherwise; lists of tensors take ``grids``, three
  integers a tensor;
* ``lr``, ``eps`` and ``step`` are 0-dim float tensors (CPU, or on the device), so that schedules never recompile;
  ``step`` counts from 1, and is None for a rule that does not ask for it;
* ``states`` holds a rule's buffers, each for all parameters, one after the other (``rules.RULES``); none where SGD has
  no momentum. ``numbers`` are its hyper-parameters;
* in a list, a tensor without elements stands for "absent";
* ``kept``, ``firsts`` and ``coefficients`` (beside ``firsts``) are a sharpness-aware step's: ``kept`` is
  read in place of the parameter, the mean of gradient and first gradient in place of the gradient;
* ``scales`` is float32 (candidates, rows), ``strengths`` float32 (candidates,), with ``grids`` of three integers a
  candidate, where kind 0 is no quantization at all;
* ``adaptive`` is 0 or 1 for each tensor; ``coefficients`` is float32 (c, a), on the tensors' device.
* ``codes`` is uint8 (n, row_bytes), level indices of ``bits`` bits each, 0 standing for five trits a byte
  (docs/packed.md);

Implementations: C++ for CPU and CUDA (``csrc``), ``triton_kernels``, ``reference``; ``runtime`` chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import NUM_ROW_SUMS
from .rules import RULES

_SKEW = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor[] scales, Tensor[] levels, int[] grids,"
    " Tensor(x!)[] dequantized, Tensor(y!)[] row_sums, Tensor(z!)[] totals, Tensor? step, Tensor lr, Tensor eps,"
    " float alpha, float[] numbers, bool direction, bool clamp, bool maximize, bool skip_nonfinite,"
    " Tensor[]? kept=None, Tensor[]? firsts=None, Tensor? coefficients=None) -> ()"
)

SCHEMAS = {
    "fake_quantize": "(Tensor x, Tensor scale, Tensor levels, int[] grid, bool ste_clip, bool stochastic, int seed)"
    " -> Tensor",
    "fake_quantize_out_": "(Tensor x, Tensor scale, Tensor levels, int[] grid, Tensor(a!) out) -> ()",
    "fake_quantize_backward": "(Tensor grad, Tensor x, Tensor scale, Tensor levels, int[] grid) -> Tensor",
    "ste_clip_": "(Tensor(a!) grad, Tensor x, Tensor scale, Tensor levels, int[] grid) -> ()",
    "mix_fake_quantize": "(Tensor x, Tensor scales, Tensor strengths, int[] grids, bool ste_clip, bool learned)"
    " -> Tensor",
    "mix_fake_quantize_backward": "(Tensor grad, Tensor x, Tensor scales, Tensor strengths, int[] grids, bool ste_clip,"
    " bool learned) -> (Tensor, Tensor, Tensor)",
    "project_interval_": "(Tensor(a!) w, Tensor scale, Tensor levels, int[] grid, Tensor eps) -> ()",
    "row_sums": "(Tensor x, int rows) -> Tensor",
    "packed_dequantize_": "(Tensor codes, Tensor scale, Tensor levels, int[] grid, int bits, Tensor(a!) out) -> ()",
    "packed_linear": "(Tensor x, Tensor codes, Tensor scale, Tensor levels, int[] grid, int bits, Tensor? bias)"
    " -> Tensor",
    "packed_linear_int8": "(Tensor x, Tensor codes, Tensor scale, Tensor levels, int[] grid, int bits, Tensor? bias)"
    " -> Tensor",
    "sam_norm": "(Tensor[] params, Tensor[] grads, int[] adaptive, float eta) -> Tensor",
    "sam_perturb_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] kept, Tensor coefficients, int[] adaptive,"
    " float eta) -> ()",
    "sam_restore_": "(Tensor(a!)[] params, Tensor[] kept) -> ()",
    "sam_average_": "(Tensor(a!)[] grads, Tensor[] firsts, Tensor coefficients) -> ()",
    **{rule.operator: _SKEW for rule in RULES.values()},
}

library = torch.library.Library("askew", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _fake_quantize(x: Tensor, *_args) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _mix_backward(grad: Tensor, x: Tensor, scales: Tensor, strengths: Tensor, *_args) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_quantize(x), torch.empty_like(strengths), torch.empty_like(scales)


def _row_sums(x: Tensor, rows: int) -> Tensor:
    return x.new_empty((rows, NUM_ROW_SUMS), dtype=torch.float32)


def _sam_norm(params: list[Tensor], *_args) -> Tensor:
    return params[0].new_empty((), dtype=torch.float64)


def _packed_linear(x: Tensor, codes: Tensor, *_args) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


_FAKES = {
    "fake_quantize": _fake_quantize, "fake_quantize_backward": _fake_quantize, "row_sums": _row_sums,
    "mix_fake_quantize": _fake_quantize, "mix_fake_quantize_backward": _mix_backward,
    "sam_norm": _sam_norm,
    "packed_linear": _packed_linear, "packed_linear_int8": _packed_linear,
}  # fmt: skip
for _name in SCHEMAS:
    torch.library.register_fake(f"askew::{_name}", _FAKES.get(_name, lambda *_args: None), lib=library)
