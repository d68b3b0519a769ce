"""What the scripts of the appendix on BERT compare is compared fairly, and their records are what they say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from appendix_vit_bert import bert_messages, pretrain_bert
from appendix_vit_bert.bert_messages import spam_runs
from shared.data.corpus import LabeledText
from shared.model.bert import BERTConfig
from shared.notebook.records import read_rows
from shared.training.batches import IGNORE
from shared.weights.bert import load_bert, load_bert_tokenizer
from shared.weights.pretrained import CHECKPOINTS

# --- pretrain_bert.py


@pytest.fixture(scope="module")
def tokenizer():
    return load_bert_tokenizer("tales-bert")


def recorded(run: str, measure: str) -> float:
    rows = read_rows(pretrain_bert.RESULTS)
    (value,) = (
        r["value"] for r in rows if (r["run"], r["measure"]) == (run, measure) and r["role"] != "curve"
    )
    return float(value)


def test_the_shipped_model_scores_what_the_record_says(tokenizer):
    pairs, hidden, targets = pretrain_bert.judged_pairs(tokenizer, pretrain_bert.TEST_SEED, 200)
    model = load_bert("tales-bert", pretraining=True)
    scores = pretrain_bert.judge(model, (pairs, hidden, targets))
    assert scores["n next"] == 200 and scores["n masked"] > 4000
    # 200 of the record's 2,000 pairs: within three standard errors.
    for task, n in (("masked", scores["n masked"]), ("next", 200)):
        expected = recorded("bert, shipped", f"{task} accuracy")
        assert scores[f"{task} accuracy"] == pytest.approx(expected, abs=3 * (0.25 / n) ** 0.5)
    assert scores["masked accuracy"] > recorded("neighbours", "masked accuracy") + 0.1


def test_nobody_is_above_the_ceiling():
    rows = [row for row in read_rows(pretrain_bert.RESULTS) if row["role"] != "curve"]
    for measure in ("masked accuracy", "next accuracy"):
        values = {row["run"]: float(row["value"]) for row in rows if row["measure"] == measure}
        assert values.pop("ceiling") >= max(values.values()) and "bert, shipped" in values


def test_training_validation_and_test_have_seeds_of_their_own():
    seeds = {pretrain_bert.VALIDATION_SEED, pretrain_bert.TEST_SEED, pretrain_bert.COUNTED_SEED}
    seeds |= {pretrain_bert.SHORT_SEED, pretrain_bert.LONG_SEED, pretrain_bert.VOCABULARY_SEED}
    assert len(seeds) == 6


def test_pairs_are_framed_and_hidden_tokens_are_masks(tokenizer):
    pairs, hidden, targets = pretrain_bert.judged_pairs(tokenizer, 1, 12)
    again = pretrain_bert.judged_pairs(tokenizer, 1, 12)
    assert torch.equal(hidden, again[1]) and torch.equal(targets, again[2])
    tokens, segments, mask, labels = pairs.batch(slice(0, 12))
    assert (tokens[:, 0] == tokenizer.cls_id).all() and ((tokens == tokenizer.sep_id).sum(1) == 2).all()
    assert set(labels.tolist()) == {0, 1} and not segments[:, 0].any() and not segments[~mask].any()
    asked = targets != IGNORE
    assert (hidden[asked] == tokenizer.mask_id).all() and (pairs.rows[asked] == targets[asked]).all()


def test_batches_go_on_where_a_run_was_stopped(tokenizer):
    rows, heads = pretrain_bert.excerpt_pairs(tokenizer, 3, 8 * pretrain_bert.BATCH_SIZE)
    pairs = pretrain_bert.Pairs(rows, heads, torch.device("cpu"))
    whole = pretrain_bert.training_batches(tokenizer, pairs, 0, 0)
    expected = [next(whole) for _ in range(11)]  # beyond the first epoch of 8 batches
    for start in (2, 9):
        (hidden, *_), targets = next(pretrain_bert.training_batches(tokenizer, pairs, 0, start))
        assert torch.equal(hidden, expected[start][0][0]) and torch.equal(targets, expected[start][1])


def test_a_stopped_run_gives_the_model_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer
):
    shape = BERTConfig(2816, 232, emb_dim=16, n_heads=2, n_layers=1, dropout=0.0)
    for name, value in {
        "SHIPPED": shape,
        "N_SHORT": 2,
        "N_LONG": 2,
        "BATCH_SIZE": 4,
        "N_TEST": 8,
        "N_WATCHED": 4,
        "EVERY": 1,
        "RESULTS": tmp_path / "record.csv",
    }.items():
        monkeypatch.setattr(pretrain_bert, name, value)

    class Options:
        device, seed = "cpu", 0

    found = []
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
        tokenizer.save(folder / "vocab.txt")
        Options.scratch = Options.output = folder
        if folder.name == "stopped":
            judge, calls = pretrain_bert.judge, []

            def stop(*arguments: object, judge=judge, calls=calls) -> dict[str, float]:
                calls.append(1)
                if len(calls) == 4:
                    raise KeyboardInterrupt
                return judge(*arguments)

            monkeypatch.setattr(pretrain_bert, "judge", stop)
            with pytest.raises(KeyboardInterrupt):
                pretrain_bert.ship(Options)
            monkeypatch.setattr(pretrain_bert, "judge", judge)
        pretrain_bert.ship(Options)
        found.append(load_bert(folder / "tales-bert", pretraining=True).state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_checkpoint_was_made_by_the_recipe():
    about = json.loads((CHECKPOINTS / "tales-bert" / "bert.json").read_text())
    assert about["steps"] == {"excerpts": pretrain_bert.N_SHORT, "stories": pretrain_bert.N_LONG}
    assert (about["batch_size"], about["learning_rate"]) == (pretrain_bert.BATCH_SIZE, pretrain_bert.RATE)
    assert load_bert("tales-bert").config == replace(pretrain_bert.SHIPPED, feed_forward_dim=4 * 128)


# --- bert_messages.py


@pytest.mark.parametrize("model", bert_messages.MODELS)
def test_a_run_judges_each_message_of_the_fold(model):
    rows = [
        LabeledText(f"{word} {i}", label, "plain", "train")
        for i in range(20)
        for word, label in (("Buy it now", "spam"), ("See you at home", "ham"))
    ]
    data = spam_runs.Texts("made", rows)
    row = bert_messages.run(data, model, "folds", 1e-3, "mean", 0, 1, n_epochs=1)
    assert row.keys() == set(bert_messages.COLUMNS) and row["n"] == len(row["right"]) == 8
    assert row["correct"] == row["right"].count("1")


def test_a_random_start_has_other_weights():
    for kind in ("bert", "gpt"):
        trained, fresh = (
            bert_messages.new_classifier(kind + more, "mean").body for more in ("", ", random start")
        )
        assert trained.config == fresh.config
        assert not torch.equal(trained.token_embedding.weight, fresh.token_embedding.weight)


def test_what_is_chosen_is_compared_on_other_seeds():
    for model in bert_messages.MODELS:
        choices, jobs = bert_messages.choices(model), bert_messages.jobs(model, list(bert_messages.SEEDS))
        assert {job[4] for job in choices} == {bert_messages.CHOICE_SEED}
        assert bert_messages.CHOICE_SEED not in {job[4] for job in jobs}
        assert len(set(jobs)) == len(jobs) == 3 * 5 + 1


def test_the_record_of_the_messages_is_complete():
    rows = read_rows(bert_messages.RESULTS)
    places = {job for model in bert_messages.MODELS for job in bert_messages.choices(model)}
    places |= {
        job for model in bert_messages.MODELS for job in bert_messages.jobs(model, list(bert_messages.SEEDS))
    }
    assert {tuple(row[name] for name in bert_messages.KEY) for row in rows} == {
        tuple(map(str, job)) for job in places
    }
    for row in rows:
        assert int(row["n"]) == len(row["right"]) and int(row["correct"]) == row["right"].count("1")
        assert set(row["right"]) <= {"0", "1"}
    assert np.mean([int(row["n"]) for row in rows if row["role"] == "test"]) == 260
