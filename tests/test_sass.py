"""Contract: what ``python -m askew_kernels sass`` counts is the usual path of a kernel's hot loop, and its check fails
where a kernel spills or grows (askew_kernels/bench/machine_code.py, sass.py).

Loops here are written by hand in nvdisasm's words, so that the right count can be read off them. Whether the committed
table is that of the kernels is asked by ``make sass-check`` (sm_90) and by the slow test (all architectures).
"""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import time
from dataclasses import replace

import pytest

from askew_kernels import __main__ as cli
from askew_kernels import command
from askew_kernels.bench import machine_code, sass
from askew_kernels.bench.machine_code import Region, Wanted
from askew_kernels.command import Refused

HEAD = '\t.section\t.text.{name},"ax",@progbits\n.text.{name}:\n'


def kernel(code):
    """One line for each instruction or label; addresses are made here."""
    lines, at = [HEAD.format(name="k")], 0
    for line in filter(None, map(str.strip, code.splitlines())):
        if line.startswith("."):
            lines.append(line)
            continue
        lines.append(f"        /*{at:04x}*/    {line} ;")
        at += 16
    return machine_code.read_kernels("\n".join(lines))[0]


def counted(code, exactly, at_least=None, rounds=1.0):
    """(usual, longest) path of the innermost loop that has one."""
    k = kernel(code)
    loops = machine_code.find_loops(k.blocks)
    for loop in [*loops, None]:
        region, wanted = Region(k, loop, loops), Wanted(exactly, at_least or {}, rounds)
        if usual := machine_code.path(region, wanted):
            return usual, machine_code.path(region, wanted, longest=True)
    return None


VECTORS = """
    S2R R0, SR_TID.X
.L_x_1:
    ISETP.NE.AND P0, PT, RZ, UR4, PT
    BSSY B0, `(.L_x_3)
    @!P0 BRA `(.L_x_2)
    LDG.E.128 R4, desc[UR6][R2.64]
    BRA `(.L_x_4)
.L_x_2:
    LDG.E R4, desc[UR6][R2.64]
    LDG.E R5, desc[UR6][R2.64+0x4]
.L_x_4:
    BSYNC B0
.L_x_3:
    FMUL R4, R4, R9
    FADD R5, R5, R9
    MUFU.RCP R10, R5
    ISETP.GT.U32.AND P1, PT, R10, 0x1ffffff, PT
    @P1 BRA `(.L_x_5)
    CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath)
    BRA `(.L_x_6)
.L_x_5:
    FFMA R10, R10, R11, R12
.L_x_6:
    ISETP.NE.AND P2, PT, RZ, UR4, PT
    @!P2 BRA `(.L_x_7)
    STG.E.128 desc[UR6][R2.64], R4
    BRA `(.L_x_8)
.L_x_7:
    STG.E desc[UR6][R2.64], R4
    STG.E desc[UR6][R2.64+0x4], R5
.L_x_8:
    @P3 BRA `(.L_x_1)
    EXIT
"""


def test_the_usual_path_is_the_one_with_wide_accesses_and_without_the_slow_division():
    usual, longest = counted(VECTORS, {"LDG.16": 1, "STG.16": 1})
    # 2 + 1 | 2 | 1 | 5 | 1 | 2 | 2 | 1
    assert usual.instructions == longest.instructions == 17
    assert usual.counts == {"int": 3, "control": 8, "memory": 2, "fp32": 3, "conversion": 1}
    assert usual.slow_calls == 1 and usual.looped
    assert counted(VECTORS, {"LDG.4": 2, "STG.4": 2})[0].instructions == 17
    # the condition of the loads and that of the stores is the same number: never one of each
    assert counted(VECTORS, {"LDG.16": 1, "STG.4": 2}) is None
    apart = VECTORS.replace("ISETP.NE.AND P2, PT, RZ, UR4, PT", "ISETP.NE.AND P2, PT, RZ, UR5, PT")
    assert counted(apart, {"LDG.16": 1, "STG.4": 2})[0].instructions == 17


def test_a_condition_that_changed_in_between_may_be_answered_anew():
    between = VECTORS.replace("FMUL R4, R4, R9", "UIADD3 UR4, UR4, 0x1, URZ")
    assert counted(between, {"LDG.16": 1, "STG.4": 2}) is not None
    switched = VECTORS.replace("FMUL R4, R4, R9", "@P6 UMOV UR4, URZ")
    assert counted(switched, {"LDG.16": 1, "STG.4": 2}) is not None
    untouched = VECTORS.replace("FMUL R4, R4, R9", "UIADD3 UR8, UR4, 0x1, URZ")
    assert counted(untouched, {"LDG.16": 1, "STG.4": 2}) is None


NESTED = """
.L_x_1:
    LDG.E.128 R4, desc[UR6][R2.64]
    @P0 BRA `(.L_x_3)
.L_x_2:
    LDS R6, [R7]
    FADD R5, R5, R6
    @P1 BRA `(.L_x_2)
.L_x_3:
    STG.E.128 desc[UR6][R2.64], R4
    @P2 BRA `(.L_x_1)
    EXIT
"""


def test_loops_inside_count_as_often_as_they_run_and_only_where_the_case_needs_them():
    usual, longest = counted(NESTED, {"LDG.16": 1, "STG.16": 1}, rounds=4)
    assert (usual.instructions, longest.instructions) == (4, 16)
    searched, _ = counted(NESTED, {"LDG.16": 1, "STG.16": 1}, {"LDS|LDS.64": 1}, rounds=4)
    assert searched.instructions == 16 and searched.counts["fp32"] == 4
    assert counted(NESTED, {"LDG.16": 1, "STG.16": 1}, {"MUFU.RCP": 1}) is None


@pytest.mark.parametrize("branch", ["BRA.U !UP0, `(.L_x_2)", "@!P0 BRA `(.L_x_2)", "@P0 CALL.REL.NOINC `(.L_x_2)"])
def test_every_kind_of_branch_has_two_sides(branch):
    code = f".L_x_1:\nLDG.E.128 R4, desc[UR6][R2.64]\n{branch}\nFADD R4, R4, R5\n.L_x_2:\n@P3 BRA `(.L_x_1)\nEXIT"
    usual, longest = counted(code, {"LDG.16": 1})
    assert (usual.instructions, longest.instructions) == (3, 4)
    assert usual.slow_calls == 0  # a CALL of a label is a jump


def test_a_kernel_without_a_loop_is_counted_from_start_to_end():
    code = "LDG.E.128 R4, [R2.64]\n@P0 EXIT\nSTG.E.128 [R2.64], R4\nEXIT\nNOP"
    usual, _ = counted(code, {"LDG.16": 1, "STG.16": 1})
    assert usual.instructions == 4 and not usual.looped
    assert counted(code, {"LDG.16": 1, "STG.16": 0})[0].instructions == 2  # it may end where an EXIT is conditional


def test_names_and_resources_are_read_as_the_compiler_writes_them():
    long = (
        "void askew::cuda::(anonymous namespace)::quantize_kernel<0, askew::cuda::(anonymous namespace)::BinaryGrid, "
    )
    assert sass.split_name(long + "(askew::QuantizePass)2>(askew::cuda::(anonymous namespace)::Pass)") == (
        "quantize_kernel", ["0", "BinaryGrid", "2"])  # fmt: skip
    assert sass.split_name("askew::cuda::(anonymous namespace)::mix_rows_kernel(askew::X)") == ("mix_rows_kernel", [])
    said = """ptxas info    : Compiling entry function '_Zk' for 'sm_90'
ptxas info    : Function properties for _Zk
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 8 bytes cumulative stack size, 384 bytes smem
"""
    assert sass.resources(said) == {"_Zk": {"registers": 80, "stack": 8, "spilled": 28, "shared": 384}}


COUNT = sass.Count("sm_90", "update", "k<fp32>", "hold", 40, 0, 0, 0, 4, 96.0, 0.0, 120.0, {"fp32": 16.0, "int": 60.0,
                   "logic": 4.0, "control": 16.0}, 12.0)  # fmt: skip


def test_the_prediction_is_the_slowest_of_memory_issue_and_pipes():
    h200 = sass.DEVICES["H200"]
    assert COUNT.warps == 48
    memory = 12 / 4.3e12
    second = 132 * 1.75e9  # cycles of all SMs
    # the pipe of integers and logic, 64 lanes wide, is busy for a cycle; the issue for 96 / (128 x (0.7 + 0.3 x 24/40))
    assert sass.predict(COUNT, h200) == pytest.approx(memory / (1 / second))
    slow = replace(COUNT, instructions=400.0)
    assert sass.predict(slow, h200) == pytest.approx(memory / (400 / (128 * 0.88) / second))
    assert sass.predict(replace(COUNT, classes={"fp32": 16.0}, instructions=20.0), h200) == 1.0
    full = replace(COUNT, classes={"int": 300.0, "logic": 20.0})
    assert sass.predict(full, h200) == pytest.approx(memory / (320 / 64 / second))


def test_the_check_notices_growth_new_and_lost_kernels():
    table = {COUNT.key: COUNT}
    assert sass.differences([replace(COUNT, instructions=98.8)], table) == []
    assert "98.9 instructions an element, 96.0 in" in sass.differences([replace(COUNT, instructions=98.9)], table)[0]
    spilling = replace(COUNT, spilled=8)
    for known in (table, {COUNT.key: spilling}):  # whatever the table says
        assert sass.differences([spilling], known) == ["sm_90, update, k<fp32>, hold: spills 8 bytes"]
    assert "1 slow paths, 0 in the table" in sass.differences([replace(COUNT, slow_calls=1)], table)[0]
    assert "annealed: not in the table" in sass.differences([replace(COUNT, case="annealed"), COUNT], table)[0]
    other = replace(COUNT, kernel="k<bf16>")
    assert "k<bf16>, hold: in the table, no longer" in sass.differences([COUNT], {**table, other.key: other})[0]
    assert sass.differences([COUNT], {**table, other.key: other}, all_files=False) == []
    assert (
        sass.differences([COUNT], {**table, ("sm_80", "update", "k", ""): other}) == []
    )  # an architecture that was not asked


def test_the_committed_table_reads_back(tmp_path):
    nvcc, table = sass.read_table()
    assert nvcc and {key[0] for key in table} == set(sass.ARCHS)
    assert all(0 < s <= 1 for c in table.values() for s in c.share.values())
    copy = tmp_path / "table.json"
    copy.write_text(sass.as_json([*table.values()], nvcc))
    assert copy.read_text() == sass.TABLE.read_text()
    assert sass.as_markdown([*table.values()], nvcc) == sass.TABLE.with_name("README.md").read_text()
    assert "PREDICTED" in sass.PREFACE
    page = sass.PAGE.read_text()
    assert sass.filled(page, [*table.values()]) == page and "**These are predictions" in page


def test_the_headlines_are_kernels_of_the_table():
    _, table = sass.read_table()
    there = {(c.kernel, c.case) for c in table.values()}
    assert [text for text, kernel, case in sass.HEADLINES if (kernel, case) not in there] == []


def test_what_cannot_be_served_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sass.shutil, "which", lambda *a, **k: None)
    with pytest.raises(Refused, match="nvcc was not found"):
        sass.find_tools()
    assert cli.main(["sass"]) == 2
    assert capsys.readouterr().err.startswith("askew_kernels: sass: nvcc was not found")
    assert cli.main(["sass", "--check"]) == 0
    assert "nvcc was not found; it comes with the CUDA toolkit: nothing is checked" in capsys.readouterr().out
    assert cli.main(["sass", "--write", "--arch", "sm_90"]) == 2
    capsys.readouterr()
    for arguments, said in (("--listing", "--listing: of which kernels?"), ("--write --check", "take one of them"),
                            ("--file quantize moon", "got moon"), ("--kernel moon", "got 'moon'")):  # fmt: skip
        assert cli.main(["sass", *arguments.split()]) == 2
        assert said in capsys.readouterr().err
    sass.check_names(["lowbit"], "BinaryGrid")
    sass.check_names([], "")


def tools():
    try:
        return sass.find_tools()
    except Refused as missing:
        pytest.skip(str(missing))


SPILLING = """
extern "C" __global__ void spilling(float* p, const int* order) {
  float v[64];
#pragma unroll
  for (int k = 0; k < 64; ++k) v[k] = p[threadIdx.x + 1024 * k];
  for (int k = 0; k < 64; ++k) p[threadIdx.x + 1024 * k] = v[order[k]];
}
"""  # an array whose places are known at run time only stands in local memory


def test_a_kernel_that_spills_is_reported(tmp_path, monkeypatch):
    found = tools()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("NVCC_FLAGS = ['-O3']\n")
    source = tmp_path / "spill.cu"
    source.write_text(SPILLING)
    monkeypatch.setattr(sass, "ROOT", tmp_path)
    monkeypatch.setattr(sass, "FOLDER", tmp_path / "build")
    measured = sass.measure_file(source, "sm_90", found)
    assert len(measured.spilling) == 1 and "spilling" in measured.spilling[0]
    first = sass.compiled(source, "sm_90", found)[0]
    stamp = first.stat().st_mtime_ns
    assert sass.compiled(source, "sm_90", found)[0].stat().st_mtime_ns == stamp  # kept
    source.write_text(SPILLING + "\n")
    assert sass.compiled(source, "sm_90", found)[0] != first and not first.exists()


def asleep(source, arch, tools):
    time.sleep(60)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, command.Terminated])
def test_an_interruption_waits_for_no_compiler(stop, monkeypatch):
    """Though the signal reaches this process alone; what was compiled is kept, and said."""

    def interrupt(number, frame):
        raise stop

    monkeypatch.setattr(sass, "measure_file", asleep)
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    other.start()  # somebody else's
    others = set(multiprocessing.active_children())
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(stop, match="what was compiled is kept in .*sass"):
            sass.measure(["sm_90"], [], None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert other.is_alive() and not any(w.is_alive() for w in set(multiprocessing.active_children()) - others)
    other.kill()


def test_an_architecture_that_nvcc_does_not_know_is_refused(capsys):
    tools()
    assert cli.main(["sass", "--arch", "sm_1"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("askew_kernels: --arch: expected some of sm_") and "got 'sm_1'" in err and err.count("\n") == 1
    )


def test_the_flags_are_those_of_the_build():
    flags = sass.nvcc_flags()
    assert "--fmad=false" in flags and flags[0].startswith("-std=")


@pytest.mark.slow
def test_the_committed_table_is_that_of_the_kernels():
    tools()
    done = subprocess.run(["make", "-n", "sass-check"], cwd=sass.ROOT, capture_output=True, text=True)
    assert "askew_kernels sass --check" in done.stdout  # what CI runs
    assert cli.main(["sass", "--check"]) == 0
