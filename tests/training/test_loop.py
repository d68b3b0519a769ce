"""`shared.training.loop` against torch and transformers, and what must hold of its batches, losses and log."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from shared.model.gpt import GPTConfig, GPTModel
from shared.model.layers import balance_loss
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator, entropy
from shared.training.loop import (
    IGNORE,
    bits_per_byte,
    choose_device,
    document_row,
    evaluate,
    loss_per_document,
    next_token_loss,
    pad_rows,
    perplexity,
    row_batches,
    shuffled_rows,
    train,
)

ROWS = st.lists(st.lists(st.integers(0, 19), min_size=2, max_size=9), min_size=1, max_size=20)


def build(seed: int = 0, **options) -> GPTModel:
    shape = {"vocab_size": 20, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
    torch.manual_seed(seed)
    return GPTModel(GPTConfig(**{**shape, "dropout": 0.0, **options}))


def random_batch(rows: int = 4, tokens: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(20, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr)


class Uniform(nn.Module):
    """A model that knows nothing."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1)


# --- losses and their units


def test_loss_is_minus_the_log_of_the_target_s_probability():
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]]).log()
    targets = torch.tensor([[0, 2]])
    expected = torch.tensor([[math.log(2), math.log(8)]])
    torch.testing.assert_close(next_token_loss(logits, targets, reduction="none"), expected)
    assert next_token_loss(logits, targets).item() == pytest.approx(math.log(4))
    assert next_token_loss(logits, targets, reduction="sum").item() == pytest.approx(math.log(16))
    ignored = torch.tensor([[0, IGNORE]])
    assert next_token_loss(logits, ignored).item() == pytest.approx(math.log(2))
    assert next_token_loss(logits, targets, ignore_index=2).item() == pytest.approx(math.log(2))


def test_loss_and_gradients_equal_transformers():
    config = GPT2Config(
        vocab_size=20,
        n_positions=16,
        n_embd=8,
        n_head=2,
        n_layer=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(20, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 5:] = IGNORE
    theirs = model(ids, labels=labels).loss
    ours = next_token_loss(model(ids).logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(ours, theirs)
    weight = model.transformer.wte.weight
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in (ours, theirs)))


def test_low_precision_logits_are_summed_in_float32():
    logits = torch.randn(2, 3, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(2, 3, dtype=torch.int64)
    assert next_token_loss(logits, targets) == next_token_loss(logits.float(), targets)


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 5), (3, 3, 5)])
def test_loss_refuses_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="logits must be"):
        next_token_loss(torch.zeros(shape), torch.zeros(2, 3, dtype=torch.int64))


def test_units():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert bits_per_byte(math.log(256) * 10, 10) == pytest.approx(
        8
    )  # guessing evenly among bytes costs 8 bits
    with pytest.raises(ValueError, match="n_bytes must be at least 1, got 0"):
        bits_per_byte(1.0, 0)


# --- rows and batches


def test_document_row_of_a_story():
    encoding = tale_encoding()
    story = TaleGenerator(0).sample().text
    row = document_row(story, encoding)
    assert row[0] == row[-1] == encoding.eot_token
    assert encoding.decode(row[1:-1]) == story
    assert document_row("<|endoftext|>", encoding).count(encoding.eot_token) == 2  # a name is no token


@given(ROWS)
def test_padding_loses_nothing(rows):
    inputs, targets = pad_rows(rows)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (len(rows), max(map(len, rows)) - 1)
    for row, source, target in zip(rows, inputs.tolist(), targets.tolist(), strict=True):
        n = len(row) - 1
        assert source[:n] == row[:-1] and target[:n] == row[1:]
        assert set(target[n:]) <= {IGNORE}


@pytest.mark.parametrize("rows", [[], [[1]], [[1, 2], []]])
def test_padding_refuses_rows_without_a_target(rows):
    with pytest.raises(ValueError, match="rows must be"):
        pad_rows(rows)


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, batch_size=st.integers(1, 5), pool=st.integers(1, 4), seed=st.integers(0, 3))
def test_batches_hold_every_row_once(rows, batch_size, pool, seed):
    batches = list(row_batches(rows, batch_size, pool=pool, seed=seed))
    assert all(len(inputs) <= batch_size for inputs, _ in batches)
    assert len(batches) == math.ceil(len(rows) / batch_size)
    found = []
    for inputs, targets in batches:
        for source, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            n = sum(id != IGNORE for id in target)
            found.append([source[0], *target[:n]])
    assert sorted(found) == sorted(map(list, rows))
    again = list(row_batches(rows, batch_size, pool=pool, seed=seed))
    assert all(
        torch.equal(a, b)
        for one, two in zip(batches, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_batches_of_similar_length_hold_little_padding_and_read_a_stream_lazily():
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 100, (256,), generator=rng).tolist()
    rows = [[1] * length for length in lengths]
    share = lambda batches: (
        sum((t == IGNORE).sum().item() for _, t in batches) / sum(t.numel() for _, t in batches)
    )
    assert share(list(row_batches(rows, 16, pool=16))) < 0.3 * share(list(row_batches(rows, 16, pool=1)))
    endless = iter(lambda: [1, 2], None)
    assert next(row_batches(endless, 4))[0].shape == (4, 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        row_batches(rows, 0)


def test_shuffled_rows_are_a_new_permutation_in_each_epoch():
    rows = [[i] for i in range(50)]
    drawn = list(shuffled_rows(rows, seed=1, epochs=2))
    first, second = drawn[:50], drawn[50:]
    assert sorted(first) == sorted(second) == rows and first != second != rows
    assert list(shuffled_rows(rows, seed=1, epochs=2)) == drawn != list(shuffled_rows(rows, seed=2, epochs=2))
    assert list(shuffled_rows([])) == []


# --- evaluation


def test_guessing_evenly_costs_log_of_the_vocabulary():
    found = evaluate(Uniform(20), [random_batch(), random_batch(2, 5)])
    assert found.tokens == 4 * 8 + 2 * 5
    assert found.loss == pytest.approx(math.log(20)) and found.nats == pytest.approx(
        found.tokens * math.log(20)
    )


def test_evaluation_does_not_depend_on_batching_or_dropout_and_keeps_the_mode():
    model = build(dropout=0.5)
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 12], [3, 1]]
    whole = loss_per_document(model, rows, batch_size=4)
    assert model.training
    assert loss_per_document(model, rows, batch_size=1) == pytest.approx(whole, abs=1e-5)
    single = evaluate(model.eval(), [pad_rows(rows)])
    assert not model.training
    assert single.nats / 4 == pytest.approx(whole, abs=1e-5) and single.tokens == sum(map(len, rows)) - 4
    with pytest.raises(ValueError, match="no target"):
        evaluate(model, [])


def test_the_mode_is_restored_after_an_error():
    model = build().train()
    with pytest.raises(ValueError, match="tokens must be ids"):
        evaluate(model, [(torch.tensor([[99]]), torch.tensor([[1]]))])
    assert model.training


def test_bfloat16_evaluation_is_close():
    model = build()
    exact, rough = (
        evaluate(model, [random_batch()], autocast=dtype).loss for dtype in (None, torch.bfloat16)
    )
    assert exact != rough and rough == pytest.approx(exact, abs=0.02)


def test_floor_of_the_tales_is_below_an_untrained_model():
    encoding = tale_encoding()
    rows = [document_row(story.text, encoding) for story in TaleGenerator(1).stories(4)]
    torch.manual_seed(0)
    model = GPTModel(GPTConfig.preset("tales-1m", n_layers=1))
    assert loss_per_document(model, rows) > 10 * entropy()


@pytest.mark.parametrize(("value", "expected"), [("cpu", "cpu"), ("meta", "meta")])
def test_device_comes_from_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("LLM_DEVICE", value)
    assert choose_device().type == expected
    monkeypatch.delenv("LLM_DEVICE")
    assert choose_device().type in ("cpu", "cuda", "mps")


# --- the loop


def test_steps_equal_a_plain_loop_in_torch():
    # In float64: a key's bias has no effect, so its gradient is rounding noise, which Adam would blow up.
    ours, plain = build().double(), build().double()
    batches = [random_batch(seed=seed) for seed in range(6)]
    log = train(ours, batches, adamw(ours), n_steps=6, max_grad_norm=0.5)
    optimizer = adamw(plain)
    losses, norms = [], []
    for inputs, targets in batches:
        loss = F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item())
        optimizer.step()
        losses.append(loss.item())
    assert [record.loss for record in log[1:]] == pytest.approx(losses, abs=1e-9)
    assert [record.grad_norm for record in log[1:]] == pytest.approx(norms, abs=1e-9)
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-8, rtol=1e-6)


def test_log_and_evaluations():
    model, seen = build(dropout=0.1), []

    def on_evaluate(step: int) -> float:
        seen.append((step, model.training))
        return float(step)

    log = train(model, [random_batch()], adamw(model), n_steps=5, evaluate_every=2, on_evaluate=on_evaluate)
    assert seen == [(0, False), (2, False), (4, False), (5, False)] and model.training
    assert [record.step for record in log] == list(range(6))
    assert [record.tokens for record in log] == [32 * step for step in range(6)]
    assert [record.validation_loss for record in log] == [0.0, None, 2.0, None, 4.0, 5.0]
    assert log[0].loss is None and log[0].grad_norm is None
    assert all(record.learning_rate == 1e-2 for record in log[1:])


def test_training_learns():
    model, batch = build(), random_batch()
    log = train(model.eval(), [batch], adamw(model), n_steps=60)
    assert not model.training
    assert log[1].loss > 2.5 > 0.5 > log[-1].loss


def test_accumulated_batches_equal_one_large_batch_whatever_their_sizes():
    rows = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [3, 4, 5], [1, 2, 9, 9], [2, 2]]
    one, several = build().double(), build().double()
    train(one, [pad_rows(rows)], torch.optim.SGD(one.parameters(), lr=0.1), n_steps=3)
    parts = [pad_rows(rows[:1]), pad_rows(rows[1:4]), pad_rows(rows[4:])]
    train(several, parts, torch.optim.SGD(several.parameters(), lr=0.1), n_steps=3, accumulation=3)
    for a, b in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_several_optimizers_and_a_schedule():
    model = build()
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.SGD(matrices, lr=0.5), torch.optim.AdamW(others, lr=0.01)]
    before = copy.deepcopy(model.state_dict())
    log = train(model, [random_batch()], optimizers, n_steps=4, schedule=lambda k: 1 / (k + 1))
    assert [record.learning_rate for record in log[1:]] == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([0.125, 0.0025])
    # Both optimizers worked: every parameter moved.
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_run_in_two_parts_equals_one_run():
    batches = [random_batch(seed=seed) for seed in range(8)]
    schedule = lambda k: 1 - k / 8
    whole, parts = build(), build()
    expected = train(whole, batches, adamw(whole), n_steps=8, schedule=schedule)
    optimizer = adamw(parts)
    train(parts, batches[:5], optimizer, n_steps=5, schedule=schedule)
    log = train(parts, batches[5:], optimizer, n_steps=8, start_step=5, schedule=schedule)
    assert [(r.step, r.loss, r.learning_rate) for r in log[1:]] == [
        (r.step, r.loss, r.learning_rate) for r in expected[6:]
    ]


def test_clipping_bounds_the_step_and_none_does_not():
    moves = []
    for limit in (1e-3, None):
        model = build()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        train(
            model,
            [random_batch()],
            torch.optim.SGD(model.parameters(), lr=1.0),
            n_steps=1,
            max_grad_norm=limit,
        )
        moves.append((nn.utils.parameters_to_vector(model.parameters()) - before).norm().item())
    assert moves[0] == pytest.approx(1e-3, rel=1e-2) and moves[1] > 0.1


def test_bfloat16_keeps_float32_weights_and_is_close():
    finals = []
    for dtype in (None, torch.bfloat16):
        model = build()
        finals.append(train(model, [random_batch()], adamw(model), n_steps=20, autocast=dtype)[-1].loss)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert finals[0] != finals[1] and finals[0] == pytest.approx(finals[1], abs=0.1)


def test_auxiliary_loss_trains_but_is_not_logged():
    options = {"feed_forward": "moe", "n_experts": 4, "n_active_experts": 1}
    plain, balanced = build(**options), build(**options)
    sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
    first = train(plain, [random_batch()], sgd(plain), n_steps=1)
    log = train(balanced, [random_batch()], sgd(balanced), n_steps=1, auxiliary_loss=balance_loss)
    assert log[1].loss == first[1].loss
    routers = [model.blocks[0].feed_forward.router.weight for model in (plain, balanced)]
    assert not torch.equal(*routers)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model = build()
    with torch.no_grad():
        model.final_norm.weight[0] = math.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan, gradient norm nan"):
        train(model.eval(), [random_batch()], adamw(model), n_steps=1)
    assert not model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, atol=0, rtol=0)


def test_an_exploding_run_stops():
    model = build()
    with pytest.raises(FloatingPointError, match=r"step \d+: loss"):
        train(
            model,
            [random_batch()],
            torch.optim.SGD(model.parameters(), lr=1e6),
            n_steps=50,
            max_grad_norm=None,
        )


def test_batches_that_end_or_hold_nothing():
    model = build()
    with pytest.raises(ValueError, match="batches ended before the last step"):
        train(model, iter([random_batch()]), adamw(model), n_steps=2)
    inputs, targets = random_batch()
    with pytest.raises(ValueError, match="batches of step 1 hold no target"):
        train(model, [(inputs, torch.full_like(targets, IGNORE))], adamw(model), n_steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps must be above start_step=0, got 0"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or None, got 0.0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, or None, got 0"),
        ({"autocast": torch.float16}, "autocast must be torch.bfloat16 or None, got torch.float16"),
    ],
)
def test_arguments_out_of_range(options, message):
    model = build()
    with pytest.raises(ValueError) as caught:
        train(model, [random_batch()], adamw(model), **{"n_steps": 1, **options})
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="optimizers must be at least one"):
        train(model, [random_batch()], [], n_steps=1)
