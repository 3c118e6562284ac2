"""An optimizer around another one, and the two are one: whatever looks at groups or state sees the base's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..annealing import ELSEWHERE, key_in
from .hooks import Hooked


def _of_base(name: str) -> Any:
    def set_in_base(self: Wrapper, value: Any) -> None:
        if self._shares:
            setattr(self.base_optimizer, name, value)

    return property(lambda self: getattr(self.base_optimizer, name), set_in_base)


class Wrapper(Hooked):
    base_optimizer: Optimizer
    _KEYS: ClassVar[Iterable[str]]  # of groups, beside the base's
    _shares = False  # Optimizer.__init__ must not touch what is the base's
    param_groups = _of_base("param_groups")
    state = _of_base("state")
    defaults = _of_base("defaults")

    def _wrap(self, base: Optimizer, own: dict[str, Any]) -> None:
        """``own``: defaults of the group keys that this optimizer adds to the base's, of ``beside``."""
        self.base_optimizer = base
        base._askew_added = {*getattr(base, "_askew_added", ()), *own}  # type: ignore[attr-defined]
        base.defaults.update(own)
        super().__init__(base.param_groups, base.defaults)
        self._shares = True
        self._complete()

    def _complete(self) -> None:
        """Keys that a group lacks: the base has taken it, or a checkpoint, by itself."""
        for group in self.param_groups:
            for key in self._KEYS:
                key = key_in(self.defaults, key)
                group.setdefault(key, self.defaults[key])

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer, "_shares": self._shares}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's own: some keep gradients in memory of their own."""
        self.base_optimizer.zero_grad() if set_to_none else self.base_optimizer.zero_grad(set_to_none=False)


def checked_base(base: Any) -> Optimizer:
    """``base``, an optimizer that steps with the gradients it finds. Raises TypeError for one that does not."""
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError("base_optimizer: expected an optimizer that steps with the gradients it finds, got "
                        f"{type(base).__name__}, which evaluates a closure itself")  # fmt: skip
    return base


def beside(base: Optimizer, own: dict[str, Any]) -> dict[str, Any]:
    """``own`` under names that the base has no keys of. Raises TypeError where one cannot have another name."""
    local = getattr(base, "optim", None)  # ZeroRedundancyOptimizer's, of which it knows what it was given alone
    taken = own.keys() & {*base.defaults, *getattr(local, "defaults", ())}
    taken -= getattr(base, "_askew_added", set())  # by a wrapper before
    if fixed := taken - ELSEWHERE.keys():
        raise TypeError(f"{min(fixed)}: {type(base).__name__} has a group key of that name itself, which means "
                        "something else here")  # fmt: skip
    return {ELSEWHERE.get(key, key) if key in taken else key: value for key, value in own.items()}


def room_for(copies: dict[Tensor, Tensor], p: Tensor, like: Tensor) -> Tensor:
    """The tensor for the copy of ``p``, made where it is missing or unlike."""
    copy, wanted = copies.get(p), (like.shape, like.stride(), like.dtype, like.device)
    if copy is None or wanted != (copy.shape, copy.stride(), copy.dtype, copy.device):
        copy = copies[p] = torch.empty_like(like)
    return copy
