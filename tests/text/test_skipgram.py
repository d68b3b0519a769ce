"""Skip-gram and its competitor: against definitions written out, scikit-learn, and on a text made for it."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from shared.text.skipgram import (
    SkipGram,
    chance_precision,
    keep_probabilities,
    nearest_neighbors,
    neighbor_precision,
    noise_distribution,
    ppmi_matrix,
    skipgram_pairs,
    svd_vectors,
    train_skipgram,
)

documents = st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=4)


@given(documents, st.integers(1, 4))
@settings(deadline=None)
def test_pairs_are_all_words_within_the_window_of_one_document(texts, window):
    expected = Counter(
        (text[i], text[j])
        for text in texts
        for i in range(len(text))
        for j in range(len(text))
        if 0 < abs(i - j) <= window
    )
    if not expected:
        with pytest.raises(ValueError, match="no pair"):
            skipgram_pairs(texts, window)
        return
    centers, contexts = skipgram_pairs(texts, window)
    assert Counter(zip(centers.tolist(), contexts.tolist(), strict=True)) == expected


def test_keep_probabilities_by_hand():
    # Frequencies 0.9 and 0.1, threshold 0.1: sqrt(1/9) and, capped, 1.
    torch.testing.assert_close(
        keep_probabilities(torch.tensor([90.0, 10.0]), 0.1), torch.tensor([1 / 3, 1.0])
    )


def test_noise_distribution_by_hand():
    torch.testing.assert_close(noise_distribution(torch.tensor([16.0, 1.0])), torch.tensor([8 / 9, 1 / 9]))
    torch.testing.assert_close(noise_distribution(torch.tensor([9.0, 1.0]), 0), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("function", [keep_probabilities, noise_distribution])
def test_counts_must_be_positive(function):
    with pytest.raises(ValueError, match="counts"):
        function(torch.tensor([3.0, 0.0]))


def random_model() -> SkipGram:
    torch.manual_seed(0)
    model = SkipGram(7, 5)
    torch.nn.init.normal_(model.contexts.weight)
    torch.nn.init.normal_(model.centers.weight)
    return model


CENTERS, CONTEXTS = torch.tensor([0, 3, 3, 6]), torch.tensor([1, 2, 3, 0])
NEGATIVES = torch.tensor([[1, 1, 4], [0, 5, 6], [2, 2, 2], [6, 5, 0]])


def test_loss_is_logistic_regression_on_real_and_sampled_pairs():
    model = random_model()
    companions = torch.cat((CONTEXTS[:, None], NEGATIVES), dim=1)  # (pairs, 1 + K)
    logits = torch.einsum("pd,pkd->pk", model.centers.weight[CENTERS], model.contexts.weight[companions])
    labels = torch.zeros(4, 4)
    labels[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / 4
    torch.testing.assert_close(model(CENTERS, CONTEXTS, NEGATIVES), expected)


def test_gradients_are_those_derived_by_hand():
    model = random_model()
    model(CENTERS, CONTEXTS, NEGATIVES).backward()
    u, v = model.centers.weight.detach(), model.contexts.weight.detach()
    gradient_u, gradient_v = torch.zeros(7, 5), torch.zeros(7, 5)
    for w, c, others in zip(CENTERS.tolist(), CONTEXTS.tolist(), NEGATIVES.tolist(), strict=True):
        for label, k in [(1, c), *((0, n) for n in others)]:
            error = (torch.sigmoid(u[w] @ v[k]) - label) / 4
            gradient_u[w] += error * v[k]
            gradient_v[k] += error * u[w]
    torch.testing.assert_close(model.centers.weight.grad, gradient_u)
    torch.testing.assert_close(model.contexts.weight.grad, gradient_v)


def test_model_starts_at_even_odds_and_refuses_bad_shapes():
    model = SkipGram(7, 5)
    assert model(CENTERS, CONTEXTS, NEGATIVES).item() == pytest.approx(4 * math.log(2))
    for contexts, negatives in ((CONTEXTS[:2], NEGATIVES), (CONTEXTS, NEGATIVES[:2]), (CONTEXTS, CONTEXTS)):
        with pytest.raises(ValueError, match="shapes"):
            model(CENTERS, contexts, negatives)
    with pytest.raises(ValueError, match="emb_dim"):
        SkipGram(7, 0)


def two_topics() -> tuple[torch.Tensor, torch.Tensor]:
    """Words 0-4 stand near 5-9 only, words 10-14 near 15-19 only."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(5, (4000, 2), generator=generator)
    pairs[:, 1] += 5
    pairs[2000:] += 10
    return torch.cat((pairs[:, 0], pairs[:, 1])), torch.cat((pairs[:, 1], pairs[:, 0]))


GROUPS = ["a"] * 5 + ["b"] * 5 + ["c"] * 5 + ["d"] * 5


def test_training_finds_words_with_the_same_company():
    centers, contexts = two_topics()
    torch.manual_seed(0)
    model = SkipGram(20, 8)
    losses = train_skipgram(
        model,
        centers,
        contexts,
        noise_distribution(torch.ones(20)),
        epochs=8,
        batch_size=256,
        learning_rate=0.02,
    )
    assert losses[-1] < losses[0]
    assert neighbor_precision(model.centers.weight.detach(), GROUPS, k=4) > 0.9 > 2 * chance_precision(GROUPS)


def test_counting_finds_words_with_the_same_company():
    vectors = svd_vectors(ppmi_matrix(*two_topics(), 20), 4)
    assert neighbor_precision(vectors, GROUPS, k=4) == 1.0


def test_training_is_reproducible():
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        model = SkipGram(20, 4)
        train_skipgram(model, *two_topics(), torch.ones(20) / 20, epochs=1, seed=5)
        weights.append(model.centers.weight.detach())
        torch.rand(100)  # other random numbers must not matter
    assert torch.equal(*weights)


def test_training_refuses_bad_input():
    model, (centers, contexts), noise = SkipGram(20, 4), two_topics(), torch.ones(20) / 20
    with pytest.raises(ValueError, match="noise"):
        train_skipgram(model, centers, contexts, noise[:5])
    with pytest.raises(ValueError, match="centers"):
        train_skipgram(model, centers[:0], contexts[:0], noise)
    for name in ("epochs", "batch_size", "n_negatives", "learning_rate"):
        with pytest.raises(ValueError, match=name):
            train_skipgram(model, centers, contexts, noise, **{name: 0})


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
@settings(deadline=None)
def test_ppmi_is_its_definition(pairs):
    n = len(pairs)
    both, left, right = Counter(pairs), Counter(w for w, _ in pairs), Counter(c for _, c in pairs)
    expected = torch.zeros(5, 5)
    for (w, c), count in both.items():
        expected[w, c] = max(0.0, math.log((count / n) / (left[w] / n * right[c] / n)))
    centers, contexts = torch.tensor(pairs).T
    torch.testing.assert_close(ppmi_matrix(centers, contexts, 5), expected, atol=1e-6, rtol=0)


def test_svd_vectors_rebuild_a_symmetric_matrix():
    factor = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    matrix = factor @ factor.T  # positive semi-definite, rank 3
    vectors = svd_vectors(matrix, 3)
    torch.testing.assert_close(vectors @ vectors.T, matrix, atol=1e-5, rtol=0)


def test_counting_refuses_bad_input():
    with pytest.raises(ValueError, match="vocab_size=2"):
        ppmi_matrix(torch.tensor([0]), torch.tensor([2]), 2)
    with pytest.raises(ValueError, match="pairs"):
        ppmi_matrix(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="emb_dim"):
        svd_vectors(torch.eye(3), 4)


def test_neighbours_are_scikit_learns():
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    numbers, similarities = nearest_neighbors(vectors, 7)
    distances, theirs = NearestNeighbors(n_neighbors=8, metric="cosine").fit(vectors.numpy()).kneighbors()
    # kneighbors() without an argument leaves out each point itself.
    assert (numbers.numpy() == theirs[:, :7]).all()
    torch.testing.assert_close(similarities, torch.tensor(1 - distances[:, :7]).float(), atol=1e-6, rtol=0)


def test_neighbours_ignore_lengths():
    vectors = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    stretched = vectors * torch.linspace(0.1, 9, 20)[:, None]
    assert torch.equal(nearest_neighbors(vectors, 5)[0], nearest_neighbors(stretched, 5)[0])


@pytest.mark.parametrize("k", [0, 4, -1])
def test_neighbours_refuse_too_many(k):
    with pytest.raises(ValueError, match="k must be between 1 and 3"):
        nearest_neighbors(torch.eye(4), k)


def test_precision_by_hand():
    angles = torch.tensor([0.0, 0.1, 2.0, 2.35, 2.2])
    circle = torch.stack((angles.cos(), angles.sin()), dim=1)
    labels = ["x", "x", "y", "y", None]
    assert neighbor_precision(circle, labels, k=1) == 0.5
    assert chance_precision(labels) == 0.25
    assert chance_precision(["x"] * 4) == 1.0


def test_chance_is_what_random_vectors_score():
    labels = ["x"] * 100 + ["y"] * 50 + [None] * 150
    vectors = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    assert neighbor_precision(vectors, labels) == pytest.approx(chance_precision(labels), abs=0.05)


def test_precision_refuses_bad_labels():
    with pytest.raises(ValueError, match="labels"):
        neighbor_precision(torch.eye(4), ["x"] * 3)
    with pytest.raises(ValueError, match="labels"):
        neighbor_precision(torch.eye(4), [None] * 4)
    with pytest.raises(ValueError, match="label"):
        chance_precision([None, None])
