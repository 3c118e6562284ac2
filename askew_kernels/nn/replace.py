"""Putting one module in the place of another without losing what users hang on modules, and looking at their calls."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name]  # all kinds that this torch has, and their flags
WATCHERS: list[Callable[[nn.Module], None]] = []  # are told of a model in which modules were replaced
DERIVED_OF = "_askew_derived_of"
TENSORS = ("_parameters", "_buffers", "_modules")
MAKE_PERMANENT = ("make it permanent first, by parametrize.remove_parametrizations, remove_weight_norm, "
                  "remove_spectral_norm or prune.remove")  # fmt: skip


def derived(mixin: Any, base: Any, over: bool = False) -> Any:
    """A class of ``mixin`` before ``base`` (after it, where its methods go ``over`` those of ``mixin``), one for each
    pair; ``mixin`` makes its objects, which can be copied and pickled."""
    return _derived(mixin, base, over)


@functools.cache
def _derived(*of: Any) -> Any:
    mixin, base, over = of
    own = {"__module__": mixin.__module__, "__reduce_ex__": _reduced, DERIVED_OF: of}
    own |= {"__init__": mixin.__init__} if over else {}
    return type(f"{mixin.__name__}Of{base.__name__}", (base, mixin) if over else (mixin, base), own)


def _reduced(self: Any, protocol: Any) -> tuple:
    """By what the class is made of, since no module has it under its name."""
    return _remade, getattr(type(self), DERIVED_OF), *object.__reduce_ex__(self, max(2, protocol))[2:]


def _remade(*of: Any) -> Any:
    cls: Any = derived(*of)
    return cls.__new__(cls)


def base_of(cls: Any) -> Any:
    """The class that a ``derived`` one stands for; any other itself."""
    return vars(cls)[DERIVED_OF][1] if DERIVED_OF in vars(cls) else cls


def mixin_of(cls: Any) -> Any:
    """What was mixed into a ``derived`` class; any other itself."""
    return vars(cls)[DERIVED_OF][0] if DERIVED_OF in vars(cls) else cls


def computed_tensors(module: nn.Module) -> dict[str, str]:
    """{``weight`` or ``bias``: what computes it} where it is no Parameter of the module but made from others."""
    found, own = {}, module._parameters
    chains: Any = module._modules.get("parametrizations")
    for name in (name for name in ("weight", "bias") if name not in own):
        if isinstance(chains, nn.ModuleDict) and name in chains:
            makers = [*chains[name]]  # type: ignore[misc]
        elif name in vars(module) or f"{name}_orig" in own or f"{name}_v" in own:
            hooks = module._forward_pre_hooks.values()
            makers = [h for h in hooks if name in (getattr(h, "name", ""), getattr(h, "_tensor_name", ""))]
        else:
            continue
        found[name] = ", ".join(type(m).__name__ for m in makers) or "a plain attribute"
    return found


def check_replaceable(name: str, old: nn.Module) -> None:
    """ValueError naming the layer where another module in its place would compute something else."""
    if "forward" in vars(old):
        raise ValueError(f"{name}: its forward was replaced on the instance, which another layer cannot keep; undo "
                         "that first (accelerate: remove_hook_from_module)")  # fmt: skip
    for tensor, maker in computed_tensors(old).items():
        raise ValueError(f"{name}: its {tensor} is not a Parameter but computed ({maker}); {MAKE_PERMANENT}")


def successors(
    layers: Mapping[str, nn.Module], make: Callable[[str, Any], nn.Module], alone: str = ""
) -> dict[str, nn.Module]:
    """{name: make(name, layer)}, made once for a layer of several names. An error of ``make`` gets the name in front;
    a layer without one is the model itself, for which ``alone`` says what to call: ValueError, as in
    ``check_replaceable``."""
    if "" in layers:
        raise ValueError(f"model: is itself a layer; use {alone}")
    made: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        check_replaceable(name, layer)
        if id(layer) not in made:
            try:
                made[id(layer)] = make(name, layer)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
    return {name: made[id(layer)] for name, layer in layers.items()}


@contextlib.contextmanager
def observed(model: nn.Module, hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """``model`` in eval mode, with forward hooks (module, args, kwargs, y); all is as before afterwards."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A layer's input, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """What users hang on a module goes from ``old`` to ``new``, which takes its place: hooks (handles go on working:
    both modules hold the same hooks from now on), the training flag, and parameters, buffers, submodules and attributes
    that ``new`` has not, but for ``old.own_attributes``, which its class defines."""
    for name in HOOKS:
        hooks = getattr(old, name)
        hooks.update(getattr(new, name))
        setattr(new, name, hooks)
    hook: Any
    for hook in new._load_state_dict_pre_hooks.values():  # which remember their module
        if getattr(hook, "with_module", False) and hook.module() is old:
            hook.module = weakref.ref(new)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
    own = getattr(old, "own_attributes", ())
    for kind in TENSORS:
        known = {n for k in TENSORS for n in getattr(new, k)}
        for name, value in getattr(old, kind).items():
            if name not in known and name not in own and not hasattr(type(new), name):  # `weight` of packed layers
                getattr(new, kind)[name] = value
                if name in old._non_persistent_buffers_set:
                    new._non_persistent_buffers_set.add(name)
    for name, value in [(n, v) for n, v in vars(old).items() if n not in vars(new) and n not in own]:
        if name == "_compiled_call_impl":  # of the old module's code
            new.compile()
        elif isinstance(value, types.MethodType) and value.__self__ is old:
            vars(new)[name] = types.MethodType(value.__func__, new)
        else:
            vars(new)[name] = value
    new.training = old.training


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Puts every module of ``new`` {name: module} in the place of that name, with what was hung on the module that
    stood there (``carry_over``). Raises ValueError naming the layer before anything changes (``check_replaceable``)."""
    old = {name: model.get_submodule(name) for name in new}
    for name, module in old.items():
        check_replaceable(name, module)
    for module, successor in {id(m): (m, new[name]) for name, m in old.items()}.values():
        if module is not successor:
            carry_over(module, successor)
    for name, module in new.items():
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, child, module)
        if child == "_orig_mod" and hasattr(parent, "_initialize"):  # torch.compile's wrapper keeps the old one's call
            parent._initialize()  # type: ignore[operator]
    for watcher in WATCHERS:
        watcher(model)
