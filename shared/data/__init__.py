"""What the course reads. In reading order:

- `corpus`: the texts that ship with it (stories, messages, reviews, instructions, questions, languages).
- `images`: the digits of scikit-learn in fixed splits, and picture files of a reader's own.
- `connection`: why an address cannot be reached.
- `encoding`: tiktoken's encodings, made safe for texts from outside.
- `download`: files and weights from the network, each fetched once and checked.
- `models`: published models that come as packages of the index.
"""

from shared.data.corpus import (
    load_instructions,
    load_languages,
    load_reviews,
    load_sms,
    load_stories,
    stories_text,
)
from shared.data.download import fetch, gpt2_encoding

__all__ = [
    "fetch",
    "gpt2_encoding",
    "load_instructions",
    "load_languages",
    "load_reviews",
    "load_sms",
    "load_stories",
    "stories_text",
]
