"""Drop-in layers: nn.Linear and nn.Conv2d whose weight is quantized in the forward.

The weight stays the same Parameter object under the same key; ``forward="hard"`` computes with s Q(w/s) and passes
the gradient straight through inside the hull, ``forward="relaxed"`` computes with the float weights in training and
hard in eval (as published). s Q(w/s) is the copy that an ASkew optimizer wrote in its own pass where that is fresh,
and is recomputed otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from ..quant import QuantConfig, WeightQuantizer, activation_scales

SCALE_KEY = "weight_scale"


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


class _HardLinear(torch.autograd.Function):
    """y = x Wq^T + b; the gradient of the weight is the gradient of Wq, 0 where ``clip`` says w is outside the hull."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, quantized: Tensor, clip: tuple | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, quantized)
        ctx.clip, ctx.bias_dtype = clip, None if bias is None else bias.dtype
        return functional.linear(x, quantized, None if bias is None else bias.to(quantized.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, quantized = ctx.saved_tensors
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.matmul(quantized)
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_w = _clipped(flat.t().matmul(x.reshape(-1, x.shape[-1])), weight, ctx.clip)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_b = flat.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_w, grad_b, None, None


class _HardConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, quantized: Tensor, clip: tuple | None, geometry: tuple
    ) -> Tensor:
        ctx.save_for_backward(x, weight, quantized)
        ctx.clip, ctx.geometry, ctx.bias_dtype = clip, geometry, None if bias is None else bias.dtype
        return functional.conv2d(x, quantized, None if bias is None else bias.to(quantized.dtype), *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, quantized = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        need = [
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            ctx.bias_dtype is not None and ctx.needs_input_grad[2],
        ]
        grad_x, grad_w, grad_b = torch.ops.aten.convolution_backward(
            grad, x, quantized, [quantized.shape[0]] if need[2] else None, stride, padding, dilation, False, [0, 0],
            groups, need,
        )  # fmt: skip
        if need[1]:
            grad_w = _clipped(grad_w, weight, ctx.clip)
        return grad_x, grad_w, grad_b.to(ctx.bias_dtype) if need[2] else None, None, None, None


def quantized_input(x: Tensor, grid: Any, token_dims: int) -> Tensor:
    """s Q(x/s) of a layer's input, straight-through; s = max|x| / c_max over the last ``token_dims`` dimensions."""
    rows = math.prod(x.shape[: max(0, x.dim() - token_dims)])
    scale = activation_scales(x, [grid.c_max], rows)[0]
    wide = x.dtype == torch.float64
    return ops.autograd.fake_quantize(
        x.contiguous(), scale.double() if wide else scale, grid.levels_tensor(x.device), grid.encoding, False, False, 0
    )


def _clipped(grad_w: Tensor, weight: Tensor, clip: tuple | None) -> Tensor:
    """The weight's own dtype, zero outside the hull; in place: the gradient was made by the caller."""
    grad_w = grad_w.to(weight.dtype)
    return grad_w if clip is None else ops.ste_clip_(grad_w, weight, *clip)


class QuantizedLayer(nn.Module):
    """What the layers share: the quantizer, its checkpoint key, and the weight to compute with."""

    weight: Any  # nn.Parameter; typed by nn.Linear and nn.Conv2d
    bias: Any
    config: QuantConfig
    own_attributes = ("config", "quantizer")  # what a layer that takes the place of this one does not inherit

    def _attach(self, config: QuantConfig) -> None:
        if not isinstance(config, QuantConfig):
            raise TypeError(f"config: expected a QuantConfig, got {config!r}")
        self.config = config
        self.quantizer = WeightQuantizer(config)
        self.quantizer.rows(self.weight)  # a group size that does not fit is an error here, not in the first forward
        self._tied()

    def _tied(self) -> WeightQuantizer:
        """The quantizer, tied to the weight this module has now (a copied or replaced Parameter is tied anew)."""
        if not isinstance(self.weight, nn.Parameter):  # functional_call, a parametrization: a temporary has no identity
            self.quantizer.invalidate()
        elif (found := WeightQuantizer.of(self.weight)) is not self.quantizer:
            if found is not None and found.config == self.config:  # a weight shared with another layer
                self.quantizer = found
            else:
                self.quantizer.tie(self.weight)
                self.quantizer.invalidate()
        return self.quantizer

    @property
    def weight_scale(self) -> Tensor:
        """The scale in use, float32 (rows,)."""
        return self._tied().current_scale(self.weight)

    def quantized_weight(self) -> Tensor:
        """s Q(w/s), detached, in the weight's dtype."""
        return self._tied().quantized(self.weight).clone()

    @torch.no_grad()
    def hard_quantize_(self) -> None:
        """w <- s Q(w/s), and the scale is kept from now on."""
        quantizer = self._tied()
        scale = quantizer.current_scale(self.weight).clone()
        self.weight.copy_(quantizer.quantized(self.weight))
        quantizer.freeze(self.weight, scale)

    def _uses_float(self) -> bool:
        return self.training and self.config.forward == "relaxed"

    def _traced_weight(self) -> Tensor:
        """The differentiable s Q(w/s) as operators of the graph, for torch.compile: always recomputed."""
        quantizer, config = self.quantizer, self.config
        scale = quantizer.scale
        if scale is None or not quantizer.frozen:
            scale = quantizer._rule_scale(self.weight)
        return ops.fake_quantize(self.weight, scale, config.weight, ste_clip=config.ste_clip)

    def _eager_forward(self, x: Tensor) -> Tensor:
        weight, quantizer, low = self.weight, self._tied(), _autocast_dtype(x)
        copy = quantizer.fresh_copy(weight, low or weight.dtype)
        if copy is None:
            copy = quantizer.quantized(weight, low or weight.dtype)
        clip = (
            None if not self.config.ste_clip or quantizer.all_inside(weight) else (quantizer.scale, self.config.weight)
        )
        if low is None:
            return self._hard_forward(x, copy, clip)
        with torch.autocast(x.device.type, enabled=False):  # x and weight have the type to compute in
            return self._hard_forward(x.to(low), copy, clip)

    def _hard_forward(self, x: Tensor, weight: Tensor, clip: tuple | None) -> Tensor:
        """The layer with ``weight`` in place of its own, which receives the gradient; ``clip`` as in ``_clipped``."""
        raise NotImplementedError

    # ---- checkpoints: plain keys, and the scale once it is frozen ----

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quantizer.frozen:
            destination[prefix + SCALE_KEY] = self.quantizer.current_scale(self.weight).detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list,
                              unexpected_keys: list, error_msgs: list) -> None:  # fmt: skip
        scale = state_dict.get(prefix + SCALE_KEY)
        rows = self.quantizer.rows(self.weight)
        if scale is not None and scale.numel() != rows:
            error_msgs.append(f"{prefix}{SCALE_KEY}: expected shape ({rows},), got {tuple(scale.shape)}")
            scale = None
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if prefix + SCALE_KEY in unexpected_keys:
            unexpected_keys.remove(prefix + SCALE_KEY)
        if scale is not None or not self.quantizer.awaits_weights:
            self.quantizer.restore(scale, scale is not None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.quantizer.moved()
        self._tied()
        return self

    def extra_repr(self) -> str:
        c = self.config
        group = f", group_size={c.group_size}" if c.group_size else ""
        return f"{super().extra_repr()}, {c.weight}, scale={c.scale}, {c.granularity}{group}, forward={c.forward}"


def plain_linear(layer: Any, weight: nn.Parameter) -> nn.Linear:
    """An nn.Linear of ``layer``'s sizes with this weight and ``layer``'s bias Parameter."""
    new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    new.weight, new.bias = weight, layer.bias
    return new.train(layer.training)


def plain_conv2d(layer: Any, weight: nn.Parameter) -> nn.Conv2d:
    """An nn.Conv2d of ``layer``'s geometry with this weight and ``layer``'s bias Parameter."""
    new = nn.Conv2d(**_conv_arguments(layer))
    new.weight, new.bias = weight, layer.bias
    return new.train(layer.training)


class AskewLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """nn.Linear with a quantized weight. x: (…, in_features) -> (…, out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: QuantConfig | None = None,
                 device: Any = None, dtype: Any = None) -> None:  # fmt: skip
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._attach(config or QuantConfig())

    @classmethod
    def from_float(cls, linear: nn.Linear, config: QuantConfig | None = None) -> AskewLinear:
        """Shares the Parameter objects of ``linear``; ``linear`` is not copied and should not be used further."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new._attach(config or QuantConfig())
        return new.train(linear.training)

    def to_float(self) -> nn.Linear:
        """An nn.Linear with the same Parameter objects (the latent weights)."""
        return plain_linear(self, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.activation is not None:
            x = quantized_input(x, self.config.activation, 1)
        if self._uses_float():
            return functional.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return functional.linear(x, self._traced_weight(), self.bias)
        return self._eager_forward(x)

    def _hard_forward(self, x: Tensor, weight: Tensor, clip: tuple | None) -> Tensor:
        if not torch.is_grad_enabled():
            return functional.linear(x, weight, None if self.bias is None else self.bias.to(weight.dtype))
        return _HardLinear.apply(x, self.weight, self.bias, weight, clip)


class AskewConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d with a quantized weight: groups, stride, dilation, padding and all padding modes."""

    def __init__(self, *args: Any, config: QuantConfig | None = None, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._attach(config or QuantConfig())

    @classmethod
    def from_float(cls, conv: nn.Conv2d, config: QuantConfig | None = None) -> AskewConv2d:
        """Shares the Parameter objects of ``conv``; ``conv`` is not copied and should not be used further."""
        new = cls(**_conv_arguments(conv))
        new.weight, new.bias = conv.weight, conv.bias
        new._attach(config or QuantConfig())
        return new.train(conv.training)

    def to_float(self) -> nn.Conv2d:
        """An nn.Conv2d with the same Parameter objects (the latent weights)."""
        return plain_conv2d(self, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.activation is not None:
            x = quantized_input(x, self.config.activation, 3)
        if self._uses_float():
            return self._conv_forward(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return self._conv_forward(x, self._traced_weight(), self.bias)
        return self._eager_forward(x)

    def _hard_forward(self, x: Tensor, weight: Tensor, clip: tuple | None) -> Tensor:
        if not torch.is_grad_enabled():
            return self._conv_forward(x, weight, None if self.bias is None else self.bias.to(weight.dtype))
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        elif isinstance(padding, str):
            left = self._reversed_padding_repeated_twice if padding == "same" else [0] * 4
            if left[0] != left[1] or left[2] != left[3]:  # an even kernel pads one side more
                x, padding = functional.pad(x, left), (0, 0)
            else:
                padding = (left[2], left[0])
        geometry = (list(self.stride), list(padding), list(self.dilation), self.groups)
        unbatched = x.dim() == 3
        y = _HardConv2d.apply(x[None] if unbatched else x, self.weight, self.bias, weight, clip, geometry)
        return y[0] if unbatched else y


def _conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None, "device": "meta"}
