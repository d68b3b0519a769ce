"""The options of a generation as plain, checked values, for a notebook, a command line and a server.

`GenerationOptions` holds numbers and texts only, so that it can be read from JSON and written to it, and
turns itself into the arguments of `shared.generation.engine` and `shared.generation.streaming`.
Processors of one's own are for those who call these directly.

Left out: beam search, and options that differ between the prompts of a batch.

Explained and proven in ch05_pretraining/02_decoding.ipynb; written from there by `make promote`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shared.checks import require
from shared.generation.engine import Processor
from shared.generation.sampling import (
    LARGEST,
    SMALLEST,
    CountPenalty,
    MinP,
    NoRepeatNGram,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    Typical,
    check_number,
    keep_number,
)
from shared.generation.streaming import check_stop_strings


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a prompt is continued, and where the continuation ends.

    Args:
        max_new_tokens: Most tokens to add.
        temperature: Divides the logits before the cuts. 0 takes the most probable token after the penalties; the cuts
            then have no effect.
        top_k, top_p, min_p, typical: Cuts, as `TopK`, `TopP`, `MinP`, `Typical`; 0, 1, 0 and 1 cut nothing.
        repetition_penalty, presence_penalty, frequency_penalty: As `RepetitionPenalty` and `CountPenalty`; 1, 0 and 0
            change nothing.
        no_repeat_ngram: As `NoRepeatNGram`; 0 forbids nothing.
        stop_strings, stop_tokens: As in `stream_text`; stop tokens of None stand for the end of text.
        seed: Of the random choices; None is another one each time.
        overflow: As in `generate`.

    Raises:
        ValueError: A value is out of range (it is named).
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    stop_strings: Sequence[str] = ()
    stop_tokens: Sequence[int] | None = None
    seed: int | None = None
    overflow: str = "error"

    def __post_init__(self) -> None:
        # Whole numbers and other numbers, each in its range.
        for name, low in (("max_new_tokens", 1), ("top_k", 0), ("no_repeat_ngram", 0)):
            keep_number(self, name, low, kind=int)
        for name, low, high in (
            ("temperature", 0, LARGEST),
            ("top_p", SMALLEST, 1),
            ("min_p", 0, 1),
            ("typical", SMALLEST, 1),
            ("repetition_penalty", SMALLEST, LARGEST),
            ("presence_penalty", -LARGEST, LARGEST),
            ("frequency_penalty", -LARGEST, LARGEST),
        ):
            keep_number(self, name, low, high)
        if self.temperature:  # 0 is allowed, and then nothing below what `Temperature` allows
            keep_number(self, "temperature", SMALLEST, LARGEST)
        # What may be left open, and what is one of two words.
        if self.seed is not None:
            keep_number(self, "seed", 0, 10**18, kind=int)
        if self.overflow not in ("error", "slide"):
            raise ValueError(f"overflow must be 'error' or 'slide', got {self.overflow!r}")
        # Lists, as JSON has them, and other series become tuples: equal options are equal, and nobody can change them.
        object.__setattr__(self, "stop_strings", check_stop_strings(self.stop_strings))
        if self.stop_tokens is not None:
            is_series = isinstance(self.stop_tokens, Iterable) and not isinstance(self.stop_tokens, str)
            require("stop_tokens", self.stop_tokens, is_series, "a sequence of ids")
            stops = tuple(check_number("stop_tokens", token, 0, kind=int) for token in self.stop_tokens)
            object.__setattr__(self, "stop_tokens", stops)

    def processors(self) -> tuple[Processor, ...]:
        """Return the processors that change something: penalties, temperature, cuts."""
        chosen: list[Processor] = []
        if self.repetition_penalty != 1:
            chosen.append(RepetitionPenalty(self.repetition_penalty))
        if self.presence_penalty or self.frequency_penalty:
            chosen.append(CountPenalty(self.presence_penalty, self.frequency_penalty))
        if self.no_repeat_ngram:
            chosen.append(NoRepeatNGram(self.no_repeat_ngram))
        if self.temperature == 0:
            return tuple(chosen)
        # Drawing: what follows changes which tokens are drawn, and how often.
        if self.temperature != 1:
            chosen.append(Temperature(self.temperature))
        if self.top_k:
            chosen.append(TopK(self.top_k))
        if self.top_p < 1:
            chosen.append(TopP(self.top_p))
        if self.min_p:
            chosen.append(MinP(self.min_p))
        if self.typical < 1:
            chosen.append(Typical(self.typical))
        return tuple(chosen)

    def text_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for `stream_text` and `generate_text`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": float(self.temperature > 0),  # the processors hold the rest of it
            "processors": self.processors(),
            "stop_strings": self.stop_strings,
            "stop_tokens": self.stop_tokens,
            "seed": self.seed,
            "overflow": self.overflow,
        }

    def id_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for `generate` and `stream`, which know ids only.

        Stop tokens of None are none here. Raises ValueError if there are stop strings.
        """
        if self.stop_strings:
            raise ValueError(f"stop_strings must be empty where there is no text, got {self.stop_strings!r}")
        arguments = self.text_arguments() | {"stop_tokens": self.stop_tokens or ()}
        del arguments["stop_strings"]
        return arguments
