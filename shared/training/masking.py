"""BERT's two exercises: tokens hidden, and pairs of segments of which the second follows or not.

`mask_tokens` hides with one draw for each token, so that the shares are exactly those asked for.
`sentence_pair` never takes the true end for a false one. `pretraining_loss` is the loss for
`shared.training.loop.train`.

Left out: whole words and spans hidden together, and the order of sentences as an exercise.

Follows Devlin et al. (2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding").

Explained and proven in appendix_vit_bert/01_bert.ipynb; written from there by `make promote`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_between, require
from shared.training.batches import IGNORE


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden: which share is chosen, and what becomes of the chosen ones.

    Attributes:
        chosen: Share of the ordinary tokens that the model is asked for.
        masked: Share of the chosen ones that become [MASK].
        random: Share of the chosen ones that become any token; the others stay as they are.

    Raises:
        ValueError: A share is not in [0, 1], or masked and random together are more than 1.
    """

    chosen: float = 0.15
    masked: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        for name in ("chosen", "masked", "random"):
            check_between(name, getattr(self, name), 0.0, 1.0)
        check_between("masked + random", round(self.masked + self.random, 9), 0.0, 1.0)


def mask_tokens(
    tokens: Tensor,
    special_ids: Sequence[int],
    mask_id: int,
    vocab_size: int,
    masking: Masking = Masking(),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return tokens with some hidden, and the targets: the original ids where the model is asked, elsewhere `IGNORE`.

    Each ordinary token is chosen on its own. One draw per token then decides what becomes of it, so that the shares
    are those that were asked for.

    Args:
        tokens: Integer ids (batch, tokens), padding included.
        special_ids: Ids that are never chosen, nor put in for another token, such as [CLS] and padding.
        mask_id: The id of [MASK].
        vocab_size: Random tokens are drawn from 0 to vocab_size - 1, less the special ones.
        masking: The shares.
        generator: Of the random numbers, on the device of the tokens.

    Raises:
        ValueError: An id of the special tokens is outside the vocabulary, or nothing is left to draw from.
    """
    special = sorted({*special_ids})
    require("special_ids", special, all(0 <= i < vocab_size for i in special), f"from 0 to {vocab_size - 1}")
    require("mask_id", mask_id, 0 <= mask_id < vocab_size, f"from 0 to {vocab_size - 1}")
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    allowed[special] = False
    ordinary = allowed.nonzero().squeeze(1).to(tokens.device)
    require("vocab_size", vocab_size, len(ordinary) > 0, "larger than the number of special tokens")
    # Which tokens the model is asked for.
    draws = torch.rand((2, *tokens.shape), generator=generator, device=tokens.device)
    chosen = (draws[0] < masking.chosen) & allowed.to(tokens.device)[tokens]
    targets = torch.where(chosen, tokens, IGNORE)
    # What stands in their places: one draw, cut into three stretches.
    becomes_mask = chosen & (draws[1] < masking.masked)
    becomes_random = chosen & ~becomes_mask & (draws[1] < masking.masked + masking.random)
    others = torch.randint(len(ordinary), tokens.shape, generator=generator, device=tokens.device)
    hidden = torch.where(becomes_mask, mask_id, tokens)
    return torch.where(becomes_random, ordinary[others].to(tokens.dtype), hidden), targets


FOLLOWS, OTHER = 0, 1  # the two labels of a pair of segments


@dataclass(frozen=True)
class Pair:
    """Two segments of ids, and whether the second follows the first: `FOLLOWS` (0) or `OTHER` (1)."""

    first: list[int]
    second: list[int]
    label: int


def sentence_pair(
    documents: Sequence[Sequence[Sequence[int]]],
    rng: np.random.Generator,
    *,
    place: int | None = None,
    longest_head: int | None = None,
) -> Pair:
    """Cut a document in two between sentences; in half of all cases the end comes from another document.

    Both documents are cut after the same number of sentences, so that length and place betray nothing.

    Args:
        documents: Each is a list of sentences, each a list of ids.
        rng: Draws the cut, the label and the other document.
        place: Which document begins the pair; drawn if not given.
        longest_head: The first segment has 1 to so many sentences; all but one of the shorter document if not given.

    Raises:
        ValueError: There are fewer than two documents, as then every end would be the true one; or one has no sentence
            behind the cut.
    """
    n = len(documents)
    require("documents", n, n > 1, "at least two: else every end would be the true one")
    place = int(rng.integers(n)) if place is None else place
    # Another document, each as probable: the numbers from this one's on move up by one, so that it is never drawn.
    other = int(rng.integers(n - 1))
    other += other >= place
    label = int(rng.integers(2))
    # Where both are cut.
    shorter = min(len(documents[place]), len(documents[other]))
    longest = shorter - 1 if longest_head is None else longest_head
    require(
        f"documents[{place}] and documents[{other}]",
        f"{shorter} sentences",
        1 <= longest < shorter,
        f"of at least {max(1, longest) + 1} sentences",
    )
    cut = int(rng.integers(1, longest + 1))
    ends = documents[other if label == OTHER else place]
    first = [i for sentence in documents[place][:cut] for i in sentence]
    return Pair(first, [i for sentence in ends[cut:] for i in sentence], label)


def pretraining_targets(token_targets: Tensor, labels: Tensor) -> Tensor:
    """Return both kinds of targets as one tensor (batch, tokens + 1), as `train` wants it: the label comes last."""
    return torch.cat([token_targets, labels[:, None].to(token_targets.dtype)], dim=1)


def pretraining_loss(model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Return BERT's loss, the mean over hidden tokens plus the mean over pairs, for `train`.

    `train` divides by the number of all targets; so it is multiplied by that number here.

    Args:
        model: As `BERTForPreTraining`.
        inputs: Tokens, segments and mask, each (batch, tokens).
        targets: Of `pretraining_targets`; labels of `IGNORE` leave the second part out.
    """
    asked, labels = targets[:, :-1].flatten(), targets[:, -1]
    places = (asked != IGNORE).nonzero().squeeze(1)
    token_logits, pair_logits = model(*inputs, places=places)
    loss = pair_logits.new_zeros((), dtype=torch.float32)
    if len(places):
        loss = F.cross_entropy(token_logits.float(), asked[places])
    if bool((labels != IGNORE).any()):
        loss = loss + F.cross_entropy(pair_logits.float(), labels, ignore_index=IGNORE)
    return loss * (targets != IGNORE).sum()
