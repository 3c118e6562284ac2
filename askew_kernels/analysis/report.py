"""From a log (``ASkewSGD(telemetry_log=…)``) to PNGs and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import figures

TITLES = {
    "loss": "loss", "eps": "ε: 1 is free, 0 only levels", "feasible": "share of feasible weights",
    "flips": "share of weights that changed level in a step", "sharpness": "sharpness", "accuracy": "accuracy",
}  # fmt: skip


def read_log(path: str | os.PathLike) -> dict[str, Any]:
    """{"run": …, "steps": […], "notes": […]} of the last run in a log.

    A resumed run appends to the same file: of the lines for one step the last counts. A last line that was cut off is
    passed over. Raises FileNotFoundError; ValueError naming the line that is not one of a log.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    lines = path.read_text(errors="replace").splitlines()
    run: dict[str, Any] = {}
    steps: dict[int, dict[str, Any]] = {}
    notes: list[dict[str, Any]] = []
    fresh = False
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            kind = found["kind"]
            if kind == "run":
                run, fresh = found, True
                continue
            step = int(found["step"])
            if kind == "step":
                for row in found["tensors"]:
                    _ = [row[key] for key in ("name", "numel", "eps", "lr", "fraction_infeasible", "flips")]
        except (ValueError, KeyError, TypeError) as problem:
            if number == len(lines) and number > 1:
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
    if not run:
        raise ValueError(f"{path}: holds no run; ASkewSGD(…, telemetry_log=…) writes one")
    return {"run": run, "steps": [steps[k] for k in sorted(steps)], "notes": notes}


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
    return figures.save(figure, "it", ("png",), dpi=100)["it.png"]


def _plot(
    title: str, xlabel: str, curves: Sequence[tuple[str, Any, Any, dict[str, Any]]], alone: bool = False, **scale: Any
) -> bytes:  # fmt: skip
    """curves: (label, x, y, how it is drawn); alone: whether the label of a single one tells something."""
    figure, (axis,) = figures.figure(1, 1, 5.2, 3.2)
    for label, x, y, style in curves:
        axis.plot(x, y, label=label, **style)
    if scale:
        axis.set_yscale(**scale)
    figures.label(axis, title, xlabel, grid="both")
    if 1 - alone < len(curves) <= 9:
        figures.legend_below(figure, [axis])
    return _png(figure)


def _curves(log: dict[str, Any]) -> dict[str, bytes]:
    made = {}
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
        made[panel] = _plot(TITLES[panel], "step", drawn, **scale)
    slices = [(n["step"], n["landscape"]) for n in log["notes"] if isinstance(n.get("landscape"), dict)]
    if slices:
        made["landscape"] = _plot("loss along a filter-normalised direction", "t in w + t d", [
            (f"step {step}", s["t"], s["loss"], {"alpha": 0.35 + 0.65 * (i + 1) / len(slices)})
            for i, (step, s) in enumerate(slices)
        ], alone=True)  # fmt: skip
    return made


def _frames(log: dict[str, Any]) -> list[tuple[Any, bytes]]:
    """(epoch, picture): every tensor's weights in units of its scale, levels as lines."""
    notes = [n for n in log["notes"] if n.get("histograms")]
    names = list(dict.fromkeys(name for n in notes for name in n["histograms"]))
    columns = min(3, len(names))
    frames = []
    for note in notes:
        rows = -(-len(names) // columns)
        figure, axes = figures.figure(rows, columns, 3.2 * columns, 1.9 * rows)
        for axis in axes[len(names) :]:
            axis.remove()
        for axis, name in zip(axes, names, strict=False):
            if (h := note["histograms"].get(name)) is None:
                continue
            counts, width = h["counts"], (h["high"] - h["low"]) / len(h["counts"])
            left, total = [h["low"] + i * width for i in range(len(counts))], max(1, sum(counts)) * width
            axis.bar(left, [c / total for c in counts], width, align="edge", color="#1f6fb4")
            for level in h["levels"]:
                axis.axvline(level, color="black", linewidth=0.4, alpha=0.6)
            axis.set_title(name, fontsize=8)
            axis.set_yticks([])
            axis.tick_params(labelsize=7)
        figure.suptitle(f"epoch {note['epoch']}: weights in units of their scale", fontsize=9)
        frames.append((note["epoch"], _png(figure)))
    return frames


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
            f"<td>{100 * r['fraction_infeasible']:.2f} %<td>{r.get('mean_violation', 0):.3g}<td>{r['flips']:.0f}"
            f"<td>{_number(r.get('velocity_norm'))}<td>{_number(r.get('grad_velocity'))}</tr>"
            for r in last
        ]
        parts.append("</table>")
    return "\n".join(parts) + "</html>\n"


def _number(value: Any) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def report(path: str | os.PathLike, folder: str | os.PathLike) -> list[Path]:
    """Writes PNGs and ``index.html`` of the run in the log ``path`` to ``folder``; returns what was written.

    The page holds its pictures itself. A log without losses, epochs, sharpness or slices gives a page without those.
    Raises FileNotFoundError, ValueError (``read_log``); ImportError without Matplotlib.
    """
    log, folder = read_log(path), Path(folder)
    pictures, frames = _curves(log), _frames(log)
    files = {f"{name}.png": png for name, png in pictures.items()}
    files |= {f"weights-{i:03d}.png": png for i, (_, png) in enumerate(frames)}
    files["index.html"] = _page(log, f"{Path(path).name}: the run", pictures, frames).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]
