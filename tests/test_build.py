"""The contract of the build: what is compiled anew, where torch is found, what is said where something is missing.

* ninja compiles what changed and what includes it, nothing else, and a failure names its source;
* torch is found in the environment that is installed into, also where the build runs in one of its own, and is asked
  for as a build requirement where it is nowhere and would be used;
* the library knows no Python and of torch only its stable C functions, and shows its own alone;
* a checkout whose library was built of other sources says so and how to mend it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import askew_kernels as ak
from askew_kernels import library, runtime

ROOT = Path(ak.__file__).parents[1]
TOOLS = ROOT / "build_tools"
pytestmark = pytest.mark.skipif(not TOOLS.is_dir(), reason="installed without its sources")
compiled = pytest.mark.skipif(runtime._C is None, reason="nothing is compiled")
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools", minversion="77")
    monkeypatch.syspath_prepend(str(TOOLS))
    import backend

    return backend


# ---- ninja -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch, backend):
    """(build(), sources): two sources, one of which includes a header, and an object of their own in a library."""
    if COMPILER is None or backend.find_ninja() is None:
        pytest.skip("no compiler or no ninja")
    from ninja_file import Ninja

    sources, temp = tmp_path / "sour ce$", tmp_path / "te mp"
    (sources / "cpu").mkdir(parents=True)
    temp.mkdir()
    (sources / "n.h").write_text("#define N 1\n")
    (sources / "one.cpp").write_text('#include "n.h"\nint one() { return N; }\n')
    (sources / "cpu/two.cpp").write_text("int two() { return 2; }\n")

    def build(*flags):
        plan = Ninja(temp, sources)
        for name in ("one.cpp", "cpu/two.cpp"):
            plan.compile(sources / name, [COMPILER, "-fPIC", '-DTEXT="a b"', *flags])
        Ninja.write(temp / "facts.cpp", "int facts;\n")
        plan.link("made.so", [COMPILER, "-shared", "-fPIC"], ["facts.cpp"], [])
        plan.run(backend.find_ninja())
        return temp / "made.so"

    return build, sources


def steps(capfd):
    return re.findall(r"^\[\d+/\d+, [\d.]+s\] (\S+)", capfd.readouterr().out, re.M)


def test_what_changed_is_compiled_and_nothing_else(project, capfd):
    build, sources = project
    assert build().is_file()
    assert sorted(steps(capfd)) == ["cpu/two.cpp", "made.so", "one.cpp"]  # progress is shown, one line each
    build()
    assert steps(capfd) == []
    (sources / "n.h").write_text("#define N 3\n")
    build()
    assert steps(capfd) == ["one.cpp", "made.so"]
    (sources / "cpu/two.cpp").write_text("int two() { return 4; }\n")
    build()
    assert steps(capfd) == ["cpu/two.cpp", "made.so"]
    build("-O1")
    assert len(steps(capfd)) == 3


def test_a_failure_names_its_source_and_keeps_the_rest(project, capfd):
    from setuptools.errors import CompileError

    build, sources = project
    (sources / "cpu/two.cpp").write_text("no\n")
    with pytest.raises(CompileError, match="compiling cpu/two.cpp failed"):
        build()
    (sources / "cpu/two.cpp").write_text("int two() { return 2; }\n")
    capfd.readouterr()
    build()
    assert "one.cpp" not in steps(capfd)[1:]


BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ninja_file import Ninja
folder = Path(sys.argv[2])
plan = Ninja(folder, folder)
plan.compile(folder / "slow.cpp", [str(folder / "slow")])
plan.run(sys.argv[3])
"""


def gone(pid):
    """Whether the process has ended, be it that nobody has asked how yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_an_interrupt_ends_the_compilers(backend, tmp_path):
    """Also where the signal meets this process alone, as a build front end's does."""
    ninja = backend.find_ninja()
    if ninja is None:
        pytest.skip("no ninja")
    (tmp_path / "slow.cpp").touch()
    (tmp_path / "slow").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    (tmp_path / "slow").chmod(0o755)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    process = subprocess.Popen([sys.executable, "-c", BUILD, TOOLS, tmp_path, ninja], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    signal.signal(signal.SIGINT, before)
    pid = tmp_path / "pid"
    for _ in range(600):
        if pid.is_file() and pid.read_text().strip():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode and "KeyboardInterrupt" in err
    compiler = int(pid.read_text())
    for _ in range(300):  # its parent may end a moment before it does
        if gone(compiler):
            break
        time.sleep(0.1)
    assert gone(compiler)


# ---- what was tried --------------------------------------------------------------------------------------------------


@pytest.fixture
def make_wheel(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import make_wheel

    return make_wheel


def test_the_page_shows_what_was_tried(make_wheel, tmp_path, monkeypatch):
    if make_wheel.ROWS.is_file():
        page = make_wheel.PAGE.read_text()
        assert make_wheel.filled(page, json.loads(make_wheel.ROWS.read_text())) == page
    monkeypatch.setattr(make_wheel, "ROWS", tmp_path / "rows.json")
    monkeypatch.setattr(make_wheel, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("<!-- tried (a command) -->\nold\n<!-- /tried -->\n")
    monkeypatch.setattr(make_wheel, "interpreter", lambda version: None if version == "3.14" else sys.executable)
    ran = []

    def run(*command, **options):
        ran.append(" ".join(map(str, command)))
        assert "PYTHONPATH" not in options.get("env", {})
        if "--no-build-isolation" in command and not any("install" in r and "ninja" in r for r in ran[-2:]):
            sys.exit("askew_kernels: ninja was not found, which drives the build: pip install ninja")
        return 'smoke test passed: {"python": "3.12.1", "torch": "2.11.0", "cpu": "avx2", "cuda": ""}'

    monkeypatch.setattr(make_wheel, "run", run)
    monkeypatch.setattr(make_wheel, "tools", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    asked = make_wheel.cases("sdist", ["3.12", "3.14"], ["uv"], ["torch==2.11.0"])
    assert len(asked) == 6 and make_wheel.try_all(asked, tmp_path / "a.tar.gz") == 0
    assert any(r.endswith("torch==2.11.0") for r in ran)
    text = (tmp_path / "page.md").read_text()
    assert "old" not in text and text.count("not tried: no such Python at hand") == 3
    assert "| sdist | 3.12.1 | uv | 2.11.0 | isolated | avx2 | passed |" in text
    assert "| --no-build-isolation, no ninja |  | refused: ninja was not found, which drives the build" in text
    assert make_wheel.try_all(asked, tmp_path / "a.tar.gz") == 0 and (tmp_path / "page.md").read_text() == text
    monkeypatch.setattr(make_wheel, "run", lambda *command, **options: sys.exit("no network"))
    assert make_wheel.try_all(asked[:1], tmp_path / "a.tar.gz") == 1 and "failed" in (tmp_path / "page.md").read_text()


# ---- what the build finds --------------------------------------------------------------------------------------------


def make_torch(folder, version="2.13.0+cpu"):
    made = folder / "torch"
    (made / "include/torch/csrc/stable").mkdir(parents=True)
    (made / "include/torch/csrc/stable/ops.h").touch()
    (made / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n")
    return made


@pytest.fixture
def alone(backend, monkeypatch, tmp_path):
    """As in a build environment of its own, which holds no torch: only what is around it can be found."""
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda: dict.fromkeys(("purelib", "platlib"), str(tmp_path)))
    monkeypatch.setattr(backend.site, "getsitepackages", list)
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(backend.os, "getppid", lambda: 1)
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PATH"):
        monkeypatch.delenv(name, raising=False)
    return backend


def environment(folder):
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").touch()
    return folder, make_torch(folder / "lib/python3.12/site-packages")


@pytest.mark.parametrize("by", ["PATH", "VIRTUAL_ENV", "CONDA_PREFIX"])
def test_torch_of_the_environment_around(alone, by, tmp_path, monkeypatch):
    folder, torch = environment(tmp_path / "venv")
    assert alone.find_torch() == (None, "torch >= 2.11 was not found at build time")
    monkeypatch.setenv(by, str(folder / "bin" if by == "PATH" else folder))
    assert alone.find_torch() == (torch, "")


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="no /proc")
@pytest.mark.parametrize("by", ["folder", "--python", "--python=", "-p", "VIRTUAL_ENV"])
def test_torch_of_the_front_ends_process(by, tmp_path):
    """As uv calls: from a process whose folder holds a .venv, or that names an environment or its interpreter."""
    folder, torch = environment(tmp_path / (".venv" if by == "folder" else "other"))
    named = {"--python": ["--python", str(folder)], "--python=": [f"--python={folder}/bin/python"],
             "-p": ["-p", "other/bin/python"]}.get(by, [])  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    variables = {"VIRTUAL_ENV": str(folder)} if by == "VIRTUAL_ENV" else {}
    inner = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import backend; print(*backend._environments(), sep='\\n')"
    )
    outer = (f"import os, subprocess, sys; os.environ.pop('VIRTUAL_ENV', None); os.environ['PATH'] = ''; "
             f"subprocess.run([sys.executable, '-c', {inner!r}], cwd='/')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", outer, *named], capture_output=True, text=True, cwd=tmp_path,
                          env={**clean, **variables}, check=True)  # fmt: skip
    assert str(folder) in done.stdout.splitlines(), done.stdout + done.stderr
    assert torch.is_dir()


def test_an_old_torch_is_named(alone, tmp_path, monkeypatch):
    make_torch(tmp_path, "2.10.1")
    found, why = alone.find_torch()
    assert found is None and why == f"torch >= 2.11 was not found at build time, only torch 2.10 in {tmp_path}"
    newer = tmp_path / "venv"
    environment(newer)
    monkeypatch.setenv("VIRTUAL_ENV", str(newer))
    assert alone.find_torch()[0] == newer / "lib/python3.12/site-packages/torch"


def test_what_the_build_asks_for(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(alone, "find_compiler", lambda: "g++")
    monkeypatch.setattr(alone, "find_ninja", lambda: None)
    assert alone.build_requirements() == ["ninja>=1.11", "torch>=2.11"]
    monkeypatch.setattr(alone, "find_ninja", lambda: "ninja")
    make_torch(tmp_path)
    assert alone.build_requirements() == []
    monkeypatch.setattr(alone, "find_torch", lambda: (None, "none"))
    monkeypatch.setattr(alone, "MODE", "python")
    assert alone.build_requirements() == []
    monkeypatch.setattr(alone, "MODE", "auto")
    monkeypatch.setattr(alone, "find_compiler", lambda: None)  # nothing could be compiled
    assert alone.build_requirements() == []


def copy_of_the_sources(folder):
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "*results", "tests")
    return Path(shutil.copytree(ROOT, folder, ignore=left_out))


def test_without_ninja_the_build_says_what_to_install(tmp_path):
    if COMPILER is None:
        pytest.skip("no compiler")
    copy = copy_of_the_sources(tmp_path / "copy")
    with open(copy / "build_tools/backend.py", "a") as file:
        file.write("\n\ndef find_ninja():\n    return None\n")
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=copy, capture_output=True,
                          text=True, env={**os.environ, "ASKEW_BUILD": "cpu"})  # fmt: skip
    assert done.returncode == 2
    assert "askew_kernels: ninja was not found, which drives the build: pip install ninja" in done.stderr


def test_a_wheel_is_for_every_python(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    copy = copy_of_the_sources(tmp_path / "copy")
    done = subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "ASKEW_BUILD": "python"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "dist").iterdir()
    assert wheel.name == f"askew_kernels-{ak.__version__}-py3-none-any.whl"  # nothing was compiled
    assert '"py3", "none"' in (ROOT / "setup.py").read_text()


def test_the_page_for_a_package_index(tmp_path):
    """Every link and picture is absolute, and those into the repository are of files that are there, by the version."""
    pytest.importorskip("setuptools", minversion="77")
    copy = copy_of_the_sources(tmp_path / "copy")
    done = subprocess.run([sys.executable, "setup.py", "-q", "dist_info"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (metadata,) = copy.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Description-Content-Type: text/markdown" in text and "\nProject-URL: Source, https://" in text
    source = re.search(r"Project-URL: Source, (\S+)", text)[1]
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith("#")]
    assert targets and all(t.startswith("https://") for t in targets)
    inside = [t.removeprefix(source) for t in targets if t.startswith(source)]
    assert any(t.startswith("/raw/") and t.endswith(".png") for t in inside)
    for target in inside:
        kind, path = re.fullmatch(rf"/(raw|blob)/v{re.escape(ak.__version__)}/([^#]+)(?:#.*)?", target).groups()
        assert (ROOT / path).exists() and (kind == "blob" or path.endswith(".png")), target
    assert all("/raw/" in t for t in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", text))


def test_the_citation_is_of_this_version():
    assert f"\nversion: {ak.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_is_linked_for_the_wheel_asks_for_no_newer_c_library(tmp_path, monkeypatch):
    """What libc, libm and, before 2.34, others define: in versions of glibc 2.28 at most, from the homes of then."""
    if COMPILER is None or shutil.which("readelf") is None or not shutil.which("cc"):
        pytest.skip("no compiler or no binutils")
    monkeypatch.syspath_prepend(str(TOOLS))
    import make_wheel

    (tmp_path / "glibc").mkdir()
    make_wheel.stand_ins(tmp_path / "glibc")
    (tmp_path / "uses.cpp").write_text(
        "#include <dlfcn.h>\n#include <pthread.h>\n#include <cmath>\n#include <cstdio>\n#include <memory>\n"
        "static void* work(void* p) { return p; }\n"
        'extern "C" double uses(double x) {\n  pthread_t t;\n  std::shared_ptr<int> p(new int(2)), q = p;\n'
        "  pthread_create(&t, nullptr, work, nullptr);\n  pthread_join(t, nullptr);\n"
        '  std::printf("%p\\n", dlsym(RTLD_DEFAULT, "puts"));\n  return std::pow(x, *q);\n}\n'
    )
    line = [COMPILER, "-shared", "-fPIC", "-O1", "uses.cpp", "-o", "uses.so", "-lpthread", "-ldl"]
    asked = {}
    for stands_in in (False, True):
        subprocess.run([*line, *(["-Lglibc"] if stands_in else [])], check=True, cwd=tmp_path)
        table = subprocess.run(
            ["readelf", "-W", "-d", "--dyn-syms", "uses.so"], capture_output=True, text=True, cwd=tmp_path
        )
        versions = {tuple(map(int, v.split("."))) for v in re.findall(r"@GLIBC_([\d.]+)", table.stdout)}
        asked[stands_in] = max(versions), set(re.findall(r"NEEDED.*\[(\w+)", table.stdout))
    assert asked[True][0] <= (2, 28) and "pow" in table.stdout
    if asked[False][0] >= (2, 34):  # on such a machine they are all in libc
        assert {"libpthread", "libdl"} <= asked[True][1] - asked[False][1]
    code = "import ctypes; f = ctypes.CDLL('./uses.so').uses; f.restype = ctypes.c_double; print(f(ctypes.c_double(3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "9.0"


# ---- what the library is ---------------------------------------------------------------------------------------------


@compiled
def test_the_library_knows_no_python_and_of_torch_its_stable_functions():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    file = Path(ak.__file__).with_name(library.FILE)

    def names(*options):
        text = subprocess.run([nm, "-D", *options, str(file)], capture_output=True, text=True, check=True).stdout
        return {line.split()[-1].partition("@")[0] for line in text.splitlines()}

    wanted, shown = names("--undefined-only"), names("--defined-only")
    assert shown and all(name.startswith("askew_") for name in shown), shown
    assert not [name for name in wanted if re.match(r"_?Py[A-Z_]", name)]
    mangled = [name for name in wanted if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", name)]
    assert not mangled, mangled
    assert any(name.startswith("aoti_torch_") for name in wanted)


@compiled
def test_a_library_of_other_sources_is_told(tmp_path):
    shutil.copytree(ROOT / "askew_kernels", tmp_path / "askew_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "setup.py").touch()

    def imported():
        return subprocess.run([sys.executable, "-c", "import askew_kernels as ak; print(ak.runtime._C.sources)"],
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
                              cwd=tmp_path, check=True)  # fmt: skip

    if library.source_digest(ROOT / "csrc") == runtime._C.sources:
        assert "built of other sources" not in imported().stderr
    with open(tmp_path / "csrc/ops/quantize.h", "a") as file:
        file.write("// a schema has changed\n")
    said = imported().stderr
    assert said.count("RuntimeWarning") == 1 and f"cd {tmp_path} && {sys.executable} setup.py build_ext" in said
    (tmp_path / "setup.py").unlink()  # an installation
    assert not imported().stderr


@compiled
def test_a_library_that_torch_cannot_load_is_told(tmp_path):
    shutil.copytree(ROOT / "askew_kernels", tmp_path / "askew_kernels", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "askew_kernels" / library.FILE).write_text("no library")
    done = subprocess.run([sys.executable, "-m", "askew_kernels", "info"], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)  # fmt: skip
    assert f"not compiled: {library.FILE} cannot be loaded: " in done.stdout
