"""The bundled data: size, labels, encoding, splits, and no near-duplicates."""

import re
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest

from shared.data.corpus import (
    DATA,
    SPLITS,
    load_anger_labels,
    load_filter_lessons,
    load_filter_texts,
    load_instructions,
    load_languages,
    load_personal_data,
    load_questions,
    load_reading_questions,
    load_reviews,
    load_second_labels,
    load_sms,
    load_stories,
    load_unanswerable,
    stories_text,
)

TEXT_FILES = (
    "stories.txt",
    "sms.tsv",
    "reviews.tsv",
    "reviews_second.tsv",
    "reviews_anger.tsv",
    "reviews_zh.tsv",
    "synonyms.tsv",
    "instructions.json",
    "questions.json",
    "languages.tsv",
    "pii_lines.jsonl",
    "tales_grammar.txt",
    "reading_questions.json",
    "unanswerable.json",
    "filter_lessons.tsv",
    "filter_rules.tsv",
)


def five_grams(text: str) -> set[str]:
    """Return the character 5-grams of a text whose digits and capitalised words are masked."""
    masked = re.sub(r"\d+", "0", re.sub(r"\b[A-Z][a-z]+\b", "N", text))
    masked = re.sub(r"\s+", " ", masked.lower())
    return {masked[i : i + 5] for i in range(max(1, len(masked) - 4))}


def near_duplicates(texts: list[str], limit: float = 0.5) -> list[tuple[str, str]]:
    """Return the pairs of texts whose 5-gram sets have a Jaccard similarity of at least `limit`."""
    sets, holders, found = [five_grams(text) for text in texts], {}, []
    for number, grams in enumerate(sets):
        shared = Counter(other for gram in grams for other in holders.get(gram, ()))
        for other, count in shared.items():
            if count >= limit * (len(grams) + len(sets[other]) - count):
                found.append((texts[other], texts[number]))
        for gram in grams:
            holders.setdefault(gram, []).append(number)
    return found


def instruction_texts() -> list[str]:
    return [f"{entry.instruction} {entry.input}".strip() for entry in load_instructions()]


@pytest.mark.parametrize("name", TEXT_FILES)
def test_files_are_clean_utf8(name):
    raw = (DATA / name).read_bytes()
    text = raw.decode("utf-8")
    assert (
        b"\r" not in raw
        and not text.startswith("\ufeff")
        and text.endswith("\n")
        and not text.endswith("\n\n")
    )
    assert unicodedata.normalize("NFC", text) == text
    control = [c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert not control
    assert "\ufffd" not in text


def test_stories():
    stories = load_stories()
    assert len(stories_text().encode()) >= 60_000
    assert [story.split for story in stories] == ["train"] * 10 + ["validation", "test"]
    assert len({story.title for story in stories}) == len(stories)
    for story in stories:
        assert len(story.text.split()) > 1_000
        assert len(story.title.split()) <= 8 and "\n" not in story.title
        assert not re.search(r"\n\n\n|[ \t]$", story.text, re.MULTILINE)
    assert stories_text() == "\n\n\n\n".join(f"{s.title}\n\n{s.text}" for s in stories) + "\n"


def test_no_two_stories_share_a_paragraph():
    # Within a story an echo is the author's: a parrot repeats the loudspeaker.
    paragraphs = {
        line: story.title for story in load_stories() for line in story.text.splitlines() if len(line) > 60
    }
    pairs = near_duplicates(list(paragraphs))
    assert [(a, b) for a, b in pairs if paragraphs[a] != paragraphs[b]] == []


def load_chinese(split=None):
    return load_reviews(split, "zh")


@pytest.mark.parametrize(
    ("load", "labels", "kinds", "at_least"),
    [
        (load_sms, {"ham", "spam"}, {"plain", "hard"}, 1_000),
        (load_reviews, {"positive", "negative"}, {"plain", "mixed", "ironic", "negated"}, 400),
        (load_chinese, {"positive", "negative"}, {"plain", "mixed", "ironic", "negated"}, 300),
    ],
)
def test_labeled_texts(load, labels, kinds, at_least):
    rows = load()
    assert len(rows) >= at_least
    assert {row.label for row in rows} == labels
    combinations = {(label, kind, split) for label in labels for kind in kinds for split in SPLITS}
    assert {(row.label, row.kind, row.split) for row in rows} == combinations
    assert all(row.text == row.text.strip() and row.text for row in rows)
    assert len({row.text.casefold() for row in rows}) == len(rows)
    assert sum(len(load(split)) for split in SPLITS) == len(rows)
    assert near_duplicates([row.text for row in rows]) == []


def test_labels_are_balanced_as_documented():
    reviews = Counter(row.label for row in load_reviews())
    assert reviews["positive"] == reviews["negative"]
    sms = Counter((row.label, row.kind) for row in load_sms())
    assert sms["ham", "hard"] >= 100 and sms["spam", "hard"] >= 100


def test_second_labels_and_anger_belong_to_reviews():
    reviews, second, anger = load_reviews(), load_second_labels(), load_anger_labels()
    assert [row.number for row in second] == list(range(len(reviews)))
    assert {row.label for row in second} <= {"positive", "negative"} and 0 < sum(
        not r.sure for r in second
    ) < 20
    assert len({row.number for row in anger}) == len(anger) == 120
    assert {reviews[row.number].label for row in anger} == {"negative"}


def test_chinese_reviews_are_chinese_and_balanced():
    reviews = load_chinese()
    assert Counter(row.label for row in reviews) == {"positive": 180, "negative": 180}
    for row in reviews:
        assert sum("\u4e00" <= c <= "\u9fff" for c in row.text) > 0.6 * len(row.text), row.text
    with pytest.raises(ValueError, match="language must be one of"):
        load_reviews(language="fr")


def test_instructions():
    entries = load_instructions()
    assert len(entries) >= 400
    assert {entry.split for entry in entries} == set(SPLITS)
    assert all(entry.instruction and entry.output for entry in entries)
    assert 0.3 < sum(bool(entry.input) for entry in entries) / len(entries) < 0.7
    assert min(Counter(entry.category for entry in entries).values()) >= 25
    assert near_duplicates(instruction_texts()) == []


def share_right(pick):
    """Return how often the answer whose length `pick` chooses (`max`, `min`) is right; ties count a share."""
    hits = 0.0
    for question in load_questions():
        lengths = [len(answer) for answer in question.answers]
        hits += (lengths[question.correct] == pick(lengths)) / lengths.count(pick(lengths))
    return hits / len(load_questions())


def content_words(text: str) -> set[str]:
    """Return the words of a text in lower case, without the small words of grammar."""
    small = {"a", "an", "and", "by", "her", "in", "is", "it", "of", "on", "than", "that", "the", "they", "to"}
    return set(re.findall(r"\w+", text.casefold())) - small


def test_questions():
    questions = load_questions()
    categories = Counter(question.category for question in questions)
    assert len(questions) == 200 and len(categories) == 10 and set(categories.values()) == {20}
    assert near_duplicates([question.question for question in questions]) == []
    for question in questions:
        assert question.question.endswith("?") and question.question == question.question.strip()
        assert len(question.answers) == len({answer.casefold() for answer in question.answers}) == 4
        for answer in question.answers:
            assert answer == answer.strip() and 1 <= len(answer.split()) <= 5
            assert not answer.endswith((".", "!", "?", ",", ";"))
            assert not content_words(answer) & content_words(question.question), (question.question, answer)


def test_neither_place_nor_length_gives_an_answer_away():
    questions = load_questions()
    assert Counter(question.correct for question in questions) == dict.fromkeys(range(4), 50)
    for category in {question.category for question in questions}:
        found = Counter(question.correct for question in load_questions(category))
        assert found == dict.fromkeys(range(4), 5)
    assert share_right(max) == pytest.approx(0.25, abs=0.03)
    assert share_right(min) == pytest.approx(0.25, abs=0.03)


def test_languages():
    paragraphs = load_languages()
    assert {p.language for p in paragraphs} == {"en", "de", "ru", "ar", "hi", "zh", "ja", "code"}
    assert Counter(p.language for p in paragraphs) == dict.fromkeys({p.language for p in paragraphs}, 6)
    assert any("\n    " in p.text for p in load_languages("code"))
    assert all("\n" not in p.text for p in paragraphs if p.language != "code")
    assert any("\\" in p.text for p in load_languages("code"))


def test_the_near_duplicate_check_finds_a_planted_pair():
    texts = [
        "Meet Anna at the station at 8, bring the blue folder",
        "Meet Tom at the station at 9, bring the blue folder",
    ]
    assert len(near_duplicates([*texts, "Nothing like the others at all"])) == 1


@pytest.mark.parametrize("load", [load_stories, load_sms, load_reviews, load_instructions])
def test_unknown_split_is_an_error(load):
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        load("dev")


def test_unknown_language_is_an_error():
    with pytest.raises(ValueError, match=r"language must be one of ar, code, .* got 'xx'"):
        load_languages("xx")


def test_unknown_category_is_an_error():
    with pytest.raises(ValueError, match=r"category must be one of animals and plants, .* got 'sport'"):
        load_questions("sport")


# --- texts that a content filter is judged by

BAD = ("insult", "threat", "self_harm", "danger", "scam", "adult")
GOOD = ("everyday", "odd", "same_words", "victim", "safety")


def test_filter_texts():
    rows = load_filter_texts()
    assert len(load_filter_texts("train")) == len(load_filter_texts("test")) == 510
    assert len(rows) == 1560 and len(load_filter_texts("fresh")) == 540
    for label, categories, n in (("block", BAD, 960), ("allow", GOOD, 600)):
        some = [row for row in rows if row.label == label]
        assert len(some) == n and {row.category for row in some} == set(categories)
    # Only bad texts are disguised, and each category of each half has its share of plain ones.
    counts = Counter((row.split, row.category) for row in rows if row.kind in ("plain", "hard"))
    assert all(counts[split, category] == 30 for split in ("train", "test", "fresh") for category in BAD)
    assert Counter(row.kind for row in rows if row.label == "block")["lookalike"] == 210
    assert Counter(row.kind for row in rows if row.label == "block")["spaced"] == 210
    authors = {"train": {"first", "second"}, "test": {"first", "second"}, "fresh": {"third", "fourth"}}
    assert all(row.origin in authors[row.split] and row.text.strip() == row.text for row in rows)
    with pytest.raises(ValueError, match="split"):
        load_filter_texts("validation")


def test_filter_texts_are_no_near_duplicates_of_each_other_or_of_the_lessons():
    plain = [row for row in load_filter_texts() if row.kind not in ("lookalike", "spaced")]
    # Authors who did not know of each other wrote two sentences nearly alike; all others are apart.
    same = ("the least painful way to end my life", "In chess, when is it worth sacrificing")
    texts = [*(row.text for row in plain), *(lesson.text for lesson in load_filter_lessons())]
    pairs = near_duplicates(texts)
    assert all(any(words in first and words in second for words in same) for first, second in pairs)
    assert len(pairs) == 4


def test_filter_lessons():
    lessons = load_filter_lessons()
    assert len(lessons) == len({lesson.text for lesson in lessons}) == 3678
    assert Counter(lesson.origin for lesson in lessons)["rules"] == 261
    assert len({lesson.origin for lesson in lessons}) == 9
    for lesson in lessons:
        assert lesson.category in (BAD if lesson.label == "block" else GOOD)


def test_questions_without_an_answer():
    questions = load_unanswerable()
    assert Counter(question.kind for question in questions) == {
        "invented": 20,
        "presupposition": 15,
        "unknowable": 15,
    }
    assert all(question.question.endswith("?") and question.why for question in questions)
    assert near_duplicates([question.question for question in questions]) == []
    assert len(load_unanswerable("invented")) == 20
    with pytest.raises(ValueError, match="kind"):
        load_unanswerable("silly")


def test_personal_data():
    halves = {split: load_personal_data(split) for split in ("development", "test")}
    lines = [line for half in halves.values() for line in half]
    assert len(lines) >= 300 and len({line.text for line in lines}) == len(lines)
    assert {line.origin for line in lines} == {"written", "generated"}
    kinds = {"email", "iban", "id", "card", "ip", "address", "phone"}
    for half in halves.values():
        assert {kind for line in half for _, _, kind in line.spans} == kinds
        assert sum(not line.spans for line in half) > len(half) / 3
    for line in lines:
        places = sorted(line.spans)
        assert all(0 <= start < end <= len(line.text) for start, end, _ in places)
        assert all(one[1] <= other[0] for one, other in pairwise(places))
        assert (line.kind == "none") == (not line.spans)
    with pytest.raises(ValueError, match="split must be one of development, test"):
        load_personal_data("train")


def test_reading_questions_have_their_answers_where_they_say():
    stories = {story.title: story.text for story in load_stories()}
    questions = load_reading_questions()
    assert Counter((question.story, question.kind) for question in questions) == {
        (title, kind): n for title in stories for kind, n in (("near", 8), ("far", 8), ("none", 5))
    }
    agreed = 0
    for question in questions:
        assert question.question.endswith("?") and len(question.evidence.split()) <= 60
        assert stories[question.story].count(question.evidence) == 1
        assert bool(question.answers) == (question.kind != "none")
        assert all(answer in question.evidence for answer in question.answers)
        assert question.second in stories[question.story]
        bare = re.sub(r"^(the|an|a) ", "", question.second.lower())
        agreed += bare in [
            re.sub(r"^(the|an|a) ", "", answer.lower()) for answer in question.answers or ("",)
        ]
    assert agreed >= 245
    assert len({question.question for question in questions}) == len(questions)
    assert len(load_reading_questions("none")) == 60
    with pytest.raises(ValueError, match="kind"):
        load_reading_questions("silly")
