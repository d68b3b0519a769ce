"""Measures of answers: equal to SQuAD's program, `rouge-score` and scipy, bounded in time, clear about bad input."""

import json
import math
import re
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import rankdata, spearmanr

from shared.finetuning.evaluation import (
    MAX_WORDS,
    Overlap,
    average_ranks,
    exact_match,
    lcs_length,
    normalize_answer,
    rank_correlation,
    read_answers,
    rouge_l,
    rouge_words,
    score_answers,
    spearman,
    token_f1,
)

TEXTS = st.text(alphabet="abc the.,-!'\n\t AB12é中_", max_size=40)
WORDS = st.lists(st.sampled_from(["red", "fox", "the", "runs", "a", "12", "é"]), max_size=12).map(" ".join)


# --- SQuAD's measures


def squad_words(text: str) -> list[str]:
    """What the published program of SQuAD 2.0 compares, letter by letter in its own order of steps."""
    text = "".join(sign for sign in text.lower() if sign not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split()


def squad_f1(said: str, gold: str) -> float:
    """F1 as the published program computes it, with its case for texts without words."""
    one, other = squad_words(said), squad_words(gold)
    if not one or not other:
        return float(one == other)
    n_same = sum((Counter(one) & Counter(other)).values())
    precision, recall = n_same / len(one), n_same / len(other)
    return 2 * precision * recall / (precision + recall) if n_same else 0.0


@given(TEXTS | WORDS, TEXTS | WORDS)
def test_exact_match_and_f1_are_those_of_squad(said, gold):
    assert normalize_answer(said) == " ".join(squad_words(said))
    assert exact_match(said, gold) == float(squad_words(said) == squad_words(gold))
    assert token_f1(said, gold) == pytest.approx(squad_f1(said, gold), abs=1e-12)
    assert token_f1(said, gold) == pytest.approx(token_f1(gold, said)) and token_f1(said, said) == 1


@pytest.mark.parametrize(
    "said, gold, match, f1",
    [
        ("", "", 1, 1),
        ("x", "", 0, 0),
        ("", "x", 0, 0),
        ("the", "", 1, 1),  # an article alone is no word
        ("The cat!", "cat", 1, 1),
        ("cat cat", "cat", 0, 2 / 3),
        ("a cat sat", "cat ran", 0, 1 / 2),
        ("x", ["", "x"], 1, 1),
        ("", ["x", ""], 1, 1),
        ("red fox", ["fox", "red fox jumps", "dog"], 0, 0.8),
    ],
)
def test_empty_answers_and_several_references(said, gold, match, f1):
    assert exact_match(said, gold) == match
    assert token_f1(said, gold) == pytest.approx(f1)


@pytest.mark.parametrize("measure", [exact_match, token_f1, rouge_l])
def test_bad_answers_and_references_are_refused(measure):
    with pytest.raises(ValueError, match="references must be at least one, got 0"):
        measure("x", [])
    with pytest.raises(TypeError, match=r"references\[1\] must be a str"):
        measure("x", ["x", None])
    with pytest.raises(TypeError, match="must be a str"):
        measure(12, "x")


# --- ROUGE-L


def lcs_by_table(first, second) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.text("abcd", max_size=25), st.text("abcd", max_size=25))
def test_lcs_is_that_of_the_whole_table(first, second):
    assert lcs_length(first, second) == lcs_by_table(first, second) == lcs_length(second, first)


SCORER = RougeScorer(["rougeL"])


@given(TEXTS | WORDS, st.lists(TEXTS | WORDS, min_size=1, max_size=3))
def test_rouge_l_is_that_of_rouge_score(said, references):
    for reference in references:
        theirs, ours = SCORER.score(reference, said)["rougeL"], rouge_l(said, reference)
        assert (ours.precision, ours.recall) == pytest.approx((theirs.precision, theirs.recall), abs=1e-12)
        assert ours.f1 == pytest.approx(theirs.fmeasure, abs=1e-12)
    best = SCORER.score_multi(references, said)["rougeL"].fmeasure
    assert rouge_l(said, references).f1 == pytest.approx(best, abs=1e-12)


def test_rouge_l_without_words_and_in_other_scripts():
    assert rouge_l("", "") == rouge_l("...", "x") == Overlap(0, 0) and Overlap(0, 0).f1 == 0
    assert rouge_words("Ünï 12-x_y") == ["n", "12", "x", "y"]
    assert rouge_l("巴黎是首都", "首都是巴黎").f1 == 0
    assert rouge_l("巴黎是首都", "首都是巴黎", words=list).f1 == pytest.approx(2 / 5)


def test_a_long_answer_costs_memory_of_its_length_and_a_longer_one_is_refused():
    rng = np.random.default_rng(0)
    long = [rng.integers(50, size=MAX_WORDS).tolist() for _ in range(2)]
    tracemalloc.start()
    started = time.perf_counter()
    assert 2_000 < lcs_length(*long) < MAX_WORDS
    assert time.perf_counter() - started < 20  # seconds; a square of Python's steps would take minutes
    assert tracemalloc.get_traced_memory()[1] < 3_000_000  # the whole table would take 400 MB
    tracemalloc.stop()
    for texts in ((MAX_WORDS + 1, 1), (1, MAX_WORDS + 1)):
        with pytest.raises(ValueError, match=r"must be at most 10,000 words long, got '10,001 words'"):
            rouge_l(*("w " * n for n in texts))


# --- agreement


NUMBERS = st.integers(-3, 3) | st.floats(-5, 5)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=30))
def test_ranks_and_correlation_are_those_of_scipy(pairs):
    first, second = np.array(pairs, dtype=float).T
    assert np.array_equal(average_ranks(first), rankdata(first))
    ours = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)


def test_the_interval_of_a_correlation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    found = rank_correlation(x, y)
    assert found.low < found.rho < found.high and 0.2 < found.high - found.low < 0.6
    assert found == rank_correlation(x, y) != rank_correlation(x, y, seed=1)
    assert (found.n_values, found.n_groups) == (60, 60)
    perfect = rank_correlation(x, 3 * x + 1)
    assert perfect.rho == perfect.low == perfect.high == pytest.approx(1)
    narrow = rank_correlation(x, y, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_copies_of_a_value_do_not_narrow_the_interval_if_they_are_drawn_together():
    rng = np.random.default_rng(1)
    x, y, names = rng.normal(size=20), rng.normal(size=20), np.arange(20)
    once = rank_correlation(x, y)
    together = rank_correlation(np.repeat(x, 4), np.repeat(y, 4), groups=np.repeat(names, 4))
    apart = rank_correlation(np.repeat(x, 4), np.repeat(y, 4))
    assert (together.rho, together.low, together.high) == pytest.approx((once.rho, once.low, once.high))
    assert together.n_groups == 20 and apart.high - apart.low < 0.7 * (once.high - once.low)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    truth = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's rho of a normal pair with correlation 0.6
    n_covered = 0
    for trial in range(40):
        x = rng.normal(size=50)
        y = 0.6 * x + 0.8 * rng.normal(size=50)
        found = rank_correlation(x, y, n_resamples=100, seed=trial)
        n_covered += found.low <= truth <= found.high
    assert n_covered >= 33  # 38 are expected


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([1, 2], [1, 2, 3]), {}, r"second must be \(2,\) as first"),
        (([1], [2]), {}, "at least 2 values"),
        (([1, math.nan, 3], [1, 2, 3]), {}, "first must be numbers"),
        (([1, 2, 3], [4, 4, 4]), {}, "lists|at least two values"),
        (([1, 2, 3], [4, 5, 6]), {"groups": [1, 1]}, "groups must be 3"),
        (([1, 2, 3], [4, 5, 6]), {"groups": [1, 1, 2]}, "groups must be at least 3"),
        (([1, 2, 3], [4, 5, 6]), {"confidence": 95}, "confidence must be between 0 and 1"),
        (([1, 2, 3], [4, 5, 6]), {"n_resamples": 0}, "n_resamples must be at least 1"),
    ],
)
def test_correlations_that_cannot_be_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rank_correlation(*arguments, **options)


# --- a reader's own answers


def test_answers_of_a_file_are_scored(tmp_path):
    path = tmp_path / "answers.jsonl"
    entries = [
        {"prompt": "p", "answer": "The Nile", "reference": ["Nile", "river Nile"], "more": 1},
        {"prompt": "p", "answer": "", "reference": "x"},
    ]
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, entries)), encoding="utf-8")
    assert read_answers(path) == entries
    first, second = score_answers(entries)
    assert first == {"answer": "The Nile", "words": 2, "exact_match": 1, "token_f1": 1, "rouge_l": 2 / 3}
    assert second == {"answer": "", "words": 0, "exact_match": 0, "token_f1": 0, "rouge_l": 0}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 of .*Expecting"),
        ("[" * 100_000, "line 2 of"),
        ("[1]", "line 2 of .* an object with prompt, answer, reference, got 'list'"),
        ('{"prompt": "p", "answer": "a"}', r"line 2 of .* got \['prompt', 'answer'\]"),
        ('{"prompt": "p", "answer": null, "reference": "r"}', "line 2 of .*answer must be a str"),
        ('{"prompt": "p", "answer": "a", "reference": []}', "line 2 of .*references must be at least one"),
        ('{"prompt": "p", "answer": "a", "reference": {"a": 1}}', "line 2 of .*reference must be a str"),
        (
            '{"prompt": "p", "answer": "a", "reference": ["r", 3]}',
            r"line 2 of .*references\[1\] must be a str",
        ),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, line, message):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "p", "answer": "a", "reference": "r"}\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_answers(path)


def test_files_without_entries_and_entries_without_parts_are_refused(tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ValueError, match="a file with at least one entry"):
        read_answers(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        read_answers(tmp_path / "missing")
    with pytest.raises(ValueError, match="entry 1: an entry must be"):
        score_answers([{"prompt": "", "answer": "", "reference": ""}, {}])
    with pytest.raises(ValueError, match=r"entry 0: .*10,000 words"):
        score_answers([{"prompt": "", "answer": "w " * 10_001, "reference": "w"}])
