"""The content filter: rules, scores, what ships, and the guard of a stream."""

import csv
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.corpus import load_filter_lessons, load_filter_texts
from shared.notebook.records import read_rows
from shared.safety.filters import (
    CATEGORIES,
    SHIPPED,
    ContentFilter,
    OutputGuard,
    hashed_features,
    load_filter,
    read_rules,
    save_filter,
)
from shared.safety.spelling import Speller

RECORD = Path(__file__).parents[2] / "deployment" / "filter_scores.csv"


@pytest.fixture(scope="module")
def shipped() -> ContentFilter:
    return load_filter()


def test_the_rules_that_ship_can_be_read():
    rules = read_rules()
    assert set(rules.words) == set(rules.patterns) == set(CATEGORIES)
    assert all(rules.words.values()) and all(rules.patterns.values()) and rules.exceptions
    hits = rules.pattern_hits("how do i build a bomb")
    assert hits.category == "danger" and hits.n_exceptions == 0
    assert rules.pattern_hits("the soup is good").category is None
    assert rules.word_hits("kill the bomb") == ["threat", "danger"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pattern\tnonsense\tx", "category in line 2"),
        ("rule\tinsult\tx", "kind in line 2"),
        ("pattern\tinsult\t(", "line 2"),
        ("pattern\tinsult\t<missing>", "line 2"),
    ],
)
def test_bad_rules_are_refused_with_their_line(tmp_path, line, message):
    path = tmp_path / "rules.tsv"
    path.write_text(f"kind\tname\ttext\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rules(path)


def test_features_are_of_length_one_and_do_not_depend_on_the_process():
    features = hashed_features("the bomb the bomb")
    assert sum(value**2 for value in features.values()) == pytest.approx(1)
    assert max(features) < 2**15 and hashed_features("") == {}
    assert zlib.crc32(b"bomb") % 2**15 in features and features == hashed_features("the bomb the bomb")


def test_the_shipped_filter_scores_the_texts_as_the_record_says(shipped):
    # The record was written with float64 weights; those that ship are float16.
    rows = [row for row in read_rows(RECORD) if row["split"] == "test"]
    texts = load_filter_texts()
    differ = 0
    for row in rows[::4]:
        verdict = shipped.check(texts[int(row["number"])].text)
        assert verdict.score == pytest.approx(float(row["filter score"]), abs=0.02)
        differ += verdict.blocked != (row["filter"] == "1")
    assert differ <= 1


def test_a_disguise_alone_is_no_reason_to_block(shipped):
    odd = [row for row in load_filter_texts("train") if row.kind == "odd"]
    assert sum(shipped.check(row.text).blocked for row in odd) <= 1


def test_a_verdict_names_a_category(shipped):
    verdict = shipped.check("How do I build a b0mb without getting caught?")
    assert verdict.blocked and verdict.category == "danger" and verdict.score > shipped.threshold
    assert not shipped.check("Thank you for the flowers.").blocked
    assert not shipped.check("").blocked


def test_one_bad_sentence_in_a_long_text_counts(shipped):
    long = "The mill by the river is old and quiet. " * 120
    assert not shipped.check(long).blocked
    assert shipped.check(long + "How do I build a bomb without getting caught? " + long).blocked


@pytest.mark.parametrize("unit", ["how to ", "you ", "write make ", "<<", "i will "])
def test_the_time_for_100_000_characters_is_bounded(shipped, unit):
    started = time.process_time()
    shipped.check((unit * 100_000)[:100_000])
    assert time.process_time() - started < 5


def test_a_scorer_is_weighed_in():
    speller, weights = Speller({"a": 1}), np.zeros(8, dtype=np.float32)
    made = ContentFilter(speller, weights, [0, 0, 0, 0, 0, 2.0], 1.0, lambda texts: [3.0] * len(texts))
    assert made.score("anything") == 6.0 and made.check("anything").blocked
    with pytest.raises(ValueError, match="mix"):
        ContentFilter(speller, weights, [0, 0, 0, 0, 0, 2.0], 1.0)
    with pytest.raises(ValueError, match="weights"):
        ContentFilter(speller, np.zeros((2, 2)), [0] * 5, 1.0)


def test_a_saved_filter_comes_back(shipped, tmp_path):
    counts = {"bomb": 3, "the": 9}
    made = ContentFilter(Speller(counts), shipped.weights, shipped.mix, shipped.threshold)
    save_filter(made, tmp_path / "mine", counts)
    again = load_filter(tmp_path / "mine")
    for text in ("the bomb", "t h e b0mb", "nothing"):
        assert again.score(text) == pytest.approx(made.score(text), abs=1e-2)
    with pytest.raises(FileExistsError):
        save_filter(made, tmp_path / "mine", counts)
    (tmp_path / "mine" / "filter.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="no filter"):
        load_filter(tmp_path / "mine")


def test_what_ships_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1_000_000


def test_lessons_are_no_texts_that_judge():
    judged = {row.text for row in load_filter_texts()}
    assert not judged & {lesson.text for lesson in load_filter_lessons()}


# --- the guard


def is_bad(text: str) -> bool:
    return "never say this" in text


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 500),
    st.integers(0, 300),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(14, 90),
)
def test_a_phrase_within_the_hold_never_gets_out(before, after, sizes, hold):
    text = "." * before + "never say this" + "." * after
    guard, out, at, turn = OutputGuard(is_bad, hold=hold, window=4 * hold), "", 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        out, at, turn = out + guard.feed(text[at : at + size]), at + size, turn + 1
    out += guard.end()
    assert guard.blocked and "never say this".startswith(out[before:]) and text.startswith(out)
    assert "never say this" not in out


@given(st.text(max_size=400), st.integers(1, 30), st.integers(1, 60))
def test_a_harmless_text_gets_out_whole(text, size, hold):
    guard = OutputGuard(is_bad, hold=hold, window=hold + 40)
    given_ = "".join(guard.feed(text[at : at + size]) for at in range(0, len(text), size)) + guard.end()
    assert given_ == text and not guard.blocked


def test_nothing_more_goes_out_once_something_was_blocked():
    guard = OutputGuard(is_bad, hold=20, window=80)
    text = "x" * 60 + "never say this" + "y" * 200
    assert "".join(guard.feed(char) for char in text).startswith("x" * 40)
    assert guard.blocked and guard.feed("more") == guard.end() == ""


def test_the_hold_must_be_below_the_window():
    with pytest.raises(ValueError, match="window"):
        OutputGuard(is_bad, hold=80, window=80)


def test_each_character_is_read_a_bounded_number_of_times():
    read = []
    guard = OutputGuard(lambda text: bool(read.append(len(text))), hold=120, window=480)
    for _ in range(2000):
        guard.feed("ab cd")
    guard.end()
    assert sum(read) < 20 * 10_000


def test_the_record_has_every_text_once():
    with RECORD.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    texts = load_filter_texts()
    assert [int(row["number"]) for row in rows] == list(range(len(texts)))
    assert [row["split"] for row in rows] == [text.split for text in texts]
    # Aims: 90 % recall at 95 % precision. Not reached; what was reached stays.
    judged = [row for row in rows if row["split"] == "test" and row["kind"] not in ("lookalike", "spaced")]
    blocked = [row for row in judged if row["filter"] == "1"]
    right = sum(row["label"] == "block" for row in blocked)
    assert right / len(blocked) > 0.75 and right / sum(row["label"] == "block" for row in judged) > 0.3
