"""``python -m askew_kernels convert``: a safetensors state_dict, or a file of another format, to a packed file."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import atomic, ops, quant
from ..command import error
from ..nn.kinds import KINDS, chosen, own_keys
from ..quant import QuantConfig, compute_scale
from ..quant.grids import GRIDS
from . import files
from .contents import read_contents, write_contents
from .export import contents_at
from .formats import FORMATS, format_of
from .inspect import report_of_contents


@files.on_cpu()
@torch.no_grad()
def convert_file(source: str | os.PathLike, target: str | os.PathLike, config: QuantConfig, only: str = "*",
                 force: bool = False, kinds: Mapping[str, str] | None = None,
                shown: Callable[[str], None] = lambda name: None) -> None:  # fmt: skip
    """Packs the weights of a safetensors state_dict: ``<name>.weight`` of as many dimensions as a kind of layer has
    (``nn.KINDS``), name like ``only``. kinds: {pattern of names: kind}, for what the number does not tell: without it
    two dimensions are a linear layer, not an embedding or a Conv1D; weights of experts, ``<name>``, are taken where it
    says so. shown: called with each layer's name before it is packed.

    Scales come from ``<name>.weight_scale``, as frozen quantized layers save it, else from the config's rule. Raises
    PackedFileError naming the layer where a weight is not on its levels (unless ``force`` rounds it), is not finite, or
    of a type that layers do not have; where nothing matches; for a pattern that fits no weight of its kind.
    """
    _check_target(target)
    found = files.read_safetensors(source)
    if files.KEY in found.metadata:
        raise files.PackedFileError(f"{source}: is packed already")
    tensors: dict[str, Tensor] = found.tensors
    layers, unused = {}, {pattern: chosen(kind) for pattern, kind in (kinds or {}).items()}
    for key, w in list(tensors.items()):
        name = key.removesuffix(".weight")
        fitting = [kind for kind in KINDS.values() if kind.dims == w.dim() and kind.held == (name == key)]
        said = [pattern for pattern in kinds or {} if fnmatch.fnmatchcase(name, pattern)]
        for pattern in said:
            if any(kind in fitting for kind in unused.get(pattern, ())):
                del unused[pattern]
        of = chosen((kinds or {})[said[0]]) if said else fitting if name != key else []
        kind = next((kind for kind in of if kind in fitting), None)
        if kind is None or not w.is_floating_point() or not fnmatch.fnmatchcase(name, only):
            continue
        shown(name)
        try:
            ops.check_float_tensor("weight", w)
            scale = tensors.get(f"{name}.weight_scale")
            if scale is None or not bool((scale > 0).all()):  # a layer that was never used has none yet
                c = config
                matrix = kind.form.matrix(w)
                scale = compute_scale(
                    matrix, c.weight, c.scale, c.granularity, c.group_size, c.sawb_coefficients, c.scale_dtype
                )
            layer = kind.packed.like(kind.of_shape(w.shape, False), config=config, dtype=w.dtype)
            layer.fill(w, scale.float(), force)
        except (ValueError, TypeError) as error:
            raise files.PackedFileError(f"{source}: {name}: {error}") from None
        for own in (key, *(f"{name}.{own}" for own in own_keys(kind.quantized) - {"bias"})):
            tensors.pop(own, None)
        tensors[f"{name}.weight_codes"], tensors[f"{name}.weight_scale"] = layer.weight_codes, layer.weight_scale
        layers[name] = layer.description()
        layers[name].pop("geometry", None)  # of which a state_dict says nothing
    for pattern in unused:
        told = f"{pattern}={(kinds or {})[pattern]}"
        raise files.PackedFileError(f"{source}: kinds: expected patterns of names of such layers, none fits {told!r}")
    if not layers:
        dims = " or ".join(map(str, sorted({kind.dims for kind in KINDS.values()})))
        raise files.PackedFileError(f"{source}: no <name>.weight of {dims} dimensions matches {only!r}")
    files.write_packed(target, tensors, layers)


def _check_target(target: str | os.PathLike) -> None:
    """PackedFileError before any work."""
    try:
        atomic.check(target)
    except OSError as problem:
        raise files.PackedFileError(f"{target}: cannot be written ({problem.strerror or problem})") from None


def _is_packed(path: Path) -> bool:
    try:
        return files.KEY in files.read_safetensors(path, mmap=True).metadata
    except files.PackedFileError:
        return False


def _telling(source: Path, every: float = 2.0) -> Callable[[str], None]:
    """What says on stderr, now and then, which layer is packed; of quick work nothing."""
    last = time.monotonic()

    def tell(name: str) -> None:
        nonlocal last
        if time.monotonic() - last > every:
            last = time.monotonic()
            print(f"{source}: packing {name} …", file=sys.stderr, flush=True)

    return tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN",
                        help="safetensors, keys as in a state_dict; or a format that export writes")  # fmt: skip
    parser.add_argument("target", type=Path, metavar="OUT")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--bits", type=int, help="uniform grid of 2 to 8 bits")
    grid.add_argument("--grid", choices=[name for name, kind in GRIDS.items() if not fields(kind)])  # type: ignore[arg-type]
    parser.add_argument("--scale", help="rule for weights without a weight_scale (default: absmax; of --grid its own)")
    parser.add_argument("--group-size", type=int, metavar="G", help="a scale for each G weights; default each channel")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of the layers to pack, with * and ?")
    parser.add_argument("--kind", action="append", default=[], metavar="PATTERN=KIND", help="of layers of such names")
    parser.add_argument("--force", action="store_true", help="round weights that are not on their levels")


def run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.bits is None and arguments.grid is None:
            name = format_of(arguments.source)
            if name is None:
                if os.path.isfile(arguments.source) and _is_packed(arguments.source):
                    raise ValueError(f"{arguments.source}: is packed already; export writes it in other formats")
                raise ValueError("a state_dict of floats needs --bits or --grid; files of "
                                 f"{', '.join(FORMATS)} bring their own")  # fmt: skip
            _check_target(arguments.target)
            print(f"{arguments.source}: reading it as {name} …", file=sys.stderr, flush=True)
            contents = contents_at(arguments.source)
            if not contents.layers:
                raise contents.error("convert", "it has no layer of integers")
            write_contents(contents, arguments.target)
            print(report_of_contents(contents))
            return 0
        grid: Any = quant.grid_from_dict({"grid": arguments.grid}) if arguments.grid else quant.Uniform(arguments.bits)
        rule: Any = arguments.scale or (None if arguments.grid else "absmax")  # None: the grid's own
        config = QuantConfig(grid, rule, "per_group" if arguments.group_size else "per_channel", arguments.group_size)
        if any("=" not in given for given in arguments.kind):
            raise ValueError(f"--kind: expected PATTERN=KIND, got {' '.join(arguments.kind)}")
        kinds = dict(given.rsplit("=", 1) for given in arguments.kind)
        convert_file(arguments.source, arguments.target, config, arguments.only, arguments.force, kinds,
                     _telling(arguments.source))  # fmt: skip
        print(report_of_contents(read_contents(arguments.target, verify=False, mmap=True)))
    except (ValueError, TypeError, OSError, ImportError) as problem:
        error(f"convert: {problem}")
        return 1 if isinstance(problem, files.NotWritten) else 2
    return 0
