"""The run that sweeps over tales repeat: a new model, stories seen once, warm-up and decay, a known floor."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding
from shared.tales.generator import TaleGenerator
from shared.training.batches import document_row, row_batches
from shared.training.loop import train
from shared.training.losses import loss_per_document
from shared.training.schedules import build_schedule

N_VALIDATION, VALIDATION_SEED = 300, 999


@dataclass(frozen=True)
class Outcome:
    """A finished run: model, training loss at each step, loss per validation story and its floor, in nats."""

    model: GPTModel
    losses: list[float]
    loss_per_story: float
    floor: float
    tokens: int
    cpu_seconds: float


def story_rows(seed: int, n: int) -> tuple[list[list[int]], float]:
    """Return `n` stories of a seed as rows of ids, and the mean of -log p over them in nats: the floor of their loss.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    encoding, stories = tale_encoding(), list(TaleGenerator(seed).stories(n))
    rows = [document_row(story.text, encoding) for story in stories]
    return rows, -sum(story.log_probability for story in stories) / n


def train_on_tales(
    config: GPTConfig,
    seed: int,
    n_steps: int,
    batch_size: int,
    build: Callable[[nn.Module], list[Optimizer]],
    *,
    max_grad_norm: float = 1.0,
    n_validation: int = N_VALIDATION,
) -> Outcome:
    """Train a new model on stories seen once, warm-up of a tenth and linear decay of half; evaluate it.

    Args:
        config: The model's shape.
        seed: Of the first weights; seed + 1 makes the stories.
        n_steps: Number of updates, at least 2, so that there is a rise and a fall.
        batch_size: Stories of an update.
        build: Called with the model it returns its optimizers.
        max_grad_norm: Longer gradients are shortened to this norm.
        n_validation: How many stories of `VALIDATION_SEED` the loss is measured on.

    Raises:
        ValueError: A number is too small.
    """
    torch.manual_seed(seed)
    model = GPTModel(config)
    optimizers = build(model)
    rows, _ = story_rows(seed + 1, n_steps * batch_size)
    schedule = build_schedule("wsd", n_steps, n_steps // 10, decay=0.5)
    started = time.process_time()
    log = train(
        model,
        row_batches(rows, batch_size, seed=seed),
        optimizers,
        n_steps=n_steps,
        schedule=lambda step: schedule(step + 1),  # the first update has a rate above 0
        max_grad_norm=max_grad_norm,
    )
    seconds = time.process_time() - started
    checked, floor = story_rows(VALIDATION_SEED, n_validation)
    losses = [record.loss for record in log if record.loss is not None]
    return Outcome(model.eval(), losses, loss_per_document(model, checked), floor, log[-1].tokens, seconds)
