"""The one tokenizer of all models of tales: our own byte pair encoding, 2,048 tokens, shipped as a file.

`python -m shared.tales.encoding` trains it again and writes the file; a test holds that the result is the same.
"""

from functools import cache

import tiktoken

from shared.data.corpus import DATA
from shared.tales.generator import TaleGenerator
from shared.text.tokenizer import BPETokenizer

TALE_TOKENIZER_FILE = DATA / "tales_tokenizer.tiktoken"
VOCAB_SIZE = 2048
TRAINING_SEED = 2048
TRAINING_BYTES = 4_000_000


def train_tale_tokenizer() -> BPETokenizer:
    """Train the tokenizer on 4 MB of tales; `<|endoftext|>` gets the last id, 2047."""
    return BPETokenizer.train(TaleGenerator(TRAINING_SEED).text(TRAINING_BYTES), VOCAB_SIZE)


@cache
def tale_tokenizer() -> BPETokenizer:
    """Return the shipped tokenizer as our own class."""
    return BPETokenizer.load(TALE_TOKENIZER_FILE)


@cache
def tale_encoding() -> tiktoken.Encoding:
    """Return the shipped tokenizer as a tiktoken encoding, the engine for models; `eot_token` ends a story."""
    return tale_tokenizer().to_tiktoken("tales")


if __name__ == "__main__":
    train_tale_tokenizer().save(TALE_TOKENIZER_FILE)
