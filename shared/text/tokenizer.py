"""Byte-level byte pair encoding with the token ids of tiktoken and Hugging Face's tokenizers.

Text is cut at special tokens, then into pre-tokens by a pattern; merges happen inside a pre-token's UTF-8
bytes. Follows GPT-2 (Radford et al., 2019), has the names of tiktoken's `Encoding` where that has one,
and reads and writes tiktoken's and GPT-2's files. Leaves out normalisation, dropout, parallel training
and character offsets. Later chapters use `BPETokenizer.to_tiktoken`.

Explained and proven in ch02_text_data/03_byte_pair_encoding.ipynb; written from there by `make promote`.
"""

import base64
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, combinations
from operator import index
from pathlib import Path
from typing import Self

import regex

from shared.checks import check_several, check_text, whole_number
from shared.data.encoding import SafeEncoding
from shared.text.merges import (
    BYTE_TO_UNICODE,
    SINGLE_BYTES,
    UNICODE_TO_BYTE,
    merge_symbols,
    to_symbols,
    train_merges,
)

# The pattern of GPT-2, and its one special token.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END = ("<|endoftext|>",)


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
    seen = set()
    for token in tokens:
        _require_text(token, f"{argument}: an element")
        if not token or token in seen or token not in (tokens if known is None else known):
            allowed = "texts, each once" if known is None else tuple(known)
            raise ValueError(f"{argument} must be of {allowed}, got {token!r}")
        seen.add(token)


def _scanner(special_tokens: Names) -> regex.Pattern:
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)) or r"(?!)")


class BPETokenizer:
    """Byte-level BPE with tiktoken's ids and names: the 256 bytes in GPT-2's order, merges, then special tokens.

    Args:
        merges: The merged pairs in the order learned; ValueError for one that training could not have made there.
        special_tokens: Texts with an id of their own.
        pattern: Cuts text into pre-tokens, in the syntax of `regex`, without capturing groups.

    Attributes: `n_vocab`, the number of ids; `vocab`, from a token's bytes to its id; `special_ids`, from text to id.
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
        # Where a special token is spelled like an ordinary one, the ordinary one is found.
        self.vocab = {token: i for i, token in reversed(self._bytes.items())}
        self.n_vocab = len(self._bytes)  # 256 bytes, merges and special tokens
        self._cache = {}

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

    @property
    def eot_token(self) -> int:
        """The id of `<|endoftext|>`; ValueError without such a token."""
        _require_specials("eot_token", END, self.special_ids)
        return self.special_ids[END[0]]

    @classmethod
    def train(
        cls, texts: Texts, vocab_size: int, special_tokens: Names = END, pattern: str = GPT2_PATTERN
    ) -> Self:
        """Learn merges until there are `vocab_size` tokens, bytes and special tokens included.

        Nothing is merged across texts or special tokens. When no pair is left, training ends with fewer tokens, as the
        `n_vocab` of the result tells. ValueError for an empty text or too small a vocabulary.
        """
        untrained, scanner, counts = cls((), special_tokens, pattern), _scanner(special_tokens), Counter()
        n_merges = whole_number("vocab_size", vocab_size, untrained.n_vocab) - untrained.n_vocab
        texts = [texts] if isinstance(texts, str) else texts
        check_several("texts", texts)
        for text in texts:
            _require_text(text, "texts: an element")
            for segment in scanner.split(text):
                counts.update(untrained._split(segment))
        if not counts:
            raise ValueError("texts is empty; training needs at least one character")
        return cls(train_merges(counts, n_merges), special_tokens, pattern)

    def _split(self, text: str) -> list[str]:
        pieces = self._compiled.findall(text)
        if sum(map(len, pieces)) != len(text):
            raise ValueError(f"pattern {self.pattern!r} skips characters of {text[:80]!r}")
        return pieces

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

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are ordinary text."""
        return self.encode(text, disallowed_special=())

    def encode_batch(
        self, texts: Iterable[str], *, allowed_special: Names = (), disallowed_special: Names = "all"
    ) -> list[list[int]]:
        """Return the ids of each text, as `encode` does."""
        check_several("texts", texts)
        special = {"allowed_special": allowed_special, "disallowed_special": disallowed_special}
        return [self.encode(text, **special) for text in texts]

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
        known = self.special_ids
        allowed, disallowed = (known if s == "all" else s for s in (allowed_special, disallowed_special))
        _require_specials("allowed_special", allowed, known)
        _require_specials("disallowed_special", disallowed, known)
        check_several("texts", texts)
        overruled = allowed if disallowed_special == "all" else ()
        return self._stream(texts, set(allowed), set(disallowed) - set(overruled), chunk)

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

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD, or an error with `errors="strict"`."""
        return self.decode_bytes(ids).decode("utf-8", errors=errors)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ids, which may end within a character; ValueError for an id out of range."""
        try:
            return b"".join([self._bytes[i] for i in map(index, ids)])
        except KeyError as error:
            raise ValueError(f"ids must be from 0 to {self.n_vocab - 1}, got {error}") from None

    def decode_batch(self, batch: Iterable[Iterable[int]], errors: str = "replace") -> list[str]:
        """Return the text of each row of ids, as `decode` does."""
        return [self.decode(ids, errors) for ids in batch]

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Return the bytes of one id; ValueError for an id out of range."""
        return self.decode_bytes([token])

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """Return the id of a text or of bytes that are one token, special ones included; ValueError for others."""
        is_text = isinstance(text_or_bytes, str)
        token = text_or_bytes.encode("utf-8", "surrogatepass") if is_text else text_or_bytes
        if token not in self.vocab:
            raise ValueError(f"text_or_bytes must be one token, got {text_or_bytes!r}")
        return self.vocab[token]

    def token_byte_values(self) -> list[bytes]:
        """Return the bytes of all tokens but the special ones, sorted."""
        return sorted(self._tokens)

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
        cls, *, merges_path: File, vocab_path: File, special_tokens: Names = END, pattern: str = GPT2_PATTERN
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

    def save_gpt2_files(self, *, merges_path: File, vocab_path: File) -> None:
        """Write GPT-2's two files: the merges in visible characters, and a table from token to id."""
        shown = list(self._vocabulary())
        lines = (f"{shown[ord(left)]} {shown[ord(right)]}\n" for left, right in self._pairs)
        _write(merges_path, "#version: 0.2\n" + "".join(lines))
        _write(vocab_path, json.dumps(self._vocabulary()))

    def _vocabulary(self) -> dict[str, int]:
        shown = ["".join(map(BYTE_TO_UNICODE.get, token)) for token in self._tokens]
        vocabulary = {token: i for i, token in enumerate([*shown, *self.special_tokens])}
        if len(vocabulary) < self.n_vocab:
            raise ValueError(f"special_tokens {self.special_tokens} has one written like another token")
        return vocabulary

    def to_tiktoken(self, name: str = "bpe") -> SafeEncoding:
        """Return tiktoken's encoding with these tokens: the same ids, faster.

        ValueError for special tokens that are not apart, see `check_apart`, or a pattern that tiktoken cannot read.
        """
        check_apart(self.special_tokens)
        ranks, special = {token: i for i, token in enumerate(self._tokens)}, self.special_ids
        return SafeEncoding(name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special)


def check_apart(special_tokens: Iterable[str]) -> None:
    """Refuse special tokens of which one holds another or begins as another ends (ValueError): engines then differ."""
    names, begun_by = list(special_tokens), defaultdict(set)
    for name in names:
        for size in range(1, len(name)):
            begun_by[name[:size]].add(name)
    for name in names:
        parts = (name[start:end] for start, end in combinations(range(len(name) + 1), 2))
        ends = (begun_by.get(name[start:], set()) for start in range(1, len(name)))
        if others := set(names).intersection(parts).union(*ends) - {name}:
            raise ValueError(f"special_tokens must not overlap one another, got {name!r} and {min(others)!r}")
