"""Text from a decoder, shown while it is written: whole characters, ended by a stop string or the
end-of-text token.

The tokens come from `shared.generation.engine`, whose options are passed on. A piece of text goes out as
soon as nothing that follows can change it: bytes wait until their character is complete, and what may
become a stop string waits until it has or has not.

Left out: several prompts at once, and positions or probabilities of the tokens.

Explained and proven in ch04_gpt/03_generation.ipynb; written from there by `make promote`.
"""

import codecs
from collections.abc import Iterator, Sequence
from typing import Unpack

import tiktoken
from torch import nn

from shared.generation.engine import EngineOptions, stream


def stream_text(
    model: nn.Module,
    encoding: tiktoken.Encoding,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    **options: Unpack[EngineOptions],
) -> Iterator[str]:
    """Yield the continuation of a prompt as pieces of text, each as soon as it is certain.

    A character of several bytes comes whole, even if its bytes are spread over tokens; bytes that are no text become
    U+FFFD, as in `encoding.decode`. Together the pieces are what `generate_text` returns.

    Args:
        model, max_new_tokens: As in `generate`.
        encoding: The model's tokenizer.
        prompt: A text, encoded without special tokens; or ids, which may hold them.
        stop_strings: Texts that end the generation at the first one that is complete. Neither it nor what comes after
            it is yielded, and what may become the beginning of one is held back until it is known not to be.
        stop_tokens: As in `generate`; None stands for the encoding's end-of-text token.
        options: `temperature`, `processors`, `seed` and `overflow` of `generate`.

    Raises:
        ValueError: As `generate`, at the call; or a stop string is empty.
    """
    ends = check_stop_strings(stop_strings)
    ids = encoding.encode_ordinary(prompt) if isinstance(prompt, str) else prompt
    stops = (encoding.eot_token,) if stop_tokens is None else stop_tokens
    tokens = stream(model, ids, max_new_tokens, stop_tokens=stops, **options)
    pieces = _until(decode_stream(encoding, tokens), ends)
    return (piece for piece in pieces if piece)


def generate_text(
    model: nn.Module,
    encoding: tiktoken.Encoding,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    stop_strings: Sequence[str] = (),
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


def check_stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple; ValueError if they are one text instead of several, or one is empty."""
    is_sequence = isinstance(stop_strings, Sequence) and not isinstance(stop_strings, str)
    if not is_sequence or not all(isinstance(stop, str) and stop for stop in stop_strings):
        raise ValueError(f"stop_strings must be texts of at least one character, got {stop_strings!r}")
    return tuple(stop_strings)


def decode_stream(encoding: tiktoken.Encoding, tokens: Iterator[int]) -> Iterator[str]:
    """Turn a stream of ids into one of text, a piece for each id and one for the end; pieces may be empty."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(encoding.decode_single_token_bytes(token))
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
