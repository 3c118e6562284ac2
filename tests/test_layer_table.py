"""Contract: the table of docs/layers.md.

1. It has a column for every kind of layers, and every cell is what trying it gives.
2. What is refused is refused by an error that names the layer, in words that stand below the table.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from askew_kernels.nn import KINDS
from experiments import layers

PAGE = Path(__file__).parent.parent / "docs" / "layers.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="installed without its documents")


def told():
    """({(kind, cell): word}, {(kind, cell): reason}) of the page."""
    text = layers.MARKS.search(PAGE.read_text(encoding="utf-8"))[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    assert rows[0][1:] == list(layers.HEADS.values()) and [row[0] for row in rows[2:]] == list(layers.CELLS)
    found = {(kind, row[0]): word for row in rows[2:] for kind, word in zip(layers.HEADS, row[1:], strict=True)}
    return {key: (word.partition(" ")[0], reasons[word[word.index("[") + 1 : -1]] if "[" in word else "")
            for key, word in found.items()}  # fmt: skip


def test_every_kind_has_a_column():
    assert set(layers.HEADS) == set(layers.CASES) == set(KINDS)


@pytest.mark.parametrize("kind", layers.HEADS)
def test_every_cell_is_what_trying_it_gives(kind):
    page = told()
    for cell in layers.CELLS:
        try:
            got = layers.tried(kind, cell)
        except ImportError:  # a format's own library
            continue
        assert got == page[kind, cell], f"{cell}: make it anew: python -m experiments.layers --fill docs/layers.md"
        assert (got[0] == "no") == bool(got[1])


def test_the_table_of_caches_is_what_trying_gives():
    page = layers.CACHE_MARKS.search(PAGE.read_text(encoding="utf-8"))
    assert page[2] == layers.cache_table() + "\n"


def test_a_cell_can_fail(monkeypatch):
    """What is wrong is raised, and does not become a "no"."""
    monkeypatch.setattr(layers.ak, "hard_quantize_", broken)
    with pytest.raises(AssertionError, match="changes the outputs"):
        layers.tried("linear", next(iter(layers.CELLS)))


def broken(model):
    for p in model.parameters():
        p.data.mul_(2)
    return model
