"""``python -m askew_kernels convert``: a safetensors state_dict, or a file of another format, to a packed file."""

from __future__ import annotations

import argparse
import fnmatch
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import quant
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
                 force: bool = False, kinds: Mapping[str, str] | None = None) -> None:  # fmt: skip
    """Packs the weights of a safetensors state_dict: ``<name>.weight`` of as many dimensions as a kind of layer has
    (``nn.KINDS``), name like ``only``. kinds: {pattern of names: kind}, for what the number does not tell: without it
    two dimensions are a linear layer, not an embedding or a Conv1D; weights of experts, ``<name>``, are taken where it
    says so.

    Scales come from ``<name>.weight_scale``, as frozen quantized layers save it, else from the config's rule. Raises
    PackedFileError naming the layer where a weight is not on its levels (unless ``force`` rounds it), is NaN, or where
    nothing matches.
    """
    tensors: dict[str, Tensor] = files.read_safetensors(source).tensors
    layers = {}
    for key, w in list(tensors.items()):
        name = key.removesuffix(".weight")
        said = [kind for pattern, kind in (kinds or {}).items() if fnmatch.fnmatchcase(name, pattern)]
        fitting = (kind for kind in chosen(said[:1] or KINDS) if kind.dims == w.dim() and kind.held == (name == key))
        kind = next(fitting, None) if said or name != key else None
        if kind is None or not w.is_floating_point() or not fnmatch.fnmatchcase(name, only):
            continue
        try:
            scale = tensors.get(f"{name}.weight_scale")
            if scale is None or not bool((scale > 0).all()):  # a layer that was never used has none yet
                c = config
                matrix = kind.form.matrix(w)
                scale = compute_scale(
                    matrix, c.weight, c.scale, c.granularity, c.group_size, c.sawb_coefficients, c.scale_dtype
                )
            layer = kind.packed.like(kind.of_shape(w.shape, False), config=config, dtype=w.dtype)
            layer.fill(w, scale.float(), force)
        except ValueError as error:
            raise files.PackedFileError(f"{source}: {name}: {error}") from None
        for own in (key, *(f"{name}.{own}" for own in own_keys(kind.quantized) - {"bias"})):
            tensors.pop(own, None)
        tensors[f"{name}.weight_codes"], tensors[f"{name}.weight_scale"] = layer.weight_codes, layer.weight_scale
        layers[name] = layer.description()
        layers[name].pop("geometry", None)  # of which a state_dict says nothing
    if not layers:
        dims = " or ".join(map(str, sorted({kind.dims for kind in KINDS.values()})))
        raise files.PackedFileError(f"{source}: no <name>.weight of {dims} dimensions matches {only!r}")
    files.write_packed(target, tensors, layers)


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
            if format_of(arguments.source) is None:
                raise ValueError("a state_dict of floats needs --bits or --grid; files of "
                                 f"{', '.join(FORMATS)} bring their own")  # fmt: skip
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
        convert_file(arguments.source, arguments.target, config, arguments.only, arguments.force, kinds)
        print(report_of_contents(read_contents(arguments.target, verify=False, mmap=True)))
    except (ValueError, TypeError, OSError, ImportError) as problem:
        error(f"convert: {problem}")
        return 2
    return 0
