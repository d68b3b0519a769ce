"""One update of a model's weights from one batch, which all processes share among them.

A batch is cut into equal parts: one for each process, and each of these into as many as the options ask for, so that a
process holds only one part's activations at a time. The gradients are those of the whole batch, however it is cut.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.model.gpt import GPTModel
from shared.pretraining.objective import Objective
from shared.pretraining.options import Options
from shared.pretraining.processes import Processes, share_gradients, whole
from shared.pretraining.rows import DocumentRows, WindowRows
from shared.training.optimizers import build_optimizers, set_learning_rates
from shared.training.schedules import build_schedule


def rate_factors(options: Mapping[str, Any]) -> Callable[[int], float]:
    """Return the function from the number of updates done to the factor on the peak learning rates.

    The first step of a warm-up is not lost. Raises ValueError if the options do not fit each other.

    Args:
        options: Of the run, by name.
    """
    shape = {"decay": options["decay"]} if options["schedule"] == "wsd" else {}
    n_warmup = options["warmup_steps"]
    schedule = build_schedule(options["schedule"], options["steps"], n_warmup, **shape)
    return lambda step: schedule(step + (step < n_warmup))


class Updates:
    """The updates of a run: its model, optimizers and schedule, and the rows that they learn from.

    Args:
        options: Of the run.
        processes: This process among those of the run.
        model: On its device. Where there are several processes, it is prepared for them; with "fsdp" in place.
        train_rows: The training rows.
        objective: What is minimized.
        factors: Of `rate_factors`.

    Attributes:
        forward: What is called in the place of the model.
        optimizers: They share the parameters among them.
    """

    def __init__(
        self,
        options: Options,
        processes: Processes,
        model: GPTModel,
        train_rows: DocumentRows | WindowRows,
        objective: Objective,
        factors: Callable[[int], float],
    ) -> None:
        self.options, self.processes, self.model = options, processes, model
        self.train_rows, self.objective, self.factors = train_rows, objective, factors
        self.forward = processes.parallelize(model, options.parallel)
        self.optimizers = build_optimizers(
            model,
            options.optimizer,
            options.learning_rate,
            weight_decay=options.weight_decay,
            betas=(options.beta1, options.beta2),
            matrix_learning_rate=options.matrix_learning_rate,
        )

    @property
    def is_shared(self) -> bool:
        """Whether several processes compute the gradients together."""
        return self.forward is not self.model

    def autocast(self) -> AbstractContextManager:
        """Return the context of the forward pass."""
        if self.options.precision == "bf16":
            return torch.autocast(self.processes.device.type, torch.bfloat16)
        return nullcontext()

    def gradients(self, step: int, number: int) -> tuple[Tensor, int]:
        """Compute the gradients of batch `number`; return this process's part of its loss, and its targets.

        Args:
            step: Updates done; some parts of the loss are for some steps only.
            number: Of the batch, counted through all epochs.
        """
        options, processes = self.options, self.processes

        # The rows of the batch, and how many targets the loss is a mean of.
        rows = self.train_rows.batch(number)
        n_targets = self.train_rows.n_targets(rows)

        # Dropout that depends on the batch and the process, not on what was drawn before.
        if self.model.config.dropout:
            source = np.random.SeedSequence([options.seed, number, processes.rank])
            torch.manual_seed(int(source.generate_state(1, np.uint64)[0]))

        # The parts of the batch that are this process's, one after the other.
        n_parts = processes.world_size * options.accumulation
        size = len(rows) // n_parts
        first = processes.rank * options.accumulation
        last = first + options.accumulation - 1
        loss = torch.zeros((), device=processes.device)
        for part in range(first, last + 1):
            inputs, targets = self.train_rows.tensors(rows[part * size : (part + 1) * size])
            inputs, targets = inputs.to(processes.device), targets.to(processes.device)
            with share_gradients(self.forward, part == last):
                with self.autocast():
                    logits = self.forward(inputs)
                    losses, outside = (each / n_targets for each in self.objective.losses(logits, targets))
                loss += losses.sum().detach()
                batch = (inputs, targets)
                minimized = self.objective.total(losses, outside, batch, step, self.model, n_parts)
                # Gradients are averaged over the processes, and the loss is a sum over them.
                (minimized * processes.world_size).backward()
        return loss, n_targets

    def update(self, step: int, number: int) -> tuple[Tensor, Tensor, float, int]:
        """Make the update after `step` others, from batch `number`.

        Returns:
            This process's part of the loss and the norm of all gradients, both on the device; the learning rate; and
            the number of targets.
        """
        set_learning_rates(self.optimizers, self.factors(step))
        loss, n_targets = self.gradients(step, number)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        return loss, whole(norm), self.optimizers[-1].param_groups[0]["lr"], n_targets
