"""What quantization costs a model, layer by layer: bits, bytes, error, outliers."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import figures
from ..command import as_json, check_writable, error
from ..contract import bits_per_code
from ..nn import quantized_layers
from ..nn.kinds import own_keys
from ..nn.layers import QuantizedLayer
from ..nn.packed import PackedLayer
from ..nn.replace import first_input, observed
from ..quant import Grid
from ..quant.packing import row_bytes
from .contents import Contents
from .export import contents_at
from .files import read_safetensors


@dataclass(frozen=True)
class LayerReport:
    """One layer. Norms are of l2; w^ and y^ are the quantized weight and what the layer gives with it."""

    name: str
    grid: str
    bits: float  # of a code; 1.6 for trits
    weights: int
    bytes: int  # codes and scales as packed
    float_bytes: int  # of the weight in float32
    error: float | None = None  # ||w - w^|| / ||w||; None where only w^ is known
    outliers: float | None = None  # share of weights outside the hull
    output_error: float | None = None  # ||y - y^|| / ||y|| of the layer alone on the calibration batch

    @property
    def compression(self) -> float:
        return self.float_bytes / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Report:
    """Layers, and the bytes of the tensors that are not packed. ``str`` is a table."""

    layers: tuple[LayerReport, ...]
    other_bytes: int

    @property
    def bytes(self) -> int:
        return self.other_bytes + sum(r.bytes for r in self.layers)

    @property
    def float_bytes(self) -> int:
        return self.other_bytes + sum(r.float_bytes for r in self.layers)

    def to_dict(self) -> dict[str, Any]:
        layers = [asdict(r) | {"compression": r.compression} for r in self.layers]
        return {"layers": layers, "other_bytes": self.other_bytes, "bytes": self.bytes, "float_bytes": self.float_bytes}

    def __str__(self) -> str:
        def number(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        rows = [("layer", "grid", "bits", "weights", "bytes", "x fp32", "error", "outliers", "output error")]
        rows += [
            (r.name, r.grid, f"{r.bits:g}", str(r.weights), str(r.bytes), f"{r.compression:.2f}",
             number(r.error, ".4f"), number(r.outliers, ".3%"), number(r.output_error, ".4f"))
            for r in self.layers
        ]  # fmt: skip
        rows.append(("other tensors", "", "", "", str(self.other_bytes), "", "", "", ""))
        ratio = f"{self.float_bytes / self.bytes:.2f}" if self.bytes else "-"
        rows.append(("all", "", "", str(sum(r.weights for r in self.layers)), str(self.bytes), ratio, "", "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = "  ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
        return "\n".join(form.format(*row).rstrip() for row in rows)

    def plot(self, path: str | os.PathLike) -> None:
        """Bytes of each layer beside those in float32, and its errors, as an image of the very ``path``: in the
        format of its suffix, png without one. Needs matplotlib."""
        from matplotlib.figure import Figure

        names, place = [figures.plain(r.name) for r in self.layers], range(len(self.layers))
        figure = Figure(figsize=(9, 1.6 + 0.28 * len(names)), layout="constrained")
        size, error = figure.subplots(1, 2, sharey=True)
        size.plot([r.float_bytes for r in self.layers], place, "|", label="float32")  # bars have no end on a log axis
        size.plot([r.bytes for r in self.layers], place, "o", label="packed")
        size.set(xscale="log", xlabel="bytes", yticks=list(place), yticklabels=names)
        size.invert_yaxis()
        for what, label in (("error", "weight"), ("output_error", "output")):
            known = [(getattr(r, what), i) for i, r in enumerate(self.layers) if getattr(r, what) is not None]
            if known:
                error.plot(*zip(*known, strict=True), "o", label=label)
        error.set(xlabel="relative error (2-norm)", xlim=(0, None))
        for axes in (size, error):
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        figures.write(figure, path)


def short_name(grid: Grid, trits: bool = False) -> str:
    d = grid.to_dict()
    flags = [k for k in ("narrow", "inclusive") if d.get(k)] + ["unsigned"] * (not d.get("signed", True))
    size = len(grid.levels) if "levels" in d else d.get("bits", "")
    return ", ".join([f"{d['grid']} {size}".rstrip(), *flags]) + (" (trits)" if trits else "")


@torch.no_grad()
def _of_layer(name: str, layer: Any) -> LayerReport:
    """Of a quantized layer, or of a packed one, whose tensors may be on the meta device."""
    grid = layer.config.weight
    if isinstance(layer, PackedLayer):
        weights, known = math.prod(layer.shape), short_name(grid, layer.trits)
        return LayerReport(name, known, bits_per_code(layer.bits), weights, layer.packed_bytes, 4 * weights)
    w, scale = layer.weight, layer.weight_scale
    w, w_hat = layer.form.matrix(w), layer.form.matrix(layer.quantized_weight())
    size = len(w) * row_bytes(w.numel() // max(len(w), 1), grid.bits) + 4 * scale.numel()
    errors = _errors(w, w_hat, scale, grid)
    return LayerReport(name, short_name(grid), grid.bits, w.numel(), size, 4 * w.numel(), *errors)


def report_of_contents(contents: Contents, original: dict[str, Tensor] | None = None) -> Report:
    """Of a file, without a model; a layer that is stored once and used twice counts its bytes once.

    ``original``: the state_dict before quantization; error and outliers are then those of its ``<name>.weight``.
    Raises PackedFileError where a layer is missing there or has another shape.
    """
    reports: list[LayerReport] = []
    counted: set[int] = set()
    for name, layer in contents.layers.items():
        r = _of_layer(name, layer)
        stored = {id(layer.weight_codes), id(layer.weight_scale)}
        if stored <= counted:
            r = replace(r, bytes=0, float_bytes=0)
        counted |= stored
        if original is not None:
            key = name if layer.kind.held else f"{name}.weight"
            w = original.get(key)
            if w is None or tuple(w.shape) != layer.shape:
                found = "is missing" if w is None else f"has shape {tuple(w.shape)}, not {layer.shape}"
                raise contents.error(f"layer {name}", f"{key} {found} in the original")
            w_hat = layer.matrix(torch.float64)
            error, outliers = _errors(layer.form.matrix(w), w_hat, layer.weight_scale, layer.config.weight)
            r = replace(r, error=error, outliers=outliers)
        reports.append(r)
    others = {id(t): t.nbytes for t in contents.tensors.values()}
    return Report(tuple(reports), sum(others.values()))


@torch.no_grad()
def _errors(w: Tensor, w_hat: Tensor, scale: Tensor, grid: Grid) -> tuple[float, float]:
    """``error`` and ``outliers`` of a ``LayerReport``."""
    w, scale = w.detach().double().reshape(w_hat.shape), scale.double()
    x = w.reshape(scale.numel(), -1) / scale.reshape(-1, 1)
    outside = (x < grid.levels[0]) | (x > grid.levels[-1])
    return _relative(w_hat.double(), w), float(outside.double().mean()) if w.numel() else 0.0


@torch.no_grad()
def inspect(model: nn.Module, batch: Any = None) -> Report:
    """A ``Report`` of every quantized and packed layer of ``model``; print it, or read its fields.

    Error and outliers are of the float weights, so of layers that are not packed; after ``hard_quantize_`` the error is
    0. ``batch``: an input of the model, or a tuple or a dict of its arguments; each quantized layer then also gets the
    error of its output with quantized against float weights on the same input (the last, where it is called often).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (QuantizedLayer, PackedLayer))}
    outputs = {} if batch is None else _output_errors(model, batch)
    reports: list[LayerReport] = []
    covered: set[int] = set()  # the layers' own tensors, all but the biases
    for name, m in layers.items():
        r = _of_layer(name, m)
        if id(m.weight_codes if isinstance(m, PackedLayer) else m.weight) in covered:  # tied: stored once
            r = replace(r, bytes=0, float_bytes=0)
        reports.append(replace(r, output_error=outputs.get(name)))
        own = [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]
        covered |= {id(t) for child, t in own if child in own_keys(type(m)) - {"bias"}}
    tensors = (*model.parameters(), *model.buffers())
    return Report(tuple(reports), sum(t.numel() * t.element_size() for t in tensors if id(t) not in covered))


def _output_errors(model: nn.Module, batch: Any) -> dict[str, float]:
    """||y - y^|| / ||y|| of every quantized layer that the model calls."""
    found: dict[str, float] = {}

    def compare(name: str, layer: Any, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        x = first_input(args, kwargs)
        exact = layer.product(x, layer.weight).double()
        found[name] = _relative(layer.product(x, layer.quantized_weight()).double(), exact)

    with observed(model, [(m, partial(compare, name)) for name, m in quantized_layers(model).items()]):
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*(batch if isinstance(batch, tuple) else (batch,)))
    return found


def _relative(got: Tensor, exact: Tensor) -> float:
    norm = float(exact.norm())
    return float((got - exact).norm()) / norm if norm else 0.0


# ---- python -m askew_kernels inspect ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a packed file, or one of a format that export writes")
    parser.add_argument("--original", type=Path, metavar="FILE", help="safetensors of the float model: adds the errors")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write an image of sizes and errors")


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot is not None:
        check_writable(arguments.plot)
    try:
        original = None if arguments.original is None else read_safetensors(arguments.original).tensors
        report = report_of_contents(contents_at(arguments.file, mmap=True), original)
        if arguments.plot is not None:
            report.plot(arguments.plot)
    except (ValueError, OSError, ImportError) as problem:
        error(f"inspect: {problem}")
        return 2
    print(as_json(report.to_dict()) if arguments.json else report)
    return 0
