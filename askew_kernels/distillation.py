"""Fine-tuning towards the float model that a quantized one came from: its outputs are the targets."""

from __future__ import annotations

import copy
import fnmatch
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .nn import QuantizedKV, dequantize_, packed_layers, quantize_kv_, quantized_layers

__all__ = ["Distiller", "distill"]

COMPARED = ("kl", "relative")


def distill(
    student: nn.Module, teacher: nn.Module | None = None, *, alpha: float = 0.0, temperature: float = 1.0,
    task: Callable[[Any, Any], Tensor] | None = None, pick: str | int | Callable[[Any], Tensor] | None = None,
    compare: str | Callable[[Tensor, Tensor], Tensor] | None = "kl", hidden: Iterable[str] | Mapping[str, str] = (),
    hidden_weight: float = 1.0, mask: str = "attention_mask",
) -> Distiller:  # fmt: skip
    """A loss that draws ``student`` to what ``teacher`` computes::

        distiller = ak.distill(model)                    # before quantize_, or right after it: a float copy teaches
        ak.quantize_(model, config)
        loss = distiller(x)                              # the arguments of the model
        distiller = ak.distill(model, alpha=0.5, temperature=2.0, task=F.cross_entropy)
        loss = distiller(x, targets=y)

        loss = alpha task + (1 - alpha) T^2 KL(softmax(teacher / T) || softmax(student / T)) + hidden_weight hidden

    teacher: a float model with the same inputs; None: a copy of ``student`` with float layers, keys and values, as it
    is now. It computes in eval mode, without gradients, under the caller's autocast, on the student's device (it is
    moved there).
    alpha: the weight of the task's own loss, 0 to 1: ``task(logits, targets)``, or, without ``task``, the ``loss`` that
    models of transformers give where they get labels. temperature: T > 0.
    pick: which output is compared; None: the tensor that the model gives, the first of a tuple that is no loss, or
    ``logits`` of what has them. A key, an index or a function otherwise.
    compare: "kl"; "relative", for outputs that are no logits: ||student - teacher||^2 / ||teacher||^2; a function of
    both; None leaves outputs out.
    hidden: names of modules, also with ``*``, or {the student's: the teacher's}, whose outputs are drawn together as
    well: the mean of their relative errors. Looked at by hooks that are there for the call alone.
    mask: the keyword whose zeros are positions that do not count (padding), where the call has it.

    The KL is the mean over all positions, in float32. Raises TypeError/ValueError naming the argument.
    Sources: Hinton, Vinyals, Dean, Distilling the knowledge in a neural network, 2015; Romero et al., FitNets, ICLR
    2015 (hidden outputs).
    """
    for name, module in (("student", student), ("teacher", teacher)):
        if not isinstance(module, nn.Module) and not (name == "teacher" and module is None):
            raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
    for name, value, low, high in (("alpha", alpha, 0.0, 1.0), ("temperature", temperature, 0.0, float("inf")),
                                   ("hidden_weight", hidden_weight, 0.0, float("inf"))):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not low <= float(value) <= high or (name == "temperature" and not value):
            raise ValueError(f"{name}: expected a number {'> 0' if name == 'temperature' else f'from {low:g} on'}"
                             f"{', at most 1' if high == 1 else ''}, got {value}")  # fmt: skip
    if not (compare is None or callable(compare) or compare in COMPARED):
        raise ValueError(f"compare: expected one of {', '.join(COMPARED)}, a function or None, got {compare!r}")
    if task is not None and not callable(task):
        raise TypeError(f"task: expected a function of logits and targets, got {task!r}")
    if task is not None and not alpha:
        raise ValueError("alpha: expected more than 0 beside a task, got 0: the task's loss would not count")
    if isinstance(hidden, str):
        raise TypeError(f"hidden: expected a list of names, or {{student's: teacher's}}, got {hidden!r}")
    teacher = _float_copy(student) if teacher is None else _checked_teacher(student, teacher)
    pairs = _hidden_pairs(student, teacher, hidden)
    if compare is None and not alpha and not (pairs and hidden_weight):
        raise ValueError("hidden: expected names of modules where compare=None, got none: nothing is compared")
    return Distiller(student, teacher, alpha, temperature, task, pick, compare, pairs, hidden_weight, mask)


class Distiller:
    """What ``distill`` gives. ``terms``: the last call's {"task", "outputs", "hidden"}, detached, unweighted."""

    def __init__(self, student: nn.Module, teacher: nn.Module, alpha: float, temperature: float, task: Any, pick: Any,
                 compare: Any, hidden: dict[str, str], hidden_weight: float, mask: str) -> None:  # fmt: skip
        self.student, self.teacher = student, teacher
        self.alpha, self.temperature, self.hidden_weight = float(alpha), float(temperature), float(hidden_weight)
        self.task, self.pick, self.compare, self.hidden, self.mask = task, pick, compare, hidden, mask
        self.terms: dict[str, Tensor] = {}

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """The loss, with gradients for the student. Arguments are those of both models; with ``task``, ``targets`` is
        the task's."""
        targets = named.pop("targets", None) if self.task is not None else None
        if self.task is not None and targets is None:
            raise ValueError("targets: expected what the task's loss compares with, got none")
        self._follow()
        with torch.no_grad(), _Seen(self.teacher, self.hidden.values(), "teacher") as theirs:
            teaching = self.teacher(*inputs, **named)
        with _Seen(self.student, self.hidden, "student") as ours:
            outputs = self.student(*inputs, **named)
        mask = named.get(self.mask)
        mask = mask if isinstance(mask, Tensor) else None
        terms: dict[str, Tensor] = {}
        if self.alpha:
            terms["task"] = self._task_loss(outputs, targets)
        if self.compare is not None and self.alpha < 1:
            terms["outputs"] = self._compared(self._picked(outputs), self._picked(teaching), mask)
        if self.hidden and self.hidden_weight:
            made = zip(self.hidden.items(), ours.outputs, theirs.outputs, strict=True)
            errors = [e for (name, _), a, b in made for e in _errors(name, a, b, mask)]
            terms["hidden"] = torch.stack(errors).mean()
        self.terms = {name: term.detach() for name, term in terms.items()}
        weights = {"task": self.alpha, "outputs": 1 - self.alpha, "hidden": self.hidden_weight}
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def _follow(self) -> None:
        """The teacher in eval mode, where the student is."""
        if self.teacher.training:
            self.teacher.eval()
        here, there = ({p.device for p in m.parameters()} for m in (self.student, self.teacher))
        if len(here) == len(there) == 1 and here != there:
            self.teacher.to(next(iter(here)))

    def _picked(self, outputs: Any) -> Tensor:
        """The output that is compared."""
        found = self.pick(outputs) if callable(self.pick) else _chosen(outputs, self.pick)
        if not isinstance(found, Tensor):
            raise TypeError(f"pick: expected a tensor among the model's outputs, got {_told(found)}")
        return found

    def _task_loss(self, outputs: Any, targets: Any) -> Tensor:
        if self.task is not None:
            loss = self.task(outputs if self.compare is None and self.pick is None else self._picked(outputs), targets)
        else:
            loss = outputs.get("loss") if _is_mapping(outputs) else getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("task: expected a function of logits and targets, or a model that gives its loss "
                             f"(labels=), as alpha is {self.alpha:g}; got {_told(loss)}")  # fmt: skip
        return loss.reshape(())

    def _compared(self, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        if ours.shape != theirs.shape:
            raise ValueError(f"teacher: expected outputs of the student's shape {tuple(ours.shape)}, "
                             f"got {tuple(theirs.shape)}")  # fmt: skip
        if callable(self.compare):
            return self.compare(ours, theirs)
        if self.compare == "relative":
            return relative_error(ours, theirs, mask)
        t = self.temperature
        student, teacher = (functional.log_softmax(x.float() / t, dim=-1) for x in (ours, theirs))
        each = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        weights = _weights(mask, ours)
        if weights is None:
            return t**2 * each.mean()
        weights = weights.squeeze(-1).expand_as(each)
        return t**2 * (each * weights).sum() / weights.sum().clamp(min=1)


def _chosen(outputs: Any, pick: str | int | None) -> Any:
    if pick is None and _is_mapping(outputs):
        if outputs.get("logits") is None:
            raise ValueError(f"pick: expected which output is compared, as there are no logits but {_told(outputs)}; "
                             'with compare="relative" where it is none, or compare=None with hidden=')  # fmt: skip
        return outputs["logits"]
    if pick is None and isinstance(outputs, (tuple, list)):
        return next((x for x in outputs if isinstance(x, Tensor) and x.dim()), outputs)
    if pick is None:
        return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)
    try:
        by_name = isinstance(pick, str) and not _is_mapping(outputs)
        return getattr(outputs, pick) if by_name else outputs[pick]  # type: ignore[arg-type]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"pick: the model's output has no {pick!r}, but is {_told(outputs)}") from None


def relative_error(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> Tensor:
    """||ours - theirs||^2 / ||theirs||^2 in float32, over positions where ``mask`` is not 0."""
    error, size = (ours.float() - theirs.float()).square(), theirs.float().square()
    weights = _weights(mask, error)
    if weights is not None:
        error, size = error * weights, size * weights
    return error.sum() / size.sum().clamp(min=torch.finfo(torch.float32).tiny)


def _weights(mask: Tensor | None, of: Tensor) -> Tensor | None:
    """The mask as factors, float32, where it speaks of the first dimensions of a tensor that has more."""
    if mask is None or mask.dim() >= of.dim() or of.shape[: mask.dim()] != mask.shape:
        return None
    return (mask != 0).float().reshape(*mask.shape, *[1] * (of.dim() - mask.dim()))


class _Seen:
    """Between enter and exit, ``outputs``: of each named module, what it gives, call by call."""

    def __init__(self, model: nn.Module, names: Iterable[str], role: str) -> None:
        found = _modules(model) if (names := list(names)) else {}
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"hidden: the {role} has no module {missing[0]!r}")
        self.names, self.role, self.modules = names, role, [found[name] for name in names]
        self.outputs: list[list[Tensor]] = [[] for _ in names]
        self.grad, self.without = False, set[str]()  # whether there are gradients, and who was called without

    def __enter__(self) -> _Seen:
        self.grad = torch.is_grad_enabled()
        self.handles = [
            m.register_forward_hook(lambda _, args, output, name=name, kept=kept: self._see(name, kept, output))
            for m, name, kept in zip(self.modules, self.names, self.outputs, strict=True)
        ]
        return self

    def _see(self, name: str, kept: list[Tensor], output: Any) -> None:
        kept.append(_kept(output))
        if self.grad and not torch.is_grad_enabled():
            self.without.add(name)

    def __exit__(self, kind: Any, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        for name, kept in zip(self.names, self.outputs, strict=True) if kind is None else ():
            if not kept:
                raise ValueError(f"hidden: {name} of the {self.role} was not called (compiled code calls no hooks: "
                                 "give the model before torch.compile)")  # fmt: skip
            if not all(isinstance(y, Tensor) and y.is_floating_point() for y in kept):
                raise ValueError(f"hidden: {name} of the {self.role} gives no tensor of floats")
            if name in self.without:
                raise ValueError(f"hidden: {name} of the {self.role} was called without gradients, so that nothing "
                                 "would draw it to the teacher; checkpoint with use_reentrant=False, which keeps "
                                 "them")  # fmt: skip


def _kept(y: Any) -> Any:
    """The first tensor of an output, copied: an activation or a sum in place may follow, which writes into it."""
    values = y.values() if _is_mapping(y) else y if isinstance(y, (tuple, list)) else (y,)
    found = next((x for x in values if isinstance(x, Tensor)), None)
    return None if found is None else found.clone()


def _errors(name: str, ours: list[Tensor], theirs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"hidden: {name}: expected outputs of the student's shapes {shapes[0]}, got {shapes[1]}")
    return [relative_error(a, b, mask) for a, b in zip(ours, theirs, strict=True)]


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without what torch.compile and data parallelism put around it."""
    parallel = nn.parallel.DistributedDataParallel, nn.DataParallel
    while (inner := model._modules.get("module" if isinstance(model, parallel) else "_orig_mod")) is not None:
        model = inner
    return model


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(_unwrapped(model).named_modules())


def _hidden_pairs(student: nn.Module, teacher: nn.Module, hidden: Any) -> dict[str, str]:
    """{the student's name: the teacher's}."""
    pairs = dict(hidden) if isinstance(hidden, Mapping) else {}
    ours, theirs = _modules(student), _modules(teacher)
    for pattern in () if pairs else hidden:
        found = {n: n for n in ours if n and n in theirs and (n == pattern or fnmatch.fnmatchcase(n, pattern))}
        if not found:
            raise ValueError(f"hidden: {pattern!r} matches no module that both models have")
        pairs |= found
    for role, names, known in (("student", pairs, ours), ("teacher", pairs.values(), theirs)):
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"hidden: the {role} has no module {missing[0]!r}")
    return pairs


def _float_copy(student: nn.Module) -> nn.Module:
    """The model as it is now, with float layers, and nothing of it to train."""
    if packed := packed_layers(student):
        raise ValueError(f"teacher: expected a float model, as the student is packed ({next(iter(packed))})")
    if trained := [name for name, layer in quantized_layers(student).items() if layer.quantizer.frozen]:
        warnings.warn(f"distill: the student is quantized and its scales are frozen ({trained[0]}): its latent weights "
                      "are no longer the float model's; give that as teacher=", stacklevel=3)  # fmt: skip
    with torch.no_grad():
        teacher: Any = copy.deepcopy(_unwrapped(student))
    layers = quantized_layers(teacher)
    teacher = layers[""].to_float() if "" in layers else dequantize_(teacher)
    if any(isinstance(m, QuantizedKV) and m.replaced for m in teacher.modules()):
        quantize_kv_(teacher, None)
    for p in teacher.parameters():
        p.requires_grad_(False)
        p.grad = None
    return teacher.eval()


def _checked_teacher(student: nn.Module, teacher: nn.Module) -> nn.Module:
    if teacher is student:
        raise ValueError("teacher: expected another model than the student; None copies it")
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    if shared := [name for name, p in teacher.named_parameters() if id(p) in trained]:
        raise ValueError(f"teacher: {shared[0]} is the student's own Parameter, which would change while it trains; "
                         "give a copy.deepcopy made before quantize_, or None")  # fmt: skip
    return teacher.eval()


def _is_mapping(x: Any) -> bool:
    return isinstance(x, Mapping)


def _told(x: Any) -> str:
    """What an output is, in an error."""
    if _is_mapping(x):
        return ", ".join(map(str, x)) or "nothing"
    return f"{type(x).__name__} of {len(x)}" if isinstance(x, (tuple, list)) else type(x).__name__
