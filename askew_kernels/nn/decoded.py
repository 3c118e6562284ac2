"""The weight of a packed layer as a tensor whose values are unpacked where they are used, and not before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# what reads the values without an operator that could be intercepted
VALUES = {
    Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.__repr__,
    Tensor.untyped_storage, Tensor.__dlpack__,
}  # fmt: skip
READ_ONLY = ("weight: a packed layer's is read-only, its values are in weight_codes and weight_scale; call "
             "unpack_(model), take a copy by layer.dequantize(), or merge adapters by "
             "deploy.lora.merge_and_unload(model)")  # fmt: skip


class DecodedWeight(Tensor):
    """Answers for dtype, device and shape at once; any operation on it is made on ``layer.dequantize()``, anew each
    time. Functions that look at the types of their arguments see a tensor subclass, so that torch's fused fast paths
    (nn.TransformerEncoderLayer in eval) call the layer instead. Writing to it is a RuntimeError."""

    layer: Any
    _is_hf_initialized = True  # transformers' word for: draw nothing at random here

    @staticmethod
    def __new__(cls, layer: Any) -> DecodedWeight:
        place = layer.weight_codes.device
        new = Tensor._make_wrapper_subclass(cls, layer.shape, dtype=layer.weight_dtype, device=place)  # type: ignore[attr-defined]
        new.layer = layer
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        setting = func is Tensor.requires_grad_ or getattr(func, "__name__", "") == "__set__"
        if setting and not _wants_no_gradient(func, args, kwargs or {}):
            raise RuntimeError(READ_ONLY)
        if func in VALUES:
            args, kwargs = _values((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return DecodedWeight(args[0].layer)
        arguments = func._schema.arguments
        given = {**{a.name: v for a, v in zip(arguments, args, strict=False)}, **(kwargs or {})}
        if any(a.is_write and isinstance(given.get(a.name), DecodedWeight) for a in arguments):
            raise RuntimeError(READ_ONLY)
        if (index := _first_index(func, *args)) is not None:
            part = args[0].layer.entries([index] if isinstance(index, int) else index)
            return part[0] if isinstance(index, int) else part
        args, kwargs = _values((args, kwargs))
        return func(*args, **(kwargs or {}))


def _wants_no_gradient(func: Any, args: tuple, named: dict[str, Any]) -> bool:
    """Whether what is set is as it is: it requires no gradient."""
    if func is not Tensor.requires_grad_ and func != Tensor.requires_grad.__set__:  # type: ignore[attr-defined]
        return False
    return (*args[1:], named.get("requires_grad", True))[0] is False


def _first_index(func: Any, weight: Any, *rest: Any) -> Any:
    """The number or the vector of numbers by which the first dimension alone is indexed; None for all else."""
    if not isinstance(weight, DecodedWeight) or len(weight.shape) < 3:
        return None
    if func is torch.ops.aten.select.int and rest[0] == 0:
        return rest[1]
    if func is torch.ops.aten.index.Tensor and len(rest[0]) == 1:
        return rest[0][0] if rest[0][0].dim() == 1 else None
    return None


def _values(tree: Any) -> Any:
    return tree_map_only(DecodedWeight, lambda w: w.layer.dequantize(), tree)
