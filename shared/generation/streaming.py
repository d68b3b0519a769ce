"""Text from a decoder, shown while it is written: whole characters, ended by a stop string or the
end-of-text token.

The tokens come from `shared.generation.engine`, whose options are passed on. A piece of text goes out as
soon as nothing that follows can change it: bytes wait until their character is complete, and what may
become a stop string waits until it has or has not.

Left out: several prompts at once, and positions or probabilities of the tokens.

Explained and proven in ch04_gpt/03_generation.ipynb; written from there by `make promote`.
"""

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol, Unpack

import torch
from torch import Tensor, nn

from shared.checks import require
from shared.data.encoding import made_safe
from shared.generation.engine import EngineOptions, Processor, check_ids, stream


class Tokenizer(Protocol):
    """What is needed of a tokenizer here. tiktoken's encodings have it, and our own `BPETokenizer`."""

    @property
    def n_vocab(self) -> int:
        """One more than the largest id."""

    @property
    def eot_token(self) -> int:
        """The id that ends a text; KeyError or ValueError if there is none."""

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are ordinary text."""

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Return the bytes of an id; KeyError or ValueError if it has none."""


def stream_text(
    model: nn.Module,
    encoding: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    stop_strings: Iterable[str] = (),
    stop_tokens: Sequence[int] | None = None,
    **options: Unpack[EngineOptions],
) -> Iterator[str]:
    """Yield the continuation of a prompt as pieces of text, each as soon as it is certain.

    A character of several bytes comes whole, even if its bytes are spread over tokens; bytes that are no text become
    U+FFFD, as in `encoding.decode`. Together the pieces are what `generate_text` returns.

    Args:
        model, max_new_tokens: As in `generate`.
        encoding: The model's tokenizer. Ids of the model that it lacks, as in a padded vocabulary, are not chosen.
        prompt: A text, encoded without special tokens; or ids, which may hold them. An empty one is begun by the
            end-of-text token, after which a model has learnt to begin.
        stop_strings: Texts that end the generation at the first one that is complete. Neither it nor what comes after
            it is yielded, and what may become the beginning of one is held back until it is known not to be.
        stop_tokens: As in `generate`; None stands for the encoding's end-of-text token, if it has one.
        options: `temperature`, `processors`, `seed` and `overflow` of `generate`.

    Raises:
        ValueError: As `generate`, at the call; the encoding has more tokens than the model; a stop string is empty; or
            the prompt is a text that the encoding cannot encode.
    """
    # What the tokenizer and the model make of each other.
    ends = check_stop_strings(stop_strings)
    processors = (*forbid_unknown(model, encoding), *options.pop("processors", ()))
    try:
        end = encoding.eot_token
    except (KeyError, ValueError):  # there is none
        end = None
    # The prompt as ids, and what ends the text.
    ids = made_safe(encoding).encode_ordinary(prompt) if isinstance(prompt, str) else prompt
    ids = check_ids("prompt", ids, model.config.vocab_size)
    if not ids and end is None:
        raise ValueError(
            "prompt must not be empty: the encoding has no end-of-text token to begin a text with"
        )
    if stop_tokens is None:
        stop_tokens = () if end is None else (end,)
    tokens = stream(
        model, ids or [end], max_new_tokens, stop_tokens=stop_tokens, processors=processors, **options
    )
    pieces = _until(decode_stream(encoding, tokens), ends)
    return (piece for piece in pieces if piece)


def generate_text(
    model: nn.Module,
    encoding: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    stop_strings: Iterable[str] = (),
    stop_tokens: Sequence[int] | None = None,
    **options: Unpack[EngineOptions],
) -> str:
    """Return the continuation of a prompt, without the prompt; arguments and errors are those of `stream_text`."""
    pieces = stream_text(
        model,
        encoding,
        prompt,
        max_new_tokens,
        stop_strings=stop_strings,
        stop_tokens=stop_tokens,
        **options,
    )
    return "".join(pieces)


def forbid_unknown(model: nn.Module, encoding: Tokenizer) -> tuple[Processor, ...]:
    """Return processors for `generate` that forbid the ids of the model that the tokenizer lacks: one, or none.

    A vocabulary padded to a multiple of 64 has such ids, and some tokenizers have gaps. Raises ValueError if the
    tokenizer has more tokens than the model.
    """
    size, n_tokens = model.config.vocab_size, encoding.n_vocab
    if n_tokens > size:
        raise ValueError(f"encoding must have at most the model's vocab_size={size} tokens, got {n_tokens}")
    unknown = _unknown_ids(encoding, size)
    if not unknown.any():
        return ()
    unknown = unknown.to(next(model.parameters()).device)
    return (lambda ids, logits: logits.masked_fill(unknown, -math.inf),)


@lru_cache(maxsize=8)
def _unknown_ids(encoding: Tokenizer, size: int) -> Tensor:
    """Return which of the ids below `size` the tokenizer lacks, bool (size,)."""
    unknown = torch.zeros(size, dtype=torch.bool)
    for token in range(size):
        try:
            encoding.decode_single_token_bytes(token)
        except (KeyError, ValueError):
            unknown[token] = True
    return unknown


def check_stop_strings(stop_strings: Iterable[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple; ValueError if they are one text instead of several, or one is empty."""
    are_several = isinstance(stop_strings, Iterable) and not isinstance(stop_strings, str)
    stops = tuple(stop_strings) if are_several else ()
    are_texts = are_several and all(isinstance(stop, str) and stop for stop in stops)
    require("stop_strings", stop_strings, are_texts, "texts of at least one character")
    return stops


def decode_stream(encoding: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Turn a stream of ids into one of text, a piece for each id and one for the end; pieces may be empty.

    Raises ValueError for an id that the tokenizer lacks.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        try:
            piece = encoding.decode_single_token_bytes(token)
        except (KeyError, ValueError, OverflowError):
            raise ValueError(
                f"tokens must be ids of the encoding, below {encoding.n_vocab}, got {token}"
            ) from None
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def _until(pieces: Iterator[str], stop_strings: tuple[str, ...]) -> Iterator[str]:
    """Pass on the text before the first stop string that is complete."""
    held = ""
    for piece in pieces:
        held += piece
        # The first to end wins, and of those with the same end the longest, however the text is cut into pieces.
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in stop_strings if stop in held]
        if found:
            yield held[: min(found)[1]]
            return
        n_held = max((_overlap(held, stop) for stop in stop_strings), default=0)
        yield held[: len(held) - n_held]
        held = held[len(held) - n_held :]
    yield held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop`, not all of it, that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
