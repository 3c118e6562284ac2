"""A CUDA graph on the CPU: the operators of a step are recorded, and run again over the same tensors.

Whatever waits for the device or brings numbers to the host is refused, as a capture would; so a number that Python
read before is part of the recording, and wrong in the next replay, exactly as in a captured graph.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "unique", "masked_select", "item", "allclose"}


class Refused(RuntimeError):
    """What a capture would not take."""


class Graph(TorchDispatchMode):
    """``with Graph() as graph: step()``, then ``graph.replay()``."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.reads = contextlib.ExitStack()

    def __enter__(self):
        for name in ("tolist", "numpy", "item", "__float__", "__int__", "__bool__", "cpu"):
            self.reads.callback(setattr, torch.Tensor, name, getattr(torch.Tensor, name))
            setattr(torch.Tensor, name, refuse(name))
        return super().__enter__()

    def __exit__(self, *error):
        self.reads.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name.removesuffix("_") in READS or name in READS:
            raise Refused(f"{name}: waits for the device")
        out = func(*args, **kwargs)
        if not name.startswith(("_record_function", "detach", "alias")):
            self.calls.append((func, args, kwargs, out))
        return out

    @property
    def names(self):
        return [func._schema.name.partition("::")[2] for func, *_ in self.calls]

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            views = any(r.alias_info is not None for r in func._schema.returns)
            if not views:  # an output's memory is the recorded one
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def refuse(name):
    def read(self, *args, **kwargs):
        raise Refused(f"{name}: brings numbers to the host")

    return read
