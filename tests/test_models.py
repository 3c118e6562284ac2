"""Real models go the whole way with the same numbers: quantize, train, copy and restore, freeze, pack, save, load.

Small random BERT, GPT-2, Llama, T5, ViT and CLIP of transformers, made offline. Every restored model gives the outputs
of the one it was made from bit for bit; only packed products differ from the quantized, by the order of float32 sums.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.nn.packed import PackedLayer

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 48
TEXT = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
IMAGE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16,
             patch_size=8)  # fmt: skip


def tokens(rows=2, cols=7):
    return torch.randint(3, VOCABULARY, (rows, cols), generator=torch.Generator().manual_seed(3))


def pixels():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def bert():
    config = transformers.BertConfig(**TEXT)
    return transformers.BertForMaskedLM(config), {"input_ids": tokens(), "labels": tokens()}


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32,
                                     pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens(), "labels": tokens()}


def llama(tie_word_embeddings=False):
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=tie_word_embeddings)
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens(), "labels": tokens()}


def llama_tied():
    return llama(True)


def t5():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
                                   pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {"input_ids": tokens(), "labels": tokens(cols=5)}


def vit():
    config = transformers.ViTConfig(**IMAGE, num_labels=5)
    return transformers.ViTForImageClassification(config), {"pixel_values": pixels(), "labels": torch.tensor([1, 4])}


def clip():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=24)
    return transformers.CLIPModel(config), {"input_ids": tokens(), "pixel_values": pixels(), "return_loss": True}


#             a part of the line that says what stays float
MODELS = {
    bert: "2 of nn.Embedding (bert.embeddings.position_embeddings.weight, ",
    gpt2: "8 of transformers.Conv1D (transformer.h.0.attn.c_attn.weight, ",
    llama: "1 of nn.Embedding (model.embed_tokens.weight)",
    llama_tied: "1 of nn.Embedding tied to lm_head (model.embed_tokens.weight)",
    t5: "2 of nn.Embedding (encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight, ",
    vit: "2 of transformers.ViTEmbeddings (vit.embeddings.cls_token, vit.embeddings.position_embeddings)",
    clip: "3 of nn.Embedding (text_model.embeddings.token_embedding.weight, ",
}
TIED = {bert, gpt2, llama_tied, t5}  # the embedding's weight is the head's
every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
both_forwards = pytest.mark.parametrize("forward", ["hard", "relaxed"])
OTHER_SEED = 99


def quantized(make, forward="hard", seed=0):
    """(model, inputs)"""
    torch.manual_seed(seed)
    model, inputs = make()
    ak.quantize_(model, ak.QuantConfig(ak.quant.Uniform(bits=4), forward=forward))
    return model.eval(), inputs


def outputs(model, inputs):
    """All tensors that the model gives."""
    with torch.no_grad():
        return {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}


def assert_same(model, inputs, expected):
    got = outputs(model, inputs)
    assert got.keys() == expected.keys() and len(got) >= 2
    for key in got:
        assert torch.equal(got[key], expected[key]), key


def train(model, inputs, optimizer, steps=2):
    """Some steps, each of which moves every weight; the model is put back into eval."""
    model.train()
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        for name, p in model.named_parameters():
            assert p.isfinite().all() and (p.grad is None or not p.grad.any() or not torch.equal(p, before[name])), name
    assert all(layer.weight.grad.any() for layer in ak.nn.quantized_layers(model).values())
    model.eval()


def anneal(optimizer, eps=0.5):
    for group in optimizer.param_groups:
        if group["grid"] is not None:
            group["eps"] = eps


def check_copies(model, inputs, make, forward, folder):
    """Whatever copies, saves or restores a model as it stands gives its outputs, and leaves it as it was."""
    expected = outputs(model, inputs)

    def fresh():
        return quantized(make, forward, OTHER_SEED)[0]

    state = model.state_dict()
    for options in ({}, {"assign": True}):
        new = fresh()
        new.load_state_dict({key: value.clone() for key, value in state.items()}, strict=True, **options)
        assert_same(new, inputs, expected)
    assert_same(copy.deepcopy(model), inputs, expected)
    assert_same(pickle.loads(pickle.dumps(model)), inputs, expected)
    file = io.BytesIO()
    torch.save(model, file)
    assert_same(torch.load(io.BytesIO(file.getvalue()), weights_only=False), inputs, expected)
    safetensors.save_model(model, folder / "whole.safetensors")
    new = fresh()
    assert safetensors.load_model(new, folder / "whole.safetensors", strict=True) == (set(), [])
    assert_same(new, inputs, expected)

    class Quantizing(type(model)):
        def __init__(self, config):
            super().__init__(config)
            ak.quantize_(self, ak.QuantConfig(ak.quant.Uniform(bits=4), forward=forward))

    Quantizing.__name__ = type(model).__name__  # by which transformers chooses the loss
    model.save_pretrained(folder / "pretrained")
    torch.manual_seed(OTHER_SEED)
    assert_same(Quantizing.from_pretrained(folder / "pretrained"), inputs, expected)
    assert_same(model, inputs, expected)


@every_model
@both_forwards
@pytest.mark.filterwarnings("error")
def test_all_the_way(make, forward, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="askew_kernels"):
        model, inputs = quantized(make, forward)
    assert [MODELS[make] in r.getMessage() for r in caplog.records if r.name == "askew_kernels"] == [True]
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.02, momentum=0.9)
    train(model, inputs, optimizer)
    check_copies(model, inputs, make, forward, tmp_path)
    anneal(optimizer)
    train(model, inputs, optimizer)
    check_copies(model, inputs, make, forward, tmp_path)

    layers = ak.nn.quantized_layers(model)
    if make in TIED:  # an embedding reads the latent weight of its head, and the quantized one from hard_quantize_ on
        with torch.no_grad():
            model.get_output_embeddings().weight.copy_(model.get_output_embeddings().quantized_weight())
    expected = outputs(model, inputs)
    ak.hard_quantize_(model)
    assert_same(model, inputs, expected)
    check_copies(model, inputs, make, forward, tmp_path)
    assert_same(ak.dequantize_(copy.deepcopy(model)), inputs, expected)  # which knows nothing of grids and scales
    with_gradients = differentiable_outputs(model, inputs)
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    ak.pack_(model)
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
    assert packed.keys() == weights.keys()
    for name, layer in packed.items():
        assert torch.equal(layer.dequantize(), weights[name])
        layer.register_forward_hook(within_the_bound)
    # where gradients flow through, the very products of the quantized layers are taken
    assert all(map(torch.equal, differentiable_outputs(model, inputs), with_gradients))
    from_codes = outputs(model, inputs)
    for key, value in expected.items():  # bounds as in the hook, through some twenty layers of width 32
        torch.testing.assert_close(from_codes[key], value, rtol=1e-4, atol=1e-5)

    ak.save_packed(model, tmp_path / "packed.safetensors")
    for target in (make()[0].eval(), quantized(make, forward, OTHER_SEED)[0]):
        assert_same(ak.load_packed(tmp_path / "packed.safetensors", target), inputs, from_codes)
    with torch.device("meta"):
        target = make()[0].eval()
    here = make()[0]
    for name, buffer in here.named_buffers():  # transformers keeps some out of the state_dict; they are in no file
        if name not in here.state_dict():
            with pytest.raises(ValueError, match=name):
                ak.load_packed(tmp_path / "packed.safetensors", target)
            parent, _, child = name.rpartition(".")
            target.get_submodule(parent)._buffers[child] = buffer
    assert_same(ak.load_packed(tmp_path / "packed.safetensors", target), inputs, from_codes)
    assert_same(copy.deepcopy(model), inputs, from_codes)


def differentiable_outputs(model, inputs):
    """As ``outputs``, computed while gradients are recorded, those of the inputs too."""
    floats = {key: x.clone().requires_grad_() for key, x in inputs.items() if key == "pixel_values"}
    return [x.detach() for x in model(**inputs | floats).values() if isinstance(x, torch.Tensor)]


def within_the_bound(layer, inputs, output):
    """docs/packed.md: |y - exact| <= cols 2^-24 sum |x||w|, and the rounding of the sum and of the bias."""
    if torch.is_grad_enabled():
        return
    x, w = inputs[0].double(), layer.dequantize().double()
    if layer.kind == "linear":
        product = nn.functional.linear
    else:

        def product(x, w, bias=None):
            return nn.functional.conv2d(x, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    exact = product(x, w, None if layer.bias is None else layer.bias.double())
    bound = layer.cols * 2**-24 * product(x.abs(), w.abs()) + 2**-23 * exact.abs() + 1e-30
    assert ((output.double() - exact).abs() <= bound).all()


# ---- what else is done with such models --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama, llama_tied, t5], ids=lambda make: make.__name__)
def test_generation_with_a_cache(make):
    model, _ = quantized(make)
    train(model, *_trained(model, make))
    ids = tokens()

    def generated(model, **options):
        return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)

    assert torch.equal(generated(model), generated(model, use_cache=False))
    ak.hard_quantize_(model)
    expected = generated(model)
    assert expected.shape[1] >= 6
    assert torch.equal(generated(ak.dequantize_(copy.deepcopy(model))), expected)
    assert torch.equal(generated(ak.pack_(model)), expected)


def _trained(model, make):
    return make()[1], ak.optim.ASkewSGD(ak.param_groups(model), lr=0.02)
