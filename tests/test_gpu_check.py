"""Contract of ``benchmarks/gpu_check.py``, which is to be used at once whenever a GPU is at hand, without one.

1. A budget is shared among the parts by their limits, never exceeded, and what one leaves over goes to the later ones.
2. A part at its limit is asked to end, then killed with all its processes; a failing or hanging part hides no other.
3. After each part the results so far are whole: logs, rows, summary and one archive; failures are named in the summary.
4. Requests that make no sense are one line and exit code 2; the rehearsal runs its parts on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from askew_kernels import reference, runtime
from askew_kernels.ops import schema

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PYTHON = [sys.executable, "-u", "-c"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu_check, gpu_smoke = load("gpu_check"), load("gpu_smoke")
Part = gpu_check.Part


def python(*lines):
    return [*PYTHON, "\n".join(lines)]


SLEEP = python("import time", "print('row 1')", "time.sleep(1000)")
STUBBORN = python("import signal, time", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "print('here')",
                  "time.sleep(1000)")  # fmt: skip


def alive(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# ---- the budget -----------------------------------------------------------------------------------------------------


def test_limits_fill_the_usual_budget():
    assert sum(gpu_check.LIMITS.values()) == 500
    assert gpu_check.allowance(list(gpu_check.LIMITS.values()), 500) == gpu_check.LIMITS["build"]


def test_time_left_over_goes_to_the_parts_to_come():
    assert gpu_check.allowance([10, 30], 20) == 5
    assert gpu_check.allowance([30], 20) == 20
    assert gpu_check.allowance([10, 10], -3) == 0


def test_what_a_part_is_of_no_use_without_is_kept_for_it():
    assert gpu_check.allowance([10, 90], 100, [30, 0]) == 30
    assert gpu_check.allowance([90, 10], 100, [0, 30]) == 70
    assert gpu_check.allowance([10, 90], 20, [30, 0]) == 2  # there is not enough for all of them
    names, left = list(gpu_check.LIMITS), 280.0
    for i, name in enumerate(names):
        seconds = gpu_check.allowance([gpu_check.LIMITS[n] for n in names[i:]], left,
                                      [gpu_check.LEAST.get(n, 0.0) for n in names[i:]])  # fmt: skip
        assert seconds >= gpu_check.LEAST.get(name, 0.0)
        left -= seconds
    assert left >= -1e-9


@pytest.mark.parametrize("used", [0.2, 1.0])
def test_parts_that_use_their_allowance_end_with_the_budget(used):
    limits, left = [120.0, 30.0, 150.0, 20.0], 200.0
    for i in range(len(limits)):
        left -= used * gpu_check.allowance(limits[i:], left)
    assert left >= -1e-9 and (used < 1 or left < 1e-9)


def test_the_budget_ends_parts_that_never_do(tmp_path):
    parts = [Part(name, limit, [STUBBORN]) for name, limit in (("a", 1), ("b", 2))]
    began = time.monotonic()
    results = gpu_check.run_parts(parts, 4.0, "title", tmp_path, {"logs": tmp_path})
    assert time.monotonic() - began < 5 and [r.state for r in results] == ["stopped", "stopped"]


# ---- one part -------------------------------------------------------------------------------------------------------


def test_a_part_at_its_limit_is_asked_to_end_and_keeps_what_it_has(tmp_path):
    rows = tmp_path / "rows"
    polite = python("import signal, time, sys, pathlib",
                    f"end = lambda *_: (pathlib.Path({str(rows)!r}).write_text('kept'), sys.exit(143))",
                    "signal.signal(signal.SIGTERM, end)", "print('began')", "time.sleep(1000)")  # fmt: skip
    result = gpu_check.run_part(Part("step", 1, [polite, python("print('never')")]), 1.0, tmp_path)
    assert result.state == "stopped" and result.seconds < 2 and rows.read_text() == "kept"
    log = (tmp_path / "step.log").read_text()
    assert "began" in log and "never" not in log


def test_what_it_started_is_killed_too(tmp_path):
    child = tmp_path / "pid"
    command = python("import subprocess, sys, time, pathlib", "p = subprocess.Popen([sys.executable, '-c',"
                     " 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)'])",
                     f"pathlib.Path({str(child)!r}).write_text(str(p.pid))", "time.sleep(1000)")  # fmt: skip
    gpu_check.run_part(Part("tests", 1, [command]), 1.0, tmp_path)
    deadline = time.monotonic() + 5
    while alive(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(child.read_text()))


def test_commands_go_on_after_one_that_failed_and_failures_are_kept(tmp_path, capsys):
    commands = [python("print('cpp row_sums ... WRONG 3 times'); raise SystemExit(1)"), python("print('fine')")]
    result = gpu_check.run_part(Part("smoke", 9, commands), 9.0, tmp_path)
    assert result.state == "failed" and result.failures == ["cpp row_sums ... WRONG 3 times"]
    assert "fine" in (tmp_path / "smoke.log").read_text() and "WRONG" in capsys.readouterr().out


def test_commands_together_run_at_once(tmp_path):
    meet = python("import pathlib, sys, time", f"here = pathlib.Path({str(tmp_path)!r})",
                  "(here / f'{time.time_ns()}.here').touch()",
                  "while len(list(here.glob('*.here'))) < 2: time.sleep(0.01)")  # fmt: skip
    assert gpu_check.run_part(Part("smoke", 9, [meet, meet], together=True), 9.0, tmp_path).state == "passed"


def test_output_is_shown_as_it_comes_and_not_without_end(tmp_path, capsys):
    part = Part("step", 9, [python("for i in range(500): print('line', i)")], shown=lambda line: True)
    gpu_check.run_part(part, 9.0, tmp_path)
    assert capsys.readouterr().out.count("line") == gpu_check.MOST_SHOWN
    assert (tmp_path / "step.log").read_text().count("\n") == 501


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_everything_so_far_is_archived_after_each_part(tmp_path):
    logs, out = tmp_path / "logs", tmp_path / "out"
    logs.mkdir()
    out.mkdir()
    seen = python("import json, pathlib, tarfile", f"out = pathlib.Path({str(out)!r})",
                  "print(tarfile.open(out / 'gpu_check.tar.gz').getnames())",
                  "print([p['part'] for p in json.loads((out / 'summary.json').read_text())['parts']])",
                  f"here = pathlib.Path({str(logs)!r}) / 'summary after first'",
                  "here.write_text((out / 'summary.txt').read_text())")  # fmt: skip
    parts = [Part("first", 1, [python("print('FAILED a test: so')", "raise SystemExit(1)")]), Part("second", 9, [seen])]
    results = gpu_check.run_parts(parts, 20.0, "title", out, {"logs": logs})
    assert [r.state for r in results] == ["failed", "passed"]
    assert "not reached: second" in (logs / "summary after first").read_text()
    assert "not reached" not in (out / "summary.txt").read_text()
    log = (logs / "second.log").read_text()
    assert "['logs/first.log']" in log and "['first']" in log
    assert sorted(p.name for p in out.iterdir()) == ["gpu_check.tar.gz", "summary.json", "summary.txt"]
    with tarfile.open(out / "gpu_check.tar.gz") as tar:
        assert tar.getnames() == ["logs/first.log", "logs/second.log", "logs/summary after first"]
    text = (out / "summary.txt").read_text()
    assert "first: FAILED a test: so" in text and text.splitlines()[-2:][0].split()[:2] == ["first", "failed"]


def test_what_was_not_reached_is_said_at_the_end(tmp_path):
    rows = python("import time", "print('3 of 14 cases', flush=True)", "time.sleep(1000)")
    parts = [Part("step", 1, [rows]), Part("train", 0.001, [SLEEP]), Part("linear", 0.001, [SLEEP])]
    results = gpu_check.run_parts(parts, 2.5, "title", tmp_path, {"logs": tmp_path})
    assert [r.state for r in results] == ["stopped"] * 3 and results[1].seconds == 0
    text = (tmp_path / "summary.txt").read_text()
    assert text.endswith("not reached: step (after 3 of 14 cases), train (after nothing), linear (after nothing)\n")
    assert json.loads((tmp_path / "summary.json").read_text())["parts"][0]["reached"] == "3 of 14 cases"


def test_progress_is_read_from_suites_tests_and_smoke():
    progress = gpu_check.Progress()
    for line in ("0 of 5 cases", "2 of 5 cases", "..s.....  [ 41%]", "cpp row_sums ... ok (4 samples, 0.1 s)",
                 "cpp sam_norm ... WRONG 3", "graphs MLP, torch fused ... ok eager 1 ms"):  # fmt: skip
        progress.take(line)
    assert str(progress) == "2 of 5 cases, 41 % of the tests, 2 checks"
    assert str(gpu_check.Progress()) == ""


def test_clocks_and_power_are_told_as_ranges():
    assert gpu_check.clocks_text("1980, 3201, 412.20, 45\n1755, 3201, 690.5, 61\n[N/A], 1\n") == (
        "1755-1980 MHz, 3201-3201 MHz memory, 412.2-690.5 W, 45-61 °C"
    )
    assert gpu_check.clocks_text("") == "" and gpu_check.Clocks(None).end() == ""


def test_clocks_are_asked_while_a_part_runs_and_only_asked(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" > "$0.asked"\nwhile true; do echo "1980, 3201, 400.5, 45"; sleep 0.2; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    parts = [Part("step", 20, [python("import time", "time.sleep(0.7)")])]
    results = gpu_check.run_parts(parts, 20.0, "title", tmp_path, {"logs": tmp_path})
    assert results[0].clocks == "1980-1980 MHz, 3201-3201 MHz memory, 400.5-400.5 W, 45-45 °C"
    assert results[0].clocks in (tmp_path / "summary.txt").read_text()
    assert (tmp_path / "nvidia-smi.asked").read_text().startswith("--query-gpu=clocks.sm")


def test_an_archive_is_replaced_whole(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("disk full")

    gpu_check.write_whole(tmp_path / "a", lambda path: path.write_text("whole"))
    with pytest.raises(OSError):
        gpu_check.write_whole(tmp_path / "a", fails)
    assert (tmp_path / "a").read_text() == "whole"


def test_the_summary_stays_short():
    results = [gpu_check.Result(n, "failed", 1.0, [f"FAILED {n} " + "x" * 280] * 100, []) for n in gpu_check.LIMITS]
    text = gpu_check.summary(results, "title")
    assert len(text) < 16_000 and "and 92 more, see build.log" in text


# ---- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "smok"],
            "expected the parts build, smoke, tests, step, packed, train, fake_quant, linear, sanitizer, page",
        ),
        (["--skip", "nothing"], "got 'nothing'"),
        (["--only", "step", "--skip", "step"], "no part is left to run"),
        (["--rehearse", "--budget", "0"], "--budget: expected seconds > 0, got 0"),
    ],
)
def test_requests_that_make_no_sense(arguments, message, capsys):
    assert gpu_check.main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_list_names_the_parts_and_runs_nothing(capsys):
    assert gpu_check.main(["--list", "--only", "tests", "build"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["build", "tests"]


def test_the_rehearsal_leaves_the_build_out_unless_asked():
    known = list(gpu_check.LIMITS)
    assert gpu_check.chosen(known, [], [], True) == known[1:]
    assert gpu_check.chosen(known, ["build"], [], True) == ["build"]
    assert gpu_check.chosen(known, [], ["tests"], False) == [n for n in known if n != "tests"]


def test_every_part_has_a_limit_and_the_tests_collect_all_that_are_marked(tmp_path):
    parts = gpu_check.make_parts(False, tmp_path, tmp_path, "9.0")
    assert list(parts) == list(gpu_check.LIMITS) and parts["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    command = parts["tests"].commands[0]
    assert {"tests/test_device.py", "tests/test_triton.py", "tests/test_sam.py"} <= set(command)
    smoke = [" ".join(c) for c in parts["smoke"].commands]
    assert "gpu_smoke.py cpp --device cuda" in smoke[0]
    assert [c.partition("--part ")[2] for c in smoke[1:]] == ["1/4", "2/4", "3/4", "4/4"]


def test_a_prebuilt_extension_is_asked_whether_it_serves(tmp_path):
    made = gpu_check.make_parts(False, tmp_path, tmp_path, "9.0", prebuilt=True)["build"].commands
    assert not any("build_ext" in c for c in made) and "choose_backend" in made[-1][-1]


def test_the_sanitizer_runs_the_small_smoke_part_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "/x/compute-sanitizer")
    part = gpu_check.make_parts(False, tmp_path, tmp_path, "9.0")["sanitizer"]
    text = " ".join(part.commands[0])
    assert text.startswith("/x/compute-sanitizer --tool memcheck --error-exitcode 1") and text.endswith("cpp --small")
    assert part.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert gpu_check.BAD.search("========= ERROR SUMMARY: 3 errors")
    assert gpu_check.BAD.search("========= Invalid __global__ write of size 4 bytes")
    assert not gpu_check.BAD.search("========= ERROR SUMMARY: 0 errors")
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "")
    part = gpu_check.make_parts(False, tmp_path, tmp_path, "9.0")["sanitizer"]
    result = gpu_check.run_part(part, 20.0, tmp_path)
    assert result.state == "passed" and "compute-sanitizer is not installed" in (tmp_path / "sanitizer.log").read_text()


# ---- failures of pytest, smoke --------------------------------------------------------------------------------------


def test_a_failing_test_is_said_when_it_fails(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_a():\n    assert 1 == 2, 'because'\n")
    (tmp_path / "test_other.py").write_text("import no_such_module\n")
    part = Part("tests", 30, [[*gpu_check.PYTEST, str(tmp_path)]], environment={"PYTHONPATH": str(BENCHMARKS)})
    result = gpu_check.run_part(part, 30.0, tmp_path)
    assert len(result.failures) == 2 and result.state == "failed"
    assert "test_other.py" in result.failures[0] and "No module named 'no_such_module'" in result.failures[0]
    assert "test_it.py::test_a: AssertionError: because" in result.failures[1]
    assert (tmp_path / "tests.log").read_text().count("assert 1 == 2") == 2  # the line and what pytest says of it


def test_smoke_has_samples_of_every_operator():
    assert {name for name, _ in gpu_smoke.samples(small=True)} == set(schema.OPERATORS)


def test_parts_of_the_smoke_checks_are_all_of_them(monkeypatch, capsys):
    made = [(f"operator {k}", lambda: "fine") for k in range(7)]
    monkeypatch.setattr(gpu_smoke, "checks", lambda *a: made)
    for i in (1, 2, 3):
        assert gpu_smoke.smoke("reference", "cpu", True, 0, (i, 3)) == 0
    said = re.findall(r"operator \d", capsys.readouterr().out)
    assert sorted(said) == [name for name, _ in made] and said[:3] == ["operator 0", "operator 3", "operator 6"]


def test_smoke_finds_a_wrong_result_and_goes_on(monkeypatch, capsys):
    def wrong(w, rows):
        return torch.ones(rows, 3)

    def raises(*args):
        raise RuntimeError("an illegal memory access\nand more")

    replaced = {"row_sums": wrong, "sam_restore_": raises}
    monkeypatch.setattr(runtime, "implementation", lambda backend, name: replaced.get(name, getattr(reference, name)))
    monkeypatch.setattr(gpu_smoke, "checks", lambda *a, made=gpu_smoke.checks: made(*a)[: len(schema.OPERATORS)])
    assert gpu_smoke.smoke("reference", "cpu", True, 0) == 1
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(schema.OPERATORS)
    assert " WRONG sample 0: " in lines["row_sums"]
    assert lines["sam_restore_"].endswith("RAISED RuntimeError: an illegal memory access")
    assert [name for name, line in lines.items() if " ok (" not in line] == ["row_sums", "sam_restore_"]


def rehearsal(tmp_path, *arguments):
    """(what it printed, its summary, the names in its archive) of a rehearsal in which everything passed."""
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--rehearse", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout) < 12_000
    parts = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    with tarfile.open(tmp_path / "out" / "gpu_check.tar.gz") as tar:
        return done.stdout, [(p["part"], p["state"]) for p in parts], set(tar.getnames())


def test_smoke_rehearsed_on_the_cpu(tmp_path):
    printed, parts, names = rehearsal(tmp_path, "--only", "smoke", "--budget", "90")
    for backend in ("cpp", "triton"):
        assert all(f"{backend} {name} ... ok" in printed for name in schema.OPERATORS)
    assert parts == [("smoke", "passed")] and names == {"logs/smoke.log"}


@pytest.mark.slow
def test_all_parts_rehearsed_on_the_cpu(tmp_path):
    _, parts, names = rehearsal(tmp_path)
    assert parts == [(name, "passed") for name in gpu_check.LIMITS if name != "build"]
    assert {"logs/tests.log", "logs/graphs.json", "logs/step.json", "results/rows.json", "results/README.md"} <= names


def test_sigterm_ends_the_part_that_runs_and_keeps_those_before(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--rehearse", "--only", "train"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "OUT": str(tmp_path), "TMPDIR": str(tmp_path)})  # fmt: skip
    assert child.stdout is not None
    while "graphs" not in child.stdout.readline():
        pass
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=20)
    assert child.returncode == 143
