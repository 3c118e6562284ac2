"""The learned quantization of a layer's input: one scale, and an offset where the grid is to be moved (LSQ, LSQ+).

    y = s Q((x - b) / s) + b

The gradient of x is that of the straight-through network; that of s is LSQ's, and that of b is the sum of G outside the
hull, both times 1 / sqrt(features c_max), features: numbers of one token or image. Scale and offset start from the
first batch in training mode, or from ``calibrate_``:

    ``lsq``    s = 2 mean|x| / sqrt(c_max)                                       Esser et al., LSQ, ICLR 2020
    ``lsq+``   s = (max x - min x) / (c_max - c_min), b = min x - s c_min        Bhalgat et al., LSQ+, CVPRW 2020

Until then a call in eval mode takes the input's own largest magnitude, token by token.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..contract import compute_dtype
from ..ops.autograd import by_operators
from ..quant.config import LEARNED_INPUTS
from ..quant.scales import bounded_scale
from ..quant.sharding import is_sharded, local_part, sharding_of
from ..quant.state import edits, learned_slopes, learns
from .joint import being_managed, copy_of, is_beside, replicated

__all__ = ["InputQuantizer", "calibrate_"]


LEARNED_ON = ("the checkpoint has it as a Parameter alone: it is learned on from the value that came, which means "
              "nothing if that model had seen no batch")  # fmt: skip


class InputQuantizer(nn.Module):
    """Scale and offset of one layer's input, float32 (1,) whatever the layer is cast to. ``start``: the scale that it
    started from, 0 before the first batch."""

    calibrating = False  # ``calibrate_`` is at work
    offset: Any  # nn.Parameter, or None
    start: Tensor

    def __init__(self, grid: Any, kind: str, device: Any = None) -> None:
        super().__init__()
        self.grid = grid
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32, device=device))
        zero = torch.zeros(1, dtype=torch.float32, device=device)
        self.register_parameter("offset", nn.Parameter(zero.clone()) if kind == LEARNED_INPUTS[1] else None)
        self.register_buffer("start", zero)
        self._started = False
        self._seen: Any = None  # of the Parameters: as they were found within their bounds
        self._own()

    def _own(self) -> None:
        """Optimizers know scale and offset by their class; other objects may have come in the place of these."""
        for p in self._parameters.values():
            if isinstance(p, nn.Parameter):
                learns(p)
        self._seen = None

    def __setattr__(self, name: str, value: Any) -> None:
        # from_pretrained of transformers: memory that nobody has written, for what the checkpoint lacks
        if isinstance(value, Tensor) and sys._getframe(1).f_code.co_name == "_load_parameter_into_model":
            value.data.fill_(float(name == "scale"))
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter) and "_seen" in self.__dict__:
            self._own()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._own()

    def join(self, weight: Any) -> None:
        """The layer's weight is split over ranks: scale and offset go to all of them, whole."""
        for name in ("scale", "offset"):
            if (p := self._parameters[name]) is not None and not is_beside(p, weight):
                self._parameters[name] = replicated(p, weight)
        self._own()
        part = local_part(weight.detach())
        self.start = self.start.to(part.device)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; none to FSDP2, which would split them (``joint``)."""
        return iter(()) if being_managed() else super().named_parameters(*args, **kwargs)

    @property
    def held(self) -> list[Tensor]:
        """The memory that this rank has of scale and offset."""
        with torch.no_grad():
            return [local_part(p) for p in (self.scale, self.offset) if p is not None]

    @property
    def started(self) -> bool:
        """Whether it has seen a batch; asked of the device until it has."""
        if not self._started and torch.compiler.is_dynamo_compiling():
            return self._has_start()  # ``start`` may have been written in place: averages, broadcasts, loads of DCP
        if not self._started:
            self._started = self._has_start()
        return self._started

    @property
    def undecided(self) -> bool:
        """Whether only a graph that is exported will know if it has started."""
        return not (self._started or self.training or ops.has_values(self.start))

    def _has_start(self) -> bool:
        return ops.has_values(self.start) and bool(local_part(self.start) > 0)

    _has_start._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile asks the tensor itself

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Scale and offset by ``x``; nothing where that is empty or not finite, or all the same number 0."""
        x = x.detach().float()
        low, high = self.grid.levels[0], self.grid.levels[-1]
        if not x.numel():
            return
        if self.offset is None:
            scale, offset = 2 * x.abs().mean() / math.sqrt(self.grid.c_max), None
        else:
            least, most = x.aminmax()
            scale = (most - least) / (high - low)
            offset = least - scale * low
        if not (bool(scale > 0) and bool(scale.isfinite())):
            return
        for p, value in zip(self.held, (scale, offset), strict=False):
            p.fill_(value)  # type: ignore[arg-type]
        self.start.fill_(scale)
        self._started, self._seen = True, None

    def quantized(self, x: Any, rows: int, eager: bool) -> Tensor | None:
        """s Q((x - b) / s) + b; None where it has not started and is not to. ``rows``: tokens or images in ``x``;
        ``eager``: nothing traces or transforms the call."""
        if x.numel() == 0:
            return x
        if not self._started and ops.has_values(x) and not self.started:
            if not (self.training or InputQuantizer.calibrating):
                return None
            self._start(x, eager)
            if not self._started:
                return None
        factor = ops.scale_grad_factor(x.numel(), rows, self.grid)
        learned = [None if p is None else copy_of(p, x) for p in (self.scale, self.offset)]
        if is_sharded(x):  # every rank its part
            (mesh, placements), part = sharding_of(x), x.to_local()
            self._bound()
            y = _Learned.apply(part, *learned, self.grid, factor)
            return type(x).from_local(y, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
        if not eager:
            return self._composed(x, learned, factor)
        self._bound()
        return _Learned.apply(x, *learned, self.grid, factor)

    def _start(self, x: Tensor, eager: bool) -> None:
        if not eager:
            raise RuntimeError("activation_scale: the scale of an input starts from a batch; call ak.nn.calibrate_, or "
                               "train one batch, before the model is compiled, traced or transformed")  # fmt: skip
        if is_sharded(self.scale) or is_sharded(x):
            raise RuntimeError("activation_scale: the scale of an input starts from a batch, and its layer is split "
                               "over ranks; call ak.nn.calibrate_ before fully_shard or parallelize_module, or load a "
                               "checkpoint")  # fmt: skip
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and not InputQuantizer.calibrating and torch.distributed.get_world_size() > 1:
            raise RuntimeError("activation_scale: every rank would start the scale of an input from a batch of its "
                               "own; call ak.nn.calibrate_ before DistributedDataParallel is put around")  # fmt: skip
        self.start_from(x)

    def _bound(self) -> None:
        """Brings what an optimizer has moved back to where it can serve."""
        held = self.held
        try:
            seen = self._look()
        except RuntimeError:  # inference tensors
            return
        if seen == self._seen:
            return
        with torch.no_grad():
            held[0].copy_(bounded_scale(held[0], self.start))
            for offset in held[1:]:
                offset.nan_to_num_(0.0, 0.0, 0.0)
        self._seen = self._look()

    def _look(self) -> list[Any]:
        return [edits(p) for p in self._parameters.values() if p is not None]

    def _composed(self, x: Tensor, held: list[Any], factor: float) -> Tensor:
        """The same by operators that can be traced and transformed."""
        finite: list[Any] = [p if p is None else torch.where((p - p).detach() == 0, p, 0.0) for p in held]
        learned, offset = finite
        scale = bounded_scale(held[0].detach(), self.start)
        z = x if offset is None else x - offset.detach().to(x.dtype)
        weight = _weight(z, scale, self.grid)
        y = ops.run_fake_quantize(z.contiguous(), *weight, True, False, 0)
        slopes = learned_slopes(z, scale, self.grid) * (factor / ops.scale_grad_factor(x.numel(), 1, self.grid))
        y = y + ((learned - learned.detach()) * slopes).reshape(y.shape).to(y.dtype)
        if offset is not None:
            inside = ops.run_fake_quantize_backward(torch.ones_like(z).contiguous(), z.detach().contiguous(), *weight)
            moved = (offset - offset.detach()).to(y.dtype) * factor
            y = y + offset.detach().to(y.dtype) + moved * (1 - inside.reshape(y.shape))
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = [name for name in ("scale", "offset", "start") if getattr(self, name) is not None]
        before = {name: getattr(self, name).detach() for name in names}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old.is_meta and not new.is_meta:  # memory that nobody has written
                local_part(new.detach()).fill_(float(name == "scale"))
            elif new.dtype != old.dtype and is_sharded(new):
                self._parameters[name] = replicated(nn.Parameter(local_part(old), new.requires_grad), new)
            elif new.dtype != old.dtype:  # a cast: these are not numbers to compute in
                new.data = old.to(new.device)
                new.grad = None if new.grad is None else new.grad.to(old.dtype)
        self._started = self._has_start()
        self._own()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list,
                              *rest: Any) -> None:  # fmt: skip
        """A checkpoint that says nothing of inputs leaves it as it is; where the scale comes alone, it counts."""
        if f"{prefix}scale" not in state_dict:
            return
        known = ops.has_values(self.start) and self.started
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
        self._own()  # tensors that are swapped change their class
        if (key := f"{prefix}start") in missing_keys:
            missing_keys.remove(key)
            if not known and ops.has_values(self.held[0]):
                self.start = self.held[0].clone()
                warnings.warn(f"{prefix}scale: {LEARNED_ON}", stacklevel=2)
        self._started = self._has_start()

    def extra_repr(self) -> str:
        return f"{self.grid}, {LEARNED_INPUTS[self.offset is not None]}"


def _weight(x: Tensor, scale: Tensor, grid: Any) -> tuple[Tensor, Tensor, list[int]]:
    return scale.to(compute_dtype(x.dtype)), grid.levels_tensor(x.device), grid.encoding


class _Learned(torch.autograd.Function):
    """``InputQuantizer.quantized`` where nothing traces: one pass forward, one back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, grid: Any, factor: float) -> Tensor:
        z = (x if offset is None else x - offset.to(x.dtype)).contiguous()
        ctx.save_for_backward(z, scale.detach().clone())  # another forward may bound it before the backward
        ctx.grid, ctx.factor, ctx.has_offset = grid, factor, offset is not None
        y = ops.run_fake_quantize(z, *_weight(z, scale, grid), False, False, 0)
        return y if offset is None else y + offset.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, scale = ctx.saved_tensors
        weight, factor = _weight(z, scale.detach(), ctx.grid), ctx.factor
        if by_operators(grad):
            inside = ops.run_fake_quantize_backward(grad.contiguous(), z.detach(), *weight)
            slopes = learned_slopes(z, scale.detach(), ctx.grid).reshape(grad.shape)
            to_scale = (grad * slopes).sum() * (factor / ops.scale_grad_factor(z.numel(), 1, ctx.grid))
        else:
            inside = grad.clone(memory_format=torch.contiguous_format)
            to_scale = ops.run_ste_clip_scale_grad(inside, z, weight, factor, True)
        to_offset = None
        if ctx.has_offset:
            wide = compute_dtype(grad.dtype)
            to_offset = (factor * (grad.sum(dtype=wide) - inside.sum(dtype=wide))).float().reshape(1)
        return inside, to_scale.float().reshape(1), to_offset, None, None


@torch.no_grad()
def calibrate_(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Starts the learned scales of inputs (``QuantConfig(activation_scale=…)``) that have not started, from one call of
    ``model`` in eval mode with these arguments, of which it returns what the model does."""
    modes = {module: module.training for module in model.modules()}
    InputQuantizer.calibrating = True
    try:
        model.eval()
        return model(*args, **kwargs)
    finally:
        InputQuantizer.calibrating = False
        for module, mode in modes.items():
            module.training = mode
