"""How many operations the operators are, for torch.utils.flop_counter, which counts only what it has formulas of.

That module imports Triton, half a second; so the formulas of the operators' entries are registered when somebody
imports it, not before.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

from .schema import OPERATORS

MODULE = "torch.utils.flop_counter"


def _register(counter: ModuleType) -> None:
    for name, operator in OPERATORS.items():
        if operator.flops is not None:
            counter.register_flop_formula(getattr(torch.ops.askew, name))(operator.flops)


class _WhenImported(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


def register_when_imported() -> None:
    """Now, where it was imported before. To be called when all operators are defined."""
    if MODULE in sys.modules:
        _register(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _WhenImported())
