"""A trained float model, fine-tuned to ternary weights with its first and last layer left float, under an average of
its weights. Run: python examples/finetune.py"""

import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import askew_kernels as ak

torch.manual_seed(0)
truth = torch.randn(32, 4)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def fit(optimizer, steps, after=lambda: None):
    for _ in range(steps):
        x = torch.randn(128, 32)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), (x @ truth).argmax(1)).backward()
        optimizer.step()
        after()


def accuracy(of):
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    return f"{(of(x).argmax(1) == (x @ truth).argmax(1)).float().mean().item():.1%}"


fit(torch.optim.AdamW(model.parameters(), lr=3e-3), 300)
print("float", accuracy(model))

ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Ternary()), lambda module, name: name not in ("0", "4"))
print("ternary, not trained", accuracy(model))
optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=3e-4)
annealing = ak.EpsilonAnnealing(optimizer, total=280)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
fit(optimizer, 300, lambda: (annealing.step(), average.update_parameters(model)))
print("ternary, fine-tuned", accuracy(ak.hard_quantize_(model)))
print("its average, quantized", accuracy(ak.hard_quantize_(average.module)))
