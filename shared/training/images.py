"""Images for training: turned, scaled and shifted, in batches without end; a classifier's loss and logits
for `shared.training.loop.train`.

Images are float, -1 to 1. Left out: flips (a mirrored 3 is no digit), colors, cuts, and mixtures of
images.

Follows Jaderberg et al. (2015, "Spatial Transformer Networks") for asking of each pixel where it comes
from.

Explained and proven in appendix_vit_bert/03_vit.ipynb; written from there by `make promote`.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import check_between, require, whole_number


def move_images(
    images: Tensor, angles: Tensor, scales: Tensor, shifts: Tensor, background: float = -1.0
) -> Tensor:
    """Turn, scale and shift each image of a batch.

    Args:
        images: Float (batch, channels, height, width).
        angles: (batch,) in degrees, counter-clockwise as one sees it.
        scales: (batch,), above 1 makes what is drawn larger.
        shifts: (batch, 2) in pixels, down and to the right.
        background: What comes in from outside.

    Returns:
        Images of the same shape; between pixels the values are interpolated.
    """
    height, width = images.shape[2:]
    radians = angles * (math.pi / 180)
    cos, sin = radians.cos() / scales, radians.sin() / scales
    # For each pixel of the result: where in the source does it come from? In pixels from the middle, (right, down).
    down, right = shifts[:, 0], shifts[:, 1]
    there = torch.stack([-cos * right + sin * down, -sin * right - cos * down], dim=1)
    matrix = torch.stack([cos, -sin, there[:, 0], sin, cos, there[:, 1]], dim=1).view(-1, 2, 3)
    # affine_grid counts in halves of the image.
    half = torch.tensor([width / 2, height / 2])
    matrix[:, :, :2] = matrix[:, :, :2] * half[None, None, :] / half[None, :, None]
    matrix[:, :, 2] = matrix[:, :, 2] / half
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


def augment_images(
    images: Tensor,
    generator: torch.Generator,
    *,
    max_angle: float = 12.0,
    max_scale: float = 0.1,
    max_shift: float = 0.5,
) -> Tensor:
    """Return each image a little turned, scaled and shifted, by amounts drawn evenly.

    Args:
        images: Float (batch, channels, height, width).
        generator: Of the random numbers.
        max_angle: In degrees, to both sides.
        max_scale: The scale is between 1 - max_scale and 1 + max_scale.
        max_shift: In pixels, to all sides.

    Raises:
        ValueError: A limit is out of range.
    """
    check_between("max_angle", max_angle, 0.0, 180.0)
    check_between("max_scale", max_scale, 0.0, 0.9)
    require("max_shift", max_shift, 0 <= max_shift < math.inf, "at least 0")
    draws = 2 * torch.rand(4, len(images), generator=generator) - 1
    return move_images(images, max_angle * draws[0], 1 + max_scale * draws[1], max_shift * draws[2:].T)


def image_batches(
    images: Tensor, labels: Tensor, batch_size: int, *, augment: bool = True, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) without end, in a new order in each epoch, augmented anew each time.

    Raises ValueError if there is no image, or the numbers of images and labels differ.
    """
    require("images", len(images), len(images) > 0, "at least one")
    require("labels", len(labels), len(labels) == len(images), f"{len(images)}, one for each image")
    whole_number("batch_size", batch_size)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for places in torch.randperm(len(images), generator=generator).split(batch_size):
            batch = images[places]
            yield augment_images(batch, generator) if augment else batch, labels[places]


def image_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of -log p(label) in nats: the loss of `train` for a classifier of images."""
    return F.cross_entropy(model(images), labels, reduction="sum")


@torch.no_grad()
def image_logits(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return the logits (images, labels) of a classifier, computed in evaluation mode, batch by batch."""
    training = model.training
    model.eval()
    try:
        return torch.cat([model(part) for part in images.split(batch_size)])
    finally:
        model.train(training)
