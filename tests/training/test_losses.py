"""`shared.training.losses` against transformers; what must hold of evaluation and the choice of a device."""

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator, entropy
from shared.training.batches import IGNORE, document_row, pad_rows
from shared.training.losses import (
    bits_per_byte,
    choose_device,
    evaluate,
    loss_per_document,
    next_token_loss,
    on_device,
    own_modes,
    perplexity,
)
from tests.training.small import build, random_batch


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
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_head=2, n_layer=1, bos_token_id=None,
                   eos_token_id=None)
    ).eval()  # fmt: skip
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


# --- evaluation


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(709.7, math.exp(709.7)), (2079.8, math.inf), (math.inf, math.inf), (-math.inf, 0.0)],
)
def test_the_perplexity_of_a_hopeless_loss_is_infinite(loss, expected):
    assert perplexity(loss) == expected


def test_the_perplexity_of_nan_is_nan():
    assert math.isnan(perplexity(math.nan))


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


@pytest.mark.parametrize("ids", [3, 99])
def test_each_module_gets_its_own_mode_back_also_after_an_error(ids):
    model = build(n_layers=2, dropout=0.5)
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    batch = [(torch.full((1, 4), ids), torch.ones(1, 4, dtype=torch.int64))]
    if ids < model.config.vocab_size:
        evaluate(model, batch)
    else:
        with pytest.raises(ValueError, match="tokens must be ids"):
            evaluate(model, batch)
    assert [module.training for module in model.modules()] == before and {*before} == {True, False}


def test_own_modes_undoes_what_happens_inside():
    model = build(n_layers=2)
    model.final_norm.eval()
    before = [module.training for module in model.modules()]
    with own_modes(model):
        model.eval()
        model.blocks.train()
    assert [module.training for module in model.modules()] == before


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


@pytest.fixture
def machine(monkeypatch):
    """Return a function that gives the machine this many CUDA devices and an mps device or none."""

    def equip(cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return equip


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "expected"),
    [
        (0, False, "cpu", "cpu"),
        (2, True, "cpu", "cpu"),
        (2, False, "cuda", "cuda"),
        (2, False, "cuda:1", "cuda:1"),
        (0, True, "mps", "mps"),
        (2, True, "auto", "cuda"),
        (0, True, "auto", "mps"),
        (0, False, "auto", "cpu"),
        (0, False, "", "cpu"),
    ],
)
def test_device_comes_from_the_environment(monkeypatch, machine, cuda, mps, name, expected):
    machine(cuda, mps)
    monkeypatch.setenv("LLM_DEVICE", name)
    assert choose_device() == torch.device(expected)
    monkeypatch.delenv("LLM_DEVICE")
    assert choose_device().type == ("cuda" if cuda else "mps" if mps else "cpu")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", "cuda:", "cuda:-1", "CPU"])
def test_a_device_that_torch_cannot_train_on_is_refused(monkeypatch, name):
    monkeypatch.setenv("LLM_DEVICE", name)
    with pytest.raises(
        ValueError, match=f"^LLM_DEVICE must be auto, cpu, mps, cuda or cuda:N, got '{name}'$"
    ):
        choose_device()


@pytest.mark.parametrize(
    ("cuda", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2"), (2, "mps"), (0, "cpu:1")]
)
def test_a_device_that_the_machine_lacks_is_refused(monkeypatch, machine, cuda, name):
    machine(cuda, False)
    monkeypatch.setenv("LLM_DEVICE", name)
    found = rf"\({cuda} cuda, 0 mps, 1 cpu\)"
    with pytest.raises(
        ValueError, match=f"^LLM_DEVICE must be a device of this machine {found}, got '{name}'$"
    ):
        choose_device()


def test_batches_are_moved_whole():
    inputs = {"ids": torch.ones(2, 3), "pair": (torch.zeros(1), torch.ones(1))}
    ((moved, targets),) = on_device([(inputs, torch.zeros(2))], build().to("meta"))
    found = (moved["ids"], *moved["pair"], targets)
    assert [tensor.device.type for tensor in found] == ["meta"] * 4
