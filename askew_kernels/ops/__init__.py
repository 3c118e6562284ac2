"""Typed public functions over the operators ``askew::…``: every argument is checked before anything is written.

Shapes: a tensor is seen as (rows, cols), one scale a row; ``scale`` has shape () or (1,) per tensor, (shape[0],) per
channel, (shape[0] * groups,) per group. Storage is float32, bfloat16 or float16 (float64 runs on the reference);
arithmetic is float32. In-place functions accept any dense layout; where it is not contiguous they work on a copy.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference, runtime
from . import autograd, flops, schema

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SKEWS = ("gradient", "direction")

# ---- where nothing is compiled for a device, the operator is Triton's or the reference's -------------------------

for _device, _key in (("cpu", "CPU"), ("cuda", "CUDA")):
    for _name in schema.SCHEMAS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"askew::{_name}", _key):
            continue

        def _late(*args: Any, _name: str = _name, _device: str = _device) -> Any:
            return runtime.stand_in(_device, _name)(*args)

        schema.library.impl(_name, _late, _key)


flops.register_when_imported()

# ---- checks -------------------------------------------------------------------------------------------------------


def concrete(t: Tensor) -> bool:
    """Whether the values may be looked at here: on the CPU, not being traced, not fake, not inside torch.func."""
    return (
        not torch.compiler.is_compiling()
        and t.device.type == "cpu"
        and type(t) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def check_float_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if t.is_complex():
        raise TypeError(f"{name}: complex tensors cannot be quantized, got {t.dtype}")
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {t.layout}")
    if t.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {t.dtype}")


def check_grid(grid: Any) -> None:
    if not (hasattr(grid, "encoding") and hasattr(grid, "levels_tensor")):
        raise TypeError(f"grid: expected a grid such as Uniform(bits=4), Binary(), Ternary(), got {grid!r}")


def _check_scale(name: str, scale: Any, x: Tensor, x_name: str) -> Tensor:
    """``scale`` as float32 (rows,), after checking that it fits ``x``."""
    if not isinstance(scale, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(scale).__name__}")
    if not scale.is_floating_point():
        raise TypeError(f"{name}: expected a float tensor, got {scale.dtype}")
    if scale.device != x.device:
        raise ValueError(f"{name}: expected on the device of {x_name} ({x.device}), got {scale.device}")
    rows, first = scale.numel(), x.shape[0] if x.dim() > 1 else 1
    fits = rows == 1 or (rows and first and rows % first == 0 and x.numel() % rows == 0) or (rows == first)
    if scale.dim() > 1 or not fits:
        per_group = f" or ({first} * groups,)" if x.dim() > 1 else f" or (groups,), a divisor of {x.numel()},"
        raise ValueError(
            f"{name}: expected shape () or ({first},){per_group} for {x_name} of shape {tuple(x.shape)}, "
            f"got {tuple(scale.shape)}"
        )
    if rows and concrete(scale):  # on a GPU the look would stall the stream
        low, high = scale.detach().aminmax()
        if not (low > 0 and high < math.inf):
            raise ValueError(
                f"{name}: expected positive finite scales, got values in [{float(low):g}, {float(high):g}]"
            )
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    return scale.detach().to(wanted).reshape(-1).contiguous()


def _number(name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    value = float(value)
    if not (low < value <= high if open_low else low <= value <= high) or math.isinf(value):
        interval = f"{'(' if open_low else '['}{low:g}, {'inf)' if high == math.inf else f'{high:g}]'}"
        raise ValueError(f"{name}: expected a finite number in {interval}, got {value}")
    return value


def rate_tensor(name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False) -> Tensor:
    """A float or a 0-dim tensor as a 0-dim float tensor; values on the CPU are checked, a GPU's are not waited for."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected a float or a 0-dim float tensor, got {value.dtype} {tuple(value.shape)}"
            )
        if concrete(value):
            _number(name, float(value), low, high, open_low)
        value = value.detach()
        return value if value.dtype in (torch.float32, torch.float64) else value.float()
    return torch.tensor(_number(name, value, low, high, open_low), dtype=torch.float64, device="cpu")


def _in_place(position: int = 0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a function that writes its argument number ``position`` (a tensor or a list) and records nothing.

    NotImplementedError where autograd has computed what is to be written: its gradient would leave the write out.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__code__.co_varnames[position]

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                written = args[position] if len(args) > position else kwargs.get(name)
                for t in [written] if isinstance(written, Tensor) else written or ():
                    if isinstance(t, Tensor) and t.requires_grad and not t.is_leaf:
                        raise NotImplementedError(
                            f"{name}: askew::{function.__name__} writes in place and is not differentiable, not even "
                            f"once, so double backward (create_graph=True) cannot pass through it; detach {name}, or "
                            "call it under torch.no_grad()"
                        )
            with torch.no_grad():
                return function(*args, **kwargs)

        return checked

    return decorate


def _channels_last(t: Tensor) -> list[int] | None:
    """The order of dimensions in which ``t`` is contiguous, dimension 0 first; None if there is none."""
    strides = t.stride()
    order = [0, *sorted(range(1, t.dim()), key=lambda d: (-strides[d], d))]
    return order if t.permute(order).is_contiguous() else None


class _InPlace:
    """Contiguous stand-ins for tensors that are written, and the copies back that some of them need."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []

    def writable(self, t: Tensor, order: list[int] | None = None) -> Tensor:
        t = t.detach()
        view = t if order is None else t.permute(order)
        if view.is_contiguous():
            return view
        work = view.contiguous()
        self.copies.append((view, work))
        return work

    def finish(self) -> None:
        for target, work in self.copies:
            target.copy_(work)


def _layout(t: Tensor, rows: int) -> list[int] | None:
    """A permutation that makes ``t`` contiguous without moving it between rows; None to take it as it is."""
    if t.is_contiguous() or t.dim() < 3 or rows not in (1, t.shape[0]):
        return None
    return _channels_last(t)


# ---- fake quantization ----------------------------------------------------------------------------------------------


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
    check_float_tensor("x", x)
    check_grid(grid)
    scale = _check_scale("scale", scale, x, "x")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an int in [0, 2^63), got {seed!r}")
    x = x.contiguous()
    return autograd.fake_quantize(
        x, scale, grid.levels_tensor(x.device), grid.encoding, bool(ste_clip), bool(stochastic), seed
    )


MOST_CANDIDATES = 8


def mix_fake_quantize(
    x: Tensor, scales: Tensor, strengths: Tensor, grids: Sequence[Any], *, ste_clip: bool = True, learned: bool = False
) -> Tensor:
    """y = sum_k p_k s_k Q_k(x / s_k): several quantizations of one tensor, mixed by strengths p, in one read of x.

    Backward, in one pass, for grad_y = G: to x, G sum_k p_k over the candidates in whose hull x is (``ste_clip=False``:
    over all); to p_k, sum G s_k Q_k; to s_k of a row with ``learned``, p_k sum (G (Q_k - x/s_k) inside, G c_end
    outside) / sqrt(cols c_max) (LSQ), otherwise none.

    x: any shape, float; scales: (candidates, rows) positive, as for ``fake_quantize``; strengths: (candidates,);
    grids: up to 8 of Uniform, Ternary, Binary, or None for x itself, whose scale is not looked at. Sums in float64.
    Returns a contiguous tensor like ``x``. Raises TypeError/ValueError naming the argument.
    Source: Cai, Vasconcelos, EdMIPS, CVPR 2020; Esser et al., LSQ, ICLR 2020; docs/mathematics.md, section 6.
    """
    check_float_tensor("x", x)
    encodings = candidate_encodings(grids)
    for name, t, shape in (("scales", scales, "(candidates, rows)"), ("strengths", strengths, "(candidates,)")):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.device != x.device:
            raise TypeError(f"{name}: expected a float tensor of shape {shape} on {x.device}, got {t!r:.60}")
    if strengths.shape != (len(grids),):
        raise ValueError(f"strengths: expected shape ({len(grids)},), got {tuple(strengths.shape)}")
    if scales.dim() != 2 or len(scales) != len(grids):
        raise ValueError(f"scales: expected shape ({len(grids)}, rows), got {tuple(scales.shape)}")
    for k, grid in enumerate(grids):
        if grid is not None or scales.shape[1] == 0:
            _check_scale(f"scales[{k}]", scales[k], x, "x")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    return autograd.mix_fake_quantize(
        x.contiguous(), scales.to(wanted).contiguous(), strengths.to(wanted).contiguous(), encodings, bool(ste_clip),
        bool(learned),
    )  # fmt: skip


def candidate_encodings(grids: Sequence[Any]) -> list[int]:
    """Three integers a candidate; None is no quantization."""
    if not 1 <= len(grids) <= MOST_CANDIDATES:
        raise ValueError(f"grids: expected 1 to {MOST_CANDIDATES} candidates, got {len(grids)}")
    encodings: list[int] = []
    for grid in grids:
        if grid is None:
            encodings += [reference.FLOAT, 0, 0]
            continue
        check_grid(grid)
        if grid.encoding[0] == reference.CODEBOOK:
            raise ValueError(f"grids: expected Uniform, Ternary, Binary or None, got {grid}")
        encodings += grid.encoding
    return encodings


@_in_place(3)
def fake_quantize_out_(x: Tensor, scale: Tensor, grid: Any, out: Tensor) -> Tensor:
    """Writes s Q(x / s) into ``out`` (contiguous, x's shape; any of the float storage types) and returns it."""
    check_float_tensor("x", x)
    check_float_tensor("out", out)
    check_grid(grid)
    scale = _check_scale("scale", scale, x, "x")
    if out.shape != x.shape or out.device != x.device or not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor of shape {tuple(x.shape)} on {x.device}")
    x = x.detach().contiguous()
    autograd.below_autograd("fake_quantize_out_", x, x, scale, grid.levels_tensor(x.device), grid.encoding, out)
    torch.autograd.graph.increment_version(out)
    return out


@_in_place()
def ste_clip_(grad: Tensor, x: Tensor, scale: Tensor, grid: Any) -> Tensor:
    """Zeroes ``grad`` in place where x lies outside the hull: ``fake_quantize``'s backward without a new tensor."""
    check_float_tensor("grad", grad)
    check_float_tensor("x", x)
    check_grid(grid)
    scale = _check_scale("scale", scale, x, "x")
    if grad.shape != x.shape or grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(
            f"grad: expected {x.dtype} of shape {tuple(x.shape)} on {x.device}, got {grad.dtype} {tuple(grad.shape)} "
            f"on {grad.device}"
        )
    order, in_place = _layout(x, scale.numel()), _InPlace()
    work = in_place.writable(grad, order)
    point = x.detach() if order is None else x.detach().permute(order)
    autograd.below_autograd(
        "ste_clip_", x, work, point.contiguous(), scale, grid.levels_tensor(x.device), grid.encoding
    )
    in_place.finish()
    torch.autograd.graph.increment_version(grad)
    return grad


# ---- the interval constraint --------------------------------------------------------------------------------------


@_in_place()
def project_interval_(w: Tensor, scale: Tensor, grid: Any, eps: float | Tensor) -> Tensor:
    """Moves every weight, in place, into the hull and then to the nearest point with h >= 0.

    Feasible is what stands within r = Delta (1 - sqrt(1 - sqrt(eps))) / 2 of its nearest level; an exact midpoint
    goes to the lower side. eps = 1 leaves the inside of the hull alone; as eps -> 0 only the levels remain.
    Idempotent. w: any shape, float; scale: () or (rows,); eps in (0, 1], a float or a 0-dim tensor.
    Raises TypeError/ValueError naming the argument. Source: docs/mathematics.md, section 2.
    """
    check_float_tensor("w", w)
    check_grid(grid)
    scale = _check_scale("scale", scale, w, "w")
    eps = rate_tensor("eps", eps, 0.0, 1.0, open_low=True)
    in_place = _InPlace()
    work = in_place.writable(w, _layout(w, scale.numel()))
    autograd.below_autograd("project_interval_", w, work, scale, grid.levels_tensor(w.device), grid.encoding, eps)
    in_place.finish()
    torch.autograd.graph.increment_version(w)
    return w


def row_sums(x: Tensor, rows: int) -> Tensor:
    """(rows, 3) float32: sum |x|, sum x^2, max |x| of each of the ``rows`` equal runs of ``x``; NaN gives NaN.

    What the scale rules need, and bit for bit what the update pass leaves in ``stats`` for the same weights.
    """
    check_float_tensor("x", x)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1 or x.numel() % rows:
        raise ValueError(f"rows: expected a positive divisor of {x.numel()}, got {rows!r}")
    x = x.detach()
    order = _layout(x, rows)  # the order in which the update pass sums
    x = (x if order is None else x.permute(order)).contiguous()
    return autograd.below_autograd("row_sums", x, x, rows)


# ---- the updates --------------------------------------------------------------------------------------------------


class SkewStats:
    """Sums that an update pass leaves behind, for each tensor of its list.

    ``row_sums[i]``: float32 (rows, 3), sum |w|, sum w^2, max |w| of the updated weights: the next scale;
    ``totals[i]``: float64 (6,), in the order of ``NAMES``, at the point where the step started. Either list may be
    empty: then these sums are not taken.
    """

    NAMES = ("infeasible", "violation", "velocity_squared", "grad_velocity", "flips", "nonfinite")

    def __init__(self, row_sums: Sequence[Tensor] = (), totals: Sequence[Tensor] = ()) -> None:
        self.row_sums, self.totals = list(row_sums), list(totals)

    @classmethod
    def empty_for(cls, params: Sequence[Tensor], scales: Sequence[Tensor]) -> SkewStats:
        """Room for both kinds of sums."""
        return cls(
            [
                torch.zeros(s.numel(), reference.NUM_ROW_SUMS, dtype=torch.float32, device=p.device)
                for p, s in zip(params, scales, strict=True)
            ],
            [torch.zeros(reference.NUM_TOTALS, dtype=torch.float64, device=p.device) for p in params],
        )


def _check_params(params: Sequence[Tensor], name: str = "params") -> None:
    for i, p in enumerate(params):
        check_float_tensor(f"{name}[{i}]", p)
        if p.device != params[0].device:
            raise ValueError(f"{name}[{i}]: expected on {params[0].device} as {name}[0], got {p.device}")
        if (p.dtype == torch.float64) != (params[0].dtype == torch.float64):
            raise TypeError(
                f"{name}[{i}]: float64 parameters take a list of their own, got {p.dtype} beside {params[0].dtype}"
            )


def _check_list(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], same_dtype: bool = True) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"{name}: expected {len(params)} tensors, one for each parameter, got {len(tensors)}")
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        check_float_tensor(f"{name}[{i}]", t)
        if t.shape != p.shape or t.device != p.device or (same_dtype and t.dtype != p.dtype):
            raise ValueError(
                f"{name}[{i}]: expected {p.dtype if same_dtype else 'a float tensor'} of shape {tuple(p.shape)} on "
                f"{p.device}, got {t.dtype} {tuple(t.shape)} on {t.device}"
            )


def _skew_update(
    name: str, params: Sequence[Tensor], grads: Sequence[Tensor], states: Mapping[str, Sequence[Tensor] | None],
    scales: Sequence[Tensor], grids: Sequence[Any], dequantized: Sequence[Tensor] | None, stats: SkewStats | None,
    rates: list[Tensor], numbers: list[Any], skew: str,
) -> None:  # fmt: skip
    """Checks everything, then runs operator ``name``; ``states`` None where the rule keeps no such buffer."""
    _check_params(params)
    _check_list("grads", grads, params)
    for key, buffers in states.items():
        if buffers is not None:
            _check_list(key, buffers, params)
    for key, items in (("scales", scales), ("grids", grids)):
        if len(items) != len(params):
            raise ValueError(f"{key}: expected {len(params)}, one for each parameter, got {len(items)}")
    flat_scales = [
        _check_scale(f"scales[{i}]", s, p, f"params[{i}]") for i, (s, p) in enumerate(zip(scales, params, strict=True))
    ]
    for grid in grids:
        check_grid(grid)
    if dequantized is not None:
        _check_list("dequantized", dequantized, params, same_dtype=False)
    stats = stats or SkewStats()
    for key, outs, shapes, dtype in (
        ("stats.row_sums", stats.row_sums, [(s.numel(), reference.NUM_ROW_SUMS) for s in flat_scales], torch.float32),
        ("stats.totals", stats.totals, [(reference.NUM_TOTALS,)] * len(params), torch.float64),
    ):
        if outs and len(outs) != len(params):
            raise ValueError(f"{key}: expected {len(params)} tensors, got {len(outs)}")
        for i, out in enumerate(outs):
            if not isinstance(out, Tensor) or out.device != params[i].device:
                raise TypeError(f"{key}[{i}]: expected a Tensor on {params[i].device}, got {out!r}")
            if tuple(out.shape) != shapes[i] or out.dtype != dtype or not out.is_contiguous():
                raise ValueError(
                    f"{key}[{i}]: expected contiguous {dtype} {shapes[i]}, got {out.dtype} {tuple(out.shape)}"
                )
    if skew not in SKEWS:
        raise ValueError(f"skew: expected one of {', '.join(SKEWS)}, got {skew!r}")
    if params:
        levels = [grid.levels_tensor(p.device) for grid, p in zip(grids, params, strict=True)]
        encodings = [n for grid in grids for n in grid.encoding]
        run_skew_update(name, params, grads, states, flat_scales, levels, encodings, dequantized or [], stats, rates,
                        numbers)  # fmt: skip


def run_skew_update(
    name: str, params: Sequence[Tensor], grads: Sequence[Tensor], states: Mapping[str, Sequence[Tensor] | None],
    scales: list[Tensor], levels: list[Tensor], encodings: list[int], dequantized: Sequence[Tensor], stats: SkewStats,
    rates: list[Tensor], numbers: list[Any], contiguous: bool = False, descent: Sequence[Any] = (),
) -> None:  # fmt: skip
    """The update without its checks, for callers that made sure of every argument (the optimizers).

    ``contiguous``: every tensor but the gradients is known to be. ``descent``: kept, firsts and coefficients of a
    sharpness-aware step (see ``schema``); needs ``contiguous``.
    """
    in_place = _InPlace()
    if contiguous:
        writable: Any = lambda tensors: tensors or []  # noqa: E731
        grads = [g if g.is_contiguous() else g.contiguous() for g in grads]
    else:
        orders = [_layout(p, s.numel()) for p, s in zip(params, scales, strict=True)]
        grads = [
            (g if order is None else g.permute(order)).detach().contiguous()
            for g, order in zip(grads, orders, strict=True)
        ]

        def writable(tensors: Sequence[Tensor] | None) -> list[Tensor]:
            return [in_place.writable(t, order) for t, order in zip(tensors or [], orders, strict=False)]

    autograd.below_autograd(
        name, params[0],
        writable(params), grads, *(writable(buffers) for buffers in states.values()), scales, levels, encodings,
        writable(dequantized), stats.row_sums, stats.totals, *rates, *numbers, *descent,
    )  # fmt: skip
    in_place.finish()
    written = [*params, *(b for buffers in states.values() if buffers for b in buffers), *dequantized]
    torch.autograd.graph.increment_version(written)


@_in_place()
def skew_sgd_(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor] | None,
    scales: Sequence[Tensor], grids: Sequence[Any], *, lr: float | Tensor, eps: float | Tensor, alpha: float = 1.0,
    momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False,
    skew: str = "gradient", clamp: bool = True, dequantized: Sequence[Tensor] | None = None,
    stats: SkewStats | None = None, maximize: bool = False, skip_nonfinite: bool = False,
) -> None:  # fmt: skip
    """One ASkewSGD step, in place, over a tensor list in one launch: each tensor is read once and written once.

    With d = -grad (``skew="gradient"``, as published) or SGD's own direction (``skew="direction"``), u the distance
    to the nearest level over the bracket length Delta, h = eps - 16 u^2 (1-u)^2 and |h'| = (32/Delta) u (1-u)(1-2u):

        kappa = min(alpha (-h) / |h'|, Delta / (4 lr))
        v     = d                                             where h >= 0, on a midpoint, or outside the hull
              = side * max(kappa, side * d)                   elsewhere; side = +1/-1 towards the nearest level
        w     <- clamp(w);  w <- w + lr v;  clamp to the hull (both clamps only with ``clamp``)

    ``skew="gradient"``: -v then replaces the gradient in torch.optim.SGD's rule (weight decay, momentum, Nesterov).
    A zero momentum buffer with ``dampening=0`` is torch's first step.

    params, grads, momentum_buffers (None without momentum): lists of equal shapes and dtypes; scales: () or (rows,);
    grids: one for each parameter; lr >= 0 and eps in (0, 1]: floats or 0-dim tensors. ``dequantized``: tensors that
    receive s Q(w/s) of the new weights, in their own dtype; ``stats``: a ``SkewStats`` that receives the pass's sums.
    NaN and inf gradients do what torch.optim.SGD does; with ``skip_nonfinite`` their elements are left alone.
    Raises TypeError/ValueError naming the argument before anything is written.
    Source: Leconte, Schechtman, Moulines, ASkewSGD, AISTATS 2023; docs/mathematics.md, section 2.
    """
    momentum = _number("momentum", momentum, 0.0)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("nesterov: needs momentum > 0 and dampening = 0")
    if momentum and momentum_buffers is None:
        raise ValueError("momentum_buffers: expected one for each parameter with momentum > 0, got None")
    rates = [rate_tensor("lr", lr, 0.0), rate_tensor("eps", eps, 0.0, 1.0, open_low=True)]
    numbers = [
        _number("alpha", alpha, 0.0), momentum, _number("dampening", dampening, -math.inf),
        _number("weight_decay", weight_decay, 0.0), bool(nesterov), skew == "direction", bool(clamp), bool(maximize),
        bool(skip_nonfinite),
    ]  # fmt: skip
    states = {"momentum_buffers": momentum_buffers if momentum else None}
    _skew_update("skew_sgd_", params, grads, states, scales, grids, dequantized, stats, rates, numbers, skew)


@_in_place()
def skew_adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    scales: Sequence[Tensor], grids: Sequence[Any], *, step: float | Tensor, lr: float | Tensor, eps: float | Tensor,
    alpha: float = 1.0, betas: tuple[float, float] = (0.9, 0.999), adam_eps: float = 1e-8, weight_decay: float = 0.01,
    skew: str = "gradient", clamp: bool = True, dequantized: Sequence[Tensor] | None = None,
    stats: SkewStats | None = None, maximize: bool = False, skip_nonfinite: bool = False,
) -> None:  # fmt: skip
    """One ASkewAdamW step: ``skew_sgd_`` with torch.optim.AdamW as the base rule.

    The base direction is -(m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + adam_eps) - weight_decay w, with the
    moments updated first. ``step`` counts from 1; ``eps`` is the constraint's, ``adam_eps`` AdamW's denominator's.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    beta1, beta2 = (_number(f"betas[{i}]", b, 0.0) for i, b in enumerate(betas))
    if beta1 >= 1 or beta2 >= 1:
        raise ValueError(f"betas: expected numbers in [0, 1), got {betas}")
    rates = [
        rate_tensor("step", step, 1.0),
        rate_tensor("lr", lr, 0.0),
        rate_tensor("eps", eps, 0.0, 1.0, open_low=True),
    ]
    numbers = [
        _number("alpha", alpha, 0.0), beta1, beta2, _number("adam_eps", adam_eps, 0.0),
        _number("weight_decay", weight_decay, 0.0), skew == "direction", bool(clamp), bool(maximize),
        bool(skip_nonfinite),
    ]  # fmt: skip
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _skew_update("skew_adamw_", params, grads, states, scales, grids, dequantized, stats, rates, numbers, skew)


# ---- sharpness-aware perturbations ----------------------------------------------------------------------------------


def _dense_order(t: Tensor) -> list[int] | None:
    """A permutation that makes ``t`` contiguous (channels-last and the like); None to take it as it is."""
    if t.is_contiguous():
        return None
    strides = t.stride()
    order = sorted(range(t.dim()), key=lambda d: (-strides[d], d))
    return order if t.permute(order).is_contiguous() else None


class _Flat:
    """Lists of equal shapes as contiguous tensors whose elements stand in the same order.

    The usual list, contiguous from end to end, is passed on as it is: a call for each tensor is what a step on a small
    model costs. For use without gradients.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        orders = [_dense_order(t) for t in like]
        self.orders = None if all(order is None for order in orders) else orders
        self.in_place = _InPlace()

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.orders is None:
            return [t if t.is_contiguous() else t.contiguous() for t in tensors]
        return [
            (t if order is None else t.permute(order)).contiguous()
            for t, order in zip(tensors, self.orders, strict=True)
        ]

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.orders is None:
            return [t if t.is_contiguous() else self.in_place.writable(t) for t in tensors]
        return [self.in_place.writable(t, order) for t, order in zip(tensors, self.orders, strict=True)]

    def finish(self, *written: Sequence[Tensor]) -> None:
        self.in_place.finish()
        torch.autograd.graph.increment_version([t for tensors in written for t in tensors])


def _adaptive_flags(adaptive: bool | Sequence[bool], params: Sequence[Tensor]) -> list[int]:
    flags = [adaptive] * len(params) if isinstance(adaptive, bool) else list(adaptive)
    if len(flags) != len(params) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(
            f"adaptive: expected a bool or {len(params)} of them, one for each parameter, got {adaptive!r}"
        )
    return [int(flag) for flag in flags]


def _check_coefficients(coefficients: Any, like: Tensor, name: str) -> None:
    wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"coefficients: expected a Tensor, got {type(coefficients).__name__}")
    if coefficients.shape != (2,) or coefficients.dtype != wanted or coefficients.device != like.device:
        raise ValueError(
            f"coefficients: expected {wanted} of shape (2,) on {like.device} as {name}, got {coefficients.dtype} "
            f"{tuple(coefficients.shape)} on {coefficients.device}"
        )


@torch.no_grad()
def sam_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor], *, adaptive: bool | Sequence[bool] = False, eta: float = 0.01
) -> Tensor:
    """sum (T g)^2 over the whole list, in one read of it: the *square* of the norm, so that ranks can add theirs.

    T = |w| + eta where ``adaptive``, 1 elsewhere. params, grads: lists of equal shapes and dtypes on one device.
    Returns a 0-dim float64 tensor on that device, the same bits every time and for every number of threads; squares
    are float32, so elements below 1e-23 count as 0 and elements above 1e19 make it inf.
    Raises TypeError/ValueError naming the argument. Source: Kwon et al., ASAM, ICML 2021; docs/mathematics.md, 4.
    """
    if not len(params):
        raise ValueError("params: expected at least one tensor")
    _check_params(params)
    _check_list("grads", grads, params)
    return run_sam_norm(params, grads, _adaptive_flags(adaptive, params), _number("eta", eta, 0.0))


def run_sam_norm(params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: list[int], eta: float) -> Tensor:
    """``sam_norm`` without its checks, for the optimizer."""
    flat = _Flat(params)
    return autograd.below_autograd("sam_norm", params[0], flat.read(params), flat.read(grads), adaptive, eta)


@_in_place()
def sam_perturb_(
    params: Sequence[Tensor], grads: Sequence[Tensor], kept: Sequence[Tensor], coefficients: Tensor, *,
    adaptive: bool | Sequence[bool] = False, eta: float = 0.01,
) -> None:  # fmt: skip
    """kept = w, bit for bit, and w <- w + (c T^2 - a) g, in one pass over the list.

    SAM and ASAM: c = rho / |T g|, a = 0; an aligned step (SAGM) takes a g back. coefficients: (c, a) as a tensor of
    shape (2,), float32, on the device of params (no synchronisation); c = a = 0 leaves every w as it is, also where g
    is inf or NaN. T = |w| + eta where ``adaptive``, 1 elsewhere. kept: tensors like params, overwritten.
    Raises TypeError/ValueError naming the argument before anything is written.
    Source: Foret et al., SAM, ICLR 2021; Kwon et al., ASAM, ICML 2021; Wang et al., SAGM, CVPR 2023.
    """
    if not len(params):
        return
    _check_params(params)
    _check_list("grads", grads, params)
    _check_list("kept", kept, params)
    _check_coefficients(coefficients, params[0], "params")
    run_sam_perturb(
        params, grads, kept, coefficients, _adaptive_flags(adaptive, params), _number("eta", eta, 0.0)
    )  # fmt: skip


def run_sam_perturb(
    params: Sequence[Tensor], grads: Sequence[Tensor], kept: Sequence[Tensor], coefficients: Tensor,
    adaptive: list[int], eta: float,
) -> None:  # fmt: skip
    """``sam_perturb_`` without its checks, for the optimizer."""
    flat = _Flat(params)
    autograd.below_autograd(
        "sam_perturb_", params[0], flat.write(params), flat.read(grads), flat.write(kept), coefficients, adaptive, eta
    )
    flat.finish(params, kept)


@_in_place()
def sam_restore_(params: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """w = kept, bit for bit, over a list of tensors in one pass.

    Raises TypeError/ValueError naming the argument before anything is written.
    """
    if not len(params):
        return
    _check_params(params)
    _check_list("kept", kept, params)
    run_sam_restore(params, kept)


def run_sam_restore(params: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """``sam_restore_`` without its checks, for the optimizer."""
    flat = _Flat(params)
    autograd.below_autograd("sam_restore_", params[0], flat.write(params), flat.read(kept))
    flat.finish(params)


@_in_place()
def sam_average_(grads: Sequence[Tensor], firsts: Sequence[Tensor], coefficients: Tensor) -> None:
    """g <- (g + first) / 2 in place, the gradient of an aligned step; c = a = 0 in ``coefficients`` leaves g as it is.

    The coefficients are those of the perturbation: where it did not take place, the first gradients were zero, inf or
    NaN. Raises TypeError/ValueError naming the argument before anything is written. Source: SAGM, CVPR 2023.
    """
    if not len(grads):
        return
    _check_params(grads, "grads")
    _check_list("firsts", firsts, grads)
    _check_coefficients(coefficients, grads[0], "grads")
    flat = _Flat(grads)
    autograd.below_autograd("sam_average_", grads[0], flat.write(grads), flat.read(firsts), coefficients)
    flat.finish(grads)


# ---- packed weights -------------------------------------------------------------------------------------------------


def _check_codes(codes: Any, scale: Any, grid: Any, bits: int, cols: int) -> Tensor:
    """``scale`` as float32 (rows,), after checking that codes and scale describe a (n, cols) weight."""
    check_grid(grid)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or codes.dim() != 2 or not codes.is_contiguous():
        raise ValueError("codes: expected a contiguous uint8 tensor of shape (n, row_bytes)")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= 8:
        raise ValueError(f"bits: expected 1 to 8, or 0 for five trits a byte, got {bits!r}")
    if codes.shape[1] != reference.row_bytes(cols, bits):
        raise ValueError(
            f"codes: expected {reference.row_bytes(cols, bits)} bytes a row for {cols} weights of "
            f"{bits or 'five to a byte'}{' bits' if bits else ''}, got {codes.shape[1]}"
        )
    if not isinstance(scale, Tensor) or not scale.is_floating_point() or scale.device != codes.device:
        raise ValueError(f"scale: expected a float tensor on {codes.device}")
    rows, n = scale.numel(), codes.shape[0]
    if not (rows == 1 or (rows and n and rows % n == 0 and cols % (rows // n) == 0) or rows == n):
        raise ValueError(f"scale: expected 1, {n} or {n} * groups scales for ({n}, {cols}) weights, got {rows}")
    return scale.float().reshape(-1).contiguous()


def check_activations(activations: Any, grid: Any) -> None:
    """ValueError unless "float" or "int8", which needs integer levels."""
    if activations not in ("float", "int8"):
        raise ValueError(f'activations: expected "float" or "int8", got {activations!r}')
    if activations == "int8" and grid.kind == reference.CODEBOOK:
        raise ValueError(f'activations: "int8" needs a grid of integer levels, got {grid}')


def lowbit_dequantize(
    codes: Tensor, scale: Tensor, grid: Any, bits: int, cols: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The (n, cols) weight s c of packed codes, in ``dtype``: one float32 product, rounded once; differentiable in s.

    codes: (n, row_bytes) uint8, as ``quant.pack_codes`` writes them; scale: 1, n or n * groups. A code above the
    highest level counts as the highest. Raises ValueError naming the argument. Source: docs/packed.md.
    """
    scale = _check_codes(codes, scale, grid, bits, cols)
    return autograd.packed_weight(codes, scale, grid.levels_tensor(codes.device), grid.encoding, bits, cols, dtype)


def lowbit_linear(
    x: Tensor, codes: Tensor, scale: Tensor, grid: Any, bits: int, bias: Tensor | None = None,
    activations: str = "float",
) -> Tensor:  # fmt: skip
    """y = x W^T + b from packed codes, W = s c not unpacked as a whole but for a gradient of x or scale.

    Sums in float32 of unrounded float32 products, then rounded once to the type of x: |y - exact| is at most
    cols 2^-24 sum |x| |w|, for bfloat16 and float16 plus half a unit in the last place of y.
    ``activations="int8"``: each row of x is rounded to s_x q, s_x = max |x| / 127, q an integer; the sums of q c are
    exact. That moves y by at most s_x / 2 sum |w|, usually by about 1 % of the root mean square of y (docs/packed.md).
    A row of x that holds inf or NaN gives NaN. Its gradient is that of the float product, straight through.
    Differentiable in x, scale and bias, and under torch.func (int8 in reverse mode only).

    x: (…, cols) float32, bfloat16 or float16; codes: (n, row_bytes) uint8; scale: 1, n or n * groups; bias: (n,).
    Returns (…, n) in the type of x. Raises TypeError/ValueError naming the argument, for int8 also where the grid's
    levels are not integers. Source: docs/packed.md.
    """
    check_float_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x: expected shape (…, cols), got a scalar")
    cols = x.shape[-1]
    scale = _check_codes(codes, scale, grid, bits, cols)
    if x.device != codes.device:
        raise ValueError(f"x: expected on the device of codes ({codes.device}), got {x.device}")
    n = codes.shape[0]
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias: expected {x.dtype} of shape ({n},) on {x.device}, got {bias.dtype} "
                         f"{tuple(bias.shape)} on {bias.device}")  # fmt: skip
    check_activations(activations, grid)
    if activations == "int8" and cols * 127 * (len(grid.levels) - 1) >= 2**31:
        raise ValueError(f"activations: sums of {cols} products of int8 and {bits}-bit codes may overflow; use float")
    flat = x.reshape(math.prod(x.shape[:-1]), cols).contiguous()
    name = "lowbit_linear_int8" if activations == "int8" else "lowbit_linear"
    y = autograd.packed_product(
        name, runtime.operator(name, flat), flat, codes, scale, grid.levels_tensor(codes.device), grid.encoding, bits,
        None if bias is None else bias.contiguous(),
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], n)
