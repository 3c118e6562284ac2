"""Contract: the CUDA kernels (csrc/cuda/*.cu, the very sources) compute what reference.py says.

There need not be a GPU: g++ compiles the kernels against tests/cuda_emulator, which runs every block's threads as
fibers on the CPU. Codes agree exactly. Floats agree bit for bit where the operations and their order are the same, and
within the bound that stands beside the comparison where sums are added in another order.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import oracles
import pytest
import torch

from askew_kernels import contract, reference
from askew_kernels.ops import RULES, packed
from askew_kernels.quant import FP4

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent / "cuda_emulator"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COPIES = {**TYPES, torch.int8: 3, torch.float8_e4m3fn: 4}
EMPTY = torch.empty(0)
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip
GRIDS = {  # name -> (grid, levels, largest bracket in grid units)
    "uniform4": ([1, -8, 7], EMPTY, 1.0),
    "narrow3": ([1, -3, 3], EMPTY, 1.0),
    "unsigned2": ([1, 0, 3], EMPTY, 1.0),
    "binary": ([2, -1, 1], EMPTY, 2.0),
    "ternary": ([1, -1, 1], EMPTY, 1.0),
    "nf4": ([3, 0, 0], NF4, 0.31),
    "two": ([3, 0, 0], torch.tensor([-0.5, 2.0]), 2.5),
    "five": ([3, 0, 0], torch.tensor([-2.0, -0.25, 0.5, 0.75, 3.0]), 2.25),
}

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the CUDA emulator needs g++ on x86-64"
)


class GridArg(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("lo", ctypes.c_float), ("hi", ctypes.c_float), ("levels", ctypes.c_void_p),
                ("n_levels", ctypes.c_int)]  # fmt: skip


class Scalar(ctypes.Structure):
    _fields_ = [("value", ctypes.c_double), ("device", ctypes.c_void_p), ("is_double", ctypes.c_bool)]


class Rates(ctypes.Structure):
    _fields_ = [*((n, Scalar) for n in "lr eps step alpha".split()), ("numbers", ctypes.c_double * 4)]


class Hyper(ctypes.Structure):
    _fields_ = [("rule", ctypes.c_int), *((n, ctypes.c_float) for n in "lr eps alpha cap".split()),
                *((n, ctypes.c_bool) for n in "direction clamp maximize skip_nonfinite ste_clip".split()),
                ("constants", ctypes.c_float * 8)]  # fmt: skip


class UpdateTensor(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in "w g a b scale dequantized row_sums totals".split()),
        ("type", ctypes.c_int), ("dequantized_type", ctypes.c_int), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64),
        ("grid", GridArg), ("kept", ctypes.c_void_p), ("first", ctypes.c_void_p), ("past_caches", ctypes.c_bool),
    ]  # fmt: skip


class ScaleTensor(ctypes.Structure):
    _fields_ = [("sums", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("rows", ctypes.c_int64),
                *((n, ctypes.c_double) for n in "cols c_max first second".split()), ("rule", ctypes.c_int),
                ("type", ctypes.c_int)]  # fmt: skip


class MseArg(ctypes.Structure):
    _fields_ = [("w", ctypes.c_void_p), ("sums", ctypes.c_void_p), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64),
                ("grid", GridArg), ("c_max", ctypes.c_double), ("type", ctypes.c_int),
                ("scale_type", ctypes.c_int), ("unit", ctypes.c_void_p)]  # fmt: skip


class SamTensor(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in "w g kept".split()] + [
        ("type", ctypes.c_int),
        ("adaptive", ctypes.c_bool),
        ("n", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def kernels():
    """The kernels, compiled for the CPU; kept in the temporary folder by the hash of everything that is compiled."""
    sources = sorted([*HERE.iterdir(), *(ROOT / "csrc/cuda").glob("*.cu*"), ROOT / "csrc/cuda/kernels.h",
                      ROOT / "csrc/tuning.h", *(ROOT / "csrc/math").iterdir()])  # fmt: skip
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"askew_cuda_emulated_{digest}.so"
    if not target.is_file():
        made = target.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{HERE}",
             str(HERE / "entry.cpp"), "-o", str(made)], check=True)  # fmt: skip
        made.replace(target)
    return ctypes.CDLL(str(target))


# ---- calling the kernels --------------------------------------------------------------------------------------------


def pointer(t):
    return ctypes.c_void_p(t.data_ptr() if t is not None and t.numel() else None)


def grid_arg(name):
    (kind, lo, hi), levels, _ = GRIDS[name]
    return GridArg(kind, lo, hi, levels.data_ptr() if levels.numel() else None, levels.numel())


def matrix(x, scale):
    rows = scale.numel()
    return ctypes.c_int64(rows), ctypes.c_int64(x.numel() // rows if rows else 0)


def guarded(t, shift=0):
    """A copy of t between guard elements, ``shift`` elements off a 16-byte boundary; and a check of the guards."""
    guard = torch.full((1,), 77.0, dtype=t.dtype)
    buffer = guard.repeat(t.numel() + 64)
    start = (-(buffer.data_ptr() // t.element_size())) % (16 // t.element_size()) + 16 + shift
    view = buffer[start : start + t.numel()].view(t.shape)
    view.copy_(t)

    def intact():
        return bool((buffer[:start] == guard).all()) and bool((buffer[start + t.numel() :] == guard).all())

    return view, intact


def same(a, b):
    """Equal bits, but any NaN equals any NaN and -0 equals 0."""
    if torch.float8_e4m3fn in (a.dtype, b.dtype):
        return a.dtype == b.dtype and same(a.float(), b.float())
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---- what is computed -----------------------------------------------------------------------------------------------

# (rows, cols): no columns, single elements, odd widths, groups, rows in one block, rows in pieces
SHAPES = [(3, 0), (1, 1), (1, 7), (5, 1), (300, 1), (4, 7), (2, 129), (40, 32), (3, 96), (9, 100), (6, 1024),
          (2, 4096), (1, 5003), (1, 20000), (2, 13000)]  # fmt: skip

SHORT = [(3, 0), (1, 1), (4, 7), (2, 129), (40, 32)]


def shapes_for(grid):
    """Every shape for one grid of each kind, some for the others."""
    return SHAPES if grid in ("uniform4", "binary", "nf4") else SHORT


def weights(rows, cols, grid, dtype, seed, spread=1.15):
    """Weights over the hull and a little beyond, many of them on levels and on midpoints, with inf and NaN; scales."""
    (_, _, _), levels, _ = GRIDS[grid]
    lo, hi = reference.hull(levels, GRIDS[grid][0])
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randn(rows, generator=g) * 2)
    x = (torch.rand(rows, cols, generator=g) - 0.5) * (hi - lo) * spread + (hi + lo) / 2
    special = torch.rand(rows, cols, generator=g)
    x = torch.where(special < 0.2, torch.round(2 * x) / 2, x)
    x = torch.where(special > 0.98, torch.zeros_like(x), x)
    w = (x * scale[:, None]).to(dtype)
    flat = w.view(-1)
    if flat.numel() > 20:
        flat[torch.randint(flat.numel(), (4,), generator=g)] = torch.tensor(
            [float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype
        )
    return w, scale


CASES = list(itertools.product(GRIDS, TYPES))


def test_launch_parameters_change_no_bits(kernels):
    """Matrices that are large enough for them to count: short rows, rows in pieces, odd rows; sums included."""
    for rows, cols in ((16400, 128), (2, 1050000), (2100, 1001)):
        w, scale = weights(rows, cols, "uniform4", torch.bfloat16, rows)
        results = []
        for slots in (16, 5):
            kernels.emulated_set_slots(ctypes.c_int64(slots))
            y, g, p = torch.full_like(w, 99.0), torch.ones_like(w), w.clone()
            sums = torch.full((rows, 3), 99.0)
            eps = Scalar(0.3, None, False)
            common = (pointer(scale), grid_arg("uniform4"))
            size = matrix(w, scale)
            assert not kernels.emulated_fake_quantize(
                pointer(w), 1, pointer(y), 1, *common, *size, 0, ctypes.c_uint64(0)
            )
            assert not kernels.emulated_ste_clip(pointer(g), pointer(w), 1, pointer(g), *common, *size)
            assert not kernels.emulated_project_interval(pointer(p), 1, *common, eps, *size)
            assert not kernels.emulated_row_sums(pointer(w), 1, *size, pointer(sums))
            results.append((y, g, p, sums))
        kernels.emulated_set_slots(ctypes.c_int64(16))
        for other in results[1:]:
            assert all(map(same, results[0], other))


@pytest.mark.parametrize(("grid", "dtype"), CASES)
def test_fake_quantize(kernels, grid, dtype):
    for seed, ((rows, cols), shift) in enumerate(itertools.product(shapes_for(grid), (0, 1))):
        w, scale = weights(rows, cols, grid, dtype, seed)
        x, _ = guarded(w, shift)
        for out in TYPES if seed % 3 == 0 else [dtype]:
            for stochastic in (False, True) if out == dtype else (False,):
                y, intact = guarded(torch.full(w.shape, 99.0, dtype=out), shift)
                assert not kernels.emulated_fake_quantize(
                    pointer(x), TYPES[dtype], pointer(y), TYPES[out], pointer(scale), grid_arg(grid), *matrix(x, scale),
                    int(stochastic), ctypes.c_uint64(2**40 + seed))  # fmt: skip
                if stochastic:
                    expected = reference.fake_quantize(
                        w.float(), scale, GRIDS[grid][1], GRIDS[grid][0], True, True, 2**40 + seed
                    ).to(out)
                    # at an exact midpoint both ends are as near: which one a uniform below 1/2 means is left open
                    near, u, side, delta = reference.place(w.float() / scale[:, None], GRIDS[grid][1], GRIDS[grid][0])
                    ends = [(scale[:, None] * end).to(out) for end in (near, near - side * delta)]
                    expected = torch.where((u == 0.5) & ((y == ends[0]) | (y == ends[1])), y, expected)
                else:
                    expected = torch.empty(w.shape, dtype=out)
                    reference.fake_quantize_out_(w, scale, GRIDS[grid][1], GRIDS[grid][0], expected)
                assert same(y, expected) and intact(), (rows, cols, shift, out, stochastic)


def test_stochastic_rounding_at_an_end_of_the_hull_stays_there(kernels):
    """With this scale 7 s / s rounds to just above 7, into a bracket whose other end is no level; the three seeds draw
    uniforms that would choose it."""
    w, scale = torch.full((1, 4096), 1e3), torch.tensor([0.10240331292152405])
    for seed, shift in itertools.product((817, 1839, 2229), (0, 1)):
        x, (y, _) = guarded(w, shift)[0], guarded(torch.zeros_like(w), shift)
        assert not kernels.emulated_fake_quantize(
            pointer(x), 0, pointer(y), 0, pointer(scale), grid_arg("uniform4"), *matrix(x, scale), 1,
            ctypes.c_uint64(seed))  # fmt: skip
        assert (y == 7 * scale).all(), (seed, shift)


@pytest.mark.parametrize(("grid", "dtype"), CASES)
def test_ste_clip(kernels, grid, dtype):
    for seed, ((rows, cols), shift) in enumerate(itertools.product(shapes_for(grid), (0, 3))):
        w, scale = weights(rows, cols, grid, dtype, seed, spread=1.5)
        x, _ = guarded(w)
        grad, _ = guarded(torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)).to(dtype), shift)
        expected = reference.fake_quantize_backward(grad, w, scale, GRIDS[grid][1], GRIDS[grid][0])
        fresh, intact = guarded(torch.full_like(w, 99.0), shift)
        for out in (fresh, grad):  # the last one in place
            assert not kernels.emulated_ste_clip(
                pointer(grad), pointer(x), TYPES[dtype], pointer(out), pointer(scale), grid_arg(grid), *matrix(x, scale)
            )
            assert same(out, expected) and intact(), (rows, cols, shift)


@pytest.mark.parametrize(("grid", "dtype"), CASES)
def test_scale_gradient(kernels, grid, dtype):
    """The clip is ``ste_clip_``'s, to the bit; of the scale's gradient, float32 sums have at most 133 terms."""
    for seed, ((rows, cols), shift) in enumerate(itertools.product([*shapes_for(grid), (1, 70000), (300, 16)], (0, 3))):
        w, scale = weights(rows, cols, grid, dtype, seed, spread=1.5)
        x, _ = guarded(w)
        g = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        levels, encoding = GRIDS[grid][1], GRIDS[grid][0]
        expected = reference.ste_clip_scale_grad_(g.clone(), w, scale, levels, encoding, False, 0.37)
        top = max(map(abs, reference.hull(levels, encoding)))
        size = 0.37 * top * g.double().abs().reshape(scale.numel(), -1).sum(1) if w.numel() else torch.zeros(rows)
        for clips in (False, True):
            grad, intact = guarded(g, shift)
            found, alone = guarded(torch.full((scale.numel(),), 99.0))
            assert not kernels.emulated_scale_gradient(
                pointer(grad), pointer(x), TYPES[dtype], pointer(grad) if clips else None, pointer(scale),
                grid_arg(grid), *matrix(x, scale), ctypes.c_double(0.37), pointer(found)
            )  # fmt: skip
            wanted = reference.fake_quantize_backward(g, w, scale, levels, encoding) if clips else g
            assert same(grad, wanted) and intact() and alone(), (rows, cols, shift)
            close = (found.double() - expected.double()).abs() <= 140 * 2.0**-24 * size + 1e-30
            assert bool((close | (found.isnan() & expected.isnan())).all()), (rows, cols, shift, found, expected)


@pytest.mark.parametrize(("grid", "dtype"), CASES)
def test_soft_quantize(kernels, grid, dtype):
    for seed, ((rows, cols), shift) in enumerate(itertools.product(shapes_for(grid), (0, 1))):
        w, scale = weights(rows, cols, grid, dtype, seed)
        slack = torch.tensor([1.0, 0.5, 1e-3][seed % 3], dtype=torch.float64 if seed % 2 else torch.float32)
        (x, _), (y, intact) = guarded(w, shift), guarded(torch.full_like(w, 9.0), shift)
        source = Scalar(0, slack.data_ptr(), seed % 2 == 1) if seed % 4 < 2 else Scalar(float(slack), None, False)
        assert not kernels.emulated_soft_quantize(
            pointer(x), pointer(y), TYPES[dtype], pointer(scale), grid_arg(grid), source, *matrix(x, scale)
        )
        expected = reference.soft_quantize(w, scale, GRIDS[grid][1], GRIDS[grid][0], slack.float())
        assert same(y, expected) and intact(), (rows, cols, shift)


@pytest.mark.parametrize(("grid", "dtype"), CASES)
def test_project_interval(kernels, grid, dtype):
    for seed, ((rows, cols), shift) in enumerate(itertools.product(shapes_for(grid), (0, 1))):
        w, scale = weights(rows, cols, grid, dtype, seed)
        eps = torch.tensor([1.0, 0.5, 1e-3, 1.6e-5][seed % 4], dtype=torch.float64 if seed % 2 else torch.float32)
        x, intact = guarded(w, shift)
        source = Scalar(0, eps.data_ptr(), seed % 2 == 1) if seed % 3 else Scalar(float(eps), None, False)
        assert not kernels.emulated_project_interval(
            pointer(x), TYPES[dtype], pointer(scale), grid_arg(grid), source, *matrix(x, scale)
        )
        expected = w.clone()
        reference.project_interval_(expected, scale, GRIDS[grid][1], GRIDS[grid][0], eps)
        # The radius is computed in float32 here and in float64 there: 4 roundings of it, then the product and sum.
        bound = 8 * 2.0**-24 * scale.max().item() * 10 if scale.numel() else 0
        bound += torch.finfo(dtype).eps * expected.float().abs() if dtype != torch.float32 else 0
        close = (x.float() - expected.float()).abs() <= bound
        assert bool((close | (x == expected) | (x.isnan() & expected.isnan())).all()) and intact(), (rows, cols, shift)


@pytest.mark.parametrize("dtype", TYPES)
def test_row_sums(kernels, dtype):
    for seed, ((rows, cols), shift) in enumerate(itertools.product([*SHAPES, (1, 70000), (300, 2100)], (0, 1))):
        g = torch.Generator().manual_seed(seed)
        x, _ = guarded(torch.randn(rows, cols, generator=g).to(dtype), shift)
        if seed % 5 == 0 and x.numel() > 3:
            x.view(-1)[2] = float("nan")
        sums, intact = guarded(torch.full((rows, 3), 99.0))
        if rows:
            assert not kernels.emulated_row_sums(
                pointer(x), TYPES[dtype], ctypes.c_int64(rows), ctypes.c_int64(cols), pointer(sums)
            )
            expected = reference.row_sums(x, rows)
            # at most 128 + 5 float additions of positive numbers in a row, doubles from there on
            assert torch.allclose(sums[:, :2], expected[:, :2], rtol=135 * 2.0**-24, atol=0, equal_nan=True)
            assert same(sums[:, 2], expected[:, 2]) and intact(), (rows, cols, shift)


# ---- the update -----------------------------------------------------------------------------------------------------

OPTIONS = {  # name -> what differs from the plain step
    "plain": {},
    "hold": {"eps": 1.0},
    "momentum": {"momentum": 0.9, "dampening": 0.1},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
    "direction": {"momentum": 0.9, "direction": True},
    "clamp": {"clamp": True, "momentum": 0.9},
    "maximize": {"maximize": True, "weight_decay": 0.1, "clamp": True},
    "skip": {"skip_nonfinite": True, "momentum": 0.9, "clamp": True},
    "nonfinite": {"momentum": 0.9},
    "still": {"lr": 0.0, "clamp": True},
    "least": {"lr": 1e-42, "alpha": 1e38, "clamp": True},
    "ste_clip": {"ste_clip": True, "weight_decay": 0.1},
    "ste_clip_hold": {"ste_clip": True, "eps": 1.0, "momentum": 0.9, "maximize": True, "skip_nonfinite": True},
    "adamw_direction": {"rule": "adamw", "direction": True, "skip_nonfinite": True},
    "adamw_hold": {"rule": "adamw", "eps": 1.0},
    **{rule: {"rule": rule, "weight_decay": 0.01, "clamp": True} for rule in RULES if rule != "sgd"},
}
DEFAULTS = {"lr": 0.05, "eps": 0.3, "alpha": 0.7, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0,
            "nesterov": False, "direction": False, "clamp": False, "maximize": False, "skip_nonfinite": False,
            "ste_clip": False, "rule": "sgd", "step": 3.0, "betas": (0.9, 0.95), "adam_eps": 1e-8}  # fmt: skip


def make_problem(specs, o, seed):
    """Lists of tensors: specs is a list of (rows, cols, grid, dtype, shift, copy dtype or None, sums, totals)."""
    p = {k: [] for k in "params grads a b scales levels grids dequantized row_sums totals".split()}
    g = torch.Generator().manual_seed(seed)
    for i, (rows, cols, grid, dtype, _shift, copy, sums, totals) in enumerate(specs):
        w, scale = weights(rows, cols, grid, dtype, seed + i)
        w[~w.isfinite()] = 0.3
        grad = torch.randn(rows, cols, generator=g).mul(3).to(dtype)
        if o.get("bad_gradients") and grad.numel() > 4:
            grad.view(-1)[::5] = float("nan")
            grad.view(-1)[1::7] = -float("inf")
        state = torch.randn(rows, cols, generator=g).to(dtype), torch.rand(rows, cols, generator=g).to(dtype)
        buffers = len(RULES[o["rule"]].buffers) if RULES[o["rule"]].keeps_buffers(o) else 0
        p["params"].append(w)
        p["grads"].append(grad)
        for k in range(2):
            p["ab"[k]].append(state[k] if k < buffers else torch.empty(0, dtype=dtype))
        p["scales"].append(scale)
        p["levels"].append(GRIDS[grid][1])
        p["grids"].append(GRIDS[grid][0])
        p["dequantized"].append(torch.full((rows, cols), 99.0, dtype=copy) if copy else torch.empty(0))
        p["row_sums"].append(torch.full((rows, 3), 99.0) if sums else torch.empty(0))
        p["totals"].append(
            torch.full((6,), 99.0, dtype=torch.float64) if totals else torch.empty(0, dtype=torch.float64)
        )
    return p


WRITTEN = ("params", "a", "b", "dequantized", "row_sums", "totals")


def run_kernels(kernels, specs, p, o, on_device=False, kept=None, firsts=None, coefficients=None):
    """One step by the kernels; returns what was written, and whether the guards around it are intact."""
    out, guards = {k: [] for k in WRITTEN}, []
    inputs = []  # kept alive
    tensors = (UpdateTensor * len(specs))()
    for i, (rows, cols, grid, dtype, shift, copy, _sums, _totals) in enumerate(specs):
        for k in WRITTEN:
            view, intact = guarded(p[k][i], shift if k not in ("row_sums", "totals") else 0)
            out[k].append(view)
            guards.append(intact)
        grad, _ = guarded(p["grads"][i], shift)
        inputs.append(grad)
        t = tensors[i]
        t.w, t.g, t.a, t.b = (
            pointer(v[i] if isinstance(v, list) else v) for v in (out["params"], grad, out["a"], out["b"])
        )
        t.scale = pointer(p["scales"][i])
        t.dequantized, t.row_sums, t.totals = (pointer(out[k][i]) for k in ("dequantized", "row_sums", "totals"))
        t.type, t.dequantized_type = TYPES[dtype], COPIES[copy or torch.float32]
        t.rows, t.cols = rows, cols
        t.kept, t.first = (pointer(list[i]) if list else None for list in (kept, firsts))
        t.grid = grid_arg(grid)
    h = Hyper(list(RULES).index(o["rule"]), alpha=o["alpha"])
    for name in ("direction", "clamp", "maximize", "skip_nonfinite", "ste_clip"):
        setattr(h, name, o[name])
    rates = Rates(*(Scalar(o[k], None, False) for k in ("lr", "eps", "step", "alpha")))
    rates.numbers[:] = [*RULES[o["rule"]].numbers_of(o), *[math.nan] * 4][:4]
    if on_device:
        lr, eps, step = torch.tensor(o["lr"]), torch.tensor(o["eps"], dtype=torch.float64), torch.tensor(o["step"])
        alpha = torch.tensor(o["alpha"])
        rates.lr, rates.eps, rates.step, rates.alpha = (
            Scalar(0, lr.data_ptr(), False),
            Scalar(0, eps.data_ptr(), True),
            Scalar(0, step.data_ptr(), False),
            Scalar(0, alpha.data_ptr(), False),
        )
        h.lr = h.eps = h.cap = h.alpha = math.nan
        h.constants[:] = [math.nan] * 8
    assert not kernels.emulated_update(
        tensors, ctypes.c_size_t(len(specs)), ctypes.byref(h), ctypes.byref(rates), pointer(coefficients)
    )
    return out, all(intact() for intact in guards)


def run_reference(p, o):
    out = {k: [t.clone() for t in p[k]] for k in WRITTEN}
    row = RULES[o["rule"]]
    states = [*out["a"], *out["b"]][: len(row.buffers) * len(p["params"])]
    lr, eps = torch.tensor(o["lr"], dtype=torch.float64), torch.tensor(o["eps"], dtype=torch.float64)
    getattr(reference, row.operator)(
        out["params"], p["grads"], states, p["scales"], p["levels"], [v for g in p["grids"] for v in g],
        out["dequantized"], out["row_sums"], out["totals"], torch.tensor(o["step"]), lr, eps, o["alpha"],
        row.numbers_of(o), *(o[k] for k in ("direction", "clamp", "maximize", "skip_nonfinite")),
        ste_clip=o["ste_clip"],
    )  # fmt: skip
    return out


def check_update(kernels, specs, o, seed, on_device=False):
    p = make_problem(specs, o, seed)
    got, intact = run_kernels(kernels, specs, p, o, on_device)
    want = run_reference(p, o)
    assert intact, "written outside of the tensors"
    for i, (rows, cols, grid, dtype, shift, copy, _sums, _totals) in enumerate(specs):
        what = (rows, cols, grid, dtype, shift, copy)
        s, levels, kind = p["scales"][i].reshape(-1, 1), GRIDS[grid][1], GRIDS[grid][0]
        # Values differ by a few roundings of the terms that are added up in a step (and by one of the storage type).
        w0, w1 = p["params"][i].float(), want["params"][i].float()
        moved = o["lr"] * o["alpha"] * s * GRIDS[grid][2]
        unit = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
        for k, terms in (("params", w0.abs() + w1.abs() + (w1 - w0).abs() + moved), ("a", None), ("b", None)):
            if want[k][i].numel() == 0:
                continue
            a, b = got[k][i].float(), want[k][i].float()
            if terms is None:  # momentum: d, itself skewed, joins the old value
                gradient = p["grads"][i].float().nan_to_num(0, 0, 0).abs()
                terms = p[k][i].float().abs() + b.abs() + gradient + o["alpha"] * s * GRIDS[grid][2] * 4
            bound = 16 * 2.0**-24 * terms + unit * b.abs()
            assert bool((((a - b).abs() <= bound) | (a == b) | (a.isnan() & b.isnan())).all()), (k, what)
        stored = got["params"][i].float()
        level = (
            reference.nearest(reference.clamp_hull(stored, s, levels, kind) / s, levels, kind)
            if stored.numel()
            else stored
        )
        if copy:
            expected = torch.empty(rows, cols, dtype=copy)
            reference.write_copy(expected, s, level)
            assert same(got["dequantized"][i], expected), what
        if want["row_sums"][i].numel():
            sums, exact = got["row_sums"][i], reference.row_sums(got["params"][i], rows)
            assert torch.allclose(sums[:, :2], exact[:, :2], rtol=135 * 2.0**-24, atol=0, equal_nan=True), what
            assert same(sums[:, 2], exact[:, 2]), what
        if want["totals"][i].numel():
            a, b = got["totals"][i], want["totals"][i]
            flips = level != reference.nearest(reference.clamp_hull(w0, s, levels, kind) / s, levels, kind)
            exact = torch.stack([b[contract.INFEASIBLE], flips.sum().double(), b[contract.NONFINITE]])
            assert torch.equal(a[[contract.INFEASIBLE, contract.FLIPS, contract.NONFINITE]], exact), (what, a, b)
            # At most 135 float additions, then doubles; positive terms, but for g v, whose size is at most |g| |v|.
            gradient_norm = p["grads"][i].double().nan_to_num(0, 0, 0).norm()
            for k, size in (
                (contract.VIOLATION, b[contract.VIOLATION]),
                (contract.VELOCITY2, b[contract.VELOCITY2]),
                (contract.GRAD_VELOCITY, gradient_norm * b[contract.VELOCITY2].sqrt()),
            ):
                close = (a[k] - b[k]).abs() <= 135 * 2.0**-24 * size
                assert close or a[k] == b[k] or (not b[k].isfinite() and not a[k].isfinite()), (what, k, a, b)


def specs_for(dtype, grids, shapes, totals=True):
    copies = itertools.cycle([None, *COPIES])
    specs = [(r, c, g, dtype, i % 3 % 2, next(copies), i % 4 != 1, totals and i % 3 != 1)
             for i, (g, (r, c)) in enumerate(itertools.product(grids, shapes))]  # fmt: skip
    # a codebook's levels are no integers
    return [
        (*s[:5], None, *s[6:]) if s[5] == torch.int8 and GRIDS[s[2]][0][0] == contract.CODEBOOK else s for s in specs
    ]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_update(kernels, name, dtype):
    o = {
        **DEFAULTS,
        **OPTIONS[name],
        "bad_gradients": name in ("skip", "nonfinite", "adamw_direction", "ste_clip_hold"),
    }
    specs = specs_for(dtype, GRIDS, [(2, 129), (16, 32)])
    check_update(kernels, specs, o, 7)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["momentum", *list(RULES)[1:]])
def test_update_shapes(kernels, name, dtype):
    check_update(kernels, specs_for(dtype, ["uniform4", "binary"], SHAPES), {**DEFAULTS, **OPTIONS[name]}, 11)


@pytest.mark.parametrize("name", ["clamp", "hold", "adamw_direction", *list(RULES)[1:]])
def test_update_with_rates_on_the_device(kernels, name):
    o = {**DEFAULTS, **OPTIONS[name]}
    check_update(kernels, specs_for(torch.float32, ["uniform4", "nf4"], [(3, 64), (1, 9)]), o, 5, on_device=True)


def test_update_of_a_long_mixed_list(kernels):
    """More tensors than one launch takes, all storage types and grids in one list."""
    specs = [(1 + i % 5, 1 + 7 * i % 40, grid, dtype, i % 2, torch.bfloat16 if i % 3 else None, i % 2 == 0, i % 5 == 0)
             for i, (grid, dtype) in enumerate(itertools.islice(itertools.cycle(itertools.product(
                 ["uniform4", "binary", "nf4"], TYPES)), 60))]  # fmt: skip
    specs += [(2, 16, "ternary", torch.float32, 0, None, i % 7 == 0, i % 9 == 0) for i in range(470)]
    check_update(kernels, specs, {**DEFAULTS, **OPTIONS["clamp"]}, 3)


def test_update_sums_do_not_depend_on_the_list(kernels):
    """The same tensor alone and inside a list: equal bits everywhere."""
    o = {**DEFAULTS, **OPTIONS["momentum"]}
    one = [(3, 4096, "uniform4", torch.float32, 0, torch.bfloat16, True, True)]
    many = [
        (2, 64, "uniform4", torch.float32, 0, None, True, True),
        *one,
        (5, 7, "nf4", torch.float16, 0, None, True, True),
    ]
    p = make_problem(many, o, 2)
    alone = {k: v[1:2] for k, v in p.items()}
    a, _ = run_kernels(kernels, one, alone, o)
    b, _ = run_kernels(kernels, many, p, o)
    for k in WRITTEN:
        assert torch.equal(a[k][0], b[k][1]), k


@pytest.mark.parametrize("dtype", TYPES)
def test_straight_through_clip_inside_the_update(kernels, dtype):
    """The bits of a step after ``ste_clip_``; weights beyond the hull, on its ends and NaN."""
    specs = specs_for(dtype, GRIDS, [(3, 129), (16, 32)])
    for name in ("hold", "momentum", "maximize", "skip", "adamw_direction"):
        o = {**DEFAULTS, **OPTIONS[name], "ste_clip": True}
        p = make_problem(specs, o, 9)
        for w, scale, spec in zip(p["params"], p["scales"], specs, strict=True):
            code, levels, _ = GRIDS[spec[2]]
            low, high = ((scale * end).to(dtype) for end in reference.hull(levels, code))
            w[:, 0], w[:, 1], w[:, 2], w[:, 3] = low, high, torch.nextafter(high, high + 1), math.nan
        clipped = {**p, "grads": [g.clone() for g in p["grads"]]}
        for i, (w, g) in enumerate(zip(p["params"], clipped["grads"], strict=True)):
            reference.ste_clip_(g, w, p["scales"][i], p["levels"][i], p["grids"][i])
        got, intact = run_kernels(kernels, specs, p, o)
        expected, _ = run_kernels(kernels, specs, clipped, {**o, "ste_clip": False})
        assert intact
        for k in WRITTEN:
            assert all(map(same, got[k], expected[k])), (name, k)
        assert any(bool((a != b).any()) for a, b in zip(p["grads"], clipped["grads"], strict=True))


def test_levels_as_e4m3(kernels):
    """Every pattern of 16 leading bits and its neighbours: by the instruction and without it, as torch rounds."""
    high = torch.arange(2**16).to(torch.int32) << 16
    values = torch.cat([high, high + 1, high + 0x7FFF, high + 0x8000, high + 0xFFFF]).view(torch.float32)
    instruction, code = (torch.empty(values.numel(), dtype=torch.uint8) for _ in range(2))
    kernels.emulated_narrow_e4m3(pointer(values), pointer(instruction), pointer(code), ctypes.c_int64(values.numel()))
    assert torch.equal(instruction, code)
    got, expected = code.view(torch.float8_e4m3fn).float(), values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert same(got, expected) and torch.equal(got.signbit() | got.isnan(), expected.signbit() | expected.isnan())


@pytest.mark.parametrize("copy", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", TYPES)
def test_copies_of_levels(kernels, dtype, copy):
    """Q(x/s) of every grid, of odd and whole vectors; NaN is 0 in int8 and NaN in e4m3."""
    for seed, (grid, (rows, cols), shift) in enumerate(itertools.product(GRIDS, SHORT, (0, 1))):
        if GRIDS[grid][0][0] == 3 and copy == torch.int8:
            continue  # levels that no integer is
        w, scale = weights(rows, cols, grid, dtype, seed)
        y, intact = guarded(torch.zeros(w.shape, dtype=copy), shift)
        assert not kernels.emulated_fake_quantize(
            pointer(w), TYPES[dtype], pointer(y), COPIES[copy], pointer(scale), grid_arg(grid), *matrix(w, scale), 0,
            ctypes.c_uint64(0))  # fmt: skip
        level = reference.nearest_levels(w, scale, GRIDS[grid][1], GRIDS[grid][0])
        expected = level.nan_to_num(nan=0.0).to(copy) if copy == torch.int8 else level.to(copy)
        assert same(y, expected) and intact(), (grid, rows, cols, shift)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", ["sgd", "momentum", *list(RULES)[1:]])
def test_usual_steps_are_any_steps(kernels, rule, dtype):
    """Steps with kernels of their own give the bits of the kernels that have every switch at run time, which totals ask
    for; also where scales or eps are near the ends of the exponents, and for rows that are no whole vectors."""
    o = {**DEFAULTS, "rule": rule, "weight_decay": 0.1, "bad_gradients": True}
    if rule == "momentum":
        o |= {"rule": "sgd", "momentum": 0.9, "dampening": 0.25}
    shapes = [(3, 64), (2, 129), (40, 32), (1, 5003)]
    for case, changes in enumerate((
        {"eps": 1.0}, {"eps": 1.0, "ste_clip": True}, {"clamp": True}, {"clamp": True, "eps": 1e-3, "ste_clip": True},
        {"clamp": True, "eps": 1e-12}, {"clamp": True, "eps": 1.0}, {"clamp": True, "eps": 0.9, "lr": 0.0},
        {"clamp": True, "weight_decay": 0.0, "nesterov": rule == "momentum", "dampening": 0.0},
        {"clamp": True, "weight_decay": 0.0, "alpha": 1e-36},  # no gradients: the constraint's push is all there is
    )):  # fmt: skip
        options = {**o, **changes, "bad_gradients": "alpha" not in changes}
        specs = specs_for(dtype, ["uniform4", "binary", "ternary", "nf4"], shapes[case % 2 :: 2], totals=False)
        p = make_problem(specs, options, case)
        if "alpha" in changes:
            for t in (*p["grads"], *p["a"], *p["b"]):
                t.zero_()
        for i, (w, scale) in enumerate(zip(p["params"], p["scales"], strict=True)):
            if w.numel() > 8:
                w.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
            if i % 5 == 4 and dtype == torch.float32:  # exactly as before, but for the exponents
                power = 2.0 ** (-121, 90, -45)[(i // 5 + case) % 3]
                for t in (w, scale, p["grads"][i]):
                    t *= power
        usual, intact = run_kernels(kernels, specs, p, options, on_device=case == 3)
        p["totals"] = [torch.zeros(6, dtype=torch.float64) for _ in specs]
        any_step, _ = run_kernels(kernels, specs, p, options, on_device=case == 3)
        off_vectors = [(*s[:4], 1 - s[4], *s[5:]) for s in specs]  # those divide with every care
        careful, _ = run_kernels(kernels, off_vectors, p, options, on_device=case == 3)
        assert intact
        for k in ("params", "a", "b", "dequantized"):
            for a, b, c, spec in zip(usual[k], any_step[k], careful[k], specs, strict=True):
                assert same(a, b) and same(a, c), (changes, k, spec)
        for a, b, spec in zip(usual["row_sums"], any_step["row_sums"], specs, strict=True):
            assert same(a, b), (changes, spec)
        if (
            options["eps"] > 1e-9 and "alpha" not in changes
        ):  # below, 7 s (1/s) just above 7 is no level to the kernels, as it is to the reference
            check_update(kernels, specs, options, case, on_device=case == 3)


def test_quick_division_is_correctly_rounded(kernels):
    """Every mantissa of a divisor with a reciprocal that is as far off as the machine's may be."""
    g = torch.Generator().manual_seed(3)
    mantissas = torch.arange(2**23).to(torch.int32)
    for power in (-60, -2, 40):
        b = (mantissas + 0x3F800000).view(torch.float32) * 2.0**power
        a = (torch.rand(b.numel(), generator=g) + 1) * torch.exp2(torch.randint(-40, 20, b.shape, generator=g).float())
        a[::3] = b[::3] * torch.round(a[::3] * 2**23).clamp(1, 2**20)  # near other quotients' middles
        got = torch.empty_like(a)
        kernels.emulated_divide_quickly(pointer(a), pointer(b), pointer(got), ctypes.c_int64(a.numel()))
        assert torch.equal(got, a / b)


def test_division_by_a_scale_is_correctly_rounded(kernels):
    """Quotients within the hulls that exist (|x| <= 2^9), of scales over the whole range of float32."""
    g = torch.Generator().manual_seed(1)
    n = 4_000_000
    b = (torch.rand(n, generator=g) + 1) * torch.exp2(torch.randint(-110, 110, (n,), generator=g).float())
    q = torch.randn(n, generator=g) * torch.exp2(torch.randint(-10, 8, (n,), generator=g).float())
    q[::2] = torch.round(q[::2] * 2) / 2  # near the thresholds
    a = torch.where(torch.rand(n, generator=g) < 0.5, b * q, torch.nextafter(b * q, torch.tensor(0.0)))
    a = a.clamp(-3e38, 3e38)
    got = torch.empty(n)
    kernels.emulated_divide(pointer(a), pointer(b), pointer(got), ctypes.c_int64(n))
    assert torch.equal(got, a / b)


# ---- sharpness-aware passes -----------------------------------------------------------------------------------------

LENGTHS = [0, 1, 7, 32, 129, 1000, 4096, 20_003, 40_000]


def sam_problem(lengths, dtypes, seed):
    """(weights, gradients, adaptive), cycling through the storage types."""
    g = torch.Generator().manual_seed(seed)
    kinds = list(itertools.islice(itertools.cycle(dtypes), len(lengths)))

    def make():
        return [torch.randn(n, generator=g).mul(0.5).to(t) for n, t in zip(lengths, kinds, strict=True)]

    return make(), make(), [i % 2 for i in range(len(lengths))]


PERTURB, RESTORE, AVERAGE = 1, 2, 3  # csrc/math/types.h, SamPass


def sam_tensors(ws, gs, kept, adaptive):
    tensors = (SamTensor * len(ws))()
    for t, w, g, keep, adapted in zip(tensors, ws, gs, kept, adaptive, strict=True):
        t.w, t.g, t.kept = pointer(w), pointer(g), pointer(keep)
        t.type, t.adaptive, t.n = TYPES[w.dtype], bool(adapted), w.numel()
    return tensors, ctypes.c_size_t(len(ws))


@pytest.mark.parametrize("coefficients", [(0.3, 0.0), (2.0, 0.5), (0.0, 0.01), (0.0, 0.0)])
@pytest.mark.parametrize("shift", [0, 1])
def test_sam_perturb_restore_average(kernels, shift, coefficients):
    weights, gradients, adaptive = sam_problem(LENGTHS * 3, TYPES, 1)
    gradients[5][3] = float("nan")
    pair = torch.tensor(coefficients)
    ws, gs, keeps, guards = [], [], [], []
    for w, g in zip(weights, gradients, strict=True):
        for where, values in ((ws, w), (gs, g), (keeps, torch.full_like(w, 99.0))):
            view, intact = guarded(values, shift)
            where.append(view)
            guards.append(intact)
    tensors, n = sam_tensors(ws, gs, keeps, adaptive)
    assert not kernels.emulated_sam(PERTURB, tensors, n, ctypes.c_float(0.01), pointer(pair))
    expected, kept = [w.clone() for w in weights], [torch.empty_like(w) for w in weights]
    reference.sam_perturb_(expected, gradients, kept, pair, adaptive, 0.01)
    assert all(map(same, ws, expected)) and all(map(same, keeps, weights))
    assert not kernels.emulated_sam(RESTORE, tensors, n, ctypes.c_float(0), None)
    assert all(map(same, ws, weights))
    tensors, n = sam_tensors(ws, gs, [None] * len(ws), adaptive)
    assert not kernels.emulated_sam(AVERAGE, tensors, n, ctypes.c_float(0), pointer(pair))
    means = [w.clone() for w in weights]
    reference.sam_average_(means, gradients, pair)
    assert all(map(same, ws, means)) and all(intact() for intact in guards)


def test_sam_restores_every_bit(kernels):
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
        w, keep = patterns.view(dtype).clone(), torch.zeros(2**16, dtype=dtype)
        tensors, n = sam_tensors([w], [torch.ones_like(w)], [keep], [1])
        assert not kernels.emulated_sam(PERTURB, tensors, n, ctypes.c_float(0.01), pointer(torch.tensor([0.1, 0.0])))
        assert not kernels.emulated_sam(RESTORE, tensors, n, ctypes.c_float(0), None)
        assert torch.equal(keep.view(torch.int16), patterns) and torch.equal(w.view(torch.int16), patterns)


@pytest.mark.parametrize("dtype", TYPES)
def test_sam_norm(kernels, dtype):
    for lengths, shift in (([0], 0), ([1], 0), (LENGTHS, 1), (LENGTHS, 0), ([5] * 700 + [70_000], 0)):
        weights, gradients, adaptive = sam_problem(lengths, [dtype], 2)
        ws, gs = ([guarded(t, shift)[0] for t in ts] for ts in (weights, gradients))
        total = torch.full((1,), float("nan"), dtype=torch.float64)
        tensors, n = sam_tensors(ws, gs, [None] * len(ws), adaptive)
        assert not kernels.emulated_sam_norm(tensors, n, ctypes.c_float(0.01), pointer(total))
        expected = reference.sam_norm(weights, gradients, adaptive, 0.01)
        # the same float32 squares; a thread adds at most 128 of them and a warp 5 more in float32, the rest is doubles
        assert torch.allclose(total[0], expected, rtol=135 * 2.0**-24, atol=0)
        again = torch.empty(1, dtype=torch.float64)
        kernels.emulated_sam_norm(tensors, n, ctypes.c_float(0.01), pointer(again))
        assert torch.equal(total, again)
    gradients[3][2] = float("inf")
    kernels.emulated_sam_norm(*sam_tensors(weights, gradients, [None] * len(ws), adaptive), ctypes.c_float(0.01),
                              pointer(total))  # fmt: skip
    assert not total.isfinite().any()


@pytest.mark.parametrize("coefficients", [(0.3, 0.01), (0.0, 0.0)])
@pytest.mark.parametrize("name", ["clamp", *list(RULES)[1:]])
def test_descent_inside_the_update(kernels, name, coefficients):
    """Kept weights read in place of w, the mean of two gradients in place of g: the bits of the separate passes."""
    o = {**DEFAULTS, **OPTIONS[name]}
    specs = [(2, 129, "uniform4", torch.float32, 1, None, True, True), (40, 32, "binary", torch.bfloat16, 0,
             torch.float32, False, True), (1, 20_000, "nf4", torch.float16, 0, None, True, False)]  # fmt: skip
    p = make_problem(specs, o, 6)
    firsts = [torch.randn(g.shape, generator=torch.Generator().manual_seed(1)).to(g.dtype) for g in p["grads"]]
    pair = torch.tensor(coefficients)
    plain = {**p, "grads": [g.clone() for g in p["grads"]]}
    reference.sam_average_(plain["grads"], firsts, pair)
    expected, _ = run_kernels(kernels, specs, plain, o)
    moved = {**p, "params": [torch.full_like(w, 55.0) for w in p["params"]]}
    got, intact = run_kernels(kernels, specs, moved, o, kept=p["params"], firsts=firsts, coefficients=pair)
    assert intact and all(same(a, b) for k in WRITTEN for a, b in zip(got[k], expected[k], strict=True))


# ---- mixtures -------------------------------------------------------------------------------------------------------


class MixArg(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("type", ctypes.c_int), ("n", ctypes.c_int), ("rows", ctypes.c_int64),
                ("cols", ctypes.c_int64), ("scales", ctypes.c_void_p), ("strengths", ctypes.c_void_p),
                ("grids", GridArg * 8), ("clip", ctypes.c_bool), ("learned", ctypes.c_bool),
                ("lsq", ctypes.c_double * 8)]  # fmt: skip


MIXTURES = {
    "weights": [1, -2, 1, 1, -4, 3, 1, -8, 7, 1, -128, 127],
    "activations": [1, 0, 15, 1, 0, 255, 0, 0, 0],
    "one": [2, -1, 1],
    "eight": [2, -1, 1, 1, -1, 1, 1, -2, 1, 1, -4, 3, 1, -8, 7, 1, -16, 15, 1, -32, 31, 0, 0, 0],
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixture(kernels, name, dtype):
    """Value and x's gradient bit for bit; the sums within the roundings of a row's tree and, for every element that
    stands on an end of the hull or a tie, nothing more: q is the same there."""
    grids = MIXTURES[name]
    n = len(grids) // 3
    for seed, ((rows, cols), shift) in enumerate(itertools.product([*SHAPES, (300, 3)], (0, 1))):
        w, _ = weights(rows, cols, "uniform4", dtype, seed)
        w[~w.isfinite()] = 0.25
        g = torch.Generator().manual_seed(seed)
        scales = torch.rand(n, rows, generator=g) + 0.05
        strengths = torch.softmax(torch.randn(n, generator=g), 0)
        x, _ = guarded(w, shift)
        grad, _ = guarded(torch.randn(w.shape, generator=g).to(dtype), shift)
        clip, learned = seed % 3 != 0, seed % 2 == 0
        lsq = [(max(cols, 1) * max(top, 1)) ** -0.5 for top in grids[2::3]]
        arg = MixArg(x.data_ptr() if x.numel() else None, TYPES[dtype], n, rows, cols, scales.data_ptr(),
                     strengths.data_ptr(), (GridArg * 8)(*[GridArg(*grids[i : i + 3], None, 0)
                                                           for i in range(0, 3 * n, 3)]),
                     clip, learned, (ctypes.c_double * 8)(*lsq))  # fmt: skip
        y, intact = guarded(torch.full_like(w, 99.0), shift)
        assert not kernels.emulated_mix(ctypes.byref(arg), pointer(y))
        expected = reference.mix_fake_quantize(w, scales, strengths, grids, clip, learned)
        assert same(y, expected) and intact(), (rows, cols, shift)
        out, intact = guarded(torch.full_like(w, 99.0), shift)
        to_strengths, to_scales = torch.full((n,), 99.0), torch.full((n, rows), 99.0)
        assert not kernels.emulated_mix_gradient(ctypes.byref(arg), pointer(grad), pointer(out), pointer(to_strengths),
                                                 pointer(to_scales))  # fmt: skip
        wanted = reference.mix_fake_quantize_backward(grad, w, scales, strengths, grids, clip, learned)
        assert same(out, wanted[0]) and intact(), (rows, cols, shift)
        # a thread adds at most 16 slots of 8 products, a block 5 + 8 more; each product is rounded twice
        sizes = [g.abs().reshape(rows, -1).double().sum(1) * max(abs(lo), hi, 1) if kind else
                 (g.abs() * w.float().abs()).reshape(rows, -1).double().sum(1)
                 for g in [grad.float()] for kind, lo, hi in zip(*[iter(grids)] * 3, strict=True)]  # fmt: skip
        error = 145 * 2.0**-24
        for k, size in enumerate(sizes):
            factor = scales[k].double() if grids[3 * k] else torch.ones(rows, dtype=torch.float64)
            bound = error * (factor * size).sum() + 1e-30
            assert (to_strengths[k].double() - wanted[1][k].double()).abs() <= bound, (rows, cols, shift, k)
            gain = float(strengths[k]) * lsq[k]
            assert ((to_scales[k].double() - wanted[2][k].double()).abs() <= 2 * error * gain * size + 1e-30).all()


# ---- packed weights -------------------------------------------------------------------------------------------------


class PackedArg(ctypes.Structure):
    _fields_ = [("codes", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("grid", GridArg), ("bits", ctypes.c_int),
                ("n_levels", ctypes.c_int), ("n", ctypes.c_int64), ("cols", ctypes.c_int64),
                ("row_bytes", ctypes.c_int64), ("groups", ctypes.c_int64)]  # fmt: skip


PACKED = {  # bits of a code (0: five trits a byte), grid, levels
    "int4": (4, [1, -8, 7], EMPTY), "narrow4": (4, [1, -7, 7], EMPTY), "int8": (8, [1, -128, 127], EMPTY),
    "two": (2, [1, 0, 3], EMPTY), "ternary": (2, [1, -1, 1], EMPTY), "binary": (1, [2, -1, 1], EMPTY),
    "trits": (0, [1, -1, 1], EMPTY), "three": (3, [1, -4, 3], EMPTY), "five": (5, [1, -16, 15], EMPTY),
    "nf4": (4, [3, 0, 0], NF4),
}  # fmt: skip
# (n, cols, groups): nothing, one scale, one a row, groups that end with words, inside words; rows of whole vectors
PACKED_SHAPES = [(0, 5, 1), (3, 0, 1), (1, 1, 0), (3, 7, 1), (5, 45, 3), (33, 256, 1), (18, 256, 8), (7, 2176, 17),
                 (2, 96, 6)]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", PACKED)
def test_packed_weights(kernels, name, dtype):
    """The decoded weight bit for bit; products of one, few and many inputs as exact as ``ops.packed_linear`` says."""
    bits, grid, levels = PACKED[name]
    for seed, ((n, cols, groups), shift) in enumerate(itertools.product(PACKED_SHAPES, (0, 1))):
        g = torch.Generator().manual_seed(seed)
        bytes_of_row = contract.row_bytes(cols, bits)
        # the bytes of the last row end with the buffer's guard; bits past the last code are random
        codes, _ = guarded(
            torch.randint(243 if bits == 0 else 256, (n, bytes_of_row), generator=g).to(torch.uint8), 5 * shift
        )
        scale = torch.rand(max(groups * n, 1), generator=g) + 0.1
        found = grid[0] == 3
        n_levels = levels.numel() if found else (grid[2] - grid[1]) // (2 if grid[0] == 2 else 1) + 1
        arg = PackedArg(codes.data_ptr() if codes.numel() else None, scale.data_ptr(),
                        GridArg(*grid, levels.data_ptr() if found else None, levels.numel()), bits, n_levels, n, cols,
                        bytes_of_row, groups)  # fmt: skip
        out, intact = guarded(torch.full((n, cols), 99.0, dtype=dtype), shift)
        assert not kernels.emulated_packed_dequantize(ctypes.byref(arg), pointer(out), TYPES[dtype])
        expected = torch.empty(n, cols, dtype=dtype)
        reference.packed_dequantize_(codes, scale, levels, grid, bits, expected)
        assert same(out, expected) and intact(), (n, cols, groups, shift)
        weight = reference.packed_weight(codes, scale.double(), levels.double(), grid, bits, cols, torch.float64)
        for tokens in (1, 4) if seed % 2 else (0, 7):
            x, _ = guarded(torch.randn(tokens, cols, generator=g).to(dtype), shift)
            bias = torch.randn(n, generator=g).to(dtype) if seed % 3 else None
            y, intact = guarded(torch.full((tokens, n), 99.0, dtype=dtype), shift)
            assert not kernels.emulated_packed_linear(
                ctypes.byref(arg), pointer(x), ctypes.c_int64(tokens), pointer(bias), pointer(y), TYPES[dtype]
            )
            exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
            if bias is not None:
                exact, size = exact + bias.double(), size + bias.double().abs()
            bound = (cols + 3) * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs() + 1e-38
            assert ((y.double() - exact).abs() <= bound).all() and intact(), (n, cols, groups, tokens, shift)


class TilesArg(ctypes.Structure):
    _fields_ = [("tiles", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("grid", GridArg), ("form", ctypes.c_int),
                ("type", ctypes.c_int), *((n, ctypes.c_int64) for n in "n cols groups batch".split()),
                *((n, ctypes.c_void_p) for n in "x bias y".split())]  # fmt: skip


TILED = {  # grid, levels
    "int4": ([1, -8, 7], EMPTY), "narrow3": ([1, -3, 3], EMPTY), "three": ([1, -4, 3], EMPTY),
    "unsigned2": ([1, 0, 3], EMPTY), "ternary": ([1, -1, 1], EMPTY), "binary": ([2, -1, 1], EMPTY),
    "int8": ([1, -128, 127], EMPTY), "narrow8": ([1, -127, 127], EMPTY), "unsigned8": ([1, 0, 255], EMPTY),
    "six": ([1, -32, 31], EMPTY), "fp4": ([3, 0, 0], torch.tensor(FP4().levels)), "nf4": ([3, 0, 0], NF4),
    "five": GRIDS["five"][:2],
}  # fmt: skip
FULLY_TILED = [("int4", torch.bfloat16), ("nf4", torch.float16), ("narrow3", torch.bfloat16)]
# (n, cols, groups, tokens): tails of rows and of columns, odd columns, one scale, groups of 16, 32, 48, 64, 128
# columns, blocks that share rows; as many tokens as each kernel takes
TILED_CASES = [(3, 7, 1, 1), (18, 512, 32, 3), (20, 768, 16, 8), (17, 320, 5, 9), (33, 1000, 1, 17)]
MORE_TILED_CASES = [(1, 1, 0, 8), (16, 256, 1, 0), (5, 96, 3, 2), (40, 1152, 9, 5), (2, 8200, 1, 1), (2, 4096, 32, 70),
                    (130, 640, 1, 9), (17, 768, 6, 40), (16, 512, 16, 18), (16, 1024, 0, 66)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TILED)
def test_products_from_tiles(kernels, name, dtype):
    """As exact as ``ops.packed_linear`` says; levels of two parts lie 2^-18 beside theirs."""
    grid, levels = TILED[name]
    codes_of = contract.level_table(levels, grid)
    form = packed.tile_form(levels.tolist(), grid, dtype)
    cases = TILED_CASES + (MORE_TILED_CASES if (name, dtype) in FULLY_TILED else [])
    for seed, (n, cols, groups, tokens) in enumerate(cases):
        g, shift = torch.Generator().manual_seed(seed), seed % 2
        codes = torch.randint(len(codes_of), (n, cols), generator=g).to(torch.uint8)
        tiles = contract.tile_codes(packed.tile_code(codes, grid), form)
        scale = torch.rand(max(groups * n, 1), generator=g) + 0.1
        weight = (codes_of.double()[codes.int()].reshape(len(scale), -1) * scale.double()[:, None]).reshape(n, cols)
        of_tiles = packed.tile_scales(scale, n, cols).contiguous()
        x, _ = guarded(torch.randn(tokens, cols, generator=g).to(dtype), shift)
        bias = torch.randn(n, generator=g).to(dtype) if seed % 3 else None
        y, intact = guarded(torch.full((tokens, n), 99.0, dtype=dtype), shift)
        arg = TilesArg(tiles.data_ptr(), of_tiles.data_ptr(),
                       GridArg(*grid, levels.data_ptr() if levels.numel() else None, levels.numel()), form,
                       TYPES[dtype], n, cols, groups, tokens, x.data_ptr(), pointer(bias), pointer(y))  # fmt: skip
        assert not kernels.emulated_packed_tiles_linear(ctypes.byref(arg))
        exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        steps = max(cols + 3, 67 if form == contract.TILE_TABLE2 else 0)
        bound = steps * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs() + 1e-38
        assert ((y.double() - exact).abs() <= bound).all() and intact(), (n, cols, groups, tokens, shift)


# ---- products of levels ---------------------------------------------------------------------------------------------


class TokenArg(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in "x q scale".split()), ("grid", GridArg), ("top", ctypes.c_float),
                ("type", ctypes.c_int), ("levels_type", ctypes.c_int), ("rows", ctypes.c_int64),
                ("cols", ctypes.c_int64)]  # fmt: skip


class SumsArg(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in "sums token_scale scale bias y".split()),
                *((n, ctypes.c_int) for n in "sums_type bias_type y_type".split()), ("each", ctypes.c_bool),
                ("rows", ctypes.c_int64), ("cols", ctypes.c_int64)]  # fmt: skip


def same_levels(got, want):
    """Equal, any NaN being equal to any."""
    return torch.equal(*(t.float().nan_to_num(1e9) for t in (got, want)))


ANY = [0, 0, 0], EMPTY, 448.0, torch.float8_e4m3fn
INT8 = [1, -127, 127], EMPTY, 127.0, torch.int8


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("how", [
    ANY, INT8, ([1, -8, 7], EMPTY, 7.0, torch.float8_e4m3fn), ([2, -1, 1], EMPTY, 1.0, torch.int8),
    ([3, 0, 0], torch.tensor([-6.0, -1.5, 0.0, 0.5, 4.0]), 6.0, torch.float8_e4m3fn),
])  # fmt: skip
def test_token_levels(kernels, dtype, how):
    """Short, odd and long rows (one reads its input twice), rows of zeros, of subnormal numbers, inf and NaN."""
    grid, levels, top, held = how
    for rows, cols in ((9, 24), (3, 129), (2, 1), (3, 2048), (2, 1031), (1, 9000), (2, 8200), (2, 0)):
        x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)
        x[-1] *= 1e-38
        if rows > 2:
            x[0], x[1, cols // 2] = 0.0, float("inf") if cols % 2 else float("nan")
        q = torch.full((rows, cols), 77, dtype=torch.uint8).view(held)
        s = torch.full((rows,), -1.0)
        arg = TokenArg(pointer(x), pointer(q), pointer(s), raw_grid(grid, levels), top, TYPES[dtype], COPIES[held],
                       rows, cols)  # fmt: skip
        assert kernels.emulated_token_levels(ctypes.byref(arg)) == 0
        want, scale = reference.token_levels(x, levels, grid, top, held)
        assert torch.equal(s.nan_to_num(-5.0), scale.nan_to_num(-5.0)), (rows, cols)
        assert same_levels(q, want), (rows, cols)


def raw_grid(grid, levels):
    return GridArg(grid[0], grid[1], grid[2], pointer(levels), levels.numel())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("held", [torch.int32, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_scaled_sums(kernels, dtype, held):
    g = torch.Generator().manual_seed(5)
    for rows, n, each, bias_type in ((5, 36, True, dtype), (3, 7, False, torch.float32), (1, 4, True, None),
                                     (2, 1030, True, torch.bfloat16), (3, 64, True, torch.float16),
                                     (0, 4, False, None)):  # fmt: skip
        sums = torch.randint(-3, 3, (rows, n), generator=g) * 37
        if held in (torch.int32, torch.float32):
            sums = sums * 1_000_003
        else:
            sums[:1, :2] = torch.tensor([1, -1]) * 0
        sums = sums.to(held)
        if held == torch.float8_e4m3fn:  # every code, subnormal numbers and NaN too
            codes = torch.arange(rows * n, dtype=torch.int32) % 256
            sums = codes.to(torch.uint8).view(held).reshape(rows, n)
        tokens, scale = torch.rand(rows, generator=g) + 0.5, torch.rand(n if each else 1, generator=g) + 0.1
        bias = None if bias_type is None else torch.randn(n, generator=g).to(bias_type)
        y = torch.full((rows, n), float("nan"), dtype=dtype)
        arg = SumsArg(pointer(sums), pointer(tokens), pointer(scale), None if bias is None else pointer(bias),
                      pointer(y), {torch.int32: 5, **COPIES}[held], 0 if bias is None else TYPES[bias_type],
                      TYPES[dtype], each, rows, n)  # fmt: skip
        assert kernels.emulated_scaled_sums(ctypes.byref(arg)) == 0
        want = reference.scaled_sums(sums, tokens, scale, bias, dtype)
        assert torch.equal(y.nan_to_num(-7.0), want.nan_to_num(-7.0)), (rows, n)


# ---- scales ----------------------------------------------------------------------------------------------------------

# rows: one block's, a full one's, those of several blocks, nothing
SCALE_ROWS = [1, 7, 511, 4096, 0, 4097, 6000, 13000]
TWO_LAUNCHES = [4500, *[1, 3, 2, 5] * 135, 0, 9, 4, 1, 4500, 6, 300]  # the last three are the second's


def sums_of(rows, zeros, g):
    """Row sums, a share of them zero; NaN, inf and sums that have overflown."""
    sums = torch.rand(rows, 3, generator=g) * torch.exp2(torch.randn(rows, 1, generator=g) * 8)
    sums[torch.rand(rows, generator=g) < zeros] = 0
    if rows > 3:
        inf = math.inf
        sums[1], sums[-1], sums[-2] = math.nan, inf, torch.tensor([inf, inf, 1e30])
    return sums


@pytest.mark.parametrize("zeros", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sizes", [SCALE_ROWS, TWO_LAUNCHES], ids=["sizes", "two launches"])
def test_scales_of_a_list(kernels, zeros, sizes):
    """Every rule and type; more tensors than a launch takes. Rows of zeros take the median of their tensor's scales."""
    g, entries, checks = torch.Generator().manual_seed(len(sizes)), [], []
    numbers = {contract.ABSMAX: (7, 0, 0), contract.SAWB: (3, 7.509, 6.892), contract.MEAN: (1, 1.5, 0),
               contract.RMS: (1, 0.4, 0), contract.GIVEN: (7, 0, 0)}  # fmt: skip
    for i, rows in enumerate(sizes):
        (rule, arguments), kind = list(numbers.items())[i % 5], i % 7 % 5
        sums = sums_of(rows, zeros, g)
        given = reference.round_scale(torch.rand(rows, generator=g) + 0.1, kind)
        scale, intact = guarded(given)
        expected = reference.rule_scales(sums, rule, kind, 37, *arguments, given if rule == contract.GIVEN else None)
        entries.append(ScaleTensor(sums.data_ptr(), scale.data_ptr(), rows, 37, *arguments, rule, kind))
        checks.append((scale, intact, expected, (rows, rule, kind), sums))
    assert not kernels.emulated_scales((ScaleTensor * len(entries))(*entries), ctypes.c_size_t(len(entries)))
    for scale, intact, expected, case, _ in checks:
        assert torch.equal(scale, expected) and intact(), case


@pytest.mark.parametrize(("grid", "dtype"), CASES)
def test_mse_scales(kernels, grid, dtype):
    g = torch.Generator().manual_seed(1)
    long = [(1, 16385), (2, 33000)] if grid in ("uniform4", "nf4") and dtype == torch.bfloat16 else []
    for kind, (rows, cols) in enumerate([(1, 1), (3, 7), (5, 128), (2, 4100), (6, 40), *long]):
        w = torch.randn(rows, cols, generator=g).to(dtype)
        if rows > 2:
            w[1], w[2, 0] = 0, math.nan
        encoding, levels, _ = GRIDS[grid]
        sums, c_max = reference.row_sums(w, rows), float(reference.hull(levels, encoding)[1])
        scale, intact = guarded(torch.full((rows,), 99.0))
        a = MseArg(w.data_ptr(), sums.data_ptr(), rows, cols, grid_arg(grid), c_max, TYPES[dtype], kind % 5)
        assert not kernels.emulated_mse_scales(ctypes.byref(a), pointer(scale))
        assert torch.equal(scale, reference.mse_scales(w, sums, levels, encoding, c_max, kind % 5)), (rows, cols)
        assert intact()


@pytest.mark.parametrize("kind", range(5))
def test_scales_are_rounded_as_the_reference_rounds(kernels, kind):
    for x in (oracles.scales_at_roundings(), *oracles.scales_in_units()):
        _rounded_as_the_reference(kernels, kind, x)


def _rounded_as_the_reference(kernels, kind, x):
    sums, scale = torch.stack([x, x, x], 1).contiguous(), torch.empty_like(x)
    tensor = ScaleTensor(sums.data_ptr(), scale.data_ptr(), len(x), 1, 1, 0, 0, contract.ABSMAX, kind)
    assert not kernels.emulated_scales(ctypes.byref(tensor), ctypes.c_size_t(1))
    assert torch.equal(scale, reference.round_scale(x, kind))


def test_of_candidates_with_equal_errors_the_smallest_is_chosen(kernels):
    w = torch.tensor([[21.0, 100.0], [100.0, 21.0]])  # (60 - 21)^2 + (100 - 60)^2 = (61 - 21)^2 + (100 - 61)^2
    sums, scale = reference.row_sums(w, 2), torch.empty(2)
    a = MseArg(w.data_ptr(), sums.data_ptr(), 2, 2, grid_arg("binary"), 1.0, TYPES[w.dtype], 0)
    assert not kernels.emulated_mse_scales(ctypes.byref(a), pointer(scale))
    assert scale.tolist() == [60.0, 60.0] == reference.mse_scales(w, sums, EMPTY, [2, -1, 1], 1.0, 0).tolist()
