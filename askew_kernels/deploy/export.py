"""Packed models in the formats of others, from Python and by ``python -m askew_kernels export``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .. import atomic
from ..command import error
from .contents import Contents, contents_of, read_contents
from .files import NotWritten, PackedFileError, on_cpu
from .formats import FORMATS, format_of


class Compared(NamedTuple):
    """A layer as it is and as another library reads it. difference: the largest |ours - theirs| in the type that was
    trained, 0 where they are equal bit for bit, None where the file has no such layer."""

    name: str
    shape: tuple[int, ...]
    difference: float | None


@on_cpu()
def contents_at(path: str | os.PathLike, mmap: bool = False, verify: bool = True) -> Contents:
    """Of a packed file or of one of any format in ``FORMATS``. Raises PackedFileError/FileNotFoundError/ImportError."""
    name = format_of(path) if os.path.exists(path) else None
    return read_contents(path, verify, mmap) if name is None else FORMATS[name].load().read(path)


@on_cpu()
def export_packed(model: nn.Module | str | os.PathLike, path: str | os.PathLike, to: str, *,
                  architecture: str | None = None, folder: str | os.PathLike | None = None,
                  dense: Iterable[str] = (), overwrite: bool = False) -> Contents:  # fmt: skip
    """Writes a packed model, or one in a file, in another format: every weight s c there is the trained one, bit for
    bit. Returns what was exported.

    to: one of ``FORMATS``. path: the file or the folder to write, whole or not at all; only ``overwrite`` replaces one
    that is there. architecture: as transformers' ``model_type``, where no config tells it. folder: where the tokenizer
    lies; of a file its own folder. dense: patterns of names of layers that are written as floats, because the format
    cannot hold them.

    Raises ValueError for an unknown format and for a pattern that fits no layer, PackedFileError naming the layer for
    what the format does not hold exactly, and where it cannot be written, FileExistsError, ImportError without the
    packages of ``askew_kernels[…]``.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r:.80}")
    if folder is not None and not os.path.isdir(folder):
        raise NotADirectoryError(f"folder: expected a folder with a tokenizer, got {os.fspath(folder)}")
    dense = tuple(dense)
    atomic.check_new(path, overwrite)  # before the work
    if isinstance(model, nn.Module):
        contents = contents_of(model, folder)
    else:
        contents = contents_at(model)
        contents.folder = contents.folder if folder is None else Path(folder)
    for pattern in dense:
        if not any(fnmatchcase(name, pattern) for name in contents.layers):
            first = next(iter(contents.layers), "none is packed")
            raise ValueError(f"dense: expected patterns of packed layers' names ({first}, …), none fits {pattern!r}")
    with torch.no_grad(), atomic.new_path(path, overwrite) as new:
        try:
            FORMATS[to].load().export(contents, new, architecture=architecture, dense=dense)
        except (OSError, PackedFileError) as error:  # of libraries, too, which know the name that is only for now
            text = str(error).replace(os.fspath(new), os.fspath(path))
            if isinstance(error, PackedFileError):  # or that it was not written
                raise type(error)(text) from error
            raise NotWritten(f"{path}: cannot be written ({text})") from error
    return contents


@on_cpu()
def compare(contents: Contents, path: str | os.PathLike, to: str) -> tuple[list[Compared], str]:
    """(layer by layer, what the format's own library reads in ``path``; the name of that library)."""
    weights, reader = FORMATS[to].load().dequantized(path)
    found = []
    for name, layer in contents.layers.items():
        theirs, difference = weights.get(name), None
        if theirs is not None:
            ours, theirs = layer.dequantize(), theirs.to(layer.weight_dtype)
            if ours.shape != theirs.shape:
                raise PackedFileError(f"{path}: {name}: {reader} reads shape {tuple(theirs.shape)}, expected "
                                      f"{tuple(ours.shape)}")  # fmt: skip
            equal = torch.equal(ours, theirs)
            difference = 0.0 if equal else float((ours.double() - theirs.double()).abs().max())
        found.append(Compared(name, layer.shape, difference))
    return found, reader


# ---- python -m askew_kernels export ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = "; ".join(f"{name}: {f.text}" for name, f in FORMATS.items())
    parser.add_argument("source", type=Path, metavar="IN", help="a packed file, or one of the formats below")
    parser.add_argument("--to", required=True, choices=list(FORMATS), metavar="FORMAT", help=formats)
    parser.add_argument("--out", required=True, type=Path, metavar="PATH")
    parser.add_argument("--architecture", metavar="NAME", help="model_type, where no config.json lies beside the file")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="where the tokenizer lies (default: beside IN)")
    parser.add_argument("--dense", action="append", default=[], metavar="PATTERN",
                        help="layers of such names as floats, where the format cannot hold them")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--verify", action="store_true", help="read it with the format's own library and compare")


def run(arguments: argparse.Namespace) -> int:
    a = arguments
    try:
        if not a.source.exists():
            raise FileNotFoundError(f"{a.source}: no such file")
        print(f"{a.source}: writing it as {a.to} …", file=sys.stderr, flush=True)
        contents = export_packed(a.source, a.out, a.to, architecture=a.architecture, folder=a.folder, dense=a.dense,
                                 overwrite=a.overwrite)  # fmt: skip
        files = [p for p in a.out.rglob("*") if p.is_file()] if a.out.is_dir() else [a.out]
        size = sum(p.stat().st_size for p in files)
        print(f"{a.out}: {a.to}, {len(contents.layers)} packed layers, {size:,} bytes")
        return verified(contents, a.out, a.to) if a.verify else 0
    except FileExistsError:
        error(f"export: --out {a.out}: is there already; --overwrite replaces it")
        return 2
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as problem:
        error(f"export: {problem}")
        return 1 if isinstance(problem, NotWritten) else 2


def verified(contents: Contents, path: Path, to: str) -> int:
    """Prints how each layer compares; 1 where one differs."""
    print(f"{path}: reading it with the library of {to} …", file=sys.stderr, flush=True)
    rows, reader = compare(contents, path, to)
    print(f"read by {reader}:")
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        missing = "left out" if row.name in contents.left_out else "is not there"
        told = missing if row.difference is None else f"differs by {row.difference:.3g}" if row.difference else "equal"
        print(f"  {row.name:<{width}}  {'x'.join(map(str, row.shape)):>12}  {told}")
    equal = sum(row.difference == 0.0 for row in rows)
    left = sum(row.difference is None and row.name in contents.left_out for row in rows)
    print(f"{equal} of {len(rows)} layers equal bit for bit{f', {left} left out' if left else ''}")
    return int(equal + left < len(rows))
