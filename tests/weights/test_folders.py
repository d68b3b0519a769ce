"""Folders for transformers and vLLM with any tokenizer of ours: the same ids, tokens and prompts there."""

import errno
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.data.models import has_model, model_file
from shared.generation.engine import generate
from shared.serving.models import open_model
from shared.tales.encoding import tale_encoding
from shared.text.chat_format import ChatFormat, chat_format_of, chat_template
from shared.text.tokenizer import BPETokenizer
from shared.weights import files, huggingface
from shared.weights.gguf import read_gguf
from shared.weights.huggingface import export_with_tokenizer, portable_tokenizer
from shared.weights.pretrained import load_pretrained, load_tokenizer
from tests.configurations import LLAMA
from tests.weights.models import build, same_parameters

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
needs_smollm2 = pytest.mark.skipif(not has_model("smollm2-135m-instruct"), reason="needs-smollm2")
TEXTS = ("Hello  12 world", " ?", "it's 4 o'clock\n\n", "Grüße 😀", "a<|im_end|>b")
CONVERSATION = [{"role": "user", "content": "Who are you?"}]


def theirs(folder, prompts: list[list[int]]) -> list[list[int]]:
    """20 greedy tokens of transformers for prompts that are padded at their left."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0
    )
    return written[:, width:].tolist()


@pytest.mark.parametrize("name", ["tales-tiny", pytest.param("smollm2-135m-instruct", marks=needs_smollm2)])
def test_transformers_reads_the_same_ids_and_writes_the_same_tokens(tmp_path, name):
    model, tokenizer, chat = load_pretrained(name, dtype=torch.float32), load_tokenizer(name), None
    if name.startswith("smol"):
        chat = chat_format_of(read_gguf(model_file(name)).metadata["tokenizer.chat_template"])
    export_with_tokenizer(model, tmp_path / "model", tokenizer, chat)
    wrapped = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS[:-1] + ((TEXTS[-1],) if chat is None else ()):
        assert wrapped(text)["input_ids"] == tokenizer.encode_ordinary(text)
        assert wrapped.decode(wrapped(text)["input_ids"]) == tokenizer.decode(tokenizer.encode_ordinary(text))
    prompts = [tokenizer.encode_ordinary(text) for text in ("In the week when the grass", "The capital")]
    if chat is None:
        found = generate(load_pretrained(tmp_path / "model"), prompts, 20)
        assert theirs(tmp_path / "model", prompts) == found == generate(model, prompts, 20)
        return
    # The prompt of a conversation is the same, and every end of a turn ends a reply.
    rendered = wrapped.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert rendered == chat.render(CONVERSATION)
    ids = json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert ids == [tokenizer.special_ids["<|im_end|>"], tokenizer.special_ids["<|endoftext|>"]]
    # Our own program finds everything in the folder again.
    opened = open_model(str(tmp_path / "model"))
    assert opened.chat_format == chat and same_parameters(opened.model, model)
    assert all(opened.tokenizer.encode_ordinary(t) == tokenizer.encode_ordinary(t) for t in TEXTS)


def test_a_special_token_in_a_text_is_found_or_left_as_the_caller_says():
    portable = portable_tokenizer(tale_encoding())
    assert portable.encode("<|endoftext|>").ids == [2047]
    portable.encode_special_tokens = True
    assert portable.encode("<|endoftext|>").ids == tale_encoding().encode_ordinary("<|endoftext|>")


@pytest.mark.parametrize(
    "chat",
    [ChatFormat(), ChatFormat('You say "no" \\ {{ 1 }} {% x %}\n😀'), ChatFormat(start="<s>", end="</s>")],
)
def test_a_template_writes_what_its_format_writes(chat):
    if chat.start == "<s>":  # `chat_format_of` knows ChatML's own tokens only
        with pytest.raises(ValueError, match="ChatML"):
            chat_format_of(chat_template(chat))
        return
    assert chat_format_of(chat_template(chat)) == chat


def test_bad_input_leaves_nothing_behind(tmp_path, monkeypatch):
    tokenizer = BPETokenizer.train("the lamp and the mill", 260)
    model, folder = build(vocab_size=260, **LLAMA), tmp_path / "model"
    with pytest.raises(ValueError, match="at most the model's 100 tokens, got 260"):
        export_with_tokenizer(build(vocab_size=100, **LLAMA), folder, tokenizer)
    with pytest.raises(ValueError, match=r"must have the token '<.im_end.>'"):
        export_with_tokenizer(model, folder, tokenizer, ChatFormat())
    with pytest.raises(ValueError, match="config has no counterpart"):
        export_with_tokenizer(build(vocab_size=260, positions="none"), folder, tokenizer)

    def full(place):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (files, huggingface):
        monkeypatch.setattr(module, "to_disk", full)
        with pytest.raises(OSError, match="No space left"):
            export_with_tokenizer(model, folder, tokenizer)
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    export_with_tokenizer(model, folder, tokenizer)  # an empty folder is as good as none
    assert same_parameters(load_pretrained(folder), model)
    with pytest.raises(FileExistsError, match="folder must be new or empty"):
        export_with_tokenizer(model, folder, tokenizer)
