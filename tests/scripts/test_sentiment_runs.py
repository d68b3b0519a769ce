"""What `ch06_classification/sentiment_runs.py` compares is compared fairly, and its record is what it says."""

import csv
from itertools import pairwise

import numpy as np
import pytest
import torch

from ch06_classification import sentiment_runs
from shared.data.corpus import LabeledText, load_reviews
from shared.notebook.records import read_rows

ROWS = read_rows(sentiment_runs.RESULTS)


@pytest.fixture(scope="module")
def reviews() -> sentiment_runs.Reviews:
    return sentiment_runs.Reviews("en")


def test_the_record_is_complete_and_consistent():
    for row in ROWS:
        assert set(row["right"]) <= {"0", "1"} and len(row["right"]) == int(row["n"])
        assert row["right"].count("1") == int(row["correct"]) and row["hardware"] and row["torch"]
    there = {tuple(row[name] for name in sentiment_runs.spam_runs.KEY) for row in ROWS}
    wanted = {
        (data, method, detail, role, str(seed))
        for part in ("methods", "labels", "augmentation")
        for data, method, detail, role, seed, _ in sentiment_runs.jobs(part)
    }
    assert there == wanted
    sizes = {(row["data"], row["role"]): int(row["n"]) for row in ROWS}
    assert sizes == {
        ("en", "folds"): 368,
        ("en", "choice"): 368,
        ("en", "test"): 92,
        ("zh", "folds"): 289,
        ("zh", "choice"): 289,
        ("zh", "test"): 71,
    }


def test_choices_were_made_on_a_seed_that_is_not_compared():
    assert sentiment_runs.CHOICE_SEED not in sentiment_runs.SEEDS
    assert {row["seed"] for row in ROWS if row["role"] == "choice"} == {str(sentiment_runs.CHOICE_SEED)}


@pytest.mark.parametrize("method", ["majority", "words", "words and letters"])
def test_a_quick_method_gives_the_recorded_row(reviews, method):
    judge = sentiment_runs.spam_runs.judged_row
    row = judge(reviews, method, "", "folds", 0, sentiment_runs.METHODS[method])
    (recorded,) = (
        r
        for r in ROWS
        if (r["data"], r["method"], r["detail"], r["role"], r["seed"]) == ("en", method, "", "folds", "0")
    )
    # Another version of scikit-learn or processor may decide a close case otherwise.
    assert sum(a != b for a, b in zip(row["right"], recorded["right"], strict=True)) <= 3


def test_a_small_set_is_balanced_and_part_of_the_larger_one(reviews):
    (train, _), *_ = sentiment_runs.spam_runs.folds(reviews, 0)
    sets = [sentiment_runs.of_size(reviews, train, n, 0) for n in sentiment_runs.SIZES]
    for chosen, n in zip(sets, sentiment_runs.SIZES, strict=True):
        assert len(set(chosen)) == n and set(chosen) <= set(train)
        assert reviews.targets[chosen].sum() == n // 2
    for small, large in pairwise(sets):
        assert set(small) <= set(large)
    assert set(sets[0]) != set(sentiment_runs.of_size(reviews, train, 20, 1))


def test_copies_are_of_training_reviews_alone(reviews, monkeypatch):
    for technique in ("deletion", "swap", "synonyms", "paraphrase, unfiltered"):
        copies, places = sentiment_runs.copies_of(technique)
        assert len(copies) == len(places) > 0
        assert not {reviews.splits[place] for place in places} & {"test"}
    # Only copies of what is learned from are learned from: vectors that give away the label are those of others.
    features = torch.zeros(len(reviews.rows), 4)
    features[:, 0] = torch.linspace(-1, 1, len(features))
    monkeypatch.setattr(reviews, "features", lambda *a, **k: features)
    _, places = sentiment_runs.copies_of("deletion")
    train, judged = np.arange(0, 200), np.arange(200, 230)
    seen = []
    monkeypatch.setattr(sentiment_runs, "copied_features", lambda technique: features[places])
    monkeypatch.setattr(
        sentiment_runs,
        "fit_head",
        lambda x, y, n, penalty: seen.append((x, y)) or torch.nn.Linear(4, 2),
    )
    sentiment_runs.augmented(reviews, train, judged, 0, method="features", technique="deletion")
    ((x, y),) = seen
    assert len(x) == 200 + np.isin(places, train).sum() == len(y)
    assert float(x[:, 0].max()) <= float(features[train, 0].max())


def test_paraphrases_are_of_reviews_outside_the_test_split():
    reviews = load_reviews()
    with sentiment_runs.PARAPHRASES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) > 600 and all(row["text"].strip() for row in rows)
    assert not {reviews[int(row["number"])].split for row in rows} & {"test"}


def test_settings_are_drawn_once_and_the_search_cuts_cleanly(reviews, monkeypatch):
    assert sentiment_runs.settings() == sentiment_runs.settings() and len(sentiment_runs.settings()) == 50
    monkeypatch.setattr(sentiment_runs, "settings", lambda: [(1, "mean", 1.0), (1, "mean", 0.1)])
    leak = torch.tensor(reviews.targets, dtype=torch.float32)[:, None].repeat(1, 3)
    monkeypatch.setattr(reviews, "features", lambda *a, **k: leak)
    row = sentiment_runs.search(0, reviews)
    assert (row["n_learn"], row["n_looked"], row["n_fresh"]) == (184, 92, 92)
    assert (row["looked"], row["fresh"], row["by_folds"]) == ("92 92", "92 92", "184 184")


def test_the_record_of_the_search_is_consistent():
    rows = read_rows(sentiment_runs.SEARCH)
    assert {row["repeat"] for row in rows} == {str(i) for i in range(sentiment_runs.N_REPEATS)}
    for row in rows:
        for name, size in (("looked", "n_looked"), ("fresh", "n_fresh"), ("by_folds", "n_learn")):
            counts = [int(x) for x in row[name].split()]
            assert len(counts) == 50 and all(0 < n <= int(row[size]) for n in counts)


def test_near_enough_wants_other_words_of_the_same_meaning(monkeypatch):
    class Embedder:
        def embed(self, texts):
            return torch.tensor([[1.0, 0.0] if "soup" in text else [0.0, 1.0] for text in texts])

    monkeypatch.setattr(sentiment_runs, "load_embedder", Embedder)
    reviews = [LabeledText("the soup was good and hot", "positive", "plain", "train")]
    texts = ["the soup was good and hot", "I loved that warm soup", "Buy a car"]
    rows = [{"number": "0", "text": text} for text in texts]
    assert sentiment_runs.near_enough(reviews, rows) == [False, True, False]
