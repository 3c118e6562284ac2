"""From a log (``ASkewSGD(telemetry_log=…)``) to PNGs and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import atomic, figures

TITLES = {
    "loss": "loss", "eps": "ε: 1 is free, 0 only levels", "feasible": "share of feasible weights",
    "flips": "share of weights that changed level in a step", "sharpness": "sharpness", "accuracy": "accuracy",
}  # fmt: skip
MOST_PANELS, MOST_TENSORS = 600, 60  # histograms of all epochs, and of one: some 20 seconds, a picture that can be read


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: Any, least: int = 0) -> bool:
    return isinstance(values, list) and len(values) >= least and all(map(_number, values))


def _check_run(run: dict[str, Any]) -> None:
    if not isinstance(run.get("tensors", []), list):
        raise ValueError("tensors: expected a list")


def _check_step(line: dict[str, Any]) -> None:
    for row in line["tensors"]:
        known = {key: row[key] for key in ("numel", "eps", "lr", "fraction_infeasible", "flips")}
        known.pop("lr")  # which may be infinite, and then is null
        if wrong := [key for key, value in known.items() if not _number(value)]:
            raise ValueError(f"{row['name']}: {wrong[0]}: expected a number, got {row[wrong[0]]!r:.40}")


def _check_note(line: dict[str, Any]) -> None:
    histograms = line.get("histograms") or {}
    if histograms and "epoch" not in line:
        raise ValueError("histograms: expected an epoch beside them")
    for name, h in histograms.items():
        ends = [h["low"], h["high"]]
        if not (_numbers(h["counts"], 1) and _numbers(h["levels"]) and _numbers(ends) and ends[0] < ends[1]):
            raise ValueError(f"histograms: {name}: expected counts, levels and low < high, all numbers")


_CHECKS = {"run": _check_run, "step": _check_step, "note": _check_note}


def _slice(note: dict[str, Any]) -> tuple[Any, Any] | None:
    """(t, loss) of a note's ``landscape``, the loss NaN where it was not finite; None where it has another form."""
    found = note.get("landscape")
    t, loss = (found.get("t"), found.get("loss")) if isinstance(found, dict) else (None, None)
    if not (isinstance(t, list) and _numbers(t, 1) and isinstance(loss, list) and len(t) == len(loss)):
        return None
    loss = [math.nan if value is None else value for value in loss]
    return (t, loss) if all(isinstance(v, (int, float)) for v in loss) else None


def read_log(path: str | os.PathLike) -> dict[str, Any]:
    """{"run": …, "steps": […], "notes": […], "left_out": […]} of the last run in a log.

    A resumed run appends to the same file: of the lines for one step the last counts. A last line that was cut off is
    passed over. left_out: what a report does not draw, and why. Raises FileNotFoundError; ValueError naming the line
    that is not one of a log.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    lines = path.read_text("utf-8", "replace").splitlines()
    run: dict[str, Any] = {}
    steps: dict[int, dict[str, Any]] = {}
    notes: list[dict[str, Any]] = []
    fresh, others = False, dict[int, int]()
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            kind = found["kind"]
            _CHECKS.get(kind, lambda line: None)(found)
            if kind == "run":
                run, fresh = found, True
                continue
            if type(step := found["step"]) is not int:
                raise ValueError(f"step: expected an int, got {step!r:.40}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            if number == len(lines) and number > 1 and isinstance(problem, json.JSONDecodeError):
                break
            raise ValueError(f"{path}, line {number}: not a line of a telemetry log ({problem})") from None
        if fresh:  # what a resumed run does again
            steps = {k: v for k, v in steps.items() if k < step}
            notes = [n for n in notes if n["step"] < step]
            fresh = False
        if kind == "step":
            steps[step] = found
        elif kind == "note":
            notes.append(found)
            others[id(found)] = number
    if not run:
        raise ValueError(f"{path}: holds no run; ASkewSGD(…, telemetry_log=…) writes one")
    log: dict[str, Any] = {"run": run, "steps": [steps[k] for k in sorted(steps)], "notes": notes}
    form = 'expected {"t": numbers, "loss": as many}'
    log["left_out"] = [f"line {others[id(n)]}: landscape: {form}" for n in notes if "landscape" in n and not _slice(n)]
    (epochs, tensors), (some_epochs, some) = _histograms(notes), _drawn(notes)
    for what, all_of, few in (("epochs", epochs, some_epochs), ("tensors", tensors, some)):
        if len(few) < len(all_of):
            log["left_out"].append(f"weights: {len(few)} of {len(all_of)} {what} are drawn, evenly spread")
    return log


def _histograms(notes: Sequence[dict[str, Any]]) -> tuple[list[Any], list[str]]:
    """(the notes that have some, the names of their tensors)"""
    having = [n for n in notes if n.get("histograms")]
    return having, list(dict.fromkeys(name for n in having for name in n["histograms"]))


def _drawn(notes: Sequence[dict[str, Any]]) -> tuple[list[Any], list[str]]:
    """Of these as many as make ``MOST_PANELS``, evenly spread, the first and the last among them."""

    def spread(items: list[Any], most: int) -> list[Any]:
        few = min(most, len(items))
        return [items[i * (len(items) - 1) // max(1, few - 1)] for i in range(few)]

    having, names = _histograms(notes)
    names = spread(names, MOST_TENSORS)
    return spread(having, max(2, MOST_PANELS // max(1, len(names)))), names


def _series(log: dict[str, Any]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """panel -> curve -> (steps, values)."""
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {panel: {} for panel in TITLES}

    def add(panel: str, curve: str, step: int, value: Any) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            steps, values = found[panel].setdefault(curve, ([], []))
            steps.append(step)
            values.append(float(value))

    for line in log["steps"]:
        rows, at = line["tensors"], line["step"]
        total = sum(row["numel"] for row in rows)
        add("loss", "at recorded steps", at, line.get("loss"))
        if total:
            add("eps", "ε", at, min(row["eps"] for row in rows))
            add("feasible", "all", at, 1 - sum(r["fraction_infeasible"] * r["numel"] for r in rows) / total)
            add("flips", "all", at, sum(row["flips"] for row in rows) / total)
        for row in rows:
            add("feasible", str(row["name"]), at, 1 - row["fraction_infeasible"])
            add("flips", str(row["name"]), at, row["flips"] / max(1, row["numel"]))
    words = {"loss": "loss", "accuracy": "accuracy", "sharpness": "sharpness", "eigenvalue": "sharpness"}
    for line in log["notes"]:
        for key, value in line.items():
            if word := next(filter(key.__contains__, words), None):
                add(words[word], key, line["step"], value)
    return {panel: curves for panel, curves in found.items() if curves}


def _png(figure: Any) -> bytes:
    return figures.image(figure, "png", dpi=100)


def _plot(
    title: str, xlabel: str, curves: Sequence[tuple[str, Any, Any, dict[str, Any]]], alone: bool = False, **scale: Any
) -> bytes:  # fmt: skip
    """curves: (label, x, y, how it is drawn); alone: whether the label of a single one tells something."""
    figure, (axis,) = figures.figure(1, 1, 5.2, 3.2)
    for label, x, y, style in curves:
        axis.plot(x, y, label=figures.plain(label), **style)
    if scale:
        axis.set_yscale(**scale)
    figures.label(axis, title, xlabel, grid="both")
    if 1 - alone < len(curves) <= 9:
        figures.legend_below(figure, [axis])
    return _png(figure)


def _curves(log: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    for panel, curves in _series(log).items():
        drawn: list[tuple[str, Any, Any, dict[str, Any]]] = []
        for name, (steps, values) in curves.items():
            main = name in ("all", "ε") or len(curves) == 1
            drawn.append((name, steps, values, {
                "linewidth": 2 if main else 0.9, "color": "black" if name == "all" else None,
                "marker": "o" if len(steps) < 30 else None, "markersize": 3,
            }))  # fmt: skip
        scale: dict[str, Any] = {"value": "log"} if panel == "eps" else {}
        if panel == "flips" and any(v > 0 for _, values in curves.values() for v in values):
            scale = {"value": "symlog", "linthresh": 1e-4}
        yield panel, _plot(TITLES[panel], "step", drawn, **scale)
    slices = [(n["step"], *found) for n in log["notes"] if (found := _slice(n)) is not None]
    if slices:
        yield "landscape", _plot("loss along a filter-normalised direction", "t in w + t d", [
            (f"step {step}", t, loss, {"alpha": 0.35 + 0.65 * (i + 1) / len(slices)})
            for i, (step, t, loss) in enumerate(slices)
        ], alone=True)  # fmt: skip


def _frame(note: dict[str, Any], names: Sequence[str]) -> bytes:
    """Every tensor's weights in units of its scale, levels as lines."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    width, height = 3.2 * columns, 1.9 * rows + 0.3
    figure, axes = figures.figure(rows, columns, width, height, layout="none")  # laying out takes longer than drawing
    figure.subplots_adjust(0.1 / width, 0.3 / height, 1 - 0.1 / width, 1 - 0.6 / height, wspace=0.06, hspace=0.45)
    for axis in axes[len(names) :]:
        axis.remove()
    for axis, name in zip(axes, names, strict=False):
        if (h := note["histograms"].get(name)) is None:
            continue
        counts, low, high = h["counts"], h["low"], h["high"]
        bins = [low + (high - low) * i / len(counts) for i in range(len(counts) + 1)]
        total = max(1, sum(counts)) * (bins[1] - bins[0])
        axis.stairs([c / total for c in counts], bins, fill=True, color="#1f6fb4")
        axis.vlines(h["levels"], 0, 1, "black", linewidth=0.4, alpha=0.6, transform=axis.get_xaxis_transform())
        axis.set_title(figures.plain(name), fontsize=8)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
    title = figures.plain(f"epoch {note['epoch']}: weights in units of their scale")
    figure.suptitle(title, fontsize=9, y=1 - 0.1 / height, va="top")
    return _png(figure)


def _image(title: Any, png: bytes) -> str:
    return f"<img alt='{html.escape(str(title))}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ccc;text-align:right}
th:first-child,td:first-child{text-align:left}img{max-width:100%}.row{display:flex;flex-wrap:wrap;gap:1rem}"""

_SLIDER = """const f=document.querySelectorAll('.frame'),s=document.getElementById('epoch');
function show(){f.forEach((e,i)=>e.hidden=i!=s.value)}s.oninput=show;show()"""


def _page(log: dict[str, Any], title: str, pictures: dict[str, bytes], frames: list[tuple[Any, bytes]]) -> str:
    run, text = log["run"], html.escape
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{text(title)}</title><style>{_STYLE}</style>",
        f"<h1>{text(title)}</h1><p>{text(str(run.get('optimizer')))}, {len(run.get('tensors', []))} tensors, "
        f"{len(log['steps'])} recorded steps, {len(log['notes'])} notes.</p>",
        *(f"<p>Left out: {text(what)}</p>" for what in log["left_out"]),
    ]
    if pictures:
        parts += ["<div class=row>", *(_image(name, png) for name, png in pictures.items()), "</div>"]
    if frames:
        parts.append(f"<h2>Weights sliding into their levels</h2><input id=epoch type=range min=0 "
                     f"max={len(frames) - 1} value={len(frames) - 1} style='width:30rem'>")  # fmt: skip
        parts += [f"<div class=frame>{_image(f'epoch {epoch}', png)}</div>" for epoch, png in frames]
        parts.append(f"<script>{_SLIDER}</script>")
    if last := log["steps"][-1]["tensors"] if log["steps"] else []:
        parts.append("<h2>Last recorded step</h2><table><tr><th>tensor<th>weights<th>ε<th>infeasible<th>mean "
                     "violation<th>flips<th>‖v‖<th>g·v</tr>")  # fmt: skip
        parts += [
            f"<tr><td>{text(str(r['name']))}<td>{r['numel']:,}<td>{r['eps']:.3g}"
            f"<td>{100 * r['fraction_infeasible']:.2f} %<td>{_shown(r.get('mean_violation', 0))}<td>{r['flips']:.0f}"
            f"<td>{_shown(r.get('velocity_norm'))}<td>{_shown(r.get('grad_velocity'))}</tr>"
            for r in last
        ]
        parts.append("</table>")
    return "\n".join(parts) + "</html>\n"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if _number(value) else "not finite"


def report(path: str | os.PathLike, folder: str | os.PathLike) -> list[Path]:
    """Writes PNGs and ``index.html`` of the run in the log ``path`` to ``folder``; returns what was written.

    The page holds its pictures itself. A log without losses, epochs, sharpness or slices gives a page without those;
    of many epochs or tensors some are drawn, and the page says so (``read_log``: left_out).
    Raises FileNotFoundError, ValueError (``read_log``); ImportError without Matplotlib.
    """
    return write_report(read_log(path), f"{Path(path).name}: the run", Path(folder))


def write_report(log: dict[str, Any], title: str, folder: Path, shown: Callable[[list], Iterable] = iter) -> list[Path]:
    """``report`` of a log that was read, each picture written when it is drawn. shown: passes on what it is given, the
    epochs to draw, one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def put(name: str, content: bytes) -> bytes:
        with atomic.replacing(folder / name) as file:
            file.write(content)
        written.append(folder / name)
        return content

    pictures = {name: put(f"{name}.png", png) for name, png in _curves(log)}
    notes, names = _drawn(log["notes"])
    frames = [(n["epoch"], put(f"weights-{i:03d}.png", _frame(n, names))) for i, n in enumerate(shown(notes))]
    put("index.html", _page(log, title, pictures, frames).encode())
    return written
