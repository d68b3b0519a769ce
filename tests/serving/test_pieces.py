"""Tokens become text one by one: the same text that a stream of tokens gives, and each token beside its text."""

from hypothesis import given
from hypothesis import strategies as st

from shared.generation.streaming import decode_stream
from shared.serving.pieces import TextWriter


class Bytes:
    """A tokenizer whose tokens are single bytes."""

    n_vocab = eot_token = 256

    def encode_ordinary(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_single_token_bytes(self, token: int) -> bytes:
        return bytes([token])


def write(tokens, stops=()) -> tuple[list[str], bool, list]:
    writer, pieces, infos = TextWriter(Bytes(), stops), [], []
    for token in tokens:
        text, new = writer.feed(token, (-1.0, {token: -1.0}))
        pieces.append(text)
        infos += new
        if writer.stopped:
            return pieces, True, infos
    text, new = writer.end()
    return [*pieces, text], writer.stopped, infos + new


TEXTS = st.text(st.sampled_from("abcäß€😀"), max_size=30)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_without_stops_all_comes_out_as_a_stream_decodes_it(tokens):
    pieces, stopped, infos = write(tokens)
    assert "".join(pieces) == "".join(decode_stream(Bytes(), tokens)) and not stopped
    assert [info.raw[0] for info in infos] == tokens


@given(TEXTS, st.lists(st.text(st.sampled_from("abcä"), min_size=1, max_size=4), max_size=3))
def test_the_first_stop_string_that_is_complete_ends_it(text, stops):
    pieces, stopped, infos = write(text.encode(), stops)
    # By hand: the shortest beginning that ends with a stop string.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(pieces) == expected and stopped == bool(ends)
    # Never was anything given out that a stop string takes back, and tokens go with their text.
    assert b"".join(info.raw for info in infos).decode("utf-8", "ignore").startswith(expected)
    offsets = [info.offset for info in infos]
    assert offsets == sorted(offsets) and all(offset < len(expected) for offset in offsets)


def test_what_may_become_a_stop_string_waits():
    writer = TextWriter(Bytes(), ["ab!"])
    assert [writer.feed(byte)[0] for byte in b"xaba"] == ["x", "", "", "ab"]
    assert writer.end()[0] == "a" and not writer.stopped


def test_bytes_wait_for_their_character():
    writer = TextWriter(Bytes())
    assert [writer.feed(byte)[0] for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert writer.feed(0xE2)[0] == "" and writer.end()[0] == "\ufffd"
