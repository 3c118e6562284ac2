"""Suite ``sam``: what the perturbation and the restore of a sharpness-aware step cost beside the step itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import optim
from .. import peers
from ..goals import Goal, Headline, ratio
from ..harness import Case, CheckFailed, Context, Entry, Impl, Traffic, peer
from . import common
from .common import LR, Inputs, compare
from .step import HOLD, askew_optimizer, ours, ours_name, torch_step

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


OP = "ASAM perturb and restore, tensor list"
ENTRIES = [Entry(OP, sam_case)]

GOALS = [
    Goal("ASAM perturb + restore over a foreign base ÷ SGD fused", "<=", 3.6, ratio(OP, FOREIGN)),
    Goal("what ASAM adds to an ASkewSGD step ÷ SGD fused", "<=", 2.4,
         lambda rows: ratio(OP, INSIDE)(rows) - ratio(OP, ours_name(HOLD))(rows)),
]  # fmt: skip

HEADLINES = [
    Headline("ASAM's perturbation and restore", OP, FOREIGN, (
        (COMPILED, "torch.compile"), ("eager, lean foreach", "eager, lean"),
        ("eager, one tensor after the other", "eager, by tensor"), (OTHER, "pytorch-optimizer"),
    )),
    Headline("ASAM around an ASkewSGD step, the step included", OP, INSIDE),
]  # fmt: skip
