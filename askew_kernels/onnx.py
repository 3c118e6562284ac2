"""ONNX files of packed models: each packed weight is an initialiser of 4- or 8-bit integers and a DequantizeLinear."""

from __future__ import annotations

import copy
import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .nn.packed import PackedLayer, packed_layers, unpack_
from .quant import Grid
from .reference import level_table, unpack_codes

OPSET = 21  # the first with 4-bit integers and groups in DequantizeLinear


def _integer_type(grid: Grid, name: str) -> str:
    """INT4, UINT4, INT8 or UINT8: the narrowest that holds the grid's levels."""
    low, high = grid.levels[0], grid.levels[-1]
    if any(c != int(c) for c in grid.levels):
        raise ValueError(f"{name}: DequantizeLinear needs integer levels, got {grid}")
    width = 4 if (low >= -8 and high <= 7) or (low >= 0 and high <= 15) else 8
    return f"{'U' if low >= 0 else ''}INT{width}"


@torch.no_grad()
def export_onnx(model: nn.Module, example: Tensor | tuple, path: str | os.PathLike, **options: Any) -> None:
    """Writes ``model``, in inference mode, as ONNX (opset 21) with its packed weights as integers of 4 or 8 bits.

    weight = DequantizeLinear(levels, scale), the same float32 products s c. ``example``: an input, or a tuple of them;
    ``options`` go to ``torch.onnx.export`` (input_names, dynamic_axes, …). Files of more than 2 GB are not served.
    Raises ValueError naming the layer for grids whose levels are not integers, ImportError without onnx
    (``pip install "askew_kernels[onnx]"``); the file is written last and whole.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError:
        raise ImportError('export_onnx needs onnx: pip install "askew_kernels[onnx]"') from None
    layers = packed_layers(model)
    types = {name: _integer_type(layer.config.weight, name) for name, layer in layers.items()}
    if not layers:
        raise ValueError("model: has no packed layers; call pack_(model) first")
    plain = unpack_(copy.deepcopy(model)).float().eval()
    buffer: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter itself: the other one needs onnxscript and renames weights
        arguments: Any = (example,) if isinstance(example, Tensor) else example
        torch.onnx.export(
            plain, arguments, buffer, opset_version=20, dynamo=False, do_constant_folding=False, **options
        )
    made = onnx.load_from_string(buffer.getvalue())
    graph, kept, nodes = made.graph, [], []
    for initializer in graph.initializer:
        name = initializer.name.removesuffix(".weight")
        if not (initializer.name.endswith(".weight") and name in layers):
            kept.append(initializer)
            continue
        levels, scale, options_of = _integers(layers[name])
        kind = getattr(TensorProto, types[name])
        kept += [
            helper.make_tensor(f"{name}.weight_levels", kind, list(levels.shape), levels.flatten().tolist()),
            helper.make_tensor(f"{name}.weight_scale", TensorProto.FLOAT, list(scale.shape), scale.flatten().tolist()),
        ]
        inputs = [f"{name}.weight_levels", f"{name}.weight_scale"]
        flat = levels.shape == tuple(initializer.dims)
        out = initializer.name if flat else f"{name}.weight_matrix"
        nodes.append(helper.make_node("DequantizeLinear", inputs, [out], f"{name}.dequantize", **options_of))
        if not flat:
            kept.append(helper.make_tensor(f"{name}.weight_shape", TensorProto.INT64, [len(initializer.dims)],
                                           list(initializer.dims)))  # fmt: skip
            nodes.append(helper.make_node("Reshape", [out, f"{name}.weight_shape"], [initializer.name]))
    replaced = {n.output[0] for n in nodes}
    lost = [name for name in layers if f"{name}.weight" not in replaced]
    if lost:
        raise ValueError(f"{lost[0]}: its weight is not in the exported graph under its name")
    del graph.initializer[:]
    graph.initializer.extend(kept)
    operations = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *operations])
    made.opset_import[0].version = OPSET
    made.ir_version = 10
    onnx.checker.check_model(made)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(made.SerializeToString())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _integers(layer: PackedLayer) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(levels as integers, scale, attributes of DequantizeLinear); groups want the weight as a matrix."""
    grid = layer.config.weight
    table = level_table(grid.levels_tensor(), grid.encoding).to(torch.int16)
    levels = table[unpack_codes(layer.weight_codes.cpu(), layer.bits, layer.cols).int()]
    scale = layer.weight_scale.float().cpu()
    n = levels.shape[0]
    if scale.numel() == 1:
        return levels.reshape(layer.shape), scale.reshape(()), {}
    if scale.numel() == n:
        return levels.reshape(layer.shape), scale, {"axis": 0}
    groups = scale.numel() // n
    return levels, scale.reshape(n, groups), {"axis": 1, "block_size": layer.cols // groups}
