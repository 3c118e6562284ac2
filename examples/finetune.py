"""A trained float model, fine-tuned to ternary weights in few steps: its own float outputs are the targets.

Run: python examples/finetune.py
"""

import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak

torch.manual_seed(0)
truth = torch.randn(32, 4)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def fit(loss_of, optimizer, steps, *schedules):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(torch.randn(128, 32)).backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()


def accuracy():
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    return f"{(model(x).argmax(1) == (x @ truth).argmax(1)).float().mean().item():.1%}"


fit(
    lambda x: functional.cross_entropy(model(x), (x @ truth).argmax(1)),
    torch.optim.AdamW(model.parameters(), 3e-3),
    300,
)
print("float", accuracy())

distiller = ak.distill(model, temperature=2.0)  # a float copy teaches; labels are not needed
ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Ternary()))
print("ternary, not trained", accuracy())

steps = 200
optimizer = ak.optim.ASkewAdamW(ak.param_groups(model, weight_decay=0.0), lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, cycle_momentum=False)
recipe = ak.Recipe(model, optimizer, steps, settings="finetune")  # quantized from the first step on
fit(distiller, optimizer, steps, schedule, recipe)
print("ternary, fine-tuned", accuracy())
ak.hard_quantize_(model)  # every weight on its level: the same outputs
print("hard-quantized", accuracy())
