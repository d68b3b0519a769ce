"""What `appendix_vit_bert/sentence_runs.py` reads and has recorded is what it says."""

import csv

import pandas as pd
import pytest

from appendix_vit_bert import sentence_runs
from shared.data.corpus import load_stories
from shared.finetuning.evaluation import normalize_answer
from shared.notebook.records import read_rows


def test_every_question_has_its_passage_and_a_kind() -> None:
    questions, (passages, titles) = sentence_runs.read_questions(), sentence_runs.story_passages()
    assert len(questions) == len({q["question"] for q in questions}) == 48 and len(passages) >= 60
    for title in {story.title for story in load_stories()}:
        assert [q["kind"] for q in questions if q["story"] == title] == ["near", "far"] * 2
    for question in questions:
        assert 1 <= len(sentence_runs.right_places(question, passages, titles)) <= 3
        assert all(map(normalize_answer, question["answers"].split("|")))
        for quote in question["evidence"].split(" || "):
            (story,) = (s for s in load_stories() if s.title == question["story"])
            assert story.text.count(quote) == 1


def test_the_pairs_are_ten_of_each_score() -> None:
    path = sentence_runs.HERE / "sentence_pairs.tsv"
    pairs = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)
    assert pairs.score.value_counts().to_dict() == dict.fromkeys(range(6), 10)
    assert len({*pairs["first"], *pairs["second"]}) == 120


def test_the_answers_are_complete() -> None:
    rows = read_rows(sentence_runs.ANSWERS)
    assert {(r["passage"], int(r["number"])) for r in rows} == {
        (way, number) for way in ("none", "found", "right") for number in range(48)
    }
    questions, (passages, titles) = sentence_runs.read_questions(), sentence_runs.story_passages()
    for row in rows:
        if row["passage"] == "right":
            question = questions[int(row["number"])]
            assert int(row["place"]) == sentence_runs.right_places(question, passages, titles)[0]


@pytest.mark.parametrize(
    "data, n", [("bundled", 1039), ("reviews", 368), ("uci balanced", 1494), ("uci", 5574)]
)
def test_the_features_are_recorded_text_by_text(data: str, n: int) -> None:
    rows = [r for r in read_rows(sentence_runs.FEATURES) if r["data"] == data and r["role"] == "folds"]
    assert {r["seed"] for r in rows if r["method"] == "MiniLM"} == {"0", "1", "2"}
    for row in rows:
        assert int(row["n"]) == len(row["right"]) == n and int(row["correct"]) == row["right"].count("1")


def test_the_penalty_is_the_best_of_those_tried() -> None:
    tried = [r for r in read_rows(sentence_runs.FEATURES) if r["role"] == "choice"]
    assert {float(r["penalty"]) for r in tried} == set(sentence_runs.PENALTIES)
    assert {r["seed"] for r in tried} == {str(sentence_runs.spam_runs.CHOICE_SEED)}
    used = {
        r["penalty"]
        for r in read_rows(sentence_runs.FEATURES)
        if r["role"] == "folds" and r["method"] == "MiniLM"
    }
    assert used == {str(sentence_runs.chosen_penalty())}
