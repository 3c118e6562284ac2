"""The compiled operators: a library that torch loads and that knows no Python, so one file serves every version of it.

``setup.py`` takes ``FILE`` and ``source_digest`` from here without importing the package, so nothing of torch or of the
package is imported at the top.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

FILE = "libaskew_kernels.so"  # no name that Python would import


def source_digest(csrc: Path) -> str:
    """Of names and contents of all files below ``csrc``: what a library was built of."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".inl", ".cuh", ".cpp", ".cu")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


class Library:
    """The library at ``path``, its operators registered with torch, its own C functions (``csrc/bindings.cpp``) as
    methods. Raises OSError where it cannot be loaded, AttributeError where it is none of this package."""

    def __init__(self, path: Path) -> None:
        import torch

        torch.ops.load_library(str(path))
        self._c = ctypes.CDLL(str(path))  # the one that is loaded
        for name in ("build_facts", "cpu_capability", "packed_capability", "best_cpu_capability", "parameter_name"):
            self._function(name).restype = ctypes.c_char_p
        self._function("force_cpu_capability").argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
        for name, arguments in (("parameter_name", 1), ("parameter", 1), ("set_parameter", 2), ("output_pool_bytes", 0),
                                ("set_output_pool_limit", 1)):  # fmt: skip
            self._function(name).argtypes = (ctypes.c_int64,) * arguments
        for name in ("parameter", "output_pool_bytes"):
            self._function(name).restype = ctypes.c_int64
        facts = json.loads(self._c.askew_build_facts())
        self.compiler: str = facts["compiler"]
        self.torch_target: str = facts["torch_target"]  # the oldest torch that it serves
        self.cuda_archs: str = facts["cuda_archs"]  # as given to nvcc; empty: built without CUDA
        self.cuda_version: str = facts["cuda_version"]  # of nvcc; empty: built without CUDA
        self.sources: str = facts["sources"]  # source_digest at build time
        self._numbers: dict[str, int] = {}
        while (parameter := self._c.askew_parameter_name(len(self._numbers))) is not None:
            self._numbers[parameter.decode()] = len(self._numbers)

    def _function(self, name: str):
        return getattr(self._c, f"askew_{name}")

    def cpu_capability(self) -> str:
        """Instruction set in use: baseline, avx2 or avx512."""
        return self._c.askew_cpu_capability().decode()

    def packed_capability(self) -> str:
        """The same for products of packed weights: avx512_vnni or avx2_vnni where their products of bytes use VNNI."""
        return self._c.askew_packed_capability().decode()

    def best_cpu_capability(self) -> str:
        """The best one that this CPU runs."""
        return self._c.askew_best_cpu_capability().decode()

    def bfloat16_products(self) -> bool:
        """Whether products with bfloat16 inputs use AVX512_BF16."""
        return bool(self._c.askew_bfloat16_products())

    def force_cpu_capability(self, name: str, vnni: bool = True, bf16: bool = True) -> None:
        """Use this instruction set from now on. Raises ValueError where it is not built or the CPU lacks it."""
        if not self._c.askew_force_cpu_capability(name.encode(), vnni, bf16):
            raise ValueError("cpu capability: expected baseline, avx2 or avx512, built and supported by this CPU "
                             f"(best here: {self.best_cpu_capability()}), got {name}")  # fmt: skip

    def tuning(self) -> dict[str, int]:
        """The launch parameters in use (``csrc/tuning.h``)."""
        return {name: self._c.askew_parameter(number) for name, number in self._numbers.items()}

    def set_tuning(self, values: Mapping[str, int]) -> None:
        """Changes these launch parameters, which are checked already, while no operator runs."""
        for name, value in values.items():
            self._c.askew_set_parameter(self._numbers[name], value)

    def output_pool_bytes(self) -> int:
        """Bytes that the CPU output pool holds for reuse."""
        return self._c.askew_output_pool_bytes()

    def set_output_pool_limit(self, limit: int) -> None:
        """Most bytes the pool may hold; 0 switches it off."""
        self._c.askew_set_output_pool_limit(limit)
