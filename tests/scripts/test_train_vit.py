"""`appendix_vit_bert/train_vit.py` runs in short, resumes, and its record is complete."""

import sys

import pytest

from appendix_vit_bert import train_vit
from shared.notebook.records import read_rows


def test_the_record_is_complete() -> None:
    found = {(row["run"].split(";")[0], int(row["seed"])) for row in read_rows(train_vit.RESULTS)}
    trained = ("vit", "cnn", "eight", "vit, plain", "vit, no positions", "vit, patches of 4")
    trained += ("vit, by rows", "cnn, by rows")
    once = ("neighbors", "logistic", "neighbors, by rows", "logistic, by rows")
    assert found == {(name, seed) for name in trained for seed in (0, 1, 2)} | {(name, 0) for name in once}


def test_nobody_in_the_test_was_trained_on() -> None:
    for by_rows in (False, True):
        parts = [set(part.rows.tolist()) for part in train_vit.splits(by_rows)]
        assert [len(part) for part in parts] == [1197, 300, 300] and len(set.union(*parts)) == 1797
    assert min(parts[2]) == 1497


def test_a_short_run_resumes(tmp_path, monkeypatch, capsys) -> None:
    record = tmp_path / "record.csv"
    command = ["train_vit.py", "cnn", "eight", "--steps", "5", "--seeds", "1", "--output", str(record)]
    monkeypatch.setattr(sys, "argv", command)
    train_vit.main()
    rows = read_rows(record)
    assert {row["run"].split(";")[0] for row in rows} == {"cnn", "eight"} and len(rows) == 4 + 2 * 2 * 4 * 2
    assert all(0 <= float(row["value"]) <= float(row["n"]) for row in rows if "right" in row["measure"])
    capsys.readouterr()
    train_vit.main()
    assert read_rows(record) == rows and capsys.readouterr().out == ""


@pytest.mark.parametrize("way", train_vit.TUNING_RATES)
def test_a_way_trains_what_it_says(way) -> None:
    body = train_vit.vision(8).body.state_dict()
    data, _, _ = train_vit.splits(False)
    few = data.where(train_vit.examples(data, (8, 9), 5, 0))
    few = train_vit.Digits(few.images, few.labels % 2, few.rows)
    model, trained = train_vit.tuned(body, few, way, 0, 2)
    assert trained == {"head": 130, "lora": 4226}.get(way, 135618)
    changed = any(
        not value.equal(body[name]) for name, value in model.body.state_dict().items() if name in body
    )
    assert changed == (way in ("full", "scratch"))
