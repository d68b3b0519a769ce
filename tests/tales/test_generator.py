"""The story grammar: its size, its exact entropy and probabilities, and the grading of generated text."""

import math
import random
import re
import time
from collections import Counter

import numpy as np
import pytest

from shared.tales import generator as tales
from shared.tales.generator import TaleGenerator
from shared.tales.grammar import Grammar, article, plural
from shared.tales.scoring import Score, score, split_sentences

KINDS = ("pronouns", "names", "objects", "consequences")
TOKEN = re.compile(r"[A-Za-z]+|[^A-Za-z\s]")

# Where the consequence of each plan comes from: the pool of causes and the attribute.
CONSEQUENCES = {
    "lost_and_found": ("taker", "noun"),
    "borrowed": ("accident", "state"),
    "storm": ("storm", "ruin"),
    "race": ("slip", "blame"),
    "wrong_letter": ("weather", "delay"),
    "hurt_wing": ("weather", "noun"),
    "cake": ("oversight", "result"),
    "boat_trip": ("peril", "lesson"),
    "hidden_key": ("riddle", "answer"),
    "lost_pet": ("weather", "delay"),
    "mending": ("fault", "cure"),
    "night_noise": ("noise", "source"),
    "promise": ("vow", "did"),
    "school_play": ("illness", "state"),
}

TINY = """
lexicon girl he=she; other=boy
    Ann, Eve
lexicon boy he=he; other=girl
    Bob, Dan, Sam
pool person = girl + boy
lexicon thing
    owl {food=dry}, hat {food=wet}, cup {food=wet}
lexicon dry
    bread
lexicon wet
    milk, tea, oil
plan meeting
    fact who = {x}
    {x=person} met {y=person!x} (by day|by night|).
    | Before {y=person} came, {x=person!y} slept.
    {^x.he} called {z=@y.other!x}.
    |
    "Who?" asked {w=person!x,y}.
plan meal
    fact what = {a t}
    There was {a t=thing} with {f=@t.food} in it.
    "No {f}," said {x=girl}, "but {g=wet}."
"""


@pytest.fixture(scope="module")
def stories() -> list[tales.Story]:
    return list(TaleGenerator(seed=1).stories(20_000))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Grammar:
    grammar = Grammar(TINY)
    monkeypatch.setattr(tales, "grammar", lambda: grammar)
    return grammar


def replace_last(text: str, old: str, new: str) -> str:
    *_, found = re.finditer(rf"\b{re.escape(old)}\b", text)
    return text[: found.start()] + new + text[found.end() :]


def assert_only_wrong(grades: Score, kind: str) -> None:
    assert not grades.story and grades.sentences == 1
    assert getattr(grades, kind) < 1
    assert all(getattr(grades, other) in (1, None) for other in KINDS if other != kind)


# Entropy, counting and probabilities, against complete enumeration of a small grammar.


def test_small_grammar_agrees_with_enumeration(tiny: Grammar) -> None:
    sampled = {story.text: story for story in TaleGenerator(0).stories(30_000)}
    log_p = [tales.log_probability(text) for text in sampled]
    assert len(sampled) == tales.n_stories()
    assert math.fsum(map(math.exp, log_p)) == pytest.approx(1, abs=1e-12)
    assert tales.entropy() == pytest.approx(-math.fsum(p * math.exp(p) for p in log_p), abs=1e-12)
    for text, story in sampled.items():
        (found,) = tales.derivations(text)
        assert found.log_probability == pytest.approx(story.log_probability)


def test_small_grammar_is_sampled_at_its_probabilities(tiny: Grammar) -> None:
    n = 30_000
    counts = Counter(story.text for story in TaleGenerator(7).stories(n))
    expected = {text: n * math.exp(tales.log_probability(text)) for text in counts}
    chi_square = sum((counts[text] - expected[text]) ** 2 / expected[text] for text in counts)
    freedom = len(counts) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("plan p\n    A (red|red) cat.", "line 2: .*does not decide"),
        ("plan p\n    A cat.\n    | A cat.", "does not decide"),
        ("plan p\n    A cat (|).", "does not decide"),
        ("plan p\n    A cat.\nplan q\n    A cat.", "does not decide"),
        ("lexicon f\n    apple, apple pie\nplan p\n    An {x=f} (pie|tart).", "does not decide"),
        ("lexicon f\n    fig, figs\nplan p\n    Two {x=f}s.\n    |", "does not decide"),
        ("lexicon f\n    a {k=x}, b {k=x}\nplan p\n    {x.k=f}.", "does not decide"),
        ("lexicon f\n    a, b, c\nplan p\n    {x=f} {y=f} {z=f!x,y}.", "'x' and 'y' may hold the same"),
        ("lexicon f\n    a, b\nplan p\n    ({x=f}|none) {x}.", "unknown variable 'x'"),
        ("plan p\n    {x=f}.", "unknown lexicon 'f'"),
        ("lexicon f\n    a, b {k=v}\nplan p\n    {x=f} {x.k}.", "line 4: 'a' .*has no 'k'"),
        ("lexicon f\n    a, b, a", "holds an entry twice: .'a'"),
        ("plan p\n    A cat.\n    fact who = (a|b)", "line 3: a fact has no alternatives"),
        ("plan p\n    {x.", "cannot read"),
        ("plan p\n    (a|b.", "without"),
        ("animals f\n    a", "'animals' is not one of lexicon, pool, plan"),
        ("    a", "below no heading"),
    ],
)
def test_unsound_grammar_is_refused(grammar: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grammar(grammar)


@pytest.mark.parametrize(
    ("noun", "with_article", "many"),
    [
        ("eagle", "an", "eagles"),
        ("ukulele", "a", "ukuleles"),
        ("urn", "an", "urns"),
        ("hour", "an", "hours"),
        ("berry", "a", "berries"),
        ("day", "a", "days"),
        ("peach", "a", "peaches"),
        ("box", "a", "boxes"),
    ],
)
def test_articles_and_plurals(noun: str, with_article: str, many: str) -> None:
    assert (article(noun), plural(noun)) == (with_article, many)


# The tales.


def test_entropy_is_the_mean_surprise_of_samples(stories: list[tales.Story]) -> None:
    for plan in [None, *tales.plans()]:
        surprises = [
            -s.log_probability - (math.log(len(tales.plans())) if plan else 0)
            for s in stories
            if plan in (None, s.plan)
        ]
        mean = math.fsum(surprises) / len(surprises)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in surprises) / (len(surprises) - 1))
        assert abs(mean - tales.entropy(plan)) < 4 * deviation / math.sqrt(len(surprises)) + 1e-9


def test_entropy_of_all_is_that_of_the_plans_and_their_choice() -> None:
    names = tales.plans()
    mean = math.fsum(map(tales.entropy, names)) / len(names)
    assert tales.entropy() == pytest.approx(mean + math.log(len(names)))
    assert tales.n_stories() == sum(map(tales.n_stories, names)) >= 10**12


def test_each_story_has_one_derivation_with_the_sampled_probability(stories: list[tales.Story]) -> None:
    for story in stories[:1000]:
        (found,) = tales.derivations(story.text)
        assert (found.plan, found.facts) == (story.plan, story.facts)
        assert abs(found.log_probability - story.log_probability) < 1e-9
        assert tales.log_probability(story.text) == found.log_probability
        assert tales.parse(story.text) == found


def test_text_that_is_no_story_has_no_probability(stories: list[tales.Story]) -> None:
    text = stories[0].text
    for other in ("", text + " ", text[:-1], text.replace(".", "!", 1), text + " " + text):
        assert tales.log_probability(other) == -math.inf
        with pytest.raises(ValueError, match="not a story"):
            tales.parse(other)


def test_seed_decides_the_stories() -> None:
    first = list(TaleGenerator(5).stories(50))
    assert first == list(TaleGenerator(5).stories(50))
    assert first != list(TaleGenerator(6).stories(50))
    assert first == list(TaleGenerator(np.int64(5)).stories(50))
    generator = TaleGenerator(5)
    assert [generator.sample() for _ in range(50)] == first


def test_text_is_whole_stories() -> None:
    text = TaleGenerator(5).text(5000)
    parts = text.split(tales.SEPARATOR)
    assert parts.pop() == ""
    assert parts == [story.text for story in TaleGenerator(5).stories(len(parts))]
    assert len(text) >= 5000 > len(text) - len(parts[-1]) - len(tales.SEPARATOR)
    assert TaleGenerator(5).text(0) == ""


def test_sampling_is_fast() -> None:
    generator = TaleGenerator(0)
    start = time.process_time()
    for _ in range(10_000):
        generator.sample()
    assert time.process_time() - start < 3  # 100,000 stories in 30 s


def test_size_of_the_language(stories: list[tales.Story]) -> None:
    appearances = Counter(word for s in stories for word in set(re.findall(r"[a-z]+", s.text.lower())))
    assert len(tales.plans()) >= 14
    assert len(appearances) >= 1500
    # No word is rarer than one in 2,000 stories.
    assert min(appearances.values()) >= len(stories) / 2000
    for name in tales.lexicons():
        for entry in tales.lexicon(name):
            assert set(re.findall(r"[a-z]+", entry.lower())) <= appearances.keys()
    least = {
        "girl": 60,
        "boy": 60,
        "animal": 42,
        "food": 80,
        "place": 80,
        "object": 200,
        "weather": 60,
        "colour": 16,
        "material": 16,
        "occupation": 40,
    }
    for name, size in least.items():
        assert len(set(tales.lexicon(name))) >= size, name
    assert {"eagle", "duck"} <= set(tales.lexicon("animal"))
    names = tales.lexicon("person") + tales.lexicon("petname")
    assert all(re.fullmatch("[A-Z][a-z]+", name) for name in names)
    lower_case = {word for s in stories for word in re.findall(r"\b[a-z]+", s.text)}
    assert not {name.lower() for name in names} & lower_case


def test_shape_of_the_stories(stories: list[tales.Story]) -> None:
    lengths = [len(s.text.split()) for s in stories]
    assert min(lengths) >= 80
    assert max(lengths) <= 160
    per_plan = Counter(s.plan for s in stories)
    assert all(abs(per_plan[plan] / len(stories) - 1 / len(tales.plans())) < 0.01 for plan in tales.plans())
    for story in stories[:2000]:
        assert story.text.isascii() and "\n" not in story.text and "  " not in story.text
        assert 7 <= len(split_sentences(story.text)) <= 12
        assert {"who", "friend", "what"} <= story.facts.keys()
        assert story.facts["who"] in story.text
        for written, noun in re.findall(r"\b([Aa]n?) (\w+)", story.text):
            assert written.lower() == article(noun)
    assert not any("{" in value for s in stories[:2000] for value in s.facts.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaleGenerator("1"), "seed must be an int, got '1'"),
        (lambda: TaleGenerator(True), "seed must be an int, got True"),
        (lambda: TaleGenerator(1).stories(-1), "-1"),
        (lambda: TaleGenerator(1).text(-1), "-1"),
        (lambda: tales.entropy("war"), "unknown plan 'war'; known: lost_and_found"),
        (lambda: tales.n_stories("war"), "unknown plan 'war'"),
        (lambda: tales.lexicon("star"), "unknown lexicon 'star'; known: .*animal"),
        (lambda: tales.log_probability(None), "text must be a str, got None"),
        (lambda: score(" \n"), "text must be a str that is not empty"),
        (lambda: score(b"A cat."), "text must be a str"),
    ],
)
def test_bad_input_names_value_and_choices(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# The floor and the trigram.


class KneserNeyTrigram:
    """Interpolated Kneser-Ney model of tokens (words and punctuation), the end of the story included."""

    def __init__(self, texts: list[str]) -> None:
        trigrams = Counter(trigram for text in texts for trigram in self.trigrams(text))
        bigrams = Counter(trigram[1:] for trigram in trigrams)
        unigrams = Counter(bigram[1:] for bigram in bigrams)
        self.vocabulary = [word for (word,) in unigrams]
        self.levels = [self.level(counts) for counts in (unigrams, bigrams, trigrams)]

    @staticmethod
    def trigrams(text: str) -> list[tuple[str, str, str]]:
        words = ["<s>", "<s>", *TOKEN.findall(text), "</s>"]
        return list(zip(words, words[1:], words[2:], strict=False))

    @staticmethod
    def level(counts: Counter) -> tuple[Counter, Counter, Counter, float]:
        """Counts, their sums and numbers of kinds by context, and the discount by Ney's formula."""
        totals, kinds, frequencies = Counter(), Counter(), Counter(counts.values())
        for ngram, count in counts.items():
            totals[ngram[:-1]] += count
            kinds[ngram[:-1]] += 1
        discount = frequencies[1] / (frequencies[1] + 2 * frequencies[2]) if frequencies[1] else 0.0
        return counts, totals, kinds, discount

    def probability(self, trigram: tuple[str, str, str]) -> float:
        p = 1 / len(self.vocabulary)
        for order, (counts, totals, kinds, discount) in enumerate(self.levels, 1):
            context = trigram[3 - order : 2]
            if totals[context]:
                kept = max(counts[trigram[3 - order :]] - discount, 0)
                p = (kept + discount * kinds[context] * p) / totals[context]
        return p

    def loss(self, text: str) -> float:
        return -math.fsum(math.log(self.probability(trigram)) for trigram in self.trigrams(text))


def test_trigram_stays_far_above_the_entropy(stories: list[tales.Story]) -> None:
    model = KneserNeyTrigram(TaleGenerator(seed=2).text(10_000_000).split(tales.SEPARATOR)[:-1])
    for context in [("<s>", "<s>"), ("said", "Anna"), ("in", "the"), ("never", "seen"), ("Anna", "the")]:
        assert math.fsum(model.probability((*context, word)) for word in model.vocabulary) == pytest.approx(1)
    held_out = stories[:1000]
    loss = math.fsum(model.loss(story.text) for story in held_out) / len(held_out)
    assert loss > 1.4 * tales.entropy()


# Grading.


def test_every_story_gets_full_marks(stories: list[tales.Story]) -> None:
    for story in stories[:300]:
        grades = score(story.text)
        assert grades.story and grades.plan == story.plan and grades.sentences == 1
        assert all(getattr(grades, kind) in (1, None) for kind in KINDS)
        assert grades.names == grades.objects == 1


def test_a_swapped_pronoun_costs_pronouns_only(stories: list[tales.Story]) -> None:
    swapped = {"he": "she", "she": "he", "He": "She", "She": "He"}
    seen = set()
    for story in stories[:200]:
        for found in re.finditer(r"\b([Hh]e|[Ss]he)\b", story.text):
            text = story.text[: found.start()] + swapped[found[0]] + story.text[found.end() :]
            assert_only_wrong(score(text), "pronouns")
            seen.add(story.plan)
    assert len(seen) >= 12


def test_a_swapped_name_costs_names_only(stories: list[tales.Story]) -> None:
    for story in stories[:200]:
        name = story.facts["who"]
        sex = "girl" if name in tales.lexicon("girl") else "boy"
        other = next(new for new in tales.lexicon(sex) if new not in story.text)
        assert_only_wrong(score(replace_last(story.text, name, other)), "names")


def test_a_swapped_object_costs_objects_only(stories: list[tales.Story]) -> None:
    plans = set()
    for story in stories[:300]:
        for pool in ("occupation", "bird", "instrument", "weekday"):
            words = tales.lexicon(pool)
            repeated = [word for word in words if len(re.findall(rf"\b{word}\b", story.text)) > 1]
            for word in repeated[:1]:
                other = next(new for new in words if new not in story.text and article(new) == article(word))
                assert_only_wrong(score(replace_last(story.text, word, other)), "objects")
                plans.add(story.plan)
    assert len(plans) >= 12


def test_a_swapped_consequence_costs_consequences_only(stories: list[tales.Story]) -> None:
    plans = set()
    for story in stories[:300]:
        if story.plan in CONSEQUENCES:
            pool, attribute = CONSEQUENCES[story.plan]
            effects = {entry.attributes[attribute] for entry in tales.grammar().pool(pool)}
            other = min(effects - {story.facts["consequence"]})
            text = replace_last(story.text, story.facts["consequence"], other)
            assert_only_wrong(score(text), "consequences")
            plans.add(story.plan)
    assert plans == CONSEQUENCES.keys()


def test_a_wrong_thief_costs_consequences(stories: list[tales.Story]) -> None:
    story = next(s for s in stories if s.plan == "garden_thief" and s.facts["cause"] == "feathers")
    text = re.sub(rf"\ban? {story.facts['thief']}\b", "a cow", story.text)
    assert_only_wrong(score(text.replace(story.facts["thief"], "cow")), "consequences")


def test_a_missing_sentence_spoils_only_the_story(stories: list[tales.Story]) -> None:
    for story in stories[:100]:
        parts = split_sentences(story.text)
        assert " ".join(parts) == story.text
        grades = score(" ".join(parts[:3] + parts[4:]))
        assert not grades.story and grades.sentences == 1 and grades.plan == story.plan


def test_a_strange_sentence_lowers_the_fraction(stories: list[tales.Story]) -> None:
    story = stories[0]
    parts = split_sentences(story.text)
    grades = score(" ".join([parts[0], "The moon is made of cheese.", *parts[1:]]))
    assert grades.sentences == pytest.approx(len(parts) / (len(parts) + 1))
    assert not grades.story and grades.names == grades.objects == 1


@pytest.mark.parametrize(
    "text", ["blue the of.", 'He said "no. And "', "Anna", "...", '"""', "Once upon a time."]
)
def test_garbage_gets_nothing(text: str) -> None:
    assert score(text) == Score(False, None, 0.0, None, None, None, None)


def test_random_damage_is_graded_without_error(stories: list[tales.Story]) -> None:
    rng = random.Random(0)
    for story in stories[:200]:
        words = story.text.split(" ")
        for _ in range(3):
            words[rng.randrange(len(words))] = rng.choice(words)
        text = " ".join(words)
        grades = score(text)
        assert grades.story == (text == story.text or math.isfinite(tales.log_probability(text)))
        fractions = [grades.sentences, *(getattr(grades, kind) for kind in KINDS)]
        assert all(fraction is None or 0 <= fraction <= 1 for fraction in fractions)
