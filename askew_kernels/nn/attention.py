"""nn.MultiheadAttention with quantized or packed projections.

Its weights of the inputs, ``in_proj_weight`` (3 embed_dim, embed_dim), or ``q_proj_weight``, ``k_proj_weight`` and
``v_proj_weight`` where keys or values have another size, are Parameters of its own: each is a layer here,
``InProjection`` where it is float, under the Parameter's name (``held``). Torch's forward reads them and those of
``out_proj`` past these layers' forward, so the module gets one that calls them; between the projections it computes
what torch's does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .held import FINDERS, HeldWeight, Holder, become
from .layers import QuantizedLayer
from .packed import PackedLayer, PackedMatrix
from .replace import WATCHERS, base_of

WHOLE, APART = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def projected(layer: Any, x: Tensor, weight: Tensor, _: None, bias: Tensor | None = None,
              rows: slice | None = None) -> Tensor:  # fmt: skip
    """x W^T + b with these ``rows`` of W."""
    weight = weight if rows is None else weight[rows]
    return functional.linear(x, weight, None if bias is None else bias.to(weight.dtype))


class InProjection(HeldWeight):
    """A float weight (out_features, in_features), which nn.MultiheadAttention holds. x: (…, in_features) ->
    (…, out_features), or only ``rows`` of these; the bias is the module's, too."""

    def __init__(self, in_features: int, out_features: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))

    def forward(self, input: Tensor, bias: Tensor | None = None, rows: slice | None = None) -> Tensor:
        return projected(self, input, self.weight, None, bias, rows)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class AskewInProjection(QuantizedLayer, InProjection):  # type: ignore[misc]
    """``InProjection`` with a quantized weight."""

    bias = None

    def forward(self, input: Tensor, bias: Tensor | None = None, rows: slice | None = None) -> Tensor:
        return super().forward(input, bias, rows)


class PackedInProjection(PackedMatrix, InProjection):  # type: ignore[misc, override]
    """``InProjection`` with a packed weight."""

    def forward(self, input: Tensor, bias: Tensor | None = None, rows: slice | None = None) -> Tensor:
        x, _ = self._prepared(input)
        return self._multiplied(x, None if bias is None else bias.to(x.dtype), rows)


def _additive(name: str, mask: Tensor | None, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Tensor | None:
    """What is added to the products of queries and keys; True in a mask of bools means: not this key."""
    if mask is None:
        return None
    if not torch.jit.is_tracing() and tuple(mask.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected bools or floats, got {mask.dtype}")
    return mask.to(dtype)


class AskewAttention(Holder):
    """Calls the layers of the projections."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As nn.MultiheadAttention.

        Raises ValueError and TypeError naming the argument where torch has assertions; NotImplementedError for nested
        tensors with masks, weights or other keys than queries.
        """
        options: dict[str, Any] = {
            "key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights, "is_causal": is_causal,
        }  # fmt: skip
        if isinstance(query, Proxy):  # torch.fx: one node, as torch's own
            path = query.tracer.path_of_module(self)  # type: ignore[attr-defined]
            return query.tracer.create_proxy("call_module", path, (query, key, value), options)  # type: ignore[return-value]
        if query.is_nested:
            return self._nested(query, key is query and value is query, options), None
        alone = query.dim() == 2
        for name, t in (("query", query), ("key", key), ("value", value)):
            if t.dim() != query.dim() or t.dim() not in (2, 3):
                raise ValueError(f"{name}: expected 2 dimensions, or 3 of a batch, got {tuple(t.shape)}")
        if alone:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]

        def batched(t: Tensor) -> Tensor:
            return t[None] if alone else t if self.batch_first else t.transpose(0, 1)

        x = batched(query)  # the same tensor stays the same one
        y = x if key is query else batched(key)
        q, k, v = self._projected(x, y, x if value is query else y if value is key else batched(value))
        y, weights = self._attended(q, k, v, key_padding_mask, attn_mask, need_weights, is_causal)
        y = self.out_proj(y)
        y = y[0] if alone else y if self.batch_first else y.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if alone else weights
        return y, weights

    def _nested(self, query: Any, itself: bool, options: dict[str, Any]) -> Tensor:
        """Sequence by sequence as alone, in the layout of ``query``."""
        masked = options["key_padding_mask"] is not None or options["attn_mask"] is not None
        if not itself or masked or options["need_weights"] or not self.batch_first:
            raise NotImplementedError("query: a nested tensor is expected to be key and value, too, with "
                                      "batch_first=True, without masks, and with need_weights=False")  # fmt: skip
        parts = [self(part[None], part[None], part[None], need_weights=False)[0][0] for part in query.unbind()]
        return torch.nested.as_nested_tensor(parts, layout=query.layout)

    def _projection(self, name: str, x: Tensor, bias: Tensor | None, rows: slice | None) -> Tensor:
        layer: Any = self._modules.get(name)
        if layer is not None:
            return layer(x, bias, rows)
        return projected(self, x, self._parameters[name], None, bias, rows)  # type: ignore[arg-type]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """(batch, length, embed_dim) each."""
        bias, n = self._parameters.get("in_proj_bias"), self.embed_dim
        rows = [slice(i * n, (i + 1) * n) for i in range(3)]
        if not self._qkv_same_embed_dim:
            biases = [None if bias is None else bias[part] for part in rows]
            given = zip(APART, (query, key, value), biases, strict=True)
            return tuple(self._projection(name, x, own, None) for name, x, own in given)

        def product(x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
            part = None if last - first == 3 else slice(first * n, last * n)
            own = bias if bias is None or part is None else bias[part]
            return self._projection(WHOLE, x, own, part).chunk(last - first, -1)

        if key is not value:
            return (*product(query, 0, 1), *product(key, 1, 2), *product(value, 2, 3))
        return product(query, 0, 3) if query is key else (*product(query, 0, 1), *product(key, 1, 3))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None,
                  need_weights: bool, is_causal: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(batch, length, embed_dim), and the weights (batch, heads, length, keys) where they are asked for."""
        batch, length, keys, heads = q.shape[0], q.shape[1], k.shape[1], self.num_heads
        if is_causal and mask is None:
            raise ValueError("attn_mask: expected the causal mask that is_causal=True is a hint of, got None")
        hinted = is_causal and padding is None and not need_weights
        shapes: list[tuple[int, ...]] = [(length, keys), (batch * heads, length, keys)]
        mask = None if hinted else _additive("attn_mask", mask, shapes, q.dtype)
        padding = _additive("key_padding_mask", padding, [(batch, keys)], q.dtype)
        if self.bias_k is not None:
            k, v = (
                torch.cat([t, b.to(t.dtype).expand(batch, 1, -1)], 1) for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
        if more := k.shape[1] - keys:
            mask, padding = (t if t is None else functional.pad(t, (0, more)) for t in (mask, padding))
        if mask is not None:
            mask = mask if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
        if padding is not None:
            mask = padding[:, None, None] if mask is None else mask + padding[:, None, None]
        q, k, v = (t.unflatten(-1, (heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
            return y.transpose(1, 2).flatten(2), None
        products = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
        weights = torch.softmax(products if mask is None else products + mask, -1)
        weights = functional.dropout(weights, dropout) if dropout else weights
        return (weights @ v).transpose(1, 2).flatten(2), weights

    def is_needed(self) -> bool:
        return super().is_needed() or _is_quantized(self.out_proj)


def _is_quantized(module: nn.Module) -> bool:
    return any(isinstance(m, (QuantizedLayer, PackedLayer)) for m in module.modules())


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` computes with torch's own forward, or the one that takes its place."""
    if not isinstance(module, nn.MultiheadAttention) or "forward" in vars(module):
        return False
    return base_of(type(module)).forward is nn.MultiheadAttention.forward


def passed_by(model: nn.Module) -> set[int]:
    """Ids of the layers whose weight a forward reads that calls no layer: projections of classes derived from
    nn.MultiheadAttention with a forward of their own."""
    return {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention) and not is_attention(m)}


def in_projections(module: nn.Module) -> dict[str, InProjection]:
    """{name: float layer} of the weights of nn.MultiheadAttention's inputs that have no layer yet."""
    found: dict[str, InProjection] = {}
    for name in (WHOLE, *APART) if is_attention(module) else ():
        if name in module._modules or (p := module._parameters.get(name)) is None:
            continue
        layer = InProjection(p.shape[1], p.shape[0], device="meta")
        layer.weight = p
        found[name] = layer.train(module.training)
    return found


def _adopt(model: nn.Module) -> None:
    """Where ``out_proj`` alone is quantized, its module has to call it, too."""
    for module in model.modules():
        if is_attention(module) and _is_quantized(module.out_proj):  # type: ignore[arg-type]
            become(module, AskewAttention)


FINDERS[AskewAttention] = in_projections
WATCHERS.append(_adopt)
OUT_PROJECTION = NonDynamicallyQuantizableLinear  # torch's class of ``out_proj``: a linear layer
