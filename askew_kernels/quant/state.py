"""The quantization state of one weight: its scale, and the quantize–dequantized copy for the next forward.

A layer and an optimizer meet here and nowhere else: the layer owns a ``WeightQuantizer`` and ties it to its
Parameter; the optimizer finds it on the Parameter (or makes one for a weight without a layer).

Never a stale result: scale and copies carry the *version* of the weight that they belong to, and are recomputed as
soon as the weight has another one. Torch counts in-place operations on a tensor, but not those made through
``weight.data``; a tied Parameter is therefore given the class ``QuantizedParameter``, which counts these too (the
object stays the same). Fused torch optimizers, whose writes are not counted either, are noticed by a hook on every
optimizer step. What remains unseen is a write through memory shared with NumPy, or through a ``.data`` tensor
taken before the last forward: call ``WeightQuantizer.invalidate()`` after such a write.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops, reference
from .config import QuantConfig
from .scales import SUM_RULES, compute_scale, num_rows, scale_from_sums


class QuantizedParameter(nn.Parameter):
    """An nn.Parameter that notices when ``.data`` is handed out, because writes through it are not counted by torch."""

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        self.__dict__["_data_uses"] = self.__dict__.get("_data_uses", 0) + 1
        return torch._C.TensorBase.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        self.__dict__["_data_uses"] = self.__dict__.get("_data_uses", 0) + 1
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the plain Parameter that it is; a layer ties it anew."""
        return torch._utils._rebuild_parameter, (self.data, self.requires_grad, OrderedDict())


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Torch's fused optimizers do not move the version counter; every step of a foreign optimizer counts as an edit."""
    skip_grids = getattr(optimizer, "KEEPS_QUANTIZERS_FRESH", False)
    for group in optimizer.param_groups:
        if skip_grids and group.get("grid") is not None:
            continue
        for p in group["params"]:
            if isinstance(p, QuantizedParameter):
                p.__dict__["_data_uses"] = p.__dict__.get("_data_uses", 0) + 1


register_optimizer_step_post_hook(_note_step)


def version_of(weight: Tensor) -> tuple[Any, ...]:
    """Changes whenever the weight's content may have changed."""
    return (weight._version, weight.data_ptr(), weight.dtype, weight.__dict__.get("_data_uses", 0))


class WeightQuantizer:
    """Scale and copies of one weight; see the module's text.

    ``scale``: float32 (rows,) or None while nothing is known; ``frozen``: the scale no longer follows its rule;
    ``row_sums``: float32 (rows, 3) of the weight at ``version``, left behind by the update pass.
    """

    def __init__(self, config: QuantConfig) -> None:
        self.config = config
        self.scale: Tensor | None = None
        self.frozen = False
        self.fixed = False
        self.row_sums: Tensor | None = None
        self.copy_dtype: torch.dtype | None = None  # what the layer asked for last: the optimizer writes this one
        self._copies: dict[torch.dtype, Tensor] = {}
        self._fresh: set[torch.dtype] = set()
        self._version: tuple[Any, ...] | None = None
        self._sums_valid = False
        self._inside = False
        # while the weight is perturbed: sums valid, all weights inside the hull, scale
        self._at_home: tuple[bool, bool, Tensor | None] = (False, False, None)
        self._restored = False
        self.revision = 0  # moves when scale, buffers or weight may have changed other than by an update pass

    # ---- identity ----

    def tie(self, weight: nn.Parameter) -> None:
        """Makes this the quantizer of ``weight``."""
        if type(weight) is nn.Parameter:
            weight.__class__ = QuantizedParameter
        weight._askew_quantizer = self  # type: ignore[attr-defined]

    @staticmethod
    def of(weight: Tensor) -> WeightQuantizer | None:
        return getattr(weight, "_askew_quantizer", None)

    # ---- scale ----

    def rows(self, weight: Tensor) -> int:
        return num_rows(weight.shape, self.config.granularity, self.config.group_size)

    def _rule_scale(self, weight: Tensor) -> Tensor:
        c = self.config
        return compute_scale(weight, c.weight, c.scale, c.granularity, c.group_size, c.sawb_coefficients)

    def _sync(self, weight: Tensor) -> None:
        """Forgets what belongs to another version of the weight."""
        version = version_of(weight)
        if version == self._version:
            return
        self.revision += 1
        same = False
        if self._restored and self.row_sums is not None:  # a checkpoint's scale, whose weights may have come after it
            now = ops.row_sums(weight.detach(), self.rows(weight))
            same = torch.equal(now, self.row_sums.to(now.device))
        self._restored = self._inside = False
        if not same:
            self._sums_valid = False
            if not self.frozen:
                self.scale = None
        self._fresh.clear()
        self._version = version

    def current_scale(self, weight: Tensor) -> Tensor:
        """The scale in use for the weight as it stands; computed by its rule where it is neither frozen nor known."""
        if torch.is_inference_mode_enabled():  # what is kept must serve training too
            with torch.inference_mode(False):
                return self.current_scale(weight)
        self._sync(weight)
        if self.scale is None or self.scale.device != weight.device:
            self.scale = self._rule_scale(weight) if self.scale is None else self.scale.to(weight.device)
        return self.scale

    def next_scale(self, weight: Tensor) -> Tensor:
        """What an update step starts from: the frozen scale, or the rule applied to the weight as it stands."""
        return next_scales([self], [weight])[0]

    def freeze(self, weight: Tensor, scale: Tensor | None = None, fixed: bool = False) -> None:
        """Keeps the scale from now on: the given one, or what the rule says of the weight as it stands.

        ``fixed``: the user's own, which no checkpoint without a scale takes back.
        """
        if scale is not None:
            self.set_scale(weight, scale)
            self.fixed = fixed
        else:
            self.next_scale(weight)
        self.frozen = True
        self.revision += 1
        self.row_sums, self._sums_valid = None, False

    def set_scale(self, weight: Tensor, scale: Tensor) -> None:
        rows = self.rows(weight)
        if scale.numel() != rows:
            raise ValueError(f"scale: expected shape ({rows},) for a weight of shape {tuple(weight.shape)} "
                             f"{self.config.granularity}, got {tuple(scale.shape)}")  # fmt: skip
        self._sync(weight)
        self.revision += 1
        self._inside = False
        self.scale = scale.detach().to(device=weight.device, dtype=torch.float32).reshape(-1).contiguous().clone()
        self._fresh.clear()

    def restore(self, scale: Tensor | None, frozen: bool, row_sums: Tensor | None = None) -> None:
        """State from a checkpoint; the weights may be loaded before or after."""
        self.revision += 1
        if scale is None and self.fixed:
            self.invalidate()
            return
        self.scale = None if scale is None else scale.detach().float().reshape(-1).clone()
        self.frozen = frozen and scale is not None
        self.row_sums = None if row_sums is None else row_sums.detach().float().clone()
        self._sums_valid = row_sums is not None
        self._fresh.clear()
        self._inside = False
        self._version, self._restored = None, row_sums is not None

    @property
    def awaits_weights(self) -> bool:
        """Restored from an optimizer's checkpoint, and the weights that it belongs to may still come."""
        return self._restored

    def invalidate(self) -> None:
        """Forgets everything that was derived from the weight's content."""
        self.revision += 1
        self._version = None
        self._sums_valid = self._inside = self._restored = False
        self._fresh.clear()

    # ---- copies ----

    def quantized(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """s Q(w/s) in ``dtype`` (default the weight's): the copy the optimizer wrote where fresh, else recomputed."""
        if torch.is_inference_mode_enabled():  # what is kept must serve training too
            with torch.inference_mode(False):
                return self.quantized(weight, dtype)
        dtype = dtype or weight.dtype
        scale = self.current_scale(weight)
        if dtype != self.copy_dtype:
            self.copy_dtype = dtype
            self.revision += 1
        copy = self._buffer(weight, dtype)
        if dtype not in self._fresh:
            ops.fake_quantize_out_(weight, scale, self.config.weight, copy)
            self._fresh.add(dtype)
        return copy

    def fresh_copy(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The copy in ``dtype`` if it is there and belongs to the weight as it stands; the forward's short way."""
        if dtype is self.copy_dtype and dtype in self._fresh and self._version == version_of(weight):
            return self._copies[dtype]
        return None

    def all_inside(self, weight: Tensor) -> bool:
        """The update pass has clamped every weight to the hull, and nothing has written one since."""
        return self._inside and self._version == version_of(weight)

    def _buffer(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        copy = self._copies.get(dtype)
        if copy is None or copy.shape != weight.shape or copy.device != weight.device:
            copy = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            self._copies[dtype] = copy
            self.revision += 1
        return copy

    def copy_to_write(self, weight: Tensor) -> Tensor | None:
        """The buffer that the update pass should fill, or None where no forward reads one."""
        if self.config.forward != "hard" or self.copy_dtype is None:
            return None
        return self._buffer(weight, self.copy_dtype)

    def sums_to_write(self, weight: Tensor) -> Tensor | None:
        """The buffer for the row sums that the next scale comes from, or None where it is frozen or needs more."""
        if self.frozen or self.config.scale not in SUM_RULES:
            return None
        rows = self.rows(weight)
        if self.row_sums is None or self.row_sums.shape[0] != rows or self.row_sums.device != weight.device:
            self.row_sums = torch.zeros(rows, reference.NUM_ROW_SUMS, device=weight.device)
            self.revision += 1
        return self.row_sums

    @property
    def rule(self) -> tuple[Any, ...]:
        """Weights with the same rule can have their scales computed together."""
        return self.config.weight, self.config.scale, self.config.sawb_coefficients

    def batches(self, weight: Tensor) -> bool:
        """The next scale comes from the sums that the update pass leaves behind."""
        return self.row_sums is not None and self.config.scale in SUM_RULES and weight.numel() > 0

    def settled(self, weight: Tensor) -> bool:
        """Nothing but the update pass has touched weight and scale since its last run."""
        return (self.frozen or self._sums_valid) and self._version == version_of(weight)

    def updated(self, weight: Tensor, copy_written: bool, sums_written: bool, clamped: bool) -> None:
        """The update pass has written (and clamped) the weight, perhaps its copy and sums: they belong together now."""
        self._version = version_of(weight)
        self._sums_valid = sums_written
        self._inside = clamped
        self._restored = False
        self._fresh = {self.copy_dtype} if copy_written and self.copy_dtype is not None else set()

    # ---- sharpness-aware steps: the weight is elsewhere for one forward, then back ----

    def leaving(self, weight: Tensor) -> None:
        """The weight is about to be perturbed: what is known of it as it stands will be true again."""
        self._sync(weight)
        self._at_home = (self._sums_valid, self._inside, self.scale)

    def away(self, weight: Tensor) -> None:
        """It was perturbed, perhaps out of the hull: the scale stays, the copies do not belong to it."""
        self._sums_valid = self._inside = False
        self._fresh.clear()
        self._version = version_of(weight)

    def home_has_scale(self, weight: Tensor) -> bool:
        """Once it is back, a step need not read it to know its scale."""
        return self.frozen or (self._at_home[0] and self.batches(weight))

    def returned(self, weight: Tensor) -> None:
        """It is back, bit for bit."""
        self._sums_valid, self._inside, scale = self._at_home
        if not self.frozen:
            self.scale = scale
        self._fresh.clear()
        self._version = version_of(weight)

    def moved(self) -> None:
        """The module was moved or cast: copies are dropped, the scale follows at its next use."""
        self._copies.clear()
        self.copy_dtype = None
        self.invalidate()

    def __deepcopy__(self, memo: dict) -> WeightQuantizer:
        new = WeightQuantizer(self.config)
        memo[id(self)] = new
        new.scale = None if self.scale is None else self.scale.clone()
        new.frozen, new.fixed = self.frozen, self.fixed
        if not self.frozen and self.row_sums is not None and self._sums_valid:
            new.restore(new.scale, False, self.row_sums)
        return new

    def __getstate__(self) -> dict:
        return {"config": self.config.to_dict(), "scale": self.scale, "frozen": self.frozen}

    def __setstate__(self, state: dict) -> None:
        self.__init__(QuantConfig.from_dict(state["config"]))  # type: ignore[misc]
        self.restore(state["scale"], state["frozen"])


def next_scales(quantizers: list[WeightQuantizer], weights: list[Tensor]) -> list[Tensor]:
    """What an update step starts from, for each weight: its frozen scale, or the rule applied to it as it stands.

    Weights whose sums the previous step left behind cost no pass; those with one rule are computed together.
    """
    together: dict[Any, list[tuple[WeightQuantizer, Tensor]]] = {}
    for q, w in zip(quantizers, weights, strict=True):
        q._sync(w)
        if q.frozen:
            continue
        q._fresh.clear()
        if q._sums_valid and q.batches(w):
            together.setdefault((w.device, *q.rule), []).append((q, w))
        else:
            q.scale = q._rule_scale(w)
    for members in together.values():
        ScaleBatch(*zip(*members, strict=True)).update()  # type: ignore[arg-type]
    return [q.current_scale(w) for q, w in zip(quantizers, weights, strict=True)]


class ScaleBatch:
    """The scales of weights with one grid and rule on one device, from the sums that an update pass left behind."""

    def __init__(self, quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor]) -> None:
        self.quantizers = quantizers
        self.rows = [q.rows(w) for q, w in zip(quantizers, weights, strict=True)]
        cols = [w.numel() // n for n, w in zip(self.rows, weights, strict=True)]
        if len(set(cols)) == 1:
            self.cols: int | Tensor = cols[0]
        else:  # float64 (sum of rows,)
            each = torch.tensor(cols, dtype=torch.float64).repeat_interleave(torch.tensor(self.rows))
            self.cols = each.to(weights[0].device)

    def update(self) -> None:
        c = self.quantizers[0].config
        sums: list[Tensor] = [q.row_sums for q in self.quantizers]  # type: ignore[misc]
        joined = torch.cat(sums) if len(sums) > 1 else sums[0]
        scales = scale_from_sums(joined, self.cols, c.weight, c.scale, c.sawb_coefficients).split(self.rows)
        for q, scale in zip(self.quantizers, scales, strict=True):
            q.scale = scale
