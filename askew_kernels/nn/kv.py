"""Keys and values as a quantized cache holds them: a module to train with, and the cache of codes with its numbers.

x_hat = s q + z, q = Q((x - z) / s) among 0 … 2^bits - 1, z = min x, s = (max x - min x) / (2^bits - 1) of a group of
numbers, both rounded to ``scale_dtype``, in which the cache keeps them; ``symmetric``: z = 0, s = max |x| / (2^(bits-1)
- 1), q among -2^(bits-1) … 2^(bits-1) - 1. Groups are runs along the head's dimension of one token, or, for keys of
which single channels are large, runs of tokens of one channel: KIVI (Liu et al., ICML 2024).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import contract, ops
from ..quant import Uniform, code_bits, pack_weight
from ..quant.packing import storage_type
from ..quant.scales import check_scale_dtype

__all__ = ["KVCache", "QuantizedKV", "quantize_kv_"]

PER_TOKEN, PER_CHANNEL = GROUPS = ("per_token", "per_channel")
KEPT_AS = ("float16", "bfloat16", "float32")  # scales and smallest numbers


class Codes(NamedTuple):
    """A run of tokens of a cache: codes (…, blocks, groups, bytes) uint8, scale and zero (…, blocks, groups); zero is
    None where symmetric. A block is a token, or as many as a group has."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def map(self, run: Callable[[Tensor], Tensor]) -> Codes:
        return Codes(run(self.codes), run(self.scale), None if self.zero is None else run(self.zero))


@dataclass(frozen=True)
class Rounding:
    """How keys, or values, are rounded."""

    name: str
    bits: int
    group: int
    per: str
    symmetric: bool
    scale_dtype: str

    @property
    def grid(self) -> Uniform:
        return Uniform(self.bits, signed=self.symmetric)

    @property
    def block(self) -> int:
        """Tokens that are rounded together."""
        return self.group if self.per == PER_CHANNEL else 1

    def check(self, x: Tensor) -> None:
        ops.check_float_tensor(self.name, x)
        if x.dim() < 2:
            raise ValueError(f"{self.name}: expected shape (…, tokens, head dimension), got {tuple(x.shape)}")
        if self.per == PER_TOKEN and x.shape[-1] % self.group:
            raise ValueError(f"group: {self.group} does not divide the head dimension {x.shape[-1]} of {self.name} of "
                             f"shape {tuple(x.shape)}")  # fmt: skip

    def whole(self, x: Tensor) -> int:
        """How many of the tokens fill blocks."""
        return x.shape[-2] // self.block * self.block

    def rows(self, x: Tensor) -> Tensor:
        """(…, blocks, groups, group) of (…, whole tokens, dim)."""
        if self.per == PER_TOKEN:
            return x.unflatten(-1, (-1, self.group))
        return x.unflatten(-2, (-1, self.group)).transpose(-1, -2)

    def tokens(self, rows: Tensor) -> Tensor:
        """The inverse of ``rows``."""
        return rows.flatten(-2) if self.per == PER_TOKEN else rows.transpose(-1, -2).flatten(-3, -2)

    @torch.no_grad()
    def scales(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scale, zero) of (n, group), float32 (n,); NaN where a group is not finite."""
        if not rows.numel():
            scale = torch.ones(rows.shape[0], dtype=torch.float32, device=rows.device)
            return scale, None if self.symmetric else torch.zeros_like(scale)
        kept = getattr(torch, self.scale_dtype)  # few operations: on a GPU each costs more than its work
        if self.symmetric:
            zero, width = None, rows.abs().amax(1).float()
        else:
            zero = rows.amin(1).to(kept).float()
            width = rows.amax(1) - zero
        c_max = torch.full((), self.grid.c_max, dtype=torch.float32, device=rows.device)
        top = width / c_max  # by a number a GPU multiplies by 1 / number
        low, high = contract.SCALE_RANGES[self.scale_dtype]
        scale = top.clamp(max(low, 2.0**-126), high).to(kept).float()
        return scale + (top - top), zero  # NaN where top is no number

    def fake(self, x: Tensor) -> Tensor:
        """x_hat, straight-through; tokens that fill no block stay as they are."""
        self.check(x)
        whole = self.whole(x)
        if whole < x.shape[-2]:
            return torch.cat([self.fake(x[..., :whole, :]), x[..., whole:, :]], -2)
        grouped = self.rows(x)
        rows = grouped.reshape(-1, self.group)
        scale, zero = self.scales(rows.detach())
        grid = self.grid
        rest = scale, grid.levels_tensor(x.device), grid.encoding, False, False, 0
        if zero is None:
            y = ops.run_fake_quantize(rows.contiguous(), *rest)
        else:
            z = zero[:, None]
            y = (ops.run_fake_quantize((rows - z).contiguous(), *rest) + z).to(x.dtype)  # z is float32, so all is
        return self.tokens(y.reshape(grouped.shape))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """Of tokens that fill blocks. Raises ValueError for numbers that are not finite."""
        self.check(x)
        grouped = self.rows(x)
        rows = grouped.reshape(-1, self.group)
        scale, zero = self.scales(rows)
        if not bool(scale.isfinite().all()):
            raise ValueError(f"{self.name}: expected finite numbers, which codes stand for, got inf or NaN")
        if zero is not None:
            rows = rows - zero[:, None]
        codes = pack_weight(rows, scale, self.grid)
        shape, kept = grouped.shape[:-1], storage_type(self.scale_dtype)
        zero = None if zero is None else zero.to(kept).reshape(shape)
        return Codes(codes.reshape(*shape, codes.shape[-1]), scale.to(kept).reshape(shape), zero)

    @torch.no_grad()
    def decode(self, stored: Codes, dtype: torch.dtype) -> Tensor:
        """(…, tokens, dim): what ``fake`` gave, bit for bit."""
        codes, scale = stored.codes.flatten(0, -2), stored.scale.float().reshape(-1)
        grid, kind = self.grid, dtype if stored.zero is None else contract.compute_dtype(dtype)
        rows = ops.packed_dequantize(codes, scale, grid, code_bits(grid), self.group, kind)
        if stored.zero is not None:
            rows = (rows + stored.zero.float().reshape(-1, 1)).to(dtype)
        return self.tokens(rows.reshape(*stored.scale.shape, self.group))


class QuantizedKV(nn.Module):
    """(k, v) -> (k_hat, v_hat): keys and values as a cache of codes gives them back, straight-through for the gradient.

    Between an attention's projections (after the rotation of positions, before the heads of grouped queries are
    repeated) and its product. k, v: (…, tokens, head dimension), as (batch, heads, tokens, head dimension); their sizes
    may differ. ``bits``: 2 … 8, or (of keys, of values). ``group``: numbers with one scale. ``keys``: "per_token" (runs
    along the head's dimension, as values are), or "per_channel" (runs of tokens of one channel; the last tokens, which
    fill no group, stay float, in the cache until they do). ``symmetric``: no smallest number is kept. ``scale_dtype``:
    "float16", "bfloat16" or "float32", of what is kept of a group; a group that it does not hold becomes NaN.

    ``cache()`` is a cache of codes for one attention, ``transformers_cache()`` one for ``model.generate(…,
    past_key_values=…)``; their numbers are those of training, where ``quantize_kv_(model, kv)`` lets the attentions of
    a transformers model see them. It has no parameters.
    Raises TypeError/ValueError naming the argument, also where ``group`` does not divide the head's dimension.
    """

    def __init__(self, bits: int | Sequence[int] = 4, group: int = 32, *, keys: str = PER_TOKEN,
                 symmetric: bool = False, scale_dtype: str | torch.dtype = "float16") -> None:  # fmt: skip
        super().__init__()
        both = (bits, bits) if isinstance(bits, int) else tuple(bits) if isinstance(bits, Sequence) else ()
        if len(both) != 2:
            raise TypeError(f"bits: expected an int or (bits of keys, bits of values), got {bits!r:.80}")
        if isinstance(group, bool) or not isinstance(group, int):
            raise TypeError(f"group: expected an int, got {group!r:.80}")
        if group < 1:
            raise ValueError(f"group: expected a positive int, got {group}")
        if keys not in GROUPS:
            raise ValueError(f"keys: expected one of {', '.join(GROUPS)}, got {keys!r:.80}")
        if not isinstance(symmetric, bool):
            raise TypeError(f"symmetric: expected True or False, got {symmetric!r:.80}")
        if (kept := check_scale_dtype("scale_dtype", scale_dtype)) not in KEPT_AS:
            raise ValueError(f"scale_dtype: expected one of {', '.join(KEPT_AS)}, got {kept!r}")
        widths = [Uniform(b).bits for b in both]  # checks them
        self.of_keys = Rounding("k", widths[0], group, keys, symmetric, kept)
        self.of_values = Rounding("v", widths[1], group, PER_TOKEN, symmetric, kept)
        self.replaced: tuple[str, ...] = ()  # the attention functions of the model that it stands in
        self.model_config: Any = None  # that model's
        self._given: Any = None  # {id: tensor} of what its caches have given
        self._due: tuple[Any, Any] | None = None  # what a model's cache gave last, until an attention comes with it

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_keys.fake(k), self.of_values.fake(v)

    def cache(self) -> KVCache:
        """An empty cache of one attention."""
        return KVCache(self)

    def transformers_cache(self, model: Any = None) -> Any:
        """An empty ``transformers.Cache`` of codes for ``model``, or its config; default: the one that ``quantize_kv_``
        has given this module, and otherwise any that has attentions only. Encoder-decoders have two caches, of which
        the second is of the cross-attentions; layers without keys and values keep their state as it is. Raises
        ValueError naming the layer that it cannot serve, ImportError without transformers."""
        return _transformers().cache(self, self.model_config if model is None else model)

    def gives(self, t: Tensor) -> Tensor:
        """Notes what one of its caches gives."""
        if self._given is None:
            self._given = weakref.WeakValueDictionary()
        self._given[id(t)] = t
        return t

    def gave(self, k: Tensor, v: Tensor) -> bool:
        """Whether caches of this module gave these very tensors, so that they are rounded already."""
        return self._given is not None and self._given.get(id(k)) is k and self._given.get(id(v)) is v

    def is_due(self, given: tuple[Tensor, Tensor]) -> None:
        self._due = weakref.ref(given[0]), weakref.ref(given[1])

    def take_due(self) -> bool:
        """Whether somebody holds what a model's cache gave since the last attention."""
        due, self._due = self._due, None
        return due is not None and any(t() is not None for t in due)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_given": None, "_due": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for base in self.replaced:  # of a model that another process has saved
            _transformers().register(base)

    def extra_repr(self) -> str:
        k, v = self.of_keys, self.of_values
        bits = k.bits if k.bits == v.bits else (k.bits, v.bits)
        return f"bits={bits}, group={k.group}, keys={k.per}, symmetric={k.symmetric}, scale_dtype={k.scale_dtype}"


class _Side:
    """Keys or values of a cache: codes of the tokens that fill blocks, and the tokens after them."""

    def __init__(self, rounding: Rounding) -> None:
        self.rounding = rounding
        self.stored: Codes | None = None
        self.rest: Tensor | None = None  # None: nothing was added yet

    @property
    def length(self) -> int:
        blocks = 0 if self.stored is None else self.stored.scale.shape[-2]
        return blocks * self.rounding.block + (0 if self.rest is None else self.rest.shape[-2])

    def add(self, x: Tensor) -> None:
        self.rounding.check(x)
        if self.rest is not None:
            sizes, dtype = (*self.rest.shape[:-2], x.shape[-2], self.rest.shape[-1]), self.rest.dtype
            if x.shape != sizes or x.dtype != dtype:
                raise ValueError(f"{self.rounding.name}: expected {dtype} of shape {sizes}, as before, got {x.dtype} "
                                 f"{tuple(x.shape)}")  # fmt: skip
        x = x.detach() if self.rest is None else torch.cat([self.rest, x.detach()], -2)
        whole = self.rounding.whole(x)
        if whole:
            new = self.rounding.encode(x[..., :whole, :])
            self.stored = new if self.stored is None else _joined(self.stored, new)
        self.rest = x[..., whole:, :].clone()

    def read(self) -> Tensor:
        assert self.rest is not None  # something was added
        if self.stored is None:
            return self.rest
        known = self.rounding.decode(self.stored, self.rest.dtype)
        return torch.cat([known, self.rest], -2) if self.rest.shape[-2] else known

    def cut(self, length: int) -> None:
        """Keeps the first tokens; those of a block that is cut stay as they are read."""
        if self.rest is None or length >= self.length:
            return
        blocks = 0 if self.stored is None else self.stored.scale.shape[-2]
        first = blocks * self.rounding.block
        if length >= first:
            self.rest = self.rest[..., : length - first, :].clone()
            return
        assert self.stored is not None  # its tokens are more than that
        whole, left = divmod(length, self.rounding.block)
        self.rest = self.rest[..., :0, :]
        if left:
            of_block = self.stored.map(lambda t: t.narrow(self._place(t), whole, 1))
            self.rest = self.rounding.decode(of_block, self.rest.dtype)[..., :left, :]
        self.stored = self.stored.map(lambda t: t.narrow(self._place(t), 0, whole).clone()) if whole else None

    def _place(self, t: Tensor) -> int:
        """The dimension of blocks."""
        return t.dim() - (3 if t.dtype == torch.uint8 else 2)

    def map(self, run: Callable[[Tensor], Tensor]) -> None:
        self.stored = None if self.stored is None else self.stored.map(run)
        self.rest = None if self.rest is None else run(self.rest)

    @property
    def bytes(self) -> int:
        parts: list[Any] = [self.rest, *(self.stored or ())]
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def _joined(a: Codes, b: Codes) -> Codes:
    zero = None if a.zero is None or b.zero is None else torch.cat([a.zero, b.zero], -2)
    return Codes(torch.cat([a.codes, b.codes], -3), torch.cat([a.scale, b.scale], -2), zero)


class KVCache:
    """Keys and values of the tokens so far as codes, for inference: ``QuantizedKV.cache()``.

    ``update(k, v)`` adds tokens and gives all of them as the module does, bit for bit. Memory: ``bytes``.
    """

    def __init__(self, kv: QuantizedKV) -> None:
        self.kv = kv
        self.reset()

    def reset(self) -> None:
        self._keys, self._values = _Side(self.kv.of_keys), _Side(self.kv.of_values)

    def __len__(self) -> int:
        """Tokens."""
        return self._values.length

    @property
    def bytes(self) -> int:
        return self._keys.bytes + self._values.bytes

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k, v (…, tokens, head dimension); returns the keys and values of all tokens, in their type. Raises
        ValueError, and leaves the cache, for what does not fit and for numbers that are not finite."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError("k, v: codes give no gradient; call it under torch.no_grad(), and train with the module "
                             "itself, without a cache")  # fmt: skip
        if k.shape[-2:-1] != v.shape[-2:-1]:
            raise ValueError(f"v: expected the tokens of k, {tuple(k.shape)}, got shape {tuple(v.shape)}")
        before = [(side.stored, side.rest) for side in (self._keys, self._values)]
        try:
            self._keys.add(k)
            self._values.add(v)
        except BaseException:
            for side, (stored, rest) in zip((self._keys, self._values), before, strict=True):
                side.stored, side.rest = stored, rest
            raise
        return self.keys(), self.values()

    def keys(self) -> Tensor:
        """Of all tokens, as ``update`` gives them."""
        return self.kv.gives(self._keys.read())

    def values(self) -> Tensor:
        return self.kv.gives(self._values.read())

    def cut(self, length: int) -> None:
        """Keeps the first ``length`` tokens."""
        self._keys.cut(length)
        self._values.cut(length)

    def map(self, run: Callable[[Tensor], Tensor]) -> None:
        """Every tensor through a function of the leading dimensions, such as ``lambda t: t.index_select(0, order)``."""
        self._keys.map(run)
        self._values.map(run)


def quantize_kv_(model: Any, kv: QuantizedKV | None) -> Any:
    """Lets every attention of a transformers model see keys and values as ``kv`` gives them, with whatever cache, in
    training and in generation; None: as they are again. Returns the model, which has it as ``model.quantized_kv``.

    The attention function of the model (``config._attn_implementation``) is called with them; what ``kv``'s own cache
    gave is not rounded again. Raises TypeError/ValueError for other models, ImportError without transformers.
    """
    if kv is not None and not isinstance(kv, QuantizedKV):
        raise TypeError(f"kv: expected a QuantizedKV, or None, got {kv!r:.80}")
    of_transformers = _transformers()
    if kv is None:
        of_transformers.remove(model)
    else:
        of_transformers.insert(model, kv)
    return model


def _transformers() -> Any:
    try:
        from . import kv_transformers
    except ImportError as error:
        raise ImportError(f'it needs transformers: pip install "askew_kernels[transformers]" ({error})') from None
    return kv_transformers
