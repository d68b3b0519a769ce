"""The glossary and the table of landmark models of chapter 1."""

import csv
import json
import math
import re

import pytest

from tests.tools.architecture import ROOT

CHAPTER = ROOT / "ch01_intro"


def glossary() -> list[list[str]]:
    """Return the rows of the glossary without its head."""
    lines = (CHAPTER / "glossary.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == ["term", "chinese", "where", "meaning"]
    return [line.split("\t") for line in lines[1:]]


def landmarks() -> list[dict[str, str]]:
    with (CHAPTER / "landmarks.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def prose_of(path: str) -> str:
    """Return all cells of a notebook, in small letters, with single spaces."""
    cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    return " ".join(" ".join("".join(cell["source"]) for cell in cells).lower().split())


def test_there_are_enough_terms_and_each_once():
    terms = [row[0].lower() for row in glossary()]
    assert len(terms) >= 120
    assert len(set(terms)) == len(terms)


def test_every_row_is_complete():
    for row in glossary():
        assert len(row) == 4 and all(part.strip() for part in row), row
        term, chinese, _, meaning = row
        assert re.search(r"[\u4e00-\u9fff]", chinese), f"{term}: {chinese!r} holds no Chinese character"
        assert meaning.endswith(".") and "|" not in meaning, f"{term}: {meaning!r}"


def test_links_lead_somewhere():
    for term, _, where, _ in glossary():
        assert (ROOT / where).is_file(), f"{term}: {where} does not exist"


@pytest.mark.parametrize("where", sorted({row[2] for row in glossary() if row[2].endswith(".ipynb")}))
def test_a_term_occurs_in_its_notebook(where):
    prose = prose_of(where)
    missing = [
        term
        for term, _, path, _ in glossary()
        if path == where and not re.search(rf"(?<!\w){re.escape(term.lower())}(s|es)?(?!\w)", prose)
    ]
    assert not missing


def test_a_chapter_that_has_a_notebook_is_linked_by_it():
    """A term may lead to a chapter's page only as long as the chapter has no notebook."""
    pages = {where for _, _, where, _ in glossary() if where.endswith(".md")}
    written = [page for page in pages if list((ROOT / page).parent.glob("[0-9][0-9]_*.ipynb"))]
    assert not written, f"terms of {written} can lead to notebooks now"


def test_landmarks_have_a_source_and_a_date():
    rows = landmarks()
    assert len(rows) >= 15 and len({row["model"] for row in rows}) == len(rows)
    assert [row["date"] for row in rows] == sorted(row["date"] for row in rows)
    for row in rows:
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", row["date"]), row
        assert re.search(r"\b20\d\d\b", row["source"]), row


def test_landmarks_obey_six_operations_for_each_parameter_and_token():
    """Published compute is 6 N D, within a factor of 1.3; T5's encoder and decoder each read a part of the tokens."""
    judged = 0
    for row in landmarks():
        size = row["active_parameters"] or row["parameters"]
        if size and row["training_tokens"] and row["training_flop"]:
            ratio = float(row["training_flop"]) / (6 * float(size) * float(row["training_tokens"]))
            allowed = 2.1 if row["model"].startswith("T5") else 1.3
            assert abs(math.log(ratio)) < math.log(allowed), f"{row['model']}: {ratio:.2f}"
            judged += 1
    assert judged >= 5


def test_active_parameters_are_fewer_than_all():
    for row in landmarks():
        if row["active_parameters"]:
            assert float(row["active_parameters"]) < float(row["parameters"]), row["model"]
