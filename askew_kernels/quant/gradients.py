"""What the gradient of a layer's output is rounded to before the backward's products."""

from __future__ import annotations

import numbers
from dataclasses import asdict, dataclass
from typing import Any

from ..contract import LUQ_BITS

INT8_GRADIENT = "int8"


@dataclass(frozen=True)
class LUQ:
    """Logarithmic unbiased quantization of gradients: signed powers of two of alpha = max|G| / 2^(2^b - 1), and 0.

    Below alpha stochastically 0 or alpha, above stochastically one of the two neighbouring powers of two times alpha,
    so that E[LUQ(G)] = G; max|G| over the whole tensor. ``bits``: 2 to 6, one of the sign and b = bits - 1 of the
    exponent (4 bits: alpha = max|G| / 128). Source: Chmiel et al., *Logarithmic Unbiased Quantization*, 2021.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        low, high = LUQ_BITS
        if isinstance(self.bits, bool) or not isinstance(self.bits, numbers.Integral) or not low <= self.bits <= high:
            raise ValueError(f"bits: LUQ takes {low} to {high}, got {self.bits!r}")
        object.__setattr__(self, "bits", int(self.bits))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``gradient_from_dict`` reads it back."""
        return {"gradient": "luq", **asdict(self)}


def check_gradient(gradient: Any, forward: str) -> None:
    """TypeError/ValueError that name the field ``gradient``."""
    if gradient is None or isinstance(gradient, LUQ):
        return
    if gradient != INT8_GRADIENT:
        kind = ValueError if isinstance(gradient, str) else TypeError
        raise kind(f"gradient: expected None, LUQ(bits=4) or {INT8_GRADIENT!r}, got {gradient!r}")
    if forward != "int8":
        raise ValueError(f"gradient: {INT8_GRADIENT!r} multiplies the levels that forward='int8' holds, got "
                         f"forward={forward!r}; LUQ serves every forward")  # fmt: skip


def gradient_from_dict(d: Any) -> Any:
    """The inverse of ``LUQ.to_dict``; what is no dict is given back."""
    if not isinstance(d, dict):
        return d
    arguments = dict(d)
    if (name := arguments.pop("gradient", None)) != "luq":
        raise ValueError(f"gradient: expected 'luq', got {name!r}")
    try:
        return LUQ(**arguments)
    except TypeError as error:
        raise ValueError(f"gradient: {error}") from None
