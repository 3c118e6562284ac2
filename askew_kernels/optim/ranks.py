"""What processes that train together share: sums over the ranks, and who must be told of the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..quant.sharding import local_part, sharding_of


def sum_over_ranks(parts: Iterable[tuple[Tensor, Tensor]], groups: list[dict[str, Any]], shape: tuple[int, ...] = ()
                   ) -> Tensor:  # fmt: skip
    """The sum over all parameters of ``groups``, on all ranks, of float64 tensors of ``shape``.

    parts: (a parameter, what this rank adds for it and others that are sharded alike). A sum is added over the ranks
    that hold parts of its parameters; a rank that has none takes part with zero, in an order that all ranks share.
    """
    sums: dict[Any, Tensor] = {}
    for p, part in parts:
        key = sharding_of(p)
        sums[key] = sums[key] + part.to(sums[key].device) if key in sums else part
    total: Tensor | None = None
    seen = set()
    for p in (p for group in groups for p in group["params"]):
        if (key := sharding_of(p)) in seen:
            continue
        seen.add(key)
        value = sums.get(key)
        if value is None:
            value = torch.zeros(shape, dtype=torch.float64, device=local_part(p).device)
        if key is not None:
            mesh, placements = key
            for dim, placement in enumerate(placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(value, group=mesh.get_group(dim))
        total = value if total is None else total + value.to(total.device)
    assert total is not None  # an optimizer has parameters
    return total


class ProcessGroup:
    """A process group, which copies share; a pickle cannot hold it, and says so."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def mean(self, value: Tensor) -> Tensor:
        """Over the group's ranks; ``value`` itself where nothing is distributed."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return value
        value = value.clone()
        distributed.all_reduce(value, group=self.group)
        return value / distributed.get_world_size(self.group)

    def __deepcopy__(self, memo: dict) -> ProcessGroup:
        return self

    def __reduce__(self) -> Any:
        if self.group is not None:
            warnings.warn(
                "process_group: a pickle cannot hold it; the optimizer that is loaded averages the surrogate gap over "
                "all ranks until its process_group is set",
                stacklevel=2,
            )
        return ProcessGroup, (None,)
