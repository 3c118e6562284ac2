"""A packed model as every format takes it, without its code: packed layers by name, and the tensors beside them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..nn.packed import PackedLayer
from . import files


@dataclass(repr=False)
class Contents:
    """layers: {name in the state_dict: packed layer on the CPU}, without the bias. tensors: the rest of the state_dict
    by its keys, biases too. extra: extra state that is JSON. architecture: transformers' config.json, where the model
    has one; folder: where that and a tokenizer lie. source: what errors begin with. left_out: layers
    and keys that the last export had no place for, and told.

    What is one in memory is one object: layers share ``weight_codes`` and ``weight_scale``, keys a tensor (``ties``).
    """

    source: str
    layers: dict[str, PackedLayer]
    tensors: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)
    architecture: dict[str, Any] | None = None
    folder: Path | None = None
    left_out: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """Without the tensors: what a notebook shows of an export."""
        lines = [f"  {name}: {layer!r}" for name, layer in self.layers.items()]
        lines += [f"  {key}: {t.dtype} {tuple(t.shape)}" for key, t in self.tensors.items()]
        lines += [f"  left out: {name}" for name in self.left_out]
        return "\n".join([f"Contents of {self.source}:", *lines])

    def error(self, name: str, text: object) -> files.PackedFileError:
        """That begins with the source and names a layer or a tensor."""
        return files.PackedFileError(f"{self.source}: {name}: {text}")

    def ties(self) -> dict[str, str]:
        """{name of a layer or key of a tensor: the first that is the same in memory}; only those that have another."""
        owners: dict[int, str] = {}
        held: list[tuple[str, Tensor]] = [(name, layer.weight_codes) for name, layer in self.layers.items()]
        held += self.tensors.items()
        firsts = {name: owners.setdefault(id(t), name) for name, t in held}
        return {name: first for name, first in firsts.items() if name != first}

    def weights(self) -> dict[str, Tensor]:
        """{name: the weight, in the type that was trained}, made anew."""
        return {name: layer.dequantize() for name, layer in self.layers.items()}


def read_contents(path: str | os.PathLike, verify: bool = True, mmap: bool = False) -> Contents:
    """Of a packed file; ``verify`` and ``mmap`` as in ``load_packed``. A ``config.json`` beside it that has a
    ``model_type`` is its architecture.

    Raises PackedFileError/FileNotFoundError, as ``PackedFile``, and for a config.json that is not JSON."""
    file = files.PackedFile(path, verify, mmap)
    return contents_of_file(file, read_architecture(file.path.parent), file.path.parent)


def contents_of_file(file: files.PackedFile, architecture: dict[str, Any] | None, folder: Path) -> Contents:
    """Of a file that is open; what is one there is one here."""
    tensors, layers = dict(file.tensors), {}
    for name in file.layers:
        layer = layers[name] = file.empty_layer(name)
        layer.bias = None
        layer.weight_codes, layer.weight_scale = file.codes(name)
        for key in ("weight_codes", "weight_scale"):
            del tensors[f"{name}.{key}"]
    return Contents(str(file.path), layers, tensors, file.extra, architecture, folder)


def read_architecture(folder: Path) -> dict[str, Any] | None:
    """What ``config.json`` of transformers says; None where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise files.PackedFileError(f"{path}: not JSON ({error})") from None
    return found if isinstance(found, dict) and "model_type" in found else None


def contents_of(model: nn.Module, folder: str | os.PathLike | None = None) -> Contents:
    """Of a packed model, as ``save_packed`` would write it; a transformers model brings its config. ``folder``: where
    its tokenizer lies, if not where transformers loaded it from. Nothing is copied but to the CPU."""
    model = files.wrapped_in(model)
    state = files.packed_state(model, type(model).__name__)
    cpu: dict[Any, Tensor] = {}

    def here(t: Tensor) -> Tensor:
        return cpu.setdefault(files.memory_of(t), t.detach().cpu())

    layers = {}
    for name, layer in state.layers.items():
        like = layers[name] = layer.kind.packed.like(
            layer,
            config=layer.config,
            trits=layer.trits,
            scale_dtype=layer.weight_scale.dtype,
            dtype=layer.weight_dtype,
        )
        like.bias = None
        like.weight_codes, like.weight_scale = here(layer.weight_codes), here(layer.weight_scale)
    config: Any = getattr(model, "config", None)
    architecture = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else None
    if architecture is not None:
        architecture["architectures"] = [type(model).__name__]  # which a model that was never saved does not say
    loaded_from = getattr(config, "_name_or_path", None) or ""  # of transformers: a folder, or a name on their hub
    home = Path(folder) if folder is not None else Path(loaded_from) if os.path.isdir(loaded_from) else None
    tensors = {key: here(t) for key, t in state.tensors.items()}
    return Contents(type(model).__name__, layers, tensors, dict(state.extra), architecture, home)


def write_contents(contents: Contents, path: str | os.PathLike) -> None:
    """A packed file, whole or not at all."""
    tensors, descriptions = files.stored(contents.layers)
    files.write_packed(path, contents.tensors | tensors, descriptions, contents.extra)
