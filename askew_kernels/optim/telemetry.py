"""What the update passes summed up, as rows and as lines of a log that ``python -m askew_kernels analyze`` reads.

The log is JSON lines, one object a line, appended and closed each time, so that a killed run leaves whole lines; what
a full disk cuts off is taken back and said:

========  =============================================================================================================
``kind``  what follows
========  =============================================================================================================
``run``   once for each optimizer: ``version``, ``optimizer``, ``tensors`` (name, numel, grid)
``step``  a recorded step: ``step``, ``loss`` (where ``step(closure)`` gave one), ``tensors``: ``telemetry()``'s rows
``note``  what ``optimizer.log(…)`` was given, with ``step``; ``histograms`` of the weights where it has an ``epoch``
========  =============================================================================================================

A step's line is written when the next one is recorded, so that no step waits for the device.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..annealing import key_in
from ..quant import WeightQuantizer

VERSION = 1
BINS_PER_LEVEL, MOST_BINS = 16, 256
_HEAD = b'{"kind": "run"'


def checked_every(every: Any) -> int:
    """``telemetry_every``, or ValueError."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(f"telemetry_every: expected an int >= 0, got {every!r}")
    return every


@dataclass
class Record:
    """One recorded step: sums and rates as they were, still on the device."""

    step: int = 0
    rates: dict[int, dict[str, Any]] = field(default_factory=dict)  # by index of the group
    totals: list[tuple[list[Tensor], Tensor]] = field(default_factory=list)  # of each launch: (n, 6)
    loss: Any = None

    def keep_rates(self, index: int, group: dict[str, Any]) -> None:
        """Schedules fill tensors in place: the step's own are copied."""
        found = {"lr": group["lr"], "eps": group["constraint_eps"], "alpha": group[key_in(group, "alpha")]}
        self.rates[index] = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}

    def rows(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        report, found = [], dict[Tensor, list[float]]()
        for members, totals in self.totals:
            found.update(zip(members, totals.tolist(), strict=True))
        for name, p, index in _tensors(groups):
            if (sums := found.get(p)) is None or index not in self.rates:
                continue
            t = dict(zip(ops.SkewStats.NAMES, sums, strict=True))
            n = max(1, p.numel())
            report.append({
                "step": self.step, "name": name, "numel": p.numel(),
                **{key: float(value) for key, value in self.rates[index].items()},
                "fraction_infeasible": t["infeasible"] / n, "mean_violation": t["violation"] / n,
                "flips": t["flips"], "velocity_norm": t["velocity_squared"] ** 0.5,
                "grad_velocity": t["grad_velocity"], "nonfinite": t["nonfinite"],
            })  # fmt: skip
        return report


def _tensors(groups: list[dict[str, Any]]) -> list[tuple[Any, Tensor, int]]:
    """(name or place, parameter, index of its group), in order."""
    found: list[tuple[Any, Tensor, int]] = []
    for index, group in enumerate(groups):
        names = group.get("param_names") or range(len(found), len(found) + len(group["params"]))
        found += [(name, p, index) for name, p in zip(names, group["params"], strict=True)]
    return found


@torch.no_grad()
def weight_histogram(p: Tensor) -> dict[str, Any] | None:
    """Counts of w / s over the hull and a level beyond it; None where the scale is not known yet."""
    q = WeightQuantizer.of(p)
    if q is None or p.numel() == 0:
        return None
    levels = q.config.weight.levels
    scale = q.current_scale(p)
    x = (q.form.matrix(p.detach()).float().reshape(scale.numel(), -1) / scale[:, None]).flatten()
    gap = (levels[-1] - levels[0]) / (len(levels) - 1)
    low, high = levels[0] - gap, levels[-1] + gap
    bins = min(MOST_BINS, BINS_PER_LEVEL * (len(levels) + 1))
    counts = torch.histc(x[x.isfinite()].clamp(low, high), bins, low, high)
    return {"levels": list(levels), "low": low, "high": high, "counts": [int(c) for c in counts.tolist()]}


class TelemetryLog:
    """Lines of one optimizer, appended to ``path``, also from several threads.

    A file that is there must be such a log: a run that resumes goes on in it, after its last whole line. Raises OSError
    where it cannot be written, ValueError for a file of another kind, which stays as it is.
    """

    def __init__(self, path: str | os.PathLike, optimizer: str) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            raise TypeError(f"telemetry_log: expected a path, got {path!r}")
        self.path = Path(os.fsdecode(path)).absolute()  # a run may change its directory
        self.optimizer = optimizer
        with self.path.open("ab+" if self.path.is_file() else "ab") as stream:
            if stream.readable():
                self._go_on(stream)
        self.pending: Record | None = None
        self._begun = False
        self._lock = threading.RLock()

    def _go_on(self, stream: Any) -> None:
        stream.seek(0)
        if not (head := stream.read(len(_HEAD))):
            return
        if not _HEAD.startswith(head):
            raise ValueError(f"telemetry_log: {self.path}: is no telemetry log; lines would be appended to it")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            whole = content.rfind(b"\n") + 1
            cut = whole < len(content)
        if cut:  # nothing of a whole file, to which another process may be appending
            stream.truncate(whole)

    def _append(self, groups: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
        if not self._begun:
            tensors = [
                {"name": name, "numel": p.numel(), "grid": (grid := groups[index].get("grid")) and grid.to_dict()}
                for name, p, index in _tensors(groups)
            ]
            head = {"kind": "run", "version": VERSION, "optimizer": self.optimizer, "time": time.time()}
            lines = [{**head, "tensors": tensors}, *lines]
        text = "".join(json.dumps(_plain(line), allow_nan=False) + "\n" for line in lines)
        try:
            self._write(text.encode())
            self._begun = True
        except OSError as problem:  # a training run is worth more than its log
            warnings.warn(f"telemetry_log: {self.path}: {problem.strerror or problem}; the line is lost", stacklevel=4)

    def _write(self, data: bytes) -> None:
        """All of it, or nothing: half a line would take the next one with it."""
        with self.path.open("ab", buffering=0) as stream:
            size = stream.tell() if stream.seekable() else None
            try:
                while data:
                    data = data[stream.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):  # a pipe keeps what it took
                    stream.truncate(size)
                raise

    def recorded(self, record: Record | None, groups: list[dict[str, Any]]) -> None:
        """Keeps the step that was just recorded, and writes the one before."""
        with self._lock:
            before, self.pending = self.pending, record
            if before is not None:
                line: dict[str, Any] = {"kind": "step", "step": before.step}
                if (loss := _number(before.loss)) is not None:
                    line["loss"] = loss
                self._append(groups, [{**line, "tensors": before.rows(groups)}])

    def note(self, step: int, groups: list[dict[str, Any]], numbers: dict[str, Any]) -> None:
        """Raises ValueError for a name that the line itself needs, TypeError for what JSON cannot hold."""
        for name, value in numbers.items():
            if name in ("kind", "histograms"):
                raise ValueError(f"{name}: a line of the log has one of its own; expected another name")
            try:
                json.dumps(_plain(value))
            except (TypeError, ValueError):
                raise TypeError(f"{name}: expected numbers, text, lists or dicts of them, got {value!r}") from None
        line = {"kind": "note", "step": step, **numbers}
        if not isinstance(_plain(line["step"]), int):
            raise TypeError(f"step: expected an int, got {line['step']!r}")
        with self._lock:
            self.recorded(None, groups)
            if "epoch" in numbers:
                quantized = [(name, p) for name, p, index in _tensors(groups) if groups[index].get("grid") is not None]
                line["histograms"] = {str(name): h for name, p in quantized if (h := weight_histogram(p)) is not None}
            self._append(groups, [line])


def _plain(value: Any) -> Any:
    """JSON-ready: tensors and arrays as numbers or lists, numbers that JSON does not know as null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(loss: Any) -> float | None:
    """A loss as closures return it; None for what is no number."""
    if isinstance(loss, Tensor):
        loss = loss.item() if loss.numel() == 1 else None
    return float(loss) if isinstance(loss, (int, float)) else None
