"""From trained weights to one small file and back, with the very outputs that were validated.

Run: python examples/deploy.py (needs scikit-learn and safetensors: pip install "askew_kernels[search]")
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import askew_kernels as ak

digits = load_digits()
x, y = torch.from_numpy(digits.images / 16).float().unsqueeze(1), torch.from_numpy(digits.target)


def build_model():
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))


torch.manual_seed(0)
model = ak.quantize_(build_model(), ak.QuantConfig(weight=ak.quant.Uniform(bits=4)))
optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=3e-3)
recipe = ak.Recipe(model, optimizer, steps=150)
for _ in range(150):
    rows = torch.randint(1400, (128,))
    optimizer.zero_grad()
    functional.cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()
    recipe.step()
ak.hard_quantize_(model)
validated = model(x[1400:])

ak.pack_(model)  # codes and scales instead of weights
ak.save_packed(model, "model.safetensors")
with torch.device("meta"):
    empty = build_model()  # in another process: the code of the model, without weights
loaded = ak.load_packed("model.safetensors", empty)
torch.testing.assert_close(loaded(x[1400:]), validated)

size = sum(4 * p.numel() for p in build_model().parameters())
right = (loaded(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
print(
    f"{Path('model.safetensors').stat().st_size:,} bytes, {size:,} as float32; {right:.1%} of {len(validated)} digits"
)
print("python -m askew_kernels inspect model.safetensors lists them")
