"""Questions about the tales whose answers are spans of the story's text, and some that the story does not answer.

`TaleQuestionGenerator(seed).sample()` yields a passage, a question, and the place of the answer's characters in the
passage, as in SQuAD (Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text"). The
kinds of questions stand in `shared/data/tale_questions.txt`, each in three wordings, so that a model may be judged in
a wording that it has never been trained on.

Without an answer, as in SQuAD 2.0 (Rajpurkar, Jia and Liang, 2018, "Know What You Don't Know"), are questions with
one word replaced by a word that the passage lacks, and questions about other stories: what they ask about does not
occur in the passage.

Left out: rules that look the answer up, the baselines, which are in `shared.tales.question_look_ups`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from shared.checks import check_choice, plain_number, require
from shared.data.corpus import DATA
from shared.tales.generator import Story, TaleGenerator, grammar, plans, variables
from shared.tales.grammar import article, plural
from shared.tales.instructions import first_place, pick
from shared.tales.nodes import Entry

QUESTIONS_FILE = DATA / "tale_questions.txt"
N_FORMS = 3
UNANSWERED_SHARE = 0.2  # of the samples, where nothing else is asked for

_SLOT = re.compile(r"\{(\^?)(a )?(a:)?(\w+)(?:\.(\w+))?\}")
_ARTICLE = re.compile(r"^(?:a|an|the) ")
# What an answer of several words may share with its question: these words say nothing.
_SMALL_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and at behind but for from had his her i in it my of on out over so the to up was were with",
    )
)


@dataclass(frozen=True)
class TaleQuestion:
    """A question about a passage.

    Attributes:
        passage: A story's text.
        question: What is asked about it.
        answer: Characters of the passage, without an article; "" where the passage does not answer.
        start: Where they begin in the passage; -1 where there is no answer.
        plan: The plan of the passage.
        kind: What is asked, after the plan for which it was written: "race/winner".
        form: Which wording: 0, 1 or 2.
    """

    passage: str
    question: str
    answer: str
    start: int
    plan: str
    kind: str
    form: int


@dataclass(frozen=True)
class Kind:
    """What can be asked about stories of a plan: contexts with the answer in brackets, and the wordings."""

    plan: str
    name: str
    contexts: tuple[str, ...]
    wordings: tuple[str, ...]


class TaleQuestionGenerator:
    """A reproducible source of questions: the same seed gives the same questions in every Python version.

    Raises ValueError if the seed is not an int.
    """

    def __init__(self, seed: int = 0) -> None:
        number = plain_number(seed)
        require("seed", seed, isinstance(number, int), "an int")
        self._tales = TaleGenerator(seed)
        # Only random() is used: the other methods of Random may change between Python versions.
        self._draw = random.Random(f"questions {number}").random

    def sample(
        self, *, answered: bool | None = None, plan: str | None = None, forms: Sequence[int] = (0, 1)
    ) -> TaleQuestion:
        """Draw a story and a question about it.

        Args:
            answered: Whether the story answers the question; by default it does four times in five.
            plan: The plan of the story, by default any.
            forms: The wordings that may be used. The last, 2, is meant to be kept for judging.

        Raises ValueError if the plan is unknown, or `forms` is empty or holds anything but 0, 1 and 2.
        """
        if plan is not None:
            check_choice("plan", plan, plans())
        require("forms", forms, bool(forms) and set(forms) <= set(range(N_FORMS)), "some of 0, 1 and 2")
        if answered is None:
            answered = self._draw() >= UNANSWERED_SHARE
        source = self._answered if answered else self._replaced if self._draw() < 0.5 else self._foreign
        while (found := source(self._story(plan), forms)) is None:
            pass
        return found

    def questions(
        self,
        n: int,
        *,
        answered: bool | None = None,
        plan: str | None = None,
        forms: Sequence[int] = (0, 1),
    ) -> Iterator[TaleQuestion]:
        """Yield the next `n` questions. Raises ValueError as `sample`, and if `n` is negative."""
        require("n", n, n >= 0, "at least 0")
        return (self.sample(answered=answered, plan=plan, forms=forms) for _ in range(n))

    def _story(self, plan: str | None) -> Story:
        while plan not in (None, (story := self._tales.sample()).plan):
            pass
        return story

    def _answered(self, story: Story, forms: Sequence[int]) -> TaleQuestion | None:
        kind = pick(kinds_of(story.plan), self._draw)
        return ask(story, kind, pick(forms, self._draw))

    def _replaced(self, story: Story, forms: Sequence[int]) -> TaleQuestion | None:
        """A question that the story would answer, were not one word replaced by one that the story lacks."""
        kind, form = pick(kinds_of(story.plan), self._draw), pick(forms, self._draw)
        bound = variables(story)
        named = _named(kind.wordings[form], bound)
        if not named or ask(story, kind, form) is None:
            return None

        # The new word is of the old one's lexicon, so that the sentence stays a good one.
        variable = pick(named, self._draw)
        others = [entry for entry in _same_lexicon(bound[variable]) if not _occurs(entry, story.text)]
        question = fill(kind.wordings[form], bound | {variable: pick(others, self._draw)})
        return TaleQuestion(story.text, question, "", -1, story.plan, f"{kind.plan}/{kind.name}", form)

    def _foreign(self, story: Story, forms: Sequence[int]) -> TaleQuestion | None:
        """A question about another story, half of the time one of the same plan."""
        other = self._story(story.plan if self._draw() < 0.5 else None)
        kind, form = pick(kinds_of(other.plan), self._draw), pick(forms, self._draw)
        bound = variables(other)
        named = _named(kind.wordings[form], bound)
        if not named or any(_occurs(bound[variable], story.text) for variable in named):
            return None
        if ask(other, kind, form) is None:
            return None
        question = fill(kind.wordings[form], bound)
        return TaleQuestion(story.text, question, "", -1, story.plan, f"{kind.plan}/{kind.name}", form)


def ask(story: Story, kind: Kind, form: int) -> TaleQuestion | None:
    """Ask a question of one kind in one wording.

    Returns None where the story leaves out what is asked, or where the question would give a word of its answer away.
    Raises ValueError if the kind is not of the story's plan.
    """
    require("kind", kind.name, kind.plan == story.plan, f"of the plan {story.plan}")
    bound = variables(story)
    place = _place(story.text, kind, bound)
    if place is None:
        return None
    start, answer = place
    question = fill(kind.wordings[form], bound)
    if given_away(question, answer):
        return None
    return TaleQuestion(story.text, question, answer, start, story.plan, f"{kind.plan}/{kind.name}", form)


def _place(text: str, kind: Kind, bound: dict[str, Entry]) -> tuple[int, str] | None:
    """Return where the answer begins in the story, and the answer."""
    for context in kind.contexts:
        if any(slot[4] not in bound for slot in _SLOT.finditer(context)):
            continue
        # A minus sign in front of the answer: it is taken without its article.
        before, marked, after = re.split(r"[][]", fill(context, bound))
        written = marked.removeprefix("-")
        answer = _ARTICLE.sub("", written) if marked != written else written
        place = text.find(before + written + after)
        if place >= 0:
            return place + len(before + written) - len(answer), answer
    return None


def given_away(question: str, answer: str) -> bool:
    """Return whether a word of the answer that says something stands in the question."""
    said = set(re.findall(r"\w+", question.lower()))
    return any(word in said for word in re.findall(r"\w+", answer.lower()) if word not in _SMALL_WORDS)


def fill(template: str, bound: dict[str, Entry]) -> str:
    """Return a template with its slots filled; `{a:x}` writes only the article of x, `{^x}` a capital."""

    def written(slot: re.Match[str]) -> str:
        capital, with_article, article_only, variable, attribute = slot.groups()
        entry = bound[variable]
        text = entry.attributes.get(attribute, "") if attribute else entry.text
        if attribute == "plural" and not text:
            text = plural(entry.text)
        if article_only:
            text = article(text)
        elif with_article:
            text = f"{article(text)} {text}"
        return text[0].upper() + text[1:] if capital else text

    return _SLOT.sub(written, template)


def _named(wording: str, bound: dict[str, Entry]) -> list[str]:
    """The variables whose own word stands in a wording: single words, which can be replaced by others."""
    found = dict.fromkeys(slot[4] for slot in _SLOT.finditer(wording) if slot[5] in (None, "plural"))
    return [variable for variable in found if " " not in bound[variable].text]


def _same_lexicon(entry: Entry) -> list[Entry]:
    return [other for other in grammar().lexicons[entry.lexicon] if " " not in other.text]


def _occurs(entry: Entry, text: str) -> bool:
    """Whether a text holds a word, or another that a reader could take for it."""
    alike = {entry.text}.union(*(group for group in _alike() if entry.text in group))
    words = {form for word in alike for form in (word, plural(word), word[0].upper() + word[1:])}
    words |= {value for key, value in entry.attributes.items() if key == "plural"}
    return any(first_place(word, text) < len(text) for word in words)


def kinds_of(plan: str) -> list[Kind]:
    """Return the kinds of questions about the stories of a plan. Raises ValueError if the plan is unknown."""
    check_choice("plan", plan, plans())
    return [kind for kind in all_kinds() if kind.plan == plan]


@cache
def all_kinds() -> tuple[Kind, ...]:
    """Return the kinds of questions about all plans, in the order of their file.

    Raises ValueError, with the line's number, for a line that cannot be read.
    """
    found: list[Kind] = []
    plan = ""
    for number, line in enumerate(QUESTIONS_FILE.read_text(encoding="utf-8").splitlines(), 1):
        depth, text = len(line) - len(line.lstrip()), line.strip()
        if not text or text.startswith(("#", "alike ")):
            continue
        # A heading, a kind below it, or a wording below that.
        if depth == 0 and text.removeprefix("plan ") in plans():
            plan = text.removeprefix("plan ")
        elif depth == 4 and plan and text.count("[") == text.count("]") == text.count(" || ") + 1:
            name, _, contexts = text.partition(": ")
            found.append(Kind(plan, name, tuple(contexts.split(" || ")), ()))
        elif depth == 8 and found and len(found[-1].wordings) < N_FORMS:
            last = found.pop()
            found.append(Kind(last.plan, last.name, last.contexts, (*last.wordings, text)))
        else:
            raise ValueError(f"{QUESTIONS_FILE.name}, line {number}: cannot read {text!r}")
    return tuple(found)


@cache
def _alike() -> tuple[frozenset[str], ...]:
    """Groups of words that a reader could take for one another."""
    lines = QUESTIONS_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(
        frozenset(line.removeprefix("alike ").split(", ")) for line in lines if line.startswith("alike ")
    )
