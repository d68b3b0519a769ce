"""Documents to batches: rows of token ids, padded to one length, of similar length together, in a new order
in each epoch.

A batch is a pair (inputs, targets) of int64 ids (batch, tokens); a target of `IGNORE` counts for nothing.

Left out: windows over one long text (shared.text.dataset), rows from files and shares of several
processes (shared.pretraining.rows).

Explained and proven in ch05_pretraining/01_training_loop.ipynb; written from there by `make promote`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import tiktoken
import torch
from torch import Tensor

IGNORE = -100  # the target that counts for nothing, as in torch.nn.functional.cross_entropy

Batch = tuple[Tensor, Tensor]


def document_row(text: str, encoding: tiktoken.Encoding) -> list[int]:
    """Return [end] + ids + [end]: the model reads the first end token and predicts everything after it."""
    return [encoding.eot_token, *encoding.encode_ordinary(text), encoding.eot_token]


def pad_rows(rows: Iterable[Sequence[int]]) -> Batch:
    """Return rows of ids as one batch, padded on the right to the longest.

    Args:
        rows: At least one, each of at least two ids.

    Returns:
        inputs: int64 (rows, longest - 1), each row less its last id. The padding repeats id 0: under a causal mask no
            real token sees it.
        targets: int64 (rows, longest - 1), each row less its first id, padded with `IGNORE`.

    Raises:
        ValueError: There is no row, or one has fewer than two ids.
    """
    rows = list(rows)
    shortest = min(map(len, rows), default=0)
    if shortest < 2:
        raise ValueError(
            f"rows must be at least one, each of at least two ids, got {len(rows)} with {shortest}"
        )
    longest = max(map(len, rows)) - 1
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row, dtype=torch.int64)
        inputs[i, : len(row) - 1] = ids[:-1]
        targets[i, : len(row) - 1] = ids[1:]
    return inputs, targets


def row_batches(
    rows: Iterable[Sequence[int]], batch_size: int, *, seed: int = 0, pool: int = 8
) -> Iterator[Batch]:
    """Yield batches of rows of similar length, so that little is padding. Every row is used exactly once.

    `pool` batches at a time are read from `rows`, which may be endless, sorted by length, cut, and yielded in random
    order. The last batch may be smaller. Raises ValueError if `batch_size` or `pool` is below 1.
    """
    if batch_size < 1 or pool < 1:
        raise ValueError(f"batch_size and pool must be at least 1, got {batch_size} and {pool}")
    return _row_batches(iter(rows), batch_size, np.random.default_rng(seed), pool)


def _row_batches(
    rows: Iterator[Sequence[int]], batch_size: int, rng: np.random.Generator, pool: int
) -> Iterator[Batch]:
    while read := list(islice(rows, pool * batch_size)):
        read.sort(key=len)
        batches = [read[i : i + batch_size] for i in range(0, len(read), batch_size)]
        for i in rng.permutation(len(batches)):
            yield pad_rows(batches[i])


def shuffled_rows(
    rows: Sequence[Sequence[int]], *, seed: int = 0, epochs: int | None = None
) -> Iterator[Sequence[int]]:
    """Yield all rows, in a new random order in each epoch; without end if `epochs` is None."""
    epoch = 0
    while len(rows) and (epochs is None or epoch < epochs):
        for i in np.random.default_rng([seed, epoch]).permutation(len(rows)):
            yield rows[i]
        epoch += 1
