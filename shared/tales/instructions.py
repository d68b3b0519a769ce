"""Instructions about the tales whose right answer is known: what chapter 7 tunes a model on and scores it with.

`TaskGenerator(seed).sample()` yields a conversation that ends with the right answer. Six families are for training
(`FAMILIES`), one is held out whole (`HELD_OUT`): it turns the question of a trained family round. Every answer is
read off the story's facts or its text, so that scoring is exact.

Left out: answers that do not read the story, the baselines, which are in `shared.tales.look_ups`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

from shared.checks import check_choice, plain_number, require
from shared.tales.errors import KINDS, spoilings
from shared.tales.generator import Story, TaleGenerator, lexicon
from shared.tales.scoring import split_sentences

FAMILIES = ("owner", "order", "count", "agreement", "ending", "follow_up")
HELD_OUT = "possession"
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MAX_SENTENCE_WORDS = 18  # sentences that are corrected are no longer

Choice = TypeVar("Choice")
Draw = Callable[[], float]
Turn = tuple[
    str, str, str
]  # a question, its answer, and what the answer says: "It belongs to Ben." says "Ben"


@dataclass(frozen=True)
class Task:
    """A conversation of the user and the assistant, which ends with the right answer.

    `family` says of which kind it is, `value` what the answer says: that of "It belongs to Ben." is "Ben".
    """

    family: str
    messages: tuple[dict[str, str], ...]
    value: str

    @property
    def answer(self) -> str:
        """The right answer to the last question."""
        return self.messages[-1]["content"]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The conversation up to the last question."""
        return list(self.messages[:-1])


class TaskGenerator:
    """A reproducible source of tasks: the same seed gives the same tasks in every Python version.

    Raises ValueError if the seed is not an int.
    """

    def __init__(self, seed: int = 0) -> None:
        number = plain_number(seed)
        require("seed", seed, isinstance(number, int), "an int")
        self._tales = TaleGenerator(seed)
        # Only random() is used: the other methods of Random may change between Python versions.
        self._draw = random.Random(f"tasks {number}").random

    def sample(self, family: str | None = None) -> Task:
        """Draw the next task, of one family, or of one of `FAMILIES` drawn at random.

        Raises ValueError if the family is neither one of `FAMILIES` nor `HELD_OUT`.
        """
        family = pick(FAMILIES, self._draw) if family is None else family
        check_choice("family", family, (*FAMILIES, HELD_OUT))
        turns = self._turns(family)
        return Task(family, conversation(turns), turns[-1][2])

    def tasks(self, n: int, family: str | None = None) -> Iterator[Task]:
        """Yield the next `n` tasks. Raises ValueError as `sample`, and if `n` is negative."""
        require("n", n, n >= 0, "at least 0")
        return (self.sample(family) for _ in range(n))

    def lesson(self) -> tuple[dict[str, str], ...]:
        """Draw a longer conversation of the trained families, which asks one story, read once, several questions.

        One in five lessons corrects six sentences; one in five begins with the end of a story.
        """
        draw, kind = self._draw, self._draw()
        if kind < 0.2:
            return conversation([turn for _ in range(6) for turn in self._turns("agreement")])
        # Only the first question brings the story along. What is hard to learn is asked three times.
        story = self._tales.sample()
        turns = ending_turns(story, draw) if kind < 0.4 else []
        asks = (owner_turns, follow_up_turns, *(order_turns, count_turns) * 3)
        for ask in shuffled(asks, draw)[: 5 if turns else 8]:
            for question, answer, value in ask(story, draw):
                bare = question.removeprefix(f"{story.text}\n")
                if all(bare not in earlier for earlier, *_ in turns):
                    turns.append((bare if turns else question, answer, value))
        return conversation(turns)

    def _turns(self, family: str) -> list[Turn]:
        """Draw stories until one serves."""
        ask = _TURNS[family]
        # The kind of error comes first: otherwise most would be an "an" in place of "a".
        if family == "agreement":
            ask = partial(agreement_turns, kind=pick(list(KINDS), self._draw))
        while not (turns := ask(self._tales.sample(), self._draw)):
            pass
        return turns


def conversation(turns: Sequence[Turn]) -> tuple[dict[str, str], ...]:
    """Return questions and answers as messages of the user and the assistant."""
    return tuple(
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn[:2], strict=True)
    )


# --- families: each makes the turns of a task, or none where the story does not serve


def owner_turns(story: Story, draw: Draw) -> list[Turn]:
    """Ask who has a thing at the end; on the way it may have been lost, lent, sold or given away."""
    found = owners(story)
    if not found:
        return []
    thing, owner = pick(found, draw)
    forms = (f"Who has the {thing} at the end?", f"To whom does the {thing} belong at the end?")
    return [(f"{story.text}\n{pick(forms, draw)}", f"It belongs to {owner}.", owner)]


def possession_turns(story: Story, draw: Draw) -> list[Turn]:
    """Ask what somebody has at the end, the question of `owner` turned round; nobody is asked who has two things."""
    found = owners(story)
    once = [(thing, owner) for thing, owner in found if [other for _, other in found].count(owner) == 1]
    if not once:
        return []
    thing, owner = pick(once, draw)
    forms = (f"What does {owner} have at the end?", f"What belongs to {owner} at the end?")
    return [(f"{story.text}\n{pick(forms, draw)}", f"It is the {thing}.", thing)]


def order_turns(story: Story, draw: Draw) -> list[Turn]:
    """Ask in which order the story first names three of its words."""
    words = named_words(story)
    if len(words) < 3:
        return []
    asked = shuffled(words, draw)[:3]
    right = sorted(asked, key=lambda word: first_place(word, story.text))
    given = ", ".join(shuffled(asked, draw))
    forms = (
        f"Put these words in the order in which the story first names them: {given}.",
        f"In which order does the story name these words for the first time: {given}?",
    )
    answer = "First {}, then {}, then {}.".format(*right)
    return [(f"{story.text}\n{pick(forms, draw)}", answer, ", ".join(right))]


def count_turns(story: Story, draw: Draw) -> list[Turn]:
    """Ask how many times a word stands in the story."""
    # How often comes first, then the word: otherwise half of all answers would be "two".
    words = named_words(story)
    number = pick(sorted({times(word, story.text) for word in words}), draw)
    word = pick([word for word in words if times(word, story.text) == number], draw)
    forms = (
        f"How many times does the word {word} stand in the story?",
        f"How often is the word {word} in the story?",
    )
    return [
        (
            f"{story.text}\n{pick(forms, draw)}",
            counted(number),
            number,
        )
    ]


def agreement_turns(story: Story, draw: Draw, kind: str) -> list[Turn]:
    """Ask for a sentence in which one word no longer agrees with the others; `kind` is one of `KINDS`."""
    spoiled = [
        (wrong, sentence)
        for sentence in split_sentences(story.text)
        if len(sentence.split()) <= MAX_SENTENCE_WORDS
        for right, wrong in spoilings(sentence)
        if right in KINDS[kind]
    ]
    if not spoiled:
        return []
    wrong, sentence = pick(spoiled, draw)
    forms = (
        f"One word of this sentence is wrong. Write the sentence correctly: {wrong}",
        f"Correct the one wrong word in this sentence: {wrong}",
    )
    return [(pick(forms, draw), f"Correct: {sentence}", sentence)]


def ending_turns(story: Story, draw: Draw) -> list[Turn]:
    """Ask for the last sentence, of which the beginning and the words that are new in the story are prescribed."""
    *before, last = split_sentences(story.text)
    told = " ".join(before)
    start = " ".join(last.split()[:2])
    new = [
        word
        for word in dict.fromkeys(re.findall(r"[A-Za-z]+", last[len(start) :]))
        if first_place(word, told) == len(told) and word in _content_words()
    ]
    words = f" with the word{'s' if len(new) > 1 else ''} {' and '.join(new)}" if new else ""
    forms = (
        f"Write the last sentence{words}. It begins: {start} ...",
        f"End the story with a sentence{words} that begins: {start} ...",
    )
    return [(f"{told}\n{pick(forms, draw)}", f"Last sentence: {last}", last)]


def follow_up_turns(story: Story, draw: Draw) -> list[Turn]:
    """Ask for somebody, and then something about the answer, which the second question does not name."""
    words = named_words(story)
    asked = {
        kind: [word for word in words if word in _pool(kind)]
        for kind in ("person", "animal", "trade", "place")
    }
    openings = [
        (f"{story.text}\nWhich {kind} is named first in the story?", f"It is the {named[0]}.", named[0])
        for kind, named in asked.items()
        if named and kind != "person"
    ]
    second = asked["person"][1]
    openings.append((f"{story.text}\nWhich person is named second in the story?", f"It is {second}.", second))
    openings += owner_turns(story, draw)
    opening = pick(openings, draw)
    word = opening[2].removeprefix("the ")
    if " " in word:  # two people together
        return []
    number, after = times(word, story.text), re.search(rf"\b{word}\b[^A-Za-z]*([A-Za-z]+)", story.text)
    later = [
        (
            "How many times does that name or word stand in the story?",
            counted(number),
            number,
        )
    ]
    if after:
        later.append(
            ("Which word comes right after it the first time?", f"The word is {after[1]}.", after[1])
        )
    later = shuffled(later, draw)
    return [opening, *later[: 1 + (draw() < 0.5)]]


_TURNS: dict[str, Callable[..., list[Turn]]] = {
    "owner": owner_turns,
    "order": order_turns,
    "count": count_turns,
    "agreement": agreement_turns,
    "ending": ending_turns,
    "follow_up": follow_up_turns,
    HELD_OUT: possession_turns,
}


# --- what a story says


def owners(story: Story) -> list[tuple[str, str]]:
    """Return the things of a story that can be asked for, and who has each at the end.

    Some stories end in one of two ways, and then their last sentences decide.
    """
    facts, text = story.facts, story.text
    who, friend, what = facts["who"], facts["friend"], facts["what"]
    job = f"the {facts.get('occupation', '')}"

    def found(pattern: str) -> str:
        match = re.search(pattern, text)
        assert match, f"a story of the plan {story.plan} without {pattern!r}"
        return match[1]

    match story.plan:
        case "lost_and_found":
            return [(what, who)]
        case "borrowed":
            return [(f"new {what}", who), (f"{facts['consequence']} {what}", friend)]
        case "storm" | "mending":  # nothing changes hands
            return []
        case "garden_thief":
            return [(found(r'at the \w+ with an? (\w+)," said'), friend)]
        case "race":
            pet, own = found(r"ran past with an? (\w+) at"), found(r'"I have an? (\w+) at home')
            return [(what, facts["third"]), (own, facts["third"]), (pet, facts["winner"])]
        case "wrong_letter":
            return [(what, who), (facts["animal"], facts["writer"])]
        case "hurt_wing":
            return [(what, friend)]
        case "cake":
            return [(what, job if f"gave the {what} to the" in text else friend)]
        case "boat_trip":
            return [(facts["boat"], f"{who} and {friend}")]
        case "market_trade":
            last_buyer = found(r"At last an? (\w+) fell in love")
            return [(facts["animal"], job), (facts["third"], f"the {last_buyer}")]
        case "hidden_key":
            return [(what, friend), (facts["box"], job if "bought the" in text else who)]
        case "lost_pet":
            return [(what, who)]
        case "night_noise":
            return [(what, friend if "never gave the" in text else who)]
        case "promise":
            return [(what, who), (facts["vehicle"], friend)]
        case "school_play":
            return [(what, facts["ill"])]
    raise ValueError(f"story must be of a known plan, got {story.plan!r}")


def named_words(story: Story) -> list[str]:
    """Return single words of the story's facts that stand in its text, in the order of their first mention."""
    words = {word for value in story.facts.values() for word in value.split()}
    named = [
        word for word in words if word in _content_words() and first_place(word, story.text) < len(story.text)
    ]
    return sorted(named, key=lambda word: first_place(word, story.text))


def times(word: str, text: str) -> str:
    """Return in words how many times a word stands in a text: "one" to "twelve"."""
    return NUMBERS[len(re.findall(rf"\b{word}\b", text)) - 1]


def counted(number: str) -> str:
    """Return the answer that says how often a word stands in a story."""
    return f"It stands there {number} time{'' if number == 'one' else 's'}."


def first_place(word: str, text: str) -> int:
    """Return where a whole word stands first in a text; the length of the text where it does not."""
    found = re.search(rf"\b{re.escape(word)}\b", text)
    return found.start() if found else len(text)


@cache
def _pool(kind: str) -> frozenset[str]:
    return frozenset(lexicon("occupation" if kind == "trade" else kind))


@cache
def _content_words() -> frozenset[str]:
    """Single words that a story can be asked for: people, animals, places, food, things, colours, trades, weekdays."""
    pools = ("person", "animal", "place", "food", "object", "colour", "material", "occupation", "weekday")
    return frozenset(word for name in pools for word in lexicon(name) if " " not in word)


# --- drawing with random() alone


def pick(choices: Sequence[Choice], draw: Draw) -> Choice:
    """Draw one of the choices, all alike."""
    return choices[int(draw() * len(choices))]


def shuffled(choices: Sequence[Choice], draw: Draw) -> list[Choice]:
    """Return the choices in random order."""
    return [
        choice for _, choice in sorted(((draw(), choice) for choice in choices), key=lambda pair: pair[0])
    ]
