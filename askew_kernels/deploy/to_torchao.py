"""Packed linear layers as torchao's tensors: the same integers and scales, in the layouts of its kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..contract import level_table, unpack_codes
from ..nn.layers import plain_linear
from ..nn.packed import PackedLinear
from ..nn.replace import replace_modules

FORMATS = ("intx", "int4")


def _library() -> Any:
    try:
        from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor
        from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor
    except ImportError as error:
        raise ImportError(f"to_torchao needs torchao (tested with 0.18; pip install torchao): {error}") from None
    return IntxUnpackedToInt8Tensor, Int4Tensor


def _integers(layer: PackedLinear) -> Tensor:
    """(n, cols) levels, int16; ValueError where they are not integers."""
    grid = layer.config.weight
    if any(c != int(c) for c in grid.levels):
        raise ValueError(f"torchao's tensors hold integer levels, got {grid}")
    if not (-128 <= grid.levels[0] and grid.levels[-1] <= 127) and not (0 <= grid.levels[0] and grid.levels[-1] <= 255):
        raise ValueError(f"torchao's tensors hold levels of 8 bits, got {grid}")
    table = level_table(grid.levels_tensor(layer.weight_codes.device), grid.encoding, layer.weight_codes.device)
    codes = unpack_codes(layer.weight_codes, layer.bits, layer.cols)
    return table.to(torch.int16)[codes.int()]


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
    if layer.config.activation is not None:
        raise ValueError(f"torchao's tensors keep no quantized inputs, got activation={layer.config.activation}")
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    intx, int4 = _library()
    n, cols = layer.shape
    levels, scale = _integers(layer), layer.weight_scale.detach()
    groups = max(1, scale.numel() // n)
    low, high = int(min(layer.config.weight.levels)), int(max(layer.config.weight.levels))
    if format == "int4":
        if high - low > 15 or scale.numel() == 1 != n:
            raise ValueError(
                f"int4: expected at most 16 consecutive integers and scales by channel or group, got "
                f"{layer.config.weight}, {layer.config.granularity}"
            )
        if not torch.equal(scale.bfloat16().float(), scale.float()):
            raise ValueError("int4: bfloat16 does not hold the scales; pack with scale_dtype=torch.bfloat16")
        offset = 8 if low < -8 or high > 7 else 0  # weight = q s + zero_point
        nibbles = (levels - offset).to(torch.int8)
        if cols % 2:
            raise ValueError(f"int4: expected an even number of columns, got {cols}")
        data = (nibbles[:, 0::2] & 15) | (nibbles[:, 1::2] << 4)
        scales = scale.bfloat16().reshape(n, groups).t().contiguous()
        return int4(data.contiguous(), scales, scales * offset, [1, cols // groups], torch.Size((n, cols)))
    width = next((b for b in range(1, 9) if -(2 ** (b - 1)) <= low and high < 2 ** (b - 1)), 8)
    zero = -128 if high > 127 else 0  # unsigned levels of 8 bits; weight = (q - zero_point) s
    blocks = (1, 1) if scale.numel() == 1 else (n, groups)
    made = intx(
        qdata=(levels + zero).to(torch.int8), scale=scale.reshape(blocks),
        zero_point=torch.full(blocks, zero, dtype=torch.int8, device=scale.device),
        target_dtype=getattr(torch, f"int{width}"), block_size=(n // blocks[0], cols // blocks[1]),
        dtype=layer.weight_dtype, activation_quantization=None,
    )  # fmt: skip
    if not torch.equal(made.dequantize(), layer.dequantize()):
        raise ValueError(f"intx: torchao gives other weights in {layer.weight_dtype}; this is a limit of its rounding")
    return made


def to_torchao_(model: nn.Module, format: str = "intx") -> nn.Module:
    """Replaces every PackedLinear of ``model``, in place, by an nn.Linear whose weight is ``to_torchao``'s tensor.

    Convolutions stay packed. Raises as ``to_torchao``, naming the layer, before anything is replaced; ValueError for a
    model without a PackedLinear.
    """
    made: dict[int, nn.Module] = {}
    new: dict[str, nn.Module] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, PackedLinear) and name:
            if id(layer) not in made:
                try:
                    weight = nn.Parameter(to_torchao(layer, format), requires_grad=False)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                made[id(layer)] = plain_linear(layer, weight)
            new[name] = made[id(layer)]
    if not new:
        if isinstance(model, PackedLinear):
            raise ValueError("model: is itself a layer; use to_torchao(layer)")
        raise ValueError("model: has no PackedLinear; call pack_(model) first")
    replace_modules(model, new)
    return model
