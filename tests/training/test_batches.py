"""`shared.training.batches`: nothing is lost or doubled on the way from documents to batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.training.batches import IGNORE, document_row, pad_rows, row_batches, shuffled_rows

ROWS = st.lists(st.lists(st.integers(0, 19), min_size=2, max_size=9), min_size=1, max_size=20)


def test_document_row_of_a_story():
    encoding = tale_encoding()
    story = TaleGenerator(0).sample().text
    row = document_row(story, encoding)
    assert row[0] == row[-1] == encoding.eot_token
    assert encoding.decode(row[1:-1]) == story
    assert document_row("<|endoftext|>", encoding).count(encoding.eot_token) == 2  # a name is no token


@given(ROWS)
def test_padding_loses_nothing(rows):
    inputs, targets = pad_rows(rows)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (len(rows), max(map(len, rows)) - 1)
    for row, source, target in zip(rows, inputs.tolist(), targets.tolist(), strict=True):
        n = len(row) - 1
        assert source[:n] == row[:-1] and target[:n] == row[1:]
        assert set(target[n:]) <= {IGNORE}


@pytest.mark.parametrize("rows", [[], [[1]], [[1, 2], []]])
def test_padding_refuses_rows_without_a_target(rows):
    with pytest.raises(ValueError, match="rows must be"):
        pad_rows(rows)


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, batch_size=st.integers(1, 5), pool=st.integers(1, 4), seed=st.integers(0, 3))
def test_batches_hold_every_row_once(rows, batch_size, pool, seed):
    batches = list(row_batches(rows, batch_size, pool=pool, seed=seed))
    assert all(len(inputs) <= batch_size for inputs, _ in batches)
    assert len(batches) == math.ceil(len(rows) / batch_size)
    found = []
    for inputs, targets in batches:
        for source, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            n = sum(id != IGNORE for id in target)
            found.append([source[0], *target[:n]])
    assert sorted(found) == sorted(map(list, rows))
    again = list(row_batches(rows, batch_size, pool=pool, seed=seed))
    assert all(
        torch.equal(a, b)
        for one, two in zip(batches, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_batches_of_similar_length_hold_little_padding_and_read_a_stream_lazily():
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 100, (256,), generator=rng).tolist()
    rows = [[1] * length for length in lengths]
    share = lambda batches: (
        sum((t == IGNORE).sum().item() for _, t in batches) / sum(t.numel() for _, t in batches)
    )
    assert share(list(row_batches(rows, 16, pool=16))) < 0.3 * share(list(row_batches(rows, 16, pool=1)))
    endless = iter(lambda: [1, 2], None)
    assert next(row_batches(endless, 4))[0].shape == (4, 1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        row_batches(rows, 0)


def test_shuffled_rows_are_a_new_permutation_in_each_epoch():
    rows = [[i] for i in range(50)]
    drawn = list(shuffled_rows(rows, seed=1, epochs=2))
    first, second = drawn[:50], drawn[50:]
    assert sorted(first) == sorted(second) == rows and first != second != rows
    assert list(shuffled_rows(rows, seed=1, epochs=2)) == drawn != list(shuffled_rows(rows, seed=2, epochs=2))
    assert list(shuffled_rows([])) == []


def test_rows_may_come_from_an_iterator_or_an_array():
    rows = [[1, 2, 3], [4, 5]]
    for found, expected in zip(pad_rows(iter(rows)), pad_rows(rows), strict=True):
        assert torch.equal(found, expected)
    array = np.arange(6).reshape(2, 3)
    assert sorted(row.tolist() for row in shuffled_rows(array, epochs=1)) == array.tolist()
