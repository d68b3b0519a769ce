"""Look-ups: rules that are easy to follow, none of which answers half of the questions of a family."""

import pytest

from shared.tales.instructions import FAMILIES, HELD_OUT, Task, TaskGenerator
from shared.tales.look_ups import best_look_up, look_ups, n_correct

STORY = "Anna had a red hat and a dog. Ben took the hat. Anna saw it. Ben gave the hat to the baker."


def task(family: str, question: str, value: str = "?", story: str = STORY) -> Task:
    content = f"{story}\n{question}" if story else question
    messages = ({"role": "user", "content": content}, {"role": "assistant", "content": value})
    return Task(family, messages, value)


def answer(family: str, name: str, question: str, story: str = STORY) -> str:
    asked = task(family, question, story=story)
    return look_ups(family, [asked])[name](asked)


@pytest.mark.parametrize(
    ("family", "name", "question", "expected"),
    [
        ("owner", "the person named first", "Who has the hat at the end?", "Anna"),
        ("owner", "the person named last", "Who has the hat at the end?", "Ben"),
        ("owner", "the person named most often", "Who has the hat at the end?", "Anna"),
        (
            "owner",
            "the owner nearest to the thing's first mention",
            "Who has the red hat at the end?",
            "Anna",
        ),
        (
            "owner",
            "the owner nearest to the thing's last mention",
            "Who has the hat at the end?",
            "the baker",
        ),
        (
            "owner",
            "the owner just before the thing's last mention",
            "To whom does the hat belong at the end?",
            "Ben",
        ),
        ("order", "the words as they are given", "Put these words in order: hat, dog, Ben.", "hat, dog, Ben"),
        ("order", "the words in alphabetical order", "In which order: hat, dog, Ben?", "Ben, dog, hat"),
        ("order", "names first", "Put them in order: hat, dog, Ben.", "Ben, hat, dog"),
        (HELD_OUT, "the thing named first", "What does Ben have at the end?", "hat"),
        (
            HELD_OUT,
            "the thing nearest to the owner's first mention",
            "What belongs to Ben at the end?",
            "dog",
        ),
    ],
)
def test_a_look_up_does_what_its_name_says(family, name, question, expected):
    assert answer(family, name, question) == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("It was an dog.", "It was a dog."),
        ("It were an owl.", "It was an owl."),
        ("Anna lost his hat.", "Anna lost his hat."),
        ("A owl was there.", "An owl was there."),
    ],
)
def test_articles_and_verbs_are_mended_by_rule(sentence, expected):
    name = "articles, and if they are right the verb"
    assert (
        answer("agreement", name, f"Correct the one wrong word in this sentence: {sentence}", "") == expected
    )


def test_the_usual_answer_is_learned_from_training_tasks():
    training = [
        task("count", f"How many times does the word {w} stand here?", v) for w, v in ("ax", "bx", "cy")
    ]
    name, look_up = best_look_up("count", training)
    assert n_correct(look_up, training) == 2 and look_up(task("count", "How many times is it?")) == "x"
    assert "usual" in name
    assert look_up(task("count", "Another kind of question?")) == ""


def test_a_second_question_is_answered_without_the_first_answer():
    messages = (
        {"role": "user", "content": f"{STORY}\nWhich person is named last in the story?"},
        {"role": "assistant", "content": "It is Ben."},
        {"role": "user", "content": "Which word comes right after it the first time?"},
        {"role": "assistant", "content": "The word is took."},
    )
    asked = Task("follow_up", messages, "took")
    found = {name: look_up(asked) for name, look_up in look_ups("follow_up", [asked]).items()}
    assert found["about the person named first"] == "had"
    assert found["about the person named last"] == "took"


@pytest.mark.parametrize("family", [*FAMILIES, HELD_OUT])
def test_no_look_up_answers_half_of_the_questions(family):
    training, testing = (list(TaskGenerator(seed).tasks(300, family)) for seed in (1000, 1))
    _, look_up = best_look_up(family, training)
    assert n_correct(look_up, testing) < 150
    assert n_correct(look_up, testing) == n_correct(look_up, iter(testing))


def test_look_ups_need_a_known_family_and_training_tasks():
    with pytest.raises(ValueError, match="family must be one of owner"):
        look_ups("weather", [])
    with pytest.raises(ValueError, match="training must be tasks of the family owner"):
        look_ups("owner", list(TaskGenerator(1).tasks(2, "count")))
