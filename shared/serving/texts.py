"""Texts that a model goes on with, one prompt after the other, with the options of a command line.

Left out: several prompts at once; the engine can, and the chapter on serving uses it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shared.generation.options import GenerationOptions
from shared.generation.streaming import stream_text
from shared.serving.models import OpenedModel

MOST_BY_DEFAULT = 128  # tokens


def text_writer(
    found: OpenedModel, max_tokens: int | None, options: Mapping[str, Any]
) -> Callable[[str], Iterator[str]]:
    """Return a function from a prompt to the pieces of its continuation.

    Args:
        found: The model, with a tokenizer.
        max_tokens: Most tokens to write; None is 128, or fewer where the context has no room for them.
        options: Those of `GenerationOptions`.

    Raises:
        ValueError: An option is out of range, or there is no tokenizer.
    """
    encoding, limit = found.needed_tokenizer(), found.model.config.context_length
    GenerationOptions(**options)  # errors before the first text

    def pieces_of(prompt: str) -> Iterator[str]:
        ids = encoding.encode_ordinary(prompt)
        n_tokens = max_tokens or max(1, min(MOST_BY_DEFAULT, limit + 1 - max(1, len(ids))))
        arguments = GenerationOptions(max_new_tokens=n_tokens, **options).text_arguments()
        return stream_text(found.model, encoding, ids, **arguments)

    return pieces_of
