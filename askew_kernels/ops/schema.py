"""The entries of the operators ``askew::…``: what torch is told of each follows from its one ``define``.

Arguments shared by all of them:

* a tensor is seen as (rows, cols) with ``rows = scale.numel()``; it is contiguous, ``scale`` is float32;
* ``grid`` is ``[kind, lo, hi]`` with kind 1 uniform, 2 binary, 3 codebook (``contract``); ``levels`` holds a codebook's
  levels (float32, on the tensor's device) and is empty otherwise; lists of tensors take ``grids``, three integers a
  tensor;
* ``lr``, ``eps`` and ``step`` are 0-dim float tensors (CPU, or on the device), so that schedules never recompile;
  ``step`` counts from 1, and is None for a rule that does not ask for it;
* ``states`` holds a rule's buffers, each for all parameters, one after the other (``rules.RULES``); none where SGD has
  no momentum. ``numbers`` are its hyper-parameters;
* in a list, a tensor without elements stands for "absent";
* ``kept``, ``firsts`` and ``coefficients`` (beside ``firsts``) are a sharpness-aware step's: ``kept`` is
  read in place of the parameter, the mean of gradient and first gradient in place of the gradient;
* ``scales`` is float32 (candidates, rows), ``strengths`` float32 (candidates,), with ``grids`` of three integers a
  candidate, where kind 0 is no quantization at all;
* ``adaptive`` is 0 or 1 for each tensor; ``coefficients`` is float32 (c, a), on the tensors' device;
* ``codes`` is uint8 (n, row_bytes), level indices of ``bits`` bits each, 0 standing for five trits a byte
  (docs/packed.md).

Implementations: C++ (``csrc``; for the CPU all of them, for CUDA all but ``packed_linear_int8``,
``packed_linear_bf16``, those of bands, ``level_product``, ``stochastic_levels`` and ``luq``), ``triton_kernels`` (all
but the first of these up to ``level_product``) and ``reference`` (all), under the operator's name; ``runtime`` chooses.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import runtime
from .autograd import autograd_kernel, refuse

library = torch.library.Library("askew", "DEF")


class Operator(NamedTuple):
    """An entry; see ``define``."""

    schema: str
    derivative: Callable
    flops: Callable[..., int] | None


OPERATORS: dict[str, Operator] = {}


def define(
    name: str, schema: str, *, fake: Callable = lambda *_args: None, derivative: Callable = refuse,
    batch: Callable | None = None, flops: Callable[..., int] | None = None,
) -> None:  # fmt: skip
    """Registers ``askew::<name>`` for tracing, differentiation, torch.func.vmap and every device.

    fake: outputs without values, from the arguments; derivative: see ``autograd``, none by default; batch: ``vmap`` as
    ``batch(operator, info, in_dims, *args)``; flops: operations, from the shapes of the arguments.
    """
    OPERATORS[name] = Operator(schema, derivative, flops)
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = runtime.registered[name] = getattr(torch.ops.askew, name).default
    torch.library.register_fake(f"askew::{name}", fake, lib=library)
    library.impl(name, autograd_kernel(op, derivative), "Autograd", with_keyset=True)
    if batch is not None:
        rule = batch
        torch.library.register_vmap(f"askew::{name}", lambda *args: rule(op, *args), lib=library)
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"askew::{name}", key):  # not compiled for it
            library.impl(name, _stand_in(device, name), key)


def _stand_in(device: str, name: str) -> Callable:
    return lambda *args: runtime.stand_in(device, name)(*args)


def like_first(x: Tensor, *_args: Any) -> Tensor:
    """The fake of an operator that gives a contiguous tensor like its first argument."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


FLOP_COUNTER = "torch.utils.flop_counter"  # it counts only what it has formulas of


def _add_formulas(counter: ModuleType) -> None:
    for name, operator in OPERATORS.items():
        if operator.flops is not None:
            counter.register_flop_formula(getattr(torch.ops.askew, name))(operator.flops)


class _WhenImported(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _add_formulas(module)

        spec.loader.exec_module = exec_module
        return spec


def count_flops() -> None:
    """Tells torch's counter all formulas, when somebody imports it: it imports Triton, half a second."""
    if FLOP_COUNTER in sys.modules:
        _add_formulas(sys.modules[FLOP_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
