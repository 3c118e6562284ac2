"""``make gpu-check``: everything that needs a GPU, in one command, offline, with the Python that runs it.

    python benchmarks/gpu_check.py [--quick] [--skip-build] [--skip-tests]

1. builds in place for this machine's GPU (no virtual environment, whatever torch >= 2.11 is there);
2. runs ``pytest -m gpu tests``;
3. runs the suites ``step``, ``fake_quant``, ``linear``, ``packed`` and ``train`` on the GPU, for the C++ and the
   Triton kernels, beside torch.optim, eager, torch.compile and the libraries that are installed, with the device's
   ceilings in the same turns;
4. writes the rows (JSON, CSV), the plots, a Markdown page and the logs to ``benchmarks/results/<device>/``, and the
   page, plots and logs to ``$OUT`` where that is set.

Every part runs even where one before it failed; the exit code is 0 only if all went well, and 2 without a GPU.
Under 10 minutes: each part has a time limit, and a suite that is stopped there keeps the rows it has finished.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "build": 200,
    "tests": 120,
    "step": 95,
    "fake_quant": 40,
    "linear": 40,
    "packed": 35,
    "train": 50,
    "page": 20,
}  # seconds
SUITES = ("step", "fake_quant", "linear", "packed", "train")


def run(name: str, command: list[str], folder: Path, environment: dict[str, str]) -> bool:
    """Runs one part, its output on the screen and in ``folder/<name>.log``; whether it succeeded."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    with open(folder / f"{name}.log", "wb") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = child.communicate(timeout=LIMITS[name])
            ended = f"exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            child.terminate()  # bench writes what it has
            try:
                output, _ = child.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                child.kill()
                output, _ = child.communicate()
            ended = f"stopped after {LIMITS[name]} s"
        log.write(output)
    print(output.decode(errors="replace")[-12000:])
    good = child.returncode == 0
    print(f"== {name}: {'passed' if good else 'FAILED'} ({ended}, {time.monotonic() - started:.0f} s)", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small tensors: does it run, not how fast")
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()

    try:
        import torch
    except ImportError:
        print(f"gpu-check: {sys.executable} has no torch; run it with a Python that has torch >= 2.11", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        print(f"gpu-check: no GPU: {why} (torch {torch.__version__})", file=sys.stderr)
        return 2
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 11):
        print(f"gpu-check: needs torch >= 2.11, found {torch.__version__}", file=sys.stderr)
        return 2

    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    folder = ROOT / "benchmarks" / "results" / re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"gpu-check: {name}, sm_{major}{minor}, torch {torch.__version__}, Python {sys.version.split()[0]}")

    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    environment["COLUMNS"] = "140"
    python = sys.executable
    passed: dict[str, bool] = {}
    if not arguments.skip_build:
        passed["build"] = run("build", [python, "setup.py", "build_ext", "--inplace"], folder, environment)
        subprocess.run([python, "-m", "askew_kernels", "info"], cwd=ROOT, env=environment, check=False)
    if not arguments.skip_tests:
        if importlib.util.find_spec("pytest") is None:
            print("\n== tests: FAILED (pytest is not installed)")
            passed["tests"] = False
        else:
            command = [python, "-m", "pytest", "-q", "-m", "gpu", "tests"]
            passed["tests"] = run("tests", command, folder, environment)
    bench = [python, "-m", "askew_kernels", "bench", *([] if importlib.util.find_spec("rich") else ["--plain"])]
    for suite in SUITES:
        command = [*bench, "--device", "cuda", "--suite", suite, "--json", str(folder / f"{suite}.json")]
        passed[suite] = run(suite, command + (["--quick"] if arguments.quick else []), folder, environment)
    rows = [str(folder / f"{suite}.json") for suite in SUITES if (folder / f"{suite}.json").is_file()]
    if rows:
        command = [*bench[:4], "--plain", "--from", *rows, "--json", str(folder / "rows.json")]
        command += ["--csv", str(folder / "rows.csv"), "--page", str(folder / "README.md")]
        if importlib.util.find_spec("matplotlib") is not None:
            command += ["--plot", str(folder)]
        passed["page"] = run("page", command, folder, environment)
        for path in rows:  # rows.json holds them all
            Path(path).unlink()

    if out := os.environ.get("OUT"):  # few files: what comes back from a lent machine is limited in number
        for path in [folder / "rows.json", folder / "README.md", *folder.glob("*.png"), *folder.glob("*.log")]:
            if path.is_file():
                shutil.copy(path, out)
    print(f"\ngpu-check on {name}: " + ", ".join(f"{k} {'passed' if v else 'FAILED'}" for k, v in passed.items()))
    print(f"rows and plots: {folder}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
