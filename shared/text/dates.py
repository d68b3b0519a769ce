"""Dates as people write them, to be translated into ISO form: any number of examples, one right answer each.

The input holds one or several dates, each in one of eight forms; the output holds their ISO forms in
order. Convention: day/month/year, two-digit years are 2000 to 2099. Only days that exist are made. Texts
are sequences of characters, and one vocabulary serves input and output.

Leaves out: other languages, times, weekdays, relative dates such as "tomorrow", spelling mistakes.
Follows the exercise that became common for attention after Bahdanau, Cho and Bengio (2015).

Explained and proven in ch03_attention/01_seq2seq.ipynb; written from there by `make promote`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import torch
from torch import Tensor

from shared.checks import check_between, check_choice, check_sizes

FIRST_DAY, LAST_DAY = date(2000, 1, 1), date(2099, 12, 31)
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
FORMS = (
    "the {ordinal} of {month}, {year}",
    "{month} {day}, {year}",
    "{day} {month} {year}",
    "{day} {month:.3} {year}",
    "{month:.3} {day} {short_year}",
    "{day:02}/{month_number:02}/{year}",
    "{day}/{month_number}/{short_year}",
    "{day}.{month_number}.{year}",
)
SEPARATOR = "; "  # between the dates of an input
MAX_DATES = 8  # in one text


def write_date(day: date, form: str) -> str:
    """Return the day as a person would write it.

    Args:
        day: From `FIRST_DAY` to `LAST_DAY`.
        form: One of `FORMS`.

    Raises:
        ValueError: The day is outside the century, or the form is unknown.
    """
    if not FIRST_DAY <= day <= LAST_DAY:
        raise ValueError(f"day must be between {FIRST_DAY} and {LAST_DAY}, got {day}")
    check_choice("form", form, FORMS)
    # 11th, 12th and 13th are the exceptions to 1st, 2nd and 3rd.
    suffix = "th" if day.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return form.format(
        day=day.day,
        ordinal=f"{day.day}{suffix}",
        month=MONTHS[day.month - 1],
        month_number=day.month,
        year=day.year,
        short_year=f"{day.year % 100:02}",
    )


def split_days(validation_share: float = 0.1, seed: int = 0) -> tuple[list[date], list[date]]:
    """Return the days of the century in two disjoint sorted lists, for training and for validation.

    Args:
        validation_share: The share of days kept for validation, more than 0 and less than 1.
        seed: The same seed gives the same split in every Python version.

    Raises:
        ValueError: The share is not between 0 and 1, or leaves one of the lists empty.
    """
    days = [FIRST_DAY + timedelta(number) for number in range((LAST_DAY - FIRST_DAY).days + 1)]
    n_validation = round(validation_share * len(days)) if 0 < validation_share < 1 else 0
    if not 0 < n_validation < len(days):
        raise ValueError(f"validation_share must leave days for both parts, got {validation_share}")
    # Only random() is used: the other methods of Random may change between Python versions.
    draw = random.Random(seed).random
    shuffled = [day for _, day in sorted((draw(), day) for day in days)]
    return sorted(shuffled[n_validation:]), sorted(shuffled[:n_validation])


CHARACTERS = (
    " ,-./0123456789;ADFJMNOSabcdefghilmnoprstuvy"  # those that dates are written with, and no others
)
PAD_ID, START_ID, END_ID = 0, 1, 2
FIRST_CHARACTER_ID = 3
VOCAB_SIZE = FIRST_CHARACTER_ID + len(CHARACTERS)
MAX_LENGTH = 256  # characters of one text


def text_to_ids(text: str) -> list[int]:
    """Return one id for each character of a text.

    Raises:
        ValueError: The text is empty, has more than `MAX_LENGTH` characters or some outside `CHARACTERS`.
    """
    if not 0 < len(text) <= MAX_LENGTH:
        raise ValueError(f"text must have 1 to {MAX_LENGTH} characters, got {len(text)}")
    if unknown := sorted(set(text) - set(CHARACTERS)):
        raise ValueError(f"text must hold only CHARACTERS, got {unknown} in {text!r}")
    return [FIRST_CHARACTER_ID + CHARACTERS.index(character) for character in text]


def ids_to_text(ids: Sequence[int]) -> str:
    """Return the text of ids up to the first end or padding; a start at the beginning is skipped.

    Raises:
        ValueError: An id is not in the vocabulary, or a start stands after the beginning.
    """
    characters = []
    for position, number in enumerate(map(int, ids)):
        if number in (END_ID, PAD_ID):
            break
        if number == START_ID and position == 0:
            continue
        if not FIRST_CHARACTER_ID <= number < VOCAB_SIZE:
            raise ValueError(f"id {number} at position {position} is not a character's id")
        characters.append(CHARACTERS[number - FIRST_CHARACTER_ID])
    return "".join(characters)


def encode_sources(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return inputs as ids (B, S), padded on the right, and a mask (B, S) that is True at real characters.

    Raises:
        ValueError: There is no text, or `text_to_ids` refuses one.
    """
    source_ids = _pad([text_to_ids(text) for text in texts])
    return source_ids, source_ids != PAD_ID


def encode_targets(texts: Sequence[str]) -> Tensor:
    """Return outputs as ids (B, T): start, the characters, end, then padding.

    Raises:
        ValueError: There is no text, or `text_to_ids` refuses one.
    """
    return _pad([[START_ID, *text_to_ids(text), END_ID] for text in texts])


def _pad(rows: list[list[int]]) -> Tensor:
    if not rows:
        raise ValueError("texts is empty; at least one text is needed")
    length = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])


@dataclass(frozen=True)
class DateBatch:
    """A batch of examples, as tensors and as texts.

    Attributes:
        source_ids: Inputs (B, S), padded with `PAD_ID`.
        source_mask: True at real characters (B, S).
        target_ids: Outputs (B, T) from `START_ID` to `END_ID`, padded with `PAD_ID`.
        sources: The inputs as texts.
        targets: The outputs as texts.
    """

    source_ids: Tensor
    source_mask: Tensor
    target_ids: Tensor
    sources: tuple[str, ...]
    targets: tuple[str, ...]


class DateGenerator:
    """A reproducible source of examples: the same days and seed give the same examples everywhere.

    Args:
        days: The days to draw from, one of the two lists of `split_days`.
        seed: Start of the random numbers.

    Raises:
        ValueError: There are no days.
    """

    def __init__(self, days: Sequence[date], seed: int = 0) -> None:
        if not days:
            raise ValueError("days is empty; at least one day is needed")
        self._days = list(days)
        self._random = random.Random(seed).random

    def pair(self, n_dates: int = 1) -> tuple[str, str]:
        """Return an input with `n_dates` dates and the wanted output.

        Raises:
            ValueError: `n_dates` is not 1 to `MAX_DATES`.
        """
        check_between("n_dates", n_dates, 1, MAX_DATES)
        days = [self._draw(self._days) for _ in range(n_dates)]
        source = SEPARATOR.join(write_date(day, self._draw(FORMS)) for day in days)
        return source, " ".join(day.isoformat() for day in days)

    def batch(self, batch_size: int, n_dates: int = 1) -> DateBatch:
        """Return `batch_size` examples of `n_dates` dates each.

        Raises:
            ValueError: `batch_size` is less than 1, or `n_dates` is not 1 to `MAX_DATES`.
        """
        check_sizes(batch_size=batch_size)
        sources, targets = zip(*(self.pair(n_dates) for _ in range(batch_size)), strict=True)
        return DateBatch(*encode_sources(sources), encode_targets(targets), sources, targets)

    def _draw(self, choices: Sequence) -> object:
        return choices[int(self._random() * len(choices))]
