"""What drop-in layers share whose weight is quantized in the forward; ``kinds`` has the layers themselves.

The weight stays the same Parameter object under the same key; ``forward="hard"`` computes with s Q(w/s) and passes
the gradient straight through inside the hull, ``forward="relaxed"`` computes with the float weights in training and
hard in eval (as published). s Q(w/s) is the copy that an ASkew optimizer wrote in its own pass where that is fresh,
and is recomputed otherwise. ``forward="fp8"`` and ``"int8"`` multiply levels (``lowbit``).

What a layer computes follows from its weight and three tensors, ``STATE`` (see ``quant.state``), buffers but for a
learned scale, which is a Parameter: every copy, checkpoint or average that has these computes the same.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import operator
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy

from .. import ops, runtime
from ..contract import compute_dtype
from ..ops.autograd import by_operators
from ..ops.checks import check_float_tensor
from ..quant import QuantConfig, WeightQuantizer, activation_scales
from ..quant.forms import Form
from ..quant.gradients import INT8_GRADIENT, LUQ
from ..quant.scales import row_tops, scales_of_tops
from ..quant.sharding import is_sharded, local_part, sharding_of, split_by
from ..quant.state import QuantizedParameter, empty_state, learned_slopes, scale_owner
from .compiled import clip_, kept_linear
from .inputs import LEARNED_ON, InputQuantizer
from .joint import being_distributed, being_managed, being_split, bias_of, copy_of, is_beside, joint_tops, replicated
from .lowbit import level_linear, rounded_gradient
from .replace import MAKE_PERMANENT

STATE = ("weight_scale", "weight_scale_frozen", "weight_sums")  # names of the quantizer's tensors in a layer
INPUT = "input_quantizer"  # the submodule of a layer whose input has a learned scale
GRIDS = "weight_grid"  # (2, 4): what tells the grids of weight and input apart in a checkpoint


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = "cpu" if x.is_cpu else x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind) and x.dtype.is_floating_point and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def _fake_quantized(x: Tensor, scale: Tensor, grid: Any, clip: bool) -> Tensor:
    """``ops.fake_quantize`` without its checks."""
    scale = scale.double() if x.dtype == torch.float64 else scale
    return ops.run_fake_quantize(x.contiguous(), scale, grid.levels_tensor(x.device), grid.encoding, clip, False, 0)


def token_rows(x: Tensor, token_dims: int) -> int:
    """Rows of a layer's input that have a scale each: one for its last ``token_dims`` dimensions."""
    return math.prod(x.shape[: max(0, x.dim() - token_dims)])


def quantized_input(x: Any, grid: Any, token_dims: int) -> Tensor:
    """s Q(x/s) of a layer's input, straight-through; s = max|x| / c_max over the last ``token_dims`` dimensions, also
    where they are split over ranks."""
    if is_sharded(x):
        (mesh, placements), part = sharding_of(x), x.to_local()
        tops = row_tops(part, token_rows(part, token_dims))
        for dim, of_x in split_by(placements).items():
            if of_x % x.dim() >= x.dim() - token_dims:
                torch.distributed.all_reduce(tops, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
        y = _fake_quantized(part, scales_of_tops(tops, [grid.c_max])[0], grid, False)
        return type(x).from_local(y, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
    return _fake_quantized(x, activation_scales(x, [grid.c_max], token_rows(x, token_dims))[0], grid, False)


class _StraightThrough(torch.autograd.Function):
    """The copy of the weight, whose gradient the weight receives in its own dtype, and zero where it is outside the
    hull, which ``clip`` (scale, grid, form) says; and a learned scale its own (``_LearnedToo``)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor, clip: tuple | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.clip = clip
        return quantized.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _clipped(grad.to(weight.dtype), weight, ctx.clip), None, None


def _clipped(grad: Tensor, weight: Tensor, clip: tuple | None) -> Tensor:
    if clip is None:
        return grad
    again = by_operators(grad)
    clipped = torch.ones_like(weight) if again else grad  # in place: a product has just made this gradient
    clip_(clipped, weight, *clip)
    return grad * clipped if again else clipped


class _LearnedToo(torch.autograd.Function):
    """``_StraightThrough`` with the gradient of the scale, from the same pass. how: (scale in use, grid, form, whether
    the weight's is clipped, LSQ's factor); None where the scale is frozen and receives zeros."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, learned: Tensor, quantized: Tensor, clip: tuple | None,
                how: tuple | None) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight)
        ctx.learned = learned.detach()  # not its numbers: another forward may bring these into their bounds
        ctx.clip, ctx.how = clip, how
        return quantized.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), learned = ctx.saved_tensors, ctx.learned
        grad, to_scale = grad.to(weight.dtype), None
        if not ctx.needs_input_grad[1]:
            return _clipped(grad, weight, ctx.clip), None, None, None, None
        if ctx.how is None or not len(learned):  # of a rank without a row
            return _clipped(grad, weight, ctx.clip), torch.zeros_like(learned), None, None, None
        scale, grid, form, clips, factor = ctx.how
        g, w = form.view(grad), form.view(weight)
        if by_operators(grad):
            slopes = learned_slopes(w, scale, grid, factor)
            to_scale = (g.reshape(slopes.shape) * slopes).sum(1)
            grad = _clipped(grad, weight, ctx.clip)
        else:
            kind = scale.to(compute_dtype(w.dtype)), grid.levels_tensor(w.device), grid.encoding
            to_scale = ops.run_ste_clip_scale_grad(g, w, kind, factor, clips)
        return grad, to_scale.to(learned.dtype), None, None, None


def same_weight(a: QuantConfig, b: QuantConfig) -> bool:
    """Whether two layers may share one weight: only their inputs and gradients are quantized differently, if at all."""
    others: dict[str, Any] = {"activation": None, "activation_scale": None, "gradient": None}
    return a == b or replace(a, **others) == replace(b, **others)


def _fingerprint(config: QuantConfig, device: torch.device) -> Tensor:
    """For the grid of the weight and that of the input: number of levels, the lowest, the highest, and the mean of
    level i times i; zeros without a grid. Of two grids with one fingerprint a scale means the same."""
    levels = [() if grid is None else grid.levels for grid in (config.weight, config.activation)]
    rows = [[len(c), c[0], c[-1], math.fsum(map(operator.mul, range(len(c)), c)) / len(c)] if c else [0.0] * 4
            for c in levels]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _like(came: Tensor, present: Tensor) -> Tensor:
    """On the device of ``present`` and of its type, of replicas of a mesh this rank's; the same Parameter where it is
    one."""
    return came if isinstance(came, nn.Parameter) else local_part(came).to(present.device, present.dtype)


def in_a_mode() -> bool:
    """Whether operators go to somebody who traces, or makes fake tensors."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


@contextlib.contextmanager
def plain_parameters(layer: nn.Module) -> Iterator[None]:
    """Parameters of torch's own class: make_fx and fake tensors know tensors by their class, and refuse others."""
    own: list[tuple[Any, type]] = [(p, type(p)) for p in layer.parameters() if isinstance(p, QuantizedParameter)]
    try:
        for p, _ in own:
            p.__class__ = nn.Parameter
        yield
    finally:
        for p, cls in own:
            p.__class__ = cls


class QuantizedLayer(nn.Module):
    """What the layers share: the quantizer, its tensors as buffers, and the weight to compute with."""

    weight: Any  # nn.Parameter; typed by torch's layers
    bias: Any
    config: QuantConfig
    kind: ClassVar[Any]  # its entry in kinds.KINDS
    form: ClassVar[Form]  # its kind's: how the weight is a matrix
    _version = 2  # of the state_dict: 1 is a float layer's
    # what a layer that takes the place of this one does not inherit
    own_attributes = ("config", "quantizer", "_shown", "_shard", *STATE, GRIDS, INPUT)

    def __init__(self, *args: Any, config: QuantConfig | None = None, **kwargs: Any) -> None:
        """The float layer's arguments, and how its weight is quantized."""
        super().__init__(*args, **kwargs)
        self._attach(config or QuantConfig())

    @classmethod
    def class_for(cls, layer: Any) -> Any:
        """What takes the place of ``layer``."""
        return cls

    @classmethod
    def from_float(cls, layer: nn.Module, config: QuantConfig | None = None) -> Any:
        """Shares the Parameter objects of ``layer``, which is not copied and should not be used further."""
        new = cls.kind.float_layer(layer, layer.weight, cls.class_for(layer))
        new._attach(config or QuantConfig())
        return new

    def to_float(self) -> nn.Module:
        """A float layer with the same Parameter objects (the latent weights)."""
        return self.kind.float_layer(self, self.weight)

    def _attach(self, config: QuantConfig) -> None:
        if not isinstance(config, QuantConfig):
            raise TypeError(f"config: expected a QuantConfig, got {config!r}")
        if config.level_dtype is not None and not self.kind.multiplies_levels:
            raise ValueError(f"forward: {config.forward!r} is for linear layers, and this is {type(self).__name__}; "
                             "give {pattern: config} with forward='hard' for these")  # fmt: skip
        check_float_tensor("weight", self.weight)
        self.config = config
        self.quantizer = WeightQuantizer(config, self.form)
        self.quantizer.rows(self.weight)  # a group size that does not fit is an error here, not in the first forward
        self._shown: tuple[Tensor, ...] = ()  # the quantizer's tensors as they were when they became buffers
        for kind in (self._parameters, self._buffers):  # of another configuration, before
            kind.pop(STATE[0], None)
        self._hold((None, None, None))
        self._modules.pop(INPUT, None)
        if config.activation_scale is not None and self.kind.token_dims:
            self._modules[INPUT] = InputQuantizer(config.activation, config.activation_scale, self.weight.device)
        self._buffers.update({GRIDS: _fingerprint(config, self.weight.device)})
        self._tied()
        if getattr(self.weight, "grad", None) is not None:  # of before: it says nothing
            self._serves()

    def _serves(self) -> None:
        self.quantizer.served = True

    _serves._dynamo_marked_constant = True  # type: ignore[attr-defined]  # done while torch.compile traces

    def _tied(self) -> WeightQuantizer:
        """The quantizer, tied to the weight this module has now (a copied or replaced Parameter is tied anew)."""
        quantizer = self.quantizer
        weight = self._parameters.get("weight")
        if weight is None or not isinstance(weight, nn.Parameter):
            return quantizer  # functional_call, a parametrization: a temporary has no identity
        if (found := WeightQuantizer.of(weight)) is not quantizer:
            others = [layer._parameters.get("weight") for layer in quantizer.layers if layer is not self]
            if found is not None and found.form == self.form and same_weight(found.config, self.config):  # shared
                quantizer = self.quantizer = found
            elif any(w is not weight and WeightQuantizer.of(w) is quantizer for w in others):
                quantizer = self.quantizer = copy.deepcopy(quantizer)  # two that were one Parameter need two
            if found is not quantizer:
                quantizer.tie(weight)
            quantizer.layers.add(self)
        quantizer.fit(weight)
        if not all(map(operator.is_, quantizer.tensors, self._held())):
            self._show(quantizer)
        return quantizer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tied at once: an optimizer or a schedule that is unpickled with the model asks before there is a forward."""
        super().__setstate__(state)  # type: ignore[misc]
        weight = self._parameters.get("weight")
        if weight is not None and not is_sharded(weight):
            self._tied()

    def _held(self) -> list[Any]:
        """What stands in the layer as ``quantizer.tensors``."""
        scale = self._parameters.get(STATE[0])
        buffers = self._buffers
        return [buffers.get(STATE[0]) if scale is None else scale, buffers.get(STATE[1]), buffers.get(STATE[2])]

    def _hold(self, tensors: Any) -> None:
        """Puts them where ``_held`` finds them."""
        held: Any = self._parameters if self.config.learns_scale else self._buffers
        held[STATE[0]] = tensors[0]
        self._buffers.update(zip(STATE[1:], tensors[1:], strict=True))

    def _show(self, quantizer: WeightQuantizer) -> None:
        """The quantizer's tensors as buffers. Where somebody put another tensor in the place of one (loading with
        ``assign``, a move to another device), the quantizer takes it over."""
        held = self._held()
        came = [b is not None and not any(b is t for t in self._shown) for b in held]
        if any(came):
            mine = zip(held, came, quantizer.tensors, strict=True)
            quantizer.tensors = tuple(_like(b, t) if new else t for b, new, t in mine)  # type: ignore[assignment]
        self._shown = quantizer.tensors
        self._hold(self._shown)
        if is_sharded(self._buffers[GRIDS]):  # type: ignore[arg-type]
            self._buffers[GRIDS] = local_part(self._buffers[GRIDS])  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        """A new weight is never taken for the one before it: FSDP2 puts its gathered weights here in every forward,
        at the same addresses and with the same version counters, and this rank's part back afterwards."""
        if name == "weight" and (quantizer := self.__dict__.get("quantizer")) is not None:
            quantizer.invalidate()
            old = self._parameters.get("weight")
            was_tied = type(old) is QuantizedParameter and not old.is_meta and "_loading" not in self.__dict__
            if isinstance(value, nn.Parameter) and value is not old:
                if old is not None and not is_sharded(old) and not is_sharded(value):
                    quantizer.untie(old)
                if is_sharded(value):
                    self._take_shard(value, quantizer)
                elif was_tied and (quantizer.frozen or not self.training):
                    scale = "with the frozen scale of the old one" if quantizer.frozen else "by its rule"
                    warnings.warn(
                        f"{type(self).__name__}: weight was replaced; it is quantized anew {scale}, so that folding a "
                        "BatchNorm or another factor into it does not give what both layers computed: fold before "
                        "quantize_, or after dequantize_", stacklevel=2,
                    )  # fmt: skip
        elif name in STATE and sys._getframe(1).f_code.co_name == "_load_parameter_into_model":
            # from_pretrained of transformers: memory that nobody has written, for what the checkpoint lacks
            held: Any = self._held()[STATE.index(name)]
            empty = empty_state(self.quantizer.scale.numel(), value.device)[STATE.index(name)]
            value = (nn.Parameter(empty) if isinstance(held, nn.Parameter) else empty) if held.is_meta else held
        super().__setattr__(name, value)

    def _take_shard(self, value: Any, quantizer: WeightQuantizer) -> None:
        """A weight that is split over ranks. Raises NotImplementedError where its scales cannot be."""
        quantizer.part(value)
        value._askew_quantizer, quantizer.sharded_type = quantizer, value.dtype  # what an optimizer looks for
        shard = self.__dict__.get("_shard")
        if shard is None or value.device_mesh.ndim >= shard.device_mesh.ndim:
            self.__dict__["_shard"] = quantizer.shard = value
            self._join(value, quantizer)
        else:  # gathered by FSDP2, of TP's parts
            quantizer.written_unseen(value)

    def _join(self, weight: Any, quantizer: WeightQuantizer) -> None:
        """What is learned beside a weight that is split over ranks goes to all of them, whole."""
        learned = quantizer.learned
        if learned is not None and not is_beside(learned, weight):
            self._show(quantizer)
            self._parameters[STATE[0]] = replicated(quantizer.learned, weight)  # type: ignore[arg-type]
            self._show(quantizer)
            for layer in quantizer.layers:  # that share the weight
                layer._show(quantizer)
        if (of_input := self._modules.get(INPUT)) is not None:
            of_input.join(weight)  # type: ignore[operator]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; what is learned is not shown to those who would split it (``joint``)."""
        found = super().named_parameters(*args, **kwargs)
        if being_split() or being_managed():
            return ((name, p) for name, p in found if name != STATE[0] and not name.startswith(f"{INPUT}."))
        return found

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; a style of tensor parallelism, which takes whatever is within for another layer, finds nothing."""
        found = super().named_modules(*args, **kwargs)
        return itertools.islice(found, 1) if being_distributed() else found

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Tensor parallelism puts its parts in their places by this."""
        quantizer = self.__dict__.get("quantizer")
        if name == "weight" and param is not None and quantizer is not None and is_sharded(param):
            quantizer.invalidate()
            self._take_shard(param, quantizer)
        super().register_parameter(name, param)

    @property
    def weight_scale(self) -> Tensor:  # type: ignore[override]
        """The scale in use, float32 (rows,): the Parameter itself where it is learned and is the one in use."""
        if self._ordinary():
            quantizer, scale = self.quantizer, self.quantizer.current_scale(self.weight)
            learned = quantizer.learned
            itself = learned is not None and not is_sharded(learned) and scale.data_ptr() == learned.data_ptr()
            return learned if itself else scale  # type: ignore[return-value]
        return self._functional_scale(self.weight)

    def quantized_weight(self) -> Tensor:
        """s Q(w/s), detached, in the weight's dtype; of a weight that is sharded over ranks the whole (a call for all
        ranks)."""
        if self._ordinary():
            return self.quantizer.quantized(self.weight).clone()
        return self._functional_weight().detach()

    @torch.no_grad()
    def hard_quantize_(self) -> None:
        """w <- s Q(w/s), and the scale is kept from now on. RuntimeError where the weight is not a Parameter."""
        if not isinstance(self._parameters.get("weight"), nn.Parameter):
            raise RuntimeError(f"{type(self).__name__}: its weight is not a Parameter but computed; {MAKE_PERMANENT}")
        quantizer, scale = self._tied(), self.weight_scale.clone()
        shard = self.__dict__.get("_shard")  # under FSDP2: what stays, also while the whole weight is gathered
        if shard is not None:
            view = self.form.view(local_part(shard))
            view.copy_(ops.fake_quantize(view, quantizer.part(shard).take(scale), self.config.weight))
        if not is_sharded(self.weight):
            self.weight.copy_(self.quantized_weight())
        quantizer.freeze(self.weight, scale)

    def reset_parameters(self) -> None:
        """The float layer's; the scale, frozen or not, follows the new weights."""
        super().reset_parameters()  # type: ignore[misc]
        if (quantizer := self.__dict__.get("quantizer")) is not None:
            quantizer.forget()

    def _ordinary(self) -> bool:
        """The weight is a Parameter whose changes can be seen, and nothing traces or transforms the call: what is
        known of it may be kept for the next. In every forward, so of few Python operations."""
        if (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
                or forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None
                or torch._C._len_torch_dispatch_stack() > 0):  # fmt: skip  # a mode, of fake tensors or counts
            return False
        parameters, quantizer, buffers = self._parameters, self.quantizer, self._buffers
        weight, learned = parameters.get("weight"), quantizer.learned
        if (
            type(weight) is not QuantizedParameter
            or weight.__dict__.get("_askew_quantizer") is not quantizer
            or (
                buffers["weight_scale"] is not quantizer.scale
                if learned is None
                else parameters["weight_scale"] is not learned
            )
            or buffers["weight_scale_frozen"] is not quantizer.flag
            or buffers["weight_sums"] is not quantizer.row_sums
        ):
            self._tied()
            weight = parameters.get("weight")
            if type(weight) is not QuantizedParameter:
                return False
            if self.quantizer.learned is not None and scale_owner(parameters["weight_scale"]) is None:  # type: ignore[arg-type]
                return False  # a temporary, of functional_call
        return not (weight.is_meta or weight.is_inference())

    def _compiled_with_copy(self, x: Tensor) -> bool:
        """Whether torch.compile is looking, for itself and not to export, at a product that has an operator, which
        torch.func's transforms do not see through."""
        if (not torch.compiler.is_dynamo_compiling() or runtime.exporting()
                or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):  # fmt: skip
            return False
        weight: Any = self._parameters.get("weight")
        types = (weight.dtype, autocast_dtype(x) and x.dtype)
        learns = self.config.learns_scale and not self.quantizer.frozen  # its gradient has to be in the graph
        return (self.kind.multiplies_levels and not learns and type(weight) is QuantizedParameter
                and type(x) is Tensor and not x.is_nested and x.dtype in types)  # fmt: skip

    def _functional_scale(self, weight: Tensor) -> Tensor:
        """``weight_scale`` as a function of the weight and the buffers; nothing is kept."""
        if is_sharded(weight):
            return self._tied().scale_of_parts(weight)
        return self.quantizer.scale_for(weight, self._held())

    def _float_weight(self) -> Tensor:
        """The weight itself; to a mode that traces a view of it, which backward may keep: it needs no class again."""
        if not in_a_mode():
            return self.weight
        with plain_parameters(self):
            weight: Any = self.weight
            return weight.view_as(weight) if type(weight) is nn.Parameter else weight

    def _functional_weight(self) -> Tensor:
        """The differentiable s Q(w/s) as operators, for whatever is not ordinary: always recomputed, nothing kept."""
        weight: Any = self._float_weight()
        weight = weight.full_tensor() if is_sharded(weight) else weight
        scale, view, config = self._functional_scale(weight), self.form.view, self.config
        y = _fake_quantized(view(weight), scale, config.weight, config.clips_in_backward)
        if (zero := self._learned_zero(view(weight), scale)) is not None:
            y = y + zero
        return view(y)  # of a view, the inverse is its view

    def _learned_zero(self, point: Tensor, scale: Tensor) -> Tensor | None:
        """0, in the shape of ``point``, with LSQ's gradient to a scale that is learned; None where none is."""
        if not self.config.learns_scale or self.quantizer.frozen or not torch.is_grad_enabled():
            return None
        learned = copy_of(self._held()[0], self.weight)
        learned = torch.where((learned - learned).detach() == 0, learned, 0.0)  # what is not finite starts anew
        slopes = learned_slopes(point, scale, self.config.weight)
        return ((learned - learned.detach())[:, None] * slopes).to(point.dtype).reshape(point.shape)

    def _soft_weight(self) -> Tensor:
        """What stands between the weight and s Q(w/s) by a recipe's slack, straight-through, and LSQ's gradient to a
        scale that is learned; nothing is kept."""
        weight: Any = self.weight
        if is_sharded(weight):
            return self._weight_of_parts()
        view = self.form.view
        if self._ordinary():
            scale = self.quantizer.current_scale(weight)
            return self._differentiable(weight, view(self._softened(view(weight), scale)), True)
        scale = self._functional_scale(weight)
        soft = view(self._softened(view(weight), scale))
        y = weight + (soft - weight).detach()
        return y + view(slope) if (slope := self._learned_zero(view(weight), scale)) is not None else y

    def _softened(self, point: Tensor, scale: Tensor) -> Tensor:
        grid, slack = self.config.weight, self.quantizer.slack.to(point.device)  # type: ignore[union-attr]
        scale = scale.double() if point.dtype == torch.float64 else scale
        return ops.run_soft_quantize(point, scale, grid.levels_tensor(point.device), grid.encoding, slack)

    def forward_weight(self) -> Tensor:
        """What the next forward computes with, detached: the weight, s Q(w/s), or what a recipe has in between."""
        if self.computes_float:
            return self.weight.detach()
        return self._soft_weight().detach() if self.softens else self.quantized_weight()

    @torch.no_grad()
    def forward_input(self, x: Tensor) -> Tensor:
        """What the next forward computes with in place of ``x``: ``x`` itself, or what it is rounded to, detached."""
        if self.training and self._floats() and INPUT not in self._modules:
            return x
        if (levels := self.config.level_dtype) is not None:
            flat = x.to(autocast_dtype(x) or x.dtype).reshape(-1, x.shape[-1]).contiguous()
            q, scale = ops.run_token_levels(flat, levels, self.config.activation)
            return (q.to(scale.dtype) * scale[:, None]).to(flat.dtype).reshape(x.shape)
        grid = self.kind.input_grid(self)
        return x if grid is None else self._quantized_input(x.detach(), grid)

    def _weight_of_parts(self) -> Tensor:
        """s Q(w/s) of a weight that tensor parallelism has split (or what a recipe has in between), differentiable:
        every rank quantizes its part."""
        weight: Any = self.weight
        quantizer, view, config = self._tied(), self.form.view, self.config
        of_rows, mine = quantizer.part(weight), weight.to_local()
        scale, part = of_rows.take(quantizer.scale_of_parts(weight)), view(mine)
        learned = quantizer.hand_out() if config.learns_scale and torch.is_grad_enabled() else None
        if learned is not None:
            with torch.no_grad():
                made = (
                    self._softened(part, scale) if self.softens else _fake_quantized(part, scale, config.weight, False)
                )
            clips, own = config.clips_in_backward and not self.softens, (scale, config.weight, self.form)
            y = _LearnedToo.apply(mine, of_rows.take(copy_of(learned, weight)), view(made), own if clips else None,
                                  (*own, clips, self._scale_factor(weight)))  # fmt: skip
        elif self.softens:
            y = view(part + (self._softened(part, scale) - part).detach())
        else:
            y = view(_fake_quantized(part, scale, config.weight, config.clips_in_backward))
        return type(weight).from_local(y, *sharding_of(weight), run_check=False, shape=weight.shape,
                                       stride=weight.stride())  # fmt: skip

    def _eager_weight(self, dtype: torch.dtype) -> Tensor:
        """s Q(w/s), differentiable: the quantizer's own copy."""
        weight: Any = self._parameters["weight"]
        quantizer = self.quantizer
        quantized, inside = quantizer.copy_and_inside(weight, dtype)
        if not torch.is_grad_enabled():
            return quantized
        return self._differentiable(weight, quantized, inside)

    def _differentiable(self, weight: Tensor, quantized: Tensor, inside: bool) -> Tensor:
        """``quantized``, whose gradient the weight receives, and the scale where it is learned. ``inside``: no weight
        is outside the hull."""
        quantizer, config = self.quantizer, self.config
        clips = config.clips_in_backward and not inside
        clip = (quantizer.scale, config.weight, self.form) if clips else None
        if quantizer.learned is None or (learned := quantizer.hand_out()) is None:
            return _StraightThrough.apply(weight, quantized, clip)
        how = None if quantizer.frozen else (quantizer.scale, config.weight, self.form, clips,
                                             self._scale_factor(weight))  # fmt: skip
        return _LearnedToo.apply(weight, copy_of(learned, weight), quantized, clip, how)

    def _scale_factor(self, weight: Tensor) -> float:
        """LSQ's, of the gradient of a scale of the whole weight."""
        return ops.scale_grad_factor(weight.numel(), len(self.quantizer.scale), self.config.weight)

    def _eager_forward(self, x: Tensor, *more: Any) -> Tensor:
        low, bias = autocast_dtype(x), self.bias
        quantized = self._eager_weight(low or self._parameters["weight"].dtype)  # type: ignore[union-attr]
        bias = None if bias is None else bias.to(quantized.dtype)
        if low is None:
            return self.kind.product(self, x, quantized, bias, *more)
        with torch.autocast(x.device.type, enabled=False):  # x and weight have the type to compute in
            return self.kind.product(self, x.to(low), quantized, bias, *more)

    def _eager_levels(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(what receives the gradient, levels in ``dtype``, scale): the quantizer's own copy."""
        weight: Any = self._parameters["weight"]
        quantizer = self.quantizer
        levels, inside = quantizer.copy_and_inside(weight, dtype)
        return self._differentiable(weight, weight, inside), levels, quantizer.scale

    def _functional_levels(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """As ``_eager_levels``, recomputed by differentiable operators."""
        weight = self._functional_weight()
        whole = self.weight.full_tensor() if is_sharded(self.weight) else self.weight
        scale = self._functional_scale(self.weight)
        levels = self._levels_at(self.form.view(whole.detach()), scale, dtype)
        return weight, self.form.view(levels), scale

    def _level_forward(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None,
                       rows: slice | None = None) -> Tensor:  # fmt: skip
        """The product of the input's levels and the weight's (or these ``rows`` of it), both of the type ``dtype``."""
        if x.is_nested:
            return self._nested_levels(x, dtype)
        ordinary = self._ordinary() and type(x) in (Tensor, nn.Parameter)
        weight, levels, scale = (self._eager_levels if ordinary else self._functional_levels)(dtype)
        view, low = self.form.view, autocast_dtype(x) or x.dtype
        if rows is not None:
            weight, levels, scale = weight[rows], levels[rows], scale[rows] if scale.numel() > 1 else scale
        outputs, cols = view(levels).shape
        if x.shape[-1:] != (cols,) or not x.is_floating_point():
            raise ValueError(f"x: expected floats of shape (…, {cols}), got {x.dtype} {tuple(x.shape)}")
        bias = self.bias if bias is None else bias
        bias = None if bias is None else bias.to(low)
        flat = x.to(low).reshape(-1, cols).contiguous()
        grid = self.config.activation
        low_gradient = self.config.gradient == INT8_GRADIENT
        y = level_linear(flat, view(weight), view(levels), scale, bias, grid, low_gradient, None)
        return y.reshape(*x.shape[:-1], outputs)

    def _levels_of_parts(self, x: Any, dtype: torch.dtype) -> Tensor:
        """The same of a DTensor under tensor parallelism: of every rank's rows with all inputs, or of its inputs, whose
        tokens have one scale over all ranks, and whose sums are still to be added over them."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        weight: Any = self.weight
        mesh, placements = sharding_of(weight) or (None, ())
        if mesh is None or mesh.ndim != 1 or self.form.transposed or mesh != x.device_mesh:
            raise NotImplementedError(
                f"forward: {self.config.forward!r} of a {type(self).__name__} with a weight of shape "
                f"{tuple(weight.shape)} takes a DTensor where parallelize_module has split it by ColwiseParallel or "
                "RowwiseParallel; expected that, a plain tensor, or forward='hard'"
            )
        inputs = 1 in split_by(placements).values()
        wanted = Shard(x.dim() - 1) if inputs else Replicate()
        if x.placements != (wanted,):
            x = x.redistribute(mesh, [wanted])
        part, low = x.to_local(grad_placements=[wanted if inputs else Partial()]), autocast_dtype(x) or x.dtype
        flat = part.to(low).reshape(-1, part.shape[-1]).contiguous()
        of_rows, quantizer = self._weight_of_parts().to_local(), self._tied()  # type: ignore[attr-defined]
        scale = quantizer.part(weight).take(quantizer.scale_of_parts(weight))
        levels = self._levels_at(local_part(weight.detach()), scale, dtype)
        bias, tops = bias_of(self.bias, mesh, inputs, low), joint_tops(flat, mesh) if inputs else None
        config = self.config
        y = level_linear(flat, of_rows, levels, scale, bias, config.activation, config.gradient == INT8_GRADIENT, tops)
        y = y.reshape(*part.shape[:-1], y.shape[-1])
        shape = torch.Size((*x.shape[:-1], weight.shape[0]))
        stride = torch.empty(shape, device="meta").stride()
        placed = [Partial() if inputs else Shard(len(shape) - 1)]
        return type(x).from_local(y, mesh, placed, run_check=False, shape=shape, stride=stride)

    def _levels_at(self, matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Q(w/s) of rows in a type of levels, by operators."""
        wide = matrix.to(compute_dtype(matrix.dtype))
        levels = _fake_quantized(wide, scale, self.config.weight, False) / scale[:, None]  # one unit off at most
        return (levels.nan_to_num().round() if dtype == torch.int8 else levels).to(dtype)

    def _nested_levels(self, x: Any, dtype: torch.dtype) -> Tensor:
        """Row by row as alone, in the layout of ``x``."""
        if x.layout != torch.jagged:
            return torch.nested.as_nested_tensor([self._level_forward(part, dtype) for part in x.unbind()])
        values = self._level_forward(x.values(), dtype)
        return torch.nested.nested_tensor_from_jagged(values, x.offsets(), x.lengths())

    def _quantized_input(self, x: Tensor, grid: Any) -> Tensor:
        if (learned := self._modules.get(INPUT)) is not None:
            eager = self._ordinary() and type(x) in (Tensor, nn.Parameter)
            found = learned.quantized(x, token_rows(x, self.kind.token_dims), eager)  # type: ignore[operator]
            if found is not None and learned.undecided and not is_sharded(x):
                return torch.where(learned.start > 0, found, quantized_input(x, grid, self.kind.token_dims))  # type: ignore[operator,arg-type]
            if found is not None:
                return found
        return quantized_input(x, grid, self.kind.token_dims)

    def product(self, x: Tensor, weight: Tensor, *more: Any) -> Tensor:
        """The float layer's product with ``weight`` in place of its own."""
        return self.kind.product(self, x, weight, self.bias, *more)

    def forward(self, input: Tensor, *more: Any) -> Tensor:  # the name that torch's layers have
        """``more``: what the kind's product takes besides."""
        x = input
        if isinstance(x, Proxy):  # torch.fx: a layer is one node, as torch's own
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *more), {})
        self._serves()
        if in_a_mode():
            with plain_parameters(self):
                y = self._output(x, *more)
        else:
            y = self._output(x, *more)
        gradient = self.config.gradient
        return rounded_gradient(y, gradient.bits) if isinstance(gradient, LUQ) else y

    @property
    def computes_float(self) -> bool:
        """Whether this forward takes the float weights: in training, where the config or a recipe's start says so."""
        return self.training and (self.config.forward == "relaxed" or self._floats())

    def _floats(self) -> bool:
        """In training, whether a recipe says so."""
        quantizer = self.quantizer
        if not quantizer.softened:  # as in most forwards
            return False
        if not torch.compiler.is_compiling():
            quantizer.look_on_the_way()
        return quantizer.floating

    @property
    def softens(self) -> bool:
        """Whether it takes what stands between these and s Q(w/s)."""
        return self.training and self.quantizer.slack is not None and self.config.forward != "relaxed"

    def _output(self, x: Tensor, *more: Any) -> Tensor:
        if self.training and self._floats():
            if INPUT in self._modules:  # what is learned has a gradient always: DistributedDataParallel waits for it
                x = self._quantized_input(x, self.kind.input_grid(self))  # type: ignore[arg-type]
            return self.product(x, self._float_weight(), *more)
        if (levels := self.config.level_dtype) is not None:
            if is_sharded(x):
                return self._levels_of_parts(x, levels)
            return self._level_forward(x, levels, *more)
        if (grid := self.kind.input_grid(self)) is not None:
            x = self._quantized_input(x, grid)
        if self.training and self.config.forward == "relaxed":
            return self.product(x, self._float_weight(), *more)
        if self.softens:
            return self.product(x, self._soft_weight(), *more)
        if self._ordinary() and type(x) in (Tensor, nn.Parameter) and not x.is_nested:
            return self._eager_forward(x, *more)
        if not more and self._compiled_with_copy(x):
            low, tensors = autocast_dtype(x), [local_part(t.detach()) for t in self._held()]
            x, bias = (x, self.bias) if low is None else (x.to(low), None if self.bias is None else self.bias.to(low))
            return kept_linear(x, bias, self.form.transposed, self.weight, *tensors)  # type: ignore[arg-type]
        if is_sharded(self.weight):
            return self.product(x, self._weight_of_parts(), *more)
        return self.product(x, self._functional_weight(), *more)

    # ---- checkpoints: plain keys, and the quantizer's tensors ----

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._ordinary():
            self.quantizer.current_scale(self.weight)
            self._tied()  # other tensors, where the weight has got another shape
        held: Any = self._buffers[GRIDS]
        grids = _fingerprint(self.config, held.device)
        if ops.has_values(held) and not torch.equal(held, grids):  # memory that a loader left unwritten
            self._buffers[GRIDS] = grids
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.form.transposed and not keep_vars and f"{prefix}weight" in destination:  # the order of files
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list,
                              unexpected_keys: list, error_msgs: list) -> None:  # fmt: skip
        """A checkpoint without the quantizer's tensors is a float model's (silently, where it says so itself), or a
        part of one, which is told: a frozen scale stays, another follows the weights that came."""
        started = self._tied().started
        there = [prefix + name in state_dict for name in STATE]
        of, mine = state_dict.get(prefix + GRIDS), _fingerprint(self.config, torch.device("cpu"))
        if of is not None and ops.has_values(of) and not torch.equal(of := of.detach().cpu().float(), mine):
            which = "weight" if torch.equal(of[1], mine[1]) else "activation"
            error_msgs.append(f"{prefix}{GRIDS}: the checkpoint's scales are of another {which} grid than "
                              f"{getattr(self.config, which)}; call quantize_ with the configuration that was "
                              "trained")  # fmt: skip
            return
        self.__dict__["_loading"] = True  # by ``assign``: another weight, which comes with its scale
        try:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys,
                                          error_msgs)  # fmt: skip
        finally:
            del self.__dict__["_loading"]
        came = prefix + "weight" in state_dict
        for name in (*STATE, GRIDS) if came else ():
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)
        if came and not any(there) and self.config.learns_scale and not self.quantizer.frozen:
            self.quantizer.forget()  # it starts anew, from the weights that came
        learns = self.config.learns_scale
        if there[0] and not there[1] and not learns:  # version 0.1: the scale was in the state_dict once it was frozen
            self._buffers[STATE[1]].fill_(1)  # type: ignore[union-attr]
        quantizer = self._tied()  # what was loaded by ``assign``, or by swapping tensors, which change their class then
        quantizer.mark()
        if learns and there == [True, False, False] and not quantizer.frozen:
            quantizer.learn_on(self._parameters.get("weight"))
            if not started:
                warnings.warn(f"{prefix}{STATE[0]}: {LEARNED_ON}", stacklevel=2)
        quantizer.came()
        quantizer.look()
        if came and not any(there) and (quantizer.frozen or metadata.get("version") != 1):
            warnings.warn(
                f"{prefix}weight: the checkpoint has no {STATE[0]} for this layer: "
                + ("its frozen scale stays, whatever weights came" if quantizer.frozen else
                   f"the scale follows the weights that came (rule {self.config.scale}), which is right for a float "
                   "model's checkpoint and wrong for a part of a quantized one's"), stacklevel=2,
            )  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = [local_part(t.detach()) for t in self._held()]
        self.quantizer.moving()
        super()._apply(fn, recurse)
        after = self._held()
        for i, (new, old) in enumerate(zip(after, before, strict=True)):
            if old.is_meta and not new.is_meta:  # memory that nobody has written
                old = empty_state(len(before[0]), new.device)[i]
            elif old.dtype == new.dtype:
                continue  # otherwise a cast: these are not numbers to compute in
            if is_sharded(new):
                after[i] = replicated(nn.Parameter(old.to(local_part(new).device), new.requires_grad), new)
            elif isinstance(new, nn.Parameter):
                new.data = old.to(new.device)
                new.grad = None if new.grad is None else new.grad.to(old.dtype)
            else:
                after[i] = old.to(new.device)
        self._hold(after)
        self._buffers[GRIDS] = _fingerprint(self.config, after[1].device)
        weight: Any = self._parameters.get("weight")
        if weight is not None and is_sharded(weight):  # torch has put another tensor into the same object
            self.quantizer.allocate(weight)
            self._show(self.quantizer)
            self._take_shard(weight, self.quantizer)
        quantizer = self._tied()
        quantizer.mark()
        quantizer.moved()
        return self

    def extra_repr(self) -> str:
        c = self.config
        group = f", group_size={c.group_size}" if c.group_size else ""
        forward = c.forward if c.gradient is None else f"{c.forward}, gradient={c.gradient}"
        return f"{super().extra_repr()}, {c.weight}, scale={c.scale}, {c.granularity}{group}, forward={forward}"

    extra_repr._dynamo_marked_constant = True  # type: ignore[attr-defined]  # vmap asks for it
