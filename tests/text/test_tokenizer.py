"""Byte pair encoding: equal to tiktoken and Hugging Face, exact in streams and files, clear about bad input."""

import base64
import json
import random
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken.load
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data import download
from shared.data.corpus import load_languages, load_stories, stories_text
from shared.generation.streaming import decode_stream
from shared.pretraining.evaluation import token_byte_lengths
from shared.pretraining.shards import _fingerprint as fingerprint
from shared.text.dataset import encode_documents
from shared.text.merges import (
    BYTE_TO_UNICODE,
    SINGLE_BYTES,
)
from shared.text.tokenizer import END, GPT2_PATTERN, BPETokenizer, check_apart
from shared.training.batches import document_row
from shared.weights.huggingface import hugging_face_tokenizer

GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|endoftext|>", "<|endoftext|>!", "<|", "<|pad|>")
TOKENIZER = BPETokenizer.train([story.text for story in load_stories()], 2048)
ENCODING = TOKENIZER.to_tiktoken()
ASSIGNED = "".join(chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs"))


def hugging_face(tokenizer: BPETokenizer) -> tokenizers.Tokenizer:
    merges = [tuple("".join(map(BYTE_TO_UNICODE.get, part)) for part in merge) for merge in tokenizer.merges]
    names = [*BYTE_TO_UNICODE.values(), *map("".join, merges)]
    result = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, merges))
    result.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(tokenizer.pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return result


HUGGING_FACE = hugging_face(TOKENIZER)
WITH_PATTERN = {
    pattern: BPETokenizer(TOKENIZER.merges[:800], SPECIALS, pattern)
    for pattern in (GPT2_PATTERN, GPT4_PATTERN)
}
APART = BPETokenizer(TOKENIZER.merges, ("<|endoftext|>", "<|pad|>"), GPT4_PATTERN)
APART_ENCODING = APART.to_tiktoken()


def agreed_characters() -> str:
    """Return the characters that `regex` and tiktoken class alike; all those assigned in Unicode 14 are."""
    different = set()
    for kind in (r"\p{L}", r"\p{N}", r"\s"):
        ranks = {single: i for i, single in enumerate(SINGLE_BYTES)}
        rust = tiktoken.Encoding("kind", pat_str=kind, mergeable_ranks=ranks, special_tokens={})
        different |= set(regex.findall(kind, ASSIGNED)) ^ set(rust.decode(rust.encode_ordinary(ASSIGNED)))
    if unicodedata.unidata_version == "14.0.0":
        assert not different
    return "".join(sorted(set(ASSIGNED) - different))


CHARACTERS = agreed_characters()
SNIPPETS = [
    *(
        "'",
        "'s",
        "'ll",
        "'L",
        "'ſ",
        " ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "\x85",
        "\u3000",
        "\u180e",
        "the",
        " river",
        "l",
    ),
    *(
        "123",
        "٣",
        "<|",
        "|>",
        "<|endoftext|>",
        "endoftext",
        "!",
        "👩‍🚀",
        "河",
        "é",
        "e\u0301",
        "\x00",
        "\x1c",
    ),
]
# The 128 characters from U+0080 on stand for snippets, so that these come often.
INSERTED = {0x80 + i: SNIPPETS[i % len(SNIPPETS)] for i in range(128)}
TEXTS = st.text(CHARACTERS, max_size=12).map(lambda text: text.translate(INSERTED))


# Training


def test_training_on_one_text_or_on_its_documents_keeps_them_apart():
    assert BPETokenizer.train("abab abab", 300).merges == BPETokenizer.train(["abab", " abab"], 300).merges
    apart = BPETokenizer.train(["ab", "ab"], 300)
    joined = BPETokenizer.train("abab", 300)
    assert (b"ab", b"ab") in joined.merges and (b"ab", b"ab") not in apart.merges


def test_special_tokens_in_training_text_are_borders_and_teach_nothing():
    assert BPETokenizer.train("ab<|endoftext|>cd", 300).merges == BPETokenizer.train(["ab", "cd"], 300).merges


def test_training_ends_early_when_no_pair_is_left():
    tokenizer = BPETokenizer.train("abc", 1000)
    assert tokenizer.n_vocab == 256 + 2 + 1
    assert tokenizer.encode("abc") == [257]


def test_vocabulary_counts_bytes_merges_and_special_tokens_which_come_last():
    tokenizer = BPETokenizer.train(stories_text(), 300, SPECIALS)
    assert tokenizer.n_vocab == 300 == 256 + len(tokenizer.merges) + len(SPECIALS)
    assert tokenizer.special_ids == {token: 296 + i for i, token in enumerate(SPECIALS)}
    assert tokenizer.eot_token == 296
    assert APART.eot_token == APART_ENCODING.eot_token and APART.n_vocab == APART_ENCODING.n_vocab


# Encoding and decoding


def test_the_first_ids_are_the_bytes_in_gpt2s_order():
    names = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert list(BYTE_TO_UNICODE.values()) == names
    assert BPETokenizer(()).encode("!") == [0]
    assert BPETokenizer(()).decode_bytes(range(256)) == b"".join(SINGLE_BYTES)


@pytest.mark.parametrize("text", [stories_text(), *(p.text for p in load_languages())])
def test_ids_of_bundled_texts_equal_tiktokens_and_hugging_faces(text):
    ids = TOKENIZER.encode(text)
    assert ids == ENCODING.encode(text) == HUGGING_FACE.encode(text).ids
    assert TOKENIZER.decode(ids) == text


@settings(max_examples=10_000, deadline=None)
@given(TEXTS)
def test_ids_of_generated_texts_equal_tiktokens_and_hugging_faces(text):
    ids = TOKENIZER.encode(text, disallowed_special=())
    assert ids == ENCODING.encode(text, disallowed_special=()) == HUGGING_FACE.encode(text).ids
    assert TOKENIZER.decode(ids) == text


@settings(max_examples=1000, deadline=None)
@given(TEXTS, st.sampled_from(["all", (), {"<|endoftext|>"}, {"<|pad|>"}]))
def test_gpt4s_pattern_and_special_tokens_equal_tiktokens(text, allowed):
    allowed = allowed if allowed == "all" else set(allowed)
    special = {"allowed_special": allowed, "disallowed_special": ()}
    assert APART.encode(text, **special) == APART_ENCODING.encode(text, **special)


def test_a_long_pre_token_is_encoded_like_tiktoken():
    text = "".join(random.Random(0).choices("etaoins", k=20_000))
    assert TOKENIZER.encode(text) == ENCODING.encode(text)


def test_a_full_cache_changes_nothing(monkeypatch):
    monkeypatch.setattr(BPETokenizer, "CACHED_PIECES", 3)
    tokenizer = BPETokenizer(TOKENIZER.merges)
    assert tokenizer.encode(stories_text()) == ENCODING.encode(stories_text())


def test_decoding_takes_any_whole_numbers_and_replaces_invalid_utf8_like_tiktoken():
    ids = TOKENIZER.encode("河 river")
    assert TOKENIZER.decode(np.array(ids)) == TOKENIZER.decode(torch.tensor(ids)) == "河 river"
    assert TOKENIZER.decode(ids[1:]) == ENCODING.decode(ids[1:])
    assert TOKENIZER.decode_bytes(ids[1:]) == ENCODING.decode_bytes(ids[1:]) == "河 river".encode()[1:]
    with pytest.raises(UnicodeDecodeError):
        TOKENIZER.decode(ids[1:], errors="strict")
    assert TOKENIZER.decode([]) == "" and TOKENIZER.decode([TOKENIZER.eot_token]) == "<|endoftext|>"


def test_empty_text_has_no_ids():
    assert TOKENIZER.encode("") == [] == list(TOKENIZER.encode_iterable([]))
    assert list(TOKENIZER.encode_iterable(["", ""])) == []


# Streams


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN], ids=["gpt2", "gpt4"])
@settings(max_examples=1000, deadline=None)
@given(
    text=TEXTS,
    cuts=st.lists(st.floats(0, 1), max_size=8),
    chunk=st.sampled_from([1, 2, 5, 65_536]),
    special=st.sampled_from(
        [
            {"allowed_special": "all"},
            {"disallowed_special": ()},
            {"allowed_special": {"<|"}, "disallowed_special": ()},
        ]
    ),
)
def test_the_ids_of_a_stream_are_those_of_the_whole(pattern, text, cuts, chunk, special):
    tokenizer = WITH_PATTERN[pattern]
    borders = [0, *sorted(round(cut * len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in pairwise(borders)]
    whole = tokenizer.encode(text, **special)
    assert list(tokenizer.encode_iterable(chunks, chunk=chunk, **special)) == whole
    assert list(tokenizer.encode_iterable(list(text), chunk=1, **special)) == whole


def test_a_stream_holds_little_of_the_text():
    held = read = 0

    def blocks():
        nonlocal read
        for _ in range(200):
            read += 10_000
            yield "the river is wide, and " * 435

    produced = 0
    for token in TOKENIZER.encode_iterable(blocks()):
        produced += len(TOKENIZER.decode_bytes([token]))
        held = max(held, read - produced)
    assert held < 200_000


def test_an_endless_pre_token_takes_linear_time_in_a_stream():
    # Re-reading all of it at each block would be 500 times the work.
    count = sum(
        len(TOKENIZER.decode_bytes([i])) for i in TOKENIZER.encode_iterable("a" * 100 for _ in range(5_000))
    )
    assert count == 500_000


def test_a_disallowed_special_token_is_found_across_the_border_with_its_position():
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' at position 7"):
        list(TOKENIZER.encode_iterable(["abc def", "<|endof", "text|>"], chunk=1))


# Special tokens


def test_special_tokens_are_refused_allowed_or_spelled_like_tiktokens():
    text = "a<|endoftext|>b"
    for refused in (
        {},
        {"allowed_special": set(), "disallowed_special": "all"},
        {"disallowed_special": set(END)},
    ):
        for tokenizer in (TOKENIZER, ENCODING):
            with pytest.raises(ValueError, match="disallowed"):
                tokenizer.encode(text, **refused)
    for taken in (
        {"allowed_special": "all"},
        {"allowed_special": set(END)},
        {"disallowed_special": ()},
        {"allowed_special": set(END), "disallowed_special": ()},
    ):
        assert TOKENIZER.encode(text, **taken) == ENCODING.encode(text, **taken)


def test_the_longest_special_token_wins():
    tokenizer = BPETokenizer((), SPECIALS)
    ids = tokenizer.special_ids
    assert tokenizer.encode("<|endoftext|>!<|", allowed_special="all") == [ids["<|endoftext|>!"], ids["<|"]]


def test_without_special_tokens_their_text_is_ordinary():
    assert BPETokenizer((), ()).encode("<|endoftext|>") == BPETokenizer(()).encode(
        "<|endoftext|>", disallowed_special=()
    )


# Names of tiktoken


def test_the_names_of_tiktokens_encoding_mean_the_same():
    texts = ["The sea.", "", "it's 河"]
    assert (TOKENIZER.n_vocab, TOKENIZER.eot_token) == (ENCODING.n_vocab, ENCODING.eot_token)
    assert TOKENIZER.encode_ordinary("a<|endoftext|>") == ENCODING.encode_ordinary("a<|endoftext|>")
    assert TOKENIZER.encode_batch(texts) == ENCODING.encode_batch(texts)
    taken = {"allowed_special": {"<|endoftext|>"}}
    assert TOKENIZER.encode_batch(END, **taken) == ENCODING.encode_batch(list(END), **taken) == [[2047]]
    rows = [ENCODING.encode(text) for text in texts]
    assert TOKENIZER.decode_batch(rows) == ENCODING.decode_batch(rows) == texts
    assert TOKENIZER.token_byte_values() == ENCODING.token_byte_values()
    for token in range(TOKENIZER.n_vocab):
        single = TOKENIZER.decode_single_token_bytes(token)
        assert single == ENCODING.decode_single_token_bytes(token)
        assert TOKENIZER.encode_single_token(single) == ENCODING.encode_single_token(single) == token
        assert TOKENIZER.vocab[single] == token
    assert TOKENIZER.encode_single_token(" the") == ENCODING.encode_single_token(" the")
    assert len(TOKENIZER.vocab) == TOKENIZER.n_vocab


def test_a_special_token_spelled_like_an_ordinary_one_is_found_as_tiktoken_finds_it():
    tokenizer = BPETokenizer((), ("a", "b<"))
    assert tokenizer.n_vocab == 258 and tokenizer.decode([256, 257]) == "ab<"
    for text in ("a", "b<"):
        assert tokenizer.encode_single_token(text) == tokenizer.to_tiktoken().encode_single_token(text)


def test_our_tokenizer_stands_wherever_the_course_takes_tiktokens():
    ids = TOKENIZER.encode("The river 河 was white.")
    for take in (
        lambda encoding: list(decode_stream(encoding, iter(ids))),
        lambda encoding: document_row("The sea.<|endoftext|>", encoding),
        lambda encoding: token_byte_lengths(encoding, 2100).tolist(),
        lambda encoding: fingerprint(encoding),
        lambda encoding: hugging_face_tokenizer(encoding).to_str(),
        lambda encoding: [
            chunk.tolist() for chunk in encode_documents(["a", "b c"], encoding.encode_ordinary, 7)
        ],
    ):
        assert take(TOKENIZER) == take(ENCODING)


# Special tokens that overlap


@pytest.mark.parametrize(
    "special_tokens",
    [
        ("<|im|>", "<|im|>user"),
        ("<|im|>user", "<|im|>"),
        ("<|endoftext|>", "<|endoftext|><|endoftext|>"),
        ("a<|im|>b", "<|im|>"),
        ("user<|im|>", "<|im|>"),
        ("<|a", "a|>"),
        ("xy", "<|pad|>", "yz"),
    ],
)
def test_special_tokens_that_overlap_are_refused_by_both_exports(special_tokens):
    with pytest.raises(ValueError, match="special_tokens must not overlap one another, got"):
        check_apart(special_tokens)
    tokenizer = BPETokenizer(TOKENIZER.merges[:50], special_tokens)
    for export in (tokenizer.to_tiktoken, lambda: hugging_face_tokenizer(tokenizer)):
        with pytest.raises(ValueError, match="special_tokens must not overlap"):
            export()
    special_ids = {name: 306 + i for i, name in enumerate(special_tokens)}
    ranks = {token: i for token, i in tokenizer.vocab.items() if i < 306}
    theirs = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special_ids)
    with pytest.raises(ValueError, match="special_tokens must not overlap"):
        hugging_face_tokenizer(theirs)


def test_usual_sets_of_special_tokens_are_apart():
    check_apart(("<s>", "</s>", "<pad>", "<unk>", "[INST]", "[/INST]"))
    check_apart([f"<|reserved_special_token_{i}|>" for i in range(250)] + ["<|endoftext|>", "<|eot_id|>"])
    check_apart(("aa", "b"))  # a token may overlap itself
    check_apart(())


@settings(max_examples=300, deadline=None)
@given(
    st.sets(st.text("ab<", min_size=1, max_size=3), min_size=1, max_size=3),
    st.text("ab<", max_size=12),
    st.data(),
)
def test_special_tokens_that_are_apart_have_tiktokens_ids_and_errors(special_tokens, text, data):
    tokenizer = BPETokenizer([(b"a", b"b")], sorted(special_tokens))
    try:
        encoding = tokenizer.to_tiktoken()
    except ValueError:
        return
    allowed = data.draw(st.sets(st.sampled_from(sorted(special_tokens))))
    disallowed = data.draw(st.sampled_from(["all", ()]))

    def outcome(engine) -> list[int] | str:
        try:
            return engine.encode(text, allowed_special=allowed, disallowed_special=disallowed)
        except ValueError:
            return "disallowed"

    assert outcome(tokenizer) == outcome(encoding)


# Files


def test_the_two_files_of_gpt2_cannot_be_swapped_unnoticed(tmp_path):
    merges, vocab = tmp_path / "merges.txt", tmp_path / "vocab.json"
    with pytest.raises(TypeError, match="positional"):
        TOKENIZER.save_gpt2_files(merges, vocab)
    TOKENIZER.save_gpt2_files(merges_path=merges, vocab_path=vocab)
    with pytest.raises(TypeError, match="positional"):
        BPETokenizer.from_gpt2_files(vocab, merges)
    with pytest.raises(ValueError, match=r"vocab\.json, line 1: not two tokens in visible characters"):
        BPETokenizer.from_gpt2_files(merges_path=vocab, vocab_path=merges)


def test_tiktokens_format_comes_back_and_tiktoken_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    path = tmp_path / "a.tiktoken"
    TOKENIZER.save(path)
    again = BPETokenizer.load(path, special_tokens=SPECIALS, pattern=GPT4_PATTERN)
    assert again.merges == TOKENIZER.merges
    assert (again.special_tokens, again.pattern) == (SPECIALS, GPT4_PATTERN)
    assert tiktoken.load.load_tiktoken_bpe(str(path)) == ENCODING._mergeable_ranks
    assert [file.name for file in tmp_path.iterdir()] == ["a.tiktoken"]


def test_gpt2s_format_comes_back_and_both_libraries_read_it(tmp_path):
    merges, vocab = tmp_path / "merges.txt", tmp_path / "vocab.json"
    tokenizer = BPETokenizer(TOKENIZER.merges, SPECIALS)
    tokenizer.save_gpt2_files(merges_path=merges, vocab_path=vocab)
    again = BPETokenizer.from_gpt2_files(merges_path=merges, vocab_path=vocab, special_tokens=SPECIALS)
    assert (again.merges, again.special_ids) == (tokenizer.merges, tokenizer.special_ids)
    hf = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert hf.encode(stories_text()).ids == tokenizer.encode(stories_text())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.tiktoken"
    TOKENIZER.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        BPETokenizer(()).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


XYZZY = base64.b64encode(b"xyzzy").decode()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [*lines[:300], "!!! 300", *lines[301:]], 301),
        (lambda lines: [*lines[:300], "", *lines[301:]], 301),
        (lambda lines: [*lines[:300], lines[300].split()[0], *lines[301:]], 301),
        (lambda lines: [*lines[:300], lines[300] + " 1", *lines[301:]], 301),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[1], *lines[1:]], 1),
        (lambda lines: lines[:200], 201),
        (lambda lines: [], 1),
        (lambda lines: [*lines[:300], f"{XYZZY} 300"], 301),
        (lambda lines: [*lines[:300], lines[299].split()[0] + " 300"], 301),
        (lambda lines: [*lines[:300], "\xff 300"], 301),
    ],
)
def test_a_damaged_tiktoken_file_names_file_and_line(tmp_path, damage, line):
    path = tmp_path / "a.tiktoken"
    TOKENIZER.save(path)
    path.write_bytes("\n".join(damage(path.read_text().splitlines())).encode("latin-1"))
    with pytest.raises(ValueError, match=rf"a\.tiktoken, line {line}: "):
        BPETokenizer.load(path)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [*lines[:50], "a", *lines[51:]], 51),
        (lambda lines: [*lines[:50], "a b c", *lines[51:]], 51),
        (lambda lines: [*lines[:50], "a 中", *lines[51:]], 51),
        (lambda lines: [*lines[:50], "", *lines[51:]], 51),
        (lambda lines: [*lines[:50], lines[49], *lines[50:]], 51),
        (lambda lines: [*lines[:50], "xyz zy", *lines[51:]], 51),
        (lambda lines: lines[:1] + lines[20:], 3),
    ],
)
def test_a_damaged_merges_file_names_file_and_line(tmp_path, damage, line):
    merges, vocab = tmp_path / "merges.txt", tmp_path / "vocab.json"
    TOKENIZER.save_gpt2_files(merges_path=merges, vocab_path=vocab)
    lines = merges.read_text(encoding="utf-8").splitlines()
    merges.write_text("\n".join(damage(lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"merges\.txt, line {line}: "):
        BPETokenizer.from_gpt2_files(merges_path=merges, vocab_path=vocab)


def test_a_merges_file_cut_short_does_not_fit_the_vocabulary(tmp_path):
    merges, vocab = tmp_path / "merges.txt", tmp_path / "vocab.json"
    TOKENIZER.save_gpt2_files(merges_path=merges, vocab_path=vocab)
    merges.write_text("\n".join(merges.read_text(encoding="utf-8").splitlines()[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json: other tokens or ids .*merges\.txt"):
        BPETokenizer.from_gpt2_files(merges_path=merges, vocab_path=vocab)


@pytest.mark.parametrize(
    "text", ["{", "[1, 2]", '{"!": 0}', '{"!": "a", "b": 1}', '{"!": null, "b": 1}', "\udc80", "null"]
)
def test_a_damaged_vocabulary_names_the_file(tmp_path, text):
    merges, vocab = tmp_path / "merges.txt", tmp_path / "vocab.json"
    TOKENIZER.save_gpt2_files(merges_path=merges, vocab_path=vocab)
    vocab.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"vocab\.json: "):
        BPETokenizer.from_gpt2_files(merges_path=merges, vocab_path=vocab)


def test_vocabulary_ids_with_a_gap_are_refused(tmp_path):
    merges, vocab = tmp_path / "merges.txt", tmp_path / "vocab.json"
    TOKENIZER.save_gpt2_files(merges_path=merges, vocab_path=vocab)
    ids = json.loads(vocab.read_text())
    vocab.write_text(json.dumps({**ids, "<|endoftext|>": 99_999}))
    with pytest.raises(ValueError, match=r"vocab\.json: "):
        BPETokenizer.from_gpt2_files(merges_path=merges, vocab_path=vocab)


def test_a_special_token_written_like_another_token_cannot_be_saved_for_gpt2(tmp_path):
    with pytest.raises(ValueError, match="written like another token"):
        BPETokenizer((), ("a",)).save_gpt2_files(
            merges_path=tmp_path / "merges.txt", vocab_path=tmp_path / "vocab.json"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        BPETokenizer.load(tmp_path / "none.tiktoken")


def test_gpt2s_own_files_give_the_ids_of_tiktokens_gpt2(tmp_path):
    try:
        encoding = download.gpt2_encoding()
        merges, vocab = download.gpt2_merges_file(), download.gpt2_vocab_file()
    except download.DownloadError as error:
        pytest.skip(f"GPT-2's files cannot be had: {error}")
    tokenizer = BPETokenizer.from_gpt2_files(merges_path=merges, vocab_path=vocab)
    text = stories_text()
    assert tokenizer.encode(text) == encoding.encode(text)
    assert tokenizer.n_vocab == 50257 and tokenizer.eot_token == encoding.eot_token
    tokenizer.save_gpt2_files(merges_path=tmp_path / "merges.txt", vocab_path=tmp_path / "vocab.json")
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == merges.read_text(encoding="utf-8")


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: TOKENIZER.encode(b"bytes"), TypeError, "text"),
        (lambda: TOKENIZER.encode(None), TypeError, "text"),
        (lambda: TOKENIZER.encode("ab\ud83dc"), ValueError, "position 2"),
        (lambda: list(TOKENIZER.encode_iterable(["ab", "c\udc00"], chunk=1)), ValueError, "position 3"),
        (lambda: list(TOKENIZER.encode_iterable(["ab", "c\udc00"])), ValueError, "position 3"),
        (lambda: TOKENIZER.encode_iterable("text"), TypeError, "texts"),
        (lambda: TOKENIZER.encode_iterable(5), TypeError, "texts"),
        (lambda: list(TOKENIZER.encode_iterable(["a", b"b"])), TypeError, "text"),
        (lambda: TOKENIZER.encode("x", allowed_special={"<|pad|>"}), ValueError, "allowed_special"),
        (lambda: TOKENIZER.encode("x", disallowed_special=["<|pad|>"]), ValueError, "disallowed_special"),
        (lambda: TOKENIZER.encode("x", allowed_special="<|endoftext|>"), TypeError, "allowed_special"),
        (lambda: TOKENIZER.encode("x", allowed_special=None), TypeError, "allowed_special"),
        (lambda: TOKENIZER.decode([0, 2048]), ValueError, "from 0 to 2047, got 2048"),
        (lambda: TOKENIZER.decode([-1]), ValueError, "-1"),
        (lambda: TOKENIZER.decode([1.0]), TypeError, "int"),
        (lambda: TOKENIZER.decode("12"), TypeError, "int"),
        (lambda: TOKENIZER.decode_single_token_bytes(2048), ValueError, "from 0 to 2047, got 2048"),
        (
            lambda: TOKENIZER.encode_single_token("河"),
            ValueError,
            "text_or_bytes must be one token, got '河'",
        ),
        (lambda: TOKENIZER.encode_single_token("\ud800"), ValueError, "text_or_bytes must be one token"),
        (lambda: TOKENIZER.encode_batch("text"), TypeError, "texts"),
        (lambda: TOKENIZER.decode(12), TypeError, "int"),
        (lambda: BPETokenizer.train("", 300), ValueError, "texts is empty"),
        (lambda: BPETokenizer.train([], 300), ValueError, "texts is empty"),
        (lambda: BPETokenizer.train("<|endoftext|>", 300), ValueError, "texts is empty"),
        (lambda: BPETokenizer.train("text", 256), ValueError, "vocab_size must be at least 257, got 256"),
        (lambda: BPETokenizer.train("text", 300.0), TypeError, "vocab_size"),
        (lambda: BPETokenizer.train("text", True), TypeError, "vocab_size"),
        (lambda: BPETokenizer.train(b"text", 300), TypeError, "texts"),
        (lambda: BPETokenizer.train(5, 300), TypeError, "texts"),
        (lambda: BPETokenizer.train(["a", None], 300), TypeError, "texts"),
        (lambda: BPETokenizer.train("a\ud800", 300), ValueError, "position 1"),
        (lambda: BPETokenizer.train("two words", 300, pattern=r"\w+"), ValueError, "skips"),
        (lambda: BPETokenizer((), ("a", "a")), ValueError, "special_tokens"),
        (lambda: BPETokenizer((), ("",)), ValueError, "special_tokens"),
        (lambda: BPETokenizer((), "<|endoftext|>"), TypeError, "special_tokens"),
        (lambda: BPETokenizer((), (1,)), TypeError, "special_tokens"),
        (lambda: BPETokenizer((), ("\ud800",)), ValueError, "special_tokens"),
        (lambda: BPETokenizer((), pattern="("), ValueError, "malformed"),
        (lambda: BPETokenizer((), pattern="(a)|."), ValueError, "capturing"),
        (lambda: BPETokenizer((), pattern=r"\s*"), ValueError, "empty"),
        (lambda: BPETokenizer((), pattern=None), TypeError, "pattern"),
        (lambda: BPETokenizer([("a", "b")]), TypeError, "merges"),
        (lambda: BPETokenizer([b"ab"]), TypeError, "merges"),
        (lambda: BPETokenizer([(b"a", b"bc")]), ValueError, "no merge"),
        (lambda: BPETokenizer([(b"a", b"b"), (b"a", b"b")]), ValueError, "no merge"),
        (lambda: BPETokenizer([(b"a", b"")]), ValueError, "no merge"),
        (lambda: BPETokenizer([(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]), ValueError, "no merge"),
        (lambda: BPETokenizer((), ()).eot_token, ValueError, "eot_token"),
        (lambda: BPETokenizer((), ("<|pad|>",)).eot_token, ValueError, "eot_token"),
    ],
)
def test_bad_input_is_refused_with_its_name_and_value(call, error, says):
    with pytest.raises(error, match=regex.escape(says)):
        call()
