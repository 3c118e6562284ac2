"""Contiguous stand-ins for tensors of other layouts, and the copies back into those that are written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import eager, has_values


def in_place(function: Callable[..., Any], position: int = 0) -> Callable[..., Any]:
    """For a function that writes its argument number ``position`` (a tensor or a list) and records nothing.

    NotImplementedError where autograd has computed what is to be written: its gradient would leave the write out.
    """
    name = function.__code__.co_varnames[position]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            written = args[position] if len(args) > position else kwargs.get(name)
            for t in [written] if isinstance(written, Tensor) else written or ():
                if isinstance(t, Tensor) and t.requires_grad and not t.is_leaf:
                    raise NotImplementedError(
                        f"{name}: askew::{function.__name__} writes in place and is not differentiable, not even once, "
                        "so double backward (create_graph=True) cannot pass through it; "
                        f"detach {name}, or call it under torch.no_grad()"
                    )
        with torch.no_grad():
            return function(*args, **kwargs)

    return checked


def _order(t: Tensor, fixed: int) -> list[int] | None:
    """The permutation that makes ``t`` contiguous and leaves the first ``fixed`` dimensions; None if there is none."""
    strides = t.stride()
    order = [*range(fixed), *sorted(range(fixed, t.dim()), key=lambda d: (-strides[d], d))]
    return order if t.permute(order).is_contiguous() else None


def permuted(t: Tensor, order: list[int] | None) -> Tensor:
    return t if order is None else t.permute(order)


def layout(t: Tensor, rows: int) -> list[int] | None:
    """A permutation that makes ``t`` contiguous without moving it between rows; None to take it as it is."""
    if t.is_contiguous() or t.dim() < 3 or rows not in (1, t.shape[0]):
        return None
    return _order(t, 1)


def shares_partly(x: Tensor, out: Tensor) -> bool:
    """Whether a pass from ``x`` to ``out``, of one shape, might read what it has written: they are different views of
    one memory. Of traced and fake tensors, which copy what they write, there is nothing to ask."""
    if not (eager(x) and eager(out)) or not (has_values(x) and has_values(out)):
        return False
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() or not x.numel():
        return False
    return (x.data_ptr(), x.stride(), x.dtype) != (out.data_ptr(), out.stride(), out.dtype)


class InPlace:
    """Contiguous stand-ins for tensors that are written, and the copies back that some of them need."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []

    def writable(self, t: Tensor, order: list[int] | None = None) -> Tensor:
        view = permuted(t.detach(), order)
        if view.is_contiguous():
            return view
        work = view.contiguous()
        self.copies.append((view, work))
        return work

    def finish(self, written: list[Tensor]) -> None:
        """Copies back, and tells autograd which tensors are ``written``."""
        for target, work in self.copies:
            target.copy_(work)
        torch.autograd.graph.increment_version(written)


class Flat:
    """Lists of equal shapes as contiguous tensors whose elements stand in the same order.

    The usual list, contiguous from end to end, is passed on as it is: a call for each tensor is what a step on a small
    model costs. For use without gradients.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        orders = [None if t.is_contiguous() else _order(t, 0) for t in like]  # channels-last and the like
        self.orders = None if all(order is None for order in orders) else orders
        self.written = InPlace()

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.orders is None:
            return [t if t.is_contiguous() else t.contiguous() for t in tensors]
        return [permuted(t, order).contiguous() for t, order in zip(tensors, self.orders, strict=True)]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.orders is None:
            return [t if t.is_contiguous() else self.written.writable(t) for t in tensors]
        return [self.written.writable(t, order) for t, order in zip(tensors, self.orders, strict=True)]

    def finish(self, *written: Sequence[Tensor]) -> None:
        self.written.finish([t for tensors in written for t in tensors])
