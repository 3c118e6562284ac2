"""Processes that stay, to try what is distributed: one start serves many calls, each with a process group of its own.

A function that raises on one rank ends the group of its call on all of them, so that the others do not wait for it.
"""

from __future__ import annotations

import datetime
import importlib
import io
import itertools
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PATIENCE = datetime.timedelta(minutes=10)  # of a rank for the others; machines are shared


class RankError(RuntimeError):
    """A rank's traceback."""


def _serve(rank: int, pipe: Any, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(rank)
    while (order := pipe.recv()) is not None:
        module, name, args, world, number = order
        try:
            distributed.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=world,
                                           timeout=PATIENCE)  # fmt: skip
            try:
                found = getattr(importlib.import_module(module), name)(rank, world, *args)
                distributed.barrier()
            finally:
                distributed.destroy_process_group()
            kept = io.BytesIO()
            torch.save(found, kept)
            pipe.send((kept.getvalue(), ""))
        except BaseException:
            pipe.send((b"", traceback.format_exc()))


class Ranks:
    """``most`` processes. Use it as a context, or ``close`` it."""

    def __init__(self, most: int = 4) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes, self.numbers = [], [], itertools.count()
        for rank in range(most):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there, self.folder.name), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
        """``function(rank, world, *args)`` of every rank. The function stands at the top of a module. Raises RankError
        with the first traceback that is not of a lost connection."""
        order = function.__module__, function.__name__, args, world, next(self.numbers)
        for pipe in self.pipes[:world]:
            pipe.send(order)
        answers = [pipe.recv() for pipe in self.pipes[:world]]
        if wrong := [text for _, text in answers if text]:
            raise RankError(min(wrong, key=lambda text: "onnection" in text))
        return [torch.load(io.BytesIO(kept), weights_only=False) for kept, _ in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(1)  # threads of finished checkpoints may keep one
            process.terminate()
            process.join()
        self.folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def memory_of(pid: int, path: Path) -> dict[str, int]:
    """Bytes of a process's mappings of a file, by the names of Linux' smaps: Rss, Pss, Shared_Clean, Private_Dirty …"""
    sums: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key and " " in key:
            inside = line.endswith(str(path))
        elif inside and rest.endswith(" kB"):
            sums[key] = sums.get(key, 0) + int(rest.split()[0]) * 1024
    return sums
