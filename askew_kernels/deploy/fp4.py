"""MXFP4 and NVFP4 as compressed-tensors, vLLM and TensorRT keep them: E2M1 codes, two a byte, with scales of a byte.

A code is 8 where the level is negative, plus the place of its magnitude among 0, 0.5, 1, 1.5, 2, 3, 4, 6; of a byte the
first of two neighbours has the low half. Scales (n, groups) are E8M0 exponents (MX) or E4M3 numbers in units of the
tensor, whose inverse stands beside them (NVFP4): weight = level · scale / global scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract import unpack_codes
from ..quant import FP4, scale_unit
from ..quant.scales import holds_scales

ZERO = FP4().levels.index(0.0)  # its place among the levels; as far from it as its code is the place of a magnitude
GLOBAL = "weight_global_scale"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))  # by readers, with one global scale


@dataclass(frozen=True)
class Float4:
    """block: weights with one scale. scale_dtype: of QuantConfig. stored: the type in the file. strategy: its name in
    a config group."""

    block: int
    scale_dtype: str
    stored: torch.dtype
    strategy: str

    @property
    def in_units(self) -> bool:
        return self.scale_dtype == "float8_e4m3fn"

    def to_dict(self) -> dict[str, Any]:
        return {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "strategy": self.strategy,
                "group_size": self.block, "scale_dtype": str(self.stored)}  # fmt: skip


FLOAT4 = {  # by the name of the format; the block tells them apart
    "nvfp4-pack-quantized": Float4(16, "float8_e4m3fn", torch.float8_e4m3fn, "tensor_group"),
    "mxfp4-pack-quantized": Float4(32, "float8_e8m0fnu", torch.uint8, "group"),
}


def format_of(layer: Any) -> str | None:
    """The format whose levels, groups and type of scales the packed layer was trained with, if any."""
    config = layer.config
    for name, f in FLOAT4.items():
        whole = layer.cols % f.block == 0 and (config.group_size or f.block) % f.block == 0
        if config.weight == FP4() and config.scale_dtype == f.scale_dtype and whole:
            return name
    return None


def tensors(layer: Any, name: str) -> dict[str, Tensor]:
    """What stands for the weight in a file. Raises ValueError where the scales are not of the type, or where the
    layer's own type does not hold the weight, which readers make in bfloat16."""
    f, scale = FLOAT4[name], layer.weight_scale.detach().float()
    if not holds_scales(scale, f.scale_dtype):
        raise ValueError(f"weight_scale: {name} keeps scales as {f.scale_dtype}, which does not hold these; train with "
                         f'for_export("{name.split("-")[0]}")')  # fmt: skip
    if not torch.equal(layer.dequantize(torch.bfloat16).double(), layer.dequantize().double()):
        raise ValueError(f"weight: readers make it in bfloat16, which differs from {layer.weight_dtype}'s")
    index = unpack_codes(layer.weight_codes, layer.bits, layer.cols)
    negative = index < ZERO
    nibbles = torch.where(negative, 8 + ZERO - index, index - ZERO)
    n, of_row = layer.shape[0], layer.cols // f.block
    scale = scale.repeat_interleave(n * of_row // scale.numel()).reshape(n, of_row)
    packed = {"weight_packed": nibbles[:, ::2] | nibbles[:, 1::2] << 4}
    if f.in_units:
        unit = scale_unit(scale)
        return packed | {"weight_scale": (scale / unit).to(f.stored), GLOBAL: 1 / unit}
    return packed | {"weight_scale": scale.to(torch.float8_e8m0fnu).view(f.stored)}


def share_units(tensors: dict[str, Tensor]) -> list[str]:
    """Gives projections that readers fuse one global scale, the smallest, and changes no weight; returns the names of
    those that E4M3 does not allow it."""
    kept: list[str] = []
    for parts in FUSED:
        for first in [
            key.removesuffix(f"{parts[0]}.{GLOBAL}") for key in tensors if key.endswith(f".{parts[0]}.{GLOBAL}")
        ]:
            names = [f"{first}{part}" for part in parts if f"{first}{part}.{GLOBAL}" in tensors]
            least = torch.stack([tensors[f"{name}.{GLOBAL}"] for name in names]).amin(0)
            exact = {
                name: tensors[f"{name}.weight_scale"].float() * (least / tensors[f"{name}.{GLOBAL}"]) for name in names
            }
            shared = {name: s.to(torch.float8_e4m3fn) for name, s in exact.items()}
            if not all(torch.equal(shared[name].float(), s) for name, s in exact.items()):
                kept += names
                continue
            for name in names:
                tensors[f"{name}.weight_scale"], tensors[f"{name}.{GLOBAL}"] = shared[name], least.clone()
    return kept


def decoded(f: Float4, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """((n, cols) uint8 places of the levels, (n groups,) float32 scales) of tensors of the right shapes. Raises
    ValueError for scales that are negative or no numbers; a group with scale 0 has levels 0 and the scale of another.
    """
    packed, kept = found["weight_packed"], found["weight_scale"]
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    places = torch.where(nibbles < 8, ZERO + nibbles, ZERO + 8 - nibbles)
    if f.in_units:
        scale = kept.float() / found[GLOBAL].float()
    else:
        scale = kept.view(torch.float8_e8m0fnu).float()
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise ValueError("weight_scale: expected finite scales that are not negative")
    zero = scale == 0
    if bool(zero.any()):
        places = torch.where(zero.repeat_interleave(f.block, 1), ZERO, places)
        scale = torch.where(
            zero, scale[~zero].min() if not bool(zero.all()) else torch.ones((), dtype=torch.float32), scale
        )
    return places.to(torch.uint8), scale.reshape(-1)
