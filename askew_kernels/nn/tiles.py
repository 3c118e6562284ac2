"""A packed layer's codes in the order in which a GPU's matrix units read them (``contract.tile_codes``).

Made from codes and scales at the first product that takes them, made anew where these change, never saved or copied:
beside the codes they take as much memory once more, for trits a quarter more, for 5 to 7 bits that of 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops

LEAST_COLUMNS = 128  # shorter rows leave half of a tile empty and more


def state_of(t: Tensor) -> tuple[int, int | None]:
    """Where its numbers stand, and how often they were written."""
    return t.data_ptr(), None if t.is_inference() else t._version


def _fresh(kept: tuple[Any, ...] | None, codes: Tensor, scale: Tensor) -> bool:
    """Whether what is kept was made of these as they stand."""
    if kept is None or kept[0] is not codes or kept[1] is not scale:
        return False
    return bool(kept[2] == (state_of(codes), state_of(scale)))


class Tiles:
    """``of(layer, dtype)``: what ``packed_tiles_linear`` takes between x and the bias, or None where it does not
    serve; ``bytes``: the memory of what is kept."""

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] | None = None
        self._forms: dict[torch.dtype, int] = {}

    def __deepcopy__(self, memo: Any) -> Tiles:
        return Tiles()

    def __reduce__(self) -> Any:
        return Tiles, ()

    @property
    def bytes(self) -> int:
        if (kept := self._kept) is None:
            return 0
        tiles, scale = kept[3:5]
        return tiles.numel() * 4 + scale.numel() * 4

    def form(self, layer: Any, dtype: torch.dtype) -> int:
        """How the layer's codes stand in tiles for inputs of ``dtype``; 0: not in tiles."""
        if dtype not in self._forms:
            groups = max(layer.weight_scale.numel() // max(layer.rows, 1), 1)
            fits = layer.cols >= LEAST_COLUMNS and (groups == 1 or layer.cols % (16 * groups) == 0)
            grid = layer.config.weight
            self._forms[dtype] = ops.packed.tile_form(grid.levels, grid.encoding, dtype) if fits else 0
        return self._forms[dtype]

    def ready(self, layer: Any) -> bool:
        """Whether the tiles are those of the layer's codes and scales as they stand."""
        return _fresh(self._kept, layer.weight_codes, layer.weight_scale)

    @torch.no_grad()
    def of(self, layer: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        codes, scale, grid = layer.weight_codes, layer.weight_scale, layer.config.weight
        form = self.form(layer, dtype)
        kept = self._kept  # read once: another thread may drop it
        if kept is None or not _fresh(kept, codes, scale):
            made = ops.packed.packed_tiles(codes, grid.encoding, layer.bits, layer.cols, len(grid.levels), form)
            scales = ops.packed.tile_scales(scale.float(), layer.rows, layer.cols).contiguous()
            kept = self._kept = (codes, scale, (state_of(codes), state_of(scale)), made, scales)
        groups = scale.numel() // layer.rows if scale.numel() > 1 else 0
        return (*kept[3:], grid.levels_tensor(codes.device), grid.encoding, form, layer.rows, groups)

    def drop(self) -> None:
        self._kept = None
