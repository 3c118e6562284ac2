"""Batches as users have them: tensors alone or inside tuples, lists, mappings and dataclasses, however deep."""

from __future__ import annotations

import copy
import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def _parts(x: Any) -> list[Any]:
    """What a container holds, in order; of anything else nothing."""
    if isinstance(x, Mapping):  # also BatchEncoding and the like, which are no dict
        return list(x.values())
    if isinstance(x, (tuple, list)):
        return list(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [getattr(x, f.name) for f in dataclasses.fields(x)]
    return []


def tensors_of(x: Any) -> Iterator[Tensor]:
    """Every tensor in ``x``, in order."""
    if isinstance(x, Tensor):
        yield x
    for part in _parts(x):
        yield from tensors_of(part)


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """``x`` with ``function(t)`` for every tensor t: a container of the same type, or ``x`` where nothing changes."""
    if isinstance(x, Tensor):
        return function(x)
    parts = _parts(x)
    made = [map_tensors(function, part) for part in parts]
    if all(new is old for new, old in zip(made, parts, strict=True)):
        return x
    if isinstance(x, (tuple, list)):
        return type(x)(*made) if hasattr(x, "_fields") else type(x)(made)  # type: ignore[call-arg]
    new, put = copy.copy(x), operator.setitem if isinstance(x, Mapping) else object.__setattr__  # frozen ones too
    for name, value in zip(x if isinstance(x, Mapping) else [f.name for f in dataclasses.fields(x)], made, strict=True):
        put(new, name, value)
    return new


def moved(x: Any, device: torch.device | None = None) -> Any:
    """``x`` as autograd can use it: on ``device``, and copies of what was made under ``torch.inference_mode``."""

    def move(t: Tensor) -> Tensor:
        t = t if device is None else t.to(device)
        return t.clone() if t.is_inference() else t

    return map_tensors(move, x)


def check_count(name: str, value: Any) -> None:
    """ValueError unless it is an int from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value!r}")


def check_iterable(name: str, value: Any, expected: str) -> None:
    """ValueError for what no loop takes."""
    if not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
        raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")


def samples(x: Any) -> int:
    """How many samples a batch has: the first dimension of its first tensor that has one.

    Warns where another tensor says otherwise (1 goes with anything), and where a container holds no such tensor, which
    then counts as one sample.
    """
    sizes = [t.size(0) for t in tensors_of(x) if t.dim()]
    if not sizes:
        if not isinstance(x, Tensor):
            warnings.warn(f"batch: found no tensor with a first dimension in a {type(x).__name__}; it counts as one "
                          "sample", stacklevel=3)  # fmt: skip
        return 1
    if other := [n for n in sizes if n not in (1, sizes[0])]:
        warnings.warn(f"batch: its first tensor speaks of {sizes[0]} samples, another of {other[0]}; it counts as "
                      f"{sizes[0]}", stacklevel=3)  # fmt: skip
    return sizes[0]


def pair_of(batch: Any, expected: str) -> tuple[Any, Any]:
    """(x, y); ValueError, opening with ``expected``, for anything else."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    hint = '; make pairs of mappings: [(b, b["labels"]) for b in batches]' if isinstance(batch, Mapping) else ""
    raise ValueError(f"{expected}, got a {type(batch).__name__}{size}{hint}")


def batches_of(data: Any) -> list[tuple[Any, Any]]:
    """[(x, y), …] of one pair or of anything that yields pairs; ValueError where there are none.

    Two pairs in a tuple or list are two batches, not one pair.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2:
        pairs = all(isinstance(part, (tuple, list)) and len(part) == 2 for part in data)
        if any(isinstance(part, Tensor) for part in data) or (isinstance(data, tuple) and not pairs):
            return [(moved(data[0]), moved(data[1]))]
    if isinstance(data, Mapping):
        raise ValueError(f"data: expected (x, y) or batches of them, got a {type(data).__name__}")
    check_iterable("data", data, "(x, y) or batches of them")
    found = [pair_of(item, "data: expected (x, y) or batches of them") for item in data]
    if not found:
        raise ValueError("data: yielded no batch")
    return [(moved(x), moved(y)) for x, y in found]
