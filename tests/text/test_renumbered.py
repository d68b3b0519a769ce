"""A tokenizer under other people's ids: the ids of Hugging Face's tokenizers, missing bytes included."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shared.text.renumbered import RenumberedTokenizer
from shared.text.tokenizer import BYTE_TO_UNICODE, SINGLE_BYTES, BPETokenizer

TEXT = "the cat sat on the mat; the hat of the cat, 1999 and 2000. Grüße! " * 20
TRAINED = BPETokenizer.train(TEXT, 320, special_tokens=())
ABSENT = {b"\x04", b"\xf1", b"!"}


def renumbered(absent: set[bytes] = ABSENT) -> tuple[RenumberedTokenizer, Tokenizer]:
    """Return our tokenizer with ids that run backwards, some bytes without, and Hugging Face's of the same kind."""
    tokens = [
        t for t in [*SINGLE_BYTES, *(left + right for left, right in TRAINED.merges)] if t not in absent
    ]
    ids = {token: 5 + len(tokens) - i for i, token in enumerate(tokens)}
    ours = RenumberedTokenizer(TRAINED.merges, ids, {"<|a|>": 0, "<|b|>": 3})
    show = lambda token: "".join(map(BYTE_TO_UNICODE.get, token))
    vocabulary = {show(token): i for token, i in ids.items()} | {"<|a|>": 0, "<|b|>": 3}
    merges = [(show(left), show(right)) for left, right in TRAINED.merges]
    theirs = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(["<|a|>", "<|b|>"])
    return ours, theirs


OURS, THEIRS = renumbered()


@given(st.text(st.sampled_from("the cat!\x04 19,\U00040000é<|a>b\n"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_hugging_face(text):
    assert OURS.encode(text, allowed_special="all") == THEIRS.encode(text).ids


def test_what_has_ids_comes_back_and_what_has_none_is_left_out():
    assert OURS.decode(OURS.encode("the cat, Grüße 2000")) == "the cat, Grüße 2000"
    assert OURS.decode(OURS.encode("the! c\x04at")) == "the cat"
    assert OURS.encode("<|b|>", allowed_special="all") == [3]
    assert OURS.decode_single_token_bytes(3) == b"<|b|>"
    assert OURS.encode_single_token("<|a|>") == 0
    assert OURS.n_vocab == max(OURS.vocab.values()) + 1


def test_tiktoken_has_the_same_ids_and_its_own_for_missing_bytes():
    fast = OURS.to_tiktoken()
    for text in ("the cat sat", "Grüße 1999", "<|a|>the<|b|>"):
        assert fast.encode(text, allowed_special="all") == OURS.encode(text, allowed_special="all")
    assert min(fast.encode("\x04")) >= OURS.n_vocab


def test_files_that_number_by_lines_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no place for other ids"):
        OURS.save(tmp_path / "x.tiktoken")
    with pytest.raises(ValueError, match="no place for other ids"):
        OURS.save_gpt2_files(merges_path=tmp_path / "m", vocab_path=tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_ids_that_do_not_fit_are_refused():
    ids = {token: i for i, token in enumerate([*SINGLE_BYTES, b"th"])}
    with pytest.raises(ValueError, match="every token that the merges make, not b'he'"):
        RenumberedTokenizer([(b"h", b"e")], ids, {})
    with pytest.raises(ValueError, match="one stands twice"):
        RenumberedTokenizer([(b"t", b"h")], ids, {"<|a|>": 0})
