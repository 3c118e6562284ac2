"""One library made known to another when that is imported, and not before."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

logger = logging.getLogger("askew_kernels")


def when_imported(name: str, then: str) -> None:
    """Imports the module ``then`` once the module ``name`` is imported; at once where it is already."""
    if name in sys.modules:
        _import(then, name)
    elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, then))


def _import(then: str, name: str) -> None:
    """Whoever imports the other library gets it, even where it is of a release that this one cannot join."""
    try:
        importlib.import_module(then)
    except ImportError as error:
        logger.warning("%s: %s is not the one that askew_kernels knows (%s); it will not find this library there", then,
                       name, error)  # fmt: skip


class _Waiting(importlib.abc.MetaPathFinder):
    """Lets the other finders find the module, and steps aside."""

    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Following(spec.loader, self.then, self.name)
        return spec


class _Following(importlib.abc.Loader):
    """Executes the module, then imports the one that waited for it."""

    def __init__(self, loader: Any, then: str, name: str) -> None:
        self.loader, self.then, self.name = loader, then, name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _import(self.then, self.name)
