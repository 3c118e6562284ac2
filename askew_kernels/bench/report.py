"""Tables, plots and pages made of rows. Nothing here imports rich or matplotlib before a table or a plot is made."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from .goals import HeadlineFigures, goals, headline_figures
from .rows import BenchError, Row, by_case, by_suite, compare

SIGNS = {"<=": "≤", ">=": "≥"}


def _size(n: float | None) -> str:
    if n is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} B"


def _significant(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _rate(r: Row) -> str:
    return "" if r.rate is None else f"{_significant(r.rate)} {r.rate_unit.replace('million weights', 'Mw')}"


def _threads(r: Row) -> str:
    return f"{r.threads} thread{'s' if r.threads != 1 else ''}"


def _where(r: Row) -> str:
    """Shape, type and allocator of a case."""
    allocator = f"{r.allocator} allocator" if r.device_type == "cpu" else ""
    return ", ".join(filter(None, (r.shape, r.dtype, allocator)))


# Heading -> text of a row's cell; a column that a suite leaves empty is not shown.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "median ms": lambda r: _significant(r.p50),
    "p20–p80": lambda r: f"{_significant(r.p20)}–{_significant(r.p80)}",
    "× baseline": lambda r: _significant(r.ratio),
    "limit ms": lambda r: _significant(r.limit),
    "GB/s": lambda r: _significant(r.gb_per_s),
    "% of copy": lambda r: "" if r.percent_of_copy is None else f"{r.percent_of_copy:.0f}",
    "rate": _rate,
    "peak extra": lambda r: _size(r.peak_bytes),
}


def suite_table(suite: str, rows: list[Row]) -> Any:
    """A rich table of one suite's rows, one section for each case, and below it the notes and what is not there."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    first = rows[0]
    quick = "; quick: small tensors that may fit the caches, not the goals' sizes" if first.quick else ""
    title = f"{suite}: {first.device}, {_threads(first)}, torch {first.torch}{quick}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    table.add_column("implementation", overflow="fold", min_width=30)
    columns = {name: cell for name, cell in COLUMNS.items() if any(cell(r) for r in rows if r.p50 is not None)}
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    styles = {"ours": "green", "baseline": "cyan", "ceiling": "dim"}
    below: dict[str, None] = {}
    for case in by_case(rows).values():
        table.add_section()
        table.add_row(f"[bold]{escape(case[0].op)}[/bold]\n{escape(_where(case[0]))}")
        for r in case:
            style = "red" if r.failed else styles.get(r.kind, "")
            if r.p50 is None and not r.failed:
                below[f"{r.impl}: {r.note}"] = None
                continue
            if r.note and r.kind != "ceiling" and not r.failed:
                below[f"{r.impl}: {r.note}"] = None
            name = r.impl.partition(": first call")[0] + (", first call" if ": first call" in r.impl else "")
            cells = ["failed"] if r.failed else [cell(r) for cell in columns.values()]
            table.add_row(f"  {escape(name)}", *cells, style=style)
    return Group(table, *(f"  [dim]{escape(text)}[/dim]" for text in below))


def plain_report(rows: list[Row]) -> str:
    """The tables as plain lines, for where rich is not installed."""
    lines = []
    for case in by_case(rows).values():
        head = case[0]
        lines.append(f"{head.suite}: {head.op}, {_where(head)}, {head.device}")
        for r in case:
            if r.p50 is None:
                lines.append(f"  {r.impl}: {r.note}")
                continue
            parts = [f"{_significant(r.p50)} {r.unit}"]
            parts += [f"{_significant(r.ratio)} x {r.baseline}"] if r.ratio is not None else []
            parts += [f"{r.percent_of_copy:.0f} % of copy"] if r.percent_of_copy is not None else []
            lines.append(f"  {r.impl}: {', '.join(parts)}")
    for g in goals(rows):
        measured = "not measured" if g.measured is None else f"{g.measured:.3g}, {'reached' if g.reached else 'MISSED'}"
        lines.append(f"goal: {g.goal} {g.sense} {g.wanted:g}: {measured}")
    return "\n".join(lines)


def goals_table(rows: list[Row]) -> Any:
    """A rich table: each goal, what was measured, reached or not; None where no goal applies."""
    from rich.table import Table

    results = goals(rows)
    if not results:
        return None
    quick = any(r.quick for r in rows)
    title = "goals" + (", with the figures of the quick sizes; without --quick they are judged" if quick else "")
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    for name in ("goal", "wanted", "measured", ""):
        table.add_column(name, justify="left" if name == "goal" else "right", overflow="fold")
    for g in results:
        sign = SIGNS[g.sense]
        if g.measured is None:
            table.add_row(g.goal, f"{sign} {g.wanted:g}", "not measured", "–", style="dim")
        else:
            mark = "" if quick else "[green]✓[/green]" if g.reached else "[red]✗[/red]"
            table.add_row(g.goal, f"{sign} {g.wanted:g}", f"{g.measured:.3g}", mark)
    return table


# ---- an earlier run --------------------------------------------------------------------------------------------------


def comparison_report(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """Lines: every row that moved beyond its own spread, the largest factor first, and what could not be compared."""
    moves, gone, added = compare(old, new)
    moved = [m for m in moves if m.beyond]
    lines = [f"{len(moved)} of {len(moves)} rows moved beyond their own spread (p20–p80 do not overlap)"]
    for m in moved:
        r = m.new
        where = f"{r.suite}, {r.op}, {r.shape}, {r.impl}" + (", warm allocator" if r.allocator == "warm" else "")
        times = f"{m.factor:.2f} × the time" if m.factor > 1 else f"{1 / m.factor:.2f} × faster"
        lines.append(f"  {times}: {where}: {_spread(m.old)} -> {_spread(m.new)} ms")
    for text, rows in (("only in the old run", gone), ("only in this run", added)):
        if rows:
            lines.append(f"{len(rows)} rows {text}")
    devices = {r.device for r in old} ^ {r.device for r in new}
    if devices and moves:
        lines.append(f"different devices: {', '.join(sorted(devices))}; only ratios carry over")
    return lines


def _spread(r: Row) -> str:
    return f"{_significant(r.p50)} ({_significant(r.p20)}–{_significant(r.p80)})"


# ---- plots -----------------------------------------------------------------------------------------------------------

COLORS = {"ours": "#2a7f62", "baseline": "#5b6c8f", "peer": "#c9a25f"}


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "askew_kernels"  # the same rows make the same file
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure: Any) -> dict[str, bytes]:
    """{"png": …, "svg": …}; closes the figure."""
    files = {}
    for suffix in ("png", "svg"):
        out = io.BytesIO()
        metadata = {"Date": None} if suffix == "svg" else {}
        figure.savefig(out, format=suffix, dpi=150, metadata=metadata)
        files[suffix] = out.getvalue()
    pyplot().close(figure)
    return files


def _subtitle(r: Row) -> str:
    quick = ", quick sizes" if r.quick else ""
    return f"{r.device}, {_threads(r)}, torch {r.torch}, {r.commit or 'no commit'}{quick}"


def _limit_ratio(case: list[Row]) -> tuple[float, str] | None:
    """The physical limit of the first row of ours, as a ratio to the baseline, and a text that says so."""
    for r in case:
        if r.kind == "ours" and r.limit and r.p50 and r.ratio and not r.quick:  # quick ones fit the caches
            limit = r.limit * r.ratio / r.p50
            return limit, f"     red line: the ceilings' limit for {r.impl}, {_significant(limit)}"
    return None


def _bars(axis: Any, case: list[Row], colors: list[str], names: list[str], limit: float | None) -> None:
    """Ratios to the baseline with their p20–p80 as whiskers, logarithmic where they differ much."""
    ratios = [r.ratio or 0.0 for r in case]
    positions = list(range(len(case)))[::-1]
    low = [q * (1 - (r.p20 or 0) / (r.p50 or 1)) for q, r in zip(ratios, case, strict=True)]
    high = [q * ((r.p80 or 0) / (r.p50 or 1) - 1) for q, r in zip(ratios, case, strict=True)]
    ends = [q + h for q, h in zip(ratios, high, strict=True)]
    axis.barh(positions, ratios, color=colors, height=0.72)
    axis.errorbar(ratios, positions, xerr=[low, high], fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    axis.axvline(1.0, color=COLORS["baseline"], linewidth=0.8)
    if limit is not None:
        axis.axvline(limit, color="#b03a2e", linestyle="--", linewidth=1.4)
    if max(ratios) > 12 * min(ratios):
        axis.set_xscale("log")
        axis.set_xlim(min(*ratios, 1.0, limit or 1.0) * 0.6, max(*ends, 1.0) * 2.2)
        axis.xaxis.set_major_formatter("{x:g}")
    else:
        axis.set_xlim(0, max(*ends, limit or 1.0, 1.0) * 1.13)
    for position, ratio, end in zip(positions, ratios, ends, strict=True):
        text = f"{_significant(ratio)}×"
        axis.annotate(text, (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.set_yticks(positions, names, fontsize=8.5)
    axis.set_ylim(-0.6, len(case) - 0.4)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _shown(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r.ratio is not None and r.kind != "ceiling"]


def _plot_cases(suite: str, cases: list[list[Row]]) -> dict[str, bytes]:
    """One panel for each case: the ratio of every implementation to the baseline, ours' physical limit as a line."""
    several = len({case[0].allocator for case in cases}) > 1
    heights = [len(case) + 1.6 for case in cases]
    size = (10.5, 0.34 * sum(heights) + 0.9)
    figure, axes = pyplot().subplots(len(cases), 1, figsize=size, squeeze=False, height_ratios=heights,
                                      layout="constrained")  # fmt: skip
    for axis, case in zip(axes[:, 0], cases, strict=True):
        head = case[0]
        limit, text = _limit_ratio(case) or (None, "")
        _bars(axis, case, [COLORS.get(r.kind, "#999999") for r in case], [r.impl for r in case], limit)
        allocator = f", {head.allocator} allocator" if several else ""
        title = f"{head.op}   {head.shape} {head.dtype}{allocator}"
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=14)
        scale = " (log)" if axis.get_xscale() == "log" else ""
        axis.set_xlabel(f"time ÷ {head.baseline}{scale}{text}", fontsize=8.5)
    figure.suptitle(f"{suite}: {_subtitle(cases[0][0])}", fontsize=9, x=0.01, ha="left", color="#555555")
    return save_figure(figure)


def _plot_sizes(suite: str, cases: list[list[Row]]) -> dict[str, bytes]:
    """One panel for each operation that was measured at several sizes: a line for each implementation."""
    ops: dict[str, list[list[Row]]] = {}
    for case in cases:
        ops.setdefault(case[0].op, []).append(case)
    figure, axes = pyplot().subplots(len(ops), 1, figsize=(10.5, 4.4 * len(ops)), squeeze=False, layout="constrained")
    for axis, (op, members) in zip(axes[:, 0], ops.items(), strict=True):
        places = {case[0].shape: i for i, case in enumerate(members)}
        lines: dict[str, list[Row]] = {}
        for case in members:
            for r in case:
                lines.setdefault(r.impl, []).append(r)
        for impl, rows in lines.items():
            kind = rows[0].kind
            style = {"marker": "o", "markersize": 4, "linewidth": 2.0 if kind == "ours" else 1.2}
            style |= {"color": COLORS["baseline"]} if kind == "baseline" else {}
            axis.plot([places[r.shape] for r in rows], [r.ratio for r in rows], label=impl, **style,
                      linestyle="-" if kind == "ours" else "--")  # fmt: skip
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=7.5)
        axis.set_xticks(range(len(places)), [s.replace(" tokens x ", " tokens\n") for s in places], fontsize=7.5)
        axis.set_ylabel(f"time ÷ {members[0][0].baseline} (log)", fontsize=8.5)
        axis.set_title(op, loc="left", fontsize=10, fontweight="bold")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{suite}: {_subtitle(cases[0][0])}", fontsize=9, x=0.01, ha="left", color="#555555")
    return save_figure(figure)


def _plot_losses(suite: str, cases: list[list[Row]]) -> dict[str, bytes]:
    """Loss of every training step, one panel for each case: equal work, step by step."""
    figure, axes = pyplot().subplots(1, len(cases), figsize=(4.6 * len(cases), 3.8), squeeze=False,
                                      layout="constrained")  # fmt: skip
    names = list(dict.fromkeys(r.impl for case in cases for r in case))
    for axis, case in zip(axes[0], cases, strict=True):
        for r in case:
            losses = r.losses or []
            width = 2.2 if r.kind == "ours" else 1.2
            axis.plot(range(1, len(losses) + 1), losses, label=r.impl, color=f"C{names.index(r.impl)}", linewidth=width)
        axis.set_title(f"{case[0].op}\n{case[0].shape}", fontsize=8.5, loc="left")
        axis.set_xlabel("step", fontsize=8.5)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("training loss", fontsize=8.5)
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{suite}: {_subtitle(cases[0][0])}", fontsize=9, x=0.01, ha="left", color="#555555")
    return save_figure(figure)


def plot_suite(suite: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """File name -> PNG or SVG: the suite's cases, those at several sizes, the loss curves."""
    cases = [shown for case in by_case(rows).values() if (shown := _shown(case))]
    sized = [case for case in cases if case[0].op.endswith("by size")]
    single = [case for case in cases if not case[0].op.endswith("by size")]
    trained = [case for case in cases if any(r.losses for r in case) and case[0].allocator == cases[0][0].allocator]
    files: dict[str, bytes] = {}
    for ending, draw, members in (
        ("", _plot_cases, single),
        ("-by-size", _plot_sizes, sized),
        ("-losses", _plot_losses, trained),
    ):
        if members:
            files |= {f"{suite}{ending}.{suffix}": data for suffix, data in draw(suite, members).items()}
    return files


def plot_summary(figures: list[HeadlineFigures]) -> dict[str, bytes]:
    """The README's plot: time over the baseline's for every headline, ours and the peers."""
    heights = [1.3 + len(f.peers) + 0.9 for f in figures]
    figure, axes = pyplot().subplots(len(figures), 1, figsize=(9.5, 0.36 * sum(heights) + 0.6), squeeze=False,
                                      height_ratios=heights, layout="constrained")  # fmt: skip
    for axis, f in zip(axes[:, 0], figures, strict=True):
        case = [f.ours, *(r for _, r in f.peers)]
        names = ["askew_kernels", *(name for name, _ in f.peers)]
        limit, _ = _limit_ratio([f.ours]) or (None, "")
        _bars(axis, case, [COLORS["ours"]] + [COLORS["peer"]] * len(f.peers), names, limit)
        title = f"{f.title}: time ÷ {f.headline.baseline}"
        axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    figure.suptitle(f"{_subtitle(figures[0].ours)}; red: physical limit", fontsize=8.5, x=0.01, ha="left",
                    color="#555555")  # fmt: skip
    return save_figure(figure)


# ---- pages -----------------------------------------------------------------------------------------------------------


def summary_table(rows: Sequence[Row]) -> str:
    """Markdown: the headlines, each as a ratio to its baseline (below 1 is faster)."""
    figures = headline_figures(rows)
    if not figures:
        raise BenchError("the rows hold none of the headlines: measure without --quick")
    lines = ["| pass | ratio to | ours | physical limit | others |", "|---|---|---|---|---|"]
    for f in figures:
        limit = _limit_ratio([f.ours])
        others = ", ".join(f"{name} {_significant(r.ratio)}" for name, r in f.peers)
        cells = (f.title, f.headline.baseline, f"**{_significant(f.ours.ratio)}**",
                 _significant(limit[0]) if limit else "", others)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    first = figures[0].ours
    peers = f"; {first.versions}" if first.versions else ""
    lines += ["", f"{first.device}, {_threads(first)}, torch {first.torch}{peers}; commit {first.commit}; "
              f"medians, default allocator."]  # fmt: skip
    return "\n".join(lines)


def goals_markdown(rows: Sequence[Row]) -> str:
    lines = ["| goal | wanted | measured | |", "|---|---|---|---|"]
    for g in goals(rows):
        measured = "not measured" if g.measured is None else f"{g.measured:.3g}"
        verdict = "" if g.reached is None else "reached" if g.reached else "**missed**"
        lines.append(f"| {g.goal} | {SIGNS[g.sense]} {g.wanted:g} | {measured} | {verdict} |")
    return "\n".join(lines)


def page(rows: Sequence[Row], plots: Sequence[str] = ()) -> str:
    """A Markdown page of a whole run: where, goals, every row, the plots."""
    first = rows[0]
    where = [_threads(first), f"torch {first.torch}", first.versions, f"Python {first.python}",
             f"commit {first.commit or 'unknown'}", first.time[:10]]  # fmt: skip
    lines = [
        f"# Measured on {first.device}",
        "\nMade by `python -m askew_kernels bench --page`; how to read it: [benchmarks/README.md](../../README.md).",
        "\n" + ", ".join(filter(None, where)) + (", **quick sizes**." if first.quick else "."),
    ]
    if goals(rows):
        lines += ["", "## Goals", "", goals_markdown(rows)]
    for suite, members in by_suite(rows).items():
        lines += ["", f"## {suite}"]
        lines += [f"\n![{name}]({name})" for name in plots if re.fullmatch(rf"{suite}(-[a-z-]+)?\.png", name)]
        for case in by_case(members).values():
            head = case[0]
            lines += ["", f"**{head.op}**, {_where(head)}", ""]
            lines += ["| implementation | median ms | p20–p80 | ÷ baseline | GB/s | % of copy | rate | peak extra |",
                      "|---|---|---|---|---|---|---|---|"]  # fmt: skip
            for r in case:
                note = f" ({r.note})" if r.note else ""
                if r.p50 is None:
                    lines.append(f"| {r.impl}: {r.note} | | | | | | | |")
                    continue
                percent = "" if r.percent_of_copy is None else f"{r.percent_of_copy:.0f}"
                spread = f"{_significant(r.p20)}–{_significant(r.p80)}"
                cells = (f"{r.impl}{note}", _significant(r.p50), spread, _significant(r.ratio),
                         _significant(r.gb_per_s), percent, _rate(r), _size(r.peak_bytes))  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def generated_blocks(rows: Sequence[Row]) -> dict[str, str]:
    """What ``fill`` knows how to write: name -> Markdown."""
    return {"summary": summary_table(rows), "goals": goals_markdown(rows)}


def fill(text: str, rows: Sequence[Row]) -> str:
    """``text`` with what stands between ``<!-- bench:NAME … -->`` and ``<!-- /bench -->`` made anew from the rows."""

    def block(match: re.Match[str]) -> str:
        blocks = generated_blocks(rows)
        if match[2] not in blocks:
            raise BenchError(f"<!-- bench:{match[2]} -->: expected one of {', '.join(blocks)}")
        return f"{match[1]}\n{blocks[match[2]]}\n{match[4]}"

    pattern = re.compile(r"(<!-- bench:(\w+)[^>]*-->)\n(.*?)(<!-- /bench -->)", re.DOTALL)
    made, count = pattern.subn(block, text)
    if not count:
        raise BenchError("holds no <!-- bench:NAME --> … <!-- /bench --> block")
    return made
