"""Derivatives of the operators: reverse and forward mode, of any order, alone and under torch.func's transforms.

One formula, beside the operator's entry, serves the registered operator (a kernel for torch's Autograd key) and a
forced backend. The formulas are made of differentiable operators, so that derivatives of them are right too. An
operator without one refuses tensors that are being differentiated: NotImplementedError, never zeros.

A derivative is called as ``derivative(name, run, args)`` when an argument is being differentiated; ``run(*args)``
computes the operator with nothing recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import runtime


def transformed() -> bool:
    """Inside torch.func's grad, vmap, jvp, …, or at a forward-mode level."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _tangent(t: Any) -> bool:
    if isinstance(t, (list, tuple)):
        return any(map(_tangent, t))
    if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):  # of others torch has no views
        return False
    return forward_ad.unpack_dual(t, level=0).tangent is not None  # torch has one level, 0


def tracked(args: tuple) -> bool:
    """Whether the call is recorded: an argument requires grad, or has a forward-mode tangent."""
    return (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or (transformed() and _tangent(args))


def by_operators(grad: Tensor) -> bool:
    """Whether a backward makes gradients by differentiable operators, not in place: they are to be differentiated again
    (create_graph), or several come as one tensor (is_grads_batched, vmap over autograd.grad)."""
    if torch.is_grad_enabled():
        return True
    of = torch._C._functorch
    return not torch.compiler.is_compiling() and (of.is_legacy_batchedtensor(grad) or of.is_batchedtensor(grad))


def below_autograd(name: str, like: Tensor, *args: Any) -> Any:
    """Operator ``name`` on tensors of which nothing is to be recorded; spares the call into the kernels made here."""
    function = runtime.operator(name, like)
    if torch.compiler.is_compiling() or not isinstance(function, torch._ops.OpOverload):
        return function(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return function(*args)


def differentiable(name: str, derivative: Callable, args: tuple) -> Any:
    """Operator ``name``, recorded whatever the backend: torch's dispatcher does that for the registered one, and
    ``derivative`` for an implementation that is called directly."""
    function = runtime.operator(name, args[0])
    return function(*args) if isinstance(function, torch._ops.OpOverload) else derivative(name, function, args)


def refuse(name: str, run: Callable, args: tuple) -> Any:
    """The derivative of an operator that has none."""
    raise NotImplementedError(
        f"askew::{name} has no derivative, but one of its tensors is being differentiated (it requires grad or has a "
        "forward-mode tangent): pass detached tensors, or call it under torch.no_grad()"
    )


def autograd_kernel(op: torch._ops.OpOverload, derivative: Callable) -> Callable:
    """What torch's Autograd key runs: ``derivative`` where something is recorded, and writes are counted."""
    name = op._schema.name.removeprefix("askew::")
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        def run(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        result = derivative(name, run, args) if tracked(args) else run(*args)
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return result

    return kernel


def one_by_one(run: Callable, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """torch.func.vmap by a call for each element of the batch."""
    each = [run(*(a.select(d, i).contiguous() if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)]  # fmt: skip
    if isinstance(each[0], tuple):
        return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
    return torch.stack(each), 0
