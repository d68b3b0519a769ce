"""CLIP's loss against transformers', the learned factor and its limits, twins in a batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from shared.finetuning.contrastive import LogitScale, contrastive_loss, pair_logits


def test_the_factor_starts_at_ln_of_one_over_0_07_and_is_at_most_100() -> None:
    scale = LogitScale()
    assert scale.log_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert scale().item() == pytest.approx(1 / 0.07)
    for value, expected in ((50.0, 100.0), (math.log(99.0), 99.0), (0.0, 1.0)):
        scale.log_scale.data.fill_(value)
        assert scale().item() == pytest.approx(expected, rel=1e-5)


def test_cosines() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 7), torch.randn(5, 7)
    expected = F.cosine_similarity(first[:, None], second[None], dim=-1)
    torch.testing.assert_close(pair_logits(5 * first, second), expected)
    torch.testing.assert_close(pair_logits(first, second, 14.3), 14.3 * expected)


def test_the_loss_is_transformers_loss() -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, 6, requires_grad=True)
    loss, expected = contrastive_loss(logits), image_text_contrastive_loss(logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0])
    torch.testing.assert_close(contrastive_loss(torch.zeros(64, 64)), torch.tensor(math.log(64)))


def test_twins_do_not_count_as_wrong() -> None:
    labels = torch.tensor([3, 1, 3, 2])
    same = labels[:, None] == labels
    perfect = 100.0 * same.float()
    assert contrastive_loss(perfect, same).item() < 1e-6
    assert contrastive_loss(perfect).item() == pytest.approx(0.5 * math.log(2), rel=1e-5)
    logits = torch.randn(4, 4)
    torch.testing.assert_close(
        contrastive_loss(logits, torch.eye(4, dtype=torch.bool)), contrastive_loss(logits)
    )


def test_bad_input() -> None:
    for shape in ((0, 0), (3, 2)):
        with pytest.raises(ValueError, match="logits must be square, of at least one pair"):
            contrastive_loss(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"same must be \(3, 3\), got \(2, 2\)"):
        contrastive_loss(torch.zeros(3, 3), torch.eye(2, dtype=torch.bool))


def test_identical_pairs_stay_at_ln_2_unless_they_are_said_to_be_the_same():
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for scale in (1.0, 20.0, 1000.0):
        logits = pair_logits(twins, twins, scale)
        torch.testing.assert_close(contrastive_loss(logits), torch.tensor(math.log(2)))
        assert contrastive_loss(logits, torch.ones(2, 2, dtype=torch.bool)).item() == 0


def test_accumulated_batches_are_not_one_large_batch():
    torch.manual_seed(0)
    first, second = torch.randn(8, 5), torch.randn(8, 5)
    whole = contrastive_loss(pair_logits(first, second, 20))
    halves = [
        contrastive_loss(pair_logits(first[part], second[part], 20)) for part in (slice(4), slice(4, 8))
    ]
    # Each row has more to be mistaken for in the large batch.
    assert whole > sum(halves) / 2 + 0.1
