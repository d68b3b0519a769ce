"""Hidden tokens and pairs: shares, what is never chosen, labels, and the loss as `train` sees it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.model.bert import BERTConfig, BERTForPreTraining
from shared.training.batches import IGNORE
from shared.training.loop import train
from shared.training.masking import (
    FOLLOWS,
    OTHER,
    Masking,
    mask_tokens,
    pretraining_loss,
    pretraining_targets,
    sentence_pair,
)

SPECIAL, MASK, VOCAB = (0, 1, 2, 3, 4), 4, 1000


def test_of_100000_chosen_tokens_80_10_10_percent() -> None:
    tokens = torch.randint(5, VOCAB, (700, 1000), generator=torch.Generator().manual_seed(0))
    hidden, targets = mask_tokens(tokens, SPECIAL, MASK, VOCAB, generator=torch.Generator().manual_seed(1))
    chosen = targets != IGNORE
    assert chosen.sum() > 100_000
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.002)
    assert (targets[chosen] == tokens[chosen]).all()
    assert (hidden[~chosen] == tokens[~chosen]).all()
    masked, kept = hidden[chosen] == MASK, hidden[chosen] == tokens[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert kept.float().mean().item() == pytest.approx(0.1 + 0.1 / (VOCAB - 5), abs=0.01)
    others = hidden[chosen][~masked & ~kept]
    assert len(others) / int(chosen.sum()) == pytest.approx(0.1, abs=0.01)
    # Each ordinary token is as probable as any other; none of the special ones is put in.
    assert others.min() >= 5
    counts = torch.bincount(others, minlength=VOCAB)[5:].double()
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum().item() < 1200


def test_special_tokens_and_padding_are_never_chosen() -> None:
    tokens = torch.arange(10).repeat(50, 1)
    hidden, targets = mask_tokens(tokens, SPECIAL, MASK, 10, Masking(1.0, 1.0, 0.0))
    assert (hidden[:, :5] == tokens[:, :5]).all()
    assert (targets[:, :5] == IGNORE).all()
    assert (hidden[:, 5:] == MASK).all()
    assert (targets[:, 5:] == tokens[:, 5:]).all()


def test_nothing_and_everything() -> None:
    tokens = torch.arange(5, 105).view(4, 25)
    hidden, targets = mask_tokens(tokens, SPECIAL, MASK, VOCAB, Masking(chosen=0.0))
    assert torch.equal(hidden, tokens)
    assert (targets == IGNORE).all()
    hidden, targets = mask_tokens(tokens, SPECIAL, MASK, VOCAB, Masking(1.0, 0.0, 0.0))
    assert torch.equal(hidden, tokens)
    assert torch.equal(targets, tokens)


def test_the_same_generator_gives_the_same_masks() -> None:
    tokens = torch.arange(5, 105).view(4, 25)
    one, other = (
        mask_tokens(tokens, SPECIAL, MASK, VOCAB, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_bad_shares_and_vocabularies() -> None:
    with pytest.raises(ValueError, match=r"chosen must be between 0\.0 and 1\.0"):
        Masking(chosen=1.5)
    with pytest.raises(ValueError, match=r"masked \+ random must be between 0.0 and 1.0"):
        Masking(0.15, 0.8, 0.3)
    with pytest.raises(ValueError, match="vocab_size must be larger than the number of special tokens"):
        mask_tokens(torch.zeros(1, 3, dtype=torch.int64), SPECIAL, MASK, 5)
    with pytest.raises(ValueError, match="special_ids must be from 0 to 3"):
        mask_tokens(torch.zeros(1, 3, dtype=torch.int64), SPECIAL, MASK, 4)


DOCUMENTS = [[[100 * d + s] for s in range(4 + d)] for d in range(5)]  # an id says document and sentence


def test_label_0_follows_and_label_1_comes_from_another_document() -> None:
    rng = np.random.default_rng(0)
    pairs = [sentence_pair(DOCUMENTS, rng) for _ in range(3000)]
    for pair in pairs:
        head, tail = {i // 100 for i in pair.first}, {i // 100 for i in pair.second}
        assert len(head) == len(tail) == 1
        assert (head == tail) == (pair.label == FOLLOWS)
        # Both are cut after the same number of sentences, and nothing is left out.
        assert pair.first == [100 * min(head) + s for s in range(len(pair.first))]
        assert pair.second[0] % 100 == len(pair.first)
        assert len(pair.first) + len(pair.second) == 4 + min(tail)
    labels = np.array([pair.label for pair in pairs])
    assert labels.mean() == pytest.approx(0.5, abs=0.03)
    # Length does not betray the label: as many sentences before the cut, in both kinds.
    before = np.array([len(pair.first) for pair in pairs])
    assert before[labels == FOLLOWS].mean() == pytest.approx(before[labels == OTHER].mean(), abs=0.12)


def test_each_document_can_begin_a_pair_and_heads_can_be_short() -> None:
    rng = np.random.default_rng(1)
    for place in range(5):
        pair = sentence_pair(DOCUMENTS, rng, place=place, longest_head=2)
        assert pair.first[0] // 100 == place
        assert len(pair.first) <= 2


def test_one_document_has_no_other_end() -> None:
    with pytest.raises(ValueError, match="documents must be at least two"):
        sentence_pair(DOCUMENTS[:1], np.random.default_rng(0))
    with pytest.raises(ValueError, match="of at least 2 sentences, got '1 sentences'"):
        sentence_pair([[[1]], [[2], [3]]], np.random.default_rng(0))
    with pytest.raises(ValueError, match="of at least 9 sentences"):
        sentence_pair(DOCUMENTS, np.random.default_rng(0), longest_head=8)


def test_the_loss_is_the_mean_over_tokens_plus_the_mean_over_pairs() -> None:
    torch.manual_seed(0)
    model = BERTForPreTraining(BERTConfig(50, 12, 2, 16, 2, 1, dropout=0.0))
    tokens = torch.randint(5, 50, (6, 10))
    hidden, targets = mask_tokens(tokens, SPECIAL, MASK, 50, Masking(0.4))
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    inputs = hidden, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
    logits, pairs = model(*inputs)
    token_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    expected = token_loss + F.cross_entropy(pairs, labels)
    log = train(
        model,
        [(inputs, pretraining_targets(targets, labels))],
        torch.optim.SGD(model.parameters(), lr=0.0),
        n_steps=1,
        loss=pretraining_loss,
    )
    assert log[1].loss == pytest.approx(expected.item(), rel=1e-5)
    # Without pairs, without tokens.
    both = pretraining_targets(targets, torch.full_like(labels, IGNORE))
    n = (both != IGNORE).sum()
    assert pretraining_loss(model, inputs, both).item() / n == pytest.approx(token_loss.item(), rel=1e-5)
    none = pretraining_targets(torch.full_like(targets, IGNORE), labels)
    assert pretraining_loss(model, inputs, none).item() / 6 == pytest.approx(
        F.cross_entropy(pairs, labels).item(), rel=1e-5
    )


def test_a_model_learns_a_pattern_from_both_sides() -> None:
    """Rows a x b, where x is the sum of a and b: neither side alone is enough."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = BERTForPreTraining(BERTConfig(20, 8, 2, 32, 4, 2, dropout=0.0))

    def batches():
        while True:
            a, b = (torch.from_numpy(rng.integers(0, 3, 64)) for _ in range(2))
            tokens = torch.stack([torch.full((64,), 2), 5 + a, torch.full((64,), MASK), 8 + b], 1)
            targets = torch.full((64, 5), IGNORE)
            targets[:, 2] = 11 + a + b
            yield (tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)), targets

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    train(model, batches(), optimizer, n_steps=250, loss=pretraining_loss)
    inputs, targets = next(batches())
    with torch.no_grad():
        right = model.eval()(*inputs)[0][:, 2].argmax(1) == targets[:, 2]
    assert right.float().mean() > 0.9
