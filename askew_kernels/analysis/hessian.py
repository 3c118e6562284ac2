"""Curvature of a loss by Hessian–vector products: largest eigenvalues (Lanczos), traces (Hutchinson), slices.

Nothing here forms a Hessian: a product H v costs about two gradients. A model's quantized layers count as float layers
that hold the weights their forward computes with, because a straight-through gradient has no Hessian; what rounding
adds to a quantized input is a constant there, and learned scales are no parameters. Model, data and the caller's
generators are left as they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..nn import quantized_layers
from ..nn.convert import inputs_of
from ..nn.layers import INPUT
from ..optim import frozen_batchnorm_stats
from .batches import batches_of, check_count, samples
from .differentiable import check_gradients, check_twice, copied, culprit, differentiable_twice, left_alone, naming
from .generators import seeded

Product = Callable[[list[Tensor]], list[Tensor]]


def hessian_eigenvalues(
    loss: Callable[[], Tensor], params: Iterable[Tensor], k: int = 1, *, tol: float = 1e-4, seed: int = 0
) -> list[float]:
    """The k largest eigenvalues of the Hessian of ``loss()`` in ``params``, descending.

    Implicitly restarted Lanczos (``scipy.sparse.linalg.eigsh``) on Hessian–vector products, to ``tol`` relative; where
    there are no more than k + 1 parameters, the dense Hessian. What the loss draws follows from ``seed`` as well.
    Raises ValueError for k < 1, a loss or a Hessian that is not finite, a parameter without a gradient;
    NotImplementedError for a loss without a second derivative; ImportError without SciPy.
    """
    if isinstance(params, Tensor):
        raise TypeError("params: expected tensors, as in model.parameters(), got one; give [it]")
    params = list(params)
    if not params:
        raise ValueError("params: expected at least one tensor, got none")
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{i}]: expected a tensor, got {type(p).__name__}")
        if not p.requires_grad:
            raise ValueError(f"params[{i}]: expected a tensor that requires a gradient, got one that does not")
    with differentiable_twice(), seeded(seed):
        return _largest(_product_of(loss(), params, lambda: "loss"), params, k, tol, seed)


def _product_of(loss: Tensor, params: Sequence[Tensor], where: Callable[[], str]) -> Product:
    """v -> H v; the graph of the gradients is kept. ``where``: what an error names."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss: expected a scalar tensor, got {loss!r}")
    if not bool(loss.detach().isfinite()):
        raise ValueError(f"loss: expected a finite number, got {float(loss.detach())}")
    if not loss.requires_grad:
        raise ValueError("loss: does not depend on the parameters (is it detached, or computed without gradients?)")
    with naming(where):
        check_twice(loss)
        gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    moving = [g for g in gradients if g.requires_grad]  # a gradient that does not depend on the weights: H is 0 there

    def product(vectors: list[Tensor]) -> list[Tensor]:
        if not moving:
            return [torch.zeros_like(p) for p in params]
        chosen = [v for v, g in zip(vectors, gradients, strict=True) if g.requires_grad]
        with naming(where):
            return list(torch.autograd.grad(moving, params, chosen, retain_graph=True, materialize_grads=True))

    return product


def _largest(product: Product, params: Sequence[Tensor], k: int, tol: float, seed: int) -> list[float]:
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError:
        raise ImportError('eigenvalues need SciPy: pip install "askew_kernels[analysis]"') from None
    check_count("k", k)
    tol = ops.number("tol", tol, 0.0)
    sizes = [p.numel() for p in params]
    n = sum(sizes)
    if n == 0:
        raise ValueError("params: expected at least one element")

    def times(v: Any) -> Any:
        flat = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64).reshape(-1))
        vectors = [part.to(p).reshape(p.shape) for part, p in zip(flat.split(sizes), params, strict=True)]
        made = torch.cat([h.detach().reshape(-1).double().cpu() for h in product(vectors)]).numpy()
        if not np.isfinite(made).all():
            raise ValueError("loss: its Hessian is not finite here")
        return made

    if n <= k + 1:
        dense = np.stack([times(row) for row in np.eye(n)])
        return sorted(np.linalg.eigvalsh((dense + dense.T) / 2).tolist(), reverse=True)[:k]
    draws = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(n, generator=draws, dtype=torch.float64, device="cpu").numpy()
    if not times(start).any():  # almost surely only where H is 0, which Lanczos cannot start from
        return [0.0] * k
    operator = LinearOperator((n, n), matvec=times, dtype=np.float64)
    try:
        values = eigsh(operator, k, which="LA", v0=start, tol=tol, return_eigenvectors=False)
    except ArpackNoConvergence as problem:
        if len(problem.eigenvalues) < k:
            raise ValueError(f"k: {len(problem.eigenvalues)} of {k} eigenvalues converged to {tol:g}; ask for fewer "
                             "or a larger tol") from None  # fmt: skip
        values = problem.eigenvalues
    return sorted(values.tolist(), reverse=True)


@dataclass(frozen=True)
class Smoothness:
    """``eigenvalues``: {layer: the k largest, descending}; one entry "" for the whole model."""

    eigenvalues: dict[str, list[float]]

    @property
    def L(self) -> float:
        """L̂, the largest eigenvalue of all, at least 0."""
        return max(0.0, *(values[0] for values in self.eigenvalues.values()))


class _Problem:
    """The mean loss of a model over all batches, as a function of some of its parameters.

    ``named``: the parameters that can be moved. Batch i is always run with the same draws, those of ``seed`` + i: with
    dropout too there is one function, whose Hessian is asked for.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor], data: Any, seed: int) -> None:
        check_gradients(model)
        with torch.inference_mode(False), seeded(seed, data):
            self.batches = batches_of(data)
        self.loss_fn, self.seed = loss_fn, seed
        sizes = [max(1, samples(x)) for x, _ in self.batches]
        self.shares = [n / sum(sizes) for n in sizes]
        self.model, self.named = _smooth_twin(model)

    def loss(self, i: int) -> Tensor:
        """Batch i's part of the mean loss."""
        x, y = self.batches[i]
        with seeded(self.seed + i):
            return self.shares[i] * self.loss_fn(self.model(x), y)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Everything that products need; all is put back afterwards, also by an exception."""
        frozen = [p for p in self.named.values() if not p.requires_grad]  # they have a Hessian as well
        with differentiable_twice(self.model), left_alone(self.model), frozen_batchnorm_stats(self.model):
            try:
                for p in frozen:
                    p.requires_grad_(True)
                yield
            finally:
                for p in frozen:
                    p.requires_grad_(False)

    def product(self, params: Sequence[Tensor]) -> Product:
        """v -> H v. One batch: its graph is kept; several: each is run anew, so that memory holds one at a time."""

        def part(i: int) -> Product:
            return _product_of(self.loss(i), params, lambda: culprit(self.model, lambda: self.loss(i)) or "loss_fn")

        def summed(vectors: list[Tensor]) -> list[Tensor]:
            total = [torch.zeros_like(p) for p in params]
            with left_alone(self.model):
                for i in range(len(self.batches)):
                    for t, h in zip(total, part(i)(vectors), strict=True):
                        t += h
            return total

        return summed if len(self.batches) > 1 else part(0)


def _smoothed(layer: Any, value: Tensor, holds: bool) -> None:
    """Makes a quantized layer, in place, a smooth function of its weight and input: the product with both as its
    forward has them, ``value`` for the weight. Whether the weight ``holds`` it; else what lies between is a constant,
    as with the input."""
    start = None if holds else layer.weight.detach().clone()

    def weight() -> Tensor:
        return layer.weight if start is None else value + (layer.weight - start)

    def output(x: Tensor, *more: Any) -> Tensor:
        rounded = layer.forward_input(x)
        return layer.product(x if rounded is x else rounded + (x - x.detach()), weight(), *more)

    layer.config = replace(layer.config, gradient=None)  # one that is rounded is no derivative
    if (learned := layer._modules.get(INPUT)) is not None:
        learned.eval()  # where it has not started, it does not do so here
    vars(layer).update(_output=output, current=weight)  # of layers that are called, and of those that are read


def _smooth_twin(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model itself, or where it has quantized layers a copy that computes the same by smooth ones (``_smoothed``);
    the parameters. Learned scales, with which all of that is rounded, are none of them.

    A parameter that all who use it see quantized alike holds that weight; where they do not (an embedding beside the
    quantized layer that it shares its weight with) it stays, and the layers compute with it plus a constant.
    """
    layers = quantized_layers(model)
    with torch.inference_mode(False), torch.no_grad():
        weights = {name: layer.forward_weight() for name, layer in layers.items()}
        twin = copied(model) if layers else model
        uses: dict[int, list[Tensor]] = {}
        for name, module in twin.named_modules():
            for key, p in module.named_parameters(recurse=False, remove_duplicate=False):
                layer = name if key == "weight" and name in weights else f"{name}.{key}" if name else key  # held there
                uses.setdefault(id(p), []).append(weights.get(layer, p))
        learned: set[int] = set()
        for name, new in quantized_layers(twin).items():
            weight, value = new._parameters.get("weight"), weights[name]
            learned |= {id(p) for p in (new.quantizer.learned, *inputs_of(new))}
            holds = weight is not None and all(torch.equal(other, value) for other in uses[id(weight)])
            if holds:
                weight.copy_(value)
            _smoothed(new, value, holds)
    return twin, {n: p for n, p in twin.named_parameters() if p.is_floating_point() and id(p) not in learned}


def smoothness(
    model: nn.Module, loss_fn: Callable[..., Tensor], data: Any, *, k: int = 1, per_layer: bool = False,
    tol: float = 1e-4, seed: int = 0,
) -> Smoothness:  # fmt: skip
    """L̂: the k largest eigenvalues of the Hessian of the mean of ``loss_fn(model(x), y)`` over ``data``.

    data: (x, y), or batches of them (the loss is weighted by their sizes); x and y may be tensors, or mappings, tuples,
    dataclasses of them. per_layer: of each module's own block of the Hessian instead of the whole; every block's
    largest is at most the whole's. Frozen parameters count as well. The model is used in the mode that it is in; in
    training mode dropout's masks follow from ``seed``, the same ones in every product, and BatchNorm statistics are
    left alone. The same seed gives the same numbers.
    Raises ValueError for data without batches, a loss that is not finite or does not depend on the parameters, a model
    that is packed, on the meta device or has no parameters; NotImplementedError naming the module that cannot be
    differentiated twice; ImportError without SciPy.
    """
    problem = _Problem(model, loss_fn, data, seed)
    parts: dict[str, list[Tensor]] = {}
    for name, p in problem.named.items():
        parts.setdefault(name.rpartition(".")[0] if per_layer else "", []).append(p)
    with problem.ready():
        return Smoothness({
            name: _largest(problem.product(part), part, min(k, sum(p.numel() for p in part)), tol, seed)
            for name, part in parts.items() if any(p.numel() for p in part)
        })  # fmt: skip


def hessian_trace(
    model: nn.Module, loss_fn: Callable[..., Tensor], data: Any, *, samples: int = 32, seed: int = 0
) -> dict[str, float]:
    """{parameter name: estimate of the trace of its block of the Hessian}: Hutchinson, E[z·H z] with z = ±1.

    Off-diagonal blocks add variance, no bias. Model, data, seed and errors as in ``smoothness``; a shared parameter has
    one entry, under its first name. Source: Hutchinson 1990; used by HAWQ-V2 (Dong et al., 2020).
    """
    check_count("samples", samples)
    problem = _Problem(model, loss_fn, data, seed)
    params = list(problem.named.values())
    draws = torch.Generator("cpu").manual_seed(seed)
    with problem.ready():
        traces = torch.zeros(len(params), dtype=torch.float64, device="cpu")
        product = problem.product(params)
        for _ in range(samples):
            signs = [(2 * torch.randint(0, 2, p.shape, generator=draws, device="cpu") - 1).to(p) for p in params]
            pairs = zip(signs, product(signs), strict=True)
            traces += torch.stack([(z * h.detach()).double().sum().cpu() for z, h in pairs])
    return dict(zip(problem.named, (traces / samples).tolist(), strict=True))


def loss_slice(
    model: nn.Module, loss_fn: Callable[..., Tensor], data: Any, *, reach: float = 1.0, points: int = 21, seed: int = 0
) -> dict[str, list[float]]:
    """{"t": …, "loss": …}: the loss at w + t d for t from -reach to reach.

    d is random, each filter (row of a tensor of 2 or more dimensions) with the norm of the weight's, other parameters
    left alone, so that slices of different networks compare (Li et al., Visualizing the loss landscape, 2018). What the
    model draws is the same at every t. The model is put back.
    """
    check_count("points", points)
    reach = ops.number("reach", reach, 0.0)
    problem = _Problem(model, loss_fn, data, seed)
    draws = torch.Generator("cpu").manual_seed(seed)
    moving = [p for p in problem.named.values() if p.dim() > 1]
    losses = []
    with torch.inference_mode(False), torch.no_grad(), left_alone(problem.model), frozen_batchnorm_stats(problem.model):
        ts = torch.linspace(-reach, reach, points, dtype=torch.float32, device="cpu").tolist()
        kept = [p.detach().clone() for p in moving]
        directions = []
        for p in moving:
            d = torch.randn(p.shape, generator=draws, dtype=torch.float32, device="cpu").to(p)
            norms = [t.flatten(1).norm(dim=1).reshape(-1, *[1] * (p.dim() - 1)) for t in (p.detach(), d)]
            directions.append(d * norms[0] / norms[1].clamp(min=1e-12))
        try:
            for t in ts:
                for p, w, d in zip(moving, kept, directions, strict=True):
                    p.copy_(w + t * d)
                losses.append(math.fsum(float(problem.loss(i)) for i in range(len(problem.batches))))
        finally:
            for p, w in zip(moving, kept, strict=True):
                p.copy_(w)
    return {"t": ts, "loss": losses}
