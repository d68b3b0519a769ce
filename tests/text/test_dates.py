"""The date-translation task: forms, split, vocabulary, batches; the oracle is a parser written from the convention."""

import re
from datetime import date

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.text.dates import (
    CHARACTERS,
    END_ID,
    FIRST_DAY,
    FORMS,
    LAST_DAY,
    MAX_DATES,
    MAX_LENGTH,
    PAD_ID,
    START_ID,
    VOCAB_SIZE,
    DateGenerator,
    encode_sources,
    encode_targets,
    ids_to_text,
    split_days,
    text_to_ids,
    write_date,
)

MONTH_NAMES = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
YEAR = r"(?P<year>\d{4}|\d\d)"
PATTERNS = [
    rf"the (?P<day>\d+)(st|nd|rd|th) of (?P<name>[A-Z][a-z]+), {YEAR}",
    rf"(?P<name>[A-Z][a-z]+) (?P<day>\d+),? {YEAR}",
    rf"(?P<day>\d+) (?P<name>[A-Z][a-z]+) {YEAR}",
    rf"(?P<day>\d+)[/.](?P<month>\d+)[/.]{YEAR}",
]
DAYS = st.dates(FIRST_DAY, LAST_DAY)


def parse(text: str) -> date:
    """Read one date by the stated convention: day before month in figures, two-digit years from 2000."""
    match = next(m for pattern in PATTERNS if (m := re.fullmatch(pattern, text)))
    groups = match.groupdict()
    month = int(groups["month"]) if "month" in groups else 1 + MONTH_NAMES.index(groups["name"][:3].lower())
    year = int(groups["year"])
    return date(year + 2000 if year < 100 else year, month, int(groups["day"]))


@given(DAYS, st.sampled_from(FORMS))
def test_every_form_of_every_day_is_read_back_by_the_oracle(day, form):
    assert parse(write_date(day, form)) == day


def test_the_task_is_unambiguous_so_that_all_of_it_can_be_right():
    generator = DateGenerator(split_days()[1], seed=2)
    for _ in range(300):
        source, target = generator.pair(3)
        assert " ".join(parse(part).isoformat() for part in source.split("; ")) == target


def test_no_text_stands_for_two_days():
    written = {}
    for day in (day for part in split_days() for day in part if day.year in (2001, 2010, 2012, 2031)):
        for form in FORMS:
            assert written.setdefault(write_date(day, form), day) == day


def test_known_examples_of_the_convention():
    assert [write_date(date(2026, 11, 3), form) for form in FORMS] == [
        "the 3rd of November, 2026",
        "November 3, 2026",
        "3 November 2026",
        "3 Nov 2026",
        "Nov 3 26",
        "03/11/2026",
        "3/11/26",
        "3.11.2026",
    ]


@pytest.mark.parametrize(
    ("day", "ordinal"),
    [
        (1, "1st"),
        (2, "2nd"),
        (3, "3rd"),
        (4, "4th"),
        (11, "11th"),
        (12, "12th"),
        (13, "13th"),
        (21, "21st"),
        (22, "22nd"),
        (23, "23rd"),
        (30, "30th"),
        (31, "31st"),
    ],
)
def test_ordinals(day, ordinal):
    assert write_date(date(2020, 1, day), FORMS[0]) == f"the {ordinal} of January, 2020"


def test_split_is_disjoint_complete_and_reproducible():
    training, validation = split_days(0.1, seed=3)
    assert not set(training) & set(validation)
    assert len(training) + len(validation) == (LAST_DAY - FIRST_DAY).days + 1 == 36525
    assert len(validation) == 3652 and min(*training, *validation) == FIRST_DAY
    assert (training, validation) == split_days(0.1, seed=3) != split_days(0.1, seed=4)


def test_validation_days_never_occur_in_training_examples():
    training, validation = split_days()
    held_out = {day.isoformat() for day in validation}
    generator = DateGenerator(training, seed=0)
    seen = {iso for _ in range(2000) for iso in generator.pair(2)[1].split()}
    assert not seen & held_out


def test_characters_are_exactly_those_in_use():
    used = set("; -")
    for day in (date(2000 + n, month, n % 28 + 1) for n in range(100) for month in range(1, 13)):
        used |= {character for form in FORMS for character in write_date(day, form)}
    assert used == set(CHARACTERS) and len(CHARACTERS) == len(used)


@given(st.text(CHARACTERS, min_size=1, max_size=MAX_LENGTH))
def test_ids_and_text_round_trip(text):
    ids = text_to_ids(text)
    assert ids_to_text(ids) == text == ids_to_text([START_ID, *ids, END_ID, PAD_ID, PAD_ID])
    assert all(max(PAD_ID, START_ID, END_ID) < i < VOCAB_SIZE for i in ids)


def test_batch_has_the_stated_shapes_padding_and_texts():
    batch = DateGenerator(split_days()[0], seed=1).batch(16, n_dates=3)
    assert batch.source_ids.shape == batch.source_mask.shape == (16, max(map(len, batch.sources)))
    assert batch.target_ids.shape == (16, 1 + 3 * 11)
    assert batch.source_mask.sum(1).tolist() == [len(text) for text in batch.sources]
    assert torch.equal(batch.source_mask, batch.source_ids != PAD_ID)
    assert [ids_to_text(row) for row in batch.source_ids] == list(batch.sources)
    assert [ids_to_text(row) for row in batch.target_ids] == list(batch.targets)
    assert (batch.target_ids[:, 0] == START_ID).all() and (batch.target_ids[:, -1] == END_ID).all()


def test_same_seed_same_examples_other_seed_others():
    days = split_days()[0]
    first, again, other = (DateGenerator(days, seed).batch(8, 2) for seed in (5, 5, 6))
    assert first.sources == again.sources != other.sources


def test_targets_of_different_lengths_are_padded_after_the_end():
    ids = encode_targets(["2026-11-03", "2026-11-03 2027-01-01"])
    assert ids[0, 11] == END_ID and (ids[0, 12:] == PAD_ID).all()


def test_longest_input_is_within_the_limit():
    longest = max(len(write_date(date(2020, month, 22), form)) for month in range(1, 13) for form in FORMS)
    assert MAX_DATES * (longest + 2) <= MAX_LENGTH


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: write_date(date(1999, 12, 31), FORMS[0]), "1999-12-31"),
        (lambda: write_date(date(2020, 1, 1), "{year}"), "got '{year}'"),
        (lambda: split_days(0.0), "validation_share .* got 0.0"),
        (lambda: split_days(1.5), "validation_share .* got 1.5"),
        (lambda: split_days(float("nan")), "validation_share .* got nan"),
        (lambda: split_days(1e-9), "validation_share .* got 1e-09"),
        (lambda: text_to_ids(""), "characters, got 0"),
        (lambda: text_to_ids("1" * (MAX_LENGTH + 1)), f"characters, got {MAX_LENGTH + 1}"),
        (lambda: text_to_ids("3 März 2026"), "ä"),
        (lambda: encode_sources([]), "texts is empty"),
        (lambda: encode_sources(["1.1.2020", ""]), "characters, got 0"),
        (lambda: encode_targets(["2020?"]), "\\?"),
        (lambda: ids_to_text([VOCAB_SIZE]), f"id {VOCAB_SIZE} at position 0"),
        (lambda: ids_to_text([5, START_ID]), "position 1"),
        (lambda: ids_to_text([-1]), "id -1"),
        (lambda: DateGenerator([]), "days is empty"),
        (lambda: DateGenerator([FIRST_DAY]).pair(0), "n_dates must be between 1 and .* got 0"),
        (
            lambda: DateGenerator([FIRST_DAY]).pair(MAX_DATES + 1),
            f"n_dates must be between 1 and {MAX_DATES}, got {MAX_DATES + 1}",
        ),
        (lambda: DateGenerator([FIRST_DAY]).batch(0), "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
