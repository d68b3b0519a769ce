"""Ways to tell a model where a token stands: added to the embedding (learned, sinusoidal), added to
attention scores (T5's buckets, ALiBi), or rotating queries and keys (rotary).

Modules take positions as int64 tensors, so that a cache, padding or packing can choose them. A position
outside the table raises ValueError on the CPU. On a GPU it is the device's own assertion that stops the
program: to check there would make the CPU wait for the GPU in every layer.

Follows Vaswani et al. (2017, section 3.5), Raffel et al. (2020, section 2.1), Press et al. (2022, "Train
Short, Test Long") and Su et al. (2021, "RoFormer").

Left out: rotation of a part of each head (GPT-J, GPT-NeoX), two-dimensional positions, frequencies that
depend on the length of the input (they can be passed in).

Explained and proven in ch02_text_data/05_embeddings.ipynb and ch03_attention/04_positions_in_attention.ipynb
and ch04_gpt/01_building_blocks.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_sizes, require


def rows_at(positions: Tensor, table: Tensor) -> Tensor:
    """Return the rows of `table` (context_length, width) at int64 positions of any shape: (..., width).

    Raises TypeError for another type of positions, and on the CPU ValueError for one that has no row.
    """
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"positions must be int64, got {positions.dtype}")
    try:
        return F.embedding(positions, table)
    except IndexError:
        outside = positions[(positions < 0) | (positions >= len(table))]
        raise ValueError(
            f"position {int(outside[0])} is outside 0 to {len(table) - 1}: context_length is {len(table)}"
        ) from None


class LearnedPositions(nn.Module):
    """A trained vector for each position, as in GPT-2 and BERT; add it to the token embedding.

    Args:
        context_length: Number of positions; there is nothing beyond them.
        emb_dim: Width of a vector.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, context_length: int, emb_dim: int) -> None:
        super().__init__()
        check_sizes(context_length=context_length, emb_dim=emb_dim)
        self.weight = nn.Parameter(torch.empty(context_length, emb_dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors of positions (tokens,) or (batch, tokens), int64: (..., tokens, emb_dim).

        Raises ValueError if a position has no vector."""
        return rows_at(positions, self.weight)


def sinusoidal_positions(context_length: int, emb_dim: int, base: float = 10000.0) -> Tensor:
    """Return the table of Vaswani et al. (2017, section 3.5), float32 (context_length, emb_dim).

    Sines stand in the even columns and cosines in the odd ones: column pair m turns by base ** (-2 m / emb_dim)
    radians at each position. Raises ValueError if a size is below 1, `emb_dim` is odd or `base` not above 1.
    """
    check_sizes(context_length=context_length, emb_dim=emb_dim)
    if emb_dim % 2:
        raise ValueError(f"emb_dim must be even, for pairs of sine and cosine; got {emb_dim}")
    require("base", base, base > 1, "above 1")
    frequencies = base ** (-torch.arange(0, emb_dim, 2).double() / emb_dim)  # (emb_dim / 2,)
    angles = torch.arange(context_length).double()[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()


class ComputedTable(nn.Module):
    """A table that is computed, not trained: it is not stored, and its float32 numbers never change.

    Whatever becomes of the model around it (cast, `to_empty`, built on "meta", `load_state_dict(assign=True)`), `table`
    changes its device at most. As `assign=True` tells no module of the new device, lookups go through `table_on`.

    Args:
        compute: Returns the table; called once, on the CPU.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        device = torch.get_default_device()
        with torch.device("cpu"):  # on "meta" there would be no numbers
            self.register_buffer("table", compute(), persistent=False)
        self.table_on(device)

    def table_on(self, device: torch.device) -> Tensor:
        """Return the table on this device and keep it there; "meta" gets a stand-in, and the numbers stay."""
        if self.table.device == device:
            return self.table
        moved = self.table.to(device)
        if not moved.is_meta:
            self.table = moved
        return moved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ComputedTable":
        """Follow a move. torch would hand the table to `fn`, which may also round it or empty it."""
        self.table_on(fn(self.table.new_empty(0)).device)
        return self


class SinusoidalPositions(ComputedTable):
    """The table of `sinusoidal_positions` with the interface of `LearnedPositions`, and nothing to train or to store.

    Its vectors are float32: cast them to the type of what they are added to.

    Args:
        context_length: Number of positions; any number, as they cost memory only.
        emb_dim: Width of a vector, even.

    Raises:
        ValueError: A size is below 1, or `emb_dim` is odd.
    """

    def __init__(self, context_length: int, emb_dim: int) -> None:
        super().__init__(partial(sinusoidal_positions, context_length, emb_dim))

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors of positions (tokens,) or (batch, tokens), int64: (..., tokens, emb_dim).

        Raises ValueError if a position is negative or not below `context_length`."""
        return rows_at(positions, self.table_on(positions.device))


def relative_position_bucket(
    relative: Tensor, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """Return T5's bucket of each relative position (key position - query position), int64 of the same shape.

    Half of the buckets of a direction are single distances, the others grow like a logarithm up to `max_distance`;
    all larger distances share the last. With `bidirectional`, the second half of the numbers is for keys after the
    query; without, all keys after the query share bucket 0 with the query itself.
    Raises ValueError if there are too few or an odd number of buckets, or `max_distance` lies within the exact ones.
    """
    check_sizes(n_buckets=n_buckets, max_distance=max_distance)
    if n_buckets < (4 if bidirectional else 2) or (bidirectional and n_buckets % 2):
        raise ValueError(
            f"n_buckets must be at least 2, or even and at least 4 if bidirectional, got {n_buckets}"
        )
    n_side = n_buckets // 2 if bidirectional else n_buckets
    n_exact = n_side // 2
    if max_distance <= n_exact:
        raise ValueError(f"max_distance must be above the {n_exact} exact distances, got {max_distance}")
    distance = relative.abs() if bidirectional else (-relative).clamp(min=0)
    # float32 and this order of operations, as in T5: the edges of buckets then fall where its weights expect them.
    growth = torch.log(distance.clamp(min=n_exact).float() / n_exact) / math.log(max_distance / n_exact)
    coarse = (n_exact + (growth * (n_side - n_exact)).long()).clamp(max=n_side - 1)
    bucket = torch.where(distance < n_exact, distance, coarse)
    return bucket + n_side * (relative > 0) if bidirectional else bucket


def alibi_slopes(n_heads: int) -> Tensor:
    """Return ALiBi's slope of each head, float32 (n_heads,): 2 ** (-8 h / n_heads), h = 1 ... n_heads.

    If `n_heads` is no power of 2, the slopes of the power below come first, then every other one of the power
    above, as in the authors' program. Raises ValueError if `n_heads` is below 1.
    """
    check_sizes(n_heads=n_heads)
    n_first = 2 ** (n_heads.bit_length() - 1)
    first = [2.0 ** (-8 * h / n_first) for h in range(1, n_first + 1)]
    rest = [2.0 ** (-4 * h / n_first) for h in range(1, 2 * (n_heads - n_first), 2)]
    return torch.tensor(first + rest)


def _relative(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """(..., queries), (..., keys) -> key position - query position, (..., queries, keys)."""
    for name, positions in (("query_positions", query_positions), ("key_positions", key_positions)):
        if positions.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64, got {positions.dtype}")
        if positions.dim() not in (1, 2):
            raise ValueError(f"{name} must be (tokens,) or (batch, tokens), got {tuple(positions.shape)}")
    return key_positions[..., None, :] - query_positions[..., :, None]


class RelativePositionBias(nn.Module):
    """T5's trained number for each head and bucket of distances; add it to attention scores before the softmax.

    `weight` is (n_buckets, n_heads), as `relative_attention_bias.weight` of T5 in transformers.

    Args:
        n_heads: Attention heads.
        n_buckets: Buckets, for both directions together.
        max_distance: Distances from here on share a bucket.
        bidirectional: Whether keys after the query count (an encoder) or not (a decoder).

    Raises:
        ValueError: A size does not fit: see `relative_position_bucket`.
    """

    def __init__(
        self, n_heads: int, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        check_sizes(n_heads=n_heads)
        self.buckets = {"n_buckets": n_buckets, "max_distance": max_distance, "bidirectional": bidirectional}
        relative_position_bucket(torch.arange(1), **self.buckets)  # refuses what does not fit
        self.weight = nn.Parameter(torch.empty(n_buckets, n_heads))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return the bias (n_heads, queries, keys), with a batch dimension in front if the positions have one.

        Positions are int64 (tokens,) or (batch, tokens), of any size."""
        bucket = relative_position_bucket(_relative(query_positions, key_positions), **self.buckets)
        return F.embedding(bucket, self.weight).movedim(-1, -3)  # (..., heads, queries, keys)


class AlibiBias(ComputedTable):
    """ALiBi's penalty -slope * distance for each head, with nothing to train; add it before the softmax.

    The slopes are the `table`; the penalty is float32.
        Keys after the query are penalised alike, which matters only where no causal mask hides them.
    Raises ValueError if `n_heads` is below 1.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__(partial(alibi_slopes, n_heads))

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return the bias (n_heads, queries, keys), with a batch dimension in front if the positions have one.

        Positions are int64 (tokens,) or (batch, tokens), of any size."""
        distance = _relative(query_positions, key_positions).abs().unsqueeze(-3)  # (..., 1, queries, keys)
        return self.table_on(distance.device)[:, None, None] * -distance


def rotary_inverse_frequencies(head_dim: int, base: float = 10000.0) -> Tensor:
    """Return the radians each pair turns per position, float32 (head_dim / 2,): base ** (-2 m / head_dim).

    Raises ValueError if `head_dim` is odd or below 2, or `base` not above 1.
    """
    check_sizes(head_dim=head_dim)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, for pairs to rotate; got {head_dim}")
    require("base", base, base > 1, "above 1")
    return 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)


class RotaryPositions(ComputedTable):
    """Rotary position embedding (Su et al., 2021): turns queries and keys so that scores see distances only.

    Call it on queries and on keys, never on values. Number m of a head is paired with number m + head_dim / 2, as in
    Llama; with `interleaved`, numbers 2 m and 2 m + 1 are a pair, as in GPT-J. Nothing is trained or stored; the
    table, 8 * head_dim bytes a position, is computed in float32 and applied in the type of the input. Layers can
    share one module.

    Args:
        head_dim: Width of a head, even.
        context_length: Number of positions of the table.
        base: The larger, the slower the slowest pair turns.
        interleaved: Which numbers form a pair.
        inverse_frequencies: (head_dim / 2,), radians per position of each pair, in place of those of `base`: the hook
            for linear, NTK, Llama 3's and YaRN's scaling.
        attention_factor: Multiplies the result, as YaRN does; scores grow with its square.

    Raises:
        ValueError: A size is below 1, `head_dim` is odd, `inverse_frequencies` has another shape, or
            `attention_factor` is not above 0.
    """

    def __init__(
        self,
        head_dim: int,
        context_length: int,
        base: float = 10000.0,
        interleaved: bool = False,
        inverse_frequencies: Tensor | None = None,
        attention_factor: float = 1.0,
    ) -> None:
        check_sizes(head_dim=head_dim, context_length=context_length)
        require("attention_factor", attention_factor, 0 < attention_factor < math.inf, "above 0 and finite")

        def compute() -> Tensor:
            frequencies = rotary_inverse_frequencies(head_dim, base)
            if inverse_frequencies is not None:
                wanted, found = tuple(frequencies.shape), tuple(inverse_frequencies.shape)
                require("inverse_frequencies", found, found == wanted, f"(head_dim / 2,) = {wanted}")
                frequencies = inverse_frequencies.detach().cpu().float()
            # One row of angles a position, (context_length, head_dim / 2).
            angles = torch.arange(context_length).float()[:, None] * frequencies
            cosine, sine = angles.cos() * attention_factor, angles.sin() * attention_factor
            if interleaved:
                parts = [torch.stack(pair, dim=-1).flatten(1) for pair in ((cosine, cosine), (-sine, sine))]
            else:
                parts = [cosine, cosine, -sine, sine]
            # One row holds both factors of each number, its own and its partner's: one lookup fetches them.
            return torch.cat(parts, dim=1)  # (context_length, 2 head_dim)

        super().__init__(compute)
        self.head_dim, self.interleaved = head_dim, interleaved

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return `x` rotated by its positions; shape and type stay.

        Args:
            x: Queries or keys, (batch, heads, tokens, head_dim).
            positions: int64 (tokens,) or (batch, tokens).

        Raises:
            ValueError: A shape does not fit, or a position is negative or not below `context_length`.
        """
        if x.dim() != 4 or x.shape[3] != self.head_dim:
            raise ValueError(
                f"x must be (batch, heads, tokens, head_dim={self.head_dim}), got {tuple(x.shape)}"
            )
        batch, _, n_tokens, _ = x.shape
        if tuple(positions.shape) not in ((n_tokens,), (batch, n_tokens)):
            raise ValueError(
                f"positions must be ({n_tokens},) or {(batch, n_tokens)} for this x, got {tuple(positions.shape)}"
            )
        factors = rows_at(positions, self.table_on(x.device)).to(x.dtype)  # ([batch,] tokens, 2 head_dim)
        if positions.dim() == 2:
            factors = factors.unsqueeze(1)  # (batch, 1, tokens, 2 head_dim): the same for all heads
        own, partners = factors.chunk(2, dim=-1)
        if self.interleaved:
            partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            partner = x.roll(self.head_dim // 2, dims=-1)  # the halves change places
        return torch.addcmul(x * own, partner, partners)  # x * own + partner * partners


def scaled_rotary_frequencies(
    kind: str, head_dim: int, base: float, factor: float, original_length: int
) -> tuple[Tensor, float]:
    """Return `inverse_frequencies` (head_dim / 2,) and `attention_factor` of `RotaryPositions` for longer contexts.

    Args:
        kind: "none", "linear" (Chen et al., 2023, arXiv:2306.15595), "ntk" (a larger base), "yarn" (Peng et al.,
            2023, arXiv:2309.00071, with its limits of 32 turns and 1 turn), or "llama3" (Llama 3.1, with 4 and 1).
        head_dim: Width of a head, even.
        base: Base of the unscaled frequencies.
        factor: How many times longer the context becomes, at least 1.
        original_length: The context length of the training; "yarn" and "llama3" depend on it.

    Raises:
        ValueError: The kind is unknown, or a number is out of range.
    """
    frequencies = rotary_inverse_frequencies(head_dim, base)
    require("factor", factor, factor >= 1.0, "at least 1")
    check_sizes(original_length=original_length)
    if kind == "none":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "ntk":
        if head_dim < 4:
            raise ValueError(f"head_dim must be at least 4 for kind 'ntk', got {head_dim}")
        return rotary_inverse_frequencies(head_dim, base * factor ** (head_dim / (head_dim - 2))), 1.0
    if kind == "llama3":
        turns = original_length * frequencies / (2 * math.pi)  # of each pair within the original context
        kept = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / factor), 1.0
    if kind == "yarn":
        # The pair that makes n turns, from base ** (-2 m / head_dim) * original_length = 2 pi n.
        pair = lambda n: head_dim * math.log(original_length / (2 * math.pi * n)) / (2 * math.log(base))
        low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), head_dim - 1)
        slowed = ((torch.arange(head_dim // 2) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
        return frequencies * (1.0 - slowed + slowed / factor), 0.1 * math.log(factor) + 1.0
    raise ValueError(f"kind must be one of none, linear, ntk, llama3, yarn, got {kind!r}")
