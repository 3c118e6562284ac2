"""Real models go the whole way with the same numbers: quantize, train, copy and restore, freeze, pack, save, load.

Small random BERT, GPT-2, Llama, T5, ViT and CLIP of transformers, made offline. Every restored model gives the outputs
of the one it was made from bit for bit; only packed products differ from the quantized, by the order of float32 sums.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import prune

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
    gpt2: "1 of nn.Embedding tied to lm_head (transformer.wte.weight); 1 of nn.Embedding (transformer.wpe.weight)",
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


def quantizing(kind, forward):
    """The class of models that quantize themselves when they are made."""

    class Quantizing(kind):
        def __init__(self, config):
            super().__init__(config)
            ak.quantize_(self, ak.QuantConfig(ak.quant.Uniform(bits=4), forward=forward))

    Quantizing.__name__ = kind.__name__  # by which transformers chooses the loss
    return Quantizing


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
            group["constraint_eps"] = eps


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

    model.save_pretrained(folder / "pretrained")
    torch.manual_seed(OTHER_SEED)
    assert_same(quantizing(type(model), forward).from_pretrained(folder / "pretrained"), inputs, expected)
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
    if layer.kind.group == "linear":
        w, product = layer.matrix().double(), nn.functional.linear
    else:

        def product(x, w, bias=None):
            return nn.functional.conv2d(x, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    exact = product(x, w, None if layer.bias is None else layer.bias.double())
    bound = layer.cols * 2**-24 * product(x.abs(), w.abs()) + 2**-23 * exact.abs() + 1e-30
    assert ((output.double() - exact).abs() <= bound).all()


# ---- what else is done with such models --------------------------------------------------------------------------


def trained(make, annealed=False, forward="hard"):
    """(model, inputs, optimizer) after some steps."""
    model, inputs = quantized(make, forward)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.02, momentum=0.9)
    train(model, inputs, optimizer)
    if annealed:
        anneal(optimizer)
        train(model, inputs, optimizer)
    return model, inputs, optimizer


def as_float(model):
    """A float model whose weights are the quantized ones."""
    return ak.dequantize_(ak.hard_quantize_(copy.deepcopy(model)))


in_hold_and_frozen = pytest.mark.parametrize("annealed", [False, True], ids=["hold", "frozen"])


@pytest.mark.parametrize("make", [gpt2, llama, llama_tied, t5], ids=lambda make: make.__name__)
def test_generation_with_a_cache(make):
    model, _, _ = trained(make)

    def generated(model, **options):
        return model.generate(tokens(), max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)

    assert torch.equal(generated(model), generated(model, use_cache=False))
    ak.hard_quantize_(model)
    expected = generated(model)
    assert expected.shape[1] >= 6
    assert torch.equal(generated(as_float(model)), expected)
    assert torch.equal(generated(ak.pack_(model)), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, inputs, _ = trained(llama)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    for m in (model, other):
        m.train()(**inputs, use_cache=False).loss.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@in_hold_and_frozen
def test_autocast(annealed):
    model, inputs, _ = trained(llama, annealed)
    expected = as_float(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, inputs, outputs(expected, inputs))


def test_the_trainer_of_the_library(tmp_path):
    pytest.importorskip("accelerate")
    model, _ = quantized(bert)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.02)
    schedule = ak.EpsilonAnnealing(optimizer, hold=2, total=6)
    rows = [{"input_ids": row, "labels": row} for row in tokens(rows=8)]
    arguments = transformers.TrainingArguments(tmp_path, max_steps=6, per_device_train_batch_size=2, report_to=[],
                                               use_cpu=True)  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule)).train()
    assert all(layer.quantizer.frozen for layer in ak.nn.quantized_layers(model).values())


@pytest.mark.parametrize("make", [llama, llama_tied, t5, vit], ids=lambda make: make.__name__)
def test_float_checkpoints_in_a_class_that_quantizes(make, tmp_path, monkeypatch):
    """What the checkpoint lacks is memory that nobody has written, here full of plausible ones."""
    torch.manual_seed(0)
    model, inputs = make()
    model.eval().save_pretrained(tmp_path)
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)
    loaded = quantizing(type(model), "hard").from_pretrained(tmp_path)
    monkeypatch.undo()
    ak.quantize_(model, ak.QuantConfig(ak.quant.Uniform(bits=4)))
    assert_same(loaded, inputs, outputs(model, inputs))
    assert not any(layer.quantizer.frozen for layer in ak.nn.quantized_layers(loaded).values())


@torch.no_grad()
def each_tensor(average, model):
    for mine, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.5 * mine + 0.5 * value)


@torch.no_grad()
def floats_only(average, model):
    for mine, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(value, 0.5)


@torch.no_grad()
def buffers_copied(average, model):
    for mine, value in zip(average.parameters(), model.parameters(), strict=True):
        mine.lerp_(value, 0.5)
    for mine, value in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(value)


@pytest.mark.parametrize("update", [each_tensor, floats_only, buffers_copied, False, True])
def test_averages_from_before_the_scales_were_frozen(update):
    """True and False: torch's own, with and without ``use_buffers``."""
    model, inputs, optimizer = trained(llama)
    if isinstance(update, bool):
        swa = torch.optim.swa_utils
        wrapper = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5), use_buffers=update)
        average, update = wrapper.module, lambda average, model: wrapper.update_parameters(model)
        wrapper.update_parameters(model)  # the first copies
    else:
        average = copy.deepcopy(model)
    train(model, inputs, optimizer)
    update(average, model)
    anneal(optimizer)
    train(model, inputs, optimizer)
    update(average, model)
    outputs(average, inputs)
    assert all(layer.quantizer.frozen for layer in ak.nn.quantized_layers(average).values())
    for _ in range(40):  # 2^-40 of what it was before
        update(average, model)
    for key, value in outputs(average, inputs).items():
        torch.testing.assert_close(value, outputs(model, inputs)[key], rtol=1e-3, atol=1e-3)


# ---- weights of another shape, from elsewhere, computed, shared -----------------------------------------------------


@in_hold_and_frozen
def test_resized_embeddings(annealed):
    """The tied head gets rows for which there is no scale yet."""
    model, inputs, _ = trained(llama_tied, annealed)
    model.resize_token_embeddings(VOCABULARY + 12)
    if annealed:
        with pytest.warns(UserWarning, match="has 48 rows, and its shape is now \\(60, 32\\)"):
            expected = outputs(model, inputs)
    else:
        expected = outputs(model, inputs)
    assert model.lm_head.weight_scale.shape == (VOCABULARY + 12,)
    assert_same(copy.deepcopy(model), inputs, expected)
    other, _ = quantized(llama_tied, seed=OTHER_SEED)
    other.resize_token_embeddings(VOCABULARY + 12)
    other.load_state_dict(model.state_dict())
    assert_same(other, inputs, expected)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.02)
    train(model, inputs, optimizer)
    assert_same(other, inputs, expected)


@pytest.mark.filterwarnings("ignore:AskewLinear. weight was replaced")
@pytest.mark.parametrize("compiled", [False, True])
def test_channels_pruned_away(compiled):
    model, inputs, _ = trained(llama)
    mlp, keep = model.model.layers[0].mlp, 40
    for layer in (mlp.up_proj, mlp.gate_proj):
        layer.weight = nn.Parameter(layer.weight[:keep].detach().clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :keep].detach().clone())
    if compiled:
        torch._dynamo.reset()
    got = outputs(torch.compile(model, backend="eager") if compiled else model, inputs)
    assert mlp.up_proj.weight_scale.shape == (keep,)
    assert_same(copy.deepcopy(model), inputs, got)
    assert_same(as_float(model), inputs, got)


@pytest.mark.parametrize("how", [
    lambda layer: prune.l1_unstructured(layer, "weight", 0.5), nn.utils.parametrizations.weight_norm,
    nn.utils.weight_norm,
], ids=["pruned", "weight_norm", "old weight_norm"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_computed_weights(how):
    """They train quantized, without the constraint; what needs a Parameter says so before anything changes."""
    model, inputs, _ = trained(llama)
    how(model.model.layers[1].mlp.up_proj)
    with pytest.warns(UserWarning) as told:
        optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.02)
    assert ["model.layers.1.mlp.up_proj: its weight is not a Parameter" in str(w.message) for w in told] == [True]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()(**inputs).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "up_proj" in name)
    state = copy.deepcopy(model.state_dict())
    for call in (ak.hard_quantize_, lambda model: ak.pack_(model, force=True)):
        with pytest.raises((RuntimeError, ValueError), match="model.layers.1.mlp.up_proj: its weight is not a Param"):
            call(model)
    assert all(map(torch.equal, model.state_dict().values(), state.values()))


def test_shared_weights_have_one_configuration():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    two, four = (ak.QuantConfig(ak.quant.Uniform(bits=bits)) for bits in (2, 4))
    with pytest.raises(ValueError, match="^2: shares its weight with 0, which is quantized otherwise"):
        ak.quantize_(model, {"0": two, "*": four})
    assert not ak.nn.quantized_layers(model)
    ak.quantize_(model, {"0": two, "1": four, "2": two})
    with pytest.raises(ValueError, match="^2: shares its weight with 0"):
        ak.quantize_(model, {"2": four, "0": None})
    ak.quantize_(model, four)
    assert len(ak.param_groups(model, outer=False)[0]["params"]) == 2


@pytest.mark.filterwarnings("error")
def test_weights_that_a_layer_has_let_go():
    """An embedding that was untied and models that were dequantized or packed are as if never quantized."""
    model, inputs, _ = trained(llama_tied)
    expected = outputs(model, inputs)
    model.train()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert_same(model.eval(), inputs, expected)
    assert type(model.model.embed_tokens.weight) is nn.Parameter
    train(model, inputs, ak.optim.ASkewSGD(ak.param_groups(model), lr=0.02))
    ak.optim.ASkewSGD(ak.dequantize_(model).parameters(), lr=0.02)
    packed = ak.pack_(ak.hard_quantize_(quantized(gpt2)[0]))
    for m in (model, packed):
        assert {type(p) for p in m.parameters()} == {nn.Parameter}
        assert not any(hasattr(p, "_askew_quantizer") for p in m.parameters())


@in_hold_and_frozen
def test_optimizers_in_the_backward(annealed):
    """One for each parameter, stepped as soon as its gradient is there: the same training."""
    model, inputs, _ = trained(llama_tied, annealed)
    other = copy.deepcopy(model)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.02)
    each = {}
    for group in ak.param_groups(other):
        for p in group["params"]:
            each[p] = ak.optim.ASkewSGD([{**group, "params": [p]}], lr=0.02)
    for one in (optimizer, *each.values()) if annealed else ():
        anneal(one)

    def step(p):
        each[p].step()
        each[p].zero_grad()

    for p in each:
        p.register_post_accumulate_grad_hook(step)
    train(model, inputs, optimizer)
    other.train()
    for _ in range(2):
        other(**inputs).loss.backward()
    assert_same(other.eval(), inputs, outputs(model, inputs))


# ---- modes and machines ----------------------------------------------------------------------------------------------


def test_inference_mode_from_end_to_end():
    model, inputs, optimizer = trained(llama)
    expected = outputs(model, inputs)
    with torch.inference_mode():
        assert_same(model, inputs, expected)
        other = copy.deepcopy(model)
        assert_same(other, inputs, expected)
        assert_same(ak.hard_quantize_(other), inputs, expected)
        torch.testing.assert_close(ak.pack_(other)(**inputs).logits, expected["logits"], rtol=1e-4, atol=1e-5)
    train(model, inputs, optimizer)


def logits_of(model):
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values=pixel_values).logits

    return Logits().eval()


@in_hold_and_frozen
def test_exported(annealed):
    model, _, _ = trained(vit, annealed)
    logits, many = logits_of(model), torch.cat([pixels(), pixels() + 1, -pixels()])
    program = torch.export.export(logits, (pixels(),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    assert torch.equal(program.module()(many), logits(many))


@both_forwards
def test_compiled_models_train_as_eager_ones(forward):
    model, inputs, _ = trained(llama, forward=forward)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for m, used in ((model, compiled), (eager, eager)):
        optimizer = ak.optim.ASkewSGD(ak.param_groups(m), lr=0.02)
        train(used, inputs, optimizer)
        anneal(optimizer)
        train(used, inputs, optimizer)
    assert all(map(torch.equal, model.state_dict().values(), eager.state_dict().values()))
    assert_same(compiled, inputs, outputs(eager, inputs))


def test_functional_calls():
    model, inputs, _ = trained(vit, annealed=True)
    other, _ = quantized(vit, seed=OTHER_SEED)
    expected = outputs(model, inputs)
    got = torch.func.functional_call(other, model.state_dict(), (), inputs)
    assert torch.equal(got.logits, expected["logits"])
    jacobian = torch.func.jacrev(logits_of(model))(pixels())
    assert torch.equal(jacobian, torch.func.jacrev(logits_of(as_float(model)))(pixels()))
    models = [trained(vit, annealed)[0] for annealed in (False, True)]
    stacked = torch.func.stack_module_state(models)
    one = copy.deepcopy(other).to("meta")
    together = torch.vmap(lambda *state: torch.func.functional_call(one, state, (), inputs).logits)(*stacked)
    each = torch.stack([outputs(m, inputs)["logits"] for m in models])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-5)


def test_threads_share_a_model():
    """Up to the order in which torch adds the terms of a product, which is another in another thread."""
    model, inputs, _ = trained(llama, annealed=True)
    expected = outputs(model, inputs)["logits"]
    shared, got = copy.deepcopy(model), []

    def ask():
        got.extend((outputs(shared, inputs)["logits"] - expected).abs().max().item() for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 20 and max(got) <= 1e-5 * expected.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    """A cast model is quantized in its type; from hard_quantize_ on nothing but that type is between it and packed."""
    model, inputs, _ = trained(vit, annealed=True)
    model, inputs = model.to(dtype), {"pixel_values": inputs["pixel_values"].to(dtype)}
    expected = model(**inputs).logits
    assert torch.equal(as_float(model)(**inputs).logits, expected)
    assert torch.equal(ak.hard_quantize_(model)(**inputs).logits, expected)
    packed = ak.pack_(model)(**inputs).logits
    torch.testing.assert_close(
        packed, expected, rtol=0, atol=expected.abs().max().item() * 8 * torch.finfo(dtype).eps + 1e-6
    )


# ---- two processes ---------------------------------------------------------------------------------------------------


def train_as_one(rank, world, broadcast):
    """Each of two processes makes of its half what one process makes of the whole batch."""
    model, inputs = quantized(llama_tied)
    half = {key: value[rank : rank + 1] for key, value in inputs.items()}
    alone = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters() if rank else ():
            p.mul_(3)  # DDP sends those of rank 0
    together = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
    optimizers = [ak.optim.ASkewSGD(ak.param_groups(m), lr=0.02, momentum=0.9) for m in (model, alone)]
    for step in range(4):
        if step == 2:
            for optimizer in optimizers:
                anneal(optimizer)
        train(together, half, optimizers[0], steps=1)
        train(alone, inputs, optimizers[1], steps=1)
        assert all(map(torch.equal, model.state_dict().values(), from_rank_0(model.state_dict().values())))
        for name, p in alone.named_parameters():  # the mean of two halves' means, added in another order
            torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-4, atol=1e-6)
        expected = outputs(model, inputs)
        torch.testing.assert_close(expected, outputs(alone, inputs), rtol=1e-4, atol=1e-4)
    late, _ = quantized(llama_tied, seed=OTHER_SEED + rank)
    if rank == 0 or not broadcast:  # without it DDP sends parameters only: every rank has to load
        late.load_state_dict(model.state_dict())
    assert_same(nn.parallel.DistributedDataParallel(late, broadcast_buffers=broadcast), inputs, expected)


def from_rank_0(tensors):
    for tensor in tensors:
        tensor = tensor.detach().clone()
        dist.broadcast(tensor, 0)
        yield tensor


@pytest.mark.parametrize("broadcast", [True, False])
def test_two_processes_train_as_one(ranks, broadcast):
    ranks.call(train_as_one, broadcast)
