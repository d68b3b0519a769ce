"""Likelihoods of answers: those of a plain forward pass, in any batch; multiple choice by hand."""

import math

import pytest
import torch

from shared.finetuning.likelihood import (
    NORMALIZATIONS,
    Likelihood,
    answer_likelihoods,
    choice_scores,
    pooled,
)
from shared.model.gpt import GPTConfig, GPTModel
from tests.configurations import LLAMA

SMALL = {"vocab_size": 256, "context_length": 24, "emb_dim": 24, "n_heads": 4, "n_layers": 2, "dropout": 0.5}


class Bytes:
    """A tokenizer whose tokens are bytes."""

    n_vocab, eot_token = 256, 0

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture(params=[{}, LLAMA], ids=["gpt2", "llama"])
def model(request) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**{**SMALL, **request.param, "init_std": 0.3}))


PROMPTS = [[1, 2, 3], [9], [4, 5, 6], [7, 7, 7], [8, 200]]
ANSWERS = [["a", "ö long one"], ["x"], ["bc", "d", "e"], [" "], ["yes", "no"]]


@torch.no_grad()
def by_one_pass(model: GPTModel, prompt: list[int], ids: list[int]) -> float:
    model.eval()
    logits = model(torch.tensor([prompt + ids])).double().log_softmax(-1)[0]
    return -sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("end", [(), (5, 6)])
def test_likelihoods_are_those_of_one_pass(model, batch_size, end):
    model.train()
    found = answer_likelihoods(model, Bytes(), PROMPTS, ANSWERS, end=end, batch_size=batch_size)
    assert model.training  # left as it was, and yet without dropout
    for prompt, texts, likelihoods in zip(PROMPTS, ANSWERS, found, strict=True):
        assert len(likelihoods) == len(texts)
        for text, one in zip(texts, likelihoods, strict=True):
            ids = [*text.encode(), *end]
            assert one.nats == pytest.approx(by_one_pass(model, prompt, ids), abs=1e-4)
            assert (one.n_tokens, one.n_bytes) == (len(ids), len(text.encode()))


def test_the_probabilities_of_all_one_token_answers_sum_to_one(model):
    (found,) = answer_likelihoods(model, Bytes(), [[3, 4]], [[chr(i) for i in range(128)]])
    total = sum(math.exp(-one.nats) for one in found)
    assert 0 < total < 1
    found += answer_likelihoods(model, Latin(), [[3, 4]], [[chr(i) for i in range(128, 256)]])[0]
    assert sum(math.exp(-one.nats) for one in found) == pytest.approx(1, abs=1e-5)


class Latin(Bytes):
    """A tokenizer whose tokens are the letters of Latin-1."""

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode("latin-1"))


@pytest.mark.parametrize(
    "prompts, answers, options, message",
    [
        ([[1]], [], {}, "answers must be 1 lists, one for each prompt, got 0"),
        ([[1], []], [["a"], ["b"]], {}, r"prompts\[1\] must be at least one token"),
        ([[1]], [[]], {}, r"answers\[0\] must be at least one answer"),
        (
            [[1], [1]],
            [["a"], ["b", ""]],
            {},
            r"answers\[1\]\[1\] must be at least one token, got 'an empty text'",
        ),
        (
            [[1] * 20],
            [["a", "abcde"]],
            {},
            r"prompt and answers\[0\]\[1\] must be at most 24 tokens, got '25 tokens'",
        ),
        ([[1] * 20], [["abcd"]], {"end": (1,)}, "at most 24 tokens"),
        ([[1]], [["a"]], {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_read_is_refused(model, prompts, answers, options, message):
    with pytest.raises(ValueError, match=message):
        answer_likelihoods(model, Bytes(), prompts, answers, **options)


def test_the_whole_context_can_be_used(model):
    ((one,),) = answer_likelihoods(model, Bytes(), [[1] * 20], [["abcd"]])
    assert one.n_tokens == 4
    assert answer_likelihoods(model, Bytes(), [], []) == []


def test_units_and_pooling():
    one, other = Likelihood(2 * math.log(8), 2, 3), Likelihood(math.log(2), 1, 1)
    assert one.perplexity == pytest.approx(8) and one.bits_per_byte == pytest.approx(2)
    both = pooled([one, other])
    assert (both.n_tokens, both.n_bytes) == (3, 4)
    assert both.bits_per_byte == pytest.approx(7 / 4)  # not the mean of 2 and 1
    with pytest.raises(ValueError, match="at least one"):
        pooled([])
    with pytest.raises(ValueError, match="n_bytes must be at least 1"):
        _ = Likelihood(1.0, 1, 0).bits_per_byte


def test_multiple_choice_by_hand():
    mars, sun = Likelihood(3.0, 1, 4), Likelihood(3.5, 2, 7)
    assert choice_scores([mars, sun]) == [-3.0, -3.5]
    assert choice_scores([mars, sun], "token") == [-3.0, -1.75]
    assert choice_scores([mars, sun], "byte") == [-0.75, -0.5]
    blind = [Likelihood(5.0, 1, 4), Likelihood(4.0, 2, 7)]
    assert choice_scores([mars, sun], "unconditional", blind) == [2.0, 0.5]
    assert set(NORMALIZATIONS) == {"sum", "token", "byte", "unconditional"}


def test_choices_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match="normalization must be one of sum, token, byte, unconditional"):
        choice_scores([Likelihood(1, 1, 1)], "letters")
    for given in (None, [], [Likelihood(1, 1, 1)] * 2):
        with pytest.raises(ValueError, match="unconditional must be 1 likelihoods"):
            choice_scores([Likelihood(1, 1, 1)], "unconditional", given)
