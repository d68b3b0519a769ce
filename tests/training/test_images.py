"""Turning, scaling and shifting images; batches of them; a classifier's logits."""

from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from shared.training.images import augment_images, image_batches, image_logits, image_loss, move_images


def dot(down: int, right: int, shape: tuple[int, int] = (8, 8)) -> Tensor:
    image = torch.full((1, 1, *shape), -1.0)
    image[0, 0, down, right] = 1.0
    return image


def moved(
    image: Tensor, angle: float = 0.0, scale: float = 1.0, shift: tuple[float, float] = (0, 0)
) -> Tensor:
    return move_images(
        image, torch.tensor([angle]), torch.tensor([scale]), torch.tensor([shift], dtype=torch.float32)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (2, 3)),
        ({"shift": (1, -2)}, (3, 1)),
        ({"angle": 90.0}, (4, 2)),
        ({"angle": 180.0}, (5, 4)),
        ({"angle": 90.0, "shift": (0, 3)}, (4, 5)),
    ],
)
def test_a_dot_goes_where_it_should(options: dict, expected: tuple[int, int]) -> None:
    torch.testing.assert_close(moved(dot(2, 3), **options), dot(*expected), atol=1e-5, rtol=0)


def test_images_that_are_wider_than_high() -> None:
    torch.testing.assert_close(moved(dot(1, 2, (6, 10)), 180.0), dot(4, 7, (6, 10)), atol=1e-5, rtol=0)
    turned = moved(
        dot(2, 4, (6, 10)), 90.0
    )  # half a pixel up and left of the middle: half a pixel down and left
    torch.testing.assert_close(turned, dot(3, 4, (6, 10)), atol=1e-5, rtol=0)


def test_scaling_keeps_the_middle_and_what_comes_in_is_paper() -> None:
    square = torch.full((1, 1, 8, 8), -1.0)
    square[0, 0, 3:5, 3:5] = 1.0
    larger = moved(square, scale=2.0)
    assert larger[0, 0, 2, 2] > -1 and larger.mean() > square.mean()
    assert moved(square, shift=(20, 0)).unique().tolist() == [-1.0]


def test_augmentation_stays_within_its_limits() -> None:
    images, generator = torch.rand(50, 1, 8, 8), torch.Generator().manual_seed(0)
    same = augment_images(images, generator, max_angle=0.0, max_scale=0.0, max_shift=0.0)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    again = [augment_images(images, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again) and not torch.equal(again[0], images)
    for options in ({"max_angle": -1.0}, {"max_scale": 1.0}, {"max_shift": -0.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            augment_images(images, generator, **options)


def test_batches_hold_each_image_once_in_an_epoch() -> None:
    images, labels = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 2, 2), torch.arange(10)
    source = image_batches(images, labels, 4, augment=False, seed=1)
    epochs = [torch.cat([part[1] for part in islice(source, 3)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    x, y = next(source)
    assert torch.equal(x[:, 0, 0, 0].long(), y)
    with pytest.raises(ValueError, match="images must be at least one"):
        next(image_batches(images[:0], labels[:0], 4))
    with pytest.raises(ValueError, match="labels must be 10, one for each image"):
        next(image_batches(images, labels[:9], 4))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(image_batches(images, labels, 0))


def test_logits_and_loss() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    images, labels = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    logits = image_logits(model, images, batch_size=2)
    assert model.training and torch.allclose(logits, model[2](images.flatten(1)))
    model.eval()
    expected = -logits.log_softmax(1)[torch.arange(5), labels].sum()
    torch.testing.assert_close(image_loss(model, images, labels), expected)
