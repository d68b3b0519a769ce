"""From raw text to batches of ids. In reading order:

- `mojibake`: repair text that was read with the wrong encoding.
- `markup`: take HTML out of text.
- `cleaning`: repair, trim, judge and de-duplicate raw text.
- `simple_tokenizer`: words and punctuation as tokens.
- `merges`: the two algorithms of byte pair encoding, learning merges and carrying them out.
- `tokenizer`: byte pair encoding of text, with special tokens, streams and files.
- `renumbered`: byte pair encoding under other people's ids.
- `wordpiece`: BERT's tokenizer: words and their longest pieces, learned, applied, read from files.
- `chat_format`: a conversation as tokens.
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
