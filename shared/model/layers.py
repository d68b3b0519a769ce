"""The parts of a Transformer around attention: norms, feed-forward networks, and the block that joins them.

Every part works on the last dimension of its input and leaves the others as they are. A TransformerBlock
is given its attention, feed-forward and norm modules, so one class serves GPT, BERT, ViT and the Llama
family. NORMS and FEED_FORWARDS name the choices that a configuration may make.

Left out: cross-attention blocks, expert parallelism and capacity limits of mixtures of experts, kernels
of our own.

Follows Ba et al. (2016, "Layer Normalization"), Hendrycks and Gimpel (2016, GELU), He et al. (2016,
shortcuts), Radford et al. (2019, GPT-2), and for the later parts Zhang and Sennrich (2019, RMSNorm),
Shazeer (2020, SwiGLU) and Jiang et al. (2024, "Mixtral of Experts").

Explained and proven in ch04_gpt/01_building_blocks.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_dropout, check_sizes, choose, require


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al., 2016): each vector gets mean 0 and variance 1, then a learned scale and shift.

    y = weight * (x - mean) / sqrt(variance + eps) + bias, over the last dimension, variance with divisor dim.

    Args:
        dim: Size of the last dimension of the input.
        eps: Added to the variance, against a division by zero.
        bias: Whether there is a shift.

    Raises:
        ValueError: dim is below 1, eps is negative, or the input's last dimension is not dim.
    """

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        check_sizes(dim=dim)
        require("eps", eps, eps >= 0.0, "at least 0")
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim); the shape stays."""
        check_width(x, self.dim)
        return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)


def check_width(x: Tensor, dim: int) -> None:
    """Raise ValueError unless the last dimension of x has size dim."""
    if x.shape[-1] != dim:
        raise ValueError(f"the last dimension of x must be {dim}, got shape {tuple(x.shape)}")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's form
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """Two linear maps with a bend between them, applied to each position alone (Vaswani et al., 2017, section 3.3).

    Args:
        emb_dim: Width of input and output.
        hidden_dim: Width between the two maps; 4 * emb_dim if not given.
        activation: A name in `ACTIVATIONS`; GPT-2 has "gelu_tanh", BERT and ViT have "gelu".
        bias: Whether the two maps have a bias.

    Raises:
        ValueError: A width is below 1, the activation is unknown, or the input's last dimension is not emb_dim.
    """

    def __init__(
        self, emb_dim: int, hidden_dim: int | None = None, *, activation: str = "gelu_tanh", bias: bool = True
    ) -> None:
        super().__init__()
        hidden_dim = 4 * emb_dim if hidden_dim is None else hidden_dim
        check_sizes(emb_dim=emb_dim, hidden_dim=hidden_dim)
        self.activation = choose("activation", activation, ACTIVATIONS)
        self.up = nn.Linear(emb_dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, emb_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (..., emb_dim); the shape stays."""
        check_width(x, self.up.in_features)
        return self.down(self.activation(self.up(x)))  # (..., hidden_dim) in between


class TransformerBlock(nn.Module):
    """Attention and a feed-forward network, each with a norm, dropout and a shortcut around it.

    With `pre_norm` (GPT-2 and later): x + f(norm(x)); without (Vaswani et al., 2017, BERT): norm(x + f(x)).

    Args:
        attention: Called as attention(x, **options), for example a `MultiHeadAttention`.
        feed_forward: Called as feed_forward(x).
        attention_norm: The norm that goes with attention.
        feed_forward_norm: The norm that goes with the feed-forward network.
        dropout: Probability of dropping a number at the end of each branch during training.
        pre_norm: Whether the norms stand at the head of the branches or behind the additions.

    Raises:
        ValueError: dropout is not in [0, 1).
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        attention_norm: nn.Module,
        feed_forward_norm: nn.Module,
        *,
        dropout: float = 0.0,
        pre_norm: bool = True,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        self.attention_norm, self.attention = attention_norm, attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, **attention_options: object) -> Tensor:
        """Transform x (batch, tokens, emb_dim); the options go to the attention module. The shape stays."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), **attention_options))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, **attention_options)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, 2019): weight * x / sqrt(mean(x²) + eps).

    Args:
        dim: Size of the last dimension of the input.
        eps: Added to the mean square, against a division by zero.

    Raises:
        ValueError: dim is below 1, eps is negative, or the input's last dimension is not dim.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        check_sizes(dim=dim)
        require("eps", eps, eps >= 0.0, "at least 0")
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., dim); the shape stays."""
        check_width(x, self.dim)
        return F.rms_norm(x, (self.dim,), self.weight, self.eps)


class SwiGLU(nn.Module):
    """Gated feed-forward network: down(silu(gate(x)) * up(x)) (Shazeer, 2020, "GLU Variants Improve Transformer").

    Args:
        emb_dim: Width of input and output.
        hidden_dim: Width in between. If not given, 8/3 * emb_dim rounded up to a multiple of 8: as many weights as
            a `FeedForward` of width 4 * emb_dim.
        bias: Whether the maps have a bias.

    Raises:
        ValueError: A width is below 1, or the input's last dimension is not emb_dim.
    """

    def __init__(self, emb_dim: int, hidden_dim: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        hidden_dim = 8 * math.ceil(emb_dim / 3) if hidden_dim is None else hidden_dim
        check_sizes(emb_dim=emb_dim, hidden_dim=hidden_dim)
        self.gate = nn.Linear(emb_dim, hidden_dim, bias=bias)
        self.up = nn.Linear(emb_dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, emb_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (..., emb_dim); the shape stays."""
        check_width(x, self.up.in_features)
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (..., hidden_dim) in between


class MixtureOfExperts(nn.Module):
    """Several `SwiGLU` networks, of which a router picks `n_active` for each token (Jiang et al., 2024, "Mixtral").

    After each forward pass `balance_loss` holds the loss of Fedus et al. (2022, "Switch Transformers", equation 4) for
    that pass, divided by n_active so that 1 means balanced; add it to the training loss with a factor near 0.01.
    `load` holds the share of the routed slots that each expert got, (n_experts,). No token is ever dropped.

    Args:
        emb_dim: Width of input and output.
        hidden_dim: Width inside each expert; as in `SwiGLU` if not given.
        n_experts: Number of experts.
        n_active: Number of experts computed for each token.
        bias: Whether the experts' maps have a bias.

    Raises:
        ValueError: A width is below 1, or n_active is not in 1 to n_experts.
    """

    def __init__(
        self,
        emb_dim: int,
        hidden_dim: int | None = None,
        *,
        n_experts: int = 8,
        n_active: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(n_experts=n_experts, n_active=n_active)
        require("n_active", n_active, n_active <= n_experts, f"between 1 and n_experts={n_experts}")
        self.n_active = n_active
        self.experts = nn.ModuleList(SwiGLU(emb_dim, hidden_dim, bias=bias) for _ in range(n_experts))
        self.router = nn.Linear(emb_dim, n_experts, bias=False)
        self.balance_loss: Tensor | None = None
        self.load: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (..., emb_dim); the shape stays."""
        check_width(x, self.router.in_features)
        tokens = x.flatten(0, -2)  # (n_tokens, emb_dim)
        probabilities = self.router(tokens).float().softmax(dim=-1)  # (n_tokens, n_experts)
        weights, chosen = probabilities.topk(self.n_active, dim=-1)  # (n_tokens, n_active)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        self.load = torch.stack([(chosen == i).float().mean() for i in range(len(self.experts))])
        self.balance_loss = len(self.experts) * (self.load * probabilities.mean(dim=0)).sum()
        result = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(
                chosen == i
            )  # an expert without tokens runs on none and gets zero gradients
            result.index_add_(0, rows, expert(tokens[rows]) * weights[rows, slots, None])
        return result.view_as(x)

    def __getstate__(self) -> dict:
        """Leave the results of the last pass out of copies: their graph can be neither copied nor stored."""
        return {**super().__getstate__(), "balance_loss": None, "load": None}


def balance_loss(model: nn.Module) -> Tensor:
    """Return the mean balance loss of all mixtures of experts in `model`, from its last forward pass.

    Raises ValueError if there is no mixture, or no pass was made.
    """
    losses = [module.balance_loss for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not losses or losses[0] is None:
        raise ValueError("model must hold a MixtureOfExperts that has made a forward pass")
    return torch.stack(losses).mean()


# Each is called as norm(dim, eps, bias).
NORMS: dict[str, Callable[[int, float, bool], nn.Module]] = {
    "layernorm": LayerNorm,
    "rmsnorm": lambda dim, eps, bias: RMSNorm(dim, eps),  # has no bias to leave out
}

# Each is called as feed_forward(emb_dim, hidden_dim, bias=bias, **options).
FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {
    "gelu": FeedForward,
    "swiglu": SwiGLU,
    "moe": MixtureOfExperts,
}


def build_norm(name: str, dim: int, *, eps: float = 1e-5, bias: bool = True) -> nn.Module:
    """Return the norm that `NORMS` calls `name`. Raises ValueError if there is none."""
    return choose("norm", name, NORMS)(dim, eps, bias)


def build_feed_forward(
    name: str, emb_dim: int, hidden_dim: int | None = None, *, bias: bool = True, **options: int
) -> nn.Module:
    """Return the feed-forward network that `FEED_FORWARDS` calls `name`; ValueError if there is none.

    `options` are those of the class: `n_experts` and `n_active` for "moe".
    """
    return choose("feed_forward", name, FEED_FORWARDS)(emb_dim, hidden_dim, bias=bias, **options)
