"""What the tests of several processes run on every rank; each function is called with (rank, world, …)."""

from __future__ import annotations

import copy
import functools

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional

import askew_kernels as ak
from askew_kernels.quant import Uniform
from experiments.distribution import ALL_WAYS, BATCH, FOUR, HOLD, OPTIMIZERS, STEPS, UNEVEN, Way, inner, network, steps, whole

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
    before = run.whole()
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
