"""Checkpoints of an optimizer that adds to torch's own: hooks see the whole of them, as torch's see a whole one."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

_HOOKS = tuple(f"_optimizer_{what}_{when}_hooks" for what in ("state_dict", "load_state_dict")
               for when in ("pre", "post"))  # fmt: skip


class Hooked(Optimizer):
    """A subclass makes and takes the whole in ``_pack`` and ``_unpack``, which here are torch's own, without hooks."""

    def state_dict(self) -> dict[str, Any]:
        """The base's, and what this optimizer adds to its groups and state."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        packed = self._pack()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = post_hook(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bit for bit what ``state_dict`` gave; a checkpoint of the base optimizer alone is taken as well."""
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._unpack(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _pack(self) -> dict[str, Any]:
        bare = object.__new__(type(self))  # this one keeps its hooks, which other threads may be calling
        bare.__dict__ = {**self.__dict__, **{name: OrderedDict() for name in _HOOKS}}
        return Optimizer.state_dict(bare)

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        with self._no_hooks():
            super().load_state_dict(state_dict)

    @contextlib.contextmanager
    def _no_hooks(self) -> Iterator[None]:
        hooks = {name: getattr(self, name) for name in _HOOKS}
        self.__dict__.update({name: OrderedDict() for name in _HOOKS})
        try:
            yield
        finally:
            self.__dict__.update(hooks)
