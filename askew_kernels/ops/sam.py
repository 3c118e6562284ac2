"""Sharpness-aware passes over a list of tensors: norm, perturbation, restore, average."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import compute_dtype
from .autograd import below_autograd
from .checks import check_like, check_lists, number
from .dense import Flat, in_place
from .schema import define

__all__ = [
    "run_sam_norm", "run_sam_perturb", "run_sam_restore", "sam_average_", "sam_norm", "sam_perturb_",
    "sam_restore_",
]  # fmt: skip


def _define(name: str, schema: str, **entry: Any) -> Callable[..., Any]:
    """Defines an operator over lists of equal shapes; returns it without checks, for the optimizer."""
    define(name, schema, **entry)
    writes = re.findall(r"Tensor(\(.!\))?\[\]", schema)  # for each list, what marks it as written or ""

    def run(*args: Any) -> Any:
        flat = Flat(args[0])
        lists = [flat.write(tensors) if w else flat.read(tensors) for w, tensors in zip(writes, args, strict=False)]
        result = below_autograd(name, args[0][0], *lists, *args[len(lists) :])
        flat.finish(*(tensors for w, tensors in zip(writes, args, strict=False) if w))
        return result

    run.__name__ = run.__qualname__ = f"run_{name.rstrip('_')}"
    run.__doc__ = f"The operator ``askew::{name}`` over lists of equal shapes, without checks: ``{schema}``."
    return run


run_sam_norm = _define("sam_norm", "(Tensor[] params, Tensor[] grads, int[] adaptive, float eta) -> Tensor",
                       fake=lambda params, *_args: params[0].new_empty((), dtype=torch.float64))  # fmt: skip
run_sam_perturb = _define("sam_perturb_", "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] kept, Tensor coefficients"
                          ", int[] adaptive, float eta) -> ()")  # fmt: skip
run_sam_restore = _define("sam_restore_", "(Tensor(a!)[] params, Tensor[] kept) -> ()")
_run_average = _define("sam_average_", "(Tensor(a!)[] grads, Tensor[] firsts, Tensor coefficients) -> ()")


def _adaptive_flags(adaptive: bool | Sequence[bool], params: Sequence[Tensor]) -> list[int]:
    flags = [adaptive] * len(params) if isinstance(adaptive, bool) else list(adaptive)
    if len(flags) != len(params) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"adaptive: expected a bool or {len(params)}, one for each parameter, got {adaptive!r}")
    return [int(flag) for flag in flags]


@torch.no_grad()
def sam_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor], *, adaptive: bool | Sequence[bool] = False, eta: float = 0.01
) -> Tensor:
    """sum (T g)^2 over the whole list, in one read of it: the *square* of the norm, so that ranks can add theirs.

    T = |w| + eta where ``adaptive``, 1 elsewhere. params, grads: lists of equal shapes and dtypes on one device.
    Returns a 0-dim float64 tensor on that device, the same bits every time and for every number of threads; squares
    are float32, so elements below 1e-23 count as 0 and elements above 1e19 make it inf.
    Raises TypeError/ValueError naming the argument. Source: Kwon et al., ASAM, ICML 2021; docs/mathematics.md, 4.
    """
    if not len(params):
        raise ValueError("params: expected at least one tensor")
    check_lists(params, grads=grads)
    return run_sam_norm(params, grads, _adaptive_flags(adaptive, params), number("eta", eta, 0.0))


@in_place
def sam_perturb_(
    params: Sequence[Tensor], grads: Sequence[Tensor], kept: Sequence[Tensor], coefficients: Tensor, *,
    adaptive: bool | Sequence[bool] = False, eta: float = 0.01,
) -> None:  # fmt: skip
    """kept = w, bit for bit, and w <- w + (c T^2 - a) g, in one pass over the list.

    SAM and ASAM: c = rho / |T g|, a = 0; an aligned step (SAGM) takes a g back. coefficients: (c, a) as a tensor of
    shape (2,), float32, on the device of params (no synchronisation); c = a = 0 leaves every w as it is, also where g
    is inf or NaN. T = |w| + eta where ``adaptive``, 1 elsewhere. kept: tensors like params, overwritten.
    Raises TypeError/ValueError naming the argument before anything is written.
    Source: Foret et al., SAM, ICLR 2021; Kwon et al., ASAM, ICML 2021; Wang et al., SAGM, CVPR 2023.
    """
    if not len(params):
        return
    check_lists(params, written=("params", "kept"), grads=grads, kept=kept)
    check_like("coefficients", coefficients, compute_dtype(params[0].dtype), (2,), params[0].device)
    run_sam_perturb(params, grads, kept, coefficients, _adaptive_flags(adaptive, params), number("eta", eta, 0.0))


@in_place
def sam_restore_(params: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """w = kept, bit for bit, over a list of tensors in one pass.

    Raises TypeError/ValueError naming the argument before anything is written.
    """
    if not len(params):
        return
    check_lists(params, written=("params",), kept=kept)
    run_sam_restore(params, kept)


@in_place
def sam_average_(grads: Sequence[Tensor], firsts: Sequence[Tensor], coefficients: Tensor) -> None:
    """g <- (g + first) / 2 in place, the gradient of an aligned step; c = a = 0 in ``coefficients`` leaves g as it is.

    The coefficients are those of the perturbation: where it did not take place, the first gradients were zero, inf or
    NaN. Raises TypeError/ValueError naming the argument before anything is written. Source: SAGM, CVPR 2023.
    """
    if not len(grads):
        return
    check_lists(grads, "grads", ("grads",), firsts=firsts)
    check_like("coefficients", coefficients, compute_dtype(grads[0].dtype), (2,), grads[0].device)
    _run_average(grads, firsts, coefficients)
