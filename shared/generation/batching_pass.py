"""One pass of a model over pieces of many texts, whose keys and values lie in one storage.

All tokens that are read now stand in one list, whoever they belong to; only attention parts them. So
texts of different lengths need no padding, and a prompt can be read beside texts that are being written.

Left out: caches in pages, kernels of our own, models other than `GPTModel`.

Follows Yu et al. (2022, "Orca", selective batching).

Explained and proven in deployment/03_web_service.ipynb; written from there by `make promote`.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.checks import check_sizes, require
from shared.generation.decode_step import as_function
from shared.model.attention import MultiHeadAttention, causal_mask
from shared.model.gpt import GPTModel
from shared.model.layers import TransformerBlock


@dataclass(frozen=True)
class Piece:
    """Tokens of one text that the model reads next.

    Attributes:
        row: The row of the cache that belongs to the text.
        start: How many tokens of the text the row holds already.
        tokens: The ids to read now, at least one.
        needs_logits: Whether the logits after the last of them are wanted.
    """

    row: int
    start: int
    tokens: Sequence[int]
    needs_logits: bool = True

    @property
    def end(self) -> int:
        """How many tokens of the text the row holds afterwards."""
        return self.start + len(self.tokens)


class CacheRows:
    """Keys and values of several texts, a row each, in one storage that is allocated once.

    Memory is taken by the pages that have been written to, not by the whole storage.

    Args:
        model: Whose keys and values they are.
        n_rows: Most texts at a time.
        max_length: Most tokens of a text.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, model: GPTModel, n_rows: int, max_length: int) -> None:
        check_sizes(n_rows=n_rows, max_length=max_length)
        config, self.n_rows, self.max_length = model.config, n_rows, max_length
        heads = config.n_kv_heads or config.n_heads
        shape = (config.n_layers, 2, n_rows, max_length, heads, config.actual_head_dim)
        weight = next(p for p in model.parameters() if p.is_floating_point())
        self.storage = untouched_zeros(shape, weight.dtype, weight.device)
        self._flat = self.storage.flatten(4).flatten(
            2, 3
        )  # (n_layers, 2, n_rows * max_length, heads * head_dim)

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (tokens, heads, head_dim); token i of row r has the place r * max_length + i."""
        for stored, new in zip(self._flat[layer], (keys, values), strict=True):
            stored.index_copy_(0, places, new.flatten(1))

    def read(self, layer: int, rows: slice, length: int) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values of neighbouring rows, views (rows, heads, length, head_dim)."""
        keys, values = self.storage[layer, :, rows, :length].transpose(2, 3)
        return keys, values

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` tokens of row `source`, in all layers."""
        self.storage[:, :, target, :length] = self.storage[:, :, source, :length]


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on the CPU their memory is taken page by page, where they are written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # the system promises zeros
    return torch.frombuffer(pages, dtype=dtype).view(shape)


# A call of attention costs about as much as reading this many keys for nothing (1 thread, heads of 64).
CALL_COST = 256


def group_pieces(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Cut pieces, sorted by row, into groups for one call of attention each.

    A group is one piece, or neighbouring rows that read one token each. They are padded to the longest, so a row joins
    only while the keys that are read for nothing cost less than a call of its own.
    """
    groups: list[list[Piece]] = []
    wasted = longest = 0
    for piece in pieces:
        last = groups[-1][-1] if groups else None
        if last and last.row + 1 == piece.row and len(last.tokens) == len(piece.tokens) == 1:
            added = abs(longest - piece.end) * (1 if piece.end <= longest else len(groups[-1]))
            if wasted + added <= CALL_COST * len(groups[-1]):
                groups[-1].append(piece)
                wasted, longest = wasted + added, max(longest, piece.end)
                continue
        groups.append([piece])
        wasted, longest = 0, piece.end
    return groups


def group_mask(group: Sequence[Piece], window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys each query of a group may see, bool (rows, 1, 1, keys) or (queries, keys); None is all."""
    length, n = max(piece.end for piece in group), len(group[0].tokens)
    if n > 1:
        return causal_mask(n, length, window, device)
    is_cut = window is not None and length > window
    if not is_cut and all(piece.end == length for piece in group):
        return None
    ends = torch.tensor([piece.end for piece in group], device=device)[:, None]
    keys = torch.arange(length, device=device)
    allowed = keys < ends  # (rows, keys)
    if window is not None:
        allowed &= keys >= ends - window
    return allowed[:, None, None]


class BatchedPass:
    """One pass of a model over pieces of several texts: all of its matrix products see all tokens at once.

    The model must be in evaluation mode, a call be made without gradients. The weights are looked up once: build a new
    one after a part of the model has been replaced.

    Raises:
        ValueError: The model is no `GPTModel` of plain blocks.
    """

    def __init__(self, model: GPTModel, cache: CacheRows) -> None:
        is_known = isinstance(model, GPTModel) and all(
            type(block) is TransformerBlock and type(block.attention) is MultiHeadAttention
            for block in model.blocks
        )
        require("model", type(model).__name__, is_known, "a GPTModel with its own blocks and attention")
        self.model, self.cache = model, cache
        self.window = model.blocks[0].attention.window
        self.layers = []
        for block in model.blocks:
            parts = (block.attention_norm, block.feed_forward_norm, block.feed_forward)
            parts += (block.attention.qkv, block.attention.output)
            self.layers.append((block, *map(as_function, parts)))
        self.final_norm, self.head = as_function(model.final_norm), as_function(model.output_head)

    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        """Read the pieces, no two of one row; return the logits (pieces that need them, vocab_size), in their order."""
        device = self.cache.storage.device
        ordered = sorted(pieces, key=lambda piece: piece.row)
        # All tokens in one list, each with its position in its text and its place in the cache.
        ids = torch.tensor([[token for piece in ordered for token in piece.tokens]], device=device)
        places = [(piece.row, i) for piece in ordered for i in range(piece.start, piece.end)]
        rows, positions = torch.tensor(places, device=device).T
        # What attention does is the same in all layers, so it is planned once.
        groups = group_pieces(ordered)
        plan = [(group, group_mask(group, self.window, device)) for group in groups]
        # The layers; all but attention treat each token by itself.
        x = self.model.token_embedding(ids)  # (1, tokens, emb_dim)
        if (added := self.model.position_embedding) is not None:
            x = x + added(positions).to(x.dtype)
        places = rows * self.cache.max_length + positions
        for number, (block, norm, second_norm, feed_forward, qkv, output) in enumerate(self.layers):
            if block.pre_norm:
                x = x + output(self._attend(number, qkv(norm(x)), positions, places, plan))
                x = x + feed_forward(second_norm(x))
            else:
                x = norm(x + output(self._attend(number, qkv(x), positions, places, plan)))
                x = second_norm(x + feed_forward(x))
        # Logits only where they are wanted: the output head is the largest matrix of all.
        ends = accumulate(len(piece.tokens) for piece in ordered)
        last = {piece.row: end - 1 for piece, end in zip(ordered, ends, strict=True)}
        wanted = [last[piece.row] for piece in pieces if piece.needs_logits]
        return self.head(self.final_norm(x[:, wanted]))[0]

    def _attend(
        self,
        number: int,
        projected: Tensor,
        positions: Tensor,
        places: Tensor,
        plan: list[tuple[list[Piece], Tensor | None]],
    ) -> Tensor:
        """Return the mixed values (1, tokens, n_heads * head_dim) of queries, keys and values in `projected`."""
        attention = self.model.blocks[number].attention
        n_heads, n_kv_heads, width = attention.n_heads, attention.n_kv_heads, attention.head_dim
        # Queries and keys are normalized and turned by their positions, each only where the model does so.
        heads = projected.unflatten(2, (-1, width)).transpose(1, 2)  # (1, heads, tokens, head_dim)
        turned, value = heads.split((n_heads + n_kv_heads, n_kv_heads), dim=1)
        if attention.query_norm is not None or attention.key_norm is not None:
            norms = (attention.query_norm, attention.key_norm)
            parts = turned.split((n_heads, n_kv_heads), dim=1)
            turned = torch.cat(
                [norm(part) if norm else part for norm, part in zip(norms, parts, strict=True)], dim=1
            )
        if attention.rotary is not None:
            turned = attention.rotary(turned, positions)
        query, key, value = (
            part[0].transpose(0, 1)  # (tokens, heads, head_dim)
            for part in (*turned.split((n_heads, n_kv_heads), dim=1), value)
        )
        self.cache.write(number, places, key, value)
        # One call for each group: its queries see the keys of their own rows only.
        mixed, begin = [], 0
        for group, mask in plan:
            n_rows, n = len(group), len(group[0].tokens)
            rows, length = slice(group[0].row, group[-1].row + 1), max(piece.end for piece in group)
            keys, values = self.cache.read(number, rows, length)
            own = query[begin : begin + n_rows * n]
            begin += n_rows * n
            if n == 1:  # the heads that share a key stand side by side, as if they were several queries
                own = own.reshape(n_rows, n_kv_heads, -1, width)
                found = F.scaled_dot_product_attention(own, keys, values, mask)
                mixed.append(found.reshape(n_rows, n_heads * width))
            else:
                own = own.transpose(0, 1)[None]  # (1, n_heads, n, head_dim)
                found = F.scaled_dot_product_attention(
                    own, keys, values, mask, enable_gqa=n_heads > n_kv_heads
                )
                mixed.append(found[0].transpose(0, 1).flatten(1))
        return torch.cat(mixed)[None]
