"""The Vision Transformer against torch's convolution and transformers' ViT; other grids of patches; bad input."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification
from transformers import ViTModel as TheirModel

from shared.finetuning.lora import attach_lora, detach_lora
from shared.model.vit import (
    VIT_PRESETS,
    PatchEmbedding,
    ViTClassifier,
    ViTConfig,
    ViTModel,
    image_patches,
    interpolate_positions,
)
from shared.weights.vit import save_vit

SMALL = {"image_size": (12, 8), "patch_size": 4, "n_channels": 3, "emb_dim": 24, "n_heads": 3, "n_layers": 2}


def in_transformers(model: ViTModel | ViTClassifier, folder: Path) -> nn.Module:
    """The same weights in transformers' model."""
    save_vit(model, folder)
    kind = TheirModel if isinstance(model, ViTModel) else ViTForImageClassification
    options = {"add_pooling_layer": False} if isinstance(model, ViTModel) else {}
    return kind.from_pretrained(folder, **options).eval()


def random_model(config: ViTConfig) -> ViTModel:
    torch.manual_seed(1)
    model = ViTModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("channels", "height", "width", "size"), [(1, 8, 8, 2), (3, 12, 8, 4), (2, 5, 10, 5), (1, 3, 4, 1)]
)
def test_patches_are_what_a_strided_convolution_sees(
    channels: int, height: int, width: int, size: int
) -> None:
    torch.manual_seed(0)
    images, embedding = torch.randn(2, channels, height, width), PatchEmbedding(size, channels, 7)
    convolution = nn.Conv2d(channels, 7, size, stride=size)
    convolution.load_state_dict(
        {
            "weight": embedding.projection.weight.view(7, channels, size, size),
            "bias": embedding.projection.bias,
        }
    )
    expected = convolution(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(images), expected, atol=1e-5, rtol=1e-5)
    unfolded = nn.functional.unfold(images, size, stride=size).transpose(1, 2)
    assert torch.equal(image_patches(images, size), unfolded)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_equal_to_transformers_with_copied_weights(activation: str, qkv_bias: bool, tmp_path: Path) -> None:
    config = ViTConfig(**SMALL, feed_forward_dim=50, activation=activation, qkv_bias=qkv_bias)
    ours = random_model(config)
    theirs = in_transformers(ours, tmp_path / "theirs")
    images = torch.randn(3, 3, 12, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images)[0], atol=2e-5, rtol=1e-4)


def test_gradients_and_logits_are_transformers(tmp_path: Path) -> None:
    config = ViTConfig(**SMALL)
    ours = ViTClassifier(random_model(config), 5)
    nn.init.normal_(ours.head.weight)
    theirs = in_transformers(ours, tmp_path / "theirs")
    images, labels = torch.randn(4, 3, 12, 8), torch.tensor([0, 4, 2, 2])
    logits = ours(images)
    expected = theirs(images, labels=labels)
    torch.testing.assert_close(logits, expected.logits, atol=2e-5, rtol=1e-4)
    nn.functional.cross_entropy(logits, labels).backward()
    expected.loss.backward()
    torch.testing.assert_close(
        ours.body.positions.grad[None], theirs.vit.embeddings.position_embeddings.grad, atol=1e-5, rtol=1e-3
    )


def test_other_grids_equal_transformers(tmp_path: Path) -> None:
    config = ViTConfig(**{**SMALL, "image_size": 12})
    ours = random_model(config)
    theirs = in_transformers(ours, tmp_path / "theirs")
    for height, width in ((12, 12), (24, 12), (8, 20), (4, 36)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = theirs(images, interpolate_pos_encoding=True)[0]
            torch.testing.assert_close(ours(images, interpolate=True), expected, atol=5e-5, rtol=1e-4)


def test_the_grid_of_a_model_may_have_a_height_unlike_its_width() -> None:
    model = random_model(ViTConfig(**SMALL))
    assert model.config.grid == (3, 2)
    positions = model.positions.detach()
    assert interpolate_positions(positions, (3, 2), (3, 2)) is positions  # the same size: unchanged
    stretched = interpolate_positions(positions, (3, 2), (6, 5))
    assert stretched.shape == (1 + 30, 24) and torch.equal(stretched[0], positions[0])
    # A ramp stays a ramp: rows differ by what they did, whatever becomes of the columns.
    ramp = torch.cat([torch.zeros(1, 1), torch.arange(6.0).repeat_interleave(4)[:, None]])  # 6 rows of 4
    back = interpolate_positions(ramp, (6, 4), (6, 9))[1:].view(6, 9)
    torch.testing.assert_close(back, torch.arange(6.0)[:, None].expand(6, 9), atol=1e-5, rtol=0)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 20, 8), interpolate=True).shape == (1, 1 + 5 * 2, 24)
    with pytest.raises(ValueError, match=r"positions must be those of a grid of \(4, 4\), got 7"):
        interpolate_positions(positions, (4, 4), (2, 2))


def test_patches_without_positions_are_a_bag() -> None:
    model = random_model(ViTConfig(**{**SMALL, "image_size": 8}))
    model.positions.data.zero_()
    images = torch.randn(1, 3, 8, 8)
    turned = torch.roll(images, 4, dims=3)  # patches change places
    torch.testing.assert_close(model(images)[:, 0], model(turned)[:, 0], atol=1e-4, rtol=1e-4)


def test_lora_attaches_to_a_vision_transformer() -> None:
    classifier = ViTClassifier(random_model(ViTConfig(**SMALL)), 3)
    images = torch.randn(2, 3, 12, 8)
    before = classifier.features(images).detach()
    counts = attach_lora(classifier.body, ("query", "value"), rank=2)
    assert counts.layers == 2 and counts.trained == 2 * 2 * (2 * 24 + 2 * 24)
    torch.testing.assert_close(classifier.features(images), before)
    assert classifier.head.weight.requires_grad and not classifier.body.positions.requires_grad
    detach_lora(classifier.body)
    assert classifier.body.positions.requires_grad


def test_pooling() -> None:
    body, images = random_model(ViTConfig(**SMALL)), torch.randn(2, 3, 12, 8)
    hidden = body(images)
    torch.testing.assert_close(ViTClassifier(body, 2).features(images), hidden[:, 0])
    torch.testing.assert_close(ViTClassifier(body, 2, "mean").features(images), hidden[:, 1:].mean(1))
    assert ViTClassifier(body, 2)(images).abs().max() == 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 12), r"height and width must be \(12, 8\), got \(8, 12\)"),
        (
            (2, 1, 12, 8),
            r"images must be \(batch, 3, height, width\), at least one image, got \(2, 1, 12, 8\)",
        ),
        ((0, 3, 12, 8), "at least one image"),
        ((3, 12, 8), "images must be"),
    ],
)
def test_bad_images(shape: tuple[int, ...], message: str) -> None:
    model = ViTModel(ViTConfig(**SMALL))
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))
    with pytest.raises(TypeError, match="images must be float"):
        model(torch.zeros(1, 3, 12, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiples of patch_size=4, got"):
        model(torch.zeros(1, 3, 10, 8), interpolate=True)
    with pytest.raises(ValueError, match="multiples of patch_size=4, got"):
        model(torch.zeros(1, 3, 0, 8), interpolate=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, r"image_size must be multiples of patch_size=5, got \(12, 8\)"),
        ({"image_size": (1, 2, 3)}, "one number, or height and width"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"emb_dim": 25}, "a multiple of n_heads=3"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"norm_eps": 0.0}, "norm_eps must be"),
        ({"init_std": 0.0}, "init_std must be"),
        ({"feed_forward_dim": 0}, "feed_forward_dim must be at least 1"),
    ],
)
def test_bad_configurations(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**{**SMALL, **change})


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="height and width must be multiples of 3"):
        image_patches(torch.zeros(1, 1, 8, 9), 3)
    with pytest.raises(ValueError, match="images must be"):
        image_patches(torch.zeros(8, 8), 2)
    with pytest.raises(TypeError, match="image_size must be an int"):
        ViTConfig(image_size=8.0)
    body = ViTModel(ViTConfig(**SMALL))
    with pytest.raises(ValueError, match="n_labels must be at least 2"):
        ViTClassifier(body, 1)
    with pytest.raises(ValueError, match="pooling must be one of class, mean"):
        ViTClassifier(body, 2, "max")
    with pytest.raises(ValueError, match="name must be one of"):
        ViTConfig.preset("vit-small")
    for name in VIT_PRESETS:
        assert ViTConfig.preset(name).n_patches in (196, 16)
