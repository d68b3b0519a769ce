"""`shared.generation.speculation` against plain greedy generation, for good, bad and mad guesses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.generation.engine import generate
from shared.generation.speculation import DraftModel, PromptLookup, Speculation, generate_speculatively
from tests.generation.decoders import (
    BROKEN,
    MODEL,
    MODELS,
    SAID,
    Told,
    broken_weights,
    build,
    random_prompts,
    slowly,
)

DRAFTERS = ("lookup", "corpus", "itself", "small", "wild", "none", "other ids", "fewer ids", "more ids")


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(MODELS)),
    rng=st.randoms(use_true_random=False),
    n_new=st.integers(1, 20),
    n_ahead=st.integers(1, 6),
    drafter=st.sampled_from(DRAFTERS),
    n_stops=st.integers(0, 3),
)
def test_speculative_decoding_writes_the_same(name, rng, n_new, n_ahead, drafter, n_stops):
    model, (prompt,) = MODELS[name], random_prompts(rng, 1)
    propose = {
        "lookup": PromptLookup(),
        "corpus": PromptLookup(2, corpus=random_prompts(rng, 1, longest=200)[0]),
        "itself": DraftModel(model),
        "small": DraftModel(build(1, n_layers=1, context_length=16)),  # whose context ends first
        "wild": lambda ids, n: [rng.randrange(40) for _ in range(n + 3)],
        "none": lambda ids, n: [],
        "other ids": lambda ids, n: [rng.choice([-1, 40, 10**6, rng.randrange(40)]) for _ in range(n)],
        "fewer ids": DraftModel(build(2, n_layers=1, vocab_size=25)),
        "more ids": DraftModel(build(3, n_layers=1, vocab_size=64)),
    }[drafter]
    stop_tokens = rng.sample(range(40), n_stops)
    expected = generate(model, [prompt], n_new, stop_tokens=stop_tokens)[0]
    for _ in range(2):  # a drafter may be used again
        result = generate_speculatively(
            model, prompt, n_new, propose, n_ahead=n_ahead, stop_tokens=stop_tokens
        )
        assert result.ids == expected
        assert 0 <= result.n_accepted <= result.n_proposed <= n_ahead * result.n_passes
        assert len(expected) <= result.n_passes + result.n_accepted <= n_new
    if drafter == "itself" and not n_stops:
        assert result.acceptance_rate in (1.0, 0.0) and result.n_passes == 1 + -(
            -(n_new - 1) // (n_ahead + 1)
        )


def test_prompt_lookup():
    lookup = PromptLookup(3, corpus=[8, 9, 30, 31])
    assert lookup([1, 2, 3, 4, 1, 2, 3], 2) == [4, 1]
    assert lookup([2, 5, 1, 2, 6, 1, 2], 3) == [6, 1, 2]  # the newest of the longest match
    assert lookup([1, 9], 5) == [30, 31]
    assert lookup([7, 7], 3) == [7]
    assert lookup([1, 2, 3], 4) == []


def test_a_draft_model_reads_each_token_once():
    n_read = []
    draft = build(1)
    handle = draft.register_forward_pre_hook(lambda _, arguments: n_read.append(arguments[0].shape[1]))
    propose = DraftModel(draft)
    first = propose([1, 2, 3], 3)
    assert first == generate(draft, [[1, 2, 3]], 3)[0]
    n_read.clear()
    wrong = [1, 2, 3, first[0], (first[1] + 1) % 40]
    proposed = propose(wrong, 2)
    handle.remove()
    assert n_read == [1, 1] and proposed == slowly(draft, wrong, 2)


def test_speculation_refuses_and_counts():
    with pytest.raises(ValueError, match="n_ahead must be at least 1, got 0"):
        generate_speculatively(MODEL, [1], 2, PromptLookup(), n_ahead=0)
    with pytest.raises(TypeError, match=r"n_ahead must be an int, got 2\.5"):
        generate_speculatively(MODEL, [1], 2, PromptLookup(), n_ahead=2.5)
    with pytest.raises(ValueError, match="context_length"):
        generate_speculatively(MODEL, [1] * 30, 4, PromptLookup())
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        PromptLookup(0)
    with pytest.raises(ValueError, match=r"corpus must hold ids from 0 to .*, got -1"):
        PromptLookup(2, corpus=[3, -1])
    with pytest.raises(ValueError, match=r"corpus must hold ids from 0 to .*, got 'a'"):
        PromptLookup(2, corpus="abc")
    assert Speculation([1], 1, 0, 0).acceptance_rate == 0.0
    assert Speculation([1], 1, 8, 6).acceptance_rate == 0.75


@pytest.mark.parametrize("vocab_size", [169, 1000])
def test_a_draft_of_another_tokenizer_is_refused_before_anything_is_computed(vocab_size):
    draft, n_calls = build(vocab_size=vocab_size), []
    handle = MODEL.register_forward_pre_hook(lambda *_: n_calls.append(1))
    with pytest.raises(ValueError, match=f"vocab_size of the draft model must be .* 40.*, got {vocab_size}"):
        generate_speculatively(MODEL, [1], 5, DraftModel(draft))
    handle.remove()
    assert not n_calls


def test_a_draft_of_a_padded_vocabulary_helps_as_before():
    """Of a draft whose added ids are never the most probable, every guess is right that was right before."""
    draft, padded = build(), build(vocab_size=64)
    padded.load_state_dict(
        {
            name: torch.cat([value, torch.zeros(24, 16)]) if len(value) == 40 else value
            for name, value in draft.state_dict().items()
        }
    )
    results = [generate_speculatively(MODEL, [1, 2], 20, DraftModel(model)) for model in (draft, padded)]
    assert results[0] == results[1] and results[0].acceptance_rate == 1.0


@pytest.mark.parametrize("propose", ["lookup", "itself"])
@pytest.mark.parametrize("length", [1, 20, 32])
def test_the_last_token_needs_no_place_in_the_context(length, propose):
    prompt, n_new = [3, 4] * (length // 2) or [3], 33 - length
    drafter = PromptLookup() if propose == "lookup" else DraftModel(MODEL)
    assert generate_speculatively(MODEL, prompt, n_new, drafter).ids == slowly(MODEL, prompt, n_new)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_does_not_write(name):
    with pytest.raises(ValueError, match=f"logits must be numbers or -inf, .* got {SAID[name]}$"):
        generate_speculatively(Told(BROKEN[name]), [1, 2, 1], 5, PromptLookup())
    with pytest.raises(ValueError, match=f"logits must be numbers or -inf, .* got {SAID[name]}$"):
        DraftModel(Told(BROKEN[name]))([1, 2], 3)
    with pytest.raises(ValueError, match="logits must be"):
        generate_speculatively(MODEL, [1, 2], 5, DraftModel(broken_weights()))


def test_numbers_of_numpy_and_torch():
    expected = generate(MODEL, [[1, 2, 1]], 8, stop_tokens=[5])[0]
    for prompt, number in ((np.array([1, 2, 1]), np.int64), (torch.tensor([1, 2, 1]), torch.tensor)):
        lookup = PromptLookup(number(3), corpus=np.array([1, 2, 3]))
        options = {"n_ahead": number(4), "stop_tokens": iter([number(5)])}
        written = generate_speculatively(MODEL, prompt, number(8), lookup, **options)
        assert written.ids == expected and all(type(token) is int for token in written.ids)


def test_every_module_keeps_its_own_mode():
    model, draft = build(dropout=0.5), build(1, dropout=0.5)
    model.blocks[0].eval()
    draft.blocks[1].eval()
    before = [[module.training for module in each.modules()] for each in (model, draft)]
    generate_speculatively(model, [1, 2], 8, DraftModel(draft))
    assert [[module.training for module in each.modules()] for each in (model, draft)] == before
