"""Contract: one row of x, where sums of inputs are looked up (1 bit; 2 bits from 512 outputs on, trits from 64).

Inputs and scales are small integers and powers of two, so that float32 holds every sum, in whatever order it is made:
the product is the float64 one, to the bit, on each instruction set. Groups of trits end at every column of a byte.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import same_bits

import askew_kernels as ak
from askew_kernels import ops, runtime
from askew_kernels.quant import Binary, Ternary, Uniform, code_bits, pack_codes, unpack_codes

FORMATS = [(Binary(), False), (Uniform(2), False), (Ternary(), False), (Ternary(), True)]
# (columns of a group, groups; 0: one scale): words of 16, 20 and 32 columns, lines of 16 words, blocks of 16 groups
GROUPS = ((1, 40), (2, 33), (3, 7), (5, 20), (7, 30), (8, 50), (12, 9), (19, 17), (20, 18), (21, 35), (32, 70), (33, 4),
          (64, 10), (100, 4), (128, 32), (129, 3), (330, 2), (421, 1), (333, 0))  # fmt: skip


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instructions(request):
    if runtime._C is None:
        pytest.skip("nothing is compiled")
    before = runtime.cpu_capability()
    try:
        runtime.force_cpu_capability(request.param)
    except ValueError:
        pytest.skip(f"needs {request.param}")
    yield request.param
    runtime.force_cpu_capability(before)


def case(grid, trits, n, length, groups, generator):
    """x, codes, scales and the weight in float64."""
    cols = length * max(groups, 1)
    x = torch.randint(-8, 9, (1, cols), generator=generator).float()
    s = 2.0 ** torch.randint(-1, 2, (max(1, n * groups),), generator=generator)
    index = torch.randint(0, len(grid.levels), (n, cols), generator=generator, dtype=torch.uint8)
    level = torch.tensor(grid.levels).double()[index.long()].reshape(s.numel(), -1)
    return x, pack_codes(index, code_bits(grid, trits)), s, (s.double()[:, None] * level).reshape(n, cols)


@pytest.mark.parametrize(("grid", "trits"), FORMATS)
def test_the_float64_product(grid, trits, instructions, generator):
    for i, (length, groups) in enumerate(GROUPS):
        n = (512 if i % 3 else 64) + (5, 18, 48, 64)[i % 4]  # of 64 rows that share a table: 5, 18, 48 and all
        x, codes, s, weight = case(grid, trits, n, length, groups, generator)
        bias = torch.randint(-9, 9, (n,), generator=generator).float()
        y = ops.packed_linear(x, codes, s, grid, code_bits(grid, trits), bias)
        assert torch.equal(y.double(), x.double() @ weight.t() + bias.double()), (length, groups)
        for row in (0, n - 1):  # as a weight of its own, which is too small for tables
            scale = s if s.numel() == 1 else s[row * groups : (row + 1) * groups]
            alone = ops.packed_linear(x, codes[row : row + 1], scale, grid, code_bits(grid, trits), bias[row : row + 1])
            assert same_bits(alone, y[:, row : row + 1])


def test_bytes_that_no_trits_have_count_as_the_highest(instructions):
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)[:, None].repeat(1, 16).contiguous()
    x, digits = torch.arange(80.0)[None], torch.arange(256).clamp(max=242)[:, None] // 3 ** torch.arange(5) % 3
    for groups in (1, 2, 5, 10):
        s = torch.ones(512 * groups)
        y = ops.packed_linear(x, codes, s, Ternary(), 0, None)
        assert same_bits(y, ops.packed_linear(x, codes.clamp(max=242), s, Ternary(), 0, None))
        weight = ops.packed_dequantize(codes, s, Ternary(), 0, 80)
        assert torch.equal(weight, (digits - 1).float().repeat(2, 16))


@pytest.mark.parametrize(
    ("grid", "trits"),
    [(Ternary(), True), (Ternary(), False), *((Uniform(k, narrow=True), False) for k in (3, 4, 5, 6, 8))],
)
def test_codes_without_a_level_count_as_the_highest(grid, trits, instructions, generator):
    """Whatever bytes the codes are: one row of x and several, each kind of activations."""
    bits, cols = code_bits(grid, trits), 160
    raw = torch.randint(0, 256, (80, cols // 5 if trits else cols * bits // 8), generator=generator).byte()
    index = unpack_codes(raw.clamp(max=242) if trits else raw, bits, cols).clamp(max=len(grid.levels) - 1)
    for groups in (1, 4, 5):
        s = torch.rand(80 * groups, generator=generator) + 0.1
        for batch in (1, 2, 4, 7, 20):
            x = torch.randn(batch, cols, generator=generator)
            for kind in ("float", "bf16", "int8"):
                y = ops.packed_linear(x, raw, s, grid, bits, None, kind)
                assert same_bits(y, ops.packed_linear(x, pack_codes(index, bits), s, grid, bits, None, kind)), kind


GUARDED = """
import ctypes, itertools, mmap, sys
import torch
from askew_kernels import ops, runtime
from askew_kernels.quant import Ternary, Uniform, code_bits
page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)

def guarded(pages):
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    return torch.frombuffer(memory, dtype=torch.uint8)[: pages * page]

held, scales = guarded(8), guarded(1).view(torch.float32).fill_(1)
for name, bf16 in (("baseline", True), ("avx2", True), ("avx512", False), ("avx512", True)):
    try:
        runtime._C.force_cpu_capability(name, bf16=bf16)
    except ValueError:
        continue
    for k, cols, groups in itertools.product(range(9), (40, 104, 160, 205), (1, 5)):
        if cols % groups == 0:
            grid = Uniform(k) if k > 1 else Ternary()
            bits = k if k > 1 else code_bits(grid, k == 0)
            width = -(-cols // 5) if bits == 0 else -(-cols * bits // 8)
            n = 70
            codes, scale = held[held.numel() - n * width :].view(n, width), scales[scales.numel() - n * groups :]
            for batch, kind in itertools.product((1, 2, 4, 20), ("float", "bf16", "int8")):
                ops.packed_linear(torch.randn(batch, cols), codes, scale, grid, bits, None, kind)
            ops.packed_dequantize(codes, scale, grid, bits, cols)
print("done", flush=True)
"""


def test_nothing_is_read_behind_the_codes():
    """Codes and scales end where a page begins that must not be read."""
    if runtime._C is None or sys.platform != "linux":
        pytest.skip("needs the compiled library and mprotect")
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(ak.__file__).parent.parent)})  # fmt: skip
    assert done.stdout == "done\n", (done.returncode, done.stderr)
