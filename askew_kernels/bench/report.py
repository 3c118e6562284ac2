"""Tables, plots and pages made of rows. Nothing here imports rich or matplotlib before a table or a plot is made."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .. import figures
from ..command import Failed, grouped, markdown_table
from .goals import GoalResult, HeadlineFigures, Reason, headline_figures, judge, missed
from .rows import Row, by_case, by_suite, compare
from .suites import GOALS, HEADLINES


def goals(rows: Iterable[Row]) -> list[GoalResult]:
    return judge(GOALS, rows)


def _size(n: float | None) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n is not None and n >= scale:
            return f"{n / scale:.3g} {unit}"
    return "" if n is None else f"{n:.0f} B"


def _significant(value: float | None, digits: int = 3) -> str:
    if not value:
        return "" if value is None else "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _listed(*texts: str) -> str:
    return ", ".join(filter(None, texts))


def _threads(r: Row) -> str:
    return f"{r.threads} thread{'s' if r.threads != 1 else ''}"


def _where(r: Row) -> str:
    """Shape, type and allocator of a case."""
    allocator = f"{r.allocator} allocator" if r.device_type == "cpu" else ""
    return _listed(r.shape, r.dtype, allocator)


def _instructions(rows: Iterable[Row]) -> str:
    return _listed(*dict.fromkeys(r.instructions for r in rows))


def _taken(rows: Iterable[Row], most_commits: float = math.inf) -> str:
    """Commits and days of the rows, which may be of several runs; above so many, how many commits."""
    rows = list(rows)
    commits = list(dict.fromkeys(r.commit or "no commit" for r in rows))
    days = sorted({r.time[:10] for r in rows})
    if len(commits) > most_commits:
        commit = f"{len(commits)} commits"
    else:
        commit = f"commit{'s' * (len(commits) > 1)} {_listed(*commits)}"
    return _listed(commit, " to ".join(dict.fromkeys((days[0], days[-1]))))


def _measured(rows: Iterable[Row], most_commits: float = math.inf) -> str:
    """Instruction sets of the rows, and when they were taken."""
    rows = list(rows)
    return _listed(_instructions(rows), _taken(rows, most_commits))


# Heading -> text of a row's cell; a column that all rows leave empty is not shown.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "median ms": lambda r: _significant(r.p50),
    "p20–p80": lambda r: f"{_significant(r.p20)}–{_significant(r.p80)}",
    "÷ baseline": lambda r: _significant(r.ratio),
    "limit ms": lambda r: _significant(r.limit),
    "GB/s": lambda r: _significant(r.gb_per_s),
    "% of copy": lambda r: "" if r.percent_of_copy is None else f"{r.percent_of_copy:.0f}",
    "rate": lambda r: f"{_significant(r.rate)} {r.rate_unit.replace('million weights', 'Mw')}" if r.rate else "",
    "peak extra": lambda r: _size(r.peak_bytes),
}


def _columns(rows: Iterable[Row]) -> dict[str, Callable[[Row], str]]:
    measured = [r for r in rows if r.p50 is not None]
    return {name: cell for name, cell in COLUMNS.items() if any(map(cell, measured))}


def _verdict(g: GoalResult) -> tuple[str, str, str]:
    """Wanted, measured, reached or not."""
    measured = "not measured" if g.measured is None else f"{g.measured:.3g}"
    sign = {"<=": "≤", ">=": "≥"}[g.sense]
    return f"{sign} {g.wanted:g}", measured, {None: "", True: "reached", False: "**MISSED**"}[g.reached]


# ---- on a terminal ---------------------------------------------------------------------------------------------------


def _rich_table(title: str, headings: Iterable[str], left: int = 1) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    for i, name in enumerate(headings):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left)
    table.columns[0].min_width = 30
    return table


def suite_table(suite: str, rows: list[Row]) -> Any:
    """A rich table of one suite's rows, one section for each case, and below it the notes and what is not there."""
    from rich.console import Group
    from rich.markup import escape

    first, columns = rows[0], _columns(rows)
    quick = "; quick: small tensors that may fit the caches, not the goals' sizes" if first.quick else ""
    title = f"{suite}: {first.device}, {_threads(first)}, torch {first.torch}{quick}"
    table = _rich_table(title, ["implementation", *columns])
    styles = {"ours": "green", "baseline": "cyan", "ceiling": "dim"}
    below: dict[str, None] = {}
    for case in by_case(rows).values():
        table.add_section()
        table.add_row(f"[bold]{escape(case[0].op)}[/bold]\n{escape(_where(case[0]))}")
        for r in case:
            if r.note and r.kind != "ceiling" and not r.failed:
                below[f"{r.impl}: {r.note}"] = None
            if r.p50 is None and not r.failed:
                continue
            name, first_call, _ = r.impl.partition(": first call")
            cells = ["failed"] if r.failed else [cell(r) for cell in columns.values()]
            style = "red" if r.failed else styles.get(r.kind, "")
            table.add_row(f"  {escape(name)}{', first call' if first_call else ''}", *cells, style=style)
    return Group(table, *(f"  [dim]{escape(text)}[/dim]" for text in below))


def goals_table(rows: list[Row]) -> Any:
    """A rich table: each goal, what was measured, reached or not; None where no goal applies."""
    results, quick = goals(rows), any(r.quick for r in rows)
    title = "goals" + (", with the figures of the quick sizes; without --quick they are judged" if quick else "")
    table = _rich_table(title, ("goal", "wanted", "measured", ""))
    for g in results:
        wanted, measured, _ = _verdict(g)
        mark = "" if quick or g.reached is None else "[green]✓[/green]" if g.reached else "[red]✗ missed[/red]"
        table.add_row(g.goal, wanted, measured, mark, style="dim" if g.measured is None else "")
    return table if results else None


def comparison_report(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """Lines: every row that moved beyond its own spread, the largest factor first, and what could not be compared."""
    moves, gone, added = compare(old, new)
    moved = [m for m in moves if m.beyond]
    lines = [f"{len(moved)} of {len(moves)} rows moved beyond their own spread (p20–p80 do not overlap)"]
    for m in moved:
        r = m.new
        where = f"{r.suite}, {r.op}, {r.shape}, {r.impl}" + (", warm allocator" if r.allocator == "warm" else "")
        times = f"{m.factor:.2f} × the time" if m.factor > 1 else f"{1 / m.factor:.2f} × faster"
        spreads = [f"{_significant(x.p50)} ({_significant(x.p20)}–{_significant(x.p80)})" for x in (m.old, r)]
        lines.append(f"  {times}: {where}: {' -> '.join(spreads)} ms")
    lines += [f"{len(gone)} rows only in the old run"] * bool(gone)
    lines += [f"{len(added)} rows only in this run"] * bool(added)
    devices = {r.device for r in old} ^ {r.device for r in new}
    if devices and moves:
        lines.append(f"different devices: {', '.join(sorted(devices))}; only ratios carry over")
    return lines


# ---- plots: dots and distances from 1 on logarithmic axes, never bars ------------------------------------------------

GREY, ORANGE, BLUE, GREEN, PURPLE, VERMILION, SKY = figures.PALETTE
KINDS = {  # of a row: its colour, its marker, what the legend calls it
    "ours": (BLUE, "o", "this package"),
    "baseline": ("#444444", "|", "baseline"),
    "peer": (ORANGE, "D", "others"),
}
RED = VERMILION
COLUMNS_OF_A_PLOT, TALLEST = 4, 9.0  # panels side by side; inches of a plot that fits a page


def _limit_ratio(r: Row) -> float | None:
    """The least time that the ceilings allow, over the baseline's; of quick rows, which fit the caches, none."""
    return r.limit * r.ratio / r.p50 if r.limit and r.p50 and r.ratio and not r.quick else None


def _save(figure: Any, name: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """Says above all panels what these rows were measured on."""
    first = rows[0]
    quick = ", quick sizes" if first.quick else ""
    text = f"{name}: {first.device}, {_threads(first)}, torch {first.torch}, {_measured(rows, most_commits=3)}{quick}"
    figure.suptitle(text, fontsize=9, x=0.01, ha="left", color="#555555")
    return figures.save(figure, name)


def _log_axis(axis: Any, low: float, high: float, narrow: bool = False) -> None:
    """Times over a baseline: 1 is a line, and a factor has the same length everywhere."""
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    decades = math.log10(high / low) * (2 if narrow else 1)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1.3 else (1, 2, 5) if decades < 3.3 else (1,)
    ticks = [s * 10.0**e for e in range(-4, 6) for s in steps]
    axis.set_xticks([t for t in ticks if low <= t <= high])
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.axvline(1.0, color=KINDS["baseline"][0], linewidth=1)


def _dots(axis: Any, case: Sequence[Row], names: Sequence[str]) -> None:
    """A row of the case: its ratio as a dot at its distance from 1, p20–p80 as whiskers, the value at the right edge;
    the ceilings' limit of ours as a red mark. names: from top to bottom; those that the case has not stay empty."""
    for r in case:
        y = len(names) - 1 - names.index(r.impl)
        ratio, p50 = r.ratio or math.nan, r.p50 or math.nan
        color, marker, _ = KINDS.get(r.kind, ("#999999", "o", ""))
        axis.plot([1, ratio], [y, y], color=color, linewidth=1.2, alpha=0.45)
        axis.plot([ratio * (r.p20 or p50) / p50, ratio * (r.p80 or p50) / p50], [y, y], color=color, linewidth=3.2,
                  alpha=0.45, solid_capstyle="butt")  # fmt: skip
        axis.plot([ratio], [y], marker, color=color, markersize=9 if marker == "|" else 5, markeredgewidth=1.4)
        if r.kind == "ours" and (limit := _limit_ratio(r)):
            axis.plot([limit], [y], "x", color=RED, markersize=5, markeredgewidth=1.4)
        axis.annotate(_significant(ratio), (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=7.5)
    axis.set_yticks(range(len(names)), reversed(names), fontsize=7.5)
    axis.set_ylim(-0.7, len(names) - 0.3)


def _legend(figure: Any, rows: Sequence[Row], columns: int = 5, spread: bool = True) -> None:
    from matplotlib.lines import Line2D

    kinds = {r.kind for r in rows}
    looks: dict[str, dict[str, Any]] = {
        text: {"color": color, "marker": marker, "markersize": 9 if marker == "|" else 5}
        for kind, (color, marker, text) in KINDS.items()
        if kind in kinds
    }
    if any(r.kind == "ours" and _limit_ratio(r) for r in rows):
        looks["least time by the ceilings of the same turns: memory, the library's product"] = {
            "color": RED, "marker": "x", "linestyle": "", "markersize": 5, "markeredgewidth": 1.4}  # fmt: skip
    if spread:
        looks["p20–p80"] = {"color": "#777777", "linewidth": 3.2, "alpha": 0.45}
    handles = [Line2D([], [], label=text, **look) for text, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8.5)


def _families(cases: Iterable[list[Row]]) -> list[list[list[Row]]]:
    """Cases that compare mostly the same implementations with the same baseline, up to four, stand side by side."""
    families: list[list[list[Row]]] = []
    for case in cases:
        names = {r.impl for r in case}
        for family in families:
            known = {r.impl for other in family for r in other}
            alike = len(known & names) >= 0.5 * len(known | names) and family[0][0].baseline == case[0].baseline
            if alike and len(family) < COLUMNS_OF_A_PLOT:
                family.append(case)
                break
        else:
            families.append([case])
    return families


def _merged_names(family: Sequence[Sequence[Row]]) -> list[str]:
    """All implementations, each behind the one that stands before it in its case."""
    names: list[str] = []
    for case in family:
        place = 0
        for r in case:
            if r.impl not in names:
                names.insert(place, r.impl)
            place = names.index(r.impl) + 1
    return names


def _plot_cases(suite: str, cases: list[list[Row]]) -> dict[str, bytes]:
    """Cases that compare the same implementations side by side, with the same axis; as many plots as pages need."""
    pages: list[list[list[list[Row]]]] = [[]]
    for family in _families(cases):
        if pages[-1] and sum(map(_inches, [*pages[-1], family])) > TALLEST:
            pages.append([])
        pages[-1].append(family)
    files: dict[str, bytes] = {}
    for families, name in zip(pages, (suite, *(f"{suite}-{letter}" for letter in "bcdefgh")), strict=False):
        files |= _plot_page(name, families)
    return files


def _inches(family: Sequence[Sequence[Row]]) -> float:
    lines = max(title.count("\n") + 1 for title in _titles(family)[1])
    return 0.19 * len(_merged_names(family)) + 0.7 + 0.15 * lines


def _plot_page(name: str, families: Sequence[Sequence[Sequence[Row]]]) -> dict[str, bytes]:
    from matplotlib.figure import Figure

    heights = [_inches(family) for family in families]
    columns = max(map(len, families))
    figure = Figure(figsize=(3.4 + 2.2 * max(columns, 2), sum(heights) + 0.8), layout="constrained")
    parts = figure.subfigures(len(families), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, family in zip(parts, families, strict=True):
        names, rows = _merged_names(family), [r for case in family for r in case]
        ends = [r.ratio * p / r.p50 for r in rows for p in (r.p20, r.p80) if r.ratio and r.p50 and p]
        low, high = min(*ends, *filter(None, map(_limit_ratio, rows)), 1) * 0.8, max(*ends, 1) * 1.25
        axes = part.subplots(1, len(family), squeeze=False, sharey=True)[0]
        common, titles = _titles(family)
        for axis, case, title in zip(axes, family, titles, strict=True):
            figures.label(axis, title, grid="x")
            axis.title.set_fontsize(8.5)
            _log_axis(axis, low, high, narrow=_is_narrow(family))
            _dots(axis, case, names)
            axis.tick_params(axis="x", labelsize=7.5)
        part.suptitle(common, x=0.01, ha="left", fontsize=9.5, fontweight="bold")
        part.supxlabel(f"time ÷ {family[0][0].baseline} (log)", fontsize=8)
    rows = [r for family in families for case in family for r in case]
    _legend(figure, rows, 3 if columns < 3 else 5)
    return _save(figure, name, rows)


def _is_narrow(family: Sequence[Sequence[Row]]) -> bool:
    return len(family) > 2


def _titles(family: Sequence[Sequence[Row]]) -> tuple[str, list[str]]:
    """What all cases of a family have in common, and what is left of each, in lines that its panel holds."""
    parts = []
    for head, *_ in family:
        words = [word for word in head.op.split(", ") if not head.shape.startswith(word)]
        parts.append([*words, head.shape, f"{head.allocator} allocator" if head.device_type == "cpu" else ""])
    common = [text for text in parts[0] if all(text in part for part in parts)]
    left = [_listed(*(text for text in part if text not in common)) for part in parts]
    return _listed(*common), [textwrap.fill(text, 27 if _is_narrow(family) else 60) for text in left]


def _color(names: Sequence[str], name: str) -> str:
    return figures.PALETTE[names.index(name) % len(figures.PALETTE)]


def _size_of(shape: str) -> tuple[str, float]:
    """ "16 tokens x 1024 x 2048" -> ("tokens x 1024 x 2048", 16); "1024x2048" -> ("weights", 2097152)."""
    tokens, found, rest = shape.partition(" tokens")
    if found:
        return f"tokens{rest}", float(tokens)
    return "weights", math.prod(float(n) for n in shape.split("x"))


def _plot_sizes(suite: str, cases: list[list[Row]]) -> dict[str, bytes]:
    """One panel for each operation and kind of shape that was measured at several sizes: a line for each
    implementation, over the size."""
    all_rows = [r for case in cases for r in case]
    panels = grouped(all_rows, lambda r: (r.op.removesuffix("by size").rstrip(", "), _size_of(r.shape)[0]))
    ops = list(dict.fromkeys(op for op, _ in panels))
    ordered = sorted(panels.items(), key=lambda item: (ops.index(item[0][0]), len(item[0][1]), item[0][1]))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = figures.figure(lines, columns, max(5.2 * columns, 9), 3.4 * lines + 1.2, sharey=True)
    names = list(dict.fromkeys(r.impl for rows in panels.values() for r in rows))
    ratios = [r.ratio for r in all_rows if r.ratio]
    steps = (1, 2, 5) if max(ratios) > 10 * min(ratios) else (1, 1.2, 1.5, 2, 3, 4, 5, 7)
    ticks = [s * 10.0**e for e in (-1, 0, 1, 2) for s in steps]
    for axis, ((op, unit), rows) in zip(axes, ordered, strict=False):
        for impl, mine in grouped(rows, lambda r: r.impl).items():
            mine.sort(key=lambda r: _size_of(r.shape)[1])
            ours = mine[0].kind == "ours"
            axis.plot([_size_of(r.shape)[1] for r in mine], [r.ratio for r in mine], markersize=4.5,
                      marker=figures.MARKERS[names.index(impl) % len(figures.MARKERS)],
                      color=_color(names, impl), linewidth=2.2 if ours else 1.2, label=impl,
                      linestyle="-" if ours else "--")  # fmt: skip
        sizes = sorted({_size_of(r.shape)[1] for r in rows})
        figures.label(axis, f"{op}, {unit}", f"{unit.split()[0]} (log)")
        axis.label_outer()
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(sizes, [f"{s / 2**20:g}M" if s >= 2**20 else f"{s:g}" for s in sizes])
        axis.set_xticks([], minor=True)
        axis.set_yticks([t for t in ticks if min(ratios) * 0.9 < t < max(ratios) * 1.1])
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
    figure.supylabel(f"time ÷ {cases[0][0].baseline} (log)", fontsize=8.5)
    figures.legend_below(figure, axes, 3)
    return _save(figure, f"{suite}-by-size", all_rows)


def _plot_losses(suite: str, cases: list[list[Row]]) -> dict[str, bytes]:
    """Above, the loss of every training step; below, since equal work gives nearly equal curves, its distance from the
    float model's on the same batch, averaged over eight steps: the loss of single batches jumps."""
    figure, axes = figures.figure(2, len(cases), 4.8 * len(cases), 6.2, height_ratios=(1, 1))
    names = list(dict.fromkeys(r.impl for case in cases for r in case))
    for i, case in enumerate(cases):
        above, below = axes[i], axes[len(cases) + i]
        plain = next((r.losses for r in case if r.kind == "baseline"), None) or []
        for r in case:
            losses = r.losses or []
            how = {"color": _color(names, r.impl), "linewidth": 2.4 if r.kind == "ours" else 1.3, "label": r.impl,
                   "linestyle": ("-", "--", "-.", ":")[names.index(r.impl) % 4]}  # fmt: skip
            above.plot(range(1, len(losses) + 1), losses, **how, alpha=0.8)
            apart = [a - b for a, b in zip(losses, plain, strict=False)]
            means = [sum(apart[k : k + 8]) / 8 for k in range(len(apart) - 7)]
            below.plot(range(8, len(means) + 8), means, **how)
        figures.label(above, f"{case[0].op}\n{case[0].shape}")
        figures.label(below, "", "step (the mean of it and the seven before it)")
    axes[0].set_ylabel("training loss of the batch", fontsize=8.5)
    axes[len(cases)].set_ylabel("loss − float's", fontsize=8.5)
    figures.legend_below(figure, axes, 5)
    return _save(figure, f"{suite}-losses", [r for case in cases for r in case])


def plot_suite(suite: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """File name -> PNG or SVG: the suite's cases, those at several sizes, the loss curves."""
    cases = [[r for r in case if r.ratio is not None and r.kind != "ceiling"] for case in by_case(rows).values()]
    cases = [case for case in cases if case]
    sized = [case for case in cases if case[0].op.endswith("by size")]
    single = [case for case in cases if case not in sized]
    if sized:  # the main case of an operation that was measured at several sizes is one of them
        ops = {case[0].op.removesuffix(", by size") for case in sized}
        sized = [c for c in single if c[0].op in ops and c[0].allocator == sized[0][0].allocator] + sized
    trained = [case for case in cases if any(r.losses for r in case) and case[0].allocator == cases[0][0].allocator]
    files: dict[str, bytes] = {}
    for draw, members in ((_plot_cases, single), (_plot_sizes, sized), (_plot_losses, trained)):
        if members:
            files |= draw(suite, members)
    return files


def plot_summary(found: list[HeadlineFigures]) -> dict[str, bytes]:
    """The README's plot, a line for each headline: ours and the others as dots, their times over the baseline's."""
    figure, (axis,) = figures.figure(1, 1, 13, 0.25 * len(found) + 1.6)
    shown = [r for f in found for r in (f.ours, *(r for _, r in f.peers))]
    ratios = [r.ratio for r in shown if r.ratio]
    _log_axis(axis, min(*ratios, 1) * 0.8, max(*ratios, 1) * 1.3)
    for y, f in enumerate(reversed(found)):
        for _, r in f.peers:
            axis.plot([r.ratio], [y], "D", color=ORANGE, markersize=5, alpha=0.75)
        if limit := _limit_ratio(f.ours):
            axis.plot([limit], [y], "x", color=RED, markersize=6, markeredgewidth=1.6)
        axis.plot([1, f.ours.ratio], [y, y], color=BLUE, linewidth=1.4, alpha=0.5)
        axis.plot([f.ours.ratio], [y], "o", color=BLUE, markersize=6)
        best = min(f.peers, key=lambda p: p[1].ratio or math.inf, default=None)
        text = f"  ({best[0]} {_significant(best[1].ratio)})" if best else ""
        axis.annotate(f"{_significant(f.ours.ratio)}{text}", (1.01, y), xycoords=("axes fraction", "data"),
                      va="center", fontsize=8.5)  # fmt: skip
    figures.label(axis, "Time ÷ that of plain PyTorch (log); right: ours (and the fastest of the others)", grid="x")
    axis.set_yticks(range(len(found)), [f"{f.title} ÷ {f.ours.baseline}" for f in reversed(found)], fontsize=8.5)
    axis.set_ylim(-0.7, len(found) - 0.3)
    _legend(figure, shown, spread=False)
    return _save(figure, "summary", [f.ours for f in found])


def plots(rows: Sequence[Row]) -> dict[str, bytes]:
    """File name -> contents, of every suite and of the headlines."""
    files: dict[str, bytes] = {}
    for suite, members in by_suite(rows).items():
        files |= plot_suite(suite, members)
    if found := headline_figures(HEADLINES, rows):
        files |= plot_summary(found)
    return files


# ---- pages -----------------------------------------------------------------------------------------------------------


def summary_table(rows: Sequence[Row], reasons: Sequence[Reason] = ()) -> str:
    """Markdown: the headlines, each as a ratio to its baseline (below 1 is faster), where they are from, and every goal
    that these rows miss, with its reason where one is given."""
    found = headline_figures(HEADLINES, rows)
    if not found:
        raise Failed("the rows hold none of the headlines: measure without --quick")
    lines = [
        (f.title, f.ours.baseline, f"**{_significant(f.ours.ratio)}**", _significant(_limit_ratio(f.ours)),
         _listed(*(f"{name} {_significant(r.ratio)}" for name, r in f.peers)))
        for f in found
    ]  # fmt: skip
    first, results = found[0].ours, goals(rows)
    suites = [f"{suite}: {_taken(members)}" for suite, members in by_suite(f.ours for f in found).items()]
    where = _listed(
        first.device, _threads(first), _instructions(f.ours for f in found), f"torch {first.torch}", first.versions
    )
    numbers, why = missed(results, reasons)
    measured = sum(g.reached is not None for g in results)
    lost = [(g.goal, *_verdict(g)[:2], numbers[g.goal]) for g in results if g.reached is False]
    return "\n\n".join([
        markdown_table(("pass", "ratio to", "ours", "measured ceiling", "others"), lines),
        f"{where}; medians, default allocator. {'; '.join(suites)}.",
        f"Goals missed, {len(lost)} of {measured} that were measured (all of them: docs/notes.md):",
        _with_reasons(("missed", "wanted", "measured"), lost, why),
    ])  # fmt: skip


def goals_markdown(rows: Iterable[Row], reasons: Sequence[Reason] = ()) -> str:
    results = goals(rows)
    numbers, why = missed(results, reasons)
    return _with_reasons(
        ("goal", "wanted", "measured", ""), [(g.goal, *_verdict(g), numbers.get(g.goal, "")) for g in results], why
    )


def _with_reasons(headings: Sequence[str], lines: Iterable[Sequence[str]], why: Sequence[str]) -> str:
    """A table whose last column numbers the reasons, which stand below it; without that where there are none."""
    if not why:
        return markdown_table(headings, (line[:-1] for line in lines))
    listed = "\n".join(f"{i}. {text}" for i, text in enumerate(why, 1))
    return f"{markdown_table((*headings, 'why'), lines)}\n\nWhy, by the numbers in the last column:\n\n{listed}"


def case_markdown(case: Sequence[Row]) -> str:
    head, columns = case[0], _columns(case)
    lines = []
    for r in case:
        note = (f": {r.note}" if r.p50 is None else f" ({r.note})") if r.note else ""
        lines.append([f"{r.impl}{note}", *("" if r.p50 is None else cell(r) for cell in columns.values())])
    what = f"**{head.op}**, {_where(head)}; {_measured(case)}"
    return f"{what}\n\n{markdown_table(('implementation', *columns), lines)}"


def page(rows: Sequence[Row], plots: Sequence[str] = (), reasons: Sequence[Reason] = ()) -> str:
    """A Markdown page of a whole run: where, goals, every row, the plots."""
    first = rows[0]
    where = _listed(_threads(first), f"torch {first.torch}", first.versions, f"Python {first.python}", _measured(rows))
    quick = ", **quick sizes**" if first.quick else ""
    parts = [
        f"# Measured on {first.device}",
        "Made by `python -m askew_kernels bench --page`; how to read it: [benchmarks/README.md](../../README.md).",
        f"{where}{quick}. Each case names its own commit.",
    ]
    if goals(rows):
        parts += ["## Goals", goals_markdown(rows, reasons)]
    for suite, members in by_suite(rows).items():
        shown = [name for name in plots if re.fullmatch(rf"{suite}(-[a-z-]+)?\.png", name)]
        parts += [f"## {suite}", *(f"![{_alt_text(suite, name)}]({name})" for name in shown)]
        parts += [case_markdown(case) for case in by_case(members).values()]
    return "\n\n".join(parts) + "\n"


def _alt_text(suite: str, name: str) -> str:
    if name.endswith("-losses.png"):
        return f"{suite}: the training losses, and how far they are from the float model's"
    axis = "over the size, " if name.endswith("-by-size.png") else ""
    return (
        f"{suite}: each implementation's time over its baseline's, {axis}on logarithmic axes; the numbers stand below"
    )


def plain_report(rows: Sequence[Row]) -> str:
    """The tables as Markdown, for where rich is not installed."""
    cases = [f"{case[0].suite}: {case_markdown(case)}" for case in by_case(rows).values()]
    return "\n\n".join([*cases, *([goals_markdown(rows)] if goals(rows) else [])])


def fill(text: str, rows: Sequence[Row], reasons: Sequence[Reason] = ()) -> str:
    """``text`` with what stands between ``<!-- bench:NAME … -->`` and ``<!-- /bench -->`` made anew from the rows."""
    blocks = {"summary": summary_table, "goals": goals_markdown}

    def block(match: re.Match[str]) -> str:
        if match[2] not in blocks:
            raise Failed(f"<!-- bench:{match[2]} -->: expected one of {', '.join(blocks)}")
        return f"{match[1]}\n{blocks[match[2]](rows, reasons)}\n{match[4]}"

    pattern = re.compile(r"(<!-- bench:(\w+)[^>]*-->)\n(.*?)(<!-- /bench -->)", re.DOTALL)
    made, count = pattern.subn(block, text)
    if not count:
        raise Failed("holds no <!-- bench:NAME --> … <!-- /bench --> block")
    return made
