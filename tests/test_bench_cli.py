"""The contract of the benchmark harness and the command line:

* a row stands alone: every field is there, and bytes, ratios, limits and percentiles are what they are called;
* an implementation whose result is wrong is named and never timed; one that raises or is missing is named too;
* a comparison names the rows that moved beyond their own spread, and no others;
* JSON, CSV, PNG and SVG are valid and written in one piece; whatever ends a run, finished rows are kept;
* the tables in the documents are the ones that the committed rows make;
* errors are one clear line and an exit code other than 0; importing the package imports no optional dependency.

No timing is asserted anywhere.
"""

import csv
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from askew_kernels import __main__ as cli
from askew_kernels import command, nn, optim, reference
from askew_kernels.bench import cli as bench_cli
from askew_kernels.bench import goals, harness, peers, report, rows, runs, suites
from askew_kernels.bench.harness import Case, CheckFailed, Context, Entry, Impl, Traffic
from askew_kernels.bench.suites import around, common, fake_quant, models, packed, startup, step, train

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def python(*arguments, timeout=100, **environment):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "160", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)


@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny operations: on a busy machine they would spend their time waiting for each other's threads."""
    with common.one_thread():
        yield


def small(monkeypatch, side=64):
    """Every suite at a size where nothing takes time, without the compiler and other libraries."""
    monkeypatch.setattr(Context, "side", side)
    monkeypatch.setattr(common, "why_no_compile", lambda context, quick=True: "left out of this test")
    monkeypatch.setattr(peers, "why_missing", lambda library: f"{library} is left out of this test")
    monkeypatch.setattr(common, "resnet18_shapes", lambda: [(64, 3, 7, 7), (64,), (64,), (10, 32), (10,)])


def rows_of(suite, op):
    entry = next(e for e in suites.SUITES[suite] if e.op == op)
    return list(harness.run_case(suite, entry, Context(CPU, quick=True)))


def fake_entry(*impls, numel=0, baseline="base", **case):
    return Entry("op", lambda context: Case("4", "float32", baseline, list(impls), numel, **case))


def some_rows(*impls, **case):
    """Rows of ``impls`` that take no time, beside a baseline."""
    impls = impls or (Impl("base", kind="baseline"),)
    return list(harness.run_case("suite", fake_entry(*impls, **case), Context(CPU, quick=True)))


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
    measured = {r.impl: r for r in rows_of("step", op)}
    for impl, each in bytes_a_weight.items():
        assert measured[impl].bytes == each * 64 * 64
    for r in measured.values():
        if r.p50 is None:
            assert r.note.startswith(("missing: ", "left out of")) and r.ratio is None
            continue
        if "first call" in r.impl:
            assert r.p50 > 0 and r.repetitions == 1
            continue
        assert r.p20 <= r.p50 <= r.p80 and r.unit == "ms" and r.repetitions >= 3
        assert r.gb_per_s == pytest.approx(r.bytes / (r.p50 / 1e3) / 1e9)
        assert r.percent_of_copy == pytest.approx(100 * r.gb_per_s / measured["copy"].gb_per_s)
        assert r.baseline == baseline and r.ratio == pytest.approx(r.p50 / measured[baseline].p50)
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
            "instructions",
            "time",
        ):
            assert getattr(r, name), name
        assert r.threads >= 1 and r.device_type == "cpu" and r.backend
    assert not any(r.note.startswith("failed") for r in measured.values())
    # on the CPU the limit is the lines that come in (w and g for SGD) at the best rate seen
    best = max(measured["copy"].bytes / measured["copy"].p50, measured["read"].bytes / measured["read"].p50,
               measured["read-modify-write"].bytes / 2 / measured["read-modify-write"].p50)  # fmt: skip
    buffers = {"SGD step": 0, "SGD momentum step": 1, "AdamW step": 2}[op]
    ours = next(r for r in measured.values() if r.impl in ("ASkewSGD hold", "ASkewAdamW hold"))
    assert ours.limit == pytest.approx((8 + 4 * buffers) * 64 * 64 / best)


def test_fake_quantize_rows(monkeypatch):
    small(monkeypatch, 256)
    for entry in suites.SUITES["fake_quant"]:
        measured = {r.impl: r for r in rows_of("fake_quant", entry.op)}
        assert measured["two copies"].bytes == 16 * 256 * 256
        # forward: read x, write y; backward: read the gradient and x, write x's gradient
        assert measured["ops.fake_quantize"].bytes == measured["eager straight-through"].bytes == 20 * 256 * 256
        assert not [r.note for r in measured.values() if r.note.startswith("failed")]


def test_linear_rows_are_checked(monkeypatch):
    small(monkeypatch)
    for entry in [e for e in suites.SUITES["linear"] if e.quick]:
        measured = [r for r in rows_of("linear", entry.op) if r.p50 is not None or r.failed]
        assert {r.kind for r in measured} == {"baseline", "ours", "ceiling"} and not any(r.failed for r in measured)
        product = next(r for r in measured if r.impl == harness.PRODUCT)
        assert product.rate == pytest.approx(2 * 64**3 / product.p50 / 1e6) and product.rate_unit == "GFLOP/s"
        times = 6 if "backward" in entry.op else 2  # two more products backward
        for r in [r for r in measured if r.kind != "ceiling"]:
            assert r.rate == pytest.approx(times * 64**3 / r.p50 / 1e6)
            assert r.limit == pytest.approx(times / 2 * product.p50)


@pytest.mark.parametrize("entry", [e for e in suites.SUITES["models"] if e.quick], ids=lambda e: e.op)
def test_whole_models_are_checked(entry):
    """Every packed model is timed only after each layer gave what the reference does and its outputs were near those of
    the quantized model that was packed, and the note has that cosine, the one to the float model, and its memory."""
    measured = {r.impl: r for r in rows_of("models", entry.op)}
    if all(r.note.startswith("missing: ") for r in measured.values()):
        pytest.skip(next(iter(measured.values())).note)
    own = [r for r in measured.values() if r.kind == "ours"]
    assert own and not any(r.failed for r in measured.values()), [r.note for r in measured.values() if r.failed]
    for r in (r for r in own if r.p50 is not None):
        assert " MB, cosine to float 0." in r.note and ", to the quantized model " in r.note
        assert r.bytes and r.rate_unit.endswith("/s")


def test_whole_models_whose_package_is_not_here_are_named(monkeypatch):
    monkeypatch.setattr(peers, "why_missing", lambda module: f"no {module}")
    monkeypatch.setattr(peers, "why_no_minilm", lambda: "no MiniLM")
    for entry in suites.SUITES["models"]:
        if entry.op not in (models.DECODE, models.PREFILL):
            measured = {r.impl: r for r in rows_of("models", entry.op)}
            assert {r.note for r in measured.values()} <= {"missing: no MiniLM", f"missing: no {models.EFFICIENTNET}"}
            assert measured.keys() > {models.FLOAT, models.BF16}


def test_a_wrong_product_in_a_whole_model_fails(monkeypatch):
    """A layer a thousandth away from the reference, and a model with other codes."""
    form = models.FORMATS["4 bits g32, int8"]
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    x = torch.randn(4, 64)
    shared = models.Beside(model, lambda m: m(x), 1)
    impl = shared.own(Context(CPU, quick=True), "4 bits g32, int8", form, "*")[0]
    impl.check(impl.run)
    right = reference.packed_linear_int8
    monkeypatch.setattr(reference, "packed_linear_int8", lambda *inputs: 1.001 * right(*inputs))
    with pytest.raises(harness.CheckFailed, match="PackedLinear: .* away from the reference"):
        impl.check(impl.run)
    monkeypatch.undo()
    right_model = models.Format.of
    other = torch.nn.Sequential(torch.nn.Linear(64, 64))
    monkeypatch.setattr(models.Format, "of", lambda self, model, where: right_model(self, other, where))
    broken = shared.own(Context(CPU, quick=True), "4 bits g32, int8", form, "*")[0]
    with pytest.raises(harness.CheckFailed, match="cosine .* to the quantized model's"):
        broken.check(broken.run)


def test_rows_of_products_know_their_arithmetic():
    """A product's limit is the slower of the bytes it must read and of the library's own product in its type."""
    entry = next(e for e in suites.SUITES["packed"] if e.op == packed.op(256))
    case = entry.build(Context(CPU, quick=True))
    kinds = {i.name: i.product for i in case.impls}
    assert kinds["nn.Linear"] == harness.PRODUCT and kinds["nn.Linear bf16"] == harness.BF16_PRODUCT
    assert kinds[packed.ours("4-bit") + packed.INT8] == kinds[packed.DYNAMIC] == harness.INT8_PRODUCT
    assert case.product == (256, 1024, 1024) and set(case.products) == {*kinds.values()}


def test_training_rows(monkeypatch):
    """Every implementation takes the same steps, and ours starts from the same weights and learns."""
    small(monkeypatch)
    monkeypatch.setattr(train, "_turns", lambda context, full: 2)
    for entry in suites.SUITES["train"]:
        if entry.build is train.log_case or "cpu" not in entry.devices:
            continue
        if entry.op == train.MINILM_STEP and peers.why_no_minilm():
            continue
        measured = {r.impl: r for r in harness.run_case("train", entry, Context(CPU, quick=True))}
        plain, ours = measured["float"], measured["ASkew hard"]
        assert not any(r.failed for r in measured.values())
        assert min(len(plain.losses), len(ours.losses)) >= plain.repetitions + 3 == ours.repetitions + 3
        assert ours.losses[0] == pytest.approx(plain.losses[0], rel=0.2) and ours.losses != plain.losses
        assert plain.rate_unit in ("images/s", "tokens/s") and ours.rate > 0
        assert measured["torchao QAT"].note.startswith(("missing: ", "left out: "))


def test_a_model_that_is_not_installed_is_named(monkeypatch):
    small(monkeypatch)
    monkeypatch.setattr(peers, "MINILM", ("no_such_module",))
    monkeypatch.setitem(peers.DISTRIBUTIONS, "no_such_module", "no-such-module")
    measured = rows_of("train", train.MINILM_STEP)
    assert len(measured) == 3 + 2 * len(train.MINILM_ROWS)
    assert all(r.note.startswith("missing: no-such-module not installed: pip install") for r in measured)


@pytest.mark.parametrize("op", [e.op for e in suites.SUITES["around"]])
def test_rows_of_what_stands_around_a_step(op, monkeypatch):
    """Equal work; the parts of a batch give the whole batch's loss, compiled rows are named where nothing compiles."""
    if op == around.MICRO_BATCHES and peers.why_no_minilm():
        pytest.skip(peers.why_no_minilm())
    small(monkeypatch)
    monkeypatch.setattr(train, "_turns", lambda context, full: 2)
    measured = {r.impl: r for r in rows_of("around", op)}
    assert not any(r.failed for r in measured.values())
    shown = {name: r for name, r in measured.items() if around.COMPILED not in name}
    assert set(shown) == {"float", *(around.OURS + phase for phase, _ in around.PHASES)}
    assert all(r.losses[0] == pytest.approx(shown["float"].losses[0], rel=0.2) for r in shown.values())
    assert all("left out" in r.note for name, r in measured.items() if name not in shown)


def test_rows_of_a_wide_network_are_of_one_batch_under_autocast(monkeypatch):
    """As they run on a GPU, but for the graphs: the float network, ours in hold and annealed, the clip in the step."""
    small(monkeypatch)
    measured = {r.impl: r for r in rows_of("train", train.WIDE_STEP)}
    ours = [train.wide_name(phase, train.EAGER_STEP, clip) for phase in train.WIDE for clip in ("", train.STEP_CLIP)]
    assert set(measured) == {train.AUTOCAST, *ours}
    assert not any(r.failed for r in measured.values()) and all(r.ratio for r in measured.values())


def test_rows_of_what_a_step_may_write_count_its_bytes(monkeypatch):
    small(monkeypatch)
    measured = {r.impl: r for r in rows_of("step", step.WRITING)}
    assert not any(r.failed for r in measured.values())
    for name, each in (("bfloat16 copy", 14), ("int8 levels", 13), ("fp8 levels", 13)):
        for phase in ("hold", "eps=0.3, scale frozen"):
            assert measured[f"ASkewSGD {phase} + {name}"].bytes == each * 64 * 64


def test_long_lists_are_checked_at_tensors_from_all_over_them():
    some = [torch.zeros(4, 4) for _ in range(3 * step.MOST_CHECKED)]
    check = step.StepCheck(some, some)
    assert len(check.weights()) == step.MOST_CHECKED and list(check.checked)[:3] == [0, 3, 6]
    assert list(step.StepCheck(some[:62], some[:62]).checked) == list(range(62))


def test_steps_with_a_log_write_one(monkeypatch):
    """Ten steps a call, one of them recorded; equal work with and without."""
    monkeypatch.setattr(train, "_turns", lambda context, full: 2)
    written = []
    append = optim.telemetry.TelemetryLog._append
    monkeypatch.setattr(optim.telemetry.TelemetryLog, "_append",
                        lambda self, groups, lines: written.append(lines) or append(self, groups, lines))  # fmt: skip
    entry = next(e for e in suites.SUITES["train"] if e.build is train.log_case)
    measured = {r.impl: r for r in harness.run_case("train", entry, Context(CPU, quick=True))}
    assert not any(r.failed for r in measured.values()) and measured[train.LOG].p50 > 0
    calls = 2 + 2 + 2  # checked, measured for memory, timed: at most; a line each, written a step later
    assert 2 <= len(written) <= calls


def test_packed_rows_are_checked(monkeypatch):
    small(monkeypatch, 256)
    for batch in (1, 16):
        measured = [r for r in rows_of("packed", f"packed linear, batch {batch}") if r.p50 is not None or r.failed]
        assert not any(r.failed for r in measured)
        ours = {r.impl for r in measured if r.kind == "ours"}
        assert packed.ours("binary") in ours and packed.ours("4-bit group 128") + packed.INT8 in ours
        by_name = {r.impl: r for r in measured}
        assert by_name[packed.ours("4-bit")].bytes < by_name["nn.Linear"].bytes / 7


def test_a_wrong_packed_product_is_refused(monkeypatch):
    small(monkeypatch, 256)
    product = nn.PackedLinear._product
    monkeypatch.setattr(nn.PackedLinear, "_product", lambda self, x, bias: 1.04 * product(self, x, bias))
    measured = rows_of("packed", "packed linear, batch 1")
    assert all(r.failed == (r.kind == "ours") for r in measured if r.kind in ("ours", "baseline"))


def test_start_up_is_measured_in_new_processes(monkeypatch):
    monkeypatch.setattr(startup, "TORCH", "json")  # quicker to import
    monkeypatch.setattr(startup, "OURS", "time")
    measured = {r.impl: r for r in rows_of("startup", "start-up")}
    assert 0 <= measured[startup.BEYOND_TORCH].p50 < measured["import json"].p50


@pytest.mark.parametrize(
    ("shapes", "tensors", "weights", "matrices"),
    [  # counts of torchvision's models, and of GPT-2 small
        (common.resnet18_shapes, 62, 11_689_512, 21),
        (common.resnet50_shapes, 161, 25_557_032, 54),
        (common.vit_b_shapes, 152, 86_567_656, 52),
        (common.gpt2_small_shapes, 148, 124_439_808, 50),
    ],
)
def test_model_lists(shapes, tensors, weights, matrices):
    made = shapes()
    assert len(made) == tensors and sum(torch.Size(s).numel() for s in made) == weights
    assert sum(len(s) > 1 for s in made) == matrices


def test_traffic():
    traffic = Traffic(read=3, updated=5, written=7)
    assert traffic.total == 3 + 5 + 5 + 7 and traffic.lines == 3 + 5 + 7


def test_percentiles_and_turns():
    assert harness.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert harness.percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    order = []
    impls = [Impl(name, lambda name=name: order.append(name)) for name in "ABC"]
    impls[1].prepare = lambda: order.append("prepare B")
    clock = lambda run: run() or 1.0  # noqa: E731
    harness.interleave(impls, clock, quick=True)
    assert order[:8] == ["A", "prepare B", "B", "C"] * 2
    times, _ = harness.interleave(impls, clock, turns=23)
    assert {len(t) for t in times.values()} == {23}  # equal work
    impls[2].calls = 4
    times, _ = harness.interleave(impls, clock, turns=2)
    assert times["A"] == [1.0, 1.0] and times["C"] == [0.25, 0.25]  # of one operation


def test_a_chain_calls_every_layer_once_and_gives_the_last_result():
    made, x = iter([lambda v: v + 1, lambda v: v + 2]), torch.ones(1)
    assert packed.Chain(lambda: next(made), x, 2)() == 3
    case = packed.linear_case(Context(CPU, quick=True), 1)
    ours = next(i for i in case.impls if i.name == packed.ours("4-bit"))
    layers = ours.run.layers
    assert ours.calls == len(layers) and ours.prepare is None
    assert len({layer.weight_codes.data_ptr() for layer in layers}) == len(layers)  # each has a weight of its own
    assert ours.calls * layers[0].packed_bytes >= packed.COLD >> 5
    assert packed.linear_case(Context(CPU, quick=True), 256).impls[0].calls == 1


def test_help_names_every_suite(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert ", ".join(suites.SUITES) in " ".join(capsys.readouterr().out.split())


def test_short_calls_are_timed_in_blocks():
    calls = []
    clock = harness.CpuClock()
    first = clock(lambda: calls.append(0))
    assert len(calls) == 1 and first < 0.2
    run = clock.blocks[next(iter(clock.blocks))][0]
    assert run is not None and len(clock.blocks) == 1
    count = []
    several = lambda: count.append(0)  # noqa: E731
    clock(several)
    assert clock(several) < 0.2 and len(count) > 10


def test_compile_time_has_its_own_row():
    first, row = some_rows(Impl("base", first_call="compilation included"))
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

    assert 2 * 4 * n <= harness.peak_extra_bytes(use, CPU) < 2.2 * 4 * n
    assert harness.peak_extra_bytes(lambda: keep.add_(1.0), CPU) < 0.01 * 4 * n


def test_a_step_allocates_nothing_of_weight_size(monkeypatch):
    small(monkeypatch, 1024)
    measured = rows_of("step", "SGD step")
    shares = {r.impl: step.memory_share(r) for r in measured if r.peak_bytes is not None}
    assert shares["ASkewSGD hold"] is not None and shares["eager, lean"] > 1
    assert all(share < 0.05 for impl, share in shares.items() if impl.startswith("ASkewSGD")), shares


# ---- wrong, raising and missing implementations ----------------------------------------------------------------------


def test_a_wrong_step_is_refused(monkeypatch):
    inputs = common.Inputs(Context(CPU), [(80, 64)])
    right, lean = step.functional_step, step.lean_eager_step_
    wrong = {
        "does nothing": lambda w, g, lr, eps: None,
        "without the constraint": lambda w, g, lr, eps: w - lr * g,
        "another eps": lambda w, g, lr, eps: right(w, g, lr, eps * 0.5),
        "another lr": lambda w, g, lr, eps: right(w, g, lr * 1.05, eps),
        "one row too few": lambda w, g, lr, eps: torch.cat([right(w, g, lr, eps)[:-1], w[-1:]]),
        "NaN": lambda w, g, lr, eps: right(w, g, lr, eps) * float("nan"),
    }
    for name, function in {"right": right, "lean": lean, "published": step.published_step_, **wrong}.items():
        impl = step.written_step(inputs, name, function)
        if name in wrong:
            with pytest.raises(CheckFailed, match="differ from the reference"):
                impl.check(impl.run)
        else:
            impl.check(impl.run)


def test_the_frozen_scale_is_that_of_the_first_step_though_it_was_made_before_the_check():
    """The warm-up of a CUDA graph is steps too."""
    context = Context(CPU, quick=True)
    for told in (True, False):
        impl = step.askew_step(common.Inputs(context, [(64, 48)]), eps=0.3)
        if told:
            impl.check.take_scales()
        for _ in range(3):
            impl.run()
        if told:
            impl.check(impl.run)
        else:
            with pytest.raises(CheckFailed, match="tensor 0, step 1"):
                impl.check(impl.run)


def test_a_wrong_copy_or_gradient_is_refused():
    x = torch.randn(64, 64)
    scale = common.sawb(x)
    check = fake_quant.FakeQuantizeCheck(x, torch.ones_like(x), scale)
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

    def build():
        raise TypeError("an API that changed")

    def exits():
        sys.exit(0)

    later = iter([None, None, None])  # a later call raises

    impls = [
        Impl("base"), Impl("wrong", check=wrong), Impl("broken", broken), Impl("absent", missing="not installed"),
        harness.peer("unbuilt", "json", build), Impl("breaks later", lambda: next(later)),
        harness.peer("not here", "no_such_library", build, "left out here"), Impl("exits", exits),
        harness.peer("exits early", "json", exits),
    ]  # fmt: skip
    measured = {r.impl: r for r in some_rows(*impls)}
    assert measured["base"].p50 is not None
    assert measured["wrong"].note == "failed: wrong result: 3 of 4 elements differ" and measured["wrong"].p50 is None
    assert measured["broken"].note == "failed: RuntimeError: no such kernel" and measured["broken"].p50 is None
    assert measured["absent"].note == "missing: not installed" and measured["absent"].p50 is None
    assert measured["unbuilt"].note == "failed: TypeError: an API that changed"
    assert measured["breaks later"].note.startswith("failed: StopIteration") and measured["breaks later"].p50 is None
    assert measured["not here"].note == "left out here"
    assert measured["exits"].failed and measured["exits early"].note == "failed: SystemExit: 0"


def test_a_missing_peer_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert 'brevitas is not installed: pip install "askew_kernels[peers]"' in peers.why_missing("brevitas")
    assert peers.why_missing("liger_kernel") == "liger-kernel is not installed: pip install liger-kernel"


def test_peers_of_a_gpu_are_named(monkeypatch):
    """The cases as a GPU would have them, built on the CPU."""
    monkeypatch.setattr(Context, "is_cuda", True)
    monkeypatch.setattr(Context, "side", 64)
    monkeypatch.setattr(Context, "backends", lambda self: [("", "")])
    monkeypatch.setattr(peers, "why_missing", lambda library: f"{library} is left out of this test")
    monkeypatch.setattr(common, "Captured", lambda run: run)
    context = Context(CPU, quick=True)
    forward = next(e for e in suites.SUITES["linear"] if e.op == "linear forward").build(context)
    missing = {i.name: i.missing for i in forward.impls if i.missing}
    assert "torchao is" in missing["torchao int4 weight-only"] and "gemlite is" in missing["gemlite 4-bit"]
    few = next(e for e in suites.SUITES["packed"] if e.op == "packed linear on a GPU, batch 4")
    monkeypatch.setattr(Context, "side", 128)
    impls = {i.name: i for i in few.build(context).impls}
    assert "gemlite is" in impls["gemlite 4-bit"].missing and packed.ours("binary") in impls
    for impl in impls.values():
        if impl.check is not None and not impl.missing:
            impl.check(impl.run)  # what a GPU would run, on the CPU
    gpt, mlp = (next(e for e in suites.SUITES["train"] if e.op.endswith(n)).build(context) for n in ("GPT", "MLP"))
    assert any(i.name == train.LIGER and "liger_kernel is" in i.missing for i in gpt.impls)
    assert not any(i.name == train.LIGER for i in mlp.impls)
    wide = next(e for e in suites.SUITES["train"] if e.op == train.WIDE_STEP).build(context)
    assert wide.baseline == f"{train.AUTOCAST}{train.GRAPH_STEP}" in {i.name for i in wide.impls}
    for impl in wide.impls:
        impl.check(impl.run)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_files_round_trip_and_are_atomic(tmp_path):
    impls = [Impl("base", kind="baseline"), Impl("absent", missing="x, y")]
    measured = some_rows(*impls, work=2.0, work_unit="images")
    assert rows.rows_from_json(rows.rows_to_json(measured)) == measured
    parsed = list(csv.DictReader(io.StringIO(rows.rows_to_csv(measured))))
    assert [p["impl"] for p in parsed] == [r.impl for r in measured] and parsed[0].keys() == set(rows.ROW_FIELDS)
    target = tmp_path / "new" / "rows.json"
    command.write_atomic(target, "one")
    command.write_atomic(target, "two")
    assert target.read_text() == "two" and [p.name for p in target.parent.iterdir()] == ["rows.json"]
    with pytest.raises(command.Failed, match="folder"):
        command.write_atomic(tmp_path, "x")


def test_goals_from_rows():
    template = some_rows()[0]

    def row(impl, p50, kind="peer"):
        return rows.Row(**{**vars(template), "suite": "step", "op": "SGD step", "impl": impl, "p50": p50, "kind": kind,
                            "baseline": "torch SGD fused", "quick": False})  # fmt: skip

    measured = [row("torch SGD fused", 10.0, "baseline"), row("ASkewSGD hold", 12.0, "ours"),
            row("ASkewSGD eps=0.3, scale each step", 13.0, "ours"), row("eager, lean", 650.0),
            row(step.IN_PLACE, 39.0), row(step.FRESH, 26.0)]  # fmt: skip
    results = {g.goal: g for g in goals.judge(suites.GOALS, measured)}
    first = results["ASkewSGD step ÷ SGD fused"]
    assert first.measured == pytest.approx(1.2) and first.reached is True
    assert results["times faster than eager"].measured == pytest.approx(50)
    best = results["times faster than the best torch.compile of the same mathematics"]
    assert best.measured == pytest.approx(2.0) and best.reached is False  # the faster of the two compiled ones
    assert results["ASkewAdamW ÷ AdamW fused"].reached is None  # its rows are not there
    assert not any(g.goal.startswith("fake_quantize") for g in results.values())
    assert "MISSED" in report.plain_report(measured)


def committed():
    """(the rows that README and notes are made from, why they miss goals)."""
    folder = ROOT / re.search(r"^RESULTS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    return rows.read_rows(folder / "rows.json"), goals.read_reasons(folder / "reasons.json")


def test_the_summary_shows_the_copy_the_missed_goals_and_where_rows_are_from():
    """As plainly as what was reached: every missed goal, the step that writes the copy, each suite's commits."""
    measured, reasons = committed()
    text, results = report.summary_table(measured, reasons), report.goals(measured)
    missed = [g.goal for g in results if g.reached is False]
    assert len(missed) > 10 and all(f"| {goal} |" in text for goal in missed)
    numbers, why = goals.missed(results, reasons)
    assert [goal for goal in missed if not numbers[goal]] == [], "reasons.json: no reason for these"
    assert why == [r.why for r in reasons], "reasons.json: reasons of goals that are no longer missed"
    assert all(f"\n{i}. {reason}" in text for i, reason in enumerate(why, 1))
    assert f"{len(missed)} of {sum(g.reached is not None for g in results)} that were measured" in text
    for suite in ("step", "fake_quant", "packed", "sam", "search"):
        assert any(h.text in text for h in suites.HEADLINES[suite]) and f"{suite}: commit" in text
    [copied] = [r for r in measured if (r.op, r.shape, r.impl, r.allocator)
                == ("SGD step", "4096x4096", "ASkewSGD hold + hard copy", "default")]  # fmt: skip
    assert f"hold, with the hard copy, 4096x4096 | torch SGD fused | **{copied.ratio:.2f}**" in text
    for granularity in fake_quant.GRANULARITIES:
        assert sum(f"fake_quantize per {granularity} " in g.goal for g in results) == 4
    for name in packed.FILES:
        assert any(name in g.goal and g.goal.startswith("load_packed") for g in results)


def test_a_case_its_goal_and_its_line_in_the_readme_are_one_file(monkeypatch):
    """What a suite's module holds beside its cases reaches tables and plots without another place knowing it."""
    goal = goals.Goal("a new goal", "<=", 0.5, goals.ratio("op", "mine"))
    monkeypatch.setitem(suites.GOALS, "suite", [goal])
    monkeypatch.setitem(suites.HEADLINES, "suite", [goals.Headline("a new line", "op", "mine", (("base", "plain"),))])
    impls = [Impl("base", kind="baseline"), Impl("mine", kind="ours")]
    measured = [rows.Row(**{**vars(r), "quick": False, "p50": 2.0, "ratio": 1.0}) for r in some_rows(*impls)]
    text = report.summary_table(measured)
    assert "| a new line, 4 | base | **1.00** |  | plain 1.00 |" in text and "| a new goal | ≤ 0.5 | 1 |" in text


def test_reasons_are_numbered_below_the_goals_that_they_explain():
    results = [
        goals.GoalResult("one (a)", 2.0, 1.0, "<=", False), goals.GoalResult("two", 2.0, 1.0, "<=", False),
        goals.GoalResult("three", 0.5, 1.0, "<=", True), goals.GoalResult("four", 2.0, 1.0, "<=", False),
    ]  # fmt: skip
    reasons = [
        goals.Reason(("three",), "reached"),
        goals.Reason((r"one \(.\)", "two"), "x"),
        goals.Reason(("t.*",), "y"),
    ]
    assert goals.missed(results, reasons) == ({"one (a)": "1", "two": "1, 2", "four": ""}, ["x", "y"])


@pytest.mark.parametrize("text", ["", "{}", '[{"goals": ["a"]}]', '[{"goals": ["("], "why": ""}]', '["a"]',
                                  '[{"goals": [1], "why": "x"}]', '[{"goals": ["a"], "why": 1}]'])  # fmt: skip
def test_reasons_that_are_none(text, tmp_path, capsys):
    """One line that names the file, before anything is measured."""
    path = tmp_path / "reasons.json"
    path.write_text(text)
    assert cli.main(["bench", "--plain", "--quick", "--reasons", str(path)]) == 2
    assert f"{path}: expected a JSON list" in capsys.readouterr().err


# ---- an earlier run, documents ---------------------------------------------------------------------------------------


def test_comparison_names_what_moved_beyond_its_spread():
    template = vars(some_rows()[0])

    def row(impl, p20, p50, p80, **more):
        return rows.Row(**{**template, "impl": impl, "p20": p20, "p50": p50, "p80": p80, **more})

    old = [row("slower", 9, 10, 11), row("faster", 9, 10, 11), row("same", 9, 10, 11), row("gone", 1, 1, 1)]
    new = [row("slower", 19, 20, 21), row("faster", 4, 5, 6), row("same", 10, 12, 14), row("added", 1, 1, 1),
           row("slower", 90, 100, 110, shape="another")]  # fmt: skip
    moves, gone, added = rows.compare(old, new)
    assert {m.new.impl: m.beyond for m in moves} == {"slower": True, "faster": True, "same": False}
    assert [r.impl for r in gone] == ["gone"] and [r.impl for r in added] == ["added", "slower"]
    text = "\n".join(report.comparison_report(old, new))
    assert "2 of 3 rows moved" in text and "2.00 × the time" in text and "2.00 × faster" in text and "same" not in text


def test_compare_and_from_measure_nothing(tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(rows.rows_to_json(some_rows()))
    assert cli.main(["bench", "--plain", "--from", str(path), "--compare", str(path)]) == 0
    assert "0 of 1 rows moved" in capsys.readouterr().out


def test_parts_are_measured_apart_and_put_together(tmp_path, monkeypatch, capsys):
    entries = [fake_entry(Impl("base")) for _ in range(5)]
    entries = [Entry(f"op {i}", e.build) for i, e in enumerate(entries)]
    monkeypatch.setitem(suites.SUITES, "linear", entries)
    files = [tmp_path / f"{i}.json" for i in range(3)]
    for i, path in enumerate(files):
        arguments = ["bench", "--plain", "--quick", "--suite", "linear", "--part", f"{i + 1}/3", "--json", str(path)]
        assert cli.main(arguments) == 0
    parts = [rows.read_rows(path) for path in files]
    assert sorted(r.op for part in parts for r in part) == [e.op for e in entries] and all(parts)
    again = [rows.Row(**{**vars(r), "note": "again"}) for r in parts[1]]
    (tmp_path / "again.json").write_text(rows.rows_to_json(again))
    together = [str(path) for path in (files[2], files[1], files[0], tmp_path / "again.json")]
    assert cli.main(["bench", "--plain", "--from", *together, "--json", str(tmp_path / "all.json")]) == 0
    made = rows.read_rows(tmp_path / "all.json")
    assert [r.op for r in made] == [e.op for e in entries]  # each once, in the registry's order
    assert {r.op for r in made if r.note == "again"} == {r.op for r in parts[1]}


def test_pages_and_filled_documents(tmp_path, capsys):
    path, page, document = (tmp_path / name for name in ("rows.json", "page.md", "README.md"))
    template = vars(some_rows()[0])
    made = [
        rows.Row(**{**template, "suite": "step", "op": "SGD step", "impl": impl, "kind": kind, "p50": p50,
                    "ratio": p50 / 10, "baseline": "torch SGD fused", "quick": False, "shape": "4096x4096"})
        for impl, p50, kind in (("torch SGD fused", 10.0, "baseline"), ("ASkewSGD hold", 12.0, "ours"))
    ]  # fmt: skip
    path.write_text(rows.rows_to_json(made))
    document.write_text(
        "a\n<!-- bench:summary -->\nbefore\n<!-- /bench -->\nb\n<!-- bench:goals -->\n<!-- /bench -->\n"
    )
    arguments = ["bench", "--plain", "--from", str(path), "--page", str(page), "--fill", str(document)]
    assert cli.main(arguments) == 0
    text = document.read_text()
    assert text.startswith("a\n") and "| **1.20** |" in text and "before" not in text and "| reached |" in text
    assert cli.main(arguments) == 0 and document.read_text() == text  # the same rows make the same text
    assert "| ASkewSGD hold | 12.0 |" in page.read_text()
    document.write_text("nothing to fill")
    assert cli.main(arguments) == 1
    assert "README.md: holds no <!-- bench:NAME -->" in capsys.readouterr().err


@pytest.mark.parametrize("document", ["README.md", "docs/notes.md"])
def test_documents_hold_what_the_committed_rows_make(document):
    measured, reasons = committed()
    text = (ROOT / document).read_text()
    assert report.fill(text, measured, reasons) == text, "make readme"


# ---- the command line ------------------------------------------------------------------------------------------------


def test_bench_shows_and_writes_every_suite(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    small(monkeypatch, 128)
    files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"), "--plot", str(tmp_path / "plots")]
    monkeypatch.setitem(suites.SUITES, "train", [e for e in suites.SUITES["train"] if "MLP" in e.op])
    monkeypatch.setitem(suites.SUITES, "startup", [fake_entry(Impl("base", kind="baseline"))])
    assert cli.main(["bench", "--suite", "all", "--quick", *files]) == 0
    measured = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {r["suite"] for r in measured} == set(suites.SUITES)
    assert all(set(r) == set(rows.ROW_FIELDS) for r in measured)
    assert len(list(csv.DictReader((tmp_path / "r.csv").open()))) == len(measured)
    for suite in suites.SUITES:
        assert (tmp_path / "plots" / f"{suite}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "plots" / f"{suite}.svg").read_bytes()
    text = capsys.readouterr().out
    assert "ASkewSGD hold" in text and "two copies" in text and "goals" in text and "left out of this test" in text


def test_bench_in_a_process_and_with_the_warm_allocator(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"), "--plot", str(tmp_path)]
    done = python("-m", "askew_kernels", "bench", "--suite", "linear", "--quick", "--allocator", "both", *files)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {r["allocator"] for r in measured} == {"default", "warm"} and "linear forward + backward" in done.stdout
    assert len(list(csv.DictReader((tmp_path / "r.csv").open()))) == len(measured)
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], f"--suite: expected {', '.join(suites.SUITES)} or all, got 'speed'"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--part", "3/2"], "--part: expected I/N with 1 <= I <= N, e.g. 2/5, got '3/2'"),
        (["--allocator", "hot"], "--allocator: expected default, warm, both or auto, got 'hot'"),
        (["--json", "/proc/nowhere/rows.json"], "/proc/nowhere/"),
        (["--csv", "/"], "is a folder"),
        (["--compare", "nowhere.json"], "nowhere.json: cannot be read (No such file"),
        (["--from", "pyproject.toml"], "pyproject.toml: not a file of bench rows"),
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
        (bench_cli.Terminated(), 143, "terminated; 1 finished rows kept"),
        (OSError(28, "No space left on device"), 1, "No space left on device; 1 finished rows kept"),
    ],
)
def test_what_ends_a_run_keeps_the_finished_rows(raised, code, message, tmp_path, monkeypatch, capsys):
    def build(context):
        raise raised

    broken = Entry("broken", build)
    monkeypatch.setitem(suites.SUITES, "linear", [fake_entry(Impl("base")), broken])
    path = tmp_path / "rows.json"
    arguments = ["bench", "--plain", "--quick", "--suite", "linear", "--json", str(path)]
    assert cli.main(arguments) == code
    assert [r["impl"] for r in json.loads(path.read_text())["rows"]] == ["base"]
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "interrupted; 2 finished rows kept"),
        (signal.SIGTERM, 143, "terminated; 2 finished rows kept"),
    ],
)
def test_a_signal_in_the_middle_of_a_case(number, code, message, tmp_path, monkeypatch, capsys):
    calls = []

    def run():
        calls.append(0)
        if len(calls) > 4:
            signal.raise_signal(number)

    later = Entry("later", lambda context: Case("4", "float32", "base", [Impl("base", run)], 0))
    monkeypatch.setitem(suites.SUITES, "linear", [fake_entry(Impl("base"), Impl("other")), later])
    path = tmp_path / "rows.json"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert cli.main(["bench", "--plain", "--quick", "--suite", "linear", "--json", str(path)]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert [r["impl"] for r in json.loads(path.read_text())["rows"]] == ["base", "other"]
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def full_disk(bytes_left):
    """From now on no file of this process may grow beyond so many bytes; undone by calling what is returned."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_a_disk_that_runs_full_keeps_what_was_written(tmp_path, monkeypatch, capsys):
    entries = [
        Entry(f"op {i}", lambda context: Case("4", "float32", "base", [Impl("base"), Impl("other")], 0))
        for i in range(4)
    ]
    monkeypatch.setitem(suites.SUITES, "linear", entries)
    path = tmp_path / "rows.json"
    undo = full_disk(4000)
    try:
        code = cli.main(["bench", "--plain", "--quick", "--suite", "linear", "--json", str(path)])
    finally:
        undo()
    out, err = capsys.readouterr()
    kept = json.loads(path.read_text())["rows"]
    assert code == 1 and 0 < len(kept) < 8
    message = f"{path}: cannot be written (File too large); "
    assert message in err and "finished rows kept" in err and err.count(str(path)) == 1
    assert "other" in out and [p.name for p in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_a_device_is_written_to_and_never_replaced(monkeypatch, capsys):
    monkeypatch.setitem(suites.SUITES, "linear", [fake_entry(Impl("base"))])
    assert cli.main(["bench", "--plain", "--quick", "--suite", "linear", "--json", "/dev/full"]) == 1
    err = capsys.readouterr().err
    assert "/dev/full: cannot be written (No space left on device)" in err
    assert Path("/dev/full").is_char_device() and not list(Path("/dev").glob(".full*"))
    assert cli.main(["bench", "--plain", "--quick", "--suite", "linear", "--json", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


def test_a_failed_implementation_makes_the_exit_code_1(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(suites.SUITES, "linear", [fake_entry(Impl("base"), Impl("peer", broken))])
    assert cli.main(["bench", "--plain", "--quick", "--suite", "linear"]) == 1
    out, err = capsys.readouterr()
    assert "linear, op, peer: failed: RuntimeError: no such kernel" in err and "base" in out


@pytest.mark.parametrize(("module", "arguments"), [("rich", []), ("matplotlib", ["--plot", "somewhere"])])
def test_missing_extras_are_named(module, arguments, monkeypatch, capsys):
    real = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == module else real(name))
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
    after = "print([m for m in ('rich', 'matplotlib', 'triton', 'scipy', 'setuptools') if m in sys.modules])"
    code, before = (f"import sys, {package}; {after}" for package in ("askew_kernels", "torch"))
    assert python("-c", code).stdout == python("-c", before).stdout


def test_what_stays_float_is_told_of_no_model_of_a_suite(monkeypatch, caplog):
    """But whatever else there is to say is said, and afterwards that, too."""

    def build(context):
        torch.manual_seed(0)
        model = nn.quantize_(torch.nn.ModuleDict({"e": torch.nn.Embedding(4, 4), "l": torch.nn.Linear(4, 4)}))
        logging.getLogger("askew_kernels").warning("something else")
        return Case("4", "float32", "base", [Impl("base", lambda: model["l"](torch.ones(1, 4)), "baseline")], 0)

    monkeypatch.setitem(suites.SUITES, "startup", [Entry("layer", build, ("cpu",))])
    caplog.set_level("WARNING", "askew_kernels")
    list(runs.run_entries(runs.Choice("startup", quick=True), CPU, lambda name: None))
    assert [r.getMessage() for r in caplog.records] == ["something else"]
    build(None)
    assert "stay float" in caplog.text
