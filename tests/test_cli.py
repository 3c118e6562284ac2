"""The contract of the command line, `python -m askew_kernels`:

* a request that cannot be served is one line on stderr that names the argument, exit code 2, and nothing done before;
* `--help` of every command says its defaults, `--version` the version; without a command there is help;
* unknown values of the environment's variables are errors that name the variable and what it may be;
* Ctrl-C and SIGTERM end a run at once, its processes with it, and what was finished is kept and said in one line;
* rows of an earlier run are read whole or refused by line.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import askew_kernels as ak
from askew_kernels import __main__ as cli
from askew_kernels import command, runtime
from askew_kernels.bench import runs

ROOT = Path(__file__).parent.parent


def start(*arguments, **environment):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=env, cwd=ROOT, start_new_session=True)  # fmt: skip


def python(*arguments, **environment):
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def exit_code(*arguments):
    """Of a command run in this process."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as ended:
        return ended.code


# ---- requests that cannot be served ----------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path):
    """Names in arguments: a file, a folder, a file of nonsense, and what is not there."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"nonsense\xff\n")
    return {"FILE": tmp_path / "file", "FOLDER": tmp_path / "folder", "NOWHERE": tmp_path / "nowhere"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train", "'train'"),
        ("info --yaml", "--yaml"),
        ("completion", "shell"),
        ("completion fish", "'fish' (choose from"),
        ("demo --seeds 0", "--seeds: expected a whole number from 1 on, got '0'"),
        ("demo --seeds -1", "--seeds: expected a whole number from 1 on, got '-1'"),
        ("demo --seeds two", "--seeds"),
        ("demo --workers 0", "--workers"),
        ("demo --epochs 0", "--epochs"),
        ("demo --tasks cifar", "--tasks"),
        ("demo --out FILE", "--out"),
        ("demo --out FILE/below", "--out"),
        ("demo --sam --out FILE/below", "--out"),
        ("accuracy --seeds 0", "--seeds"),
        ("accuracy --tasks cifar", "--tasks"),
        ("accuracy --data FOLDER", "dataset-fashion-mnist"),
        ("accuracy --out FILE/below", "--out"),
        ("paper --seeds 0", "--seeds"),
        ("paper --text-steps 0", "--text-steps"),
        ("paper --experiments moon", "--experiments"),
        ("paper --out FILE/below", "--out"),
        ("search --bits nan", "--bits"),
        ("search --bits 0", "--bits"),
        ("search --bits 0.5", "average_bits=0.5"),
        ("search --full --seeds 0", "--seeds"),
        ("search --full --demo", "--demo"),
        ("search --out FILE/below", "--out"),
        ("analyze", "log"),
        ("analyze NOWHERE", "nowhere"),
        ("analyze FOLDER", "folder"),
        ("analyze FILE", "file, line 1"),
        ("analyze FILE --plot FILE/below", "below"),
        ("export NOWHERE --to gguf --out FOLDER/out", "nowhere: no such file"),
        ("export NOWHERE --to gguf --out FOLDER/out --folder FILE", "nowhere: no such file"),
        ("inspect FILE --plot FOLDER", "folder: is a folder"),
        ("inspect NOWHERE", "nowhere"),
        ("inspect FOLDER", "folder"),
        ("inspect FILE", "file"),
        ("convert NOWHERE FOLDER/out --bits 4", "nowhere"),
        ("convert FILE FOLDER/out --bits 4", "file"),
        ("convert FILE FOLDER/out --bits four", "--bits"),
        ("convert FILE FOLDER/out --bits 9", "bits"),
        ("convert FILE FOLDER/out", "--bits"),
        ("bench --suite speed", "--suite"),
        ("bench --op tanh", "--op 'tanh'"),
        ("bench --plot FILE/below", "--plot"),
        ("bench --json FILE/below", "below"),
        ("bench --fill NOWHERE", "nowhere"),
        ("bench --from FOLDER", "folder"),
        ("bench tune --json FILE/below", "below"),
        ("bench tune --suite packed", "not --suite"),
        ("bench tune --from FILE", "not --from"),
        ("bench tune --part 1/2", "not --part"),
    ],
)
def test_requests_that_cannot_be_served(arguments, said, places, monkeypatch, capsys):
    for module in {"demo": ("rich", "mnist1d", "sklearn"), "search": ("rich", "mnist1d", "sklearn", "safetensors"),
                   "paper": ("rich", "scipy"), "bench": ("rich",), "inspect": ("safetensors",),
                   "convert": ("safetensors",)}.get(arguments.split()[0], ()):  # fmt: skip
        pytest.importorskip(module)
    words = arguments.split()
    for i, word in enumerate(words):
        name, slash, rest = word.partition("/")
        words[i] = str(places[name]) + slash + rest if name in places else word
    monkeypatch.chdir(places["FOLDER"])
    assert exit_code(*words) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out, err
    assert not any("Traceback" in text for text in (out, err))
    assert not places["NOWHERE"].exists() and places["FILE"].read_bytes() == b"nonsense\xff\n"


@pytest.mark.parametrize("arguments", [
    "search --bits 100 --out NOWHERE/deep", "accuracy --device cuda --out NOWHERE/deep",
    "accuracy --report --out NOWHERE/deep", "bench --json NOWHERE/deep/rows.json --csv FILE/below",
])  # fmt: skip
def test_what_is_refused_makes_no_folders(arguments, places, monkeypatch, capsys):
    for module in ("rich", "mnist1d", "sklearn", "safetensors", "matplotlib"):
        pytest.importorskip(module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("NOWHERE", "FILE"):
        arguments = arguments.replace(name, str(places[name]))
    assert exit_code(*arguments.split()) == 2
    assert not places["NOWHERE"].exists(), capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "variables"),
    [(">&-", {}), (">&- 2>&-", {}), ("", {"PYTHONIOENCODING": "ascii"}),
     ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})],
)  # fmt: skip
def test_every_stdout_is_served(how, variables, tmp_path):
    """One that was closed takes everything; what it cannot encode is shown as ?."""
    log = tmp_path / "run.jsonl"
    log.write_text('{"kind": "run", "optimizer": "ε"}\n')
    line = f"exec '{sys.executable}' -m askew_kernels analyze '{log}' {how}"
    done = subprocess.run(["sh", "-c", line], env={**os.environ, **variables}, capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    assert done.stdout == (b"" if how else b"?: 0 recorded steps, 0 notes" + os.linesep.encode()), done.stdout


def test_an_old_log_is_read_where_it_can_be(tmp_path, capsys):
    """Of what ``--resume`` finds: a line that was cut off at the end is no more than not there."""

    @dataclasses.dataclass
    class Thing:
        name: str
        size: int

    path = tmp_path / "rows.jsonl"
    assert command.read_rows(path, Thing) == []
    things = [Thing("a", 1), Thing("b", 2)]
    command.write_rows(path, things)
    assert command.read_rows(path, Thing) == things
    text = path.read_text()
    path.write_text(text[:-5])
    assert command.read_rows(path, Thing) == things[:1]
    for wrong, line in (("nonsense\n" + text, 1), (text + '{"name": "c"}\n', 3), (text + "[3]\n", 3)):
        path.write_text(wrong)
        with pytest.raises(command.Refused, match=f"rows.jsonl, line {line}: not a row"):
            command.read_rows(path, Thing)
    with pytest.raises(command.Refused, match="cannot be read"):
        command.read_rows(tmp_path, Thing)


# ---- help and version ------------------------------------------------------------------------------------------------


DEFAULTS = {
    "demo": ["(default: 2, with --full 5)", "(default: demo-results)", "(default: all)"],
    "paper": ["(default: 20)", "(default: 400)", "(default: paper-results)"],
    "search": ["(default: 1.75)", "(default: 5)", "(default: search-results)"],
    "convert": ["(default: *)"],
}


@pytest.mark.parametrize("name", ["info", *cli.COMMANDS])
def test_help_says_what_a_command_is_and_its_defaults(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")  # no line is broken
    assert exit_code(name, "--help") == 0
    text = capsys.readouterr().out
    assert "(default: None)" not in text and "(default: False)" not in text
    for said in [cli.COMMANDS[name].text[1:] if name in cli.COMMANDS else "--json", *DEFAULTS.get(name, [])]:
        assert said in text


@pytest.mark.parametrize("arguments", ["paper", "accuracy", "search --full", "demo --sam"])
def test_what_an_installed_package_lacks_is_said_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "askew_kernels" / "__main__.py"))
    assert exit_code(*arguments.split()) == 2
    out, err = capsys.readouterr()
    name = arguments.split()[0]
    assert err.startswith(f"askew_kernels: {name}: experiments.") and "checkout" in err and err.count("\n") == 1
    assert not out


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in ["info", *cli.COMMANDS])


def test_version_in_a_process():
    assert python("-m", "askew_kernels", "--version") == (0, f"askew_kernels {ak.__version__}\n", "")


def test_completion_of_a_shell(monkeypatch, capsys):
    """Of those commands whose requirements are there; without shtab one line that says how to get it."""
    asked = []
    fake = types.SimpleNamespace(complete=lambda parser, shell: asked.append((parser, shell)) or "script")
    monkeypatch.setitem(sys.modules, "shtab", fake)
    monkeypatch.setattr(cli, "need", lambda *names: None)
    monkeypatch.setitem(cli.COMMANDS, "demo", dataclasses.replace(cli.COMMANDS["demo"], module="askew_kernels.nothing"))
    assert exit_code("completion", "zsh") == 0 and capsys.readouterr().out == "script\n"
    ((parser, shell),) = asked
    assert shell == "zsh" and parser.prog == "askew-kernels"
    assert parser.parse_args(["info", "--json"]).json and parser.parse_args(["demo"]).command == "demo"
    monkeypatch.undo()
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert exit_code("completion", "bash") == 2
    assert capsys.readouterr().err == (
        'askew_kernels: completion needs shtab, which is not installed: pip install "askew_kernels[completion]"\n'
    )


def test_a_reader_that_has_gone_is_no_traceback():
    process = start("-m", "askew_kernels", "info", PYTHONUNBUFFERED="")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(100) == 1
    process.stderr.close()


# ---- the environment -------------------------------------------------------------------------------------------------

UNKNOWN = {
    "ASKEW_BACKEND": ("fast", "expected auto, cpp, triton, reference, got 'fast'"),
    "ASKEW_CPU_CAPABILITY": ("sse", "expected baseline, avx2, avx512, got 'sse'"),
    "ASKEW_TUNING": ("quick", "expected auto, default or a JSON file, got 'quick'"),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("variable", UNKNOWN)
def test_unknown_values_in_the_environment(variable, compiled, monkeypatch):
    for name in UNKNOWN:
        monkeypatch.delenv(name, raising=False)
    if not compiled:
        monkeypatch.setattr(runtime, "_C", None)
    value, said = UNKNOWN[variable]
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"^{variable}: .*{said}"):
        runtime._read_environment()


def test_unknown_values_end_a_command_with_one_line():
    code, out, err = python("-m", "askew_kernels", "info", ASKEW_BACKEND="fast")
    assert (code, out) == (2, "") and err.startswith("askew_kernels: ASKEW_BACKEND: ") and err.count("\n") == 1


# ---- what ends a run -------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """Ctrl-C reaches the processes that are started, also where this one is a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def gone(session, seconds):
    """Whether every process of a session ends within so many seconds."""
    for _ in range(10 * seconds):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals of POSIX")
def test_an_interrupted_demo_ends_with_its_processes_and_keeps_its_rows(tmp_path, interruptible):
    for module in ("rich", "matplotlib", "mnist1d", "sklearn"):
        pytest.importorskip(module)
    process = start("-m", "askew_kernels", "demo", "--no-bench", "--tasks", "digits / MLP", "--widths", "4 bits",
                    "--seeds", "100", "--workers", "2", "--out", tmp_path)  # fmt: skip
    rows = tmp_path / "accuracy.jsonl"
    for _ in range(900):
        if rows.is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130, err
    finished = [json.loads(line) for line in rows.read_text().splitlines()]
    assert err == f"askew_kernels: interrupted; {len(finished)} finished rows are in {rows}\n" and finished
    assert "Training 500 models, 100 of them with a learned scale" in out and (tmp_path / "accuracy.md").is_file()
    assert gone(process.pid, 10)


def test_an_interrupt_while_torch_is_imported(interruptible):
    process = start("-X", "importtime", "-m", "askew_kernels", "info")
    for line in process.stderr:
        if "| torch" in line or "|   torch" in line or "torch." in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in err


@pytest.mark.parametrize(("number", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_signals_in_a_command(number, code, said, monkeypatch, interruptible, capsys):
    def run(arguments):
        signal.raise_signal(getattr(signal, number))

    monkeypatch.setattr(cli, "info", run)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["info"]) == code
    assert capsys.readouterr().err == f"askew_kernels: {said}\n" and signal.getsignal(signal.SIGTERM) is before


def failing(results, problem):
    """In place of a demo's trainings: these results, then the end."""

    def run_all(jobs, workers, train=None):
        yield from results(jobs)
        raise problem

    return run_all


def test_an_interrupted_sam_demo_resumes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    pytest.importorskip("mnist1d")
    from experiments import common, sam

    def result(job):
        numbers = {"accuracy": 90.0, "after": {}, "eigenvalue": 1.0, "rise": 0.1, "seconds": 1.0}
        return [sam.Result(**dataclasses.asdict(job), **numbers)]

    arguments = [
        "demo",
        "--sam",
        "--tasks",
        "digits / MLP",
        "--widths",
        "4 bits",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(common, "run_all", failing(lambda jobs: map(result, jobs[:3]), KeyboardInterrupt()))
    assert cli.main(arguments) == 130
    path = tmp_path / "sam.jsonl"
    assert capsys.readouterr().err.endswith(f"interrupted; 3 finished rows are in {path}\n")
    assert len(path.read_text().splitlines()) == 3
    monkeypatch.setattr(common, "run_all", lambda jobs, workers, train: (r for r in map(result, jobs)))
    monkeypatch.setattr(sam, "plot", lambda rows: {})
    assert cli.main(arguments) == 0
    assert "20 models, 17 of them to train" in capsys.readouterr().err and len(path.read_text().splitlines()) == 20
    assert cli.main([*arguments[:3], "mnist1d / MLP", *arguments[4:]]) == 0  # rows of other tasks stay
    assert len(path.read_text().splitlines()) == 40


def test_an_interrupted_search_resumes(tmp_path, monkeypatch, capsys):
    for module in ("sklearn", "rich", "mnist1d", "safetensors", "scipy", "matplotlib"):
        pytest.importorskip(module)
    from experiments import common, search

    def made(job):
        return [search.Row(job.pair, 1.25, job.seed, "ASGA", "target", {"0": 1}, 1.2, 80.0, 90.0, 95.0, 1.0)]

    arguments = ["search", "--full", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(common, "run_all", failing(lambda jobs: map(made, jobs[:1]), command.Terminated()))
    assert cli.main(arguments) == 143
    assert capsys.readouterr().err.endswith(f"terminated; 1 finished rows are in {tmp_path / 'search.jsonl'}\n")
    monkeypatch.setattr(common, "run_all", lambda jobs, workers, train: (r for r in map(made, jobs)))
    monkeypatch.setattr(search, "plot", lambda lines: {})
    assert cli.main(arguments) == 0 and "4 cases, 3 of them to make" in capsys.readouterr().err


def test_an_interrupted_demo_without_rows_leaves_earlier_ones(tmp_path, monkeypatch, capsys):
    for module in ("rich", "matplotlib", "mnist1d", "sklearn"):
        pytest.importorskip(module)
    from askew_kernels import demo

    (tmp_path / "accuracy.jsonl").write_text("of an earlier run")
    monkeypatch.setattr(demo, "run_all", failing(lambda jobs: [], KeyboardInterrupt()))
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "askew_kernels: interrupted; no row was finished\n"
    assert (tmp_path / "accuracy.jsonl").read_text() == "of an earlier run"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_an_interrupted_bench_ends_its_child(tmp_path, monkeypatch):
    """Its pipes are read by a thread: closing them before the child has ended would wait for it."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho \'{"tick": "a case"}\'\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setattr(runs.sys, "executable", str(script))
    if runs.platform.libc_ver(sys.executable)[0] != "glibc":
        monkeypatch.setattr(runs.platform, "libc_ver", lambda: ("glibc", ""))

    def tick(name):
        raise KeyboardInterrupt

    started = time.monotonic()
    rows = runs.run_entries_warm(runs.Choice("linear", True, True, "", (1, 1)), runs.torch.device("cpu"), tick)
    with pytest.raises(KeyboardInterrupt):
        next(rows)
    assert time.monotonic() - started < 30  # of the child's 60
