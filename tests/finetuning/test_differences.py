"""A tuned model as a difference: what comes back, what is not written, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.finetuning.differences import load_difference, save_difference, shipped_differences
from shared.finetuning.instruction import (
    chat_batches,
    chat_tokenizer,
    encode_conversations,
    extend_model,
    tune,
)
from shared.tales.encoding import tale_tokenizer
from shared.text.chat_format import ChatFormat
from shared.weights.pretrained import CHECKPOINTS, load_pretrained

BASE, FORMAT = "tales-tiny", ChatFormat("Be brief.")
TOKENIZER = chat_tokenizer(tale_tokenizer(), FORMAT)
TALK = [{"role": "user", "content": "Say owl."}, {"role": "assistant", "content": "owl"}]


@pytest.fixture(scope="module")
def tuned():
    examples, _ = encode_conversations(FORMAT, TOKENIZER, [TALK])
    model = extend_model(load_pretrained(BASE), 2, 512)
    tune(model, chat_batches(examples, 1), n_steps=5, learning_rate=3e-3, n_frozen_rows=2048)
    return model.eval()


@pytest.fixture
def folder(tuned, tmp_path):
    save_difference(BASE, tuned, tmp_path / "d", chat_format=FORMAT, recipe={"steps": 5})
    return tmp_path / "d"


@torch.no_grad()
def test_there_and_back(tuned, folder):
    model, tokenizer, chat_format = load_difference(folder)
    assert chat_format == FORMAT and tokenizer.special_ids == TOKENIZER.special_ids
    assert model.config == tuned.config and not model.training
    ids = torch.tensor([FORMAT.encode(TOKENIZER, TALK[:1])])
    torch.testing.assert_close(model(ids), tuned(ids), atol=0.02, rtol=0.02)
    base = load_pretrained(BASE)
    for name, parameter in model.named_parameters():
        change = (tuned.get_parameter(name) - parameter)[: len(base.get_parameter(name))]
        moved = (tuned.get_parameter(name)[: len(base.get_parameter(name))] - base.get_parameter(name)).abs()
        assert (change.abs() <= moved * 2**-8 + 1e-7).all()  # bfloat16 has 8 bits
    assert torch.equal(model.token_embedding.weight[2048:], tuned.token_embedding.weight[2048:])
    assert torch.equal(model.token_embedding.weight[:2048], base.token_embedding.weight)
    assert model.output_head.weight is model.token_embedding.weight


def test_only_what_changed_is_written_in_two_bytes(tuned, folder):
    tensors = load_file(folder / "model.safetensors")
    assert "token_embedding.weight" not in tensors
    assert tensors.pop("token_embedding.weight.new_rows").dtype == torch.float32
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    about = json.loads((folder / "difference.json").read_text(encoding="utf-8"))
    assert about["recipe"] == {"steps": 5} and about["base"] == BASE


@torch.no_grad()
def test_a_model_without_new_tokens_has_the_tokenizer_of_its_base(tmp_path):
    model = load_pretrained(BASE)
    model.final_norm.weight += 0.25
    save_difference(BASE, model, tmp_path / "d")
    again, tokenizer, chat_format = load_difference(tmp_path / "d")
    assert list(load_file(tmp_path / "d" / "model.safetensors")) == ["final_norm.weight"]
    assert torch.equal(again.final_norm.weight, model.final_norm.weight)
    assert tokenizer.n_vocab == 2048 and chat_format == ChatFormat()


def test_the_base_must_be_the_very_same(folder):
    about = json.loads((folder / "difference.json").read_text(encoding="utf-8"))
    (folder / "difference.json").write_text(json.dumps(about | {"base_sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(ValueError, match="was made for other weights of tales-tiny"):
        load_difference(folder)
    (folder / "difference.json").write_text(json.dumps(about | {"base": "tales-1m"}), encoding="utf-8")
    with pytest.raises(ValueError, match="was made for other weights of tales-1m"):
        load_difference(folder)


def damaged(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file(tensors, folder / "model.safetensors")


def test_tensors_that_do_not_fit_are_named(folder):
    damaged(folder, final_norm__weight=torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"final_norm.weight in .* must be \(64,\), got \(3,\)"):
        load_difference(folder)


def test_new_rows_that_do_not_fit_are_named(folder):
    damaged(folder, token_embedding__weight__new_rows=torch.zeros(3, 64))
    with pytest.raises(
        ValueError, match=r"token_embedding.weight in .* must be \(2050, 64\), got \(2051, 64\)"
    ):
        load_difference(folder)
    damaged(folder, token_embedding__weight__new_rows=torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"new_rows in .* must be of width 64"):
        load_difference(folder)


def test_tensors_that_have_no_place_are_named(folder):
    damaged(folder, owl=torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be those of the model, and no others, got \['owl'\]"):
        load_difference(folder)


def test_damaged_and_missing_files(folder, tmp_path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-5])
    with pytest.raises(ValueError, match="holds no difference that can be read"):
        load_difference(folder)
    (folder / "model.safetensors").write_bytes(content)
    for text in ("{", "{}", '{"base": 1}', "[]"):
        (folder / "difference.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="holds no difference that can be read"):
            load_difference(folder)
    (folder / "difference.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_difference(folder)
    with pytest.raises(ValueError, match="name_or_folder must be"):
        load_difference(tmp_path / "none")


def test_a_model_that_is_no_descendant_is_refused(tuned, tmp_path):
    with pytest.raises(ValueError, match="tuned must have the tensors of tales-1m"):
        save_difference("tales-1m", tuned, tmp_path / "d")
    with pytest.raises(ValueError, match="of tuned must be as in tales-tiny"):
        wrong = load_pretrained(BASE)
        wrong.token_embedding.weight = torch.nn.Parameter(torch.zeros(9, 64))
        wrong.output_head.weight = wrong.token_embedding.weight
        save_difference(BASE, wrong, tmp_path / "d")
    save_difference(BASE, tuned, tmp_path / "d")
    with pytest.raises(FileExistsError):
        save_difference(BASE, tuned, tmp_path / "d")
    save_difference(BASE, tuned, tmp_path / "d", replace=True)


@pytest.mark.parametrize("name", shipped_differences())
def test_what_ships_is_small_and_can_be_loaded(name):
    assert (CHECKPOINTS / name / "model.safetensors").stat().st_size <= 5_000_000
    model, tokenizer, chat_format = load_difference(name)
    assert tokenizer.n_vocab == model.config.vocab_size
    assert chat_format.end in tokenizer.special_ids
