"""Which layer does what: each cell of the table in docs/layers.md is tried.

A cell is one of ``CELLS``, run on a small model around one layer of a kind: it checks what it claims, and gives "yes",
or another word for how; what is refused is "no", with the reason that the user is told.

    python -m experiments.layers --fill docs/layers.md
"""

from __future__ import annotations

import argparse
import copy
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import askew_kernels as ak
from askew_kernels.deploy import lora
from askew_kernels.deploy.export import compare, contents_at, export_packed
from askew_kernels.nn import KINDS, kinds
from askew_kernels.nn.packed import PackedLayer
from askew_kernels.quant import LUQ, Ternary, Uniform
from askew_kernels.search import trace

SIZE, BATCH = 32, 2


class Words(nn.Module):
    """An embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Embedding(SIZE, SIZE), nn.LayerNorm(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


class Attention(nn.Module):
    """Self-attention, as in an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(SIZE, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class TableExperts(nn.Module):
    """Two experts; known as such by its name."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.down_proj = nn.Parameter(torch.randn(2, SIZE, SIZE) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ (w if self.is_transposed else w.t()) for w in self.down_proj]).sum(0)


class Mixture(nn.Module):
    """Both experts for every token."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts = TableExperts(is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


class Around(nn.Module):
    """A model with one layer, which has a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(1))


def _transposed_linear() -> nn.Module:
    layer: Any = (kinds.conv1d() or kinds.TransposedLinear)(SIZE, SIZE)
    nn.init.uniform_(layer.weight, -0.3, 0.3)
    return Around(layer)


def _convolution(name: str, stride: int) -> Callable[[], nn.Module]:
    return lambda: Around(getattr(nn, name)(SIZE, SIZE, 2, stride))


_SPATIAL = {"1d": (3,), "2d": (3, 4), "3d": (2, 3, 4)}
# {kind: (a model with one layer of it, its input)}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: Around(nn.Linear(SIZE, SIZE)), _numbers(3, SIZE)),
    "transposed_linear": (_transposed_linear, _numbers(3, SIZE)),
    **{f"conv{n}": (_convolution(f"Conv{n}", 1), _numbers(SIZE, *sizes)) for n, sizes in _SPATIAL.items()},
    **{f"conv_transpose{n}": (_convolution(f"ConvTranspose{n}", 2), _numbers(SIZE, *sizes))
       for n, sizes in _SPATIAL.items()},
    "embedding": (Words, lambda: torch.randint(0, SIZE, (BATCH, 3), generator=torch.Generator().manual_seed(1))),
    "in_projection": (Attention, _numbers(3, SIZE)),
    "experts": (lambda: Mixture(False), _numbers(3, SIZE)),
    "transposed_experts": (lambda: Mixture(True), _numbers(3, SIZE)),
}  # fmt: skip
# {kind: its head in the table}
HEADS = {"linear": "nn.Linear", "transposed_linear": "Conv1D of transformers", "embedding": "nn.Embedding",
         **{f"conv{n}": f"nn.Conv{n}" for n in _SPATIAL},
         **{f"conv_transpose{n}": f"nn.ConvTranspose{n}" for n in _SPATIAL},
         "in_projection": "nn.MultiheadAttention", "experts": "experts",
         "transposed_experts": "experts, transposed"}  # fmt: skip


class Refused(Exception):
    """What the table calls "no", and why."""


class Tried:
    """A kind, and what the cells ask of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.x = CASES[kind][1]()

    def model(self, config: ak.QuantConfig | None = None, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = CASES[self.kind][0]()
        if config is None:
            return model
        group = KINDS[self.kind].group
        ak.quantize_(model, config, kinds=(group,))
        if not any(layer.kind.name == self.kind for layer in ak.nn.quantized_layers(model).values()):
            raise AssertionError(f"quantize_ took in no {self.kind}")
        return model

    def packed(self, config: ak.QuantConfig | None = None, **options: Any) -> nn.Module:
        model = self.model(config or ak.QuantConfig(Uniform(4), "absmax")).eval()
        return ak.pack_(ak.hard_quantize_(model), **options)

    def call(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(self.x)


def _check(right: Any, what: str) -> None:
    if not right:
        raise AssertionError(what)


def _close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- the cells -------------------------------------------------------------------------------------------------------


def _trains(config: ak.QuantConfig, rule: Any = ak.optim.ASkewSGD) -> Callable[[Tried], str]:
    """Weights move, the constraint closes, and the hard-quantized model computes what the trained one did."""

    def cell(tried: Tried) -> str:
        model = tried.model(config)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = rule(ak.param_groups(model), lr=0.01)
        annealing = ak.EpsilonAnnealing(optimizer, hold=1, total=3)
        for _ in range(3):
            optimizer.zero_grad()
            model(tried.x).square().mean().backward()
            optimizer.step()
            annealing.step()
        _check(any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)), "nothing moved")
        want = tried.call(model.eval())
        _check(torch.equal(tried.call(ak.hard_quantize_(model)), want), "hard_quantize_ changes the outputs")
        return "yes"

    return cell


def _recipe(tried: Tried) -> str:
    """To its end, where the packed model computes what was trained."""
    model = tried.model(FOUR)
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=0.01)
    recipe = ak.Recipe(model, optimizer, 4)
    for _ in range(4):
        optimizer.zero_grad()
        model(tried.x).square().mean().backward()
        optimizer.step()
        recipe.step()
    want = tried.call(model.eval())
    _check(torch.equal(tried.call(ak.hard_quantize_(model)), want), "hard_quantize_ changes the outputs")
    _close(tried.call(ak.pack_(model)), want)
    return "yes"


def _learned(tried: Tried) -> str:
    """Scales move by their gradient, and are the packed ones, bit for bit."""
    model = tried.model(ak.QuantConfig(Uniform(4), "lsq"))
    [layer] = [m for m in ak.nn.quantized_layers(model).values() if m.kind.name == tried.kind]
    tried.call(model)
    before = layer.weight_scale.detach().clone()
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(tried.x).square().mean().backward()
        optimizer.step()
    _check(not torch.equal(layer.weight_scale.detach(), before), "scales that are not learned")
    ak.hard_quantize_(model.eval())
    scale, want = layer.weight_scale.detach().clone(), tried.call(model)
    [packed] = [m for m in ak.nn.packed_layers(ak.pack_(model)).values() if m.kind.name == tried.kind]
    _check(torch.equal(packed.weight_scale, scale), "other scales")
    _close(tried.call(model), want)
    return "yes"


def _rounded_gradient(tried: Tried) -> str:
    """The same outputs; gradients that differ by their rounding."""
    found: list[tuple[Tensor, list[Any]]] = []
    for config in (FOUR, ak.QuantConfig(Uniform(4), gradient=LUQ(4))):
        model = tried.model(config)
        y = model(tried.x)
        y.square().mean().backward()
        found.append((y.detach(), [p.grad for p in model.parameters()]))
    (y, plain), (same, rounded) = found
    _check(torch.equal(y, same), "other outputs")
    _check(all(g is not None and bool(g.isfinite().all()) for g in rounded), "gradients")
    _check(not all(map(torch.equal, plain, rounded)), "gradients that are not rounded")
    return "yes"


def _autocast(tried: Tried) -> str:
    model = tried.model(ak.QuantConfig(Uniform(4))).train()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tried.x)
    low.float().square().mean().backward()
    _check(all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()), "gradients")
    _close(low.float(), model(tried.x), 0.05)
    return "yes"


def _compiled(tried: Tried) -> str:
    model = tried.model(ak.QuantConfig(Uniform(4)))
    call = torch.compile(model, backend="aot_eager")
    got, want = (f(tried.x).square().mean() for f in (call, model))
    _close(got, want)
    ours, theirs = (torch.autograd.grad(loss, [*model.parameters()]) for loss in (got, want))
    for g, h in zip(ours, theirs, strict=True):
        _close(g, h)
    return "yes"


def _copies(tried: Tried) -> str:
    """What a copy, a pickle and another model with the state_dict compute is the same, bit for bit, also packed."""
    for make in (lambda seed: tried.model(FOUR, seed).eval(), lambda seed: tried.packed(FOUR)):
        model = make(0)
        other = make(1)
        other.load_state_dict(model.state_dict())
        for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            _check(torch.equal(tried.call(same), tried.call(model)), "other outputs")
    return "yes"


def _packs(tried: Tried) -> str:
    model = ak.hard_quantize_(tried.model(ak.QuantConfig(Uniform(4), "absmax")).eval())
    weights = {name: m.weight.detach().clone() for name, m in ak.nn.quantized_layers(model).items()}
    want = tried.call(model)
    ak.pack_(model)
    layers = ak.nn.packed_layers(model)
    _check(all(torch.equal(layers[name].dequantize(), w) for name, w in weights.items()), "pack_ changes weights")
    _close(tried.call(model), want)
    _close(tried.call(ak.unpack_(model)), want)
    return "yes"


def _noted(method: Any, calls: list[str]) -> Any:
    def call(layer: PackedLayer, *args: Any, **kwargs: Any) -> Any:
        calls.append(layer.kind.name)
        return method(layer, *args, **kwargs)

    return call


def _product(tried: Tried) -> str:
    """Whether a product of few rows unpacks the whole weight."""
    model = tried.packed()
    whole: list[str] = []
    kept = {name: getattr(PackedLayer, name) for name in ("dequantize", "matrix", "entries")}
    try:
        for name, method in kept.items():
            setattr(PackedLayer, name, _noted(method, whole))
        tried.call(model)
    finally:
        for name, method in kept.items():
            setattr(PackedLayer, name, method)
    return "decoded" if whole else "codes"


def _int8_product(tried: Tried) -> str:
    float_, rounded = (tried.call(tried.packed(activations=a)) for a in ("float", "int8"))
    if torch.equal(float_, rounded):
        raise Refused("the weight is decoded, or looked up: inputs stay as they are")
    _close(rounded, float_, 0.05)
    return "yes"


def _files(tried: Tried) -> str:
    model, path = tried.packed(), tried.folder / "packed.safetensors"
    ak.save_packed(model, path)
    loaded = ak.load_packed(path, tried.model(seed=1).eval())
    _check(torch.equal(tried.call(loaded), tried.call(model)), "other outputs after a load")
    return "yes"


def _in_format(to: str, config: ak.QuantConfig | str) -> Callable[[Tried], str]:
    """What the format's own library reads is the weight, bit for bit."""

    def cell(tried: Tried) -> str:
        made = ak.QuantConfig.for_export(config) if isinstance(config, str) else config
        contents = export_packed(tried.packed(made), tried.folder / to, to)
        rows, _ = compare(contents, tried.folder / to, to)
        for row in rows:
            if row.difference is None:  # experts, which stand there one by one
                parts = [layer.dequantize() for _, layer in sorted(contents_at(tried.folder / to).layers.items())]
                _check(torch.equal(torch.stack(parts), contents.layers[row.name].dequantize()), f"{row}")
            else:
                _check(row.difference == 0.0, f"{row}")
        return "yes"

    return cell


def _onnx(tried: Tried) -> str:
    import onnxruntime

    from askew_kernels.deploy.to_onnx import export_onnx

    model, path = tried.packed(), tried.folder / "model.onnx"
    export_onnx(model, tried.x, path, input_names=["x"])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    _close(torch.tensor(session.run(None, {"x": tried.x.numpy()})[0]), tried.call(model), 1e-4)
    return "yes"


def _exported(tried: Tried) -> str:
    model = tried.packed()
    program = torch.export.export(model, (tried.x,)).module()
    _close(tried.call(program), tried.call(model))
    return "yes"


def _lora(tried: Tried) -> str:
    """Adapters are trained over the layer, quantized and packed, and merged onto its grid."""
    import peft

    held = isinstance(tried.model(), Mixture)
    where: Any = {"target_parameters": ["experts.down_proj"]} if held else {"target_modules": ["layer"]}
    for base in (tried.model(FOUR).eval(), tried.packed()):
        try:
            model = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **where))
        except ValueError as error:
            raise Refused("peft has no adapters for such layers") if "not supported" in str(error) else error from None
        model(tried.x).square().mean().backward()
        adapters = [p for n, p in model.named_parameters() if "lora_" in n]
        _check(len(adapters) == 2 and all(p.grad is not None and p.grad.any() for p in adapters), "gradients")
        want = tried.call(model)
        merged, errors = lora.merge_and_unload(model)
        layers = ak.nn.packed_layers(merged) or ak.nn.quantized_layers(merged)
        _check(len(layers) == len(errors) == 1, "a layer that is merged is on the grid")
        _close(tried.call(merged), want, 0.5)
    return "yes"


def _few_bits(config: ak.QuantConfig) -> Callable[[Tried], str]:
    def cell(tried: Tried) -> str:
        if not KINDS[tried.kind].token_dims and not KINDS[tried.kind].held:
            raise Refused("inputs are indices")
        model, plain = tried.model(config), tried.model(ak.QuantConfig(Uniform(4)))
        got, want = model(tried.x), plain(tried.x)
        _check(not torch.equal(got, want), "the inputs are not quantized")
        _close(got, want, 0.2)
        got.square().mean().backward()
        _check(all(p.grad is not None for p in model.parameters()), "a parameter without a gradient")
        return "yes"

    return cell


def _searched(tried: Tried) -> str:
    profile = trace(tried.model().eval(), tried.x, kinds=(KINDS[tried.kind].group,))
    macs = sum(layer.macs for layer in profile.layers.values())
    _check(tried.kind in [layer.kind for layer in profile.layers.values()], "not in the profile")
    _check(macs > 0 or tried.kind == "embedding", "no multiply–accumulates")
    return "yes"


FOUR, BF16 = ak.QuantConfig(Uniform(4)), ak.QuantConfig(Uniform(4), "absmax", scale_dtype="bfloat16")
CELLS: dict[str, Callable[[Tried], str]] = {
    'trained with `forward="hard"`': _trains(FOUR),
    'trained with `forward="relaxed"`': _trains(ak.QuantConfig(Ternary(), forward="relaxed")),
    "one scale for the tensor": _trains(ak.QuantConfig(Uniform(3), granularity="per_tensor")),
    "scales of groups": _trains(ak.QuantConfig(Uniform(4), "absmax", "per_group", 16)),
    "`ASkewAdamW`": _trains(FOUR, ak.optim.ASkewAdamW),
    "`ak.Recipe`": _recipe,
    "MXFP4": _trains(ak.QuantConfig.for_export("mxfp4")),
    "NVFP4": _trains(ak.QuantConfig.for_export("nvfp4")),
    'learned scales (`scale="lsq"`)': _learned,
    "rounded gradients (`gradient=LUQ(4)`)": _rounded_gradient,
    "copies, pickles, `state_dict`": _copies,
    "`torch.autocast`": _autocast,
    "`torch.compile`": _compiled,
    "inputs of 8 bits (`activation=`)": _few_bits(ak.QuantConfig(Uniform(4), activation=Uniform(8))),
    'learned scales of inputs (`activation_scale="lsq"`)': _few_bits(
        ak.QuantConfig(Uniform(4), activation=Uniform(8), activation_scale="lsq")
    ),
    '`forward="int8"`': _few_bits(ak.QuantConfig(Uniform(4), forward="int8")),
    '`forward="fp8"`': _few_bits(ak.QuantConfig(Uniform(4), forward="fp8")),
    "searched (`ak.search`)": _searched,
    "`pack_`, `unpack_`": _packs,
    "packed product of few rows": _product,
    '`pack_(activations="int8")`': _int8_product,
    "files (`save_packed`)": _files,
    "adapters of peft (LoRA)": _lora,
    "`torch.export`, packed": _exported,
    "GGUF": _in_format("gguf", "gguf:q4_0"),
    "compressed-tensors": _in_format("compressed-tensors", BF16),
    "ONNX": _onnx,
    "torchao": _in_format("torchao", BF16),
}


# ---- caches of keys and values, which are no layers ------------------------------------------------------------------

CACHES: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8}, "4 bits": {"bits": 4}, "2 bits": {"bits": 2}, "4 and 2 bits": {"bits": (4, 2)},
    "keys per channel": {"keys": "per_channel"}, "symmetric": {"symmetric": True},
}  # fmt: skip


def _keys_and_values(requires_grad: bool = False) -> list[Tensor]:
    """(batch, heads, tokens, head dimension)."""
    torch.manual_seed(0)
    return [torch.randn(2, 2, 2 * SIZE, SIZE, requires_grad=requires_grad) for _ in "kv"]


def _kv_trained(kv: Any) -> str:
    k, v = _keys_and_values(True)
    found = kv(k, v)
    sum(x.sum() for x in found).backward()  # type: ignore[union-attr]
    straight = all(x.grad is not None and torch.equal(x.grad, torch.ones_like(x)) for x in (k, v))
    _check(straight, "the gradient is not passed straight through")
    _check(not any(torch.equal(a, b) for a, b in zip(found, (k, v), strict=True)), "nothing is rounded")
    return "yes"


def _kv_cached(kv: Any) -> str:
    k, v = _keys_and_values()
    cache, half = kv.cache(), SIZE + 3
    cache.update(k[..., :half, :], v[..., :half, :])
    found = cache.update(k[..., half:, :], v[..., half:, :])
    _check(all(map(torch.equal, found, kv(k, v))), "the cache of codes gives other numbers")
    return f"yes, {8 * cache.bytes / (k.numel() + v.numel()):.2g} bits"


def _kv_compiled(kv: Any) -> str:
    torch.compiler.reset()
    k, v = _keys_and_values()
    found = torch.compile(kv, backend="aot_eager", fullgraph=True)(k, v)
    _check(all(map(torch.equal, found, kv(k, v))), "compiled it gives other numbers")
    return "yes"


def _kv_autocast(kv: Any) -> str:
    k, v = (x.bfloat16() for x in _keys_and_values())
    with torch.autocast("cpu", torch.bfloat16):
        found = kv(k, v)
    _check(all(x.dtype == torch.bfloat16 and bool(x.isfinite().all()) for x in found), "not bfloat16")
    return "yes"


CACHE_CELLS: dict[str, Callable[[Any], str]] = {
    "trained with, straight-through": _kv_trained,
    "a cache of codes gives the same, bit for bit (memory a number)": _kv_cached,
    "`torch.autocast`": _kv_autocast,
    "`torch.compile`": _kv_compiled,
}


def cache_table() -> str:
    """As Markdown."""
    lines = [f"| `nn.QuantizedKV` | {' | '.join(CACHES)} |", f"|{' --- |' * (len(CACHES) + 1)}"]
    for cell, run in CACHE_CELLS.items():
        found = [run(ak.nn.QuantizedKV(**{"bits": 4, "group": SIZE, **options})) for options in CACHES.values()]
        lines.append(f"| {cell} | {' | '.join(found)} |")
    return "\n".join(lines)


# ---- the table -------------------------------------------------------------------------------------------------------


def tried(kind: str, cell: str) -> tuple[str, str]:
    """(what stands in the table, why not). What is no error of this library's own, or of one that is missing, is
    raised."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return CELLS[cell](Tried(kind, Path(folder))), ""
        except (Refused, ValueError, TypeError, RuntimeError) as reason:
            return "no", _short(str(reason))


def _short(reason: str) -> str:
    """What is true of every layer of the kind: without the layer's name in front, and what to do about it."""
    reason = re.sub(r"^((\w|\.)+: )*(?=(\S+ )+)", "", reason.strip())
    return re.split(r"; |, got |, and this is |\n", reason)[0]


def table(found: dict[tuple[str, str], tuple[str, str]]) -> str:
    """Of {(kind, cell): what ``tried`` gave}, as Markdown: the table, and below it why not."""
    heads = list(HEADS.values())
    lines = [f"| | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 1)}"]
    reasons: dict[str, int] = {}
    for cell in CELLS:
        row = []
        for kind in HEADS:
            word, why = found[kind, cell]
            row.append(f"{word} [{reasons.setdefault(why, len(reasons) + 1)}]" if why else word)
        lines.append(f"| {cell} | {' | '.join(row)} |")
    return "\n".join([*lines, "", *(f"{n}. {why}" for why, n in reasons.items())])


def marks(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} [^\n]*-->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)


MARKS, CACHE_MARKS = marks("layers"), marks("caches")


def filled(page: str, text: str, marks: re.Pattern[str] = MARKS) -> str:
    """``page`` with ``text`` between <!-- layers … --> and <!-- /layers -->, or another block's marks."""
    if not marks.search(page):
        raise ValueError(f"holds no block {marks.pattern}")
    return marks.sub(lambda m: f"{m[1]}{text}\n{m[3]}", page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.layers", description=__doc__.partition("\n")[0])
    parser.add_argument("--fill", type=Path, metavar="PAGE", help="a page whose table is made anew (default: print it)")
    page = parser.parse_args(argv).fill
    text = table({(kind, cell): tried(kind, cell) for kind in HEADS for cell in CELLS})
    if page is None:
        print(text)
    else:
        made = filled(page.read_text(encoding="utf-8"), text)
        page.write_text(filled(made, cache_table(), CACHE_MARKS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
