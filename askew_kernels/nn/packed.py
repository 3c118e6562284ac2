"""Layers for inference whose weight is packed codes, and the call that makes them from trained layers.

Where the product is made from the codes (``PackedLayer._reads_codes``) the weight is never unpacked as a whole;
elsewhere it is unpacked for the call, and torch's own product taken.

``weight_codes`` (n, row_bytes) uint8 and ``weight_scale`` (rows,) are buffers; the weight is s c, bit for bit the one
that was trained (docs/packed.md). Casting a model (``model.half()``) changes the type it computes in, never its codes
and scales.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import functional

from .. import ops, runtime
from ..quant import QuantConfig, code_bits, grid_from_dict, num_rows, pack_weight
from ..quant.packing import SCALE_TYPES, row_bytes
from .convert import tell_float
from .decoded import DecodedWeight
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
from .replace import check_replaceable, replace_modules

FEW_ON_GPU = 64  # rows of x up to which a GPU reads the codes; beyond, unpacking is small beside the product
FEW_IN_CUDA = 8  # rows up to which the CUDA kernel takes them; beyond Triton's, which has the matrix units
FEW_POSITIONS = 40  # output positions of a convolution below which float products are made from the codes
EXTRA_STATE = "_extra_state"  # torch's key of what get_extra_state gives
PATCHES = 1 << 22  # numbers of a convolution's input that stand as patches at a time: 16 MiB
_TRITON = runtime.has_triton()
_transforms, _BelowAutograd = torch._C._are_functorch_transforms_active, torch._C._AutoDispatchBelowAutograd


class PackedLayer(nn.Module):
    """What the packed layers share. ``config``: grid and granularity; ``trits``: five ternary codes in a byte;
    ``weight_dtype``: the type that was trained, in which ``dequantize`` gives the weight; ``activations``: "float", or
    "int8", which lets a CPU round each row of the input to int8 on the way."""

    weight_codes: Tensor
    weight_scale: Tensor
    bias: Any
    kind: str
    activations = "float"
    own_attributes = ("config", "trits", "shape", "bits", "cols", "weight_dtype", "activations", "weight_codes",
                      "weight_scale")  # fmt: skip

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
        if weight.is_meta or hasattr(weight, "fake_mode"):
            raise ValueError("weight: is on the meta device or fake and has no values to pack; make a PackedLinear or "
                             "PackedConv2d there instead")  # fmt: skip
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
        return ops.packed_dequantize(
            self.weight_codes, self.weight_scale, self.config.weight, self.bits, self.cols, dtype or self.weight_dtype
        ).reshape(self.shape)

    @property
    def weight(self) -> Tensor:
        """The weight for those who read it, read-only: dtype, device and shape cost nothing, values are unpacked where
        they are used, each time."""
        if "weight_codes" not in self._buffers:
            raise AttributeError("weight")  # while nn.Conv2d makes its own
        return self.dequantize() if torch.compiler.is_compiling() else DecodedWeight(self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and "weight_codes" in self._buffers:
            raise AttributeError(
                "weight: a packed layer keeps codes, it can be given no other weight; call unpack_(model) first"
            )
        super().register_parameter(name, param)

    def _input(self, x: Tensor) -> Tensor:
        """The input as the trained layer has taken it."""
        grid = self.config.activation
        return x if grid is None else quantized_input(x, grid, 1 if self.kind == "linear" else 3)

    def _prepared(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input and bias in the type that the product is made in."""
        low = _autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
        if self.config.activation is not None:
            x = self._input(x)
        if low is not None:
            x = x.to(low)
        try:  # not `self.bias`, nor a cast to the same type: microseconds, in every call
            bias = self._parameters["bias"]
        except KeyError:  # parametrized
            bias = self.bias
        return x, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def _special(self, x: Any) -> Any:
        """The result for what is no plain tensor: a node of torch.fx's graph, of which a packed layer is a leaf, or a
        nested tensor; None for the rest."""
        if isinstance(x, Proxy):
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})  # type: ignore[attr-defined]
        return self._nested(x) if x.is_nested else None

    def _nested(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"x: {type(self).__name__} takes no nested tensors; give it one tensor at a time")

    def _reads_codes(self, x: Tensor, rows: int) -> bool:
        """Whether a product of that many rows is made from the codes: on a CPU, on a GPU where there are few and Triton
        is there, and never where x wants a gradient or under a transform of torch.func."""
        if (x.requires_grad and torch.is_grad_enabled()) or _transforms() or forward_ad._current_level >= 0:
            return False
        if x.is_cpu:
            return True
        few = x.is_cuda and _TRITON and x.dtype != torch.float64
        if few and torch.compiler.is_exporting() and not isinstance(rows, int):
            return False  # a choice by size would be a bound on what was exported
        return few and rows <= FEW_ON_GPU

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``ops.packed_linear`` of (rows, cols) without its checks, which cost as much as a small product."""
        grid, compiling = self.config.weight, torch.compiler.is_compiling()
        name = "packed_linear_int8" if self.activations == "int8" and not x.is_cuda else "packed_linear"
        product = runtime.operator(name, x)
        if x.is_cuda and not compiling and runtime._forced is None and len(x) > FEW_IN_CUDA:
            if not torch._C._len_torch_dispatch_stack():  # which sees operators only
                product = runtime.implementation("triton", name)
        codes, scale = self._buffers["weight_codes"], self._buffers["weight_scale"]
        if scale.dtype != torch.float32:  # type: ignore[union-attr]
            scale = scale.float()  # type: ignore[union-attr]
        levels = grid.levels_tensor(x.device)
        if torch.is_grad_enabled() and ((bias is not None and bias.requires_grad) or scale.requires_grad):  # type: ignore[union-attr]
            return ops.run_packed_linear(
                name, product, x.contiguous(), codes, scale, levels, grid.encoding, self.bits, bias
            )
        # nothing to record: spares the call into the operator's Python kernel; no `with`, which takes twice as long
        below = None if compiling else _BelowAutograd()
        try:
            return product(x.contiguous(), codes, scale, levels, grid.encoding, self.bits, bias)
        finally:
            del below

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

    # ---- checkpoints: what the codes mean travels with them, and is checked ----

    def _meaning(self) -> dict[str, Any]:
        """What two layers must agree in so that the codes of one mean the same in the other, and outputs are equal."""
        activation = self.config.activation
        return {
            "grid": self.config.weight.to_dict(), "trits": self.trits, "shape": list(self.shape),
            "activation": None if activation is None else activation.to_dict(),
        }  # fmt: skip

    def get_extra_state(self) -> Tensor:
        """JSON as uint8: a tensor goes through every kind of checkpoint."""
        return torch.tensor(list(json.dumps(self._meaning()).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        if wrong := self._other_meaning(state):
            raise ValueError(wrong)

    def _other_meaning(self, state: Any) -> str:
        """How a saved meaning differs from this layer's; empty where it does not."""
        try:
            saved = json.loads(bytes(state.detach().cpu().tolist()))
            own = json.loads(json.dumps(self._meaning()))
            differing = [(key, saved.get(key), value) for key, value in own.items() if saved.get(key) != value]
        except (AttributeError, ValueError, TypeError) as error:
            return f"{EXTRA_STATE}: expected the JSON of a packed layer as uint8 ({error})"

        def said(key: str, value: Any) -> Any:
            return grid_from_dict(value) if key in ("grid", "activation") and value is not None else value

        return "; ".join(f"{key}: expected {said(key, value)}, got {said(key, got)}" for key, got, value in differing)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list,
                              unexpected_keys: list, error_msgs: list) -> None:  # fmt: skip
        key = prefix + EXTRA_STATE
        if key in state_dict and (wrong := self._other_meaning(state_dict[key])):
            error_msgs.append(f"{prefix}weight_codes: codes of another meaning: {wrong}")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys:  # saved by an earlier release, or taken from a file
            missing_keys.remove(key)

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
        int8 = ", activations=int8" if self.activations == "int8" else ""
        return f"{super().extra_repr()}, {c.weight}{packing}, {c.granularity}{group}{int8}"


class PackedLinear(PackedLayer):
    """y = x W^T + b with packed W. x: (…, in_features) -> (…, out_features), in the type of x.

    From the codes, as exact as ``ops.packed_linear`` says: on a CPU, where ``activations="int8"`` is faster from a few
    rows on, and on a GPU with Triton up to ``FEW_ON_GPU`` rows. Elsewhere the weight is unpacked for the call.
    """

    kind = "linear"

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

    def forward(self, input: Tensor) -> Tensor:  # the name that torch's layers have
        x = input
        if (type(x) is not Tensor or x.is_nested) and (special := self._special(x)) is not None:
            return special
        x, bias = self._prepared(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected shape (…, {self.in_features}), got {tuple(x.shape)}")
        rows = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
        if not self._reads_codes(x, rows):
            return functional.linear(x, self.dequantize(x.dtype), bias)
        if x.dim() == 2:
            return self._product(x, bias)
        sizes = x.shape[:-1]
        if torch.compiler.is_exporting():  # or the graph holds a view, which inputs of other strides have not
            x = x.clone(memory_format=torch.contiguous_format)
        return self._product(x.reshape(rows, self.in_features), bias).reshape(*sizes, self.out_features)

    def _nested(self, x: Any) -> Tensor:
        """Row by row as alone, in the layout of ``x``."""
        if x.layout != torch.jagged:
            return torch.nested.as_nested_tensor([self(part) for part in x.unbind()])
        if x._ragged_idx != 1:
            raise NotImplementedError("x: a nested tensor is expected as (batch, length, features), lengths varying")
        return torch.nested.nested_tensor_from_jagged(self(x.values()), x.offsets(), x.lengths())

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes + super().extra_repr()


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[misc, override]
    """nn.Conv2d with a packed weight: groups, stride, dilation, padding and all padding modes.

    On a CPU, without groups, the product is made from the codes for fewer than ``FEW_POSITIONS`` output positions (late
    layers, small batches), and with ``activations="int8"`` for any number: each output position is a row of x, its
    patch, and no more than ``PATCHES`` numbers of them stand in memory. Elsewhere the weight is unpacked for the call,
    with the very results of the hard-quantized layer.
    """

    kind = "conv2d"

    def __init__(
        self, *args: Any, config: QuantConfig | None = None, trits: bool = False,
        scale_dtype: torch.dtype = torch.float32, **kwargs: Any,
    ) -> None:  # fmt: skip
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        nn.Conv2d.__init__(self, *args, **kwargs | {"device": "meta"})
        shape, bias = tuple(self.weight.shape), self.bias is not None
        del self.weight, self.bias
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

    def forward(self, input: Tensor) -> Tensor:  # the name that torch's layers have
        x = input
        if (type(x) is not Tensor or x.is_nested) and (special := self._special(x)) is not None:
            return special
        x, bias = self._prepared(x)
        if x.is_cpu and self.groups == 1 and x.dim() in (3, 4) and x.shape[-3] == self.in_channels:
            batch = x if x.dim() == 4 else x[None]
            height, width = self._positions(batch)
            exporting = torch.compiler.is_exporting()  # a choice by size would be a bound on what is exported
            few = not exporting and batch.shape[0] * height * width < FEW_POSITIONS
            whole = exporting or (height > 0 and width > 0)  # torch's own product says what is wrong otherwise
            if whole and (few or self.activations == "int8") and self._reads_codes(x, 1):
                y = self._from_codes(batch, bias, height, width)
                return y if x.dim() == 4 else y[0]
        return self._conv_forward(x, self.dequantize(x.dtype), bias)

    def _positions(self, x: Tensor) -> tuple[int, int]:
        """(height, width) of the output."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        sizes = (x.shape[2] + top + bottom, x.shape[3] + left + right)
        geometry = zip(sizes, self.kernel_size, self.stride, self.dilation, strict=True)
        height, width = ((size - gap * (k - 1) - 1) // step + 1 for size, k, step, gap in geometry)
        return height, width

    def _from_codes(self, x: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if any(self._reversed_padding_repeated_twice):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode)
        images = x.shape[0]

        def product(part: Tensor, lines: int) -> Tensor:
            patches = functional.unfold(part, self.kernel_size, self.dilation, 0, self.stride)
            rows = self._product(patches.transpose(1, 2).contiguous().reshape(-1, self.cols), bias)
            return rows.reshape(images, lines, width, self.out_channels)

        if torch.compiler.is_exporting():
            return product(x, height).permute(0, 3, 1, 2).contiguous()
        y = x.new_empty(images, height, width, self.out_channels)
        reach = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        lines = max(1, PATCHES // max(1, images * width * self.cols))  # of the output, at a time
        for first in range(0, height, lines):
            last = min(first + lines, height)
            part = x[:, :, first * self.stride[0] : (last - 1) * self.stride[0] + reach]
            y[:, first:last] = product(part, last - first)
        y = y.permute(0, 3, 1, 2)
        return y if channels_last else y.contiguous()


def conv_geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """What makes two convolutions with one weight differ, JSON-ready."""
    padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
    return {
        "stride": list(conv.stride), "padding": padding, "dilation": list(conv.dilation), "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }  # fmt: skip


PACKED: dict[type[nn.Module], type] = {AskewLinear: PackedLinear, AskewConv2d: PackedConv2d}


def set_activations(layer: PackedLayer, activations: str) -> None:
    """Sets ``layer.activations``; ValueError where it is unknown or the grid does not allow it."""
    ops.check_activations(activations, layer.config.weight)
    layer.activations = activations


def pack_(
    model: nn.Module, force: bool = False, *, trits: bool = False, scale_dtype: torch.dtype = torch.float32,
    activations: str = "float",
) -> nn.Module:  # fmt: skip
    """Replaces every AskewLinear and AskewConv2d of ``model``, in place, by its packed twin; returns the model.

    The packed weight is the trained one, bit for bit. ``trits``: ternary layers with five codes in a byte (1.6 bits a
    weight; slower to read) instead of 2 bits. ``scale_dtype``: how scales are kept. ``activations``: "int8" lets the
    layers round their inputs to int8, row by row or patch by patch, when they run on a CPU; files keep no such choice.

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
            check_replaceable(name, layer)
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
    trained = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    replace_modules(model, new)
    for layer in trained:  # an embedding that shared a weight keeps it, as an ordinary one
        layer.quantizer.untie(layer.weight)
    tell_float(model, "pack_")
    return model


def unpack_(model: nn.Module, force: bool = False) -> nn.Module:
    """The inverse of ``pack_``, as far as inference goes: nn.Linear and nn.Conv2d with the unpacked weights, in place.

    Raises ValueError naming the layer, and leaves the model as it was, where the inputs of a layer are quantized
    (``QuantConfig(activation=…)``), which these layers cannot do; ``force=True`` leaves that out.
    """
    if isinstance(model, PackedLayer):
        raise ValueError("model: is itself a layer; use its to_float()")
    made: dict[int, nn.Module] = {}
    new: dict[str, nn.Module] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (PackedLinear, PackedConv2d)):
            if layer.config.activation is not None and not force:
                raise ValueError(
                    f"{name}: its inputs are quantized to {layer.config.activation} (activation=), which a float layer "
                    "does not do; force=True leaves that out, and changes the outputs"
                )
            if id(layer) not in made:
                made[id(layer)] = layer.to_float()
            new[name] = made[id(layer)]
    replace_modules(model, new)
    return model


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the packed layers in ``model``."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}
