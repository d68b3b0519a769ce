"""Grades generated tales: which sentences belong to the grammar, and whether what they say agrees.

A sentence belongs to the grammar if some plan has it with any words of the right pools. Agreement is
judged within the plan that explains most sentences in their order: the first mention of a person or thing
says which it is, and each later mention, pronoun and consequence must fit it.

Left out: sentences outside that plan, and what is said of things that the text never introduced.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from shared.tales.generator import derivations, grammar
from shared.tales.nodes import Entry, Fork, Mention, Node, Plan, Text

PRONOUNS = {"he", "him", "his", "himself", "sib"}

_SENTENCE_END = re.compile(r'[.!?](?:"(?=\s)|(?=\s))')

Reading = tuple[tuple[Mention, str], ...]


@dataclass(frozen=True)
class Score:
    """Grades of a text: `story` says whether all of it is one story of the grammar, `plan` which plan fits
    best (None if none does); the others are fractions from 0 to 1, None where there was nothing to judge.

    `sentences`: sentences of the grammar. `pronouns`: pronouns (and brother or sister) that fit the sex of
    their person. `names`: names that stay, or differ where two people meet. `objects`: later mentions of a
    thing, colour, place, animal, number ... that equal the first. `consequences`: effects that fit their
    cause.
    """

    story: bool
    plan: str | None
    sentences: float
    pronouns: float | None
    names: float | None
    objects: float | None
    consequences: float | None


def score(text: str) -> Score:
    """Grade a generated text. Raises ValueError if it is not a str or holds no word."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text must be a str that is not empty, got {text!r}")
    parts = split_sentences(text)
    chains = {name: _align(plan, parts) for name, plan in grammar().plans.items()}
    belonging = set().union(*(matched for matched, _ in chains.values()))
    best = max(chains, key=lambda name: len(chains[name][1]))
    right, judged = _judge(chains[best][1])
    grades = {
        kind: right[kind] / judged[kind] if judged[kind] else None
        for kind in ("pronouns", "names", "objects", "consequences")
    }
    return Score(
        story=bool(derivations(text.strip())),
        plan=best if chains[best][1] else None,
        sentences=len(belonging) / len(parts),
        **grades,
    )


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences; a quotation and the words that introduce it are one sentence."""
    sentences, start = [], 0
    text, quotes, counted = text.strip(), 0, 0
    # A full stop or the like, perhaps a quotation mark, white space, and no lower-case letter; not inside a quotation.
    for match in _SENTENCE_END.finditer(text):
        end = match.end()
        quotes, counted = quotes + text.count('"', counted, end), end
        if quotes % 2 == 0 and not text[end + 1 : end + 2].islower():
            sentences.append(text[start:end].strip())
            start = end
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


@cache
def _surfaces(node: Mention) -> frozenset[str]:
    return frozenset(entry.forms[node.form] for entry in node.entries)


def _readings(node: Node | None, sentence: str, position: int) -> Iterator[Reading]:
    """Yield the ways to read a sentence from a node on, each variable free at each mention."""
    if node is None or node.gap:
        if position == len(sentence):
            yield ()
    elif isinstance(node, Fork):
        for branch in node.branches:
            yield from _readings(branch, sentence, position)
    elif isinstance(node, Text):
        if sentence.startswith(node.text, position):
            yield from _readings(node.next, sentence, position + len(node.text))
    else:
        for surface in _surfaces(node):
            if sentence.startswith(surface, position):
                for rest in _readings(node.next, sentence, position + len(surface)):
                    yield (node, surface), *rest


def _align(plan: Plan, sentences: list[str]) -> tuple[set[int], list[Reading]]:
    """Return which sentences the plan knows, and readings of the longest run of them in the plan's order."""
    matched: set[int] = set()
    # best[s] is the longest chain of readings whose last sentence stands in slot s or before it.
    best: list[list[Reading]] = [[] for _ in range(len(plan.slots) + 1)]
    for number, sentence in enumerate(sentences):
        found = {}
        for slot, (_, templates) in enumerate(plan.slots, 1):
            for nodes in templates:
                reading = next(_readings(nodes[0], sentence, 0), None) if nodes else None
                if reading is not None:
                    found[slot] = [*best[slot - 1], reading]
        if found:
            matched.add(number)
        for slot, chain in found.items():
            for later in range(slot, len(best)):
                if len(chain) > len(best[later]):
                    best[later] = chain
    return matched, best[-1]


def _judge(readings: list[Reading]) -> tuple[Counter[str], Counter[str]]:
    """Count, by kind, the mentions that agree with what was said before, and the mentions judged."""
    right: Counter[str] = Counter()
    judged: Counter[str] = Counter()

    # What each variable may be by what was said of it so far.
    held: dict[str, set[Entry]] = {}
    for node, surface in (mention for reading in readings for mention in reading):
        fitting = {entry for entry in node.entries if entry.forms[node.form] == surface}
        kind, known = _kind(node), held.get(node.variable)

        # Where the plan draws: different from those it must differ from, and of the pool that a cause decides.
        if node.source:
            checks = [held[name] != fitting for name in node.excluded if name in held]
            if node.chooser in held:
                attribute = node.source.partition(".")[2]
                pools = {grammar().lexicons[entry.attributes[attribute]] for entry in held[node.chooser]}
                fits = any(fitting & set(pool) for pool in pools)
                if kind == "objects":
                    judged["consequences"] += 1
                    right["consequences"] += fits
                else:
                    checks.append(fits)
            if checks:
                judged[kind] += 1
                right[kind] += all(checks)
            held[node.variable] = fitting

        # Where it writes again: the first mention says what it is, each later one must fit.
        elif known is None:
            held[node.variable] = fitting
        else:
            judged[kind] += 1
            right[kind] += bool(known & fitting)
            held[node.variable] = known & fitting or known
    return right, judged


def _kind(node: Mention) -> str:
    if node.attribute in PRONOUNS:
        return "pronouns"
    if node.attribute not in ("", "plural"):
        return "consequences"
    return "names" if node.entries[0].attributes.get("role") == "name" else "objects"
