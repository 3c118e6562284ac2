"""Layers for inference whose weight is packed codes, and the call that makes them from trained layers.

``weight_codes`` (n, row_bytes) uint8 and ``weight_scale`` (rows,) are buffers; the weight is s c, bit for bit the one
that was trained (docs/packed.md). Casting a model (``model.half()``) changes the type it computes in, never its codes
and scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops, runtime
from ..quant import QuantConfig, code_bits, num_rows, pack_weight
from ..quant.packing import SCALE_TYPES, row_bytes
from .layers import (
    AskewConv2d,
    AskewLinear,
    QuantizedLayer,
    _autocast_dtype,
    _conv_arguments,
    plain_conv2d,
    plain_linear,
    quantized_input,
)


class PackedLayer(nn.Module):
    """What the packed layers share. ``config``: grid and granularity; ``trits``: five ternary codes in a byte;
    ``weight_dtype``: the type that was trained, in which ``dequantize`` gives the weight."""

    weight_codes: Tensor
    weight_scale: Tensor
    bias: Any
    kind: str

    def _attach(
        self, shape: tuple[int, ...], bias: bool, config: QuantConfig, trits: bool, scale_dtype: torch.dtype,
        dtype: torch.dtype | None, device: Any,
    ) -> None:  # fmt: skip
        """Empty codes and scales for a weight of this shape."""
        if not isinstance(config, QuantConfig):
            raise TypeError(f"config: expected a QuantConfig, got {config!r}")
        if scale_dtype not in SCALE_TYPES:
            raise TypeError(f"scale_dtype: expected float32, bfloat16 or float16, got {scale_dtype}")
        self.config, self.trits, self.shape = config, trits, tuple(shape)
        self.bits = code_bits(config.weight, trits)
        self.cols = math.prod(shape[1:])
        self.weight_dtype = dtype or torch.get_default_dtype()
        rows = num_rows(self.shape, config.granularity, config.group_size)
        codes = torch.zeros(shape[0], row_bytes(self.cols, self.bits), dtype=torch.uint8, device=device)
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", torch.ones(rows, dtype=scale_dtype, device=device))
        empty = nn.Parameter(torch.zeros(shape[0], dtype=self.weight_dtype, device=device)) if bias else None
        self.register_parameter("bias", empty)

    @classmethod
    def from_quantized(
        cls, layer: Any, *, force: bool = False, trits: bool = False, scale_dtype: torch.dtype = torch.float32
    ) -> Any:
        """Packs the weight of ``layer`` (an AskewLinear for a PackedLinear, and so on); its bias is shared. Raises
        ValueError where that would change a weight, unless ``force``."""
        new = cls.like(layer, layer.config, trits, scale_dtype, layer.weight.dtype, "meta")
        new._take(layer, force)
        return new.train(layer.training)

    @classmethod
    def like(cls, layer: Any, config: QuantConfig, trits: bool, scale_dtype: torch.dtype, dtype: torch.dtype,
             device: Any) -> Any:  # fmt: skip
        """Empty, of the sizes of ``layer``."""
        raise NotImplementedError

    @torch.no_grad()
    def _take(self, layer: QuantizedLayer, force: bool) -> None:
        """Codes and scales of ``layer``, and its bias as it is. ValueError where the weight is not on its levels."""
        weight, grid = layer.weight.detach(), self.config.weight
        exact = layer.weight_scale.detach()
        scale = exact.to(self.weight_scale.dtype)
        if not torch.equal(scale.float(), exact.float()) and not force:
            raise ValueError(
                f"scale_dtype: {scale.dtype} would change the scales; use float32, or force=True to round them"
            )
        codes = pack_weight(weight, scale.float(), grid, trits=self.trits)
        self.weight_codes, self.weight_scale = codes, scale.clone()
        self.bias = layer.bias
        off = int((self.dequantize() != weight).sum())
        if off and not force:
            raise ValueError(
                f"weight: {off} of {weight.numel()} weights are not on their levels; call hard_quantize_(model) "
                "first, or give force=True to round them"
            )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight s c, a new tensor in ``weight_dtype`` or ``dtype``: the product rounded once."""
        return ops.lowbit_dequantize(
            self.weight_codes, self.weight_scale, self.config.weight, self.bits, self.cols, dtype or self.weight_dtype
        ).reshape(self.shape)

    def _input(self, x: Tensor) -> Tensor:
        """The input as the trained layer has taken it."""
        grid = self.config.activation
        return x if grid is None else quantized_input(x, grid, 1 if self.kind == "linear" else 3)

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.weight_codes.numel() + self.weight_scale.numel() * self.weight_scale.element_size()

    def description(self) -> dict[str, Any]:
        """What a file says of this layer, JSON-ready."""
        return {
            "kind": self.kind,
            "config": self.config.to_dict(),
            "trits": self.trits,
            "shape": list(self.shape),
            "dtype": str(self.weight_dtype).removeprefix("torch."),
        }

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=scale.device)).dtype
        if self.weight_scale.dtype != scale.dtype:  # a cast: the scales are data, not numbers to compute in
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        c = self.config
        group = f", group_size={c.group_size}" if c.group_size else ""
        packing = ", trits" if self.trits else ""
        return f"{super().extra_repr()}, {c.weight}{packing}, {c.granularity}{group}"


class PackedLinear(PackedLayer):
    """y = x W^T + b with packed W. x: (…, in_features) -> (…, out_features), in the type of x.

    On the CPU ``ops.lowbit_linear`` computes it from the codes; ``activations="int8"`` rounds each row of x to int8 on
    the way, which is faster from a few rows on and as exact as ``ops.lowbit_linear`` says. Elsewhere, and where x
    wants a gradient, the weight is unpacked for the call and torch's own product taken.
    """

    kind = "linear"
    activations = "float"

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, config: QuantConfig | None = None, *,
        trits: bool = False, scale_dtype: torch.dtype = torch.float32, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._attach((out_features, in_features), bias, config or QuantConfig(), trits, scale_dtype, dtype, device)

    @classmethod
    def like(cls, layer: Any, config: QuantConfig, trits: bool, scale_dtype: torch.dtype, dtype: torch.dtype,
             device: Any) -> PackedLinear:  # fmt: skip
        """Empty, of the sizes of ``layer``."""
        return cls(layer.in_features, layer.out_features, layer.bias is not None, config, trits=trits,
                   scale_dtype=scale_dtype, device=device, dtype=dtype)  # fmt: skip

    def to_float(self) -> nn.Linear:
        """An nn.Linear with the unpacked weight and the same bias Parameter."""
        return plain_linear(self, nn.Parameter(self.dequantize()))

    def forward(self, x: Tensor) -> Tensor:
        low = _autocast_dtype(x)
        x = self._input(x)
        x = x if low is None else x.to(low)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            return functional.linear(x, self.dequantize(x.dtype), bias)
        if not torch.is_grad_enabled():
            return self._product(x, bias)
        with torch.no_grad():
            return self._product(x, bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``ops.lowbit_linear`` without its checks, passed by this layer; they cost as much as a small product."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected shape (…, {self.in_features}), got {tuple(x.shape)}")
        grid = self.config.weight
        flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), self.in_features)
        y = runtime.operator("lowbit_linear_int8" if self.activations == "int8" else "lowbit_linear", flat)(
            flat.contiguous(), self.weight_codes, self.weight_scale.float(), grid.levels_tensor(x.device),
            grid.encoding, self.bits, bias,
        )  # fmt: skip
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        int8 = ", activations=int8" if self.activations == "int8" else ""
        return sizes + super().extra_repr() + int8


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d with a packed weight: groups, stride, dilation, padding and all padding modes."""

    kind = "conv2d"

    def __init__(
        self, *args: Any, config: QuantConfig | None = None, trits: bool = False,
        scale_dtype: torch.dtype = torch.float32, **kwargs: Any,
    ) -> None:  # fmt: skip
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        nn.Conv2d.__init__(self, *args, **kwargs | {"device": "meta"})
        shape, bias = tuple(self.weight.shape), self.bias is not None
        del self.weight, self.bias  # a packed layer has no `weight`: nobody can mistake it for one to train
        self._attach(shape, bias, config or QuantConfig(), trits, scale_dtype, dtype, device)

    @classmethod
    def like(cls, layer: Any, config: QuantConfig, trits: bool, scale_dtype: torch.dtype, dtype: torch.dtype,
             device: Any) -> PackedConv2d:  # fmt: skip
        """Empty, of the geometry of ``layer``."""
        arguments = _conv_arguments(layer) | {"device": device, "dtype": dtype}
        return cls(**arguments, config=config, trits=trits, scale_dtype=scale_dtype)

    def to_float(self) -> nn.Conv2d:
        """An nn.Conv2d with the unpacked weight and the same bias Parameter."""
        return plain_conv2d(self, nn.Parameter(self.dequantize()))

    def description(self) -> dict[str, Any]:
        return super().description() | {"geometry": conv_geometry(self)}

    def forward(self, x: Tensor) -> Tensor:
        low = _autocast_dtype(x)
        x = self._input(x)
        x = x if low is None else x.to(low)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.dequantize(x.dtype), bias)


def conv_geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """What makes two convolutions with one weight differ, JSON-ready."""
    padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
    return {
        "stride": list(conv.stride), "padding": padding, "dilation": list(conv.dilation), "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }  # fmt: skip


PACKED: dict[type[nn.Module], type] = {AskewLinear: PackedLinear, AskewConv2d: PackedConv2d}


def replace_modules(model: nn.Module, new: dict[str, nn.Module]) -> None:
    for name, module in new.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def set_activations(layer: PackedLayer, activations: str) -> None:
    """Sets ``layer.activations`` of a PackedLinear; ValueError where it is unknown or the grid does not allow it."""
    ops.check_activations(activations, layer.config.weight)
    if isinstance(layer, PackedLinear):
        layer.activations = activations


def pack_(
    model: nn.Module, force: bool = False, *, trits: bool = False, scale_dtype: torch.dtype = torch.float32,
    activations: str = "float",
) -> nn.Module:  # fmt: skip
    """Replaces every AskewLinear and AskewConv2d of ``model``, in place, by its packed twin; returns the model.

    The packed weight is the trained one, bit for bit. ``trits``: ternary layers with five codes in a byte (1.6 bits a
    weight; slower to read) instead of 2 bits. ``scale_dtype``: how scales are kept. ``activations``: "int8" lets the
    linear layers round their inputs to int8, row by row, when they run on a CPU (``PackedLinear``); files keep no such
    choice.

    Raises ValueError naming the layer, and leaves the model as it was, for NaN weights, grids that cannot be packed
    (inclusive), and, unless ``force=True`` rounds them, weights that are not hard-quantized and scales that
    ``scale_dtype`` does not hold. Biases stay the same Parameter objects.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, QuantizedLayer):
        raise ValueError("model: is itself a layer; use PackedLinear.from_quantized or PackedConv2d.from_quantized")
    made: dict[int, nn.Module] = {}
    of_weight: dict[int, PackedLayer] = {}
    new: dict[str, nn.Module] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, QuantizedLayer):
            continue
        if id(layer) not in made:
            packed: Any = next((p for t, p in PACKED.items() if isinstance(layer, t)), None)
            if packed is None:
                raise ValueError(f"{name}: {type(layer).__name__} has no packed form")
            ternary = trits and layer.config.weight.to_dict()["grid"] == "ternary"
            try:
                twin = packed.from_quantized(layer, force=force, trits=ternary, scale_dtype=scale_dtype)
                set_activations(twin, activations)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from None
            shared = of_weight.setdefault(id(layer.weight), twin)
            if shared is not twin and shared.config == twin.config:  # a weight shared between layers is kept once
                twin.weight_codes, twin.weight_scale = shared.weight_codes, shared.weight_scale
            made[id(layer)] = twin
        new[name] = made[id(layer)]
    if not new:
        raise ValueError("model: has no AskewLinear or AskewConv2d to pack; call quantize_(model) and train it first")
    replace_modules(model, new)
    return model


def unpack_(model: nn.Module) -> nn.Module:
    """The inverse of ``pack_``, as far as inference goes: nn.Linear and nn.Conv2d with the unpacked weights."""
    made: dict[int, nn.Module] = {}
    new: dict[str, nn.Module] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (PackedLinear, PackedConv2d)) and name:
            if id(layer) not in made:
                made[id(layer)] = layer.to_float()
            new[name] = made[id(layer)]
    replace_modules(model, new)
    return model


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the packed layers in ``model``."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}
