"""Contract: a layer that quantizes a Parameter of another module (a projection of nn.MultiheadAttention, experts) has
the Parameter's name, and whoever walks or lists names finds what it needs: checkpoints of torch.distributed, loaders of
accelerate, torch.export; who cannot have both says so."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import askew_kernels as ak


class SmallExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, x):
        return nn.functional.linear(x, self.down_proj[1])


class Network(nn.Module):
    """Projections together and apart, and experts."""

    def __init__(self):
        super().__init__()
        self.whole = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts, self.up = SmallExperts(), nn.Linear(8, 16)
        self.apart = nn.MultiheadAttention(16, 2, batch_first=True, kdim=12, vdim=10)
        ak.quantize_(self)

    def forward(self, x):
        x = self.up(self.experts(self.whole(x, x, x)[0]))
        return self.apart(x, x[..., :12], x[..., :10])[0]


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


def inputs():
    return torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(9))


def trained(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
    return model, optimizer


def run(seed):
    model = network(seed)
    return model, ak.optim.ASkewSGD(ak.param_groups(model), lr=0.002, momentum=0.9)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}], ids=["plain", "flattened"])
def test_checkpoints_of_torch_distributed(options, tmp_path):
    """``get_state_dict`` has the model's own keys, and the run goes on bit for bit, from memory and from files."""
    how = {"options": StateDictOptions(**options)}
    model, optimizer = trained(*run(0))
    states = dict(zip("mo", get_state_dict(model, optimizer, **how), strict=True))
    assert [*states["m"]] == [*model.state_dict()]
    dcp.save(states, checkpoint_id=tmp_path)
    taken, others = copy.deepcopy(states), []
    trained(model, optimizer)
    for seed in (1, 2):
        other = run(seed)
        if seed == 2:
            taken = dict(zip("mo", get_state_dict(*other, **how), strict=True))
            dcp.load(taken, checkpoint_id=tmp_path)
        set_state_dict(*other, model_state_dict=taken["m"], optim_state_dict=taken["o"], **how)
        others.append(trained(*other)[0])
    for other in others:
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("empty", [False, True], ids=["there", "empty"])
def test_loaders_of_accelerate(empty, tmp_path):
    accelerate, safetensors = pytest.importorskip("accelerate"), pytest.importorskip("safetensors.torch")
    model, path = network(0).eval(), str(tmp_path / "model.safetensors")
    safetensors.save_file({k: t.contiguous() for k, t in model.state_dict().items()}, path, {"format": "pt"})
    if empty:
        with accelerate.init_empty_weights():
            other = network(1).eval()
        accelerate.load_checkpoint_and_dispatch(other, path, device_map={"": "cpu"})
    else:
        other = network(1).eval()
        accelerate.load_checkpoint_in_model(other, path, device_map={"": "cpu"})
    assert torch.equal(other(inputs()), model(inputs()))
    assert other.whole.in_proj_weight is other.get_submodule("whole.in_proj_weight").weight
    other.train()(inputs()).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("hard", [False, True], ids=["latent", "hard"])
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exported_programs_compute(strict, hard):
    model, x = network().eval(), inputs()
    if hard:
        ak.hard_quantize_(model)
    names = [*dict(model.named_parameters(remove_duplicate=False))]
    with torch.no_grad():
        expected = model(x)
        program, file = torch.export.export(model, (x,), strict=strict), io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        found = [
            program.module(),
            loaded.module(),
            program.run_decompositions().module(),
            torch.export.unflatten(program),
        ]
        for other in found:
            torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-6)
    assert "whole.in_proj_weight.weight" in program.state_dict and "whole.in_proj_weight" not in program.state_dict
    assert names == [*dict(model.named_parameters(remove_duplicate=False))]


def test_traces_of_torch_jit():
    """Refused by name where the weight is a Parameter; packed layers are traced."""
    model, x = network().eval(), inputs()
    with pytest.raises(RuntimeError, match="in_proj_weight: torch.jit.*pack_"):
        torch.jit.trace(model, (x,))
    ak.pack_(model, force=True)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))


def test_compiled_whole():
    model, x = network(), inputs()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
