"""Language models that only count: n-grams with interpolated Kneser-Ney smoothing, over ids of tokens or bytes.

The models to beat before anything is called learned: they have no weights and no training loop, only a table of how
often each run of n symbols occurred. All runs of one length are kept as sorted integer codes, so fitting and scoring a
text are a few NumPy operations for each length, about linear in the text's length.

Left out: pruning, interpolation weights tuned on held-out text, files of the ARPA format.

It follows Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1999), section 3: the
longest runs are counted, and a shorter run counts how many different symbols were seen before it (Kneser and Ney,
1995). Each count is lowered by a discount; what this saves is given to the distribution whose context is one symbol
shorter. The last one of all is uniform, so nothing has probability 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shared.checks import check_sizes, require, whole_number

Ids = Sequence[int] | bytes | np.ndarray


@dataclass(frozen=True)
class _Runs:
    """The distinct runs of one length k, each named by its place in `codes`.

    The code of a run is first symbol * (number of runs of length k - 1) + place of the run without its first symbol.

    Attributes:
        codes: (n,) sorted.
        kept: (n,) how much of a run's count is left after the discount, as a share of its context's total.
        passed_on: (number of runs of length k - 1,) the share of a context's total that all discounts together saved,
            which goes to the shorter context; 1 where nothing was ever counted after the context.
        n_counted: How many of the runs have a count; the others only serve as context.
    """

    codes: np.ndarray
    kept: np.ndarray
    passed_on: np.ndarray
    n_counted: int


class NGramModel:
    """Predict a symbol from the `order - 1` symbols before it, by interpolated Kneser-Ney smoothing.

    A sequence begins after `order - 1` start marks, which are never predicted. Its end is not modelled either: put an
    end symbol into the sequences where one is wanted.

    Args:
        order: Length of the longest runs: 1 looks at nothing (unigram), 2 at one symbol before (bigram).
        n_symbols: Ids are 0 to `n_symbols - 1`; 256 for bytes.
        modified: Three discounts for each length (of counts 1, 2, and 3 or more) in place of one.

    Raises:
        TypeError: `order` or `n_symbols` is no int.
        ValueError: One of them is below 1.
    """

    def __init__(self, order: int, n_symbols: int, *, modified: bool = False) -> None:
        check_sizes(order=order, n_symbols=n_symbols)
        self.order, self.n_symbols, self.modified = order, n_symbols, modified
        self._runs: list[_Runs] = []  # of length 1, 2, ... order, once fitted

    def fit(self, sequences: Iterable[Ids]) -> "NGramModel":
        """Count all runs of the sequences, in place of what was counted before; return the model itself.

        Raises:
            TypeError: `sequences` is one text, or holds no sequences of whole numbers.
            ValueError: An id is outside 0 to `n_symbols - 1`, or there is no id at all.
        """
        if isinstance(sequences, str | bytes) or not isinstance(sequences, Iterable):
            raise TypeError(
                f"sequences must be several texts, got {type(sequences).__name__} {sequences!r:.80}"
            )
        marks = np.full(self.order - 1, self.n_symbols, dtype=np.int64)
        pieces = [piece for sequence in sequences for piece in (marks, self._checked("sequences", sequence))]
        text = np.concatenate([marks[:0], *pieces])
        is_symbol = text < self.n_symbols
        require("sequences", 0, bool(is_symbol.any()), "at least one symbol long")

        # Name each run by the place of its code: shorter ones first, since a code is built on the shorter run's place.
        places = [np.zeros(len(text), dtype=np.int64)]
        codes: list[np.ndarray] = []
        firsts: list[np.ndarray] = []
        for length in range(1, self.order + 1):
            n_shorter = len(codes[-1]) if codes else 1
            oldest = np.concatenate([np.full(length - 1, self.n_symbols), text[: len(text) - length + 1]])
            found, first, place = np.unique(
                oldest * n_shorter + places[-1], return_index=True, return_inverse=True
            )
            codes.append(found)
            firsts.append(first)
            places.append(place)

        # Count: the longest runs as they occur, a shorter run once for each different symbol before it.
        runs: list[_Runs] = []
        for length in range(1, self.order + 1):
            n = len(codes[length - 1])
            if length == self.order:
                counts = np.bincount(places[length], minlength=n)
            else:
                counts = np.bincount(codes[length] % n, minlength=n)
            counts = np.where(is_symbol[firsts[length - 1]], counts, 0)  # a start mark is never predicted

            # Discount each count, and give what is saved to the shorter context.
            before = places[length - 1][firsts[length - 1] - 1] if length > 1 else np.zeros(n, dtype=np.int64)
            n_contexts = len(codes[length - 2]) if length > 1 else 1
            discounts = _discounts(counts, self.modified)[np.minimum(counts, 3)]
            totals = np.bincount(before, counts, n_contexts)
            saved = np.bincount(before, discounts, n_contexts)
            seen = totals > 0
            passed_on = np.where(seen, saved / np.where(seen, totals, 1), 1.0)
            kept = (counts - discounts) / np.where(seen, totals, 1)[before]
            runs.append(_Runs(codes[length - 1], kept, passed_on, int((counts > 0).sum())))
        self._runs = runs
        return self

    @property
    def n_counts(self) -> int:
        """How many counts the model stores: what it has in place of a network's parameters. 0 before `fit`."""
        return sum(level.n_counted for level in self._runs)

    def log2_probabilities(self, ids: Ids) -> np.ndarray:
        """Return the base-2 logarithm of the probability of each id, given the ids before it: (n,), below 0.

        Its negative is the number of bits that the id costs.

        Raises:
            TypeError: `ids` is no sequence of whole numbers.
            ValueError: An id is outside 0 to `n_symbols - 1`.
            RuntimeError: The model was not fitted.
        """
        self._check_fitted()
        marks = np.full(self.order - 1, self.n_symbols, dtype=np.int64)
        text = np.concatenate([marks, self._checked("ids", ids)])
        places = [np.zeros(len(text), dtype=np.int64)]
        for length, level in enumerate(self._runs, start=1):
            oldest = np.concatenate([np.full(length - 1, self.n_symbols), text[: len(text) - length + 1]])
            places.append(self._find(level, oldest, places[-1]))
        before = [np.concatenate([[-1], place[:-1]]) for place in places]
        before[0] = places[0]
        probabilities = self._interpolate(places[1:], before[:-1])
        return np.log2(probabilities[self.order - 1 :])

    def probabilities(self, context: Ids = ()) -> np.ndarray:
        """Return the probability of each symbol after `context`, all positive, together 1: (n_symbols,).

        A context shorter than `order - 1` stands at the beginning of a sequence; of a longer one, the end is used.

        Raises:
            TypeError, ValueError, RuntimeError: As `log2_probabilities` does.
        """
        self._check_fitted()
        marks = np.full(self.order - 1, self.n_symbols, dtype=np.int64)
        context = np.concatenate([marks, self._checked("context", context)])
        places = [np.zeros(self.n_symbols, dtype=np.int64)]
        before = [np.zeros(1, dtype=np.int64)]
        for length, level in enumerate(self._runs, start=1):
            oldest = np.arange(self.n_symbols) if length == 1 else context[1 - length]
            places.append(self._find(level, oldest, places[-1]))
            if length < self.order:
                before.append(self._find(level, context[-length], before[-1]))
        return self._interpolate(places[1:], before)

    def sample(self, n: int, *, seed: int, context: Ids = (), stop: int | None = None) -> list[int]:
        """Draw up to `n` symbols one after the other, each from `probabilities` of what stands before it.

        Args:
            n: How many, at least 1.
            seed: Of the draws; the same seed draws the same symbols.
            context: What stands before the first of them.
            stop: The symbol to stop at; it is the last one returned.

        Raises:
            TypeError, ValueError, RuntimeError: As `log2_probabilities` does; `n` is below 1.
        """
        whole_number("n", n)
        self._check_fitted()
        random = np.random.default_rng(seed)
        written = self._checked("context", context).tolist()
        n_given = len(written)
        while len(written) < n_given + n and (len(written) == n_given or written[-1] != stop):
            probabilities = self.probabilities(written[-self.order :])
            written.append(int(random.choice(self.n_symbols, p=probabilities / probabilities.sum())))
        return written[n_given:]

    def _interpolate(self, places: list[np.ndarray], before: list[np.ndarray]) -> np.ndarray:
        """Mix the distributions of all lengths, from the uniform one up.

        `places` are those of the runs of length 1 to `order` that end with the predicted symbol, `before` those of
        their contexts, of length 0 to `order - 1`; -1 is a run that was never seen.
        """
        mixed = np.full(len(places[0]), 1.0 / self.n_symbols)
        for level, place, context in zip(self._runs, places, before, strict=True):
            kept = np.where(place >= 0, level.kept[place], 0.0)
            mixed = kept + np.where(context >= 0, level.passed_on[context], 1.0) * mixed
        return mixed

    @staticmethod
    def _find(level: _Runs, oldest: np.ndarray | int, shorter: np.ndarray) -> np.ndarray:
        """Return the places of runs from their first symbols and the places of the rest; -1 if never seen."""
        code = oldest * len(level.passed_on) + shorter
        place = np.minimum(np.searchsorted(level.codes, code), len(level.codes) - 1)
        return np.where((shorter >= 0) & (level.codes[place] == code), place, -1)

    def _checked(self, name: str, ids: Ids) -> np.ndarray:
        """Return ids as an array, (n,); refuse what is no row of whole numbers or outside the symbols."""
        array = np.frombuffer(ids, dtype=np.uint8) if isinstance(ids, bytes) else np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(f"{name} must be ids in a row, got {type(ids).__name__} {ids!r:.80}")
        array = array.astype(np.int64)
        bad = array[(array < 0) | (array >= self.n_symbols)]
        if bad.size:
            raise ValueError(f"{name} must be ids from 0 to {self.n_symbols - 1}, got {bad[0]}")
        return array

    def _check_fitted(self) -> None:
        if not self._runs:
            raise RuntimeError("the model has counted nothing yet: call fit first")


def _discounts(counts: np.ndarray, modified: bool) -> np.ndarray:
    """Return what is taken off a count of 0, 1, 2, and 3 or more, estimated from how many counts are 1 to 4.

    Where the estimate does not exist (nothing was seen just once, say), the modified discounts become one discount, and
    this one becomes 0.5.
    """
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    single = n1 / (n1 + 2 * n2) if n1 else 0.5
    if modified and min(n1, n2, n3, n4) > 0:
        three = [
            c - (c + 1) * single * more / fewer for c, fewer, more in ((1, n1, n2), (2, n2, n3), (3, n3, n4))
        ]
        if all(0 < discount <= c for c, discount in enumerate(three, start=1)):
            return np.array([0.0, *three])
    return np.array([0.0, single, single, single])
