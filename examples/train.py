"""A network trained to 2-bit weights, beside the same training in float. Run: python examples/train.py"""

import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak

templates = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))


def batch(size=128):
    y = torch.randint(0, 10, (size,))
    return templates[y] + 2 * torch.randn(size, 64), y


def train(quantized, steps=400):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    if quantized:
        ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=2)))  # same Parameters, other layers
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1, momentum=0.9)  # without grids: torch's own SGD
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    recipe = ak.Recipe(model, optimizer, steps) if quantized else None
    for _ in range(steps):
        x, y = batch()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        if recipe:
            recipe.step()
    ak.hard_quantize_(model)  # now every weight is a level, bit for bit
    x, y = batch(4000)
    return (model(x).argmax(1) == y).float().mean().item()


print(f"float {train(False):.1%}, 2 bits {train(True):.1%}")
