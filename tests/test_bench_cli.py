"""The contract of the benchmark harness and the command line:

* a row stands alone: every field is there, and bytes, ratios, limits and percentiles are what they are called;
* an implementation whose result is wrong is named and never timed; one that raises or is missing is named too;
* JSON, CSV and PNG are valid and written in one piece; whatever ends a run, finished rows are kept;
* errors are one clear line and an exit code other than 0; importing the package imports no optional dependency.

No timing is asserted anywhere.
"""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from askew_kernels import __main__ as cli
from askew_kernels import bench, bench_suites
from askew_kernels.bench import Case, CheckFailed, Context, Entry, Impl, Traffic

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def python(*arguments, timeout=100, **environment):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "160", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)


def small(monkeypatch, side=64):
    """Every suite at a size where nothing takes time, and without the compiler."""
    monkeypatch.setattr(Context, "side", side)
    monkeypatch.setattr(bench_suites, "why_no_compile", lambda context: "left out of this test")
    monkeypatch.setattr(bench_suites, "resnet18_shapes", lambda: [(64, 3, 7, 7), (64,), (64,), (10, 32), (10,)])


def rows_of(suite, op):
    entry = next(e for e in bench_suites.SUITES[suite] if e.op == op)
    return list(bench.run_case(suite, entry, Context(CPU, quick=True)))


def fake_entry(*impls, numel=0, baseline="base", measure="time"):
    def build(context):
        return Case("4", "float32", baseline, list(impls), numel, weight_bytes=1000)

    return Entry("op", build, measure)


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "baseline", "bytes_a_weight"),
    [
        # read w and g, write w; momentum: read and write its buffer; AdamW: two of them; the hard copy: written
        ("SGD step", "torch SGD fused", {"torch SGD fused": 12, "ASkewSGD hold": 12, "ASkewSGD hold + hard copy": 16}),
        ("SGD momentum step", "torch SGD momentum fused", {"ASkewSGD hold": 20, "ASkewSGD hold + hard copy": 24}),
        ("AdamW step", "torch AdamW fused", {"torch AdamW fused": 28, "ASkewAdamW hold + hard copy": 32}),
    ],
)
def test_step_rows(monkeypatch, op, baseline, bytes_a_weight):
    small(monkeypatch)
    rows = {r.impl: r for r in rows_of("step", op)}
    for impl, each in bytes_a_weight.items():
        assert rows[impl].bytes == each * 64 * 64
    for r in rows.values():
        if r.note.startswith("missing"):
            assert r.p50 is None and r.ratio is None
            continue
        assert r.p20 <= r.p50 <= r.p80 and r.unit == "ms" and r.repetitions >= 3
        assert r.gb_per_s == pytest.approx(r.bytes / (r.p50 / 1e3) / 1e9)
        assert r.percent_of_copy == pytest.approx(100 * r.gb_per_s / rows["copy"].gb_per_s)
        assert r.baseline == baseline and r.ratio == pytest.approx(r.p50 / rows[baseline].p50)
        for name in (
            "suite",
            "op",
            "impl",
            "shape",
            "dtype",
            "device",
            "torch",
            "askew",
            "python",
            "allocator",
            "time",
        ):
            assert getattr(r, name), name
        assert r.threads >= 1 and r.device_type == "cpu" and r.backend
    assert not any(r.note.startswith("failed") for r in rows.values())
    # on the CPU the limit is the lines that come in (w and g for SGD) at the best rate seen
    best = max(rows["copy"].bytes / rows["copy"].p50, rows["read"].bytes / rows["read"].p50,
               rows["read-modify-write"].bytes / 2 / rows["read-modify-write"].p50)  # fmt: skip
    buffers = {"SGD step": 0, "SGD momentum step": 1, "AdamW step": 2}[op]
    ours = next(r for r in rows.values() if r.impl in ("ASkewSGD hold", "ASkewAdamW hold"))
    assert ours.limit == pytest.approx((8 + 4 * buffers) * 64 * 64 / best)


def test_fake_quantize_rows(monkeypatch):
    small(monkeypatch, 256)
    for entry in bench_suites.SUITES["fake_quant"]:
        rows = {r.impl: r for r in rows_of("fake_quant", entry.op)}
        assert rows["two copies"].bytes == 16 * 256 * 256
        # forward: read x, write y; backward: read the gradient and x, write x's gradient
        assert rows["ops.fake_quantize"].bytes == rows["eager straight-through"].bytes == 20 * 256 * 256
        assert not [r.note for r in rows.values() if r.note.startswith("failed")]


def test_linear_rows_are_checked(monkeypatch):
    small(monkeypatch)
    for entry in bench_suites.SUITES["linear"]:
        rows = rows_of("linear", entry.op)
        assert {r.kind for r in rows} == {"baseline", "ours"}
        assert not [r.note for r in rows if r.note]


def test_resnet18_list():
    shapes = bench_suites.resnet18_shapes()
    sizes = [torch.Size(s).numel() for s in shapes]
    assert len(shapes) == 62 and sum(sizes) == 11_689_512  # torchvision's resnet18
    assert sum(len(s) > 1 for s in shapes) == 21


def test_traffic():
    traffic = Traffic(read=3, updated=5, written=7)
    assert traffic.total == 3 + 5 + 5 + 7 and traffic.lines == 3 + 5 + 7


def test_percentiles_and_turns():
    assert bench.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert bench.percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    order = []
    impls = [Impl(name, lambda name=name: order.append(name)) for name in "ABC"]
    impls[1].prepare = lambda: order.append("prepare B")
    bench.interleave(impls, bench.CpuClock(), quick=True)
    assert order[:8] == ["A", "prepare B", "B", "C"] * 2


def test_compile_time_has_its_own_row():
    impl = Impl("base", report_first_call=True)
    first, row = bench.run_case("suite", fake_entry(impl), Context(CPU, quick=True))
    assert "first call" in first.impl and first.repetitions == 1 and first.ratio is None
    assert row.impl == "base" and row.repetitions > 1


def test_memory_sees_what_is_allocated_and_freed():
    n = 4 * 2**20
    keep = torch.zeros(n)

    def use():
        a = torch.ones(n)
        b = a * 2
        del a
        return b.sum()

    assert 2 * 4 * n <= bench.peak_extra_bytes(use, CPU) < 2.2 * 4 * n
    assert bench.peak_extra_bytes(lambda: keep.add_(1.0), CPU) < 0.01 * 4 * n


def test_a_step_allocates_nothing_of_weight_size(monkeypatch):
    small(monkeypatch, 1024)
    rows = rows_of("memory", "extra memory, SGD step")
    ours = [r for r in rows if r.kind == "ours"]
    assert ours and all(r.unit == "B" and r.p50 == r.peak_bytes for r in ours)
    assert all(r.ratio < 0.05 for r in ours), [(r.impl, r.ratio) for r in ours]
    assert next(r for r in rows if r.impl == "eager, lean").ratio > 1


# ---- wrong, raising and missing implementations ----------------------------------------------------------------------


def test_a_wrong_step_is_refused(monkeypatch):
    inputs = bench_suites.Inputs(Context(CPU), [(80, 64)])
    right, lean = bench_suites.functional_step, bench_suites.lean_eager_step_
    wrong = {
        "does nothing": lambda w, g, lr, eps: None,
        "without the constraint": lambda w, g, lr, eps: w - lr * g,
        "another eps": lambda w, g, lr, eps: right(w, g, lr, eps * 0.5),
        "another lr": lambda w, g, lr, eps: right(w, g, lr * 1.05, eps),
        "one row too few": lambda w, g, lr, eps: torch.cat([right(w, g, lr, eps)[:-1], w[-1:]]),
        "NaN": lambda w, g, lr, eps: right(w, g, lr, eps) * float("nan"),
    }
    for name, function in {"right": right, "lean": lean, "published": bench_suites.published_step_, **wrong}.items():
        impl = bench_suites.written_step(inputs, name, function)
        if name in wrong:
            with pytest.raises(CheckFailed, match="differ from the reference"):
                impl.check(impl.run)
        else:
            impl.check(impl.run)


def test_a_wrong_copy_or_gradient_is_refused():
    x = torch.randn(64, 64)
    scale = bench_suites.sawb(x)
    check = bench_suites.FakeQuantizeCheck(x, torch.ones_like(x), scale)
    y = scale[:, None] * (x / scale[:, None]).clamp(-8, 7).round()
    inside = ((x / scale[:, None] >= -8) & (x / scale[:, None] <= 7)).float()
    check(lambda: (y, inside))
    with pytest.raises(CheckFailed, match="output"):
        check(lambda: (x, inside))
    with pytest.raises(CheckFailed, match="gradient"):
        check(lambda: (y, torch.full_like(x, 0.5)))


def test_failures_are_named_and_the_others_are_timed():
    def wrong(run):
        raise CheckFailed("3 of 4 elements differ")

    def broken():
        raise RuntimeError("no such kernel\nmore")

    impls = [Impl("base"), Impl("wrong", check=wrong), Impl("broken", broken), Impl("absent", missing="not installed")]
    rows = {r.impl: r for r in bench.run_case("suite", fake_entry(*impls), Context(CPU, quick=True))}
    assert rows["base"].p50 is not None
    assert rows["wrong"].note == "failed: wrong result: 3 of 4 elements differ" and rows["wrong"].p50 is None
    assert rows["broken"].note == "failed: RuntimeError: no such kernel" and rows["broken"].p50 is None
    assert rows["absent"].note == "missing: not installed" and rows["absent"].p50 is None


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_round_trip_and_are_atomic(tmp_path):
    impls = [Impl("base", kind="baseline"), Impl("absent", missing="x, y")]
    rows = list(bench.run_case("suite", fake_entry(*impls), Context(CPU, quick=True)))
    assert bench.rows_from_json(bench.rows_to_json(rows)) == rows
    parsed = list(csv.DictReader(io.StringIO(bench.rows_to_csv(rows))))
    assert [p["impl"] for p in parsed] == [r.impl for r in rows] and parsed[0].keys() == set(bench.ROW_FIELDS)
    target = tmp_path / "new" / "rows.json"
    bench.write_atomic(target, "one")
    bench.write_atomic(target, "two")
    assert target.read_text() == "two" and [p.name for p in target.parent.iterdir()] == ["rows.json"]
    with pytest.raises(bench.BenchError, match="folder"):
        bench.write_atomic(tmp_path, "x")


def test_goals_from_rows():
    template = next(iter(bench.run_case("step", fake_entry(Impl("base")), Context(CPU, quick=True))))

    def row(impl, p50, kind="peer"):
        return bench.Row(**{**vars(template), "op": "SGD step", "impl": impl, "p50": p50, "kind": kind,
                            "baseline": "torch SGD fused", "quick": False})  # fmt: skip

    rows = [row("torch SGD fused", 10.0, "baseline"), row("ASkewSGD hold", 12.0, "ours"),
            row("ASkewSGD eps=0.3, scale each step", 13.0, "ours"), row("eager, lean", 650.0),
            row(bench_suites.IN_PLACE, 39.0), row(bench_suites.FRESH, 26.0)]  # fmt: skip
    results = {g.goal: g for g in bench.goals(rows)}
    first = results["ASkewSGD step, SAWB included, ÷ SGD fused"]
    assert first.measured == pytest.approx(1.2) and first.reached is True
    assert results["times faster than eager"].measured == pytest.approx(50)
    best = results["times faster than the best torch.compile of the same mathematics"]
    assert best.measured == pytest.approx(2.0) and best.reached is False  # the faster of the two compiled ones
    assert results["ASkewAdamW ÷ AdamW fused"].reached is None  # its rows are not there
    assert not any(g.goal.startswith("fake_quantize") for g in results.values())
    assert "MISSED" in bench.plain_report(rows)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_bench_shows_and_writes_every_suite(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    small(monkeypatch, 128)
    files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"), "--plot", str(tmp_path / "plots")]
    assert cli.main(["bench", "--suite", "all", "--quick", *files]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {r["suite"] for r in rows} == set(bench_suites.SUITES)
    assert all(set(r) == set(bench.ROW_FIELDS) for r in rows)
    assert len(list(csv.DictReader((tmp_path / "r.csv").open()))) == len(rows)
    for suite in bench_suites.SUITES:
        assert (tmp_path / "plots" / f"{suite}.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "ASkewSGD hold" in text and "two copies" in text and "goals" in text and "left out of this test" in text


def test_bench_in_a_process_and_with_the_warm_allocator(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"), "--plot", str(tmp_path)]
    done = python("-m", "askew_kernels", "bench", "--suite", "linear", "--quick", "--allocator", "both", *files)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {r["allocator"] for r in rows} == {"default", "warm"} and "linear forward + backward" in done.stdout
    assert len(list(csv.DictReader((tmp_path / "r.csv").open()))) == len(rows)
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "--suite: expected step, fake_quant, linear, memory or all, got 'speed'"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--allocator", "hot"], "--allocator: expected default, warm, both or auto, got 'hot'"),
        (["--json", "/proc/nowhere/rows.json"], "/proc/nowhere/"),
        (["--csv", "/"], "is a folder"),
    ],
)
def test_requests_that_cannot_be_served(arguments, message, capsys):
    assert cli.main(["bench", "--plain", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_one_line(capsys):
    assert cli.main(["bench", "--plain", "--device", "cuda"]) == 2
    assert "--device cuda: " in capsys.readouterr().err
    done = python("benchmarks/gpu_check.py")
    assert done.returncode == 2 and done.stderr.startswith("gpu-check: no GPU") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; 1 finished rows kept"),
        (OSError(28, "No space left on device"), 1, "No space left on device; 1 finished rows kept"),
    ],
)
def test_what_ends_a_run_keeps_the_finished_rows(raised, code, message, tmp_path, monkeypatch, capsys):
    def build(context):
        raise raised

    broken = Entry("broken", build)
    monkeypatch.setitem(bench_suites.SUITES, "linear", [fake_entry(Impl("base")), broken])
    path = tmp_path / "rows.json"
    arguments = ["bench", "--plain", "--quick", "--suite", "linear", "--json", str(path)]
    assert cli.main(arguments) == code
    assert [r["impl"] for r in json.loads(path.read_text())["rows"]] == ["base"]
    assert message in capsys.readouterr().err


def test_a_failed_implementation_makes_the_exit_code_1(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(bench_suites.SUITES, "linear", [fake_entry(Impl("base"), Impl("peer", broken))])
    assert cli.main(["bench", "--plain", "--quick", "--suite", "linear"]) == 1
    out, err = capsys.readouterr()
    assert "linear, op, peer: failed: RuntimeError: no such kernel" in err and "base" in out


@pytest.mark.parametrize(("module", "arguments"), [("rich", []), ("matplotlib", ["--plot", "somewhere"])])
def test_missing_extras_are_named(module, arguments, monkeypatch, capsys):
    real = bench.importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == module else real(name))
    assert cli.main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert module in err and 'pip install "askew_kernels[bench]"' in err
    assert not Path("somewhere").exists()


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "triton", "C++ operators", "CPU capability", "CUDA kernels", "backend on cpu", "environment"):
        assert word in text
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__ and facts["backends"]["cpu"]["backend"]


def test_info_says_what_is_forced():
    done = python("-m", "askew_kernels", "info", ASKEW_BACKEND="reference")
    assert done.returncode == 0 and "reference: forced" in done.stdout and "ASKEW_BACKEND=reference" in done.stdout


def test_import_brings_in_no_optional_dependency():
    code = "import sys, askew_kernels; print([m for m in ('rich', 'matplotlib', 'triton') if m in sys.modules])"
    before = "import sys, torch; print([m for m in ('rich', 'matplotlib', 'triton') if m in sys.modules])"
    assert python("-c", code).stdout == python("-c", before).stdout
