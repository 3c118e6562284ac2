"""What the launches of a step take, kept from step to step while nothing but the update pass touches the tensors.

Hundreds of tensors cost the host more than the device, so a step looks at a whole list at a time: by mapping functions
of C over it, never by Python's own code for each tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import contract, ops
from ..quant import WeightQuantizer
from ..quant.forms import ROWS
from ..quant.sharding import is_sharded, local_part
from ..quant.state import Changes, ScaleBatch

version, dtype = operator.attrgetter("_version"), operator.attrgetter("dtype")
address, strides = Tensor.data_ptr, Tensor.stride
plainly = torch._C.DisableTorchFunctionSubclass  # within it, attributes of a subclass of Tensor cost what a tensor's do


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """The same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def capturing(device: torch.device) -> bool:
    """Whether what is launched there now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Launch:
    """Parameters that one call of the operator updates. ``bucket``: what they have in common beside the device."""

    def __init__(self, members: list[Tensor], clamp: bool, bucket: list[Any], levels: Tensor,
                 encoding: list[int]) -> None:  # fmt: skip
        self.members, self.clamp, self.bucket = members, clamp, bucket
        self.quantizers: list[WeightQuantizer] = [WeightQuantizer.of(p) for p in members]  # type: ignore[misc]
        self.levels, self.encodings = [levels] * len(members), encoding * len(members)
        self.sharded = any(map(is_sharded, members))
        self.forms = [ROWS if q is None else q.form for q in self.quantizers]
        self.as_they_are = not self.sharded and all(form == ROWS for form in self.forms)
        first = self.quantizers[0]
        self.clips = first is not None and first.clips_in_step  # gradients outside the hull are left to this pass
        self.held: Held | None = None  # the rule's state of the members
        self.count_versions = 0  # of its counters, when it last moved them
        self.versions: list[int] = []  # of the members, after the last run; their quantizers look here
        self.prepared: ops.PreparedUpdate | None = None
        self._totals: list[tuple[Tensor, list[Tensor]]] = []

    def viewed(self, tensors: list[Any]) -> list[Any]:
        """What the kernels take of tensors like the members: this rank's part, the outputs before the inputs."""
        if self.as_they_are:
            return tensors
        return [form.view(local_part(t)) for form, t in zip(self.forms, tensors, strict=True)]

    def prepare(self) -> None:
        """The outputs, and how the next scales come from them."""
        copies = [q.copy_to_write(p) for q, p in zip(self.quantizers, self.members, strict=True)]
        sums = [q.sums_to_write() for q in self.quantizers]
        if self.sharded:  # the kernel sees this rank's parts, and leaves their sums where all ranks' come together
            self.parts = [q.part(p) for q, p in zip(self.quantizers, self.members, strict=True)]
            sums = [None if s is None else part.take(s).clone() for s, part in zip(sums, self.parts, strict=True)]
        self.copied, self.summed = [c is not None for c in copies], [s is not None for s in sums]
        copies = [None if c is None else form.view(c) for form, c in zip(self.forms, copies, strict=True)]
        self.copies, self.sums = self._or_empty(copies), self._or_empty(sums)
        follow = [(q, p) for q, p in zip(self.quantizers, self.members, strict=True) if q.batches(p)]
        self.batch = ScaleBatch(*zip(*follow, strict=True)) if follow else None  # type: ignore[arg-type]
        self.learning = [(q, p) for q, p in zip(self.quantizers, self.members, strict=True)
                         if q.learned is not None and not q.frozen]  # fmt: skip
        self.contiguous = all(w.is_contiguous() for w in self.viewed(self.members))

    def _or_empty(self, tensors: list[Tensor | None]) -> list[Tensor]:
        """An operator's list: empty where nothing is present, a tensor without elements for one that is absent."""
        if all(t is None for t in tensors):
            return []
        return [torch.empty(0, device=p.device) if t is None else t for t, p in zip(tensors, self.members, strict=True)]

    def totals(self) -> tuple[Tensor, list[Tensor]]:
        """Room for the sums of a recorded step, (n, 6), and each tensor's. Two take turns: the log writes the step
        before when the next one has been recorded."""
        if len(self._totals) < 2:
            shape = len(self.members), contract.NUM_TOTALS
            room = torch.zeros(shape, dtype=torch.float64, device=self.members[0].device)
            self._totals.append((room, list(room.unbind())))
        else:
            self._totals.reverse()
        return self._totals[-1]

    def updated(self, clamped: bool, linked: bool) -> None:
        """Tells the quantizers that the pass has run. ``linked``: nothing else is known of them than after the run
        before."""
        with plainly():
            self.versions[:] = map(version, self.members)
        if not linked or self.learning:
            for i, (q, p) in enumerate(zip(self.quantizers, self.members, strict=True)):
                q.updated(p, self.copied[i], self.summed[i], clamped, self.versions, i)


class Held:
    """A rule's tensors beside a list of parameters, as an operator's launches found them: ``lists`` by key."""

    def __init__(self, states: list[dict[str, Any]], keys: Sequence[str]) -> None:
        self.states = states
        self.lists = {key: [state[key] for state in self.states] for key in keys}
        self.addresses = [list(map(address, tensors)) for tensors in self.lists.values()]

    def stay(self) -> bool:
        """Whether they are in their places still."""
        try:
            return all(
                same(list(map(operator.itemgetter(key), self.states)), tensors)
                and list(map(address, tensors)) == places
                for (key, tensors), places in zip(self.lists.items(), self.addresses, strict=True)
            )
        except KeyError:  # one was taken away
            return False


class Plan:
    """The launches of one group, and what they were made for."""

    def __init__(self, key: tuple, params: list[Tensor], launches: list[Launch]) -> None:
        self.key, self.launches = key, launches
        self.params = launches[0].members if len(launches) == 1 else list(params)
        self.quantizers: list[WeightQuantizer] = [WeightQuantizer.of(p) for p in params]  # type: ignore[misc]
        self.used = False
        self._seen: Any = None
        self.direct = False  # the gradients of this step are of the types and layouts of their parameters
        self.linked = False  # nothing that the quantizers know is of another's making than the last run's

    def note(self) -> None:
        """The launches have run."""
        if self.used and self.linked:  # only weights have moved
            counted, state, _, places = self._seen
            self._seen = counted, state, sum(sum(launch.versions) for launch in self.launches), places
            return
        self.used = True
        self.revisions = [q.revision for q in self.quantizers]
        self.watched = [t for q in self.quantizers for t in q.watched]
        self.types, self.strides = list(map(dtype, self.params)), list(map(strides, self.params))
        settled = all(q.settled(p) for p, q in zip(self.params, self.quantizers, strict=True))
        self._seen = self._look() if settled else None  # a rule may have to look at the weights at every step

    def _look(self) -> Any:
        """What changes with the weights and their quantizers. Versions only grow, so that their sum tells."""
        try:
            with plainly():
                return (Changes.count, sum(map(version, self.watched)), sum(map(version, self.params)),
                        list(map(address, self.params)))  # fmt: skip
        except RuntimeError:  # inference tensors have no version, fake ones no address
            return (object(),)

    def takes(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        """Whether gradients are of the types and layouts of their parameters, which says that they are dense too."""
        try:
            with plainly():
                self.direct = (
                    self._seen is not None and self._seen[0] == Changes.count and same(params, self.params)
                    and list(map(dtype, grads)) == self.types and list(map(strides, grads)) == self.strides
                )  # fmt: skip
        except RuntimeError:  # sparse ones have no strides
            self.direct = False
        return self.direct

    def holds(self, key: tuple, params: list[Tensor]) -> bool:
        """Same tensors, and since the last step only the update pass has touched them."""
        if not (self.used and key == self.key and same(params, self.params)):
            return False
        self.linked = self._look() == self._seen
        return self.linked or all(
            WeightQuantizer.of(p) is q and q.revision == revision and q.settled(p)
            for p, q, revision in zip(params, self.quantizers, self.revisions, strict=True)
        )
