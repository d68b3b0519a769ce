"""The content filter: rules, scores, what ships, and the guard of a stream."""

import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.corpus import load_filter_lessons, load_filter_texts
from shared.data.models import has_model
from shared.notebook.records import read_rows
from shared.safety.filters import (
    CATEGORIES,
    SHIPPED,
    ContentFilter,
    OutputGuard,
    adapter_scorer,
    hashed_features,
    load_filter,
    read_rules,
    readable,
    save_filter,
)
from shared.safety.spelling import Speller
from tests.timing import seconds

RECORD = Path(__file__).parents[2] / "deployment" / "filter_fresh.csv"


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
    rows = [row for row in read_rows(RECORD) if row["split"] == "fresh"]
    differ = 0
    for text, row in list(zip(load_filter_texts("fresh"), rows, strict=True))[::4]:
        verdict = shipped.check(text.text)
        assert (text.label, text.kind, text.category) == (row["label"], row["kind"], row["category"])
        assert verdict.score == pytest.approx(float(row["filter score"]), abs=0.02)
        differ += verdict.blocked != (row["filter"] == "1")
    assert differ <= 1


def test_a_disguise_alone_is_no_reason_to_block(shipped):
    odd = [row for row in load_filter_texts("train") if row.kind == "odd"]
    assert sum(shipped.check(row.text).blocked for row in odd) <= 1


def test_a_verdict_names_a_category(shipped):
    verdict = shipped.check("You are a p.a.t.h.e.t.i.c loser.")
    assert verdict.blocked and verdict.category == "insult" and verdict.score > shipped.threshold
    assert not shipped.check("Thank you for the flowers.").blocked
    assert not shipped.check("").blocked


def test_one_bad_sentence_in_a_long_text_counts(shipped):
    long = "The mill by the river is old and quiet. " * 120
    assert not shipped.check(long).blocked
    assert shipped.check(long + "You are a pathetic loser, and everybody laughs at you. " + long).blocked


@pytest.mark.parametrize("unit", ["how to ", "you ", "write make ", "<<", "i will "])
def test_hostile_texts_cost_no_square(shipped, unit):
    # Four times the text: four times the time, sixteen times if it were the square.
    short, long = (seconds(partial(shipped.check, (unit * n)[:n]), 2) for n in (10_000, 40_000))
    assert long < 10 * short + 0.1


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
    with pytest.raises(ValueError, match="no such filter"):
        load_filter(tmp_path / "mine")


def test_a_scorer_needs_weights_of_its_own(shipped, tmp_path):
    given: list[str] = []

    def scorer(texts):
        given.extend(texts)
        return [2.0] * len(texts)

    stronger, calm = load_filter(scorer=scorer), load_filter(scorer=lambda texts: [0.0] * len(texts))
    text = "Write to my aunt."
    assert stronger.score(text) - calm.score(text) == pytest.approx(2.0 * stronger.mix[-1])
    assert stronger.threshold != shipped.threshold and stronger.mix[-1] > 0
    # What is not disguised reaches the model as it was written, else as it was read.
    stronger.score("W r i t e  to my aunt!")
    assert given == [text, "write to my aunt !"]
    counts = {"bomb": 3}
    save_filter(
        ContentFilter(Speller(counts), shipped.weights, shipped.mix, shipped.threshold),
        tmp_path / "a",
        counts,
    )
    with pytest.raises(ValueError, match="with_scorer"):
        load_filter(tmp_path / "a", scorer=scorer)


def test_a_text_stays_as_written_if_no_word_of_it_changes():
    assert readable("Don’t go, Mara!", "dont go , mara !") == "Don’t go, Mara!"
    assert readable("k1ll it", "kill it") == "kill it"


@pytest.mark.skipif(not has_model("smollm2-135m-instruct"), reason="SmolLM2 is not installed")
def test_the_adapter_scores_as_the_record_says():
    rows = [row for row in read_rows(RECORD) if row["split"] == "fresh"]
    stronger = load_filter(scorer=adapter_scorer())
    differ = 0
    for text, row in list(zip(load_filter_texts("fresh"), rows, strict=True))[::60]:
        verdict = stronger.check(text.text)
        assert verdict.score == pytest.approx(float(row["filter+adapter score"]), abs=0.05)
        differ += verdict.blocked != (row["filter+adapter"] == "1")
    assert len(rows) == 540 and differ <= 1


def test_a_scorer_needs_the_label_block(monkeypatch):
    found = SimpleNamespace(labels=("ham", "spam"))
    monkeypatch.setattr("shared.finetuning.lora_classifier.load_adapted_classifier", lambda name: found)
    with pytest.raises(ValueError, match="block"):
        adapter_scorer("spam-lora")


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


@pytest.mark.parametrize(
    ("system", "recall", "precision"), [("filter", 0.5, 0.93), ("filter+adapter", 0.85, 0.9)]
)
def test_what_was_reached_on_fresh_texts(system, recall, precision):
    # Aims: 90 % recall at 95 % precision. Nearly reached; what was reached stays.
    rows = [row for row in read_rows(RECORD) if row["split"] == "fresh"]
    judged = [row for row in rows if row["kind"] not in ("lookalike", "spaced")]
    blocked = [row for row in judged if row[system] == "1"]
    right = sum(row["label"] == "block" for row in blocked)
    assert right / len(blocked) > precision
    assert right / sum(row["label"] == "block" for row in judged) > recall
