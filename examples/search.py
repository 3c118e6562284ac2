"""Bits for each layer under a budget, found on a small network and used on a wider one.

Run: python examples/search.py (needs SciPy and scikit-learn: pip install "askew_kernels[search]")
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import askew_kernels as ak

digits = load_digits()
x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 128, shuffle=True)


def network(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


torch.manual_seed(0)
proxy = network(32)
optimizer = torch.optim.SGD(proxy.parameters(), lr=0.2)
for _ in range(5):
    for a, b in loader:
        optimizer.zero_grad()
        functional.cross_entropy(proxy(a), b).backward()
        optimizer.step()

budget = ak.search.Budget(average_bits=2.5)
policy = ak.search.search_policy(
    proxy, loader, functional.cross_entropy, weight_bits=(2, 3, 4, 8), budget=budget, steps=150
)
policy.save("policy.json")

target = ak.quantize_(network(128), ak.search.Policy.load("policy.json"))  # by the layers' roles; then train it
for name, layer in ak.nn.quantized_layers(target).items():
    print(f"layer {name}: {layer.config.weight.bits} bits")
print(ak.search.policy_costs(policy, ak.search.trace(proxy, x[:1])))
