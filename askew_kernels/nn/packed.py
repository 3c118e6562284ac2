"""What layers for inference share whose weight is packed codes; ``kinds`` has the layers themselves.

``weight_codes`` (n, row_bytes) uint8 and ``weight_scale`` (rows,) are buffers; the weight is s c, bit for bit the one
that was trained (docs/packed.md). Where the product is made from the codes (``PackedLayer._reads_codes``) a kernel
decodes them as it goes, for many rows in pieces of up to 2^22 weights, on a GPU from a second copy of the codes
(``tiles``); elsewhere the weight is unpacked for the call, and torch's own product taken. Casting a model changes the
type it computes in, never its codes and scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import functional

from .. import contract, ops, reference, runtime
from ..ops.autograd import transformed
from ..quant import QuantConfig, code_bits, grid_from_dict, num_rows, pack_weight
from ..quant.forms import Form
from ..quant.packing import SCALE_TYPES, row_bytes, storage_type
from ..quant.sharding import is_sharded
from .bands import NAME, BandedCodes, Bands, restored
from .calls import Call
from .decoded import DecodedWeight
from .joint import being_split
from .layers import autocast_dtype, quantized_input
from .parallel import parallel_product, split, stand_in
from .tiles import Tiles

EXTRA_STATE = "_extra_state"  # torch's key of what get_extra_state gives
_transforms, _BelowAutograd = torch._C._are_functorch_transforms_active, torch._C._AutoDispatchBelowAutograd


def unrecorded(product: Any, *inputs: Any) -> Tensor:
    """``product`` below autograd, where there is nothing to record: spares the call into the operator's Python kernel;
    no `with`, which takes twice as long."""
    if torch.jit.is_tracing():  # the graph will run above autograd
        inputs = tuple(t.detach() if isinstance(t, Tensor) else t for t in inputs)
    below = None if torch.compiler.is_compiling() else _BelowAutograd()
    try:
        return product(*inputs)
    finally:
        del below


def _wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled() and not torch.jit.is_tracing()


class PackedLayer(nn.Module):
    """``config``: grid and granularity; ``trits``: five ternary codes in a byte; ``weight_dtype``: the type that was
    trained, in which ``dequantize`` gives the weight; ``activations``: "float", or "bf16" or "int8", which let a
    CPU round the input on the way: to bfloat16, or each row of it to int8."""

    weight_codes: Tensor
    weight_scale: Tensor
    bias: Any
    kind: ClassVar[Any]  # its entry in kinds.KINDS
    form: ClassVar[Form]  # its kind's: how the weight is a matrix, whose rows the codes have
    activations = "float"
    repack = True  # products with int8 activations put the codes into the order in which they read them
    _call: Call | None = None
    own_attributes = ("config", "trits", "shape", "bits", "rows", "cols", "weight_dtype", "activations", "weight_codes",
                      "weight_scale", "repack", "_tiles", "_bands", "_call", "_unpacked")  # fmt: skip

    def __init__(self, *args: Any, config: QuantConfig | None = None, trits: bool = False,
                 scale_dtype: torch.dtype | None = None, device: Any = None, dtype: torch.dtype | None = None,
                 **kwargs: Any) -> None:  # fmt: skip
        """The float layer's arguments, and how its weight is packed; codes and scales are empty."""
        super().__init__(*args, **kwargs, device="meta")
        weight: Any = self._parameters.pop("weight")
        bias = self._parameters.pop("bias", None) is not None
        self._attach(tuple(weight.shape), bias, config or QuantConfig(), trits, scale_dtype, dtype, device)

    def _attach(self, shape: tuple[int, ...], bias: bool, config: QuantConfig, trits: bool,
                scale_dtype: torch.dtype | None, dtype: torch.dtype | None, device: Any) -> None:  # fmt: skip
        if not isinstance(config, QuantConfig):
            raise TypeError(f"config: expected a QuantConfig, got {config!r}")
        scale_dtype = scale_dtype or storage_type(config.scale_dtype)
        if scale_dtype not in SCALE_TYPES:
            raise TypeError(f"scale_dtype: expected float32, bfloat16 or float16, got {scale_dtype}")
        self.config, self.trits, self.shape = config, trits, shape
        self.bits = code_bits(config.weight, trits)
        matrix = self.form.shape(shape)
        self.rows, self.cols = matrix[0], math.prod(matrix[1:])
        self.weight_dtype = dtype or torch.get_default_dtype()
        rows = num_rows(matrix, config.granularity, config.group_size)
        codes = torch.zeros(matrix[0], row_bytes(self.cols, self.bits), dtype=torch.uint8, device=device)
        self._tiles, self._bands = Tiles(), Bands()
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", torch.ones(rows, dtype=scale_dtype, device=device))
        empty = nn.Parameter(torch.zeros(matrix[0], dtype=self.weight_dtype, device=device)) if bias else None
        self.register_parameter("bias", empty)

    @classmethod
    def class_for(cls, layer: Any) -> Any:
        """What takes the place of ``layer``."""
        return cls

    @classmethod
    def like(cls, layer: Any, **options: Any) -> Any:
        """Empty, of the sizes of ``layer``, be it float; on the meta device unless ``options`` say where."""
        return cls.class_for(layer)(**cls.kind.arguments_of(layer) | options)

    @classmethod
    def from_quantized(cls, layer: Any, *, force: bool = False, trits: bool = False,
                       scale_dtype: torch.dtype | None = None) -> Any:  # fmt: skip
        """Packs the weight of ``layer``, as ``fill``; its bias is shared."""
        config = layer.config
        if config.activation_scale is not None:
            if not force:
                raise ValueError("activation_scale: packed layers quantize their inputs by their own largest "
                                 f"magnitude, and this one by a learned scale ({config.activation_scale!r}); "
                                 "force=True takes the former, which changes the outputs")  # fmt: skip
            config = replace(config, activation_scale=None)
        weight = layer.weight.detach()
        if is_sharded(weight):
            raise ValueError("weight: is split over ranks, which have no whole codes; take get_model_state_dict with "
                             "StateDictOptions(full_state_dict=True), load it into a model that is not split, and pack "
                             "that (packed layers are split by parallelize_module)")  # fmt: skip
        new = cls.like(layer, config=config, trits=trits, scale_dtype=scale_dtype, dtype=layer.weight.dtype)
        if not ops.has_values(weight):
            raise ValueError(f"weight: is on the meta device or fake and has no values to pack; make a {cls.__name__} "
                             "there instead")  # fmt: skip
        new.fill(weight, layer.weight_scale.detach(), force)
        if layer.bias is not None:
            new.bias = layer.bias
        return new.train(layer.training)

    @torch.no_grad()
    def fill(self, weight: Tensor, scale: Tensor, force: bool = False) -> None:
        """Codes and scales of ``weight``. Raises ValueError where that would change a weight or a scale, unless
        ``force``, and for NaN and inf; the layer is then as it was."""
        if scale.shape != self.weight_scale.shape:
            wanted = f"{tuple(self.weight_scale.shape)} for {self.shape} weights {self.config.granularity}"
            raise ValueError(f"weight_scale: expected shape {wanted}, got {tuple(scale.shape)}")
        exact, scale = scale, scale.to(self.weight_scale.dtype)
        if not force and not torch.equal(scale.float(), exact.float()):
            raise ValueError(
                f"scale_dtype: {scale.dtype} would change the scales; use float32, or force=True to round them"
            )
        if off := int((~weight.isfinite()).sum()):  # inf would take an end, at a scale that is none
            raise ValueError(f"w: {off} of {weight.numel()} weights are NaN or inf")
        grid = self.config.weight
        codes = pack_weight(self.form.matrix(weight), scale.float(), grid, trits=self.trits)
        if not force:
            made = ops.packed_dequantize(codes, scale, grid, self.bits, self.cols, self.weight_dtype)
            if off := int((self.form.weight(made, self.shape) != weight).sum()):
                raise ValueError(f"weight: {off} of {weight.numel()} weights are not on their levels; call "
                                 "hard_quantize_(model) first, or give force=True to round them")  # fmt: skip
        self.weight_codes, self.weight_scale = codes, scale.clone()

    def to_float(self) -> nn.Module:
        """A float layer with the unpacked weight and the same bias Parameter."""
        return self.kind.float_layer(self, nn.Parameter(self.dequantize()))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight s c, a new tensor in ``weight_dtype`` or ``dtype``: the product rounded once."""
        return self.form.weight(self.matrix(dtype), self.shape).contiguous()

    def rows_of(self, part: slice | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of these rows of the matrix; views."""
        codes: Any = self.weight_codes
        scale: Any = self.weight_scale
        if "_split" in self.__dict__:  # a call for all ranks
            codes, scale = codes.full_tensor(), scale.full_tensor()
        if part is None:
            return codes, scale
        return codes[part], scale.reshape(self.rows, -1)[part].reshape(-1) if scale.numel() > 1 else scale

    def matrix(self, dtype: torch.dtype | None = None, part: slice | None = None) -> Tensor:
        """The same as a matrix, (outputs, inputs) whatever the shape of the weight: the rows that the codes have, or
        ``part`` of them."""
        (codes, scale), grid = self.rows_of(part), self.config.weight
        return ops.packed_dequantize(codes, scale, grid, self.bits, self.cols, dtype or self.weight_dtype)

    def entries(self, index: Any) -> Tensor:
        """``dequantize()[index]`` for an index of the first dimension, a list of numbers; only these are decoded."""
        if transformed() or (self.form.transposed and not self.form.stacked):  # vmap sees no codes
            return self.dequantize()[index]
        codes, scale, n = self.weight_codes, self.weight_scale, self.shape[0]
        rows = torch.arange(n, device=codes.device)[index]
        codes = codes.reshape(n, -1, codes.shape[-1]).index_select(0, rows).flatten(0, 1)
        scale = scale.reshape(n, -1).index_select(0, rows).reshape(-1) if scale.numel() > 1 else scale
        matrix = ops.packed_dequantize(codes, scale, self.config.weight, self.bits, self.cols, self.weight_dtype)
        return self.form.weight(matrix, (len(rows), *self.shape[1:]))

    @property
    def weight(self) -> Tensor:
        """The weight for those who read it, read-only; values are unpacked where they are used, each time."""
        if "weight_codes" not in self._buffers:
            raise AttributeError("weight")  # while nn.Conv2d makes its own
        if torch.compiler.is_compiling() or transformed():  # forward mode looks into a subclass
            return self.dequantize()
        return stand_in(self) if being_split() else DecodedWeight(self)

    @weight.setter
    def weight(self, value: Any) -> None:
        """Its own is taken back, as peft's ``unload`` gives it; another is an AttributeError."""
        if not (isinstance(value, DecodedWeight) and value.layer is self):
            self.register_parameter("weight", value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and "weight_codes" in self._buffers:
            if param is not None and is_sharded(param):
                return split(self, param)
            raise AttributeError("weight: a packed layer keeps codes, it can be given no other weight; call "
                                 "unpack_(model) first")  # fmt: skip
        super().register_parameter(name, param)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As ever; to tensor parallelism also a weight, which it looks for to split."""
        found = super().named_parameters(*args, **kwargs)
        return iter([("weight", stand_in(self)), *found]) if being_split() else found

    def _prepared(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input and bias in the type that the product is made in."""
        if torch.compiler.is_compiling():
            self._settled()
        if not x.is_floating_point():
            raise TypeError(f"x: expected a float tensor, got {x.dtype}")
        if (codes := self._buffers["weight_codes"]).device != x.device:  # type: ignore[union-attr]
            raise ValueError(f"x: expected on the device of the layer's codes ({codes.device}), got {x.device}")  # type: ignore[union-attr]
        low = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
        if (grid := self.config.activation) is not None:  # of a kind that takes numbers: indices do not come here
            x = quantized_input(x, grid, self.kind.token_dims)
        if low is not None:
            x = x.to(low)
        try:  # not `self.bias`, nor a cast to the same type: microseconds, in every call
            bias = self._parameters["bias"]
        except KeyError:  # parametrized
            bias = self.bias
        return x, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def _special(self, x: Any, *more: Any) -> Any:
        """The result for a node of torch.fx's graph, of which a layer is a leaf, and a nested tensor; else None."""
        if isinstance(x, Proxy):
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *more), {})  # type: ignore[attr-defined]
        if is_sharded(x):
            return parallel_product(self, x)
        return self._nested(x) if x.is_nested else None

    def _nested(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"x: {type(self).__name__} takes no nested tensors; give it one tensor at a time")

    def _reads_codes(self, x: Tensor, rows: int) -> bool:
        """Whether a product of that many rows is made from the codes; never where x wants a gradient or is transformed
        by torch.func. A trace is of what inference computes."""
        if _wants_gradient(x) or _transforms() or forward_ad._current_level >= 0:
            return False
        return runtime.reads_codes(x, rows, self._reads_tiles(x))

    def _rounds(self, x: Tensor) -> bool:
        """Whether a product from the codes rounds the input: others are to do so, too."""
        return self.activations != "float" and x.is_cpu

    def _by_operators(self, x: Tensor, bias: Tensor | None, part: slice | None = None) -> Tensor:
        """The product with inputs that are rounded so, straight-through, for torch.func and forward mode: up to the
        rounding of its sums what the kernels compute."""
        kind = contract.compute_dtype(x.dtype)
        wide = x.to(kind)
        if self.activations == "int8":
            q, scale = reference.int8_tokens(wide.reshape(-1, wide.shape[-1]))
            rounded = (q * scale[:, None]).reshape(wide.shape)
        else:
            rounded = wide.to(torch.bfloat16).to(kind)
        seen = wide + (rounded - wide).detach()
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(seen, self.matrix(kind, part), None if bias is None else bias.to(kind)).to(x.dtype)

    def _reads_tiles(self, x: Tensor) -> bool:
        """Whether the matrix units of a GPU can take ``x`` and the tiles of the codes; while a CUDA graph is captured
        only tiles that are there, because what makes them would run at each replay."""
        if not runtime.reads_tiles(x) or not self._tiles.form(self, x.dtype):
            return False
        return self._tiles.ready(self) or not torch.cuda.is_current_stream_capturing()

    def _records(self, bias: Tensor | None) -> bool:
        """Whether bias or scale want gradients; in a trace they do not."""
        if not torch.is_grad_enabled() or torch.jit.is_tracing():
            return False
        return (bias is not None and bias.requires_grad) or self._buffers["weight_scale"].requires_grad  # type: ignore[union-attr]

    def _banded(self, x: Tensor, bias: Tensor | None, compiling: bool) -> tuple[Tensor, Tensor] | None:
        """(bands, scales) for a product of ``x`` rounded to int8; None where it is made from the codes."""
        if self.activations != "int8" or not self.repack or not x.is_cpu or self._records(bias) or _wants_gradient(x):
            return None
        return self._bands.of(self, x, compiling)

    def _bands_made(self) -> bool:
        return self._bands.made(self) is not None

    def _settled(self) -> None:
        """Puts codes that bands no longer stand for in their place, before a graph is made of where they are."""
        if type(codes := self._buffers[NAME]) is BandedCodes and (
            codes.codes is not None or self.activations != "int8"
        ):
            restored(self)

    # torch.compile calls them while it traces, so that a graph holds bands that no eager call has asked for
    _bands_made._dynamo_marked_constant = _settled._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _product(self, x: Tensor, bias: Tensor | None, part: slice | None = None) -> Tensor:
        """``ops.packed_linear`` of (rows, cols) without its checks, which cost as much as a small product."""
        grid, buffers, compiling = self.config.weight, self._buffers, torch.compiler.is_compiling()
        scale: Any = buffers["weight_scale"]
        recorded = self._records(bias) or _wants_gradient(x)
        inputs: tuple[Any, ...]
        if not recorded and part is None and self._reads_tiles(x):
            product: Any = torch.ops.askew.packed_tiles_linear.default
            inputs = x.contiguous(), *self._tiles.of(self, x.dtype), bias
        else:
            name, product = runtime.packed_product(x, self.activations)
            banded, again = self._banded(x, bias, compiling) if part is None else None, part is None
            if banded is not None:
                product = torch.ops.askew.packed_bands_linear.default
                codes, scale = banded
                rest: Sequence[Any] = *self._bands.read_as(self), self.rows
            else:
                codes, scale = (restored(self), scale) if part is None else self.rows_of(part)
                if scale.dtype != torch.float32:
                    scale = scale.float()
                weight = ops.packed.PackedWeight.of(name, codes, scale, grid, self.bits, self.cols)
                again = again and weight.codes is codes  # as the next call finds them
                codes, scale, *rest = weight
            inputs = x.contiguous(), codes, scale, *rest, bias
            if recorded:
                return ops.run_packed_linear(name, product, *inputs)
            if again and not compiling and Call.can_be_made(self, x, bias):
                self._call = Call(self, x, product, rest, banded is not None)
        return unrecorded(product, *inputs)

    @property
    def packed_bytes(self) -> int:
        return self.weight_codes.numel() + self.weight_scale.numel() * self.weight_scale.element_size()

    @property
    def tile_bytes(self) -> int:
        """Memory of the codes' second copy, in tiles for a GPU's matrix units; 0 before the first product with it."""
        return self._tiles.bytes

    @property
    def band_bytes(self) -> int:
        """Memory of the codes in bands and of their scales; 0 where no product with int8 activations was made yet."""
        return self._bands.bytes

    def description(self) -> dict[str, Any]:
        """What a file says of this layer, JSON-ready."""
        geometry, dtype = self.kind.geometry_of(self), str(self.weight_dtype).removeprefix("torch.")
        return {"kind": self.kind.name, "config": self.config.to_dict(), "trits": self.trits, "shape": list(self.shape),
                "dtype": dtype, **({"geometry": geometry} if geometry else {})}  # fmt: skip

    def set_activations(self, activations: str) -> None:
        """How the input is taken, but for indices; ValueError where it is unknown or the grid does not allow it."""
        ops.check_activations(activations, self.config.weight)
        self.activations = activations if self.kind.token_dims else "float"

    # ---- checkpoints: what the codes mean travels with them, and is checked ----

    def _meaning(self) -> dict[str, Any]:
        """What two layers must agree in so that the codes of one mean the same in the other, and outputs are equal."""
        grid, activation = self.config.weight.to_dict(), self.config.activation
        return {"grid": grid, "trits": self.trits, "shape": list(self.shape),
                "activation": None if activation is None else activation.to_dict()}  # fmt: skip

    def get_extra_state(self) -> Tensor:  # a tensor goes through every kind of checkpoint
        return torch.tensor(list(json.dumps(self._meaning()).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        if wrong := self._other_meaning(state):
            raise ValueError(wrong)

    def _other_meaning(self, state: Any) -> str:
        """How a saved meaning differs from this layer's; empty where it does not."""
        try:
            saved = json.loads(bytes(state.detach().cpu().tolist()))
            own = json.loads(json.dumps(self._meaning()))
            differing = [(key, saved.get(key), value) for key, value in own.items() if saved.get(key) != value]
        except (AttributeError, ValueError, TypeError) as error:
            return f"{EXTRA_STATE}: expected the JSON of a packed layer as uint8 ({error})"

        def said(value: Any) -> Any:
            return grid_from_dict(value) if isinstance(value, dict) else value

        return "; ".join(f"{key}: expected {said(value)}, got {said(got)}" for key, got, value in differing)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list,
                              unexpected_keys: list, error_msgs: list) -> None:  # fmt: skip
        key = prefix + EXTRA_STATE
        if key in state_dict and (wrong := self._other_meaning(state_dict[key])):
            error_msgs.append(f"{prefix}weight_codes: codes of another meaning: {wrong}")
            return
        given = state_dict.get(prefix + NAME)
        if isinstance(given, Tensor) and given.is_floating_point() and not _are_bytes(given):
            error_msgs.append(f"{prefix}weight_codes: expected bytes, got {given.dtype} numbers that are none (an "
                              "average of codes is no weights' average; unpack_ before averaging)")  # fmt: skip
            return
        scale = state_dict.get(prefix + "weight_scale")
        if isinstance(scale, Tensor) and not is_sharded(scale) and ops.has_values(scale) and not sound(scale):
            error_msgs.append(f"{prefix}weight_scale: expected positive finite scales")
            return
        self._bands.drop(self)
        if not metadata.get("assign_to_params_buffers"):
            self._widen_scale(scale)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys:  # saved by an earlier release, or taken from a file
            missing_keys.remove(key)

    def _widen_scale(self, given: Any) -> None:
        """Gives the layer's scales the type of those that are to be copied into them, where their own type would round
        them: scales are data. The tensor stays the same one, which layers of one weight share."""
        own: Any = self._buffers["weight_scale"]
        if not isinstance(given, Tensor) or given.shape != own.shape or given.is_meta or own.is_meta:
            return
        dtype = given.dtype if given.dtype in SCALE_TYPES else torch.float32
        if torch.promote_types(dtype, own.dtype) == own.dtype:
            return
        if is_sharded(own) or is_sharded(given):  # by the types: all ranks do the same, and none asks the others
            self.weight_scale = own.to(dtype)
        elif not torch.equal(given.to(own.dtype).to(given.dtype), given):
            own.data = own.data.to(dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        restored(self)  # what it gives is the layer's own memory
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._bands.drop(self)
        scale = self.weight_scale
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=scale.device)).dtype
        if self.weight_scale.dtype != scale.dtype:  # a cast: the scales are data, not numbers to compute in
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        c, packing = self.config, ", trits" if self.trits else ""
        group = f", group_size={c.group_size}" if c.group_size else ""
        rounded = f", activations={self.activations}" if self.activations != "float" else ""
        return f"{super().extra_repr()}, {c.weight}{packing}, {c.granularity}{group}{rounded}"

    extra_repr._dynamo_marked_constant = True  # type: ignore[attr-defined]  # vmap asks for it


def sound(scale: Tensor) -> bool:
    """Whether all scales are positive and finite."""
    return bool((scale.float().isfinite() & (scale > 0)).all())


def _are_bytes(given: Tensor) -> bool:
    """Whether these floats stand for bytes, as far as they have values here."""
    return is_sharded(given) or not ops.has_values(given) or torch.equal(given.to(torch.uint8).to(given.dtype), given)


class PackedMatrix(PackedLayer):
    """y = x W^T + b with packed W. x: (…, inputs) -> (…, outputs), in the type of x.

    From the codes, as exact as ``ops.packed_linear`` says: on a CPU, where ``activations="int8"`` is faster from a few
    rows on, and on a GPU where the rows are few (``runtime.reads_codes``): bfloat16 and float16 from tiles on the
    matrix units, float32 from the codes. Elsewhere the weight is unpacked for the call.
    """

    def forward(self, input: Tensor) -> Tensor:  # the name that torch's layers have
        x = input
        if not torch.compiler.is_compiling() and (call := self._call) is not None:
            y = call.product_of(self, x)
            if y is not None:
                return y
        if (type(x) is not Tensor or x.is_nested) and (special := self._special(x)) is not None:
            return special
        return self._multiplied(*self._prepared(x))

    def _multiplied(self, x: Tensor, bias: Tensor | None, part: slice | None = None) -> Tensor:
        """The product with these rows (default: all)."""
        if x.shape[-1] != self.cols:
            raise ValueError(f"x: expected shape (…, {self.cols}), got {tuple(x.shape)}")
        rows = x.shape[0] if x.dim() == 2 else math.prod(x.shape[:-1])
        if not self._reads_codes(x, rows):
            if not self._rounds(x):
                return functional.linear(x, self.matrix(x.dtype, part), bias)
            if transformed():
                return self._by_operators(x, bias, part)
        if x.dim() == 2:
            return self._product(x, bias, part)
        if runtime.exporting():  # or the graph holds a view, which inputs of other strides have not
            x = x.clone(memory_format=torch.contiguous_format)
        y = self._product(x.reshape(rows, self.cols), bias, part)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _nested(self, x: Any) -> Tensor:
        """Row by row as alone, in the layout of ``x``."""
        if x.layout != torch.jagged:
            return torch.nested.as_nested_tensor([self(part) for part in x.unbind()])
        if x._ragged_idx != 1:
            raise NotImplementedError("x: a nested tensor is expected as (batch, length, features), lengths varying")
        return torch.nested.nested_tensor_from_jagged(self(x.values()), x.offsets(), x.lengths())
