"""The records of `ch07_instruction/reading_runs.py` are whole, and what they claim can be seen in them."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from ch07_instruction import reading_runs
from shared.data.corpus import load_reading_questions
from shared.finetuning.evaluation import token_f1
from shared.finetuning.retrieval import BM25
from shared.notebook.records import read_rows
from shared.tales.questions import TaleQuestionGenerator
from shared.weights.pretrained import CHECKPOINTS

ROWS = read_rows(reading_runs.RESULTS)
ANSWERS = read_rows(reading_runs.ANSWERS)
TALES = [row for row in ROWS if row["role"] == "tales"]


def test_the_record_is_complete():
    assert Counter(row["role"] for row in ROWS) == {"choice": len(reading_runs.TRIALS), "tales": 3}
    assert {row["seed"] for row in TALES} == {str(seed) for seed in reading_runs.SEEDS}
    assert {row["seed"] for row in ROWS if row["role"] == "choice"} == {str(reading_runs.CHOICE_SEED)}
    assert reading_runs.CHOICE_SEED not in reading_runs.SEEDS
    learning_rate, attention = reading_runs.chosen()
    assert all(row["learning_rate"] == str(learning_rate) and row["attention"] == attention for row in TALES)
    assert all(row["hardware"] and row["torch"] for row in ROWS)


def test_readers_of_tales_reach_what_was_aimed_at():
    for row in TALES:
        assert float(row["f1"]) >= 90 and float(row["exact"]) <= float(row["f1"])
    # Silence chosen by the threshold is no worse than none: four of five questions have an answer.
    assert all(float(row["f1_all"]) > 0.8 * float(row["f1"]) for row in TALES)


def test_the_shipped_reader_is_that_of_seed_0():
    about = json.loads((CHECKPOINTS / "tales-reader" / "reader.json").read_text())
    row = next(row for row in TALES if row["seed"] == "0")
    assert (about["seed"], about["n_steps"]) == (0, reading_runs.N_STEPS)
    assert about["threshold"] == pytest.approx(float(row["threshold"]), abs=1e-3)


def test_every_question_on_the_stories_was_answered():
    n = len(load_reading_questions())
    kinds = Counter((row["method"], row["found"]) for row in ANSWERS)
    assert kinds == dict.fromkeys([("asked", "0"), *(("pointing", str(k)) for k in range(4))], n)
    parts, titles = reading_runs.passages()
    search = BM25(parts)
    for row in ANSWERS:
        question, place = load_reading_questions()[int(row["number"])], int(row["place"])
        if row["found"] == "0":
            assert titles[place] == question.story and question.evidence in parts[place]
        else:
            scores = search.scores(question.question)
            assert np.argsort(-scores, kind="stable")[int(row["found"]) - 1] == place
        if row["method"] == "pointing":
            # A reader that points has its answer from the passage.
            assert row["answer"] and row["answer"] in " ".join(parts[place].split())
            float(row["margin"])


def test_the_larger_reader_beats_writing_and_rules():
    questions = load_reading_questions()
    scores = {}
    for method in ("asked", "pointing"):
        rows = [row for row in ANSWERS if row["method"] == method and row["found"] == "0"]
        scores[method] = np.mean(
            [
                token_f1(row["answer"], questions[int(row["number"])].answers)
                for row in rows
                if questions[int(row["number"])].answers
            ]
        )
    assert scores["pointing"] > scores["asked"]


def test_examples_are_questions_of_their_seed():
    torch.manual_seed(0)
    reader = reading_runs.Reader(
        reading_runs.SpanModel(reading_runs.load_pretrained("tales-tiny", dtype=torch.float32)),
        reading_runs.load_tokenizer("tales-tiny"),
    )
    made = reading_runs.examples(reader, 3)
    asked = TaleQuestionGenerator(3).sample(forms=(0, 1))
    window, target = next(made)
    text = reader.encoding.decode(list(window.ids[target[0] : target[1] + 1]))
    assert text.strip(' .,"') == asked.answer or not asked.answer
