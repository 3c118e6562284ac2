"""Suite ``sam``: what the perturbation and the restore of a sharpness-aware step cost beside the step itself, and whole
training steps of all that there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import optim
from .. import peers
from ..goals import Goal, Headline, ratio
from ..harness import Case, CheckFailed, Context, Entry, Impl, Traffic, peer
from . import common
from .common import LR, MOMENTUM, Inputs, compare
from .step import HOLD, askew_optimizer, ours, ours_name, torch_step
from .train import Task, Training, check_losses, resnet18, starting_point, template_batches

RHO, ETA = 0.5, 0.01
FOREIGN, INSIDE = "ASAM over SGD, restored", "ASAM over ASkewSGD, with its step"
COMPILED, OTHER = "torch.compile, by tensor", "pytorch-optimizer, T = |w| for every tensor"


class NoStep(torch.optim.SGD):
    """For peers whose restore comes with the base's step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


Halves = tuple[Callable[[], Any], Callable[[], Any]]  # perturb, restore


def asam_check(inputs: Inputs, weights: Sequence[Tensor], halves: Halves, everywhere: bool = False) -> Callable:
    """Every weight at w + rho T^2 g / |T g| after ``perturb``, and back bit for bit after ``restore``. everywhere: T =
    |w| for every tensor, as in the implementations that came first."""
    adapted, eta = [everywhere or q for q in inputs.skewed], 0.0 if everywhere else ETA
    perturb, restore = halves

    def check(run: Callable[[], Any]) -> None:
        run()
        before = [w.detach().clone() for w in weights]
        ts = [w.abs() + eta if a else torch.ones_like(w) for w, a in zip(before, adapted, strict=True)]
        norm = sum(((t * g).double() ** 2).sum() for t, g in zip(ts, inputs.grads, strict=True)) ** 0.5
        perturb()
        for i, (w, b, t, g) in enumerate(zip(weights, before, ts, inputs.grads, strict=True)):
            delta = RHO / norm * (t * t * g).double()
            compare(f"tensor {i}", w.detach() - b, delta, delta.abs() + b.double().abs() * 1e-6, 0.1)
        restore()
        if not all(map(torch.equal, weights, before)):
            raise CheckFailed("a weight did not come back bit for bit")

    return check


def asam_in_turns(inputs: Inputs, name: str, make: Callable[..., Halves], everywhere: bool = False) -> Impl:
    """``make(weights, gradients, adapted)`` gives (perturb, restore)."""
    params = inputs.parameters()
    halves = perturb, restore = make(params, inputs.grads_of(params), inputs.skewed)
    # norm: w, g; perturb: g, w updated, copy written; restore: copy read, w written
    traffic = Traffic(read=4 * inputs.bytes, updated=inputs.bytes, written=2 * inputs.bytes)
    check = asam_check(inputs, params, halves, everywhere)
    return Impl(name, lambda: (perturb(), restore()), "peer", traffic, check)


def asam_foreach(params: list[Tensor], grads: Sequence[Tensor], adapted: Sequence[bool]) -> Halves:
    """Lean eager: torch._foreach, buffers kept from step to step."""
    kept, pairs = [torch.empty_like(p) for p in params], list(zip(params, grads, adapted, strict=True))
    weights, of_weights = [p for p, _, a in pairs if a], [g for _, g, a in pairs if a]
    others, of_others = [p for p, _, a in pairs if not a], [g for _, g, a in pairs if not a]

    @torch.no_grad()
    def perturb() -> None:
        ts = torch._foreach_abs(weights)
        torch._foreach_add_(ts, ETA)
        scaled = torch._foreach_mul(ts, of_weights)
        norms = torch._foreach_norm([*scaled, *of_others])
        c = RHO / torch.linalg.vector_norm(torch.stack(norms))
        torch._foreach_copy_(kept, params)
        torch._foreach_mul_(scaled, ts)
        torch._foreach_mul_(scaled, c)
        torch._foreach_add_(weights, scaled)
        torch._foreach_add_(others, torch._foreach_mul(of_others, c))

    return perturb, torch.no_grad()(lambda: torch._foreach_copy_(params, kept))


def asam_by_tensor(params: Sequence[Tensor], grads: Sequence[Tensor], adapted: Sequence[bool]) -> Halves:
    """As davda54/sam writes it, with ASAM's T: a Python loop over tensors, a fresh clone of each."""
    kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def perturb() -> None:
        norm = torch.norm(torch.stack([
            ((p.abs() + ETA if a else 1.0) * g).norm(p=2) for p, g, a in zip(params, grads, adapted, strict=True)
        ]), p=2)  # fmt: skip
        scale = RHO / (norm + 1e-12)
        for i, (p, g, a) in enumerate(zip(params, grads, adapted, strict=True)):
            kept[i] = p.data.clone()
            p.add_((torch.pow(p.abs() + ETA, 2) if a else 1.0) * g * scale)

    def restore() -> None:
        for i, p in enumerate(params):
            p.data = kept[i]

    return perturb, restore


def squared_norm_of(w: Tensor, g: Tensor, adapted: bool) -> Tensor:
    x = (w.abs() + ETA) * g if adapted else g
    return (x * x).sum()


def perturb_one_(w: Tensor, g: Tensor, kept: Tensor, c: Tensor, adapted: bool) -> None:
    kept.copy_(w)
    t = w.abs() + ETA
    w.add_(c * (t * t) * g if adapted else c * g)


def asam_compiled(params: list[Tensor], grads: Sequence[Tensor], adapted: Sequence[bool]) -> Halves:
    weights, grads = ([t.detach().flatten() for t in tensors] for tensors in (params, grads))  # fewer shapes
    kept = [torch.empty_like(p) for p in weights]
    norm_of, move_ = torch.compile(squared_norm_of, dynamic=True), torch.compile(perturb_one_, dynamic=True)

    @torch.no_grad()
    def perturb() -> None:
        squares = [norm_of(w, g, a) for w, g, a in zip(weights, grads, adapted, strict=True)]
        c = RHO / torch.stack(squares).sum().sqrt()
        for w, g, k, a in zip(weights, grads, kept, adapted, strict=True):
            move_(w, g, k, c, a)

    return perturb, torch.no_grad()(lambda: torch._foreach_copy_(weights, kept))


def asam_ours(params: Sequence[Tensor], grads: Sequence[Tensor], adapted: Sequence[bool]) -> Halves:
    optimizer = optim.ASAM(torch.optim.SGD(params, lr=LR), rho=RHO, eta=ETA, telemetry_every=0)
    return optimizer.first_step, optimizer.restore


def asam_pytorch_optimizer(params: Sequence[Tensor], grads: Sequence[Tensor], adapted: Sequence[bool]) -> Halves:
    optimizer = peers.load("pytorch_optimizer").SAM(params, NoStep, rho=RHO, adaptive=True, lr=LR)
    return optimizer.first_step, optimizer.second_step


def asam_inside(inputs: Inputs) -> Impl:
    """The whole step over ASkewSGD; what the two halves add is its difference from ASkewSGD's step alone."""
    params = inputs.parameters()
    optimizer = optim.ASAM(askew_optimizer(params, inputs.skewed), rho=RHO, eta=ETA, telemetry_every=0)
    traffic = Traffic(read=4 * inputs.bytes, updated=2 * inputs.bytes, written=inputs.bytes)
    check = asam_check(inputs, params, (optimizer.first_step, optimizer.restore))
    return Impl("", lambda: (optimizer.first_step(), optimizer.second_step()), "ours", traffic, check)


def sam_case(context: Context) -> Case:
    """ASAM's perturbation and restore over ResNet-18's list, in units of one fused SGD step."""
    inputs = Inputs(context, common.resnet18_shapes() * (8 if context.is_cuda and not context.quick else 1))
    impls = [
        torch_step(inputs, "sgd"),
        *common.ours(context, FOREIGN, lambda: asam_in_turns(inputs, "", asam_ours)),
        *common.ours(context, INSIDE, lambda: asam_inside(inputs)),
        *ours(context, inputs, [HOLD]),
        asam_in_turns(inputs, "eager, lean foreach", asam_foreach),
        asam_in_turns(inputs, "eager, one tensor after the other", asam_by_tensor),
        common.when_compiled(context, COMPILED, lambda: asam_in_turns(inputs, "", asam_compiled)),
        peer(OTHER, "pytorch_optimizer", lambda: asam_in_turns(inputs, "", asam_pytorch_optimizer, True)),
    ]
    return Case("ResNet-18's 62 tensors", "float32", impls[0].name, impls, inputs.bytes // 4)


# ---- along the momentum ----------------------------------------------------------------------------------------------

MSAM_RHO = 0.3
MSAM_FOREIGN, MSAM_INSIDE = (
    "MSAM over SGD momentum, the step included",
    "MSAM over ASkewSGD momentum, the step included",
)


def msam_impl(inputs: Inputs, inside: bool) -> Impl:
    """The whole step: norm and perturbation (before the forward), restore and the base's step (after the backward)."""
    params = inputs.parameters()
    base = (askew_optimizer(params, inputs.skewed, momentum=MOMENTUM) if inside
            else torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, fused=True))  # fmt: skip
    optimizer = optim.MSAM(base, rho=MSAM_RHO)

    def check(run: Callable[[], Any]) -> None:
        run()
        before, momenta = [w.detach().clone() for w in params], [base.state[p]["momentum_buffer"] for p in params]
        c = MSAM_RHO / sum((m.double() ** 2).sum() for m in momenta) ** 0.5
        optimizer.first_step()
        for i, (w, b, m) in enumerate(zip(params, before, momenta, strict=True)):
            delta = -c * m.double()
            compare(f"tensor {i}", w.detach() - b, delta, delta.abs() + b.double().abs() * 1e-6, 0.1)
        optimizer.restore()
        if not all(map(torch.equal, params, before)):
            raise CheckFailed("a weight did not come back bit for bit")

    # norm: m; perturb: m, w updated, copy written; step: g and the copy read, w written, m updated
    traffic = Traffic(read=4 * inputs.bytes, updated=2 * inputs.bytes, written=2 * inputs.bytes)
    return Impl("", lambda: (optimizer.first_step(), optimizer.second_step()), "ours", traffic, check)


def msam_case(context: Context) -> Case:
    inputs = Inputs(context, common.resnet18_shapes() * (8 if context.is_cuda and not context.quick else 1))
    impls = [
        torch_step(inputs, "sgd", MOMENTUM),
        *common.ours(context, MSAM_FOREIGN, lambda: msam_impl(inputs, False)),
        *common.ours(context, MSAM_INSIDE, lambda: msam_impl(inputs, True)),
        *ours(context, inputs, [HOLD], momentum=MOMENTUM),
    ]
    return Case("ResNet-18's 62 tensors", "float32", impls[0].name, impls, inputs.bytes // 4)


# ---- whole training steps --------------------------------------------------------------------------------------------

CYCLE = 5  # steps in a call: one of them is LookSAM's with two gradients
WAYS: dict[str, Callable[[Any, nn.Module], Any]] = {
    "MSAM": lambda base, model: optim.MSAM(base, rho=MSAM_RHO, model=model, telemetry_every=0),
    f"LookSAM, k = {CYCLE}": lambda base, model: optim.LookSAM(base, k=CYCLE, model=model, telemetry_every=0),
    "ESAM, half of the tensors": lambda base, model: optim.ESAM(base, model=model, telemetry_every=0),
    "SAM": lambda base, model: optim.SAM(base, model=model, telemetry_every=0),
    "ASAM": lambda base, model: optim.ASAM(base, model=model, telemetry_every=0),
}
PLAIN = "SGD momentum"


class SharpTraining(Training):
    def step(self) -> None:
        x, y = self.task.batch(len(self.losses) % CYCLE)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(self.model(x), y)
            loss.backward()
            return loss

        optimizer: Any = self.optimizer
        self.losses.append(optimizer.step(closure).detach())


def trained_case(context: Context) -> Case:
    """Forward, backward and step, five of them a call, on the same five batches."""
    width, size, turns = (8, 8, 4) if context.quick else (32, 32, 16)
    batches = list(map(template_batches((3, 32, 32), size, context.device), range(CYCLE)))
    task = Task(lambda: resnet18(width), lambda k: batches[k], (), 0.02, False, turns)
    fresh, expected = starting_point(context, task)

    def impl(name: str, kind: str, around: Callable[[Any, nn.Module], Any]) -> Impl:
        model = fresh()
        base = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=MOMENTUM, fused=True)
        training = SharpTraining(task, context, model, around(base, model))

        def run() -> None:
            for _ in range(CYCLE):
                training.step()

        check = functools.partial(check_losses, training, expected)
        return Impl(name, run, kind, None, check, losses=training.losses, calls=CYCLE)

    impls = [impl(PLAIN, "baseline", lambda base, model: base)]
    for name, around in WAYS.items():
        impls += common.ours(context, name, functools.partial(impl, "", "ours", around))
    shape = f"ResNet-18 of width {width} on 32x32, batch {size}"
    return Case(shape, "float32", PLAIN, impls, 0, work=size, work_unit="images", turns=turns)


OP, MSAM_OP, TRAINED = (
    "ASAM perturb and restore, tensor list",
    "MSAM step, tensor list",
    "sharpness-aware training step",
)
ENTRIES = [Entry(OP, sam_case), Entry(MSAM_OP, msam_case), Entry(TRAINED, trained_case, warm=True)]

GOALS = [
    Goal("ASAM perturb + restore over a foreign base ÷ SGD fused", "<=", 3.6, ratio(OP, FOREIGN)),
    Goal("what ASAM adds to an ASkewSGD step ÷ SGD fused", "<=", 2.4,
         lambda rows: ratio(OP, INSIDE)(rows) - ratio(OP, ours_name(HOLD))(rows)),
    Goal("training step with MSAM ÷ with SGD", "<=", 1.1, ratio(TRAINED, "MSAM")),
]  # fmt: skip

HEADLINES = [
    Headline("ASAM's perturbation and restore", OP, FOREIGN, (
        (COMPILED, "torch.compile"), ("eager, lean foreach", "eager, lean"),
        ("eager, one tensor after the other", "eager, by tensor"), (OTHER, "pytorch-optimizer"),
    )),
    Headline("ASAM around an ASkewSGD step, the step included", OP, INSIDE),
    Headline("MSAM in a training step", TRAINED, "MSAM",
             tuple((name, name) for name in list(WAYS)[1:])),
]  # fmt: skip
