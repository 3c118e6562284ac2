"""What the tests of several processes run on every rank; each function is called with (rank, world, …)."""

from __future__ import annotations

import copy

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import askew_kernels as ak
from askew_kernels.quant import Uniform
from experiments.distribution import (
    ALL_WAYS,
    BATCH,
    FOUR,
    HOLD,
    OPTIMIZERS,
    STEPS,
    UNEVEN,
    Way,
    batch,
    network,
    steps,
    whole,
)

FSDP = ALL_WAYS["FSDP2, 2 ranks"]
ALONE = Way(1, lambda m: m)


class Training:
    """A model, its optimizer and its annealing, as this rank has them. ``seed``: of weights that a load replaces."""

    def __init__(self, optimizer, way=FSDP, seed=0, dtype=torch.float64, config=FOUR):
        self.way, self.model = way, network(config, way.sizes, dtype)
        if seed:
            torch.manual_seed(seed)
            for p in self.model.parameters():
                nn.init.normal_(p)
        self.model = way.place(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model, {})
        self.annealing = ak.EpsilonAnnealing(self.optimizer, hold=HOLD, total=STEPS, keep_pull=False)
        distributed_ = distributed.is_initialized() and way is not ALONE
        place, of = (distributed.get_rank(), distributed.get_world_size()) if distributed_ else (0, 1)
        self.share = slice(place * BATCH // of, (place + 1) * BATCH // of)

    def go(self, first, last):
        steps(self.model, self.optimizer, self.annealing, self.way, self.share, first, last)
        return self

    def state(self, **options):
        model, optimizer = get_state_dict(self.model, self.optimizer, options=StateDictOptions(**options))
        return {"model": model, "optimizer": optimizer, "annealing": self.annealing}

    def take(self, state, **options):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"], options=StateDictOptions(**options))  # fmt: skip

    def save(self, folder, later=False):
        if later:
            dcp.async_save(self.state(), checkpoint_id=folder).result()
        else:
            dcp.save(self.state(), checkpoint_id=folder)
        return self

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        self.take(state)
        return self

    def whole(self):
        """All that counts, whole on every rank."""
        state = self.state(full_state_dict=True)
        flat = [(f"model {key}", t) for key, t in state["model"].items()]
        for name, kept in state["optimizer"]["state"].items():
            flat += [(f"{name} {key}", t) for key, t in kept.items()]
        for group in state["optimizer"]["param_groups"]:
            flat += [(f"group {key}", value) for key, value in group.items() if key in ("sam_steps", "sam_gap", "lr")]
        return {key: whole(t) if isinstance(t, torch.Tensor) else t for key, t in flat} | self.annealing.state_dict()

    def weights(self):
        return [whole(p) for p in self.model.parameters()]


def same(a, b):
    """Names of what is not equal, bit for bit."""
    if a.keys() != b.keys():
        return sorted(a.keys() ^ b.keys())
    return [key for key in a if not (torch.equal(torch.nan_to_num(a[key]), torch.nan_to_num(b[key]))
                                     if isinstance(a[key], torch.Tensor) else a[key] == b[key])]  # fmt: skip


def leg(rank, world, optimizer, folder, first, last):
    """A run from checkpoint ``folder/first`` (where there is one) to a checkpoint at ``last``: whole states."""
    run = Training(optimizer, FSDP if world > 1 else ALONE, seed=first)
    if first:
        run.load(f"{folder}/{first}")
    before = run.whole() if first else {}  # torch makes the state of an optimizer without one by a step, which counts
    run.go(first, last).save(f"{folder}/{last}", later=last < STEPS)
    return before, run.whole(), run.weights()


def resumed(rank, world, optimizer, folder, at):
    """What differs between a run and the one that goes on from its state at step ``at``, by every way to take it."""
    run = Training(optimizer).go(0, at)
    options = {"plain": {}, "flattened": {"flatten_optimizer_state_dict": True}, "full": {"full_state_dict": True}}
    taken = {how: copy.deepcopy({**run.state(**of), "annealing": None}) for how, of in options.items()}
    run.save(f"{folder}/{optimizer} {at}")
    annealed = run.annealing.state_dict()
    run.go(at, at + 4)
    want, wrong = run.whole(), {}
    for how in (*taken, "files"):
        other = Training(optimizer, seed=1)
        if how == "files":
            other.load(f"{folder}/{optimizer} {at}")
        else:
            other.take(taken[how], **options[how])
            other.annealing.load_state_dict(annealed)
        wrong[how] = same(want, other.go(at, at + 4).whole())
    return wrong


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, config, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(10, 16), nn.Linear(16, 10)
        ak.quantize_(self.to(dtype), config, kinds=("linear", "embedding"))

    def forward(self, x):
        return self.head(self.words(x))


def embedding(rank, world, style):
    """Weights of a quantized embedding that is split, and of a whole one, after some steps."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    found = []
    for split in (True, False):
        model = Words(ak.QuantConfig(Uniform(4), "absmax"))
        if split:
            layout = {"input_layouts": Replicate(), "output_layouts": Replicate()}
            styles = {"colwise": ColwiseParallel(**layout), "rowwise": RowwiseParallel(**layout)}
            parallelize_module(
                model, distributed.device_mesh.init_device_mesh("cpu", (world,)), {"words": styles[style]}
            )
        optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.5)
        annealing = ak.EpsilonAnnealing(optimizer, hold=3, total=8)
        for step in range(8):
            x = torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            functional.cross_entropy(model(x), (x + 1) % 10).backward()
            optimizer.step()
            annealing.step()
        found.append([whole(p) for p in model.parameters()])
    return found


def packed(rank, world, config, trits, bias, sizes):
    """Packed layers that are split: what is off, in outputs, gradients of the input, and the gathered weights."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    a, b, c = sizes
    model = nn.Sequential(nn.Linear(a, b, bias), nn.ReLU(), nn.Linear(b, c, bias))
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(model, config)), trits=trits)
    want = copy.deepcopy(model)
    held = model[0].weight_codes.numel(), model[2].weight_codes.numel()
    parallelize_module(model, distributed.device_mesh.init_device_mesh("cpu", (world,)),
                       {"0": ColwiseParallel(), "2": RowwiseParallel()})  # fmt: skip
    mine = tuple(layer.weight_codes.to_local().numel() for layer in (model[0], model[2]))
    assert all(part * world == all_of for part, all_of in zip(mine, held, strict=True)), (mine, held)
    x = torch.randn(2, 5, a, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        off = [(model(x) - want(x)).abs().max().item()]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for of, at in zip((model, want), inputs, strict=True):
        of(at).square().sum().backward()
    off.append((inputs[0].grad - inputs[1].grad).abs().max().item())
    assert all(torch.equal(model[i].dequantize(), want[i].dequantize()) for i in (0, 2))
    state = {key: whole(t) for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    assert state.keys() == want.state_dict().keys()
    assert all(torch.equal(state[key], t) for key, t in want.state_dict().items())
    return off


def packed_int8(rank, world, config, trits, sizes):
    """Of packed layers with int8 activations that are split: how far outputs are from the whole layers', relative to
    the largest, and how far those are from float activations."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    a, b, c = sizes
    model = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c))
    model = ak.pack_(ak.hard_quantize_(ak.quantize_(model, config)), trits=trits)
    x = torch.randn(2, 33, a, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model(x)
        for layer in (model[0], model[2]):
            layer.set_activations("int8")
        want = copy.deepcopy(model)(x)
        parallelize_module(model, distributed.device_mesh.init_device_mesh("cpu", (world,)),
                           {"0": ColwiseParallel(), "2": RowwiseParallel()})  # fmt: skip
        top = want.abs().max()
        return ((model(x) - want).abs().max() / top).item(), ((exact - want).abs().max() / top).item()


def packed_embedding(rank, world, style, config, entries):
    """What a split packed embedding looks up, and the whole one; its share of the codes; whether its state is whole."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = ak.quantize_(nn.Sequential(nn.Embedding(entries, 32)), config, kinds=("embedding",))
    want = copy.deepcopy(ak.pack_(ak.hard_quantize_(model)))
    layout = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    chosen = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}[style](**layout)
    parallelize_module(model, distributed.device_mesh.init_device_mesh("cpu", (world,)), {"0": chosen})
    x = torch.randint(0, entries, (3, 17), generator=torch.Generator().manual_seed(2))
    x[0, :2] = torch.tensor([0, entries - 1])
    mine = model[0].weight_codes.to_local().numel()
    state = {key: whole(t) for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    kept = all(torch.equal(state[key], t) for key, t in want.state_dict().items() if isinstance(t, torch.Tensor))
    return model(x), want(x), mine / want[0].weight_codes.numel(), kept


def refused_packed(rank, world, case):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    groups = ak.QuantConfig(Uniform(4), "absmax", "per_group", 16)
    sizes, config = {"bytes": ((10, 4), FOUR), "groups": ((48, 4), groups), "embedding": (None, FOUR)}[case]
    model = nn.Sequential(nn.Embedding(8, 6) if sizes is None else nn.Linear(*sizes))
    ak.pack_(ak.hard_quantize_(ak.quantize_(model, config, kinds=("linear", "embedding"))))
    codes = model[0].weight_codes
    style = ColwiseParallel() if case == "embedding" else RowwiseParallel()
    try:
        parallelize_module(model, distributed.device_mesh.init_device_mesh("cpu", (world,)), {"0": style})
    except NotImplementedError as error:
        assert model[0].weight_codes is codes
        return str(error)


# ---- pipelines -------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({str(i): nn.Linear(16, 16) for i in range(4)})

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.relu(layer(x))
        return x


def trained_pipeline(rank, world):
    """{name: (trained in a stage that keeps its part of the model by name, in one process)} of this rank's stage."""
    from torch.distributed import pipelining

    model = network(FOUR, UNEVEN, torch.float32)
    one = copy.deepcopy(model)
    for name in ("0", "1") if rank else ("2", "3", "4"):
        del model._modules[name]
    stage = pipelining.PipelineStage(model, rank, world, torch.device("cpu"))
    schedule = pipelining.ScheduleGPipe(stage, 4, loss_fn=functional.cross_entropy)
    made = []
    for of in (model, one):
        optimizer = ak.optim.ASkewSGD(ak.param_groups(of), lr=0.1, momentum=0.9)
        made.append((optimizer, ak.EpsilonAnnealing(optimizer, hold=3, total=8, keep_pull=False)))
    for step in range(8):
        x, y = batch(step, UNEVEN, torch.float32)
        for optimizer, _ in made:
            optimizer.zero_grad()
        schedule.step(target=y) if rank else schedule.step(x)
        functional.cross_entropy(one(x), y).backward()
        for optimizer, annealing in made:
            optimizer.step()
            annealing.step()
    ak.hard_quantize_(model)
    want = ak.hard_quantize_(one).state_dict()
    return {key: (t, want[key]) for key, t in model.state_dict().items() if key.endswith(("weight", "bias", "scale"))}


def traced_pipeline(rank, world):
    """Outputs of a packed model that torch has traced and cut at a layer's name, and of the model."""
    from torch.distributed import pipelining

    model = ak.pack_(ak.hard_quantize_(ak.quantize_(Blocks()))).eval()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    cut = {"layers.2": pipelining.SplitPoint.BEGINNING}
    stage = pipelining.pipeline(model, (x[:4],), split_spec=cut).build_stage(rank, torch.device("cpu"))
    schedule = pipelining.ScheduleGPipe(stage, 2)
    with torch.no_grad():
        found = schedule.step() if rank else schedule.step(x)
        return found, model(x)


# ---- FSDP2 in another precision --------------------------------------------------------------------------------------


def mixed(rank, world, optimizer):
    """What FSDP2 does with bfloat16 forwards over float32 weights: (scales that a forward changed, the difference of
    scales from the rule's, outputs before and after hard quantization, what differs after a resume)."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    way = FSDP._replace(place=lambda model: fully_shard(model, mp_policy=policy))
    config = ak.QuantConfig(Uniform(4), "absmax")
    run = Training(optimizer, way, dtype=torch.float32, config=config)
    layers, changed = list(ak.nn.quantized_layers(run.model).values()), []
    for step in range(8):
        before = [layer.quantizer.scale.clone() for layer in layers]
        with torch.no_grad():
            run.model(batch(step, UNEVEN, torch.float32)[0])
        if step and not all(torch.equal(layer.quantizer.scale, s) for layer, s in zip(layers, before, strict=True)):
            changed.append(step)
        if step == 4:
            kept = copy.deepcopy({**run.state(), "annealing": None}), run.annealing.state_dict()
            run.model.reshard()
            rule = [ak.quant.compute_scale(whole(layer.weight), config.weight, "absmax") for layer in layers]
            run.go(step, step + 1)
            off = [(layer.quantizer.scale - s).abs().max().item() for layer, s in zip(layers, rule, strict=True)]
        else:
            run.go(step, step + 1)
    want = run.whole()
    other = Training(optimizer, way, 1, torch.float32, config)
    other.take(kept[0])
    other.annealing.load_state_dict(kept[1])
    again = same(want, other.go(4, 8).whole())
    x = batch(9, UNEVEN, torch.float32)[0]
    with torch.no_grad():
        out = run.model.eval()(x)
        ak.hard_quantize_(run.model)
        return changed, max(off), (out - run.model(x)).abs().max().item(), again


# ---- other libraries, and serving ------------------------------------------------------------------------------------


def accelerated(rank, world, folder):
    """(whether a resumed run ends with the same bits, steps made, eps at the end) of a training by Accelerate."""
    import os

    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT="29500")  # fmt: skip

    def start(seed):
        torch.manual_seed(seed)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = ak.quantize_(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)))
        optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=0.01)
        recipe = ak.Recipe(model, optimizer, 8)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(recipe)
        return accelerator, model, optimizer, recipe

    def train(accelerator, model, optimizer, recipe, first, last):
        for step in range(2 * first, 2 * last):  # two micro-batches each
            x, y = (t[rank * 32 : rank * 32 + 32] for t in batch(step, (16, 3), torch.float32))
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(x), y))
                optimizer.step()
                if accelerator.sync_gradients:
                    recipe.step()
                optimizer.zero_grad()

    run = start(0)
    train(*run, 0, 4)
    run[0].save_state(f"{folder}/half")
    train(*run, 4, 8)
    again = start(1)
    again[0].load_state(f"{folder}/half")
    train(*again, 4, 8)
    pairs = zip(run[1].parameters(), again[1].parameters(), strict=True)
    found = all(torch.equal(a, b) for a, b in pairs), again[3].last_epoch, again[3].get_last_eps()[0]
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    return found


def served(rank, world, path):
    """(outputs, memory of the mapped file, the same after rank 1 has written into a tensor, whether each rank's outputs
    have changed since)."""
    import os
    from pathlib import Path

    from experiments.ranks import memory_of

    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    with torch.no_grad():
        ak.load_packed(path, model, mmap=True)
        x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0))
        y = model(x)
        distributed.barrier()
        memory = memory_of(os.getpid(), Path(path))
        distributed.barrier()
        model[0].weight_codes[rank : rank + 1].bitwise_xor_(15) if rank else None
        distributed.barrier()
        moved = [None] * world
        distributed.all_gather_object(moved, not torch.equal(model(x), y))
        distributed.barrier()
        after = memory_of(os.getpid(), Path(path))
    return y, memory, after, tuple(moved)


# ---- what people do with split models --------------------------------------------------------------------------------

LEARNED = ak.QuantConfig(Uniform(4), "lsq")
SIZES = (16, 33, 8)


class Tied(nn.Sequential):
    """Two layers with one weight, and one more."""

    def __init__(self):
        a, b = nn.Linear(16, 16), nn.Linear(16, 16)
        b.weight = a.weight
        super().__init__(a, nn.ReLU(), b, nn.ReLU(), nn.Linear(16, 8))


def everyday(rank, world, case):
    """How far a model with learned scales that FSDP2 has split is from one process's: of all that its state says."""
    split, alone = ((_tied if case == "tied weights" else _network)(case) for _ in range(2))
    split = _shard(split)
    if case == "from the meta device":
        with torch.device("meta"):
            split = ak.quantize_(nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 8)), LEARNED)
        _shard(split).to_empty(device="cpu")
        _steps(alone, _optimizers(alone, case), case, slice(None), 0, 3)
        set_model_state_dict(split, alone.state_dict(), options=StateDictOptions(full_state_dict=True))
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for model, share in ((split, mine), (alone, slice(None))):
        _steps(model, _optimizers(model, case), case, share, 3, 6)
        if case == "moved":
            model.cpu()._apply(lambda t: t.clone())
            _steps(model, _optimizers(model, case), case, share, 6, 8)
    held, want = ({key: whole(t) for key, t in model.state_dict().items()} for model in (split, alone))
    assert held.keys() == want.keys()
    assert all(t.dtype == torch.float32 for key, t in held.items() if key.endswith("scale"))
    return max((held[key].double() - t.double()).abs().max().item() for key, t in want.items())


def _network(case):
    return network(LEARNED, (16, 1, 8) if case == "a rank without a row" else SIZES)


def _tied(case):
    torch.manual_seed(0)
    return ak.quantize_(Tied().double(), LEARNED)


def _shard(model):
    for layer in model if not isinstance(model, Tied) else ():
        fully_shard(layer) if isinstance(layer, nn.Linear) else None
    return fully_shard(model)


def _optimizers(model, case):
    groups = ak.param_groups(model)
    if case == "two optimizers":
        scales = [p for group in groups if group.get("role") == "scale" for p in group["params"]]
        groups = [group for group in groups if group.get("role") != "scale"]
        return [ak.optim.ASkewSGD(groups, lr=0.1), torch.optim.SGD(scales, lr=0.01)]
    return [ak.optim.ASkewSGD(groups, lr=0.1, momentum=0.9)]


def _steps(model, optimizers, case, share, first, last):
    for step in range(first, last):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part in range(2):
            x, y = (t[share] for t in batch(2 * step + part, SIZES, next(model.parameters()).dtype))
            if case == "gradients kept back" and hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(part == 1)
            if case == "activation checkpointing":
                for layer in model:
                    x = checkpoint(layer, x, use_reentrant=False)
            functional.cross_entropy(x if case == "activation checkpointing" else model(x), y).backward()
        if case == "clipped norms":
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for optimizer in optimizers:
            optimizer.step()


def saved_meanwhile(rank, world, folder):
    """What differs between a checkpoint that was written while training went on, and the state that it is of."""
    run = Training("ASkewAdamW", config=LEARNED).go(0, 4)
    want, state = run.whole(), run.state()
    del want["last_epoch"]
    saved = dcp.async_save(state, checkpoint_id=folder, process_group=distributed.new_group())
    run.go(4, 8)
    saved.result()
    other = Training("ASkewAdamW", seed=1, config=LEARNED).load(folder).whole()
    return [key for key in same({k: other[k] for k in want}, want) if "epoch" not in key and "annealing" not in key]


def written_by_others(rank, world):
    """How far a model under tensor parallelism is from one process's that torch's own optimizer trains, of which the
    layers learn only by what it writes; and whether its state can be taken."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    found = []
    for split in (True, False):
        model = network(ak.QuantConfig(Uniform(4), "absmax"), (16, 32, 8))
        if split:
            parallelize_module(model, distributed.device_mesh.init_device_mesh("cpu", (world,)),
                               {"0": ColwiseParallel(), "2": RowwiseParallel()})  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for step in range(4):
            x, y = batch(step, SIZES)
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            out = model(batch(9, SIZES)[0])
        state = {key: whole(t) for key, t in model.state_dict().items()}
        found.append([out, *(state[key] for key in sorted(state))])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


def too_late(rank, world, case):
    """What is said where calls come in the wrong order."""
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    weight = model[0].weight
    try:
        if case == "quantize_":
            fully_shard(model)
            weight = model[0].weight
            ak.quantize_(model)
        elif case == "pack_":
            ak.pack_(fully_shard(ak.quantize_(model)))
        else:
            config = ak.QuantConfig(Uniform(4), activation=Uniform(8), activation_scale="lsq")
            fully_shard(ak.quantize_(model, config))(torch.ones(2, 16))
    except (RuntimeError, ValueError) as error:
        assert case != "quantize_" or (model[0].weight is weight and not ak.nn.quantized_layers(model))
        return str(error)
