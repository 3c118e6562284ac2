"""Contract: on the device that they run on, the dispatched operators compute what the reference says on the CPU.

The same tests on the CPU (so that they are known to be sound) and, marked ``gpu``, on a GPU with whatever serves it
there (CUDA kernels, else Triton). What the kernels owe in detail is tested without a GPU: test_ops, test_cuda_emulated,
test_triton.
"""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import NF4, same_values
from torch import nn

import askew_kernels as ak
from askew_kernels import ops, reference, runtime
from askew_kernels.quant import FP4, Binary, Codebook, Ternary, Uniform, code_bits, pack_weight

GRIDS = {"int4": Uniform(4), "binary": Binary(), "ternary": Ternary(), "nf4": Codebook(NF4)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 129), (64, 32), (5, 1040), (2, 20001)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def problem(shape, dtype, grid, generator):
    scale = torch.rand(shape[0], generator=generator) * 0.5 + 0.1
    w = (torch.randn(shape, generator=generator) * scale[:, None] * 0.7 * grid.levels[-1]).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    return w, scale, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRIDS)
def test_elementwise(device, name, dtype, generator):
    grid = GRIDS[name]
    for shape in SHAPES:
        w, scale, grad = problem(shape, dtype, grid, generator)
        leaf = w.to(device).requires_grad_()
        y = ops.fake_quantize(leaf, scale.to(device), grid)
        y.backward(grad.to(device))
        levels = grid.levels_tensor("cpu")
        assert same_values(y.detach().cpu(), reference.fake_quantize(w, scale, levels, grid.encoding, True, False, 0))
        assert same_values(leaf.grad.cpu(), reference.fake_quantize_backward(grad, w, scale, levels, grid.encoding))
        moved, expected = w.to(device), w.clone()
        ops.project_interval_(moved, scale.to(device), grid, 0.3)
        reference.project_interval_(expected, scale, levels, grid.encoding, torch.tensor(0.3))
        torch.testing.assert_close(moved.cpu(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        sums = ops.row_sums(w.to(device), shape[0]).cpu()
        torch.testing.assert_close(sums, reference.row_sums(w, shape[0]), rtol=2e-5, atol=0)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("name", GRIDS)
def test_steps(device, name, rule, generator):
    """Three steps of an optimizer on the device, and of the reference."""
    grid = GRIDS[name]
    weights = [problem(shape, torch.float32, grid, generator)[0] for shape in SHAPES]
    grads = [torch.randn(shape, generator=generator) for shape in SHAPES]

    def run(where, backend):
        params = [nn.Parameter(w.to(where)) for w in weights]
        group = {"params": params, "grid": grid, "scale": "absmax"}
        if rule == "sgd":
            optimizer = ak.optim.ASkewSGD([group], lr=0.01, momentum=0.9, constraint_eps=0.3)
        else:
            optimizer = ak.optim.ASkewAdamW([group], lr=0.01, constraint_eps=0.3)
        with runtime.use_backend(backend) if backend else torch.enable_grad():
            for _ in range(3):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.to(where)
                optimizer.step()
        return [p.detach().cpu() for p in params]

    for got, expected in zip(run(device, ""), run("cpu", "reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_mixture(device, learned, generator):
    grids = (Uniform(2), Uniform(4), Binary(), None)
    for shape in SHAPES:
        for dtype in DTYPES:
            w, _, grad = problem(shape, dtype, Uniform(4), generator)
            scales = torch.rand(4, shape[0], generator=generator) + 0.05
            strengths = torch.softmax(torch.randn(4, generator=generator), 0)
            codes = ops.candidate_encodings(grids)
            arguments = [t.to(device) for t in (w, scales, strengths)]
            y = torch.ops.askew.mix_fake_quantize(*arguments, codes, True, learned)
            assert same_values(y.cpu(), reference.mix_fake_quantize(w, scales, strengths, codes, True, learned))
            got = torch.ops.askew.mix_fake_quantize_backward(grad.to(device), *arguments, codes, True, learned)
            expected = reference.mix_fake_quantize_backward(grad, w, scales, strengths, codes, True, learned)
            assert same_values(got[0].cpu(), expected[0])
            # |s q| is at most 8.4, |x| less on average; sums of at most 145 roundings (test_cuda_emulated): 8.6e-6
            size = 8.4 * float(grad.float().abs().sum())
            torch.testing.assert_close(got[1].cpu(), expected[1], rtol=0, atol=8.7e-6 * size)
            torch.testing.assert_close(got[2].cpu(), expected[2], rtol=0, atol=8.7e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRIDS)
def test_packed_weights(device, name, dtype, generator):
    grid = GRIDS[name]
    for n, cols, groups in ((3, 7, 1), (40, 256, 2), (64, 96, 3), (5, 1040, 1)):
        w, scale, _ = problem((n * groups, cols // groups), torch.float32, grid, generator)
        bits = code_bits(grid)
        codes = pack_weight(w.reshape(n, cols), scale, grid)
        levels = grid.levels_tensor("cpu")
        weight = reference.packed_weight(codes, scale, levels, grid.encoding, bits, cols, dtype)
        on = codes.to(device), scale.to(device)
        assert same_values(ops.packed_dequantize(*on, grid, bits, cols, dtype).cpu(), weight)
        exact = reference.packed_weight(
            codes, scale.double(), levels.double(), grid.encoding, bits, cols, torch.float64
        )
        for rows in (1, 6, 33):
            x, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((rows, cols), (n,)))
            y = ops.packed_linear(x.to(device), *on, grid, bits, bias.to(device)).cpu()
            want = x.double() @ exact.t() + bias.double()
            size = x.double().abs() @ exact.abs().t() + bias.double().abs()
            assert (
                (y.double() - want).abs() <= (cols + 3) * 2.0**-24 * size + torch.finfo(dtype).eps * want.abs()
            ).all()


def test_packed_layers(device, generator):
    """Every number of rows, whatever computes it; a packed model is what it was packed from."""
    torch.manual_seed(0)
    model = ak.quantize_(nn.Sequential(nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, 10)), ak.QuantConfig(Uniform(4)))
    ak.hard_quantize_(model)
    packed = ak.pack_(copy.deepcopy(model)).to(device)
    for rows in (1, 7, 20, 100):
        x = torch.randn(rows, 256, generator=generator)
        with torch.no_grad():
            # two layers of sums of 256 and 96 products in another order: 256 * 2^-24 of sums of magnitudes below 6
            torch.testing.assert_close(packed(x.to(device)).cpu(), model(x), rtol=0, atol=1e-4)


TILED = {**GRIDS, "narrow3": Uniform(3, narrow=True), "int8": Uniform(8), "unsigned8": Uniform(8, signed=False),
         "fp4": FP4()}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TILED)
def test_products_from_tiles(device, name, dtype, generator):
    """Whole and odd columns, groups, one to many tokens, inputs that begin anywhere: as exact as from the codes."""
    grid, packed = TILED[name], ops.packed
    form = packed.tile_form(grid.levels, grid.encoding, dtype)
    levels, bits = grid.levels_tensor("cpu"), code_bits(grid)
    cases = [(33, 256, 1), (40, 1000, 1), (18, 512, 32), (64, 4096, 32), (130, 1152, 9), (9, 133, 1), (512, 2048, 16)]
    for n, cols, groups in cases if device == "cuda" else cases[:3]:
        w, scale, _ = problem((n * groups, cols // groups), torch.float32, grid, generator)
        codes = pack_weight(w.reshape(n, cols), scale, grid)
        exact = reference.packed_weight(
            codes, scale.double(), levels.double(), grid.encoding, bits, cols, torch.float64
        )
        tiles = packed.packed_tiles(codes.to(device), grid.encoding, bits, cols, len(grid.levels), form)
        of_tiles = packed.tile_scales(scale, n, cols).contiguous().to(device)
        bias = torch.randn(n, generator=generator).to(dtype)
        for rows in (1, 3, 8, 9, 16, 33, 70, 130) if device == "cuda" else (1, 9):
            x = torch.randn(rows, cols, generator=generator).to(dtype)
            room = torch.empty(rows * cols + 1, dtype=dtype, device=device)
            placed = room[rows % 2 :][: rows * cols].view(rows, cols).copy_(x)
            y = torch.ops.askew.packed_tiles_linear(
                placed, tiles, of_tiles, levels.to(device), grid.encoding, form, n, groups, bias.to(device)
            ).cpu()
            want = x.double() @ exact.t() + bias.double()
            size = x.double().abs() @ exact.abs().t() + bias.double().abs()
            bound = max(cols + 3, 67) * 2.0**-24 * size + torch.finfo(dtype).eps * want.abs()
            assert ((y.double() - want).abs() <= bound).all(), (n, cols, groups, rows)


@pytest.mark.parametrize("grid", [Uniform(4), Ternary(), Codebook(NF4)])
def test_packed_layers_of_halves(device, grid, generator):
    """Every number of rows in bfloat16, from tiles on a GPU; a captured graph gives the same."""
    torch.manual_seed(0)
    layer = ak.quantize_(nn.Sequential(nn.Linear(512, 96)), ak.QuantConfig(grid))
    packed = ak.pack_(ak.hard_quantize_(layer))[0].bfloat16().to(device)
    weight, bias = packed.dequantize(torch.float32).cpu(), packed.bias.float().cpu()
    with torch.no_grad():
        for rows in (1, 5, 12, 40, 600):
            x = torch.randn(rows, 512, generator=generator).bfloat16()
            y = packed(x.to(device))
            want = nn.functional.linear(x.float(), weight, bias)
            torch.testing.assert_close(y.float().cpu(), want, rtol=0.01, atol=0.01 * float(want.abs().max()))
            if device == "cuda" and rows < 100:
                assert packed.tile_bytes
                static, graph = x.to(device), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = packed(static)
                out.zero_()
                graph.replay()
                assert torch.equal(out, y)


@pytest.mark.parametrize("kind", ["SAM", "ASAM", "AlignedSAM"])
def test_sharpness_aware_steps(device, kind, generator):
    x, y = torch.randn(16, 12, generator=generator), torch.randn(16, 3, generator=generator)

    def run(where, backend):
        torch.manual_seed(1)
        model = ak.quantize_(nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)), ak.QuantConfig(
            Uniform(4), scale="absmax", forward="relaxed")).to(where)  # fmt: skip
        base = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05, momentum=0.9, constraint_eps=0.5)
        optimizer = getattr(ak.optim, kind)(base, rho=0.1, model=model)

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x.to(where)), y.to(where))
            loss.backward()
            return loss

        with runtime.use_backend(backend) if backend else torch.enable_grad():
            for _ in range(3):
                optimizer.step(closure)
        return [p.detach().cpu() for p in model.parameters()]

    for got, expected in zip(run(device, ""), run("cpu", "reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
