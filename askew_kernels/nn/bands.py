"""A packed layer's codes in the order in which a CPU reads them for int8 activations (``contract.band_codes``).

Made at the first such product and made anew where codes or scales change, never saved or copied. While they serve, the
layer's codes are given up where nobody else holds them: ``BandedCodes`` stands in their place and makes them again from
the bands for whoever asks, so that a weight is in memory once. Beside the bands stand the scales, in float32.
"""

from __future__ import annotations

import sys
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils._pytree import tree_map_only

from .. import contract, ops, runtime
from .decoded import VALUES

NAME = "weight_codes"
OFTEN = 16  # times that somebody asks for codes before they are kept for the next


class BandedCodes(Tensor):
    """Packed codes (n, row_bytes) whose values stand in ``bands``; any operation is made on the codes themselves. Those
    that write to them, or give a view of them, bring them back for good: then they are ``codes``, the bands may no
    longer be theirs, and the layer takes both as they are with its next product."""

    bands: Tensor
    shaped: tuple[int, int, int, int]  # bits, rows, columns, groups
    codes: Tensor | None
    asked: int

    @staticmethod
    def __new__(cls, bands: Tensor, layout: tuple[int, int, int, int]) -> BandedCodes:
        bits, n, cols, _ = layout
        shape = n, contract.row_bytes(cols, bits)
        new = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.uint8, device=bands.device)  # type: ignore[attr-defined]
        new.bands, new.shaped, new.codes, new.asked = bands, layout, None, 0
        return new

    def plain(self, keep: bool = False) -> Tensor:
        """The codes; ``keep``: from now on they are these."""
        if self.codes is not None:
            return self.codes
        with torch.inference_mode(False), torch.no_grad():  # to be written to wherever codes may be
            codes = torch.ops.askew.packed_bands_codes(self.bands, *self.shaped)
        self.asked += 1
        if keep or self.asked == OFTEN:
            self.codes = codes
        return codes

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]  # from now on the codes are these
            args[0].codes = args[1].plain() if isinstance(args[1], BandedCodes) else args[1].detach()
            return None
        if func in VALUES or func is Tensor.data_ptr:
            lasting = func not in (Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.__repr__, Tensor.tolist)
            args, kwargs = tree_map_only(BandedCodes, lambda t: t.plain(lasting), (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        schema = func._schema
        keep = any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))
        args, kwargs = tree_map_only(BandedCodes, lambda t: t.plain(keep), (args, kwargs or {}))
        return func(*args, **kwargs)


def _sent(codes: BandedCodes) -> tuple:
    """To another process, in memory that both have: it has to last until that has it."""
    return reduce_tensor(codes.plain(keep=True))


ForkingPickler.register(BandedCodes, _sent)


class Bands:
    """``of(layer, x)``: (bands, scales) of the layer's codes and scales as they stand; None where they do not serve."""

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] | None = None
        self._serve: bool | None = None

    def __deepcopy__(self, memo: Any) -> Bands:
        return Bands()

    def __reduce__(self) -> Any:
        return Bands, ()

    @property
    def bytes(self) -> int:
        kept = self._kept
        return 0 if kept is None else kept[3].numel() + 4 * kept[4].numel()

    def of(self, layer: Any, x: Tensor, compiling: bool = False) -> tuple[Tensor, Tensor] | None:
        if not runtime.compiled_for(x) or runtime.exporting():
            return None
        if torch.jit.is_tracing():  # made in a trace they would be made by the traced graph, in every call
            return self.kept(layer)
        if compiling:  # what a graph holds; it cannot ask where memory is, and bands are dropped with their codes
            if not layer._bands_made() or (kept := self._kept) is None:
                return None
            # because of this question a layer is traced anew when others stand in their places
            same = kept[0] is layer._buffers[NAME] and kept[1] is layer._buffers["weight_scale"]
            return kept[3:] if same else None
        return None if (kept := self.made(layer)) is None else kept[3:]

    def made(self, layer: Any) -> tuple[Any, ...] | None:
        """What is kept of the layer's bands, made where they are not there or no longer the layer's; None where bands
        do not serve. Another thread may drop what ``_kept`` holds at any time, so it is read once."""
        kept = self._kept
        if kept is None or not _fresh(kept, layer):
            if not self._serves(layer):
                return None
            kept = self._make(layer)
        return kept

    def kept(self, layer: Any) -> tuple[Tensor, Tensor] | None:
        """(bands, scales) if those that are kept are still the layer's."""
        kept = self._kept
        return kept[3:] if kept is not None and _fresh(kept, layer) else None

    @staticmethod
    def read_as(layer: Any) -> tuple[list[int], int]:
        """(encoding, bits) of the codes in the bands: those of levels that are looked up are counted instead."""
        grid = layer.config.weight
        return (grid.encoding, layer.bits) if grid.counted is None else grid.counted[:2]

    def _serves(self, layer: Any) -> bool:
        if self._serve is None:
            grid, groups = layer.config.weight, _groups(layer)
            self._serve = ops.packed.bands_serve(layer.rows, layer.cols, grid, layer.bits, groups)
        return self._serve

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, layer: Any) -> tuple[Any, ...]:
        groups, grid, bits = _groups(layer), layer.config.weight, layer.bits
        self._kept = None  # the memory of the old ones is free before the new ones are made
        codes, scale = restored(layer), layer._buffers["weight_scale"]
        if (counted := grid.counted) is not None:  # bands that do not give the codes back
            own = ops.packed.counted_codes(codes, grid, bits, layer.cols)
            bands = torch.ops.askew.packed_bands(own, counted.bits, layer.cols, groups, 2**counted.bits)
        else:
            bands = torch.ops.askew.packed_bands(codes, bits, layer.cols, groups, len(grid.levels))
            layout = bits, layer.rows, layer.cols, groups
            alone = sys.getrefcount(codes) <= _alone() and _holders(codes) == _holders(torch.empty(1))
            if alone and torch.equal(torch.ops.askew.packed_bands_codes(bands, *layout), codes):
                layer._buffers[NAME] = BandedCodes(bands, layout)
        factor = 1.0 if counted is None else counted.factor
        scales = ops.packed.band_scales(scale.detach().float() * factor, layer.rows, groups)
        kept = self._kept = layer._buffers[NAME], scale, _states(layer), bands, scales
        return kept

    def drop(self, layer: Any) -> None:
        restored(layer)
        self._kept = None


def _fresh(kept: tuple[Any, ...], layer: Any) -> bool:
    """Whether these bands are those of the layer's codes and scales as they stand."""
    buffers = layer._buffers
    if kept[0] is not buffers[NAME] or kept[1] is not buffers["weight_scale"]:
        return False
    return kept[2] == _states(layer)


def _groups(layer: Any) -> int:
    return max(layer._buffers["weight_scale"].numel() // max(layer.rows, 1), 1)


def _state(t: Tensor) -> Any:
    if type(t) is BandedCodes:
        return t.codes is None
    return t.data_ptr(), None if t.is_inference() else t._version


def _states(layer: Any) -> Any:
    return _state(layer._buffers[NAME]), _state(layer._buffers["weight_scale"])


def _holders(t: Tensor) -> int:
    """Of the memory of ``t``: tensors and views of it."""
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata)


def _alone() -> int:
    """What ``sys.getrefcount`` says of a tensor that a dictionary and a local variable hold."""
    held = {NAME: torch.empty(0)}
    codes = held[NAME]
    return sys.getrefcount(codes)


def restored(layer: Any) -> Tensor:
    """The layer's codes, in the layout of files, in their place again."""
    codes = layer._buffers[NAME]
    if type(codes) is BandedCodes:
        codes = layer._buffers[NAME] = codes.plain()
    return codes
