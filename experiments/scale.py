"""What training under the constraint holds and communicates on each of many GPUs: the tables of docs/scale.md.

``held`` and ``sent`` are formulas in bytes, of weights that FSDP2 splits by rows; ``counted`` counts the same of a run
over gloo processes, and tests compare the two. The tables are the formulas for models that no test can run.

    python -m experiments.scale --fill docs/scale.md
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

import askew_kernels as ak

from .distribution import BATCH, FOUR, OPTIMIZERS, batch, network

SCALE, SUMS = 4, 12  # bytes of a row: its scale, and the three sums it follows from, float32
FLOAT = 4  # of a weight that is trained, its gradient, each buffer of its rule
# {optimizer: (numbers it keeps for a weight, those of a wrapper beside, gradients of a step; LookSAM's between looks)}
KEEPS = {"ASkewSGD": (1, 0, 1), "ASkewAdamW": (2, 0, 1), "SAM": (1, 1, 2), "AlignedSAM": (1, 1, 2),
         "LookSAM": (1, 2, 1), "MSAM": (1, 1, 1), "Skewed": (1, 1, 1)}  # fmt: skip


class Layer(NamedTuple):
    """A weight (outputs, inputs), how many biases it has, and whether it is quantized."""

    outputs: int
    inputs: int
    biases: int = 0
    quantized: bool = True


def own(size: int, ranks: int, rank: int = 0) -> int:
    """Rows of a rank: FSDP2 gives each ceil(size / ranks), and the last ones what is left."""
    each = -(-size // ranks)
    return max(0, min(each, size - rank * each))


def held(layers: list[Layer], optimizer: str, ranks: int, rank: int = 0) -> dict[str, int]:
    """Bytes that stay on a rank between two steps, gradients included."""
    rule, beside, _ = KEEPS[optimizer]
    mine = sum(own(a, ranks, rank) * b + own(c, ranks, rank) for a, b, c, _ in layers)
    constrained = sum(own(a, ranks, rank) * b for a, b, _, quantized in layers if quantized)
    copied = constrained if optimizer == "Skewed" else mine
    rows = sum(layer.outputs for layer in layers if layer.quantized)
    return {"weights": FLOAT * mine, "gradients": FLOAT * mine, "optimizer": FLOAT * (rule * mine + beside * copied),
            "scales": (SCALE + SUMS) * rows}  # fmt: skip


def sent(layers: list[Layer], optimizer: str, ranks: int, kept: bool = False, follows: bool = True,
         forward: int = FLOAT) -> dict[str, int]:  # fmt: skip
    """Bytes of whole tensors that a step gathers, scatters and adds up. ``kept``: gathered weights stay from the
    forward to the backward; ``follows``: scales are not frozen yet; ``forward``: bytes of a weight in the forward."""
    passes = KEEPS[optimizer][2]
    size = sum(ranks * own(a, ranks) * b + ranks * own(c, ranks) for a, b, c, _ in layers)  # padded
    rows = sum(layer.outputs for layer in layers if layer.quantized)
    return {"gathered": (1 if kept else 2) * passes * forward * size, "scattered": passes * FLOAT * size,
            "sums": SUMS * rows * follows}  # fmt: skip


# ---- counting --------------------------------------------------------------------------------------------------------


def _bytes(tensors: Any) -> int:
    seen: dict[int, int] = {}
    for t in tensors:
        part = t.to_local() if hasattr(t, "to_local") else t
        if part.numel():
            seen[part.data_ptr()] = part.numel() * part.element_size()
    return sum(seen.values())


def held_by(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """What ``held`` says, of tensors that are there."""
    params = list(model.parameters())
    quantizers = [layer.quantizer for layer in ak.nn.quantized_layers(model).values()]
    scales = {id(t) for q in quantizers for t in (q.scale, q.flag, q.row_sums)}
    numbers = [t for state in optimizer.state.values() for t in state.values()
               if isinstance(t, Tensor) and t.dim() and id(t) not in scales]  # fmt: skip
    copies = list(getattr(optimizer, "_copies", {}).values())
    kept = [t for q in quantizers for t in vars(q).get("_copies", {}).values()]
    return {"weights": _bytes(params), "gradients": _bytes(p.grad for p in params if p.grad is not None),
            "optimizer": _bytes([*numbers, *copies]),
            "scales": _bytes([t for q in quantizers for t in (q.scale, q.row_sums)]) + _bytes(kept)}  # fmt: skip


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Bytes by what they are for, while it lasts: of the whole tensors that torch.distributed is given."""
    found = {"gathered": 0, "scattered": 0, "sums": 0}
    names = {"all_gather_into_tensor": "gathered", "all_gather_single": "gathered", "all_reduce": "sums",
             "reduce_scatter_tensor": "scattered", "reduce_scatter_single": "scattered"}  # fmt: skip
    kept = {name: getattr(distributed, name) for name in names if hasattr(distributed, name)}

    def noted(name: str, call: Any) -> Any:
        def counts(*args: Any, **kwargs: Any) -> Any:
            sizes = [
                t.numel() * t.element_size()
                for t in (*args, *kwargs.values())
                if isinstance(t, Tensor) and (name != "all_reduce" or t.dtype == torch.float32)
            ]  # norms: float64
            found[names[name]] += max(sizes, default=0)
            return call(*args, **kwargs)

        return counts

    try:
        for name, call in kept.items():
            setattr(distributed, name, noted(name, call))
        yield found
    finally:
        for name, call in kept.items():
            setattr(distributed, name, call)


SIZES = (16, 33, 12, 3)
SMALL = [Layer(b, a, b) for a, b in itertools.pairwise(SIZES)]


def counted(rank: int, world: int, optimizer: str) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """(held, sent while scales follow, sent once they are frozen) of a rank of a small run."""
    from torch.distributed.fsdp import fully_shard

    model = network(FOUR, SIZES, torch.float32)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, reshard_after_forward=True)
    made: Any = OPTIMIZERS[optimizer](model, {})
    made.telemetry_every = 0
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)

    def closure() -> Tensor:
        x, y = (t[share] for t in batch(0, SIZES, torch.float32))
        made.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    traffic = []
    for eps in (1.0, 0.5):
        for group in made.param_groups:
            group["constraint_eps"] = eps
        for _ in range(2):  # the first looks at weights, and makes state
            made.step(closure)
        with counting() as found:
            made.step(closure)
        traffic.append(found)
    return held_by(model, made), traffic[0], traffic[1]


# ---- models that are planned -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """A decoder with grouped queries and gated feed-forward layers: its blocks are quantized, the ends are not."""

    width: int
    inner: int
    keys: int  # outputs of the keys' projection
    blocks: int
    words: int = 128256

    @property
    def block(self) -> list[Layer]:
        w, f, k = self.width, self.inner, self.keys
        return [Layer(w, w), Layer(k, w), Layer(k, w), Layer(w, w), Layer(f, w), Layer(f, w), Layer(w, f)]

    @property
    def layers(self) -> list[Layer]:
        ends = [Layer(self.words, self.width, quantized=False)] * 2
        return self.block * self.blocks + ends


MODELS = {"8B": Decoder(4096, 14336, 1024, 32), "70B": Decoder(8192, 28672, 1024, 80)}
RANKS = (8, 64, 256, 1024)
PLANNED = {"ASkewSGD": "ASkewSGD", "ASkewAdamW": "ASkewAdamW", "SAM": "SAM(ASkewSGD)",
           "LookSAM": "LookSAM(ASkewSGD), between looks"}  # fmt: skip
BF16 = 2
MARKS = re.compile(r"(<!-- scale -->\n)(.*?)(<!-- /scale -->)", re.DOTALL)


def _gb(count: float) -> str:
    return f"{count / 1e9:,.{3 if count < 1e9 else 1}f}"


def gathered_blocks(model: Decoder) -> int:
    """Bytes of two blocks in bfloat16, one that computes and one that is fetched, and of one's quantized copy."""
    return 3 * BF16 * sum(a * b for a, b, *_ in model.block)


def tables() -> str:
    lines = []
    for name, model in MODELS.items():
        count = sum(a * b for a, b, *_ in model.layers)
        quantized = sum(a * b for a, b, _, is_ in model.layers if is_)
        rows = sum(a for a, _, _, is_ in model.layers if is_)
        lines += [f"**{name}**: {count / 1e9:.2f} · 10⁹ weights, {quantized / 1e9:.2f} of them quantized, in {rows:,} "
                  f"rows. Two blocks in bfloat16 and one's quantized copy: {_gb(gathered_blocks(model))} GB.", "",
                  "| GB that stay on a GPU | " + " | ".join(f"{n:,} GPUs" for n in RANKS) + " |",
                  "| --- " * (len(RANKS) + 1) + "|"]  # fmt: skip
        for optimizer in PLANNED:
            cells = [_gb(sum(held(model.layers, optimizer, n).values())) for n in RANKS]
            lines.append(f"| {PLANNED[optimizer]} | " + " | ".join(cells) + " |")
        scales = held(model.layers, "ASkewSGD", 1)["scales"]
        lines += [f"| of these, scales and sums | {' | '.join([_gb(scales)] * len(RANKS))} |", "",
                  "| GB a step, of whole tensors | gathered (bfloat16) | scattered (float32) | sums, until frozen |",
                  "| --- | --- | --- | --- |"]  # fmt: skip
        for optimizer in PLANNED:
            found = sent(model.layers, optimizer, 8, forward=BF16)
            cells = [_gb(found[key]) for key in ("gathered", "scattered", "sums")]
            lines.append(f"| {PLANNED[optimizer]} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/scale.md.")
    parser.add_argument("--fill", type=Path, help="write them between the page's marks")
    options = parser.parse_args()
    print(tables())
    if options.fill:
        page = options.fill.read_text(encoding="utf-8")
        options.fill.write_text(MARKS.sub(lambda m: m[1] + tables() + m[3], page), encoding="utf-8")


if __name__ == "__main__":
    main()
