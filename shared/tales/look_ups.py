"""Baselines for the tasks of `shared.tales.instructions`: answers that look words up and understand nothing.

Each look-up is a short rule: the person named first, the most frequent answer, the sentence as it stands. The best of a
family is chosen on training tasks (`best_look_up`) and scored on others. A model that is to have learned something must
beat it.

Left out: rules that do what the question asks, which would be the answer and no baseline; so none reads what the
assistant has said before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from shared.checks import check_choice, require
from shared.tales.generator import lexicon
from shared.tales.instructions import FAMILIES, HELD_OUT, Task, times
from shared.tales.scoring import split_sentences

LookUp = Callable[[Task], str]


def look_ups(family: str, training: Sequence[Task]) -> dict[str, LookUp]:
    """Return the look-ups of a family by what they do; those that learn have learned from the training tasks.

    Raises ValueError if the family is unknown, or there is no training task of it.
    """
    check_choice("family", family, (*FAMILIES, HELD_OUT))
    own = [task for task in training if task.family == family]
    require("training", len(own), bool(own), f"tasks of the family {family}")
    usual = _usual(own)
    always = {"the usual answer to such a question": lambda task: usual.get(_kind(task), "")}
    return always | _LOOK_UPS[family]


def n_correct(look_up: LookUp, tasks: Iterable[Task]) -> int:
    """Return how many tasks a look-up answers right."""
    return sum(look_up(task) == task.value for task in tasks)


def best_look_up(family: str, training: Sequence[Task]) -> tuple[str, LookUp]:
    """Return the look-up of a family that answers most training tasks right, after its name; errors as `look_ups`."""
    candidates = look_ups(family, training)
    own = [task for task in training if task.family == family]
    best = max(candidates, key=lambda name: n_correct(candidates[name], own))
    return best, candidates[best]


# --- what stands in a task


def _story(task: Task) -> str:
    """The text above the first question; empty where there is none."""
    return task.messages[0]["content"].rpartition("\n")[0]


def _question(task: Task) -> str:
    return task.messages[-2]["content"].rpartition("\n")[2]


def _kind(task: Task) -> str:
    """The question without what changes from task to task: its first three words."""
    return " ".join(_question(task).split()[:3])


def _usual(tasks: Iterable[Task]) -> dict[str, str]:
    """The most frequent answer to each kind of question; of equally frequent ones the first in the alphabet."""
    found: dict[str, Counter[str]] = {}
    for task in tasks:
        found.setdefault(_kind(task), Counter())[task.value] += 1
    return {kind: min(answers, key=lambda a: (-answers[a], a)) for kind, answers in found.items()}


@cache
def _person() -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(lexicon('person'))})\b")


@cache
def _owner() -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(lexicon('person'))}|the (?:{'|'.join(lexicon('occupation'))}))\b")


@cache
def _object() -> re.Pattern[str]:
    names = {name for pool in ("object", "animal", "boat", "vehicle", "tool") for name in lexicon(pool)}
    return re.compile(rf"\b({'|'.join(sorted(names, key=len, reverse=True))})\b")


def _first(found: Sequence[str]) -> str:
    return found[0] if found else ""


def _last(found: Sequence[str]) -> str:
    return found[-1] if found else ""


def _most(found: Sequence[str]) -> str:
    counts = Counter(found)
    return max(counts, key=counts.__getitem__) if counts else ""  # of equals the one that comes first


def _nearest(pattern: re.Pattern[str], text: str, place: int, *, before_only: bool = False) -> str:
    """The match that begins nearest to a place."""
    matches = [match for match in pattern.finditer(text) if not before_only or match.start() < place]
    return min(matches, key=lambda match: abs(match.start() - place))[0] if matches else ""


# --- owner, and the held-out family that turns its question round


def _thing(task: Task) -> str:
    """The last word of what the question asks the owner of."""
    match = re.search(r"(?:has|does) the (.+?)(?: belong)? at the end", _question(task))
    return match[1].split()[-1] if match else ""


def _near_thing(task: Task, *, last: bool, before_only: bool) -> str:
    story = _story(task)
    place = story.rfind(_thing(task)) if last else story.find(_thing(task))
    return _nearest(_owner(), story, place, before_only=before_only)


def _in_sentence_of_thing(task: Task) -> str:
    """The first person in the last sentence that names the thing."""
    named = [s for s in split_sentences(_story(task)) if re.search(rf"\b{_thing(task)}\b", s)]
    return _first(_person().findall(named[-1])) if named else ""


def _near_owner(task: Task, *, last: bool) -> str:
    match = re.search(r"(?:does|to) (.+?)(?: have)? at the end", _question(task))
    owner = match[1].split()[-1] if match else ""
    story = _story(task)
    return _nearest(_object(), story, story.rfind(owner) if last else story.find(owner))


# --- order, count, agreement, ending, follow_up


def _given_words(task: Task) -> list[str]:
    return _question(task).rpartition(": ")[2].rstrip(".?").split(", ")


def _sentence(task: Task) -> str:
    return _question(task).partition(": ")[2]


def _with_right_articles(task: Task) -> str:
    """The sentence with "an" before vowels and "a" before all else, whatever stands there."""

    def right(match: re.Match[str]) -> str:
        article = "an" if match[2] in "aeiouAEIOU" else "a"
        return (article.capitalize() if match[1][0] == "A" else article) + " " + match[2]

    return re.sub(r"\b(an|a|An|A) (\w)", right, _sentence(task))


def _with_other_verb(task: Task) -> str:
    """The sentence with its first "was", "were", "is" or "are" in the other number."""
    other = {"was": "were", "were": "was", "is": "are", "are": "is"}
    return re.sub(r"\b(was|were|is|are)\b", lambda match: other[match[1]], _sentence(task), count=1)


def _ending_from_words(task: Task) -> str:
    """The prescribed beginning and words, one after the other."""
    return " ".join(re.findall(r"begins: (.+) \.\.\.$", _question(task)) + _prescribed(task)) + "."


def _prescribed(task: Task) -> list[str]:
    match = re.search(r" with the words? (.+?)(?:\. It| that) begins", _question(task))
    return match[1].split(" and ") if match else []


def _ending_copied(task: Task) -> str:
    """A sentence of the story that begins as prescribed."""
    start = _first(re.findall(r"begins: (.+) \.\.\.$", _question(task)))
    return _last([s for s in split_sentences(_story(task)) if s.startswith(start)])


def _about(choose: Callable[[Sequence[str]], str]) -> LookUp:
    """Answer the second question as if it were asked about a person of the story, whoever the first answer was."""

    def look_up(task: Task) -> str:
        story = _story(task)
        person = choose(_person().findall(story))
        if not person:
            return ""
        if "How many" in _question(task):
            return times(person, story)
        after = re.search(rf"\b{person}\b[^A-Za-z]*([A-Za-z]+)", story)
        return after[1] if after else ""

    return look_up


_PEOPLE: dict[str, LookUp] = {
    "the person named first": lambda task: _first(_person().findall(_story(task))),
    "the person named last": lambda task: _last(_person().findall(_story(task))),
    "the person named most often": lambda task: _most(_person().findall(_story(task))),
}
_LOOK_UPS: dict[str, dict[str, LookUp]] = {
    "owner": {
        **_PEOPLE,
        "the owner nearest to the thing's first mention": lambda task: _near_thing(
            task, last=False, before_only=False
        ),
        "the owner nearest to the thing's last mention": lambda task: _near_thing(
            task, last=True, before_only=False
        ),
        "the owner just before the thing's last mention": lambda task: _near_thing(
            task, last=True, before_only=True
        ),
        "the first person in the thing's last sentence": _in_sentence_of_thing,
    },
    "order": {
        "the words as they are given": lambda task: ", ".join(_given_words(task)),
        "the words backwards": lambda task: ", ".join(reversed(_given_words(task))),
        "the words in alphabetical order": lambda task: ", ".join(sorted(_given_words(task))),
        "names first": lambda task: ", ".join(
            sorted(_given_words(task), key=lambda word: not _person().fullmatch(word))
        ),
    },
    "count": {},
    "agreement": {
        "the sentence as it stands": _sentence,
        "articles by the next letter": _with_right_articles,
        "the first verb in the other number": _with_other_verb,
        "articles, and if they are right the verb": lambda task: (
            right if (right := _with_right_articles(task)) != _sentence(task) else _with_other_verb(task)
        ),
    },
    "ending": {
        "the prescribed words in a row": _ending_from_words,
        "a sentence that begins like it": _ending_copied,
    },
    "follow_up": {
        "about the person named first": _about(_first),
        "about the person named last": _about(_last),
        "about the person named most often": _about(_most),
    },
    HELD_OUT: {
        "the thing nearest to the owner's first mention": lambda task: _near_owner(task, last=False),
        "the thing nearest to the owner's last mention": lambda task: _near_owner(task, last=True),
        "the thing named first": lambda task: _first(_object().findall(_story(task))),
        "the thing named last": lambda task: _last(_object().findall(_story(task))),
        "the thing named most often": lambda task: _most(_object().findall(_story(task))),
    },
}
