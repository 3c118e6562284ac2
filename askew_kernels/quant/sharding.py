"""Weights that are split over ranks (FSDP2's DTensors): this rank's part, and its rows of the scales."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded(t: Tensor) -> bool:
    """A DTensor; asked of the type, which costs least."""
    return hasattr(type(t), "to_local")


def local_part(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def sharding_of(t: Tensor) -> Any:
    """What tells over which ranks sums must be added: a DTensor's mesh and placements; None for a whole tensor."""
    return (t.device_mesh, t.placements) if is_sharded(t) else None  # type: ignore[attr-defined]


def refuse_learned(weight: Tensor, who: str) -> None:
    """NotImplementedError for the weight of a learned scale, of which every rank would have a part of the gradient."""
    if is_sharded(weight):
        raise NotImplementedError(f"scale: 'lsq' of {who} with a weight of shape {tuple(weight.shape)}: a learned "
                                  "scale does not go with a weight that is sharded over ranks; leave this layer out "
                                  "of fully_shard, use DistributedDataParallel, or another rule")  # fmt: skip


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


def own_rows(weight: Tensor, rows: int) -> slice:
    """Which of the weight's ``rows`` scales belong to this rank's part; all of them where it is whole.

    Raises NotImplementedError where a scale would belong to more than one rank's part: a weight that is split along
    another dimension than the first, or one scale for the whole tensor.
    """
    if not is_sharded(weight) or not any(p.is_shard() for p in weight.placements):  # type: ignore[attr-defined]
        return slice(0, rows)
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = sharding_of(weight)
    if not all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in placements):
        raise NotImplementedError(f"weight: a quantized weight may be sharded along its first dimension only, got "
                                  f"{placements}; leave this layer to torch.optim (no grid), or shard it by "
                                  "fully_shard alone")  # fmt: skip
    if rows % weight.shape[0]:
        raise NotImplementedError(f"granularity: {rows} scale(s) for a weight of shape {tuple(weight.shape)} that is "
                                  "sharded over ranks; use per_channel or per_group")  # fmt: skip
    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    each = rows // weight.shape[0]
    return slice(offset[0] * each, (offset[0] + shape[0]) * each)
