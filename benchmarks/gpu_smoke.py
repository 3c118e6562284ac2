"""Every operator once, then the ways layers and optimizers are used, on a device, against the reference on the CPU.

    python benchmarks/gpu_smoke.py {cpp,triton} [--device cuda|cpu] [--small] [--part I/N] [--from N]
    python benchmarks/gpu_smoke.py graphs [--device cuda|cpu] [--small] [--json FILE]

One line a check, ``cpp packed_linear ... ok`` or ``WRONG`` with the largest error or ``RAISED`` with the first line of
the error; its name is printed before it runs, so that one that hangs or kills the process is named. The exit code
is 1 where one was not ok. ``--part``: the I-th of N parts of the checks. An error that leaves the device unusable (an
illegal address) says nothing of the checks after it: the program then starts itself anew behind the one that failed.
With ``--small`` short enough for ``compute-sanitizer``, which sees single tensors where
PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set.

``graphs`` times whole training steps, eager and as replayed CUDA graphs: milliseconds of one step.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import contract, reference, runtime
from askew_kernels.ops import RULES, packed, schema
from askew_kernels.quant import Codebook, Uniform

Check = Callable[[], str]  # says what it found; raises Wrong, or whatever went wrong
NF4 = Codebook([-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803,
                0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0])  # fmt: skip
# What results may be off, relative to the largest number in them, beside one rounding of their type: sums are taken
# in another order, everything else is the same arithmetic.
SUMS = {
    "row_sums",
    "ste_clip_scale_grad_",
    "packed_linear",
    "packed_linear_int8",
    "packed_linear_bf16",
    "packed_tiles_linear",
    "mix_fake_quantize_backward",
    "sam_norm",
}
SUM_TOLERANCE, TOLERANCE = 1e-4, 1e-5


class Wrong(Exception):
    """A result that is not the reference's."""


# ---- operators -------------------------------------------------------------------------------------------------------


@functools.cache
def samples(small: bool) -> list[tuple[str, list[Any]]]:
    """(operator, arguments on the CPU): odd and even rows, three types, uniform grids and a codebook."""
    return list(_samples(small))


def _samples(small: bool) -> Iterator[tuple[str, list[Any]]]:
    cases = [(torch.float32, Uniform(4), 5, 129), (torch.bfloat16, NF4, 6, 64)]
    if not small:
        cases += [(torch.float32, Uniform(4), 128, 4608), (torch.float16, Uniform(2), 64, 1040)]
    for seed, (dtype, grid, rows, cols) in enumerate(cases):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int, g: torch.Generator = g, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        w, grad, third = (draw(rows, cols) for _ in range(3))
        scale = torch.rand(rows, generator=g) * 0.3 + 0.1
        levels, code = grid.levels_tensor("cpu"), grid.encoding
        yield "fake_quantize", [w, scale, levels, code, True, False, 0]
        yield "fake_quantize", [w, scale, levels, code, True, True, 7]
        yield "fake_quantize_out_", [w, scale, levels, code, torch.zeros(rows, cols, dtype=torch.bfloat16)]
        yield "fake_quantize_backward", [grad, w, scale, levels, code]
        yield "ste_clip_", [grad, w, scale, levels, code]
        yield "ste_clip_scale_grad_", [grad, w, scale, levels, code, True, 0.5]
        yield "project_interval_", [w, scale, levels, code, torch.tensor(0.3)]
        yield "soft_quantize", [w, scale, levels, code, torch.tensor(0.3)]
        yield "row_sums", [w, rows]
        sums = reference.row_sums(w, rows)
        sums[1] = 0
        listed = [scale, torch.ones(rows), scale.clone()], [sums, sums, sums]
        yield (
            "scales_from_sums_",
            [*listed, [0, 0, cols, 3, 2, cols, 1, 3, cols], [7.0, 0, 0, 7.0, 2.5, 0, 7.0, 3.0, 2.0]],
        )
        yield "mse_scales", [w, sums, levels, code, grid.c_max, 0]

        bits = 4 if grid is NF4 else grid.bits
        codes = torch.randint(0, 256, (rows, contract.row_bytes(cols, bits)), generator=g, dtype=torch.uint8)
        yield "packed_dequantize_", [codes, scale, levels, code, bits, torch.zeros(rows, cols, dtype=dtype)]
        for tokens in (1, 8, 33):
            product = [draw(tokens, cols), codes, scale, levels, code, bits, draw(rows)]
            yield "packed_linear", product
            yield "packed_linear_bf16", product
            if grid is not NF4:  # activations in int8 want integer levels
                yield "packed_linear_int8", product
                bands = reference.packed_bands(codes, bits, cols, 1, len(grid.levels))
                beside = packed.band_scales(scale, rows, 1)
                yield "packed_bands_linear", [product[0], bands, beside, code, bits, rows, product[-1]]
        if grid is not NF4:
            yield "packed_bands", [codes, bits, cols, 1, len(grid.levels)]
            yield "packed_bands_codes", [bands, bits, rows, cols, 1]
            geometry = [1, 1, 1, 2, 1, 1, 0, 0, 0, 0]
            image = draw(2, cols, 3, 5), bands, beside, code, bits, rows, geometry, False, draw(rows)
            yield "packed_bands_conv", list(image)
            pixels, taps = draw(2, 5, 4, cols).float(), draw(6, cols).float()
            yield "packed_depthwise", [pixels, taps, [2, 3, 2, 1, 1, 1, 1, 0, 0, 2], draw(cols).float()]
        half = torch.float16 if dtype is torch.float16 else torch.bfloat16
        form = packed.tile_form(grid.levels, code, half)
        tiles = packed.packed_tiles(codes, code, bits, cols, len(grid.levels), form)
        for tokens in (1, 8, 33):
            x, bias = draw(tokens, cols).to(half), draw(rows).to(half)
            yield "packed_tiles_linear", [x, tiles, scale, levels, code, form, rows, 1, bias]

        nothing, integers = torch.empty(0), torch.randint(-900, 900, (rows, 24), generator=g, dtype=torch.int32)
        yield "token_levels", [w, nothing, [contract.UNIFORM, -127, 127], 127.0, torch.int8]
        yield "token_levels", [w, nothing, [contract.FLOAT, -448, 448], 448.0, torch.float8_e4m3fn]
        yield "scaled_sums", [integers, scale, torch.rand(24, generator=g), draw(24), dtype]
        q, c = (torch.randint(-8, 8, shape, generator=g, dtype=torch.int8) for shape in ((rows, 24), (9, 24)))
        yield "level_product", [q, scale, c, torch.rand(9, generator=g), draw(9), False, dtype]
        yield "stochastic_levels", [w, torch.rand(cols, generator=g), torch.tensor(2**40 + 7)]
        yield "luq", [w, 4, torch.tensor(2**40 + 7)]

        outs = [[torch.zeros(rows, cols, dtype=torch.bfloat16)], [torch.zeros(rows, 3)],
                [torch.zeros(6, dtype=torch.float64)]]  # fmt: skip
        rates = [torch.tensor(0.01), torch.tensor(0.3), 1.0]
        tail = [False, True, False, False]  # direction, clamp, maximize, skip_nonfinite
        for rule in RULES.values():
            states = [torch.ones_like(w) for _ in rule.buffers]
            numbers = rule.numbers_of({**rule.defaults, "momentum": 0.9, "weight_decay": 0.01})
            step = [[w], [grad], states, [scale], [levels], code, *outs, torch.tensor(1.0), *rates, numbers, *tail]
            yield rule.operator, step
            yield rule.operator, [*step[:11], torch.tensor(1.0), *step[12:]]  # hold
            yield rule.operator, [*step, [third], [grad.flip(0)], torch.tensor([0.1, 0.0])]  # a SAM step
            if grid is not NF4:  # levels that one byte holds, and the clip of the gradient
                copies = [[torch.zeros(rows, cols, dtype=torch.int8)], *outs[1:]]
                yield rule.operator, [*step[:6], *copies, *step[9:], [], [], None, True]

        scales, strengths = torch.rand(2, rows, generator=g) + 0.5, torch.tensor([0.3, 0.7])
        yield "mix_fake_quantize", [w, scales, strengths, [1, -2, 1, 0, 0, 0], True, True]
        yield "mix_fake_quantize_backward", [grad, w, scales, strengths, [1, -2, 1, 0, 0, 0], True, True]
        yield "sam_norm", [[w, third], [grad, w], [1, 0], 0.01]
        yield "sam_perturb_", [[w, third], [grad, w], [grad * 0, w * 0], torch.tensor([0.1, 0.0]), [1, 0], 0.0]
        yield "sam_restore_", [[w], [grad]]
        yield "sam_average_", [[w], [grad], torch.tensor([0.1, 0.01])]


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return [mapped(v, change) for v in value]
    return change(value) if isinstance(value, Tensor) else value


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors(v)
    elif isinstance(value, Tensor):
        yield value


def largest_error(got: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest difference as a share of what is allowed, 1 or less where all is well."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise Wrong(f"expected {expected.dtype} {tuple(expected.shape)}, got {got.dtype} {tuple(got.shape)}")
    if not expected.numel():
        return 0.0
    got, want = got.double().nan_to_num(1e300), expected.double().nan_to_num(1e300)
    rounding = 2 * torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    allowed = rounding * want.abs() + tolerance * float(want.abs().max()) + 1e-12
    return float(((got - want).abs() / allowed).max())


def compare(name: str, got: Any, expected: Any, tolerance: float) -> float:
    """The largest error as a share of what is allowed; raises Wrong where that is more than 1."""
    worst = max([largest_error(a.cpu(), b, tolerance) for a, b in zip(tensors(got), tensors(expected), strict=True)])
    if not worst <= 1:
        raise Wrong(f"{name}: {worst:.3g} times the allowed error")
    return worst


def operator_check(name: str, backend: str, device: str, small: bool) -> str:
    """All samples of an operator: its results and everything it was given, as the reference leaves them."""
    call = getattr(torch.ops.askew, name) if backend == "cpp" else runtime.implementation(backend, name)
    tolerance = SUM_TOLERANCE if name in SUMS else TOLERANCE
    count, worst = 0, 0.0
    for sample, arguments in samples(small):
        if sample != name:
            continue
        expected = mapped(arguments, torch.clone)
        wanted = getattr(reference, name)(*expected)
        placed = mapped(arguments, lambda t: t.to(device, copy=True) if t.dim() else t)  # rates stay on the host
        got = call(*placed)
        worst = max(worst, compare(f"sample {count}", [got, placed], [wanted, expected], tolerance))
        count += 1
    return f"{count} samples, {worst:.2g} of the allowed error"


# ---- layers and optimizers -------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return ak.quantize_(nn.Sequential(nn.Linear(256, 192), nn.GELU(), nn.Linear(192, 64)), ak.QuantConfig(Uniform(4)))


def trained(device: str, eps: float, steps: int = 3, autocast: bool = False, rule: str = "ASkewSGD") -> nn.Sequential:
    """The network after some steps on fixed data."""
    model = network().to(device)
    optimizer = getattr(ak.optim, rule)(
        ak.param_groups(model), lr=0.01 if rule == "ASkewAdamW" else 1.0, constraint_eps=eps
    )
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = (torch.randn(16, n, generator=g).to(device) for n in (256, 64))
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=autocast):
            out = model(x)
        optimizer.zero_grad()
        functional.mse_loss(out.float(), y).backward()
        optimizer.step()
    return model


def training_check(device: str, backend: str, eps: float, autocast: bool = False, rule: str = "ASkewSGD") -> str:
    """The trained weights. A last bit of a gradient may put single weights elsewhere: 1 in 100 are allowed to,
    1 in 20 where gradients are bfloat16."""
    with runtime.use_backend("reference"):
        expected = trained("cpu", eps, autocast=autocast, rule=rule)
    with runtime.use_backend(backend):
        got = trained(device, eps, autocast=autocast, rule=rule)
    off = moved = total = 0
    for p, q, start in zip(got.parameters(), expected.parameters(), network().parameters(), strict=True):
        off += int(((p.cpu() - q).abs() > (1e-3 if autocast else 1e-4)).sum())
        moved += int(((q - start).abs() > 1e-3).sum())
        total += q.numel()
    if off > total / (20 if autocast else 100):
        raise Wrong(f"{off} of {total} weights differ, {moved} have moved")
    return f"{off} of {total} weights differ, {moved} have moved"


def packed_check(device: str, backend: str, rows: int) -> str:
    model = ak.hard_quantize_(network())
    packed = ak.pack_(copy.deepcopy(model)).to(device)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with runtime.use_backend("reference"):
            expected = model.eval()(x)
        with runtime.use_backend(backend):
            exact = compare("float32", packed(x.to(device)), expected, SUM_TOLERANCE)
            half = compare("bfloat16", packed.bfloat16()(x.to(device, torch.bfloat16)).float(), expected, 0.03)
    return f"{exact:.2g} of the allowed error, bfloat16 {half:.2g}"


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """``step`` as a CUDA graph, after three calls that compile, upload and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def graph_check(backend: str, eps: float) -> str:
    """Replayed steps train as eager ones do."""
    x, y = (torch.randn(16, n, generator=torch.Generator().manual_seed(3)).cuda() for n in (256, 64))
    weights = []
    for capture in (False, True):
        model = network().cuda()
        optimizer = ak.optim.ASkewSGD(
            ak.param_groups(model), lr=0.01, momentum=0.9, constraint_eps=eps, telemetry_every=0
        )

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            functional.mse_loss(model(x), y).backward()
            optimizer.step()

        with runtime.use_backend(backend):
            if capture:
                replay = captured(step)  # three steps, and none while it is captured
                for _ in range(3):
                    replay()
            else:
                for _ in range(6):
                    step()
        weights.append([p.detach().cpu() for p in model.parameters()])
    return f"{compare('weights', weights[1], weights[0], 1e-4):.2g} of the allowed error"


def checks(backend: str, device: str, small: bool) -> list[tuple[str, Check]]:
    made: list[tuple[str, Check]] = [
        (name, functools.partial(operator_check, name, backend, device, small)) for name in schema.OPERATORS
    ]
    if small and backend == "triton":  # the interpreter is slow
        return made
    phases = (("hold", 1.0), ("annealed", 0.3))
    trains = functools.partial(training_check, device, backend)
    made += [(f"training step, {title}", functools.partial(trains, eps)) for title, eps in phases]
    if device != "cpu" and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:  # a capture needs torch's allocator
        made += [(f"training step in a CUDA graph, {title}", functools.partial(graph_check, backend, eps))
                 for title, eps in phases]  # fmt: skip
    made += [(f"PackedLinear, {rows} rows", functools.partial(packed_check, device, backend, rows))
             for rows in (1, 8, 64, 200)]  # fmt: skip
    made.append(("training step, AdamW", functools.partial(trains, 0.3, False, "ASkewAdamW")))
    # last, for the CPU takes long over bfloat16
    made += [(f"training step, bf16 autocast, {title}", functools.partial(trains, eps, True)) for title, eps in phases]
    return made


def usable(device: str) -> bool:
    """Whether the device still answers; an illegal address leaves it unusable for this process."""
    try:
        if device != "cpu":
            torch.cuda.synchronize()
            torch.zeros(1, device=device).item()
    except Exception:
        return False
    return True


def smoke(backend: str, device: str, small: bool, first: int, part: tuple[int, int] = (1, 1)) -> int:
    """Runs the checks from number ``first`` on; negative: as it is, and one of the checks before failed."""
    if backend == "cpp" and device != "cpu" and not runtime.cuda_archs_fit():
        print(f"cpp RAISED: the compiled module does not serve this GPU: {runtime.choose_backend('cuda')}")
        return 1
    failed, start = first < 0, abs(first)
    every = checks(backend, device, small)[part[0] - 1 :: part[1]]
    for i in range(start, len(every)):
        name, check = every[i]
        print(f"{backend} {name} ...", end=" ", flush=True)
        began = time.perf_counter()
        try:
            said = check()
            if device != "cpu":
                torch.cuda.synchronize()
            print(f"ok ({said}, {time.perf_counter() - began:.1f} s)", flush=True)
            continue
        except Wrong as error:
            print(f"WRONG {error}", flush=True)
        except Exception as error:
            text = str(error).strip().splitlines()
            print(f"RAISED {type(error).__name__}: {text[0] if text else ''}"[:300], flush=True)
        failed = True
        if not usable(device) and i + 1 < len(every):
            print(f"{backend}: the device is unusable after this; starting anew", flush=True)
            arguments = [a for a in sys.argv[1:] if not a.startswith("--from")]
            os.execv(sys.executable, [sys.executable, __file__, *arguments, f"--from=-{i + 1}"])
    return int(failed)


# ---- training steps under CUDA graphs --------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any], device: str, calls: int = 20, turns: int = 7) -> float:
    """Median over turns of the time of one of ``calls`` calls in a row, host and device together."""
    times = []
    for _ in range(turns):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3 / calls)
    return statistics.median(times)


def graphs(device: str, small: bool, path: Path | None) -> int:
    """A line for each network, optimizer and precision: milliseconds of an eager step and of a replayed one."""
    from askew_kernels.bench.suites.train import GPT, mlp

    failed = False
    rows: list[dict[str, Any]] = []
    texts = torch.randint(
        0, 128, (4 if small else 32, 33 if small else 257), generator=torch.Generator().manual_seed(3)
    )
    images = torch.randn(16 if small else 256, 784, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(len(images)) % 10
    networks: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
        "MLP": (lambda: mlp(64 if small else 1024), images, labels),
        "GPT": (lambda: GPT(32, 1, 32) if small else GPT(512, 6, 256), texts[:, :-1], texts[:, 1:]),
    }
    rules = [("torch fused", False, 1.0), ("torch fused", True, 1.0), ("ASkew hold", False, 1.0),
             ("ASkew hold", True, 1.0), ("ASkew annealed", False, 0.3), ("ASkew annealed", True, 0.3)]  # fmt: skip
    for title, (made, x, y) in networks.items():
        x, y = x.to(device), y.contiguous().to(device)
        for rule, autocast, eps in rules:
            name = f"{title}, {rule}{', bf16 autocast' if autocast else ''}"
            print(f"graphs {name} ...", end=" ", flush=True)
            try:
                torch.manual_seed(5)
                model = made().to(device)
                optimizer: torch.optim.Optimizer = torch.optim.SGD(
                    model.parameters(), lr=0.01, momentum=0.9, fused=True
                )
                if rule != "torch fused":
                    ak.quantize_(model, ak.QuantConfig(Uniform(4), scale="sawb"))
                    optimizer = ak.optim.ASkewSGD(
                        ak.param_groups(model), lr=0.01, momentum=0.9, constraint_eps=eps, telemetry_every=0, fused=True
                    )

                def step(model: nn.Module = model, optimizer: Any = optimizer, autocast: bool = autocast,
                         x: Tensor = x, y: Tensor = y) -> None:  # fmt: skip
                    with torch.autocast(device, torch.bfloat16, enabled=autocast):
                        out = model(x)
                    optimizer.zero_grad()
                    functional.cross_entropy(out.float().flatten(0, -2), y.flatten()).backward()
                    optimizer.step()

                calls, turns = (1, 1) if small else (20, 7)
                for _ in range(3):
                    step()
                row = {"case": name, "device": device, "eager_ms": milliseconds(step, device, calls, turns)}
                if device != "cpu":
                    row["graph_ms"] = milliseconds(captured(step), device, calls, turns)
                rows.append(row)
                print(
                    "ok " + ", ".join(f"{k[:-3]} {v:.3f} ms" for k, v in row.items() if k.endswith("_ms")), flush=True
                )
            except Exception as error:
                failed = True
                text = str(error).strip().splitlines()
                print(f"RAISED {type(error).__name__}: {text[0] if text else ''}"[:300], flush=True)
            if path is not None:
                path.write_text(json.dumps(rows, indent=1) + "\n")
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["cpp", "triton", "reference", "graphs"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small tensors and few checks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the check to begin with")
    arguments = parser.parse_args()
    if arguments.what == "graphs":
        return graphs(arguments.device, arguments.small, arguments.json)
    i, n = map(int, arguments.part.split("/"))
    return smoke(arguments.what, arguments.device, arguments.small, arguments.first, (i, n))


if __name__ == "__main__":
    sys.exit(main())
