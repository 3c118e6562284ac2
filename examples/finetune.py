"""A trained float model, fine-tuned to ternary weights in few steps: its own float outputs are the targets.

Run: python examples/finetune.py (needs scikit-learn, for its digits: pip install "askew_kernels[demo]")
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import askew_kernels as ak

digits = load_digits()
x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
x, y = x[order], y[order]  # 1,400 to train with, the others to test

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def fit(loss_of, optimizer, steps, *schedules):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(torch.randint(1400, (128,))).backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()


def accuracy():
    return f"{(model(x[1400:]).argmax(1) == y[1400:]).float().mean().item():.1%}"


fit(lambda rows: functional.cross_entropy(model(x[rows]), y[rows]), torch.optim.AdamW(model.parameters(), 3e-3), 200)
print("float", accuracy())

distiller = ak.distill(model, temperature=2.0)  # a float copy teaches; labels are not needed
ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Ternary()))
print("ternary, not trained", accuracy())

steps = 150
optimizer = ak.optim.ASkewAdamW(ak.param_groups(model, weight_decay=0.0), lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, cycle_momentum=False)
recipe = ak.Recipe(model, optimizer, steps, settings="finetune")  # quantized from the first step on
fit(lambda rows: distiller(x[rows]), optimizer, steps, schedule, recipe)
print("ternary, fine-tuned", accuracy())
ak.hard_quantize_(model)  # every weight on its level: the same outputs
print("hard-quantized", accuracy())
