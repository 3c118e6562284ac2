"""Contract: nvcc compiles the CUDA kernels without spills, without local memory, with 128-bit memory access.

Needs nvcc, not a GPU. Each source becomes PTX once; ptxas assembles it for every architecture and reports.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from askew_kernels.ops import RULES

CSRC = Path(__file__).parent.parent / "csrc"
ARCHS = ("80", "90")
SOURCES = ("quantize", "update", "sam", "mix", "packed", "packed_tiles", "scales", "lowbit")
NVCC = shutil.which("nvcc") or next(
    (p for p in (os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc"),) if os.path.isfile(p)), None
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")

KERNELS = {  # source -> hot kernels, and how many instances (storage types x grids x rules or passes) there are
    "quantize": {
        "quantize_kernel": 45,
        "row_sums_kernel": 3,
        "scale_gradient_kernel": 9,
    },
    "update": {"step_kernel": 9 * len(RULES) + 2 * 15},  # any step, and the usual ones for few and for many tensors
    "sam": {"sam_kernel": 12},
    "packed": {"packed_words_kernel": 24},
    "packed_tiles": {"tiles_few_kernel": 56, "tiles_many_kernel": 70},
    "lowbit": {"token_levels_kernel": 12},
    "scales": {"scales_kernel": 2, "errors_kernel": 9},
    "mix": {"mix_kernel": 3, "mix_gradient_kernel": 3},
}


def ptxas() -> str:
    beside = Path(NVCC).resolve().parent / "ptxas"
    return str(beside) if beside.is_file() else shutil.which("ptxas") or "ptxas"


def compile_source(name: str, digest: str) -> tuple[str, dict[str, str]]:
    """(PTX, ptxas report by architecture)"""
    folder = Path(tempfile.gettempdir()) / f"askew_cuda_build_{digest}"
    folder.mkdir(exist_ok=True)
    ptx = folder / f"{name}.ptx"
    if not ptx.is_file():
        made = ptx.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O3", "--fmad=false", "-arch=compute_80", "-ptx"]
        subprocess.run([NVCC, *flags, str(CSRC / "cuda" / f"{name}.cu"), "-o", str(made)], check=True)
        made.replace(ptx)
    reports = {}
    for arch in ARCHS:
        log = folder / f"{name}_{arch}.log"
        if not log.is_file():
            line = [ptxas(), "-v", f"-arch=sm_{arch}", str(ptx), "-o", os.devnull]
            log.write_text(subprocess.run(line, capture_output=True, text=True, check=True).stderr)
        reports[arch] = log.read_text()
    return ptx.read_text(), reports


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[str, dict[str, str]]]:
    files = sorted(p for folder in ("cuda", "math") for p in (CSRC / folder).iterdir())
    version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + b"".join(p.read_bytes() for p in files)).hexdigest()[:16]
    with ThreadPoolExecutor(len(SOURCES)) as pool:
        return dict(zip(SOURCES, pool.map(lambda s: compile_source(s, digest), SOURCES), strict=True))


def functions(report: str) -> dict[str, dict[str, int]]:
    """ptxas -v by kernel: stack frame, spill stores and loads, registers."""
    found = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.S,
    )
    return {n: dict(zip(("stack", "stores", "loads", "registers"), map(int, v), strict=True)) for n, *v in found}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_no_local_memory(compiled, source, arch):
    found = functions(compiled[source][1][arch])
    for kernel, count in KERNELS[source].items():
        assert sum(kernel in name for name in found) == count, kernel
    for name, used in found.items():
        assert used["stack"] == used["stores"] == used["loads"] == 0, (name, used)


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_leave_room_for_the_blocks_that_device_cuh_counts_on(compiled, arch):
    def blocks_of(source, name):
        if source != "update":
            return 3
        if "StepKindE0" in name:  # any step; two buffers of sixteen bits want most
            return 1 if "AdamW" in name else 2
        return 3

    for source in ("quantize", "update", "sam"):
        for name, used in functions(compiled[source][1][arch]).items():
            assert used["registers"] <= 65536 // 256 // blocks_of(source, name) // 8 * 8, (name, used)


# Scales have little to read, tiles go by asm and as many bytes as they have bits, levels are written a byte a number.
@pytest.mark.parametrize("source", [s for s in SOURCES if s not in ("scales", "packed_tiles", "lowbit")])
def test_hot_kernels_use_128_bit_access(compiled, source):
    ptx = compiled[source][0]
    entries = re.split(r"\.entry\s+", ptx)[1:]
    for kernel in KERNELS[source]:
        bodies = [e for e in entries if kernel in e.split("(", 1)[0]]
        assert len(bodies) == KERNELS[source][kernel]
        for body in bodies:
            assert re.search(r"ld\.global(\.\w+)*\.v(4\.[bfu]32|2\.[bfu]64)", body), f"{kernel}: no 128-bit load"
            leaves_sums = kernel in ("row_sums_kernel", "packed_words_kernel") or "SamPassE0" in body.split("(", 1)[0]
            if not leaves_sums:
                assert re.search(r"st\.global(\.\w+)*\.v(4\.[bfu]32|2\.[bfu]64)", body), f"{kernel}: no 128-bit store"
            assert ".local" not in body, f"{kernel}: local memory"


def test_parameters_fit(compiled):
    """Kernel parameters by value: at most 32,764 bytes."""
    for ptx, _ in compiled.values():
        sizes = [int(n) for n in re.findall(r"\.param \.align \d+ \.b8 \w+\[(\d+)\]", ptx)]
        assert sizes and max(sizes) <= 32764
