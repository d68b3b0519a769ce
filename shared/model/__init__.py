"""Models and what they are made of. In reading order:

- `positions`: every common way to tell a model where a token stands.
- `attention`: scaled dot products, heads, masks and the key/value cache.
- `seq2seq`: a GRU encoder-decoder with attention, and how it writes.
- `transformer`: the original Transformer, encoder and decoder.
- `layers`: norms, feed-forward layers, mixtures of experts, the Transformer block.
- `gpt`: GPT-2, Llama and their relatives from one configuration.
- `bert`: the encoder that sees both sides, and the heads of its pretraining.
- `inspection`: what goes on inside: the stream, the heads' attention, heads cut out.
"""

from shared.model.attention import KeyValueCache, MultiHeadAttention
from shared.model.gpt import GPTConfig, GPTModel
from shared.model.layers import TransformerBlock
from shared.model.positions import RotaryPositions
from shared.model.seq2seq import EncoderDecoder
from shared.model.transformer import Transformer

__all__ = [
    "EncoderDecoder",
    "GPTConfig",
    "GPTModel",
    "KeyValueCache",
    "MultiHeadAttention",
    "RotaryPositions",
    "Transformer",
    "TransformerBlock",
]
