"""Byte pair encoding: equal to tiktoken and Hugging Face, exact in streams and files, clear about bad input."""

import base64
import json
import random
import unicodedata
from collections import Counter
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
from shared.text.tokenizer import (
    BYTE_TO_UNICODE,
    END,
    GPT2_PATTERN,
    SINGLE_BYTES,
    UNICODE_TO_BYTE,
    BPETokenizer,
    changed_pairs,
    merge_symbols,
    to_symbols,
    train_merges,
)

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


def count_pairs(words: dict[tuple, int]) -> Counter:
    counts = Counter()
    for symbols, occurrences in words.items():
        for pair in pairwise(symbols):
            counts[pair] += occurrences
    return counts


def join_pair(symbols: tuple, pair: tuple) -> tuple:
    joined, place = [], 0
    while place < len(symbols):
        joined.append(b"".join(pair) if symbols[place : place + 2] == pair else symbols[place])
        place += 2 if symbols[place : place + 2] == pair else 1
    return tuple(joined)


def as_bytes(counts: dict[str, int]) -> dict[tuple, int]:
    return {tuple(bytes([byte]) for byte in piece.encode()): n for piece, n in counts.items()}


def naive_merges(counts: dict[str, int], n_merges: int) -> list[tuple]:
    words, merges = as_bytes(counts), []
    while len(merges) < n_merges and (pairs := count_pairs(words)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = {join_pair(symbols, merges[-1]): n for symbols, n in words.items()}
    return merges


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


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text("abé", min_size=1, max_size=12), st.integers(1, 9), min_size=1, max_size=8))
def test_merges_equal_a_naive_trainers(counts):
    assert train_merges(counts, 40) == naive_merges(counts, 40)


def test_merges_on_the_stories_equal_a_naive_trainers():
    counts = Counter(regex.findall(GPT2_PATTERN, stories_text()))
    assert train_merges(counts, 60) == naive_merges(counts, 60)


def test_ties_go_to_the_lexicographically_greater_pair_of_byte_strings():
    assert train_merges({"ab": 1, "cd": 1}, 1) == [(b"c", b"d")]
    # (e, st) is less than (es, t), as e is a beginning of es.
    assert train_merges({"est": 1}, 1) == [(b"s", b"t")]
    assert train_merges({"ab": 3, "abc": 1, "aab": 1}, 2) == naive_merges({"ab": 3, "abc": 1, "aab": 1}, 2)


def test_hugging_faces_merges_are_each_a_most_frequent_pair():
    text = "\n".join(p.text for p in load_languages("en") + load_languages("zh") + load_languages("code"))
    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + 200, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator([text], trainer)
    merges = json.loads(rust.to_str())["model"]["merges"]
    words = as_bytes(Counter(regex.findall(GPT2_PATTERN, text)))
    for merge in merges:
        pair = tuple(bytes(map(UNICODE_TO_BYTE.get, part)) for part in merge)
        counts = count_pairs(words)
        assert counts[pair] == max(counts.values())
        words = {join_pair(symbols, pair): n for symbols, n in words.items()}


def test_training_on_one_text_or_on_its_documents_keeps_them_apart():
    assert BPETokenizer.train("abab abab", 300).merges == BPETokenizer.train(["abab", " abab"], 300).merges
    apart = BPETokenizer.train(["ab", "ab"], 300)
    joined = BPETokenizer.train("abab", 300)
    assert (b"ab", b"ab") in joined.merges and (b"ab", b"ab") not in apart.merges


def test_special_tokens_in_training_text_are_borders_and_teach_nothing():
    assert BPETokenizer.train("ab<|endoftext|>cd", 300).merges == BPETokenizer.train(["ab", "cd"], 300).merges


def test_training_ends_early_when_no_pair_is_left():
    tokenizer = BPETokenizer.train("abc", 1000)
    assert tokenizer.vocab_size == 256 + 2 + 1
    assert tokenizer.encode("abc") == [257]


def test_vocabulary_counts_bytes_merges_and_special_tokens_which_come_last():
    tokenizer = BPETokenizer.train(stories_text(), 300, SPECIALS)
    assert tokenizer.vocab_size == 300 == 256 + len(tokenizer.merges) + len(SPECIALS)
    assert tokenizer.special_ids == {token: 296 + i for i, token in enumerate(SPECIALS)}
    assert tokenizer.eot_token == 296 == tokenizer.to_tiktoken().eot_token
    assert tokenizer.to_tiktoken().n_vocab == 300


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


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=2, max_size=8), min_size=1, max_size=5))
def test_merging_equals_joining_pair_after_pair(text, corpus):
    merges = train_merges(Counter(corpus), 20)
    symbols = tuple(bytes([byte]) for byte in text.encode())
    for merge in merges:
        symbols = join_pair(symbols, merge)
    tokenizer = BPETokenizer(merges)
    assert [tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)] == list(symbols)


@given(st.text("abc", max_size=20), st.text("abc", min_size=2, max_size=2))
def test_changed_pairs_are_the_difference_of_all_pairs(symbols, pair):
    parts = symbols.split(pair)
    before, after = (Counter(map("".join, pairwise(s))) for s in (symbols, "N".join(parts)))
    for was, becomes in changed_pairs(parts, pair, "N"):
        before.update([becomes])
        before.subtract([was])
    before[pair] = 0  # none is left
    assert +before == after


def test_symbols_are_merged_in_order_of_rank():
    a, b, c = map(to_symbols, (b"a", b"b", b"c"))
    ranks = {b + c: 0, a + b: 1}
    assert merge_symbols(a + b + c + a + b, ranks, [b + c, a + b]) == a + chr(256) + chr(257)


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


# Files


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
    tokenizer.save_gpt2_files(merges, vocab)
    again = BPETokenizer.from_gpt2_files(merges, vocab, SPECIALS)
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
    TOKENIZER.save_gpt2_files(merges, vocab)
    lines = merges.read_text(encoding="utf-8").splitlines()
    merges.write_text("\n".join(damage(lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"merges\.txt, line {line}: "):
        BPETokenizer.from_gpt2_files(merges, vocab)


def test_a_merges_file_cut_short_does_not_fit_the_vocabulary(tmp_path):
    merges, vocab = tmp_path / "merges.txt", tmp_path / "vocab.json"
    TOKENIZER.save_gpt2_files(merges, vocab)
    merges.write_text("\n".join(merges.read_text(encoding="utf-8").splitlines()[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json: other tokens or ids .*merges\.txt"):
        BPETokenizer.from_gpt2_files(merges, vocab)


@pytest.mark.parametrize(
    "text", ["{", "[1, 2]", '{"!": 0}', '{"!": "a", "b": 1}', '{"!": null, "b": 1}', "\udc80", "null"]
)
def test_a_damaged_vocabulary_names_the_file(tmp_path, text):
    merges, vocab = tmp_path / "merges.txt", tmp_path / "vocab.json"
    TOKENIZER.save_gpt2_files(merges, vocab)
    vocab.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"vocab\.json: "):
        BPETokenizer.from_gpt2_files(merges, vocab)


def test_vocabulary_ids_with_a_gap_are_refused(tmp_path):
    merges, vocab = tmp_path / "merges.txt", tmp_path / "vocab.json"
    TOKENIZER.save_gpt2_files(merges, vocab)
    ids = json.loads(vocab.read_text())
    vocab.write_text(json.dumps({**ids, "<|endoftext|>": 99_999}))
    with pytest.raises(ValueError, match=r"vocab\.json: "):
        BPETokenizer.from_gpt2_files(merges, vocab)


def test_a_special_token_written_like_another_token_cannot_be_saved_for_gpt2(tmp_path):
    with pytest.raises(ValueError, match="written like another token"):
        BPETokenizer((), ("a",)).save_gpt2_files(tmp_path / "merges.txt", tmp_path / "vocab.json")
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
    tokenizer = BPETokenizer.from_gpt2_files(merges, vocab)
    text = stories_text()
    assert tokenizer.encode(text) == encoding.encode(text)
    assert tokenizer.vocab_size == 50257 and tokenizer.eot_token == encoding.eot_token
    tokenizer.save_gpt2_files(tmp_path / "merges.txt", tmp_path / "vocab.json")
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
