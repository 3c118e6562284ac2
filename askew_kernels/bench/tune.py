"""``python -m askew_kernels bench tune``: finds the launch parameters of this device and writes them as a table.

Each choice by itself, the other parameters at their built-in values: every value that is tried must give the same bits
as the built-in one (or sums as near as another order allows: ``tuning.SUMS``), then all run in turns over the passes
that the choice serves. A value replaces the built-in one only where its time (20th percentile, geometric mean over the
passes) is at least 3 % shorter, twice: what stands in a table is no noise.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as ask_nn
from .. import ops, quant, runtime, tuning
from ..command import Failed, Refused, check_writable, write_atomic
from . import harness
from .rows import environment
from .suites.common import GRID, resnet18_shapes

LEAST_GAIN = 0.97

Values = dict[str, int]
Run = Callable[[], Sequence[Tensor]]  # gives the tensors that it wrote
Build = Callable[[torch.device], Run]
Passes = dict[str, Build]


# ---- what is run: the passes, each on tensors of its own -------------------------------------------------------------


@functools.lru_cache(4)  # every value that is tried gets the same numbers again
def _drawn(shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    return 0.02 * torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def _normal(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Tensor:
    return _drawn(shape, device, seed).clone()


def _scale(rows: int, device: torch.device) -> Tensor:
    return torch.full((rows,), 0.01, device=device)


def on_device(make: Callable[..., Run]) -> Callable[..., Build]:
    """make(device, *what) as a function of ``what`` that gives one of the device."""
    return lambda *what, **how: lambda device: make(device, *what, **how)


@on_device
def quantize(
    device: torch.device, rows: int, cols: int, scales: int, dtype: torch.dtype = torch.float32, fresh: bool = False
) -> Run:
    """Into an existing tensor, or into a new one, which is freed before the next call."""
    x, s = _normal((rows, cols), device).to(dtype), _scale(scales, device)
    out = torch.empty_like(x)
    return lambda: [ops.fake_quantize(x, s, GRID) if fresh else ops.fake_quantize_out_(x, s, GRID, out)]


@on_device
def clip(device: torch.device, rows: int, cols: int) -> Run:
    x, g, s = _normal((rows, cols), device), _normal((rows, cols), device, 1), _scale(rows, device)
    return lambda: [ops.ste_clip_(g, x, s, GRID)]


@on_device
def step(device: torch.device, rows: int, cols: int, momentum: float, copy: bool = False) -> Run:
    """An annealed ASkewSGD step; ``copy``: with the hard copy."""
    w, g, s = _normal((rows, cols), device), _normal((rows, cols), device, 1), _scale(rows, device)
    buffers, copies = [torch.zeros_like(w)] if momentum else None, [torch.empty_like(w)] if copy else None

    def run() -> Sequence[Tensor]:
        ops.skew_sgd_([w], [g], buffers, [s], [GRID], lr=0.05, eps=0.3, momentum=momentum, dequantized=copies)
        return [w, *(buffers or []), *(copies or [])]

    return run


@on_device
def perturb_and_restore(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> Run:
    weights = [_normal(shape, device, i) for i, shape in enumerate(shapes)]
    grads = [_normal(shape, device, 1000 + i) for i, shape in enumerate(shapes)]
    kept = [torch.empty_like(w) for w in weights]
    coefficients = torch.tensor([0.1, 0.0], device=device)

    def run() -> Sequence[Tensor]:
        ops.sam_perturb_(weights, grads, kept, coefficients, adaptive=True)
        ops.sam_restore_(weights, kept)
        return [*weights, *kept]

    return run


@on_device
def packed_product(device: torch.device, tokens: int, rows: int, cols: int, group: int) -> Run:
    """bfloat16 inputs times 4-bit codes."""
    x = _normal((tokens, cols), device).bfloat16()
    codes = (_normal((rows, cols // 2), device, 1) * 2e3).clamp(-128, 127).to(torch.int8).view(torch.uint8)
    scale = _scale(rows * cols // group if group else rows, device)
    return lambda: [ops.packed_linear(x, codes, scale, GRID, 4)]


@on_device
def packed_call(device: torch.device, layer: nn.Module, config: quant.QuantConfig, shape: tuple[int, ...],
                dtype: torch.dtype = torch.float32, trits: bool = False, **how: Any) -> Run:  # fmt: skip
    """A packed layer's own call; images are channels last."""
    made = ask_nn.quantize_(nn.Sequential(copy.deepcopy(layer)).to(device, dtype), config)
    packed = ask_nn.pack_(made, force=True, trits=trits, **how)
    x = _normal(shape, device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if isinstance(layer, nn.Conv2d) else x
    return lambda: [packed(x).detach()]


def scaled(grid: quant.Grid, group: int = 0) -> quant.QuantConfig:
    if group:
        return quant.QuantConfig(grid, granularity="per_group", group_size=group)
    return quant.QuantConfig(grid)


def named(config: quant.QuantConfig) -> str:
    bits = "ternary" if config.weight == quant.Ternary() else f"{config.weight.bits} bits"
    return f"{bits} in {config.group_size}" if config.group_size else bits


TWO, FOUR, EIGHT = (quant.Uniform(bits) for bits in (2, 4, 8))
# Parameter -> (layers, whose sizes are their outputs' and inputs'; numbers of rows of x; whatever else ``packed_call``
# takes): numbers on both sides of where the kernels change over.
CALLS: dict[str, tuple[list[tuple[quant.QuantConfig, int, int]], tuple[int, ...], dict[str, Any]]] = {
    "panel_inputs": ([(scaled(FOUR), 2048, 2048), (scaled(FOUR, 128), 2048, 2048), (scaled(EIGHT), 2048, 2048)],
                     (2, 3, 4, 5, 6, 8), {}),
    "pair_inputs": ([(scaled(FOUR), 2048, 2048), (scaled(EIGHT), 2048, 2048)], (1, 2, 3, 4, 6),
                    {"dtype": torch.bfloat16}),
    "bit_table_inputs": ([(scaled(quant.Binary()), 2048, 2048)], (2, 4, 8, 12, 16), {}),
    "table_inputs": ([(scaled(TWO), 2048, 2048)], (1, 2, 3, 4), {}),
    "table_rows": ([(scaled(TWO), rows, 1024) for rows in (128, 256, 512, 1024, 2048)], (1,), {}),
    "trit_table_rows": ([(scaled(quant.Ternary()), rows, 1024) for rows in (16, 32, 64, 128, 256)], (1,),
                        {"trits": True}),
    "library_inputs": ([(scaled(FOUR), 1024, 1024), (scaled(EIGHT), 1024, 1024)], (32, 64, 96, 128, 256), {}),
    "shared_blocks": ([(scaled(EIGHT), 384, 384), (scaled(FOUR), 384, 1536)], (32, 64, 128, 256, 512),
                      {"activations": "int8"}),
    "shared_bytes": ([(scaled(EIGHT), side, side) for side in (256, 384, 512, 768, 1024)], (512,),
                     {"activations": "int8"}),
}  # fmt: skip


def packed_calls(name: str, quick: bool) -> Passes:
    """On a CPU, weights in its caches."""
    if name in CALLS:
        layers, counts, how = CALLS[name]
        found = {
            f"{count} x {rows}x{cols}, {named(config)}":
            packed_call(nn.Linear(cols, rows), config, (count, cols), **how)
            for config, rows, cols in layers for count in counts
        }  # fmt: skip
    elif name == "points":
        channels = ((96, 96), (24, 144), (320, 192))
        found = {f"{a}->{b}, 1x1, {side}x{side}": packed_call(nn.Conv2d(a, b, 1), scaled(FOUR), (1, a, side, side))
                 for a, b in channels for side in (14, 20, 28, 40, 56)}  # fmt: skip
    else:
        sizes = (512, 384) if name == "large_positions" else (64, 128, 256)
        found = {f"{n}->{n}, 3x3, {side}x{side}": packed_call(nn.Conv2d(n, n, 3), scaled(FOUR), (1, n, side, side))
                 for n in sizes for side in (4, 5, 6, 8, 10, 14, 16, 18)}  # fmt: skip
    return dict(list(found.items())[:2]) if quick else found


def passes(section: str, name: str, quick: bool) -> Passes:
    """What a parameter, or a choice of several, is judged by."""
    if section in ("cpu_packed", "cpu_convolution"):
        return packed_calls(name, quick)
    n = 1024 if quick else 4096
    if section == "triton_packed":
        n = 512 if quick else 8192
        counts = ((1, 4) if name.startswith("few") else (16, 64))[: 1 if quick else 2]
        return {
            f"{count} x {n}x{n}" + (f", groups of {group}" if group else ""): packed_product(count, n, n, group)
            for count in counts for group in (0, 128)
        }  # fmt: skip
    if section in ("cuda", "triton") and not quick:
        n = 8192
    large = {f"quantize {n}x{n}": quantize(n, n, n), f"clip {n}x{n}": clip(n, n)}
    if section in ("cuda", "triton"):
        more = {f"quantize {n}x{n}, groups of 128": quantize(n, n, n * n // 128),
                f"quantize {n}x{n} bfloat16": quantize(n, n, n, torch.bfloat16)}  # fmt: skip
        return large if quick else {**large, **more}
    if name == "prefetch_columns":
        steps = {f"step {n}x{n}": step(n, n, 0.0), f"momentum step {n}x{n}": step(n, n, 0.9),
                 f"momentum step {n}x{n} with the copy": step(n, n, 0.9, True)}  # fmt: skip
        return {**large, **steps}
    if name == "piece_columns":
        return {**large, f"quantize {n * n} in one row": quantize(1, n * n, 1)}
    if name == "serial_elements":
        heights = (128, 256, 512, 1024)
        small = {f"quantize {rows}x128": quantize(rows, 128, rows) for rows in heights}
        return {**small, **{f"step {rows}x128": step(rows, 128, 0.0) for rows in heights}}
    if name == "streaming_bytes":
        lists = {f"perturb, restore {m}x1024": perturb_and_restore([(m, 1024)]) for m in (1024, 4096)}
        return lists if quick else {**lists, "perturb, restore ResNet-18": perturb_and_restore(resnet18_shapes())}
    return {f"quantize {size}x{size}, fresh": quantize(size, size, size, fresh=True) for size in (256, 512, 1024, n)}


# ---- what is tried ---------------------------------------------------------------------------------------------------


def trials(section: str) -> Iterator[tuple[str, list[Values]]]:
    """(what is judged together, the values that are tried, the built-in ones first)."""
    known, built_in = tuning.PARAMETERS[section], runtime.built_in_tuning[section]
    choices: dict[str, list[str]] = {}
    for name, parameter in known.items():
        choices.setdefault(parameter.choice or name, []).append(name)
    for names in choices.values():
        first = {name: built_in[name] for name in names}
        tried = [dict(zip(names, v, strict=True)) for v in itertools.product(*(known[name].tried for name in names))]
        yield " and ".join(names), [first, *(v for v in tried if v != first)]


def _same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def _same_sums(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """In bfloat16 the sums of two orders may be rounded to neighbours."""
    return all(float((x - y).abs().max()) <= 2.0**-7 * float(y.abs().max()) for x, y in zip(a, b, strict=True))


def _text(values: Values) -> str:
    return ", ".join("never" if v == tuning.NEVER else str(v) for v in values.values())


def check_bits(section: str, name: str, candidates: list[Values], judged: Passes, device: torch.device) -> None:
    """Raises Failed where a value gives other bits (other sums) than the first one."""
    same = _same_sums if section in tuning.SUMS else _same_bits
    for what, build in judged.items():
        expected: list[Tensor] = []
        for candidate in candidates:
            runtime.use_tuning({section: candidate})
            found = build(device)()
            expected = expected or [t.clone() for t in found]
            if not same(found, expected):
                raise Failed(f"{section}: {name} = {_text(candidate)} changes the result of {what}")


def in_turns(
    section: str, candidates: list[Values], judged: Passes, device: torch.device, quick: bool
) -> tuple[list[float], list[list[float]]]:
    """For each candidate its time over that of the first, the geometric mean over the passes; and its milliseconds."""
    clock = harness.clock_of(device)
    times: list[list[float]] = [[] for _ in candidates]
    for what, build in judged.items():
        run, use = build(device), runtime.use_tuning
        impls = [harness.Impl(_text(c), run, prepare=functools.partial(use, {section: c})) for c in candidates]
        measured, failures = harness.interleave(impls, clock, quick)
        if failures:
            raise Failed(f"{what}: {next(iter(failures.values()))}")
        for each, impl in zip(times, impls, strict=True):
            each.append(harness.percentile(measured[impl.name], 0.2))
    scores = [math.exp(statistics.fmean(math.log(a / b) for a, b in zip(t, times[0], strict=True))) for t in times]
    return scores, times


def measure(section: str, device: torch.device, quick: bool) -> tuple[Values, list[dict[str, Any]]]:
    """Prints a table for each parameter; (what differs from the built-in values; what was tried, with its time over
    that of the built-in value)."""
    best: Values = {}
    found: list[dict[str, Any]] = []
    for name, candidates in trials(section):
        judged = passes(section, name, quick)
        check_bits(section, name, candidates, judged, device)
        scores, times = in_turns(section, candidates, judged, device, quick)
        first = scores.index(min(scores))
        again = 1.0
        if first and scores[first] <= LEAST_GAIN:
            again = in_turns(section, [candidates[0], candidates[first]], judged, device, quick)[0][1]
        chosen = first if again <= LEAST_GAIN else 0
        if chosen:
            best |= candidates[chosen]
        print(f"{section}: {name} (passes: {'; '.join(judged)})")
        for i, (c, score, each) in enumerate(zip(candidates, scores, times, strict=True)):
            notes = ["built-in"] * (i == 0) + [f"again {again:.3f}"] * (i == first and again != 1)
            notes += ["<- chosen"] * (i == chosen)
            print("  ".join([f"  {_text(c):>12}  {score:5.3f}", *(f"{t:8.3f} ms" for t in each), *notes]))
            found.append({"section": section, **c, "time": round(score, 4)})
    return best, found


# ---- the command -----------------------------------------------------------------------------------------------------


def file_name(device: tuning.Device) -> str:
    """E.g. "nvidia-h200-9.0.json"."""
    cores = f"-{device.cores}-cores" if device.cores else ""
    return re.sub(r"[^a-z0-9.]+", "-", f"{device.name}-{device.capability}{cores}".lower()).strip("-") + ".json"


def document(key: tuning.Device, parameters: tuning.Values, tried: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The table as JSON, a line for each value that was tried."""
    facts = {name: where[name] for name in ("askew", "torch", "commit", "threads", "quick")}
    device = {name: value for name, value in vars(key).items() if value}
    found = {"time": harness.now(), **facts, "tried": []}
    made = {"device": device, "parameters": parameters, "found": found}
    lines = ",\n   ".join(map(json.dumps, tried))
    return json.dumps(made, indent=1).replace('"tried": []', f'"tried": [\n   {lines}\n  ]') + "\n"


OPTIONS_OF_SUITES: dict[str, Any] = {  # which say nothing here, and their defaults
    "suite": "all", "op": "", "part": "1/1", "allocator": "auto", "plain": False, "csv": None, "plot": None,
    "page": None, "compare": None, "rows": None, "fill": [], "reasons": None,
}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """The whole command; returns the exit code. Nothing is written before all is measured."""
    device = harness.check_device(arguments.device)
    for option, default in OPTIONS_OF_SUITES.items():
        if getattr(arguments, option) != default:
            name = "from" if option == "rows" else option
            raise Refused(f"bench tune: takes --device, --quick and --json, not --{name}")
    served = dict.fromkeys(tuning.SECTIONS["cpu"], device.type == "cpu" and runtime._C is not None)
    served["cuda"] = device.type == "cuda" and runtime.cuda_archs_fit()
    served["triton"] = served["triton_packed"] = device.type == "cuda" and runtime.has_triton()
    if not any(served.values()):
        why = runtime.why_not_compiled() or runtime.choose_backend(device.type)[1]
        raise Refused(f"bench tune: no kernels with launch parameters for {device.type} ({why})")
    if arguments.json is not None:
        check_writable(arguments.json)
    key = runtime.tuning_device(device)
    print(f"{key}; torch {torch.__version__}, {torch.get_num_threads()} threads; time ÷ that of the built-in value")
    parameters: tuning.Values = {}
    tried: list[dict[str, Any]] = []
    with runtime.kept_tuning():
        for section in [s for s in served if served[s]]:
            with runtime.use_backend("triton" if section.startswith("triton") else "cpp"):
                parameters[section], rows = measure(section, device, arguments.quick)
            tried += rows
    changed = [f"{s}.{name} = {v}" for s, values in parameters.items() for name, v in values.items()]
    print("better than the built-in values: " + (", ".join(changed) or "none"))
    if arguments.json is not None:
        write_atomic(arguments.json, document(key, parameters, tried, environment(device, arguments.quick)))
        print(f"wrote {arguments.json}: use it with ASKEW_TUNING={arguments.json}, or ship it as "
              f"askew_kernels/tuning/{file_name(key)}")  # fmt: skip
    return 0
