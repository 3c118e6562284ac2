"""Loads the compiled module, reads every environment variable of the package, and chooses the backend.

Environment (read once, at import):

* ``ASKEW_CPU_CAPABILITY`` = baseline | avx2 | avx512: the instruction set of the CPU loops;
* ``ASKEW_BACKEND`` = auto | cpp | triton | reference: the implementation of every operator; ``auto`` takes C++ where
  it was built for the device, then Triton (CUDA only), then the reference;
* ``ASKEW_TUNING`` = auto | default | FILE.json: the launch parameters; ``auto`` takes the table that the package holds
  for the device, else the built-in ones, ``default`` the built-in ones whatever the device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch

from . import reference
from . import tuning as tables

BACKENDS = ("cpp", "triton", "reference")

_C: ModuleType | None = None
_c_error = ""
try:
    _C = importlib.import_module("askew_kernels._C")
except ImportError as error:
    _c_error = str(error)


def build_report() -> dict:
    """What the build wrote about itself; empty where nothing was built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def why_not_compiled() -> str:
    """One sentence; empty where the C++ operators are loaded."""
    if _C is not None:
        return ""
    return build_report().get("reason") or _c_error or "the package was installed without its compiled module"


def cpu_capability() -> str:
    """Instruction set of the CPU loops: baseline, avx2, avx512; ``none`` where nothing is compiled."""
    return _C.cpu_capability() if _C is not None else "none"


def force_cpu_capability(name: str) -> None:
    """Use this instruction set from now on. Raises ValueError where it is unknown, not built or not supported."""
    if _C is None:
        raise ValueError(f"cpu capability: nothing is compiled ({why_not_compiled()})")
    _C.force_cpu_capability(name)
    _tune("cpu")


def has_cuda_kernels() -> bool:
    """Whether the C++ module holds CUDA kernels."""
    return _C is not None and bool(_C.cuda_archs)


def _cuda_archs_fit() -> bool:
    """Whether the compiled CUDA code runs on the present device: an equal major and not newer minor, or PTX."""
    if not has_cuda_kernels() or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability()
    for arch in _C.cuda_archs.split():  # type: ignore[union-attr]
        kind, number = arch.split("_")
        if kind == "compute" and int(number) <= 10 * major + minor:
            return True
        if kind == "sm" and int(number) // 10 == major and int(number) % 10 <= minor:
            return True
    return False


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


_forced: str | None = None


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected auto, {', '.join(BACKENDS)}, got {name!r}")
    if name == "cpp" and _C is None:
        raise ValueError(f"backend: cpp is not there ({why_not_compiled()})")
    if name == "triton" and not has_triton():
        raise ValueError("backend: triton is not installed (pip install triton)")


def set_backend(name: str) -> None:
    """Use this implementation for every operator from now on; ``auto`` gives the choice back."""
    global _forced
    if name != "auto":
        _check_backend(name)
    _forced = None if name == "auto" else name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """``with use_backend("reference"): …``"""
    global _forced
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        _forced = before


def choose_backend(device_type: str) -> tuple[str, str]:
    """(backend, why) for a device type such as "cpu" or "cuda"."""
    if _forced is not None:
        return _forced, "forced by ASKEW_BACKEND or set_backend"
    if device_type == "cpu":
        if _C is not None:
            return "cpp", f"compiled, {cpu_capability()}"
        return "reference", why_not_compiled()
    if device_type == "cuda":
        if _cuda_archs_fit():
            return "cpp", f"compiled for {_C.cuda_archs}"  # type: ignore[union-attr]
        why = f"compiled for {_C.cuda_archs} only" if has_cuda_kernels() else _why_no_cuda()  # type: ignore[union-attr]
        return ("triton", why) if has_triton() else ("reference", f"{why}; triton is not installed")
    return "reference", f"no kernels for {device_type}"


def _why_no_cuda() -> str:
    return why_not_compiled() or build_report().get("cuda_reason") or "built without CUDA"


def backend_module(name: str) -> ModuleType:
    """The Python module that implements the operators: ``reference`` or ``triton_kernels``."""
    return reference if name == "reference" else importlib.import_module("askew_kernels.triton_kernels")


def implementation(backend: str, name: str) -> Callable:
    """Operator ``name`` of a Python backend; the reference's where Triton has none."""
    return getattr(backend_module(backend), name, None) or getattr(reference, name)


_operators: dict[str, Callable] = {}


def operator(name: str, like: torch.Tensor) -> Callable:
    """The function that runs operator ``name`` for tensors such as ``like``.

    Usually ``torch.ops.askew.<name>``, which the dispatcher brings to the device's implementation. A forced backend
    is called directly, and float64 (tests, gradcheck) always means the reference.
    """
    if _forced is not None and _forced != "cpp":
        return implementation(_forced, name)
    if like.dtype == torch.float64:
        return getattr(reference, name)
    if not _cuda_tuned and like.is_cuda and not torch.compiler.is_compiling():
        _tune("cuda")
    found = _operators.get(name)
    if found is None:
        found = _operators[name] = getattr(torch.ops.askew, name).default
    return found


# ---- launch parameters -----------------------------------------------------------------------------------------------

built_in_tuning: tables.Values = {"triton": tables.TRITON, "triton_packed": tables.TRITON_PACKED}
if _C is not None:
    _compiled = _C.tuning()
    built_in_tuning |= {s: {name: _compiled[name] for name in tables.PARAMETERS[s]} for s in ("cpu", "cuda")}
_given: tables.Table | None = None  # chosen by hand: serves every device
_cuda_tuned = False  # whether the C++ CUDA kernels have the values for the GPU; a GPU is not asked at import


@functools.cache
def cpu_name() -> str:
    """As the operating system calls it, e.g. "AMD EPYC 9654 96-Core Processor"."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def tuning_device(device: torch.device | str = "cpu") -> tables.Device:
    """What the table of a device is looked up by."""
    device = torch.device(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return tables.Device("cuda", torch.cuda.get_device_name(device), f"{major}.{minor}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tables.Device("cpu", cpu_name(), cpu_capability(), cores)


_shipped = functools.cache(tables.shipped)


def tuning_table(device: torch.device | str = "cpu") -> tuple[tables.Table | None, str]:
    """(the table that serves a device, None for the built-in values; why)."""
    if _given is not None:
        return _given, "chosen by ASKEW_TUNING or use_tuning"
    return tables.choose(tuning_device(device), _shipped())


def tuning(section: str, device: torch.device | str = "cpu") -> dict[str, int]:
    """The launch parameters of a section (``tuning.PARAMETERS``) on a device; empty where there is no such kernel."""
    table, _ = tuning_table(device)
    values = built_in_tuning.get(section, {})
    return {**values, **(table.parameters.get(section, {}) if table is not None and values else {})}


@functools.cache
def triton_tuning(index: int | None, section: str = "triton") -> dict[str, int]:
    """``tuning(section)`` on GPU number ``index``, kept; None: Triton's interpreter."""
    return tuning(section, "cpu" if index is None else torch.device("cuda", index))


def _tune(section: str) -> None:
    """Hands the values to the C++ operators; on several GPUs those of the current one count."""
    global _cuda_tuned
    if section == "cuda":
        _cuda_tuned = True
    if _C is not None:
        _C.set_tuning(tuning(section, section))


def use_tuning(source: str | os.PathLike | Mapping[str, Mapping[str, int]] = "auto") -> None:
    """Use these launch parameters from now on: ``"auto"`` (the package's table for each device), ``"default"`` (the
    built-in values), a JSON file made by ``bench tune``, or ``{"cpu": {"prefetch_columns": 1024}}``. What is not named
    keeps its built-in value. To be called while no operator runs. Raises ValueError before anything changes.
    """
    if isinstance(source, Mapping):
        given: tables.Table | None = tables.Table("given values", None, tables.check_values(source, "tuning"))
    elif source == "auto":
        given = None
    elif source == "default":
        given = tables.Table("built-in values", None, {})
    else:
        given = tables.read_table(Path(source))
    _give_tuning(given)


def _give_tuning(table: tables.Table | None) -> None:
    global _given, _cuda_tuned
    _given, _cuda_tuned = table, False
    triton_tuning.cache_clear()
    _tune("cpu")


@contextlib.contextmanager
def kept_tuning() -> Iterator[None]:
    """Whatever ``use_tuning`` does inside is undone at the end."""
    before = _given
    try:
        yield
    finally:
        _give_tuning(before)


if _capability := os.environ.get("ASKEW_CPU_CAPABILITY"):
    if _C is not None:
        try:
            force_cpu_capability(_capability)
        except ValueError as error:
            raise ValueError(f"ASKEW_CPU_CAPABILITY: {error}") from None
if _backend := os.environ.get("ASKEW_BACKEND"):
    try:
        set_backend(_backend)
    except ValueError as error:
        raise ValueError(f"ASKEW_BACKEND: {error}") from None
if _source := os.environ.get("ASKEW_TUNING"):
    try:
        use_tuning(_source)
    except ValueError as error:
        raise ValueError(f"ASKEW_TUNING: {error}") from None
else:
    use_tuning()
