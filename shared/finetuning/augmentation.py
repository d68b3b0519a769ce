"""Other texts with the same label: words left out, exchanged in place, or replaced by others of the same
meaning.

Left out: languages that write without spaces, and copies that need a model, such as paraphrases or
translations there and back.

Follows Wei and Zou (2019, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text
Classification Tasks").

Explained and proven in ch06_classification/02_sentiment.ipynb; written from there by `make promote`.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence

from shared.checks import check_text, require, whole_number

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
TURNING = {
    "not",
    "cannot",
    "no",
    "never",
    "nor",
    "neither",
    "nothing",
    "nobody",
    "none",
    "without",
    "hardly",
    "barely",
    "but",
}


def bare_word(piece: str) -> str:
    """Return the first word in a piece of text, in small letters; "" if it holds none."""
    found = WORD.search(piece)
    return found.group().lower() if found else ""


def turns_meaning(piece: str) -> bool:
    """Whether a sentence may say the opposite without this word: "not", "never", "couldn't" and the like."""
    word = bare_word(piece).replace("\u2019", "'")
    return word in TURNING or word.endswith("n't")


def _pieces(text: str, share: float) -> tuple[list[str], int]:
    """The text between its spaces, and how many pieces a share is, at least one."""
    check_text("text", text)
    require("share", share, 0 < share <= 1, "above 0 and at most 1")
    pieces = text.split()
    return pieces, max(1, round(share * len(pieces)))


def delete_words(text: str, share: float, rng: random.Random) -> str:
    """Leave out a share of the words, at least one; words that turn the meaning stay, and so does one word at least.

    Follows Wei and Zou (2019, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification
    Tasks"), who do not spare the turning words. Raises ValueError if `share` is not above 0 and at most 1.
    """
    pieces, n = _pieces(text, share)
    may_go = [i for i, piece in enumerate(pieces) if not turns_meaning(piece)]
    gone = set(rng.sample(may_go, min(n, len(may_go), max(0, len(pieces) - 1))))
    return " ".join(piece for i, piece in enumerate(pieces) if i not in gone)


def swap_words(text: str, share: float, rng: random.Random) -> str:
    """Exchange two words, again and again, until a share of the words has been drawn, at least two.

    Follows Wei and Zou (2019). Raises ValueError if `share` is not above 0 and at most 1.
    """
    pieces, n = _pieces(text, share)
    for _ in range(max(1, n // 2) if len(pieces) > 1 else 0):
        i, j = rng.sample(range(len(pieces)), 2)
        pieces[i], pieces[j] = pieces[j], pieces[i]
    return " ".join(pieces)


def replace_words(text: str, share: float, rng: random.Random, synonyms: Mapping[str, Sequence[str]]) -> str:
    """Replace a share of the words, at least one if any can be, by others of the same meaning.

    Punctuation around a word, and a capital at its beginning, stay.

    Args:
        synonyms: For words in small letters, what may stand in their place.

    Raises:
        ValueError: `share` is not above 0 and at most 1.
    """
    pieces, n = _pieces(text, share)
    known = [i for i, piece in enumerate(pieces) if bare_word(piece) in synonyms]
    for i in rng.sample(known, min(n, len(known))):
        new = rng.choice(list(synonyms[bare_word(pieces[i])]))
        old = WORD.search(pieces[i])
        new = new.capitalize() if old.group()[0].isupper() else new
        pieces[i] = pieces[i][: old.start()] + new + pieces[i][old.end() :]
    return " ".join(pieces)


def augment(
    texts: Sequence[str], change: Callable[[str, random.Random], str], n_copies: int, seed: int = 0
) -> tuple[list[str], list[int]]:
    """Return changed copies of texts, each once and none equal to a text, and for each the place of its text.

    A text may have fewer than `n_copies`: where it is short there are not so many ways to change it. The draws of a
    text depend on the text and the seed alone, not on its neighbours.

    Raises:
        ValueError: `n_copies` is below 1, or `change` refuses a text.
    """
    n_copies = whole_number("n_copies", n_copies)
    known = set(texts)
    copies, places = [], []
    for place, text in enumerate(texts):
        rng = random.Random(f"{seed} {text}")
        found = dict.fromkeys(change(text, rng) for _ in range(3 * n_copies))
        new = [copy for copy in found if copy not in known][:n_copies]
        copies += new
        places += [place] * len(new)
    return copies, places
