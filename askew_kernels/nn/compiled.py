"""The product of a compiled layer with the copy s Q(w/s) that the optimizer wrote.

A graph cannot look whether a copy is still the weight's, so it does not see the copy: the product is one operator, a
function of input, weight, bias and scales as the compiler has to know it, and finds the copy as an eager layer does,
fresh or made anew. Torch keeps the Parameter as it is on the way from the graph to the operator, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from ..ops.autograd import one_by_one
from ..quant import WeightQuantizer
from ..quant.forms import Form

_SHARED = "Tensor weight, Tensor scale, Tensor frozen, Tensor sums"  # what the copy follows from
_library = torch.library.Library("askew", "FRAGMENT")


def clip_(grad: Tensor, weight: Tensor, scale: Tensor, grid: Any, form: Form) -> None:
    """Zeroes, in place, the gradient of a layer's weight where that is outside the hull."""
    scale = scale.double() if weight.dtype == torch.float64 else scale
    with torch.no_grad():
        ops.run_ste_clip_(form.view(grad), form.view(weight), scale, grid.levels_tensor(weight.device), grid.encoding)


def _quantizer(weight: Tensor) -> WeightQuantizer:
    found = WeightQuantizer.of(weight)
    if found is None:
        raise RuntimeError("weight: expected the Parameter of a quantized layer, got a tensor that stands for it; call "
                           "the model uncompiled, or under torch.compiler.set_stance('force_eager')")  # fmt: skip
    return found


def _product(x: Tensor, weight: Tensor, scale: Tensor, frozen: Tensor, sums: Tensor, bias: Tensor | None,
             transposed: bool) -> Tensor:  # fmt: skip
    """x (s Q(w/s))^T + b in the type of x."""
    quantizer = _quantizer(weight)
    return functional.linear(x, quantizer.form.view(quantizer.copy_and_inside(weight, x.dtype)[0]), bias)


def _to_input(grad: Tensor, weight: Tensor, scale: Tensor, frozen: Tensor, sums: Tensor, transposed: bool) -> Tensor:
    quantizer = _quantizer(weight)
    return torch.matmul(grad, quantizer.form.view(quantizer.copy_and_inside(weight, grad.dtype)[0]))


def _to_weight(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, frozen: Tensor, sums: Tensor,
               transposed: bool) -> Tensor:  # fmt: skip
    """Straight-through: zero outside the hull where the layer clips, in the type of the weight."""
    quantizer = _quantizer(weight)
    config, view = quantizer.config, quantizer.form.view
    made = view(torch.mm(grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1])).to(weight.dtype))
    if config.clips_in_backward and not quantizer.all_inside(weight):
        clip_(made, weight, quantizer.current_scale(weight), config.weight, quantizer.form)
    return made


def _fake_product(x: Tensor, weight: Tensor, scale: Tensor, frozen: Tensor, sums: Tensor, bias: Tensor | None,
                  transposed: bool) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[1 if transposed else 0])


def _fake_to_input(grad: Tensor, weight: Tensor, scale: Tensor, frozen: Tensor, sums: Tensor, transposed: bool
                   ) -> Tensor:  # fmt: skip
    return grad.new_empty(*grad.shape[:-1], weight.shape[0 if transposed else 1])


def _fake_to_weight(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, frozen: Tensor, sums: Tensor,
                    transposed: bool) -> Tensor:  # fmt: skip
    shape = (weight.shape[1], weight.shape[0]) if transposed else weight.shape
    made = weight.new_empty(shape)
    return made.mT if transposed else made


def _define(name: str, arguments: str, run: Any, fake: Any) -> Any:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)  # a replay would not look at the weight
    _library.define(f"{name}({arguments}, bool transposed) -> Tensor", tags=tags)
    op = getattr(torch.ops.askew, name).default
    _library.impl(name, torch._disable_dynamo(run), "CompositeExplicitAutograd")  # type: ignore[attr-defined]
    torch.library.register_fake(f"askew::{name}", fake, lib=_library)
    torch.library.register_vmap(f"askew::{name}", lambda *args: one_by_one(op, *args), lib=_library)
    return op


_kept_linear = _define("kept_linear", f"Tensor x, {_SHARED}, Tensor? bias", _product, _fake_product)
_kept_to_input = _define("kept_linear_to_input", f"Tensor grad, {_SHARED}", _to_input, _fake_to_input)
_kept_to_weight = _define("kept_linear_to_weight", f"Tensor grad, Tensor x, {_SHARED}", _to_weight, _fake_to_weight)


class KeptLinear(torch.autograd.Function):
    """y = x (s Q(w/s))^T + b; inputs: x, b or None, whether the weight is transposed, weight, scale, frozen, sums."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, transposed: bool, *weight: Tensor) -> Tensor:
        return _kept_linear(x, *weight, bias, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, _, ctx.transposed, *weight = inputs
        ctx.save_for_backward(x, *weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weight = ctx.saved_tensors
        to_x, to_bias, _, to_weight, *_ = ctx.needs_input_grad
        return (
            _kept_to_input(grad, *weight, ctx.transposed) if to_x else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if to_bias else None,
            None,
            _kept_to_weight(grad, x, *weight, ctx.transposed) if to_weight else None,
            None, None, None,
        )  # fmt: skip


def kept_linear(x: Tensor, bias: Tensor | None, transposed: bool, *weight: Tensor) -> Tensor:
    """``KeptLinear`` of its inputs; torch.compile does not look into one whose result needs no gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *weight)):
        return KeptLinear.apply(x, bias, transposed, *weight)
    return _kept_linear(x, *weight, bias, transposed)
