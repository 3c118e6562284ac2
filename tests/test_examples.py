"""Contract: every program in examples/ runs as it stands, alone, in a folder of its own, and shows what it promises."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"
SHOWN = {  # what each must print
    "train": r"float 9\d\.\d%, ternary 9\d\.\d% of 397 digits",
    "resume": r"ternary 9\d\.\d% of 397 digits, bit for bit the same: True",
    "sam": r"step 200: loss 0\.\d+, 0\.\d+ higher within the radius\n3 bits: 9\d\.\d%",
    "search": r"'average_bits': (1|2\.[0-5])",
    "deploy": r"[67],\d+ bytes, 47,\d+ as float32; 9\d\.\d% of 397 digits",
    "finetune": r"ternary, fine-tuned 9\d\.\d%",
}
TRAINERS = {"fsdp", "lightning_trainer", "transformers_trainer"}  # of tests/test_trainers.py
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="installed without its examples")


def test_each_example_is_here_and_short():
    found = {path.stem: path.read_text().splitlines() for path in FOLDER.glob("*.py")}
    assert found.keys() == {*SHOWN, *TRAINERS}
    assert all(20 <= len(lines) <= 60 for lines in found.values())


@pytest.mark.parametrize("name", SHOWN)
def test_example(name, tmp_path, monkeypatch, capsys):
    for package in {"search": ["scipy", "sklearn"]}.get(name, ["sklearn"]):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent), prepend=os.pathsep)
    torch.manual_seed(0)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.search(SHOWN[name], capsys.readouterr().out)
