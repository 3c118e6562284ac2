"""Builds ``askew_kernels._C``: CPU loops for three instruction sets, CUDA kernels where nvcc is found, one module.

The build needs torch's *headers and libraries*, not a torch that imports: with the stable ABI one build serves every
torch from 2.11 on. They are looked for in the environment that pip installs into, also from inside pip's isolated
build environment. Whatever is missing, the package still installs: without a compiler or torch it runs on Triton and
the PyTorch reference, and ``python -m askew_kernels info`` says what was built and why not the rest.

Environment: ``ASKEW_BUILD`` = auto (default) | python (compile nothing) | cpu (no CUDA) | full (an error instead of
a fallback); ``TORCH_CUDA_ARCH_LIST`` as in torch, e.g. "9.0" or "8.0;9.0+PTX"; ``CXX``, ``CUDA_HOME``, ``MAX_JOBS``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
MODES = ("auto", "python", "cpu", "full")
MODE = os.environ.get("ASKEW_BUILD") or "auto"
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that is served

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-function"]
# Contraction off and no errno/traps: every instruction set gives the same bits, and loops vectorise.
LOOP_FLAGS = [
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
ISA_FLAGS = {  # csrc/cpu/isa: a stub for each instruction set, the slowest to compile first
    "baseline": [],
    "avx512": AVX512_FLAGS,
    "avx2": ["-mavx2", "-mfma"],
    "avx512_vnni": [*AVX512_FLAGS, "-mavx512vnni"],
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16"],
}
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static",
              "-Xfatbin", "-compress-all"]  # fmt: skip  # a quarter of the size, unpacked when a kernel is first called


def find_torch() -> Path | None:
    """Folder of the torch package, found without importing it (pip's isolation hides it from import)."""
    candidates = []
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        candidates += list(spec.submodule_search_locations)
    roots = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *site.getsitepackages()]
    candidates += [os.path.join(root, "torch") for root in [*roots, site.getusersitepackages()]]
    for folder in map(Path, candidates):
        if (folder / "include/torch/csrc/stable/ops.h").is_file():
            return folder
    return None


def cuda_home() -> Path | None:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")):
        if (Path(home) / "bin/nvcc").is_file():
            return Path(home)
    return Path(nvcc).resolve().parent.parent if nvcc else None


def arch_flags(nvcc: str) -> tuple[list[str], str]:
    """-gencode flags, and the architectures as text, keeping to what this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
    flags, names = [], []
    for arch in filter(None, wanted):
        number = re.sub(r"\D", "", arch.split("+")[0])
        if number not in known:
            continue
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        names.append(f"sm_{number}")
        last = number
    if not flags:
        raise CompileError(f"TORCH_CUDA_ARCH_LIST={wanted}: this nvcc knows only {sorted(known, key=int)}")
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") or any("PTX" in a for a in wanted):
        flags += ["-gencode", f"arch=compute_{last},code=compute_{last}"]
        names.append(f"compute_{last}")
    return flags, " ".join(names)


class BuildExt(build_ext):
    def run(self) -> None:
        self.report: dict = {"cpu": False, "cuda": False, "reason": "", "cuda_reason": ""}
        try:
            super().run()
        finally:
            self.write_report()

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile_all(ext)
        except CompileError as error:
            self.report.update(cpu=False, cuda=False, reason=str(error))
            if MODE == "full":
                raise
            print(f"askew_kernels: no compiled operators ({error}); Triton and the PyTorch reference serve instead.",
                  file=sys.stderr)  # fmt: skip

    def compile_all(self, ext: Extension) -> None:
        if MODE == "python":
            raise CompileError("ASKEW_BUILD=python")
        torch = find_torch()
        if torch is None:
            raise CompileError(
                "torch was not found at build time: install torch >= 2.11 first, then this package again"
            )
        cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
        if cxx is None:
            raise CompileError("no C++ compiler was found: install g++ or clang++, or set CXX")
        import pybind11

        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        # pybind11's own headers first: the copy that some torch carries refuses to be included beside the stable ABI
        include = [f"-I{CSRC}", f"-isystem{pybind11.get_include()}", f"-isystem{torch / 'include'}",
                   f"-isystem{sysconfig.get_paths()['include']}"]  # fmt: skip
        headers = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".inl", ".cuh")] + [Path(__file__)]
        newest = max(p.stat().st_mtime for p in headers)

        def compile_one(job: tuple[Path, list[str]]) -> str:
            source, command = job
            target = temp / f"{source.parent.name}_{source.name}.o"
            line = [*command, "-c", str(source), "-o", str(target)]
            stamp = target.with_suffix(".cmd")
            fresh = target.is_file() and stamp.is_file() and stamp.read_text() == repr(line)
            if not (fresh and target.stat().st_mtime > max(newest, source.stat().st_mtime)):
                done = subprocess.run(line, capture_output=True, text=True)
                if done.returncode:
                    print(done.stdout + done.stderr, file=sys.stderr)
                    raise CompileError(f"{Path(command[0]).name} failed on {source.relative_to(ROOT)}")
                if self.verbose > 1 and done.stderr:
                    print(done.stderr, file=sys.stderr)
                stamp.write_text(repr(line))
            return str(target)

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        base = [cxx, *CXX_FLAGS, *include, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        x86 = platform.machine().lower() in ("x86_64", "amd64")

        def loops_command(isa: str) -> list[str]:
            return [*base, *LOOP_FLAGS, *(ISA_FLAGS[isa] if x86 else [])]

        cpu_jobs = [(CSRC / f"cpu/isa/{isa}.cpp", loops_command(isa)) for isa in ISA_FLAGS]
        cpu_jobs += [(source, base) for source in sorted((CSRC / "cpu").glob("*.cpp"))]
        with ThreadPoolExecutor(jobs) as pool:
            cuda_objects, archs, version, cuda_libs = self.compile_cuda(pool, compile_one, base)
            cpu_objects = list(pool.map(compile_one, cpu_jobs))
            bindings = [*base, f'-DASKEW_CUDA_ARCHS="{archs}"', f'-DASKEW_CUDA_VERSION="{version}"']
            objects = [*cpu_objects, *cuda_objects(), compile_one((CSRC / "bindings.cpp", bindings))]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # no-as-needed -ltorch: on a CUDA torch it brings in the libraries that define the CUDA shims
        link = [cxx, "-shared", *objects, "-o", str(target), f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch",
                "-Wl,--as-needed", "-ltorch_cpu", "-lc10", *cuda_libs]  # fmt: skip
        done = subprocess.run(link, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise CompileError("linking askew_kernels._C failed")
        self.report.update(cpu=True, cuda=bool(archs), torch_target="2.11", compiler=cxx)

    def compile_cuda(self, pool, compile_one, base):
        """(function that waits for the objects, architectures, nvcc version, libraries); empty without CUDA."""
        nothing = ((lambda: []), "", "", [])
        home = cuda_home()
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        if MODE == "cpu" or home is None or not sources:
            self.report["cuda_reason"] = "ASKEW_BUILD=cpu" if MODE == "cpu" else "nvcc was not found"
            return nothing
        nvcc = str(home / "bin/nvcc")
        try:
            flags, archs = arch_flags(nvcc)
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            version = re.search(r"release ([\d.]+)", text).group(1)
            jobs = [(s, [nvcc, *NVCC_FLAGS, *flags, f"-I{CSRC}"]) for s in sources]
            cuda_include = ["-isystem" + str(home / "include"), "-DUSE_CUDA"]
            jobs += [(s, [*base, *cuda_include]) for s in sorted((CSRC / "cuda").glob("*.cpp"))]
            # compiled now, so that a failure can still leave a CPU build
            objects = list(pool.map(compile_one, jobs))
        except (CompileError, OSError, subprocess.CalledProcessError, AttributeError) as error:
            if MODE == "full":
                raise
            self.report["cuda_reason"] = f"nvcc: {error}"
            print(f"askew_kernels: built without CUDA ({error})", file=sys.stderr)
            return nothing
        lib = next(
            home / d
            for d in ("lib64", "lib", "targets/x86_64-linux/lib")
            if (home / d / "libcudart_static.a").is_file()
        )
        return (lambda: objects), archs, version, [f"-L{lib}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]

    def write_report(self) -> None:
        folders = [Path(self.build_lib) / "askew_kernels"]
        if self.inplace or self.editable_mode:
            folders.append(ROOT / "askew_kernels")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build.json").write_text(json.dumps(self.report, indent=1) + "\n")


class WithoutMetadata(Distribution):
    """For ``build_ext --inplace``, which needs none of it, with a setuptools too old to read our pyproject.toml."""

    def parse_config_files(self, filenames=None, ignore_option_errors=False):
        pass


if MODE not in MODES:
    print(f"askew_kernels: ASKEW_BUILD: expected {', '.join(MODES)}, got {MODE!r}", file=sys.stderr)
    sys.exit(2)
old = int(setuptools.__version__.partition(".")[0]) < 77
if old and "build_ext" not in sys.argv:
    sys.exit(f"askew_kernels: to build it takes setuptools >= 77, found {setuptools.__version__}: upgrade setuptools, "
             "or let pip bring its own by leaving --no-build-isolation out")  # fmt: skip
setup(
    ext_modules=[Extension("askew_kernels._C", sources=[], optional=MODE != "full")],
    cmdclass={"build_ext": BuildExt},
    distclass=WithoutMetadata if old else Distribution,
)
