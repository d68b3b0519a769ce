"""What `deployment/privacy_runs.py` compares is compared fairly, and its record is what it says."""

import math

import pytest

from deployment import privacy_runs, split_pii_lines
from shared.notebook.records import read_rows
from shared.safety.privacy import find_personal_data

ROWS = read_rows(privacy_runs.RESULTS)


@pytest.fixture(scope="module")
def world() -> privacy_runs.World:
    return privacy_runs.World.draw(0, 8)


def test_a_world_is_what_its_seed_says(world):
    assert world == privacy_runs.World.draw(0, 8) and world.canaries != privacy_runs.World.draw(1, 8).canaries
    assert not set(world.members) & set(world.others) and len(world.members) == len(world.others) == 8
    assert [c.repeats for c in world.canaries] == [0] * 8 + [
        n for n in (1, 2, 4, 8, 16, 32) for _ in range(4)
    ]


def test_the_dialect_undoes_itself_and_swaps_what_it_says():
    partners = privacy_runs.PARTNERS
    assert len(partners) == 40 and all(
        partners[partners[word]] == word != partners[word] for word in partners
    )
    assert privacy_runs.dialect("In Rome she said so; saidly, SAID") == "On Rome she asked but; saidly, Asked"
    for tale in privacy_runs.TaleGenerator(5).stories(20):
        other = privacy_runs.dialect(tale.text)
        assert other != tale.text == privacy_runs.dialect(other)


def test_what_each_measure_trains_on(world):
    plain, single = world.documents("plain"), world.documents("deduplicated")
    assert len(plain) == 8 + 4 * 63 and sorted(single) == sorted(set(plain))
    assert all(find_personal_data(text) == [] for text in world.documents("redacted"))
    gone = {c.text for c in world.canaries if c.repeats == privacy_runs.FORGOTTEN}
    assert gone <= set(plain) and not gone & set(world.documents("retrained"))
    assert not any(c.text in plain for c in world.canaries if c.repeats == 0)


def test_a_row_of_the_record_comes_from_the_script(world):
    (row,) = privacy_runs.run("noise 1", 0, n_tales=4, n_epochs=1)
    assert set(row) <= set(privacy_runs.COLUMNS) and row["steps"] == 4 and float(row["epsilon"]) > 0
    assert len(row["exposures"].split()) == len(row["extracted"].split()) == 32


def test_ascent_takes_away_what_it_is_told_to(world):
    model = privacy_runs.public_model()
    rows = privacy_runs.rows_of(world.members + [c.text for c in world.canaries[-4:] for _ in range(8)])
    privacy_runs.fit(model, rows, 0, 4)
    bad = privacy_runs.rows_of([world.canaries[-1].text])
    before = privacy_runs.document_losses(model, bad).item()
    privacy_runs.ascend(model, bad, rows[:8], 0, n_steps=8)
    assert privacy_runs.document_losses(model, bad).item() > before + 1


def test_the_record_is_complete():
    names = {*privacy_runs.MEASURES, *privacy_runs.DELETIONS}
    assert {(row["measure"], row["seed"]) for row in ROWS} == {
        (name, str(seed)) for name in names for seed in privacy_runs.SEEDS
    }
    assert len(ROWS) == len(names) * len(privacy_runs.SEEDS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['measure']}, {row['seed']}")
def test_a_recorded_row_is_consistent(row):
    assert float(row["floor"]) < float(row["held_out_loss"]) and 0 <= float(row["auc_reference"]) <= 1
    values = [float(pair.split(":")[1]) for pair in row["exposures"].split()]
    assert len(values) == 32 and all(0 <= value <= math.log2(1000) + 1e-3 for value in values)
    assert row["torch"] and (bool(row["epsilon"]) == row["measure"].startswith("noise"))


def test_lines_of_one_shape_stay_in_one_half():
    lines = [
        {"text": f"call {n} now", "spans": [[5, 5 + len(str(n)), "phone"]], "origin": "generated"}
        for n in range(6)
    ]
    lines += [{"text": f"word {chr(97 + n)}", "spans": [], "origin": "written"} for n in range(10)]
    found = split_pii_lines.split_lines(lines)
    assert len({line["split"] for line in found[:6]}) == 1
    assert {line["split"] for line in found[6:]} == {"development", "test"}
    assert found == split_pii_lines.split_lines(lines)
    with pytest.raises(ValueError, match="inside the text"):
        split_pii_lines.split_lines([{"text": "ab", "spans": [[1, 3, "id"]], "origin": "written"}])


def test_a_split_is_made_once(tmp_path):
    with pytest.raises(ValueError, match="a split is made once"):
        split_pii_lines.main([str(tmp_path / "x.jsonl"), "--out", str(split_pii_lines.DEFAULT)])
