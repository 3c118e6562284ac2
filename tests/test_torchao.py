"""Contract: packed layers as torchao's tensors.

1. They hold the same weights, bit for bit.
2. What they do not hold is refused by the layer's name, before anything is replaced.
"""

from __future__ import annotations

import pytest
import torch
from oracles import NF4
from torch import nn

import askew_kernels as ak
from askew_kernels.quant import Binary, Codebook, Ternary, Uniform

CONFIGS = {
    "int4 tensor": ak.QuantConfig(Uniform(4), granularity="per_tensor"),
    "int4 channel": ak.QuantConfig(Uniform(4), scale="absmax"),
    "int4 group": ak.QuantConfig(Uniform(4), granularity="per_group", group_size=16, scale="absmax"),
    "int8": ak.QuantConfig(Uniform(8), scale="absmax"),
    "binary": ak.QuantConfig(Binary(), scale="mean"),
    "ternary": ak.QuantConfig(Ternary(), scale="mean"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CONFIGS, "unsigned8"])
def test_torchao_holds_the_same_weight(name, dtype):
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao, to_torchao_

    config = CONFIGS.get(name, ak.QuantConfig(Uniform(8, signed=False), scale="absmax"))
    model = nn.Sequential(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 6, bias=False)).to(dtype)
    only = {} if name != "int4 group" else {"filter_fn": lambda module, _: module.in_features % 16 == 0}
    model = ak.pack_(ak.quantize_(model, config, **only), force=True).eval()
    layer = model[0]
    tensor = to_torchao(layer)
    assert torch.equal(tensor.dequantize(), layer.dequantize()) and tensor.shape == layer.shape
    x = torch.randn(4, 32).to(dtype)
    with torch.no_grad():
        want = model(x)
        assert to_torchao_(model) is model and type(model[0]) is nn.Linear
        torch.testing.assert_close(model(x), want, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=0.02)


def test_torchao_layers_keep_their_hooks_and_ties():
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao_

    layer, seen = nn.Linear(32, 32), []
    model = ak.pack_(ak.quantize_(nn.Sequential(layer, nn.ReLU(), layer), CONFIGS["int8"]), force=True).eval()
    model[0].register_forward_hook(lambda module, *_: seen.append(type(module)))
    to_torchao_(model)(torch.ones(2, 32))
    assert model[0] is model[2] and seen == [nn.Linear] * 2


def test_torchao_int4_layout():
    """Two's complement nibbles, even columns low; scales (groups, n) in bfloat16; weight = q s + zero point."""
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao

    for grid in (Uniform(4), Uniform(4, signed=False), Uniform(3)):
        config = ak.QuantConfig(grid, granularity="per_group", group_size=16, scale="absmax")
        model = ak.quantize_(nn.Sequential(nn.Linear(32, 6)), config)
        layer = ak.pack_(model, force=True, scale_dtype=torch.bfloat16)[0]
        made = to_torchao(layer, "int4")
        low = (made.qdata << 4) >> 4  # of int8: with its sign
        q = torch.stack([low, made.qdata >> 4], 2).reshape(6, 2, 16).float()
        scale, zero = (t.t().reshape(6, 2, 1).float() for t in (made.scale, made.zero_point))
        assert torch.equal((q * scale + zero).reshape(6, 32), layer.dequantize())
        assert made.block_size == [1, 16] and made.scale.shape == (2, 6) and made.qdata.dtype == torch.int8


def test_torchao_names_what_it_cannot_hold():
    pytest.importorskip("torchao")
    from askew_kernels.deploy.to_torchao import to_torchao, to_torchao_

    def model(config):
        torch.manual_seed(0)
        return ak.pack_(ak.quantize_(nn.Sequential(nn.Linear(32, 6)), config), force=True)

    nf4 = model(ak.QuantConfig(Codebook(NF4), scale="absmax"))
    with pytest.raises(ValueError, match=r"^0: torchao.s tensors hold integer levels, got Codebook"):
        to_torchao_(nf4)
    assert type(nf4[0]).__name__ == "PackedLinear"
    with pytest.raises(ValueError, match=r"^0: torchao.s tensors hold levels of 8 bits"):
        to_torchao_(model(ak.QuantConfig(Codebook([-300.0, 0.0, 300.0]), scale="absmax")))
    for form in ("intx", "int4"):
        with pytest.raises(ValueError, match=r"^0: torchao.s tensors keep no quantized inputs, got activation=Uniform"):
            to_torchao_(model(ak.QuantConfig(Uniform(4), activation=Uniform(3))), form)
    with pytest.raises(ValueError, match=r"model: is itself a layer; use to_torchao\(layer\)"):
        to_torchao_(nf4[0])
    with pytest.raises(ValueError, match="int4: expected at most 16 consecutive integers"):
        to_torchao(model(CONFIGS["int8"])[0], "int4")
    with pytest.raises(ValueError, match="int4: bfloat16 does not hold the scales"):
        to_torchao(model(CONFIGS["int4 channel"])[0], "int4")
    with pytest.raises(ValueError, match="format: expected one of intx, int4, got 'int3'"):
        to_torchao(nf4[0], "int3")
    with pytest.raises(TypeError, match="layer: expected a PackedLinear, got Linear"):
        to_torchao(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: has no PackedLinear"):
        to_torchao_(nn.Sequential(nn.Linear(2, 2)))
