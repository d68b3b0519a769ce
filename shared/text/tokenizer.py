"""Byte-level byte pair encoding with the token ids of tiktoken and Hugging Face's tokenizers.

Text is cut at special tokens, then into pre-tokens by a pattern; merges happen inside a pre-token's UTF-8
bytes. Follows Sennrich et al. (2016) and GPT-2 (Radford et al., 2019), and reads and writes tiktoken's
and GPT-2's files. Leaves out normalisation, dropout, parallel training and character offsets. Later
chapters use `BPETokenizer.to_tiktoken`.

Explained and proven in ch02_text_data/03_byte_pair_encoding.ipynb; written from there by `make promote`.
"""

import base64
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain
from operator import add, index
from pathlib import Path
from typing import Self

import regex
import tiktoken

from shared.checks import check_several, check_text, whole_number

# The pattern and the special token of GPT-2, and its table from byte to visible character, in the order of its ids.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END = ("<|endoftext|>",)
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_TO_UNICODE = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
UNICODE_TO_BYTE = {character: byte for byte, character in BYTE_TO_UNICODE.items()}
SINGLE_BYTES = tuple(bytes([byte]) for byte in BYTE_TO_UNICODE)


# A sequence of tokens is a string in which chr(i) stands for token i: string methods find and replace pairs.
_SYMBOL_OF_BYTE = {single[0]: chr(token) for token, single in enumerate(SINGLE_BYTES)}


def to_symbols(data: bytes) -> str:
    """Return the string of symbols, one for each byte."""
    return data.decode("latin-1").translate(_SYMBOL_OF_BYTE)


def changed_pairs(parts: list[str], pair: str, new: str) -> Iterator[tuple[str, str]]:
    """Yield each pair beside a merged one as it was and as it is; `parts` are the symbols, split at `pair`."""
    left, right = pair
    last = len(parts) - 1
    for i, part in enumerate(parts):
        if part:
            if i > 0:
                yield right + part[0], new + part[0]
            if i < last:
                yield part[-1] + left, part[-1] + new
        elif 0 < i < last:  # two merged pairs side by side
            yield right + left, new + new


def train_merges(counts: Mapping[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Learn at most `n_merges` merges (Sennrich et al., 2016) from pre-tokens and how often each occurs.

    Each step merges the most frequent pair; ties go to the lexicographically greater pair of byte strings.
    """
    words = [to_symbols(piece.encode("utf-8")) for piece in counts]  # each distinct piece once
    occurrences = list(counts.values())
    tokens, merges = list(SINGLE_BYTES), []
    # Sorts greater byte strings first: bytes are inverted, and the end sign comes after every byte.
    keys = ["".join(chr(255 - byte) for byte in token) + chr(256) for token in tokens]
    pair_counts, words_with = defaultdict(int), defaultdict(set)  # how often a pair stands, in which words
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            pair_counts[pair] += occurrences[i]
            words_with[pair].add(i)

    def entry(pair: str) -> tuple[int, str, str]:
        return -pair_counts[pair], keys[ord(pair[0])] + keys[ord(pair[1])], pair

    # The most frequent pair is merged, again and again.
    heap = [entry(pair) for pair in pair_counts]
    heapify(heap)
    while heap and len(merges) < n_merges:
        count, _, pair = heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair]:  # it has fallen since the entry was written
                heappush(heap, entry(pair))
            continue
        left, right = map(ord, pair)
        new = chr(len(tokens))
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
        keys.append(keys[left][:-1] + keys[right])
        # Only the words that hold it change, and with them the pairs on both sides of the new token.
        gained = set()
        for i in words_with.pop(pair):
            parts = words[i].split(pair)
            words[i] = new.join(parts)
            for before, after in changed_pairs(parts, pair, new):
                pair_counts[before] -= occurrences[i]
                pair_counts[after] += occurrences[i]
                words_with[after].add(i)
                gained.add(after)
        pair_counts[pair] = 0
        for after in gained:
            if pair_counts[after]:
                heappush(heap, entry(after))
    return merges


def merge_symbols(symbols: str, ranks: Mapping[str, int], pairs: Sequence[str]) -> str:
    """Carry out merges on one pre-token: `pairs[r]` becomes `chr(256 + r)`, low r first; `ranks[pair]` is r."""
    waiting = sorted({ranks[pair] for pair in map(add, symbols, symbols[1:]) if pair in ranks})  # a heap
    while waiting:
        rank = heappop(waiting)
        pair, new = pairs[rank], chr(256 + rank)
        if pair not in symbols:  # an earlier merge has used it up, or it was waiting twice
            continue
        parts = symbols.split(pair)
        symbols = new.join(parts)
        # A pair with the new token was learned after that token: no rank below this one is added.
        for _, after in changed_pairs(parts, pair, new):
            if after in ranks:
                heappush(waiting, ranks[after])
    return symbols


File = str | os.PathLike[str]
Merges, Texts, Names = Iterable[tuple[bytes, bytes]], str | Iterable[str], Collection[str]


def _write(path: File, text: str) -> None:
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_lines(path: File, read: Callable[[int, str], None]) -> int:
    """Call `read` with each line's number from 0 and text; its ValueError gets file and line. Return how many."""
    lines = Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines):
        try:
            read(number, line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}, line {number + 1}: {error}") from error
    return len(lines)


def _require_text(text: str, argument: str = "text", position: int = 0) -> None:
    check_text(argument, text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument} has a lone surrogate at position {position + error.start}") from None


def _require_specials(argument: str, tokens: Names, known: Names | None = None) -> None:
    if isinstance(tokens, str) or not isinstance(tokens, Collection):
        raise TypeError(f"{argument} must be a collection of str, got {tokens!r}")
    for token in tokens:
        _require_text(token, f"{argument}: an element")
        if not token or [*tokens].count(token) > 1 or token not in (tokens if known is None else known):
            raise ValueError(f"{argument} must be of {known or 'texts, each once'}, got {token!r}")


def _scanner(special_tokens: Names) -> regex.Pattern:
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)) or r"(?!)")


class BPETokenizer:
    """Byte-level BPE with tiktoken's ids: the 256 bytes in GPT-2's order, then merges, then special tokens.

    Args:
        merges: The merged pairs in the order learned; ValueError for one that training could not have made there.
        special_tokens: Texts with an id of their own.
        pattern: Cuts text into pre-tokens, in the syntax of `regex`, without capturing groups.
    """

    CACHED_PIECES, CACHED_LENGTH = 65_536, 32  # pre-tokens whose ids are remembered, characters each may have

    def __init__(self, merges: Merges, special_tokens: Names = END, pattern: str = GPT2_PATTERN) -> None:
        _require_specials("special_tokens", special_tokens)
        _require_text(pattern, "pattern")
        try:
            self.pattern, self._compiled = pattern, regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"pattern {pattern!r} is malformed: {error}") from error
        if self._compiled.groups or self._compiled.match(""):
            raise ValueError(f"pattern {pattern!r} has a capturing group or matches the empty text")
        self.merges, self.special_tokens = [], tuple(special_tokens)
        self._tokens, self._pairs, self._ranks = list(SINGLE_BYTES), [], {}  # without special tokens
        for merge in merges:
            if not isinstance(merge, tuple) or [*map(type, merge)] != [bytes, bytes]:
                raise TypeError(f"merges must be pairs of bytes, got {merge!r}")
            self._learn(b"".join(merge), merge)
        self.special_ids = {token: i for i, token in enumerate(self.special_tokens, len(self._tokens))}
        self._bytes = dict(enumerate(self._tokens + [name.encode("utf-8") for name in self.special_tokens]))
        self.vocab_size = len(self._bytes)  # 256 bytes, merges and special tokens
        self._cache = {}

    @classmethod
    def train(
        cls, texts: Texts, vocab_size: int, special_tokens: Names = END, pattern: str = GPT2_PATTERN
    ) -> Self:
        """Learn merges until there are `vocab_size` tokens, bytes and special tokens included.

        Nothing is merged across texts or special tokens. When no pair is left, training ends with fewer tokens, as the
        `vocab_size` of the result tells. ValueError for an empty text or too small a vocabulary.
        """
        untrained, scanner, counts = cls((), special_tokens, pattern), _scanner(special_tokens), Counter()
        n_merges = whole_number("vocab_size", vocab_size, untrained.vocab_size) - untrained.vocab_size
        texts = [texts] if isinstance(texts, str) else texts
        check_several("texts", texts)
        for text in texts:
            _require_text(text, "texts: an element")
            for segment in scanner.split(text):
                counts.update(untrained._split(segment))
        if not counts:
            raise ValueError("texts is empty; training needs at least one character")
        return cls(train_merges(counts, n_merges), special_tokens, pattern)

    @classmethod
    def load(cls, path: File, special_tokens: Names = END, pattern: str = GPT2_PATTERN) -> Self:
        """Read a `.tiktoken` file, which holds neither special tokens nor pattern; ValueError where it is corrupt."""
        learner = cls((), ())

        def read(number: int, line: str) -> None:
            encoded, _, rank = line.partition(" ")
            token = base64.b64decode(encoded, validate=True)
            if rank != str(number) or (number < 256 and token != SINGLE_BYTES[number]):
                raise ValueError(f"not a token in base64 and its rank, bytes in GPT-2's order: {line[:80]!r}")
            if number >= 256:
                learner._learn(token)

        if (n_lines := _read_lines(path, read)) < 256:
            raise ValueError(f"{path}, line {n_lines + 1}: missing, as the 256 single bytes are not complete")
        return cls(learner.merges, special_tokens, pattern)

    @classmethod
    def from_gpt2_files(
        cls, merges_path: File, vocab_path: File, special_tokens: Names = END, pattern: str = GPT2_PATTERN
    ) -> Self:
        """Read `vocab.bpe` and `encoder.json` (or `merges.txt`, `vocab.json`); ValueError for corrupt or unfit ones."""
        learner = cls((), ())

        def read(number: int, line: str) -> None:
            if number or not line.startswith("#version"):
                if line.count(" ") != 1 or not set(line) <= UNICODE_TO_BYTE.keys() | {" "}:
                    raise ValueError(f"not two tokens in visible characters: {line[:80]!r}")
                left, right = (bytes(map(UNICODE_TO_BYTE.get, part)) for part in line.split(" "))
                learner._learn(left + right, (left, right))

        _read_lines(merges_path, read)
        tokenizer = cls(learner.merges, special_tokens, pattern)
        try:
            if json.loads(Path(vocab_path).read_bytes()) != tokenizer._vocabulary():
                raise ValueError(f"other tokens or ids than follow from {merges_path} and special_tokens")
        except ValueError as error:
            raise ValueError(f"{vocab_path}: {error}") from error
        return tokenizer

    def save(self, path: File) -> None:
        """Write a `.tiktoken` file: a line for each token that is not special, in base64, and its id."""
        encoded = (base64.b64encode(token).decode() for token in self._tokens)
        _write(path, "".join(f"{token} {rank}\n" for rank, token in enumerate(encoded)))

    def save_gpt2_files(self, merges_path: File, vocab_path: File) -> None:
        """Write GPT-2's two files: the merges in visible characters, and a table from token to id."""
        shown = list(self._vocabulary())
        lines = (f"{shown[ord(left)]} {shown[ord(right)]}\n" for left, right in self._pairs)
        _write(merges_path, "#version: 0.2\n" + "".join(lines))
        _write(vocab_path, json.dumps(self._vocabulary()))

    def to_tiktoken(self, name: str = "bpe") -> tiktoken.Encoding:
        """Return tiktoken's encoding with these tokens: the same ids, faster."""
        ranks, special = {token: i for i, token in enumerate(self._tokens)}, self.special_ids
        return tiktoken.Encoding(name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special)

    @property
    def eot_token(self) -> int:
        """The id of `<|endoftext|>`; ValueError without such a token."""
        _require_specials("eot_token", END, self.special_tokens)
        return self.special_ids[END[0]]

    def encode(
        self, text: str, *, allowed_special: Names = (), disallowed_special: Names = "all"
    ) -> list[int]:
        """Return the ids of a text; the empty one has none. ValueError for a lone surrogate.

        A special token in the text is a ValueError if disallowed (`"all"`: those that are not allowed), its id if
        allowed, otherwise ordinary text. Where several begin, the longest counts.
        """
        _require_text(text)
        special = {"allowed_special": allowed_special, "disallowed_special": disallowed_special}
        return list(self.encode_iterable([text], **special))

    def encode_iterable(
        self,
        texts: Iterable[str],
        *,
        allowed_special: Names = (),
        disallowed_special: Names = "all",
        chunk: int = 65_536,
    ) -> Iterator[int]:
        """Yield the ids of the texts joined together, such as the blocks of a file, in memory that does not grow.

        Texts are gathered to `chunk` characters; a longer text or pre-token needs more. Exact for GPT-2's and GPT-4's
        patterns and all others whose matches, the last two left out, stay the same when text is appended.
        """
        everything = self.special_tokens
        allowed, disallowed = (everything if s == "all" else s for s in (allowed_special, disallowed_special))
        _require_specials("allowed_special", allowed, everything)
        _require_specials("disallowed_special", disallowed, everything)
        check_several("texts", texts)
        overruled = allowed if disallowed_special == "all" else ()
        return self._stream(texts, set(allowed), set(disallowed) - set(overruled), chunk)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD, or an error with `errors="strict"`."""
        return self.decode_bytes(ids).decode("utf-8", errors=errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ids, which may end within a character; ValueError for an id out of range."""
        try:
            return b"".join([self._bytes[i] for i in map(index, ids)])
        except KeyError as error:
            raise ValueError(f"ids must be from 0 to {self.vocab_size - 1}, got {error}") from None

    def _learn(self, token: bytes, merge: tuple[bytes, bytes] | None = None) -> None:
        """Add a token that the merges so far leave in two parts, which must be `merge` where that is given."""
        symbols = merge_symbols(to_symbols(token), self._ranks, self._pairs)
        parts = tuple(self._tokens[ord(symbol)] for symbol in symbols)
        if len(parts) != 2 or parts != (merge or parts):
            raise ValueError(
                f"{merge or token} is no merge that can be learned here: earlier ones leave {parts}"
            )
        self._ranks[symbols] = len(self._pairs)
        self._pairs.append(symbols)
        self._tokens.append(token)
        self.merges.append(parts)

    def _vocabulary(self) -> dict[str, int]:
        shown = ["".join(map(BYTE_TO_UNICODE.get, token)) for token in self._tokens]
        vocabulary = {token: i for i, token in enumerate([*shown, *self.special_tokens])}
        if len(vocabulary) < self.vocab_size:
            raise ValueError(f"special_tokens {self.special_tokens} has one written like another token")
        return vocabulary

    def _split(self, text: str) -> list[str]:
        pieces = self._compiled.findall(text)
        if sum(map(len, pieces)) != len(text):
            raise ValueError(f"pattern {self.pattern!r} skips characters of {text[:80]!r}")
        return pieces

    def _stream(self, texts: Texts, allowed: set[str], disallowed: set[str], chunk: int) -> Iterator[int]:
        scanner, longest = _scanner(allowed | disallowed), max(map(len, allowed | disallowed), default=1)
        buffer, parts, gathered, start = "", [], 0, 0  # `start`: position of the buffer in the whole text
        for text in chain(texts, [None]):  # None: nothing follows
            if text is not None:
                _require_text(text, "text", start + len(buffer) + gathered)
                parts.append(text)
                gathered += len(text)
                # Waiting for as much again as was held back keeps the work linear in an endless pre-token.
                if gathered < max(chunk, len(buffer)):
                    continue
            buffer, parts, gathered, position = buffer + "".join(parts), [], 0, 0
            # A special token that begins before the limit is complete in the buffer.
            limit = len(buffer) if text is None else max(0, len(buffer) - longest + 1)
            for match in scanner.finditer(buffer):  # segments that end in a special token; the rest follows
                if match.start() >= limit:
                    break
                if match.group() in disallowed:
                    place = f"{match.group()!r} at position {start + match.start()}"
                    raise ValueError(f"text has the special token {place}, which is disallowed")
                yield from self._encode_pieces(self._split(buffer[position : match.start()]))
                yield self.special_ids[match.group()]
                position = match.end()
            pieces = self._split(buffer[position:limit])
            if text is not None:
                del pieces[-2:]  # what follows may still change them
            yield from self._encode_pieces(pieces)
            position += sum(map(len, pieces))
            buffer, start = buffer[position:], start + position

    def _encode_pieces(self, pieces: list[str]) -> list[int]:
        ids, cache = [], self._cache
        for piece in pieces:
            known = cache.get(piece)
            if known is None:
                symbols = to_symbols(piece.encode("utf-8"))
                known = list(map(ord, merge_symbols(symbols, self._ranks, self._pairs)))
                if len(cache) >= self.CACHED_PIECES:
                    cache.clear()
                if len(piece) <= self.CACHED_LENGTH:
                    cache[piece] = known
            ids += known
        return ids
