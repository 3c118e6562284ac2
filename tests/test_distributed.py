"""Contract: what docs/distributed.md says of many processes (gloo, on the CPU).

1. Its tables are what trying gives: sharded, replicated and tensor-parallel training is one process's, scales bit for
   bit where rows are whole, in float64 to 1e-10; what is refused is refused by name, on every rank alike.
2. Checkpoints of ``torch.distributed.checkpoint`` go on bit for bit, before and after freezing, and from 4 ranks to 2
   to 1; so do ``get_state_dict`` and ``set_state_dict``.
3. Packed layers split by torch's styles compute what the whole ones do, from their share of the codes.
4. A stage of a pipeline trains its part by name; a traced one serves.
5. Under FSDP2's mixed precision scales are the float32 weights'.
6. Split models with learned scales bear what people do with models: clipped norms, gradients kept back, activation
   checkpointing, tied weights, the meta device, other optimizers; what comes too late is refused by name.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import rank_cases as cases
import torch

import askew_kernels as ak
from askew_kernels.quant import Binary, Ternary, Uniform
from experiments import distribution
from experiments.distribution import CONFIG_CELLS, FIRST, OPTIMIZER_CELLS, OPTIMIZERS, SHORT, STEPS

PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
USUAL = ("FSDP2", distribution.SPLITS["tensor parallel"])
SLOW = [cell for cell in OPTIMIZER_CELLS if cell not in SHORT]


def told():
    """{(way, optimizer, config): (word, reason)} of the page."""
    text = distribution.MARKS.search(PAGE.read_text(encoding="utf-8"))[2]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found, split = {}, next(i for i, row in enumerate(rows) if i and not row[0])
    for head, *body in (rows[:split], rows[split:]):
        for name, *words in body:
            for column, word in zip(head[1:], words, strict=True):
                cell = (name, column, FIRST) if name in distribution.WAYS else (
                    distribution.SPLITS[column], "ASkewSGD", name)  # fmt: skip
                said, _, number = word.partition(" [")
                found[cell] = said, reasons[number[:-1]] if number else ""
    return found


def check(ranks, cells):
    if PAGE.is_file():
        page = told()
        for cell, got in distribution.tried(ranks, cells).items():
            assert got == page[cell], (
                f"{cell}: make it anew: python -m experiments.distribution --fill docs/distributed.md"
            )


def test_the_page_has_every_cell():
    if PAGE.is_file():
        assert told().keys() == {*OPTIMIZER_CELLS, *CONFIG_CELLS}


def test_ways_and_optimizers(ranks):
    check(ranks, SHORT)


@pytest.mark.slow
def test_every_way_with_every_optimizer(ranks):
    check(ranks, SLOW)


def test_scales_and_forwards(ranks):
    check(ranks, [cell for cell in CONFIG_CELLS if cell[0] in USUAL])


@pytest.mark.slow
def test_scales_and_forwards_in_other_ways(ranks):
    check(ranks, [cell for cell in CONFIG_CELLS if cell[0] not in USUAL])


def test_a_cell_can_fail(ranks, monkeypatch):
    cell = SHORT[0]
    run = ranks.call(distribution.cells, [cell])[0][0]
    run.weights[0].add_(1e-6)
    with pytest.raises(AssertionError, match="weights are 1.0e-06"):
        distribution.word(cell, [run])
    run.weights[0].sub_(1e-6)
    run.scales[0][0].mul_(1 + 2e-7)
    with pytest.raises(AssertionError, match="scales of step 0"):
        distribution.word(cell, [run])


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("ASkewAdamW", "AlignedSAM") else pytest.mark.slow) for name in OPTIMIZERS
])  # fmt: skip
@pytest.mark.parametrize("at", [4, 9], ids=["hold", "frozen"])
def test_resumes_bit_for_bit(ranks, name, at, tmp_path):
    assert cases.HOLD < 9
    for rank in ranks.call(cases.resumed, name, str(tmp_path), at):
        assert rank == {"plain": [], "flattened": [], "full": [], "files": []}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("ASkewSGD", "LookSAM") else pytest.mark.slow) for name in OPTIMIZERS
])  # fmt: skip
def test_resharding_4_to_2_to_1(ranks, name, tmp_path):
    folder = str(tmp_path)
    legs = [ranks.call(cases.leg, name, folder, first, last, world=world)[0]
            for world, first, last in ((4, 0, 4), (2, 4, 12), (1, 12, STEPS))]  # fmt: skip
    for (_, after, _), (before, _, _) in itertools.pairwise(legs):
        # where no radius follows it, the gap is each rank's own, of which a checkpoint keeps one
        assert set(cases.same(after, before)) <= ({"group sam_gap"} if name != "AlignedSAM" else set())
    one = cases.Training(name, cases.ALONE).go(0, STEPS)
    for got, want in zip(legs[-1][2], one.weights(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_embedding_under_tensor_parallelism(ranks, style):
    for got, want in ranks.call(cases.embedding, style):
        assert all(map(torch.equal, got, want))


PACKED = {
    "4 bits": (ak.QuantConfig(Uniform(4)), False, True, (32, 48, 16)),
    "3 bits, groups": (ak.QuantConfig(Uniform(3), "absmax", "per_group", 8), False, False, (32, 48, 16)),
    "one scale": (ak.QuantConfig(Binary(), granularity="per_tensor"), False, True, (32, 48, 16)),
    "trits": (ak.QuantConfig(Ternary()), True, True, (20, 40, 10)),
    "8-bit inputs": (ak.QuantConfig(Uniform(4), activation=Uniform(8)), False, True, (32, 48, 16)),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_layers_split(ranks, case):
    for off in ranks.call(cases.packed, *PACKED[case]):
        assert max(off) < 1e-5  # sums of at most 48 products near 1, added in another order


@pytest.mark.parametrize("case", [case for case in PACKED if case != "8-bit inputs"])
def test_packed_layers_with_int8_activations(ranks, case):
    """A token has one scale over all ranks, so that the split layers round as the whole ones do."""
    config, trits, _, sizes = PACKED[case]
    for off, rounding in ranks.call(cases.packed_int8, config, trits, sizes):
        assert off < 1e-6 and rounding > 1e-3


@pytest.mark.parametrize("entries", [10, 3])
@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_packed_embeddings_split(ranks, style, entries):
    """Bit for bit, uneven and with a rank that has no entry (3 of 4 ranks)."""
    config = ak.QuantConfig(Uniform(4), "absmax", "per_group", 8)
    world = 2 if style == "colwise" else 4
    shares = []
    for got, want, share, kept in ranks.call(cases.packed_embedding, style, config, entries, world=world):
        assert torch.equal(got, want) and kept
        shares.append(share)
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(("case", "words"), [("bytes", "whole bytes"), ("groups", "group_size"),
                                             ("embedding", "whole bytes")])  # fmt: skip
def test_packed_layers_that_cannot_be_split(ranks, case, words):
    assert all(words in told for told in ranks.call(cases.refused_packed, case))


def test_a_stage_trains_its_part_by_name(ranks):
    stages = ranks.call(cases.trained_pipeline)
    assert [sorted({key.split(".")[0] for key in stage}) for stage in stages] == [["0"], ["2", "4"]]
    for stage in stages:
        for got, want in stage.values():
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # float32; levels stand 0.05 apart


def test_a_traced_stage_serves(ranks):
    found, want = ranks.call(cases.traced_pipeline)[1]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ASkewAdamW", "SAM"])
def test_mixed_precision(ranks, name):
    for changed, off, hard, again in ranks.call(cases.mixed, name):
        assert changed == [] and off == 0.0 and hard == 0.0 and again == []


@pytest.mark.parametrize("case", ["clipped norms", "gradients kept back", "activation checkpointing", "two optimizers",
                                  "tied weights", "a rank without a row", "from the meta device", "moved"])  # fmt: skip
def test_everyday(ranks, case):
    assert max(ranks.call(cases.everyday, case)) < 1e-7  # float32 scales


def test_saved_while_training_goes_on(ranks, tmp_path):
    assert ranks.call(cases.saved_meanwhile, str(tmp_path / "saved")) == [[], []]


def test_weights_that_others_write(ranks):
    assert max(ranks.call(cases.written_by_others)) < 1e-12


@pytest.mark.parametrize(("case", "words"), [("quantize_", "0: weight: is split over ranks already"),
                                             ("pack_", "weight: is split over ranks, which have no whole codes"),
                                             ("inputs", "activation_scale: the scale of an input starts")])  # fmt: skip
def test_calls_that_come_too_late(ranks, case, words):
    assert all(words in told for told in ranks.call(cases.too_late, case))
