"""From logits to tokens and text. In reading order:

- `engine`: ids to ids, in batches, with caches and streams.
- `streaming`: text while it is written, ended by stop strings.
- `decode_step`: one token through a model with less of Python in between.
- `speculation`: several tokens a step, guessed and checked.
- `sampling`: processors of logits, top-k to repetition penalties.
- `beam_search`: the continuations with the best scores.
- `options`: all settings of a generation as plain, checked values.
- `conversation`: replies to messages, over one cache that stays.
- `batching_pass`: one pass over pieces of many texts.
- `batching`: many requests at once, which join and leave at each step.
"""

from shared.generation.beam_search import beam_search
from shared.generation.conversation import Conversation
from shared.generation.engine import generate, stream
from shared.generation.options import GenerationOptions
from shared.generation.sampling import TopP
from shared.generation.streaming import generate_text, stream_text

__all__ = [
    "Conversation",
    "GenerationOptions",
    "TopP",
    "beam_search",
    "generate",
    "generate_text",
    "stream",
    "stream_text",
]
