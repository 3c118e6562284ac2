"""Packed layers under tensor parallelism: ``parallelize_module`` with torch's ``ColwiseParallel`` and
``RowwiseParallel`` gives every rank the codes of its rows, or of its inputs.

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
from .joint import bias_of
from .layers import quantized_input


def stand_in(layer: Any) -> nn.Parameter:
    """A weight to be split in place of the layer's."""
    return nn.Parameter(torch.empty(layer.shape, dtype=layer.weight_dtype, device="meta"), requires_grad=False)


class Split(NamedTuple):
    """How a layer is split: ``inputs``, or else rows; ``layer``: this rank's part, as a packed layer of its own, made
    of these ``tensors`` (codes and scales)."""

    mesh: Any
    inputs: bool
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
        or not hasattr(layer, "_multiplied")
    ):
        raise NotImplementedError(
            f"weight: a {name} of shape {layer.shape} cannot be split by {placements} over a mesh of {mesh.ndim} "
            "dimension(s); tensor parallelism is for packed linear layers"
        )
    codes, inputs = layer._buffers["weight_codes"], dims == {1}
    if is_sharded(codes):
        raise NotImplementedError(f"weight: this {name} is split over ranks already")
    part_of(weight, layer.weight_scale.numel(), layer.form)  # groups are not cut
    if inputs:
        share = layer.cols // mesh.size()
        unit = 5 if layer.bits == TRITS else 8  # numbers that fill whole bytes, whatever their width
        if layer.cols % mesh.size() or (share % unit and share * layer.bits % 8):
            raise NotImplementedError(f"weight: the {layer.cols} inputs of a {name} cannot be split over {mesh.size()} "
                                      f"ranks: codes of {layer.bits} bits fill whole bytes at multiples of {unit} "
                                      "inputs")  # fmt: skip
        width = row_bytes(share, layer.bits)
        place = slice(mesh.get_local_rank() * width, (mesh.get_local_rank() + 1) * width)
        mine = codes[:, place].contiguous()
    else:
        mine = codes[part_of(weight, layer.rows, layer.form).box[1]].contiguous()
    layer._buffers["weight_codes"] = type(weight).from_local(mine, mesh, placements, run_check=False, shape=codes.shape,
                                                             stride=codes.stride())  # fmt: skip
    layer.__dict__["_split"] = Split(mesh, inputs, None, (None, None))


def _mine(layer: Any) -> Split:
    """The split with this rank's part as the layer's tensors are now."""
    found: Split = layer.__dict__["_split"]
    tensors = layer._buffers["weight_codes"], layer._buffers["weight_scale"]
    kept = found.layer
    if kept is not None and all(a is b for a, b in zip(tensors, found.tensors, strict=True)):
        return found
    codes, scale = map(local_part, tensors)
    weight = torch.empty(layer.shape, device="meta")
    dims = (1,) if found.inputs else (0,)
    part = part_of(_as_split(weight, tensors[0], dims[0]), scale.numel(), layer.form)
    of_rows = part.take(scale)
    rows = len(codes)
    cols = layer.cols // found.mesh.size() if found.inputs else layer.cols
    config = replace(layer.config, activation=None)
    new = layer.kind.packed(cols, rows, False, config, trits=layer.trits, scale_dtype=of_rows.dtype,
                            dtype=layer.weight_dtype, device="meta")  # fmt: skip
    new.weight_codes, new.weight_scale = codes, of_rows
    new.set_activations(layer.activations)
    layer.__dict__["_split"] = found = Split(found.mesh, found.inputs, new, tensors)
    return found


def _as_split(weight: Tensor, codes: Any, dim: int) -> Tensor:
    """A weight on the meta device, split as its codes are."""
    from torch.distributed.tensor import DTensor, Shard

    share = list(weight.shape)
    share[dim] = len(codes.to_local()) if dim == 0 else weight.shape[1] // codes.device_mesh.size()
    part = weight.new_empty(share)
    return DTensor.from_local(part, codes.device_mesh, [Shard(dim)], run_check=False, shape=weight.shape,
                              stride=weight.stride())  # fmt: skip


def parallel_product(layer: Any, x: Any) -> Tensor:
    """The product with a DTensor: of every rank's rows with all inputs, or of its inputs, whose sums are still to be
    added over the ranks."""
    if "_split" not in layer.__dict__:
        raise TypeError(f"x: a DTensor for a {type(layer).__name__} that is not split; call parallelize_module with "
                        "ColwiseParallel or RowwiseParallel")  # fmt: skip
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    found = _mine(layer)
    mesh = found.mesh
    wanted = Shard(x.dim() - 1) if found.inputs else Replicate()
    if x.placements != (wanted,):
        x = x.redistribute(mesh, [wanted])
    if layer.config.activation is not None:
        x = quantized_input(x, layer.config.activation, layer.kind.token_dims)
    y = found.layer(x.to_local(grad_placements=[wanted if found.inputs else Partial()]))
    if (bias := bias_of(layer.bias, mesh, found.inputs, y.dtype)) is not None:
        y = y + bias
    shape = (*x.shape[:-1], layer.shape[0])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, mesh, [Partial() if found.inputs else Shard(len(shape) - 1)], run_check=False,
                              shape=torch.Size(shape), stride=stride)  # fmt: skip
