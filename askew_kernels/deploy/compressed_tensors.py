"""compressed-tensors: the folder that vLLM, SGLang and transformers load, with the levels that were trained.

Of a layer ``weight_packed`` (int32), ``weight_scale`` (n, groups) and ``weight_shape`` stand in the file
(pack-quantized), where its inputs are quantized ``weight`` (int8) instead (int-quantized). Bit i of code j of a row is
bit ``bits j + i`` of its words, little end first, and a code is level + 2^(bits-1): the bytes of a packed layer of
``Uniform(bits)``, padded to words. weight = level · scale, in the type of the scale. MXFP4 and NVFP4: ``fp4``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..contract import row_bytes, unpack_codes
from ..nn.kinds import KINDS
from ..nn.packed import PackedLayer
from ..quant import FP4, QuantConfig, Uniform
from ..quant.packing import pack_codes
from ..quant.scales import holds_scales
from . import expert_names, folders, fp4
from .contents import Contents
from .files import PackedFileError
from .integers import integers, kept_scale, table

METHOD = "compressed-tensors"
PACKED, INT8 = "pack-quantized", "int-quantized"
LINEAR = "Linear"  # the class, as targets name it
KIND_NAMES = ("linear", "embedding")  # whose layers the package compresses
HOLDER = "compressed-tensors files"
PARTS = ("weight_packed", "weight", "weight_scale", "weight_shape", fp4.GLOBAL)
FOREIGN = ("weight_zero_point", "weight_g_idx")  # meanings that packed layers have not

logger = logging.getLogger("askew_kernels")


class Scheme(NamedTuple):
    """How a layer stands in the file. group: weights that share a scale; None: a scale for each row. inputs: bits of
    its inputs, whose scale is made for each token; None: they stay float. float4: the format of ``fp4``, if any."""

    kind: str
    bits: int
    group: int | None
    inputs: int | None
    float4: str | None = None

    def to_dict(self, targets: list[str]) -> dict[str, Any]:
        """A config group, as the package and vLLM read it."""
        if self.float4:
            return {"targets": targets, "weights": fp4.FLOAT4[self.float4].to_dict(), "input_activations": None,
                    "output_activations": None, "format": self.float4}  # fmt: skip
        fixed = {"type": "int", "symmetric": True}
        weights = fixed | {"num_bits": self.bits, "dynamic": False, "strategy": "group" if self.group else "channel"}
        weights |= {"group_size": self.group} if self.group else {}
        inputs = None if self.inputs is None else fixed | {
            "num_bits": self.inputs, "dynamic": True, "strategy": "token"}  # fmt: skip
        return {"targets": targets, "weights": weights, "input_activations": inputs, "output_activations": None,
                "format": INT8 if inputs else PACKED}  # fmt: skip


# ---- writing ---------------------------------------------------------------------------------------------------------


def scheme_of(layer: PackedLayer) -> Scheme:
    """The narrowest that holds the layer. Raises ValueError where there is none."""
    if layer.kind.name not in KIND_NAMES:
        raise ValueError(f"{HOLDER} hold layers of the kinds {', '.join(KIND_NAMES)}, got {layer.kind.name}; name it "
                         "in dense= to write it as floats")  # fmt: skip
    inputs = layer.kind.input_grid(layer)
    if inputs is None and (float4 := fp4.format_of(layer)):
        return Scheme(layer.kind.name, 4, fp4.FLOAT4[float4].block, None, float4)
    if inputs is not None and inputs not in (Uniform(8), Uniform(8, narrow=True)):
        raise ValueError(f"{HOLDER} keep inputs of Uniform(8), got activation={inputs}")
    (low, *_, high), _ = table(layer, HOLDER, inputs=True)
    bits = next((k for k in range(2, 9) if -(2 ** (k - 1)) <= low and high < 2 ** (k - 1)), None)
    if bits is None:
        raise ValueError(f"{HOLDER} hold levels from -128 to 127, got {layer.config.weight}")
    return Scheme(layer.kind.name, bits, layer.config.group_size, None if inputs is None else 8)


def words(layer: PackedLayer, bits: int) -> Tensor:
    """(n, ⌈cols bits / 32⌉) int32. Where the layer's codes are those of the format and fill whole words, a view of
    them: nothing is copied."""
    (low, *_, high), _ = table(layer, HOLDER, inputs=True)
    half, codes = 2 ** (bits - 1), layer.weight_codes
    if layer.bits != bits or low != -half or high - low + 1 != len(layer.config.weight.levels):
        codes = pack_codes((integers(layer, HOLDER, inputs=True).levels + half).to(torch.uint8), bits)
    if codes.shape[1] % 4 or codes.data_ptr() % 4:
        codes = functional.pad(codes, (0, -codes.shape[1] % 4)).contiguous()
    return codes.view(torch.int32)


def compressed(layer: PackedLayer) -> dict[str, Tensor]:
    """The tensors that stand for the layer's weight in a file. Raises ValueError where it does not fit."""
    scheme = scheme_of(layer)
    if scheme.float4:
        return fp4.tensors(layer, scheme.float4)
    _, factor = table(layer, HOLDER, inputs=True)
    exact = layer.weight_scale.detach().to(torch.promote_types(layer.weight_dtype, torch.float32)) * factor
    kept = str(layer.weight_dtype).removeprefix("torch.")
    if layer.weight_dtype in (torch.bfloat16, torch.float16) and not holds_scales(exact, kept):
        raise ValueError(f"weight_scale: readers keep scales in the model's type, and {kept} does not hold these; "
                         f'train with for_export("{METHOD}:{scheme.bits}") or scale_dtype="{kept}"')  # fmt: skip
    n = layer.shape[0]
    scale = exact.to(layer.weight_dtype).reshape(-1, layer.cols // scheme.group if scheme.group else 1)
    scale = scale.expand(n, -1).contiguous()  # one for the tensor serves every row
    if scheme.inputs is not None:
        return {"weight": integers(layer, HOLDER, inputs=True).levels.to(torch.int8), "weight_scale": scale}
    shape = torch.tensor(layer.shape, dtype=torch.int64)
    return {"weight_packed": words(layer, scheme.bits), "weight_scale": scale, "weight_shape": shape}


@torch.no_grad()
def export(contents: Contents, path: str | os.PathLike, *, architecture: str | None = None,
           dense: Iterable[str] = ()) -> None:  # fmt: skip
    """The folder ``path``: ``model.safetensors``, ``config.json`` and what lay beside the model (tokenizer). No package
    is needed.

    Linear layers and embeddings of integer levels from -128 to 127 fit, in the narrowest bits, with one scale for the
    tensor (repeated), each channel or group, which the model's type must hold; FP4 with scales of a byte as MXFP4
    (float8_e8m0fnu, groups of 32) or NVFP4 (float8_e4m3fn, 16). Inputs quantized to Uniform(8) are kept
    as dynamic 8 bits for each token, of which the readers make the scale: max|x| / 127.5 in the package, / 127 here
    and in vLLM, so that outputs differ by roundings of the inputs. Raises PackedFileError naming the layer.
    """
    path, (layers, tensors) = Path(path), folders.dense_apart(contents, dense)
    family = (contents.architecture or {}).get("model_type")
    schemes: dict[str, Scheme] = {}
    for name, layer in layers.items():
        try:
            for part, of_part in expert_names.split(name, layer).items():
                schemes[part] = scheme_of(of_part)
                tensors |= {f"{part}.{key}": t for key, t in compressed(of_part).items()}
        except ValueError as error:
            raise contents.error(name, error) from None
    _check_experts(contents, layers, schemes)
    matrices = [key.removesuffix(".weight") for key, t in tensors.items() if key.endswith(".weight") and t.dim() == 2]
    ignored = [
        expert_names.in_checkpoints(name, family) for name in matrices if name not in schemes
    ]  # a tied head, too
    changes = folders.settle_ties(contents, layers, tensors)
    schemes = {expert_names.in_checkpoints(name, family): scheme for name, scheme in schemes.items()}
    whole = contents.layers.keys() - layers.keys()  # experts as floats: transformers takes them by the model's names
    tensors = {key if key in whole else expert_names.in_checkpoints(key, family): t for key, t in tensors.items()}
    if told := [name for name, scheme in schemes.items() if scheme.inputs]:
        logger.warning("compressed-tensors: readers make the scales of quantized inputs (%d layers: %s, …), "
                       "and the package's are max|x| / 127.5, those here max|x| / 127", len(told), told[0])  # fmt: skip
    if told := [name for name, scheme in schemes.items() if scheme.kind == "embedding"]:
        how = "from_pretrained(…, quantization_config=CompressedTensorsConfig(dequantize=True))"
        logger.warning("compressed-tensors: transformers loads packed embeddings (%s) by %s only", told[0], how)
    if told := fp4.share_units(tensors):
        logger.warning("compressed-tensors: readers that fuse %s want one global scale, by which E4M3 does not hold "
                       "their scales; they have their own", ", ".join(told))  # fmt: skip
    if any(scheme.float4 for scheme in schemes.values()) and folders.main_type(contents) != "bfloat16":
        changes["dtype"] = "bfloat16"
        logger.warning("compressed-tensors: readers make weights of 4-bit floats in bfloat16, which holds these, and "
                       "want the rest of the model in it, too: config.json says bfloat16")  # fmt: skip
    path.mkdir()
    folders.write_tensors(path, tensors, contents.extra)
    folders.write_config(contents, path, architecture, quantization_config(schemes, ignored), **changes)


def _check_experts(contents: Contents, layers: Mapping[str, PackedLayer], schemes: Mapping[str, Scheme]) -> None:
    """PackedFileError where experts differ in their schemes: readers have one for all of them."""
    of_experts = {scheme for name, scheme in schemes.items() if expert_names.EXPERT.fullmatch(name)}
    if len(of_experts) > 1:
        name = next(name for name, layer in layers.items() if layer.kind.held)
        raise contents.error(name, f"readers take one scheme for all experts, got {len(of_experts)}; quantize them "
                                   "alike or name some in dense=")  # fmt: skip


def quantization_config(schemes: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """Linear layers of one scheme are targeted by the name of their class, all else by its own name; ``ignored``: every
    other module with a matrix, so that no reader takes it for a quantized one."""
    groups: dict[str, Any] = {}
    for kind in KIND_NAMES:
        of_kind = {name: scheme for name, scheme in schemes.items() if scheme.kind == kind}
        found = list(dict.fromkeys(of_kind.values()))
        for i, scheme in enumerate(found):
            names = [name for name, other in of_kind.items() if other == scheme]
            if kind == "linear" and len(found) == 1:
                names = [LINEAR]
            elif any(map(expert_names.EXPERT.fullmatch, names)):  # by which readers know the scheme of experts
                names = [*(n for n in names if not expert_names.EXPERT.fullmatch(n)), expert_names.PATTERN]
            groups[f"{kind}_{i}"] = scheme.to_dict(names)
    formats = sorted({group["format"] for group in groups.values()})
    return {"quant_method": METHOD, "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed", "config_groups": groups, "kv_cache_scheme": None,
            "global_compression_ratio": None, "ignore": ignored}  # fmt: skip


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_one(path: str | os.PathLike) -> bool:
    return folders.quantization_of(path, METHOD)


def read(path: str | os.PathLike) -> Contents:
    """A folder of symmetric integers of 2 to 8 bits as packed layers of Uniform(bits), of MXFP4 and NVFP4 as those of
    FP4. Raises PackedFileError naming the layer, FileNotFoundError."""
    file = _File(path)
    own = {f"{name}.{part}" for name in file.names for part in PARTS}
    layers = expert_names.merged({name: file.layer(name) for name in file.names}, file.family)
    rest = {
        expert_names.in_checkpoints(key, file.family, back=True): t for key, t in file.tensors.items() if key not in own
    }
    config = {k: v for k, v in file.config.items() if k != folders.QUANTIZATION}
    architecture = config if "model_type" in config else None
    return Contents(str(path), layers, rest, folders.read_extra(file.path), architecture, file.path)


def dequantized(path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """As the package decompresses it; ImportError without it."""
    try:
        import compressed_tensors
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        raise ImportError(
            'reading with compressed-tensors needs it: pip install "askew_kernels[compressed-tensors]"'
        ) from None
    file = _File(path)
    weights = folders.float_weights(file.tensors)
    for name in file.names:
        group = file.group(name)
        compressor: Any = BaseCompressor.get_value_from_registry(group.get("format") or file.format)
        found = compressor.decompress(file.parts(name), QuantizationScheme.model_validate(group))
        weights[name] = found["weight"]
    weights |= expert_names.merged_weights(weights, file.family)
    return weights, f"compressed-tensors {compressed_tensors.__version__}"


class _File:
    """A folder, its config groups, and which of them each layer follows."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.config = folders.read_json(self.path / folders.CONFIG)
        told = self.config.get(folders.QUANTIZATION)
        if not isinstance(told, dict) or told.get("quant_method") != METHOD:
            raise PackedFileError(f"{path}: config.json names no quant_method {METHOD!r}")
        groups, self.format = told.get("config_groups"), told.get("format")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise PackedFileError(f"{path}: config_groups: expected groups by name, got {groups!r:.80}")
        self.groups: dict[str, dict[str, Any]] = groups
        self.family = str(self.config.get("model_type"))
        self.tensors = folders.read_tensors(self.path)
        self.names = [k.removesuffix(".weight_scale") for k in self.tensors if k.endswith(".weight_scale")]
        if not self.names:
            raise PackedFileError(f"{path}: no <name>.weight_scale, so no compressed layers")

    def parts(self, name: str) -> dict[str, Tensor]:
        found = {part: self.tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in self.tensors}
        if wrong := next((part for part in FOREIGN if f"{name}.{part}" in self.tensors), None):
            raise self.fail(name, f"{wrong}: a packed layer has none, its levels are symmetric and in their order")
        if "weight_packed" not in found and "weight" not in found:
            raise self.fail(name, "weight_packed and weight are missing")
        return found

    def fail(self, name: str, text: object) -> PackedFileError:
        return PackedFileError(f"{self.path}: {name}: {text}")

    @cached_property
    def _targets(self) -> dict[str, set[str]]:
        """Of each config group; made once, as there may be thousands."""
        told = {key: g["targets"] if isinstance(g.get("targets"), list) else [] for key, g in self.groups.items()}
        return {key: {target for target in targets if isinstance(target, str)} for key, targets in told.items()}

    @cached_property
    def _wide(self) -> list[dict[str, Any]]:
        """The config groups that target more than layers' names."""
        names = set(self.names)
        return [g for key, g in self.groups.items() if not self._targets[key] <= names]

    def group(self, name: str) -> dict[str, Any]:
        """The config group that the layer follows: that which has its name, or the only one that fits its sizes of
        those that target more than other layers' names. Patterns of foreign files are not run."""
        named = [g for key, g in self.groups.items() if name in self._targets[key]]
        fitting, why = [], "no config group has it as a target"
        for g in named or self._wide:
            try:
                self._sizes(name, g)
                fitting.append(g)
            except PackedFileError as error:
                why = str(error).removeprefix(f"{self.path}: {name}: ")
        if not fitting:
            raise self.fail(name, why)
        if len({json.dumps({**g, "targets": []}, sort_keys=True) for g in fitting}) > 1:
            raise self.fail(name, f"{len(fitting)} config groups fit its sizes, expected one")
        return fitting[0]

    def _sizes(self, name: str, group: Mapping[str, Any]) -> tuple[int, int, int, int | None]:
        """(bits, n, cols, group size), after comparing them with the tensors."""
        told, found = group.get("weights"), self.parts(name)
        if not isinstance(told, dict):
            raise self.fail(name, f"weights: expected how they are quantized, got {told!r:.80}")
        bits, strategy, size = told.get("num_bits"), told.get("strategy"), told.get("group_size")
        float4 = self._float4(group)
        if (fp4.GLOBAL in found) != (float4 is not None and float4.in_units):
            raise self.fail(name, f"{fp4.GLOBAL}: NVFP4 has one, and nothing else")
        if float4 is not None:
            return self._float4_sizes(name, float4, told)
        symmetric = told.get("type", "int") == "int" and told.get("symmetric", True) is True
        if not symmetric or not isinstance(bits, int) or bits not in range(2, 9):
            raise self.fail(name, f"weights: expected symmetric integers of 2 to 8 bits, got {told!r:.200}")
        if "weight_packed" in found:
            packed, shape = found["weight_packed"], found.get("weight_shape")
            sizes = shape.tolist() if shape is not None and shape.dim() == 1 and shape.numel() == 2 else []
            whole = shape is not None and not shape.is_floating_point() and sizes and sizes[1] >= 0
            wanted = [sizes[0], -(-int(sizes[1]) * bits // 32)] if whole else None
            if packed.dtype != torch.int32 or list(packed.shape) != wanted:
                raise self.fail(name, f"weight_packed: expected int32 {wanted} for weight_shape {sizes} of {bits} "
                                f"bits, got {packed.dtype} {list(packed.shape)}")  # fmt: skip
        else:
            packed = found["weight"]
            sizes = list(packed.shape)
            if packed.dtype != torch.int8 or len(sizes) != 2:
                raise self.fail(name, f"weight: expected an int8 matrix, got {packed.dtype} {sizes}")
        n, cols = sizes
        if strategy == "group" and not (isinstance(size, int) and size > 0 and cols % size == 0):
            raise self.fail(name, f"group_size: expected a divisor of {cols}, got {size!r:.80}")
        groups = {"group": cols // size if strategy == "group" else 0, "channel": 1, "tensor": 0}.get(str(strategy))
        wanted_scales = None if groups is None else [n, groups] if groups else [1]
        if list(found["weight_scale"].shape) != wanted_scales:
            raise self.fail(name, f"weight_scale: expected shape {wanted_scales} for strategy {strategy!r:.80}, got "
                            f"{list(found['weight_scale'].shape)}")  # fmt: skip
        return bits, n, cols, size if strategy == "group" else None

    def _float4(self, group: Mapping[str, Any]) -> fp4.Float4 | None:
        return fp4.FLOAT4.get(str(group.get("format") or self.format))

    def _float4_sizes(self, name: str, float4: fp4.Float4, told: Mapping[str, Any]) -> tuple[int, int, int, int]:
        found, wanted = self.parts(name), float4.to_dict()
        wrong = [key for key in ("num_bits", "type", "group_size") if told.get(key) != wanted[key]]
        if wrong or told.get("symmetric", True) is not True:
            raise self.fail(name, f"weights: expected {wanted}, got {told!r:.200}")
        packed = found.get("weight_packed")
        if packed is None or packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] * 2 % float4.block:
            raise self.fail(name, f"weight_packed: expected uint8 of whole blocks of {float4.block}, got "
                            f"{None if packed is None else (packed.dtype, list(packed.shape))}")  # fmt: skip
        n, cols = packed.shape[0], 2 * packed.shape[1]
        for key, dtype, shape in (("weight_scale", float4.stored, [n, cols // float4.block]),
                                  (fp4.GLOBAL, torch.float32, [1])):  # fmt: skip
            if key in found and (found[key].dtype != dtype or list(found[key].shape) != shape):
                raise self.fail(name, f"{key}: expected {dtype} {shape}, got {found[key].dtype} "
                                f"{list(found[key].shape)}")  # fmt: skip
        return 4, n, cols, float4.block

    def _float4_layer(self, name: str, float4: fp4.Float4, group: Mapping[str, Any]) -> PackedLayer:
        if group.get("input_activations") is not None:
            raise self.fail(name, "input_activations: expected none with 4-bit floats, which packed layers' inputs are "
                            f"not, got {group['input_activations']!r:.200}")  # fmt: skip
        try:
            places, scale = fp4.decoded(float4, self.parts(name))
        except ValueError as error:
            raise self.fail(name, error) from None
        scale_dtype = float4.scale_dtype if holds_scales(scale, float4.scale_dtype) else "float32"
        config = QuantConfig(FP4(), "absmax", "per_group", float4.block, scale_dtype=scale_dtype)
        kind = self._kind(group)
        layer = kind.packed.like(kind.of_shape(places.shape, False), config=config, dtype=self._dtype())
        layer.bias = None
        layer.weight_codes, layer.weight_scale = pack_codes(places, 4), scale.to(layer.weight_scale.dtype)
        return layer

    def _dtype(self) -> torch.dtype:
        """The model's, by its config; the readers' where it says none."""
        told = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        return getattr(torch, told) if told in ("float32", "float16", "bfloat16") else torch.bfloat16

    def _kind(self, group: Mapping[str, Any]) -> Any:
        embedding = "Embedding" in group["targets"] or any(
            g is group and key.startswith("embedding") for key, g in self.groups.items()
        )
        return KINDS["embedding" if embedding else "linear"]

    def layer(self, name: str) -> PackedLayer:
        group, found = self.group(name), self.parts(name)
        bits, n, cols, size = self._sizes(name, group)
        if (float4 := self._float4(group)) is not None:
            return self._float4_layer(name, float4, group)
        grid, scale, inputs = Uniform(bits), found["weight_scale"], group.get("input_activations")
        wanted = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        if inputs is not None and not (isinstance(inputs, dict) and wanted.items() <= inputs.items()):
            raise self.fail(name, f"input_activations: expected {wanted}, got {inputs!r:.200}")
        try:
            kept = kept_scale(scale)
        except ValueError as error:
            raise self.fail(name, f"weight_scale: {error}") from None
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise self.fail(name, "weight_scale: expected positive finite scales")
        by = "per_group" if size else "per_tensor" if scale.dim() == 1 else "per_channel"
        config = QuantConfig(grid, "absmax", by, size, activation=Uniform(8) if inputs else None)
        kind = self._kind(group)
        layer = kind.packed.like(kind.of_shape((n, cols), False), config=config, scale_dtype=kept.dtype,
                                 dtype=scale.dtype)  # fmt: skip
        layer.bias = None
        layer.weight_codes, layer.weight_scale = self._codes(found, bits, cols), kept.reshape(-1)
        return layer

    def _codes(self, found: Mapping[str, Tensor], bits: int, cols: int) -> Tensor:
        if "weight_packed" not in found:
            return pack_codes((found["weight"].to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), bits)
        codes = found["weight_packed"].contiguous().view(torch.uint8)[:, : row_bytes(cols, bits)]
        if bits * cols % 8 == 0:
            return codes.contiguous()
        return pack_codes(unpack_codes(codes.contiguous(), bits, cols), bits)  # bits after the last code are zeros
