"""Which cases are run, and in which process: a Choice becomes rows, with the allocator that is asked for."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from ..command import Failed
from .harness import Context, Entry, first_line, run_case
from .rows import PACKAGE, Row, environment
from .suites import SUITES

# glibc keeps freed memory: fresh outputs cause no page faults (docs/notes.md)
WARM_TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=20000000000"


@dataclass(frozen=True)
class Choice:
    """Which entries of a suite; op: part of their operation's name; part: (i, n), the i-th of n parts of them."""

    suite: str
    quick: bool = False
    only_warm: bool = False
    op: str = ""
    part: tuple[int, int] = (1, 1)

    def entries(self, device: torch.device) -> list[Entry]:
        fitting = [e for e in SUITES[self.suite] if device.type in e.devices and (e.quick or not self.quick)]
        fitting = [e for e in fitting if self.op in e.op and (e.warm or not self.only_warm)]
        i, n = self.part
        return fitting[len(fitting) * (i - 1) // n : len(fitting) * i // n]


def run_entries(
    suite: str,
    entries: Sequence[Entry],
    device: torch.device,
    quick: bool = False,
    tick: Callable[[str], None] = lambda name: None,
) -> Iterator[Row]:
    """The rows of these entries, as they come, with this process' allocator."""
    context = Context(device, quick, environment(device, quick))
    for entry in entries:
        tick(entry.op)
        torch.manual_seed(0)
        try:
            yield from run_case(suite, entry, context, lambda name, op=entry.op: tick(f"{op}: {name}" if name else ""))  # type: ignore[misc]
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise Failed(f"{suite}, {entry.op}: not enough memory ({first_line(error)})") from None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_entries_warm(choice: Choice, device: torch.device, tick: Callable[[str], None]) -> Iterator[Row]:
    """The rows of these entries in a child process whose glibc keeps freed memory."""
    if platform.libc_ver()[0] != "glibc":
        raise Failed("--allocator warm: needs glibc, which reads GLIBC_TUNABLES")
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), WARM_TUNABLES)))
    command = [sys.executable, "-m", "askew_kernels.bench", device.type, json.dumps(asdict(choice))]
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "GLIBC_TUNABLES": tunables, "PYTHONPATH": path},
    )  # fmt: skip
    assert child.stdout is not None and child.stderr is not None
    with contextlib.closing(child.stdout), contextlib.closing(child.stderr):
        try:
            errors: list[str] = []
            drain = threading.Thread(target=lambda: errors.extend(child.stderr), daemon=True)  # type: ignore[arg-type]
            drain.start()
            for line in child.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # something a library printed
                if "row" in message:
                    yield Row(**message["row"])
                else:
                    tick(message["tick"])
            code = child.wait()
            drain.join(5)
        finally:  # before its pipes are closed, which would wait for the thread that reads them
            if child.poll() is None:
                child.kill()
                child.wait()
    if code:
        last = errors[-1].strip() if errors else f"exit code {code}"
        raise Failed(f"{choice.suite} with the warm allocator: {last}")


def child_main(arguments: list[str]) -> int:
    """Entry point of the child process: rows and ticks as JSON lines on stdout."""
    device = torch.device(arguments[0])
    choice = Choice(**json.loads(arguments[1]))

    def send(message: dict) -> None:
        print(json.dumps(message), flush=True)

    try:
        rows = run_entries(choice.suite, choice.entries(device), device, choice.quick, lambda t: send({"tick": t}))
        for row in rows:
            send({"row": asdict(row)})
    except KeyboardInterrupt:
        return 130
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    return 0
