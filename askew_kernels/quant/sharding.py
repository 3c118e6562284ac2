"""Weights that are split over ranks (DTensors of FSDP2 and of tensor parallelism): this rank's part, which scales are
its own, and how the sums of rows come together.

A weight is a matrix of (stack, outputs, inputs), whatever the order of its dimensions (``forms``); its scales stand as
(stack, outputs, groups of inputs). A rank's part is a box of the first, and has a box of the second. Where outputs are
split, and where inputs are split between groups, a scale is one rank's alone; where a row or group itself is cut, its
sums are added over the ranks that have pieces of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import MAX_ABS
from .forms import Form


def is_sharded(t: Tensor) -> bool:
    """A DTensor; asked of the type, which costs least."""
    return hasattr(type(t), "to_local")


def local_part(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def sharding_of(t: Tensor) -> Any:
    """What tells over which ranks sums must be added: a DTensor's mesh and placements; None for a whole tensor."""
    return (t.device_mesh, t.placements) if is_sharded(t) else None  # type: ignore[attr-defined]


def split_by(placements: Sequence[Any]) -> dict[int, int]:
    """{dimension of the mesh: the dimension of the tensor that it splits}."""
    return {d: p.dim for d, p in enumerate(placements) if hasattr(p, "dim")}  # Shard, and FSDP2's over TP's


def made_for_a_part() -> bool:
    """Whether this is called by ZeroRedundancyOptimizer, which makes the optimizer of one rank's part of the parameters
    and tells it nothing of the others. Nothing but the caller tells that part from a whole model."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if module is not None else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
            return True
        frame = frame.f_back
    return False


class Part(NamedTuple):
    """Which scales a rank's part of a weight has: ``box`` of (stack, outputs, groups), whose sizes are ``shape``;
    ``joined`` and ``cut``: the dimensions of the mesh over which the ranks' scales are different ones, and over which
    they are the same, of rows (or groups, or the whole weight) that are cut."""

    shape: tuple[int, int, int]
    box: tuple[slice, slice, slice]
    joined: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()

    def take(self, t: Tensor) -> Tensor:
        """Of a tensor (rows, …) like the scales: this part's; a view where the box is contiguous."""
        return t.reshape(*self.shape, *t.shape[1:])[self.box].reshape(-1, *t.shape[1:])

    def put(self, t: Tensor, part: Tensor) -> None:
        """The inverse: writes this part's into ``t``, which is contiguous."""
        place = t.view(*self.shape, *t.shape[1:])[self.box]
        place.copy_(part.reshape(place.shape))


def part_of(weight: Tensor, scales: int, form: Form) -> Part:
    """The part of a weight with this many scales. Raises NotImplementedError, the same on every rank, where this rank's
    scales would not be a box, or a group would be cut."""
    if not is_sharded(weight):
        return _whole(scales)
    shape, (mesh, placements) = weight.shape, sharding_of(weight)
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    split = {d: dim % len(shape) for d, dim in split_by(placements).items()}
    if not all(d in split or type(p) is Replicate for d, p in enumerate(placements)):
        raise _refused(shape, placements, "holds sums that are not added yet")
    if not split:
        return _whole(scales)
    if scales == 1 and (len(shape) < 2 or shape[0] > 1):  # of the whole tensor
        return _whole(scales)._replace(cut=tuple(split))
    roles = split_roles(len(shape), form)
    if not set(split.values()) <= set(roles):
        raise _refused(shape, placements, "gives a rank pieces of rows that do not follow each other")
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    here = {roles[dim]: slice(offsets[dim], offsets[dim] + sizes[dim]) for dim in roles}
    counts = [shape[dim] for role in (STACK, OUTPUTS) for dim in roles if roles[dim] == role]
    groups = scales // max(1, math.prod(counts))
    box = [here.get(role, slice(0, 1)) for role in (STACK, OUTPUTS)]
    over_inputs = tuple(d for d, dim in split.items() if roles[dim] == INPUTS)
    cut = over_inputs if groups <= 1 else ()
    of_groups = slice(0, groups)
    if over_inputs and groups > 1:
        dim = next(dim for dim, role in roles.items() if role == INPUTS)
        each = math.prod(shape[dim : dim + 1] + shape[max(roles) + 1 :]) // groups  # inputs of a group
        beside = math.prod(shape[max(roles) + 1 :])
        piece = -(-shape[dim] // mesh.size(over_inputs[0])) * beside
        ends = [here[INPUTS].start * beside, here[INPUTS].stop * beside]
        if piece % each or any(end % each for end in ends):
            raise NotImplementedError(
                f"group_size: {each} inputs of a weight of shape {tuple(shape)} share a scale, and {placements} would "
                f"cut them, at multiples of {piece}; use per_channel, or a group size that divides it"
            )
        of_groups = slice(ends[0] // each, ends[1] // each)
    stack, outputs = ([1, 1, *counts])[-2:]
    joined = tuple(d for d in split if d not in cut)
    return Part((stack, outputs, groups), (box[0], box[1], of_groups), joined, cut)


STACK, OUTPUTS, INPUTS = "stack", "outputs", "inputs"


def _whole(scales: int) -> Part:
    return Part((1, 1, scales), (slice(0, 1), slice(0, 1), slice(0, scales)))


def split_roles(dims: int, form: Form) -> dict[int, str]:
    """What the dimensions of a weight are that may be split. A convolution's positions may not, nor anything of a form
    whose rows are not in the order of a dimension."""
    if form.groups > 1:
        return {}
    if dims < 2:
        return {0: INPUTS}
    order = [INPUTS, OUTPUTS] if form.transposed else [OUTPUTS, INPUTS]
    return dict(enumerate([STACK] * form.stacked + order))


def _refused(shape: Sequence[int], placements: Any, why: str) -> NotImplementedError:
    return NotImplementedError(f"weight: one of shape {tuple(shape)} that is sharded by {placements} {why}; leave this "
                               "layer to torch.optim (no grid), or shard its outputs or inputs")  # fmt: skip


def join_sums(parts: Sequence[Part], pieces: Sequence[Tensor], sharding: tuple[Any, Any]) -> list[Tensor]:
    """What every rank is told of weights of one sharding: of each the whole (scales, n) float32, whose first columns
    are the sums of rows, from this rank's piece. All ranks must call it.

    Where no row is cut that is one sum over the ranks, of numbers that are zero where another rank's rows are, and so
    exact. Sums of cut rows are added in float64.
    """
    mesh, placements = sharding
    exact = not any(part.cut for part in parts)
    wholes = []
    for part, piece in zip(parts, pieces, strict=True):
        whole = piece.new_zeros(math.prod(part.shape), piece.shape[1], dtype=torch.float32 if exact else torch.float64)
        part.put(whole, piece.to(whole.dtype))
        wholes.append(whole)
    joined = torch.cat(wholes)
    peaks = None if exact else joined[:, MAX_ABS].contiguous()
    for dim in split_by(placements):
        group = mesh.get_group(dim)
        torch.distributed.all_reduce(joined, group=group)
        if peaks is not None:
            torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX, group=group)
    if peaks is not None:  # NaN passes through the sum
        joined[:, MAX_ABS] = torch.where(joined[:, 0].isnan(), joined[:, 0], peaks)
    return [whole.float() for whole in joined.split([len(whole) for whole in wholes])]
