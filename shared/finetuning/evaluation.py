"""How good an answer is, beside references: words in common, and the agreement of two measures.

Exact match and token F1 follow SQuAD's program, ROUGE-L the package `rouge-score` without stemming. The
longest common subsequence takes memory of one text's length and refuses texts above `MAX_WORDS`. The
interval of a rank correlation is a bootstrap over groups that belong together.

Left out: BLEU and other measures of translation, stemming, measures by embeddings, and numbers compared
as numbers.

Follows Rajpurkar et al. (2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text"), Lin (2004,
"ROUGE: A Package for Automatic Evaluation of Summaries"), and Efron (1979, "Bootstrap Methods: Another
Look at the Jackknife").

Explained and proven in ch07_instruction/02_evaluation.ipynb; written from there by `make promote`.
"""

import json
import math
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shared.checks import check_text, require, whole_number

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, without ASCII punctuation, articles and extra white space.

    Raises TypeError if it is no text.
    """
    check_text("text", text)
    plain = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _as_references(references: str | Sequence[str]) -> list[str]:
    """Return one or several references as a list; ValueError if there is none, TypeError if one is no text."""
    found = [references] if isinstance(references, str) else list(references)
    require("references", len(found), len(found) > 0, "at least one")
    for place, reference in enumerate(found):
        check_text(f"references[{place}]", reference)
    return found


def exact_match(answer: str, references: str | Sequence[str]) -> float:
    """Return 1.0 if the answer equals one of the references after `normalize_answer`, else 0.0.

    Raises ValueError if there is no reference, TypeError if something is no text.
    """
    said = normalize_answer(answer)
    return float(any(said == normalize_answer(reference) for reference in _as_references(references)))


@dataclass(frozen=True)
class Overlap:
    """What an answer has in common with a reference: the share of the answer's words, and of the reference's."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean of both, 0 where both are 0."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def _token_overlap(answer: str, reference: str) -> Overlap:
    """Return the overlap as bags of normalized words. By SQuAD's rule two empty ones agree, and one alone does not."""
    said, wanted = (normalize_answer(text).split() for text in (answer, reference))
    if not said or not wanted:
        equal = float(said == wanted)
        return Overlap(equal, equal)
    n_common = (Counter(said) & Counter(wanted)).total()
    return Overlap(n_common / len(said), n_common / len(wanted))


def token_f1(answer: str, references: str | Sequence[str]) -> float:
    """Return the F1 of the words of answer and reference, order ignored; the best of several references counts.

    Follows the program of SQuAD 2.0. Raises ValueError if there is no reference, TypeError if something is no text.
    """
    return max(_token_overlap(answer, reference).f1 for reference in _as_references(references))


# Of each text: the time of the longest common subsequence grows with the product of both lengths.
MAX_WORDS = 10_000


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence of two sequences, in memory of the second's length.

    Raises ValueError if one is longer than `MAX_WORDS`.
    """
    for name, words in (("first", first), ("second", second)):
        require(name, f"{len(words):,} words", len(words) <= MAX_WORDS, f"at most {MAX_WORDS:,} words long")
    # Each different word becomes a number, as NumPy compares numbers quickly.
    numbers: dict[Hashable, int] = {}
    rows, columns = (
        np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int32)
        for words in (first, second)
    )
    # One row of the table: position j holds the length for the first j words of `second`.
    lengths = np.zeros(len(columns) + 1, dtype=np.int32)
    for number in rows:
        # Where the words differ, the diagonal without its one is never more than the cell above: it does no harm.
        above_or_diagonal = np.maximum(lengths[1:], lengths[:-1] + (columns == number))
        lengths[1:] = np.maximum.accumulate(above_or_diagonal)
    return int(lengths[-1])


def rouge_words(text: str) -> list[str]:
    """Return the words that ROUGE compares: runs of a to z and 0 to 9 in lower case; all else separates.

    Other scripts vanish: give `rouge_l` another function for them. Raises TypeError if it is no text.
    """
    check_text("text", text)
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(
    answer: str, references: str | Sequence[str], words: Callable[[str], Sequence[Hashable]] = rouge_words
) -> Overlap:
    """Return precision, recall and F1 by the longest common subsequence of words (Lin, 2004; without stemming).

    The reference with the highest F1 counts. A text without words has nothing in common with any other, nor with
    another empty one: so does the package `rouge-score`.

    Args:
        answer: What a model said.
        references: One or several.
        words: How a text becomes words; `list` compares characters, which suits Chinese.

    Raises:
        ValueError: There is no reference, or a text has more than `MAX_WORDS` words.
        TypeError: Something is no text.
    """
    check_text("answer", answer)
    said, overlaps = words(answer), []
    for reference in _as_references(references):
        wanted = words(reference)
        n_common = lcs_length(wanted, said)
        overlaps.append(Overlap(n_common / max(1, len(said)), n_common / max(1, len(wanted))))
    return max(overlaps, key=lambda overlap: overlap.f1)


def average_ranks(values: Sequence[float]) -> np.ndarray:
    """Return the rank of each value, from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two lists; nan where one holds a single value only.

    Raises ValueError if their lengths differ, are below 2, or a value is nan.
    """
    one, other = (np.asarray(values, dtype=float) for values in (first, second))
    require("second", other.shape, other.shape == one.shape and one.ndim == 1, f"{one.shape} as first")
    require("first", len(one), len(one) > 1, "at least 2 values")
    for name, values in (("first", one), ("second", other)):
        require(name, "nan", not np.isnan(values).any(), "numbers: leave out what has none, and say so")
    ranks = [average_ranks(values) - (len(one) + 1) / 2 for values in (one, other)]
    scale = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float(ranks[0] @ ranks[1] / scale) if scale else math.nan


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho with its bootstrap interval, from so many values in so many independent groups."""

    rho: float
    low: float
    high: float
    n_values: int
    n_groups: int


def rank_correlation(
    first: Sequence[float],
    second: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RankCorrelation:
    """Return Spearman's rank correlation with a percentile interval of the bootstrap (Efron, 1979).

    Args:
        first, second: Two values for each thing.
        groups: What belongs together, such as all answers to one question, is drawn together; None: each for itself.
        n_resamples: How often is drawn.
        confidence: Of the interval.
        seed: Of the draws.

    Raises:
        ValueError: The lengths differ, a value is nan, one list is constant (there is no order then), there are fewer
            than 3 groups, or `confidence` is not between 0 and 1.
    """
    rho = spearman(first, second)
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    require("first and second", "one value only", not math.isnan(rho), "of at least two values")
    require("confidence", confidence, 0 < confidence < 1, "between 0 and 1")
    names = list(range(len(one))) if groups is None else list(groups)
    require("groups", len(names), len(names) == len(one), f"{len(one)}, one for each value")
    places: dict[Hashable, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    members = [np.array(some) for some in places.values()]
    require("groups", len(members), len(members) > 2, "at least 3")
    # Draw groups with replacement; a draw without any order has no correlation and is left out.
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(whole_number("n_resamples", n_resamples)):
        chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        drawn.append(spearman(one[chosen], other[chosen]))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.nanquantile(drawn, tails)
    return RankCorrelation(rho, float(low), float(high), len(one), len(members))


def read_answers(path: str | os.PathLike[str]) -> list[dict[str, object]]:
    """Return the entries of a JSONL file: each line an object with `prompt`, `answer` and `reference`.

    Raises:
        ValueError: A line is no such object, or there is none; the message names the line.
        FileNotFoundError: There is no such file.
    """
    entries = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entries.append(_checked_entry(json.loads(line)))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"line {number} of {os.fspath(path)}: {error}") from None
    require("path", os.fspath(path), len(entries) > 0, "a file with at least one entry")
    return entries


def _checked_entry(entry: object) -> dict[str, object]:
    """Return an entry that has three texts, of which the reference may be several; else ValueError or TypeError."""
    wanted = ("prompt", "answer", "reference")
    found = list(entry) if isinstance(entry, dict) else type(entry).__name__
    fits = isinstance(entry, dict) and set(wanted) <= set(entry)
    require("an entry", found, fits, f"an object with {', '.join(wanted)}")
    check_text("prompt", entry["prompt"])
    check_text("answer", entry["answer"])
    if not isinstance(entry["reference"], list):
        check_text("reference", entry["reference"])
    _as_references(entry["reference"])
    return entry


def score_answers(entries: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """Return a row for each entry of `read_answers`: the answer, its words, exact match, token F1 and ROUGE-L.

    Raises ValueError or TypeError if an entry does not fit; the message has its place.
    """
    rows = []
    for place, entry in enumerate(entries):
        try:
            entry = _checked_entry(entry)
            answer, reference = entry["answer"], entry["reference"]
            measures = {
                "exact_match": exact_match(answer, reference),
                "token_f1": token_f1(answer, reference),
                "rouge_l": rouge_l(answer, reference).f1,
            }
        except (ValueError, TypeError) as error:
            raise type(error)(f"entry {place}: {error}") from None
        rows.append({"answer": answer, "words": len(answer.split()), **measures})
    return rows
