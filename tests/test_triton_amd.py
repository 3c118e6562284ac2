"""Contract: the Triton kernels compile for AMD's gfx942 (MI300) and gfx950 (MI350), ahead of time, without a GPU.

Nothing of this has run on such a GPU. What the machine code shows: 64 lanes a wave, no spills, vectors of 8 or 16 bytes
a lane, no multiply-add where the contract has a product and a sum. float8 copies are e4m3fn by their bits (gfx942
itself multiplies another format, e4m3fnuz), so that what is written is the same on every device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from askew_kernels.quant import NF4, Uniform

triton = pytest.importorskip("triton")
amd = pytest.importorskip("triton.backends.amd.compiler", reason="this Triton has no AMD backend")

ARCHS = ("gfx942", "gfx950")
USUAL = {"gfx942": ("quantize", "row sums", "sgd"), "gfx950": ("row sums",)}  # the others are left to `make test-full`
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def cases():
    """{name: launch}, of tensors on the CPU, for nothing is launched."""
    from askew_kernels import triton_kernels as kernels
    from askew_kernels.ops import RULES

    grid, table = Uniform(4), NF4()
    levels, code = grid.levels_tensor("cpu"), grid.encoding
    x, s = torch.zeros(4, 4096), torch.ones(4)
    half, nothing = x.to(BF16), torch.empty(0)
    codes, groups = torch.zeros(4, 2048, dtype=torch.uint8), torch.ones(4 * 32)
    mixture = torch.ones(4, 4), torch.ones(4) / 4, [1, -2, 1, 1, -4, 3, 1, -8, 7, 0, 0, 0]

    def step(rule, copy, eps=0.3):
        numbers = RULES[rule].numbers_of({**RULES[rule].defaults, "weight_decay": 0.01})
        states = [torch.zeros_like(x) for _ in RULES[rule].buffers]
        rates = torch.tensor(1.0), torch.tensor(0.1), torch.tensor(eps), 1.0
        tensors = [x.clone()], [x.clone()], states, [s], [levels], code
        getattr(kernels, RULES[rule].operator)(
            *tensors,
            [torch.zeros_like(x, dtype=copy)],
            [torch.zeros(4, 3)],
            [],
            *rates,
            numbers,
            False,
            True,
            False,
            False,
        )

    return {
        "quantize": lambda: kernels.fake_quantize(x, s, levels, code, True, False, 0),
        "row sums": lambda: kernels.row_sums(x, 4),
        "sgd": lambda: step("sgd", BF16),
        "quantize bf16": lambda: kernels.fake_quantize(half, s, levels, code, True, False, 0),
        "quantize nf4": lambda: kernels.fake_quantize(x, s, table.levels_tensor("cpu"), table.encoding, True, False, 0),
        "quantize stochastic": lambda: kernels.fake_quantize(x, s, levels, code, True, True, 7),
        "quantize to float8": lambda: kernels.fake_quantize_out_(x, s, levels, code, x.to(FP8)),
        "straight-through": lambda: kernels.ste_clip_(x.clone(), x, s, levels, code),
        "project": lambda: kernels.project_interval_(x.clone(), s, levels, code, torch.tensor(0.5)),
        "sgd in hold": lambda: step("sgd", BF16, eps=1.0),
        "sgd, float8 levels": lambda: step("sgd", FP8),
        "adamw": lambda: step("adamw", BF16),
        "lion": lambda: step("lion", BF16),
        "scales": lambda: kernels.scales_from_sums_([s.clone()], [torch.zeros(4, 3)], [1, 0, 9], [3.0, 7.5, 6.9]),
        "scales by error": lambda: kernels.mse_scales(x, torch.ones(4, 3), levels, code, 7.0, 0),
        "token levels float8": lambda: kernels.token_levels(half, nothing, [0, 0, 0], 448.0, FP8),
        "token levels int8": lambda: kernels.token_levels(half, nothing, [1, -127, 127], 127.0, torch.int8),
        "scaled sums": lambda: kernels.scaled_sums(x.int(), s, torch.ones(4096), torch.ones(4096, dtype=BF16), BF16),
        "stochastic levels": lambda: kernels.stochastic_levels(half, torch.ones(4096), torch.tensor(1)),
        "luq": lambda: kernels.luq(half, 4, torch.tensor(1)),
        "mix": lambda: kernels.mix_fake_quantize(x, *mixture, True, False),
        "mix gradient": lambda: kernels.mix_fake_quantize_backward(x, x, *mixture, True, False),
        "sam norm": lambda: kernels.sam_norm([x], [x], [1], 0.01),
        "sam perturb": lambda: kernels.sam_perturb_([x.clone()], [x], [x.clone()], torch.zeros(2), [1], 0.01),
        "sam average": lambda: kernels.sam_average_([x.clone()], [x.clone()], torch.zeros(2)),
        "packed dequantize": lambda: kernels.packed_dequantize_(codes, s, levels, code, 4, half.clone()),
        "packed few": lambda: kernels.packed_linear(half[:1], codes, groups, levels, code, 4, None),
        "packed many": lambda: kernels.packed_linear(half.repeat(16, 1), codes, groups, levels, code, 4, None),
    }  # fmt: skip


def facts(code):
    """What the text of the machine code says of a kernel."""
    told = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size", "wavefront_size")
    found = {name: int(re.search(rf"\.{name}:\s*(\d+)", code)[1]) for name in told}
    names = re.findall(r"^\s+((?:v|buffer|global)_\w+)", code, re.M)
    found["vectors"] = sum(bool(re.search("dwordx[24]", name)) for name in names)
    found["divisions"] = sum(name.startswith("v_div_fixup_f32") for name in names)
    found["reciprocals"] = sum(name.startswith("v_rcp_f32") for name in names)
    # a division is made of some; outside of one they would round once where the contract rounds twice
    found["fused"] = sum(bool(re.match(r"v_(pk_)?(fma|fmac|mad|mac)_f32", name)) for name in names)
    return found


def worker(arch, rare):
    """Compiles for one architecture and prints the facts as JSON."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Target:
        """As much of a driver as a launch asks for before it would launch."""

        def get_current_target(self):
            return GPUTarget("hip", arch, 64)

        def get_current_device(self):
            return arch

        def get_current_stream(self, _device):
            return 0

    launched = []
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return launched[-1]

    JITFunction.run = only_compile
    driver.set_active(Target())
    report = {}
    for name, launch in cases().items():
        if (name in USUAL[arch]) != rare:
            del launched[:]
            launch()
            report[name] = [facts(kernel.asm["amdgcn"]) for kernel in launched]
    print(json.dumps(report))


def compiled(arch, rare, folder):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(here.parent), str(here), os.environ.get("PYTHONPATH")))
    )
    command = [sys.executable, "-c", f"import test_triton_amd; test_triton_amd.worker({arch!r}, {rare})"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(report):
    assert report
    for name, kernels in report.items():
        assert kernels, f"{name}: nothing was compiled"
        for found in kernels:
            assert found["wavefront_size"] == 64, (name, found)
            spilled = found["vgpr_spill_count"], found["sgpr_spill_count"], found["private_segment_fixed_size"]
            assert spilled == (0, 0, 0), (name, found)
            if name.startswith(("row sums", "sam average", "straight-through")):  # of no division
                assert found["fused"] == 0 or found["divisions"], (name, found)
        if not name.startswith(("packed", "scales")):
            assert any(found["vectors"] for found in kernels), (name, kernels)


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_for_waves_of_64_without_spills(arch, tmp_path):
    check(compiled(arch, False, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles(arch, tmp_path):
    check(compiled(arch, True, tmp_path))


def test_facts_are_read_from_machine_code():
    code = """
      v_rcp_f32_e32 v1, v2
      v_fma_f32 v1, v2, v3, v4
      v_div_fixup_f32 v1, v2, v3, v4
      v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
      global_load_dwordx4 v[0:3], v4, s[0:1]
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 0
    .vgpr_spill_count: 3
    .wavefront_size: 64
    """
    found = facts(code)
    assert found["fused"] == 2 and found["vectors"] == 1 and found["divisions"] == found["reciprocals"] == 1
    with pytest.raises(AssertionError, match="quantize"):
        check({"quantize": [found]})
