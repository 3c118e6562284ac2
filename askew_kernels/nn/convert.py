"""From a float model to a quantized one, from there to a packed one, and back, in place."""

from __future__ import annotations

import fnmatch
import logging
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .. import ops
from ..quant import QuantConfig
from ..quant.config import SCALE_FIELDS
from ..quant.forms import Form
from ..quant.sharding import is_sharded
from .attention import OUT_PROJECTION, AskewAttention, passed_by
from .experts import ExpertWeight
from .held import Holder, all_held_weights, conceal, expose, held_weights
from .kinds import DEFAULT, KINDS, Kind, PackedTransposedLinear, chosen, kind_of, replaceable
from .layers import INPUT, QuantizedLayer, same_weight
from .packed import PackedLayer
from .replace import MAKE_PERMANENT, base_of, computed_tensors, replace_modules, successors

__all__ = [
    "as_linear_", "dequantize_", "hard_quantize_", "left_float", "pack_", "packed_layers", "param_groups", "quantize_",
    "quantized_layers", "unpack_",
]  # fmt: skip

COMPUTING: list[type[nn.Module]] = [QuantizedLayer, AskewAttention]  # with something else than the weight they show
NAMES_TOLD = 4  # of each type, in the line that says what stays float

logger = logging.getLogger("askew_kernels")


def quantize_(model: nn.Module, config: Any = None, filter_fn: Callable[[nn.Module, str], bool] | None = None,
              kinds: str | Iterable[str] = DEFAULT) -> nn.Module:  # fmt: skip
    """Replaces the layers of these ``kinds`` in ``model``, in place, by their quantized twins; returns the model.

    config: one ``QuantConfig`` for all, or ``{pattern: config}`` where a pattern is a module's full name with ``*``
    and ``?`` and the first that matches counts (None, or no match: left alone), or a ``search.Policy``, which must fit
    the model by name or by role and speaks of any kind. filter_fn(module, fqn): whether to replace this one, e.g. to
    leave the first and the last layer alone. kinds: names out of ``nn.KINDS``, or "conv" for every convolution.
    Parameters stay the same objects under the same names; hooks, flags and attributes of a replaced layer go on. A
    layer that is quantized already is quantized anew where its configuration differs.

    Linear layers are Conv1D of transformers, too. Weights of experts in one Parameter of three dimensions get a layer
    of the Parameter's name each (``experts.EXPERTS`` says of which classes), and so do those of nn.MultiheadAttention's
    inputs; their module keeps the Parameter.

    Other weights of two and more dimensions (a router's) stay float: one line of the logger ``askew_kernels`` says so,
    and ``left_float(model)`` lists them. Raises
    TypeError/ValueError before anything is replaced: for an unknown kind, a pattern that matches no layer, and, naming
    the layer, where the weight is computed (weight_norm, a pruning mask, a parametrization); RuntimeError where it is
    split over ranks already (fully_shard and parallelize_module come later).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    patterns, by_policy, asked = isinstance(config, Mapping), hasattr(config, "configs"), chosen(kinds)
    if by_policy:
        config = config.configs(model)
        spoken_of = [replaceable(model.get_submodule(name)) for name in config]
        asked = [kind for kind in KINDS.values() if kind in spoken_of]
    elif not patterns:
        config = {"*": QuantConfig() if config is None else config}
    for pattern, value in config.items():
        if value is not None and not isinstance(value, QuantConfig):
            raise TypeError(f"config[{pattern!r}]: expected a QuantConfig or None, got {value!r}")
    matches = operator.eq if by_policy else fnmatch.fnmatchcase  # exact, whatever characters a name has
    unused, layers, configs = dict.fromkeys(config), {}, {}
    held, passed = all_held_weights(model), passed_by(model)
    for name, module in [*model.named_modules(remove_duplicate=False), *held.items()]:
        split, lazy = _is_split(module, asked), _is_lazy(module, asked)
        if not (split or lazy or _is_asked(module, asked)) or id(module) in passed:
            continue
        if not (filter_fn is None or filter_fn(module, name)):
            continue
        match = next((pattern for pattern in config if matches(name, pattern)), None)
        unused.pop(match, None)
        value = config.get(match)
        if value is not None and not (isinstance(module, QuantizedLayer) and module.config == value):
            if lazy:
                raise ValueError(f"{name}: weight: comes with the first batch of a {type(module).__name__}; call the "
                                 "model once, then quantize_")  # fmt: skip
            if split:
                raise RuntimeError(
                    f"{name}: weight: is split over ranks already, by what knows nothing of a layer in this one's "
                    "place; call quantize_ first, then fully_shard or parallelize_module"
                )
            layers[name], configs[name] = module, value
    if unused and patterns:
        raise ValueError(f"config: no {_names(asked)} matches {', '.join(map(repr, unused))}")
    _check_shared(model, layers, configs)
    made: list[QuantizedLayer] = []

    def make(name: str, module: Any) -> nn.Module:
        kind: Any = replaceable(module)
        made.append(kind.quantized.from_float(module, configs[name]))
        return made[-1]

    try:
        new = successors(layers, make, "from_float of the quantized layer")
    except (TypeError, ValueError):
        for layer in made:
            layer.quantizer.untie(layer.weight)
        raise
    expose(model, [name for name in held if name in new])
    replace_modules(model, new)
    decline_fast_paths(model)
    tell_float(model, "quantize_", asked)
    experts = [name for name, layer in held.items() if name in new and isinstance(layer, ExpertWeight)]
    if experts:  # known by the class's name of who multiplies with them
        told = ", ".join(experts[:NAMES_TOLD]) + ", …" * (len(experts) > NAMES_TOLD)
        logger.info("quantize_: weights of experts (ak.nn.experts.EXPERTS) are quantized: %s", told)
    return model


def _is_split(module: nn.Module, asked: list[Kind]) -> bool:
    """Whether it is a layer of these kinds, perhaps of FSDP2's class, whose weight is split over ranks."""
    weight = module._parameters.get("weight")
    return weight is not None and is_sharded(weight) and kind_of(module) in asked


def _is_lazy(module: nn.Module, asked: list[Kind]) -> bool:
    """Whether it becomes a layer of these kinds with its first batch."""
    weight, becomes = module._parameters.get("weight"), getattr(module, "cls_to_become", None)
    return weight is not None and is_lazy(weight) and any(becomes in kind.classes for kind in asked)


def _is_asked(module: nn.Module, asked: list[Kind]) -> bool:
    """Attention means all its projections, also the last, which is a linear layer."""
    kind = replaceable(module)
    return kind in asked or (isinstance(module, OUT_PROJECTION) and KINDS["in_projection"] in asked)


def _check_shared(model: nn.Module, layers: dict[str, nn.Module], configs: dict[str, QuantConfig]) -> None:
    """ValueError where layers share a weight that are, or are to be, quantized differently."""
    renewed = set(map(id, layers.values()))
    kept = {name: layer for name, layer in quantized_layers(model).items() if id(layer) not in renewed}
    sharing: dict[int, tuple[str, QuantConfig, Form]] = {}
    for name, layer in (kept | layers).items():
        kind: Any = kind_of(layer)
        config = configs.get(name) or layer.config
        other, theirs, form = sharing.setdefault(id(layer._parameters.get("weight", layer)), (name, config, kind.form))
        if not same_weight(theirs, config):
            raise ValueError(f"{name}: shares its weight with {other}, which is quantized otherwise: {theirs}")
        if form != kind.form:
            raise ValueError(f"{name}: shares its weight with {other}, whose outputs stand along another dimension")


def left_float(model: nn.Module) -> dict[str, str]:
    """{parameter: why} of the weights that modules of ``model`` use unquantized, also those that they share with a
    quantized layer (an embedding tied to the head); of two and more dimensions: vectors are float by design."""
    return {name: f"{kind}{why}" for name, (_, kind, why) in _float_weights(model).items()}


def _float_weights(model: nn.Module) -> dict[str, tuple[nn.Module, str, str]]:
    """{parameter: (layer, what it is, why its weight stays float)}; the layer of a held weight is not the module that
    holds it, and where no layer could help, it is the model."""
    layers, passed = quantized_layers(model), passed_by(model)
    tied = {id(p): name for name, m in layers.items() for p in m._parameters.values()}
    found: dict[str, tuple[nn.Module, str, str]] = {}
    for name, module in model.named_modules():
        held = held_weights(module)
        for key, p in module.named_parameters(recurse=False) if name not in layers else ():
            elsewhere = isinstance(module, Holder) and key in module._modules  # the layer's of that name
            if elsewhere or is_lazy(p) or p.dim() < 2:
                continue
            layer = model if id(module) in passed else held.get(key, module)
            found[f"{name}.{key}" if name else key] = (layer, *_why_float(module, layer, tied.get(id(p))))
    return found


def _why_float(module: nn.Module, layer: nn.Module, tied_to: str | None) -> tuple[str, str]:
    cls = base_of(type(module))
    name = f"{cls.__module__.partition('.')[0]}.{cls.__name__}".replace("torch.", "nn.")
    if tied_to is not None:
        name += f" tied to {tied_to}"
        return name, ", which reads the latent weight until hard_quantize_ writes the quantized one"
    if isinstance(module, OUT_PROJECTION) and layer is not module:
        return name, ", whose weight a class derived from nn.MultiheadAttention reads past its forward"
    if isinstance(module, nn.MultiheadAttention) and layer is module:
        return name, ", a class with another forward than nn.MultiheadAttention, or whose forward was replaced"
    if (kind := kind_of(layer)) is None:
        return name, ", which has no quantized form"
    if replaceable(layer) is None:
        return name, f", a subclass of {_named_class(kind)}"
    return name, ", left alone" + ("" if kind in chosen(DEFAULT) else f'; kinds= takes it in as "{kind.name}"')


def tell_float(model: nn.Module, call: str, asked: list[Kind]) -> None:
    """One line of the logger for the weights that ``call`` leaves float; of plain layers of the kinds that were asked
    for, which are left by the caller's choice, it does not tell."""
    by_type: dict[str, list[str]] = {}
    for name, (layer, kind, _) in _float_weights(model).items():
        if replaceable(layer) not in asked:
            by_type.setdefault(kind, []).append(name)
    if by_type:
        told = [f"{len(names)} of {of} ({', '.join(names[:NAMES_TOLD])}{', …' if len(names) > NAMES_TOLD else ''})"
                for of, names in by_type.items()]  # fmt: skip
        logger.warning("%s: these weights stay float: %s; ak.nn.left_float(model) says why", call, "; ".join(told))
    elif call == "quantize_" and not any(
        isinstance(m, QuantizedLayer) or replaceable(m) in asked for m in model.modules()
    ):
        logger.warning("quantize_: the model has no %s, nothing was quantized", _names(asked))


def as_linear_(model: nn.Module) -> nn.Module:
    """Replaces every ``PackedTransposedLinear``, in place, by the ``PackedLinear`` that computes the same: formats
    whose weights are (outputs, inputs) take it as any other."""
    transposed = {name: m for name, m in _named(model, PackedTransposedLinear).items()}
    replace_modules(model, successors(transposed, lambda _, layer: layer.as_linear(), "its as_linear()"))
    return model


def _names(kinds: Iterable[Kind]) -> str:
    """Classes that users know, or the kinds themselves where there are none."""
    kinds = list(kinds)
    known = [kind for kind in kinds if not kind.classes[-1].__module__.startswith(__package__)]
    return " or ".join(map(_named_class, known)) or " or ".join(kind.name for kind in kinds)


def _named_class(kind: Kind) -> str:
    *_, cls = kind.classes  # another library's, where it is here
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.") else cls.__name__


def decline_fast_paths(model: nn.Module) -> None:
    """torch's encoders, when they are evaluated, compute with the weights of their linear layers and look past these.
    Turns that off, by what they ask first, where layers of ``COMPUTING`` are inside, and on again where none is any
    more."""
    for module in model.modules():
        for kind, name, off in ((nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
                                (nn.TransformerEncoder, "use_nested_tensor", False)):  # fmt: skip
            if not isinstance(module, kind) or not hasattr(module, name):
                continue
            if any(isinstance(m, tuple(COMPUTING)) for m in module.modules()):
                vars(module).setdefault("_askew_fast_path", getattr(module, name))
                setattr(module, name, off)
            elif "_askew_fast_path" in vars(module):
                setattr(module, name, vars(module).pop("_askew_fast_path"))


def dequantize_(model: nn.Module) -> nn.Module:
    """The inverse of ``quantize_``: float layers with the same Parameter objects (the latent weights), in place."""
    layers = _named(model, QuantizedLayer)
    layers.pop("", None)
    new = successors(layers, lambda _, layer: layer.to_float())
    for layer in layers.values():
        layer.quantizer.untie(layer.weight)
    replace_modules(model, new)
    conceal(model)
    decline_fast_paths(model)
    return model


def pack_(model: nn.Module, force: bool = False, *, trits: bool = False, scale_dtype: torch.dtype | None = None,
          activations: str = "float") -> nn.Module:  # fmt: skip
    """Replaces every quantized layer of ``model``, in place, by its packed twin; returns the model.

    The packed weight is the trained one, bit for bit; one that layers share is kept once. ``trits``: ternary layers
    with five codes in a byte (1.6 bits a weight; slower to read) instead of 2 bits. ``scale_dtype``: how scales are
    kept; None: as the layer's config has it (powers of two as bfloat16). ``activations``: "int8" lets the layers round
    their inputs to int8, row by row or patch by patch, when they run on a CPU, "bf16" to bfloat16, which makes float32
    models faster where the CPU multiplies bfloat16; files keep no such choice. Layers that had forward="int8" compute
    with it what they did; those of "fp8" take other inputs when packed, which is told.

    Raises ValueError naming the layer, and leaves the model as it was, for NaN weights, grids that cannot be packed
    (inclusive ones, codebooks of more than 16 levels), and, unless ``force=True`` rounds them, weights that are not
    hard-quantized and scales that ``scale_dtype`` does not hold. Biases stay the same Parameter objects.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = _named(model, QuantizedLayer)
    of_weight: dict[int, PackedLayer] = {}

    def make(name: str, layer: Any) -> nn.Module:
        ternary = trits and layer.config.weight.to_dict()["grid"] == "ternary"
        twin = layer.kind.packed.from_quantized(layer, force=force, trits=ternary, scale_dtype=scale_dtype)
        twin.set_activations(activations)
        shared = of_weight.setdefault(id(layer.weight), twin)
        if shared is not twin and same_weight(shared.config, twin.config):
            twin.weight_codes, twin.weight_scale = shared.weight_codes, shared.weight_scale
        return twin

    new = successors(layers, make, "from_quantized of the packed layer")
    if not new:
        raise ValueError("model: has no quantized layers to pack; call quantize_(model) and train it first")
    replace_modules(model, new)
    for layer in layers.values():  # an embedding that shared a weight keeps it, as an ordinary one
        layer.quantizer.untie(layer.weight)
    tell_float(model, "pack_", chosen(DEFAULT))
    _tell_inputs(layers, activations)
    return model


def _tell_inputs(layers: dict[str, Any], activations: str) -> None:
    """One line of the logger where the layers that were validated rounded their inputs, and packed ones do not."""
    configs = {name: layer.config for name, layer in layers.items() if layer.config.activation is None}
    differ = {n: c.forward for n, c in configs.items() if c.level_dtype is not None and c.forward != activations}
    for name, forward in list(differ.items())[:1]:
        again = "; activations='int8' rounds them as before" * (forward == "int8")
        logger.warning("pack_: forward='%s' rounds the inputs of %d layers (%s …), and packed they take them as they "
                       "are: the same weights, other outputs, so validate the packed model%s", forward, len(differ),
                       name, again)  # fmt: skip


def unpack_(model: nn.Module, force: bool = False) -> nn.Module:
    """The inverse of ``pack_``, as far as inference goes: float layers with the unpacked weights, in place. The weights
    are new Parameters that require a gradient, frozen ones of before, of which codes know nothing, too.

    Raises ValueError naming the layer, and leaves the model as it was, where the inputs of a layer are quantized
    (``QuantConfig(activation=…)``), which these layers cannot do; ``force=True`` leaves that out.
    """
    weights: dict[Any, nn.Parameter] = {}  # what is one in memory stays one

    def make(name: str, layer: Any) -> nn.Module:
        if (grid := layer.kind.input_grid(layer)) is not None and not force:
            raise ValueError(f"its inputs are quantized to {grid} (activation=), which a float layer does not do; "
                             "force=True leaves that out, and changes the outputs")  # fmt: skip
        key = id(layer.weight_codes), id(layer.weight_scale), layer.weight_dtype
        if key not in weights:
            weights[key] = nn.Parameter(layer.dequantize())
        return layer.kind.float_layer(layer, weights[key])

    replace_modules(model, successors(_named(model, PackedLayer), make, "its to_float()"))
    conceal(model)
    decline_fast_paths(model)
    return model


def _named(model: nn.Module, cls: type) -> dict[str, Any]:
    """{name: layer} of this class, under all names that a layer has."""
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, cls)}


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the packed layers in ``model``."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """{name: layer} of the quantized layers in ``model``."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def tell_passed(model: nn.Module, call: str) -> None:
    """UserWarning where weights got a gradient and their layers were never called."""
    passed = [name for name, layer in quantized_layers(model).items() if not layer.quantizer.served
              and getattr(layer._parameters.get("weight"), "grad", None) is not None]  # fmt: skip
    if passed:
        told = ", ".join(passed[:NAMES_TOLD]) + ", …" * (len(passed) > NAMES_TOLD)
        warnings.warn(f"{call}: {len(passed)} quantized layers have a gradient and were never called ({told}): their "
                      "model reads `weight` itself, and computes with the float weights until hard_quantize_, also in "
                      "eval(); call the layers there, or leave them out", stacklevel=3)  # fmt: skip


def hard_quantize_(model: nn.Module) -> nn.Module:
    """w <- s Q(w/s) in every quantized layer, in place: float and quantized weights become the same numbers. Raises
    RuntimeError naming the layer, before anything is written, where the weight is computed from others. Warns of layers
    that were trained and never called, because their model reads ``weight`` itself."""
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if maker := computed_tensors(layer).get("weight"):
            raise RuntimeError(f"{name}: its weight is not a Parameter but computed ({maker}); {MAKE_PERMANENT}")
    tell_passed(model, "hard_quantize_")
    decline_fast_paths(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.hard_quantize_()
    return model


def inputs_of(layer: QuantizedLayer) -> list[nn.Parameter]:
    """The learned scale and offset of its input."""
    quantizer = layer._modules.get(INPUT)
    return [] if quantizer is None else [*quantizer.parameters()]


def param_groups(model: nn.Module, *, scale_lr: float = 1.0, outer: bool = True, decay_vectors: bool = True,
                 **options: Any) -> list[dict[str, Any]]:  # fmt: skip
    """Parameter groups for ``ASkewSGD`` / ``ASkewAdamW``: one for each quantization config, one for all the rest, and
    one for learned scales (``scale="lsq"``), which has ``role="scale"`` and no weight decay. ``scale_lr``: the factor
    of their learning rate, which ``options`` must have unless it is 1.

    ``options`` (lr, alpha, skew, …) go to every group; ``weight_decay`` too, but for biases, norms and other vectors of
    the rest, which get a group with weight_decay 0 where ``decay_vectors=False``. Parameters that do not require a
    gradient are left out. Where a layer's weight is computed (weight_norm, a pruning mask) what it is made from goes to
    the rest, which is told (UserWarning).

    ``outer``: the weights of the model's first and last layer, where these are quantized, get groups of their own, with
    ``order="outer"``: ``ak.Recipe`` anneals them last. False: one group for each config.
    """
    decline_fast_paths(model)  # of models that were put together by hand
    groups: dict[Any, dict[str, Any]] = {}
    scales: dict[int, nn.Parameter] = {}
    seen: set[int] = set()
    ends = _ends(model) if outer else set()
    for name, layer in quantized_layers(model).items():
        layer._tied()
        if maker := computed_tensors(layer).get("weight"):
            warnings.warn(f"{name}: its weight is not a Parameter but computed ({maker}): the forward quantizes it, "
                          "but it is not under the constraint", stacklevel=2)  # fmt: skip
            for p in layer.parameters():  # a pruning mask leaves the Parameter under another name
                layer.quantizer.untie(p)
            continue
        learned = [] if layer.quantizer.learned is None else [layer.quantizer.learned]
        if learned and ops.has_values(layer.weight):  # starts, as a graph of torch.compile cannot make it
            layer.quantizer.current_scale(layer.weight)
        scales |= {id(p): p for p in (*learned, *inputs_of(layer)) if p.requires_grad}
        if not layer.weight.requires_grad or id(layer.weight) in seen:
            continue
        seen.add(id(layer.weight))
        c: QuantConfig = layer.config
        of_layer = {key: getattr(c, key) for key in SCALE_FIELDS}
        order = {"order": "outer"} if id(layer.weight) in ends else {}
        new = {"params": [], "grid": c.weight, **of_layer, **order, **options}
        groups.setdefault((c.to_json(), *order.values()), new)["params"].append(layer.weight)
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in seen and id(p) not in scales]
    vectors = [] if decay_vectors else [p for p in rest if p.dim() < 2]
    plain = [p for p in rest if decay_vectors or p.dim() >= 2]
    if scale_lr != 1:
        if "lr" not in options:
            raise ValueError(f"scale_lr: {scale_lr} is a factor of lr, which is not given; expected lr=… beside it")
        options_of_scales = {**options, "lr": scale_lr * options["lr"]}
    else:
        options_of_scales = options
    others: list[dict[str, Any]] = [
        {"params": [*scales.values()], **options_of_scales, "weight_decay": 0.0, "role": "scale"},
        {"params": plain, **options},
        {"params": vectors, **options, "weight_decay": 0.0},
    ]
    return [*groups.values(), *(group for group in others if group["params"])]


def _ends(model: nn.Module) -> set[int]:
    """Ids of the weights that come first and last in the model: of layers, whose names end so, and not of what a model
    adds (positions, class tokens)."""
    found = [
        id(p)
        for module in model.modules()
        for key, p in module.named_parameters(recurse=False)
        if p.dim() >= 2 and key.endswith("weight") and key not in module._modules  # the layer's of that name
        and not (isinstance(module, QuantizedLayer) and key != "weight")
    ]  # fmt: skip
    return {found[0], found[-1]} if found else set()
