"""Contract: a telemetry log holds whole lines that ``analysis.read_log`` takes, whatever happens around the run.

1. What cannot be written is taken back and said once; the next line, and the line that opens the run, come through.
2. Only a log is appended to; one that was cut off is gone on with after its last whole line.
3. The file stays where it was opened; a path of bytes is a path.
4. ``log(...)`` takes numbers of any kind and names what it cannot hold before it writes.
5. Threads, another default dtype and inference mode do not change a line.
"""

from __future__ import annotations

import json
import os
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.analysis import read_log


def run(path, steps=0):
    """An optimizer that records every step, after some."""
    torch.manual_seed(0)
    model = ak.quantize_(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, telemetry_every=1, telemetry_log=path)
    walk(model, optimizer, steps)
    return model, optimizer


def walk(model, optimizer, steps):
    x = torch.linspace(-1, 1, 24, dtype=next(model.parameters()).dtype).reshape(4, 6)
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def steps_of(path):
    return [line["step"] for line in read_log(path)["steps"]]


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a process")
@pytest.mark.parametrize("begun", [False, True])
def test_a_line_that_does_not_fit_is_taken_back(tmp_path, begun):
    import resource

    path = tmp_path / "run.jsonl"
    model, optimizer = run(path, 3 if begun else 1)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))  # half a line fits
    try:
        with pytest.warns(UserWarning, match=r"telemetry_log: .*run.jsonl.*the line is lost"):
            walk(model, optimizer, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    walk(model, optimizer, 2)
    optimizer.log(epoch=1)
    assert steps_of(path) == ([1, 2, 4, 5, 6] if begun else [2, 3, 4])
    assert len(read_log(path)["notes"]) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_stops_nothing():
    with pytest.warns(UserWarning, match="/dev/full.*No space"):
        run("/dev/full", 3)


def test_a_file_of_another_kind_is_refused_as_it_is(tmp_path):
    path = tmp_path / "weights.bin"
    for content in (b"no newline", b"{}\n{}\n", b'{"kind": "step"}\n', b"\0" * 50):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="telemetry_log: .*weights.bin: is no telemetry log"):
            run(path)
        assert path.read_bytes() == content
    with pytest.raises(TypeError, match="telemetry_log: expected a path, got 3"):
        run(3)


def test_a_log_that_was_cut_off_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "run.jsonl"
    run(path, 4)[1].log(epoch=1)
    whole = path.read_bytes()
    assert steps_of(path) == [1, 2, 3, 4]
    for cut in (len(whole) - 1, whole.index(b"\n") + 20, 9, 0):
        path.write_bytes(whole[:cut])
        run(path, 3)[1].log(epoch=1)
        assert steps_of(path) == [1, 2, 3]
        for line in path.read_bytes().splitlines():
            json.loads(line)


def test_a_log_goes_on_after_a_checkpoint_was_loaded(tmp_path):
    model, optimizer = run(tmp_path / "log", 2)
    optimizer.load_state_dict(optimizer.state_dict())
    walk(model, optimizer, 2)
    optimizer.log()
    assert [step["step"] for step in read_log(tmp_path / "log")["steps"]] == [1, 2, 3, 4]


def test_the_file_stays_where_it_was_opened(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    model, optimizer = run(os.fsencode("run.jsonl"))
    monkeypatch.chdir(tmp_path / "there")
    walk(model, optimizer, 3)
    assert steps_of(tmp_path / "run.jsonl") == [1, 2] and not list((tmp_path / "there").iterdir())


# ---- lines ----------------------------------------------------------------------------------------------------------


def test_numbers_of_any_kind(tmp_path):
    path = tmp_path / "run.jsonl"
    _, optimizer = run(path, 1)
    optimizer.log(
        loss=torch.tensor(0.5, requires_grad=True), half=torch.tensor([1.5], dtype=torch.bfloat16), a=np.float32(0.25),
        b=np.arange(2), c=np.int64(3), d={"x": [np.float64("nan"), float("inf")]}, word="w", flag=True, none=None,
    )  # fmt: skip
    (note,) = read_log(path)["notes"]
    expected = {"loss": 0.5, "half": [1.5], "a": 0.25, "b": [0, 1], "c": 3, "d": {"x": [None, None]}, "word": "w"}
    assert {**note, **expected} == note and note["flag"] is True and note["none"] is None


@pytest.mark.parametrize(
    ("numbers", "error", "match"),
    [
        ({"model": object()}, TypeError, "model: expected numbers.*object"),
        ({"x": {"y": [1j]}}, TypeError, "x: expected numbers.*1j"),
        ({"kind": "step"}, ValueError, "kind: .*another name"),
        ({"histograms": 1, "epoch": 1}, ValueError, "histograms: .*another name"),
        ({"step": "last"}, TypeError, "step: expected an int, got 'last'"),
    ],
)
def test_what_a_line_cannot_hold_is_named_and_nothing_written(tmp_path, numbers, error, match):
    path = tmp_path / "run.jsonl"
    _, optimizer = run(path, 3)
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        optimizer.log(**numbers)
    assert path.read_bytes() == before
    optimizer.log(epoch=1)
    assert steps_of(path) == [1, 2, 3]


@pytest.mark.parametrize("loss", [(torch.tensor(1.0), 2), torch.ones(2), "none", None])
def test_a_closure_may_return_what_is_no_loss(tmp_path, loss):
    path = tmp_path / "run.jsonl"
    model, optimizer = run(path)
    for _ in range(3):
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step(lambda: loss)
    assert steps_of(path) == [1, 2] and "loss" not in read_log(path)["steps"][0]


def test_threads_write_whole_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    _, optimizer = run(path, 2)
    padding = "x" * 20_000  # longer than a buffer

    def notes(thread):
        for i in range(10):
            optimizer.log(thread=thread, i=i, padding=padding)

    threads = [threading.Thread(target=notes, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(n["thread"], n["i"]) for n in read_log(path)["notes"]]
    assert sorted(found) == [(t, i) for t in range(4) for i in range(10)]
    assert steps_of(path) == [1, 2] and path.read_bytes().count(b'"kind": "run"') == 1


def test_ambient_modes_change_no_line(tmp_path):
    lines = []
    for mode in ("none", "float64", "inference"):
        path = tmp_path / f"{mode}.jsonl"
        model, optimizer = run(path)
        for epoch, steps in enumerate((3, 1)):
            walk(model, optimizer, steps)
            torch.set_default_dtype(torch.float64 if mode == "float64" else torch.float32)
            try:
                with torch.inference_mode(mode == "inference"):
                    optimizer.log(epoch=epoch)
            finally:
                torch.set_default_dtype(torch.float32)
        lines.append([json.loads(line) for line in path.read_text().splitlines()])
    for found in lines:
        del found[0]["time"]
    assert lines[0] == lines[1] == lines[2] and len(lines[0]) == 7
