"""Tasks about the tales: the same for the same seed, and each answer the only right one."""

import re
from collections import Counter
from itertools import islice

import pytest

from shared.tales import errors, instructions
from shared.tales.distribution import next_tokens
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator, derivations
from shared.tales.instructions import FAMILIES, HELD_OUT, NUMBERS, Task, TaskGenerator
from tests.tools.architecture import ROOT

ALL = (*FAMILIES, HELD_OUT)


def tasks(family: str, n: int = 150, seed: int = 7) -> list[Task]:
    return list(TaskGenerator(seed).tasks(n, family))


def question(task: Task) -> str:
    return task.messages[0]["content"].splitlines()[-1]


def story_of(task: Task) -> str:
    return task.messages[0]["content"].splitlines()[0]


@pytest.mark.parametrize("family", ALL)
def test_tasks_are_conversations_that_end_with_an_answer_and_the_same_for_the_same_seed(family):
    found = tasks(family, 40)
    assert found == tasks(family, 40) and found != tasks(family, 40, seed=8)
    for task in found:
        assert task.family == family and task.value in task.answer.replace(", then", ",")
        assert [m["role"] for m in task.messages] == ["user", "assistant"] * (len(task.messages) // 2)
        assert task.prompt == list(task.messages)[:-1] and task.prompt[-1]["role"] == "user"
    # Follow-up questions have several turns, all others one.
    assert {len(task.messages) for task in found} == ({4, 6} if family == "follow_up" else {2})


def test_without_a_family_all_trained_ones_come_and_the_held_out_one_never():
    generator = TaskGenerator(3)
    assert {generator.sample().family for _ in range(100)} == set(FAMILIES)
    asked = [m["content"] for _ in range(200) for m in generator.lesson() if m["role"] == "user"]
    assert not any(re.search(r"^What (does|belongs)", text, re.M) for text in asked)
    assert all(re.search(r"^What (does|belongs)", question(task)) for task in tasks(HELD_OUT, 20))


@pytest.mark.parametrize("plan", sorted({story.plan for story in TaleGenerator(1).stories(300)}))
def test_owners_are_named_in_the_story_with_their_things(plan):
    stories = [story for story in TaleGenerator(5).stories(800) if story.plan == plan]
    for story in stories:
        for thing, owner in instructions.owners(story):
            for word in [*thing.removeprefix("new ").split(), *owner.removeprefix("the ").split(" and ")]:
                assert re.search(rf"\b{word}\b", story.text), (thing, owner, story.text)


def test_stories_with_two_ends_have_two_owners():
    ends = {"cake": set(), "hidden_key": set(), "night_noise": set()}
    for story in TaleGenerator(6).stories(900):
        if story.plan in ends:
            people = (story.facts["who"], story.facts["friend"])
            ends[story.plan].add(
                tuple(owner in people and owner for _, owner in instructions.owners(story)[-1:])
            )
            owner = instructions.owners(story)[-1][1]
            ends[story.plan].add(people.index(owner) if owner in people else "trade")
    assert (
        {0, 1} <= ends["night_noise"] and {1, "trade"} <= ends["cake"] and {0, "trade"} <= ends["hidden_key"]
    )


def test_order_is_that_of_the_first_mentions():
    for task in tasks("order"):
        words, story = task.value.split(", "), story_of(task)
        places = [re.search(rf"\b{word}\b", story).start() for word in words]
        assert places == sorted(places) and len(set(words)) == 3
        assert sorted(re.findall(r"\w+", question(task).split(": ")[1])) == sorted(words)


def test_counts_are_counts_and_no_answer_is_that_of_most_questions():
    found = tasks("count", 400)
    for task in found:
        word = re.search(r"word (\w+)", question(task))[1]
        assert Counter(re.findall(r"\w+", story_of(task)))[word] == NUMBERS.index(task.value) + 1
    assert max(Counter(task.value for task in found).values()) < 0.45 * len(found)


def test_one_word_is_wrong_and_the_answer_stands_in_a_story_of_the_grammar():
    kinds = Counter()
    for task in tasks("agreement", 300):
        wrong, right = question(task).split(": ", 1)[1].split(), task.value.split()
        (pair,) = [(a, b) for a, b in zip(wrong, right, strict=True) if a != b]
        kinds[re.sub(r"\W", "", pair[1].lower())] += 1
    assert set(kinds) > {"a", "an", "he", "she", "his", "her", "was", "were", "is"}, kinds
    pronouns = sum(kinds[word] for word in ("he", "she", "him", "his", "her", "himself", "herself"))
    assert 100 < pronouns < 200 and max(kinds.values()) < 100, kinds


def test_a_pronoun_is_made_wrong_only_where_it_can_speak_of_one_person_alone():
    spoil = errors.spoilings
    assert spoil("Anna lost her hat.") == [("her", "Anna lost his hat."), ("her", "Anna lost him hat.")]
    assert spoil("His hat was on Ben.") == [("his", "Her hat was on Ben."), ("was", "His hat were on Ben.")]
    for sentence in ("Anna gave Ben her hat.", "He saw Anna.", "She lost her hat."):
        assert not spoil(sentence), sentence
    assert spoil("An owl ate a fig.") == [("an", "A owl ate a fig."), ("a", "An owl ate an fig.")]


def test_what_is_prescribed_leaves_one_ending():
    """Where the grammar leaves a choice within the last sentence, the choice is one of the prescribed words."""
    encoding = tale_encoding()
    for task in tasks("ending", 120):
        told, last = story_of(task), task.value
        (story,) = derivations(f"{told} {last}")
        chances = next_tokens(story.text).chosen
        asked = question(task)
        assert re.search(r"begins: (.+) \.\.\.$", asked)[1] == " ".join(last.split()[:2])
        prescribed = re.search(r" with the words? (.+?)(?:\. It| that) begins", asked)
        prescribed = prescribed[1].split(" and ") if prescribed else []
        # Character by character: is it the beginning, or part of a prescribed word?
        free = set(range(len(told), len(told) + 1 + len(" ".join(last.split()[:2]))))
        for word in prescribed:
            place = re.search(rf"\b{word}\b", last).start() + len(told) + 1
            free |= set(range(place - 1, place + len(word)))
        place = 0
        for token, chance in zip(encoding.encode_ordinary(story.text), chances, strict=False):
            if place >= len(told) and chance < 1 - 1e-9:
                assert place in free, (asked, last, encoding.decode([token]))
            place += len(encoding.decode([token]))
    assert place == len(story.text)


def test_the_second_question_needs_the_first_answer():
    for task in tasks("follow_up"):
        opening, *later = (m["content"] for m in task.messages[::2])
        word = re.search(r"(?:It is|It belongs to)(?: the)? (\w+)\.", task.messages[1]["content"])[1]
        story = opening.splitlines()[0]
        assert not any(re.search(rf"\b{word}\b", text) for text in later)
        for text, answer in zip(later, (m["content"] for m in task.messages[3::2]), strict=True):
            if text.startswith("How many"):
                number = re.search(r"there (\w+) time", answer)[1]
                assert len(re.findall(rf"\b{word}\b", story)) == NUMBERS.index(number) + 1
            else:
                assert answer == f"The word is {re.search(rf'{word}{chr(92)}W*({chr(92)}w+)', story)[1]}."


def test_lessons_ask_several_questions_of_one_story():
    generator = TaskGenerator(4)
    lessons = list(islice(iter(generator.lesson, None), 200))
    for lesson in lessons:
        asked = [m["content"] for m in lesson if m["role"] == "user"]
        assert len(asked) == len(set(asked)) >= 2
        assert not any("\n" in text for text in asked[1:])
    starts = Counter(
        next(
            (kind for kind, word in (("ending", " begins: "), ("agreement", "wrong")) if word in text),
            "story",
        )
        for text in (lesson[0]["content"] for lesson in lessons)
    )
    assert min(starts.values()) > 20 and len(starts) == 3


@pytest.mark.parametrize("family", ["riddle", "", "lesson"])
def test_an_unknown_family_is_refused(family):
    with pytest.raises(ValueError, match=r"family must be one of .*owner.*possession"):
        TaskGenerator(1).sample(family)


@pytest.mark.parametrize("arguments", [{"seed": "1"}, {"seed": 1.5}, {"seed": None}])
def test_a_seed_is_a_whole_number(arguments):
    with pytest.raises(ValueError, match="seed must be an int"):
        TaskGenerator(**arguments)
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        TaskGenerator(1).tasks(-1)


def test_only_random_itself_is_drawn_from():
    """Other methods of `random.Random` may change between Python versions, and the tasks with them."""
    source = (ROOT / "shared" / "tales" / "instructions.py").read_text(encoding="utf-8")
    assert source.count("random.Random(") == 1 and ".shuffle(" not in source and ".choice(" not in source
