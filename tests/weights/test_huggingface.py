"""`shared.weights.huggingface`: transformers computes, writes and tokenizes the same as we do."""

import pytest
import tiktoken
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import shared.weights.files
from shared.data.corpus import load_languages, load_stories
from shared.data.download import gpt2_encoding
from shared.model.gpt import GPTModel
from shared.tales.encoding import tale_encoding, tale_tokenizer
from shared.tales.generator import TaleGenerator
from shared.text.tokenizer import BPETokenizer
from shared.weights.huggingface import export_to_hugging_face, hugging_face_tokenizer, last_merge
from shared.weights.pretrained import load_pretrained
from tests.configurations import LLAMA
from tests.data.test_download import REAL_DATA
from tests.weights.models import EXPORTED, build, close, logits, random_ids, same_parameters

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@torch.no_grad()
def write_greedily(model: GPTModel, encoding: tiktoken.Encoding, prompt: str, n_tokens: int) -> str:
    ids = torch.tensor([[encoding.eot_token, *encoding.encode(prompt)]])
    start = ids.shape[1]
    for _ in range(n_tokens):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(dim=-1)], dim=1)
        if ids[0, -1] == encoding.eot_token:
            break
    return encoding.decode([token for token in ids[0, start:].tolist() if token != encoding.eot_token])


@pytest.mark.parametrize(("name", "options"), EXPORTED.values(), ids=EXPORTED)
def test_an_exported_model_computes_and_writes_the_same_in_transformers(name, options, tmp_path):
    model, encoding, folder = build(**options), tale_encoding(), tmp_path / "exported"
    export_to_hugging_face(model, folder, encoding)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == name
    assert theirs.num_parameters() == model.n_parameters
    close(logits(model, random_ids()), logits(theirs, random_ids()))
    for prompt in ("Mia had a red", "One day, Tom ran to the"):
        inputs = tokenizer("<|endoftext|>" + prompt, return_tensors="pt")
        output = theirs.generate(**inputs, do_sample=False, max_new_tokens=24)[
            0, inputs["input_ids"].shape[1] :
        ]
        text = tokenizer.decode(output, skip_special_tokens=True)
        assert text and text == write_greedily(model, encoding, prompt, 24)
    back = load_pretrained(folder)
    assert same_parameters(model, back)
    close(logits(back, random_ids()), logits(model, random_ids()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre_norm": False}, "the nearest, gpt2, cannot have pre_norm=False"),
        ({"qkv_bias": False}, "gpt2, cannot have qkv_bias=False"),
        ({"positions": "sinusoidal"}, "gpt2, cannot have positions='sinusoidal'"),
        ({"positions": "none"}, "positions='none'"),
        ({"window": 4}, "gpt2, cannot have window=4"),
        ({"n_kv_heads": 2}, "gpt2, cannot have n_kv_heads=2"),
        ({"head_dim": 10}, "gpt2, cannot have head_dim=10"),
        ({**LLAMA, "norm": "layernorm"}, "llama, cannot have norm='layernorm'"),
        ({**LLAMA, "qkv_bias": True}, "llama, cannot have qkv_bias=True"),
        ({**LLAMA, "qk_norm": True, "bias": True}, "qwen3, cannot have bias=True"),
        (
            {**LLAMA, "feed_forward": "moe", "rope_interleaved": True},
            "mixtral, cannot have rope_interleaved=True",
        ),
        ({**LLAMA, "rope_interleaved": True, "window": 4}, "mistral, cannot have rope_interleaved=True"),
        ({**LLAMA, "rope_interleaved": True, "head_dim": 8}, "cannot have (rope_interleaved|head_dim)"),
        ({**LLAMA, "feed_forward": "gelu"}, "llama, cannot have feed_forward='gelu'"),
    ],
)
def test_a_configuration_without_counterpart_is_refused_by_its_field(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_to_hugging_face(build(**options), tmp_path / "exported", tale_encoding())
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_there_and_without_a_tokenizer_none_of_its(tmp_path):
    export_to_hugging_face(build(), tmp_path / "deep" / "with", tale_tokenizer())
    export_to_hugging_face(build(), tmp_path / "without")
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    names = lambda folder: {path.name for path in folder.iterdir()}
    assert names(tmp_path / "without") == model_files
    assert names(tmp_path / "deep" / "with") == model_files | {"tokenizer.json", "tokenizer_config.json"}
    assert names(tmp_path / "deep") == {"with"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "deep" / "with")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 2047)
    assert tokenizer.model_max_length == 64


def test_an_interrupted_export_leaves_nothing(monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shared.weights.files, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        export_to_hugging_face(build(), tmp_path / "exported", tale_encoding())
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="encoding has 2048 tokens, the model 2000"):
        export_to_hugging_face(build(vocab_size=2000), tmp_path / "exported", tale_encoding())


# --- the tokenizer

WRITTEN = hugging_face_tokenizer(tale_encoding())
SPECIALS = BPETokenizer.train(
    [story.text for story in load_stories()], 600, special_tokens=("<|endoftext|>", "<|user|>", "<|end|>")
)
WRITTEN_SPECIALS = hugging_face_tokenizer(SPECIALS)


def test_hundreds_of_texts_have_equal_ids():
    texts = [story.text for story in TaleGenerator(5).stories(300)] + [story.text for story in load_stories()]
    texts += [paragraph.text for paragraph in load_languages()]
    texts += [
        "",
        " ",
        "\n\n",
        "a<|endoftext|>b",
        "<|endoftext|><|endoftext|>",
        "\u00a0x\u3000y\x85z",
        "e\u0301 🎉🏽",
    ]
    for text in texts:
        ids = tale_encoding().encode(text, allowed_special="all")
        assert WRITTEN.encode(text).ids == ids
        assert WRITTEN.decode(ids, skip_special_tokens=False) == text


@settings(deadline=None, max_examples=150)
@given(st.text())
def test_any_text_has_equal_ids(text):
    assert WRITTEN.encode(text).ids == tale_encoding().encode(text, allowed_special="all")
    ids = SPECIALS.encode(text, allowed_special="all")
    assert WRITTEN_SPECIALS.encode(text).ids == ids


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["<|user|>", "<|end|>", "<|endoftext|>", "<|", " the", "'s", "\n ", "  x"])))
def test_special_tokens_are_found_in_any_company(parts):
    text = "".join(parts)
    assert WRITTEN_SPECIALS.encode(text).ids == SPECIALS.encode(text, allowed_special="all")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2047), max_size=30))
def test_any_ids_have_the_same_text(ids):
    assert WRITTEN.decode(ids, skip_special_tokens=False) == tale_encoding().decode(ids)


def test_both_kinds_of_encoding_give_the_same_file():
    assert hugging_face_tokenizer(tale_tokenizer()).to_str() == WRITTEN.to_str()


@pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="../shared/data, the folder with the real files, is not here"
)
def test_the_tokenizer_of_gpt2_has_equal_ids(monkeypatch):
    monkeypatch.setenv("LLM_DATA_DIR", str(REAL_DATA))
    encoding = gpt2_encoding()
    written = hugging_face_tokenizer(encoding)
    for paragraph in load_languages():
        assert written.encode(paragraph.text).ids == encoding.encode(paragraph.text)
    assert written.get_vocab_size() == 50_257


def test_merges_are_those_of_training():
    merges = BPETokenizer.train("low lower lowest newer newest wider", 290).merges
    ranks = {bytes([byte]): byte for byte in range(256)} | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    assert [last_merge(a + b, ranks) for a, b in merges] == merges


def test_what_is_no_byte_pair_encoding_is_refused():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    with pytest.raises(ValueError, match="b'abc' is no merge"):
        hugging_face_tokenizer(
            tiktoken.Encoding("odd", pat_str=r".", mergeable_ranks=ranks, special_tokens={})
        )
    ranks = {bytes([byte]): byte for byte in range(256)}
    gap = tiktoken.Encoding("gap", pat_str=r".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})
    with pytest.raises(ValueError, match="encoding 'gap' must have the ids 0 to 300, each once"):
        hugging_face_tokenizer(gap)
