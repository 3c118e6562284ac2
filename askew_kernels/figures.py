"""The commands' figures: one look, legends beside the data, and the same rows make the same file, byte for byte.

matplotlib is imported when a figure is made, and its global state (pyplot) is left alone.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

from . import atomic

# Okabe and Ito's colours, which people tell apart whatever colours they see: grey (in place of their yellow, too light
# on white), orange, blue, green, purple, vermilion, sky.
PALETTE = ("#7f7f7f", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
MARKERS = "osD^vPX"  # beside the colours, so that a print in grey shows them, too


def figure(
    rows: int, columns: int, width: float, height: float, layout: Any = "constrained", **options: Any
) -> tuple[Any, list[Any]]:
    """(the figure, its panels row by row); width and height are the whole figure's, in inches."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout=layout)
    return made, list(made.subplots(rows, columns, squeeze=False, **options).flat)


def plain(text: object) -> str:
    """As it is written, which with two dollars would be a formula."""
    return str(text).replace("$", r"\$")


def label(axis: Any, title: str = "", x: str = "", y: str = "", grid: str = "y") -> None:
    axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    axis.set_xlabel(x, fontsize=8.5)
    axis.set_ylabel(y, fontsize=8.5)
    axis.tick_params(labelsize=8)
    axis.grid(axis=grid, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Any, axes: Iterable[Any], columns: int = 4) -> None:
    """One legend for all panels, under them."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=8.5)


def means(axis: Any, names: Sequence[str], series: dict[str, Sequence[tuple[float, float] | None]]) -> None:
    """(mean, standard deviation) of each series at each name, side by side, as dots with error bars."""
    for i, (text, values) in enumerate(series.items()):
        shift = 0.7 / max(len(series), 1) * (i - (len(series) - 1) / 2)
        known = [(place + shift, *v) for place, v in enumerate(values) if v is not None]
        if known:
            places, middle, spread = zip(*known, strict=True)
            look = {"fmt": MARKERS[i % len(MARKERS)], "color": PALETTE[i % len(PALETTE)]}
            axis.errorbar(places, middle, spread, **look, capsize=2.5, markersize=4.5, label=text)
    axis.set_xticks(range(len(names)), names)


def image(figure: Any, suffix: str, dpi: int = 120) -> bytes:
    """One file's contents. ValueError for a format that matplotlib does not write."""
    return next(iter(save(figure, "it", (suffix,), dpi).values()))


def write(figure: Any, path: str | os.PathLike) -> None:
    """That very path, whole or not at all: in the format of its suffix, png without one."""
    atomic.write(path, image(figure, os.path.splitext(os.fspath(path))[1][1:] or "png"))


def save(figure: Any, name: str, suffixes: Sequence[str] = ("png", "svg"), dpi: int = 130) -> dict[str, bytes]:
    """File name -> contents."""
    import matplotlib

    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "askew_kernels", "svg.fonttype": "none"}):  # text stays text
        for suffix in suffixes:
            out = io.BytesIO()
            figure.savefig(out, format=suffix, dpi=dpi, metadata={"Date": None} if suffix == "svg" else {})
            files[f"{name}.{suffix}"] = out.getvalue()
            figure.set_layout_engine("none")  # laid out by the first
    return files
