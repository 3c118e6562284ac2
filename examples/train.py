"""Handwritten digits with ternary weights, beside the same training in float. Run: python examples/train.py

Needs scikit-learn, for its digits: pip install "askew_kernels[demo]".
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import askew_kernels as ak

digits = load_digits()
x, y = torch.from_numpy(digits.images / 16).float().unsqueeze(1), torch.from_numpy(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
train_rows, test_rows = order[:1400], order[1400:]


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def train(quantized, steps=200):
    model = network()
    if quantized:  # every layer but the first: same Parameters, other layers
        ak.quantize_(model, {"0": None, "*": ak.QuantConfig(weight=ak.quant.Ternary())})
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)  # without grids: torch's own SGD
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    recipe = ak.Recipe(model, optimizer, steps) if quantized else None
    for _ in range(steps):
        rows = train_rows[torch.randint(len(train_rows), (128,))]
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
        if recipe:
            recipe.step()
    ak.hard_quantize_(model)  # now every weight is a level, bit for bit
    right = model.eval()(x[test_rows]).argmax(1) == y[test_rows]
    return right.float().mean().item()


print(f"float {train(False):.1%}, ternary {train(True):.1%} of {len(test_rows)} digits")
