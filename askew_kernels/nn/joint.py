"""What ranks have in common whose layers' weights are split.

Learned numbers (scales, offsets): every rank has them whole, as a DTensor that is replicated over the mesh of the
weight, and their gradients come together in the backward. FSDP2 would cut them, cast them with the weights, and wants
all that it manages to be of one type; tensor parallelism would split them by rows that are none. Neither is shown them.

Of inputs that are split: the largest magnitudes of tokens, and the bias, which one rank adds.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.sharding import is_sharded, local_part, sharding_of, split_by

_STYLES = ("_partition_linear_fn", "_partition_embedding_fn")  # torch's functions that split a layer's Parameters
_MANAGER = "_get_managed_states"  # FSDP2's, which lists what it is to manage


def being_split() -> bool:
    """Whether the caller's caller is a style of tensor parallelism that looks for what to split."""
    return sys._getframe(2).f_code.co_name in _STYLES


def being_distributed() -> bool:
    """Whether the caller's caller applies such a style to a module and all that is within it."""
    return sys._getframe(2).f_code.co_name == "distribute_module"


def being_managed() -> bool:
    """Whether FSDP2 asks, itself or by ``parameters()``."""
    frame: Any = sys._getframe(2)
    return any(f is not None and f.f_code.co_name == _MANAGER for f in (frame, frame.f_back))


def replicated(p: nn.Parameter, beside: Any) -> nn.Parameter:
    """``p`` as every rank of the mesh of ``beside`` has it whole: the same numbers, on the device of its part."""
    from torch.distributed.tensor import Replicate

    mesh, part = beside.device_mesh, local_part(beside.detach())
    with torch.no_grad():
        mine = local_part(p.detach()).to(part.device)
        made = type(beside).from_local(mine, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return nn.Parameter(made, p.requires_grad)


def is_beside(p: Any, weight: Any) -> bool:
    """Whether ``p`` stands on the mesh of ``weight`` already."""
    return is_sharded(p) and p.device_mesh == weight.device_mesh


class _Copy(torch.autograd.Function):
    """This rank's copy, whose gradient is that of all: added over some dimensions of the mesh, averaged over others."""

    @staticmethod
    def forward(ctx: Any, p: Any, device: Any, added: tuple[int, ...], averaged: tuple[int, ...]) -> Tensor:
        ctx.sharding, ctx.added, ctx.averaged = sharding_of(p), added, averaged
        ctx.kind, ctx.device = type(p), p.device
        return local_part(p).detach().to(device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None, None, None]:
        mesh, placements = ctx.sharding
        total = grad.detach().clone(memory_format=torch.contiguous_format)
        for dim in (*ctx.added, *ctx.averaged):
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
        total /= math.prod(mesh.size(dim) for dim in ctx.averaged)
        return ctx.kind.from_local(total.to(ctx.device), mesh, placements, run_check=False), None, None, None


def copy_of(p: Any, of: Tensor) -> Any:
    """What a forward computes with: ``p`` itself, or this rank's copy of it.

    of: the weight or input that it belongs to, as this forward has it. Ranks that split it have a part of the gradient
    each. Those that it knows nothing of have other data (FSDP2 has gathered it): their gradients are averaged, as FSDP2
    averages the weight's.
    """
    if not is_sharded(p):
        return p
    if not (torch.is_grad_enabled() and p.requires_grad):
        return local_part(p).to(of.device)
    known = sharding_of(of)
    outer = p.device_mesh.ndim - (0 if known is None else known[0].ndim)
    added = () if known is None else tuple(outer + dim for dim in split_by(known[1]))
    return _Copy.apply(p, of.device, added, tuple(range(outer)))


@torch.no_grad()
def joint_tops(x: Tensor, mesh: Any) -> Tensor:
    """(rows,) max|x| of each row over the ranks of a mesh of one dimension that have its columns, in the type of x; inf
    for a row that is not finite. All ranks must call it; one number a row is told."""
    tops = x.detach().abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    tops = torch.where(tops.isfinite(), tops, torch.full_like(tops, math.inf))
    wide = tops if tops.dtype == torch.float64 else tops.float()
    torch.distributed.all_reduce(wide, torch.distributed.ReduceOp.MAX, group=mesh.get_group(0))
    return wide.to(x.dtype)


class _OnFirst(torch.autograd.Function):
    """What the first rank adds to a sum over ranks and the others do not; its gradient is on all of them."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, first: bool) -> Tensor:
        return bias.detach() if first else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def bias_of(bias: Any, mesh: Any, added: bool, dtype: torch.dtype) -> Tensor | None:
    """This rank's part of a bias, or what it adds to the sums of all where outputs are ``added`` over the ranks."""
    if bias is None:
        return None
    mine = (bias.to_local() if is_sharded(bias) else bias).to(dtype)
    return _OnFirst.apply(mine, mesh.get_local_rank() == 0) if added else mine
