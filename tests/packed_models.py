"""A small model of a convolution and linear layers, packed in the ways that formats of integers tell apart."""

import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.quant import Binary, Ternary, Uniform

CONFIGS = {
    "int4 tensor": ak.QuantConfig(Uniform(4), granularity="per_tensor"),
    "int4 channel": ak.QuantConfig(Uniform(4), scale="absmax"),
    "int4 group": ak.QuantConfig(Uniform(4), granularity="per_group", group_size=16, scale="absmax"),
    "int8": ak.QuantConfig(Uniform(8), scale="absmax"),
    "binary": ak.QuantConfig(Binary(), scale="mean"),
    "ternary": ak.QuantConfig(Ternary(), scale="mean"),
}


def build():
    return nn.Sequential(nn.Conv2d(16, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 32, bias=False),
                         nn.ReLU(), nn.Linear(32, 5))  # fmt: skip


def packed(config, **options):
    torch.manual_seed(2)
    return ak.pack_(ak.quantize_(build(), config), force=True, **options).eval()


X = torch.randn(3, 16, 6, 6, generator=torch.Generator().manual_seed(1))
