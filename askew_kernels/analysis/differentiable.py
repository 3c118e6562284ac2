"""What can be differentiated twice, which module cannot, and models that are as before afterwards."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops
from ..nn import packed_layers
from .batches import map_tensors, tensors_of


def as_written() -> contextlib.AbstractContextManager:
    """What ``torch.compile`` made runs as it is written: with its hooks, and with every derivative."""
    compiled = "torch._dynamo" in sys.modules  # else there is none, and importing it takes seconds
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


@contextlib.contextmanager
def differentiable_twice(model: nn.Module | None = None) -> Iterator[None]:
    """Gradients, also inside ``torch.inference_mode``, through the kernels that have a second derivative.

    Fused attention and cuDNN's recurrent layers have none, nor has a graph that ``torch.compile`` made.
    """
    recurrent = model is not None and any(isinstance(m, nn.RNNBase) for m in model.modules())
    native = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), native, as_written():
        yield


def check_values(model: nn.Module) -> None:
    """TypeError for what is no module; ValueError where there is nothing to compute with, naming the tensor."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if hasattr(torch.empty(0, device="cpu"), "fake_mode"):
        raise ValueError("model: under FakeTensorMode no tensor has values; call this outside of it")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if not ops.has_values(t):
            raise ValueError(f"model: {name} has no values ({'meta' if t.is_meta else 'a FakeTensor'}); "
                             "give it some first, as by to_empty and load_state_dict")  # fmt: skip


def check_gradients(model: nn.Module) -> None:
    """ValueError where nothing of a model has a gradient, naming what is in the way."""
    check_values(model)
    if packed := packed_layers(model):
        raise ValueError(f"model: {', '.join(packed)}: packed, there are no float weights to differentiate in; "
                         "call unpack_(model) first")  # fmt: skip
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_inference():
            raise ValueError(f"model: {name} was made under torch.inference_mode and cannot have a gradient; "
                             "give a copy.deepcopy(model) that is made outside of it")  # fmt: skip
    if not any(p.is_floating_point() and p.numel() for p in model.parameters()):
        raise ValueError("model: it has no parameters that a loss could be differentiated in")


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of one that keeps activations as attributes, which torch does not copy: they lose the graph."""
    kept = [t for m in model.modules() for value in vars(m).values() for t in tensors_of(value) if not t.is_leaf]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept})


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Buffers that forwards write (statistics, power iterations) are put back, as objects and as numbers."""
    kept = [(m, name, b, b if b.is_inference() else b.clone()) for m in model.modules()
            for name, b in m._buffers.items() if b is not None]  # fmt: skip
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                if buffer is not value and not torch.equal(buffer, value):
                    buffer.copy_(value)


_ONCE = once_differentiable(lambda ctx: None).__code__


def check_twice(made: Tensor) -> None:
    """NotImplementedError for a ``@once_differentiable`` function in the graph of ``made``.

    torch raises nothing where the gradient that comes in has no graph, and leaves part of the second derivative out.
    """
    todo, seen = [made.grad_fn], set()
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            raise NotImplementedError(f"{function.__name__}.backward is marked once_differentiable")  # type: ignore[union-attr]
        todo += [following for following, _ in node.next_functions]


def _differentiate_twice(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises what torch raises where that cannot be done."""
    args, kwargs = map_tensors(lambda t: t.detach().requires_grad_(t.is_floating_point()), (args, kwargs))
    wanted = [t for t in (*tensors_of((args, kwargs)), *module.parameters()) if t.requires_grad]
    made: Any = tensors_of(module(*args, **kwargs))
    for _ in range(2):
        if squares := [t.square().sum() for t in made if t is not None and t.requires_grad]:
            total: Any = sum(squares)
            check_twice(total)
            made = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)


def culprit(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The innermost module that cannot be differentiated twice, by name and type."""
    calls: list[tuple[str, nn.Module, tuple, dict[str, Any]]] = []

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, y: calls.append((name, module, args, kwargs))

    handles = [m.register_forward_hook(keep(name), with_kwargs=True) for name, m in model.named_modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    for name, module, args, kwargs in calls:  # what is inside comes before what holds it
        try:
            _differentiate_twice(module, args, kwargs)
        except RuntimeError:
            return f"{name or 'model'} ({type(module).__name__})"
    return None


SAYS_NO = ("not implemented", "differentiate twice", "double backward", "checkpoint")


@contextlib.contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """NotImplementedError with the place where torch, or an operator, says that there is no second derivative."""
    try:
        yield
    except RuntimeError as problem:
        if not isinstance(problem, NotImplementedError) and not any(words in str(problem) for words in SAYS_NO):
            raise
        text = f"{where()}: cannot be differentiated twice, which a Hessian needs ({problem})"
        raise NotImplementedError(text) from None
