"""Baselines for questions about a text: the likeliest sentence by its words, and in it the likeliest span by form.

The rules know the question words of English and nothing of any story, so that they serve for every English text.
A model that is to have learned to read must beat them.

Left out: refusing to answer; a look-up always finds something.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection

from shared.tales.scoring import split_sentences

MAX_WORDS = 3  # of an answer that no question word describes
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about after all also an and any are as at be because been before behind but by can could did do does for
    from get got had has have he her hers him his how i if in into is it its last long many me much my near no not of
    off on one only or other our out over own she should so some than that the their them then there they this those to
    too under until up us very was we were what when where which while who whom whose why will with would you your""",
    )
)
NAMES = r"\b([A-Z][a-z]+)\b"
_NUMBERS = (
    r"(?i)\b(\d[\d,.]*\d|\d|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen"
    r"|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand)\b"
)
_NOT_STOP = rf"(?!(?:{'|'.join(sorted(STOP_WORDS))})\b)[a-z][a-z-]*"
_NOUNS = rf"({_NOT_STOP}(?: {_NOT_STOP})?)(?=[^\w ]| (?:{'|'.join(sorted(STOP_WORDS))})\b|$)"
# What a question in small letters asks for, and the form of such a span; the first that fits is taken.
_FORMS = {
    r"\bhow (?:many|old|long|much|tall|often|far)\b|\bnumber of\b|\bwhat time\b|\bwhich hour\b": _NUMBERS,
    r"\bday\b|^(?:since )?when\b": r"\b((?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day)\b",
    r"\bcolou?r": r"\b(red|blue|green|yellow|orange|purple|white|black|brown|gr[ea]y|pink|golden|scarlet|violet)\b",
    r"\bseason\b|\btime of year\b": r"\b(spring|summer|autumn|winter)\b",
    r"^(?:\w+ )?(?:who|whom|whose)\b|\bname\b": NAMES,
    r"^(?:\w+ )?where\b|\b(?:which|what) (?:place|room|building)\b": (
        rf"\b(?:in|at|near|to|from|behind) (?:the|an?|his|her|their|our|my) {_NOUNS}"
    ),
    r"^why\b|\breason\b": r"\b(?:because) ([^,.;\"?!]+)",
    r"^(?:\w+ )?(?:what|which)\b": rf"\b(?:the|an?|his|her|their|our|my|some) {_NOUNS}",
}
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*|\d[\d,.]*\d|\d")


def best_sentence(passage: str, question: str) -> str:
    """Return the sentence that shares most content words with the question, rare words counting more.

    The weight of a word is log(sentences / sentences that hold it) + 1, its inverse document frequency. Of equals the
    first sentence is taken; the text is "" if the passage is empty.
    """
    return next(iter(_ranked(passage, question)), "")


def best_span(passage: str, question: str) -> str:
    """Return a span that suits the question's first words, "" if the passage has no word.

    It is taken from the best sentence that has such a span, and there as near as possible to the question's words.
    """
    asked = _asked(question)
    sentences = _ranked(passage, question)
    # Capitals also begin sentences: a word that stands elsewhere in small letters is no name.
    small = set(re.findall(r"\b[a-z]+\b", passage)) | STOP_WORDS
    for sentence in sentences:
        places = [match.start() for match in _WORD.finditer(sentence) if _stem(match[0]) in asked]
        found = [
            match
            for match in _candidates(sentence, small, question.lower())
            if not asked & {_stem(word) for word in _WORD.findall(match[1])}
        ]
        if found:
            return min(found, key=lambda match: _distance(match.start(1), places))[1]
    return next((run for sentence in sentences if (run := _longest_run(sentence, asked))), "")


def _asked(question: str) -> set[str]:
    return {_stem(word) for word in _WORD.findall(question) if word.lower() not in STOP_WORDS}


def _ranked(passage: str, question: str) -> list[str]:
    """The sentences, the best first."""
    sentences, asked = split_sentences(passage), _asked(question)
    held = [{_stem(word) for word in _WORD.findall(sentence)} for sentence in sentences]
    counts = Counter(word for words in held for word in words)
    weights = [
        sum(1 + math.log(len(sentences) / counts[word]) for word in sorted(asked & words)) for words in held
    ]
    return [sentences[i] for i in sorted(range(len(sentences)), key=lambda i: -weights[i])]


def _distance(place: int, places: list[int]) -> int:
    """How far the nearest of some sorted places is; 0 if there is none."""
    i = bisect_left(places, place)
    return min((abs(place - other) for other in places[max(0, i - 1) : i + 1]), default=0)


def _candidates(sentence: str, small: Collection[str], question: str) -> list[re.Match[str]]:
    """The spans of a sentence that have the form the question word asks for, each as the first group of a match.

    Words that are among `small` are no names, even with a capital.
    """
    for asks, form in _FORMS.items():
        if re.search(asks, question):
            found = list(re.finditer(form, sentence))
            return [match for match in found if form != NAMES or match[1].lower() not in small]
    return []


def _longest_run(sentence: str, asked: set[str]) -> str:
    """The longest run of words that the question lacks and that are no stop words, at most `MAX_WORDS`."""
    best: list[re.Match[str]] = []
    run: list[re.Match[str]] = []
    for match in _WORD.finditer(sentence):
        plain = match[0].lower() in STOP_WORDS or _stem(match[0]) in asked
        # Marks other than a space between two words end a run as well.
        if plain or (run and sentence[run[-1].end() : match.start()] != " "):
            run = []
        if not plain:
            run = [*run, match]
        best = run if len(run) > len(best) else best
    best = best[:MAX_WORDS]
    return sentence[best[0].start() : best[-1].end()] if best else ""


def _stem(word: str) -> str:
    """A word in lower case without its commonest endings, so that "eggs" meets "egg"."""
    return re.sub(r"(?:'s|ies|es|ed|ing|s|y)$", "", word.lower()) if len(word) > 3 else word.lower()
