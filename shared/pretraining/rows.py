"""Rows of a training batch out of token shards, as a function of (seed, step) alone.

Two ways to cut them. `WindowRows`: windows of the stream in which documents follow each other. `DocumentRows`: a row
is one document read from its beginning, [end] + document + [end], cut to the context and padded to the longest row
of the batch; padding has the target -100, which cross-entropy ignores. Process r of w takes its slice of the same
batch, so the number of processes changes no batch.

Left out: masks between the documents of a window.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch

from shared.text.dataset import ResumableSampler, TokenShards, open_token_file
from shared.training.loop import IGNORE

Paths = Sequence[str | os.PathLike]


class WindowRows:
    """Windows of `context_length` tokens over the shards; shards that are too short for one are left out.

    Attributes:
        skipped: Paths of the shards left out.
    """

    def __init__(self, paths: Paths, context_length: int, batch_size: int, seed: int = 0) -> None:
        long_enough = [path for path in paths if len(open_token_file(path)) > context_length]
        self.skipped = [path for path in paths if path not in long_enough]
        if not long_enough:
            raise ValueError(
                f"no shard holds more than context_length={context_length} tokens: {list(paths)}"
            )
        self.context_length = context_length
        self.windows = TokenShards(long_enough, context_length)
        self.sampler = _sampler(len(self.windows), batch_size, seed)

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, number: int) -> list[int]:
        """Return the rows of batch `number`, counted through all epochs."""
        return self.sampler.batch(number)

    def n_targets(self, rows: Sequence[int]) -> int:
        """Return how many targets the rows have."""
        return self.context_length * len(rows)

    def tensors(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs, targets) of the rows, int64 of shape (rows, context_length)."""
        inputs, targets = zip(*(self.windows[row] for row in rows), strict=True)
        return torch.stack(inputs), torch.stack(targets)


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
        if pool < 1:
            raise ValueError(f"pool is {pool}; it must be at least 1")
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

    def tensors(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs, targets) of the rows, int64 of shape (rows, longest), padded with the end token and -100."""
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


def _sampler(n_rows: int, batch_size: int, seed: int) -> ResumableSampler:
    if n_rows < batch_size:
        raise ValueError(f"batch_size is {batch_size}, but the data have only {n_rows} rows")
    return ResumableSampler(n_rows, batch_size, seed)
