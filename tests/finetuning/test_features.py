"""Features: independent of padding, equal to transformers' hidden states, and a cache that is never wrong."""

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import shared.finetuning.features as features_module
from shared.finetuning.features import (
    POOLINGS,
    batches_by_length,
    cached_features,
    computed_by,
    features_of,
    load_features,
    lower_part,
    pad_inputs,
    pool_states,
    pooled_features,
    row_key,
    save_features,
    token_states,
    upper_part,
    weights_hash,
)
from shared.model.gpt import GPTConfig, GPTModel
from shared.model.inspection import residual_stream
from shared.weights.huggingface import export_to_hugging_face
from tests.configurations import LLAMA

SMALL = {"vocab_size": 50, "context_length": 32, "emb_dim": 24, "n_heads": 4, "n_layers": 3, "dropout": 0.0}
ROWS = [[5, 9, 1], [7], [3, 4, 8, 2, 6, 11, 12], [9, 9]]


def small_model(**options: object) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**{**SMALL, **options, "init_std": 0.2})).eval()


@pytest.fixture(params=[{}, LLAMA], ids=["gpt2", "llama"])
def model(request) -> GPTModel:
    return small_model(**request.param)


# --- batches and pooling


def test_padding_and_its_mask():
    inputs, mask = pad_inputs(ROWS)
    assert inputs.tolist()[1] == [7, 0, 0, 0, 0, 0, 0] and inputs.dtype == torch.int64
    assert mask.sum(1).tolist() == [3, 1, 7, 2] and mask[2].all()
    states, _ = pad_inputs([torch.ones(2, 3), torch.ones(1, 3)])
    assert states.shape == (2, 2, 3) and states[1, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("rows", "message"), [([], "at least one"), ([[1], []], "at least one token")])
def test_no_rows_and_empty_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        pad_inputs(rows)


def test_the_padding_may_have_the_id_of_the_end():
    # Pad and end are both 9: the last real token is the one that the mask says.
    states = torch.tensor([[[7.0], [9.0], [8.0], [9.0], [9.0]]])
    mask = torch.tensor([[True, True, True, False, False]])
    assert pool_states(states, mask, "last").item() == 8
    assert pool_states(states.flip(1), mask.flip(1), "last").item() == 7  # padded on the left
    assert pool_states(states, mask, "mean").item() == 8


@given(st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=6), min_size=1, max_size=5), st.booleans())
def test_pooling_is_that_of_each_row_alone(rows, left):
    alone = {
        "last": [row[-1] for row in rows],
        "first": [row[0] for row in rows],
        "mean": [sum(row) / len(row) for row in rows],
    }
    longest = max(map(len, rows))
    states, mask = (
        torch.full((len(rows), longest, 1), torch.nan),
        torch.zeros(len(rows), longest, dtype=torch.bool),
    )
    for i, row in enumerate(rows):
        start = longest - len(row) if left else 0
        states[i, start : start + len(row), 0] = torch.tensor(row, dtype=torch.float32)
        mask[i, start : start + len(row)] = True
    for pooling in POOLINGS:
        assert pool_states(states, mask, pooling)[:, 0].tolist() == pytest.approx(alone[pooling])


def test_bad_pooling():
    states, mask = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="pooling must be one of last, first, mean, got 'max'"):
        pool_states(states, mask, "max")
    with pytest.raises(ValueError, match="mask must be"):
        pool_states(states, mask[:, :2], "mean")
    with pytest.raises(ValueError, match="a row without one"):
        pool_states(states, torch.tensor([[True, False, False], [False, False, False]]), "mean")


def test_batches_by_length_hold_each_row_once():
    places = [place for batch in batches_by_length(ROWS, 3) for place in batch]
    assert sorted(places) == [0, 1, 2, 3] and [len(ROWS[i]) for i in places] == [1, 2, 3, 7]


# --- a model in two parts


def test_two_parts_are_the_whole(model):
    tokens = torch.tensor([[1, 2, 3, 4]])
    for n in (1, 2):
        in_two = upper_part(model, n).hidden_states(lower_part(model, n).hidden_states(tokens))
        torch.testing.assert_close(in_two, model.hidden_states(tokens), atol=1e-5, rtol=1e-5)
    assert lower_part(model, 2).blocks[1] is model.blocks[1] and len(model.blocks) == 3
    assert model.config.n_layers == 3 and lower_part(model, 2).config.n_layers == 2


def test_parts_that_do_not_exist(model):
    for part, n in ((lower_part, 0), (lower_part, 4), (upper_part, 0), (upper_part, 3)):
        with pytest.raises(ValueError, match=r"n_(blocks|lower) must be"):
            part(model, n)


def test_states_are_those_of_the_residual_stream(model):
    found = dict(token_states(model, ROWS, 2, batch_size=3))
    assert sorted(found) == [0, 1, 2, 3]
    for i, row in enumerate(ROWS):
        expected = residual_stream(model, torch.tensor([row]))[2, 0]
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-5)


def test_features_are_transformers(model, tmp_path):
    export_to_hugging_face(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        hidden = [theirs(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0] for row in ROWS]
    ours = pooled_features(model, ROWS, 2, "mean", batch_size=2)
    torch.testing.assert_close(ours, torch.stack([h.mean(0) for h in hidden]), atol=1e-4, rtol=1e-4)
    ours = pooled_features(model, ROWS, 2, "last", batch_size=2)
    torch.testing.assert_close(ours, torch.stack([h[-1] for h in hidden]), atol=1e-4, rtol=1e-4)


def test_a_training_model_is_read_without_dropout_and_goes_on_training():
    model = small_model(dropout=0.5).train()
    one, two = (pooled_features(model, ROWS, 3) for _ in range(2))
    assert torch.equal(one, two) and model.training and model.blocks[0].training


# --- the cache


def test_a_second_call_computes_nothing_and_a_longer_one_only_what_is_new(model, tmp_path):
    calls = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    first = cached_features(model, ROWS[:3], 2, folder=tmp_path, batch_size=8)
    assert calls == [3]
    assert torch.equal(cached_features(model, ROWS[:3], 2, folder=tmp_path), first) and calls == [3]
    longer = cached_features(model, [ROWS[3], *ROWS[:3], ROWS[3]], 2, folder=tmp_path)
    assert calls == [3, 1] and torch.equal(longer[1:4], first) and torch.equal(longer[0], longer[4])
    torch.testing.assert_close(
        longer[:4], pooled_features(model, [ROWS[3], *ROWS[:3]], 2), atol=1e-5, rtol=1e-5
    )


def test_nothing_stands_for_something_else(model, tmp_path, monkeypatch):
    # Weights, layer, pooling, code and order of sums: each has a file of its own.
    cached_features(model, ROWS, 2, folder=tmp_path)
    cached_features(model, ROWS, 1, folder=tmp_path)
    cached_features(model, ROWS, 2, "last", folder=tmp_path)
    monkeypatch.setenv("OTHER_PROCESSOR", "77")
    cached_features(model, ROWS, 2, folder=tmp_path)
    monkeypatch.setattr(features_module, "computed_by", lambda: computed_by() | {"code": "mended"})
    cached_features(model, ROWS, 2, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight[0, 0] += 1.0
    changed = cached_features(model, ROWS, 2, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    torch.testing.assert_close(changed, pooled_features(model, ROWS, 2), atol=1e-5, rtol=1e-5)


def test_the_hash_is_of_what_computes(model):
    assert weights_hash(model) == weights_hash(model)
    before = features_of(model, 2, "mean")
    with torch.no_grad():
        model.blocks[2].attention.qkv.weight[0, 0] += 1.0  # above what is read
    assert features_of(model, 2, "mean") == before and features_of(model, 3, "mean") != before
    assert weights_hash(model) != weights_hash(model.to(torch.bfloat16))


@settings(max_examples=50)
@given(*(st.lists(st.integers(0, 10**6), min_size=1, max_size=20) for _ in range(2)))
def test_rows_have_keys_of_their_own(one, other):
    assert (row_key(one) == row_key(other)) == (one == other)


def test_a_damaged_file_is_computed_again(model, tmp_path):
    expected = cached_features(model, ROWS, 2, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    for content in (b"", b"nonsense", path.read_bytes()[:-3]):
        path.write_bytes(content)
        assert torch.equal(cached_features(model, ROWS, 2, folder=tmp_path), expected)


def test_a_file_about_another_model_is_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    save_features(path, {b"k" * 16: torch.ones(3)}, {"weights": "abc", "n_blocks": "2"})
    assert load_features(path, {"weights": "abc"})[b"k" * 16].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="must hold features with weights 'xyz', got 'abc'"):
        load_features(path, {"weights": "xyz"})
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged or holds no features"):
        load_features(path, {})
    save_file({"other": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="damaged or holds no features"):
        load_features(path, {})
    with pytest.raises(FileNotFoundError):
        load_features(tmp_path / "none", {})


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    save_features(path, {b"k" * 16: torch.ones(3)}, {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_features(path, {b"k" * 16: torch.zeros(3)}, {})
    assert list(tmp_path.iterdir()) == [path] and load_features(path, {})[b"k" * 16].tolist() == [1, 1, 1]


def test_writers_at_once_never_leave_a_wrong_file(model, tmp_path):
    expected = pooled_features(model, ROWS, 2)
    threads = [
        threading.Thread(target=cached_features, args=(model, ROWS[i:], 2), kwargs={"folder": tmp_path})
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(
        cached_features(model, ROWS, 2, folder=tmp_path), expected, atol=1e-5, rtol=1e-5
    )
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())
