"""The build file that ninja runs: what was made of what by which command."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from setuptools.errors import CompileError


class Ninja:
    """A build.ninja in a folder: objects of commands, one library of them all. What a source includes is found by its
    compiler and kept by ninja, so an object is made anew where that, the source or the command has changed."""

    def __init__(self, folder: Path, sources: Path) -> None:
        self.folder, self.sources = folder, sources
        self.lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            "  command = $line -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $name",
            "rule link",
            "  command = $line",
            "  description = $name",
        ]
        self.objects: list[str] = []

    @staticmethod
    def path(path: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    @staticmethod
    def line(command: list[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    def compile(self, source: Path, command: list[str]) -> None:
        name = source.relative_to(self.sources).as_posix()
        target = name + ".o"
        self.lines += [f"build {self.path(target)}: compile {self.path(source)}", f"  line = {self.line(command)}",
                       f"  name = {name} ({Path(command[0]).name})"]  # fmt: skip
        self.objects.append(target)

    def link(self, target: str, command: list[str], also: list[str], after: list[str]) -> None:
        """``command``, the objects and the files ``also``, then the libraries ``after``."""
        line = [*command, "-o", target, *self.objects, *also, *after]
        inputs = " ".join(map(self.path, [*self.objects, *also]))
        self.lines += [f"build {self.path(target)}: link {inputs}", f"  line = {self.line(line)}", f"  name = {target}"]

    def run(self, ninja: str) -> None:
        """Raises CompileError naming what failed first."""
        self.write(self.folder / "build.ninja", "\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                                                 else os.cpu_count() or 1)  # fmt: skip
        environment = {"NINJA_STATUS": "[%f/%t, %es] ", **os.environ}
        process = subprocess.Popen([ninja, "-C", str(self.folder), "-j", jobs], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, env=environment, errors="replace")  # fmt: skip
        failed = ""
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    if not failed and line.startswith("FAILED: "):
                        failed = line.split()[-1].removesuffix(".o")
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)  # it ends its compilers and deletes what they began
                raise
        if process.returncode:
            raise CompileError(f"compiling {failed} failed" if failed else f"ninja failed ({process.returncode})")

    @staticmethod
    def write(path: Path, text: str) -> None:
        """Not where it says the same already, which would make what is built of it anew."""
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
