"""The bundled digits in their splits; pictures of a reader's own, good and bad."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from shared.data.images import load_digit, load_digit_images, load_image, open_image


def test_the_splits_share_nothing_and_hold_everything() -> None:
    parts = [load_digit_images(name) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1197, 300, 300]
    assert torch.cat([part.rows for part in parts]).sort().values.tolist() == list(range(1797))
    for part in parts:
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert shares.min() > 0.09 and shares.max() < 0.11
        assert part.images.shape[1:] == (1, 8, 8) and part.images.min() == -1 and part.images.max() == 1
    everything = load_digit_images()
    assert torch.equal(everything.images[parts[2].rows], parts[2].images)
    assert int((parts[2].rows * parts[2].labels).sum()) == TEST_SUM  # the same splits on each machine
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        load_digit_images("dev")


TEST_SUM = 1_189_534


def test_an_image_is_stretched_to_its_size(tmp_path: Path) -> None:
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, 10:] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", (4, 6))
    assert image.shape == (1, 3, 4, 6) and image.dtype == torch.float32
    assert image[0, 0, :, 3:].min() == 1 and image[0, 1:].max() == -1 and image[0, :, :, :3].max() == -1
    assert load_image(tmp_path / "a.png", (4, 6), n_channels=1).shape == (1, 1, 4, 6)
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "glass.png")
    assert load_image(tmp_path / "glass.png", (2, 2)).min() == 1  # transparent: white


@pytest.mark.parametrize("dark_ink", [True, False])
def test_a_digit_of_ones_own_is_like_the_bundled_ones(tmp_path: Path, dark_ink: bool) -> None:
    paper, ink = (250, 20) if dark_ink else (10, 240)
    image = Image.new("L", (200, 300), paper)
    ImageDraw.Draw(image).rectangle((120, 50, 140, 250), fill=ink)
    image.save(tmp_path / "one.png")
    digit = load_digit(tmp_path / "one.png")
    assert digit.shape == (1, 1, 8, 8)
    assert digit[0, 0, :, 0].max() == -1 and digit[0, 0, :, 3:5].mean() > -0.5  # upright, in the middle
    assert digit[0, 0, 0].max() > -1 and digit[0, 0, 7].max() > -1  # fills the height


def test_what_is_no_image(tmp_path: Path) -> None:
    text = tmp_path / "a.png"
    text.write_text("no picture")
    for load in (open_image, load_digit, lambda path: load_image(path, (8, 8))):
        with pytest.raises(ValueError, match="must be an image"):
            load(text)
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "nothing.png")
    good = tmp_path / "good.png"
    Image.new("L", (100, 100), 200).save(good)
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:-40])
    with pytest.raises(ValueError, match="must be an image"):
        open_image(tmp_path / "half.png")
    with pytest.raises(ValueError, match="pixels must be at most 9999, got 10000"):
        open_image(good, max_pixels=9999)
    with pytest.raises(ValueError, match="contrast must be above"):
        load_digit(good)
    for options in ({"size": (0, 8)}, {"size": (8, 8), "n_channels": 2}):
        with pytest.raises(ValueError, match=r"size must be at least 1|n_channels must be one of"):
            load_image(good, **options)
