"""`python -m askew_kernels search --demo`: from a float model to a searched, trained, packed and saved one.

Every part is the package's own: ``search_policy`` and the baselines under one budget of average bits, ``quantize_``,
ASkewSGD, ``pack_``, ``save_packed``. ``--full`` makes the committed evidence: policies found on a proxy and on the
target itself, deployed on the target, five seeds, three budgets (``PAIRS``). First and last layer are searched too.
Training starts from the float target model; the accuracy right after quantization (``before``) says more about a
policy than that after training does.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import command, demo, figures, search
from askew_kernels.demo import BATCH, LABEL_SMOOTHING, Data, cached, load_digits, load_mnist1d, mnist1d_cnn
from askew_kernels.nn import quantized_layers

from .common import complete, differences, standard_error

WEIGHT_BITS = (1, 2, 3, 4, 8)
BUDGETS = (1.25, 1.75)
FLOAT_EPOCHS, AWARE_EPOCHS = 8, 3
FLOAT_LR, AWARE_LR = 0.2, 0.1
STEPS, STRENGTH_LR = 100, 0.05


# ---- data and networks: what a policy is found on, and where it is used ----------------------------------------------


small_digits_cnn = functools.partial(demo.digits_cnn, (8, 16), 32)
large_digits_cnn = functools.partial(demo.digits_cnn, (16, 32, 32), 64)


def digits_as_signals(fold: int = 0) -> Data:
    """The digits in mnist1d's shape: 64 pixels as a signal of 40 points."""
    x, x_test, y, y_test = load_digits(fold)
    return *(functional.interpolate(t[:, None], 40, mode="linear")[:, 0] for t in (x, x_test)), y, y_test  # type: ignore[return-value]


def some_mnist1d(fold: int = 0) -> Data:
    """5 % of mnist1d's training signals: another 200 for each seed."""
    x, x_test, y, y_test = cached(load_mnist1d, 0)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(fold))[: len(x) // 20]
    return x[rows], x_test, y[rows], y_test


Place = tuple[Callable[[int], Data], Callable[[], nn.Sequential]]  # (data, network)


@dataclass(frozen=True)
class Pair:
    """Proxies by name, and the target."""

    proxies: dict[str, Place]
    target: Place


PAIRS = {
    "mnist1d / CNN": Pair(
        {"digits as signals": (digits_as_signals, mnist1d_cnn), "5 % of the data": (some_mnist1d, mnist1d_cnn)},
        (load_mnist1d, mnist1d_cnn),
    ),
    "digits / larger CNN": Pair({"smaller CNN": (load_digits, small_digits_cnn)}, (load_digits, large_digits_cnn)),
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
    method = "hard" if quantized_layers(model) else "float"
    optimizer, recipe = demo.optimizer_of(model, method, AWARE_LR if method == "hard" else FLOAT_LR)
    loader = batches(data, seed)
    steps = (batch for _ in range(epochs) for batch in loader)
    demo.fit(model.train(), optimizer, steps, max(1, epochs * len(loader)), recipe)
    return ak.hard_quantize_(model).eval()


def accuracy(model: nn.Module, data: Data) -> float:
    return demo.accuracy(model.eval(), data[1], data[3])


@torch.no_grad()
def quantize_now(model: nn.Module, policy: search.Policy, data: Data) -> nn.Module:
    """A quantized copy that was not trained, its BatchNorm statistics taken anew from training data."""
    made = ak.quantize_(copy.deepcopy(model), policy).train()
    for m in made.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.reset_running_stats()
            m.momentum = None  # a plain mean
    for x in data[0][: 8 * BATCH].split(BATCH):
        made(x)
    return made.eval()


def float_model(which: Place, seed: int) -> tuple[nn.Module, Data]:
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
    options |= {"seed": seed} if method == "random" else {}
    return getattr(search, f"{method}_policy")(model, few[0], **options)


def deploy(policy: search.Policy, model: nn.Module, data: Data, seed: int) -> tuple[nn.Module, float, float]:
    """(the trained, hard-quantized model, accuracy before training, accuracy)"""
    before = accuracy(quantize_now(model, policy, data), data)
    torch.manual_seed(seed)
    trained = fit(ak.quantize_(copy.deepcopy(model), policy), data, AWARE_EPOCHS, seed)
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


MEASURED = ("average_bits", "before", "accuracy", "float_accuracy", "seconds")


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each pair, budget, method and where it was found: mean and standard deviation over seeds."""
    order = {p: i for i, p in enumerate(PAIRS)}
    groups = command.grouped(rows, lambda r: (r.pair, r.budget, r.method, r.found_on))
    lines = []
    for key in sorted(groups, key=lambda k: (order.get(k[0], 9), k[1], METHODS.index(k[2]), k[3] != "target", k[3])):
        line: dict[str, Any] = dict(zip(("pair", "budget", "method", "found_on"), key, strict=True))
        line |= {name: demo.mean_std([getattr(r, name) for r in groups[key]]) for name in MEASURED}
        lines.append({**line, "seeds": len(groups[key])})
    return lines


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    headings = "target; budget; policy by; found on; bits; accuracy before training; accuracy; search, s".split("; ")
    return command.markdown_table(headings, [
        (line["pair"], f"{line['budget']:g}", line["method"], line["found_on"] or "—", f"{line['average_bits'][0]:.2f}",
         demo.plus_minus(line["before"]), demo.plus_minus(line["accuracy"]), f"{line['seconds'][0]:.1f}")
        for line in lines
    ])  # fmt: skip


def paired(rows: Sequence[Row], one: tuple[str, str], other: tuple[str, str], key: str) -> tuple[float, float, int]:
    """Mean difference one − other over equal (pair, budget, seed), its standard error, and how many."""
    a, b = ({(r.pair, r.budget, r.seed): getattr(r, key) for r in rows if (r.method, r.found_on) == which}
            for which in (one, other))  # fmt: skip
    found = differences(a, b)
    return (statistics.fmean(found) if found else math.nan), standard_error(found), len(found)


def claims(rows: Sequence[Row]) -> str:
    """The published claim and the rest, as paired differences."""
    proxies = [name for pair in PAIRS.values() for name in pair.proxies]
    target = ("ASGA", "target")
    comparisons = [(("ASGA", p), target, f"ASGA found on {p} − ASGA found on the target") for p in proxies]
    comparisons += [(("ASGA", p), ("plain", p), f"ASGA − plain, both found on {p}") for p in ("target", *proxies)]
    comparisons += [(target, (m, ""), f"ASGA found on the target − {m}") for m in METHODS if m not in SEARCHES]
    lines = []
    for one, other, text in comparisons:
        (before, e, n), (after, f, _) = (paired(rows, one, other, key) for key in ("before", "accuracy"))
        if n:
            lines.append((text, f"{before:+.2f} ± {e:.2f}", f"{after:+.2f} ± {f:.2f}", str(n)))
    return command.markdown_table(("difference", "accuracy before training", "accuracy", "pairs"), lines)


def plot(lines: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Accuracy against average bits, before and after training; a method's colour, a line style for where it was
    found."""
    pairs = command.grouped(lines, lambda line: line["pair"])
    figure, axes = figures.figure(len(pairs), 2, 11, 3.6 * len(pairs) + 0.9)
    colours = dict(zip(METHODS, figures.PALETTE[2:] + figures.PALETTE[:2], strict=False))
    markers = dict(zip(METHODS, figures.MARKERS, strict=False))
    measures = (("before", "before training"), ("accuracy", "after training"))
    for axis, ((pair, here), (key, text)) in zip(axes, itertools.product(pairs.items(), measures), strict=True):
        styles = dict(zip(["", "target", *PAIRS[pair].proxies], ("-", "-", "--", ":"), strict=False))
        series = command.grouped(here, lambda line: (line["method"], line["found_on"]))
        for (method, found_on), points in series.items():
            axis.errorbar(
                [p["average_bits"][0] for p in points], [p[key][0] for p in points], [p[key][1] for p in points],
                marker=markers[method], markersize=4.5, capsize=2, linewidth=1.2, color=colours[method],
                linestyle=styles[found_on],
                label=method + (f", found on {found_on}" if found_on else ""),
            )  # fmt: skip
        axis.axhline(here[0]["float_accuracy"][0], color="black", linewidth=0.8, linestyle="--", label="float")
        figures.label(axis, f"{pair}, {text}", "average bits of a weight", "test accuracy, %")
    figures.legend_below(figure, axes)
    return figures.save(figure, "search", ("png",))


# ---- the command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what, add = parser.add_mutually_exclusive_group(), parser.add_argument
    what.add_argument("--demo", action="store_true", help="one seed, from float to packed (the default)")
    what.add_argument("--full", action="store_true", help="the evidence: proxies, targets, budgets, five seeds")
    add("--bits", type=command.positive, default=1.75, metavar="B", help="demo: average bits of the budget")
    add("--seeds", type=command.whole(1), default=5, help="full: number of seeds")
    add("--out", type=Path, default=Path("search-results"), help="folder for policy, model, rows, plots")
    add("--workers", type=command.whole(1), default=os.cpu_count() or 1,
        help="full: processes (default: one a core, here %(default)s)")  # fmt: skip


def full(args: argparse.Namespace) -> int:
    """Rows that are known are not made again; the tables are of all rows."""
    path = args.out / "search.jsonl"
    jobs = [Job(pair, seed) for seed in range(args.seeds) for pair in PAIRS]
    words, order = "{} cases, {} of them to make", lambda r: (list(PAIRS).index(r.pair), r.budget, r.seed)
    rows = complete(path, Row, lambda r: Job(r.pair, r.seed), jobs, rows_of, args.workers, words, order)
    lines = summarise(rows)
    text = f"{markdown(lines)}\n\nDifferences over equal target, budget and seed, ± standard error:\n\n{claims(rows)}\n"
    print(text)
    for name, data in {"search.md": text.encode(), **plot(lines)}.items():
        command.write_atomic(args.out / name, data)
    return 0


def one_seed(args: argparse.Namespace) -> int:
    screen, started = command.console(120), time.perf_counter()
    budget = search.Budget(average_bits=args.bits)
    pair = PAIRS["digits / larger CNN"]
    for load, build in (*pair.proxies.values(), pair.target):  # a budget out of reach is an error before work
        search.Space(build(), cached(load, 0)[0][:1], WEIGHT_BITS, budget=budget)
    args.out.mkdir(parents=True, exist_ok=True)
    proxy, proxy_data = float_model(pair.proxies["smaller CNN"], 0)
    target, data = float_model(pair.target, 0)
    screen.print(f"Float models of the digits: small CNN {accuracy(proxy, proxy_data):.2f} %, larger CNN "
                  f"{accuracy(target, data):.2f} %. Budget: {args.bits:g} bits a weight of {WEIGHT_BITS}.")  # fmt: skip
    headings = ("policy by", "bits, layer by layer", "average", "search, s", "untrained, %", "trained, %")
    title = "Policies found on the small CNN or the float target, trained on the larger CNN"
    table = command.table(title, headings, left=2)
    kept: Any = None
    for method in METHODS:  # ASGA first: an interrupted run has its policy and model
        found_on = (proxy, proxy_data) if method in SEARCHES else (target, data)
        policy = find_policy(method, *found_on, budget, 0, progress=method in SEARCHES)
        trained, before, after = deploy(policy, target, data, 0)
        bits, average = on_target(policy, target, data)
        table.add_row(method, " ".join(map(str, bits.values())), f"{average:.2f}", f"{policy.report['seconds']:.1f}",
                      f"{before:.2f}", f"{after:.2f}")  # fmt: skip
        if method == "ASGA":
            kept = policy, after
            policy.save(args.out / "policy.json")
            policy.plot(args.out / "policy.png")
            ak.save_packed(ak.pack_(trained), args.out / "model.safetensors")
    screen.print(table)
    policy, after = kept
    screen.print(policy.table())
    if "surrogate_gap" in policy.report:
        screen.print(f"surrogate gap {policy.report['surrogate_gap']:.4f}, loss {policy.report['loss']:.4f}")
    size = sum(p.numel() * 4 for p in target.parameters())
    loaded = accuracy(ak.load_packed(args.out / "model.safetensors", large_digits_cnn()), data)
    packed = (args.out / "model.safetensors").stat().st_size
    screen.print(f"Packed and saved: {packed:,} bytes ({size:,} as float32); loaded again: {loaded:.2f} % "
                  f"({after:.2f} % when trained). {time.perf_counter() - started:.0f} s in all.")  # fmt: skip
    screen.print(f"Written: {args.out}/policy.json, policy.png, model.safetensors")
    return 0


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    command.need("search", "matplotlib", "mnist1d", "rich", "safetensors", "scipy", "sklearn")
    command.check_folder(args.out)
    try:
        return full(args) if args.full else one_seed(args)
    except search.BudgetError as problem:
        raise command.Refused(f"search: {problem}") from None
