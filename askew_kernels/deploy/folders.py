"""A folder as transformers lays it out: ``config.json``, safetensors in one file or shards, and what lies beside.

Foreign folders are not trusted: shards lie in the folder, JSON and headers are checked, nothing is executed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn.packed import PackedLayer
from . import files, tensorfile
from .contents import Contents

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
COMPANIONS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
              "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template*",
              "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")  # fmt: skip
PARTS = "[0-9]_*"  # folders of what sentence-transformers puts behind the model
QUANTIZATION = "quantization_config"


def read_json(path: Path) -> dict[str, Any]:
    """Raises PackedFileError where it is no JSON object, FileNotFoundError."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise files.PackedFileError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise files.PackedFileError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def quantization_of(path: str | os.PathLike, method: str) -> bool:
    """Whether ``path`` is a folder whose config.json names this ``quant_method``."""
    try:
        found = read_json(Path(path) / CONFIG).get(QUANTIZATION)
    except (OSError, files.PackedFileError):
        return False
    return isinstance(found, dict) and found.get("quant_method") == method


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of ``model.safetensors`` or of the shards that its index names. Raises PackedFileError."""
    if not (folder / INDEX).is_file():
        return files.read_safetensors(folder / WEIGHTS).tensors
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise files.PackedFileError(f"{folder / INDEX}: weight_map: expected names of files by names of tensors")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise files.PackedFileError(f"{folder / INDEX}: expected names of safetensors in this folder, got {file!r}")
        tensors |= files.read_safetensors(folder / file).tensors
    if missing := sorted(places.keys() - tensors.keys()):
        raise files.PackedFileError(f"{folder / INDEX}: {missing[0]} is in no file")
    return tensors


def read_extra(folder: Path) -> dict[str, Any]:
    """The extra state that ``model.safetensors`` keeps; {} where shards stand in its place. Raises PackedFileError."""
    if (folder / INDEX).is_file():
        return {}
    return files.extra_of(files.read_safetensors(folder / WEIGHTS, mmap=True).metadata, folder / WEIGHTS)


def float_key(name: str, layer: PackedLayer) -> str:
    """The key of the weight of a layer that is written as floats."""
    return name if layer.kind.held else f"{name}.weight"


def dense_apart(contents: Contents, dense: Iterable[str]) -> tuple[dict[str, PackedLayer], dict[str, Tensor]]:
    """(layers that stay packed, all other tensors), those that match a pattern of ``dense`` as floats."""
    layers, tensors = dict(contents.layers), dict(contents.tensors)
    for name in [n for n in layers if any(fnmatchcase(n, pattern) for pattern in dense)]:
        layer = layers.pop(name)
        tensors[float_key(name, layer)] = layer.dequantize()
    return layers, tensors


def not_converted(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> list[str]:
    """``modules_to_not_convert`` of transformers: patterns of the modules with a float matrix."""
    matrices = [key.removesuffix(".weight") for key, t in tensors.items() if key.endswith(".weight") and t.dim() == 2]
    return [f"{re.escape(name)}$" for name in matrices if name not in layers]


def float_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name of a layer: weight} of all that stand as floats, as ``float_key`` names them."""
    matrices = {key: t for key, t in tensors.items() if t.is_floating_point() and t.dim() > 1}
    return {key.removesuffix(".weight"): t for key, t in matrices.items()}


def write_config(
    contents: Contents, path: Path, architecture: str | None, quantization: Mapping[str, Any], **changes: Any
) -> None:
    """``config.json``: the model's own, with how it is quantized; and what lies beside it (tokenizer, generation)."""
    config = dict(contents.architecture or ({"model_type": architecture} if architecture else {}))
    config |= {"dtype": main_type(contents), **changes, QUANTIZATION: dict(quantization)}
    config.pop("_name_or_path", None)  # a path of this machine
    config.pop("torch_dtype", None)  # what dtype was called before
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if contents.folder is not None and contents.folder.is_dir():
        for file in sorted(contents.folder.iterdir()):
            if file.is_file() and any(fnmatchcase(file.name, pattern) for pattern in COMPANIONS):
                shutil.copyfile(file, path / file.name)
            elif file.is_dir() and fnmatchcase(file.name, PARTS):
                shutil.copytree(file, path / file.name)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """``model.safetensors``, with extra state in its metadata. Raises PackedFileError where it cannot be written."""
    for name, t in tensors.items():
        if why := tensorfile.not_storable(t):
            raise files.PackedFileError(f"{path / WEIGHTS}: {name} {why}")
    try:
        tensorfile.write(path / WEIGHTS, tensors, files.metadata_with({"format": "pt"}, extra), "", lambda sums: "")
    except (OSError, ValueError, RuntimeError) as error:
        raise files.NotWritten(f"{path / WEIGHTS}: cannot be written ({error})") from None


def settle_ties(contents: Contents, compressed: Iterable[str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What transformers ties on loading, the matrices of word embeddings, is taken out of ``tensors`` but once. Where
    it would tie the weight of a compressed layer, which is no Parameter there, both stay: returns the change of the
    config that says so."""
    told = contents.architecture or {"tie_word_embeddings": False}
    tied = told.get("tie_word_embeddings", True)
    if tied and _shares(contents, compressed):
        return {"tie_word_embeddings": False}
    text = told.get("text_config")
    words = {config.get("vocab_size") for config in (told, text if isinstance(text, dict) else told)}
    for alias in contents.ties() if tied else ():
        if alias in tensors and tensors[alias].dim() == 2 and len(tensors[alias]) in words:
            del tensors[alias]
    return {}


def _shares(contents: Contents, names: Iterable[str]) -> bool:
    """Whether another layer or tensor has the weight of one of these layers."""
    holders = Counter(id(layer.weight_codes) for layer in contents.layers.values())
    for name in names:
        layer = contents.layers[name]
        like = [t for t in contents.tensors.values() if tuple(t.shape) == layer.shape and t.dtype == layer.weight_dtype]
        if holders[id(layer.weight_codes)] > 1:
            return True
        if like and any(torch.equal(t, weight) for weight in [layer.dequantize()] for t in like):
            return True
    return False


def main_type(contents: Contents) -> str:
    """The type of most weights that were trained."""
    sizes: dict[torch.dtype, int] = {}
    for layer in contents.layers.values():
        sizes[layer.weight_dtype] = sizes.get(layer.weight_dtype, 0) + layer.cols * layer.shape[0]
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
