"""What a policy costs: multiply–accumulates from one traced forward, then bits, bit operations, bytes, milliseconds.

============  =========================================================================================================
``average_bits``  sum of weights × their bits / number of weights, of the searched layers
``bitops``        sum of MACs × weight bits × input bits, for one sample; a float input counts 32
``bytes``         of packed codes and float32 scales, exactly what ``ak.pack_`` makes of the searched layers
``latency``       sum of what ``latency=`` says of each layer, in its own unit
============  =========================================================================================================

Layers that are not searched, and with hooks other modules, add to ``bitops`` (32 × 32 bits), and to no other cost.
A weight that several layers share is there once: it counts once in average bits and bytes, and has one choice of bits.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..analysis.batches import moved, samples
from ..analysis.differentiable import as_written, check_values, left_alone
from ..analysis.generators import seeded
from ..contract import row_bytes
from ..nn import hard_quantize_, pack_, quantize_
from ..nn.kinds import SEARCHED
from ..nn.kinds import kind_of as find_kind
from ..nn.layers import quantized_input
from ..nn.replace import first_input, observed
from ..quant import QuantConfig, Uniform
from .policy import Kinds, Policy, candidate_layers, check_searched, kind_of, named, weight_grid, weight_id

#: What a ``Budget`` may bound.
COSTS = ("average_bits", "bitops", "bytes", "latency")
FLOAT_BITS = 32

MacsHook = Callable[[nn.Module, tuple, Any], float]


class BudgetError(ValueError):
    """A budget that no policy can meet, or that every policy meets."""


def told(value: float) -> str:
    """In full, so that what an error names can be given as the next budget."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


@dataclass(frozen=True)
class Budget:
    """A limit that the chosen policy never exceeds: exactly one of the costs."""

    average_bits: float | None = None
    bitops: float | None = None
    bytes: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in COSTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(f"budget: expected exactly one of {', '.join(COSTS)}, got {', '.join(given) or 'none'}")
        value = self.limit
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
            raise BudgetError(f"budget: {self.kind}: expected a number > 0, got {value!r}")
        plain = int(value) if isinstance(value, numbers.Integral) else float(value)  # NumPy's are not for JSON
        object.__setattr__(self, self.kind, plain)

    @property
    def kind(self) -> str:
        return next(name for name in COSTS if getattr(self, name) is not None)

    @property
    def limit(self) -> float:
        return getattr(self, self.kind)


@dataclass
class LayerProfile:
    """One searched layer."""

    name: str
    kind: str
    macs: float  # of one sample
    rows: int
    cols: int  # weights of an output channel
    signed: bool = True  # the input has negative values
    looked_up: bool = False  # the input is indices, which have no bits to choose
    act_errors: dict[int, float] = field(default_factory=dict)  # {bits: ‖x − x̂‖² / ‖x‖²} on the traced batch

    @property
    def weights(self) -> int:
        return self.rows * self.cols

    def packed_bytes(self, bits: int) -> int:
        return self.rows * (row_bytes(self.cols, bits) + 4)  # codes, and a float32 scale for each channel


@dataclass
class Profile:
    """What one forward told: the searched layers, and the MACs of all the rest."""

    layers: dict[str, LayerProfile]
    other_macs: float = 0.0
    tied: dict[str, str] = field(default_factory=dict)  # {layer: the first one that has the same weight}
    unreached: tuple[str, ...] = ()  # layers that the forward does not call
    uncounted: tuple[str, ...] = ()  # modules with a weight whose MACs are not known

    @property
    def weights(self) -> dict[str, list[LayerProfile]]:
        """{the first layer that has this weight: all that have it}, each weight once."""
        found: dict[str, list[LayerProfile]] = {}
        for name, p in self.layers.items():
            found.setdefault(self.tied.get(name, name), []).append(p)
        return found


NO_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


def _observe(model: nn.Module, x: Any, hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> None:
    """model(x) in eval mode and without gradients, every submodule by its own forward; all is as before after it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it reads the weights of layers that it does not call
        with observed(model, hooks), left_alone(model), seeded(0), torch.no_grad(), as_written():
            model(moved(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.inference_mode(False)
def trace(model: nn.Module, x: Any, names: Sequence[str] | None = None, *, act_bits: Sequence[int | None] = (),
          hooks: Mapping[type[nn.Module], MacsHook] | None = None, kinds: Kinds = SEARCHED) -> Profile:  # fmt: skip
    """Runs ``model(x)`` once, in eval mode, and counts; a layer that the forward does not reach costs nothing.

    names: the layers that are searched (default: every one of these ``kinds``). hooks: {type: f(module, inputs,
    output) -> MACs of the whole batch} for modules that the count does not know. The batch has as many samples as the
    first tensor in ``x`` has rows. Raises ValueError where the forward reaches no layer, for a name that is none of a
    layer, and for a model without values (meta device).
    """
    check_values(model)
    if not isinstance(hooks or {}, Mapping) or not all(
        isinstance(t, type) and callable(f) for t, f in (hooks or {}).items()
    ):
        raise ValueError(f"hooks: expected {{type: f(module, inputs, output)}}, got {hooks!r:.80}")
    layers = candidate_layers(model, kinds)
    searched = set(layers if names is None else names)
    if unknown := sorted(searched - layers.keys()):
        raise ValueError(f"names: the model has no {named(kinds)} layer {', '.join(unknown)}")
    batch = samples(x)
    if batch == 0:
        raise ValueError("x: expected at least one sample, got an empty batch")
    found: dict[str, LayerProfile] = {}
    other = [0.0]
    errors: dict[str, dict[int, tuple[float, float]]] = {}
    uncounted: dict[str, None] = {}

    def count(name: str, kind: Any, module: Any, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        x = first_input(args, kwargs)
        macs = kind.macs(module, x, y) / batch
        if name not in searched:
            other[0] += macs
            return
        rows = kind.form_with(kind.geometry_of(module)).shape(module.weight.shape)[0]
        p = found.setdefault(name, LayerProfile(name, kind_of(module), 0.0, rows, module.weight.numel() // max(1, rows),
                                                signed=False, looked_up=not kind.token_dims))  # fmt: skip
        p.macs += macs
        p.signed |= p.looked_up or bool((x < 0).any())
        for bits in () if p.looked_up else act_bits:
            if bits is not None:
                error, size = _act_error(x, bits, p.signed, kind.token_dims)
                before = errors.setdefault(name, {}).get(bits, (0.0, 0.0))
                errors[name][bits] = before[0] + error, before[1] + size

    def count_other(function: MacsHook, module: nn.Module, args: tuple, kwargs: Any, y: Any) -> None:
        other[0] += float(function(module, args, y)) / batch

    watched: list[Any] = [(m, partial(count, name, find_kind(m))) for name, m in layers.items()]
    for name, module in model.named_modules():
        if name in layers:
            continue
        known = [function for kind, function in (hooks or {}).items() if isinstance(module, kind)]
        watched += [(module, partial(count_other, function)) for function in known]
        own = any(p is not None and p.dim() > 1 for p in module._parameters.values())
        if own and not known and not isinstance(module, NO_PRODUCTS):
            told = f"{name or 'model'} ({type(module).__name__})"
            watched.append((module, lambda *_, told=told: uncounted.update({told: None})))
    _observe(model, x, watched)
    if not found:
        check_searched(kinds)
        raise ValueError("model: its forward reaches no layer to quantize")
    for name, by_bits in errors.items():
        found[name].act_errors = {b: e / n if n else 0.0 for b, (e, n) in by_bits.items()}
    reached = {name: found[name] for name in layers if name in found}
    firsts = {weight_id(layers[name]): name for name in reversed(reached)}  # of the layers that share a weight
    tied = {name: first for name in reached if (first := firsts[weight_id(layers[name])]) != name}
    unreached = tuple(name for name in layers if name in searched and name not in found)
    return Profile(reached, other[0], tied, unreached, tuple(uncounted))


def _act_error(x: Tensor, bits: int, signed: bool, dims: int) -> tuple[float, float]:
    """(‖x − x̂‖², ‖x‖²)"""
    x = x.float().contiguous()
    if not x.numel():
        return 0.0, 0.0
    error = x - quantized_input(x, Uniform(bits=bits, signed=signed), dims)
    return float((error * error).sum()), float((x * x).sum())


# ---- costs as tables: layer -> (weight candidates, input candidates) -------------------------------------------------

Latency = Callable[[LayerProfile, int, "int | None"], float] | Mapping[str, Mapping[Any, float]]


@dataclass
class Cost:
    """``tables``: {layer: (Kw, Ka) float64}, one for each weight, under the first layer that has it; a policy's cost:
    (``fixed`` + the sum of its entries) / ``divisor``."""

    kind: str
    tables: dict[str, Tensor]
    divisor: float = 1.0
    fixed: float = 0.0

    def of(self, choice: Mapping[str, tuple[int, int]]) -> float:
        """Exactly: integers stay integers until the division."""
        return (self.fixed + math.fsum(float(t[choice[name]]) for name, t in self.tables.items())) / self.divisor

    def expected(self, probabilities: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """E[cost] under independent candidates: sum p_w^T C p_a, differentiable."""
        given = ((*probabilities[name], table) for name, table in self.tables.items())
        parts = [weights @ table.to(weights) @ acts.to(weights) for weights, acts, table in given]
        return (self.fixed + torch.stack(parts).sum()) / self.divisor

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most that the candidates can cost."""
        low, high = (math.fsum(float(f(t)) for t in self.tables.values()) for f in (torch.min, torch.max))
        return (self.fixed + low) / self.divisor, (self.fixed + high) / self.divisor


def cost_of(kind: str, profile: Profile, weight_bits: Sequence[int], act_bits: Sequence[int | None],
            latency: Latency | None = None) -> Cost:  # fmt: skip
    """The tables of one cost. ValueError where ``latency`` is missing or does not know a layer."""
    shared = profile.weights

    def entry(layers: list[LayerProfile], w: int, a: int | None) -> float:
        if kind == "average_bits":
            return layers[0].weights * w
        if kind == "bytes":
            return layers[0].packed_bytes(w)
        if kind == "bitops":
            return sum(p.macs * w * (FLOAT_BITS if a is None else a) for p in layers)
        return sum(_latency_of(latency, p, w, a) for p in layers)

    rows = {n: [[float(entry(layers, w, a)) for a in act_bits] for w in weight_bits] for n, layers in shared.items()}
    tables = {name: torch.tensor(table, dtype=torch.float64, device="cpu") for name, table in rows.items()}
    if kind == "average_bits":
        return Cost(kind, tables, divisor=float(sum(layers[0].weights for layers in shared.values())))
    return Cost(kind, tables, fixed=profile.other_macs * FLOAT_BITS**2 if kind == "bitops" else 0.0)


def _latency_of(latency: Latency | None, p: LayerProfile, w: int, a: int | None) -> float:
    if latency is None:
        raise ValueError("latency: expected a table or a function beside Budget(latency=…), got None")
    try:
        value = latency(p, w, a) if callable(latency) else latency[p.name][w if w in latency[p.name] else str(w)]
    except KeyError:
        raise ValueError(f"latency: has no entry for {p.name} at {w} bits") from None
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"latency: {p.name} at {w} bits: expected a number >= 0, got {value!r}")
    return float(value)


@torch.inference_mode(False)
def latency_table(model: nn.Module, x: Any, weight_bits: Sequence[int] = (2, 3, 4, 8), *, seconds: float = 0.1,
                  kinds: Kinds = SEARCHED) -> dict[str, dict[str, float]]:  # fmt: skip
    """{layer: {bits: milliseconds}}, measured: each layer packed at each width, on the input that it has in model(x).

    The median over about ``seconds`` for each, with the threads torch has; for ``search_policy(latency=…)``.
    """
    inputs: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        inputs.setdefault(name, first_input(args, kwargs).detach().clone())

    check_values(model)
    layers = candidate_layers(model, kinds)
    _observe(model, x, [(m, partial(keep, name)) for name, m in layers.items()])
    if not inputs:
        raise ValueError("model: its forward reaches no layer to measure")
    from torch.utils.benchmark import Timer  # brings in setuptools: a fifth of a second that others need not wait for

    def measured(name: str, bits: int) -> float:
        given = {"layer": _packed_copy(layers[name], bits), "x": inputs[name]}
        timer = Timer("layer(x)", globals=given, num_threads=torch.get_num_threads())
        with torch.no_grad():
            return 1e3 * timer.blocked_autorange(min_run_time=seconds).median

    return {name: {str(bits): measured(name, bits) for bits in weight_bits} for name in inputs}


def _packed_copy(layer: Any, bits: int) -> nn.Module:
    """The layer alone, packed, with a weight that was drawn."""
    kind: Any = find_kind(layer)
    new = kind.plain(**kind.arguments_of(layer)).to(layer.weight.dtype).to_empty(device=layer.weight.device)
    with seeded(0):
        new.reset_parameters()
    config = QuantConfig(weight=weight_grid(bits))
    return pack_(hard_quantize_(quantize_(nn.Sequential(new), config, kinds=kind.name)))[0].eval()  # type: ignore[index]


def policy_costs(policy: Policy, profile: Profile) -> dict[str, float]:
    """Average bits, bit operations and bytes of a policy by layer name; float layers count 32 bits.

    A shared weight counts once for each number of bits that its layers ask for. ValueError names a layer without entry.
    """
    bits = macs = size = 0.0
    for layers in profile.weights.values():
        kept = set()
        for p in layers:
            if (chosen := policy.entry(p.name)) is None:
                raise ValueError(f"policy: has no entry for {p.name}")
            kept.add(chosen.weight_bits)
            macs += p.macs * (chosen.weight_bits or FLOAT_BITS) * (chosen.act_bits or FLOAT_BITS)
        bits += layers[0].weights * sum(w or FLOAT_BITS for w in kept)
        size += sum(4 * layers[0].weights if w is None else layers[0].packed_bytes(w) for w in kept)
    weights = sum(layers[0].weights for layers in profile.weights.values())
    return {"average_bits": bits / weights, "bitops": macs + profile.other_macs * FLOAT_BITS**2, "bytes": size}


def warn_of(profile: Profile, kind: str) -> None:
    """Says which layers a search leaves out although it was asked for them, and which MACs it does not know."""
    left, unknown = ", ".join(profile.unreached), ", ".join(profile.uncounted)
    if left:
        warnings.warn(f"search: the forward does not call {left}; left float, at no cost", stacklevel=4)
    if unknown and kind == "bitops":
        warnings.warn(f"search: bit operations of {unknown} are not known and not counted; give "
                      "hooks={type: f(module, inputs, output) -> MACs}", stacklevel=4)  # fmt: skip
