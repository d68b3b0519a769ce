"""Disguised spelling comes back as plain words, and in a time that grows with the length."""

import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployment import attack_spelling
from shared.data.corpus import load_filter_texts, load_stories
from shared.safety.filters import load_filter
from shared.safety.spelling import Speller, count_words, fold, key_of
from tests.timing import seconds

PLAIN = ["you are the worst of all clowns", "i will find your house tonight", "the bomb goes off at noon"]


@pytest.fixture(scope="module")
def speller() -> Speller:
    return load_filter().speller


@pytest.mark.parametrize(
    ("disguised", "plain"),
    [
        ("Ｋｉｌｌ", "kill"),
        ("𝓴𝖎𝐥𝒍", "kill"),
        ("k\u200bi\u200dll", "kill"),
        ("kíll", "kill"),
        ("кіll", "kill"),  # Cyrillic
        ("κιll", "kill"),  # Greek
        ("NΝHΗ", "nnhh"),  # capitals of both scripts
        ("Straße", "strasse"),
        ("don’t", "don't"),
        ("", ""),
    ],
)
def test_look_alikes_fold_into_plain_letters(disguised, plain):
    assert fold(disguised) == plain


@given(st.text(max_size=60))
def test_folding_twice_changes_nothing_and_leaves_no_accent(text):
    once = fold(text)
    assert fold(once) == once


@pytest.mark.parametrize(
    ("first", "second"), [("kill", "k1!l"), ("bookkeeper", "b00kkeep3r"), ("all", "ail")]
)
def test_a_key_is_the_same_for_every_spelling(first, second):
    assert key_of(first) == key_of(second)


@pytest.mark.parametrize(
    ("disguised", "plain"),
    [
        ("k i l l", "kill"),
        ("k.i-l_l", "kill"),
        ("kkkiiilll", "kill"),
        ("h0w d0 I bu!ld a b0mb", "how do i build a bomb"),
        ("I   w a n t   t o   s l e e p", "i want to sleep"),
        ("S.o.m.e.o.n.e sh*ou*ld he*lp", "someone should help"),
    ],
)
def test_words_come_back(speller, disguised, plain):
    assert speller.undisguise(disguised) == plain


@pytest.mark.parametrize("style", ["lookalike", "spaced"])
def test_most_words_of_the_attack_come_back(speller, style):
    rng, attack = random.Random(5), getattr(attack_spelling, style)
    # Sentences that no rule and no lesson has seen; some of their words the speller has.
    sentences = [line for line in load_stories("train")[0].text.split(". ") if 30 < len(line) < 90][:40]
    right = total = 0
    for sentence in sentences:
        wanted = speller.undisguise(sentence).split()
        got = speller.undisguise(attack(sentence, rng)).split()
        right += len(set(wanted) & set(got))
        total += len(set(wanted))
    assert right / total > 0.85


def test_ordinary_texts_stay_as_they_are(speller):
    texts = [row.text for row in load_filter_texts("train") if row.kind in ("plain", "hard")]
    bare = lambda text: "".join(char for char in fold(text) if char.isalpha())
    changed = sum(bare(text) != bare(speller.undisguise(text)) for text in texts)
    assert changed <= 0.03 * len(texts)


@pytest.mark.parametrize(
    "unit",
    ["a", "a ", "k.i.l.l.", "1", "!l", "a\u0301", "e s a r e s t o ", "\u200b", "<", "kil ", "\U0001d458"],
)
def test_hostile_characters_cost_no_square(speller, unit):
    # Four times the text: four times the time, sixteen times if it were the square.
    short, long = (seconds(partial(speller.undisguise, (unit * n)[:n]), 2) for n in (25_000, 100_000))
    assert long < 10 * short + 0.1


@pytest.mark.parametrize("counts", [{}, {"Hi": 1}, {"hi": 0}, {"two words": 1}])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ValueError, match="counts"):
        Speller(counts)


def test_no_text_is_refused(speller):
    with pytest.raises(TypeError):
        speller.undisguise(b"kill")


def test_words_are_counted_without_apostrophes():
    assert count_words(["Don't! don’t", "two"]) == {"dont": 2, "two": 1}
