"""Canaries, exposure, membership and DP-SGD: by hand, beside Opacus's recorded values, and with bad input."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch.func import functional_call

from shared.model.gpt import GPTConfig, GPTModel
from shared.safety.memorization import (
    Canary,
    add_noise,
    canary_exposures,
    candidate_losses,
    chance_exposure,
    clip_rows,
    document_losses,
    draw_canaries,
    exposure,
    is_extracted,
    membership,
    per_sample_gradients,
    privacy_spent,
    train_privately,
)
from shared.tales.encoding import tale_encoding
from shared.training.batches import document_row, pad_rows
from shared.training.losses import loss_per_document
from tests.tools.record_opacus import VALUES, tiny

RECORD = json.loads(VALUES.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig.preset("tales-tiny", emb_dim=16, n_heads=2)).eval()


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    texts = ("The crow asked for soup.", "A lamp.", "Otto baked a cake with rum and milk.", "No.")
    return [document_row(text, tale_encoding()) for text in texts]


# --- canaries


def test_canaries_are_drawn_by_seed_and_keep_their_zeros():
    one, other = (draw_canaries(["Mara", "Otto"], [1, 0], seed=seed) for seed in (3, 3))
    assert one == other and one != draw_canaries(["Mara", "Otto"], [1, 0], seed=4)
    assert [c.repeats for c in one] == [1, 0] and all(len(c.secret) == 3 for c in one)
    assert Canary("a ", "007", 1).text == "a 007."


@pytest.mark.parametrize(
    ("names", "repeats", "message"),
    [
        (["A", "A"], [1, 1], "names must be different"),
        (["A"], [1, 2], "repeats must be as many as names, 1, got 2"),
        (["A"], [-1], "repeats must be at least 0|at least 0"),
    ],
)
def test_bad_canaries(names, repeats, message):
    with pytest.raises(ValueError, match=message):
        draw_canaries(names, repeats)


def test_candidate_losses_are_those_of_each_text_alone(small):
    encoding = tale_encoding()
    prompt, candidates = "Mara's number is 07", ["00", "01", "97", "5", "123"]
    found = candidate_losses(small, encoding, prompt, candidates, batch_size=2)
    head = len(encoding.encode_ordinary(prompt)) + 1
    for text, loss in zip(candidates, found, strict=True):
        ids = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(prompt + text)]])
        with torch.no_grad():
            log_p = small(ids).log_softmax(-1)[0]
        expected = -sum(log_p[i - 1, ids[0, i]] for i in range(head, ids.shape[1]))
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_candidates_that_run_into_the_prompt_are_refused(small):
    with pytest.raises(ValueError, match="tokens begin where the prompt's end"):
        candidate_losses(small, tale_encoding(), "the cro", ["w", "x"])
    with pytest.raises(ValueError, match="candidates must be at least two"):
        candidate_losses(small, tale_encoding(), "the ", ["w"])


def test_exposure_by_hand():
    losses = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert [exposure(losses, i) for i in range(4)] == pytest.approx([2 - math.log2(3), 2, 1, 0])
    # Four equal losses: the mean rank is 2.5, whoever is asked.
    assert exposure(torch.ones(4), 0) == pytest.approx(2 - math.log2(2.5))
    with pytest.raises(ValueError, match="place must be between 0 and 3"):
        exposure(losses, 4)


def test_chance_exposure_by_counting():
    bits = [math.log2(8) - math.log2(rank) for rank in range(1, 9)]
    assert chance_exposure(8) == pytest.approx((np.mean(bits), np.std(bits)))
    assert chance_exposure(1_000_000) == pytest.approx((math.log2(math.e),) * 2, abs=1e-3)


def test_a_model_that_learns_one_canary_says_it_and_no_other(small):
    torch.manual_seed(1)
    model = GPTModel(small.config)
    learned, control = draw_canaries(["Mara", "Otto"], [1, 0], seed=5)
    batch = pad_rows([document_row(learned.text, tale_encoding())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
        optimizer.step()
    assert is_extracted(model, tale_encoding(), learned) and not is_extracted(model, tale_encoding(), control)
    assert canary_exposures(model, tale_encoding(), [learned])[0] == pytest.approx(math.log2(1000))


# --- membership


def test_document_losses_agree_with_the_mean_of_chapter_5(small, rows):
    found = document_losses(small, rows, batch_size=3)
    assert found.mean().item() == pytest.approx(loss_per_document(small, rows), abs=1e-4)
    alone = torch.cat([document_losses(small, [row]) for row in rows])
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-5)


def test_membership_by_hand():
    perfect = membership([2.0, 3.0], [0.0, 1.0])
    assert perfect.auc == 1 and perfect.tpr_at(0) == 1 and perfect.interval == (1, 1)
    # Of the four pairs three are in order, so the area is 3/4; nobody is accused before the highest member.
    mixed = membership([3.0, 1.0], [2.0, 0.0])
    assert mixed.auc == 0.75 and mixed.tpr_at(0) == 0.5 and mixed.tpr_at(1) == 1
    assert mixed.interval[0] <= 0.75 <= mixed.interval[1]


def test_equal_scores_accuse_nobody():
    blind = membership([1.0] * 5, [1.0] * 5)
    assert blind.auc == 0.5 and blind.tpr_at(0.01) == 0


@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], [math.nan]), ([1.0], [math.inf])])
def test_bad_scores(members, others):
    with pytest.raises(ValueError, match="at least one finite score"):
        membership(members, others)


# --- gradients of single rows, clipping, noise


def bigram_loss(model, parameters, inputs, targets):
    return F.cross_entropy(functional_call(model, dict(parameters), (inputs[None],))[0], targets)


def test_gradients_of_rows_equal_a_loop(small, rows):
    inputs, targets = pad_rows(rows)
    found = per_sample_gradients(small, inputs, targets)
    for number, row in enumerate(rows):
        small.zero_grad()
        one, wanted = pad_rows([row])
        F.cross_entropy(small(one).flatten(0, 1), wanted.flatten()).backward()
        for name, parameter in small.named_parameters():
            torch.testing.assert_close(found[name][number], parameter.grad, atol=2e-6, rtol=1e-4)
    small.zero_grad()


def test_gradients_of_rows_equal_those_of_opacus():
    model, inputs, targets = tiny()
    found = per_sample_gradients(model, inputs, targets, bigram_loss)
    assert found.keys() == RECORD["per_sample"].keys()
    for name, value in found.items():
        torch.testing.assert_close(value, torch.tensor(RECORD["per_sample"][name]), atol=1e-6, rtol=1e-5)


def test_the_clipped_mean_equals_that_of_opacus():
    model, inputs, targets = tiny()
    sums, norms = clip_rows(per_sample_gradients(model, inputs, targets, bigram_loss), RECORD["max_norm"])
    assert norms.min() > RECORD["max_norm"]  # so that clipping is what is compared
    for name, value in sums.items():
        expected = torch.tensor(RECORD["clipped"][name])
        torch.testing.assert_close(value / RECORD["expected_batch"], expected, atol=1e-6, rtol=1e-4)


def test_clipping_by_hand():
    gradients = {"a": torch.tensor([[3.0], [0.3]]), "b": torch.tensor([[4.0], [0.4]])}
    sums, norms = clip_rows(gradients, 1.0)
    assert norms.tolist() == pytest.approx([5.0, 0.5])
    # The first row has norm 5 over both parameters and becomes (0.6, 0.8); the second stays.
    assert sums["a"].item() == pytest.approx(0.9) and sums["b"].item() == pytest.approx(1.2)
    assert clip_rows({"a": torch.zeros(2, 3)}, 1.0)[0]["a"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        clip_rows(gradients, 0.0)


def test_noise_has_the_stated_size():
    zeros = {"a": torch.zeros(200, 200)}
    noisy = add_noise(zeros, 0.7, torch.Generator().manual_seed(0))["a"]
    assert noisy.std().item() == pytest.approx(0.7, rel=0.02) and abs(noisy.mean().item()) < 0.02
    assert add_noise(zeros, 0.0)["a"] is zeros["a"]


def test_private_training_without_clipping_or_noise_is_plain_training(small, rows):
    private, plain = (GPTModel(small.config) for _ in range(2))
    plain.load_state_dict(private.state_dict())
    options = {"n_steps": 3, "sample_rate": 1.0, "max_norm": 1e6, "noise_multiplier": 0.0, "chunk": 3}
    norms = train_privately(private, rows, torch.optim.SGD(private.parameters(), lr=0.1), **options)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for row in rows:
            inputs, targets = pad_rows([row])
            (F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten()) / len(rows)).backward()
        optimizer.step()
    assert len(norms) == 12
    for one, other in zip(private.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_one_row_moves_the_sum_by_no_more_than_the_norm(small, rows):
    moved = {}
    for name, chosen in (("with", rows), ("without", rows[:-1])):
        model = GPTModel(small.config)
        model.load_state_dict(small.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        train_privately(
            model, chosen, optimizer, n_steps=1, sample_rate=1.0, max_norm=0.01, noise_multiplier=0.0
        )
        parts = [
            (before - after).flatten() * len(chosen)
            for before, after in zip(small.parameters(), model.parameters(), strict=True)
        ]
        moved[name] = torch.cat(parts)
    distance = (moved["with"] - moved["without"]).norm().item()
    assert 0.009 < distance <= 0.01 * 1.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_rate": 0.0}, "sample_rate must be above 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be at least 0"),
        ({"n_steps": 0}, "n_steps must be at least 1"),
        ({"rows": []}, "rows must be at least one"),
    ],
)
def test_bad_private_training(small, rows, change, message):
    options = {
        "rows": rows,
        "n_steps": 1,
        "sample_rate": 0.5,
        "max_norm": 1.0,
        "noise_multiplier": 1.0,
    } | change
    optimizer = torch.optim.SGD(small.parameters(), lr=0.0)
    with pytest.raises(ValueError, match=message):
        train_privately(small, options.pop("rows"), optimizer, **options)


# --- the accountant


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "renyi", "exact"), RECORD["spent"])
def test_the_accountant_says_what_was_recorded(noise, rate, steps, delta, renyi, exact):
    found = privacy_spent(noise, rate, steps, delta)
    assert found == pytest.approx(exact, rel=0.01) and found < renyi


def test_one_step_with_all_rows_is_the_gaussian_mechanism():
    # Balle and Wang (2018), theorem 8, with sensitivity 1: delta for a given epsilon, exactly.
    noise, delta = 2.0, 1e-4
    epsilon = privacy_spent(noise, 1.0, 1, delta)
    a, b = 1 / (2 * noise), epsilon * noise
    assert norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) == pytest.approx(delta, rel=0.1)


def test_more_noise_costs_less_privacy_and_more_steps_cost_more():
    assert privacy_spent(2.0, 0.1, 50, 1e-4) < privacy_spent(1.0, 0.1, 50, 1e-4)
    assert privacy_spent(1.0, 0.1, 50, 1e-4) < privacy_spent(1.0, 0.1, 200, 1e-4)
    with pytest.raises(ValueError, match="noise_multiplier must be above 0"):
        privacy_spent(0.0, 0.1, 10, 1e-4)
