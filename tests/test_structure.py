"""Contract: who may import whom, read from the sources (docs/design.md).

Python, left never imports right, at the top of a file, inside a function or by a string: contract, reference, tuning,
annealing, atomic, library -> triton_kernels -> runtime -> ops -> quant -> optim, nn -> analysis, deploy -> search ->
bench, demo -> experiments, __main__. ``optim`` and ``nn`` do not know each other, nothing of the package but
``__main__`` knows ``bench``, no modules import each other in a circle, and no room uses another's private names.
csrc/math sees the language's own headers at most, the loops that are compiled once per instruction set see no torch
and no standard library, ``cpu`` and ``cuda`` never see each other.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import askew_kernels
from askew_kernels import reference, runtime
from askew_kernels.ops import schema

PACKAGE = Path(askew_kernels.__file__).parent
ROOT = PACKAGE.parent
CSRC = ROOT / "csrc"
ORDER = [  # a room may import those of the lines above
    {"contract", "atomic", "annealing", "library"}, {"reference", "tuning", "command", "figures"}, {"triton_kernels"},
    {"runtime"}, {"ops"}, {"quant"}, {"optim", "nn"}, {"recipe", "distillation"}, {"analysis", "deploy"},
    {"search", "onnx", "torchao"}, {"bench", "demo"}, {"experiments"}, {"__main__"},
]  # fmt: skip
FACADE = {"demo", "experiments"}  # write what a user writes: import askew_kernels as ak
ALLOWED = {room: set().union(*ORDER[:i]) for i, rooms in enumerate(ORDER) for room in rooms}
for _room in ALLOWED:
    if _room not in ("__main__", "experiments"):
        ALLOWED[_room].discard("bench")
TORCHS = {*dir(torch.Tensor), *dir(torch.nn.Module()), *dir(torch.optim.SGD([torch.zeros(1)]))}
NOT_PRIVATE = {"_C", "_askew_quantizer"}  # the compiled library; what a user's parameter carries from nn to optim


# ---- reading the sources --------------------------------------------------------------------------------------------


@functools.cache
def modules():
    """{dotted name: file} of the package and of the experiments beside it."""
    found = {}
    for folder in (PACKAGE, ROOT / "experiments"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module):
    """The first name below the package; "" for the package itself, which is the sum of its rooms."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "askew_kernels" else first


@functools.cache
def tree(module):
    return ast.parse(modules()[module].read_text())


def resolved(name):
    """(the module that a dotted name stands in, the rest of the name)."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        if ".".join(parts[:i]) in modules():
            return ".".join(parts[:i]), parts[i:]
    return None, parts


@functools.cache
def imports(module):
    """[(imported module, names below it, what the importing module calls it)], from statements and strings."""
    package = module.split(".") if modules()[module].name == "__init__.py" else module.split(".")[:-1]
    found = []
    for node in ast.walk(tree(module)):
        names = []
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [(f"{base}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"(askew_kernels|experiments)(\.\w+)+", node.value):
                names = [(node.value, None)]
        for name, called in names:
            target, rest = resolved(name)
            if target is not None and target != module:
                found.append((target, rest, called))
    return found


def rooms_of(module):
    """Rooms that this module imports; "" where it takes names of the whole package."""
    found = [(target, rest) for target, rest, _ in imports(module) if rest != ["__version__"]]
    return {room(target) for target, _ in found}


# ---- the order of the rooms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [m for m in modules() if room(m) in ALLOWED])
def test_left_never_imports_right(module):
    own = room(module)
    assert rooms_of(module) <= ALLOWED[own] | {own} | ({""} if own in FACADE else set())


def test_every_room_has_its_place():
    assert {room(m) for m in modules()} - {""} <= set(ALLOWED)


def test_no_circles():
    """Strongly connected modules, by Tarjan; a package and what its __init__ gathers are one step apart."""
    graph = {m: {target for target, _, _ in imports(m) if target not in ("askew_kernels",)} for m in modules()}
    index, low, stack, circles = {}, {}, [], []

    def visit(m):
        index[m] = low[m] = len(index)
        stack.append(m)
        for n in graph[m]:
            if n not in index:
                visit(n)
                low[m] = min(low[m], low[n])
            elif n in stack:
                low[m] = min(low[m], index[n])
        if low[m] == index[m]:
            circle = stack[stack.index(m) :]
            del stack[stack.index(m) :]
            if len(circle) > 1:
                circles.append(sorted(circle))

    for m in graph:
        if m not in index:
            visit(m)
    assert not circles


def private(name):
    return name.startswith("_") and not name.startswith("__") and name not in TORCHS | NOT_PRIVATE


@functools.cache
def defined(of_room):
    """Private names that a room gives: of functions, classes, variables and attributes."""
    found = set()
    for module in modules():
        if room(module) == of_room:
            for node in ast.walk(tree(module)):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    found.add(node.name)
                elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                    found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if private(name)}


@pytest.mark.parametrize("module", [m for m in modules() if room(m) in ALLOWED])
def test_private_names_stay_in_their_room(module):
    """Imported ones, attributes of an imported module, and attributes that only another room defines."""
    own, used = room(module), set()
    foreign = {called: t for t, rest, called in imports(module) if called and room(t) != own and not rest}
    used |= {f"{target}: {rest[0]}" for target, rest, _ in imports(module)
             if room(target) != own and rest and private(rest[0])}  # fmt: skip
    elsewhere = set().union(*(defined(r) for r in ALLOWED if r != own)) - defined(own)
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and private(node.attr):
            base = node.value.id if isinstance(node.value, ast.Name) else None
            if base in foreign:
                used.add(f"{foreign[base]}: {node.attr}")
            elif node.attr in elsewhere and not ast.unparse(node.value).startswith("torch."):
                used.add(ast.unparse(node))
    assert not used


def test_the_import_reader_sees():
    """The checks above are not vacuous."""
    assert {"ops", "contract"} <= rooms_of("askew_kernels.quant.state")
    assert "optim" in rooms_of("askew_kernels")
    assert "triton_kernels" in rooms_of("askew_kernels.runtime")  # by a string
    assert "askew_kernels.ops.schema" in {target for target, _, _ in imports("askew_kernels.ops.mix")}
    assert ("askew_kernels.contract", ["FLOAT"]) in [i[:2] for i in imports("askew_kernels.reference")]
    assert "_serial_number" not in defined("quant") and "_forced" in defined("runtime")


def test_only_runtime_reads_the_environment():
    for module, path in modules().items():
        if room(module) in ALLOWED and room(module) not in {"runtime", "bench", "demo", "experiments", "__main__"}:
            assert not re.search(r"\bos\.(environ|getenv)\b", path.read_text()), path


# ---- csrc -----------------------------------------------------------------------------------------------------------


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(folder):
    return sorted(p for p in (CSRC / folder).rglob("*") if p.suffix in (".h", ".cpp", ".inl", ".cu", ".cuh"))


LANGUAGE = {"cmath", "cstdint", "math.h", "stdint.h"}


@pytest.mark.skipif(not CSRC.is_dir(), reason="installed without its sources")
class TestNative:
    def test_math_sees_only_the_language(self):
        own = {p.name for p in sources("math")}
        for path in sources("math"):
            assert set(includes(path)) <= LANGUAGE | own, path.name

    def test_loops_see_no_torch_and_no_library(self):
        seen, todo = set(), [p for p in sources("cpu") if p.name.startswith("loops") or p.parent.name == "isa"]
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
        for one, others in (("cpu", ("cuda",)), ("cuda", ("cpu",)), ("ops", ("cpu", "cuda"))):
            for path in sources(one):
                assert not any(f"{other}/" in name for name in includes(path) for other in others), path.name

    def test_no_native_architecture_and_no_fast_math(self):
        build = (ROOT / "setup.py").read_text()
        code = "\n".join(line.split("#")[0] for line in build.splitlines())
        assert "-march=native" not in code and "fast-math" not in code and "fast_math" not in code
        assert "-ffp-contract=off" in code


def test_import_touches_no_gpu_and_no_triton():
    """Importing the package initialises neither CUDA nor Triton."""
    code = "import sys, torch, askew_kernels; print(torch.cuda.is_initialized(), 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
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
    for name in schema.OPERATORS:
        public = getattr(askew_kernels.ops, name, None)
        assert public is None or len(public.__doc__) > 60, name


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
