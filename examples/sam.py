"""Sharpness-aware and quantization-aware at once, with clipped gradients. Run: python examples/sam.py"""

import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=3)))
base = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05, momentum=0.9)
optimizer = ak.optim.ASAM(base, rho=0.5, model=model)  # model: running statistics see one pass of the two
recipe = ak.Recipe(model, optimizer, steps=100)
truth = torch.randn(32, 4)

for step in range(100):
    x = torch.randn(128, 32)
    y = (x @ truth).argmax(1)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)  # noqa: B023
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    loss = optimizer.step(closure)  # the loss at the weights themselves; every weight comes back bit for bit
    recipe.step()
    if step % 25 == 24:
        seen = optimizer.telemetry()
        print(f"step {step + 1}: loss {loss.item():.3f}, ", {k: v for k, v in seen.items() if "gap" in k})
ak.hard_quantize_(model)
