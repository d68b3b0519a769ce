"""BERT: an encoder whose tokens see both sides, and the two heads of its pretraining.

`BERTModel` gives a vector for each token, and `pool` one for the input; `BERTForPreTraining` adds the
logits of hidden tokens and of "does the second segment follow?" (0: it does). The blocks are
`TransformerBlock` with the norms after the additions.

Left out: relative positions, cross-attention, other heads (a classifier is in
`shared.finetuning.encoders`), and dropout of attention that differs from the rest.

Follows Devlin et al. (2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding") and the weights released with it.

Explained and proven in appendix_vit_bert/01_bert.ipynb; written from there by `make promote`.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_choice, check_dropout, check_sizes, choose, require
from shared.model.attention import MultiHeadAttention
from shared.model.layers import ACTIVATIONS, FeedForward, LayerNorm, TransformerBlock


@dataclass(frozen=True)
class BERTConfig:
    """The shape of a BERT; the defaults are those of the base size as released.

    Attributes:
        vocab_size: Number of token ids.
        context_length: Most tokens the model can read at once, [CLS] and [SEP] included.
        n_segments: Number of segments that it can tell apart.
        emb_dim, n_heads, n_layers: Width of the hidden vectors, heads of a block, number of blocks.
        feed_forward_dim: Width inside a block's feed-forward network; None: 4 * emb_dim.
        activation: A name in `ACTIVATIONS`, for the feed-forward networks and the head for masked tokens.
        dropout: Probability after the embeddings, on attention weights, at the end of each branch.
        norm_eps: What the norms add to the variance.
        init_std: Standard deviation of the initial weights.

    Raises:
        ValueError: A value is out of range, or emb_dim is no multiple of n_heads.
        TypeError: A value has the wrong type.
    """

    vocab_size: int = 30522
    context_length: int = 512
    n_segments: int = 2
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    feed_forward_dim: int | None = None
    activation: str = "gelu"
    dropout: float = 0.1
    norm_eps: float = 1e-12
    init_std: float = 0.02

    def __post_init__(self) -> None:
        # All fields that are numbers of something are checked alike.
        sizes = {field.name: getattr(self, field.name) for field in fields(self) if "int" in str(field.type)}
        check_sizes(**{name: size for name, size in sizes.items() if size is not None})
        require(
            "emb_dim", self.emb_dim, self.emb_dim % self.n_heads == 0, f"a multiple of n_heads={self.n_heads}"
        )
        check_choice("activation", self.activation, ACTIVATIONS)
        check_dropout(self.dropout)
        require("norm_eps", self.norm_eps, 0 < self.norm_eps < 1, "between 0 and 1")
        require("init_std", self.init_std, 0 < self.init_std < 1, "between 0 and 1")

    @classmethod
    def preset(cls, name: str, **overrides: object) -> "BERTConfig":
        """Return the `BERT_PRESETS` entry `name` with some fields changed; ValueError if there is none."""
        return cls(**{**choose("name", name, BERT_PRESETS), **overrides})


# The two sizes of Devlin et al. (2019; the default is the base), and MiniLM's.
BERT_PRESETS: dict[str, dict[str, object]] = {
    "bert-base": {},
    "bert-large": {"emb_dim": 1024, "n_heads": 16, "n_layers": 24},
    "minilm-l6": {"emb_dim": 384, "n_layers": 6},
}


def build_encoder_block(config: BERTConfig) -> TransformerBlock:
    """Return one block: attention in both directions, every map with a bias, the norms behind the additions."""
    attention = MultiHeadAttention(
        config.emb_dim, config.n_heads, dropout=config.dropout, qkv_bias=True, causal=False
    )
    feed_forward = FeedForward(config.emb_dim, config.feed_forward_dim, activation=config.activation)
    norms = [LayerNorm(config.emb_dim, config.norm_eps) for _ in range(2)]
    return TransformerBlock(attention, feed_forward, *norms, dropout=config.dropout, pre_norm=False)


@torch.no_grad()
def initialize_normal(model: nn.Module, std: float) -> None:
    """Draw all matrices of a model from a normal distribution; norms begin with 1, biases with 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)


class BERTModel(nn.Module):
    """The encoder: token ids in, for each token a vector that knows the tokens on both sides.

    Its parts are `token_embedding`, `position_embedding`, `segment_embedding`, `embedding_norm`, `blocks`, and
    `pooler`, which makes one vector of a whole input from that of [CLS].
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.emb_dim)
        self.position_embedding = nn.Embedding(config.context_length, config.emb_dim)
        self.segment_embedding = nn.Embedding(config.n_segments, config.emb_dim)
        self.embedding_norm = LayerNorm(config.emb_dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(build_encoder_block(config) for _ in range(config.n_layers))
        self.pooler = nn.Linear(config.emb_dim, config.emb_dim)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights anew as BERT does: matrices normal with `init_std`, norms one, biases zero."""
        initialize_normal(self, self.config.init_std)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the hidden vectors after the last block, (batch, tokens, emb_dim).

        Args:
            tokens: Integer ids (batch, tokens).
            segments: Integers of the same shape, 0 for the first segment, 1 for the second; None: all 0.
            mask: Bool of the same shape, True for real tokens, False for padding; None: all are real. What comes out
                in the places of padding means nothing.

        Raises:
            ValueError: A shape does not fit, there are more tokens than context_length, an id or a segment is out of
                range (on a GPU the device's own assertion says so), or a row of the mask has no real token.
            TypeError: The ids or segments are no integers, or the mask is not bool.
        """
        self._check(tokens, segments, mask)
        x = self._embed(tokens, segments)
        for block in self.blocks:
            x = block(x, key_padding_mask=mask)
        return x

    def pool(self, hidden: Tensor) -> Tensor:
        """Return one vector for each input, (batch, emb_dim): a linear map and tanh of what stands at [CLS]."""
        return torch.tanh(self.pooler(hidden[:, 0]))

    def _check(self, tokens: Tensor, segments: Tensor | None, mask: Tensor | None) -> None:
        """Refuse what does not fit, before anything is computed."""
        limit = self.config.context_length
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(
                f"tokens must be (batch, tokens), at least one of each, got {tuple(tokens.shape)}"
            )
        require("tokens", tokens.shape[1], tokens.shape[1] <= limit, f"at most context_length={limit} long")
        for name, ids in (("tokens", tokens), ("segments", segments)):
            if ids is not None and ids.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{name} must be integers, got {ids.dtype}")
        for name, other in (("segments", segments), ("mask", mask)):
            if other is not None and other.shape != tokens.shape:
                raise ValueError(f"{name} must be {tuple(tokens.shape)} as tokens, got {tuple(other.shape)}")
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be bool, True for real tokens, got {mask.dtype}")
            # Only where looking does not make a CPU wait for a GPU.
            if mask.device.type == "cpu" and not bool(mask.any(dim=1).all()):
                raise ValueError("mask must have a real token in each row, got a row of zeros")

    def _embed(self, tokens: Tensor, segments: Tensor | None) -> Tensor:
        """Add up what a token is, where it stands and to which segment it belongs, and normalise the sum."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if segments is None:
            segments = torch.zeros_like(tokens)
        try:
            x = self.token_embedding(tokens) + self.segment_embedding(segments)
        except IndexError:  # unlike a check in advance, this costs nothing while all is well
            largest = {"tokens": self.config.vocab_size - 1, "segments": self.config.n_segments - 1}
            found = {"tokens": tokens, "segments": segments}
            name = next(n for n, ids in found.items() if int(ids.min()) < 0 or int(ids.max()) > largest[n])
            limits = f"{int(found[name].min())} to {int(found[name].max())}"
            raise ValueError(f"{name} must be from 0 to {largest[name]}, got {limits}") from None
        return self.dropout(self.embedding_norm(x + self.position_embedding(positions)))

    @property
    def n_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


class MaskedTokenHead(nn.Module):
    """From hidden vectors to the logits of all tokens: a map, an activation, a norm, then the token embedding.

    The last matrix is the token embedding's own; only its bias is new.
    """

    def __init__(self, config: BERTConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.emb_dim, config.emb_dim)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = LayerNorm(config.emb_dim, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._embedding = [embedding]  # in a list, so that it is no second owner of the matrix

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., emb_dim) -> (..., vocab_size)."""
        x = self.norm(self.activation(self.transform(hidden)))
        return F.linear(x, self._embedding[0].weight, self.bias)


class BERTForPreTraining(nn.Module):
    """The encoder with its two heads: which token stood here, and does the second segment follow the first?"""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = BERTModel(config)
        self.token_head = MaskedTokenHead(config, self.bert.token_embedding)
        self.next_head = nn.Linear(config.emb_dim, 2)
        initialize_normal(self, config.init_std)

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of the tokens, (batch, tokens, vocab_size), and of "follows" and "does not", (batch, 2).

        Args:
            tokens, segments, mask: As `BERTModel.forward` has them, where the errors stand too.
            places: Integers (n,): with them only these places of the flattened batch get logits, (n, vocab_size).
                The output layer is the largest, and 85 of 100 places are not asked.
        """
        hidden = self.bert(tokens, segments, mask)
        asked = hidden if places is None else hidden.flatten(0, 1)[places]
        return self.token_head(asked), self.next_head(self.bert.pool(hidden))

    @property
    def n_parameters(self) -> int:
        """Number of trained numbers; the shared matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
