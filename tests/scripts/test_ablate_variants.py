"""`ch04_gpt/ablate_variants.py`: what its runs rest on, and what its record must hold."""

import csv

import pytest
import torch
import torch.nn.functional as F

from ch04_gpt import ablate_variants as ablation
from shared.model.gpt import GPTConfig, GPTModel
from shared.model.layers import balance_loss
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.training.batches import IGNORE


@pytest.mark.parametrize("variant", ["gpt2", "qwen3, MoE"])
def test_a_run_for_two_budgets_ends_where_single_runs_end(variant):
    both = ablation.train_variant(variant, 0, [5, 8])
    alone = [ablation.train_variant(variant, 0, [end])[0] for end in (5, 8)]
    for ours, theirs in zip(both, alone, strict=True):
        assert (ours.steps, ours.tokens, ours.losses) == (theirs.steps, theirs.tokens, theirs.losses)
        assert all(
            torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
        )


@pytest.mark.parametrize("variant", ["gpt2", "qwen3, MoE"])
def test_a_run_equals_a_plain_loop(variant):
    result = ablation.train_variant(variant, 1, [8])[0]
    torch.manual_seed(1)
    model = GPTModel(ablation.replace(ablation.BASE, **ablation.VARIANTS[variant]))
    optimizer = torch.optim.AdamW(model.parameters(), ablation.LEARNING_RATE, (0.9, 0.95), fused=True)
    losses = []
    for step, (inputs, targets) in enumerate(ablation.training_batches(1, 8)):
        optimizer.param_groups[0]["lr"] = ablation.LEARNING_RATE * (
            (step + 1) / ablation.WARMUP if step < 6 else (8 - step) / 2
        )
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        losses.append(loss.item() * int((targets != IGNORE).sum()) / ablation.BATCH)
        (loss + ablation.BALANCE * balance_loss(model) if "MoE" in variant else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert result.losses == pytest.approx(losses, rel=1e-4)


def test_a_batch_reads_the_last_end_token_of_short_stories_too():
    stories, end = list(TaleGenerator(3).stories(4)), tale_encoding().eot_token
    inputs, targets = ablation.story_batch(stories)
    for read, wanted in zip(inputs, targets, strict=True):
        n = int((wanted != IGNORE).sum())
        assert wanted[n - 1] == end and (n == len(read) or read[n] == end)
        assert not read[n + 1 :].any()


def test_variants_differ_as_their_names_say():
    models = {name: GPTModel(ablation.replace(ablation.BASE, **o)) for name, o in ablation.VARIANTS.items()}
    assert models["llama"].config == GPTConfig.preset("tales-tiny", init_std=ablation.BASE.init_std)
    size = {name: model.n_parameters for name, model in models.items()}
    assert size["gpt2"] - size["gpt2, rotary"] == 256 * 64
    assert size["gpt2"] - size["gpt2, RMSNorm"] == 5 * 64
    assert ablation.Training("qwen3, MoE", 0).balance == ablation.BALANCE
    assert ablation.Training("qwen3, MoE unbalanced", 0).balance == 0.0
    assert ablation.Training("gpt2", 0).balance == 0.0


@torch.no_grad()
def test_a_story_loss_is_minus_the_log_probability_of_the_whole_story():
    stories, encoding = list(TaleGenerator(3).stories(3)), tale_encoding()
    model = GPTModel(ablation.BASE).eval()
    losses = ablation.story_losses(model, ablation.story_batch(stories)).sum(dim=1)
    for loss, story in zip(losses, stories, strict=True):
        ids = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(story.text), encoding.eot_token]])
        log_probabilities = model(ids[:, :-1]).log_softmax(dim=2)[0]
        expected = -log_probabilities.gather(1, ids[0, 1:, None]).sum()
        torch.testing.assert_close(loss, expected, atol=1e-2, rtol=1e-5)


def test_the_record_is_complete_and_stays_above_the_floor():
    with ablation.RESULTS.open(encoding="utf-8", newline="") as file:
        recorded = list(csv.DictReader(file))
    keys = [(row["recipe"], row["variant"], int(row["seed"])) for row in recorded]
    long = {
        (r, v, s) for r in ("equal-tokens", "equal-time") for v in ablation.VARIANTS for s in ablation.SEEDS
    }
    assert len(keys) == len(set(keys))
    assert set(keys) == long | {("short", variant, 0) for variant in ablation.SHORT}
    assert all(float(row["validation_loss"]) > float(row["floor"]) for row in recorded)
    for row in recorded:
        if row["recipe"] == "equal-time":
            assert int(row["steps"]) == ablation.equal_time_steps(
                row["variant"], ablation.RECIPES["long"].steps
            )
