"""Contract: docs/scale.md.

1. What its formulas say a rank holds and a step communicates is what runs of 2 and 4 processes hold and communicate, to
   the byte, before and after scales freeze.
2. Its tables are those formulas.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import scale

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("optimizer", [
    pytest.param(name, marks=[] if name in ("ASkewAdamW", "LookSAM") else pytest.mark.slow) for name in scale.KEEPS
])  # fmt: skip
def test_formulas_are_counted(ranks, optimizer, world):
    for rank, (held, follows, frozen) in enumerate(ranks.call(scale.counted, optimizer, world=world)):
        assert held == scale.held(scale.SMALL, optimizer, world, rank)
        assert follows == scale.sent(scale.SMALL, optimizer, world)
        assert frozen == scale.sent(scale.SMALL, optimizer, world, follows=False)


@pytest.mark.skipif(not PAGE.is_file(), reason="installed without its documents")
def test_the_tables_are_the_formulas():
    assert scale.MARKS.search(PAGE.read_text(encoding="utf-8"))[2] == scale.tables()


def test_shares_of_a_dimension():
    assert [scale.own(3, 4, rank) for rank in range(4)] == [1, 1, 1, 0]
    assert sum(scale.own(33, 4, rank) for rank in range(4)) == 33
