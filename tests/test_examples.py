"""Contract: every program in examples/ runs as it stands, alone, in a folder of its own, and shows what it promises."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"
SHOWN = {  # what each must print
    "train": r"float 9\d\.\d%, 2 bits 9\d\.\d%",
    "resume": "bit for bit the same: True",
    "sam": r"step 100: loss 0\.\d+",
    "search": r"'average_bits': (1|2\.[0-5])",
    "deploy": r"[34],\d+ bytes, 24,872 as float32",
    "finetune": r"ternary, fine-tuned 9\d\.\d%",
}
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="installed without its examples")


def test_each_example_is_here_and_short():
    found = {path.stem: path.read_text().splitlines() for path in FOLDER.glob("*.py")}
    assert found.keys() == SHOWN.keys()
    assert all(len(lines) <= 50 for lines in found.values())


@pytest.mark.parametrize("name", SHOWN)
def test_example(name, tmp_path, monkeypatch, capsys):
    if name == "search":
        pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.search(SHOWN[name], capsys.readouterr().out)
