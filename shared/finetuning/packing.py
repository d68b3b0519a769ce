"""Several conversations in one row, none of which sees the others.

Rows are filled by best-fit decreasing. Positions start anew with each conversation and a mask keeps them
apart, so the loss is that of each conversation alone.

Left out: kernels for sequences of different lengths (FlashAttention's `varlen`), which would also spare
the attention between conversations.

Follows Krell et al. (2021, "Efficient Sequence Packing without Cross-contamination").

Explained and proven in ch07_instruction/01_instruction_tuning.ipynb; written from there by `make promote`.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from shared.checks import check_sizes, require, whole_number
from shared.finetuning.instruction import Example
from shared.model.gpt import GPTModel
from shared.training.batches import IGNORE, shuffled_rows
from shared.training.losses import next_token_loss


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Return rows of places whose lengths together are at most `row_length`: longest first, each where it fits best.

    This is best-fit decreasing; it uses at most about 11/9 of the fewest rows possible (Johnson, 1974).
    Raises ValueError if a length is below 1 or above `row_length`.
    """
    rows, open_rows = [], []  # the open ones as (room that is left, number of the row), in order
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = whole_number(f"lengths[{place}]", lengths[place])
        require(f"lengths[{place}]", length, length <= row_length, f"at most row_length={row_length}")
        found = bisect_left(open_rows, (length, 0))
        if found < len(open_rows):
            room, number = open_rows.pop(found)
        else:
            room, number = row_length, len(rows)
            rows.append([])
        rows[number].append(place)
        if room > length:
            insort(open_rows, (room - length, number))
    return rows


def packed_batch(rows: Sequence[Sequence[Example]]) -> tuple[dict[str, Tensor], Tensor]:
    """Return rows of several examples each as one batch for `packed_loss`.

    Each example keeps its own shift by one: the last token of one never has the first of the next as its target.

    Returns:
        inputs: `tokens`, `positions`, which start anew with each example, and `documents`, the number of the example
            within its row, -1 for padding; each int64 (rows, longest).
        targets: int64 (rows, longest), `IGNORE` for prompts and padding.

    Raises:
        ValueError: There is no row, or an example has fewer than two ids.
    """
    require("rows", len(rows), len(rows) > 0 and all(map(len, rows)), "at least one, none empty")
    longest = max(sum(len(ids) - 1 for ids, _ in row) for row in rows)
    fill = {"tokens": 0, "positions": 0, "documents": -1, "targets": IGNORE}
    batch = {name: torch.full((len(rows), longest), value) for name, value in fill.items()}
    for number, row in enumerate(rows):
        start = 0
        for document, (ids, labels) in enumerate(row):
            require("an example", len(ids), len(ids) > 1, "of at least two ids")
            place = number, slice(start, start := start + len(ids) - 1)
            batch["tokens"][place] = torch.tensor(ids[:-1])
            batch["positions"][place] = torch.arange(len(ids) - 1)
            batch["documents"][place] = document
            batch["targets"][place] = torch.tensor(labels[1:])
    targets = batch.pop("targets")
    return batch, targets


def packed_logits(model: GPTModel, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
    """Return the logits (rows, tokens, vocab_size) of rows in which each document sees itself only.

    Args:
        tokens, positions, documents: int64 (rows, tokens), as of `packed_batch`. A row may be longer than the model's
            context as long as no document is.
    """
    same = documents[:, :, None] == documents[:, None, :]  # (rows, queries, keys)
    mask = same[:, None]  # for all heads; the attention adds the causal mask
    x = model.token_embedding(tokens)
    if model.position_embedding is not None:
        x = x + model.position_embedding(positions).to(x.dtype)
    x = model.dropout(x)
    for block in model.blocks:
        x = block(x, positions=positions, attention_mask=mask)
    return model.output_head(model.final_norm(x))


def packed_loss(model: GPTModel, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Return the sum of the losses of all targets of a packed batch, in nats: a loss for `train`."""
    return next_token_loss(packed_logits(model, **inputs), targets, reduction="sum")


def packed_batches(
    examples: Sequence[Example],
    row_length: int,
    rows_per_batch: int,
    *,
    seed: int = 0,
    epochs: int | None = None,
    pool: int = 512,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield packed batches in a new order in each epoch; without end if `epochs` is None.

    `pool` examples at a time are packed into rows of at most `row_length` tokens. Raises ValueError if there is no
    example, one does not fit, or a number is below 1.
    """
    require("examples", len(examples), len(examples) > 0, "at least one")
    check_sizes(row_length=row_length, rows_per_batch=rows_per_batch, pool=pool)
    rng = np.random.default_rng([seed, 1])
    source = shuffled_rows(examples, seed=seed, epochs=epochs)
    while read := list(islice(source, pool)):
        rows = [[read[i] for i in row] for row in pack([len(ids) - 1 for ids, _ in read], row_length)]
        order = rng.permutation(len(rows))
        for start in range(0, len(rows), rows_per_batch):
            yield packed_batch([rows[i] for i in order[start : start + rows_per_batch]])
