"""`shared.generation.streaming`: pieces that make the whole, whole characters, and stop strings."""

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.generation.beam_search import beam_search
from shared.generation.engine import generate
from shared.generation.streaming import (
    check_stop_strings,
    decode_stream,
    forbid_unknown,
    generate_text,
    stream_text,
)
from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding, tale_tokenizer
from shared.text.tokenizer import GPT2_PATTERN
from tests.generation.decoders import broken_weights, build

# One token for each byte, and two tokens that cut characters in two.
BYTES = tiktoken.Encoding(
    "bytes",
    pat_str=r"(?s).+",
    mergeable_ranks={bytes([i]): i for i in range(256)} | {b"a\xc3": 256, b"\xa9b": 257},
    special_tokens={"<|endoftext|>": 258},
)


def pieces_of(ids: list[int], stop_strings: tuple[str, ...] = ()) -> list[str]:
    """Stream a given list of ids as text: a model that writes what it is told."""
    return list(stream_text(Parrot(ids), BYTES, [0], len(ids), stop_strings=stop_strings))


class Parrot(nn.Module):
    """A decoder that writes the given ids whatever it reads, and needs no cache."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids, self.n_calls = ids, 0
        self.config = GPTConfig(vocab_size=259, context_length=len(ids) + 1)
        self.weight = nn.Parameter(torch.zeros(()))

    def new_caches(self, max_length: int) -> list:
        return []

    def forward(self, tokens: torch.Tensor, **options: object) -> torch.Tensor:
        self.n_calls += 1
        return nn.functional.one_hot(torch.tensor([[self.ids[self.n_calls - 1]]]), 259).float()


@settings(deadline=None)
@given(st.lists(st.integers(0, 257), min_size=1, max_size=30))
def test_pieces_of_any_bytes_make_the_whole(ids):
    assert "".join(decode_stream(BYTES, iter(ids))) == BYTES.decode(ids)
    assert "".join(pieces_of(ids)) == BYTES.decode(ids)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_no_character_is_split(text):
    pieces = pieces_of(list(text.encode("utf-8")))
    assert "".join(pieces) == text and all(len(piece) == 1 for piece in pieces)


def test_a_token_may_hold_parts_of_two_characters():
    assert pieces_of([256, 257]) == ["a", "éb"]
    assert pieces_of([256]) == ["a", "\ufffd"]


@settings(deadline=None, max_examples=200)
@given(
    st.text("abé", min_size=1, max_size=25),
    st.lists(st.text("abé", min_size=1, max_size=5), max_size=3),
    st.randoms(use_true_random=False),
)
def test_stop_strings(text, stop_strings, rng):
    """Against a search from left to right over the finished text, however it is cut into tokens."""
    ends = [n for n in range(1, len(text) + 1) if text[:n].endswith(tuple(stop_strings))]
    expected = text
    if ends:
        expected = text[: ends[0] - max(len(s) for s in stop_strings if text[: ends[0]].endswith(s))]
    ids = BYTES.encode_ordinary(text) if rng.random() < 0.5 else list(text.encode("utf-8"))
    pieces = pieces_of(ids, tuple(stop_strings))
    assert "".join(pieces) == expected


def test_a_stop_string_is_held_back_and_ends_the_work():
    ids = list(b"xx END yy")
    model = Parrot(ids)
    assert list(stream_text(model, BYTES, [0], len(ids), stop_strings=["END"])) == ["x", "x", " "]
    assert model.n_calls == 6  # no token is computed after the stop string
    assert pieces_of(list(b"E EN EMD"), ("END",)) == ["E ", "EN ", "EM", "D"]


def test_end_of_text_stops_by_default():
    ids = [*b"ab", 258, *b"cd"]
    assert pieces_of(ids) == ["a", "b"]
    assert "".join(stream_text(Parrot(ids), BYTES, [0], 5, stop_tokens=())) == "ab<|endoftext|>cd"


def test_text_of_a_model():
    encoding = tale_encoding()
    model = build(vocab_size=encoding.n_vocab)
    ids = encoding.encode_ordinary("One day")
    written = generate(model, [ids], 12, temperature=1.0, seed=1)[0]
    options = {"temperature": 1.0, "seed": 1, "stop_tokens": ()}
    assert generate_text(model, encoding, "One day", 12, **options) == encoding.decode(written)
    assert generate_text(model, encoding, ids, 12, **options) == encoding.decode(written)


def test_bad_text_arguments():
    for wrong in ("", "END", [""], [3]):
        with pytest.raises(ValueError, match="stop_strings must be texts of at least one character"):
            stream_text(Parrot([1]), BYTES, [0], 1, stop_strings=wrong or [wrong])
    with pytest.raises(ValueError, match="prompt must be a sequence of ids, got 5"):
        stream_text(Parrot([1]), BYTES, 5, 1)
    with pytest.raises(ValueError, match="prompt must hold ids from 0 to 258, got 259"):
        stream_text(Parrot([1]), BYTES, [259], 1)
    with pytest.raises(TypeError, match="temprature"):
        stream_text(Parrot([1]), BYTES, "a", 1, temprature=1.0)
    with pytest.raises(ValueError, match=r"stop_strings must be texts .* got 5"):
        check_stop_strings(5)
    assert check_stop_strings(["a", "b"]) == ("a", "b") == check_stop_strings(iter("ab"))
    assert check_stop_strings({"a"}) == ("a",)


# --- where model and tokenizer meet


def padded(model: GPTModel, vocab_size: int) -> GPTModel:
    """The model with a larger vocabulary, whose added ids it finds more probable than all others."""
    larger = build(**{**vars(model.config), "vocab_size": vocab_size})
    rows = 50 * torch.sign(torch.randn(vocab_size - model.config.vocab_size, model.config.emb_dim)).double()
    larger.load_state_dict(
        {
            name: torch.cat([value, rows]) if len(value) == model.config.vocab_size else value
            for name, value in model.state_dict().items()
        }
    )
    return larger


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab_size", [2049, 2112])
def test_added_ids_of_a_padded_vocabulary_are_never_chosen(vocab_size, temperature):
    encoding = tale_encoding()
    model = build(vocab_size=encoding.n_vocab)
    larger = padded(model, vocab_size)
    prompt, options = "One day", {"temperature": temperature, "seed": 0, "stop_tokens": ()}
    ids = encoding.encode_ordinary(prompt)
    free = generate(larger, [ids], 20, temperature=temperature, seed=0)[0]
    assert max(free) >= encoding.n_vocab  # without care they would be chosen
    expected = generate_text(model, encoding, prompt, 20, **options)
    assert generate_text(larger, encoding, prompt, 20, **options) == expected
    assert "".join(stream_text(larger, encoding, prompt, 20, **options)) == expected
    # One's own processors come after, and see no added id.
    seen = []
    look = lambda ids, logits: seen.append(logits[:, encoding.n_vocab :].max().item()) or logits
    assert generate_text(larger, encoding, prompt, 20, processors=[look], **options) == expected
    assert set(seen) == {-torch.inf}
    # The same care for ids and for beams.
    careful = forbid_unknown(larger, encoding)
    written = generate(larger, [ids], 20, temperature=temperature, seed=0, processors=careful)[0]
    assert encoding.decode(written) == expected
    for ours, theirs in zip(
        beam_search(larger, ids, 6, beam_size=3, processors=careful),
        beam_search(model, ids, 6, beam_size=3),
        strict=True,
    ):
        assert ours.ids == theirs.ids
    assert forbid_unknown(model, encoding) == ()


def test_gaps_among_the_ids_are_never_chosen():
    ranks = {bytes([i]): i for i in range(256)}
    gaps = tiktoken.Encoding(
        "gaps", pat_str=r".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    assert gaps.n_vocab == 301
    text = generate_text(build(vocab_size=320), gaps, "a", 31, temperature=100.0, seed=0, stop_tokens=())
    assert len(text.replace("<|endoftext|>", "e")) <= 31


def test_a_tokenizer_larger_than_the_model_is_refused_at_the_call():
    for write in (stream_text, generate_text):
        with pytest.raises(ValueError, match=r"encoding must have at most .*vocab_size=256 tokens, got 259"):
            write(build(vocab_size=256), BYTES, "a", 3)


def test_unknown_ids_cannot_be_decoded():
    for wrong in (259, -1, 2**40):
        with pytest.raises(ValueError, match=f"tokens must be ids of the encoding, below 259, got {wrong}"):
            list(decode_stream(BYTES, iter([97, wrong])))
    assert list(decode_stream(BYTES, np.array([97]))) == ["a", ""]


def test_a_text_on_which_tiktoken_panics_is_read_all_the_same():
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("plain", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    text = "x" + " " * 1_000_000 + "y"
    model = build(vocab_size=256)
    expected = generate_text(model, encoding, [*text[-256:].encode()], 3, overflow="slide")
    assert generate_text(model, encoding, text, 3, overflow="slide") == expected


@pytest.mark.parametrize(
    "empty", ["", [], (), np.array([], dtype=np.int64), torch.tensor([], dtype=torch.int64)]
)
def test_an_empty_prompt_is_begun_by_the_end_token(empty):
    model = build(vocab_size=259)
    expected = generate_text(model, BYTES, [BYTES.eot_token], 20, temperature=1.0, seed=0)
    assert expected and generate_text(model, BYTES, empty, 20, temperature=1.0, seed=0) == expected


def test_an_encoding_without_an_end_token():
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("endless", pat_str=r".", mergeable_ranks=ranks, special_tokens={})
    assert generate_text(Parrot([*b"abc"]), encoding, "a", 3) == "abc"
    with pytest.raises(ValueError, match="prompt must not be empty: the encoding has no end-of-text token"):
        generate_text(Parrot([1]), encoding, "", 1)


def test_a_broken_model_writes_no_text():
    ranks = {bytes([i]): i for i in range(39)}
    encoding = tiktoken.Encoding(
        "few", pat_str=r".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 39}
    )
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits must be numbers"):
            generate_text(broken_weights(), encoding, [1], 8, temperature=temperature)


@pytest.mark.parametrize("vocab_size", [2048, 2112])
def test_our_own_tokenizer_works_as_tiktoken(vocab_size):
    ours, theirs = tale_tokenizer(), tale_encoding()
    model = padded(build(vocab_size=2048), 2112) if vocab_size > 2048 else build(vocab_size=2048)
    options = {"temperature": 1.0, "seed": 3}
    for prompt in ("One day", "", [2047, 5]):
        expected = list(stream_text(model, theirs, prompt, 25, **options))
        assert list(stream_text(model, ours, prompt, 25, **options)) == expected
        stop = "".join(expected)[8:10]
        shorter = generate_text(model, theirs, prompt, 25, stop_strings=[stop], **options)
        assert generate_text(model, ours, prompt, 25, stop_strings=[stop], **options) == shorter
        assert len(shorter) < len("".join(expected))
    ids = theirs.encode_ordinary("Zoë and 雨")
    assert list(decode_stream(ours, ids)) == list(decode_stream(theirs, ids))
    with pytest.raises(ValueError, match="tokens must be ids of the encoding"):
        list(decode_stream(ours, [2048]))
    with pytest.raises(ValueError, match="encoding must have at most"):
        generate_text(build(vocab_size=2000), ours, "One day", 3)
