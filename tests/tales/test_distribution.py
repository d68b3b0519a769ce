"""`shared/tales/distribution.py`: exact chances of the next token, against the grammar's own figures and many draws."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from shared.tales.distribution import NextTokens, expected_loss, next_tokens
from shared.tales.encoding import VOCAB_SIZE, tale_encoding
from shared.tales.generator import TaleGenerator, entropy
from shared.training.batches import IGNORE
from shared.training.losses import next_token_loss

STORIES = list(TaleGenerator(31).stories(600))


@pytest.fixture(scope="module")
def known() -> list[NextTokens]:
    return [next_tokens(story.text) for story in STORIES]


def dense(story: NextTokens, length: int) -> torch.Tensor:
    """Return the distributions as a table, float64 (length, VOCAB_SIZE)."""
    table = torch.zeros(length, VOCAB_SIZE, dtype=torch.float64)
    places = np.repeat(np.arange(len(story.counts)), story.counts)
    table[places, story.ids] = torch.from_numpy(story.probabilities)
    return table


def test_the_chances_of_a_storys_tokens_multiply_to_that_of_the_story(known):
    for story, found in zip(STORIES, known, strict=True):
        assert len(found.counts) == len(tale_encoding().encode(story.text)) + 1
        assert np.log(found.chosen).sum() == pytest.approx(story.log_probability, abs=1e-9)


def test_each_place_has_a_distribution_over_different_tokens(known):
    for found in known:
        ends = np.cumsum(found.counts)
        assert ends[-1] == len(found.ids) == len(found.probabilities)
        assert np.add.reduceat(found.probabilities, ends - found.counts) == pytest.approx(1, abs=1e-12)
        assert (found.probabilities > 0).all()
        for start, end in zip(ends - found.counts, ends, strict=True):
            assert len(set(found.ids[start:end])) == end - start


def test_the_entropies_of_all_places_add_up_to_that_of_the_grammar(known):
    sums = [-(found.probabilities * np.log(found.probabilities)).sum() for found in known]
    assert abs(np.mean(sums) - entropy()) < 4 * np.std(sums) / len(sums) ** 0.5


@pytest.mark.parametrize("place", [0, 1, 2, 5])
def test_tokens_are_drawn_as_often_as_their_chances_say(place):
    # The draws are of the generator, which knows nothing of tokens.
    encoding, n = tale_encoding(), 6000
    texts = [story.text for story in TaleGenerator(32).stories(n)]
    ids = [encoding.encode(text) for text in texts]
    prefix = Counter(tuple(row[:place]) for row in ids).most_common(1)[0][0]
    text = next(text for text, row in zip(texts, ids, strict=True) if tuple(row[:place]) == prefix)
    found = next_tokens(text)
    start = found.counts[:place].sum()
    chances = dict(
        zip(
            found.ids[start : start + found.counts[place]],
            found.probabilities[start : start + found.counts[place]],
            strict=True,
        )
    )
    drawn = Counter(row[place] for row in ids if tuple(row[:place]) == prefix)
    assert drawn.keys() <= chances.keys()
    n = drawn.total()
    for token, chance in chances.items():
        assert abs(drawn[token] - n * chance) <= 5 * math.sqrt(n * chance * (1 - chance)) + 1e-9


def test_what_was_used_up_has_no_chance():
    story = next(story for story in STORIES if story.plan == "cake")
    ids, found = tale_encoding().encode(story.text), next_tokens(story.text)
    table = dense(found, len(found.counts))
    first, second = (tale_encoding().encode(" " + story.facts[key])[0] for key in ("first", "second"))
    place = ids.index(second)  # the second ingredient must differ from the first
    assert place > ids.index(first) and table[place, first] == 0 < table[place, second]


@pytest.mark.parametrize(
    "text", ["", "Once upon a time.", STORIES[0].text[:-1], STORIES[0].text + " The end."]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a story of the grammar"):
        next_tokens(text)


def test_the_expected_loss_is_the_mean_over_all_tokens_that_may_come(known):
    stories = known[:3]
    length = max(len(story.counts) for story in stories) + 2
    torch.manual_seed(0)
    logits = torch.randn(3, length, VOCAB_SIZE, requires_grad=True)
    losses, outside = expected_loss(logits, stories)
    tables = torch.stack([dense(story, length) for story in stories])
    log_p = logits.double().log_softmax(dim=-1)
    torch.testing.assert_close(losses, -(tables * log_p).sum(dim=-1).float(), atol=1e-5, rtol=1e-5)
    inside = (log_p.exp() * (tables > 0)).sum(dim=-1)
    wanted = torch.where(tables.sum(dim=-1) > 0, -inside.log(), 0.0)
    torch.testing.assert_close(outside, wanted.float(), atol=1e-5, rtol=1e-5)
    gradient = torch.autograd.grad(losses.sum(), logits)[0]
    counted = (tables.sum(dim=-1, keepdim=True) > 0).double()
    torch.testing.assert_close(gradient, ((log_p.exp() - tables) * counted).float(), atol=1e-6, rtol=1e-5)


def test_draws_have_the_expected_loss_on_average():
    # The loss of one drawn token, averaged over a place's tokens with their chances.
    found = next_tokens(STORIES[5].text)
    length = len(found.counts)
    torch.manual_seed(1)
    logits = torch.randn(1, length, VOCAB_SIZE)
    losses, _ = expected_loss(logits, [found])
    place = int(found.counts.argmax())
    start = found.counts[:place].sum()
    mean = 0.0
    for i in range(start, start + found.counts[place]):
        targets = torch.full((1, length), IGNORE)
        targets[0, place] = int(found.ids[i])
        mean += found.probabilities[i] * next_token_loss(logits, targets).item()
    assert losses[0, place].item() == pytest.approx(mean, rel=1e-5)


def test_the_true_distribution_has_the_entropy_as_loss_and_nothing_outside():
    found = next_tokens(STORIES[7].text)
    logits = dense(found, len(found.counts)).clamp(min=1e-30).log().float()[None]
    losses, outside = expected_loss(logits, [found])
    floor = -(found.probabilities * np.log(found.probabilities)).sum()
    assert losses.sum().item() == pytest.approx(floor, abs=1e-3)
    assert outside.abs().max() < 1e-5


def test_rows_and_stories_must_fit(known):
    length = len(known[0].counts)
    with pytest.raises(ValueError, match="logits have 2 rows"):
        expected_loss(torch.zeros(2, length, VOCAB_SIZE), known[:1])
    with pytest.raises(ValueError, match=f"1 rows of {length - 1} tokens; 1 stories have up to {length}"):
        expected_loss(torch.zeros(1, length - 1, VOCAB_SIZE), known[:1])
    with pytest.raises(ValueError, match=f"at least the tokenizer's {VOCAB_SIZE} tokens, got 2000"):
        expected_loss(torch.zeros(1, length, 2000), known[:1])


def test_a_padded_vocabulary_changes_nothing_if_the_added_ids_are_never_expected(known):
    length = len(known[0].counts)
    logits = torch.randn(1, length, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([logits, torch.full((1, length, 64), -torch.inf)], dim=2)
    for narrow, wide in zip(expected_loss(logits, known[:1]), expected_loss(padded, known[:1]), strict=True):
        torch.testing.assert_close(wide, narrow)
