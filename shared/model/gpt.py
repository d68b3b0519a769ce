"""One GPT for GPT-2 and for the models after it: every variant is an option of GPTConfig.

The model maps token ids to the logits of the next token and knows nothing of text, training or sampling.

Left out: the loss, gradient checkpointing, splitting over devices, windows that differ from block to
block, embeddings or logits that are scaled or capped (Gemma). Weights of other programs:
shared.weights.pretrained.

Follows Radford et al. (2019, "Language Models are Unsupervised Multitask Learners") and the weights
released with it.

Explained and proven in ch04_gpt/02_gpt.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from shared.checks import check_choice, check_sizes, choose, require
from shared.model.attention import KeyValueCache, MultiHeadAttention
from shared.model.layers import (
    ACTIVATIONS,
    FEED_FORWARDS,
    NORMS,
    RMSNorm,
    TransformerBlock,
    build_feed_forward,
    build_norm,
)
from shared.model.positions import (
    LearnedPositions,
    RotaryPositions,
    SinusoidalPositions,
    scaled_rotary_frequencies,
)

_MODERN = {"norm": "rmsnorm", "positions": "rotary", "feed_forward": "swiglu", "bias": False}
_TALES = {**_MODERN, "qkv_bias": False, "vocab_size": 2048, "context_length": 256, "dropout": 0.0}

# GPT-2's four sizes as released (the defaults are the smallest), and small models of our own.
PRESETS: dict[str, dict[str, object]] = {
    "gpt2-small": {},
    "gpt2-medium": {"emb_dim": 1024, "n_heads": 16, "n_layers": 24},
    "gpt2-large": {"emb_dim": 1280, "n_heads": 20, "n_layers": 36},
    "gpt2-xl": {"emb_dim": 1600, "n_heads": 25, "n_layers": 48},
    "bytes-tiny": {"vocab_size": 256, "context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 2},
    "tales-tiny": {**_TALES, "emb_dim": 64, "n_heads": 4, "n_layers": 2},
    "tales-1m": {**_TALES, "emb_dim": 128, "n_heads": 4, "n_layers": 4},
    "tales-3m": {**_TALES, "emb_dim": 192, "n_heads": 6, "n_layers": 6},
}
ADDED_POSITIONS = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}
_CHOICES = {
    "norm": tuple(NORMS),
    "feed_forward": tuple(FEED_FORWARDS),
    "activation": tuple(ACTIVATIONS),
    "positions": (*ADDED_POSITIONS, "rotary", "none"),
    "rope_scaling": ("none", "linear", "ntk", "yarn", "llama3"),
}
# Fields that only one choice reads: with any other, a value of their own would be ignored, and is refused.
_READ_ONLY_BY = {
    ("positions", "rotary"): ("rope_base", "rope_scaling", "rope_interleaved"),
    ("rope_scaling", "linear", "ntk", "yarn", "llama3"): ("rope_factor", "rope_original_length"),
    ("rope_scaling", "yarn"): ("rope_attention_factor",),
    ("feed_forward", "moe"): ("n_experts", "n_active_experts"),
    ("feed_forward", "gelu"): ("activation",),
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT and the choices among its parts; the defaults are GPT-2's smallest model as released.

    Attributes:
        vocab_size: Number of token ids.
        context_length: Most tokens the model can read at once.
        emb_dim, n_heads, n_layers: Width of the hidden vectors, query heads of a block, number of blocks.
        dropout: Probability after the embeddings, on attention weights, at the end of each branch.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        bias: Whether the other linear maps and the layer norms have one; the output head never has.
        tie_weights: Whether the output head is the token embedding's own matrix.
        norm, norm_eps: "layernorm" or "rmsnorm", and what it adds to the variance.
        pre_norm: Norms at the head of each branch and after the last block (GPT-2), or after each addition (GPT-1).
        feed_forward: "gelu" (two maps with an activation between, as in GPT-2), "swiglu" or "moe".
        activation: For "gelu": "gelu_tanh" (GPT-2's form), "gelu" (the exact one, as in nanoGPT), "relu" or "silu".
        feed_forward_dim: Width inside it, or inside one expert; None: as `FeedForward` and `SwiGLU` say.
        n_experts, n_active_experts: For "moe": how many there are, and how many a token uses.
        positions: "learned", "sinusoidal", "rotary" or "none".
        rope_base, rope_scaling, rope_factor, rope_original_length: Rotary frequencies, as `scaled_rotary_frequencies`
            has them; an original length of None is context_length.
        rope_attention_factor: For "yarn": what rotated queries and keys are multiplied by; None: 0.1 ln(factor) + 1.
        rope_interleaved: Whether numbers 2 m and 2 m + 1 of a head are turned together (GPT-J, Llama as Meta stores
            it), not m and m + head_dim / 2.
        n_kv_heads: Key and value heads of a block (grouped-query attention); None: n_heads.
        head_dim: Width of a head; None: emb_dim / n_heads.
        qk_norm: Whether queries and keys get an RMSNorm over each head, as in Qwen3.
        window: Most tokens a token sees, itself included; None: all.
        init_std: Standard deviation of the initial weights.

    Raises:
        ValueError: A value is not allowed, does not fit another, or would be ignored because of another.
        TypeError: A value has the wrong type.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    dropout: float = 0.1
    qkv_bias: bool = True
    bias: bool = True
    tie_weights: bool = True
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    feed_forward: str = "gelu"
    activation: str = "gelu_tanh"
    feed_forward_dim: int | None = None
    n_experts: int = 8
    n_active_experts: int = 2
    positions: str = "learned"
    rope_base: float = 10_000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_length: int | None = None
    rope_attention_factor: float | None = None
    rope_interleaved: bool = False
    n_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    window: int | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        # Each field by itself: its type, sizes of at least 1, known names.
        for field in fields(self):
            name, kind, value = field.name, field.type, getattr(self, field.name)
            fits = isinstance(value, kind) or (isinstance(value, int) and isinstance(1.0, kind))
            if not fits or isinstance(value, bool) != (kind is bool):
                raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
            if kind in (int, int | None) and value is not None:
                check_sizes(**{name: value})
            if name in _CHOICES:
                check_choice(name, value, _CHOICES[name])
        # Then ranges, and what must fit together.
        heads, experts = self.n_heads, self.n_experts
        divided = self.head_dim is not None or self.emb_dim % heads == 0
        # Both kinds of position pair the numbers of a vector.
        paired = {"rotary": "actual_head_dim", "sinusoidal": "emb_dim"}.get(self.positions)
        factor = 1.0 if self.rope_attention_factor is None else self.rope_attention_factor
        for name, holds, allowed in (
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("norm_eps", 0 < self.norm_eps < 1, "between 0 and 1"),
            ("init_std", 0 < self.init_std < math.inf, "above 0"),
            ("rope_base", 1 < self.rope_base < math.inf, "above 1"),
            ("rope_factor", 1 <= self.rope_factor < math.inf, "at least 1"),
            ("rope_attention_factor", 0 < factor < math.inf, "above 0"),
            ("emb_dim", divided, f"a multiple of n_heads={heads} unless head_dim is given"),
            ("n_kv_heads", heads % (self.n_kv_heads or 1) == 0, f"a divisor of n_heads={heads}"),
            ("n_active_experts", self.n_active_experts <= experts, f"at most n_experts={experts}"),
            (paired, not paired or getattr(self, paired) % 2 == 0, f"even for {self.positions} positions"),
        ):
            if name is not None:
                require(name, getattr(self, name), holds, allowed)
        # Last, no value that nothing would read.
        for (choice, *readers), names in _READ_ONLY_BY.items():
            for name in names:
                default, value = type(self).__dataclass_fields__[name].default, getattr(self, name)
                read = getattr(self, choice) in readers
                require(
                    name,
                    value,
                    read or value == default,
                    f"{default!r} unless {choice} is {' or '.join(readers)}",
                )

    @property
    def actual_head_dim(self) -> int:
        """Width of a head, given or derived."""
        return self.head_dim or self.emb_dim // self.n_heads

    @classmethod
    def preset(cls, name: str, **overrides: object) -> "GPTConfig":
        """Return the `PRESETS` entry `name` with some fields changed; ValueError if there is none."""
        return cls(**{**choose("name", name, PRESETS), **overrides})


def build_norm_of(config: GPTConfig) -> nn.Module:
    """Return a norm over the hidden vectors as the configuration says."""
    return build_norm(config.norm, config.emb_dim, eps=config.norm_eps, bias=config.bias)


def build_rotary(config: GPTConfig) -> RotaryPositions:
    """Return the rotation of queries and keys as the configuration says."""
    head_dim, length = config.actual_head_dim, config.rope_original_length or config.context_length
    with torch.device("cpu"):  # computed, not loaded: they must be real even in a model built on "meta"
        frequencies, factor = scaled_rotary_frequencies(
            config.rope_scaling, head_dim, config.rope_base, config.rope_factor, length
        )
    return RotaryPositions(
        head_dim,
        config.context_length,
        interleaved=config.rope_interleaved,
        inverse_frequencies=frequencies,
        attention_factor=config.rope_attention_factor or factor,
    )


def build_block(config: GPTConfig, rotary: nn.Module | None = None) -> TransformerBlock:
    """Return one block as the configuration says; `rotary` is applied to its queries and keys."""
    names = ("n_kv_heads", "head_dim", "dropout", "qkv_bias", "window")
    options = {name: getattr(config, name) for name in names}
    if config.qk_norm:
        norms = (RMSNorm(config.actual_head_dim, config.norm_eps) for _ in range(2))
        options |= zip(("query_norm", "key_norm"), norms, strict=True)
    attention = MultiHeadAttention(
        config.emb_dim, config.n_heads, out_bias=config.bias, causal=True, rotary=rotary, **options
    )
    options = {"bias": config.bias}
    if config.feed_forward == "gelu":
        options |= {"activation": config.activation}
    if config.feed_forward == "moe":
        options |= {"n_experts": config.n_experts, "n_active": config.n_active_experts}
    feed_forward = build_feed_forward(config.feed_forward, config.emb_dim, config.feed_forward_dim, **options)
    norms = build_norm_of(config), build_norm_of(config)
    return TransformerBlock(attention, feed_forward, *norms, dropout=config.dropout, pre_norm=config.pre_norm)


class GPTModel(nn.Module):
    """A GPT: token ids in, for each position the logits of the next token out.

    Its parts are `token_embedding`, `position_embedding` (None unless positions are added), `blocks`, `final_norm` and
    `output_head`, which shares the token embedding's weight if `tie_weights`. A new model is in training mode and
    initialised from torch's global random generator.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.emb_dim)
        added = ADDED_POSITIONS.get(config.positions)
        self.position_embedding = added(config.context_length, config.emb_dim) if added else None
        self.dropout = nn.Dropout(config.dropout)
        rotary = build_rotary(config) if config.positions == "rotary" else None  # one table for all blocks
        self.blocks = nn.ModuleList(build_block(config, rotary) for _ in range(config.n_layers))
        # Post-norm blocks end with a norm already.
        self.final_norm = build_norm_of(config) if config.pre_norm else nn.Identity()
        # On "meta" no memory is taken for a matrix that the next lines replace.
        device = "meta" if config.tie_weights else None
        self.output_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False, device=device)
        if config.tie_weights:
            self.output_head.weight = self.token_embedding.weight
        self.register_load_state_dict_pre_hook(_remember_tie)
        self.register_load_state_dict_post_hook(_restore_tie)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights anew as GPT-2 does (Radford et al., 2019, section 2.3): normal with `init_std`, biases zero.

        The last maps of the 2 * n_layers branches are smaller by 1 / sqrt(2 * n_layers): so the sum of all branches
        does not grow with depth.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                is_last = name.endswith(("attention.output.weight", "down.weight"))
                scale = 1 / math.sqrt(2 * self.config.n_layers) if is_last else 1.0
                nn.init.normal_(parameter, std=self.config.init_std * scale)
            else:
                nn.init.constant_(parameter, 1.0 if name.endswith("norm.weight") else 0.0)

    def forward(self, tokens: Tensor, *, last_only: bool = False, **options: object) -> Tensor:
        """Return the logits (batch, tokens, vocab_size), or (batch, 1, vocab_size) of the last position only.

        The options are `positions`, `key_padding_mask` and `caches` of `hidden_states`, where the errors stand too;
        `last_only` spares the output head's work for all other positions.
        """
        hidden = self.hidden_states(tokens, **options)
        return self.output_head(hidden[:, -1:] if last_only else hidden)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Return what the output head is given, (batch, tokens, emb_dim), after the final norm.

        Args:
            tokens: int64 ids (batch, tokens); or embedded tokens (batch, tokens, emb_dim), which get positions added.
            positions: int64 (tokens,) or (batch, tokens), below context_length; if not given they count on from the
                caches. Sequences padded on the left need their own.
            key_padding_mask: Bool (batch, keys), True for real tokens, those in the caches included.
            caches: One for each block, from `new_caches`: they hold earlier tokens and receive these. Inference only.

        Raises:
            ValueError: A shape or the number of caches does not fit, there are more tokens than context_length, or an
                id or a position is out of range (on a GPU the device's own assertion says so).
            TypeError: The ids are not integers.
        """
        n_layers, limit = self.config.n_layers, self.config.context_length
        if caches is not None and len(caches) != n_layers:
            raise ValueError(f"caches must be {n_layers}, one for each block, got {len(caches)}")
        x = self._embed(tokens)
        if positions is None:
            start = caches[0].length if caches else 0
            end = start + x.shape[1]
            if end > limit:
                raise ValueError(f"tokens must be at most context_length={limit} with the cached, got {end}")
            positions = torch.arange(start, end, device=x.device)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions).to(x.dtype)  # computed ones are float32
        x = self.dropout(x)
        for block, cache in zip(self.blocks, caches or [None] * n_layers, strict=True):
            x = block(x, positions=positions, key_padding_mask=key_padding_mask, cache=cache)
        return self.final_norm(x)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Look the ids up: (batch, tokens) -> (batch, tokens, emb_dim). Embedded tokens stay as they are."""
        if tokens.dim() == 3 and tokens.is_floating_point() and tokens.shape[2] == self.config.emb_dim:
            return tokens
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens must be (batch, tokens), at least one token, got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 ids, got {tokens.dtype}")
        try:
            return self.token_embedding(tokens)
        except IndexError:  # unlike a check in advance, this costs nothing while all is well
            largest, found = self.config.vocab_size - 1, f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"tokens must be ids from 0 to {largest}, got {found}") from None

    def new_caches(self, max_length: int | None = None) -> list[KeyValueCache]:
        """Return an empty cache for each block, for up to `max_length` tokens; context_length if not given."""
        size = self.config.context_length if max_length is None else max_length
        return [KeyValueCache(size) for _ in self.blocks]

    @property
    def n_parameters(self) -> int:
        """Number of trained numbers; a tied output head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GPTModel":
        """Cast or move all parts; a tied head stays tied, of which `to_empty` would make two matrices."""
        _remember_tie(self)
        super()._apply(fn, recurse)
        _restore_tie(self)
        return self


def _remember_tie(model: GPTModel, *_: object) -> None:
    """Note, before the weights are replaced, whether the head is tied; it may be a layer that has no weight."""
    model._is_tied = getattr(model.output_head, "weight", None) is model.token_embedding.weight


def _restore_tie(model: GPTModel, *_: object) -> None:
    """Tie the head as it was before `_remember_tie`."""
    if model._is_tied:
        model.output_head.weight = model.token_embedding.weight
