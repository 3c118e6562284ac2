"""What the site needs beside Sphinx: docstrings as they are written here, formulas as MathML, and two checks of a
finished build, of every link inside it and of every public name."""

from __future__ import annotations

import contextlib
import html
import importlib
import inspect
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urldefrag

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging

from askew_kernels.__main__ import COMMANDS, main

PUBLIC = [  # the modules whose ``__all__`` is the interface
    "askew_kernels", "askew_kernels.quant", "askew_kernels.nn", "askew_kernels.optim", "askew_kernels.ops",
    "askew_kernels.analysis", "askew_kernels.search",
]  # fmt: skip
TITLES = {
    "benchmarks/results/accuracy": "Accuracy of the demo",
    "benchmarks/results/evidence/evidence": "Accuracy beside rivals",
    "benchmarks/results/sam/sam": "Sharpness-aware training",
    "benchmarks/results/search/search": "Searched policies",
    "benchmarks/results/nvidia-h200/host_time": "Time on the host",
}
OUTSIDE = re.compile(r"[a-z][a-z0-9+.-]*:|//")  # of other sites
LITERAL = re.compile(r"(``.+?``)", re.DOTALL)


# ---- docstrings ------------------------------------------------------------------------------------------------------


def plain_to_rst(lines: list[str]) -> list[str]:
    """Docstrings are plain text: ``code`` in double backquotes, indented lines are code or a table, everything else is
    meant as it stands."""
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        if not paragraph.strip():
            continue
        first = paragraph.splitlines()[0]
        if first.startswith(" "):
            made += ["::", "", *_literal(paragraph.splitlines()), ""]
            continue
        head, block = _split(paragraph.splitlines())
        made += [*_escaped("\n".join(head)).splitlines(), ""]
        if block:
            made += ["::", "", *_literal(block), ""]
    return made


def _literal(lines: list[str]) -> list[str]:
    return [f"    {line.replace('``', '')}" for line in lines]


def _split(lines: list[str]) -> tuple[list[str], list[str]]:
    """A paragraph's text and the indented lines that may follow it."""
    start = next((i for i, line in enumerate(lines) if line.startswith("  ")), len(lines))
    rest = lines[start:]
    if all(line.startswith("  ") for line in rest):
        return lines[:start], rest
    return lines, []


def _escaped(text: str) -> str:
    pieces = LITERAL.split(re.sub(r"::$", ":", text))  # the block that follows gets its own
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"(?<![\w*])\*([A-Z][^*\n]*\n?[^*\n]*\w)\*(?![\w*])|([\\*`|])", _emphasis, pieces[i])
        pieces[i] = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", pieces[i])
        pieces[i] = re.sub(r"\bdocs/([a-z]+)\.md\b", r":doc:`/docs/\1`", pieces[i])
    for i in range(1, len(pieces), 2):  # what touches a literal is parted from it
        before, after = pieces[i - 1][-1:], pieces[i + 1][:1]
        pieces[i] = "\\ " * bool(before.strip()) + pieces[i] + "\\ " * bool(after.strip())
    return "".join(pieces)


def _emphasis(found: re.Match[str]) -> str:
    """*Titles of works* are in italics; any other asterisk is one."""
    return f"*{found[1]}*" if found[1] else f"\\{found[2]}"


def docstrings(app, what, name, obj, options, lines):
    lines[:] = plain_to_rst(lines)


# ---- pages -----------------------------------------------------------------------------------------------------------


def titled(app, name, source):
    """Pages that a command made are tables without a heading."""
    if not re.search(r"^# ", source[0], re.MULTILINE):
        source[0] = f"# {TITLES.get(name, Path(name).name)}\n\n{source[0]}"
    if name == app.config.root_doc and (rest := unlisted(source[0])):
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", ":caption: More", "", *rest, "```", ""])
    if "<!-- commands -->" in source[0]:
        source[0] = source[0].replace("<!-- commands -->", commands())


def unlisted(index: str) -> list[str]:
    """Pages beside the index that it does not name."""
    return sorted(
        p.stem for p in Path(__file__).parent.glob("*.md") if f"\n{p.stem}\n" not in index and p.stem != "index"
    )


def commands() -> str:
    """What each command says of itself with --help."""
    with mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"):
        return "\n".join(f"## {name}\n\n```text\n{_help_of(name)}```\n" for name in ("info", *COMMANDS))


def _help_of(command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return out.getvalue()


# ---- formulas --------------------------------------------------------------------------------------------------------


def mathml(node: nodes.Node, block: bool) -> str:
    try:
        return tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s", error, location=node)
        return f"<code>{html.escape(node.astext())}</code>"


def inline_formula(writer, node):
    writer.body.append(mathml(node, False))
    raise nodes.SkipNode


def formula(writer, node):
    writer.body.append(f'<div class="formula">{mathml(node, True)}</div>\n')
    raise nodes.SkipNode


# ---- checks of a finished build --------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.names, self.silent = [], {""}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}
        self.links += [values[key] for key in ("href", "src") if values.get(key)]
        if tag == "img" and not values.get("alt", "").strip():
            self.silent.append(values.get("src"))


def broken_links(folder: Path) -> list[str]:
    """Every link of a built site that leads nowhere in it, and every picture without a text in its place."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(folder)
        found += [f"{where}: {source} has no alt text" for source in page.silent]
        for link in sorted(set(page.links)):
            if OUTSIDE.match(link):
                continue
            target, name = urldefrag(link)
            file = (path.parent / unquote(target).partition("?")[0]).resolve() if target else path
            if not file.is_file():
                found.append(f"{where}: {link} is not there")
            elif file in pages and unquote(name) not in pages[file].names:
                found.append(f"{where}: {link}: no such place on that page")
    return found


def public_names() -> dict[str, object]:
    """{full name: object} of all that users may import."""
    names = {}
    for module in PUBLIC:
        there = importlib.import_module(module)
        for name in there.__all__:
            value = getattr(there, name)
            if not inspect.ismodule(value) and not name.startswith("__"):
                names[f"{module}.{name}"] = value
    return names


def missing_names(app: Sphinx) -> list[str]:
    """Public names that no page of the reference describes, under this name or another of the same object."""
    described = [_resolved(name) for name in app.env.domains["py"].objects]  # kept: an id is of what lives
    ids = set(map(id, described))
    return [name for name, value in public_names().items() if id(value) not in ids]


def _resolved(name: str) -> object:
    """What a full name leads to; an attribute goes before a module of the same name, as it does in an import."""
    first, *rest = name.split(".")
    found: object = importlib.import_module(first)
    for i, part in enumerate(rest):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join([first, *rest[: i + 1]]))
            except ImportError:
                return None
        found = getattr(found, part, None)
    return found


def check(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    wrong = [f"{name}: not in the reference" for name in missing_names(app)] + broken_links(Path(app.outdir))
    if wrong:
        raise ExtensionError(f"{len(wrong)} faults of the built site:\n  " + "\n  ".join(map(html.unescape, wrong)))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", docstrings)
    app.connect("source-read", titled)
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
