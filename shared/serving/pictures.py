"""Pictures to labels: a Vision Transformer with its labels and its preparation, and what a service does around it.

`open_picture_classifier` takes what `load_vit` takes. `PictureReader` is the service's side: the base64 of a
stranger's picture in, probabilities out; decoded in a thread of its own, computed between two steps of the engine.

Left out: addresses of pictures, which would be fetched; crops, and the resampling that a folder asks for: a picture is
stretched, each pixel the mean of those it covers.
"""

import asyncio
import base64
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.checks import check_path, require
from shared.data.images import MAX_PIXELS, Source, load_digit, load_image
from shared.model.vit import ViTClassifier
from shared.serving.errors import ApiError
from shared.serving.loading import LoadedOnce
from shared.serving.logs import log
from shared.serving.models import read_json
from shared.serving.worker import MOST_CALLS, Worker
from shared.weights.pretrained import CHECKPOINTS
from shared.weights.vit import OWN_VIT_CONFIG, load_vit

PICTURES = "digits-vit"  # ships with the course
MOST_PIXELS = 16_000_000  # of a stranger's picture, about half a second of decoding
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class PictureClassifier:
    """A Vision Transformer that labels pictures.

    Attributes:
        model: In evaluation mode.
        labels: Of its outputs, each once.
        normal: Mean and standard deviation, (channels, 1, 1), that its pixels from 0 to 1 are normalized with; None
            where they are to run from -1 to 1.
    """

    model: ViTClassifier
    labels: tuple[str, ...]
    normal: tuple[Tensor, Tensor] | None = None

    def read(self, source: Source, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Return a picture of at most so many pixels as the model wants it, float32 (1, channels, height, width).

        Raises ValueError and FileNotFoundError as `load_digit`, for a model of 8 x 8 gray pixels, or `load_image`.
        """
        config = self.model.body.config
        height, width = config.image_size  # type: ignore[misc]  # kept as a pair
        if (height, width, config.n_channels) == (8, 8, 1):
            return load_digit(source, max_pixels)
        image = load_image(source, (height, width), config.n_channels, max_pixels)
        return image if self.normal is None else ((image + 1) / 2 - self.normal[0]) / self.normal[1]

    @torch.inference_mode()
    def shares(self, image: Tensor) -> dict[str, float]:
        """Return label -> probability for what `read` returns."""
        return dict(zip(self.labels, self.model(image)[0].softmax(dim=0).tolist(), strict=True))


def open_picture_classifier(name_or_path: str | os.PathLike[str] = PICTURES) -> PictureClassifier:
    """Return a classifier from a name or a folder that `load_vit` takes, with the labels in its configuration.

    Raises:
        ValueError: The name is unknown, the files are damaged or not those of a ViT with a head, or ask for a
            preparation that is not done here.
        FileNotFoundError: The folder lacks a file.
    """
    check_path("name_or_path", name_or_path)
    shipped = {path.parent.name: path.parent for path in CHECKPOINTS.glob(f"*/{OWN_VIT_CONFIG}")}
    folder = shipped.get(os.fspath(name_or_path), Path(name_or_path))
    # What its files say first: that is read at once.
    own = folder / OWN_VIT_CONFIG
    path = own if own.is_file() else folder / "config.json"
    labels = labels_of(read_json(path), path)
    model = load_vit(name_or_path, classifier=True)
    assert isinstance(model, ViTClassifier)
    n_channels = model.body.config.n_channels
    require("n_channels", n_channels, n_channels in (1, 3), "1 or 3, gray or colors")
    return PictureClassifier(model, labels, normal_of(folder / "preprocessor_config.json", n_channels))


def labels_of(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Return the labels in a configuration; one that stands there twice, as ImageNet's crane, gets its number."""
    named = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # what transformers does not write down
    places = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
    if not places or named.keys() != set(places):
        raise ValueError(f"{path}: id2label must name the labels, from 0 on")
    labels = [str(named[place]) for place in places]
    counts = Counter(labels)
    return tuple(f"{label} ({i})" if counts[label] > 1 else label for i, label in enumerate(labels))


def normal_of(path: Path, n_channels: int) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation from transformers' `preprocessor_config.json`, as in `PictureClassifier`.

    Raises ValueError if it holds what is not done here.
    """
    values = read_json(path)
    require(f"do_center_crop in {path}", True, not values.get("do_center_crop"), "false")
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1
    require(f"rescale_factor in {path}", factor, factor == 1 / 255, "1/255")
    found = []
    for name, plain in (("image_mean", 0.0), ("image_std", 1.0)):
        given = values.get(name, 0.5) if values.get("do_normalize", True) else plain
        try:
            numbers = torch.tensor(given, dtype=torch.float32).expand(n_channels)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} in {path} must be {n_channels} numbers, got {given!r}") from None
        require(f"{name} in {path}", given, name == "image_mean" or bool((numbers > 0).all()), "above 0")
        found.append(numbers[:, None, None])
    mean, deviation = found
    return None if bool((mean == 0.5).all() and (deviation == 0.5).all()) else (mean, deviation)


def picture_bytes(text: str) -> bytes:
    """Return what a base64 text or a `data:` URL holds; ValueError if it is neither. Line breaks may be in it."""
    begin = DATA_URL.match(text)
    try:
        return base64.b64decode("".join(text[begin.end() if begin else 0 :].split()), validate=True)
    except ValueError:
        raise ValueError("the picture must be base64, or a URL data:image/...;base64,...") from None


class PictureReader:
    """The pictures of requests.

    Args:
        name: Of the classifier, for clients.
        load: Loads it, when it is first asked.
        worker: Computes.
    """

    def __init__(self, name: str, load: Callable[[], PictureClassifier], worker: Worker) -> None:
        self.name, self._worker, self._n_open = name, worker, 0
        self._classifier = LoadedOnce(load)
        # One thread, so that only one picture at a time fills memory with its pixels; it has no helpers, see `serve`.
        self._decoder = ThreadPoolExecutor(1, "pictures", torch.set_num_threads, (1,))

    def stop(self) -> None:
        """Decode nothing more."""
        self._decoder.shutdown(wait=False, cancel_futures=True)

    async def classify(self, picture: str) -> dict[str, float]:
        """Return label -> probability for a picture in base64; computed between two steps.

        Raises ApiError: it is none, or has too many pixels (400); too many wait (429).
        """
        if self._n_open >= MOST_CALLS:
            self._worker.metrics.refused.inc()
            raise ApiError(
                429, "too many requests are waiting; come again later", headers={"Retry-After": "1"}
            )
        self._n_open += 1
        try:
            classifier = await self._classifier.get()

            def decode() -> Tensor:
                try:
                    return classifier.read(picture_bytes(picture), MOST_PIXELS)
                except ValueError as error:
                    message = str(error)
                except MemoryError:  # that is no fault of the picture's
                    raise
                except Exception:  # what a library did not foresee in a damaged file
                    log("a picture could not be prepared", logging.WARNING, exc_info=True)
                    message = "the picture cannot be prepared"
                raise ApiError(400, message, code="invalid_image", param="image")

            image = await asyncio.get_running_loop().run_in_executor(self._decoder, decode)
            return await self._worker.call(lambda: classifier.shares(image))
        finally:
            self._n_open -= 1
