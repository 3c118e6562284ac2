"""Contract: keys and values as a quantized cache holds them (``ak.nn.QuantizedKV``).

1. The formula of its text in float64, for every width, group, way to group and type; a group has up to 2^bits numbers;
   straight-through gradients, everywhere; groups that are not finite become NaN; what does not fit is named.
2. The cache of codes gives the module's numbers, bit for bit, however tokens come, are cut, reordered; fewer bytes.
3. A model of transformers sees the same numbers in training, with its float cache and with the cache of codes.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.nn import KVCache, QuantizedKV, quantize_kv_

SHAPE = 2, 3, 10, 64  # batch, heads of keys and values, tokens, head dimension


def tokens(generator, shape=SHAPE, dtype=torch.float32):
    k = torch.randn(shape, generator=generator)
    k[..., 5] = k[..., 5] * 3 + 8  # a large channel, as keys have
    return k.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def expected(x, bits, symmetric=False, scale_dtype="float16"):
    """Of (rows, group), by the formula, in float64."""
    kept = getattr(torch, scale_dtype)
    c_max = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    low, high = (x.abs().amax(1) * 0, x.abs().amax(1)) if symmetric else (x.amin(1), x.amax(1))
    zero = low.to(kept).double()
    scale = ((high.float() - zero.float()) / c_max).to(kept).double()
    q = torch.round((x.double() - zero[:, None]) / scale[:, None])
    return q.clamp(-c_max - 1 if symmetric else 0, c_max) * scale[:, None] + zero[:, None], scale


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [8, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_are_the_formula_s(bits, group, symmetric, backend, generator):
    kv = QuantizedKV(bits, group, symmetric=symmetric)
    for x, y in zip(tokens(generator), kv(*tokens(generator := torch.Generator().manual_seed(0))), strict=True):
        assert y.shape == x.shape and y.dtype == x.dtype
    k, v = tokens(torch.Generator().manual_seed(0))
    for x, y in zip((k, v), kv(k, v), strict=True):
        rows, got = x.reshape(-1, group), y.reshape(-1, group)
        want, scale = expected(rows, bits, symmetric)
        near = (got.double() - want).abs() <= 1e-5 * (want.abs() + scale[:, None])
        tie = ((rows.double() - want).abs() - scale[:, None] / 2).abs() < 1e-4 * scale[:, None]  # rounded in float32
        assert bool((near | tie).all())
        assert all(len(row.unique()) <= 2**bits for row in got)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_and_fewer_bits_lose_more(dtype, scale_dtype, generator):
    k, v = tokens(generator, dtype=dtype)
    errors = []
    for bits in (8, 4, 2):
        a, b = QuantizedKV(bits, 32, scale_dtype=scale_dtype)(k, v)
        assert a.dtype == b.dtype == dtype
        errors.append(float((a - k).float().norm() / k.float().norm() + (b - v).float().norm() / v.float().norm()))
    assert errors[0] < 0.02 < errors[1] < 0.3 < errors[2] < 1


def test_keys_by_channel_serve_keys_with_large_channels(generator):
    """KIVI's way: the groups are tokens of one channel; the last tokens, which fill no group, are as they came."""
    k, v = tokens(generator, (2, 3, 70, 64))
    by_token, by_channel = QuantizedKV(2, 32), QuantizedKV(2, 32, keys="per_channel")
    (a, va), (b, vb) = by_token(k, v), by_channel(k, v)
    assert (
        torch.equal(va, vb)
        and torch.equal(b[..., 64:, :], k[..., 64:, :])
        and not torch.equal(b[..., :64, :], k[..., :64, :])
    )
    assert (b - k)[..., :64, :].norm() < 0.7 * (a - k)[..., :64, :].norm()
    rows = k[..., :64, :].unflatten(-2, (2, 32)).transpose(-1, -2).reshape(-1, 32)
    got = b[..., :64, :].unflatten(-2, (2, 32)).transpose(-1, -2).reshape(-1, 32)
    want, scale = expected(rows, 2)
    assert bool(((got.double() - want).abs() <= 1e-5 * (1 + want.abs())).float().mean() > 0.999)
    few = k[..., :31, :]
    assert torch.equal(by_channel(few, v[..., :31, :])[0], few)  # no group is full
    assert scale.min() > 0


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"keys": "per_channel"}], ids=str)
def test_gradients_go_straight_through(options, generator):
    k, v = (t.requires_grad_() for t in tokens(generator))
    a, b = QuantizedKV(4, 8, **options)(k, v)
    ga, gb = torch.randn_like(a), torch.randn_like(b)
    torch.autograd.backward([a, b], [ga, gb])
    assert torch.equal(k.grad, ga) and torch.equal(v.grad, gb)


def test_groups_of_equal_numbers_zeros_and_what_is_not_finite():
    k = torch.zeros(1, 1, 5, 8)
    k[..., 1, :], k[..., 2, :], k[..., 3, 2], k[..., 4, 1] = 3.25, -7.0, math.inf, math.nan
    for options in ({}, {"symmetric": True}, {"scale_dtype": "float32"}):
        kv = QuantizedKV(4, 8, **options)
        got = kv(k, k)[0]
        assert torch.equal(got[..., :3, :], k[..., :3, :]) or options.get("symmetric")
        torch.testing.assert_close(got[..., :3, :], k[..., :3, :], rtol=2e-3, atol=0)
        assert got[..., 3:, :].isnan().all()
        with pytest.raises(ValueError, match="k: expected finite numbers"):
            kv.cache().update(k, k)
    assert QuantizedKV(4, 8)(torch.full((1, 1, 1, 8), 1e5), k[..., :1, :])[0].isnan().all()  # beyond float16
    assert QuantizedKV(4, 8, scale_dtype="bfloat16")(torch.full((1, 1, 1, 8), 1e5), k[..., :1, :])[0].isfinite().all()
    assert QuantizedKV()(torch.zeros(0, 2, 3, 32), torch.zeros(2, 2, 0, 32))[0].shape == (0, 2, 3, 32)


@pytest.mark.parametrize("arguments, error, words", [
    (dict(bits=1), ValueError, "bits: expected 2"), (dict(bits=9), ValueError, "bits: expected 2"),
    (dict(bits="4"), TypeError, "bits: expected an int or"), (dict(bits=(4, 2, 2)), TypeError, "bits: expected an"),
    (dict(group=0), ValueError, "group: expected a positive"), (dict(group=1.5), TypeError, "group: expected an int"),
    (dict(keys="channel"), ValueError, "keys: expected one of per_token, per_channel"),
    (dict(symmetric=1), TypeError, "symmetric: expected True or False"),
    (dict(scale_dtype="float8_e4m3fn"), ValueError, "scale_dtype: expected one of float16, bfloat16, float32"),
])  # fmt: skip
def test_arguments_are_checked(arguments, error, words):
    with pytest.raises(error, match=words):
        QuantizedKV(**arguments)


def test_inputs_are_checked(generator):
    k, v = tokens(generator)
    with pytest.raises(
        ValueError, match=r"group: 48 does not divide the head dimension 64 of k of shape \(2, 3, 10, 64\)"
    ):
        QuantizedKV(4, 48)(k, v)
    with pytest.raises(ValueError, match=r"k: expected shape \(…, tokens, head dimension\)"):
        QuantizedKV()(k.reshape(-1), v)
    with pytest.raises(TypeError, match="v: expected float32"):
        QuantizedKV()(k, v.int())
    cache = QuantizedKV(4, 32).cache()
    cache.update(k, v)
    for wrong, words in (
        ((k[..., :32], v), "k: expected torch.float32 of shape"), ((k, v[..., :3, :]), "v: expected the tokens of k"),
        ((k[:1], v[:1]), r"k: .* \(2, 3, 10, 64\), as before"), ((k, v.half()), "v: expected .* got torch.float16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            cache.update(*wrong)
        assert len(cache) == 10
    with pytest.raises(ValueError, match="codes give no gradient"):
        cache.update(k.requires_grad_(), v)


def test_bits_of_keys_and_values_differ_and_it_is_told(generator):
    k, v = tokens(generator)
    kv = QuantizedKV((8, 2), 32)
    assert torch.equal(kv(k, v)[0], QuantizedKV(8, 32)(k, v)[0]) and torch.equal(
        kv(k, v)[1], QuantizedKV(2, 32)(k, v)[1]
    )
    assert "bits=(8, 2), group=32, keys=per_token" in repr(kv) and not list(kv.parameters()) and not kv.state_dict()
    assert torch.equal(copy.deepcopy(kv)(k, v)[0], kv(k, v)[0])


def test_autocast_compile_and_func(generator):
    k, v = tokens(generator, dtype=torch.bfloat16)
    for options in ({}, {"keys": "per_channel"}):
        kv = QuantizedKV(4, 8, **options)
        want = kv(k, v)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(kv(k, v), want, strict=True))
        compiled = torch.compile(kv, backend="aot_eager", fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(compiled(k, v), want, strict=True))
        x = k.float().requires_grad_()
        compiled(x, v)[0].sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))


# ---- the cache of codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"keys": "per_channel"}, {"scale_dtype": "bfloat16"}], ids=str
)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_cache_gives_the_numbers_of_training(bits, options, dtype, generator):
    kv = QuantizedKV(bits, 8, **options)
    k, v = tokens(generator, (2, 3, 29, 16), dtype)
    cache = kv.cache()
    start = 0
    for n in (9, 1, 1, 14, 4):
        a, b = cache.update(k[..., start : start + n, :], v[..., start : start + n, :])
        start += n
        wanted = kv(k[..., :start, :], v[..., :start, :])
        assert torch.equal(a, wanted[0]) and torch.equal(b, wanted[1]) and len(cache) == start
    assert kv.gave(a, b) and not kv.gave(a, wanted[1])


def test_a_cache_is_small(generator):
    k, v = tokens(generator, (1, 2, 64, 128), torch.float16)
    for bits, options, wanted in (
        (4, {}, 4 + 32 / 32),
        (2, {"symmetric": True}, 2 + 16 / 32),
        (2, {"keys": "per_channel"}, 3),
    ):
        cache = QuantizedKV(bits, 32, **options).cache()
        cache.update(k, v)
        assert cache.bytes * 8 == wanted * (k.numel() + v.numel())


@pytest.mark.parametrize("options", [{}, {"keys": "per_channel"}], ids=str)
def test_cutting_and_reordering(options, generator):
    kv = QuantizedKV(4, 8, **options)
    k, v = tokens(generator, (3, 2, 21, 16))
    for length in (21, 18, 16, 11, 8, 3, 0):
        cache = kv.cache()
        whole = cache.update(k, v)
        cache.cut(length)
        assert len(cache) == length
        a, b = cache.update(k[..., :0, :], v[..., :0, :])
        assert torch.equal(a, whole[0][..., :length, :]) and torch.equal(b, whole[1][..., :length, :])
        cache.map(lambda t: t.index_select(0, torch.tensor([2, 2, 0])))
        assert torch.equal(cache.update(k[..., :0, :], v[..., :0, :])[1], b[[2, 2, 0]])
    cache.reset()
    assert len(cache) == 0 and cache.bytes == 0 and isinstance(cache, KVCache)


# ---- training --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two query heads for each head of keys and values."""

    def __init__(self, kv=None, dim=32):
        super().__init__()
        self.kv, self.q, self.k, self.v = kv, nn.Linear(dim, 4 * 16), nn.Linear(dim, 2 * 16), nn.Linear(dim, 2 * 16)
        self.out = nn.Linear(4 * 16, dim)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.kv is not None:
            k, v = self.kv(k, v)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def test_training_with_it_helps():
    """A task of two bits: the loss with quantized keys and values is smaller after training with them than without."""
    x = torch.randn(32, 12, 32, generator=torch.Generator().manual_seed(2))
    y = x.cumsum(1) / torch.arange(1, 13)[:, None]
    losses = {}
    for name in ("float", "quantized"):
        torch.manual_seed(1)
        kv = QuantizedKV(2, 16)
        net = Attention(kv if name == "quantized" else None)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        net.kv = kv
        with torch.no_grad():
            losses[name] = float(nn.functional.mse_loss(net(x), y))
    assert losses["quantized"] < 0.8 * losses["float"], losses


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    shape = transformers.LlamaConfig(vocab_size=48, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
                                     pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(shape).eval()


IDS = torch.randint(3, 48, (2, 19), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "attention, dtype", [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)]
)
@pytest.mark.parametrize("options", [{}, {"keys": "per_channel"}], ids=str)
def test_a_model_of_transformers_sees_the_same_numbers_in_training_and_generation(llama, options, attention, dtype):
    llama.to(dtype).set_attn_implementation(attention)
    kv = QuantizedKV(4, 8, **options)
    plain = llama(IDS).logits
    with torch.no_grad():
        prefill = llama(IDS, past_key_values=kv.transformers_cache()).logits  # its attention as it was
    assert quantize_kv_(llama, kv) is llama and llama.quantized_kv is kv
    seen = llama(IDS, use_cache=False).logits
    assert torch.equal(seen, prefill) and not torch.allclose(seen, plain, atol=1e-4)
    seen.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in llama.model.layers.parameters())
    with torch.no_grad():
        caches = {"float": None, "codes": kv.transformers_cache()}
        steps = {}
        for name, cache in caches.items():
            found = []
            for start, stop in ((0, 9), (9, 10), (10, 15), (15, 19)):
                out = llama(IDS[:, start:stop], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits)
            steps[name] = torch.cat(found, 1)
        assert torch.equal(steps["float"], steps["codes"])
        if not options:  # every token is rounded as it comes, so that steps and whole sequences see the same
            torch.testing.assert_close(steps["codes"], seen, rtol=0, atol=1e-3 if dtype == torch.float32 else 0.1)
    assert quantize_kv_(llama, None) is llama and not hasattr(llama, "quantized_kv")
    assert torch.equal(llama(IDS).logits, plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_it_generates(llama, options):
    kv = QuantizedKV(8, 8, keys="per_channel")
    quantize_kv_(llama, kv)
    cache = kv.transformers_cache()
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **options)
    codes = llama.generate(IDS, past_key_values=cache, **settings)
    assert codes.shape == (2, 31) and torch.equal(codes, llama.generate(IDS, **settings))
    if not options:
        layer = cache.layers[0].cache
        assert len(layer) == cache.get_seq_length() == 30 and layer.bytes < 0.6 * 2 * 2 * 30 * 2 * 16 * 4


def test_encoder_decoders_and_models_with_other_layers_get_the_caches_that_they_need():
    """The scores of generation with codes are those with floats; what cannot be served is named, and never wrong."""
    transformers = pytest.importorskip("transformers")
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, output_scores=True,
                    return_dict_in_generate=True)  # fmt: skip
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=48)
    t5 = dict(d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, vocab_size=48, decoder_start_token_id=0)
    mixed = transformers.Lfm2Config(**sizes, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    for model, unknown in (
        (transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)), "two attentions of one layer"),
        (transformers.Lfm2ForCausalLM(mixed), "the state of layer 0"),
    ):
        for p in model.eval().parameters():
            p.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(4)) if p.dim() > 1 else None
        kv = QuantizedKV(4, 16)
        with torch.no_grad(), pytest.raises(ValueError, match=rf"{unknown}.*transformers_cache\(model\)"):
            model.generate(IDS, past_key_values=kv.transformers_cache(), **settings)
        quantize_kv_(model, kv)
        wanted = model.generate(IDS, **settings)
        for cache in (kv.transformers_cache(), kv.transformers_cache(model), kv.transformers_cache(model.config)):
            found = model.generate(IDS, past_key_values=cache, **settings)
            assert all(torch.equal(a, b) for a, b in zip(found.scores, wanted.scores, strict=True))
    both = transformers.FalconH1Config(**sizes, num_hidden_layers=2)
    with pytest.raises(ValueError, match="layer 0 of 'falcon_h1' keeps a LinearAttentionAndFull"):
        kv.transformers_cache(both)
    with pytest.raises(ValueError, match="'mamba' has no attention whose keys and values are kept"):
        kv.transformers_cache(transformers.MambaConfig(num_hidden_layers=2))
    with pytest.raises(TypeError, match="model: expected one of transformers, or its config, got Linear"):
        kv.transformers_cache(nn.Linear(2, 2))


def test_latents_of_a_cache_are_no_keys_of_training():
    """An attention that expands what the cache gave would round it twice."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1, vocab_size=48,
                 num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                 topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
                 qk_nope_head_dim=16, v_head_dim=16)  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).eval()
    kv = QuantizedKV(4, 16)
    quantize_kv_(model, kv)
    with torch.no_grad():
        seen = model(IDS, use_cache=False).logits
        with pytest.raises(ValueError, match="DeepseekV3Attention changes what the cache has given"):
            model(IDS, past_key_values=kv.transformers_cache())
        assert torch.equal(model(IDS, use_cache=True).logits, seen)


IN_ANOTHER_PROCESS = """
import sys, torch, askew_kernels
model, ids, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(ids).logits, expected)
askew_kernels.nn.quantize_kv_(model, None)
assert not torch.equal(model(ids).logits, expected)
"""


def test_copies_and_files_have_their_own(llama, tmp_path):
    kv = QuantizedKV(3, 8)
    expected = quantize_kv_(llama, kv)(IDS).logits.detach()
    other, called = copy.deepcopy(llama), []
    for name, model in (("original", llama), ("copy", other)):
        model.quantized_kv.register_forward_hook(lambda *_, name=name: called.append(name))
    assert torch.equal(other(IDS).logits, expected) and set(called) == {"copy"}
    with torch.no_grad():
        other(IDS, past_key_values=other.quantized_kv.transformers_cache())
    assert len(called) == 2  # what its own cache gave is not rounded again
    quantize_kv_(other, None)
    assert torch.equal(llama(IDS).logits, expected) and not torch.equal(other(IDS).logits, expected)
    kv._forward_hooks.clear()
    torch.save((llama, IDS, expected), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_ANOTHER_PROCESS, tmp_path / "model.pt"], check=True)


def test_models_that_share_a_config_are_not_all_quantized(llama):
    """A float teacher made from the student's config, before or after."""
    teacher = type(llama)(llama.config).eval()
    teacher.load_state_dict(llama.state_dict())
    expected = teacher(IDS).logits
    student = quantize_kv_(llama, QuantizedKV(2, 8))(IDS).logits
    later = type(llama)(llama.config).eval()
    later.load_state_dict(llama.state_dict(), strict=False)
    assert torch.equal(teacher(IDS).logits, expected) and torch.equal(later(IDS).logits, expected)
    assert not torch.equal(student, expected)


def test_parts_have_their_own_attention_functions():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=1, num_key_value_heads=2)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, image_seq_length=4)
    functions = {"text_config": "eager", "vision_config": "sdpa"}
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=functions)
    parts = model.config, model.config.text_config, model.config.vision_config

    def names():
        return [part._attn_implementation for part in parts]

    before = names()
    assert before[1:] == ["eager", "sdpa"]
    quantize_kv_(model, QuantizedKV(4, 32))
    assert names() == [f"askew_kv_{name}" for name in before]
    quantize_kv_(model, None)
    assert names() == before
    part = quantize_kv_(model.model.language_model, QuantizedKV(2, 32))  # the whole's takes the place of a part's
    quantize_kv_(quantize_kv_(model, QuantizedKV(4, 32)), None)
    assert names() == before and not hasattr(part, "quantized_kv")


def test_what_is_no_model_of_transformers_is_told():
    pytest.importorskip("transformers")
    with pytest.raises(TypeError, match="model: expected one of transformers, got Linear"):
        quantize_kv_(nn.Linear(2, 2), QuantizedKV())
    with pytest.raises(TypeError, match="kv: expected a QuantizedKV, or None"):
        quantize_kv_(nn.Linear(2, 2), 4)
    assert ak.nn.QuantizedKV is QuantizedKV
