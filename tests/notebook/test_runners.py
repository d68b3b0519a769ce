"""The runners of chapter 1's race: probabilities, what they can see, and bad input."""

import itertools

import pytest
import torch

from shared.notebook.runners import RULES, FeedForwardLM, RecurrentLM, RuleWriter, sample_ids

SMALL = [[["a", "ab"], ["c", "bc"]], [["!", "?"]]]


def test_rules_hand_out_exactly_one():
    rules = RuleWriter(SMALL)
    texts = {"".join(words) for words in itertools.product(*rules.choices)}
    assert sum(map(rules.probability, texts)) == pytest.approx(1.0)
    assert rules.n_stories == 8


def test_two_ways_to_write_a_text_add_up():
    rules = RuleWriter(SMALL)
    assert rules.probability("abc!") == 2 / 8  # a + bc and ab + c
    assert rules.probability("ac?") == 1 / 8


def test_what_the_rules_do_not_foresee_is_impossible():
    rules = RuleWriter()
    story = rules.sample(1)
    assert rules.probability(story) == pytest.approx(1 / rules.n_stories)
    for text in (
        "",
        story[:-1],
        story + " ",
        story.replace("One", "Two").replace("Long", "Short").replace("On a", "At a"),
    ):
        assert rules.probability(text) == 0


def test_rules_are_chosen_alike():
    rules = RuleWriter()
    first = [rules.sample(seed) for seed in range(300)]
    assert first == [rules.sample(seed) for seed in range(300)]
    for opening in RULES[0][0]:
        assert 60 < sum(text.startswith(opening) for text in first) < 140


def test_bad_rules():
    with pytest.raises(ValueError, match="rules"):
        RuleWriter([[[]]])
    with pytest.raises(TypeError, match="text"):
        RuleWriter().probability(b"bytes")


@pytest.mark.parametrize("build", [lambda: FeedForwardLM(20, 3, 4, 8), lambda: RecurrentLM(20, 4, 8)])
def test_a_network_never_sees_what_comes_later(build):
    torch.manual_seed(0)
    model = build()
    tokens = torch.randint(20, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 20
    assert model(tokens).shape == (2, 9, 20)
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(tokens)[:, 5:], model(changed)[:, 5:])


def test_how_far_back_a_network_sees():
    """The feed-forward network sees its window and not one token more; the recurrent one sees everything."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 20, (1, 10))
    changed = tokens.clone()
    changed[0, 4] = 0
    feed_forward, recurrent = FeedForwardLM(20, 3, 4, 8), RecurrentLM(20, 4, 8)
    same = (feed_forward(tokens) == feed_forward(changed)).all(-1)[0]
    assert same.tolist() == [True] * 4 + [False] * 3 + [True] * 3
    assert (recurrent(tokens)[0, -1] != recurrent(changed)[0, -1]).any()


def test_the_feed_forward_network_by_hand():
    """The output at one place is that of the plain formula on the vectors of its window."""
    torch.manual_seed(0)
    model = FeedForwardLM(20, 3, 4, 8).double()
    tokens = torch.tensor([[7, 3, 11, 2]])
    window = torch.stack([model.embedding.weight[token] for token in (3, 11, 2)], dim=1)  # (E, context)
    hidden = torch.tanh(model.hidden.weight @ window.flatten() + model.hidden.bias)
    torch.testing.assert_close(model(tokens)[0, -1], model.output.weight @ hidden + model.output.bias)


def test_bad_sizes():
    with pytest.raises(ValueError, match="context"):
        FeedForwardLM(20, 0, 4, 8)
    with pytest.raises(ValueError, match="hidden_size"):
        RecurrentLM(20, 4, 0)


def test_sampling_repeats_and_stops():
    torch.manual_seed(0)
    model = RecurrentLM(6, 4, 8)
    drawn = sample_ids(model, 0, 60, seed=3)
    assert len(drawn) == 60 and drawn == sample_ids(model, 0, 60, seed=3) != sample_ids(model, 0, 60, seed=4)
    assert sample_ids(model, 0, 60, seed=3, stop=drawn[7]) == drawn[: drawn.index(drawn[7])]
    with pytest.raises(ValueError, match="n must"):
        sample_ids(model, 0, 0, seed=3)
