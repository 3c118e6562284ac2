"""Packed layers as torchao's tensors: the same integers and scales, in the layouts of its kernels; and its files."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import unpack_codes
from ..nn.kinds import KINDS, PackedConv2d, PackedEmbedding, PackedLinear, PackedTransposedLinear
from ..nn.packed import PackedLayer
from ..nn.replace import replace_modules, successors
from ..quant import QuantConfig, Uniform
from ..quant.packing import SCALE_TYPES
from . import files, tensorfile
from .contents import Contents
from .folders import dense_apart, float_key, float_weights
from .integers import Integers, integers, packed_layer

LAYERS = (PackedLinear, PackedTransposedLinear, PackedEmbedding, PackedConv2d)
HOLDER = "torchao's tensors"
INPUTS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}  # as torchao writes what ``to_torchao`` makes
KEY = "askew_kernels_layers"  # of the metadata of a file: {name: description}, JSON


def _library() -> Any:
    try:
        from torchao.quantization.quantize_ import workflows
    except ImportError as error:
        raise ImportError(
            f'torchao is needed (tested with 0.18): pip install "askew_kernels[torchao]" ({error})'
        ) from None
    return workflows


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _intx(layer: Any, held: Integers) -> Tensor:
    levels, scale, low, high = held
    width = next((b for b in range(1, 9) if -(2 ** (b - 1)) <= low and high < 2 ** (b - 1)), 8)
    zero = -128 if high > 127 else 0  # unsigned levels of 8 bits; weight = (q - zero_point) s
    (n, cols), (rows, groups), ones = levels.shape, scale.shape, (1,) * (len(layer.shape) - 2)
    if ones and groups > 1:
        raise ValueError(f"intx: expected one scale for the tensor or each channel of {layer.kind.name}, got groups")
    block = (n // rows, cols // groups) if not ones else (n // rows, *layer.shape[1:])
    scale = scale.reshape(rows, groups, *ones)
    points = torch.full(scale.shape, zero, dtype=torch.int8, device=scale.device)
    return _library().IntxUnpackedToInt8Tensor(
        qdata=(levels + zero).to(torch.int8).reshape(layer.shape),
        scale=scale,
        zero_point=points,
        target_dtype=getattr(torch, f"int{width}"),
        block_size=block,
        dtype=layer.weight_dtype,
        activation_quantization=None,
    )


def _int8(layer: Any, held: Integers) -> Tensor:
    levels, scale, _, high = held
    if not isinstance(layer, PackedLinear) or high > 127 or scale.shape[1] > 1:
        got = f"{layer.kind.name}, {layer.config.weight}, {layer.config.granularity}"
        raise ValueError("int8: expected a linear layer of levels from -128 to 127 with one scale for the tensor or "
                         f"each channel, got {got}")  # fmt: skip
    inputs, kwargs = layer.kind.input_grid(layer), None
    if inputs is not None:
        from torchao.quantization import PerRow

        kwargs = _library().QuantizeTensorToInt8Kwargs(PerRow())
    n, cols = levels.shape
    return _library().Int8Tensor(
        qdata=levels.to(torch.int8),
        scale=scale.float(),
        block_size=[n // len(scale), cols],
        dtype=layer.weight_dtype,
        act_quant_kwargs=kwargs,
    )


def _int4(layer: Any, held: Integers) -> Tensor:
    levels, scale, low, high = held
    n, cols = levels.shape
    rows, groups = scale.shape
    if not isinstance(layer, PackedLinear) or high - low > 15 or rows != n:
        raise ValueError("int4: expected at most 16 consecutive integers and scales by channel or group, got "
                         f"{layer.config.weight}, {layer.config.granularity}")  # fmt: skip
    if not torch.equal(scale.bfloat16().float(), scale.float()):
        raise ValueError("int4: bfloat16 does not hold the scales; pack with scale_dtype=torch.bfloat16")
    if cols % 2:
        raise ValueError(f"int4: expected an even number of columns, got {cols}")
    offset = 8 if low < -8 or high > 7 else 0  # weight = q s + zero_point
    nibbles = (levels - offset).to(torch.int8)
    data = (nibbles[:, 0::2] & 15) | (nibbles[:, 1::2] << 4)
    scales = scale.bfloat16().t().contiguous()
    return _library().Int4Tensor(data.contiguous(), scales, scales * offset, [1, cols // groups], torch.Size((n, cols)))


MAKERS: dict[str, Callable[[Any, Integers], Tensor]] = {"intx": _intx, "int4": _int4, "int8": _int8}
FORMATS = tuple(MAKERS)


@torch.no_grad()
def to_torchao(layer: PackedLayer, format: str | None = None) -> Tensor:
    """The packed weight as a tensor of torchao's, of a linear layer (outputs, inputs). format: None (``"int8"`` where
    the layer's inputs are quantized, else ``"intx"``), or

    ===========  =====================================================================================================
    ``"intx"``   IntxUnpackedToInt8Tensor: every grid of integer levels, in the narrowest torch.int1 … int8 that holds
                 them; linear layers and embeddings of any granularity, two-dimensional convolutions without groups of
                 scales. For ``torch.export`` and torchao's CPU and mobile layouts.
    ``"int8"``   Int8Tensor: linear layers of signed levels, one scale for the tensor or each channel. Where the layer
                 quantizes its inputs to 8 signed bits (``QuantConfig(activation=Uniform(8))``) torchao does, too, with
                 integer products: but to steps of max|x| / 127.5, of which the largest clips, in the place of
                 max|x| / 127. Each input is within half a step of x in both, so |y - y'| <= max|x| / 127 sum|w|.
    ``"int4"``   Int4Tensor, for torchao's CUDA product in bfloat16: grids of at most 16 consecutive integers, groups or
                 channels, and scales that bfloat16 holds (``pack_(…, scale_dtype=torch.bfloat16)``)
    ===========  =====================================================================================================

    ``dequantize()`` of the first two gives the trained weight bit for bit, which is checked. Raises TypeError for
    another layer, ValueError where the type, the grid, the granularity, the scales or the inputs' grid do not allow it,
    ImportError without torchao.
    """
    if not isinstance(layer, LAYERS):
        names = ", ".join(cls.__name__ for cls in LAYERS)
        raise TypeError(f"layer: expected one of {names}, got {type(layer).__name__}")
    if format is not None and format not in MAKERS:
        raise ValueError(f"format: expected one of {', '.join(MAKERS)}, got {format!r}")
    _library()
    if layer.weight_dtype not in SCALE_TYPES:
        kept = str(layer.weight_dtype).removeprefix("torch.")
        raise ValueError(
            f"weight_dtype: {HOLDER} are float32, bfloat16 or float16, got {kept}; call model.float() first"
        )
    layer = _as_linear(layer)
    inputs = layer.kind.input_grid(layer)
    format = format or ("intx" if inputs is None else "int8")
    if format == "int8" and inputs not in (None, Uniform(8), Uniform(8, narrow=True)):
        raise ValueError(f"int8: torchao quantizes inputs to 8 signed bits, got activation={inputs}")
    made = MAKERS[format](layer, integers(layer, HOLDER, inputs=format == "int8"))
    if format != "int4" and not torch.equal(made.dequantize(), layer.dequantize()):  # type: ignore[operator]
        raise ValueError(
            f"{format}: torchao gives other weights in {layer.weight_dtype}; this is a limit of its rounding"
        )
    return made


def _as_linear(layer: Any) -> Any:
    return layer.as_linear() if isinstance(layer, PackedTransposedLinear) else layer


def to_torchao_(model: nn.Module, format: str | None = None) -> nn.Module:
    """Replaces every PackedLinear, PackedEmbedding and PackedConv2d of ``model``, in place, by torch's own layer with
    ``to_torchao``'s tensor as its weight, one for all layers that share theirs.

    Raises as that, naming the layer, before anything is replaced; ValueError for a model without such layers.
    """
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LAYERS)}
    if not layers:
        raise ValueError("model: has no PackedLinear, PackedEmbedding or PackedConv2d; call pack_(model) first")

    weights: dict[Any, nn.Parameter] = {}  # what is one in memory stays one

    def make(name: str, layer: Any) -> nn.Module:
        held = id(layer.weight_codes), id(layer.weight_scale), layer.weight_dtype, layer.shape
        key = *held, layer.form.transposed, layer.kind.input_grid(layer)
        linear = _as_linear(layer)
        if key not in weights:
            weights[key] = nn.Parameter(to_torchao(linear, format), requires_grad=False)
        return linear.kind.float_layer(linear, weights[key])

    replace_modules(model, successors(layers, make, "to_torchao(layer)"))
    return model


# ---- files -----------------------------------------------------------------------------------------------------------


def _support() -> Any:
    _library()
    try:
        from torchao.prototype.safetensors import safetensors_support
    except ImportError as error:
        raise ImportError(f"torchao's support of safetensors is not there (tested with 0.18): {error}") from None
    return safetensors_support


@torch.no_grad()
def export(contents: Contents, path: str | os.PathLike, *, architecture: str | None = None, dense: Iterable[str] = (),
           format: str | None = None) -> None:  # fmt: skip
    """Writes one safetensors file as torchao's ``flatten_tensor_state_dict`` lays it out, which its
    ``unflatten_tensor_state_dict`` and transformers read; names are those of the state_dict. format: as ``to_torchao``.

    Layers whose names match a pattern in ``dense`` are floats. Raises PackedFileError naming the layer that no tensor
    of torchao's holds; ImportError without torchao.
    """
    support, descriptions = _support(), {}
    layers, tensors = dense_apart(contents, dense)
    for name, layer in layers.items():
        try:
            if layer.form.transposed:
                raise ValueError(f"torchao multiplies by weights (outputs, inputs), got a {layer.kind.name} layer")
            tensors[float_key(name, layer)] = to_torchao(layer, format)
            descriptions[name] = layer.description()
        except (TypeError, ValueError) as error:
            raise contents.error(name, f"{error}; name it in dense= to write it as floats") from None
    if odd := [name for name in tensors if "." not in name]:
        raise contents.error(odd[0], "torchao's files hold tensors of modules, with a dot in their name")
    plain = {name: t.detach() if type(t) is nn.Parameter else t for name, t in tensors.items()}
    flat, metadata = support.flatten_tensor_state_dict(plain)
    clash = next((name for name in flat if name in plain and type(plain[name]) is not Tensor), None)
    if clash or len(flat) < len(plain):
        raise contents.error(clash or "tensors", "another tensor of the file would have its name")
    for name, t in flat.items():
        if why := tensorfile.not_storable(t):
            raise contents.error(name, why)
    metadata |= files.metadata_with({"format": "pt", KEY: json.dumps(descriptions)}, contents.extra)
    tensorfile.write(path, flat, metadata, "", lambda sums: "")


def _metadata(path: str | os.PathLike) -> dict[str, Any] | None:
    """What torchao says of each tensor of a file; None for a file of others."""
    with contextlib.suppress(files.PackedFileError, OSError, ValueError, TypeError, KeyError, RecursionError):
        metadata = files.read_safetensors(path, mmap=True).metadata
        names = json.loads(metadata["tensor_names"])
        said = {name: json.loads(metadata[name]) for name in names}
        if said and all(isinstance(s, dict) and isinstance(s.get("_type"), str) for s in said.values()):
            return said
    return None


def is_one(path: str | os.PathLike) -> bool:
    """Whether a safetensors file says of its tensors what torchao's do."""
    return _metadata(path) is not None


def _integers_of(
    kind: str, said: dict[str, Any], parts: dict[str, Tensor]
) -> tuple[Tensor, Tensor, int | None, int, int]:
    """(levels (n, cols), scale (n or 1, groups), block, the least and the largest integer that can stand there)."""
    data, scale, block = parts["qdata"], parts["scale"], said["block_size"]
    if kind == "Int4Tensor":
        codes = unpack_codes(data.view(torch.uint8), 4, 2 * data.shape[1]).to(torch.int16)
        levels, scale, low, high = (codes ^ 8) - 8, scale.t(), -8, 7
        points = parts["zero_point"].t()
        zero = torch.where(scale == 0, torch.zeros_like(scale), -points.float() / scale.float()).round()
        if not torch.equal(-zero * scale.float(), points.float()):
            raise ValueError("its zero points are no multiples of the scales")
    else:
        bits = int(said["target_dtype"]["_data"].removeprefix("int")) if kind == "IntxUnpackedToInt8Tensor" else 8
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        levels, zero = data.reshape(len(data), -1).to(torch.int16), parts.get("zero_point", torch.zeros(1))
        scale = scale.reshape(len(scale), -1)
    n, cols = levels.shape
    across = block[1] if len(block) == 2 else math.prod(block[1:])
    if scale.shape[0] not in (1, n) or across < 1 or scale.shape[1] != -(-cols // across) or not levels.numel():
        raise ValueError(f"scales {list(scale.shape)} for {n} x {cols} weights in blocks of {block}")
    if not bool((zero == zero.flatten()[0]).all()):
        raise ValueError("its zero points differ, a grid has the same levels for every weight")
    offset = int(zero.flatten()[0])
    return levels - offset, scale, across, low - offset, high - offset


def _packed(name: str, said: dict[str, Any], parts: dict[str, Tensor], described: dict[str, Any] | None) -> PackedLayer:
    kind, told = said["_type"], said["_data"]
    levels, scale, block, low, high = _integers_of(kind, told, parts)
    if described is not None:
        config: Any = QuantConfig.from_dict(described["config"])
        return packed_layer(KINDS[described["kind"]], tuple(described["shape"]), levels, scale, config, block=block,
                            geometry=described.get("geometry"), trits=bool(described["trits"]),
                            dtype=_dtype(described["dtype"]))  # fmt: skip
    shape = tuple(levels.shape) if kind == "Int4Tensor" else tuple(parts["qdata"].shape)
    dtype = torch.bfloat16 if kind == "Int4Tensor" else _dtype(told["dtype"]["_data"])
    where = next(k for k in KINDS.values() if k.dims == len(shape))
    inputs = told.get("act_quant_kwargs") or told.get("activation_quantization")
    if inputs not in (None, INPUTS) or parts.keys() - {"qdata", "scale", "zero_point"}:
        raise ValueError(f"inputs quantized as {inputs or sorted(parts)}, which no grid here does")
    new = packed_layer(where, shape, levels, scale, (low, high), block=block, dtype=dtype)
    new.config = replace(new.config, activation=None if inputs is None else Uniform(8))
    return new


def _dtype(name: Any) -> torch.dtype:
    if name not in files.FLOATS:
        raise ValueError(f"expected a float type, got {name!r:.80}")
    return getattr(torch, name)


@torch.no_grad()
def read(path: str | os.PathLike) -> Contents:
    """What a file of torchao's tensors holds: IntxUnpackedToInt8Tensor, Int8Tensor and Int4Tensor become packed layers;
    of a file of others those of two dimensions linear ones. Raises PackedFileError naming the layer, FileNotFoundError.
    """
    file = files.read_safetensors(path)
    said = _metadata(path)
    if said is None:
        raise files.PackedFileError(f"{path}: not a file of torchao's tensors")
    tensors, layers = dict(file.tensors), {}
    try:
        described = json.loads(file.metadata.get(KEY, "{}"))
        described = described if isinstance(described, dict) else {}
    except (ValueError, RecursionError) as error:
        raise files.PackedFileError(f"{path}: damaged metadata {KEY} ({error})") from None
    for key, of in said.items():
        if of["_type"] == "Tensor":
            continue
        name, _, last = key.rpartition(".")
        try:
            if of["_type"] not in ("IntxUnpackedToInt8Tensor", "Int8Tensor", "Int4Tensor") or last != "weight":
                raise ValueError(f"a {of['_type']} is not read")
            parts = {part: tensors.pop(f"{name}._weight_{part}") for part in of["_tensor_data_names"]}
            layers[name] = _packed(name, of, parts, described.get(name))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, OverflowError) as error:
            raise files.PackedFileError(f"{path}: {name}: {error}") from None
    return Contents(str(path), layers, tensors, files.extra_of(file.metadata, path), None, Path(path).parent)


def dequantized(path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """({name of a layer: its weight}, who says so): torchao's tensors, dequantized by themselves."""
    support = _support()
    from torchao import __version__

    file = files.read_safetensors(path)
    state, _ = support.unflatten_tensor_state_dict(file.tensors, file.metadata)
    weights = float_weights({key: t for key, t in state.items() if type(t) is Tensor})
    weights |= {key.removesuffix(".weight"): t.dequantize() for key, t in state.items() if type(t) is not Tensor}
    return weights, f"torchao {__version__}"
