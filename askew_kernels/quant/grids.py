"""Grids: the levels that quantized weights may take, in grid units (a level in weight units is ``scale * level``).

Adding a grid is one class here: all that others ask of it follows from its levels.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..contract import BINARY, CODEBOOK, UNIFORM

__all__ = ["FP4", "NF4", "Binary", "Codebook", "Grid", "Midrise", "PowersOfTwo", "Ternary", "Uniform", "grid_from_dict"]

GRIDS: dict[str, type[Grid]] = {}


class Counted(NamedTuple):
    """Levels among consecutive integers, as products of bytes read them: level_i = factor (lowest + codes[i])."""

    encoding: list[int]  # of the consecutive integers
    bits: int
    codes: tuple[int, ...]
    factor: float  # a power of two


class Grid:
    """Ascending levels c_0 < … < c_(K-1), float32 numbers; a subclass gives them as ``table``.

    What others ask: ``levels`` (tuple of floats), ``bits`` (storage bits of a level's index), ``encoding`` ([how the
    kernels read the levels, lowest, highest]), ``levels_tensor(device)`` (the levels that they look up; empty where
    they count), ``c_max``, ``evenly_spaced``, ``mean_factor``, ``integers()``, ``counted``.
    """

    table: ClassVar[tuple[float, ...]]
    read_as: ClassVar[int] = CODEBOOK
    mean_factor: ClassVar[float | None] = None  # the scale rule ``mean`` is this times mean|w|; None: it has no meaning
    levels: Any  # tuple[float, ...]
    bits: Any  # int
    encoding: list[int]
    counted: Counted | None = None  # as grids have it that an earlier release pickled
    c_max: float  # what absmax maps the largest weight to: c_(K-1), or max |c| where that is not positive

    def __init_subclass__(cls) -> None:
        GRIDS[cls.__name__.lower()] = cls

    def __post_init__(self) -> None:
        self._describe(self.table)

    def _describe(self, levels: tuple[float, ...], bits: int | None = None) -> None:
        """Sets what follows from the levels, once: plain attributes, which torch.compile reads without tracing code."""
        bits = bits or (len(levels) - 1).bit_length()
        top = levels[-1] if levels[-1] > 0 else max(abs(c) for c in levels)
        encoding = [self.read_as, math.floor(levels[0]), math.ceil(levels[-1])]
        for name, value in (("levels", levels), ("bits", bits), ("encoding", encoding), ("c_max", top)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "counted", self._counted())

    @property
    def evenly_spaced(self) -> bool:
        """The kernels count from the lowest level on, instead of looking levels up."""
        return self.read_as != CODEBOOK

    def levels_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        return _table(self.levels if self.read_as == CODEBOOK else (), str(device))

    def integers(self) -> tuple[tuple[int, ...], float] | None:
        """(n, f) with level_i = f n_i exactly, f the largest of 1, 1/2 … 1/128 that makes integers of them all: a
        weight s c is (s f) n, to the bit. None where none does."""
        for f in (2.0**-k for k in range(8)):
            if all((c / f).is_integer() for c in self.levels):
                return tuple(int(c / f) for c in self.levels), f
        return None

    def _counted(self) -> Counted | None:
        """Of levels that are looked up: their places among consecutive integers; None where they are no integers
        times a power of two, or lie 256 apart and more."""
        if self.read_as != CODEBOOK or (found := self.integers()) is None:
            return None
        (lowest, *_, highest), factor = found
        if highest - lowest > 255 or lowest < -128 or highest > 255:
            return None
        codes = tuple(n - lowest for n in found[0])
        return Counted([UNIFORM, lowest, highest], max(2, codes[-1].bit_length()), codes, factor)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``grid_from_dict`` reads it back."""
        return {"grid": type(self).__name__.lower(), **asdict(self)}  # type: ignore[call-overload]


_tables: dict[tuple[tuple[float, ...], str], Tensor] = {}


def _table(levels: tuple[float, ...], device: str) -> Tensor:
    """Made once for each device, whatever mode the first caller is in; a mode of tensors of its own gets its own."""
    found, compiling = _tables.get((levels, device)), torch.compiler.is_compiling()
    # in FakeTensorMode and the like: only what is made inside belongs to it
    if (compiling and found is None) or (not compiling and torch._C._len_torch_dispatch_stack()):
        return torch.tensor(levels, dtype=torch.float32, device=device)
    if found is None:
        with torch.inference_mode(False), torch._C._DisableFuncTorch():
            found = torch.tensor(levels, dtype=torch.float32, device=device)
        _tables[(levels, device)] = found
    return found


def as_flag(name: str, value: Any) -> bool:
    """TypeError unless it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def _check_bits(bits: Any, most: int = 8) -> int:
    if isinstance(bits, bool) or not isinstance(bits, numbers.Integral):
        raise TypeError(f"bits: expected an int in 2..{most}, got {bits!r}")
    if not 2 <= int(bits) <= most:
        raise ValueError(f"bits: expected 2..{most}, got {bits}{'; one bit is Binary()' if bits == 1 else ''}")
    return int(bits)


@dataclass(frozen=True)
class Uniform(Grid):
    """Consecutive integers.

    | arguments | levels |
    |---|---|
    | ``Uniform(k)`` | -2^(k-1) … 2^(k-1) - 1 |
    | ``narrow=True`` | -(2^(k-1) - 1) … 2^(k-1) - 1 |
    | ``inclusive=True`` | -2^(k-1) … 2^(k-1): 2^k + 1 levels, as the published ImageNet code; not packable in k bits |
    | ``signed=False`` | 0 … 2^k - 1 (activations) |

    Raises ValueError for k outside 2…8 and for flags that exclude each other, TypeError for what is no int or no bool.
    """

    bits: int
    signed: bool = True
    narrow: bool = False
    inclusive: bool = False
    read_as: ClassVar[int] = UNIFORM

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", _check_bits(self.bits))
        for name in ("signed", "narrow", "inclusive"):
            object.__setattr__(self, name, as_flag(name, getattr(self, name)))
        if self.narrow + self.inclusive + (not self.signed) > 1:
            raise ValueError("Uniform: narrow=True, inclusive=True and signed=False exclude each other")

        half = 2 ** (self.bits - 1)
        lo, hi = (-half, half - 1) if self.signed else (0, 2 * half - 1)
        self._describe(tuple(float(c) for c in range(lo + self.narrow, hi + 1 + self.inclusive)), self.bits)


@dataclass(frozen=True)
class Binary(Grid):
    """-1 and +1."""

    table, read_as, mean_factor = (-1.0, 1.0), BINARY, 1.0


@dataclass(frozen=True)
class Ternary(Grid):
    """-1, 0 and +1."""

    table, read_as, mean_factor = (-1.0, 0.0, 1.0), UNIFORM, 1.5


@dataclass(frozen=True)
class Midrise(Grid):
    """±1, ±3 … ±(2^bits - 1): 2^bits levels at equal distances, as many above 0 as below and none of them 0.

    ``Binary`` is the one of one bit. The levels of PARQ's uniform quantizer (Jin et al., ICML 2025) and of ParetoQ's
    two bits (Liu et al., 2025), which write ±1/2, ±3/2 …: a scale here is half of theirs. At two bits, where
    ``Uniform`` seldom uses one of its four levels, they train better in most cases (docs/accuracy.md). bits: 2 … 4.
    """

    bits: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", _check_bits(self.bits, 4))
        self._describe(tuple(float(c) for c in range(1 - 2**self.bits, 2**self.bits, 2)))


def _mirrored(*magnitudes: float) -> tuple[float, ...]:
    """0 and ± each, which ascend: +0 and -0 are one level."""
    return (*(-c for c in reversed(magnitudes)), 0.0, *magnitudes)


@dataclass(frozen=True)
class FP4(Grid):
    """E2M1, the 4-bit float of the OCP Microscaling Formats (MX) specification 1.0, 2023, and of NVFP4: 15 levels."""

    table = _mirrored(0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class NF4(Grid):
    """4-bit NormalFloat, quantiles of the normal distribution: QLoRA (Dettmers et al., NeurIPS 2023), appendix E."""

    table = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
             -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
             0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
             1.0)  # fmt: skip


@dataclass(frozen=True)
class PowersOfTwo(Grid):
    """0 and ±2^-k, k = 0 … 2^(bits-1) - 2: products are shifts (INQ, Zhou et al., ICLR 2017). bits: 2 … 5."""

    bits: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", _check_bits(self.bits, 5))
        self._describe(_mirrored(*(2.0**-k for k in reversed(range(2 ** (self.bits - 1) - 1)))))


@dataclass(frozen=True, init=False)
class Codebook(Grid):
    """Any 2…256 ascending finite levels, kept as float32.

    Levels are in units of the scale, which fits them to the weights: the largest |level| is between 2^-20 and 2^20.
    Raises ValueError where they are too few, too many, not finite, not strictly ascending in float32, or all of them
    smaller or one of them larger than that; TypeError where they are not numbers.
    """

    levels: tuple[float, ...]

    def __init__(self, levels: Iterable[float] | Tensor) -> None:
        if isinstance(levels, Tensor):
            if levels.is_meta or type(levels) not in (Tensor, torch.nn.Parameter):
                raise ValueError(f"levels: expected numbers, got a {type(levels).__name__} on {levels.device}")
            levels = levels.detach().cpu().flatten().tolist()
        try:
            values = [float(v) for v in levels]
        except (TypeError, ValueError) as error:
            raise TypeError(f"levels: expected numbers, got {levels!r:.80} ({error})") from None
        if not 2 <= len(values) <= 256:
            raise ValueError(f"levels: expected 2 to 256 levels, got {len(values)}")
        with np.errstate(over="ignore"):
            table = np.array(values, np.float32)  # not torch: numbers have no device, fake or meta
        if not np.isfinite(table).all():
            raise ValueError("levels: expected finite float32 numbers, got inf or NaN")
        if not (table[1:] > table[:-1]).all():
            raise ValueError(f"levels: expected strictly ascending float32 numbers, got {values}")
        if not 2.0**-20 <= (top := float(np.abs(table).max())) <= 2.0**20:
            raise ValueError(f"levels: expected the largest magnitude between 2^-20 and 2^20, got {top:g}; levels are "
                             "in units of the scale, so divide them all by it")  # fmt: skip
        self._describe(tuple((table + np.float32(0)).tolist()))  # no level is -0


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
