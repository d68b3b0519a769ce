"""BERTs in files: what transformers writes is read by name, what we write it reads; files that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, BertModel

from shared.data.models import has_model, model_file
from shared.model.bert import BERTConfig, BERTForPreTraining
from shared.text.wordpiece import SPECIAL_TOKENS, WordPieceTokenizer
from shared.weights.bert import (
    bert_config_from_hf,
    bert_config_to_hf,
    load_bert,
    load_bert_tokenizer,
    load_bert_weights,
    save_bert,
    shipped_berts,
)
from shared.weights.pretrained import CHECKPOINTS

needs_minilm = pytest.mark.skipif(not has_model("all-minilm-l6-v2"), reason="MiniLM is not installed")
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
TOKENS = torch.arange(30).view(2, 15)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BertForPreTraining(BertConfig(**SHAPE)).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_a_random_checkpoint_of_transformers_loads_by_name(folder: Path) -> None:
    theirs, ours = BertForPreTraining.from_pretrained(folder).eval(), load_bert(folder, pretraining=True)
    with torch.no_grad():
        found, (logits, follows) = theirs(input_ids=TOKENS), ours(TOKENS)
        hidden = load_bert(folder)(TOKENS)
    torch.testing.assert_close(logits, found.prediction_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(follows, found.seq_relationship_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden, theirs.bert(input_ids=TOKENS)[0], atol=1e-5, rtol=1e-5)


def test_the_base_size_loads_by_name_and_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = BertModel(BertConfig()).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS)
        del theirs
        ours = load_bert(tmp_path)
        hidden = ours(TOKENS)
    assert ours.config == BERTConfig(feed_forward_dim=3072)
    torch.testing.assert_close(hidden, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pool(hidden), expected[1], atol=1e-5, rtol=1e-5)


@needs_minilm
def test_minilm_equals_transformers() -> None:
    folder = model_file("all-minilm-l6-v2").parent
    theirs, ours = BertModel.from_pretrained(folder).eval(), load_bert("all-minilm-l6-v2")
    tokenizer = load_bert_tokenizer("all-minilm-l6-v2")
    rows = [
        tokenizer.build_input(tokenizer.encode_ordinary(text))[0]
        for text in ("A cat sat.", "字 and naïve words")
    ]
    longest = max(map(len, rows))
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=mask.long())
        found = ours(tokens, mask=mask)
    torch.testing.assert_close(found[mask], expected[0][mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pool(found), expected[1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"cls\.predictions\.bias is missing in the file"):
        load_bert("all-minilm-l6-v2", pretraining=True)


def test_what_we_write_transformers_reads(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = BERTConfig(60, 20, 2, 24, 3, 2, 40, norm_eps=1e-5)
    ours = BERTForPreTraining(config).eval()
    tokenizer = WordPieceTokenizer([*SPECIAL_TOKENS, *(f"w{i}" for i in range(55))])
    save_bert(ours, tokenizer, tmp_path / "ours", seed=7)
    theirs = BertForPreTraining.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(TOKENS)[0], theirs(input_ids=TOKENS).prediction_logits, atol=1e-5, rtol=1e-5
        )
    assert load_bert_tokenizer(tmp_path / "ours").pieces == tokenizer.pieces
    again = load_bert(tmp_path / "ours", pretraining=True)
    for one, other in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["seed"] == 7
    save_bert(ours, tokenizer, tmp_path / "ours", replace=True)
    with pytest.raises(ValueError, match="tokenizer must be of the model's size"):
        save_bert(ours, WordPieceTokenizer([*SPECIAL_TOKENS]), tmp_path / "other")


def test_names_of_old_files(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    old = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[name] = tensor
    old["bert.embeddings.position_ids"] = torch.arange(20)
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    shutil.copytree(folder, tmp_path / "old")
    save_file(old, tmp_path / "old" / "model.safetensors")
    one, other = load_bert(folder, pretraining=True), load_bert(tmp_path / "old", pretraining=True)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    old["cls.predictions.decoder.weight"] += 1
    save_file(old, tmp_path / "old" / "model.safetensors")
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.weight must be bert\.embeddings"):
        load_bert(tmp_path / "old", pretraining=True)


def test_a_file_that_does_not_fit_changes_nothing(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    model = BERTForPreTraining(bert_config_from_hf(json.loads((folder / "config.json").read_text())))
    before = [parameter.clone() for parameter in model.parameters()]
    for change, message in (
        ({"bert.pooler.dense.weight": None}, r"bert\.pooler\.dense\.weight is missing in the file"),
        ({"bert.extra": torch.ones(1)}, r"bert\.extra has no place in the model"),
        (
            {"bert.pooler.dense.bias": torch.ones(5)},
            r"bert\.pooler\.dense\.bias must be of shape \(24,\), got \(5,\)",
        ),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            load_bert_weights(model, file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_bert_weights(model, file)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
        ({"is_decoder": True}, "is_decoder must be False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"hidden_act": "swish"}, "hidden_act must be one of"),
        ({"attention_probs_dropout_prob": 0.3}, "attention_probs_dropout_prob must be the same"),
    ],
)
def test_configurations_that_ask_for_something_else(change: dict, message: str) -> None:
    config = bert_config_to_hf(BERTConfig())
    assert bert_config_from_hf(config) == BERTConfig(feed_forward_dim=3072)
    with pytest.raises(ValueError, match=message):
        bert_config_from_hf(config | change)
    del config["hidden_size"]
    with pytest.raises(ValueError, match="config must be complete, got 'one without hidden_size'"):
        bert_config_from_hf(config)


def test_unknown_names_and_folders(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="name_or_path must be one of all-minilm-l6-v2, tales-bert, or a folder"
    ):
        load_bert("bert-tiny")
    with pytest.raises(FileNotFoundError):
        load_bert(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON in UTF-8"):
        load_bert(tmp_path)


def test_the_shipped_model_is_whole_and_small() -> None:
    assert shipped_berts() == ["tales-bert"]
    files = list((CHECKPOINTS / "tales-bert").iterdir())
    assert sum(path.stat().st_size for path in files) < 4_000_000
    model, tokenizer = load_bert("tales-bert", pretraining=True), load_bert_tokenizer("tales-bert")
    assert model.config.vocab_size == 2816
    assert tokenizer.vocab_size == model.config.vocab_size
