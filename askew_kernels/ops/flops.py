"""How many operations the packed products are, for torch.utils.flop_counter, which counts only what it has formulas of.

That module imports Triton, half a second; so the formulas are registered when somebody imports it, not before.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

MODULE = "torch.utils.flop_counter"


def _register(counter: ModuleType) -> None:
    @counter.register_flop_formula([torch.ops.askew.packed_linear, torch.ops.askew.packed_linear_int8])
    def _product(x: torch.Size, codes: torch.Size, *_args: Any, **_kwargs: Any) -> int:
        """2 m n k, those of the float layer."""
        return 2 * x[0] * x[1] * codes[0]


class _WhenImported(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Now, where it was imported before."""
    if MODULE in sys.modules:
        _register(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _WhenImported())
