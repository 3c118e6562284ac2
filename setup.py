"""Builds the operators' library: CPU loops for several instruction sets, CUDA kernels where nvcc is found, one file.

The build needs torch's *headers and libraries*, not a torch that imports: with the stable ABI one build serves every
torch from 2.11 on, and the library knows no Python, so that one wheel serves every Python. ``build_tools/backend.py``
finds torch, the compiler and ninja, which drives the build: what changed is compiled anew, and nothing else. Whatever
is missing, the package still installs: without a compiler or torch it runs on Triton and the PyTorch reference, and
``python -m askew_kernels info`` says what was built and why not the rest.

Environment: ``ASKEW_BUILD`` = auto (default) | python (compile nothing) | cpu (no CUDA) | full (an error instead of
a fallback); ``TORCH_CUDA_ARCH_LIST`` as in torch, e.g. "9.0" or "8.0;9.0+PTX"; ``CXX``, ``CXXFLAGS``,
``LDFLAGS``, ``CUDA_HOME``, ``MAX_JOBS``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # too old for our pyproject.toml, see below
    bdist_wheel = object

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "build_tools"))
from backend import MODE, MODES, find_compiler, find_ninja, find_torch  # noqa: E402
from ninja_file import Ninja  # noqa: E402

LIBRARY = runpy.run_path(str(ROOT / "askew_kernels/library.py"))
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
SAME_CODE = {"120": "100"}  # nothing in csrc/cuda tells these apart: one PTX serves both, half the time of the second
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
    "avx2_vnni": ["-mavx2", "-mfma", "-mavxvnni"],
}
# What some compilers (before GCC 11, clang 12) and assemblers (before binutils 2.36) do not know, and a line that
# shows it; without its flag a stub is empty.
LATE_FLAGS = {"-mavxvnni": 'void f() { asm("{vex} vpdpbusd %ymm0, %ymm1, %ymm2"); }'}
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static",
              "-Xfatbin", "-compress-all"]  # fmt: skip  # a quarter of the size, unpacked when a kernel is first called
SMALLEST = ["-compress-mode=size"]  # a fifth less again, from nvcc 12.4 on


def stop(message: str, code: int = 2) -> NoReturn:
    print(f"askew_kernels: {message}", file=sys.stderr)
    sys.exit(code)


def say(message: str) -> None:
    """To the error stream, and to a terminal from which the installer's front end keeps that."""
    print(f"askew_kernels: {message}", file=sys.stderr)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                print(f"askew_kernels: {message}", file=terminal)
        except OSError:
            pass


def user_flags(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


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
    flags, numbers = [], []
    for arch in filter(None, wanted):
        number = re.sub(r"\D", "", arch.split("+")[0])
        if number not in known:
            continue
        numbers.append(number)
    if not numbers:
        raise CompileError(f"TORCH_CUDA_ARCH_LIST={wanted}: this nvcc knows only {sorted(known, key=int)}")
    of = {number: SAME_CODE[number] if SAME_CODE.get(number) in numbers else number for number in numbers}
    for number, virtual in of.items():
        flags += ["-gencode", f"arch=compute_{virtual},code=sm_{number}"]
    names = [f"sm_{number}" for number in of]
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") or any("PTX" in a for a in wanted):
        last = of[numbers[-1]]
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

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY["FILE"])  # of no Python in particular

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile_all(ext)
        except CompileError as error:
            self.report.update(cpu=False, cuda=False, reason=str(error))
            Path(self.build_lib, self.get_ext_filename(ext.name)).unlink(missing_ok=True)  # of an earlier build
            if MODE == "full":
                raise
            if MODE != "python":
                say(f"no compiled operators ({error}); Triton and the PyTorch reference, which is slow, serve instead")

    def compile_all(self, ext: Extension) -> None:
        if MODE == "python":
            raise CompileError("ASKEW_BUILD=python")
        torch, why = find_torch()
        if torch is None:
            raise CompileError(f"{why}: install torch >= 2.11 first, then this package again")
        cxx = shlex.split(find_compiler() or "")  # e.g. ccache g++
        if not cxx:
            raise CompileError("no C++ compiler was found: install g++ or clang++, or set CXX")
        ninja = find_ninja()
        if ninja is None:
            stop("ninja was not found, which drives the build: pip install ninja, or leave --no-build-isolation out")
        temp = self.objects_folder()
        temp.mkdir(parents=True, exist_ok=True)
        try:
            archs = self.build(temp, cxx, torch, ninja, cuda=self.find_cuda())
        except KeyboardInterrupt:
            stop(f"interrupted; the objects that were made stay in {temp}", code=130)
        except CompileError as error:
            if MODE == "full" or self.report["cuda_reason"]:
                raise
            archs = self.build(temp, cxx, torch, ninja, cuda=None)  # the objects that were made stay
            self.report["cuda_reason"] = str(error)
            say(f"built without CUDA ({error})")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_suffix(f".{os.getpid()}")
        shutil.copy(temp / target.name, beside)
        beside.replace(target)  # whoever has loaded the old one keeps it
        self.report.update(cpu=True, cuda=bool(archs), torch_target="2.11", compiler=shlex.join(cxx))

    def objects_folder(self) -> Path:
        """Where objects stay from build to build: setuptools gives an editable installation one that it deletes."""
        kept = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        return kept if self.editable_mode else Path(self.build_temp).resolve()

    def find_cuda(self) -> tuple[Path, list[str], str, str] | None:
        """(its folder, flags, architectures, version); None and a reason where it is not to be used."""
        home = cuda_home()
        if MODE == "cpu" or home is None:
            self.report["cuda_reason"] = "ASKEW_BUILD=cpu" if MODE == "cpu" else "nvcc was not found"
            return None
        nvcc = str(home / "bin/nvcc")
        try:
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            version = re.search(r"release (\d+)\.(\d+)", text)
            flags, archs = arch_flags(nvcc)
            flags += SMALLEST if tuple(map(int, version.groups())) >= (12, 4) else []
            return home, flags, archs, ".".join(version.groups())
        except (CompileError, OSError, subprocess.CalledProcessError, AttributeError) as error:
            if MODE == "full":
                raise
            self.report["cuda_reason"] = f"nvcc: {error}"
            say(f"built without CUDA ({error})")
            return None

    def build(self, temp: Path, cxx: list[str], torch: Path, ninja: str, cuda: tuple | None) -> str:
        """Writes the ninja file and runs it; the CUDA architectures in the library."""
        plan = Ninja(temp, CSRC)
        home, gencode, archs, version = cuda or (None, [], "", "")
        base = [
            *cxx,
            *CXX_FLAGS,
            *user_flags("CXXFLAGS"),
            f"-I{CSRC}",
            f"-isystem{torch / 'include'}",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        ]
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        unknown = {flag for flag, line in LATE_FLAGS.items() if x86 and not compiles(cxx, flag, line)}
        libraries = ["-lpthread"]
        if cuda:  # the longest to compile first
            for source in sorted((CSRC / "cuda").glob("*.cu"), key=lambda s: -s.stat().st_size):
                plan.compile(source, [str(home / "bin/nvcc"), *NVCC_FLAGS, *gencode, f"-I{CSRC}"])
            folder = next(home / d for d in ("lib64", "lib", "targets/x86_64-linux/lib")
                          if (home / d / "libcudart_static.a").is_file())  # fmt: skip
            libraries = [f"-L{folder}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        for isa, flags in ISA_FLAGS.items():
            own = [flag for flag in flags if x86 and flag not in unknown]
            plan.compile(CSRC / f"cpu/isa/{isa}.cpp", [*base, *LOOP_FLAGS, *own])
        for source in [*sorted((CSRC / "cpu").glob("*.cpp")), CSRC / "bindings.cpp"]:
            plan.compile(source, base)
        for source in sorted((CSRC / "cuda").glob("*.cpp")) if cuda else ():
            plan.compile(source, [*base, f"-isystem{home / 'include'}", "-DUSE_CUDA"])
        facts = {"compiler": compiler_version(cxx), "torch_target": "2.11", "cuda_archs": archs,
                 "cuda_version": version, "sources": LIBRARY["source_digest"](CSRC)}  # fmt: skip
        function = 'extern "C" __attribute__((visibility("default"))) const char* askew_build_facts()'
        plan.write(temp / "facts.cpp", f"{function} {{ return {json.dumps(json.dumps(facts))}; }}\n")
        plan.write(temp / "exports.map", "{ global: askew_*; local: *; };\n")
        # no-as-needed -ltorch: on a CUDA torch it brings in the libraries that define the CUDA shims
        link = [
            *cxx,
            "-shared",
            *CXX_FLAGS,
            "-Wl,--version-script=exports.map",
            *user_flags("LDFLAGS"),
        ]
        after = [
            f"-L{torch / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-Wl,--as-needed",
            "-ltorch_cpu",
            "-lc10",
            *libraries,
        ]
        plan.link(LIBRARY["FILE"], link, ["facts.cpp"], after)
        plan.run(ninja)
        return archs

    def write_report(self) -> None:
        folders = [Path(self.build_lib) / "askew_kernels"]
        if self.inplace or self.editable_mode:
            folders.append(ROOT / "askew_kernels")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build.json").write_text(json.dumps(self.report, indent=1) + "\n")


def compiles(cxx: list[str], flag: str, line: str) -> bool:
    command = [*cxx, flag, "-x", "c++", "-", "-c", "-o", os.devnull]
    return subprocess.run(command, input=line, text=True, capture_output=True).returncode == 0


def compiler_version(cxx: list[str]) -> str:
    line = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    return line.strip() or shlex.join(cxx)


def index_page() -> str:
    """README.md with the links into the repository made absolute, as a page of a package index needs them."""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "askew_kernels/__init__.py").read_text())[1]
    source = re.search(r'^Source = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]

    def absolute(found: re.Match) -> str:
        picture, text, target = found.groups()
        return f"{picture}[{text}]({source}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return re.sub(r"(!?)\[([^][]*)\]\((?!\w+:|#)([^)\s]+)\)", absolute, (ROOT / "README.md").read_text())


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3: the library knows none."""
        return "py3", "none", "any" if MODE == "python" else super().get_tag()[2]


class WithoutMetadata(Distribution):
    """For ``build_ext --inplace``, which needs none of it, with a setuptools too old to read our pyproject.toml."""

    def parse_config_files(self, filenames=None, ignore_option_errors=False):
        pass


if MODE not in MODES:
    stop(f"ASKEW_BUILD: expected {', '.join(MODES)}, got {MODE!r}")
old = int(setuptools.__version__.partition(".")[0]) < 77
if old and "build_ext" not in sys.argv:
    sys.exit(f"askew_kernels: to build it takes setuptools >= 77, found {setuptools.__version__}: upgrade setuptools, "
             "or let pip bring its own by leaving --no-build-isolation out")  # fmt: skip
setup(
    ext_modules=[Extension("askew_kernels.library_file", sources=[], optional=MODE != "full")],
    cmdclass={"build_ext": BuildExt, **({} if old else {"bdist_wheel": BdistWheel})},
    distclass=WithoutMetadata if old else Distribution,
    long_description=index_page(),
    long_description_content_type="text/markdown",
)
