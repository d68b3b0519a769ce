"""tiktoken's encodings, made safe for texts from outside: each one that the course hands out is a `SafeEncoding`.

tiktoken's engine cuts text by trying and going back, on a stack with a limit: where white space runs on for about a
million characters, it gives up, in `encode_ordinary` with a Rust panic, which is no `Exception` and passes through
every `except Exception`. Such a text is cut here with the package `regex` instead, as tiktoken's own tests do.
Decoding and everything else is tiktoken's.
"""

from collections.abc import Collection
from typing import Any, Self

import numpy as np
import regex
import tiktoken


class SafeEncoding(tiktoken.Encoding):
    """tiktoken's `Encoding` with the same ids, whose methods raise nothing but ordinary exceptions."""

    @classmethod
    def of(cls, encoding: tiktoken.Encoding) -> Self:
        """Return a safe encoding that shares the tables of `encoding`."""
        safe = cls.__new__(cls)
        safe.__dict__.update(encoding.__dict__)
        return safe

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are ordinary text."""
        return self.encode(text, disallowed_special=())

    def encode(
        self,
        text: str,
        *,
        allowed_special: Collection[str] = frozenset(),
        disallowed_special: Collection[str] = "all",
    ) -> list[int]:
        """Return the ids of a text; arguments and errors are those of `tiktoken.Encoding.encode`.

        ValueError as well for a text that has no ids, because the encoding lacks a byte of it.
        """
        names = self.special_tokens_set
        allowed = names if allowed_special == "all" else set(allowed_special)
        try:
            return super().encode(text, allowed_special=allowed, disallowed_special=disallowed_special)
        except ValueError as error:
            if not str(error).startswith("Regex error"):
                raise
        except BaseException as error:
            if not _is_panic(error):
                raise
        return self._encode_in_pieces(text, allowed & names)

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: Collection[str] = frozenset(),
        disallowed_special: Collection[str] = "all",
    ) -> np.ndarray:
        """Return the ids of `encode` as an array of uint32, shape (tokens,)."""
        ids = self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        return np.array(ids, dtype=np.uint32)

    def encode_with_unstable(self, text: str, **special: Any) -> tuple[list[int], list[list[int]]]:
        """As in `tiktoken.Encoding`; ValueError for a text that its engine cannot cut."""
        try:
            return super().encode_with_unstable(text, **special)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise ValueError(
                f"text must have less white space in a row, got {len(text):,} characters"
            ) from None

    def _encode_in_pieces(self, text: str, allowed: set[str]) -> list[int]:
        """Return the ids of a text that is cut in Python, at allowed special tokens and then by the pattern."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
        pattern = regex.compile(self._pat_str)
        # One group: `split` gives the special tokens too, at the odd places.
        borders = "|".join(map(regex.escape, sorted(allowed, key=len, reverse=True))) or r"(?!)"
        ids: list[int] = []
        try:
            for place, segment in enumerate(regex.split(f"({borders})", text)):
                if place % 2:
                    ids.append(self._special_tokens[segment])
                    continue
                for match in pattern.finditer(segment):
                    ids += self._encode_single_piece(match[0])
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise ValueError(f"text must be made of tokens of {self.name!r}, got {text[:80]!r}") from None
        return ids


def made_safe(encoding: Any) -> Any:
    """Return a plain encoding of tiktoken as a safe one, and any other tokenizer as it is."""
    return SafeEncoding.of(encoding) if type(encoding) is tiktoken.Encoding else encoding


def _is_panic(error: BaseException) -> bool:
    """Return whether Rust gave up; the class of its panics cannot be imported."""
    return type(error).__name__ == "PanicException"
