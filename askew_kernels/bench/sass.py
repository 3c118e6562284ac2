"""``python -m askew_kernels sass``: what the CUDA kernels cost, counted in their machine code; no GPU needed.

Compiles ``csrc/cuda/*.cu`` with nvcc (flags of ``setup.py``), disassembles, and finds for each kernel and each case of
it the usual path of its hot loop (``machine_code``): instructions an element by class, bytes an element, registers,
spills, shared memory. From these follows a PREDICTION of the share of a device's copy bandwidth that is reached::

    seconds an element = max(bytes / copy bandwidth, lane-instructions / (SMs x clock x rate))

for each place that instructions go to: the issue of an SM (128 lanes a cycle, of which ``issued(warps)`` is reached)
and its pipes (PIPES). What is counted is a lower bound: of a kernel's ways through, the shortest. The table
is committed (``benchmarks/results/sass``); ``--check`` fails where a kernel spills or counts more than 3 % above it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..command import Failed, Refused, check_writable, error, write_atomic
from . import machine_code
from .machine_code import CLASS_NAMES, Kernel, Region, Wanted

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "benchmarks" / "results" / "sass" / "table.json"
FOLDER = ROOT / "build" / "sass"  # what was compiled already
ARCHS = ("sm_80", "sm_90", "sm_100")
GROWTH = 1.03  # of a count, before --check fails
TYPES = {"0": "fp32", "1": "bf16", "2": "fp16", "3": "int8", "4": "fp8"}  # csrc/math/types.h, StorageType
PASSES = ("quantize", "stochastic", "clip", "project", "soften")  # QuantizePass
SAM = ("norm", "perturb", "restore", "average")  # SamPass
STEPS = ("any", "hold", "annealed")  # StepKind
TABLES = {"14": "table of 16", "24": "table of 16 in two parts"}  # TileForm above 8; others are bits


# ---- devices: where predictions come from ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    arch: str
    sms: int
    clock: float  # cycles/s that are assumed under load
    copy: float  # bytes/s of a copy, read and written
    source: str


DEVICES = {
    "A100": Device("sm_80", 108, 1.41e9, 1.75e12, "data sheet, 0.86 of 2.04 TB/s"),
    "H100": Device("sm_90", 132, 1.75e9, 3.0e12, "copy measured"),
    "H200": Device("sm_90", 132, 1.75e9, 4.3e12, "copy measured"),
    "B200": Device("sm_100", 148, 1.85e9, 7.2e12, "data sheet, 0.9 of 8 TB/s"),
}
LANES = 128  # that an SM issues in a cycle: four schedulers, one warp instruction each
# Lanes a cycle of what serves each class (CUDA C++ programming guide, throughput of arithmetic instructions). "alu"
# serves the classes int and logic.
PIPES = {
    "sm_80": {"fp32": 64, "alu": 64, "conversion": 16, "fp64": 32, "tensor": 16},
    "sm_90": {"fp32": 128, "alu": 64, "conversion": 16, "fp64": 64, "tensor": 16},
    "sm_100": {"fp32": 128, "alu": 64, "conversion": 16, "fp64": 64, "tensor": 16},
}


def issued(warps: int) -> float:
    """The share of the issue slots that is used, by the warps that an SM holds: measured on an H200, 0.60 to 0.73 with
    24 warps of a long body, all of them with 64 of a short one (docs/notes.md); between them a straight line."""
    return min(1.0, max(0.35, 0.7 + 0.3 * (warps - 24) / 40))


# ---- cases: what the usual path of a kernel does ---------------------------------------------------------------------


# Of all templates, or by their arguments
Labels = Mapping[str, float] | Callable[[Sequence[str]], Mapping[str, float]]


def labels_of(labels: Labels, arguments: Sequence[str]) -> Mapping[str, float]:
    return labels(arguments) if callable(labels) else labels


@dataclass(frozen=True)
class Case:
    """A use of a kernel. Slots are 16 bytes of one thread; ``makes``: accesses of a slot by label (``machine_code``);
    ``needs``: instructions for each element of a slot that the path has at least, without which it would be another
    case; ``once``: labels that the path has so often, whatever the slots. if_: the template's arguments it is for."""

    name: str
    makes: Labels
    needs: Labels = field(default_factory=dict)
    once: dict[str, int] = field(default_factory=dict)
    if_: Callable[[Sequence[str]], bool] = lambda arguments: True
    moves: Labels | None = None  # accesses of a slot that count as its bytes, where they are not those that it makes


@dataclass(frozen=True)
class Family:
    """Kernels of one template. width(arguments): elements of a slot; slots: how many a round of the loop takes, the
    first number for which there is a path counts; bytes_of: bytes of an element where they do not follow from the
    accesses (codes read beside inputs that caches hold); rounds: of loops inside."""

    cases: tuple[Case, ...]
    width: Callable[[Sequence[str]], float]
    names: Callable[[Sequence[str]], Sequence[str]] = lambda arguments: arguments
    bytes_of: Callable[[Sequence[str]], float] | None = None
    rounds: float = 1.0
    slots: tuple[int, ...] = (1,)
    of_block: int = 16  # slots of a thread in its block, for what it does around its loop; 0: not told


def _typed(arguments: Sequence[str]) -> list[str]:
    return [TYPES.get(arguments[0], arguments[0]), *arguments[1:]]


def _width(arguments: Sequence[str]) -> float:
    return 4 if arguments[0] == "0" else 8


def _is(place: int, *values: str) -> Callable[[Sequence[str]], bool]:
    return lambda arguments: len(arguments) > place and arguments[place] in values


def _copy(arguments: Sequence[str]) -> str:
    return "STG.8" if arguments[0] == "0" else "STG.16"


NO_SUMS = {"SHFL.BFLY": 0}
SUMS = {"VIMNMX3.U32|VIMNMX.U32|IMNMX.U32": 0.5}  # the largest |w|, as integers, perhaps of two at once


def _streams(stores: dict[str, int] | None = None) -> Callable[[Sequence[str]], dict[str, int]]:
    """Of a step: weights and gradients, the rule's buffers, and other stores."""
    return lambda a: {"LDG.16": 2 + int(a[2]), "STG.16": 1 + int(a[2]), **(stores or {})}


def _step(kind: str, *types: str) -> Callable[[Sequence[str]], bool]:
    """Kernels for few and for many tensors have the same loop: one of them is counted."""
    return lambda a: a[4] == kind and (kind == "0" or a[5] == "24") and (not types or a[0] in types)


def _divisions(arguments: Sequence[str]) -> dict[str, int]:
    """Of an annealed step, a weight; AdamW has one at any eps."""
    return {"MUFU.RCP": 2 if arguments[1] == "AdamW" else 1}


def _step_names(arguments: Sequence[str]) -> list[str]:
    type_, rule, buffers, grid, kind, tensors = _typed(arguments)
    return [type_, rule, f"{buffers} buffers", grid, STEPS[int(kind)], f"{tensors} tensors"]


STEP = (
    # loads of what may be absent are issued and switched off
    Case("annealed", lambda a: {"STG.16": 1 + int(a[2])}, _divisions, NO_SUMS, _step("0"), _streams()),
    Case("", _streams(), once=NO_SUMS, if_=_step("1")),
    Case("sums", _streams(), SUMS, if_=_step("1")),
    Case("bf16 copy", _streams({"STG.8": 1}), once=NO_SUMS, if_=_step("1", "0")),
    Case("", _streams(), _divisions, NO_SUMS, _step("2")),
    Case("bf16 copy", _streams({"STG.8": 1}), _divisions, NO_SUMS, _step("2", "0")),
    Case("levels of a byte", _streams({"STG.4": 1}), _divisions, NO_SUMS, _step("2", "0")),
)
COPY = {"LDG.16": 1, "STG.16": 1}
TWO_TO_ONE = {"LDG.16": 2, "STG.16": 1}


def _searched(arguments: Sequence[str]) -> dict[str, int]:
    """A table of levels in shared memory is searched: it takes a load each time it is halved, and two at the end."""
    return {"LDS|LDS.64": 3} if "SharedCodebook" in arguments else {}


def _form(form: str) -> tuple[int, str]:
    """(bits of a code, name) of a TileForm."""
    return (4, TABLES[form]) if form in TABLES else (int(form), f"{form} bits")


def _tile_names(arguments: Sequence[str]) -> list[str]:
    """<type, form, segment (, tokens)>"""
    scale = "scale at the end" if arguments[2] == "0" else f"a scale each {16 * int(arguments[2])}"
    return [TYPES[arguments[0]], _form(arguments[1])[1], scale, *(f"{8 * int(a)} tokens" for a in arguments[3:])]


def _tile_loads(arguments: Sequence[str]) -> dict[str, int]:
    return {"LDG.16": _form(arguments[1])[0]}


def _word_loads(arguments: Sequence[str]) -> dict[str, int]:
    """Of packed_words_kernel: 16 bytes of codes of two rows, and the inputs that belong to them."""
    codes, tokens = 128 // int(arguments[1]), int(arguments[2])
    width = int(_width(arguments))
    if arguments[1] == "8" and width == 8:  # a word has fewer codes than a vector has inputs
        return {"LDG.16": 2, "LDG.2": tokens * codes}
    return {"LDG.16": 2 + tokens * codes // width}


FAMILIES: dict[str, Family] = {
    "step_kernel": Family(STEP, _width, _step_names, of_block=4),
    "quantize_kernel": Family(
        (
            Case("", COPY, _searched, if_=_is(2, "0", "1", "3")),
            Case("to bf16", {"LDG.16": 1, "STG.8": 1}, _searched, if_=lambda a: a[0] == "0" and a[2] == "0"),
            Case("", TWO_TO_ONE, if_=_is(2, "2")),
        ),
        _width,
        lambda a: [*_typed(a)[:2], PASSES[int(a[2])]],
        rounds=4,  # a table of 16 levels is halved four times
        slots=(4, 2),
    ),
    "row_sums_kernel": Family((Case("", {"LDG.16": 1}, once=NO_SUMS),), _width, _typed, slots=(4,)),
    "sam_kernel": Family(
        (
            Case("", {"LDG.16": 2}, once=NO_SUMS, if_=_is(1, "0")),
            Case("", {"LDG.16": 2, "STG.16": 2}, if_=_is(1, "1")),
            Case("", COPY, if_=_is(1, "2")),
            Case("", TWO_TO_ONE, if_=_is(1, "3")),
        ),
        _width,
        lambda a: [_typed(a)[0], SAM[int(a[1])]],
        slots=(2,),
    ),
    "mix_kernel": Family((Case("4 candidates", COPY, {"FMUL": 1}),), _width, _typed, rounds=4, slots=(2,)),
    # of a candidate: two of the rounding, its two sums and the strength that counts
    "mix_gradient_kernel": Family((Case("4 candidates", TWO_TO_ONE, {"FADD": 20}, NO_SUMS),), _width, _typed),
    # a tile of 16 x 256 codes for a warp
    **{
        name: Family((Case("", _tile_loads),), lambda a: 128, _tile_names, lambda a: _form(a[1])[0] / 8, of_block=0)
        for name in ("tiles_few_kernel", "tiles_many_kernel")
    },
    "packed_words_kernel": Family(
        (Case("", _word_loads),), lambda a: 2 * 128 / int(a[1]),
        lambda a: [_typed(a)[0], f"{a[1]} bits", f"{a[2]} tokens"], bytes_of=lambda a: int(a[1]) / 8,
    ),
}  # fmt: skip


# ---- counting --------------------------------------------------------------------------------------------------------


Key = tuple[str, str, str, str]  # architecture, file, kernel, case


@dataclass
class Count:
    """One row of the table: a case of a kernel on an architecture. Instructions are those of an element; a kernel whose
    loop is not counted has one row of its registers and memory."""

    arch: str
    file: str
    kernel: str
    case: str
    registers: int
    spilled: int = 0  # bytes of stores and loads
    stack: int = 0  # bytes
    shared: int = 0  # bytes
    elements: float = 0.0  # of a thread in a round of the hot loop; 0: not counted
    instructions: float = 0.0
    around: float = 0.0  # what a block does before and after its loop, spread over its elements
    most: float = 0.0  # on the longest path of this case
    classes: dict[str, float] = field(default_factory=dict)
    bytes: float = 0.0
    slow_calls: int = 0  # slow paths of division in the loop
    share: dict[str, float] = field(default_factory=dict)  # PREDICTED, of the copy bandwidth, by device

    @property
    def key(self) -> Key:
        return self.arch, self.file, self.kernel, self.case

    @property
    def warps(self) -> int:
        """That an SM holds by the registers, in blocks of 8 warps."""
        return min(64, 65536 // (32 * 8 * ((self.registers + 7) // 8 * 8)) * 8)


def predict(count: Count, device: Device) -> float:
    """The share of the device's copy bandwidth."""
    pipes = PIPES[device.arch]
    lanes = {pipe: count.classes.get(pipe, 0.0) / rate for pipe, rate in pipes.items()}
    lanes["alu"] = (count.classes.get("int", 0.0) + count.classes.get("logic", 0.0)) / pipes["alu"]
    cycles = max(*lanes.values(), (count.instructions + count.around) / (LANES * issued(count.warps)))
    memory = count.bytes / device.copy
    return memory / max(memory, cycles / (device.sms * device.clock))


@dataclass(frozen=True)
class Found:
    elements: float  # of a thread in a round
    usual: machine_code.Path
    longest: machine_code.Path
    around: float  # instructions of a block outside of its rounds, for a thread


def case_of(regions: Sequence[Region], family: Family, case: Case, arguments: Sequence[str]) -> Found | None:
    """Of the innermost loop that this case runs in, or of a kernel without one. regions: the loops, then the kernel."""
    width = family.width(arguments)
    for region in regions:
        for slots in family.slots:
            wanted = Wanted(
                {**{k: int(v * slots) for k, v in labels_of(case.makes, arguments).items()}, **case.once},
                {k: int(v * slots * width) for k, v in labels_of(case.needs, arguments).items()},
                family.rounds,
            )
            if usual := machine_code.path(region, wanted):
                longest = machine_code.path(region, wanted, longest=True)
                around = 0.0
                if region.looped and family.of_block:
                    once = replace(wanted, rounds=1.0)
                    whole, round_ = machine_code.path(regions[-1], once), machine_code.path(region, once)
                    around = whole.instructions - round_.instructions if whole and round_ else 0.0
                return Found(slots * width, usual, longest or usual, around)
    return None


def moved(case: Case, arguments: Sequence[str]) -> float:
    """Bytes of a slot of one thread."""
    labels = labels_of(case.moves or case.makes, arguments)
    return sum(int(label.split(".")[1]) * times for label, times in labels.items())


def counts_of(kernel: Kernel, name: str, arch: str, file: str, used: dict[str, int]) -> Iterator[tuple[Count, str]]:
    """The rows of a kernel, each with the listing of its usual path."""
    base, arguments = split_name(name)
    family = FAMILIES.get(base)
    shown = f"{base}<{', '.join(family.names(arguments) if family else arguments)}>" if arguments else base
    bare = Count(arch, file, shown, "", used["registers"], used["spilled"], used["stack"], used["shared"])
    if family is None:
        yield bare, ""
        return
    loops = machine_code.find_loops(kernel.blocks)
    regions = [Region(kernel, loop, loops) for loop in [*loops, None]]
    counted = False
    for case in family.cases:
        found = case_of(regions, family, case, arguments) if case.if_(arguments) else None
        if found is None:
            continue
        counted = True
        usual, n = found.usual, found.elements
        count = replace(
            bare, case=case.name, elements=n, instructions=round(usual.instructions / n, 2),
            around=round(found.around / (family.of_block * family.width(arguments)), 2) if family.of_block else 0.0,
            most=round(found.longest.instructions / n, 2), slow_calls=usual.slow_calls,
            classes={c: round(usual.counts[c] / n, 2) for c in CLASS_NAMES if usual.counts[c]},
            bytes=family.bytes_of(arguments) if family.bytes_of else moved(case, arguments) / family.width(arguments),
            share={},
        )  # fmt: skip
        for device_name, device in DEVICES.items():
            if device.arch == arch:
                count.share[device_name] = round(predict(count, device), 3)
        yield count, usual.listing(kernel)
    if not counted:
        yield bare, ""


def split_name(demangled: str) -> tuple[str, list[str]]:
    """``void a::b::kernel<1, (a::Pass)2, a::Grid>(a::List)`` -> ("kernel", ["1", "2", "Grid"])."""
    text = re.sub(r"\((?:\w+::|\(anonymous namespace\)::)*\w+\)(?=-?\d)", "", demangled)  # (a::Pass)2
    text = text.replace("(anonymous namespace)::", "")
    text = re.sub(r"\b\w+::", "", text)
    head = re.match(r"(?:void )?(\w+)(?:<(.*?)>)?\(", text)
    if head is None:
        return text, []
    return head[1], [a.strip() for a in head[2].split(",")] if head[2] else []


# ---- compiling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    nvcc: str
    nvdisasm: str
    demangler: str
    version: str  # of nvcc


def find_tools() -> Tools:
    """Raises Refused that says what is missing."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    places = [f"{home}/bin", *_triton_bins()]
    nvdisasm = shutil.which("nvdisasm") or next(filter(None, (shutil.which("nvdisasm", path=p) for p in places)), None)
    demangler = shutil.which("c++filt") or shutil.which("cu++filt") or shutil.which("cu++filt", path=f"{home}/bin")
    for name, tool, where in (("nvcc", nvcc, "the CUDA toolkit"), ("nvdisasm", nvdisasm, "the CUDA toolkit, or Triton"),
                              ("c++filt", demangler, "binutils")):  # fmt: skip
        if tool is None:
            raise Refused(f"sass: {name} was not found; it comes with {where}")
    assert nvcc and nvdisasm and demangler
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release ([\d.]+)", text)
    return Tools(nvcc, nvdisasm, demangler, version[1] if version else "?")


def check_archs(archs: Sequence[str], tools: Tools) -> None:
    """Raises Refused naming the first that this nvcc does not compile for."""
    known = subprocess.run([tools.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    for arch in archs:
        if not any(arch in (code, code + "a", code + "f") for code in known):
            raise Refused(f"--arch: expected some of {', '.join(known)} (nvcc {tools.version}), got {arch!r}")


def check_names(files: Sequence[str], kernel: str) -> None:
    """Raises Refused naming a file that is none of csrc/cuda's, or a part of a name that no kernel of theirs has."""
    known = {s.stem: s.read_text() for s in sources()}
    if unknown := sorted({*files} - {*known}):
        raise Refused(f"--file: expected some of {', '.join(known)}, got {' '.join(unknown)}")
    chosen = {stem: known[stem] for stem in files or known}
    names = [c.kernel for c in read_table()[1].values() if c.file in chosen] if kernel else []
    if not any(kernel in text for text in (*names, *chosen.values())):
        kernels = dict.fromkeys(name.partition("<")[0] for name in names)
        raise Refused(f"--kernel: expected a part of a kernel's name ({', '.join(kernels)}), got {kernel!r}")


def _triton_bins() -> list[str]:
    import importlib.util

    spec = importlib.util.find_spec("triton")
    return [str(Path(p) / "backends/nvidia/bin") for p in (spec.submodule_search_locations or ())] if spec else []


def nvcc_flags() -> list[str]:
    """As ``setup.py`` has them, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NVCC_FLAGS":
            return list(ast.literal_eval(node.value))
    raise Failed("setup.py: NVCC_FLAGS was not found")


def sources() -> list[Path]:
    found = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not found:
        raise Refused(f"sass: no csrc/cuda in {ROOT}; run this in a checkout of the repository")
    return found


def compiled(source: Path, arch: str, tools: Tools) -> tuple[Path, str]:
    """(cubin, what ptxas said), made anew only where a source, a flag or nvcc changed."""
    flags = [*nvcc_flags(), f"-arch={arch}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    flags = [f for f in flags if f not in ("-cudart", "static")]
    headers = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".inl"))
    content = b"".join(p.read_bytes() for p in (source, *headers)) + repr((tools.version, flags)).encode()
    FOLDER.mkdir(parents=True, exist_ok=True)
    cubin = FOLDER / f"{source.stem}.{arch}.{hashlib.sha256(content).hexdigest()[:12]}.cubin"
    said = cubin.with_suffix(".ptxas")
    if not (cubin.is_file() and said.is_file()):
        done = subprocess.run(
            [tools.nvcc, *flags, "-cubin", str(source), "-o", str(cubin)], capture_output=True, text=True
        )
        if done.returncode:
            raise Failed(f"nvcc failed on {source.name} for {arch}: {done.stderr.strip()[:2000]}")
        for old in FOLDER.glob(f"{source.stem}.{arch}.*"):
            if old.stem != cubin.stem:
                old.unlink(missing_ok=True)
        said.write_text(done.stderr)
    return cubin, said.read_text()


PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)", re.S
)  # fmt: skip


def resources(said: str) -> dict[str, dict[str, int]]:
    """By mangled name, from ptxas -v."""
    used = {}
    for name, stack, stores, loads, registers, rest in PTXAS.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        used[name] = {"registers": int(registers), "stack": int(stack), "spilled": int(stores) + int(loads),
                      "shared": int(shared[1]) if shared else 0}  # fmt: skip
    return used


@dataclass
class Measured:
    counts: list[Count]
    spilling: list[str]  # kernels, whether their loops are counted or not
    listings: dict[Key, str]  # the usual paths


def measure_file(source: Path, arch: str, tools: Tools) -> Measured:
    cubin, said = compiled(source, arch, tools)
    used = resources(said)
    kernels = [
        k for k in machine_code.read_kernels(machine_code.disassemble(tools.nvdisasm, str(cubin))) if k.name in used
    ]
    text = subprocess.run([tools.demangler], input="\n".join(k.name for k in kernels), capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    result = Measured([], [], {})
    for kernel, name in zip(kernels, text.splitlines(), strict=True):
        rows = list(counts_of(kernel, name, arch, source.stem, used[kernel.name]))
        result.counts += [count for count, _ in rows]
        result.listings.update({count.key: listing for count, listing in rows})
        if used[kernel.name]["spilled"] or used[kernel.name]["stack"]:
            result.spilling.append(f"{split_name(name)} ({arch}): {used[kernel.name]}")
    result.counts.sort(key=lambda c: c.kernel)
    return result


def _end_by_signals() -> None:
    """In a worker, which would go on with its next job where a signal is an exception."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def measure(archs: Sequence[str], files: Sequence[str], tools: Tools) -> Measured:
    wanted = [s for s in sources() if not files or s.stem in files]
    jobs = [(source, arch) for arch in archs for source in wanted]
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1), initializer=_end_by_signals
    ) as pool:
        try:
            parts = list(pool.map(measure_file, *zip(*jobs, strict=True), itertools.repeat(tools)))
        except KeyboardInterrupt as stop:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise type(stop)(f"what was compiled is kept in {FOLDER}") from None
    whole = Measured([], [], {})
    for part in parts:
        whole.counts += part.counts
        whole.spilling += part.spilling
        whole.listings.update(part.listings)
    return whole


# ---- the table -------------------------------------------------------------------------------------------------------


def as_json(counts: Sequence[Count], nvcc: str) -> str:
    """A row a line, so that differences are read."""
    rows = ",\n".join(
        json.dumps({k: v for k, v in asdict(c).items() if v or v == ""}, separators=(",", ":")) for c in counts
    )
    return f'{{"nvcc": "{nvcc}", "rows": [\n{rows}\n]}}\n'


def read_table(path: Path = TABLE) -> tuple[str, dict[Key, Count]]:
    """(nvcc, rows by their key)."""
    if not path.is_file():
        return "", {}
    data: dict[str, Any] = json.loads(path.read_text())
    counts = [Count(**row) for row in data["rows"]]
    return data["nvcc"], {c.key: c for c in counts}


def differences(new: Sequence[Count], old: dict[Key, Count], all_files: bool = True) -> list[str]:
    """What does not go with the table, one line each."""
    said = []
    for count in new:
        before = old.get(count.key)
        where = ", ".join(filter(None, count.key))
        if before is None:
            said.append(f"{where}: not in the table")
        elif count.spilled:
            said.append(f"{where}: spills {count.spilled} bytes")
        elif count.instructions > GROWTH * before.instructions:
            said.append(f"{where}: {count.instructions} instructions an element, {before.instructions} in the table")
        elif count.slow_calls > before.slow_calls:
            said.append(f"{where}: {count.slow_calls} slow paths, {before.slow_calls} in the table")
    if all_files:
        archs, keys = {c.arch for c in new}, {c.key for c in new}
        said += [", ".join(filter(None, key)) + ": in the table, no longer there" for key in old
                 if key[0] in archs and key not in keys]  # fmt: skip
    return said


HEAD = ("kernel", "case", "registers", "warps", "shared", "instructions", *CLASS_NAMES, "around", "longest", "slow",
        "bytes")  # fmt: skip


def lines_of(count: Count, devices: Sequence[str]) -> list[str]:
    resources = [count.kernel, count.case, str(count.registers), str(count.warps), str(count.shared or "·")]
    if not count.elements:
        return [*resources, *["·"] * (len(HEAD) - len(resources) + len(devices))]
    return [
        *resources, f"{count.instructions:.1f}",
        *(f"{count.classes[c]:.1f}" if c in count.classes else "·" for c in CLASS_NAMES),
        f"{count.around:.1f}", f"{count.most:.1f}", str(count.slow_calls or "·"), f"{count.bytes:.3g}",
        *(f"{100 * count.share[d]:.0f}" if d in count.share else "" for d in devices),
    ]  # fmt: skip


PREFACE = """# Counted in the machine code

Made by `make sass` with nvcc {nvcc}; no GPU took part. Instructions an element of the hot loop's usual path, by class
(int: integer operations, compares, minima, selections, moves; uniform: once a warp), the bytes that it must move, and
the share of the device's copy bandwidth, in per cent, that is PREDICTED from both and was not measured. around:
what a block does before and after its loop, at its least, spread over its elements. longest: where every branch takes
its longer side. warps: of an SM, by registers. slow: subroutines for slow cases of division in the loop, which the
usual path does not enter. Kernels without counts: their registers and shared memory alone. The check fails where a
kernel spills; those that did when the table was made are named at its end.

Assumed: {assumed}.
"""


def as_markdown(counts: Sequence[Count], nvcc: str) -> str:
    assumed = "; ".join(
        f"{name} ({d.arch}): {d.sms} SMs, {d.clock / 1e9:.2f} GHz, copy {d.copy / 1e12:.2f} TB/s ({d.source})"
        for name, d in DEVICES.items()
    )
    parts = [PREFACE.format(nvcc=nvcc, assumed=assumed)]
    for arch in dict.fromkeys(c.arch for c in counts):
        devices = [n for n, d in DEVICES.items() if d.arch == arch]
        for file in dict.fromkeys(c.file for c in counts):
            rows = [c for c in counts if c.arch == arch and c.file == file]
            if not rows:
                continue
            head = [*HEAD, *(f"{d}, predicted %" for d in devices)]
            parts += [f"## {arch}, {file}\n", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            parts += ["| " + " | ".join(lines_of(c, devices)) + " |" for c in rows]
            parts.append("")
    spilling = {f"* {c.arch}, {c.kernel}: {c.spilled} bytes" for c in counts if c.spilled}
    parts += ["## Spills (stores and loads of local memory)\n", "\n".join(sorted(spilling)) or "None.", ""]
    return "\n".join(parts)


def _usual(type_: str, rule: str, buffers: int, step: str) -> str:
    grid = "IntegerGrid" if step == "hold" else "UniformGrid"
    return f"step_kernel<{type_}, {rule}, {buffers} buffers, {grid}, {step}, 24 tensors>"


ANY_STEP = "step_kernel<fp32, Sgd, 1 buffers, UniformGrid, any, 200 tensors>"
HEADLINES = (  # of docs/gpu.md: (text, kernel, case)
    ("SGD, hold", _usual("fp32", "Sgd", 0, "hold"), ""),
    ("SGD, hold, sums of the next scale", _usual("fp32", "Sgd", 0, "hold"), "sums"),
    ("SGD, annealed", _usual("fp32", "Sgd", 0, "annealed"), ""),
    ("SGD, annealed, bfloat16 copy", _usual("fp32", "Sgd", 0, "annealed"), "bf16 copy"),
    ("SGD momentum, annealed", _usual("fp32", "Sgd", 1, "annealed"), ""),
    ("AdamW, annealed", _usual("fp32", "AdamW", 2, "annealed"), ""),
    ("SGD, hold, bfloat16 weights", _usual("bf16", "Sgd", 0, "hold"), ""),
    ("SGD, annealed, bfloat16 weights", _usual("bf16", "Sgd", 0, "annealed"), ""),
    ("any other step: SGD momentum, annealed", ANY_STEP, "annealed"),
    ("quantize", "quantize_kernel<fp32, UniformGrid, quantize>", ""),
    ("quantize, NF4", "quantize_kernel<fp32, SharedCodebook, quantize>", ""),
    ("straight-through clip", "quantize_kernel<fp32, UniformGrid, clip>", ""),
    ("mixture of 4 candidates", "mix_kernel<fp32>", "4 candidates"),
    *((f"product, {form}, up to 8 tokens", f"tiles_few_kernel<bf16, {form}, scale at the end>", "")
      for form in ("1 bits", "2 bits", "3 bits", "4 bits", "8 bits", "table of 16")),
    ("product, 4 bits, groups of 64", "tiles_few_kernel<bf16, 4 bits, a scale each 64>", ""),
)  # fmt: skip
PAGE = ROOT / "docs" / "gpu.md"
MARKS = "<!-- predictions -->", "<!-- /predictions -->"


def predictions(counts: Sequence[Count]) -> str:
    """The table of docs/gpu.md; a kernel that is not there has no line."""
    by_key = {(c.arch, c.kernel, c.case): c for c in counts}
    head = ["| kernel | bytes | instructions, sm_90 | " + " | ".join(f"{d} %" for d in DEVICES) + " |"]
    lines = [*head, "|" + "---|" * (3 + len(DEVICES))]
    for text, kernel, case in HEADLINES:
        hopper = by_key.get(("sm_90", kernel, case))
        if hopper is None:
            continue
        shares = [by_key[d.arch, kernel, case].share.get(name) if (d.arch, kernel, case) in by_key else None
                  for name, d in DEVICES.items()]  # fmt: skip
        cells = [text, f"{hopper.bytes:.3g}", f"{hopper.instructions + hopper.around:.1f}"]
        cells += ["" if share is None else f"{100 * share:.0f}" for share in shares]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def filled(page: str, counts: Sequence[Count]) -> str:
    """The page with the table between its marks made anew."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{predictions(counts)}\n{MARKS[1]}{after}"


def as_text(counts: Sequence[Count]) -> str:
    """For a terminal."""
    lines = []
    for arch in dict.fromkeys(c.arch for c in counts):
        devices = [n for n, d in DEVICES.items() if d.arch == arch]
        rows = [[*HEAD, *(f"{d} %" for d in devices)], *(lines_of(c, devices) for c in counts if c.arch == arch)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append(f"{arch}; per cent of copy bandwidth are predictions")
        for row in rows:
            cells = [
                cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arch", nargs="+", default=list(ARCHS), metavar="ARCH", help="architectures (default: sm_80 sm_90 sm_100)")
    add("--file", nargs="+", default=[], metavar="NAME", help="only these of csrc/cuda, such as update")
    add("--kernel", default="", metavar="TEXT", help="show only kernels whose name contains this")
    add("--listing", action="store_true", help="with --kernel: print the instructions of the usual paths")
    add(
        "--check",
        action="store_true",
        help="fail where a kernel spills or counts more than the committed table; without nvcc nothing is checked",
    )
    add("--write", action="store_true", help="write the table (all architectures and files)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.write and (arguments.file or sorted(arguments.arch) != sorted(ARCHS)):
        raise Refused("--write: the table holds all architectures and files; leave --arch and --file out")
    if arguments.write and arguments.check:
        raise Refused("--write: makes the table anew that --check compares with; take one of them")
    if arguments.listing and not arguments.kernel:
        raise Refused("--listing: of which kernels? --kernel TEXT says it")
    if arguments.write:
        check_writable(TABLE)
    check_names(arguments.file, arguments.kernel)
    try:
        tools = find_tools()
    except Refused as missing:
        if not arguments.check:
            raise
        print(f"{missing}: nothing is checked")
        return 0
    check_archs(arguments.arch, tools)
    measured = measure(arguments.arch, arguments.file, tools)
    problems: list[str] = []
    if arguments.check:
        nvcc, table = read_table()
        if nvcc == tools.version:
            problems += differences(measured.counts, table, not arguments.file)
        else:
            print(f"sass: the table is of nvcc {nvcc or '(none)'}, this is {tools.version}: counts are not compared")
    else:
        shown = [c for c in measured.counts if arguments.kernel in c.kernel]
        print(as_text(shown))
        if arguments.listing and arguments.kernel:
            print("\n".join(f"{', '.join(filter(None, c.key))}\n{measured.listings[c.key]}\n" for c in shown))
    if arguments.write:
        write_atomic(TABLE, as_json(measured.counts, tools.version))
        write_atomic(TABLE.with_name("README.md"), as_markdown(measured.counts, tools.version))
        write_atomic(PAGE, filled(PAGE.read_text(), measured.counts))
        print(f"wrote {TABLE}, README.md beside it and the table of {PAGE}")
    for problem in problems:
        error(f"sass: {problem}")
    if not arguments.check:
        print("\n".join(f"spills: {kernel}" for kernel in measured.spilling) or "nothing spills")
    if arguments.check:
        print(f"sass: {len(measured.counts)} counts of {' '.join(arguments.arch)} checked, {len(problems)} problems"
              + ("; make sass writes the table anew" if problems else ""))  # fmt: skip
    return 1 if problems else 0
