"""What `ch01_intro/race.py` measures, and what its record says."""

import math

import numpy as np
import pytest
import torch

from ch01_intro import race
from shared.notebook.ngrams import NGramModel
from shared.notebook.records import read_rows
from shared.notebook.runners import RecurrentLM
from shared.tales.generator import derivations
from shared.training.losses import next_token_loss

N = 12


@pytest.fixture(scope="module")
def network() -> RecurrentLM:
    torch.manual_seed(0)
    return RecurrentLM(race.VOCAB_SIZE, 4, 8).eval()


def test_the_floor_is_the_mean_of_the_stories_own_probabilities():
    stories = race.test_stories()[:N]
    found = race.floor_bits_per_byte(stories) * sum(len(story.text) for story in stories)
    assert found == pytest.approx(sum(-story.log_probability for story in stories) / math.log(2))


def test_no_story_is_both_learned_and_judged():
    judged = {story.text for story in race.test_stories()}
    chosen_on = {story.text for story in race.test_stories(race.TEST_SEED + 2)}
    learned = {text for seed in (*race.SEEDS, race.CHOICE_SEED) for text in race.training_texts(seed)}
    assert not judged & learned and not judged & chosen_on


@pytest.mark.parametrize("kind", race.KINDS)
def test_pairs_differ_in_one_place(kind):
    pairs = race.broken_pairs(kind, N)
    assert len(pairs) == len(set(pairs)) > 0.7 * N
    for right, wrong in pairs:
        assert derivations(right)
        a, b = right.split(" "), wrong.split(" ")
        assert sum(x != y for x, y in zip(a, b, strict=True)) == (2 if kind == "order" else 1)


def test_wrong_names_stand_far_from_the_right_one():
    for right, wrong in race.broken_pairs("memory", N):
        place = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
        name = right[right.rfind(" ", 0, place) + 1 :].split(" ")[0].strip(".,\"'!?")
        assert name in right[:place] and name not in right[place - race.FAR : place]
        assert derivations(wrong) == []


def test_an_unknown_kind():
    with pytest.raises(KeyError):
        race.broken_pairs("spelling")


def test_bits_of_a_network_are_its_loss(network):
    texts = [story.text for story in race.test_stories()[:5]]
    found = race.bits_of_network(network)(texts)
    for text, bits in zip(texts, found, strict=True):
        row = torch.tensor([race.document_row(text, race.tale_encoding())])
        loss = next_token_loss(network(row[:, :-1]), row[:, 1:], reduction="sum").item()
        assert bits == pytest.approx(loss / math.log(2), rel=1e-5)


def test_a_judge_who_sees_nothing_guesses():
    """A runner for whom every story costs the same notices half of the faults, and one that knows all, all."""
    stories = race.test_stories()[:N]
    blind = race.judge(lambda texts: [10.0] * len(texts), stories)
    assert [blind[kind] for kind in race.KINDS] == [0.5] * 3
    knows = race.judge(lambda texts: [0.0 if derivations(text) else 1.0 for text in texts], stories)
    assert knows["order"] == knows["memory"] == 1.0 and knows["neighbours"] > 0.85


def test_order_is_nothing_to_a_unigram():
    rows = [race.tale_ids(text) for text in race.training_texts(0)[:100]]
    found = race.judge(race.bits_of_counts(NGramModel(1, race.VOCAB_SIZE).fit(rows)), race.test_stories()[:N])
    assert found["order"] == 0.5


def test_bits_of_bytes_count_every_byte_once():
    """A network without any preference costs 8 bits for each byte, however the windows are cut."""
    flat = torch.nn.Embedding(256, 256)
    torch.nn.init.zeros_(flat.weight)
    for n in (1, 63, 64, 65, 400):
        assert race.byte_bits(flat, bytes(n)) == pytest.approx(8.0 * n)


def test_bits_of_bytes_are_those_of_one_pass_where_one_window_is_enough():
    torch.manual_seed(0)
    model, data = RecurrentLM(256, 4, 8), bytes(range(40, 40 + race.WINDOW // 2))
    ids = torch.tensor([list(b"\n" + data)])
    loss = next_token_loss(model(ids[:, :-1]), ids[:, 1:], reduction="sum").item()
    assert race.byte_bits(model, data) == pytest.approx(loss / math.log(2), rel=1e-5)


def test_rules_alone_cannot_say_anything():
    row, sample = race.run_rules("tales")
    assert 8.0 < row["bits_per_byte"] < 8.1 and row["detail"].startswith("0 of")
    assert race.RuleWriter().probability(sample) > 0


def test_a_compressor_gains_by_what_it_has_read():
    alone = race.run_compressor("xz", with_training=False)["bits_per_byte"]
    assert race.run_compressor("xz", with_training=True)["bits_per_byte"] < 0.9 * alone


def record(text: str, runner: str) -> list[float]:
    rows = read_rows(race.RESULTS)
    return [
        float(row["bits_per_byte"])
        for row in rows
        if (row["text"], row["runner"], row["role"]) == (text, runner, "race")
    ]


def test_the_record_has_every_run():
    done = {
        tuple(row[name] for name in ("text", "runner", "role", "seed")) for row in read_rows(race.RESULTS)
    }
    wanted = {(text, runner, role, str(seed)) for text, runner, role, seed, _ in race.plan(race.RUNNERS)}
    assert wanted <= done


def test_rates_were_chosen_on_a_seed_of_their_own():
    for row in read_rows(race.RESULTS):
        assert (row["role"] == "choice") == (int(row["seed"]) == race.CHOICE_SEED)
    for runner, network in race.NETWORKS.items():
        for text, rates in network.rates.items():
            assert race.chosen_rate(text, runner) in rates


def test_the_record_is_above_the_floor_and_networks_beat_counts():
    floor = race.floor_bits_per_byte(race.test_stories())
    for runner in ("rules", *race.COUNTS, *race.NETWORKS, *race.SHIPPED):
        assert min(record("tales", runner)) > floor
    for runner in race.NETWORKS:
        assert len(record("tales", runner)) == len(race.SEEDS)
        assert max(record("tales", runner)) < min(record("tales", "kneser-ney"))
    assert record("stories", "smollm2")[0] < 0.7 * min(np.min(record("stories", r)) for r in race.NETWORKS)


@pytest.mark.parametrize("runner", ["unigram", "kneser-ney"])
def test_counts_are_what_the_record_says(runner):
    row, sample = race.run_counts("stories", runner, 0)
    assert row["bits_per_byte"] == pytest.approx(record("stories", runner)[0], abs=1e-4)
    assert sample
