"""Derivatives of the operators: reverse and forward mode, of any order, alone and under torch.func's transforms.

One formula serves the registered operator (a kernel for torch's Autograd key) and a forced backend. The formulas are
made of differentiable operators, so that derivatives of them are right too. An operator without one refuses tensors
that are being differentiated: NotImplementedError, never zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .. import contract, reference, runtime
from .rules import RULES
from .schema import library

# ---- what is being differentiated ---------------------------------------------------------------------------------


def _transformed() -> bool:
    """Inside torch.func's grad, vmap, jvp, …, or at a forward-mode level."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _tangent(t: Any) -> bool:
    if isinstance(t, (list, tuple)):
        return any(map(_tangent, t))
    return isinstance(t, Tensor) and forward_ad.unpack_dual(t, level=0).tangent is not None  # torch has one level, 0


def _tracked(args: tuple) -> bool:
    """Whether the call is recorded: an argument requires grad, or has a forward-mode tangent."""
    return (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or (_transformed() and _tangent(args))


def below_autograd(name: str, like: Tensor, *args: Any) -> Any:
    """Operator ``name`` on tensors of which nothing is to be recorded; spares the call into the kernels made here."""
    function = runtime.operator(name, like)
    if torch.compiler.is_compiling() or not isinstance(function, torch._ops.OpOverload):
        return function(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return function(*args)


# ---- the straight-through estimator -------------------------------------------------------------------------------


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
        if _transformed():
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
    return fake_quantize_backward(grad.contiguous(), *ctx.saved_tensors, ctx.grid) if ctx.clip else grad


class _Mixed(torch.autograd.Function):
    """mix_fake_quantize in reverse mode: gradients of x, the scales (where they are learned) and the strengths."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        x, scales, strengths, *ctx.options = inputs
        ctx.save_for_backward(x, scales, strengths)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _mix_fake_quantize_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options)
        return None, grads[0], grads[2] if ctx.options[2] else None, grads[1], None, None, None


# ---- mixtures as a graph of single quantizations: what torch.func and second derivatives go through -----------------


def _candidates(x: Tensor, scales: Tensor, grids: list[int]) -> list[tuple[Tensor, list[int]]]:
    return [(scales[k], grids[3 * k : 3 * k + 3]) for k in range(len(scales))]


def _no_levels(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=x.device)


def _mixture(x: Tensor, scales: Tensor, strengths: Tensor, grids: list[int], clip: bool, learned: bool) -> Tensor:
    """``mix_fake_quantize``, the same products and sums in the same order."""
    _once(learned)
    y: Any = None
    wide = x.to(reference.compute_dtype(x.dtype))
    for p, (s, grid) in zip(strengths.to(wide.dtype), _candidates(x, scales, grids), strict=True):
        q = wide if grid[0] == contract.FLOAT else fake_quantize(wide, s, _no_levels(x), grid, clip, False, 0)
        y = p * q if y is None else y + p * q
    return y.to(x.dtype)


def _mixture_gradients(
    grad: Tensor, x: Tensor, scales: Tensor, strengths: Tensor, grids: list[int], clip: bool, learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``mix_fake_quantize_backward``."""
    _once(learned)
    dtype = reference.compute_dtype(x.dtype)
    wide, g = x.to(dtype), grad.to(dtype)
    to_x, to_strengths = torch.zeros_like(wide), []
    for p, (s, grid) in zip(strengths.to(dtype), _candidates(x, scales, grids), strict=True):
        q = wide if grid[0] == contract.FLOAT else fake_quantize(wide, s, _no_levels(x), grid, clip, False, 0)
        inside = g
        if clip and grid[0] != contract.FLOAT:
            inside = fake_quantize_backward(g, x.to(dtype), s, _no_levels(x), grid)
        to_x = to_x + p * inside
        to_strengths.append((g * q).double().sum())
    return to_x.to(x.dtype), torch.stack(to_strengths).to(strengths.dtype), torch.zeros_like(scales)


def _once(learned: bool) -> None:
    if learned:
        raise NotImplementedError(
            "askew::mix_fake_quantize: learned scales are differentiated once, in reverse mode, outside torch.func; "
            "use learned=False, or backward() without create_graph=True"
        )


# ---- the kernels for torch's Autograd key ---------------------------------------------------------------------------


class _Registered(_StraightThrough, torch.autograd.function._SingleLevelFunction):
    """For the operator's kernel, which runs once for each level of torch.func that the tensors belong to."""

    @staticmethod
    def forward(name: str, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if not _transformed():
            return run(*inputs)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # the levels below record for themselves
            return run(*inputs)


class _Forced(_StraightThrough, torch.autograd.Function):
    """For an implementation that is called directly."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, name: str, run: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, int]:
        return _batched(name, lambda *rows: _Forced.apply(name, run, *rows), info, in_dims[2:], *inputs)


def _straight_through(name: str, run: Callable, args: tuple) -> Any:
    with enable_single_level_autograd_function():
        return _Registered.apply(name, run, *args)  # type: ignore[attr-defined]


def _mix(name: str, run: Callable, args: tuple) -> Any:
    return _mixture(*args) if _transformed() else _Mixed.apply(run, *args)


def _mix_backward(name: str, run: Callable, args: tuple) -> Any:
    return _mixture_gradients(*args)


def _refuse(name: str, run: Callable, args: tuple) -> Any:
    raise NotImplementedError(
        f"askew::{name} has no derivative, but one of its tensors is being differentiated (it requires grad or has a "
        "forward-mode tangent): pass detached tensors, or call it under torch.no_grad()"
    )


_DERIVATIVES: dict[str, Callable] = {
    "fake_quantize": _straight_through, "fake_quantize_backward": _straight_through, "mix_fake_quantize": _mix,
    "mix_fake_quantize_backward": _mix_backward,
}  # fmt: skip
WITHOUT_DERIVATIVE = (
    "fake_quantize_out_", "ste_clip_", "project_interval_", "row_sums", "sam_norm", "sam_perturb_", "sam_restore_",
    "sam_average_", *(rule.operator for rule in RULES.values()),
)  # fmt: skip


def _register(name: str, derivative: Callable) -> None:
    op = getattr(torch.ops.askew, name).default
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def kernel(keyset: Any, *args: Any) -> Any:
        def run(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        result = derivative(name, run, args) if _tracked(args) else run(*args)
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return result

    library.impl(name, kernel, "Autograd", with_keyset=True)


for _name in WITHOUT_DERIVATIVE:
    _register(_name, _refuse)
for _name, _derivative in _DERIVATIVES.items():
    _register(_name, _derivative)


# ---- torch.func.vmap ------------------------------------------------------------------------------------------------


def _batched(name: str, run: Callable[..., Any], info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """A batch is more rows, each with its scale; the rest, whose numbers depend on the place in the tensor or are sums
    over it, takes one call for each element of the batch."""
    size, dims = info.batch_size, [d if isinstance(d, int) else None for d in in_dims]
    points = {"fake_quantize": 1, "fake_quantize_backward": 2}.get(name, 0)
    if points and dims[points + 1] is None and not (name == "fake_quantize" and args[5]):
        front = [
            a.expand(size, *a.shape) if d is None else a.movedim(d, 0) for a, d in zip(args, dims[: points + 1])  # noqa: B905
        ]  # fmt: skip
        return run(*(t.contiguous() for t in front[:points]), front[points].reshape(-1), *args[points + 1 :]), 0
    each = [run(*(a if d is None else a.select(d, i).contiguous() for a, d in zip(args, dims, strict=True)))
            for i in range(size)]  # fmt: skip
    if isinstance(each[0], tuple):
        return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
    return torch.stack(each), 0


def _batched_operator(name: str) -> Callable:
    return lambda info, in_dims, *args: _batched(name, getattr(torch.ops.askew, name).default, info, in_dims, *args)


for _name in (*_DERIVATIVES, "row_sums"):
    torch.library.register_vmap(f"askew::{_name}", _batched_operator(_name), lib=library)


# ---- the operators, differentiable whatever the backend ------------------------------------------------------------


def _differentiable(name: str, inputs: tuple) -> Any:
    function = runtime.operator(name, inputs[0])
    if isinstance(function, torch._ops.OpOverload):
        return function(*inputs)
    return _Forced.apply(name, function, *inputs)


def fake_quantize(*inputs: Any) -> Tensor:
    """The operator, differentiable whatever the backend."""
    return _differentiable("fake_quantize", inputs)


def fake_quantize_backward(*inputs: Any) -> Tensor:
    """Its derivative, differentiable again."""
    return _differentiable("fake_quantize_backward", inputs)


def mix_fake_quantize(*inputs: Any) -> Tensor:
    """The operator, differentiable whatever the backend."""
    function = runtime.operator("mix_fake_quantize", inputs[0])
    if isinstance(function, torch._ops.OpOverload):
        return function(*inputs)
    return _mix("mix_fake_quantize", function, inputs)


def _mix_fake_quantize_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    function = runtime.operator("mix_fake_quantize_backward", inputs[0])
    if isinstance(function, torch._ops.OpOverload) or not _tracked(inputs):
        return function(*inputs)
    return _mixture_gradients(*inputs)


# ---- packed products ------------------------------------------------------------------------------------------------


def packed_weight(
    codes: Tensor, scale: Tensor, levels: Tensor, grid: list[int], bits: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """(n, cols) s c in ``dtype``, rounded once; differentiable in the scale."""
    if torch.compiler.is_compiling():
        recorded = torch.is_grad_enabled() and scale.requires_grad
    else:
        recorded = torch._C._functorch.is_functorch_wrapped_tensor(scale) or _tracked((scale,))
    kind = reference.compute_dtype(dtype) if recorded else dtype
    factor = torch.ones(scale.numel(), dtype=torch.float32, device=codes.device) if recorded else scale.detach()
    level = _unpacked(codes, factor, levels, grid, bits, cols, kind)
    if not recorded:
        return level
    return (scale.to(kind).reshape(-1, 1) * level.reshape(scale.numel(), -1)).to(dtype).reshape(level.shape)


def _unpacked(
    codes: Tensor, scale: Tensor, levels: Tensor, grid: list[int], bits: int, cols: int, dtype: torch.dtype
) -> Tensor:
    with contextlib.ExitStack() as plain:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            codes, scale, levels = (_not_transformed(t) for t in (codes, scale, levels))
            plain.enter_context(torch._C._DisableFuncTorch())
        out = torch.empty(codes.shape[0], cols, dtype=dtype, device=codes.device)
        below_autograd("packed_dequantize_", out, codes, scale, levels, grid, bits, out)
    return out


def _not_transformed(t: Tensor) -> Tensor:
    """``t`` without the wrappers in which torch.func's levels of differentiation hand on what they do not touch."""
    while torch._C._functorch.is_gradtrackingtensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        raise NotImplementedError(
            "askew::packed_linear: vmap over packed codes cannot be differentiated; unpack_ first"
        )
    return t


class _Packed(torch.autograd.Function):
    """y = x W^T + b from the codes. Backward, with the weight unpacked for it: grad W to x (straight through the
    rounding of int8 activations), the levels' share to the scale, and the sum over rows to the bias."""

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
        kind = reference.compute_dtype(ctx.x_dtype)
        to_x, to_scale, to_bias = (ctx.needs_input_grad[i] for i in (1, 3, 7))
        grads: list[Tensor | None] = [None] * 8
        g = grad.to(kind)
        if to_x:
            weight = packed_weight(codes, scale, levels, ctx.grid, ctx.bits, ctx.cols, kind)
            grads[1] = reference.product(g, weight.t()).to(ctx.x_dtype)
        if to_scale:
            level = packed_weight(codes, torch.ones_like(scale), levels, ctx.grid, ctx.bits, ctx.cols, kind)
            of_weight = reference.product(g.t(), x.to(kind).t())
            grads[3] = (of_weight * level).reshape(scale.numel(), -1).sum(1).reshape(scale.shape)
        if to_bias:
            grads[7] = g.sum(0).to(ctx.bias[0]).reshape(ctx.bias[1])
        return tuple(grads)


def _packed(name: str, run: Callable[..., Tensor], args: tuple) -> Tensor:
    if not _transformed():
        return _Packed.apply(run, *args)
    if name == "packed_linear_int8":
        raise NotImplementedError(
            f'askew::{name} rounds its inputs and is differentiated in reverse mode only; use activations="float" for '
            "torch.func and forward-mode derivatives"
        )
    x, codes, scale, levels, grid, bits, bias = args
    kind = reference.compute_dtype(x.dtype)
    y = reference.product(x.to(kind), packed_weight(codes, scale, levels, grid, bits, x.shape[1], kind))
    return (y if bias is None else y + bias.to(kind)).to(x.dtype)


def _packed_batch(name: str) -> Callable:
    """vmap over inputs and biases: a batch of inputs is more rows; of other weights, one product for each."""

    def batched(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        op, (x, *weight, bias) = getattr(torch.ops.askew, name).default, args
        if any(d is not None for d in in_dims[1:4]):
            each = [op(*(a.select(d, i).contiguous() if isinstance(d, int) else a
                         for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]  # fmt: skip
            return torch.stack(each), 0
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        shared = bias is not None and in_dims[6] is None
        y = op(x.reshape(-1, x.shape[-1]), *weight, bias if shared else None).unflatten(0, x.shape[:2])
        return y if shared or bias is None else y + bias.movedim(in_dims[6], 0)[:, None], 0

    return batched


for _name in ("packed_linear", "packed_linear_int8"):
    _register(_name, _packed)
    torch.library.register_vmap(f"askew::{_name}", _packed_batch(_name), lib=library)
_register("packed_dequantize_", _refuse)


def packed_product(name: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function``, an implementation of packed_linear or packed_linear_int8, differentiable in x, scale and bias."""
    if isinstance(function, torch._ops.OpOverload) or not (_transformed() or _tracked(inputs)):
        return function(*inputs)
    return _packed(name, function, inputs)
