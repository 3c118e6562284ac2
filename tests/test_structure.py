"""Contract: who may import whom, read from the sources (docs/design.md).

Python, left never imports right: reference, runtime, annealing, triton_kernels -> ops -> quant -> optim, nn -> bench,
__main__. ``optim`` and ``nn`` do not know each other. csrc/math sees the language's own headers at most, the loops that
are compiled once per instruction set see no torch and no standard library, ``cpu`` and ``cuda`` never see each other.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import askew_kernels
from askew_kernels import reference, runtime
from askew_kernels.ops import schema

PACKAGE = Path(askew_kernels.__file__).parent
CSRC = PACKAGE.parent / "csrc"
ORDER = [  # a room may import those of the lines above, and of its own line where it stands alone
    {"contract"}, {"reference", "tuning", "annealing", "atomic"}, {"runtime"}, {"triton_kernels"}, {"ops"}, {"quant"},
    {"optim", "nn"}, {"analysis", "deploy"}, {"search"}, {"onnx", "torchao"},
]  # fmt: skip
LAYERS = {
    room: set().union(*ORDER[:i]) for i, rooms in enumerate(ORDER) for room in rooms
}  # room: what it may import of the package


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py"))


def room(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path):
    """Rooms of the package that this file imports, at the top or inside functions."""
    package = ("askew_kernels", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "askew_kernels" and len(parts) > 1:
                found.add(parts[1])
    return found - {"__version__"}


@pytest.mark.parametrize("path", [p for p in modules() if room(p) in LAYERS], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_imports(path):
    assert imported_rooms(path) <= LAYERS[room(path)] | {room(path)}


def test_the_import_reader_sees():
    """The check above is not vacuous."""
    assert {"ops", "contract"} <= imported_rooms(PACKAGE / "quant" / "state.py")
    assert "optim" in imported_rooms(PACKAGE / "__init__.py")
    for name in LAYERS:
        if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file():
            assert any(room(p) == name for p in modules())


def test_only_runtime_reads_the_environment():
    for path in modules():
        if room(path) in LAYERS and path.name != "runtime.py":
            assert not re.search(r"\bos\.(environ|getenv)\b", path.read_text()), path


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(folder):
    return sorted(p for p in (CSRC / folder).iterdir() if p.suffix in (".h", ".cpp", ".inl", ".cu", ".cuh"))


LANGUAGE = {"cmath", "cstdint", "math.h", "stdint.h"}


@pytest.mark.skipif(not CSRC.is_dir(), reason="installed without its sources")
class TestNative:
    def test_math_sees_only_the_language(self):
        own = {p.name for p in sources("math")}
        for path in sources("math"):
            assert set(includes(path)) <= LANGUAGE | own, path.name

    def test_loops_see_no_torch_and_no_library(self):
        seen, todo = set(), [p for p in sources("cpu") if p.name.startswith("loops")]
        assert todo
        while todo:
            path = todo.pop()
            if path in seen:
                continue
            seen.add(path)
            for name in includes(path):
                local = (path.parent / name).resolve()
                if local.is_file():
                    todo.append(local)
                else:
                    assert name in LANGUAGE | {"initializer_list", "immintrin.h"}, f"{path.name} includes {name}"
        assert any(p.parent.name == "math" for p in seen)

    def test_cpu_and_cuda_do_not_meet(self):
        for one, other in (("cpu", "cuda"), ("cuda", "cpu")):
            for path in sources(one):
                assert not any(f"{other}/" in name for name in includes(path)), path.name

    def test_no_native_architecture_and_no_fast_math(self):
        build = (PACKAGE.parent / "setup.py").read_text()
        code = "\n".join(line.split("#")[0] for line in build.splitlines())
        assert "-march=native" not in code and "fast-math" not in code and "fast_math" not in code
        assert "-ffp-contract=off" in code


def test_import_touches_no_gpu_and_no_triton():
    """Importing the package initialises neither CUDA nor Triton."""
    code = "import sys, torch, askew_kernels; print(torch.cuda.is_initialized(), 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.split()[0] == "False"


def test_every_test_file_opens_with_its_contract():
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text and len(text.split()) > 10, path.name


def test_public_names_exist_and_are_documented():
    for module in (askew_kernels, askew_kernels.ops, askew_kernels.optim, askew_kernels.nn, askew_kernels.quant):
        assert module.__doc__
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name)
    for name in ("fake_quantize", "project_interval_", "skew_sgd_", "skew_adamw_", "row_sums", "ste_clip_"):
        assert len(getattr(askew_kernels.ops, name).__doc__) > 60


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_every_backend_has_every_operator(backend, monkeypatch):
    """Its own, or the reference's where Triton has none: forcing a backend never ends in an AttributeError."""
    if backend == "triton" and not runtime.has_triton():
        pytest.skip("triton is not installed")
    for name in schema.OPERATORS:
        assert callable(runtime.implementation(backend, name)), name
    monkeypatch.delattr(runtime.backend_module(backend), "row_sums", raising=True)
    if backend == "triton":
        assert runtime.implementation(backend, "row_sums") is reference.row_sums
