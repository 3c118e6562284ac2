"""Contract: the loops for AVX-VNNI (`vpdpbusd` of 256 bits, processors without AVX-512) give the bits of all others.

AVX-512 has that instruction in an encoding of its own. For it the loops' source is compiled once more here, and put in
the place of the library's: to the tests of products of bytes they are one more instruction set then.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from askew_kernels import library, runtime

ROOT = Path(__file__).parent.parent
STUB, FLAG = "cpu/isa/avx2_vnni.cpp.o", "-mavxvnni"
OTHER = "-mavx512f -mavx512bw -mavx512vl -mavx512vnni"
TESTS = ["test_isa_threads.py", "test_bands.py", "test_level_product.py", "test_packed_convolutions.py"]
CHOSEN = "changes_no_bits or products_are_exact or (avx2 and not vnni) or instruction_set"
SEEN = "from askew_kernels import runtime as r; r._C.force_cpu_capability('avx2'); print(r._C.packed_capability())"


def objects():
    """The folder that the library was linked in, and how each of its parts is made."""
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if runtime._C is None or ninja is None:
        pytest.skip("needs the compiled library and ninja")
    built = (ROOT / "askew_kernels" / library.FILE).read_bytes()
    for folder in (ROOT / "build").glob("temp.*"):
        if (folder / library.FILE).is_file() and (folder / library.FILE).read_bytes() == built:
            made = subprocess.run([ninja, "-C", folder, "-t", "commands", library.FILE], capture_output=True, text=True)
            return folder, made.stdout.splitlines()
    pytest.skip("the objects of the library are gone")


def test_loops_of_256_bits_on_avx512(tmp_path):
    if runtime._C is None or runtime._C.packed_capability() != "avx512_vnni":
        pytest.skip("needs AVX-512 with VNNI")
    folder, commands = objects()
    compiled = next(c for c in commands if c.endswith(f"-o {STUB}"))
    if FLAG not in compiled:
        pytest.skip("the compiler knows no AVX-VNNI")
    package, own = tmp_path / "askew_kernels", tmp_path / "avx2_vnni.o"
    shutil.copytree(ROOT / "askew_kernels", package, ignore=shutil.ignore_patterns(library.FILE, "__pycache__"))
    for command in (
        re.sub(r"-MF \S+", "", compiled.replace(FLAG, OTHER).replace(f"-o {STUB}", f"-o {own}").replace(" -MD", "")),
        commands[-1].replace(STUB, str(own)).replace(f"-o {library.FILE}", f"-o {package / library.FILE}"),
    ):
        subprocess.run(command, shell=True, check=True, cwd=folder)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    run = dict(cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    seen = subprocess.run([sys.executable, "-c", SEEN], **run)
    assert seen.stdout == "avx2_vnni\n", seen.stderr
    tests = [f"tests/{name}" for name in TESTS]
    ran = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", CHOSEN, *tests],
                         **run)  # fmt: skip
    found = re.search(r"(\d+) passed", ran.stdout)
    assert ran.returncode == 0 and found and int(found[1]) > 50, ran.stdout
