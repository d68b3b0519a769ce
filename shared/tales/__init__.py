"""Stories without limit whose entropy is known, and what can be computed about them. In reading order:

- `nodes`: what a grammar is made of.
- `visibility`: the proof that the text of a story decides each of its choices.
- `grammar`: the grammar's file read and checked.
- `generator`: stories by seed, their probability, the entropy of all of them.
- `scoring`: how much of a written text the grammar allows.
- `encoding`: the tokenizer of the tales.
- `distribution`: the exact chances of every next token.
- `blanks`: what may stand in hidden places, exactly, and whether two segments belong together.
- `errors`: sentences with one wrong word.
- `instructions`: questions about stories, with their answers.
- `look_ups`: rules that answer some of these questions and understand nothing.
- `questions`: questions whose answers are spans of a story, and questions that the story does not answer.
- `question_look_ups`: rules that look for the span and understand nothing.
"""

from shared.tales.distribution import expected_loss, next_tokens
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator, derivations, entropy, log_probability
from shared.tales.scoring import score

__all__ = [
    "TaleGenerator",
    "derivations",
    "entropy",
    "expected_loss",
    "log_probability",
    "next_tokens",
    "score",
    "tale_encoding",
]
