"""What `ch05_pretraining/sweep_decoding.py` measures, on a random model: no checkpoint is needed."""

import csv
import math
import statistics

import pytest
import torch

from ch05_pretraining import sweep_decoding as sweep
from shared.generation.engine import apply_processors
from shared.generation.sampling import MinP, RepetitionPenalty, Temperature, TopK
from shared.model.gpt import GPTConfig, GPTModel


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(
        GPTConfig.preset("tales-1m", emb_dim=16, n_heads=2, n_layers=1, context_length=12, init_std=0.5)
    ).eval()


STORIES = [[5, 6, 7, 5], [9], [8, 8, 8, 8, 8, 8]]


def choices(model: GPTModel, processors: tuple, story: list[int]) -> list[torch.Tensor]:
    """The processed logits at each place of one story, read token by token."""
    ids, found = [sweep.END], []
    for token in [*story, sweep.END]:
        so_far = torch.tensor([ids])
        with torch.no_grad():
            found.append(apply_processors(processors, so_far, model(so_far)[:, -1])[0])
        ids.append(token)
    return found


@pytest.mark.parametrize("processors", [(), (RepetitionPenalty(1.5), Temperature(0.7), MinP(0.3))])
def test_entropy_is_the_sum_of_the_choices_entropies(model, processors):
    expected = [
        sum(
            torch.distributions.Categorical(logits=logits).entropy().item()
            for logits in choices(model, processors, story)
        )
        for story in STORIES
    ]
    mean, error = sweep.choice_entropy(model, processors, STORIES)
    assert mean == pytest.approx(statistics.mean(expected), rel=1e-4)
    assert error == pytest.approx(statistics.stdev(expected) / math.sqrt(len(STORIES)), rel=1e-3)


@pytest.mark.parametrize("k", [1, 300, 1500, 2048])
def test_a_story_is_possible_if_no_token_is_cut(model, k):
    expected = 0
    for story in STORIES:
        targets = [*story, sweep.END]
        places = zip(choices(model, (TopK(k),), story), targets, strict=True)
        expected += all(logits[target] > -math.inf for logits, target in places)
    found, loss = sweep.real_probability(model, (TopK(k),), STORIES)
    assert found == expected
    assert math.isfinite(loss) == (expected == len(STORIES))


@pytest.mark.parametrize("processors", [(), (RepetitionPenalty(1.5), Temperature(0.7))])
def test_the_loss_of_stories_is_that_of_their_tokens(model, processors):
    expected = 0.0
    for story in STORIES:
        places = zip(choices(model, processors, story), [*story, sweep.END], strict=True)
        expected -= sum(logits.log_softmax(dim=-1)[target].item() for logits, target in places)
    found, loss = sweep.real_probability(model, processors, STORIES)
    assert found == len(STORIES)
    assert loss == pytest.approx(expected / len(STORIES), rel=1e-4)


def end_soon(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A processor that makes the sixth token the end."""
    return logits.index_fill(1, torch.tensor([sweep.END]), 1e3) if ids.shape[1] == 6 else logits


def test_what_greedy_writes_is_possible_and_certain(model):
    processors = (end_soon, TopK(1))
    [stories] = sweep.write_batches(model, sweep.Setting("greedy", processors, greedy=True), 3)
    assert stories[0] == stories[1] == stories[2] and len(stories[0]) == 5
    assert sweep.real_probability(model, processors, stories) == (3, pytest.approx(0, abs=1e-5))
    assert sweep.choice_entropy(model, processors, stories) == pytest.approx((0, 0), abs=1e-6)
    assert sweep.real_probability(model, (TopK(1),), stories) == (0, math.inf)  # it would not end there


def test_story_i_does_not_depend_on_how_many_are_written(model):
    setting = sweep.SETTINGS["top-k=5"]
    [two], [three] = sweep.write_batches(model, setting, 2), sweep.write_batches(model, setting, 3)
    assert two == three[:2]


def test_distinct_ngrams_by_hand():
    assert sweep.distinct_ngrams(["a b a b a b"], n=2) == 2 / 5
    assert sweep.distinct_ngrams(["a b c", "a b d"], n=2) == 3 / 4
    assert sweep.distinct_ngrams(["a b"], n=4) == 0


def test_the_record_keeps_one_row_a_setting_in_order(tmp_path):
    path = tmp_path / "record.csv"
    for name, whole in (("top-p=0.9", 1), ("greedy", 2), ("top-p=0.9", 3)):
        sweep.save({"setting": name, "whole_stories": whole}, path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["setting"], row["whole_stories"]) for row in csv.DictReader(file)]
    assert rows == [("greedy", "2"), ("top-p=0.9", "3")]


def test_unknown_setting(model):
    with pytest.raises(ValueError, match="name is 'top-p=7'; allowed are greedy"):
        sweep.measure("top-p=7", model)
