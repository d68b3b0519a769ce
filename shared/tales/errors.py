"""Sentences of the tales in which one word no longer agrees with the others: an article, a pronoun or a verb.

Left out: errors that a reader could mend in two ways.
"""

from __future__ import annotations

import re
from functools import cache

from shared.tales.generator import lexicon

# What a word is made, where it is to be wrong.
_SWAPS: dict[str, tuple[str, ...]] = {
    "a": ("an",),
    "an": ("a",),
    "was": ("were",),
    "were": ("was",),
    "is": ("are",),
    "are": ("is",),
}
# What is drawn first, so that no kind of error is rarer than another: the words that are right.
KINDS: dict[str, tuple[str, ...]] = {
    "article": ("a", "an"),
    "verb": ("was", "were", "is", "are"),
    "he or she": ("he", "she"),
    "his or her": ("him", "his", "her", "himself", "herself"),
}
_OF_SEX: dict[str, dict[str, tuple[str, ...]]] = {
    "girl": {"she": ("he",), "her": ("his", "him"), "herself": ("himself",)},
    "boy": {"he": ("she",), "him": ("her",), "his": ("her",), "himself": ("herself",)},
}
_PRONOUNS = {word for swaps in _OF_SEX.values() for word in swaps}


@cache
def sexes() -> dict[str, str]:
    """Return every name of a person with "girl" or "boy"."""
    return {name: sex for sex in _OF_SEX for name in lexicon(sex)}


def spoilings(sentence: str) -> list[tuple[str, str]]:
    """Return the sentence with an article, a pronoun or a verb made wrong, in every way, each after the right word.

    A pronoun is made wrong only where the sentence names one person, of whom all its pronouns speak.
    """
    words = re.findall(r"\w+|\W+", sentence)
    swaps = _SWAPS
    people = {word for word in words if word in sexes()}
    if len(people) == 1:
        own = _OF_SEX[sexes()[people.pop()]]
        if all(word.lower() in own for word in words if word.lower() in _PRONOUNS):
            swaps = _SWAPS | own
    found = []
    for place, word in enumerate(words):
        for wrong in swaps.get(word.lower(), ()):
            wrong = wrong.capitalize() if word[0].isupper() else wrong
            found.append((word.lower(), "".join([*words[:place], wrong, *words[place + 1 :]])))
    return found
