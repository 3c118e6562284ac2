"""Fake quantization, its straight-through gradient, that of a learned scale, the projection, and sums of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .. import reference
from ..contract import NUM_ROW_SUMS
from .autograd import below_autograd, differentiable, one_by_one, transformed
from .checks import check_copy, check_float_tensor, check_like, check_weight, check_written, rate_tensor
from .dense import InPlace, in_place, layout, permuted, shares_partly
from .schema import define, like_first

__all__ = [
    "fake_quantize", "fake_quantize_out_", "project_interval_", "row_sums", "run_fake_quantize",
    "run_fake_quantize_backward", "run_soft_quantize", "run_ste_clip_", "run_ste_clip_scale_grad", "scale_grad_factor",
    "soft_quantize", "ste_clip_", "ste_clip_scale_grad_",
]  # fmt: skip


class _StraightThrough:
    """fake_quantize and fake_quantize_backward: what comes in goes on inside the hull, 0 outside (all of it without
    ``ste_clip``). The second is linear in its gradient and piecewise constant in x. Inputs: name, run, the operator's.
    """

    @staticmethod
    def forward(name: str, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return run(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.rest = len(inputs) - 3
        ctx.backward_itself = inputs[0] == "fake_quantize_backward"
        x, scale, levels, ctx.grid, *clip = inputs[3 if ctx.backward_itself else 2 :]
        ctx.clip = ctx.backward_itself or clip[0]
        saved = (x, scale, levels) if ctx.clip else ()
        ctx.save_for_backward(*saved)
        if transformed():
            ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rest: list[Tensor | None] = [None] * ctx.rest
        if ctx.backward_itself and ctx.needs_input_grad[3]:
            rest[0] = torch.zeros_like(grad)
        return None, None, _inside(ctx, grad), *rest

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        return None if tangents[2] is None else _inside(ctx, tangents[2])


def _inside(ctx: Any, grad: Tensor) -> Tensor:
    return run_fake_quantize_backward(grad.contiguous(), *ctx.saved_tensors, ctx.grid) if ctx.clip else grad


class _Registered(_StraightThrough, torch.autograd.function._SingleLevelFunction):
    """For the operator's kernel, which runs once for each level of torch.func that the tensors belong to."""

    @staticmethod
    def forward(name: str, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if not transformed():
            return run(*inputs)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # the levels below record for themselves
            return run(*inputs)


class _Forced(_StraightThrough, torch.autograd.Function):
    """For an implementation that is called directly."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, name: str, run: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, int]:
        points = 2 if name == "fake_quantize_backward" else 1
        return _batched(points, partial(_Forced.apply, name, run), info, in_dims[2:], *inputs)


def _registered(name: str, run: Callable, args: tuple) -> Any:
    with enable_single_level_autograd_function():
        return _Registered.apply(name, run, *args)  # type: ignore[attr-defined]


def _forced(name: str, function: Callable, args: tuple) -> Any:
    if torch.compiler.is_compiling() and function is getattr(reference, name):  # it takes no function with a jvp
        return _composed(name, *args)
    return _Forced.apply(name, function, *args)


def _composed(name: str, *args: Any) -> Tensor:
    """The same by the reference's own operators, which a graph holds and any transform sees."""
    if name == "fake_quantize_backward":
        grad, x, scale, levels, grid = args
        return reference.fake_quantize_backward(grad, x.detach(), scale.detach(), levels, grid)
    x, scale, levels, grid, clip, *rest = args
    fixed = x.detach(), scale.detach(), levels
    y = reference.fake_quantize(*fixed, grid, clip, *rest)
    through = reference.fake_quantize_backward(x, *fixed, grid) if clip else torch.where(x.isfinite(), x, y)
    return y + (through - through.detach())


def _batched(points: int, run: Callable[..., Any], info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """torch.func.vmap: a batch is more rows of the first ``points`` arguments, each with its scale; what is stochastic,
    whose numbers depend on the place in the tensor, takes one call for each element of the batch."""
    dims = [d if isinstance(d, int) else None for d in in_dims]
    if dims[points + 1] is not None or (points == 1 and args[5]):
        return one_by_one(run, info, in_dims, *args)
    front = [a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
             for a, d in zip(args[: points + 1], dims, strict=False)]  # fmt: skip
    scale = front[points].reshape(-1).contiguous()  # one for all, expanded, is reshaped to a view
    return run(*(t.contiguous() for t in front[:points]), scale, *args[points + 1 :]), 0


_WEIGHT = "Tensor x, Tensor scale, Tensor levels, int[] grid"

define("fake_quantize", f"({_WEIGHT}, bool ste_clip, bool stochastic, int seed) -> Tensor", fake=like_first,
       derivative=_registered, batch=partial(_batched, 1))  # fmt: skip
define("fake_quantize_backward", f"(Tensor grad, {_WEIGHT}) -> Tensor", fake=like_first, derivative=_registered,
       batch=partial(_batched, 2))  # fmt: skip
define("fake_quantize_out_", f"({_WEIGHT}, Tensor(a!) out) -> ()")
define("ste_clip_", f"(Tensor(a!) grad, {_WEIGHT}) -> ()")
define("ste_clip_scale_grad_", f"(Tensor(a!) grad, {_WEIGHT}, bool ste_clip, float factor) -> Tensor",
       fake=lambda grad, x, scale, *_args: torch.empty_like(scale))  # fmt: skip
define("project_interval_", "(Tensor(a!) w, Tensor scale, Tensor levels, int[] grid, Tensor eps) -> ()")
define("soft_quantize", f"({_WEIGHT}, Tensor slack) -> Tensor", fake=like_first)
define("row_sums", "(Tensor x, int rows) -> Tensor", batch=one_by_one,
       fake=lambda x, rows: x.new_empty((rows, NUM_ROW_SUMS), dtype=torch.float32))  # fmt: skip


def fake_quantize(
    x: Tensor, scale: Tensor, grid: Any, *, ste_clip: bool = True, stochastic: bool = False, seed: int = 0
) -> Tensor:
    """y = s Q(x / s): quantize and dequantize, straight-through for the gradient.

    Q is the nearest level of ``grid``: ties to even for uniform grids (as torch.round), to the lower level for
    binary and codebooks; values outside the hull go to the nearest end; NaN stays NaN.
    Backward: grad inside the hull [s c_0, s c_(K-1)], 0 outside; ``ste_clip=False``: grad everywhere. ``scale``
    receives no gradient.
    ``stochastic``: one of x's two neighbouring levels, with E[y] = x inside the hull; Philox4x32-10 with key ``seed``
    and the element's index as counter, so the result depends on neither threads, device nor launch shape.

    x: any shape, float; scale: () or (rows,) positive. Returns a contiguous tensor like ``x``.
    Raises TypeError/ValueError naming the argument. Source: docs/mathematics.md, sections 1 and 3.
    """
    weight = check_weight("x", x, scale, grid)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an int in [0, 2^63), got {seed!r}")
    return run_fake_quantize(x.contiguous(), *weight, bool(ste_clip), bool(stochastic), seed)


def run_fake_quantize(*inputs: Any) -> Tensor:
    """The operator without the checks, differentiable whatever the backend."""
    return differentiable("fake_quantize", _forced, inputs)


def run_fake_quantize_backward(*inputs: Any) -> Tensor:
    """Its derivative, differentiable again."""
    return differentiable("fake_quantize_backward", _forced, inputs)


@partial(in_place, position=3)
def fake_quantize_out_(x: Tensor, scale: Tensor, grid: Any, out: Tensor) -> Tensor:
    """Writes s Q(x / s) into ``out`` (of x's shape, in any layout; any of the float storage types) and returns it.

    Of dtype int8 or float8_e4m3fn, which must hold every level of the grid, it receives Q(x / s); for NaN int8 gets 0.
    """
    weight = check_weight("x", x, scale, grid)
    check_copy("out", out, grid)
    check_like("out", out, None, x.shape, x.device)
    check_written("out", out)
    order, written = layout(out, weight[0].numel()), InPlace()
    point = permuted(x.detach(), order)
    # What is read and written at the same place is fine, what overlaps otherwise is read when it has been written.
    x = point.clone(memory_format=torch.contiguous_format) if shares_partly(x, out) else point.contiguous()
    below_autograd("fake_quantize_out_", x, x, *weight, written.writable(out, order))
    written.finish([out])
    return out


@in_place
def ste_clip_(grad: Tensor, x: Tensor, scale: Tensor, grid: Any) -> Tensor:
    """Zeroes ``grad`` in place where x lies outside the hull: ``fake_quantize``'s backward without a new tensor."""
    check_float_tensor("grad", grad)
    weight = check_weight("x", x, scale, grid)
    check_like("grad", grad, x.dtype, x.shape, x.device)
    check_written("grad", grad)
    run_ste_clip_(grad, x.clone() if shares_partly(x, grad) else x, *weight)
    return grad


def run_ste_clip_(grad: Tensor, x: Tensor, scale: Tensor, levels: Tensor, encoding: list[int]) -> None:
    """The operator without the checks, and without what they cost: this runs in every backward of every layer."""
    order, written = layout(x, scale.numel()), InPlace()
    point = permuted(x.detach(), order).contiguous()
    below_autograd("ste_clip_", x, written.writable(grad, order), point, scale, levels, encoding)
    written.finish([grad])


def scale_grad_factor(numel: int, rows: int, grid: Any) -> float:
    """1 / sqrt(cols c_max): what LSQ multiplies the gradient of a scale of ``cols`` weights by."""
    return 1 / math.sqrt(max(numel // max(rows, 1), 1) * grid.c_max)


@in_place
def ste_clip_scale_grad_(grad: Tensor, x: Tensor, scale: Tensor, grid: Any, *, ste_clip: bool = True) -> Tensor:
    """The gradient of a learned scale, and ``ste_clip_`` in the same pass: for G = ``grad`` of y = s Q(x / s),

        ds = sum over the row of (G (Q(x/s) - x/s) inside the hull, G c_end outside) / sqrt(cols c_max)

    and G becomes 0 outside, in place (not without ``ste_clip``). Returns (rows,) of the type that the kernels compute
    in; sums in float64 over pieces of fixed length, the same bits for any number of threads.
    Arguments and errors as for ``ste_clip_``. Source: Esser et al., LSQ, ICLR 2020; docs/mathematics.md, section 3.
    """
    check_float_tensor("grad", grad)
    weight = check_weight("x", x, scale, grid)
    check_like("grad", grad, x.dtype, x.shape, x.device)
    if ste_clip:
        check_written("grad", grad)
        x = x.clone() if shares_partly(x, grad) else x
    return run_ste_clip_scale_grad(grad, x, weight, scale_grad_factor(x.numel(), weight[0].numel(), grid), ste_clip)


def run_ste_clip_scale_grad(grad: Tensor, x: Tensor, weight: tuple, factor: float, ste_clip: bool) -> Tensor:
    """The same without its checks. weight: scale, levels, grid as the operators take them."""
    order, written = layout(x, weight[0].numel()), InPlace()
    point = permuted(x.detach(), order).contiguous()
    work = written.writable(grad, order) if ste_clip else permuted(grad.detach(), order).contiguous()
    found = below_autograd("ste_clip_scale_grad_", x, work, point, *weight, bool(ste_clip), factor)
    if ste_clip:
        written.finish([grad])
    return found


@in_place
def project_interval_(w: Tensor, scale: Tensor, grid: Any, eps: float | Tensor) -> Tensor:
    """Moves every weight, in place, into the hull and then to the nearest point with h >= 0.

    Feasible is what stands within r = Delta (1 - sqrt(1 - sqrt(eps))) / 2 of its nearest level; an exact midpoint
    goes to the lower side. eps = 1 leaves the inside of the hull alone; as eps -> 0 only the levels remain.
    Idempotent. w: any shape, float; scale: () or (rows,); eps in (0, 1], a float or a 0-dim tensor.
    Raises TypeError/ValueError naming the argument. Source: docs/mathematics.md, section 2.
    """
    weight = check_weight("w", w, scale, grid)
    check_written("w", w)
    eps = rate_tensor("eps", eps, 0.0, 1.0, open_low=True)
    written = InPlace()
    below_autograd("project_interval_", w, written.writable(w, layout(w, weight[0].numel())), *weight, eps)
    written.finish([w])
    return w


SMALLEST_SLACK = 2.0**-126  # the least whose inverse float32 holds for sure; what is smaller counts as it


def soft_quantize(x: Tensor, scale: Tensor, grid: Any, slack: float | Tensor) -> Tensor:
    """Between x (slack = 1) and s Q(x / s) (slack -> 0), without a gradient: what layers compute with while a recipe
    leads a network from its float weights to the quantized ones.

    Inside the hull, for x/s in a bracket of length Delta, u Delta away from the nearer level c:

        y = s (c +- Delta max(u - (1 - slack) / 2, 0) / slack)

    so that the slope is 0 near the levels and 1 / slack at the midpoint; outside, y = s c_end + slack (x - s c_end).
    x: any shape, float; scale: () or (rows,); slack in (0, 1], a float or a 0-dim tensor. Returns a contiguous tensor
    like ``x``. Raises TypeError/ValueError naming the argument. Source: PARQ's proximal map, Jin et al., ICML 2025.
    """
    weight = check_weight("x", x, scale, grid)
    slack = rate_tensor("slack", slack, 0.0, 1.0, open_low=True).clamp(min=SMALLEST_SLACK)
    return run_soft_quantize(x, *weight, slack)


def run_soft_quantize(x: Tensor, *inputs: Any) -> Tensor:
    """The operator without the checks."""
    x = x.detach().contiguous()
    return below_autograd("soft_quantize", x, x, *inputs)


def row_sums(x: Tensor, rows: int) -> Tensor:
    """(rows, 3) float32: sum |x|, sum x^2, max |x| of each of the ``rows`` equal runs of ``x``; NaN gives NaN.

    What the scale rules need, and bit for bit what the update pass leaves in ``stats`` for the same weights.
    """
    check_float_tensor("x", x)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1 or x.numel() % rows:
        raise ValueError(f"rows: expected a positive divisor of {x.numel()}, got {rows!r}")
    x = x.detach()
    x = permuted(x, layout(x, rows)).contiguous()  # the order in which the update pass sums
    return below_autograd("row_sums", x, x, rows)
