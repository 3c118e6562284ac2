"""The checks of arguments that the operators share: each names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import LEVEL_TYPES, compute_dtype, holds_levels

__all__ = [
    "FLOAT_TYPES",
    "check_float_tensor",
    "check_grid",
    "check_scale",
    "check_written",
    "concrete",
    "eager",
    "expanded",
    "has_values",
    "number",
    "rate_tensor",
]

#: The types of weights and gradients that every operator takes.
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def eager(t: Tensor) -> bool:
    """Whether an operator that is called now runs now: not being traced, not fake, not inside torch.func."""
    return (
        not torch.compiler.is_compiling()
        and type(t) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def has_values(t: Tensor) -> bool:
    """Whether there is anything behind its shape: on the meta device and in FakeTensorMode there is not."""
    return not (t.is_meta or hasattr(t, "fake_mode"))


def concrete(t: Tensor) -> bool:
    """Whether the values may be looked at here, without waiting for a device."""
    return t.device.type == "cpu" and eager(t)


def check_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")


def check_float_tensor(name: str, t: Any) -> None:
    """Raises TypeError, naming ``name``, unless ``t`` is a dense tensor of one of ``FLOAT_TYPES``."""
    check_tensor(name, t)
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {t.layout}")
    if t.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {t.dtype}")


def expanded(t: Tensor) -> bool:
    """Whether elements share their memory by a stride of 0."""
    if t.layout != torch.strided or t.is_contiguous():
        return False
    return any(n > 1 and step == 0 for n, step in zip(t.shape, t.stride(), strict=True))


def check_written(name: str, t: Tensor) -> None:
    """ValueError where ``t`` is ``expanded``, since it is to be written: copying into it would fail, and of a list when
    others have been written."""
    if expanded(t):
        raise ValueError(f"{name}: expected memory for each element, got an expanded tensor of shape "
                         f"{tuple(t.shape)}, strides {t.stride()}")  # fmt: skip


def check_writes(**lists: Sequence[Tensor]) -> None:
    """ValueError unless each tensor of the lists, all of which are written, has memory of its own."""
    seen: dict[int, str] = {}
    for key, tensors in lists.items():
        for i, t in enumerate(tensors):
            check_written(name := f"{key}[{i}]", t)
            if eager(t) and has_values(t) and t.numel() and (other := seen.setdefault(t.data_ptr(), name)) != name:
                raise ValueError(f"{name}: expected memory of its own, got that of {other}")


def check_copy(name: str, t: Any, grid: Any) -> None:
    """A tensor that may receive s Q(w/s), or, where its type is one of LEVEL_TYPES, Q(w/s)."""
    check_tensor(name, t)
    if t.dtype not in LEVEL_TYPES:
        return check_float_tensor(name, t)
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {t.layout}")
    if not holds_levels(t.dtype, grid.levels):  # of the grid's own numbers: nothing to look at while it is traced
        level = next(c for c in grid.levels if not holds_levels(t.dtype, (c,)))
        raise ValueError(f"{name}: expected a dtype that holds every level of {grid!r}, got {t.dtype} for {level:g}")


def check_like(
    name: str, t: Any, dtype: torch.dtype | None, shape: Sequence[int], device: torch.device, contiguous: bool = False
) -> None:
    """A tensor of just this shape; without ``dtype`` any type."""
    check_tensor(name, t)
    wrong_type = dtype is not None and t.dtype != dtype
    if t.shape != shape or t.device != device or wrong_type or (contiguous and not t.is_contiguous()):
        strided = ", not contiguous" if contiguous and not t.is_contiguous() else ""
        raise ValueError(
            f"{name}: expected {'contiguous ' * contiguous}{dtype or 'floats'} of shape {tuple(shape)} on {device}, "
            f"got {t.dtype} {tuple(t.shape)} on {t.device}{strided}"
        )


def check_grid(grid: Any) -> None:
    """Raises TypeError unless ``grid`` has what operators ask of a ``quant.Grid``."""
    if not (hasattr(grid, "encoding") and hasattr(grid, "levels_tensor")):
        raise TypeError(f"grid: expected a grid such as Uniform(bits=4), Binary(), Ternary(), got {grid!r}")


def check_scale(name: str, scale: Any, x: Tensor, x_name: str) -> Tensor:
    """``scale`` as float32 (rows,), after checking that it fits ``x``."""
    check_tensor(name, scale)
    if not scale.is_floating_point():
        raise TypeError(f"{name}: expected a float tensor, got {scale.dtype}")
    if scale.device != x.device:
        raise ValueError(f"{name}: expected on the device of {x_name} ({x.device}), got {scale.device}")
    rows, first = scale.numel(), x.shape[0] if x.dim() > 1 else 1
    fits = rows == 1 or (rows and first and rows % first == 0 and x.numel() % rows == 0) or (rows == first)
    fits = fits or rows == x.numel() == 0  # groups of nothing
    if scale.dim() > 1 or not fits:
        per_group = f" or ({first} * groups,)" if x.dim() > 1 else f" or (groups,), a divisor of {x.numel()},"
        raise ValueError(
            f"{name}: expected shape () or ({first},){per_group} for {x_name} of shape {tuple(x.shape)}, "
            f"got {tuple(scale.shape)}"
        )
    scale = scale.detach().to(compute_dtype(x.dtype)).reshape(-1).contiguous()
    if rows and concrete(scale):  # as the kernels see them; on a GPU the look would stall the stream
        low, high = scale.aminmax()
        if not (low > 0 and high < math.inf):
            raise ValueError(
                f"{name}: expected positive finite scales in {scale.dtype}, got values in [{low:g}, {high:g}]"
            )
    return scale


def check_weight(name: str, x: Any, scale: Any, grid: Any) -> tuple[Tensor, Tensor, list[int]]:
    """The operators' arguments (scale, levels, grid) for a tensor ``x``, after checking all of them."""
    check_float_tensor(name, x)
    check_grid(grid)
    return check_scale("scale", scale, x, name), grid.levels_tensor(x.device), grid.encoding


def number(name: str, value: Any, low: float, high: float = math.inf, open_low: bool = False) -> float:
    """``value`` as a finite float in [low, high], or (low, high]. Raises TypeError/ValueError, naming ``name``."""
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
            raise ValueError(f"{name}: expected a float or 0-dim float tensor, got {value.dtype} {tuple(value.shape)}")
        if concrete(value):
            number(name, float(value), low, high, open_low)
        value = value.detach()
        return value if value.dtype in (torch.float32, torch.float64) else value.float()
    return torch.tensor(number(name, value, low, high, open_low), dtype=torch.float64, device="cpu")


def check_params(params: Sequence[Tensor], name: str = "params") -> None:
    for i, p in enumerate(params):
        check_float_tensor(f"{name}[{i}]", p)
        if p.device != params[0].device:
            raise ValueError(f"{name}[{i}]: expected on {params[0].device} as {name}[0], got {p.device}")
        if (p.dtype == torch.float64) != (params[0].dtype == torch.float64):
            raise TypeError(f"{name}[{i}]: float64 takes a list of its own, got {p.dtype} beside {params[0].dtype}")


def check_lists(
    params: Sequence[Tensor], name: str = "params", written: Sequence[str] = (), **others: Sequence[Tensor]
) -> None:
    """Lists of equal shapes, dtypes and devices; those of the names ``written`` can be."""
    check_params(params, name)
    for other, tensors in others.items():
        check_list(other, tensors, params)
    check_writes(**{key: tensors for key, tensors in {name: params, **others}.items() if key in written})


def check_list(
    name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], check: Callable[[str, Any, int], None] | None = None
) -> None:
    """Tensors like ``params``; with ``check`` of any dtype for which check(name, tensor, its number) does not raise."""
    if len(tensors) != len(params):
        raise ValueError(f"{name}: expected {len(params)} tensors, one for each parameter, got {len(tensors)}")
    for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
        if check is None:
            check_float_tensor(f"{name}[{i}]", t)
        else:
            check(f"{name}[{i}]", t, i)
        check_like(f"{name}[{i}]", t, p.dtype if check is None else None, p.shape, p.device)
