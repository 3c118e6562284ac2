"""Contract: with ``QuantConfig(ste_clip="step")`` the optimizer's pass zeroes the gradient outside the hull, instead of
each backward.

1. Weights, losses, scales and telemetry are bit for bit those of gradients that ``ops.ste_clip_`` zeroes just before
   the step with the step's own scale, and where the scale is frozen those of ``ste_clip=True``; in hold, while annealed
   and on the hull, also where a step's gradient is the sum of several backwards. Until the step a gradient is what the
   product gave.
2. Whoever would train such a weight otherwise is refused by name (SAM, Skewed) or told once (torch's optimizers).
3. The configuration round-trips, and takes what it must and nothing else.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import askew_kernels as ak

GRID = ak.quant.Uniform(bits=3)


def model_with(ste_clip, forward="hard", dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)
    config = ak.quant.QuantConfig(weight=GRID, forward=forward, ste_clip=ste_clip)
    return ak.nn.quantize_(model, config)


def clip_by_hand(model):
    for layer in (model[0], model[2]):
        w = layer.weight.detach()
        scale = layer.weight_scale
        if not layer.quantizer.frozen:  # what the step will start from
            scale = ak.quant.compute_scale(w, GRID)
        ak.ops.ste_clip_(layer.weight.grad, w, scale, GRID)


def run(ste_clip, optimizer, steps=12, freeze="anneal", micro=1, dtype=torch.float32, **options):
    by_hand, ste_clip = ste_clip == "by hand", False if ste_clip == "by hand" else ste_clip
    model = model_with(ste_clip, dtype=dtype)
    o = optimizer(ak.param_groups(model), lr=0.5, constraint_eps=1.0, telemetry_every=1, **options)
    for group in o.param_groups:
        if group["grid"] is not None:
            group["freeze_scale"] = freeze
    generator, seen, gradients = torch.Generator().manual_seed(1), [], []
    for i in range(steps):
        for group in o.param_groups:
            group["constraint_eps"] = 1.0 if i < steps // 2 else 0.3
        o.zero_grad()
        for _ in range(micro):
            x = torch.randn(8, 12, generator=generator).to(dtype)
            loss = 30 * model(x).float().square().mean()
            loss.backward()
        seen += [loss.detach(), *(p.detach().clone() for p in model.parameters())]
        gradients.append(model[0].weight.grad.clone())
        if by_hand:
            clip_by_hand(model)
        o.step()
        seen += [*(b.clone() for b in model.buffers())]
        seen.append(torch.tensor([[r["flips"], r["velocity_norm"], r["grad_velocity"]] for r in o.telemetry()]))
    return seen, gradients


@pytest.mark.parametrize("optimizer", [ak.optim.ASkewSGD, ak.optim.ASkewAdamW, ak.optim.ASkewLion])
@pytest.mark.parametrize("freeze", ["anneal", "never", "init"])
@pytest.mark.parametrize("micro", [1, 3])
def test_the_same_bits(optimizer, freeze, micro):
    options = {"momentum": 0.9} if optimizer is ak.optim.ASkewSGD else {}
    got, raw = run("step", optimizer, freeze=freeze, micro=micro, **options)
    want, also_raw = run("by hand", optimizer, freeze=freeze, micro=micro, **options)
    for i, (a, b) in enumerate(zip(got + raw, want + also_raw, strict=True)):
        assert torch.equal(a, b), i
    if freeze == "init":
        want, clipped = run(True, optimizer, freeze=freeze, micro=micro, **options)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(a, b), i
        assert any(not torch.equal(a, b) for a, b in zip(raw, clipped, strict=True))  # there was something to clip
        assert all(torch.equal(a[b != 0], b[b != 0]) for a, b in zip(raw, clipped, strict=True))
    never, _ = run(False, optimizer, freeze=freeze, micro=micro, **options)
    assert any(not torch.equal(a, b) for a, b in zip(got, never, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    got, _ = run("step", ak.optim.ASkewSGD, dtype=dtype)
    want, _ = run("by hand", ak.optim.ASkewSGD, dtype=dtype)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_sharpness_aware_steps_and_wrapped_bases_refuse_by_name():
    model = model_with("step")
    for make in (
        lambda: ak.optim.SAM(ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1)),
        lambda: ak.optim.AlignedSAM(torch.optim.SGD(model.parameters(), lr=0.1)),
        lambda: ak.optim.Skewed(torch.optim.SGD(ak.param_groups(model), lr=0.1)),
    ):
        with pytest.raises(TypeError, match=r"params\[0\]: its layer has ste_clip='step'.*expected ste_clip=True"):
            make()
    other = nn.Linear(2, 2)
    for wrapped in (ak.optim.SAM(torch.optim.SGD(other.parameters(), lr=0.1)),
                    ak.optim.Skewed(torch.optim.SGD(other.parameters(), lr=0.1))):  # fmt: skip
        before = len(wrapped.param_groups)
        group = {"params": iter([model[0].weight]), "grid": GRID}
        with pytest.raises(TypeError, match="ste_clip"):
            wrapped.add_param_group(group)
        assert len(wrapped.param_groups) == before


@pytest.mark.parametrize("make", [
    lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    lambda m: ak.optim.ASkewSGD([{"params": list(m.parameters())}], lr=0.1),
])  # fmt: skip
def test_other_optimizers_are_told_once_for_a_weight(make):
    model = model_with("step")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(model)
    model(torch.randn(4, 12)).sum().backward()
    with pytest.warns(UserWarning, match="ste_clip='step'.*use ste_clip=True") as told:
        optimizer.step()
    assert len(told) == 2  # two weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        right = model_with("step")
        right(torch.randn(4, 12)).sum().backward()
        ak.optim.ASkewSGD(ak.param_groups(right), lr=0.1).step()


def test_configuration():
    config = ak.quant.QuantConfig(ste_clip="step")
    assert ak.quant.QuantConfig.from_dict(config.to_dict()) == config
    assert ak.quant.QuantConfig.from_json(config.to_json()).clips_in_step
    assert ak.quant.QuantConfig().clips_in_backward and not ak.quant.QuantConfig().clips_in_step
    with pytest.raises(ValueError, match="ste_clip: expected True, False or 'step', got 'pass'"):
        ak.quant.QuantConfig(ste_clip="pass")
    with pytest.raises(TypeError, match="ste_clip"):
        ak.quant.QuantConfig(ste_clip=1)
    with pytest.raises(ValueError, match="ste_clip: 'step'.*forward='relaxed'"):
        ak.quant.QuantConfig(ste_clip="step", forward="relaxed")


def test_compiled_and_functional_forwards_leave_the_clip_to_the_step():
    model = model_with("step")
    weight = model[0].weight
    with torch.no_grad():
        weight[0, 0] = 100.0
        model[0].quantizer.set_scale(weight, torch.ones(16))
        model[0].quantizer.freeze(weight)
    x = torch.full((1, 12), 0.01)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    gradients = torch.func.grad(loss)({k: p.detach() for k, p in model.named_parameters()})
    assert gradients["0.weight"][0, 0] != 0
