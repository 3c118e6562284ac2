"""Grids: the levels that quantized weights may take, in grid units (a level in weight units is ``scale * level``).

Adding a grid is one class here, with ``kind`` as the kernels know it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..reference import BINARY, CODEBOOK, UNIFORM

GRIDS: dict[str, type[Grid]] = {}


class Grid:
    """Ascending levels c_0 < … < c_(K-1).

    ``levels`` (tuple of floats), ``bits`` (storage bits of a level's index), ``encoding`` ([kind, lo, hi], what the
    kernels read) and ``levels_tensor(device)`` (a codebook's table; empty for the other kinds).
    """

    kind: ClassVar[int]
    levels: Any  # tuple[float, ...]
    bits: Any  # int
    encoding: list[int]
    c_max: float  # what absmax maps the largest weight to: c_(K-1), or max |c| where that is not positive

    def __init_subclass__(cls) -> None:
        GRIDS[cls.__name__.lower()] = cls

    def _describe(self, levels: tuple[float, ...], bits: int) -> None:
        """Sets what follows from the levels, once: plain attributes, which torch.compile reads without tracing code."""
        top = levels[-1] if levels[-1] > 0 else max(abs(c) for c in levels)
        encoding = [self.kind, math.floor(levels[0]), math.ceil(levels[-1])]
        for name, value in (("levels", levels), ("bits", bits), ("encoding", encoding), ("c_max", top)):
            object.__setattr__(self, name, value)

    def levels_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        return _table((), str(device))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``grid_from_dict`` reads it back."""
        return {"grid": type(self).__name__.lower(), **asdict(self)}  # type: ignore[call-overload]


_tables: dict[tuple[tuple[float, ...], str], Tensor] = {}


def _table(levels: tuple[float, ...], device: str) -> Tensor:
    found = _tables.get((levels, device))
    if found is None:
        found = _tables[(levels, device)] = torch.tensor(levels, dtype=torch.float32, device=device)
    return found


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits: expected an int in 2..8, got {bits!r}")
    if bits == 1:
        raise ValueError("bits: expected 2..8, got 1; one bit is Binary()")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2..8, got {bits}")


@dataclass(frozen=True)
class Uniform(Grid):
    """Consecutive integers.

    | arguments | levels |
    |---|---|
    | ``Uniform(k)`` | -2^(k-1) … 2^(k-1) - 1 |
    | ``narrow=True`` | -(2^(k-1) - 1) … 2^(k-1) - 1 |
    | ``inclusive=True`` | -2^(k-1) … 2^(k-1): 2^k + 1 levels, as the published ImageNet code; not packable in k bits |
    | ``signed=False`` | 0 … 2^k - 1 (activations) |

    Raises ValueError for k outside 2…8 and for flags that exclude each other.
    """

    bits: int
    signed: bool = True
    narrow: bool = False
    inclusive: bool = False
    kind: ClassVar[int] = UNIFORM

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.narrow + self.inclusive + (not self.signed) > 1:
            raise ValueError("Uniform: narrow=True, inclusive=True and signed=False exclude each other")

        half = 2 ** (self.bits - 1)
        lo, hi = (-half, half - 1) if self.signed else (0, 2 * half - 1)
        self._describe(tuple(float(c) for c in range(lo + self.narrow, hi + 1 + self.inclusive)), self.bits)


@dataclass(frozen=True)
class Binary(Grid):
    """-1 and +1."""

    kind: ClassVar[int] = BINARY

    def __post_init__(self) -> None:
        self._describe((-1.0, 1.0), bits=1)


@dataclass(frozen=True)
class Ternary(Grid):
    """-1, 0 and +1."""

    kind: ClassVar[int] = UNIFORM

    def __post_init__(self) -> None:
        self._describe((-1.0, 0.0, 1.0), bits=2)


@dataclass(frozen=True, init=False)
class Codebook(Grid):
    """Any 2…256 ascending finite levels, e.g. NF4 or powers of two; kept as float32.

    Raises ValueError where they are too few, too many, not finite or not strictly ascending in float32.
    """

    levels: tuple[float, ...]
    kind: ClassVar[int] = CODEBOOK

    def __init__(self, levels: Iterable[float] | Tensor) -> None:
        values = levels.detach().cpu().flatten().tolist() if isinstance(levels, Tensor) else list(levels)
        if not 2 <= len(values) <= 256:
            raise ValueError(f"levels: expected 2 to 256 levels, got {len(values)}")
        table = torch.tensor([float(v) for v in values], dtype=torch.float32)
        if not bool(table.isfinite().all()):
            raise ValueError("levels: expected finite float32 numbers, got inf or NaN")
        if not bool((table[1:] > table[:-1]).all()):
            raise ValueError(f"levels: expected strictly ascending float32 numbers, got {values}")
        self._describe(tuple((table + 0.0).tolist()), bits=math.ceil(math.log2(len(values))))

    def levels_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        return _table(self.levels, str(device))


def grid_from_dict(d: dict[str, Any]) -> Grid:
    """The inverse of ``Grid.to_dict``. Raises ValueError for an unknown grid or unknown arguments."""
    arguments = dict(d)
    name = arguments.pop("grid", None)
    if name not in GRIDS:
        raise ValueError(f"grid: expected one of {', '.join(sorted(GRIDS))}, got {name!r}")
    try:
        return GRIDS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"grid: {error}") from None
