"""The data that ships with the course: stories, text messages, reviews, instructions, questions, many languages.

Everything here was written for this project and is in the public domain (CC0); `shared/data/README.md` describes
the files. Data from the network is the business of `shared.data.download`.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from shared.checks import check_choice

DATA = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Story:
    """One short story: its title, its paragraphs separated by empty lines, and the split it belongs to."""

    title: str
    text: str
    split: str


@dataclass(frozen=True)
class LabeledText:
    """One text with its label, the kind of case it is (`plain`, `hard`, `ironic` ...) and its split."""

    text: str
    label: str
    kind: str
    split: str


@dataclass(frozen=True)
class SecondLabel:
    """What a second reader, who saw only the guideline and the text, said of a review.

    `number` is its place in `load_reviews()`, `label` is as there, `sure` whether the reader was.
    """

    number: int
    label: str
    sure: bool


@dataclass(frozen=True)
class AngerLabels:
    """Whether the writer of a negative review is angry, as four readers see it.

    `number` is its place in `load_reviews()`. Two readers had no guideline (`free`), two others had one (`guided`); of
    each pair the first has a calm temper and the second hears anger easily.
    """

    number: int
    free: tuple[bool, bool]
    guided: tuple[bool, bool]


@dataclass(frozen=True)
class Instruction:
    """One instruction with an input that may be empty, the wanted output, its category and its split."""

    instruction: str
    input: str
    output: str
    category: str
    split: str


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of `languages.tsv`: language code, script, number, text. Equal numbers say the same."""

    language: str
    script: str
    number: int
    text: str


@dataclass(frozen=True)
class Question:
    """One question with four answers, the index of the only right one (0 to 3), and its category.

    An answer reads on after "Answer:": short, without end punctuation, no capital unless it is a name.
    """

    question: str
    answers: tuple[str, str, str, str]
    correct: int
    category: str


@dataclass(frozen=True)
class ReadingQuestion:
    """One question on a bundled story, and where the story answers it.

    Attributes:
        question: Understandable without the passage.
        answers: Versions of one span of the evidence, such as "ninety-four" and "ninety-four stairs"; none if the story
            has no answer.
        story: The story's title.
        evidence: A quotation, once in the story: what holds the answer, or what looks as if it did.
        kind: "near" shares words with the evidence, "far" asks in other words, "none" has no answer.
        second: What a second reader answered who had not seen the first answers; "" for no answer.
    """

    question: str
    answers: tuple[str, ...]
    story: str
    evidence: str
    kind: str
    second: str


@dataclass(frozen=True)
class UnansweredQuestion:
    """One question that has no answer, why not, and its kind: `invented`, `presupposition` or `unknowable`."""

    question: str
    why: str
    kind: str


@dataclass(frozen=True)
class FilterText:
    """One text that a content filter should block or allow.

    Attributes:
        text: What somebody, or a model, writes.
        label: `block` or `allow`.
        category: Of `block`: insult, threat, self_harm, danger, scam, adult. Of `allow`: everyday, odd (it looks
            disguised and is not), same_words (words of the others, used harmlessly), victim (somebody tells what was
            done to them), safety (safety, health, law, history).
        kind: plain, hard, odd, and of disguised texts lookalike or spaced.
        origin: `first` to `fourth`: which author wrote it.
        split: `train`; `test`, by which the first filter was judged; `fresh`, written afterwards by others.
    """

    text: str
    label: str
    category: str
    kind: str
    origin: str
    split: str


@dataclass(frozen=True)
class FilterLesson:
    """One text that a content filter learns from: its author, label (`block` or `allow`), category, and the text."""

    origin: str
    label: str
    category: str
    text: str


@dataclass(frozen=True)
class LabeledSpans:
    """One line, the places of personal data in it as (start, end, kind), and where the line comes from.

    `origin` is "written" by hand or "generated" from patterns; `kind` is `plain`, `hard` or `none`.
    """

    text: str
    spans: tuple[tuple[int, int, str], ...]
    origin: str
    kind: str
    split: str


def stories_text() -> str:
    """Return the whole of `stories.txt` as one string (about 100 KB, UTF-8 text with LF line ends)."""
    return (DATA / "stories.txt").read_text(encoding="utf-8")


def load_stories(split: str | None = None) -> list[Story]:
    """Return the short stories of one split (`train`, `validation` or `test`), or all of them.

    Stories stand apart by three empty lines; the first line of each is its title. The last story is the test
    split, the one before it the validation split.
    """
    parts = [part.strip().split("\n\n", 1) for part in stories_text().split("\n\n\n\n")]
    splits = ["train"] * (len(parts) - 2) + ["validation", "test"]
    stories = [Story(title, text, name) for (title, text), name in zip(parts, splits, strict=True)]
    return _of_split(stories, split)


def load_sms(split: str | None = None) -> list[LabeledText]:
    """Return text messages labelled `ham` or `spam` of one split, or all of them."""
    return _of_split(_labeled("sms.tsv"), split)


def load_reviews(split: str | None = None, language: str = "en") -> list[LabeledText]:
    """Return short reviews labelled `positive` or `negative` of one split, or all of them.

    The Chinese ones (`zh`) are no translations of the English ones. Raises ValueError for another split or language.
    """
    check_choice("language", language, ("en", "zh"))
    return _of_split(_labeled("reviews.tsv" if language == "en" else "reviews_zh.tsv"), split)


def load_second_labels() -> list[SecondLabel]:
    """Return a second reader's label of each English review, in the order of `load_reviews()`."""
    rows = _rows("reviews_second.tsv")
    return [SecondLabel(int(row["number"]), row["label"], row["sure"] == "yes") for row in rows]


def load_anger_labels() -> list[AngerLabels]:
    """Return whether the writers of 120 negative English reviews are angry, as four readers see it."""
    return [
        AngerLabels(
            int(row["number"]),
            (row["free_calm"] == "yes", row["free_keen"] == "yes"),
            (row["guided_calm"] == "yes", row["guided_keen"] == "yes"),
        )
        for row in _rows("reviews_anger.tsv")
    ]


def load_synonyms() -> dict[str, tuple[str, ...]]:
    """Return words that are frequent in reviews, each with others that may stand in its place."""
    return {row["word"]: tuple(row["synonyms"].split()) for row in _rows("synonyms.tsv")}


def load_instructions(split: str | None = None) -> list[Instruction]:
    """Return instruction entries of one split, or all of them."""
    entries = json.loads((DATA / "instructions.json").read_text(encoding="utf-8"))
    return _of_split([Instruction(**entry) for entry in entries], split)


def load_personal_data(split: str) -> list[LabeledSpans]:
    """Return the lines in which personal data is labelled: `development`, for writing rules, or `test`, to judge them.

    No datum in them is a real person's.
    """
    check_choice("split", split, ("development", "test"))
    lines = (DATA / "pii_lines.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for entry in map(json.loads, lines):
        spans = tuple((start, end, kind) for start, end, kind in entry["spans"])
        found.append(LabeledSpans(**{**entry, "spans": spans}))
    return [line for line in found if line.split == split]


def load_questions(category: str | None = None) -> list[Question]:
    """Return the general-knowledge questions of one category (`geography`, `history` ...), or all of them.

    Raises:
        ValueError: No question is of this category.
    """
    entries = json.loads((DATA / "questions.json").read_text(encoding="utf-8"))
    questions = [Question(**{**entry, "answers": tuple(entry["answers"])}) for entry in entries]
    known = sorted({question.category for question in questions})
    if category is not None:
        check_choice("category", category, known)
    return [question for question in questions if category in (None, question.category)]


def load_reading_questions(kind: str | None = None) -> list[ReadingQuestion]:
    """Return the questions on the bundled stories of one kind (`near`, `far`, `none`), or all of them.

    Raises:
        ValueError: There is no such kind.
    """
    if kind is not None:
        check_choice("kind", kind, ("near", "far", "none"))
    entries = json.loads((DATA / "reading_questions.json").read_text(encoding="utf-8"))
    questions = [ReadingQuestion(**{**entry, "answers": tuple(entry["answers"])}) for entry in entries]
    return [question for question in questions if kind in (None, question.kind)]


def load_unanswerable(kind: str | None = None) -> list[UnansweredQuestion]:
    """Return the questions without an answer of one kind (`invented` ...), or all of them.

    Raises:
        ValueError: No question is of this kind.
    """
    entries = json.loads((DATA / "unanswerable.json").read_text(encoding="utf-8"))
    questions = [UnansweredQuestion(**entry) for entry in entries]
    if kind is not None:
        check_choice("kind", kind, sorted({question.kind for question in questions}))
    return [question for question in questions if kind in (None, question.kind)]


def load_filter_texts(split: str | None = None) -> list[FilterText]:
    """Return the texts that a content filter is judged by, of one split (`train`, `test`, `fresh`), or all.

    Raises:
        ValueError: There is no such split.
    """
    if split is not None:
        check_choice("split", split, ("train", "test", "fresh"))
    rows = [FilterText(**row) for row in _rows("filter_texts.tsv")]
    return [row for row in rows if split in (None, row.split)]


def load_filter_lessons() -> list[FilterLesson]:
    """Return the texts that a filter learns from; none of them is judged by.

    Those of the origin `rules` are by the author of the filter's rules, the others by eight authors who saw neither
    rules nor any other text.
    """
    return [FilterLesson(**row) for row in _rows("filter_lessons.tsv")]


def load_languages(language: str | None = None) -> list[Paragraph]:
    r"""Return the paragraphs of one language (`en`, `zh`, `code` ...), or all of them.

    In the file a line break, a tab and a backslash inside a text are written `\n`, `\t` and `\\`.

    Raises:
        ValueError: No paragraph is in this language.
    """
    rows = [
        Paragraph(row["language"], row["script"], int(row["paragraph"]), _unescape(row["text"]))
        for row in _rows("languages.tsv")
    ]
    known = sorted({row.language for row in rows})
    if language is not None:
        check_choice("language", language, known)
    return [row for row in rows if language in (None, row.language)]


def _rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _labeled(name: str) -> list[LabeledText]:
    return [LabeledText(row["text"], row["label"], row["kind"], row["split"]) for row in _rows(name)]


def _of_split(rows: list, split: str | None) -> list:
    if split is not None:
        check_choice("split", split, SPLITS)
    return [row for row in rows if split in (None, row.split)]


def _unescape(text: str) -> str:
    return text.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\")
