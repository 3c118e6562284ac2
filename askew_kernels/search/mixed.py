"""Layers whose weight and input are mixtures of their candidate quantizations, and the calls that make and remove them.

    w_hat = sum_b softmax(β / T)_b s_b Q_b(w / s_b)        and alike for the input

One pass reads w for all candidates, and one pass back gives the gradients of w and β (``ops.mix_fake_quantize``). The
scales of all candidates come from one pass of row sums, without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import contract, ops
from ..nn import KINDS, packed_layers, quantized_layers
from ..nn.convert import COMPUTING, decline_fast_paths
from ..nn.kinds import SEARCHED, replaceable
from ..nn.layers import token_rows
from ..nn.replace import replace_modules, successors
from ..quant import Uniform, activation_scales, default_rule
from ..quant.forms import Form
from ..quant.scales import scale_from_sums
from .policy import ACT_BITS, WEIGHT_BITS, Kinds, candidate_layers, check_searched, named, weight_grid, weight_id


def check_candidates(name: str, bits: Sequence[int | None], known: range, none: bool) -> tuple[Any, ...]:
    """Ascending and without repetition, None last. ValueError where there are none or one is not known."""
    if isinstance(bits, (str, bytes)) or not isinstance(bits, Iterable):
        raise ValueError(f"{name}: expected a list of bits, got {bits!r:.80}")
    found = list(dict.fromkeys(int(b) if isinstance(b, np.integer) else b for b in bits))
    if not 0 < len(found) <= ops.MOST_CANDIDATES:
        raise ValueError(f"{name}: expected at least one candidate and at most {ops.MOST_CANDIDATES}, got {len(found)}")
    for b in found:
        if (b is None and not none) or (b is not None and (type(b) is not int or b not in known)):
            raise ValueError(f"{name}: expected {known[0]} to {known[-1]}{' or None' if none else ''}, got {b!r}")
    return (*sorted(b for b in found if b is not None), *([None] if None in found else []))


class MixedLayer(nn.Module):
    """What the mixed layers share: ``weight_strengths`` and ``act_strengths``, β, one number a candidate, and
    ``temperature``, T. A single candidate has no strength to learn; ``act_bits=(None,)`` leaves the input alone."""

    weight: Any
    weight_strengths: Any
    act_strengths: Any
    kind: ClassVar[Any]  # its entry in nn.KINDS
    # what a layer that takes the place of this one does not inherit
    own_attributes = ("weight_bits", "act_bits", "signed", "learned", "temperature", "weight_grids", "act_grids",
                      "_weight_codes", "_act_codes", "weight_strengths", "act_strengths", "weight_scales")  # fmt: skip

    @classmethod
    def from_float(cls, layer: nn.Module, **candidates: Any) -> Any:
        """Shares the Parameter objects of ``layer``."""
        new = cls.kind.float_layer(layer, layer.weight, cls)
        new._attach(**candidates)
        return new

    def to_float(self) -> nn.Module:
        return self.kind.float_layer(self, self.weight)

    def _attach(self, weight_bits: Sequence[int], act_bits: Sequence[int | None], signed: bool, learned: bool) -> None:
        self.weight_bits = check_candidates("weight_bits", weight_bits, WEIGHT_BITS, none=False)
        self.act_bits = check_candidates("act_bits", act_bits, ACT_BITS, none=True)
        self.signed, self.learned, self.temperature = signed, learned, 1.0
        self.weight_grids = [weight_grid(b) for b in self.weight_bits]  # type: ignore[arg-type]
        self.act_grids = [None if b is None else Uniform(bits=b, signed=signed) for b in self.act_bits]
        self._weight_codes = ops.candidate_encodings(self.weight_grids)
        self._act_codes = ops.candidate_encodings(self.act_grids)
        like: dict[str, Any] = {"device": self.weight.device, "dtype": contract.compute_dtype(self.weight.dtype)}
        for what, bits in (("weight_strengths", self.weight_bits), ("act_strengths", self.act_bits)):
            setattr(self, what, nn.Parameter(torch.zeros(len(bits), **like), requires_grad=len(bits) > 1))
        if learned:  # LSQ's start
            size = 2 * self.form.matrix(self.weight.detach()).abs().flatten(1).mean(1).to(**like).clamp(
                min=contract.SCALE_FLOOR
            )
            tops = torch.tensor([g.c_max for g in self.weight_grids], **like)
            self.weight_scales = nn.Parameter(size[None] / tops[:, None].sqrt())

    @property
    def form(self) -> Form:
        """How the weight is a matrix."""
        return self.kind.form_with(self.kind.geometry_of(self))

    def weight_probabilities(self) -> Tensor:
        """softmax(β / T) of the weight's candidates."""
        return torch.softmax(self.weight_strengths / self.temperature, 0)

    def act_probabilities(self) -> Tensor:
        return torch.softmax(self.act_strengths / self.temperature, 0)

    @torch.no_grad()
    def _rule_scales(self) -> Tensor:
        """(candidates, rows), of every grid by its own rule."""
        matrix = self.form.matrix(self.weight.detach())
        rows = len(matrix)
        if self.weight.numel() == 0:
            return torch.ones(len(self.weight_grids), rows, dtype=torch.float32, device=self.weight.device)
        sums, cols = ops.row_sums(matrix, rows), self.weight.numel() // rows
        return torch.stack([scale_from_sums(sums, cols, g, default_rule(g)) for g in self.weight_grids])

    def mixed_weight(self) -> Tensor:
        """sum_b p_b s_b Q_b(w / s_b), differentiable; by the operator without checks: rules give positive scales."""
        scales = self.weight_scales.clamp(min=contract.SCALE_FLOOR) if self.learned else self._rule_scales()
        strengths, form = self.weight_probabilities(), self.form
        matrix = form.matrix(self.weight).contiguous()
        mixed = ops.run_mix_fake_quantize(matrix, scales, strengths, self._weight_codes, True, self.learned)
        return form.weight(mixed, self.weight.shape)

    def mixed_input(self, x: Tensor) -> Tensor:
        if self.act_grids == [None] or not self.kind.token_dims:
            return x
        tops = [1.0 if g is None else g.c_max for g in self.act_grids]
        scales = activation_scales(x, tops, token_rows(x, self.kind.token_dims))
        return ops.run_mix_fake_quantize(x, scales, self.act_probabilities(), self._act_codes, False, False)

    def forward(self, input: Tensor, *more: Any) -> Tensor:
        return self.kind.product(self, self.mixed_input(input), self.mixed_weight(), getattr(self, "bias", None), *more)

    def extra_repr(self) -> str:
        inputs = "" if self.act_bits == (None,) else f", act_bits={self.act_bits}"
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}{inputs}"


COMPUTING.append(MixedLayer)
# {torch's class: that of its mixtures}
MIXED: dict[Any, Any] = {
    kind.plain: type(
        f"Mixed{kind.plain.__name__}",
        (MixedLayer, kind.plain),
        {
            "kind": kind,
            "__module__": __name__,
            "__doc__": f"{kind.plain.__name__} as a mixture of its candidates' weights.",
        },
    )
    for kind in KINDS.values()
}
globals().update({cls.__name__: cls for cls in MIXED.values()})  # where pickle looks for them
MixedLinear, MixedConv2d = MIXED[nn.Linear], MIXED[nn.Conv2d]
FilterFn = Callable[[nn.Module, str], bool]


def chosen_layers(model: nn.Module, filter_fn: FilterFn | None, kinds: Kinds = SEARCHED) -> dict[str, nn.Module]:
    """{name: layer} of these kinds that the search is about, each module once. ValueError where there is none, and
    naming those that filter_fn lets pass but that have no weight of their own: quantized, packed or computed."""
    layers = candidate_layers(model, kinds)
    computed = {n: m for n, m in layers.items() if m._parameters.get("weight") is None}
    for found, state, way in (
        (quantized_layers(model), "quantized already", "call dequantize_ first"),
        (packed_layers(model), "packed already", "call unpack_ and dequantize_ first"),
        (computed, "the weight is computed (weight_norm, pruning, a parametrization)", "make it a parameter first"),
    ):
        if names := [name for name, m in found.items() if filter_fn is None or filter_fn(m, name)]:
            raise ValueError(f"model: {', '.join(names)}: {state}; {way}, or leave them out by filter_fn")
    found = {
        n: m
        for n, m in layers.items()
        if type(m) in getattr(replaceable(m), "classes", ()) and (filter_fn is None or filter_fn(m, n))
    }
    if not found:
        check_searched(kinds)
        raise ValueError(f"model: no {named(kinds)} layer to quantize" + (" passes filter_fn" if filter_fn else ""))
    if "" in found:
        raise ValueError("model: is itself a layer; wrap it in nn.Sequential")
    return found


def _plain_class(layer: nn.Module) -> Any:
    kind: Any = replaceable(layer)
    return kind.plain


def mix_(model: nn.Module, weight_bits: Sequence[int] = (2, 3, 4, 8), act_bits: Sequence[int | None] = (None,),
         filter_fn: FilterFn | None = None, *, signed: Mapping[str, bool] | None = None, learned: bool = False,
         kinds: Kinds = SEARCHED) -> nn.Module:  # fmt: skip
    """Replaces the layers of these ``kinds``, in place, by mixtures of their candidates; returns the model.

    weight_bits: of 1 … 8 (1: binary); act_bits: of 2 … 8 and None (float). signed: whether a layer's input has negative
    values (default: it has). learned: scales are parameters (LSQ) instead of following their rule. Parameters stay the
    same objects; hooks, flags and attributes of a replaced layer go on. Layers that share a weight share its strengths
    and scales: there is one choice for it. Raises ValueError before anything is replaced.
    """
    layers = chosen_layers(model, filter_fn, kinds)
    check_candidates("weight_bits", weight_bits, WEIGHT_BITS, none=False)
    check_candidates("act_bits", act_bits, ACT_BITS, none=True)
    firsts: dict[int, Any] = {}

    def make(name: str, layer: Any) -> nn.Module:
        given = {"weight_bits": weight_bits, "act_bits": act_bits, "signed": (signed or {}).get(name, True)}
        new = MIXED[_plain_class(layer)].from_float(layer, **given, learned=learned)
        first = firsts.setdefault(weight_id(layer), new)
        for shared in ("weight_strengths", "act_strengths", *(["weight_scales"] if learned else [])):
            setattr(new, shared, getattr(first, shared))
        return new

    _swap(model, layers, make)
    return model


def unmix_(model: nn.Module) -> nn.Module:
    """The inverse of ``mix_``: float layers with the same Parameter objects, in place."""
    _swap(model, mixed_layers(model), lambda _, layer: layer.to_float())
    return model


def _swap(model: nn.Module, layers: Mapping[str, nn.Module], make: Callable[[str, Any], nn.Module]) -> None:
    """Puts ``make(name, layer)`` wherever a layer stands, under each of its names."""
    ids = set(map(id, layers.values()))
    everywhere = {name: m for name, m in model.named_modules(remove_duplicate=False) if id(m) in ids}
    replace_modules(model, successors(everywhere, make, "its to_float()"))
    decline_fast_paths(model)


def mixed_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the mixed layers in ``model``."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MixedLayer)}
