"""A content filter: texts that a service should not take or give, by words, patterns, exceptions and a small
classifier.

`load_filter` is the one that ships. Of 180 texts that it should block, by authors whom it had not met, it
caught 55 %, with a precision of 96 % among as many harmless ones; with `adapter_scorer`, a tuned SmolLM2,
89 % and 92 %. Use it to learn, not to protect. `OutputGuard` lets a stream pass through any filter, with
characters held back.

Left out: other languages than English, pictures, conversations whose parts are harmless alone, and
context: who says it to whom.

Follows Weinberger et al. (2009, "Feature Hashing for Large Scale Multitask Learning") for the
classifier's features.

Explained and proven in deployment/05_content.ipynb; written from there by `make promote`.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from shared.checks import check_choice, require, whole_number
from shared.data.corpus import DATA
from shared.safety.spelling import Speller
from shared.weights.pretrained import CHECKPOINTS

CATEGORIES = ("insult", "threat", "self_harm", "danger", "scam", "adult")
RULES = DATA / "filter_rules.tsv"


@dataclass(frozen=True)
class Rules:
    """What a person has written down about bad texts.

    Attributes:
        words: Category -> words that alone raise a suspicion.
        patterns: Category -> patterns of whole phrases.
        exceptions: Patterns of people who tell what was done to them, ask for help, or ask how to be safe.
    """

    words: dict[str, frozenset[str]]
    patterns: dict[str, list[re.Pattern[str]]]
    exceptions: list[re.Pattern[str]]

    def word_hits(self, text: str) -> list[str]:
        """Return the categories of which a word stands in a text of plain words."""
        found = frozenset(re.findall(r"[a-z]+", text))
        return [category for category in CATEGORIES if found & self.words[category]]

    def pattern_hits(self, text: str) -> "Hits":
        """Return what the patterns find in a text of plain words."""
        counts = {
            name: sum(bool(part.search(text)) for part in parts) for name, parts in self.patterns.items()
        }
        return Hits(counts, sum(bool(part.search(text)) for part in self.exceptions))


@dataclass(frozen=True)
class Hits:
    """How many patterns of each category match in a text, and how many exceptions."""

    counts: dict[str, int]
    n_exceptions: int

    @property
    def category(self) -> str | None:
        """The category with the most matches; None unless these are more than the exceptions."""
        best = max(CATEGORIES, key=lambda category: self.counts[category])
        return best if self.counts[best] > self.n_exceptions else None


def read_rules(path: str | os.PathLike[str] = RULES) -> Rules:
    """Return rules from a file with the columns kind, name, text, separated by tabs.

    A row of the kind `words` lists words of a category, `pattern` has a pattern of it, `exception` a pattern of no
    category, `part` a piece that patterns name in angle brackets.

    Raises:
        ValueError: A row is of another kind or category, or no pattern; the message has its line.
        FileNotFoundError: There is no such file.
    """
    parts: dict[str, str] = {}
    words: dict[str, frozenset[str]] = dict.fromkeys(CATEGORIES, frozenset())
    patterns: dict[str, list[re.Pattern[str]]] = {category: [] for category in CATEGORIES}
    exceptions: list[re.Pattern[str]] = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines[1:], start=2):
        kind, name, text = [*line.split("\t"), "", ""][:3]
        if kind in ("words", "pattern"):
            check_choice(f"the category in line {number}", name, CATEGORIES)
        check_choice(f"the kind in line {number}", kind, ("words", "part", "pattern", "exception"))
        if kind == "words":
            words[name] |= frozenset(text.split())
            continue
        try:
            text = re.sub(r"<([a-z]+)>", lambda match: parts[match[1]], text)
            compiled = re.compile(text)
        except (re.error, KeyError) as error:
            raise ValueError(
                f"line {number} must be a pattern of known parts, got {text!r}: {error}"
            ) from error
        if kind == "part":
            parts[name] = text
        else:
            (patterns[name] if kind == "pattern" else exceptions).append(compiled)
    return Rules(words, patterns, exceptions)


N_BUCKETS = 2**15


def hashed_features(text: str, n_buckets: int = N_BUCKETS) -> dict[int, float]:
    """Return bucket -> value for the words, pairs and triples of words, and pieces of 3 to 5 letters of a text.

    Each feature falls into a bucket by its CRC-32. Values grow with the logarithm of the count; their squares sum to 1.
    """
    words = re.findall(r"[a-z]+", text)
    found = [" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)]
    for word in words:
        padded = f"_{word[:30]}_"
        found += [padded[i : i + n] for n in (3, 4, 5) for i in range(len(padded) - n + 1)]
    counts: dict[int, int] = {}
    for feature in found:
        bucket = zlib.crc32(feature.encode()) % n_buckets
        counts[bucket] = counts.get(bucket, 0) + 1
    values = {bucket: 1 + math.log(n) for bucket, n in counts.items()}
    norm = math.sqrt(sum(value * value for value in values.values())) or 1.0
    return {bucket: value / norm for bucket, value in values.items()}


Scorer = Callable[[Sequence[str]], Sequence[float]]
SIGNALS = ("patterns", "exceptions", "words", "classifier")


@dataclass(frozen=True)
class Verdict:
    """What a filter thinks of a text.

    Attributes:
        blocked: Whether it should not pass.
        score: The higher, the worse; above the filter's threshold it is blocked.
        category: What it is most like, one of `CATEGORIES`; None where no pattern and no word says so.
    """

    blocked: bool
    score: float
    category: str | None


class ContentFilter:
    """Says of a text whether a service should take or give it.

    Four signals are weighed: patterns that match, exceptions that match, listed words, and a linear classifier over
    hashed pieces of the text. All of them read what `Speller.undisguise` makes of it. The time for a text grows with
    its length; of a very long one, windows are scored one by one, and the worst counts.

    Args:
        speller: Finds the words.
        weights: Of the linear classifier, one for each bucket; float32.
        mix: A weight for each of `SIGNALS`, then the constant; then, with a `scorer`, the weight of its scores.
        threshold: Scores above it are blocked.
        scorer: A stronger model: texts -> numbers, higher for worse.
        rules: Words and patterns; None are those that ship.

    Raises:
        ValueError: The numbers of weights do not fit.
    """

    WINDOW, STEP = 240, 120  # characters of an undisguised text; what is longer is read in pieces

    def __init__(
        self,
        speller: Speller,
        weights: np.ndarray,
        mix: Sequence[float],
        threshold: float,
        scorer: Scorer | None = None,
        rules: Rules | None = None,
    ) -> None:
        require("weights", weights.shape, weights.ndim == 1 and weights.size > 0, "one row of numbers")
        expected = len(SIGNALS) + 1 + (scorer is not None)
        require("mix", len(mix), len(mix) == expected, f"{expected} numbers")
        self.speller, self.weights, self.mix = speller, weights, np.asarray(mix, dtype=np.float64)
        self.threshold, self.scorer, self.rules = float(threshold), scorer, rules or read_rules()

    def signals(self, plain: str) -> list[float]:
        """Return the four signals of a text that `undisguise` has written."""
        hits = self.rules.pattern_hits(plain)
        features = hashed_features(plain, self.weights.size)
        linear = float(sum(self.weights[bucket] * value for bucket, value in features.items()))
        return [
            min(2.0, max(hits.counts.values())),
            min(2.0, hits.n_exceptions),
            min(2.0, len(self.rules.word_hits(plain))),
            linear,
        ]

    def score(self, text: str) -> float:
        """Return how bad a text is. Raises TypeError if it is no text."""
        return self.check(text).score

    def check(self, text: str) -> Verdict:
        """Return what the filter thinks of a text. Raises TypeError if it is no text."""
        plain = self.speller.undisguise(text)
        windows = [
            plain[i : i + self.WINDOW]
            for i in range(0, max(1, len(plain) - self.WINDOW + self.STEP), self.STEP)
        ]
        table = np.array([[*self.signals(window), 1.0] for window in windows])
        scores = table @ self.mix[: len(SIGNALS) + 1]
        if self.scorer is not None:
            given = [readable(text, plain)] if len(windows) == 1 else windows
            scores = scores + self.mix[-1] * np.asarray(self.scorer(given))
        worst = int(scores.argmax())
        hits = self.rules.pattern_hits(windows[worst])
        names = [hits.category, *self.rules.word_hits(windows[worst])]
        return Verdict(
            bool(scores[worst] > self.threshold), float(scores[worst]), next((n for n in names if n), None)
        )


def readable(text: str, plain: str) -> str:
    """Return a text as it was written if `Speller.undisguise` changed none of its words, else what that made of it.

    A language model has learned from texts with capitals and marks; it should not lose them without need.
    """
    words = lambda part: re.findall(r"[a-z0-9]+", part.lower().replace("'", "").replace("’", ""))
    return text if words(text) == words(plain) else plain


SHIPPED = CHECKPOINTS / "content-filter"


def save_filter(
    content_filter: ContentFilter, folder: str | os.PathLike[str], counts: dict[str, int], **details: object
) -> None:
    """Write a filter without scorer into a new folder: `filter.json` and `model.safetensors`, weights in float16.

    Args:
        counts: Of its words, as its speller was given them.
        details: What else is to be kept, such as the recipe; `with_scorer` has mix and threshold for `load_filter`.

    Raises FileExistsError if there is such a folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    save_file({"weights": content_filter.weights.astype(np.float16)}, folder / "model.safetensors")
    about = {
        "mix": content_filter.mix.tolist(),
        "threshold": content_filter.threshold,
        **details,
        "words": counts,
    }
    (folder / "filter.json").write_text(json.dumps(about, separators=(",", ":")) + "\n", encoding="utf-8")


def load_filter(
    folder: str | os.PathLike[str] | None = None, *, scorer: Scorer | None = None
) -> ContentFilter:
    """Return the filter that ships with the course, or one that `save_filter` wrote.

    Args:
        folder: None is the one that ships.
        scorer: A stronger model, see `ContentFilter`; the file must have the weights that go with it.

    Raises:
        ValueError: A file is damaged, or has no weights for a scorer.
        FileNotFoundError: There is none.
    """
    path = SHIPPED if folder is None else Path(folder)
    text = (path / "filter.json").read_text(encoding="utf-8")
    try:
        about = json.loads(text)
        weights = load_file(path / "model.safetensors")["weights"].astype(np.float32)
        chosen = about if scorer is None else about["with_scorer"]
        return ContentFilter(Speller(about["words"]), weights, chosen["mix"], chosen["threshold"], scorer)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no such filter that can be read: {error!r}") from error


def adapter_scorer(name_or_path: str | os.PathLike[str] = "filter-lora") -> Scorer:
    """Return a scorer for `load_filter`: what a tuned SmolLM2 gives to "block", as log-odds between -12 and 12.

    Args:
        name_or_path: As for `shared.finetuning.lora_classifier.load_adapted_classifier`, where the errors stand too;
            one of its labels is "block".
    """
    from shared.finetuning.lora_classifier import (
        load_adapted_classifier,
    )  # a second, for who wants a scorer only

    classifier = load_adapted_classifier(name_or_path)
    check_choice("block", "block", classifier.labels)
    place = classifier.labels.index("block")

    def score(texts: Sequence[str]) -> list[float]:
        probabilities = classifier.predict_proba(texts)[:, place].double()
        return torch.logit(probabilities, eps=1e-5).clamp(-12, 12).tolist()

    return score


class OutputGuard:
    """Lets a text that is being written pass piece by piece, until the filter blocks it.

    Before any character goes out, the filter has read it together with at least `hold` characters behind it, or the end
    of the text, and with up to `window - hold` before it. So if `is_bad` finds a bad passage of up to `hold` characters
    in whatever stands around it, that passage goes out at most up to the place where it begins.

    Args:
        is_bad: Says of a text whether it must not go out.
        hold: Characters that are held back.
        window: Characters that are read at a time.

    Attributes:
        blocked: Whether something was found; nothing more goes out then.

    Raises:
        ValueError: `hold` is not below `window`, or a number is below 1.
    """

    def __init__(self, is_bad: Callable[[str], bool], hold: int = 120, window: int = 480) -> None:
        whole_number("hold", hold)
        require("window", window, whole_number("window", window) > hold, f"above hold, {hold}")
        self.is_bad, self.hold, self.window, self.blocked = is_bad, hold, window, False
        self._sent, self._held = "", ""  # what may still matter of the text that has gone out; what waits

    def feed(self, piece: str) -> str:
        """Take the next piece of the text and return what may go out now."""
        if self.blocked:
            return ""
        self._held += piece
        given = []
        # A check costs time, so it waits until it lets something out that is worth it: a quarter of what is held.
        while len(self._held) >= self.hold + self.hold // 4 + 1:
            size = min(
                len(self._held),
                self.window - min(len(self._sent), self.window - self.hold - self.hold // 4 - 1),
            )
            size = max(size, self.hold + self.hold // 4 + 1)
            if not self._passes(size):
                break
            given.append(self._release(size - self.hold))
        return "".join(given)

    def end(self) -> str:
        """Return what was held back, when no piece follows."""
        given = ""
        while self._held and not self.blocked:
            size = min(len(self._held), self.window)
            if self._passes(size):
                given += self._release(size if size == len(self._held) else max(1, size - self.hold))
        return given

    def _passes(self, size: int) -> bool:
        """Read the first `size` characters that are held, with what went out before."""
        before = self._sent[-(self.window - size) :] if size < self.window else ""
        self.blocked = self.is_bad(before + self._held[:size])
        return not self.blocked

    def _release(self, n: int) -> str:
        """Send the first `n` characters that are held."""
        out, self._held = self._held[:n], self._held[n:]
        self._sent = (self._sent + out)[-self.window :]
        return out
