"""Suite ``train``: whole training steps (forward, loss, backward, optimizer) of a float model, under autocast, and
quantization-aware by torchao, brevitas and this package; 4-bit weights per channel, first and last layer float.
Networks made here, and the fine-tuning of a real sentence encoder, MiniLM, whose embeddings stay float.

All implementations of a case start from the same weights, see the same batches in the same order and take equally many
steps; each row holds its loss curve, so that equal work is visible.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import annealing, optim, quant
from ... import nn as ask_nn
from .. import networks, peers
from ..goals import Goal, Headline, ratio
from ..harness import Case, CheckFailed, Context, Entry, Impl, peer
from . import common
from .common import BITS, GRID

Batch = tuple[Tensor, Tensor]


# ---- data: made here or part of every Python -------------------------------------------------------------------------


def template_batches(shape: tuple[int, ...], size: int, device: torch.device) -> Callable[[int], Batch]:
    """Ten random templates of this shape with noise of three times their size: batch k is the same for everyone."""
    templates = torch.randn(10, *shape, generator=torch.Generator().manual_seed(5))

    def batch(k: int) -> Batch:
        g = torch.Generator().manual_seed(1000 + k)
        labels = torch.randint(0, 10, (size,), generator=g)
        x = templates[labels] + 3 * torch.randn(size, *shape, generator=g)
        return x.to(device), labels.to(device)

    return batch


@functools.cache
def library_text(most: int = 4_000_000) -> Tensor:
    """The source of Python's standard library, in the order of file names, as ASCII codes (others become "?")."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    codes = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)[:most]), dtype=torch.uint8).long()
    return torch.where(codes < 128, codes, ord("?"))


def windows(text: Tensor, starts: Tensor, length: int) -> Batch:
    """So many characters from each start, and the same one character later."""
    found = text[starts[:, None] + torch.arange(length + 1)]
    return found[:, :-1], found[:, 1:]


def text_batches(size: int, length: int, device: torch.device) -> Callable[[int], Batch]:
    text = library_text()

    def batch(k: int) -> Batch:
        starts = torch.randint(0, len(text) - length - 1, (size,), generator=torch.Generator().manual_seed(1000 + k))
        x, y = windows(text, starts, length)
        return x.to(device), y.to(device)

    return batch


# ---- networks --------------------------------------------------------------------------------------------------------


def mlp(width: int) -> nn.Module:
    hidden = [layer for k in (784, width, width) for layer in (nn.Linear(k, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def convolved(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        first, second = convolved(inputs, outputs, 3, stride), convolved(outputs, outputs, 3, 1)
        self.body = nn.Sequential(*first, nn.ReLU(), *second)
        self.short = nn.Sequential(*(convolved(inputs, outputs, 1, 2) if stride == 2 else []))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.short(x))


def resnet18(width: int) -> nn.Module:
    """ResNet-18 for 32 x 32 images (a first convolution of 3 x 3, no pooling after it); width 64 is the usual one."""
    widths = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    blocks = [Residual(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*convolved(3, width, 3, 1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8 * width, 10))  # fmt: skip


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Characters in, logits of the next one out."""

    def __init__(self, d: int, layers: int, length: int, heads: int = 4, characters: int = 128) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, d), nn.Parameter(0.02 * torch.randn(length, d))
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.characters(x) + self.places[: x.shape[1]])))


# ---- one training step, five ways ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """model: a function that makes the network; ``ends``: names of the layers that stay float."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    ends: tuple[str, ...]
    lr: float
    adamw: bool
    turns: int  # timed steps

    @property
    def steps(self) -> int:
        """All that a row takes: two checked ones, up to two whose memory is measured, and the timed ones."""
        return self.turns + 4


def _replaced(model: nn.Module, kinds: Any, ends: tuple[str, ...], made: Callable[[Any], nn.Module]) -> nn.Module:
    for name in [name for name, m in model.named_modules() if isinstance(m, kinds) and name not in ends]:
        model.set_submodule(name, made(model.get_submodule(name)))
    return model


def quantized_groups(model: nn.Module, ends: tuple[str, ...], **how: Any) -> list[dict[str, Any]]:
    """Parameter groups of ``model`` after its inner layers have become 4-bit ones with SAWB scales, hard unless ``how``
    (QuantConfig's arguments) says otherwise."""
    config = quant.QuantConfig(**{"weight": GRID, "scale": "sawb", "forward": "hard", **how})
    ask_nn.quantize_(model, config, lambda module, name: name not in ends)
    return ask_nn.param_groups(model)


class Training:
    """``step()`` is one training step; ``losses`` are those of all steps so far."""

    def __init__(
        self, task: Task, context: Context, model: nn.Module, optimizer: torch.optim.Optimizer,
        schedules: list[Any] | None = None, autocast: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    ) -> None:  # fmt: skip
        self.task, self.model, self.optimizer, self.schedules = task, model, optimizer, schedules or []
        self.device, self.autocast, self.loss = context.device, autocast, loss
        self.losses: list[Tensor] = []
        self.ready: Batch | None = None

    def prepare(self) -> None:
        """Makes the next batch, so that this is not part of the step's time."""
        self.ready = self.task.batch(len(self.losses))

    def step(self) -> None:
        x, y = self.ready or self.task.batch(len(self.losses))
        self.ready = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(x)
            loss = self.loss(logits.float().flatten(0, -2), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for schedule in self.schedules:
            schedule.step()
        self.losses.append(loss.detach())


def check_losses(training: Training, expected: float, run: Callable[[], Any]) -> None:
    """Two calls: the losses are numbers, and the first is the float model's to a fifth (quantized weights differ)."""
    run()
    run()
    first, second = (float(v) for v in training.losses[:2])
    if not abs(first - expected) <= 0.2 * expected or not math.isfinite(second):
        raise CheckFailed(f"losses {first:.4g}, {second:.4g}; the float model begins with {expected:.4g}")


def starting_point(context: Context, task: Task) -> tuple[Callable[[], nn.Module], float]:
    """(makes a model with the weights that all begin with, the float model's first loss)."""
    torch.manual_seed(6)
    initial = task.model().to(context.device).state_dict()

    def fresh() -> nn.Module:
        model = task.model().to(context.device)
        model.load_state_dict(initial)
        return model

    with torch.no_grad():
        x, y = task.batch(0)
        return fresh, float(functional.cross_entropy(fresh()(x).flatten(0, -2), y.flatten()))


def training_case(context: Context, name: str, task: Task, work: int, unit: str, no_torchao: str = "") -> Case:
    fresh, expected = starting_point(context, task)

    def impl(training: Training, name: str = "", kind: str = "peer", note: str = "") -> Impl:
        check = functools.partial(check_losses, training, expected)
        return Impl(name, training.step, kind, None, check, training.prepare, note=note, losses=training.losses)

    def plain(model: nn.Module, **how: Any) -> Training:
        base: Any = torch.optim.AdamW if task.adamw else functools.partial(torch.optim.SGD, momentum=0.9)
        return Training(task, context, model, base(model.parameters(), lr=task.lr, fused=True), **how)

    def with_layers(made: Callable[[Any], nn.Module]) -> Impl:
        model = _replaced(fresh(), (nn.Linear, nn.Conv2d), task.ends, made)
        return impl(plain(model), note="absmax scale")

    def liger() -> Impl:
        model = _replaced(fresh(), nn.LayerNorm, (), peers.liger_layer_norm)
        return impl(plain(model, loss=peers.liger_cross_entropy()), note="no QAT")

    def own(autocast: bool, on_the_way: bool = False, **how: Any) -> Impl:
        model = fresh()
        groups = quantized_groups(model, task.ends, **how)
        base: Any = optim.ASkewAdamW if task.adamw else functools.partial(optim.ASkewSGD, momentum=0.9)
        optimizer = base(groups, lr=task.lr)
        # the beginning of a long training: annealed steps, while the gap is still too small to show in the loss
        total = 20 * task.steps
        phase: dict[str, Any] = {"hold": task.steps // 10}
        if on_the_way:
            phase = {"hold": total - 1, "start": 0, "full": total - 1}
        schedule = annealing.EpsilonAnnealing(optimizer, total=total, **phase)
        return impl(Training(task, context, model, optimizer, [schedule], autocast), note="SAWB scale")

    impls = [
        impl(plain(fresh()), "float", "baseline"),
        impl(plain(fresh(), autocast=True), AUTOCAST),
        peer("torchao QAT", "torchao", lambda: with_layers(lambda m: peers.torchao_linear(m, BITS)), no_torchao),
        peer("brevitas QAT", "brevitas", lambda: with_layers(lambda m: peers.brevitas_layer(m, BITS))),
    ]
    if context.is_cuda and any(isinstance(m, nn.LayerNorm) for m in fresh().modules()):
        impls.append(peer(LIGER, "liger_kernel", liger))
    for autocast in (False, True)[: 1 + context.is_cuda]:
        impls += common.ours(context, OURS_AUTOCAST if autocast else OURS, functools.partial(own, autocast))
    impls += common.ours(context, OURS + ON_THE_WAY, functools.partial(own, False, True))
    if not any(isinstance(m, nn.Conv2d) for m in fresh().modules()) and not context.is_cuda:
        for text, how in LEVELS.items():
            impls += common.ours(context, OURS + text, functools.partial(own, False, **how))
    return Case(name, "float32", "float", impls, 0, work=work, work_unit=unit, turns=task.turns)


OURS, OURS_AUTOCAST, AUTOCAST = "ASkew hard", "ASkew hard, autocast bf16", "autocast bf16"
ON_THE_WAY = ", on the way from float"  # a recipe's first part, where layers compute with ops.soft_quantize
INT8, INT8_BOTH = ", int8 forward", ", int8 forward and input gradient"
LEVELS: dict[str, dict[str, Any]] = {INT8: {"forward": "int8"}, INT8_BOTH: {"forward": "int8", "gradient": "int8"}}
LIGER = "float, Liger's layer norm and cross entropy"


def _turns(context: Context, full: int) -> int:
    return 4 if context.quick else full


def mlp_task(context: Context, width: int, size: int, turns: int) -> Task:
    batch = template_batches((784,), size, context.device)
    return Task(lambda: mlp(width), batch, ("0", "6"), 0.02, False, _turns(context, turns))


def mlp_case(context: Context) -> Case:
    width, size = (256, 64) if context.quick else (1024, 256)
    task = mlp_task(context, width, size, 100)
    return training_case(context, f"MLP 784-{width}-{width}-{width}-10, batch {size}", task, size, "images")


def resnet_case(context: Context) -> Case:
    width, size = (8, 8) if context.quick else (64, 32)
    batch = template_batches((3, 32, 32), size, context.device)
    last = len(resnet18(8)) - 1  # type: ignore[arg-type]
    task = Task(lambda: resnet18(width), batch, ("0", str(last)), 0.02, False, _turns(context, 24))
    name = f"ResNet-18{'' if width == 64 else f' of width {width}'} on 32x32, batch {size}"
    return training_case(context, name, task, size, "images", "left out: torchao's QAT has no convolution")


def gpt_task(context: Context) -> tuple[str, Task]:
    d, layers, length, size = (64, 2, 64, 4) if context.quick else (256, 4, 128, 16)
    batch = text_batches(size, length, context.device)
    task = Task(lambda: GPT(d, layers, length), batch, ("head",), 1e-3, True, _turns(context, 48))
    return f"GPT of {layers} layers, width {d}, {size} x {length} characters", task


def gpt_case(context: Context) -> Case:
    name, task = gpt_task(context)
    return training_case(context, name, task, task.batch(0)[0].numel(), "tokens")


# ---- fine-tuning a real model ----------------------------------------------------------------------------------------

MINILM_STEP = "fine-tuning step, MiniLM"
ANNEALED, GROUPS = ", annealed", ", groups of 32"
MINILM_WIDTH, MINILM_WORDS = 384, 30522
_PER_GROUP = {"granularity": "per_group", "group_size": 32}
MINILM_ROWS: dict[str, dict[str, Any]] = {
    OURS: {}, OURS + GROUPS: _PER_GROUP, **{OURS + text: how for text, how in LEVELS.items()}, OURS_AUTOCAST: {},
}  # fmt: skip


def sentence_batches(size: int, length: int, device: torch.device) -> Callable[[int], Batch]:
    """Random words, and a random direction for each line to be drawn to."""

    def batch(k: int) -> Batch:
        g = torch.Generator().manual_seed(1000 + k)
        ids = torch.randint(1000, MINILM_WORDS, (size, length), generator=g)
        return ids.to(device), torch.randn(size, MINILM_WIDTH, generator=g).to(device)

    return batch


def away(vectors: Tensor, directions: Tensor) -> Tensor:
    """1 - cos, on average; ``directions`` flat."""
    return 1 - functional.cosine_similarity(vectors, directions.view_as(vectors)).mean()


def minilm(context: Context, parts: int = 1) -> tuple[str, Task, Callable[[], nn.Module]]:
    """(its name, the task, what makes a model with the weights that all begin with); a batch of so many parts."""
    layers, size, length = (1, 2 * parts, 16) if context.quick else (6, 16 * parts, 64)
    made = networks.SentenceEncoder(layers).to(context.device)
    ends = tuple(name for name, m in made.named_modules() if not name.startswith("bert.encoder."))
    task = Task(lambda: made, sentence_batches(size, length, context.device), ends, 2e-5, True, _turns(context, 24))
    return f"MiniLM, encoder at {BITS} bits, {size} x {length} tokens", task, lambda: copy.deepcopy(made)


def own_fine_tuning(task: Task, context: Context, model: nn.Module, eps: float, autocast: bool = False,
                    training: type[Training] = Training, **how: Any) -> Training:  # fmt: skip
    """In hold (eps = 1) or annealed, with a frozen scale."""
    groups = quantized_groups(model, task.ends, **how)
    optimizer = optim.ASkewAdamW(groups, lr=task.lr, constraint_eps=eps)
    return training(task, context, model, optimizer, autocast=autocast, loss=away)


def minilm_case(context: Context) -> Case:
    """The float step with torch's fused AdamW, beside ours in hold and annealed."""
    names = [f"{name}{phase}" for name in MINILM_ROWS for phase in ("", ANNEALED)]
    if missing := peers.why_no_minilm():
        impls = [Impl(name, missing=missing) for name in ("float", AUTOCAST, "torchao QAT", *names)]
        return Case("MiniLM", "float32", "float", impls, 0)
    name, task, fresh = minilm(context)
    ids, directions = task.batch(0)
    with torch.no_grad():
        expected = float(away(fresh()(ids), directions))

    def impl(training: Training, name: str = "", kind: str = "peer", note: str = "") -> Impl:
        check = functools.partial(check_losses, training, expected)
        return Impl(name, training.step, kind, None, check, training.prepare, note=note, losses=training.losses)

    def plain(model: nn.Module, autocast: bool = False) -> Training:
        optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, fused=True)
        return Training(task, context, model, optimizer, autocast=autocast, loss=away)

    def torchao() -> Impl:
        model = _replaced(fresh(), nn.Linear, task.ends, lambda m: peers.torchao_linear(m, BITS))
        return impl(plain(model), note="absmax scale")

    def own(row: str, eps: float) -> Impl:
        how = MINILM_ROWS[row]
        return impl(own_fine_tuning(task, context, fresh(), eps, row == OURS_AUTOCAST, **how), note="SAWB scale")

    impls = [impl(plain(fresh()), "float", "baseline"), impl(plain(fresh(), True), AUTOCAST),
             peer("torchao QAT", "torchao", torchao)]  # fmt: skip
    for row in MINILM_ROWS:
        for phase, eps in (("", 1.0), (ANNEALED, WIDE["annealed"])):
            impls += common.ours(context, row + phase, functools.partial(own, row, eps))
    return Case(name, "float32", "float", impls, 0, work=ids.numel(), work_unit="tokens", turns=task.turns)


# ---- a wide network under autocast, as a CUDA graph ------------------------------------------------------------------

EAGER_STEP, GRAPH_STEP = "", ", CUDA graph"
WIDE = {"hold": 1.0, "annealed": 0.3}  # constraint_eps
STEP_CLIP = ", clip in the step"


def wide_name(phase: str, how: str = GRAPH_STEP, clip: str = "") -> str:
    return f"ASkew {phase}{clip}{how}"


def wide_case(context: Context, d: int, layers: int) -> Case:
    """Steps under bfloat16 autocast, each on the same batch: the float network with torch's fused SGD, and ours with
    copies for the forward that the step writes; eager, and as CUDA graphs, which leave launches out on both sides."""
    size, length = (2, 32) if context.quick else (8, 512)
    if context.quick:
        d, layers = 64, 2
    task = Task(lambda: GPT(d, layers, length, heads=max(1, d // 64)), text_batches(size, length, context.device),
                ("head",), 1e-3, False, 0)  # fmt: skip
    fresh, expected = starting_point(context, task)
    batch = task.batch(0)

    def impl(model: nn.Module, optimizer: torch.optim.Optimizer, how: str, kind: str = "peer") -> Impl:
        training = Training(task, context, model, optimizer, autocast=True)
        losses = training.losses

        def step() -> Tensor:
            training.ready = batch
            training.step()
            return losses.pop()

        def check(run: Callable[[], Any]) -> None:
            loss = float(run())
            if not abs(loss - expected) <= 0.2 * expected:
                raise CheckFailed(f"loss {loss:.4g}; the float model begins with {expected:.4g}")

        return Impl("", common.Captured(step) if how else step, kind, None, check)

    def plain(how: str) -> Impl:
        model = fresh()
        made = impl(model, torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9, fused=True), how, "baseline")
        made.name = f"{AUTOCAST}{how}"
        return made

    def own(eps: float, how: str, clip: bool | str) -> Impl:
        model = fresh()
        config = quant.QuantConfig(weight=GRID, scale="sawb", forward="hard", ste_clip=clip)
        ask_nn.quantize_(model, config, lambda module, name: name not in task.ends)
        groups = ask_nn.param_groups(model)
        optimizer = optim.ASkewSGD(groups, lr=task.lr, momentum=0.9, constraint_eps=eps, telemetry_every=0, fused=True)
        return impl(model, optimizer, how, "ours")

    ways = (EAGER_STEP, GRAPH_STEP) if context.is_cuda else (EAGER_STEP,)
    impls = [plain(how) for how in ways]
    for phase, eps in WIDE.items():
        for how in ways:
            impls += common.ours(context, wide_name(phase, how), functools.partial(own, eps, how, True))
        impls += common.ours(context, wide_name(phase, ways[-1], STEP_CLIP),
                             functools.partial(own, eps, ways[-1], "step"))  # fmt: skip
    for made in impls:
        made.note = made.note or "one batch, again and again"
    name = f"GPT of {layers} layers, width {d}, {size} x {length} characters"
    return Case(name, "bfloat16", f"{AUTOCAST}{ways[-1]}", impls, 0, work=size * length, work_unit="tokens")


NO_LOG, LOG = "ASkew hard", "ASkew hard, telemetry_log"
RECORDED = 10  # steps of which one is recorded, as by default: what a call takes


def log_case(context: Context) -> Case:
    """Ten training steps of a small network, without a log and with one: every line that a training writes."""
    width, size = 512, 64
    task = mlp_task(context, width, size, 150)
    fresh, expected = starting_point(context, task)
    folder = tempfile.TemporaryDirectory(prefix="askew-log-")

    def impl(name: str, kind: str, log: bool) -> Impl:
        model = fresh()
        groups = quantized_groups(model, task.ends)
        path = Path(folder.name) / "run.jsonl" if log else None
        optimizer = optim.ASkewSGD(groups, lr=task.lr, momentum=0.9, telemetry_every=RECORDED, telemetry_log=path)
        training = Training(task, context, model, optimizer)
        batches = [task.batch(k) for k in range(RECORDED)]

        def run(_kept: Any = folder) -> None:  # the folder lives as long as what writes into it
            for training.ready in batches:
                training.step()

        return Impl(name, run, kind, None, functools.partial(check_losses, training, expected), note="ten steps a call")

    impls = [impl(NO_LOG, "baseline", False), impl(LOG, "ours", True)]
    name = f"MLP 784-{width}-{width}-{width}-10, batch {size}, {RECORDED} steps"
    return Case(name, "float32", NO_LOG, impls, 0, work=RECORDED * size, work_unit="images", turns=task.turns)


WITH_LOG = "training steps with a log"
CASES = {"training step, MLP": mlp_case, "training step, ResNet-18": resnet_case, "training step, GPT": gpt_case}

WIDE_STEP = "training step, wide GPT, bf16 autocast"
WIDTHS = ((2048, 2), (1024, 4))  # (width, layers): 100 and 50 million weights

ENTRIES = [
    *[Entry(op, case, warm=True) for op, case in CASES.items()],
    Entry(MINILM_STEP, minilm_case),
    Entry(WITH_LOG, log_case),
    *[Entry(WIDE_STEP, functools.partial(wide_case, d=d, layers=layers), devices=("cuda",)) for d, layers in WIDTHS],
]

GOALS = [
    *[Goal(f"hard QAT {op} ÷ float", "<=", 1.05, ratio(op, OURS)) for op in CASES],
    *[Goal(f"hard QAT {MINILM_STEP}{text}{phase} ÷ {to or 'float'}", "<=", wanted, ratio(MINILM_STEP, row + phase, to))
      for row, text, to, wanted in (
          (OURS, "", "", 1.02), (OURS + GROUPS, GROUPS, "", 1.02),
          *((OURS + text, f"{text} (VNNI)", "", 0.85) for text in LEVELS),
          (OURS_AUTOCAST, ", autocast bf16 (AVX-512 BF16)", AUTOCAST, 1.0))
      for phase in ("", ANNEALED)],
    *[Goal(f"hard QAT training step, GPT{text} (VNNI) ÷ float", "<=", 0.85, ratio("training step, GPT", OURS + text))
      for text in LEVELS],
    Goal("training steps with a telemetry log ÷ without", "<=", 1.01, ratio(WITH_LOG, LOG)),
    *[Goal(f"hard QAT training step, GPT, autocast bf16, {backend} ÷ autocast", "<=", 1.0,
           ratio("training step, GPT", f"{OURS_AUTOCAST} ({backend})", AUTOCAST), "cuda")
      for backend in ("cpp", "triton")],
    *[Goal(f"{WIDE_STEP}, {phase}, {backend} ÷ autocast, as CUDA graphs", "<=", 1.0,
           ratio(WIDE_STEP, f"{wide_name(phase)} ({backend})"), "cuda")
      for phase in WIDE for backend in ("cpp", "triton")],
]  # fmt: skip

HEADLINES = [
    Headline("QAT training step", op, OURS,
             (("torchao QAT", "torchao"), ("brevitas QAT", "brevitas"), (AUTOCAST, "bf16 autocast, no QAT")))
    for op in CASES
] + [Headline("QAT training step, int8 forward and input gradient", op, OURS + INT8_BOTH)
     for op in ("training step, GPT", MINILM_STEP)]  # fmt: skip
