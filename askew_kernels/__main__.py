"""``python -m askew_kernels COMMAND``: info, completion, and those of ``COMMANDS`` below.

Exit codes: 0 done; 1 something failed while it ran; 2 the request cannot be served, said in one line before any work;
130 interrupted; 143 terminated. Whatever ends a run, what was finished is kept.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import importlib.util
import io
import os
import platform
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .command import Failed, Refused, Terminated, as_json, error, need, sigterm_interrupts

ENVIRONMENT = ("ASKEW_CPU_CAPABILITY", "ASKEW_BACKEND", "ASKEW_TUNING", "TRITON_INTERPRET", "OMP_NUM_THREADS",
               "GLIBC_TUNABLES", "CUDA_VISIBLE_DEVICES")  # fmt: skip
SHELLS = ("bash", "zsh", "tcsh")


def triton_version() -> str:
    """Of whichever distribution brings it; "" without one."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "version unknown"


def collect_info() -> dict[str, Any]:
    """What ``info`` prints, JSON-ready."""
    import torch

    from . import runtime
    from . import tuning as tables

    module = runtime._C
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    no_gpu = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    archs = module.cuda_archs if module is not None else ""
    backends, tuning = {"cpu": {}, "cuda": {"backend": "none", "why": no_gpu}}, {}
    for device in ("cpu", "cuda") if gpus else ("cpu",):
        backend, why = runtime.choose_backend(device)
        backends[device] = {"backend": backend, "why": runtime.slow_because(device) or why}
        table, why = runtime.tuning_table(device)
        parameters = {section: runtime.tuning(section, device) for section in tables.SECTIONS[device]}
        name = table.name if table is not None else "built-in values"
        tuning[device] = {"table": name, "why": why, "parameters": parameters}
    return {
        "askew_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "",
        "triton": triton_version() if runtime.has_triton() else "",
        "platform": platform.platform(),
        "compiled": module is not None,
        "why_not_compiled": runtime.why_not_compiled(),
        "compiler": module.compiler if module is not None else "",
        "torch_target": module.torch_target if module is not None else "",
        "cuda_archs": archs.split(),
        "cuda_version": module.cuda_version if module is not None else "",
        "why_no_cuda": "" if archs else runtime.why_no_cuda(),
        "cpu_capability": runtime.cpu_capability(),
        "packed_capability": module.packed_capability() if module is not None else "",
        "best_cpu_capability": module.best_cpu_capability() if module is not None else "none",
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "backends": backends,
        "tuning": tuning,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def tuning_text(t: dict[str, Any]) -> str:
    values = [f"{name} {value}" for section in t["parameters"].values() for name, value in section.items()]
    return f"{t['table']}: {t['why']} ({', '.join(values) or 'nothing is compiled'})"


def info(arguments: argparse.Namespace) -> int:
    facts = collect_info()
    if arguments.json:
        print(as_json(facts))
        return 0
    cpu, capability = f"not compiled: {facts['why_not_compiled']}", "none"
    if facts["compiled"]:
        cpu = f"compiled by {facts['compiler']} for torch {facts['torch_target'] or '2.11'} and later"
        capability = f"{facts['cpu_capability']} in use, {facts['best_cpu_capability']} is the best this CPU runs"
        if facts["packed_capability"]:
            capability += f", packed integer products by {facts['packed_capability']}"
    cuda = f"not compiled: {facts['why_no_cuda']}"
    if facts["cuda_archs"]:
        cuda = f"compiled by nvcc {facts['cuda_version']} for {' '.join(facts['cuda_archs'])}"
    torch_cuda = f"CUDA {facts['torch_cuda']}" if facts["torch_cuda"] else "CPU only"
    lines = {
        "askew_kernels": facts["askew_kernels"],
        "python": f"{facts['python']}, {facts['platform']}",
        "torch": f"{facts['torch']} ({torch_cuda})",
        "triton": facts["triton"] or "not installed",
        "C++ operators": cpu,
        "CPU capability": f"{capability}; {facts['threads']} threads",
        "CUDA kernels": cuda,
        "GPUs": ", ".join(facts["gpus"]) or "none",
        **{f"backend on {d}": f"{b['backend']}: {b['why']}" for d, b in facts["backends"].items()},
        **{f"tuning on {device}": tuning_text(t) for device, t in facts["tuning"].items()},
        "environment": ", ".join(f"{k}={v}" for k, v in facts["environment"].items()) or "nothing set",
    }
    for name, text in lines.items():
        print(f"{name:<16} {text}")
    return 0


@dataclass(frozen=True)
class Command:
    """``module`` holds add_arguments(parser), run(arguments) and perhaps afterwards(arguments), the words of the
    command that follows; it is imported only when asked for, since each brings requirements of its own. extra: what
    installs them; instead: a flag and the module that then runs."""

    module: str
    extra: str
    text: str
    instead: tuple[str, str] = ("", "")


COMMANDS = {
    "bench": Command("askew_kernels.bench.cli", "bench", "throughput and memory of every pass, beside its peers"),
    "sass": Command("askew_kernels.bench.sass", "bench", "instructions of the CUDA kernels, counted without a GPU"),
    "demo": Command("askew_kernels.demo", "demo", "train real models quantization-aware", ("sam", "experiments.sam")),
    "paper": Command("experiments.paper", "paper", "the published experiments, over ten seeds and more"),
    "accuracy": Command("experiments.accuracy", "demo", "accuracy beside its rivals', on pictures, text and sentences"),
    "search": Command("experiments.search", "search", "which layer deserves which bits: from float to packed"),
    "analyze": Command("askew_kernels.analysis.cli", "analysis", "the report of a training run from its log"),
    "inspect": Command("askew_kernels.deploy.inspect", "deploy", "bits, bytes and errors of a packed file, by layer"),
    "convert": Command("askew_kernels.deploy.convert", "deploy", "pack a state_dict, or a file of another format"),
    "export": Command("askew_kernels.deploy.export", "deploy", "a packed file as GGUF, compressed-tensors, ONNX, …"),
}


def load(name: str, module: str) -> Any:
    """The module of a command. Raises Refused in one line where it, or what it needs, is not installed."""
    if module.startswith("experiments."):
        home = Path(__file__).resolve().parent.parent
        if not (home / "experiments" / "__init__.py").is_file():
            raise Refused(f"{name}: {module} is not part of the installed package; run this in a checkout of the "
                          "repository or in the unpacked source distribution")  # fmt: skip
        if str(home) not in sys.path[:1]:
            sys.path.insert(0, str(home))  # before another package of that name
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise Refused(f"{name} needs {problem.name or problem}: "
                      f'pip install "askew_kernels[{COMMANDS[name].extra}]"') from None  # fmt: skip


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every option's default, where there is one and its text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, False, "", []) or "default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"askew_kernels: {message} (see {self.prog} --help)\n")


def make_parser(loaded: Collection[str], prog: str = "python -m askew_kernels") -> Parser:
    """Of all commands; those ``loaded`` with their arguments."""
    parser = Parser(prog=prog, description=(
        "Fused kernels for annealed interval-constrained training of quantized networks."))  # fmt: skip
    parser.add_argument("--version", action="version", version=f"askew_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    info_parser = commands.add_parser("info", help="what was built, which backend serves each device, and why")
    info_parser.add_argument("--json", action="store_true", help="print it as JSON")
    for name, command in COMMANDS.items():
        text = f"{command.text[0].upper()}{command.text[1:]}."
        subparser = commands.add_parser(name, help=command.text, description=text)
        if name in loaded:
            load(name, command.module).add_arguments(subparser)
    words = commands.add_parser(
        "completion",
        help="what completes the words of askew-kernels in a shell",
        description=(
            'Its output completes the words of askew-kernels in a shell, e.g. eval "$(askew-kernels completion bash)".'
        ),
    )
    words.add_argument("shell", choices=SHELLS, help="the shell")
    return parser


def completion(shell: str) -> int:
    """Prints the shell's script, of those commands whose requirements are installed in full."""
    need("completion", "shtab")
    import shtab

    loaded = []
    for name in COMMANDS:
        with contextlib.suppress(Refused):
            make_parser([name])
            loaded.append(name)
    print(shtab.complete(make_parser(loaded, prog="askew-kernels"), shell))
    return 0


def serve(argv: list[str]) -> int:
    """Parses and runs one command; its exit code."""
    parser = make_parser(argv[:1])
    arguments = parser.parse_args(argv)
    name = arguments.command
    if name is None:
        parser.print_help()
        return 0
    if name == "info":
        return info(arguments)
    if name == "completion":
        return completion(arguments.shell)
    usual = load(name, COMMANDS[name].module)
    flag, other = COMMANDS[name].instead
    code = int((load(name, other) if getattr(arguments, flag, False) else usual).run(arguments) or 0)
    following = usual.afterwards(arguments) if code == 0 and hasattr(usual, "afterwards") else []
    return serve(following) if following else code


def check_streams() -> None:
    """What stdout cannot encode is printed as ?; a stream that was closed before the start takes everything."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; SystemExit where argparse ends it (--help, --version, arguments that are none)."""
    check_streams()
    try:
        with sigterm_interrupts():
            try:
                return serve(list(sys.argv[1:] if argv is None else argv))
            finally:
                sys.stdout.flush()  # a reader that has gone shows here, not when Python ends
    except KeyboardInterrupt as stop:
        how, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        error("; ".join([how, *map(str, stop.args)]))
        return code
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Failed, OSError) as problem:
        error(problem)
        return 2 if isinstance(problem, Refused) else 1


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _code = main()
    if _code > 128:  # by a signal: no seconds for the garbage that torch.compile leaves
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(_code)
    sys.exit(_code)
