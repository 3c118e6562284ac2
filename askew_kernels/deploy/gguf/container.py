"""The GGUF file: a header of named values, then named tensors. Read without trust, written by the package ``gguf``.

The layout is that of the specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import PackedFileError
from .blocks import BY_NUMBER

Array = Any  # numpy's
KEY, VERSION = "askew_kernels", 1  # of the JSON that says of a model what GGUF does not
MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {  # types of tensors that are no blocks: (name, torch's type)
    0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16), 28: ("F64", torch.float64),
    24: ("I8", torch.int8), 25: ("I16", torch.int16), 26: ("I32", torch.int32), 27: ("I64", torch.int64),
}  # fmt: skip
OTHERS = {  # types whose weights are no levels of a grid times a scale, or levels of none of ours
    3: "Q4_1", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 40: "NVFP4",
}  # fmt: skip
PLAIN_NUMBERS = {dtype: number for number, (_, dtype) in PLAIN.items()}
MOST_NAME, MOST_DIMS, MOST_TEXTS = 63, 4, 1 << 22  # ggml's limits of a tensor; more texts than any vocabulary has


@dataclass(frozen=True)
class Texts:
    """An array of texts, which nobody here reads."""

    count: int


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor stands; ``shape`` as torch has it, the rows of a matrix first."""

    name: str
    number: int  # of its type
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def type_name(self) -> str:
        return BY_NUMBER[self.number].name if self.number in BY_NUMBER else PLAIN[self.number][0]


@dataclass(frozen=True)
class Container:
    path: Path
    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def bytes_of(self, info: TensorInfo) -> Array:
        """(nbytes,) uint8 in memory of its own."""
        data = np.empty(info.nbytes, np.uint8)
        with open(self.path, "rb") as file:
            file.seek(info.start)
            if file.readinto(data.data) != info.nbytes:
                raise PackedFileError(f"{self.path}: {info.name}: the file was cut while it was read")
        return data

    def tensor(self, info: TensorInfo) -> Tensor:
        """Of a plain type."""
        if not info.nbytes:  # NumPy's has no strides that torch could view
            return torch.empty(info.shape, dtype=PLAIN[info.number][1])
        data = torch.from_numpy(self.bytes_of(info))
        return data.view(PLAIN[info.number][1]).reshape(info.shape)


def is_gguf(path: str | os.PathLike) -> bool:
    """By its first four bytes."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def open_container(path: str | os.PathLike) -> Container:
    """The header, checked against the size of the file before anything of a size that it names is made.

    Raises FileNotFoundError, and PackedFileError for what is no whole GGUF file of whole tensors."""
    shown = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{shown}: no such file")
    if not is_gguf(path):
        raise PackedFileError(f"{shown}: is no GGUF file")
    try:
        with open(path, "rb") as file:
            return _Header(file, os.fstat(file.fileno()).st_size).container(Path(path))
    except (OSError, ValueError, struct.error) as error:
        raise PackedFileError(f"{shown}: no whole GGUF file ({error})") from None


class _Header:
    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size

    @property
    def left(self) -> int:
        return self.size - self.file.tell()

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.file.read(struct.calcsize(f"<{form}")))[0]

    def count(self, what: str, least: int, most: int | None = None) -> int:
        """How many of at least that many bytes each follow."""
        found = self.number("Q")
        if found * least > self.left or (most is not None and found > most):
            raise ValueError(f"{what}: {found} of them, {self.left} bytes are left")
        return found

    def text(self, what: str, most: int | None = None) -> str:
        return self.file.read(self.count(what, 1, most)).decode()

    def value(self, name: str, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text(name)
        if kind != ARRAY:
            raise ValueError(f"{name}: a value of the unknown type {kind}")
        if (inner := self.number("I")) in SCALARS:
            dtype = np.dtype(SCALARS[inner]).newbyteorder("<")
            return np.frombuffer(self.file.read(self.count(name, dtype.itemsize) * dtype.itemsize), dtype)
        if inner != STRING:
            raise ValueError(f"{name}: an array of the type {inner}")
        texts = Texts(self.count(name, 8, MOST_TEXTS))
        for _ in range(texts.count):
            self.file.seek(self.count(name, 1), os.SEEK_CUR)
        return texts

    def container(self, path: Path) -> Container:
        self.file.seek(len(MAGIC))
        if (version := self.number("I")) not in VERSIONS:
            raise ValueError(f"version {version}; versions 2 and 3, little-endian, are read")
        n_tensors, n_fields = self.count("tensors", 24), self.count("values", 13)
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = self.text("the name of a value")
            if name in fields:
                raise ValueError(f"{name} stands there twice")
            fields[name] = self.value(name, self.number("I"))
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment: expected a power of two, got {alignment!r:.80}")
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(n_tensors):
            name = self.text("the name of a tensor", 1 << 16)
            dims = self.number("I")
            if name in found or dims > MOST_DIMS:
                raise ValueError(f"{name}: " + (f"{dims} dimensions" if name not in found else "stands there twice"))
            shape = tuple(self.number("Q") for _ in range(dims))[::-1]
            found[name] = self.number("I"), shape, self.number("Q")
        begin, end = _aligned(self.file.tell(), alignment), 0
        tensors = {}
        for name, (number, shape, start) in found.items():
            if start != end:  # as ggml's own reader: one after another, so none covers another
                raise ValueError(f"{name}: begins at byte {start} of the data, where {end} was expected")
            if max(shape, default=0) > 8 * self.size:  # where another dimension is 0
                raise ValueError(f"{name}: shape {shape} in a file of {self.size} bytes")
            nbytes = _nbytes(name, number, shape)
            if begin + start + nbytes > self.size:
                raise ValueError(f"{name}: ends at byte {begin + start + nbytes} of {self.size}")
            tensors[name] = TensorInfo(name, number, shape, begin + start, nbytes)
            end = _aligned(start + nbytes, alignment)
        return Container(path, fields, tensors)


def _aligned(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _nbytes(name: str, number: int, shape: tuple[int, ...]) -> int:
    if number in PLAIN:
        return math.prod(shape) * PLAIN[number][1].itemsize
    if (t := BY_NUMBER.get(number)) is None:
        known = ", ".join([t.name for t in BY_NUMBER.values()] + [name for name, _ in PLAIN.values()])
        raise ValueError(f"{name}: expected a tensor of {known}, got {OTHERS.get(number, f'type number {number}')}")
    if not shape or shape[-1] % t.block:
        raise ValueError(f"{name}: {t.name} of shape {shape}, its rows are no multiple of {t.block}")
    return math.prod(shape) // t.block * t.size


# ---- writing ---------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What is written of a tensor: the number of its type, its shape, its bytes."""

    number: int
    shape: tuple[int, ...]
    data: Array


def plain(t: Tensor) -> Stored:
    """Raises ValueError for a type that GGUF has not."""
    if (number := PLAIN_NUMBERS.get(t.dtype)) is None:
        raise ValueError(f"GGUF has no tensors of {t.dtype}")
    if t.dim() > MOST_DIMS:
        raise ValueError(f"GGUF's tensors have up to {MOST_DIMS} dimensions, got {t.dim()}")
    return Stored(number, tuple(t.shape), t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f'GGUF needs the package gguf: pip install "askew_kernels[gguf]" ({error})') from None
    return gguf


def write_container(path: str | os.PathLike, fields: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """``fields``: general.architecture among them; ints are written as uint32, in lists as int32, floats as
    float32. Raises OSError."""
    gguf = library()
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(os.fspath(path), fields["general.architecture"])
    try:
        for name, value in fields.items():
            if name != "general.architecture":  # the writer's own
                _add(writer, kinds, name, value)
        for name, t in tensors.items():
            # its own check of sizes is for the types that it knows
            writer.add_tensor_info(name, t.shape, np.dtype(np.float32), t.data.nbytes, t.number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors.values():
            writer.write_tensor_data(np.ascontiguousarray(t.data))
    finally:
        writer.close()


def _add(writer: Any, kinds: Any, name: str, value: Any) -> None:
    scalar = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    if type(value) in scalar:
        writer.add_key_value(name, value, scalar[type(value)])
    elif isinstance(value, Sequence) and value:
        writer.add_array(name, value)  # ints as int32
