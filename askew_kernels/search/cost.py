"""What a policy costs: multiply–accumulates from one traced forward, then bits, bit operations, bytes, milliseconds.

============  =========================================================================================================
``average_bits``  sum of weights × their bits / number of weights, of the searched layers
``bitops``        sum of MACs × weight bits × input bits, for one sample; a float input counts 32
``bytes``         of packed codes and float32 scales, exactly what ``ak.pack_`` makes of the searched layers
``latency``       sum of what ``latency=`` says of each layer, in its own unit
============  =========================================================================================================

Layers that are not searched, and with hooks other modules, add to ``bitops`` (32 × 32 bits), and to no other cost.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import hard_quantize_, pack_, quantize_
from ..nn.policy import LayerPolicy, Policy, candidate_layers, kind_of, layer_roles
from ..quant import QuantConfig, activation_scales
from ..quant.grids import Uniform
from ..reference import row_bytes

COSTS = ("average_bits", "bitops", "bytes", "latency")
FLOAT_BITS = 32

MacsHook = Callable[[nn.Module, tuple, Any], float]


class BudgetError(ValueError):
    """A budget that no policy can meet, or that every policy meets."""


@dataclass(frozen=True)
class Budget:
    """A limit that the chosen policy never exceeds: exactly one of the costs."""

    average_bits: float | None = None
    bitops: float | None = None
    bytes: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            raise BudgetError(f"budget: expected exactly one of {', '.join(COSTS)}, got {', '.join(given) or 'none'}")
        ((name, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise BudgetError(f"budget: {name}: expected a number > 0, got {value!r}")

    @property
    def kind(self) -> str:
        return next(name for name in COSTS if getattr(self, name) is not None)

    @property
    def limit(self) -> float:
        return getattr(self, self.kind)


@dataclass
class LayerProfile:
    """One searched layer. ``macs`` of one sample; ``cols``: weights of an output channel; ``signed``: the input has
    negative values; ``act_errors``: {bits: ‖x − x̂‖² / ‖x‖²} on the traced batch."""

    name: str
    kind: str
    macs: float
    rows: int
    cols: int
    signed: bool = True
    calls: int = 1
    act_errors: dict[int, float] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return self.rows * self.cols

    def packed_bytes(self, bits: int) -> int:
        """Codes and float32 scales, one a channel."""
        return self.rows * row_bytes(self.cols, bits) + 4 * self.rows


@dataclass
class Profile:
    """What one forward told: the searched layers, and the MACs of all the rest."""

    layers: dict[str, LayerProfile]
    other_macs: float = 0.0


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Any:
    """Eval mode, every module back in its own afterwards."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


def linear_macs(module: nn.Linear, y: Tensor) -> int:
    return y.numel() * module.in_features


def conv_macs(module: nn.Conv2d, y: Tensor) -> int:
    """Every output needs (in / groups) × kernel products, whatever stride, padding and dilation made of the size."""
    return y.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)


@torch.no_grad()
def trace(
    model: nn.Module, x: Any, names: Sequence[str] | None = None, *, act_bits: Sequence[int | None] = (),
    hooks: Mapping[type[nn.Module], MacsHook] | None = None,
) -> Profile:  # fmt: skip
    """Runs ``model(x)`` once, in eval mode, and counts.

    names: the layers that are searched (default: every linear and convolutional one). hooks: {type: f(module, inputs,
    output) -> MACs of the whole batch} for modules that the count does not know. The batch is ``len(x)`` samples.
    A layer that the forward does not reach costs nothing. Raises ValueError where the forward reaches none.
    """
    layers = candidate_layers(model)
    searched = set(layers if names is None else names)
    batch = len(x) if isinstance(x, Tensor) and x.dim() else 1
    if batch == 0:
        raise ValueError("x: expected at least one sample, got an empty batch")
    found: dict[str, LayerProfile] = {}
    other = [0.0]
    errors: dict[str, dict[int, list[float]]] = {}

    def count(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: Any, inputs: tuple, y: Any) -> None:
            macs = (linear_macs if isinstance(module, nn.Linear) else conv_macs)(module, y) / batch
            if name not in searched:
                other[0] += macs
                return
            rows = module.weight.shape[0]
            p = found.setdefault(
                name, LayerProfile(name, kind_of(module), 0.0, rows, module.weight.numel() // max(1, rows), False, 0)
            )
            p.macs += macs
            p.calls += 1
            p.signed |= bool((inputs[0] < 0).any())
            dims = 1 if isinstance(module, nn.Linear) else 3
            for bits in act_bits:
                if bits is not None:
                    sums = errors.setdefault(name, {}).setdefault(bits, [0.0, 0.0])
                    for i, value in enumerate(_act_error(inputs[0], bits, p.signed, dims)):
                        sums[i] += value

        return hook

    def count_other(function: MacsHook) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, inputs: tuple, y: Any) -> None:
            other[0] += float(function(module, inputs, y)) / batch

        return hook

    handles = [m.register_forward_hook(count(name)) for name, m in layers.items()]
    for module in model.modules():
        for kind, function in (hooks or {}).items():
            if isinstance(module, kind) and not isinstance(module, (nn.Linear, nn.Conv2d)):
                handles.append(module.register_forward_hook(count_other(function)))
    try:
        with _evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("model: its forward reaches no layer to quantize")
    for name, by_bits in errors.items():
        found[name].act_errors = {b: e / n if n else 0.0 for b, (e, n) in by_bits.items()}
    return Profile({name: found[name] for name in layers if name in found}, other[0])


def _act_error(x: Tensor, bits: int, signed: bool, dims: int) -> tuple[float, float]:
    """(‖x − x̂‖², ‖x‖²)"""
    grid = Uniform(bits=bits, signed=signed)
    rows = math.prod(x.shape[: max(0, x.dim() - dims)])
    x = x.float().contiguous()
    if not x.numel():
        return 0.0, 0.0
    error = x - ops.fake_quantize(x, activation_scales(x, [grid.c_max], rows)[0], grid).reshape(x.shape)
    return float((error * error).sum()), float((x * x).sum())


# ---- costs as tables: layer -> (weight candidates, input candidates) -------------------------------------------------

Latency = Callable[[LayerProfile, int, "int | None"], float] | Mapping[str, Mapping[Any, float]]


@dataclass
class Cost:
    """``tables``: {layer: (Kw, Ka) float64}; a policy's cost: (``fixed`` + the sum of its entries) / ``divisor``."""

    kind: str
    tables: dict[str, Tensor]
    divisor: float = 1.0
    fixed: float = 0.0

    def of(self, choice: Mapping[str, tuple[int, int]]) -> float:
        """Exactly: integers stay integers until the division."""
        return (self.fixed + math.fsum(float(t[choice[name]]) for name, t in self.tables.items())) / self.divisor

    def expected(self, probabilities: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """E[cost] under independent candidates: sum p_w^T C p_a, differentiable."""
        parts = []
        for name, t in self.tables.items():
            weights, acts = probabilities[name]
            parts.append(weights @ t.to(weights) @ acts.to(weights))
        return (self.fixed + torch.stack(parts).sum()) / self.divisor

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most that the candidates can cost."""
        low, high = (math.fsum(float(f(t)) for t in self.tables.values()) for f in (torch.min, torch.max))
        return (self.fixed + low) / self.divisor, (self.fixed + high) / self.divisor


def cost_of(
    kind: str, profile: Profile, weight_bits: Sequence[int], act_bits: Sequence[int | None],
    latency: Latency | None = None,
) -> Cost:  # fmt: skip
    """The tables of one cost. ValueError where ``latency`` is missing or does not know a layer."""

    def entry(p: LayerProfile, w: int, a: int | None) -> float:
        if kind == "average_bits":
            return p.weights * w
        if kind == "bitops":
            return p.macs * w * (FLOAT_BITS if a is None else a)
        if kind == "bytes":
            return p.packed_bytes(w)
        return _latency_of(latency, p, w, a)

    tables = {
        name: torch.tensor([[float(entry(p, w, a)) for a in act_bits] for w in weight_bits], dtype=torch.float64)
        for name, p in profile.layers.items()
    }
    if kind == "average_bits":
        return Cost(kind, tables, divisor=float(sum(p.weights for p in profile.layers.values())))
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


def latency_table(
    model: nn.Module, x: Any, weight_bits: Sequence[int] = (2, 3, 4, 8), *, seconds: float = 0.1
) -> dict[str, dict[str, float]]:
    """{layer: {bits: milliseconds}}, measured: each layer packed at each width, on the input that it has in model(x).

    The median over about ``seconds`` for each, with the threads torch has. JSON-ready; give it to
    ``search_policy(latency=…)``.
    """
    inputs: dict[str, Any] = {}
    layers = candidate_layers(model)

    def keep(name: str) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, given: tuple, y: Any) -> None:  # what a hook returns would replace y
            inputs.setdefault(name, given[0].detach().clone())

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in layers.items()]
    try:
        with torch.no_grad(), _evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    from torch.utils.benchmark import Timer  # brings in setuptools: a fifth of a second that others need not wait for

    table: dict[str, dict[str, float]] = {}
    for name, given in inputs.items():
        for bits in weight_bits:
            layer = _packed_copy(layers[name], bits)
            timer = Timer("layer(x)", globals={"layer": layer, "x": given}, num_threads=torch.get_num_threads())
            with torch.no_grad():
                table.setdefault(name, {})[str(bits)] = 1e3 * timer.blocked_autorange(min_run_time=seconds).median
    return table


def _packed_copy(layer: Any, bits: int) -> nn.Module:
    """The layer alone with a random weight, packed."""
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    else:
        new = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                        layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode)  # fmt: skip
    model = nn.Sequential(new.to(layer.weight.device))
    kind, role, position = layer_roles(model)["0"]
    config = LayerPolicy("0", kind, role, position, bits).config()
    assert isinstance(config, QuantConfig)
    return pack_(hard_quantize_(quantize_(model, config)))[0].eval()  # type: ignore[index]


def policy_costs(policy: Policy, profile: Profile) -> dict[str, float]:
    """Average bits, bit operations and bytes of a policy by layer name; float layers count 32 bits."""
    chosen = {p.name: p for p in policy}
    bits = macs = size = 0.0
    for name, p in profile.layers.items():
        layer = chosen[name]
        w = layer.weight_bits or FLOAT_BITS
        bits += p.weights * w
        macs += p.macs * w * (layer.act_bits or FLOAT_BITS)
        size += 4 * p.weights if layer.weight_bits is None else p.packed_bytes(layer.weight_bits)
    weights = sum(p.weights for p in profile.layers.values())
    return {"average_bits": bits / weights, "bitops": macs + profile.other_macs * FLOAT_BITS**2, "bytes": size}
