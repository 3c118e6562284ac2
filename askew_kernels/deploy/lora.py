"""LoRA adapters of peft over quantized and packed layers: merging onto the grid, and what that costs.

``peft.get_peft_model`` takes such models as they are. Of quantized layers peft's own ``merge_and_unload`` adds the
change to the latent weight, which the layer quantizes as ever; packed ones are merged here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.layers import QuantizedLayer
from ..nn.packed import PackedLayer
from ..quant import compute_scale


class MergeError(NamedTuple):
    """How far a merged weight W' is from W^ + D, the quantized weight and the adapters' change D, which the layer
    computed with: ``relative`` is ||W' - (W^ + D)|| / ||W^ + D||, ``of_change`` the same over ||D||; from 1 on the
    merge loses as much as it brings."""

    relative: float
    of_change: float


class _Merged(NamedTuple):
    """Of one tuner layer: its base, and the float layer that has what it would become."""

    base: Any
    layer: Any
    weight: Tensor | None = None  # on the grid, where the base has one
    scale: Tensor | None = None
    error: MergeError | None = None


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise ImportError('adapters need peft: pip install "askew_kernels[lora]"') from None
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a peft model, got {type(model).__name__}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    if not layers:
        raise ValueError("model: has no adapters; call peft.get_peft_model(model, config) first")
    return layers


def _float_copy(base: Any) -> Any:
    """A float layer that computes what ``base`` does."""
    if not isinstance(base, (QuantizedLayer, PackedLayer)):
        return copy.deepcopy(base)
    weight = base.dequantize() if isinstance(base, PackedLayer) else base.quantized_weight()
    new = base.kind.float_layer(base, nn.Parameter(weight, requires_grad=False))
    if getattr(new, "bias", None) is not None:
        new.bias = nn.Parameter(new.bias.detach().clone(), requires_grad=False)
    return new


def _merged(name: str, layer: Any, adapter_names: Sequence[str] | None) -> _Merged:
    """What merging gives; nothing is written."""
    base = layer.get_base_layer()
    if layer.merged:
        raise ValueError(f"{name}: its adapters are merged; call unmerge_adapter() first")
    if base is not layer.base_layer:
        raise ValueError(f"{name}: an adapter around another, which cannot be merged here")
    new = _float_copy(base)
    before = new.weight.detach().clone() if isinstance(base, (QuantizedLayer, PackedLayer)) else None
    layer.base_layer = new
    try:  # peft's own mathematics, whatever kind of adapter it is
        layer.merge(safe_merge=True, adapter_names=adapter_names)
        if layer.base_layer is not new:  # an adapter that is a layer itself, which has changed places with ``new``
            new = copy.deepcopy(layer.base_layer)
            layer.unmerge()
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{name}: {error}") from None
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()
    if before is None:
        return _Merged(base, new)
    target = new.weight.detach()
    weight, scale = _on_grid(base, target)
    off = float((weight.double() - target.double()).norm())
    size, change = (float(t.double().norm()) for t in (target, target.double() - before.double()))
    return _Merged(base, new, weight, scale, MergeError(off / size if size else 0.0, off / change if change else 0.0))


def _on_grid(base: Any, target: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, scale): s Q(w/s). Where the scale follows the weight it is the rule's; a frozen one is kept, row by row,
    where the rule's would be farther off: a small change leaves most weights on their levels then."""
    c, form = base.config, base.form
    matrix = form.matrix(target).contiguous()
    ruled = compute_scale(matrix, c.weight, c.scale, c.granularity, c.group_size, c.sawb_coefficients, c.scale_dtype)

    def quantized(scale: Tensor) -> Tensor:
        return ops.fake_quantize(matrix, scale, c.weight)

    if isinstance(base, QuantizedLayer) and not base.quantizer.frozen:
        return form.weight(quantized(ruled), target.shape), ruled
    kept = base.weight_scale.detach().float()
    ruled = ruled.to(base.weight_scale.dtype).float()
    errors = [(quantized(s) - matrix).double().square().reshape(len(s), -1).sum(1) for s in (kept, ruled)]
    scale = torch.where(errors[1] < errors[0], ruled, kept)
    return form.weight(quantized(scale), target.shape), scale


def _all_merged(model: nn.Module, adapter_names: Sequence[str] | None) -> dict[str, _Merged]:
    found = {name: _merged(name, layer, adapter_names) for name, layer in _tuner_layers(model).items()}
    shared: dict[int, str] = {}
    for name, m in [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLayer)]:
        other = shared.setdefault(id(m.weight_codes), name)
        if other != name and any(of.base.weight_codes is m.weight_codes for of in found.values()
                                 if isinstance(of.base, PackedLayer)):  # fmt: skip
            raise ValueError(f"{name}: shares its weight with {other}, which a merge would part; call unpack_ first")
    weights = {id(of.base.weight): name for name, of in found.items() if isinstance(of.base, QuantizedLayer)}
    for other, m in model.named_modules():
        for name in [weights[id(p)] for p in m._parameters.values() if id(p) in weights]:
            if m is not found[name].base:
                raise ValueError(f"{name}: shares its weight with {other}, which a merge would change, too; give each "
                                 "a weight of its own first")  # fmt: skip
    return found


@torch.no_grad()
def merge_errors(model: nn.Module, adapter_names: Sequence[str] | None = None) -> dict[str, MergeError]:
    """{layer: ``MergeError``} of ``merge_and_unload`` of the quantized and packed layers that have adapters; nothing is
    changed. adapter_names: which (default: the active ones). Errors as there."""
    return {name: of.error for name, of in _all_merged(model, adapter_names).items() if of.error is not None}


@torch.no_grad()
def merge_and_unload(model: Any, adapter_names: Sequence[str] | None = None) -> tuple[nn.Module, dict[str, MergeError]]:
    """The model without adapters, which are merged into its layers, and how far off each merge is (``MergeError``).

    A layer computed W^ x + D x with its quantized weight W^; it gets s Q((W^ + D)/s). Scales follow their rule; those
    of packed and of hard-quantized layers are kept in the rows where that is nearer. Packed layers stay packed, in
    their bits; other layers are merged as peft does. model: a ``PeftModel``. adapter_names: which (default: the active
    ones).

    Raises, before anything changes and naming the layer, ValueError for adapters that are merged already, that give
    NaN, or of a quantized or packed weight that modules share; ImportError without peft (``pip install
    "askew_kernels[lora]"``).
    """
    found = _all_merged(model, adapter_names)
    for base, new, weight, scale, _ in found.values():
        if weight is None or scale is None:
            base.load_state_dict(new.state_dict())
            continue
        if isinstance(base, PackedLayer):
            base.fill(weight, scale, force=True)
        elif base.quantizer.frozen:
            base.weight.copy_(weight)
            base.quantizer.freeze(base.weight, scale)
        else:
            base.weight.copy_(new.weight)
        if getattr(base, "bias", None) is not None:
            base.bias.copy_(new.bias)
    return model.unload(), {name: of.error for name, of in found.items() if of.error is not None}
