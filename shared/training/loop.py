"""The training loop of every language model here: documents to batches, the loss, its units, evaluation, the
loop and its log.

A batch is a pair (inputs, targets) of int64 ids (batch, tokens); a target of `IGNORE` counts for nothing.
Losses are in nats, the natural logarithm's unit. The loss of a step is the mean over its targets, however
they are spread over rows and accumulated batches.

Left out: optimisers of our own and schedules (shared.training.optimizers, shared.training.schedules),
loss scaling for float16, saving and resuming (shared.training.checkpoint), several processes
(ch05_pretraining/pretrain.py).

Follows Radford et al. (2019, "Language Models are Unsupervised Multitask Learners") for the objective,
Pascanu et al. (2013, "On the difficulty of training recurrent neural networks") for clipping the
gradient's norm.

Explained and proven in ch05_pretraining/01_training_loop.ipynb; written from there by `make promote`.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

IGNORE = -100  # the target that counts for nothing, as in torch.nn.functional.cross_entropy

Batch = tuple[Tensor, Tensor]


def next_token_loss(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """Return -log p(target) in nats.

    Args:
        logits: (batch, tokens, vocab_size); position t holds the prediction of targets[:, t].
        targets: int64 ids (batch, tokens).
        ignore_index: Targets of this value count for nothing.
        reduction: "mean" over the targets (NaN where there are none), "sum", or "none" for (batch, tokens) with zeros
            where ignored.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits must be (batch, tokens, vocab_size) with targets (batch, tokens), "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # 8 or 11 bits are too few for a sum over the vocabulary
    # One row a target: with the vocabulary in the middle, (batch, vocab_size, tokens), torch is five times slower.
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction=reduction
    )
    return losses.view_as(targets) if reduction == "none" else losses


def perplexity(loss: float) -> float:
    """Return e to the mean loss in nats per token: the number of equally probable tokens that are as hard to guess."""
    return math.exp(loss)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Return the loss of a whole text, in nats, as bits for each of its UTF-8 bytes; ValueError if it has none."""
    if n_bytes < 1:
        raise ValueError(f"n_bytes must be at least 1, got {n_bytes}")
    return nats / math.log(2) / n_bytes


def document_row(text: str, encoding: tiktoken.Encoding) -> list[int]:
    """Return [end] + ids + [end]: the model reads the first end token and predicts everything after it."""
    return [encoding.eot_token, *encoding.encode_ordinary(text), encoding.eot_token]


def pad_rows(rows: Sequence[Sequence[int]]) -> Batch:
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
    while rows and (epochs is None or epoch < epochs):
        for i in np.random.default_rng([seed, epoch]).permutation(len(rows)):
            yield rows[i]
        epoch += 1


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a text: `loss` in nats per token, `nats` of all tokens together, number of `tokens`."""

    loss: float
    nats: float
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], autocast: torch.dtype | None = None) -> Evaluation:
    """Return the loss of `model` on all `batches`, each target counted once.

    The model runs without dropout and is in its former mode afterwards. Raises ValueError if there is no target.
    """
    nats, n_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for inputs, targets in _on_device(batches, model):
            with _precision(inputs.device, autocast):
                losses = next_token_loss(model(inputs), targets, reduction="none")
            nats += losses.double().sum().item()
            n_tokens += int((targets != IGNORE).sum())
    finally:
        model.train(was_training)
    if not n_tokens:
        raise ValueError("batches hold no target to evaluate")
    return Evaluation(nats / n_tokens, nats, n_tokens)


def loss_per_document(model: nn.Module, rows: Sequence[Sequence[int]], batch_size: int = 32) -> float:
    """Return the mean over the rows of -log p(row), in nats per row, each read from its first token.

    For tales this is the loss whose lowest possible value is known: `shared.tales.generator.entropy()`.
    Raises ValueError if there is no row, or as `pad_rows` does.
    """
    ordered = sorted(rows, key=len)
    batches = (pad_rows(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size))
    return evaluate(model, batches).nats / len(ordered)


def choose_device() -> torch.device:
    """Return the device that `LLM_DEVICE` names; "auto", the default, is a GPU if there is one, else the CPU."""
    name = os.environ.get("LLM_DEVICE", "auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def _on_device(batches: Iterable[Batch], model: nn.Module) -> Iterator[Batch]:
    device = next(model.parameters()).device
    return ((inputs.to(device), targets.to(device)) for inputs, targets in batches)


def _precision(device: torch.device, dtype: torch.dtype | None) -> torch.autocast | nullcontext:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@dataclass(frozen=True)
class Record:
    """One line of the log of `train`, after `step` updates; None where there is no value.

    `tokens` counts the targets seen so far; `loss` is the mean over the targets of this step, measured before its
    update; `validation_loss` is what `on_evaluate` returned after it; `learning_rate` is that of the first group of the
    first optimizer; `grad_norm` is the norm before clipping.
    """

    step: int
    tokens: int
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    n_steps: int,
    start_step: int = 0,
    schedule: Callable[[int], float] | None = None,
    max_grad_norm: float | None = 1.0,
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    auxiliary_loss: Callable[[nn.Module], Tensor] | None = None,
    evaluate_every: int | None = None,
    on_evaluate: Callable[[int], float | None] | None = None,
) -> list[Record]:
    """Train `model` and return the log: one record for each step, and one for step `start_step` before any update.

    Args:
        model: Called as model(inputs), it returns logits (batch, tokens, vocab_size). It ends in its former mode.
        batches: (inputs, targets) of ids; a list or a loader is read again when it ends, an iterator must last.
        optimizers: One, or several that share the parameters among them.
        n_steps: Number of the last step; updates are numbered start_step + 1 to n_steps.
        start_step: Updates done earlier, when a run is resumed.
        schedule: schedule(k), k from 0, is the factor on each group's initial learning rate ("initial_lr" of the
            group, set from "lr" where missing) in update k + 1; without it the rates stay as they are.
        max_grad_norm: Longer gradients of all parameters together are shortened to this norm; None leaves them.
        accumulation: Batches of one update; their gradients add up to that of one large batch.
        autocast: torch.bfloat16 computes most matrix products in it; weights and updates keep their type.
        auxiliary_loss: auxiliary_loss(model) is added to the loss after each forward pass, but not to the log: for
            mixtures of experts.
        evaluate_every: Steps between two calls of `on_evaluate`.
        on_evaluate: Called as on_evaluate(step) before the first step, every `evaluate_every` steps and after the
            last, with the model in evaluation mode; the validation loss it may return goes to the log.

    Raises:
        ValueError: An argument is out of range, the batches end, or one holds no target.
        FloatingPointError: Loss or gradient is not finite; the update of this step has not been made.
    """
    optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    _check_training(optimizers, n_steps, start_step, max_grad_norm, accumulation, autocast, evaluate_every)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training, source = model.training, _on_device(_lasting(batches), model)
    n_tokens, seconds = 0, 0.0

    def validation(step: int) -> float | None:
        due = step in (start_step, n_steps) or (evaluate_every and step % evaluate_every == 0)
        if on_evaluate is None or not due:
            return None
        model.eval()
        result = on_evaluate(step)
        model.train()
        return result

    log = [Record(start_step, 0, validation_loss=validation(start_step))]
    model.train()
    try:
        # In a notebook tqdm itself does not read TQDM_DISABLE.
        quiet = bool(os.environ.get("TQDM_DISABLE"))
        with tqdm(total=n_steps, initial=start_step, unit="step", disable=quiet) as bar:
            for step in range(start_step + 1, n_steps + 1):
                started = time.perf_counter()
                if schedule is not None:
                    for group in groups:
                        group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(step - 1)
                step_batches = list(islice(source, accumulation))
                n_targets = sum(int((targets != IGNORE).sum()) for _, targets in step_batches)
                if not n_targets:
                    raise ValueError(f"the batches of step {step} hold no target")
                model.zero_grad()
                loss = _accumulate(model, step_batches, n_targets, autocast, auxiliary_loss)
                norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; a lower learning rate, warm-up or "
                        "clipping may help"
                    )
                for optimizer in optimizers:
                    optimizer.step()
                n_tokens += n_targets
                seconds += time.perf_counter() - started
                bar.set_postfix_str(f"loss {loss:.3f}, {n_tokens / seconds:,.0f} tokens/s", refresh=False)
                bar.update()
                log.append(Record(step, n_tokens, loss, validation(step), groups[0]["lr"], norm))
    finally:
        model.train(was_training)
    return log


def _accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    n_targets: int,
    autocast: torch.dtype | None,
    auxiliary_loss: Callable[[nn.Module], Tensor] | None,
) -> float:
    """Add the gradients of the mean loss over all `n_targets` targets of `batches` and return that loss."""
    total = 0.0
    for inputs, targets in batches:
        with _precision(inputs.device, autocast):
            loss = next_token_loss(model(inputs), targets, reduction="sum") / n_targets
        total += loss.item()
        if auxiliary_loss is not None:
            loss = loss + auxiliary_loss(model) / len(batches)
        loss.backward()
    return total


def _lasting(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        n_read = 0
        for batch in batches:
            n_read += 1
            yield batch
        if not n_read:
            raise ValueError("batches ended before the last step")


def _check_training(
    optimizers: Sequence[torch.optim.Optimizer],
    n_steps: int,
    start_step: int,
    max_grad_norm: float | None,
    accumulation: int,
    autocast: torch.dtype | None,
    evaluate_every: int | None,
) -> None:
    for name, value, holds, allowed in (
        ("optimizers", optimizers, len(optimizers) > 0, "at least one"),
        ("start_step", start_step, start_step >= 0, "at least 0"),
        ("n_steps", n_steps, n_steps > start_step, f"above start_step={start_step}"),
        ("accumulation", accumulation, accumulation >= 1, "at least 1"),
        ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0, "above 0, or None"),
        (
            "evaluate_every",
            evaluate_every,
            evaluate_every is None or evaluate_every >= 1,
            "at least 1, or None",
        ),
        ("autocast", autocast, autocast in (None, torch.bfloat16), "torch.bfloat16 or None"),
    ):
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {value}")
