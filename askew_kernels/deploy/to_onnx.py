"""ONNX files of packed models: each packed weight is an initialiser of 4- or 8-bit integers and a DequantizeLinear.

The exporter keeps equal weights once, under either name, and leaves out what the model does not use; so weights are
found in the graph by their name or by their numbers.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import atomic
from ..nn import as_linear_, packed_layers, unpack_
from ..nn.packed import PackedLayer
from .integers import integers, table

OPSET = 21  # the first with 4-bit integers and groups in DequantizeLinear


def _integer_type(layer: Any, name: str) -> str:
    """INT4, UINT4, INT8 or UINT8: the narrowest that holds the grid's levels, or a power of two times them."""
    try:
        (low, *_, high), _ = table(layer, "ONNX files")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    width = 4 if (low >= -8 and high <= 7) or (low >= 0 and high <= 15) else 8
    return f"{'U' if low >= 0 else ''}INT{width}"


@torch.no_grad()
def export_onnx(model: nn.Module, example: Tensor | tuple, path: str | bytes | os.PathLike, **options: Any) -> None:
    """Writes ``model``, in inference mode, as ONNX (opset 21) with its packed weights as integers of 4 or 8 bits.

    weight = DequantizeLinear(levels, scale), the same float32 products s c. ``example``: an input, or a tuple of them;
    ``options`` go to ``torch.onnx.export`` (input_names, dynamic_axes, …). Equal weights stand in the file once, layers
    that ``example`` does not reach not at all. Inputs stay float: ``pack_(…, activations="int8")`` is no part of a
    file. Files of more than 2 GB are not served.

    Raises ValueError naming the layer for levels that are not integers of 8 bits and for quantized layer inputs
    (``QuantConfig(activation=…)``), ImportError without onnx (``pip install "askew_kernels[onnx]"``); the file is
    written last and whole (``atomic.replacing``).
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError:
        raise ImportError('export_onnx needs onnx: pip install "askew_kernels[onnx]"') from None
    plain = as_linear_(copy.deepcopy(model).float()).eval()
    layers = packed_layers(plain)
    types = {name: _integer_type(layer, name) for name, layer in layers.items()}
    if not layers:
        raise ValueError("model: has no packed layers; call pack_(model) first")
    unpack_(plain)
    numbers: dict[str, Any] = {}
    reached: set[str] = set()
    for name in layers:
        layer = plain.get_submodule(name)
        numbers[name] = _numbers(layer.weight.cpu().numpy())  # type: ignore[operator, union-attr]
        layer.register_forward_pre_hook(lambda *_, name=name: reached.add(name))
    owners = {key: name for name, key in reversed(numbers.items())}  # the first of equals
    buffer: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter itself: the other one needs onnxscript and renames weights
        given: Any = (example,) if isinstance(example, Tensor) else example
        torch.onnx.export(plain, given, buffer, opset_version=20, dynamo=False, do_constant_folding=False, **options)
    made = onnx.load_from_string(buffer.getvalue())
    graph, kept, nodes = made.graph, [], []
    written: set[str] = set()
    for initializer in graph.initializer:
        key, named = _numbers(onnx.numpy_helper.to_array(initializer)), initializer.name.removesuffix(".weight")
        owner = named if numbers.get(named) == key else owners.get(key)
        if owner is None:
            kept.append(initializer)
            continue
        levels, scale, options_of = _parts(layers[owner])
        inputs = [f"{owner}.weight_levels", f"{owner}.weight_scale"]
        if owner not in written:
            written.add(owner)
            parts = zip(inputs, (types[owner], "FLOAT"), (levels, scale), strict=True)
            kept += [helper.make_tensor(name, getattr(TensorProto, kind), list(t.shape), t.flatten().tolist())
                     for name, kind, t in parts]  # fmt: skip
        flat = levels.shape == tuple(initializer.dims)
        out = initializer.name if flat else f"{initializer.name}_matrix"
        nodes.append(helper.make_node("DequantizeLinear", inputs, [out], f"{named}.dequantize", **options_of))
        if not flat:
            shape = f"{initializer.name}_shape"
            kept.append(helper.make_tensor(shape, TensorProto.INT64, [len(initializer.dims)], list(initializer.dims)))
            nodes.append(helper.make_node("Reshape", [out, shape], [initializer.name]))
    found = {numbers[name] for name in written}
    lost = [name for name in layers if name in reached and numbers[name] not in found]
    if lost:
        raise ValueError(f"{lost[0]}: its weight is not in the exported graph")
    del graph.initializer[:]
    graph.initializer.extend(kept)
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    made.opset_import[0].version = OPSET
    made.ir_version = 10
    onnx.checker.check_model(made)
    with atomic.replacing(path) as file:
        file.write(made.SerializeToString())


def _numbers(weight: Any) -> tuple[tuple[int, ...], str, bytes]:
    """What equal arrays have in common, and others not."""
    return weight.shape, weight.dtype.name, hashlib.blake2b(weight.tobytes()).digest()


def _parts(layer: PackedLayer) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(levels, scale, attributes of DequantizeLinear); groups want the weight as a matrix."""
    levels, scale, _, _ = integers(layer, "ONNX files")
    levels, scale = levels.cpu(), scale.float().cpu()
    n, groups = scale.shape
    if groups > 1:
        return levels, scale, {"axis": 1, "block_size": layer.cols // groups}
    flat = levels.reshape(layer.shape)
    return (flat, scale.reshape(()), {}) if n == 1 else (flat, scale.reshape(n), {"axis": 0})
