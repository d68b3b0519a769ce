"""One training loop: for a language model, and with a loss of your own for anything else that learns by
gradients.

The loss of an update is the mean over its targets, however they are spread over rows and accumulated
batches. `loss` says what a step learns from: the next token unless told otherwise. A classifier, for
example, is trained with `loss=lambda model, inputs, targets:
torch.nn.functional.cross_entropy(model(inputs), targets, reduction="sum")`.

Left out: optimisers of our own and schedules (shared.training.optimizers, shared.training.schedules),
loss scaling for float16, saving and resuming (shared.training.checkpoint), several processes
(ch05_pretraining/pretrain.py).

Follows Pascanu et al. (2013, "On the difficulty of training recurrent neural networks") for clipping the
gradient's norm.

Explained and proven in ch05_pretraining/01_training_loop.ipynb; written from there by `make promote`.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shared.training.batches import IGNORE, Batch
from shared.training.losses import next_token_loss, on_device, own_modes, precision


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


StepLoss = Callable[[nn.Module, Any, Tensor], Tensor]


def summed_next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the losses of all targets, in nats: what `train` learns from unless told otherwise."""
    return next_token_loss(model(inputs), targets, reduction="sum")


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    n_steps: int,
    start_step: int = 0,
    loss: StepLoss = summed_next_token_loss,
    schedule: Callable[[int], float] | None = None,
    max_grad_norm: float | None = 1.0,
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    auxiliary_loss: Callable[[nn.Module], Tensor] | None = None,
    evaluate_every: int | None = None,
    on_evaluate: Callable[[int], float | None] | None = None,
    on_step: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Train `model` and return the log: one record for each step, and one for step `start_step` before any update.

    Args:
        model: Called as model(inputs), it returns logits (batch, tokens, vocab_size), unless `loss` calls it otherwise.
            If it is in evaluation mode it is trained in training mode; else each module is trained in its own mode. At
            the end each has its own mode back. Parameters that need no gradient stay as they are.
        batches: (inputs, targets) of ids; a list or a loader is read again when it ends, an iterator must last. With a
            `loss` of your own, inputs may be a tuple or dict of tensors, and targets any tensor with one number for
            each thing that counts: ids, classes, pairs to be compared. Those equal to `IGNORE` do not count.
        optimizers: One, or several that share the parameters among them. They keep their learning rates.
        n_steps: Number of the last step; updates are numbered start_step + 1 to n_steps.
        start_step: Updates done earlier, when a run is resumed.
        loss: loss(model, inputs, targets) returns the losses of the targets of a batch that count, or their sum, never
            their mean: it is divided here, by the number of targets of the whole update.
        schedule: schedule(k), k from 0, is the factor on each group's learning rate in update k + 1. Meanwhile the rate
            itself is the group's "initial_lr", so that a state saved midway has it; a resumed run reads it from there.
        max_grad_norm: Longer gradients of all parameters together are shortened to this norm; None leaves them.
        accumulation: Batches of one update; their gradients add up to that of one large batch.
        autocast: torch.bfloat16 computes most matrix products in it; weights and updates keep their type.
        auxiliary_loss: auxiliary_loss(model) is added to the loss after each forward pass, but not to the log: for
            mixtures of experts.
        evaluate_every: Steps between two calls of `on_evaluate`.
        on_evaluate: Called as on_evaluate(step) before the first step, every `evaluate_every` steps and after the
            last, with the model in evaluation mode; the validation loss it may return goes to the log.
        on_step: Called with the record of each update as soon as it is made, so that a log outlives a run that is
            interrupted or explodes.

    Raises:
        ValueError: An argument is out of range, an optimizer holds no parameter of the model, the batches end, or one
            holds no target.
        FloatingPointError: Loss or gradient is not finite; the update of this step has not been made.
    """
    # What is trained, and where its batches come from.
    optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    _check_training(optimizers, n_steps, start_step, max_grad_norm, accumulation, autocast, evaluate_every)
    check_parameters(optimizers, model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    source, n_tokens, seconds = on_device(_lasting(batches), model), 0, 0.0

    def validation(step: int) -> float | None:
        due = step in (start_step, n_steps) or (evaluate_every and step % evaluate_every == 0)
        if on_evaluate is None or not due:
            return None
        with own_modes(model):
            model.eval()
            return on_evaluate(step)

    with own_modes(model), own_rates(groups if schedule else ()):
        log = [Record(start_step, 0, validation_loss=validation(start_step))]
        if not model.training:
            model.train()
        # In a notebook tqdm itself does not read TQDM_DISABLE.
        quiet = bool(os.environ.get("TQDM_DISABLE"))
        with tqdm(total=n_steps, initial=start_step, unit="step", disable=quiet) as bar:
            for step in range(start_step + 1, n_steps + 1):
                started = time.perf_counter()
                # The learning rate of this update.
                if schedule is not None:
                    for group in groups:
                        group["lr"] = group["initial_lr"] * schedule(step - 1)
                # Its batches, and how many targets they hold together.
                step_batches = list(islice(source, accumulation))
                n_targets = sum(int((targets != IGNORE).sum()) for _, targets in step_batches)
                if not n_targets:
                    raise ValueError(f"the batches of step {step} hold no target")
                # Forward and backward; a long gradient is shortened.
                model.zero_grad()
                mean = _accumulate(model, loss, step_batches, n_targets, autocast, auxiliary_loss)
                norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
                # Nothing that is not a number may reach the weights.
                if not (math.isfinite(mean) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"step {step}: loss {mean:.4g}, gradient norm {norm:.4g}; a lower learning rate, warm-up or "
                        "clipping may help"
                    )
                # The update.
                for optimizer in optimizers:
                    optimizer.step()
                # What became of it, for the progress bar and the log.
                n_tokens += n_targets
                seconds += time.perf_counter() - started
                bar.set_postfix_str(f"loss {mean:.3f}, {n_tokens / seconds:,.0f} tokens/s", refresh=False)
                bar.update()
                log.append(Record(step, n_tokens, mean, validation(step), float(groups[0]["lr"]), norm))
                if on_step is not None:
                    on_step(log[-1])
    return log


@contextmanager
def own_rates(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Note the learning rate of each group of an optimizer as its "initial_lr", and give it back at the end."""
    for group in groups:
        group.setdefault("initial_lr", group["lr"])
    try:
        yield
    finally:
        for group in groups:
            group["lr"] = group.pop("initial_lr")


def _accumulate(
    model: nn.Module,
    loss: StepLoss,
    batches: Sequence[tuple[Any, Tensor]],
    n_targets: int,
    autocast: torch.dtype | None,
    auxiliary_loss: Callable[[nn.Module], Tensor] | None,
) -> float:
    """Add the gradients of the mean loss over all `n_targets` targets of `batches` and return that loss."""
    total = 0.0
    for inputs, targets in batches:
        with precision(targets.device, autocast):
            part = loss(model, inputs, targets).sum() / n_targets
        total += part.item()
        if auxiliary_loss is not None:
            part = part + auxiliary_loss(model) / len(batches)
        part.backward()
    return total


def _lasting(batches: Iterable) -> Iterator:
    while True:
        n_read = 0
        for batch in batches:
            n_read += 1
            yield batch
        if not n_read:
            raise ValueError("batches ended before the last step")


def check_parameters(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> None:
    """Refuse an optimizer that holds no parameter of `model` (ValueError): it would update something else."""
    own = set(model.parameters())
    for i, optimizer in enumerate(optimizers):
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if held.isdisjoint(own):
            raise ValueError(f"optimizers[{i}] must hold parameters of the model, got {len(held)} of another")


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
