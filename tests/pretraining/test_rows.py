"""`shared.pretraining.rows`: batches as a function of their number alone, rows against plain slicing."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.pretraining.rows import DocumentRows, WindowRows
from shared.text.dataset import write_token_file
from shared.training.batches import IGNORE

END = 99


@pytest.fixture
def documents() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 90, size=n).tolist() for n in generator.integers(1, 30, size=50)]


@pytest.fixture
def shards(documents, tmp_path):
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path, part in zip(paths, (documents[:20], documents[20:]), strict=True):
        write_token_file(path, [[*document, END] for document in part], 100)
    return paths


def test_rows_of_documents_equal_plain_slicing(documents, shards):
    rows = DocumentRows(shards, 16, 4, END)
    assert len(rows) == 50
    for chosen in ([0], [19, 20], [49, 3, 20, 7]):
        inputs, targets = rows.tensors(chosen)
        whole = [[END, *documents[i], END][:17] for i in chosen]
        assert inputs.shape == targets.shape == (len(chosen), max(map(len, whole)) - 1)
        for row, ins, outs in zip(whole, inputs.tolist(), targets.tolist(), strict=True):
            n = len(row) - 1
            assert ins[:n] == row[:-1] and outs[:n] == row[1:]
            assert set(ins[n:]) <= {END} and set(outs[n:]) <= {IGNORE}
        assert rows.n_targets(chosen) == int((targets != IGNORE).sum())


@pytest.mark.parametrize("pool", [1, 3, 100])
def test_an_epoch_uses_every_document_at_most_once_in_an_order_of_its_own(pool, shards):
    rows = DocumentRows(shards, 16, 4, END, seed=3, pool=pool)
    epochs = [[rows.batch(12 * epoch + k) for k in range(12)] for epoch in range(2)]
    for epoch in epochs:
        flat = list(chain(*epoch))
        assert len(flat) == len(set(flat)) == 48
    assert epochs[0] != epochs[1]
    again = DocumentRows(shards, 16, 4, END, seed=3, pool=pool)
    assert again.batch(17) == epochs[1][5] and again.batch(2) == epochs[0][2]  # from the number alone
    assert DocumentRows(shards, 16, 4, END, seed=4, pool=pool).batch(2) != epochs[0][2]


def test_a_pool_leaves_less_padding(shards):
    def padding(pool: int) -> int:
        rows = DocumentRows(shards, 40, 4, END, pool=pool)
        return sum(int((rows.tensors(rows.batch(k))[1] == IGNORE).sum()) for k in range(12))

    assert padding(12) < padding(1) / 2


@settings(deadline=None, max_examples=30)
@given(number=st.integers(0, 500), parts=st.sampled_from([2, 4]))
def test_the_slices_of_several_processes_make_up_the_batch(number, parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "a.npy"
    write_token_file(path, [np.append(np.arange(n) % 50, END) for n in range(1, 30)], 100)
    rows = DocumentRows([path], 64, 8, END, pool=2)
    batch = rows.batch(number)
    size = 8 // parts
    slices = [batch[i * size : (i + 1) * size] for i in range(parts)]
    assert list(chain(*slices)) == batch
    assert sum(rows.n_targets(part) for part in slices) == rows.n_targets(batch)


def test_windows_are_those_of_the_stream_and_short_shards_are_left_out(tmp_path):
    paths = [tmp_path / f"{name}.npy" for name in "abc"]
    for path, n in zip(paths, (41, 5, 23), strict=True):
        write_token_file(path, [np.arange(n)], 100)
    rows = WindowRows(paths, 10, 2, seed=1)
    assert len(rows) == 4 + 2 and rows.skipped == [paths[1]] and rows.n_targets([0, 5]) == 20
    inputs, targets = rows.tensors([1, 4])
    assert torch.equal(inputs, torch.stack([torch.arange(10, 20), torch.arange(10)]))
    assert torch.equal(targets, inputs + 1)
    assert sorted(chain(*(rows.batch(k) for k in range(3)))) == list(range(6))
    assert WindowRows(paths, 10, 2, seed=1).batch(7) == rows.batch(7)


def test_a_partial_last_window_gives_every_token_a_place(tmp_path):
    paths = [tmp_path / f"{name}.npy" for name in "abc"]
    for path, n in zip(paths, (41, 2, 25), strict=True):
        write_token_file(path, [np.arange(n)], 100)
    rows = WindowRows(paths, 10, 1, partial=True)
    assert len(rows) == 4 + 1 + 3 and rows.skipped == [] and rows.n_targets(range(8)) == 40 + 1 + 24
    inputs, targets = rows.tensors([6, 7])
    assert inputs.tolist() == [[*range(10, 20)], [20, 21, 22, 23] + [0] * 6]
    assert targets.tolist() == [[*range(11, 21)], [21, 22, 23, 24] + [IGNORE] * 6]
    assert [len(rows.tensors([row])[0][0]) for row in range(8)] == [10] * 4 + [1, 10, 10, 4]


@pytest.mark.parametrize(("context", "batch_size"), [(5, 3), (10, 4), (17, 1), (1, 7)])
@pytest.mark.parametrize("partial", [False, True])
def test_the_usage_of_windows_is_what_an_epoch_holds(context, batch_size, partial, tmp_path):
    paths = [tmp_path / f"{name}.npy" for name in "abcd"]
    for path, n in zip(paths, (61, 5, 1, 44), strict=True):
        write_token_file(path, [np.arange(n)], 100)
    rows = WindowRows(paths, context, batch_size, partial=partial)
    usage = rows.usage()
    assert usage.tokens == 111 and all(usage.lost.values())
    if not partial:
        n_batches = len(rows) // batch_size
        seen = sum(int((rows.tensors(rows.batch(k))[1] != IGNORE).sum()) for k in range(n_batches))
        assert usage.used == seen
    elif batch_size == 1:
        assert usage.used == sum(int((rows.tensors([k])[1] != IGNORE).sum()) for k in range(len(rows)))
        assert usage.used == 60 + 4 + 43


def test_the_usage_of_documents_is_what_an_epoch_holds(documents, shards):
    usage = DocumentRows(shards, 16, 5, END).usage()
    lengths = [len(document) + 1 for document in documents]
    assert usage.tokens == sum(lengths) and usage.used == sum(min(n, 16) for n in lengths)
    [(where, lost)] = usage.lost.items()
    n_longer = sum(n > 16 for n in lengths)
    assert where == f"behind the first 16 tokens of {n_longer} documents"
    assert str(usage) == (
        f"{usage.used} of {usage.tokens} tokens are used ({100 * usage.used / usage.tokens:.3g} %), in 50 documents; "
        f"{lost} lost {where}"
    )
    # Of 50 documents 48 fill batches of 4: an epoch without any 2 of them, on average.
    rows = DocumentRows(shards, 16, 4, END)
    seen = [sum(rows.n_targets(rows.batch(12 * epoch + k)) for k in range(12)) for epoch in range(400)]
    assert rows.usage().used == pytest.approx(np.mean(seen), rel=0.005)
    assert DocumentRows(shards, 40, 5, END).usage().lost == {}


def test_bad_input(shards, tmp_path):
    with pytest.raises(ValueError, match="batch_size is 51, but the data have only 50 rows"):
        DocumentRows(shards, 16, 51, END)
    with pytest.raises(ValueError, match="pool must be at least 1, got 0"):
        DocumentRows(shards, 16, 4, END, pool=0)
    with pytest.raises(ValueError, match=r"a\.npy does not end with the end token 98"):
        DocumentRows(shards, 16, 4, 98)
    with pytest.raises(
        ValueError, match="context_length is 5000, but the longest shard of the text has only 400 tokens"
    ):
        WindowRows(shards, 5000, 1)
