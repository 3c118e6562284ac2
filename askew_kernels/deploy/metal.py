"""The folder of transformers' method "metal" (Apple's GPUs, layout of MLX), with the levels that were trained.

Of a layer ``weight`` (uint32), ``scales`` and ``qbiases`` (n, groups) stand in the file: weight = code · scale + qbias
with code = level + 2^(bits-1), of 2, 4 or 8 bits, and qbias = -2^(bits-1) · scale. Where no such GPU is there
transformers unpacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..nn.kinds import KINDS
from ..nn.packed import PackedLayer
from ..quant import QuantConfig, Uniform
from . import folders
from .compressed_tensors import words
from .contents import Contents
from .files import PackedFileError
from .integers import kept_scale, table

METHOD = "metal"
BITS = (2, 4, 8)
GROUPS = (128, 64, 32)  # that the kernels take
HOLDER = "folders for Apple's GPUs"


@torch.no_grad()
def export(contents: Contents, path: str | os.PathLike, *, architecture: str | None = None,
           dense: Iterable[str] = ()) -> None:  # fmt: skip
    """The folder ``path``: ``model.safetensors``, ``config.json`` and what lay beside the model. No package is needed.

    Linear layers of integer levels from -128 to 127 fit, all in the bits of the widest and with one group size out of
    128, 64, 32, which divides every row and group; scales that bfloat16 or float16 holds. Raises PackedFileError naming
    the layer.
    """
    path, (layers, tensors) = Path(path), folders.dense_apart(contents, dense)
    widths: dict[str, int] = {}
    for name, layer in layers.items():
        try:
            widths[name] = _bits(layer)
        except ValueError as error:
            raise contents.error(name, error) from None
    bits, size = max(widths.values(), default=4), _common_group(contents, layers)
    for name, layer in layers.items():
        try:
            tensors |= {f"{name}.{part}": t for part, t in _parts(layer, bits, size).items()}
        except ValueError as error:
            raise contents.error(name, error) from None
    skipped = folders.not_converted(tensors, layers)
    told = {"quant_method": METHOD, "bits": bits, "group_size": size, "modules_to_not_convert": skipped}
    changes = folders.settle_ties(contents, layers, tensors)
    path.mkdir()
    folders.write_tensors(path, tensors, contents.extra)
    folders.write_config(contents, path, architecture, told, **changes)


def _bits(layer: PackedLayer) -> int:
    """The narrowest that holds the layer. Raises ValueError where there is none."""
    if layer.kind.name != "linear":
        raise ValueError(f"{HOLDER} hold linear layers, got {layer.kind.name}; name it in dense= to write it as floats")
    (low, *_, high), _ = table(layer, HOLDER)
    bits = next((k for k in BITS if -(2 ** (k - 1)) <= low and high < 2 ** (k - 1)), None)
    if bits is None:
        raise ValueError(f"{HOLDER} hold levels from -128 to 127, got {layer.config.weight}")
    return bits


def _common_group(contents: Contents, layers: dict[str, PackedLayer]) -> int:
    """The largest group size that serves every layer; PackedFileError naming the first that none serves with."""
    left = list(GROUPS)
    for name, layer in layers.items():
        whole = layer.config.group_size or layer.cols
        if not (fitting := [size for size in left if whole % size == 0]):
            raise contents.error(name, f"group_size: {HOLDER} have one of {', '.join(map(str, left))} for all layers, "
                                       f"got {layer.cols} columns in groups of {whole}; name it in dense= to write "
                                       "it as floats")  # fmt: skip
        left = fitting
    return left[0]


def _parts(layer: PackedLayer, bits: int, size: int) -> dict[str, Tensor]:
    """Raises ValueError where code · scale + qbias is not the weight to the bit."""
    n, factor = layer.shape[0], table(layer, HOLDER)[1]
    scale = (layer.weight_scale.detach().float() * factor).to(layer.weight_dtype)
    scale = scale.reshape(-1, layer.cols // (layer.config.group_size or layer.cols)).expand(n, -1)
    scale = scale.repeat_interleave(layer.cols // size // scale.shape[1], 1)
    codes, bias = words(layer, bits), scale * -float(2 ** (bits - 1))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    levels = (codes[..., None] >> shifts & 2**bits - 1).reshape(n, -1, size).float()
    made = (levels * scale.float()[..., None] + bias.float()[..., None]).reshape(layer.shape)
    if not torch.equal(made.to(layer.weight_dtype), layer.dequantize()):
        raise ValueError("weight_scale: code · scale + qbias is rounded with these scales; train with "
                         'for_export("metal:4") or scale_dtype="bfloat16"')  # fmt: skip
    return {"weight": codes.view(torch.uint32), "scales": scale.contiguous(), "qbiases": bias.contiguous()}


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_one(path: str | os.PathLike) -> bool:
    return folders.quantization_of(path, METHOD)


def _opened(path: str | os.PathLike) -> tuple[dict[str, Any], int, int, dict[str, Tensor], list[str]]:
    """(config, bits, group size, tensors, names of layers), of sizes that fit each other. Raises PackedFileError."""
    config = folders.read_json(Path(path) / folders.CONFIG)
    told = config.pop(folders.QUANTIZATION, None)
    if not isinstance(told, dict) or told.get("quant_method") != METHOD:
        raise PackedFileError(f"{path}: config.json names no quant_method {METHOD!r}")
    bits, size, tensors = told.get("bits"), told.get("group_size"), folders.read_tensors(Path(path))
    if type(bits) is not int or bits not in BITS or type(size) is not int or size < 1:
        raise PackedFileError(f"{path}: expected bits of {BITS} and a group_size, got {bits!r:.80} and {size!r:.80}")
    names = [key.removesuffix(".scales") for key in tensors if key.endswith(".scales")]
    for name in names:
        codes, scales, biases = (tensors.get(f"{name}.{part}") for part in ("weight", "scales", "qbiases"))
        if codes is None or scales is None or biases is None or codes.dtype != torch.uint32 or codes.dim() != 2:
            raise PackedFileError(f"{path}: {name}: expected a uint32 matrix weight, with scales and qbiases")
        cols = codes.shape[1] * 32 // bits
        wanted = (codes.shape[0], cols // size)
        if cols % size or not scales.shape == biases.shape == wanted or scales.dtype != biases.dtype:
            raise PackedFileError(f"{path}: {name}: scales: expected {wanted} for {cols} columns of {bits} bits, got "
                                  f"{tuple(scales.shape)} and {tuple(biases.shape)}")  # fmt: skip
    return config, bits, size, tensors, names


def read(path: str | os.PathLike) -> Contents:
    """A folder whose levels are symmetric (qbias = -2^(bits-1) · scale) as packed layers of Uniform(bits). Raises
    PackedFileError naming the layer, FileNotFoundError."""
    config, bits, size, tensors, names = _opened(path)
    layers = {}
    kind = KINDS["linear"]
    for name in names:
        codes, scales, biases = (tensors.pop(f"{name}.{part}") for part in ("weight", "scales", "qbiases"))
        try:
            kept = kept_scale(scales)
        except ValueError as error:
            raise PackedFileError(f"{path}: {name}: scales: {error}") from None
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise PackedFileError(f"{path}: {name}: scales: expected positive finite numbers")
        if not torch.equal(scales * -float(2 ** (bits - 1)), biases):
            raise PackedFileError(f"{path}: {name}: qbiases: a packed layer has levels from -{2 ** (bits - 1)} on, so "
                                  f"-{2 ** (bits - 1)} times the scales; got others")  # fmt: skip
        shape = (codes.shape[0], codes.shape[1] * 32 // bits)
        options = {"scale_dtype": kept.dtype, "dtype": scales.dtype}
        told = QuantConfig(Uniform(bits), "absmax", "per_group", size)
        layer = layers[name] = kind.packed.like(kind.of_shape(shape, False), config=told, **options)
        layer.bias, layer.weight_scale = None, kept.reshape(-1)
        layer.weight_codes = codes.contiguous().view(torch.uint8)
    architecture, folder = config if "model_type" in config else None, Path(path)
    return Contents(str(path), layers, tensors, folders.read_extra(folder), architecture, folder)


def dequantized(path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """As transformers unpacks it; ImportError without it."""
    try:
        import transformers
        from transformers.integrations.metal_quantization import MetalDequantize
    except ImportError:
        raise ImportError('reading with transformers needs it: pip install "askew_kernels[transformers]"') from None
    _, bits, size, tensors, names = _opened(path)
    weights = folders.float_weights(tensors)
    unpack = MetalDequantize(SimpleNamespace(quantization_config=SimpleNamespace(bits=bits, group_size=size)))
    for name in names:
        parts = {part: [tensors[f"{name}.{part}"]] for part in ("weight", "scales", "qbiases")}
        weights |= unpack.convert(parts, full_layer_name=name)
    return weights, f"transformers {transformers.__version__}"
