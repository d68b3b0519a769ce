"""Learning from pairs: cosines as logits, and the loss that finds the partner in both directions.

Left out: pairs gathered from several machines, and the loss of single pairs by a sigmoid (SigLIP).

Follows Gao, Yao and Chen (2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings") and Radford
et al. (2021, "Learning Transferable Visual Models From Natural Language Supervision"), whose loss asks
both directions.

With a learned factor on the cosines, as CLIP has it.

Explained and proven in ch06_classification/04_contrast.ipynb and appendix_vit_bert/04_images_and_words.ipynb;
written from there by `make promote`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import require


def pair_logits(first: Tensor, second: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Return the cosine of each of the first vectors (n, dim) with each of the second (m, dim), times scale: (n, m)."""
    return scale * F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T


def contrastive_loss(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """Return the contrastive loss of n pairs: in each row and in each column the right partner is to be found.

    It is the mean of two cross-entropies, over rows and over columns. The right partner of row i is column i. Batches
    that are accumulated are not one large batch: each text has only the others of its own batch as negatives.

    Args:
        logits: (n, n) of `pair_logits`.
        same: Bool (n, n), True where row and column belong together although they are no pair of this batch, such as
            two images with one caption: they do not count as wrong. None: only pairs belong together.

    Raises:
        ValueError: The logits are not square, or of nothing.
    """
    n = len(logits)
    require("logits", tuple(logits.shape), logits.shape == (n, n) and n > 0, "square, of at least one pair")
    if same is not None:
        require("same", tuple(same.shape), same.shape == logits.shape, f"{tuple(logits.shape)}")
        others = same & ~torch.eye(n, dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(others, -math.inf)
    targets = torch.arange(n, device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


FIRST_TEMPERATURE, LARGEST_SCALE = 0.07, 100.0


class LogitScale(nn.Module):
    """The learned factor on cosines: exp of one parameter, which starts with ln(1 / 0.07); never above 100."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))

    def forward(self) -> Tensor:
        """Return the factor, a tensor without dimensions."""
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)
