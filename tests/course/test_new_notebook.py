"""`make new-notebook`: it makes a notebook that the tools read, and overwrites nothing."""

import nbformat
import pytest

from tests.tools.audit import findings
from tests.tools.new_notebook import build, main

NAME = "ch06_classification/01_spam"


def test_it_makes_a_valid_notebook_that_lacks_only_being_filled_and_run(tmp_path, capsys):
    assert main([NAME, "--root", str(tmp_path)]) == 0
    path = tmp_path / f"{NAME}.ipynb"
    nbformat.validate(nbformat.read(path, as_version=4))
    assert "made ch06_classification/01_spam.ipynb" in capsys.readouterr().out
    assert [line.split(" (")[0] for line in findings(path)] == [
        "the code cells were not all executed, in order, in one fresh kernel",
        "there is no figure",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "must begin with a chapter, one of ch01_intro"),
        ("ch99_nothing/01_a", "must begin with a chapter"),
        ("ch06_classification", "must be chapter/NN_topic, such as ch06_classification/01_topic"),
        ("ch06_classification/spam", "must be chapter/NN_topic"),
        ("ch06_classification/../01_a", "must be chapter/NN_topic"),
        (NAME, "a number that is free in ch06_classification, got 01, which 01_other.ipynb has"),
    ],
)
def test_a_bad_name_is_refused_in_one_line(tmp_path, capsys, name, message):
    (tmp_path / "ch06_classification").mkdir()
    nbformat.write(build(), tmp_path / "ch06_classification" / "01_other.ipynb")
    assert main([name, "--root", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert len(list(tmp_path.rglob("*.ipynb"))) == 1
