"""A GPT with a classification head: no trace of padding, only the chosen part is trained, the best epoch is kept."""

import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from shared.finetuning.features import POOLINGS, lower_part, pad_inputs, token_states, upper_part
from shared.finetuning.tuning import (
    PARTS,
    GPTClassifier,
    fine_tune,
    label_batches,
    label_logits,
    learning_rate_groups,
    prompted_logits,
    set_trainable,
    summed_label_loss,
)
from shared.model.gpt import GPTConfig, GPTModel
from shared.weights.names import huggingface_views
from tests.configurations import LLAMA

SMALL = {"vocab_size": 20, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "dropout": 0.0}
ROWS = [[5, 9, 1], [7], [3, 4, 8, 2, 6, 11, 12], [9, 9]]


def classifier(pooling: str = "mean", n_labels: int = 2, **options: object) -> GPTClassifier:
    torch.manual_seed(0)
    found = GPTClassifier(GPTModel(GPTConfig(**{**SMALL, "init_std": 0.2, **options})), n_labels, pooling)
    nn.init.normal_(found.head.weight)
    return found.eval()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "options", [{}, LLAMA, {"positions": "sinusoidal"}], ids=["gpt2", "llama", "sinusoidal"]
)
@torch.no_grad()
def test_a_text_has_the_same_logits_alone_and_padded_on_either_side(pooling, options):
    model = classifier(pooling, **options)
    alone = torch.cat([model(pad_inputs([row])) for row in ROWS])
    tokens, mask = pad_inputs(ROWS)
    torch.testing.assert_close(model((tokens, mask)), alone, atol=1e-5, rtol=1e-5)
    shifts = (~mask).sum(1).tolist()
    left = [
        torch.stack([torch.roll(r, n) for r, n in zip(part, shifts, strict=True)]) for part in (tokens, mask)
    ]
    torch.testing.assert_close(model(tuple(left)), alone, atol=1e-5, rtol=1e-5)


def test_logits_equal_transformers_sequence_classifier():
    model = classifier("last", 3, qkv_bias=True)
    config = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=16, n_head=2, n_layer=2, num_labels=3, pad_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, layer_norm_epsilon=model.body.config.norm_eps,
    )  # fmt: skip
    theirs = GPT2ForSequenceClassification(config).eval()
    views = huggingface_views(model.body, "gpt2")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name != "score.weight":
                parameter.copy_(views[name])
        theirs.score.weight.copy_(model.head.weight)
        for row in ROWS[:3]:
            expected = theirs(torch.tensor([row])).logits
            torch.testing.assert_close(model(pad_inputs([row])), expected, atol=1e-4, rtol=1e-4)


def test_a_new_head_knows_nothing():
    new = GPTClassifier(GPTModel(GPTConfig(**SMALL)), 3)
    loss = F.cross_entropy(new(pad_inputs(ROWS)), torch.tensor([0, 1, 2, 0]))
    assert loss.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize(("n_labels", "pooling"), [(1, "mean"), (0, "mean"), (2, "max")])
def test_a_classifier_that_cannot_be(n_labels, pooling):
    with pytest.raises(ValueError, match=r"n_labels must be at least|pooling must be one of"):
        GPTClassifier(GPTModel(GPTConfig(**SMALL)), n_labels, pooling)


@pytest.mark.parametrize("part", PARTS)
def test_only_the_part_is_trained(part):
    model = classifier(tie_weights=True)
    n = set_trainable(model, part)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(learning_rate_groups(model, 1e-2, 1e-2))
    summed_label_loss(model, pad_inputs(ROWS), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert n == sum(p.numel() for p in model.parameters() if p.requires_grad)
    allowed = {
        "head": ("head.",),
        "last_block": ("head.", "body.blocks.1.", "body.final_norm"),
        "all": ("",),
    }[part]
    assert changed and all(name.startswith(allowed) for name in changed)
    assert part != "all" or "body.token_embedding.weight" in changed


def test_an_untied_output_head_is_never_trained():
    model = classifier(tie_weights=False)
    set_trainable(model, "all")
    assert not model.body.output_head.weight.requires_grad and model.body.token_embedding.weight.requires_grad
    with pytest.raises(ValueError, match="part must be one of head, last_block, all, got 'body'"):
        set_trainable(model, "body")


def test_each_block_learns_more_slowly_than_the_one_above():
    model = classifier()
    set_trainable(model, "all")
    groups = learning_rate_groups(model, 1e-3, 1e-2, decay=0.5)
    assert [group["lr"] for group in groups] == pytest.approx([1e-2, 1e-3, 1e-3, 5e-4, 2.5e-4])
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in model.parameters())
    for bad in ({"learning_rate": 0.0}, {"head_learning_rate": -1.0}, {"decay": 0.0}, {"decay": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be above 0"):
            learning_rate_groups(model, **{"learning_rate": 1e-3, "head_learning_rate": 1e-3, **bad})


def test_batches_hold_each_row_once_an_epoch():
    rows, targets = [[i + 1] * (1 + i % 5) for i in range(19)], list(range(19))
    stream = label_batches(rows, targets, 4, seed=3)
    epochs = [list(islice(stream, 5)) for _ in range(2)]
    for epoch in epochs:
        seen = torch.cat([found for _, found in epoch])
        assert sorted(seen.tolist()) == targets
        for (inputs, mask), found in epoch:
            assert inputs[:, 0].tolist() == [target + 1 for target in found.tolist()]
            assert mask.sum(1).tolist() == [len(rows[target]) for target in found.tolist()]
    assert [found.tolist() for _, found in epochs[0]] != [found.tolist() for _, found in epochs[1]]
    again = label_batches(rows, targets, 4, seed=3)
    assert torch.equal(next(again)[1], epochs[0][0][1])


@pytest.mark.parametrize(
    ("rows", "targets", "message"), [([], [], "rows"), ([[1]], [0, 1], "targets must be 1")]
)
def test_batches_that_cannot_be(rows, targets, message):
    with pytest.raises(ValueError, match=message):
        next(label_batches(rows, targets, 4))


# --- training


def task(n: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Does a row hold the token 3?"""
    rng = torch.Generator().manual_seed(seed)
    rows, targets = [], []
    for i in range(n):
        row = torch.randint(4, 20, (3 + i % 6,), generator=rng).tolist()
        if i % 2:
            row[i % len(row)] = 3
        rows.append(row)
        targets.append(i % 2)
    return rows, targets


def test_it_learns_and_keeps_the_best_epoch():
    model = classifier(init_std=0.05)
    nn.init.zeros_(model.head.weight)
    set_trainable(model, "all")
    (rows, targets), watched = task(400, 0), task(100, 1)
    log = fine_tune(model, rows, targets, watched, torch.optim.AdamW(model.parameters(), lr=1e-2), n_epochs=8)
    logits, expected = label_logits(model, watched[0]), torch.tensor(watched[1])
    assert (logits.argmax(1) == expected).float().mean() > 0.75
    assert F.cross_entropy(logits, expected).item() < 0.55 < log[0].loss


def test_another_loss_is_what_is_minimized():
    rows, targets = task(32, 0)
    found = []
    for wanted in (targets, [1 - target for target in targets]):
        torch.manual_seed(0)
        model = classifier()
        nn.init.zeros_(model.head.weight)
        set_trainable(model, "head")

        def loss(model, inputs, given, turned=wanted is not targets):
            return summed_label_loss(model, inputs, 1 - given if turned else given)

        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        options = {"n_epochs": 1, "batch_size": 32, "n_warmup": 0}
        fine_tune(model, rows, targets, (rows, wanted), optimizer, loss=loss, **options)
        found.append(model.head.weight.detach().clone())
    # One step from a head of zeros: with all labels turned it leads the other way.
    assert found[0].any()
    torch.testing.assert_close(found[0], -found[1])


def test_training_ends_when_nothing_improves_and_the_best_weights_are_back():
    model = classifier()
    nn.init.zeros_(model.head.weight)
    set_trainable(model, "head")
    rows, targets = task(32, 0)
    wrong = [1 - target for target in targets]  # the better it learns, the worse is the validation
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.5)
    log = fine_tune(model, rows, targets, (rows, wrong), optimizer, n_epochs=50, patience=3, n_warmup=0)
    assert 4 <= len(log) <= 3 * 2  # updates; the best was before the first
    assert not model.head.weight.any() and not model.head.bias.any()


@pytest.mark.parametrize("bad", [{"n_epochs": 0}, {"patience": 0}, {"batch_size": 0}])
def test_numbers_that_make_no_training(bad):
    model = classifier()
    rows, targets = task(8, 0)
    options = {"n_epochs": 1, **bad}
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least 1"):
        fine_tune(
            model, rows, targets, (rows, targets), torch.optim.SGD(model.parameters(), lr=0.1), **options
        )


@pytest.mark.parametrize(("place", "name"), [(0, "targets"), (1, "validation targets")])
def test_labels_that_the_head_does_not_have(place, name):
    model = classifier()
    rows, targets = task(8, 0)
    both = [targets, targets]
    both[place] = [*targets[:-1], 2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=rf"^{name} must be labels from 0 to 1, as the head has them, got \[2\]"
    ):
        fine_tune(model, rows, both[0], (rows, both[1]), optimizer, n_epochs=1)


@torch.no_grad()
def test_the_upper_part_on_cached_states_is_the_whole_classifier():
    model = classifier("last")
    whole = label_logits(model, ROWS)
    upper = GPTClassifier(upper_part(model.body, 1), 2, "last")
    upper.head = model.head
    states = dict(token_states(model.body, ROWS, 1))
    torch.testing.assert_close(
        label_logits(upper, [states[i] for i in range(4)]), whole, atol=1e-5, rtol=1e-5
    )
    assert lower_part(model.body, 1).blocks[0] is model.body.blocks[0]


# --- asking


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("prefix", [[], [3, 1, 4, 1, 5]])
@torch.no_grad()
def test_a_shared_prefix_is_read_once_and_changes_nothing(options, prefix):
    body = classifier(**options).body
    reads = []
    body.token_embedding.register_forward_hook(lambda module, inputs, output: reads.append(inputs[0].shape))
    found = prompted_logits(body, prefix, ROWS, [2, 7], batch_size=3)
    assert sum(shape == (1, len(prefix)) for shape in map(tuple, reads)) == (1 if prefix else 0)
    for row, logits in zip(ROWS, found, strict=True):
        expected = body(torch.tensor([[*prefix, *row]]))[0, -1, [2, 7]]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_questions_that_cannot_be_asked():
    body = classifier().body
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            prompted_logits(body, [1], rows, [2])
    with pytest.raises(ValueError, match="context_length"):
        prompted_logits(body, [1] * 10, [[2] * 10], [2])
