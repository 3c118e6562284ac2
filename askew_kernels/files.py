"""Packed models as one safetensors file: codes, scales, the remaining tensors, and what they mean, as JSON.

The header's metadata has the entry ``askew_kernels``: ``{"version": 1, "layers": {name: description}, "aliases":
{name: kept name}, "checksum": hexadecimal CRC-32}``. A description holds kind, config (grid, granularity), trits,
shape, dtype, and for convolutions the geometry; aliases are tensors that are one in memory; the checksum covers all of
it and finds damage (it is no defence against an author who means harm, but nothing read here is ever executed).
Never pickle.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .nn.convert import LAYERS as FLOAT_LAYERS
from .nn.layers import QuantizedLayer
from .nn.packed import (
    PackedConv2d,
    PackedLayer,
    PackedLinear,
    conv_geometry,
    packed_layers,
    replace_modules,
    set_activations,
)
from .quant import QuantConfig, check_codes

VERSION = 1
KEY = "askew_kernels"
PENDING = "?" * 8  # in the place of a checksum that is still being made
PIECE = 1 << 22  # bytes of a tensor that have a CRC-32 of their own
KINDS: dict[str, Any] = {"linear": PackedLinear, "conv2d": PackedConv2d}
TWINS: dict[str, type[nn.Module]] = {"linear": nn.Linear, "conv2d": nn.Conv2d}


class PackedFileError(ValueError):
    """A packed file that cannot be written, read, or fitted to a model; the text begins with the path."""


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError('packed files need safetensors: pip install "askew_kernels[deploy]"') from None
    return safetensors


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32, eight hexadecimal digits, of the metadata, and of name, type, shape and the CRC-32 of each 4 MiB of each
    tensor.

    By pieces, so that all threads share the work; zlib lets the others run meanwhile.
    """
    text = json.dumps({k: v for k, v in document.items() if k != "checksum"}, sort_keys=True)
    crc = zlib.crc32(text.encode())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name in sorted(tensors):
            t = tensors[name]
            crc = zlib.crc32(f"{name} {t.dtype} {tuple(t.shape)}".encode(), crc)
            data = memoryview(_bytes(t)) if t.numel() else memoryview(b"")
            pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
            for piece in pool.map(zlib.crc32, pieces) if len(pieces) > 1 else map(zlib.crc32, pieces):
                crc = zlib.crc32(piece.to_bytes(4, "little"), crc)
    return f"{crc:08x}"


def write_packed(path: str | os.PathLike, tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> None:
    """Writes tensors and layer descriptions: to a temporary name beside ``path``, which then replaces it."""
    library, path = _safetensors(), Path(path)
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[Any, str] = {}
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise PackedFileError(f"{path}: {name} is a {type(t).__name__}; only tensors can be saved")
        if t.is_meta:
            raise PackedFileError(f"{path}: {name} is on the meta device, it has no values to save")
        same = (t.data_ptr(), t.dtype, tuple(t.shape), t.stride(), t.device)
        if t.numel() and owners.setdefault(same, name) != name:
            aliases[name] = owners[same]
        else:
            kept[name] = t.detach().cpu().contiguous()
    seen: set[int] = set()
    for name, t in kept.items():  # views of one storage are written apart
        if t.untyped_storage().data_ptr() in seen and t.numel():
            kept[name] = t.clone()
        seen.add(t.untyped_storage().data_ptr())
    document = {"version": VERSION, "checksum": PENDING, "layers": dict(layers), "aliases": aliases}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with ThreadPoolExecutor(1) as writer:  # beside the checksum
            metadata = {"format": "pt", KEY: json.dumps(document)}
            written = writer.submit(library.torch.save_file, kept, str(temporary), metadata)
            checksum = _checksum(document, kept)
            written.result()
        with open(temporary, "r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            file.seek(8 + header.index(PENDING.encode()))  # its first place: nothing before it is ours to choose
            file.write(checksum.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, library.SafetensorError) as error:
        raise PackedFileError(f"{path}: cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


class PackedFile:
    """``tensors`` {name: Tensor} mapped from the file, ``layers`` {name: description}, ``stored`` (names kept once)."""

    def __init__(self, path: str | os.PathLike, verify: bool = True) -> None:
        library, self.path = _safetensors(), Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with library.safe_open(str(path), framework="pt", device="cpu") as handle:
                metadata = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            RuntimeError,
            OverflowError,
            library.SafetensorError,
        ) as error:
            raise self._error(f"not a whole safetensors file ({error})") from None
        if KEY not in metadata:
            raise self._error(f"a safetensors file without the {KEY} metadata; ak.save_packed writes it")
        try:
            document = json.loads(metadata[KEY])
            version, layers, aliases = document["version"], document["layers"], document["aliases"]
            checksum = document["checksum"]
            sound = isinstance(layers, dict) and isinstance(aliases, dict)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._error(f"damaged metadata ({type(error).__name__}: {error})") from None
        if version != VERSION:
            raise self._error(f"format version {version!r}; this release reads version {VERSION}")
        if not sound or any(not isinstance(v, str) or v not in tensors for v in aliases.values()):
            raise self._error("damaged metadata (layers and aliases do not fit the tensors)")
        if verify and _checksum(document, tensors) != checksum:
            raise self._error("the checksum does not fit: the file was damaged or edited")
        self.stored = list(tensors)
        self.tensors: dict[str, Tensor] = tensors | {name: tensors[kept] for name, kept in aliases.items()}
        self.layers: dict[str, dict[str, Any]] = layers
        self.configs = {name: self._check_layer(name, d) for name, d in layers.items()}

    def _error(self, text: str) -> PackedFileError:
        return PackedFileError(f"{self.path}: {text}")

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self.layers[name]["dtype"])

    def empty_layer(self, name: str, like: Any = None) -> PackedLayer:
        """The packed layer, on the meta device; geometry and bias of ``like``, or of a plain layer of the shape."""
        d, config = self.layers[name], self.configs[name]
        if like is None:
            shape, bias = d["shape"], f"{name}.bias" in self.tensors
            if d["kind"] == "linear":
                like = nn.Linear(shape[1], shape[0], bias, device="meta")
            else:
                like = nn.Conv2d(shape[1], shape[0], shape[2:], bias=bias, device="meta")
        scale_dtype = self.tensors[f"{name}.weight_scale"].dtype
        return KINDS[d["kind"]].like(like, config, d["trits"], scale_dtype, self.dtype(name), "meta")

    def _check_layer(self, name: str, d: Any) -> QuantConfig:
        """The layer's config, after checking that codes and scales are what the description says."""
        try:
            if d["kind"] not in KINDS:
                raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {d['kind']!r}")
            shape, dims = d["shape"], 2 if d["kind"] == "linear" else 4
            if len(shape) != dims or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
                raise ValueError(f"shape: expected {dims} sizes, got {shape}")
            if d["dtype"] not in ("float32", "bfloat16", "float16", "float64"):
                raise ValueError(f"dtype: expected a float type, got {d['dtype']!r}")
            if type(d["trits"]) is not bool:
                raise ValueError(f"trits: expected true or false, got {d['trits']!r}")
            config = QuantConfig.from_dict(d["config"])
            self.configs = {name: config}
            codes, scale = (self.tensors[f"{name}.{key}"] for key in ("weight_codes", "weight_scale"))
            empty = self.empty_layer(name)
            for key, got, want in (("codes", codes, empty.weight_codes), ("scale", scale, empty.weight_scale)):
                if got.shape != want.shape or got.dtype != want.dtype:
                    raise ValueError(
                        f"weight_{key}: expected {want.dtype} {tuple(want.shape)}, got {got.dtype} {tuple(got.shape)}"
                    )
            if not bool((scale.float().isfinite() & (scale > 0)).all()):
                raise ValueError("weight_scale: expected positive finite scales")
            check_codes(codes, empty.bits, empty.cols, len(config.weight.levels))
        except KeyError as error:
            raise self._error(f"layer {name}: {error.args[0]!r} is missing") from None
        except (ValueError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
            raise self._error(f"layer {name}: {error}") from None
        return config


def save_packed(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes a packed model (``ak.pack_``): codes, scales and every other tensor of its state_dict, in one file.

    The file appears under ``path`` only when it is whole. Raises PackedFileError (a ValueError) for a model without
    packed layers, for layers that are still quantized but not packed, and where the file cannot be written;
    ImportError without safetensors.
    """
    _safetensors()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    unpacked = [name for name, m in model.named_modules() if isinstance(m, QuantizedLayer)]
    if unpacked:
        raise PackedFileError(f"{path}: {unpacked[0]} is not packed; call hard_quantize_(model) and pack_(model) first")
    layers = {
        name: m.description()
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, PackedLayer) and name
    }
    if not layers:
        raise PackedFileError(f"{path}: the model has no packed layers; call pack_(model) first")
    said = {f"{name}._extra_state" for name in layers}  # what the header says of the packed layers
    write_packed(path, {key: t for key, t in model.state_dict().items() if key not in said}, layers)


def load_packed(
    path: str | os.PathLike, model: nn.Module, *, verify: bool = True, activations: str = "float"
) -> nn.Module:
    """Fills ``model`` from a packed file, in place, and returns it.

    Its nn.Linear and nn.Conv2d (or their quantized or packed twins) that the file has packed are replaced; every other
    tensor is loaded, strictly. A model on the meta device is given the file's own memory-mapped tensors: the file
    must not be changed in place while they are in use. ``verify=False`` skips the checksum, which reads it all once.
    ``activations``: as in ``pack_``.

    Raises PackedFileError naming what does not fit (names, shapes, grid, geometry, format version, damage), and then
    leaves the model as it was; ImportError without safetensors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    file = PackedFile(path, verify)
    new: dict[str, nn.Module] = {}
    made: dict[int, PackedLayer] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, d in file.layers.items():
        old = modules.get(name)
        if old is None or not name:
            raise file._error(f"layer {name}: the model has no such layer")
        _check_fits(file, name, d, old)
        if id(old) not in made:
            made[id(old)] = _filled(file, name, old)
            try:
                set_activations(made[id(old)], activations)
            except ValueError as error:
                raise file._error(f"layer {name}: {error}") from None
        new[name] = made[id(old)]
    extra = [name for name in packed_layers(model) if name not in new]
    if extra:
        raise file._error(f"layer {extra[0]} is packed in the model and not in the file")
    inside = tuple(f"{name}." for name in new)
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if not k.startswith(inside)}
    rest = {k: v for k, v in file.tensors.items() if not k.startswith(inside)}
    missing, surplus = sorted(state.keys() - rest.keys()), sorted(rest.keys() - state.keys())
    if missing or surplus:
        what = [f"the file lacks {', '.join(missing[:5])}"] * bool(missing)
        raise file._error("; ".join(what + [f"the model lacks {', '.join(surplus[:5])}"] * bool(surplus)))
    for key, t in rest.items():
        if t.shape != state[key].shape:
            raise file._error(f"{key}: expected shape {tuple(state[key].shape)}, got {tuple(t.shape)}")
    replace_modules(model, new)
    assigned: dict[int, Any] = {}
    for key, t in rest.items():
        parent, _, child = key.rpartition(".")
        owner, target = model.get_submodule(parent), state[key]
        if not target.is_meta:
            with torch.no_grad():
                target.copy_(t)
        elif isinstance(target, nn.Parameter):  # one object under two names stays one
            made_parameter = assigned.setdefault(id(target), nn.Parameter(t, target.requires_grad))
            owner.register_parameter(child, made_parameter)
        else:
            owner._buffers[child] = assigned.setdefault(id(target), t)
    return model


def _check_fits(file: PackedFile, name: str, d: dict[str, Any], old: Any) -> None:
    kinds = (TWINS[d["kind"]], KINDS[d["kind"]])
    if not isinstance(old, kinds) or not (type(old) in FLOAT_LAYERS or isinstance(old, (QuantizedLayer, PackedLayer))):
        raise file._error(f"layer {name}: expected {kinds[0].__name__} in the model, got {type(old).__name__}")
    held: Any = old  # of either kind from here on
    shape = tuple(held.shape if isinstance(old, PackedLayer) else held.weight.shape)
    if list(shape) != d["shape"]:
        raise file._error(f"layer {name}: expected a weight of shape {shape}, the file has {tuple(d['shape'])}")
    if (held.bias is None) == (f"{name}.bias" in file.tensors):
        raise file._error(f"layer {name}: only {'the file' if held.bias is None else 'the model'} has a bias")
    if held.bias is not None and file.tensors[f"{name}.bias"].shape != held.bias.shape:
        raise file._error(f"layer {name}: bias: expected shape {list(held.bias.shape)}, "
                          f"got {list(file.tensors[f'{name}.bias'].shape)}")  # fmt: skip
    config = getattr(old, "config", None)
    if config is not None and config.weight != file.configs[name].weight:
        raise file._error(f"layer {name}: grid: expected {config.weight}, the file has {file.configs[name].weight}")
    geometry = d.get("geometry")
    if geometry is not None and conv_geometry(held) != geometry:
        raise file._error(f"layer {name}: geometry: expected {conv_geometry(held)}, the file has {geometry}")


def _filled(file: PackedFile, name: str, old: Any) -> PackedLayer:
    layer = file.empty_layer(name, old)
    place = old.weight_codes if isinstance(old, PackedLayer) else old.weight
    device = torch.device("cpu") if place.is_meta else place.device
    layer.weight_codes = file.tensors[f"{name}.weight_codes"].to(device)
    layer.weight_scale = file.tensors[f"{name}.weight_scale"].to(device)
    if old.bias is not None:
        layer.bias = nn.Parameter(file.tensors[f"{name}.bias"].to(device), old.bias.requires_grad)
    return layer.train(old.training)  # type: ignore[return-value]
