"""Kinds of layers: ``KINDS``, one entry each, and the layers themselves, quantized and packed.

Adding a kind is its two classes and one entry: who replaces, packs, writes, exports, counts or reports layers reads it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops, runtime
from ..quant import Grid, QuantConfig
from .layers import QuantizedLayer
from .packed import PackedLayer

__all__ = [
    "KINDS", "AskewConv1d", "AskewConv2d", "AskewEmbedding", "AskewLinear", "Kind", "PackedConv1d", "PackedConv2d",
    "PackedEmbedding", "PackedLinear",
]  # fmt: skip

PATCHES = 1 << 22  # numbers of a convolution's input that stand as patches at a time: 16 MiB


@dataclass(frozen=True)
class Kind:
    """All that is known of a kind of layers, but for what its classes do."""

    name: str  # as files and policies have it
    group: str  # a name that it shares with others
    plain: type[nn.Module]  # torch's class; the next two take its place
    quantized: type[QuantizedLayer]
    packed: type[PackedLayer]
    sizes: tuple[str, ...]  # its arguments that the weight's shape tells: its first two dimensions, and all the others
    options: tuple[str, ...]  # its further arguments that are attributes, too, besides ``bias``
    geometry: tuple[str, ...]  # the options that make two layers with one weight differ
    dims: int  # of the weight
    output: int | None  # its dimension whose every index is an output, a sum of products; None where rows are looked up
    token_dims: int  # last dimensions of the input that share one scale where it is quantized; 0 for indices
    product: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]  # (layer, x, weight, bias) -> y

    def _others(self, bias: bool) -> dict[str, Any]:
        return {"device": "meta"} if self.output is None else {"device": "meta", "bias": bias}

    def arguments_of(self, layer: Any) -> dict[str, Any]:
        """What makes another layer of the same sizes, on the meta device."""
        given = {name: getattr(layer, name) for name in self.sizes + self.options}
        return given | self._others(getattr(layer, "bias", None) is not None)

    def geometry_of(self, layer: Any) -> dict[str, Any]:
        """What makes two layers with one weight differ, JSON-ready."""
        given = {name: getattr(layer, name) for name in self.geometry}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    def of_shape(self, shape: Any, bias: bool, cls: type[nn.Module] | None = None,
                 geometry: Mapping[str, Any] | None = None) -> nn.Module:  # fmt: skip
        """A float layer, or one of a class with the same arguments, with a weight of this shape, on the meta device;
        ``geometry`` as ``geometry_of`` gives it, or what torch does without being told."""
        sizes: dict[str, Any] = dict(zip(self.sizes, (*shape[:2], tuple(shape[2:])), strict=False))
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in (geometry or {}).items() if k in self.geometry}
        if "groups" in given:
            sizes[self.sizes[1]] *= given["groups"]
        return (cls or self.plain)(**sizes, **given, **self._others(bias))

    def float_layer(self, layer: Any, weight: nn.Parameter, cls: type[nn.Module] | None = None) -> Any:
        """As ``of_shape``, of the sizes of ``layer``, with this weight and the bias Parameter of ``layer``."""
        new: Any = (cls or self.plain)(**self.arguments_of(layer))
        new.weight = weight
        if self.output is not None:
            new.bias = layer.bias
        return new.train(layer.training)

    def input_grid(self, layer: Any) -> Grid | None:
        """What the input of a quantized or packed layer is quantized to; None where it stays float, and for indices."""
        return layer.config.activation if self.token_dims else None

    def macs(self, layer: Any, y: Tensor) -> int:
        """Multiply–accumulates of a call that gave ``y``."""
        if self.output is None:
            return 0
        return y.numel() * math.prod(n for i, n in enumerate(layer.weight.shape) if i != self.output)


# ---- linear ----------------------------------------------------------------------------------------------------------


class AskewLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """nn.Linear with a quantized weight. x: (…, in_features) -> (…, out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: QuantConfig | None = None,
                 device: Any = None, dtype: Any = None) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype, config=config)


class PackedLinear(PackedLayer):
    """y = x W^T + b with packed W. x: (…, in_features) -> (…, out_features), in the type of x.

    From the codes, as exact as ``ops.packed_linear`` says: on a CPU, where ``activations="int8"`` is faster from a few
    rows on, and on a GPU with Triton up to ``runtime.FEW_ON_GPU`` rows. Elsewhere the weight is unpacked for the call.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: QuantConfig | None = None, *,
                 trits: bool = False, scale_dtype: torch.dtype | None = None, device: Any = None,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._attach((out_features, in_features), bias, config or QuantConfig(), trits, scale_dtype, dtype, device)

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
        if torch.compiler.is_exporting():  # or the graph holds a view, which inputs of other strides have not
            x = x.clone(memory_format=torch.contiguous_format)
        return self._product(x.reshape(rows, self.in_features), bias).reshape(*x.shape[:-1], self.out_features)

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


# ---- convolutions ----------------------------------------------------------------------------------------------------

CHANNELS = ("out_channels", "in_channels", "kernel_size")
GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


def _convolved(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layer._conv_forward(x, weight, bias)


class _PackedConvolution(PackedLayer):
    """Groups, stride, dilation, padding and all padding modes.

    On a CPU, without groups, the product is made from the codes for few output positions (late layers, small batches),
    and with ``activations="int8"`` for any number (``runtime.convolves_from_codes``): each output position is a row of
    x, its patch, and no more than ``PATCHES`` numbers of them stand in memory. Elsewhere the weight is unpacked for the
    call, with the very results of the hard-quantized layer.
    """

    def forward(self, input: Tensor) -> Tensor:  # the name that torch's layers have
        x, conv = input, self  # type: Tensor, Any
        if (type(x) is not Tensor or x.is_nested) and (special := self._special(x)) is not None:
            return special
        x, bias = self._prepared(x)
        spatial = len(conv.stride)
        unbatched = x.dim() == 1 + spatial
        if x.is_cpu and conv.groups == 1 and (unbatched or x.dim() == 2 + spatial):
            batch = x[None] if unbatched else x
            sizes = self._positions(batch)
            # torch's own product says what is wrong otherwise; exported, a look at sizes would be a bound on them
            whole = torch.compiler.is_exporting() or all(n > 0 for n in sizes)
            few = runtime.convolves_from_codes(batch.shape[0] * math.prod(sizes), self.activations)
            if few and whole and x.shape[-1 - spatial] == conv.in_channels and self._reads_codes(x, 1):
                y = self._from_codes(batch, bias, *sizes)
                return y[0] if unbatched else y
        return conv._conv_forward(x, self.dequantize(x.dtype), bias)

    def _positions(self, x: Tensor) -> list[int]:
        """Sizes of the output."""
        conv: Any = self
        around = conv._reversed_padding_repeated_twice[::-1]
        padded = [n + a + b for n, a, b in zip(x.shape[2:], around[::2], around[1::2], strict=True)]
        geometry = zip(padded, conv.kernel_size, conv.stride, conv.dilation, strict=True)
        return [(n - gap * (k - 1) - 1) // step + 1 for n, k, step, gap in geometry]

    def _from_codes(self, x: Tensor, bias: Tensor | None, height: int, width: int = 1) -> Tensor:
        """A signal of one dimension is an image that is one wide."""
        conv: Any = self
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if any(conv._reversed_padding_repeated_twice):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = functional.pad(x, conv._reversed_padding_repeated_twice, mode)
        images, signal = x.shape[0], x.dim() == 3
        x = x[..., None] if signal else x
        kernel, dilation, stride = ((*n, 1)[:2] for n in (conv.kernel_size, conv.dilation, conv.stride))

        def product(part: Tensor, lines: int) -> Tensor:
            patches = functional.unfold(part, kernel, dilation, 0, stride)
            rows = self._product(patches.transpose(1, 2).contiguous().reshape(-1, self.cols), bias)
            return rows.reshape(images, lines, width, conv.out_channels)

        if exporting := torch.compiler.is_exporting():
            y = product(x, height)
        else:
            y = x.new_empty(images, height, width, conv.out_channels)
            reach = dilation[0] * (kernel[0] - 1) + 1
            lines = max(1, PATCHES // max(1, images * width * self.cols))  # of the output, at a time
            for first in range(0, height, lines):
                last = min(first + lines, height)
                part = x[:, :, first * stride[0] : (last - 1) * stride[0] + reach]
                y[:, first:last] = product(part, last - first)
        y = y.permute(0, 3, 1, 2)
        y = y if channels_last and not exporting else y.contiguous()
        return y[..., 0] if signal else y


class AskewConv1d(QuantizedLayer, nn.Conv1d):  # type: ignore[misc]
    """nn.Conv1d with a quantized weight."""


class PackedConv1d(_PackedConvolution, nn.Conv1d):  # type: ignore[misc, override]
    """nn.Conv1d with a packed weight."""


class AskewConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d with a quantized weight."""


class PackedConv2d(_PackedConvolution, nn.Conv2d):  # type: ignore[misc, override]
    """nn.Conv2d with a packed weight."""


# ---- embeddings ------------------------------------------------------------------------------------------------------


def _looked_up(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.embedding(x, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)


class _Lookup:
    """Refuses what writes into the weight that is read, and gradients that no update pass takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layer: Any = self
        if layer.max_norm is not None:
            raise ValueError(f"max_norm: expected None, got {layer.max_norm}: it would write into the quantized weight")
        if layer.sparse:
            raise ValueError("sparse: expected False: the gradient of a quantized weight is dense")


class AskewEmbedding(_Lookup, QuantizedLayer, nn.Embedding):  # type: ignore[misc]
    """nn.Embedding with a quantized weight; per channel, every row has a scale. x: indices (…) -> (…, embedding_dim).

    The row ``padding_idx`` gets no gradient, and stays zeros where the grid has the level 0. Raises ValueError for
    ``max_norm`` and ``sparse``.
    """

    bias = None


class PackedEmbedding(_Lookup, PackedLayer, nn.Embedding):  # type: ignore[misc, override]
    """nn.Embedding with a packed weight: the rows that are looked up are decoded, or all where they are fewer."""

    def forward(self, input: Tensor) -> Tensor:  # the name that torch's layers have
        x = input
        if (type(x) is not Tensor or x.is_nested) and (special := self._special(x)) is not None:
            return special
        codes, scale, grid = self.weight_codes, self.weight_scale, self.config.weight
        if not torch.compiler.is_exporting() and x.numel() > len(codes):
            return functional.embedding(x, self.dequantize())
        rows = x.reshape(-1)
        if scale.numel() > 1:
            scale = scale.reshape(len(codes), -1).index_select(0, rows)
        y = ops.packed_dequantize(codes.index_select(0, rows), scale, grid, self.bits, self.cols, self.weight_dtype)
        return y.reshape(*x.shape, self.cols)


# ---- the table -------------------------------------------------------------------------------------------------------

KINDS: dict[str, Kind] = {kind.name: kind for kind in (
    Kind("linear", "linear", nn.Linear, AskewLinear, PackedLinear, ("out_features", "in_features"), (), geometry=(),
         dims=2, output=0, token_dims=1, product=lambda layer, x, weight, bias: functional.linear(x, weight, bias)),
    Kind("conv1d", "conv", nn.Conv1d, AskewConv1d, PackedConv1d, CHANNELS, GEOMETRY, GEOMETRY,
         dims=3, output=0, token_dims=2, product=_convolved),
    Kind("conv2d", "conv", nn.Conv2d, AskewConv2d, PackedConv2d, CHANNELS, GEOMETRY, GEOMETRY,
         dims=4, output=0, token_dims=3, product=_convolved),
    Kind("embedding", "embedding", nn.Embedding, AskewEmbedding, PackedEmbedding, ("num_embeddings", "embedding_dim"),
         ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"), geometry=(),
         dims=2, output=None, token_dims=0, product=_looked_up),
)}  # fmt: skip
for _kind in KINDS.values():
    _kind.quantized.kind = _kind.packed.kind = _kind

DEFAULT = ("linear", "conv")  # what quantize_ replaces where nothing is said


def chosen(names: str | Iterable[str]) -> list[Kind]:
    """The kinds of these names or groups of names. Raises ValueError with the names that there are."""
    asked = [names] if isinstance(names, str) else list(names)
    known = {name for kind in KINDS.values() for name in (kind.name, kind.group)}
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"kinds: expected names out of {', '.join(sorted(known))}, got {unknown[0]!r}")
    return [kind for kind in KINDS.values() if kind.name in asked or kind.group in asked]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer, be it float, quantized, packed, or of a class derived from these."""
    return next((kind for kind in KINDS.values() if isinstance(module, (kind.plain, kind.packed))), None)


def own_keys(cls: type[nn.Module]) -> frozenset[str]:
    """Keys that every layer of this class has in a state_dict; what else stands under its name was hung on it."""
    bases: Any = ((kind, base) for kind in KINDS.values() for base in (kind.quantized, kind.packed, kind.plain))
    return _keys(*next((kind, base) for kind, base in bases if issubclass(cls, base)))


@functools.cache
def _keys(kind: Any, base: Any) -> frozenset[str]:
    return frozenset(kind.of_shape((1,) * kind.dims, True, base).state_dict())


def replaceable(module: nn.Module) -> Kind | None:
    """The kind of a layer of torch's own or of a quantized one, None for subclasses, whose forward may differ; a
    parametrized layer counts as what it was."""
    cls: Any = type(module)
    if "parametrizations" in module._modules:
        cls = cls.__bases__[0]
    return next((kind for kind in KINDS.values() if cls in (kind.plain, kind.quantized)), None)
