"""The folder of transformers' method "bitnet": ternary weights with one scale for the tensor, and inputs of 8 bits.

Of a layer ``weight`` (uint8) and ``weight_scale`` (1,) stand in the file: bits 2 i and 2 i + 1 of byte (r, c) are
level + 1 of row i n / 4 + r, i = 0 … 3. weight = level · scale. transformers rounds the inputs to 8 bits, token by
token, with a scale of its own, 127 / max|x|.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contract import unpack_codes
from ..nn.kinds import KINDS
from ..nn.packed import PackedLayer
from ..quant import QuantConfig, Ternary, Uniform
from ..quant.packing import pack_codes
from ..quant.scales import holds_scales
from . import folders
from .contents import Contents
from .files import PackedFileError
from .integers import kept_scale

METHOD = "bitnet"
ROWS = 4  # of a byte
HOLDER = "folders of bitnet"
INPUTS = (Uniform(8), Uniform(8, narrow=True))
TRAINED = 'QuantConfig(Ternary(), granularity="per_tensor", activation=Uniform(8))'
FIXED = {"linear_class": "autobitlinear", "quantization_mode": "offline", "use_rms_norm": False}


@torch.no_grad()
def export(contents: Contents, path: str | os.PathLike, *, architecture: str | None = None,
           dense: Iterable[str] = ()) -> None:  # fmt: skip
    """The folder ``path``: ``model.safetensors``, ``config.json`` and what lay beside the model. No package is needed.

    Linear layers without a bias (transformers would scale it) and with a multiple of 4 outputs fit, ternary with one
    scale for the tensor that the model's type holds, and inputs of Uniform(8). Raises PackedFileError naming the layer.
    """
    path, (layers, tensors) = Path(path), folders.dense_apart(contents, dense)
    for name, layer in layers.items():
        try:
            if f"{name}.bias" in tensors:
                raise ValueError(f"bias: {HOLDER} have none; name the layer in dense= to write it as floats")
            tensors |= {f"{name}.{part}": t for part, t in _parts(layer).items()}
        except ValueError as error:
            raise contents.error(name, error) from None
    told = {"quant_method": METHOD, "modules_to_not_convert": folders.not_converted(tensors, layers), **FIXED}
    changes = folders.settle_ties(contents, layers, tensors)
    path.mkdir()
    folders.write_tensors(path, tensors, contents.extra)
    folders.write_config(contents, path, architecture, told, **changes)


def _parts(layer: PackedLayer) -> dict[str, Tensor]:
    """Raises ValueError where the layer does not fit."""
    config, n = layer.config, layer.shape[0]
    fits = layer.kind.name == "linear" and tuple(config.weight.levels) == (-1.0, 0.0, 1.0)
    if not fits or layer.weight_scale.numel() != 1 or config.activation not in INPUTS:
        raise ValueError(f"{HOLDER} hold linear layers trained with {TRAINED}, got {layer.kind.name}, {config.weight}, "
                         f"{config.granularity}, activation={config.activation}; name it in dense= to write it as "
                         "floats")  # fmt: skip
    if n % ROWS:
        raise ValueError(f"out_features: expected a multiple of {ROWS}, got {n}")
    kept = str(layer.weight_dtype).removeprefix("torch.")
    if layer.weight_dtype in (torch.bfloat16, torch.float16) and not holds_scales(layer.weight_scale, kept):
        raise ValueError(f'weight_scale: {kept} does not hold it; train with scale_dtype="{kept}"')
    codes = unpack_codes(layer.weight_codes, layer.bits, layer.cols).reshape(ROWS, n // ROWS, layer.cols)
    packed = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    return {"weight": packed, "weight_scale": layer.weight_scale.detach().to(layer.weight_dtype).reshape(1)}


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_one(path: str | os.PathLike) -> bool:
    return folders.quantization_of(path, METHOD)


def _opened(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """(config, tensors, names of layers), of types and sizes that fit each other. Raises PackedFileError."""
    config = folders.read_json(Path(path) / folders.CONFIG)
    told = config.pop(folders.QUANTIZATION, None)
    if not isinstance(told, dict) or told.get("quant_method") != METHOD:
        raise PackedFileError(f"{path}: config.json names no quant_method {METHOD!r}")
    if wrong := next((key for key, value in FIXED.items() if told.get(key) != value), None):
        raise PackedFileError(f"{path}: {wrong}: expected {FIXED[wrong]!r}, got {told.get(wrong)!r:.80}")
    tensors = folders.read_tensors(Path(path))
    names = [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]
    for name in names:
        weight, scale = tensors.get(f"{name}.weight"), tensors[f"{name}.weight_scale"]
        if weight is None or weight.dtype != torch.uint8 or weight.dim() != 2 or f"{name}.bias" in tensors:
            raise PackedFileError(f"{path}: {name}: expected a uint8 matrix weight, and no bias")
        if scale.shape != (1,):
            raise PackedFileError(f"{path}: {name}: weight_scale: expected one number, got {tuple(scale.shape)}")
        try:
            kept_scale(scale)
        except ValueError as error:
            raise PackedFileError(f"{path}: {name}: weight_scale: {error}") from None
        if not bool(scale.isfinite() & (scale > 0)):
            raise PackedFileError(f"{path}: {name}: weight_scale: expected a positive finite number")
        if bool((weight & weight >> 1 & 0x55).any()):
            raise PackedFileError(f"{path}: {name}: weight: expected levels of three, two bits each")
    return config, tensors, names


def read(path: str | os.PathLike) -> Contents:
    """Ternary packed layers with inputs of Uniform(8). Raises PackedFileError naming the layer, FileNotFoundError."""
    config, tensors, names = _opened(path)
    told = QuantConfig(Ternary(), granularity="per_tensor", activation=Uniform(8))
    kind, layers = KINDS["linear"], dict[str, PackedLayer]()
    for name in names:
        packed, scale = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.weight_scale")
        kept = kept_scale(scale)
        codes = torch.cat([packed >> 2 * i & 3 for i in range(ROWS)])
        layer = layers[name] = kind.packed.like(kind.of_shape(codes.shape, False), config=told, scale_dtype=kept.dtype,
                                                dtype=scale.dtype)  # fmt: skip
        layer.bias, layer.weight_codes, layer.weight_scale = None, pack_codes(codes, layer.bits), kept
    architecture, folder = config if "model_type" in config else None, Path(path)
    return Contents(str(path), layers, tensors, folders.read_extra(folder), architecture, folder)


def dequantized(path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """As transformers unpacks it; ImportError without it."""
    try:
        import transformers
        from transformers.integrations.bitnet import unpack_weights
    except ImportError:
        raise ImportError('reading with transformers needs it: pip install "askew_kernels[transformers]"') from None
    _, tensors, names = _opened(path)
    weights = folders.float_weights(tensors)
    with torch.compiler.set_stance("force_eager"):
        for name in names:
            scale = tensors[f"{name}.weight_scale"]
            weights[name] = unpack_weights(tensors[f"{name}.weight"], dtype=scale.dtype) * scale
    return weights, f"transformers {transformers.__version__}"
