"""Contract: the programs of examples/ that several processes or another library's trainer run, and Accelerate.

1. ``examples/fsdp.py`` under torchrun, ``lightning_trainer.py`` with DDP and FSDP2, and ``transformers_trainer.py``
   train, stop, resume from their own checkpoints, and end with the accuracy that they promise.
2. Accelerate over two processes trains, accumulates, saves and resumes bit for bit; the schedule is registered for its
   checkpoints and stepped by hand, as the one that it prepares it steps once for each process.
3. Processes that serve a packed file by ``mmap`` share its memory, and what one writes no other sees.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases as cases
import torch

import askew_kernels as ak

FOLDER = Path(__file__).parent.parent / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# {name: (before the program, after it, what it imports, what it must print)}
PROGRAMS = {
    "fsdp": (TORCHRUN, [], [], r"2 processes, 2 bits 9\d\.\d%"),
    "lightning_trainer": ([], [], ["lightning"], r"2 processes, step 100, 2 bits 9\d\.\d%"),
    "lightning_trainer, fsdp": ([], ["fsdp"], ["lightning"], r"2 processes, step 100, 2 bits 9\d\.\d%"),
    "transformers_trainer": ([], [], ["transformers", "accelerate"], r"(9\d|100)%, bit for bit the same: True"),
}  # fmt: skip


@pytest.mark.skipif(not FOLDER.is_dir(), reason="installed without its examples")
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name.startswith("lightning") else []) for name in PROGRAMS
])  # fmt: skip
def test_program(name, tmp_path):
    before, after, packages, shown = PROGRAMS[name]
    for package in packages:
        pytest.importorskip(package)
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    paths = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *before, str(FOLDER / f"{name.partition(',')[0]}.py"), *after]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(shown, run.stdout), run.stdout[-2000:]


def test_accelerate(ranks, tmp_path):
    pytest.importorskip("accelerate")
    for same, steps, eps in ranks.call(cases.accelerated, str(tmp_path)):
        assert same and steps == 8 and eps < 0.01


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux' smaps")
def test_processes_share_a_packed_file(ranks, tmp_path):
    path = tmp_path / "packed.safetensors"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 1024))
    ak.save_packed(ak.pack_(ak.hard_quantize_(ak.quantize_(model))), path)
    codes = 2 * 1024 * 4096 // 2
    before = path.read_bytes()
    found = ranks.call(cases.served, str(path))
    assert torch.equal(found[0][0], found[1][0])
    for _, memory, _, moved in found:
        assert memory["Rss"] >= 0.95 * codes  # it has been read ...
        assert memory["Pss"] <= 0.55 * memory["Rss"]  # ... into pages of which each of two processes counts a half
        assert memory["Private_Dirty"] == 0
        assert moved == (False, True)  # rank 1 wrote, and nobody else saw it
    assert [of[2]["Private_Dirty"] > 0 for of in found] == [False, True]
    assert path.read_bytes() == before
