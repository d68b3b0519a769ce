"""Little stories without limit, from a probabilistic grammar whose entropy is known exactly.

`TaleGenerator(seed).sample()` yields a story with its log-probability. `entropy()` is the mean of -log p
over all stories: no language model can reach a lower loss on them, each story read from its first token
and its end included. One grammar (`shared/data/tales_grammar.txt`, read and checked by
`shared.tales.grammar`) is interpreted in four ways: sampling, matching a text, entropy, counting.

Left out: grading of texts that are not stories of the grammar, which is `shared.tales.scoring`.
Logarithms are natural, entropies in nats.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from shared.checks import plain_number, require
from shared.data.corpus import DATA
from shared.tales.grammar import Grammar
from shared.tales.nodes import Entry, Fork, Mention, Node, Plan, Text

GRAMMAR_FILE = DATA / "tales_grammar.txt"
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Story:
    """A story: text, log-probability in nats, name of its plan, and its facts, where the plan has them.

    Facts of every plan: who, friend, what. Of most: where, cause, consequence, animal, food, occupation,
    count, when. Of some: lost_by, found_by, lost_at, giver, thief, suspect, winner, remedy, colour, first,
    second, third (the order in a list that the story repeats) and others named in the grammar file.
    """

    text: str
    log_probability: float
    plan: str
    facts: dict[str, str]


@cache
def grammar() -> Grammar:
    """Return the grammar of the tales, read and checked at the first call."""
    return Grammar(GRAMMAR_FILE.read_text(encoding="utf-8"))


class TaleGenerator:
    """A reproducible source of stories: the same seed gives the same stories in every Python version.

    Raises ValueError if the seed is not an int.
    """

    def __init__(self, seed: int = 0) -> None:
        number = plain_number(seed)
        require("seed", seed, isinstance(number, int), "an int")
        # Only random() is used: the other methods of Random may change between Python versions.
        self._random = random.Random(number).random
        self._grammar = grammar()
        self._plans = list(self._grammar.plans.values())

    def sample(self) -> Story:
        """Draw the next story."""
        draw, choices = self._random, self._grammar.choices
        plan = self._plans[int(draw() * len(self._plans))]
        log_probability = -math.log(len(self._plans))
        bound: dict[str, Entry] = {}
        parts: list[str] = []
        node = plan.start
        while node is not None:
            # A choice: one branch, all of them alike.
            if isinstance(node, Fork):
                log_probability -= math.log(len(node.branches))
                node = node.branches[int(draw() * len(node.branches))]
                continue

            # Text is written as it stands; a variable may have to be drawn first, until it is none of those taken.
            if isinstance(node, Text):
                parts.append(node.text)
            else:
                if node.source:
                    pool = choices(node, bound)
                    taken = [bound[name] for name in node.excluded]
                    entry = pool[int(draw() * len(pool))]
                    while entry in taken:
                        entry = pool[int(draw() * len(pool))]
                    bound[node.variable] = entry
                    log_probability -= math.log(len(pool) - sum(other in pool for other in taken))
                parts.append(bound[node.variable].forms[node.form])
            node = node.next
        return Story("".join(parts), log_probability, plan.name, _facts(plan, bound))

    def stories(self, n: int) -> Iterator[Story]:
        """Yield the next `n` stories. Raises ValueError if `n` is negative."""
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        return (self.sample() for _ in range(n))

    def text(self, n_bytes: int, separator: str = SEPARATOR) -> str:
        """Return whole stories, each followed by `separator` (a blank line), of at least `n_bytes` bytes.

        Raises ValueError if `n_bytes` is negative."""
        if n_bytes < 0:
            raise ValueError(f"n_bytes must not be negative, got {n_bytes}")
        parts: list[str] = []
        size = 0
        while size < n_bytes:
            parts.append(self.sample().text + separator)
            size += len(parts[-1].encode())
        return "".join(parts)


def plans() -> list[str]:
    """Return the names of the story plans."""
    return list(grammar().plans)


def lexicons() -> list[str]:
    """Return the names of the lexicons and pools."""
    return list(grammar().lexicons)


def lexicon(name: str) -> list[str]:
    """Return the words of a lexicon or pool. Raises ValueError for an unknown name."""
    return [entry.text for entry in grammar().pool(name)]


def entropy(plan: str | None = None) -> float:
    """Return the exact entropy in nats per story, of one plan or of all (the choice of plan included).

    Raises ValueError for an unknown plan."""
    return _entropy(_start(plan), {}, {})


def n_stories(plan: str | None = None) -> int:
    """Return how many different stories there are. Raises ValueError for an unknown plan."""
    return _count(_start(plan), {}, {})


def parse(text: str) -> Story:
    """Recover a story from its text, log-probability and facts included.

    Raises ValueError if the text is not exactly a story of the grammar."""
    found = derivations(text)
    if not found:
        raise ValueError(f"not a story of the grammar: {text[:80]!r}")
    return found[0]


def log_probability(text: str) -> float:
    """Return the natural log of the probability of a story, -inf for a text that is none.

    Raises ValueError if `text` is not a str."""
    found = derivations(text)
    return found[0].log_probability if found else -math.inf


def derivations(text: str) -> list[Story]:
    """Return every derivation of a text by complete search: one for a story, none for any other text.

    Raises ValueError if `text` is not a str."""
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, got {text!r}")
    found = []
    for plan in grammar().plans.values():
        log_plan = -math.log(len(grammar().plans))
        for log_p, bound in _matches(plan.start, text, 0, {}, log_plan):
            found.append(Story(text, log_p, plan.name, _facts(plan, bound)))
    return found


def variables(story: Story) -> dict[str, Entry]:
    """Return the variables of a story's plan with the entries that this story holds.

    Raises ValueError if the text is not a story of its plan, or the plan is unknown."""
    for _, bound in _matches(_start(story.plan), story.text, 0, {}, 0.0):
        return bound
    raise ValueError(f"not a story of the plan {story.plan}: {story.text[:80]!r}")


def _facts(plan: Plan, bound: dict[str, Entry]) -> dict[str, str]:
    return {key: "".join(_write(node, bound) for node in nodes) for key, nodes in plan.facts.items()}


def _write(node: Text | Mention, bound: dict[str, Entry]) -> str:
    return node.text if isinstance(node, Text) else bound[node.variable].forms[node.form]


def _start(plan: str | None) -> Node | None:
    if plan is None:
        return grammar().root
    if plan not in grammar().plans:
        raise ValueError(f"unknown plan {plan!r}; known: {', '.join(plans())}")
    return grammar().plans[plan].start


def _matches(
    node: Node | None, text: str, position: int, bound: dict[str, Entry], log_p: float
) -> Iterator[tuple[float, dict[str, Entry]]]:
    """Yield (log-probability, variables) for each way to derive the rest of `text` from `node` on."""
    while node is not None:
        if isinstance(node, Fork):
            for branch in node.branches:
                yield from _matches(branch, text, position, bound, log_p - math.log(len(node.branches)))
            return
        if isinstance(node, Mention) and node.source:
            pool = grammar().choices(node, bound)
            taken = {bound[name] for name in node.excluded}
            free = [entry for entry in pool if entry not in taken]
            for entry in free:
                if text.startswith(entry.forms[node.form], position):
                    end = position + len(entry.forms[node.form])
                    now = bound | {node.variable: entry}
                    yield from _matches(node.next, text, end, now, log_p - math.log(len(free)))
            return
        written = _write(node, bound)
        if not text.startswith(written, position):
            return
        position += len(written)
        node = node.next
    if position == len(text):
        yield log_p, bound


def _peers(node: Mention, bound: dict[str, Entry]) -> Counter[Entry]:
    """Count what a draw can yield, entries that no later draw tells apart taken together."""
    counts = Counter(entry.peer or entry for entry in grammar().choices(node, bound))
    for name in node.excluded:
        if bound[name] in counts:
            counts[bound[name]] -= 1
    return +counts


def _entropy(node: Node | None, bound: dict[str, Entry], known: dict) -> float:
    """Entropy of what follows from `node` on; `bound` holds the peers of variables that steer draws."""
    while isinstance(node, Text) or (isinstance(node, Mention) and not node.source):
        node = node.next
    if node is None:
        return 0.0
    key = (node, frozenset(bound.items()))
    if key not in known:
        if isinstance(node, Fork):
            rest = sum(_entropy(branch, bound, known) for branch in node.branches) / len(node.branches)
            known[key] = math.log(len(node.branches)) + rest
        else:
            counts = _peers(node, bound)
            total = counts.total()
            rest = sum(
                count * _entropy(node.next, bound | {node.variable: peer} if node.steers else bound, known)
                for peer, count in counts.items()
            )
            known[key] = math.log(total) + rest / total
    return known[key]


def _count(node: Node | None, bound: dict[str, Entry], known: dict) -> int:
    """Number of texts from `node` on: `_entropy` with products and sums in place of logarithms and means."""
    while isinstance(node, Text) or (isinstance(node, Mention) and not node.source):
        node = node.next
    if node is None:
        return 1
    key = (node, frozenset(bound.items()))
    if key not in known:
        if isinstance(node, Fork):
            known[key] = sum(_count(branch, bound, known) for branch in node.branches)
        else:
            known[key] = sum(
                count * _count(node.next, bound | {node.variable: peer} if node.steers else bound, known)
                for peer, count in _peers(node, bound).items()
            )
    return known[key]
