"""`shared.notebook.tale_runs`: a run equals a plain loop, and its floor is that of its stories."""

import pytest
import torch
import torch.nn.functional as F

from shared.model.gpt import GPTConfig, GPTModel
from shared.notebook.tale_runs import VALIDATION_SEED, story_rows, train_on_tales
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.training.batches import IGNORE, row_batches
from shared.training.optimizers import build_optimizers, set_learning_rates

SMALL = GPTConfig.preset("tales-1m", emb_dim=16, n_layers=1, n_heads=2)


def build(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    return build_optimizers(model, "adamw", 1e-2)


def test_a_run_equals_a_plain_loop():
    found = train_on_tales(SMALL, 3, 10, 2, build, n_validation=3)
    torch.manual_seed(3)
    model, losses = GPTModel(SMALL), []
    optimizers = build(model)
    # Warm-up of one step, then the peak, then a fall over five steps.
    factors = [1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    batches = row_batches(story_rows(4, 20)[0], 2, seed=3)
    for factor, (inputs, targets) in zip(factors, batches, strict=True):
        set_learning_rates(optimizers, factor)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.tokens == sum(len(row) - 1 for row in story_rows(4, 20)[0])
    assert not found.model.training and found.cpu_seconds > 0
    assert found.floor == story_rows(VALIDATION_SEED, 3)[1] < found.loss_per_story


def test_rows_are_whole_stories_and_the_floor_is_their_mean():
    stories, encoding = list(TaleGenerator(5).stories(3)), tale_encoding()
    rows, floor = story_rows(5, 3)
    assert [encoding.decode(row[1:-1]) for row in rows] == [story.text for story in stories]
    assert {row[0] for row in rows} | {row[-1] for row in rows} == {encoding.eot_token}
    assert floor == pytest.approx(-sum(story.log_probability for story in stories) / 3)


def test_numbers_that_are_too_small():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        story_rows(0, 0)
    with pytest.raises(ValueError):
        train_on_tales(SMALL, 0, 0, 2, build)
