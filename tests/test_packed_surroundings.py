"""Contract: packed layers among the rest of torch. Autocast, transforms, derivatives, export, fake and meta tensors,
fast paths, readers of ``weight``, checkpoints: always the numbers of the unpacked layer, or an error that says why."""

import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from oracles import NF4
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import ops
from askew_kernels.nn import PackedConv2d, PackedLinear
from askew_kernels.nn.packed import EXTRA_STATE
from askew_kernels.quant import Binary, Codebook, Ternary, Uniform, pack_codes

GRIDS = {
    "int4": (Uniform(4), "absmax"), "int8": (Uniform(8), "absmax"), "int3": (Uniform(3), "absmax"),
    "binary": (Binary(), "mean"), "ternary": (Ternary(), "mean"), "nf4": (Codebook(NF4), "absmax"),
}  # fmt: skip


def packed(model, grid="int4", activation=None, **options):
    weight, scale = GRIDS[grid]
    config = ak.QuantConfig(weight, scale=scale, activation=activation)
    return ak.pack_(ak.hard_quantize_(ak.quantize_(model, config)), **options).eval()


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))


def unpacked(model):
    return ak.unpack_(copy.deepcopy(model), force=True)


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("rows", [1, 20, 96, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_does_not_hear_of_autocast(rows, dtype, activations, backend, generator):
    x = torch.randn(rows, 40, generator=generator).to(dtype)
    codes = pack_codes(torch.randint(0, 16, (7, 40), generator=generator).to(torch.uint8), 4)
    arguments = (
        codes,
        torch.rand(7, generator=generator) + 0.1,
        Uniform(4),
        4,
        torch.ones(7, dtype=dtype),
        activations,
    )
    want = ops.packed_linear(x, *arguments)
    for low in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", low):
            got = ops.packed_linear(x, *arguments)
        assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_models_under_autocast(rows, activations):
    model, x = packed(net(), activations=activations), torch.randn(rows, 1, 5, 5)
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.03 * want.abs().max()


def test_gradients_under_autocast():
    model, x = packed(mlp()), torch.randn(5, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    other = x.detach().clone().requires_grad_()
    plain = unpacked(model)
    plain.zero_grad()
    plain(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad, rtol=0.05, atol=0.05)


# ---- sums that overflow before the scale is applied -----------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 20, 128])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_sums_of_large_inputs_do_not_overflow(grid, groups, rows, backend, generator):
    grid, n, cols = GRIDS[grid][0], 5, 64
    index = torch.randint(0, len(grid.levels), (n, cols), generator=generator).to(torch.uint8)
    codes, scale = pack_codes(index, grid.bits), torch.full((n * groups,), 1e-6)
    weight = ops.packed_dequantize(codes, scale, grid, grid.bits, cols).double()
    x = torch.full((rows, cols), 3e37)
    x[-1, 0] = -1.0
    bias = torch.full((n,), 1e30)
    y = ops.packed_linear(x, codes, scale, grid, grid.bits, bias).double()
    exact = x.double() @ weight.t() + bias.double()
    bound = (
        (cols + 2) * 2.0**-24 * (x.double().abs() @ weight.abs().t() + bias.double())
    )  # docs/packed.md, and the bias
    assert bool(((y - exact).abs() <= bound).all())


@pytest.mark.parametrize("grid", ["int4", "ternary", "nf4"])
def test_what_is_not_finite_stays_so(grid):
    """Inputs with inf and NaN give what they gave, and sums that are too large for float32 are inf."""
    model = packed(nn.Sequential(nn.Linear(64, 8)), grid)
    plain, x = unpacked(model), torch.ones(3, 64)
    x[0, 3], x[1, 5], x[2] = torch.inf, torch.nan, 3e38
    with torch.no_grad():
        weight = model[0].dequantize()
        got, want = model(x), plain(x)
    assert got[1].isnan().all()
    assert torch.equal(got[0][weight[:, 3] != 0], want[0][weight[:, 3] != 0])
    large = (x[2].double() @ weight.double().t()).abs() > 3.5e38
    assert got[2][large].isinf().all()


# ---- derivatives ----------------------------------------------------------------------------------------------------


def products():
    generator = torch.Generator().manual_seed(3)
    codes = pack_codes(torch.randint(0, 16, (6, 10), generator=generator).to(torch.uint8), 4)
    levels = ops.packed_dequantize(codes, torch.ones(6), Uniform(4), 4, 10)
    at = [torch.randn(3, 10, generator=generator), torch.rand(6, generator=generator) + 0.1,
          torch.randn(6, generator=generator)]  # fmt: skip

    def from_codes(x, scale, bias, activations="float"):
        return ops.packed_linear(x, codes, scale, Uniform(4), 4, bias, activations)

    def plain(x, scale, bias):
        return functional.linear(x, scale[:, None] * levels, bias)

    return from_codes, plain, at


def leaves(tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_reverse_mode_of_the_operator(activations, backend):
    from_codes, plain, at = products()
    one, two, weights = leaves(at), leaves(at), torch.randn(3, 6)
    got = torch.autograd.grad((from_codes(*one, activations) * weights).sum(), one)
    torch.testing.assert_close(got, torch.autograd.grad((plain(*two) * weights).sum(), two), rtol=1e-5, atol=1e-5)


def test_reverse_mode_twice(backend):
    from_codes, plain, at = products()
    found = []
    for function in (from_codes, plain):
        point = leaves(at)
        first = torch.autograd.grad(function(*point).pow(3).sum(), point, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), point))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def test_forward_mode(backend):
    from_codes, plain, at = products()
    tangents = tuple(torch.randn_like(t) for t in at)
    got = torch.func.jvp(from_codes, tuple(at), tangents)[1]
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(from_codes(*map(forward_ad.make_dual, at, tangents))).tangent
    want = torch.func.jvp(plain, tuple(at), tangents)[1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dual, want, rtol=1e-5, atol=1e-4)


def test_int8_products_refuse_forward_mode(backend):
    from_codes, _, at = products()
    with pytest.raises(NotImplementedError, match='packed_linear_int8.*"float"'):
        torch.func.jvp(lambda x: from_codes(x, *at[1:], "int8"), (at[0],), (at[0],))


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("batched", range(3))
def test_vmap_of_the_operator(batched, activations):
    from_codes, _, at = products()
    many = torch.stack([at[batched] * k for k in (1.0, 0.5, 2.0, 3.0)])

    def function(t):
        return from_codes(*at[:batched], t, *at[batched + 1 :], activations)

    torch.testing.assert_close(torch.vmap(function)(many), torch.stack([function(t) for t in many]))


def test_unpacking_is_differentiable_in_the_scale():
    codes = pack_codes(torch.randint(0, 16, (6, 10)).to(torch.uint8), 4)
    scale = torch.rand(12).add(0.1).requires_grad_()
    weight = ops.packed_dequantize(codes, scale, Uniform(4), 4, 10)
    levels = ops.packed_dequantize(codes, torch.ones(12), Uniform(4), 4, 10)
    assert torch.equal(torch.autograd.grad(weight.sum(), scale)[0], levels.reshape(12, 5).sum(1))
    with pytest.raises(NotImplementedError, match="packed_dequantize_ has no derivative"):
        torch.ops.askew.packed_dequantize_(codes, scale, torch.empty(0), Uniform(4).encoding, 4, torch.empty(6, 10))


@pytest.mark.parametrize("activation", [None, Uniform(8)], ids=["float", "quantized inputs"])
def test_models_differentiate_like_the_unpacked(activation):
    model, x = packed(mlp(), activation=activation), torch.randn(1, 12)
    forward, backward = torch.func.jacfwd(model)(x), torch.func.jacrev(model)(x)
    torch.testing.assert_close(forward, backward)
    if activation is None:
        torch.testing.assert_close(backward, torch.func.jacrev(unpacked(model))(x))
    torch.testing.assert_close(torch.vmap(model)(x.expand(3, 1, 12)), model(x).expand(3, 1, 5))


def test_convolutions_too():
    model, x = packed(net()), torch.randn(2, 1, 5, 5)
    plain = unpacked(model)

    def curved(module):
        return torch.func.hessian(lambda z: module(z).square().sum())(x)

    torch.testing.assert_close(curved(model), curved(plain))
    torch.testing.assert_close(torch.func.jacfwd(model)(x), torch.func.jacrev(plain)(x))


ROUNDING = {
    "linear": (nn.Linear(12, 5), (3, 12)), "images": (nn.Conv2d(2, 4, 3, 2, 1, padding_mode="reflect"), (2, 2, 5, 5)),
    "one image": (nn.Conv2d(2, 4, 3), (2, 5, 5)), "signals": (nn.Conv1d(2, 4, 3, padding=1), (3, 2, 4)),
    "in groups": (nn.Conv2d(4, 4, 3, groups=2), (2, 4, 5, 5)), "attention": (nn.MultiheadAttention(8, 2), (3, 2, 8)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize("what", ROUNDING)
def test_inputs_are_rounded_whoever_wants_gradients(what, activations, dtype):
    """Outputs are those of no_grad, bit for bit; the gradient goes straight through, and under torch.func and in
    forward mode both are the same up to the rounding of float32 sums, of the output's type rounded again."""
    layer, shape = ROUNDING[what]
    plain = ak.pack_(ak.hard_quantize_(ak.quantize_(nn.ModuleList([copy.deepcopy(layer).to(dtype)])))).eval()
    model = copy.deepcopy(plain)
    for packed_layer in ak.nn.packed_layers(model).values():
        packed_layer.set_activations(activations)

    def run(x, of=model):
        return of[0](x, x, x, need_weights=False)[0] if what == "attention" else of[0](x)

    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        want, floats = run(x), run(x, plain)
    rounded = what != "in groups" and not (activations == "bf16" and (dtype == torch.bfloat16 or what == "images"))
    assert torch.equal(want, floats) != rounded
    seen = x.clone().requires_grad_()
    y = run(seen)
    assert torch.equal(y, want)
    if what != "attention":  # whose second product has another input
        assert want.is_contiguous()
        g = torch.randn_like(y)
        other = x.clone().requires_grad_()
        mine, theirs = (torch.autograd.grad(run(t, of), t, g)[0] for t, of in ((seen, model), (other, plain)))
        close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2**-6, atol=2**-6)
        torch.testing.assert_close(mine, theirs, **close)
        torch.testing.assert_close(torch.func.grad(lambda t: (run(t) * g).sum())(x), theirs, **close)
        torch.testing.assert_close(torch.func.jvp(run, (x,), (x,))[0], want, **close)
        torch.testing.assert_close(torch.vmap(run)(torch.stack([x, -x]))[0], want, **close)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            want = run(x)
            with torch.enable_grad():
                assert torch.equal(run(seen), want)


@pytest.mark.parametrize("activations", ["float", "bf16", "int8"])
@pytest.mark.parametrize(
    "shape", [(2, 8, 1, 1), (1, 8, 3, 3), (2, 8, 9, 9), (8, 3, 3), (2, 8, 3), (5, 8), (2, 5, 8)], ids=str
)
def test_an_activation_in_place_may_follow(shape, activations):
    """As in most networks for images, whose normalization is folded or missing (squeeze and excitation)."""
    layers = {1: nn.Conv2d(8, 6, 1), 8: nn.Linear(8, 6), 9: nn.Conv2d(8, 6, 3)}
    line = nn.Conv1d(8, 6, 3, padding=1) if shape == (2, 8, 3) else nn.Conv2d(8, 6, 3, padding=1)
    model = packed(nn.Sequential(layers.get(shape[-1], line)), activations=activations)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for laid_out in (x, x.to(memory_format=torch.channels_last) if x.dim() == 4 else x):
        found = []
        for inplace in (False, True):
            leaf = laid_out.clone().requires_grad_()
            y = functional.relu(model(leaf), inplace)
            found.append((y, *torch.autograd.grad(y.square().sum(), (leaf, model[0].bias))))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("wants", [False, True], ids=["input", "input wants a gradient"])
@pytest.mark.parametrize("make", [mlp, net])
def test_biases_are_trained(make, wants):
    model = packed(make())
    plain = unpacked(model)
    x = torch.randn(3, 12, requires_grad=wants) if make is mlp else torch.randn(3, 1, 5, 5, requires_grad=wants)
    for module in (model, plain):
        for p in module.parameters():
            p.grad = None
        module(x).square().sum().backward()
        module.kept = [p.grad for name, p in module.named_parameters() if "bias" in name]
        for p in module.parameters():
            p.grad = None
    assert len(model.kept) == 2
    torch.testing.assert_close(model.kept, plain.kept)


def test_outputs_do_not_depend_on_who_wants_gradients():
    for activations in ("float", "int8"):
        model, x = packed(mlp(), activations=activations), torch.randn(3, 12)
        with torch.no_grad():
            want = model[0](x)
        assert torch.equal(model[0](x), want) and model[0](x).requires_grad


def test_functional_calls():
    model, x = packed(net(), "ternary"), torch.randn(4, 1, 5, 5)
    plain = unpacked(model)

    def of_sample(module):
        biases = {name: p.detach() for name, p in module.named_parameters() if "bias" in name}

        def loss(values, z):
            return torch.func.functional_call(module, values, (z[None],)).square().sum()

        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(biases, x)

    torch.testing.assert_close(of_sample(model), of_sample(plain))
    scales = {name: b.clone() for name, b in model.named_buffers() if name.endswith("scale")}
    grads = torch.func.grad(lambda s: torch.func.functional_call(model, s, (x,)).square().sum())(scales)
    for name, scale in scales.items():  # y is a polynomial of the last layer's scale: the exact difference quotient
        up, down = ({**scales, name: scale * (1 + d)} for d in (1e-3, -1e-3))
        with torch.no_grad():
            rise = (torch.func.functional_call(model, s, (x,)).square().sum() for s in (up, down))
            slope = (next(rise) - next(rise)) / 2e-3
        torch.testing.assert_close((grads[name] * scale).sum(), slope, rtol=1e-2, atol=1e-2)


def test_a_parametrized_bias():
    model, x = packed(mlp()), torch.randn(2, 12)
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    with torch.no_grad():
        got = model[0](x)
    torch.testing.assert_close(got, functional.linear(x, model[0].dequantize(), model[0].bias))


# ---- graphs ---------------------------------------------------------------------------------------------------------

BATCH, SIZE = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("size", min=4, max=64)
EXPORTED = {
    "rows": (mlp, (7, 12), {0: BATCH}, [(1, 12), (2, 12), (130, 12)]),
    "sequences": (mlp, (3, 4, 12), {0: BATCH, 1: SIZE}, [(1, 4, 12), (40, 5, 12)]),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
        (2, 3, 8, 8), {0: BATCH, 2: SIZE}, [(1, 3, 4, 8), (5, 3, 30, 8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("activations, strict", [("float", False), ("float", True), ("int8", False)])
@pytest.mark.parametrize("what", EXPORTED)
def test_exported_programs_take_any_batch(what, strict, activations):
    if (what, activations) == ("images", "int8") and torch.__version__ < "2.12":
        pytest.skip("torch.export of 2.11 fixes the size of images by the order of strides that it guesses")
    make, shape, dynamic, sizes = EXPORTED[what]
    model = packed(make(), activations=activations)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(shape),), dynamic_shapes=(dynamic,), strict=strict)
        for call in (program.module(), program.run_decompositions().module()):
            for size in sizes:
                x = torch.randn(size)
                torch.testing.assert_close(call(x), model(x))
                turned = x.transpose(0, -1).contiguous().transpose(0, -1)
                torch.testing.assert_close(call(turned), model(x))


def test_exported_with_gradients_and_quantized_inputs():
    model, x = packed(mlp(), activation=Uniform(8)), torch.randn(5, 12)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))
    torch.testing.assert_close(program.module()(x[:2]), model(x[:2]))


class Reader(nn.Module):
    """Asks for the type of a weight, as transformers' T5 does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, x):
        return self.linear(x.to(self.linear.weight.dtype))


def test_compiled_models():
    for make in (mlp, Reader):
        model, x = packed(make()), torch.randn(6, 12)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x).square().sum().backward()
        got = [p.grad for p in model.parameters()]
        model.zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(got, [p.grad for p in model.parameters()])


def test_packed_layers_are_leaves_of_fx():
    for model, x in ((packed(mlp()), torch.randn(2, 12)), (packed(net()), torch.randn(2, 1, 5, 5))):
        graph = torch.fx.symbolic_trace(model)
        assert torch.equal(graph(x), model(x))
        assert sum(node.op == "call_module" for node in graph.graph.nodes) == len(model)


@pytest.mark.parametrize("first", ["counter", "package"])
def test_operations_are_counted(first):
    """Whichever was imported first; and nothing imports the counter, which imports Triton."""
    imports = [
        "from torch.utils.flop_counter import FlopCounterMode",
        "import sys, askew_kernels as ak; absent = 'torch.utils.flop_counter' not in sys.modules",
    ]
    code = (
        "\n".join(imports if first == "counter" else imports[::-1])
        + """
import copy, torch
assert absent == (sys.argv[1] == "int8")
model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 10))
ak.pack_(ak.hard_quantize_(ak.quantize_(model)), activations=sys.argv[1])
def flops(net):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.ones(3, 2, 5, 5))
    return counter.get_total_flops()
assert flops(model) == flops(ak.unpack_(copy.deepcopy(model))) > 0
"""
    )
    subprocess.run([sys.executable, "-c", code, "float" if first == "counter" else "int8"], check=True)


# ---- fake, meta and inference tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Uniform(5), Codebook([-1.0, -0.21, 0.31, 1.0])], ids=str)
def test_fake_layers_leave_nothing_behind(grid):
    config = ak.QuantConfig(grid, scale="absmax")

    def run():
        model = nn.Sequential(PackedConv2d(1, 2, 3, config=config), nn.Flatten(), PackedLinear(18, 4, config=config))
        return model(torch.ones(2, 1, 5, 5))

    for _ in range(2):
        with FakeTensorMode():
            assert type(run()) is FakeTensor
        assert type(run()) is torch.Tensor and run().shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_meta_models_give_shapes(dtype):
    model = packed(net()).to("meta", dtype)
    y = model(torch.empty(2, 1, 5, 5, device="meta", dtype=dtype))
    assert y.is_meta and y.shape == (2, 3) and y.dtype == dtype


def test_there_is_nothing_to_pack_on_the_meta_device():
    model = ak.quantize_(mlp()).to("meta")
    with pytest.raises(ValueError, match="^0: weight: is on the meta device"):
        ak.pack_(model)


def test_packed_in_inference_mode_used_and_tuned_outside():
    model = ak.hard_quantize_(ak.quantize_(mlp()))
    plain, x = ak.dequantize_(copy.deepcopy(model)), torch.randn(3, 12)
    with torch.inference_mode():
        inside = ak.pack_(model)(x)
        assert model[0].weight.norm() > 0
    torch.testing.assert_close(model(x), inside)
    for module in (model, plain):
        module(x).square().sum().backward()
        module(x.clone().requires_grad_()).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [plain[0].bias.grad, plain[2].bias.grad])


# ---- nested tensors and fast paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors(layout, activations):
    model, parts = packed(mlp(), activations=activations), [torch.randn(2, 12), torch.randn(5, 12)]
    x = torch.nested.nested_tensor(parts, layout=layout)
    with torch.no_grad():
        y = model[0](x)
        for got, part in zip(y.unbind(), parts, strict=True):
            torch.testing.assert_close(got, model[0](part))
        if layout == torch.jagged:
            assert (model[0](x) + y).is_nested  # which takes equal ragged sizes
    with pytest.raises(NotImplementedError, match="nested"):
        packed(net())[0](torch.nested.nested_tensor([torch.ones(1, 5, 5), torch.ones(1, 6, 6)]))


@pytest.mark.parametrize("activation", [None, Uniform(4)], ids=["float", "quantized inputs"])
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_in_eval_call_the_packed_layers(padded, activations, activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    model = packed(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=padded), activation=activation, activations=activations
    )
    called = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            module.note = name
    forward = PackedLinear.forward
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[0] * 5, [0] * 4 + [1], [0] * 2 + [1] * 3]).bool() if padded else None
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLinear, "forward", lambda self, x: called.append(self.note) or forward(self, x))
        got = model(x, src_key_padding_mask=mask)
    assert len(called) == 6
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            want = model(x, src_key_padding_mask=mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    keep = slice(None) if mask is None else ~mask
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-4, atol=1e-5)


# ---- the weight, for those who read it ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_there_to_read(dtype, monkeypatch):
    for layer, x in (
        (packed(mlp())[0].to(dtype), torch.randn(2, 12)),
        (packed(net())[0].to(dtype), torch.randn(2, 1, 5, 5)),
    ):
        weight, real, unpackings = layer.weight, layer.dequantize(), []
        unpack = type(layer).dequantize
        monkeypatch.setattr(
            type(layer), "dequantize", lambda self, *a, n=unpackings, f=unpack: n.append(1) or f(self, *a)
        )
        assert (weight.dtype, weight.device, weight.shape, weight.dim(), len(weight)) == (
            dtype, real.device, real.shape, real.dim(), len(real),
        )  # fmt: skip
        assert not weight.requires_grad and weight.is_floating_point() and not isinstance(weight, nn.Parameter)
        assert not unpackings
        assert torch.equal(weight, real) and unpackings
        function = functional.linear if layer.kind.name == "linear" else functional.conv2d
        x = x.to(dtype).requires_grad_()
        assert torch.equal(function(x, weight), function(x, real))
        grads = [torch.autograd.grad(function(x, w).sum(), x)[0] for w in (weight, real)]
        assert torch.equal(*grads)
        for read in (
            copy.deepcopy(weight),
            pickle.loads(pickle.dumps(weight)),
            weight.double(),
            weight.T.T if weight.dim() == 2 else weight,
        ):
            assert torch.equal(read, real.to(read.dtype))
        assert weight.tolist() == real.tolist() and repr(weight) == repr(real)
        buffer = io.BytesIO()
        torch.save(weight, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer), real)
        names = [*layer.state_dict(), *dict(layer.named_parameters()), *dict(layer.named_buffers())]
        assert "weight" not in names
        monkeypatch.undo()


WRITES = {
    "in place": lambda layer: layer.weight.normal_(),
    "its data": lambda layer: layer.weight.data.mul_(2),
    "initialised": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "as output": lambda layer: torch.add(layer.dequantize(), 1, out=layer.weight),
    "to train": lambda layer: layer.weight.requires_grad_(),
    "as Parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.dequantize())),
    "as tensor": lambda layer: setattr(layer, "weight", layer.dequantize()),
    "fused": lambda layer: nn.utils.fuse_linear_bn_eval(layer, nn.BatchNorm1d(16).eval()),
}


@pytest.mark.parametrize("how", WRITES)
def test_nobody_writes_to_the_weight(how):
    layer = packed(mlp())[0]
    before = layer.dequantize()
    with pytest.raises((RuntimeError, AttributeError), match="weight"):
        WRITES[how](layer)
    assert torch.equal(layer.dequantize(), before)


def test_t5_asks_for_the_type_of_a_weight():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    model = ak.hard_quantize_(ak.quantize_(transformers.T5EncoderModel(config).eval()))
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        want = model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(ak.pack_(model)(input_ids=ids).last_hidden_state, want, rtol=1e-4, atol=1e-5)


# ---- checkpoints and unpacking --------------------------------------------------------------------------------------

MEANINGS = {
    "grid: expected Uniform(bits=2": lambda: packed(mlp(), "ternary"),
    "trits: expected False": lambda: packed(mlp(), "ternary", trits=True),
    "activation: expected None, got Uniform(bits=8": lambda: packed(mlp(), "int2", activation=Uniform(8)),
}
GRIDS["int2"] = (Uniform(2), "absmax")


def test_codes_of_another_meaning_are_refused():
    for text, saved in MEANINGS.items():
        model = packed(mlp(1), "int2")
        before = copy.deepcopy(model.state_dict())
        for strict in (True, False):
            with pytest.raises(RuntimeError) as caught:
                model.load_state_dict(saved().state_dict(), strict=strict)
            said = str(caught.value)
            assert text in said or ("trits" in text and "expected Uniform" in said)
            assert "0.weight_codes" in said and "2.weight_codes" in said
        for key, t in before.items():
            assert torch.equal(model.state_dict()[key], t)


def test_averages_of_codes_are_refused():
    """They are no codes of averaged weights; whole numbers of another type are the bytes that they say."""
    a, b = packed(mlp(0)), packed(mlp(1))
    state, other, x = a.state_dict(), b.state_dict(), torch.randn(3, 12)
    mean = {k: v if k.endswith(EXTRA_STATE) else (v.float() + other[k].float()) / 2 for k, v in state.items()}
    with pytest.raises(RuntimeError, match=r"0\.weight_codes: expected bytes, got torch.float32 numbers that are none"):
        b.load_state_dict(mean)
    kept = {k: v for k, v in b.state_dict().items() if not k.endswith("bias")}
    assert all(torch.equal(v, other[k]) for k, v in kept.items())
    b.load_state_dict({k: v.double() if k.endswith("codes") else v for k, v in state.items()})
    assert torch.equal(b(x), a(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -0.1])
def test_scales_that_are_none_are_refused(bad):
    """As a file's are: a damaged checkpoint does not become a model that gives NaN."""
    model = packed(mlp(0))
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(model.state_dict())
    state["2.weight_scale"].view(-1)[-1] = bad
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"2\.weight_scale: expected positive finite scales"):
            model.load_state_dict(state, assign=assign)
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items() if k.startswith("2.weight"))


def test_a_row_of_as_many_bytes_is_no_row_of_as_many_weights():
    with pytest.raises(RuntimeError, match=r"shape: expected \[4, 16\], got \[4, 15\]"):
        packed(nn.Sequential(nn.Linear(16, 4))).load_state_dict(packed(nn.Sequential(nn.Linear(15, 4))).state_dict())


@pytest.mark.parametrize("grid", GRIDS)
def test_equal_meanings_load_and_old_states_too(grid):
    saved, x = packed(mlp(), grid), torch.randn(3, 12)
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    for keys in (set(state), {key for key in state if EXTRA_STATE not in key}):
        model = packed(mlp(1), grid)
        assert model.load_state_dict({key: state[key] for key in keys}) == ([], [])
        assert torch.equal(model(x), saved(x))


@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_of_narrower_scales_takes_the_type_of_those_it_is_given(own, given):
    saved, x = packed(mlp(), "int2"), torch.randn(3, 12)
    for layer in (saved[0], saved[2]):
        layer.weight_scale = layer.weight_scale.to(given)
    model = packed(mlp(1), "int2")
    for layer in (model[0], model[2]):
        layer.weight_scale = layer.weight_scale.to(own)
    scales = [model[0].weight_scale, model[2].weight_scale]
    assert model.load_state_dict(saved.state_dict()) == ([], [])
    assert torch.equal(model[0].dequantize(), saved[0].dequantize()) and torch.equal(model(x), saved(x))
    assert model[0].weight_scale is scales[0] and model[2].weight_scale is scales[1]  # which others may share


def test_a_layer_keeps_the_type_of_its_scales_where_it_holds_those_given():
    saved, model = packed(mlp(), "int2"), packed(mlp(1), "int2")
    for layer in (saved[0], saved[2]):
        layer.weight_scale = layer.weight_scale.bfloat16().float()
    for layer in (model[0], model[2]):
        layer.weight_scale = layer.weight_scale.bfloat16()
    model.load_state_dict(saved.state_dict())
    assert model[0].weight_scale.dtype == torch.bfloat16
    assert torch.equal(model[0].dequantize(), saved[0].dequantize())


@pytest.mark.parametrize("wrong", ["off its levels", "of another shape", "NaN"])
def test_a_fill_that_raises_leaves_the_layer(wrong):
    layer = packed(mlp())[0]
    before, weight = copy.deepcopy(layer.state_dict()), layer.dequantize()
    weight = {"off its levels": weight + 0.01, "of another shape": weight[:, :-1], "NaN": weight * float("nan")}[wrong]
    with pytest.raises((ValueError, RuntimeError)):
        layer.fill(weight, layer.weight_scale * 1)
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())


def test_an_unpacked_encoder_takes_torchs_fast_path_again():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    before = encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu
    ak.unpack_(ak.pack_(ak.hard_quantize_(ak.quantize_(encoder))))
    assert (encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu) == before


def test_a_damaged_meaning_is_refused():
    model = packed(mlp())
    state = model.state_dict() | {f"0.{EXTRA_STATE}": torch.arange(5, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="_extra_state: expected the JSON"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="grid: expected"):
        model[0].set_extra_state(packed(mlp(), "ternary")[0].get_extra_state())


def test_unpacking_refuses_quantized_inputs_by_name():
    model = packed(mlp(), activation=Uniform(2, narrow=True))
    layers = list(model)
    with pytest.raises(ValueError, match=r"^0: its inputs are quantized to Uniform\(bits=2.*activation"):
        ak.unpack_(model)
    assert list(model) == layers
    assert type(ak.unpack_(model, force=True)[0]) is nn.Linear
    with pytest.raises(ValueError, match="is itself a layer"):
        ak.unpack_(packed(mlp())[0])


@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
def test_int8_models_under_transforms(called):
    model, x = packed(mlp(), activations="int8"), torch.randn(3, 12)
    plain = unpacked(model)
    if called:
        with torch.no_grad():
            model(x)
    linear, other = model[0], plain[0]
    with torch.no_grad():
        want = copy.deepcopy(linear)(x)
    torch.testing.assert_close(torch.vmap(linear)(x), want)
    torch.testing.assert_close(torch.func.jvp(linear, (x,), (x,)), (want, torch.func.jvp(other, (x,), (x,))[1]))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(dual, torch.func.jvp(other, (x,), (x,))[1])


def test_the_weight_of_a_layer_in_forward_mode():
    layer = packed(nn.Sequential(nn.Linear(12, 5)))[0]
    x, kept = torch.randn(3, 12), layer.dequantize()
    for function in (lambda z: nn.functional.linear(z, layer.weight), lambda z: z[0] * layer.weight[1]):
        with forward_ad.dual_level():
            assert forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent is not None
    jacobian = torch.func.jacfwd(lambda z: nn.functional.linear(z, layer.weight))(x[0])
    torch.testing.assert_close(jacobian, kept)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_vmap_of_a_lookup(granularity):
    model = nn.Sequential(nn.Embedding(10, 4))
    ak.pack_(ak.hard_quantize_(ak.quantize_(model, ak.QuantConfig(granularity=granularity), kinds="embedding")))
    for tokens in (0, 5, 20):
        index = torch.randint(0, 10, (3, tokens))
        assert torch.equal(torch.vmap(model)(index), model(index))
    model[0].weight_scale.requires_grad_()
    y = model(torch.empty(0, dtype=torch.long))
    y.sum().backward()
    assert y.shape == (0, 4) and not model[0].weight_scale.grad.any()
