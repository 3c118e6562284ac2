"""Products of levels: inputs as levels of a byte, token by token, and what becomes of the sums; gradients rounded
stochastically."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import contract
from .autograd import below_autograd, one_by_one
from .checks import FLOAT_TYPES, check_float_tensor, check_grid, check_like, check_tensor
from .schema import define, like_first

__all__ = [
    "draw_seed", "level_product", "luq", "run_level_product", "run_luq", "run_scaled_sums", "run_stochastic_levels",
    "run_token_levels", "scaled_sums", "stochastic_levels", "token_levels",
]  # fmt: skip

define("token_levels", "(Tensor x, Tensor levels, int[] grid, float top, ScalarType dtype) -> (Tensor, Tensor)",
       batch=one_by_one, fake=lambda x, levels, grid, top, dtype: (
           x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0],), dtype=contract.compute_dtype(x.dtype))),
       )  # fmt: skip
define("scaled_sums", "(Tensor sums, Tensor token_scale, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
       batch=one_by_one, fake=lambda sums, token_scale, scale, bias, dtype: sums.new_empty(sums.shape, dtype=dtype),
       )  # fmt: skip


define("level_product", "(Tensor q, Tensor token_scale, Tensor c, Tensor scale, Tensor? bias, bool transposed, "
       "ScalarType dtype) -> Tensor", batch=one_by_one,
       fake=lambda q, token_scale, c, scale, bias, transposed, dtype: q.new_empty(
           (q.shape[0], c.shape[1 if transposed else 0]), dtype=dtype),
       flops=lambda q, token_scale, c, *_args, **_kwargs: 2 * q[0] * c[0] * c[1])  # fmt: skip
define("stochastic_levels", "(Tensor x, Tensor factor, Tensor seed) -> (Tensor, Tensor)", batch=one_by_one,
       fake=lambda x, factor, seed: (x.new_empty(x.shape, dtype=torch.int8),
                                     x.new_empty((x.shape[0],), dtype=contract.compute_dtype(x.dtype))))  # fmt: skip
define("luq", "(Tensor x, int bits, Tensor seed) -> Tensor", batch=one_by_one, fake=like_first)


def _floats(name: str, t: Any, n: int, like: Tensor, dtype: torch.dtype, one: bool = False) -> Tensor:
    """``t``, (n,) or with ``one`` also (1,), contiguous in ``dtype``. Raises TypeError/ValueError naming it."""
    check_tensor(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a float tensor, got {t.dtype}")
    check_like(name, t, None, (1,) if one and t.numel() == 1 else (n,), like.device)
    return t.detach().to(dtype).contiguous()


def _beside_sums(
    token_scale: Any, scale: Any, bias: Any, dtype: Any, like: Tensor, rows: int, n: int
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:  # fmt: skip
    """What becomes of (rows, n) sums, as the operators take it, checked."""
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype!r}")
    kind = contract.compute_dtype(dtype)
    token_scale = _floats("token_scale", token_scale, rows, like, kind)
    scale = _floats("scale", scale, n, like, kind, one=True)
    return token_scale, scale, None if bias is None else _floats("bias", bias, n, like, kind), dtype


def token_levels(x: Tensor, dtype: torch.dtype, grid: Any = None) -> tuple[Tensor, Tensor]:
    """(q, s): each row of ``x`` as s q, q levels of a byte: s = max |x| / top, q = Q(x / s).

    ``dtype``: torch.int8 or torch.float8_e4m3fn. ``grid``: whose levels q are, top its ``c_max``; None: all numbers
    that ``dtype`` holds, top 127 or 448, rounded to even. s = 1 for a row of zeros; s is NaN for a row that holds inf
    or NaN (its q is NaN too, 0 in int8).

    x: (rows, cols), float. Returns q (rows, cols) and s (rows,) float32. No derivative. Raises TypeError/ValueError
    naming the argument, also where ``dtype`` does not hold the levels. Source: docs/mathematics.md, section 8.
    """
    check_float_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (rows, cols), got {tuple(x.shape)}")
    if not isinstance(dtype, torch.dtype) or dtype not in contract.LEVEL_TYPES:
        raise TypeError(f"dtype: expected torch.int8 or torch.float8_e4m3fn, got {dtype}")
    if grid is not None:
        check_grid(grid)
        if not contract.holds_levels(dtype, grid.levels):
            raise ValueError(f"grid: expected levels that {dtype} holds exactly, got {grid}")
    return run_token_levels(x.contiguous(), dtype, grid)


def run_token_levels(x: Tensor, dtype: torch.dtype, grid: Any) -> tuple[Tensor, Tensor]:
    """The operator without the checks; x is contiguous."""
    if grid is not None:
        arguments = grid.levels_tensor(x.device), grid.encoding, grid.c_max
    else:
        top = contract.LEVEL_TYPES[dtype]
        kind = contract.UNIFORM if dtype == torch.int8 else contract.FLOAT
        arguments = x.new_empty(0, dtype=torch.float32), [kind, -int(top), int(top)], top
    return below_autograd("token_levels", x, x, *arguments, dtype)


def scaled_sums(sums: Tensor, token_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y = (sums s_x) s_w + b in float32, rounded once to ``dtype``: what sums of products of levels stand for.

    sums: (rows, n) int32 or float32, or levels themselves, int8 or float8_e4m3fn; token_scale: (rows,); scale: (1,) or
    (n,), floats both; bias: (n,) or None.
    No derivative. Raises TypeError/ValueError naming the argument. Source: docs/mathematics.md, section 8.
    """
    check_tensor("sums", sums)
    if sums.dim() != 2 or sums.dtype not in (torch.int32, torch.float32, torch.float64, *contract.LEVEL_TYPES):
        raise ValueError(f"sums: expected int32, float32, int8 or float8_e4m3fn of shape (rows, n), got {sums.dtype} "
                         f"{tuple(sums.shape)}")  # fmt: skip
    given = _beside_sums(token_scale, scale, bias, dtype, sums, *sums.shape)
    if sums.dtype == torch.float64 and dtype != torch.float64:
        sums = sums.float()  # as the others are
    return run_scaled_sums(sums.contiguous(), *given)


def run_scaled_sums(sums: Tensor, *arguments: Any) -> Tensor:
    """The operator without the checks."""
    return below_autograd("scaled_sums", _beside(arguments[0], arguments[-1]), sums, *arguments)


def _beside(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What the implementation is chosen by: the reference where results are float64, as the scales may not be."""
    return scale.double() if dtype == torch.float64 else scale


def level_product(
    q: Tensor, token_scale: Tensor, c: Tensor, scale: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32, *, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """y = ((q c^T) s_x) s_w + b, of levels: exact integer sums, then float32, rounded once to ``dtype``.

    q: (rows, cols) int8; c: (n, cols) int8, or (cols, n) where it is ``transposed``; token_scale: (rows,); scale: (1,)
    or (n,), floats both; bias: (n,) or None; cols up to 131071. On a CPU a kernel of its own, elsewhere the reference.
    No derivative. Raises TypeError/ValueError naming the argument. Source: docs/mathematics.md, section 8.
    """
    for name, t in (("q", q), ("c", c)):
        check_tensor(name, t)
        if t.dim() != 2 or t.dtype != torch.int8 or t.device != q.device:
            raise ValueError(f"{name}: expected an int8 matrix on {q.device}, got {t.dtype} {tuple(t.shape)}")
    (rows, cols), n = q.shape, c.shape[1 if transposed else 0]
    if c.shape[0 if transposed else 1] != cols or cols > contract.MOST_LEVEL_COLUMNS:
        wanted = (cols, "n") if transposed else ("n", cols)
        raise ValueError(f"c: expected shape ({wanted[0]}, {wanted[1]}), of at most {contract.MOST_LEVEL_COLUMNS} "
                         f"summands, got {tuple(c.shape)}")  # fmt: skip
    token_scale, scale, bias, dtype = _beside_sums(token_scale, scale, bias, dtype, q, rows, n)
    return run_level_product(q.contiguous(), token_scale, c.contiguous(), scale, bias, bool(transposed), dtype)


def run_level_product(q: Tensor, *arguments: Any) -> Tensor:
    """The operator without the checks."""
    return below_autograd("level_product", _beside(arguments[0], arguments[-1]), q, *arguments)


def draw_seed(device: torch.device | str) -> Tensor:
    """A seed from torch's generator of the device, 0-dim int64: reproducible by ``torch.manual_seed``, and another in
    each replay of a CUDA graph."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(f"seed: expected an int64 number on {device}, got {seed.dtype} {tuple(seed.shape)} on "
                             f"{seed.device}")  # fmt: skip
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an int in [0, 2^63), got {seed!r}")
    return torch.tensor(seed, dtype=torch.int64, device=device)


def stochastic_levels(
    x: Tensor, factor: Tensor | None = None, seed: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(q, s): each row of ``x * factor`` as s q, with E[s q] = x factor: s = max |x factor| / 127, and q one of the two
    integers beside x factor / s, the upper with the probability of the distance to the lower.

    Philox4x32-10 with key ``seed`` (None: from torch's generator) and the element's index as counter, as
    ``fake_quantize`` has it. s = 1 for a row of zeros; s is NaN for a row that holds inf or NaN (its q is 0).
    x: (rows, cols), float; factor: (1,) or (cols,), float, or None for 1. Returns q (rows, cols) int8, s (rows,)
    float32. No derivative. Raises TypeError/ValueError naming the argument. Source: docs/mathematics.md, section 8.
    """
    check_float_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (rows, cols), got {tuple(x.shape)}")
    if factor is None:
        factor = torch.ones(1, dtype=torch.float32, device=x.device)
    factor = _floats("factor", factor, x.shape[1], x, contract.compute_dtype(x.dtype), one=True)
    return run_stochastic_levels(x.contiguous(), factor, _seed_tensor(seed, x.device))


def run_stochastic_levels(x: Tensor, factor: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The operator without the checks; x is contiguous."""
    return below_autograd("stochastic_levels", x, x, factor, seed)


def luq(x: Tensor, bits: int = 4, seed: int | Tensor | None = None) -> Tensor:
    """LUQ(x): signed powers of two of alpha = max |x| / 2^(2^b - 1), b = bits - 1, and 0, with E[LUQ(x)] = x.

    |x| < alpha becomes 0 or alpha, the latter with probability |x| / alpha; above, with p the power of two times alpha
    below |x|, 2 p with probability |x| / p - 1, else p. The maximum is of the whole tensor and stays; where it is not
    finite all is NaN. Random numbers as in ``stochastic_levels``. x: any shape, float; bits: 2 to 6.
    Returns a contiguous tensor like ``x``. No derivative. Raises TypeError/ValueError naming the argument.
    Source: Chmiel et al., *Logarithmic Unbiased Quantization*, 2021; docs/mathematics.md, section 3.
    """
    check_float_tensor("x", x)
    low, high = contract.LUQ_BITS
    if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high:
        raise ValueError(f"bits: expected {low} to {high}, got {bits!r}")
    return run_luq(x.contiguous(), bits, _seed_tensor(seed, x.device))


def run_luq(x: Tensor, bits: int, seed: Tensor) -> Tensor:
    """The operator without the checks; x is contiguous."""
    return below_autograd("luq", x, x, bits, seed)
