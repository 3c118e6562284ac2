"""Suite ``packed``: layers that compute from packed weights beside ``nn.Linear`` and other libraries' inference layers.

Weights are cold, as those of a model larger than the caches are: up to 16 tokens (64 on a GPU) a call is one pass
through a chain of equal layers that together hold 128 MiB (256 on a GPU, where the pass is a CUDA graph, so that no
launch counts), and its time is that of one layer. Beyond, as much of other memory is read before each call.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as ask_nn
from ... import quant
from ...deploy import files
from .. import peers
from ..goals import Goal, Headline, Measure, first_case, rate, ratio, ratio_to_best
from ..harness import (
    BF16_PRODUCT,
    INT8_PRODUCT,
    PRODUCT,
    Case,
    CheckFailed,
    Context,
    Entry,
    Impl,
    Traffic,
    peer,
)
from . import common
from .linear import near_check

GRIDS: dict[str, tuple[quant.QuantConfig, bool]] = {  # name -> how weights are kept, and whether as trits
    "8-bit": (quant.QuantConfig(quant.Uniform(8), scale="absmax"), False),
    "4-bit group 128": (quant.QuantConfig(quant.Uniform(4), "absmax", "per_group", 128), False),
    "4-bit": (quant.QuantConfig(quant.Uniform(4), scale="absmax"), False),
    "3-bit": (quant.QuantConfig(quant.Uniform(3), scale="absmax"), False),
    "ternary": (quant.QuantConfig(quant.Ternary(), scale="mean"), False),
    "ternary, 1.6 bits": (quant.QuantConfig(quant.Ternary(), scale="mean"), True),
    "binary": (quant.QuantConfig(quant.Binary(), scale="mean"), False),
}
GROUPS = "4-bit group 128"
# beside onnxruntime, which has the same weights
SHARED: dict[str, tuple[quant.QuantConfig, bool]] = {
    GROUPS: GRIDS[GROUPS],
    "4-bit group 32": (quant.QuantConfig(quant.Uniform(4), "absmax", "per_group", 32), False),
    "8-bit": GRIDS["8-bit"],
    "2-bit group 128": (quant.QuantConfig(quant.Uniform(2), "absmax", "per_group", 128), False),
}
GPU_GRIDS: dict[str, tuple[quant.QuantConfig, bool]] = {
    **{name: GRIDS[name] for name in (GROUPS, "4-bit", "8-bit", "3-bit", "ternary", "ternary, 1.6 bits", "binary")},
    "2-bit": (quant.QuantConfig(quant.Uniform(2), scale="absmax"), False),
    "NF4 group 64": (quant.QuantConfig(quant.NF4(), "absmax", "per_group", 64), False),
}
INT8, BF16 = ", int8 activations", ", bf16 activations"
WORDS = {"float": "", "int8": INT8}
ROUNDED = {**WORDS, "bf16": BF16}
HALF = "nn.Linear bf16"
TORCH_INT4, TORCH_INT8 = "torch _weight_int4pack_mm_for_cpu, bf16", "torch _weight_int8pack_mm, bf16"
DYNAMIC, BITSANDBYTES = "torch dynamic quantized Linear", "bitsandbytes Linear4bit"
TORCHAO_INT4, GEMLITE = "torchao int4 weight-only", "gemlite 4-bit"
SAVE, LOAD = "save_packed", "load_packed"


def ours(name: str) -> str:
    return f"PackedLinear {name}"


def theirs(name: str) -> str:
    return f"onnxruntime MatMulNBits {name}"


def check_packed(layer: Any, x: Tensor, relative: float, run: Callable[[], Any]) -> None:
    """Against float64 with the unpacked weight, as a root mean square: 3 % where the input is rounded to int8."""
    w, bias = layer.dequantize(torch.float32).double(), layer.bias.detach().double()
    expected = x[:4].double() @ w.t() + bias
    error = float((run()[:4].double() - expected).norm() / expected.norm())
    if not error <= relative:
        raise CheckFailed(f"output: {error:.3g} away from that of the unpacked weight, expected {relative}")


@functools.lru_cache(2 * len(GRIDS | SHARED | GPU_GRIDS))
def packed_weight(name: str, side: int, device: str, dtype: torch.dtype) -> ask_nn.PackedLinear:
    """Of ``common.float_layer``; packing takes longer than the measurements, so one serves every batch."""
    config, trits = (GRIDS | SHARED | GPU_GRIDS)[name]
    layer = ask_nn.AskewLinear.from_float(common.float_layer(side, side, device, dtype), config)
    return ask_nn.PackedLinear.from_quantized(layer, force=True, trits=trits).eval()


COLD = 1 << 27  # bytes of weights that no cache holds
IN_CHAIN, IN_GRAPH = 16, 64  # tokens up to which layers are chained, on a CPU and on a GPU

Layer = Callable[[Tensor], Any]


class Chain:
    """Equal layers, one after the other, each with the same input; the result is the last one's. Their code and what
    Python needs for them stays in the caches, as in a model, their weights do not."""

    def __init__(self, made: Callable[[], Layer], value: Tensor, count: int) -> None:
        self.layers, self.value = [made() for _ in range(count)], value

    @torch.no_grad()
    def __call__(self) -> Any:
        for layer in self.layers:
            y = layer(self.value)
        return y


class ColdCase:
    """What the cases of one batch share: the layer, its input, and implementations whose weights are cold. On a GPU
    bfloat16 activations, from the codes by each backend."""

    def __init__(self, context: Context, batch: int) -> None:
        side, device, cuda = context.side, str(context.device), context.is_cuda
        self.context, self.batch, self.side, self.device, self.cuda = context, batch, side, device, cuda
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.cold = (2 * COLD if cuda else COLD) >> 5 * context.quick
        self.layer, self.other = (
            common.float_layer(side, side, device, self.dtype),
            torch.zeros(self.cold // 4, device=device),
        )
        g = torch.Generator(device).manual_seed(3)
        self.x = torch.randn(batch, side, device=device, generator=g).to(self.dtype)

    def impl(
        self, name: str, made: Callable[[], Layer], read: int, value: Tensor | None = None, **options: Any
    ) -> Impl:
        """``made()`` gives a layer that shares its weight with no other."""
        chained = self.batch <= (IN_GRAPH if self.cuda else IN_CHAIN)
        count = -(-self.cold // read) if chained else 1
        options.setdefault("prepare", None if chained else self.other.sum)
        run: Callable[[], Any] = Chain(made, self.x if value is None else value, count)
        if chained and self.cuda:
            run = common.Captured(run)
        return Impl(name, run, traffic=Traffic(read=read), calls=count, **options)

    def packed(self, name: str) -> ask_nn.PackedLinear:
        return packed_weight(name, self.side, self.device, self.dtype)

    def check(self, name: str, activations: str) -> Callable[[Callable[[], Any]], None]:
        relative = 0.01 if self.cuda else {"float": 1e-4, "bf16": 0.004, "int8": 0.03}[activations]
        return functools.partial(check_packed, self.packed(name), self.x, relative)

    def own(self, name: str, activations: str) -> list[Impl]:
        packed = self.packed(name)

        def made() -> Layer:
            copied = copy.deepcopy(packed)
            copied.activations = activations
            return copied

        def build() -> Impl:
            return self.impl("", made, packed.packed_bytes, check=self.check(name, activations))

        return common.ours(self.context, ours(name) + ROUNDED[activations], build)

    def product_of(self, name: str) -> str:
        """The ceiling of the arithmetic of an implementation of this name; on a GPU the memory's alone counts."""
        if self.cuda:
            return ""
        words = {INT8_PRODUCT: ("int8 activations", "dynamic"), BF16_PRODUCT: ("bf16", "bfloat16")}
        return next((ceiling for ceiling, found in words.items() if any(w in name for w in found)), PRODUCT)

    def baseline(self) -> Impl:
        read = self.dtype.itemsize * self.side * self.side
        return self.impl("nn.Linear", lambda: copy.deepcopy(self.layer), read, kind="baseline")

    def case(self, impls: list[Impl]) -> Case:
        batch, side = self.batch, self.side
        for impl in impls:
            impl.product = self.product_of(impl.name)
        ceilings: dict[str, Any] = {}
        if not self.cuda:  # on a GPU the memory's
            ceilings = {"product": (min(max(batch, 256), 1024), side, side),
                        "products": (PRODUCT, BF16_PRODUCT, INT8_PRODUCT)}  # fmt: skip
        return Case(f"{batch} x {side} x {side}", str(self.dtype).removeprefix("torch."), "nn.Linear", impls,
                    side * side, work=2 * batch * side * side / 1e9, work_unit="GFLOP", **ceilings)  # fmt: skip


def linear_case(context: Context, batch: int) -> Case:
    shared = ColdCase(context, batch)
    layer, x, impl, n, cuda = shared.layer, shared.x, shared.impl, shared.side**2, shared.cuda
    impls = [shared.baseline()]
    if not cuda:
        half = common.float_layer(shared.side, shared.side, shared.device, torch.bfloat16)
        impls.append(impl(HALF, lambda: copy.deepcopy(half), 2 * n, x.bfloat16()))
    for name in GPU_GRIDS if cuda else GRIDS:
        for activations in ["float"] if cuda else ROUNDED:
            impls += shared.own(name, activations)

    def library(name: str, module: str, made: Callable[[Any], Layer], size: int, least: float = 0.01) -> Impl:
        def build() -> Impl:
            first = made(copy.deepcopy(layer))  # quantizing takes longer than copying
            return impl("", lambda: copy.deepcopy(first), size, check=near_check(layer, x, least=least))

        return peer(name, module, build)

    if cuda:
        impls += [library(TORCHAO_INT4, "torchao", peers.torchao_int4, n // 2),
                  library(GEMLITE, "gemlite", lambda m: peers.gemlite_linear(m, 4), n // 2),
                  library(BITSANDBYTES, "bitsandbytes", peers.bitsandbytes_linear4bit, n // 2)]  # fmt: skip
    else:
        impls += [
            *_torch_peers(layer, x, impl),
            library(DYNAMIC, "torch", peers.torch_dynamic, n, 0.0),
            library("torchao int8 weight-only", "torchao", peers.torchao_int8_weights, n, 0.0),
            library("torchao int8 dynamic", "torchao", peers.torchao_int8_dynamic, n, 0.0),
            library(BITSANDBYTES, "bitsandbytes", peers.bitsandbytes_linear4bit, n // 2),
        ]
    return shared.case(impls)


def onnxruntime_case(context: Context, batch: int) -> Case:
    """The same weights in onnxruntime's MatMulNBits: its accuracy level 0, the default, computes in float32 as
    1 does, 4 rounds each block of the input to int8."""
    shared = ColdCase(context, batch)
    impls = [shared.baseline()]
    for name in SHARED:
        packed = shared.packed(name)
        for activations, level in (("float", 0), ("int8", 4)):
            impls += shared.own(name, activations)

            def build(
                name: str = name, packed: Any = packed, activations: str = activations, level: int = level
            ) -> Impl:
                layer = peers.onnxruntime_layer(packed, shared.x, level)
                return shared.impl("", layer, packed.packed_bytes, check=shared.check(name, activations))

            impls.append(peer(theirs(name) + WORDS[activations], "onnxruntime", build))
    return shared.case(impls)


def _torch_peers(layer: nn.Linear, x: Tensor, impl: Callable[..., Impl]) -> list[Impl]:
    """What torch itself brings for the CPU, each with its own quantizer, without the bias, which it does not take."""
    w, half = layer.weight.detach(), x.bfloat16()
    n, k = w.shape

    def int4() -> Impl:
        first = peers.Int4OfTorch(layer, bias=False)
        return impl("", lambda: copy.deepcopy(first), n * k // 2, value=half, check=near_check(layer, x))

    def int8() -> Impl:
        scale = w.abs().amax(1) / 127
        q, s = (w / scale[:, None]).round().to(torch.int8), scale.bfloat16()

        def made() -> Layer:
            codes = q.clone()
            return lambda v: torch.ops.aten._weight_int8pack_mm(v, codes, s)

        return impl("", made, n * k, value=half, check=near_check(layer, x, least=0.0))

    return [peer(TORCH_INT4, "torch", int4), peer(TORCH_INT8, "torch", int8)]


def file_case(context: Context, name: str) -> Case:
    """A model of 100 million weights (4 million with ``quick``): save, load into one on the meta device, read it all.

    The work of a call is the file's size, so the rate is GB/s; ``note`` says how many times smaller than float32."""
    side, layers = (1024, 4) if context.quick else (4096, 6)
    config, trits = GRIDS[name]
    torch.manual_seed(4)
    model = ask_nn.quantize_(nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(layers)]), config)
    ask_nn.pack_(model, force=True, trits=trits)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "model.safetensors"
    files.save_packed(model, path)
    size = path.stat().st_size
    note = f"{4 * layers * side * side / size:.2f} times smaller than float32"

    def save() -> Any:
        files.save_packed(model, path)
        return folder  # kept as long as this is

    def load(verify: bool) -> Any:
        target = nn.Sequential(*[nn.Linear(side, side, bias=False, device="meta") for _ in range(layers)])
        return files.load_packed(path, target, verify=verify)

    def check(run: Callable[[], Any]) -> None:
        loaded, saved = run(), model.state_dict()
        for key, t in loaded.state_dict().items() if isinstance(loaded, nn.Module) else ():
            if not torch.equal(t, saved[key]):
                raise CheckFailed(f"{key}: is not what was saved")

    plain = path.with_suffix(".pt")
    impls = [
        Impl("torch.save, the same tensors", lambda: torch.save(model.state_dict(), plain), "baseline"),
        Impl(SAVE, save, "ours", check=check, backend="python", note=note),
        Impl(LOAD, lambda: load(True), "ours", check=check, backend="python"),
        Impl("load_packed, verify=False", lambda: load(False), "ours", check=check, backend="python"),
    ]
    shape = f"{layers} x {side} x {side}, {name}"
    return Case(shape, "uint8", impls[0].name, impls, 0, work=size / 1e9, work_unit="GB")


BATCHES = (1, 16, 256, 4096)
BESIDE = (1, 16, 256)
GPU_BATCHES = (1, 8, 64, 4, 16, 256, 2048)  # the most telling first
FILES = (GROUPS, "ternary", "binary")


def op(batch: int) -> str:
    return f"packed linear, batch {batch}"


def on_gpu(batch: int) -> str:
    return f"packed linear on a GPU, batch {batch}"


def share_of_copy(op: str, impl: str) -> Measure:
    return lambda rows: first_case(rows, op)[impl].percent_of_copy or 0.0


def beside(batch: int) -> str:
    return f"packed linear beside onnxruntime, batch {batch}"


def worst_beside(batch: int, words: str) -> Measure:
    """p50 of ours over that of onnxruntime with the same weights, where that is largest."""
    ratios = [ratio(beside(batch), ours(name) + words, theirs(name) + words) for name in SHARED]
    return lambda rows: max(measure(rows) for measure in ratios)


ENTRIES = [
    *[Entry(op(b), functools.partial(linear_case, batch=b), devices=("cpu",), quick=b <= IN_CHAIN) for b in BATCHES],
    *[Entry(beside(b), functools.partial(onnxruntime_case, batch=b), devices=("cpu",), quick=b == 1)
      for b in BESIDE],
    *[Entry(on_gpu(b), functools.partial(linear_case, batch=b), devices=("cuda",)) for b in GPU_BATCHES],
    *[Entry(f"packed file, {name}", functools.partial(file_case, name=name), devices=("cpu",), quick=name == FILES[0])
      for name in FILES],
]  # fmt: skip

RIVALS = {GROUPS: (TORCH_INT4, TORCH_INT8, BITSANDBYTES), "4-bit" + INT8: (DYNAMIC,), "8-bit": (TORCH_INT8,),
          "8-bit" + INT8: (DYNAMIC,)}  # of ours: the peers at the same bits  # fmt: skip
WANTED = ((GROUPS, 1, 7.0), ("binary", 1, 14.0), ("4-bit" + INT8, 16, 10.0), ("4-bit" + INT8, 256, 4.3))
GOALS = [
    *[Goal(f"PackedLinear {name}, batch {batch}: times faster than nn.Linear", ">=", wanted,
           ratio(op(batch), "nn.Linear", ours(name))) for name, batch, wanted in WANTED],
    *[Goal(f"PackedLinear {name}, batch {batch} ÷ the fastest of {len(rivals)} peers", "<=", 1.0,
           ratio_to_best(op(batch), ours(name), rivals)) for batch in BATCHES for name, rivals in RIVALS.items()],
    *[Goal(f"PackedLinear {name}{BF16}, batch {batch} ÷ bf16 nn.Linear", "<=", wanted,
           ratio(op(batch), ours(name) + BF16, HALF))
      for batch, wanted in ((16, 0.45), (256, 0.9)) for name in ("4-bit", "8-bit")],
    *[Goal(f"PackedLinear{words}, batch {batch} ÷ onnxruntime's MatMulNBits, worst of {len(SHARED)} grids", "<=", 1.0,
           worst_beside(batch, words)) for batch in BESIDE for words in WORDS.values()],
    *[Goal(f"{what} of 100 million weights, {name}, GB/s", ">=", 1.0, rate(f"packed file, {name}", what))
      for name in FILES for what in (SAVE, LOAD)],
    *[Goal(f"PackedLinear {GROUPS}, batch 1, {backend}: times faster than bf16 nn.Linear", ">=", 3.3,
           ratio(on_gpu(1), "nn.Linear", f"{ours(GROUPS)} ({backend})"), "cuda")
      for backend in ("cpp", "triton")],
    *[Goal(f"PackedLinear 4-bit, batch 1, {backend}: % of the device's copy bandwidth", ">=", 85,
           share_of_copy(on_gpu(1), f"{ours('4-bit')} ({backend})"), "cuda") for backend in ("cpp", "triton")],
    *[Goal(f"PackedLinear {GROUPS}, batch {batch}, {backend} ÷ the fastest of gemlite and torchao int4", "<=", 1.0,
           ratio_to_best(on_gpu(batch), f"{ours(GROUPS)} ({backend})", (GEMLITE, TORCHAO_INT4)), "cuda")
      for batch in GPU_BATCHES for backend in ("cpp", "triton")],
]  # fmt: skip

FLOAT_PEERS = ((TORCH_INT4, "torch int4pack"), (TORCH_INT8, "torch int8pack"), (BITSANDBYTES, "bitsandbytes NF4"))
HEADLINES = [
    Headline(f"packed linear, {name}", op(batch), ours(name),
             ((DYNAMIC, "torch dynamic int8"),) if INT8 in name else FLOAT_PEERS)
    for batch in BATCHES
    for name in (GROUPS, GROUPS + INT8, "8-bit" + INT8)
]  # fmt: skip
