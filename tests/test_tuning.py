"""The contract of launch parameters (``askew_kernels.tuning``, ``bench tune``):

* whatever they are, every result has the same bits, sums included, but for float products of packed weights, which have
  the same sums in another order;
* a table is taken for the device that it was made for, else the built-in values; by hand one overrules both;
* a bad table is one line that names the file and the key, and changes nothing;
* what ``bench tune`` writes can be read back, and a value that changed bits would be refused.

(The C++ CUDA kernels' parameter is in test_cuda_emulated.py.) No timing is asserted.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import askew_kernels as ak
from askew_kernels import __main__ as cli
from askew_kernels import ops, quant, runtime, tuning
from askew_kernels.bench import tune

ROOT = Path(__file__).parent.parent
GRID = quant.Uniform(bits=4)
compiled = pytest.mark.skipif(runtime._C is None, reason="nothing is compiled")


@pytest.fixture(autouse=True)
def restored():
    with runtime.kept_tuning():
        runtime.use_tuning("default")
        yield


def every_operator(shape, dtype=torch.float32, update=True):
    """All that the operators write for one matrix: outputs, copies, states, sums."""
    g = torch.Generator().manual_seed(shape[1])
    x, other = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    s = torch.rand(shape[0], generator=g) * 0.2 + 0.1
    results = [
        ops.fake_quantize(x, s, GRID), ops.fake_quantize(x, s, GRID, stochastic=True, seed=3),
        ops.row_sums(x, shape[0]),
        ops.fake_quantize_out_(x, s, GRID, torch.empty(shape, dtype=torch.bfloat16)),
        ops.ste_clip_(other.clone(), x, s, GRID), ops.project_interval_(x.clone(), s, GRID, 0.3),
        ops.sam_norm([x], [other], adaptive=True),
    ]  # fmt: skip
    if update:
        w, m, copy = x.clone(), torch.zeros_like(x), torch.empty_like(x)
        stats = ops.SkewStats.empty_for([x], [s])
        ops.skew_sgd_([w], [other], [m], [s], [GRID], lr=0.1, eps=0.3, momentum=0.9, dequantized=[copy], stats=stats)
        results += [w, m, copy, *stats.row_sums, *stats.totals]
    w, kept = x.clone(), torch.empty_like(x)
    ops.sam_perturb_([w], [other], [kept], torch.tensor([0.1, 0.01]), adaptive=True)
    perturbed = w.clone()
    ops.sam_restore_([w], [kept])
    mean = other.clone()
    ops.sam_average_([mean], [x], torch.tensor([0.1, 0.01]))
    return [*results, perturbed, kept, w, mean]


def same_bits(a, b):
    return all(torch.equal(*(t.reshape(-1).view(torch.uint8) for t in pair)) for pair in zip(a, b, strict=True))


ODD = [
    {"prefetch_columns": 0}, {"prefetch_columns": 65536}, {"piece_columns": 16}, {"piece_columns": 1001},
    {"piece_columns": 1 << 30}, {"serial_elements": 0}, {"serial_elements": 1 << 40}, {"streaming_bytes": 0},
    {"streaming_bytes": tuning.NEVER}, {"pooled_bytes": 1}, {"pooled_bytes": tuning.NEVER},
    {"prefetch_columns": 77, "piece_columns": 48, "serial_elements": 1, "streaming_bytes": 1, "pooled_bytes": 3},
]  # fmt: skip


@compiled
@pytest.mark.parametrize("shape", [(3, 70_001), (130, 513), (1, 300_000)], ids=str)
def test_cpu_parameters_change_no_bits(shape):
    with runtime.use_backend("cpp"):
        for dtype in (torch.float32, torch.bfloat16):
            expected = every_operator(shape, dtype)
            for values in ODD:
                runtime.use_tuning({"cpu": values})
                assert runtime._C.tuning() | values == runtime._C.tuning()  # they did arrive
                assert same_bits(every_operator(shape, dtype), expected), values
            runtime.use_tuning("default")


PRODUCTS = [
    {"panel_inputs": 1}, {"panel_inputs": tuning.NEVER}, {"panel_inputs": tuning.NEVER, "library_inputs": 1},
    {"panel_inputs": tuning.NEVER, "library_inputs": tuning.NEVER}, {"pair_inputs": 1}, {"pair_inputs": tuning.NEVER},
    {"panel_inputs": tuning.NEVER, "bit_table_inputs": 0, "table_inputs": 0},
    {"panel_inputs": tuning.NEVER, "bit_table_inputs": tuning.NEVER, "table_inputs": 1 << 30, "table_rows": 0,
     "trit_table_rows": 0},
    {"trit_table_rows": tuning.NEVER}, {"shared_blocks": 1}, {"shared_blocks": 1 << 30}, {"shared_bytes": 0},
    {"shared_blocks": 1, "shared_bytes": tuning.NEVER},
]  # fmt: skip


@compiled
@pytest.mark.parametrize("trits", [False, True], ids=["", "trits"])
@pytest.mark.parametrize("grid", [quant.Binary(), quant.Ternary(), quant.Uniform(4), quant.NF4()], ids=str)
def test_where_products_change_over_is_no_matter_of_correctness(grid, trits):
    """Of float32 inputs within the bound of any order of the sum, of bfloat16 ones and one more rounding; int8
    products are the same bits."""
    if trits and grid != quant.Ternary():
        pytest.skip("five codes a byte are ternary")
    torch.manual_seed(3)
    model = ak.quantize_(torch.nn.Sequential(torch.nn.Linear(320, 80)), ak.QuantConfig(grid))
    packed = ak.pack_(model, force=True, trits=trits)[0]
    w, kinds = packed.dequantize().double().t(), set()
    for count in (1, 2, 3, 9, 33, 140):
        x = torch.randn(count, 320)
        packed.activations, eighths = "int8", None
        for values in ({}, *PRODUCTS):
            runtime.use_tuning({"cpu_packed": values})
            assert runtime._C.tuning() | values == runtime._C.tuning()
            for dtype in (torch.float32, torch.bfloat16):
                packed.activations = "float"
                given = x.to(dtype)
                y, exact = packed(given), given.double() @ w + packed.bias.detach().double()
                bound = 324 * 2.0**-24 * (given.double().abs() @ w.abs() + 1)
                bound = bound + (2.0**-8 * exact.abs() if dtype == torch.bfloat16 else 0)
                assert ((y.double() - exact).abs() <= bound).all(), (count, values, dtype)
                kinds.add((count, dtype, y.detach().view(torch.uint8).numpy().tobytes()))
            if not isinstance(grid, quant.NF4):
                packed.activations = "int8"
                y = packed(x).detach()
                eighths = y if eighths is None else eighths
                assert torch.equal(y, eighths), (count, values)
    if runtime.cpu_capability() == "avx512":  # the values chose kernels, whose sums are not in one order
        assert len(kinds) > 12


def test_where_convolutions_change_over():
    runtime.use_tuning({"cpu_convolution": {"positions": 7, "large_positions": 9, "points": 11}})
    from_codes, large = runtime.convolves_from_codes, tuning.LARGE
    assert from_codes(6, "float") and not from_codes(7, "float", large - 1) and from_codes(10**6, "int8")
    assert from_codes(8, "float", large) and not from_codes(9, "float", large)
    assert from_codes(10, "float", large, points=True) and not from_codes(11, "float", points=True)
    runtime.use_tuning("default")
    assert from_codes(15, "float") and not from_codes(16, "float")


TRITON = """
import torch
from test_tuning import every_operator, same_bits
from askew_kernels import runtime
from askew_kernels.triton_kernels.launch import block_and_warps
runtime.set_backend("triton")
for shape in ((3, 129), (2, 64), (1, 257)):
    expected = every_operator(shape, update=False)  # the update has no such parameters
    for block, warps in ((64, 1), (4096, 16)):
        runtime.use_tuning({"triton": {"block": block, "warps": warps}})
        assert block_and_warps(torch.zeros(1)) == (block, warps)
        assert same_bits(every_operator(shape, update=False), expected), (shape, block)
    runtime.use_tuning("default")
print("the same bits")
"""

PACKED = """
import itertools
import torch
from askew_kernels import ops, reference, runtime, tuning
from askew_kernels.bench import tune
runtime.set_backend("triton")
g = torch.Generator().manual_seed(0)
small = lambda section, name, quick: {str(c): tune.packed_product(c, 20, 256, 128)
                                      for c in (3, 20) if (c <= 8) == name.startswith("few")}
tune.passes = small
for name, candidates in tune.trials("triton_packed"):
    tune.check_bits("triton_packed", name, candidates[::9], small("", name, True), torch.device("cpu"))
    print(name, len(candidates))
tune.trials = lambda section, trials=tune.trials: ((n, c[::9][:2]) for n, c in trials(section))
tune.in_turns = lambda section, candidates, judged, *rest: ([1.0, 0.5], [[1.0], [0.5]])
best, found = tune.measure("triton_packed", torch.device("cpu"), True)
assert set(best) == set(tuning.PARAMETERS["triton_packed"]) and len(found) == 4, best
codes = torch.randint(0, 256, (37, 80), generator=g, dtype=torch.uint8)
grid, scale = tune.GRID, torch.rand(37 * 5, generator=g)
w = reference.packed_weight(codes, scale.double(), torch.empty(0).double(), grid.encoding, 4, 160, torch.float64).t()
for few, tile in itertools.product(((1, 32, 1), (16, 256, 8)), ((16, 16, 1), (128, 128, 8))):
    values = dict(zip(tuning.PARAMETERS["triton_packed"], (*few, *tile)))
    runtime.use_tuning({"triton_packed": values})
    assert tuning.on_gpu("triton_packed", None) == values
    for batch in (1, 7, 33):
        x = torch.randn(batch, 160, generator=g)
        y, bound = ops.packed_linear(x, codes, scale, grid, 4).double(), 164 * 2.0**-24 * (x.double().abs() @ w.abs())
        assert ((y - x.double() @ w).abs() <= bound).all(), values  # as of every product (test_triton)
print("the same sums")
"""


def python(*arguments, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=100, env=env, cwd=ROOT)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_parameters_change_no_bits():
    done = python("-c", TRITON, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "the same bits", done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_packed_parameters_change_no_more_than_the_order_of_sums():
    """Also all that ``bench tune`` does on a GPU for them, with Triton's interpreter."""
    done = python("-c", PACKED, TRITON_INTERPRET="1")
    lines = done.stdout.splitlines()
    assert lines and lines[-1] == "the same sums", done.stderr
    assert lines[:2] == ["few_rows and few_words and few_warps 27", "tile_rows and tile_columns and tile_warps 18"]


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(name, cores, device="EPYC", capability="avx2", kind="cpu"):
    return tuning.Table(name, tuning.Device(kind, device, capability, cores), {})


def test_the_table_of_the_device_is_chosen():
    tables = [table("a", 2), table("b", 8), table("c", 8, "Xeon"), table("d", 8, capability="avx512")]
    chosen = lambda *device: tuning.choose(tuning.Device("cpu", *device), tables)  # noqa: E731
    assert chosen("EPYC", "avx2", 8)[0].name == "b" and chosen("EPYC", "avx2", 3)[0].name == "a"
    assert chosen("Xeon", "avx2", 1)[0].name == "c" and chosen("EPYC", "avx512", 8)[0].name == "d"
    nothing, why = chosen("Xeon", "avx512", 8)
    assert nothing is None and why == "no table for Xeon, avx512, 8 cores"
    assert tuning.choose(tuning.Device("cuda", "EPYC", "avx2"), tables)[0] is None


@compiled
def test_a_shipped_table_is_used_for_its_device_alone(tmp_path, monkeypatch):
    here = runtime.tuning_device()
    made = {"device": vars(here), "parameters": {"cpu": {"piece_columns": 4096}}}
    (tmp_path / "here.json").write_text(json.dumps(made))
    monkeypatch.setattr(tuning, "the_shipped", lambda: tuning.shipped(tmp_path))
    runtime.use_tuning()
    assert runtime.tuning("cpu")["piece_columns"] == runtime._C.tuning()["piece_columns"] == 4096
    assert runtime.tuning("cpu")["prefetch_columns"] == runtime.built_in_tuning["cpu"]["prefetch_columns"]
    before = runtime.cpu_capability()
    try:  # another instruction set is another device
        runtime.force_cpu_capability("baseline")
        if before != "baseline":
            assert runtime._C.tuning()["piece_columns"] == runtime.built_in_tuning["cpu"]["piece_columns"]
    finally:
        runtime.force_cpu_capability(before)
    assert runtime._C.tuning()["piece_columns"] == 4096
    runtime.use_tuning("default")
    assert runtime._C.tuning()["piece_columns"] == runtime.built_in_tuning["cpu"]["piece_columns"]


def test_what_the_package_ships_is_good():
    for each in tuning.shipped():
        assert each.device is not None and each.name == tune.file_name(each.device) and each.found["quick"] is False
        assert tuning.choose(each.device, tuning.shipped())[0] == each  # each kind is served by its own
        for section, values in each.parameters.items():  # what was found no slower, and it alone
            assert all(value != runtime.built_in_tuning[section][name] for name, value in values.items())
            for name, value in values.items():
                tried = {row[name]: row["time"] for row in each.found["tried"] if name in row}
                assert tried[value] == min(tried.values()) <= tune.LEAST_GAIN, name
    for section, values in runtime.built_in_tuning.items():
        assert set(values) == set(tuning.PARAMETERS[section])
        tuning.check_values({section: values}, "built-in values")
        for name, parameter in tuning.PARAMETERS[section].items():
            for value in parameter.tried:
                parameter.check(name, value)
    if runtime._C is not None:
        declared = (ROOT / "csrc" / "tuning.h").read_text() if (ROOT / "csrc").is_dir() else ""
        assert all(f"int64_t {name} = " in declared for name in runtime._C.tuning()) or not declared


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file"),
        ("{", "not JSON ("),
        ("[1]", "parameters: missing"),
        ('{"parameters": {}, "speed": 1}', "expected device, parameters and found, got 'speed'"),
        ('{"parameters": 3}', "parameters: expected an object with the sections cpu, cpu_packed, c"),
        ('{"parameters": {"gpu": {}}}', ", cuda, triton, triton_packed, got 'gpu'"),
        ('{"parameters": {"cpu": 1}}', "cpu: expected an object of names and integers, got 1"),
        ('{"parameters": {"cpu": {"band": 1}}}', "cpu: expected prefetch_columns, piece_columns, "),
        ('{"parameters": {"cpu": {"piece_columns": 15}}}', "cpu.piece_columns: expected an integer from 16 to 107"),
        ('{"parameters": {"cpu": {"piece_columns": "64"}}}', "cpu.piece_columns: expected an integer from 16 to "),
        ('{"parameters": {"cpu": {"piece_columns": true}}}', "cpu.piece_columns: expected an integer from 16 to "),
        ('{"parameters": {"triton": {"block": 1000}}}', "triton.block: expected a power of two from 16 to 16384, "),
        ('{"parameters": {}, "device": {"type": "cpu"}}', "device: expected an object with type, "),
        ('{"parameters": {}, "device": {"type": "", "name": 3, "capability": ""}}', "device.name: expected str, got 3"),
    ],
)  # fmt: skip
def test_a_bad_table_is_one_line_and_changes_nothing(text, message, tmp_path):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    runtime.use_tuning({"cpu": {"piece_columns": 4096}})
    with pytest.raises(ValueError) as raised:
        runtime.use_tuning(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: ") and message in said and "\n" not in said
    assert runtime.tuning_table()[0].parameters == {"cpu": {"piece_columns": 4096}}


def test_info_says_which_table_serves_and_why(capsys):
    assert cli.main(["info"]) == 0
    assert "tuning on cpu    built-in values: chosen by ASKEW_TUNING or use_tuning (" in capsys.readouterr().out


def test_the_environment_names_a_table(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"parameters": {"cpu": {"serial_elements": 5}}}')
    done = python("-m", "askew_kernels", "info", "--json", ASKEW_TUNING=str(path))
    facts = json.loads(done.stdout)["tuning"]["cpu"]
    assert facts["table"] == "table.json" and facts["why"] == "chosen by ASKEW_TUNING or use_tuning"
    assert facts["parameters"]["cpu"].get("serial_elements", 5) == 5
    path.write_text('{"parameters": {"cpu": {"serial_elements": -5}}}')
    done = python("-c", "import askew_kernels", ASKEW_TUNING=str(path))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith(
        f"ValueError: ASKEW_TUNING: {path}: cpu.serial_elements: expected an"
    )


# ---- bench tune ------------------------------------------------------------------------------------------------------


def small_passes(section, name, quick):
    return {"quantize": tune.quantize(8, 96, 8), "step": tune.step(8, 96, 0.9),
            "sam": tune.perturb_and_restore([(8, 96)])}  # fmt: skip


@compiled
def test_tune_writes_a_table_that_can_be_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "passes", small_passes)
    monkeypatch.setattr(tune, "LEAST_GAIN", 2.0)  # take a value even where it is no better, so that there are some
    monkeypatch.setattr(tune.harness, "interleave", functools.partial(tune.harness.interleave, turns=2))
    monkeypatch.setattr(tune.harness.gc, "collect", lambda: 0)  # hundreds of times, of all that the tests before made
    path = tmp_path / "new" / "table.json"
    before = runtime._C.tuning()
    assert cli.main(["bench", "tune", "--quick", "--json", str(path)]) == 0
    assert runtime._C.tuning() == before
    text = capsys.readouterr().out
    known = {name: p for section in tuning.SECTIONS["cpu"] for name, p in tuning.PARAMETERS[section].items()}
    assert all(name in text for name in known) and f"ASKEW_TUNING={path}" in text
    made = tuning.read_table(path)
    assert made.device == runtime.tuning_device() and tune.file_name(made.device) in text
    built_in = {name: v for section in tuning.SECTIONS["cpu"] for name, v in runtime.built_in_tuning[section].items()}
    count = sum(len({*p.tried, built_in[name]}) for name, p in known.items())
    assert len(made.found["tried"]) == count and made.found["quick"] is True
    runtime.use_tuning(path)
    assert runtime._C.tuning() == before | made.parameters["cpu"] | made.parameters["cpu_packed"]
    assert {name: runtime._convolution[name] for name in made.parameters["cpu_convolution"]} == (
        made.parameters["cpu_convolution"]
    )


@compiled
def test_tune_refuses_a_value_that_changes_bits(tmp_path, monkeypatch, capsys):
    def wrong(device):
        return lambda: [torch.tensor([runtime._C.tuning()["piece_columns"]])]

    monkeypatch.setattr(tune, "passes", lambda section, name, quick: {"wrong": wrong})
    path = tmp_path / "table.json"
    assert cli.main(["bench", "tune", "--quick", "--json", str(path)]) == 1
    err = capsys.readouterr().err
    assert "cpu: piece_columns = 4096 changes the result of wrong" in err and err.count("\n") == 1 and not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--csv", "rows.csv"], "bench tune: takes --device, --quick and --json, not --csv"),
        (["--json", "/proc/nowhere/table.json"], "/proc/nowhere/"),
    ],
)
def test_tune_requests_that_cannot_be_served(arguments, message, capsys):
    assert cli.main(["bench", "tune", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


@compiled
def test_an_interrupted_tune_writes_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(section, name, quick):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "passes", interrupted)
    before = runtime._C.tuning()
    assert cli.main(["bench", "tune", "--json", str(tmp_path / "table.json")]) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir()) and runtime._C.tuning() == before
