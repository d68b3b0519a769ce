"""A BERT with a classification head: padding, poolings, training, bad input."""

import pytest
import torch

from shared.finetuning.encoders import ENCODER_POOLINGS, BERTClassifier
from shared.finetuning.features import pad_inputs
from shared.finetuning.tuning import fine_tune, label_logits
from shared.model.bert import BERTConfig, BERTModel

CONFIG = BERTConfig(40, 16, 2, 32, 4, 2, dropout=0.0)


def classifier(pooling: str = "pooler") -> BERTClassifier:
    torch.manual_seed(0)
    model = BERTClassifier(BERTModel(CONFIG), 2, pooling)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("pooling", ENCODER_POOLINGS)
def test_a_row_alone_is_the_row_in_a_batch(pooling: str) -> None:
    model, rows = classifier(pooling).eval(), [[2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 8, 9, 3]]
    with torch.no_grad():
        together = model(pad_inputs(rows))
        alone = torch.cat([model(pad_inputs([row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(label_logits(model, rows), alone, atol=1e-5, rtol=1e-5)


def test_it_learns_what_only_both_ends_tell() -> None:
    """Label 1 where the first word is the last: no word alone says it."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.randint(5, 9, (600, 2), generator=generator)
    rows = [[2, a, 20, 21, b, 3] for a, b in ends.tolist()]
    targets = [int(a == b) for a, b in ends.tolist()]
    torch.manual_seed(0)
    model = BERTClassifier(BERTModel(CONFIG), 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    fine_tune(
        model, rows[:500], targets[:500], (rows[500:], targets[500:]), optimizer, n_epochs=12, patience=12
    )
    right = label_logits(model, rows[500:]).argmax(1) == torch.tensor(targets[500:])
    assert right.float().mean() > 0.9


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="n_labels must be at least 2"):
        BERTClassifier(BERTModel(CONFIG), 1)
    with pytest.raises(ValueError, match="pooling must be one of pooler, first, mean, got 'last'"):
        BERTClassifier(BERTModel(CONFIG), 2, "last")
    with pytest.raises(ValueError, match="got a row of zeros"):
        classifier()((torch.ones(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool)))
