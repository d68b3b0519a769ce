"""The proof that the text of a story alone decides each choice that its grammar makes.

No opening of an alternative may be a prefix of an opening of another, and no word of a pool, taken with the character
after it, a prefix of another word of that pool. Then a story has one derivation, and the entropy of the grammar is a
true floor.
"""

from __future__ import annotations

from collections.abc import Iterable

from shared.tales.nodes import Fork, Mention, Node, Text


def prove_choices_visible(root: Fork) -> None:
    """Raise ValueError at the first choice that the text after it might not decide."""
    waiting: list[Node | None] = [root]
    seen: set[Node] = set()
    while waiting:
        # Branches meet again, so that most nodes are reached more than once.
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)

        # A fork: how one branch begins must tell it from all others.
        if isinstance(node, Fork):
            waiting += node.branches
            _check_apart(
                ((text, number) for number, branch in enumerate(node.branches) for text in _openings(branch)),
                node.line,
            )
        else:
            waiting.append(node.next)
            # A draw: a word and the character after it must tell it from all others.
            if isinstance(node, Mention) and node.source:
                ends = {text[:1] for text in _openings(node.next)}
                _check_apart(
                    ((entry.forms[node.form] + end, entry.text) for entry in node.entries for end in ends),
                    node.line,
                )


def _openings(node: Node | None, expanded: bool = False) -> set[str]:
    """Return how texts from a node on may begin, as far as the second variable; a newline is the end."""
    if node is None:
        return {"\n"}
    if isinstance(node, Fork):
        return set().union(*(_openings(branch, expanded) for branch in node.branches))
    if isinstance(node, Text):
        return {node.text + rest for rest in _openings(node.next, expanded)}
    if expanded:
        return {""}
    return {entry.forms[node.form] + rest for rest in _openings(node.next, True) for entry in node.entries}


def _check_apart(labeled: Iterable[tuple[str, object]], line: int) -> None:
    """Raise ValueError if a text is a prefix of a text with another label."""
    open_texts: list[tuple[str, object]] = []
    for text, label in sorted(labeled, key=lambda pair: pair[0]):
        while open_texts and not text.startswith(open_texts[-1][0]):
            open_texts.pop()
        for _, other in open_texts:
            if other != label:
                raise ValueError(f"line {line}: a text with {text!r} does not decide between two choices")
        open_texts.append((text, label))
