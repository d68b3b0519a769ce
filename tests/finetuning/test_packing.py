"""Packing: every conversation once, in rows that are filled, and none that sees another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.finetuning.instruction import chat_batch, tune
from shared.finetuning.packing import pack, packed_batch, packed_batches, packed_logits, packed_loss
from shared.model.gpt import GPTConfig, GPTModel
from shared.training.batches import IGNORE
from shared.training.loop import summed_next_token_loss
from tests.configurations import LLAMA

SMALL = {"vocab_size": 30, "context_length": 12, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "dropout": 0.0}
A = ([4, 7, 9, 2], [IGNORE, 7, 9, 2])
B = ([5, 11, 3, 8, 6, 2], [IGNORE, IGNORE, IGNORE, 8, 6, 2])
C = ([12, 2], [IGNORE, 2])


def model(**options: object) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**{**SMALL, "init_std": 0.3, **options})).eval()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_place_stands_in_one_row_and_rows_are_not_too_long(lengths):
    rows = pack(lengths, 20)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    sums = [sum(lengths[place] for place in row) for row in rows]
    assert all(0 < total <= 20 for total in sums)
    # At most one row is less than half full: two such rows would have been one.
    assert sum(total <= 10 for total in sums) <= 1
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 20) + 1 or max(lengths) > 6


def test_the_place_where_a_conversation_fits_best_is_found():
    assert pack([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert pack([], 10) == []


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_lengths_that_do_not_fit_are_named(lengths):
    with pytest.raises(ValueError, match=r"lengths\[1\] must be at (most row_length=10|least 1)"):
        pack(lengths, 10)


def test_positions_start_anew_and_no_target_crosses_a_border():
    batch, targets = packed_batch([[A, B], [C]])
    assert batch["tokens"].tolist() == [[4, 7, 9, 5, 11, 3, 8, 6], [12, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["positions"].tolist()[0] == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch["documents"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0] + [-1] * 7]
    # A's last token predicts A's end, and nothing predicts B's first.
    assert targets.tolist()[0] == [7, 9, 2, IGNORE, IGNORE, 8, 6, 2]
    assert targets.tolist()[1] == [2] + [IGNORE] * 7
    for rows in ([], [[]], [[([1], [1])]]):
        with pytest.raises(ValueError, match="must be"):
            packed_batch(rows)


@pytest.mark.parametrize(
    "options",
    [
        LLAMA,
        {},
        {"positions": "sinusoidal"},
        {**LLAMA, "n_kv_heads": 1},
        {**LLAMA, "window": 3},
        {"pre_norm": False},
    ],
    ids=["rotary", "learned", "sinusoidal", "grouped", "window", "post-norm"],
)
@torch.no_grad()
def test_logits_of_a_packed_conversation_are_those_of_it_alone(options):
    network = model(**options)
    rows = [[A, B, C], [B, B]]
    batch, targets = packed_batch(rows)
    logits = packed_logits(network, **batch)
    for number, row in enumerate(rows):
        for document, example in enumerate(row):
            own = batch["documents"][number] == document
            inputs, alone = chat_batch([example])
            torch.testing.assert_close(logits[number][own], network(inputs)[0], atol=1e-4, rtol=1e-4)
            assert torch.equal(targets[number][own], alone[0])


@torch.no_grad()
def test_without_mask_or_positions_they_would_differ():
    network = model(**LLAMA)
    batch, _ = packed_batch([[A, B]])
    right = packed_logits(network, **batch)[0, 3:]
    seen = packed_logits(network, batch["tokens"], batch["positions"], torch.zeros_like(batch["documents"]))
    assert (seen[0, 3:] - right).abs().max() > 0.01
    learned = model()
    right = packed_logits(learned, **batch)[0, 3:]
    counted = packed_logits(learned, batch["tokens"], torch.arange(8)[None], batch["documents"])
    assert (counted[0, 3:] - right).abs().max() > 0.01


def test_the_loss_and_its_gradient_are_those_of_the_padded_batch():
    network = model(**LLAMA)
    gradients = []
    for loss, (inputs, targets) in (
        (summed_next_token_loss, chat_batch([A, B, C])),
        (packed_loss, packed_batch([[A, C], [B]])),
    ):
        network.zero_grad()
        loss(network, inputs, targets).backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)


def test_a_row_may_be_longer_than_the_context():
    network = model()
    batch, _ = packed_batch([[B, B, B]])
    assert batch["tokens"].shape[1] == 15 > network.config.context_length
    assert packed_logits(network, **batch).isfinite().all()


def test_packed_batches_hold_every_example_once_an_epoch_and_train():
    examples = [([i % 28 + 1] * (2 + i % 5), [i % 28 + 1] * (2 + i % 5)) for i in range(40)]
    batches = list(packed_batches(examples, 12, 3, seed=1, epochs=2, pool=16))
    starts = [
        int(t)
        for batch, _ in batches
        for t in batch["tokens"][(batch["positions"] == 0) & (batch["documents"] >= 0)]
    ]
    assert sorted(starts) == sorted(ids[0] for ids, _ in examples * 2)
    assert all(batch["tokens"].shape[0] <= 3 and batch["tokens"].shape[1] <= 12 for batch, _ in batches)
    log = tune(
        model(**LLAMA), packed_batches(examples, 12, 3), n_steps=20, learning_rate=1e-2, loss=packed_loss
    )
    assert log[-1].loss < log[1].loss
    with pytest.raises(ValueError, match="examples must be at least one"):
        next(packed_batches([], 12, 3))
    with pytest.raises(ValueError, match="at most row_length=4"):
        next(packed_batches(examples, 4, 3))
