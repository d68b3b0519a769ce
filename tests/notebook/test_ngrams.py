"""Count-based language models against a brute-force implementation, by hand, and in their limits."""

import importlib.util
import time
from itertools import pairwise, product

import numpy as np
import pytest

from shared.notebook.ngrams import NGramModel

START = "<s>"
RANDOM = np.random.default_rng(1)
SEQUENCES = [RANDOM.integers(0, 5, size=n).tolist() for n in (40, 1, 60, 7)]


class ByDefinition:
    """Interpolated Kneser-Ney as the paper writes it: sets of runs, no codes, one discount for each length."""

    def __init__(self, order, n_symbols, sequences, modified=False):
        self.order, self.n_symbols, self.modified = order, n_symbols, modified
        self.counts = {length: {} for length in range(1, order + 1)}
        longest, seen_before = [], {length: set() for length in range(1, order)}
        for sequence in sequences:
            padded = (START,) * (order - 1) + tuple(sequence)
            for end in range(order, len(padded) + 1):
                longest.append(padded[end - order : end])
                for length in range(1, order):
                    seen_before[length].add(padded[end - length - 1 : end])
        for run in longest:
            self.counts[order][run] = self.counts[order].get(run, 0) + 1
        for length in range(1, order):
            for run in seen_before[length]:
                self.counts[length][run[1:]] = self.counts[length].get(run[1:], 0) + 1

    def discount(self, length, count):
        """The discount of a count, 1999 paper, equation 17 (one discount) and 18 (three)."""
        n = {c: sum(value == c for value in self.counts[length].values()) for c in (1, 2, 3, 4)}
        y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
        if self.modified and all(n.values()):
            three = {1: 1 - 2 * y * n[2] / n[1], 2: 2 - 3 * y * n[3] / n[2], 3: 3 - 4 * y * n[4] / n[3]}
            if all(0 < three[c] <= c for c in three):
                return three[min(count, 3)]
        return y

    def probability(self, context, symbol):
        """The recursion over shorter and shorter contexts, down to the uniform distribution."""
        context = (
            ((START,) * (self.order - 1) + tuple(context))[-(self.order - 1) :] if self.order > 1 else ()
        )
        return self._of_length(context, symbol)

    def _of_length(self, context, symbol):
        length = len(context) + 1
        shorter = self._of_length(context[1:], symbol) if context else 1 / self.n_symbols
        following = {run[-1]: c for run, c in self.counts[length].items() if run[:-1] == tuple(context)}
        if not following:
            return shorter
        total = sum(following.values())
        saved = sum(self.discount(length, count) for count in following.values())
        count = following.get(symbol, 0)
        return (count - self.discount(length, count) if count else 0) / total + saved / total * shorter


def test_a_bigram_by_hand():
    """The text "0 0 1", one discount. Runs of two after the start mark S: S0, 00, 01, once each."""
    model = NGramModel(2, 3).fit([[0, 0, 1]])
    # Discount of the pairs: three counts of 1, none of 2: 3 / (3 + 0) = 1, so a pair's whole count is passed on.
    # One symbol: 0 was seen after S and after 0, 1 after 0: counts 2 and 1, discount 1 / (1 + 2) = 1/3.
    # p(0) = (2 - 1/3)/3 + (2/3)/3 * 1/3, p(1) = (1 - 1/3)/3 + 2/27, p(2) = 2/27.
    expected = [15 / 27 + 2 / 27, 6 / 27 + 2 / 27, 2 / 27]
    np.testing.assert_allclose(model.probabilities([0]), expected)
    assert model.n_counts == 3 + 2


def test_a_unigram_by_hand():
    """Counts 3 and 1 of 4; discount 1 / (1 + 0) = 1: half of all is passed on to the uniform distribution."""
    model = NGramModel(1, 4).fit([[0, 0, 1, 0]])
    np.testing.assert_allclose(model.probabilities(), [2 / 4 + 1 / 8, 1 / 8, 1 / 8, 1 / 8])
    np.testing.assert_allclose(2.0 ** model.log2_probabilities([0, 3]), [5 / 8, 1 / 8])


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_it_is_what_the_definition_says(order, modified):
    model = NGramModel(order, 6, modified=modified).fit(SEQUENCES)
    reference = ByDefinition(order, 6, SEQUENCES, modified)
    for context in ([], [1], [0, 5], [3, 2, 1, 0, 4, 4]):
        expected = [reference.probability(context, symbol) for symbol in range(6)]
        np.testing.assert_allclose(model.probabilities(context), expected, rtol=1e-12)
    text = [4, 0, 1, 5, 5, 2, 3, 0]
    expected = [np.log2(reference.probability(text[:i], text[i])) for i in range(len(text))]
    np.testing.assert_allclose(model.log2_probabilities(text), expected, rtol=1e-12)


def test_three_discounts_are_used_where_they_exist():
    """On a text whose counts 1 to 4 all occur, the modified model differs from the plain one, as by definition."""
    sequences = [np.minimum(np.random.default_rng(3).geometric(0.15, size=300) - 1, 30)]
    plain, modified = (NGramModel(2, 31, modified=m).fit(sequences) for m in (False, True))
    reference = ByDefinition(2, 31, sequences, modified=True)
    assert len({reference.discount(2, count) for count in (1, 2, 3)}) == 3
    expected = [reference.probability([2], symbol) for symbol in range(31)]
    np.testing.assert_allclose(modified.probabilities([2]), expected, rtol=1e-12)
    assert np.abs(modified.probabilities([2]) - plain.probabilities([2])).max() > 1e-3


@pytest.mark.skipif(importlib.util.find_spec("nltk") is None, reason="nltk is not installed")
def test_nltk_agrees():
    """nltk's bigram with our discount; it takes no discount from single symbols, so that part is exchanged."""
    from nltk.lm import KneserNeyInterpolated

    ours = NGramModel(2, 6).fit(SEQUENCES)
    reference = ByDefinition(2, 6, SEQUENCES)
    discount = reference.discount(2, 1)
    padded = [[START, *map(str, sequence)] for sequence in SEQUENCES]
    runs = [[*((w,) for w in p), *pairwise(p)] for p in padded]
    theirs = KneserNeyInterpolated(2, discount=discount)
    theirs.fit(runs, [START, *map(str, range(5))])
    following = {run: count for run, count in reference.counts[2].items() if run[0] == 3}
    passed_on = discount * len(following) / sum(following.values())
    single = ours.probabilities([5])  # 5 was never seen, so this is the distribution without context
    share = np.array([reference.counts[1].get((w,), 0) for w in range(5)]) / len(reference.counts[2])
    expected = ours.probabilities([3])[:5] + passed_on * (share - single[:5])
    np.testing.assert_allclose([theirs.score(str(w), ["3"]) for w in range(5)], expected)


@pytest.mark.parametrize(("order", "modified"), list(product([1, 2, 4, 7], [False, True])))
def test_probabilities_sum_to_one(order, modified):
    model = NGramModel(order, 9, modified=modified).fit(SEQUENCES)  # symbols 5 to 8 are never seen
    for context in ([], [0], [1, 2, 3], [8], [0, 8, 0], SEQUENCES[0][:6], list(range(9))):
        probabilities = model.probabilities(context)
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
        assert (probabilities > 0).all()


def test_a_text_and_a_context_give_the_same_probabilities():
    model = NGramModel(4, 5).fit(SEQUENCES)
    text = SEQUENCES[2][:20]
    single = [np.log2(model.probabilities(text[:i])[text[i]]) for i in range(len(text))]
    np.testing.assert_allclose(model.log2_probabilities(text), single)
    assert model.log2_probabilities([]).shape == (0,)


@pytest.mark.parametrize("order", [1, 3, 6])
def test_it_never_sees_what_comes_later(order):
    model = NGramModel(order, 5).fit(SEQUENCES)
    text = SEQUENCES[0]
    changed = [*text[:20], *reversed(text[20:])]
    before, after = model.log2_probabilities(text), model.log2_probabilities(changed)
    np.testing.assert_array_equal(before[:20], after[:20])


def test_sequences_do_not_touch():
    """A run across two sequences is not counted, and their order does not matter."""
    model = NGramModel(2, 2).fit([[0, 0], [1, 1]])
    swapped = NGramModel(2, 2).fit([[1, 1], [0, 0]])
    np.testing.assert_array_equal(model.probabilities([0]), swapped.probabilities([0]))
    assert model.n_counts == 4 + 2  # S0, 00, S1, 11 and the two symbols


def test_bytes_are_ids():
    text = b"the lamp, the boat, the lamp"
    model = NGramModel(3, 256).fit([text])
    np.testing.assert_array_equal(model.log2_probabilities(text), model.log2_probabilities(list(text)))
    assert model.probabilities(b"th")[ord("e")] > 0.5
    assert NGramModel(1, 256).fit([bytes(range(65, 70)) * 20]).probabilities()[0] > 0  # no count of 1 at all


def test_longer_contexts_predict_a_text_with_structure_better():
    text = [i % 7 if i % 3 else (i // 3) % 5 for i in range(3000)]
    bits = [-NGramModel(n, 7).fit([text[:2000]]).log2_probabilities(text[2000:]).mean() for n in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]


def test_samples_repeat_and_follow_the_counts():
    model = NGramModel(2, 5).fit(SEQUENCES)
    drawn = model.sample(4000, seed=7)
    assert drawn == model.sample(4000, seed=7) != model.sample(4000, seed=8)
    after_three = [b for a, b in pairwise(drawn) if a == 3]
    shares = np.bincount(after_three, minlength=5) / len(after_three)
    assert np.abs(shares - model.probabilities([3])).max() < 0.06
    stopped = model.sample(1000, seed=7, stop=2)
    assert stopped == drawn[: drawn.index(2) + 1]
    assert len(model.sample(3, seed=1, context=[2], stop=2)) >= 1


def test_time_grows_with_the_text_and_not_faster():
    """Sixteen times the text may take sixteen times as long, and some more for sorting: below 50 times."""
    text = np.random.default_rng(5).integers(0, 50, size=160_000)

    def seconds(n):
        started = time.process_time()
        NGramModel(4, 50).fit([text[:n]]).log2_probabilities(text[:n])
        return time.process_time() - started

    assert min(seconds(160_000) for _ in range(3)) < 50 * max(min(seconds(10_000) for _ in range(5)), 1e-3)


def test_fitting_again_starts_anew():
    model = NGramModel(3, 5).fit([[4, 4, 4]]).fit(SEQUENCES)
    np.testing.assert_array_equal(
        model.probabilities([1]), NGramModel(3, 5).fit(SEQUENCES).probabilities([1])
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [((0, 5), ValueError, "order"), ((2, 0), ValueError, "n_symbols"), ((2.0, 5), TypeError, "order")],
)
def test_bad_sizes(arguments, error, words):
    with pytest.raises(error, match=words):
        NGramModel(*arguments)


def test_bad_texts():
    model = NGramModel(2, 5)
    with pytest.raises(RuntimeError, match="fit"):
        model.log2_probabilities([1])
    with pytest.raises(RuntimeError, match="fit"):
        model.probabilities()
    with pytest.raises(TypeError, match="sequences"):
        model.fit(b"one text")
    with pytest.raises(TypeError, match="sequences"):
        model.fit([1, 2, 3])
    with pytest.raises(TypeError, match="sequences"):
        model.fit([[0.5]])
    with pytest.raises(ValueError, match="sequences must be at least one symbol long"):
        model.fit([[]])
    with pytest.raises(ValueError, match="sequences must be ids from 0 to 4, got 5"):
        model.fit([[1, 5]])
    model.fit(SEQUENCES)
    with pytest.raises(ValueError, match="ids must be ids from 0 to 4, got -1"):
        model.log2_probabilities([0, -1])
    with pytest.raises(ValueError, match="n must be at least 1"):
        model.sample(0, seed=1)
