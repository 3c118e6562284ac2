"""The quantization state of one weight: its scale, and the quantize–dequantized copy for the next forward.

A layer and an optimizer meet here and nowhere else: the layer owns a ``WeightQuantizer`` and ties it to its
Parameter; the optimizer finds it on the Parameter (or makes one for a weight without a layer).

**What counts stands in three tensors**, buffers of the layer, so that whatever copies, saves, averages or moves a
module takes them along:

* ``scale``, float32 (rows,): the scale in use;
* ``frozen``, float32 (): 1 where the scale serves whatever the weight becomes (any number above 0, so that averages
  with a frozen model are frozen), ``HELD`` while a sharpness-aware step has moved the weight away for one forward, 0
  where the scale follows its rule (and any other number below, which differences of checkpoints have);
* ``sums``, float32 (rows, 3): ``ops.row_sums`` of the weight that the scale was made for (the update pass leaves them
  behind); -1 where there is none yet.

A learned scale (``scale="lsq"``) is a Parameter of the layer in the place of the first, float32 (rows,), which an
optimizer moves; the scale in use is that, within its bounds and rounded to the config's type. Its ``sums`` are of the
weight that it started from, which says what its bounds are; it starts anew with another weight until it is trained.
Beside a weight that is sharded over ranks the Parameter is a DTensor that each of them has whole.

Another scale is the one in use where it is frozen, or where ``sums`` are those of the weight as it stands; otherwise it
is computed anew by its rule. Everything else that is kept here (``Known``) only saves the time to look, and holds for
one version of the weight and of these tensors, and not at all of a weight in memory that processes share
(``share_memory``). Torch counts in-place operations on a tensor, but not those made through
``weight.data``; a tied Parameter is therefore given the class ``QuantizedParameter``, which counts these too (the
object stays the same). Fused torch optimizers, whose writes are not counted either, are noticed by a hook on every
optimizer step. What remains unseen is a write through memory shared with NumPy, or through a ``.data`` tensor
taken before the last forward: call ``WeightQuantizer.invalidate()`` after such a write.
"""

from __future__ import annotations

import copy
import math
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .. import contract, ops
from .config import QuantConfig
from .forms import ROWS, Form
from .scales import SUM_RULES, bounded_scale, compute_scale, num_rows, round_scale, rule_code, scale_from_sums
from .sharding import Part, is_sharded, join_sums, local_part, part_of, sharding_of

FOLLOWS, FROZEN, HELD = 0.0, 1.0, -(2.0**-10)  # of ``frozen``; the last is no sum of others, times factors in use
LOCK = threading.RLock()  # what is kept is made by one thread; those that find it made do not come here
LAYOUT = 1e-5  # how far sums of one weight may differ that were added in another order, on another device; relative


class Changes:
    """Counts whatever changes any quantizer's state, or may have changed any weight, outside an update pass and without
    a version that tells it: while ``count`` stays, versions and addresses tell the rest."""

    count = 0


def _used_data(weight: Tensor) -> None:
    weight.__dict__["_data_uses"] = weight.__dict__.get("_data_uses", 0) + 1
    if weight.__dict__.get("_askew_scale_of", weight) is not None:  # what is learned of inputs is no quantizer's
        Changes.count += 1


class QuantizedParameter(nn.Parameter):
    """An nn.Parameter that notices when ``.data`` is handed out, because writes through it are not counted by torch."""

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        _used_data(self)
        return torch._C.TensorBase.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        _used_data(self)
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]

    def detach(self) -> Tensor:
        """A plain tensor; but ``nn.Parameter(weight)``, which asks for its own type back, gets that."""
        plain = super().detach()
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is nn.Parameter.__new__.__code__:
            return plain.as_subclass(type(self))
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A plain Parameter with a copy of the quantizer, which is that of the copied layer."""
        if id(self) in memo:
            return memo[id(self)]
        values = self.detach().clone(memory_format=torch.preserve_format)
        new = memo[id(self)] = nn.Parameter(values, self.requires_grad)
        if (quantizer := WeightQuantizer.of(self)) is not None:
            copy.deepcopy(quantizer, memo).tie(new)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the plain Parameter that it is; a layer ties it anew."""
        return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, OrderedDict())


class LearnedScale(QuantizedParameter):
    """A scale that an optimizer moves, of a weight or of an input; or an input's offset."""

    made = False  # any of a weight
    _askew_scale_of: Any = None  # of objects that others make by type(p)(value), too


def learns(p: Tensor, quantizer: WeightQuantizer | None = None) -> None:
    """Makes ``p`` the learned scale of this quantizer's weight, or what is learned of an input."""
    if type(p) in (nn.Parameter, QuantizedParameter):  # sharded and fake ones cannot be given another class
        p.__class__ = LearnedScale  # type: ignore[assignment]
    p._askew_scale_of = None if quantizer is None else weakref.ref(quantizer)  # type: ignore[attr-defined]


def is_learned(p: Tensor) -> bool:
    """Whether ``p`` is what a quantized layer learns beside its weight."""
    return type(p) is LearnedScale or (is_sharded(p) and "_askew_scale_of" in p.__dict__)


def scale_owner(p: Tensor) -> WeightQuantizer | None:
    """The quantizer whose learned scale ``p`` is."""
    of = p._askew_scale_of if is_learned(p) else None  # type: ignore[attr-defined]
    return None if of is None else of()


def spare_frozen_scales(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Takes the gradients of learned scales that are frozen away, so that no optimizer moves them, be it by what its
    momentum remembers."""
    for group in optimizer.param_groups if LearnedScale.made else ():
        for p in group["params"] if group.get("grid") is None else ():  # those with a grid hold weights
            if (quantizer := scale_owner(p)) is not None and quantizer.frozen:
                p.grad = None


def _note_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Torch's fused optimizers do not move the version counter; every step of a foreign optimizer counts as an edit."""
    skip_grids = getattr(optimizer, "KEEPS_QUANTIZERS_FRESH", False)
    for group in optimizer.param_groups:
        if skip_grids and group.get("grid") is not None:
            continue
        for p in group["params"]:
            if is_sharded(p) and (WeightQuantizer.of(p) is not None or is_learned(p)):
                _count_write(p)
            if isinstance(p, QuantizedParameter) and not (skip_grids and type(p) is LearnedScale):
                _used_data(p)
                quantizer = WeightQuantizer.of(p)
                if quantizer is not None and quantizer.config.clips_in_step and not quantizer.told:
                    quantizer.told = True
                    warnings.warn(
                        f"{type(optimizer).__name__}: a weight of shape {tuple(p.shape)} has ste_clip='step', so that "
                        "its gradient outside the hull is left to an ASkew optimizer's pass, and this optimizer does "
                        "not zero it; use ste_clip=True with it (or give the group its grid, by ak.param_groups)",
                        UserWarning, stacklevel=4,
                    )  # fmt: skip


register_optimizer_step_post_hook(_note_step)
register_optimizer_step_pre_hook(spare_frozen_scales)


class Known(NamedTuple):
    """What is known of a weight and its scale while both are what ``stamp`` says; replaced whole.

    ``versions[place]``: the weight's version, in a list that the weights of a launch share: the update pass moves all
    of them and nothing else. ``sums``: the quantizer's sums are those of the weight; ``inside``: no weight is outside
    the hull; ``fresh``: the types of the copies that hold s Q(w/s); ``scaled``: the scale is what its rule says of the
    weight.
    """

    stamp: tuple[Any, ...]
    versions: list[Any]
    place: int = 0
    sums: bool = False
    inside: bool = False
    fresh: frozenset[torch.dtype] = frozenset()
    scaled: bool = False


def shared_memory(weight: Tensor) -> bool:
    """Whether other processes may write it (``share_memory``), which moves no version here."""
    return weight.is_cpu and not is_sharded(weight) and weight.untyped_storage().is_shared()


def _version(weight: Tensor) -> Any:
    try:
        return weight._version
    except RuntimeError:  # inference tensors have none
        return object()


def _count_write(p: Tensor) -> None:
    """Says that this rank's part, or copy, may be another now."""
    with torch.no_grad():
        torch.autograd.graph.increment_version(local_part(p))


def _versions(t: Tensor) -> Any:
    """Of a DTensor, and of this rank's part of it: torch counts what is written through each by itself."""
    return (_version(t), _version(local_part(t))) if is_sharded(t) else _version(t)


def edits(learned: Tensor) -> Any:
    """Changes whenever the Parameter may have been written."""
    return _versions(learned), learned.__dict__.get("_data_uses", 0)


def _plain(learned: Tensor) -> Tensor:
    """The memory that this rank has of a learned scale, to be read and written without a gradient."""
    if not is_sharded(learned):
        return learned
    with torch.no_grad():
        return local_part(learned)


class WeightQuantizer:
    """Scale and copies of one weight; see the module's text. ``rows``: how many scales it has; ``form``: how it is a
    matrix."""

    def __init__(self, config: QuantConfig, form: Form = ROWS) -> None:
        self.config, self.form = config, form
        self.scale: Tensor = None  # type: ignore[assignment]  # the three tensors, made where the weight is known
        self.learned: LearnedScale | None = None  # what the scale in use follows from, in the place of the first
        self.started = False  # whether it has started from a weight that is not zero
        self._young: Any = None  # its version, while it has started and nobody has trained or set it
        self._start_known: tuple[Any, Tensor] | None = None  # by the version of the sums: what it started from
        self.flag: Tensor = None  # type: ignore[assignment]
        self.row_sums: Tensor = None  # type: ignore[assignment]
        self.copy_dtype: torch.dtype | None = None  # what the layer asked for last: the optimizer writes this one
        self._copies: dict[torch.dtype, Tensor] = {}
        self._strides: tuple[int, ...] | None = None  # of the weight that they are copies of
        self._lent: Any = None  # the weight's version when a graph took one of them for its backward
        self._known: Known | None = None
        self.frozen = self.held = False  # what ``flag`` said when last looked at: a GPU is not asked every time
        self._home: Known | None = None  # while the weight is perturbed: what will be true again
        self._home_left = False  # ... and that it is a sharded one whose scale the ranks have left so
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()  # those whose weight this serves, or served
        self._floating = False  # what a recipe has told: see ``floating`` and ``slack``
        self._slack: Tensor | None = None
        self.softened = False  # either
        self._flag_seen: Any = None  # its version when ``look_on_the_way`` looked
        self._part: tuple[Any, Part] | None = None  # by the sharding of a weight that is split over ranks
        self.shard: Tensor | None = None  # that weight, as it is when nothing has gathered it
        self._left: tuple[Any, Any] | None = None  # a sharded weight whose scale and sums these are, and its stamp
        self.sharded_type: torch.dtype | None = None  # of the weight while it is split over ranks
        self._loaded = False  # a checkpoint has just brought the three tensors
        self.told = False  # that a foreign optimizer does not clip its gradient
        self.served = False  # whether a layer has computed with this since it was made: others may read the weight
        self.revision = 0  # moves when scale, buffers or weight may have changed other than by an update pass

    # ---- identity ----

    def tie(self, weight: nn.Parameter) -> None:
        """Makes this the quantizer of ``weight``."""
        if type(weight) is nn.Parameter:
            weight.__class__ = QuantizedParameter
        weight._askew_quantizer = self  # type: ignore[attr-defined]
        Changes.count += 1
        if self.form.transposed and not self.form.view(weight).is_contiguous():
            weight.data = self.form.laid_out(weight.data)
        self.allocate(weight)

    def untie(self, weight: nn.Parameter) -> None:
        """Undoes ``tie``."""
        if WeightQuantizer.of(weight) is self:
            Changes.count += 1
            del weight._askew_quantizer  # type: ignore[attr-defined]
            if type(weight) is QuantizedParameter:
                weight.__class__ = nn.Parameter  # type: ignore[assignment]
            if self.form.transposed:
                weight.data = weight.data.contiguous()

    @staticmethod
    def of(weight: Tensor) -> WeightQuantizer | None:
        return getattr(weight, "_askew_quantizer", None)

    def rows(self, weight: Tensor) -> int:
        return num_rows(self.form.shape(weight.shape), self.config.granularity, self.config.group_size)

    # ---- the three tensors ----

    def allocate(self, weight: Tensor) -> None:
        """Makes the tensors where they are missing or not on the weight's device."""
        device = weight.device
        if self.scale is None or (self.flag.is_meta and not weight.is_meta):
            self._make(weight)
        elif self.flag.device != device:
            first, *others = self.tensors
            if self.learned is not None and "meta" not in (first.device.type, device.type):
                if not is_sharded(first):
                    first.data = first.data.to(device)  # the Parameter that an optimizer has
                others = [t.to(device) for t in others]  # FSDP2 has offloaded the other: what is in use is its copy
                self.tensors = first, *others  # type: ignore[assignment]
                return
            self.tensors = (
                first if first.device == device else first.detach().to(device),
                *(t.to(device) for t in others),
            )  # type: ignore[assignment]

    def _make(self, weight: Tensor) -> None:
        """New tensors, of which nothing is known."""
        self.frozen = self.held = self.started = False
        self.tensors = empty_state(self.rows(weight), weight.device)

    def fit(self, weight: Tensor) -> None:
        """Makes new ones where the weight has got another number of rows: an embedding was resized, channels pruned."""
        if weight.dim() < 2 or self.scale.numel() == self.rows(weight):  # a vector may be a shard of a matrix
            return
        if self.frozen:
            warnings.warn(f"weight: its frozen scale has {self.scale.numel()} rows, and its shape is now "
                          f"{tuple(weight.shape)}; the scale follows its rule again", stacklevel=4)  # fmt: skip
        self._make(weight)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """scale (the Parameter, where it is learned), frozen, sums."""
        return self.scale if self.learned is None else self.learned, self.flag, self.row_sums

    @tensors.setter
    def tensors(self, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        self.scale, self.flag, self.row_sums = tensors
        self._start_known = None
        if self.config.learns_scale:
            self._learn(self.scale)
        self.invalidate()

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The same memory as plain tensors."""
        return self.tensors if self.learned is None else tuple(_plain(t).detach() for t in self.tensors)

    @property
    def watched(self) -> tuple[Tensor, ...]:
        """Those that nothing moves in usual training."""
        return self.tensors if self.learned is None else self.tensors[1:]

    def _learn(self, scale: Tensor) -> None:
        """Takes this Parameter, or one made of a tensor, as the learned scale."""
        if not isinstance(scale, nn.Parameter):
            with torch.inference_mode(False):
                scale = nn.Parameter(scale.detach())
        if scale is not self.learned:
            self._young = None
        self.learned, LearnedScale.made = scale, True  # type: ignore[assignment]
        learns(scale, self)
        self.scale = _plain(scale).detach() if self._unrounded else _plain(scale).detach().to(self.flag.device).clone()

    def mark(self) -> None:
        """Torch may have put another tensor into the object of the learned scale, with that one's class."""
        if self.learned is not None and not (is_learned(self.learned) and scale_owner(self.learned) is self):
            self._learn(self.learned)

    @property
    def _unrounded(self) -> bool:
        """The scale in use is the learned one, the same memory."""
        return self.config.scale_dtype == "float32" and _plain(self.learned).device == self.flag.device  # type: ignore[arg-type]

    def write(self, frozen: float | None = None, scale: Tensor | None = None, sums: Tensor | None = None) -> None:
        """New values, in the same tensors: whoever holds them (a layer, a captured graph) sees these."""
        with torch.no_grad():
            if scale is not None:
                if self.learned is None or not self._unrounded:
                    self.scale.copy_(scale)
                if self.learned is not None:
                    _plain(self.learned).copy_(scale)
            if sums is not None:
                self.row_sums.copy_(sums)
            if frozen is not None:
                self.flag.fill_(frozen)
                self.frozen, self.held = frozen == FROZEN, frozen == HELD

    def look(self) -> None:
        """Reads the flag, which somebody else may have written."""
        if ops.has_values(self.flag):
            flag = float(self.flag)
            self.frozen, self.held = flag > FOLLOWS, flag == HELD
            if self.learned is not None:
                self.started = not self.row_sums.numel() or not float(self.row_sums[0, 0]) < 0

    def _stamp(self, weight: Tensor) -> tuple[Any, ...]:
        """With the weight's version it changes whenever the weight's content, or that of the three tensors, may have
        changed; equal to none where that cannot be told."""
        learned = self.learned
        try:
            return (
                self.scale._version if learned is None else None, self.flag._version, self.row_sums._version,
                weight.data_ptr(), weight.dtype, weight.__dict__.get("_data_uses", 0),
                None if learned is None else edits(learned),
            )  # fmt: skip
        except RuntimeError:  # inference tensors have no version, fake ones no memory
            return (object(),) * 3

    def _changed(self) -> None:
        self.revision += 1
        Changes.count += 1

    def _know(self, weight: Tensor, *known: Any) -> Known:
        """``known``: sums, inside, fresh, scaled."""
        Changes.count += 1
        self._known = now = Known(self._stamp_for_now(weight), [_version(weight)], 0, *known)
        return now

    def _stamp_for_now(self, weight: Tensor) -> tuple[Any, ...]:
        """Of what is known; equal to no later one where other processes may write the weight."""
        return (object(),) * 3 if shared_memory(weight) else self._stamp(weight)

    def _still(self, known: Known | None, weight: Tensor) -> bool:
        """Whether what is known holds for the weight as it stands."""
        return (known is not None and known.versions[known.place] == _version(weight)
                and known.stamp == self._stamp(weight))  # fmt: skip

    def settle(self, weight: Tensor) -> Known:
        """What is known of the weight as it stands, after the scale was brought up to date where it has to be."""
        self.allocate(weight)
        known = self._known
        if self._still(known, weight):
            return known  # type: ignore[return-value]
        self._changed()
        self.fit(weight)
        if not ops.has_values(weight):
            return self._know(weight)
        came = known is None or known.stamp[:3] != self._stamp(weight)[:3]  # from a checkpoint, an average, a copy
        if came:
            self.look()
        if self.learned is not None:
            return self._settle_learned(weight)
        # ranks look at a sharded weight together (``scale_of_parts``), or at the whole one in the forward of FSDP2
        if self.frozen or self.held or is_sharded(weight) or self._gathered():
            return self._know(weight)
        now = self._sums(weight)
        kept = torch.equal(now, self.row_sums) or (
            came and torch.allclose(now, self.row_sums, self._layout(weight), 0.0)
        )
        if not kept:
            self.write(scale=self._rule_scale(weight), sums=now)
        return self._know(weight, True, False, frozenset(), not kept)

    def _settle_learned(self, weight: Tensor) -> Known:
        if self.frozen or (self.started and self._young != edits(self.learned)):  # type: ignore[arg-type]
            self.follow_learned(weight)
        else:
            self._start(weight)
        return self._know(weight)

    def _start(self, weight: Tensor) -> None:
        """The learned scale by its rule; of a weight of zeros it will start again. Where no rank has the whole weight
        as it is, all look together."""
        cast = self.shard is not None and self.shard.dtype != weight.dtype  # gathered by FSDP2, rounded
        seen = self.shard if cast else weight
        if is_sharded(seen):  # type: ignore[arg-type]
            if not (self.started and self.left(seen)):  # type: ignore[arg-type]
                look_at_parts([self], [seen])  # type: ignore[list-item]
            sums = self.row_sums
        else:
            sums = self._sums(weight)
            self.write(scale=self._rule_scale(weight), sums=sums)
        self.started = bool((sums[:, contract.MAX_ABS] > 0).any())
        if not self.started:
            self.row_sums.fill_(-1.0)
        elif is_sharded(seen):  # type: ignore[arg-type]
            self.leave(seen)  # type: ignore[arg-type]
        young = self.started and not shared_memory(weight)  # what another process trains moves nothing here
        self._young = edits(self.learned) if young else None  # type: ignore[arg-type]

    def follow_learned(self, weight: Tensor) -> None:
        """The scale in use from the Parameter as it stands, which is brought back into its bounds."""
        learned: Any = _plain(self.learned)  # type: ignore[arg-type]
        with torch.no_grad():
            if self.started and not self.frozen:
                version = _version(self.row_sums)
                if self._start_known is None or self._start_known[0] != version:
                    self._start_known = version, self._start_scale(weight, self.row_sums)
                bounded = bounded_scale(learned, self._start_known[1].to(learned.device))
                if not (shared_memory(weight) and torch.equal(bounded, learned)):  # looked at in every forward
                    learned.copy_(bounded)
            if not self._unrounded:
                self.scale.copy_(round_scale(learned, self.config.scale_dtype))
            elif self.scale.data_ptr() != learned.data_ptr():
                self.scale = learned.detach()

    def _start_scale(self, weight: Tensor, sums: Tensor) -> Tensor:
        """What a learned scale of these sums started from."""
        c = self.config
        return scale_from_sums(sums, weight.numel() // len(sums), c.weight, c.scale, scale_dtype=c.scale_dtype)

    # ---- weights that are sharded over ranks ----

    def part(self, weight: Tensor) -> Part:
        """Which scales this rank's part of ``weight`` has. Raises NotImplementedError where that cannot be told."""
        sharding = sharding_of(weight), weight.shape
        if self._part is None or self._part[0] != sharding:
            self._part = sharding, part_of(weight, self.rows(weight), self.form)
        return self._part[1]

    def _part_stamp(self, weight: Tensor) -> Any:
        """Of a sharded weight and what is known of it; other tensors in their place are noticed, too."""
        part = local_part(weight)
        return _versions(weight), part.data_ptr(), _version(self.row_sums), id(self.row_sums), id(self.scale)

    def leave(self, weight: Tensor) -> None:
        """An update pass has written the sharded weight and its sums, or the ranks have looked at it together: the
        scale in use stays until the weight is written again."""
        self._left, self._loaded = (weakref.ref(weight), self._part_stamp(weight)), False

    def left(self, weight: Tensor) -> bool:
        """Whether sums and scale are still as ``leave`` left them."""
        return self._left is not None and self._left[0]() is weight and self._left[1] == self._part_stamp(weight)

    def written_unseen(self, weight: Tensor) -> None:
        """FSDP2 has gathered the parts of tensor parallelism anew, in the memory of the last ones."""
        if self._left is not None and self._left[0]() is weight:
            self._left = None

    def _gathered(self) -> bool:
        """Whether what a forward sees, gathered by FSDP2 and perhaps cast, is of a weight that was left so."""
        weight = None if self._left is None else self._left[0]()
        return weight is not None and self.left(weight)

    def _layout(self, weight: Tensor) -> float:
        """How far a checkpoint's sums may be from those of the weight: of one that FSDP2 has cast, by the rounding."""
        loaded, self._loaded = self._loaded, False
        cast = loaded and self.sharded_type not in (None, weight.dtype)
        return 2 * torch.finfo(weight.dtype).eps if cast else LAYOUT

    def scale_of_parts(self, weight: Tensor) -> Tensor:
        """The scale in use of a sharded weight. Where it is not known, all ranks look at their parts together, and must
        call this."""
        with LOCK, torch.no_grad(), torch.inference_mode(False):
            self.settle(weight)
            if not (self.learned is not None or self.frozen or float(self.flag) == HELD or self._gathered()):
                came = self._left is None or self._left[1][2:] != self._part_stamp(weight)[2:]
                look_at_parts([self], [weight], keep=LAYOUT if came else 0.0)
            return self.scale

    def hand_out(self) -> LearnedScale | None:
        """The learned scale, for a gradient; None where there is none, or none is asked for. It goes on from here,
        whatever the weight becomes."""
        self._young = None
        waited_for = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.frozen and (not waited_for or is_sharded(self.learned)):  # type: ignore[arg-type]
            return None
        return self.learned  # frozen: DistributedDataParallel waits for its gradient, which is zero

    # ---- scale ----

    def _sums(self, weight: Tensor) -> Tensor:
        """``ops.row_sums``; zeros where there is no weight."""
        if not weight.numel():
            return torch.zeros_like(self.row_sums)
        return ops.row_sums(self.form.view(weight), self.rows(weight))

    def _rule_scale(self, weight: Tensor) -> Tensor:
        c = self.config
        matrix = self.form.matrix(weight)
        return compute_scale(matrix, c.weight, c.scale, c.granularity, c.group_size, c.sawb_coefficients, c.scale_dtype)

    def current_scale(self, weight: Tensor) -> Tensor:
        """The scale in use for the weight as it stands; computed by its rule where it is neither frozen nor known."""
        with LOCK, torch.inference_mode(False):  # what is kept must serve training too
            self.settle(weight)
            return self.scale

    def scale_for(self, weight: Tensor, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """``current_scale`` as a function: nothing is kept, nothing decided on the host, so that it can be traced,
        mapped and differentiated. ``tensors``: scale, frozen and sums to use in place of the quantizer's own."""
        scale, flag, sums = tensors or self.tensors
        if len(scale) != self.rows(weight):  # as in ``fit``
            return self._rule_scale(weight)
        if self.config.learns_scale:
            return self._learned_for(weight, local_part(scale.detach()), sums)
        if self.frozen or weight.is_meta:
            return scale
        now = self._sums(weight)
        serves = (flag > FOLLOWS) | (flag == HELD) | (now == sums).all()
        return torch.where(serves, scale, self._rule_scale(weight))

    def _learned_for(self, weight: Tensor, scale: Tensor, sums: Tensor) -> Tensor:
        if not (self.frozen or weight.is_meta):
            if not self.started:
                return self._rule_scale(weight)
            scale = bounded_scale(scale, self._start_scale(weight, sums))
        return round_scale(scale, self.config.scale_dtype)

    def freeze(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Keeps the scale from now on: the given one, or what the rule says of the weight as it stands."""
        if scale is not None:
            self.set_scale(weight, scale)
        else:
            if is_sharded(weight) and self.part(weight).cut:
                self._left = None  # what is kept for good is not made of sums that were added in another order
            next_scales([self], [weight])
        self._changed()
        self.write(frozen=FROZEN, scale=None if self.learned is None else self.scale)
        self._know(weight)

    def _given(self, weight: Tensor, scale: Tensor) -> Tensor:
        if scale.numel() != len(self.scale):
            raise ValueError(f"scale: expected shape ({len(self.scale)},) for a weight of shape {tuple(weight.shape)} "
                             f"{self.config.granularity}, got {tuple(scale.shape)}")  # fmt: skip
        return local_part(scale.detach()).reshape(-1)

    def set_scale(self, weight: Tensor, scale: Tensor) -> None:
        """A given scale, rounded as the config's ``scale_dtype`` asks for."""
        self.settle(weight)
        scale = round_scale(self._given(weight, scale).float(), self.config.scale_dtype)
        self._changed()
        unseen = self.frozen or weight.is_meta or is_sharded(weight)
        self.write(scale=scale, sums=None if unseen else self._sums(weight))
        self.started, self._young = self.started or not unseen, None
        self._know(weight, not unseen)

    def restore(self, weight: Tensor, scale: Tensor, frozen: bool, sums: Tensor | None = None) -> None:
        """State from an optimizer's checkpoint; the weight may be loaded before or after."""
        self.allocate(weight)
        self.write(float(frozen), self._given(weight, scale), sums)
        self.came()

    def came(self) -> None:
        """A checkpoint has brought the weight, the three tensors, or both."""
        self._left, self._loaded = None, True
        self.invalidate()

    def learn_on(self, weight: Tensor | None) -> None:
        """A learned scale has come as a Parameter alone, without the sums that say that it has started."""
        if weight is not None and not is_sharded(weight) and ops.has_values(weight):
            self.write(sums=self._sums(weight))

    def forget(self) -> None:
        """A weight of which nothing is known: the scale follows its rule, frozen or not before."""
        self.write(frozen=FOLLOWS)
        self.row_sums.fill_(-1.0)
        self.started = False
        self.invalidate()

    def invalidate(self) -> None:
        """Forgets everything that was derived from the weight's content."""
        self._changed()
        self._known = None

    # ---- copies ----

    def quantized(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """s Q(w/s) in ``dtype`` (default the weight's), in a type of levels Q(w/s): the copy the optimizer wrote where
        fresh, else recomputed."""
        dtype = dtype or weight.dtype
        with LOCK, torch.inference_mode(False):
            known = self.settle(weight)
            if dtype != self.copy_dtype:
                self.copy_dtype = dtype
                self._changed()
            view = self.form.view
            # of a weight that FSDP2 has gathered the memory is wanted back; one of other processes may be another soon
            if self.sharded_type is not None or shared_memory(weight):
                copy = self.form.like(weight, dtype)
                ops.fake_quantize_out_(view(weight), self.scale, self.config.weight, view(copy))
                return copy
            copy = self._buffer(weight, dtype)
            if dtype not in known.fresh:
                # that graph may still wait, and nobody has stepped since; a captured CUDA graph writes where it is
                if weight.is_cpu and self._lent == _version(weight):
                    del self._copies[dtype]
                    copy = self._buffer(weight, dtype)
                ops.fake_quantize_out_(view(weight), self.scale, self.config.weight, view(copy))
                self._know(weight, known.sums, known.inside, known.fresh | {dtype}, known.scaled)
            return copy

    def copy_and_inside(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """What a forward needs: ``quantized`` and ``all_inside``, in one look where nothing has changed."""
        known = self._known
        if known and dtype in known.fresh and dtype is self.copy_dtype and self._still(known, weight):
            found = self._copies[dtype], known.inside
        else:
            found = self.quantized(weight, dtype), self.all_inside(weight)
        if torch.is_grad_enabled():
            self._lent = _version(weight)
        return found

    def all_inside(self, weight: Tensor) -> bool:
        """The update pass has clamped every weight to the hull, and nothing has written one since."""
        known = self._known
        return known is not None and known.inside and self._still(known, weight)

    def _buffer(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.stride() != self._strides:
            self._copies.clear()
            self._strides = weight.stride()
        copy = self._copies.get(dtype)
        if copy is None or copy.shape != weight.shape or copy.device != weight.device:
            copy = self._copies[dtype] = self.form.like(weight, dtype)
            self._changed()
        return copy

    def copy_to_write(self, weight: Tensor) -> Tensor | None:
        """The buffer that the update pass should fill, or None where no forward reads one."""
        if self.config.forward == "relaxed" or self.on_the_way or self.copy_dtype is None:
            return None
        if is_sharded(weight) or shared_memory(weight):
            return None
        return self._buffer(weight, self.copy_dtype)

    def sums_to_write(self) -> Tensor | None:
        """The buffer for the row sums of the updated weight, or None where the scale does not follow it."""
        return None if self.frozen or self.learned is not None else self.row_sums

    @property
    def rule(self) -> tuple[Any, ...]:
        """What a scale follows from beside the weight."""
        c = self.config
        return c.weight, c.scale, c.sawb_coefficients, c.scale_dtype

    def batches(self, weight: Tensor) -> bool:
        """The next scale comes from the sums that the update pass leaves behind."""
        return not self.frozen and self.learned is None and self.config.scale in SUM_RULES and weight.numel() > 0

    def settled(self, weight: Tensor) -> bool:
        """Nothing but the update pass has touched weight and scale since its last run."""
        known = self._known
        follows = known is not None and known.sums and self.config.scale in SUM_RULES
        return (self.frozen or self.learned is not None or follows) and self._still(known, weight)

    def updated(self, weight: Tensor, copy_written: bool, sums_written: bool, clamped: bool, versions: list[Any],
                place: int) -> None:  # fmt: skip
        """The update pass has written (and clamped) the weight, perhaps its copy and sums: they belong together now,
        and after the same pass once more, which only has to move ``versions`` (see ``Known``)."""
        fresh = frozenset({self.copy_dtype}) if copy_written and self.copy_dtype is not None else frozenset()
        self._known = Known(self._stamp_for_now(weight), versions, place, sums_written, clamped, fresh)

    @property
    def clips_in_step(self) -> bool:
        """Whether the optimizer's pass zeroes gradients outside the hull."""
        return self.config.clips_in_step and not self.on_the_way

    @property
    def floating(self) -> bool:
        """Layers compute with the weight itself in training: a recipe's start. What is frozen is computed with."""
        return self._floating and not self.frozen

    @property
    def slack(self) -> Tensor | None:
        """0-dim: how far layers are from there to s Q(w/s) in training, while they are on the way."""
        return None if self._slack is None or self.frozen else self._slack  # in this order: a graph asks for no more

    @property
    def on_the_way(self) -> bool:
        """Layers do not compute with s Q(w/s) in training yet."""
        return self.softened and not self.frozen

    def look_on_the_way(self) -> None:
        """Averages and copies learn from the flag alone, which others write, that the scale was frozen; the float
        weights are computed with without a look at the scale."""
        if self.on_the_way and (version := _version(self.flag)) != self._flag_seen:
            self._flag_seen = version
            self.look()

    def _take_way(self, floating: bool, slack: Tensor | None) -> None:
        self._floating, self._slack, self.softened = floating, slack, floating or slack is not None

    def soften(self, share: float, slack: Tensor) -> None:
        """What layers compute with in training (in eval always with s Q(w/s)): the weight itself where ``share`` is 1,
        s Q(w/s) where it is 0, in between ``ops.soft_quantize``'s with ``slack``, a 0-dim tensor of that value that the
        caller goes on filling. Where levels are multiplied there is nothing in between, and the switch is at one half.
        A scale that is learned has a gradient always: the float weights are what is in between with a slack of 1, and
        where levels are multiplied as well the forward is quantized from the first step."""
        levels, learns = self.config.level_dtype is not None, self.config.learns_scale
        share = (0.0 if learns else float(share > 0.5)) if levels else share
        before = self._floating, self._slack is None
        floating = share >= 1 and not learns
        self._take_way(floating, slack if share > 0 and not floating else None)
        if before != (self._floating, self._slack is None):
            self._changed()

    # ---- sharpness-aware steps: the weight is elsewhere for one forward, then back ----

    def leaving(self, weight: Tensor) -> None:
        """The weight is about to be perturbed: what is known of it as it stands will be true again."""
        self._home, self._home_left = self.settle(weight), self.left(weight)

    def away(self, weight: Tensor) -> None:
        """It was perturbed, perhaps out of the hull: the scale stays, the copies do not belong to it."""
        if not self.frozen and self.learned is None:
            self.write(frozen=HELD)
        self._know(weight)

    def home_has_scale(self, weight: Tensor) -> bool:
        """Once it is back, a step need not read it to know its scale."""
        if not self.frozen and self.learned is None and is_sharded(weight) and self.part(weight).cut:
            return False  # it is looked at when it freezes
        return self.frozen or self.started or (self._home is not None and self._home.sums and self.batches(weight))

    def returned(self, weight: Tensor) -> None:
        """It is back, bit for bit."""
        home, self._home = self._home, None
        if not self.frozen and self.learned is None:
            self.write(frozen=FOLLOWS)
        if self._home_left:
            self.leave(weight)
        if home is None:
            self.invalidate()
        else:
            self._know(weight, home.sums, home.inside)

    def moving(self) -> None:
        """The module is about to be: of a DTensor torch swaps the content, which nothing may refer to weakly."""
        self._left = None

    def moved(self) -> None:
        """The module was moved or cast: copies are dropped."""
        self._copies.clear()
        self.copy_dtype = None
        self.invalidate()

    def __getstate__(self) -> dict:
        """For copies too: in one of a layer the tensors are the copied layer's buffers."""
        held = {"config": self.config.to_dict(), "tensors": self.tensors, "frozen": self.frozen}
        if self.learned is not None:
            held["started"] = self.started, self._young == edits(self.learned)
        held |= {"floating": True} if self._floating else {}
        held |= {} if self._slack is None else {"slack": self._slack.clone()}
        return held if self.form == ROWS else held | {"form": tuple(self.form)}

    def __setstate__(self, state: dict) -> None:
        self.__init__(QuantConfig.from_dict(state["config"]), Form(*state.get("form", ROWS)))  # type: ignore[misc]
        self.tensors, self.frozen = state["tensors"], state["frozen"]
        self._take_way(state.get("floating", False), state.get("slack"))
        self.started, young = state.get("started", (False, False))
        if young:
            self._young = edits(self.learned)  # type: ignore[arg-type]


def learned_slopes(x: Tensor, scale: Tensor, grid: Any, factor: float | None = None) -> Tensor:
    """(rows, cols): what y = s Q(x/s) changes by with s, times LSQ's factor, in the type that the kernels compute in:
    Q - x/s inside the hull, c_end outside. By operators that can be traced. factor: None where x is the whole."""
    x, rows = x.detach(), scale.numel()
    wide = x.to(contract.compute_dtype(x.dtype)).contiguous()
    weight = scale.to(wide.dtype), grid.levels_tensor(x.device), grid.encoding
    y = ops.run_fake_quantize(wide, *weight, False, False, 0)
    inside = ops.run_fake_quantize_backward(torch.ones_like(x).contiguous(), x.contiguous(), *weight) != 0
    difference = torch.where(inside, y - wide, y).reshape(rows, -1)
    return difference / weight[0][:, None] * (factor or ops.scale_grad_factor(x.numel(), rows, grid))


def empty_state(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """scale, frozen and sums of a weight of which nothing is known."""
    with torch.inference_mode(False):
        scale = torch.ones(rows, dtype=torch.float32, device=device)
        return scale, scale.new_zeros(()), scale.new_full((rows, contract.NUM_ROW_SUMS), -1.0)


def next_scales(quantizers: list[WeightQuantizer], weights: list[Tensor]) -> list[Tensor]:
    """What an update step starts from, for each weight: its frozen scale, or the rule applied to it as it stands.

    Weights whose sums the previous step left behind cost no pass; their scales are computed together. At those that
    are sharded over ranks, and were not left so, all ranks look together.
    """
    together: dict[Any, list[tuple[WeightQuantizer, Tensor]]] = {}
    sharded: dict[Any, list[tuple[WeightQuantizer, Tensor]]] = {}
    for q, w in zip(quantizers, weights, strict=True):
        known = q.settle(w)
        if q.learned is not None:
            q.hand_out()
        if q.frozen or q.learned is not None:
            continue
        if is_sharded(w):
            where = (together, w.device) if q.batches(w) and q.left(w) else (sharded, sharding_of(w))
            where[0].setdefault(where[1], []).append((q, w))
        elif known.sums and q.batches(w):
            together.setdefault(w.device, []).append((q, w))
        else:
            q.write(FOLLOWS, *(() if known.scaled else (q._rule_scale(w), q._sums(w))))
        q._know(w, not is_sharded(w))  # copies of another scale are none
    for members in sharded.values():
        look_at_parts(*zip(*members, strict=True))  # type: ignore[arg-type]
    for members in together.values():
        ScaleBatch(*zip(*members, strict=True)).update()  # type: ignore[arg-type]
        for q, w in members:
            q._know(w, not is_sharded(w))
            if is_sharded(w):
                q.leave(w)
    return [q.scale for q in quantizers]


def look_at_parts(quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor], keep: float | None = None) -> None:
    """The scales of weights of one sharding by their rules, the very ones of the whole weights: every rank looks at its
    part, and where rows are cut at the whole weight. All ranks must call it. ``keep``: the scale stays where the sums
    are, to this relative difference, those that it was made for."""
    found: dict[int, Tensor] = {}  # by place: sums, and for a rule that looks at weights what it says
    mine = []
    for i, (q, w) in enumerate(zip(quantizers, weights, strict=True)):
        by_sums = q.config.scale in SUM_RULES
        cut = bool(q.part(w).cut) or not (by_sums or q.config.scale_dtype != "float8_e4m3fn")  # of one unit
        seen = w.full_tensor() if cut else local_part(w)  # type: ignore[attr-defined]
        columns = [ops.row_sums(q.form.view(seen), q.rows(seen)) if seen.numel() else q.row_sums.new_zeros(0, 3)]
        if not by_sums:
            columns.append(q._rule_scale(seen)[:, None] if seen.numel() else columns[0][:, :1])
        state = torch.cat(columns, 1)
        if cut:
            found[i] = state
        else:
            mine.append((i, q.part(w), state))
    if mine:
        places, parts, pieces = zip(*mine, strict=True)
        width = max(piece.shape[1] for piece in pieces)
        padded = [torch.nn.functional.pad(piece, (0, width - piece.shape[1])) for piece in pieces]
        found.update(zip(places, join_sums(parts, padded, sharding_of(weights[0])), strict=True))
    for i, (q, w) in enumerate(zip(quantizers, weights, strict=True)):
        sums = found[i][:, : contract.NUM_ROW_SUMS].contiguous()
        if keep is None or not torch.allclose(sums, q.row_sums, keep, 0.0):
            c, by_sums = q.config, q.config.scale in SUM_RULES
            cols, given = w.numel() // max(1, len(sums)), None if by_sums else found[i][:, -1].contiguous()
            scale = scale_from_sums(sums, cols, c.weight, c.scale, c.sawb_coefficients, c.scale_dtype, given)
            q.write(FOLLOWS, scale, sums)
        q.leave(w)


def share_sums(quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """Brings the sums that an update pass has left of every rank's parts to all ranks, for weights of one sharding:
    each computes the next scales from all of them. All ranks must call it."""
    parts = [q.part(w) for q, w in zip(quantizers, weights, strict=True)]
    pieces = [_precise_sums(q, w, left) if part.cut else left
              for q, w, part, left in zip(quantizers, weights, parts, sums, strict=True)]  # fmt: skip
    for q, w, whole in zip(quantizers, weights, join_sums(parts, pieces, sharding_of(weights[0])), strict=True):
        q.write(sums=whole)
        q.leave(w)


def _precise_sums(quantizer: WeightQuantizer, weight: Tensor, like: Tensor) -> Tensor:
    """Sums of this rank's pieces of rows in float64, of which what is added over the ranks is rounded once."""
    part = local_part(weight)
    if not part.numel():
        return torch.zeros_like(like, dtype=torch.float64)
    rows = quantizer.form.view(part).reshape(len(like), -1)
    one, two, most = (torch.linalg.vector_norm(rows, p, 1, dtype=torch.float64) for p in (1, 2, math.inf))
    return torch.stack([one, two.square(), most], 1)


class ScaleBatch:
    """The scales of weights on one device, each by its rule, from the sums that an update left behind: one launch."""

    def __init__(self, quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor]) -> None:
        self.scales, self.sums = [q.scale for q in quantizers], [q.row_sums for q in quantizers]
        self.rules: list[int] = []
        self.numbers: list[float] = []
        for q, w in zip(quantizers, weights, strict=True):
            code = rule_code(*q.rule)
            self.rules += [*code.rule, w.numel() // len(q.scale)]
            self.numbers += code.numbers
        self.prepared: ops.PreparedScales | None = None

    def update(self) -> None:
        """Moves no versions: what is known of the scales goes on with the pass that follows."""
        if not ops.prepares(self.scales[0]):
            ops.run_scales_from_sums(self.scales, self.sums, self.rules, self.numbers, count=False)
            return
        if self.prepared is None:
            self.prepared = ops.PreparedScales(self.scales, self.sums, self.rules, self.numbers)
        self.prepared.run()
