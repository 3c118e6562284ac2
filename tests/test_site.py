"""Contract: the site teaches what works.

1. The tutorial, run as one session, prints what its pages show (numbers within a tenth: processors differ).
2. The first page, every how-to page and every explanation run, each alone, from their first line to their last.
3. The site builds without a warning; every link inside it leads somewhere, every picture has a text, and every public
   name is in the reference. The checks that say so can fail.
4. The pictures of the explanation are drawn by what the package computes.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIAL = ["mlp", "convolution", "gpt", "pack", "deploy"]
ALONE = [DOCS / "start.md", *sorted((DOCS / "howto").glob("*.md")), *sorted((DOCS / "explanation").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```$)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="installed without its documents")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def agree(printed, shown):
    """The same text, and numbers within a tenth, or 2."""
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return NUMBER.sub("#", printed) == NUMBER.sub("#", shown) and all(
        abs(float(a) - float(b)) <= 2 + 0.1 * abs(float(b)) if "." in b else a == b or abs(int(a) - int(b)) <= 8
        for a, b in pairs
    )


def run(page, names):
    """Every block of a page, one after another; what is shown below a block is what it printed."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        line, out = text[: block.start()].count("\n") + 1, io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + block["code"], str(page), "exec"), names)
        if block["shown"] is not None:
            assert agree(out.getvalue(), block["shown"]), f"{page.name}:{line} printed\n{out.getvalue()}"


def test_tutorial():
    pytest.importorskip("sklearn")
    names = {"__name__": "tutorial"}
    for page in TUTORIAL:
        run(DOCS / "tutorial" / f"{page}.md", names)


def test_the_tutorial_is_read_in_this_order():
    pages = [(DOCS / "tutorial" / f"{page}.md").read_text() for page in TUTORIAL]
    assert all(f"]({after}.md)" in text for text, after in zip(pages, TUTORIAL[1:], strict=False))
    assert {path.stem for path in (DOCS / "tutorial").glob("*.md")} == set(TUTORIAL)


@pytest.mark.parametrize("page", ALONE, ids=lambda path: path.stem)
def test_page(page):
    if page.stem == "bits":
        pytest.importorskip("scipy")
    run(page, {"__name__": "page"})


def test_what_is_shown_is_compared():
    assert agree("accuracy 97.2%\n", "accuracy 96.5%\n") and agree("step 75: 0.1\n", "step 75: 0.7\n")
    assert (
        not agree("accuracy 47.2%\n", "accuracy 96.5%\n") and not agree("a 1\n", "b 1\n") and not agree("100\n", "75\n")
    )


@pytest.fixture
def site_parts(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(DOCS))
    import site_parts

    return site_parts


@pytest.mark.slow
def test_site(tmp_path):
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-c",
        DOCS,
        ROOT,
        tmp_path / "site",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "docs" / "explanation" / "constraint.html").read_text()
    assert "<math" in page and "https://cdn" not in page  # formulas without a script from elsewhere


def test_broken_links_are_found(site_parts, tmp_path):
    good = '<a href="b.html#here">b</a> <a href="https://example.org/x">out</a> <img src="p.png" alt="a picture">'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text('<p id="here">')
    (tmp_path / "p.png").write_bytes(b"")
    assert not site_parts.broken_links(tmp_path)
    (tmp_path / "a.html").write_text(good + '<a href="c.html">c</a><a href="b.html#there">b</a><img src="p.png">')
    assert len(site_parts.broken_links(tmp_path)) == 3


def test_missing_names_are_found(site_parts):
    objects = dict.fromkeys(site_parts.public_names())
    app = SimpleNamespace(env=SimpleNamespace(domains={"py": SimpleNamespace(objects=objects)}))
    assert not site_parts.missing_names(app)
    del objects["askew_kernels.optim.ASkewSGD"]
    assert site_parts.missing_names(app) == ["askew_kernels.optim.ASkewSGD"]


def test_docstrings_become_what_they_say(site_parts):
    lines = ["x * y_ and ``f(*a)``s; see docs/packed.md, as:", "", "    w <- w + 1", "", "End."]
    made = site_parts.plain_to_rst(lines)
    assert made[0] == r"x \* y\_ and ``f(*a)``\ s; see :doc:`/docs/packed`, as:"
    assert made[made.index("::") + 2] == "        w <- w + 1" and made[-2:] == ["End.", ""]


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    import runpy

    module = runpy.run_path(str(DOCS / "pictures" / "make.py"))
    module["main"](tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DOCS / "pictures").glob("*.svg")}
    assert module["radius"](1.0) == 0.5 and module["radius"](1.6e-5) < 2e-3
