"""What `ch06_classification/robust_runs.py` compares is compared fairly, and its record is what it says."""

import random

import numpy as np
import pytest

from ch06_classification import robust_runs
from shared.data.corpus import load_sms
from shared.notebook.records import read_rows

ROWS = read_rows(robust_runs.RESULTS)
TEXTS = [message.text for message in load_sms("train")]
TARGETS = [int(message.label == "spam") for message in load_sms("train")]


def test_the_record_is_complete():
    there = {tuple(row[name] for name in robust_runs.KEY) for row in ROWS}
    wanted = set()
    for name, left_out, role, seed, options in robust_runs.jobs():
        detail = " ".join(f"{key}={value}" for key, value in options.items())
        for family in robust_runs.ROWS:
            if role != "choice" or family != "ham":
                wanted.add((name, left_out, detail, family, role, str(seed)))
    assert there == wanted
    assert all(row["hardware"] and row["torch"] for row in ROWS)


def test_the_outcomes_have_a_value_for_each_message():
    sizes = {"folds": (1039, 675, 364), "test": (260, 169, 91), "choice": (131, 85, 46)}
    steps = {-1, *range(0, robust_runs.N_QUERIES + 1, robust_runs.WIDTH)}
    for row in ROWS:
        n_all, n_ham, n_spam = sizes[row["role"]]
        if row["family"] == "none":
            assert len(row["outcome"]) == n_all and set(row["outcome"]) <= set("01")
        elif row["family"] == "ham":
            assert len(row["outcome"]) == n_ham and set(row["outcome"]) <= set("0123")
        else:
            values = [int(value) for value in row["outcome"].split()]
            assert len(values) == n_spam and set(values) <= steps
            # No message can be changed more often than there are steps.
            assert row["changes"] == "" or 1 <= float(row["changes"]) <= robust_runs.MOST_CHANGES


def test_what_was_missed_without_a_change_agrees_with_the_clean_row():
    targets = {
        "test": [int(message.label == "spam") for message in load_sms("test")],
        "choice": [int(message.label == "spam") for message in load_sms("validation")],
    }
    for row in ROWS:
        if row["role"] not in targets or row["family"] in ("none", "ham"):
            continue
        (clean,) = (
            other
            for other in ROWS
            if all(other[name] == row[name] for name in robust_runs.KEY if name != "family")
            and other["family"] == "none"
        )
        spam = [mark for mark, target in zip(clean["outcome"], targets[row["role"]], strict=True) if target]
        assert [value == "0" for value in row["outcome"].split()] == [mark == "0" for mark in spam]


def test_choices_were_made_on_a_seed_that_is_not_compared():
    assert robust_runs.CHOICE_SEED not in robust_runs.SEEDS
    assert {row["seed"] for row in ROWS if row["role"] == "choice"} == {str(robust_runs.CHOICE_SEED)}


def test_attacks_use_nothing_that_copies_were_made_with():
    looks = ("".join(table.values()) for table in (robust_runs.TRAINING_LOOKS, robust_runs.ATTACK_LOOKS))
    assert not set.intersection(*map(set, looks))
    assert not set(robust_runs.TRAINING_MARKS) & set(robust_runs.ATTACK_MARKS)
    words = robust_runs.ham_words(TEXTS, TARGETS)
    assert not set(words[0]) & set(words[1]) and min(map(len, words)) > 500


def test_a_family_that_is_left_out_makes_no_copy():
    known = robust_runs.changes(TEXTS, TARGETS, training=True)
    known.pop("word")
    texts, labels = robust_runs.with_copies(TEXTS, TARGETS, known, seed=0)
    assert len(texts) == len(labels) == (1 + robust_runs.N_COPIES) * len(TEXTS)
    assert texts[: len(TEXTS)] == TEXTS and labels[: len(TEXTS)] == TARGETS
    n_words = [len(text.split()) for text in TEXTS]
    for i, copy in enumerate(texts[len(TEXTS) :]):
        assert len(copy.split()) == n_words[i // robust_runs.N_COPIES]


def test_ham_is_changed_like_spam_and_each_copy_counts():
    tricks = robust_runs.changes(TEXTS, TARGETS, training=False)
    ham = [text for text, target in zip(TEXTS, TARGETS, strict=True) if not target][:5]
    assert robust_runs.harmless(ham, tricks, lambda texts: np.zeros(len(texts))) == [3] * 5
    assert robust_runs.harmless(ham, tricks, lambda texts: np.ones(len(texts))) == [0] * 5
    judged = []
    robust_runs.harmless(ham, tricks, lambda texts: judged.extend(texts) or np.zeros(len(texts)))
    rng = random.Random(f"ham mark {ham[1]}")
    assert judged[5] == robust_runs.change_often(ham[1], tricks["mark"], 4, rng)


@pytest.mark.parametrize("name", ["counts", "counts, cleaned"])
def test_a_quick_filter_gives_the_recorded_row(name):
    data = robust_runs.spam_runs.Texts("bundled", load_sms())
    learned, _, judged = robust_runs.parts(data, "test", 0, "counts")[0]
    score = robust_runs.build(name, "", (list(data.texts[learned]), data.targets[learned]), ([], []), 0)
    right = (score(list(data.texts[judged])) >= 0.5) == data.targets[judged]
    (row,) = (
        r for r in ROWS if (r["model"], r["family"], r["role"], r["seed"]) == (name, "none", "test", "0")
    )
    # Another version of scikit-learn or processor may decide a close case otherwise.
    assert sum(a != int(b) for a, b in zip(right.astype(int), row["outcome"], strict=True)) <= 2
