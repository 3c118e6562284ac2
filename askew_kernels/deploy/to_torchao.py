"""Packed linear layers as torchao's tensors: the same integers and scales, in the layouts of its kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.kinds import PackedLinear, PackedTransposedLinear
from ..nn.replace import replace_modules, successors
from .integers import integers

FORMATS = ("intx", "int4")


def _library() -> Any:
    try:
        from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor
        from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor
    except ImportError as error:
        raise ImportError(f"to_torchao needs torchao (tested with 0.18; pip install torchao): {error}") from None
    return IntxUnpackedToInt8Tensor, Int4Tensor


@torch.no_grad()
def to_torchao(layer: PackedLinear, format: str = "intx") -> Tensor:
    """The packed weight as a tensor of torchao's, of shape (out_features, in_features).

    ===========  =====================================================================================================
    ``"intx"``   IntxUnpackedToInt8Tensor: every grid of integer levels, in the narrowest torch.int1 … int8 that holds
                 them; any granularity; ``dequantize()`` gives the trained weight bit for bit, which is checked. For
                 ``torch.export`` and torchao's CPU and mobile layouts.
    ``"int4"``   Int4Tensor, for torchao's CUDA product in bfloat16: grids of at most 16 consecutive integers, groups or
                 channels, and scales that bfloat16 holds (``pack_(…, scale_dtype=torch.bfloat16)``)
    ===========  =====================================================================================================

    Raises TypeError for another layer, ValueError where the grid, the granularity or the scales do not allow it, or
    where the layer quantizes its inputs (``QuantConfig(activation=…)``), ImportError without torchao.
    """
    if not isinstance(layer, PackedLinear):
        raise TypeError(f"layer: expected a PackedLinear, got {type(layer).__name__}")
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    intx, int4 = _library()
    n, cols = len(layer.weight_codes), layer.cols
    levels, scale, low, high = integers(layer, "torchao's tensors")
    rows, groups = scale.shape
    if format == "int4":
        if high - low > 15 or rows != n:
            raise ValueError("int4: expected at most 16 consecutive integers and scales by channel or group, got "
                             f"{layer.config.weight}, {layer.config.granularity}")  # fmt: skip
        if not torch.equal(scale.bfloat16().float(), scale.float()):
            raise ValueError("int4: bfloat16 does not hold the scales; pack with scale_dtype=torch.bfloat16")
        if cols % 2:
            raise ValueError(f"int4: expected an even number of columns, got {cols}")
        offset = 8 if low < -8 or high > 7 else 0  # weight = q s + zero_point
        nibbles = (levels - offset).to(torch.int8)
        data = (nibbles[:, 0::2] & 15) | (nibbles[:, 1::2] << 4)
        scales = scale.bfloat16().t().contiguous()
        return int4(data.contiguous(), scales, scales * offset, [1, cols // groups], torch.Size((n, cols)))
    width = next((b for b in range(1, 9) if -(2 ** (b - 1)) <= low and high < 2 ** (b - 1)), 8)
    zero = -128 if high > 127 else 0  # unsigned levels of 8 bits; weight = (q - zero_point) s
    points = torch.full(scale.shape, zero, dtype=torch.int8, device=scale.device)
    made = intx(qdata=(levels + zero).to(torch.int8), scale=scale, zero_point=points,
                target_dtype=getattr(torch, f"int{width}"), block_size=(n // rows, cols // groups),
                dtype=layer.weight_dtype, activation_quantization=None)  # fmt: skip
    if not torch.equal(made.dequantize(), layer.matrix()):
        raise ValueError(f"intx: torchao gives other weights in {layer.weight_dtype}; this is a limit of its rounding")
    return made


def to_torchao_(model: nn.Module, format: str = "intx") -> nn.Module:
    """Replaces every PackedLinear of ``model``, in place, by an nn.Linear with ``to_torchao``'s tensor as its weight.

    Raises as that, naming the layer, before anything is replaced; ValueError for a model without a PackedLinear.
    """
    layers = {n: m.as_linear() if isinstance(m, PackedTransposedLinear) else m
              for n, m in model.named_modules(remove_duplicate=False)
              if isinstance(m, (PackedLinear, PackedTransposedLinear))}  # fmt: skip
    if not layers:
        raise ValueError("model: has no PackedLinear; call pack_(model) first")

    def make(name: str, layer: Any) -> nn.Module:
        return layer.kind.float_layer(layer, nn.Parameter(to_torchao(layer, format), requires_grad=False))

    replace_modules(model, successors(layers, make, "to_torchao(layer)"))
    return model
