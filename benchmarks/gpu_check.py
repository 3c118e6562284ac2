"""``make gpu-check``: everything that needs a GPU, in one command, offline, with the Python that runs it.

    python benchmarks/gpu_check.py [--budget 500] [--rehearse] [--prebuilt] [--only PART ...] [--skip PART ...] [--list]

The parts, in this order, the most telling first, whatever became of those before:

* ``build``: in place, for this machine's GPU alone (no virtual environment, whatever torch >= 2.11 is there);
* ``smoke``: every operator and every use of the layers once against the reference, C++ and Triton (gpu_smoke.py);
* ``tests``: ``pytest -m gpu``, over 8 processes where pytest-xdist is there;
* ``step``, ``packed``, ``fake_quant``, ``linear``: rows of these suites for the C++ and the Triton kernels, beside
  torch.optim, eager, torch.compile and the libraries that are installed, with the device's ceilings in the same turns;
* ``train``: whole training steps, eager and as CUDA graphs, a wide GPT under autocast, then the MLP of the suite;
* ``sanitizer``: the C++ smoke part, small, under compute-sanitizer's memcheck, where that is installed;
* ``page``: all rows as JSON and CSV, plots and a Markdown page in ``benchmarks/results/<device>/``.

``--budget``: seconds for all of it. A part gets the share of what is left that its own limit has in the limits of the
parts still to come, so time that one leaves over goes to the later ones, but no less than what it is of no use without
(LEAST). At its limit a part is asked to end (a suite keeps the rows it has), then killed with all its processes. After
each part all results so far are in ``$OUT`` (else ``build/gpu_check``): ``gpu_check.tar.gz`` with logs, rows and plots,
``summary.txt`` and ``summary.json``, which also say what was not reached, and at which clocks and power each part ran
(asked of nvidia-smi, never set).
``--prebuilt``: the extension that is there is used as it is; the build only asks whether it serves this GPU.
``--rehearse``: the same on the CPU with small tensors and few tests, without the build.

The exit code is 0 if every part passed, 1 if not, 2 without a GPU or where the request makes no sense.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MOST_LOG = 4_000_000  # bytes of a part's output that are kept
MOST_SHOWN = 80  # lines of a part's output that are printed, beside its failures in the table
GRACE = 6.0  # seconds in which a part that was asked to end may write what it has
BAD = re.compile(
    r"^(FAILED|ERROR)\b|\b(WRONG|RAISED)\b|^askew_kernels: |^\S*Error: |^=+ (Invalid|ERROR SUMMARY: [1-9])"
)
DONE = (  # what a line says of how far its command is: a number done, or done of all
    re.compile(r"^(\d+) of (\d+) cases"), re.compile(r"^[.sxXFE]+ +\[ *(\d+)%\]"), re.compile(r"^\S+ .* \.\.\. (ok)\b")
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """``commands`` run one after the other, or all at once (``together``); ``shown`` says which of their lines are
    printed."""

    name: str
    limit: float  # seconds of 500
    commands: list[list[str]]
    together: bool = False
    shown: Callable[[str], object] = BAD.search
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def least(self) -> float:
        return LEAST.get(self.name, 0.0)


@dataclass
class Result:
    part: str
    state: str  # passed, failed, stopped (at its limit)
    seconds: float
    failures: list[str]
    last: list[str]
    reached: str = ""  # how far it came, as far as its output says
    clocks: str = ""  # of the GPU while it ran


# ---- running a part --------------------------------------------------------------------------------------------------


def allowance(limits: Sequence[float], left: float, least: Sequence[float] = ()) -> float:
    """Seconds for the first of the parts with these limits, of which ``left`` remain for all; ``least``: what they are
    of no use without, kept for the later ones, and then for the first."""
    share = max(0.0, left) * limits[0] / sum(limits)
    if not least or left <= sum(least):
        return share
    return min(max(share, least[0]), left - sum(least[1:]))


class Progress:
    """How far the commands of a part are, by what they print."""

    def __init__(self) -> None:
        self.cases, self.percent, self.checks = "", "", 0

    def take(self, line: str) -> None:
        for kind, found in enumerate(pattern.search(line) for pattern in DONE):
            if found and kind == 0:
                self.cases = f"{found[1]} of {found[2]} cases"
            elif found and kind == 1:
                self.percent = f"{found[1]} % of the tests"
            elif found:
                self.checks += 1

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.cases, self.percent, f"{self.checks} checks" if self.checks else "")))


class Child:
    """A process group whose output is read line by line, into the log and to ``take``."""

    def __init__(self, command: list[str], environment: dict[str, str], take: Callable[[str], None]) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, args=(take,), daemon=True)
        self.reader.start()

    def _read(self, take: Callable[[str], None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            take(line.rstrip("\n"))

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def wait(self, deadline: float) -> bool:
        """Whether it ended before ``deadline``."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, deadline: float) -> None:
        """Asks it to end, and kills what is left of its group at ``deadline``."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            self.wait(deadline)
        self.signal(signal.SIGKILL)  # also what it started and left behind
        self.process.wait()
        self.reader.join(2)


def run_part(part: Part, seconds: float, folder: Path) -> Result:
    """Runs the commands within ``seconds``; the output goes to ``folder/<part>.log`` as it comes."""
    began = time.monotonic()
    grace = min(GRACE, seconds / 4)
    soft, hard = began + seconds - grace, began + seconds
    failures: list[str] = []
    last: list[str] = []
    printed = 0
    progress = Progress()
    lock = threading.Lock()
    children: list[Child] = []
    codes: list[int | None] = []
    stopped = False
    with open(folder / f"{part.name}.log", "w", errors="replace") as log:

        def take(line: str) -> None:
            nonlocal printed
            with lock, contextlib.suppress(ValueError):  # the log is closed: a process that outlived its part
                if log.tell() < MOST_LOG:
                    print(line, file=log, flush=True)
                if BAD.search(line):
                    failures.append(line[:300])
                progress.take(line)
                if line.strip():
                    last[:] = [*last[-4:], line[:300]]
                if part.shown(line) and printed < MOST_SHOWN:
                    printed += 1
                    print(f"  {line[:160]}", flush=True)

        groups = [part.commands] if part.together else [[c] for c in part.commands]
        try:
            for group in groups:
                if time.monotonic() >= soft:
                    stopped = True
                    break
                for command in group:
                    print(f"$ {' '.join(command)}", file=log, flush=True)
                started = []
                for command in group:
                    started.append(Child(command, {**os.environ, **part.environment}, take))
                    children.append(started[-1])
                stopped = not all([child.wait(soft) for child in started]) or stopped
                if stopped:
                    for child in started:
                        child.signal(signal.SIGTERM)
                for child in started:
                    child.end(hard)
                codes += [child.process.returncode for child in started]
        finally:
            for child in children:
                if child.process.poll() is None:
                    child.end(time.monotonic() + 1)
    state = "stopped" if stopped else "failed" if any(codes) else "passed"
    return Result(part.name, state, round(time.monotonic() - began, 1), failures, last, str(progress))


# ---- clocks and power ------------------------------------------------------------------------------------------------

ASKED = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


class Clocks:
    """Asks nvidia-smi for clocks and power once a second while a part runs; nothing where there is none."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.process = path, None
        if path is None or shutil.which("nvidia-smi") is None:
            return
        self.file = open(path, "w")
        command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader,nounits", "-lms", "1000"]
        self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)

    def end(self) -> str:
        if self.process is None or self.path is None:
            return ""
        self.process.terminate()
        self.process.wait()
        self.file.close()
        return clocks_text(self.path.read_text())


def clocks_text(text: str) -> str:
    """The range of each number that was asked for."""
    rows = [[float(v) for v in found] for line in text.splitlines() if len(found := re.findall(r"[\d.]+", line)) == 4]
    if not rows:
        return ""
    units = ("MHz", "MHz memory", "W", "°C")
    return ", ".join(f"{min(v):g}-{max(v):g} {unit}" for v, unit in zip(zip(*rows, strict=True), units, strict=True))


# ---- what is kept ----------------------------------------------------------------------------------------------------


def summary(results: Sequence[Result], title: str, waiting: Sequence[str] = (), most: int = 8) -> str:
    """A table of the parts, below the first failures of each. waiting: parts that have not begun."""
    lines = []
    for r in results:
        lines += [f"{r.part}: {line}" for line in r.failures[:most]]
        if len(r.failures) > most:
            lines.append(f"{r.part}: and {len(r.failures) - most} more, see {r.part}.log")
        if r.state != "passed" and not r.failures:
            lines += [f"{r.part}: {line}" for line in r.last]
    lines += ["", title]
    for r in results:
        line = f"  {r.part:<12}{r.state:<9}{r.seconds:6.1f} s  {len(r.failures)} failures  {r.reached}  {r.clocks}"
        lines.append(line.rstrip())
    late = [f"{r.part} (after {r.reached or 'nothing'})" for r in results if r.state == "stopped"]
    if late or waiting:
        lines.append(f"not reached: {', '.join([*late, *waiting])}")
    return "\n".join(line[:180] for line in lines) + "\n"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """The file is there whole or as it was before."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def archive(
    results: Sequence[Result], title: str, out: Path, folders: dict[str, Path], waiting: Sequence[str] = ()
) -> None:
    """Everything so far in three files: what comes back from a lent machine is limited in number."""
    text = summary(results, title, waiting)
    data = {"title": title, "parts": [asdict(r) for r in results], "waiting": [*waiting]}

    def pack(path: Path) -> None:
        with tarfile.open(path, "w:gz") as tar:
            for name, folder in folders.items():
                for file in sorted(folder.glob("*")):
                    if file.is_file() and not file.name.startswith(("gpu_check.tar", "summary.")):
                        tar.add(file, f"{name}/{file.name}")

    write_whole(out / "summary.txt", lambda path: path.write_text(text))
    write_whole(out / "summary.json", lambda path: path.write_text(json.dumps(data, indent=1) + "\n"))
    write_whole(out / "gpu_check.tar.gz", pack)


def run_parts(parts: Sequence[Part], budget: float, title: str, out: Path, folders: dict[str, Path]) -> list[Result]:
    """Runs the parts in turn, never longer than ``budget`` altogether, and archives after each."""
    deadline = time.monotonic() + budget
    results: list[Result] = []
    for i, part in enumerate(parts):
        left, to_come = deadline - time.monotonic() - 1, parts[i:]  # 1: the archives
        seconds = allowance([p.limit for p in to_come], left, [p.least for p in to_come])
        if seconds < SHORTEST and results:  # the first always runs
            results.append(Result(part.name, "stopped", 0.0, [], ["no time was left for it"]))
            continue
        print(f"\n== {part.name} (at most {seconds:.0f} s)", flush=True)
        clocks = Clocks(folders["logs"] / f"{part.name}.clocks.csv" if part.limit >= 10 else None)
        try:
            results.append(run_part(part, seconds, folders["logs"]))
        finally:
            said = clocks.end()
        results[-1].clocks = said
        print(f"== {part.name}: {results[-1].state} ({results[-1].seconds:.0f} s)", flush=True)
        archive(results, title, out, folders, [p.name for p in parts[i + 1 :]])
    archive(results, title, out, folders)
    return results


# ---- the parts -------------------------------------------------------------------------------------------------------

SUITES = ("step", "packed", "train", "fake_quant", "linear")
LIMITS = {"build": 100, "smoke": 45, "tests": 80, "step": 80, "packed": 40, "train": 60, "fake_quant": 25, "linear": 30,
          "sanitizer": 30, "page": 10}  # fmt: skip
LEAST = {"build": 90.0, "smoke": 20.0, "tests": 30.0, "step": 30.0, "packed": 20.0, "train": 20.0, "page": 6.0}
SHORTEST = 1.0  # seconds: a part with less is left out
TRITONS = 4  # processes over which the smoke checks of Triton, which compiles at first use, are spread
REHEARSED = {
    "tests": "test_device.py",
    "step": "AdamW step",
    "fake_quant": "per tensor",
    "packed": "batch 16",
    "linear": "after a step",
}  # all that a rehearsal takes of a part


PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-summary", "-p", "gpu_check", "-p",
          "no:cacheprovider", "--continue-on-collection-errors"]  # fmt: skip


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def test_command(rehearse: bool) -> list[str]:
    """Only the files that have such tests are collected: others may want what is not installed."""
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    tests = [p for p in tests if (p.name == REHEARSED["tests"] if rehearse else "mark.gpu" in p.read_text())]
    command = [*PYTEST, *(str(p.relative_to(ROOT)) for p in tests)]
    if rehearse:
        return [*command, "-k", "cpu and (packed_weights or mixture)"]
    return [*command, "-m", "gpu", *(["-n", "8"] if installed("xdist") else [])]


def find_sanitizer() -> str:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin") or ""


def sanitized(smoke: Sequence[str], rehearse: bool) -> list[str]:
    """The small C++ smoke part under memcheck; a line that says why not, where it is not there."""
    tool = find_sanitizer()
    if rehearse or not tool:
        why = "it takes a GPU" if rehearse else "compute-sanitizer is not installed"
        return [sys.executable, "-c", f"print('sanitizer: nothing is checked, {why}')"]
    return [tool, "--tool", "memcheck", "--error-exitcode", "1", "--print-limit", "20", *smoke, "cpp", "--small"]


def make_parts(rehearse: bool, work: Path, results: Path, arch: str, prebuilt: bool = False) -> dict[str, Part]:
    python, device = sys.executable, "cpu" if rehearse else "cuda"
    plain = [python, "-m", "askew_kernels", "bench", "--plain"]
    smoke = [python, "-W", "ignore", "benchmarks/gpu_smoke.py"]
    on = ["--device", device, *(["--small"] if rehearse else [])]
    tritons = 1 if rehearse else TRITONS
    environment = {
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")))
        ),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "140",
    }
    building = {**environment, **({"TORCH_CUDA_ARCH_LIST": arch} if arch else {})}
    serves = "from askew_kernels import runtime as r; w = r.choose_backend('cuda'); print(w); assert w[0] == 'cpp', w"

    def rows(suite: str, *more: str) -> list[str]:
        command = [*plain, "--device", device, "--suite", suite, "--json", str(work / f"{suite}.json"), *more]
        if rehearse:
            command += ["--quick", *(["--op", REHEARSED[suite]] if suite in REHEARSED else [])]
        return command

    made = [
        Part("build", LIMITS["build"], [
            *([] if prebuilt else [[python, "setup.py", "build_ext", "--inplace"]]),
            [python, "-m", "askew_kernels", "info"], *([] if rehearse else [[python, "-c", serves]]),
        ], environment=building),
        Part("smoke", LIMITS["smoke"], [
            [*smoke, "cpp", *on],
            # Triton's interpreter is an environment variable, but only of the process that has no GPU
            *([*(["env", "TRITON_INTERPRET=1"] if rehearse else []), *smoke, "triton", *on, "--part", f"{i}/{tritons}"]
              for i in range(1, tritons + 1)),
        ], together=True, shown=lambda line: " ..." in line or BAD.search(line),
             environment={**environment, "OMP_NUM_THREADS": "2"}),  # small tensors, and some at once
        Part("tests", LIMITS["tests"], [test_command(rehearse)],
             shown=lambda line: BAD.search(line) or re.match(r"\d+ (passed|failed)", line),
             environment={**environment, **({} if rehearse else {"OMP_NUM_THREADS": "2"})}),  # of 16 cores, 8 times
        *(Part(suite, LIMITS[suite], [rows(suite)], environment=environment) for suite in SUITES if suite != "train"),
        Part("train", LIMITS["train"], [
            [*smoke, "graphs", *on, "--json", str(work / "graphs.json")],
            *([] if rehearse else [rows("train", "--op", "wide GPT")]),
            rows("train", "--op", "training step, MLP", "--json", str(work / "train-mlp.json")),
        ], shown=lambda line: "graphs " in line or BAD.search(line), environment=environment),
        Part("sanitizer", LIMITS["sanitizer"], [sanitized(smoke, rehearse)],
             environment={**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Part("page", LIMITS["page"], [
            [python, str(Path(__file__)), "--page", str(work), str(results)],
        ], environment=environment),
    ]  # fmt: skip
    by_name = {part.name: part for part in made}
    return {name: by_name[name] for name in LIMITS}


def write_page(work: Path, results: Path) -> int:
    """What ``page`` runs once the rows are there: rows.json holds those of all suites."""
    found = [str(path) for name in (*SUITES, "train-mlp") if (path := work / f"{name}.json").is_file()]
    if not found:
        print("page: no suite left any rows")
        return 0
    command = [sys.executable, "-m", "askew_kernels", "bench", "--plain", "--from", *found]
    command += ["--json", str(results / "rows.json"), "--csv", str(results / "rows.csv")]
    command += ["--page", str(results / "README.md"), *(["--plot", str(results)] if installed("matplotlib") else [])]
    code = subprocess.run(command, check=False).returncode
    # rows that failed are their suite's failures, not the page's
    return 0 if (results / "README.md").is_file() and code in (0, 1) else code or 1


# ---- a plugin of pytest ----------------------------------------------------------------------------------------------
# Failures are printed as they happen, so that a part that is stopped has them. A process whose GPU has become unusable
# (an illegal address) ends before its next test, which xdist reports and gives the rest to a new process.

_config: Any = None
_unusable = False


def pytest_configure(config: Any) -> None:
    global _config
    _config = config


def pytest_runtest_protocol() -> None:
    if _unusable and hasattr(_config, "workerinput"):
        os._exit(1)


def pytest_runtest_logreport(report: Any) -> None:
    global _unusable
    if not report.failed:
        return
    if hasattr(_config, "workerinput"):
        _unusable = "CUDA error" in report.longreprtext
    else:
        _say(report)


def pytest_collectreport(report: Any) -> None:
    if report.failed and not hasattr(_config, "workerinput"):
        _say(report)


def _say(report: Any) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message.strip().splitlines()[:1] if crash else report.longreprtext.strip().splitlines()[-1:]
    writer = _config.pluginmanager.get_plugin("terminalreporter")
    writer.write_line("")
    writer.write_line(f"FAILED {report.nodeid}: {''.join(text)}"[:300])
    writer.write_line(report.longreprtext)


# ---- the command -----------------------------------------------------------------------------------------------------


def chosen(known: Sequence[str], only: Sequence[str], skip: Sequence[str], rehearse: bool) -> list[str]:
    """Names of the parts to run, in their order. Raises ValueError for one that is not known, or where none is left."""
    for name in [*only, *skip]:
        if name not in known:
            raise ValueError(f"expected the parts {', '.join(known)}, got {name!r}")
    wanted = only or [name for name in known if not (rehearse and name == "build")]
    names = [name for name in known if name in wanted and name not in skip]
    if not names:
        raise ValueError("no part is left to run")
    return names


def find_gpu() -> tuple[str, str, str]:
    """(name, capability such as "9.0", versions). Raises RuntimeError saying why there is none."""
    try:
        import torch
    except ImportError:
        raise RuntimeError(f"{sys.executable} has no torch; run it with a Python that has torch >= 2.11") from None
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise RuntimeError(f"no GPU: {why} (torch {torch.__version__})")
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        raise RuntimeError(f"needs torch >= 2.11, found {torch.__version__}")
    major, minor = torch.cuda.get_device_capability()
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    return torch.cuda.get_device_name(), f"{major}.{minor}", versions


@contextlib.contextmanager
def sigterm_ends() -> Iterator[None]:
    """SIGTERM raises, so that the part that runs is ended too."""

    def stop(number: int, frame: Any) -> None:
        sys.exit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=500.0, metavar="SECONDS", help="for everything (default 500)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small, without the build")
    parser.add_argument("--prebuilt", action="store_true", help="use the extension that is there")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART", help="not these parts")
    parser.add_argument("--list", action="store_true", help="name the parts with their limits, run nothing")
    parser.add_argument("--page", nargs=2, type=Path, metavar=("ROWS", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.page:
        return write_page(*arguments.page)
    try:
        names = chosen(list(LIMITS), arguments.only, arguments.skip, arguments.rehearse)
        if not arguments.budget > 0:
            raise ValueError(f"--budget: expected seconds > 0, got {arguments.budget:g}")
        if arguments.list:
            print("\n".join(f"{name:<12}{LIMITS[name]:4} s" for name in names))
            return 0
        device, arch, versions = ("rehearsal", "", "CPU") if arguments.rehearse else find_gpu()
    except (ValueError, RuntimeError) as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2

    title = f"gpu-check on {device}{' sm_' + arch.replace('.', '') if arch else ''}, {versions}"
    print(title, flush=True)
    given = os.environ.get("OUT")
    if arguments.rehearse:  # leaves nothing in the tree
        out = Path(given or tempfile.mkdtemp(prefix="gpu-check-"))
        work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        results = work / "results"
    else:
        work = ROOT / "build" / "gpu_check"
        out = Path(given or work)
        results = ROOT / "benchmarks" / "results" / re.sub(r"[^A-Za-z0-9._-]+", "-", device).strip("-").lower()
    for folder in (work, out, results):
        folder.mkdir(parents=True, exist_ok=True)
    known = make_parts(arguments.rehearse, work, results, arch, arguments.prebuilt)
    budget = arguments.budget - (time.monotonic() - started)
    with sigterm_ends():
        done = run_parts([known[n] for n in names], budget, title, out, {"logs": work, "results": results})
    print(f"\n{summary(done, title)}\nlogs and rows: {out}/gpu_check.tar.gz, {time.monotonic() - started:.0f} s in all")
    return 0 if all(r.state == "passed" for r in done) else 1


if __name__ == "__main__":
    sys.exit(main())
