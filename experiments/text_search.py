"""`python -m experiments.text_search`: the schedules of ``recipe_search`` on text that no table is judged by.

A character GPT of four layers under AdamW, the network of docs/accuracy.md, on the C++ headers that come with torch;
that page's text is Python's standard library. Many are trained side by side as one network, as in ``recipe_search``.
A way's score: by how many hundredths of a nat its validation loss is below straight-through's, paired over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .recipe_search import STE, WAYS, WIDTHS, Networks, Task, report, run

D, BLOCKS, HEADS, LENGTH, CHARACTERS = 128, 4, 4, 128, 128
LINEAR = (("fc", D, 3 * D), ("fc", D, D), ("fc", D, 4 * D), ("fc", 4 * D, D))  # of a block
TASK = Task("headers GPT", "headers", (("rows", D, CHARACTERS), *LINEAR * BLOCKS, ("fc", D, CHARACTERS)),
            epochs=1000, batch=32, settings={"adamw": ((0.004, 0.0),)}, warm=0.05)  # fmt: skip
WINDOWS = 512  # of ``LENGTH`` characters, validated on


def headers(device: torch.device) -> list[Tensor]:
    """[training, _, validation, _] characters of torch's own headers; every twelfth file is validation."""
    root = Path(torch.__file__).parent / "include"
    files = [f for part in ("ATen", "c10", "torch") for f in sorted((root / part).rglob("*.h")) if "ops" not in f.parts]
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i, file in enumerate(files):
        parts[i % 12 == 0].append(np.frombuffer(file.read_bytes(), np.uint8))
    train, held = (np.minimum(np.concatenate(part), CHARACTERS - 1) for part in parts)
    train, held = (torch.as_tensor(part.astype(np.int64), device=device) for part in (train, held))
    return [train, train, held, held]


class Texts(Networks):
    """``epochs`` counts steps; others: places, gain and shift of each layer norm, the linear layers' biases."""

    def _steps(self, epochs: int) -> int:
        return epochs

    def _order(self, rng: torch.Generator, epochs: int) -> Tensor:
        return torch.randint(len(self.data[0]) - LENGTH - 1, (epochs, self.task.batch), generator=rng)

    def _others(self, count: int) -> list[Tensor]:
        places = 0.02 * torch.randn(LENGTH, D, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1).clone()
        shapes = [make(count, D) for _ in range(2 * BLOCKS + 1) for make in (torch.ones, torch.zeros)]
        biases = [torch.zeros(count, 1, of[2]) for of in self.task.layers[1:]]
        return [t.to(self.device) for t in (places, *shapes, *biases)]

    def _start(self, rng: torch.Generator) -> list[Tensor]:
        first, *rest = self.task.layers
        linear = [(torch.rand(of[2], of[1], generator=rng) * 2 - 1) / math.sqrt(of[1]) for of in rest]
        return [torch.randn(first[2], first[1], generator=rng), *linear]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = self.data[0][rows[..., None] + torch.arange(LENGTH + 1, device=self.device)]
        return found[..., :-1], found[..., 1:].flatten(1)

    def forward(self, x: Tensor, weights: list[Tensor], others: list[Tensor], training: bool) -> Tensor:
        """x (R, B, T) -> logits (R, B T, characters)."""
        count, texts, length = x.shape
        places, norms = others[0], others[1 : 4 * BLOCKS + 3]
        biases = others[4 * BLOCKS + 3 :]

        def norm(i: int, h: Tensor) -> Tensor:
            return functional.layer_norm(h, (D,)) * norms[2 * i][:, None] + norms[2 * i + 1][:, None]

        def linear(i: int, h: Tensor) -> Tensor:
            return torch.baddbmm(biases[i], h, weights[i + 1].transpose(1, 2))

        rows = (x + CHARACTERS * torch.arange(count, device=x.device)[:, None, None]).flatten()
        h = functional.embedding(rows, weights[0].reshape(-1, D)).view(count, texts, length, D) + places[:, None]
        h = h.flatten(1, 2)
        for b in range(BLOCKS):
            q, k, v = linear(4 * b, norm(2 * b, h)).view(count * texts, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + linear(4 * b + 1, mixed.transpose(1, 2).reshape(count, texts * length, D))
            h = h + linear(4 * b + 3, functional.gelu(linear(4 * b + 2, norm(2 * b + 1, h))))
        return linear(4 * BLOCKS, norm(2 * BLOCKS, h))

    @torch.no_grad()
    def accuracy(self) -> list[float]:
        """Minus the validation loss, in hundredths of a nat a character."""
        text, count = self.data[2], len(self.replicas)
        total = torch.zeros(count, device=self.device, dtype=torch.float64)
        first = torch.linspace(0, len(text) - LENGTH - 1, WINDOWS, dtype=torch.float64).long().to(self.device)
        for part in first.split(16):
            found = text[part[:, None] + torch.arange(LENGTH + 1, device=self.device)].expand(count, -1, -1)
            logits = self.forward(found[..., :-1], self.copies, self.others, False)
            loss = functional.cross_entropy(logits.flatten(0, 1), found[..., 1:].flatten(), reduction="none")
            total += loss.view(count, -1).double().sum(1)
        return (-100 * total / (WINDOWS * LENGTH)).tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.text_search", description=__doc__)
    add = parser.add_argument
    add("--ways", choices=list(WAYS), default="sixth", help="which list of them (default %(default)s)")
    add("--layers", choices=("all", "inner", "both"), default="both")
    add("--only", nargs="+", metavar="NAME", help="of the ways, beside straight-through")
    add("--widths", nargs="+", choices=list(WIDTHS), default=["2 bits", "ternary", "binary"])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, help=f"default: {TASK.epochs}")
    add("--most", type=int, default=24, help="networks at a time (default %(default)s)")
    add("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth way from the Ith on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--budget", type=float, default=math.inf, help="seconds")
    add("--out", type=Path, default=Path("build/text-search/rows.jsonl"), help="rows are added to it")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + args.budget
    torch.backends.cuda.matmul.allow_tf32 = True
    chosen = [w for w in WAYS[args.ways]() if not args.only or w is STE or w.name in args.only]
    part, parts = args.part
    sets = {"all": (True,), "inner": (False,), "both": (False, True)}[args.layers]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    run(TASK, "adamw", chosen[part::parts], args.widths, args.seeds, headers(torch.device(args.device)), args.steps,
        args.most, deadline, args.out, Texts, sets)  # fmt: skip
    print(report([json.loads(line) for line in args.out.read_text().splitlines()], by=(2, 3)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
