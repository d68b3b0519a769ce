"""From raw text to batches of ids. In reading order:

- `cleaning`: repair, trim, judge and de-duplicate raw text.
- `simple_tokenizer`: words and punctuation as tokens.
- `tokenizer`: byte pair encoding, training included.
- `dataset`: windows, targets, batches, token files larger than memory.
- `skipgram`: vectors of words learned from their neighbours.
- `dates`: written dates and their ISO form, the small translation task of chapter 3.
"""

from shared.text.cleaning import clean, deduplicate
from shared.text.dataset import TokenDataset, TokenShards, create_dataloader
from shared.text.simple_tokenizer import SimpleTokenizer
from shared.text.skipgram import SkipGram
from shared.text.tokenizer import BPETokenizer

__all__ = [
    "BPETokenizer",
    "SimpleTokenizer",
    "SkipGram",
    "TokenDataset",
    "TokenShards",
    "clean",
    "create_dataloader",
    "deduplicate",
]
