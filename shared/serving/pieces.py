"""Tokens become text while they come: whole characters, ended by a stop string, each token's probability beside it.

The incremental counterpart of `shared.generation.streaming`: that one pulls tokens from one generation, this one is
given tokens one by one, as a batch brings them.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.generation.streaming import Tokenizer
from shared.safety.filters import OutputGuard


@dataclass(frozen=True)
class TokenInfo:
    """A token that was written, and the probabilities at its place.

    Attributes:
        raw: Its bytes.
        logprob: The logarithm of its probability.
        top: Bytes and logarithm of the most probable tokens, the best first.
        offset: Characters before it.
    """

    raw: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    offset: int


@dataclass
class Piece:
    """What has become certain of a continuation since the last piece.

    Attributes:
        index: Which of the sequences of a request.
        text: New text.
        infos: One for each token whose text is complete, where probabilities are wanted.
        finish_reason: "stop", "length" or "content_filter" in the last piece.
        error: Why there will be no more pieces.
    """

    index: int
    text: str = ""
    infos: list[TokenInfo] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None

    def add(self, other: "Piece") -> None:
        """Append a later piece."""
        self.text += other.text
        self.infos += other.infos
        self.finish_reason, self.error = other.finish_reason, other.error


class TextWriter:
    """Turns the tokens of one continuation into text.

    Args:
        tokenizer: Of the model.
        stops: Texts that end the continuation; neither they nor what follows is part of it.

    Attributes:
        stopped: Whether a stop string was found; there is no more text then.
        reason: Why it stopped, in OpenAI's words.
    """

    reason = "stop"

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops, self.stopped = tokenizer, tuple(stops), False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held, self._given = "", 0  # text that may become a stop string; characters that went out
        self._infos: list[TokenInfo] = []  # of tokens whose text is held

    def feed(
        self, token: int, info: tuple[float, dict[int, float]] | None = None
    ) -> tuple[str, list[TokenInfo]]:
        """Take a token and return the text, and the tokens, that are certain now.

        Args:
            token: Its id.
            info: Its log-probability and those of the most probable tokens, where they are wanted.
        """
        raw = self.tokenizer.decode_single_token_bytes(token)
        if info is not None:
            top = tuple((self.tokenizer.decode_single_token_bytes(t), value) for t, value in info[1].items())
            self._infos.append(TokenInfo(raw, info[0], top, self._given + len(self._held)))
        return self._release(self._decoder.decode(raw), final=False)

    def end(self) -> tuple[str, list[TokenInfo]]:
        """Return what was held back, when no token follows."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, new: str, final: bool) -> tuple[str, list[TokenInfo]]:
        """Add new text; give out all that no stop string can take back."""
        self._held += new
        cut = self._first_stop()
        if cut is not None:
            self.stopped, certain = True, cut
        elif final:
            certain = len(self._held)
        else:
            certain = len(self._held) - max((overlap(self._held, stop) for stop in self.stops), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        self._given += len(text)
        # A token goes with the first character of its text; at the end all of them go.
        everything = final and not self.stopped
        n = sum(everything or info.offset < self._given for info in self._infos)
        infos, self._infos = self._infos[:n], self._infos[n:]
        return text, infos

    def _first_stop(self) -> int | None:
        """Return where the stop string that is complete first begins; of those with the same end, the longest."""
        found = [
            (self._held.find(stop) + len(stop), self._held.find(stop))
            for stop in self.stops
            if stop in self._held
        ]
        return min(found)[1] if found else None


class GuardedWriter(TextWriter):
    """A `TextWriter` whose text goes through a content filter; what the filter blocks ends it.

    Text is held back until the guard has read what follows. A token's probability goes out with its text.

    Args:
        guard: Of this continuation alone.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], guard: OutputGuard) -> None:
        super().__init__(tokenizer, stops)
        self.guard, self._passed, self._waiting = guard, 0, list[TokenInfo]()

    def feed(
        self, token: int, info: tuple[float, dict[int, float]] | None = None
    ) -> tuple[str, list[TokenInfo]]:
        """Take a token and return the text, and the tokens, that are certain now."""
        text, infos = super().feed(token, info)
        return self._guarded(text, infos, final=self.stopped)

    def end(self) -> tuple[str, list[TokenInfo]]:
        """Return what was held back, when no token follows."""
        text, infos = super().end()
        return self._guarded(text, infos, final=True)

    def _guarded(self, text: str, infos: list[TokenInfo], final: bool) -> tuple[str, list[TokenInfo]]:
        """Let new text through the guard."""
        given = self.guard.feed(text)
        if final:
            given += self.guard.end()
        if self.guard.blocked:
            self.stopped, self.reason = True, "content_filter"
        self._passed += len(given)
        self._waiting += infos
        n = sum(info.offset < self._passed for info in self._waiting)
        if final and not self.guard.blocked:
            n = len(self._waiting)
        out, self._waiting = self._waiting[:n], self._waiting[n:]
        return given, out


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop`, not all of it, that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
