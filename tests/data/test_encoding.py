"""`shared.data.encoding`: tiktoken's ids for every text, and nothing but ordinary exceptions."""

import pickle

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data import download
from shared.data.corpus import stories_text
from shared.data.encoding import SafeEncoding
from shared.tales.encoding import tale_encoding, tale_tokenizer

ENCODING = tale_encoding()
PLAIN = tiktoken.Encoding(
    "plain",
    pat_str=ENCODING._pat_str,
    mergeable_ranks=ENCODING._mergeable_ranks,
    special_tokens=ENCODING._special_tokens,
)
END = "<|endoftext|>"
# White space that overflows the stack of tiktoken's engine.
LONG = {
    "spaces": "x" + " " * 1_000_000 + "y",
    "line breaks": "\n" * 1_100_000,
    "between others": "The sea." + "\t" * 1_000_000 + "It's white.",
}


def gives_up(text: str) -> bool:
    """Return whether tiktoken itself cannot encode a text."""
    try:
        PLAIN.encode(text)
    except ValueError as error:
        return "Regex error" in str(error)
    return False


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_endless_white_space_has_the_ids_of_our_own_tokenizer(text):
    assert gives_up(text)
    ids = tale_tokenizer().encode(text)
    assert ENCODING.encode_ordinary(text) == ENCODING.encode(text) == ids
    assert ENCODING.encode_ordinary_batch([text]) == ENCODING.encode_batch([text]) == [ids]
    assert ENCODING.encode_to_numpy(text).tolist() == ids
    assert ENCODING.decode(ids) == text


def test_special_tokens_beside_endless_white_space():
    text = f"a{END}{LONG['spaces']}{END}"
    ids = ENCODING.encode(text, allowed_special="all")
    assert ids == tale_tokenizer().encode(text, allowed_special="all")
    assert ids.count(ENCODING.eot_token) == 2
    assert ENCODING.encode(text, allowed_special={END}) == ids
    assert ENCODING.encode_ordinary(text).count(ENCODING.eot_token) == 0
    with pytest.raises(ValueError, match="disallowed special token"):
        ENCODING.encode(text)


def test_the_fetched_encoding_is_safe_too():
    try:
        gpt2 = download.gpt2_encoding()
    except download.DownloadError as error:
        pytest.skip(f"GPT-2's files cannot be had: {error}")
    assert gpt2.decode(gpt2.encode_ordinary(LONG["spaces"])) == LONG["spaces"]
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([END, "<|endof", " ", "  ", "\n", "the sea", "'s", "é", "\ud800", "12"])))
def test_pieces_are_the_ids_of_tiktoken(parts):
    text = "".join(parts)
    for allowed in (set(), {END}):
        ids = PLAIN.encode(text, allowed_special=allowed, disallowed_special=())
        assert ENCODING._encode_in_pieces(text, allowed) == ids
        assert ENCODING.encode(text, allowed_special=allowed, disallowed_special=()) == ids
    assert ENCODING.encode_ordinary(text) == PLAIN.encode_ordinary(text)
    assert np.array_equal(ENCODING.encode_to_numpy(text, disallowed_special=()), PLAIN.encode_ordinary(text))


def test_a_safe_encoding_is_tiktokens_in_everything_else():
    assert isinstance(ENCODING, tiktoken.Encoding)
    safe = SafeEncoding.of(PLAIN)
    text = stories_text()
    assert safe.encode(text) == PLAIN.encode(text)
    assert (safe.n_vocab, safe.eot_token, safe.name) == (PLAIN.n_vocab, PLAIN.eot_token, "plain")
    assert pickle.loads(pickle.dumps(safe)).encode_ordinary(LONG["spaces"]) == safe.encode(LONG["spaces"])


def test_what_cannot_be_encoded_is_a_value_error():
    poor = SafeEncoding("poor", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})
    with pytest.raises(ValueError, match="text must be made of tokens of 'poor', got 'ab'"):
        poor.encode_ordinary("ab")
    with pytest.raises(ValueError, match="less white space"):
        ENCODING.encode_with_unstable(LONG["spaces"])
    with pytest.raises(TypeError):
        ENCODING.encode(5)
    with pytest.raises(KeyError):
        ENCODING.decode([99_999])
