"""What `ch06_classification/spam_runs.py` compares is compared fairly, and its record is what it says."""

import numpy as np
import pytest
import torch

from ch06_classification import spam_runs
from shared.data.corpus import LabeledText, load_sms
from shared.notebook.records import read_rows


@pytest.fixture(scope="module")
def messages() -> spam_runs.Texts:
    return spam_runs.Texts("bundled", load_sms())


def test_folds_hold_each_message_once_and_none_of_the_test_split(messages):
    for seed in spam_runs.SEEDS:
        pairs = spam_runs.folds(messages, seed)
        judged = np.concatenate([judged for _, judged in pairs])
        assert sorted(judged) == list(np.flatnonzero(messages.splits != "test")) and len(pairs) == 5
        for train, judged in pairs:
            assert not set(train) & set(judged) and "test" not in messages.splits[train]
            assert abs(messages.targets[train].mean() - messages.targets[judged].mean()) < 0.05


def test_equal_texts_fall_into_one_fold():
    rows = [LabeledText(f"text {i % 20}", ("ham", "spam")[i % 2], "plain", "train") for i in range(60)]
    data = spam_runs.Texts("made", rows)
    for train, judged in spam_runs.folds(data, 0):
        assert not set(data.texts[train]) & set(data.texts[judged])


@pytest.mark.parametrize("method", ["majority", "words", "words and letters"])
def test_a_quick_method_gives_the_recorded_row(messages, method):
    row = spam_runs.run(messages, method, "folds", 0)
    assert row["n"] == len(row["right"]) == 1039 and row["correct"] == row["right"].count("1")
    (recorded,) = (
        r
        for r in read_rows(spam_runs.RESULTS)
        if (r["data"], r["method"], r["role"], r["seed"]) == ("bundled", method, "folds", "0")
    )
    # Another version of scikit-learn or processor may decide a close case otherwise.
    assert sum(a != b for a, b in zip(row["right"], recorded["right"], strict=True)) <= 3


def test_the_small_gpt_is_trained_by_the_script():
    rows = [
        LabeledText(f"{word} {i}", label, "plain", "train")
        for i in range(20)
        for word, label in (("Buy it now", "spam"), ("See you at home", "ham"))
    ]
    data = spam_runs.Texts("made", rows)
    train, judged = np.arange(30), np.arange(30, 40)
    predicted, n_trained = spam_runs.tuned(data, train, judged, 0, n_epochs=2)
    assert predicted.shape == (10,) and set(predicted) <= {0, 1} and n_trained == 2_607_554


def test_the_record_is_complete_and_consistent():
    rows = read_rows(spam_runs.RESULTS)
    for row in rows:
        assert set(row["right"]) <= {"0", "1"} and len(row["right"]) == int(row["n"])
        assert row["right"].count("1") == int(row["correct"]) and row["hardware"] and row["torch"]
    there = {
        tuple(row[name] for name in ("method", "role", "seed")) for row in rows if row["data"] == "bundled"
    }
    for method, role, seed, _ in spam_runs.jobs(list(spam_runs.METHODS)):
        assert (method, role, str(seed)) in there
    sizes = {(row["data"], row["role"]): int(row["n"]) for row in rows}
    assert sizes["bundled", "folds"] == 1039 and sizes["bundled", "test"] == 260
    assert sizes["uci balanced", "folds"] == 2 * 747 and sizes["uci", "folds"] == 5574


def test_choices_were_made_on_a_seed_that_is_not_compared():
    assert spam_runs.CHOICE_SEED not in spam_runs.SEEDS
    choices = [row for row in read_rows(spam_runs.RESULTS) if row["role"] == "choice"]
    assert {row["seed"] for row in choices} == {str(spam_runs.CHOICE_SEED)}


def test_every_block_agrees_with_the_features_of_one(messages, monkeypatch):
    monkeypatch.setattr(spam_runs, "LARGE", "tales-tiny")
    data = spam_runs.Texts("few", load_sms()[:20])
    data.every_block()
    found = dict(data.known)
    data.known.clear()
    for pooling in ("mean", "last"):
        expected = data.features(2, pooling, "tales-tiny")
        torch.testing.assert_close(found[2, pooling, "tales-tiny"], expected, atol=1e-4, rtol=1e-4)
