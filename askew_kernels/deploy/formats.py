"""Formats of others, one entry each: ``export``, ``inspect`` and ``convert`` read this table.

A format's module has (``contents.Contents`` is a packed model without its code):

* ``export(contents, path, *, architecture=None, dense=())``: writes the file or the folder ``path``, which is not there
  (the caller puts it in its place, whole). ``architecture``: the name of one, where ``contents`` brings no config;
  ``dense``: patterns of layers that are written as floats, because they do not fit. Raises PackedFileError that names
  the layer for what the format does not hold bit for bit.
* ``is_one(path)``: whether a file or a folder is of this format, by its first bytes or its config.
* ``read(path)``: its contents, as packed layers of this library. Nothing it says is trusted, nothing executed.
* ``dequantized(path)``: ({name of a layer: its weight}, who says so), made by the format's own library.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Format:
    module: str  # in this room; imported when it is asked for
    extra: str  # what installs the packages that it needs
    text: str  # who reads it

    def load(self) -> Any:
        return importlib.import_module(f".{self.module}", __package__)


FORMATS = {
    "gguf": Format("gguf", "gguf", "one file for llama.cpp and Ollama"),
    "compressed-tensors": Format("compressed_tensors", "compressed-tensors", "a folder for vLLM, SGLang, transformers"),
    "transformers": Format("hf", "transformers", "a folder for AutoModel.from_pretrained, with this library's layers"),
    "metal": Format("metal", "transformers", "a folder for transformers on Apple's GPUs, in the layout of MLX"),
    "bitnet": Format(
        "bitnet", "transformers", "a folder for transformers' BitNet layers: ternary weights, 8-bit inputs"
    ),
    "onnx": Format("to_onnx", "onnx", "one file for onnxruntime"),
    "torchao": Format("to_torchao", "torchao", "one safetensors file of torchao's tensors"),
}


def format_of(path: str | os.PathLike) -> str | None:
    """The name of the format that a file or a folder has; None for one of this library's, and for any other."""
    if not (os.path.isfile(path) or os.path.isdir(path)):  # a pipe, which whoever reads its first bytes waits for
        return None
    return next((name for name, f in FORMATS.items() if f.load().is_one(path)), None)
