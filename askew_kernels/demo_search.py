"""`python -m askew_kernels search --demo`: from a float model to a searched, trained, packed and saved one.

Every part is the package's own: ``search_policy`` and the baselines under one budget of average bits, ``quantize_``,
ASkewSGD, ``pack_``, ``save_packed``. ``--full`` makes the committed evidence: policies found on a proxy and on the
target itself, deployed on the target, five seeds, three budgets (``PAIRS``). First and last layer are searched too.
Training starts from the float target model; the accuracy right after quantization (``before``) says more about a
policy than that after training does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import EpsilonAnnealing, hard_quantize_, load_packed, optim, pack_, param_groups, quantize_, save_packed, search
from .command import check_folder, keeping, positive, read_rows, whole, write_rows
from .demo import BATCH, LABEL_SMOOTHING, RECIPE, Data, _mnist1d_cnn, _run_all, cached, load_digits, load_mnist1d

WEIGHT_BITS = (1, 2, 3, 4, 8)
BUDGETS = (1.25, 1.75)
FLOAT_EPOCHS, AWARE_EPOCHS = 8, 3
FLOAT_LR, AWARE_LR, MOMENTUM = 0.2, 0.1, 0.9
STEPS, STRENGTH_LR = 100, 0.05


# ---- data and networks: what a policy is found on, and where it is used ----------------------------------------------


def digits_cnn(channels: Sequence[int] = (8, 16), hidden: int = 32) -> nn.Sequential:
    """A CNN of the digits: any number of 3 × 3 layers, the second with stride 2."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    before = 1
    for i, width in enumerate(channels):
        stride = 2 if i == 1 else 1
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    layers += [nn.Flatten(), nn.Linear(16 * before, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, 10))


def large_digits_cnn() -> nn.Sequential:
    return digits_cnn((16, 32, 32), 64)


def digits_as_signals(fold: int = 0) -> Data:
    """The digits in mnist1d's shape: 64 pixels as a signal of 40 points."""
    x, x_test, y, y_test = load_digits(fold)
    return *(functional.interpolate(t[:, None], 40, mode="linear")[:, 0] for t in (x, x_test)), y, y_test  # type: ignore[return-value]


def some_mnist1d(fold: int = 0) -> Data:
    """5 % of mnist1d's training signals: another 200 for each seed."""
    x, x_test, y, y_test = cached(load_mnist1d, 0)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(fold))[: len(x) // 20]
    return x[rows], x_test, y[rows], y_test


@dataclass(frozen=True)
class Pair:
    """Proxies {name: (data, network)} and the target."""

    proxies: dict[str, tuple[Callable[[int], Data], Callable[[], nn.Sequential]]]
    target: tuple[Callable[[int], Data], Callable[[], nn.Sequential]]


PAIRS = {
    "mnist1d / CNN": Pair(
        {"digits as signals": (digits_as_signals, _mnist1d_cnn), "5 % of the data": (some_mnist1d, _mnist1d_cnn)},
        (load_mnist1d, _mnist1d_cnn),
    ),
    "digits / larger CNN": Pair({"smaller CNN": (load_digits, digits_cnn)}, (load_digits, large_digits_cnn)),
}
METHODS = ("ASGA", "plain", "sensitivity", "hessian", "random", "uniform")
SEARCHES = {"ASGA": "asga", "plain": "plain"}


@dataclass(frozen=True)
class Job:
    pair: str
    seed: int


@dataclass(frozen=True)
class Row:
    """``found_on``: a proxy's name, "target", or "" where nothing is searched. Accuracies: test, %; seconds: of the
    search; average_bits: of the policy on the target."""

    pair: str
    budget: float
    seed: int
    method: str
    found_on: str
    bits: dict[str, int]
    average_bits: float
    before: float
    accuracy: float
    float_accuracy: float
    seconds: float


# ---- trainings ------------------------------------------------------------------------------------------------------


def data_of(load: Callable[[int], Data], seed: int) -> Data:
    return load(seed % 5) if load in (digits_as_signals, some_mnist1d) else cached(load, seed)


def batches(data: Data, seed: int) -> torch.utils.data.DataLoader:
    x, _, y, _ = data
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), min(BATCH, len(x)), shuffle=True, drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def loss_fn(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output, y, label_smoothing=LABEL_SMOOTHING)


def fit(model: nn.Module, data: Data, epochs: int, seed: int) -> nn.Module:
    """Trains; with quantized layers by the recipe of ``demo``, and hard-quantizes at the end."""
    model.train()
    loader = batches(data, seed)
    total = epochs * len(loader)
    aware = bool(quantized(model))
    optimizer: torch.optim.Optimizer
    annealing = None
    if aware:
        recipe: dict[str, Any] = dict(RECIPE["hard"])
        hold, end = round(recipe.pop("hold") * total), round(recipe.pop("end") * total)
        optimizer = optim.ASkewSGD(param_groups(model), lr=AWARE_LR, momentum=MOMENTUM)
        annealing = EpsilonAnnealing(optimizer, hold=hold, total=end, **recipe)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=FLOAT_LR, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / max(1, total))))
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
            schedule.step()
            if annealing:
                annealing.step()
    return hard_quantize_(model).eval()


def quantized(model: nn.Module) -> bool:
    return any(type(m).__name__.startswith("Askew") for m in model.modules())


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    return 100 * (model(data[1]).argmax(1) == data[3]).float().mean().item()


@torch.no_grad()
def quantize_now(model: nn.Module, policy: search.Policy, data: Data) -> nn.Module:
    """A quantized copy that was not trained, its BatchNorm statistics taken anew from training data."""
    made = quantize_(copy.deepcopy(model), policy).train()
    for m in made.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.reset_running_stats()
            m.momentum = None  # a plain mean
    for x in data[0][: 8 * BATCH].split(BATCH):
        made(x)
    return made.eval()


def float_model(which: tuple[Callable[[int], Data], Callable[[], nn.Sequential]], seed: int) -> tuple[nn.Module, Data]:
    data = data_of(which[0], seed)
    torch.manual_seed(seed)
    return fit(which[1](), data, FLOAT_EPOCHS, seed), data


def find_policy(method: str, model: nn.Module, data: Data, budget: search.Budget, seed: int,
                progress: bool = False) -> search.Policy:  # fmt: skip
    """By any method, from a trained float model and the data that it may see."""
    options: dict[str, Any] = {"weight_bits": WEIGHT_BITS, "budget": budget}
    few = data[0][: 4 * BATCH], data[2][: 4 * BATCH]
    if method in SEARCHES:
        return search.search_policy(model, batches(data, seed), loss_fn, method=SEARCHES[method], steps=STEPS,
                                    strength_lr=STRENGTH_LR, seed=seed, progress=progress, **options)  # fmt: skip
    if method == "hessian":
        return search.hessian_policy(model, few, loss_fn, samples=16, seed=seed, **options)
    if method == "random":
        return search.random_policy(model, few[0], seed=seed, **options)
    return {"sensitivity": search.sensitivity_policy, "uniform": search.uniform_policy}[method](
        model, few[0], **options
    )


def deploy(policy: search.Policy, model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, float, float]:
    """(the trained, hard-quantized model, accuracy before training, accuracy)"""
    before = accuracy(quantize_now(model, policy, data), data)
    torch.manual_seed(seed)
    trained = fit(quantize_(copy.deepcopy(model), policy), data, AWARE_EPOCHS, seed)
    return trained, before, accuracy(trained, data)


def rows_of(job: Job) -> list[Row]:
    """Every method and budget of one pair and seed: searches on the proxies and the target, baselines on the target."""
    pair = PAIRS[job.pair]
    model, data = float_model(pair.target, job.seed)
    float_accuracy = accuracy(model, data)
    proxies = {name: float_model(which, job.seed) for name, which in pair.proxies.items()}
    rows = []
    for bits in BUDGETS:
        budget = search.Budget(average_bits=bits)
        for method in METHODS:
            places = {"target": (model, data), **proxies} if method in SEARCHES else {"": (model, data)}
            for found_on, place in places.items():
                policy = find_policy(method, *place, budget, job.seed)
                here, average = on_target(policy, model, data)
                _, before, after = deploy(policy, model, data, job.seed)
                rows.append(Row(job.pair, bits, job.seed, method, found_on, here, average, before, after,
                                float_accuracy, policy.report["seconds"]))  # fmt: skip
    return rows


def on_target(policy: search.Policy, model: nn.Module, data: Data) -> tuple[dict[str, int], float]:
    """The bits that the policy gives the target's layers, and their average."""
    roles = search.layer_roles(model)
    bits = {name: c.weight.bits for name, c in policy.configs(model).items() if c is not None}
    here = search.Policy(tuple(search.LayerPolicy(n, *roles[n], b) for n, b in bits.items()))
    return bits, search.policy_costs(here, search.trace(model, data[0][:1]))["average_bits"]


# ---- tables and plots -----------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each pair, budget, method and where it was found: mean and standard deviation over seeds."""
    groups: dict[tuple, list[Row]] = {}
    for r in rows:
        groups.setdefault((r.pair, r.budget, r.method, r.found_on), []).append(r)
    order = {p: i for i, p in enumerate(PAIRS)}
    lines = []
    for (pair, budget, method, found_on), members in sorted(
        groups.items(),
        key=lambda g: (order.get(g[0][0], 9), g[0][1], METHODS.index(g[0][2]), g[0][3] != "target", g[0][3]),
    ):
        line: dict[str, Any] = {"pair": pair, "budget": budget, "method": method, "found_on": found_on,
                                "seeds": len(members)}  # fmt: skip
        for key in ("average_bits", "before", "accuracy", "float_accuracy", "seconds"):
            values = [getattr(r, key) for r in members]
            line[key] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(line)
    return lines


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    out = ["| target | budget | policy by | found on | bits | accuracy before training | accuracy | search, s |",
           "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for line in lines:
        cells = [line["pair"], f"{line['budget']:g}", line["method"], line["found_on"] or "—",
                 f"{line['average_bits'][0]:.2f}"]  # fmt: skip
        cells += [f"{line[k][0]:.2f} ± {line[k][1]:.2f}" for k in ("before", "accuracy")]
        out.append("| " + " | ".join([*cells, f"{line['seconds'][0]:.1f}"]) + " |")
    return "\n".join(out)


def paired(rows: Sequence[Row], one: tuple[str, str], other: tuple[str, str], key: str) -> tuple[float, float, int]:
    """Mean difference one − other over equal (pair, budget, seed), its standard error, and how many."""
    values = {(r.pair, r.budget, r.seed, r.method, r.found_on): getattr(r, key) for r in rows}
    found = [v - values[(*k[:3], *other)] for k, v in values.items() if k[3:] == one and (*k[:3], *other) in values]
    if not found:
        return math.nan, math.nan, 0
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return statistics.fmean(found), error, len(found)


def claims(rows: Sequence[Row]) -> str:
    """The published claim and the rest, as paired differences."""
    lines = ["| difference | accuracy before training | accuracy | pairs |", "|---|---|---|---|"]
    comparisons = [
        (("ASGA", proxy), ("ASGA", "target"), f"ASGA found on {proxy} − ASGA found on the target")
        for pair in PAIRS.values()
        for proxy in pair.proxies
    ]
    comparisons += [
        (("ASGA", proxy), ("plain", proxy), f"ASGA − plain, both found on {proxy}")
        for proxy in ("target", *(p for pair in PAIRS.values() for p in pair.proxies))
    ]
    comparisons += [
        (("ASGA", "target"), (m, ""), f"ASGA found on the target − {m}") for m in METHODS if m not in SEARCHES
    ]
    for one, other, text in comparisons:
        cells = []
        for key in ("before", "accuracy"):
            mean, error, n = paired(rows, one, other, key)
            cells.append(f"{mean:+.2f} ± {error:.2f}" if n else "")
        if n:
            lines.append(f"| {text} | {' | '.join(cells)} | {n} |")
    return "\n".join(lines)


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against average bits, before and after training."""
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys(line["pair"] for line in lines))
    figure = Figure(figsize=(11, 3.8 * len(pairs)), layout="constrained")
    axes = figure.subplots(len(pairs), 2, squeeze=False)
    colours = dict(zip(METHODS, ("#1f6fb4", "#d08a2e", "#3a9a5b", "#8c5ab4", "#8a8a8a", "#c0392b"), strict=True))
    for row, pair in zip(axes, pairs, strict=True):
        for axis, key, title in zip(row, ("before", "accuracy"), ("before training", "after training"), strict=True):
            here = [line for line in lines if line["pair"] == pair]
            for method, found_on in dict.fromkeys((line["method"], line["found_on"]) for line in here):
                points = [x for x in here if (x["method"], x["found_on"]) == (method, found_on)]
                axis.errorbar(
                    [p["average_bits"][0] for p in points], [p[key][0] for p in points], [p[key][1] for p in points],
                    marker="o", markersize=4, capsize=2, linewidth=1, color=colours[method],
                    linestyle="-" if found_on in ("", "target") else "--" if "5 %" not in found_on else ":",
                    label=method + (f", {found_on}" if found_on else ""),
                )  # fmt: skip
            axis.axhline(here[0]["float_accuracy"][0], color="black", linewidth=0.8, linestyle="--")
            axis.set_title(f"{pair}, {title}", fontsize=9)
            axis.set_xlabel("average bits of a weight")
            axis.set_ylabel("test accuracy, %")
            axis.grid(alpha=0.3)
        row[1].legend(fontsize=6)
    figure.savefig(path, dpi=120)


# ---- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--demo", action="store_true", help="one seed, from float to packed (the default)")
    what.add_argument("--full", action="store_true", help="the evidence: proxies, targets, budgets, five seeds")
    parser.add_argument("--bits", type=positive, default=1.75, metavar="B", help="demo: average bits of the budget")
    parser.add_argument("--seeds", type=whole(1), default=5, help="full: number of seeds")
    parser.add_argument(
        "--out", type=Path, default=Path("search-results"), help="folder for policy, model, rows, plots"
    )
    parser.add_argument("--workers", type=whole(1), default=os.cpu_count() or 1,
                        help="full: processes (default: one a core, here %(default)s)")  # fmt: skip


def full(args: argparse.Namespace) -> int:
    """Rows that are known are not made again; the tables are of all rows."""
    path = args.out / "search.jsonl"
    rows = read_rows(path, Row)
    done = {Job(r.pair, r.seed) for r in rows}
    jobs = [Job(pair, seed) for seed in range(args.seeds) for pair in PAIRS]
    missing = [job for job in jobs if job not in done]
    print(f"{len(jobs)} cases, {len(missing)} of them to make", file=sys.stderr)
    with keeping(path, rows), contextlib.closing(_run_all(missing, args.workers, rows_of)) as finished:
        for made in finished:
            rows += made
            write_rows(path, rows)
            print(f"{made[0].pair}, seed {made[0].seed}", file=sys.stderr, flush=True)
    rows.sort(key=lambda r: (list(PAIRS).index(r.pair), r.budget, r.seed))
    write_rows(path, rows)
    lines = summarise(rows)
    text = f"{markdown(lines)}\n\nDifferences over equal target, budget and seed, ± standard error:\n\n{claims(rows)}\n"
    (args.out / "search.md").write_text(text)
    print(text)
    plot(lines, args.out / "search.png")
    return 0


def demo(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    console, started = Console(), time.perf_counter()
    budget = search.Budget(average_bits=args.bits)
    pair = PAIRS["digits / larger CNN"]
    for load, build in (*pair.proxies.values(), pair.target):  # a budget out of reach is an error before work
        search.Space(build(), cached(load, 0)[0][:1], WEIGHT_BITS, budget=budget)
    proxy, proxy_data = float_model(pair.proxies["smaller CNN"], 0)
    target, data = float_model(pair.target, 0)
    console.print(f"Float models of the digits: small CNN {accuracy(proxy, proxy_data):.2f} %, larger CNN "
                  f"{accuracy(target, data):.2f} %. Budget: {args.bits:g} bits a weight of {WEIGHT_BITS}.")  # fmt: skip
    table = Table(box=None, title="Policies found on the small CNN or the float target, trained on the larger CNN")
    for heading in ("policy by", "bits, layer by layer", "average", "search, s", "untrained, %", "trained, %"):
        table.add_column(heading, no_wrap=True)
    kept: Any = None
    for method in METHODS:  # ASGA first: an interrupted run has its policy and model
        on_proxy = method in SEARCHES
        policy = find_policy(
            method, *((proxy, proxy_data) if on_proxy else (target, data)), budget, 0, progress=on_proxy
        )
        trained, before, after = deploy(policy, target, data, 0)
        bits, average = on_target(policy, target, data)
        table.add_row(method, " ".join(map(str, bits.values())), f"{average:.2f}", f"{policy.report['seconds']:.1f}",
                      f"{before:.2f}", f"{after:.2f}")  # fmt: skip
        if method == "ASGA":
            kept = policy, after
            policy.save(args.out / "policy.json")
            policy.plot(args.out / "policy.png")
            save_packed(pack_(trained), args.out / "model.safetensors")
    console.print(table)
    policy, after = kept
    console.print(policy.table())
    if "surrogate_gap" in policy.report:
        console.print(f"surrogate gap {policy.report['surrogate_gap']:.4f}, loss {policy.report['loss']:.4f}")
    size = sum(p.numel() * 4 for p in target.parameters())
    again = load_packed(args.out / "model.safetensors", large_digits_cnn()).eval()
    loaded = accuracy(again, data)
    packed = (args.out / "model.safetensors").stat().st_size
    console.print(f"Packed and saved: {packed:,} bytes ({size:,} as float32); loaded again: {loaded:.2f} % "
                  f"({after:.2f} % when trained). {time.perf_counter() - started:.0f} s in all.")  # fmt: skip
    console.print(f"Written: {args.out}/policy.json, policy.png, model.safetensors")
    return 0


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    try:
        import matplotlib  # noqa: F401
        import mnist1d  # noqa: F401
        import rich  # noqa: F401
        import safetensors  # noqa: F401
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        print(f'search: {error.name} is not installed; pip install "askew_kernels[search]"', file=sys.stderr)
        return 2
    check_folder(args.out)
    try:
        return full(args) if args.full else demo(args)
    except search.BudgetError as error:
        print(f"search: {error}", file=sys.stderr)
        return 2
