"""Processes that stay, to try what is distributed: one start serves many calls, each with a process group of its own.

A function that raises on one rank ends the group of its call on all of them, so that the others do not wait for it.
One that does not end in time is told with where each rank stands; the ranks of later calls are then new ones.
"""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import io
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

PATIENCE = datetime.timedelta(minutes=5)  # of a rank for the others, and of a call for its ranks; machines are shared


class RankError(RuntimeError):
    """A rank's traceback, or where a rank stood that did not answer."""


def _stack(folder: str, rank: int) -> Path:
    return Path(folder, f"stack of {rank}")


def _serve(rank: int, pipe: Any, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(rank)
    if sys.platform == "linux":  # no host's name has to be looked up
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    stack = open(_stack(folder, rank), "w")
    faulthandler.register(signal.SIGUSR1, file=stack)
    while (order := pipe.recv()) is not None:
        module, name, args, world, number = order
        try:
            distributed.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=world,
                                           timeout=PATIENCE)  # fmt: skip
            try:
                # What the function made is gone before the group is: a DDP module that outlives its gloo group destroys
                # it with the GIL, for which its threads may wait (torch 2.13: the contexts of works of backward).
                found = getattr(importlib.import_module(module), name)(rank, world, *args)
                distributed.barrier()
            finally:
                distributed.destroy_process_group()
                # DTensor remembers placements with their mesh, and takes a later mesh of that shape for the same: what
                # it gave then names a group that is gone.
                _clear_sharding_prop_cache()
            kept = io.BytesIO()
            torch.save(found, kept)
            pipe.send((kept.getvalue(), ""))
        except BaseException:
            pipe.send((b"", traceback.format_exc()))


class Ranks:
    """``most`` processes. Use it as a context, or ``close`` it. ``within``: how long a call may take, in seconds."""

    def __init__(self, most: int = 4, within: float = PATIENCE.total_seconds()) -> None:
        self.most, self.within, self.numbers = most, within, itertools.count()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(self.most):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there, self.folder.name), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
        """``function(rank, world, *args)`` of every rank. The function stands at the top of a module. Raises RankError
        with the first traceback that is not of a lost connection, or with where the ranks stand that do not answer."""
        if not all(process.is_alive() for process in self.processes):  # killed since, as for want of memory
            self._end()
            self._start()
        order = function.__module__, function.__name__, args, world, next(self.numbers)
        for pipe in self.pipes[:world]:
            pipe.send(order)
        answers: dict[int, tuple[bytes, str]] = {}
        end = time.monotonic() + self.within
        while waiting := {self.pipes[rank]: rank for rank in range(world) if rank not in answers}:
            ready: list[Any] = wait(list(waiting), max(end - time.monotonic(), 0))
            try:
                for pipe in ready:
                    answers[waiting[pipe]] = pipe.recv()
                why = f"no answer in {self.within:g} s" if not ready else ""
            except (EOFError, ConnectionError):
                why = "ended"
            if why:
                told = f"{function.__module__}.{function.__name__}: {why}\n{self._stand(waiting.values())}"
                self._end()
                self._start()
                raise RankError("\n".join([told, *(text for _, text in answers.values() if text)]))
        if wrong := [text for _, text in answers.values() if text]:
            raise RankError(min(wrong, key=lambda text: "onnection" in text))
        return [torch.load(io.BytesIO(answers[rank][0]), weights_only=False) for rank in range(world)]

    def _stand(self, ranks: Any) -> str:
        told = []
        for rank in ranks:
            process, stack = self.processes[rank], _stack(self.folder.name, rank)
            process.join(0.5)  # of one that ended the exit code is known a moment later
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(0.5)
            stood = stack.read_text() if stack.is_file() else ""
            told.append(f"rank {rank}, exit code {process.exitcode}:\n{stood}")
        return "".join(told)

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(1)  # threads of finished checkpoints may keep one
        self._end()

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
