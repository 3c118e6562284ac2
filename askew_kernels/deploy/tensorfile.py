"""safetensors files with the means of torch and numpy; the library of that name reads them, too.

Eight bytes, little end first, say how long the header is; the header is JSON, {name: {dtype, shape, data_offsets}} and
``__metadata__`` {text: text}; the bytes of the tensors follow without gaps. Here every path is taken that the system
takes, CRC-32 sums of the bytes cost no pass of their own, and nothing is mapped unless that is asked.
"""

from __future__ import annotations

import json
import math
import mmap as mapping
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import atomic

PIECE = 1 << 22  # bytes of a tensor that have a CRC-32 of their own
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Sums = dict[str, list[int]]  # CRC-32 of each piece of each tensor


class TensorFile(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sums: Sums


def not_plain(t: Tensor) -> str:
    """What ``t`` is where it is not an ordinary dense tensor with memory of its own; else nothing."""
    if is_lazy(t):
        return "not initialised yet"
    if is_traceable_wrapper_subclass(t) or hasattr(t, "fake_mode"):
        return f"a {type(t).__name__}"
    if t.is_nested:
        return "a nested tensor"
    return "" if t.layout is torch.strided else f"of layout {t.layout}"


def not_storable(t: Tensor) -> str:
    """Why ``t`` cannot stand in a file, to follow its name; else nothing."""
    if why := not_plain(t):
        return f"is {why}, which a file cannot hold"
    if t.is_meta:
        return "is on the meta device, it has no values to save"
    return "" if t.dtype in NAMES else f"is of type {t.dtype}, which a file cannot hold"


def _pieces(t: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor on the CPU."""
    data = t.reshape(-1).view(torch.uint8).numpy().data
    return (data[i : i + PIECE] for i in range(0, len(data), PIECE))


def _crcs(pieces: Iterable[tuple[str, memoryview]]) -> Sums:
    """CRC-32 of each (name, piece), by all threads, while the next is written or read (zlib lets others run)."""

    def start(pool: ThreadPoolExecutor, piece: memoryview) -> Callable[[], int]:
        try:
            return pool.submit(crc32, piece).result
        except RuntimeError:  # the interpreter is ending, and starts no thread any more
            return partial(crc32, piece)

    sums: Sums = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, result in [(name, start(pool, piece)) for name, piece in pieces]:
            sums.setdefault(name, []).append(result())
    return sums


def write(path: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], mark: str, seal: Any) -> None:
    """Writes the file, whole or not at all. ``seal(sums)``, a text, takes the place of the first ``mark`` in the header
    once the sums are known. Raises OSError, and ValueError for a name that the format keeps for itself."""
    if METADATA in tensors:
        raise ValueError(f"a tensor cannot have the name {METADATA}")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so all of them are aligned
    header: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name in order:
        t, start, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic.replacing(path) as file:

        def written() -> Iterator[tuple[str, memoryview]]:
            for name in order:
                for piece in _pieces(tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous()):
                    file.write(piece)
                    yield name, piece

        file.write(len(text).to_bytes(8, "little") + text)
        sums = _crcs(written())
        file.seek(8 + text.index(mark.encode()))
        file.write(seal(sums).encode())


def read(path: str | bytes | os.PathLike, *, sums: bool = False, mmap: bool = False) -> TensorFile:
    """The tensors of a file, each in memory of its own on the CPU; with ``mmap`` in the file's, mapped copy on write.
    ``sums``: the CRC-32 sums too. Raises OSError, and ValueError where it is not a whole safetensors file."""
    with open(os.fsdecode(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        begin = 8 + length
        try:
            entries, metadata = _header(file.read(length), size - begin)
            tensors = {name: torch.empty(shape, dtype=dtype, device="cpu")
                       for name, (dtype, shape, _) in entries.items() if not mmap or 0 in shape}  # fmt: skip
        except (TypeError, KeyError, AttributeError, RuntimeError, RecursionError, OverflowError) as error:
            raise ValueError(f"its header is damaged: {type(error).__name__} {error}") from None
        whole = mapping.mmap(file.fileno(), 0, access=mapping.ACCESS_COPY) if mmap else None
        file.seek(begin)

        def pieces() -> Iterator[tuple[str, memoryview]]:
            for name, (dtype, shape, start) in entries.items():
                if whole is not None and name not in tensors:
                    place, count = begin + start, math.prod(shape)
                    t = torch.frombuffer(whole, dtype=dtype, count=count, offset=place).reshape(shape)
                    tensors[name] = t.clone() if place % dtype.itemsize else t  # another writer's: at any byte
                for piece in _pieces(tensors[name]):
                    if whole is None and file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                        raise ValueError("it was cut while it was read")
                    yield name, piece

        found = _crcs(pieces()) if sums else {name: [] for name, _ in pieces()}
    return TensorFile({name: tensors[name] for name in entries}, metadata, found)


def _header(text: bytes, size: int) -> tuple[dict[str, tuple[torch.dtype, list[int], int]], dict[str, str]]:
    """({name: (dtype, shape, first byte)} in the order of the bytes, metadata), checked against the rest's size."""
    header = json.loads(text)
    metadata = header.pop(METADATA, {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    entries, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name}: type {entry['dtype']!r} is none of {', '.join(DTYPES)}")
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in [*shape, start]) or start != end:
            raise ValueError(f"{name}: shape {shape} from byte {start}, where {end} was expected")
        end += math.prod(shape) * dtype.itemsize
        if stop != end:
            raise ValueError(f"{name}: {entry['dtype']} {shape} ends at byte {end}, the header says {stop}")
        entries[name] = (dtype, shape, start)
    if end != size:
        raise ValueError(f"{size} bytes of tensors, the header says {end}")
    return entries, metadata
