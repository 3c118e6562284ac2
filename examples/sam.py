"""Sharpness-aware and quantization-aware at once, with clipped gradients. Run: python examples/sam.py

Needs scikit-learn, for its digits: pip install "askew_kernels[demo]".
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
model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=3)))
base = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.05, momentum=0.9)
optimizer = ak.optim.ASAM(base, rho=0.5, model=model)  # model: running statistics see one pass of the two
recipe = ak.Recipe(model, optimizer, steps=200)

for step in range(200):
    rows = torch.randint(1400, (128,))

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[rows]), y[rows])  # noqa: B023
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    loss = optimizer.step(closure)  # the loss at the weights themselves; every weight comes back bit for bit
    recipe.step()
    if step % 50 == 49:
        gap = optimizer.telemetry()["surrogate_gap"]  # how much higher the loss is, rho away
        print(f"step {step + 1}: loss {loss.item():.3f}, {gap:.3f} higher within the radius")
ak.hard_quantize_(model)
right = model.eval()(x[1400:]).argmax(1) == y[1400:]
print(f"3 bits: {right.float().mean().item():.1%} of {len(right)} digits")
