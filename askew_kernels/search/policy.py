"""Policies: which layer gets which bits, how that is kept, and how it is carried over to another model.

A layer's *role* is its kind, whether it is the model's first, its last or an inner one, and its name without numbers;
its *position* is how far into the layers of that role it stands, from 0 to 1. A wider model has the same names, a
deeper one the same roles.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .. import atomic, figures
from ..nn import kinds
from ..quant import Binary, Grid, QuantConfig, Uniform

VERSION = 1
Kinds = str | Iterable[str]  # names or groups of names of ``nn.KINDS``
ALWAYS = ("linear", "conv2d")  # kinds that every policy speaks of
WEIGHT_BITS = range(1, 9)
ACT_BITS = range(2, 9)


def weight_grid(bits: int) -> Grid:
    """The grid of a weight candidate: Binary() for 1 bit, else Uniform(bits)."""
    return Binary() if bits == 1 else Uniform(bits=bits)


def named(of: Kinds) -> str:
    """The kinds as an error says them."""
    return of if isinstance(of, str) else " or ".join(of)


def kind_of(module: nn.Module) -> str:
    """The name of a layer's kind (``nn.KINDS``), or depthwise."""
    if isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels:
        return "depthwise"
    return kinds.kind_of(module).name  # type: ignore[union-attr]


def weight_id(layer: nn.Module) -> int:
    """The same for layers that share their weight; one whose weight is no parameter of its own shares none."""
    weight = layer._parameters.get("weight")
    return id(layer if weight is None else weight)


def candidate_layers(model: nn.Module, of: Kinds = kinds.SEARCHED) -> dict[str, nn.Module]:
    """{name: layer} of every layer of these kinds and what is made of them, in order, each once."""
    plain = tuple(cls for kind in kinds.chosen(of) for cls in kind.classes)
    return {name: m for name, m in model.named_modules() if isinstance(m, plain)}


def check_searched(of: Kinds) -> None:
    """ValueError where all of these kinds are of weights that other modules hold."""
    if all(kind.held for kind in kinds.chosen(of)):
        told = ", ".join(kind.name for kind in kinds.chosen(of))
        raise ValueError(f"kinds: weights that another module holds are not searched, got {told}; give quantize_ a "
                         "configuration for them")  # fmt: skip


def layer_roles(model: nn.Module, of: Kinds = kinds.SEARCHED) -> dict[str, tuple[str, str, float]]:
    """{name: (kind, role, position)} of every layer of these kinds."""
    layers = candidate_layers(model, of)
    roles: dict[str, tuple[str, str]] = {}
    members: dict[str, list[str]] = {}
    for i, (name, module) in enumerate(layers.items()):
        place = "first" if i == 0 else "last" if i == len(layers) - 1 else "inner"
        kind = kind_of(module)
        roles[name] = kind, f"{place} {kind} {re.sub(r'[0-9]+', '*', name)}"
        members.setdefault(roles[name][1], []).append(name)
    return {name: (kind, role, members[role].index(name) / max(1, len(members[role]) - 1))
            for name, (kind, role) in roles.items()}  # fmt: skip


# ---- the policy -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPolicy:
    """One layer."""

    name: str  # its full name, or a pattern with * and ?
    kind: str
    role: str
    position: float
    weight_bits: int | None  # 1…8; None leaves it float
    act_bits: int | None = None  # 2…8; None for a float input
    act_signed: bool = True  # the input has negative values

    def __post_init__(self) -> None:
        for what in ("name", "kind", "role"):
            if not isinstance(getattr(self, what), str):
                raise ValueError(f"{self.name!r:.80}: {what}: expected text, got {getattr(self, what)!r:.80}")
        if not isinstance(self.act_signed, bool):
            raise ValueError(f"{self.name}: act_signed: expected True or False, got {self.act_signed!r:.80}")
        for what, known in (("weight_bits", WEIGHT_BITS), ("act_bits", ACT_BITS)):
            bits = getattr(self, what)
            if bits is not None and not (type(bits) is int and bits in known):
                raise ValueError(f"{self.name}: {what}: expected {known[0]} to {known[-1]} or None, got {bits!r}")
        if self.weight_bits is None and self.act_bits is not None:
            raise ValueError(f"{self.name}: act_bits: expected None for a layer that is left float")
        if not isinstance(self.position, (int, float)) or not 0 <= self.position <= 1:
            raise ValueError(f"{self.name}: position: expected a number in [0, 1], got {self.position!r}")

    def config(self) -> QuantConfig | None:
        if self.weight_bits is None:
            return None
        activation = None if self.act_bits is None else Uniform(bits=self.act_bits, signed=self.act_signed)
        return QuantConfig(weight=weight_grid(self.weight_bits), activation=activation)  # the grid's own scale rule


class PolicyError(ValueError):
    """A policy that cannot be read, or does not fit a model; the text names the layers."""


@dataclass(frozen=True)
class Policy:
    """The bits of every layer of a model, and how they were found (``report``, JSON-ready).

    ``ak.quantize_(model, policy)`` applies it: by name where names and kinds agree with the model's, otherwise by role,
    for each layer from the layer of the same role that stands nearest. ``save`` and ``load`` are JSON.
    """

    layers: tuple[LayerPolicy, ...]
    report: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise PolicyError("policy: has no layers")
        names = [layer.name for layer in self.layers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise PolicyError(f"policy: {twice[0]!r} is there twice")

    def __iter__(self) -> Iterator[LayerPolicy]:
        return iter(self.layers)

    @property
    def weight_bits(self) -> dict[str, int | None]:
        return {layer.name: layer.weight_bits for layer in self.layers}

    @property
    def act_bits(self) -> dict[str, int | None]:
        return {layer.name: layer.act_bits for layer in self.layers}

    def entry(self, name: str) -> LayerPolicy | None:
        """The first entry whose name is this layer's, or whose pattern matches it."""
        return next((p for p in self.layers if p.name == name or fnmatch.fnmatchcase(name, p.name)), None)

    # ---- a model's configs ----

    def configs(self, model: nn.Module, by: str = "auto") -> dict[str, QuantConfig | None]:
        """{layer: QuantConfig, or None to leave it float} for every layer of ``model`` whose kind the policy speaks of:
        linear, conv2d, and those of its entries.

        by: ``"name"`` (patterns allowed, the first that matches counts), ``"role"``, or ``"auto"``: by name where that
        fits, else by role. A layer of several names is there under each. Raises PolicyError naming the layers that have
        no entry, the entries that have no layer, and layers that share a weight but are to have different bits.
        """
        if by not in ("auto", "name", "role"):
            raise ValueError(f"by: expected auto, name or role, got {by!r}")
        of = [*ALWAYS, *(layer.kind for layer in self.layers if layer.kind in kinds.KINDS)]
        if not (roles := layer_roles(model, of)):
            raise PolicyError(f"model: has no {named(dict.fromkeys(of))} layer, of which the policy speaks")
        why = []
        for way, find in (("name", self._by_name), ("role", self._by_role)):
            if by in ("auto", way):
                found, problems = find(roles)
                if not problems:
                    return _by_every_name(model, candidate_layers(model, of), found)
                why.append(f"by {way}: {'; '.join(problems)}")
        raise PolicyError("policy: does not fit the model " + ". ".join(why))

    def _by_name(self, roles: dict[str, tuple[str, str, float]]) -> tuple[dict[str, LayerPolicy], list[str]]:
        found = {name: match for name in roles if (match := self.entry(name)) is not None}
        wrong = [f"{name} is {roles[name][0]}, the policy's {match.kind}" for name, match in found.items()
                 if match.kind != roles[name][0]]  # fmt: skip
        extra = [p.name for p in self.layers if p not in found.values()]
        return found, wrong or _missing([n for n in roles if n not in found], extra)

    def _by_role(self, roles: dict[str, tuple[str, str, float]]) -> tuple[dict[str, LayerPolicy], list[str]]:
        alike = {role: [p for p in self.layers if p.role == role] for _, role, _ in roles.values()}
        found = {name: min(alike[role], key=lambda p: abs(p.position - position))
                 for name, (_, role, position) in roles.items() if alike[role]}  # fmt: skip
        extra = [p.name for p in self.layers if p.role not in alike]
        return found, _missing([f"{n} ({roles[n][1]})" for n in roles if n not in found], extra)

    # ---- files and tables ----

    def to_dict(self) -> dict[str, Any]:
        return {"askew_policy": VERSION, "layers": list(map(dataclasses.asdict, self.layers)), "report": self.report}

    @classmethod
    def from_dict(cls, d: Any) -> Policy:
        """The inverse of ``to_dict``; PolicyError says what is wrong."""
        if not isinstance(d, dict) or d.get("askew_policy") != VERSION:
            found = d.get("askew_policy") if isinstance(d, dict) else type(d).__name__
            raise PolicyError(f"policy: expected a policy of version {VERSION}, got {found!r}")
        try:
            return cls(tuple(LayerPolicy(**layer) for layer in d["layers"]), dict(d.get("report", {})))
        except PolicyError:
            raise
        except (TypeError, KeyError, ValueError) as problem:
            raise PolicyError(f"policy: {problem}") from None

    def save(self, path: str | os.PathLike) -> None:
        """JSON; the file appears only when it is whole (``atomic.replacing``)."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with atomic.replacing(path) as file:
            file.write(text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Policy:
        """Raises FileNotFoundError; PolicyError naming the file."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except PolicyError as problem:
            raise PolicyError(f"{path}: {problem}") from None
        except ValueError as problem:
            raise PolicyError(f"{path}: not JSON ({problem})") from None

    def table(self) -> str:
        """Bits by layer, and what the report says of costs, as text."""
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{width}}  kind       weights  inputs"]
        for p in self.layers:
            weights = "float" if p.weight_bits is None else str(p.weight_bits)
            inputs = "float" if p.act_bits is None else f"{p.act_bits}{'' if p.act_signed else ' unsigned'}"
            lines.append(f"{p.name:<{width}}  {p.kind:<9}  {weights:>7}  {inputs}")
        for key in ("expected", "chosen"):
            if isinstance(costs := self.report.get(key), dict):
                shown = (f"{name} {value:{',.0f' if abs(value) >= 1000 else '.4g'}}" for name, value in costs.items())
                lines.append(f"{key}: {', '.join(shown)}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Bits by layer, as a bar chart, to the very ``path``: in the format of its suffix, png without one."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(4.0, 0.5 * len(self.layers) + 1.5), 3.2), layout="constrained")
        axis, places = figure.subplots(), range(len(self.layers))
        for what, label, side in (("weight_bits", "weights", -0.2), ("act_bits", "inputs", 0.2)):
            bits = [getattr(p, what) for p in self.layers]
            if what == "weight_bits" or any(bits):
                axis.bar([i + side for i in places], [b or 32 for b in bits], 0.4, label=label)
        axis.set_xticks(places, [figures.plain(p.name) for p in self.layers], rotation=60, fontsize=8)
        axis.set_ylabel("bits")
        axis.legend(fontsize=8)
        figures.write(figure, path)


def _by_every_name(
    model: nn.Module, layers: dict[str, nn.Module], found: dict[str, LayerPolicy]
) -> dict[str, QuantConfig | None]:
    """The configs of layers by their first name, by all their names; PolicyError where they do not go with ties."""
    configs = {id(layers[name]): entry.config() for name, entry in found.items()}
    bits: dict[int, tuple[str, int]] = {}
    for name, entry in found.items():
        if entry.weight_bits is not None:
            first, has = bits.setdefault(weight_id(layers[name]), (name, entry.weight_bits))
            if has != (other := entry.weight_bits):
                both = f"{first} and {name} share one weight, but are to have {has} and {other} bits"
                raise PolicyError(f"policy: {both}")
    return {name: configs[id(m)] for name, m in model.named_modules(remove_duplicate=False) if id(m) in configs}


def _missing(layers: list[str], entries: list[str]) -> list[str]:
    both = (("no entry for", layers), ("no layer for", entries))
    return [f"{what} {', '.join(names)}" for what, names in both if names]
