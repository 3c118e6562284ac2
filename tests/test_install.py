"""The contract of an installation: what is shipped, which kernels serve each device, and what is said where none do.

* a source distribution holds every source of the kernels, and what is installed from it has them;
* the version has one home, an unknown ``ASKEW_BUILD`` is one line and exit code 2;
* where only the reference can run, the first operator that does says so once, why, and the command that mends it; not
  where the reference was chosen, and not for float64;
* each GPU is asked for its own architecture, once, and one that the C++ kernels were not compiled for gets Triton's;
* the compiled module of another installation is never taken.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import types
import warnings
from pathlib import Path

import pytest
import torch

import askew_kernels as ak
from askew_kernels import __main__ as cli
from askew_kernels import contract, reference, runtime

PACKAGE = Path(ak.__file__).parent
ROOT = PACKAGE.parent
checkout = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="installed without its sources")


def python(*arguments, cwd=ROOT, timeout=100, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ASKEW_")}
    env = {**kept, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=cwd)


# ---- what is shipped -------------------------------------------------------------------------------------------------


def in_checkout(folder):
    """Files of a folder as git has them; without git, those that are there."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", folder], capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return set(done.stdout.split())
    paths = (ROOT / folder).rglob("*")
    return {p.relative_to(ROOT).as_posix() for p in paths if p.suffix in (".py", ".json", ".h", ".inl", ".cpp", ".cu")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """(the archive, its names without their first folder); made of a copy, which the build writes into."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("sdist") / "source"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "*results")
    shutil.copytree(ROOT, copy, ignore=left_out)
    (copy / "askew_kernels/_build.json").write_text("{}")  # of the packager's machine
    (copy / "askew_kernels/libaskew_kernels.so").write_text("")
    done = python("setup.py", "-q", "sdist", cwd=copy)
    assert done.returncode == 0, done.stderr
    (archive,) = (copy / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    return archive, names


@checkout
def test_sdist_holds_every_source(sdist):
    archive, names = sdist
    assert archive.name == f"askew_kernels-{ak.__version__}.tar.gz"
    assert {name for name in names if name.startswith("csrc/") and Path(name).suffix} == in_checkout("csrc")
    assert in_checkout("askew_kernels") | in_checkout("experiments") <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "tests/conftest.py"} <= names
    assert not any(name.endswith((".so", ".pyc", "_build.json")) for name in names)


@checkout
@pytest.mark.slow
def test_kernels_are_compiled_from_the_sdist(sdist, tmp_path):
    pytest.importorskip("ninja")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no compiler")
    with tarfile.open(sdist[0]) as tar:
        tar.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    done = python(
        "setup.py", "-q", "build", "--build-lib", tmp_path / "lib", cwd=source, timeout=1800, ASKEW_BUILD="cpu"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "lib/askew_kernels/_build.json").read_text())["cpu"]
    code = """import askew_kernels as ak
print(ak.__file__, ak.runtime.choose_backend("cpu")[0], ak.runtime.tables.shipped())"""
    done = python("-c", code, cwd=tmp_path / "lib")
    assert done.stdout.startswith(str(tmp_path)) and " cpp " in done.stdout and "Table(" in done.stdout, done.stderr


@checkout
def test_version_has_one_home():
    for name in ("pyproject.toml", "setup.py"):
        assert f'"{ak.__version__}"' not in (ROOT / name).read_text()


@checkout
def test_unknown_build_mode(tmp_path):
    done = python("setup.py", "--version", ASKEW_BUILD="gpu")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "askew_kernels: ASKEW_BUILD: expected auto, python, cpu, full, got 'gpu'\n"


# ---- where only the reference can run --------------------------------------------------------------------------------

PROGRAM = """
import sys, warnings
import torch, askew_kernels as ak
assert ak.runtime._C is None and ak.__file__.startswith(sys.argv[1])
model = ak.quantize_(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)))
optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1)
for _ in range(2):
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
"""


@pytest.fixture
def uncompiled(tmp_path):
    """A copy of the package as it is where nothing could be compiled."""
    left_out = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "askew_kernels", ignore=left_out)
    (tmp_path / "askew_kernels/_build.json").write_text('{"cpu": false, "reason": "no C++ compiler was found"}')
    return tmp_path


def test_training_without_kernels_says_so_once(uncompiled):
    done = python("-c", PROGRAM, uncompiled, cwd=uncompiled)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1 and "no C++ compiler was found. To mend that: " in done.stderr
    assert "-m pip install --force-reinstall" in done.stderr and "ASKEW_BACKEND=reference" in done.stderr


@pytest.fixture
def nothing_compiled(monkeypatch):
    """This process as if the module were missing: operators that stand in are asked for by name."""
    monkeypatch.setattr(runtime, "_C", None)
    monkeypatch.setattr(runtime, "_told", set())
    monkeypatch.setattr(runtime, "build_report", lambda: {"reason": "no C++ compiler was found"})


def test_stand_in_is_said_once_and_runs(nothing_compiled):
    with pytest.warns(
        RuntimeWarning, match="operators on cpu run on the PyTorch reference.*: no .* compiler was found"
    ):
        assert runtime.stand_in("cpu", "row_sums") is reference.row_sums
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runtime.stand_in("cpu", "ste_clip_") is reference.ste_clip_


def test_stand_in_where_warnings_are_errors(nothing_compiled):
    """Before anything is written, and whichever operator comes first in a test of the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeWarning, match="ASKEW_BACKEND=reference"):
                runtime.stand_in("cpu", "row_sums")


def test_chosen_reference_and_float64_say_nothing(nothing_compiled, generator):
    w = torch.randn(4, 8, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with runtime.use_backend("reference"):
            ak.ops.row_sums(w, 4)
            runtime.stand_in("cpu", "row_sums")
        ak.ops.row_sums(w.double(), 4)


def test_info_says_what_mends_it(nothing_compiled, capsys):
    assert cli.main(["info"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("backend on cpu"))
    assert "reference: no C++ compiler was found. To mend that: ASKEW_BUILD=full " in line and "pip install" in line


def test_command_names_what_pip_installed_from(monkeypatch, tmp_path):
    origins = {
        '{"url": "file:///src/askew", "dir_info": {}}': "file:///src/askew",
        '{"url": "https://host/askew.git", "vcs_info": {"vcs": "git", "commit_id": "1"}}': "git+https://host/askew.git",
        None: "askew_kernels",
    }
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "askew_kernels/runtime.py"))
    for origin, source in origins.items():
        installed = types.SimpleNamespace(locate_file=tmp_path.joinpath, read_text=lambda name, text=origin: text)
        monkeypatch.setattr(runtime.metadata, "distribution", lambda name, found=installed: found)
        assert runtime.build_command().endswith(f" {source}")
    (tmp_path / "setup.py").touch()
    assert runtime.build_command().endswith(f" -e {tmp_path}")  # a checkout, which has no such record


# ---- which kernels serve which GPU -----------------------------------------------------------------------------------


class Gpus:
    """Two GPUs that are not there: number 0 is an sm_80, number 1 an sm_120."""

    def __init__(self, monkeypatch, archs, triton=True):
        self.asked, self.tuned = [], []
        monkeypatch.setattr(runtime, "_C", types.SimpleNamespace(cuda_archs=archs))
        monkeypatch.setattr(runtime, "_stand_ins", {})
        monkeypatch.setattr(runtime, "_told", set())
        monkeypatch.setattr(runtime, "_cuda_tuned", False)
        monkeypatch.setattr(runtime, "_tune", self.tuned.append)
        monkeypatch.setattr(runtime, "has_triton", lambda: triton)
        monkeypatch.setattr(runtime, "implementation", lambda backend, name: (backend, name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", self.capability)

    def capability(self, index=None):
        self.asked.append(index)
        return {None: (8, 0), 0: (8, 0), 1: (12, 0)}[index]

    @staticmethod
    def tensor(index, dtype=torch.float32):
        return types.SimpleNamespace(dtype=dtype, is_cuda=True, get_device=lambda: index)


def test_each_gpu_is_asked_for_its_own_architecture(monkeypatch):
    gpus = Gpus(monkeypatch, "sm_80 sm_90")
    for _ in range(3):
        assert runtime.operator("row_sums", gpus.tensor(0)) is torch.ops.askew.row_sums.default
        assert runtime.operator("row_sums", gpus.tensor(1)) == ("triton", "row_sums")
    assert sorted(gpus.asked) == [0, 1] and gpus.tuned == ["cuda"]
    assert runtime.choose_backend("cuda:1") == ("triton", "compiled for sm_80 sm_90 only")
    assert runtime.choose_backend("cuda")[0] == "cpp"  # the current one
    assert runtime.operator("row_sums", gpus.tensor(1, torch.float64)) is reference.row_sums
    with runtime.use_backend("reference"):
        assert runtime.operator("row_sums", gpus.tensor(0)) == ("reference", "row_sums")


def test_lists_are_prepared_for_the_compiled_operators_alone(monkeypatch):
    """Of two GPUs only the one that the code was compiled for; not for float64, nor where another backend is forced."""
    gpus = Gpus(monkeypatch, "sm_80")

    def tensor(index, dtype=torch.float32):
        return types.SimpleNamespace(dtype=dtype, is_cuda=True, is_cpu=False, get_device=lambda: index)

    assert runtime.compiled_for(tensor(0)) and not runtime.compiled_for(tensor(1))
    assert not runtime.compiled_for(tensor(0, torch.float64))
    assert runtime.compiled_for(torch.ones(1)) and not runtime.compiled_for(torch.ones(1, device="meta"))
    for backend in ("reference", "triton"):
        with runtime.use_backend(backend):
            assert not runtime.compiled_for(tensor(0)) and not runtime.compiled_for(torch.ones(1))
    with runtime.use_backend("cpp"):
        assert runtime.compiled_for(tensor(0))
    assert sorted(gpus.asked) == [0, 1]
    gpus = Gpus(monkeypatch, "")
    assert not runtime.compiled_for(tensor(0)) and runtime.compiled_for(torch.ones(1))
    monkeypatch.setattr(runtime, "_C", None)
    assert not runtime.compiled_for(torch.ones(1))


@pytest.mark.parametrize(
    ("archs", "fits"),
    [
        ("sm_80", (True, False)),
        ("sm_80 compute_80", (True, True)),
        ("sm_86", (False, False)),
        ("sm_120", (False, True)),
    ],
)
def test_architectures_that_run(monkeypatch, archs, fits):
    """An equal major and no newer minor, or PTX of an older one."""
    Gpus(monkeypatch, archs)
    assert (runtime.cuda_archs_fit(0), runtime.cuda_archs_fit(1)) == fits


def test_a_gpu_that_nothing_serves_is_told(monkeypatch):
    gpus = Gpus(monkeypatch, "sm_80", triton=False)
    with pytest.warns(RuntimeWarning, match="compiled for sm_80 only; triton is not installed.*pip install triton"):
        assert runtime.operator("row_sums", gpus.tensor(1)) == ("reference", "row_sums")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runtime.operator("ste_clip_", gpus.tensor(1)) == ("reference", "ste_clip_")
        assert runtime.operator("ste_clip_", gpus.tensor(0)) is torch.ops.askew.ste_clip_.default


def test_products_from_codes_are_chosen_by_rows_and_device(monkeypatch):
    """On a GPU few rows go from codes: the fewest by the CUDA kernel, more by Triton's, unless a backend is forced."""
    Gpus(monkeypatch, "sm_80")
    monkeypatch.setattr(runtime, "_TRITON", True)

    def gpu(rows, dtype=torch.float32):
        class Rows(types.SimpleNamespace):
            __len__ = lambda self: rows  # noqa: E731

        return Rows(dtype=dtype, is_cuda=True, is_cpu=False, get_device=lambda: 0)

    few, most = contract.FEW_ROWS, runtime.FEW_ON_GPU
    assert runtime.reads_codes(gpu(most), most) and not runtime.reads_codes(gpu(most + 1), most + 1)
    assert not runtime.reads_codes(gpu(1, torch.float64), 1) and runtime.reads_codes(torch.ones(1, 1), 10**6)
    compiled = torch.ops.askew.packed_linear.default
    assert runtime.packed_product(gpu(few), "int8") == ("packed_linear", compiled)  # int8: on a CPU only
    assert runtime.packed_product(gpu(few + 1), "float") == ("packed_linear", ("triton", "packed_linear"))
    with runtime.use_backend("reference"):
        assert runtime.packed_product(gpu(few + 1), "float")[1] == ("reference", "packed_linear")
    assert runtime.packed_product(torch.ones(1, 1), "int8")[0] == "packed_linear_int8"
    monkeypatch.setattr(runtime, "_TRITON", False)
    assert runtime.reads_codes(gpu(few), few) and not runtime.reads_codes(gpu(few + 1), few + 1)
    most = runtime.MOST_FROM_TILES
    assert runtime.reads_codes(gpu(most), most, True) and not runtime.reads_codes(gpu(most + 1), most + 1, True)
    assert runtime.reads_tiles(gpu(1, torch.bfloat16)) and not runtime.reads_tiles(gpu(1))
    with runtime.use_backend("reference"):
        assert not runtime.reads_tiles(gpu(1, torch.bfloat16))
    monkeypatch.setattr(runtime, "has_cuda_kernels", lambda: False)
    assert not runtime.reads_codes(gpu(1), 1) and not runtime.reads_tiles(gpu(1, torch.bfloat16))


def test_other_launch_parameters_reach_the_gpu_at_its_next_operator(monkeypatch):
    gpus = Gpus(monkeypatch, "sm_80")
    runtime.operator("row_sums", gpus.tensor(0))
    runtime.use_tuning()
    runtime.operator("row_sums", gpus.tensor(0))
    assert gpus.tuned == ["cuda", "cpu", "cuda"]


def test_the_compiler_takes_the_choice_as_a_constant(monkeypatch):
    monkeypatch.setattr(runtime, "_stand_ins", {})
    monkeypatch.setattr(runtime, "_tune", lambda section: None)
    monkeypatch.setattr(runtime, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(runtime, "has_triton", lambda: True)
    monkeypatch.setattr(runtime, "cuda_archs_fit", lambda index: index == 0)

    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x):
        return [x + (2 if runtime._gpu_stand_in(index, None) == "triton" else 1) for index in (0, 1, 0)]

    assert [float(x) for x in chosen(torch.zeros(()))] == [1, 2, 1]
    assert runtime._stand_ins == {(0, None): "", (1, None): "triton"}
