"""The contract of the published experiments (`python -m askew_kernels paper`):

* the data are what the papers say, a seed decides them, and seeds that are trained together do not see each other;
* ProxQuant's own step is its formula; a paired comparison says which way it goes, ties and single seeds included;
* rows are written after every job, a resumed run trains only what is missing, an interrupted one keeps its rows.
"""

import dataclasses
import json

import pytest
import torch

from askew_kernels import __main__ as cli
from askew_kernels.bench.suites import common
from experiments import paper

pytest.importorskip("scipy")


@pytest.fixture(autouse=True)
def one_thread():
    with common.one_thread():
        yield


def short(name, epochs=2):
    setting = next(s for s in paper.SETTINGS if s.name.startswith(name))
    return dataclasses.replace(setting, epochs=epochs)


def test_logistic_data():
    setting = short("w* of size 0.8, batch 1000")
    x, y, x_test, y_test, (w,) = setting.make(torch.Generator().manual_seed(3))
    assert x.shape == (6000, 10) and x_test.shape == (1000, 10) and float(x.abs().max()) <= 1
    assert set(y.tolist()) == {0.0, 1.0} and y_test.shape == (1000,) and w.shape == (10,)
    again = setting.make(torch.Generator().manual_seed(3))
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    # the labels' expectation: sigma(x w*), so E[(2y - 1) x] points along w*, all of whose entries are 0.8 in size
    direction = ((2 * y - 1)[:, None] * x).mean(0)
    assert float(direction.abs().min()) > 0.4 * float(direction.abs().max())


def test_moons_and_their_network():
    x, y, x_test, _, params = short("two moons").make(torch.Generator().manual_seed(0))
    assert x.shape == (2000, 2) and x_test.shape == (200, 2) and float(y.mean()) == 0.5
    upper = x[y == 0]
    assert float((upper.norm(dim=1) - 1).abs().mean()) < 0.2  # the unit circle's upper half, noise 0.1
    logits = paper._moons_logits([p[None] for p in params], x[None])
    doubled = paper._moons_logits([2 * params[0][None], params[1][None], params[2][None]], x[None])
    assert torch.allclose(logits, doubled, atol=1e-3)  # batch norm takes the size of the first layer away


@pytest.mark.parametrize("method", [paper.FULL, paper.DETERMINISTIC, paper.PROX, paper.BY_EPOCH, paper.BY_STEP])
@pytest.mark.parametrize("name", ["w* of size 1, batch 1000", "two moons"])
def test_seeds_do_not_see_each_other(name, method):
    few, more = (paper.train_small(short(name, 1), method, seeds) for seeds in (2, 3))
    for a, b in zip(few, more[:2], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3) and a.accuracy == pytest.approx(b.accuracy, abs=1)
    assert len({r.loss for r in more}) == 3 and all(len(r.curve) == 1 for r in more)


def test_every_method_learns_the_logistic_model():
    """w* in {-1, 1}^d and 6,000 points: the binarized loss of the truth is reached or nearly so."""
    setting = short("w* of size 1, batch 1000", 6)
    full = paper.train_small(setting, paper.FULL, 2)[0]
    for method in paper.METHODS[1:]:
        r = paper.train_small(setting, method, 2)[0]
        assert r.loss < full.loss + 0.05 and r.accuracy > 65


def test_proximal_map():
    w = torch.tensor([0.2, -0.2, 1.3, -1.05, 1.0, 0.95])
    paper._prox(w, 0.1)  # towards the nearer of -1 and 1 by 0.1, not beyond it
    assert torch.allclose(w, torch.tensor([0.3, -0.3, 1.2, -1.0, 1.0, 1.0]))


def test_comparisons_say_which_way_it_goes():
    low, high = {0: 1.0, 1: 1.2, 2: 0.9}, {0: 2.0, 1: 2.1, 2: 2.0, 7: 5.0}
    difference, p = paper.paired(low, high)
    assert difference == pytest.approx(-1.0) and p < 0.01 and paper.verdict(difference, p) == "lower"
    assert paper.verdict(*paper.paired(high, low)) == "HIGHER"
    assert paper.verdict(*paper.paired(low, low)) == "the same"
    assert paper.verdict(*paper.paired({0: 1.0}, {0: 2.0})) == "no significant difference"  # one seed says nothing
    mixed = {0: 1.1, 1: 1.1, 2: 0.95}
    assert paper.verdict(*paper.paired(mixed, low)) == "no significant difference"


def test_command_writes_resumes_and_is_interrupted(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(paper, "SETTINGS", [short("w* of size 1, batch 1000", 1)])
    monkeypatch.setattr(paper, "METHODS", (paper.DETERMINISTIC, paper.STOCHASTIC, paper.BY_STEP))
    arguments = ["paper", "--experiments", "logistic", "--seeds", "2", "--out", str(tmp_path)]
    real = paper.train_small

    def interrupted(setting, method, seeds):
        if method == paper.BY_STEP:
            raise KeyboardInterrupt
        return real(setting, method, seeds)

    monkeypatch.setattr(paper, "train_small", interrupted)
    assert cli.main(arguments) == 130
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and "interrupted; 4 finished rows" in capsys.readouterr().err
    trained = []
    monkeypatch.setattr(paper, "train_small", lambda s, m, n: trained.append(m) or real(s, m, n))
    assert cli.main([*arguments, "--resume"]) == 0
    assert trained == [paper.BY_STEP] and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6
    page = (tmp_path / "README.md").read_text()
    assert "| BinaryConnect, stochastic |" in page and "Of 2 comparisons:" in page
    assert (tmp_path / "logistic.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "logistic.svg").is_file()


def test_text_model_trains_at_every_width():
    r = paper.train_text("binary", "hard", seed=0, steps=20)
    assert r.loss < 4.9 and r.test_loss < 4.9 and len(r.curve) == 20  # ln 128 = 4.85 to begin with


def test_text_is_summarised_over_seeds(tmp_path, monkeypatch):
    """Accuracy is NaN there; the float model stands beside every width; the test loss decides."""

    def train_text(width, method, seed, steps):
        loss = {"float": 1.0, "straight-through": 2.0, "relaxed": 3.0, "hard": 1.5}[method] + 0.01 * seed
        test_loss = loss + 0.001 * seed * len(method)
        return paper.Result("text", width, method, seed, loss, test_loss, float("nan"), [loss], 0.1)

    monkeypatch.setattr(paper, "train_text", train_text)
    arguments = ["paper", "--experiments", "text", "--text-seeds", "3", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    page = (tmp_path / "README.md").read_text()
    assert page.count("| float | 1.0100 ± 0.0100 |") == 5 and "**binary**, 3 seeds" in page
    assert "Of 10 comparisons: 5 HIGHER, 5 lower." in page and (tmp_path / "text.png").is_file()
