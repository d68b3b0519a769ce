"""Attention: masks, the operation itself, a cache of keys and values, and one multi-head layer.

Masks are bool and say True where a query may attend, as in
`torch.nn.functional.scaled_dot_product_attention`. A query that may attend to nothing gives zeros.
Follows Vaswani et al. (2017, "Attention Is All You Need"), with the grouped key and value heads of
Ainslie et al. (2023), the window of Jiang et al. (2023, "Mistral 7B"), a bias of the scores (T5, ALiBi)
and hooks for rotary positions and for normalised queries and keys.

Left out: a cache that rolls with the window or grows, kernels of our own.

Explained and proven in ch03_attention/02_self_attention.ipynb and
ch03_attention/03_multi_head_attention.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_dropout, check_sizes, require, whole_number


def causal_mask(
    n_queries: int, n_keys: int | None = None, window: int | None = None, device: torch.device | None = None
) -> Tensor:
    """Return a bool mask (n_queries, n_keys), True where a query may attend: to itself and to earlier positions.

    The queries are the last `n_queries` of `n_keys` positions, as when earlier keys come from a cache; `n_keys` is
    `n_queries` if not given. With `window`, a query sees at most that many positions, its own included.
    Raises ValueError if `n_queries` is not in 1 to `n_keys` or `window` is below 1, TypeError if one is no int.
    """
    n_keys = n_queries if n_keys is None else n_keys
    sizes = {"n_queries": n_queries, "n_keys": n_keys, "window": 1 if window is None else window}
    check_sizes(**{name: size for name, size in sizes.items() if not isinstance(size, torch.SymInt)})
    if n_queries > n_keys:
        raise ValueError(f"n_queries must be between 1 and n_keys={n_keys}, got {n_queries}")
    query_positions = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key_positions = torch.arange(n_keys, device=device)
    allowed = key_positions <= query_positions  # (n_queries, n_keys)
    if window is not None:
        allowed &= key_positions > query_positions - window
    return allowed


def check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Refuse a mask that is not bool (TypeError) or does not broadcast to `shape` (ValueError).

    Three dimensions are refused where `shape` has four: (batch, queries, keys) would be taken for
    (heads, queries, keys) without a word whenever the sizes allow it.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, True where a query may attend, got {mask.dtype}")
    if not _broadcasts(mask, shape) or (len(shape) == 4 and mask.dim() == 3):
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got {tuple(mask.shape)}")


def check_bias(name: str, bias: Tensor, shape: Sequence[int]) -> None:
    """Refuse a bias of scores that is not float (TypeError) or does not broadcast to `shape` (ValueError)."""
    if not bias.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, added to the scores, got {bias.dtype}")
    if not _broadcasts(bias, shape):
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got {tuple(bias.shape)}")


def _broadcasts(x: Tensor, shape: Sequence[int]) -> bool:
    sizes = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    return len(sizes) == len(shape) and all(a in (1, b) for a, b in zip(sizes, shape, strict=True))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix the values by how well their keys match each query: softmax(Q K^T / sqrt(d_k)) V.

    Equation 1 of Vaswani et al. (2017), with every step and the weights in the open. A query that may attend
    to nothing gets zeros, as in `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (..., queries, d_k).
        key: (..., keys, d_k).
        value: (..., keys, d_v).
        attention_mask: Bool, broadcastable to (..., queries, keys), True where the query may attend.
        dropout: Probability of dropping a weight; the others are divided by 1 - dropout.
        score_bias: Finite numbers, broadcastable to (..., queries, keys), added to the scaled scores.

    Returns:
        The outputs (..., queries, d_v) and the weights (..., queries, keys) as applied, dropout included.

    Raises:
        ValueError: The sizes of query, key, value, mask or bias do not fit, or dropout is not in [0, 1).
        TypeError: The mask is not bool, or the bias not float.
    """
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query (.., Q, d_k), key (.., K, d_k), value (.., K, d_v) do not fit: {shapes}")
    check_dropout(dropout)
    # Scores need 32 bits even where the numbers have 16; the query is scaled first, or they could overflow.
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) / math.sqrt(query.shape[-1])) @ key.to(wide).transpose(-2, -1)
    if score_bias is not None:
        check_bias("score_bias", score_bias, scores.shape)
        scores = scores + score_bias
    if attention_mask is None:
        weights = scores.softmax(dim=-1)
    else:
        check_mask("attention_mask", attention_mask, scores.shape)
        # A row of nothing but -inf would be NaN: such rows keep their scores and are set to zero afterwards.
        empty = ~attention_mask.any(dim=-1, keepdim=True)
        weights = scores.masked_fill(~attention_mask & ~empty, -math.inf).softmax(dim=-1)
        weights = weights.masked_fill(empty, 0.0)
    weights = F.dropout(weights.to(value.dtype), dropout)
    return weights @ value, weights


class KeyValueCache:
    """The keys and values of up to `max_length` tokens of one attention layer; `length` says how many it holds.

    The buffers (batch, n_kv_heads, max_length, head_dim) are allocated once, at the first `append`, in the type and
    on the device of what is appended. It serves inference: no gradients pass through it.
    Raises ValueError if `max_length` is below 1.
    """

    def __init__(self, max_length: int) -> None:
        check_sizes(max_length=max_length)
        self.max_length = max_length
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (batch, n_kv_heads, tokens, head_dim) and return `contents()`.

        Raises ValueError if there is no room for them, they require gradients, or shape or type do not fit.
        """
        if keys.dim() != 4 or not keys.shape[2]:
            raise ValueError(f"keys must be (batch, n_kv_heads, tokens, head_dim), got {tuple(keys.shape)}")
        if values.shape != keys.shape or values.dtype != keys.dtype:
            found = f"{values.dtype} {tuple(values.shape)}"
            raise ValueError(f"values must be {keys.dtype} {tuple(keys.shape)} as the keys, got {found}")
        if keys.requires_grad or values.requires_grad:
            raise ValueError("a cache stores no gradients: run the model under torch.no_grad()")
        n_new, end = keys.shape[2], self.length + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"{self.length} + {n_new} tokens exceed max_length={self.max_length}")
        shape = (*keys.shape[:2], self.max_length, keys.shape[3])
        held, wanted = self._keys, (shape, keys.dtype, keys.device)
        if held is None or (held.shape, held.dtype, held.device) != wanted:
            if self.length:
                allowed, found = (f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (held, keys))
                raise ValueError(f"keys must fit the buffers, {allowed}, got {found}")
            self._keys, self._values = keys.new_zeros(shape), values.new_zeros(shape)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self.contents()

    def contents(self) -> tuple[Tensor, Tensor]:
        """Return views (batch, n_kv_heads, length, head_dim) of keys and values; ValueError if there are none."""
        if self.length == 0:
            raise ValueError("the cache is empty")
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Forget every token after the first `length`. Raises ValueError if the cache holds fewer."""
        length = whole_number("length", length, 0)
        require("length", length, length <= self.length, f"between 0 and the stored {self.length}")
        self.length = length

    def reset(self) -> None:
        """Forget everything and keep the buffers."""
        self.length = 0

    def reorder(self, rows: Tensor) -> None:
        """Make sequence `rows[i]` of the batch the new sequence `i`: for beam search, or to drop finished ones.

        Raises ValueError if the cache is empty or `rows` is not an int64 tensor (new batch,) of valid indices.
        """
        batch = self.contents()[0].shape[0]
        if rows.dim() != 1 or rows.dtype != torch.int64 or not ((rows >= 0) & (rows < batch)).all():
            raise ValueError(f"rows must be int64 (new batch,) with values below {batch}, got {rows}")
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)

    @property
    def n_bytes(self) -> int:
        """Memory of the buffers in bytes: 0 before the first `append`."""
        return 0 if self._keys is None else self._keys.nbytes + self._values.nbytes


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017).

    Self-attention unless `kv_dim` is given, then cross-attention to a source of that width. Self-attention has one
    fused projection `qkv`, whose rows are the query heads, the key heads and the value heads in this order;
    cross-attention has `query` and `key_value`. Both close with `output`.

    Args:
        emb_dim: Width of the input and of the output.
        n_heads: Number of query heads.
        n_kv_heads: Number of key and value heads, each serving n_heads / n_kv_heads query heads
            (grouped-query attention, Ainslie et al., 2023; 1 is multi-query attention); `n_heads` if not given.
        head_dim: Width of a head; emb_dim / n_heads if not given.
        dropout: Probability of dropping an attention weight during training.
        qkv_bias, out_bias: Whether the projections to queries, keys and values, or to the output, have a bias.
        causal: Whether a token sees only itself and earlier tokens.
        rotary: Called as rotary(x, positions) on queries and keys, x (batch, heads, tokens, head_dim),
            positions int64 (tokens,) or (batch, tokens); it returns the rotated x.
        query_norm, key_norm: Applied to each query or key over head_dim, before the rotation.
        window: With `causal`, a token sees at most this many tokens, itself included.
        kv_dim: Width of the source of cross-attention.

    Raises:
        ValueError: Sizes do not divide, or options exclude each other.
    """

    def __init__(
        self,
        emb_dim: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        out_bias: bool = True,
        causal: bool = False,
        rotary: nn.Module | None = None,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
        window: int | None = None,
        kv_dim: int | None = None,
    ) -> None:
        super().__init__()
        # Sizes are checked one by one, then what must fit together.
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        given = {"emb_dim": emb_dim, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
        given |= {"head_dim": head_dim, "window": window, "kv_dim": kv_dim}
        check_sizes(**{name: size for name, size in given.items() if size is not None})
        if head_dim is None and emb_dim % n_heads:
            raise ValueError(f"emb_dim={emb_dim} is not divisible by n_heads={n_heads}; give head_dim")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads={n_heads} is not divisible by n_kv_heads={n_kv_heads}")
        check_dropout(dropout)
        if window is not None and not causal:
            raise ValueError(f"window={window} needs causal=True")
        if kv_dim is not None and (causal or rotary is not None):
            raise ValueError("cross-attention (kv_dim) takes neither causal nor rotary")
        # What the forward pass asks for.
        self.emb_dim, self.kv_dim = emb_dim, kv_dim
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim = emb_dim // n_heads if head_dim is None else head_dim
        self.dropout, self.causal, self.window = dropout, causal, window
        self.rotary, self.query_norm, self.key_norm = rotary, query_norm, key_norm
        # One projection where queries, keys and values come from the same vectors, two where they do not.
        query_dim, key_value_dim = n_heads * self.head_dim, 2 * n_kv_heads * self.head_dim
        if kv_dim is None:
            self.qkv = nn.Linear(emb_dim, query_dim + key_value_dim, bias=qkv_bias)
        else:
            self.query = nn.Linear(emb_dim, query_dim, bias=qkv_bias)
            self.key_value = nn.Linear(kv_dim, key_value_dim, bias=qkv_bias)
        self.output = nn.Linear(query_dim, emb_dim, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from `x` to itself or to `context`; where masks leave a token nothing, its heads give zeros.

        Args:
            x: (batch, tokens, emb_dim).
            context: (batch, source tokens, kv_dim) of cross-attention; None once a cache holds its keys and values.
            key_padding_mask: Bool (batch, keys), True for real tokens; with a cache, for cached tokens too.
            attention_mask: Bool, broadcastable to (batch, n_heads, tokens, keys), True where a token may attend; it
                comes on top of `causal`, `window` and `key_padding_mask`. (batch, tokens, keys) is refused.
            score_bias: Float, broadcastable to (batch, n_heads, tokens, keys) and finite: added to the scaled scores.
            positions: int64 (tokens,) or (batch, tokens), for `rotary`; by default they count on from the cache.
            cache: Causal self-attention appends to it; cross-attention fills it once and reads it afterwards.
            need_weights: Also return the weights, by an explicit and slower computation of the same numbers.

        Returns:
            (batch, tokens, emb_dim), and with `need_weights` the weights (batch, n_heads, tokens, keys).

        Raises:
            ValueError: A shape does not fit, the cache is full, or self-attention that is not causal is given one.
            TypeError: A mask is not bool, or the bias not float.
        """
        n_keys = self._check(x, context, positions, cache)
        if score_bias is not None:
            check_bias("score_bias", score_bias, (x.shape[0], self.n_heads, x.shape[1], n_keys))
        explicit = need_weights or score_bias is not None  # the mask is needed as a tensor
        mask, is_causal = self._mask(x, n_keys, key_padding_mask, attention_mask, explicit)
        query, key, value = self._project(x, context, positions, cache)
        dropout = self.dropout if self.training else 0.0
        n_shared = self.n_heads // self.n_kv_heads
        if need_weights:
            key, value = key.repeat_interleave(n_shared, dim=1), value.repeat_interleave(n_shared, dim=1)
            heads, weights = scaled_dot_product_attention(query, key, value, mask, dropout, score_bias)
        else:
            if score_bias is not None:  # the kernel adds a mask of numbers to the scores
                bias = score_bias.to(query.dtype)[(None,) * (4 - score_bias.dim())]
                mask = bias if mask is None else torch.where(mask, bias, -math.inf)
            heads = F.scaled_dot_product_attention(
                query, key, value, mask, dropout, is_causal=is_causal, enable_gqa=n_shared > 1
            )
        output = self.output(heads.transpose(1, 2).flatten(2))  # heads side by side: (batch, tokens, emb_dim)
        return (output, weights) if need_weights else output

    def _check(
        self, x: Tensor, context: Tensor | None, positions: Tensor | None, cache: KeyValueCache | None
    ) -> int:
        """Refuse inputs that do not fit, before anything is computed or cached; return the number of keys."""
        if x.dim() != 3 or x.shape[2] != self.emb_dim or not x.shape[1]:
            raise ValueError(f"x must be (batch, tokens, emb_dim={self.emb_dim}), got {tuple(x.shape)}")
        batch, n_tokens = x.shape[:2]
        if positions is not None and tuple(positions.shape) not in ((n_tokens,), (batch, n_tokens)):
            wanted = f"({n_tokens},) or ({batch}, {n_tokens})"
            raise ValueError(f"positions must be {wanted}, got {tuple(positions.shape)}")
        n_cached = 0 if cache is None else cache.length
        if n_cached and cache.contents()[0].shape[0] != batch:
            raise ValueError(f"the cache holds {cache.contents()[0].shape[0]} sequences, x has {batch}")
        if self.kv_dim is None:
            if context is not None:
                raise ValueError("context needs cross-attention: build MultiHeadAttention with kv_dim")
            if cache is not None and not self.causal:
                raise ValueError("a cache needs causal=True: else a new token changes earlier outputs")
            return n_cached + n_tokens
        if context is None:
            if not n_cached:
                raise ValueError("cross-attention needs context, or a cache that holds its keys and values")
            return n_cached
        if n_cached:
            raise ValueError(f"context must be None: the cache holds {n_cached} tokens of one; or reset it")
        if context.dim() != 3 or context.shape[::2] != (batch, self.kv_dim) or not context.shape[1]:
            raise ValueError(f"context must be ({batch}, keys, {self.kv_dim}), got {tuple(context.shape)}")
        return context.shape[1]

    def _mask(
        self, x: Tensor, n_keys: int, padding: Tensor | None, attention_mask: Tensor | None, explicit: bool
    ) -> tuple[Tensor | None, bool]:
        """Combine all masks into one or none, and say whether the kernel is to add the causal one."""
        batch, n_queries = x.shape[:2]
        masks = []
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, (batch, self.n_heads, n_queries, n_keys))
            masks.append(torch.atleast_2d(attention_mask))  # fewer the kernel does not take
        if padding is not None:
            if padding.shape != (batch, n_keys):
                raise ValueError(f"key_padding_mask must be {(batch, n_keys)}, got {tuple(padding.shape)}")
            check_mask("key_padding_mask", padding, (batch, n_keys))
            masks.append(padding[:, None, None, :])
        cut = self.window is not None and self.window < n_keys
        if self.causal and (n_queries > 1 or cut):  # without a window, a single newest token sees everything
            # The kernel's own causal mask has no offset: it is right only when nothing comes from a cache.
            if not (masks or cut or explicit) and n_queries == n_keys:
                return None, True
            masks.append(causal_mask(n_queries, n_keys, self.window, x.device))
        return (reduce(torch.logical_and, masks) if masks else None), False

    def _project(
        self, x: Tensor, context: Tensor | None, positions: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (batch, heads, tokens, head_dim), those of the cache included."""
        stored = self.kv_dim is not None and cache is not None and cache.length > 0
        if self.kv_dim is None:
            sizes = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
            query, key, value = self._split(self.qkv(x)).split(sizes, dim=1)
        else:
            query = self._split(self.query(x))
            key, value = cache.contents() if stored else self._split(self.key_value(context)).chunk(2, dim=1)
        if self.query_norm is not None:
            query = self.query_norm(query)
        if self.key_norm is not None and not stored:
            key = self.key_norm(key)
        if self.rotary is not None:
            if positions is None:
                n_cached = 0 if cache is None else cache.length
                positions = torch.arange(n_cached, n_cached + x.shape[1], device=x.device)
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        if cache is not None and not stored:
            key, value = cache.append(key, value)
        return query, key, value

    def _split(self, projected: Tensor) -> Tensor:
        """(batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
