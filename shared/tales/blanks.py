"""What may stand in the blanks of a tale, with its exact probability: the ceiling for every model that fills them.

A story is given as tokens, some of them hidden. `fill_story` returns for each hidden place every token that could stand
there, given everything that is seen on both sides. `fill_pair` does the same for two segments of which nobody knows
whether they belong together: the end of the first story, or of another one, with the chance of each (BERT's two tasks).

How: all derivations that agree with what is seen are followed side by side. A variable whose word is hidden is not
tried word by word: it keeps the set of words that it may still be, and what is seen later makes the set smaller. Two
variables that must differ are counted at the end, by inclusion and exclusion. The beginning of the story to which a
second segment belongs is not seen at all; its derivations are summed once, those that leave the same behind together.

Left out: tokens that run across the border of a word, and texts that are no stories of the grammar.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from heapq import heappop, heappush
from typing import Protocol

from shared.tales.generator import grammar
from shared.tales.grammar import Grammar
from shared.tales.nodes import Entry, Fork, Mention, Node, Text

Sets = tuple[tuple[str, frozenset[Entry]], ...]  # variables, and what each may be


class Encoder(Protocol):
    """What cuts a text into tokens, each word on its own."""

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...


@dataclass(frozen=True)
class Blanks:
    """What may stand in the hidden places of a story or a pair.

    Attributes:
        follows: The probability that the second segment belongs to the first; 1 for a story.
        places: For each hidden place, in their order, token -> probability.
    """

    follows: float
    places: list[dict[int, float]]

    @property
    def best(self) -> list[float]:
        """The probability of the most probable token of each place: how often the best guess is right."""
        return [max(place.values()) for place in self.places]


@dataclass(frozen=True)
class _Way:
    """Derivations that agree with what was seen so far.

    Attributes:
        weight: The probability of one assignment of entries to the variables; `_assignments` counts them.
        sets: What each variable may be.
        unequal: Pairs of variables that differ, both of one pool.
        hidden: For each hidden place a token, or a variable with its form and the place in it.
    """

    weight: float = 1.0
    sets: Mapping[str, frozenset[Entry]] = field(default_factory=dict)
    unequal: frozenset[frozenset[str]] = frozenset()
    hidden: tuple[int | tuple[str, str, int], ...] = ()


class BlankFiller:
    """Fills the blanks of stories that one tokenizer has cut.

    Args:
        encoder: The tokenizer.
        own: The grammar; that of the tales if not given.
        most_sentences: The first segment of a pair has 1 to so many sentences, each number as probable.
    """

    def __init__(self, encoder: Encoder, own: Grammar | None = None, most_sentences: int = 7) -> None:
        self.grammar = own or grammar()
        self.most_sentences = most_sentences
        self.tokens = cache(lambda text: tuple(encoder.encode_ordinary(text)))
        self._tails: list[list[tuple[float, Node | None, _Way]]] = []

    def fill_story(self, tokens: Sequence[int | None]) -> Blanks:
        """Return what may stand in the places of a whole story that are None.

        Raises ValueError if no story of the grammar has these tokens.
        """
        ways = [way for _, way in self._read(self.grammar.root, _Way(), list(tokens), None)]
        total, places = self._weigh([(1.0, way) for way in ways])
        _require_story(total)
        return Blanks(1.0, [_normalized(place, total) for place in places])

    def fill_pair(self, first: Sequence[int | None], second: Sequence[int | None]) -> Blanks:
        """Return what may stand in the places of a pair that are None, and whether the second segment follows.

        In half of all cases it does; else it is the end of another story, cut after as many sentences. Raises
        ValueError if there is no such pair.
        """
        first, second = list(first), list(second)
        # One story, cut where the first segment ends.
        together = [way for _, way in self._read(self.grammar.root, _Way(), first + second, len(first))]
        one, one_places = self._weigh([(1.0, way) for way in together])
        # Two stories, cut after the same number of sentences.
        heads: dict[int, list[_Way]] = defaultdict(list)
        for n_sentences, way in self._read(self.grammar.root, _Way(), first, len(first), stop=True):
            heads[n_sentences].append(way)
        two = 0.0
        two_places: list[dict[int, float]] = [defaultdict(float) for _ in one_places]
        for n_sentences, ways in heads.items():
            tails = [
                (weight, way)
                for weight, node, start in self._tail_starts()[n_sentences]
                for _, way in self._read(node, start, second, None)
            ]
            head, head_places = self._weigh([(1.0, way) for way in ways])
            tail, tail_places = self._weigh(tails)
            two += head * tail
            n_head = len(head_places)
            two_places = two_places or [defaultdict(float) for _ in range(n_head + len(tail_places))]
            for i, place in enumerate([*head_places, *tail_places]):
                other = tail if i < n_head else head
                for token, weight in place.items():
                    two_places[i][token] += weight * other
        _require_story(one + two)
        if not one_places:
            one_places = [{} for _ in two_places]
        places = []
        for ours, theirs in zip(one_places, two_places, strict=True):
            merged = defaultdict(float, ours)
            for token, weight in theirs.items():
                merged[token] += weight
            places.append(_normalized(merged, one + two))
        return Blanks(one / (one + two), places)

    def _read(
        self,
        node: Node | None,
        way: _Way,
        tokens: list[int | None],
        cut: int | None,
        *,
        stop: bool = False,
    ) -> Iterator[tuple[int, _Way]]:
        """Yield the ways to read tokens from a node on to the end of the story, and the sentences before the cut.

        Args:
            node: Where the story stands.
            way: How it came there.
            tokens: What is to be read, None where it is hidden.
            cut: After so many tokens a sentence must end, and it must be one of the first `most_sentences`.
            stop: Whether all ends at the cut, and not at the story's end.
        """
        waiting = [(node, 0, 0, 0, way)]
        while waiting:
            node, position, n_gaps, found, way = waiting.pop()
            if node is None:
                if position == len(tokens) and not stop and (cut is None or found):
                    yield found, way
                continue
            if isinstance(node, Fork):
                weight = way.weight / len(node.branches)
                part = _Way(weight, way.sets, way.unequal, way.hidden)
                waiting += [(branch, position, n_gaps, found, part) for branch in node.branches]
                continue
            # Between two sentences: here the first segment may end.
            if isinstance(node, Text) and node.gap:
                n_gaps += 1
                if position == cut:
                    found = n_gaps
                    if n_gaps > self.most_sentences:
                        continue
                    if stop:
                        yield found, way
                        continue
            if cut is not None and not found and position > cut:
                continue
            if isinstance(node, Text):
                ids = self.tokens(node.text)
                if fits(ids, tokens, position):
                    asked = [i for i in range(len(ids)) if tokens[position + i] is None]
                    hidden = (*way.hidden, *(ids[i] for i in asked))
                    part = _Way(way.weight, way.sets, way.unequal, hidden)
                    waiting.append((node.next, position + len(ids), n_gaps, found, part))
                continue
            # A variable: for each number of tokens, the entries that agree with what is seen.
            for drawn in self._draws(node, way):
                groups: dict[int, list[Entry]] = defaultdict(list)
                for entry in drawn.sets[node.variable]:
                    ids = self.tokens(entry.forms[node.form])
                    if fits(ids, tokens, position):
                        groups[len(ids)].append(entry)
                for n_ids, entries in groups.items():
                    asked = [i for i in range(n_ids) if tokens[position + i] is None]
                    hidden = (*drawn.hidden, *((node.variable, node.form, i) for i in asked))
                    sets = {**drawn.sets, node.variable: frozenset(entries)}
                    # What was hidden earlier depends on the set: a variable drawn anew gets another name first.
                    part = _Way(drawn.weight, sets, drawn.unequal, hidden)
                    waiting.append((node.next, position + n_ids, n_gaps, found, part))

    def _draws(self, node: Mention, way: _Way) -> list[_Way]:
        """Return the ways with the variable of a mention drawn, as far as pools and exclusions tell them apart."""
        if not node.source:
            return [way]
        if node.variable in way.sets:
            raise ValueError(
                f"line {node.line}: {node.variable!r} is drawn twice in a plan, which is not supported"
            )
        # The pool may depend on an attribute of another variable.
        ways = [(way, node.source)]
        if node.chooser:
            attribute = node.source.partition(".")[2]
            ways = [
                (_Way(way.weight, {**way.sets, node.chooser: group}, way.unequal, way.hidden), name)
                for name, group in _grouped(way.sets[node.chooser], attribute).items()
            ]
        result = []
        for part, name in ways:
            pool = frozenset(self.grammar.lexicons[name])
            # How many entries are taken depends on which of the others come from this pool.
            parts: list[tuple[_Way, tuple[str, ...]]] = [(part, ())]
            for other in node.excluded:
                parts = [split for one in parts for split in _inside_or_not(*one, other, pool)]
            for one, inside in parts:
                unequal = one.unequal | {frozenset((node.variable, other)) for other in inside}
                weight = one.weight / (len(pool) - len(inside))
                result.append(_Way(weight, {**one.sets, node.variable: pool}, unequal, one.hidden))
        return result

    def _weigh(self, ways: list[tuple[float, _Way]]) -> tuple[float, list[dict[int, float]]]:
        """Return the weight of all ways together, and for each hidden place that of each token."""
        total = 0.0
        places: list[dict[int, float]] = []
        for factor, way in ways:
            n = count_assignments(way.sets, way.unequal)
            if not n:
                continue
            total += factor * way.weight * n
            if len(places) < len(way.hidden):
                places += [defaultdict(float) for _ in range(len(way.hidden) - len(places))]
            shares: dict[str, dict[Entry, int]] = {}
            for place, hidden in zip(places, way.hidden, strict=True):
                if isinstance(hidden, int):
                    place[hidden] += factor * way.weight * n
                    continue
                name, form, i = hidden
                if name not in shares:
                    shares[name] = _counts_of(name, way)
                for entry, count in shares[name].items():
                    place[self.tokens(entry.forms[form])[i]] += factor * way.weight * count
        return total, places

    def _tail_starts(self) -> list[list[tuple[float, Node | None, _Way]]]:
        """Return for each number of sentences where a story may stand after them, with nothing seen of them."""
        if not self._tails:
            self._tails = [[] for _ in range(self.most_sentences + 1)]
            for plan in self.grammar.plans.values():
                self._skip(plan.start, 1 / len(self.grammar.plans))
        return self._tails

    def _skip(self, start: Node | None, weight: float) -> None:
        """Sum the beginnings of a plan, those that leave the same behind together, into `_tails`."""
        order, needed = _order_and_needs(start)
        waiting: list[tuple[int, int]] = []
        numbers: dict[tuple, int] = {}
        states: list[tuple[Node, int, _Way]] = []
        sums: list[float] = []

        def add(node: Node | None, n_gaps: int, way: _Way, weight: float) -> None:
            if node is None:
                return
            # What is not needed later goes, unless another variable must differ from it.
            tied = {name for pair in way.unequal for name in pair}
            keep = {name for name in way.sets if name in needed[node] or name in tied}
            weight *= way.weight * math.prod(len(way.sets[name]) for name in way.sets if name not in keep)
            way = _Way(1.0, {name: way.sets[name] for name in way.sets if name in keep}, way.unequal)
            key = node, n_gaps, frozenset(way.sets.items()), way.unequal
            if key not in numbers:
                numbers[key] = len(states)
                states.append((node, n_gaps, way))
                sums.append(0.0)
                heappush(waiting, (order[node], numbers[key]))
            sums[numbers[key]] += weight

        add(start, 0, _Way(), weight)
        while waiting:
            _, number = heappop(waiting)
            (node, n_gaps, way), weight = states[number], sums[number]
            if isinstance(node, Fork):
                for branch in node.branches:
                    add(branch, n_gaps, way, weight / len(node.branches))
                continue
            if isinstance(node, Text):
                if node.gap:
                    n_gaps += 1
                    if n_gaps > self.most_sentences:
                        continue
                    self._tails[n_gaps].append((weight, node.next, way))
                add(node.next, n_gaps, way, weight)
                continue
            for drawn in self._draws(node, way):
                add(node.next, n_gaps, drawn, weight)


def fits(ids: Sequence[int], tokens: Sequence[int | None], position: int) -> bool:
    """Whether ids may stand in the tokens from a position on; None agrees with everything."""
    if position + len(ids) > len(tokens):
        return False
    return all(tokens[position + i] in (None, one) for i, one in enumerate(ids))


def _grouped(entries: frozenset[Entry], attribute: str) -> dict[str, frozenset[Entry]]:
    groups: dict[str, set[Entry]] = defaultdict(set)
    for entry in entries:
        groups[entry.attributes[attribute]].add(entry)
    return {value: frozenset(group) for value, group in groups.items()}


def _inside_or_not(
    way: _Way, inside: tuple[str, ...], name: str, pool: frozenset[Entry]
) -> list[tuple[_Way, tuple[str, ...]]]:
    """Split a way by whether a variable comes from a pool."""
    result = []
    for part, names in ((way.sets[name] & pool, (*inside, name)), (way.sets[name] - pool, inside)):
        if part:
            result.append((_Way(way.weight, {**way.sets, name: part}, way.unequal, way.hidden), names))
    return result


def count_assignments(sets: Mapping[str, frozenset[Entry]], unequal: frozenset[frozenset[str]]) -> int:
    """Return in how many ways all variables can have a value of their sets, those of each pair different ones.

    The assignments with two values different are all less those with both the same: then the two are one variable.
    """
    if not unequal:
        return math.prod(map(len, sets.values()))
    one, other = pair = min(unequal, key=sorted)
    rest = unequal - {pair}
    if not sets[one] & sets[other]:
        return count_assignments(sets, rest)
    merged = {name: entries for name, entries in sets.items() if name != other} | {
        one: sets[one] & sets[other]
    }
    renamed = frozenset(frozenset(one if name == other else name for name in others) for others in rest)
    same = 0 if any(len(others) == 1 for others in renamed) else count_assignments(merged, renamed)
    return count_assignments(sets, rest) - same


def _counts_of(name: str, way: _Way) -> dict[Entry, int]:
    """Return for each value of a variable how many assignments have it."""
    tied = any(name in pair for pair in way.unequal)
    if not tied:
        n = count_assignments(way.sets, way.unequal) // len(way.sets[name])
        return dict.fromkeys(way.sets[name], n)
    return {
        entry: count_assignments({**way.sets, name: frozenset([entry])}, way.unequal)
        for entry in way.sets[name]
    }


def _order_and_needs(start: Node | None) -> tuple[dict[Node, int], dict[Node, frozenset[str]]]:
    """Return a number for each node, higher the later, and the variables that are needed from it on."""
    needs: dict[Node, frozenset[str]] = {}
    after: list[Node] = []
    waiting: list[tuple[Node | None, bool]] = [(start, False)]
    while waiting:
        node, done = waiting.pop()
        if node is None or node in needs:
            continue
        following = node.branches if isinstance(node, Fork) else [node.next]
        if not done:
            waiting.append((node, True))
            waiting += [(one, False) for one in following]
            continue
        own = set().union(*(needs[one] for one in following if one is not None))
        if isinstance(node, Mention):
            own |= {*node.needs, node.variable}
        needs[node] = frozenset(own)
        after.append(node)
    return {node: number for number, node in enumerate(reversed(after))}, needs


def _normalized(place: Mapping[int, float], total: float) -> dict[int, float]:
    """Return the chances of the tokens, the most probable first."""
    ordered = sorted(place.items(), key=lambda item: -item[1])
    return {token: weight / total for token, weight in ordered if weight > 0}


def _require_story(total: float) -> None:
    if not total > 0:
        raise ValueError("tokens must agree with a story of the grammar, got none that does")
