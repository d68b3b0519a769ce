"""A model, its tokenizer and its chat format from a name, a folder or a file; what is refused, and how it says so."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from shared.data.models import has_model
from shared.serving.models import describe, find_tokenizer, model_names, open_model, pattern_of
from shared.tales.encoding import tale_encoding
from shared.text.tokenizer import GPT2_PATTERN
from shared.weights.files import save_checkpoint_folder
from shared.weights.gguf_model import PATTERNS
from shared.weights.huggingface import export_to_hugging_face, export_with_tokenizer
from shared.weights.pretrained import load_pretrained
from tests.serving.small import CHAT, write_small_chat

needs_smollm2 = pytest.mark.skipif(not has_model("smollm2-135m-instruct"), reason="needs-smollm2")


def test_a_name_brings_its_tokenizer():
    found = open_model("tales-tiny")
    assert found.needed_tokenizer() is tale_encoding() and found.chat_format is None
    assert "tales-tiny" in model_names() and "smollm2-135m-instruct" in model_names()


@needs_smollm2
def test_smollm2_brings_its_chat_format():
    found = open_model("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="bfloat16")
    assert found.model.token_embedding.weight.dtype == torch.bfloat16
    assert found.chat_format.default_system.startswith("You are a helpful AI assistant")


def test_a_gguf_file_holds_everything(tmp_path):
    found = open_model(str(write_small_chat(tmp_path / "small.gguf")))
    assert (
        found.chat_format == CHAT
        and found.needed_tokenizer().decode(found.tokenizer.encode_ordinary("the old mill")) == "the old mill"
    )
    said = describe(str(tmp_path / "small.gguf"))
    assert said["chat"] == "ChatML" and said["context"] == 4096 and "F32" in said["tensors"]
    assert said["parameters"] == found.model.n_parameters
    assert said["bytes of cache for a token"] == 2 * 2 * 64 * 4  # keys and values, two blocks, float32


def test_folders(tmp_path):
    model = load_pretrained("tales-tiny")
    # In Hugging Face's format with a tokenizer, in ours with a recipe, in both without any.
    export_with_tokenizer(model, tmp_path / "hf", tale_encoding())
    save_checkpoint_folder(model, tmp_path / "ours", recipe={"tokenizer": "tales"})
    text = "In the week when it rained, 12 crows came."
    for name in ("hf", "ours"):
        tokenizer = open_model(str(tmp_path / name)).needed_tokenizer()
        assert tokenizer.encode_ordinary(text) == tale_encoding().encode_ordinary(text)
    export_to_hugging_face(model, tmp_path / "bare")
    found = open_model(str(tmp_path / "bare"))
    with pytest.raises(
        ValueError, match=r"bare has no tokenizer that can be read .*give one with --tokenizer"
    ):
        found.needed_tokenizer()
    assert open_model(str(tmp_path / "bare"), tokenizer="tales-3m").needed_tokenizer() is tale_encoding()
    assert "no tokenizer" in describe(str(tmp_path / "bare"))["tokenizer"]


@pytest.mark.parametrize(
    ("cut", "pattern"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), GPT2_PATTERN),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            PATTERNS["smollm"],
        ),
        (pre_tokenizers.Whitespace(), None),
        (pre_tokenizers.ByteLevel(use_regex=False), None),
    ],
)
def test_how_a_tokenizer_cuts_text_is_known_or_refused(tmp_path, cut, pattern):
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    tokenizer.save(str(path))
    if pattern is None:
        with pytest.raises(ValueError, match="cuts text by a rule that is not known here"):
            pattern_of(path)
    else:
        assert pattern_of(path) == pattern


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"one of .*smollm2-135m-instruct.*tales-1m.* got 'nothing'"):
        open_model("nothing")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int4'"):
        open_model("tales-tiny", dtype="int4")
    with pytest.raises(FileNotFoundError):
        open_model(str(tmp_path / "none.gguf"))
    whole = write_small_chat(tmp_path / "small.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.gguf: "):
        open_model(str(tmp_path / "half.gguf"))
    # Weights that are cut off, a configuration that is no JSON, a tokenizer with more tokens than the model.
    folder = tmp_path / "folder"
    save_checkpoint_folder(load_pretrained("tales-tiny"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        open_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        open_model(str(folder))
    with pytest.raises(ValueError, match="the tokenizer has 2048 tokens, more than the model's"):
        open_model(str(tmp_path / "small.gguf"), tokenizer="tales-tiny")
    (folder / "tokenizer_config.json").write_text(json.dumps(["no object"]))
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        find_tokenizer(str(folder))
