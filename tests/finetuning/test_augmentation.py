"""Augmentation: what stays, what is spared, and copies that are never a text."""

import random
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data.corpus import load_synonyms
from shared.finetuning.augmentation import (
    augment,
    bare_word,
    delete_words,
    replace_words,
    swap_words,
    turns_meaning,
)
from tests.timing import seconds

TEXTS = st.text(st.sampled_from("ab N't\u2019.,\n\u00e9\u6392"), max_size=60)
SHARES = st.floats(0.01, 1.0)
SYNONYMS = {"good": ("fine", "great"), "staff": ("crew",)}


def is_part(short: list[str], long: list[str]) -> bool:
    """Whether the words of one list stand in another, in the same order."""
    rest = iter(long)
    return all(word in rest for word in short)


@given(TEXTS, SHARES, st.integers(0, 99))
def test_deletion_leaves_the_text_with_gaps(text, share, seed):
    old, left = text.split(), delete_words(text, share, random.Random(seed)).split()
    assert is_part(left, old) and (bool(left) == bool(old))
    assert [w for w in left if turns_meaning(w)] == [w for w in old if turns_meaning(w)]
    spared = sum(map(turns_meaning, old))
    wanted = max(1, round(share * len(old)))
    assert len(old) - len(left) == max(0, min(wanted, len(old) - spared, len(old) - 1))


@given(TEXTS, SHARES, st.integers(0, 99))
def test_a_swap_keeps_every_word(text, share, seed):
    old, new = text.split(), swap_words(text, share, random.Random(seed)).split()
    assert Counter(new) == Counter(old)
    moved = sum(a != b for a, b in zip(old, new, strict=True))
    assert moved <= 2 * max(1, max(1, round(share * len(old))) // 2)


def test_a_word_is_replaced_with_its_capital_and_punctuation():
    made = {replace_words("Good staff, (good).", 1.0, random.Random(seed), SYNONYMS) for seed in range(20)}
    assert made == {f"{a} crew, ({b})." for a in ("Fine", "Great") for b in ("fine", "great")}
    assert replace_words("nothing known", 0.5, random.Random(0), SYNONYMS) == "nothing known"


@pytest.mark.parametrize("word", ["not", "Never,", "couldn't", "DON\u2019T!", "but", "without"])
def test_words_that_turn_a_meaning(word):
    assert turns_meaning(word)


@pytest.mark.parametrize("word", ["note", "nothin", "", "--", "button", "ant"])
def test_words_that_do_not(word):
    assert not turns_meaning(word)


def test_the_word_in_a_piece():
    assert [bare_word(p) for p in ("(Hello)", "don't!", "12", "caf\u00e9s.")] == [
        "hello",
        "don't",
        "",
        "caf\u00e9s",
    ]


def test_copies_are_new_and_belong_to_their_texts():
    texts = ["good staff and a good bed", "nothing known", "good"]

    def change(text: str, rng: random.Random) -> str:
        return replace_words(text, 0.5, rng, SYNONYMS)

    copies, places = augment(texts, change, 3)
    assert len(set(copies)) == len(copies) and not set(copies) & set(texts)
    assert places == sorted(places) and places.count(1) == 0 and places.count(0) == 3 and places.count(2) == 2
    # The draws of a text do not depend on its neighbours, and another seed draws otherwise.
    assert augment(texts[:1], change, 3)[0] == copies[:3]
    assert augment(["a b c d e f g h"], lambda t, r: swap_words(t, 0.5, r), 3, seed=1) != augment(
        ["a b c d e f g h"], lambda t, r: swap_words(t, 0.5, r), 3
    )


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("change", [delete_words, swap_words])
def test_a_share_that_is_none_is_refused(change, share):
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        change("some words", share, random.Random(0))


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="text must be a str"):
        delete_words(b"some words", 0.5, random.Random(0))
    with pytest.raises(ValueError, match="n_copies must be at least 1"):
        augment(["a b"], lambda text, rng: text, 0)


def test_the_synonyms_are_single_words_and_other_ones():
    synonyms = load_synonyms()
    assert len(synonyms) > 300
    for word, others in synonyms.items():
        assert bare_word(word) == word and others and word not in others
        assert all(bare_word(other) == other for other in others) and not turns_meaning(word)


@pytest.mark.parametrize("change", [delete_words, swap_words, partial(replace_words, synonyms=SYNONYMS)])
def test_time_does_not_grow_with_the_square_of_the_length(change):
    short, long = (seconds(partial(change, "good not " * n, 0.5, random.Random(0))) for n in (5_000, 40_000))
    assert long < 32 * short + 0.05  # eight times as long: a square would be 64
