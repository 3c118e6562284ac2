"""A training that is stopped and taken up again ends with the same bits. Run: python examples/resume.py"""

import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak


def start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Ternary()))
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=1e-2)
    return {"model": model, "optimizer": optimizer, "recipe": ak.Recipe(model, optimizer, steps=60)}


def train(run, steps):
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(64, 32, generator=g), torch.randint(0, 4, (64,), generator=g)
        run["optimizer"].zero_grad()
        functional.cross_entropy(run["model"](x), y).backward()
        run["optimizer"].step()
        run["recipe"].step()


whole = start()
train(whole, range(60))

first = start()
train(first, range(30))
torch.save({name: part.state_dict() for name, part in first.items()}, "checkpoint.pt")

again = start()  # in a new process
for name, state in torch.load("checkpoint.pt").items():
    again[name].load_state_dict(state)
train(again, range(30, 60))

pairs = zip(whole["model"].parameters(), again["model"].parameters(), strict=True)
print("bit for bit the same:", all(torch.equal(a, b) for a, b in pairs))
