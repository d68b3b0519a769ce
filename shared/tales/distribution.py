"""What may come next in a tale, token by token, with its probability: the distribution that a model estimates.

`next_tokens(text)` follows a story through the grammar and returns, for each of its tokens, every token that could
have stood there. The probabilities of the story's own tokens multiply to that of the story, so the mean of their -log
is the entropy floor. A language model learns these distributions from one draw of each.

Stories are cut as the tokenizer cuts them: by its pattern into pieces, each piece into tokens.
Left out: other ways to write the same text in tokens, which the tokenizer never produces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import regex
import torch
from torch import Tensor

from shared.tales.encoding import tale_encoding, tale_tokenizer
from shared.tales.generator import grammar
from shared.tales.nodes import Entry, Fork, Mention, Node

# Steps from one place are kept for so many values of the variables: more are seldom met again, and take memory.
_MOST_KNOWN = 200


@dataclass(frozen=True)
class NextTokens:
    """All tokens that could stand at each position of a story, position by position.

    Attributes:
        counts: How many there are at each position, int64 (positions,); the last position is the end token's.
        ids: The tokens, int64 (sum of counts,).
        probabilities: Theirs, float64 (sum of counts,); those of a position add up to 1.
        chosen: The probability of the story's own token, float64 (positions,).
    """

    counts: np.ndarray
    ids: np.ndarray
    probabilities: np.ndarray
    chosen: np.ndarray


def next_tokens(text: str) -> NextTokens:
    """Return what may stand at each token of a story. Raises ValueError if the text is not a story of the grammar."""
    ways = _ways_on(1.0, "", grammar().root, {})
    counts: list[int] = []
    ids: list[int] = []
    probabilities: list[float] = []
    chosen: list[float] = []
    for token in [*tale_encoding().encode_ordinary(text), tale_encoding().eot_token]:
        here: dict[int, float] = defaultdict(float)
        for way in ways:
            here[way.tokens[0]] += way.weight
        if token not in here:
            raise ValueError(f"not a story of the grammar: {text[:80]!r}")
        counts.append(len(here))
        ids += here.keys()
        probabilities += here.values()
        chosen.append(here[token])
        ways = [next_way for way in ways if way.tokens[0] == token for next_way in way.after(here[token])]
    return NextTokens(np.array(counts), np.array(ids), np.array(probabilities), np.array(chosen))


def expected_loss(logits: Tensor, stories: Iterable[NextTokens]) -> tuple[Tensor, Tensor]:
    """Return two losses for each position, in nats, (rows, tokens): the expected one, and its part from outside.

    The first is the mean of -log p over the tokens that may come, each with its chance. `next_token_loss` of one drawn
    token has it as its mean: minimum and expected gradient are the same, but the noise of the draw is gone. It cannot
    fall below the entropy of the position. A corpus does not allow this, as only one token stands in each place;
    nearest to it is learning from the probabilities of a better model (Hinton, Vinyals and Dean, 2015, "Distilling
    the Knowledge in a Neural Network").

    The second is -log of the probability that the model leaves to all tokens that may come. It is a part of the first:
    the rest is the loss among those tokens alone (Xu et al., 2018, "A Semantic Loss Function for Deep Learning with
    Symbolic Knowledge"). Both parts have their minimum in the true distribution.

    Args:
        logits: (rows, tokens, vocab_size), a story a row, which begins with the end token.
        stories: What may come next in each row. Positions after a story count for nothing.

    Raises:
        ValueError: The number of stories is not that of the rows, a story is longer than a row, or the model's
            vocabulary is smaller than the tokenizer's.
    """
    rows, length = logits.shape[:2]
    stories = list(stories)
    longest = max((len(story.counts) for story in stories), default=0)
    if len(stories) != rows or longest > length:
        raise ValueError(
            f"logits have {rows} rows of {length} tokens; {len(stories)} stories have up to {longest}"
        )
    places = [row * length + np.arange(len(story.counts)) for row, story in enumerate(stories)]
    counts = [story.counts for story in stories]
    if logits.shape[2] < tale_encoding().n_vocab:
        raise ValueError(
            f"logits must be of at least the tokenizer's {tale_encoding().n_vocab} tokens, got {logits.shape[2]}"
        )
    place = torch.from_numpy(np.repeat(np.concatenate(places), np.concatenate(counts)))
    ids = torch.from_numpy(np.concatenate([story.ids for story in stories]))
    weights = torch.from_numpy(np.concatenate([story.probabilities for story in stories]))
    place, ids = place.to(logits.device), ids.to(logits.device)
    log_p = logits.float().flatten(0, 1).log_softmax(dim=-1)  # (rows * tokens, vocab_size)
    log_p = log_p[place, ids]
    zeros = log_p.new_zeros(rows * length)
    losses = zeros.index_add(0, place, -log_p * weights.to(logits.device, log_p.dtype))
    allowed = zeros.index_add(0, place, log_p.exp())
    outside = -allowed.where(allowed > 0, 1.0).log()
    return losses.view(rows, length), outside.view(rows, length)


@dataclass(frozen=True, eq=False)
class _Step:
    """A next piece of text: its tokens and probability, what follows it, and the variables drawn for it."""

    tokens: tuple[int, ...]
    probability: float
    pending: str  # text after the piece that is decided already
    node: Node | None
    drawn: dict[str, Entry]


@dataclass(frozen=True, eq=False)
class _Way:
    """A derivation that agrees with the tokens so far: its weight among all, its next tokens, and its last step."""

    weight: float
    tokens: tuple[int, ...]
    step: _Step
    bound: dict[str, Entry]  # before the step

    def after(self, chance: float) -> list[_Way]:
        """Return the ways on after the first of its tokens, which had this chance."""
        weight, step = self.weight / chance, self.step
        if len(self.tokens) > 1:
            return [_Way(weight, self.tokens[1:], step, self.bound)]
        if self.tokens[0] == tale_encoding().eot_token:
            return []
        return _ways_on(weight, step.pending, step.node, self.bound | step.drawn)


@dataclass(eq=False)
class _Place:
    """The steps from one place in the grammar, by the values of the variables that they depend on."""

    variables: tuple[str, ...] = ()
    steps: dict[tuple[Entry, ...], list[_Step]] = field(default_factory=dict)


# All places met so far: the node that comes next, and the text before it that is not yet cut into pieces.
_PLACES: dict[tuple[Node | None, str], _Place] = {}


@cache
def _pattern() -> regex.Pattern:
    return regex.compile(tale_tokenizer().pattern)


@cache
def _tokens(piece: str) -> tuple[int, ...]:
    encoding = tale_encoding()
    return tuple(encoding.encode_ordinary(piece)) if piece else (encoding.eot_token,)


def _ways_on(weight: float, pending: str, node: Node | None, bound: dict[str, Entry]) -> list[_Way]:
    steps = _steps(pending, node, bound)
    return [_Way(weight * step.probability, step.tokens, step, bound) for step in steps]


def _steps(pending: str, node: Node | None, bound: dict[str, Entry]) -> list[_Step]:
    """Return the ways to write one piece more, from memory if they are known."""
    # Known are those for the same values of all variables that ever played a part in this place.
    place = _PLACES.setdefault((node, pending), _Place())
    key = tuple(bound[name] for name in place.variables)
    if key in place.steps:
        return place.steps[key]

    # Otherwise the grammar is followed. A variable that is drawn on the way does not belong to the place.
    read: set[str] = set()
    steps = list(_explore(pending, node, bound, {}, 1.0, read))
    variables = tuple(sorted({*place.variables, *(read & bound.keys())}))

    # They are kept; what was kept by fewer variables cannot be found again.
    if variables != place.variables or len(place.steps) >= _MOST_KNOWN:
        place.variables = variables
        place.steps.clear()
    place.steps[tuple(bound[name] for name in variables)] = steps
    return steps


def _explore(
    pending: str,
    node: Node | None,
    bound: dict[str, Entry],
    drawn: dict[str, Entry],
    chance: float,
    read: set[str],
) -> Iterator[_Step]:
    """Follow every way from `node` until the first piece of the text is certain, and yield that step.

    Args:
        pending: Text before `node` that is not yet cut into pieces.
        node: What comes next; None at the end of the story.
        bound: The variables, those drawn on the way included.
        drawn: The variables drawn on the way.
        chance: Of the way so far.
        read: The names of the variables that are looked at go here.
    """
    while node is not None and not _is_certain(pending):
        # A choice: each branch is a way of its own.
        if isinstance(node, Fork):
            for branch in node.branches:
                yield from _explore(pending, branch, bound, drawn, chance / len(node.branches), read)
            return

        # A draw: each entry that may be drawn is a way of its own.
        if isinstance(node, Mention) and node.source:
            read.update(node.needs)
            taken = [bound[name] for name in node.excluded]
            free = [entry for entry in grammar().choices(node, bound) if entry not in taken]
            for entry in free:
                text, new = pending + entry.forms[node.form], {node.variable: entry}
                yield from _explore(text, node.next, bound | new, drawn | new, chance / len(free), read)
            return

        # Text that is certain: a literal piece, or a variable that is written again.
        if isinstance(node, Mention):
            read.update(node.needs)
            pending += bound[node.variable].forms[node.form]
        else:
            pending += node.text
        node = node.next

    match = _pattern().match(pending)
    piece = match.group() if match else ""
    yield _Step(_tokens(piece), chance, pending[len(piece) :], node, drawn)


@cache
def _is_certain(pending: str) -> bool:
    """Whether the first piece stays the same whatever follows; 's and the like need one character more."""
    match = _pattern().match(pending)
    return bool(match) and match.end() < len(pending) - (pending[0] == "'")
