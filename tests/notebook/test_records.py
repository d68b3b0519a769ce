"""`shared/notebook/records.py`: rows replace those of the same key, the file is written whole or not at all."""

import csv
from pathlib import Path

import numpy as np
import pytest

from shared.notebook.records import (
    load_script,
    paired_difference,
    read_rows,
    replace_row,
    replace_rows,
)
from shared.pretraining.processes import cpu_name

COLUMNS = ["name", "seed", "loss"]


def by_name(row: dict) -> tuple[str, int]:
    return row["name"], int(row["seed"])


def rows_of(path: Path) -> list[tuple[str, ...]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_new_rows_replace_those_of_their_key_and_are_sorted(tmp_path):
    path = tmp_path / "record.csv"
    replace_rows(path, COLUMNS, [{"name": "b", "seed": 0, "loss": 1.0}, {"name": "b", "seed": 10}], by_name)
    replace_rows(path, COLUMNS, [{"name": "a", "seed": 1, "loss": 3.0}], by_name)
    replace_rows(path, COLUMNS, [{"name": "b", "seed": 0, "loss": loss} for loss in (5, 4)], by_name)
    assert rows_of(path) == [("a", "1", "3.0"), ("b", "0", "5"), ("b", "0", "4"), ("b", "10", "")]


def test_a_wrong_row_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "record.csv"
    replace_rows(path, COLUMNS, [{"name": "a", "seed": 1, "loss": 3.0}], by_name)
    with pytest.raises(ValueError, match="lost"):
        replace_rows(path, COLUMNS, [{"name": "b", "seed": 1, "lost": 3.0}], by_name)
    assert rows_of(path) == [("a", "1", "3.0")] and list(tmp_path.iterdir()) == [path]


def test_one_row_replaces_the_row_with_the_same_values_of_its_key(tmp_path):
    path = tmp_path / "record.csv"
    assert read_rows(path) == []
    for name, seed, loss in (("b", 0, 1.0), ("a", 1, 2.0), ("b", 0, 3.0), ("b", 1, 4.0)):
        replace_row(path, COLUMNS, {"name": name, "seed": seed, "loss": loss}, ("name", "seed"))
    assert rows_of(path) == [("a", "1", "2.0"), ("b", "0", "3.0"), ("b", "1", "4.0")]
    assert read_rows(path)[0] == {"name": "a", "seed": "1", "loss": "2.0"}
    with pytest.raises(ValueError, match="lost"):
        replace_row(path, COLUMNS, {"name": "a", "seed": 1, "lost": 0.0}, ("name", "seed"))


def test_the_processor_has_a_name():
    assert cpu_name().strip()


def test_the_difference_and_its_interval():
    both = {(0, i): (i % 4 != 0, i % 2 == 0) for i in range(400)}  # 75 % and 50 % right
    mean, low, high = paired_difference(both)
    gained = np.array([100 * (int(a) - int(b)) for a, b in both.values()])
    half = 1.96 * gained.std(ddof=1) / 20
    assert mean == pytest.approx(25) and (low, high) == (pytest.approx(25 - half), pytest.approx(25 + half))
    # The same messages under a second seed make the interval no narrower.
    twice = both | {(1, i): values for (_, i), values in both.items()}
    assert paired_difference(twice) == pytest.approx((mean, low, high))
    with pytest.raises(ValueError, match="both must hold at least two texts, got 1"):
        paired_difference({(0, 5): (True, False), (1, 5): (True, True)})


def test_a_script_of_another_folder_is_loaded(tmp_path):
    (tmp_path / "some_script.py").write_text("ANSWER = 6 * 7\n")
    assert load_script(tmp_path / "some_script.py").ANSWER == 42
    with pytest.raises(FileNotFoundError):
        load_script(tmp_path / "missing.py")
