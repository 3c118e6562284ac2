"""transformers: folders for ``from_pretrained`` with this library's layers, packed or in training.

``config.json`` says what the layers are (``quantization_config`` with ``quant_method`` "askew"), ``model.safetensors``
is a packed file. transformers finds this method as soon as both libraries are imported, in any order; ``AskewConfig``
and ``AskewQuantizer`` are its side of it, ``attach`` makes ``save_pretrained`` and ``Trainer`` see a model that was
quantized by hand.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.layers import QuantizedLayer
from ...nn.packed import PackedLayer
from .. import files, folders
from ..contents import Contents, contents_of_file
from . import registration

METHOD = "askew"
VERSION = 1
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM",
                "AutoModelForSequenceClassification", "AutoModelForImageClassification",
                "AutoModelForSpeechSeq2Seq")  # fmt: skip
ALONE = ("AskewConfig", "AskewQuantizer", "attach")  # of the part that needs transformers


def __getattr__(name: str) -> Any:
    if name not in ALONE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.quantizer"), name)
    except ImportError as error:
        raise ImportError(f'{name} needs transformers: pip install "askew_kernels[transformers]" ({error})') from None


# ---- what config.json says -------------------------------------------------------------------------------------------


def describe(layers: Mapping[str, nn.Module], aliases: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``quantization_config`` of these quantized and packed layers: groups of what they have in common, with the names
    and the shapes of the weights of each. aliases: {key of a tensor: the key of the same one that is in the file}."""
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        of_layer = dict(_description(layer))
        shape = of_layer.pop("shape")
        group = groups.setdefault(json.dumps(of_layer, sort_keys=True), {**of_layer, "layers": {}})
        group["layers"][name] = shape
    made = {"quant_method": METHOD, "version": VERSION, "groups": list(groups.values())}
    return made | ({"aliases": dict(aliases)} if aliases else {})


def _description(layer: Any) -> dict[str, Any]:
    if isinstance(layer, PackedLayer):
        scale_dtype = str(layer.weight_scale.dtype).removeprefix("torch.")
        return {"packed": True, "scale_dtype": scale_dtype, **layer.description()}
    shape = list(layer.weight.shape)
    return {"packed": False, "kind": layer.kind.name, "config": layer.config.to_dict(), "shape": shape}


def descriptions(told: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """{name of a layer: all that ``describe`` said of it}. Raises PackedFileError."""
    if told.get("version") != VERSION:
        raise files.PackedFileError(f"{where}: version {told.get('version')!r} of quant_method {METHOD}; this release "
                                    f"reads version {VERSION}")  # fmt: skip
    groups, found = told.get("groups"), dict[str, dict[str, Any]]()
    sound = isinstance(groups, list) and all(isinstance(g, dict) and isinstance(g.get("layers"), dict) for g in groups)
    if not sound:
        raise files.PackedFileError(f"{where}: groups: expected a list of groups of layers, got {groups!r:.80}")
    for group in groups or []:
        if type(group.get("packed")) is not bool or not isinstance(group.get("config"), dict):
            raise files.PackedFileError(f"{where}: groups: expected packed and config of each, got {group!r:.200}")
        common = {key: value for key, value in group.items() if key != "layers"}
        found |= {name: {**common, "shape": shape} for name, shape in group["layers"].items()}
    return found


def shared_parts(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """{key of codes or scales: the first that is the same in memory} of packed layers that share theirs."""
    owners: dict[Any, str] = {}
    parts = [(f"{name}.{key}", getattr(layer, key)) for name, layer in layers.items() if isinstance(layer, PackedLayer)
             for key in ("weight_codes", "weight_scale")]  # fmt: skip
    firsts = {key: owners.setdefault(files.memory_of(t), key) for key, t in parts}
    return {key: first for key, first in firsts.items() if key != first}


# ---- the format ------------------------------------------------------------------------------------------------------


def export(contents: Contents, path: str | os.PathLike, *, architecture: str | None = None,
           dense: Iterable[str] = ()) -> None:  # fmt: skip
    """The folder ``path`` for ``from_pretrained``: ``model.safetensors``, which is a packed file, ``config.json`` and
    what lay beside the model. Every packed layer fits. Raises PackedFileError."""
    path, (layers, tensors) = Path(path), folders.dense_apart(contents, dense)
    ties = contents.ties()
    aliases = shared_parts(layers) | {key: first for key, first in ties.items() if key in tensors}
    for name, layer in layers.items():
        tensors |= {f"{name}.weight_codes": layer.weight_codes, f"{name}.weight_scale": layer.weight_scale}
    path.mkdir()
    descriptions_ = {name: layer.description() for name, layer in layers.items()}
    files.write_packed(path / folders.WEIGHTS, tensors, descriptions_, contents.extra)
    folders.write_config(contents, path, architecture, describe(layers, aliases))


def is_one(path: str | os.PathLike) -> bool:
    return folders.quantization_of(path, METHOD)


def read(path: str | os.PathLike) -> Contents:
    """A folder that ``export`` or ``save_pretrained`` of a packed model wrote. Raises PackedFileError naming the layer,
    FileNotFoundError."""
    folder = Path(path)
    config = folders.read_json(folder / folders.CONFIG)
    told = config.pop(folders.QUANTIZATION, None)
    if not isinstance(told, dict) or told.get("quant_method") != METHOD:
        raise files.PackedFileError(f"{path}: config.json names no quant_method {METHOD!r}")
    layers = descriptions(told, str(path))
    for name, d in layers.items():
        if d.get("packed") is not True:
            raise files.PackedFileError(f"{path}: {name} is in training, not packed; load it with from_pretrained, "
                                        "then hard_quantize_ and pack_ it")  # fmt: skip
    aliases = told.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(kept, str) for kept in aliases.values()):
        raise files.PackedFileError(f"{path}: aliases: expected keys of tensors by keys, got {aliases!r:.80}")
    file = files.PackedFile.of(path, folders.read_tensors(folder), layers, aliases, folders.read_extra(folder))
    return contents_of_file(file, config if "model_type" in config else None, folder)


def dequantized(path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """The weights of the model that transformers makes of the folder; ImportError without it, PackedFileError where
    it makes none."""
    try:
        import transformers
    except ImportError:
        raise ImportError('reading with transformers needs it: pip install "askew_kernels[transformers]"') from None
    model_class = _model_class(transformers, Path(path))
    model = model_class.from_pretrained(str(path))
    weights = folders.float_weights({name: p.detach() for name, p in model.named_parameters()})
    packed = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedLayer)}
    weights |= {name: layer.dequantize() for name, layer in packed.items()}
    return weights, f"transformers {transformers.__version__}"


def _model_class(transformers: Any, path: Path) -> Any:
    """The class that the folder names or, where it names none, the first that has all its layers. Raises
    PackedFileError where there is none."""
    config = folders.read_json(path / folders.CONFIG)
    named = config.get("architectures") or [None]
    found = getattr(transformers, str(named[0]), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if "model_type" not in config:
        raise files.PackedFileError(f"{path}: config.json has no model_type, so that transformers cannot load it")
    names = descriptions(config[folders.QUANTIZATION], str(path)).keys()
    told = transformers.AutoConfig.from_pretrained(str(path))
    del told.quantization_config
    for auto in AUTO_CLASSES:
        kind: Any = getattr(transformers, auto)
        with contextlib.suppress(ValueError), torch.device("meta"):  # there is no such class for this model_type
            model = kind.from_config(told)
            if names <= {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}:
                return type(model)
    raise files.PackedFileError(f"{path}: architectures: expected a model class of transformers, got {named!r:.80}")


def layers_of(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the quantized and the packed layers, under all their names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: m for name, m in named if isinstance(m, (QuantizedLayer, PackedLayer))}


registration.when_imported("transformers.quantizers.auto", f"{__name__}.quantizer")
