"""Contract: ``askew::mix_fake_quantize`` mixes its candidates' quantizations, and its backward is their gradients.

1. The value is sum_k p_k s_k Q_k(x / s_k) of ``fake_quantize`` on every backend, instruction set and thread count (the
   same bits on the CPU), for every candidate grid, storage type, granularity and odd shape.
2. The gradients equal autograd's through an eager transcription in float64: straight-through for x, exact for the
   strengths, LSQ for learned scales.
3. Bad arguments are named. (Schema, fake kernel and autograd registration: ``opcheck`` in test_ops.py.)
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import DTYPES, EPSILON, same_values

import askew_kernels as ak
from askew_kernels import ops, reference, runtime
from askew_kernels.quant import Binary, Ternary, Uniform

CANDIDATES = {
    "weights": (Uniform(2), Uniform(3), Uniform(4), Uniform(8)),
    "activations": (Uniform(4, signed=False), Uniform(8, signed=False), None),
    "low": (Binary(), Ternary(), Uniform(2, narrow=True)),
    "one": (Uniform(4),),
    "float": (None,),
    "eight": (Binary(), *(Uniform(b) for b in range(2, 8)), None),
}
SHAPES = [(1, 1), (3, 7), (4, 129), (5, 1040), (2, 40001), (64, 600)]


def problem(name, shape, dtype, generator):
    grids = CANDIDATES[name]
    x = torch.randn(shape, generator=generator)
    rows = shape[0]
    scales = torch.stack(
        [torch.rand(rows, generator=generator) * 0.5 + 2.0 / max(1.0, 1.0 if g is None else g.c_max) for g in grids]
    )
    strengths = torch.softmax(torch.randn(len(grids), generator=generator), 0)
    grad = torch.randn(shape, generator=generator)
    return x.to(dtype), scales, strengths, grids, grad.to(dtype)


def transcription(x, scales, strengths, grids, learned):
    """The sum in float64 from levels that are given (rounding is checked by ``fake_quantize``'s own tests), with
    autograd's gradients where it has them."""
    rows = scales.shape[1]
    matrix = x.reshape(rows, -1)
    total = torch.zeros_like(matrix)
    for k, grid in enumerate(grids):
        if grid is None:
            total = total + strengths[k] * matrix
            continue
        s = scales[k][:, None]
        lo, hi = grid.levels[0], grid.levels[-1]
        exact = matrix.detach().float() / s.detach().float()
        level = (ops.fake_quantize(exact, torch.ones(1), grid)).double()
        with torch.no_grad():
            f = s.detach().float()
            ends = [(f * c).to(torch.float32).double() for c in (lo, hi)]
            inside = (matrix >= ends[0]) & (matrix <= ends[1])
        if learned:  # LSQ: the gradient of s (clamp(x/s) + constant), scaled
            gain = 1 / math.sqrt(matrix.shape[1] * grid.c_max)
            scaled = s * gain + (s * (1 - gain)).detach()
            placed = torch.where(inside, matrix / scaled, level)
            quantized = scaled * (placed + (level - placed).detach())
        else:
            placed = torch.where(inside, matrix / s.detach(), level)
            quantized = s.detach() * (placed + (level - placed).detach())
        total = total + strengths[k] * quantized
    return total.reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CANDIDATES)
def test_value_is_the_sum_of_its_candidates(backend, name, dtype, generator):
    for shape in SHAPES:
        x, scales, strengths, grids, _ = problem(name, shape, dtype, generator)
        y = ops.mix_fake_quantize(x, scales, strengths, grids)
        wide = x.float()
        parts = [wide if g is None else ops.fake_quantize(wide, s, g) for g, s in zip(grids, scales, strict=True)]
        expected = strengths[0] * parts[0]
        for p, part in zip(strengths[1:], parts[1:], strict=True):
            expected = expected + p * part
        assert same_values(y, expected.to(dtype)), shape
        assert y.shape == x.shape and y.is_contiguous()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", CANDIDATES)
def test_gradients_are_those_of_the_transcription(backend, name, learned, generator):
    for shape in SHAPES:
        x, scales, strengths, grids, grad = problem(name, shape, torch.float32, generator)
        leaves = [t.clone().requires_grad_() for t in (x, scales, strengths)]
        y = ops.mix_fake_quantize(leaves[0], leaves[1], leaves[2], grids, learned=learned)
        y.backward(grad)
        exact = [t.double().clone().requires_grad_() for t in (x, scales, strengths)]
        transcription(*exact, grids, learned).backward(grad.double())
        n = x.numel() / scales.shape[1]
        # x: a product of rounded sums of at most 8 strengths
        torch.testing.assert_close(leaves[0].grad.double(), exact[0].grad, rtol=1e-6, atol=1e-6)
        # sums of float32 products: each rounded once or twice, then 512-column sums of 16 float lanes
        size = sum(float(grad.abs().double().sum()) * float((s * (g.c_max + 1 if g else 4)).max())
                   for s, g in zip(scales, grids, strict=True))  # fmt: skip
        torch.testing.assert_close(leaves[2].grad.double(), exact[2].grad, rtol=1e-5, atol=40 * EPSILON[x.dtype] * size)
        if learned and any(g is not None for g in grids):
            bound = 64 * EPSILON[x.dtype] * math.sqrt(n) * 4
            torch.testing.assert_close(leaves[1].grad.double(), exact[1].grad, rtol=1e-4, atol=bound)
        else:
            assert leaves[1].grad is None or not leaves[1].grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [True, False])
def test_backends_agree_on_every_gradient(dtype, clip, generator):
    if runtime._C is None:
        pytest.skip("nothing is compiled")
    for name in ("weights", "eight"):
        for shape in SHAPES:
            x, scales, strengths, grids, grad = problem(name, shape, dtype, generator)
            arguments = (grad, x, scales, strengths, ops.candidate_encodings(grids), clip, True)
            ours = torch.ops.askew.mix_fake_quantize_backward(*arguments)
            theirs = reference.mix_fake_quantize_backward(*arguments)
            assert same_values(ours[0], theirs[0])
            for a, b in zip(ours[1:], theirs[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-4 * math.sqrt(x.numel()))


def test_same_bits_for_every_thread_count_and_instruction_set(generator):
    if runtime._C is None:
        pytest.skip("nothing is compiled")
    x, scales, strengths, grids, grad = problem("weights", (3, 70001), torch.float32, generator)
    arguments = (x, scales, strengths, ops.candidate_encodings(grids), True, True)
    run = lambda: (torch.ops.askew.mix_fake_quantize(*arguments),  # noqa: E731
                   *torch.ops.askew.mix_fake_quantize_backward(grad, *arguments))  # fmt: skip
    before, threads = runtime.cpu_capability(), torch.get_num_threads()
    kinds = ["baseline", "avx2", "avx512"]
    kinds = kinds[: kinds.index(runtime._C.best_cpu_capability()) + 1]
    try:
        found = []
        for kind in kinds:
            runtime.force_cpu_capability(kind)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(run())
    finally:
        runtime.force_cpu_capability(before)
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_special_values(backend):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, 0.5]])
    scales, strengths = torch.tensor([[0.5], [1.0]]), torch.tensor([0.25, 0.75])
    y = ops.mix_fake_quantize(x, scales, strengths, (Uniform(2), None))
    assert y[0, 0].isnan() and y[0, 1] == math.inf and y[0, 2] == -math.inf
    assert y[0, 3:5].tolist() == [0.0, 0.0] and y[0, 6] == 0.25 * 0.5 + 0.75 * 0.5
    both = ops.mix_fake_quantize(x, scales, strengths, (Uniform(2), Binary()))
    assert both[0, 1:3].tolist() == [0.25 * 0.5 + 0.75, -0.25 * 1.0 - 0.75]
    leaf = x.clone().requires_grad_()
    ops.mix_fake_quantize(leaf, scales, strengths, (Uniform(2), Binary())).backward(torch.ones_like(x))
    assert leaf.grad[0].tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]  # inside both hulls, or neither
    empty = torch.empty(3, 0, requires_grad=True)
    strengths = strengths.requires_grad_()
    out = ops.mix_fake_quantize(empty, torch.ones(2, 3), strengths, (Uniform(2), Binary()))
    out.sum().backward()
    assert out.shape == (3, 0) and not strengths.grad.any()


def test_layouts_and_granularities(generator):
    x = torch.randn(4, 6, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    strengths = torch.tensor([0.5, 0.5])
    for rows in (1, 4, 8):
        scales = torch.rand(2, rows, generator=generator) + 0.5
        y = ops.mix_fake_quantize(x, scales, strengths, (Uniform(2), Uniform(4)))
        plain = x.contiguous()
        parts = [ops.fake_quantize(plain, s, g) for s, g in zip(scales, (Uniform(2), Uniform(4)), strict=True)]
        assert torch.equal(y, 0.5 * parts[0] + 0.5 * parts[1])


def test_float64_runs_on_the_reference_and_passes_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    scales = torch.rand(2, 3, dtype=torch.float64) + 0.5
    strengths = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(  # smooth in the strengths
        lambda p: ops.mix_fake_quantize(x, scales, p, (Uniform(2), Uniform(4))), (strengths,)
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"grids": ()}, ValueError, "grids: expected 1 to 8 candidates, got 0"),
        ({"grids": (Uniform(2),) * 9}, ValueError, "got 9"),
        (
            {"grids": (Uniform(2), ak.quant.Codebook([0.0, 1.0]))},
            ValueError,
            "grids: expected Uniform, Ternary, Binary",
        ),
        ({"grids": (Uniform(2), 4)}, TypeError, "grid: expected a grid"),
        ({"strengths": torch.ones(3)}, ValueError, "strengths: expected shape .2,., got .3,."),
        ({"strengths": [0.5, 0.5]}, TypeError, "strengths: expected a float tensor"),
        ({"scales": torch.ones(2)}, ValueError, "scales: expected shape .2, rows., got .2,."),
        ({"scales": torch.ones(2, 3)}, ValueError, "scales.0.: expected shape"),
        ({"scales": torch.tensor([[1.0], [-1.0]])}, ValueError, "scales.1.: expected positive finite"),
        ({"x": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "x: expected float32"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    arguments = {"x": torch.randn(4, 6), "scales": torch.ones(2, 1), "strengths": torch.ones(2) / 2,
                 "grids": (Uniform(2), Uniform(4))}  # fmt: skip
    with pytest.raises(error, match=match):
        ops.mix_fake_quantize(**{**arguments, **change})
