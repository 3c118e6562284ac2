"""Contract: nn.MultiheadAttention with quantized and packed projections.

1. The numbers are those of torch's own module with the quantized weights in it: every mask, layout, size of keys and
   values, bias and option, in training and evaluation, and so are the gradients; in float64 to its last digits.
2. Quantized, trained, hard-quantized, saved, packed, written, read, unpacked, dequantized: the very weights.
3. What surrounds it: TransformerEncoder and its fast path, autocast, inputs of 8 bits, levels of a byte, torch.compile,
   torch.export, torch.fx, copies, pickles; a class derived from torch's with a forward of its own is left float, and
   told.
"""

from __future__ import annotations

import copy
import itertools
import logging
import pickle

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.nn.attention import AskewAttention, AskewInProjection, PackedInProjection
from askew_kernels.quant import Binary, Ternary, Uniform

pytest.importorskip("safetensors")

E, HEADS, N, L, S = 8, 2, 3, 5, 4
CONFIGS = {
    "int4 channel": ak.QuantConfig(Uniform(4), "absmax"),
    "int4 group": ak.QuantConfig(Uniform(4), "absmax", "per_group", 4),
    "int3 tensor": ak.QuantConfig(Uniform(3), granularity="per_tensor"),
    "ternary relaxed": ak.QuantConfig(Ternary(), forward="relaxed"),
    "binary": ak.QuantConfig(Binary()),
}
KINDS = {
    "plain": {}, "batch first": {"batch_first": True}, "no bias": {"bias": False, "batch_first": True},
    "keys": {"kdim": 12, "vdim": 4, "batch_first": True}, "keys no bias": {"kdim": 12, "vdim": 4, "bias": False},
    "bias of keys": {"add_bias_kv": True}, "zero": {"add_zero_attn": True, "batch_first": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "vdim": 4},
}  # fmt: skip
MASKS = ("none", "bool", "float", "heads", "padding", "padding and bool", "padding and float", "causal")


def built(kind, config=None, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(E, HEADS, **KINDS[kind])}).to(dtype)
    for name, p in model.named_parameters():
        if "bias" in name:  # which torch begins with at 0
            nn.init.normal_(p, std=0.3)
    return model if config is None else ak.quantize_(model, config)


def as_torch(layer, kind):
    """torch's own module with the weights that ``layer`` computes with."""
    same = built(kind, dtype=next(layer.parameters()).dtype)["attention"]
    with torch.no_grad():
        for name, p in same.named_parameters():
            path, _, last = name.rpartition(".")
            owner = layer.get_submodule(path) if path else layer
            held = owner._modules.get(last, owner) if last != "weight" else owner
            quantized = isinstance(held, ak.nn.kinds.QuantizedLayer) and ("proj_weight" in last or last == "weight")
            p.copy_(held.quantized_weight() if quantized else getattr(owner, last))
    return same.train(layer.training)


def inputs(kind, which="cross", dtype=torch.float32, batched=True):
    g, sizes = torch.Generator().manual_seed(3), KINDS[kind]
    made = [torch.randn(N, n, d, generator=g, dtype=dtype) for n, d in
            ((L, E), (S, sizes.get("kdim", E)), (S, sizes.get("vdim", E)))]  # fmt: skip
    if which == "self":
        made = [made[0]] * 3
    elif which == "keys":
        made[2] = made[1]
    if not batched:
        return [{id(t): t[0] for t in made}[id(t)] for t in made]
    if not sizes.get("batch_first"):
        moved = {id(t): t.transpose(0, 1) for t in made}
        made = [moved[id(t)] for t in made]
    return made


def masks(which, length, keys, batched=True, dtype=torch.float64):
    given = _masks(which, length, keys, batched)
    return {k: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in given.items()}


def _masks(which, length, keys, batched):
    g = torch.Generator().manual_seed(4)
    given = {}
    if which == "causal":
        return {"attn_mask": nn.Transformer.generate_square_subsequent_mask(length), "is_causal": True}
    if "padding" in which:
        padding = torch.zeros(N, keys, dtype=torch.bool)
        padding[1, -1] = True
        given["key_padding_mask"] = padding if batched else padding[1]
    if "bool" in which:
        given["attn_mask"] = torch.rand(length, keys, generator=g) < 0.3
        given["attn_mask"][:, 0] = False
    if "float" in which:
        given["attn_mask"] = torch.randn(length, keys, generator=g)
        if "key_padding_mask" in given:
            given["key_padding_mask"] = torch.zeros(given["key_padding_mask"].shape).masked_fill_(
                given["key_padding_mask"], -torch.inf
            )
    if which == "heads":
        given["attn_mask"] = torch.randn((N if batched else 1) * HEADS, length, keys, generator=g)
    return given


def compared(model, reference, given, options, training, tolerance):
    x = [t.clone().requires_grad_() for t in dict.fromkeys(given)]
    x = [dict(zip(dict.fromkeys(given), x, strict=True))[t] for t in given]
    y = [m.train(training)(*x, **options) for m in (model, reference)]
    torch.testing.assert_close(y[0][0], y[1][0], **tolerance)
    assert (y[0][1] is None) == (y[1][1] is None)
    if y[0][1] is not None:
        torch.testing.assert_close(y[0][1], y[1][1], **tolerance)
    grad = torch.randn(y[0][0].shape, dtype=y[0][0].dtype, generator=torch.Generator().manual_seed(1))
    leaves = list(dict.fromkeys(x))
    got, want = (torch.autograd.grad(out[0], [*leaves, *m.parameters()], grad)
                 for out, m in zip(y, (model, reference), strict=True))  # fmt: skip
    names = [*map(str, range(len(leaves))), *dict(model.named_parameters())]
    theirs = dict(zip([*map(str, range(len(leaves))), *dict(reference.named_parameters())], want, strict=True))
    for name, g in zip(names, got, strict=True):
        torch.testing.assert_close(g, theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["self", "keys", "cross"])
def test_it_is_torchs_with_quantized_weights(kind, which):
    if "kdim" in KINDS[kind] and which != "cross":
        pytest.skip("keys of other sizes are others")
    model = built(kind, CONFIGS["int4 channel"], torch.float64)
    layer = model["attention"]
    for m in ak.nn.quantized_layers(model).values():  # no weight on the edge of the hull
        m.quantizer.freeze(m.weight, m.weight_scale * 1.1)
    assert type(layer).__mro__[1] is AskewAttention and isinstance(layer, nn.MultiheadAttention)
    reference = as_torch(layer, kind)
    length, keys = L, L if which == "self" else S
    for mask, batched, training in itertools.product(MASKS, (True, False), (True, False)):
        if mask == "causal" and which != "self":
            continue
        given = inputs(kind, which, torch.float64, batched)
        for weights in ({"need_weights": False}, {"average_attn_weights": False}, {}):
            options = masks(mask, length, keys, batched) | weights
            compared(layer, reference, given, options, training, {"rtol": 1e-10, "atol": 1e-12})


@pytest.mark.parametrize("kind", ["plain", "keys"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_grid(kind, name):
    """Weights outside of the hull get no gradient where the config clips, as in a linear layer."""
    model = built(kind, CONFIGS[name])
    layer, given = model["attention"].eval(), inputs(kind)
    for m in ak.nn.quantized_layers(model).values():  # some weights outside of the hull
        m.quantizer.freeze(m.weight, m.weight_scale * 0.7)
    reference = as_torch(layer, kind).eval()
    y, want = layer(*given)[0], reference(*given)[0]
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad)
    for n, p in layer.named_parameters():
        if n.endswith("bias"):
            torch.testing.assert_close(p.grad, dict(reference.named_parameters())[n].grad, rtol=1e-4, atol=1e-5)
    for n, m in layer.named_modules():
        if isinstance(m, ak.nn.kinds.QuantizedLayer):
            key = n if n.endswith("proj_weight") else f"{n}.weight"
            q = dict(reference.named_parameters())[key]
            t = m.weight.detach().reshape(m.weight_scale.numel(), -1) / m.weight_scale[:, None]
            levels = m.config.weight.levels
            inside = ((t >= levels[0]) & (t <= levels[-1])).reshape(m.weight.shape)
            assert 0 < int(inside.sum()) < inside.numel()
            expected = q.grad * inside if m.config.clips_in_backward else q.grad
            torch.testing.assert_close(m.weight.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "batch first", "keys", "no bias"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rule", [ak.optim.ASkewSGD, ak.optim.ASkewAdamW])
def test_the_whole_way(kind, name, rule, tmp_path):
    path, config = tmp_path / "m.safetensors", CONFIGS[name]
    plain, given = built(kind), inputs(kind)
    keys, parameters = list(plain.state_dict()), dict(plain.named_parameters())
    model = ak.quantize_(plain, config)
    layer = model["attention"]
    assert all(p is parameters[n] for n, p in model.named_parameters()) and set(keys) <= set(model.state_dict())
    assert not ak.nn.left_float(model) and len(ak.nn.quantized_layers(model)) == (4 if "keys" in kind else 2)
    optimizer = rule(ak.param_groups(model), lr=0.02)
    annealing = ak.EpsilonAnnealing(optimizer, hold=1, total=3)
    start = layer.get_parameter("q_proj_weight" if kind == "keys" else "in_proj_weight").detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(*given)[0].square().mean().backward()
        optimizer.step()
        annealing.step()
    assert not torch.equal(layer.get_parameter("q_proj_weight" if kind == "keys" else "in_proj_weight"), start)
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), built(kind, config, seed=1).eval()):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other["attention"](*given)[0], layer(*given)[0])
        assert type(other["attention"]) is type(layer)
    with torch.no_grad():
        want = layer(*given)[0]
        ak.hard_quantize_(model)
        assert torch.equal(layer(*given)[0], want)
        weights = {n: m.weight.detach().clone() for n, m in ak.nn.quantized_layers(model).items()}
        back = ak.dequantize_(copy.deepcopy(model))
        assert type(back["attention"]) is nn.MultiheadAttention and list(back.state_dict()) == keys
        assert type(back["attention"].out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
        torch.testing.assert_close(back["attention"](*given)[0], want, rtol=1e-5, atol=1e-6)
        ak.pack_(model)
        packed = ak.nn.packed_layers(model)
        assert (
            all(torch.equal(packed[n].dequantize(), w) for n, w in weights.items()) and packed.keys() == weights.keys()
        )
        assert not any("weight" in n for n, _ in layer.named_parameters())
        got = layer(*given)[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        ak.save_packed(model, path)
        meta = built(kind).to("meta").eval()
        for target in (built(kind, seed=1).eval(), built(kind, config, seed=1).eval(), copy.deepcopy(model), meta):
            assert torch.equal(ak.load_packed(path, target)["attention"](*given)[0], got)
            assert type(target["attention"]) is type(layer)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again["attention"](*given)[0], got)
        unpacked = ak.unpack_(copy.deepcopy(model))
        assert type(unpacked["attention"]) is nn.MultiheadAttention and sorted(unpacked.state_dict()) == sorted(keys)
        torch.testing.assert_close(unpacked["attention"](*given)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("which", ["self", "keys", "cross"])
@pytest.mark.parametrize("name", ["int4 channel", "int4 group", "int3 tensor"])
def test_rows_of_packed_codes(which, name, packed):
    """Few rows and many: from codes and decoded."""
    model = ak.hard_quantize_(built("batch first", CONFIGS[name]).eval())
    reference = as_torch(model["attention"], "batch first")
    model = ak.pack_(model) if packed else model
    for batch in (1, N):
        given = [t[:batch] for t in inputs("batch first", which)]
        given = [given[0]] * 3 if which == "self" else [given[0], given[1], given[1]] if which == "keys" else given
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                torch.testing.assert_close(model["attention"](*given)[0], reference(*given)[0], rtol=1e-5, atol=1e-5)


def encoder(config=None, layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, batch_first=True, **options)
    model = nn.TransformerEncoder(layer, layers).eval()
    return model if config is None else ak.quantize_(model, config)


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("what", ["all", "attention", "out_proj", "second"])
@pytest.mark.parametrize("state", ["quantized", "packed", "loaded"])
def test_encoders_never_compute_with_float_weights(what, state, tmp_path):
    """Evaluated without gradients, where torch would take its fast path; whatever part is quantized."""
    pattern = {"all": "*", "attention": "*self_attn*", "out_proj": "*out_proj", "second": "layers.1.*"}[what]
    model = encoder({pattern: CONFIGS["int4 channel"]})
    reference = encoder()
    for name, layer in ak.nn.quantized_layers(model).items():
        key = name if name.endswith("in_proj_weight") else f"{name}.weight"
        dict(reference.named_parameters())[key].data.copy_(layer.quantized_weight())
    float_ = encoder()
    if state != "quantized":
        ak.pack_(ak.hard_quantize_(model))
    if state == "loaded":
        ak.save_packed(model, tmp_path / "m.safetensors")
        model = ak.load_packed(tmp_path / "m.safetensors", encoder())
    fast = torch.backends.mha.get_fastpath_enabled()
    for options in ({}, {"src_key_padding_mask": PADDING}):
        with torch.no_grad():
            got = model(X, **options)
            try:
                torch.backends.mha.set_fastpath_enabled(False)
                want, plain = reference(X, **options), float_(X, **options)
            finally:
                torch.backends.mha.set_fastpath_enabled(fast)
        kept = torch.ones_like(PADDING) if not options else ~PADDING  # of the rest the fast path makes zeros
        torch.testing.assert_close(got[kept], want[kept], rtol=1e-4, atol=1e-5)
        assert (got[kept] - plain[kept]).norm() > 1e-3


def test_decoders_and_whole_transformers():
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 1, 32, 0.0, batch_first=True).eval()
    ak.quantize_(model, CONFIGS["int4 channel"])
    layers = ak.nn.quantized_layers(model)
    assert {"decoder.layers.0.multihead_attn.in_proj_weight", "decoder.layers.0.self_attn.out_proj"} <= layers.keys()
    assert not ak.nn.left_float(model)
    mask = model.generate_square_subsequent_mask(5)
    with torch.no_grad():
        want = model(X, X, tgt_mask=mask)
        got = ak.pack_(ak.hard_quantize_(model))(X, X, tgt_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [
    ak.QuantConfig(Uniform(4), activation=Uniform(8)), ak.QuantConfig(Uniform(4), forward="int8"),
    ak.QuantConfig(Uniform(4), forward="fp8"),
], ids=["8-bit inputs", "int8", "fp8"])  # fmt: skip
@pytest.mark.parametrize("which", ["self", "keys", "cross"])
@pytest.mark.parametrize("kind", ["batch first", "keys"])
def test_inputs_of_few_bits(config, which, kind):
    """Each projection takes its inputs as a linear layer of its weight does."""
    if kind == "keys" and which != "cross":
        pytest.skip("keys of other sizes are others")
    model = built(kind, config)
    layer, given = model["attention"], inputs(kind, which)
    weights = ([layer.get_parameter(n) for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight")] if kind == "keys"
               else layer.get_parameter("in_proj_weight").chunk(3))  # fmt: skip
    parts = []
    for w, b, x in zip(weights, layer.in_proj_bias.chunk(3), given, strict=True):
        linear = ak.nn.AskewLinear(w.shape[1], w.shape[0], config=config)
        with torch.no_grad():
            linear.weight.copy_(w)
            linear.bias.copy_(b)
            parts.append(linear(x))
    with torch.no_grad():
        got = layer(*given, need_weights=False)[0]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in parts)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(got, layer.out_proj(y), rtol=1e-5, atol=1e-6)
    layer(*given)[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert all(
        bool(part.any())
        for n, p in layer.named_parameters()
        if "bias" not in n
        for part in p.grad.chunk(3 if n == "in_proj_weight" else 1)
    )


@pytest.mark.parametrize("config", [
    ak.QuantConfig(Uniform(3), "lsq"), ak.QuantConfig(Uniform(3), "lsq", "per_group", 4), ak.QuantConfig(Uniform(2)),
    ak.QuantConfig(Uniform(4), forward="int8"), ak.QuantConfig(Uniform(4), "lsq", forward="int8"),
], ids=["learned", "learned groups", "clipped", "int8", "learned int8"])  # fmt: skip
def test_gradients_of_one_product_and_of_three(config):
    """Of the weight, its learned scale, and the bias: the parts of a call for each of query, key and value add up."""
    found = []
    for apart in (False, True):
        layer, x = built("batch first", config)["attention"], inputs("batch first", "self")[0]
        y = layer(x, x.clone() if apart else x, x.clone() if apart else x)[0]
        y.square().sum().backward()
        found.append({name: p.grad for name, p in layer.named_parameters()} | {"y": y.detach()})
    assert all("lsq" != config.scale or f"{n}.weight_scale" in found[0] for n in ("in_proj_weight", "out_proj"))
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(packed):
    model = encoder(CONFIGS["int4 channel"])
    model = ak.pack_(ak.hard_quantize_(model)) if packed else model
    with torch.no_grad():
        want = model(X, src_key_padding_mask=PADDING)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(X, src_key_padding_mask=PADDING)
            weights = model.layers[0].self_attn(X, X, X, key_padding_mask=PADDING)[0]
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(got[~PADDING].float(), want[~PADDING], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("packed", [False, True])
def test_graphs(packed):
    model = encoder(CONFIGS["int4 channel"], layers=1)
    model = ak.pack_(ak.hard_quantize_(model)) if packed else model
    with torch.no_grad():
        want = model(X)
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="aot_eager")(X), want, rtol=1e-4, atol=1e-5
        )
        if packed:  # exported, a module has no place for a Parameter and a layer of one name
            exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
            torch.testing.assert_close(exported(X[:2]), model(X[:2]), rtol=1e-4, atol=1e-5)

        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = model.layers[0].self_attn

            def forward(self, x):
                return self.attention(x, x, x, need_weights=False)[0]

        reader = Reader().eval()
        traced = torch.fx.symbolic_trace(reader)
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["attention"]
        assert torch.equal(traced(X), reader(X))


def test_compiled_training():
    def trained(compiled):
        model = nn.Sequential(encoder(CONFIGS["int4 channel"], layers=1)).eval()
        optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=1e-3)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(3):
            optimizer.zero_grad()
            call(X).square().mean().backward()
            optimizer.step()
        return model[0].layers[0].self_attn.in_proj_weight.detach()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-5, atol=1e-6)


def test_errors_name_the_argument():
    layer = built("batch first", CONFIGS["int4 channel"])["attention"]
    x = inputs("batch first", "self")[0]
    for options, error, text in (
        (
            {"attn_mask": torch.zeros(2, 2)},
            ValueError,
            r"attn_mask: expected shape \(5, 5\) or \(6, 5, 5\), got \(2, 2\)",
        ),
        ({"key_padding_mask": torch.zeros(N, 4)}, ValueError, r"key_padding_mask: expected shape \(3, 5\)"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.int64)}, TypeError, "attn_mask: expected bools or floats"),
        ({"is_causal": True}, ValueError, "attn_mask: expected the causal mask"),
    ):
        with pytest.raises(error, match=text):
            layer(x, x, x, **options)
    with pytest.raises(ValueError, match="key: expected 2 dimensions"):
        layer(x, x[0, 0], x)
    nested = torch.nested.as_nested_tensor([x[0], x[1, :3]])
    with pytest.raises(NotImplementedError, match="query: a nested tensor"):
        layer(nested, nested, nested)


def test_classes_with_a_forward_of_their_own_stay_float(caplog):
    class Mine(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = nn.ModuleDict({"a": Mine(8, 2), "b": nn.MultiheadAttention(8, 2)})
    model["b"].forward = lambda x: x
    with caplog.at_level(logging.WARNING, "askew_kernels"):
        ak.quantize_(model, CONFIGS["int4 channel"])
    assert not ak.nn.quantized_layers(model)
    left = ak.nn.left_float(model)
    assert set(left) == {f"{n}.{k}" for n in "ab" for k in ("in_proj_weight", "out_proj.weight")}
    assert "reads past its forward" in left["a.out_proj.weight"] and "forward" in left["b.in_proj_weight"]
    assert "a.in_proj_weight" in caplog.text and "a.out_proj.weight" in caplog.text


def test_parts_are_chosen_by_name_and_kind(caplog):
    for kinds, want in ((("linear",), {"out_proj"}), (("attention",), {"out_proj", "in_proj_weight"}),
                        ("in_projection", {"out_proj", "in_proj_weight"}), (("conv",), set())):  # fmt: skip
        model = ak.quantize_(nn.Sequential(nn.MultiheadAttention(8, 2)), kinds=kinds)
        assert {name.partition(".")[2] for name in ak.nn.quantized_layers(model)} == want
        assert (type(model[0]) is nn.MultiheadAttention) == (not want)
    model = ak.quantize_(nn.Sequential(nn.MultiheadAttention(8, 2)), {"*out_proj": ak.QuantConfig(Uniform(4))})
    assert isinstance(model[0], AskewAttention)
    assert type(ak.dequantize_(model)[0]) is nn.MultiheadAttention


def test_a_float_checkpoint_and_a_quantized_one_load():
    plain, model = built("plain", seed=1), built("plain", CONFIGS["int4 channel"])
    with pytest.warns(UserWarning, match="has no weight_scale"):
        model.load_state_dict(plain.state_dict())
    assert torch.equal(model["attention"].in_proj_weight, plain["attention"].in_proj_weight)
    other = built("plain", CONFIGS["int4 channel"], seed=2)
    other.load_state_dict(model.state_dict())
    given = inputs("plain")
    assert torch.equal(other["attention"](*given)[0], model["attention"](*given)[0])
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert low["attention"].in_proj_weight is low["attention"].get_submodule("in_proj_weight").weight
    low["attention"](*(t.bfloat16() for t in given))
    assert isinstance(model["attention"]._modules["in_proj_weight"], AskewInProjection)
    assert isinstance(ak.pack_(model, force=True)["attention"].get_submodule("in_proj_weight"), PackedInProjection)


@pytest.mark.parametrize("activation", [None, Uniform(8)], ids=["float inputs", "8-bit inputs"])
@pytest.mark.parametrize("operator", ["DequantizeLinear", "MatMulNBits"])
@pytest.mark.parametrize("which", ["self", "cross"])
def test_onnx(activation, operator, which, tmp_path):
    """What the file computes is what the packed module does, its quantized inputs included."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from askew_kernels.deploy.to_onnx import export_onnx

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True, kdim=None if which == "self" else 16)

        def forward(self, x):
            keys = x if which == "self" else x[:, 1:, :16]
            return self.attention(x, keys, x if which == "self" else x[:, 1:])[0]

    config = ak.QuantConfig(Uniform(4), "absmax", "per_group", 16, activation=activation)
    model, x = ak.quantize_(Reader(), config).eval(), torch.randn(2, 5, 32)
    ak.pack_(ak.hard_quantize_(model))
    fast = torch.backends.mha.get_fastpath_enabled()
    export_onnx(model, x, tmp_path / "m.onnx", operator=operator, input_names=["x"])
    assert torch.backends.mha.get_fastpath_enabled() == fast
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(torch.tensor(session.run(None, {"x": x.numpy()})[0]), want, rtol=1e-4, atol=1e-5)


def test_onnx_of_an_encoder_with_padding(tmp_path):
    """Another number of sequences than the example had."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from askew_kernels.deploy.to_onnx import export_onnx

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder(CONFIGS["int4 channel"])

        def forward(self, x, padding):
            return self.encoder(x, src_key_padding_mask=padding)

    model, path = Reader().eval(), tmp_path / "m.onnx"
    ak.pack_(ak.hard_quantize_(model))
    free = {"x": {0: "n"}, "padding": {0: "n"}}
    export_onnx(model, (X, PADDING), path, input_names=["x", "padding"], dynamic_axes=free)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for x, padding in ((X, PADDING), (X[:2], PADDING[:2])):
        with torch.no_grad():
            want = model(x, padding)
        got = torch.tensor(session.run(None, {"x": x.numpy(), "padding": padding.numpy()})[0])
        torch.testing.assert_close(got[~padding], want[~padding], rtol=1e-4, atol=1e-5)
