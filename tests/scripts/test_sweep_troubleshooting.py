"""`ch05_pretraining/sweep_troubleshooting.py`: its data, its grades, its records. Nothing is trained."""

import csv
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch

from ch05_pretraining import sweep_troubleshooting as sweep
from shared.tales.encoding import tale_encoding
from shared.tales.generator import derivations, plans


def test_batches_hold_each_row_once_an_epoch_in_a_new_order():
    rows = [[2 * i, 2 * i + 1] for i in range(24)]
    source = sweep.batches(rows, seed=0, batch_size=8)
    epochs = [torch.cat([inputs for inputs, _ in islice(source, 3)]).flatten().tolist() for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [[2 * i for i in range(24)]] * 2
    assert epochs[0] != epochs[1]


def test_windows_stand_side_by_side_and_share_one_token():
    windows = sweep.prose_windows("train", 1)
    assert {len(window) for window in windows} == {sweep.WINDOW + 1}
    assert all(a[-1] == b[0] for a, b in pairwise(windows))
    assert len(sweep.prose_windows("train", 2)) > len(windows)


def test_tales_are_of_the_first_plans_only_and_begin_alike():
    few, more = sweep.tales(0, 20), sweep.tales(0, 40)
    assert more[:20] == few
    assert {story.plan for story in more} == set(plans()[: sweep.TALE_PLANS])


def test_rows_can_be_cut_to_a_number_of_targets():
    whole, cut = sweep.tale_rows(sweep.tales(0, 5)), sweep.tale_rows(sweep.tales(0, 5), n_tokens=10)
    assert cut == [row[:11] for row in whole]


def test_true_tales_get_full_marks_and_one_text_twice_is_half_different():
    texts = [story.text for story in sweep.tales(0, 6)]
    assert sweep.grade(texts) == {"stories": 1, "sentences": 1, "agreements": 1, "different": 1}
    assert sweep.grade(texts * 2)["different"] == 0.5


def test_nonsense_and_silence_get_none():
    assert sweep.grade(["xyz abc", ""]) == {"stories": 0, "sentences": 0, "agreements": 0, "different": 1}


def test_a_training_story_is_recited_and_another_is_not():
    stories = sweep.tales(0, 6)
    training = sweep.tale_rows(stories[:3])
    assert sweep.recited([story.text for story in stories[:3]], training) == 1
    assert sweep.recited([story.text for story in stories[3:]], training) < 0.2


def test_written_tales_end_at_the_end_token_and_repeat_with_the_seed():
    torch.manual_seed(0)
    model = sweep.GPTModel(sweep.small_config(16))
    first = sweep.write_tales(model, n=2, seed=3, temperature=1.0)
    assert first == sweep.write_tales(model, n=2, seed=3, temperature=1.0)
    assert len(first) == 2 and not any(derivations(text) for text in first if text.strip())
    assert tale_encoding().decode([tale_encoding().eot_token]) not in "".join(first)


def test_a_run_replaces_its_own_rows_of_the_record_only(tmp_path):
    path = tmp_path / "record.csv"
    row = lambda variant, seed, loss: {"variant": variant, "seed": seed, "loss": loss}
    sweep.save(path, [row("b", 0, 1.0), row("b", 0, 2.0)], ["a", "b"])
    sweep.save(path, [row("a", 1, 3.0)], ["a", "b"])
    sweep.save(path, [row("b", 0, 4.0)], ["a", "b"])
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(r["variant"], r["seed"], r["loss"]) for r in csv.DictReader(file)]
    assert rows == [("a", "1", "3.0"), ("b", "0", "4.0")]
    assert [p.name for p in tmp_path.iterdir()] == ["record.csv"]


@pytest.mark.parametrize(
    ("path", "variants", "rows_of_a_run"),
    [
        (sweep.OVERFITTING_FILE, sweep.OVERFITTING, sweep.PROSE_STEPS // sweep.PROSE_EVERY + 1),
        (sweep.TEXT_FILE, sweep.TEXT, len(sweep.TEMPERATURES)),
    ],
)
def test_the_record_holds_every_variant_and_seed_as_the_script_has_them(path, variants, rows_of_a_run):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = Counter((row["variant"], int(row["seed"])) for row in rows)
    assert runs == {(name, seed): rows_of_a_run for name in variants for seed in sweep.SEEDS}
    for row in rows:
        variant = variants[row["variant"]]
        assert all(float(row[key]) == value for key, value in vars(variant).items())
