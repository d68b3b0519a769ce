"""Rows of a training batch out of token shards, as a function of (seed, step) alone.

Two ways to cut them. `WindowRows`: windows of the stream in which documents follow each other. `DocumentRows`: a row
is one document read from its beginning, [end] + document + [end], cut to the context and padded to the longest row
of the batch; padding has the target `IGNORE`, which counts for nothing. Process r of w takes its slice of the same
batch, so the number of processes changes no batch.

Either way some tokens may have no place in a row; `usage` counts them and says why.

Left out: masks between the documents of a window.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.checks import check_sizes
from shared.text.dataset import ResumableSampler, open_token_file
from shared.training.batches import IGNORE

Paths = Sequence[str | os.PathLike]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 file" and "2,000 files"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


@dataclass(frozen=True)
class Usage:
    """How many of the tokens of some shards a model learns to predict, or is judged by, in one pass over its rows.

    Attributes:
        rows: How many rows there are and of what, such as "692 windows of 256 tokens".
        tokens: Of the shards, end tokens included.
        lost: How many of them have no place, by where they stand; nothing where the number is 0.
    """

    rows: str
    tokens: int
    lost: dict[str, int]

    @property
    def used(self) -> int:
        """Tokens that have a place."""
        return self.tokens - sum(self.lost.values())

    def __str__(self) -> str:
        share = f"{100 * self.used / self.tokens:.3g} %"
        lost = "".join(f"; {number:,} lost {where}" for where, number in self.lost.items())
        return f"{self.used:,} of {self.tokens:,} tokens are used ({share}), in {self.rows}{lost}"


class WindowRows:
    """Windows of `context_length` tokens over the shards, in the order of the files; none crosses into another file.

    Args:
        paths: Token files.
        context_length: Inputs of a row, C.
        batch_size: Rows of a batch.
        seed: Of all orders.
        partial: Whether the last window of a shard may be shorter, so that a shard of 2 tokens has one. Otherwise what
            is left over has no place, and shards of at most C tokens have none.

    Attributes:
        skipped: Paths of the shards that have no row.
    """

    def __init__(
        self, paths: Paths, context_length: int, batch_size: int, seed: int = 0, *, partial: bool = False
    ) -> None:
        check_sizes(context_length=context_length)
        # Of a memory map, asarray is a plain view, which is quicker to slice.
        self.shards = [np.asarray(open_token_file(path)) for path in paths]
        self.context_length = context_length
        # Every token but the first of a shard is a target; those of a whole window, or of a last one that is shorter.
        self.targets = np.array([max(0, len(shard) - 1) for shard in self.shards], dtype=np.int64)
        shorter = context_length - 1 if partial else 0
        self.counts = (self.targets + shorter) // context_length  # rows of each shard
        self.ends = self.counts.cumsum()  # one past the number of the last row of each shard
        self.skipped = [path for path, count in zip(paths, self.counts, strict=True) if not count]
        if not len(self):
            raise ValueError(
                f"context_length is {context_length}, but the longest shard of the text has only "
                f"{max(map(len, self.shards), default=0):,} tokens: give a smaller one, or more text"
            )
        self.sampler = _sampler(len(self), batch_size, seed)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def batch(self, number: int) -> list[int]:
        """Return the rows of batch `number`, counted through all epochs."""
        return self.sampler.batch(number)

    def _window(self, row: int) -> np.ndarray:
        """Return the tokens of a row, inputs and last target: at most (C + 1,)."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        row_of_shard = row - int(self.ends[shard] - self.counts[shard])
        start = row_of_shard * self.context_length
        return self.shards[shard][start : start + self.context_length + 1]

    def n_targets(self, rows: Sequence[int]) -> int:
        """Return how many targets the rows have."""
        return sum(len(self._window(row)) - 1 for row in rows)

    def tensors(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs, targets), int64 of shape (rows, longest), padded with 0 and `IGNORE`."""
        windows = [self._window(row) for row in rows]
        inputs = np.zeros((len(rows), max(map(len, windows)) - 1), dtype=np.int64)
        targets = np.full_like(inputs, IGNORE)
        for i, window in enumerate(windows):
            inputs[i, : len(window) - 1], targets[i, : len(window) - 1] = window[:-1], window[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def usage(self) -> Usage:
        """Return how many tokens an epoch uses. The first token of a shard is never predicted."""
        lengths = np.array([len(shard) for shard in self.shards])
        short = lengths[self.counts == 0].sum()
        targets = np.minimum(self.counts * self.context_length, self.targets).sum()
        left_over = len(self) % self.sampler.batch_size
        last = left_over * self.context_length
        lost = {
            f"in {counted(len(self.skipped), 'shard')} shorter than a window": short,
            "at the ends of shards": lengths.sum() - short - targets,
            f"in {counted(left_over, 'window')} of an unfilled batch (others in each epoch)": last,
        }
        return _usage(
            f"{counted(len(self), 'window')} of {self.context_length:,} tokens", lengths.sum(), lost
        )


class DocumentRows:
    """Documents as rows, those of a batch of similar length.

    Each epoch has an order of its own. `pool` batches of it are sorted by length together, cut into batches, and these
    shuffled: less padding the larger the pool, at the price of batches that are alike in length. 1 does not sort.

    Args:
        paths: Token files in which each document ends with `end_token`.
        context_length: Most inputs of a row, C. A document has at most C targets.
        batch_size: Rows of a batch.
        end_token: The id that ends a document and begins a row.
        seed: Of all orders.
        pool: Batches that are sorted together.
    """

    def __init__(
        self, paths: Paths, context_length: int, batch_size: int, end_token: int, seed: int = 0, pool: int = 1
    ) -> None:
        check_sizes(pool=pool)
        self.shards = [open_token_file(path) for path in paths]
        ends = [np.flatnonzero(shard == end_token) for shard in self.shards]
        for path, shard, positions in zip(paths, self.shards, ends, strict=True):
            if not len(positions) or positions[-1] != len(shard) - 1:
                raise ValueError(f"{path} does not end with the end token {end_token}")
        self.starts = np.concatenate([np.append(0, positions[:-1] + 1) for positions in ends])
        self.lengths = np.concatenate(
            [np.diff(positions, prepend=-1) for positions in ends]
        )  # end token included
        self.shard_of = np.repeat(np.arange(len(ends)), [len(positions) for positions in ends])
        self.context_length, self.end_token, self.pool = context_length, end_token, pool
        self.sampler = _sampler(len(self.starts), batch_size, seed)
        self._order = (-1, np.empty((0, 0), dtype=np.int64))  # the epoch last used and its batches

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, number: int) -> list[int]:
        """Return the rows of batch `number`, counted through all epochs."""
        epoch, position = divmod(number, self.sampler.batches_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._batches(epoch)
        return self._order[1][position].tolist()

    def _batches(self, epoch: int) -> np.ndarray:
        """Return the batches of an epoch, (batches, batch_size)."""
        size, count = self.sampler.batch_size, self.sampler.batches_per_epoch
        order = self.sampler.epoch_order(epoch)[: size * count]
        if self.pool == 1:
            return order.reshape(count, size)
        generator = np.random.default_rng([self.sampler.seed, epoch, 1])
        batches = []
        for start in range(0, len(order), size * self.pool):
            rows = order[start : start + size * self.pool]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")].reshape(-1, size)
            batches.append(generator.permutation(rows))
        return np.concatenate(batches)

    def token_shares(self, vocab_size: int) -> torch.Tensor:
        """Return the share of each token in the shards, float64 (vocab_size,)."""
        counts = np.sum([np.bincount(shard, minlength=vocab_size) for shard in self.shards], axis=0)
        return torch.from_numpy(counts / counts.sum())

    def n_targets(self, rows: Sequence[int]) -> int:
        """Return how many targets the rows have, padding not counted."""
        return int(np.minimum(self.lengths[rows], self.context_length).sum())

    def usage(self) -> Usage:
        """Return how many tokens an epoch uses."""
        tokens, left_over = self.lengths.sum(), len(self) % self.sampler.batch_size
        cut = np.maximum(self.lengths - self.context_length, 0)
        n_cut = int(np.count_nonzero(cut))
        last = round(left_over * (tokens - cut.sum()) / len(self))  # of documents of mean length
        lost = {
            f"behind the first {self.context_length:,} tokens of {counted(n_cut, 'document')}": cut.sum(),
            f"in {counted(left_over, 'document')} of an unfilled batch (others in each epoch)": last,
        }
        return _usage(counted(len(self), "document"), tokens, lost)

    def tensors(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs, targets), int64 of shape (rows, longest), padded with the end token and `IGNORE`."""
        lengths = np.minimum(self.lengths[rows], self.context_length)
        inputs = np.full((len(rows), lengths.max()), self.end_token, dtype=np.int64)
        targets = np.full_like(inputs, IGNORE)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            start = self.starts[row]
            targets[i, :length] = self.shards[self.shard_of[row]][start : start + length]
            inputs[i, 1:length] = targets[i, : length - 1]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def repeated_targets(inputs: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return where a target already stands among the inputs up to its position: bool (rows, tokens).

    Args:
        inputs, targets: int64 (rows, tokens), as `tensors` returns them.
        counted: Bool (vocab_size,), which tokens count: without frequent ones, what is found are names and things
            that a reader has to remember.
    """
    earlier = (targets[:, :, None] == inputs[:, None, :]).tril().any(dim=-1)  # (rows, tokens)
    return earlier & (targets != IGNORE) & counted[targets.clamp(min=0)]


def _usage(rows: str, tokens: int, lost: dict[str, int]) -> Usage:
    return Usage(rows, int(tokens), {where: int(number) for where, number in lost.items() if number})


def _sampler(n_rows: int, batch_size: int, seed: int) -> ResumableSampler:
    if n_rows < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but the data have only {n_rows} rows: give a smaller one, a shorter "
            "context_length, or more text"
        )
    return ResumableSampler(n_rows, batch_size, seed)
