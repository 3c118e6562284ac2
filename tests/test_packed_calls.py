"""Contract: a packed layer's second call, which asks less than its first (nn/calls.py), gives what a first call gives.

1. It is the same bits, for every shape of input, with and without bias, and calls the same operator.
2. What may change between two calls (tensors, types, choices, modes, copies, checkpoints) is seen by the next one.
3. ``torch.jit.trace``, with its own check and with gradients switched on, gives what a model computes without them.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import askew_kernels as ak
from askew_kernels import runtime
from askew_kernels.nn.calls import Call

pytestmark = pytest.mark.skipif(runtime._C is None, reason="needs the compiled operators")
SHAPES = [(12,), (1, 12), (5, 12), (2, 3, 12), (0, 12), (2, 0, 12), (2, 1, 3, 12)]


def packed(seed=0, bias=True, activations="float", scale_dtype=None, config=None):
    torch.manual_seed(seed)
    model = ak.quantize_(nn.Sequential(nn.Linear(12, 7, bias=bias)), config or ak.QuantConfig(ak.quant.Uniform(4)))
    return ak.pack_(model, force=True, activations=activations, scale_dtype=scale_dtype).eval()[0]


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(dtype)


TRACED = {
    "linear": (lambda: [nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 7)], lambda n: rows(n, 12)),
    "convolution": (lambda: [nn.Conv2d(6, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 7, 1)], lambda n: rows(n, 6, 7, 7)),
    "embedding": (lambda: [nn.Embedding(12, 16), nn.LayerNorm(16), nn.Linear(16, 7)], lambda n: torch.arange(n)),
}  # fmt: skip


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("activations", ["float", "int8", "bf16"])
@pytest.mark.parametrize("kind", TRACED)
def test_a_trace_is_of_what_inference_computes(kind, activations, called, tmp_path):
    make, inputs = TRACED[kind]
    torch.manual_seed(0)
    model = ak.quantize_(nn.Sequential(*make()), kinds=("linear", "conv", "embedding"))
    model = ak.pack_(model, force=True, activations=activations).eval()
    for n in (4, 1) if called else ():
        with torch.no_grad():
            model(inputs(n))
    torch.jit.trace(model, inputs(4)).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    for n in (4, 1, 6):
        got = traced(inputs(n))
        with torch.no_grad():
            assert torch.equal(got, model(inputs(n)))


@pytest.mark.parametrize("activations", ["float", "int8", "bf16"])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(12, 7), lambda: nn.Conv2d(12, 7, 1), lambda: nn.ConvTranspose1d(12, 7, 2)]
)
def test_inputs_that_are_no_floats_are_named(make, activations):
    model = ak.pack_(ak.quantize_(nn.Sequential(make())), force=True, activations=activations)
    x = {2: rows(3, 12), 4: rows(3, 12, 5, 5), 3: rows(3, 12, 5)}[len(model[0].shape)]
    for _ in range(2):
        for dtype in (torch.int64, torch.bool, torch.complex64):
            with pytest.raises(TypeError, match=f"^x: expected a float tensor, got {dtype}"):
                model(x.to(dtype))
        model(x)


EVERY = {
    "linear": (nn.Linear(8, 8), (3, 8)), "without bias": (nn.Linear(8, 8, bias=False), (3, 8)),
    "signal": (nn.Conv1d(8, 8, 3), (1, 8, 900)), "image": (nn.Conv2d(8, 8, 3), (1, 8, 30, 30)),
    "few positions": (nn.Conv2d(8, 8, 3), (1, 8, 4, 4)), "volume": (nn.Conv3d(8, 8, 3), (1, 8, 9, 9, 9)),
    "by channel": (nn.Conv2d(8, 8, 3, groups=8), (1, 8, 30, 30)),
    "transposed": (nn.ConvTranspose2d(8, 8, 3), (1, 8, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("activations", ["float", "int8", "bf16"])
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_where_the_codes_are_and_where_new_tensors_would_be(name, activations):
    """The default device changes nothing; codes without memory (a file not loaded yet) are told, not multiplied."""
    layer, shape = EVERY[name]
    model, x = (
        ak.pack_(ak.quantize_(nn.Sequential(copy.deepcopy(layer))), force=True, activations=activations),
        rows(*shape),
    )
    first = model(x)
    with torch.device("meta"):
        assert torch.equal(model(x), first)
    for asked in (model.to("meta"), copy.deepcopy(model)):  # with the call that it had, and without
        with pytest.raises(ValueError, match=r"^x: expected on the device of the layer's codes \(meta\), got cpu"):
            asked(x)
        assert asked(x.to("meta")).shape == first.shape


def fresh(layer):
    """One with the same state that has never been called."""
    new = copy.deepcopy(layer)
    assert new._call is None
    return new


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_second_call_is_the_first(shape, bias, activations):
    layer, x = packed(bias=bias, activations=activations), rows(*shape)
    first = layer(x)
    assert isinstance(layer._call, Call) and torch.equal(layer._call.product_of(layer, x), first)
    for again in (x, x.clone(), x.unsqueeze(0).expand(2, *shape)[1]):
        assert torch.equal(layer(again), first) and layer(again).shape == (*shape[:-1], 7)
    if len(shape) > 1:
        turned = x.transpose(0, -1).contiguous().transpose(0, -1)  # not contiguous
        assert torch.equal(layer(turned), first)


@torch.no_grad()
def test_a_wrong_shape_is_the_first_calls_error():
    layer = packed()
    layer(rows(2, 12))
    for bad in (rows(2, 11), torch.tensor(1.0)):
        with pytest.raises((ValueError, IndexError)) as second:
            layer(bad)
        with pytest.raises(type(second.value), match=str(second.value)[:20].replace("(", r"\(")):
            fresh(layer)(bad)


def codes_written(layer):
    layer.weight_codes.copy_(packed(1).weight_codes)


def codes_exchanged(layer):
    layer.weight_codes = packed(1).weight_codes


def scale_written(layer):
    layer.weight_scale.mul_(2)


def data_exchanged(layer):
    layer.weight_codes.data = packed(1).weight_codes.clone()


def loaded(layer):
    layer.load_state_dict(packed(1).state_dict())


def assigned(layer):
    layer.load_state_dict(packed(1).state_dict(), assign=True)


def bias_written(layer):
    layer.bias.add_(1)


def bias_exchanged(layer):
    layer.bias = nn.Parameter(layer.bias + 1)


def bias_gone(layer):
    layer.bias = None


def halved(layer):
    layer.half()


def scales_of_another_type(layer):
    layer.weight_scale = layer.weight_scale.half()


def other_activations(layer):
    layer.set_activations("int8" if layer.activations == "float" else "float")


def filled(layer):
    layer.fill(rows(7, 12), torch.full((7,), 0.1), force=True)


CHANGES = [codes_written, codes_exchanged, scale_written, data_exchanged, loaded, assigned, bias_written,
           bias_exchanged, bias_gone,
           halved, scales_of_another_type, other_activations, filled]  # fmt: skip


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_is_seen(change, activations):
    layer, x = packed(activations=activations), rows(3, 12)
    before = layer(x)
    layer(x)
    change(layer)
    expected = fresh(layer)(x)
    assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
    assert change in (halved, scales_of_another_type) or not torch.equal(expected, before)


@torch.no_grad()
def test_other_types_and_modes():
    layer, x = packed(), rows(3, 12)
    layer(x)
    for other in (x.bfloat16(), x.half(), x.double()):
        assert torch.equal(layer(other), fresh(layer)(other)) and layer(other).dtype == other.dtype
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with runtime.use_backend("reference"):
        assert torch.equal(layer(x), fresh(layer)(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(layer(dual)).tangent is not None
    assert torch.allclose(torch.func.vmap(layer)(x), layer(x))


def test_gradients_come_back():
    layer, x = packed(), rows(3, 12)
    with torch.no_grad():
        layer(x)
        assert layer._call.product_of(layer, x) is not None
    layer(x).sum().backward()  # the bias wants one
    assert torch.equal(layer.bias.grad, torch.full((7,), 3.0))
    layer.bias.requires_grad_(False)
    layer(x)
    wanted = x.clone().requires_grad_()
    layer(wanted).sum().backward()
    assert torch.allclose(wanted.grad, layer.dequantize().sum(0).expand(3, 12))


@torch.no_grad()
def test_the_operator_is_seen_by_those_who_look():
    """Dispatch modes and the profiler see the product of a later call as that of the first."""
    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = packed(), rows(3, 12)
    layer(x)
    with Look():
        layer(x)
    assert "askew.packed_linear.default" in seen


@torch.no_grad()
def test_copies_and_compiled_layers_start_anew():
    layer, x = packed(), rows(3, 12)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._call is None and torch.equal(other(x), expected)
        other.weight_scale.mul_(2)
        assert not torch.equal(other(x), expected) and torch.equal(layer(x), expected)
    shallow = copy.copy(layer)
    assert torch.equal(shallow(x), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    layer.weight_scale.mul_(2)
    assert torch.equal(compiled(x), layer(x)) and not torch.equal(layer(x), expected)
