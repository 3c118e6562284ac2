"""All that a model, a loss or a loader draws from: seeded for a block of code, and put back when it ends."""

from __future__ import annotations

import contextlib
import numbers
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def loader_generators(loader: Any) -> list[torch.Generator]:
    """The generators of a DataLoader and of its samplers, each once."""
    batches = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = [getattr(part, "generator", None) for part in parts]
    return list({id(g): g for g in own if isinstance(g, torch.Generator)}.values())


class Generators:
    """torch's generators (CPU, and every CUDA device in use), NumPy's and Python's global ones, and a ``loader``'s own.

    ``state()`` goes through ``torch.save`` and ``torch.load(weights_only=True)``.
    """

    def __init__(self, loader: Any = None) -> None:
        own = {f"loader{i or ''}": g for i, g in enumerate(loader_generators(loader))}
        devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        self.torch = {"torch": torch.default_generator, **own, **{f"cuda{i}": g for i, g in enumerate(devices)}}

    def state(self) -> dict[str, Any]:
        _, key, *rest = np.random.get_state()
        found: dict[str, Any] = {name: g.get_state() for name, g in self.torch.items()}
        return {**found, "python": random.getstate(), "numpy": (torch.from_numpy(np.asarray(key, np.int64)), *rest)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for name, g in self.torch.items():
            if name in state:
                g.set_state(state[name].cpu())
        if "python" in state:
            random.setstate(state["python"])
        if "numpy" in state:
            key: Tensor = state["numpy"][0]
            np.random.set_state(("MT19937", key.cpu().numpy().astype(np.uint32), *state["numpy"][1:]))

    def seed(self, seed: int) -> None:
        for g in self.torch.values():
            g.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)


def check_seed(seed: Any) -> int:
    """As a plain int. ValueError for what no generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits, got {seed!r}")
    return int(seed)


@contextlib.contextmanager
def seeded(seed: int, loader: Any = None) -> Iterator[Generators]:
    """Everything drawn in the block follows from ``seed``; afterwards all generators are as they were before."""
    seed = check_seed(seed)
    generators = Generators(loader)
    before = generators.state()
    try:
        generators.seed(seed)
        yield generators
    finally:
        generators.set_state(before)
