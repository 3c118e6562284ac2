"""What the launches of a step take, kept from step to step while nothing but the update pass touches the tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..quant import WeightQuantizer
from ..quant.forms import ROWS
from ..quant.sharding import is_sharded, local_part, own_rows
from ..quant.state import ScaleBatch


class Launch:
    """Parameters that one call of the operator updates. ``bucket``: what they have in common beside the device."""

    def __init__(self, members: list[Tensor], clamp: bool, bucket: list[Any], levels: Tensor,
                 encoding: list[int]) -> None:  # fmt: skip
        self.members, self.clamp, self.bucket = members, clamp, bucket
        self.quantizers: list[WeightQuantizer] = [WeightQuantizer.of(p) for p in members]  # type: ignore[misc]
        self.levels, self.encodings = [levels] * len(members), encoding * len(members)
        self.sharded = is_sharded(members[0])
        self.forms = [ROWS if q is None else q.form for q in self.quantizers]
        self.as_they_are = not self.sharded and all(form == ROWS for form in self.forms)
        self.steps: list[Tensor] = []  # the rule's counters, and their versions when it last moved them
        self.step_versions: list[int] = []

    def viewed(self, tensors: list[Any]) -> list[Any]:
        """What the kernels take of tensors like the members: this rank's part, the outputs before the inputs."""
        if self.as_they_are:
            return tensors
        return [form.view(local_part(t)) for form, t in zip(self.forms, tensors, strict=True)]

    def prepare(self) -> None:
        """The outputs, and how the next scales come from them."""
        copies = [q.copy_to_write(p) for q, p in zip(self.quantizers, self.members, strict=True)]
        sums = [q.sums_to_write() for q in self.quantizers]
        if self.sharded:  # the kernel sees this rank's parts, and the rows of scales and sums that are theirs
            self.own = [own_rows(p, q.rows(p)) for q, p in zip(self.quantizers, self.members, strict=True)]
            sums = [None if s is None else s[own] for s, own in zip(sums, self.own, strict=True)]
        self.copied, self.summed = [c is not None for c in copies], [s is not None for s in sums]
        copies = [None if c is None else form.view(c) for form, c in zip(self.forms, copies, strict=True)]
        self.copies, self.sums = self._or_empty(copies), self._or_empty(sums)
        together: dict[Any, list[tuple[WeightQuantizer, Tensor]]] = {}
        for q, p in zip(self.quantizers, self.members, strict=True):
            if q.batches(p):
                together.setdefault(q.rule, []).append((q, p))
        self.batches = [ScaleBatch(*zip(*pairs, strict=True)) for pairs in together.values()]  # type: ignore[arg-type]
        self.contiguous = all(w.is_contiguous() for w in self.viewed(self.members))

    def _or_empty(self, tensors: list[Tensor | None]) -> list[Tensor]:
        """An operator's list: empty where nothing is present, a tensor without elements for one that is absent."""
        if all(t is None for t in tensors):
            return []
        return [torch.empty(0, device=p.device) if t is None else t for t, p in zip(tensors, self.members, strict=True)]


class Plan:
    """The launches of one group, and what they were made for."""

    def __init__(self, key: tuple, params: list[Tensor], launches: list[Launch]) -> None:
        self.key, self.params, self.launches = key, params, launches
        self.quantizers: list[WeightQuantizer] = [WeightQuantizer.of(p) for p in params]  # type: ignore[misc]
        self.revisions: list[int] = []
        self.used = False

    def holds(self, key: tuple, params: list[Tensor]) -> bool:
        """Same tensors, and since the last step only the update pass has touched them."""
        same = key == self.key and len(params) == len(self.params) and all(map(operator.is_, params, self.params))
        return same and all(
            WeightQuantizer.of(p) is q and q.revision == revision and q.settled(p)
            for p, q, revision in zip(params, self.quantizers, self.revisions, strict=True)
        )
