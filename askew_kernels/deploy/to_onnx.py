"""ONNX files of packed models: each packed weight is an initialiser of integers, and what makes numbers of them.

torch's exporter gives the graph of the float model and leaves the weights out; those it asks for are then put in, found
by their name or, because it keeps equal ones once, by their numbers. The metadata ``askew_kernels`` of the file is what
``convert`` reads (``from_onnx``).
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import hashlib
import inspect
import io
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import atomic
from ..contract import UNIFORM
from ..nn import as_linear_, packed_layers, unpack_
from ..nn.held import all_held_weights, expose
from ..nn.kinds import PackedEmbedding, PackedLinear, kind_of
from ..nn.packed import PackedLayer
from ..quant import Grid, pack_codes
from ..quant.forms import ROWS
from .contents import Contents, write_contents
from .files import PackedFileError, is_json, load_packed, wrapped_in
from .folders import float_key
from .from_onnx import CONTRIB, GATHERS, KEY, LIMIT, MULTIPLIES, VERSION, dequantized, is_one, library, read
from .integers import integers, table
from .onnx_layouts import HOLDER, Blocks, blocks_of

__all__ = ["OPERATORS", "dequantized", "export", "export_onnx", "is_one", "read"]

OPERATORS = ("DequantizeLinear", MULTIPLIES)
IR_VERSIONS = {21: 10, 25: 13}  # by opset: 21 is the first with groups and integers of 4 bits, 25 with those of 2
TOLD = 4  # names in a line of the logger
FEW = 16  # numbers that stand in the metadata
TRACED = 20  # the last opset of torch's exporter; what its graphs hold means the same in those above


logger = logging.getLogger("askew_kernels")


class Part(NamedTuple):
    """An initialiser."""

    kind: str  # of TensorProto.DataType
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, t: Tensor) -> Part:
        array = t.detach().cpu().contiguous().numpy()
        return cls(PLAIN[array.dtype.name], array.shape, array.tobytes())

    def key(self) -> tuple[str, tuple[int, ...], bytes]:
        """What equal parts have in common, and others not."""
        return self.kind, self.shape, hashlib.blake2b(self.data).digest()


PLAIN = {"float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16", "bool": "BOOL", "uint8": "UINT8",
         "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64"}  # fmt: skip  # NumPy's name: ONNX's


# ---- what is written of a layer --------------------------------------------------------------------------------------


def _integer_type(layer: Any, opset: int) -> str:
    """Of TensorProto: the narrowest that holds the grid's integers; of 2 bits from opset 25 on. Raises as ``table``."""
    (low, *_, high), _ = table(layer, HOLDER, inputs=True)
    widths = (4, 8) if opset == 21 else (2, 4, 8)
    sign, bits = next((sign, b) for b in widths for sign, least in (("U", 0), ("", -(2 ** (b - 1))))
                      if (sign == "U") == (low >= 0) and least <= low and high < least + 2**b)  # fmt: skip
    return f"{sign}INT{bits}"


def _levels(layer: PackedLayer, opset: int) -> tuple[dict[str, Part], dict[str, Any]]:
    """({last name: initialiser}, attributes of DequantizeLinear); groups and experts want the weight as a matrix."""
    levels, scale, _, _ = integers(layer, HOLDER, inputs=True)
    kind, (n, groups) = _integer_type(layer, opset), scale.shape
    bits = int(kind[-1])
    data = pack_codes((levels.cpu().flatten()[None] & (2**bits - 1)).to(torch.uint8), bits).numpy().tobytes()
    scale = scale.float()
    shape = tuple(layer.shape) if groups == 1 and layer.form == ROWS else tuple(levels.shape)
    if groups > 1:
        attributes = {"axis": 1, "block_size": layer.cols // groups}
    else:
        attributes = {} if n == 1 else {"axis": 0}
        scale = scale.reshape(() if n == 1 else n)
    return {"weight_levels": Part(kind, shape, data), "weight_scale": Part.of(scale)}, attributes


def _held(layers: Mapping[str, Any], dense: Iterable[str], opset: int) -> dict[str, Any]:
    """The layers that are written as integers: all but those that are ``dense``. ValueError naming the layer for one
    that cannot be."""
    patterns = tuple(dense)
    held = {n: layer for n, layer in layers.items() if not any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    for name, layer in held.items():
        try:
            _integer_type(layer, opset)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; name it in dense= to write it as floats") from None
    return held


def _in_blocks(layers: Mapping[str, Any], strict: bool) -> dict[str, Blocks]:
    """Of the layers that onnxruntime's own operators take; the others are told, or errors."""
    found, others = {}, {}
    for name, layer in layers.items():
        try:
            if not isinstance(layer, (PackedLinear, PackedEmbedding)):
                raise ValueError(f"{MULTIPLIES} and {GATHERS} hold linear layers and embeddings, got {layer.kind.name}")
            if layer.kind.float_class(layer) not in (*layer.kind.classes, *layer.kind.same):
                cls = layer.kind.float_class(layer).__name__
                raise ValueError(f"{cls} goes on with what torch's own class gives, which no operator replaces")
            blocks = blocks_of(layer)
            if isinstance(layer, PackedEmbedding) and layer.cols * blocks.bits % 8:
                raise ValueError(f"{GATHERS} holds rows of whole bytes, got {layer.cols} columns of {blocks.bits} bits")
            found[name] = blocks
        except ValueError as error:
            if strict:
                raise ValueError(f"{name}: {error}") from None
            others[name] = error
    for why in dict.fromkeys(map(str, others.values())):
        names = [name for name, error in others.items() if str(error) == why]
        told = ", ".join(names[:TOLD]) + (f" and {len(names) - TOLD} more" if len(names) > TOLD else "")
        logger.warning("ONNX: written for DequantizeLinear: %s (%s)", told, why)
    return found


# ---- the graph -------------------------------------------------------------------------------------------------------


class _Operator(torch.autograd.Function):
    """One of onnxruntime's own, of x and initialisers; what it gives is the product with, or the rows of, a weight."""

    @staticmethod
    def forward(ctx: Any, name: str, attributes: dict[str, int], x: Tensor, weight: Tensor, *parts: Tensor) -> Tensor:
        return (functional.embedding if name == GATHERS else functional.linear)(x, weight)

    @staticmethod
    def symbolic(g: Any, name: str, attributes: dict[str, int], x: Any, weight: Any, data: Any, *parts: Any) -> Any:
        first = (data, x) if name == GATHERS else (x, data)
        y = g.op(f"{CONTRIB}::{name}", *first, *parts, **{f"{key}_i": value for key, value in attributes.items()})
        kept = (x.type().dim() or 0) - (name != GATHERS)
        width = weight.type().sizes()[1 if name == GATHERS else 0]
        return y.setType(weight.type().with_sizes([None] * kept + [width])) if kept > 0 else y


def _quantized(x: Tensor, grid: Grid, dims: int) -> Tensor:
    """``nn.layers.quantized_input`` in operators that ONNX has: the same bits of finite x."""
    scale = x.abs().amax(tuple(range(-dims, 0)), keepdim=True) / grid.c_max
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    z = x / scale
    if grid.read_as == UNIFORM:
        return z.clamp(float(grid.levels[0]), float(grid.levels[-1])).round() * scale
    levels = torch.tensor(grid.levels, dtype=torch.float32, device=z.device)
    near = torch.full_like(z, float(levels[0]))
    for middle, level in zip((0.5 * levels[:-1] + 0.5 * levels[1:]).tolist(), levels[1:].tolist(), strict=True):
        near = torch.where(z > middle, level, near)
    return near * scale


def _as_written(layer: Any, packed: PackedLayer, blocks: Blocks | None, accuracy_level: int) -> None:
    """Makes a float layer compute as the file will: its input quantized, its product by onnxruntime's operator."""
    grid, compute, arguments = packed.kind.input_grid(packed), layer.forward, None
    if blocks is not None:
        parts: dict[str, Any] = {"data": blocks.data, "scale": blocks.scale, "zero_points": blocks.zero_points}
        attributes = {"bits": blocks.bits, "block_size": blocks.block}
        if isinstance(packed, PackedEmbedding):
            if packed.cols % blocks.block:  # else the tensor that MatMulNBits takes of a tied layer
                parts["data"] = blocks.data.flatten(1)[:, : packed.cols * blocks.bits // 8].contiguous()
            name, attributes = GATHERS, attributes | {"gather_axis": 0, "quantize_axis": 1}
        else:
            n, cols = blocks.data.shape[0], packed.cols
            name, attributes = MULTIPLIES, attributes | {"K": cols, "N": n, "accuracy_level": accuracy_level}
        names = [f"weight_{part}" for part, t in parts.items() if t is not None]
        for part in names:
            layer.register_buffer(part, parts[part.removeprefix("weight_")])
        arguments = name, attributes, names

    def forward(input: Tensor, *more: Any) -> Tensor:
        x = input if grid is None else _quantized(input, grid, packed.kind.token_dims)
        if arguments is None:
            return compute(x, *more)
        name, attributes, names = arguments
        data, *others = (getattr(layer, part) for part in names)
        data = data.flatten(1) if name == GATHERS and data.dim() > 2 else data
        y = _Operator.apply(name, attributes, x, layer.weight, data, *others)
        bias = getattr(layer, "bias", None)
        return y if bias is None else y + bias

    if grid is not None or arguments is not None:
        layer.forward = forward


def _drop_extra(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Of a state_dict what is no tensor, which torch's tracer does not expect there."""
    for key in [key for key, value in state.items() if not isinstance(value, Tensor)]:
        del state[key]


def _traced(plain: nn.Module, example: Any, options: dict[str, Any]) -> Any:
    """The graph of a float model as ONNX, in which the tensors of its state_dict are inputs."""
    import onnx

    buffer: Any = io.BytesIO()
    given: Any = (example,) if isinstance(example, Tensor) else example
    fast = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter itself: the other one needs onnxscript and renames weights
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # of encoders, which ONNX has no operator for
            torch.onnx.export(plain, given, buffer, opset_version=TRACED, dynamo=False, do_constant_folding=False,
                              export_params=False, **options)  # fmt: skip
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    return onnx.load_from_string(buffer.getvalue())


@torch.no_grad()
def export_onnx(model: nn.Module, example: Tensor | tuple, path: str | bytes | os.PathLike, *,
                operator: str = "DequantizeLinear", accuracy_level: int = 0, opset: int = 21,
                dense: Iterable[str] = (), strict: bool = False, **options: Any) -> None:  # fmt: skip
    """Writes ``model``, in inference mode, as ONNX with its packed weights as integers of 2, 4 or 8 bits.

    operator: ``"DequantizeLinear"``, standard ONNX: weight = levels * scale, the same float32 products s c.
    ``"MatMulNBits"``: onnxruntime's own product of linear layers, and GatherBlockQuantized for embeddings, from 2, 4 or
    8 bits in blocks of 16 to 256 weights with a scale each, again the same products; layers that these do not hold
    (convolutions, groups of no multiple of 16) are written for DequantizeLinear, which a line of the logger says, or,
    ``strict``, an error. accuracy_level: of MatMulNBits: 0 as it likes, 1 float32, 4 may round inputs to int8, block by
    block; onnxruntime does so by default where it finds DequantizeLinear before MatMul (docs/packed.md).

    Quantized layer inputs (``QuantConfig(activation=…)``) are written as operators that give the same bits.
    ``pack_(…, activations="int8")`` is a way to compute and no part of a file.

    opset: 21, or 25, which has integers of 2 bits, too; 21 keeps them in 4. dense: patterns of names of layers that are
    written as floats. ``options`` go to ``torch.onnx.export``
    (input_names, dynamic_axes, …). ``example``: an input, or a tuple of them. Equal weights stand in the file once,
    layers that ``example`` does not reach not at all.

    Raises ValueError naming the layer for levels that are not integers of 8 bits, and for a file of more than 2 GiB;
    ImportError without onnx (``pip install "askew_kernels[onnx]"``). The file is written last and whole
    (``atomic.replacing``).
    """
    data = _serialized(model, example, operator, accuracy_level, opset, dense, strict, options)
    with atomic.replacing(path) as file:
        file.write(data)


def _serialized(model: nn.Module, example: Any, operator: str, accuracy_level: int, opset: int,
                dense: Iterable[str], strict: bool, options: dict[str, Any],
                architecture: dict[str, Any] | None = None) -> bytes:  # fmt: skip
    onnx = _check(operator, accuracy_level, opset)
    model = wrapped_in(model)
    extra = {key: state for key, state in model.state_dict().items() if not isinstance(state, Tensor)}
    for key, state in extra.items():
        if not is_json(state):
            raise ValueError(f"{key}: extra state is saved where it is a tensor or JSON, got {type(state).__name__}")
    originals = packed_layers(model)
    if not originals:
        raise ValueError("model: has no packed layers; call pack_(model) first")
    # not float(): models that transformers loaded packed refuse that
    plain: Any = as_linear_(copy.deepcopy(model)).to(torch.float32).eval()
    plain.register_state_dict_post_hook(_drop_extra)
    layers = packed_layers(plain)
    held = _held(layers, dense, opset)
    blocks = _in_blocks(held, strict) if operator == MULTIPLIES else {}
    unpack_(plain, force=True)  # what quantizes inputs comes back below
    expose(plain, [name for name, w in all_held_weights(plain).items() if kind_of(w).is_called])  # type: ignore[union-attr]
    weights = {name: float_key(name, layer) for name, layer in layers.items()}
    keys = plain.state_dict().keys() - {weights[name] for name in held}
    reached: set[str] = set()
    for name, packed in layers.items():
        if packed.kind.is_called:
            layer = plain.get_submodule(name)
            _as_written(layer, packed, blocks.get(name), accuracy_level)
            layer.register_forward_pre_hook(lambda *_, name=name: reached.add(name))
    if (choose := getattr(plain, "set_experts_implementation", None)) is not None:
        choose("batched_mm")  # of transformers: no loop over the experts that the example asks for
    if blocks:
        options = options | {"custom_opsets": {CONTRIB: 1} | options.get("custom_opsets", {})}
    made = _traced(plain, example, options)
    writer = _Writer(made.graph, plain.state_dict(), held, weights, blocks, opset)
    absent = [name for name in held if name in reached and writer.integers(name) is None]
    constants = {math.prod(a.t.dims) for node in made.graph.node for a in node.attribute if a.HasField("t")}
    if lost := [name for name in absent if math.prod(held[name].shape) in constants]:
        raise ValueError(f"{lost[0]}: its weight is a constant of floats in the exported graph, not taken from the "
                         "layer's own tensor")  # fmt: skip
    if absent:
        logger.warning("ONNX: no output depends on %s: left out", ", ".join(absent))
    writer.fill()
    next(o for o in made.opset_import if o.domain in ("", "ai.onnx")).version = opset
    made.ir_version = IR_VERSIONS[opset]
    dtypes = {weights[name]: layer.weight_dtype for name, layer in originals.items()}
    dtypes |= {key: t.dtype for key, t in model.state_dict().items() if isinstance(t, Tensor)}
    types = {key: str(dtype).removeprefix("torch.") for key, dtype in dtypes.items()}
    document = {
        "version": VERSION,
        "layers": {name: layer.description() | {"integers": names} for name, layer in originals.items()
                   if name in held and (names := writer.integers(name)) is not None},
        "tensors": {key: [place, types[key]] for key in sorted(keys & types.keys())
                    if (place := writer.place_or_value(key)) is not None},
        "architecture": architecture,
        "extra": extra,
    }  # fmt: skip
    onnx.helper.set_model_props(made, {KEY: json.dumps(document)})
    if made.ByteSize() >= LIMIT:
        raise ValueError(f"model: {made.ByteSize() / 2**30:.2f} GiB, one ONNX file holds less than 2")
    onnx.checker.check_model(made)
    return made.SerializeToString()


def _check(operator: Any, accuracy_level: Any, opset: Any) -> Any:
    """The arguments of ``export_onnx``; gives the package onnx."""
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {operator!r:.80}")
    if opset not in IR_VERSIONS:
        raise ValueError(f"opset: expected {' or '.join(map(str, IR_VERSIONS))}, got {opset!r:.80}")
    if type(accuracy_level) is not int or not 0 <= accuracy_level <= 4:
        raise ValueError(f"accuracy_level: expected 0 to 4, got {accuracy_level!r:.80}")
    onnx = library("export_onnx")
    if opset > (known := onnx.defs.onnx_opset_version()):
        raise ImportError(f"opset: onnx {onnx.__version__} knows those up to {known}, got {opset}; upgrade it")
    return onnx


class _Writer:
    """What takes the place of the inputs of a graph that are tensors of the state_dict."""

    def __init__(self, graph: Any, state: dict[str, Tensor], layers: dict[str, Any], weights: dict[str, str],
                 blocks: dict[str, Blocks], opset: int) -> None:  # fmt: skip
        self.graph, self.state, self.layers, self.weights, self.blocks = graph, state, layers, weights, blocks
        self.wanted = [i.name for i in graph.input if i.name in state]
        self.keys = {name: Part.of(t).key() for name, t in state.items()}  # what a tensor has in common with its equals
        self.places = {self.keys[name]: name for name in reversed(self.wanted)}
        owners = {self.keys[weights[name]]: name for name in reversed(layers)}  # the first of equals
        self.owner = {key: owners[self.keys[key]] for key in self.wanted if self.keys[key] in owners}
        self.stored = {name: _levels(layers[name], opset) for name in dict.fromkeys(self.owner.values())}
        self.equal = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity" and n.input[0] in state}
        data = {n.input[0 if n.op_type == GATHERS else 1]: n for n in graph.node if n.domain == CONTRIB}
        views = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Flatten"}
        self.taken = {(self._named(views.get(name, name)), self._named(node.input[2])) for name, node in data.items()}

    def _named(self, name: str) -> str:
        return self.equal.get(name, name)

    def integers(self, name: str) -> tuple[str, str] | None:
        """The initialisers of a layer's integers and scales; None where the graph has not got them."""
        if name in self.blocks:
            data, scale = (self.places.get(self.keys[f"{name}.weight_{part}"]) for part in ("data", "scale"))
            if data and scale and (data, scale) in self.taken:
                return data, scale
        owner = self.owner.get(self.places.get(self.keys[self.weights[name]], ""))
        return None if owner is None else (f"{owner}.weight_levels", f"{owner}.weight_scale")

    def place(self, key: str) -> str | None:
        """The input that a tensor of the state_dict is; the weight of a layer, where it is that."""
        place = self.places.get(self.keys[key])
        return self.weights[self.owner[place]] if place in self.owner else place

    def place_or_value(self, key: str) -> str | Any:
        """Where a tensor is, or the numbers of a few that are not in the graph, as BatchNorm's count of batches."""
        place, t = self.place(key), self.state[key]
        return t.tolist() if place is None and t.numel() <= FEW else place

    def _tensors(self) -> list[Any]:
        parts = {key: Part.of(self.state[key]) for key in self.wanted if key not in self.owner}
        parts |= {f"{name}.{last}": part for name, (found, _) in self.stored.items() for last, part in found.items()}
        parts |= {f"{key}_shape": Part.of(torch.tensor(self._shape(key))) for key in self.owner if self._in_matrix(key)}
        return [_tensor(name, part) for name, part in parts.items()]

    def _shape(self, key: str) -> tuple[int, ...]:
        """Of a weight, the outputs before the inputs."""
        return self.layers[self.owner[key]].form.view_shape(self.state[key].shape)

    def _in_matrix(self, key: str) -> bool:
        return self.stored[self.owner[key]][0]["weight_levels"].shape != tuple(self.state[key].shape)

    def fill(self) -> None:
        """Initialisers in the place of inputs, and what makes weights of them."""
        inputs = [i for i in self.graph.input if i.name not in self.state]
        for field, values in (("node", self._nodes()), ("initializer", self._tensors()), ("input", inputs)):
            self.graph.ClearField(field)
            getattr(self.graph, field).extend(values)

    def _nodes(self) -> list[Any]:
        from onnx import helper

        nodes = []
        for key, name in self.owner.items():
            inputs = [f"{name}.{last}" for last in ("weight_levels", "weight_scale")]
            matrix, form = self._in_matrix(key), self.layers[name].form
            out, title = f"{key}_matrix" if matrix else key, f"{key.removesuffix('.weight')}.dequantize"
            nodes.append(helper.make_node("DequantizeLinear", inputs, [out], title, **self.stored[name][1]))
            if matrix:
                shaped = f"{key}_transpose" if form.transposed else key
                nodes.append(helper.make_node("Reshape", [out, f"{key}_shape"], [shaped]))
                if form.transposed:
                    order = form.view_shape(range(self.state[key].dim()))
                    nodes.append(helper.make_node("Transpose", [shaped], [key], perm=order))
        for node in self.graph.node:  # an initialiser stands where it is used
            for i, name in enumerate(node.input):
                node.input[i] = self._named(name)
        return nodes + [node for node in self.graph.node if node.output[0] not in self.equal]


def _tensor(name: str, part: Part) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor(name, getattr(TensorProto, part.kind), part.shape, part.data, raw=True)


# ---- models of transformers, by their config -------------------------------------------------------------------------

# of the two examples that tell which sizes follow the inputs; the first is traced
SIZES = ({"batch": 2, "images": 3, "sequence": 7, "decoder_sequence": 5},
         {"batch": 3, "images": 4, "sequence": 9, "decoder_sequence": 6})  # fmt: skip


def _class(contents: Contents, config: Any, given: str | None) -> Any:
    """What makes a model of a config: the class of that name, else the first whose state_dict has the keys."""
    import transformers

    if given is not None:
        cls = getattr(transformers, given, None)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise contents.error("architecture", f"transformers {transformers.__version__} has no model {given!r:.80}")
        return cls._from_config
    keys = contents.tensors.keys() | {float_key(name, layer) for name, layer in contents.layers.items()}
    for auto in (getattr(transformers, name) for name in sorted(dir(transformers)) if name.startswith("AutoModel")):
        with contextlib.suppress(ValueError, ImportError, AttributeError), torch.device("meta"):
            if auto.from_config(config).state_dict().keys() == keys:
                return auto.from_config
    raise contents.error("config.json", f"no model of transformers for {config.model_type!r} has these layers; "
                         "\"architectures\" there, or architecture=, name one")  # fmt: skip


def _model(contents: Contents, architecture: str | None) -> Any:
    """The transformers model of ``contents``, filled."""
    if contents.architecture is None:
        raise contents.error("architecture", "an ONNX file holds the graph, which is known with a config.json of "
                             "transformers beside the file; of another model call "
                             "askew_kernels.deploy.to_onnx.export_onnx(model, example, path)")  # fmt: skip
    try:
        import transformers
    except ImportError:
        raise ImportError(
            'an ONNX file of a config.json needs transformers: pip install "askew_kernels[models]"'
        ) from None
    told = dict(contents.architecture)
    kind, named = told.pop("model_type"), told.get("architectures") or [None]
    try:
        config = transformers.AutoConfig.for_model(kind, **told)
        make = _class(contents, config, architecture if architecture not in (None, kind) else named[0])
        model = make(config, attn_implementation="eager").eval()  # its graph is one for all sizes
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise error if isinstance(error, PackedFileError) else contents.error("config.json", error) from None
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        write_contents(contents, path)
        try:
            return load_packed(path, model, verify=False)
        except PackedFileError as error:
            raise PackedFileError(str(error).replace(path, contents.source)) from None


def _example(model: Any, sizes: Mapping[str, int]) -> dict[str, tuple[Tensor, dict[int, str]]]:
    """{input: (a tensor, {dimension that may have any size: its name})}; ``sizes`` by these names."""
    config, accepted = model.config, inspect.signature(type(model).forward).parameters
    text, vision = (getattr(config, part, config) for part in ("text_config", "vision_config"))
    found: dict[str, tuple[Tensor, dict[int, str]]] = {}

    def fill(name: str, value: int, *axes: str) -> None:
        if name in accepted:
            found[name] = torch.full([sizes[axis] for axis in axes], value), dict(enumerate(axes))

    token = min(3, int(getattr(text, "vocab_size", 1)) - 1)  # any
    speech = "input_features" in accepted  # Whisper: two frames for each position
    if speech:
        shape = sizes["batch"], config.num_mel_bins, 2 * config.max_source_positions
        found["input_features"] = torch.zeros(shape), {0: "batch"}
        fill("decoder_attention_mask", 1, "batch", "decoder_sequence")  # its own mask is made as ONNX cannot say
    elif "input_ids" in accepted:
        fill("input_ids", token, "batch", "sequence")
        fill("attention_mask", 1, "batch", "sequence")
        if getattr(config, "type_vocab_size", 0) > 1:
            fill("token_type_ids", 0, "batch", "sequence")
    fill("decoder_input_ids", token, "batch", "decoder_sequence")
    if "pixel_values" in accepted:
        axis = "images" if found else "batch"
        sides = vision.image_size if isinstance(vision.image_size, (list, tuple)) else 2 * (vision.image_size,)
        found["pixel_values"] = torch.zeros(sizes[axis], vision.num_channels, *sides), {0: axis}
    if not found:
        raise ValueError(f"{type(model).__name__} takes {', '.join(accepted)}, for which no example is known; call "
                         "askew_kernels.deploy.to_onnx.export_onnx(model, example, path)")  # fmt: skip
    return found


class _Call:
    """The forward of a transformers model, of tensors in an order to a tuple of tensors; a copy of the model has one of
    its own."""

    def __init__(self, model: Any, inputs: Iterable[str]) -> None:
        self.model, self.inputs = model, list(inputs)

    def by_name(self, *given: Tensor) -> dict[str, Tensor]:
        output = type(self.model).forward(self.model, **dict(zip(self.inputs, given, strict=True)))
        return {name: t for name, t in output.items() if isinstance(t, Tensor)}

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.by_name(*given).values())


def _outputs(model: Any) -> dict[str, dict[int, str]]:
    """{output: {dimension that follows the inputs: its name}}, found by two calls of different sizes."""
    first, second = ({name: t.shape for name, t in _Call(model, given).by_name(*(t for t, _ in given.values())).items()}
                     for given in (_example(model, sizes) for sizes in SIZES))  # fmt: skip
    names = {pair: name for name in SIZES[0] if (pair := (SIZES[0][name], SIZES[1][name]))}
    return {name: {i: names.get(pair, f"{name}_{i}") for i, pair in enumerate(zip(shape, second[name], strict=True))
                   if pair[0] != pair[1]} for name, shape in first.items()}  # fmt: skip


@torch.no_grad()
def export(contents: Contents, path: str | os.PathLike, *, architecture: str | None = None,
           dense: Iterable[str] = (), operator: str = MULTIPLIES, accuracy_level: int = 0, opset: int = 21,
           strict: bool = False) -> None:  # fmt: skip
    """Writes the ONNX file of a transformers model without its cache: input_ids, attention_mask, pixel_values, … to
    what the model gives, by its names, of any batch and any number of tokens. The rest as ``export_onnx``.

    Raises PackedFileError naming the layer, or saying what is missing; ImportError without onnx or transformers.
    """
    library("export")
    model = _model(contents, architecture)
    try:
        given, outputs = _example(model, SIZES[0]), _outputs(model)
        model.forward = _Call(model, given)
        axes = {name: dims for name, (_, dims) in given.items()} | outputs
        names = {"input_names": list(given), "output_names": list(outputs), "dynamic_axes": axes}
        example = tuple(t for t, _ in given.values())
        data = _serialized(model, example, operator, accuracy_level, opset, dense, strict, names, contents.architecture)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        name, _, text = str(error).partition(": ")
        raise contents.error(name, text) if name in contents.layers else contents.error("ONNX", error) from error
    with atomic.replacing(path) as file:
        file.write(data)
