"""A linear map with low-rank adapters beside it: LoRA, rank-stabilized LoRA and DoRA.

`LowRankUpdate` is the trained part, for all rows of a weight or for some of them. `LoRALayer` wraps a
linear map and holds several of them by name; it computes with one, with none, with another one for each
row of a batch, or with one merged weight. The wrapped map is never written to.

Left out: embeddings and convolutions, several adapters that are added up.

Follows Hu et al. (2021, "LoRA: Low-Rank Adaptation of Large Language Models"), Kalajdzievski (2023, "A
Rank Stabilization Scaling Factor for Fine-Tuning with LoRA") and Liu et al. (2024, "DoRA:
Weight-Decomposed Low-Rank Adaptation").

Explained and proven in appendix_lora/01_lora.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_choice, check_dropout, require, whole_number

INITIALIZATIONS = ("kaiming", "gaussian")


@dataclass(frozen=True)
class LoRAConfig:
    """The choices of one adapter.

    Attributes:
        targets: Which linear maps it changes, see `attach_lora`.
        rank: Columns of B and rows of A.
        alpha: Strength of the update; what it is divided by depends on the rank, see `scaling`.
        dropout: Probability of dropping a number of the input of A during training.
        rank_stabilized: Divide `alpha` by the root of the rank instead of the rank (rsLoRA, Kalajdzievski, 2023).
        dora: Train the length of each row of the weight besides its direction (DoRA, Liu et al., 2024).
        initialization: Of A: "kaiming" (uniform, as in the authors' code and PEFT) or "gaussian" (the paper's words;
            with deviation 1 / rank, as in PEFT). B begins with zeros.

    Raises:
        ValueError: A value is out of range.
        TypeError: The rank is no whole number.
    """

    targets: tuple[str, ...] = ("query", "value")
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilized: bool = False
    dora: bool = False
    initialization: str = "kaiming"

    def __post_init__(self) -> None:
        whole_number("rank", self.rank)
        require("alpha", self.alpha, 0 < self.alpha < math.inf, "above 0")
        check_dropout(self.dropout)
        check_choice("initialization", self.initialization, INITIALIZATIONS)
        require("targets", self.targets, len(self.targets) > 0, "at least one name")

    @property
    def scaling(self) -> float:
        """What B @ A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LowRankUpdate(nn.Module):
    """A trained change of a frozen weight W (rows, columns): W becomes W + scaling * B @ A.

    A (rank, columns) is random and B (rows, rank) zero, so the change begins with zero. Both are float32, whatever W
    is: small steps would be lost in fewer bits. With DoRA each row of the sum is brought to a trained length,
    `magnitude` (rows,), which begins as the length of W's row.

    Args:
        weight: W, or those of its rows that are changed; it is not kept.
        config: The choices.
    """

    def __init__(self, weight: Tensor, config: LoRAConfig) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scaling, self.dropout = config.scaling, nn.Dropout(config.dropout)
        self.A = nn.Parameter(torch.empty(config.rank, columns, device=weight.device))
        self.B = nn.Parameter(torch.zeros(rows, config.rank, device=weight.device))
        if config.initialization == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.A, std=1 / config.rank)
        self.magnitude = nn.Parameter(weight.detach().float().norm(dim=1)) if config.dora else None

    def row_scales(self, weight: Tensor | None) -> Tensor | None:
        """Return what brings each row of W + scaling * B @ A to its trained length, (rows,); None without DoRA.

        The present length counts as a constant, no gradient flows through it (Liu et al., 2024, section 4.3).
        """
        if self.magnitude is None:
            return None
        with torch.no_grad():
            length = (weight.float() + self.scaling * self.B @ self.A).norm(dim=1)
        return self.magnitude / length.clamp(min=1e-12)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        """Return what is added to the output of the frozen map.

        Args:
            x: Its input, (..., columns).
            y: Its output without the bias, (..., rows).
            weight: W; only DoRA needs it.
        """
        x = self.dropout(x.to(self.A.dtype))
        update = F.linear(F.linear(x, self.A), self.B) * self.scaling
        scales = self.row_scales(weight)
        if scales is None:
            return update
        if self.training and self.dropout.p:  # what is dropped is dropped in both terms
            y = F.linear(x, weight.to(x.dtype))
        return (scales - 1) * y + scales * update


class LoRALayer(nn.Module):
    """A frozen linear map with one or several adapters beside it, of which one, or none, is active.

    An adapter may change all rows of the weight, the part "all", or only some: of a fused projection the parts "query",
    "key" and "value". The frozen map, `base`, is the object that was there before, and nothing ever writes to it.

    Args:
        base: The linear map; an `nn.Linear`, or another module with its `weight`, `bias` and sizes.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()  # name -> part -> LowRankUpdate
        self.configs: dict[str, LoRAConfig] = {}
        self.parts: dict[str, tuple[int, int]] = {}  # part -> its first row, and the one after its last
        self.active: str | None = None
        self.by_row: tuple[str | None, ...] | None = None  # the adapter of each row of a batch
        self.register_buffer("merged", None, persistent=False)
        self.train(base.training)

    def add(self, name: str, config: LoRAConfig, parts: Mapping[str, tuple[int, int]]) -> None:
        """Add an adapter that changes some rows of the weight, and make it the active one."""
        weight, updates = self.base.weight, nn.ModuleDict()
        for part, (start, stop) in parts.items():
            updates[part] = LowRankUpdate(weight[start:stop], config)
        self.adapters[name] = updates.train(self.training)
        self.configs[name], self.active = config, name
        self.parts |= parts

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.merged is not None:
            return F.linear(x, self.merged, self.base.bias)
        y = self.base(x)
        if self.by_row is not None:
            return self._each_row(x, y)
        if self.active not in self.adapters:
            return y
        plain = y if self.base.bias is None else y - self.base.bias
        weight = self.base.weight if self.configs[self.active].dora else None
        for part, update in self.adapters[self.active].items():
            start, stop = self.parts[part]
            own = None if weight is None else weight[start:stop]
            change = update(x, plain[..., start:stop], own).to(y.dtype)
            y = y + F.pad(change, (start, self.out_features - stop))  # the other rows get zeros
        return y

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base.out_features

    def combined(self, name: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return A (rank, in), B (out, rank) and scales (out,) of all parts of an adapter together.

        With it the weight is scales * (W + B @ A), row by row; `scaling` is in B. Without an adapter of this name the
        rank is 0.
        """
        n, weight = self.out_features, self.base.weight
        a, b = [weight.new_zeros(0, self.in_features).float()], [weight.new_zeros(n, 0).float()]
        scales = torch.ones(n, device=weight.device)
        for part, update in self.adapters[name].items() if name in self.adapters else ():
            start, stop = self.parts[part]
            a.append(update.A)
            b.append(F.pad(update.scaling * update.B, (0, 0, start, n - stop)))
            own = update.row_scales(weight[start:stop])
            if own is not None:
                scales = torch.cat([scales[:start], own, scales[stop:]])
        return torch.cat(a), torch.cat(b, dim=1), scales

    @property
    def weight(self) -> Tensor:
        """The weight that base and active adapter have together, computed in float32, in the base's type."""
        a, b, scales = self.combined(self.active)
        return (scales[:, None] * (self.base.weight.float() + b @ a)).to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias: adapters have none."""
        return self.base.bias

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with one weight from now on, that of base and active adapter together; the base stays as it is."""
        self.merged = self.weight

    def unmerge(self) -> None:
        """Compute with base and adapter apart again."""
        self.merged = None

    def _each_row(self, x: Tensor, y: Tensor) -> Tensor:
        """Add to y (batch, tokens, out) the change of each row's own adapter: two products for the whole batch."""
        if x.dim() != 3 or len(x) != len(self.by_row):
            raise ValueError(
                f"x must be ({len(self.by_row)}, tokens, {self.in_features}), got {tuple(x.shape)}"
            )
        names = list(dict.fromkeys(self.by_row))  # each adapter once
        a, b, scales = zip(*map(self.combined, names), strict=True)
        rank = max(map(len, a))  # smaller ones are filled up with zeros
        a = torch.stack([F.pad(one, (0, 0, 0, rank - len(one))) for one in a])  # (adapters, rank, in)
        b = torch.stack([F.pad(one, (0, rank - one.shape[1])) for one in b])  # (adapters, out, rank)
        rows = torch.tensor([names.index(name) for name in self.by_row], device=x.device)
        update = torch.bmm(torch.bmm(x.to(a.dtype), a[rows].mT), b[rows].mT)  # (batch, tokens, out)
        scales = torch.stack(scales)[rows][:, None]
        plain = y if self.bias is None else y - self.bias
        return y + ((scales - 1) * plain + scales * update).to(y.dtype)
