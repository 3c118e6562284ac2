"""``python -m askew_kernels info | bench | demo``.

Exit codes: 0 done; 1 something failed while it ran (what was finished is kept); 2 the request cannot be served;
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = ("ASKEW_CPU_CAPABILITY", "ASKEW_BACKEND", "TRITON_INTERPRET", "OMP_NUM_THREADS", "GLIBC_TUNABLES",
               "CUDA_VISIBLE_DEVICES")  # fmt: skip


def error(text: object) -> None:
    print(f"askew_kernels: {text}", file=sys.stderr)


# ---- info ------------------------------------------------------------------------------------------------------------


def collect_info() -> dict[str, Any]:
    """What ``info`` prints, JSON-ready."""
    import torch

    from . import __version__, runtime

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
        "why_no_cuda": "" if archs else runtime._why_no_cuda(),
        "cpu_capability": runtime.cpu_capability(),
        "best_cpu_capability": module.best_cpu_capability() if module is not None else "none",
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda_here else [],
        "backends": backends,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


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
        ("environment", ", ".join(f"{k}={v}" for k, v in facts["environment"].items()) or "nothing set"),
    ]
    for name, text in lines:
        print(f"{name:<16} {text}")
    return 0


# ---- bench -----------------------------------------------------------------------------------------------------------


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", default="all", metavar="NAME", help="step, fake_quant, linear, memory or all (default)"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument("--quick", action="store_true", help="small tensors and few repetitions: under a minute")
    parser.add_argument("--allocator", default="auto", metavar="NAME",
                        help="default, warm (glibc keeps freed memory; a child process), both; auto (default): both "
                             "where results are fresh tensors and not --quick")  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="plain lines instead of tables: needs nothing but torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and goals as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write one PNG for each suite")


def plan_bench(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(suite, allocator) in order. Raises BenchError where the request makes no sense."""
    from . import bench, bench_suites

    suites = list(bench_suites.SUITES) if arguments.suite == "all" else [arguments.suite]
    for suite in suites:
        if suite not in bench_suites.SUITES:
            raise bench.BenchError(f"--suite: expected {', '.join(bench_suites.SUITES)} or all, got {suite!r}")
    if arguments.allocator not in ("auto", "both", *bench.ALLOCATORS):
        raise bench.BenchError(f"--allocator: expected default, warm, both or auto, got {arguments.allocator!r}")
    here = bench.allocator_in_use()
    plan = []
    for suite in suites:
        wanted = [arguments.allocator]
        if arguments.allocator == "both":
            wanted = list(bench.ALLOCATORS)
        elif arguments.allocator == "auto":
            also = suite in bench_suites.ALSO_WARM and arguments.device == "cpu" and not arguments.quick
            wanted = [here, *(["warm"] if also and here == "default" and platform.libc_ver()[0] == "glibc" else [])]
        if "default" in wanted and here != "default":
            raise bench.BenchError("--allocator default: GLIBC_TUNABLES already asks for the warm one; unset it")
        plan += [(suite, allocator) for allocator in wanted]
    return plan


def run_bench(arguments: argparse.Namespace) -> int:
    """Runs the suites; whatever ends it, the rows that were finished are printed and written."""
    from . import bench

    try:
        if not arguments.plain:
            bench.need("rich", "bench (without --plain)")
        if arguments.plot:
            bench.need("matplotlib", "--plot")
        plan = plan_bench(arguments)
        device = bench.check_device(arguments.device)
        for path, folder in ((arguments.json, False), (arguments.csv, False), (arguments.plot, True)):
            if path is not None:
                bench.check_writable(path, folder)
    except bench.BenchError as problem:
        error(problem)
        return 2

    rows: list[bench.Row] = []
    stopped = ""
    code = 0
    try:
        _measure(plan, device, arguments, rows)
    except KeyboardInterrupt:
        stopped, code = "interrupted", 130
    except bench.BenchError as problem:
        stopped, code = str(problem), 1
    except Exception as problem:
        stopped, code = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}", 1
    try:
        _report(rows, arguments)
    except bench.BenchError as problem:
        error(problem)
        code = code or 1
    except KeyboardInterrupt:
        stopped, code = "interrupted", 130
    failed = [r for r in rows if r.note.startswith("failed")]
    for r in failed:
        error(f"{r.suite}, {r.op}, {r.impl}: {r.note}")
    if stopped:
        error(f"{stopped}; {len(rows)} finished rows kept")
    return code or (1 if failed else 0)


def _write(rows: list[Any], arguments: argparse.Namespace) -> None:
    from . import bench

    if arguments.json:
        bench.write_atomic(arguments.json, bench.rows_to_json(rows))
    if arguments.csv:
        bench.write_atomic(arguments.csv, bench.rows_to_csv(rows))


@contextlib.contextmanager
def _progress(plain: bool, total: int) -> Iterator[Callable[[str | None, int | None], None]]:
    """A function show(what runs now, cases done), on stderr: a live bar, or with ``plain`` a line for each case."""
    if plain:

        def show_line(text: str | None, done: int | None) -> None:
            if done is not None:
                print(f"{done} of {total} cases", file=sys.stderr, flush=True)

        yield show_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)

        def show_bar(text: str | None, done: int | None) -> None:
            progress.update(task, description=text, completed=done)

        yield show_bar


def _measure(plan: list[tuple[str, str]], device: Any, arguments: argparse.Namespace, rows: list[Any]) -> None:
    """Appends to ``rows`` and rewrites the files after each case, below a progress bar that says what runs now."""
    from . import bench
    from .bench_suites import SUITES

    counts = [sum(device.type in entry.devices for entry in SUITES[suite]) for suite, _ in plan]
    with _progress(arguments.plain, sum(counts)) as show:
        before = 0
        for (suite, allocator), count in zip(plan, counts, strict=True):

            def tick(name: str, suite: str = suite, allocator: str = allocator) -> None:
                show(f"{suite} ({allocator}): {name}"[:100].replace("[", r"\["), None)

            run: Callable[..., Any] = bench.run_suite if allocator == bench.allocator_in_use() else bench.run_suite_warm
            seen: list[str] = []
            for row in run(suite, device, arguments.quick, tick):
                if row.op not in seen:
                    if seen:
                        show(None, before + len(seen))
                        _write(rows, arguments)
                    seen.append(row.op)
                rows.append(row)
            before += count
            show(None, before)
            _write(rows, arguments)


def _report(rows: list[Any], arguments: argparse.Namespace) -> None:
    """Tables to stdout, files, plots."""
    from . import bench

    _write(rows, arguments)
    if not rows:
        return
    by_suite: dict[str, list[Any]] = {}
    for r in rows:
        by_suite.setdefault(r.suite, []).append(r)
    if arguments.plain:
        print(bench.plain_report(rows))
    else:
        from rich.console import Console

        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140  # a file or a CI log
        console = Console(width=width, highlight=False)
        for suite, members in by_suite.items():
            console.print(bench.suite_table(suite, members))
            console.print()
        if (table := bench.goals_table(rows)) is not None:
            console.print(table)
    for suite, members in by_suite.items():
        if arguments.plot and any(r.ratio is not None and r.kind != "ceiling" for r in members):
            path = arguments.plot / f"{suite}.png"
            bench.write_atomic(path, bench.plot_suite(suite, members))
            print(f"wrote {path}")
    for path in filter(None, (arguments.json, arguments.csv)):
        print(f"wrote {path}")


# ---- demo ------------------------------------------------------------------------------------------------------------


def _demo_module() -> Any:
    """``askew_kernels.demo``, or None where this build does not have it."""
    if importlib.util.find_spec("askew_kernels.demo") is None:
        return None
    return importlib.import_module("askew_kernels.demo")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m askew_kernels", description=(
        "Fused kernels for annealed interval-constrained training of quantized networks."))  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | bench | demo")
    info_parser = commands.add_parser("info", help="what was built, which backend serves each device, and why")
    info_parser.add_argument("--json", action="store_true", help="print it as JSON")
    add_bench_arguments(commands.add_parser("bench", help="throughput and memory of every pass, beside its peers"))
    demo_parser = commands.add_parser("demo", help="train real models quantization-aware", add_help=True)
    demo = None
    if argv[:1] == ["demo"]:  # only then: it brings its own requirements
        try:
            demo = _demo_module()
        except ImportError as problem:
            error(f'demo needs {problem.name or problem}: pip install "askew_kernels[demo]"')
            return 2
        if demo is None:
            error("demo: this build of the package does not hold askew_kernels.demo")
            return 2
        demo.add_arguments(demo_parser)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "info":
            return info(arguments)
        if arguments.command == "bench":
            return run_bench(arguments)
        return int(demo.run(arguments) or 0)  # type: ignore[union-attr]
    except KeyboardInterrupt:
        error("interrupted")
        return 130
    except BrokenPipeError:  # `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
