"""Exact chances of hidden tokens and pairs: against complete enumeration of a small grammar, and on the tales."""

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

import numpy as np
import pytest

from shared.tales.blanks import BlankFiller, count_assignments
from shared.tales.generator import TaleGenerator
from shared.tales.grammar import Grammar
from shared.tales.nodes import Entry, Fork, Node, Text
from shared.tales.scoring import split_sentences

SMALL = """
lexicon girl role=name; he=she; other=boy
    Ann, Bea, Cleo
lexicon boy role=name; he=he; other=girl
    Dan, Eli
pool person = girl + boy
lexicon red kind=fruit
    apple, red plum
lexicon green kind=leaf
    herb, kale, lime leaf
pool food = red + green
lexicon fruit
    jam, juice
lexicon leaf
    soup, salad, stew
plan lunch
    {hero=person} and {friend=person!hero} had {a one=food} and {a two=food!one}.
    {^hero.he} made {meal=@one.kind} (at once|from the {one}|).
    {third=@hero.other!friend} ate {meal} too.
    | Nobody else came.
    |
    {friend} liked the {two}.
plan walk
    {hero=person} saw {friend=@hero.other} in the (sun|rain).
    {friend} had {a one=food}, {a two=food!one} and {a last=food!one,two}.
    {^friend.he} gave {hero} the {last}.
"""


class Words:
    """Each word and each mark a token."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode_ordinary(self, text: str) -> list[int]:
        return [self.ids.setdefault(word, len(self.ids)) for word in re.findall(r"\w+|[^\w\s]", text)]


def stories(grammar: Grammar) -> Iterator[tuple[float, list[str]]]:
    """Every story with its probability, as sentences."""

    def go(node: Node | None, bound: dict[str, Entry], parts: list[str], p: float) -> Iterator:
        if node is None:
            yield p, parts
        elif isinstance(node, Fork):
            for branch in node.branches:
                yield from go(branch, bound, parts, p / len(node.branches))
        elif isinstance(node, Text):
            new = [*parts, ""] if node.gap else [*parts[:-1], parts[-1] + node.text]
            yield from go(node.next, bound, new, p)
        else:
            choices = [bound.get(node.variable)]
            if node.source:
                taken = [bound[name] for name in node.excluded]
                choices = [entry for entry in grammar.choices(node, bound) if entry not in taken]
            for entry in choices:
                new = [*parts[:-1], parts[-1] + entry.forms[node.form]]
                yield from go(node.next, bound | {node.variable: entry}, new, p / len(choices))

    return go(grammar.root, {}, [""], 1.0)


@pytest.fixture(scope="module")
def small() -> tuple[BlankFiller, list[tuple[float, list[list[int]]]]]:
    grammar, words = Grammar(SMALL), Words()
    found = [(p, [words.encode_ordinary(part) for part in parts]) for p, parts in stories(grammar)]
    assert sum(p for p, _ in found) == pytest.approx(1.0)
    return BlankFiller(words, grammar, most_sentences=2), found


def brute_force(
    answers: Iterator[tuple[float, bool, list[int]]], seen: list[int | None]
) -> tuple[float, list[dict[int, float]]]:
    """The posterior from all pairs with their probabilities."""
    asked = [i for i, token in enumerate(seen) if token is None]
    total, follows, places = 0.0, 0.0, [defaultdict(float) for _ in asked]
    for p, is_true, tokens in answers:
        if len(tokens) == len(seen) and all(a in (None, b) for a, b in zip(seen, tokens, strict=True)):
            total += p
            follows += p * is_true
            for place, i in zip(places, asked, strict=True):
                place[tokens[i]] += p
    return follows / total, [{token: p / total for token, p in place.items()} for place in places]


def check(found: object, expected: tuple[float, list[dict[int, float]]]) -> None:
    assert found.follows == pytest.approx(expected[0], abs=1e-12)
    assert len(found.places) == len(expected[1])
    for one, other in zip(found.places, expected[1], strict=True):
        assert one == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 1.0])
def test_blanks_of_a_story_against_all_stories(small: tuple, share: float) -> None:
    filler, found = small
    rng = random.Random(int(10 * share))
    for _ in range(12):
        tokens = list(chain.from_iterable(rng.choices(found, [p for p, _ in found])[0][1]))
        seen = [None if rng.random() < share else token for token in tokens]
        everything = ((p, True, list(chain.from_iterable(parts))) for p, parts in found)
        check(filler.fill_story(seen), brute_force(everything, seen))


@pytest.mark.parametrize("label", [0, 1])
def test_blanks_of_a_pair_against_all_pairs(small: tuple, label: int) -> None:
    filler, found = small
    rng = random.Random(label)
    weights = [p for p, _ in found]
    heads, tails = defaultdict(float), defaultdict(float)
    for (p, parts), cut in itertools.product(found, (1, 2)):
        heads[cut, tuple(chain.from_iterable(parts[:cut]))] += p
        tails[cut, tuple(chain.from_iterable(parts[cut:]))] += p
    for _ in range(8):
        one, other = (rng.choices(found, weights)[0][1] for _ in range(2))
        cut = rng.randint(1, 2)
        first, second = (
            list(chain.from_iterable(one[:cut])),
            list(chain.from_iterable((other if label else one)[cut:])),
        )
        share = rng.choice([0.15, 0.4])
        seen = [None if rng.random() < share else token for token in first + second]
        n, m = len(first), len(second)

        def fits(tokens: tuple[int, ...], part: list[int | None]) -> bool:
            return len(tokens) == len(part) and all(a in (None, b) for a, b in zip(part, tokens, strict=True))

        pairs = [
            (0.5 * p * 0.5, True, list(chain.from_iterable(parts)))
            for p, parts in found
            for k in (1, 2)
            if len(list(chain.from_iterable(parts[:k]))) == n
        ]
        fitting_tails = [(k, t, p) for (k, t), p in tails.items() if fits(t, seen[n:])]
        pairs += [
            (0.5 * 0.5 * p * q, False, [*head, *tail])
            for (k, head), p in heads.items()
            if fits(head, seen[:n])
            for j, tail, q in fitting_tails
            if j == k
        ]
        assert m == len(second)
        check(filler.fill_pair(seen[:n], seen[n:]), brute_force(iter(pairs), seen))


def test_counting_with_differences() -> None:
    entries = [Entry(name, "x", {}) for name in "abcde"]
    rng = random.Random(3)
    for _ in range(200):
        sets = {name: frozenset(rng.sample(entries, rng.randint(1, 4))) for name in "wxyz"}
        pairs = [frozenset(pair) for pair in itertools.combinations("wxyz", 2) if rng.random() < 0.5]
        expected = sum(
            all(len({values["wxyz".index(name)] for name in pair}) == 2 for pair in pairs)
            for values in itertools.product(*(sets[name] for name in "wxyz"))
        )
        assert count_assignments(sets, frozenset(pairs)) == expected


def test_tales_with_nothing_hidden_and_the_truth_always_possible() -> None:
    words = Words()
    filler, generator, rng = BlankFiller(words), TaleGenerator(3), np.random.default_rng(0)
    for story in generator.stories(15):
        parts = [words.encode_ordinary(sentence) for sentence in split_sentences(story.text)]
        tokens = list(chain.from_iterable(parts))
        assert filler.fill_story(tokens).places == []
        seen = [None if rng.random() < 0.15 else token for token in tokens]
        found = filler.fill_story(seen)
        truth = [token for token, shown in zip(tokens, seen, strict=True) if shown is None]
        for place, token in zip(found.places, truth, strict=True):
            assert sum(place.values()) == pytest.approx(1.0)
            assert place[token] > 0
        head, tail = list(chain.from_iterable(parts[:4])), list(chain.from_iterable(parts[4:]))
        assert filler.fill_pair(head, tail).follows > 0.99


def test_what_no_story_says_is_refused() -> None:
    filler = BlankFiller(Words())
    with pytest.raises(ValueError, match="tokens must agree with a story of the grammar"):
        filler.fill_story([5, None])
    with pytest.raises(ValueError, match="tokens must agree with a story of the grammar"):
        filler.fill_pair([1], [None])
