"""Curvature of a loss by Hessian–vector products: largest eigenvalues (Lanczos), traces (Hutchinson), slices.

Nothing here forms a Hessian: a product H v costs about two gradients. A model's quantized layers count as float layers
that hold the weights their forward computes with, because a straight-through gradient has no Hessian.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import dequantize_, quantized_layers
from ..optim import frozen_batchnorm_stats

Product = Callable[[list[Tensor]], list[Tensor]]


# ---- eigenvalues ----------------------------------------------------------------------------------------------------


def hessian_eigenvalues(
    loss: Callable[[], Tensor], params: Sequence[Tensor], k: int = 1, *, tol: float = 1e-4, seed: int = 0
) -> list[float]:
    """The k largest eigenvalues of the Hessian of ``loss()`` in ``params``, descending.

    Implicitly restarted Lanczos (``scipy.sparse.linalg.eigsh``) on Hessian–vector products, to ``tol`` relative; where
    there are no more than k + 1 parameters, the dense Hessian. Raises ValueError for k < 1, a loss or a Hessian that is
    not finite; ImportError without SciPy.
    """
    gradients = torch.autograd.grad(_finite(loss()), params, create_graph=True, materialize_grads=True)
    return _largest(_product_of(gradients, params), params, k, tol, seed)


def _product_of(gradients: Sequence[Tensor], params: Sequence[Tensor]) -> Product:
    """v -> H v; the graph of the gradients is kept."""
    moving = [g for g in gradients if g.requires_grad]  # a gradient that does not depend on the weights: H is 0 there

    def product(vectors: list[Tensor]) -> list[Tensor]:
        if not moving:
            return [torch.zeros_like(p) for p in params]
        chosen = [v for v, g in zip(vectors, gradients, strict=True) if g.requires_grad]
        return list(torch.autograd.grad(moving, params, chosen, retain_graph=True, materialize_grads=True))

    return product


def _finite(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss: expected a scalar tensor, got {loss!r}")
    if not bool(loss.detach().isfinite()):
        raise ValueError(f"loss: expected a finite number, got {float(loss.detach())}")
    return loss


def _largest(product: Product, params: Sequence[Tensor], k: int, tol: float, seed: int) -> list[float]:
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError:
        raise ImportError('eigenvalues need SciPy: pip install "askew_kernels[analysis]"') from None
    import numpy as np

    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an int >= 1, got {k!r}")
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
    start = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    if not times(start).any():  # almost surely only where H is 0, which Lanczos cannot start from
        return [0.0] * k
    operator = LinearOperator((n, n), matvec=times, dtype=np.float64)
    try:
        values = eigsh(operator, k, which="LA", v0=start, tol=tol, return_eigenvectors=False)
    except ArpackNoConvergence as problem:
        if len(problem.eigenvalues) < k:
            raise ValueError(
                f"k: {len(problem.eigenvalues)} of {k} eigenvalues converged to {tol:g}; ask for fewer or a larger tol"
            ) from None
        values = problem.eigenvalues
    return sorted(values.tolist(), reverse=True)


# ---- a model, a loss and data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Smoothness:
    """``eigenvalues``: {layer: the k largest, descending}; one entry "" for the whole model."""

    eigenvalues: dict[str, list[float]]

    @property
    def L(self) -> float:
        """L̂, the largest eigenvalue of all, at least 0."""
        return max(0.0, *(values[0] for values in self.eigenvalues.values()))


class _Problem:
    """The mean loss of a model over all batches, as a function of some of its parameters."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor], data: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self.model, self.loss_fn, self.batches = _float_twin(model), loss_fn, batches_of(data)
        total = sum(_size(x) for x, _ in self.batches)
        self.shares = [_size(x) / total for x, _ in self.batches]

    def losses(self) -> Iterator[Tensor]:
        """Each batch's part of the mean loss."""
        for (x, y), share in zip(self.batches, self.shares, strict=True):
            yield share * _finite(self.loss_fn(self.model(x), y))

    def product(self, params: Sequence[Tensor]) -> Product:
        """v -> H v. One batch: its graph is kept; several: each is run anew, so that memory holds one at a time."""
        if len(self.batches) == 1:
            grads = torch.autograd.grad(next(self.losses()), params, create_graph=True, materialize_grads=True)
            return _product_of(grads, params)

        def product(vectors: list[Tensor]) -> list[Tensor]:
            total = [torch.zeros_like(p) for p in params]
            for part in self.losses():
                grads = torch.autograd.grad(part, params, create_graph=True, materialize_grads=True)
                for t, h in zip(total, _product_of(grads, params)(vectors), strict=True):
                    t += h
            return total

        return product


def batches_of(data: Any) -> list[tuple[Any, Any]]:
    """[(x, y), …] of one pair or of anything that yields pairs; ValueError where there are none."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        return [(data[0], data[1])]
    found = list(data)
    for item in found:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(f"data: expected (x, y) or batches of them, got a {type(item).__name__}")
    if not found:
        raise ValueError("data: yielded no batch")
    return [(x, y) for x, y in found]


def _size(x: Any) -> int:
    return max(1, len(x)) if isinstance(x, Tensor) and x.dim() else 1


@torch.no_grad()
def _float_twin(model: nn.Module) -> nn.Module:
    """The model itself, or where it has quantized layers a copy with float ones that hold what they compute with."""
    layers = quantized_layers(model)
    if not layers:
        return model
    twin = copy.deepcopy(model)
    for layer in quantized_layers(twin).values():
        if not layer._uses_float():
            layer.weight.copy_(layer.quantized_weight())
    return dequantize_(twin)


@contextlib.contextmanager
def _with_gradients(params: Iterable[Tensor]) -> Iterator[None]:
    """Frozen parameters have a Hessian as well."""
    frozen = [p for p in params if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def layer_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{module name: the parameters that are its own}, each parameter once."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if own:
            found[name] = own
    return found


def smoothness(
    model: nn.Module, loss_fn: Callable[..., Tensor], data: Any, *, k: int = 1, per_layer: bool = False,
    tol: float = 1e-4, seed: int = 0,
) -> Smoothness:  # fmt: skip
    """L̂: the k largest eigenvalues of the Hessian of the mean of ``loss_fn(model(x), y)`` over ``data``.

    data: (x, y), or batches of them (the loss is weighted by their sizes). per_layer: of each module's own block of
    the Hessian instead of the whole; every block's largest is at most the whole's. The model is used in the mode that
    it is in, its BatchNorm statistics are left alone. The same seed gives the same numbers.
    Raises ValueError for data without batches, a loss that is not finite; ImportError without SciPy.
    """
    problem = _Problem(model, loss_fn, data)
    parts: Mapping[str, Sequence[Tensor]]
    parts = layer_parameters(problem.model) if per_layer else {"": list(problem.model.parameters())}
    if not any(parts.values()):
        raise ValueError("model: it has no parameters")
    every = [p for part in parts.values() for p in part]
    with frozen_batchnorm_stats(problem.model), _with_gradients(every), torch.enable_grad():
        found = {
            name: _largest(problem.product(part), part, min(k, sum(p.numel() for p in part)), tol, seed)
            for name, part in parts.items()
        }
    return Smoothness(found)


def hessian_trace(
    model: nn.Module, loss_fn: Callable[..., Tensor], data: Any, *, samples: int = 32, seed: int = 0
) -> dict[str, float]:
    """{parameter name: estimate of the trace of its block of the Hessian}: Hutchinson, E[z·H z] with z = ±1.

    Off-diagonal blocks add variance, no bias. Source: Hutchinson 1990; used by HAWQ-V2 (Dong et al., 2020).
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples: expected an int >= 1, got {samples!r}")
    problem = _Problem(model, loss_fn, data)
    named = dict(problem.model.named_parameters())
    params = list(named.values())
    draws = torch.Generator().manual_seed(seed)
    traces = torch.zeros(len(params), dtype=torch.float64)
    with frozen_batchnorm_stats(problem.model), _with_gradients(params), torch.enable_grad():
        product = problem.product(params)
        for _ in range(samples):
            signs = [(2 * torch.randint(0, 2, p.shape, generator=draws) - 1).to(p) for p in params]
            pairs = zip(signs, product(signs), strict=True)
            traces += torch.stack([(z * h.detach()).double().sum().cpu() for z, h in pairs])
    return dict(zip(named, (traces / samples).tolist(), strict=True))


@torch.no_grad()
def loss_slice(
    model: nn.Module, loss_fn: Callable[..., Tensor], data: Any, *, reach: float = 1.0, points: int = 21, seed: int = 0
) -> dict[str, list[float]]:
    """{"t": …, "loss": …}: the loss at w + t d for t from -reach to reach.

    d is random, each filter (row of a tensor of 2 or more dimensions) with the norm of the weight's, other parameters
    left alone, so that slices of different networks compare (Li et al., Visualizing the loss landscape, 2018). The
    model is put back.
    """
    problem = _Problem(model, loss_fn, data)
    draws = torch.Generator().manual_seed(seed)
    moved = [p for p in problem.model.parameters() if p.dim() > 1]
    kept = [p.detach().clone() for p in moved]
    directions = []
    for p in moved:
        d = torch.randn(p.shape, generator=draws).to(p)
        norms = [t.flatten(1).norm(dim=1).reshape(-1, *[1] * (p.dim() - 1)) for t in (p.detach(), d)]
        directions.append(d * norms[0] / norms[1].clamp(min=1e-12))
    ts = torch.linspace(-reach, reach, points).tolist()
    losses = []
    try:
        with frozen_batchnorm_stats(problem.model):
            for t in ts:
                for p, w, d in zip(moved, kept, directions, strict=True):
                    p.copy_(w + t * d)
                losses.append(math.fsum(float(part) for part in _parts(problem)))
    finally:
        for p, w in zip(moved, kept, strict=True):
            p.copy_(w)
    return {"t": ts, "loss": losses}


def _parts(problem: _Problem) -> Iterator[Tensor]:
    """As ``losses``, but a slice may reach where the loss is not finite."""
    for (x, y), share in zip(problem.batches, problem.shares, strict=True):
        yield share * problem.loss_fn(problem.model(x), y)
