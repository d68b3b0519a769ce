"""`shared.generation.speculation` against plain greedy generation, for good, bad and mad guesses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.generation.engine import generate
from shared.generation.speculation import DraftModel, PromptLookup, Speculation, generate_speculatively
from tests.generation.decoders import MODEL, MODELS, build, random_prompts, slowly


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(MODELS)),
    rng=st.randoms(use_true_random=False),
    n_new=st.integers(1, 20),
    n_ahead=st.integers(1, 6),
    drafter=st.sampled_from(["lookup", "corpus", "itself", "small", "wild", "none"]),
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
    with pytest.raises(ValueError, match="context_length"):
        generate_speculatively(MODEL, [1] * 30, 3, PromptLookup())
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        PromptLookup(0)
    assert Speculation([1], 1, 0, 0).acceptance_rate == 0.0
    assert Speculation([1], 1, 8, 6).acceptance_rate == 0.75
