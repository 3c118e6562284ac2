"""Loads the compiled library, reads the environment that operators obey, and chooses the kernel that runs.

Environment (read once, at import; a value that is none of these is an error):

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
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from . import reference
from . import tuning as tables
from .contract import FEW_ROWS
from .library import FILE, Library, source_digest

BACKENDS = ("cpp", "triton", "reference")
CAPABILITIES = ("baseline", "avx2", "avx512")

_C: Library | None = None
_c_error = ""
try:
    if (_path := Path(__file__).with_name(FILE)).is_file():
        _C = Library(_path)
except (OSError, AttributeError, ValueError, KeyError) as error:
    _c_error = f"{FILE} cannot be loaded: {error}"


def build_report() -> dict:
    """What the build wrote about itself; empty where nothing was built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def why_not_compiled() -> str:
    """One sentence; empty where the C++ operators are loaded."""
    if _C is not None:
        return ""
    return _c_error or build_report().get("reason") or "the package was installed without its compiled library"


def build_command() -> str:
    """The shell command that compiles the C++ operators into this installation."""
    root = Path(__file__).parents[1]
    source = f"-e {root}" if (root / "setup.py").is_file() else "askew_kernels"
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError, KeyError):
        installed = metadata.distribution("askew_kernels")
        if Path(str(installed.locate_file("askew_kernels"))) == Path(__file__).parent:
            origin = json.loads(installed.read_text("direct_url.json") or "{}")  # what pip installed from (PEP 610)
            source = "+".join(filter(None, (origin.get("vcs_info", {}).get("vcs"), origin["url"])))
    installer = f"{sys.executable} -m pip install --force-reinstall --no-cache-dir"
    if importlib.util.find_spec("pip") is None:  # an environment that uv made
        installer = f"uv pip install --python {sys.executable} --reinstall --no-cache"
    return f"ASKEW_BUILD=full {installer} --no-deps {source}"


def _check_sources() -> None:
    """In a checkout: warns where the library was built of other sources, whose operators may take other arguments."""
    root = Path(__file__).parents[1]
    if _C is not None and (root / "setup.py").is_file() and (root / "csrc").is_dir():
        if source_digest(root / "csrc") != _C.sources:
            warnings.warn(
                f"askew_kernels: {FILE} was built of other sources than those in {root / 'csrc'}, so operators may be "
                f"missing or wrong. To mend that: cd {root} && {sys.executable} setup.py build_ext --inplace",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip


_check_sources()


def cpu_capability() -> str:
    """Instruction set of the CPU loops: baseline, avx2, avx512; ``none`` where nothing is compiled."""
    return _C.cpu_capability() if _C is not None else "none"


def force_cpu_capability(name: str) -> None:
    """Use this instruction set from now on. Raises ValueError where it is unknown, not built or not supported."""
    if name not in CAPABILITIES:
        raise ValueError(f"cpu capability: expected {', '.join(CAPABILITIES)}, got {name!r}")
    if _C is None:
        raise ValueError(f"cpu capability: nothing is compiled ({why_not_compiled()})")
    _C.force_cpu_capability(name)
    _tune("cpu")


def has_cuda_kernels() -> bool:
    """Whether the compiled library holds CUDA kernels."""
    return _C is not None and bool(_C.cuda_archs)


def cuda_archs_fit(index: int | None = None) -> bool:
    """Whether the compiled CUDA code runs on GPU ``index`` (None: the current one): an equal major and not newer minor,
    or PTX."""
    if not has_cuda_kernels() or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability(index)
    archs = (arch.split("_") for arch in _C.cuda_archs.split())  # type: ignore[union-attr]
    return any((kind == "compute" or int(number) // 10 == major) and int(number) <= 10 * major + minor
               for kind, number in archs)  # fmt: skip


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


_forced: str | None = None


def set_backend(name: str) -> None:
    """Use this implementation for every operator from now on; ``auto`` gives the choice back."""
    global _forced
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected auto, {', '.join(BACKENDS)}, got {name!r}")
    if name == "cpp" and _C is None:
        raise ValueError(f"backend: cpp is not there ({why_not_compiled()})")
    if name == "triton" and not has_triton():
        raise ValueError("backend: triton is not installed (pip install triton)")
    _forced = None if name == "auto" else name


def asked_for() -> str | None:
    """The backend that ``set_backend`` or ASKEW_BACKEND asks for; None: automatic."""
    return _forced


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


def choose_backend(device: torch.device | str) -> tuple[str, str]:
    """(backend, why) for a device such as "cpu", "cuda" (the current GPU) or "cuda:1"."""
    device = torch.device(device)
    if _forced is not None:
        return _forced, "forced by ASKEW_BACKEND or set_backend"
    if device.type == "cpu":
        return ("reference", why_not_compiled()) if _C is None else ("cpp", f"compiled, {cpu_capability()}")
    if device.type != "cuda":
        return "reference", f"no kernels for {device.type}"
    if cuda_archs_fit(device.index):
        return "cpp", f"compiled for {_C.cuda_archs}"  # type: ignore[union-attr]
    why = f"compiled for {_C.cuda_archs} only" if has_cuda_kernels() else why_no_cuda()  # type: ignore[union-attr]
    return ("triton", why) if has_triton() else ("reference", f"{why}; triton is not installed")


def why_no_cuda() -> str:
    """Why no CUDA kernels were compiled."""
    return why_not_compiled() or build_report().get("cuda_reason") or "built without CUDA"


def slow_because(device: torch.device | str) -> str:
    """Why operators on this device run on the PyTorch reference, and the command that mends it; empty where they do
    not, or where the reference was asked for."""
    backend, why = choose_backend(device)
    if backend != "reference" or _forced is not None:
        return ""
    command = build_command() if torch.device(device).type == "cpu" else f"{sys.executable} -m pip install triton"
    return f"{why}. To mend that: {command}"


_told: set[str] = set()  # device types whose users know that they run on the reference


def _tell_slow(device: torch.device | str) -> None:
    """Warns once, at the first operator that runs on the reference though nobody asked for it."""
    kind = torch.device(device).type
    if kind not in _told and (why := slow_because(device)):
        warnings.warn(
            f"askew_kernels: operators on {kind} run on the PyTorch reference, right but many times slower than "
            f"compiled ones: {why} (ASKEW_BACKEND=reference keeps the reference and says nothing)",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip
        _told.add(kind)  # where the warning is an error, it is one every time


def backend_module(name: str) -> ModuleType:
    """The Python module that implements the operators: ``reference`` or ``triton_kernels``, imported when chosen."""
    return reference if name == "reference" else importlib.import_module("askew_kernels.triton_kernels")


def implementation(backend: str, name: str) -> Callable:
    """Operator ``name`` of a Python backend; the reference's where Triton has none."""
    return getattr(backend_module(backend), name, None) or getattr(reference, name)


def stand_in(device: str, name: str) -> Callable:
    """What serves an operator that was not compiled for a device type: Triton's on a GPU, else the reference's."""
    if device == "cuda" and has_triton():
        return implementation("triton", name)
    _tell_slow(device)
    return implementation("reference", name)


registered: dict[str, Callable] = {}  # torch.ops.askew's; those that compilers meet are here from their definition on
_stand_ins: dict[tuple[int, str | None], str] = {}  # (GPU, forced backend) -> the backend called directly, or ""


def operator(name: str, like: torch.Tensor) -> Callable:
    """The function that runs operator ``name`` for tensors such as ``like``.

    Usually ``torch.ops.askew.<name>``, which the dispatcher brings to the device's implementation; on a GPU that the
    C++ kernels were not compiled for, Triton's. A forced backend is called directly, and float64 (tests, gradcheck)
    always means the reference.
    """
    if _forced is not None and _forced != "cpp":
        return implementation(_forced, name)
    if like.dtype == torch.float64:
        return getattr(reference, name)
    if like.is_cuda and (backend := _gpu_stand_in(like.get_device(), _forced)):
        return implementation(backend, name)
    if name not in registered:
        registered[name] = getattr(torch.ops.askew, name).default
    return registered[name]


def compiled_for(like: torch.Tensor) -> bool:
    """Whether the compiled operators run for tensors such as ``like``: built for its device, nothing else forced."""
    if _C is None or _forced not in (None, "cpp") or like.dtype == torch.float64:
        return False
    return like.is_cpu or (like.is_cuda and has_cuda_kernels() and not _gpu_stand_in(like.get_device(), _forced))


def _gpu_stand_in(index: int, forced: str | None) -> str:
    """The backend for GPU ``index``, which is asked once, where torch.ops would run code for other architectures."""
    found = _stand_ins.get((index, forced))
    if found is None:
        device = torch.device("cuda", index)
        backend, _ = choose_backend(device)
        if backend == "cpp" and not _cuda_tuned:
            _tune("cuda")
        if backend == "reference":
            _tell_slow(device)
        found = _stand_ins[index, forced] = backend if backend != "cpp" and has_cuda_kernels() else ""
    return found


# What torch.compiler.assume_constant_result sets, which would import the compiler: torch.compile calls the function
# while it traces, instead of looking into it.
_gpu_stand_in._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exporting() -> bool:
    """``torch.compiler.is_exporting()``, which graphs of torch 2.11's torch.compile take to be true in all of them."""
    return torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting()


_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


# ---- products from packed codes --------------------------------------------------------------------------------------

FEW_ON_GPU = 64  # rows of x up to which a GPU reads the codes; beyond, unpacking is small beside the product
# the same where the matrix units read tiles: 40 us for each 64 rows of 8192 x 8192 weights of 4 bits (H200), against
# about 60 us of unpacking and 11 us, at least 36, of the library's product
MOST_FROM_TILES = 128
_TRITON = has_triton()  # a constant for torch.compile, which does not look into the cache of has_triton


def reads_tiles(x: torch.Tensor) -> bool:
    """Whether products with ``x`` can be made by ``packed_tiles_linear`` now: bfloat16 or float16 on a GPU that the C++
    kernels were compiled for; not while something is traced, whose graph would hold the tiles."""
    if not x.is_cuda or torch.compiler.is_compiling() or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if _forced not in (None, "cpp") or not has_cuda_kernels() or torch._C._len_torch_dispatch_stack():
        return False
    return not _gpu_stand_in(x.get_device(), _forced)


def reads_codes(x: torch.Tensor, rows: int, tiles: bool = False) -> bool:
    """Whether a product of ``rows`` rows such as ``x`` is made from packed codes: on a CPU always, on a GPU where the
    rows are few: ``MOST_FROM_TILES`` where there are ``tiles``, else ``FEW_ON_GPU`` with Triton and
    ``contract.FEW_ROWS`` with C++ alone. Elsewhere the weight is unpacked for torch's own product."""
    if x.is_cpu or not x.is_cuda or x.dtype == torch.float64:
        return x.is_cpu
    if exporting() and not isinstance(rows, int):
        return False  # a choice by size would be a bound on what was exported
    if tiles:
        return rows <= MOST_FROM_TILES
    return rows <= FEW_ON_GPU if _TRITON else rows <= FEW_ROWS and has_cuda_kernels()


def convolves_from_codes(positions: int, activations: str, weights: int = 0, points: bool = False) -> bool:
    """Whether a CPU makes a convolution of this many output positions from packed codes, patch by patch: where they are
    few (the launch parameter ``positions``, for that many ``weights`` ``large_positions``: late layers and small
    batches; ``points`` where patches are pixels in channels last, 1 x 1, so that nothing is laid out), and with
    activations="int8" always. Exported, a choice by size would be a bound: points always."""
    if activations == "int8" or exporting():
        return activations == "int8" or points
    few = "points" if points else "large_positions" if weights >= tables.LARGE else "positions"
    return positions < _convolution[few]


def packed_product(x: torch.Tensor, activations: str) -> tuple[str, Callable]:
    """(name, function) of the operator that multiplies ``x`` (rows, cols) by packed codes on its device.

    That of rounded activations where they are asked for and there is such a kernel, on a CPU; on a GPU with
    more than ``contract.FEW_ROWS`` rows Triton's ``packed_linear``, which has the matrix units, unless one is forced.
    """
    rounded = activations != "float" and not x.is_cuda
    name = f"packed_linear_{activations}" if rounded else "packed_linear"
    if x.is_cuda and _forced is None and not torch.compiler.is_compiling() and len(x) > FEW_ROWS:
        if not torch._C._len_torch_dispatch_stack():  # which sees operators only
            return name, implementation("triton", name)
    return name, operator(name, x)


# ---- launch parameters -----------------------------------------------------------------------------------------------

built_in_tuning = tables.built_in
if _C is not None:
    _compiled = _C.tuning()
    built_in_tuning |= {s: {name: _compiled[name] for name in tables.PARAMETERS[s]} for s in tables.COMPILED}
_convolution = dict(built_in_tuning["cpu_convolution"])  # as it serves this CPU
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
    if torch.device(device).type == "cuda":
        return tables.gpu(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tables.Device("cpu", cpu_name(), cpu_capability(), cores)


def tuning_table(device: torch.device | str = "cpu") -> tuple[tables.Table | None, str]:
    """(the table that serves a device, None for the built-in values; why)."""
    return tables.serving(tuning_device(device))


def tuning(section: str, device: torch.device | str = "cpu") -> dict[str, int]:
    """The launch parameters of a section (``tuning.PARAMETERS``) on a device; empty where there is no such kernel."""
    return tables.values(section, tuning_device(device))


def _tune(device: str) -> None:
    """Hands the values for a type of devices to whom they concern; on several GPUs those of the current one count."""
    global _cuda_tuned
    if device == "cuda":
        _cuda_tuned = True
    else:
        _convolution.update(tuning("cpu_convolution"))
    for section in tables.SECTIONS[device] if _C is not None else ():
        if section in tables.COMPILED:
            _C.set_tuning(tuning(section, device))  # type: ignore[union-attr]


def use_tuning(source: str | os.PathLike | Mapping[str, Mapping[str, int]] = "auto") -> None:
    """Use these launch parameters from now on: ``"auto"`` (the package's table for each device), ``"default"`` (the
    built-in values), a JSON file made by ``bench tune``, or ``{"cpu": {"prefetch_columns": 1024}}``. What is not named
    keeps its built-in value. To be called while no operator runs. Raises ValueError before anything changes.
    """
    if isinstance(source, Mapping):
        _give_tuning(tables.Table("given values", None, tables.check_values(source, "tuning")))
    elif source in ("auto", "default"):
        _give_tuning(None if source == "auto" else tables.Table("built-in values", None, {}))
    else:
        _give_tuning(tables.read_table(Path(source)))


def _give_tuning(table: tables.Table | None) -> None:
    global _cuda_tuned
    tables.use(table)
    _cuda_tuned = False
    _stand_ins.clear()  # the next operator on a GPU hands them over
    _tune("cpu")


@contextlib.contextmanager
def kept_tuning() -> Iterator[None]:
    """Whatever ``use_tuning`` does inside is undone at the end."""
    before = tables.by_hand
    try:
        yield
    finally:
        _give_tuning(before)


def _read_environment() -> None:
    """Raises ValueError that names the variable and what it may be."""
    variable = ""
    try:
        if capability := os.environ.get(variable := "ASKEW_CPU_CAPABILITY"):
            if _C is not None or capability not in CAPABILITIES:
                force_cpu_capability(capability)
        if backend := os.environ.get(variable := "ASKEW_BACKEND"):
            set_backend(backend)
        if (source := os.environ.get(variable := "ASKEW_TUNING", "")) not in ("", "auto", "default"):
            if not os.path.exists(source):
                raise ValueError(f"expected auto, default or a JSON file, got {source!r}, which is no file")
        use_tuning(source or "auto")
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from None


try:
    _read_environment()
except ValueError as _error:
    # python -m askew_kernels: no traceback
    if sys.argv[:1] == ["-m"] and ("-m", "askew_kernels") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False):
        print(f"askew_kernels: {_error}", file=sys.stderr)
        sys.exit(2)
    raise
