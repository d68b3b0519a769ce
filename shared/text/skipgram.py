"""Word vectors from the company of words: skip-gram with negative sampling, its classical competitor
(positive pointwise mutual information, shortened by singular value decomposition), and a measure of both.

Follows Mikolov et al. (2013, "Distributed Representations of Words and Phrases and their
Compositionality") and Levy, Goldberg and Dagan (2015).

Left out: phrases, subwords, windows of random width, and matrices too large for memory: neighbours and
counts are dense, words by words.

Explained and proven in ch02_text_data/05_embeddings.ipynb; written from there by `make promote`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_between, check_sizes


def skipgram_pairs(documents: Iterable[Sequence[int] | Tensor], window: int) -> tuple[Tensor, Tensor]:
    """Return all pairs (centers, contexts) of words at most `window` places apart in the same document.

    Args:
        documents: Word ids of each document, in order.
        window: Largest distance within a pair.

    Returns:
        Two int64 tensors of shape (pairs,); each pair of places is there twice, in both roles.

    Raises:
        ValueError: `window` is below 1, or no document has two words.
    """
    check_sizes(window=window)
    centers, contexts = [], []
    for document in documents:
        ids = torch.as_tensor(document, dtype=torch.int64)
        for distance in range(1, min(window, len(ids) - 1) + 1):
            earlier, later = ids[:-distance], ids[distance:]
            centers += [earlier, later]
            contexts += [later, earlier]
    if not centers:
        raise ValueError("documents hold no pair: at least one needs two words")
    return torch.cat(centers), torch.cat(contexts)


def keep_probabilities(counts: Tensor, threshold: float = 1e-3) -> Tensor:
    """Return with which probability an occurrence of each word is kept when frequent words are thinned out.

    min(1, sqrt(threshold / frequency)), equation 5 of Mikolov et al. (2013).
    Raises ValueError if a count or `threshold` is not positive.
    """
    if not (counts > 0).all() or threshold <= 0:
        raise ValueError(f"counts and threshold must be positive, got {counts.min()} and {threshold}")
    return (threshold * counts.sum() / counts).sqrt().clamp(max=1.0)


def noise_distribution(counts: Tensor, power: float = 0.75) -> Tensor:
    """Return the probability of each word as a negative sample, proportional to count ** power.

    Raises ValueError if a count is not positive.
    """
    if not (counts > 0).all():
        raise ValueError(f"counts must be positive, got {counts.min()}")
    weights = counts.double() ** power
    return (weights / weights.sum()).float()


class SkipGram(nn.Module):
    """Two tables of word vectors, trained to tell real pairs of neighbours from sampled ones.

    `centers.weight` (vocab_size, emb_dim) holds the vectors to use afterwards, `contexts.weight` those of the
    words as company. Equation 4 of Mikolov et al. (2013). Raises ValueError if a size is below 1.
    """

    def __init__(self, vocab_size: int, emb_dim: int) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, emb_dim=emb_dim)
        self.centers = nn.Embedding(vocab_size, emb_dim)
        self.contexts = nn.Embedding(vocab_size, emb_dim)
        # Small centers and zero contexts, as in the authors' program: training starts at sigma(0) = 1/2 everywhere.
        nn.init.uniform_(self.centers.weight, -0.5 / emb_dim, 0.5 / emb_dim)
        nn.init.zeros_(self.contexts.weight)

    def forward(self, centers: Tensor, contexts: Tensor, negatives: Tensor) -> Tensor:
        """Return the loss, a scalar: mean over the pairs, sum over the negatives of a pair.

        Args:
            centers: int64 (pairs,).
            contexts: int64 (pairs,), the real neighbours.
            negatives: int64 (pairs, K), the sampled ones.

        Raises:
            ValueError: The shapes do not fit.
        """
        if centers.dim() != 1 or contexts.shape != centers.shape or negatives.shape[:-1] != centers.shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in (centers, contexts, negatives))
            raise ValueError(f"shapes must be (pairs,), (pairs,) and (pairs, K), got {shapes}")
        center = self.centers(centers)  # (pairs, D)
        real = (center * self.contexts(contexts)).sum(dim=-1)  # (pairs,)
        sampled = (self.contexts(negatives) @ center.unsqueeze(-1)).squeeze(-1)  # (pairs, K)
        return -(F.logsigmoid(real) + F.logsigmoid(-sampled).sum(dim=-1)).mean()


def train_skipgram(
    model: SkipGram,
    centers: Tensor,
    contexts: Tensor,
    noise: Tensor,
    *,
    epochs: int = 4,
    batch_size: int = 4096,
    n_negatives: int = 5,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> list[float]:
    """Train in place with Adam and return the mean loss of each epoch.

    Args:
        model: Its tables are changed.
        centers: int64 (pairs,), from `skipgram_pairs`.
        contexts: int64 (pairs,).
        noise: Probability of each word as a negative sample, (vocab_size,), from `noise_distribution`.
        epochs: Passes over the pairs.
        batch_size: Pairs of a step; the last batch of an epoch may be smaller.
        n_negatives: Negative samples K of a pair. One may happen to be the real neighbour; that is rare and kept.
        learning_rate: Of Adam.
        seed: Of the order of the pairs and of the negatives.

    Raises:
        ValueError: Shapes do not fit, or a number is not positive.
    """
    if centers.dim() != 1 or centers.shape != contexts.shape or not len(centers):
        raise ValueError(f"centers and contexts must be (pairs,), got {centers.shape} and {contexts.shape}")
    if noise.shape != (model.centers.num_embeddings,):
        raise ValueError(f"noise must be ({model.centers.num_embeddings},), got {tuple(noise.shape)}")
    if min(epochs, batch_size, n_negatives, learning_rate) <= 0:
        raise ValueError(
            "epochs, batch_size, n_negatives and learning_rate must be positive, got "
            f"{epochs}, {batch_size}, {n_negatives}, {learning_rate}"
        )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(centers), generator=generator).split(batch_size):
            size = len(batch) * n_negatives
            drawn = torch.multinomial(noise, size, replacement=True, generator=generator)
            loss = model(centers[batch], contexts[batch], drawn.view(len(batch), n_negatives))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / len(centers))
    return losses


def nearest_neighbors(vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return for each row the `k` other rows of highest cosine similarity, best first.

    Args:
        vectors: (words, dimensions). A row of zeros is similar to nothing (0).
        k: Number of neighbours.

    Returns:
        Their numbers, int64 (words, k), and the similarities (words, k).

    Raises:
        ValueError: `k` is not between 1 and words - 1.
    """
    check_between("k", k, 1, len(vectors) - 1)
    directions = F.normalize(vectors, dim=1)
    similarities = directions @ directions.T  # (words, words)
    similarities.fill_diagonal_(-math.inf)  # nobody is their own neighbour
    values, numbers = similarities.topk(k, dim=1)
    return numbers, values


def ppmi_matrix(centers: Tensor, contexts: Tensor, vocab_size: int) -> Tensor:
    """Return max(0, log(P(w, c) / (P(w) P(c)))) for all words w and c, (vocab_size, vocab_size); 0 for unseen pairs.

    Args:
        centers: int64 (pairs,), from `skipgram_pairs`.
        contexts: int64 (pairs,).
        vocab_size: Number of words.

    Raises:
        ValueError: There is no pair, or an id is not below `vocab_size`.
    """
    if not len(centers) or centers.shape != contexts.shape:
        raise ValueError(f"centers and contexts must be (pairs,), got {centers.shape} and {contexts.shape}")
    if max(centers.max(), contexts.max()) >= vocab_size:
        raise ValueError(
            f"ids must be below vocab_size={vocab_size}, got {max(centers.max(), contexts.max())}"
        )
    counts = torch.bincount(centers * vocab_size + contexts, minlength=vocab_size**2).double()
    counts = counts.view(vocab_size, vocab_size)
    expected = counts.sum(dim=1, keepdim=True) * counts.sum(dim=0) / counts.sum()
    # A word without pairs has nothing expected: 0 / 0 is set to 0 like every unseen pair.
    ratio = torch.where(counts > 0, counts / expected.clamp(min=1e-12), 1.0)
    return ratio.log().clamp(min=0.0).float()


def svd_vectors(matrix: Tensor, emb_dim: int) -> Tensor:
    """Return a row of `emb_dim` numbers for each row of a matrix: U sqrt(S) of its singular value decomposition.

    The square root weighs the directions, as recommended by Levy, Goldberg and Dagan (2015).
    Raises ValueError if `emb_dim` is not between 1 and the size of the matrix.
    """
    check_between("emb_dim", emb_dim, 1, min(matrix.shape))
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :emb_dim] * values[:emb_dim].sqrt()


def neighbor_precision(vectors: Tensor, labels: Sequence[str | None], k: int = 10) -> float:
    """Return which share of the `k` nearest neighbours of labelled words carry the word's own label.

    Args:
        vectors: (words, dimensions). All words can be neighbours.
        labels: A label for each word, None for a word without: it is not asked, and as a neighbour it is wrong.
        k: Neighbours of each word.

    Raises:
        ValueError: The lengths differ, no word is labelled, or `k` is not between 1 and words - 1.
    """
    if len(labels) != len(vectors) or all(label is None for label in labels):
        raise ValueError(f"{len(labels)} labels for {len(vectors)} words; needed are as many, not all None")
    numbers, _ = nearest_neighbors(vectors, k)
    hits = [
        labels[n] == label for label, row in zip(labels, numbers.tolist(), strict=True) if label for n in row
    ]
    return sum(hits) / len(hits)


def chance_precision(labels: Sequence[str | None]) -> float:
    """Return the neighbour precision to expect if neighbours were drawn at random from the other words.

    Raises ValueError if no word is labelled or there are fewer than two words.
    """
    sizes = Counter(label for label in labels if label is not None)
    if not sizes or len(labels) < 2:
        raise ValueError(f"labels must hold at least two words and one label, got {len(labels)} words")
    return sum(size * (size - 1) for size in sizes.values()) / sizes.total() / (len(labels) - 1)
