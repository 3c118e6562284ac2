"""Products with packed weights, and their decoding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import contract, reference, runtime
from ..contract import compute_dtype
from ..reference import product
from .autograd import below_autograd, one_by_one, tracked, transformed
from .checks import FLOAT_TYPES, check_float_tensor, check_grid, check_like, check_tensor
from .schema import define

__all__ = ["check_activations", "packed_dequantize", "packed_linear", "run_packed_linear"]


def _packed_weight(
    codes: Tensor, scale: Tensor, levels: Tensor, grid: list[int], bits: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """(n, cols) s c in ``dtype``, rounded once; differentiable in the scale."""
    if torch.compiler.is_compiling():
        recorded = torch.is_grad_enabled() and scale.requires_grad
    else:
        recorded = torch._C._functorch.is_functorch_wrapped_tensor(scale) or tracked((scale,))
    kind = compute_dtype(dtype) if recorded else dtype
    factor = torch.ones(scale.numel(), dtype=torch.float32, device=codes.device) if recorded else scale.detach()
    with contextlib.ExitStack() as plain:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            codes, factor, levels = (_not_transformed(t) for t in (codes, factor, levels))
            plain.enter_context(torch._C._DisableFuncTorch())
        level = torch.empty(codes.shape[0], cols, dtype=kind, device=codes.device)
        below_autograd("packed_dequantize_", level, codes, factor, levels, grid, bits, level)
    if not recorded:
        return level
    each = level.numel() // max(scale.numel(), 1)
    return (scale.to(kind).reshape(-1, 1) * level.reshape(scale.numel(), each)).to(dtype).reshape(level.shape)


def _not_transformed(t: Tensor) -> Tensor:
    """``t`` without the wrappers in which torch.func's levels of differentiation hand on what they do not touch."""
    while torch._C._functorch.is_gradtrackingtensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        raise NotImplementedError("askew::packed_linear: vmap over packed codes has no derivative; unpack_ first")
    return t


class _Packed(torch.autograd.Function):
    """y = x W^T + b from the codes. Backward, with the weight unpacked for it: grad W to x (straight through the
    rounding of activations), the levels' share to the scale, and the sum over rows to the bias."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        x, codes, scale, levels, ctx.grid, ctx.bits, bias = inputs
        ctx.x_dtype, ctx.cols, ctx.bias = x.dtype, x.shape[1], None if bias is None else (bias.dtype, bias.shape)
        tensors = (x if ctx.needs_input_grad[3] else None, codes, scale, levels)
        # tensors of inference mode cannot be saved, and need not be: nothing about them is recorded
        ctx.inference = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
        ctx.save_for_backward(*(None if i in ctx.inference else t for i, t in enumerate(tensors)))
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scale, levels = (ctx.inference.get(i, t) for i, t in enumerate(ctx.saved_tensors))
        kind = compute_dtype(ctx.x_dtype)
        to_x, to_scale, to_bias = (ctx.needs_input_grad[i] for i in (1, 3, 7))
        grads: list[Tensor | None] = [None] * 8
        g = grad.to(kind)
        if to_x:
            weight = _packed_weight(codes, scale, levels, ctx.grid, ctx.bits, ctx.cols, kind)
            grads[1] = product(g, weight.t()).to(ctx.x_dtype)
        if to_scale:
            level = _packed_weight(codes, torch.ones_like(scale), levels, ctx.grid, ctx.bits, ctx.cols, kind)
            of_weight = product(g.t(), x.to(kind).t())
            each = of_weight.numel() // max(scale.numel(), 1)
            grads[3] = (of_weight * level).reshape(scale.numel(), each).sum(1).reshape(scale.shape)
        if to_bias:
            grads[7] = g.sum(0).to(ctx.bias[0]).reshape(ctx.bias[1])
        return tuple(grads)


def _packed(name: str, run: Callable[..., Tensor], args: tuple) -> Tensor:
    if not transformed():
        return _Packed.apply(run, *args)
    if name in ROUNDED.values():
        raise NotImplementedError(
            f'askew::{name} rounds its inputs and is differentiated in reverse mode only; use activations="float" for '
            "torch.func and forward-mode derivatives"
        )
    return _composed(*args)


def _composed(x: Tensor, codes: Tensor, scale: Tensor, levels: Tensor, grid: list[int], bits: int,
              bias: Tensor | None) -> Tensor:  # fmt: skip
    """By differentiable operators, with the weight unpacked."""
    kind = compute_dtype(x.dtype)
    y = product(x.to(kind), _packed_weight(codes, scale, levels, grid, bits, x.shape[1], kind))
    return (y if bias is None else y + bias.to(kind)).to(x.dtype)


def _straight_through(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function``, which rounds its inputs, in a graph: the derivative is that of ``_composed``."""
    y = function(*(t.detach() if isinstance(t, Tensor) else t for t in inputs))
    if not (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)):
        return y
    through = _composed(*inputs)
    return y + torch.where(through.isfinite(), through - through.detach(), 0.0)


ROUNDED = {"bf16": "packed_linear_bf16", "int8": "packed_linear_int8"}  # by `activations`


def _batched(op: Callable, info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
    """vmap over inputs and biases: a batch of inputs is more rows; of other weights, one product for each."""
    if any(d is not None for d in in_dims[1:4]):
        return one_by_one(op, info, in_dims, *args)
    x, *weight, bias = args
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    shared = bias is not None and in_dims[6] is None
    y = op(x.reshape(-1, x.shape[-1]), *weight, bias if shared else None).unflatten(0, x.shape[:2])
    return y if shared or bias is None else y + bias.movedim(in_dims[6], 0)[:, None], 0


_CODES = "Tensor codes, Tensor scale, Tensor levels, int[] grid, int bits"

define("packed_dequantize_", f"({_CODES}, Tensor(a!) out) -> ()")
for _name in ("packed_linear", *ROUNDED.values()):
    define(_name, f"(Tensor x, {_CODES}, Tensor? bias) -> Tensor", derivative=_packed, batch=_batched,
           fake=lambda x, codes, *_args: x.new_empty((x.shape[0], codes.shape[0])),
           flops=lambda x, codes, *_args, **_kwargs: 2 * x[0] * x[1] * codes[0])  # fmt: skip  # of the float layer


# ---- tiles: the same codes in the order in which a GPU's matrix units want them --------------------------------------


def tile_form(levels: Sequence[float], grid: list[int], dtype: torch.dtype) -> int:
    """How codes of this grid stand in tiles for products with inputs of ``dtype`` (``contract.tile_codes``); 0 where
    levels are not numbers of that type, nor sums of two within 2^-17 of them."""
    kind, lo, hi = grid
    if kind == contract.BINARY:
        return 1
    if kind == contract.UNIFORM:
        if not (-(1 << 7) <= lo and hi < (1 << 7 if lo < 0 else 1 << 8)):  # in eight bits
            return 0
        return next((bits for bits in (2, 3, 4) if hi - lo < 2**bits), 8)
    exact = torch.tensor(levels, dtype=torch.float32)
    high = exact.to(dtype).float()
    rest = exact - high
    if not bool(rest.any()):
        return contract.TILE_TABLE
    error = (rest - rest.to(dtype).float()).abs()
    return contract.TILE_TABLE2 if bool((error <= 2.0**-17 * exact.abs()).all()) else 0


def tile_code(codes: Tensor, grid: list[int]) -> Tensor:
    """The codes as tiles have them: of 8 bits they count from -128, or from 0 where no level is negative."""
    kind, lo, hi = grid
    wide = kind == contract.UNIFORM and hi - lo >= 16
    return codes + (lo + 128 if lo < 0 else lo) if wide else codes


def tile_scales(scale: Tensor, n: int, cols: int) -> Tensor:
    """Scales beside tiles: of groups (groups, n), filled up with ones to whole tiles; others as they are."""
    groups = scale.numel() // n if n and scale.numel() > 1 else 0
    if groups < 2:
        return scale
    length = cols // groups
    more = -(-contract.tile_shape(n, cols, 1)[1] * contract.TILE_COLUMNS // length) - groups
    return torch.nn.functional.pad(scale.reshape(n, groups).t(), (0, -n % contract.TILE_ROWS, 0, more), value=1.0)


PIECE = 1 << 22  # weights that are put into tiles at once


def packed_tiles(codes: Tensor, grid: list[int], bits: int, cols: int, levels: int, form: int) -> Tensor:
    """The tiles of packed codes; a code above the highest level counts as the highest."""
    tiles = torch.empty(contract.tile_shape(len(codes), cols, form), dtype=torch.int32, device=codes.device)
    each = max(PIECE // max(cols, 1) // contract.TILE_ROWS, 1)
    for first in range(0, len(tiles), each):
        piece = codes[first * contract.TILE_ROWS : (first + each) * contract.TILE_ROWS]
        if bits == contract.TRITS:
            piece = piece.clamp(max=contract.TRIT_TOP)
        index = contract.unpack_codes(piece, bits, cols).clamp_(max=levels - 1)
        tiles[first : first + each] = contract.tile_codes(tile_code(index, grid), form)
    return tiles


define("packed_tiles_linear",
       "(Tensor x, Tensor tiles, Tensor scale, Tensor levels, int[] grid, int form, int n, int groups, Tensor? bias)"
       " -> Tensor", fake=lambda x, tiles, scale, levels, grid, form, n, *_args: x.new_empty((x.shape[0], n)),
       flops=lambda x, tiles, scale, levels, grid, form, n, *_args, **_kwargs: 2 * x[0] * x[1] * n)  # fmt: skip


# ---- bands: the same codes in the order in which a CPU reads them for int8 activations -------------------------------


def bands_serve(n: int, cols: int, grid: Any, bits: int, groups: int) -> bool:
    """Whether products with int8 activations are made from bands of such codes: levels are whole multiples of the step
    (half of it with one bit), int32 holds the sums, and filled up blocks and bands cost little memory. Of levels that
    are looked up: from bands of ``grid.counted``."""
    if grid.encoding[0] == contract.CODEBOOK and (found := grid.counted) is not None:
        (kind, lo, _), bits = found.encoding, found.bits
    else:
        kind, lo, _ = grid.encoding
    if kind == contract.CODEBOOK or not n or not cols:
        return False
    step = contract.level_step(kind)
    first, top, units = (2 * lo, 2, 1) if bits == 1 else (lo, (1 << bits) - 1, 1) if bits else (lo - 1, 3, 64)
    largest = max(abs(first // step), top, first // step + top)
    if first % step or contract.INT8_TOP * cols * largest * units >= 2**31 - 1:
        return False
    rows, size = contract.band_shape(n, cols, bits, groups)
    return rows * size <= n * contract.row_bytes(cols, bits) * 5 // 4 + (1 << 16)


def band_scales(scale: Tensor, n: int, groups: int) -> Tensor:
    """Scales beside bands, float32 (bands, groups, BAND_ROWS): one for all is repeated, rows filled up with zeros."""
    each = scale.float().expand(n) if scale.numel() == 1 else scale.float()
    padded = torch.nn.functional.pad(each.reshape(n, groups), (0, 0, 0, -n % contract.BAND_ROWS))
    return padded.reshape(-1, contract.BAND_ROWS, groups).transpose(1, 2).contiguous()


define("packed_bands", "(Tensor codes, int bits, int cols, int groups, int levels) -> Tensor",
       fake=lambda codes, bits, cols, groups, levels: codes.new_empty(
           contract.band_shape(codes.shape[0], cols, bits, groups)))  # fmt: skip
define("packed_bands_codes", "(Tensor bands, int bits, int n, int cols, int groups) -> Tensor",
       fake=lambda bands, bits, n, cols, groups: bands.new_empty((n, contract.row_bytes(cols, bits))))  # fmt: skip
define("packed_bands_linear",
       "(Tensor x, Tensor bands, Tensor scale, int[] grid, int bits, int n, Tensor? bias) -> Tensor",
       fake=lambda x, bands, scale, grid, bits, n, *_args: x.new_empty((x.shape[0], n)),
       flops=lambda x, bands, scale, grid, bits, n, *_args, **_kwargs: 2 * x[0] * x[1] * n)  # fmt: skip


def conv_size(size: Sequence[Any], geometry: Sequence[int]) -> list[Any]:
    """Of the result of a convolution; geometry: kernel, stride, dilation, zeros before and after, two numbers each."""
    each = zip(size, *(geometry[i : i + 2] for i in range(0, 10, 2)), strict=True)
    return [(n + before + after - gap * (k - 1) - 1) // step + 1 for n, k, step, gap, before, after in each]


def _convolved(x: Any, bands: Any, scale: Any, grid: Any, bits: int, n: int, geometry: Any, channels_last: bool,
               bias: Any) -> Any:  # fmt: skip
    size = conv_size(x.shape[1:3] if channels_last else x.shape[2:], geometry)
    return x.new_empty((x.shape[0], *size, n) if channels_last else (x.shape[0], n, *size))


define("packed_bands_conv",
       "(Tensor x, Tensor bands, Tensor scale, int[] grid, int bits, int n, int[] geometry, bool channels_last,"
       " Tensor? bias) -> Tensor", fake=_convolved,
       flops=lambda x, bands, scale, grid, bits, n, geometry, channels_last, *_args, **_kwargs: (
           2 * x[0] * x[3 if channels_last else 1] * n * math.prod(geometry[:2])
           * math.prod(conv_size(x[1:3] if channels_last else x[2:], geometry))))  # fmt: skip


define("packed_depthwise", "(Tensor x, Tensor taps, int[] geometry, Tensor? bias) -> Tensor",
       fake=lambda x, taps, geometry, _bias: x.new_empty((x.shape[0], *conv_size(x.shape[1:3], geometry), x.shape[3])),
       flops=lambda x, taps, geometry, *_args, **_kwargs: (
           2 * x[0] * x[3] * taps[0] * math.prod(conv_size(x[1:3], geometry))))  # fmt: skip


def check_bits(bits: Any) -> None:
    """ValueError unless 1 to 8, or ``contract.TRITS``."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= 8:
        raise ValueError(f"bits: expected 1 to 8, or 0 for five trits a byte, got {bits!r}")


def check_codes_of(name: str, codes: Any, bits: Any, cols: Any) -> None:
    """TypeError/ValueError unless ``codes`` are (n, row_bytes) uint8, of rows of ``cols`` codes of ``bits``."""
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or codes.dim() != 2:
        got = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else f"{codes!r:.80}"
        raise ValueError(f"{name}: expected a uint8 tensor of shape (n, row_bytes), got {got}")
    check_bits(bits)
    if isinstance(cols, bool) or not isinstance(cols, (int, torch.SymInt)) or cols < 0:
        raise ValueError(f"cols: expected a number of weights, got {cols!r}")
    if codes.shape[1] != (wanted := contract.row_bytes(cols, bits)):  # type: ignore[arg-type]
        each = f"{bits} bits" if bits else "five to a byte"
        raise ValueError(f"{name}: expected {wanted} bytes a row for {cols} weights of {each}, got {codes.shape[1]}")


def check_packed(
    codes: Any, scale: Any, grid: Any, bits: int, cols: int, dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    """``scale`` as float32 (rows,), after checking that codes and scale describe a (n, cols) weight, of ``dtype``."""
    check_grid(grid)
    check_codes_of("codes", codes, bits, cols)
    if not codes.is_contiguous():
        raise ValueError(f"codes: expected a contiguous tensor, got strides {codes.stride()}")
    check_tensor("scale", scale)
    if not scale.is_floating_point() or scale.device != codes.device:
        raise ValueError(f"scale: expected a float tensor on {codes.device}, got {scale.dtype} on {scale.device}")
    rows, n = scale.numel(), codes.shape[0]
    fits = rows == 1 or (rows and n and rows % n == 0 and cols % (rows // n) == 0) or rows == n
    if not (fits or rows == n * cols == 0):
        raise ValueError(f"scale: expected 1, {n} or {n} * groups scales for ({n}, {cols}) weights, got {rows}")
    if dtype is not None and dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype!r}")
    if not rows and n:  # groups of nothing
        return torch.ones(1, dtype=torch.float32, device=codes.device)
    return scale.float().reshape(-1).contiguous()


def check_activations(activations: Any, grid: Any) -> None:
    """ValueError unless "float", "bf16" or "int8", which needs integer levels, times a power of two."""
    if activations not in ("float", *ROUNDED):
        raise ValueError(f'activations: expected "float", "bf16" or "int8", got {activations!r}')
    if activations == "int8" and grid.encoding[0] == contract.CODEBOOK and grid.counted is None:
        raise ValueError('activations: "int8" needs a grid of integer levels of 8 bits (times a power of two), got '
                         f"{grid}")  # fmt: skip


def counted_codes(codes: Tensor, grid: Any, bits: int, cols: int) -> Tensor:
    """Packed codes of looked-up levels as those of ``grid.counted``; a code above the highest level counts as it."""
    _, counted_bits, places, _ = grid.counted
    table = torch.tensor(places, dtype=torch.uint8, device=codes.device)
    found = torch.empty(len(codes), contract.row_bytes(cols, counted_bits), dtype=torch.uint8, device=codes.device)
    each = max(PIECE // max(cols, 1), 1)
    for first in range(0, len(codes), each):
        index = contract.unpack_codes(codes[first : first + each], bits, cols).clamp_(max=len(places) - 1)
        found[first : first + each] = contract.pack_codes(table[index.int()], counted_bits)
    return found


class PackedWeight(NamedTuple):
    """A packed weight as ``packed_linear`` and the like take it."""

    codes: Tensor
    scale: Tensor
    levels: Tensor
    grid: list[int]
    bits: int

    @classmethod
    def of(cls, name: str, codes: Tensor, scale: Tensor, grid: Any, bits: int, cols: int) -> PackedWeight:
        """For the operator ``name``: products of bytes count levels that are looked up."""
        if name == ROUNDED["int8"] and grid.counted is not None:
            encoding, counted_bits, _, factor = grid.counted
            counted = counted_codes(codes, grid, bits, cols)
            return cls(counted, scale * factor, codes.new_empty(0, dtype=torch.float32), encoding, counted_bits)
        return cls(codes, scale, grid.levels_tensor(codes.device), grid.encoding, bits)


def packed_dequantize(
    codes: Tensor, scale: Tensor, grid: Any, bits: int, cols: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The (n, cols) weight s c of packed codes, in ``dtype``: one product in float32 (of float64 in float64), rounded
    once; differentiable in s.

    codes: (n, row_bytes) uint8, as ``quant.pack_codes`` writes them; scale: 1, n or n * groups. A code above the
    highest level counts as the highest. Raises TypeError/ValueError naming the argument. Source: docs/packed.md.
    """
    scale = check_packed(codes, scale, grid, bits, cols, dtype)
    return _packed_weight(codes, scale, grid.levels_tensor(codes.device), grid.encoding, bits, cols, dtype)


def packed_linear(
    x: Tensor, codes: Tensor, scale: Tensor, grid: Any, bits: int, bias: Tensor | None = None,
    activations: str = "float",
) -> Tensor:  # fmt: skip
    """y = x W^T + b from packed codes, W = s c.

    The kernels decode W a few rows at a time. As a whole it stands in memory only for a gradient of x or scale, in
    PyTorch's reference, and for rounded activations on a GPU, which the reference takes; without AVX-512 the CPU
    decodes panels of up to 2^22 weights from 96 rows of x on.
    Sums in float32 of unrounded float32 products, then rounded once to the type of x: |y - exact| is at most
    cols 2^-24 sum |x| |w|, for bfloat16 and float16 plus half a unit in the last place of y.
    ``activations="int8"``: each row of x is rounded to s_x q, s_x = max |x| / 127, q an integer; the sums of q c are
    exact. That moves y by at most s_x / 2 sum |w|, usually by about 1 % of the root mean square of y (docs/packed.md).
    A row of x that holds inf or NaN gives NaN. Its gradient is that of the float product, straight through.
    ``activations="bf16"``: x is rounded to bfloat16, which moves y by at most 2^-9 sum |x| |w|; sums and y as above. A
    bfloat16 x is meant so anyway; what has AVX512_BF16 then multiplies two bfloat16 at a time, of exact products.
    Differentiable in x, scale and bias, and under torch.func (rounded activations in reverse mode only).

    x: (…, cols) float32, bfloat16 or float16; codes: (n, row_bytes) uint8; scale: 1, n or n * groups; bias: (n,).
    Returns (…, n) in the type of x. Raises TypeError/ValueError naming the argument, for int8 also where the grid's
    levels are not integers of 8 bits times a power of two. Source: docs/packed.md.
    """
    check_float_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x: expected shape (…, cols), got a scalar")
    cols = x.shape[-1]
    scale = check_packed(codes, scale, grid, bits, cols)
    if x.device != codes.device:
        raise ValueError(f"x: expected on the device of codes ({codes.device}), got {x.device}")
    n = codes.shape[0]
    if bias is not None:
        check_like("bias", bias, x.dtype, (n,), x.device)
    check_activations(activations, grid)
    name = ROUNDED.get(activations, "packed_linear")
    weight = PackedWeight.of(name, codes, scale, grid, bits, cols)
    levels = len(grid.levels) if grid.evenly_spaced else 2**weight.bits
    if activations == "int8" and not contract.int8_sums_fit(cols, levels):
        raise ValueError(f"activations: sums of {cols} products of int8 and {bits}-bit codes may overflow; use float")
    flat = x.reshape(math.prod(x.shape[:-1]), cols).contiguous()
    bias = None if bias is None else bias.contiguous()
    y = run_packed_linear(name, runtime.operator(name, flat), flat, *weight, bias)
    return y.reshape(*x.shape[:-1], n)


def run_packed_linear(name: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function``, an implementation of ``name`` (packed_linear or one of ``ROUNDED``), differentiable in x, scale and
    bias, without the checks."""
    if isinstance(function, torch._ops.OpOverload):
        return function(*inputs)
    if torch.compiler.is_compiling():
        return _composed(*inputs) if function is reference.packed_linear else _straight_through(function, *inputs)
    if not (transformed() or tracked(inputs)):
        return function(*inputs)
    return _packed(name, function, inputs)
