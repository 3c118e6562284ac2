"""Contract of the Triton kernels (``askew_kernels.triton_kernels``).

1. Every operator does what ``reference`` does: quantized codes, copies, weights and optimizer states bit for bit
   (the same IEEE operations in the same order; a flipped bit in h can turn a velocity around, so a bound would have to
   be a whole step wide), sums within the bound derived beside each check.
2. They write their outputs and nothing beside them, whatever the alignment; list and single calls agree.
3. Ahead of time they compile for sm_80 and sm_90 into 16-byte loads and stores, without spills, fused multiply-adds,
   flushed denormals or approximate division; a new learning rate, epsilon or seed compiles nothing.

No GPU is needed: a worker process runs the kernels in Triton's interpreter (``TRITON_INTERPRET`` is read when triton
is imported, which another test of this process may have done), a second one compiles. Where there is a GPU the same
tests run on it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import scales_at_roundings, scales_in_units

import askew_kernels
from askew_kernels import contract, reference
from askew_kernels.ops import RULES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

NONE = torch.empty(0)
NF4 = [-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
GRIDS = {
    "uniform4": (NONE, [1, -8, 7]),
    "narrow2": (NONE, [1, -1, 1]),
    "unsigned8": (NONE, [1, 0, 255]),
    "inclusive3": (NONE, [1, -4, 4]),
    "binary": (NONE, [2, -1, 1]),
    "nf4": (torch.tensor(NF4), [3, 0, 0]),
    "powers": (torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.125, 1.0]), [3, 0, 0]),  # differences of levels are exact
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = list(contract.LEVEL_TYPES)
# One row, one element a row, short rows, rows of a power of two, rows of whole blocks, long rows, nothing.
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 129), (33, 32), (1, 2500), (2, 2048), (2, 2500), (3, 0)]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


# ---- running an operator: in the worker's interpreter, or on the GPU ------------------------------------------------

MARGIN, SENTINEL = 32, 77.0


def sentinel(like):
    return torch.tensor(SENTINEL).to(like.dtype).float().to(like.device)


def call(module, name, args, device, offset=0, more_gradients=()):
    """Call an operator on copies that stand ``offset`` elements into a marked buffer: (result, arguments after it).

    Then again with each of ``more_gradients`` in place of its second argument, everything else staying where it is.
    """
    buffers = []

    def place(value):
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return [place(v) for v in value]
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        first, n = MARGIN + offset, value.numel()
        buffer = torch.full((first + n + MARGIN,), SENTINEL, device=device).to(value.dtype)
        buffer[first : first + n] = value.reshape(-1)
        buffers.append((buffer, first, n))
        return buffer[first : first + n].view(value.shape)

    def back(value):
        return [back(v) for v in value] if isinstance(value, (list, tuple)) else (
            value.cpu().clone() if isinstance(value, torch.Tensor) else value
        )  # fmt: skip

    placed = [place(value) for value in args]
    result = getattr(module, name)(*placed)
    for gradients in more_gradients:
        placed[1] = place(gradients)
        getattr(module, name)(*placed)
    for buffer, first, n in buffers:
        outside = torch.cat([buffer[:first], buffer[first + n :]])
        assert torch.all(outside.float() == sentinel(outside)), f"{name} wrote beside a tensor of {n} elements"
    return back(result), [back(value) for value in placed]


def send(value, pipe):
    """torch's own format: Python's pickle knows no float8."""
    torch.save(value, buffer := io.BytesIO())
    pickle.dump(buffer.getvalue(), pipe)
    pipe.flush()


def receive(pipe):
    return torch.load(io.BytesIO(pickle.load(pipe)), weights_only=False)


def noted_variants():
    """A set that the interpreter's launches are noted in: kernel, types of arguments, compile-time constants."""
    from triton.runtime.interpreter import InterpretedFunction

    def kind(value, specialized=True):
        if isinstance(value, tuple):
            return tuple(map(kind, value))
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.data_ptr() % 16 == 0
        if isinstance(value, bool) or not isinstance(value, int):
            return type(value).__name__
        size = "i32" if -(2**31) <= value < 2**31 else "i64"
        return (size, value == 1, value % 16 == 0) if specialized else size

    def noted(self, *args, grid, warmup, **kwargs):
        given, constants = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, self.fn.__annotations__
        plain = self.kwargs.get("do_not_specialize") or ()
        found.add((self.fn.__name__, *(
            (name, str(value)) if name in constants or name not in self.arg_names else kind(value, name not in plain)
            for name, value in given.items()
        )))  # fmt: skip
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    found, run = set(), InterpretedFunction.run
    InterpretedFunction.run = noted
    return found


def serve():
    """The interpreter's worker: requests as ``Runner`` sends them on stdin, answers on the first stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints go to stderr
    from askew_kernels import triton_kernels
    from askew_kernels.triton_kernels import launch, scales, update

    variants = noted_variants()
    by_value = launch.scalar_argument
    while True:
        try:
            name, args, offset, by_pointer, *more = receive(sys.stdin.buffer)
        except EOFError:
            return
        scalar = (lambda t, name: t) if by_pointer else by_value
        launch.scalar_argument = scalar
        try:
            if name == "REDUCE":
                update.REDUCE, answer = args[0], (None, [])
                update._plans.clear()
            elif name == "CAPTURING":  # as under a CUDA graph, which takes no copies from the host
                scales._capturing, answer = lambda device, flag=args[0]: flag, (None, [])
                scales._tables.clear()
            elif name == "VARIANTS":  # those launched since the last time
                answer = None, list(variants)
                variants.clear()
            elif name == "TRY":  # what a call left of its arguments although it failed
                try:
                    answer = getattr(triton_kernels, args[0])(*args[1]), args[1]
                except Exception as error:
                    answer = error, args[1]
            else:
                answer = call(triton_kernels, name, args, "cpu", offset, *more)
        except Exception as error:
            answer = error
        send(answer, answers)


def worker_process(mode, environment, **options):
    home = str(Path(askew_kernels.__file__).parents[1])
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = [sys.executable, "-W", "ignore", __file__, mode]
    return subprocess.Popen(command, env={**inherited, "PYTHONPATH": path, **environment}, **options)


class Runner:
    """``runner.skew_sgd_(…)`` as one would call the operator; in-place results arrive in the arguments."""

    def __init__(self, run):
        self.run = run

    def __call__(self, name, args, offset=0, by_pointer=False, more_gradients=()):
        result, after = self.run(name, args, offset, by_pointer, more_gradients)
        for old, new in zip(args, after, strict=True):
            for o, n in zip(old, new, strict=True) if isinstance(old, list) else [(old, new)]:
                if isinstance(o, torch.Tensor) and o.dim():
                    o.copy_(n)
        return result

    def __getattr__(self, name):
        return lambda *args, **how: self(name, args, **how)


@pytest.fixture(scope="module")
def interpreter():
    process = worker_process("serve", {"TRITON_INTERPRET": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(*request):
        send(request, process.stdin)
        answer = receive(process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    yield run
    process.stdin.close()
    assert process.wait() == 0


def on_gpu(name, args, offset=0, by_pointer=False, more_gradients=()):
    from askew_kernels import triton_kernels

    if by_pointer:
        args = [a.cuda() if isinstance(a, torch.Tensor) and a.dim() == 0 else a for a in args]
    return call(triton_kernels, name, args, "cuda", offset, more_gradients)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


# On a GPU every combination of types and grids is compiled anew: all of them are for `make test-full`, and CONTACT,
# which holds each kernel once in its usual form, is for `make test`.
@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=[*needs_gpu, pytest.mark.slow])])
def triton(request):
    return Runner(on_gpu if request.param == "cuda" else request.getfixturevalue("interpreter"))


# ---- inputs and comparisons -----------------------------------------------------------------------------------------


def weights(shape, dtype, seed=0):
    """Normal numbers, with ±0, NaN, ±inf, a denormal, ties and hull ends (at scale 1/4) where there is room."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    inf = float("inf")
    special = [0.0, -0.0, float("nan"), inf, -inf, 1e-40, 0.125, -0.125, 0.375, -0.375, 0.25, -2.0, 1.75]
    flat = x.view(-1)
    if flat.numel() > 2 * len(special):
        flat[: len(special)] = torch.tensor(special).to(dtype)
    return x


def scales(rows, seed=0):
    s = torch.rand(rows, generator=torch.Generator().manual_seed(seed + 1)) * 0.5 + 0.05
    s[:1] = 0.25
    return s


def assert_same(got, expected, what=""):
    """The same values, NaN for NaN, and no -0 where there was none."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    got, expected = (t.float() if t.dtype in LEVELS else t for t in (got, expected))
    numbers = ~expected.isnan()
    equal = torch.where(numbers, (got == expected) & (got.signbit() == expected.signbit()), got.isnan())
    wrong = ~equal
    assert equal.all(), f"{what}: {int(wrong.sum())} of {equal.numel()} differ: {got[wrong][:4]}, {expected[wrong][:4]}"


# ---- elementwise operators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in GRIDS] + list(itertools.product(["uniform4", "binary", "nf4"], DTYPES[1:])),
)
def test_fake_quantize(triton, name, dtype):
    levels, grid = GRIDS[name]
    for k, shape in enumerate(SHAPES):
        x, s = weights(shape, dtype), scales(shape[0])
        expected = reference.fake_quantize(x, s, levels, grid, True, False, 0)
        assert_same(triton.fake_quantize(x, s, levels, grid, True, False, 0, offset=k % 2), expected, shape)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_out(triton, dtype, out_dtype):
    levels, grid = GRIDS["uniform4"]
    for shape in [(3, 129), (1, 2500), (3, 0)]:
        x, s = weights(shape, dtype), scales(shape[0])
        out, expected = (torch.full(shape, float("nan"), dtype=out_dtype) for _ in range(2))
        triton.fake_quantize_out_(x, s, levels, grid, out)
        reference.fake_quantize_out_(x, s, levels, grid, expected)
        assert_same(out, expected, shape)


@pytest.mark.parametrize("out_dtype", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_of_a_byte(triton, dtype, out_dtype):
    """The level itself, NaN too, but for int8, which has none."""
    for name in ("uniform4", "binary", *(["powers"] if out_dtype != torch.int8 else [])):
        levels, grid = GRIDS[name]
        for shape in [(3, 129), (1, 2500), (4, 32), (3, 0)]:
            x, s = weights(shape, dtype), scales(shape[0])
            out, expected = (torch.full(shape, 3.0).to(out_dtype) for _ in range(2))
            triton.fake_quantize_out_(x, s, levels, grid, out)
            reference.fake_quantize_out_(x, s, levels, grid, expected)
            assert_same(out, expected, (name, shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniform4", "binary", "powers"])
def test_stochastic_rounding(triton, name, dtype):
    levels, grid = GRIDS[name]
    for shape, seed in [((1, 7), 0), ((3, 129), 1), ((1, 2500), 2**40 + 12345), ((2, 2048), -1)]:
        x, s = weights(shape, dtype), scales(shape[0])
        expected = reference.fake_quantize(x, s, levels, grid, True, True, seed)
        assert_same(triton.fake_quantize(x, s, levels, grid, True, True, seed), expected, (shape, seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniform4", "binary", "nf4"])
def test_straight_through(triton, name, dtype):
    levels, grid = GRIDS[name]
    for shape in SHAPES:
        x, s, g = weights(shape, dtype), scales(shape[0]), weights(shape, dtype, seed=5)
        expected = reference.fake_quantize_backward(g, x, s, levels, grid)
        assert_same(triton.fake_quantize_backward(g, x, s, levels, grid), expected, shape)
        triton.ste_clip_(g, x, s, levels, grid)
        assert_same(g, expected, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniform4", "binary", "nf4"])
def test_scale_gradient(triton, name, dtype):
    """The clip is ``ste_clip_``'s; of the terms, exact but for the roundings that the reference has, sums differ."""
    levels, grid = GRIDS[name]
    for shape in (*SHAPES, (70, 16)):
        x, s, g = weights(shape, dtype), scales(shape[0]), torch.randn(shape).to(dtype)
        clipped = reference.fake_quantize_backward(g, x, s, levels, grid)
        size = reference.ste_clip_scale_grad_(g.abs() + 1, x, s, levels, grid, False, 0.5).abs() + g.abs().sum(1) * 8
        for clip in (False, True):
            expected = reference.ste_clip_scale_grad_(g.clone(), x, s, levels, grid, clip, 0.5)
            got = triton.ste_clip_scale_grad_(g, x, s, levels, grid, clip, 0.5)
            assert got.dtype == torch.float32 and got.shape == s.shape and torch.equal(got.isnan(), expected.isnan())
            assert (((got - expected).abs() <= size * SUM_ERROR) | expected.isnan()).all(), (shape, got, expected)
        assert_same(g, clipped, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniform4", "narrow2", "binary", "nf4"])
def test_soft_quantize(triton, name, dtype):
    levels, grid = GRIDS[name]
    for shape, slack in [((3, 129), 0.3), ((33, 32), 1e-3), ((1, 2500), 1.0), ((3, 0), 0.5)]:
        w, s, slack = weights(shape, dtype), scales(shape[0]), torch.tensor(slack)
        expected = reference.soft_quantize(w, s, levels, grid, slack)
        assert_same(triton.soft_quantize(w, s, levels, grid, slack, by_pointer=shape[1] == 32), expected, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniform4", "narrow2", "binary", "nf4"])
def test_project_interval(triton, name, dtype):
    levels, grid = GRIDS[name]
    for shape, eps in [((3, 129), 0.3), ((33, 32), 1.6e-5), ((1, 2500), 1.0), ((3, 0), 0.5)]:
        w, s = weights(shape, dtype), scales(shape[0])
        eps = torch.tensor(eps)
        expected = w.clone()
        reference.project_interval_(expected, s, levels, grid, eps)
        triton.project_interval_(w, s, levels, grid, eps, by_pointer=shape[1] == 32)
        # The radius has five roundings in the kernel and one in the reference: 6 x 2^-24 of the reach, radius times a
        # bracket of at most 2; then three roundings of numbers up to |w|, and storage.
        reach = 2 * reference.feasible_radius(torch.tensor(float(eps))) * s.reshape(-1, 1)
        bound = reach * 6 * 2.0**-24 + expected.float().abs() * (3 * 2.0**-23 + 2 * ROUNDING[dtype])
        far = (w.float() - expected.float()).abs() > bound
        assert not far.any() and torch.equal(w.isnan(), expected.isnan()), (shape, w[far][:4], expected[far][:4])


# Sums of float32 in a tree: Triton's has fewer than 20 levels, numpy's (interpreter) fewer than 40, each one rounding
# of what has been summed so far; the products add one, the result one.
SUM_ERROR = 42 * 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_sums(triton, dtype):
    for shape in [(1, 1), (3, 129), (70, 32), (1, 2500), (2, 40000), (3, 0)]:
        x = torch.randn(shape).to(dtype)
        got, expected = triton.row_sums(x, shape[0]), reference.row_sums(x, shape[0])
        assert got.shape == expected.shape and got.dtype == torch.float32
        assert ((got - expected).abs() <= expected * SUM_ERROR).all(), shape
        assert torch.equal(got[:, 2], expected[:, 2])
    x = torch.randn(3, 40000)
    x[1, 20000], x[2, 7] = float("nan"), float("inf")
    got = triton.row_sums(x, 3)
    assert got[0].isfinite().all() and got[1].isnan().all() and (got[2] == float("inf")).all()


# ---- scales ---------------------------------------------------------------------------------------------------------

RULE_NUMBERS = {contract.ABSMAX: (7.0, 0.0, 0.0), contract.SAWB: (3.0, 7.509, 6.892), contract.MEAN: (1.0, 1.5, 0.0),
                contract.RMS: (1.0, 0.4, 0.0), contract.GIVEN: (7.0, 0.0, 0.0)}  # fmt: skip


def scales_as_wanted(triton, most=300, zeros=0.3):
    """Of a list: every rule and type, rows that are zero, not finite, or whose sum has overflown."""
    g, scales, sums, rules, numbers, expected = torch.Generator().manual_seed(most), [], [], [], [], []
    for i, rows in enumerate([1, 7, most, 40, 0, 9, 3, 13, 2, 5]):
        rule, place = list(RULE_NUMBERS)[i % 5], 3 * i % 7 % 5
        own = torch.rand(rows, 3, generator=g) * torch.exp2(torch.randn(rows, 1, generator=g) * 8)
        own[torch.rand(rows, generator=g) < zeros] = 0
        if rows > 4:
            inf = float("inf")
            own[0], own[-1], own[2] = float("nan"), inf, torch.tensor([inf, inf, 1e30])
        given = reference.round_scale(torch.rand(rows, generator=g) + 0.1, place)
        scales.append(given.clone())
        sums.append(own)
        rules += [rule, place, 37]
        numbers += RULE_NUMBERS[rule]
        expected.append(reference.rule_scales(own, rule, place, 37, *RULE_NUMBERS[rule],
                                              given if rule == contract.GIVEN else None))  # fmt: skip
    triton.scales_from_sums_(scales, sums, rules, numbers)
    for i, (got, want) in enumerate(zip(scales, expected, strict=True)):
        assert torch.equal(got, want), i


@pytest.mark.parametrize("zeros", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("most", [300, 600, 4500], ids=["small", "one program each", "several programs"])
def test_scales_of_a_list(triton, most, zeros):
    """Bit for bit."""
    scales_as_wanted(triton, most, zeros)


def test_scales_of_an_unknown_list_can_be_captured(interpreter):
    interpreter("CAPTURING", [True], 0, False)
    try:
        interpreter("VARIANTS", [], 0, False)
        scales_as_wanted(Runner(interpreter))
        assert interpreter("VARIANTS", [], 0, False)[1] == []  # torch's operators
    finally:
        interpreter("CAPTURING", [False], 0, False)


def check_mse_scales(triton, grid_name, dtype, shapes):
    levels, grid = GRIDS[grid_name]
    c_max = float(reference.hull(levels, grid)[1])
    for place, (rows, cols) in enumerate(shapes):
        w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)
        if rows > 2:
            w[1], w[2, 0] = 0, float("nan")
        arguments = w, reference.row_sums(w, rows), levels, grid, c_max, place
        assert torch.equal(triton.mse_scales(*arguments), reference.mse_scales(*arguments)), (rows, cols)


@pytest.mark.parametrize(("grid_name", "dtype"), zip(["uniform4", "binary", "powers"], DTYPES, strict=True))
def test_mse_scales(triton, grid_name, dtype):
    """Bit for bit: errors are added in one order everywhere."""
    check_mse_scales(triton, grid_name, dtype, [(1, 1), (4, 33), (2, 129)])


def test_scales_are_rounded_as_the_reference_rounds(triton):
    for x in (scales_at_roundings(), *scales_in_units()):
        scales, sums = [torch.empty_like(x) for _ in range(5)], [torch.stack([x, x, x], 1)] * 5
        triton.scales_from_sums_(scales, sums, [n for kind in range(5) for n in (0, kind, 1)], [1.0, 0.0, 0.0] * 5)
        assert all(torch.equal(scale, reference.round_scale(x, kind)) for kind, scale in enumerate(scales))


def test_of_candidates_with_equal_errors_the_smallest_is_chosen(triton):
    w = torch.tensor([[21.0, 100.0], [100.0, 21.0]])  # (60 - 21)^2 + (100 - 60)^2 = (61 - 21)^2 + (100 - 61)^2
    assert triton.mse_scales(w, reference.row_sums(w, 2), NONE, [2, -1, 1], 1.0, 0).tolist() == [60.0, 60.0]


@pytest.mark.slow
def test_mse_scales_of_rows_in_pieces(triton):
    check_mse_scales(triton, "binary", torch.float32, [(1, contract.SUM_COLUMNS + 9)])


def test_scales_are_checked(triton):
    scale, sums = torch.full((3,), 5.0), torch.ones(3, 3)
    for arguments, words in (
        (([scale], [], [0, 0, 4], [1.0, 0.0, 0.0]), "row_sums: expected 1"),
        (([scale], [sums[:2]], [0, 0, 4], [1.0, 0.0, 0.0]), "row_sums: expected shape"),
        (([scale, scale], [sums, sums], [0, 0, 4, 9, 0, 4], [1.0, 0.0, 0.0] * 2), "rules: expected a known rule"),
        (([scale], [sums], [0, 5, 4], [1.0, 0.0, 0.0]), "unknown type of scales 5"),
        (([scale], [sums], [0, 0, 4], [0.0, 0.0, 0.0]), "c_max"),
    ):
        with pytest.raises(ValueError, match=words):
            triton.scales_from_sums_(*arguments)
    assert (scale == 5).all()


# ---- the update -----------------------------------------------------------------------------------------------------


class Problem:
    """Tensor lists for one step, in the order of the operators' arguments."""

    def __init__(self, shapes, grids, dtype=torch.float32, copy=torch.float32, momentum=True, sums=True, seed=0):
        random = torch.Generator().manual_seed(seed)

        def draw(shape):
            return torch.randn(shape, generator=random)

        self.params = [(draw(shape) * 0.4).to(dtype) for shape in shapes]
        self.grads = [draw(shape).to(dtype) for shape in shapes]
        self.a = [draw(shape).to(dtype) for shape in shapes] if momentum else []
        self.b = [draw(shape).square().to(dtype) for shape in shapes]
        self.scales = [scales(shape[0], seed) for shape in shapes]
        self.levels = [GRIDS[name][0] for name in grids]
        self.grids = [number for name in grids for number in GRIDS[name][1]]
        poison = float("nan")
        self.copies = [torch.full(shape, poison).nan_to_num(3.0 if copy in LEVELS else poison).to(copy)
                       for shape in shapes] if copy else []  # fmt: skip
        self.kept, self.firsts, self.coefficients = [], [], []
        self.row_sums = [torch.full((shape[0], 3), poison) for shape in shapes] if sums else []
        self.totals = [torch.full((6,), poison, dtype=torch.float64) for _ in shapes] if sums else []

    def copy(self):
        other = object.__new__(Problem)
        other.__dict__ = {
            k: [t.clone() if isinstance(t, torch.Tensor) else t for t in v] for k, v in self.__dict__.items()
        }
        return other

    def only(self, i):
        """The problem of tensor i alone, on the same tensors."""
        other = object.__new__(Problem)
        other.__dict__ = {k: v[i : i + 1] for k, v in self.__dict__.items()}
        other.grids = self.grids[3 * i : 3 * i + 3]
        return other

    def step(self, rule="sgd", lr=None, eps=0.3, alpha=0.2, step=3.0, direction=False, clamp=False, maximize=False,
             skip=False, ste_clip=False, **options):  # fmt: skip
        row = RULES[rule]
        options = {**row.defaults, "momentum": 0.9, "weight_decay": 0.0, **options}
        lr = lr if lr is not None else 0.1 if rule == "sgd" else 0.01
        states = [*self.a, *self.b][: len(row.buffers) * len(self.params)] if self.a else []
        return row.operator, [
            self.params, self.grads, states, self.scales, self.levels, self.grids, self.copies, self.row_sums,
            self.totals, torch.tensor(step) if row.counts else None, torch.tensor(lr), torch.tensor(eps), alpha,
            row.numbers_of(options), direction, clamp, maximize, skip, self.kept or None, self.firsts or None,
            self.coefficients[0] if self.coefficients else None, ste_clip,
        ]  # fmt: skip


def assert_sums_near(got, expected, gradients, error):
    for i, (g, e) in enumerate(zip(got.row_sums, expected.row_sums, strict=True)):
        near = (g - e).abs() <= e * error
        assert (near | (g == e) | (g.isnan() & e.isnan())).all(), (i, g, e)
    for i, (g, e) in enumerate(zip(got.totals, expected.totals, strict=True)):
        if not e.numel():
            continue
        assert torch.equal(g[[0, 4, 5]], e[[0, 4, 5]]), (i, g, e)  # counts
        # g.v has terms of both signs: its error is relative to the sum of their sizes, at most |g| |v|.
        size = e.abs()
        size[3] = gradients[i].double().nan_to_num(0, 0, 0).norm() * e[2].sqrt()
        assert (((g - e).abs() <= size * error) | (g == e) | (g.isnan() & e.isnan())).all(), (i, g, e)


def assert_same_step(got, expected):
    for name in ("params", "a", "b", "copies"):
        for i, (g, e) in enumerate(zip(getattr(got, name), getattr(expected, name), strict=True)):
            assert_same(g, e, f"{name}[{i}] {tuple(e.shape)}")
    assert_sums_near(got, expected, expected.grads, SUM_ERROR)


def assert_adamw_step(got, expected, start, root_error=2.0**-23):
    """As above, but torch's own square root on the CPU (MKL) is not correctly rounded: off by 2^-23 at times.

    The root's error and the roundings of the three divisions and additions after it make 4 x 2^-23 of the step; the
    product with lr, the sum and the storage round once more, each perhaps to the other side.
    """
    for name in ("a", "b"):
        for g, e in zip(getattr(got, name), getattr(expected, name), strict=True):
            assert_same(g, e, name)
    for i, (g, e) in enumerate(zip(got.params, expected.params, strict=True)):
        old, e = start.params[i].float(), e.float()
        bound = (root_error + 3 * 2.0**-23) * (e - old).abs() + 2 * 2.0**-24 * old.abs()
        bound = bound + 2 * (ROUNDING[got.params[i].dtype] + 2.0**-24) * e.abs()
        assert ((g.float() - e).abs() <= bound).logical_or(g.isnan() & e.isnan()).all(), i
        if got.copies:
            copy, grid = torch.empty_like(got.copies[i]), got.grids[3 * i : 3 * i + 3]
            reference.fake_quantize_out_(g, got.scales[i], got.levels[i], grid, copy) if g.numel() else None
            assert_same(got.copies[i], copy, f"copies[{i}]")
    assert_sums_near(got, expected, expected.grads, SUM_ERROR + 2 * root_error + 16 * 2.0**-24)


def check_step(triton, problem, rule, offset=0, by_pointer=False, **options):
    start, expected = problem.copy(), problem.copy()
    name, args = expected.step(rule, **options)
    getattr(reference, name)(*args)
    name, args = problem.step(rule, **options)
    triton(name, args, offset, by_pointer)
    if rule == "adamw":
        assert_adamw_step(problem, expected, start, root_error=2.0**-22 if by_pointer else 2.0**-23)
    else:
        assert_same_step(problem, expected)


# Every way a row can lie in tiles of 32 segments of 32 columns: a part of a segment, several segments, several tiles
# that share a row, several rows that share a tile; odd lengths (no vectors), multiples of 8 (vectors), no elements.
STEP_SHAPES = [(3, 129), (40, 32), (2, 1100), (0, 4), (1, 2104), (5, 1)]
STEP_GRIDS = ["uniform4", "uniform4", "narrow2", "uniform4", "uniform4", "binary"]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(nesterov=True, weight_decay=0.01, clamp=True),
        dict(direction=True, dampening=0.5, weight_decay=0.01, clamp=True),
        dict(maximize=True, eps=1.6e-5, alpha=5.0),
    ],
    ids=str,
)
def test_sgd(triton, options):
    check_step(triton, Problem(STEP_SHAPES, STEP_GRIDS), "sgd", **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(direction=True, weight_decay=0.1, clamp=True),
        dict(maximize=True, eps=1.6e-5, weight_decay=0.1, step=1.0),
    ],
    ids=str,
)
def test_adamw(triton, options):
    check_step(triton, Problem(STEP_SHAPES, STEP_GRIDS), "adamw", **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype, copy", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16),
                                         (torch.float32, torch.bfloat16)])  # fmt: skip
def test_storage_types(triton, dtype, copy, rule):
    problem = Problem([(3, 129), (8, 64)], ["uniform4", "binary"], dtype, copy)
    check_step(triton, problem, rule, clamp=True, weight_decay=0.01)


WHOLE_SHAPES = [(3, 256), (2, 1024), (1, 2304), (5, 512)]  # rows of whole segments, tiles of one row and of several


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("eps", [0.3, 1.0])
def test_rows_of_whole_segments(triton, rule, eps):
    """Alone, and in a list whose other rows are not."""
    for shapes in (WHOLE_SHAPES, [*WHOLE_SHAPES, (3, 129)]):
        check_step(triton, Problem(shapes, ["uniform4"] * len(shapes)), rule, eps=eps, clamp=eps < 1, weight_decay=0.01)


@pytest.mark.parametrize("copy", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_levels(triton, dtype, copy):
    problem = Problem([(3, 129), (8, 256), (4, 40)], ["uniform4", "uniform4", "binary"], dtype, copy)
    problem.params[0][1, 7] = float("nan")
    check_step(triton, problem, "sgd", clamp=True)


@pytest.mark.parametrize("options", [dict(), dict(maximize=True, clamp=True), dict(skip=True, direction=True, eps=1.0)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_clip_in_the_step(triton, dtype, rule, options):
    """What ``ste_clip_`` and then the step give, the sums of the step too; weights on the ends are inside."""
    problem = Problem([(3, 129), (8, 256)], ["uniform4", "uniform4"], dtype)
    for p, s in zip(problem.params, problem.scales, strict=True):
        p.copy_(p * 4)
        p[0, :3] = torch.tensor([-8.0, 7.0, float("nan")]) * s[0]
    problem.grads[0][1, 3] = float("nan")
    check_step(triton, problem, rule, ste_clip=True, **options)


@pytest.mark.parametrize("coefficients", [None, (0.3, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharpness_aware_descent(triton, dtype, coefficients):
    """From the kept weights, with the mean of both gradients; some tensors of the list are as in a usual step."""
    problem = Problem([(3, 129), (8, 256), (4, 40)], ["uniform4"] * 3, dtype, torch.bfloat16)
    absent = torch.empty(0, dtype=dtype)
    problem.kept = [p * 0.9 for p in problem.params[:2]] + [absent]
    if coefficients is not None:
        problem.firsts = [absent, problem.grads[1].flip(0), absent]
        problem.coefficients = [torch.tensor(coefficients)]
    check_step(triton, problem, "sgd", clamp=True, weight_decay=0.01)


@pytest.mark.parametrize("options", [dict(eps=1.0), dict(lr=0.0, direction=True), dict(lr=1e-42, alpha=1e38)], ids=str)
def test_ends_of_the_schedules(triton, options):
    check_step(triton, Problem([(3, 129), (8, 64)], ["uniform4", "binary"]), "sgd", clamp=True, **options)


@pytest.mark.parametrize("name", GRIDS)
def test_step_on_every_grid(triton, name):
    check_step(triton, Problem([(3, 40), (1, 77)], [name] * 2), "sgd", clamp=True)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_nonfinite_gradients(triton, rule, skip):
    problem = Problem([(3, 129), (8, 64)], ["uniform4", "binary"])
    for g in problem.grads:
        g[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    problem.params[0][1, 5] = float("nan")
    check_step(triton, problem, rule, skip=skip, clamp=True)


def test_optional_outputs(triton):
    check_step(triton, Problem([(3, 40), (2, 1100)], ["uniform4"] * 2, copy=None, momentum=False, sums=False), "sgd")
    problem = Problem([(3, 40), (2, 1100)], ["uniform4"] * 2)
    problem.a[0] = problem.copies[1] = problem.row_sums[0] = NONE
    problem.totals[1] = NONE.double()
    check_step(triton, problem, "sgd")


@pytest.mark.parametrize("offset", [1, 4])
def test_alignment(triton, offset):
    """Tensors that begin off a 16-byte boundary (1), or on one for float32 alone (4)."""
    check_step(triton, Problem([(8, 64)], ["uniform4"], copy=torch.bfloat16), "sgd", offset=offset)


@pytest.mark.parametrize("rule", RULES)
def test_scalars_on_the_device(triton, rule):
    """The bias corrections come from float32 logarithms of beta: 2^-24 more, half of it under the root."""
    check_step(triton, Problem([(3, 40)], ["uniform4"]), rule, by_pointer=True, clamp=True)


def test_one_list_is_many_calls(triton):
    together = Problem([(3, 129), (8, 64), (2, 1100)], ["uniform4", "nf4", "uniform4"])
    apart = together.copy()
    triton(*together.step())
    for i in range(3):
        triton(*apart.only(i).step())
    assert_same_step(together, apart)


def test_gradients_move_between_steps(triton):
    """What the device knows of a list is kept; of its gradients, only as long as they stay where they are."""
    problem = Problem([(8, 64), (3, 40)], ["uniform4"] * 2)
    expected = problem.copy()
    more = [[g * k for g in problem.grads] for k in (2, -1, 3)]
    triton(*problem.step(), more_gradients=more)
    for gradients in [expected.grads, *more]:
        expected.grads = gradients
        reference.skew_sgd_(*expected.step()[1])
    assert_same_step(problem, expected)


def test_sums_of_many_tiles(interpreter):
    """The second kernels add 1024 partial sums at a time; with 4 at a time small tensors need several rounds too."""
    interpreter("REDUCE", [4], 0, False)
    try:
        check_step(Runner(interpreter), Problem([(3, 330), (2, 6000)], ["uniform4"] * 2), "sgd")
        problem = Problem([(3, 330), (2, 6000)], ["uniform4"] * 2)
        problem.params[0][1, 300] = problem.params[1][1, 5000] = float("nan")
        check_step(Runner(interpreter), problem, "sgd")
        assert problem.row_sums[1][0].isfinite().all() and problem.row_sums[1][1].isnan().all()
    finally:
        interpreter("REDUCE", [1024], 0, False)


def test_plans_are_kept_within_bounds():
    """By number and by bytes, the one asked for last the longest; a larger one than all is kept alone."""
    from askew_kernels.triton_kernels.update import Recent

    plans = Recent(3, 100)
    for key, nbytes in (("a", 10), ("b", 20), ("c", 30)):
        plans.keep(key, key.upper(), nbytes)
    assert plans.lookup("a") == "A" and plans.lookup("d") is None
    plans.keep("d", "D", 5)  # a fourth: b was asked for longest ago
    assert [*plans.entries] == ["c", "a", "d"] and plans.held == 45
    plans.keep("e", "E", 80)
    assert [*plans.entries] == ["a", "d", "e"] and plans.held == 95
    plans.keep("f", "F", 1000)
    assert [*plans.entries] == ["f"] and plans.held == 1000
    plans.clear()
    assert not plans.entries and plans.held == 0


def test_errors(interpreter):
    triton = Runner(interpreter)
    levels, grid = GRIDS["uniform4"]
    x = torch.randn(4, 8)
    with pytest.raises(TypeError, match="scale: expected float32"):
        triton.fake_quantize(x, torch.ones(4, dtype=torch.float64), levels, grid, True, False, 0)
    with pytest.raises(ValueError, match="scale: 3 rows do not divide 32"):
        triton.fake_quantize(x, torch.ones(3), levels, grid, True, False, 0)
    with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16"):
        triton.fake_quantize(x.double(), torch.ones(4), levels, grid, True, False, 0)
    with pytest.raises(TypeError, match=r"grad: expected torch\.float32"):
        triton.ste_clip_(x.half(), x, torch.ones(4), levels, grid)
    with pytest.raises(ValueError, match="rows: 5 rows do not divide 32"):
        triton.row_sums(x, 5)
    problem = Problem([(3, 40)], ["uniform4"])
    problem.b = [NONE]
    with pytest.raises(ValueError, match="states: expected 2 for every parameter"):
        triton(*problem.step("adamw"))
    problem.row_sums[0] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="row_sums: expected 9 elements"):
        triton(*problem.step())


BROKEN = {  # what is wrong with a step: the error, and what it says
    "lr": (ValueError, "lr: expected a 0-dim"), "eps": (ValueError, "eps: expected a 0-dim"),
    "step": (ValueError, "step: expected a 0-dim"), "numbers": (TypeError, "argument"),
    "kept": (ValueError, "kept: expected 40 elements"), "firsts": (ValueError, "coefficients: expected float32"),
    "coefficients": (ValueError, "coefficients: expected float32"), "totals": (ValueError, "totals: expected 6"),
    "clip": (ValueError, "ste_clip: expected no kept weights"), "copies": (TypeError, "dequantized: expected float32"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_step_that_fails_writes_nothing(interpreter, what):
    """Whatever is wrong with the last tensor of a list, or with a number: every argument is as it was."""
    problem = Problem([(3, 129), (0, 4), (1, 40)], ["uniform4"] * 3)
    problem.kept = [p * 2 for p in problem.params]
    problem.firsts, problem.coefficients = [g * 2 for g in problem.grads], [torch.ones(2)]
    clip, rule = what == "clip", "adamw" if what == "step" else "sgd"
    if what == "kept":
        problem.kept[2] = torch.ones(1, 39)
    elif what == "firsts":
        problem.coefficients = []
    elif what == "coefficients":
        problem.coefficients = [torch.ones(3)]
    elif what == "totals":
        problem.totals[2] = torch.ones(5, dtype=torch.float64)
    elif what == "copies":
        problem.copies[2] = torch.ones(1, 40, dtype=torch.uint8)
    name, args = problem.step(rule, ste_clip=clip)
    for key, place, value in (("lr", 10, torch.ones(2)), ("eps", 11, torch.ones(2)), ("step", 9, None),
                              ("numbers", 13, [0.9])):  # fmt: skip
        if what == key:
            args[place] = value
    before = [t.clone() for a in args if isinstance(a, list) for t in a if isinstance(t, torch.Tensor)]
    answer, after = interpreter("TRY", [name, args], 0, False)
    assert isinstance(answer, BROKEN[what][0]) and BROKEN[what][1] in str(answer), answer
    kept = [t for a in after if isinstance(a, list) for t in a if isinstance(t, torch.Tensor)]
    for old, new in zip(before, kept, strict=True):
        assert_same(new, old, what)


# ---- products of levels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_levels(triton, dtype, held):
    """Levels and scales bit for bit, but for the scale's last bit where torch divides by a number on a GPU."""
    top, free = contract.LEVEL_TYPES[held], held != torch.int8
    grids = [(NONE, [0, 0, 0], top) if free else (NONE, [1, -127, 127], top), (*GRIDS["uniform4"], 7.0)]
    for shape in [(1, 1), (7, 129), (3, 4096), (2, 5000), (0, 5), (3, 0)]:
        x = weights(shape, dtype)
        if shape[0] > 2 and shape[1]:
            x[1], x[2] = 0, x[2].nan_to_num(0, 0, 0) * 2.0**-10
        if shape[0] > 4:
            x[3, 5] = float("nan")
            x[4] = torch.exp2(torch.linspace(-22, 0, shape[1]))  # float8's denormals, too
        for levels, grid, c_max in grids:
            q, s = triton.token_levels(x, levels, grid, c_max, held)
            wanted, scale = reference.token_levels(x, levels, grid, c_max, held)
            assert_same(s, scale, shape)
            assert_same(q.float() + 0.0, wanted.float() + 0.0, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.int32, torch.float32, *LEVELS])
def test_scaled_sums(triton, kind, dtype):
    for number, (rows, cols) in enumerate([(1, 1), (5, 7), (40, 129), (3, 3000), (0, 4), (3, 0)]):
        sums, token = torch.randn(rows, cols) * (40 if kind in LEVELS else 3e4), torch.rand(rows) + 0.1
        sums[:1, :1] = float("nan") if kind.is_floating_point else 0.0
        sums = sums.to(kind)
        scale = torch.rand(cols if number % 2 else 1) + 0.1
        bias = torch.randn(cols).to(dtype) if number % 3 else None
        got = triton.scaled_sums(sums, token, scale, bias, dtype)
        assert_same(got + 0.0, reference.scaled_sums(sums, token, scale, bias, dtype) + 0.0, (rows, cols))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_levels(triton, dtype):
    for number, shape in enumerate([(1, 1), (7, 129), (3, 4096), (2, 5000), (0, 5), (3, 0)]):
        x, seed = weights(shape, dtype), torch.tensor(2**45 + 3)
        if shape[0] > 4:
            x[1], x[3, 5], x[4, 1] = 0, float("nan"), float("inf")
        factor = torch.rand(shape[1] if number % 2 else 1) + 0.1
        for got, wanted in zip(triton.stochastic_levels(x, factor, seed),
                               reference.stochastic_levels(x, factor, seed), strict=True):  # fmt: skip
            assert_same(got, wanted, shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_luq(triton, dtype):
    for shape in [(1, 1), (7, 129), (3, 1024), (0,)]:
        x, seed = weights(shape, dtype), torch.tensor(2**45 + 3)
        x.view(-1)[:1] = 0
        for bits in (2, 4, 6):
            assert_same(triton.luq(x, bits, seed) + 0.0, reference.luq(x, bits, seed) + 0.0, shape)
    for bad in (float("nan"), float("inf")):
        assert triton.luq(torch.tensor([1.0, bad, 0.0]), 4, torch.tensor(1)).isnan().all()


# ---- mixtures -------------------------------------------------------------------------------------------------------

CANDIDATES = {"weights": [1, -2, 1, 1, -8, 7, 1, -128, 127], "mixed": [2, -1, 1, 0, 0, 0, 1, 0, 15]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CANDIDATES)
def test_mix_fake_quantize(triton, name, dtype):
    grids = CANDIDATES[name]
    for k, shape in enumerate(SHAPES):
        x, g = weights(shape, dtype), weights(shape, dtype, seed=5)
        x, g = torch.nan_to_num(x, 0.5, 2.0, -2.0), torch.nan_to_num(g, 0.5, 2.0, -2.0)
        s = torch.stack([scales(shape[0]), 0.5 * scales(shape[0]), 2 * scales(shape[0])])
        p = torch.tensor([0.2, 0.5, 0.3])
        expected = reference.mix_fake_quantize(x, s, p, grids, True, True)
        assert_same(triton.mix_fake_quantize(x, s, p, grids, True, True, offset=k % 2) + 0.0, expected + 0.0, shape)
        for clip in (True, False):
            wanted = reference.mix_fake_quantize_backward(g, x, s, p, grids, clip, True)
            got = triton.mix_fake_quantize_backward(g, x, s, p, grids, clip, True)
            assert_same(got[0] + 0.0, wanted[0] + 0.0, shape)
            # float32 sums of at most 2048 products, each at most |g| (2 c_max + 1) scales
            size = float(g.float().abs().sum()) * 256 * float(s.max())
            for a, b in zip(got[1:], wanted[1:], strict=True):
                assert (a - b).abs().max() <= size * SUM_ERROR if a.numel() else True, shape


# ---- sharpness-aware passes -----------------------------------------------------------------------------------------

LENGTHS = [0, 1, 7, 129, 2048, 5000]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("coefficients", [(0.3, 0.0), (2.0, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sam(triton, dtype, coefficients, offset):
    g = torch.Generator().manual_seed(2)
    ws, gs, seconds = ([torch.randn(n, generator=g).to(dtype) for n in LENGTHS] for _ in range(3))
    gs[4][7] = float("nan")
    adaptive, pair = [1, 0, 1, 1, 0, 1], torch.tensor(coefficients)
    moved, kept = [w.clone() for w in ws], [torch.full_like(w, 9.0) for w in ws]
    expected, copies = [w.clone() for w in ws], [torch.empty_like(w) for w in ws]
    triton("sam_perturb_", [moved, gs, kept, pair, adaptive, 0.01], offset=offset)
    reference.sam_perturb_(expected, gs, copies, pair, adaptive, 0.01)
    for a, b, keep, w in zip(moved, expected, kept, ws, strict=True):
        assert_same(a, b)
        assert_same(keep, w)
    triton("sam_restore_", [moved, kept], offset=offset)
    for a, w in zip(moved, ws, strict=True):
        assert_same(a, w)
    means, wanted = [s.clone() for s in seconds], [s.clone() for s in seconds]
    triton("sam_average_", [means, gs, pair], offset=offset)
    reference.sam_average_(wanted, gs, pair)
    for a, b in zip(means, wanted, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sam_norm(triton, dtype):
    ws, gs = ([torch.randn(n).to(dtype) for n in LENGTHS] for _ in range(2))
    adaptive = [1, 0, 1, 1, 0, 1]
    got, expected = triton.sam_norm(ws, gs, adaptive, 0.01), reference.sam_norm(ws, gs, adaptive, 0.01)
    assert got.dtype == torch.float64 and got.shape == ()
    assert abs(got - expected) <= expected * SUM_ERROR
    gs[3][128] = float("inf")
    assert not triton.sam_norm(ws, gs, adaptive, 0.01).isfinite()


def test_sam_errors(interpreter):
    triton = Runner(interpreter)
    w, pair = torch.zeros(4), torch.zeros(2)
    for call, match in (
        (lambda: triton.sam_norm([w], [w[:3]], [0], 0.0), "grads"),
        (lambda: triton.sam_norm([w], [w], [], 0.0), "adaptive"),
        (lambda: triton.sam_perturb_([w], [w], [w.half()], pair, [0], 0.0), "kept"),
        (lambda: triton.sam_perturb_([w], [w], [w.clone()], torch.zeros(3), [0], 0.0), "coefficients"),
        (lambda: triton.sam_restore_([w], []), "kept"),
        (lambda: triton.sam_average_([w], [w.double()], pair), "firsts"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            call()


# ---- packed weights -------------------------------------------------------------------------------------------------

PACKED = {  # (grid, bits of a code, 0 for five trits a byte); codes above the highest level count as the highest
    "int4": ("uniform4", 4), "narrow": ("narrow2", 2), "eight": ("unsigned8", 8), "binary": ("binary", 1),
    "trits": ("narrow2", 0), "three": ("three", 3), "five": ("five", 5), "nf4": ("nf4", 4),
}  # fmt: skip
PACKED_GRIDS = {**GRIDS, "three": (NONE, [1, -4, 3]), "five": (NONE, [1, -15, 15])}
PACKED_SHAPES = [
    (1, 1, 0),
    (3, 7, 1),
    (5, 40, 1),
    (6, 96, 3),
    (70, 128, 4),
    (9, 640, 5),
    (4, 192, 4),
]  # (n, cols, groups)


def packed(name, n, cols, groups, seed=0):
    """(codes, scale, levels, grid, bits): random bytes, trits below 243; the padding bits of a row are random too."""
    grid_name, bits = PACKED[name]
    levels, grid = PACKED_GRIDS[grid_name]
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(243 if bits == 0 else 256, (n, contract.row_bytes(cols, bits)), generator=g).to(torch.uint8)
    scale = torch.rand(max(1, groups * n), generator=g) + 0.1
    return codes, scale, levels, grid, bits


@pytest.mark.parametrize("name", PACKED)
def test_packed_dequantize(triton, name):
    for n, cols, groups in [*PACKED_SHAPES, (2, 1500, 1), (0, 5, 1), (2, 0, 1)]:
        codes, scale, levels, grid, bits = packed(name, n, cols, groups)
        for dtype in DTYPES:
            out, expected = (torch.full((n, cols), float("nan"), dtype=dtype) for _ in range(2))
            triton.packed_dequantize_(codes, scale, levels, grid, bits, out)
            reference.packed_dequantize_(codes, scale, levels, grid, bits, expected)
            assert_same(out, expected, (n, cols, groups, dtype))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in PACKED]
    + [(name, torch.bfloat16) for name in ("int4", "binary", "trits", "nf4")]
    + [("int4", torch.float16)],
)
def test_packed_linear(triton, name, dtype):
    """Few inputs (rows in words, in bytes, code by code), many (tiles, shares of the columns), tails, bias or none."""
    for number, (n, cols, groups) in enumerate([*PACKED_SHAPES, (2, 1500, 1), (2, 0, 1)]):
        for tokens in (1, 0, 17) if number % 2 else (8, 20):
            codes, scale, levels, grid, bits = packed(name, n, cols, groups, number)
            g = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, cols, generator=g).to(dtype)
            bias = torch.randn(n, generator=g).to(dtype) if number % 2 else None
            y = triton.packed_linear(x, codes, scale, levels, grid, bits, bias)
            weight = reference.packed_weight(codes, scale.double(), levels.double(), grid, bits, cols, torch.float64)
            exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
            if bias is not None:
                exact, size = exact + bias.double(), size + bias.double().abs()
            bound = (cols + 3) * 2.0**-24 * size + ROUNDING[dtype] * exact.abs() + 1e-38
            assert y.dtype == dtype and y.shape == (tokens, n)
            wrong = ~((y.double() - exact).abs() <= bound)
            assert not wrong.any(), (n, cols, groups, tokens, y[wrong][:4], exact[wrong][:4])


def test_packed_linear_of_special_values(triton):
    codes, scale, levels, grid, bits = packed("int4", 3, 64, 1)
    for tokens in (2, 20):
        x = torch.ones(tokens, 64)
        x[0, 5], x[1, 63] = float("nan"), float("inf")
        y = triton.packed_linear(x, codes, scale, levels, grid, bits, None)
        expected = reference.packed_linear(x, codes, scale, levels, grid, bits, None)
        assert torch.equal(y.isnan(), expected.isnan()) and y[0].isnan().all() and not y[2:].isnan().any()
        assert torch.equal(y.isinf(), expected.isinf())


# ---- the first contact: each kernel once ----------------------------------------------------------------------------

MOST_VARIANTS = 44  # compiled by the tests' default: on a GPU, and ahead of time


def quantized_as_wanted(triton, name="uniform4", dtype=torch.float32, shape=(3, 129), seed=None):
    x, s, more = weights(shape, dtype), scales(shape[0]), (seed is not None, seed or 0)
    assert_same(
        triton.fake_quantize(x, s, *GRIDS[name], True, *more), reference.fake_quantize(x, s, *GRIDS[name], True, *more)
    )


def written_as_wanted(triton, name, *after_x, dtype=torch.float32):
    """An operator that writes its first tensor or its last."""
    x, s = weights((3, 129), dtype), scales(3)
    args = [x, s, *GRIDS["uniform4"], *after_x]
    if name.startswith("ste_clip_"):
        args = [weights(x.shape, dtype, seed=5), *args]
    expected = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    getattr(reference, name)(*expected)
    triton(name, args)
    written = -1 if name == "fake_quantize_out_" else 0
    assert_same(args[written], expected[written], name)


def stepped_as_wanted(triton, rule="sgd", shape=(8, 256), by_pointer=False, kept=False, options=None, **problem):
    problem = Problem([shape, (4, 512)], ["uniform4"] * 2, **problem)
    if kept:
        problem.kept = [p * 0.9 for p in problem.params]
        problem.firsts, problem.coefficients = [g.flip(0) for g in problem.grads], [torch.tensor([0.3, 0.5])]
    check_step(triton, problem, rule, by_pointer=by_pointer, **{"clamp": True, **(options or {})})


def levels_as_wanted(triton, held):
    x, top = weights((3, 512), torch.bfloat16), contract.LEVEL_TYPES[held]
    grid = [1, -127, 127] if held == torch.int8 else [0, 0, 0]
    for got, wanted in zip(triton.token_levels(x, NONE, grid, top, held),
                           reference.token_levels(x, NONE, grid, top, held), strict=True):  # fmt: skip
        assert_same(got, wanted)


def random_as_wanted(triton, name, second):
    args = weights((3, 512), torch.bfloat16), second, torch.tensor(2**45 + 3)
    got, wanted = getattr(triton, name)(*args), getattr(reference, name)(*args)
    for one, other in zip(got, wanted, strict=True):  # a pair, or rows
        assert_same(one + 0.0, other + 0.0)


def sums_as_wanted(triton, kind):
    args = [(torch.randn(5, 128) * 40).to(kind), torch.rand(5) + 0.1, torch.rand(128) + 0.1, None, torch.bfloat16]
    assert_same(triton.scaled_sums(*args) + 0.0, reference.scaled_sums(*args) + 0.0)


def row_sums_as_wanted(triton):
    for shape in ((3, 129), (2, 40000)):
        x = torch.randn(shape)
        expected = reference.row_sums(x, shape[0])
        assert ((triton.row_sums(x, shape[0]) - expected).abs() <= expected * SUM_ERROR).all()


def mixed_as_wanted(triton):
    x, g, s = torch.randn(3, 129), torch.randn(3, 129), torch.stack([scales(3)] * 3)
    rest = s, torch.tensor([0.2, 0.5, 0.3]), CANDIDATES["mixed"], True, True
    assert_same(triton.mix_fake_quantize(x, *rest) + 0.0, reference.mix_fake_quantize(x, *rest) + 0.0)
    got, wanted = (f.mix_fake_quantize_backward(g, x, *rest)[0] for f in (triton, reference))
    assert_same(got + 0.0, wanted + 0.0)


def moved_as_wanted(triton):
    w, g, pair = torch.randn(2048), torch.randn(2048), torch.tensor([0.3, 0.5])
    for name, args in (("sam_perturb_", [[w], [g], [w.clone()], pair, [1], 0.01]), ("sam_restore_", [[w], [g]]),
                       ("sam_average_", [[w], [g], pair])):  # fmt: skip
        wanted = [[t.clone() for t in a] if isinstance(a, list) and isinstance(a[0], torch.Tensor) else a for a in args]
        getattr(reference, name)(*wanted)
        triton(name, args)
        assert_same(args[0][0], wanted[0][0], name)
    got, expected = (f.sam_norm([w], [g], [1], 0.01) for f in (triton, reference))
    assert abs(got - expected) <= expected * SUM_ERROR


def packed_as_wanted(triton, name, tokens):
    n, cols = 70, 128
    codes, scale, levels, grid, bits = packed(name, n, cols, 1)
    x = torch.randn(tokens, cols).to(torch.bfloat16)
    y = triton.packed_linear(x, codes, scale, levels, grid, bits, None)
    weight = reference.packed_weight(codes, scale.double(), levels.double(), grid, bits, cols, torch.float64)
    exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    assert ((y.double() - exact).abs() <= (cols + 3) * 2.0**-24 * size + 2.0**-8 * exact.abs()).all()


bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
CONTACT = {
    "quantize": quantized_as_wanted,
    "quantize bf16": lambda t: quantized_as_wanted(t, dtype=bf16, shape=(2, 2048)),
    "quantize stochastic": lambda t: quantized_as_wanted(t, seed=7),
    "quantize to bf16": lambda t: written_as_wanted(t, "fake_quantize_out_", torch.zeros(3, 129, dtype=bf16)),
    "quantize to float8": lambda t: written_as_wanted(t, "fake_quantize_out_", torch.zeros(3, 129).to(fp8)),
    "straight-through": lambda t: written_as_wanted(t, "ste_clip_"),
    "scale gradient": lambda t: written_as_wanted(t, "ste_clip_scale_grad_", True, 0.5),
    "project": lambda t: written_as_wanted(t, "project_interval_", torch.tensor(1.0)),
    "row sums": row_sums_as_wanted,
    "sgd": stepped_as_wanted,
    "sgd in hold": lambda t: stepped_as_wanted(t, copy=bf16, momentum=False, options={"eps": 1.0, "clamp": False}),
    "sgd, odd rows, float8": lambda t: stepped_as_wanted(t, shape=(3, 129), copy=fp8, options={"ste_clip": True}),
    "sgd after an ascent": lambda t: stepped_as_wanted(t, kept=True, sums=False),
    "adamw, rates on the device": lambda t: stepped_as_wanted(t, "adamw", by_pointer=True, sums=False),
    "lion bf16": lambda t: stepped_as_wanted(t, "lion", dtype=bf16, copy=bf16, sums=False),
    "token levels int8": lambda t: levels_as_wanted(t, torch.int8),
    "token levels float8": lambda t: levels_as_wanted(t, fp8),
    "scaled sums": lambda t: sums_as_wanted(t, torch.int32),
    "stochastic levels": lambda t: random_as_wanted(t, "stochastic_levels", torch.rand(512)),
    "luq": lambda t: random_as_wanted(t, "luq", 4),
    "decoded levels": lambda t: sums_as_wanted(t, fp8),
    "scales": scales_as_wanted,
    "scales by error": lambda t: check_mse_scales(t, "uniform4", torch.float32, [(2, 33)]),
    "mixture": mixed_as_wanted,
    "sharpness-aware passes": moved_as_wanted,
    "packed, few tokens": lambda t: packed_as_wanted(t, "int4", 1),
    "packed, many tokens": lambda t: packed_as_wanted(t, "int4", 20),
}


def test_first_contact_compiles_little(interpreter):
    """What a GPU would compile for ``CONTACT``, counted by what Triton tells its variants apart by."""
    interpreter("VARIANTS", [], 0, False)
    for case in CONTACT.values():
        case(Runner(interpreter))
    _, variants = interpreter("VARIANTS", [], 0, False)
    assert 25 < len(variants) <= MOST_VARIANTS, sorted(name for name, *_ in variants)


# ---- ahead-of-time compilation --------------------------------------------------------------------------------------


FEW_CASES = ("sgd, bf16 copy and sums", "sgd, float8 levels")  # for architectures beside sm_90


RARE_CASES = ("quantize per tensor", "quantize long rows", "mix bf16", "sam perturb bf16", "sam average", "sgd",
              "sgd, int8 levels", "packed few binary", "scales of many rows")  # fmt: skip  # left to `make test-full`


def compile_all(rare=False):
    """The compiler's worker: the launches of ``cases`` for each architecture, as JSON: {arch: {case: facts}}."""
    import triton as triton_package
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from askew_kernels import triton_kernels as kernels

    class Target:
        """As much of a driver as a launch asks for before it would launch."""

        def __init__(self, arch):
            self.arch = arch

        def get_current_target(self):
            return GPUTarget("cuda", self.arch, 32)

        def get_current_device(self):
            return self.arch

        def get_current_stream(self, _device):
            return 0

    launched, variants = [], set()
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self.fn.__name__, compiled))
        variants.add((driver.active.get_current_target().arch, compiled.hash))
        return compiled

    JITFunction.run = only_compile
    levels, grid = GRIDS["uniform4"]
    cuobjdump = Path(triton_package.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def facts(compiled):
        ptx = compiled.asm["ptx"]
        found = {
            "loads": len(re.findall(r"ld\.global[\w.:]*\.v4", ptx)),
            "stores": len(re.findall(r"st\.global[\w.:]*\.v4", ptx)),
            "inexact": re.findall(r"fma\.rn\.f32|\.ftz|\.approx[\w.]*|div\.full[\w.]*|\batom\.|\bred\.", ptx),
            "local": ".local" in ptx,
            "mma": "mma" in ptx,
        }
        if cuobjdump.exists():
            binary = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
            binary.write_bytes(compiled.asm["cubin"])
            usage = subprocess.run([cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
            numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
            found.update({k.lower() + "_used": int(v) for k, v in numbers.items()})
        return found

    def quantize(shape, dtype=torch.float32, grid_name="uniform4", stochastic=False):
        x, s = torch.zeros(shape, dtype=dtype), torch.ones(shape[0])
        kernels.fake_quantize(x, s, *GRIDS[grid_name], True, stochastic, 0)

    def step(rule, cols=128, eps=0.3, **options):
        name, args = Problem([(64, cols)], ["uniform4"], **options).step(rule, eps=eps, weight_decay=0.01, clamp=True)
        getattr(kernels, name)(*args)

    def scales(rows):
        kernels.scales_from_sums_([torch.zeros(rows)], [torch.zeros(rows, 3)], [1, 0, 9], [3.0, 7.5, 6.9])

    bf16 = torch.bfloat16
    x, s = torch.zeros(4, 4096), torch.ones(4)
    codes, groups = torch.zeros(4, 2048, dtype=torch.uint8), torch.ones(4 * 32)
    mixture = torch.ones(4, 4), torch.ones(4) / 4, [1, -2, 1, 1, -4, 3, 1, -8, 7, 0, 0, 0]
    cases = {
        "quantize per tensor": lambda: quantize((1, 8192)),
        "quantize long rows": lambda: quantize((4, 4608)),
        "quantize groups of 32": lambda: quantize((64, 32)),
        "quantize bf16": lambda: quantize((4, 4096), bf16),
        "quantize nf4": lambda: quantize((4, 4096), grid_name="nf4"),
        "quantize stochastic": lambda: quantize((4, 4096), stochastic=True),
        "quantize to bf16": lambda: kernels.fake_quantize_out_(x, s, levels, grid, x.to(bf16)),
        "straight-through": lambda: kernels.ste_clip_(x.clone(), x, s, levels, grid),
        "scale gradient": lambda: kernels.ste_clip_scale_grad_(x.clone(), x, s, levels, grid, True, 1.0),
        "project": lambda: kernels.project_interval_(x, s, levels, grid, torch.tensor(0.5)),
        "row sums": lambda: kernels.row_sums(x, 4),
        "scales": lambda: scales(100),
        "scales of many rows": lambda: scales(5000),
        "scales by error": lambda: kernels.mse_scales(x, torch.ones(4, 3), levels, grid, 7.0, 0),
        "sgd": lambda: step("sgd", copy=None, sums=False),
        "sgd, bf16 copy and sums": lambda: step("sgd", copy=bf16),
        "sgd bf16": lambda: step("sgd", dtype=bf16, copy=bf16),
        "sgd, whole segments": lambda: step("sgd", cols=256, copy=None, sums=False),
        "sgd in hold": lambda: step("sgd", cols=256, eps=1.0, copy=None, sums=False),
        "sgd, float8 levels": lambda: step("sgd", cols=256, copy=torch.float8_e4m3fn, sums=False),
        "sgd, int8 levels": lambda: step("sgd", cols=256, copy=torch.int8, sums=False),
        "token levels float8": lambda: kernels.token_levels(x.to(bf16), NONE, [0, 0, 0], 448.0, torch.float8_e4m3fn),
        "token levels int8": lambda: kernels.token_levels(x.to(bf16), NONE, [1, -127, 127], 127.0, torch.int8),
        "scaled sums": lambda: kernels.scaled_sums(x.int(), s, torch.ones(4096), s.new_ones(4096).to(bf16), bf16),
        "stochastic levels": lambda: kernels.stochastic_levels(x.to(bf16), torch.ones(4096), torch.tensor(1)),
        "luq": lambda: kernels.luq(x.to(bf16), 4, torch.tensor(1)),
        "adamw, bf16 copy and sums": lambda: step("adamw", copy=bf16),
        "sam norm": lambda: kernels.sam_norm([x], [x], [1], 0.01),
        "mix": lambda: kernels.mix_fake_quantize(x, *mixture, True, False),
        "mix bf16": lambda: kernels.mix_fake_quantize(x.to(bf16), *mixture, True, False),
        "mix gradient": lambda: kernels.mix_fake_quantize_backward(x, x, *mixture, True, False),
        "sam perturb": lambda: kernels.sam_perturb_([x.clone()], [x], [x.clone()], torch.zeros(2), [1], 0.01),
        "sam perturb bf16": lambda: kernels.sam_perturb_(
            [x.to(bf16)], [x.to(bf16)], [x.to(bf16)], torch.zeros(2), [0], 0.01
        ),
        "sam restore": lambda: kernels.sam_restore_([x], [x.clone()]),
        "packed dequantize": lambda: kernels.packed_dequantize_(codes, s, levels, grid, 4, x.to(bf16)),
        "packed few bf16": lambda: kernels.packed_linear(x[:1].to(bf16), codes, groups, levels, grid, 4, None),
        "packed few binary": lambda: kernels.packed_linear(
            x[:2], codes[:, :512].contiguous(), s, NONE, [2, -1, 1], 1, s
        ),
        "packed many bf16": lambda: kernels.packed_linear(
            torch.zeros(64, 4096, dtype=bf16), codes, groups, levels, grid, 4, None
        ),
        "sam average": lambda: kernels.sam_average_([x], [x.clone()], torch.zeros(2)),
    }
    report = {}
    for arch in (90, 80, 100):
        driver.set_active(Target(arch))
        report[arch] = {}
        for case, launch in cases.items():
            if (case in RARE_CASES) != rare or (arch != 90 and case not in FEW_CASES):
                continue  # on other architectures the compiler's work on the others is the same
            del launched[:]
            launch()
            main = [c for name, c in launched if name not in ("store_addresses_kernel",)]
            report[arch][case] = facts(main[0])
            for extra in main[1:]:  # the second kernels of the update
                report[arch][case]["inexact"] += facts(extra)["inexact"]

    report["variants"] = len(variants)
    # Numbers that change from step to step compile nothing; a list of a usual model is one launch.
    del launched[:]
    problem = Problem([(64, 128)], ["uniform4"])
    for lr, eps in itertools.product((0.1, 1.0, 0.0), (0.3, 1.0)):
        kernels.skew_sgd_(*problem.step(lr=lr, eps=eps, alpha=lr + 1)[1])
    for seed in (0, 1, 16, 2**40, -1):
        kernels.fake_quantize(x, s, levels, grid, True, True, seed)
    report["compiled"] = {
        name: len({id(c) for n, c in launched if n == name}) for name in ("update_kernel", "quantize_kernel")
    }
    del launched[:]
    shapes = [(64, 27 * 8), (64, 576), (128, 1152), (512, 4608), (1000, 512), (10, 32), (1, 4096)]
    kernels.skew_sgd_(*Problem(shapes, ["uniform4", "narrow2"] * 3 + ["uniform4"]).step()[1])
    report["launches"] = [name for name, _ in launched]
    print(json.dumps(report))


def compiled_report(mode, folder):
    process = worker_process(mode, {"TRITON_CACHE_DIR": str(folder)}, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_report("compile", tmp_path_factory.mktemp("triton_cache"))


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_compiles_to_vectors_without_spills(compiled, arch):
    check_facts(compiled[arch])


@pytest.mark.slow
def test_the_rare_ones_compile_as_well(tmp_path):
    check_facts(compiled_report("compile_rare", tmp_path)["90"])


def check_facts(found):
    # 2048 elements on 128 threads: 4 vectors of fp32 or 2 of a 2-byte type a thread; the update: one vector a thread of
    # each of w, g and the states, in hold two, and the copy in vectors of as many elements (bf16: 8 bytes, levels 4).
    expected = {
        "quantize bf16": (2, 2), "quantize to bf16": (4, 2), "straight-through": (8, 4), "row sums": (8, 0),
        "scale gradient": (4, 2),  # of tiles of half the size
        "stochastic levels": (6, 0), "luq": (1, 1),
        "sgd": (3, 2), "sgd, bf16 copy and sums": (3, 2), "sgd bf16": (3, 3), "adamw, bf16 copy and sums": (4, 3),
        "sgd, whole segments": (3, 2), "sgd in hold": (6, 4), "sgd, float8 levels": (3, 2),
        "sgd, int8 levels": (3, 2), "token levels float8": (8, 2), "token levels int8": (8, 2), "scaled sums": (5, 1),
        "sam norm": (8, 0), "sam perturb": (8, 8), "sam perturb bf16": (4, 4), "sam average": (8, 4),
        "mix bf16": (2, 2), "mix gradient": (4, 2),
    }  # fmt: skip
    assert found
    for case, facts in found.items():
        if case.startswith("packed"):  # sums in float32, of which each product and sum may be one operation
            assert ("many" in case) == facts["mma"]  # matrix units, where there are rows enough for them
            assert not facts["local"] and facts.get("stack_used", 0) == 0 and facts.get("local_used", 0) == 0, facts
            continue
        if case.startswith("scales"):  # float64 of few numbers, rows of three
            assert not facts["inexact"] and not facts["local"] and facts.get("stack_used", 0) == 0, (case, facts)
            continue
        loads, stores = expected.get(case, (4, 4))
        assert (facts["loads"], facts["stores"]) == (loads, stores), (case, facts)
        assert not facts["inexact"] and not facts["local"], (case, facts)
        assert facts.get("stack_used", 0) == 0 and facts.get("local_used", 0) == 0, (case, facts)
        # 64 registers let 1024 threads stay on a multiprocessor; sums and random numbers are worth 96.
        many = "sums" in case or case in ("sgd bf16", "mix gradient", "stochastic levels")
        assert facts.get("reg_used", 0) <= (96 if many else 64), (case, facts)


def test_changing_numbers_compile_nothing(compiled):
    """But for the hold, eps = 1 known on the host, whose kernel leaves the constraint out."""
    assert compiled["compiled"] == {"update_kernel": 2, "quantize_kernel": 1}


def test_few_variants_are_compiled(compiled):
    assert 30 < compiled["variants"] <= MOST_VARIANTS


def test_a_model_is_one_launch(compiled):
    assert compiled["launches"].count("update_kernel") == 1
    assert set(compiled["launches"]) == {
        "store_addresses_kernel", "update_kernel", "reduce_rows_kernel", "reduce_totals_kernel",
    }  # fmt: skip


# ---- what only a GPU can show ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestGpu:
    @pytest.mark.parametrize("case", CONTACT)
    def test_first_contact(self, case):
        CONTACT[case](Runner(on_gpu))

    @pytest.mark.slow
    def test_large_list(self):
        shapes = [(1, 3_000_001), (4096, 1024), (200_000, 32), (512, 4608), (64, 147)]
        problem = Problem(shapes, ["uniform4"] * 5, copy=torch.bfloat16)
        check_step(Runner(on_gpu), problem, "sgd", clamp=True, weight_decay=0.01)

    @pytest.mark.slow
    def test_sums_are_the_same_bits_every_time(self):
        x = torch.randn(3, 1_000_003)
        first = on_gpu("row_sums", [x, 3])[0]
        assert all(torch.equal(on_gpu("row_sums", [x, 3])[0], first) for _ in range(5))

    def test_more_elements_than_32_bits_count(self):
        if torch.cuda.mem_get_info()[0] < 24 << 30:
            pytest.skip("needs 24 GiB")
        from askew_kernels import triton_kernels

        n = 2**31 + 4096
        x = torch.empty(n, dtype=torch.bfloat16, device="cuda").fill_(0.3)
        x[-1] = -1.1
        y = triton_kernels.fake_quantize(x, torch.full((1,), 0.25, device="cuda"), NONE, [1, -8, 7], True, False, 0)
        assert y[0] == 0.25 and y[-1] == -1.0 and y[2**31 - 1] == 0.25 and y[2**31] == 0.25
        assert int((y == 0.25).sum()) == n - 1

    def test_cuda_graph_follows_the_learning_rate(self):
        """lr and eps on the device: a replay uses their present values, and gradients of the graph's own memory."""
        from askew_kernels import triton_kernels

        def cuda(problem):
            for key, value in problem.__dict__.items():
                problem.__dict__[key] = [v.cuda() if isinstance(v, torch.Tensor) else v for v in value]
            return problem

        problem = cuda(Problem([(8, 64), (3, 40)], ["uniform4"] * 2))
        expected = problem.copy()
        name, args = problem.step()
        step = getattr(triton_kernels, name)
        lr, eps = args[10:12]
        args[10:12] = lr.cuda(), eps.cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(*args)  # compiles and uploads
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            args[1] = [g * 1.0 for g in problem.grads]
            step(*args)
        for t, e in zip(problem.params + problem.a, expected.params + expected.a, strict=True):
            t.copy_(e)
        args[10].fill_(0.02)
        graph.replay()
        torch.cuda.synchronize()
        for key, value in expected.__dict__.items():
            expected.__dict__[key] = [v.cpu() if isinstance(v, torch.Tensor) else v for v in value]
        reference.skew_sgd_(*expected.step(lr=0.02)[1])
        for t, e in zip(problem.params, expected.params, strict=True):
            assert_same(t.cpu(), e)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        {"serve": serve, "compile": compile_all, "compile_rare": lambda: compile_all(rare=True)}[sys.argv[1]]()
