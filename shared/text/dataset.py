"""From token ids to batches: windows with targets, splits, token files, orders that can be resumed, random
draws.

An example is a window of context_length tokens, C, and the same window one position later. Ids are never
copied as a whole, so a memory-mapped file larger than memory serves as well as a list. Bad arguments
raise a TypeError or ValueError that names the argument, its value and what is allowed.

Left out: masks between the documents of a window, padding, sharing batches among processes (process r of
w takes batch k * w + r of ResumableSampler).

Follows the packing of documents of Brown et al. (2020, "Language Models are Few-Shot Learners", section
2.2) and NumPy's .npy format (NEP 1), which other tools read.

Explained and proven in ch02_text_data/04_batches.ipynb; written from there by `make promote`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from shared.checks import check_between, check_several, require, whole_number

TokenIds = Sequence[int] | np.ndarray | torch.Tensor


def _id_array(name: str, ids: TokenIds) -> np.ndarray:
    """Return `ids` as a 1-D array of integers; arrays, memory maps and CPU tensors are not copied."""
    if isinstance(ids, str | bytes):
        raise TypeError(f"{name} is text; encode it to token ids first")
    # Of a memory map, asarray is a plain view, which is quicker to slice.
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; one dimension is needed")
    if array.size == 0 and not hasattr(ids, "dtype"):
        array = array.astype(np.int64)  # numpy takes an empty list for floats
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} holds {array.dtype}; integers are needed")
    return array


def count_windows(n_tokens: int, context_length: int, stride: int) -> int:
    """Return how many windows a text of `n_tokens` has: each needs context_length + 1 tokens, targets included."""
    return max(0, (n_tokens - context_length - 1) // stride + 1)


class TokenDataset(Dataset):
    """Windows over a sequence of token ids, each with its targets: the same window one position later.

    Args:
        ids: Token ids, shape (n,): a list, an array, a memory map or a tensor; n must be at least C + 1.
        context_length: Tokens of a window, C.
        stride: How far a window starts after the one before; None means context_length, where every token that
            a window reaches is a target exactly once. A smaller stride overlaps, a larger one skips tokens.
    """

    def __init__(self, ids: TokenIds, context_length: int, stride: int | None = None) -> None:
        self.ids = _id_array("ids", ids)
        self.context_length = whole_number("context_length", context_length)
        self.stride = self.context_length if stride is None else whole_number("stride", stride)
        if len(self) == 0:
            raise ValueError(
                f"ids holds {len(self.ids):,} tokens; context_length {context_length:,} needs at least "
                f"{context_length + 1:,}, as the targets reach one token further"
            )

    def __len__(self) -> int:
        return count_windows(len(self.ids), self.context_length, self.stride)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs, targets) of window `index`, two int64 tensors of shape (C,) that share no memory."""
        start = range(len(self))[index] * self.stride  # as in a list: negative numbers, IndexError
        window = self.ids[start : start + self.context_length + 1]  # (C + 1,)
        return torch.from_numpy(window[:-1].astype(np.int64)), torch.from_numpy(window[1:].astype(np.int64))

    def __getstate__(self) -> dict[str, object]:
        """Return what is pickled: of ids in a memory map only where they are."""
        place = _mapped_place(self.ids)
        return self.__dict__ if place is None else {**self.__dict__, "ids": place}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take up what was pickled, mapping the file anew; OSError or ValueError if it has gone or is shorter."""
        self.__dict__.update(state)
        if isinstance(self.ids, dict):
            self.ids = np.asarray(np.memmap(**self.ids))


def encode_documents(
    documents: Iterable[str], encode: Callable[[str], Sequence[int]], end_of_text_id: int
) -> Iterator[np.ndarray]:
    """Yield for each document its token ids followed by the end token, int64 of shape (tokens + 1,).

    `encode` must treat the end token's name as ordinary text. A document that is empty or contains the end token
    raises ValueError.
    """
    check_several("documents", documents)
    for number, document in enumerate(documents):
        ids = _id_array(f"documents[{number}]", encode(document)).astype(np.int64)
        if not ids.size:
            raise ValueError(f"documents[{number}] has no tokens; leave empty documents out")
        if (ids == end_of_text_id).any():
            raise ValueError(
                f"documents[{number}] contains the end token {end_of_text_id}; encode it as text"
            )
        yield np.append(ids, end_of_text_id)


def join_documents(
    documents: Iterable[str], encode: Callable[[str], Sequence[int]], end_of_text_id: int
) -> np.ndarray:
    """Return the documents as one sequence, each followed by the end token; errors as in `encode_documents`."""
    parts = list(encode_documents(documents, encode, end_of_text_id))
    if not parts:
        raise ValueError("documents is empty; at least one is needed")
    return np.concatenate(parts)


def split_documents(
    documents: Iterable[str], validation_fraction: float = 0.1, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Split whole documents into (training, validation); equal documents always land on the same side.

    The side depends on the seed and the texts, not on their order: the different texts are sorted by a hash.

    Args:
        documents: Texts, at least two of them different. Both results keep their order.
        validation_fraction: Share of the different texts for validation; each side gets at least one.
        seed: Another seed gives another split.
    """
    check_several("documents", documents)
    documents = list(documents)  # read twice below, and an iterator is empty after the first time
    require("validation_fraction", validation_fraction, 0 < validation_fraction < 1, "above 0 and below 1")
    different = sorted(set(documents), key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode()).digest())
    if len(different) < 2:
        raise ValueError(f"documents holds {len(different)} different texts; at least 2 are needed")
    n_validation = min(max(1, round(validation_fraction * len(different))), len(different) - 1)
    chosen = set(different[:n_validation])
    return [text for text in documents if text not in chosen], [text for text in documents if text in chosen]


def ngram_overlap(train: Iterable[TokenIds], validation: Iterable[TokenIds], n: int) -> float:
    """Return the share of the validation n-grams, repeated ones counted each time, that also occur in training.

    Both parts are sequences of token ids (documents or windows); no n-gram crosses from one to the next.
    """

    def grams(part: Iterable[TokenIds]) -> Iterator[bytes]:
        for ids in part:
            array = _id_array("sequence", ids).astype(np.int64)
            yield from (array[i : i + n].tobytes() for i in range(len(array) - n + 1))

    whole_number("n", n)
    known = set(grams(train))
    found = [gram in known for gram in grams(validation)]
    if not found:
        raise ValueError(f"n is {n}; no validation sequence has that many tokens")
    return sum(found) / len(found)


def create_dataloader(
    source: str | TokenIds,
    batch_size: int,
    context_length: int,
    stride: int | None = None,
    *,
    encode: Callable[[str], Sequence[int]] | None = None,
    shuffle: bool = True,
    drop_last: bool = True,
    seed: int = 0,
    num_workers: int = 0,
) -> DataLoader:
    """Return batches (inputs, targets), int64 of shape (B, C) each, of the windows of a text.

    A loader built again with the same arguments gives the same batches. Each epoch of one loader has a new order.
    For validation use `shuffle=False, drop_last=False`. To resume within an epoch see `ResumableSampler`.

    Args:
        source: Token ids as for `TokenDataset`, or a text, which `encode` then turns into ids.
        batch_size: Windows of a batch, B.
        context_length, stride: As for `TokenDataset`.
        encode: Text to ids.
        shuffle: A random order, which depends on `seed` and on no other random numbers.
        drop_last: Leave out the last batch of an epoch where it is smaller than B.
        num_workers: Processes that read ahead; 0 reads in this one.
    """
    if isinstance(source, str):
        if encode is None:
            raise TypeError("source is text; encode is needed to turn it into token ids")
        source = encode(source)
    batch_size = whole_number("batch_size", batch_size)
    dataset = TokenDataset(source, context_length, stride)
    if drop_last and len(dataset) < batch_size:
        raise ValueError(f"batch_size is {batch_size}; drop_last leaves no batch of {len(dataset)} windows")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset, batch_size, shuffle, drop_last=drop_last, num_workers=num_workers, generator=generator
    )


def write_token_file(path: str | os.PathLike, chunks: Iterable[TokenIds], vocab_size: int) -> int:
    """Write token ids to a .npy file chunk by chunk and return their number; a file of that name is replaced.

    Only one chunk is in memory at a time, and the file appears under its name when it is complete. It holds
    little-endian uint16 up to a vocabulary of 65,536 tokens, uint32 above. An error leaves an older file as it was.

    Args:
        path: The file to write, usually ending in .npy.
        chunks: Pieces of the sequence in order, for example from `encode_documents`.
        vocab_size: Every id must be below it.
    """
    path = Path(path)
    check_between("vocab_size", whole_number("vocab_size", vocab_size), 1, 2**32)
    # The smallest type that holds every id; the file gets its name when it is complete.
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    header = {"descr": dtype.str, "fortran_order": False}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    n_tokens = 0
    try:
        with part.open("wb") as file:
            # A header to hold the place, then the ids piece by piece.
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (0,)})
            for number, chunk in enumerate(chunks):
                ids = _id_array(f"chunks[{number}]", chunk)
                if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                    wrong = ids.min() if ids.min() < 0 else ids.max()
                    raise ValueError(f"chunks[{number}] holds id {wrong}; vocab_size is {vocab_size:,}")
                file.write(ids.astype(dtype).tobytes())
                n_tokens += len(ids)
            if not n_tokens:
                raise ValueError("chunks holds no tokens; a token file needs at least one")
            # NumPy pads the header for any length, so the true one takes exactly the place of the first.
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (n_tokens,)})
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return n_tokens


def open_token_file(path: str | os.PathLike) -> np.memmap:
    """Return a file that `write_token_file` wrote as a read-only memory map of shape (n,).

    A file that is cut short, has another type or is no .npy file raises ValueError. No token is read yet.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            if (version := np.lib.format.read_magic(file)) != (1, 0):
                raise ValueError(f"format version {version} in place of (1, 0)")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except ValueError as error:
            raise ValueError(f"{path} is not a token file: {error}") from error
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if len(shape) != 1 or not shape[0] or dtype.str not in ("<u2", "<u4"):
        raise ValueError(f"{path} holds {dtype} of shape {shape}; needed are uint16 or uint32 of shape (n,)")
    if size != offset + shape[0] * dtype.itemsize:
        found = (size - offset) / dtype.itemsize
        raise ValueError(f"{path} announces {shape[0]:,} tokens and holds {found:,.1f}: cut short or damaged")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _mapped_place(ids: np.ndarray) -> dict[str, object] | None:
    """Return with which arguments np.memmap maps `ids` again; None if they are not one piece of a file."""
    root = ids
    while isinstance(root.base, np.ndarray):
        root = root.base
    # What was written into a copy-on-write map is in no file.
    in_file = isinstance(root, np.memmap) and root.filename is not None and root.mode != "c"
    if not in_file or not ids.flags.c_contiguous:
        return None
    offset = root.offset + ids.ctypes.data - root.ctypes.data  # of a slice: further into the file
    return {"filename": root.filename, "dtype": ids.dtype, "mode": "r", "offset": offset, "shape": ids.shape}


class TokenShards(ConcatDataset):
    """Windows over several token files, in the order of the files; no window crosses from one file to the next.

    Each file stays open. Worker processes map it anew, as each part is a `TokenDataset`.

    Args:
        paths: Files of `write_token_file`, sorted, as their order numbers the windows; each has at least C + 1 tokens.
        context_length, stride: As for `TokenDataset`.
    """

    def __init__(
        self, paths: Sequence[str | os.PathLike], context_length: int, stride: int | None = None
    ) -> None:
        if isinstance(paths, str | os.PathLike) or not (files := list(paths)):
            raise ValueError(f"paths is {paths!r}; a list of at least one path is needed")
        super().__init__([self._open(path, context_length, stride) for path in files])

    @staticmethod
    def _open(path: str | os.PathLike, context_length: int, stride: int | None) -> TokenDataset:
        ids = open_token_file(path)
        try:
            return TokenDataset(ids, context_length, stride)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


class ResumableSampler(Sampler[list[int]]):
    """Batches of example numbers in which batch k depends on the seed and k alone, so that any step can be resumed.

    Give it to `DataLoader` as `batch_sampler`: it yields the batches `start_batch` to `end_batch` - 1, numbered through
    all epochs. Each epoch has an order of its own, drawn by NumPy from (seed, epoch), and leaves out the examples
    that do not fill its last batch. Another version of NumPy may draw another order.

    Args:
        n_examples: Usually `len(dataset)`; at least `batch_size`.
        batch_size: Examples of a batch.
        seed: Of all orders, at least 0.
        start_batch: The first batch: 0, or the number of steps done before the interruption.
        end_batch: One past the last batch; None stops at the end of the epoch that `start_batch` belongs to.
        shuffle: False keeps the order of the data set in every epoch.
    """

    def __init__(
        self,
        n_examples: int,
        batch_size: int,
        seed: int = 0,
        *,
        start_batch: int = 0,
        end_batch: int | None = None,
        shuffle: bool = True,
    ) -> None:
        self.n_examples = whole_number("n_examples", n_examples)
        self.batch_size = whole_number("batch_size", batch_size)
        self.batches_per_epoch = self.n_examples // self.batch_size
        if not self.batches_per_epoch:
            raise ValueError(f"batch_size is {batch_size}, but there are only {n_examples} examples")
        self.seed = whole_number("seed", seed, smallest=0)
        self.start_batch = whole_number("start_batch", start_batch, smallest=0)
        if end_batch is None:
            end_batch = (self.start_batch // self.batches_per_epoch + 1) * self.batches_per_epoch
        self.end_batch = whole_number("end_batch", end_batch, smallest=self.start_batch)
        self.shuffle = shuffle
        self._order = (-1, np.arange(self.n_examples))  # the epoch last used and its order

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Return the order of one epoch: all example numbers, int64 of shape (n_examples,)."""
        if self.shuffle and self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_examples)
        return self._order[1]

    def batch(self, k: int) -> list[int]:
        """Return the example numbers of batch `k`, counted from the beginning of the run."""
        epoch, position = divmod(k, self.batches_per_epoch)
        start = position * self.batch_size
        return self.epoch_order(epoch)[start : start + self.batch_size].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self.batch(k) for k in range(self.start_batch, self.end_batch))

    def __len__(self) -> int:
        return self.end_batch - self.start_batch


def sample_batch(
    dataset: TokenDataset | ConcatDataset, batch_size: int, step: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (inputs, targets), int64 (B, C) each, of windows drawn at random; the same window may come twice.

    The draw depends on (seed, step) alone, and its time not on the length of the text.

    Args:
        dataset: With a stride of 1 a window may start at any token.
        batch_size: Windows of the batch, B.
        step, seed: At least 0.
    """
    whole_number("batch_size", batch_size)
    numbers = [whole_number("seed", seed, smallest=0), whole_number("step", step, smallest=0)]
    drawn = np.random.default_rng(numbers).integers(len(dataset), size=batch_size).tolist()
    inputs, targets = zip(*(dataset[number] for number in drawn), strict=True)
    return torch.stack(inputs), torch.stack(targets)
