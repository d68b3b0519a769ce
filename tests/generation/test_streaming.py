"""`shared.generation.streaming`: pieces that make the whole, whole characters, and stop strings."""

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.generation.engine import generate
from shared.generation.streaming import check_stop_strings, decode_stream, generate_text, stream_text
from shared.model.gpt import GPTConfig
from shared.tales.encoding import tale_encoding
from tests.generation.decoders import build

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
    with pytest.raises(ValueError, match="at least one id"):
        stream_text(Parrot([1]), BYTES, "", 1)
    with pytest.raises(TypeError, match="temprature"):
        stream_text(Parrot([1]), BYTES, "a", 1, temprature=1.0)
    with pytest.raises(ValueError, match=r"stop_strings must be texts .* got 5"):
        check_stop_strings(5)
    assert check_stop_strings(["a", "b"]) == ("a", "b")
