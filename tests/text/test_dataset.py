"""`text.dataset`: windows, documents, splits, token files and orders, against torch, numpy and plain enumeration."""

import copy
import os
import pickle
import threading
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from shared.text.dataset import (
    ResumableSampler,
    TokenDataset,
    TokenShards,
    count_windows,
    create_dataloader,
    encode_documents,
    join_documents,
    ngram_overlap,
    open_token_file,
    sample_batch,
    split_documents,
    write_token_file,
)

IDS = np.random.default_rng(0).integers(0, 500, size=700)
END = 999

lengths = st.integers(1, 12)
few_ids = st.lists(st.integers(0, 60_000), min_size=2, max_size=60)


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


def stacked(dataset) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [dataset[i] for i in range(len(dataset))]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


# ---- windows


@settings(deadline=None)
@given(n=st.integers(0, 80), context_length=lengths, stride=lengths)
def test_number_of_windows_equals_enumeration(n, context_length, stride):
    starts = [start for start in range(0, n, stride) if start + context_length < n]
    assert count_windows(n, context_length, stride) == len(starts)


@settings(deadline=None)
@given(ids=few_ids, context_length=lengths, stride=lengths)
def test_windows_equal_unfold_and_sliding_window_view(ids, context_length, stride):
    if len(ids) <= context_length:
        with pytest.raises(ValueError, match="ids holds"):
            TokenDataset(ids, context_length, stride)
        return
    inputs, targets = stacked(TokenDataset(ids, context_length, stride))
    unfolded = torch.tensor(ids).unfold(0, context_length + 1, stride)
    viewed = sliding_window_view(np.array(ids), context_length + 1)[::stride]
    assert torch.equal(inputs, unfolded[:, :-1])
    assert torch.equal(targets, unfolded[:, 1:])
    assert np.array_equal(targets, viewed[:, 1:])


@settings(deadline=None)
@given(n=st.integers(2, 80), context_length=lengths)
def test_with_stride_equal_to_the_context_each_token_is_a_target_once(n, context_length):
    if n <= context_length:
        return
    _, targets = stacked(TokenDataset(np.arange(n), context_length))
    reached = targets.flatten().tolist()
    assert reached == list(range(1, len(reached) + 1))
    assert n - 1 - len(reached) < context_length


@pytest.mark.parametrize(
    "stored",
    [
        IDS.tolist(),
        tuple(IDS.tolist()),
        IDS.astype(np.uint16),
        IDS.astype(np.uint32),
        IDS.astype(np.int32),
        IDS.astype(">i4"),
        np.repeat(IDS, 2)[::2],
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
    ],
    ids=["list", "tuple", "uint16", "uint32", "int32", "big-endian", "strided", "tensor", "int32 tensor"],
)
def test_every_kind_of_sequence_gives_the_same_int64_windows(stored):
    inputs, targets = stacked(TokenDataset(stored, 16, 7))
    rows = torch.tensor(IDS).unfold(0, 17, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, rows[:, :-1]) and torch.equal(targets, rows[:, 1:])


def test_a_data_set_is_indexed_and_iterated_like_a_list():
    dataset = TokenDataset(IDS, 16)
    assert torch.equal(dataset[-1][0], dataset[len(dataset) - 1][0])
    assert torch.equal(dataset[np.int64(3)][1], dataset[3][1])
    assert len(list(dataset)) == len(dataset)
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]


def test_changing_a_window_changes_neither_its_targets_nor_the_text():
    ids = IDS.copy()
    inputs, targets = TokenDataset(ids, 16)[0]
    inputs.fill_(-1)
    assert np.array_equal(ids, IDS)
    assert targets.tolist() == IDS[1:17].tolist()


def test_ids_are_not_copied():
    assert np.shares_memory(TokenDataset(IDS, 4).ids, IDS)
    tensor = torch.tensor(IDS)
    assert TokenDataset(tensor, 4).ids.ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, 2, 3, 4], ValueError, "ids holds 4 tokens; context_length 4 needs at least 5"),
        ([], ValueError, "ids holds 0 tokens"),
        ("text", TypeError, "ids is text"),
        ([1.0, 2.0], TypeError, "ids holds float64"),
        (np.ones(9, dtype=bool), TypeError, "ids holds bool"),
        (["a", "b"], TypeError, "integers are needed"),
        (np.ones((3, 3), dtype=int), ValueError, r"ids has shape \(3, 3\)"),
        (torch.ones(9), TypeError, "ids holds float32"),
        (5, ValueError, r"ids has shape \(\)"),
    ],
)
def test_ids_that_are_refused(ids, error, message):
    with pytest.raises(error, match=message):
        TokenDataset(ids, 4)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("context_length", 0, ValueError),
        ("context_length", -1, ValueError),
        ("context_length", 2.0, TypeError),
        ("context_length", True, TypeError),
        ("stride", 0, ValueError),
        ("stride", "4", TypeError),
    ],
)
def test_lengths_that_are_refused_are_named(name, value, error):
    with pytest.raises(error, match=f"{name} must be .*, got {value!r}"):
        TokenDataset(IDS, **{"context_length": 4, "stride": 4, name: value})


# ---- documents


def test_each_document_is_followed_by_the_end_token():
    assert join_documents(["ab", "c"], codes, END).tolist() == [97, 98, END, 99, END]
    assert join_documents(["ab", "c"], codes, END).dtype == np.int64


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=5))
def test_documents_are_found_again_at_the_end_tokens(documents):
    end = 0x110000  # above every character
    ids = join_documents(documents, codes, end)
    parts = np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]
    assert ["".join(map(chr, part[:-1])) for part in parts] == documents
    assert np.array_equal(ids, np.concatenate(list(encode_documents(iter(documents), codes, end))))


def test_documents_are_encoded_one_at_a_time():
    def endless():
        while True:
            yield "a"

    assert next(encode_documents(endless(), codes, END)).tolist() == [97, END]


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([], ValueError, "documents is empty"),
        (["a", ""], ValueError, r"documents\[1\] has no tokens"),
        (["a", "b", chr(END)], ValueError, r"documents\[2\] contains the end token 999"),
        ("one string", TypeError, "documents must be several texts, got str"),
    ],
)
def test_documents_that_are_refused(documents, error, message):
    with pytest.raises(error, match=message):
        join_documents(documents, codes, END)


# ---- splits


@settings(deadline=None)
@given(
    documents=st.lists(st.text(max_size=3), min_size=2, max_size=30),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_split_loses_nothing_and_shares_nothing(documents, fraction, seed):
    if len(set(documents)) < 2:
        with pytest.raises(ValueError, match="1 different texts"):
            split_documents(documents, fraction, seed)
        return
    train, validation = split_documents(documents, fraction, seed)
    assert Counter(train) + Counter(validation) == Counter(documents)
    assert train and validation and not set(train) & set(validation)
    wanted = round(fraction * len(set(documents)))
    assert len(set(validation)) == min(max(1, wanted), len(set(documents)) - 1)
    # The sides do not depend on the order of the documents.
    backwards = split_documents(documents[::-1], fraction, seed)
    assert (train[::-1], validation[::-1]) == backwards


def test_split_depends_on_the_seed_and_keeps_the_order():
    documents = [f"document {n:03}" for n in range(100)]
    train, validation = split_documents(documents, 0.2, seed=1)
    assert len(validation) == 20
    assert train == sorted(train) and validation == sorted(validation)
    assert split_documents(documents, 0.2, seed=1) == (train, validation)
    assert split_documents(documents, 0.2, seed=2) != (train, validation)


def test_a_document_added_later_moves_at_most_one_other():
    documents = [f"document {n:03}" for n in range(100)]
    before = set(split_documents(documents, 0.2)[1])
    after = set(split_documents([*documents, "a new one"], 0.2)[1])
    assert len(before - after) <= 1


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fractions_that_are_refused(fraction):
    with pytest.raises(ValueError, match="validation_fraction must be above 0 and below 1, got "):
        split_documents(["a", "b"], fraction)


@pytest.mark.parametrize("kind", [iter, dict.fromkeys, lambda texts: (text for text in texts)])
def test_documents_may_come_from_an_iterator(kind):
    documents = [f"text {i}" for i in range(20)]
    assert split_documents(kind(documents), 0.3) == split_documents(documents, 0.3)


def test_one_string_is_not_a_list_of_documents():
    with pytest.raises(TypeError, match="documents must be several texts, got str"):
        split_documents("abc")


@settings(deadline=None)
@given(
    train=st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=4),
    validation=st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=4),
    n=st.integers(1, 4),
)
def test_overlap_equals_enumeration(train, validation, n):
    def grams(part):
        return [tuple(ids[i : i + n]) for ids in part for i in range(len(ids) - n + 1)]

    known, wanted = set(grams(train)), grams(validation)
    if not wanted:
        with pytest.raises(ValueError, match=f"n is {n}; no validation"):
            ngram_overlap(train, validation, n)
        return
    assert ngram_overlap(train, validation, n) == sum(gram in known for gram in wanted) / len(wanted)


def test_overlap_does_not_depend_on_how_ids_are_stored():
    parts = [IDS[:400].astype(np.uint16)], [torch.tensor(IDS[350:])]
    assert ngram_overlap(*parts, n=3) == ngram_overlap([IDS[:400].tolist()], [IDS[350:].tolist()], n=3) > 0
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        ngram_overlap(*parts, n=0)


# ---- batches


def epoch(loader) -> torch.Tensor:
    return torch.cat([torch.cat(batch, dim=1) for batch in loader])


def test_batches_equal_a_plain_loader_over_all_windows():
    rows = torch.tensor(IDS).unfold(0, 17, 5)
    plain = DataLoader(
        TensorDataset(rows[:, :-1], rows[:, 1:]),
        8,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(4),
    )
    ours = create_dataloader(IDS, 8, 16, 5, seed=4)
    assert len(ours) == len(plain)
    for epoch_number in range(2):
        for batch, reference in zip(ours, plain, strict=True):
            assert batch[0].shape == (8, 16) and batch[0].dtype == torch.int64
            assert all(map(torch.equal, batch, reference)), epoch_number


def test_order_depends_on_the_seed_alone():
    first = epoch(create_dataloader(IDS, 8, 16, seed=4))
    torch.manual_seed(99)
    np.random.default_rng().random(3)
    assert torch.equal(first, epoch(create_dataloader(IDS, 8, 16, seed=4)))
    assert not torch.equal(first, epoch(create_dataloader(IDS, 8, 16, seed=5)))
    state = torch.get_rng_state()
    epoch(create_dataloader(IDS, 8, 16, seed=4))
    assert torch.equal(state, torch.get_rng_state())


def test_loader_for_validation_gives_each_window_in_order():
    loader = create_dataloader(IDS, 8, 16, shuffle=False, drop_last=False)
    rows = torch.tensor(IDS).unfold(0, 17, 16)
    assert torch.equal(epoch(loader), torch.cat([rows[:, :-1], rows[:, 1:]], dim=1))


def test_text_is_encoded():
    text = "a text that is encoded"
    from_text = create_dataloader(text, 2, 4, encode=codes, seed=3)
    assert torch.equal(epoch(from_text), epoch(create_dataloader(codes(text), 2, 4, seed=3)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IDS[:60], 8, 16), ValueError, "batch_size is 8; drop_last leaves no batch of 3 windows"),
        ((IDS, 0, 16), ValueError, "batch_size must be at least 1, got 0"),
        (("short", 1, 2), TypeError, "encode is needed"),
        ((IDS[:16], 1, 16), ValueError, "ids holds 16 tokens"),
    ],
)
def test_loaders_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        create_dataloader(*arguments)
    if "drop_last" in message:
        assert len(create_dataloader(*arguments, drop_last=False)) == 1


# ---- token files


@settings(max_examples=30, deadline=None)
@given(chunks=st.lists(few_ids, min_size=1, max_size=4), vocab_size=st.sampled_from([60_001, 65_536, 65_537]))
def test_a_token_file_is_what_numpy_reads(tmp_path_factory, chunks, vocab_size):
    path = tmp_path_factory.mktemp("tokens") / "ids.npy"
    flat = [i for chunk in chunks for i in chunk]
    assert write_token_file(path, iter(chunks), vocab_size) == len(flat)
    loaded = np.load(path)
    assert loaded.tolist() == open_token_file(path).tolist() == flat
    assert loaded.dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)


@pytest.mark.parametrize("n", [1, 9, 99_999, 1_000_000])
def test_the_header_has_room_for_any_length(tmp_path, n):
    write_token_file(tmp_path / "ids.npy", [np.zeros(n, dtype=int)], 10)
    assert (tmp_path / "ids.npy").stat().st_size == 128 + 2 * n
    assert len(open_token_file(tmp_path / "ids.npy")) == n


def test_largest_ids_of_each_type_are_kept(tmp_path):
    for vocab_size in (2**16, 2**32):
        write_token_file(tmp_path / "ids.npy", [[0, vocab_size - 1]], vocab_size)
        assert open_token_file(tmp_path / "ids.npy").tolist() == [0, vocab_size - 1]


def test_chunks_of_every_kind(tmp_path):
    write_token_file(tmp_path / "ids.npy", [[1, 2], [], np.array([3], np.uint8), torch.tensor([4])], 5)
    assert open_token_file(tmp_path / "ids.npy").tolist() == [1, 2, 3, 4]


def test_a_map_is_read_only(tmp_path):
    write_token_file(tmp_path / "ids.npy", [[1, 2]], 5)
    with pytest.raises(ValueError, match="read-only"):
        open_token_file(tmp_path / "ids.npy")[0] = 3


@pytest.mark.parametrize(
    ("chunks", "error", "message"),
    [
        ([[1, 2], [3, 10]], ValueError, r"chunks\[1\] holds id 10; vocab_size is 10"),
        ([[1, -1]], ValueError, r"chunks\[0\] holds id -1"),
        ([1, 2], ValueError, r"chunks\[0\] has shape \(\)"),
        ([[1.5]], TypeError, r"chunks\[0\] holds float64"),
        (["text"], TypeError, r"chunks\[0\] is text"),
        ([], ValueError, "holds no tokens"),
        ([[]], ValueError, "holds no tokens"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, chunks, error, message):
    path = tmp_path / "ids.npy"
    write_token_file(path, [[7, 8, 9]], 10)
    with pytest.raises(error, match=message):
        write_token_file(path, chunks, 10)
    assert open_token_file(path).tolist() == [7, 8, 9]
    assert os.listdir(tmp_path) == ["ids.npy"]


def test_an_interruption_leaves_nothing_behind(tmp_path):
    def chunks():
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_file(tmp_path / "ids.npy", chunks(), 10)
    assert os.listdir(tmp_path) == []


def test_a_file_is_not_visible_before_it_is_complete(tmp_path):
    path, half, go_on = tmp_path / "ids.npy", threading.Event(), threading.Event()

    def chunks():
        yield [1, 2, 3]
        half.set()
        assert go_on.wait(10)
        yield [4]

    writer = threading.Thread(target=write_token_file, args=(path, chunks(), 10))
    writer.start()
    assert half.wait(10)
    visible = path.exists()
    go_on.set()
    writer.join()
    assert not visible and open_token_file(path).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("vocab_size", [0, 2**32 + 1])
def test_vocabularies_that_are_refused(tmp_path, vocab_size):
    with pytest.raises(ValueError, match="vocab_size must be"):
        write_token_file(tmp_path / "ids.npy", [[0]], vocab_size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda good: good[:-1], "announces 1,000 tokens and holds 999.5"),
        (lambda good: good[:-400], "announces 1,000 tokens and holds 800.0"),
        (lambda good: good + b"x", "announces 1,000 tokens and holds 1,000.5"),
        (lambda good: good[:60], "is not a token file"),
        (lambda good: b"", "is not a token file"),
        (lambda good: b"Once upon a time", "is not a token file"),
    ],
    ids=["one byte less", "cut short", "longer", "within the header", "empty", "text"],
)
def test_damaged_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "ids.npy"
    write_token_file(path, [np.arange(1_000)], 1_000)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=r"ids\.npy " + message):
        open_token_file(path)


@pytest.mark.parametrize(
    "array",
    [
        np.ones(5),
        np.ones(5, dtype=np.int64),
        np.ones(5, dtype=">u2"),
        np.ones((2, 2), dtype=np.uint16),
        np.ones(0, dtype=np.uint16),
        np.array(5, dtype=np.uint16),
        np.array(["a"]),
    ],
    ids=["float", "int64", "big-endian", "two dimensions", "no tokens", "no dimension", "text"],
)
def test_arrays_of_another_kind_are_refused(tmp_path, array):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(ValueError, match=r"needed are uint16 or uint32 of shape \(n,\)"):
        open_token_file(tmp_path / "ids.npy")


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_token_file(tmp_path / "none.npy")


def test_writing_and_reading_need_little_memory(tmp_path):
    n_chunks, size = 40, 100_000
    chunks = (np.full(size, number, dtype=np.uint16) for number in range(n_chunks))
    tracemalloc.start()
    write_token_file(tmp_path / "ids.npy", chunks, 50)  # 8 MB
    writing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    dataset = TokenDataset(open_token_file(tmp_path / "ids.npy"), 256)
    for index in range(0, len(dataset), 97):
        dataset[index]
    reading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert writing < 2_000_000 and reading < 2_000_000


# ---- shards


@pytest.fixture
def shard_paths(tmp_path):
    paths = []
    for number, part in enumerate(np.split(IDS, [100, 350, 383])):
        paths.append(tmp_path / f"{number}.npy")
        write_token_file(paths[-1], [part], 500)
    return paths


@pytest.mark.parametrize(("context_length", "stride"), [(16, None), (16, 3), (32, 40), (1, 1)])
def test_shards_equal_the_windows_of_each_part_end_to_end(shard_paths, context_length, stride):
    ours = stacked(TokenShards(shard_paths, context_length, stride))
    parts = [sliding_window_view(part, context_length + 1) for part in np.split(IDS, [100, 350, 383])]
    rows = torch.tensor(np.concatenate([part[:: stride or context_length] for part in parts]))
    assert torch.equal(ours[0], rows[:, :-1]) and torch.equal(ours[1], rows[:, 1:])


def test_shards_are_pickled_as_paths(shard_paths):
    shards = TokenShards(shard_paths, 16, 3)
    data = pickle.dumps(shards)
    assert len(data) < 1_000
    copy = pickle.loads(data)
    assert all(map(torch.equal, stacked(copy), stacked(shards)))


FILE_IDS = np.arange(100_000) * 31 % 60_000


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "ids.npy"
    write_token_file(path, [FILE_IDS], vocab_size=60_000)
    return path


# Ids in a file, however the map was made, and what they are.
MAPPED = {
    "the whole file": lambda path: open_token_file(path),
    "as numpy maps it": lambda path: np.load(path, mmap_mode="r"),
    "writable": lambda path: np.load(path, mmap_mode="r+"),
    "a view": lambda path: np.asarray(open_token_file(path)),
    "a slice": lambda path: open_token_file(path)[777:90_001],
    "a slice of a slice": lambda path: open_token_file(path)[50:][100:-1],
    "a row": lambda path: open_token_file(path).reshape(100, 1000)[7],
    "many rows": lambda path: open_token_file(path).reshape(100, 1000)[3:97].reshape(-1),
    "from the middle of a page": lambda path: np.memmap(path, "<u2", "r", offset=5128, shape=(9_000,)),
}


@pytest.mark.parametrize("kind", MAPPED)
def test_a_map_is_pickled_as_its_place_in_the_file(kind, token_file):
    dataset = TokenDataset(MAPPED[kind](token_file), 16, 5)
    data = pickle.dumps(dataset)
    assert len(data) < 1_000
    for copied in (pickle.loads(data), copy.deepcopy(dataset)):
        assert np.array_equal(copied.ids, dataset.ids) and copied.ids.dtype == dataset.ids.dtype
        assert isinstance(copied.ids.base, np.memmap)
        assert all(torch.equal(*pair) for pair in zip(copied[9], dataset[9], strict=True))
        assert (len(copied), copied.context_length, copied.stride) == (len(dataset), 16, 5)


def changed(path) -> np.ndarray:
    """A map whose changes are in memory and in no file."""
    ids = np.load(path, mmap_mode="c")
    ids[20] = 7
    return ids


IN_MEMORY = {
    "a list": lambda path: FILE_IDS.tolist(),
    "an array": lambda path: FILE_IDS,
    "every other id of a map": lambda path: open_token_file(path)[::2],
    "a map backwards": lambda path: open_token_file(path)[::-1],
    "a column of a map": lambda path: open_token_file(path).reshape(1000, 100)[:, 3],
    "a map that was changed": changed,
}


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_what_is_no_piece_of_a_file_is_pickled_itself(kind, token_file):
    dataset = TokenDataset(IN_MEMORY[kind](token_file), 16)
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).ids, dataset.ids)


def test_a_file_that_is_gone_or_shorter_is_an_error_where_it_is_unpickled(token_file, tmp_path):
    path = tmp_path / "ids.npy"
    path.write_bytes(token_file.read_bytes())
    data = pickle.dumps(TokenDataset(open_token_file(path), 16))
    write_token_file(path, [FILE_IDS[:100]], vocab_size=60_000)
    with pytest.raises(ValueError, match="greater than file size"):
        pickle.loads(data)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"ids\.npy"):
        pickle.loads(data)


def test_worker_processes_give_the_same_batches(shard_paths):
    shards = TokenShards(shard_paths, 16)
    orders = [
        epoch(DataLoader(shards, num_workers=n, batch_sampler=ResumableSampler(len(shards), 4, 1)))
        for n in (0, 2)
    ]
    assert torch.equal(*orders)


def test_shards_index_from_the_end_and_stop_at_the_end(shard_paths):
    shards = TokenShards(shard_paths, 16)
    assert torch.equal(shards[-1][0], shards[len(shards) - 1][0])
    assert isinstance(shards, ConcatDataset)
    with pytest.raises(IndexError):
        shards[len(shards)]


def test_shards_that_are_refused(shard_paths):
    with pytest.raises(ValueError, match=r"2\.npy: ids holds 33 tokens; context_length 33 needs"):
        TokenShards(shard_paths, 33)
    with pytest.raises(ValueError, match="a list of at least one path"):
        TokenShards([], 16)
    with pytest.raises(ValueError, match="a list of at least one path"):
        TokenShards(shard_paths[0], 16)
    shard_paths[1].write_bytes(shard_paths[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"1\.npy announces"):
        TokenShards(shard_paths, 16)


# ---- orders


@settings(deadline=None)
@given(
    n=st.integers(1, 60), batch_size=st.integers(1, 20), seed=st.integers(0, 2**40), number=st.integers(0, 3)
)
def test_an_epoch_has_full_batches_of_different_examples(n, batch_size, seed, number):
    if batch_size > n:
        with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
            ResumableSampler(n, batch_size, seed)
        return
    sampler = ResumableSampler(n, batch_size, seed)
    assert sampler.batches_per_epoch == n // batch_size
    batches = [sampler.batch(number * (n // batch_size) + j) for j in range(n // batch_size)]
    assert {len(batch) for batch in batches} == {batch_size}
    flat = [index for batch in batches for index in batch]
    assert len(set(flat)) == len(flat) == n // batch_size * batch_size
    assert sorted(sampler.epoch_order(number)) == list(range(n))


@settings(deadline=None)
@given(stop=st.integers(0, 30), seed=st.integers(0, 5))
def test_a_resumed_run_continues_an_uninterrupted_one(stop, seed):
    whole = list(ResumableSampler(23, 3, seed, end_batch=30))
    before = list(ResumableSampler(23, 3, seed, end_batch=stop))
    after = list(ResumableSampler(23, 3, seed, start_batch=stop, end_batch=30))
    assert before + after == whole
    assert len(before) == len(ResumableSampler(23, 3, seed, end_batch=stop)) == stop


def test_batches_can_be_asked_for_in_any_order():
    sampler = ResumableSampler(23, 3, seed=1, end_batch=30)
    forwards = list(sampler)
    assert [sampler.batch(k) for k in reversed(range(30))] == forwards[::-1]
    assert list(sampler) == forwards
    assert all(type(index) is int for index in forwards[0])


def test_orders_differ_between_epochs_and_seeds_and_repeat_with_the_seed():
    orders = [tuple(ResumableSampler(50, 5, seed).epoch_order(e)) for seed in (0, 1) for e in (0, 1)]
    assert len(set(orders)) == 4
    assert orders[1] == tuple(ResumableSampler(50, 5, 0).epoch_order(1))


def test_no_random_state_is_read_or_changed():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = ResumableSampler(50, 5).batch(3)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    assert ResumableSampler(50, 5).batch(3) == first


def test_end_defaults_to_the_end_of_the_epoch():
    assert len(ResumableSampler(23, 3)) == 7
    assert len(ResumableSampler(23, 3, start_batch=5)) == 2
    assert len(ResumableSampler(23, 3, start_batch=7)) == 7


def test_without_shuffling_each_epoch_is_in_order():
    assert list(ResumableSampler(7, 3, shuffle=False, end_batch=4)) == [[0, 1, 2], [3, 4, 5]] * 2


def test_every_pair_of_examples_is_as_often_in_either_order():
    first = sum(
        list(order).index(0) < list(order).index(1)
        for order in (ResumableSampler(4, 1, seed).epoch_order(0) for seed in range(2_000))
    )
    assert 900 < first < 1_100


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("n_examples", 0, ValueError),
        ("batch_size", 0, ValueError),
        ("batch_size", 2.5, TypeError),
        ("seed", -1, ValueError),
        ("seed", None, TypeError),
        ("start_batch", -1, ValueError),
        ("end_batch", 1, ValueError),
    ],
)
def test_sampler_arguments_that_are_refused_are_named(name, value, error):
    with pytest.raises(error, match=f"{name} must be .*, got {value}"):
        ResumableSampler(**{"n_examples": 23, "batch_size": 3, "start_batch": 2, name: value})


# ---- random windows


def test_random_windows_are_windows_with_their_targets():
    dataset = TokenDataset(IDS, 16, 1)
    inputs, targets = sample_batch(dataset, 8, step=3, seed=1)
    assert inputs.shape == targets.shape == (8, 16) and inputs.dtype == targets.dtype == torch.int64
    windows = {row.tobytes() for row in sliding_window_view(IDS.astype(np.int64), 17)}
    rows = torch.cat([inputs, targets[:, -1:]], dim=1).numpy()
    assert all(row.tobytes() in windows for row in rows)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_every_window_is_drawn_equally_often():
    dataset, n_draws = TokenDataset(np.arange(20), 4, 1), 8_000
    firsts = torch.cat([sample_batch(dataset, 80, step)[0][:, 0] for step in range(n_draws // 80)])
    counts = torch.bincount(firsts, minlength=16)
    assert len(counts) == 16 == len(dataset)
    # Chi-squared with 15 degrees of freedom is below 38 in 999 of 1,000 cases.
    expected = n_draws / 16
    assert ((counts - expected) ** 2 / expected).sum() < 38


def test_a_random_batch_depends_on_seed_and_step_alone(shard_paths):
    shards = TokenShards(shard_paths, 16, 1)
    torch.manual_seed(0)
    first = sample_batch(shards, 4, step=5, seed=2)[0]
    torch.manual_seed(1)
    assert torch.equal(sample_batch(shards, 4, step=5, seed=2)[0], first)
    assert not torch.equal(sample_batch(shards, 4, step=6, seed=2)[0], first)
    assert not torch.equal(sample_batch(shards, 4, step=5, seed=3)[0], first)


class Huge:
    """A data set of a trillion windows, which counts how many are read."""

    read = 0

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert 0 <= index < 10**12
        self.read += 1
        return torch.tensor([index]), torch.tensor([index + 1])


def test_the_cost_of_a_random_batch_does_not_grow_with_the_text():
    dataset = Huge()
    assert sample_batch(dataset, 6, step=0)[0].shape == (6, 1)
    assert dataset.read == 6


@pytest.mark.parametrize("name", ["batch_size", "step", "seed"])
def test_draws_that_are_refused_are_named(name):
    arguments = {"batch_size": 2, "step": 0, "seed": 0, name: -1}
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        sample_batch(TokenDataset(IDS, 16), **arguments)
