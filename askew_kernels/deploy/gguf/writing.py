"""Packed models written as GGUF files."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...nn.packed import PackedLayer
from ..contents import Contents
from . import blocks
from .architectures import (
    ARCHITECTURES,
    GENERIC,
    Architecture,
    Names,
    by_model_type,
    by_name,
    completed,
    last,
    rope_factors,
    rotary_rows,
    to_fields,
)
from .blocks import BY_NUMBER
from .container import KEY, MOST_NAME, VERSION, Stored, library, plain, write_container
from .vocabulary import vocabulary


@torch.no_grad()
def export(contents: Contents, path: str | os.PathLike, *, architecture: str | None = None,
           dense: Iterable[str] = ()) -> None:  # fmt: skip
    """Writes ``contents`` as the file ``path``.

    architecture: the name of one of llama.cpp's, for a config.json whose ``model_type`` is not known; "askew": names as
    they are. dense: patterns of layers that are written as floats. What llama.cpp has no use for (BERT's pooler) is
    left out with a UserWarning that names it.

    Raises PackedFileError that names the layer: for levels, scales or columns that no type holds, tensors that the
    architecture has not, no tokenizer, numbers missing in config.json; ImportError without the package ``gguf``.
    """
    _Export(contents, architecture, tuple(dense)).write(path)


class _Export:
    def __init__(self, contents: Contents, architecture: str | None, dense: tuple[str, ...]) -> None:
        self.contents, self.dense = contents, dense
        known = library().GGMLQuantizationType.__members__
        self.known = lambda t: t.name in known
        self.architecture = self._architecture(architecture)
        self.names = Names(self.architecture, self._prefix())
        self.config: dict[str, Any] = {}
        self.fields: dict[str, Any] = {"general.architecture": GENERIC, "general.quantization_version": 2}
        self.stored: dict[str, Stored] = {}
        if self.architecture is not None:
            self._describe(self.architecture)
        self.left_out: list[str] = []
        self.said: dict[str, Any] = {"version": VERSION, "prefix": self.names.prefix, "layers": {}, "ties": {}}

    def _architecture(self, asked: str | None) -> Architecture | None:
        config = self.contents.architecture
        if asked == GENERIC or (asked is None and config is None):
            return None
        model_type = (config or {}).get("model_type")
        found = by_name(asked) if asked else by_model_type(str(model_type))
        if found is None:
            text = f"expected one of {', '.join(ARCHITECTURES)}, got {asked or model_type!r}; {GENERIC!r} writes "
            text += "every tensor under its own name, for readers that know the model"
            raise self.contents.error("architecture", text)
        if config is None:
            raise self.contents.error("architecture", f"{asked} needs the model's config.json beside the file")
        return found

    def _prefix(self) -> str:
        """What stands before the name of the tokens' embedding."""
        if (a := self.architecture) is None:
            return ""
        held = [*self.contents.layers, *(key.rpartition(".")[0] for key in self.contents.tensors)]
        found = {name.removesuffix(a.embedding) for name in held if f".{name}".endswith(f".{a.embedding}")}
        if len(found) != 1:
            raise self.contents.error(a.embedding, f"expected one such module in a {a.name}, got {sorted(found)}")
        return found.pop()

    def _describe(self, a: Architecture) -> None:
        source = self.contents
        try:
            self.config = completed(a, source.architecture or {})
            self.fields |= {"general.architecture": a.name, "general.name": str(self.config.get("model_type"))}
            self.fields |= to_fields(a, self.config)
            if (factors := rope_factors(self.config)) is not None:
                self.stored["rope_freqs.weight"] = plain(factors)
            self.fields |= vocabulary(source.folder, self._count(a), a.vocabulary)
            if a.vocabulary == "words":
                self.fields["tokenizer.ggml.token_type_count"] = int(self.config.get("type_vocab_size", 1))
                self.fields |= _pooling(source.folder, a)
        except (ValueError, KeyError, TypeError) as error:
            raise source.error("architecture", error if isinstance(error, ValueError) else repr(error)) from None

    def _count(self, a: Architecture) -> int:
        """Tokens of the model: rows of its embedding."""
        name = self.names.prefix + a.embedding
        layer = self.contents.layers.get(name)
        return layer.shape[0] if layer is not None else len(self.contents.tensors[f"{name}.weight"])

    def write(self, path: str | os.PathLike) -> None:
        if self.architecture is not None:
            self._share_head(self.architecture)
        ties = self._ties()
        for name, layer in self.contents.layers.items():
            self._one(name, ties, layer, None)
        for key, t in self.contents.tensors.items():
            self._one(key, ties, None, t)
        self._finish()
        types = Counter(BY_NUMBER[s.number].name for s in self.stored.values() if s.number in BY_NUMBER)
        known = library().LlamaFileType
        common = types.most_common(1)[0][0] if types else "F32"
        named = [
            kind for name, kind in known.__members__.items() if name.startswith((f"MOSTLY_{common}", f"ALL_{common}"))
        ]
        file_type = named[0] if named else known.GUESSED
        self.fields |= {"general.file_type": int(file_type), KEY: json.dumps(self.said)}
        write_container(path, self.fields, dict(sorted(self.stored.items(), key=lambda item: _natural(item[0]))))
        self.contents.left_out = self.left_out
        if self.left_out:
            warnings.warn(f"{self.contents.source}: llama.cpp has no use for {', '.join(self.left_out)}: left out",
                          stacklevel=3)  # fmt: skip

    def _ties(self) -> dict[str, str]:
        """{layer or key: the one that is written in its place}: of a known architecture only a head that is the
        embedding, which llama.cpp understands."""
        layers, ties = self.contents.layers, {}
        for name, first in self.contents.ties().items():
            same = name not in layers or (first in layers and layers[name].weight_scale is layers[first].weight_scale)
            a = self.architecture
            if same and (a is None or _module(name, layers) in a.heads):
                ties[name] = first
        return ties

    def _share_head(self, a: Architecture) -> None:
        """A packed head and a float embedding that had one weight are written once, as blocks."""
        embedding = self.names.prefix + a.embedding
        key = f"{embedding}.weight"
        for head in a.heads:
            layer, t = self.contents.layers.get(head), self.contents.tensors.get(key)
            if layer is None or t is None or layer.shape != t.shape or not torch.equal(layer.dequantize(), t):
                continue
            self.dense += (embedding,) if self._is_dense(head) else ()
            layers = {embedding if name == head else name: each for name, each in self.contents.layers.items()}
            tensors = {name: each for name, each in self.contents.tensors.items() if name != key}
            self.contents = replace(self.contents, layers=layers, tensors=tensors)
            self.said |= {"ties": {head: embedding}, "floats": [embedding]}
            self.said["layers"][head] = _description(layer)

    def _one(self, key: str, ties: Mapping[str, str], layer: PackedLayer | None, t: Tensor | None) -> None:
        """A layer by its name, or a tensor by its key."""
        a = self.architecture
        if layer is not None and key in ties:
            self.said["layers"][key] = _description(layer)
        if key in ties:
            self.said["ties"][key] = ties[key]
            return
        module, leaf = self._module(key, layer)
        if a is not None and any(fnmatchcase(module.removeprefix(self.names.prefix), p) for p in a.unused):
            self.left_out.append(key)
            return
        try:
            theirs = self.names.theirs(module) if module else ("" if a is None else None)
            if theirs is None or (a is not None and leaf not in ("weight", "bias")):
                assert a is not None
                known = ", ".join([*a.names, *a.heads])
                raise ValueError(f"{a.name} of llama.cpp has no such tensor; known are {known}")
            if layer is None or self._is_dense(module):
                floats: Any = t if layer is None else layer.dequantize()
                if floats.dim() == 0 and floats.dtype == torch.bfloat16:  # the package gguf reads no file with such
                    self.said.setdefault("scalars", {})[key] = "bfloat16"
                    floats = floats.float()
                stored = self._plain(module, theirs, leaf, floats)
            else:
                stored = self._block(theirs, layer)
                self.said["layers"][key] = _description(layer)
            for name, part in self._parts(theirs, stored):
                name = f"{name}.{leaf}" if name else leaf
                if len(name.encode()) > MOST_NAME:
                    raise ValueError(f"names in GGUF have up to {MOST_NAME} bytes, got {len(name.encode())}")
                self.stored[name] = part
        except ValueError as reason:
            raise self.contents.error(key, reason) from None

    def _is_dense(self, module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in self.dense)

    def _module(self, key: str, layer: PackedLayer | None) -> tuple[str, str]:
        """(module, leaf); a Parameter that has a name there counts as a module with a weight."""
        if layer is not None or (self.architecture is not None and key.endswith(self.architecture.parameters)):
            return key, "weight"
        module, _, leaf = key.rpartition(".")
        return module, leaf

    def _parts(self, theirs: str, stored: Stored) -> list[tuple[str, Stored]]:
        """What is one weight here and several there: of each expert the first rows, the next ones."""
        parts = self.architecture.split.get(last(theirs), ()) if self.architecture is not None else ()
        if not parts:
            return [(theirs, stored)]
        experts, rows, *rest = stored.shape
        data = stored.data.reshape(experts, len(parts), -1)
        shape, before = (experts, rows // len(parts), *rest), theirs.removesuffix(last(theirs))
        return [(before + part, Stored(stored.number, shape, data[:, i])) for i, part in enumerate(parts)]

    def _block(self, theirs: str, layer: PackedLayer) -> Stored:
        if self.architecture is not None and last(theirs) in self.architecture.floats:
            raise ValueError("llama.cpp reads it as float32: leave it out of quantize_, or write it with dense=…")
        try:
            t, data = blocks.encoded(layer, self.known)
        except ValueError as reason:
            raise ValueError(f"{reason}; for_export('gguf:…') trains what fits, dense=… writes floats") from None
        if (rows := rotary_rows(self.architecture, self.config, theirs, len(data))) is not None:
            data = data[rows.numpy()]
        experts = layer.shape[:1] if layer.form.stacked else ()
        return Stored(t.number, (*experts, len(data) // math.prod(experts), layer.cols), data)

    def _plain(self, module: str, theirs: str, leaf: str, t: Tensor) -> Stored:
        if (a := self.architecture) is not None:
            if a.plus_one and last(theirs).endswith("norm"):
                t = t.float() + 1
            if leaf == "weight" and module.endswith(a.transposed):
                t = t.t()
            if t.dim() < 2 or last(theirs) in a.floats or t.dtype not in (torch.float16, torch.bfloat16):
                if not torch.equal(t.float().to(t.dtype), t):
                    raise ValueError(f"float32 does not hold its numbers, of {t.dtype}")
                t = t.float()
            if (rows := rotary_rows(a, self.config, theirs, len(t))) is not None:
                t = t[rows]
        return plain(t)

    def _finish(self) -> None:
        """What the architecture has besides the model's own tensors, and what it must have."""
        if self.contents.extra:
            self.said["extra"] = self.contents.extra
        if (a := self.architecture) is None:
            return
        self.said["config"] = self.contents.architecture
        tied = self._tied_heads(a)
        for ours, theirs in a.heads.items():
            if a.one and f"{theirs}.weight" in self.stored:
                raise self.contents.error(ours, f"in {a.name} of llama.cpp it is {a.embedding}: expected one weight")
            if f"{theirs}.weight" not in self.stored and ours not in tied:
                raise self.contents.error(ours, "expected the head of the model, or tie_word_embeddings in config.json")

    def _tied_heads(self, a: Architecture) -> set[str]:
        tied = {_module(key, self.contents.layers) for key in self.said["ties"]}
        return tied | (set(a.heads) if self.config.get("tie_word_embeddings") else set())


def _natural(name: str) -> list[Any]:
    """blk.2 before blk.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _module(name: str, layers: Mapping[str, Any]) -> str:
    return name if name in layers else name.rpartition(".")[0]


def _description(layer: PackedLayer) -> dict[str, Any]:
    d = layer.description()
    return {key: d[key] for key in ("kind", "shape", "dtype", "geometry") if key in d}


def _pooling(folder: Path | None, a: Architecture) -> dict[str, Any]:
    """How sentence-transformers, where it wrote the folder, makes one vector of those of the tokens."""
    path = None if folder is None else folder / "1_Pooling" / "config.json"
    if path is None or not path.is_file():
        return {}
    said = json.loads(path.read_text("utf-8"))
    ways = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2, "pooling_mode_lasttoken": 3}
    chosen = [number for key, number in ways.items() if said.get(key)]
    return {f"{a.name}.pooling_type": chosen[0]} if len(chosen) == 1 else {}
