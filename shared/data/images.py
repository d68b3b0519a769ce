"""Images: the digits that come with scikit-learn, in fixed splits, and files of a reader's own.

Pixels are float32 from -1 to 1, as the released Vision Transformers want them; of a digit, -1 is paper and 1
is ink. Files are read through Pillow, which matplotlib needs anyway. Nothing is fetched. A picture in `bytes`
is taken for a stranger's: few formats are read, and what makes a small file costly is refused or left out.

Left out: video, many images in one file, and more than 8 bits for a channel.

The digits are the test part of Alpaydin and Kaynak (1998, "Cascading Classifiers"): 1,797 images by 13 people.
"""

import io
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from shared.checks import check_choice, require, whole_number

MAX_PIXELS = 40_000_000  # of a file; a small file can claim to be a picture that fills the memory
_MODES = {1: "L", 3: "RGB"}
# Of strangers: a PostScript file, for one, would start a program that runs it.
FORMATS = ("PNG", "JPEG", "WEBP")
# In so many scans a JPEG file usually repeats its picture, from coarse to fine; each costs time for all pixels.
_SCANS = 10
_EXIF = b"Exif\0\0"
# Most bytes of what a camera notes; entries can overlap, so that the cost grows with the square.
_MOST_EXIF = 65_536
Source = str | os.PathLike[str] | bytes
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) and labels int64 (n,); `rows` are their places in scikit-learn's order, int64 (n,)."""

    images: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, chosen: Tensor) -> "Digits":
        """Return those for which `chosen`, bool (n,), is True; or those at the places, int64 (k,)."""
        return Digits(self.images[chosen], self.labels[chosen], self.rows[chosen])


def load_digit_images(split: str | None = None) -> Digits:
    """Return scikit-learn's digits: all 1,797 in their order, or the split "train", "validation" or "test".

    The splits have 1,197, 300 and 300 images. They are drawn once, with the shares of all ten digits alike, and are
    the same on each machine. Who wrote which image is not known, so writers are shared among them.

    Raises ValueError for another split.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    digits = Digits(images, torch.tensor(data.target), torch.arange(len(images)))
    if split is None:
        return digits
    check_choice("split", split, SPLITS)
    return digits.where(_split_places(data.target)[split])


def _split_places(labels: np.ndarray) -> dict[str, Tensor]:
    """Return the places of each split: within each digit a fixed shuffle, then every third one is held out."""
    rng = np.random.default_rng(1998)
    mixed = np.concatenate([rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)])
    # 600 places at even distances along this order, by turns for the test and for validation.
    held = mixed[np.arange(600) * len(mixed) // 600]
    places = {
        "train": np.setdiff1d(mixed, held),
        "validation": np.sort(held[1::2]),
        "test": np.sort(held[::2]),
    }
    return {name: torch.from_numpy(found) for name, found in places.items()}


def open_image(source: Source, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the picture in a file, upright as the camera saw it.

    Args:
        source: A path; or the file's bytes, which are then taken for a stranger's and must be of a format in `FORMATS`.
        max_pixels: More are refused before they are decoded.

    Raises:
        ValueError: The file is no image that Pillow knows, is damaged, or has more pixels than allowed.
        FileNotFoundError: There is no such file.
    """
    whole_number("max_pixels", max_pixels)
    file: Source | io.BytesIO = source
    if isinstance(source, bytes):
        file, max_pixels = _tamed(source, max_pixels)
    formats = FORMATS if isinstance(source, bytes) else None
    try:
        with warnings.catch_warnings():
            # Our own limit stands below, and odd notes of a camera spoil no picture.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=formats) as image:
                width, height = image.size
                if width * height <= max_pixels:
                    image.load()
                    for key in ("exif", "Raw profile type exif"):
                        if len(image.info.get(key) or b"") > _MOST_EXIF:
                            del image.info[key]
                    return ImageOps.exif_transpose(image)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # each format has errors of its own
        if isinstance(source, bytes):  # what Pillow says shows parts of the file, and places in memory
            raise ValueError(f"the picture must be a whole file of {', '.join(FORMATS)}") from error
        raise ValueError(f"{os.fspath(source)} must be an image: {error}") from error
    raise ValueError(f"pixels must be at most {max_pixels}, got {width * height}")


def _tamed(data: bytes, max_pixels: int) -> tuple[io.BytesIO, int]:
    """Return a stranger's file and how many pixels it may have, so that neither scans nor notes cost much."""
    if data.startswith(b"\xff\xd8"):  # JPEG, where this mark stands for a scan and never within its numbers
        max_pixels = max_pixels * _SCANS // max(_SCANS, data.count(b"\xff\xda"))
        # Pillow strings all notes together; only the first keeps its name.
        before, name, behind = data.partition(_EXIF)
        data = before + name + behind.replace(_EXIF, bytes(len(_EXIF)))
    return io.BytesIO(data), max_pixels


def load_image(
    source: Source, size: tuple[int, int], n_channels: int = 3, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Return the picture in a file as float32 (1, n_channels, height, width) from -1 to 1, stretched to a size.

    Transparent parts become white.

    Args:
        source, max_pixels: As for `open_image`.
        size: Height and width.
        n_channels: 1 for gray, 3 for colors.

    Raises:
        ValueError: What `open_image` refuses, or a size below 1, or another number of channels.
        FileNotFoundError: There is no such file.
    """
    check_choice("n_channels", n_channels, _MODES)
    height, width = (whole_number("size", side) for side in size)
    image = _on_white(open_image(source, max_pixels)).convert(_MODES[n_channels])
    return _as_tensor(image.resize((width, height), Image.Resampling.BOX))


def load_digit(source: Source, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return a picture of one digit as scikit-learn's digits are: float32 (1, 1, 8, 8), ink is 1.

    Dark ink on light paper is turned around, the paper is cut away around the ink, the rest is fitted into 32 x 32
    pixels, and of each field of 4 x 4 the share of ink is taken.

    Raises:
        ValueError: What `open_image` refuses, or the picture is of one shade, so that there is no digit.
        FileNotFoundError: There is no such file.
    """
    gray = np.asarray(_on_white(open_image(source, max_pixels)).convert("L"), dtype=np.float32) / 255
    # What stands along the edge is paper.
    edge = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
    gray = 1 - gray if np.median(edge) > (gray.min() + gray.max()) / 2 else gray
    contrast = float(np.ptp(gray))
    require("the picture's contrast", contrast, contrast > 0.1, "above 0.1")
    ink = gray > (gray.min() + gray.max()) / 2
    # The digit alone, in a square of 32 x 32 with its shape kept.
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    part = Image.fromarray(255 * ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8))
    factor = 32 / max(part.size)
    fitted = part.resize([max(1, round(side * factor)) for side in part.size], Image.Resampling.BOX)
    square = Image.new("L", (32, 32))
    square.paste(fitted, ((32 - fitted.width) // 2, (32 - fitted.height) // 2))
    return _as_tensor(square.resize((8, 8), Image.Resampling.BOX))


def _on_white(image: Image.Image) -> Image.Image:
    """Return the picture without transparency."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image


def _as_tensor(image: Image.Image) -> Tensor:
    """(height, width) or (height, width, channels) of 8 bits -> float32 (1, channels, height, width), -1 to 1."""
    numbers = np.atleast_3d(np.asarray(image, dtype=np.float32) / 127.5 - 1)
    return torch.from_numpy(numbers.transpose(2, 0, 1)[None].copy())
