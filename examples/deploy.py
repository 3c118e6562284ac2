"""From trained weights to one small file and back, with the very outputs that were validated.

Run: python examples/deploy.py
"""

from pathlib import Path

import torch
from torch import nn

import askew_kernels as ak


def build_model():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))


torch.manual_seed(0)
model = ak.quantize_(build_model(), ak.QuantConfig(weight=ak.quant.Uniform(bits=4)))  # and train it
ak.hard_quantize_(model)
x = torch.randn(2, 3, 8, 8)
validated = model(x)

ak.pack_(model)  # codes and scales instead of weights
ak.save_packed(model, "model.safetensors")
with torch.device("meta"):
    empty = build_model()
loaded = ak.load_packed("model.safetensors", empty)
torch.testing.assert_close(loaded(x), validated)

size = sum(4 * p.numel() for p in build_model().parameters())
print(f"{Path('model.safetensors').stat().st_size:,} bytes, {size:,} as float32")
print("python -m askew_kernels inspect model.safetensors lists them")
