"""The notes for teachers name every notebook, with the minutes and exercises that it has."""

import json
import re

import pytest

from tests.course.reading_time import minutes
from tests.tools.architecture import ROOT, notebooks
from tests.tools.student import without_solutions

NOTES = ROOT / "ch01_intro" / "for_teachers.md"
TEXT = NOTES.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \[([\dABD])\.(\d)\]\(([^)]+)\) \| ([^|]+) \| (\d+) \| (\d+), (\d+) \|$", TEXT, re.M)


def test_every_notebook_has_a_row():
    there = [(NOTES.parent / row[2]).resolve().relative_to(ROOT.resolve()).as_posix() for row in ROWS]
    assert there == [path.relative_to(ROOT).as_posix() for path in notebooks()]
    for row, name in zip(ROWS, there, strict=True):
        folder = {"A": "appendix_lora", "B": "appendix_vit_bert", "D": "deployment"}.get(
            row[0], rf"ch0{row[0]}_\w+"
        )
        assert re.match(rf"{folder}/0{row[1]}_", name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}.{row[1]}")
def test_minutes_and_exercises(row):
    path = NOTES.parent / row[2]
    assert minutes(path) == pytest.approx(int(row[4]), rel=0.15, abs=5)
    counts = without_solutions(json.loads(path.read_text(encoding="utf-8")))
    assert (counts.total, counts.checked) == (int(row[5]), int(row[6]))


def test_the_term_has_14_weeks_and_every_notebook():
    weeks = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", TEXT, re.M)
    assert [int(week) for week, _, _ in weeks] == list(range(1, 15))
    planned = {name for _, *sessions in weeks for name in re.findall(r"\b[\dABD]\.\d\b", " ".join(sessions))}
    assert planned == {f"{row[0]}.{row[1]}" for row in ROWS}
