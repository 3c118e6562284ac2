"""Running statistics of normalization layers in a forward whose weights are not those that are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_SWITCHES: tuple[tuple[Any, str, bool | float], ...] = (
    (nn.modules.batchnorm._BatchNorm, "track_running_stats", False),
    (nn.modules.instancenorm._InstanceNorm, "momentum", 0.0),
)


@contextlib.contextmanager
def frozen_batchnorm_stats(model: nn.Module) -> Iterator[None]:
    """Batch and instance normalization of ``model`` use batch statistics as ever, but leave the running ones alone.

    For the second forward of a sharpness-aware step. Modules in eval mode are not touched; everything is put back when
    the block ends, also by an exception. Raises TypeError where ``model`` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    with contextlib.ExitStack() as put_back:
        for module in model.modules():
            for kind, name, frozen in _SWITCHES:
                if isinstance(module, kind) and module.training and module.running_mean is not None:
                    put_back.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, frozen)
        yield
