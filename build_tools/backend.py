"""The build backend (PEP 517): setuptools', and what else the compiled operators need where it is not at hand.

Build front ends compile in an environment of their own. pip's sees the Python that it installs into; uv's does not, so
torch is looked for around it as well, and asked for as a build requirement where it is nowhere: with the stable ABI the
headers of any torch >= 2.11 give the same library.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # every other hook

MODES = ("auto", "python", "cpu", "full")
MODE = os.environ.get("ASKEW_BUILD") or "auto"
OLDEST_TORCH = (2, 11)
PARENTS = 4  # processes above this one that are asked for their environment: the front end and what started it


def find_compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)


def find_ninja() -> str | None:
    """This Python's own, which may not be on the PATH, before the system's, which may be older."""
    folders = (sysconfig.get_path("scripts"), os.path.dirname(sys.executable), os.environ.get("PATH", ""))
    return shutil.which("ninja", path=os.pathsep.join(folders))


def torch_version(folder: Path) -> tuple[int, ...]:
    """Of the torch package in this folder, which is read and not imported; () where it is none."""
    try:
        found = re.search(r"__version__ *= *['\"](\d+)\.(\d+)", (folder / "version.py").read_text())
    except OSError:
        return ()
    return (int(found[1]), int(found[2])) if found else ()


def find_torch() -> tuple[Path | None, str]:
    """(folder of a torch package whose headers serve, "") or (None, why not)."""
    old = []
    for folder in dict.fromkeys(map(Path, _torch_folders())):
        version = torch_version(folder)
        if version >= OLDEST_TORCH and (folder / "include/torch/csrc/stable/ops.h").is_file():
            return folder, ""
        if version:
            old.append(f"torch {version[0]}.{version[1]} in {folder.parent}")
    oldest = ".".join(map(str, OLDEST_TORCH))
    return None, f"torch >= {oldest} was not found at build time" + (f", only {', '.join(old)}" if old else "")


def _torch_folders() -> Iterator[str]:
    """Where a torch package may be: this environment, the one that pip installs into, those around this process."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        yield from spec.submodule_search_locations
    paths = sysconfig.get_paths()
    for root in (paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()):
        yield os.path.join(root, "torch")
    for prefix in _environments():
        for root in (*prefix.glob("lib/python3*/site-packages"), prefix / "Lib/site-packages"):
            yield os.path.join(root, "torch")


def _environments() -> Iterator[Path]:
    """Environments that may be the one installed into: those on the PATH, and those that the front end's process names
    by variable, by --python or by a .venv in its working folder or one above (Linux)."""
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    for folder in map(Path, os.environ.get("PATH", "").split(os.pathsep)):
        if folder.name in ("bin", "Scripts") and (
            (folder.parent / "pyvenv.cfg").is_file() or (folder.parent / "conda-meta").is_dir()
        ):
            yield folder.parent
    process = os.getppid()
    for _ in range(PARENTS):
        here = Path("/proc") / str(process)
        try:
            variables = dict(v.partition("=")[::2] for v in os.fsdecode((here / "environ").read_bytes()).split("\0"))
            arguments = os.fsdecode((here / "cmdline").read_bytes()).split("\0")
            working = Path(os.readlink(here / "cwd"))
            process = int((here / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return
        for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "UV_PROJECT_ENVIRONMENT"):
            if variables.get(name):
                yield working / variables[name]
        given = [after for before, after in itertools.pairwise(arguments) if before in ("--python", "-p")]
        given += [a.partition("=")[2] for a in arguments if a.startswith("--python=")]
        for python in (*given, variables.get("UV_PYTHON")):
            if python:  # an environment or its interpreter
                yield working / python
                yield (working / python).parent.parent
        for folder in (working, *working.parents):
            if (folder / ".venv/pyvenv.cfg").is_file():
                yield folder / ".venv"
                break
        if process <= 1:
            return


def build_requirements() -> list[str]:
    """What compiling needs and this machine lacks; nothing where it would be in vain or nothing is to be compiled."""
    if MODE == "python" or find_compiler() is None:
        return []
    wanted = [] if find_ninja() else ["ninja>=1.11"]
    if find_torch()[0] is None:
        wanted.append(f"torch>={'.'.join(map(str, OLDEST_TORCH))}")
    return wanted


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *build_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *build_requirements()]
