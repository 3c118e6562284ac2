"""Reading ONNX files: packed layers of the integers in them, whoever wrote them.

A file of this library says in its metadata ``askew_kernels``, JSON, what its initialisers are: ``{"version": 1,
"layers": {name: description, whose "integers" are two initialisers, levels and scales}, "tensors": {key of the
state_dict: [initialiser, or few numbers, type]}, "architecture": config.json}``. In another the layers are the
constants of DequantizeLinear, MatMulNBits and GatherBlockQuantized, and what they are follows from who takes them.
Nothing is trusted: the container is walked before it is parsed, sizes are compared with bytes before memory is taken,
other files are never opened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import unpack_codes
from ..nn.kinds import KINDS
from ..quant import QuantConfig
from .contents import Contents
from .files import FLOATS, PackedFileError
from .folders import float_key, float_weights
from .integers import packed_layer

KEY = "askew_kernels"  # of the metadata
VERSION = 1
ASKED = 1 << 24  # numbers of the identity at a time
LIMIT = 2**31  # bytes that a protobuf has less than
CONTRIB = "com.microsoft"  # the domain of onnxruntime's own operators
MULTIPLIES, GATHERS, DEQUANTIZES = "MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"
ATTRIBUTES = {**dict.fromkeys(("axis", "block_size", "bits", "N", "K", "transB", "group"), int), "auto_pad": bytes,
              **dict.fromkeys(("strides", "pads", "dilations"), list)}  # fmt: skip
# fields of a ModelProto: {number: wire type}; 7 is the graph
FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
SMALL = {"INT2", "UINT2", "INT4", "UINT4"}
INTEGERS = SMALL | {"INT8", "UINT8"}


def library(who: str) -> Any:
    try:
        import onnx
    except ImportError:
        raise ImportError(f'{who} needs onnx: pip install "askew_kernels[onnx]"') from None
    return onnx


# ---- the container ---------------------------------------------------------------------------------------------------


def _varint(file: Any) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("the file ends early")
        value |= byte[0] % 128 << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number of more than ten bytes")


def is_one(path: str | os.PathLike) -> bool:
    """Whether a file is a ModelProto with a graph: its outermost fields, to the last byte."""
    try:
        size, found = os.stat(path).st_size, set()
        with open(path, "rb") as file:
            while file.tell() < size:
                number, wire = divmod(_varint(file), 8)
                if FIELDS.get(number) != wire:
                    return False
                found.add(number)
                length = _varint(file)
                if wire == 2:
                    if length > size - file.tell():
                        return False
                    file.seek(length, os.SEEK_CUR)
        return 7 in found
    except (OSError, ValueError):
        return False


class _Graph:
    """Of a file: nodes, constants by name, metadata."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path, self.onnx = Path(path), library("reading ONNX files")
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        if not self.path.is_file() or not is_one(path):
            raise PackedFileError(f"{path}: not a whole ONNX file")
        if self.path.stat().st_size >= LIMIT:
            raise PackedFileError(f"{path}: {self.path.stat().st_size} bytes, ONNX files have less than 2 GiB")
        try:
            self.model = self.onnx.load_from_string(self.path.read_bytes())  # which opens no other file
        except Exception as error:  # protobuf's own kinds
            raise PackedFileError(f"{path}: not a whole ONNX file ({error})") from None
        graph = self.model.graph
        self.nodes = list(graph.node)
        said = [t.name for t in graph.initializer] + [p.key for p in self.model.metadata_props]
        for node in self.nodes:
            said += [node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute)]
        if not all(isinstance(text, str) for text in said):  # bytes, where they are no UTF-8
            raise PackedFileError(f"{path}: not a whole ONNX file (names that are no text)")
        self.constants = {t.name: t for t in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.output:
                self.constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        self.views: dict[str, str] = {}  # a constant under another name, perhaps of another shape
        for node in self.nodes:
            if node.op_type in ("Identity", "Flatten") and node.input[:1] and node.input[0] in self.constants:
                self.views[node.output[0]] = self.named(node.input[0])
                self.constants[node.output[0]] = self.constants[node.input[0]]
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(node)
        self.properties = {p.key: p.value for p in self.model.metadata_props}

    def named(self, constant: str) -> str:
        """The first of its names."""
        return self.views.get(constant, constant)

    def error(self, name: str, text: object) -> PackedFileError:
        return PackedFileError(f"{self.path}: {name}: {text}")

    def kind(self, t: Any) -> str:
        known = self.onnx.TensorProto.DataType
        return known.Name(t.data_type) if t.data_type in known.values() else str(t.data_type)

    def tensor(self, name: str) -> Tensor:
        """A constant; integers of 2 and 4 bits as int16. Raises PackedFileError before memory is taken."""
        if (t := self.constants.get(name)) is None:
            raise self.error(name, "expected an initialiser")
        if t.data_location or t.external_data:
            raise self.error(name, "lies in another file (external data), which is not read; save it in one file")
        count, kind = math.prod(t.dims), self.kind(t)
        if any(n < 0 for n in t.dims) or count > 4 * t.ByteSize():
            raise self.error(name, f"shape {list(t.dims)} is larger than its data")
        try:
            if kind in SMALL and t.raw_data:
                return self._integers(t, kind, count)
            array = self.onnx.numpy_helper.to_array(t)
            return torch.from_numpy((array.astype("int16") if kind in SMALL else array).copy())
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            raise self.error(name, f"cannot be read as {kind} ({error})") from None

    def _integers(self, t: Any, kind: str, count: int) -> Tensor:
        """Of the bytes as they are, in little memory."""
        bits = int(kind[-1])
        if len(t.raw_data) != -(-count * bits // 8):
            raise ValueError(f"{len(t.raw_data)} bytes for {count} integers")
        codes = torch.frombuffer(bytearray(t.raw_data or b"\0"), dtype=torch.uint8)
        levels = unpack_codes(codes[None], bits, count)[0].to(torch.int16)
        if kind[0] != "U":
            levels = ((levels + 2 ** (bits - 1)) & (2**bits - 1)) - 2 ** (bits - 1)
        return levels.reshape(tuple(t.dims))

    def attributes(self, node: Any) -> dict[str, Any]:
        """Those that are read here, of the types that they have."""
        found = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in ATTRIBUTES}
        for name, value in found.items():
            if not isinstance(value, ATTRIBUTES[name]):
                raise self.error(node.name, f"{name}: expected {ATTRIBUTES[name].__name__}, got {value!r:.80}")
        return found


# ---- what a node holds -----------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """weight[i, j] = levels[i, j] * scale[i or 0, j // block]; low, high: of the integers that could stand there."""

    levels: Tensor  # (n, cols), int16
    scale: Tensor  # (n or 1, blocks)
    block: int | None  # None: one for a row
    low: int
    high: int


class Place(NamedTuple):
    """What a weight is to those who take it. across: the constant of the node is the transpose of the matrix."""

    kind: str
    shape: tuple[int, ...]
    geometry: dict[str, Any] | None = None
    across: bool = False


def _constant(node: Any) -> str:
    """Its integers' name."""
    return node.input[1 if node.op_type == MULTIPLIES else 0]


def _one_zero_point(graph: _Graph, name: str, points: Tensor) -> int:
    if points.numel() and not bool((points == points.flatten()[0]).all()):
        raise graph.error(name, "its zero points differ, a grid has the same levels for every weight")
    return int(points.flatten()[0]) if points.numel() else 0


def _block_sizes(graph: _Graph, node: Any) -> tuple[int, int, int, int]:
    """(outputs, inputs, bits, block) of MatMulNBits and GatherBlockQuantized, which fit their constants."""
    given, name = graph.attributes(node), _constant(node)
    bytes_, scale = graph.tensor(name), graph.tensor(node.input[2])
    bits, block = given.get("bits", 4), given.get("block_size", 128)
    if bits not in (2, 4, 8) or not 1 <= block < 2**31 or bytes_.dtype != torch.uint8 or not bytes_.dim():
        raise graph.error(name, f"expected bytes with 2, 4 or 8 bits in blocks, got {bytes_.dtype}, {bits}, {block}")
    if node.op_type == MULTIPLIES:
        n, cols = given.get("N", 0), given.get("K", 0)
    else:
        n, cols = bytes_.shape[0], bytes_[0].numel() * 8 // bits if len(bytes_) else 0
    blocks = -(-cols // block)
    row = blocks * (block * bits // 8) if node.op_type == MULTIPLIES else cols * bits // 8
    if min(n, cols) < 1 or bytes_.numel() != n * row or scale.numel() != n * blocks:
        raise graph.error(name, f"{bytes_.numel()} bytes and {scale.numel()} scales for {n} x {cols} weights")
    return n, cols, bits, block


def _blocks_held(graph: _Graph, node: Any) -> Held:
    name, (n, cols, bits, block) = _constant(node), _block_sizes(graph, node)
    blocks = -(-cols // block)
    zero = 2 ** (bits - 1)
    if len(node.input) > 3 and (points_name := node.input[3]):
        points = graph.tensor(points_name)
        if points.dtype == torch.uint8:
            if points.numel() != n * -(-blocks * bits // 8):
                raise graph.error(points_name, f"{points.numel()} bytes for {n} x {blocks} zero points")
            points = unpack_codes(points.reshape(n, -1), bits, blocks)
        zero = _one_zero_point(graph, points_name, points)
    if node.op_type == MULTIPLIES and len(node.input) > 4 and node.input[4]:
        raise graph.error(name, "its columns stand in another order (g_idx), which is not read")
    levels = unpack_codes(graph.tensor(name).reshape(n, -1), bits, cols).to(torch.int16) - zero
    return Held(levels, graph.tensor(node.input[2]).reshape(n, blocks), block, -zero, 2**bits - 1 - zero)


def _linear_held(graph: _Graph, node: Any, across: bool) -> Held:
    """Of DequantizeLinear."""
    name, given = _constant(node), graph.attributes(node)
    levels, scale, kind = (
        graph.tensor(name).to(torch.int16),
        graph.tensor(node.input[1]).float(),
        graph.kind(graph.constants[name]),
    )
    zero = 0
    if len(node.input) > 2 and node.input[2]:
        zero = _one_zero_point(graph, name, graph.tensor(node.input[2]))
    axis, block = given.get("axis", 1) % max(1, levels.dim()), given.get("block_size", 0) or None
    if across and levels.dim() == 2:
        levels, scale, axis = levels.t(), scale.t() if block and scale.dim() == 2 else scale, 1 - axis
    matrix = levels.reshape(len(levels), -1) if levels.numel() else levels.reshape(0, 0)
    n, cols = matrix.shape
    if block:
        fits = levels.dim() == 2 and axis == 1 and tuple(scale.shape) == (n, -(-cols // block))
    else:
        fits = scale.numel() == 1 or (scale.numel() == n and axis == 0)
        scale = scale.reshape(-1, 1)
    if not matrix.numel() or not fits:
        raise graph.error(name, f"scales {list(scale.shape)} along dimension {axis} are not those of a {n} x {cols} "
                                "weight's outputs, or of groups of its inputs")  # fmt: skip
    bits = int(kind[-1])
    low = (0 if kind[0] == "U" else -(2 ** (bits - 1))) - zero
    return Held(matrix.contiguous() - zero, scale.contiguous(), block, low, low + 2**bits - 1)


def _held(graph: _Graph, node: Any, across: bool = False) -> Held:
    return _linear_held(graph, node, across) if node.op_type == DEQUANTIZES else _blocks_held(graph, node)


# ---- whose weight it is ----------------------------------------------------------------------------------------------


def _taker(graph: _Graph, out: str) -> tuple[Any, str, tuple[int, ...] | None, bool]:
    """(the node that takes a constant, the name it has there, the shape and whether it is transposed by then)."""
    shape, across = None, False
    for _ in range(8):
        user = next(iter(graph.users.get(out, ())), None)
        if user is None or user.op_type not in ("Reshape", "Transpose", "Identity"):
            return user, out, shape, across
        if user.op_type == "Reshape":
            shape = tuple(int(n) for n in graph.tensor(user.input[1]).flatten())
        across ^= user.op_type == "Transpose"
        out = user.output[0]
    return None, out, shape, across


def _geometry(graph: _Graph, name: str, conv: dict[str, Any], sides: int) -> dict[str, Any]:
    pads = list(conv.get("pads", [0] * (2 * sides)))
    if pads[:sides] != pads[sides:] or conv.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise graph.error(name, f"expected the same padding at both ends, got {pads}, {conv.get('auto_pad')}")
    ones = [1] * sides
    return {"stride": list(conv.get("strides", ones)), "dilation": list(conv.get("dilations", ones)),
            "padding": pads[:sides], "groups": conv.get("group", 1)}  # fmt: skip


def _place(graph: _Graph, node: Any) -> Place | None:
    """Where DequantizeLinear of a constant is the weight of a layer."""
    name = _constant(node)
    if graph.kind(graph.constants[name]) not in INTEGERS:
        return None
    user, named, shape, across = _taker(graph, node.output[0])
    shape = shape or tuple(graph.constants[name].dims)
    position = list(user.input).index(named) if user is not None else 0
    given, takes = ({}, "") if user is None else (graph.attributes(user), f"{user.op_type} {position}")
    if takes == "Conv 1" and len(shape) in (3, 4, 5):
        return Place(f"conv{len(shape) - 2}d", shape, _geometry(graph, name, given, len(shape) - 2))
    if len(shape) != 2:
        return None
    if takes == "Gather 0" and not given.get("axis", 0):
        return Place("embedding", shape)
    if takes in ("MatMul 1", "Gemm 1"):
        across ^= not given.get("transB", 0)  # the weight of a layer is (outputs, inputs)
    elif takes:
        return None
    return Place("linear", shape[::-1] if across else shape, None, across)


def _title(node: Any) -> str:
    """A layer's name, of its constant or, where the exporter made that up, of the node."""
    name = _constant(node)
    made_up = name.startswith("onnx::") or "weight" not in name
    if made_up and node.name:
        return node.name.strip("/").rpartition("/")[0].replace("/", ".") or node.name
    return name.partition(".weight")[0]


class Layer(NamedTuple):
    """One of a file, before its integers are read."""

    node: Any
    place: Place
    description: dict[str, Any] | None  # of a file of this library


def _layers(graph: _Graph, document: dict[str, Any] | None) -> dict[str, Layer]:
    nodes = [
        n for n in graph.nodes if n.op_type in (DEQUANTIZES, MULTIPLIES, GATHERS) and _constant(n) in graph.constants
    ]
    if document is not None:
        held: dict[tuple[str, ...], list[Any]] = {}
        for node in nodes:
            scale = node.input[1 if node.op_type == DEQUANTIZES else 2]
            held.setdefault((graph.named(_constant(node)), graph.named(scale)), []).append(node)
        return {name: _described(graph, name, d, held) for name, d in document["layers"].items()}
    found: dict[str, Layer] = {}
    for node in nodes:
        if node.op_type == DEQUANTIZES:
            place = _place(graph, node)
        else:
            place = Place("linear" if node.op_type == MULTIPLIES else "embedding", ())
        if place is not None:
            found.setdefault(_title(node), Layer(node, place, None))
    return found


def _described(graph: _Graph, name: str, d: Any, nodes: dict[tuple[str, ...], list[Any]]) -> Layer:
    try:
        found, shape = nodes[tuple(d["integers"])], tuple(d["shape"])
        kind, sizes = KINDS[d["kind"]], all(type(n) is int and 0 < n < 2**40 for n in shape)
        if len(shape) != kind.dims or not sizes or d["dtype"] not in FLOATS:
            raise ValueError(f"a weight of {d['dtype']} {list(shape)}")
        node = next((n for n in found if (n.op_type == GATHERS) == (d["kind"] == "embedding")), found[0])
    except (KeyError, TypeError, ValueError) as error:
        raise graph.error(name, f"damaged metadata ({type(error).__name__}: {error})") from None
    return Layer(node, Place(d["kind"], shape, d.get("geometry")), d)


def _packed(graph: _Graph, name: str, layer: Layer) -> Any:
    node, place, d = layer
    held = _held(graph, node, place.across)
    config: Any
    try:
        if d is None:
            dtype, trits, config = torch.float32, False, (held.low, held.high)
        else:
            dtype, trits = getattr(torch, d["dtype"]), bool(d["trits"])
            config = QuantConfig.from_dict(d["config"])
        return packed_layer(KINDS[place.kind], place.shape or tuple(held.levels.shape), held.levels, held.scale, config,
                            block=held.block, geometry=place.geometry, trits=trits, dtype=dtype)  # fmt: skip
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OverflowError) as error:
        raise graph.error(name, error) from None


# ---- the file --------------------------------------------------------------------------------------------------------


def _document(graph: _Graph) -> dict[str, Any] | None:
    """What this library wrote of the file; None where another did."""
    if KEY not in graph.properties:
        return None
    try:
        document = json.loads(graph.properties[KEY])
        parts = [document[part] for part in ("layers", "tensors")]
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']!r}; this release reads version {VERSION}")
        if not all(isinstance(part, dict) for part in [*parts, document.get("extra", {})]):
            raise ValueError("expected objects")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise graph.error(f"metadata {KEY}", error) from None
    return document


def _described_tensors(graph: _Graph, document: dict[str, Any], packed: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """By the keys of the state_dict; what is one in the file is one in memory."""
    weights = {float_key(name, layer): layer for name, layer in packed.items()}
    known: dict[tuple[str, str], Tensor] = {}
    for key, said in document["tensors"].items():
        try:
            place, dtype = said
            if not isinstance(place, str):
                yield key, torch.tensor(place, dtype=getattr(torch, dtype))
                continue
            if (place, dtype) not in known:
                t = weights[place].dequantize(torch.float32) if place in weights else graph.tensor(place)
                known[place, dtype] = t.to(getattr(torch, dtype))
            yield key, known[place, dtype]
        except PackedFileError:
            raise
        except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise graph.error(key, f"damaged metadata ({error})") from None


def _other_tensors(graph: _Graph, layers: dict[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    """The floats of a file of others, and the constants that are dequantized and no layer's weight."""
    taken = {name for layer in layers.values() for name in layer.node.input}
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", DEQUANTIZES):
            taken |= set(node.input[1:])
        if node.op_type == DEQUANTIZES and _constant(node) in graph.constants and _constant(node) not in taken:
            taken.add(_constant(node))
            yield _constant(node), _evaluated(graph, node)
    for t in graph.model.graph.initializer:
        if t.name not in taken and not t.name.startswith("onnx::") and graph.kind(t) in ("FLOAT", "FLOAT16", "DOUBLE"):
            yield t.name, graph.tensor(t.name)


@torch.no_grad()
def read(path: str | os.PathLike) -> Contents:
    """What an ONNX file holds, of whatever library: its layers packed, the other tensors by their names.

    A file of others: linear layers, convolutions and embeddings whose weight is DequantizeLinear of a constant,
    MatMulNBits or GatherBlockQuantized, with one zero point for all weights. Raises PackedFileError naming the layer or
    the initialiser, FileNotFoundError, and ImportError without onnx.
    """
    graph = _Graph(path)
    try:
        return _contents(graph)
    except (TypeError, IndexError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise PackedFileError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def _contents(graph: _Graph) -> Contents:
    document = _document(graph)
    layers = _layers(graph, document)
    packed = {name: _packed(graph, name, layer) for name, layer in layers.items()}
    if document is None:
        tensors, architecture = dict(_other_tensors(graph, layers)), None
    else:
        tensors, architecture = dict(_described_tensors(graph, document, packed)), document.get("architecture")
    if not isinstance(architecture, dict) or "model_type" not in architecture:
        architecture = None
    extra = {} if document is None else document.get("extra", {})
    return Contents(str(graph.path), packed, tensors, extra, architecture, graph.path.parent)


# ---- by onnxruntime --------------------------------------------------------------------------------------------------


def _questions(graph: _Graph, node: Any) -> tuple[list[Any], str, Iterator[Tensor]]:
    """(inputs of a graph that are no constants, their one name, what is put in to see the whole weight)."""
    helper, types = graph.onnx.helper, graph.onnx.TensorProto
    if node.op_type == DEQUANTIZES:
        return [], "", iter([torch.empty(0)])
    n, cols, _, _ = _block_sizes(graph, node)
    if node.op_type == GATHERS:
        name = node.input[1]
        return [helper.make_tensor_value_info(name, types.INT64, ["rows"])], name, iter([torch.arange(n)])
    name, rows = node.input[0], max(1, ASKED // cols)
    identity = (torch.nn.functional.one_hot(torch.arange(i, min(i + rows, cols)), cols).float()
                for i in range(0, cols, rows))  # fmt: skip
    return [helper.make_tensor_value_info(name, types.FLOAT, ["rows", cols])], name, identity


def _evaluated(graph: _Graph, node: Any) -> Tensor:
    """What onnxruntime makes of a node of constants, or of its product with the identity or its look-up of all rows:
    the weight, as the node has it."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError('onnxruntime is not there: pip install "askew_kernels[onnx]"') from None
    helper = graph.onnx.helper
    free, asked, questions = _questions(graph, node)
    copied = type(node)()
    copied.CopyFrom(node)
    for a in copied.attribute:
        if a.name == "accuracy_level":
            a.i = 1  # the input in float32: the ones and zeros as they are
    constants = []
    for name in dict.fromkeys(node.input):
        if name and name != asked:
            graph.tensor(name)  # checked
            constants.append(graph.onnx.TensorProto())
            constants[-1].CopyFrom(graph.constants[name])
            constants[-1].name = name
            if name == _constant(node) and node.op_type == GATHERS:
                n, *sizes = constants[-1].dims
                constants[-1].dims[:] = [n, math.prod(sizes)]
    out = helper.make_empty_tensor_value_info(node.output[0])
    subgraph = helper.make_graph([copied], "weight", free, [out], constants)
    made = helper.make_model(subgraph, opset_imports=list(graph.model.opset_import), ir_version=graph.model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = ({asked: question.numpy()} if asked else {} for question in questions)
        weight = torch.cat([torch.from_numpy(session.run(None, feed)[0]) for feed in feeds])
    except Exception as error:  # onnxruntime's own kinds
        raise graph.error(_constant(node), f"onnxruntime refuses it ({error})") from None
    return weight.t() if node.op_type == MULTIPLIES else weight


def dequantized(path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """({name of a layer: its weight}, who says so): made by onnxruntime, of a product as that with the identity."""
    graph = _Graph(path)
    document = _document(graph)  # files of others may hold layers that cannot be packed
    weights = {} if document is None else float_weights(_contents(graph).tensors)
    for name, (node, place, _) in _layers(graph, document).items():
        weight = _evaluated(graph, node)
        weight = weight.t() if place.across else weight
        form = KINDS[place.kind].form_with(place.geometry or {})
        weights[name] = form.weight(weight, place.shape or weight.shape).contiguous()
    import onnxruntime

    return weights, f"onnxruntime {onnxruntime.__version__}"
