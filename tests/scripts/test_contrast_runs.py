"""What `ch06_classification/contrast_runs.py` compares is compared fairly, and its record is what it says."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from ch06_classification import contrast_runs
from shared.data.corpus import load_instructions, load_reviews, load_sms
from shared.data.models import has_model
from shared.notebook.records import read_rows

ROWS = read_rows(contrast_runs.RESULTS)
CHOICES = [row for row in ROWS if row["role"] == "choice"]
COMPARED = [row for row in ROWS if row["role"] == "compared"]
needs_minilm = pytest.mark.skipif(not has_model("all-minilm-l6-v2"), reason="MiniLM is not installed")


def test_the_record_is_complete_and_its_keys_are_unique():
    assert {row["role"] for row in ROWS} == {"choice", "compared"}
    assert max(Counter(tuple(row[name] for name in contrast_runs.KEY) for row in ROWS).values()) == 1
    wanted = {
        (method, str(seed))
        for method in contrast_runs.METHODS
        for seed in (contrast_runs.SEEDS if method in contrast_runs.TRAINED else (0,))
    }
    assert Counter((row["method"], row["seed"]) for row in COMPARED) == dict.fromkeys(wanted, 1)
    assert all(row["hardware"] and row["torch"] for row in ROWS)


def test_what_is_compared_is_recorded_case_by_case():
    for row in COMPARED:
        for k in (1, 3):
            found = row[f"found_{k}"]
            assert len(found) == 48
            assert float(row[f"recall_{k}"]) == pytest.approx(found.count("1") / 48, abs=1e-4)
        if row["method"] == "BM25":
            continue
        assert len(row["cosines"].split()) == 60 and len(row["pair_right"]) == 67
        assert float(row["pair_recall"]) == pytest.approx(row["pair_right"].count("1") / 67, abs=1e-4)
        for name in ("sms", "reviews"):
            draws = [float(accuracy) for accuracy in row[f"{name}_draws"].split()]
            assert len(draws) == contrast_runs.N_DRAWS
            assert float(row[name]) == pytest.approx(np.mean(draws), abs=2e-4)
            assert float(row[f"{name}_penalty"]) in contrast_runs.PENALTIES


def test_settings_were_chosen_by_held_out_pairs_on_a_seed_that_is_not_compared():
    assert contrast_runs.CHOICE_SEED not in contrast_runs.SEEDS
    assert {row["seed"] for row in CHOICES} == {str(contrast_runs.CHOICE_SEED)}
    # Nothing that the compared are judged by was even measured.
    assert not any(row[name] for row in CHOICES for name in ("spearman", "recall_1", "sms", "reviews"))
    for method, trials in contrast_runs.TRIALS.items():
        there = {
            tuple(row[name] for name in contrast_runs.SETTINGS) for row in CHOICES if row["method"] == method
        }
        steps = range(contrast_runs.EVERY, contrast_runs.USUAL["n_steps"] + 1, contrast_runs.EVERY)
        settings = [contrast_runs.USUAL | changed | {"n_steps": n} for changed in trials for n in steps]
        settings.append(contrast_runs.USUAL | {"n_steps": 0})
        assert there == {tuple(str(s[name]) for name in contrast_runs.SETTINGS) for s in settings}
    for row in COMPARED:
        if row["method"] in contrast_runs.TRAINED:
            chosen = contrast_runs.chosen(row["method"])
            assert {name: row[name] for name in chosen} == {
                name: str(value) for name, value in chosen.items()
            }


@needs_minilm
def test_nothing_that_is_judged_by_is_learned_from():
    kept = {row.text for row in (*load_reviews(), *load_sms()) if row.split != "train"}
    kept |= {row.output for row in load_instructions("test")}
    kept |= {copy for _, copy in contrast_runs.rewritten("validation")}
    for method in contrast_runs.TRAINED:
        learned = {text for pair in contrast_runs.training_pairs(method, "compared", 0) for text in pair}
        assert len(learned) > 500 and not learned & kept
        tried = {text for pair in contrast_runs.training_pairs(method, "choice", 9) for text in pair}
        assert not tried & contrast_runs.watched()
        judged = {
            copy for review, copy in contrast_runs.rewritten("train") if review in contrast_runs.watched()
        }
        assert not tried & judged
    stories = {*contrast_runs.sentence_runs.story_passages()[0]}
    assert not stories & set(contrast_runs.plain_texts()) and stories <= set(contrast_runs.judged_texts())


@needs_minilm
def test_shuffled_pairs_are_the_same_texts_with_other_partners():
    pairs = contrast_runs.training_pairs("SimCSE, pairs", "compared", 0)
    shuffled = contrast_runs.training_pairs("pairs, shuffled", "compared", 0)
    for side in (0, 1):
        assert {pair[side] for pair in pairs} == {pair[side] for pair in shuffled}
    assert len(pairs) == len(shuffled) and not set(pairs) & set(shuffled)
    assert shuffled != contrast_runs.training_pairs("pairs, shuffled", "compared", 1)


def test_the_first_token_is_left_out_unless_it_is_alone():
    states = torch.tensor([[[100.0], [1.0], [3.0]], [[7.0], [0.0], [0.0]]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert contrast_runs.pooled(states, mask).flatten().tolist() == [2.0, 7.0]
    assert contrast_runs.pooled(states, mask, every_token=True)[0].item() == pytest.approx(104 / 3)


def test_the_measures_of_pairs_on_vectors_that_can_be_seen():
    right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    vectors = {"a": right, "b": up, "a again": right, "b, wrong": right}
    found = contrast_runs.of_pairs(vectors, [("a", "a again"), ("b", "b, wrong")])
    assert found["pair_right"] == "10" and found["pair_recall"] == 0.5
    # Distances: 0 for the first pair and the square root of 2 for the second; the two reviews lie as far apart.
    assert found["alignment"] == 1.0 and found["uniformity"] == -4.0


def test_whitened_vectors_have_no_correlations():
    torch.manual_seed(0)
    known = torch.randn(500, 6) @ torch.randn(6, 6) + 5
    white = contrast_runs.whitened(known, known).double()
    products = white.T @ white
    torch.testing.assert_close(products, torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)


@needs_minilm
def test_counting_gives_the_recorded_row():
    vectors = {text: F.normalize(v, dim=0) for text, v in contrast_runs.fixed_vectors("counts").items()}
    pairs = contrast_runs.rewritten("validation")
    reviews = [row.text for row in load_reviews("validation")]
    found = contrast_runs.of_pairs(vectors, pairs, reviews)
    (recorded,) = (row for row in COMPARED if row["method"] == "counts")
    for name in ("pair_recall", "alignment", "uniformity"):
        assert found[name] == pytest.approx(float(recorded[name]), abs=0.01)


def test_the_vectors_for_drawing_are_those_of_forty_texts():
    assert contrast_runs.VECTORS.stat().st_size < 300_000
    with safe_open(contrast_runs.VECTORS, "pt") as file:
        assert set(file.keys()) == set(contrast_runs.DRAWN)
        numbers, lines = (list(map(int, file.metadata()[name].split())) for name in ("reviews", "rewritings"))
        for name in file.keys():  # noqa: SIM118, a file is no dict
            vectors = file.get_tensor(name)
            assert vectors.shape == (2 * contrast_runs.N_DRAWN, 576) and vectors.dtype == torch.float16
            assert (vectors.float().norm(dim=1) - 1).abs().max() < 1e-2
    reviews, table = load_reviews(), contrast_runs.read_table(contrast_runs.sentiment_runs.PARAPHRASES)
    assert len(numbers) == len(lines) == contrast_runs.N_DRAWN
    for number, line in zip(numbers, lines, strict=True):
        assert reviews[number].split == "validation" and int(table[line]["number"]) == number
