"""The two algorithms of byte pair encoding: equal to the slow, obvious versions, and to what Hugging Face accepts."""

import json
from collections import Counter
from itertools import pairwise

import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.corpus import load_languages, stories_text
from shared.text.merges import (
    SINGLE_BYTES,
    UNICODE_TO_BYTE,
    changed_pairs,
    merge_symbols,
    to_symbols,
    train_merges,
)
from shared.text.tokenizer import GPT2_PATTERN, BPETokenizer


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


# Merges over three letters, in which tokens overlap themselves and long runs are common.
OVERLAPPING = BPETokenizer.train("aaaaaaaaaaaaaaaabaaababbabababab aabaabaab", 300).merges


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(["a", "aa", "aaaaa", "b", "ab", "ba", "c"]), max_size=60).map("".join))
def test_runs_that_overlap_themselves_are_joined_from_the_left(text):
    symbols = tuple(bytes([byte]) for byte in text.encode())
    for merge in OVERLAPPING:
        symbols = join_pair(symbols, merge)
    tokenizer = BPETokenizer(OVERLAPPING)
    assert [tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)] == list(symbols)


def test_a_word_of_any_length_is_merged():
    a, b = map(to_symbols, (b"a", b"b"))
    ranks, pairs = {a + b: 0, chr(256) * 2: 1}, [a + b, chr(256) * 2]
    assert merge_symbols("", ranks, pairs) == ""
    assert merge_symbols(a, ranks, pairs) == a
    assert merge_symbols((a + b) * 100_001, ranks, pairs) == chr(257) * 50_000 + chr(256)
    assert merge_symbols(b + (a + b) * 3 + a, ranks, pairs) == b + chr(257) + chr(256) + a
    assert len(SINGLE_BYTES) == 256
