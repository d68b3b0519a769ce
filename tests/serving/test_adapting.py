"""`llm adapt`: a CSV file becomes an adapter that `llm classify` reads; errors are one line, before any work."""

import csv

import pytest

from shared.serving.adapting import DEFAULT, around
from tests.serving.test_cli import llm, one_line  # noqa: F401

THINGS = ("egg", "fish", "apple", "soup", "bean", "bread")
ROWS = [
    (f"{verb} the {thing}{how}", label)
    for how in ("", " now")
    for verb, label in (("boil", "kitchen"), ("plant", "garden"))
    for thing in THINGS
]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "orders.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    return path


def test_adapt_and_classify(llm, table, tmp_path):  # noqa: F811
    folder = tmp_path / "mine"
    options = ("--base", "tales-tiny", "--rank", 4, "--epochs", 8, "--learning-rate", 0.01)
    status, written, _ = llm("adapt", table, folder, *options)
    assert (status, written) == (0, f"{folder}: 24 texts, labels garden, kitchen\n")
    found = [llm("classify", folder, text)[1].split("\t")[0] for text, _ in ROWS]
    assert sum(one == label for one, (_, label) in zip(found, ROWS, strict=True)) >= 20
    # Nothing is overwritten.
    status, _, error = llm("adapt", table, folder, *options)
    assert status == 1 and "nothing is overwritten" in error and one_line(error)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--base", "tales-9m"), "name_or_path must be one of"),
        (("--base", "tales-tiny", "--text", "message"), "columns must be with 'message'"),
        (("--base", "tales-tiny", "--prompt", "no place"), "--prompt must hold {text}"),
        (("--base", "tales-tiny", "--rank", 999), "rank must be at most"),
        (("--base", "tales-tiny", "--frozen", 99), "n_frozen must be"),
    ],
)
def test_bad_input(llm, table, tmp_path, arguments, said):  # noqa: F811
    status, written, error = llm("adapt", table, tmp_path / "mine", *arguments)
    assert (status, written) == (1, "") and said in error and one_line(error)
    assert not (tmp_path / "mine").exists()


def test_a_file_that_is_none(llm, tmp_path):  # noqa: F811
    status, _, error = llm("adapt", tmp_path / "none.csv", tmp_path / "mine", "--base", "tales-tiny")
    assert status == 1 and "none.csv" in error and one_line(error)


def test_what_stands_around_a_text():
    assert around("Review: {text}\\nSentiment:", "tales-3m", ()) == ("Review: ", "\nSentiment:")
    assert around("", DEFAULT, ()) is None and around(None, "tales-3m", ()) is None
    assert around(None, DEFAULT, ("b", "a", "b")) == ("Text: ", "\nLabel (a, b):")
