"""``python -m askew_kernels info | bench | demo | paper | search | analyze | inspect | convert``.

Exit codes: 0 done; 1 something failed while it ran; 2 the request cannot be served, said in one line before any work;
130 interrupted; 143 terminated. Whatever ends a run, what was finished is kept.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import importlib.util
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__
from .bench.rows import BenchError, error
from .command import Refused, Terminated, sigterm_interrupts

ENVIRONMENT = ("ASKEW_CPU_CAPABILITY", "ASKEW_BACKEND", "ASKEW_TUNING", "TRITON_INTERPRET", "OMP_NUM_THREADS",
               "GLIBC_TUNABLES", "CUDA_VISIBLE_DEVICES")  # fmt: skip


# ---- info ------------------------------------------------------------------------------------------------------------


def collect_info() -> dict[str, Any]:
    """What ``info`` prints, JSON-ready."""
    import torch

    from . import runtime

    module, build = runtime._C, runtime.build_report()
    compiled = module is not None
    cuda_here = torch.cuda.is_available()
    no_gpu = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    archs = module.cuda_archs if module is not None else ""
    backends = {}
    for device in ("cpu", "cuda"):
        backend, why = runtime.choose_backend(device)
        backends[device] = {"backend": backend, "why": why}
        if device == "cuda" and not cuda_here:
            backends[device] = {"backend": "none", "why": no_gpu}
        elif slow := runtime.slow_because(device):
            backends[device]["why"] = slow
    tuning = {}
    for device in ("cpu", *(["cuda"] if cuda_here else [])):
        table, why = runtime.tuning_table(device)
        sections = ("cpu",) if device == "cpu" else ("cuda", "triton")
        tuning[device] = {
            "table": table.name if table is not None else "built-in values",
            "why": why,
            "parameters": {section: runtime.tuning(section, device) for section in sections},
        }
    triton_version = ""
    if runtime.has_triton():
        from importlib import metadata

        for name in ("triton", "pytorch-triton", "triton-windows"):
            try:
                triton_version = metadata.version(name)
                break
            except metadata.PackageNotFoundError:
                triton_version = "version unknown"
    return {
        "askew_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "",
        "triton": triton_version,
        "platform": platform.platform(),
        "compiled": compiled,
        "why_not_compiled": runtime.why_not_compiled(),
        "compiler": module.compiler if module is not None else "",
        "torch_target": build.get("torch_target", ""),
        "cuda_archs": archs.split(),
        "cuda_version": module.cuda_version if module is not None else "",
        "why_no_cuda": "" if archs else runtime.why_no_cuda(),
        "cpu_capability": runtime.cpu_capability(),
        "best_cpu_capability": module.best_cpu_capability() if module is not None else "none",
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda_here else [],
        "backends": backends,
        "tuning": tuning,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _tuning_text(t: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value}" for section in t["parameters"].values() for name, value in section.items())
    return f"{t['table']}: {t['why']} ({values or 'nothing is compiled'})"


def info(arguments: argparse.Namespace) -> int:
    facts = collect_info()
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return 0
    if facts["compiled"]:
        cpu = f"compiled by {facts['compiler']} for torch {facts['torch_target'] or '2.11'} and later"
        capability = f"{facts['cpu_capability']} in use, {facts['best_cpu_capability']} is the best this CPU runs"
    else:
        cpu, capability = f"not compiled: {facts['why_not_compiled']}", "none"
    if facts["cuda_archs"]:
        cuda = f"compiled by nvcc {facts['cuda_version']} for {' '.join(facts['cuda_archs'])}"
    else:
        cuda = f"not compiled: {facts['why_no_cuda']}"
    torch_cuda = f"CUDA {facts['torch_cuda']}" if facts["torch_cuda"] else "CPU only"
    lines = [
        ("askew_kernels", facts["askew_kernels"]),
        ("python", f"{facts['python']}, {facts['platform']}"),
        ("torch", f"{facts['torch']} ({torch_cuda})"),
        ("triton", facts["triton"] or "not installed"),
        ("C++ operators", cpu),
        ("CPU capability", f"{capability}; {facts['threads']} threads"),
        ("CUDA kernels", cuda),
        ("GPUs", ", ".join(facts["gpus"]) or "none"),
        *((f"backend on {device}", f"{b['backend']}: {b['why']}") for device, b in facts["backends"].items()),
        *((f"tuning on {device}", _tuning_text(t)) for device, t in facts["tuning"].items()),
        ("environment", ", ".join(f"{k}={v}" for k, v in facts["environment"].items()) or "nothing set"),
    ]
    for name, text in lines:
        print(f"{name:<16} {text}")
    return 0


# ---- the commands ----------------------------------------------------------------------------------------------------

# Imported only when asked for, since each brings requirements of its own: name -> (module, extra that installs them).
COMMANDS = {
    "bench": ("askew_kernels.bench.cli", "bench", "throughput and memory of every pass, beside its peers"),
    "demo": ("askew_kernels.demo", "demo", "train real models quantization-aware"),
    "paper": ("askew_kernels.paper", "paper", "the published experiments, over ten seeds and more"),
    "search": ("askew_kernels.demo_search", "search", "which layer deserves which bits: from float to packed"),
    "analyze": ("askew_kernels.analysis.cli", "analysis", "the report of a training run from its log"),
    "inspect": ("askew_kernels.deploy.inspect", "deploy", "bits, bytes and errors of a packed file, layer by layer"),
    "convert": ("askew_kernels.deploy.convert", "deploy", "pack a safetensors state_dict"),
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every option's default, where there is one and its text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is False or action.default in (None, "", []) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Help, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"askew_kernels: {message} (see {self.prog} --help)\n")


def serve(argv: list[str]) -> int:
    """Parses and runs one command; its exit code."""
    parser = Parser(prog="python -m askew_kernels", description=(
        "Fused kernels for annealed interval-constrained training of quantized networks."))  # fmt: skip
    parser.add_argument("--version", action="version", version=f"askew_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    info_parser = commands.add_parser("info", help="what was built, which backend serves each device, and why")
    info_parser.add_argument("--json", action="store_true", help="print it as JSON")
    run: Callable[[argparse.Namespace], int] = info
    for name, (module, extra, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if argv[:1] != [name]:
            continue
        if importlib.util.find_spec(module) is None:
            raise Refused(f"{name}: this build of the package does not hold {module}")
        try:
            loaded = importlib.import_module(module)
        except ImportError as problem:
            raise Refused(f'{name} needs {problem.name or problem}: pip install "askew_kernels[{extra}]"') from None
        loaded.add_arguments(command)
        run = loaded.run
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    return int(run(arguments) or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; SystemExit where argparse ends it (--help, --version, arguments that are none)."""
    try:
        with sigterm_interrupts():
            try:
                return serve(list(sys.argv[1:] if argv is None else argv))
            finally:
                sys.stdout.flush()  # a reader that has gone shows here, not when Python ends
    except Refused as problem:
        error(problem)
        return 2
    except KeyboardInterrupt as stop:
        how, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        error("; ".join([how, *map(str, stop.args)]))
        return code
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BenchError, OSError) as problem:
        error(problem)
        return 1


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _code = main()
    if _code > 128:  # by a signal: no seconds for the garbage that torch.compile leaves
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(_code)
    sys.exit(_code)
