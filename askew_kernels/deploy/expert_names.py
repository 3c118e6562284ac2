"""Experts by the names of checkpoints, a linear layer for each expert and projection, where a model has one Parameter.

transformers puts ``….experts.0.gate_proj``, ``….experts.0.up_proj`` and so on together as ``….experts.gate_up_proj``
(experts, 2 · inner, hidden) and ``….experts.down_proj`` on loading. Rows of codes are rows of the matrices, so that
the parts are slices of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..nn.kinds import KINDS
from ..nn.packed import PackedLayer

PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# what checkpoints of a model_type call modules, where the model has other names
NAMES = {"mixtral": {".mlp.": ".block_sparse_moe.", ".gate_proj": ".w1", ".up_proj": ".w3", ".down_proj": ".w2"}}
EXPERT = re.compile(r"(.*\.experts)\.([0-9]{1,6})\.([a-z0-9_]+)")
PATTERN = r"re:.*\.experts\.\d+\..*"  # the same as a target of config groups


def in_checkpoints(key: str, model_type: Any, back: bool = False) -> str:
    """The name in checkpoints of a module or a tensor; ``back``: its name in the model."""
    for ours, theirs in NAMES.get(model_type, {}).items():
        key = key.replace(theirs, ours) if back else key.replace(ours, theirs)
    return key


def split(name: str, layer: PackedLayer) -> dict[str, PackedLayer]:
    """{name: packed linear layer} of each expert and projection, which share the memory of ``layer``; the layer itself
    where it is none of experts. Raises ValueError for experts that no checkpoint has in parts."""
    path, _, last = name.rpartition(".")
    if layer.kind.name != "experts":
        return {name: layer}
    if last not in PROJECTIONS or not path.endswith("experts"):
        raise ValueError(f"experts: expected a name that ends in experts.{' or experts.'.join(PROJECTIONS)}")
    experts, height, width = layer.shape
    parts = PROJECTIONS[last]
    scale = layer.weight_scale.reshape(-1, 1) if layer.weight_scale.numel() == 1 else layer.weight_scale
    found: dict[str, PackedLayer] = {}
    for i in range(experts * len(parts)):
        rows = height // len(parts)
        part, options = slice(i * rows, (i + 1) * rows), {"scale_dtype": scale.dtype, "dtype": layer.weight_dtype}
        new = KINDS["linear"].packed.like(
            KINDS["linear"].of_shape((rows, width), False), config=layer.config, trits=layer.trits, **options
        )
        new.bias, new.weight_codes = None, layer.weight_codes[part]
        new.weight_scale = scale if scale.numel() == 1 else scale.reshape(experts * height, -1)[part].reshape(-1)
        found[f"{path}.{i // len(parts)}.{parts[i % len(parts)]}"] = new
    return found


def _parts(names: Iterable[str], model_type: Any) -> dict[str, list[str]]:
    """{name of a weight of experts in the model: names of its parts, in their order}, of those that are all there."""
    experts: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        if (match := EXPERT.fullmatch(in_checkpoints(name, model_type, back=True))) is not None:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
    found = {}
    for path, numbered in experts.items():
        for merged, parts in PROJECTIONS.items():
            whole = all(part in numbered.get(i, {}) for i in range(len(numbered)) for part in parts)
            if whole:
                found[f"{path}.{merged}"] = [numbered[i][part] for i in range(len(numbered)) for part in parts]
    return found


def merged_weights(weights: Mapping[str, Tensor], model_type: Any) -> dict[str, Tensor]:
    """The weights of experts that these put together."""
    found = {}
    for name, parts in _parts(weights, model_type).items():
        matrices = [weights[part] for part in parts]
        if len({m.shape for m in matrices}) == 1:
            count = len(PROJECTIONS[name.rpartition(".")[2]])
            found[name] = torch.stack(matrices).reshape(len(parts) // count, -1, matrices[0].shape[1])
    return found


def merged(layers: Mapping[str, PackedLayer], model_type: Any) -> dict[str, PackedLayer]:
    """The layers with those of experts put together, by the names of the model; parts that differ in more than their
    numbers stay apart."""
    left = dict(layers)
    for name, parts in _parts(layers, model_type).items():
        held = [layers[part] for part in parts]
        first = held[0]
        if any(part.shape != first.shape or part.config != first.config or part.trits != first.trits
               or part.weight_dtype != first.weight_dtype for part in held):  # fmt: skip
            continue
        kind, count = KINDS["experts"], len(PROJECTIONS[name.rpartition(".")[2]])
        if first.config.granularity == "per_tensor":  # one for each part is none for them all
            continue
        shape = (len(parts) // count, count * first.shape[0], first.shape[1])
        new = kind.packed.like(kind.of_shape(shape, False), config=first.config, trits=first.trits,
                               scale_dtype=first.weight_scale.dtype, dtype=first.weight_dtype)  # fmt: skip
        new.bias, new.weight_codes = None, torch.cat([part.weight_codes for part in held])
        new.weight_scale = torch.cat([part.weight_scale for part in held])
        for part in parts:
            del left[part]
        left[name] = new
    return {in_checkpoints(name, model_type, back=True): layer for name, layer in left.items()}
