"""A training that is stopped and taken up in another process ends with the same bits. Run: python examples/resume.py

Needs scikit-learn, for its digits: pip install "askew_kernels[demo]".
"""

import subprocess
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import askew_kernels as ak

digits = load_digits()
x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)


def start(steps=200):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Ternary()))
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=1e-2)
    return {"model": model, "optimizer": optimizer, "recipe": ak.Recipe(model, optimizer, steps)}


def train(run, steps):
    for step in steps:
        rows = torch.randint(1400, (128,), generator=torch.Generator().manual_seed(step))
        run["optimizer"].zero_grad()
        functional.cross_entropy(run["model"](x[rows]), y[rows]).backward()
        run["optimizer"].step()
        run["recipe"].step()


def save(run, path):
    torch.save({name: part.state_dict() for name, part in run.items()}, path)


run = start()
if sys.argv[1:] == ["resume"]:  # the second process, which takes up what the first one left
    for name, state in torch.load("checkpoint.pt").items():
        run[name].load_state_dict(state)
    train(run, range(100, 200))
    save(run, "resumed.pt")
else:
    train(run, range(100))
    save(run, "checkpoint.pt")
    subprocess.run([sys.executable, __file__, "resume"], check=True)
    train(run, range(100, 200))  # as if nothing had happened
    resumed = torch.load("resumed.pt")["model"]
    same = all(torch.equal(weight, resumed[name]) for name, weight in run["model"].state_dict().items())
    right = ak.hard_quantize_(run["model"])(x[1400:]).argmax(1) == y[1400:]
    print(f"ternary {right.float().mean().item():.1%} of 397 digits, bit for bit the same: {same}")
