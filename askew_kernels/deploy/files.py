"""Packed models as one safetensors file: codes, scales, the remaining tensors, and what they mean, as JSON.

The header's metadata has the entry ``askew_kernels``: ``{"version": 1, "layers": {name: description}, "aliases":
{name: kept name}, "extra": {key: extra state that is no tensor}, "checksum": hexadecimal CRC-32}``. A description is
``PackedLayer.description``; aliases are tensors that are one in memory; the checksum covers all of it and finds damage
(it is no defence against an author who means harm, but nothing read here is ever executed). Names are those of the
state_dict, without the steps that wrappers (``torch.compile``, DDP, activation checkpoints) put into them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from ..nn.held import exposed
from ..nn.kinds import KINDS, own_keys, replaceable
from ..nn.layers import QuantizedLayer
from ..nn.packed import EXTRA_STATE, PackedLayer, sound
from ..nn.replace import check_replaceable, replace_modules
from ..quant import QuantConfig, check_codes, scale_unit
from ..quant.packing import storage_type
from ..quant.scales import holds_scales
from . import tensorfile
from .tensorfile import not_plain

VERSION = 1
KEY = "askew_kernels"
EXTRA = "askew_kernels_extra"  # of the metadata of files that others read: extra state that is JSON, by its keys
IN_UNITS, UNIT = "float8_e4m3fn", "scale_unit"  # type of scales; in a layer's description the exponent of their unit
PENDING = "?" * 8  # in the place of a checksum that is still being made
FLOATS = ("float32", "bfloat16", "float16", "float64")
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # what wrappers call what they wrap
WRAPPED = (nn.DataParallel, nn.parallel.DistributedDataParallel)  # the same is their `module`


class PackedFileError(ValueError):
    """A packed file that cannot be written, read, or fitted to a model; the text begins with the path."""


class NotWritten(PackedFileError):
    """What the system says after the work, such as a full disk."""


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Tensors are made on the CPU, whatever is the default outside: files hold what lies there."""
    with torch.device("cpu"):
        yield


# ---- names -----------------------------------------------------------------------------------------------------------


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def wrapped_in(model: nn.Module) -> nn.Module:
    """The model without the wrappers around all of it."""
    while isinstance(model, WRAPPED) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.module if isinstance(model, WRAPPED) else model._orig_mod  # type: ignore[assignment]
    return model


class _Names:
    """What a model holds, by the names of its state_dict."""

    def __init__(self, model: nn.Module, where: str | bytes | os.PathLike) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        model = wrapped_in(model)
        self.model, self.where = model, os.fsdecode(where)
        self.modules: dict[str, nn.Module] = {}
        self.paths: dict[int, list[str]] = defaultdict(list)  # {id of a module: its names in the model}
        self.homes: dict[int, dict[tuple[nn.Module, str], None]] = defaultdict(dict)  # {id of a tensor: where it is}
        self.tensors: dict[str, Tensor] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            name = _unwrapped(path)
            self.modules[name] = module
            self.paths[id(module)].append(path)
            for child, t in [*module._parameters.items(), *module._buffers.items()]:
                if t is not None:
                    self.tensors[f"{name}.{child}" if name else child] = t
                    self.homes[id(t)][module, child] = None
        self.state: dict[str, Any] = {}
        self.held: dict[str, Tensor] = {}  # the model's own: the value or, where a hook copied it, what has that name
        try:
            state = model.state_dict(keep_vars=True)
        except TypeError:  # a state_dict of the model's own
            state = model.state_dict()
        for key, value in state.items():
            key = _unwrapped(key)
            if key in self.state and self.state[key] is not value:
                raise self.fail(f"{key}: the state_dict has it twice")
            self.state[key] = value
            named = self.tensors.get(key)
            if id(value) in self.homes:
                self.held[key] = value
            elif named is not None and isinstance(value, Tensor) and _type(named) == _type(value):
                self.held[key] = named

    def fail(self, text: str) -> PackedFileError:
        return PackedFileError(f"{self.where}: {text}")

    def layer(self, name: str) -> nn.Module | None:
        """The module that the state_dict calls so: by its name or, where hooks rename keys, by its weight or codes."""
        key = next((k for k in (f"{name}.weight_codes", f"{name}.weight") if k in self.held), None)
        named = self.modules.get(name) if name else None
        if key is None:
            return named
        owners = [m for m, child in self.homes[id(self.held[key])] if child == key.rpartition(".")[2]]
        if any(m is named for m in owners):
            return named
        return owners[0] if len(owners) == 1 and name else None

    def with_extra(self, key: str) -> nn.Module | None:
        """The module whose extra state has this key; None for other keys."""
        name, _, last = key.rpartition(".")
        if last != EXTRA_STATE or key in self.held:
            return None
        if name not in self.modules:
            raise self.fail(f"{key}: a state_dict hook renames it, a load could not find its module")
        return self.modules[name]


def _type(t: Tensor) -> tuple:
    return (not_plain(t), None) if not_plain(t) else (tuple(t.shape), t.dtype)


def memory_of(t: Tensor) -> Any:
    """The same for tensors that are one in memory, also where they are two objects."""
    if not_plain(t) or t.is_meta or not t.numel():
        return id(t)
    return t.data_ptr(), t.dtype, tuple(t.shape), t.stride(), t.device, t.is_conj(), t.is_neg()


def _check(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


# ---- writing ---------------------------------------------------------------------------------------------------------


def _checksum(document: Mapping[str, Any], tensors: Mapping[str, Tensor], sums: tensorfile.Sums) -> str:
    """CRC-32, eight hexadecimal digits, of the metadata, and of each tensor's name, type, shape and own sums."""
    text = json.dumps({k: v for k, v in document.items() if k != "checksum"}, sort_keys=True)
    crc = crc32(text.encode())
    for name in sorted(tensors):
        crc = crc32(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode(), crc)
        for piece in sums.get(name, []):
            crc = crc32(piece.to_bytes(4, "little"), crc)
    return f"{crc:08x}"


def write_packed(path: str | bytes | os.PathLike, tensors: Mapping[str, Tensor], layers: Mapping[str, Any],
                 extra: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Writes tensors, layer descriptions and JSON-ready extra state, whole or not at all (``atomic.replacing``)."""
    shown = os.fsdecode(path)
    owners: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name, t in tensors.items():
        if why := tensorfile.not_storable(t):
            raise PackedFileError(f"{shown}: {name} {why}")
        if t.numel() and (first := owners.setdefault(memory_of(t), name)) != name:
            aliases[name] = first
    kept = {name: t for name, t in tensors.items() if name not in aliases}
    document = {"version": VERSION, "checksum": PENDING, "layers": dict(layers), "aliases": aliases}
    document |= {"extra": dict(extra)} if extra else {}
    try:
        metadata = {"format": "pt", KEY: json.dumps(document)}
        # the mark's first place is the checksum's: nothing before it is a user's to choose
        tensorfile.write(path, kept, metadata, PENDING, lambda sums: _checksum(document, kept, sums))
    except (OSError, ValueError, RuntimeError) as error:
        raise NotWritten(f"{shown}: cannot be written ({error})") from None


def save_packed(model: nn.Module, path: str | bytes | os.PathLike) -> None:
    """Writes a packed model (``ak.pack_``): codes, scales and every other tensor of its state_dict, in one file.

    The file appears under ``path`` only when it is whole (``atomic.replacing``). Extra state (``get_extra_state``) goes
    along where it is a tensor or JSON. Wrappers (``torch.compile``, DDP) are looked through: the file fits the wrapper
    and what it wraps.

    Raises PackedFileError (a ValueError), and leaves the old file: for a model without packed layers, layers that are
    quantized but not packed, tensors that a file cannot hold (sparse, complex128, meta, …), keys that a load could not
    find again (state_dict hooks that invent them), and where the file cannot be written.
    """
    state = packed_state(model, path)
    tensors, descriptions = stored(state.layers)
    write_packed(path, state.tensors | tensors, descriptions, state.extra)


def stored(layers: Mapping[str, PackedLayer]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """(tensors, descriptions) of packed layers as a file has them: E4M3 scales in a byte, with their unit's exponent in
    the description."""
    tensors: dict[str, Tensor] = {}
    descriptions: dict[str, dict[str, Any]] = {}
    made: dict[int, Tensor] = {}  # what is one in memory is one in the file
    for name, layer in layers.items():
        scale, told = layer.weight_scale, layer.description()
        in_units = layer.config.scale_dtype == IN_UNITS and scale.dtype == storage_type(IN_UNITS)
        if in_units and not scale.is_meta and scale.numel() and holds_scales(scale, IN_UNITS):
            unit = scale_unit(scale)
            told[UNIT] = int(unit.log2())
            scale = made.setdefault(id(scale), (scale.float() / unit).to(torch.float8_e4m3fn))
        tensors |= {f"{name}.weight_codes": layer.weight_codes, f"{name}.weight_scale": scale}
        descriptions[name] = told
    return tensors, descriptions


class PackedState(NamedTuple):
    """Of a model: packed layers by their names in the state_dict, the other tensors, biases too, and extra state that
    is no tensor by their keys there."""

    layers: dict[str, PackedLayer]
    tensors: dict[str, Tensor]
    extra: dict[str, Any]


def packed_state(model: nn.Module, where: str | bytes | os.PathLike) -> PackedState:
    """What is to be written of a packed model; raises as ``save_packed``, beginning with ``where``."""
    names = _Names(model, where)
    fail = names.fail
    if isinstance(names.model, (QuantizedLayer, PackedLayer)):
        raise fail("the model is itself a layer; put it into an nn.Sequential")
    for name, module in names.modules.items():
        if isinstance(module, QuantizedLayer):
            raise fail(f"{name} is not packed; call hard_quantize_(model) and pack_(model) first")
    layers: dict[str, PackedLayer] = {}
    lost: list[str] = []
    derived, found = set(), set()  # keys that are the layers', ids of layers
    for key in names.state:
        name = key.removesuffix(".weight_codes")
        layer = names.layer(name) if name != key else None
        if isinstance(layer, PackedLayer):
            own = {f"{name}.{k}": getattr(layer, k) for k in ("weight_scale", "bias")}
            lost += [k for k, t in own.items() if names.held.get(k) is not t]
            if not layer.weight_scale.is_meta and not sound(layer.weight_scale):
                raise fail(f"{name}.weight_scale: expected positive finite scales")
            layers[name] = layer
            derived |= {f"{name}.{k}" for k in own_keys(type(layer)) - {"bias"}}
            found.add(id(layer))
    lost += [n for n, m in names.modules.items() if isinstance(m, PackedLayer) and id(m) not in found]
    if lost:
        raise fail(f"{lost[0]}: a state_dict hook hides or renames it, a load could not find it")
    if not layers:
        raise fail("the model has no packed layers; call pack_(model) first")
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for key, value in names.state.items():
        if key in derived:
            continue
        if names.with_extra(key) is not None:
            if not isinstance(value, Tensor) and not is_json(value):
                raise fail(f"{key}: extra state is saved where it is a tensor or JSON, got {type(value).__name__}")
        elif not isinstance(value, Tensor):
            raise fail(f"{key} is a {type(value).__name__}; only tensors can be saved")
        elif key not in names.held:
            raise fail(f"{key}: a state_dict hook made it, it is no parameter or buffer that a load could find")
        (tensors if isinstance(value, Tensor) else extra)[key] = value
    return PackedState(layers, tensors, extra)


def is_json(value: Any) -> bool:
    """Whether JSON gives ``value`` back: not tuples, sets, keys that are no texts, NaN."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        return bool(json.loads(json.dumps(value)) == value)
    return False


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_safetensors(path: str | bytes | os.PathLike, **options: bool) -> tensorfile.TensorFile:
    """``tensorfile.read``, whose errors are PackedFileError here, or FileNotFoundError."""
    shown = os.fsdecode(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{shown}: no such file")
    if not os.path.isfile(path):
        raise PackedFileError(f"{shown}: is a folder or a device, not a file")
    try:
        return tensorfile.read(path, **options)
    except (OSError, ValueError) as error:
        why = "cannot be read" if isinstance(error, OSError) else "not a whole safetensors file"
        raise PackedFileError(f"{shown}: {why} ({error})") from None


def extra_of(metadata: Mapping[str, str], path: str | bytes | os.PathLike) -> dict[str, Any]:
    """The extra state that a safetensors file keeps in its metadata, be it a packed one or of another format; {} where
    it keeps none. Raises PackedFileError."""
    try:
        packed = json.loads(metadata[KEY]) if KEY in metadata else {}
        extra = packed["extra"] if "extra" in packed else json.loads(metadata.get(EXTRA, "{}"))
    except (ValueError, TypeError, RecursionError) as error:
        raise PackedFileError(f"{os.fsdecode(path)}: damaged metadata ({error})") from None
    if not isinstance(extra, dict):
        raise PackedFileError(f"{os.fsdecode(path)}: damaged metadata (extra state is {type(extra).__name__})")
    return extra


def metadata_with(metadata: Mapping[str, str], extra: Mapping[str, Any]) -> dict[str, str]:
    """The metadata, from which ``extra_of`` gives the extra state back."""
    return {**metadata, EXTRA: json.dumps(dict(extra))} if extra else dict(metadata)


class PackedFile:
    """``tensors`` {name: Tensor}, ``extra`` {key: state}, ``layers`` {name: description}, ``stored`` (names kept once).

    ``mmap``: the tensors are the file's own memory, mapped; else they are read, and the file may change."""

    def __init__(self, path: str | bytes | os.PathLike, verify: bool = True, mmap: bool = False) -> None:
        self.path = Path(os.fsdecode(path))
        with on_cpu(), torch.inference_mode(False):  # whatever is the default outside
            if hasattr(torch.empty(0), "fake_mode"):
                raise self._error("cannot be read under a FakeTensorMode, whose tensors hold no numbers")
            self._understand(read_safetensors(self.path, sums=verify, mmap=mmap), verify)

    def _understand(self, read: tensorfile.TensorFile, verify: bool) -> None:
        tensors = read.tensors
        if KEY not in read.metadata:
            raise self._error(f"a safetensors file without the {KEY} metadata; ak.save_packed writes it")
        try:
            document = json.loads(read.metadata[KEY])
            version, layers, aliases = document["version"], document["layers"], document["aliases"]
            checksum, extra = document["checksum"], document.get("extra", {})
            sound = all(isinstance(part, dict) for part in (layers, aliases, extra))
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
            raise self._error(f"damaged metadata ({type(error).__name__}: {error})") from None
        if version != VERSION:
            raise self._error(f"format version {version!r}; this release reads version {VERSION}")
        if not sound or any(not isinstance(v, str) or v not in tensors for v in aliases.values()):
            raise self._error("damaged metadata (layers and aliases do not fit the tensors)")
        if verify and _checksum(document, tensors, read.sums) != checksum:
            raise self._error("the checksum does not fit: the file was damaged or edited")
        for name, d in layers.items():  # E4M3 scales, as ``stored`` writes them
            key = aliases.get(f"{name}.weight_scale", f"{name}.weight_scale")
            unit = d.get(UNIT) if isinstance(d, dict) else None
            if type(unit) is int and abs(unit) < 128 and tensors.get(key) is not None:
                if (kept := tensors[key]).dtype == torch.float8_e4m3fn:
                    tensors[key] = (kept.float() * 2.0**unit).to(storage_type(IN_UNITS))
        self._hold(tensors, layers, aliases, extra)

    @classmethod
    def of(cls, path: str | bytes | os.PathLike, tensors: Mapping[str, Tensor], layers: Mapping[str, Any],
           aliases: Mapping[str, str], extra: Mapping[str, Any]) -> PackedFile:  # fmt: skip
        """The same of layers that stand elsewhere, checked as a file's own; raises as that does."""
        new = cls.__new__(cls)
        new.path = Path(os.fsdecode(path))
        if wrong := next((name for name, kept in aliases.items() if kept not in tensors), None):
            raise new._error(f"aliases: {wrong} is {aliases[wrong]}, which is not there")
        new._hold(dict(tensors), dict(layers), aliases, dict(extra))
        return new

    def _hold(self, tensors: dict[str, Tensor], layers: dict[str, Any], aliases: Mapping[str, str],
              extra: dict[str, Any]) -> None:  # fmt: skip
        self.stored = list(tensors)
        self.tensors: dict[str, Tensor] = tensors | {name: tensors[kept] for name, kept in aliases.items()}
        self.extra: dict[str, Any] = extra
        self.layers: dict[str, dict[str, Any]] = layers
        self.configs = {name: self._check_layer(name, d) for name, d in layers.items()}

    def _error(self, text: str) -> PackedFileError:
        return PackedFileError(f"{self.path}: {text}")

    def empty_layer(self, name: str, like: Any = None, dtype: torch.dtype | None = None) -> PackedLayer:
        """The packed layer, on the meta device; geometry and bias of ``like``, or as the file says."""
        d = self.layers[name]
        kind = KINDS[d["kind"]]
        if like is None:
            like = kind.of_shape(d["shape"], f"{name}.bias" in self.tensors, geometry=d.get("geometry"))
        scale_dtype, dtype = self.codes(name)[1].dtype, dtype or getattr(torch, d["dtype"])
        return kind.packed.like(like, config=self.configs[name], trits=d["trits"], scale_dtype=scale_dtype, dtype=dtype)

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """(codes, scale) of a layer."""
        return self.tensors[f"{name}.weight_codes"], self.tensors[f"{name}.weight_scale"]

    def _check_layer(self, name: str, d: Any) -> QuantConfig:
        """The layer's config, after checking that codes and scales are what the description says."""
        try:
            _check(d["kind"] in KINDS, f"kind: expected one of {', '.join(KINDS)}, got {d['kind']!r}")
            shape, dims = d["shape"], KINDS[d["kind"]].dims
            sizes = all(type(n) is int and 0 <= n < 2**40 for n in shape)
            _check(len(shape) == dims and sizes, f"shape: expected {dims} sizes, got {shape}")
            _check(d["dtype"] in FLOATS, f"dtype: expected a float type, got {d['dtype']!r}")
            _check(type(d["trits"]) is bool, f"trits: expected true or false, got {d['trits']!r}")
            for key, value in d.get("geometry", {}).items():
                each = value if isinstance(value, list) and len(value) == dims - 2 else [value]
                whole = all(type(n) is int and 0 <= n < 2**31 for n in each)
                _check(whole or (isinstance(value, str) and key.startswith("padding")),
                       f"{key}: expected whole numbers, got {value!r:.80}")  # fmt: skip
            config = QuantConfig.from_dict(d["config"])
            self.configs = {name: config}
            codes, scale = self.codes(name)
            empty = self.empty_layer(name)
            for key, got, want in (("codes", codes, empty.weight_codes), ("scale", scale, empty.weight_scale)):
                (shape, dtype), (right, kind) = _type(got), _type(want)
                _check((shape, dtype) == (right, kind), f"weight_{key}: expected {kind} {right}, got {dtype} {shape}")
            _check(sound(scale), "weight_scale: expected positive finite scales")
            check_codes(codes, empty.bits, empty.cols, len(config.weight.levels))
        except KeyError as error:
            raise self._error(f"layer {name}: {error.args[0]!r} is missing") from None
        except (ValueError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
            raise self._error(f"layer {name}: {error}") from None
        return config

    def converted(self, key: str, dtype: torch.dtype) -> Tensor:
        """The tensor in another type of its kind, as ``load_state_dict`` converts; PackedFileError where the kinds
        differ or a number does not survive."""
        t = self.tensors[key]
        if t.dtype == dtype:
            return t
        kind, theirs = ((d.is_floating_point, d.is_complex, d == torch.bool) for d in (dtype, t.dtype))
        if kind != theirs:
            raise self._error(f"{key}: expected {dtype}, the file has {t.dtype}")
        new = t.to(dtype)
        same = new.isfinite() == t.isfinite() if any(kind) else new.to(t.dtype) == t
        if not bool(same.all()):
            raise self._error(f"{key}: {dtype}, the model's type, does not hold numbers of the file's {t.dtype}")
        return new


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def load_packed(path: str | bytes | os.PathLike, model: nn.Module, *, verify: bool = True, activations: str = "float",
                mmap: bool = False, repack: bool | None = None) -> nn.Module:  # fmt: skip
    """Fills ``model`` from a packed file, in place, and returns it.

    Its layers (float, quantized or packed) that the file has packed are replaced, and hooks on them go on working; all
    other tensors are loaded, strictly, and extra state is set. As with ``load_state_dict`` all takes the types, the
    devices and the ``requires_grad`` of the model; what was on the meta device comes to the CPU.

    ``verify=False`` skips the checksum. ``activations``: as in ``pack_``. ``mmap=True``: codes and scales of layers on
    the CPU, and all tensors of a model on the meta device, are the file's own memory, mapped: nothing is read before it
    is used, and the file must not be changed in place while the model is in use (a change shows, a cut file kills the
    process). ``repack``: whether products with int8 activations have the codes put into the order of the kernels, at
    the first call, or read them as they lie, slower; None: unless ``mmap``, whose memory processes share.

    Raises PackedFileError naming what does not fit (names, shapes, types, grid, geometry, format version, damage), and
    then leaves the model as it was.
    """
    names = _Names(model, path)
    file = PackedFile(path, verify, mmap)
    with on_cpu(), torch.inference_mode(False), torch.no_grad(), exposed(names.model) as experts:
        names = _Names(model, path) if experts else names  # with the layers that these have now
        _Load(file, names, activations, not mmap if repack is None else repack).commit()
    return model


class _Load:
    """All that a load will do, checked; ``commit`` does it."""

    def __init__(self, file: PackedFile, names: _Names, activations: str, repack: bool) -> None:
        self.file, self.names, self.activations, self.repack = file, names, activations, repack
        self.new: dict[int, PackedLayer] = {}  # by the id of the module that it replaces
        self.values: dict[int, tuple[Tensor, Tensor, str]] = {}  # id of the model's tensor: (it, its value, key)
        self.extra: list[tuple[str, Any, Any]] = []  # (key, module, state)
        replaced: set[str] = set()  # keys of the model that go, and of the file that are seen to
        first: dict[int, str] = {}
        for name, d in file.layers.items():
            old: Any = names.layer(name)
            try:
                _check_fits(file, name, d, old)
                if (other := first.setdefault(id(old), name)) == name:
                    self.new[id(old)] = self._filled(name, old)
                elif d != file.layers[other] or not all(map(torch.equal, file.codes(name), file.codes(other))):
                    raise ValueError(f"is {other} in the model, and another layer in the file")
            except ValueError as error:
                raise file._error(f"layer {name}: {str(error).removeprefix(f'{name}: ')}") from None
            replaced |= {f"{name}.{k}" for k in own_keys(type(old)) | {"weight_codes", "weight_scale"} if k != "bias"}
            replaced |= {name} if KINDS[d["kind"]].held else set()  # the key of a weight that another module holds
        for name, layer in names.modules.items():
            if isinstance(layer, (QuantizedLayer, PackedLayer)) and id(layer) not in self.new:
                what = "packed" if isinstance(layer, PackedLayer) else "quantized"
                raise file._error(f"layer {name} is {what} in the model and not packed in the file")
        there = names.state.keys() - replaced
        given = (file.tensors.keys() | file.extra.keys()) - replaced
        lacks = {"the file": sorted(there - given)[:5], "the model": sorted(given - there)[:5]}
        if any(lacks.values()):
            raise file._error("; ".join(f"{who} lacks {', '.join(keys)}" for who, keys in lacks.items() if keys))
        for key in sorted(there):
            if (module := names.with_extra(key)) is not None:
                self.extra.append((key, module, file.tensors[key].clone() if key in file.tensors else file.extra[key]))
            elif key in file.extra:
                raise file._error(f"{key}: extra state in the file, a tensor in the model")
            else:
                self._value(key)
        left = [key for key, t in names.tensors.items() if t.is_meta and id(t) not in self.values
                and any(self._home(*home) for home in names.homes[id(t)])]  # fmt: skip
        if left:
            raise file._error(f"{', '.join(sorted(left)[:5])}: on the meta device in the model and not in the file "
                              "(buffers with persistent=False never are); make the model on a real device, or give "
                              "them values first")  # fmt: skip

    def _filled(self, name: str, old: Any) -> PackedLayer:
        weight = old.weight  # of a packed layer, too, it tells type and device
        layer = self.file.empty_layer(name, old, weight.dtype)
        device = torch.device("cpu") if weight.is_meta else weight.device
        codes, scale = self.file.codes(name)
        for key, t in (("weight_codes", codes), ("weight_scale", scale)):
            want, got = list(getattr(layer, key).shape), list(t.shape)
            _check(want == got, f"{key}: expected shape {want} with the geometry of this model, the file has {got}")
        layer.weight_codes, layer.weight_scale = codes.to(device), scale.to(device)
        layer.bias = getattr(old, "bias", None)
        layer.set_activations(self.activations)
        layer.repack = self.repack
        return layer

    def _value(self, key: str) -> None:
        file, target, t = self.file, self.names.held.get(key), self.file.tensors[key]
        if target is None:
            raise file._error(f"{key}: a state_dict hook of the model made it, it is no parameter or buffer")
        why = not_plain(target)
        if not why and any(n > 1 and step == 0 for n, step in zip(target.shape, target.stride(), strict=True)):
            why = "an expanded view"
        if why:
            raise file._error(f"{key}: is {why} in the model, which cannot be filled")
        if t.shape != target.shape:
            raise file._error(f"{key}: expected shape {tuple(target.shape)}, got {tuple(t.shape)}")
        value = file.converted(key, target.dtype)
        _, known, other = self.values.setdefault(id(target), (target, value, key))
        if known is not value and not torch.equal(_bits(known), _bits(value)):
            raise file._error(f"{key}: is one tensor with {other} in the model, and another in the file")

    def _home(self, module: nn.Module, child: str) -> tuple[nn.Module, str] | None:
        """Where a tensor of the model stands after the load; None for one that goes with its layer."""
        new = self.new.get(id(module))
        if new is None:
            held = id(module._modules.get(child)) in self.new  # a weight that the module holds for its layer
            return None if held else (module, child)
        return (new, child) if child == "bias" or child not in own_keys(type(module)) else None

    def commit(self) -> None:
        done: list[tuple[Any, Any]] = []
        for key, module, state in self.extra:  # first: this is the model's own code, and may raise
            try:
                done.append((module, module.get_extra_state()))
                module.set_extra_state(state)
            except Exception as error:
                for changed, before in reversed(done):
                    with contextlib.suppress(Exception):
                        changed.set_extra_state(before)
                raise self.file._error(f"{key}: {type(error).__name__}: {error}") from error
        paths = self.names.paths
        replace_modules(self.names.model, {path: new for old, new in self.new.items() for path in paths[old]})
        given: set[int] = set()
        for target, value, _ in self.values.values():
            if not target.is_meta:
                with torch.inference_mode(target.is_inference()), torch.no_grad():
                    target.copy_(value)
                continue
            value = value.clone() if value.data_ptr() in given else value  # one in the file, two in the model
            given.add(value.data_ptr())
            made = nn.Parameter(value, target.requires_grad) if isinstance(target, nn.Parameter) else value
            for home in self.names.homes[id(target)]:
                if (new := self._home(*home)) is not None:
                    setattr(*new, made)


def _check_fits(file: PackedFile, name: str, d: dict[str, Any], old: Any) -> None:
    """ValueError where the module of the model cannot be replaced by the file's layer of that name."""
    _check(old is not None, "the model has no such layer")
    kind: Any = KINDS[d["kind"]]
    check_replaceable(name, old)
    fits = replaceable(old) is kind or isinstance(old, (kind.quantized, kind.packed))
    _check(fits, f"expected {kind.plain.__name__} in the model, got {type(old).__name__}")
    shape, dtype = (old.shape, old.weight_dtype) if isinstance(old, PackedLayer) else _type(old.weight)
    _check(dtype is not None, f"its weight is {shape} in the model, which cannot be replaced")
    floats = str(dtype).removeprefix("torch.") in FLOATS
    _check(floats, f"a weight of type {dtype} in the model, expected one of {', '.join(FLOATS)}")
    bias, given = getattr(old, "bias", None), file.tensors.get(f"{name}.bias")
    _check((bias is None) == (given is None), f"only {'the file' if bias is None else 'the model'} has a bias")
    if bias is not None and given is not None:
        _check(given.shape == bias.shape, f"bias: expected shape {list(bias.shape)}, got {list(given.shape)}")
    found = tuple(d["shape"])
    _check(shape == found, f"expected a weight of shape {shape}, the file has {found}")
    other = file.configs[name]
    config = getattr(old, "config", None) or other
    geometry = kind.geometry_of(old)
    for what, own, of_file in (("grid", config.weight, other.weight),
                               ("activation", config.activation, other.activation),
                               ("geometry", geometry, d.get("geometry", geometry))):  # fmt: skip
        _check(own == of_file, f"{what}: expected {own}, the file has {of_file}")
