"""The checks that Stanford's public course CS336 (assignment 1, "Basics") makes of a tokenizer, in our own words.

Its tests call two things: a tokenizer made of a vocabulary (id to bytes), merges and special tokens, with `encode`,
`encode_iterable` and `decode`, in which special tokens always count; and a function that trains on a file and returns
vocabulary and merges. The two adapters below translate names and shapes, nothing else. GPT-2's files are used where
they can be had, otherwise a tokenizer trained on the bundled stories.
"""

import time
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import regex
import tiktoken

from shared.data import download
from shared.data.corpus import load_languages, stories_text
from shared.tales.generator import TaleGenerator
from shared.text.tokenizer import GPT2_PATTERN, BPETokenizer
from tests.text.test_merges import naive_merges

END = "<|endoftext|>"


class Tokenizer:
    """The assignment's tokenizer on top of ours."""

    def __init__(
        self, vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str]
    ) -> None:
        self.ours = BPETokenizer(merges, special_tokens)
        assert set(vocab.values()) == set(self.ours.vocab)

    def encode(self, text: str) -> list[int]:
        return self.ours.encode(text, allowed_special="all")

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        return self.ours.encode_iterable(texts, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self.ours.decode(ids)


def train_bpe(path: Path, vocab_size: int, special_tokens: list[str]) -> tuple[dict[int, bytes], list]:
    """The assignment's function on top of ours: vocabulary by id, and merges."""
    trained = BPETokenizer.train(path.read_text(encoding="utf-8"), vocab_size, special_tokens)
    return {i: token for token, i in trained.vocab.items()}, trained.merges


@pytest.fixture(scope="module")
def merges() -> list[tuple[bytes, bytes]]:
    """GPT-2's merges where they can be had, else 4,000 of the stories."""
    try:
        files = {"merges_path": download.gpt2_merges_file(), "vocab_path": download.gpt2_vocab_file()}
    except download.DownloadError:
        return BPETokenizer.train(stories_text(), 4096).merges
    return BPETokenizer.from_gpt2_files(**files).merges


@pytest.fixture(scope="module")
def reference(merges) -> tiktoken.Encoding:
    """tiktoken's own class, made without ours: GPT-2's encoding where it can be had."""
    singles = [bytes([b]) for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    singles += [bytes([b]) for b in range(256) if bytes([b]) not in singles]
    ranks = {token: i for i, token in enumerate([*singles, *(left + right for left, right in merges)])}
    return tiktoken.Encoding(
        "reference", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )


@pytest.fixture(scope="module")
def tokenizer(merges, reference) -> Tokenizer:
    tokens = [*reference.token_byte_values(), END.encode()]
    return Tokenizer(dict(enumerate(tokens)), merges, [END])


TEXTS = {
    "nothing": "",
    "one letter": "s",
    "one character of four bytes": "🙃",
    "a question": "Hello, how are you?",
    "accents and emoji": "Héllò hôw are ü? 🙃",
    "special tokens": f"Héllò hôw {END}{END} are ü? 🙃{END}",
    "a special token and a line break": f"The end.{END}\n",
    "a special token between blank lines": f"{END}\n\nOnce more.\n\n{END}\n\n",
    "a tale": next(iter(TaleGenerator(5).stories(1))).text,
    "spaces and line breaks": "  a\n\n\n b \t\r\n   ",
    "stories": stories_text(),
} | {f"{p.language} {p.number}": p.text for p in load_languages() if p.number <= 2}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ids_are_tiktokens_and_the_text_comes_back(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text, allowed_special={END})
    assert tokenizer.decode(ids) == text
    assert list(tokenizer.encode_iterable(text.splitlines(keepends=True))) == ids


def test_special_tokens_stay_whole_and_one_id_each(tokenizer):
    ids = tokenizer.encode(TEXTS["special tokens"])
    assert [tokenizer.decode([i]) for i in ids].count(END) == 3


def test_of_overlapping_special_tokens_the_longer_one_counts(merges, reference):
    double = END + END
    tokens = [*reference.token_byte_values(), END.encode(), double.encode()]
    tokenizer = Tokenizer(dict(enumerate(tokens)), merges, [END, double])
    text = f"Hello, how {double} are you?{END}"
    ids = tokenizer.encode(text)
    pieces = [tokenizer.decode([i]) for i in ids]
    assert (pieces.count(END), pieces.count(double)) == (1, 1)
    assert tokenizer.decode(ids) == text


def test_a_file_is_encoded_in_little_memory(tokenizer, tmp_path):
    path = tmp_path / "five_megabytes.txt"
    path.write_text(stories_text() * 50, encoding="utf-8")
    assert path.stat().st_size > 5_000_000
    list(tokenizer.encode_iterable([stories_text()]))  # fills the cache, which is bounded
    with path.open(encoding="utf-8") as file:
        tracemalloc.start()
        n_ids = sum(1 for _ in tokenizer.encode_iterable(file))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert n_ids > 1_000_000
    assert peak < 4_000_000  # less than the file, and the same for a file of any length


def test_decoding_replaces_bytes_that_are_no_text(tokenizer):
    ids = tokenizer.encode("🙃")
    assert "\ufffd" in tokenizer.decode(ids[:1])


# Training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """About as much English as the assignment trains on (0.13 MB)."""
    path = tmp_path_factory.mktemp("cs336") / "corpus.txt"
    path.write_text(stories_text() + TaleGenerator(3).text(30_000), encoding="utf-8")
    return path


def test_training_500_tokens_takes_less_than_a_second_and_a_half(corpus):
    started = time.process_time()
    train_bpe(corpus, 500, [END])
    assert time.process_time() - started < 1.5


def test_training_gives_the_merges_and_the_vocabulary_of_the_slow_version(corpus):
    vocab, merges = train_bpe(corpus, 300, [END])
    counts = {}
    for segment in corpus.read_text(encoding="utf-8").split(END):
        for piece in regex.findall(GPT2_PATTERN, segment):
            counts[piece] = counts.get(piece, 0) + 1
    assert merges == naive_merges(counts, 300 - 257)
    assert sorted(vocab) == list(range(300))
    expected = {bytes([b]) for b in range(256)} | {left + right for left, right in merges} | {END.encode()}
    assert set(vocab.values()) == expected


def test_special_tokens_teach_nothing(tmp_path):
    path = tmp_path / "documents.txt"
    path.write_text(END.join(["The sea was white."] * 50 + ["Nobody said | or <."] * 50), encoding="utf-8")
    vocab, _ = train_bpe(path, 400, [END])
    assert END.encode() in vocab.values()
    assert not [token for token in vocab.values() if b"<|" in token and token != END.encode()]
