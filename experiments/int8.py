"""What products of levels cost in accuracy: the demo's MLP on mnist1d, all linear layers at 4 bits, trained with the
float32 forward, with ``forward="int8"``, with ``gradient="int8"`` as well, and with LUQ's 4-bit gradients.

    python -m experiments.int8 --seeds 5 --epochs 40

Each row has the same initial weights and order of data for a seed; differences are paired over seeds, to the float32
forward, with the standard error of their mean. The learning rate and the recipe are the demo's, chosen for the float32
forward.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from askew_kernels import demo, hard_quantize_, optim, param_groups, quantize_
from askew_kernels.quant import LUQ, QuantConfig, Uniform

ROWS: dict[str, dict[str, Any]] = {
    "float32": {"forward": "hard"},
    "int8 forward": {"forward": "int8"},
    "int8 forward and input gradient": {"forward": "int8", "gradient": "int8"},
    "float32, LUQ(4) gradients": {"forward": "hard", "gradient": LUQ(4)},
    "int8 forward, LUQ(4) gradients": {"forward": "int8", "gradient": LUQ(4)},
}


def accuracy(how: dict[str, Any], bits: int, epochs: int, seed: int) -> float:
    data = demo.cached(demo.load_mnist1d, 0)
    torch.manual_seed(seed)
    model = quantize_(demo.mlp(40, 128), QuantConfig(Uniform(bits), **how)).train()
    optimizer = optim.ASkewSGD(param_groups(model), lr=demo.LR, momentum=demo.MOMENTUM)
    total = epochs * (len(data[0]) // demo.BATCH)
    demo.fit(model, optimizer, demo.batches(data, epochs, seed), total, "hard")
    hard_quantize_(model.eval())
    return demo.accuracy(model, data[1], data[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args()
    found: dict[str, Tensor] = {}
    print(f"| {args.bits} bits, {args.seeds} seeds, {args.epochs} epochs | accuracy | difference |\n|---|---|---|")
    for name, how in ROWS.items():
        found[name] = torch.tensor([accuracy(how, args.bits, args.epochs, seed) for seed in range(args.seeds)])
        apart = found[name] - found["float32"]
        error = apart.std() / math.sqrt(args.seeds) if args.seeds > 1 else torch.zeros(())
        shown = f"{apart.mean():+.2f} ± {error:.2f}" if name != "float32" else ""
        print(f"| {name} | {found[name].mean():.2f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
