"""Which cases are run, and in which process: a Choice becomes rows, with the allocator that is asked for."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..command import Failed
from .harness import Context, Entry, first_line, run_case
from .rows import PACKAGE, Row, allocator_in_use
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
    allocator: str = "default"

    def entries(self, device: torch.device) -> list[Entry]:
        fitting = [e for e in SUITES[self.suite] if device.type in e.devices and self.op in e.op]
        fitting = [e for e in fitting if (e.quick or not self.quick) and (e.warm or not self.only_warm)]
        i, n = self.part
        return fitting[len(fitting) * (i - 1) // n : len(fitting) * i // n]


Tick = Callable[[str], None]  # told what is run now


def run(choice: Choice, device: torch.device, tick: Tick) -> Iterator[Row]:
    """The rows of these entries, as they come."""
    return (run_entries if choice.allocator == allocator_in_use() else run_entries_warm)(choice, device, tick)


@contextlib.contextmanager
def stay_float_untold() -> Iterator[None]:
    """The networks of a suite are its own, and so is what of them stays float: no line for each of its models."""
    logger, others = logging.getLogger("askew_kernels"), lambda record: "stay float" not in record.getMessage()
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def run_entries(choice: Choice, device: torch.device, tick: Tick) -> Iterator[Row]:
    """With this process' allocator."""
    context = Context(device, choice.quick)
    for entry in choice.entries(device):
        tick(entry.op)
        torch.manual_seed(0)
        told = lambda name, op=entry.op: tick(f"{op}: {name}" if name else "")  # noqa: E731
        try:
            with stay_float_untold():
                yield from run_case(choice.suite, entry, context, told)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise Failed(f"{choice.suite}, {entry.op}: not enough memory ({first_line(error)})") from None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_entries_warm(choice: Choice, device: torch.device, tick: Tick) -> Iterator[Row]:
    """In a child process whose glibc keeps freed memory."""
    if platform.libc_ver()[0] != "glibc":
        raise Failed("--allocator warm: needs glibc, which reads GLIBC_TUNABLES")
    program = f"import sys; from {__name__} import child_main; sys.exit(child_main(*sys.argv[1:]))"
    command = [sys.executable, "-c", program, device.type, json.dumps(asdict(choice))]
    variables = {
        "GLIBC_TUNABLES": ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), WARM_TUNABLES))),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH")))),
    }
    with tempfile.TemporaryFile("w+") as errors:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, env={**os.environ, **variables}, **pipes) as child:
            try:
                for line in child.stdout or ():
                    try:
                        message = json.loads(line)
                    except ValueError:
                        continue  # something a library printed
                    if "row" in message:
                        yield Row(**message["row"])
                    else:
                        tick(message["tick"])
            except BaseException:
                child.kill()  # leaving waits for it
                raise
        if child.returncode:
            errors.seek(0)
            last = [f"exit code {child.returncode}", *errors.read().strip().splitlines()][-1]
            raise Failed(f"{choice.suite} with the warm allocator: {last}")


def child_main(device: str, text: str) -> int:
    """The child process: rows and ticks as JSON lines on stdout."""

    def send(message: dict) -> None:
        print(json.dumps(message), flush=True)

    try:
        for row in run_entries(Choice(**json.loads(text)), torch.device(device), lambda name: send({"tick": name})):
            send({"row": asdict(row)})
    except KeyboardInterrupt:
        return 130
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    return 0
