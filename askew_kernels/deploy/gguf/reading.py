"""GGUF files read as packed models, and decoded by the format's own libraries."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...nn.kinds import KINDS
from ...nn.packed import PackedLayer
from ...quant import QuantConfig
from ..contents import Contents
from ..files import FLOATS, PackedFileError
from ..folders import float_weights
from . import blocks
from .architectures import Architecture, Names, completed, from_fields, last, of_fields, rope_factors, rotary_rows
from .blocks import BY_NUMBER
from .container import KEY, VERSION, Container, TensorInfo, library, open_container


@dataclass(frozen=True)
class _Entry:
    """A tensor by the name that it has there, or would have; of several parts where it is one weight here."""

    name: str
    parts: tuple[TensorInfo, ...]

    @property
    def number(self) -> int:
        return self.parts[0].number

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0].shape
        return shape if len(self.parts) == 1 else (shape[0], shape[1] * len(self.parts), *shape[2:])

    def joined(self, parts: list[Tensor]) -> Tensor:
        """What the parts, each with the experts first, are together."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _entries(container: Container, a: Architecture | None) -> list[_Entry]:
    left, found = dict(container.tensors), []
    split = {} if a is None else {part: (whole, parts) for whole, parts in a.split.items() for part in parts}
    for name, info in container.tensors.items():
        module, _, leaf = name.rpartition(".")
        whole, parts = split.get(last(module), ("", ()))
        before = module.removesuffix(last(module))
        infos = [left.get(f"{before}{part}.{leaf}") for part in parts]
        if name not in left:
            continue
        if (
            parts
            and len(info.shape) == 3
            and all(i and (i.number, i.shape) == (info.number, info.shape) for i in infos)
        ):
            found.append(_Entry(f"{before}{whole}.{leaf}", tuple(left.pop(i.name) for i in infos if i)))
        else:
            found.append(_Entry(name, (left.pop(name),)))
    return found


@dataclass
class _Source:
    """A file that is understood: its header, its architecture, what it says under our own key."""

    container: Container
    architecture: Architecture | None
    names: Names
    config: dict[str, Any]  # completed; empty where there is no architecture
    told: dict[str, Any] | None = None  # the config as it was given to the writer, or as the file's values tell it
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    floats: list[str] = field(default_factory=list)  # layers that are floats for the model, though stored as blocks
    scalars: dict[str, str] = field(default_factory=dict)  # types of single numbers that are stored as float32
    extra: dict[str, Any] = field(default_factory=dict)

    def error(self, name: str, text: object) -> PackedFileError:
        return PackedFileError(f"{self.container.path}: {name}: {text}")

    def place(self, info: _Entry) -> tuple[str, str]:
        """(module, leaf) of a tensor, by our names; the leaf is empty for a Parameter that is no module's weight."""
        module, _, leaf = info.name.rpartition(".")
        ours = self.names.ours(module) if module else ""
        bare = self.architecture is not None and ours.endswith(self.architecture.parameters)
        return ours, "" if bare else leaf

    def key(self, info: _Entry) -> str:
        """Of a tensor in the state_dict."""
        module, leaf = self.place(info)
        return f"{module}.{leaf}" if module and leaf else module or leaf

    def rows(self, info: _Entry) -> Tensor | None:
        """Where our rows stand in the file."""
        module = info.name.rpartition(".")[0]
        if not info.shape:
            return None
        found = rotary_rows(self.architecture, self.config, module, info.shape[0])
        return None if found is None else torch.argsort(found)

    def described(self, name: str, info: _Entry) -> tuple[str, tuple[int, ...], torch.dtype, dict[str, Any]]:
        """(kind, shape, type, geometry) of a packed layer: what the file says, if it fits, or what the tensor tells."""
        d = self.layers.get(name, {})
        natural, whole = self._natural(name, info.shape)
        kind, shape = d.get("kind", natural), d.get("shape", whole)
        dtype, geometry = d.get("dtype", "float32"), d.get("geometry", {})
        sound = kind in KINDS and dtype in FLOATS and isinstance(geometry, dict) and isinstance(shape, list)
        if not sound or not all(type(n) is int and n > 0 for n in shape) or len(shape) != KINDS[kind].dims:
            raise ValueError(f"its description does not fit a packed layer: {d or info.shape!r:.200}")
        matrix = KINDS[kind].form_with(geometry).shape(tuple(shape))
        if (matrix[0], math.prod(matrix[1:])) != (math.prod(info.shape[:-1]), info.shape[-1]):
            raise ValueError(f"a matrix of {info.shape} is no weight of {shape}")
        return kind, tuple(shape), getattr(torch, dtype), geometry

    def _natural(self, name: str, shape: tuple[int, ...]) -> tuple[str, list[int]]:
        """(kind, shape) of a weight of which nothing is said."""
        a = self.architecture
        if a is not None and name == self.names.prefix + a.embedding:
            return "embedding", list(shape)
        if a is not None and name.endswith(a.transposed):
            return "transposed_linear", list(shape[::-1])
        return "experts" if len(shape) == 3 else "linear", list(shape)


def _open(path: str | os.PathLike) -> _Source:
    container = open_container(path)
    fields = container.fields
    if fields.get("split.count", 0) not in (0, 1):
        raise PackedFileError(
            f"{container.path}: one of {fields['split.count']} parts; merge them first (llama-gguf-split)"
        )
    architecture = of_fields(fields)
    said = _said(container)
    prefix = said.get("prefix", architecture.prefix if architecture else "")
    try:
        told = None if architecture is None else said.get("config") or from_fields(architecture, fields)
        config = {} if architecture is None or told is None else completed(architecture, told)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise PackedFileError(f"{container.path}: {error}") from None
    source = _Source(container, architecture, Names(architecture, prefix), config, told)
    source.layers, source.ties = said.get("layers", {}), said.get("ties", {})
    source.extra, source.floats = said.get("extra", {}), said.get("floats", [])
    source.scalars = said.get("scalars", {})
    return source


def _said(container: Container) -> dict[str, Any]:
    """What stands under our own key, its shapes checked; {} where it does not."""
    if KEY not in container.fields:
        return {}
    try:
        said = json.loads(container.fields[KEY])
        wrong = [
            key for key in ("layers", "ties", "extra", "config", "scalars") if not isinstance(said.get(key) or {}, dict)
        ]
        if said["version"] != VERSION or wrong or not isinstance(said.get("prefix", ""), str):
            raise ValueError(f"{wrong or said['version']!r:.80}")
        if not all(isinstance(d, dict) for d in said.get("layers", {}).values()):
            raise ValueError("layers")
        if not all(isinstance(d, str) for d in [*said.get("ties", {}).values(), *said.get("floats", [])]):
            raise ValueError("ties")
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise PackedFileError(f"{container.path}: {KEY}: damaged ({type(error).__name__}: {error})") from None
    return said


@torch.no_grad()
def read(path: str | os.PathLike) -> Contents:
    """Blocks of the types that hold levels of ours as packed layers with the same weights, bit for bit; F32, F16, BF16,
    F64 and integers as tensors; under the names of transformers where the architecture is known.

    A block's scale is positive here: a tensor that has blocks with d < 0 gets the next wider grid that holds its levels
    turned around (Uniform(5) for Q4_0). Raises FileNotFoundError, and PackedFileError for damage, for types that mix
    scales within a block (the K-quants and others), and for blocks that no grid holds.
    """
    source = _open(path)
    layers: dict[str, PackedLayer] = {}
    tensors: dict[str, Tensor] = {}
    for info in _entries(source.container, source.architecture):
        (module, leaf), key = source.place(info), source.key(info)
        try:
            if key in tensors or (module in layers and leaf in ("weight", "")):
                raise ValueError(f"it would be {key}, as another tensor is")
            if info.number in BY_NUMBER:
                if leaf not in ("weight", "") or not module:
                    raise ValueError(f"{BY_NUMBER[info.number].name} blocks, expected to be the weight of a module")
                layers[module] = _layer(source, module, info)
            else:
                tensors[key] = _tensor(source, info)
        except PackedFileError:
            raise
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise source.error(info.name, error) from None
    _tie(source, layers, tensors)
    for name in source.floats:
        if name in layers:
            tensors[f"{name}.weight"] = layers.pop(name).dequantize()
    if _made_of_config(tensors.get("rope_freqs.weight"), source.config):
        del tensors["rope_freqs.weight"]
    return Contents(str(path), layers, tensors, source.extra, source.told, None)


def _made_of_config(factors: Tensor | None, config: dict[str, Any]) -> bool:
    """Whether these are the rotary factors that export makes of a config, so that no model has them as a tensor."""
    if factors is None or config.get("head_dim") != 2 * factors.numel():
        return False
    try:
        made = rope_factors(config)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError):
        return False
    return made is not None and torch.equal(made, factors)


def _layer(source: _Source, name: str, info: _Entry) -> PackedLayer:
    kind, shape, dtype, geometry = source.described(name, info)
    t = BY_NUMBER[info.number]
    parts = [torch.from_numpy(source.container.bytes_of(part)).reshape(part.shape[0], -1) for part in info.parts]
    data = info.joined(parts).numpy().reshape(math.prod(info.shape[:-1]), -1)
    if (rows := source.rows(info)) is not None:
        data = data[rows.numpy()]
    found = blocks.decoded(t, data)
    config = QuantConfig(found.grid, granularity="per_group", group_size=t.group, scale_dtype=t.scales.name)
    like = KINDS[kind].of_shape(shape, False, geometry=geometry)
    options = {"config": config, "trits": t.trits, "scale_dtype": found.scale.dtype, "dtype": dtype}
    layer: PackedLayer = KINDS[kind].packed.like(like, **options)
    if layer.weight_codes.shape != found.codes.shape or layer.weight_scale.shape != found.scale.shape:
        raise ValueError(f"a matrix of {info.shape} is no weight of {shape} with the geometry {geometry!r:.80}")
    layer.bias = None
    layer.weight_codes, layer.weight_scale = found.codes, found.scale
    return layer


def _tensor(source: _Source, info: _Entry) -> Tensor:
    module, leaf = source.place(info)
    t, a = info.joined([source.container.tensor(part) for part in info.parts]), source.architecture
    if not t.dim() and source.scalars.get(source.key(info)) == "bfloat16":
        t = t.to(torch.bfloat16)
    if (rows := source.rows(info)) is not None:
        t = t[rows]
    if a is not None:
        if a.plus_one and last(info.name.rpartition(".")[0]).endswith("norm"):
            t = t - 1
        if leaf == "weight" and module.endswith(a.transposed):
            t = t.t().contiguous()
    return t


def _tie(source: _Source, layers: dict[str, PackedLayer], tensors: dict[str, Tensor]) -> None:
    """Puts what the file holds once in all its places."""
    a, ties = source.architecture, dict(source.ties)
    if a is not None:
        first = source.names.prefix + a.embedding
        for head in a.heads:
            known = {head, f"{head}.weight"} & {*layers, *tensors}
            if not known and {first, f"{first}.weight"} & {*layers, *tensors}:
                ties.setdefault(*((head, first) if first in layers else (f"{head}.weight", f"{first}.weight")))
    for name, first in ties.items():
        if first in layers and name not in layers:
            like = layers[first]
            kind = source.layers.get(name, {}).get("kind", "linear")
            if kind not in KINDS or KINDS[kind].dims != len(like.shape):
                raise source.error(name, f"a layer of the kind {kind!r:.40} cannot be one with {first}")
            options = {"config": like.config, "trits": like.trits, "scale_dtype": like.weight_scale.dtype,
                       "dtype": like.weight_dtype}  # fmt: skip
            layer = layers[name] = KINDS[kind].packed.like(KINDS[kind].of_shape(like.shape, False), **options)
            layer.bias = None
            layer.weight_codes, layer.weight_scale = like.weight_codes, like.weight_scale
        elif first in tensors and name not in tensors:
            tensors[name] = tensors[first]
        elif f"{first}.weight" in tensors and f"{name}.weight" not in tensors:  # layers that were written as floats
            tensors[f"{name}.weight"] = tensors[f"{first}.weight"]
        elif not {first, f"{first}.weight"} & {*layers, *tensors}:
            raise source.error(name, f"is one with {first:.80}, which is not there")


# ---- checking --------------------------------------------------------------------------------------------------------


def dequantized(path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """({layer: its weight, float32, in the shape and the order that it has here}, by whom): the package ``gguf``, and
    ggml as ``llama-cpp-python`` brings it for types that ``gguf`` knows but does not decode (Q1_0).

    Raises as ``read``; ImportError where a package is missing."""
    source, gguf = _open(path), library()
    weights: dict[str, Tensor] = {}
    said = f"gguf {metadata.version('gguf')}"
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for info in _entries(source.container, source.architecture):
        if info.number not in BY_NUMBER:
            weights |= float_weights({source.key(info): _tensor(source, info)})
            continue
        parts = []
        for part in info.parts:
            t = found[part.name]
            try:
                w = gguf.dequantize(t.data, t.tensor_type)
            except NotImplementedError:
                w, version = by_ggml(BY_NUMBER[part.number], np.ascontiguousarray(t.data))
                said = f"{said.partition(',')[0]}, llama-cpp-python {version}"
            parts.append(torch.from_numpy(np.array(w, np.float32)).reshape(part.shape))
        weight, rows = info.joined(parts), source.rows(info)
        name = source.place(info)[0]
        try:
            kind, shape, _, geometry = source.described(name, info)
        except ValueError as error:
            raise source.error(info.name, error) from None
        weights[name] = KINDS[kind].form_with(geometry).weight(weight if rows is None else weight[rows], shape)
    a = source.architecture
    heads = {h: source.names.prefix + a.embedding for h in a.heads if h not in weights} if a else {}
    for name, first in (heads | source.ties).items():
        if first in weights:
            weights[name] = weights[first]
    return {name: w for name, w in weights.items() if name not in source.floats}, said


@cache
def _ggml() -> tuple[Any, str]:
    try:
        import llama_cpp
    except ImportError as error:
        raise ImportError(f"gguf does not decode Q1_0, ggml does: pip install llama-cpp-python ({error})") from None
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = sorted(p for p in folder.iterdir() if re.fullmatch(r"(lib)?ggml-base\.(so|dylib|dll)", p.name))
    if not found:
        raise ImportError(f"no ggml-base in {folder}")
    return ctypes.CDLL(str(found[0])), llama_cpp.__version__


def by_ggml(t: blocks.BlockType, data: np.ndarray) -> tuple[np.ndarray, str]:
    """(weights of (…, row bytes), version)."""
    ggml, version = _ggml()
    w = np.empty((*data.shape[:-1], data.shape[-1] // t.size * t.block), np.float32)
    pointers = (a.ctypes.data_as(ctypes.c_void_p) for a in (data, w))
    getattr(ggml, f"dequantize_row_{t.name.lower().replace('_k', '_K')}")(*pointers, ctypes.c_int64(w.size))
    return w, version
