"""Contract: packed models in other hands.

1. ``torch.compile(fullgraph=True)`` and ``torch.export`` give what the model gives.
2. Linear layers of a ``transformers`` model are quantized by pattern, packed, saved and loaded.
"""

from __future__ import annotations

import pytest
import torch
from packed_models import CONFIGS, X, packed
from torch import nn

import askew_kernels as ak
from askew_kernels.quant import Uniform


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_compiled_without_graph_breaks(activations):
    model = packed(CONFIGS["int4 group"], activations=activations)
    with torch.no_grad():
        want = model(X)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("activations", ["float", "bf16", "int8"])
def test_compiled_float64(activations, learns, generator):
    """It is the reference's, in one graph, with the same gradients."""
    torch._dynamo.reset()
    w, scale = torch.randn(5, 8, generator=generator), torch.rand(5, generator=generator) + 0.2
    codes = ak.quant.pack_weight(w, scale, Uniform(4))
    x, bias = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((3, 8), (5,)))
    learned = [t.requires_grad_(learns) for t in (x, scale, bias)]

    def linear(x, scale, bias):
        return ak.ops.packed_linear(x, codes, scale, Uniform(4), 4, bias, activations)

    got, want = torch.compile(linear, fullgraph=True, backend="aot_eager")(*learned), linear(*learned)
    assert torch.equal(got, want)
    if learns:
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), learned) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


def test_exported():
    model = packed(CONFIGS["ternary"])
    with torch.no_grad():
        program = torch.export.export(model, (X,))
        torch.testing.assert_close(program.module()(X), model(X))
        assert any("packed_linear" in str(node.target) for node in program.graph.nodes)


def test_a_llama_by_pattern(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")

    def small():
        torch.manual_seed(3)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32)).eval()  # fmt: skip

    config = ak.QuantConfig(Uniform(4), scale="absmax", granularity="per_group", group_size=32)
    model = ak.quantize_(small(), {"model.layers.*": config})
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        want = ak.hard_quantize_(model)(tokens).logits
        got = ak.pack_(model)(tokens).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        ak.save_packed(model, tmp_path / "llama.safetensors")
        loaded = ak.load_packed(tmp_path / "llama.safetensors", small())
        assert torch.equal(loaded(tokens).logits, got)
    assert len(ak.nn.packed_layers(loaded)) == 14 and type(loaded.lm_head) is nn.Linear
