"""Loads the compiled module, reads every environment variable of the package, and chooses the backend.

Environment (read once, at import):

* ``ASKEW_CPU_CAPABILITY`` = baseline | avx2 | avx512: the instruction set of the CPU loops;
* ``ASKEW_BACKEND`` = auto | cpp | triton | reference: the implementation of every operator; ``auto`` takes C++ where
  it was built for the device, then Triton (CUDA only), then the reference.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

from . import reference

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


_operators: dict[str, Callable] = {}


def operator(name: str, like: torch.Tensor) -> Callable:
    """The function that runs operator ``name`` for tensors such as ``like``.

    Usually ``torch.ops.askew.<name>``, which the dispatcher brings to the device's implementation. A forced backend
    is called directly, and float64 (tests, gradcheck) always means the reference.
    """
    if _forced not in (None, "cpp"):
        return getattr(backend_module(_forced), name)  # type: ignore[arg-type]
    if like.dtype == torch.float64:
        return getattr(reference, name)
    found = _operators.get(name)
    if found is None:
        found = _operators[name] = getattr(torch.ops.askew, name).default
    return found


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
