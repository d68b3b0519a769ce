"""What the heads of a Vision Transformer look at: maps, distance, entropy, rollout, deletion."""

import math
from pathlib import Path

import pytest
import torch
from transformers import ViTModel as TheirModel

from shared.model.attention_maps import (
    attention_distance,
    attention_rollout,
    deletion_effects,
    image_attention,
    row_entropy,
)
from shared.model.vit import ViTClassifier, ViTConfig, ViTModel
from shared.weights.vit import save_vit

CONFIG = ViTConfig((8, 12), 4, 1, 24, 3, 2, init_std=0.3)


def test_maps_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViTModel(CONFIG).eval()
    save_vit(model, tmp_path / "theirs")
    theirs = TheirModel.from_pretrained(
        tmp_path / "theirs", add_pooling_layer=False, attn_implementation="eager"
    ).eval()
    images = torch.randn(3, 1, 8, 12)
    maps = image_attention(model, images)
    assert maps.shape == (2, 3, 3, 7, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 3, 7))
    with torch.no_grad():
        expected = torch.stack(theirs(images, output_attentions=True).attentions)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"model\.training must be False"):
        image_attention(model.train(), images)


def test_distance_by_hand() -> None:
    # Each of 2 x 2 patches looks at itself; at its neighbour to the side; at all four.
    own = torch.zeros(5, 5)
    own[1:, 1:] = torch.eye(4)
    beside = torch.zeros(5, 5)
    beside[1:, 1:] = torch.eye(4)[[1, 0, 3, 2]]
    even = torch.full((5, 5), 0.2)
    found = attention_distance(torch.stack([own, beside, even]), (2, 2))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, (1 + 1 + math.sqrt(2)) / 4]))
    with pytest.raises(ValueError, match="tokens must be 10 for a grid"):
        attention_distance(even, (3, 3))


def test_entropy_by_hand() -> None:
    maps = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(row_entropy(maps), torch.tensor([0.0, math.log(4)]))


def test_rollout_by_hand() -> None:
    # One block, one head: the class token takes 0.5, 0.3, 0.2; half of it is the shortcut.
    one = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = attention_rollout(one.expand(1, 1, 1, 3, 3))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.4]]))
    # Two blocks: below, patch 2 hands everything to patch 1.
    below = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    found = attention_rollout(torch.stack([below, one])[:, None, None])
    torch.testing.assert_close(found, torch.tensor([[0.15 / 2, 0.1 + 0.15 / 2]]) / 0.25)
    with pytest.raises(ValueError, match="maps must be"):
        attention_rollout(one)


def test_deletion_finds_the_patch_that_counts() -> None:
    class Corner(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([images[:, 0, :2, 2:4].sum((1, 2)), -images[:, 0, 2:4, :2].sum((1, 2))], dim=1)

    images, fill = torch.ones(2, 1, 4, 6), torch.zeros(1, 4, 6)
    found = deletion_effects(Corner(), images, torch.tensor([0, 1]), 2, fill)
    expected = torch.zeros(2, 6)
    expected[0, 1], expected[1, 3] = 4.0, -4.0
    assert torch.equal(found, expected)
    classifier = ViTClassifier(ViTModel(CONFIG).eval(), 3)
    assert deletion_effects(
        classifier, torch.randn(2, 1, 8, 12), torch.tensor([0, 1]), 4, torch.zeros(1, 8, 12)
    ).shape == (2, 6)
