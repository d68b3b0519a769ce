"""`appendix_vit_bert/train_clip.py` draws and names what it says, runs in short and resumes; its record is complete."""

import sys

import pytest
import torch

from appendix_vit_bert import train_clip
from shared.data.images import load_digit_images
from shared.notebook.records import read_rows


@pytest.mark.parametrize("n", [1, 2, 4])
def test_each_digit_lacks_so_many_styles_and_no_style_is_lost(n: int) -> None:
    held_out = train_clip.held_out_styles(n)
    assert (
        held_out.sum(dim=1).tolist() == [n] * 10
        and held_out.sum(dim=0).max() <= 7
        and not held_out[:, 0].any()
    )
    for digit in range(10):  # with a word of style that it never met it could not be asked for it
        left = [train_clip.STYLES[style] for style in range(8) if not held_out[digit, style]]
        assert all(len(set(words)) == 2 for words in zip(*left, strict=True))
    batches = train_clip.pairs(load_digit_images("train"), held_out, 64, seed=3)
    for _ in range(5):
        (images, tokens), labels = next(batches)
        assert images.shape == (64, 1, 8, 8) and not held_out[labels // 8, labels % 8].any()
        for image, ids, label in zip(images, tokens, labels.tolist(), strict=True):
            assert (image[0, 0, 7] == 1) == (train_clip.STYLES[label % 8][2] == "marked")
            words = [train_clip.WORDS[i - 3] for i in ids.tolist() if i > 2]
            assert {train_clip.NAMES[label // 8], *train_clip.STYLES[label % 8]} <= set(words)


def test_the_80_captions_differ_and_the_new_wording_is_new() -> None:
    captions = [text for template in train_clip.TEMPLATES for text in train_clip.all_captions(template)]
    new = train_clip.all_captions(train_clip.NEW_WORDING)
    assert len(set(captions)) == 240 and len({*captions, *new}) == 320
    ids = train_clip.encode_captions(captions + new)
    assert (ids == train_clip.END).sum(dim=1).eq(1).all() and ids[:, 0].eq(train_clip.START).all()


def test_styles_change_what_they_name() -> None:
    images = load_digit_images("train").images[:50]
    drawn = {names: train_clip.draw_in(images, style) for style, names in enumerate(train_clip.STYLES)}
    plain = drawn["thin", "strong", "plain"]
    assert torch.equal(plain[..., 1:, :], images[..., 1:, :])
    assert (drawn["thick", "strong", "plain"] >= plain).all()
    assert drawn["thin", "faint", "plain"].max() <= 0 < plain.max()


def test_the_record_is_complete() -> None:
    rows = read_rows(train_clip.RESULTS)
    found = {(int(row["held_out"]), int(row["seed"])) for row in rows}
    assert found == {(n, seed) for n in train_clip.N_HELD_OUT for seed in train_clip.SEEDS}
    for row in rows:
        n = int(row["held_out"]) * 300
        assert int(row["n"]) == (n if row["measure"].startswith("never") else 2400 - n)


def test_a_short_run_resumes(tmp_path, monkeypatch, capsys) -> None:
    record = tmp_path / "record.csv"
    command = ["train_clip.py", "--steps", "3", "--seeds", "1", "--output", str(record)]
    monkeypatch.setattr(sys, "argv", command)
    train_clip.main()
    rows = read_rows(record)
    assert len(rows) == 3 * 4 and all(0 <= int(row["right"]) <= int(row["n"]) for row in rows)
    capsys.readouterr()
    train_clip.main()
    assert read_rows(record) == rows and capsys.readouterr().out == ""
