"""What processes that train together share: sums over the ranks, and who must be told of the others."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..quant.sharding import local_part, sharding_of, split_by


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
    shardings: dict[Any, Tensor] = {}
    for p in (p for group in groups for p in group["params"]):
        shardings.setdefault(sharding_of(p), p)
    totals = []
    for key, p in shardings.items():
        value = sums[key] if key in sums else torch.zeros(shape, dtype=torch.float64, device=local_part(p).device)
        for dim in split_by(key[1]) if key else ():
            torch.distributed.all_reduce(value, group=key[0].get_group(dim))
        totals.append(value)
    return functools.reduce(lambda total, value: total + value.to(total.device), totals)


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
            warnings.warn("process_group: a pickle cannot hold it; the optimizer that is loaded averages the surrogate "
                          "gap over all ranks until its process_group is set", stacklevel=2)  # fmt: skip
        return ProcessGroup, (None,)
