"""What distributes how: each cell of the tables in docs/distributed.md is tried.

A cell trains a small model over gloo processes in float64 and compares it with one process: weights at the end, and
scales after every step, bit for bit. It is "yes", or "no" with the reason that the user is told.

    python -m experiments.distribution --fill docs/distributed.md
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels.quant import Binary, Ternary, Uniform

from .ranks import Ranks

STEPS, HOLD, FULL, BATCH = 20, 6, 3, 64  # the first FULL steps are on the way over from the float weights
ROUNDED = 1e-10  # float64 weights of runs that only add in another order
LEARNED = 1e-6  # … and float32 scales, of themselves, and weights, where scales are learned from such sums in float32
UNEVEN, EVEN = (16, 33, 12, 3), (16, 32, 8)

OPTIMIZERS: dict[str, Callable[[nn.Module, dict[str, Any]], torch.optim.Optimizer]] = {
    "ASkewSGD": lambda m, o: ak.optim.ASkewSGD(ak.param_groups(m), lr=0.1, momentum=0.9),
    "ASkewAdamW": lambda m, o: ak.optim.ASkewAdamW(ak.param_groups(m), lr=0.01),
    "ASkewLion": lambda m, o: ak.optim.ASkewLion(ak.param_groups(m), lr=0.003),
    "Skewed": lambda m, o: ak.optim.Skewed(torch.optim.SGD(ak.param_groups(m), lr=0.1, momentum=0.9)),
    "SAM": lambda m, o: ak.optim.SAM(_base(m), rho=0.05, **o),
    "ASAM": lambda m, o: ak.optim.ASAM(_base(m), rho=0.5, **o),
    "AlignedSAM": lambda m, o: ak.optim.AlignedSAM(_base(m), rho=0.05, rho_max=0.3, **o),
    "LookSAM": lambda m, o: ak.optim.LookSAM(_base(m), rho=0.05, k=3, **o),
    "MSAM": lambda m, o: ak.optim.MSAM(_base(m), rho=0.1, **o),
    "ESAM": lambda m, o: ak.optim.ESAM(_base(m), rho=0.05, fraction=0.6, **o),
}


def _base(model: nn.Module) -> torch.optim.Optimizer:
    return ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)


FOUR = ak.QuantConfig(Uniform(4))
CONFIGS = {
    "a scale per output": FOUR,
    "a scale per group": ak.QuantConfig(Ternary(), granularity="per_group", group_size=4),
    "a scale per tensor": ak.QuantConfig(Uniform(4), granularity="per_tensor"),
    '`scale="absmax"`': ak.QuantConfig(Uniform(4), "absmax"),
    '`scale="mse"`': ak.QuantConfig(Uniform(3), "mse"),
    '`scale_dtype="float8_e4m3fn"`': ak.QuantConfig(Uniform(4), "absmax", scale_dtype="float8_e4m3fn"),
    "binary": ak.QuantConfig(Binary()),
    '`forward="relaxed"`': ak.QuantConfig(Uniform(4), forward="relaxed"),
    "8-bit inputs": ak.QuantConfig(Uniform(4), activation=Uniform(8)),
    '`forward="int8"`': ak.QuantConfig(Uniform(4), forward="int8"),
    '`forward="fp8"`': ak.QuantConfig(Uniform(4), forward="fp8"),
    'learned scales (`scale="lsq"`)': ak.QuantConfig(Uniform(4), "lsq"),
    "… per tensor": ak.QuantConfig(Uniform(4), "lsq", "per_tensor"),
    "… per group": ak.QuantConfig(Ternary(), "lsq", "per_group", 4),
    '… and `forward="int8"`': ak.QuantConfig(Uniform(4), "lsq", forward="int8"),
    'learned scales of inputs (`activation_scale="lsq"`)': ak.QuantConfig(
        Uniform(4), activation=Uniform(8), activation_scale="lsq"
    ),
    '… and offsets (`"lsq+"`), and of weights': ak.QuantConfig(
        Uniform(4), "lsq", activation=Uniform(8), activation_scale="lsq+"
    ),
}


# ---- how a model is distributed --------------------------------------------------------------------------------------


class Way(NamedTuple):
    """``place(model)``: the model as this rank has it; ``ranks``: how many; ``beside``: of them, how many have the same
    data; ``sizes``: of the network; ``pieces``: micro-batches of a step."""

    ranks: int
    place: Callable[[nn.Module], nn.Module]
    sizes: tuple[int, ...] = UNEVEN
    beside: int = 1
    pieces: int = 1


def mesh(*sizes: int, names: tuple[str, ...] | None = None) -> Any:
    return distributed.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def _linears(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def _fsdp(model: nn.Module, **options: Any) -> nn.Module:
    """Every layer for itself, so that the next one's weights are fetched while one computes."""
    from torch.distributed.fsdp import fully_shard

    for layer in [*_linears(model), model]:
        fully_shard(layer, **options)
    return model


def _by_inputs(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor import Shard

    return _fsdp(model, shard_placement_fn=lambda p: Shard(1 if p.dim() > 1 else 0))


def _prefetched(model: nn.Module) -> nn.Module:
    layers: list[Any] = _linears(_fsdp(model))
    for one, other in itertools.pairwise(layers):
        one.set_modules_to_forward_prefetch([other])
        other.set_modules_to_backward_prefetch([one])
    return model


def _offloaded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return _fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def _tensor_parallel(model: nn.Module, over: Any = None) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, over or mesh(distributed.get_world_size()), styles)


def _both(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    over = mesh(2, 2, names=("data", "tensor"))
    return fully_shard(_tensor_parallel(model, over["tensor"]), mesh=over["data"])  # type: ignore[return-value]


WAYS = {
    "DistributedDataParallel": Way(2, nn.parallel.DistributedDataParallel),
    "FSDP2, 2 ranks": Way(2, _fsdp),
    "FSDP2, 4 ranks, uneven and empty parts": Way(4, _fsdp),
    "FSDP2, prefetching by hand": Way(2, _prefetched),
    "FSDP2, CPU offload": Way(2, _offloaded),
    "FSDP2, two micro-batches a step": Way(2, _fsdp, pieces=2),
    "FSDP2 by inputs (`Shard(1)`)": Way(2, _by_inputs, EVEN),
    "hybrid (HSDP), 2 × 2 ranks": Way(4, lambda m: _fsdp(m, mesh=mesh(2, 2, names=("replicas", "parts")))),
    "tensor parallel, 2 ranks": Way(2, _tensor_parallel, EVEN, 2),
    "FSDP2 over tensor parallel, 2 × 2 ranks": Way(4, _both, EVEN, 2),
}
# {head of a column of the second table: its way}
SPLITS = {
    "DDP": "DDP",
    "FSDP2": "FSDP2",
    "FSDP2 by inputs": "FSDP2 by inputs (`Shard(1)`)",
    "tensor parallel": "tensor parallel, 2 ranks",
    "FSDP2 over tensor parallel": "FSDP2 over tensor parallel, 2 × 2 ranks",
}
ALL_WAYS = {
    **WAYS,
    "DDP": Way(2, nn.parallel.DistributedDataParallel, EVEN),
    "FSDP2": Way(2, _fsdp, EVEN),
}


# ---- a run -----------------------------------------------------------------------------------------------------------


def network(config: ak.QuantConfig, sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = ak.quantize_(nn.Sequential(*layers[:-1]).to(dtype), config)
    if config.activation_scale is not None:
        ak.nn.calibrate_(model, batch(0, sizes, dtype)[0])
    return model


def batch(step: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, sizes[0], generator=draw).to(dtype), torch.randint(0, sizes[-1], (BATCH,), generator=draw)


def whole(t: Any) -> Tensor:
    """A copy of all of it; a call for all ranks."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def inner(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


class Run(NamedTuple):
    weights: list[Tensor]
    scales: list[list[Tensor]]  # after each step, of each layer
    out: Tensor  # of the model after training
    hard: Tensor  # and after hard quantization


def steps(model: nn.Module, optimizer: Any, annealing: Any, way: Way, share: slice, first: int, last: int,
          each: Callable[[], None] = lambda: None) -> None:  # fmt: skip
    for step in range(first, last):
        x, y = (t[share] for t in batch(step, way.sizes, next(inner(model).parameters()).dtype))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=x.dtype)
            for part, to in zip(x.chunk(way.pieces), y.chunk(way.pieces), strict=True):
                loss = functional.cross_entropy(model(part), to) / way.pieces
                loss.backward()
                total += loss.detach()
            return total

        optimizer.step(closure)
        annealing.step()
        each()


def trained(way: Way, optimizer: str, config: ak.QuantConfig, alone: bool = False) -> Run:
    model = network(config, way.sizes)
    share = slice(None)
    if not alone:
        model = way.place(model)
        place, of = distributed.get_rank() // way.beside, distributed.get_world_size() // way.beside
        share = slice(place * BATCH // of, (place + 1) * BATCH // of)
    made = OPTIMIZERS[optimizer](model, {"model": model} if way.place is nn.parallel.DistributedDataParallel else {})
    annealing = ak.EpsilonAnnealing(made, hold=HOLD, total=STEPS, keep_pull=False, full=FULL)
    layers = ak.nn.quantized_layers(inner(model)).values()
    scales: list[list[Tensor]] = []
    steps(model, made, annealing, way, share, 0, STEPS,
          lambda: scales.append([layer.quantizer.scale.detach().clone() for layer in layers]))  # fmt: skip
    x, _ = batch(STEPS, way.sizes)
    with torch.no_grad():
        out = whole(model.eval()(x))
        ak.hard_quantize_(inner(model))
        hard = whole(model(x))
    if (reshard := getattr(model, "reshard", None)) is not None:
        reshard()
    return Run([whole(p) for p in model.parameters()], scales, out, hard)


@functools.cache
def alone(sizes: tuple[int, ...], pieces: int, optimizer: str, config: str) -> Run:
    """The same run in this process."""
    return trained(Way(1, lambda m: m, sizes, pieces=pieces), optimizer, CONFIGS[config], True)


def cells(rank: int, world: int, wanted: list[tuple[str, str, str]]) -> list[Run | str]:
    """(way, optimizer, config) of each: a run, or why it is refused, which every rank is told alike."""
    found: list[Run | str] = []
    for way, optimizer, config in wanted:
        try:
            found.append(trained(ALL_WAYS[way], optimizer, CONFIGS[config]))
        except (NotImplementedError, TypeError, ValueError) as error:
            found.append(f"{error}")
    return found


# ---- what a cell says ------------------------------------------------------------------------------------------------


def _apart(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def word(cell: tuple[str, str, str], ranks: list[Run | str]) -> tuple[str, str]:
    """(the word, the reason of a "no"). AssertionError where a run is not what it should be."""
    name, optimizer, config = cell
    if isinstance(ranks[0], str):
        if any(told != ranks[0] for told in ranks):
            raise AssertionError(f"{cell}: ranks are told different things: {ranks}")
        return "no", ranks[0]
    way = ALL_WAYS[name]
    one = alone(way.sizes, way.pieces, optimizer, config)
    learned = CONFIGS[config].learns_scale or CONFIGS[config].activation_scale is not None
    for run in ranks:
        assert isinstance(run, Run)
        if (apart := _apart(run.weights, one.weights)) > (LEARNED if learned else ROUNDED):
            raise AssertionError(f"{cell}: weights are {apart:.1e} from one process's")
        if (off := _apart([run.out], [run.hard])) > ROUNDED:
            raise AssertionError(f"{cell}: hard quantization changes the outputs by {off:.1e}")
        for step, (mine, its) in enumerate(zip(run.scales, one.scales, strict=True)):
            if learned and all(torch.allclose(s, t, LEARNED, 0.0) for s, t in zip(mine, its, strict=True)):
                continue
            if not all(map(torch.equal, mine, its)):
                raise AssertionError(f"{cell}: scales of step {step} are not one process's, bit for bit")
    return "yes", ""


def tried(ranks: Ranks, wanted: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], tuple[str, str]]:
    """Words of these cells."""
    found = {}
    for world in sorted({ALL_WAYS[name].ranks for name, _, _ in wanted}):
        mine = [cell for cell in wanted if ALL_WAYS[cell[0]].ranks == world]
        told = ranks.call(cells, mine, world=world)
        found.update({cell: word(cell, [of[i] for of in told]) for i, cell in enumerate(mine)})
    return found


FIRST = next(iter(CONFIGS))
OPTIMIZER_CELLS = [(way, optimizer, FIRST) for way in WAYS for optimizer in OPTIMIZERS]
CONFIG_CELLS = [(way, "ASkewSGD", config) for config in CONFIGS for way in SPLITS.values()]
# What `make test` tries: every way, and the optimizers whose steps differ most.
SOME = ("ASkewAdamW", "Skewed", "LookSAM")
SHORT = [c for c in OPTIMIZER_CELLS if c[1] == "SAM" or (c[0] == "FSDP2, 2 ranks" and c[1] in SOME)]


# ---- the page --------------------------------------------------------------------------------------------------------

MARKS = re.compile(r"(<!-- distribution -->\n)(.*?)(<!-- /distribution -->)", re.DOTALL)


def table(found: dict[tuple[str, str, str], tuple[str, str]]) -> str:
    reasons: list[str] = []

    def shown(cell: tuple[str, str, str]) -> str:
        said, why = found[cell]
        if why and why not in reasons:
            reasons.append(why)
        return f"{said} [{reasons.index(why) + 1}]" if why else said

    def rows(head: str, columns: Iterable[str], names: Iterable[str], at: Callable[[str, str], Any]) -> list[str]:
        columns = list(columns)
        table = [[head, *columns], ["---"] * (len(columns) + 1)]
        table += [[name, *(shown(at(name, column)) for column in columns)] for name in names]
        return ["| " + " | ".join(row) + " |" for row in table]

    lines = rows("", OPTIMIZERS, WAYS, lambda way, optimizer: (way, optimizer, FIRST))
    lines += ["", *rows("", SPLITS, CONFIGS, lambda config, way: (SPLITS[way], "ASkewSGD", config)), ""]
    lines += [f"{i}. {why}" for i, why in enumerate(reasons, 1)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/distributed.md.")
    parser.add_argument("--fill", type=Path, help="write them between the page's marks")
    options = parser.parse_args()
    with contextlib.closing(Ranks()) as ranks:
        text = table(tried(ranks, OPTIMIZER_CELLS + CONFIG_CELLS))
    print(text)
    if options.fill:
        page = options.fill.read_text(encoding="utf-8")
        if not MARKS.search(page):
            raise SystemExit(f"{options.fill}: has no <!-- distribution --> marks")
        options.fill.write_text(MARKS.sub(lambda m: m[1] + text + m[3], page), encoding="utf-8")


if __name__ == "__main__":
    main()
