"""From logits to tokens and text. In reading order:

- `decode_step`: one token through a model with less of Python in between.
- `engine`: ids to ids, in batches, with caches and streams.
- `speculation`: several tokens a step, guessed and checked.
- `sampling`: processors of logits, top-k to repetition penalties, and beam search.
"""

from shared.generation.engine import generate, generate_text, stream, stream_text
from shared.generation.sampling import MinP, Temperature, TopK, TopP

__all__ = ["MinP", "Temperature", "TopK", "TopP", "generate", "generate_text", "stream", "stream_text"]
