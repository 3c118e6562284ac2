"""Contract: what the documents show works as it is written.

1. Every ```python block of docs/pytorch.md runs after the page's first one, alone, in a folder of its own; each
   asserts what the paragraph above it claims.
2. README's examples run in small, one after another; those of docs/deploy.md as they are.
3. Links between the documents lead to files that exist.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="installed without its documents")


def blocks(name):
    """[(line, code)] of the ```python blocks of a document."""
    path = ROOT / name
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 2, m[1]) for m in found]


def run(name, line, code, namespace):
    """Runs a block; tracebacks show its lines by their numbers in the document."""
    exec(compile("\n" * (line - 1) + code, str(ROOT / name), "exec"), namespace)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A folder of its own, seeded generators, no process group that is left over."""
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


PAGE = "docs/pytorch.md"
FIRST, *EXAMPLES = blocks(PAGE) or [None]


@pytest.mark.parametrize(("line", "code"), EXAMPLES, ids=[f"line-{line}" for line, _ in EXAMPLES])
def test_page(line, code):
    if "distributed" in code and not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    if "ak.analysis" in code:
        pytest.importorskip("scipy")
    names = {"__name__": "example"}
    run(PAGE, *FIRST, names)
    run(PAGE, line, code, names)


def test_examples_are_short_and_can_fail():
    assert len(EXAMPLES) > 30
    for line, code in EXAMPLES:
        assert "assert" in code and len(code.splitlines()) <= 20, f"{PAGE}:{line}"


class Loss:
    """A loss whose backward is that of the model as it stands when it is called."""

    def __init__(self, model):
        self.model = model

    def backward(self):
        functional.cross_entropy(self.model(torch.ones(10, 784)), torch.arange(10)).backward()


def closure(model):
    def call():
        loss = functional.cross_entropy(model(torch.ones(10, 784)), torch.arange(10))
        loss.backward()
        return loss

    return call


def three_layers(width):
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def test_readme():
    train, leave_out, deploy, sharpness, search = blocks("README.md")
    names = {"__name__": "example"}

    assert "steps = 1000" in train[1]
    run("README.md", train[0], train[1].replace("steps = 1000", "steps = 40"), names)
    trained = names["model"]
    for layer in ak.nn.quantized_layers(trained).values():
        assert layer.weight_scale_frozen and torch.equal(layer.weight, layer.quantized_weight())
    x = torch.randn(5, 784)
    expected = trained(x)

    names["network"] = three_layers(16)
    run("README.md", *leave_out, names)
    assert list(ak.nn.quantized_layers(names["network"])) == ["2"]

    names["build_model"] = lambda: nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    run("README.md", *deploy, names)
    assert names["model"] is not trained
    torch.testing.assert_close(names["model"](x), expected)

    names["model"] = model = ak.quantize_(three_layers(16))
    names |= {"closure": closure(model), "loss": Loss(model), "loss2": Loss(model)}
    functional.cross_entropy(model(x), torch.zeros(5, dtype=torch.long)).backward()
    run("README.md", *sharpness, names)
    assert names["optimizer"].state_dict()["param_groups"][0]["sam_steps"] == 2

    pytest.importorskip("scipy")
    batches = [(torch.randn(16, 784), torch.randint(0, 10, (16,))) for _ in range(2)]
    names |= {"model": three_layers(16), "target": three_layers(24), "loader": batches}
    names["loss_fn"] = functional.cross_entropy
    run("README.md", *search, names)
    policy = names["policy"]
    assert len(ak.nn.quantized_layers(names["target"])) == 3
    costs = ak.search.policy_costs(policy, ak.search.trace(three_layers(16), batches[0][0]))
    assert costs["average_bits"] <= 3.0


def test_deploy():
    for package in ("gguf", "transformers"):
        pytest.importorskip(package)
    names = {"__name__": "example"}
    for line, code in blocks("docs/deploy.md"):
        run("docs/deploy.md", line, code, names)
    weights, _ = ak.deploy.formats.FORMATS["gguf"].load().dequantized("model.gguf")
    assert all(map(torch.equal, weights.values(), names["validated"]))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
