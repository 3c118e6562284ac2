"""Contract: a layer that takes the place of another keeps what users hung on it (hooks of every kind and their handles,
attributes, parameters, submodules), and is refused by name where the old layer computed something of its own."""

import copy
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import askew_kernels as ak
from askew_kernels.nn import AskewConv2d, AskewLinear, PackedConv2d, PackedLinear
from askew_kernels.nn.replace import carry_over, computed_tensors, replace_modules

KINDS = {
    "linear": lambda: nn.Linear(4, 3), "conv2d": lambda: nn.Conv2d(2, 3, 3),
    "quantized linear": lambda: AskewLinear(4, 3), "quantized conv2d": lambda: AskewConv2d(2, 3, 3),
    "packed linear": lambda: PackedLinear(4, 3), "packed conv2d": lambda: PackedConv2d(2, 3, 3),
}  # fmt: skip


def input_of(module):
    return torch.ones(2, 2, 5, 5) if hasattr(module, "kernel_size") else torch.ones(2, 4)


def hung(module, seen):
    """Every kind of hook, each of which writes its name; the handles."""

    def note(name, *_):
        seen.append(name)

    def noting(name):
        return lambda *args, **kwargs: note(name)

    return [
        module.register_forward_pre_hook(noting("pre")),
        module.register_forward_pre_hook(lambda m, args, kwargs: note(f"pre with {len(kwargs)}"), with_kwargs=True),
        module.register_forward_hook(noting("forward")),
        module.register_forward_hook(noting("always"), always_call=True),
        module.register_full_backward_hook(noting("backward")),
        module.register_full_backward_pre_hook(noting("backward pre")),
        module.register_state_dict_pre_hook(noting("save pre")),
        module.register_state_dict_post_hook(noting("save")),
        module.register_load_state_dict_pre_hook(lambda m, *_: note(type(m).__name__)),
        module.register_load_state_dict_post_hook(noting("loaded")),
    ]


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", ["linear", "quantized linear", "packed linear"])
def test_every_hook_goes_on_and_its_handle_removes_it(old, new):
    model, seen = nn.Sequential(KINDS[old]()), []
    handles = hung(model[0], seen)
    replacement = KINDS[new]()
    replace_modules(model, {"0": replacement})
    assert model[0] is replacement
    x = torch.ones(2, 4, requires_grad=True)
    model(x).sum().backward()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert sorted(seen) == sorted([
        "pre", "pre with 0", "forward", "always", "backward", "backward pre", "save pre", "save",
        type(replacement).__name__, "loaded",
    ])  # fmt: skip
    for handle in handles:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert not seen


def test_a_hook_of_the_new_layer_stays_too():
    old, new, seen = nn.Linear(2, 2), nn.Linear(2, 2), []
    old.register_forward_hook(lambda *_: seen.append("old"))
    new.register_forward_hook(lambda *_: seen.append("new"))
    carry_over(old, new)
    new(torch.ones(1, 2))
    assert sorted(seen) == ["new", "old"]


def test_attributes_parameters_and_submodules():
    old, new = AskewLinear(4, 3), PackedLinear(4, 3)
    old.role, old.gain, old.adapter = "mixer", nn.Parameter(torch.ones(1)), nn.Linear(4, 3)
    old.register_buffer("mask", torch.ones(3), persistent=False)
    old.double_of = types.MethodType(lambda self, x: 2 * self(x), old)
    old.eval()
    carry_over(old, new)
    assert new.role == "mixer" and new.gain is old.gain and new.adapter is old.adapter and new.mask is old.mask
    assert not new.training and "mask" not in new.state_dict() and "gain" in new.state_dict()
    x = torch.ones(1, 4)
    assert torch.equal(new.double_of(x), 2 * new(x))
    assert not hasattr(new, "quantizer")


@pytest.mark.parametrize("kind", KINDS)
def test_own_attributes_are_those_that_plain_layers_have_not(kind):
    """What a class keeps on its instances must not travel to layers of another class."""
    layer = KINDS[kind]()
    plain = nn.Conv2d(2, 3, 3) if hasattr(layer, "kernel_size") else nn.Linear(4, 3)
    layer(input_of(layer))
    names = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    known = {*vars(plain), *plain._parameters, *getattr(layer, "own_attributes", ())}
    assert names <= known


def test_compiled_layers_are_compiled_anew():
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    old.compile(backend="eager")
    carry_over(old, new)
    assert new._compiled_call_impl is not None and new._compiled_call_impl is not old._compiled_call_impl


COMPUTED = {
    "WeightNorm": nn.utils.weight_norm,
    "_WeightNorm": nn.utils.parametrizations.weight_norm,
    "SpectralNorm": nn.utils.spectral_norm,
    "_SpectralNorm": nn.utils.parametrizations.spectral_norm,
    "L1Unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "PruningContainer": lambda layer: prune.l1_unstructured(prune.random_unstructured(layer, "weight", 1), "weight", 1),
}  # fmt: skip


@pytest.mark.parametrize("maker", COMPUTED)
def test_a_computed_weight_is_refused_by_name(maker):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        COMPUTED[maker](model[1])
    before = list(model)
    assert computed_tensors(model[1]) == {"weight": maker}
    with pytest.raises(ValueError, match=rf"^1: its weight .*\({maker}\); make it permanent"):
        replace_modules(model, {"0": nn.Linear(4, 4), "1": nn.Linear(4, 4)})
    assert list(model) == before


def test_a_forward_of_the_instance_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="^0: its forward was replaced"):
        replace_modules(model, {"0": nn.Linear(4, 4)})


@pytest.mark.parametrize("kind", KINDS)
def test_plain_layers_compute_nothing(kind):
    assert computed_tensors(KINDS[kind]()) == {}


def test_one_layer_under_two_names():
    shared, seen = nn.Linear(4, 4), []
    model = nn.Sequential(shared, shared)
    shared.register_forward_hook(lambda *_: seen.append(1))
    twin = nn.Linear(4, 4)
    replace_modules(model, {"0": twin, "1": twin})
    model(torch.ones(1, 4))
    assert len(seen) == 2 and model[0] is model[1] is twin


def test_packing_and_unpacking_keep_hooks():
    model = ak.hard_quantize_(ak.quantize_(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 4))))
    seen = []
    for layer in (model[0], model[2]):
        layer.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        layer.note = "kept"
    x = torch.ones(1, 2, 5, 5)
    ak.pack_(model)(x)
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "2.bias"}
    ak.unpack_(model)(x)
    assert {name for name, _ in model.named_buffers()} == set()
    assert seen == ["PackedConv2d", "PackedLinear", "Conv2d", "Linear"]
    assert model[0].note == model[2].note == "kept"
    assert {*vars(model[2])} - {*vars(nn.Linear(1, 1))} == {"note"}
