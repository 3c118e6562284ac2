"""Kinds of layers: ``KINDS``, one entry each, and the layers themselves, quantized and packed.

Adding a kind is its two classes and one entry: who replaces, packs, writes, exports, counts or reports layers reads it.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops, runtime
from ..ops.autograd import transformed
from ..quant import Grid, QuantConfig
from ..quant.forms import ROWS, Form
from .attention import OUT_PROJECTION, AskewInProjection, InProjection, PackedInProjection, projected
from .calls import Call, ConvolutionCall, UnpackedCall, channels_last, convolved, convolved_by_channel
from .experts import (
    AskewExperts,
    AskewTransposedExperts,
    ExpertWeight,
    PackedExperts,
    PackedTransposedExperts,
    TransposedExpertWeight,
)  # fmt: skip
from .layers import QuantizedLayer
from .packed import PackedLayer, PackedMatrix, unrecorded
from .replace import base_of, derived, mixin_of
from .unpacked import Unpacked

__all__ = [
    "KINDS", "AskewConv1d", "AskewConv2d", "AskewConv3d", "AskewConvTranspose1d", "AskewConvTranspose2d",
    "AskewConvTranspose3d", "AskewEmbedding", "AskewExperts", "AskewInProjection", "AskewLinear",
    "AskewTransposedExperts", "AskewTransposedLinear", "Kind", "PackedConv1d", "PackedConv2d", "PackedConv3d",
    "PackedConvTranspose1d", "PackedConvTranspose2d", "PackedConvTranspose3d", "PackedEmbedding", "PackedExperts",
    "PackedInProjection", "PackedLinear", "PackedTransposedExperts", "PackedTransposedLinear",
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
    token_dims: int  # last dimensions of the input that share one scale where it is quantized; 0 where it never is
    product: Callable[..., Tensor]  # (layer, x, weight, bias, *what a call has besides) -> y
    form: Form = ROWS  # how the weight is a matrix of outputs and inputs
    foreign: Callable[[], type[nn.Module] | None] = lambda: None  # another library's class for ``plain``, if it is here
    held: bool = False  # the weight is another module's Parameter, under the layer's name; that module multiplies
    multiplies_levels: bool = (
        False  # whether its product is one of matrices, which forward="fp8" and "int8" make of levels
    )
    scatters: bool = False  # every number of the input goes to as many outputs as the weight has for it
    same: tuple[type[nn.Module], ...] = ()  # derived from ``plain``, and computing the same
    wrapping: tuple[str, ...] = ()  # names, with * and ?, of classes derived from ``plain`` that go on with its result

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        """Of float layers of this kind."""
        found = self.foreign()
        return (self.plain,) if found is None else (self.plain, found)

    def float_class(self, layer: Any) -> Any:
        """What a layer of this kind becomes when it is float again."""
        if (base := base_of(type(layer))) is not type(layer):
            return base
        return self.plain if getattr(layer, "bias", None) is None else self.classes[-1]

    def wraps(self, cls: type) -> bool:
        """Whether a class derived from torch's calls its forward and goes on with what that gives."""
        return issubclass(cls, self.plain) and any(fnmatch.fnmatchcase(cls.__name__, name) for name in self.wrapping)

    @property
    def takes_bias(self) -> bool:
        """Whether its layers may have one of their own."""
        return self.output is not None and not self.held

    @property
    def is_called(self) -> bool:
        """Whether its layers have a forward of their own."""
        return not self.held or self.output is not None

    def _others(self, bias: bool) -> dict[str, Any]:
        return {"device": "meta", "bias": bias} if self.takes_bias else {"device": "meta"}

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
        parts = shape if len(self.sizes) == len(shape) else (*shape[:2], tuple(shape[2:]))
        sizes: dict[str, Any] = dict(zip(self.sizes, parts, strict=True))
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in (geometry or {}).items() if k in self.geometry}
        if "groups" in given:
            sizes[self.sizes[1]] *= given["groups"]
        return (cls or self.plain)(**sizes, **given, **self._others(bias))

    def float_layer(self, layer: Any, weight: nn.Parameter, cls: type[nn.Module] | None = None) -> Any:
        """As ``of_shape``, of the sizes of ``layer``, with this weight and the bias Parameter of ``layer``."""
        arguments = self.arguments_of(layer)
        if cls is not None:
            new: Any = cls(**arguments)
        else:  # of the very class that it was; what that has beside this kind's arguments is carried over
            made = self.float_class(layer)
            new = made.__new__(made)
            self.plain.__init__(new, **arguments)
        new.weight = weight
        if self.takes_bias:
            new.bias = layer.bias
        return new.train(layer.training)

    def form_with(self, geometry: Mapping[str, Any]) -> Form:
        """``form`` of a weight of such a layer, whose groups it says."""
        groups = geometry.get("groups", 1) if self.form.transposed else 1
        if type(groups) is not int or groups < 1:
            raise ValueError(f"groups: expected a whole number from 1 on, got {groups!r:.80}")
        return self.form._replace(groups=groups)

    def input_grid(self, layer: Any) -> Grid | None:
        """What the input of a quantized or packed layer is quantized to; None where it stays float, and for indices."""
        return layer.config.activation if self.token_dims else None

    def macs(self, layer: Any, x: Tensor, y: Tensor) -> int:
        """Multiply–accumulates of a call that made ``y`` of ``x``."""
        if self.output is None:
            return 0
        if self.scatters:
            return x.numel() * math.prod(layer.weight.shape[1:])
        return y.numel() * math.prod(n for i, n in enumerate(layer.weight.shape) if i != self.output)


# ---- linear ----------------------------------------------------------------------------------------------------------


class _OfClass:
    """In the place of a class that derives from torch's and computes the same the layers are instances of that, too."""

    kind: ClassVar[Kind]

    @classmethod
    def class_for(cls, layer: Any) -> Any:
        base = base_of(type(layer))
        return derived(cls, base) if base in cls.kind.same else cls


class AskewLinear(_OfClass, QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """nn.Linear with a quantized weight. x: (…, in_features) -> (…, out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: QuantConfig | None = None,
                 device: Any = None, dtype: Any = None) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype, config=config)


class PackedLinear(_OfClass, PackedMatrix, nn.Linear):  # type: ignore[misc, override]
    """nn.Linear with a packed weight. x: (…, in_features) -> (…, out_features), in the type of x."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, config: QuantConfig | None = None, *,
                 trits: bool = False, scale_dtype: torch.dtype | None = None, device: Any = None,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._attach((out_features, in_features), bias, config or QuantConfig(), trits, scale_dtype, dtype, device)


class TransposedLinear(nn.Module):
    """y = x W + b with W (nx, nf), as Conv1D of transformers, which gives its arguments their names.
    x: (…, nx) -> (…, nf)."""

    weight: Any
    bias: Any

    def __init__(self, nf: int, nx: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(nf, device=device, dtype=dtype)) if bias else None)
        TransposedLinear.reset_parameters(self)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return _transposed(self, input, self.weight, self.bias)

    __repr__ = nn.Module.__repr__  # Conv1D, of which layers may be instances, too, has one of its own

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, bias={self.bias is not None}"


def conv1d() -> type[nn.Module] | None:
    """transformers' Conv1D where that module has been imported: a model that has such layers has done so."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _transposed(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.t(), bias)


class _ClassOf:
    """In the place of a Conv1D the layers are instances of that, too, for those who ask: peft does."""

    @classmethod
    def class_for(cls, layer: Any) -> Any:
        base = base_of(type(layer))
        return derived(cls, base) if base is conv1d() else cls


class AskewTransposedLinear(_ClassOf, QuantizedLayer, TransposedLinear):  # type: ignore[misc]
    """A linear layer with a quantized weight (nx, nf); per channel, every output has a scale, and groups run along the
    inputs. The weight keeps its shape and gets the memory layout of its transpose."""


class PackedTransposedLinear(_ClassOf, PackedMatrix, TransposedLinear):  # type: ignore[misc, override]
    """A linear layer with a packed weight (nx, nf): the codes are those of the (nf, nx) matrix."""

    def as_linear(self) -> PackedLinear:
        """A ``PackedLinear`` with the same tensors, whose ``weight`` is (nf, nx): what other formats hold."""
        new = PackedLinear(self.nx, self.nf, self.bias is not None, self.config, trits=self.trits, device="meta",
                           scale_dtype=self.weight_scale.dtype, dtype=self.weight_dtype)  # fmt: skip
        new.weight_codes, new.weight_scale, new.bias = self.weight_codes, self.weight_scale, self.bias
        new.activations = self.activations
        return new.train(self.training)


# ---- convolutions ----------------------------------------------------------------------------------------------------

CHANNELS = ("out_channels", "in_channels", "kernel_size")
GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
CHANNELS_TRANSPOSED, GEOMETRY_TRANSPOSED = (CHANNELS[1], CHANNELS[0], CHANNELS[2]), (*GEOMETRY, "output_padding")


def _convolved(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layer._conv_forward(x, weight, bias)


def _each(n: Any, dims: int) -> tuple[int, ...]:
    """A number for each dimension, of one for all as torch's functions take it."""
    if type(n) is tuple and len(n) == dims:
        return n
    return (n,) * dims if isinstance(n, int) else tuple(n) * (dims if len(n) == 1 else 1)


def _sizes(conv: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, stride and dilation, which may have been set since the layer was made."""
    dims = conv.kind.dims - 2
    return _each(conv.kernel_size, dims), _each(conv.stride, dims), _each(conv.dilation, dims)


def _around(conv: Any) -> list[int]:
    """How far the image is padded on both sides of each dimension, the last one first: as torch's own forward looks,
    from ``padding`` as it stands, but where the mode is another than zeros."""
    if conv.padding_mode != "zeros":
        return conv._reversed_padding_repeated_twice
    if conv.padding == "same":
        kernel, _, dilation = _sizes(conv)
        sums = [gap * (k - 1) for k, gap in zip(kernel[::-1], dilation[::-1], strict=True)]
        return [n for total in sums for n in (total // 2, total - total // 2)]
    padding = 0 if conv.padding == "valid" else conv.padding
    return [n for each in _each(padding, conv.kind.dims - 2)[::-1] for n in (each, each)]


def _geometry(conv: Any, around: Sequence[int]) -> list[int]:
    """What the operators call so; around: zeros left, right, above and below. A signal is a line."""
    kernel, stride, dilation = ((1, *n)[-2:] for n in _sizes(conv))
    return [*kernel, *stride, *dilation, around[2], around[0], around[3], around[1]]


def _padded(x: Tensor, around: Sequence[int], mode: str) -> Tensor:
    return functional.pad(x, around, mode).to(x.dtype)  # autocast makes some modes float32


class _InItsPlace(torch.autograd.Function):
    """The product of rounded inputs, with the gradient of that of float ones."""

    @staticmethod
    def forward(ctx: Any, floats: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()  # no view, into which an activation in place could not write

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _PackedConvolution(PackedLayer):
    """Groups, stride, dilation, padding and all padding modes.

    On a CPU, without groups and in one or two dimensions, the product is made from the codes for few output positions
    (late layers, small batches; more where pixels are rows as they stand: 1 x 1, channels last), for any number with
    ``activations="int8"`` (``runtime.convolves_from_codes``): each output position is a row of x, its patch. Where
    patches are rounded to int8 they are read from the image as they are multiplied; else no more than ``PATCHES``
    numbers of them stand in memory.
    Elsewhere the weight is unpacked for the call, with the very results of the hard-quantized layer; that of short
    filters in groups stays unpacked (``unpacked``), and a filter for each channel is multiplied by a kernel of this
    package, in float32, where images are float32 and channels last.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unpacked = Unpacked()

    @property
    def unpacked_bytes(self) -> int:
        """Memory of short filters that stay unpacked; 0 before the first call."""
        return self._unpacked.bytes

    def forward(self, input: Tensor) -> Tensor:  # the name that torch's layers have
        x, conv = input, self  # type: Tensor, Any
        if not torch.compiler.is_compiling() and isinstance(call := self._call, ConvolutionCall):
            y = call.product_of(self, x)
            if y is not None:
                return y
        if (type(x) is not Tensor or x.is_nested) and (special := self._special(x)) is not None:
            return special
        x, bias = self._prepared(x)
        if self._rounds(x) and not (self._reads_codes(x, 1) or transformed()):  # x wants a gradient, the float one's
            with torch.no_grad():
                y = self._from_the_codes(x.detach(), None if bias is None else bias.detach())
            floats = conv._conv_forward(x, self._unpacked.of(self, x.dtype), bias)
            return floats if y is None else _InItsPlace.apply(floats, y)
        if (y := self._from_the_codes(x, bias)) is not None:
            return y
        if conv.groups > 1:
            if (y := self._channel_by_channel(x, bias)) is not None:
                return y
        elif not torch.compiler.is_compiling() and self._reads_codes(x, 1) and Call.can_be_made(self, x, bias):
            self._call = UnpackedCall(self, x)
        return conv._conv_forward(x, self._unpacked.of(self, x.dtype), bias)

    def _from_the_codes(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """None where it is made with the unpacked weight."""
        conv: Any = self
        spatial = conv.kind.dims - 2
        unbatched = x.dim() == 1 + spatial
        if not (x.is_cpu and conv.groups == 1 and spatial <= 2 and (unbatched or x.dim() == 2 + spatial)):
            return None
        if not ((reads := self._reads_codes(x, 1)) or self._rounds(x)):
            return None
        batch = x[None] if unbatched else x
        sizes = self._positions(batch)
        # torch's own product says what is wrong otherwise; exported, a look at sizes would be a bound on them
        whole = runtime.exporting() or all(n > 0 for n in sizes)
        positions = batch.shape[0] * math.prod(sizes)
        few = runtime.convolves_from_codes(positions, self.activations, self.rows * self.cols)
        if few and whole and x.shape[-1 - spatial] == conv.in_channels:
            banded = self._banded(batch, bias, torch.compiler.is_compiling()) if reads else None
            y = self._from_codes(batch, bias, *sizes) if banded is None else self._from_bands(batch, bias, *banded)
            return y[0] if unbatched else y
        few = runtime.convolves_from_codes(positions, self.activations, points=True)
        if reads and few and whole and self._pixels(x):
            rows = x.permute(0, 2, 3, 1)
            y = self._product(rows.reshape(-1, self.cols), bias)
            return y.view(*rows.shape[:3], self.rows).permute(0, 3, 1, 2)
        return None

    def _pixels(self, x: Tensor) -> bool:
        """Whether the convolution is a product whose rows are the pixels of ``x`` as they stand."""
        conv: Any = self
        if (
            x.dim() != 4
            or x.shape[1] != conv.in_channels
            or not (1, 1) == _each(conv.kernel_size, 2) == _each(conv.stride, 2)
        ):
            return False
        return not any(_around(conv)) and channels_last(x)

    def _channel_by_channel(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The convolution of float32 images, channels last, with a filter for each channel; None: of another kind, or
        one that torch has to make."""
        conv: Any = self
        if not (conv.in_channels == conv.out_channels == conv.groups and x.is_cpu and x.dtype == torch.float32):
            return None
        if x.dim() != 4 or x.shape[1] != conv.groups or conv.padding_mode != "zeros" or self._records(bias):
            return None
        if not channels_last(x) or not runtime.compiled_for(x):
            return None
        if not (self._reads_codes(x, 1) and all(n > 0 for n in self._positions(x))):
            return None
        compiling = torch.compiler.is_compiling()
        if (compiling and runtime.exporting()) or (taps := self._unpacked.taps(self)) is None:
            return None
        geometry = _geometry(conv, _around(conv))
        if not compiling and Call.can_be_made(self, x, bias):
            self._call = ConvolutionCall(self, x, None, geometry)
        return unrecorded(convolved_by_channel, x, taps, geometry, bias)

    def _positions(self, x: Tensor) -> list[int]:
        """Sizes of the output."""
        conv: Any = self
        around = _around(conv)[::-1]
        padded = [n + a + b for n, a, b in zip(x.shape[2:], around[::2], around[1::2], strict=True)]
        geometry = zip(padded, *_sizes(conv), strict=True)
        return [(n - gap * (k - 1) - 1) // step + 1 for n, k, step, gap in geometry]

    def _from_bands(self, x: Tensor, bias: Tensor | None, bands: Tensor, scale: Tensor) -> Tensor:
        """Patches are rounded to int8 as they are read from the image. A signal of one dimension is a line of one."""
        conv: Any = self
        around = _around(conv)
        as_given = x.dim() == 4
        if conv.padding_mode != "zeros" and any(around):
            x, around, as_given = _padded(x, around, conv.padding_mode), [0] * len(around), False
        if signal := x.dim() == 3:
            x, around = x[:, :, None], [*around, 0, 0]
        geometry, rest = _geometry(conv, around), (*self._bands.read_as(self), self.rows)
        if as_given and not torch.compiler.is_compiling() and Call.can_be_made(self, x, bias):
            self._call = ConvolutionCall(self, x, rest, geometry)
        y = unrecorded(convolved, x, (bands, scale, *rest), geometry, channels_last(x), bias)
        return y[:, :, 0] if signal else y

    def _from_codes(self, x: Tensor, bias: Tensor | None, height: int, width: int = 1) -> Tensor:
        """A signal of one dimension is an image that is one wide."""
        conv: Any = self
        nhwc = x.dim() == 4 and not transformed() and channels_last(x)
        if any(around := _around(conv)):
            x = _padded(x, around, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)
        images, signal = x.shape[0], x.dim() == 3
        x = x[..., None] if signal else x
        kernel, stride, dilation = ((*n, 1)[:2] for n in _sizes(conv))

        def product(part: Tensor, lines: int) -> Tensor:
            patches = functional.unfold(part, kernel, dilation, 0, stride)
            multiplied = self._by_operators if transformed() else self._product
            rows = multiplied(patches.transpose(1, 2).contiguous().reshape(-1, self.cols), bias)
            return rows.reshape(images, lines, width, conv.out_channels)

        if exporting := runtime.exporting() or transformed():
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
        y = y if nhwc and not exporting else y.contiguous()
        return y[..., 0] if signal else y


class _AdapterAsTorchs:
    """peft makes the convolutions of an adapter of the class of the layer that they stand beside: they are torch's."""

    kind: ClassVar[Kind]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if str(sys._getframe(1).f_globals.get("__name__")).startswith("peft."):
            return cls.kind.plain(*args, **kwargs)
        return super().__new__(cls)


class AskewConv1d(_AdapterAsTorchs, QuantizedLayer, nn.Conv1d):  # type: ignore[misc]
    """nn.Conv1d with a quantized weight."""


class PackedConv1d(_AdapterAsTorchs, _PackedConvolution, nn.Conv1d):  # type: ignore[misc, override]
    """nn.Conv1d with a packed weight."""


class AskewConv2d(_AdapterAsTorchs, QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """nn.Conv2d with a quantized weight."""


class PackedConv2d(_AdapterAsTorchs, _PackedConvolution, nn.Conv2d):  # type: ignore[misc, override]
    """nn.Conv2d with a packed weight."""


class AskewConv3d(_AdapterAsTorchs, QuantizedLayer, nn.Conv3d):  # type: ignore[misc]
    """nn.Conv3d with a quantized weight."""


class PackedConv3d(_AdapterAsTorchs, _PackedConvolution, nn.Conv3d):  # type: ignore[misc, override]
    """nn.Conv3d with a packed weight."""


CONV_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


def _conv_transposed(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any = None) -> Tensor:
    given, spatial = (layer.stride, layer.padding, layer.kernel_size), layer.kind.dims - 2
    output_padding = layer._output_padding(x, output_size, *given, spatial, layer.dilation)
    product: Any = CONV_TRANSPOSED[spatial - 1]
    return product(x, weight, bias, layer.stride, layer.padding, output_padding, layer.groups, layer.dilation)


class _AskewConvTranspose(QuantizedLayer):
    """The weight (in_channels, out_channels / groups, …) keeps its shape and gets the memory layout of its matrix; per
    channel, every output has a scale (``Form`` says in what order), and groups run along the inputs."""

    @property
    def form(self) -> Form:  # type: ignore[override]
        return self.kind.form._replace(groups=self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # torch's names
        return super().forward(input, *(() if output_size is None else (output_size,)))


class _PackedConvTranspose(PackedLayer):
    """The codes are those of the matrix that ``Form`` says. The weight is unpacked for the call, with the very results
    of the hard-quantized layer."""

    @property
    def form(self) -> Form:  # type: ignore[override]
        return self.kind.form._replace(groups=self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # torch's names
        x = input
        more = () if output_size is None else (output_size,)
        if (type(x) is not Tensor or x.is_nested) and (special := self._special(x, *more)) is not None:
            return special
        x, bias = self._prepared(x)
        return _conv_transposed(self, x, self.dequantize(x.dtype), bias, output_size)


class AskewConvTranspose1d(_AskewConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """nn.ConvTranspose1d with a quantized weight."""


class PackedConvTranspose1d(_PackedConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc, override]
    """nn.ConvTranspose1d with a packed weight."""


class AskewConvTranspose2d(_AskewConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """nn.ConvTranspose2d with a quantized weight."""


class PackedConvTranspose2d(_PackedConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc, override]
    """nn.ConvTranspose2d with a packed weight."""


class AskewConvTranspose3d(_AskewConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """nn.ConvTranspose3d with a quantized weight."""


class PackedConvTranspose3d(_PackedConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc, override]
    """nn.ConvTranspose3d with a packed weight."""


# ---- embeddings ------------------------------------------------------------------------------------------------------


def _looked_up(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.embedding(x, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)


class _Lookup:
    """Refuses what writes into the weight that is read, and gradients that no update pass takes. In the place of a
    class derived from nn.Embedding it is one of its instances, too."""

    kind: ClassVar[Kind]

    @classmethod
    def class_for(cls, layer: Any) -> Any:
        base = base_of(type(layer))
        return derived(cls, base, over=True) if cls.kind.wraps(base) else cls

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
        if transformed() or (not runtime.exporting() and x.numel() > len(codes)):  # vmap sees no codes
            return functional.embedding(x, self.dequantize())
        rows = x.reshape(-1)
        if scale.numel() > 1:
            scale = scale.reshape(len(codes), -1).index_select(0, rows)
        y = ops.packed_dequantize(codes.index_select(0, rows), scale, grid, self.bits, self.cols, self.weight_dtype)
        return y.reshape(*x.shape, self.cols)


# ---- experts ---------------------------------------------------------------------------------------------------------

EXPERT_SIZES = ("num_experts", "height", "width")


def _of_holder(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layer.forward(x)  # which says that the module that holds the weight has the product


# ---- the table -------------------------------------------------------------------------------------------------------

#: Name -> the kind of layer: its classes, and how its weight is laid out.
KINDS: dict[str, Kind] = {kind.name: kind for kind in (
    Kind("linear", "linear", nn.Linear, AskewLinear, PackedLinear, ("out_features", "in_features"), (), geometry=(),
         dims=2, output=0, token_dims=1, product=lambda layer, x, weight, bias: functional.linear(x, weight, bias),
         multiplies_levels=True, same=(OUT_PROJECTION,)),
    Kind("transposed_linear", "linear", TransposedLinear, AskewTransposedLinear, PackedTransposedLinear, ("nx", "nf"),
         (), geometry=(), dims=2, output=1, token_dims=1, product=_transposed, form=Form(transposed=True),
         foreign=conv1d, multiplies_levels=True),
    Kind("conv1d", "conv", nn.Conv1d, AskewConv1d, PackedConv1d, CHANNELS, GEOMETRY, GEOMETRY,
         dims=3, output=0, token_dims=2, product=_convolved),
    Kind("conv2d", "conv", nn.Conv2d, AskewConv2d, PackedConv2d, CHANNELS, GEOMETRY, GEOMETRY,
         dims=4, output=0, token_dims=3, product=_convolved),
    Kind("conv3d", "conv", nn.Conv3d, AskewConv3d, PackedConv3d, CHANNELS, GEOMETRY, GEOMETRY,
         dims=5, output=0, token_dims=4, product=_convolved),
    *(Kind(f"conv_transpose{n}d", "conv", *classes, CHANNELS_TRANSPOSED, GEOMETRY_TRANSPOSED, GEOMETRY_TRANSPOSED,
           dims=n + 2, output=1, token_dims=n + 1, product=_conv_transposed, form=Form(transposed=True), scatters=True)
      for n, classes in enumerate(((nn.ConvTranspose1d, AskewConvTranspose1d, PackedConvTranspose1d),
                                   (nn.ConvTranspose2d, AskewConvTranspose2d, PackedConvTranspose2d),
                                   (nn.ConvTranspose3d, AskewConvTranspose3d, PackedConvTranspose3d)), 1)),
    Kind("embedding", "embedding", nn.Embedding, AskewEmbedding, PackedEmbedding, ("num_embeddings", "embedding_dim"),
         ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"), geometry=(),
         dims=2, output=None, token_dims=0, product=_looked_up, wrapping=("*ScaledWordEmbedding",)),
    Kind("in_projection", "attention", InProjection, AskewInProjection, PackedInProjection,
         ("out_features", "in_features"), (), geometry=(), dims=2, output=0, token_dims=1, product=projected, held=True,
         multiplies_levels=True),
    Kind("experts", "experts", ExpertWeight, AskewExperts, PackedExperts, EXPERT_SIZES, (), geometry=(),
         dims=3, output=None, token_dims=0, product=_of_holder, form=Form(stacked=True), held=True),
    Kind("transposed_experts", "experts", TransposedExpertWeight, AskewTransposedExperts, PackedTransposedExperts,
         EXPERT_SIZES, (), geometry=(), dims=3, output=None, token_dims=0, product=_of_holder,
         form=Form(transposed=True, stacked=True), held=True),
)}  # fmt: skip
for _kind in KINDS.values():
    _kind.quantized.kind = _kind.packed.kind = _kind
    if "groups" not in _kind.geometry or not _kind.form.transposed:  # of others each layer has its own
        _kind.quantized.form = _kind.packed.form = _kind.form

SEARCHED = ("linear", "conv")  # what a search of bits is about where nothing is said: layers that make the products
DEFAULT = (*SEARCHED, "attention", "experts")  # what quantize_ replaces where nothing is said


def chosen(names: str | Iterable[str]) -> list[Kind]:
    """The kinds of these names or groups of names. Raises ValueError with the names that there are."""
    asked = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    known = {name for kind in KINDS.values() for name in (kind.name, kind.group)}
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"kinds: expected names out of {', '.join(sorted(known))}, got {got}")
    return [kind for kind in KINDS.values() if kind.name in asked or kind.group in asked]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer, be it float, quantized, packed, or of a class derived from these."""
    if isinstance(module, (QuantizedLayer, PackedLayer)):
        return module.kind
    return next((kind for kind in KINDS.values() if isinstance(module, kind.classes)), None)


def own_keys(cls: type[nn.Module]) -> frozenset[str]:
    """Keys that every layer of this class has in a state_dict; what else stands under its name was hung on it."""
    bases: Any = ((kind, base) for kind in KINDS.values() for base in (kind.quantized, kind.packed, *kind.classes))
    kind, base = next((kind, base) for kind, base in bases if issubclass(cls, base))
    return _keys(kind, base if issubclass(base, (QuantizedLayer, PackedLayer)) else kind.plain)


@functools.cache
def _keys(kind: Any, base: Any) -> frozenset[str]:
    layer = kind.of_shape((1,) * kind.dims, True, base)
    return frozenset((*layer.state_dict(), *layer._parameters)) - {n for n, p in layer._parameters.items() if p is None}


def replaceable(module: nn.Module) -> Kind | None:
    """The kind of a layer of torch's own or of a quantized one, None for subclasses, whose forward may differ; a
    parametrized layer counts as what it was."""
    cls: Any = type(module)
    if "parametrizations" in module._modules:
        cls = cls.__bases__[0]
    cls = mixin_of(cls)
    return next((k for k in KINDS.values() if cls in (*k.classes, *k.same, k.quantized) or k.wraps(cls)), None)
