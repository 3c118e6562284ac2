"""Packed layers under tensor parallelism: ``parallelize_module`` with torch's ``ColwiseParallel`` and
``RowwiseParallel`` gives every rank the codes of its rows, or of its columns: outputs and inputs of a linear layer,
entries and features of an embedding.

Torch's styles split Parameters, of which a packed layer's weight is none. They are shown a weight of the right shape
on the meta device, and what they make of it says how the codes are to be split, which every rank has whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..quant.packing import TRITS, row_bytes
from ..quant.sharding import is_sharded, local_part, part_of, sharding_of, split_by
from .joint import bias_of, joint_tops
from .layers import quantized_input


def stand_in(layer: Any) -> nn.Parameter:
    """A weight to be split in place of the layer's."""
    return nn.Parameter(torch.empty(layer.shape, dtype=layer.weight_dtype, device="meta"), requires_grad=False)


MORE_INPUTS = 40  # numbers that fill whole bytes, whatever their width, and five to a byte


class Split(NamedTuple):
    """How a layer is split: ``columns``, or else rows, of which this rank's begin at ``first``; ``layer``: this rank's
    part, as a packed layer of its own, made of these ``tensors`` (codes and scales)."""

    mesh: Any
    columns: bool
    first: int
    layer: Any
    tensors: tuple[Any, Any]


def split(layer: Any, weight: Any) -> None:
    """Keeps this rank's codes, as ``weight`` (a DTensor of the layer's shape) is split. Raises NotImplementedError,
    before anything changes, where codes cannot be cut there."""
    mesh, placements = sharding_of(weight)
    name = type(layer).__name__
    dims = set(split_by(placements).values())
    if (
        mesh.ndim != 1
        or not dims <= {0, 1}
        or len(layer.shape) != 2
        or layer.form.transposed
        or not (hasattr(layer, "_multiplied") or layer.kind.name == "embedding")
    ):
        raise NotImplementedError(
            f"weight: a {name} of shape {layer.shape} cannot be split by {placements} over a mesh of {mesh.ndim} "
            "dimension(s); tensor parallelism is for packed linear layers and embeddings"
        )
    codes, columns = layer._buffers["weight_codes"], dims == {1}
    if is_sharded(codes):
        raise NotImplementedError(f"weight: this {name} is split over ranks already")
    part_of(weight, layer.weight_scale.numel(), layer.form)  # groups are not cut
    if columns:
        share = layer.cols // mesh.size()
        unit = 5 if layer.bits == TRITS else 8  # numbers that fill whole bytes, whatever their width
        if layer.cols % mesh.size() or (share % unit and share * layer.bits % 8):
            raise NotImplementedError(f"weight: the {layer.cols} columns of a {name} cannot be split over "
                                      f"{mesh.size()} ranks: codes of {layer.bits} bits fill whole bytes at multiples "
                                      f"of {unit} columns")  # fmt: skip
        width = row_bytes(share, layer.bits)
        place = slice(mesh.get_local_rank() * width, (mesh.get_local_rank() + 1) * width)
        mine = codes[:, place].contiguous()
    else:
        mine = codes[part_of(weight, layer.rows, layer.form).box[1]].contiguous()
    layer._buffers["weight_codes"] = type(weight).from_local(mine, mesh, placements, run_check=False, shape=codes.shape,
                                                             stride=codes.stride())  # fmt: skip
    layer.__dict__["_split"] = Split(mesh, columns, 0, None, (None, None))


def _mine(layer: Any) -> Split:
    """The split with this rank's part as the layer's tensors are now."""
    found: Split = layer.__dict__["_split"]
    tensors = layer._buffers["weight_codes"], layer._buffers["weight_scale"]
    kept = found.layer
    same = all(a is b for a, b in zip(tensors, found.tensors, strict=True))
    if kept is not None and same and kept.activations == layer.activations:
        return found
    codes, scale = map(local_part, tensors)
    weight = torch.empty(layer.shape, device="meta")
    dims = (1,) if found.columns else (0,)
    part = part_of(_as_split(weight, tensors[0], dims[0]), scale.numel(), layer.form)
    of_rows = part.take(scale)
    rows = len(codes)
    cols = layer.cols // found.mesh.size() if found.columns else layer.cols
    config = replace(layer.config, activation=None)
    if rounds_tokens(layer, found):
        codes, of_rows, cols = _with_room(layer, codes, of_rows, cols)
    sizes = dict(zip(layer.kind.sizes, (rows, cols), strict=True))
    new = layer.kind.packed(**sizes, **layer.kind._others(False), config=config, trits=layer.trits,
                            scale_dtype=of_rows.dtype, dtype=layer.weight_dtype)  # fmt: skip
    new.weight_codes, new.weight_scale = codes, of_rows
    new.set_activations(layer.activations)
    first = 0 if found.columns else part.box[1].start
    layer.__dict__["_split"] = found = Split(found.mesh, found.columns, first, new, tensors)
    return found


def rounds_tokens(layer: Any, found: Split) -> bool:
    """Whether a kernel rounds parts of tokens, which have one scale over all ranks."""
    return found.columns and layer.activations == "int8" and layer._buffers["weight_scale"].is_cpu


def _with_room(layer: Any, codes: Tensor, scale: Tensor, cols: int) -> tuple[Tensor, Tensor, int]:
    """Codes, scales and inputs of a part with a few inputs more (a group of them): ``_beside_tops`` says what for."""
    grouped = layer.config.group_size if layer.config.granularity == "per_group" else None
    more = grouped or MORE_INPUTS
    codes = torch.cat([codes, codes.new_zeros(len(codes), row_bytes(more, layer.bits))], 1)
    if grouped:
        scale = scale.reshape(len(codes), -1)
        scale = torch.cat([scale, torch.ones_like(scale[:, :1])], 1).reshape(-1)
    return codes, scale, cols + more


def _beside_tops(x: Tensor, mesh: Any, cols: int) -> Tensor:
    """A part of each token with the largest magnitude of the whole beside it, once with each sign, and zeros: the
    kernel takes its scale, and as the weights there are equal these two add nothing, in exact integers."""
    flat = x.reshape(-1, x.shape[-1])
    tops = joint_tops(flat, mesh)[:, None]
    zeros = tops.new_zeros(len(flat), cols - flat.shape[1] - 2)
    return torch.cat([flat, tops, -tops, zeros], 1).reshape(*x.shape[:-1], cols)


def _as_split(weight: Tensor, codes: Any, dim: int) -> Tensor:
    """A weight on the meta device, split as its codes are."""
    from torch.distributed.tensor import DTensor, Shard

    share = list(weight.shape)
    share[dim] = len(codes.to_local()) if dim == 0 else weight.shape[1] // codes.device_mesh.size()
    part = weight.new_empty(share)
    return DTensor.from_local(part, codes.device_mesh, [Shard(dim)], run_check=False, shape=weight.shape,
                              stride=weight.stride())  # fmt: skip


def parallel_product(layer: Any, x: Any) -> Tensor:
    """What a layer makes of a DTensor: the product of every rank's rows with all inputs, or of its inputs, whose sums
    are still to be added over the ranks."""
    if "_split" not in layer.__dict__:
        raise TypeError(f"x: a DTensor for a {type(layer).__name__} that is not split; call parallelize_module with "
                        "ColwiseParallel or RowwiseParallel")  # fmt: skip
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    found = _mine(layer)
    mesh = found.mesh
    if layer.kind.output is None:
        return _looked_up(found, x, layer.cols)
    wanted = Shard(x.dim() - 1) if found.columns else Replicate()
    if x.placements != (wanted,):
        x = x.redistribute(mesh, [wanted])
    if layer.config.activation is not None:
        x = quantized_input(x, layer.config.activation, layer.kind.token_dims)
    part = x.to_local(grad_placements=[wanted if found.columns else Partial()])
    if rounds_tokens(layer, found):
        part = _beside_tops(part, mesh, found.layer.cols)
    y = found.layer(part)
    if (bias := bias_of(layer.bias, mesh, found.columns, y.dtype)) is not None:
        y = y + bias
    shape = (*x.shape[:-1], layer.shape[0])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, mesh, [Partial() if found.columns else Shard(len(shape) - 1)], run_check=False,
                              shape=torch.Size(shape), stride=stride)  # fmt: skip


def _looked_up(found: Split, x: Any, cols: int) -> Tensor:
    """Rows of indices that every rank has: this rank's columns of them; or those of its rows, and zeros in place of
    others, which are still to be added over the ranks."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if x.placements != (Replicate(),):
        x = x.redistribute(found.mesh, [Replicate()])
    index = x.to_local()
    if found.columns:
        y = found.layer(index)
    else:
        near = index - found.first
        mine = (near >= 0) & (near < found.layer.rows)
        y = found.layer(torch.where(mine, near, 0)) if found.layer.rows else _zeros(found.layer, index)
        y = y * mine.unsqueeze(-1)
    shape = (*x.shape, cols)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, found.mesh, [Shard(len(shape) - 1) if found.columns else Partial()], run_check=False,
                              shape=torch.Size(shape), stride=stride)  # fmt: skip


def _zeros(layer: Any, index: Tensor) -> Tensor:
    return torch.zeros(*index.shape, layer.cols, dtype=layer.weight_dtype, device=index.device)
