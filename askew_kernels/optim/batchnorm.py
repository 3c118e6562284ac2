"""Running statistics of normalization layers in a forward whose weights are not those that are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def frozen_batchnorm_stats(model: nn.Module) -> Iterator[None]:
    """Batch and instance normalization of ``model`` use batch statistics as ever, but leave the running ones alone.

    For the second forward of a sharpness-aware step. Modules in eval mode are not touched; everything is put back when
    the block ends, also by an exception. Raises TypeError where ``model`` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    before: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            before.append((module, "track_running_stats", True))
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.running_mean is not None:
            before.append((module, "momentum", module.momentum))
    try:
        for module, name, _ in before:
            setattr(module, name, False if name == "track_running_stats" else 0.0)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
