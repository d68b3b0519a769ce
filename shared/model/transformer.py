"""The Transformer of Vaswani et al. (2017), encoder and decoder, and the blocks of its descendants.

Post-norm as in the paper or pre-norm (Xiong et al., 2020), with or without a last normalisation. Masks
are bool, True where a token is real or may be attended to. `Transformer` decodes with cached keys and
values and keeps them in the state that the decoders of shared/model/seq2seq.py select rows of.

Left out: dropout on attention weights and inside the feed-forward network (the paper names neither), loss
and learning rate (they are training's), relative positions (T5 has them in place of sinusoids).

Explained and proven in ch03_attention/05_transformer.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checks import check_choice, check_dropout, check_sizes
from shared.model.attention import KeyValueCache, MultiHeadAttention
from shared.model.positions import SinusoidalPositions
from shared.model.seq2seq import State

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class BlockConfig:
    """What the layers of a model have in common; the defaults are the base model of Vaswani et al. (2017).

    Attributes:
        emb_dim: Width of every vector between the layers (d_model).
        n_heads: Attention heads; they divide `emb_dim`.
        feed_forward_dim: Hidden units of the feed-forward network (d_ff).
        dropout: Probability of dropping a number of a sub-layer's output, and of the embeddings, during training.
        norm_first: Whether to normalise what a sub-layer reads (pre-norm) instead of the sum (post-norm).
        final_norm: Whether a stack ends with one more normalisation; None means exactly if `norm_first`.
        attention_bias: Whether attention's projections have biases; the paper's formulas have none.
        activation: "relu" as in the paper, or "gelu" as in BERT, GPT and ViT.

    Raises:
        ValueError: A value is not allowed.
        TypeError: A size is not an int.
    """

    emb_dim: int = 512
    n_heads: int = 8
    feed_forward_dim: int = 2048
    dropout: float = 0.1
    norm_first: bool = False
    final_norm: bool | None = None
    attention_bias: bool = False
    activation: str = "relu"

    def __post_init__(self) -> None:
        check_sizes(emb_dim=self.emb_dim, n_heads=self.n_heads, feed_forward_dim=self.feed_forward_dim)
        if self.emb_dim % self.n_heads:
            raise ValueError(f"emb_dim={self.emb_dim} is not divisible by n_heads={self.n_heads}")
        check_dropout(self.dropout)
        check_choice("activation", self.activation, ACTIVATIONS)

    def attention(self, **options: object) -> MultiHeadAttention:
        """Return a new attention layer of this width; `options` are those of `MultiHeadAttention`."""
        bias = self.attention_bias
        return MultiHeadAttention(self.emb_dim, self.n_heads, qkv_bias=bias, out_bias=bias, **options)

    def last_norm(self) -> nn.Module:
        """Return what a stack of layers ends with: a normalisation, or nothing."""
        wanted = self.norm_first if self.final_norm is None else self.final_norm
        return nn.LayerNorm(self.emb_dim) if wanted else nn.Identity()


class Residual(nn.Module):
    """The connection around a sub-layer: norm(x + f(x)) as in the paper, or x + f(norm(x)) with `norm_first`."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(config.emb_dim), nn.Dropout(config.dropout)
        self.norm_first = config.norm_first

    def forward(self, x: Tensor, sub_layer: Callable[[Tensor], Tensor]) -> Tensor:
        """Return x (batch, tokens, emb_dim) after the sub-layer, a function that keeps this shape."""
        if self.norm_first:
            return x + self.dropout(sub_layer(self.norm(x)))
        return self.norm(x + self.dropout(sub_layer(x)))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, for each token by itself (section 3.3)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.emb_dim, config.feed_forward_dim)
        self.contract = nn.Linear(config.feed_forward_dim, config.emb_dim)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, emb_dim) -> the same shape."""
        return self.contract(self.activation(self.expand(x)))


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each inside a `Residual` (section 3.1).

    With `causal` a token sees only itself and earlier ones: the layer of a decoder that has no encoder, as in GPT.
    """

    def __init__(self, config: BlockConfig, causal: bool = False) -> None:
        super().__init__()
        self.self_attention = config.attention(causal=causal)
        self.feed_forward = FeedForward(config)
        self.residuals = nn.ModuleList(Residual(config) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return (batch, tokens, emb_dim) for x of this shape; the options are those of `MultiHeadAttention`.

        Raises ValueError if a shape does not fit or a cache is given without `causal`; TypeError if a mask is not bool.
        """
        around_attention, around_feed_forward = self.residuals
        masks = {"key_padding_mask": key_padding_mask, "attention_mask": attention_mask}
        x = around_attention(x, lambda x: self.self_attention(x, cache=cache, **masks))
        return around_feed_forward(x, self.feed_forward)


class Encoder(nn.Module):
    """A stack of `n_layers` encoder layers; the options of `forward` are a layer's, with one cache for each.

    Raises ValueError if `n_layers` is below 1.
    """

    def __init__(self, config: BlockConfig, n_layers: int, causal: bool = False) -> None:
        super().__init__()
        check_sizes(n_layers=n_layers)
        self.layers = nn.ModuleList(EncoderLayer(config, causal) for _ in range(n_layers))
        self.norm = config.last_norm()

    def forward(self, x: Tensor, *, caches: Sequence | None = None, **masks: Tensor | None) -> Tensor:
        """(batch, tokens, emb_dim) -> the same shape. Raises ValueError if there is not one cache a layer."""
        for layer, cache in zip(self.layers, _one_each(caches, self.layers), strict=True):
            x = layer(x, cache=cache, **masks)
        return self.norm(x)


def _one_each(caches: Sequence | None, layers: nn.ModuleList) -> Sequence:
    if caches is not None and len(caches) != len(layers):
        raise ValueError(f"caches must hold one entry for each of {len(layers)} layers, got {len(caches)}")
    return [None] * len(layers) if caches is None else caches


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the memory and a feed-forward network (section 3.1)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.self_attention = config.attention(causal=True)
        self.cross_attention = config.attention(kv_dim=config.emb_dim)
        self.feed_forward = FeedForward(config)
        self.residuals = nn.ModuleList(Residual(config) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        *,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        memory_attention_mask: Tensor | None = None,
        caches: tuple[KeyValueCache, KeyValueCache] | None = None,
    ) -> Tensor:
        """Return (batch, tokens, emb_dim) for x of this shape.

        Args:
            x: Target (batch, tokens, emb_dim).
            memory: The encoder's output (batch, source tokens, emb_dim); None once the caches hold it.
            key_padding_mask: Bool (batch, tokens), True for real target tokens.
            attention_mask: Bool, broadcastable to (batch, n_heads, tokens, tokens), on top of causality.
            memory_padding_mask: Bool (batch, source tokens), True for real source tokens.
            memory_attention_mask: Bool, broadcastable to (batch, n_heads, tokens, source tokens).
            caches: Of self-attention and of cross-attention; the target's masks then cover cached tokens too.

        Raises ValueError if a shape does not fit or a cache is full, TypeError if a mask is not bool.
        """
        around_self, around_cross, around_feed_forward = self.residuals
        own, other = caches or (None, None)
        masks = {"key_padding_mask": key_padding_mask, "attention_mask": attention_mask}
        x = around_self(x, lambda x: self.self_attention(x, cache=own, **masks))
        cross = {"key_padding_mask": memory_padding_mask, "attention_mask": memory_attention_mask}
        x = around_cross(x, lambda x: self.cross_attention(x, memory, cache=other, **cross))
        return around_feed_forward(x, self.feed_forward)


class Decoder(nn.Module):
    """A stack of `n_layers` decoder layers; the options of `forward` are a layer's, with a pair of caches for each.

    Raises ValueError if `n_layers` is below 1.
    """

    def __init__(self, config: BlockConfig, n_layers: int) -> None:
        super().__init__()
        check_sizes(n_layers=n_layers)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(n_layers))
        self.norm = config.last_norm()

    def forward(
        self, x: Tensor, memory: Tensor | None, *, caches: Sequence | None = None, **masks: Tensor | None
    ) -> Tensor:
        """(batch, tokens, emb_dim) -> the same shape. Raises ValueError if there is not one pair of caches a layer."""
        for layer, pair in zip(self.layers, _one_each(caches, self.layers), strict=True):
            x = layer(x, memory, caches=pair, **masks)
        return self.norm(x)


class StateCache:
    """What attention asks of a `KeyValueCache`, on a tensor of a decoding state, which it never writes into.

    `stacked` holds keys and values, (batch, 2, n_heads, tokens, head_dim). Appending copies it; in return, states that
    share a beginning stay independent.
    """

    def __init__(self, stacked: Tensor) -> None:
        self.stacked = stacked

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stacked.shape[3]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of later tokens and return `contents()`."""
        self.stacked = torch.cat((self.stacked, torch.stack((keys, values), dim=1)), dim=3)
        return self.contents()

    def contents(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, (batch, n_heads, tokens, head_dim) each."""
        return self.stacked.unbind(1)


class Transformer(nn.Module):
    """The encoder-decoder of Vaswani et al. (2017): the logits of the next target token, given a source.

    It offers `SequenceModel` of `shared.model.seq2seq`. Weight matrices start as Xavier's uniform, embeddings normal.

    Args:
        config: What all layers have in common.
        vocab_size: Number of source tokens.
        target_vocab_size: Number V of target tokens. None means one vocabulary and one matrix for source, target and
            output (section 3.4); else target and output share one.
        n_encoder_layers: Layers that read.
        n_decoder_layers: Layers that write.
        context_length: The longest source and the longest target, in tokens.

    Raises:
        ValueError: A size is below 1, or `emb_dim` is odd.
        TypeError: A size is not an int.
    """

    def __init__(
        self,
        config: BlockConfig,
        vocab_size: int,
        *,
        target_vocab_size: int | None = None,
        n_encoder_layers: int = 6,
        n_decoder_layers: int = 6,
        context_length: int = 512,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size)
        if target_vocab_size is not None:
            check_sizes(target_vocab_size=target_vocab_size)
        self.config, self.context_length = config, context_length
        self.source_embedding = nn.Embedding(vocab_size, config.emb_dim)
        self.target_embedding = self.source_embedding
        if target_vocab_size is not None:
            self.target_embedding = nn.Embedding(target_vocab_size, config.emb_dim)
        self.positions = SinusoidalPositions(context_length, config.emb_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = Encoder(config, n_encoder_layers)
        self.decoder = Decoder(config, n_decoder_layers)
        for stack in (self.encoder, self.decoder):
            for parameter in stack.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=config.emb_dim**-0.5)

    def forward(
        self, source_ids: Tensor, source_mask: Tensor, target_ids: Tensor, target_mask: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, T, V): each target position sees itself and earlier ones and predicts the next token.

        Sources (B, S) have a bool mask (B, S), True at real tokens, at least one in each row. Targets (B, T) start with
        the start symbol; their mask (B, T) is needed only where padding stands before real tokens. Raises ValueError
        if a shape does not fit, an id is not in the vocabulary, a source is empty or a sequence is longer than
        `context_length`; TypeError if a mask is not bool or ids are not int64.
        """
        memory = self._read(source_ids, source_mask)
        x = self._embed("target_ids", target_ids, self.target_embedding)
        if len(target_ids) != len(source_ids):
            raise ValueError(f"target_ids have {len(target_ids)} rows for {len(source_ids)} sources")
        if target_mask is not None and target_mask.shape != target_ids.shape:
            raise ValueError(f"target_mask must be {tuple(target_ids.shape)}, got {tuple(target_mask.shape)}")
        x = self.decoder(x, memory, key_padding_mask=target_mask, memory_padding_mask=source_mask)
        return F.linear(x, self.target_embedding.weight)

    def encode(self, source_ids: Tensor, source_mask: Tensor) -> State:
        """Return the state before the first target token: the memory, its mask, and no keys and values yet.

        Raises as `forward`."""
        memory = self._read(source_ids, source_mask)
        n_heads = self.config.n_heads
        nothing = memory.new_zeros(len(memory), 2, n_heads, 0, self.config.emb_dim // n_heads)
        names = [f"{kind}_{i}" for i in range(len(self.decoder.layers)) for kind in ("own", "cross")]
        return {"memory": memory, "mask": source_mask} | dict.fromkeys(names, nothing)

    def decode_step(self, previous_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """Return logits (B, V) for the token after `previous_ids` (B,), and the next state.

        Raises ValueError if the shape does not fit the state, an id is not in the vocabulary, or the target has
        reached `context_length`; TypeError if ids are not int64."""
        if previous_ids.shape != (len(state["memory"]),):
            raise ValueError(
                f"previous_ids must be ({len(state['memory'])},), got {tuple(previous_ids.shape)}"
            )
        numbers = range(len(self.decoder.layers))
        caches = [(StateCache(state[f"own_{i}"]), StateCache(state[f"cross_{i}"])) for i in numbers]
        x = self._embed("previous_ids", previous_ids[:, None], self.target_embedding, caches[0][0].length)
        memory = None if caches[0][1].length else state["memory"]  # afterwards the caches hold it
        x = self.decoder(x, memory, caches=caches, memory_padding_mask=state["mask"])
        for i, (own, cross) in enumerate(caches):
            state = state | {f"own_{i}": own.stacked, f"cross_{i}": cross.stacked}
        return F.linear(x[:, 0], self.target_embedding.weight), state

    def _read(self, source_ids: Tensor, source_mask: Tensor) -> Tensor:
        """Return the memory (B, S, emb_dim)."""
        x = self._embed("source_ids", source_ids, self.source_embedding)
        if source_mask.dtype != torch.bool:
            raise TypeError(f"source_mask must be bool, True at real tokens, got {source_mask.dtype}")
        if source_mask.shape != source_ids.shape:
            raise ValueError(f"source_mask must be {tuple(source_ids.shape)}, got {tuple(source_mask.shape)}")
        if not source_mask.any(dim=1).all():
            raise ValueError("source_mask has a row without a real token; a source must not be empty")
        return self.encoder(x, key_padding_mask=source_mask)

    def _embed(self, name: str, ids: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        """Return token vectors with positions from `start` on: (B, tokens) -> (B, tokens, emb_dim)."""
        if ids.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {ids.dtype}")
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(f"{name} must be (batch, tokens) and not empty, got {tuple(ids.shape)}")
        end = start + ids.shape[1]
        if end > self.context_length:
            raise ValueError(f"{name} reach {end} tokens; context_length is {self.context_length}")
        try:
            vectors = embedding(ids) * math.sqrt(self.config.emb_dim)
        except IndexError:
            low, high, last = int(ids.min()), int(ids.max()), embedding.num_embeddings - 1
            raise ValueError(f"{name} must be ids from 0 to {last}, got {low} to {high}") from None
        positions = self.positions(torch.arange(start, end, device=ids.device))
        return self.dropout(vectors + positions.to(vectors.dtype))
