"""Training over processes, stopped, taken up, packed. Run: torchrun --nproc_per_node 2 examples/fsdp.py"""

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import askew_kernels as ak

distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
templates = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return ak.quantize_(model, ak.QuantConfig(weight=ak.quant.Uniform(bits=2)))


def start():
    model, mesh = network(), distributed.init_device_mesh("cpu", (world,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)  # after quantize_, before the optimizer
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=3e-3)
    return model, optimizer, ak.Recipe(model, optimizer, steps=200)


def state(model, optimizer, recipe):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "recipe": recipe.state_dict()}


def train(model, optimizer, recipe, steps):
    for step in steps:
        torch.manual_seed(step * world + rank)  # data of its own
        y = torch.randint(0, 10, (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(templates[y] + 2 * torch.randn(128, 64)), y).backward()
        optimizer.step()
        recipe.step()


run = start()
train(*run, range(100))
dcp.save(state(*run), checkpoint_id="half")
run = start()  # in a new job, with any number of processes
dcp.load(found := state(*run), checkpoint_id="half")
set_state_dict(*run[:2], model_state_dict=found["model"], optim_state_dict=found["optimizer"])
run[2].load_state_dict(found["recipe"])
train(*run, range(100, 200))
weights, _ = get_state_dict(run[0], [], options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    (whole := network()).load_state_dict(weights)
    ak.save_packed(ak.pack_(ak.hard_quantize_(whole)), "packed.safetensors")
    y = torch.randint(0, 10, (4000,))
    hits = whole(templates[y] + 2 * torch.randn(4000, 64)).argmax(1) == y
    print(f"{world} processes, 2 bits {hits.float().mean().item():.1%}")
distributed.destroy_process_group()
