"""Questions about the tales: each answer stands where it is said to, and without an answer there is none."""

import re
from collections import defaultdict
from functools import cache, partial

import pytest

from shared.tales.generator import Story, TaleGenerator, plans, variables
from shared.tales.question_look_ups import best_sentence, best_span
from shared.tales.questions import (
    N_FORMS,
    Kind,
    TaleQuestion,
    TaleQuestionGenerator,
    all_kinds,
    ask,
    fill,
    given_away,
    kinds_of,
)
from shared.tales.scoring import split_sentences
from tests.timing import seconds

PER_KIND = 30


@cache
def stories() -> dict[str, list[Story]]:
    found: dict[str, list[Story]] = defaultdict(list)
    generator = TaleGenerator(21)
    while len(found) < len(plans()) or min(map(len, found.values())) < PER_KIND:
        story = generator.sample()
        found[story.plan].append(story)
    return {plan: several[:PER_KIND] for plan, several in found.items()}


def test_there_are_many_kinds_for_each_plan_and_their_wordings_differ():
    assert len(all_kinds()) >= 200 and all(len(kinds_of(plan)) >= 10 for plan in plans())
    assert len({(kind.plan, kind.name) for kind in all_kinds()}) == len(all_kinds())
    for plan in plans():
        wordings = [wording for kind in kinds_of(plan) for wording in kind.wordings]
        assert len(set(wordings)) == len(wordings) == N_FORMS * len(kinds_of(plan))
        assert all(re.fullmatch(r"[A-Z].*\?", wording) for wording in wordings)


@pytest.mark.parametrize("kind", all_kinds(), ids=lambda kind: f"{kind.plan}/{kind.name}")
def test_every_kind_finds_its_answer_in_the_story_and_does_not_give_it_away(kind):
    asked = [ask(story, kind, form) for story in stories()[kind.plan] for form in range(N_FORMS)]
    found = [question for question in asked if question]
    assert len(found) >= N_FORMS * PER_KIND / 5  # what half of the stories leave out is asked less often
    assert {question.form for question in found} == set(range(N_FORMS))
    for question in found:
        end = question.start + len(question.answer)
        assert question.answer and question.passage[question.start : end] == question.answer
        assert not re.search(r"\w", question.passage[question.start - 1] + question.passage[end])
        assert not re.fullmatch(r"(a|an|the) \w+", question.answer)  # clauses keep their articles
        assert len(question.answer.split()) <= 10
        assert not re.search(r"[{}\[\]|]", question.question + question.answer)
        assert not given_away(question.question, question.answer)


def test_what_a_story_leaves_out_is_not_asked():
    kind = next(kind for kind in kinds_of("cake") if kind.name == "gift_end")
    for story in stories()["cake"]:
        told = "gave the " in story.text
        question = ask(story, kind, 0)
        assert bool(question) == told and (not question or question.answer == story.facts["occupation"])
    with pytest.raises(ValueError, match="kind must be of the plan race"):
        ask(stories()["race"][0], kind, 0)


@pytest.mark.parametrize(
    "plan, name, fact",
    [
        ("race", "winner", "winner"),
        ("lost_and_found", "finder", "found_by"),
        ("garden_thief", "thief", "thief"),
        ("boat_trip", "old_name", "boat_name"),
        ("night_noise", "hour", "hour"),
        ("school_play", "substitute", "played_by"),
        ("hurt_wing", "owner", "lost_by"),
        ("hurt_wing", "gift", "what"),
    ],
)
def test_answers_agree_with_the_facts(plan, name, fact):
    kind = next(kind for kind in kinds_of(plan) if kind.name == name)
    for story in stories()[plan]:
        question = ask(story, kind, 0)
        assert question and question.answer == story.facts[fact]


def test_templates_write_articles_capitals_and_plurals():
    bound = variables(next(story for story in stories()["race"]))
    thing = bound["prize"].text
    article = "an" if thing[0] in "aeiou" else "a"
    assert fill("{a prize}|{a:prize}|{^prize}", bound) == f"{article} {thing}|{article}|{thing.capitalize()}"
    with pytest.raises(ValueError, match="not a story of the plan race"):
        variables(Story("No story.", 0.0, "race", {}))


def sampled(n: int = 200, seed: int = 4, **options) -> list[TaleQuestion]:
    return list(TaleQuestionGenerator(seed).questions(n, **options))


def test_the_same_seed_gives_the_same_questions():
    assert sampled() == sampled() != sampled(seed=5)
    generator = TaleQuestionGenerator(4)
    assert [generator.sample() for _ in range(200)] == sampled()


def test_one_in_five_is_unanswered_by_default():
    found = sampled(1000)
    unanswered = [question for question in found if question.start == -1]
    assert 150 < len(unanswered) < 250
    assert all((question.answer == "") == (question.start == -1) for question in found)
    assert all(question.answer for question in sampled(answered=True))
    assert {question.plan for question in found} == set(plans())


def test_unanswered_questions_ask_about_something_that_is_not_in_the_passage():
    foreign = 0
    texts = {(kind.plan, kind.name): kind for kind in all_kinds()}
    for question in sampled(300, answered=False):
        kind = texts[tuple(question.kind.split("/"))]
        fixed = set(re.findall(r"\w+", re.sub(r"\{[^}]*\}", " ", kind.wordings[question.form])))
        named = set(re.findall(r"\w+", question.question)) - fixed - {"a", "an", "he", "him", "her", "s"}
        assert any(not re.search(rf"\b{word}\b", question.passage) for word in named), question
        foreign += kind.plan != question.plan
    assert 40 < foreign < 110  # a quarter


def test_plan_and_wordings_can_be_chosen():
    assert {question.plan for question in sampled(plan="race")} == {"race"}
    assert {question.form for question in sampled()} == {0, 1}
    assert {question.form for question in sampled(forms=(2,), answered=None)} == {2}


def test_bad_arguments_are_refused():
    generator = TaleQuestionGenerator()
    with pytest.raises(ValueError, match="seed must be an int"):
        TaleQuestionGenerator("1")
    with pytest.raises(ValueError, match="plan must be one of"):
        generator.sample(plan="nothing")
    for forms in ((), (3,), (0, -1)):
        with pytest.raises(ValueError, match="forms must be some of 0, 1 and 2"):
            generator.sample(forms=forms)
    with pytest.raises(ValueError, match="n must be at least 0"):
        generator.questions(-1)
    with pytest.raises(ValueError, match="plan must be one of"):
        kinds_of("nothing")


@pytest.mark.parametrize(
    "question, answer",
    [
        ("Who sold the lamp?", "Petra"),
        ("How many coins did Petra get?", "seven"),
        ("On which day was the harbour closed?", "Sunday"),
        ("Where did the lamp stand?", "window"),
        ("Why was the harbour closed on Sunday?", "the sea was too rough"),
        ("What colour was the lamp?", "green"),
    ],
)
def test_the_look_up_reads_question_words(question, answer):
    text = (
        "A green lamp stood at the window. Then Petra sold the lamp for seven coins. "
        "On Sunday the harbour was closed, because the sea was too rough."
    )
    assert best_span(text, question) == answer
    assert best_sentence(text, question) in split_sentences(text)


def test_the_look_up_finds_spans_and_beats_chance_but_is_far_from_reading():
    questions = sampled(300, answered=True)
    found = [best_span(question.passage, question.question) for question in questions]
    assert all(span and span in question.passage for span, question in zip(found, questions, strict=True))
    right = sum(span == question.answer for span, question in zip(found, questions, strict=True))
    assert 0.15 < right / 300 < 0.6
    assert best_span("", "Who?") == best_sentence("", "Who?") == ""
    assert isinstance(kinds_of("race")[0], Kind)


@pytest.mark.parametrize("unit", ["the of and. ", "Ada came, ", 'a "b". ', "Ada ", "the old key of "])
def test_the_look_up_takes_linear_time(unit):
    short, long = (seconds(partial(best_span, unit * n, "Who came to Xanadu?")) for n in (2_000, 16_000))
    assert long < 32 * short  # eight times as long: a square would be 64
